"""Layouts of the ``tma_wgmma`` mechanism: operands of warpgroup MMA in swizzled shared memory, copied by TMA.

Shared memory is cut into 128-byte rows of 64 elements (64-byte rows of 32 where a head is 96 wide), swizzled as WGMMA's
descriptors and TMA's boxes both understand: ``Sw<3,4,3>`` (or ``Sw<2,4,3>``) over 8 rows.
"""

from __future__ import annotations

from .base import BYTES, Config

TILE_DIMS = (64, 96, 128, 192, 256)
ROWS_PER_WARPGROUP = 64
BARRIER_BYTES = 8
SMEM_ALIGN = 1024  # a swizzle atom is 8 rows of 128 bytes


def tile_dim(head_dim: int) -> int:
    """Columns a head of ``head_dim`` takes in shared memory."""
    return next(d for d in TILE_DIMS if d >= head_dim)


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.tile_m // ROWS_PER_WARPGROUP


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. O lies over Q unless the config gives it memory of its own."""
    q = config.tile_m * config.tile_d * BYTES
    o = config.tile_m * config.tile_dv * BYTES
    return {
        "Q": q if config.separate_o else max(q, o),
        "K": config.stages * config.tile_n * config.tile_d * BYTES,
        "V": config.stages * config.tile_n * config.tile_dv * BYTES,
        "O": o if config.separate_o else 0,
        "barriers": BARRIER_BYTES * 2 * (warpgroups(config) + 2 * config.stages),
    }


def smem_bytes(config: Config) -> int:
    """Shared memory of a block, with the worst padding that aligning the parts can cost."""
    return sum(smem_parts(config).values()) + SMEM_ALIGN


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs for S, P and O at once; addresses and the softmax's state come on top."""
    return config.tile_n // 2 + config.tile_n // 4 + config.tile_dv // 2


def tiled_mma(role: str, config: Config):
    """The warpgroup MMA of Q·Kᵀ (``"S"``: both from shared memory) or P·V (``"O"``: P from registers)."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.nvgpu import warpgroup

    dtype = element(config)
    if role == "S":
        n, source, b_major = config.tile_n, warpgroup.OperandSource.SMEM, cute.nvgpu.OperandMajorMode.K
    else:
        n, source, b_major = config.tile_dv, warpgroup.OperandSource.RMEM, cute.nvgpu.OperandMajorMode.MN
    op = warpgroup.MmaF16BF16Op(
        dtype, cutlass.Float32, (ROWS_PER_WARPGROUP, n, 16), source, cute.nvgpu.OperandMajorMode.K, b_major
    )
    return cute.make_tiled_mma(op)


def smem_layout(operand: str, config: Config):
    """The swizzled layout of an operand: ``(64, tile_d, warpgroup)`` for Q and O, ``(tile_n, tile_d, stage)`` for K, V."""
    from cutlass import cute
    from cutlass.cute.nvgpu import warpgroup

    rows, columns, slots = _shape(operand, config)
    kind = warpgroup.SmemLayoutAtomKind.K_SW128 if columns % 64 == 0 else warpgroup.SmemLayoutAtomKind.K_SW64
    atom = warpgroup.make_smem_layout_atom(kind, element(config))
    return cute.tile_to_shape(atom, (rows, columns, slots), order=(0, 1, 2))


def copy_in(operand: str, config: Config):
    """The TMA load of one slot of Q, K or V."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileG2SOp()


def copy_out(operand: str, config: Config):
    """The TMA store of one warpgroup's rows of O."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileS2GOp()


def store_accumulator(config: Config):
    """Registers → shared memory: ``stmatrix`` of four 8×8 tiles, in the order of the accumulator of P·V."""
    from cutlass import cute
    from cutlass.cute.nvgpu import warp

    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), element(config))
    return cute.make_tiled_copy_C(atom, tiled_mma("O", config))


def tile(operand: str, config: Config) -> tuple[int, int]:
    """(rows, columns) of one slot of an operand: what one TMA copy moves."""
    rows, columns, _ = _shape(operand, config)
    return rows, columns


def slot_bytes(operand: str, config: Config) -> int:
    """Bytes one TMA load of Q, K or V brings: padding counts, since TMA fills it with zeros."""
    rows, columns = tile(operand, config)
    return rows * columns * BYTES


def _shape(operand: str, config: Config) -> tuple[int, int, int]:
    return {
        "Q": (ROWS_PER_WARPGROUP, config.tile_d, warpgroups(config)),
        "K": (config.tile_n, config.tile_d, config.stages),
        "V": (config.tile_n, config.tile_dv, config.stages),
        "O": (ROWS_PER_WARPGROUP, config.tile_dv, warpgroups(config)),
    }[operand]


def element(config: Config):
    import cutlass

    return {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[config.dtype]
