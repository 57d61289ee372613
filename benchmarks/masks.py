"""How fast are masks and scores that users write, biases, sinks and dropout? ``python -m benchmarks masks``.

Each row is ours beside one other way to the same result, in turns: the built-in mask, the same call without the feature,
FlexAttention (compiled), FlashAttention-4 where it is installed, torch's memory-efficient attention, FlashAttention-2. A ratio
is how many times as fast ours is, and stands beside what it should be at least. Forward passes note what a backward pass needs,
on both sides. That both compute the same is seen by their outputs and by the gradients of q, except under dropout.

On a GPU kernels are compiled ahead, by several processes, and rows are measured in one that can be ended whatever it does. A
row is printed and in the file as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import ahead, arguments, card, supervise, timing
from benchmarks.peers import compiled_flex, only, output_of, without_batch
from benchmarks.results import write_json
from cute_attn import attention, block_mask, command, masks, scores

SCHEMA = "masks 1"
ABOUT = "time masks, scores, biases, sinks and dropout beside other ways to the same results"
WIDTH, TOKENS = 2048, 16384  # heads · head_dim, and queries of a call
SMALL = {"seqlen": 64, "head_dim": 16, "tokens": 128, "width": 32}  # without a GPU
DOCUMENTS, WINDOW, P_DROPOUT = 16, 1024, 0.1
ALIKE = 0.99  # the cosine of two results, at least
BUSY_SECONDS, IDLE_SECONDS = 0.03, 0.05
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Size:
    """Of a call; lengths are the same for queries and keys."""

    seqlen: int
    head_dim: int
    tokens: int
    width: int

    @property
    def batch(self) -> int:
        return max(self.tokens // self.seqlen, 1)

    @property
    def heads(self) -> int:
        return max(self.width // self.head_dim, 1)


class Absent(Exception):  # noqa: N818
    """The other way isn't installed."""


Attend = Callable[..., Any]  # of q, k, v (batch, seqlen, heads, head_dim) and what else it differentiates by
Made = tuple[Attend, list[torch.Tensor]]  # and these


@dataclass(frozen=True)
class Row:
    """Ours beside another way: ``ours(size, device)`` and ``other(size, device)`` make what is called."""

    what: str
    beside: str
    goal: float
    seqlens: tuple[int, ...]
    ours: Callable[[Size, str], Made]
    other: Callable[[Size, str], Made]
    same: bool = True

    @property
    def name(self) -> str:
        return f"{self.what} ÷ {self.beside}"


# ---- masks and scores ------------------------------------------------------------------------------------------------


def document_ids(seqlen: int, device: str) -> torch.Tensor:
    """16 documents of lengths in ratios of 1 : 2 : 3."""
    lengths = torch.tensor([1 + i % 3 for i in range(DOCUMENTS)], dtype=torch.float64)
    ends = (lengths.cumsum(0) / lengths.sum() * seqlen).round()
    return torch.searchsorted(ends, torch.arange(seqlen, dtype=torch.float64), right=True).int().to(device)


