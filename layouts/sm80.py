"""Ampere with 163 KiB of shared memory a block: the data-center GPU (compute capability 8.0: A100, A30), and Orin (8.7)."""

from __future__ import annotations

from . import mma_sync
from .base import KIB, Config, Gpu

GPU = Gpu(
    name="sm_80",
    targets={(8, 0): "sm_80", (8, 7): "sm_87"},
    smem_per_block=163 * KIB,
    smem_per_multiprocessor=164 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
# 32 rows a warp halve what ldmatrix reads for each MMA, as long as O still fits in registers.
TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 64, 2, 4, 2),
    96: (128, 64, 2, 4, 1),
    128: (128, 64, 2, 4, 1),
    192: (128, 32, 2, 8, 1),
    256: (128, 32, 2, 8, 1),
}


def configs(problem, mechanism: str, target: str) -> tuple[Config, ...]:
    """The configurations for ``problem``, best first."""
    return mma_sync.configs(problem, TABLE, target)
