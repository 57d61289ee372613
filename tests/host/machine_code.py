"""Kernels compiled to machine code without their GPU, once in a run, for the tests that read it."""

from __future__ import annotations

import hashlib
import pickle
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import filelock
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


LABEL = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)  # nvdisasm's, where a kernel begins

# Targets whose code of a mechanism is another target's to the instruction (test_cross_compile.py compares them), and is
# compiled once for both.
SAME_CODE = {("sm_90", "cp_async"): "sm_90a"}


# Compiling every row of every table takes longer than a change to something else should wait for: a test run takes a sample.
# The rest has this mark, and runs with ``-m whole_tables``, which a change to kernels or tables is checked with; so has what
# compiles kernels to compare them with others.
whole_tables = pytest.mark.whole_tables


def each(cases: Iterable[Any], sampled: Callable[[Any], bool]) -> pytest.MarkDecorator:
    """A test of each case; of the ``sampled`` ones in every run."""
    marked = [pytest.param(case, id=str(case), marks=() if sampled(case) else whole_tables) for case in cases]
    return pytest.mark.parametrize("case", marked)


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
        cuobjdump, nvdisasm = cubin.tools()
        # What cuobjdump -sass prints, without the instructions' encodings: three quarters of its text, which nobody reads.
        sass = LABEL.sub(r"\t\tFunction : \1", _printed(nvdisasm, "-c", "-ndf", code))
        return Code(_printed(cuobjdump, "--dump-resource-usage", code), sass, list(ends.values()))


def _printed(tool: Path, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


class Shared:
    """What ``work`` makes of the problems and configs of a run's cases: each is made once, by whichever of the run's processes
    asks first, and only if asked for."""

    def __init__(self, folder: Path, work: Callable[[Problem, Config], Any]):
        self._folder, self._work = folder, work
        self._here: dict[tuple[Problem, Config], Any] = {}

    def __getitem__(self, case: Any) -> Any:
        config = case.config
        key = case.problem, replace(config, target=SAME_CODE.get((config.target, config.mechanism), config.target))
        if key not in self._here:
            self._here[key] = self._found_or_made(*key)
        return self._here[key]

    def _found_or_made(self, *key) -> Any:
        name = hashlib.sha256(f"{self._work.__module__} {key!r}".encode()).hexdigest()
        path = self._folder / f"{name}.pickle"
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.exists():
                new = path.with_suffix(".new")
                new.write_bytes(pickle.dumps(self._work(*key)))
                new.replace(path)
        return pickle.loads(path.read_bytes())


def allocated(parts: dict[str, int], **needed: bool) -> int:
    """The bytes of a plan's parts of shared memory, which counts all, without those that a problem does not need."""
    return sum(size for name, size in parts.items() if needed.get(name, True))


def assert_exception_is_needed(exception: tuple[int, str], spilled: list[int]):
    """The worst kernel of a row comes close to what its exception allows: much more would hide the next spill."""
    limit, reason = exception
    assert spilled, "there is no such row: drop the exception"
    assert max(spilled) > max(limit - 32, 0), f"at most {max(spilled)} bytes are spilled: lower the limit, {limit}, or drop it"
    assert reason
