"""Pictures of layouts, from the same records that make the kernels' layouts and that the proofs enumerate.

A :class:`Grid` is a tile cut into cells: the elements that one thread holds in consecutive values, or 16 bytes of shared
memory. ``figure`` makes the grids of one picture; ``terminal`` prints them, ``drawn`` puts them on a canvas. ``block``
draws a whole block: who copies what where, and what is in each stage at each step.

Colours are Okabe and Ito's, which colour-blind people tell apart; whatever a colour says, a number in the cell says too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from . import MODULES, algebra, draw, family, for_target
from .base import BYTES, KIB, OPERANDS, Box, Config, Copy, Layout
from .draw import CHUNK_BYTES, GLYPH_MONO, GROUP_BANKS, GROUPS, MARGIN, PALETTE, Canvas, Label, Rect

MEMORY, MMA, BLOCK = "memory", "mma", "block"
ROWS_SHOWN = 16
CHUNKS_SHOWN = 16
CHUNK = CHUNK_BYTES // BYTES  # elements
NO_THREAD = ("#ffffff", "black")
COMMON_DIM, NARROW_DIM = 128, 96  # what the gallery shows; a head 96 wide has rows of 64 bytes in shared memory
DTYPE = "bfloat16"
STEPS = {
    "in": "global → shared memory",
    "load": "shared memory → registers",
    "store": "registers → shared memory",
    "out": "shared → global memory",
}
PRODUCTS = {"S": "S = Q·Kᵀ", "O": "O = P·V"}
ROWS_ARE = {"Q": "query", "K": "key", "V": "key", "O": "query"}


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


def known(operand: str, config: Config) -> list[str]:
    """The pictures there are of an operand."""
    return [MEMORY, *(step for step, name in family(config).copies(config) if name == operand), MMA]


def figure(operand: str, picture: str, config: Config) -> tuple[Grid, ...]:
    """The grids of one picture. Raises ``ValueError`` with those there are."""
    if operand not in OPERANDS:
        raise ValueError(f"operand is {operand!r}; known ones are {', '.join(OPERANDS)}, {BLOCK}")
    if picture not in known(operand, config):
        raise ValueError(f"picture is {picture!r}; of {operand} there are {', '.join(known(operand, config))}")
    if picture == MEMORY:
        return _memory(operand, config)
    if picture == MMA:
        return _mma(_role(operand), config)
    copy = family(config).copies(config)[picture, operand]
    return (_box(copy, picture, config),) if isinstance(copy, Box) else _copy(copy, picture)


def title(operand: str, picture: str, config: Config) -> str:
    """What a picture shows, and of which config."""
    what = {MEMORY: f"{operand} in shared memory", MMA: PRODUCTS[_role(operand)]}.get(picture)
    return f"{what or f'{operand}, {STEPS[picture]}'} · {_config(config)}"


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
                (f"row ({ROWS_ARE[operand]})", "column; a cell is 16 bytes, its number the first of its 4 banks"),
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
        (f"row ({ROWS_ARE[box.operand]})", "column; a cell is 16 bytes, its number their place in the slot, in 16 bytes"),
        shown,
        cells,
        ("box", *(str(i) for i in range(min(len(PALETTE), -(-shown[1] // box.columns))))),
        (_shown(shown, (rows, columns)),),
        (22, 5.5),
    )


def _copy(copy: Copy, step: str) -> tuple[Grid, ...]:
    """What each thread holds, and, for a matrix instruction, what it points at."""
    names = (ROWS_ARE[copy.operand], "column")
    moved = f"{copy.operand}, {STEPS[step]} by {copy.instruction}"
    held = _threads(copy.values, copy.tile, f"{moved}: what each thread holds", names, copy.transposed)
    if algebra.INSTRUCTIONS[copy.instruction].matrix is None:
        return (held,)
    where = _threads(
        algebra.addresses(copy), copy.tile, f"{moved}: the 16 bytes that each thread points at", names, copy.transposed
    )
    return where, held


def _mma(role: str, config: Config) -> tuple[Grid, ...]:
    """What each thread holds of A, B (as k × n) and C."""
    mma = family(config).mma(role, config)
    m, n, k = mma.tile
    left, right, result = ("Q", "K", "S") if role == "S" else ("P", "V", "O")
    product = PRODUCTS[role]
    step = "×".join(map(str, mma.shape))
    parts = (
        ("A", left, mma.a, (m, k), ("m", "k"), False),
        ("B", right, mma.b, (n, k), ("k", "n"), True),
        ("C", result, mma.c, (m, n), ("m", "n"), False),
    )
    grids = []
    for part, operand, values, tile, names, flip in parts:
        what = f"{part} of {product}, m×n×k {step}: {operand}, {mma.warps} warps"
        if part in mma.from_shared:
            size = tile[::-1] if flip else tile
            read = Cell(0, 0, 4, ROWS_SHOWN, None, "read from shared memory", f"by the tensor core: {size[0]} × {size[1]}")
            grids.append(Grid(what, str(values), names, (4, ROWS_SHOWN), (read,), (), (), (14, 22)))
        else:
            grids.append(_threads(values, tile, what, names, flip))
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
        notes.append(f"{times} threads hold each element, one in each warp: the first is named.")
    notes += _repeats(owner, (rows, columns))
    needed = 8 + max(max(len(cell.label) * 7.8, len(cell.more) * 6.4) for cell in cells)
    scale = (max(26 / down, 16), max(needed, 48 if right > 1 else 0) / right)
    axes = (f"row ({axes[0]})" if axes[1] == "column" else axes[0], axes[1])
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


def _role(operand: str) -> str:
    return "S" if operand in "QK" else "O"


def _config(config: Config) -> str:
    dims = str(config.tile_d) if config.tile_d == config.tile_dv else f"{config.tile_d}/{config.tile_dv}"
    return f"{config.target} {config.mechanism}, {config.dtype}, head dim {dims}"


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
    if picture == MMA:
        a, b, c = grids
        wide = _width(a) + MARGIN
        _, below = _put(canvas, b, MARGIN + wide, y, legend=False)
        _put(canvas, a, MARGIN, below + MARGIN, legend=False)
        _put(canvas, c, MARGIN + wide, below + MARGIN)
        return canvas
    across = len(heading) * 16 * 0.62  # what is written around a grid may be as wide as the heading
    for i, grid in enumerate(grids):
        _, y = _put(canvas, grid, MARGIN, y, legend=i == len(grids) - 1, across=across)
        y += MARGIN
    return canvas


def _width(grid: Grid) -> float:
    """What a grid takes with what is written around it."""
    return max(60 + grid.size[1] * grid.scale[1], 500)


def _put(canvas: Canvas, grid: Grid, x: float, y: float, legend: bool = True, across: float = 0.0) -> tuple[float, float]:
    """Draw a grid with its upper left corner at (x, y), and text up to ``across`` wide. Returns its right and lower ends."""
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
    return left + grid.size[1] * right, y


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


# ---- a whole block ---------------------------------------------------------------------------------------------------

COPIED, WAITS, READ, PLAIN = PALETTE[1], ("#ffffff", "black"), PALETTE[2], ("#f4f4f4", "black")
COLUMN, LANE = 128, 26  # of the table of steps, pixels
LABELLED = 22  # pixels of the bar that a label needs
STEPS_PAST = 3  # steps of the loop shown past the first turn of the ring


def block(config: Config) -> Canvas:
    """A whole block: how its shared memory is shared out, who copies what where, and what each stage holds when."""
    k = family(config).smem("K", config)
    canvas = Canvas(f"One block, stage by stage · {_config(config)} · K {k}")
    canvas.shapes.append(Label(MARGIN, MARGIN, f"One block, stage by stage · {_config(config)}", 16, "start", bold=True))
    copying = config.threads - config.mma_threads
    line = (
        f"{config.tile_m} queries; keys {config.tile_n} at a time, {config.stages} stages; {config.mma_threads} threads compute"
    )
    line += f", {copying} more are there to copy" if copying else " and copy"
    canvas.shapes.append(Label(MARGIN, MARGIN + 22, line, 12, "start"))
    y = _shares(canvas, config, 86)
    y = _ways(canvas, config, y + MARGIN)
    _stages(canvas, config, y + MARGIN)
    return canvas


def _shares(canvas: Canvas, config: Config, y: float) -> float:
    """Shared memory as a bar, to scale."""
    parts = [(name, size) for name, size in family(config).smem_parts(config).items() if size]
    limit = for_target(config.target).GPU.smem_per_block
    used, scale = family(config).smem_bytes(config), 960 / limit
    text = f"Shared memory: {used / KIB:.1f} of {limit / KIB:.0f} KiB that a block may have, to scale"
    canvas.shapes.append(Label(MARGIN, y, text, 13, "start", bold=True))
    x, y = float(MARGIN), y + 16
    canvas.shapes.append(Rect(x, y, limit * scale, 34, "#ffffff"))
    for name, size in parts:
        slots = config.stages if name in ("K", "V") else 1
        background, foreground = PALETTE[list("QKVO").index(name) + 1] if name in OPERANDS else PLAIN
        for slot in range(slots):
            width = size / slots * scale
            tip = f"{name}{f', slot {slot}' if slots > 1 else ''}: {size // slots} bytes"
            canvas.shapes.append(Rect(x, y, width, 34, background, tip))
            if width > LABELLED:
                what = f"{name}{slot if slots > 1 else ''}" + (f" {size / slots / KIB:.1f}" if width > 2.5 * LABELLED else "")
                canvas.shapes.append(Label(x + width / 2, y + 17, what, 11, fill=foreground))
            x += width
    small = [f"{name} {size} bytes" for name, size in parts if size * scale <= LABELLED]
    rest = used - sum(size for _, size in parts)
    small += [f"alignment up to {rest} bytes"] if rest else []
    small += [] if any(name == "O" for name, _ in parts) else ["O lies over Q"]
    canvas.shapes.append(
        Label(MARGIN, y + 48, f"In KiB. Besides: {'; '.join(small)}." if small else "In KiB.", 11, "start", "#333333")
    )
    return y + 60


def _ways(canvas: Canvas, config: Config, y: float) -> float:
    """The way of each operand through the block, one line each, from left to right."""
    copies, add = family(config).copies(config), canvas.shapes.append
    add(Label(MARGIN, y, "Who copies what where", 13, "start", bold=True))
    heads = ("from global memory", "in shared memory", "to the tensor cores")
    widths, x0 = (262, 400, 330), MARGIN + 34
    y += 24
    for operand in OPERANDS:
        steps = [_lines(copies.get(("in", operand)), operand, config), _lies(operand, config), _fed(operand, config)]
        if operand == "O":
            heads = ("from registers", "in shared memory", "to global memory")
            steps[0], steps[2] = (_lines(copies[step, operand], operand, config) for step in ("store", "out"))
        x = float(x0)
        if operand in "QO":
            for head, width in zip(heads, widths, strict=True):
                add(Label(x, y, head, 11, "start", "#333333"))
                x += width
            y += 12
        x = float(x0)
        background, foreground = PALETTE[list("QKVO").index(operand) + 1]
        add(Rect(MARGIN, y, 28, 40, background))
        add(Label(MARGIN + 14, y + 20, operand, 13, bold=True, fill=foreground))
        for i, (lines, width) in enumerate(zip(steps, widths, strict=True)):
            add(Rect(x, y, width - 22, 40, PLAIN[0]))
            for j, text in enumerate(lines):
                add(Label(x + 8, y + 12 + 17 * j, text, 10.5, "start", mono=i == 1 and j == 0))
            if i < len(steps) - 1:
                add(Label(x + width - 11, y + 20, "→", 14, bold=True))
            x += width
        y += 48 + 14 * (operand == "V")
    return y


def _lines(copy: Copy | Box | None, operand: str, config: Config) -> tuple[str, str]:
    """Who copies, and how much at a time."""
    if copy is None:
        return "", ""
    rows, columns = family(config).tile(operand, config)
    slots = algebra.flat_shape(family(config).smem(operand, config).shape)[2:]
    each = f"; {slots[0]} warpgroups" if operand in "QO" and slots else ""
    if isinstance(copy, Box):
        boxes = columns // copy.columns * (rows // copy.rows)
        return "TMA: one thread asks for", f"{boxes} box{'es' * (boxes > 1)} of {copy.rows}×{copy.columns}{each}"
    threads = algebra.flat_shape(copy.values.shape)[0]
    of_each = BYTES * algebra.INSTRUCTIONS[copy.instruction].elements
    tile = copy.tile[::-1] if copy.transposed else copy.tile
    times = rows * columns // (tile[0] * tile[1])
    size = f"{threads} threads: {tile[0]}×{tile[1]}" + (f", {times} times" if times > 1 else "") + each
    return f"{copy.instruction}, {of_each} bytes each", size


def _lies(operand: str, config: Config) -> tuple[str, str]:
    layout = family(config).smem(operand, config)
    rows, columns, *slots = algebra.flat_shape(layout.shape)
    times = f"{slots[0]} × " if slots else ""
    return str(layout), f"{times}{rows}×{columns}, {algebra.size(layout) * BYTES / KIB:.1f} KiB"


def _fed(operand: str, config: Config) -> tuple[str, str]:
    """How the tensor cores get an operand."""
    role, part = {"Q": ("S", "A"), "K": ("S", "B"), "V": ("O", "B")}.get(operand, ("O", ""))
    mma = family(config).mma(role, config)
    product = f"{PRODUCTS[role]}, {'×'.join(map(str, mma.shape))}"
    if part in mma.from_shared:
        return "read where it lies", product
    copy = family(config).copies(config).get(("load", operand))
    return (_lines(copy, operand, config)[0] if copy else "", product)


def _stages(canvas: Canvas, config: Config, y: float) -> None:
    """What each slot holds at each step of the loop over the key tiles."""
    add, steps = canvas.shapes.append, range(config.stages + STEPS_PAST)
    add(
        Label(
            MARGIN,
            y,
            "Stage by stage: what each slot holds; K0 and V0 are the first tiles taken, the last keys",
            13,
            "start",
            bold=True,
        )
    )
    heads = ("before", *(f"step {i}" for i in steps), "at the end")
    x0, y = MARGIN + 110, y + 26
    add(Label(MARGIN, y, "slot", 11, "start", "#333333"))
    wide = min(COLUMN, 960 // len(heads))
    for i, head in enumerate(heads):
        add(Label(x0 + (i + 0.5) * wide, y, head, 11, fill="#333333"))
    y += 14
    lanes = {"Q": [("copy Q", COPIED), *[("read Q", READ) for _ in steps], ("", WAITS)]}
    for operand in "KV":
        for slot in range(config.stages):
            held = [_held(operand, slot, step, config) for step in (None, *steps)]
            lanes[f"{operand}, slot {slot}"] = [*held, ("…", WAITS)]
    lanes["tensor cores"] = [("", WAITS), *[(_products(i, config), PLAIN) for i in steps], ("…", PLAIN)]
    lanes["O"] = [("", WAITS), *[("in registers", PLAIN) for _ in steps], ("copied out", COPIED)]
    for name, cells in lanes.items():
        add(Label(MARGIN, y + LANE / 2, name, 12, "start"))
        for i, (text, (background, foreground)) in enumerate(cells):
            add(Rect(x0 + i * wide, y, wide, LANE, background, tip=f"{heads[i]}, {name}: {text or 'nothing'}"))
            add(Label(x0 + (i + 0.5) * wide, y + LANE / 2, text, 11, fill=foreground)) if text else None
        y += LANE
    x, y = float(x0), y + 20
    for (background, foreground), text in ((COPIED, "being copied"), (WAITS, "there, or on its way"), (READ, "being read")):
        width = len(text) * 7.2 + 16
        add(Rect(x, y - 11, width, 22, background))
        add(Label(x + width / 2, y, text, 11, fill=foreground))
        x += width + 6
    add(Label(MARGIN, y, "colours", 11, "start", "#333333"))
    add(
        Label(
            x0,
            y + 24,
            "A step is one tile of keys; steps are not drawn to scale. S = Q·Kᵀ, P = its softmax.",
            11,
            "start",
            "#333333",
        )
    )


def _overlapped(config: Config) -> bool:
    """Copies with a thread of their own fill every slot at once, and P·V of a tile runs beside Q·Kᵀ of the next;
    where each warp copies for itself, one slot is refilled while another is read."""
    return config.threads > config.mma_threads


def _held(operand: str, slot: int, step: int | None, config: Config) -> tuple[str, tuple[str, str]]:
    """The tile in a slot of the ring at a step of the loop, and what happens to it. ``None``: before the loop."""
    late = 1 if operand == "V" and _overlapped(config) else 0
    before = config.stages if _overlapped(config) else config.stages - 1
    if step is None:
        return (f"copy {operand}{slot}", COPIED) if slot < before else ("", WAITS)
    reading = step - late
    first = max(reading, 0)
    tile = first + (slot - first) % config.stages
    if tile == reading:
        return f"read {operand}{tile}", READ
    refilled = tile >= before and tile == reading + config.stages - 1
    return (f"copy {operand}{tile}", COPIED) if refilled else (f"{operand}{tile}", WAITS)


def _products(step: int, config: Config) -> str:
    if not _overlapped(config):
        return f"S{step}, P{step}·V{step}"
    return f"S{step}" if step == 0 else f"S{step} ∥ P{step - 1}·V{step - 1}"


# ---- the gallery -----------------------------------------------------------------------------------------------------

GALLERY_README = """\
# The shipped layouts, drawn

