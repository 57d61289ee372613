"""How fast is attention to a cache? ``python -m benchmarks serving``.

Every row is a step of serving: sequences of some keys each, one query each unless it says otherwise. A CUDA graph of several
steps is timed, each with a cache of its own, so that the L2 cache holds nothing of it and the host takes no part. A step is
given as the rate at which it reads keys and values, and as the part of **R**, the card's read rate: that of a kernel which does
nothing but read memory once, timed in turns with the steps. Rows with a base are given as its time over theirs, in turns, too.
Of the host it is what an eager call takes there, and of a call how much it launches."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import card, markdown
from benchmarks.results import write_json
from cute_attn import attention, attention_kvcache, command, launch, plan, serve

SCHEMA = "serving 1"
ABOUT = "time decoding from contiguous and paged caches, by the rate at which it reads them"
COLD_BYTES = 256 << 20  # of all caches of a row: more than any L2 cache holds
COPIES_MAX = 16
STEPS = 48  # of a graph, at least: what it takes to start one is no step's
READ_BYTES = 4 << 30


@dataclass(frozen=True)
class Row:
    """One step: keys of each sequence, and how they are stored; ``needs`` is the least part of R, or of the base's time over
    this row's, or, in ``most_us``, the most microseconds."""

    name: str
    keys: tuple[int, ...]
    heads: int = 32
    heads_kv: int = 8
    queries: int = 1
    page_size: int = 0
    invariant: bool = False
    base: str = ""
    needs: float = 0.0
    most_us: float = 0.0
    appends: bool = False
    captured: tuple[int, ...] = ()  # the lengths when the graph was captured, if others

    @property
    def bytes(self) -> int:
        return sum(self.keys) * self.heads_kv * 2 * 2 * HEAD_DIM


