"""Blackwell data-center GPUs (compute capabilities 10.0, 10.3) and Thor (11.0): a working kernel, with Hopper's tables of
``mma.sync``, until they have one for their own tensor cores."""

from __future__ import annotations

from . import mma_sync, mma_sync_backward, mma_sync_cache, sm90
from .base import KIB, Gpu

GPU = Gpu(
    name="sm_100",
    targets={(10, 0): "sm_100", (10, 3): "sm_103", (11, 0): "sm_110"},
    smem_per_block=227 * KIB,
    smem_per_multiprocessor=228 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}
BACKWARD = {"cp_async_backward": mma_sync_backward}
CACHE = {"cp_async_cache": mma_sync_cache}

TABLE = sm90.MMA_SYNC_TABLE
BACKWARD_TABLE = sm90.MMA_SYNC_BACKWARD_TABLE
ADD_WIDTH = sm90.ADD_WIDTH

configs = mma_sync_backward.of_tables(TABLE, BACKWARD_TABLE, ADD_WIDTH)
