"""Pictures of the parts: a bar for each figure, its limit drawn in, the share that is reached beside it; SVG, PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.parts.catalogue import PARTS
from benchmarks.parts.results import Figure, PartsRecord
from benchmarks.parts.show import TITLES, number
from benchmarks.plot import CEILING, GRID, drawing, save

# Okabe and Ito's colours, which the common kinds of colour blindness keep apart; names beside the bars say the same.
COLORS = {"tma_wgmma": "#0072B2", "cp_async": "#E69F00"}
OTHER = "#999999"
BAR_INCHES = 0.22


def plot(record: PartsRecord, folder: Path) -> list[Path]:
    """Draw every part of a run into ``folder``; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    card = record.about.get("card", {}).get("name", "")
    with drawing():
        for part in PARTS:
            figures = [figure for figure in record.of_part(part) if figure.ok and figure.rate is not None]
            for name, shown in _pictures(part, figures).items():
                written += save(draw(part, shown, f"{card}: {TITLES[part]}"), folder / f"parts-{name}")
    return written


def _pictures(part: str, figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """What goes into which picture: whole kernels of different mechanisms don't share one."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(f"{part}-{figure.mechanism}" if part == "whole" else part, []).append(figure)
    return found


def draw(part: str, figures: Sequence[Figure], heading: str) -> Any:
    """Panels one below the other: what has a scale of its own has one, and so has every whole kernel."""
    from matplotlib import pyplot

    titles = list(dict.fromkeys(panel(part, figure) for figure in figures))
    panels = [[figure for figure in figures if panel(part, figure) == title] for title in titles]
    heights = [len(group) + 2.5 for group in panels]
    size = (9, BAR_INCHES * sum(heights) + 0.8)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=heights)
    for axis, group, words in zip((row[0] for row in axes), panels, titles, strict=True):
        _bars(axis, group, times=part == "whole")
        axis.set_title(words, fontsize=9)
    _legend(figure, figures, "stages left out or done twice" if part == "whole" else "not what the plan ships")
    figure.suptitle(heading)
    return figure


def panel(part: str, figure: Figure) -> str:
    if part == "whole":
        return f"{figure.config}, {figure.mechanism}, {figure.seqlen} keys"
    if part == "copies":
        return "from the L2 cache" if figure.what.endswith("L2") else "from device memory"
    return figure.what.split(":")[0] if part == "launch" else ""


def _bars(axis: Any, figures: Sequence[Figure], times: bool) -> None:
    """Rates, or times in ms where the rates would be in different units."""
    places = range(len(figures))
    lengths = [(f.seconds or 0.0) * 1e3 if times else f.rate or 0.0 for f in figures]
    limits = [_limit(f, times) for f in figures]
    right = max([*lengths, *(limit for limit in limits if limit is not None)])
    for place, figure, length, limit in zip(places, figures, lengths, limits, strict=True):
        # What isn't shipped differs in hatching too, not in colour alone.
        axis.barh(
            place,
            length,
            height=0.7,
            color=COLORS.get(figure.mechanism, OTHER),
            alpha=1.0 if figure.shipped else 0.55,
            hatch=None if figure.shipped else "//",
            edgecolor="white",
        )
        if limit is not None:
            axis.plot([limit, limit], [place - 0.45, place + 0.45], color=CEILING, linewidth=1.8)
        share = "" if figure.ratio is None else f", {figure.ratio:.0%} of the limit"
        beyond = max(length, limit if limit is not None else 0.0)
        axis.text(beyond + 0.01 * right, place, f"{number(length)}{share}", va="center", fontsize=7)
    names = [f.what if times else f"{f.config} {f.what}" for f in figures]
    axis.set_yticks(places, names, fontsize=7)
    axis.set_ylim(len(figures) - 0.4, -0.6)
    axis.set_xlim(0, 1.3 * right)
    axis.set_xlabel("ms, limit: the shortest time the hardware allows" if times else figures[0].unit)
    axis.grid(axis="x", color=GRID, linewidth=0.6)


def _limit(figure: Figure, times: bool) -> float | None:
    if not times:
        return figure.limit
    return None if figure.ratio is None else (figure.seconds or 0.0) * 1e3 * figure.ratio


def _legend(figure: Any, figures: Sequence[Figure], others: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn: dict[str, Any] = {name: Patch(color=COLORS.get(name, OTHER)) for name in dict.fromkeys(f.mechanism for f in figures)}
    if any(not f.shipped for f in figures):
        drawn[others] = Patch(facecolor=OTHER, hatch="//", edgecolor="white", alpha=0.55)
    if any(f.limit is not None for f in figures):
        style: dict[str, Any] = {"color": CEILING, "marker": "|", "linestyle": "", "markersize": 10, "mew": 1.8}
        drawn["limit"] = Line2D([], [], **style)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False)
