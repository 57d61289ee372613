"""Forward attention with TMA copies and warpgroup MMA (Hopper).

One warpgroup copies, two or three compute. Each computing warpgroup owns 64 query rows; all of them read the same K and V
tiles. Within a warpgroup the products of one tile overlap the softmax of the next (Q·Kᵀ of tile i is issued before P·V of
tile i − 1, and both run while nothing waits for them); between warpgroups, named barriers make them take turns on the
tensor cores, so that one multiplies while the other takes exponentials. Both are FlashAttention-3's (arXiv:2407.08608).

Barriers: each K and V stage and each warpgroup's Q has a full and an empty mbarrier (``cutlass.pipeline``); named barriers
are for the turns and for a warpgroup's epilogue; one more mbarrier is for the verdict on a block's outputs: where there is a
mask and one of them is not finite, the block does its query tiles once more, from careful copies (``guard.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup

from cute_attn.epilogue import clear_rows_past, converted, store_lse, store_nothing_seen
from cute_attn.layouts.fragments import halves, rows_columns, transposed
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.guard import FiniteRows, copy_carefully, not_finite, used_here
from cute_attn.mainloop.scores import Coordinates, Scores, read_ahead, with_rise
from cute_attn.mainloop.walk import KeyTiles, ListedKeys, walk
from cute_attn.mainloop.warpgroups import WARPGROUP, Kernel, TmaOperand, key_tile, rounded_operand
from cute_attn.mainloop.work_queue import WorkQueue
from cute_attn.scheduler import Tiles, Work
from cute_attn.softmax import LogSumExp, Softmax, scale_rows

COPY_K_V_WARP, COPY_Q_WARP, FIND_WORK_WARP, CLEAR_WARP = 0, 1, 2, 3
LONG = 1 << 19  # keys · columns of Q in shared memory from which on a causal tile is worth a block of its own
ASK_AHEAD = 4  # so many key tiles before its last one is copied, a query tile's block asks for the next


@dataclass(frozen=True)
class ForwardPipelines:
    """The mbarrier pipelines of a block. Q has stages for each computing warpgroup. All warps wait for the verdict."""

    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    verdict: pipeline.PipelineAsync | None
    work: pipeline.PipelineAsync | None = None
    asked: pipeline.PipelineAsync | None = None


@dataclass(frozen=True)
class ForwardShared:
    """The operands in shared memory: Q ``(64, d, warpgroup and stage)``, O ``(64, d, warpgroup)`` or, where it leaves from
    registers, none, K and V ``(tile_n, d, stage)``; and how they come there."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    o: cute.Tensor | None
    verdict: cute.Tensor | None  # not 0 once an output was not finite
    work: cute.Tensor | None = None
    ramp: cute.Tensor | None = None  # (values of an accumulator, warp)
    pipes: Any = None  # ForwardPipelines


@dataclass(frozen=True)
class ForwardWorker:
    """A thread of a computing warpgroup: its place, its products, and where its scores and outputs lie in the tile."""

    warpgroup: Int32
    mma_S: cute.TiledMma
    mma_O: cute.TiledMma
    cS: Coordinates
    cO: Coordinates


@dataclass(frozen=True)
class ForwardFragments:
    """What a computing thread holds or points to through the key tiles of one query tile."""

    rQ: cute.Tensor | None  # the first columns of Q
    tSrQ: cute.Tensor  # (MMA, 1, K)
    tSrK: cute.Tensor  # (MMA, 1, K, stage)
    tOrV: cute.Tensor  # (MMA, 1, K, stage)
    tOrP: cute.Tensor  # (MMA, 1, K)
    acc_O: cute.Tensor  # (MMA, 1, 1)
    rescale: cute.Tensor  # (rows): the factor that the last step asks of O


@dataclass(frozen=True)
class WarpgroupTile:
    """The 64 rows a warpgroup computes now, the key tiles they see, and how many come before that only other rows see."""

    me: ForwardWorker
    pipes: ForwardPipelines
    row_first: Int32
    keys: KeyTiles
    skipped: Int32
    values: Values
    scores: Scores
    loaded: tuple  # what a mask loads for a thread's rows
    ramp: cute.Tensor | None  # what a ramp starts a thread's accumulators with
    frag: ForwardFragments
    softmax: Softmax


