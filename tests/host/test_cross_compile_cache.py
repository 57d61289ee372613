"""The kernels of attention to a cache, compiled for GPUs that need not be there."""

from dataclasses import replace

import pytest

pytest.importorskip("cutlass.cute")

from cute_attn import cubin
from cute_attn.layouts import family, for_target, mma_sync_cache
from cute_attn.layouts.tools import algebra
from cute_attn.plan import plan
from cute_attn.problem import Problem

PAGED = {"stored": "page_table", "bounded_right": True}
# Registers that don't fit, of those that hold what a part of a walk is made of: none is needed for a tile of keys.
SPILLED_MOST = {16: 0, 32: 16, 64: 32}


@pytest.mark.parametrize("target", ["sm_90a", "sm_80", "sm_86"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (32, 256), (8, 40)], ids=str)
@pytest.mark.parametrize("rows", mma_sync_cache.ROWS)
def test_every_config_fits(rows, dims, target):
    """Which the plan looks at; and each group's keys are whole instructions."""
    config = plan(Problem("bfloat16", *dims, rows=rows), target)
    lay = family(config)
    assert config.tile_m == rows
    assert config.mma_warps == config.key_warps * lay.row_warps(config)
    assert lay.smem_bytes(config) <= for_target(target).GPU.smem_per_block
    assert config.cache == ("wgmma_cache" if rows == 64 and target == "sm_90a" else "cp_async_cache")


@pytest.mark.parametrize(
    ("problem", "target"),
    [
        (Problem("bfloat16", 128, 128, rows=16), "sm_90a"),
        (Problem("bfloat16", 128, 128, rows=32, **PAGED), "sm_90a"),
        (Problem("float16", 128, 128, rows=64, return_lse=True, invariant=True), "sm_90a"),
        (Problem("bfloat16", 128, 128, rows=64, **PAGED), "sm_80"),
    ],
    ids=["decode", "pages", "many rows", "Ampere"],
)
def test_registers(problem, target):
    config = plan(problem, target)
    code = cubin.inspect(problem, config)
    assert code.spill_stores <= SPILLED_MOST[problem.rows]
    assert code.count("LDGSTS")
    assert code.count("HGMMA" if config.cache == "wgmma_cache" else "HMMA")


@pytest.mark.parametrize("dims", [(64, 64), (96, 32), (96, 96), (128, 128)], ids=str)
def test_blocks_that_share_walks_read_one_anothers_memory(dims):
    """Where partial results are of many rows, and not where results must not depend on how walks are cut."""
    problem = Problem("bfloat16", *dims, rows=64)
    config, invariant = plan(problem, "sm_90a"), plan(replace(problem, invariant=True), "sm_90a")
    assert (config.walk_blocks, invariant.walk_blocks) == (2, 1)
    assert plan(problem, "sm_80").walk_blocks == 1
    for changed in (replace(config, walk_blocks=4), replace(plan(problem, "sm_80"), walk_blocks=2)):
        assert "try 1" in family(changed).misfit(changed)
    if dims == (128, 128):
        code = cubin.inspect(problem, config)
        assert code.count("UCGABAR_ARV") == 2
        assert not code.spill_stores


def test_new_keys():
    problem = Problem("bfloat16", 128, 128, stored="page_table rotary_begin", appends="halves")
    code = cubin.inspect(problem, plan(problem, "sm_90a"))
    assert not code.local_bytes
    assert code.registers <= 64


@pytest.mark.parametrize("target", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (32, 256)], ids=str)
@pytest.mark.parametrize("rows", mma_sync_cache.ROWS)
def test_every_place_of_the_ring_is_of_one_element(rows, dims, target):
    config = plan(Problem("bfloat16", *dims, rows=rows), target)
    lay, taken = family(config), set()
    for operand, first in (("K", 0), ("V", config.tile_n * config.tile_d)):
        layout = lay.smem(operand, config)
        keys, columns = layout.shape[0], config.tile_d if operand == "K" else config.tile_dv
        assert layout.shape[2] == (config.key_warps, config.stages)
        assert keys * config.key_warps == config.tile_n
        here = {first + offset for offset in algebra.table(layout).flat}
        assert len(here) == keys * columns * config.key_warps * config.stages
        assert not here & taken
        taken |= here
    assert taken == set(range(config.stages * config.tile_n * (config.tile_d + config.tile_dv)))
