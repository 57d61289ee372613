"""Layouts of the ``tma_wgmma`` mechanism's backward pass, for heads up to 128 wide.

A block owns ``tile_n`` keys, 64 for each computing warpgroup, and walks over query tiles. Everything is transposed: a
warpgroup's scores are (64 keys × ``tile_m`` queries), so that Pᵀ and dSᵀ, as they lie in registers, are the A operands of
dV and dK. dS takes the way through shared memory, where dQ's product reads all of its keys; each warpgroup computes a
64 × 64 piece of the tile's dQ.

Shared memory is swizzled as in ``wgmma``.
"""

from __future__ import annotations

from . import base, wgmma_wide
from .base import BYTES, FRAGMENT_A, FRAGMENT_C, FRAGMENT_THREADS, Box, Config, Copy, Layout, Mma, element, swizzle_atom
from .wgmma import BARRIER_BYTES, ROWS_PER_WARPGROUP, SMEM_ALIGN, WARPGROUP

__all__ = ["SMEM_ALIGN", "WARPGROUP", "element"]

TILE_DIMS = (64, 128)
OPERANDS = ("K", "V", "Q", "dO", "dS", "dK", "dV")
ROLES = ("S", "dP", "dV", "dK", "dQ")
READS = {"S": ("K", "Q"), "dP": ("V", "dO"), "dV": ("", "dO"), "dK": ("", "Q"), "dQ": ("dS", "K")}
PIECE = 64  # rows and columns of the dQ that a warpgroup computes
ACCUMULATOR_BYTES = 4
DS_STAGES = 2  # a warpgroup writes the next dS while the other's dQ may still read this one
OVER = {"dK": "K", "dV": "V"}  # whose shared memory an operand takes
WARPS = {"K": (0,), "Q": (0,), "V": (1,), "dO": (1,), "dQ": (2, 3)}  # that copy it, or add it, in turns


def tile_dim(head_dim: int) -> int:
    """Columns a head of ``head_dim`` takes in shared memory."""
    return next(d for d in TILE_DIMS if d >= head_dim)


def configs(problem, table, wide, registers: tuple[int, int], target: str) -> tuple[Config, ...]:
    """The configuration for ``problem`` from a GPU's table, the wider padded head dim -> fields of Config; for heads wider
    than any there, which ``wgmma_wide`` lays out, from ``wide``. ``registers`` are of a computing and a copying thread."""
    wider = max(problem.head_dim, problem.head_dim_v)
    if wider <= max(table):
        wider = tile_dim(wider)
        choice = {"tile_d": wider, "tile_dv": wider, "backward": "tma_wgmma_backward", **table[wider]}
        choice["mma_warps"] = choice["tile_n"] // ROWS_PER_WARPGROUP * 4
    else:
        dims = wgmma_wide.tile_dim(problem.head_dim), wgmma_wide.tile_dim(problem.head_dim_v)
        choice = {"tile_d": dims[0], "tile_dv": dims[1], "backward": "tma_wgmma_wide", "mma_warps": 8, **wide}
    return (
        Config(
            target=target,
            mechanism="tma_wgmma",
            dtype=problem.dtype,
            mma_registers=registers[0],
            copy_registers=registers[1],
            **choice,
        ),
    )


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.tile_n // ROWS_PER_WARPGROUP


