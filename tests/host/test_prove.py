"""The proofs: what is shipped passes, and for each kind of check something wrong on purpose does not."""

from __future__ import annotations

import builtins
import sys
from dataclasses import FrozenInstanceError, replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pycute")

from cute_attn.layouts import family, for_target, known_targets
from cute_attn.layouts.__main__ import configs, main
from cute_attn.layouts.base import BYTES, KIB, Box, Config, Copy, Layout, by_modes, names, tiled_rows
from cute_attn.layouts.tools import algebra, counts, prove

# Every config with tensors as wide as its tile, which the command proves (test_check_everything), and with narrower ones.
EVERY = configs() + configs(gradients="qkv")
NARROWER = configs(head_dim=192, head_dim_v=128) + configs(head_dim=72) + configs(head_dim=8)
NARROWER += configs(head_dim=192, head_dim_v=128, gradients="qkv") + configs(head_dim=64, head_dim_v=256, gradients="qkv")


def config_of(mechanism: str, head_dim: int = 128, target: str = "sm_90a") -> Config:
    return next(c for c, _ in configs(target, head_dim, dtype="bfloat16") if c.mechanism == mechanism)


def with_(config: Config, **functions) -> ModuleType:
    """The config's family module with some of its functions replaced."""
    found = SimpleNamespace(**vars(family(config)))
    for name, function in functions.items():
        setattr(found, name, function)
    return found  # type: ignore[return-value]


def kinds(findings) -> set[str]:
    return {finding.check for finding in findings}


def with_layout(config: Config, operand: str, change) -> ModuleType:
    honest = family(config).smem
    return with_(config, smem=lambda name, c: change(honest(name, c)) if name == operand else honest(name, c))


def with_copy(config: Config, key: tuple[str, str], **changes) -> ModuleType:
    honest = family(config).copies
    return with_(config, copies=lambda c: {k: replace(v, **changes) if k == key else v for k, v in honest(c).items()})


def of_any(config: Config) -> Config:
    """The config without its target and dtype, on which no layout depends: many have their tables in common."""
    return replace(config, target="", dtype="")


against_dsl, report = prove.against_dsl, prove.report
reports: dict[tuple[Config, int | None], list[prove.Row]] = {}


@pytest.fixture(autouse=True)
def once_each(monkeypatch):
    """Configs whose layouts are the same are proved once in all of these tests, and traced once in each. The DSL's own function
    is asked for fewer indices of each layout than users have it asked for; test_layout_equality.py asks it for all of some."""

    def reported(config: Config, head_dim: int | None = None, family=None) -> list[prove.Row]:
        if isinstance(family, SimpleNamespace):  # something wrong on purpose
            return report(config, head_dim, family)
        key = of_any(config), head_dim
        if key not in reports:
            reports[key] = report(config, head_dim)
        return reports[key]

    def compared(configs: list[Config]) -> list[prove.Finding]:
        return against_dsl(list({of_any(config): config for config in configs}.values()), limit=64)

    monkeypatch.setattr(prove, "report", reported)
    monkeypatch.setattr(prove, "against_dsl", compared)


# ---- what is shipped -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", known_targets())
def test_everything_shipped_holds_for_narrower_tensors(target):
    chosen = [(config, head_dim) for config, head_dim in NARROWER if config.target == target]
    assert {bool(config.backward) for config, _ in chosen} == {False, True}
    for config, head_dim in chosen:
        assert prove.check(config, head_dim) == []


def test_no_layout_depends_on_a_target_or_a_dtype():
    """Those of the same tables are proved once."""
    for config, _ in EVERY:
        lay, other = family(config), of_any(config)
        assert lay.copies(config) == lay.copies(other)
        operands, roles, _ = names(lay)
        for name in operands:
            assert (lay.tile(name, config), lay.smem(name, config)) == (lay.tile(name, other), lay.smem(name, other))
        for role in roles:
            assert lay.mma(role, config) == lay.mma(role, other)


