"""Layouts of attention to a cache: a block's warps in groups, each a small block of ``mma_sync`` with keys of its own.

Few query rows, of which there is one tile, meet many keys. So the warps of a block split the keys of a tile among ``key_warps``
groups; each group copies its own keys into a ring of its own and computes with them by itself, and what they found is merged
where a sequence's keys, or the block's part of them, end. The warps of a group split the rows; a group of one warp waits for
nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from . import base, mma_sync
from .base import BANKS, BYTES, SMEM_RESERVED, WARP, Config, Gpu, Layout, element

TILE_DIMS, tile_dim, SMEM_ALIGN = mma_sync.TILE_DIMS, mma_sync.tile_dim, mma_sync.SMEM_ALIGN
ROWS = (16, 32, 64)  # of a tile: what problems may ask for
WIDE_ROWS_UP_TO = 128  # columns of V up to which the registers of a warp hold O of 32 rows
STAGES_MAX = 6
FLOAT = 4  # bytes
NUMBER = 4  # bytes of a page's
QUERIES = 2  # tiles of them in shared memory: those of a part of a walk, and of the next one
OF_ROW = 2  # floats beside a partial row of O: its maximum and its sum
PIECE = 4  # columns of a row of O that a thread merges at a time, of those that its quad has
PIECE_COLUMNS = PIECE * 4
TILE_STEPS, END_STEPS = 8, 3  # of the line that blocks share: the end of a walk takes about a third of a tile's time


def configs(problem, gpu: Gpu, target: str) -> tuple[Config, ...]:
    """The configuration for ``problem``: one block a multiprocessor, whose parts of walks are the longest, if there is memory
    for two tiles on their way, or two, or one with fewer warps."""
    tile_d, tile_dv = tile_dim(problem.head_dim), tile_dim(problem.head_dim_v)
    rows_of_warp = 32 if problem.rows > 16 and tile_dv <= WIDE_ROWS_UP_TO else 16
    rows = problem.rows // rows_of_warp
    groups = 4 // rows
    fewest = max(groups // 2, 1)
    choices = (1, 2 * groups, 128, 3), (2, groups, 64, 2), (1, groups, 64, 2), (1, fewest, 32, 2), (1, 1, 16, 2)
    return (fitting(problem, gpu, rows, choices, target=target, tile_d=tile_d, tile_dv=tile_dv, cache="cp_async_cache"),)


def fitting(problem, gpu: Gpu, warps: int, choices: tuple[tuple[int, int, int, int], ...], **fields: Any) -> Config:
    """Of ``choices``, (blocks a multiprocessor, groups of so many ``warps``, keys a tile, stages at least), the first that
    there is memory for, or the last, with as many stages as there is memory for."""
    for (blocks, groups, tile_n, least), stages in product(choices, range(STAGES_MAX, 1, -1)):
        config = Config(
            mechanism="cp_async",
            dtype=problem.dtype,
            tile_m=problem.rows,
            tile_n=tile_n,
            stages=stages,
            mma_warps=warps * groups,
            blocks_per_multiprocessor=blocks,
            key_warps=groups,
            page_numbers="page_table" in problem.stored,
            **fields,
        )
        room = min(gpu.smem_per_block, gpu.smem_per_multiprocessor // blocks - SMEM_RESERVED)
        if stages >= least and smem_bytes(config) <= room:
            break
    return config


def row_warps(config: Config) -> int:
    """Warps of a group."""
    return config.mma_warps // config.key_warps


def group(config: Config) -> Config:
    """A group of warps as a block of ``mma_sync``."""
    return replace(config, mma_warps=row_warps(config), tile_n=config.tile_n // config.key_warps, key_warps=0, cache="")


def exchanged_columns(config: Config) -> int:
    """Columns of O that all groups put into shared memory at a time: as many as there is room for in a stage of K and V."""
    row = config.key_warps * config.tile_m * FLOAT
    fits = _stage_bytes(config) // row
    return next((n for n in range(config.tile_dv, 0, -BANKS) if n <= fits and config.tile_dv % n == 0), BANKS)


def columns_written(head_dim_v: int) -> int:
    """Floats of a partial row of O: whole pieces of all threads of a quad."""
    return -(-head_dim_v // PIECE_COLUMNS) * PIECE_COLUMNS


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. What the groups found of O lies over a stage of K and V that is free then, or where that
    is too small in a place of its own, ``merged``; ``rows`` are maxima and sums that go with it. ``numbers`` are those of the
    pages of each stage's keys; where they are, the ``word`` lies over ``rows``."""
    of_columns = config.key_warps * config.tile_m * FLOAT
    of_o = of_columns * exchanged_columns(config)
    return {
        "Q": QUERIES * config.tile_m * config.tile_d * BYTES,
        "K": config.stages * config.tile_n * config.tile_d * BYTES,
        "V": config.stages * config.tile_n * config.tile_dv * BYTES,
        "merged": of_o if of_o > _stage_bytes(config) else 0,
        "rows": of_columns * OF_ROW,
        "word": 0 if config.page_numbers else 16,
        "numbers": NUMBER * config.stages * config.tile_n if config.page_numbers else 0,
    }


