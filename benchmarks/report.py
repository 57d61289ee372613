"""Tables of a run for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.anchors import Anchors, geometric_mean
from benchmarks.compare import WORSE, Change, agreement
from benchmarks.results import KINDS, RATES, Cell, Measurement, Record, is_ours

BEST = "★"
HOST_BOUND = "ʰ"
ONE_SIDED = {"gone": "are in the old run only", "new": "are in the new run only"}
# What each of ours is measured by: how the ratio is called, ours, the other, and the form of cases, where it isn't any.
PAIRS: dict[str, tuple[str, ...]] = {
    "ours ÷ cuDNN": ("ours_tma_wgmma", "torch_cudnn"),
    "cp_async ÷ FlashAttention-2": ("ours_cp_async", "torch_flash2"),
    "deterministic ÷ default": ("ours_deterministic", "ours_tma_wgmma"),
    "packed ÷ rectangle": ("ours_tma_wgmma", "ours_rectangle", "packed"),
    "padded ÷ rectangle": ("ours_tma_wgmma", "ours_rectangle", "padded"),
    "deterministic ÷ default, cp_async": ("ours_cp_async_deterministic", "ours_cp_async"),
}


def show(record: Record, console: Console, anchors: Anchors | None = None) -> None:
    """Everything a run has: what it ran on, a table per kind and direction, why figures are missing."""
    console.print(headline(record))
    for name, why in record.about.get("missing", {}).items():
        console.print(f"  without {name}: {why}")
    cells = [cell for kind in RATES for cell in record.of_kind(kind)]
    for (kind, direction), group in groupby(cells, key=lambda cell: (cell.kind, cell.case.direction)):
        rows = list(group)
        recorded = anchors if kind == "burst" else None
        unit = (
            "TFLOP/s" if kind == "burst" else "TFLOP/s, and how busy that keeps the tensor cores at the clock they had"
        )
        console.print(rates_table(record, rows, f"{direction}, {KINDS[kind]}: {unit}; {rounds_of(rows)}", recorded))
        for line in pair_lines(rows):
            console.print(line, highlight=False)
    if any(m.host_bound for cell in cells for m in cell.results.values()):
        console.print(f"{HOST_BOUND} the device waited for the host: the figure is the host's, or made of one that is")
    for kind, table in (("host", host_table), ("memory", memory_table), ("first", first_table)):
        if rows := record.of_kind(kind):
            console.print(table(record, rows))
    if anchors is not None:
        console.print(f"recorded rates: {anchors.describe()}")
    for line in faults(record):
        console.print(line)
    if not record.complete:
        console.print("this run was not completed: what is missing above was not measured", style="yellow")


def headline(record: Record) -> str:
    """The card, its state before and after, and the versions that matter most, in two lines."""
    card, versions = record.about.get("card", {}), record.about.get("versions", {})
    states = [
        f"{when} {state['sm_mhz']:.0f} MHz {state['watts']:.0f} W"
        for when in ("before", "after")
        if (state := record.about.get(when))
    ]
    driver = f"driver {card['driver']}" if card.get("driver") else ""
    first = ", ".join(filter(None, [card.get("name") or "unknown device", driver, *states, record.about.get("date")]))
    return first + "\n" + ", ".join(f"{name} {version}" for name, version in versions.items())


def rounds_of(cells: list[Cell]) -> str:
    """What the ± of these cells is."""
    found = [m for cell in cells for m in cell.results.values() if m.ok]
    rounds, visits = ({*(len(m.samples) for m in found)}, {*(m.visits for m in found)}) if found else ({0}, {0})
    taken = f"{_from_to(rounds)} rounds in {_from_to(visits)} visits"
    return f"± is half the range of {taken}, at least what three in four figures of the run have"


def _from_to(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def pair_lines(cells: list[Cell]) -> list[str]:
    """For each pair that took part: the geometric mean of the ratios, the lowest, and where that is."""
    lines = []
    for title, who in PAIRS.items():
        found = [cell for cell in cells if pair(cell, *who) is not None]
        ratios = {cell.case.label.split(" ", 1)[1]: pair(cell, *who) or 0.0 for cell in found}
        if ratios:
            low = min(ratios, key=lambda label: ratios[label])
            mark = HOST_BOUND * any(is_of_host(cell, *who[:2]) for cell in found)
            mean = geometric_mean(list(ratios.values()))
            lines.append(f"{title}: {mean:.3f}{mark} in the geometric mean, {ratios[low]:.3f} at the lowest ({low})")
    return lines


def pair(cell: Cell, name: str, other: str, form: str | None = None) -> float | None:
    """The ratio of two rates in a cell that has both, if it is of a case of this form."""
    rates = cell.rates() if form in (None, cell.case.form) else {}
    return rates[name] / rates[other] if name in rates and other in rates else None


def rates_table(record: Record, cells: list[Cell], title: str, anchors: Anchors | None) -> Table:
    """A row per case: every peer's rate, the best marked, and what ours is of the best peer and of a matrix product."""
    peers = record.peer_names(cells)
    recorded = recorded_peers(cells, anchors)
    table = Table(title=title, title_justify="left")
    table.add_column("case", no_wrap=True)
    table.add_column("matmul", justify="right", no_wrap=True)
    for name in peers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in recorded:
        table.add_column(f"{name}\nrecorded", justify="right", style="dim")
    for heading in ("ours / best peer", "% of matmul"):
        table.add_column(heading, justify="right")

    def text(cell: Cell, m: Measurement | None, best: bool = False) -> Text:
        spread = 0.0 if m is None else record.printed_spread(cell.kind, m)
        return rate_text(m, best, spread, m is not cell.ceiling and cell.memory_bound)

    for cell in cells:
        rates = {**anchored(cell, anchors), **cell.rates()}
        best = max(rates, key=lambda name: rates[name]) if rates else None
        row: list[str | Text] = [cell.case.label.split(" ", 1)[1], text(cell, cell.ceiling)]
        row += [text(cell, cell.results.get(name), name == best) for name in peers]
        row += [rate(rates.get(name)) + (f" {BEST}" if name == best else "") for name in recorded]
        over = _number(ratio(cell, anchors), "{:.2f}")
        row += [over + HOST_BOUND * (over != "" and is_of_host(cell)), _number(of_matmul(cell), "{:.0%}")]
        table.add_row(*row)
    table.add_section()
    for summary in _summary_rows(cells, peers, recorded, anchors):
        table.add_row(*summary)
    return table