def test_every_step_of_every_operand_is_in_the_report():
    steps = {(row.operand, row.step) for row in prove.report(config_of("cp_async"))}
    assert steps >= {("Q", "in"), ("K", "in"), ("V", "in"), ("Q", "load"), ("K", "load"), ("V", "load")}
    assert steps >= {("O", "store"), ("O", "out"), ("P", "S to P")}
    steps = {(row.operand, row.step) for row in prove.report(config_of("tma_wgmma"))}
    assert steps >= {("Q", "in"), ("K", "in"), ("V", "in"), ("Q", "read"), ("K", "read"), ("V", "read")}
    assert steps >= {("O", "store"), ("O", "out"), ("P", "S to P")}


def test_findings_are_frozen_and_say_what_where_how_many_and_what_to_change():
    config = config_of("cp_async")
    finding = prove.check(config, family=with_layout(config, "K", algebra.unswizzled))[0]
    with pytest.raises(FrozenInstanceError):
        finding.count = 0  # type: ignore[misc]
    assert "sm_90a cp_async d128 bfloat16, K" in finding.where
    assert str(finding.count) in finding.what
    assert "swizzle" in finding.change
    assert str(finding) == f"{finding.where}: {finding.what}: {finding.change}"


# ---- exactly once ----------------------------------------------------------------------------------------------------


def test_threads_that_overlap():
    tile, good = (16, 64), ((8, 0, 8), (16, 1, 0))
    assert prove.once("", by_modes(tile, good, ((8, 0, 1),)), tile) == []
    found = prove.once("here", by_modes(tile, ((8, 0, 4), (16, 1, 0)), ((8, 0, 1),)), tile)
    assert kinds(found) == {"overlap", "hole"}
    overlap = next(f for f in found if f.check == "overlap")
    assert overlap.count == 7 * 4 * 16  # seven neighbours share four columns, in 16 rows
    assert "row 0, column 4" in overlap.what


def test_a_hole():
    found = prove.once("here", by_modes((16, 64), ((8, 0, 8), (8, 1, 0)), ((8, 0, 1),)), (16, 64))
    assert kinds(found) == {"hole"}
    assert found[0].count == 8 * 64
    assert "row 8, column 0" in found[0].what


def test_threads_outside_of_the_tile():
    found = prove.once("here", by_modes((16, 64), ((8, 0, 8), (32, 1, 0)), ((8, 0, 1),)), (16, 64))
    assert "outside" in kinds(found)


def test_a_copy_with_overlapping_threads_is_found_in_a_config():
    config = config_of("cp_async")
    wrong = by_modes((16, 64), ((8, 0, 4), (16, 1, 0)), ((8, 0, 1),))
    found = prove.check(config, family=with_copy(config, ("in", "K"), values=wrong))
    assert kinds(found) == {"overlap", "hole"}
    assert all("K, in" in finding.where for finding in found)


def test_a_tile_that_does_not_divide_the_operand():
    config = config_of("cp_async")
    values = by_modes((48, 64), ((8, 0, 8), (48, 1, 0)), ((8, 0, 1),))
    found = prove.check(config, family=with_copy(config, ("in", "K"), tile=(48, 64), values=values))
    assert kinds(found) == {"hole"}
    assert found[0].count == 16 * 128


def test_a_layout_that_puts_two_elements_in_one_place():
    config = config_of("cp_async")
    found = prove.check(config, family=with_layout(config, "K", lambda x: replace(x, stride=(32, *x.stride[1:]))))
    assert "overlap" in kinds(found)


def test_an_mma_map_that_is_no_bijection():
    config = config_of("cp_async")
    honest = family(config).mma
    wrong = by_modes((64, 16), ((4, 0, 2), (8, 1, 0), (4, 16, 0)), ((2, 0, 1), (2, 8, 0), (2, 0, 4)))
    found = prove.check(config, family=with_(config, mma=lambda role, c: replace(honest(role, c), c=wrong)))
    assert {"overlap", "hole"} <= kinds(found)


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_a_copy_that_forgets_to_transpose_v():
    config = config_of("cp_async")
    found = prove.check(config, family=with_copy(config, ("load", "V"), instruction="ldmatrix"))
    assert {"agreement", "alignment"} <= kinds(found)


