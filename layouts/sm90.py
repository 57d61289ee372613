"""Hopper (compute capability 9.0; the compiler's ``sm_90a``): TMA and warpgroup MMA, and the older mechanism besides."""

from __future__ import annotations

from . import mma_sync, wgmma
from .base import KIB, Config, Gpu

GPU = Gpu(
    name="sm_90a",
    targets={(9, 0): "sm_90a"},
    smem_per_block=227 * KIB,
    smem_per_multiprocessor=228 * KIB,
)

MECHANISMS = {"tma_wgmma": wgmma, "cp_async": mma_sync}

# The wider of the two padded head dims, and whether the band has an edge
#   -> tile_m, tile_n, stages, ping_pong, separate_o, rescale_early
# A computing warpgroup owns 64 rows. Two of them may have 240 registers a thread, three 160.
WGMMA_TABLE = {
    (64, False): (192, 128, 2, True, True, False),
    (64, True): (192, 128, 2, True, True, False),
    (96, False): (128, 128, 2, True, True, False),
    (96, True): (128, 128, 2, True, True, False),
    (128, False): (128, 176, 2, True, False, False),
    (128, True): (128, 128, 2, True, True, False),
    (192, False): (128, 96, 2, False, False, True),
    (192, True): (128, 96, 2, False, False, True),
    (256, False): (128, 80, 2, False, False, True),
    (256, True): (128, 80, 2, False, False, True),
}
REGISTERS = {1: (240, 24), 2: (240, 24), 3: (160, 32)}  # computing warpgroups -> registers of a computing, copying thread

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
MMA_SYNC_TABLE = {
    32: (128, 64, 2, 4, 2),
    64: (128, 64, 2, 4, 2),
    96: (128, 64, 2, 4, 2),
    128: (128, 64, 2, 4, 2),
    192: (128, 64, 2, 8, 1),
    256: (128, 64, 2, 8, 1),
}


def configs(problem, mechanism: str, target: str) -> tuple[Config, ...]:
    """The configurations for ``problem``, best first."""
    if mechanism == "cp_async":
        return mma_sync.configs(problem, MMA_SYNC_TABLE, target)
    tile_d, tile_dv = wgmma.tile_dim(problem.head_dim), wgmma.tile_dim(problem.head_dim_v)
    edge = problem.bounded_left or problem.bounded_right
    tile_m, tile_n, stages, ping_pong, separate_o, rescale_early = WGMMA_TABLE[max(tile_d, tile_dv), edge]
    mma_registers, copy_registers = REGISTERS[tile_m // 64]
    return (
        Config(
            target=target,
            mechanism=mechanism,
            dtype=problem.dtype,
            tile_m=tile_m,
            tile_n=tile_n,
            tile_d=tile_d,
            tile_dv=tile_dv,
            stages=stages,
            mma_warps=tile_m // 16,
            mma_registers=mma_registers,
            copy_registers=copy_registers,
            ping_pong=ping_pong,
            separate_o=separate_o,
            rescale_early=rescale_early,
        ),
    )
