"""The backward pass on the host: what is compiled is three kernels, which follow one another on a stream, or the last of
which begins beside the second.

1. :class:`RowValues`: for each query row, delta = Σ_c dO_c · O_c − dLSE, once for all key tiles that will read it, beside its
   log-sum-exp; it also clears the memory in which dQ is added up, or in which is counted who adds to it.
2. the mainloop's ``Backward``: dK, dV, and dQ in float32.
3. :class:`CastQueries`: dQ scaled and rounded to the inputs' dtype, each query tile once nothing is added to it any more.

Mathematics, with P = exp(S − LSE) recomputed tile by tile (FlashAttention, arXiv:2205.14135, §B.2; the gradient of the
log-sum-exp enters through delta, since ∂LSE_i / ∂S_ij = P_ij):

    dV = Pᵀ·dO,   dP = dO·Vᵀ,   dS = P ∘ (dP − delta),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, Uint32, cute

from cute_attn import layouts
from cute_attn.epilogue import clear_rows_past
from cute_attn.fields import BACKWARD, first_stores, has_sums, named, rounds_beside, sizes_of_sums
from cute_attn.forward import captured_of, dropout_of, heads_apart, rows_first, select_modes, sequences_of
from cute_attn.layouts.base import (
    ADDED,
    COUNTED_KEYS,
    COUNTERS,
    ROUNDING_TICKET,
    TICKET,
    VECTOR,
    WARP,
    cute_layout,
    row_padding,
)
from cute_attn.layouts.fragments import rows_columns, vector, vector_at
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Signals, Values
from cute_attn.mainloop.fours import FOUR, offsets, to_memory
from cute_attn.mainloop.guard import LOWEST, finite_row, used_here
from cute_attn.mainloop.scores import rise_in_tile, with_rise
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.mainloop.warpgroups import Kernel, copy_row_values, of_first_lane
from cute_attn.mainloop.work_queue import MOST, WorkQueue
from cute_attn.scheduler import Tiles, Work, write_zeros
from cute_attn.sequences import Sequences, Span


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.BACKWARD`'s values to compile."""
    mainloop = importlib.import_module(f"cute_attn.mainloop.{config.backward}").Backward(problem, config)
    row_values, cast = RowValues(problem, config), CastQueries(problem, config)

    @cute.jit
    def backward(*arguments):
        given = named(BACKWARD, arguments)
        operands = (given.q, given.k, given.v, given.out, given.dout, given.dq, given.dk, given.dv)
        q, k, v, o, do, dq, dk, dv = (heads_apart(m, problem, given.heads_first) for m in operands)
        lse, dlse = (rows_first(m, problem) for m in (given.lse_raw, given.dlse))
        dq_sum = _sums_behind(given.rows, problem, config)
        rows = Rows(*(select_modes(given.rows, [0, 3, 2, 1])[i, None, None, None] for i in range(2)))  # (rows, heads, batch)
        seqlen_q, seqlen_k = q.shape[0], k.shape[0]
        sequences = sequences_of(problem, q, k, given, row_padding(config))
        shift = seqlen_k - seqlen_q if cutlass.const_expr(sequences is None) else 0
        lo, hi = shift - given.left, shift + given.right
        if cutlass.const_expr(problem.bounded_left and sequences is None and not problem.has_places):
            # Keys before the first that any query sees don't exist here: key tiles begin at multiples of tile_n, and would
            # read them otherwise. Their gradients are zeroed on the host. (Of ragged sequences, and where what is
            # computed depends on positions, they are tiles that no query sees.)
            unseen = cutlass.max(lo, 0)
            k, v, dk, dv = (_rows_from(m, unseen) for m in (k, v, dk, dv))
            seqlen_k, lo, hi = seqlen_k - unseen, lo - unseen, hi - unseen
        rules = {"captured": captured_of(problem, given), "of_captured": given.of_captured, **dropout_of(given)}
        lists = {name: getattr(given, name) for name in ("key_lists", "query_lists", "ranks")}
        values = Values(seqlen_q, seqlen_k, lo, hi, given.scale_log2, given.scale_by_cap, **rules, **lists)
        # Where dQ is added in a fixed order heads are taken in groups, too: fewer key tiles of one then wait for one another.
        long_first = problem.unequal or problem.deterministic
        heads_per_kv = q.shape[2] // k.shape[2]
        tiles = Tiles.of(k.shape, heads_per_kv, config.tile_n, given.blocks, long_first, sequences, of_k=True)
        gradients = Gradients(dq if dq_sum is None else dq_sum, dk, dv, dq if cutlass.const_expr(cast.leaves_unused) else None)
        padded, heads, batch = rows.delta.shape
        signals = Signals.of(given.signals, padded // config.tile_m, heads, batch, row_values.clears)
        if cutlass.const_expr(signals is not None and not row_values.clears):
            write_zeros(signals.words, given.stream)

        of_ramp = values if cutlass.const_expr(problem.expression.ramp is not None) else None
        row_values.launch(q, o, do, lse, dlse, rows, dq_sum, signals, sequences, of_ramp, given.stream)
        taken = mainloop.launch(Inputs(q, k, v, do), rows, gradients, signals, values, tiles, given.blocks, given.stream)
        if cutlass.const_expr(dq_sum is not None):
            cast.launch(dq_sum, dq, values, signals, sequences, taken, given.blocks, given.stream)

    return backward


@cute.jit
def _sums_behind(rows: cute.Tensor, problem: cutlass.Constexpr, config: cutlass.Constexpr) -> cute.Tensor | None:
    """dQ's sums, ``(values, piece, m_block, heads, batch)``, which lie behind two values of each row."""
    if cutlass.const_expr(not has_sums(problem, config)):
        return None
    (_, batch, heads, padded), (values, pieces) = rows.shape, sizes_of_sums(config)
    m_blocks, of_block = padded // config.tile_m, values * pieces
    of_head = cutlass.Int64(m_blocks) * of_block
    strides = (cute.assume(x, of_block) for x in (cutlass.Int64(of_block), of_head, of_head * heads))
    layout = cute.make_layout((values, pieces, m_blocks, heads, batch), stride=(1, values, *strides))
    return cute.make_tensor(rows[2, None, None, None].iterator, layout)


def _rows_from(m: cute.Tensor | None, first: Int32) -> cute.Tensor | None:
    """``(seqlen, head_dim, heads, batch)`` from row ``first`` on."""
    if m is None:
        return None
    shape = (m.shape[0] - first, *m.shape[1:])
    return cute.make_tensor(cute.domain_offset((first, 0, 0, 0), m).iterator, cute.make_layout(shape, stride=m.stride))


def _padded_span(sequences: Sequences | None, row, batch):
    """The queries of the sequence that a row of what is padded belongs to, ``(span, row within it, number)``."""
    if sequences is None:
        return Span(batch), row, batch
    q = sequences.q
    i, _, _ = q.at(row // q.padding, sequences.count, q.padding)
    span = q.span(i, sequences.count)
    return span, row - span.padded, i


def _place(blocks, heads, last_first: bool = False, pieces: int = 1):
    """``(block, head, batch)`` of this block, of ``blocks`` for each head, each in so many ``pieces``. A grid's other
    dimensions end at 65,535. Heads come one after another: most often a row of all of them is one piece of memory."""
    index = cute.arch.block_idx()[0]
    if last_first:
        index = cute.arch.grid_dim()[0] - 1 - index
    if pieces > 1:
        index = index // pieces
    return index // heads % blocks, index % heads, index // heads // blocks


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
        block, head, batch = _place(cute.ceil_div(rows.delta.shape[0], self.rows * self.steps), rows.delta.shape[1])
        if cutlass.const_expr(self.clears):
            signals.clear(self.words)
        where = head, batch
        inputs = mQ, mO, mdO, mLSE_raw, mdLSE
        of_place = lambda number: None if of_ramp is None else replace(of_ramp, head=head, sequence=number)  # noqa: E731
        if cutlass.const_expr(sequences is None):
            self._rows(inputs, rows, dq_sum, signals, Span(batch), where, block * self.rows, block, of_place(batch))
        else:
            span, row, number = _padded_span(sequences, block * sequences.q.padding, batch)
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
            o, do, lse = vector(mO, read, column), vector(mdO, read, column), mLSE_raw[read]
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


class CastQueries:
    """dQ = scale · its sums, in the inputs' dtype. A block takes the piece of one group of computing threads, each thread
    what it holds of it as an accumulator.

    Where it is known how many key tiles add to a query tile, blocks begin on multiprocessors that the kernel which adds leaves
    them (a programmatic dependent launch), wait for those, and find the sums in the L2 cache. These come by way of shared
    memory: where a block with much of it has been, the L1 cache has no room for all that is on its way. Of ragged sequences a
    block takes pieces of some heads' query tiles one after another: one warp finds them ahead of time, another fetches sums."""

    BLOCKS = 5  # of a multiprocessor, which take one tile after another
    AHEAD = 2  # tiles that such a block holds: the one that it rounds, and the next

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.lay = layouts.family(config)
        self.pieces = self.lay.pieces(config)
        # Whether signals may ask for care, which is asked for no more then.
        stored = first_stores(problem, config)
        self.clears = stored and problem.masked
        # Whether a query tile's sums may be nothing yet: no key tile has come to it.
        self.may_be_unseen = stored and (problem.masked or bool(problem.ragged))
        self.beside = rounds_beside(problem, config)  # whether it begins beside the kernel that adds
        self.persistent = self.beside and bool(problem.ragged)
        # Whether somebody else clears query tiles without a row in use.
        self.leaves_unused = self.lay.CLEARS_QUERIES and problem.has_unused("q") and "q" in problem.gradients
        self.leaves_unused = self.persistent or (self.leaves_unused and config.head_blocks == 1)
        self.heads_at_once = self.stages = 2 if self.persistent else 1
        self.threads = config.mma_threads // max(len(self.pieces), 1)
        self.parts = Kernel(problem, config) if self.beside else None

    @cute.jit
    def launch(self, dq_sum, mdQ, values: Values, signals: Signals | None, sequences, added: cutlass.Constexpr, blocks, stream):
        """``added``, where this kernel begins :attr:`beside` the one that adds, is what that one's ``launch`` returns; the GPU
        holds ``blocks`` blocks of that at once."""
        signals = signals if self.may_be_unseen or self.beside else None
        _, pieces, m_blocks, heads, batch = dq_sum.shape
        count = m_blocks * heads * batch * pieces
        if cutlass.const_expr(self.beside):
            tiles, *until = added
            tiles = tiles.left_behind(mdQ.shape[0], self.config.tile_m, self.heads_at_once, pieces)
            added, count = (tiles, *until), tiles.count()
        if cutlass.const_expr(self.persistent):
            count = cutlass.min(count, self.BLOCKS * blocks)
        self.kernel(dq_sum, mdQ, values, signals, sequences, added).launch(
            grid=[count, 1, 1],
            block=[self.threads + 2 * WARP * self.persistent, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.BLOCKS if self.persistent else 0,
            preferred_smem_carveout=100 if self.persistent else None,
            use_pdl=self.beside,
        )

    @cute.kernel
    def kernel(self, dq_sum, mdQ, values: Values, signals: Signals | None, sequences, added):
        index = cute.arch.block_idx()[0]
        if cutlass.const_expr(self.beside):
            self._beside(dq_sum, mdQ, values, signals, added)
            if index == cute.arch.grid_dim()[0] - 1:  # so this kernel ends, and the next call begins, behind the one that adds
                cute.arch.griddepcontrol_wait()
                if cutlass.const_expr(self.clears):
                    signals.care_no_more()
        else:
            if cutlass.const_expr(self.clears):
                if index == 0:
                    signals.care_no_more()
            self._behind(dq_sum, mdQ, values, signals, sequences)

    def _beside(self, dq_sum, mdQ, values: Values, signals: Signals, added):
        """A block's pieces of query tiles, each once all key tiles that visit it have added their parts."""
        (tiles, enders, soon), floats, warps = added, cute.size(dq_sum, mode=[0]), self.threads // WARP
        smem = cutlass.memory.SmemAllocator()
        held = smem.allocate_tensor(Float32, cute.make_layout((floats, self.stages)), 128)
        pipe, queue = self.parts.pipe(smem, self.stages, warps, 4 * floats), None
        if self.persistent:
            slots = WorkQueue.slots_in(smem, self.AHEAD)
            told = self.parts.hand_over_pipe(smem, self.AHEAD, 1, warps + 1)
            queue = WorkQueue(slots, told, None, self.parts.arrive, numbered=True, padding=row_padding(self.config))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        fetch = partial(self._fetch, pipe, held, dq_sum, values, signals, enders)
        store = partial(self._round, pipe, held, dq_sum, mdQ, values)
        if self.persistent:
            self._one_after_another(queue, tiles, signals, partial(fetch, True), store)
        else:
            self._one(tiles, soon, fetch, store)

    @cute.jit
    def _one_after_another(self, queue, tiles: Tiles, signals: Signals, fetch: cutlass.Constexpr, store: cutlass.Constexpr):
        """Of ragged sequences the tiles in use for which the block draws tickets."""
        warp, warps = cute.arch.make_warp_uniform(cute.arch.warp_idx()), self.threads // WARP
        if warp == warps:
            draw = lambda _=None: of_first_lane(lambda: signals.ticket(ROUNDING_TICKET))  # noqa: E731
            queue.lead_counted(tiles, draw(), draw, lambda state, work: state, Int32(0))
        elif warp == warps + 1:
            queue.taker().each(fetch, Int32(0))
        else:
            queue.taker().each(store, Int32(0))

    @cute.jit
    def _one(self, tiles: Tiles, soon, fetch: cutlass.Constexpr, store: cutlass.Constexpr):
        """A block's tile or, where dQ isn't rounded ``soon``, one of those in the order behind the kernel that adds."""
        work = tiles.mine()
        if cutlass.const_expr(soon is not None):
            if soon == False:  # noqa: E712
                cute.arch.griddepcontrol_wait()
                m_block, head, batch = _place(tiles.m_blocks, tiles.heads, last_first=True)
                work = Work(m_block, head, head, Span(batch), Span(batch))
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            fetch(True if soon is None else soon, Int32(0), work)
        store(Int32(0), work)

    @cute.jit
    def _fetch(self, pipe, held, dq_sum, values: Values, signals: Signals, enders, waits, done, work: Work):
        """One warp, which ``waits``: the sums of a tile's piece, head by head, once they are complete or none of the ``enders``
        adds any more. Returns how many the block has had, ``done`` and these."""
        here, m_block = values.of(work), work.q.padded_tile(work.block, self.config.tile_m)
        visits, (first, past, piece) = QueryTiles.visits(here, self.problem, work.block, self.config), self._heads(work, dq_sum)
        turns = visits if cutlass.const_expr(self.problem.deterministic) else visits * ADDED
        if here.seqlen_k > COUNTED_KEYS:
            turns = Int32(MOST)
        turns = turns if waits else 0
        for head in cutlass.range(first, past * Int32(visits > 0), unroll=1):
            state = self.parts.filling(self.stages, done)
            signals.wait_for_all((m_block, head, work.q.batch), turns, enders)
            cute.arch.fence_proxy("async.global")
            pipe.producer_acquire(state)
            sums, into = dq_sum[None, piece, m_block, head, work.q.batch], held[None, state.index]
            copy_row_values(sums, into, pipe.producer_get_barrier(state))
            done += 1
        return done

    @cute.jit
    def _round(self, pipe, held, dq_sum, mdQ, values: Values, done, work: Work):
        """The other warps: a tile's piece, rounded. Returns what :meth:`_fetch` does."""
        seen = QueryTiles.visits(values.of(work), self.problem, work.block, self.config) > 0
        in_use = seen if cutlass.const_expr(self.may_be_unseen) else None
        (first, past, piece), row_first = self._heads(work, dq_sum), work.block * self.config.tile_m
        for head in cutlass.range(first, past, unroll=1):
            state = self.parts.emptying(self.stages, done)
            if seen:
                pipe.consumer_wait(state)
            acc = self._sums(held[None, state.index], in_use)
            if seen:
                self.parts.release_rows(pipe, state)
                done += 1
            # Else where each value goes is kept in registers from head to head.
            self._store_piece(acc, mdQ, values, work.q, head, used_here(row_first), piece, in_use)
        return done

    def _heads(self, work: Work, dq_sum):
        """``(first, past, piece)`` of the heads that a block takes at once."""
        pieces, n = len(self.pieces), self.heads_at_once
        first = work.head // pieces * n
        return first, cutlass.min(first + n, dq_sum.shape[3]) if n > 1 else first + 1, work.head % pieces

    @cute.jit
    def _behind(self, dq_sum, mdQ, values: Values, signals: Signals | None, sequences):
        """A piece of a query tile, behind the kernel that adds."""
        count = len(self.pieces)
        # What was added last is in the L2 cache still.
        m_block, place, batch = _place(dq_sum.shape[2], dq_sum.shape[3] * count, last_first=True)
        head, piece = place // count, place % count
        sums, acc, in_use = dq_sum[None, piece, m_block, head, batch], None, None
        if cutlass.const_expr(self.may_be_unseen):  # sums are on their way while it is looked for whose they are
            in_use = signals.counters[m_block, head, batch] != 0
            acc = self._sums(sums, in_use)
        span, row_first, _ = _padded_span(sequences, m_block * self.config.tile_m, batch)
        if cutlass.const_expr(acc is None):
            in_use = None if sequences is None else row_first < span.length
            acc = self._sums(sums, in_use)
        self._store_piece(acc, mdQ, values, span, head, row_first, piece, in_use)

    @cute.jit
    def _store_piece(self, acc, mdQ, values: Values, span: Span, head, row_first, piece, in_use):
        """A thread's sums of a piece of the query tile from a sequence's row on, if they are ``in_use``; else zeros."""
        mdQ, length = span.stored.rows(mdQ, head), values.seqlen_q if span.first is None else span.stored.length
        column_first = Int32(0)
        for p in cutlass.range_constexpr(len(self.pieces)):
            if piece == p:
                row_first += self.pieces[p][0]
                column_first += self.pieces[p][1]

        if cutlass.const_expr(in_use is None):  # noqa: SIM114
            self._cast(acc, mdQ, values, span, length, (row_first, column_first))
        elif in_use:
            self._cast(acc, mdQ, values, span, length, (row_first, column_first))
        elif cutlass.const_expr(not self.leaves_unused):  # noqa: SIM114
            self._clear(mdQ, length, (row_first, column_first))
        elif row_first // self.config.tile_m * self.config.tile_m < span.length:
            self._clear(mdQ, length, (row_first, column_first))

    def _product(self):
        """dQ's product, and the shape of a piece of it."""
        mma, shape = self.lay.tiled_mma("dQ", self.config), self.lay.piece_shape(self.config)
        return mma, shape[::-1] if self.lay.turned(self.config) else shape

    @cute.jit
    def _sums(self, sums: cute.Tensor, in_use):
        """A thread's sums of a piece, as an accumulator; nothing of one that is known not to be in use."""
        mma, shape = self._product()
        acc = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
        mine = cute.make_tensor(sums.iterator, cute_layout(self.lay.sums(self.config)))[cute.arch.thread_idx()[0], None, 0]
        held = cute.make_tensor(acc.iterator, cute.make_layout(mine.shape))
        if cutlass.const_expr(in_use is None):  # noqa: SIM114
            cute.autovec_copy(mine, held)
        elif in_use:
            cute.autovec_copy(mine, held)
        return acc

    @cute.jit
    def _clear(self, mdQ: cute.Tensor, length, first):
        """Zeros for a piece that has no row in use."""
        rows, columns = self.lay.piece_shape(self.config)
        across = columns // VECTOR
        zeros = cute.make_rmem_tensor(VECTOR, mdQ.element_type)
        zeros.fill(0.0)
        for i in cutlass.range(-(-rows * across // self.threads), unroll=1):  # seldom: not worth registers
            place = i * self.threads + cute.arch.thread_idx()[0]
            row, column = first[0] + place // across, first[1] // VECTOR + place % across
            if (place < rows * across) & (row < length) & (column * VECTOR < self.problem.head_dim):
                cute.autovec_copy(zeros, vector_at(mdQ, row, column))

    @cute.jit
    def _cast(self, acc: cute.Tensor, mdQ: cute.Tensor, values: Values, span: Span, length, first):
        """A piece's sums, scaled and rounded."""
        mma, shape = self._product()
        acc.store(acc.load() * Float32(values.scale(self.problem)))

        where = rows_columns(mma.get_slice(cute.arch.thread_idx()[0]).partition_C(cute.make_identity_tensor(shape)))
        of_piece = rows_columns(acc)
        if cutlass.const_expr(self.lay.turned(self.config)):
            self._store_transposed(mdQ, span, length, first, where, of_piece)
        else:
            self._store(mdQ, span, length, first, where, of_piece)

    @cute.jit
    def _store_transposed(self, mdQ: cute.Tensor, span: Span, length, first, where: cute.Tensor, of_piece: cute.Tensor):
        """A piece of dQᵀ, (columns, rows)."""
        row_on, column_on = offsets()
        if cutlass.const_expr(self.problem.has_unused("q")):
            for i in cutlass.range_constexpr(cute.size(of_piece, mode=[1])):
                if first[0] + where[0, i][1] >= span.length:
                    of_piece[None, i].fill(0.0)
        for i in cutlass.range_constexpr(0, cute.size(of_piece, mode=[1]), 2):
            held = cute.make_rmem_tensor(FOUR, mdQ.element_type)
            for j in cutlass.range_constexpr(FOUR):
                held[j] = of_piece[j // 2, i + j % 2].to(mdQ.element_type)
            pairs = cute.recast_tensor(held, Uint32)
            pairs[0], pairs[1] = to_memory(pairs[0], pairs[1])
            column, row = first[1] + where[0, i][0] + column_on, first[0] + where[0, i][1] + row_on
            if row < length and column < self.problem.head_dim:
                into = cute.local_tile(mdQ, (1, FOUR), (row, column // FOUR))
                cute.autovec_copy(held, cute.make_tensor(into.iterator.align(8), held.layout))

    @cute.jit
    def _store(self, mdQ: cute.Tensor, span: Span, length, first, where: cute.Tensor, of_piece: cute.Tensor):
        row_first, column_first = first
        thread = cute.arch.thread_idx()[0]
        if cutlass.const_expr(self.problem.has_unused("q")):
            clear_rows_past(span.length, row_first, where, of_piece)
        # Of two neighbours one stores 4 columns of one MMA's 8, the other 4 of the next one's: whole sectors of memory.
        even = thread % 2 == 0
        for r in cutlass.range_constexpr(cute.size(of_piece, mode=[0])):
            row = row_first + where[r, 0][0]
            for c in cutlass.range_constexpr(0, cute.size(of_piece, mode=[1]), 4):
                held = cute.make_rmem_tensor(4, mdQ.element_type)
                for i in cutlass.range_constexpr(4):
                    held[i] = of_piece[r, c + i].to(mdQ.element_type)
                pairs = cute.recast_tensor(held, Int32)
                theirs = cute.arch.shuffle_sync_bfly(pairs[1] if even else pairs[0], 1)
                column = column_first + where[r, c][1]
                if even:
                    pairs[1] = theirs
                else:
                    pairs[0] = theirs
                    column = column_first + where[r, c + 2][1] - 2
                if row < length and column < self.problem.head_dim:
                    into = cute.local_tile(mdQ, (1, 4), (row, column // 4))
                    cute.autovec_copy(held, cute.make_tensor(into.iterator.align(8), held.layout))
