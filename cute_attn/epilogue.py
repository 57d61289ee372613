"""What the ends of the kernels share: the log-sum-exp's way to global memory, and rounding."""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute

from cute_attn.softmax import LogSumExp


def store_lse(mLSE: LogSumExp, lse: LogSumExp, where: cute.Tensor, row_first: Int32, head: Int32, batch: Int32):
    """Write what is asked for of the log-sum-exp. ``where`` is the (row, column) within the tile of the thread's outputs."""
    for m, held in ((mLSE.natural, lse.natural), (mLSE.raw, lse.raw)):
        if m is not None:
            _store_rows(m[None, head, batch], held, where, row_first)


@cute.jit
def _store_rows(m: cute.Tensor, held: cute.Tensor, where: cute.Tensor, row_first: Int32):
    """Write a value of each row once: the thread that holds column 0 does."""
    if where[0, 0][1] == 0:
        for r in cutlass.range_constexpr(cute.size(held)):
            row = row_first + where[r, 0][0]
            if row < m.shape[0]:
                m[row] = held[r]


def converted(acc: cute.Tensor, dtype) -> cute.Tensor:
    """A copy of an fp32 fragment in the output's dtype, in the same layout."""
    out = cute.make_rmem_tensor_like(acc, dtype)
    out.store(acc.load().to(dtype))
    return out
