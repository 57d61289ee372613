"""What a row doesn't see must not reach it, whatever lies there.

A mask gives a key that a row does not see a probability of exactly 0. But a tensor core multiplies whole tiles, and 0 times an
infinity or a NaN is NaN: in a tile that some rows see and others don't, a value that is not finite would get from the former's
key into the latter's sum. Memory that nobody has written yet holds such values. So, where there is a mask at all:

- **Forward**, a block looks at its outputs. If one is not finite, it does its query tiles once more, **with care**: a key whose
  value isn't finite becomes a key of NaN with a value of zeros. A row that sees it scores NaN, and so becomes NaN as a whole;
  for others the mask takes the score away, and 0 · 0 is left. For a row that sees no such key nothing changes.
- **Backward**, every row that sees such a key and is not finite for it, or is not finite itself, is known before the first
  product, by its log-sum-exp or its delta. The kernel that makes these *marks* the row (its log-sum-exp becomes the lowest
  finite number, its delta 0) and says so in a word of global memory, on which the next kernel's copies of Q and dO depend:
  marked rows come as zeros. Then P is infinite where a marked row sees a key, and ∞ · 0 = NaN in every gradient that it has a
  part in; elsewhere P is 0, and so is the product.
- **A key that is not finite** may leave a row that sees it finite: its score is −∞, or ±cap under a softcap. So a block of the
  backward pass looks at its keys. Such a key is *hidden*: zeros take its place, and its score is so low that it weighs nothing
  in any row but a marked one. That is what −∞ says; under a softcap the value of an infinite key, which does weigh, gets no
  gradient. A value that is not finite becomes zeros as well: whoever sees it is marked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.layouts.base import VECTOR
from cute_attn.layouts.fragments import rows_columns, vector, vector_at

LOWEST = -3.4028234663852886e38  # of float32: the log-sum-exp of a marked row
HIDDEN = LOWEST / 2  # the score of a hidden key: far below any row's log-sum-exp but a marked one's, and far above that


@cute.jit
def not_finite(acc: cute.Tensor) -> Boolean:
    """Whether any of a thread's values is an infinity or a NaN: then 0 times it is NaN. Rounded ones are looked at in pairs."""
    if cutlass.const_expr(acc.element_type is Float32):
        sums = cute.make_rmem_tensor(4, Float32)  # four chains: none waits for the last sum
        sums.fill(0.0)
        for i in cutlass.range_constexpr(cute.size(acc)):
            sums[i % 4] = sums[i % 4] + acc[i] * 0.0
        return (sums[0] + sums[1]) + (sums[2] + sums[3]) != 0.0
    pairs = cute.recast_tensor(acc, Int32)
    found = cute.make_rmem_tensor(2, Int32)
    found.fill(0)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        found[i % 2] = _plus_zero_times(pairs[i], found[i % 2], acc.element_type)
    return (found[0] | found[1]) != 0


def any_of(condition: Boolean, barrier: int, threads: int) -> Boolean:
    """Whether the condition holds for any of the ``threads`` that meet at a named barrier; 0 is the block's own."""
    found = cute.arch.inline_ptx(
        "{ .reg .pred mine, any; setp.ne.s32 mine, {$r0}, 0; barrier.cta.red.or.pred any, {$r1}, {$r2}, mine;"
        " selp.s32 {$w0}, 1, 0, any; }",
        write_only_types=[Int32],
        read_only_args=[Int32(condition), Int32(barrier), Int32(threads)],
    )
    return found != 0


