"""Layouts of the ``tma_wgmma`` mechanism's backward pass for heads wider than 128: two kernels, no sums in global memory.

dK and dV of 128 keys and 256 columns would take all registers of a multiprocessor, so the gradients of keys and of queries
have a kernel each, which computes the scores anew. Each operand is named after what it is; those of the second kernel,
where they differ in shape, have a ``q`` in front.

- **Keys**: a block owns 64 keys. One warpgroup takes P and dV, the other dS and dK; P passes from one to the other. dV
  lies over K and dK over V, which nobody else reads any more.
- **Queries**: a block owns 128 queries, 64 for each computing warpgroup, as in the forward pass. dQ lies over Q.

Shared memory is swizzled as in ``wgmma``.
"""

from __future__ import annotations

from . import base
from .base import BYTES, FRAGMENT_A, FRAGMENT_C, FRAGMENT_THREADS, Box, Config, Copy, Layout, Mma, element, swizzle_atom
from .wgmma import BARRIER_BYTES, ROWS_PER_WARPGROUP, SMEM_ALIGN, WARPGROUP

__all__ = ["SMEM_ALIGN", "WARPGROUP", "element"]

TILE_DIMS = (64, 128, 192, 256)  # of the two heads, the wider has one of the last two
OPERANDS = ("K", "V", "Q", "dO", "dK", "dV", "qQ", "qdO", "qK", "qV", "dQ")
ROLES = ("S", "dP", "dV", "dK", "qS", "qdP", "dQ")
READS = {
    **{"S": ("K", "Q"), "dP": ("V", "dO"), "dV": ("", "dO"), "dK": ("", "Q")},
    **{"qS": ("qQ", "qK"), "qdP": ("qdO", "qV"), "dQ": ("", "qK")},
}
ACCUMULATOR_BYTES = 4
P_STAGES = 2  # P's of query tiles on their way from one warpgroup to the other
V_STAGES = 1  # of the second kernel: a tile of V is done with long before its K
KERNELS = {"keys": ("K", "V", "Q", "dO", "dK", "dV"), "queries": ("qQ", "qdO", "qK", "qV", "dQ")}
OVER = {"dK": "V", "dV": "K", "dQ": "qQ"}  # whose shared memory an operand takes
WARPS = {  # that copy it
    **{"K": (0,), "Q": (0,), "V": (1,), "dO": (1,)},
    **{"qK": (0,), "qV": (0,), "qQ": (1,), "qdO": (1,)},
}


def tile_dim(head_dim: int) -> int:
    """Columns a head of ``head_dim`` takes in shared memory."""
    return next(d for d in TILE_DIMS if d >= head_dim)


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.mma_warps // 4


def pieces(config: Config) -> list[tuple[int, int]]:
    """dQ has no sums in global memory."""
    return []


def stages(operand: str, config: Config) -> int:
    """Tiles of an operand that shared memory has room for."""
    return {"Q": config.stages, "dO": config.stages, "P": P_STAGES, "qK": config.stages, "qV": V_STAGES}.get(operand, 1)


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
        parts["K"] = parts["V"] = max(parts["K"], parts["V"])  # each has room for the other's gradient
        parts["P"] = P_STAGES * ROWS_PER_WARPGROUP * config.tile_m * BYTES
        parts["rows"] = config.stages * 2 * config.tile_m * ACCUMULATOR_BYTES
        stages = 2 + 2 * config.stages + P_STAGES
    else:
        parts = {name: size(f"q{name}") for name in ("Q", "dO", "K", "V")}
        stages = warpgroups(config) + config.stages + V_STAGES  # Q and dO come together
    return {**parts, "barriers": BARRIER_BYTES * 2 * stages}


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part, of the kernel that takes more."""
    return max((smem_parts_of(kernel, config) for kernel in ("keys", "queries")), key=lambda parts: sum(parts.values()))


def smem_bytes(config: Config) -> int:
    """Shared memory of a block, with the worst padding that aligning the parts can cost."""
    return sum(smem_parts(config).values()) + SMEM_ALIGN


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs at once: in the second kernel, for dQ, P, dP and dS in the operands' dtype."""
    return max(config.tile_d, config.tile_dv) // 2 + config.tile_n + config.tile_n // 4


def tile(operand: str, config: Config) -> tuple[int, int]:
    """(rows, columns) of one slot of an operand: what one TMA copy moves."""
    rows, columns, _ = _shape(operand, config)
    return rows, columns


def slot_bytes(operand: str, config: Config) -> int:
    """Bytes one TMA load brings: padding counts, since TMA fills it with zeros."""
    rows, columns = tile(operand, config)
    return rows * columns * BYTES


