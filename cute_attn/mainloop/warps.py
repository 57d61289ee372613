"""What the kernels of ``cp_async`` share: tiles on their way from global to shared memory, operands on from there to the
registers of ``mma.sync``, and results' way back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import cute

from cute_attn import layouts
from cute_attn.epilogue import converted
from cute_attn.layouts.base import VECTOR

MMA_K = 16  # of one mma.sync


@dataclass(frozen=True)
class Stream:
    """One operand on its way from global to shared memory: this thread's part of it."""

    copy: cute.TiledCopy
    m: cute.Tensor  # (seqlen, head_dim, …)
    tXsX: cute.Tensor  # (16 bytes, rows, columns[, stage])
    tXcX: cute.Tensor  # (16 bytes, rows, columns): coordinates within the tile
    head_dim: cutlass.Constexpr[int]

    @staticmethod
    def of(lay, config, name: str, m: cute.Tensor, s: cute.Tensor, thread, head_dim: int) -> Stream:
        copy = lay.copy_in(name, config)
        part = copy.get_slice(thread)
        identity = cute.make_identity_tensor(lay.tile(name, config))
        return Stream(copy, m, part.partition_D(s), part.partition_S(identity), head_dim)

    @property
    def columns_at_once(self) -> int:
        """Columns that the threads of one row copy together."""
        return cute.size(self.copy.tiler_mn[1])

    @cute.jit
    def clear_padding(self):
        """Zero the columns past head_dim in every slot, once: no copy ever writes them."""
        for j in cutlass.range_constexpr(cute.size(self.tXcX, mode=[2])):
            if cutlass.const_expr((j + 1) * self.columns_at_once > self.head_dim):
                if self.tXcX[0, 0, j][1] >= self.head_dim:
                    self.tXsX[(None, None, j, *(None,) * (cute.rank(self.tXsX) - 3))].fill(0.0)

    @cute.jit
    def start(self, row_first, end, slot: cutlass.Constexpr = (), part: cutlass.Constexpr = None, m: cute.Tensor | None = None):
        """Start this thread's copies of one tile of ``m`` (seqlen, head_dim), if not of the stream's own, to a slot, 16 bytes
        at a time. Rows from ``end`` on are read as the one before it. ``part``: only the columns of one pass of the threads."""
        m = self.m if cutlass.const_expr(m is None) else m
        into = self.tXsX[(None, None, None, *slot)]
        vector = cute.size(into, mode=[0])
        passes = (0, cute.size(into, mode=[2])) if part is None else (part, part + 1)
        for i in cutlass.range_constexpr(cute.size(into, mode=[1])):
            row = cutlass.min(row_first + self.tXcX[0, i, 0][0], end - 1)
            for j in cutlass.range_constexpr(*passes):
                column = self.tXcX[0, i, j][1]
                source = cute.local_tile(m, (1, vector), (row, column // vector))
                source = cute.make_tensor(source.iterator, into[None, i, j].layout)
                if cutlass.const_expr((j + 1) * self.columns_at_once <= self.head_dim):
                    cute.copy(self.copy, source, into[None, i, j])
                elif cutlass.const_expr(j * self.columns_at_once < self.head_dim):
                    if column < self.head_dim:
                        cute.copy(self.copy, source, into[None, i, j])

    @cute.jit
    def start_row(self, i: cutlass.Constexpr[int], place, head, slot):
        """Start this thread's copies of its i-th row of a tile to a slot, from ``place`` = (element, row) of a cache
        ``(elements, rows, heads, head_dim)``, which is read once: first to leave the L2 cache, where instructions and page
        numbers stay."""
        source, into = self.m[place[0], place[1], head, None], self.tXsX[None, i, None, slot]
        vector, moved = cute.size(into, mode=[0]), swizzled_by(self.tXsX.iterator)  # the rest of it is in the rows' strides
        for j in cutlass.range_constexpr(cute.size(into, mode=[1])):
            column, there = self.tXcX[0, i, j][1], into[None, j].iterator.toint() + moved
            begin = cute.local_tile(source, (vector,), (column // vector,)).iterator.toint()
            if cutlass.const_expr((j + 1) * self.columns_at_once <= self.head_dim):
                copy_once(begin, there)
            elif cutlass.const_expr(j * self.columns_at_once < self.head_dim):
                if column < self.head_dim:
                    copy_once(begin, there)


def swizzled_by(pointer: cute.Pointer) -> Any:
    """How far from where a pointer to shared memory says that it points it does: pieces of 16 bytes change places in a row."""
    found = re.search(r"S<(\d+),(\d+),(\d+)>", str(pointer.type))
    if found is None:
        return 0
    address, (bits, lowest, shift) = pointer.toint(), map(int, found.groups())
    return (address ^ (address >> shift & (2**bits - 1) << lowest)) - address


def copy_once(source: Any, into: Any) -> None:
    """Start copying 16 bytes from an address in global to one in shared memory, for which nobody asks the L2 cache again."""
    policy = cute.arch.inline_ptx("createpolicy.fractional.L2::evict_first.b64 {$w0}, 1.0;", write_only_types=[cutlass.Int64])
    ptx = "cp.async.cg.shared.global.L2::cache_hint [{$r0}], [{$r1}], 16, {$r2};"
    cute.arch.inline_ptx(ptx, read_only_args=[into, source, policy])


def copy_word(source: Any, into: Any) -> None:
    """Start copying 4 bytes from an address in global to one in shared memory."""
    cute.arch.inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[into, source])


@dataclass(frozen=True)
class LdmatrixOperand:
    """One operand on its way from shared memory to an MMA's registers, a step in k at a time."""

    copy: cute.TiledCopy
    source: cute.Tensor  # (copy, rows, K[, stage]): shared memory
    into: cute.Tensor  # (copy, rows): the fragment as ldmatrix writes it
    fragment: cute.Tensor  # (MMA, rows): the same registers as the MMA reads them

    @staticmethod
    def of(copy: cute.TiledCopy, s: cute.Tensor, shape, thread) -> LdmatrixOperand:
        """``shape`` (MMA, rows, 1) is that of a step's fragment."""
        part, fragment = copy.get_slice(thread), cute.make_rmem_tensor(shape, s.element_type)
        into = part.retile(fragment)
        return LdmatrixOperand(copy, part.partition_S(s), into[None, None, 0], fragment[None, None, 0])

    def load(self, step, slot=(), row: int = 0) -> cute.Tensor:
        """Fill the fragment with a step's part of ``slot`` and return it. ``row`` is the first block of rows, where the
        fragment is of a part of what lies in shared memory."""
        for r in range(cute.size(self.into, mode=[1])):
            cute.copy(self.copy, self.source[(None, row + r, step, *slot)], self.into[None, r])
        return self.fragment


def product(mma: cute.TiledMma, acc: cute.Tensor, steps: int, a, b, first: int = 0) -> None:
    """``acc += A·B`` of the steps from ``first`` on; ``a`` and ``b`` give the operands' registers of a step, just in time."""
    for k in range(first, steps):
        cute.gemm(mma, acc, a(k), b(k), acc)


class WarpKernel:
    """The kernel of one (problem, config): what those whose warps all copy and multiply need to set up, and how their
    results leave."""

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.lay = layouts.family(config)

    def tensor(self, smem, name: str) -> cute.Tensor:
        """Shared memory of an operand."""
        lay, config = self.lay, self.config
        return smem.allocate_tensor(lay.element(config), lay.smem_layout(name, config), lay.SMEM_ALIGN)

    def over(self, name: str, other: cute.Tensor) -> cute.Tensor:
        """An operand in the shared memory of another."""
        return cute.make_tensor(other.iterator, self.lay.smem_layout(name, self.config))

    def stream(self, name: str, m: cute.Tensor, s: cute.Tensor, head_dim: int) -> Stream:
        return Stream.of(self.lay, self.config, name, m, s, cute.arch.thread_idx()[0], head_dim)

    def to_shared(self, copy: cute.TiledCopy, acc: cute.Tensor, s: cute.Tensor):
        """An accumulator, rounded, to shared memory."""
        part = copy.get_slice(cute.arch.thread_idx()[0])
        cute.copy(copy, part.retile(converted(acc, s.element_type)), part.partition_D(s))

    @cute.jit
    def to_global(self, name: cutlass.Constexpr, s: cute.Tensor, m: cute.Tensor, row_first, head_dim: cutlass.Constexpr):
        """From there to ``m`` (seqlen, head_dim), 16 bytes a thread, of the rows and columns that exist."""
        copy = self.lay.copy_out(name, self.config)
        part = copy.get_slice(cute.arch.thread_idx()[0])
        tXsX = part.partition_S(s)
        tXcX = part.partition_S(cute.make_identity_tensor(self.lay.tile(name, self.config)))
        for i in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
            row = row_first + tXcX[0, i, 0][0]
            for j in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
                column = tXcX[0, i, j][1]
                if (row < m.shape[0]) & (column < head_dim):
                    into = cute.local_tile(m, (1, VECTOR), (row, column // VECTOR))
                    piece = cute.make_rmem_tensor_like(tXsX[None, i, j])
                    cute.copy(copy, tXsX[None, i, j], piece)
                    cute.copy(copy, piece, cute.make_tensor(into.iterator, piece.layout))