def _stage_bytes(config: Config) -> int:
    return config.tile_n * (config.tile_d + config.tile_dv) * BYTES


def smem_bytes(config: Config) -> int:
    """Shared memory of a block."""
    return sum(smem_parts(config).values())


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1} | ({"a group each": config.key_warps} if row_warps(config) > 1 else {})


def misfit(config: Config) -> str:
    """What the kernel can't do."""
    warps, groups = config.mma_warps, config.key_warps
    uneven = not groups or warps % groups > 0
    if uneven:
        return f"{groups} groups of {warps} warps: try key_warps=1, 2 or 4"
    if config.walk_blocks != 1:
        return f"walk_blocks={config.walk_blocks}: only blocks of wgmma_cache share walks, try 1"
    return too_many_keys(config) or mma_sync.misfit(group(config))


def too_many_keys(config: Config) -> str:
    """Whether a warp copies more keys of a tile than it has lanes, each of which asks for the number of one's page."""
    most = WARP * config.mma_warps
    return f"{config.tile_n} keys a tile, of which {config.mma_warps} warps copy {most}" if config.tile_n > most else ""


def smem(operand: str, config: Config) -> Layout:
    """An operand in shared memory: Q ``(rows, columns, place)``, K and V ``(keys of a group, columns, (group, stage))``; the V
    of a stage is behind its K."""
    return in_slots(operand, mma_sync.smem(operand, group(config)), config)


def in_slots(operand: str, layout: Layout, config: Config) -> Layout:
    """A slot's layout as that of all slots."""
    (rows, columns, *_), (of_row, of_column, *of_slot) = layout.shape, layout.stride  # type: ignore[misc]
    if operand == "Q":
        return replace(layout, shape=(rows, columns, QUERIES), stride=(of_row, of_column, config.tile_m * config.tile_d))
    slots, of_stage = (config.key_warps, config.stages), config.tile_n * (config.tile_d + config.tile_dv)
    return replace(layout, shape=(rows, columns, slots), stride=(of_row, of_column, (of_slot[0], of_stage)))


def smem_layout(operand: str, config: Config):
    """:func:`smem` as the DSL's object."""
    return base.cute_layout(smem(operand, config))


def of_group(function: Callable) -> Callable:
    """One whose last argument is a config, of a group."""
    return lambda *arguments: function(*arguments[:-1], group(arguments[-1]))


copies, mma, tiled_mma = of_group(mma_sync.copies), of_group(mma_sync.mma), of_group(mma_sync.tiled_mma)
copy_in, copy_out = of_group(mma_sync.copy_in), of_group(mma_sync.copy_out)
load_operand, store_accumulator = of_group(mma_sync.load_operand), of_group(mma_sync.store_accumulator)
accumulator_registers, tile = of_group(mma_sync.accumulator_registers), of_group(mma_sync.tile)
__all__ = ["element"]