def _summary_rows(
    cells: list[Cell], peers: list[str], recorded: list[str], anchors: Anchors | None
) -> Iterable[list[str]]:
    """Geometric means (only over full columns: means over different rows don't compare), memory, error."""
    ceilings = [cell.ceiling.tflops for cell in cells if cell.ceiling and cell.ceiling.tflops]
    columns = [[cell.rates().get(name) for cell in cells] for name in peers]
    columns += [[anchored(cell, anchors).get(name) for cell in cells] for name in recorded]
    ratios = [r for cell in cells if (r := ratio(cell, anchors)) is not None]
    shares = [s for cell in cells if (s := of_matmul(cell)) is not None]
    yield [
        "geometric mean",
        rate(geometric_mean(ceilings) if ceilings else None),
        *(rate(geometric_mean([r for r in column if r]) if all(column) else None) for column in columns),
        _number(geometric_mean(ratios) if ratios else None, "{:.3f}"),
        _number(geometric_mean(shares) if shares else None, "{:.0%}"),
    ]
    blank = [""] * len(recorded) + ["", ""]

    def worst(pick: Callable[[Measurement], float | None], form: str) -> list[str]:
        found = [[x for cell in cells if name in cell.results and (x := pick(cell.results[name])) is not None]
                 for name in peers]  # fmt: skip
        return ["", *(_number(max(column, default=None), form) for column in found), *blank]

    yield ["largest error", *worst(lambda m: m.error, "{:.2%}")]
    memory = worst(lambda m: None if m.peak_bytes is None else m.peak_bytes / 2**20, "{:.1f}")
    if any(memory):
        yield ["largest extra memory, MiB", *memory]


