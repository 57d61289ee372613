"""Layouts as functions on the host, against brute-force enumeration."""

from __future__ import annotations

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
@given(layouts(), st.none() | SWIZZLES, st.sampled_from((1, 2)))
def test_offsets(layout, swizzle, unit_bytes):
    layout = Layout(layout.shape, layout.stride, swizzle, unit_bytes)
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
