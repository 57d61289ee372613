"""The measured figures in the documents, written from the result files: ``python -m benchmarks docs``.

A document marks a place with ``<!-- figures: NAME FILE -->`` … ``<!-- end of figures -->``; what lies between is one of
:data:`BLOCKS`, made from ``benchmarks/results/FILE``. A test compares every document with what this module would write, so
a figure can't outlive its file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.anchors import geometric_mean
from benchmarks.parts.results import PartsRecord
from benchmarks.parts.verdict import verdicts
from benchmarks.report import headline
from benchmarks.results import Cell, Record, is_ours

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- figures: (?P<name>[\w-]+) (?P<file>[\w.-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
OURS, OLDER, CUDNN, FLASH_2 = "ours_tma_wgmma", "ours_cp_async", "torch_cudnn", "torch_flash2"


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
        name, file = match["name"], RESULTS / match["file"]
        if name not in BLOCKS:
            raise ValueError(f"a document asks for the figures {name!r}; known ones are {', '.join(BLOCKS)}")
        load, block = BLOCKS[name]
        return match[1] + block(load(file)) + match[4]

    return BLOCK.sub(replace, text)


def conditions(record: Record) -> str:
    """What a run ran on."""
    return headline(record).replace("\n", "; ") + "\n"


def overview(record: Record) -> str:
    """A row per head dim and mask: our rate at each length and, in brackets, the ratio to the best peer."""
    cells = record.of_kind("burst")
    lengths = sorted({cell.case.seqlen_q for cell in cells})
    lines = _header(["TFLOP/s (÷ best peer)", *(_length(n) for n in lengths)])
    rows = dict.fromkeys((cell.case.head_dim, cell.case.causal) for cell in cells)
    for head_dim, causal in rows:
        row = {c.case.seqlen_q: c for c in cells if (c.case.head_dim, c.case.causal) == (head_dim, causal)}
        figures = [f"{_rate(row[n], OURS):.0f} ({_rate(row[n], OURS) / _best_peer(row[n])[1]:.2f})" for n in lengths]
        lines.append(_row([f"d{head_dim} {'causal' if causal else 'full'}", *figures]))
    return "\n".join(lines) + "\n"


def every_rate(record: Record) -> str:
    """A row per case, a column per peer, in TFLOP/s; the best in bold."""
    cells = record.of_kind("burst")
    peers = record.peer_names(cells)
    lines = _header(["case", *peers, "ours ÷ cuDNN", "cp_async ÷ FlashAttention-2", "ours ÷ best peer"])
    for cell in cells:
        best = max(cell.rates().values())
        rates = [f"**{_rate(cell, p):.0f}**" if _rate(cell, p) == best else f"{_rate(cell, p):.0f}" for p in peers]
        ratios = [
            _rate(cell, OURS) / _rate(cell, CUDNN),
            _rate(cell, OLDER) / _rate(cell, FLASH_2),
            _rate(cell, OURS) / _best_peer(cell)[1],
        ]
        lines.append(_row([_name(cell), *rates, *(f"{ratio:.2f}" for ratio in ratios)]))
    means = [f"{geometric_mean([_rate(cell, peer) for cell in cells]):.0f}" for peer in peers]
    lines.append(_row(["geometric mean", *means, "", "", ""]))
    return "\n".join(lines) + "\n"


def sustained(record: Record) -> str:
    """A row per case and peer under two seconds of load: rate, how busy the tensor cores were, clock and power."""
    lines = _header(["case", "peer", "TFLOP/s", "tensor cores busy", "SM clock", "power"])
    for cell in record.of_kind("sustained"):
        for peer, m in cell.results.items():
            if peer != "ours" and m.ok:
                busy = f"{100 * (m.utilization or 0):.0f} %"
                lines.append(
                    _row([_name(cell), peer, f"{m.tflops:.0f}", busy, f"{m.sm_mhz:.0f} MHz", f"{m.watts:.0f} W"])
                )
    return "\n".join(lines) + "\n"


def host(record: Record) -> str:
    """Microseconds of host time for an eager call."""
    (cell,) = record.of_kind("host")
    lines = _header(["peer", "µs a call"])
    lines += [_row([peer, f"{m.seconds * 1e6:.1f}"]) for peer, m in cell.results.items() if m.ok and m.seconds]
    return "\n".join(lines) + "\n"


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
    "every-rate": (Record.load, every_rate),
    "sustained": (Record.load, sustained),
    "host": (Record.load, host),
    "first-call": (Record.load, first_call),
    "variants": (_json, variants),
    "whole": (PartsRecord.load, whole),
}


def _rate(cell: Cell, peer: str) -> float:
    return cell.rates()[peer]


def _best_peer(cell: Cell) -> tuple[str, float]:
    return max(((p, r) for p, r in cell.rates().items() if not is_ours(p)), key=lambda item: item[1])


def _name(cell: Cell) -> str:
    case = cell.case
    return f"d{case.head_dim} {'causal' if case.causal else 'full'} {_length(case.seqlen_q)}"


def _length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]