HEAD_DIM = 128
K = 1024
DENSE, READING = "dense", "reading"  # what takes turns with rows besides other rows
_READING = (
    Row("1 × 8k", (8 * K,), most_us=14.0),
    Row("1 × 128k", (128 * K,), needs=0.95),
    Row("16 × 8k", (8 * K,) * 16, needs=0.95),
    Row("64 × 8k", (8 * K,) * 64, needs=0.95),
    Row("128 × 4k, 32/4", (4 * K,) * 128, heads_kv=4, needs=0.95),
    Row("16 × 32k, 64/8", (32 * K,) * 16, heads=64, needs=0.95),
    Row("64k and 63 × 512", (64 * K, *(512,) * 63), needs=0.85),
    Row("64 × 8k, 64/1", (8 * K,) * 64, heads=64, heads_kv=1, needs=0.90),
)
ROWS = (
    *_READING,
    *(
        dataclasses.replace(_READING[3], name=f"64 × 8k, pages of {size}", page_size=size, base="64 × 8k", needs=needs)
        for size, needs in ((64, 0.97), (16, 0.97), (1, 0.85))
    ),
    dataclasses.replace(_READING[3], name="64 × 8k, 8 queries", queries=8, base="64 × 8k", needs=1 / 1.1),
    dataclasses.replace(_READING[3], name="64 × 8k, appended", appends=True, base="64 × 8k"),
    dataclasses.replace(_READING[6], name="64k and 63 × 512, captured as 64 × 512", captured=(512,) * 64,
                        base=_READING[6].name, needs=0.97),
    *(
        dataclasses.replace(row, name=f"{row.name}, invariant", invariant=True, base=row.name, needs=0.85, most_us=0.0)
        for row in _READING
    ),
    Row("2k queries, 32k keys", (32 * K,), queries=2 * K, base=DENSE, needs=0.95),
    Row("2k queries, 32k keys, pages of 64", (32 * K,), queries=2 * K, page_size=64, base=DENSE, needs=0.95),
)
HOST_ROW, HOST_MOST_US, LAUNCHES_MOST = _READING[0], 15.0, 2


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("serving", help=ABOUT, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--row", nargs="+", metavar="WORDS", help="rows whose names hold any of these (all)")
    parser.add_argument("--rounds", type=command.positive, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--config", nargs="+", default=[], metavar="ROWS:FIELD=N,…",
                        help="other fields of the configs of tiles of so many rows, such as 64:stages=2")  # fmt: skip
    parser.add_argument("--tiles", type=command.positive, choices=serve.ROWS, metavar="ROWS",
                        help="take tiles of so many rows always")  # fmt: skip
    parser.add_argument("--json", type=command.output_file, metavar="FILE", help="write the results here")


def run(options: argparse.Namespace, console: Console) -> int:
    """``serving``: exit status 1 where a row misses its bound."""
    rows = [row for row in ROWS if not options.row or any(word in row.name for word in options.row)]
    if not rows:
        raise ValueError(f"no row's name holds any of {', '.join(options.row)}; known: {'; '.join(row.name for row in ROWS)}")
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU, on which serving is timed: try a machine that has one")
    _configure(options.config)
    if options.tiles:
        serve.ROWS = (options.tiles,)
    found: list[dict[str, float]] = []
    rates: list[float] = []
    read = reader()
    for row in rows:
        steps = Steps(row)
        turns = {row.name: steps.graph, READING: Graph(partial(read, row.bytes), steps.count)}
        if row.base == DENSE:
            turns[DENSE] = Graph(dense_call(), steps.count)
        elif row.base:
            turns[row.base] = Steps(next(x for x in ROWS if x.name == row.base)).graph
        times: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(options.rounds):
            for name, graph in turns.items():
                times[name].append(graph.seconds())
            rates.append(READ_BYTES / timed(lambda: read(READ_BYTES, 0)))
        found.append({name: statistics.median(seconds) for name, seconds in times.items()})
        del steps, turns
    rate, host = statistics.median(rates), host_seconds()
    launched = [launches(dataclasses.replace(HOST_ROW, appends=appends)) for appends in (False, True)]
    cells = [cell_of(row, x, rate) | {"read_seconds": x[READING]} for row, x in zip(rows, found, strict=True)]
    show(cells, rate, host, launched, console)
    if options.json:
        record: dict[str, Any] = {"schema": SCHEMA, "about": card.about()}
        record |= {"read_bytes_per_second": rate, "host_seconds": host, "launches": launched}
        record |= {"config": options.config, "rows": cells}
        write_json(options.json, record, ensure_ascii=False)
    of_calls = host * 1e6 <= HOST_MOST_US and max(launched) <= LAUNCHES_MOST
    return 0 if of_calls and all(cell["met"] is not False for cell in cells) else 1


def _configure(changes: list[str]) -> None:
    """Take configs with other fields, of kernels for caches."""
    asked: dict[int, dict[str, int]] = {}
    for change in changes:
        rows, _, fields = change.partition(":")
        asked[int(rows)] = {name: int(n) for name, _, n in (field.partition("=") for field in fields.split(","))}
    plain = plan.plan

    def changed(problem, *how):
        return dataclasses.replace(plain(problem, *how), **asked.get(problem.rows, {}))

    for module in (launch, serve):
        setattr(module, "plan", changed)  # noqa: B010


class Steps:
    """A graph of steps of a row, each with a cache of its own."""

    def __init__(self, row: Row) -> None:
        copies = min(COPIES_MAX, max(1, -(-COLD_BYTES // row.bytes)))
        self.count = -(-STEPS // copies) * copies
        calls = [call_of(row, seed) for seed in range(copies)]
        self.graph = Graph(lambda i: calls[i % copies](), self.count)
        for call in calls if row.captured else ():
            call.keywords["lengths"].copy_(_int32(row.keys))


class Graph:
    """A CUDA graph of so many calls, each with its number."""

    def __init__(self, call: Callable[[int], Any], count: int) -> None:
        call(0)
        self.count, self.graph = count, torch.cuda.CUDAGraph()
        self.call = call  # and its tensors, which the graph reads
        with torch.cuda.graph(self.graph):
            for i in range(count):
                call(i)

    def seconds(self) -> float:
        """Of one call."""
        return timed(self.graph.replay) / self.count


def call_of(row: Row, seed: int) -> partial[Any]:
    """A step, on its own cache of numbers."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    batch, most = len(row.keys), max(row.keys)
    options: dict = {"batch_invariant": row.invariant, "causal": row.queries > 1}
    options["lengths"] = _int32(row.captured or row.keys)
    shape = batch, most
    if row.page_size:
        counts = [-(-n // row.page_size) for n in row.keys]
        table = torch.zeros(batch, max(counts), dtype=torch.int32)
        for i, pages in enumerate(torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).split(counts)):
            table[i, : counts[i]] = pages
        options["page_table"] = table.cuda()
        shape = sum(counts), row.page_size
    k, v = (normal(*shape, row.heads_kv, HEAD_DIM) for _ in range(2))
    q = normal(batch, row.queries, row.heads, HEAD_DIM)
    if row.appends:
        options["lengths"] -= row.queries
        options |= {f"{name}_new": normal(batch, row.queries, row.heads_kv, HEAD_DIM) for name in "kv"}
    return partial(attention_kvcache, q, k, v, **options)


def _int32(numbers: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call on the device: as many as take 20 ms, after one that isn't counted."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    count = max(1, round(0.02 / max(begin.elapsed_time(end) / 1e3, 1e-6)))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def dense_call() -> Callable[[int], Any]:
    """The dense kernel, 2k queries of 32k keys. It is timed as steps are: under load the card's clock sinks."""
    q, k = (torch.randn(1, n, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for n, heads in ((2 * K, 32), (32 * K, 8)))
    v = torch.randn_like(k)
    return lambda _: attention(q, k, v, causal=True)


@torch.inference_mode()
def host_seconds() -> float:
    """What the host takes for an eager call: the least of several times many calls, fewer than the device's queue holds."""
    call = call_of(HOST_ROW, 0)
    call()
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - begin) / 100)
    return min(times)


def launches(row: Row) -> int:
    """What a call launches: of one more in a graph, the first of which clears counters."""
    from cuda.bindings import runtime

    call, counts = call_of(row, 0), []
    call()
    for calls in (1, 2):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        error, _, count = runtime.cudaGraphGetNodes(runtime.cudaGraph_t(graph.raw_cuda_graph()))
        if error != runtime.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA doesn't say what a graph holds ({error.name})")
        counts.append(count)
    return counts[1] - counts[0]


def reader() -> Callable[[int, int], None]:
    """A kernel that reads so many of :data:`READ_BYTES` and does nothing else."""
    from benchmarks import reading  # imports the DSL

    device = torch.cuda.current_device()
    return reading.reader(READ_BYTES, launch.device_target(device), launch.multiprocessors(device))


def cell_of(row: Row, found: dict[str, float], rate: float) -> dict[str, Any]:
    seconds = found[row.name]
    part = row.bytes / seconds / rate
    over = found[row.base] / seconds if row.base else None
    met: bool | None = None
    if row.most_us:
        met = seconds * 1e6 <= row.most_us
    elif row.needs:
        met = (over if over is not None else part) >= row.needs
    return {"name": row.name, "seconds": seconds, "of_read_rate": part, "of_base": over, "needs": row.needs,
            "most_us": row.most_us, "met": met}  # fmt: skip


HEADINGS = ("step", "µs", "to read alone", "TB/s", "of R", "of its base", "needs", "")


def shown(cell: dict[str, Any], rate: float) -> list[str]:
    """What was measured of a row, under :data:`HEADINGS`."""
    needs = f"≤ {cell['most_us']:g} µs" if cell["most_us"] else f"{cell['needs']:.2f}" if cell["needs"] else ""
    return [
        cell["name"],
        f"{cell['seconds'] * 1e6:.1f}",
        f"{cell['read_seconds'] * 1e6:.1f}",
        f"{cell['of_read_rate'] * rate / 1e12:.2f}",
        f"{cell['of_read_rate']:.3f}",
        "" if cell["of_base"] is None else f"{cell['of_base']:.3f}",
        needs,
        {True: "met", False: "missed", None: ""}[cell["met"]],
    ]


def last_line(rate: float, host: float, launched: list[int]) -> str:
    """``launched`` is of a call without and with new keys."""
    text = f"R, a plain streaming read: {rate / 1e12:.2f} TB/s; the host's part of an eager call: {host * 1e6:.1f} µs"
    return f"{text}; launches a call: {launched[0]}, with new keys {launched[1]}"


def show(cells: list[dict[str, Any]], rate: float, host: float, launched: list[int], console: Console) -> None:
    table = Table(*HEADINGS)
    for cell in cells:
        table.add_row(*shown(cell, rate))
    console.print(table)
    console.print(last_line(rate, host, launched))


def figures(found: dict[str, Any]) -> str:
    """The same of a file, for a document."""
    rate = found["read_bytes_per_second"]
    table = markdown.table(HEADINGS, [shown(cell, rate) for cell in found["rows"]])
    last = last_line(rate, found["host_seconds"], found["launches"])
    return f"{markdown.ran_on(found['about'])}\n{table}\n{last}\n"
