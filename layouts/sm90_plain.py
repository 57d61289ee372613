"""Hopper's ``sm_90`` without the ``a``: no warpgroup MMA. For code that must be no more than portable; the GPU itself, of
compute capability 9.0, gets ``sm_90a``."""

from __future__ import annotations

from . import mma_sync, mma_sync_backward, mma_sync_cache, sm90
from .base import Gpu

GPU = Gpu(
    name="sm_90",
    targets={},  # asked for by name
    smem_per_block=sm90.GPU.smem_per_block,
    smem_per_multiprocessor=sm90.GPU.smem_per_multiprocessor,
)

MECHANISMS = {"cp_async": mma_sync}
BACKWARD = {"cp_async_backward": mma_sync_backward}
CACHE = {"cp_async_cache": mma_sync_cache}

configs = mma_sync_backward.of_tables(sm90.MMA_SYNC_TABLE, sm90.MMA_SYNC_BACKWARD_TABLE, sm90.ADD_WIDTH)
