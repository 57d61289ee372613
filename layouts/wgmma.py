"""Layouts of the ``tma_wgmma`` mechanism: operands of warpgroup MMA in swizzled shared memory, copied by TMA.

Shared memory is cut into 128-byte rows of 64 elements (64-byte rows of 32 where a head is 96 wide), swizzled as WGMMA's
descriptors and TMA's boxes both understand: ``Sw<3,4,3>`` (or ``Sw<2,4,3>``) over 8 rows.
"""

from __future__ import annotations

from . import base
from .base import BYTES, FRAGMENT_A, FRAGMENT_C, FRAGMENT_THREADS, Box, Config, Copy, Layout, Mma, element, swizzle_atom

TILE_DIMS = (64, 96, 128, 192, 256)
ROWS_PER_WARPGROUP = 64
WARPGROUP = 128  # threads
BARRIER_BYTES = 8
SMEM_ALIGN = 1024  # a swizzle atom is 8 rows of 128 bytes


def tile_dim(head_dim: int) -> int:
    """Columns a head of ``head_dim`` takes in shared memory."""
    return next(d for d in TILE_DIMS if d >= head_dim)


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.tile_m // ROWS_PER_WARPGROUP


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. O lies over Q unless the config gives it memory of its own.

    Raises ``ValueError`` where O would lie over a Q of another width: a warpgroup's rows of O would then reach into
    another's rows of Q, which that one may still be reading.
    """
    if config.tile_d != config.tile_dv and not config.separate_o:
        raise ValueError(
            f"O is {config.tile_dv} columns wide and would lie over Q, which is {config.tile_d}; equal widths are needed: "
            f"try separate_o=True, with a smaller tile_n if shared memory runs out"
        )
    q = config.tile_m * config.tile_d * BYTES
    o = config.tile_m * config.tile_dv * BYTES
    return {
        "Q": q,
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


def smem(operand: str, config: Config) -> Layout:
    """An operand in shared memory: ``(64, tile_d, warpgroup)`` for Q and O, ``(tile_n, tile_d, stage)`` for K and V.

    The swizzle goes into a pointer: it acts on the address in bytes.
    """
    bits, lowest, shift, width = swizzle_atom(tile(operand, config)[1])
    on_bytes = (bits, lowest + BYTES.bit_length() - 1, shift)
    return base.tiled_rows(_shape(operand, config), width, on_bytes, 1)


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of Q·Kᵀ (``"S"``: both from shared memory) or P·V (``"O"``: P from registers)."""
    n = config.tile_n if role == "S" else config.tile_dv
    m, k = ROWS_PER_WARPGROUP, 16
    threads = (*FRAGMENT_THREADS, (4, 16, 0))
    if role == "S":
        a, from_shared = Layout((WARPGROUP, (m, k)), (0, (1, m))), "AB"
    else:
        a, from_shared = base.by_modes((m, k), threads, FRAGMENT_A), "B"
    return Mma(
        shape=(m, n, k),
        tile=(m, n, k),
        warps=4,
        a=a,
        b=Layout((WARPGROUP, (n, k)), (0, (1, n))),
        c=base.by_modes((m, n), threads, (*FRAGMENT_C, (n // 8, 0, 8))),
        from_shared=from_shared,
    )


def copies(config: Config) -> dict[tuple[str, str], Copy | Box]:
    """Every copy by (step, operand): ``in`` from global memory and ``out`` to it by TMA, ``store`` from the
    accumulator to shared memory."""
    found: dict[tuple[str, str], Copy | Box] = {("in", name): _box(name, config) for name in ("Q", "K", "V")}
    found["store", "O"] = _store(config)
    found["out", "O"] = _box("O", config, store=True)
    return found


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1, "turns": warpgroups(config), "epilogues": warpgroups(config)}


def _store(config: Config) -> Copy:
    o = mma("O", config)
    return Copy("stmatrix", "O", o.tile[:2], o.c)


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
    b_major = OperandMajorMode.K if role == "S" else OperandMajorMode.MN  # V lies along O's columns
    return cute.make_tiled_mma(
        warpgroup.MmaF16BF16Op(element(config), cutlass.Float32, what.shape, source, OperandMajorMode.K, b_major)
    )


def smem_layout(operand: str, config: Config):
    """:func:`smem` as the DSL's object."""
    return base.cute_layout(smem(operand, config))


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
    what = _store(config)
    return cute.make_tiled_copy(atom, base.cute_layout(what.values), what.tile)


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
