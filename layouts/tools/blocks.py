"""Pictures of a whole block, of the same records as ``pictures``: how its shared memory is shared out, who copies what where,
and what is in each stage at each step. Here are the forward pass's blocks, and what is drawn of any; ``blocks_backward`` has
the backward pass's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import family, for_target
from ..base import BYTES, KIB, Box, Config, Copy
from . import algebra
from .draw import MARGIN, PALETTE, STRIPED, Canvas, Label, Rect
from .pictures import described, product, roles

Colour = tuple[str, str]
Cell = tuple[str, Colour]  # what is written, and on which colour
# Colours are operands', in the order in which ways are drawn. What happens to one is stripes and greys, apart in print too.
COLOURS = {name: PALETTE[i] for name, i in zip(("Q", "K", "V", "O", "dO", "P", "dS"), (1, 2, 3, 4, 4, 6, 7), strict=True)}
COLOURS |= {"dK": COLOURS["K"], "dV": COLOURS["V"], "dQ": PALETTE[5]}
COPIED, WAITS, READ, MADE = (STRIPED, "black"), ("#ffffff", "black"), ("#c4c4c4", "black"), ("#5a5a5a", "white")
PLAIN = ("#f4f4f4", "black")
LEGEND = ((COPIED, "being copied"), (WAITS, "there, or on its way"), (READ, "being read"), (MADE, "being written"))
WIDE, COLUMN, LANE, LINE = 960, 128, 26, 14  # pixels: of a table, of its columns at most, of a lane, of a line more in it
LABELLED = 22  # pixels of the bar that a label needs
STEPS_PAST = 3  # steps of the loop shown past the first turn of the ring
WAY_WIDTHS = (262, 400, 330)
TO_CORES = ("from global memory", "in shared memory", "to the tensor cores")
FROM_REGISTERS = ("from registers", "in shared memory", "to global memory")


@dataclass(frozen=True)
class Part:
    """Of shared memory, ``slots`` equal ones."""

    name: str
    size: int
    slots: int = 1


@dataclass(frozen=True)
class Way:
    """An operand's way through the block, from left to right: two lines for each place."""

    name: str
    steps: tuple[tuple[str, str], ...]


Lanes = dict[str, Sequence[Cell]]  # from a name to what is in each column


def kernels(config: Config) -> tuple[str, ...]:
    """The kernels that a config's mainloop has; ``""`` where it has one."""
    return tuple(getattr(family(config), "KERNELS", ("",)))


def block(config: Config, kernel: str = "") -> Canvas:
    """A whole block. Raises ``ValueError`` with the kernels there are."""
    if kernel not in kernels(config):
        known = f"there are {', '.join(kernels(config))}" if len(kernels(config)) > 1 else "there is only one"
        raise ValueError(f"picture is {kernel!r}; of block {known}")
    if config.backward:
        from . import blocks_backward

        return blocks_backward.block(config, kernel)
    copying = config.threads - config.mma_threads
    line = (
        f"{config.tile_m} queries; keys {config.tile_n} at a time, {config.stages} stages; {config.mma_threads} threads compute"
    )
    line += f", {copying} more are there to copy" if copying else " and copy"
    canvas = titled("", config, "K", line)
    sizes = family(config).smem_parts(config)
    parts = [Part(name, n, config.stages if name in ("K", "V") else 1) for name, n in sizes.items()]
    direct = config.o_from_registers
    elsewhere = "O leaves from registers, 16 bytes a thread" if direct else "O lies over Q"
    y = shares(canvas, config, parts, [] if sizes.get("O") else [elsewhere], 86)
    results = [] if direct else [(FROM_REGISTERS, [_way("O", config)])]
    y = ways(canvas, [(TO_CORES, [_way(x, config) for x in "QKV"]), *results], y + MARGIN)
    _stages(canvas, config, y + MARGIN)
    return canvas


# ---- what is drawn of any --------------------------------------------------------------------------------------------