def smem(operand: str, config: Config) -> Layout:
    """An operand in shared memory: ``(rows, columns, slot)``. The swizzle goes into a pointer: it acts on the address in
    bytes."""
    bits, lowest, shift, width = swizzle_atom(tile(operand, config)[1])
    on_bytes = (bits, lowest + BYTES.bit_length() - 1, shift)
    return base.tiled_rows(_shape(operand, config), width, on_bytes, 1)


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of a role, named after what it computes; 64 rows each.

    Keys: ``"S"`` (Sᵀ = K·Qᵀ) and ``"dP"`` (dPᵀ = V·dOᵀ), both operands from shared memory; ``"dV"`` and ``"dK"``, A from
    registers. Queries: ``"qS"`` (Q·Kᵀ), ``"qdP"`` (dO·Vᵀ) and ``"dQ"`` (dS·K, A from registers).
    """
    n = {
        **{"S": config.tile_m, "dP": config.tile_m, "dV": config.tile_dv, "dK": config.tile_d},
        **{"qS": config.tile_n, "qdP": config.tile_n, "dQ": config.tile_d},
    }[role]
    m, k = ROWS_PER_WARPGROUP, 16
    threads = (*FRAGMENT_THREADS, (4, 16, 0))
    in_registers = role in ("dV", "dK", "dQ")
    return Mma(
        shape=(m, n, k),
        tile=(m, n, k),
        warps=4,
        a=base.by_modes((m, k), threads, FRAGMENT_A) if in_registers else Layout((WARPGROUP, (m, k)), (0, (1, m))),
        b=Layout((WARPGROUP, (n, k)), (0, (1, n))),
        c=base.by_modes((m, n), threads, (*FRAGMENT_C, (n // 8, 0, 8))),
        from_shared="B" if in_registers else "AB",
    )


def copies(config: Config) -> dict[tuple[str, str], Copy | Box]:
    """Every copy by (step, operand): ``in`` from global memory and ``out`` to it by TMA, ``store`` from an accumulator to
    shared memory."""
    found: dict[tuple[str, str], Copy | Box] = {}
    for name in ("K", "V", "Q", "dO", "qQ", "qdO", "qK", "qV"):
        found["in", name] = _box(name, config)
    for name in ("dK", "dV", "dQ"):
        what = mma(name, config)
        found["store", name] = Copy("stmatrix", name, what.tile[:2], what.c)
        found["out", name] = _box(name, config, store=True)
    return found


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1, "epilogues": warpgroups(config)}


def _box(operand: str, config: Config, store: bool = False) -> Box:
    width = swizzle_atom(tile(operand, config)[1])[3]
    return Box(operand, tile(operand, config)[0], width, width * BYTES, store)


def tiled_mma(role: str, config: Config):
    """:func:`mma` as the DSL's object."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

    what = mma(role, config)
    source = warpgroup.OperandSource.SMEM if "A" in what.from_shared else warpgroup.OperandSource.RMEM
    b_major = OperandMajorMode.K if "A" in what.from_shared else OperandMajorMode.MN
    return cute.make_tiled_mma(
        warpgroup.MmaF16BF16Op(element(config), cutlass.Float32, what.shape, source, OperandMajorMode.K, b_major)
    )


def smem_layout(operand: str, config: Config):
    """:func:`smem` as the DSL's object."""
    return base.cute_layout(smem(operand, config))


def copy_in(operand: str, config: Config):
    """The TMA load of one slot."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileG2SOp()


def copy_out(operand: str, config: Config):
    """The TMA store of one warpgroup's rows of a gradient."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileS2GOp()


def store_accumulator(operand: str, config: Config):
    """Registers → shared memory: ``stmatrix`` of four 8×8 tiles, in the order of the accumulator."""
    from cutlass import cute
    from cutlass.cute.nvgpu import warp

    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), element(config))
    what = copies(config)["store", operand]
    assert isinstance(what, Copy)
    return cute.make_tiled_copy(atom, base.cute_layout(what.values), what.tile)


def _shape(operand: str, config: Config) -> tuple[int, int, int]:
    w = warpgroups(config)
    return {
        "K": (config.tile_n, config.tile_d, 1),
        "V": (config.tile_n, config.tile_dv, 1),
        "dK": (config.tile_n, config.tile_d, 1),
        "dV": (config.tile_n, config.tile_dv, 1),
        "Q": (config.tile_m, config.tile_d, config.stages),
        "dO": (config.tile_m, config.tile_dv, config.stages),
        "qQ": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "dQ": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "qdO": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "qK": (config.tile_n, config.tile_d, config.stages),
        "qV": (config.tile_n, config.tile_dv, V_STAGES),
    }[operand]
