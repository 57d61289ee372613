"""What must hold of every layout, proved by enumeration on the host, without the DSL.

For each operand of a config, in the order in which data flows: global memory → shared memory → registers or tensor
cores → shared memory → global memory. Each step is a row of :func:`report`; what does not hold is a :class:`Finding`,
which says what, where, how many, and what to change.

- **Once**: a tiled copy touches each element of its tile exactly once; a thread-value map is a bijection.
- **Agreement**: memory is filled the way the copies (or TMA's boxes) fill it, and read the way ``ldmatrix`` or
  warpgroup MMA's descriptors read it; every thread must get the elements that the MMA's operand map says it holds.
- **Coalescing and bank conflicts**: few sectors of global memory besides those that a tile lies in, and no conflicts, by
  ``counts``.
- **TMA and WGMMA**: the limits that the hardware puts on boxes, addresses and descriptors.
- **Budgets**: shared memory, registers, barriers and threads against the GPU's limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from .. import family as family_of
from .. import for_target
from ..base import (
    BYTES,
    NAMED_BARRIERS,
    SETMAXNREG,
    SMEM_RESERVED,
    WARP,
    Box,
    Config,
    Copy,
    Gpu,
    Layout,
    Mma,
    names,
    registers_at_launch,
    registers_per_thread,
    row_width,
)
from . import algebra, counts
from .counts import Banks, Sectors

# What wasted sectors may cost before they are a finding: rows that don't begin at a sector cost some whatever one does.
SECTORS_TOLERATED = 1.5
# CUDA driver API, cuTensorMapEncodeTiled: limits of a box; span of a swizzle -> Sw<bits,base,shift> on bytes.
BOX_MAX = 256
TMA_SWIZZLES = {0: None, 32: (1, 4, 3), 64: (2, 4, 3), 128: (3, 4, 3)}
TMA_ALIGN = 128
# PTX ISA, "Matrix descriptor format" of wgmma: address and offsets are 14 bits of 16 bytes.
DESCRIPTOR_LIMIT = 1 << 18
SOME = 512  # indices of a layout that the DSL's own function is asked for


@dataclass(frozen=True)
class Finding:
    """Something that does not hold: the kind of ``check``, ``where``, in words ``what``, how many times, what to do."""

    check: str
    where: str
    what: str
    count: int
    change: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.change}"


@dataclass(frozen=True)
class Row:
    """One step of one operand, with what was counted and what was found."""

    operand: str
    step: str
    instruction: str
    layout: str
    banks: Banks | None = None
    sectors: Sectors | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Line:
    """What one part takes of a resource. The line with a limit is the resource's total."""

    resource: str
    part: str
    amount: int
    limit: int | None = None
    unit: str = ""


# ---- exactly once ----------------------------------------------------------------------------------------------------


def once(where: str, values: Layout, tile: tuple[int, int], times: int = 1) -> list[Finding]:
    """Each element of a tile belongs to exactly one (thread, value), or to ``times`` where warps share an operand."""
    count = tile[0] * tile[1]
    index = algebra.table(values).ravel()
    inside = index[(index >= 0) & (index < count)]
    owners = np.bincount(inside, minlength=count)
    found = []
    on = f"{values} on {tile[0]}×{tile[1]}"
    kinds = (
        ("hole", owners < times, "fewer", "give a mode a larger extent or stride"),
        ("overlap", owners > times, "more", "make the strides of the modes distinct"),
    )
    for kind, wrong, than, change in kinds:
        if number := int(wrong.sum()):
            column, row = divmod(int(np.argmax(wrong)), tile[0])
            text = f"{number} of {count} elements belong to {than} than {times} (thread, value)"
            found.append(Finding(kind, where, f"{on}: {text}, the first at row {row}, column {column}", number, change))
    if outside := index.size - inside.size:
        text = f"{on}: {outside} (thread, value) lie outside of the tile"
        found.append(Finding("outside", where, text, outside, "give a mode a smaller extent or stride"))
    return found


def distinct(where: str, layout: Layout) -> list[Finding]:
    """A layout in memory gives no two coordinates the same place."""
    flat = algebra.table(layout).ravel()
    twice = flat.size - np.unique(flat).size
    if not twice:
        return []
    text = f"{layout}: {twice} of {flat.size} elements share their place with another"
    return [Finding("overlap", where, text, twice, "make each stride at least what the modes below it span")]


