"""Pictures of layouts, from the same records that make the kernels' layouts and that the proofs enumerate.

A :class:`Grid` is a tile cut into cells: the elements that one thread holds in consecutive values, or 16 bytes of shared
memory. ``figure`` makes the grids of one picture; ``terminal`` prints them, ``drawn`` puts them on a canvas. ``blocks``
draws whole blocks.

An operand of the backward pass may be loaded for several products, and several read it: its pictures are ``load-dV`` and
``mma-dV``, with the product's name. Products are operands, too, whose only picture is their MMA.

Colours are Okabe and Ito's, which colour-blind people tell apart; whatever a colour says, a number in the cell says too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from .. import family
from ..base import BYTES, OPERANDS, Box, Config, Copy, Layout, names
from . import algebra, draw
from .draw import CHUNK_BYTES, GLYPH_MONO, GROUP_BANKS, GROUPS, MARGIN, PALETTE, Canvas, Label, Rect

MEMORY, MMA, BLOCK = "memory", "mma", "block"
ROWS_SHOWN = 16
CHUNKS_SHOWN = 16
CHUNK = CHUNK_BYTES // BYTES  # elements
NO_THREAD = ("#ffffff", "black")
STEPS = {
    "in": "global → shared memory",
    "load": "shared memory → registers",
    "store": "registers → shared memory",
    "out": "shared → global memory",
}
FORWARD_PRODUCTS = {"S": "S = Q·Kᵀ", "O": "O = P·V"}
BACKWARD_PRODUCTS = {
    **{"S": "Sᵀ = K·Qᵀ", "dP": "dPᵀ = V·dOᵀ", "dV": "dV = Pᵀ·dO", "dK": "dK = dSᵀ·Q", "dQ": "dQ = dS·K"},
    **{"qS": "S = Q·Kᵀ", "qdP": "dP = dO·Vᵀ"},
}
QUERIES = {"Q", "O", "dO", "dQ", "qQ", "qdO"}  # operands whose rows are; those of all others are keys
SCORES = {"P", "dS"}  # (keys, queries)


@dataclass(frozen=True)
class Cell:
    """Elements of a tile from (row, column) on, and what is written on them. ``colour`` is of PALETTE, or None."""

    row: int
    column: int
    rows: int
    columns: int
    colour: int | None
    label: str
    more: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Grid:
    """A tile, or the corner of one that says everything about it."""

    name: str
    notation: str
    axes: tuple[str, str]  # what a row and a column is
    size: tuple[int, int]  # rows and columns that the cells cover
    cells: tuple[Cell, ...]
    legend: tuple[str, ...]  # what it is that the colours say, then what each says
    notes: tuple[str, ...] = ()
    scale: tuple[float, float] = (22, 30)  # pixels of a row and a column


def operands(config: Config) -> tuple[str, ...]:
    """What there are pictures of."""
    if not config.backward:
        return OPERANDS
    products = (role for role in family(config).ROLES if not role.startswith("r"))  # of first columns, the same
    return tuple(dict.fromkeys((*family(config).OPERANDS, *products)))


def known(operand: str, config: Config) -> list[str]:
    """The pictures there are of an operand."""
    steps = [step.replace(" ", "-") for step, name in family(config).copies(config) if name == operand]
    mmas = [f"{MMA}-{role}" if config.backward else MMA for role in roles(operand, config)]
    return [*([MEMORY, *steps] if steps else []), *mmas]


def roles(operand: str, config: Config) -> list[str]:
    """The products that read an operand from shared memory, or make it; those of first columns in registers are these, too."""
    found = (role for role in names(family(config))[2] if not role.startswith("r"))
    return [role for role in found if operand == role or is_read(operand, role, config)]


def is_read(operand: str, role: str, config: Config) -> bool:
    """Whether a product reads it from shared memory."""
    lay = family(config)
    letters = [letter for letter, name in zip("AB", names(lay)[2][role], strict=True) if name == operand]
    loaded = {("load", operand), (f"load {role}", operand)} & lay.copies(config).keys()
    return bool(letters) and (bool(loaded) or letters[0] in lay.mma(role, config).from_shared)


def product(role: str, config: Config) -> str:
    """A product as an equation."""
    if role == "dQ" and family(config).turned(config):
        return "dQᵀ = Kᵀ·dSᵀ"
    return (BACKWARD_PRODUCTS if config.backward else FORWARD_PRODUCTS)[role.removeprefix("r")]


def first(operand: str, config: Config) -> str:
    """The picture of an operand that is shown unasked. Raises ``ValueError`` with the operands there are."""
    if operand not in operands(config):
        raise ValueError(f"operand is {operand!r}; known ones are {', '.join(operands(config))}, {BLOCK}")
    return known(operand, config)[0]


def figure(operand: str, picture: str, config: Config) -> tuple[Grid, ...]:
    """The grids of one picture. Raises ``ValueError`` with those there are."""
    first(operand, config)  # refuses what is unknown
    if picture not in known(operand, config):
        raise ValueError(f"picture is {picture!r}; of {operand} there are {', '.join(known(operand, config))}")
    if picture == MEMORY:
        return _memory(operand, config)
    verb, role = _parts(operand, picture, config)
    if verb == MMA:
        return _mma(role, config)
    copy = family(config).copies(config)[picture.replace("-", " "), operand]
    return (_box(copy, verb, config),) if isinstance(copy, Box) else _copy(copy, verb)


def title(operand: str, picture: str, config: Config) -> str:
    """What a picture shows, and of which config."""
    verb, role = _parts(operand, picture, config)
    what = f"{operand} in shared memory" if verb == MEMORY else f"{operand}, {STEPS.get(verb)}"
    if role:
        what = product(role, config) if verb == MMA else f"{what}, for {product(role, config)}"
    return f"{what} · {described(config)}"


def _parts(operand: str, picture: str, config: Config) -> tuple[str, str]:
    """What a picture is of, and for which product."""
    verb, _, role = picture.partition("-")
    return verb, role or ("" if verb != MMA else roles(operand, config)[0])


# ---- grids -----------------------------------------------------------------------------------------------------------


def _memory(operand: str, config: Config) -> tuple[Grid, ...]:
    """Which banks each 16 bytes lie in; and, beside it, where they would lie without the swizzle."""
    layout = family(config).smem(operand, config)
    rows, columns = family(config).tile(operand, config)
    shown = min(rows, draw.ROWS_AT_ONCE)
    grids = []
    for swizzled in (True, False):
        every = draw.bank_groups(operand, config, rows, swizzled)
        groups = every[:shown]
        times = draw.in_words(draw.serial_accesses(groups))
        notes = [f"8 chunks below each other are read or written together: {times}."]
        here = layout if swizzled else algebra.unswizzled(layout)
        offsets = algebra.table(Layout(here.shape[:2], here.stride[:2], here.swizzle, here.unit_bytes)) * BYTES  # type: ignore
        cells = [
            Cell(
                row, CHUNK * chunk, 1, CHUNK, group, str(GROUP_BANKS * group),
                tip=f"row {row}, columns {CHUNK * chunk}–{CHUNK * chunk + CHUNK - 1}: byte {offsets[row, CHUNK * chunk]}, "
                f"banks {GROUP_BANKS * group}–{GROUP_BANKS * group + GROUP_BANKS - 1}",
            )
            for row, line in enumerate(groups)
            for chunk, group in enumerate(line[:CHUNKS_SHOWN])
        ]  # fmt: skip
        wide = min(columns, CHUNK * CHUNKS_SHOWN)
        notes.append(_shown((shown, wide), (rows, columns)))
        if shown < rows and all(line == groups[i % shown] for i, line in enumerate(every)):
            notes[-1] += f" Each {shown} further rows are like these."
        if swizzled and layout.swizzle:
            notes.append(f"The swizzle acts on the {'offset in elements' if layout.unit_bytes > 1 else 'address in bytes'}.")
        grids.append(
            Grid(
                f"{operand}: {rows} × {columns} {config.dtype}" if swizzled else "the same without the swizzle",
                str(here),
                (_rows_are(operand), f"{_columns_are(operand)}; a cell is 16 bytes, its number the first of its 4 banks"),
                (shown, wide),
                tuple(cells),
                ("banks", *(f"{GROUP_BANKS * g}–{GROUP_BANKS * g + GROUP_BANKS - 1}" for g in range(GROUPS))),
                tuple(notes),
                (22, 5),
            )
        )
    return tuple(grids)


def _box(box: Box, step: str, config: Config) -> Grid:
    """Where TMA puts each 16 bytes of a slot, box by box."""
    layout = family(config).smem(box.operand, config)
    rows, columns = family(config).tile(box.operand, config)
    two = Layout(layout.shape[:2], layout.stride[:2], layout.swizzle, layout.unit_bytes)  # type: ignore[index]
    place = algebra.table(two) // CHUNK
    shown = (min(rows, ROWS_SHOWN), min(columns, CHUNK * CHUNKS_SHOWN))
    cells = tuple(
        Cell(
            row, column, 1, CHUNK, column // box.columns % len(PALETTE), str(place[row, column]),
            tip=f"row {row}, columns {column}–{column + CHUNK - 1}: box {column // box.columns}, "
            f"byte {CHUNK_BYTES * place[row, column]}",
        )
        for row in range(shown[0])
        for column in range(0, shown[1], CHUNK)
    )  # fmt: skip
    boxes = columns // box.columns
    swizzle = f"swizzled in {box.swizzle_bytes} bytes" if box.swizzle_bytes else "not swizzled"
    return Grid(
        f"{box.operand}, {STEPS[step]} by TMA: {boxes} box{'es' * (boxes > 1)} of {box.rows} × {box.columns}, {swizzle}",
        str(layout),
        (_rows_are(box.operand), "column; a cell is 16 bytes, its number their place in the slot, in 16 bytes"),
        shown,
        cells,
        ("box", *(str(i) for i in range(min(len(PALETTE), -(-shown[1] // box.columns))))),
        (_shown(shown, (rows, columns)),),
        (22, 5.5),
    )


def _copy(copy: Copy, step: str) -> tuple[Grid, ...]:
    """What each thread holds, and, for a matrix instruction, what it points at."""
    axes = (_rows_are(copy.operand), _columns_are(copy.operand))
    moved = f"{copy.operand}, {STEPS[step]} by {copy.instruction}"
    held = _threads(copy.values, copy.tile, f"{moved}: what each thread holds", axes, copy.transposed)
    if algebra.INSTRUCTIONS[copy.instruction].matrix is None:
        return (held,)
    where = _threads(
        algebra.addresses(copy), copy.tile, f"{moved}: the 16 bytes that each thread points at", axes, copy.transposed
    )
    return where, held


def _mma(role: str, config: Config) -> tuple[Grid, ...]:
    """What each thread holds of A, B (as k × n) and C."""
    mma = family(config).mma(role, config)
    m, n, k = mma.tile
    equation = product(role, config)
    result, left, right = equation.replace(" = ", "·").split("·")
    warps = f"{mma.warps}×{mma.across}" if mma.across > 1 else str(mma.warps)
    step = "×".join(map(str, mma.shape))
    parts = (
        ("A", left, mma.a, (m, k), ("m", "k"), False),
        ("B", right.removesuffix("ᵀ"), mma.b, (n, k), ("k", "n"), True),
        ("C", result, mma.c, (m, n), ("m", "n"), False),
    )
    grids = []
    for part, operand, values, tile, axes, flip in parts:
        what = f"{part} of {equation}, m×n×k {step}: {operand}, {warps} warps"
        if part in mma.from_shared:
            size = tile[::-1] if flip else tile
            read = Cell(0, 0, 4, ROWS_SHOWN, None, "read from shared memory", f"by the tensor core: {size[0]} × {size[1]}")
            grids.append(Grid(what, str(values), axes, (4, ROWS_SHOWN), (read,), (), (), (14, 22)))
        else:
            grids.append(_threads(values, tile, what, axes, flip))
    return tuple(grids)


def _threads(values: Layout, tile: tuple[int, int], name: str, axes: tuple[str, str], flip: bool) -> Grid:
    """A thread-value map. ``flip``: the tile lies on its side, as (columns, rows)."""
    owner = algebra.owners(values, tile)
    if flip:
        owner = owner.transpose(1, 0, 2)
    down, right = _run(owner)
    rows, columns = min(owner.shape[0], ROWS_SHOWN), min(owner.shape[1], max(ROWS_SHOWN, CHUNK * right))
    cells = []
    for row in range(0, rows, down):
        for column in range(0, columns, right):
            thread, value = (int(x) for x in owner[row, column])
            last = value + down * right - 1
            span = str(value) if last == value else f"{value},{last}" if last == value + 1 else f"{value}–{last}"
            cells.append(Cell(row, column, down, right, thread % len(PALETTE), f"T{thread}", f"V{span}"))
    notes = ["T is the thread, V the values in it."]
    if (times := algebra.size(values) // (tile[0] * tile[1])) > 1:
        notes.append(f"{times} threads hold each element, each in another warp: the first is named.")
    notes += _repeats(owner, (rows, columns))
    needed = 8 + max(max(len(cell.label) * 7.8, len(cell.more) * 6.4) for cell in cells)
    scale = (max(26 / down, 16), max(needed, 48 if right > 1 else 0) / right)
    whole = f"{values!s} on {tile[0]}×{tile[1]}" + (", on its side" if flip else "")
    legend = ("thread mod 8", *map(str, range(len(PALETTE))))
    return Grid(name, whole, axes, (rows, columns), tuple(cells), legend, tuple(notes), scale)


def _run(owner: np.ndarray) -> tuple[int, int]:
    """Rows and columns of the largest aligned run of elements that one thread holds in consecutive values."""
    for side in (False, True):
        lines = owner.transpose(1, 0, 2) if side else owner
        for length in (8, 4, 2):
            if lines.shape[1] % length:
                continue
            runs = lines.reshape(lines.shape[0], -1, length, 2) - lines[:, ::length, None]
            if not runs[..., 0].any() and (runs[..., 1] == np.arange(length)).all():
                return (length, 1) if side else (1, length)
    return 1, 1


def _repeats(owner: np.ndarray, shown: tuple[int, int]) -> Iterator[str]:
    """How what is not shown follows from what is."""
    for axis, name in enumerate(("rows", "columns")):
        size, step = owner.shape[axis], shown[axis]
        if size == step:
            continue
        blocks = np.array([np.take(owner, range(i, i + step), axis) for i in range(0, size - step + 1, step)])
        change = blocks[1:] - blocks[:-1]
        if size % step == 0 and (change == change[0, 0, 0]).all():
            by = [f"{what} + {n}" for what, n in zip(("thread", "value"), change[0, 0, 0], strict=True) if n]
            yield f"Of {size} {name}, {step} are shown: each {step} further are the same with {' and '.join(by)}."
        else:
            yield f"Of {size} {name}, the first {step} are shown."


def _shown(part: tuple[int, int], whole: tuple[int, int]) -> str:
    of = [f"{a} of {b} {name}" for a, b, name in zip(part, whole, ("rows", "columns"), strict=True) if a < b]
    return f"Shown: {' and '.join(of)}." if of else "The whole tile is shown."


def _rows_are(operand: str) -> str:
    return f"row ({'query' if operand in QUERIES else 'key'})"


def _columns_are(operand: str) -> str:
    return "column (query)" if operand in SCORES else "column"


def described(config: Config) -> str:
    """A config in a few words."""
    dims = str(config.tile_d) if config.tile_d == config.tile_dv else f"{config.tile_d}/{config.tile_dv}"
    higher = f" and {config.tile_m} queries" if config.backward and family(config).turned(config) else ""
    return f"{config.target} {config.backward or config.mechanism}, {config.dtype}, head dim {dims}{higher}"


# ---- in a terminal ---------------------------------------------------------------------------------------------------


def terminal(grid: Grid) -> Text:
    """A grid in colours, one line for each row of cells."""
    text = Text(no_wrap=True)
    text.append(f"{grid.name}\n{grid.notation}\n", "bold")
    width = max(len(_written(cell)) for cell in grid.cells) + 2
    left = len(f"row {grid.size[0]}")
    columns = sorted({cell.column for cell in grid.cells})
    text.append(" " * left + " " + "".join(f"{column:^{width}}" for column in columns) + "\n", "dim")
    row = -1
    for cell in sorted(grid.cells, key=lambda cell: (cell.row, cell.column)):
        if cell.row != row:
            text.append(("\n" if row >= 0 else "") + f"{f'row {cell.row}':>{left}} ", "dim")
            row = cell.row
        background, foreground = NO_THREAD if cell.colour is None else PALETTE[cell.colour]
        text.append(f"{_written(cell):^{width}}", f"{foreground} on {background}")
    text.append("\n")
    if grid.legend:
        text.append(f"{grid.legend[0]}  ", "dim")
        for (background, foreground), name in zip(PALETTE, grid.legend[1:], strict=False):
            text.append(f" {name} ", f"{foreground} on {background}")
        text.append("\n")
    text.append("\n".join((f"down: {grid.axes[0]}, across: {grid.axes[1]}", *grid.notes)), "dim")
    return text


def _written(cell: Cell) -> str:
    return f"{cell.label} {cell.more}".strip()


# ---- on a canvas -----------------------------------------------------------------------------------------------------


def drawn(operand: str, picture: str, config: Config) -> Canvas:
    """One picture. The grids stand below each other; an MMA's as one multiplies on paper: B over C, A to its left."""
    grids = figure(operand, picture, config)
    notation = family(config).smem(operand, config) if picture == MEMORY else " · ".join(g.notation for g in grids)
    canvas = Canvas(f"{title(operand, picture, config)} · {notation}")
    heading = title(operand, picture, config)
    canvas.shapes.append(Label(MARGIN, MARGIN, heading, 16, "start", bold=True))
    y = 2.0 * MARGIN + 8
    if picture.startswith(MMA):
        a, b, c = grids
        wide = _width(a) + MARGIN
        below = _put(canvas, b, MARGIN + wide, y, legend=False)
        _put(canvas, a, MARGIN, below + MARGIN, legend=False)
        _put(canvas, c, MARGIN + wide, below + MARGIN)
        return canvas
    across = len(heading) * 16 * 0.62  # what is written around a grid may be as wide as the heading
    for i, grid in enumerate(grids):
        y = _put(canvas, grid, MARGIN, y, legend=i == len(grids) - 1, across=across)
        y += MARGIN
    return canvas


