"""Layouts of attention to a cache where a tile has 64 rows and there is warpgroup MMA: groups are warpgroups.

Operands lie in shared memory as in ``wgmma``, and threads copy them there as in ``mma_sync``: both are rows of 64 elements with
the same swizzle. The tensor cores read K and V once for all rows, where warps that load fragments read them once each.

Where a block has two groups, two blocks are a cluster: with partial results of so many rows, a walk that both have a half of
ends sooner if they merge it over shared memory than by way of global memory.
"""

from __future__ import annotations

from dataclasses import replace

from . import mma_sync, mma_sync_cache, wgmma
from .base import Config, Gpu, Layout, cute_layout, element
from .mma_sync_cache import barriers, exchanged_columns, group, of_group, row_warps, smem_bytes, smem_parts, too_many_keys
from .tma import ROWS_PER_WARPGROUP

TILE_DIMS, tile_dim, SMEM_ALIGN = wgmma.TILE_DIMS, wgmma.tile_dim, wgmma.SMEM_ALIGN
OF_ROW, ROWS = mma_sync_cache.OF_ROW, mma_sync_cache.ROWS
TILE_STEPS, END_STEPS = 1, 0  # blocks have few walks; where two share one, its end is the same for both
WARPS_PER_WARPGROUP = 4


def configs(problem, gpu: Gpu, target: str) -> tuple[Config, ...]:
    """The configuration for ``problem``: one block of two groups a multiprocessor if there is memory for two tiles on their
    way, or two blocks, or one of one group. None for fewer rows, which ``mma_sync_cache`` serves."""
    if problem.rows != ROWS_PER_WARPGROUP:
        return ()
    choices = (1, 2, 128, 3), (2, 1, 64, 2), (2, 1, 32, 2), (1, 1, 64, 2), (1, 1, 32, 2)
    dims = {"tile_d": tile_dim(problem.head_dim), "tile_dv": tile_dim(problem.head_dim_v)}
    config = mma_sync_cache.fitting(problem, gpu, WARPS_PER_WARPGROUP, choices, target=target, cache="wgmma_cache", **dims)
    if can_share_walks(config) and not problem.invariant:
        config = replace(config, walk_blocks=2)
    return (config,)


def can_share_walks(config: Config) -> bool:
    """Whether two blocks may be a cluster: each has two groups, which exchange all columns at once."""
    return config.key_warps == 2 and exchanged_columns(config) == config.tile_dv


def misfit(config: Config) -> str:
    """What the kernel can't do."""
    if config.walk_blocks not in ((1, 2) if can_share_walks(config) else (1,)):
        return f"walk_blocks={config.walk_blocks}: try 1; 2 take two groups in a block, which exchange all columns at once"
    return too_many_keys(config) or wgmma.misfit(group(config)) or mma_sync.misfit(group(config))


def smem(operand: str, config: Config) -> Layout:
    """An operand in shared memory: Q ``(64, columns, place)``, K and V ``(keys of a group, columns, (group, stage))``; the V of
    a stage is behind its K."""
    return mma_sync_cache.in_slots(operand, wgmma.smem(operand, group(config)), config)


def smem_layout(operand: str, config: Config):
    """:func:`smem` as the DSL's object."""
    return cute_layout(smem(operand, config))


# A group is a block of ``wgmma``, or where operands are copied of ``mma_sync``; blocks are as in ``mma_sync_cache``.
accumulator_registers, tiled_mma = of_group(wgmma.accumulator_registers), of_group(wgmma.tiled_mma)
tile, copies, copy_in = mma_sync_cache.tile, mma_sync_cache.copies, mma_sync_cache.copy_in
__all__ = ["barriers", "element", "exchanged_columns", "group", "row_warps", "smem_bytes", "smem_parts"]