def titled(of: str, config: Config, operand: str, line: str) -> Canvas:
    """A canvas with a heading, and a line below it; to the file's own title comes the layout of an operand."""
    heading = f"One block{of}, stage by stage · {described(config)}"
    canvas = Canvas(f"{heading} · {operand} {family(config).smem(operand, config)}")
    canvas.shapes.append(Label(MARGIN, MARGIN, heading, 16, "start", bold=True))
    canvas.shapes.append(Label(MARGIN, MARGIN + 22, line, 12, "start"))
    return canvas


def shares(canvas: Canvas, config: Config, parts: Iterable[Part], besides: list[str], y: float) -> float:
    """Shared memory as a bar, to scale."""
    parts = [part for part in parts if part.size]
    limit = for_target(config.target).GPU.smem_per_block
    known = sum(part.size for part in parts)
    padding = family(config).smem_bytes(config) - sum(family(config).smem_parts(config).values())
    used, scale = known + padding, WIDE / limit
    text = f"Shared memory: {used / KIB:.1f} of {limit / KIB:.0f} KiB that a block may have, to scale"
    canvas.shapes.append(Label(MARGIN, y, text, 13, "start", bold=True))
    x, y = float(MARGIN), y + 16
    canvas.shapes.append(Rect(x, y, limit * scale, 34, "#ffffff"))
    for part in parts:
        size, (background, foreground) = part.size / part.slots, COLOURS.get(part.name, PLAIN)
        for slot in range(part.slots):
            width = size * scale
            tip = f"{part.name}{f', slot {slot}' if part.slots > 1 else ''}: {size:.0f} bytes"
            canvas.shapes.append(Rect(x, y, width, 34, background, tip))
            if width > LABELLED:
                what = f"{part.name}{slot if part.slots > 1 else ''}" + (f" {size / KIB:.1f}" if width > 2.5 * LABELLED else "")
                canvas.shapes.append(Label(x + width / 2, y + 17, what, 11, fill=foreground))
            x += width
    small = [f"{part.name} {part.size} bytes" for part in parts if part.size * scale <= LABELLED]
    small += [f"alignment up to {padding} bytes"] if padding else []
    small += besides
    canvas.shapes.append(
        Label(MARGIN, y + 48, f"In KiB. Besides: {'; '.join(small)}." if small else "In KiB.", 11, "start", "#333333")
    )
    return y + 60


def ways(canvas: Canvas, groups: Iterable[tuple[Sequence[str], Sequence[Way]]], y: float) -> float:
    """The way of each operand through the block, one line each; those of a group have the same headings."""
    add = canvas.shapes.append
    add(Label(MARGIN, y, "Who copies what where", 13, "start", bold=True))
    x0 = MARGIN + 34
    y += 10
    for heads, group in groups:
        y += 14
        x = float(x0)
        for head, width in zip(heads, WAY_WIDTHS, strict=True):
            add(Label(x, y, head, 11, "start", "#333333"))
            x += width
        y += 12
        for way in group:
            x = float(x0)
            background, foreground = COLOURS[way.name]
            add(Rect(MARGIN, y, 28, 40, background))
            add(Label(MARGIN + 14, y + 20, way.name, 13, bold=True, fill=foreground))
            for i, (lines, width) in enumerate(zip(way.steps, WAY_WIDTHS, strict=True)):
                add(Rect(x, y, width - 22, 40, PLAIN[0]))
                for j, text in enumerate(lines):
                    add(Label(x + 8, y + 12 + 17 * j, text, 10.5, "start", mono=i == 1 and j == 0))
                if i < len(way.steps) - 1:
                    add(Label(x + width - 11, y + 20, "→", 14, bold=True))
                x += width
            y += 48
    return y


def steps(config: Config) -> range:
    """Of the loop, as many as tables of stages show."""
    return range(config.stages + STEPS_PAST)


