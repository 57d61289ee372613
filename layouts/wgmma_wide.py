"""Layouts of the ``tma_wgmma`` mechanism's backward pass for heads wider than 128: two kernels, no sums in global memory.

Why the gradients of keys and of queries have a kernel each, ``cute_attn/mainloop/tma_wgmma_wide.py`` says. Each operand is
named after what it is; those of the second kernel, where they differ in shape, have a ``q`` in front.

(Where heads are up to 192 wide, V's 65 to 128, and sequences long, one kernel of 128 keys is faster: ``wgmma_backward``.)

- **Keys**: a block owns 64 keys. One warpgroup takes P and dV, the other dS and dK; P passes from one to the other.
- **Queries**: a block owns 128 queries, 64 for each computing warpgroup, as in the forward pass.

What all families of such operands share, the swizzle first, is in ``tma``.
"""

from __future__ import annotations

from . import base
from .base import BYTES, Config, Layout, Mma, element
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

TILE_DIMS = (64, 128, 192, 256)  # of the two heads, the wider has one of the last two
tile_dim = base.padded_to(TILE_DIMS)
OPERANDS = ("K", "V", "Q", "dO", "qQ", "qdO", "qK", "qV")
FIRST = ("rS", "rdP")  # with an r in front: of the first columns, where A is in registers
ROLES = ("S", "dP", "dV", "dK", "qS", "qdP", "dQ", *FIRST)
READS = {
    **{"rS": ("K", "Q"), "rdP": ("V", "dO")},
    **{"S": ("K", "Q"), "dP": ("V", "dO"), "dV": ("", "dO"), "dK": ("", "Q")},
    **{"qS": ("qQ", "qK"), "qdP": ("qdO", "qV"), "dQ": ("", "qK")},
}
ACCUMULATOR_BYTES = 4
P_STAGES = 2  # P's of query tiles on their way from one warpgroup to the other
FIRST_STORES = False  # there are no sums of dQ
CLEARS_QUERIES = False
KERNELS = {"keys": ("K", "V", "Q", "dO"), "queries": ("qQ", "qdO", "qK", "qV")}
WARPS = {  # that copy it
    **{"K": (0,), "Q": (0,), "V": (1,), "dO": (1,)},
    **{"qK": (0,), "qV": (0,), "qQ": (1,), "qdO": (1,)},
}


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.mma_warps // 4


def pieces(config: Config) -> list[tuple[int, int]]:
    """dQ has no sums in global memory."""
    return []


def turned(config: Config) -> bool:
    """dQ is never computed as its transpose."""
    return False


def over(config: Config) -> dict[str, str]:
    """From an operand to the one whose shared memory it takes."""
    return {}


def stages(operand: str, config: Config) -> int:
    """Tiles of an operand that shared memory has room for."""
    return {"Q": config.stages, "dO": config.stages, "P": P_STAGES, "qK": config.stages, "qV": v_stages(config)}.get(operand, 1)


def v_stages(config: Config) -> int:
    """The same of V in the second kernel, where a tile of V is done with long before its K."""
    return config.stages - 1


