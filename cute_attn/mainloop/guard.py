"""What a row doesn't see must not reach it, whatever lies there.

A mask gives a key that a row does not see a probability of exactly 0. But a tensor core multiplies whole tiles, and 0 times an
infinity or a NaN is NaN: in a tile that some rows see and others don't, a value that is not finite would get from the former's
key into the latter's sum. Memory that nobody has written yet holds such values. So, where there is a mask at all:

- **Forward**, a block looks at its outputs. If one is not finite, it does its query tiles once more, from **careful copies**: a
  key whose value isn't finite comes as a key of NaN with a value of zeros. A row that sees it scores NaN, and so becomes NaN
  as a whole; for others the mask takes the score away, and 0 · 0 is left. For a row that sees no such key nothing changes.
- **Backward**, every row that sees such a key, or is not finite itself, is known before the first product, by its log-sum-exp
  or its delta. The kernel that makes these *marks* the row (its log-sum-exp becomes the lowest finite number, its delta 0) and
  says so in a word of global memory, which makes the next kernel's copies careful: marked rows of Q and dO, and rows of K and V
  of which either isn't finite, come as zeros. Then P is infinite where a marked row sees a key, and ∞ · 0 = NaN in every
  gradient that it has a part in; elsewhere P is 0, and so is the product.

A careful copy is a slow one, of threads that take a row each.

One case gets through: an infinity in K that leaves a row which sees it finite, since its score is −∞, or ±cap under a softcap.
It marks no row; in the backward pass it then makes NaN of dQ in up to a tile of rows or, if another row has been marked, gives
gradients that mean nothing. (Not in the reference, where only dQ's product takes the key as zeros.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.layouts.base import VECTOR

LOWEST = -3.4028234663852886e38  # of float32: the log-sum-exp of a marked row


@cute.jit
def not_finite(acc: cute.Tensor) -> Boolean:
    """Whether any of a thread's values is an infinity or a NaN: then 0 times it is NaN."""
    sums = cute.make_rmem_tensor(4, Float32)  # four chains: none waits for the last sum
    sums.fill(0.0)
    for i in cutlass.range_constexpr(cute.size(acc)):
        sums[i % 4] = sums[i % 4] + acc[i] * 0.0
    return (sums[0] + sums[1]) + (sums[2] + sums[3]) != 0.0


def block_any(condition: Boolean) -> Boolean:
    """Whether the condition holds for any thread of the block: a barrier of all of them."""
    found = cute.arch.inline_ptx(
        "{ .reg .pred mine, any; setp.ne.s32 mine, {$r0}, 0; barrier.cta.red.or.pred any, 0, mine;"
        " selp.s32 {$w0}, 1, 0, any; }",
        write_only_types=[Int32],
        read_only_args=[Int32(condition)],
    )
    return found != 0


@cute.jit
def finite_row(m: cute.Tensor, row: Int32) -> Boolean:
    """Whether a row of ``(rows, columns)`` in global memory is finite."""
    total = Float32(0.0)
    for c in cutlass.range(m.shape[1] // VECTOR, unroll=1):
        total += (load_vector(m, row, c).to(Float32) * 0.0).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
    return total == 0.0


def load_vector(m: cute.Tensor, row, column):
    """16 bytes of a row of ``(rows, columns)`` in global memory; ``column`` counts vectors."""
    source = cute.local_tile(m, (1, VECTOR), (row, column))
    held = cute.make_rmem_tensor(VECTOR, source.element_type)
    cute.autovec_copy(cute.make_tensor(source.iterator, held.layout), held)
    return held.load()


@dataclass(frozen=True)
class FiniteRows:
    """Keeps the rows that are finite in all of some tensors (rows, columns) of one head."""

    tensors: tuple[cute.Tensor, ...]

    def __call__(self, row: Int32) -> Boolean:
        kept = finite_row(self.tensors[0], row)
        for m in self.tensors[1:]:
            kept = kept & finite_row(m, row)
        return kept


@dataclass(frozen=True)
class UnmarkedRows:
    """Keeps the rows that are not marked, by the log-sum-exp (rows) of one head."""

    lse_raw: cute.Tensor

    def __call__(self, row: Int32) -> Boolean:
        return self.lse_raw[row] != LOWEST


@cute.jit
def copy_carefully(
    source: cute.Tensor, into: cute.Tensor, first: Int32, threads, keeps: cutlass.Constexpr[Any], instead: cutlass.Constexpr
):
    """Copy the rows from ``first`` on of ``(rows, columns)`` in global memory to a tile in shared memory. A row that ``keeps``
    does not keep is all ``instead``; what lies outside the tensor is zeros. ``threads`` is (this thread, how many)."""
    rows, columns = cute.product_each(into.shape)
    for r in cutlass.range(threads[0], rows, threads[1], unroll=1):
        row = first + r
        exists = row < source.shape[0]
        kept = exists
        if exists:
            kept = keeps(row)
        fill = Float32(instead) if exists else Float32(0.0)
        for c in cutlass.range(columns // VECTOR, unroll=1):
            piece = cute.make_rmem_tensor(VECTOR, source.element_type)
            piece.fill(fill.to(source.element_type))
            if kept:
                piece.fill(Float32(0.0).to(source.element_type))
                if c * VECTOR < source.shape[1]:
                    piece.store(load_vector(source, row, c))
            for j in cutlass.range_constexpr(VECTOR):
                into[r, c * VECTOR + j] = piece[j]