Generated by `python -m cute_attn.layouts gallery`; one picture by `python -m cute_attn.layouts show --help`. Each is made
from the records that the kernels' layouts are made from and that `check` proves. Opened by itself, a picture of memory says
more of the cell under the pointer. What hardware counters say of them: [counters.md](../counters.md).
"""


def gallery() -> dict[str, str]:
    """The files of the gallery: pictures by name, and the README.md that shows them.

    For each family of instructions, on the first GPU whose best it is: every picture of the common head dim, the memory
    of one with narrower rows, and a block of each head dim.
    """
    files, text = {}, [GALLERY_README]
    for configs in _shown_configs():
        common = next(config for config in configs if config.tile_d == COMMON_DIM)
        text.append(f"\n## {common.target}, `{common.mechanism}`\n")
        for config in configs:
            name, canvas = _file(BLOCK, "", config), block(config)
            files[name] = canvas.svg()
            text.append(f"\n![{canvas.title}]({name})\n\nOther head dims:\n" if config is common else "")
        text += [f"- [{config.tile_d}]({_file(BLOCK, '', config)})\n" for config in configs if config is not common]
        wanted = [(operand, picture, common) for operand in OPERANDS for picture in known(operand, common)]
        wanted += [("K", MEMORY, config) for config in configs if config.tile_d == NARROW_DIM]
        alike: dict[tuple, list[tuple[str, str, Config]]] = {}
        for operand, picture, config in wanted:
            key = (picture == MMA, *((grid.notation, grid.cells) for grid in figure(operand, picture, config)))
            alike.setdefault(key, []).append((operand, picture, config))
        for (first, picture, config), *others in alike.values():
            name = _file(first, picture, config)
            files[name] = drawn(first, picture, config).svg()
            heading = title(first, picture, config).partition(" · ")[0]
            heading += f"; head dim {config.tile_d}" if config is not common else ""
            same = [x if step == picture else f"{x}, {STEPS[step]}," for x, step, _ in others if step != MMA]
            heading += f"; {' and '.join(same)} the same" if same else ""
            text.append(f"\n### {heading}\n\n![{heading}]({name})\n")
    files["README.md"] = "".join(text)
    return files


def _file(operand: str, picture: str, config: Config) -> str:
    return "-".join(filter(None, (config.target, config.mechanism, str(config.tile_d), operand, picture))) + ".svg"


def _shown_configs() -> Iterator[list[Config]]:
    """For each family of instructions, a config for each of its tile widths."""
    from cute_attn.problem import Problem  # it brings torch

    seen = []
    for module in sorted(MODULES, key=lambda module: min(module.GPU.targets, default=(99, 0))):
        mechanism, operands = next(iter(module.MECHANISMS.items()))
        if operands not in seen:
            seen.append(operands)
            target = next(iter(module.GPU.targets.values()))
            yield [module.configs(Problem(DTYPE, d, d), mechanism, target)[0] for d in operands.TILE_DIMS]