def table(canvas: Canvas, config: Config, heading: str, lanes: Lanes, y: float) -> float:
    """Lanes below each other, and what happens in each before the loop, at each step and at the end. Cells may have several
    lines."""
    add, heads = canvas.shapes.append, ("before", *(f"step {i}" for i in steps(config)), "at the end")
    add(Label(MARGIN, y, heading, 13, "start", bold=True))
    x0, y = MARGIN + 110, y + 26
    add(Label(MARGIN, y, "slot", 11, "start", "#333333"))
    wide = min(COLUMN, WIDE // len(heads))
    for i, head in enumerate(heads):
        add(Label(x0 + (i + 0.5) * wide, y, head, 11, fill="#333333"))
    return lined(canvas, heads, lanes, wide, y + 14)


def lined(canvas: Canvas, heads: Sequence[str], lanes: Lanes, wide: float, y: float) -> float:
    """The lanes of a table, their columns ``wide`` pixels wide."""
    add, x0 = canvas.shapes.append, MARGIN + 110
    for lane, cells in lanes.items():
        high = LANE + LINE * max(text.count("\n") for text, _ in cells)
        add(Label(MARGIN, y + high / 2, lane, 12, "start"))
        for i, (text, (background, foreground)) in enumerate(cells):
            tip = f"{heads[i]}, {lane}: {' '.join(text.split()) or 'nothing'}"
            add(Rect(x0 + i * wide, y, wide, high, background, tip=tip))
            lines = text.split("\n") if text else []
            for j, line in enumerate(lines):
                add(Label(x0 + (i + 0.5) * wide, y + high / 2 + LINE * (j + 0.5 - len(lines) / 2), line, 11, fill=foreground))
        y += high
    return y


def explained(canvas: Canvas, lanes: Lanes, notes: Iterable[str], y: float) -> float:
    """What the stripes and greys of the lanes above say, and notes."""
    add = canvas.shapes.append
    used = {colour for cells in lanes.values() for _, colour in cells}
    x0 = MARGIN + 110
    x, y = float(x0), y + 20
    for (background, foreground), text in (x for x in LEGEND if x[0] in used):
        width = len(text) * 7.2 + 16
        add(Rect(x, y - 11, width, 22, background))
        add(Label(x + width / 2, y, text, 11, fill=foreground))
        x += width + 6
    add(Label(MARGIN, y, "stripes, greys", 11, "start", "#333333"))
    y += 24
    for note in ("Stripes and greys say what happens; colours, further up, name operands.", *notes):
        add(Label(x0, y, note, 11, "start", "#333333"))
        y += 16
    return y


# ---- lanes -----------------------------------------------------------------------------------------------------------


def kept(name: str, config: Config, end: str = "") -> list[Cell]:
    """An operand that stays through the loop, and what lies over it at the end."""
    out: Cell = (f"{end} copied out", COPIED) if end else ("", WAITS)
    return [(f"copy {name}", COPIED), *[(f"read {name}", READ)] * len(steps(config)), out]


def done(texts: Iterable[str], colour: Colour = PLAIN) -> list[Cell]:
    """What happens in a lane, and nothing where there is no text."""
    return [(text, colour if text else WAITS) for text in texts]


def working(texts: Iterable[str], end: str = "…") -> list[Cell]:
    """Who works from the first step on."""
    return done(("", *texts, end))


# ---- in words --------------------------------------------------------------------------------------------------------


def moved(copy: Copy | Box | None, config: Config, groups: int = 1, warps: Sequence[int] = ()) -> tuple[str, str]:
    """Who copies, and how much at a time: ``groups`` warpgroups a tile each, or TMA as one of ``warps`` asks for it."""
    if copy is None:
        return "", ""
    rows, columns = family(config).tile(copy.operand, config)
    each = f"; {groups} warpgroups" if groups > 1 else ""
    if isinstance(copy, Box):
        boxes = columns // copy.columns * (rows // copy.rows)
        who = f"one thread of warp {warps[0]}" if warps else "one thread"
        return f"TMA: {who} asks for", f"{boxes} box{'es' * (boxes > 1)} of {copy.rows}×{copy.columns}{each}"
    threads = algebra.flat_shape(copy.values.shape)[0]
    of_each = BYTES * algebra.INSTRUCTIONS[copy.instruction].elements
    tile = copy.tile[::-1] if copy.transposed else copy.tile
    times = rows * columns // (tile[0] * tile[1])
    size = f"{threads} threads: {tile[0]}×{tile[1]}" + (f", {times} times" if times > 1 else "") + each
    return f"{copy.instruction}, {of_each} bytes each", size


def lies(operand: str, config: Config) -> tuple[str, str]:
    """An operand's layout in shared memory, and its size."""
    layout = family(config).smem(operand, config)
    rows, columns, *slots = algebra.flat_shape(layout.shape)
    times = f"{slots[0]} × " if slots else ""
    return str(layout), f"{times}{rows}×{columns}, {algebra.size(layout) * BYTES / KIB:.1f} KiB"


# ---- the forward pass ------------------------------------------------------------------------------------------------


def _way(operand: str, config: Config) -> Way:
    copies, layout = family(config).copies(config), family(config).smem(operand, config)
    slots = algebra.flat_shape(layout.shape)[2:]
    groups = slots[0] if operand in "QO" and slots else 1
    if operand == "O":
        first, last = (moved(copies[step, operand], config, groups) for step in ("store", "out"))
    else:
        first, last = moved(copies["in", operand], config, groups), _fed(operand, config)
    return Way(operand, (first, lies(operand, config), last))


def _fed(operand: str, config: Config) -> tuple[str, str]:
    """How the tensor cores get an operand."""
    (role,) = roles(operand, config)
    shape = "×".join(map(str, family(config).mma(role, config).shape))
    load = family(config).copies(config).get(("load", operand))
    return moved(load, config)[0] if load else "read where it lies", f"{product(role, config)}, {shape}"


def _stages(canvas: Canvas, config: Config, y: float) -> None:
    """What each slot holds at each step of the loop over the key tiles."""
    lanes: Lanes = {"Q": kept("Q", config)}
    for operand in "KV":
        for slot in range(config.stages):
            held = [_held(operand, slot, step, config) for step in (None, *steps(config))]
            lanes[f"{operand}, slot {slot}"] = [*held, ("…", WAITS)]
    lanes["tensor cores"] = working(_products(i, config) for i in steps(config))
    lanes["O"] = [("", WAITS), *[("in registers", PLAIN)] * len(steps(config)), ("copied out", COPIED)]
    what = "Stage by stage: what each slot holds; K0 and V0 are the first tiles taken, the last keys"
    y = table(canvas, config, what, lanes, y)
    explained(canvas, lanes, ["A step is one tile of keys; steps are not drawn to scale. S = Q·Kᵀ, P = its softmax."], y)


def _overlapped(config: Config) -> bool:
    """Copies with a thread of their own fill every slot at once, and P·V of a tile runs beside Q·Kᵀ of the next;
    where each warp copies for itself, one slot is refilled while another is read."""
    return config.threads > config.mma_threads


def _held(operand: str, slot: int, step: int | None, config: Config) -> Cell:
    late = 1 if operand == "V" and _overlapped(config) else 0
    return held(operand, slot, step, config.stages, config.stages if _overlapped(config) else config.stages - 1, late)


def held(name: str, slot: int, step: int | None, stages: int, before: int, late: int = 0) -> Cell:
    """The tile in a slot of a ring at a step of the loop, and what happens to it; ``None`` is before the loop, when the first
    ``before`` are copied. A tile is read ``late`` steps after its own."""
    if step is None:
        return (f"copy {name}{slot}", COPIED) if slot < before else ("", WAITS)
    reading = step - late
    first = max(reading, 0)
    tile = first + (slot - first) % stages
    if tile == reading:
        return f"read {name}{tile}", READ
    refilled = tile >= before and tile == reading + stages - 1
    return (f"copy {name}{tile}", COPIED) if refilled else (f"{name}{tile}", WAITS)


def _products(step: int, config: Config) -> str:
    if not _overlapped(config):
        return f"S{step}, P{step}·V{step}"
    return f"S{step}" if step == 0 else f"S{step} ∥ P{step - 1}·V{step - 1}"
