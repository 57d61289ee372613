"""Backward attention with TMA copies and warpgroup MMA (Hopper), for heads wider than 128: two kernels.

dK and dV of 128 keys and 256 columns would fill a multiprocessor's registers, and with fewer keys a block the float32 sums
of dQ would go to memory too often. So the gradients of keys and of queries have a kernel each, which computes the scores
anew: seven products instead of five, but no sums in global memory, nothing to clear or to cast, and the same bits each
time.

:class:`KeyGradients`: a block owns 64 keys; two warpgroups walk over the query tiles side by side. The first takes
Sᵀ = K·Qᵀ, P, and dV += Pᵀ·dO; the second dPᵀ = V·dOᵀ, dS, and dK += dSᵀ·Q. P passes from the first to the second in the
operands' dtype, as it lies in registers. Each has its own pace: while one multiplies, the other takes exponentials or
differences.

:class:`QueryGradients`: a block owns 128 queries, 64 for each warpgroup, and walks over key tiles as the forward pass does:
S = Q·Kᵀ, dP = dO·Vᵀ, dQ += dS·K.

In the second kernel the last product of a tile runs into the next tile; its operand is released there.

In the first, what comes with a stage for each row (log-sum-exp, delta) has gone into a product before the stage is released. A
read of shared memory that is merely issued before is not enough: where the release follows at once, the next tile's values have
been seen to come first, though both are one thread's and in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup

from cute_attn.layouts.base import cute_layout
from cute_attn.layouts.fragments import as_operand_a, transposed
from cute_attn.mainloop.common import (
    Gradients,
    Inputs,
    KeyTiles,
    QueryTiles,
    Rows,
    Signals,
    Values,
)
from cute_attn.mainloop.guard import FiniteRows, UnmarkedRows, copy_carefully, finite_row, of_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.warpgroups import (
    WARP,
    WARPGROUP,
    Kernel,
    KeyBlocks,
    Operand,
    of_columns,
    rounded_operand,
)
from cute_attn.scheduler import Tiles, Work

COPY_WARPS = (0, 1)


class Backward:
    """The kernels of one (problem, config)."""

    def __init__(self, problem, config):
        self.keys = KeyGradients(problem, config)
        self.queries = QueryGradients(problem, config)

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values, tiles, blocks, stream):
        """Launch the kernels whose gradients are asked for."""
        if cutlass.const_expr(gradients.mdK is not None or gradients.mdV is not None):
            self.keys.launch(inputs, rows, gradients, signals, values, tiles.in_small_groups(blocks), stream)
        elif cutlass.const_expr(self.queries.problem.masked):
            LookAtKeys().launch(inputs.k, signals, stream)
        if cutlass.const_expr(gradients.mdQ is not None):
            self.queries.launch(inputs, rows, gradients, signals, values, tiles.sequences, blocks, stream)


class LookAtKeys:
    """Asks for care where a key is not finite, if no block of :class:`KeyGradients` does."""

    THREADS = 128

    @cute.jit
    def launch(self, mK: cute.Tensor, signals: Signals, stream):
        """A thread a key."""
        keys, _, heads_kv, batch = mK.shape
        blocks = cute.ceil_div(keys, self.THREADS) * heads_kv * batch
        self.kernel(mK, signals).launch(grid=[blocks, 1, 1], block=[self.THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mK: cute.Tensor, signals: Signals):
        keys, _, heads_kv, _ = mK.shape
        blocks = cute.ceil_div(keys, self.THREADS)
        index = cute.arch.block_idx()[0]
        row = index % blocks * self.THREADS + cute.arch.thread_idx()[0]
        if row < keys:
            if not finite_row(mK[None, None, index // blocks % heads_kv, index // blocks // heads_kv], row):
                signals.ask_for_care()


@dataclass(frozen=True)
class Operands:
    """The tensors that TMA copies; a gradient that is not asked for is ``None``."""

    q: Operand
    k: Operand
    v: Operand
    do: Operand
    dk: Operand | None = None
    dv: Operand | None = None
    dq: Operand | None = None


# ---- dK and dV -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyPipelines:
    """K and V have one stage each, Q (with the rows' LSE) and dO (with their delta) several; P's are from the first computing
    warpgroup to the second."""

    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    p: pipeline.PipelineAsync


@dataclass(frozen=True)
class KeyShared:
    """Shared memory: ``(rows, columns, slot)`` for the operands, ``(thread, value, slot)`` for P, ``(tile_m, stage)`` for
    a row's values, ``(tile_n)`` for which keys are hidden (``guard.py``). dV lies over K, dK over V."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    dk: cute.Tensor
    dv: cute.Tensor
    p: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    hidden: cute.Tensor | None


class KeyGradients(KeyBlocks):
    """dK and dV."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.needs_k, self.needs_v = "k" in problem.gradients, "v" in problem.gradients

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values: Values, tiles, stream):
        """Make the TMA descriptors and launch a block for each key tile."""
        dk = self.operand("dK", gradients.mdK, self.lay.copy_out) if cutlass.const_expr(self.needs_k) else None
        dv = self.operand("dV", gradients.mdV, self.lay.copy_out) if cutlass.const_expr(self.needs_v) else None
        operands = Operands(*self.input_operands(inputs), dk=dk, dv=dv)
        self.kernel(operands, inputs.if_masked(self.problem), rows, signals, values, tiles).launch(
            grid=[tiles.count(), 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, operands: Operands, plain: Inputs | None, rows: Rows, signals, values: Values, tiles: Tiles):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        shared, pipes = self._setup()
        from_memory = (plain, rows, care, signals)
        tiles.one(partial(self._key_tile, operands, from_memory, shared, pipes, values, tiles.heads_per_kv))

    @cute.jit
    def _key_tile(self, operands: Operands, from_memory, shared: KeyShared, pipes, values: Values, heads_per_kv, work: Work):
        """The block's tile: each warp its part."""
        plain, rows, care, signals = from_memory
        values, where = values.of(work), (work, heads_per_kv)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_WARPS[0]:
                self.copy_k_q(operands, plain, shared, pipes, rows, care, values, where)
            if warp == COPY_WARPS[1]:
                self.copy_v_do(operands, plain, shared, pipes, rows, care, values, where)
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            if warp < 2 * WARPGROUP // 32:
                self._values_warpgroup(operands, shared, pipes, signals, values, where)
            else:
                self._keys_warpgroup(operands, shared, pipes, values, where)

    def _setup(self):
        """Allocate shared memory and initialise the barriers."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()

        sK, sV = self.tensor(smem, "K", "V"), self.tensor(smem, "V", "K")
        shared = KeyShared(
            k=sK,
            v=sV,
            q=self.tensor(smem, "Q"),
            do=self.tensor(smem, "dO"),
            dk=self.over("dK", sV),
            dv=self.over("dV", sK),
            p=smem.allocate_tensor(self.element, cute_layout(lay.handed_over(config)), 128),
            lse=self.floats(smem, config.tile_m, config.stages),
            delta=self.floats(smem, config.tile_m, config.stages),
            hidden=self.hidden_keys(smem, config.tile_n),
        )
        row_bytes = config.tile_m * lay.ACCUMULATOR_BYTES
        half = config.mma_warps // 2
        pipes = KeyPipelines(
            k=self.pipe(smem, 1, half, lay.slot_bytes("K", config)),
            v=self.pipe(smem, 1, half, lay.slot_bytes("V", config)),
            q=self.pipe(smem, config.stages, config.mma_warps, lay.slot_bytes("Q", config) + row_bytes),
            do=self.pipe(smem, config.stages, config.mma_warps, lay.slot_bytes("dO", config) + row_bytes),
            p=self.hand_over_pipe(smem, lay.P_STAGES, half),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return shared, pipes

    @cute.jit
    def _values_warpgroup(self, operands: Operands, shared: KeyShared, pipes: KeyPipelines, signals, values: Values, where):
        """The warpgroup of P and dV. If it has to hide keys, the kernel of dQ has to copy them carefully."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        S, dV = self.lay.tiled_mma("S", self.config).get_slice(0), self.lay.tiled_mma("dV", self.config).get_slice(0)
        tSrK = S.make_fragment_A(S.partition_A(shared.k[None, None, 0]))
        tSrQ = S.make_fragment_B(S.partition_B(shared.q))
        tVrdO = dV.make_fragment_B(dV.partition_B(transposed(shared.do)))
        cS = Coordinates.of(self.lay.tiled_mma("S", self.config), thread, (self.config.tile_n, self.config.tile_m))
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        p_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.lay.P_STAGES)
        work, heads_per_kv = where
        visited, scores = QueryTiles.of(values, self.problem, work.block, self.config), Scores(cS, values, self.problem, True)
        acc_dV = self.accumulator("dV", self.config.tile_dv)
        pipes.k.consumer_wait(k_state)
        hides = None
        if cutlass.const_expr(self.problem.masked):
            hides = self.hide_keys(shared.k[None, None, 0], None, shared.hidden, self.group())
            if hides:
                signals.ask_for_care()
        i = Int32(0)
        for _ in cutlass.range(visited.count * heads_per_kv, unroll=1):
            pipes.q.consumer_wait(state)
            acc_S = self.scores("S", self.config.tile_m, tSrK, tSrQ[None, None, None, state.index])
            warpgroup.wait_group(0)
            m_block = visited.in_order(i, self.problem)
            hidden = None
            if cutlass.const_expr(hides is not None):
                hidden = hides, of_keys(S, thread, shared.hidden, self.config.tile_m)
            origin = (work.block * self.config.tile_n, m_block * self.config.tile_m)
            scores.apply_rules(acc_S, origin, visited.needs_mask(m_block), hidden)
            P = scores.probabilities(acc_S, of_columns(S, thread, shared.lse[None, state.index]), self.element)
            rP = rounded_operand(P, self.element)
            if cutlass.const_expr(self.needs_k):
                of_ds = rP if cutlass.const_expr(P is acc_S) else rounded_operand(acc_S, self.element)
                p_state = self._hand_over(of_ds, shared, pipes, thread, p_state)
            pipes.do.consumer_wait(state)
            if cutlass.const_expr(self.needs_v):
                mma, tB = self.lay.tiled_mma("dV", self.config), tVrdO[None, None, None, state.index]
                self.gemm(mma, acc_dV, rP, tB, accumulate=True)
            self.release_rows(pipes.q, state)
            warpgroup.wait_group(0)
            pipes.do.consumer_release(state)
            state.advance()
            i = i + 1 if i + 1 < visited.count else Int32(0)
        if cutlass.const_expr(self.needs_v):
            shape = (self.config.tile_n, self.config.tile_dv)
            self.clear_unused("dV", shape, "k", values.seqlen_k, work.block, acc_dV)
            group, copy = self.group(), self.lay.store_accumulator("dV", self.config)
            self.store(copy, acc_dV, operands.dv, shared.dv, group, 0, (work.block, work.head_kv, work.k))
            self.wait_for_store(group)

    @cute.jit
    def _keys_warpgroup(self, operands: Operands, shared: KeyShared, pipes: KeyPipelines, values: Values, where):
        """The warpgroup of dS and dK."""
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        dP, dK = self.lay.tiled_mma("dP", self.config).get_slice(0), self.lay.tiled_mma("dK", self.config).get_slice(0)
        tPrV = dP.make_fragment_A(dP.partition_A(shared.v[None, None, 0]))
        tPrdO = dP.make_fragment_B(dP.partition_B(shared.do))
        tKrQ = dK.make_fragment_B(dK.partition_B(transposed(shared.q)))
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        p_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.lay.P_STAGES)
        work, heads_per_kv = where
        visited, scores = QueryTiles.of(values, self.problem, work.block, self.config), Scores(None, values, self.problem, True)
        acc_dK = self.accumulator("dK", self.config.tile_d)
        pipes.v.consumer_wait(k_state)
        if cutlass.const_expr(self.problem.masked):
            self.hide_keys(None, shared.v[None, None, 0], shared.hidden, self.group())
        for _ in cutlass.range(visited.count * heads_per_kv, unroll=1):
            pipes.do.consumer_wait(state)
            if cutlass.const_expr(self.needs_k):
                acc_dP = self.scores("dP", self.config.tile_m, tPrV, tPrdO[None, None, None, state.index])
                warpgroup.wait_group(0)
                P, p_state = self._take_over(acc_dP, shared, pipes, thread, p_state)
                delta = of_columns(dP, thread, shared.delta[None, state.index])
                scores.gradients(P, acc_dP, delta)
            pipes.q.consumer_wait(state)
            if cutlass.const_expr(self.needs_k):
                rdS = rounded_operand(P, self.element)
                mma, tB = self.lay.tiled_mma("dK", self.config), tKrQ[None, None, None, state.index]
                self.gemm(mma, acc_dK, rdS, tB, accumulate=True)
            self.release_rows(pipes.do, state)
            warpgroup.wait_group(0)
            pipes.q.consumer_release(state)
            state.advance()
        if cutlass.const_expr(self.needs_k):
            acc_dK.store(acc_dK.load() * Float32(values.scale(self.problem)))
            shape = (self.config.tile_n, self.config.tile_d)
            self.clear_unused("dK", shape, "k", values.seqlen_k, work.block, acc_dK)
            group, copy = self.group(), self.lay.store_accumulator("dK", self.config)
            self.store(copy, acc_dK, operands.dk, shared.dk, group, 0, (work.block, work.head_kv, work.k))
            self.wait_for_store(group)

    @cute.jit
    def _hand_over(self, rP: cute.Tensor, shared: KeyShared, pipes: KeyPipelines, thread, p_state):
        """P to the other warpgroup, each thread's registers as they are: the same thread there has the same scores."""
        pipes.p.producer_acquire(p_state)
        into = shared.p[thread, None, p_state.index]
        cute.autovec_copy(cute.make_tensor(rP.iterator, cute.make_layout(into.shape)), into)
        self.arrive(pipes.p.producer_commit, p_state)
        p_state.advance()
        return p_state

    @cute.jit
    def _take_over(self, acc_dP: cute.Tensor, shared: KeyShared, pipes: KeyPipelines, thread, p_state):
        """P from the other warpgroup, as float32 in the layout of dP."""
        rP = cute.make_rmem_tensor(as_operand_a(acc_dP).shape, self.element)
        pipes.p.consumer_wait(p_state)
        source = shared.p[thread, None, p_state.index]
        cute.autovec_copy(source, cute.make_tensor(rP.iterator, cute.make_layout(source.shape)))
        self.arrive(pipes.p.consumer_release, p_state)
        p_state.advance()
        P = cute.make_rmem_tensor_like(acc_dP)
        as_operand_a(P).store(rP.load().to(Float32))
        return P, p_state


