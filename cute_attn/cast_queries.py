"""The last kernel of a backward pass: dQ from its sums."""

from __future__ import annotations

from functools import partial

import cutlass
from cutlass import Float32, Int32, Uint32, cute

from cute_attn import layouts
from cute_attn.arithmetic import MOST, of_first_lane
from cute_attn.epilogue import clear_rows_past
from cute_attn.fields import first_stores, rounds_beside
from cute_attn.layouts.base import ADDED, COUNTED_KEYS, ROUNDING_TICKET, VECTOR, WARP, cute_layout, row_padding
from cute_attn.layouts.fragments import rows_columns, vector_at
from cute_attn.mainloop.common import Signals, Values
from cute_attn.mainloop.fours import FOUR, offsets, to_memory
from cute_attn.mainloop.guard import used_here
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.mainloop.warpgroups import Kernel, copy_row_values
from cute_attn.mainloop.work_queue import WorkQueue
from cute_attn.scheduler import Tiles, Work, place_of_block
from cute_attn.sequences import Span, padded_span


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
        some = "q" in problem.gradients and problem.has_unused("q") and config.head_blocks == 1
        self.leaves_unused = self.lay.CLEARS_QUERIES and (self.persistent or some)
        self.heads_at_once = self.stages = 2 if self.persistent else 1
        self.threads = self.lay.piece_threads(config) if self.pieces else config.mma_threads
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
        (tiles, enders, beside), floats, warps = added, cute.size(dq_sum, mode=[0]), self.threads // WARP
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
            self._one(tiles, beside, fetch, store)

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
    def _one(self, tiles: Tiles, beside, fetch: cutlass.Constexpr, store: cutlass.Constexpr):
        """A block's tile or, where dQ isn't rounded ``beside``, one of those in the order behind the kernel that adds."""
        work = tiles.mine()
        if cutlass.const_expr(beside is not None):
            if beside == False:  # noqa: E712
                cute.arch.griddepcontrol_wait()
                m_block, head, batch = place_of_block(tiles.m_blocks, tiles.heads, last_first=True)
                work = Work(m_block, head, head, Span(batch), Span(batch))
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            fetch(True if beside is None else beside, Int32(0), work)
        store(Int32(0), work)

    @cute.jit
    def _fetch(self, pipe, held, dq_sum, values: Values, signals: Signals, enders, waits, done, work: Work):
        """One warp, which ``waits``: the sums of a tile's piece, head by head, once they are complete or none of the ``enders``
        adds any more. Returns how many the block has had, ``done`` and these."""
        (first, past, piece), m_block = self._heads(work, dq_sum), work.q.padded_tile(work.block, self.config.tile_m)
        here = values.of(work).of_head(first)
        visits = QueryTiles.visits(here, self.problem, work.block, self.config)
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
        (first, past, piece), row_first = self._heads(work, dq_sum), work.block * self.config.tile_m
        seen = QueryTiles.visits(values.of(work).of_head(first), self.problem, work.block, self.config) > 0
        in_use = seen if cutlass.const_expr(self.may_be_unseen) else None
        for head in cutlass.range(first, past, unroll=1):
            state = self.parts.emptying(self.stages, done)
            if seen:
                pipe.consumer_wait(state)
            acc = self._sums(held[None, state.index], in_use)
            # Else where each value goes is kept in registers from head to head.
            self._store_piece(acc, mdQ, values, work.q, head, used_here(row_first), piece, in_use)
            # Not before sums have been used: an arrival doesn't wait for what was asked of shared memory, and the head before's
            # stores may hold that up until the copy engine has written the next sums there.
            if seen:
                if cutlass.const_expr(self.persistent):
                    self.parts.release_rows(pipe, state)
                done += 1
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
        m_block, place, batch = place_of_block(dq_sum.shape[2], dq_sum.shape[3] * count, last_first=True)
        head, piece = place // count, place % count
        sums, acc, in_use = dq_sum[None, piece, m_block, head, batch], None, None
        if cutlass.const_expr(self.may_be_unseen):  # sums are on their way while it is looked for whose they are
            in_use = signals.counters[m_block, head, batch] != 0
            acc = self._sums(sums, in_use)
        span, row_first, _ = padded_span(sequences, m_block * self.config.tile_m, batch)
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

    def product_shape(self) -> tuple[int, int]:
        """(rows, columns) of dQ's product: a piece, which may be fewer rows than an MMA has, or the transpose of one."""
        rows, columns = self.lay.piece_shape(self.config)[:: -1 if self.lay.turned(self.config) else 1]
        least = self.lay.mma("dQ", self.config).shape[0]
        return -(-rows // least) * least, columns

    @cute.jit
    def _sums(self, sums: cute.Tensor, in_use):
        """A thread's sums of a piece, as an accumulator; nothing of one that is known not to be in use."""
        mma, shape = self.lay.tiled_mma("dQ", self.config), self.product_shape()
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
        mma, shape = self.lay.tiled_mma("dQ", self.config), self.product_shape()
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