def handed_over(config: Config) -> Layout:
    """P on its way from one warpgroup to the other, ``(thread, value, slot)``, 16 bytes at once."""
    return base.in_turns(WARPGROUP, ROWS_PER_WARPGROUP * config.tile_m // WARPGROUP, 8, P_STAGES)


def smem_parts_of(kernel: str, config: Config) -> dict[str, int]:
    """Bytes of shared memory by part of the ``"keys"`` or the ``"queries"`` kernel."""

    def size(name):
        shape = _shape(name, config)
        return shape[0] * shape[1] * shape[2] * BYTES

    if kernel == "keys":
        parts = {name: size(name) for name in ("K", "V", "Q", "dO")}
        parts["P"] = P_STAGES * ROWS_PER_WARPGROUP * config.tile_m * BYTES
        parts["rows"] = config.stages * 2 * config.tile_m * ACCUMULATOR_BYTES
        parts["hidden"] = config.tile_n  # keys, a byte each
        stages = 2 + 2 * config.stages + P_STAGES
    else:
        parts = {name: size(f"q{name}") for name in ("Q", "dO", "K", "V")}
        parts["hidden"] = config.tile_n * config.stages
        stages = 2 * warpgroups(config) + config.stages + v_stages(config)
    work = WORK_SLOTS * (4 * WORK_FIELDS + 2 * BARRIER_BYTES)
    return {**parts, "barriers": BARRIER_BYTES * 2 * stages, "work": work}


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part, of the kernel that takes more."""
    return max((smem_parts_of(kernel, config) for kernel in ("keys", "queries")), key=lambda parts: sum(parts.values()))


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs at once: in the first kernel for dV or dK, Sᵀ, P in the operands' dtype and columns of
    K or V; in the second for dQ, P and dP."""
    wider, columns = max(config.tile_d, config.tile_dv), first_columns(config)
    keys = wider // 2 + config.tile_m // 2 * 3 // 2 + max(columns["rS", "K"], columns["rdP", "V"]) // 4
    return max(keys, config.tile_d // 2 + config.tile_n)


def misfit(config: Config) -> str:
    """What the kernels can't do: one warpgroup each for dV and dK of 64 keys; both together 128 queries, whose next tile of K
    comes while the last one is read still."""
    return base.first_misfit(
        (config.mma_warps != 8, f"{config.mma_warps} warps; 8 are needed, a warpgroup for dV and one for dK: try mma_warps=8"),
        (config.tile_n != ROWS_PER_WARPGROUP, f"{config.tile_n} keys a tile; 64 are needed: try tile_n=64"),
        in_registers_misfit(config),
        (config.stages < 2, f"{config.stages} stages; 2 at least are needed: try stages=2"),
    )


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of a role, named after what it computes; 64 rows each.

    Keys: ``"S"`` (Sᵀ = K·Qᵀ) and ``"dP"`` (dPᵀ = V·dOᵀ), both operands from shared memory; ``"dV"`` and ``"dK"``, A from
    registers. Queries: ``"qS"`` (Q·Kᵀ), ``"qdP"`` (dO·Vᵀ) and ``"dQ"`` (dS·K, A from registers).
    """
    n = {
        **{"S": config.tile_m, "dP": config.tile_m, "dV": config.tile_dv, "dK": config.tile_d},
        **{"qS": config.tile_n, "qdP": config.tile_n, "dQ": config.tile_d},
    }[role.removeprefix("r")]
    return warpgroup_mma(n, in_registers=role in ("dV", "dK", "dQ", *FIRST))


def first_columns(config: Config) -> dict[tuple[str, str], int]:
    """Columns of K and V that threads of the first kernel hold, for the products that read them there."""
    return {("rS", "K"): min(config.k_in_registers, config.tile_d), ("rdP", "V"): min(config.k_in_registers, config.tile_dv)}


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1, "epilogues": warpgroups(config)}


def _shape(operand: str, config: Config) -> tuple[int, int, int]:
    """(rows, columns, slots) of an operand."""
    w = warpgroups(config)
    return {
        "K": (config.tile_n, config.tile_d, 1),
        "V": (config.tile_n, config.tile_dv, 1),
        "Q": (config.tile_m, config.tile_d, config.stages),
        "dO": (config.tile_m, config.tile_dv, config.stages),
        "qQ": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "qdO": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "qK": (config.tile_n, config.tile_d, config.stages),
        "qV": (config.tile_n, config.tile_dv, v_stages(config)),
    }[operand]


# From that, the rest of the contract.
_family = Family(
    _shape,
    smem_parts,
    mma,
    loaded=("K", "V", "Q", "dO", "qQ", "qdO", "qK", "qV"),
    stored={},
    results=(),
    over_rows=("dV", "dK", "dQ"),
    first_columns=first_columns,
)
tile, slot_bytes, smem, smem_layout = _family.tile, _family.slot_bytes, _family.smem, _family.smem_layout
smem_bytes, copies, tiled_mma = _family.smem_bytes, _family.copies, _family.tiled_mma
columns_in_registers, load_operand = _family.columns_in_registers, _family.load_operand
store_accumulator = _family.store_accumulator  # of nothing: results leave from registers
