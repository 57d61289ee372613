"""The picture of shared memory: bank groups worked out by hand, then against the layout that the kernel really gets."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from cute_attn import layouts, machine
from cute_attn.layouts.base import BYTES, Config
from cute_attn.layouts.tools import draw
from cute_attn.plan import plan
from cute_attn.problem import Problem

pytest.importorskip("pycute")

NARROW, WIDE = 96, 128  # head dims whose tiles have rows of 64 and of 128 bytes
KINDS = [("sm_90a", "tma_wgmma"), ("sm_80", "cp_async")]


def config(target: str, mechanism: str, head_dim: int) -> Config:
    return plan(Problem("bfloat16", head_dim, head_dim), target, mechanism)


@pytest.mark.parametrize(("target", "mechanism"), KINDS)
def test_rows_of_128_bytes_by_hand(target, mechanism):
    """8 chunks a row, one row a turn of the banks: the swizzle is chunk xor row."""
    groups = draw.bank_groups("K", config(target, mechanism, WIDE), rows=16)
    assert groups == [[(chunk % 8) ^ (row % 8) for chunk in range(16)] for row in range(16)]


@pytest.mark.parametrize(("target", "mechanism"), KINDS)
def test_rows_of_64_bytes_by_hand(target, mechanism):
    """4 chunks a row, two rows a turn of the banks: the swizzle is chunk xor half the row's number."""
    groups = draw.bank_groups("K", config(target, mechanism, NARROW), rows=16)
    assert groups == [[4 * (row % 2) + ((chunk % 4) ^ (row // 2 % 4)) for chunk in range(12)] for row in range(16)]


@pytest.mark.parametrize(("target", "mechanism"), KINDS)
def test_without_the_swizzle_by_hand(target, mechanism):
    wide = draw.bank_groups("K", config(target, mechanism, WIDE), swizzled=False)
    narrow = draw.bank_groups("K", config(target, mechanism, NARROW), swizzled=False)
    assert wide == [[chunk % 8 for chunk in range(16)] for _ in range(8)]
    assert narrow == [[4 * (row % 2) + chunk % 4 for chunk in range(12)] for row in range(8)]
    assert draw.serial_accesses(wide) == 8
    assert draw.serial_accesses(narrow) == 4


@pytest.mark.parametrize("target", layouts.known_targets())
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_no_operand_of_a_shipped_config_has_a_conflict(target, head_dim):
    for mechanism, operand in product(layouts.for_target(target).MECHANISMS, "QKVO"):
        assert draw.serial_accesses(draw.bank_groups(operand, config(target, mechanism, head_dim), rows=16)) == 1


@pytest.mark.skipif(bool(machine.missing()), reason=f"{machine.missing()} not installed")
@pytest.mark.parametrize(("target", "mechanism"), KINDS)
@pytest.mark.parametrize("head_dim", [NARROW, WIDE])
def test_the_kernels_layout_is_the_one_drawn(target, mechanism, head_dim):
    from cutlass import cute

    chosen, rows = config(target, mechanism, head_dim), 16
    addresses = []

    def evaluate():
        layout = layouts.family(chosen).smem_layout("K", chosen)
        for row, column in product(range(rows), range(0, head_dim, 8)):
            if mechanism == "tma_wgmma":  # its swizzle goes into the pointer, where it acts on bytes
                bits = {NARROW: 2, WIDE: 3}[head_dim]
                plain = layout.outer((row, column, 0)) * BYTES
                addresses.append(plain ^ (plain >> 3 & (2**bits - 1) << 4))
            else:
                addresses.append(layout((row, column, 0)) * BYTES)

    @cute.jit
    def trace():
        evaluate()

    trace()
    drawn = [group for row in draw.bank_groups("K", chosen, rows) for group in row]
    assert [address // draw.CHUNK_BYTES % draw.GROUPS for address in addresses] == drawn


def test_serial_accesses_takes_the_worst_column():
    groups = [[i, 0] for i in range(8)]
    assert draw.serial_accesses(groups) == 8
    assert draw.serial_accesses([[i, i ^ 1] for i in range(8)]) == 1
    assert draw.serial_accesses([[i, i // 2] for i in range(8)]) == 2


def test_picture():
    text = draw.picture("K", config("sm_90a", "tma_wgmma", 64)).plain.splitlines()
    assert "K: 128 × 64 bfloat16, rows of 128 bytes" in text[0]
    assert text[1].split() == ["column", *(str(8 * chunk) for chunk in range(8))]
    assert text[2].split() == ["row", "0", "0", "4", "8", "12", "16", "20", "24", "28"]
    assert text[3].split() == ["row", "1", "4", "0", "12", "8", "20", "16", "28", "24"]
    assert text[10] == "8 chunks below each other take 1 access; unswizzled, 8 accesses"
    assert len(text) == 11


def test_a_wide_tile_is_cut_at_the_right():
    text = draw.picture("V", config("sm_80", "cp_async", 256), rows=4).plain.splitlines()
    assert text[1].endswith("120 … 248")
    assert len(text[2].split()) == 2 + draw.CHUNKS_SHOWN
    assert len(text) == 6


def test_a_cell_has_its_groups_colour():
    text = draw.picture("K", config("sm_90a", "tma_wgmma", 64))
    seen = Counter(str(span.style) for span in text.spans if "on #" in str(span.style))
    assert seen == {f"{text} on {background}": 8 for background, text in draw.PALETTE}
    assert len({background for background, _ in draw.PALETTE}) == draw.GROUPS
    assert "28–31" in draw.legend().plain


@pytest.mark.parametrize("rows", [0, 129])
def test_rows_that_are_not_there(rows):
    with pytest.raises(ValueError, match=rf"rows is {rows}; 1 … 128 is needed"):
        draw.bank_groups("K", config("sm_90a", "tma_wgmma", 64), rows)
