"""Two partial results of the same rows as one, in one kernel: what ``reference.merge`` is in torch, on a GPU.

Each row's output and log-sum-exp, of keys so far and of more keys, are read once and written once: memory is all it waits for.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, cute

from cute_attn.fields import MERGE, named
from cute_attn.layouts.base import VECTOR


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.MERGE`'s values to compile.

    ``into``, ``so_far`` and ``more`` are ``(batch, rows, heads, head_dim_v)``, log-sum-exps ``(batch, heads, rows)``. Where
    there is no ``so_far``, that is in ``into``; ``lse`` becomes that of both.
    """
    kernel = Merge(problem)

    @cute.jit
    def merge(*arguments):
        given = named(MERGE, arguments)
        so_far = given.into if cutlass.const_expr(given.so_far is None) else given.so_far
        kernel.launch(given.into, so_far, given.lse, given.more, given.lse_more, given.to_log2, given.stream)

    return merge


class Merge:
    """A few threads of one warp have a row of one head, 8 columns each; a block has as many rows as it has threads for."""

    THREADS = 256

    def __init__(self, problem):
        self.threads_per_row = 4
        while self.threads_per_row * VECTOR < problem.head_dim_v:
            self.threads_per_row *= 2
        self.rows = self.THREADS // self.threads_per_row

    @cute.jit
    def launch(self, mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2: Float32, stream):
        batch, rows, heads, _ = mInto.shape
        self.kernel(mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2).launch(
            grid=[cute.ceil_div(batch * rows * heads, self.rows), 1, 1], block=[self.THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2: Float32):
        batches, rows, heads, columns = mInto.shape
        thread = cute.arch.thread_idx()[0]
        index, place = cute.arch.block_idx()[0] * self.rows + thread // self.threads_per_row, thread % self.threads_per_row
        of_row = index // heads  # as the outputs lie in memory
        batch = of_row // rows
        head, row = index - of_row * heads, of_row - batch * rows
        exists = batch < batches
        works = exists and place * VECTOR < columns
        lse, lse_more = -Float32.inf, -Float32.inf
        if exists:
            lse, lse_more = mLSE[batch, head, row], mLSE_more[batch, head, row]
        so_far, more = (cute.make_rmem_tensor(VECTOR, m.element_type) for m in (mSoFar, mMore))
        if works:  # here, and not where they are used: all loads are on their way before one is waited for
            for m, held in ((mSoFar, so_far), (mMore, more)):
                cute.autovec_copy(_vector(m, (batch, row, head), place), held)
        most = cute.arch.fmax(lse, lse_more)  # the other one of a NaN, which shows in its weight
        anchor = Float32(0.0) if most == -Float32.inf else most
        weight, weight_more = (cute.math.exp2((x - anchor) * to_log2, fastmath=True) for x in (lse, lse_more))
        total = weight + weight_more
        normalize = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
        cute.arch.sync_warp()  # all of a row's threads have read what one of them writes
        if exists and place == 0:
            mLSE[batch, head, row] = anchor + cute.math.log2(total, fastmath=True) * cute.arch.rcp_approx(to_log2)
        if works:
            result = cute.make_rmem_tensor(VECTOR, Float32)
            scaled, scaled_more = (x.load().to(Float32) * (w * normalize) for x, w in ((so_far, weight), (more, weight_more)))
            result.store(scaled + scaled_more)
            cute.autovec_copy(result, _vector(mInto, (batch, row, head), place))


def _vector(m: cute.Tensor, where: tuple, place) -> cute.Tensor:
    """8 columns of a row in memory."""
    begin = cute.local_tile(m[(*where, None)], (VECTOR,), (place,)).iterator.align(16)
    return cute.make_tensor(begin, cute.make_layout(VECTOR))