def host_table(record: Record, cells: list[Cell]) -> Table:
    def text(cell: Cell, m: Measurement) -> str | None:
        if m.seconds is None or m.least is None:
            return None
        fastest = min((x.least for x in cell.results.values() if x.ok and x.least), default=None)
        median = f"{m.seconds * 1e6:.1f} ±{record.printed_spread(cell.kind, m):.0%}"
        return f"{m.least * 1e6:.1f}, median {median}{BEST if m.least == fastest else ''}"

    return _peer_table(record, cells, f"{KINDS['host']}: µs per call, the least of the rounds and their median", text)


def memory_table(record: Record, cells: list[Cell]) -> Table:
    title = f"{KINDS['memory']}: MiB beyond its outputs (+ kept from forward to backward)"
    return _peer_table(record, cells, title, lambda cell, m: mebibytes(m, 1))


def mebibytes(m: Measurement, digits: int) -> str | None:
    """What a call needs beyond its outputs and, if that is known, what it keeps from forward to backward."""
    if m.peak_bytes is None:
        return None
    kept = m.extra.get("kept_bytes")
    return f"{m.peak_bytes / 2**20:.{digits}f}" + ("" if kept is None else f" (+ {kept / 2**20:.{digits}f})")


def first_table(record: Record, cells: list[Cell]) -> Table:
    def text(cell: Cell, m: Measurement) -> str | None:
        x = m.extra
        return f"{x['cold_s']:.2f} / {x['warm_s']:.2f} ({x['warm_context_s']:.2f})" if x else None

    return _peer_table(record, cells, f"{KINDS['first']}: seconds, cold / warm (of which context and inputs)", text)


def _peer_table(record: Record, cells: list[Cell], title: str, text: Callable[[Cell, Measurement], str | None]) -> Table:
    """A row per case, a column per peer: ``text`` of its figure, or why there is none."""
    names = record.peer_names(cells)
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    for name in names:
        table.add_column(name, justify="right")
    for cell in cells:
        found = (cell.results.get(name) for name in names)
        table.add_row(cell.case.label, *((text(cell, m) if m and m.ok else None) or rate_text(m) for m in found))
    return table


def rate_text(m: Measurement | None, best: bool = False, spread: float = 0.0, memory_bound: bool = False) -> Text:
    """``690 ±0.4%``, the ± being ``spread``; with TB/s below where memory is the limit, and under sustained load with the
    tensor cores' utilization, clock and power."""
    if m is None:
        return Text()
    if not m.ok or m.tflops is None:
        return Text("–" if m.status == "unsupported" else m.status, "red" if m.status == "wrong" else "")
    figure = f"{rate(m.tflops)} ±{spread:.1%}" + (HOST_BOUND if m.host_bound else "")
    text = Text.assemble((f"{figure} {BEST}", "bold green") if best else figure)
    if memory_bound and m.tbytes_per_s:
        text.append(f"\n{m.tbytes_per_s:.2f} TB/s")
    if m.utilization and m.sm_mhz and m.watts:
        text.append(f"\n{m.utilization:.0%} · {m.sm_mhz:.0f} MHz · {m.watts:.0f} W")
    return text


def recorded_peers(cells: list[Cell], anchors: Anchors | None) -> list[str]:
    """Recorded peers that didn't take part live, in the recording's order."""
    live = {name for cell in cells for name in cell.rates()}
    return list(dict.fromkeys(name for cell in cells for name in anchored(cell, anchors) if name not in live))


def anchored(cell: Cell, anchors: Anchors | None) -> dict[str, float]:
    return anchors.rates.get(cell.case, {}) if anchors is not None else {}