@lru_cache(maxsize=32)
def function(what: str, seqlen: int, heads: int, device: str) -> Callable:
    """The mask or the score of a row: the same object for all, as its kernels are compiled for it."""
    if what == "causal":
        return masks.causal
    if what == "document":
        return masks.document(document_ids(seqlen, device))
    if what == "window":
        return masks.window(WINDOW)
    if what == "prefix-LM":
        return masks.prefix_lm(torch.full((TOKENS,), seqlen // 4, device=device))
    generator = torch.Generator().manual_seed(0)
    return scores.relative(torch.randn(heads, 2 * seqlen - 1, generator=generator).to(device))


def built_in(size: Size, device: str, **asked) -> Made:
    return partial(attention, **asked), []


def masked(what: str, size: Size, device: str) -> Made:
    """Ours with a mask function and its block mask."""
    mask = function(what, size.seqlen, size.heads, device)
    batch = size.batch if what == "prefix-LM" else None
    blocks = block_mask(mask, batch, None, size.seqlen, size.seqlen, device=device)
    return partial(attention, mask=mask, block_mask=blocks), []


def scored(what: str, size: Size, device: str) -> Made:
    return partial(attention, score=function(what, size.seqlen, size.heads, device)), []


def flex(what: str, kind: str, size: Size, device: str) -> Made:
    """FlexAttention; on a CPU as it is."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    call: Any = compiled_flex() if device == "cuda" else flex_attention
    of = function(what, size.seqlen, size.heads, device)
    asked: dict[str, Any] = {"score_mod": of}
    if kind == "score" and size.head_dim <= 64:
        # Its own choice for such heads on Hopper (128 keys, three stages) takes 240 KiB of shared memory where a table is read,
        # and a block has 227. Half as many keys fit; two stages do, too, and are slower.
        asked["kernel_options"] = {"fwd_BLOCK_N": 64}
    if kind == "mask":
        batch = size.batch if what == "prefix-LM" else None
        asked = {"block_mask": create_block_mask(of, batch, None, size.seqlen, size.seqlen, device=device)}
    return lambda q, k, v: call(*(x.transpose(1, 2) for x in (q, k, v)), **asked).transpose(1, 2), []


def fa4(what: str, size: Size, device: str) -> Made:
    """FlashAttention-4, which has windows, and documents as packed sequences."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise Absent(f"flash_attn.cute can't be imported: {error}") from error
    if what == "window":
        return lambda q, k, v: output_of(flash_attn_func(q, k, v, window_size=(WINDOW, 0))), []
    ids = document_ids(size.seqlen, device)
    bounds = torch.cat([torch.zeros(1, device=device), ids.bincount().cumsum(0)]).int()
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    return lambda q, k, v: output_of(flash_attn_varlen_func(*without_batch(q, k, v), **lengths))[None], []


# ---- biases, sinks, slopes, dropout ----------------------------------------------------------------------------------


def pair_bias(size: Size, device: str) -> torch.Tensor:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, size.heads, size.seqlen, size.seqlen
    return torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()


def biased(size: Size, device: str) -> Made:
    return lambda q, k, v, bias: attention(q, k, v, bias=bias), [pair_bias(size, device)]


def sdpa(backend: str, size: Size, device: str, bias: bool = False, dropout_p: float = 0.0) -> Made:
    """One of torch's kernels; on a CPU whatever it has."""

    def call(q, k, v, mask=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with only(backend if device == "cuda" else "MATH")():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p).transpose(1, 2)

    return call, [pair_bias(size, device)] if bias else []


def with_sinks(size: Size, device: str) -> Made:
    return built_in(size, device, causal=True, sinks=torch.zeros(size.heads, device=device))


def with_slopes(size: Size, device: str) -> Made:
    slopes = torch.exp2(-8.0 * torch.arange(1, size.heads + 1, device=device) / size.heads)
    return built_in(size, device, causal=True, alibi_slopes=slopes)


CAUSAL = partial(built_in, causal=True)
ROWS = [
    Row("causal as an expression", "built in", 0.95, (4096, 16384), partial(masked, "causal"), CAUSAL),
    *(
        Row(what, "FlexAttention", 1.4, (16384,), partial(masked, what), partial(flex, what, "mask"))
        for what in ("document", "window", "prefix-LM")
    ),
    Row("table", "FlexAttention", 1.4, (16384,), partial(scored, "table"), partial(flex, "table", "score")),
    *(Row(what, "FA4", 1.0, (16384,), partial(masked, what), partial(fa4, what)) for what in ("document", "window")),
    Row("bias", "memory-efficient", 1.5, (4096,), biased, partial(sdpa, "EFFICIENT_ATTENTION", bias=True)),
    Row("sinks", "without", 0.97, (4096, 16384), with_sinks, CAUSAL, same=False),
    Row("ALiBi", "without", 0.95, (4096, 16384), with_slopes, CAUSAL, same=False),
    Row(
        "dropout", "FlashAttention-2", 1.3, (4096,), partial(built_in, dropout_p=P_DROPOUT),
        partial(sdpa, "FLASH_ATTENTION", dropout_p=P_DROPOUT), same=False,
    ),
]  # fmt: skip
# Of a document mask: how long it may take to make a block mask, and the lists that a first call asks for beside.
LARGE = {16384: 100e-6, 131072: 5e-3}


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """Ours beside another way, at one size and direction; seconds of each, one of each round."""

    row: str
    seqlen: int
    head_dim: int
    direction: str
    goal: float
    ours: list[float] = dataclasses.field(default_factory=list)
    other: list[float] = dataclasses.field(default_factory=list)
    alike: float | None = None
    why_not: str = ""

    @property
    def ratio(self) -> float | None:
        return timing.scatter(self.other)[0] / timing.scatter(self.ours)[0] if self.ours and self.other else None

    @property
    def reached(self) -> bool | None:
        return None if self.ratio is None else self.ratio >= self.goal


@dataclass(frozen=True)
class Job:
    """A row at one size; without one, ``block_mask`` by itself."""

    name: str
    seqlen: int = 0
    head_dim: int = 0

    @property
    def label(self) -> str:
        return f"{self.seqlen}, d{self.head_dim}"

    @property
    def row(self) -> Row:
        return next(row for row in ROWS if row.name == self.name)

    def size(self, device: str) -> Size:
        return Size(self.seqlen, self.head_dim, TOKENS, WIDTH) if device == "cuda" else Size(**SMALL)

    def cells(self, directions: Sequence[str]) -> list[Cell]:
        return [Cell(self.name, self.seqlen, self.head_dim, direction, self.row.goal) for direction in directions]


BLOCK_MASK = Job("block_mask")
NAMES = ", ".join([row.name for row in ROWS] + [BLOCK_MASK.name])


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("masks", help=ABOUT, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="WORD", help=f"rows with one of these words: {NAMES}")
    parser.add_argument("--seqlen", type=arguments.length, nargs="+", help="of rows with several (4k 16k)")
    parser.add_argument("--head-dim", type=command.positive, nargs="+", default=[64, 128], help="(64 128)")
    parser.add_argument("--direction", choices=(FORWARD, BACKWARD), nargs="+", default=[FORWARD, BACKWARD], help="both")
    parser.add_argument("--rounds", type=command.positive, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--compile-jobs", type=command.positive, default=min(16, os.cpu_count() or 1),
                        help="processes that compile ahead on a GPU; 1: each when its turn comes (%(default)s)")  # fmt: skip
    parser.add_argument("--limit", type=arguments.seconds, default=120.0, help="seconds for a row, and to compile ahead (120)")
    parser.add_argument("--budget", type=arguments.seconds, metavar="SECONDS", help="begin no row later than this")
    parser.add_argument("--json", type=command.output_file, metavar="FILE", help="write the results here, after every row")


def run(options: argparse.Namespace, console: Console) -> int:
    """``masks``: exit status 1 where two ways to the same result differ. An interrupt keeps what was measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = card.about()
    cells: list[Cell] = []
    made: list[dict[str, Any]] = []
    stopped, late, began = 0, False, timing.HostClock.now()

    def save(complete: bool) -> None:
        if options.json:
            found: dict[str, Any] = {"schema": SCHEMA, "complete": complete, "about": about, "block_masks": made}
            write_json(options.json, found | {"cells": [*map(dataclasses.asdict, cells)]})

    try:
        jobs = _jobs(options, device)
        with closing(_results(jobs, device, options, console)) as results:
            for done, (job, found) in enumerate(results, 1):
                if job == BLOCK_MASK:
                    made += found
                else:
                    cells += found
                    for cell in found if not console.is_terminal else ():
                        console.print(*rows_of([cell])[0], highlight=False)
                save(complete=False)
                late = done < len(jobs) and timing.HostClock.now() - began > (options.budget or math.inf)
                if late:
                    break
    except KeyboardInterrupt as error:
        stopped = command.interrupted(error)
    if stopped or late:
        console.print("not completed", style="red")
    save(complete=not (stopped or late))
    console.print(table(cells))
    for one in made:
        text = f"{one['seconds'] * 1e6:,.0f} µs (at most {one['goal'] * 1e6:,.0f})"
        text += f", its lists {one['lists'] * 1e6:,.0f} µs" if "lists" in one else ""
        console.print(f"block_mask of documents, {one['seqlen']} × {one['seqlen']}: {text}, {one['bytes'] / 2**20:.2f} MiB")
    others = [f"{cell.row}, {cell.direction}" for cell in cells if cell.alike is not None and not cell.alike >= ALIKE]
    if others:
        console.print(f"two results: {', '.join(others)}", style="red", highlight=False)
    return stopped or int(bool(others))


def _jobs(options: argparse.Namespace, device: str) -> list[Job]:
    def asked(name: str) -> bool:
        return not options.only or any(word.lower() in name.lower() for word in options.only)

    def sizes(row: Row) -> list[tuple[int, int]]:
        if device != "cuda":
            return [(SMALL["seqlen"], SMALL["head_dim"])]
        lengths = [n for n in row.seqlens if not options.seqlen or n in options.seqlen] or row.seqlens
        return [(n, d) for n in lengths for d in options.head_dim]

    jobs = [Job(row.name, *size) for row in ROWS if asked(row.name) for size in sizes(row)]
    jobs += [BLOCK_MASK] if asked(BLOCK_MASK.name) else []
    if not jobs:
        raise ValueError(f"no row has a word of {' '.join(options.only)}; known: {NAMES}")
    return jobs


def _results(jobs: list[Job], device: str, options: argparse.Namespace, console: Console) -> Generator[tuple[Job, list]]:
    """Of each job what :func:`result` finds."""
    if device != "cuda":
        yield from ((job, result(job, device, options.direction, options.rounds)) for job in jobs)
        return
    ahead.switch_caches_on()
    work = [(job.name, job) for job in jobs if job != BLOCK_MASK]
    if options.compile_jobs > 1 and len(work) > 1:
        note = partial(console.print, highlight=False)
        ahead.compile_ahead(work, options.compile_jobs, options.direction, options.limit, note, first_calls)
    for job, found in supervise.apart(result, jobs, options.limit, device, options.direction, options.rounds):
        if isinstance(found, supervise.WorkerError):
            lost = [] if job == BLOCK_MASK else job.cells(options.direction)
            found = [dataclasses.replace(cell, why_not=str(found)) for cell in lost]
        yield job, found


def first_calls(name: str, job: Job, directions: Sequence[str]) -> float:
    """Compile what a row takes; seconds. Runs in a process of a pool."""
    began = timing.HostClock.now()
    prepared = prepare(job.row, job.size("cuda"), "cuda")
    torch.cuda.synchronize()
    if isinstance(prepared, str):
        raise RuntimeError(prepared)
    return timing.HostClock.now() - began


def result(job: Job, device: str, directions: Sequence[str], rounds: int) -> list:
    """The cells of a row, one a direction; of ``block_mask``, what :func:`block_mask_times` finds."""
    clock: timing.Clock = timing.CudaClock() if device == "cuda" else timing.HostClock()
    if job == BLOCK_MASK:
        return block_mask_times(device, clock, rounds)
    return measure(job, device, clock, directions, rounds)


@dataclass(frozen=True)
class Prepared:
    """Both ways of a row, ours first: what is called in each direction, and what it returned."""

    calls: dict[str, list[Callable[[], Any]]]
    results: dict[str, list[torch.Tensor]]


def prepare(row: Row, size: Size, device: str) -> Prepared | str:
    """Make and call both ways in both directions; or why that can't be."""
    try:
        both = [of(size, device) for of in (row.ours, row.other)]
    except Absent as why:
        return str(why)
    generator = torch.Generator(device).manual_seed(0)
    dtype, shape = torch.bfloat16 if device == "cuda" else torch.float32, (size.batch, size.seqlen, size.heads, size.head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    forward: list[Callable[[], Any]] = [partial(attend, *leaves, *more) for attend, more in both]
    try:
        outs = [call() for call in forward]
        backward: list[Callable[[], Any]] = [
            partial(torch.autograd.grad, out, [*leaves, *more], dout, retain_graph=True)
            for out, (_, more) in zip(outs, both, strict=True)
        ]
        grads = [call()[0] for call in backward]
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return Prepared({FORWARD: forward, BACKWARD: backward}, {FORWARD: [out.detach() for out in outs], BACKWARD: grads})


def measure(job: Job, device: str, clock: timing.Clock, directions: Sequence[str], rounds: int) -> list[Cell]:
    """A cell a direction."""
    cells, prepared = job.cells(directions), prepare(job.row, job.size(device), device)
    if isinstance(prepared, str):
        return [dataclasses.replace(cell, why_not=prepared) for cell in cells]
    for cell in cells:
        calls = prepared.calls[cell.direction]
        if job.row.same:
            one, two = (found.float().flatten() for found in prepared.results[cell.direction])
            cell.alike = torch.nn.functional.cosine_similarity(one, two, dim=0).item()
        per_call = [timing.estimate(clock, call) for call in calls]
        for _ in range(rounds):
            for call, once, into in zip(calls, per_call, (cell.ours, cell.other), strict=True):
                into.append(timing.burst(clock, call, once, busy=BUSY_SECONDS, idle=IDLE_SECONDS).samples[0])
    return cells


def block_mask_times(device: str, clock: timing.Clock, rounds: int) -> list[dict[str, Any]]:
    """Seconds of a block mask of documents, of the lists of a forward pass, and what it holds; without a GPU, whose kernel
    makes the lists, of the block mask alone."""
    found = []
    for seqlen, goal in LARGE.items() if device == "cuda" else [(256, 1.0)]:
        mask = masks.document(document_ids(seqlen, device))
        make = partial(block_mask, mask, None, None, seqlen, seqlen, device=device)
        blocks = make()

        def lists(blocks=blocks):
            return blocks.to(device).key_lists(128, 128, 1, 1)  # a block mask of its own, which has kept none

        one = {"seqlen": seqlen, "goal": goal, "seconds": _median(clock, make, rounds), "bytes": blocks.kinds.nbytes}
        if device == "cuda":
            one["lists"] = _median(clock, lists, rounds)
            one["bytes"] += blocks.key_lists(128, 128, 1, 1).nbytes
        found.append(one)
    return found


def _median(clock: timing.Clock, call: Callable[[], Any], rounds: int) -> float:
    once = timing.estimate(clock, call)
    turns = [timing.burst(clock, call, once, busy=BUSY_SECONDS, idle=IDLE_SECONDS) for _ in range(rounds)]
    return timing.scatter([turn.samples[0] for turn in turns])[0]


HEADINGS = ("row", "seqlen", "d", "direction", "ours", "other", "ratio", "at least", "alike")


def rows_of(cells: list[Cell]) -> list[list[str]]:
    """A row a cell under :data:`HEADINGS`."""
    found = []
    for cell in cells:
        if cell.why_not:
            times = [cell.why_not[:60], "", ""]
        else:
            times = [f"{timing.scatter(x)[0] * 1e6:,.0f} µs" for x in (cell.ours, cell.other)] + [f"{cell.ratio:.2f}"]
        alike = "" if cell.alike is None else f"{cell.alike:.4f}"
        found.append([cell.row, str(cell.seqlen), str(cell.head_dim), cell.direction, *times, f"{cell.goal:.2f}", alike])
    return found


def table(cells: list[Cell]) -> Table:
    """What was measured."""
    shown = Table(title="masks, scores, biases, sinks and dropout", title_justify="left")
    for i, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if i in (0, 3) else "right")
    for cell, row in zip(cells, rows_of(cells), strict=True):
        shown.add_row(*row, style="" if cell.reached is not False else "red")
    return shown