class Forward(Kernel):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        # float16 has no room for weights above 1, and what a function makes of scores may hide any key.
        self.anchored = config.dtype == "bfloat16" and not problem.masks_all and not problem.expression.natural
        self.careful = problem.masked
        # Behind a right edge also where the left edge cuts tiles, if registers are left for one more kind of step.
        self.anchors_left = self.anchored and problem.bounded_left and problem.bounded_right and not problem.takes_registers
        self.guarded = self.careful or self.anchored
        self.queued = bool(problem.ragged or problem.blocks)  # whether one warp finds the block's tiles for the others
        self.turn_barrier = self.first_barrier("turns")
        self.q_slots = self.warpgroups * config.q_stages
        # Whether a warpgroup's rows may all see no more than half of their last key tile.
        self.halves = problem.bounded_right and not problem.blocks and config.tile_n >= 2 * self.lay.ROWS_PER_WARPGROUP
        self.frees_q = config.separate_o or config.o_from_registers  # before O leaves, which doesn't lie over Q

    # ---- host ------------------------------------------------------------------------------------------------------

    @cute.jit
    def launch(self, mQ, mK, mV, mO, mLSE, values: Values, tiles: Tiles, blocks: Int32, stream):
        """Make the TMA descriptors and launch blocks, persistent ones or one for each query tile."""
        # The longest tile sees all keys, unless a window makes tiles nearly equal.
        if cutlass.const_expr(self.problem.bounded_left):
            long = False
        else:
            long = mK.shape[0] >= LONG // self.config.tile_d
        tiles, blocks = tiles.launched(blocks, long)
        if cutlass.const_expr(not (tiles.long_first or self.queued)):
            blocks = tiles.even_blocks(blocks, cute.ceil_div(mK.shape[0], self.config.tile_n))
        q, k, v = (self.operand(name, m, self.lay.copy_in) for name, m in (("Q", mQ), ("K", mK), ("V", mV)))
        by_threads = self.config.o_from_registers
        o = None if cutlass.const_expr(by_threads) else self.operand("O", mO, self.lay.copy_out)
        plain = (mK, mV) if cutlass.const_expr(self.careful) else None
        plain_o = mO if cutlass.const_expr(by_threads or bool(self.problem.ragged)) else None
        self.kernel(q, k, v, o, mLSE, plain, plain_o, values, tiles).launch(
            grid=[blocks, 1, 1], block=[self.config.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    # ---- kernel ----------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self, q: TmaOperand, k: TmaOperand, v: TmaOperand, o, mLSE: LogSumExp, plain, plain_o, values: Values, tiles: Tiles
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for operand in (q, k, v, o):
                if cutlass.const_expr(operand is not None):
                    cpasync.prefetch_descriptor(operand.atom)
        shared = self._setup(tiles.tickets is not None)

        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if cutlass.const_expr(shared.work is not None):
                if warp == FIND_WORK_WARP:
                    self._find_work(shared, values, tiles)
                if cutlass.const_expr(bool(self.problem.ragged)):
                    if warp == CLEAR_WARP:
                        self._clear_unused_tiles(plain_o, mLSE, tiles)
            if warp == COPY_K_V_WARP:
                ask = self._queue(shared).ask if cutlass.const_expr(shared.pipes.asked is not None) else None
                copy_k_v = partial(self._copy_k_v, k, v, shared, values)
                again = partial(copy_k_v, None)
                if cutlass.const_expr(self.careful):
                    again = partial(self._copy_k_v_carefully, plain, shared, values)
                self._copy_each(shared, tiles, self.config.stages, partial(copy_k_v, ask), again)
            if warp == COPY_Q_WARP:
                copy_q = partial(self._copy_q, q, shared)
                self._copy_each(shared, tiles, self.q_slots, copy_q, copy_q)
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            self._compute((o, plain_o, mLSE), shared, values, tiles)

    def _setup(self, draws: bool):
        """Allocate shared memory and initialise the barriers; ``draws``: those for a block that draws tickets, too."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()

        sQ, sK, sV = self.tensor(smem, "Q", config.q_stages), self.tensor(smem, "K"), self.tensor(smem, "V")
        sO = None
        if cutlass.const_expr(not config.o_from_registers):
            sO = self.tensor(smem, "O") if config.separate_o else self.over("O", sQ)

        slot = {name: lay.slot_bytes(name, config) for name in "QKV"}
        pipes = ForwardPipelines(
            q=self.pipe(smem, self.q_slots, WARPGROUP // 32, slot["Q"]),
            k=self.pipe(smem, config.stages, config.mma_warps, slot["K"]),
            v=self.pipe(smem, config.stages, config.mma_warps, slot["V"]),
            verdict=self.hand_over_pipe(smem, 1, config.mma_warps) if self.guarded else None,
            work=self.hand_over_pipe(smem, lay.WORK_SLOTS, 1, 2 + config.mma_warps) if self.queued else None,
            asked=self.hand_over_pipe(smem, 1, 1) if draws else None,
        )
        work = WorkQueue.slots_in(smem) if self.queued else None
        ramp = None
        if cutlass.const_expr(self.problem.expression.ramp is not None):
            ramp = smem.allocate_tensor(Float32, cute.make_layout((config.tile_n // 2, config.mma_warps)), 16)
        verdict = None
        if cutlass.const_expr(self.guarded):
            verdict = cute.make_tensor(smem.allocate_array(Int32, 1), cute.make_layout(1))
            verdict[0] = Int32(0)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return ForwardShared(sQ, sK, sV, sO, verdict, work, ramp, pipes)

    def _walker(self, shared: ForwardShared, tiles: Tiles):
        """What gives a warp the tiles of the block, one after another: :meth:`Tiles.each`, or those another finds."""
        return tiles if shared.work is None else self._queue(shared).taker()

    def _queue(self, shared: ForwardShared) -> WorkQueue:
        ragged = bool(self.problem.ragged)
        numbered = ragged and self.problem.has_places
        of = {"numbered": numbered, "ragged": ragged, "headed": bool(self.problem.blocks)}
        return WorkQueue(shared.work, shared.pipes.work, shared.pipes.asked, self.arrive, **of)

    @cute.jit
    def _find_work(self, shared: ForwardShared, values: Values, tiles: Tiles):
        """One warp: the tiles of the block for the others."""
        queue = self._queue(shared)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.lay.WORK_SLOTS)
        header = partial(self._header, values) if self.problem.blocks else None
        state, begin = queue.hand_out(tiles, state, header=header)
        if cutlass.const_expr(self.guarded):
            if self._is_done_again(shared):
                queue.hand_out(tiles, state, begin, header)

    @cute.jit
    def _header(self, values: Values, work: Work):
        """Of the list of a tile's keys the first three words, and one that stands for what has been read ahead."""
        values = values.of(work)
        header, keys = ListedKeys.ahead(values, work.block)
        return *header, read_ahead(values, self.problem, work.block, self.config.tile_m, keys)

    @cute.jit
    def _clear_unused_tiles(self, mO: cute.Tensor, mLSE: LogSumExp, tiles: Tiles):
        """One warp: the results of tiles without a row in use, as many for each block."""
        turn, first, before, more = Int32(0), Int32(0), Int32(0), Boolean(True)
        while more:
            work, first, before = tiles.seek(tiles.position(turn), first, before, unused=True)
            if work.exists:
                store_nothing_seen(mO, mLSE, work, (self.config.tile_m, self.config.tile_dv))
            turn += 1
            more = work.exists

    @cute.jit
    def _is_done_again(self, shared: ForwardShared):
        """Whether the block is to do its query tiles again: known once all its computing warps have said so."""
        shared.pipes.verdict.consumer_wait(pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1))
        return shared.verdict[0] != 0

    # ---- copying warps ---------------------------------------------------------------------------------------------

    @cute.jit
    def _copy_each(self, shared: ForwardShared, tiles: Tiles, stages: cutlass.Constexpr[int], copy: cutlass.Constexpr, again):
        """One warp: ``copy`` for each of the block's tiles, and ``again`` for each, where they are done again."""
        walk_over = self._walker(shared, tiles)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, stages)
        state = walk_over.each(copy, state)
        if cutlass.const_expr(self.guarded):
            if self._is_done_again(shared):
                walk_over.each(again, state)

    @cute.jit
    def _copy_q(self, q: TmaOperand, shared: ForwardShared, state, work: Work):
        """One warp: a query tile's rows, 64 for each computing warpgroup; also of a tile that sees no key, since O may lie over
        Q, and only whoever holds Q's slot may write there. Returns the pipeline's next state."""
        tQgQ, tQsQ = q.tiles(shared.q, work.q, work.head)
        for w in cutlass.range_constexpr(self.warpgroups):
            shared.pipes.q.producer_acquire(state)
            self.copy(q, tQgQ[None, work.block * self.warpgroups + w], tQsQ, shared.pipes.q, state)
            state.advance()
        return state

    @cute.jit
    def _copy_k_v(
        self, k: TmaOperand, v: TmaOperand, shared: ForwardShared, values: Values, ask: cutlass.Constexpr, k_state, work: Work
    ):
        """One warp: the K and V tiles of a query tile, last keys first, K one tile ahead of V. Calls ``ask`` for the next query
        tile, and returns the pipelines' next state: between query tiles both are at the same."""
        pipes, v_state = shared.pipes, k_state.clone()
        keys = KeyTiles.of(values.of(work), self.problem, work.block, self.config)
        tKgK, tKsK = k.tiles(shared.k, work.k, work.head_kv, keys.begin)
        tVgV, tVsV = v.tiles(shared.v, work.k, work.head_kv, keys.begin)
        for i in cutlass.range(keys.count + 1, unroll=1):
            if cutlass.const_expr(ask is not None):
                if i == cutlass.max(keys.count - ASK_AHEAD, 0):
                    ask()
            if i < keys.count:
                pipes.k.producer_acquire(k_state)
                self.copy(k, key_tile(k, tKgK, shared.k, work, keys, keys.place(i)), tKsK, pipes.k, k_state)
                k_state.advance()
            if i > 0:
                pipes.v.producer_acquire(v_state)
                self.copy(v, key_tile(v, tVgV, shared.v, work, keys, keys.place_before(i)), tVsV, pipes.v, v_state)
                v_state.advance()
        return k_state

    @cute.jit
    def _copy_k_v_carefully(self, plain, shared: ForwardShared, values: Values, k_state, work: Work):
        """The same by careful copies of the warp's threads: a key whose value is not finite is NaN, and its value 0."""
        pipes, v_state, threads = shared.pipes, k_state.clone(), (cute.arch.lane_idx(), 32)
        keys = KeyTiles.of(values.of(work), self.problem, work.block, self.config)
        gK, gV = (work.k.rows(m, work.head_kv) for m in plain)
        finite = FiniteRows(gV)
        for i in cutlass.range(keys.count + 1, unroll=1):
            first = keys.first_key(keys.place(i), self.config.tile_n)
            if i < keys.count:
                self.acquire_for_threads(pipes.k, k_state)
                copy_carefully(gK, shared.k[None, None, k_state.index], first, threads, finite, math.nan)
                self.publish_by_threads(pipes.k, k_state)
                k_state.advance()
            if i > 0:
                first = keys.first_before(first, i, self.config.tile_n)
                self.acquire_for_threads(pipes.v, v_state)
                copy_carefully(gV, shared.v[None, None, v_state.index], first, threads, finite, 0.0)
                self.publish_by_threads(pipes.v, v_state)
                v_state.advance()
        return k_state

    # ---- computing warpgroups --------------------------------------------------------------------------------------

    @cute.jit
    def _compute(self, into, shared: ForwardShared, values: Values, tiles: Tiles):
        """One computing warpgroup: its 64 rows of every query tile of the block; again, if an output was not finite."""
        me, walk_over = self._worker(), self._walker(shared, tiles)
        self._hand_out_first_turn(me)
        q_turn = Int32(0)
        kv_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        query_tile = partial(self._query_tile, me, into, shared, values)
        state = walk_over.each(partial(query_tile, again=False), (q_turn, kv_state))
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(self.guarded):
            first = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
            self.arrive(shared.pipes.verdict.producer_commit, first)
            if self._is_done_again(shared):
                cute.arch.cp_async_bulk_wait_group(0, read=False)  # what was stored first must not come last
                walk_over.each(partial(query_tile, again=True), state)
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _query_tile(self, me: ForwardWorker, into, shared, values: Values, state, work: Work, again: cutlass.Constexpr[bool]):
        """A query tile of the block; returns Q's turn and the state of K's and V's pipelines."""
        o, mO, mLSE = into
        q_turn, kv_state = state
        config, rows, pipes = self.config, self.lay.ROWS_PER_WARPGROUP, shared.pipes
        values = with_rise(values.of(work), self.problem)
        block = work.block * self.warpgroups + me.warpgroup
        keys = KeyTiles.of(values, self.problem, work.block, config)
        keys, skipped = keys.of_rows(values, self.problem, block * rows, rows, config)
        if cutlass.const_expr(self.anchored):
            keys = keys.after_a_seen_key(values, self.problem, block, replace(config, tile_m=rows), self.anchors_left)
        scores = Scores(me.cS, values, self.problem)
        held = self._held(scores, shared, block * rows)
        slot, phase = self._q_slot(me, q_turn)
        frag = self._fragments(me, shared, slot)
        softmax = Softmax.start(cute.size(frag.rescale), values.exponent(self.problem), fused=True)
        tile = WarpgroupTile(me, pipes, block * rows, keys, skipped, values, scores, *held, frag, softmax)
        q_state = pipeline.PipelineState(self.q_slots, Int32(0), slot, phase)
        pipes.q.consumer_wait(q_state)
        self.load_first_columns("S", "Q", frag.rQ, shared.q[None, None, slot])
        if keys.count > 0:
            kv_state = self._attend(tile, (q_state, kv_state), again)
        else:
            if cutlass.const_expr(self.frees_q):
                pipes.q.consumer_release(q_state)
        self._normalize(tile, mLSE, work)
        self._store_o(tile, (o, mO), shared.o, (block, work.head, work.q))
        if cutlass.const_expr(self.guarded and not again):
            failed = not_finite(converted(frag.acc_O, self.element))
            if cutlass.const_expr(self.anchored):
                softmax.note_growth()
                failed = failed | (softmax.grown[0] != 0)
            if failed:
                shared.verdict[0] = Int32(1)
        if cutlass.const_expr(not self.frees_q):
            self.wait_for_store(me.warpgroup)  # O lies over Q
            pipes.q.consumer_release(q_state)
        return (q_turn + 1) % (2 * config.q_stages), kv_state

    def _q_slot(self, me: ForwardWorker, q_turn: Int32):
        """``(slot, phase)`` of a warpgroup's Q; query tiles count from 0 to twice Q's stages."""
        stages = self.config.q_stages
        return me.warpgroup + q_turn % stages * self.warpgroups, q_turn // stages

    @cute.jit
    def _held(self, scores: Scores, shared: ForwardShared, row_first):
        """``loaded`` and ``ramp`` of a warpgroup's rows."""
        loaded, ramp = (), None
        if cutlass.const_expr(self.problem.blocks):
            loaded = scores.loaded_of_rows(row_first)
        if cutlass.const_expr(shared.ramp is not None):
            ramp = shared.ramp[None, cute.arch.make_warp_uniform(cute.arch.warp_idx()) - WARPGROUP // 32]
            scores.write_ramp(ramp, cute.arch.lane_idx())
        return loaded, ramp

    def _worker(self) -> ForwardWorker:
        config, rows = self.config, self.lay.ROWS_PER_WARPGROUP
        index = cute.arch.thread_idx()[0]
        mma_S, mma_O = self.lay.tiled_mma("S", config), self.lay.tiled_mma("O", config)
        cS = Coordinates.of(mma_S, index % WARPGROUP, (rows, config.tile_n))
        cO = Coordinates.of(mma_O, index % WARPGROUP, (rows, config.tile_dv))
        return ForwardWorker(self.group(), mma_S, mma_O, cS, cO)

    def _fragments(self, me: ForwardWorker, shared: ForwardShared, slot) -> ForwardFragments:
        config, rows = self.config, self.lay.ROWS_PER_WARPGROUP
        S, O = me.mma_S.get_slice(0), me.mma_O.get_slice(0)  # noqa: E741
        acc_O = cute.make_rmem_tensor(O.partition_shape_C((rows, config.tile_dv)), Float32)
        acc_O.fill(0.0)
        return ForwardFragments(
            rQ=self.first_columns("S"),
            tSrQ=S.make_fragment_A(S.partition_A(shared.q[None, None, slot])),
            tSrK=S.make_fragment_B(S.partition_B(shared.k)),
            tOrV=O.make_fragment_B(O.partition_B(transposed(shared.v))),
            tOrP=cute.make_rmem_tensor(O.partition_shape_A((rows, config.tile_n)), self.lay.element(config)),
            acc_O=acc_O,
            rescale=cute.make_rmem_tensor(cute.size(rows_columns(acc_O), mode=[0]), Float32),
        )

    @cute.jit
    def _attend(self, tile: WarpgroupTile, states, again: cutlass.Constexpr):
        """All key tiles of one query tile, from the last to the first, once Q is there; ``again`` in one loop, which masks them
        all. Returns K's and V's pipeline state.

        Q is released as early as can be: after the last scores, or, where O will lie over it, by the caller.
        One state serves both: it stands at the last K tile taken, whose V tile is the next to be taken.
        """
        q_state, kv_state = states
        pipes, keys, frag = tile.pipes, tile.keys, tile.frag

        for _ in cutlass.range(tile.skipped, unroll=1):
            kv_state = self._skip(tile, kv_state)
        # The last tile comes first, and has nothing to overlap with yet.
        top = keys.place(0)
        masking, started = self._masking(tile, top, keys.last_is_masked()), self._started(tile)
        pipes.k.consumer_wait(kv_state)
        acc_S = self._scores(tile, kv_state, started)
        masking = self._mask_ahead(tile, masking)
        warpgroup.wait_group(0)
        pipes.k.consumer_release(kv_state)
        half = None
        if cutlass.const_expr(self.halves and not again):
            half = keys.end <= keys.first_key(top, self.config.tile_n) + self.config.tile_n // 2
        self._softmax(tile, acc_S, masking, half=half)
        self._probabilities(tile, acc_S)
        self._drop(tile, top)
        frag.rescale.fill(0.0)  # of an O that holds nothing yet

        step = partial(self._step, tile)
        if cutlass.const_expr(again):
            for i in cutlass.range(keys.count - 1, unroll=1):
                kv_state = step(kv_state, (keys.later(keys.later(top, 1), i), True), again=True)
        else:
            before = partial(self._settle, tile) if cutlass.const_expr(self.anchored and self.config.rescale_early) else None
            # Steps that look for a maximum after whole tiles rescale l; those of a list don't.
            rescales = self.problem.bounded_left and not self.anchors_left
            after = tile.softmax.note_growth if cutlass.const_expr(self.anchored and rescales) else None
            kv_state = walk(step, kv_state, keys, self.problem, last=False, around_whole=(before, after))

        if cutlass.const_expr(self.frees_q):
            pipes.q.consumer_release(q_state)
        if cutlass.const_expr(self.config.rescale_early):
            scale_rows(rows_columns(frag.acc_O), frag.rescale)
        pipes.v.consumer_wait(kv_state)
        self._add(tile, kv_state)
        warpgroup.wait_group(0)
        pipes.v.consumer_release(kv_state)
        kv_state.advance()
        if cutlass.const_expr(self.problem.blocks):
            for _ in cutlass.range(keys.skipped_last, unroll=1):
                kv_state = self._skip(tile, kv_state)
        return kv_state

    @cute.jit
    def _skip(self, tile: WarpgroupTile, kv_state):
        """Leave a key tile to the others."""
        for pipe in (tile.pipes.k, tile.pipes.v):
            pipe.consumer_wait(kv_state)
            pipe.consumer_release(kv_state)
        self._wait_for_turn(tile.me)
        self._pass_turn(tile.me)
        kv_state.advance()
        return kv_state

    @cute.jit
    def _step(
        self, tile: WarpgroupTile, v_state, where, again: cutlass.Constexpr[bool] = False, anchored: cutlass.Constexpr = None
    ):
        """Scores and softmax of a key tile, while the tensor cores add the tile before it to O; ``anchored``, if not said, as
        it is whole."""
        (n, masked), pipes, frag = where, tile.pipes, tile.frag
        anchored = self.anchored and (masked is False if anchored is None else anchored)
        hold = tile.keys.is_anchored(n) if cutlass.const_expr(self.anchored and again) else None
        masking, started = self._masking(tile, n, masked), self._started(tile)
        k_state = v_state.clone()
        k_state.advance()
        pipes.k.consumer_wait(k_state)
        self._wait_for_turn(tile.me)
        acc_S = self._scores(tile, k_state, started)
        if cutlass.const_expr(self.config.rescale_early and not anchored):
            scale_rows(rows_columns(frag.acc_O), frag.rescale)
        pipes.v.consumer_wait(v_state)
        self._add(tile, v_state)
        self._pass_turn(tile.me)
        masking = self._mask_ahead(tile, masking)
        warpgroup.wait_group(1)
        pipes.k.consumer_release(k_state)
        self._softmax(tile, acc_S, masking, hold, anchored)
        self._exponentials_begin(tile.softmax.row_sum[0] if anchored else rows_columns(acc_S)[0, 0])
        warpgroup.wait_group(0)
        pipes.v.consumer_release(v_state)
        self._probabilities(tile, acc_S)
        self._drop(tile, n)
        if cutlass.const_expr(not (self.config.rescale_early or anchored)):
            scale_rows(rows_columns(frag.acc_O), frag.rescale)
        return k_state

    @cute.jit
    def _settle(self, tile: WarpgroupTile):
        """Rescale O by what the last step asks, before steps that ask for nothing."""
        scale_rows(rows_columns(tile.frag.acc_O), tile.frag.rescale)
        tile.frag.rescale.fill(1.0)

    def _started(self, tile: WarpgroupTile):
        """What Q·Kᵀ is to be added to, if anything."""
        return tile.scores.started(self.registers("S", self.config.tile_n), tile.ramp)

    def _scores(self, tile: WarpgroupTile, k_state, started):
        """Issue S = Q·Kᵀ; the caller waits."""
        frag, tB = tile.frag, tile.frag.tSrK[None, None, None, k_state.index]
        return self.scores("S", self.config.tile_n, frag.tSrQ, tB, started, frag.rQ)

    def _add(self, tile: WarpgroupTile, v_state):
        """Issue O += P·V; the caller waits."""
        frag = tile.frag
        self.gemm(tile.me.mma_O, frag.acc_O, frag.tOrP, frag.tOrV[None, None, None, v_state.index], accumulate=True)

    def _masking(self, tile: WarpgroupTile, n, masked):
        """``(origin, whether to mask, kinds of blocks)`` of the key tile at a place."""
        origin = (tile.row_first, tile.keys.first_key(n, self.config.tile_n))
        return origin, masked, None if masked is False else tile.scores.kinds(origin)

    def _mask_ahead(self, tile: WarpgroupTile, masking):
        """The same with what is seen in blocks that are cut, while the tensor cores are at the scores."""
        return *masking[:2], replace(tile.scores, loaded=tile.loaded).seen(*masking)

    @cute.jit
    def _softmax(self, tile: WarpgroupTile, acc_S, masking, hold=None, anchored: cutlass.Constexpr[bool] = False, half=None):
        """Scores to P. ``half``: only the tile's first half is seen."""
        (origin, masked, seen), softmax, rescale = masking, tile.softmax, tile.frag.rescale
        ramp = tile.scores.ramp_of_rows(origin)
        tile.scores.apply_rules(acc_S, origin, masked, apart=True, seen=seen)
        if cutlass.const_expr(anchored):
            softmax.anchored_step(rows_columns(acc_S), ramp)
        elif cutlass.const_expr(half is None):
            softmax.step(rows_columns(acc_S), rescale, hold, ramp)
        elif half:  # of the tile is seen by no row
            softmax.step(rows_columns(halves(acc_S)[0]), rescale, hold, ramp)
            halves(acc_S)[1].fill(0.0)
        else:
            softmax.step(rows_columns(acc_S), rescale, hold, ramp)

    @cute.jit
    def _drop(self, tile: WarpgroupTile, n):
        """Dropout of P."""
        if cutlass.const_expr(self.problem.dropout):
            # Numbers that are drawn ahead would take registers that scores still have.
            tile.scores.drop(tile.frag.tOrP, (used_here(tile.row_first), tile.keys.first_key(n, self.config.tile_n)))

    @cute.jit
    def _exponentials_begin(self, positive: Float32):
        """Keep ptxas from waiting for P·V before the exponentials have begun.

        Left alone it hoists the wait that follows up to the row maxima, and the rest of the softmax no longer overlaps
        P·V. A store may not cross the wait; this one needs one exponential, and is never done, since none is negative.
        Asking for every exponential instead leaves nothing to overlap the rescale of O with (docs/performance.md).
        """
        cute.arch.inline_ptx(
            "{ .reg .pred never; .reg .b32 zero; mov.b32 zero, 0; setp.lt.f32 never, {$r0}, 0f00000000;"
            " @never st.volatile.shared.f32 [zero], {$r0}; }",
            read_only_args=[positive],
        )

    def _probabilities(self, tile: WarpgroupTile, acc_S):
        rounded_operand(acc_S, self.element, tile.frag.tOrP)

    # ---- turns on the tensor cores ---------------------------------------------------------------------------------

    @cute.jit
    def _hand_out_first_turn(self, me: ForwardWorker):
        if cutlass.const_expr(self.config.ping_pong):
            if me.warpgroup == self.warpgroups - 1:
                self._pass_turn(me)

    @cute.jit
    def _wait_for_turn(self, me: ForwardWorker):
        if cutlass.const_expr(self.config.ping_pong):
            cute.arch.barrier(barrier_id=self.turn_barrier + me.warpgroup, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def _pass_turn(self, me: ForwardWorker):
        if cutlass.const_expr(self.config.ping_pong):
            after = (me.warpgroup + 1) % self.warpgroups
            cute.arch.barrier_arrive(barrier_id=self.turn_barrier + after, number_of_threads=2 * WARPGROUP)

    # ---- epilogue --------------------------------------------------------------------------------------------------

    @cute.jit
    def _normalize(self, tile: WarpgroupTile, mLSE: LogSumExp, work: Work):
        """O /= row_sum, and the log-sum-exp where it is asked for."""
        where, frag, values = tile.me.cO.thread, tile.frag, tile.values
        if cutlass.const_expr(self.problem.has_unused("q")):
            clear_rows_past(values.seqlen_q, tile.row_first, where, rows_columns(frag.acc_O), tile.softmax)
        normalize, lse = cute.make_rmem_tensor_like(frag.rescale), LogSumExp.like(frag.rescale)
        tile.softmax.finish(normalize, lse, self.element, values.sink(work), values.kept_scale)
        scale_rows(rows_columns(frag.acc_O), normalize)
        store_lse(mLSE, lse, where, tile.row_first, work)

    @cute.jit
    def _store_o(self, tile: WarpgroupTile, into, sO: cute.Tensor | None, where):
        """O to global memory, from registers or once the last one has left the same shared memory."""
        (o, mO), (block, head, span), group = into, where, tile.me.warpgroup
        if cutlass.const_expr(self.config.o_from_registers):
            self.store_rows("O", tile.frag.acc_O, mO, span, head, block)
        else:
            self.wait_for_store(group)
            self.store(self.lay.store_accumulator(self.config), tile.frag.acc_O, o, sO, group, group, where)