def is_of_host(cell: Cell, *names: str) -> bool:
    """Whether one of these peers' figures is the host's; without names, ours or the best peer's."""
    rates = cell.rates()
    if not names:
        others = {name: rate for name, rate in rates.items() if not is_ours(name)}
        best = cell.ours, max(others.values(), default=None)
        names = tuple(name for name, rate in rates.items() if rate in best)
    return any(name in rates and cell.results[name].host_bound for name in names)


def ratio(cell: Cell, anchors: Anchors | None = None) -> float | None:
    """Ours over the best peer; recorded peers that aren't in the live cell count as peers."""
    theirs = [rate for name, rate in {**anchored(cell, anchors), **cell.rates()}.items() if not is_ours(name)]
    return cell.ours / max(theirs) if cell.ours and theirs else None


def of_matmul(cell: Cell) -> float | None:
    """Ours over the matrix product's rate in the same cell."""
    return cell.ours / cell.ceiling.tflops if cell.ours and cell.ceiling and cell.ceiling.tflops else None


def faults(record: Record) -> list[str]:
    """One line per missing figure that isn't just unsupported, then one per reason of those."""
    lines: list[str] = []
    unsupported: dict[tuple[str, str], None] = {}  # the same reason holds for many cells
    for cell in record.cells:
        if cell.note:
            lines.append(f"{cell.kind}: {cell.case.label}: {cell.note}")
        for name, m in cell.results.items():
            if m.status == "unsupported":
                unsupported[name, m.reason] = None
            elif m.status != "ok":
                lines.append(f"{cell.kind}: {cell.case.label}: {name} {m.status}: {m.reason}")
    return lines + [f"– {name}: {reason}" for name, reason in unsupported]


def show_changes(changes: list[Change], caveats: list[str], console: Console) -> int:
    """Print what changed; the exit status: 1 where something got slower or broke."""
    for line in caveats:
        console.print(f"compare with care: {line}")
    same = sum(change.verdict == "same" for change in changes)
    missing = Counter(
        (change.verdict, change.cell.kind, change.cell.case.direction) for change in changes if change.verdict in ONE_SIDED
    )
    for (verdict, kind, direction), count in missing.items():
        console.print(f"{kind}, {direction}: {count} figures {ONE_SIDED[verdict]}", highlight=False)
    for change in changes:
        if change.verdict != "same" and change.verdict not in ONE_SIDED:
            style = "red" if change.verdict in WORSE else "green" if change.verdict in ("faster", "mended") else ""
            console.print(change.describe(), style=style, highlight=False)
    worse = sum(change.verdict in WORSE for change in changes)
    found = agreement(changes)
    if found.figures:
        moved = [f"{who} {x - 1:+.1%}" for who, x in (("ours", found.ours), ("the others", found.others)) if x is not None]
        console.print(
            f"bursts: {found.within} of {found.figures} figures agree within their two spreads; the largest difference is "
            f"{found.largest:.1%}; time per call in the geometric mean: {', '.join(moved)}"
        )
    console.print(f"{len(changes) - missing.total()} figures compared: {same} unchanged, {worse} worse")
    return 1 if worse else 0


def cell_line(cell: Cell) -> str:
    """One finished cell in one line, for logs without a progress bar."""
    parts = []
    for name, m in cell.results.items():
        if m.ok and m.tflops:
            parts.append(f"{name} {rate(m.tflops)}")
        elif m.ok and cell.kind == "memory" and m.peak_bytes is not None:
            parts.append(f"{name} {m.peak_bytes / 2**20:.1f} MiB")
        elif m.ok and m.seconds and m.least:
            parts.append(f"{name} {m.least * 1e6:.0f} µs" if cell.kind == "host" else f"{name} {m.seconds:.2f} s")
        elif m.status != "unsupported":
            parts.append(f"{name} {m.status}")
    return f"{cell.kind}: {cell.case.label}: {', '.join(parts) or cell.note or 'nothing'}"


def rate(tflops: float | None) -> str:
    """TFLOP/s to a whole number, or to three digits below 10."""
    return "" if tflops is None else f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
