"""The picture of an operand's tile in shared memory: which banks each 16-byte chunk lies in, computed without the DSL;
and the canvas that ``pictures`` draws on.

Shared memory is 32 banks of 4 bytes; byte address a lies in bank ``a / 4 mod 32``. The kernels read and write 16 bytes
a thread, so 4 neighbouring banks at a time: there are 8 such groups, and 8 threads are served at once if their chunks
lie in 8 different ones. ``ldmatrix``, ``stmatrix`` and warpgroup MMA take one chunk of 8 rows, one below the other:
in a plain row-major tile these share a group or two and are served one after the other. The swizzle spreads them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.sax.saxutils import escape, quoteattr

from rich.text import Text

from .. import family
from ..base import BANK_BYTES, BANKS, BYTES, Config, row_width, swizzle_atom

CHUNK_BYTES = 16
GROUP_BANKS = CHUNK_BYTES // BANK_BYTES
GROUPS = BANKS // GROUP_BANKS
ROWS_AT_ONCE = 8  # chunks that are read or written together
CHUNKS_SHOWN = 16
CELL = 4  # characters
# Okabe and Ito's colours, which colour-blind people tell apart too; grey for their black. (background, text)
PALETTE = (
    ("#999999", "black"),
    ("#E69F00", "black"),
    ("#56B4E9", "black"),
    ("#009E73", "black"),
    ("#F0E442", "black"),
    ("#0072B2", "white"),
    ("#D55E00", "black"),
    ("#CC79A7", "black"),
)
STRIPED, STRIPE, STRIPES = "#f2f2f2", "#b4b4b4", "stripes"  # a fill that is striped, except in a terminal; with what; its name


def bank_groups(operand: str, config: Config, rows: int = ROWS_AT_ONCE, swizzled: bool = True) -> list[list[int]]:
    """The bank group of each chunk of the first ``rows`` rows: ``(rows, chunks of a row)``, numbers 0 … 7.

    Without ``swizzled``, where the same layout without its swizzle would put them.
    """
    algebra = _algebra()
    layout = family(config).smem(operand, config)
    tile_rows, columns = family(config).tile(operand, config)
    if not 0 < rows <= tile_rows:
        raise ValueError(f"rows is {rows}; 1 … {tile_rows} is needed: the rows of a tile of {operand}")
    if not swizzled:
        layout = algebra.unswizzled(layout)
    slot = (0,) * (len(layout.shape) - 2)
    return [
        [
            algebra.offset(layout, row, column, *slot) * BYTES // CHUNK_BYTES % GROUPS
            for column in range(0, columns, CHUNK_BYTES // BYTES)
        ]
        for row in range(rows)
    ]


def serial_accesses(groups: list[list[int]]) -> int:
    """How often the banks must be asked for one column of chunks, in the worst 8 rows: 1 is without a conflict."""
    return max(
        max(Counter(groups[row + i][chunk] for i in range(ROWS_AT_ONCE)).values())
        for row in range(0, len(groups) - ROWS_AT_ONCE + 1, ROWS_AT_ONCE)
        for chunk in range(len(groups[0]))
    )


def picture(operand: str, config: Config, rows: int = ROWS_AT_ONCE) -> Text:
    """The first rows of an operand's tile for a terminal: a cell is a 16-byte chunk, its colour the bank group, the
    number in it the first of the chunk's 4 banks."""
    groups = bank_groups(operand, config, rows)
    tile_rows, columns = family(config).tile(operand, config)
    bits, base, shift, width = swizzle_atom(row_width(family(config).smem(operand, config)))
    shown = min(len(groups[0]), CHUNKS_SHOWN)
    text = Text(no_wrap=True)
    text.append(f"{operand}: {tile_rows} × {columns} {config.dtype}, ")
    text.append(f"rows of {width * BYTES} bytes, swizzle <{bits},{base},{shift}> on elements\n")
    text.append(f"{'column':>8}", "dim")
    for chunk in range(shown):
        text.append(f"{chunk * CHUNK_BYTES // BYTES:>{CELL}}", "dim")
    text.append("\n" if shown == len(groups[0]) else f" … {columns - CHUNK_BYTES // BYTES}\n", "dim")
    for row, line in enumerate(groups):
        text.append(f"{f'row {row}':>8}", "dim")
        for group in line[:shown]:
            background, foreground = PALETTE[group]
            text.append(f"{group * GROUP_BANKS:>{CELL - 1}} ", f"{foreground} on {background}")
        text.append("\n")
    if rows >= ROWS_AT_ONCE:
        plain = serial_accesses(bank_groups(operand, config, rows, swizzled=False))
        text.append(f"8 chunks below each other take {in_words(serial_accesses(groups))}; unswizzled, {in_words(plain)}")
    return text


