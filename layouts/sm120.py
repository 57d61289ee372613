"""Blackwell workstation and consumer GPUs (compute capabilities 12.0 and 12.1): 99 KiB of shared memory a block."""

from __future__ import annotations

from . import mma_sync, mma_sync_backward, mma_sync_cache, sm86
from .base import KIB, Gpu

GPU = Gpu(
    name="sm_120",
    targets={(12, 0): "sm_120", (12, 1): "sm_121"},
    smem_per_block=99 * KIB,
    smem_per_multiprocessor=100 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}
BACKWARD = {"cp_async_backward": mma_sync_backward}
CACHE = {"cp_async_cache": mma_sync_cache}

# As much shared memory as sm_86 has, and its tables, until they are measured on this GPU.
TABLE = sm86.TABLE
BACKWARD_TABLE = sm86.BACKWARD_TABLE
ADD_WIDTH = 4  # red.global.add.v4.f32

configs = mma_sync_backward.of_tables(TABLE, BACKWARD_TABLE, ADD_WIDTH)
