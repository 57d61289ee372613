"""What the families of warpgroup MMA share: operands in swizzled shared memory, copied by TMA.

Shared memory is cut into 128-byte rows of 64 elements (64-byte rows of 32 where a head is 96 wide, 32-byte ones of 16 where
a product reads it in pieces of 48 columns), swizzled as WGMMA's descriptors and TMA's boxes both understand: ``Sw<3,4,3>``
(or ``Sw<2,4,3>``, ``Sw<1,4,3>``) over 8 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import base
from .base import BYTES, FRAGMENT_A, FRAGMENT_C, FRAGMENT_THREADS, Box, Config, Copy, Layout, Mma, element, swizzle_atom

ROWS_PER_WARPGROUP = 64
WARPGROUP = 128  # threads
BARRIER_BYTES = 8
WORK_SLOTS, WORK_FIELDS = 4, 8  # tiles that a block's warps are told of ahead of time, and int32 that say what one is
SMEM_ALIGN = 1024  # a swizzle atom is 8 rows of 128 bytes


def warpgroup_mma(n: int, in_registers: bool) -> Mma:
    """64 rows and ``n`` columns; B comes from shared memory, A too or, as an accumulator has left it, from registers."""
    m, k = ROWS_PER_WARPGROUP, 16
    threads = (*FRAGMENT_THREADS, (4, 16, 0))
    return Mma(
        shape=(m, n, k),
        tile=(m, n, k),
        warps=4,
        a=base.by_modes((m, k), threads, FRAGMENT_A) if in_registers else Layout((WARPGROUP, (m, k)), (0, (1, m))),
        b=Layout((WARPGROUP, (n, k)), (0, (1, n))),
        c=base.by_modes((m, n), threads, (*FRAGMENT_C, (n // 8, 0, 8))),
        from_shared="B" if in_registers else "AB",
    )


def in_registers_misfit(config: Config) -> tuple[bool, str]:
    """Whether the columns of an operand A that threads are to hold are no whole fragments, and the words for it."""
    name, of = ("k_in_registers", "K") if config.backward else ("q_in_registers", "Q")
    columns = getattr(config, name)
    return columns % 16 > 0, f"{columns} columns of {of} in registers; a multiple of 16 is needed: try {name}=64"


@dataclass(frozen=True)
class Family:
    """What a family says of its operands and products; the methods are the rest of the contract."""

    shape: Callable[[str, Config], tuple[int, int, int]]  # (rows, columns, slots) of an operand
    smem_parts: Callable[[Config], dict[str, int]]
    mma: Callable[[str, Config], Mma]
    loaded: tuple[str, ...]  # operands that come from global memory
    stored: dict[str, str]  # operands that come from registers, and the products whose accumulators' order they have there
    results: tuple[str, ...]  # those of them that go on to global memory
    over_rows: tuple[str, ...]  # products that sum over the rows of what they read from shared memory: it is MN-major
    over_rows_of_a: tuple[str, ...] = ()  # those of them that do so of an operand A in shared memory
    read_columns: Callable[[str, Config], int] | None = None  # that such a product reads at a time, if not all of an operand's
    # (product, operand) -> the first columns of an operand A that threads hold through a loop, for that product. One of 64
    # columns with both operands from shared memory asks for all that can be read of it.
    first_columns: Callable[[Config], dict[tuple[str, str], int]] = lambda config: {}

    def tile(self, operand: str, config: Config) -> tuple[int, int]:
        """(rows, columns) of one slot of an operand: what one TMA copy moves."""
        return self.shape(operand, config)[:2]

    def slot_bytes(self, operand: str, config: Config) -> int:
        """Bytes one TMA load brings: padding counts, since TMA fills it with zeros."""
        rows, columns = self.tile(operand, config)
        return rows * columns * BYTES

    def smem_bytes(self, config: Config) -> int:
        """Shared memory of a block, with the worst padding that aligning the parts can cost."""
        return sum(self.smem_parts(config).values()) + SMEM_ALIGN

    def smem(self, operand: str, config: Config, times: int = 1) -> Layout:
        """An operand in shared memory, ``(rows, columns, slot)``, with so many ``times`` its slots. The swizzle goes into a
        pointer: it acts on the address in bytes."""
        rows, columns, slots = self.shape(operand, config)
        bits, lowest, shift, width = self._swizzle_atom(operand, config)
        on_bytes = (bits, lowest + BYTES.bit_length() - 1, shift)
        return base.tiled_rows((rows, columns, slots * times), width, on_bytes, 1)

    def _swizzle_atom(self, operand: str, config: Config) -> tuple[int, int, int, int]:
        columns = self.tile(operand, config)[1] if self.read_columns is None else self.read_columns(operand, config)
        return swizzle_atom(columns)

    def copies(self, config: Config) -> dict[tuple[str, str], Copy | Box]:
        """Every copy by (step, operand): ``in`` from global memory and ``out`` to it by TMA, ``store`` from an accumulator
        to shared memory, ``load`` and the product of columns that threads hold."""
        found: dict[tuple[str, str], Copy | Box] = {("in", name): self._box(name, config) for name in self.loaded}
        for name, role in self.stored.items():
            what = self.mma(role, config)
            found["store", name] = Copy("stmatrix", name, what.tile[:2], what.c)
        for (role, name), columns in self.first_columns(config).items():
            if columns:
                what = self.mma(role, config)
                found[f"load {role}", name] = Copy("ldmatrix", name, (what.tile[0], what.tile[2]), what.a)
        return found | {("out", name): self._box(name, config, store=True) for name in self.results}

    def columns_in_registers(self, role: str, config: Config) -> int:
        """The first columns of a product's operand A that threads hold."""
        return next((columns for (first, _), columns in self.first_columns(config).items() if first == f"r{role}"), 0)

    def _box(self, operand: str, config: Config, store: bool = False) -> Box:
        rows, _ = self.tile(operand, config)
        width = self._swizzle_atom(operand, config)[3]
        return Box(operand, rows, width, width * BYTES, store)

    def tiled_mma(self, role: str, config: Config):
        """The product's :class:`Mma` as the DSL's object."""
        import cutlass
        from cutlass import cute
        from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

        what = self.mma(role, config)
        b_major = OperandMajorMode.MN if role in self.over_rows else OperandMajorMode.K
        a_major = OperandMajorMode.MN if role in self.over_rows_of_a else OperandMajorMode.K
        source = warpgroup.OperandSource.SMEM
        if "A" not in what.from_shared:
            a_major, source = OperandMajorMode.K, warpgroup.OperandSource.RMEM
        return cute.make_tiled_mma(
            warpgroup.MmaF16BF16Op(element(config), cutlass.Float32, what.shape, source, a_major, b_major)
        )

    def smem_layout(self, operand: str, config: Config, times: int = 1):
        """:meth:`smem` as the DSL's object."""
        return base.cute_layout(self.smem(operand, config, times))

    def load_operand(self, role: str, operand: str, config: Config):
        """Shared memory → registers, 16 columns of what threads hold: ``ldmatrix`` of four 8×8 tiles."""
        from cutlass import cute
        from cutlass.cute.nvgpu import warp

        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), element(config))
        what = self.mma(role, config)
        return cute.make_tiled_copy(atom, base.cute_layout(what.a), (what.tile[0], what.tile[2]))

    def store_accumulator(self, operand: str, config: Config):
        """Registers → shared memory: ``stmatrix`` of four 8×8 tiles, in the order of the accumulator."""
        from cutlass import cute
        from cutlass.cute.nvgpu import warp

        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), element(config))
        what = self.mma(self.stored[operand], config)
        return cute.make_tiled_copy(atom, base.cute_layout(what.c), what.tile[:2])


def copy_in(operand: str, config: Config):
    """The TMA load of one slot."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileG2SOp()


def copy_out(operand: str, config: Config):
    """The TMA store of one warpgroup's rows."""
    from cutlass.cute.nvgpu import cpasync

    return cpasync.CopyBulkTensorTileS2GOp()
