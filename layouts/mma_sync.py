"""Layouts of the ``cp_async`` mechanism: operands of ``mma.sync`` m16n8k16, from ``cp.async`` by way of ``ldmatrix``.

Shared memory is cut into rows of 64 elements (32 where a head is 96 wide), swizzled so that the eight 16-byte pieces
an ``ldmatrix`` phase reads, one from each of 8 rows, lie in 8 different bank groups: ``Sw<3,3,3>`` (``Sw<2,3,3>``) on
elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import base
from .base import BYTES, FRAGMENT_A, FRAGMENT_B, FRAGMENT_C, FRAGMENT_THREADS, Config, Copy, Layout, Mma, element, swizzle_atom

TILE_DIMS = (32, 64, 96, 128, 192, 256)
tile_dim = base.padded_to(TILE_DIMS)
VECTOR = base.VECTOR
ROWS_PER_MMA = 16
SMEM_ALIGN = 1024  # a swizzle atom is 8 rows of 128 bytes


def configs(problem, table, target: str, short: dict | None = None) -> tuple[Config, ...]:
    """The configuration for ``problem`` from a GPU's table: the wider padded head dim
    -> (tile_m, tile_n, stages, warps, blocks a multiprocessor). Where the same of ``short`` has one, it comes second, for few
    keys and query tiles that a right edge cuts; not where lengths are known on the device only."""
    wider = tile_dim(max(problem.head_dim, problem.head_dim_v))
    rows = [table[next(d for d in sorted(table) if d >= wider)]]
    if short and wider in short and problem.bounded_right and not problem.ragged:
        rows.append(short[wider])
    return tuple(_config(problem, row, target) for row in rows)


def _config(problem, row: tuple[int, int, int, int, int], target: str) -> Config:
    tile_m, tile_n, stages, warps, blocks = row
    tile_d, tile_dv = (
        next(d for d in TILE_DIMS if d >= head_dim and in_whole_passes(d, tile_m, tile_n, warps))
        for head_dim in (problem.head_dim, problem.head_dim_v)
    )
    return Config(
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
    )


def in_whole_passes(columns: int, tile_m: int, tile_n: int, warps: int) -> bool:
    """Whether all threads together copy tiles of so many columns in whole passes: else they would copy rows beyond. Columns
    cut into narrower rows take more rows a pass, which the narrower of two heads may have to be padded for."""
    rows = 32 * warps * VECTOR // swizzle_atom(columns)[3]
    return tile_m % rows == tile_n % rows == 0


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. O lies over Q."""
    return {
        "Q": config.tile_m * max(config.tile_d, config.tile_dv) * BYTES,
        "K": config.stages * config.tile_n * config.tile_d * BYTES,
        "V": config.stages * config.tile_n * config.tile_dv * BYTES,
    }


def accumulator_registers(config: Config) -> int:
    """Registers a thread needs for S and O at once; operands, addresses and the softmax's state come on top. P
    takes none: it replaces S 16 columns at a time, just before the MMA that reads them."""
    return config.tile_m // config.mma_warps * (config.tile_n + config.tile_dv) // 32


def misfit(config: Config) -> str:
    """What the kernel can't do: a warp computes whole instructions of rows, and tiles go round a ring."""
    queries, keys, warps = config.tile_m, config.tile_n, config.mma_warps
    rows = ROWS_PER_MMA * warps
    whole = all(in_whole_passes(columns, queries, keys, warps) for columns in (config.tile_d, config.tile_dv))
    return base.first_misfit(
        (queries % rows > 0, f"{queries} queries for {warps} warps: try tile_m={rows} or a multiple"),
        (keys % 16 > 0, f"{keys} keys a tile; a multiple of 16 is needed: try tile_n={max(keys // 16, 1) * 16}"),
        (not whole, f"tiles of {queries} and {keys} rows, which {warps} warps can't copy in whole passes: try fewer mma_warps"),
        (config.stages < 2, f"{config.stages} stages; 2 at least are needed: try stages=2 and a smaller tile_n"),
    )


def mma(role: str, config: Config) -> Mma:
    """``mma.sync`` m16n8k16 with the warps one above the other; the same for Q·Kᵀ (``"S"``) and P·V (``"O"``).

    16 columns at a time, so that one ``ldmatrix`` of four 8×8 tiles fills two MMAs' worth of B.
    """
    warps = config.mma_warps
    m, n, k = warps * ROWS_PER_MMA, 16, 16
    stacked, repeated = (*FRAGMENT_THREADS, (warps, ROWS_PER_MMA, 0)), (*FRAGMENT_THREADS, (warps, 0, 0))
    return Mma(
        shape=(ROWS_PER_MMA, 8, 16),
        tile=(m, n, k),
        warps=warps,
        a=base.by_modes((m, k), stacked, FRAGMENT_A),
        b=base.by_modes((n, k), repeated, (*FRAGMENT_B, (2, 8, 0))),
        c=base.by_modes((m, n), stacked, (*FRAGMENT_C, (2, 0, 8))),
    )


