"""dQ of heads wider than 128, with TMA copies and warpgroup MMA (Hopper): see ``tma_wgmma_wide.py``.

A block owns 128 queries, 64 for each warpgroup, and walks over key tiles as the forward pass does: S = Q·Kᵀ, dP = dO·Vᵀ,
dQ += dS·K. The last product of a tile runs until the next tile's scores have been issued: then K is released, and dP is issued,
whose registers dS had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup

from cute_attn.layouts.base import COUNTERS, row_padding
from cute_attn.layouts.fragments import transposed
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Values
from cute_attn.mainloop.guard import FiniteRows, UnmarkedRows, copy_carefully
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.walk import KeyTiles
from cute_attn.mainloop.warpgroups import NONE_DONE, WARP, WARPGROUP, Kernel, TmaOperands, key_tile, of_columns, rounded_operand
from cute_attn.mainloop.work_queue import WorkQueue
from cute_attn.scheduler import Tiles, Work

COPY_KEYS_WARP, COPY_QUERIES_WARP = 0, 1


@dataclass(frozen=True)
class QueryPipelines:
    """Q and dO have one stage for each computing warpgroup; K has several stages, V its own."""

    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    work: pipeline.PipelineAsync


@dataclass(frozen=True)
class QueryShared:
    """Shared memory, ``(rows, columns, slot)``, and ``(tile_n, stage)`` for which keys are hidden (``guard.py``), and the
    block's tiles."""

    q: cute.Tensor
    do: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    hidden: cute.Tensor | None
    work: cute.Tensor


