"""Layouts on the host: the algebra of ``base.Layout``, on pycute, for the proofs and the pictures. Nothing here imports
the DSL.

pycute (NVIDIA's, from the package nvidia-cutlass) has composition, complement, division, product and inverses of
layouts without a swizzle. Here is the rest: the same with one, whole tables of offsets at once (coordinates may be
numpy arrays), the thread-value maps of copies, and what the matrix instructions make of them.

Everything rests on two facts about a swizzle ``Sw<bits,base,shift>``, x ↦ x ⊕ ((x >> shift) ∧ mask) with ``mask`` the
``bits`` bits from ``base`` on: it is its own inverse, and it commutes with adding a multiple of ``2^(bits + base +
shift)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycute

from ..base import BYTES, WARP, Copy, IntTuple, Layout


@dataclass(frozen=True)
class Instruction:
    """What moves data between a thread's registers and memory.

    ``elements`` a thread addresses at a time; ``matrix``, for those that exchange data within a warp, maps
    ``(thread, element)`` as it lies in memory to ``lane + 32 · value`` as it lies in registers.
    """

    elements: int
    reads: str  # "global" or "shared", or "" for registers
    writes: str
    matrix: Layout | None = None


# PTX ISA, "ldmatrix" and "stmatrix" (.m8n8, .b16): thread 8·j + r points at row r of matrix j. Lane 4·r + c holds
# columns 2c and 2c + 1 of row r in values 2j and 2j + 1; with .trans, lane 4·c + r holds rows 2r and 2r + 1 of column
# c.
_ROWS = Layout(((8, 4), (2, 4)), ((4, 64), (32, 1)))
_COLUMNS = Layout(((2, 4, 4), 8), ((32, 1, 64), 4))
INSTRUCTIONS = {
    "cp.async": Instruction(8, "global", "shared"),
    "ldmatrix": Instruction(8, "shared", "", _ROWS),
    "ldmatrix.trans": Instruction(8, "shared", "", _COLUMNS),
    "stmatrix": Instruction(8, "", "shared", _ROWS),
    "st.shared.b32": Instruction(2, "", "shared"),
    "ld.shared.b128, st.global.b128": Instruction(8, "shared", "global"),
}


# ---- a layout as a function ------------------------------------------------------------------------------------------


def size(layout: Layout) -> int:
    """Coordinates of a layout."""
    return pycute.product(layout.shape)


def cosize(layout: Layout) -> int:
    """One more than the largest offset. A swizzle may carry it past the plain layout's."""
    return int(table(layout).max()) + 1 if layout.swizzle else plain(layout).cosize()


def offset(layout: Layout, *coordinate) -> Any:
    """The offset in elements of a coordinate: one number for each mode (or tuples, by the shape's nesting), or a single
    one that counts them all, the first mode fastest. Numbers may be numpy arrays: then so is the result."""
    where = coordinate[0] if len(coordinate) == 1 else coordinate
    index = pycute.crd2idx(where, layout.shape, layout.stride)
    if layout.swizzle is None:
        return index
    units = BYTES // layout.unit_bytes  # of an element
    return swizzled(layout.swizzle, index * units) // units


def in_first_slot(layout: Layout, row, column) -> Any:
    """The offset of an element of a tile in the first of its slots."""
    return offset(layout, row, column, *[0] * (len(flat_shape(layout.shape)) - 2))


def table(layout: Layout) -> np.ndarray:
    """Every offset, as an array with one axis for each mode of the layout."""
    modes = layout.shape if isinstance(layout.shape, tuple) else (layout.shape,)
    grid = np.indices([pycute.product(mode) for mode in modes])
    found = offset(layout, *grid) if len(modes) > 1 else offset(layout, grid[0])
    return np.asarray(np.broadcast_to(found, grid.shape[1:]))


def plain(layout: Layout) -> pycute.Layout:
    """The layout without its swizzle, as pycute has it."""
    return pycute.Layout(layout.shape, layout.stride)


def of(layout: pycute.Layout, swizzle: tuple[int, int, int] | None = None, unit_bytes: int = BYTES) -> Layout:
    """A pycute layout, with a swizzle after it."""
    return Layout(layout.shape, layout.stride, swizzle, unit_bytes)


def unswizzled(layout: Layout) -> Layout:
    """The layout without its swizzle."""
    return replace(layout, swizzle=None)


# ---- swizzles --------------------------------------------------------------------------------------------------------


def swizzled(swizzle: tuple[int, int, int], index) -> Any:
    """``Sw<bits,base,shift>`` of a number or an array of them."""
    return pycute.Swizzle(*swizzle)(index)


def in_units(layout: Layout, unit_bytes: int) -> Layout:
    """The same layout, its swizzle said in other units: ``Sw<3,4,3>`` on bytes is ``Sw<3,3,3>`` on 16-bit elements.

    Raises ``ValueError`` where the swizzle moves bits below the new unit.
    """
    if layout.swizzle is None or unit_bytes == layout.unit_bytes:
        return replace(layout, unit_bytes=unit_bytes)
    bits, base, shift = layout.swizzle
    base += layout.unit_bytes.bit_length() - unit_bytes.bit_length()
    if base < 0:
        name = ",".join(map(str, layout.swizzle))
        raise ValueError(f"Sw<{name}> on units of {layout.unit_bytes} bytes moves parts of {unit_bytes}")
    return replace(layout, swizzle=(bits, base, shift), unit_bytes=unit_bytes)