def copies(config: Config) -> dict[tuple[str, str], Copy]:
    """Every tiled copy by (step, operand): ``in`` from global memory, ``load`` to the MMA's registers, ``store``
    back to shared memory and ``out`` to global memory."""
    s, o = mma("S", config), mma("O", config)
    found = {("in", name): _family.by_rows("cp.async", name, config) for name in ("Q", "K", "V")}
    found["load", "Q"] = Copy("ldmatrix", "Q", (s.tile[0], s.tile[2]), s.a)
    found["load", "K"] = Copy("ldmatrix", "K", s.tile[1:], s.b)
    found["load", "V"] = Copy("ldmatrix.trans", "V", o.tile[1:], o.b, transposed=True)
    found["store", "O"] = Copy("st.shared.b32", "O", o.tile[:2], o.c)
    found["out", "O"] = _family.by_rows("ld.shared.b128, st.global.b128", "O", config)
    return found


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    return {"the block": 1}


def _shape(operand: str, config: Config) -> tuple[int, ...]:
    """``(tile_m, columns)`` of Q and O, ``(tile_n, columns, stage)`` of K and V."""
    return {
        "Q": (config.tile_m, config.tile_d),
        "K": (config.tile_n, config.tile_d, config.stages),
        "V": (config.tile_n, config.tile_dv, config.stages),
        "O": (config.tile_m, config.tile_dv),
    }[operand]


@dataclass(frozen=True)
class MmaSyncFamily:
    """What a family of such operands says of them and of their copies; the methods are the rest of the contract."""

    shape: Callable[[str, Config], tuple[int, ...]]  # of an operand, rows and columns first
    smem_parts: Callable[[Config], dict[str, int]]
    copies: Callable[[Config], dict[tuple[str, str], Copy]]
    mma: Callable[[str, Config], Mma]

    def tile(self, operand: str, config: Config) -> tuple[int, int]:
        """(rows, columns) of an operand's tile."""
        rows, columns = self.shape(operand, config)[:2]
        return rows, columns

    def smem(self, operand: str, config: Config) -> Layout:
        """An operand in shared memory."""
        bits, lowest, shift, width = swizzle_atom(self.tile(operand, config)[1])
        return base.tiled_rows(self.shape(operand, config), width, (bits, lowest, shift), BYTES)

    def smem_bytes(self, config: Config) -> int:
        """Shared memory of a block."""
        return sum(self.smem_parts(config).values())

    def by_rows(self, instruction: str, operand: str, config: Config) -> Copy:
        """16 bytes a thread, neighbouring threads along a row of shared memory, then the next row."""
        across = swizzle_atom(self.tile(operand, config)[1])[3] // VECTOR
        piece = (config.threads // across, across * VECTOR)
        values = base.by_modes(piece, ((across, 0, VECTOR), (piece[0], 1, 0)), ((VECTOR, 0, 1),))
        return Copy(instruction, operand, piece, values)

    def tiled_mma(self, role: str, config: Config):
        """The product's :class:`Mma` as the DSL's object."""
        import cutlass
        from cutlass import cute
        from cutlass.cute.nvgpu import warp

        what = self.mma(role, config)
        op = warp.MmaF16BF16Op(element(config), cutlass.Float32, what.shape)
        m, _, k = what.tile
        columns = cute.make_layout((8, what.across, 2), stride=(1, 16, 8))
        return cute.make_tiled_mma(op, cute.make_layout((what.warps, what.across, 1)), permutation_mnk=(m, columns, k))

    def smem_layout(self, operand: str, config: Config):
        """:meth:`smem` as the DSL's object."""
        return base.cute_layout(self.smem(operand, config))

    def copy_in(self, operand: str, config: Config):
        """Global → shared, 16 bytes a thread with ``cp.async`` past the L1 cache: neighbouring threads along a row."""
        from cutlass import cute
        from cutlass.cute.nvgpu import cpasync

        op = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
        atom = cute.make_copy_atom(op, element(config), num_bits_per_copy=128)
        return self._tiled(atom, "in", operand, config)

    def copy_out(self, operand: str, config: Config):
        """Shared → global through registers, 16 bytes a thread: neighbouring threads along a row."""
        return self._tiled(self._plain(128, config), "out", operand, config)

    def load_operand(self, step: str, operand: str, config: Config):
        """Shared memory → an MMA's fragment: ``ldmatrix`` of four 8×8 tiles, some transposed on the way."""
        from cutlass import cute
        from cutlass.cute.nvgpu import warp

        op = warp.LdMatrix8x8x16bOp(transpose=self.copies(config)[step, operand].transposed, num_matrices=4)
        return self._tiled(cute.make_copy_atom(op, element(config)), step, operand, config)

    def store_accumulator(self, operand: str, config: Config):
        """Registers → shared memory, two elements at a time, in the order of an accumulator."""
        return self._tiled(self._plain(32, config), "store", operand, config)

    def _plain(self, bits: int, config: Config):
        from cutlass import cute

        return cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), element(config), num_bits_per_copy=bits)

    def _tiled(self, atom, step: str, operand: str, config: Config):
        from cutlass import cute

        what = self.copies(config)[step, operand]
        return cute.make_tiled_copy(atom, base.cute_layout(what.values), what.tile)


# From that, the rest of the contract.
_family = MmaSyncFamily(_shape, smem_parts, copies, mma)
tile, smem, smem_layout, smem_bytes = _family.tile, _family.smem, _family.smem_layout, _family.smem_bytes
tiled_mma, copy_in, copy_out = _family.tiled_mma, _family.copy_in, _family.copy_out


def load_operand(operand: str, config: Config):
    """Shared memory → an MMA's fragment."""
    return _family.load_operand("load", operand, config)


def store_accumulator(config: Config):
    """Registers → shared memory, in the order of the accumulator of P·V."""
    return _family.store_accumulator("O", config)
