"""Pictures of a run: rates over length with the measured ceiling drawn in, and ratios to the best peer; SVG and PNG."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.anchors import Anchors
from benchmarks.cases import DIRECTIONS, short
from benchmarks.report import anchored, ratio, recorded_peers
from benchmarks.results import DETERMINISTIC, RATES, Cell, Record, is_ours

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart; markers say the same again.
STYLES = {
    "ours_tma_wgmma": ("#D55E00", "o"),
    "ours_cp_async": ("#E69F00", "s"),
    "ours_deterministic": ("#D55E00", "o"),
    "ours_cp_async_deterministic": ("#E69F00", "s"),
    "ours_reference": ("#D55E00", "o"),
    "torch_flash2": ("#56B4E9", "v"),
    "torch_cudnn": ("#009E73", "^"),
    "torch_efficient": ("#999999", "<"),
    "torch_flex": ("#F0E442", ">"),
    "torch_math": ("#009E73", "^"),
    "torch_cpu": ("#56B4E9", "v"),
    "flash_attn": ("#56B4E9", "P"),
    "fa3": ("#0072B2", "D"),
    "fa4": ("#CC79A7", "X"),
}
OTHERS = (("#555555", "*"), ("#882255", "h"), ("#332288", "p"))
CEILING, GRID = "#000000", "#DDDDDD"
AHEAD, BEHIND = {"color": "#0072B2"}, {"color": "#E69F00", "hatch": "//"}  # hatching too, not colour alone
LABELS = {"burst": "bursts of 10 ms", "sustained": "sustained load"}
Figure = Any


def plot(record: Record, folder: Path, anchors: Anchors | None = None) -> list[Path]:
    """Draw every kind and direction of a run into ``folder``; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with drawing():
        for kind in RATES:
            for direction in DIRECTIONS:
                cells = [cell for cell in record.of(kind, direction) if cell.rates()]
                if not cells:
                    continue
                recorded = anchors if kind == "burst" else None
                title = f"{record.about.get('card', {}).get('name', '')}: {direction}, {LABELS[kind]}"
                written += save(draw_rates(record, cells, title, recorded), folder / f"rates-{direction}-{kind}")
                if any(ratio(cell, recorded) for cell in cells):
                    written += save(draw_ratios(cells, title, recorded), folder / f"ratios-{direction}-{kind}")
    return written


def drawing() -> AbstractContextManager[None]:
    """matplotlib without a screen and with our settings. Raises ``ValueError`` where it isn't installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib ({error}): try pip install matplotlib") from None
    matplotlib.use("Agg")
    # Text stays text in the SVG, and the same figures give the same file.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "cute-attn",
        "font.size": 9,
        "axes.axisbelow": True,
    }
    return matplotlib.rc_context(settings)


def draw_rates(record: Record, cells: list[Cell], title: str, anchors: Anchors | None) -> Figure:
    """TFLOP/s over sequence length: a row of panels per head dim (and other rules), a column per mask."""
    from matplotlib.lines import Line2D

    peers = record.peer_names(cells)
    recorded = recorded_peers(cells, anchors)
    panels: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        panels.setdefault(_panel(cell), []).append(cell)
    rows = list(dict.fromkeys(row for row, _ in panels))
    columns = list(dict.fromkeys(column for _, column in panels))
    figure, axes = _subplots(len(rows), len(columns), (4.2 * len(columns) + 0.4, 2.5 * len(rows) + 1.1))
    drawn: dict[str, Any] = {}
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axis, here = axes[i][j], sorted(panels.get((row, column), []), key=lambda cell: cell.case.seqlen_k)
            lengths = [cell.case.seqlen_k for cell in here]
            for name in [*peers, *recorded]:
                style = dict(_style(name, peers), linestyle=_line(name, recorded))
                rates = [{**anchored(cell, anchors), **cell.rates()}.get(name) for cell in here]
                points = [(x, y) for x, y in zip(lengths, rates, strict=True) if y is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), **style)
                    drawn.setdefault(f"{name} (recorded)" if name in recorded else name, Line2D([], [], **style))
            ceilings = [(c.case.seqlen_k, c.ceiling.tflops) for c in here if c.ceiling and c.ceiling.tflops]
            if ceilings:
                style = {"color": CEILING, "linestyle": "--", "linewidth": 1.2}
                axis.plot(*zip(*ceilings, strict=True), **style)
                drawn.setdefault("matrix product, measured", Line2D([], [], **style))
            _finish_rates(axis, lengths, f"{row}, {column}")
            axis.set_ylabel("TFLOP/s" if j == 0 else "")
            axis.set_xlabel("sequence length" if i == len(rows) - 1 else "")
    figure.suptitle(title)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(4, len(drawn)), frameon=False)
    return figure


def _finish_rates(axis: Any, lengths: list[int], title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.grid(color=GRID, linewidth=0.6)
    if lengths:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.minorticks_off()


def draw_ratios(cells: list[Cell], title: str, anchors: Anchors | None) -> Figure:
    """The best of ours over the best peer, a bar per case: above 1 ours is faster."""
    bars = [(cell.case.label.split(" ", 1)[1], r) for cell in cells if (r := ratio(cell, anchors)) is not None]
    figure, axes = _subplots(1, 1, (7, 0.24 * len(bars) + 1.5))
    axis = axes[0][0]
    places = range(len(bars))
    drawn: dict[str, Any] = {}
    for place, (_, r) in zip(places, bars, strict=True):
        bar = axis.barh(place, r, edgecolor="white", **(AHEAD if r >= 1 else BEHIND))
        drawn.setdefault("ours at least as fast" if r >= 1 else "best peer faster", bar)
        axis.text(1.01, place, f"{r:.2f}", va="center", fontsize=8, transform=axis.get_yaxis_transform())
    axis.axvline(1, color=CEILING, linewidth=1.2)
    axis.set_yticks(places, [label for label, _ in bars])
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, max(1.1, 1.1 * max(r for _, r in bars)))
    axis.set_xlabel("ours / best peer" + (", recorded peers counted" if anchors is not None else ""))
    axis.grid(axis="x", color=GRID, linewidth=0.6)
    figure.suptitle(title)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=len(drawn), frameon=False)
    return figure


def _panel(cell: Cell) -> tuple[str, str]:
    """(row, column) of a case's panel: everything that isn't its length, the mask in the column."""
    words = cell.case.label.split()[1:]
    words.remove(cell.case.lengths)
    mask = words.pop(1)
    return " ".join(words), mask


def _style(name: str, peers: list[str]) -> dict[str, Any]:
    unknown = [peer for peer in peers if peer not in STYLES]
    color, marker = STYLES.get(name) or OTHERS[unknown.index(name) % len(OTHERS) if name in unknown else 0]
    width, order = (1.2, 3) if not is_ours(name) else (1.6, 5) if name.endswith(DETERMINISTIC) else (2.4, 4)
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": width, "zorder": order}


def _line(name: str, recorded: list[str]) -> str:
    """Recorded rates are dotted; deterministic ones dashed, in the colour of what they are a version of."""
    return ":" if name in recorded else "--" if name.endswith(DETERMINISTIC) else "-"


def _subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def save(figure: Figure, stem: Path) -> list[Path]:
    """The files written, SVG and PNG."""
    from matplotlib import pyplot

    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=150)
    pyplot.close(figure)
    return paths