def held(where: str, layout: Layout, have: int) -> list[Finding]:
    """The bytes set aside for an operand hold its layout."""
    need = algebra.cosize(layout) * BYTES
    if need <= have:
        return []
    text = f"{layout} reaches over {need} bytes; {have} are set aside"
    return [Finding("outside", where, text, need - have, "count every slot of the layout in smem_parts")]


def fits(where: str, tile: tuple[int, int], shape: tuple[int, int]) -> list[Finding]:
    """Whole tiles make up an operand."""
    if shape[0] % tile[0] == 0 and shape[1] % tile[1] == 0:
        return []
    rest = shape[0] * shape[1] - (shape[0] // tile[0] * tile[0]) * (shape[1] // tile[1] * tile[1])
    text = f"tiles of {tile[0]}×{tile[1]} don't make up {shape[0]}×{shape[1]}: {rest} elements are left over"
    return [Finding("hole", where, text, rest, "choose rows and columns that are multiples of the tile's")]


# ---- a copy's accesses -----------------------------------------------------------------------------------------------


def contiguous(where: str, layout: Layout, offsets: np.ndarray) -> list[Finding]:
    """The elements of each access lie one after another, and begin at a multiple of its size."""
    expected = offsets[..., :1] + np.arange(offsets.shape[-1])
    torn = int(((offsets != expected).any(-1) | (offsets[..., 0] % offsets.shape[-1] != 0)).sum())
    if not torn:
        return []
    size = offsets.shape[-1] * BYTES
    text = f"{torn} accesses of {size} bytes are torn apart or not aligned in {layout}"
    bits = (offsets.shape[-1] - 1).bit_length()
    change = f"keep the lowest {bits} bits of the offset out of the swizzle, and the other modes' strides above them"
    return [Finding("alignment", where, text, torn, change)]


def bank_findings(where: str, layout: Layout, counted: Banks) -> list[Finding]:
    """Any conflict is a finding: a swizzle as wide as a row avoids them all."""
    if not counted.conflicts:
        return []
    text = (
        f"{counted.conflicts} bank conflicts in {counted.instructions} instructions: "
        f"{counted.accesses} accesses where {counted.least} would do, in {layout}"
    )
    change = "swizzle rows of 128 bytes by Sw<3,4,3> on bytes, rows of 64 by Sw<2,4,3>, of 32 by Sw<1,4,3>"
    return [Finding("bank conflicts", where, text, counted.conflicts, change)]


def sector_findings(where: str, counted: Sectors) -> list[Finding]:
    """More than :data:`SECTORS_TOLERATED` times the sectors that the tile lies in."""
    if counted.ratio <= SECTORS_TOLERATED:
        return []
    text = (
        f"{counted.instructions} instructions ask for {counted.asked} sectors where the tile lies in {counted.needed} "
        f"({counted.ratio:.1f} times, {counted.access_bytes} bytes a thread)"
    )
    change = "let neighbouring threads take neighbouring 16-byte pieces of a row"
    return [Finding("coalescing", where, text, counted.asked - counted.needed, change)]


# ---- TMA -------------------------------------------------------------------------------------------------------------


def box_findings(where: str, box: Box, layout: Layout, align: int) -> list[Finding]:
    """The limits of a TMA box, and that the layout in shared memory is what the boxes leave there."""
    found = []

    def limit(wrong: bool, text: str, count: int, change: str) -> None:
        if wrong:
            found.append(Finding("TMA box", where, text, count, change))

    inner = box.columns * BYTES
    for name, extent in (("rows", box.rows), ("columns", box.columns)):
        text = f"a box has {extent} {name}; TMA takes at most {BOX_MAX}"
        limit(extent > BOX_MAX, text, extent - BOX_MAX, "copy the tile as several boxes")
    text = f"a row of a box has {inner} bytes, which is no multiple of 16"
    limit(inner % 16 != 0, text, inner % 16, "choose columns that are a multiple of 8")
    if box.swizzle_bytes not in TMA_SWIZZLES:
        text = f"a swizzle span of {box.swizzle_bytes} bytes; TMA has {', '.join(map(str, TMA_SWIZZLES))}"
        limit(True, text, box.swizzle_bytes, "choose one of them")
        return found
    span = box.swizzle_bytes
    text = f"a row of a box has {inner} bytes, the swizzle spans {span}"
    limit(bool(span) and inner > span, text, inner - span, "cut the tile into narrower boxes")
    needed = max(TMA_ALIGN, 8 * span)
    text = f"shared memory is aligned to {align} bytes; a swizzle span of {span} needs {needed}"
    limit(align % needed != 0, text, 1, f"allocate it at a multiple of {needed}")
    return found or _box_image(where, box, layout, needed)


def _box_image(where: str, box: Box, layout: Layout, align: int) -> list[Finding]:
    """Compare the layout with what TMA leaves: box by box, row after row, then the swizzle on the address."""
    rows, columns, *slots = algebra.flat_shape(layout.shape)
    row, column = np.indices((rows, columns))
    slot = (np.arange(slots[0])[:, None, None],) if slots else ()
    r, c = row % box.rows, column % box.columns
    base = algebra.offset(algebra.unswizzled(layout), row - r, column - c, *slot) * BYTES
    address = base + (r * box.columns + c) * BYTES
    swizzle = TMA_SWIZZLES[box.swizzle_bytes]
    if swizzle is not None:
        address = algebra.swizzled(swizzle, address)
    # A box's swizzle counts from its own start only where that is aligned to the whole pattern.
    unaligned = int((base % align != 0).sum())
    wrong = int((address != algebra.offset(layout, row, column, *slot) * BYTES).sum())
    if not wrong and not unaligned:
        return []
    if unaligned:
        text = f"{unaligned} elements lie in boxes that don't begin at a multiple of {align} bytes"
        return [Finding("TMA box", where, text, unaligned, "make the box's rows a multiple of 8")]
    span = box.swizzle_bytes
    text = f"{wrong} of {address.size} elements of {layout} aren't where TMA puts them with a span of {span} bytes"
    return [Finding("agreement", where, text, wrong, "give the layout and the box the same swizzle and width")]


# ---- agreement: what the MMA reads against what the copy left --------------------------------------------------------


def memory_image(layout: Layout) -> np.ndarray:
    """Shared memory after one slot has been copied: for each offset, ``row · columns + column`` of the element
    there, −1 where there is none."""
    rows, columns, *_ = algebra.flat_shape(layout.shape)
    row, column = np.indices((rows, columns))
    offsets = algebra.in_first_slot(layout, row, column)
    image = np.full(int(offsets.max()) + 1, -1, dtype=np.int64)
    image[offsets.ravel()] = (row * columns + column).ravel()
    return image


def threads_get(where: str, copy: Copy, layout: Layout, wanted: Layout, shape: tuple[int, int]) -> list[Finding]:
    """Run a copy between shared memory and registers, element by element: after ``ldmatrix`` each thread must
    hold, and for a store it must own, the elements that the MMA's map ``wanted`` gives it."""
    instruction = algebra.INSTRUCTIONS[copy.instruction]
    image = memory_image(layout)
    rows, columns = counts.accesses(copy, shape)
    lead = algebra.in_first_slot(layout, rows, columns)[..., :1]
    read = image[np.minimum(lead + np.arange(instruction.elements), len(image) - 1)]  # (instruction, thread, element)
    if instruction.matrix is not None:
        held = np.empty((len(read), WARP * instruction.elements), dtype=np.int64)
        held[:, algebra.table(instruction.matrix).ravel()] = read.reshape(len(read), -1)
        read = held.reshape(len(read), instruction.elements, WARP).transpose(0, 2, 1)
    rows, columns = counts.grouped(wanted, copy, shape)
    expected = rows * algebra.flat_shape(layout.shape)[1] + columns
    wrong = int((read != expected).sum())
    if not wrong:
        return []
    text = f"{wrong} of {read.size} values in registers are not the elements that the MMA takes from them"
    change = f"make the copy from the MMA's own map {wanted}, and keep 8 elements of a row together in {layout}"
    return [Finding("agreement", where, text, wrong, change)]


def tensor_cores_get(where: str, layout: Layout, span: int, extent: int, k_size: int, k_major: bool) -> list[Finding]:
    """Read an operand as a warpgroup MMA does through its descriptor, from memory as TMA left it: ``extent`` rows (m of A, n of
    B) of ``k_size`` elements, each along the layout's columns where ``k_major``.

    PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" and "Strides": with ``span`` the swizzle's
    bytes, element (row, k) of a K-major operand is at ``start + (row mod 8)·span + (row / 8)·SBO + 2·k``, element (n,
    k) of an MN-major one at ``start + 2·(n mod w) + (n / w)·LBO + (k mod 8)·span + (k / 8)·SBO`` with ``w = span /
    2``; then the swizzle acts on the address.
    """
    found = []
    swizzle = TMA_SWIZZLES.get(span)
    if swizzle is None:
        text = f"{layout} comes without a swizzle"
        return [Finding("WGMMA", where, text, algebra.size(layout), "use a swizzle span of 32, 64 or 128 bytes")]
    image, bare = memory_image(layout), algebra.unswizzled(layout)
    rows, columns, *_ = algebra.flat_shape(layout.shape)
    width = span // BYTES

    def start(row: int, column: int) -> int:
        return int(algebra.in_first_slot(bare, row, column)) * BYTES

    def mistakes(address: np.ndarray, expected: np.ndarray) -> int:
        index = algebra.swizzled(swizzle, address) // BYTES
        return int((image[np.minimum(index, len(image) - 1)] != expected).sum())

    wrong, total = 0, 0
    sbo = start(8, 0) - start(0, 0)
    lbo = start(0, width) - start(0, 0) if columns > width else 0
    if k_major:
        row, k = np.indices((extent, k_size))
        local = row % 8 * span + row // 8 * sbo + k * BYTES
        steps = [(start(0, first), row * columns + first + k) for first in range(0, columns, k_size)]
        if extent != rows:
            text = f"an MMA takes {extent} rows of an operand that has {rows}"
            found.append(Finding("WGMMA", where, text, abs(extent - rows), "make the MMA as tall as the tile"))
    else:  # MN-major: n along the columns, of which there may be several MMAs' worth, k along the rows
        n, k = np.indices((extent, k_size))
        local = n % width * BYTES + n // width * lbo + k % 8 * span + k // 8 * sbo
        firsts = [(row, n) for row in range(0, rows - rows % k_size, k_size) for n in range(0, columns, extent)]
        steps = [(start(row, column), (row + k) * columns + column + n) for row, column in firsts]
        if rows % k_size:
            text = f"{rows} keys are no multiple of the {k_size} that an MMA takes"
            found.append(Finding("WGMMA", where, text, rows % k_size, "choose a tile_n that is a multiple of 16"))
    for begin, expected in steps:
        wrong, total = wrong + mistakes(begin + local, expected), total + expected.size
    if wrong:
        text = f"{wrong} of {total} elements aren't where the descriptor (SBO {sbo}, LBO {lbo}, span {span}) looks"
        change = f"make {layout} rows of {span} bytes with {swizzle} on bytes"
        found.append(Finding("agreement", where, text, wrong, change))
    fields = [begin for begin, _ in steps] + [sbo, lbo]
    bad = sum(field % 16 != 0 or not 0 <= field < DESCRIPTOR_LIMIT for field in fields)
    if bad:
        text = f"{bad} fields of descriptors are no multiple of 16 below {DESCRIPTOR_LIMIT} bytes"
        found.append(Finding("WGMMA", where, text, bad, "make the tile smaller, or its strides multiples of 16 bytes"))
    return found


def scores_are_operand(where: str, scores: Mma, product: Mma) -> list[Finding]:
    """A product takes its operand A from the registers in which the scores were left: same thread, same row, same column, 16
    columns at a time."""
    rows, columns = algebra.coordinates(scores.c, scores.tile[:2])
    a_rows, a_columns = algebra.coordinates(product.a, (product.tile[0], product.tile[2]))
    per_step = a_rows.shape[1]
    wrong = 0
    for step in range(rows.shape[1] // per_step):
        part = slice(step * per_step, (step + 1) * per_step)
        wrong += int(((rows[:, part] != a_rows) | (columns[:, part] != a_columns + step * product.tile[2])).sum())
    if not wrong:
        return []
    text = f"{wrong} of {rows.size} scores lie in another thread or value than the product takes them from"
    return [Finding("agreement", where, text, wrong, "give both products the same rows and warps")]


# ---- budgets ---------------------------------------------------------------------------------------------------------


def budget(config: Config, gpu: Gpu, family: ModuleType) -> list[Line]:
    """What takes what of a multiprocessor, a thread and a block; each resource's last line is its total with the
    limit."""
    blocks = config.blocks_per_multiprocessor
    parts = {name: size for name, size in family.smem_parts(config).items() if size}
    parts["alignment"] = family.smem_bytes(config) - sum(parts.values())
    lines = [Line("shared memory", name, size, unit="bytes") for name, size in parts.items() if size]
    total = family.smem_bytes(config)
    lines.append(Line("shared memory", "a block", total, gpu.smem_per_block, "bytes"))
    reserved = blocks * (total + SMEM_RESERVED)
    text = f"{blocks} block{'s' * (blocks > 1)} and 1 KiB each for the system"
    lines.append(Line("shared memory", text, reserved, gpu.smem_per_multiprocessor, "bytes"))

    have = registers_per_thread(config, gpu)
    lines.append(Line("registers", "accumulators, a thread", family.accumulator_registers(config), have))
    if config.mma_registers:
        warpgroups, copying = config.mma_threads // 128, (config.threads - config.mma_threads) // 128
        lines.append(Line("registers", f"{warpgroups} computing warpgroups", warpgroups * 128 * config.mma_registers))
        lines.append(Line("registers", f"{copying} copying warpgroup", copying * 128 * config.copy_registers))
        taken = 128 * (warpgroups * config.mma_registers + copying * config.copy_registers)
        launched = registers_at_launch(config, gpu) * config.threads
        lines.append(Line("registers", "after setmaxnreg, a block", taken, launched))
    else:
        lines.append(Line("registers", f"{blocks * config.threads} threads", blocks * config.threads * have, None))
        lines.append(Line("registers", "a multiprocessor", blocks * config.threads * have, gpu.registers_per_multiprocessor))
    used = family.barriers(config)
    lines += [Line("barriers", name, number) for name, number in used.items()]
    lines.append(Line("barriers", "a block", sum(used.values()), NAMED_BARRIERS))
    lines.append(Line("threads", "a block", config.threads, gpu.threads_per_block))
    return lines


def budget_findings(config: Config, gpu: Gpu, family: ModuleType) -> list[Finding]:
    """Each total that is over its limit, with what takes most; and register counts that setmaxnreg does not take."""
    change = {
        "shared memory": "take fewer stages or a smaller tile_n",
        "registers": "take a smaller tile_n, or fewer rows a warp",
        "barriers": "share barriers between warpgroups",
        "threads": "take a smaller tile_m",
    }
    where, lines, found = title(config), budget(config, gpu, family), []
    for line in lines:
        if line.limit is not None and line.amount > line.limit:
            over = line.amount - line.limit
            parts = [x for x in lines if x.resource == line.resource and x.limit is None]
            most = max(parts, key=lambda x: x.amount, default=line)
            unit = f" {line.unit}" if line.unit else ""
            text = (
                f"{line.resource}, {line.part}: {line.amount}{unit} of {line.limit}, {over} too many; "
                f"{most.part} takes most ({most.amount})"
            )
            found.append(Finding("budget", where, text, over, change[line.resource]))
    for name in ("mma_registers", "copy_registers"):
        value = getattr(config, name)
        if value and value not in SETMAXNREG:
            text = f"{name} is {value}; setmaxnreg takes multiples of 8 from {SETMAXNREG[0]} to {SETMAXNREG[-1]}"
            found.append(Finding("budget", where, text, 1, "round it down"))
    return found


# ---- all of a config -------------------------------------------------------------------------------------------------


def title(config: Config) -> str:
    """A config in a few words."""
    dims = f"d{config.tile_d}" + (f"/{config.tile_dv}" if config.tile_dv != config.tile_d else "")
    dims += f" {config.tile_m}×{config.tile_n}" if config.backward and family_of(config).turned(config) else ""
    dims += f" {config.dq_stages} stages of dQ" if config.dq_stages > 1 else ""
    return f"{config.target} {config.backward or config.mechanism} {dims} {config.dtype}"


def operands(config: Config) -> tuple[str, ...]:
    """What :func:`report` names: operands, and in the backward pass products."""
    operands, roles, _ = names(family_of(config))
    return tuple(dict.fromkeys((*operands, *roles))) if config.backward else (*operands, "P")


def report(config: Config, head_dim: int | None = None, family: ModuleType | None = None) -> list[Row]:
    """Every step of every operand of a config, and its products, with what was counted and found. ``head_dim`` is that of the
    tensors, where it is smaller than the tile's (Q and K; V's padding is taken to be the same)."""
    family = family or family_of(config)
    operands, roles, _ = names(family)
    rows: list[Row] = []
    for operand in operands:
        if room := _room(operand, config, family):
            rows += _operand_rows(operand, room, config, head_dim, family)
            rows += _tensor_core_rows(operand, config, family)
    found = {role: tuple(_product(role, config, family)) for role in roles}
    if config.backward:
        return rows + [Row(role, "product", "", str(family.mma(role, config).c), findings=found[role]) for role in roles]
    scores = str(family.mma("S", config).c)
    return [*rows, Row("P", "S to P", "registers", scores, findings=sum(found.values(), ()))]


def check(config: Config, head_dim: int | None = None, family: ModuleType | None = None) -> list[Finding]:
    """Everything that does not hold of a config: an empty list is a proof."""
    family = family or family_of(config)
    found = [finding for row in report(config, head_dim, family) for finding in row.findings]
    return found + budget_findings(config, for_target(config.target).GPU, family)


def _room(operand: str, config: Config, family: ModuleType) -> int:
    """Bytes of shared memory set aside for an operand, or for the one that it lies over; 0 where it is in registers all the
    while."""
    if hasattr(family, "KERNELS"):
        parts = family.smem_parts_of(next(kernel for kernel, held in family.KERNELS.items() if operand in held), config)
    else:
        parts = family.smem_parts(config)
    over = family.over(config) if config.backward else {} if parts.get("O") else {"O": "Q"}
    return parts.get(over.get(operand, operand).removeprefix("q"), 0)


def _operand_rows(operand: str, have: int, config: Config, head_dim: int | None, family: ModuleType) -> Iterator[Row]:
    """An operand's tile in shared memory, for which ``have`` bytes are set aside, and its copies."""
    layout, shape = family.smem(operand, config), family.tile(operand, config)
    dim = min(head_dim or shape[1], shape[1])
    where = f"{title(config)}, {operand}"
    yield Row(operand, "tile", "", str(layout), findings=(*distinct(where, layout), *held(where, layout, have)))
    for (step, name), copy in family.copies(config).items():
        at = f"{where}, {step}"
        if name == operand and isinstance(copy, Box):
            yield _box_row(at, step, copy, layout, shape, dim, family)
        elif name == operand:
            yield _copy_row(at, step, copy, layout, shape, dim, wanted(step, operand, config, family))


def _box_row(at: str, step: str, box: Box, layout: Layout, shape, dim: int, family: ModuleType) -> Row:
    counted = counts.of_box(box, shape, dim, dim)
    found = box_findings(at, box, layout, family.SMEM_ALIGN) + sector_findings(at, counted)
    what = f"{box.rows}×{box.columns} box, {box.swizzle_bytes}-byte swizzle"
    return Row(box.operand, step, f"TMA {'store' if box.store else 'load'}", what, None, counted, tuple(found))


def _copy_row(at: str, step: str, copy: Copy, layout: Layout, shape, dim: int, wanted) -> Row:
    whole = (shape[1], shape[0]) if copy.transposed else shape
    mma_map, times = wanted if wanted else (None, 1)
    found = fits(at, copy.tile, whole) + once(at, copy.values, copy.tile, times)
    if found:
        return Row(copy.operand, step, copy.instruction, str(copy.values), findings=tuple(found))
    rows, columns = counts.accesses(copy, shape)
    counted, moved = counts.of_copy(copy, layout, shape, dim, dim)
    found += contiguous(at, layout, algebra.in_first_slot(layout, rows, columns))
    found += bank_findings(at, layout, counted)
    if mma_map is not None:
        found += threads_get(at, copy, layout, mma_map, shape)
    if moved is not None:  # of the map alone: sectors that bank conflicts cost are no finding of their own
        found += sector_findings(at, counts.sectors(rows, columns, dim, dim))
    return Row(copy.operand, step, copy.instruction, str(copy.values), counted, moved, tuple(found))


def in_registers(step: str, operand: str, family: ModuleType) -> tuple[str, str] | None:
    """The MMA's role whose registers a copy fills or empties, and which they are: ``"A"``, ``"B"`` or the accumulator
    ``"C"``."""
    verb, _, role = step.partition(" ")
    if verb == "store":
        return "S" if operand in ("P", "dS") else operand, "C"
    if verb != "load":
        return None
    reads = names(family)[2]
    role = role or next(role for role, read in reads.items() if operand in read)
    return role, "AB"[reads[role.removeprefix("r")].index(operand)]  # of first columns, as of all


def wanted(step: str, operand: str, config: Config, family: ModuleType) -> tuple[Layout, int] | None:
    """The MMA's map that a copy to or from registers must agree with, and how many warps hold each element."""
    if (found := in_registers(step, operand, family)) is None:
        return None
    mma = family.mma(found[0], config)
    return {"A": (mma.a, mma.across), "B": (mma.b, mma.warps), "C": (mma.c, 1)}[found[1]]


def tiled_copy(step: str, operand: str, config: Config, family: ModuleType):
    """The DSL's object of a copy by threads."""
    verb, _, role = step.partition(" ")  # "load", in the backward pass "load dV"
    make = {"in": "copy_in", "load": "load_operand", "out": "copy_out"}.get(verb, "store_accumulator")
    arguments = (config,) if verb == "store" and not config.backward else (operand, config)
    return getattr(family, make)(*([role] if role else []), *arguments)


def _tensor_core_rows(operand: str, config: Config, family: ModuleType) -> Iterator[Row]:
    """What warpgroup MMAs read through descriptors. Scores and dP sum over a head's columns: what they read is K-major; the
    other products sum over rows of what they read, but for dSᵀ, which dK's reads as it lies."""
    for role, read in names(family)[2].items():
        mma = family.mma(role, config)
        if role == "dQ" and family.turned(config):
            read = read[::-1]
        for letter, extent, name in zip("AB", mma.shape[:2], read, strict=True):
            if name != operand or letter not in mma.from_shared:
                continue
            layout, step = family.smem(operand, config), f"read {role}" if config.backward else "read"
            span, k_major = row_width(layout) * BYTES, role.lstrip("rq") in ("S", "dP") or (role, letter) == ("dK", "A")
            found = tensor_cores_get(f"{title(config)}, {operand}, {step}", layout, span, extent, mma.shape[2], k_major)
            what = f"{'×'.join(map(str, mma.shape))}, {'K' if k_major else 'MN'}-major, {span}-byte swizzle"
            yield Row(operand, step, "wgmma", what, findings=tuple(found))


def _product(role: str, config: Config, family: ModuleType) -> list[Finding]:
    """An MMA's own maps are bijections, but for operands that several warps hold; and an operand A that is neither read nor
    loaded from shared memory is what the scores' accumulator holds."""
    mma, where, found = family.mma(role, config), f"{title(config)}, {role}", []
    m, n, k = mma.tile
    stacked = mma.warps if not mma.from_shared else 1  # warps that each hold all of B
    maps = (("A", mma.a, (m, k), mma.across), ("B", mma.b, (n, k), stacked), ("C", mma.c, (m, n), 1))
    for letter, values, tile, times in maps:
        if letter not in mma.from_shared:
            found += once(f"{where}, operand {letter}", values, tile, times)
    name = names(family)[2][role][0]
    loaded = {("load", name), (f"load {role}", name)} & family.copies(config).keys()
    if not (loaded or "A" in mma.from_shared or role.startswith("r")):
        found += scores_are_operand(where, family.mma("qS" if role == "dQ" else "S", config), mma)
    return found


# ---- the host's layouts against the DSL's ----------------------------------------------------------------------------


def against_dsl(configs: Sequence[Config], limit: int = SOME) -> list[Finding]:
    """Trace every layout, thread-value map and tiled copy of the configs in the DSL, without a GPU, and compare.

    Shape, stride and swizzle of each traced object give every index on the host; the DSL itself is asked for
    ``limit`` of them, spread over the layout. Raises ``ImportError`` where the DSL is not installed.
    """
    from cutlass import cute

    found: list[Finding] = []
    done: set[tuple[Layout, str]] = set()
    chosen: list[Config] = []

    def compare() -> None:
        for config in chosen:
            found.extend(_compare(config, family_of(config), limit, done))

    @cute.jit
    def trace():
        compare()

    for target in sorted({config.target for config in configs}):
        chosen[:] = [config for config in configs if config.target == target]
        cute.compile(trace, options=f"--gpu-arch={target}")
    return found


def _compare(config: Config, family: ModuleType, limit: int, done: set) -> Iterator[Finding]:
    at = title(config)
    operands, roles, _ = names(family)
    pairs = [(f"{at}, {name}", family.smem(name, config), family.smem_layout(name, config)) for name in operands]
    trivial: set[Layout] = set()
    for role in roles:
        mma, traced = family.mma(role, config), family.tiled_mma(role, config)
        for name in "ABC":
            tv = getattr(traced, f"tv_layout_{name}_tiled")
            pairs.append((f"{at}, {name} of {role}", getattr(mma, name.lower()), tv))
            if name in mma.from_shared:  # the same for all threads, and large
                trivial.add(getattr(mma, name.lower()))
        tile = tuple(traced.get_tile_size(mode) for mode in range(3))
        if tile != mma.tile or tuple(traced.shape_mnk) != mma.shape:
            text = f"an MMA of {mma.shape} on {mma.tile} is {tuple(traced.shape_mnk)} on {tile} in the DSL"
            yield Finding("DSL", f"{at}, {role}", text, 1, "mend family.mma")
    for (step, name), copy in family.copies(config).items():
        if isinstance(copy, Copy):
            traced, pointed = tiled_copy(step, name, config, family), algebra.addresses(copy)
            ends = {"load": (pointed, copy.values), "store": (copy.values, pointed)}.get(step.split()[0], (pointed, pointed))
            pairs.append((f"{at}, {name} {step}, source", ends[0], traced.layout_src_tv_tiled))
            pairs.append((f"{at}, {name} {step}, destination", ends[1], traced.layout_dst_tv_tiled))
    for where, layout, traced in pairs:
        if (layout, str(traced)) not in done:
            done.add((layout, str(traced)))
            yield from _compare_layout(where, layout, traced, min(limit, SOME) if layout in trivial else limit)


def _compare_layout(where: str, layout: Layout, traced, limit: int) -> Iterator[Finding]:
    """One layout: all indices from the traced object's own numbers, some from the DSL's function."""
    outer, swizzle = (traced.outer, traced.inner) if hasattr(traced, "inner") else (traced, None)
    found = Layout(outer.shape, outer.stride)
    if swizzle is not None:
        numbers = (swizzle.num_bits, swizzle.num_base, swizzle.num_shift)
        found = replace(found, swizzle=numbers, unit_bytes=layout.unit_bytes)
    if algebra.size(found) != algebra.size(layout):
        text = f"{layout} is {traced} in the DSL"
        yield Finding("DSL", where, text, algebra.size(layout), "make both from one description")
        return
    here, there = algebra.table(layout).ravel(order="F"), algebra.table(found).ravel(order="F")
    wrong = int((here != there).sum())
    # A swizzle on bytes is in the pointer: the DSL's own function has the layout before it.
    asked, expected = (outer, algebra.unswizzled(layout)) if layout.unit_bytes != BYTES else (traced, layout)
    some = np.arange(min(limit, here.size)) * 4099 % here.size  # a prime: no pattern of powers of 2
    offsets = algebra.table(expected).ravel(order="F")
    wrong += sum(int(asked(int(index))) != offsets[index] for index in some)
    if wrong:
        text = f"{layout} is {traced} in the DSL: {wrong} indices differ"
        yield Finding("DSL", where, text, wrong, "make both from one description")
