"""The layout algebra on the host, against brute-force enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pycute")

from cute_attn.layouts.base import Copy, Layout, by_modes
from cute_attn.layouts.tools import algebra

QUICKLY = settings(max_examples=60)
EXTENTS = (1, 2, 4, 8)
SWIZZLES = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(3, 5))


@st.composite
def layouts(draw, max_modes: int = 4):
    """Any layout: power-of-two extents, arbitrary strides."""
    shape = tuple(draw(st.lists(st.sampled_from(EXTENTS), min_size=1, max_size=max_modes)))
    stride = tuple(draw(st.lists(st.integers(0, 64), min_size=len(shape), max_size=len(shape))))
    return Layout(shape, stride)


@st.composite
def permuted(draw, max_modes: int = 4):
    """A bijection onto 0 … size − 1: the modes of a compact layout in any order. Also those modes' strides."""
    extents = draw(st.lists(st.sampled_from(EXTENTS[1:]), min_size=1, max_size=max_modes))
    strides = [int(x) for x in np.cumprod([1, *extents[:-1]])]
    order = draw(st.permutations(range(len(extents))))
    return Layout(tuple(extents[i] for i in order), tuple(strides[i] for i in order))


@st.composite
def parts(draw):
    """Some modes of a compact layout, and the size of all of it."""
    whole = draw(permuted())
    count = draw(st.integers(1, len(whole.shape)))
    return Layout(whole.shape[:count], whole.stride[:count]), algebra.size(whole)


def by_hand(layout: Layout, index: int) -> int:
    """An offset from the definition: coordinates one digit at a time, then the swizzle bit by bit."""
    found = 0
    for extent, stride in zip(layout.shape, layout.stride, strict=True):
        found += index % extent * stride
        index //= extent
    if layout.swizzle is None:
        return found
    bits, base, shift = layout.swizzle
    units = 2 // layout.unit_bytes
    address = found * units
    for bit in range(bits):
        address ^= (address >> (base + shift + bit) & 1) << (base + bit)
    return address // units


def all_by_hand(layout: Layout) -> list[int]:
    return [by_hand(layout, index) for index in range(algebra.size(layout))]


def flat(layout: Layout) -> list[int]:
    return algebra.table(layout).ravel(order="F").tolist()


@QUICKLY
@given(layouts(), SWIZZLES, st.booleans())
def test_offsets(layout, swizzle, swizzled):
    if swizzled:
        layout = Layout(layout.shape, layout.stride, swizzle)
    assert flat(layout) == all_by_hand(layout)
    assert [algebra.offset(layout, index) for index in range(algebra.size(layout))] == all_by_hand(layout)
    assert algebra.cosize(layout) == max(all_by_hand(layout)) + 1


@QUICKLY
@given(SWIZZLES, st.integers(0, 1 << 14))
def test_a_swizzle_is_its_own_inverse_and_keeps_its_period(swizzle, index):
    bits, base, shift = swizzle
    once = algebra.swizzled(swizzle, index)
    assert once == by_hand(Layout((1 << 15,), (1,), swizzle), index)
    assert algebra.swizzled(swizzle, once) == index
    period = 1 << (bits + base + shift)
    assert algebra.swizzled(swizzle, index + 3 * period) == once + 3 * period


@QUICKLY
@given(permuted(), st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 4)))
def test_a_swizzle_on_bytes_is_the_same_on_elements(layout, swizzle):
    on_bytes = Layout(layout.shape, layout.stride, swizzle, unit_bytes=1)
    on_elements = algebra.in_units(on_bytes, 2)
    assert flat(on_bytes) == flat(on_elements)
    assert algebra.in_units(on_elements, 1) == on_bytes


def test_a_swizzle_below_the_element_is_refused():
    with pytest.raises(ValueError, match="moves parts"):
        algebra.in_units(Layout(64, 1, (3, 0, 3), unit_bytes=1), 2)


@QUICKLY
@given(layouts(), permuted(), SWIZZLES, st.booleans())
def test_composition(a, b, swizzle, swizzled):
    if swizzled:
        a = Layout(a.shape, a.stride, swizzle)
    while algebra.size(a) < algebra.size(b):  # a must be defined wherever b goes
        a = Layout((*a.shape, 8), (*a.stride, 128), a.swizzle)
    composed = algebra.compose(a, b)
    assert [algebra.offset(composed, i) for i in range(algebra.size(b))] == [by_hand(a, x) for x in all_by_hand(b)]


@QUICKLY
@given(st.integers(0, 3), SWIZZLES)
def test_composition_carries_a_swizzle_through(scale, swizzle):
    a, b = Layout((1 << 12,), (1 << scale,)), Layout((64, 64), (1, 64), swizzle)
    composed = algebra.compose(a, b)
    assert flat(composed) == [by_hand(a, x) for x in all_by_hand(b)]
    assert composed.swizzle == (swizzle[0], swizzle[1] + scale, swizzle[2])


