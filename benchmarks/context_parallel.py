"""Attention over several cards, beside one card and torch's own ``context_parallel``. A few minutes on two:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.context_parallel --json cp.json
    python -m benchmarks.context_parallel --merging      # on one: how fast partial results are merged, beside a copy

For each length and method, forward and forward with backward: the rate of a card, as a part of the one-card kernel's on the
whole sequence, medians of runs in turns; the memory at the peak beyond inputs and results; of a ring's run, how much of the
transfers lies under kernels. Causal, and full at the first length. Written after each cell: what ends early leaves what it had.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import markdown
from benchmarks.arguments import length
from benchmarks.card import date
from benchmarks.cases import Case
from benchmarks.flops import flops
from cute_attn import attention, distributed, launch
from cute_attn.command import output_file
from cute_attn.distributed import costs
from cute_attn.distributed.schedule import Shards

HEADS, HEADS_KV, HEAD_DIM = 32, 8, 128
TURNS = 3
REPEATS = 20  # of what takes less than a millisecond
SCHEMA = "context parallel 1"
PEER = "torch's context_parallel, seconds"
FAILURES = (ImportError, AttributeError, NotImplementedError, RuntimeError, AssertionError, TypeError, ValueError)  # a peer's


def inputs(rows: int, heads_kv: int = HEADS_KV) -> list[torch.Tensor]:
    """q, k, v, and the output's gradient."""
    heads = HEADS, heads_kv, heads_kv, HEADS
    return [torch.randn(1, rows, count, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for count in heads]


def pass_of(function: Callable, tensors: list[torch.Tensor], backward: bool) -> Callable[[], None]:
    """One forward pass, or one with gradients."""
    *qkv, dout = tensors
    leaves = [x.requires_grad_(backward) for x in qkv]

    def run() -> None:
        out = function(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, dout)

    return run


def seconds(run: Callable[[], Any]) -> float:
    """Of the slowest rank, all of which begin together; without ranks, of this process."""
    if dist.is_initialized():
        dist.barrier()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    longest = torch.tensor([begin.elapsed_time(end) / 1e3], device="cuda")
    if dist.is_initialized():
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def in_turns(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The medians, after one untimed run of each."""
    for run in runs.values():
        seconds(run)
    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(TURNS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in runs}


def memory(run: Callable[[], None], kept: int) -> int:
    """Bytes at the peak beyond what was there and ``kept``, the results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept


def overlap(run: Callable[[], None]) -> dict[str, float]:
    """Seconds of transfers and of other kernels in a run, and of transfers while another kernel ran."""
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Mem", "nccl:")):
            spans["nccl" in event.name.lower()].append((event.time_range.start, event.time_range.end))
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in spans[True] for c, d in spans[False])
    total = {is_transfer: sum(b - a for a, b in of_kind) for is_transfer, of_kind in spans.items()}
    return {"transfers": total[True] / 1e6, "kernels": total[False] / 1e6, "transfers under kernels": both / 1e6}


def heads_first(q, k, v):
    """torch's function, causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def merging() -> dict[str, float]:
    """Bytes a second of the kernel that merges partial results, by the dtype of what is so far, and of a copy of as many bytes
    as it writes. Several at once, so that no launch is waited for."""
    more = torch.randn(1, 32768, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    so_far = {"float32": more.float(), "bfloat16": more.clone()}
    lse, lse_more = (torch.zeros(1, HEADS, 32768, device="cuda") for _ in range(2))
    copied = torch.empty_like(so_far["float32"])
    runs: dict[str, Callable[[], Any]] = {"copy": partial(copied.copy_, so_far["float32"])}
    runs |= {name: partial(launch.merge, x, lse, more, lse_more, 1.0) for name, x in so_far.items()}
    found = in_turns({name: partial(_repeated, run) for name, run in runs.items()})
    touched = {name: x.nbytes + copied.nbytes + more.nbytes + 3 * lse.nbytes for name, x in so_far.items()}
    return {name: REPEATS * touched.get(name, 2 * copied.nbytes) / took for name, took in found.items()}


def _repeated(run: Callable[[], Any]) -> None:
    for _ in range(REPEATS):
        run()


def said_of_merging(rates: dict[str, float]) -> str:
    """The rates, and their ratio to the copy's."""
    return "\n".join(f"{x:8}  {rate / 1e12:.3f} TB/s  {rate / rates['copy']:.3f} of a copy's" for x, rate in rates.items())


def measure(seqlen: int, causal: bool, backward: bool) -> dict[str, Any]:
    ranks = dist.get_world_size()
    rows, direction = seqlen // ranks, "forward + backward" if backward else "forward"
    whole, shards = inputs(seqlen), inputs(rows)
    runs = {"one card": pass_of(lambda q, k, v: attention(q, k, v, causal=causal), whole, backward)}
    for method in ("ring", "ulysses"):
        runs[method] = pass_of(
            lambda q, k, v, method=method: distributed.attention(q, k, v, causal=causal, method=method), shards, backward
        )
    found = in_turns(runs)
    sizes = 1, seqlen, seqlen, HEADS, HEADS_KV, HEAD_DIM, HEAD_DIM
    work = flops(Case(*sizes, causal=causal, direction="both" if backward else "forward"))
    rates = {name: work / (1 if name == "one card" else ranks) / took / 1e12 for name, took in found.items()}
    results = shards[0].nbytes + (sum(x.nbytes for x in shards[:3]) if backward else 0)
    beyond = {method: memory(runs[method], results) / (shards[1].nbytes * 2) for method in ("ring", "ulysses")}
    return {
        "seqlen": seqlen, "causal": causal, "direction": direction, "seconds": found, "TFLOP/s a card": rates,
        "of one card": {name: rate / rates["one card"] for name, rate in rates.items() if name != "one card"},
        "memory beyond, in shards of k and v": beyond, "of one step": overlap(runs["ring"]),
    }  # fmt: skip


def measure_torch(seqlen: int, backward: bool) -> float | str:
    """Seconds of torch's context_parallel, causal, or why not. Its k and v have as many heads as q, as it takes them."""
    try:
        from torch.distributed.tensor.experimental import context_parallel

        mesh = dist.init_device_mesh("cuda", (dist.get_world_size(),))
        shards = inputs(seqlen // dist.get_world_size(), HEADS)
        with context_parallel(mesh, buffers=[torch.arange(seqlen, device="cuda")], buffer_seq_dims=[0]):
            return in_turns({"torch": pass_of(heads_first, shards, backward)})["torch"]
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"


# ---- as tables ---------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """What was measured, a row a cell: rates of a card as parts of the one-card kernel's, and what the ring's transfers hid."""
    rows = []
    for cell in record["cells"]:
        over, torchs, step = cell["of one card"], cell.get(PEER), cell["of one step"]
        beside = f"{torchs / cell['seconds']['ring']:.2f}" if isinstance(torchs, float) else ""
        hidden = step["transfers under kernels"] / step["transfers"] if step["transfers"] else 0.0
        rows.append([
            f"{'causal' if cell['causal'] else 'full'}, {cell['seqlen'] // 1024}k, {cell['direction']}",
            f"{cell['TFLOP/s a card']['one card']:.0f}",
            f"{over['ring']:.3f}",
            f"{over['ulysses']:.3f}",
            beside,
            f"{hidden:.0%}",
            f"{cell['memory beyond, in shards of k and v']['ring']:.1f}",
        ])
    first = f"{record['ranks']} × {record['card']}, {record['date']}"
    others = "one card, TFLOP/s", "ring ÷", "ulysses ÷", "ring ÷ torch's", "transfers under kernels", "memory, ring"
    return markdown.table([first, *others], rows)


def predicted() -> str:
    """On paper: which part of its time a card computes, forward, causal, in a ring, with ulysses, and with both."""
    rows = []
    sizes, heads_ranks, band = costs.Sizes(1, HEADS, HEADS_KV, 2 * HEAD_DIM, 2), costs.HOST_RANKS, (None, 0)
    for ranks in (2, 8, 64, 1024):
        for seqlen in (1 << 16, 1 << 18, 1 << 20, 1 << 23):
            shards, card = Shards(seqlen, ranks), costs.card_of(ranks)
            ring, ulysses = (of(shards, shards, band, None, sizes, card) for of in (costs.of_ring, costs.of_ulysses))
            parts = [1 - ring.waits / ring.seconds, 1 - ulysses.waits / ulysses.seconds if HEADS % ranks == 0 else None, None]
            if ranks > heads_ranks:
                outer = Shards(seqlen, ranks // heads_ranks, split=heads_ranks)
                each = sizes._replace(heads=HEADS // heads_ranks, heads_kv=HEADS_KV // heads_ranks)
                ring = costs.of_ring(outer, outer, band, None, each, card)
                inner = Shards(outer.rows, heads_ranks, "contiguous")
                waits = costs.of_ulysses(inner, inner, band, None, sizes, costs.card_of(heads_ranks)).waits
                parts[2] = (ring.seconds - ring.waits) / (ring.seconds + waits)
            rows.append([str(ranks), f"{seqlen // 1024}k", *("" if part is None else f"{part:.2f}" for part in parts)])
    return markdown.table(["cards", "tokens", "ring", "ulysses", "both, 8 for heads"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.context_parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    file = output_file if os.environ.get("RANK", "0") == "0" else Path  # one rank writes
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=file, metavar="FILE", help="measure all, under torchrun")
    what.add_argument("--merging", action="store_true", help="measure only the kernel that merges, on one card")
    parser.add_argument("--seqlen", type=length, nargs="+", default=[65536, 262144], help="%(default)s")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU, on which this is timed: try a machine that has one, or two without --merging")
    if options.merging:
        print(torch.cuda.get_device_name())
        print(said_of_merging(merging()))
        return 0
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        launched = "torchrun --standalone --nproc-per-node 2 -m benchmarks.context_parallel --json FILE"
        parser.error(f"{', '.join(missing)}: not in the environment, by which ranks find each other: try {launched}")
    local, cards = dist.get_node_local_rank(0), torch.cuda.device_count()
    if local >= cards:
        parser.error(f"a rank of number {local} on this machine, which has {cards}; a GPU for each is needed: try fewer ranks")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", timeout=timedelta(minutes=2), device_id=torch.device("cuda", local))
    torch.manual_seed(dist.get_rank())
    about: dict[str, Any] = {
        "schema": SCHEMA, "card": torch.cuda.get_device_name(), "ranks": dist.get_world_size(), "torch": torch.__version__,
        "date": date(),
        "heads": [HEADS, HEADS_KV], "head_dim": HEAD_DIM, "dtype": "bfloat16",
    }  # fmt: skip
    cells: list[dict[str, Any]] = []

    def keep() -> None:
        if dist.get_rank() == 0:
            options.json.write_text(json.dumps({**about, "cells": cells}, indent=1) + "\n")
            print(json.dumps(cells), flush=True)

    asked = [(seqlen, True, backward) for seqlen in options.seqlen for backward in (False, True)]
    asked += [(options.seqlen[0], False, backward) for backward in (False, True)]
    about["merging, bytes a second"] = merging()
    for cell in asked:
        cells.append(measure(*cell))
        torch.cuda.empty_cache()
        keep()
    for i, (seqlen, causal, backward) in enumerate(asked):  # last: whatever a peer does to the process, ours is written
        if causal:
            cells[i][PEER] = measure_torch(seqlen, backward)
            torch.cuda.empty_cache()
            keep()
            if isinstance(cells[i][PEER], str):
                break
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