def used_here(x: Any, dtype=Int32) -> Any:
    """``x``, but what is computed from it can't be computed ahead of time: it takes no registers until it is needed."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[dtype], read_only_args=[x])


def known_here(values: cute.Tensor | None) -> cute.Tensor | None:
    """``values`` in registers, computed by now and not where they are used, while others wait for them."""
    for i in range(0 if values is None else cute.size(values)):
        values[i] = used_here(values[i], values.element_type)
    return values


@cute.jit
def finite_row(m: cute.Tensor, row: Int32, unroll: cutlass.Constexpr[int] = 1) -> Boolean:
    """Whether a row of ``(rows, columns)`` in global or shared memory is finite."""
    found = Int32(0)  # two 16-bit sums of 0 · x: zeros, or NaN
    for c in cutlass.range(cute.size(m, mode=[1]) // VECTOR, unroll=unroll):
        pairs = cute.recast_tensor(vector(m, row, c), Int32)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            found = _plus_zero_times(pairs[i], found, m.element_type)
    return found == 0


def _plus_zero_times(x: Int32, total: Int32, dtype) -> Int32:
    """``total + 0 · x`` of two 16-bit numbers each."""
    kind = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    code = f"{{ .reg .b32 zero; mov.b32 zero, 0; fma.rn.{kind} {{$w0}}, {{$r0}}, zero, {{$r1}}; }}"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[x, total])


@cute.jit
def fill_row(m: cute.Tensor, row, value: cutlass.Constexpr[float]):
    """A row of ``(rows, columns)`` in shared memory."""
    held = cute.make_rmem_tensor(VECTOR, m.element_type)
    held.fill(m.element_type(value))
    for c in cutlass.range(cute.size(m, mode=[1]) // VECTOR, unroll=1):
        cute.autovec_copy(held, vector_at(m, row, c))


@cute.jit
def poison_keys(k: cute.Tensor, v: cute.Tensor, threads):
    """For the forward pass, in shared memory ``(keys, columns)``: a key whose value isn't finite becomes a key of NaN with a
    value of zeros. ``threads`` is (this thread, how many)."""
    for row in cutlass.range(threads[0], cute.size(v, mode=[0]), threads[1], unroll=1):
        if not finite_row(v, row):
            fill_row(k, row, math.nan)
            fill_row(v, row, 0.0)


@cute.jit
def clear_marked(tensors: cutlass.Constexpr, lse_raw: cute.Tensor, threads):
    """For the backward pass, in shared memory: zeros in the marked rows of tensors ``(rows, columns)``, and in those that see
    no key or don't exist, where there may be a marked one's values."""
    for row in cutlass.range(threads[0], cute.size(lse_raw), threads[1], unroll=1):
        if lse_raw[row] == LOWEST or lse_raw[row] == Float32.inf:
            for m in tensors:
                fill_row(m, row, 0.0)


@cute.jit
def hide_keys(k, v, hidden: cute.Tensor, threads) -> Boolean:
    """For the backward pass, in shared memory ``(keys, columns)``: keys that aren't finite become zeros and are noted in
    ``hidden`` (keys); values become zeros. Returns whether this thread found such a key. ``k`` or ``v`` may be ``None``."""
    found = Boolean(False)
    thread, count = threads
    keys = cute.size(hidden)
    if cutlass.const_expr(k is not None):
        for row in cutlass.range(thread, keys, count, unroll=1):
            finite = finite_row(k, row, 4)
            hidden[row] = cutlass.Int8(0) if finite else cutlass.Int8(1)
            if not finite:
                fill_row(k, row, 0.0)
                found = Boolean(True)
    if cutlass.const_expr(v is not None):
        # The other threads first, where there are some.
        for row in cutlass.range((thread + count // 2) % count, keys, count, unroll=1):
            if not finite_row(v, row, 4):
                fill_row(v, row, 0.0)
    return found


def of_keys(mma: cute.TiledMma, thread, hidden: cute.Tensor, queries: int) -> cute.Tensor:
    """What ``hidden`` (keys) says of the keys of a thread's scores (keys, queries)."""
    wide = cute.make_tensor(hidden.iterator, cute.make_layout((cute.size(hidden), queries), stride=(1, 0)))
    return rows_columns(mma.get_slice(thread).partition_C(wide))[None, 0]


@dataclass(frozen=True)
class FiniteRows:
    """Keeps the rows of a tensor (rows, columns) of one head that are finite; those that do not exist are."""

    m: cute.Tensor

    def __call__(self, row: Int32) -> Boolean:
        return finite_row(self.m, cutlass.min(row, self.m.shape[0] - 1)) | (row >= self.m.shape[0])


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
    rows, columns = (cute.size(into, mode=[i]) for i in range(2))
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
                    piece.store(vector(source, row, c).load())
            cute.autovec_copy(piece, vector_at(into, r, c))
