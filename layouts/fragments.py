"""Views of tensors that are common to ``mma.sync`` and warpgroup MMA: of accumulators, and of 16 bytes of a row.

Both families hold an accumulator tile as ``((2, 2, N), M, N')``: within a thread, the first 2 runs along a row, the
second steps down 8 rows, and ``N`` (warpgroup MMA only; one instruction is N × 8 columns wide) and ``N'`` go on along the row.
The four threads of a quad share a row.
"""

from __future__ import annotations

from cutlass import cute

from cute_attn.layouts.base import VECTOR

THREADS_PER_ROW = 4


def rows_columns(acc: cute.Tensor) -> cute.Tensor:
    """The accumulator as ``(rows of this thread, columns of this thread)``."""
    (pair, half, *wide), m, n = acc.layout.shape
    (pair_s, half_s, *wide_s), m_s, n_s = acc.layout.stride
    layout = cute.make_layout(
        ((half, m), (pair, *wide, n)),
        stride=((half_s, m_s), (pair_s, *wide_s, n_s)),
    )
    return cute.make_tensor(acc.iterator, layout)


def halves(acc: cute.Tensor) -> tuple[cute.Tensor, cute.Tensor]:
    """An accumulator of warpgroup MMA as that of its first half of columns and that of the others."""
    (pair, half, wide), m, n = acc.layout.shape
    layout = cute.make_layout(((pair, half, wide // 2), m, n), stride=acc.layout.stride)
    return cute.make_tensor(acc.iterator, layout), cute.make_tensor(acc.iterator + wide // 2 * acc.layout.stride[0][2], layout)


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """The accumulator of S as the A operand ``((2, 2, 2), M, K)`` of P·V: same thread, same rows, 16 columns an MMA."""
    (pair, half, *wide), m, n = acc.layout.shape
    (pair_s, half_s, *wide_s), m_s, n_s = acc.layout.stride
    columns, stride = (wide[0], wide_s[0]) if wide else (n, n_s)
    layout = cute.make_layout(
        ((pair, half, 2), m, columns // 2),
        stride=((pair_s, half_s, stride), m_s, 2 * stride),
    )
    return cute.make_tensor(acc.iterator, layout)


def transposed(s: cute.Tensor) -> cute.Tensor:
    """``(rows, columns[, stage])`` in shared memory seen as ``(columns, rows[, stage])``: V as the B operand of P·V."""
    layout = s.layout
    modes = [1, 0, *range(2, cute.rank(layout))]
    if isinstance(layout, cute.ComposedLayout):
        outer = cute.select(layout.outer, mode=modes)
        return cute.make_tensor(s.iterator, cute.make_composed_layout(layout.inner, layout.offset, outer))
    return cute.make_tensor(s.iterator, cute.select(layout, mode=modes))


def vector(m: cute.Tensor, row, column, **how) -> cute.Tensor:
    """16 bytes of a row of ``(rows, columns)`` in global or shared memory, in registers; ``column`` counts vectors. ``how`` is
    what ``autovec_copy`` takes besides."""
    source = vector_at(m, row, column)
    held = cute.make_rmem_tensor(VECTOR, source.element_type)
    cute.autovec_copy(source, held, **how)
    return held


def vector_at(m: cute.Tensor, row, column) -> cute.Tensor:
    """Where these 16 bytes are."""
    where = cute.local_tile(m, (1, VECTOR), (row, column)).iterator.align(16)
    return cute.make_tensor(where, cute.make_layout(VECTOR))
