"""Hopper (compute capability 9.0; the compiler's ``sm_90a``): TMA and warpgroup MMA, and the older mechanism besides."""

from __future__ import annotations

from typing import Any

from . import mma_sync, mma_sync_backward, mma_sync_cache, wgmma, wgmma_backward, wgmma_cache, wgmma_wide
from .base import KIB, Config, Gpu

GPU = Gpu(
    name="sm_90a",
    targets={(9, 0): "sm_90a"},
    smem_per_block=227 * KIB,
    smem_per_multiprocessor=228 * KIB,
)

MECHANISMS = {"tma_wgmma": wgmma, "cp_async": mma_sync}
BACKWARD = {
    "tma_wgmma_backward": wgmma_backward,
    "tma_wgmma_wide": wgmma_wide,
    "cp_async_backward": mma_sync_backward,
}
CACHE = {"wgmma_cache": wgmma_cache, "cp_async_cache": mma_sync_cache}

# The wider of the two padded head dims -> the fields of Config that the table decides.
# A computing warpgroup owns 64 rows. Two of them may have 240 registers a thread, three 160.
WGMMA_TABLE: dict[int, dict[str, Any]] = {
    64: {"tile_m": 192, "tile_n": 128, "stages": 3, "ping_pong": True, "separate_o": True, "q_stages": 2},
    96: {"tile_m": 128, "tile_n": 128, "stages": 2, "ping_pong": True, "separate_o": True},
    128: {"tile_m": 128, "tile_n": 128, "stages": 2, "ping_pong": True, "separate_o": True, "q_in_registers": 128},
    192: {"tile_m": 128, "tile_n": 96, "stages": 2, "rescale_early": True, "o_from_registers": True},
    256: {
        "tile_m": 128,
        "tile_n": 64,
        "stages": 2,
        "rescale_early": True,
        "o_from_registers": True,
        "q_in_registers": 128,
    },
}
# Heads of different widths leave the room that a memory of its own takes for O.
WGMMA_MIXED: dict[int, dict[str, Any]] = {
    192: {"separate_o": True, "o_from_registers": False},
    256: {"separate_o": True, "o_from_registers": False},
}
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}  # computing warpgroups -> registers of a computing, copying thread
# dQ alone leaves a computing thread with some to spare, and a copying one needs more than 24; so do lists of tiles for heads
# of up to 64 columns.
REGISTERS_TO_COPY = (232, 40)

# The same for the backward pass. Up to 128, a computing warpgroup owns 64 keys, and both head dims are padded to the wider.
WGMMA_BACKWARD_TABLE: dict[int, dict[str, Any]] = {
    64: {"tile_m": 128, "tile_n": 128, "stages": 2, "separate_dk": True},
    96: {"tile_m": 64, "tile_n": 128, "stages": 2, "separate_dk": True, "k_in_registers": 96},
    128: {"tile_m": 64, "tile_n": 128, "stages": 2, "separate_dk": True, "overlap_tiles": True},
}

# The fields of higher query tiles, where few rows of the last one are padding: K and V are read from shared memory fewer times.
# No registers are left for a product that runs into the next tile, nor memory for dK by itself.
WGMMA_BACKWARD_TALL: dict[int, dict[str, Any]] = {
    128: {"tile_m": 80, "separate_dk": False, "overlap_tiles": False, "late_dv": 16}
}
# The padded head dims -> the fields of one kernel for wide heads of which V's are narrower: dK and dV of 128 keys fit, and dQ's
# product of 64 rows, of which 48 are queries. dS takes no register beside it, and P none beside dS.
WGMMA_BACKWARD_MIXED: dict[tuple[int, int], dict[str, Any]] = {
    (192, 128): {
        "tile_m": 48,
        "tile_n": 128,
        "stages": 2,
        "overlap_tiles": True,
        "ds_from_shared": True,
        "results_from_registers": True,
    }
}
# Where dQ is added in a fixed order by unequal tiles, which makes those who add it wait.
WGMMA_BACKWARD_ORDERED: dict[int, dict[str, Any]] = {64: {"separate_dk": False, "dq_stages": 2}}

# Beyond, where the gradients of keys and of queries have a kernel each.
WGMMA_WIDE: dict[int, dict[str, Any]] = {
    192: {"tile_m": 64, "tile_n": 64, "stages": 3, "overlap_tiles": True, "k_in_registers": 192},
    256: {"tile_m": 64, "tile_n": 64, "stages": 2, "k_in_registers": 192},
}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
MMA_SYNC_TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 128, 2, 4, 2),
    96: (128, 64, 2, 4, 2),
    128: (128, 64, 2, 4, 2),
    192: (128, 64, 2, 8, 1),
    256: (128, 64, 2, 8, 1),
}

# For few keys under a right edge: two blocks of half the rows read K and V twice, but less of them is cut.
MMA_SYNC_SHORT = {256: (64, 32, 2, 4, 2)}

# The same for the backward pass.
ADD_WIDTH = 4  # red.global.add.v4.f32
MMA_SYNC_BACKWARD_TABLE: dict[int, dict[str, Any]] = {
    32: {"tile_m": 128, "tile_n": 128, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 8},
    64: {
        "tile_m": 64,
        "tile_n": 128,
        "step_m": 32,
        "stages": 2,
        "mma_warps": 4,
        "key_warps": 4,
        "blocks_per_multiprocessor": 2,
    },
    96: {"tile_m": 64, "tile_n": 128, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 4},
    128: {"tile_m": 64, "tile_n": 128, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 4},
    192: {"tile_m": 64, "tile_n": 96, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 2},
    256: {"tile_m": 64, "tile_n": 64, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 2},
}


def configs(problem, mechanism: str, target: str) -> tuple[Config, ...]:
    """The configurations for ``problem``, best first."""
    if mechanism == "cp_async" and problem.gradients:
        return mma_sync_backward.configs(problem, MMA_SYNC_BACKWARD_TABLE, target, ADD_WIDTH)
    if mechanism == "cp_async":
        return mma_sync.configs(problem, MMA_SYNC_TABLE, target, MMA_SYNC_SHORT)
    if problem.gradients:
        narrow = max(problem.head_dim, problem.head_dim_v) <= 64
        registers = REGISTERS_TO_COPY if problem.gradients == "q" or (problem.blocks and narrow) else REGISTERS[2]
        tables = WGMMA_BACKWARD_TABLE, WGMMA_BACKWARD_ORDERED, WGMMA_BACKWARD_TALL, WGMMA_WIDE, WGMMA_BACKWARD_MIXED
        return wgmma_backward.configs(problem, *tables, registers, target)
    tile_d, tile_dv = wgmma.tile_dim(problem.head_dim), wgmma.tile_dim(problem.head_dim_v)
    wider = max(tile_d, tile_dv)
    choice = WGMMA_TABLE[wider] | (WGMMA_MIXED.get(wider, {}) if tile_d != tile_dv else {})
    if problem.bounded_right:  # long tiles have a block each, and no next Q to wait for
        choice["o_from_registers"] = False
    if problem.takes_registers:
        choice["q_in_registers"] = 0
    warpgroups = choice["tile_m"] // wgmma.ROWS_PER_WARPGROUP
    mma_registers, copy_registers = REGISTERS[warpgroups]
    return (
        Config(
            target=target,
            mechanism=mechanism,
            dtype=problem.dtype,
            tile_d=tile_d,
            tile_dv=tile_dv,
            mma_warps=4 * warpgroups,
            mma_registers=mma_registers,
            copy_registers=copy_registers,
            **choice,
        ),
    )