def legend() -> Text:
    """What the colours of :func:`picture` stand for."""
    text = Text("banks   ", no_wrap=True)
    for group, (background, foreground) in enumerate(PALETTE):
        first = group * GROUP_BANKS
        text.append(f" {first}–{first + GROUP_BANKS - 1} ", f"{foreground} on {background}")
    return text


def in_words(accesses: int) -> str:
    """``1 access``, ``8 accesses``."""
    return "1 access" if accesses == 1 else f"{accesses} accesses"


def _algebra() -> ModuleType:
    try:
        return import_module(".algebra", __package__)
    except ImportError as error:
        raise NotImplementedError(
            f"layouts can't be computed on the host ({error}): try pip install nvidia-cutlass, which has pycute"
        ) from error


# ---- a canvas --------------------------------------------------------------------------------------------------------

MARGIN = 24  # pixels
SIZE = 11  # of most text
LINE = "#333333"
GLYPH_TERMINAL = 7.5  # pixels for a character of a terminal
GLYPH, GLYPH_MONO = 0.64, 0.61  # width of a character over its size: DejaVu's, which is a wide one
FONT = "'DejaVu Sans', Verdana, Arial, sans-serif"
FONT_MONO = "'DejaVu Sans Mono', Menlo, Consolas, monospace"
PRINT_DPI = 200


@dataclass(frozen=True)
class Rect:
    """A rectangle in pixels; ``cells`` says which elements it stands for, ``tip`` the same in words."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "#ffffff"
    tip: str = ""
    cells: str = ""

    def holds(self, label: Label) -> bool:
        """Whether a label's anchor lies on it."""
        return self.x <= label.x < self.x + self.width and self.y <= label.y < self.y + self.height


