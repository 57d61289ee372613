"""Layouts of the ``tma_wgmma`` mechanism: operands of warpgroup MMA in swizzled shared memory, copied by TMA.

What all families of such operands share, the swizzle first, is in ``tma``.
"""

from __future__ import annotations

from . import base
from .base import BYTES, Config, Mma, element
from .tma import (
    BARRIER_BYTES,
    ROWS_PER_WARPGROUP,
    SMEM_ALIGN,
    WARPGROUP,
    WORK_FIELDS,
    WORK_SLOTS,
    Family,
    copy_in,
    copy_out,
    in_registers_misfit,
    warpgroup_mma,
)

__all__ = ["SMEM_ALIGN", "WARPGROUP", "copy_in", "copy_out", "element"]

TILE_DIMS = (64, 96, 128, 192, 256)
tile_dim = base.padded_to(TILE_DIMS)
VERDICT_BYTES = 4 + 2 * BARRIER_BYTES  # whether a block has seen an output that is not finite, and that all have looked


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.tile_m // ROWS_PER_WARPGROUP


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. O lies over Q unless the config gives it memory of its own or needs none.

    Raises ``ValueError`` where O would lie over a Q of another width: a warpgroup's rows of O would then reach into
    another's rows of Q, which that one may still be reading.
    """
    if config.tile_d != config.tile_dv and not (config.separate_o or config.o_from_registers):
        raise ValueError(
            f"O is {config.tile_dv} columns wide and would lie over Q, which is {config.tile_d}; equal widths are needed: "
            f"try separate_o=True, with a smaller tile_n if shared memory runs out, or o_from_registers=True"
        )
    q = config.tile_m * config.tile_d * BYTES
    o = config.tile_m * config.tile_dv * BYTES
    return {
        "Q": q,
        "K": config.stages * config.tile_n * config.tile_d * BYTES,
        "V": config.stages * config.tile_n * config.tile_dv * BYTES,
        "O": o if config.separate_o else 0,
        "next Q": (config.q_stages - 1) * q,
        "barriers": BARRIER_BYTES * 2 * (config.q_stages * warpgroups(config) + 2 * config.stages),
        "verdict": VERDICT_BYTES,
        "work": WORK_SLOTS * (4 * WORK_FIELDS + 2 * BARRIER_BYTES),
        "asked": 2 * BARRIER_BYTES,
        "ramp": 4 * config.mma_warps * config.tile_n // 2,
    }


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs for S, P, O and what it holds of Q; addresses and the softmax's state come on top."""
    return config.tile_n // 2 + config.tile_n // 4 + config.tile_dv // 2 + first_columns(config)["rS", "Q"] // 4


def misfit(config: Config) -> str:
    """What the kernel can't do: a warpgroup computes 64 whole rows."""
    rows, warps = config.tile_m, 4 * warpgroups(config)
    return base.first_misfit(
        (rows % ROWS_PER_WARPGROUP > 0, f"{rows} queries a tile; a multiple of {ROWS_PER_WARPGROUP} is needed: try tile_m=128"),
        (config.mma_warps != warps, f"{config.mma_warps} warps for {rows} queries; {warps} are needed: try mma_warps={warps}"),
        in_registers_misfit(config),
        (config.q_stages not in (1, 2), f"{config.q_stages} stages of Q; 1 or 2 are needed: try q_stages=1"),
        (
            config.q_stages > 1 and not (config.separate_o or config.o_from_registers),
            f"{config.q_stages} stages of Q, and O lies over the first, where the next Q comes to: try separate_o=True",
        ),
        (config.stages < 1, f"{config.stages} stages; 1 at least is needed: try stages=2"),
    )


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of Q·Kᵀ (``"S"``: both from shared memory; ``"rS"``, of the first columns: Q from registers) or P·V
    (``"O"``: P from registers)."""
    return warpgroup_mma(config.tile_dv if role == "O" else config.tile_n, in_registers=role != "S")


def first_columns(config: Config) -> dict[tuple[str, str], int]:
    """Columns of Q that threads hold, for the product that reads them there."""
    return {("rS", "Q"): min(config.q_in_registers, config.tile_d)}


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1, "turns": warpgroups(config), "epilogues": warpgroups(config)}


def _shape(operand: str, config: Config) -> tuple[int, int, int]:
    """(rows, columns, slots) of an operand: 64 rows for each warpgroup for Q and O, a slot for each stage for K and V."""
    return {
        "Q": (ROWS_PER_WARPGROUP, config.tile_d, warpgroups(config)),
        "K": (config.tile_n, config.tile_d, config.stages),
        "V": (config.tile_n, config.tile_dv, config.stages),
        "O": (ROWS_PER_WARPGROUP, config.tile_dv, warpgroups(config)),
    }[operand]


# From that, the rest of the contract.
_family = Family(
    *(_shape, smem_parts, mma),
    loaded=("Q", "K", "V"),
    stored={"O": "O"},
    results=("O",),
    over_rows=("O",),
    first_columns=first_columns,
)
tile, slot_bytes, smem, smem_layout = _family.tile, _family.slot_bytes, _family.smem, _family.smem_layout
smem_bytes, copies, tiled_mma = _family.smem_bytes, _family.copies, _family.tiled_mma
columns_in_registers, load_operand = _family.columns_in_registers, _family.load_operand


def store_accumulator(config: Config):
    """Registers → shared memory, in the order of the accumulator of P·V."""
    return _family.store_accumulator("O", config)
