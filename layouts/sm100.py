"""Blackwell data-center GPUs (compute capabilities 10.0, 10.3) and Thor (11.0): a working kernel, with Hopper's tables of
``mma.sync``, until they have one for their own tensor cores."""

from __future__ import annotations

from . import mma_sync
from .base import KIB, Config, Gpu

GPU = Gpu(
    name="sm_100",
    targets={(10, 0): "sm_100", (10, 3): "sm_103", (11, 0): "sm_110"},
    smem_per_block=227 * KIB,
    smem_per_multiprocessor=228 * KIB,
)

MECHANISMS = {"cp_async": mma_sync}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 128, 2, 4, 2),
    96: (128, 64, 2, 4, 2),
    128: (128, 64, 2, 4, 2),
    192: (128, 64, 2, 8, 1),
    256: (128, 64, 2, 8, 1),
}


def configs(problem, mechanism: str, target: str) -> tuple[Config, ...]:
    """The configurations for ``problem``, best first."""
    return mma_sync.configs(problem, TABLE, target)