def test_composition_refuses_what_is_no_layout():
    swizzled = Layout((64, 64), (1, 64), (3, 3, 3))
    with pytest.raises(ValueError, match="both have a swizzle"):
        algebra.compose(swizzled, swizzled)
    with pytest.raises(ValueError, match="does not carry"):
        algebra.compose(Layout((8, 512), (3, 24)), swizzled)


@QUICKLY
@given(parts())
def test_complement(part):
    layout, whole = part
    rest = algebra.complement(layout, whole)
    sums = [x + y for y in all_by_hand(_tuple(rest)) for x in all_by_hand(layout)]
    assert sorted(sums) == list(range(whole))
    assert all_by_hand(_tuple(rest)) == sorted(all_by_hand(_tuple(rest)))


@QUICKLY
@given(layouts(), parts(), SWIZZLES)
def test_divide(a, part, swizzle):
    tile, whole = part
    a = Layout((*a.shape, -(-whole // algebra.size(a))), (*a.stride, 128), swizzle)
    size = algebra.size(a)
    if size % whole:
        return
    divided = algebra.divide(a, tile)
    rest = all_by_hand(_tuple(algebra.complement(tile, size)))
    expected = [by_hand(a, x + y) for y in rest for x in all_by_hand(tile)]
    assert [algebra.offset(divided, i) for i in range(size)] == expected


@QUICKLY
@given(parts(), permuted(2), SWIZZLES)
def test_product(part, repetitions, swizzle):
    tile = Layout(part[0].shape, part[0].stride, swizzle)
    repeated = algebra.product(tile, repetitions)
    plain = [algebra.offset(algebra.unswizzled(repeated), i) for i in range(algebra.size(repeated))]
    count = algebra.size(tile)
    assert len(plain) == count * algebra.size(repetitions)
    assert plain[:count] == all_by_hand(part[0])
    assert len(set(plain)) == len(plain)  # no repetition lies over another
    for first in range(0, len(plain), count):  # each is the tile, somewhere else
        assert [x - plain[first] for x in plain[first : first + count]] == plain[:count]
    assert repeated.swizzle == swizzle


@QUICKLY
@given(permuted(), st.booleans())
def test_inverse(layout, swizzled):
    size = algebra.size(layout)
    swizzle = (1, 0, 2)
    if swizzled and size % 8 == 0:
        layout = Layout(layout.shape, layout.stride, swizzle)
    found = algebra.inverse(layout)
    assert [by_hand(layout, int(found[offset])) for offset in range(size)] == list(range(size))


def test_inverse_refuses_what_is_no_bijection():
    for layout in (Layout((4, 4), (1, 2)), Layout((4,), (2,))):
        with pytest.raises(ValueError, match="no bijection"):
            algebra.inverse(layout)


def test_notation():
    assert str(Layout((64, (64, 2)), (64, (1, 4096)), (3, 4, 3))) == "Sw<3,4,3> o 0 o (64,(64,2)):(64,(1,4096))"
    assert str(Layout(8, 1)) == "8:1"


def test_coordinates_and_owners_are_inverse():
    tile = (16, 16)
    values = by_modes(tile, ((4, 0, 2), (8, 1, 0)), ((2, 0, 1), (2, 8, 0), (2, 0, 8)))
    rows, columns = algebra.coordinates(values, tile)
    owners = algebra.owners(values, tile)
    for thread in range(32):
        for value in range(8):
            assert owners[rows[thread, value], columns[thread, value]].tolist() == [thread, value]


def test_owners_of_a_hole():
    owners = algebra.owners(by_modes((2, 4), ((2, 1, 0),), ((2, 0, 2),)), (2, 4))
    assert owners[:, :, 0].tolist() == [[0, -1, 0, -1], [1, -1, 1, -1]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("warps", [1, 4])
def test_addresses_of_ldmatrix_from_the_manual(warps, transposed):
    """PTX ISA, ldmatrix: thread 8·j + r points at row r of matrix j; lane l gets elements 2(l mod 4) and one more of
    row l / 4, or, transposed, of column l / 4."""
    tile = (16 * warps, 16)
    values = by_modes(tile, ((4, 0, 2), (8, 1, 0), (warps, 16, 0)), ((2, 0, 1), (2, 8, 0), (2, 0, 8)))
    copy = Copy("ldmatrix.trans" if transposed else "ldmatrix", "Q", tile, values, transposed)
    pointed = algebra.table(algebra.addresses(copy))
    held = algebra.table(values)
    for warp in range(warps):
        for matrix in range(4):
            for lane in range(32):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    if transposed:
                        row, column = column, row
                    source = pointed[32 * warp + 8 * matrix + row, column]
                    assert source == held[32 * warp + lane, 2 * matrix + half]


def _tuple(layout: Layout) -> Layout:
    """With tuples for shape and stride."""
    return layout if isinstance(layout.shape, tuple) else Layout((layout.shape,), (layout.stride,))  # type: ignore[arg-type]
