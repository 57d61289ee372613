"""Fill the compile cache ahead of time, for this machine's GPU or any other: no GPU is needed.

Entries that are there are loaded and checked here; the rest are compiled in worker processes, each with a DSL of its
own, because the DSL compiles one kernel at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

from cute_attn.cache import cache_dir
from cute_attn.command import leave_interrupts_to_parent
from cute_attn.compile import compiled, entry_name
from cute_attn.layouts.base import Config
from cute_attn.problem import Problem


@dataclass(frozen=True)
class Outcome:
    """What became of one kernel: ``how`` is ``"hit"``, ``"compiled"``, ``"not kept"`` (compiled, but the folder could
    not be written) or ``"failed"``, of which ``error`` says why."""

    problem: Problem
    name: str
    seconds: float
    how: str
    error: str = ""

    @property
    def asked(self) -> str:
        """The problem's rules and flags in words."""
        flags = ("bounded_left", "bounded_right", "softcap", "return_lse", "deterministic", "for_backward", "large_cap")
        asked = [flag.replace("_", " ") for flag in flags if getattr(self.problem, flag)]
        if self.problem.gradients:
            asked.append(f"gradients of {self.problem.gradients}")
        return ", ".join(asked) or "full"


def training(problems: Iterable[Problem]) -> list[Problem]:
    """What training runs in place of problems: a forward pass that keeps something for the backward pass, and that, for
    gradients of q, k and v from the output."""
    forward = [replace(problem, for_backward=True) for problem in problems]
    backward = [replace(problem, return_lse=False, gradients="qkv") for problem in problems]
    return list(dict.fromkeys(forward + backward))


def fill(kernels: Iterable[tuple[Problem, Config]], workers: int) -> Iterator[Outcome]:
    """Yield what became of each kernel as soon as it is known; nothing is raised for one that fails."""
    missing = []
    for problem, config in kernels:
        if _written(problem, config):
            yield one(problem, config)
        else:
            missing.append((problem, config))
    if workers == 1 or len(missing) == 1:
        yield from (one(*kernel) for kernel in missing)
    elif missing:
        with processes(min(workers, len(missing))) as pool:
            futures = {pool.submit(one, *kernel): kernel for kernel in missing}
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    problem, config = futures[future]
                    yield Outcome(problem, entry_name(problem, config), 0.0, "failed", f"{error}: try -j 1")


def one(problem: Problem, config: Config) -> Outcome:
    """Load or compile one kernel and say which it was."""
    name, before, began = entry_name(problem, config), _written(problem, config), time.monotonic()
    try:
        compiled(problem, config)
    except Exception as error:  # whatever the compiler raises is this kernel's result, not the end of the others
        return Outcome(problem, name, time.monotonic() - began, "failed", f"{type(error).__name__}: {error}")
    after = _written(problem, config)
    how = "not kept" if not after else "hit" if after == before else "compiled"
    return Outcome(problem, name, time.monotonic() - began, how)


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """A pool of fresh processes: forking one that runs torch's threads is not safe. Where an exception leaves it, such as
    Ctrl-C, its processes end at once, in the middle of what they do."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=leave_interrupts_to_parent)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _written(problem: Problem, config: Config) -> int:
    """When the entry's record was written, 0 where there is none: a corrupt entry is written anew."""
    try:
        return (cache_dir() / f"{entry_name(problem, config)}.json").stat().st_mtime_ns
    except OSError:
        return 0
