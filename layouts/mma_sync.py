"""Layouts of the ``cp_async`` mechanism: operands of ``mma.sync`` m16n8k16, read with ``ldmatrix``, copied by ``cp.async``.

Shared memory is cut into rows of 64 elements (32 where a head is 96 wide), swizzled so that the eight 16-byte pieces an
``ldmatrix`` phase reads, one from each of 8 rows, lie in 8 different bank groups: ``Sw<3,3,3>`` (``Sw<2,3,3>``) on elements.
"""

from __future__ import annotations

from .base import BYTES, Config

TILE_DIMS = (32, 64, 96, 128, 192, 256)
VECTOR = 8  # elements of a 16-byte copy
ROWS_PER_MMA = 16
SMEM_ALIGN = 1024  # a swizzle atom is 8 rows of 128 bytes


def tile_dim(head_dim: int) -> int:
    """Columns a head of ``head_dim`` takes in shared memory."""
    return next(d for d in TILE_DIMS if d >= head_dim)


def configs(problem, table, target: str) -> tuple[Config, ...]:
    """The configuration for ``problem`` from a GPU's table: the wider padded head dim
    -> (tile_m, tile_n, stages, warps, blocks a multiprocessor)."""
    tile_d, tile_dv = tile_dim(problem.head_dim), tile_dim(problem.head_dim_v)
    wider = max(tile_d, tile_dv)
    tile_m, tile_n, stages, warps, blocks = table[next(d for d in sorted(table) if d >= wider)]
    return (
        Config(
            target=target,
            mechanism="cp_async",
            dtype=problem.dtype,
            tile_m=tile_m,
            tile_n=tile_n,
            tile_d=tile_d,
            tile_dv=tile_dv,
            stages=stages,
            mma_warps=warps,
            blocks_per_multiprocessor=blocks,
        ),
    )


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. O lies over Q."""
    return {
        "Q": config.tile_m * max(config.tile_d, config.tile_dv) * BYTES,
        "K": config.stages * config.tile_n * config.tile_d * BYTES,
        "V": config.stages * config.tile_n * config.tile_dv * BYTES,
    }


def smem_bytes(config: Config) -> int:
    """Shared memory of a block."""
    return sum(smem_parts(config).values())


def rows_per_warp(config: Config) -> int:
    """Query rows a warp owns."""
    return config.tile_m // config.mma_warps


def accumulator_registers(config: Config) -> int:
    """Registers a thread needs for S, P and O at once; operands, addresses and the softmax's state come on top."""
    return rows_per_warp(config) * (config.tile_n + config.tile_n // 2 + config.tile_dv) // 32


def tiled_mma(role: str, config: Config):
    """``mma.sync`` m16n8k16 with the warps one above the other; the same for Q·Kᵀ (``"S"``) and P·V (``"O"``)."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.nvgpu import warp

    op = warp.MmaF16BF16Op(element(config), cutlass.Float32, (ROWS_PER_MMA, 8, 16))
    # 16 columns at a time, so that one ldmatrix of four 8×8 tiles fills two MMAs' worth of B.
    tile = (config.mma_warps * ROWS_PER_MMA, 16, 16)
    return cute.make_tiled_mma(op, cute.make_layout((config.mma_warps, 1, 1)), permutation_mnk=tile)


def smem_layout(operand: str, config: Config):
    """The swizzled layout of an operand: ``(tile_m, tile_d)`` for Q and O, ``(tile_n, tile_d, stage)`` for K and V."""
    from cutlass import cute

    shape = _shape(operand, config)
    width = _row_width(shape[1])
    swizzle = cute.make_swizzle({64: 3, 32: 2}[width], 3, 3)
    atom = cute.make_composed_layout(swizzle, 0, cute.make_layout((8, width), stride=(width, 1)))
    return cute.tile_to_shape(atom, shape, order=(0, 1, 2)[: len(shape)])


def copy_in(operand: str, config: Config):
    """Global → shared, 16 bytes a thread with ``cp.async`` past the L1 cache: neighbouring threads along a row."""
    from cutlass import cute
    from cutlass.cute.nvgpu import cpasync

    op = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    return _by_rows(cute.make_copy_atom(op, element(config), num_bits_per_copy=128), operand, config)


def copy_out(operand: str, config: Config):
    """Shared → global through registers, 16 bytes a thread: neighbouring threads along a row."""
    from cutlass import cute

    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element(config), num_bits_per_copy=128)
    return _by_rows(atom, operand, config)


def load_operand(operand: str, config: Config):
    """Shared memory → an MMA's fragment: ``ldmatrix`` of four 8×8 tiles; V's are transposed on the way."""
    from cutlass import cute
    from cutlass.cute.nvgpu import warp

    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=operand == "V", num_matrices=4), element(config))
    make = cute.make_tiled_copy_A if operand == "Q" else cute.make_tiled_copy_B
    return make(atom, tiled_mma("S" if operand in "QK" else "O", config))


def store_accumulator(config: Config):
    """Registers → shared memory, two elements at a time, in the order of the accumulator of P·V."""
    from cutlass import cute

    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element(config), num_bits_per_copy=32)
    return cute.make_tiled_copy_C(atom, tiled_mma("O", config))


def element(config: Config):
    """The DSL's type of an operand's element."""
    import cutlass

    return {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[config.dtype]


def _by_rows(atom, operand: str, config: Config):
    from cutlass import cute

    threads_per_row = _row_width(_shape(operand, config)[1]) // VECTOR
    threads = cute.make_layout((config.threads // threads_per_row, threads_per_row), stride=(threads_per_row, 1))
    return cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, VECTOR)))


def tile(operand: str, config: Config) -> tuple[int, int]:
    """(rows, columns) of an operand's tile."""
    rows, columns = _shape(operand, config)[:2]
    return rows, columns


def _row_width(columns: int) -> int:
    return 64 if columns % 64 == 0 else 32


def _shape(operand: str, config: Config) -> tuple[int, ...]:
    return {
        "Q": (config.tile_m, config.tile_d),
        "K": (config.tile_n, config.tile_d, config.stages),
        "V": (config.tile_n, config.tile_dv, config.stages),
        "O": (config.tile_m, config.tile_dv),
    }[operand]