class QueryGradients(Kernel):
    """The kernel of dQ of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        rows = self.warpgroups * self.lay.ROWS_PER_WARPGROUP
        self.block = replace(config, tile_m=rows)  # for what counts a block's queries
        self.draws = problem.masked or bool(problem.ragged)
        # A warpgroup passes over keys that others alone see.
        self.skips_unseen = problem.bounded_right or bool(problem.blocks)

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values: Values, sequences, blocks, stream):
        """Make the TMA descriptors and launch persistent blocks."""
        heads_per_kv = inputs.q.shape[2] // inputs.k.shape[2]
        tiles = Tiles.of(inputs.q.shape, heads_per_kv, self.block.tile_m, blocks, self.problem.unequal, sequences)
        operands = TmaOperands(*self.input_operands(inputs, "q"))
        tiles, count = self.launched(tiles, blocks, self.draws)
        self.kernel(operands, inputs.if_masked(self.problem), rows, gradients.mdQ, signals, values, tiles).launch(
            grid=[count, 1, 1], block=[self.config.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, operands: TmaOperands, plain: Inputs | None, rows: Rows, mdQ, signals, values: Values, tiles: Tiles):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        shared, pipes = self._setup()
        ragged = bool(self.problem.ragged)
        ragged_tiles = {"numbered": ragged, "ragged": ragged, "padding": row_padding(self.config)}
        queue = WorkQueue(shared.work, pipes.work, None, self.arrive, **ragged_tiles)
        of_tile = partial(self._query_tile, values)
        each = lambda part: queue.taker().each(partial(of_tile, part), NONE_DONE)  # noqa: E731
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_KEYS_WARP:
                part = partial(of_tile, partial(self._copy_keys, operands, plain, care, shared, pipes))
                # A word that counts tickets of nobody else: where dQ has no sums, query tiles have no counters.
                ticket = partial(signals.ticket, COUNTERS) if self.draws else None
                self.lead(queue, tiles, ticket, NONE_DONE, part)
            if warp == COPY_QUERIES_WARP:
                each(partial(self._copy_queries, operands, plain, care, rows, shared, pipes))
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            each(partial(self._compute, mdQ, shared, pipes, rows, care))

    @cute.jit
    def _query_tile(self, values: Values, part: cutlass.Constexpr, done, work: Work):
        """A warp's part of one tile. Returns how many query tiles and key tiles the block has had, ``done`` and this one."""
        values = values.of(work)
        keys = KeyTiles.of(values, self.problem, work.block, self.block)
        part(values, keys, work, done)
        return done[0] + 1, done[1] + keys.count

    def _setup(self):
        """Allocate shared memory and initialise the barriers."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()
        operands = [self.tensor(smem, name) for name in ("qQ", "qdO", "qK", "qV")]
        shared = QueryShared(*operands, self.hidden_keys(smem, config.tile_n, config.stages), WorkQueue.slots_in(smem))
        pipes = QueryPipelines(
            q=self.pipe(smem, self.warpgroups, 4, lay.slot_bytes("qQ", config)),
            do=self.pipe(smem, self.warpgroups, 4, lay.slot_bytes("qdO", config)),
            k=self.pipe(smem, config.stages, config.mma_warps, lay.slot_bytes("qK", config)),
            v=self.pipe(smem, lay.v_stages(config), config.mma_warps, lay.slot_bytes("qV", config)),
            work=self.hand_over_pipe(smem, lay.WORK_SLOTS, 1, 1 + config.mma_warps),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return shared, pipes

    @cute.jit
    def _copy_queries(self, operands, plain: Inputs | None, care, rows: Rows, shared, pipes, values, keys, work: Work, done):
        """One warp: Q and dO, 64 rows for each computing warpgroup."""
        usual = partial(self._copy_queries_at_once, operands, shared, pipes, work, done)
        self.by_care(care, usual, partial(self._copy_queries_carefully, plain, rows, shared, pipes, work, done))

    @cute.jit
    def _copy_queries_at_once(self, operands: TmaOperands, shared: QueryShared, pipes: QueryPipelines, work: Work, done):
        """By TMA."""
        for operand, s, pipe in ((operands.q, shared.q, pipes.q), (operands.do, shared.do, pipes.do)):
            tXgX, tXsX = operand.tiles(s, work.q, work.head)
            for w in cutlass.range_constexpr(self.warpgroups):
                state = self.filling(self.warpgroups, done[0] * self.warpgroups + w)
                pipe.producer_acquire(state)
                barrier = pipe.producer_get_barrier(state)
                cute.copy(operand.atom, tXgX[None, work.block * self.warpgroups + w], tXsX[None, w], tma_bar_ptr=barrier)

    @cute.jit
    def _copy_keys(self, operands, plain: Inputs | None, care, shared, pipes, values, keys: KeyTiles, work: Work, done):
        """One warp: K and V of the key tiles, last keys first."""
        states = self.filling(self.config.stages, done[1]), self.filling(self.lay.v_stages(self.config), done[1])
        usual = partial(self._copy_keys_at_once, operands, shared, pipes, keys, work, states)
        self.by_care(care, usual, partial(self._copy_keys_carefully, plain, shared, pipes, keys, work, states))

    @cute.jit
    def _copy_keys_at_once(self, operands: TmaOperands, shared: QueryShared, pipes: QueryPipelines, keys, work: Work, states):
        """By TMA."""
        k_state, v_state = states
        tKgK, tKsK = operands.k.tiles(shared.k, work.k, work.head_kv, keys.begin)
        tVgV, tVsV = operands.v.tiles(shared.v, work.k, work.head_kv, keys.begin)
        for i in cutlass.range(keys.count, unroll=1):
            n = keys.place(i)
            pipes.k.producer_acquire(k_state)
            self.copy(operands.k, key_tile(operands.k, tKgK, shared.k, work, keys, n), tKsK, pipes.k, k_state)
            k_state.advance()
            pipes.v.producer_acquire(v_state)
            self.copy(operands.v, key_tile(operands.v, tVgV, shared.v, work, keys, n), tVsV, pipes.v, v_state)
            v_state.advance()

    @cute.jit
    def _copy_queries_carefully(self, plain: Inputs, rows: Rows, shared: QueryShared, pipes: QueryPipelines, work, done):
        """The same by the warp's threads: see ``guard.py``."""
        threads, unmarked = (cute.arch.lane_idx(), WARP), UnmarkedRows(work.q.padded_row_values(rows.lse_raw, work.head))
        for m, s, pipe in ((plain.q, shared.q, pipes.q), (plain.do, shared.do, pipes.do)):
            for w in cutlass.range_constexpr(self.warpgroups):
                state = self.filling(self.warpgroups, done[0] * self.warpgroups + w)
                self.acquire_for_threads(pipe, state)
                first = (work.block * self.warpgroups + w) * self.lay.ROWS_PER_WARPGROUP
                copy_carefully(work.q.rows(m, work.head), s[None, None, w], first, threads, unmarked, 0.0)
                self.publish_by_threads(pipe, state)

    @cute.jit
    def _copy_keys_carefully(self, plain: Inputs, shared: QueryShared, pipes: QueryPipelines, keys, work: Work, states):
        """The same by the warp's threads: see ``guard.py``."""
        k_state, v_state = states
        gK, gV = (work.k.rows(m, work.head_kv) for m in (plain.k, plain.v))
        threads, finite_keys, finite_values = (cute.arch.lane_idx(), WARP), FiniteRows(gK), FiniteRows(gV)
        for i in cutlass.range(keys.count, unroll=1):
            first = keys.first_key(keys.place(i), self.config.tile_n)
            self.acquire_for_threads(pipes.k, k_state)
            copy_carefully(gK, shared.k[None, None, k_state.index], first, threads, finite_keys, 0.0)
            for r in cutlass.range(threads[0], self.config.tile_n, WARP, unroll=1):
                shared.hidden[r, k_state.index] = cutlass.Int8(0) if finite_keys(first + r) else cutlass.Int8(1)
            self.publish_by_threads(pipes.k, k_state)
            k_state.advance()
            self.acquire_for_threads(pipes.v, v_state)
            copy_carefully(gV, shared.v[None, None, v_state.index], first, threads, finite_values, 0.0)
            self.publish_by_threads(pipes.v, v_state)
            v_state.advance()

    @cute.jit
    def _compute(self, mdQ, shared: QueryShared, pipes: QueryPipelines, rows: Rows, care, values: Values, keys, work, done):
        """One computing warpgroup: its 64 rows of the block's tile."""
        index = cute.arch.thread_idx()[0]
        w = self.group()
        S, dP, dQ = (self.lay.tiled_mma(role, self.config).get_slice(0) for role in ("qS", "qdP", "dQ"))
        tSrQ = S.make_fragment_A(S.partition_A(shared.q[None, None, w]))
        tSrK = S.make_fragment_B(S.partition_B(shared.k))
        tPrdO = dP.make_fragment_A(dP.partition_A(shared.do[None, None, w]))
        tPrV = dP.make_fragment_B(dP.partition_B(shared.v))
        tQrK = dQ.make_fragment_B(dQ.partition_B(transposed(shared.k)))
        shape = (self.lay.ROWS_PER_WARPGROUP, self.config.tile_n)
        cS = Coordinates.of(self.lay.tiled_mma("qS", self.config), index % WARPGROUP, shape)
        scores = Scores(cS, values, self.problem)

        k_state, v_state = self.emptying(self.config.stages, done[1]), self.emptying(self.lay.v_stages(self.config), done[1])
        block = work.block * self.warpgroups + w
        row_first = block * self.lay.ROWS_PER_WARPGROUP
        acc_dQ = self.accumulator("dQ", self.config.tile_d)
        by_row = (work.q.padded_row_values(m, work.head) for m in (rows.lse_raw, rows.delta))
        lse_raw, delta = (self._of_rows(m, cS, row_first) for m in by_row)
        q_state = pipeline.PipelineState(self.warpgroups, Int32(0), w, Int32(done[0] % 2))
        if cutlass.const_expr(self.skips_unseen):
            keys, skipped = keys.of_rows(values, self.problem, row_first, self.lay.ROWS_PER_WARPGROUP, self.block)
            for _ in cutlass.range(skipped, unroll=1):
                k_state, v_state = self._pass_over(pipes, k_state, v_state)
        pipes.q.consumer_wait(q_state)
        pipes.do.consumer_wait(q_state)
        for i in cutlass.range(keys.count, unroll=1):
            n = keys.place(i)
            pipes.k.consumer_wait(k_state)
            acc_S = self.scores("qS", self.config.tile_n, tSrQ, tSrK[None, None, None, k_state.index])
            warpgroup.wait_group(1)
            if i > 0:
                pipes.k.consumer_release(self.stage_before(k_state))
            pipes.v.consumer_wait(v_state)
            acc_dP = self.scores("qdP", self.config.tile_n, tPrdO, tPrV[None, None, None, v_state.index])
            kept = None
            if cutlass.const_expr(self.problem.dropout):
                kept = scores.kept((row_first, keys.first_key(n, self.config.tile_n)))
            warpgroup.wait_group(1)
            if i + 1 == keys.count:
                pipes.q.consumer_release(q_state)
            hidden = None
            if cutlass.const_expr(care is not None):
                hidden = care, of_columns(S, index % WARPGROUP, shared.hidden[None, k_state.index])
            origin = (row_first, keys.first_key(n, self.config.tile_n))
            scores.apply_rules(acc_S, origin, keys.needs_mask(n), hidden)
            scores.probabilities(acc_S, lse_raw, self.element, origin, kept)
            warpgroup.wait_group(0)
            pipes.v.consumer_release(v_state)
            if i + 1 == keys.count:
                pipes.do.consumer_release(q_state)
            scores.gradients(acc_S, acc_dP, delta, lse_raw, origin, kept)
            rdS = rounded_operand(acc_S, self.element)
            mma, tB = self.lay.tiled_mma("dQ", self.config), tQrK[None, None, None, k_state.index]
            self.gemm(mma, acc_dQ, rdS, tB, accumulate=True)
            k_state.advance()
            v_state.advance()
        warpgroup.wait_group(0)
        if keys.count > 0:
            pipes.k.consumer_release(self.stage_before(k_state))
        else:
            pipes.q.consumer_release(q_state)
            pipes.do.consumer_release(q_state)
        if cutlass.const_expr(self.problem.blocks):
            for _ in cutlass.range(keys.skipped_last, unroll=1):
                k_state, v_state = self._pass_over(pipes, k_state, v_state)
        acc_dQ.store(acc_dQ.load() * Float32(values.scale(self.problem)))
        dq_shape = (self.lay.ROWS_PER_WARPGROUP, self.config.tile_d)
        self.clear_unused("dQ", dq_shape, "q", values.seqlen_q, block, acc_dQ)
        self.store_rows("dQ", acc_dQ, mdQ, work.q, work.head, block)

    @cute.jit
    def _pass_over(self, pipes: QueryPipelines, k_state, v_state):
        """A key tile that none of the warpgroup's rows sees."""
        for pipe, state in ((pipes.k, k_state), (pipes.v, v_state)):
            pipe.consumer_wait(state)
            pipe.consumer_release(state)
        k_state.advance()
        v_state.advance()
        return k_state, v_state

    def _of_rows(self, mRow: cute.Tensor, cS: Coordinates, row_first) -> cute.Tensor:
        """A value of each of this thread's rows."""
        count = cute.size(cS.thread, mode=[0])
        out = cute.make_rmem_tensor(count, Float32)
        for r in range(count):
            out[r] = mRow[row_first + cS.thread[r, 0][0]]
        return out
