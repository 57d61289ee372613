"""Kernels compiled to machine code without their GPU, by a pool of processes, for the tests that read it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from cute_attn import cubin
from cute_attn.compile import compile_only
from cute_attn.layouts.base import Config
from cute_attn.problem import Problem


class Code(NamedTuple):
    """What the tools print of a problem's kernels, and the shared memory that each allocates, alignment included."""

    resources: str
    sass: str
    smem_bytes: list[int]


def compiled(problem: Problem, config: Config) -> Code:
    """Compile and disassemble."""
    from cutlass.memory import SmemAllocator

    ends: dict[int, int] = {}
    keep, allocate = [], SmemAllocator._smem_alloca

    def counting(self, layout, dtype, byte_alignment, *args, **kwargs):
        from cutlass import cute

        keep.append(self)  # so that no other gets its id
        end = -(-ends.get(id(self), 0) // byte_alignment) * byte_alignment
        ends[id(self)] = end + cute.cosize(layout) * dtype.width // 8
        return allocate(self, layout, dtype, byte_alignment, *args, **kwargs)

    with mock.patch.object(SmemAllocator, "_smem_alloca", counting), tempfile.TemporaryDirectory() as folder:
        compile_only(problem, config, f"--keep-cubin --dump-dir={folder}")
        (code,) = Path(folder).glob("*.cubin")
        return Code(_disassembled("--dump-resource-usage", code), _disassembled("-sass", code), list(ends.values()))


def _disassembled(option: str, code: Path) -> str:
    cuobjdump, nvdisasm = cubin.tools()
    environment = {**os.environ, "PATH": f"{nvdisasm.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(
        [str(cuobjdump), option, str(code)], env=environment, capture_output=True, text=True, check=True
    ).stdout


class Results(dict[Hashable, Future]):
    """The results of cases on their way, each from when it is first asked for."""

    def __init__(self, pool: ProcessPoolExecutor, work: Callable[[Any], Any]):
        self.pool, self.work = pool, work

    def __missing__(self, case: Hashable) -> Future:
        self[case] = self.pool.submit(self.work, case)
        return self[case]


@contextmanager
def by_processes(work: Callable[[Any], Any], request, file: str, fixture: str) -> Iterator[Results]:
    """``work`` of the cases of a run, begun for those whose test in ``file`` takes ``fixture``."""
    pytest.importorskip("cutlass")
    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))
    results = Results(pool, work)
    for item in request.session.items:
        if item.path == Path(file) and fixture in item.fixturenames:  # another file may have a fixture of that name
            results[item.callspec.params["case"]]  # asking is enough
    try:
        yield results
    finally:
        pool.shutdown(cancel_futures=True)


def assert_exception_is_needed(exception: tuple[int, str], spilled: list[int]):
    """The worst kernel of a row comes close to what its exception allows: much more would hide the next spill."""
    limit, reason = exception
    assert spilled, "there is no such row: drop the exception"
    assert max(spilled) > max(limit - 32, 0), f"at most {max(spilled)} bytes are spilled: lower the limit, {limit}, or drop it"
    assert reason