# ---- dQ --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueryPipelines:
    """Q and dO have one stage for each computing warpgroup, in one pipeline; K has several stages, V its own."""

    q: pipeline.PipelineTmaAsync
    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync


@dataclass(frozen=True)
class QueryShared:
    """Shared memory, ``(rows, columns, slot)``, and ``(tile_n, stage)`` for which keys are hidden (``guard.py``). dQ lies over
    Q."""

    q: cute.Tensor
    do: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    dq: cute.Tensor
    hidden: cute.Tensor | None


class QueryGradients(Kernel):
    """dQ."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        rows = self.warpgroups * self.lay.ROWS_PER_WARPGROUP
        self.block = replace(config, tile_m=rows)  # for what counts a block's queries

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values: Values, sequences, blocks, stream):
        """Make the TMA descriptors and launch a block for each query tile."""
        dq = self.operand("dQ", gradients.mdQ, self.lay.copy_out)
        heads_per_kv = inputs.q.shape[2] // inputs.k.shape[2]
        tiles = Tiles.of(inputs.q.shape, heads_per_kv, self.block.tile_m, blocks, self.problem.bounded_right, sequences)
        operands = Operands(*self.input_operands(inputs, "q"), dq=dq)
        self.kernel(operands, inputs.if_masked(self.problem), rows, signals, values, tiles.in_small_groups(blocks)).launch(
            grid=[tiles.count(), 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, operands: Operands, plain: Inputs | None, rows: Rows, signals, values: Values, tiles: Tiles):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        shared, pipes = self._setup()
        tiles.one(partial(self._query_tile, operands, (plain, rows, care), shared, pipes, values))

    @cute.jit
    def _query_tile(self, operands: Operands, from_memory, shared: QueryShared, pipes, values: Values, work: Work):
        """The block's tile: each warp its part."""
        plain, rows, care = from_memory
        values = values.of(work)
        keys = KeyTiles.of(values, self.problem, work.block, self.block)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_WARPS[0]:
                if cutlass.const_expr(plain is None):
                    self._copy_keys(operands, shared, pipes, keys, work)
                elif care:
                    self._copy_keys_carefully(plain, shared, pipes, keys, work)
                else:
                    self._copy_keys(operands, shared, pipes, keys, work)
            if warp == COPY_WARPS[1]:
                if cutlass.const_expr(plain is None):
                    self._copy_queries(operands, shared, pipes, work)
                elif care:
                    self._copy_queries_carefully(plain, rows, shared, pipes, work)
                else:
                    self._copy_queries(operands, shared, pipes, work)
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            self._compute(operands, shared, pipes, rows, care, values, keys, work)

    def _setup(self):
        """Allocate shared memory and initialise the barriers."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()
        sQ = self.tensor(smem, "qQ")
        rest = [self.tensor(smem, name) for name in ("qdO", "qK", "qV")]
        hidden = self.hidden_keys(smem, config.tile_n, config.stages)
        shared = QueryShared(sQ, *rest, dq=self.over("dQ", sQ), hidden=hidden)
        pipes = QueryPipelines(
            q=self.pipe(smem, self.warpgroups, 4, lay.slot_bytes("qQ", config) + lay.slot_bytes("qdO", config)),
            k=self.pipe(smem, config.stages, config.mma_warps, lay.slot_bytes("qK", config)),
            v=self.pipe(smem, lay.V_STAGES, config.mma_warps, lay.slot_bytes("qV", config)),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return shared, pipes

    @cute.jit
    def _copy_queries(self, operands: Operands, shared: QueryShared, pipes: QueryPipelines, work: Work):
        """One warp: Q and dO, 64 rows for each computing warpgroup."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.warpgroups)
        tQgQ, tQsQ = operands.q.tiles(shared.q, work.q, work.head)
        tOgdO, tOsdO = operands.do.tiles(shared.do, work.q, work.head)
        for w in cutlass.range_constexpr(self.warpgroups):
            pipes.q.producer_acquire(state)
            barrier = pipes.q.producer_get_barrier(state)
            block = work.block * self.warpgroups + w
            cute.copy(operands.q.atom, tQgQ[None, block], tQsQ[None, w], tma_bar_ptr=barrier)
            cute.copy(operands.do.atom, tOgdO[None, block], tOsdO[None, w], tma_bar_ptr=barrier)
            state.advance()

    @cute.jit
    def _copy_keys(self, operands: Operands, shared: QueryShared, pipes: QueryPipelines, keys: KeyTiles, work: Work):
        """One warp: K and V of the key tiles, last keys first."""
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.lay.V_STAGES)
        tKgK, tKsK = operands.k.tiles(shared.k, work.k, work.head_kv, keys.begin)
        tVgV, tVsV = operands.v.tiles(shared.v, work.k, work.head_kv, keys.begin)
        for i in cutlass.range(keys.count, unroll=1):
            n = keys.count - 1 - i
            pipes.k.producer_acquire(k_state)
            barrier = pipes.k.producer_get_barrier(k_state)
            cute.copy(operands.k.atom, tKgK[None, n], tKsK[None, k_state.index], tma_bar_ptr=barrier)
            k_state.advance()
            pipes.v.producer_acquire(v_state)
            barrier = pipes.v.producer_get_barrier(v_state)
            cute.copy(operands.v.atom, tVgV[None, n], tVsV[None, v_state.index], tma_bar_ptr=barrier)
            v_state.advance()

    @cute.jit
    def _copy_queries_carefully(self, plain: Inputs, rows: Rows, shared: QueryShared, pipes: QueryPipelines, work: Work):
        """The same by the warp's threads: see ``guard.py``."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.warpgroups)
        threads, unmarked = (cute.arch.lane_idx(), WARP), UnmarkedRows(work.q.padded_row_values(rows.lse_raw, work.head))
        for w in cutlass.range_constexpr(self.warpgroups):
            self.acquire_for_threads(pipes.q, state)
            first = (work.block * self.warpgroups + w) * self.lay.ROWS_PER_WARPGROUP
            for m, s in ((plain.q, shared.q), (plain.do, shared.do)):
                copy_carefully(work.q.rows(m, work.head), s[None, None, w], first, threads, unmarked, 0.0)
            self.publish_by_threads(pipes.q, state)
            state.advance()

    @cute.jit
    def _copy_keys_carefully(self, plain: Inputs, shared: QueryShared, pipes: QueryPipelines, keys: KeyTiles, work: Work):
        """The same by the warp's threads: see ``guard.py``."""
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.config.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.lay.V_STAGES)
        gK, gV = (work.k.rows(m, work.head_kv) for m in (plain.k, plain.v))
        threads, finite_keys, finite_values = (cute.arch.lane_idx(), WARP), FiniteRows(gK), FiniteRows(gV)
        for i in cutlass.range(keys.count, unroll=1):
            first = keys.begin + (keys.count - 1 - i) * self.config.tile_n
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
    def _compute(
        self, operands: Operands, shared: QueryShared, pipes: QueryPipelines, rows: Rows, care, values: Values, keys, work
    ):
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

        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.lay.V_STAGES)
        block = work.block * self.warpgroups + w
        row_first = block * self.lay.ROWS_PER_WARPGROUP
        acc_dQ = self.accumulator("dQ", self.config.tile_d)
        by_row = (work.q.padded_row_values(m, work.head) for m in (rows.lse_raw, rows.delta))
        lse_raw, delta = (self._of_rows(m, cS, row_first) for m in by_row)
        q_state = pipeline.PipelineState(self.warpgroups, Int32(0), w, Int32(0))
        pipes.q.consumer_wait(q_state)
        for i in cutlass.range(keys.count, unroll=1):
            n = keys.count - 1 - i
            pipes.k.consumer_wait(k_state)
            acc_S = self.scores("qS", self.config.tile_n, tSrQ, tSrK[None, None, None, k_state.index])
            pipes.v.consumer_wait(v_state)
            acc_dP = self.scores("qdP", self.config.tile_n, tPrdO, tPrV[None, None, None, v_state.index])
            warpgroup.wait_group(1)
            if i > 0:
                pipes.k.consumer_release(self.stage_before(k_state))
            hidden = None
            if cutlass.const_expr(care is not None):
                hidden = care, of_columns(S, index % WARPGROUP, shared.hidden[None, k_state.index])
            origin = (row_first, keys.begin + n * self.config.tile_n)
            scores.apply_rules(acc_S, origin, (n >= keys.whole_end) | (n < keys.whole_begin), hidden)
            scores.probabilities(acc_S, lse_raw, self.element)
            warpgroup.wait_group(0)
            pipes.v.consumer_release(v_state)
            scores.gradients(acc_S, acc_dP, delta)
            rdS = rounded_operand(acc_S, self.element)
            mma, tB = self.lay.tiled_mma("dQ", self.config), tQrK[None, None, None, k_state.index]
            self.gemm(mma, acc_dQ, rdS, tB, accumulate=True)
            k_state.advance()
            v_state.advance()
        warpgroup.wait_group(0)
        acc_dQ.store(acc_dQ.load() * Float32(values.scale(self.problem)))
        dq_shape = (self.lay.ROWS_PER_WARPGROUP, self.config.tile_d)
        self.clear_unused("dQ", dq_shape, "q", values.seqlen_q, block, acc_dQ)
        copy, where = self.lay.store_accumulator("dQ", self.config), (block, work.head, work.q)
        self.store(copy, acc_dQ, operands.dq, shared.dq, w, w, where)
        self.wait_for_store(w)

    def _of_rows(self, mRow: cute.Tensor, cS: Coordinates, row_first) -> cute.Tensor:
        """A value of each of this thread's rows."""
        count = cute.size(cS.thread, mode=[0])
        out = cute.make_rmem_tensor(count, Float32)
        for r in range(count):
            out[r] = mRow[row_first + cS.thread[r, 0][0]]
        return out
