"""The measured figures in the documents, written from the result files: ``python -m benchmarks docs``.

A document marks a place with ``<!-- figures: NAME FILE -->`` … ``<!-- end of figures -->``; what lies between is one of
:data:`BLOCKS`, made from ``benchmarks/results/FILE``; ``agreement`` takes two files, the older run first. A test compares
every document with what this module would write, so a figure can't outlive its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import compare, training
from benchmarks.anchors import geometric_mean
from benchmarks.parts.results import PartsRecord
from benchmarks.parts.verdict import verdicts
from benchmarks.report import PAIRS, headline, pair
from benchmarks.results import Cell, Record, is_ours

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/performance.md")
BLOCK = re.compile(
    r"(?P<mark><!-- figures: (?P<name>[\w-]+) (?P<files>[\w.-]+(?: [\w.-]+)*) -->\n).*?(?P<end><!-- end of figures -->)",
    re.DOTALL,
)
OURS = "ours_tma_wgmma"


def write_all() -> list[str]:
    """Rewrite every marked place; returns the documents that changed."""
    changed = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text()
        new = rendered(old)
        if new != old:
            path.write_text(new)
            changed.append(name)
    return changed


def rendered(text: str) -> str:
    """A document's text with every marked place made anew. Raises ``ValueError`` for an unknown block or file."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"a document asks for the figures {name!r}; known ones are {', '.join(BLOCKS)}")
        load, block = BLOCKS[name]
        return match["mark"] + block(*(load(RESULTS / file) for file in match["files"].split())) + match["end"]

    return BLOCK.sub(replace, text)


def conditions(record: Record) -> str:
    """What a run ran on."""
    return headline(record).replace("\n", "; ") + "\n"


def overview(record: Record, direction: str = "forward") -> str:
    """A row per head dim and mask: our rate at each length and, in brackets, the ratio to the best peer."""
    cells = record.of("burst", direction)
    lengths = sorted({cell.case.seqlen_q for cell in cells})
    lines = _header(["TFLOP/s (÷ best peer)", *(_length(n) for n in lengths)])
    rows = dict.fromkeys((cell.case.head_dim, cell.case.causal) for cell in cells)
    for head_dim, causal in rows:
        row = {c.case.seqlen_q: c for c in cells if (c.case.head_dim, c.case.causal) == (head_dim, causal)}
        figures = [_overview(row.get(n)) for n in lengths]
        lines.append(_row([f"d{head_dim} {'causal' if causal else 'full'}", *figures]))
    return "\n".join(lines) + "\n"


def _overview(cell: Cell | None) -> str:
    rates = {} if cell is None else cell.rates()
    theirs = max((rate for name, rate in rates.items() if not is_ours(name)), default=None)
    if OURS not in rates:
        return ""
    return f"{rates[OURS]:.0f}" + (f" ({rates[OURS] / theirs:.2f})" if theirs else "")


def every_rate(record: Record, direction: str = "forward") -> str:
    """A row per case, a column per peer, in TFLOP/s, the best in bold; then what ours is of what it is measured by."""
    cells = record.of("burst", direction)
    peers = record.peer_names(cells)
    pairs = [(name, other, title) for name, other, title in PAIRS if any(pair(cell, name, other) for cell in cells)]
    lines = _header(["case", *peers, *(title for _, _, title in pairs), "ours ÷ best peer"])
    columns: list[list[float | None]] = []
    for cell in cells:
        rates = cell.rates()
        best, ours = max(rates.values()), rates.get(OURS)
        theirs = max((rate for name, rate in rates.items() if not is_ours(name)), default=None)
        ratios = [pair(cell, name, other) for name, other, _ in pairs]
        ratios.append(ours / theirs if ours and theirs else None)
        columns.append([*(rates.get(name) for name in peers), *ratios])
        shown = [f"**{rates[name]:.0f}**" if rates.get(name) == best else _number(rates.get(name), 0) for name in peers]
        lines.append(_row([_name(cell), *shown, *(_number(ratio, 2) for ratio in ratios)]))
    means = []  # of whole columns only: means over different rows don't compare
    for i, column in enumerate(zip(*columns, strict=True)):
        whole = [value for value in column if value]
        means.append(_number(geometric_mean(whole) if len(whole) == len(column) else None, 0 if i < len(peers) else 2))
    lines.append(_row(["geometric mean", *means]))
    return "\n".join(lines) + "\n"


def agreement(old: Record, new: Record) -> str:
    """How far two runs of the same thing agree."""
    found = compare.agreement(compare.compare(old, new))
    moved = [("ours", found.ours), ("the others", found.others)]
    lines = _header(["figures in both runs", "agree within their two spreads", "unchanged", "largest difference", *(
        f"time per call, {who}" for who, mean in moved if mean is not None
    )])  # fmt: skip
    means = [f"{mean - 1:+.1%}" for _, mean in moved if mean is not None]
    lines.append(_row([str(found.figures), str(found.within), str(found.same), f"{found.largest:.1%}", *means]))
    return "\n".join(lines) + "\n"


