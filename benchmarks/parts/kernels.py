"""Micro-kernels as data, compiled in a pool of processes and kept on disk, and what the compiler made of them.

A part's module (``copies``, ``products``, …) defines

- ``function(kernel)``: the jit function and stand-ins for its arguments;
- ``expects(kernel)``: instructions that the kernel is there to measure and that must be found inside a loop of it;
- ``prepare(probe, compiled, device)``: a callable that launches it once, and the work of one launch by kind.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import one_line
from cute_attn.cache import check_trust, close_to_others
from cute_attn.fill import processes

if TYPE_CHECKING:
    from cute_attn.layouts.base import Config
    from cute_attn.problem import Problem

SYMBOL = "part"


@dataclass(frozen=True)
class Kernel:
    """A kernel of a part: ``how`` says which of them, in the part's own words. Hashed, it is its name on disk."""

    part: str
    how: str
    problem: Problem
    config: Config

    @property
    def label(self) -> str:
        """In words, for progress and messages."""
        c = self.config
        where = f"{c.mechanism} {c.tile_m}×{c.tile_n}×{c.tile_d} stages {c.stages}"
        return f"{self.part} {self.how}, {where}" + (", causal" if self.problem.bounded_right else "")


@dataclass(frozen=True)
class Built:
    """A kernel's object file, or why there is none; and what its code shows, where there are tools to read it."""

    path: str
    seconds: float = 0.0
    error: str | None = None
    registers: int | None = None
    spills: int | None = None  # stores to and loads from local memory
    missing: tuple[str, ...] = ()  # expected instructions that no loop holds

    @property
    def ok(self) -> bool:
        return self.error is None and not self.missing


def build(
    kernels: Iterable[Kernel],
    folder: Path,
    *,
    jobs: int,
    anew: bool = False,
    watch: Callable[[Kernel, Built], None] = lambda kernel, built: None,
) -> dict[Kernel, Built]:
    """Compile what ``folder`` doesn't hold yet (or all, ``anew``), ``jobs`` at a time. One that can't be compiled loses
    only itself."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_trust(folder)
    done: dict[Kernel, Built] = {}

    def note(kernel: Kernel, built: Built) -> None:
        done[kernel] = built
        watch(kernel, built)

    wanted = list(dict.fromkeys(kernels))
    if not anew:  # no process is started for what is there already
        for kernel in wanted:
            if (kept := _kept(folder / name_of(kernel))) is not None:
                note(kernel, kept)
        wanted = [kernel for kernel in wanted if kernel not in done]
    if not wanted:
        return done
    if jobs == 1:
        for kernel in wanted:
            note(kernel, compile_one(kernel, folder))
        return done
    with processes(min(jobs, len(wanted))) as pool:
        running = {pool.submit(compile_one, kernel, folder): kernel for kernel in wanted}
        for future in as_completed(running):
            try:
                built = future.result()
            except Exception as error:  # the process died: of memory, or in the compiler
                built = Built("", error=f"{type(error).__name__}: {error}"[:300])
            note(running[future], built)
    return done


def compile_one(kernel: Kernel, folder: Path) -> Built:
    """Compile one kernel; never raises. What its code shows is kept beside it."""
    began = time.monotonic()
    path = folder / name_of(kernel)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled = compile_kernel(kernel, f"--keep-cubin --dump-dir={scratch}")
            part, note = Path(scratch) / "part.o", Path(scratch) / "part.json"
            compiled.export_to_c(str(part), function_name=SYMBOL)
            found = look_into(kernel, next(Path(scratch).glob("*.cubin")))
            note.write_text(json.dumps(found))
            close_to_others(part)
            os.replace(part, path)
            os.replace(note, path.with_suffix(".json"))  # last: without it the entry is none
        return Built(str(path), time.monotonic() - began, **found)
    except Exception as error:
        return Built("", time.monotonic() - began, error=one_line(error))


def _kept(path: Path) -> Built | None:
    """An earlier compilation's result, if all of it is there."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
        check_trust(path)
        return Built(str(path), **{**found, "missing": tuple(found.get("missing", ()))})
    except (OSError, ValueError, TypeError):
        return None


def compile_kernel(kernel: Kernel, options: str = "") -> Any:
    """The DSL's compiled function. Needs no GPU."""
    dsl = importlib.import_module("cutlass.cute")
    function, arguments = part_module(kernel).function(kernel)
    return dsl.compile(function, *arguments, options=f"--enable-tvm-ffi --gpu-arch={kernel.config.target} {options}")


def load(kernel: Kernel, folder: Path) -> Callable:
    """The callable of a kernel that :func:`build` has compiled. Loading it runs it, so nobody else may have written it."""
    runtime, path = importlib.import_module("cutlass.cute.runtime"), folder / name_of(kernel)
    check_trust(path)
    return runtime.load_module(str(path), enable_tvm_ffi=True)[SYMBOL]


def part_module(kernel: Kernel) -> Any:
    return importlib.import_module(f"benchmarks.parts.{kernel.part}")


def name_of(kernel: Kernel) -> str:
    """The kernel's file: a readable part, and a hash of all it depends on."""
    digest = hashlib.sha256(f"{kernel!r}\n{_fingerprint()}".encode()).hexdigest()
    return f"{kernel.part}-{re.sub(r'[^a-z0-9]+', '-', kernel.how.lower())}-{digest[:20]}.o"


@lru_cache(maxsize=1)
def _fingerprint() -> str:
    """The project's own fingerprint, and the sources here."""
    from cute_attn.sources import fingerprint

    digest = hashlib.sha256(fingerprint().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


# ---- what the compiler made of it ----------------------------------------------------------------------------------


def look_into(kernel: Kernel, code: Path) -> dict[str, Any]:
    """Registers, spills and missing instructions of a cubin; nothing where there are no tools to read it with."""
    from cute_attn import cubin

    if not can_look():
        return {}
    found = cubin.read(code)
    looped = instructions_in_loops(cubin.listing(code))
    return {
        "registers": found.registers,
        "spills": found.spill_stores + found.spill_loads,
        "missing": tuple(name for name in part_module(kernel).expects(kernel) if not any(map(_is(name), looped))),
    }


def can_look() -> bool:
    """Whether the tools that read machine code are installed."""
    from cute_attn import cubin

    try:
        cubin.tools()
    except NotImplementedError:
        return False
    return True


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


def instructions_in_loops(sass: str) -> list[str]:
    """The instructions of a listing that lie between a backward branch and its target, each once per place."""
    found: list[str] = []
    for listing in re.split(r"\n\s*Function : ", sass):
        lines = [(int(m[1], 16), m[2], m[3]) for m in map(_LINE.search, listing.splitlines()) if m]
        loops = [
            (int(target[0], 16), address)
            for address, name, operands in lines
            if name.startswith("BRA") and (target := re.findall(r"0x([0-9a-f]+)", operands))
        ]
        # A branch to itself is the end of the code, not a loop.
        loops = [(first, last) for first, last in loops if first < last]
        found += [name for address, name, _ in lines if any(first <= address <= last for first, last in loops)]
    return found


def _is(name: str) -> Callable[[str], bool]:
    """Whether an instruction is ``name``, with or without modifiers: ``MUFU.EX2`` is found as ``MUFU.EX2.F16`` too."""
    return lambda instruction: instruction == name or instruction.startswith(name + ".")
