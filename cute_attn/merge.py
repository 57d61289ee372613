"""Two partial results of the same rows as one, in one kernel: what ``reference.merge`` is in torch, on a GPU.

Each row's output and log-sum-exp, of keys so far and of more keys, are read once and written once: memory is all it waits for.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, cute

from cute_attn.fields import MERGE, named
from cute_attn.layouts.base import VECTOR
from cute_attn.layouts.fragments import vector, vector_at
from cute_attn.softmax import anchored


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
    """A few threads of one warp have some heads of a row, of each 8 columns; a block has as many rows as it has threads for, so
    that what it reads of the log-sum-exps is of one piece, too."""

    THREADS = 256
    HEADS = 2  # of a thread: with more, fewer blocks share a multiprocessor, and fewer loads are on their way

    def __init__(self, problem):
        self.threads_per_row = 4
        while self.threads_per_row * VECTOR < problem.head_dim_v:
            self.threads_per_row *= 2
        self.rows = self.THREADS // self.threads_per_row

    @cute.jit
    def launch(self, mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2: Float32, stream):
        batch, rows, heads, _ = mInto.shape
        blocks = cute.ceil_div(heads, self.HEADS) * cute.ceil_div(rows, self.rows) * batch
        self.kernel(mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2).launch(
            grid=[blocks, 1, 1], block=[self.THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mInto, mSoFar, mLSE, mMore, mLSE_more, to_log2: Float32):
        _, rows, heads, columns = mInto.shape
        thread, index = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        groups, blocks = cute.ceil_div(heads, self.HEADS), cute.ceil_div(rows, self.rows)
        first, place = index % groups * self.HEADS, thread % self.threads_per_row
        row, batch = index // groups % blocks * self.rows + thread // self.threads_per_row, index // groups // blocks
        of_heads = [(row < rows) & (first + i < heads) for i in range(self.HEADS)]
        lse, lse_more = (cute.make_rmem_tensor(self.HEADS, Float32) for _ in range(2))
        so_far, more = (cute.make_rmem_tensor((VECTOR, self.HEADS), m.element_type) for m in (mSoFar, mMore))
        to_natural = cute.arch.rcp_approx(to_log2)
        for m in (lse, lse_more):
            m.fill(-Float32.inf)
        for i, exists in enumerate(of_heads):  # all loads are on their way before one is waited for
            if exists:
                lse[i], lse_more[i] = mLSE[batch, first + i, row], mLSE_more[batch, first + i, row]
                if place * VECTOR < columns:
                    for m, held in ((mSoFar, so_far), (mMore, more)):
                        held[None, i].store(vector(m[batch, None, first + i, None], row, place).load())
        cute.arch.sync_warp()  # all of a row's threads have read what one of them writes
        for i, exists in enumerate(of_heads):
            most = cute.arch.fmax(lse[i], lse_more[i])  # the other one of a NaN, which shows in its weight
            anchor = anchored(most)
            weight, weight_more = (cute.math.exp2((x[i] - anchor) * to_log2, fastmath=True) for x in (lse, lse_more))
            total = weight + weight_more
            normalize = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
            if exists and place == 0:
                mLSE[batch, first + i, row] = anchor + cute.math.log2(total, fastmath=True) * to_natural
            if exists and place * VECTOR < columns:
                sums = so_far[None, i].load().to(Float32) * (weight * normalize)
                sums += more[None, i].load().to(Float32) * (weight_more * normalize)
                vector_at(mInto[batch, None, first + i, None], row, place).store(sums)