def through(layout: Layout, swizzle: tuple[int, int, int]) -> tuple[int, int, int]:
    """The swizzle Sw' with ``layout ∘ Sw = Sw' ∘ layout``: how a swizzle of coordinates looks in offsets.

    Raises ``ValueError`` where the layout does not carry single bits to single bits in order, so that there is none.
    """
    bits, base, shift = swizzle
    source = [offset(layout, 1 << (base + shift + i)) for i in range(bits)]
    target = [offset(layout, 1 << (base + i)) for i in range(bits)]
    shifts = {high.bit_length() - low.bit_length() for high, low in zip(source, target, strict=True)}
    consecutive = all(x == target[0] << i for i, x in enumerate(target)) and bits > 0 and target[0] > 0
    if layout.swizzle or not consecutive or len(shifts) != 1 or any(x.bit_count() != 1 for x in source):
        raise ValueError(f"{layout} does not carry Sw<{bits},{base},{shift}> to another swizzle")
    found = (bits, target[0].bit_length() - 1, shifts.pop())
    every = np.arange(size(layout))
    if found[2] < bits or not np.array_equal(
        offset(layout, swizzled(swizzle, every) % len(every)), swizzled(found, offset(layout, every))
    ):
        raise ValueError(f"{layout} does not carry Sw<{bits},{base},{shift}> to another swizzle")
    return found


# ---- the algebra -----------------------------------------------------------------------------------------------------


def compose(a: Layout, b: Layout) -> Layout:
    """``a ∘ b``. Where b has a swizzle, a carries it to its own side, if it can (see :func:`through`)."""
    result = of(pycute.composition(plain(a), plain(b)), a.swizzle, a.unit_bytes)
    if b.swizzle is None:
        return result
    if a.swizzle is not None:
        raise ValueError(f"{a} and {b} both have a swizzle: their composition is no layout with one")
    return replace(result, swizzle=through(a, in_units(b, BYTES).swizzle), unit_bytes=BYTES)  # type: ignore[arg-type]


def complement(layout: Layout, up_to: int) -> Layout:
    """The layout of the offsets below ``up_to`` that ``layout`` (which has no swizzle) leaves out, in ascending
    order."""
    _needs_plain(layout)
    return of(pycute.complement(plain(layout), up_to))


def divide(a: Layout, b: Layout) -> Layout:
    """``a`` split into tiles ``b``: ``((tile), (tiles))``, a's swizzle kept. ``b`` has none."""
    _needs_plain(b)
    return of(pycute.logical_divide(plain(a), plain(b)), a.swizzle, a.unit_bytes)


def product(a: Layout, b: Layout) -> Layout:
    """``a`` repeated as ``b`` says: ``((a), (repetitions))``, a's swizzle kept. ``b`` has none."""
    _needs_plain(b)
    return of(pycute.logical_product(plain(a), plain(b)), a.swizzle, a.unit_bytes)


def inverse(layout: Layout) -> np.ndarray:
    """From an offset to the number of its coordinate, first mode fastest, as a table. Raises ``ValueError`` where
    offsets from 0 on are not each taken exactly once."""
    flat = table(layout).ravel(order="F")
    if not np.array_equal(np.sort(flat), np.arange(flat.size)):
        raise ValueError(f"{layout} is no bijection onto 0 … {flat.size - 1}")
    found = np.empty(flat.size, dtype=np.int64)
    found[flat] = np.arange(flat.size)
    return found


def _needs_plain(layout: Layout) -> None:
    if layout.swizzle is not None:
        raise ValueError(f"{layout} has a swizzle; this needs a layout without one")


# ---- thread-value maps -----------------------------------------------------------------------------------------------


def coordinates(values: Layout, tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that a (thread, value) map reaches, each as an array (threads, values)."""
    index = table(values)
    return index % tile[0], index // tile[0]


def owners(values: Layout, tile: tuple[int, int]) -> np.ndarray:
    """Thread and value of each element of a tile, ``(rows, columns, 2)``: of the first thread that has it, −1 of
    none."""
    index = table(values)
    found = np.full((tile[0] * tile[1], 2), -1, dtype=np.int64)
    threads, each = np.indices(index.shape)
    flat = index.ravel()[::-1]  # backwards, so that the first one stays
    found[flat] = np.stack([threads.ravel()[::-1], each.ravel()[::-1]], axis=1)
    return found.reshape(tile[1], tile[0], 2).transpose(1, 0, 2)


def addresses(copy: Copy) -> Layout:
    """The (thread, element) map of what threads point at in memory: the values themselves, or, for a matrix
    instruction, the rows that it hands out. Elements of one access are the first ``INSTRUCTIONS[…].elements``."""
    matrix = INSTRUCTIONS[copy.instruction].matrix
    if matrix is None:
        return copy.values
    threads = pycute.logical_divide(plain(copy.values)[0], pycute.Layout(WARP))  # (lane, warp)
    values = pycute.logical_divide(plain(copy.values)[1], pycute.Layout(size(matrix) // WARP))  # (of one access, more)
    one = pycute.composition(pycute.make_layout(threads[0], values[0]), plain(matrix))
    return of(pycute.make_layout(pycute.make_layout(one[0], threads[1]), pycute.make_layout(one[1], values[1])))


def flat_shape(shape: IntTuple) -> tuple[int, ...]:
    """The extents of a layout's modes."""
    return tuple(pycute.product(mode) for mode in shape) if isinstance(shape, tuple) else (shape,)