def sustained(record: Record, direction: str = "forward") -> str:
    """A row per case and peer under two seconds of load: rate, how busy the tensor cores were, clock and power."""
    lines = _header(["case", "peer", "TFLOP/s", "tensor cores busy", "SM clock", "power"])
    for cell in record.of("sustained", direction):
        for peer, m in cell.results.items():
            if peer != "ours" and m.ok:
                busy = f"{100 * (m.utilization or 0):.0f} %"
                lines.append(
                    _row([_name(cell), peer, f"{m.tflops:.0f}", busy, f"{m.sm_mhz:.0f} MHz", f"{m.watts:.0f} W"])
                )
    return "\n".join(lines) + "\n"


def host(record: Record) -> str:
    """Microseconds of host time for an eager call, and for one with its backward pass where that was measured."""
    cells = record.of_kind("host")
    titles = {"forward": "µs a call", "both": "µs a call with its backward pass"}
    lines = _header(["peer", *(titles[cell.case.direction] for cell in cells)])
    for peer in record.peer_names(cells):
        found = [cell.results.get(peer) for cell in cells]
        lines.append(_row([peer, *(f"{m.seconds * 1e6:.1f}" if m and m.ok and m.seconds else "" for m in found)]))
    return "\n".join(lines) + "\n"


def memory(record: Record) -> str:
    """MiB of the card that a call needs beyond its outputs, and what the forward pass keeps for the backward pass."""
    cells = record.of_kind("memory")
    lines = _header(["peer", *(cell.case.label for cell in cells)])
    for peer in record.peer_names(cells):
        figures = []
        for cell in cells:
            m = cell.results.get(peer)
            if m is None or not m.ok or m.peak_bytes is None:
                figures.append("")
                continue
            kept = m.extra.get("kept_bytes")
            figures.append(f"{m.peak_bytes / 2**20:.0f}" + ("" if kept is None else f" (+ {kept / 2**20:.0f})"))
        lines.append(_row([peer, *figures]))
    return "\n".join(lines) + "\n"


def trained(found: training.Outcome) -> str:
    """A row per run of the small transformer: its last losses, and how far its curve is from eager attention's."""
    lines = _header(["attention", "loss at the end", "largest difference from eager", "seconds"])
    for name, curve in found.curves.items():
        off = found.differences.get(name)
        cells = [name, f"{curve[-1]:.4f}", "" if off is None else f"{off:.4f}", f"{found.seconds[name]:.1f}"]
        lines.append(_row(cells))
    return "\n".join(lines) + f"\n\n{found.sentence}\n"


def first_call(record: Record) -> str:
    """Seconds to the first result of a fresh process, after ``import torch``."""
    (cell,) = record.of_kind("first")
    lines = _header(["peer", "cold cache", "warm cache", "of which CUDA context and inputs"])
    for peer, m in cell.results.items():
        seconds = (m.extra[name] for name in ("cold_s", "warm_s", "warm_context_s"))
        lines.append(_row([peer, *(f"{s:.2f} s" for s in seconds)]))
    return "\n".join(lines) + "\n"


def variants(runs: dict) -> str:
    """A table for each thing that was tried: a row per case, a column per variant, and cuDNN in the same run."""
    text = []
    for run in runs["runs"]:
        names = list(dict.fromkeys(name for row in run["rows"] for name in row["tflops"]))
        lines = _header([run["title"], *names, "cuDNN"])
        for row in run["rows"]:
            case = f"d{row['head_dim']} {'causal' if row['causal'] else 'full'} {_length(row['seqlen'])}"
            rates = [str(row["tflops"].get(name, "")) for name in names]
            lines.append(_row([case, *rates, str(row["torch_cudnn"])]))
        text.append("\n".join(lines) + "\n")
    return "\n".join(text)


def whole(record: PartsRecord) -> str:
    """The forward kernel with stages left out or done twice, and the sentence that this adds up to."""
    figures = [figure for figure in record.figures if figure.part == "whole" and figure.ok]
    lines = _header(["the kernel with", "time"])
    lines += [_row([figure.what, f"{figure.seconds * 1e6:.0f} µs"]) for figure in figures if figure.seconds]
    sentences = [verdict.sentence for verdict in verdicts(record.figures)]
    return "\n".join(lines) + "\n\n" + "\n".join(sentences) + "\n"


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


BLOCKS: dict[str, tuple[Callable, Callable[..., str]]] = {
    "conditions": (Record.load, conditions),
    "overview": (Record.load, overview),
    "overview-backward": (Record.load, partial(overview, direction="backward")),
    "every-rate": (Record.load, every_rate),
    "every-rate-backward": (Record.load, partial(every_rate, direction="backward")),
    "agreement": (Record.load, agreement),
    "sustained": (Record.load, sustained),
    "sustained-backward": (Record.load, partial(sustained, direction="backward")),
    "memory": (Record.load, memory),
    "training": (training.Outcome.load, trained),
    "host": (Record.load, host),
    "first-call": (Record.load, first_call),
    "variants": (_json, variants),
    "whole": (PartsRecord.load, whole),
}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _name(cell: Cell) -> str:
    case = cell.case
    return f"d{case.head_dim} {'causal' if case.causal else 'full'} {_length(case.seqlen_q)}"


def _length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]