def pieces(config: Config) -> list[tuple[int, int]]:
    """(row, column) within a query tile where each warpgroup's piece of dQ begins."""
    rows = config.tile_m // PIECE
    return [(w % rows * PIECE, w // rows * PIECE) for w in range(warpgroups(config))]


def piece_shape(config: Config) -> tuple[int, int]:
    """(rows, columns) of such a piece."""
    return PIECE, PIECE


def stages(operand: str, config: Config) -> int:
    """Tiles of an operand that shared memory has room for."""
    return {"Q": config.stages, "dO": config.stages, "dS": DS_STAGES}.get(operand, 1)


def sums(config: Config) -> Layout:
    """dQ in float32 on its way to global memory and there, ``(thread, value, warpgroup)``."""
    return base.in_turns(WARPGROUP, PIECE * PIECE // WARPGROUP, config.add_width, warpgroups(config))


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. dK lies over K and dV over V, once their products are done."""
    warps_rows = warpgroups(config) * ROWS_PER_WARPGROUP
    return {
        "K": warps_rows * config.tile_d * BYTES,
        "V": warps_rows * config.tile_dv * BYTES,
        "Q": config.stages * config.tile_m * config.tile_d * BYTES,
        "dO": config.stages * config.tile_m * config.tile_dv * BYTES,
        "dS": DS_STAGES * warps_rows * config.tile_m * BYTES,
        "dQ": warpgroups(config) * PIECE * PIECE * ACCUMULATOR_BYTES,
        "rows": config.stages * 2 * config.tile_m * ACCUMULATOR_BYTES,
        "barriers": BARRIER_BYTES * 2 * (2 + 2 * config.stages),
    }


def smem_bytes(config: Config) -> int:
    """Shared memory of a block, with the worst padding that aligning the parts can cost."""
    return sum(smem_parts(config).values()) + SMEM_ALIGN


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs for dK, dV, P, dP and P in the operands' dtype at once."""
    return (config.tile_d + config.tile_dv) // 2 + config.tile_m + config.tile_m // 4


def tile(operand: str, config: Config) -> tuple[int, int]:
    """(rows, columns) of one slot of an operand: what one TMA copy moves."""
    rows, columns, _ = _shape(operand, config)
    return rows, columns


def slot_bytes(operand: str, config: Config) -> int:
    """Bytes one TMA load brings: padding counts, since TMA fills it with zeros."""
    rows, columns = tile(operand, config)
    return rows * columns * BYTES


def smem(operand: str, config: Config) -> Layout:
    """An operand in shared memory: ``(64, columns, warpgroup)`` for K, V, dK, dV and ``(64, tile_m, warpgroup, stage)``
    for dS as (keys, queries); ``(tile_m, columns, stage)`` for Q and dO.

    The swizzle goes into a pointer: it acts on the address in bytes.
    """
    bits, lowest, shift, width = swizzle_atom(tile(operand, config)[1])
    on_bytes = (bits, lowest + BYTES.bit_length() - 1, shift)
    return base.tiled_rows(_shape(operand, config), width, on_bytes, 1)


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of a role, named after what it computes.

    ``"S"``: Sᵀ = K·Qᵀ and ``"dP"``: dPᵀ = V·dOᵀ, both operands from shared memory; ``"dV"``: Pᵀ·dO and ``"dK"``: dSᵀ·Q,
    A from registers; ``"dQ"``: a piece of dS·K, both from shared memory, dS transposed on the way.
    """
    n = {"S": config.tile_m, "dP": config.tile_m, "dV": config.tile_dv, "dK": config.tile_d, "dQ": PIECE}[role]
    m, k = ROWS_PER_WARPGROUP, 16
    threads = (*FRAGMENT_THREADS, (4, 16, 0))
    in_registers = role in ("dV", "dK")
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
    found: dict[tuple[str, str], Copy | Box] = {("in", name): _box(name, config) for name in ("K", "V", "Q", "dO")}
    for name, role in (("dS", "S"), ("dK", "dK"), ("dV", "dV")):
        found["store", name] = _store(name, role, config)
    for name in ("dK", "dV"):
        found["out", name] = _box(name, config, store=True)
    return found


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1, "dS": 1, "dQ": (len(WARPS["dQ"]) + 1) * warpgroups(config), "epilogues": warpgroups(config)}


def _store(operand: str, role: str, config: Config) -> Copy:
    what = mma(role, config)
    return Copy("stmatrix", operand, what.tile[:2], what.c)


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
    a_major = OperandMajorMode.MN if role == "dQ" else OperandMajorMode.K  # dS lies along its queries
    b_major = OperandMajorMode.K if role in ("S", "dP") else OperandMajorMode.MN
    return cute.make_tiled_mma(warpgroup.MmaF16BF16Op(element(config), cutlass.Float32, what.shape, source, a_major, b_major))


def smem_layout(operand: str, config: Config):
    """:func:`smem` as the DSL's object."""
    return base.cute_layout(smem(operand, config))


def copy_in(operand: str, config: Config):
    """The TMA load of one slot of K, V, Q or dO."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileG2SOp()


def copy_out(operand: str, config: Config):
    """The TMA store of one warpgroup's rows of dK or dV."""
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


def _shape(operand: str, config: Config) -> tuple[int, ...]:
    w = warpgroups(config)
    return {
        "K": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "V": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "dK": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "dV": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "Q": (config.tile_m, config.tile_d, config.stages),
        "dO": (config.tile_m, config.tile_dv, config.stages),
        "dS": (ROWS_PER_WARPGROUP, config.tile_m, w * DS_STAGES),
    }[operand]
