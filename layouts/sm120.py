"""Blackwell workstation and consumer GPUs (compute capabilities 12.0 and 12.1): 99 KiB of shared memory a block."""

from __future__ import annotations

from . import mma_sync
from .base import KIB, Config, Gpu

GPU = Gpu(
    name="sm_120",
    targets={(12, 0): "sm_120", (12, 1): "sm_121"},
    smem_per_block=99 * KIB,
    smem_per_multiprocessor=100 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 64, 2, 4, 2),
    96: (128, 64, 2, 4, 1),
    128: (128, 64, 2, 4, 1),
    192: (64, 32, 2, 4, 1),
    256: (64, 32, 2, 4, 1),
}


def configs(problem, mechanism: str, target: str) -> tuple[Config, ...]:
    """The configurations for ``problem``, best first."""
    return mma_sync.configs(problem, TABLE, target)
