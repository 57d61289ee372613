"""What the ends of the kernels share: the log-sum-exp's way to global memory, and rounding."""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute


@cute.jit
def store_lse(mLSE, lse: cute.Tensor, where: cute.Tensor, row_first: Int32, seqlen_q: Int32):
    """Write the log-sum-exp of each row once: the thread that holds column 0 does.

    ``mLSE`` is one head's (seqlen_q) slice, ``where`` the (row, column) within the tile of the thread's outputs.
    """
    if where[0, 0][1] == 0:
        for r in cutlass.range_constexpr(cute.size(lse)):
            row = row_first + where[r, 0][0]
            if row < seqlen_q:
                mLSE[row] = lse[r]


def converted(acc: cute.Tensor, dtype) -> cute.Tensor:
    """A copy of an fp32 fragment in the output's dtype, in the same layout."""
    out = cute.make_rmem_tensor_like(acc, dtype)
    out.store(acc.load().to(dtype))
    return out