def test_a_copy_made_from_another_mma():
    config = config_of("cp_async")
    swapped = by_modes((16, 16), ((4, 0, 2), (8, 1, 0), (4, 0, 0)), ((2, 0, 1), (2, 8, 0), (2, 0, 8)))  # A's values for B
    found = prove.check(config, family=with_copy(config, ("load", "K"), values=swapped))
    assert kinds(found) == {"agreement"}
    assert "K, load" in found[0].where


@pytest.mark.parametrize("mechanism", ["cp_async", "tma_wgmma"])
def test_a_store_in_another_order_than_the_accumulator(mechanism):
    config = config_of(mechanism)
    copy = family(config).copies(config)["store", "O"]
    (threads, values), (by_thread, by_value) = copy.values.shape, copy.values.stride
    swapped = Layout((threads, values), (by_thread, (by_value[0], by_value[2], by_value[1])))
    if values[1] == values[2]:
        assert kinds(prove.check(config, family=with_copy(config, ("store", "O"), values=swapped))) >= {"agreement"}
    else:  # not even a bijection
        assert kinds(prove.check(config, family=with_copy(config, ("store", "O"), values=swapped))) >= {"overlap"}


def test_slots_that_overlap():
    config = config_of("tma_wgmma")
    closer = with_layout(config, "K", lambda x: replace(x, stride=(*x.stride[:2], x.stride[2] // 2)))
    assert "overlap" in kinds(prove.check(config, family=closer))


def test_a_swizzle_that_tears_16_bytes_apart():
    config = config_of("cp_async")
    found = prove.check(config, family=with_layout(config, "Q", lambda x: replace(x, swizzle=(3, 2, 4))))
    assert {"alignment", "agreement"} <= kinds(found)


@pytest.mark.parametrize("operand", ["Q", "K", "V"])
def test_a_layout_that_tma_does_not_leave_behind(operand):
    config = config_of("tma_wgmma")
    found = prove.check(config, family=with_layout(config, operand, lambda x: replace(x, swizzle=(2, 4, 3))))
    assert "agreement" in kinds(found)
    assert all(f", {operand}" in finding.where for finding in found)


@pytest.mark.parametrize("operand", ["Q", "K", "V"])
def test_a_descriptor_that_looks_elsewhere(operand):
    """Rows of 64 bytes and their swizzle, TMA's too, but read with a span of 128 bytes."""
    config = config_of("tma_wgmma")
    module = family(config)
    rows, columns = module.tile(operand, config)
    narrow = tiled_rows((rows, columns, 2), 32, (2, 4, 3), 1)
    box = module.copies(config)["in", operand]
    assert prove.box_findings("", replace(box, columns=32, swizzle_bytes=64), narrow, 1024) == []
    m, n, k = module.mma("O" if operand == "V" else "S", config).shape
    how = m if operand == "Q" else n, k, operand != "V"
    assert prove.tensor_cores_get("", narrow, 64, *how) == []
    assert kinds(prove.tensor_cores_get("", narrow, 128, *how)) == {"agreement"}


def test_products_that_hand_p_over_to_another_thread():
    config = config_of("cp_async")
    honest = family(config).mma
    m = honest("S", config).tile[0]
    crossed = by_modes((m, 16), ((4, 0, 2), (8, 1, 0), (4, 16, 0)), ((2, 0, 1), (2, 0, 8), (2, 8, 0)))
    changed = {"S": {"c": crossed}, "O": {}}
    found = prove.check(config, family=with_(config, mma=lambda role, c: replace(honest(role, c), **changed[role])))
    assert kinds(found) == {"agreement"}


# ---- coalescing ------------------------------------------------------------------------------------------------------


def test_threads_that_go_down_a_column_are_not_coalesced():
    config = config_of("cp_async")
    shape = family(config).tile("K", config)
    down = by_modes((32, 32), ((32, 1, 0), (4, 0, 8)), ((8, 0, 1),))
    found = prove.check(config, family=with_copy(config, ("in", "K"), tile=(32, 32), values=down))
    assert kinds(found) == {"coalescing"}
    counted = counts.sectors(*counts.accesses(Copy("cp.async", "K", (32, 32), down), shape), 128, 128)
    assert counted.asked == 2 * counted.needed  # each 16-byte access takes a sector of its own
    assert counted.needed == 64 * 128 * BYTES // 32


@pytest.mark.parametrize(("head_dim", "pitch"), [(128, 128), (96, 96), (64, 1024), (72, 72), (8, 8)])
def test_sectors_against_enumeration(head_dim, pitch):
    config = config_of("cp_async", head_dim)
    copy = family(config).copies(config)["in", "K"]
    rows, columns = counts.accesses(copy, family(config).tile("K", config))
    asked, needed = 0, set()
    for r, c in zip(rows, columns, strict=True):
        touched = {
            (int(row) * pitch + int(column)) * BYTES // 32
            for row, column in zip(r.ravel(), c.ravel(), strict=True)
            if column < head_dim
        }
        asked += len(touched)
        needed |= touched
    counted = counts.sectors(rows, columns, head_dim, pitch)
    assert (counted.asked, counted.needed) == (asked, len(needed))


# ---- bank conflicts --------------------------------------------------------------------------------------------------


def test_banks_against_enumeration():
    generator = np.random.default_rng(0)
    for elements in (2, 8):
        offsets = generator.integers(0, 256, (20, 32, 1)) * elements + np.arange(elements)
        together = min(32, 128 // (elements * BYTES))
        accesses = 0
        for instruction in offsets:
            for first in range(0, 32, together):
                words = {int(x) * BYTES // 4 for x in instruction[first : first + together].ravel()}
                accesses += max(sum(word % 32 == bank for word in words) for bank in range(32))
        counted = counts.banks(offsets)
        assert (counted.instructions, counted.accesses, counted.least) == (20, accesses, 20 * 32 // together)


@pytest.mark.parametrize(("head_dim", "pitch"), [(64, 64), (64, 512), (96, 96), (72, 72), (8, 8)])
def test_cp_async_against_enumeration(head_dim, pitch):
    """A line of 128 bytes after the other; within it, threads whose banks are taken wait for the next turn."""
    generator = np.random.default_rng(head_dim + pitch)
    rows = np.broadcast_to(generator.integers(0, 16, (20, 32, 1)), (20, 32, 8))
    columns = generator.integers(0, 12, (20, 32, 1)) * 8 + np.arange(8)
    offsets = generator.integers(0, 256, (20, 32, 1)) * 8 + np.arange(8)
    accesses, lines, asked = 0, 0, 0
    for r, c, o in zip(rows[..., 0], columns[..., 0], offsets[..., 0], strict=True):
        turns: dict[object, list[tuple[set, set]]] = {}  # by line: the slots and the sectors of each turn
        for thread in range(32):
            byte = (int(r[thread]) * pitch + int(c[thread])) * BYTES
            inside = c[thread] < head_dim
            mine = turns.setdefault(byte // 128 if inside else ("zeros", thread // 8), [])
            slot = int(o[thread]) * BYTES // 16 % 8
            free = next((i for i, (slots, _) in enumerate(mine) if slot not in slots), len(mine))
            if free == len(mine):
                mine.append((set(), set()))
            mine[free][0].add(slot)
            mine[free][1].update({byte // 32} if inside else ())
        lines += len(turns)
        accesses += sum(len(mine) for mine in turns.values())
        asked += sum(len(sectors) for mine in turns.values() for _, sectors in mine)
    banks, sectors = counts.by_line(rows, columns, offsets, head_dim, pitch)
    assert (banks.instructions, banks.accesses, banks.least) == (20, accesses, lines)
    assert sectors.asked == asked


def test_cp_async_of_rows_narrower_than_a_line():
    """As counted on an H200 at head dim 96: 4 threads on 64 bytes of a row, each row in a line of its own."""
    config = config_of("cp_async", 96)
    copy, layout = family(config).copies(config)["in", "Q"], family(config).smem("Q", config)
    banks, sectors = counts.of_copy(copy, layout, (128, 96), 96, 96)
    assert (banks.instructions, banks.accesses, banks.conflicts, sectors.asked) == (48, 384, 0, 768)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cp_async_that_conflicts_asks_for_its_sectors_again(head_dim):
    config = config_of("cp_async", head_dim)
    columns = Layout((64, (8, head_dim // 8), 1), (8, (1, 8 * 64), 64 * head_dim))
    copy = family(config).copies(config)["in", "K"]
    banks, sectors = counts.of_copy(copy, columns, (64, head_dim), head_dim, head_dim)
    assert banks.conflicts == 7 * banks.least
    assert sectors.asked == 2 * sectors.needed  # of two threads that share a sector, each asks for it
    found = prove.check(config, family=with_layout(config, "K", lambda x: replace(x, swizzle=None, **columns_of(x))))
    assert "bank conflicts" in {finding.check for finding in found if "K, in" in finding.where}


def columns_of(layout: Layout) -> dict:
    """Shape and strides with the units of 16 bytes of all rows one after the other."""
    rows, wide, slots = layout.shape[0], algebra.size(Layout(layout.shape[1], layout.stride[1])), layout.shape[2]
    return {"shape": (rows, (8, wide // 8), slots), "stride": (8, (1, 8 * rows), rows * wide)}


@pytest.mark.parametrize(
    ("step", "operand", "conflicts"), [("load", "Q", 7 * 256), ("load", "K", 7 * 512), ("load", "V", 7 * 512)]
)
def test_rows_without_a_swizzle_conflict_eightfold(step, operand, conflicts):
    """8 rows of 128 bytes begin in the same bank: each phase of ldmatrix takes 8 accesses."""
    config = config_of("cp_async")
    found = prove.check(config, family=with_layout(config, operand, algebra.unswizzled))
    mine = [finding for finding in found if f"{operand}, {step}" in finding.where]
    assert kinds(found) == {"bank conflicts"}
    assert [finding.count for finding in mine] == [conflicts]


@pytest.mark.parametrize("mechanism", ["cp_async", "tma_wgmma"])
def test_stores_of_an_unswizzled_o_conflict(mechanism):
    config = config_of(mechanism)
    found = prove.check(config, family=with_layout(config, "O", algebra.unswizzled))
    assert "bank conflicts" in {finding.check for finding in found if "O, store" in finding.where}


def test_a_swizzle_too_narrow_conflicts_less():
    config = config_of("cp_async")
    found = prove.check(config, family=with_layout(config, "Q", lambda x: replace(x, swizzle=(2, 3, 3))))
    assert [(f.check, f.count) for f in found] == [("bank conflicts", 256)]  # two rows of eight share a group


# ---- TMA and WGMMA ---------------------------------------------------------------------------------------------------


def test_a_box_too_wide():
    layout = tiled_rows((64, 128), 128, (3, 4, 3), 1)
    found = prove.box_findings("here", Box("Q", 64, 128, 128), layout, 1024)
    assert kinds(found) == {"TMA box"}
    assert found[0].count == 128  # bytes past the span
    found = prove.box_findings("here", Box("Q", 320, 64, 128), tiled_rows((320, 64), 64, (3, 4, 3), 1), 1024)
    assert "at most 256" in found[0].what
    assert found[0].count == 64


def test_a_box_row_of_odd_bytes_a_wrong_span_and_a_wrong_alignment():
    layout = tiled_rows((64, 64), 64, (3, 4, 3), 1)
    assert "multiple of 16" in prove.box_findings("", Box("Q", 64, 60, 128), layout, 1024)[0].what
    assert "0, 32, 64, 128" in prove.box_findings("", Box("Q", 64, 64, 96), layout, 1024)[0].what
    assert "needs 1024" in prove.box_findings("", Box("Q", 64, 64, 128), layout, 128)[0].what
    assert prove.box_findings("", Box("Q", 64, 64, 128), layout, 1024) == []


def test_boxes_that_do_not_begin_at_the_swizzle_pattern():
    layout = tiled_rows((60, 128), 64, (3, 4, 3), 1)
    found = prove.box_findings("", Box("K", 60, 64, 128), layout, 1024)
    assert "multiple of 1024" in found[0].what


def test_wgmma_without_a_swizzle_and_with_keys_that_are_no_multiple_of_16():
    config = config_of("tma_wgmma")
    _, n, k = family(config).mma("O", config).shape
    found = prove.tensor_cores_get("", family(config).smem("V", config), 0, n, k, k_major=False)
    assert kinds(found) == {"WGMMA"}
    odd = tiled_rows((72, 128), 64, (3, 4, 3), 1)
    assert "no multiple of the 16" in prove.tensor_cores_get("", odd, 128, n, k, k_major=False)[0].what


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mechanism", "changes", "resource"),
    [
        ("tma_wgmma", {"stages": 4}, "shared memory"),
        ("cp_async", {"blocks_per_multiprocessor": 3}, "shared memory"),
        ("tma_wgmma", {"mma_registers": 248}, "registers"),
        ("cp_async", {"tile_m": 256}, "registers"),
        ("cp_async", {"mma_warps": 64, "tile_m": 1024, "blocks_per_multiprocessor": 1}, "threads"),
    ],
)
def test_a_budget_overrun(mechanism, changes, resource):
    config = replace(config_of(mechanism), **changes)
    found = prove.budget_findings(config, for_target(config.target).GPU, family(config))
    assert kinds(found) == {"budget"}
    mine = [finding for finding in found if finding.what.startswith(resource)]
    assert mine
    assert all(str(finding.count) in finding.what for finding in mine)


def test_too_many_barriers_and_registers_that_setmaxnreg_refuses():
    config = config_of("tma_wgmma")
    gpu = for_target(config.target).GPU
    found = prove.budget_findings(config, gpu, with_(config, barriers=lambda c: {"turns": 20}))
    assert [(f.check, f.count) for f in found] == [("budget", 4)]
    found = prove.budget_findings(replace(config, copy_registers=20), gpu, family(config))
    assert "multiples of 8" in found[0].what


def test_smem_parts_that_forget_a_stage():
    config = config_of("cp_async")
    honest = family(config).smem_parts
    found = prove.check(config, family=with_(config, smem_parts=lambda c: honest(c) | {"K": honest(c)["K"] // 2}))
    assert [(f.check, f.count) for f in found] == [("outside", 16 * KIB)]


def test_the_budget_adds_up():
    for config, _ in EVERY:
        module, gpu = family(config), for_target(config.target).GPU
        lines = prove.budget(config, gpu, module)
        shared = [line for line in lines if line.resource == "shared memory"]
        assert sum(line.amount for line in shared if line.limit is None) == module.smem_bytes(config)
        assert all(line.amount <= line.limit for line in lines if line.limit is not None)


# ---- the backward pass -------------------------------------------------------------------------------------------------


def backward_config(mainloop: str, head_dim: int = 128, target: str = "sm_90a") -> Config:
    return next(c for c, _ in configs(target, head_dim, dtype="bfloat16", gradients="qkv") if c.backward == mainloop)


def test_every_backward_mainloop_is_proved():
    backward = [config for config, _ in EVERY if config.backward]
    assert {config.backward for config in backward} == {"cp_async_backward", "tma_wgmma_backward", "tma_wgmma_wide"}
    assert {config.target for config in backward} == set(known_targets())
    assert any(config.results_from_registers for config in backward), "which no heads of one width have"


@pytest.mark.parametrize("mainloop", ["cp_async_backward", "tma_wgmma_backward"])
def test_every_product_of_the_backward_pass_is_in_the_report(mainloop):
    steps = {(row.operand, row.step) for row in prove.report(backward_config(mainloop))}
    assert steps >= {(role, "product") for role in ("S", "dP", "dV", "dK", "dQ")}
    read = "load" if mainloop == "cp_async_backward" else "read"
    assert steps >= {("K", f"{read} S"), ("Q", f"{read} S"), ("dO", f"{read} dV"), ("Q", f"{read} dK")}
    assert steps >= {("dS", f"{read} dQ"), ("K", f"{read} dQ"), ("dS", "store"), ("dK", "out"), ("dV", "out")}


@pytest.mark.parametrize(
    ("mainloop", "operand"),
    [
        *[(mainloop, name) for mainloop in ("cp_async_backward", "tma_wgmma_backward") for name in ("K", "dO", "dV")],
        *[("tma_wgmma_wide", name) for name in ("K", "dO")],
    ],
)
def test_an_operand_without_a_swizzle(mainloop, operand):
    config = backward_config(mainloop, 256 if mainloop == "tma_wgmma_wide" else 128)
    found = prove.check(config, family=with_layout(config, operand, algebra.unswizzled))
    assert kinds(found) & {"bank conflicts", "WGMMA", "agreement"}
    assert all(f", {operand}" in finding.where for finding in found)


@pytest.mark.parametrize(("step", "operand"), [("load dV", "dO"), ("load dQ", "dS"), ("load dQ", "K")])
def test_a_copy_that_forgets_to_transpose_in_the_backward_pass(step, operand):
    config = backward_config("cp_async_backward", 64)
    found = prove.check(config, family=with_copy(config, (step, operand), instruction="ldmatrix"))
    assert {"agreement", "alignment"} <= kinds(found)


@pytest.mark.parametrize(
    ("mainloop", "head_dim", "scores", "products"),
    [
        ("cp_async_backward", 64, "S", {"dV", "dK"}),
        ("tma_wgmma_backward", 128, "S", {"dV", "dK"}),
        ("tma_wgmma_wide", 256, "S", {"dV", "dK"}),
        ("tma_wgmma_wide", 256, "qS", {"dQ"}),
    ],
)
def test_scores_that_are_not_the_operand(mainloop, head_dim, scores, products):
    """Those of rows in another order than the products take them from registers."""
    config = backward_config(mainloop, head_dim)
    honest = family(config).mma

    def upside_down(role, c):
        mma = honest(role, c)
        threads, values = mma.c.shape[0], mma.c.shape[1]
        stride = (tuple(reversed(mma.c.stride[0])), mma.c.stride[1])
        return replace(mma, c=Layout((tuple(reversed(threads)), values), stride)) if role == scores else mma

    found = prove.check(config, family=with_(config, mma=upside_down))
    of_products = [finding for finding in found if "scores lie in another thread" in finding.what]
    assert {finding.where.rsplit(", ", 1)[1] for finding in of_products} == products


def test_gradients_lie_where_there_is_room():
    config = backward_config("cp_async_backward")
    parts = family(config).smem_parts
    short = with_(config, smem_parts=lambda c: {**parts(c), "V": parts(c)["V"] - 2})
    found = prove.check(config, family=short)
    assert {finding.where.rsplit(", ", 1)[1] for finding in found} == {"V", "dV"}


# ---- the command line ------------------------------------------------------------------------------------------------


def test_check_one_config(capsys):
    assert main(["check", "sm_80", "--head-dim", "96", "--dtype", "float16"]) == 0
    said = capsys.readouterr().out
    assert "Sw<2,3,3> o 0 o" in said
    assert "what takes what" in said
    assert "2 configs, 46 steps: everything holds" in said  # one of each pass


def test_one_arch_and_head_dim_is_shown_step_by_step(capsys):
    """Both passes and every mechanism; dtypes whose report is the same share it."""
    assert main(["check", "sm_90a", "--head-dim", "128"]) == 0
    said = capsys.readouterr().out
    for mainloop in ("tma_wgmma", "cp_async", "tma_wgmma_backward", "cp_async_backward"):
        title = f"sm_90a {mainloop} d128 float16 and bfloat16"
        assert said.count(f"{title} ") == said.count(f"{title}: what takes what") == 1
    assert said.count("sm_90a tma_wgmma_backward d128 80×128 float16 and bfloat16") == 2
    assert "10 configs, 252 steps: everything holds" in said
    assert main(["check", "sm_90a", "--head-dim", "64"]) == 0
    assert capsys.readouterr().out.count("sm_90a tma_wgmma_backward d64 2 stages of dQ float16 and bfloat16") == 2


@pytest.mark.parametrize(
    ("head_dim", "operand", "configs_steps"),
    [(128, "dO", "6 configs, "), (128, "dS", "6 configs, "), (128, "O", "4 configs, "), (256, "qQ", "2 configs, ")],
)
def test_an_operand_of_either_pass(capsys, head_dim, operand, configs_steps):
    assert main(["check", "sm_90a", "--head-dim", str(head_dim), "--operand", operand]) == 0
    said = capsys.readouterr().out
    assert f"│ {operand} " in said
    assert configs_steps in said
    assert "what takes what" not in said


def test_the_operands_are_those_of_the_report():
    for config, head_dim in configs("sm_90a") + configs("sm_90a", gradients="qkv"):
        assert set(prove.operands(config)) == {row.operand for row in prove.report(config, head_dim)}


def test_check_everything(capsys):
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    for target in known_targets():
        assert target in said
    assert said.splitlines()[-1].startswith(f"{len(EVERY)} configs, ")
    assert ("left out" in said) == (find_spec("cutlass") is None)  # the comparison with the DSL's own layouts
    assert said.splitlines()[-1].endswith("everything holds")


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["sm_91"], "sm_90a"),
        (["--head-dim", "100"], "a multiple of 8"),
        (["--head-dim", "512"], "256"),
        (["--head-dim-v", "-8"], "a multiple of 8"),
        (["--dtype", "float8"], "bfloat16"),
        (["sm_80", "--operand", "X"], "known ones are Q, K, V, O, P, dO, dS, dK, dV, S, dP, dQ"),
        (["sm_90a", "--head-dim", "128", "--operand", "qQ"], "known ones are Q, K, V, O, P, dO, dS"),
    ],
)
def test_unknown_names_get_the_known_ones(capsys, arguments, known):
    with pytest.raises(SystemExit) as caught:
        main(["check", *arguments])
    assert caught.value.code == 2
    assert known in capsys.readouterr().err


def test_a_finding_makes_the_exit_status_1(capsys, monkeypatch):
    module = family(config_of("cp_async"))
    honest = module.smem
    monkeypatch.setattr(module, "smem", lambda operand, c: algebra.unswizzled(honest(operand, c)))
    assert main(["check", "sm_80", "--head-dim", "128", "--dtype", "bfloat16", "--operand", "K"]) == 1
    said = capsys.readouterr().out
    assert "3584 bank conflicts in 128 instructions" in said
    assert "1 finding" in said


def test_without_the_dsl_it_says_what_it_left_out(capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == "cutlass":
            raise ImportError("No module named 'cutlass'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.split(".")[0] == "cutlass"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["check", "sm_80", "--head-dim", "64", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "left out: the DSL's layouts against these" in said
    assert "everything holds" in said


def test_layouts_are_plain_data():
    config = config_of("tma_wgmma")
    layout = family(config).smem("K", config)
    assert layout == Layout((128, (64, 2), 2), (64, (1, 8192), 16384), (3, 4, 3), 1)
    assert hash(layout) == hash(family(config).smem("K", config))