@dataclass(frozen=True)
class Label:
    """A line of text. ``x`` and ``y`` are its anchor: ``start``, ``middle`` or ``end`` of it, halfway up."""

    x: float
    y: float
    text: str
    size: float = SIZE
    anchor: str = "middle"
    fill: str = "#000000"
    bold: bool = False
    mono: bool = False
    upright: bool = False  # turned by 90°, read from below

    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom, estimated generously."""
        length = len(self.text) * self.size * (GLYPH_MONO if self.mono else GLYPH) * (1.08 if self.bold else 1)
        before = {"start": 0.0, "middle": length / 2, "end": length}[self.anchor]
        if self.upright:
            return self.x - self.size / 2, self.y - length + before, self.x + self.size / 2, self.y + before
        return self.x - before, self.y - self.size / 2, self.x - before + length, self.y + self.size / 2


@dataclass
class Canvas:
    """What is drawn, in order. It is as large as what is on it, and a margin."""

    title: str
    shapes: list[Rect | Label] = field(default_factory=list)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        boxes = [x.box() if isinstance(x, Label) else (x.x, x.y, x.x + x.width, x.y + x.height) for x in self.shapes]
        return round(max(b[2] for b in boxes) + MARGIN), round(max(b[3] for b in boxes) + MARGIN)

    def lines(self) -> list[Text]:
        """What is written on it, for a terminal: labels at one height in one line, on the colours they stand on."""
        rows: dict[float, list[Label]] = {}
        for x in self.shapes:
            if isinstance(x, Label):
                rows.setdefault(x.y, []).append(x)
        lines = []
        for _, labels in sorted(rows.items()):
            text = Text(no_wrap=True)
            for label in sorted(labels, key=lambda label: label.box()[0]):
                at = round(label.box()[0] / GLYPH_TERMINAL)
                text.append(" " * max(at - len(text), 1 if len(text) else 0))
                fill = next((x.fill for x in reversed(self.shapes) if isinstance(x, Rect) and x.holds(label)), "#ffffff")
                text.append(label.text, "" if fill == "#ffffff" else f"{label.fill} on {fill}")
            lines.append(text)
        return lines

    def svg(self) -> str:
        """The picture as SVG, with nothing in it that another program would have to find."""
        width, height = self.size()
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'role="img" font-family={quoteattr(FONT)} font-size="{SIZE}" text-anchor="middle">',
            f"<title>{escape(self.title)}</title>",
            f"<style>rect{{stroke:{LINE};stroke-width:.8}}.paper{{stroke:none}}.b{{font-weight:bold}}</style>",
            f'<rect class="paper" width="{width}" height="{height}" fill="#ffffff"/>',
        ]
        lines += [SVG_STRIPES] if any(isinstance(x, Rect) and x.fill == STRIPED for x in self.shapes) else []
        lines += [_svg_rect(x) if isinstance(x, Rect) else _svg_label(x) for x in self.shapes]
        return "\n".join([*lines, "</svg>", ""])

    def png(self, path: Path) -> None:
        """The picture as PNG, by matplotlib. Raises ``ValueError`` where that is missing."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise ValueError(f"a PNG needs matplotlib ({error}): try pip install 'cute-attn[bench]', or --svg") from error
        width, height = self.size()
        figure = Figure(figsize=(width / 100, height / 100), dpi=PRINT_DPI)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        align = {"start": "left", "middle": "center", "end": "right"}
        for x in self.shapes:
            if isinstance(x, Rect):
                place = (x.x, x.y), x.width, x.height
                if x.fill == STRIPED:
                    axes.add_patch(Rectangle(*place, facecolor=x.fill, edgecolor=STRIPE, linewidth=0, hatch="///"))
                fill = "none" if x.fill == STRIPED else x.fill
                axes.add_patch(Rectangle(*place, facecolor=fill, edgecolor=LINE, linewidth=0.5))
                continue
            along, across = align[x.anchor], "center_baseline"
            if x.upright:
                along, across = "center", {"left": "bottom", "center": "center", "right": "top"}[along]
            axes.text(
                x.x,
                x.y,
                x.text.replace("$", r"\$"),
                fontsize=x.size * 0.72,
                color=x.fill,
                horizontalalignment=along,
                verticalalignment=across,
                rotation=90 if x.upright else 0,
                family="DejaVu Sans Mono" if x.mono else "DejaVu Sans",
                weight="bold" if x.bold else "normal",
            )
        figure.savefig(path)


SVG_STRIPES = (
    f'<pattern id="{STRIPES}" width="9" height="9" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<path d="M0 0H9V9H0z" fill="{STRIPED}"/><path d="M0 0H1.5V9H0z" fill="{STRIPE}"/></pattern>'
)


def _svg_rect(x: Rect) -> str:
    fill = f"url(#{STRIPES})" if x.fill == STRIPED else x.fill
    text = f'<rect x="{x.x:.4g}" y="{x.y:.4g}" width="{x.width:.4g}" height="{x.height:.4g}" fill="{fill}"'
    text += f' data-cells="{x.cells}"' if x.cells else ""
    return f"{text}><title>{escape(x.tip)}</title></rect>" if x.tip else f"{text}/>"


def _svg_label(x: Label) -> str:
    # a third of the size below the middle is where letters stand, in every program
    right, down = (0.35 * x.size, 0.0) if x.upright else (0.0, 0.35 * x.size)
    text = f'<text x="{x.x + right:.4g}" y="{x.y + down:.4g}"'
    text += f' font-size="{x.size:g}"' if x.size != SIZE else ""
    text += f' text-anchor="{x.anchor}"' if x.anchor != "middle" else ""
    text += f' fill="{x.fill}"' if x.fill not in ("black", "#000000") else ""
    text += ' class="b"' if x.bold else ""
    text += f" font-family={quoteattr(FONT_MONO)}" if x.mono else ""
    text += f' transform="rotate(-90 {x.x + right:.5g} {x.y:.5g})"' if x.upright else ""
    return f"{text}>{escape(x.text)}</text>"