def _width(grid: Grid) -> float:
    """What a grid takes with what is written around it."""
    return max(60 + grid.size[1] * grid.scale[1], 500)


def _put(canvas: Canvas, grid: Grid, x: float, y: float, legend: bool = True, across: float = 0.0) -> float:
    """Draw a grid with its upper left corner at (x, y), and text up to ``across`` wide. Returns its lower end."""
    down, right = grid.scale
    wide = max(_width(grid), across)
    add = canvas.shapes.append
    for line in textwrap.wrap(grid.name, int(wide / (13 * 0.62))):
        add(Label(x, y, line, 13, "start", bold=True))
        y += 19
    for line in textwrap.wrap(grid.notation, int(wide / (12 * GLYPH_MONO)), break_on_hyphens=False):
        add(Label(x, y, line, 12, "start", mono=True))
        y += 18
    left, top = x + 60, y + 34
    add(Label(left, top - 28, f"→ {grid.axes[1]}", 11, "start", "#333333"))
    add(Label(x + 8, top + grid.size[0] * down / 2, grid.axes[0], 11, upright=True, fill="#333333"))
    for column in sorted({cell.column for cell in grid.cells}) if grid.legend else ():
        add(Label(left + column * right + 3, top - 9, str(column), 10, "start", "#333333"))
    for row in sorted({cell.row for cell in grid.cells}) if grid.legend else ():
        add(Label(left - 8, top + (row + 0.5) * down, str(row), 10, "end", "#333333"))
    for cell in grid.cells:
        _put_cell(canvas, cell, left + cell.column * right, top + cell.row * down, grid.scale)
    y = top + grid.size[0] * down + 18
    if legend and grid.legend:
        add(Label(left, y, grid.legend[0], 11, "start"))
        at = left + 12 + len(grid.legend[0]) * 11 * 0.62
        for (background, foreground), name in zip(PALETTE, grid.legend[1:], strict=False):
            width = max(26, 12 + 11 * 0.62 * len(name))
            add(Rect(at, y - 10, width, 20, background))
            add(Label(at + width / 2, y, name, 11, fill=foreground))
            at += width + 3
        y += 26
    for note in grid.notes:
        for line in textwrap.wrap(note, int((wide - 60) / (11 * 0.54))):
            add(Label(left, y, line, 11, "start", "#333333"))
            y += 16
    return y


def _put_cell(canvas: Canvas, cell: Cell, x: float, y: float, scale: tuple[float, float]) -> None:
    background, foreground = NO_THREAD if cell.colour is None else PALETTE[cell.colour]
    height, width = cell.rows * scale[0], cell.columns * scale[1]
    place = f"{cell.row},{cell.column},{cell.rows},{cell.columns}"
    canvas.shapes.append(Rect(x, y, width, height, background, cell.tip, place))
    middle, size = x + width / 2, 11.0
    if not cell.more:
        canvas.shapes.append(Label(middle, y + height / 2, cell.label, size, fill=foreground))
        return
    apart = min(13.0, height * 0.44)
    canvas.shapes.append(Label(middle, y + height / 2 - apart / 2, cell.label, size, fill=foreground, bold=True))
    canvas.shapes.append(Label(middle, y + height / 2 + apart / 2, cell.more, 10, fill=foreground))
