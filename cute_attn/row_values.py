"""The first kernel of a backward pass: delta of each query row, beside its log-sum-exp."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import cutlass
from cutlass import Float32, cute

from cute_attn.fields import first_stores
from cute_attn.layouts.base import COUNTERS, TICKET, VECTOR, row_padding
from cute_attn.layouts.fragments import vector
from cute_attn.mainloop.common import Rows, Signals
from cute_attn.mainloop.guard import LOWEST, finite_row
from cute_attn.mainloop.scores import rise_in_tile, with_rise
from cute_attn.scheduler import place_of_block
from cute_attn.sequences import Span, padded_span

# In the L1 cache it would take the place of what is on its way.
READ_ONCE = {"l1c_evict_priority": cute.nvgpu.CacheEvictionPriority.NO_ALLOCATE}


class RowValues:
    """delta of each query row, and its log-sum-exp where the mainloop reads it; and zeros in dQ's sums, or in the signals.
    A block takes twice as many rows as it has threads for, and padding is a multiple of them; of ragged sequences, for each of
    which it has to search, as many times as make the rows that are padded together."""

    THREADS = 256

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.threads_per_row = 4
        while self.threads_per_row * VECTOR < problem.head_dim_v:
            self.threads_per_row *= 2
        self.at_once = 2  # rows of a thread
        self.queries_at_once = config.step_m or config.tile_m  # whose scores the mainloop takes
        self.apart = math.gcd(self.THREADS // self.threads_per_row, row_padding(config) // self.at_once)
        self.threads = self.apart * self.threads_per_row
        self.rows = self.at_once * self.apart
        self.steps = row_padding(config) // self.rows if problem.ragged else 1
        # Whether it clears the signals, and not dQ's sums; and how many words a block of it does.
        self.clears = first_stores(problem, config)
        self.words = -(-self.rows * self.steps // config.tile_m) + COUNTERS - TICKET

    @cute.jit
    def launch(self, mQ, mO, mdO, mLSE_raw, mdLSE, rows: Rows, dq_sum, signals: Signals | None, sequences, of_ramp, stream):
        padded, heads, batch = rows.delta.shape
        mQ = mQ if self.problem.masked else None
        self.kernel(mQ, mO, mdO, mLSE_raw, mdLSE, rows, dq_sum, signals, sequences, of_ramp).launch(
            grid=[cute.ceil_div(padded, self.rows * self.steps) * heads * batch, 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,  # else registers are spared by asking for a row once the one before is done with
        )

    @cute.kernel
    def kernel(self, mQ, mO, mdO, mLSE_raw, mdLSE, rows: Rows, dq_sum, signals: Signals | None, sequences, of_ramp):
        block, head, batch = place_of_block(cute.ceil_div(rows.delta.shape[0], self.rows * self.steps), rows.delta.shape[1])
        if cutlass.const_expr(self.clears):
            signals.clear(self.words)
        where = head, batch
        inputs = mQ, mO, mdO, mLSE_raw, mdLSE
        of_place = lambda number: None if of_ramp is None else replace(of_ramp, head=head, sequence=number)  # noqa: E731
        if cutlass.const_expr(sequences is None):
            self._rows(inputs, rows, dq_sum, signals, Span(batch), where, block * self.rows, block, of_place(batch))
        else:
            span, row, number = padded_span(sequences, block * sequences.q.padding, batch)
            if row < span.length:  # nobody reads those of other tiles
                for step in cutlass.range(self.steps, unroll=1):
                    group = block * self.steps + step
                    self._rows(inputs, rows, dq_sum, signals, span, where, row + step * self.rows, group, of_place(number))

    @cute.jit
    def _rows(self, inputs, rows: Rows, dq_sum, signals: Signals | None, span: Span, where, first, group, of_ramp):
        """As many rows of a sequence as a block takes at once, from ``first`` on: ``group`` of all. All that is read is asked
        for before any of it is used. ``of_ramp`` are the values of the sequence and head, where there is a ramp."""
        mO, mdO = (span.rows(m, where[0]) for m in inputs[1:3])
        mLSE_raw = span.row_values(inputs[3], where[0])
        thread = cute.arch.thread_idx()[0]
        row, place = first + thread // self.threads_per_row, thread % self.threads_per_row
        asked, of_ramp = [], None if of_ramp is None else with_rise(of_ramp, self.problem)
        for j in cutlass.range_constexpr(self.at_once):
            # A branch around what is read would keep the next row's back until this one's is there.
            exists, read = row + j * self.apart < mO.shape[0], cutlass.min(row + j * self.apart, mO.shape[0] - 1)
            column = cutlass.min(place, self.problem.head_dim_v // VECTOR - 1)
            o, do = (vector(m, read, column, **READ_ONCE) for m in (mO, mdO))
            lse = mLSE_raw[read]
            lse = lse if exists else Float32.inf
            asked.append((o, do, lse))
        cute.arch.sync_warp()  # the compiler moves nothing that is read behind it
        for j, (o, do, lse) in enumerate(asked):
            total = (o.load().to(Float32) * do.load().to(Float32)).reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
            if cutlass.const_expr(self.threads_per_row * VECTOR > self.problem.head_dim_v):
                total = total if place * VECTOR < self.problem.head_dim_v else Float32(0.0)
            total = cute.arch.warp_reduction_sum(total, threads_in_group=self.threads_per_row)
            if place == 0:
                padded = group * self.rows + j * self.apart + thread // self.threads_per_row
                if cutlass.const_expr(of_ramp is not None):
                    lse = lse - rise_in_tile(of_ramp, self.problem, row + j * self.apart, self.queries_at_once)
                self._row(inputs, rows, signals, span, where, row + j * self.apart, padded, lse, total)
        if cutlass.const_expr(dq_sum is not None and not self.clears):
            clear = partial(self._clear, dq_sum[None, None, None, *where], group, thread)
            if cutlass.const_expr(span.length is None):  # noqa: SIM114
                clear()
            elif first // self.config.tile_m * self.config.tile_m < span.length:  # nobody reads the sums of other tiles
                clear()

    @cute.jit
    def _row(self, inputs, rows: Rows, signals: Signals | None, span: Span, where, row, padded, lse, total):
        """Of one row, whose dO · O is ``total``, to its place in what is padded."""
        mQ, mO, _, _, mdLSE = inputs
        head, batch = where
        delta = Float32(0.0)
        if row < span.rows(mO, head).shape[0]:
            if lse != Float32.inf:
                delta = total
                if cutlass.const_expr(mdLSE is not None):
                    delta = total - span.row_values(mdLSE, head)[row]
            if cutlass.const_expr(self.problem.masked):
                lse, delta = self._marked(span.rows(mQ, head), row, total, lse, delta, signals)
        rows.lse_raw[padded, head, batch] = lse
        rows.delta[padded, head, batch] = delta

    @cute.jit
    def _marked(self, mQ: cute.Tensor, row, total, lse, delta, signals: Signals):
        """``(lse_raw, delta)`` of a row, marked if something in it, or that it sees, is not finite: see ``mainloop/guard.py``.
        dO and O show in ``total``, Q and what is seen in the log-sum-exp, Q of a row that sees nothing nowhere."""
        finite = (total + delta) * 0.0 == 0.0 and lse == lse
        if lse == Float32.inf:
            finite = finite and finite_row(mQ, row)
        if not finite:
            signals.ask_for_care()
            lse, delta = Float32(LOWEST), Float32(0.0)
        return lse, delta

    @cute.jit
    def _clear(self, dq_sum: cute.Tensor, group, thread):
        """Zeros for as many floats as a group of rows has in dQ's sums."""
        floats = self.rows * self.config.tile_d
        # The offset hides from the compiler that the address is a multiple of 16 bytes still.
        begin = cute.make_tensor((dq_sum.iterator + cutlass.Int64(group) * floats).align(16), cute.make_layout(floats))
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        for i in cutlass.range_constexpr(-(-floats // (4 * self.threads))):
            place = i * self.threads + thread
            if place < floats // 4:
                cute.autovec_copy(zeros, cute.local_tile(begin, (4,), (place,)))
