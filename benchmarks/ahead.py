"""Compile ahead of measuring, in parallel: every peer's kernels for the cases of a run, into the caches on disk.

Compilers take seconds per kernel and one processor each, and the measuring process would go through them one by one. Here
each kernel is built by a first call in some process of a pool, which leaves it where the measuring process finds it. What
fails here fails there again, and is reported there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as LateError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from benchmarks.cases import Case
from benchmarks.peers import REGISTRY, Peer
from benchmarks.schedule import Job
from cute_attn.command import leave_interrupts_to_parent

Task = tuple[str, Case]
# Switches for caches on disk that are off by default.
CACHES_ON = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}


def tasks(names: Iterable[str], jobs: Iterable[Job]) -> list[Task]:
    """A case for each kernel that the peers of these names compile: the shortest of those that share it."""
    found: dict[tuple, Task] = {}
    for kind, case in sorted(jobs, key=lambda job: job[1].seqlen_q * job[1].seqlen_k):
        if kind == "first":  # its caches are to be empty
            continue
        for name in names:
            peer = REGISTRY[name]
            takes_part = case.direction in peer.directions and (kind == "host" or not peer.host_only)
            if peer.compiles and takes_part:
                found.setdefault((name, *_kernel(peer, case)), (name, case))
    return list(found.values())


def _kernel(peer: Peer, case: Case) -> tuple:
    """What tells the kernels of a peer apart."""
    if peer.compiles == "case":
        return (case,)
    bounded = tuple(edge is not None for edge in case.edges)
    kinds = bool(case.softcap), case.form, case.heads == case.heads_kv
    return case.direction, case.head_dim, case.head_dim_v, bounded, case.dtype, *kinds


def compile_ahead(
    work: Sequence[tuple[str, Any]],
    jobs: int,
    modules: Sequence[str],
    limit_s: float,
    done: Callable[[str], None] = lambda _: None,
    first_call: Callable[[str, Any, Sequence[str]], float] | None = None,
) -> float:
    """Make the first call of every task, ``jobs`` at a time, for at most ``limit_s``; the seconds it took.

    ``done`` hears a line for each one that has ended. A process that hangs or dies takes nothing down but the rest of
    what was to be compiled ahead.
    """
    began, first_call = time.monotonic(), first_call or first_call_of
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(work)), mp_context=context, initializer=leave_interrupts_to_parent)
    try:
        futures = {pool.submit(first_call, name, case, tuple(modules)): (name, case) for name, case in work}
        for future in as_completed(futures, timeout=limit_s):
            name, case = futures[future]
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                done(f"{name}, {case.label}: its process died; the rest is compiled when its turn comes")
                break
            done(f"{name}, {case.label}: " + (f"{future.result():.1f} s" if error is None else f"{error}"[:200]))
    except LateError:
        done(f"not done after {limit_s:.0f} s: the rest is compiled when its turn comes")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # at once: what they were to leave behind lies on disk
    return time.monotonic() - began


def first_call_of(name: str, case: Case, modules: Sequence[str]) -> float:
    """Build the peer and call it once; seconds. Runs in a process of the pool."""
    import torch

    from benchmarks.check import make_inputs
    from benchmarks.runner import Step

    for module in modules:
        importlib.import_module(module)
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = REGISTRY[name]
    with peer.around():
        Step(case, peer, make_inputs(case, device, seed=0)).call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - began


def switch_caches_on() -> None:
    """For this process and those that it starts; what the user has set stays."""
    for name, value in CACHES_ON.items():
        os.environ.setdefault(name, value)


