"""Ampere and Ada workstation and consumer GPUs (compute capabilities 8.6 and 8.9): 99 KiB of shared memory a block."""

from __future__ import annotations

from typing import Any

from . import mma_sync, mma_sync_backward, mma_sync_cache
from .base import KIB, Gpu

GPU = Gpu(
    name="sm_86",
    targets={(8, 6): "sm_86", (8, 9): "sm_89"},
    smem_per_block=99 * KIB,
    smem_per_multiprocessor=100 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}
BACKWARD = {"cp_async_backward": mma_sync_backward}
CACHE = {"cp_async_cache": mma_sync_cache}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 64, 2, 4, 2),
    96: (128, 64, 2, 4, 1),
    128: (128, 64, 2, 4, 1),
    192: (64, 32, 2, 4, 1),
    256: (64, 32, 2, 4, 1),
}

# The same for the backward pass: the wider of the two padded head dims -> the fields of Config that the table decides.
ADD_WIDTH = 1  # there is no red for more floats at once before sm_90
BACKWARD_TABLE: dict[int, dict[str, Any]] = {
    32: {"tile_m": 64, "tile_n": 64, "step_m": 64, "stages": 2, "mma_warps": 4, "key_warps": 4, "blocks_per_multiprocessor": 2},
    64: {"tile_m": 64, "tile_n": 128, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 4},
    96: {"tile_m": 64, "tile_n": 64, "step_m": 64, "stages": 2, "mma_warps": 8, "key_warps": 4},
    128: {"tile_m": 64, "tile_n": 64, "step_m": 64, "stages": 1, "mma_warps": 8, "key_warps": 2},
    192: {"tile_m": 32, "tile_n": 64, "step_m": 32, "stages": 1, "mma_warps": 8, "key_warps": 4},
    256: {"tile_m": 32, "tile_n": 32, "step_m": 32, "stages": 1, "mma_warps": 4, "key_warps": 2},
}

configs = mma_sync_backward.of_tables(TABLE, BACKWARD_TABLE, ADD_WIDTH)
