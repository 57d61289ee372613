"""Backward attention with TMA copies and warpgroup MMA (Hopper), for heads up to 128 wide: all gradients in one kernel.

A block owns a tile of keys, 64 for each of its computing warpgroups, and walks over the query tiles that see any of them
(FlashAttention-2, arXiv:2307.08691, algorithm 2; on Hopper, FlashAttention-3, arXiv:2407.08608). Five products a tile:

    Sᵀ = K·Qᵀ,   dPᵀ = V·dOᵀ,   dV += Pᵀ·dO,   dK += dSᵀ·Q,   dQ = dS·K

The first two are transposed, so that Pᵀ and dSᵀ lie in registers as the operands that dV and dK take, and only dS goes
through shared memory, for dQ. A product runs whenever a warpgroup computes something else: dPᵀ while P is taken, dV while
dS is taken and shared, dK while dQ is handed over and until the next tile's Sᵀ begins.

Four warps copy: one K, Q and the rows' LSE; one V, dO and the rows' delta; two take turns with dQ, which the copy engine
adds in float32 to global memory (``cp.reduce.async.bulk``), in the order of the accumulator's registers, which costs no
bank conflict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync

from cute_attn.layouts.base import cute_layout, in_turns
from cute_attn.layouts.fragments import transposed
from cute_attn.mainloop.cluster import sum_in_first_block
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Signals, Values
from cute_attn.mainloop.guard import of_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.mainloop.warpgroups import (
    WARPGROUP,
    InFlight,
    KeyBlocks,
    TmaOperands,
    of_columns,
    rounded_operand,
)
from cute_attn.scheduler import Work

COPY_K_Q_WARP, COPY_V_DO_WARP, ADD_DQ_WARP = 0, 1, 2
ADDERS = 2  # warps from ADD_DQ_WARP on


@dataclass(frozen=True)
class BackwardPipelines:
    """K and V have one stage each, Q (with the rows' LSE) and dO (with their delta) several."""

    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync


@dataclass(frozen=True)
class BackwardShared:
    """The operands in shared memory: ``(64, columns, warpgroup)`` for K and V, ``(tile_m, columns, stage)`` for Q and dO,
    ``(64, tile_m, warpgroup + warpgroups · stage)`` for dS, ``(tile_m, stage)`` for a row's values, ``(thread, value,
    warpgroup)`` for dQ, ``(64, warpgroup)`` for which keys are hidden (``guard.py``)."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    ds: cute.Tensor
    dq: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    hidden: cute.Tensor | None
    ticket: cute.Tensor | None


@dataclass(frozen=True)
class BackwardWorker:
    """A thread of a computing warpgroup: its place, and where its scores lie in the tile."""

    warpgroup: Int32
    thread: Int32
    cS: Coordinates


@dataclass(frozen=True)
class BackwardFragments:
    """What a computing thread holds or points to through the query tiles."""

    tSrK: cute.Tensor  # (MMA, 1, K)
    tSrQ: cute.Tensor  # (MMA, 1, K, stage)
    tPrV: cute.Tensor  # (MMA, 1, K)
    tPrdO: cute.Tensor  # (MMA, 1, K, stage)
    tVrdO: cute.Tensor  # (MMA, 1, K, stage): as the B operand of dV
    tKrQ: cute.Tensor  # (MMA, 1, K, stage): as the B operand of dK
    tQrA: cute.Tensor  # (MMA, 1, K, slot): dS of each warpgroup and stage, and K of each warpgroup, or, turned, the other way
    tQrB: cute.Tensor
    acc_dV: cute.Tensor
    acc_dK: cute.Tensor
    acc_dQ: cute.Tensor


class Backward(KeyBlocks):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.needs_q, self.needs_k, self.needs_v = (name in problem.gradients for name in "qkv")
        self.needs_ds = self.needs_q or self.needs_k
        # Where query tiles are lower than key tiles, some that an edge cuts see keys of one warpgroup only.
        banded = problem.bounded_left or problem.bounded_right
        narrow = config.tile_m < config.tile_n
        self.passes_over = banded and narrow and not (problem.masks_all or problem.blocks or problem.expression.pairs)
        # dQ's barriers: that a warpgroup's sums are there, one for each adder; and that their memory is free again.
        self.full_barrier = self.first_barrier("dQ")
        self.empty_barrier = self.full_barrier + ADDERS * self.warpgroups

    # ---- host ------------------------------------------------------------------------------------------------------

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values, tiles, blocks, stream):
        """Make the TMA descriptors and launch a block for each key tile."""
        q, k, v, do = self.input_operands(inputs)
        dk = self.operand("dK", gradients.mdK, self.lay.copy_out) if cutlass.const_expr(self.needs_k) else None
        dv = self.operand("dV", gradients.mdV, self.lay.copy_out) if cutlass.const_expr(self.needs_v) else None
        # In a fixed order unequal tiles of a head wait for one another the longer, the more of them run at the same time.
        if cutlass.const_expr(not (self.problem.deterministic and self.problem.unequal)):
            tiles = tiles.in_small_groups(blocks)
        plain = inputs.if_masked(self.problem)
        self.kernel(TmaOperands(q, k, v, do, dk, dv), plain, rows, gradients, signals, values, tiles).launch(
            grid=[tiles.count() * self.config.head_blocks, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.config.head_blocks, 1, 1] if self.config.head_blocks > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    # ---- kernel ----------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(self, operands: TmaOperands, plain, rows: Rows, gradients: Gradients, signals, values: Values, tiles):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for operand in (operands.q, operands.k, operands.v, operands.do):
                cpasync.prefetch_descriptor(operand.atom)
        shared, pipes = self._setup(signals)
        if cutlass.const_expr(self.problem.deterministic):
            tiles = replace(tiles, ticket=shared.ticket[0])
        elif cutlass.const_expr(self.config.head_blocks > 1):
            tiles = replace(tiles, ticket=cute.arch.cluster_idx()[0])
        from_memory, into = (plain, rows, care), (gradients, signals)
        tiles.one(partial(self._key_tile, operands, from_memory, into, shared, pipes, values, tiles.heads_per_kv))

    @cute.jit
    def _key_tile(
        self, operands: TmaOperands, from_memory, into, shared: BackwardShared, pipes, values: Values, heads_per_kv, work: Work
    ):
        """The block's tile: each warp its part."""
        plain, rows, care = from_memory
        values, where = values.of(work), self.query_heads(work, heads_per_kv)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_K_Q_WARP:
                self.copy_k_q(operands, plain, shared, pipes, rows, care, values, where)
            if warp == COPY_V_DO_WARP:
                self.copy_v_do(operands, plain, shared, pipes, rows, care, values, where)
            if cutlass.const_expr(self.needs_q):
                if warp >= ADD_DQ_WARP:
                    self._add_dq(*into, shared.dq, values, where, warp - ADD_DQ_WARP)
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            self._compute(operands, shared, pipes, values, where)

    def _setup(self, signals: Signals | None):
        """Allocate shared memory, initialise the barriers and take a ticket."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()

        shared = BackwardShared(
            *(self.tensor(smem, name) for name in ("K", "V", "Q", "dO", "dS")),
            dq=smem.allocate_tensor(Float32, cute_layout(lay.sums(config)), 128),
            lse=self.floats(smem, config.tile_m, config.stages),
            delta=self.floats(smem, config.tile_m, config.stages),
            hidden=self.hidden_keys(smem, lay.ROWS_PER_WARPGROUP, self.warpgroups),
            ticket=self.take_ticket(smem, signals),
        )
        row_bytes, warps = config.tile_m * lay.ACCUMULATOR_BYTES, config.mma_warps
        pipes = BackwardPipelines(
            k=self.pipe(smem, 1, warps, self.warpgroups * lay.slot_bytes("K", config)),
            v=self.pipe(smem, 1, warps, self.warpgroups * lay.slot_bytes("V", config)),
            q=self.pipe(smem, config.stages, warps, lay.slot_bytes("Q", config) + row_bytes),
            do=self.pipe(smem, config.stages, warps, lay.slot_bytes("dO", config) + row_bytes),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return shared, pipes

    # ---- copying warps ---------------------------------------------------------------------------------------------

    @cute.jit
    def _add_dq(self, gradients: Gradients, signals, sdQ: cute.Tensor, values: Values, where, mine: Int32):
        """Two warps add the tiles' dQ to global memory, the first the even ones and the second the odd ones: so one may wait
        until its sum is complete, pass its turn on and wait for the next, while the other adds."""
        lane = cute.arch.lane_idx()
        step = Int32(0)
        if mine == 0:
            self._offer()
        work, members = where
        visited = QueryTiles.of(values, self.problem, work.block, self.config)
        for member in cutlass.range(visited.members(members), unroll=1):
            for i in cutlass.range(visited.count, unroll=1):
                if step % ADDERS == mine:
                    m_block, of = visited.tile(i, member, self.problem)
                    head = work.head + of
                    place = (work.q.padded_tile(m_block, self.config.tile_m), head, work.q.batch)
                    if cutlass.const_expr(self.problem.deterministic):
                        if lane == 0:
                            of_head = values.of_head(head)
                            signals.wait_for_turn(place, visited.rank(of_head, self.problem, m_block, self.config))
                            # What was acquired orders this thread's own accesses; the copy engine's, which add, are another
                            # proxy's (PTX ISA, "Async proxy"). The other way none is needed: a bulk operation that is
                            # complete is followed by such a fence (ibid.).
                            cute.arch.fence_proxy("async.global")
                        cute.arch.sync_warp()
                    for w in cutlass.range_constexpr(self.warpgroups):
                        barrier = self.full_barrier + ADDERS * w + mine
                        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP + 32)
                    if lane == 0:
                        for w in cutlass.range_constexpr(self.warpgroups):
                            _reduce_add(gradients.mdQ[(None, w, *place)], sdQ[None, None, w])
                        cute.arch.cp_async_bulk_commit_group()
                        cute.arch.cp_async_bulk_wait_group(0, read=True)
                    cute.arch.sync_warp()
                    self._offer()
                    if cutlass.const_expr(self.problem.deterministic):
                        if lane == 0:
                            cute.arch.cp_async_bulk_wait_group(0, read=False)
                            signals.pass_turn(place)
                step += 1
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _offer(self):
        """dQ's shared memory to the computing warpgroups, for the next tile."""
        for w in range(self.warpgroups):
            cute.arch.barrier_arrive(barrier_id=self.empty_barrier + w, number_of_threads=WARPGROUP + 32)

    # ---- computing warpgroups --------------------------------------------------------------------------------------

    @cute.jit
    def _compute(self, operands: TmaOperands, shared: BackwardShared, pipes: BackwardPipelines, values: Values, where):
        """One computing warpgroup: 64 keys of the block's tile."""
        me = self._worker()
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1)
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.config.stages)
        work, members = where
        visited = QueryTiles.of(values, self.problem, work.block, self.config)
        key_first = work.block * self.config.tile_n + me.warpgroup * self.lay.ROWS_PER_WARPGROUP
        frag = self._fragments(me, shared)
        for pipe in (pipes.k, pipes.v):
            pipe.consumer_wait(k_state)
        hides = None
        if cutlass.const_expr(self.problem.masked):
            w = me.warpgroup
            sK, sV, hidden = shared.k[None, None, w], shared.v[None, None, w], shared.hidden[None, w]
            hides = self.hide_keys(sK, sV, hidden, w)
        begin, end = Int32(0), visited.begin + visited.count
        if cutlass.const_expr(self.passes_over):
            begin, end = visited.of_keys(values, self.problem, key_first, self.lay.ROWS_PER_WARPGROUP, self.config)
        i = Int32(0)
        for j in cutlass.range(visited.count * visited.members(members), unroll=1):
            m_block, member = visited.tile(i, j // visited.count, self.problem)
            tile = (m_block, visited.needs_mask(i, m_block), hides, j > 0)
            of_head = values.of_head(work.head + member)
            if cutlass.const_expr(not self.passes_over):  # noqa: SIM114
                state = self._step(me, frag, shared, pipes, of_head, key_first, state, tile)
            elif (m_block >= begin) & (m_block < end):
                state = self._step(me, frag, shared, pipes, of_head, key_first, state, tile)
            else:
                state = self._pass_over(me, frag, shared, pipes, state, j > 0)
            i = i + 1 if i + 1 < visited.count else Int32(0)
        if cutlass.const_expr(self.config.overlap_tiles):
            cute.nvgpu.warpgroup.wait_group(0)
        self._store(me, frag, operands, shared, values, work)

    def _worker(self) -> BackwardWorker:
        index = cute.arch.thread_idx()[0]
        thread = index % WARPGROUP
        shape = (self.lay.ROWS_PER_WARPGROUP, self.config.tile_m)
        cS = Coordinates.of(self.lay.tiled_mma("S", self.config), thread, shape)
        return BackwardWorker(self.group(), thread, cS)

    def _fragments(self, me: BackwardWorker, shared: BackwardShared) -> BackwardFragments:
        config, lay, w = self.config, self.lay, me.warpgroup
        S, dP, dV, dK, dQ = (lay.tiled_mma(role, config).get_slice(0) for role in ("S", "dP", "dV", "dK", "dQ"))

        rows, columns = lay.piece_shape(config)
        below = config.tile_m // rows
        sdS = cute.local_tile(transposed(shared.ds), (rows, lay.ROWS_PER_WARPGROUP), (w % below, 0, None))
        sKt = cute.local_tile(transposed(shared.k), (columns, lay.ROWS_PER_WARPGROUP), (w // below, 0, None))
        return BackwardFragments(
            tSrK=S.make_fragment_A(S.partition_A(shared.k[None, None, w])),
            tSrQ=S.make_fragment_B(S.partition_B(shared.q)),
            tPrV=dP.make_fragment_A(dP.partition_A(shared.v[None, None, w])),
            tPrdO=dP.make_fragment_B(dP.partition_B(shared.do)),
            tVrdO=dV.make_fragment_B(dV.partition_B(transposed(shared.do))),
            tKrQ=dK.make_fragment_B(dK.partition_B(transposed(shared.q))),
            tQrA=dQ.make_fragment_A(dQ.partition_A(sKt if lay.turned(config) else sdS)),
            tQrB=dQ.make_fragment_B(dQ.partition_B(sdS if lay.turned(config) else sKt)),
            acc_dV=self.accumulator("dV", config.tile_dv),
            acc_dK=self.accumulator("dK", config.tile_d),
            acc_dQ=self.accumulator("dQ", rows if lay.turned(config) else columns),
        )

    @cute.jit
    def _step(
        self,
        me: BackwardWorker,
        frag: BackwardFragments,
        shared: BackwardShared,
        pipes: BackwardPipelines,
        values: Values,
        key_first,
        state,
        tile,
    ):
        """One query tile. Returns the pipelines' next state.

        With ``overlap_tiles``, dK's product is in flight when it ends, so that the tensor cores have work until the next
        tile's scores are issued; the next step releases Q's slot. Only an accumulator that the loop never reads can stay in
        flight like this, and the operand keeps its registers.
        """
        m_block, masked, hides, follows = tile
        config, lay, stage = self.config, self.lay, state.index
        mma_S = lay.tiled_mma("S", config)
        flight = InFlight("dK") if config.overlap_tiles else InFlight()

        pipes.q.consumer_wait(state)
        acc_S = self.scores("S", config.tile_m, frag.tSrK, frag.tSrQ[None, None, None, stage])
        flight.issued("S")
        pipes.do.consumer_wait(state)
        if cutlass.const_expr(self.needs_ds):
            acc_dP = self.scores("dP", config.tile_m, frag.tPrV, frag.tPrdO[None, None, None, stage])
            flight.issued("dP")
        scores, kept, hidden = Scores(me.cS, values, self.problem, transposed=True), None, None
        if cutlass.const_expr(self.problem.dropout):
            kept = scores.kept((key_first, m_block * config.tile_m))
        flight.wait("S")
        if cutlass.const_expr(config.overlap_tiles):
            if follows:
                self.release_rows(pipes.q, self.stage_before(state), met=self.needs_q)
        if cutlass.const_expr(hides is not None):
            hidden = hides, of_keys(mma_S, me.thread, shared.hidden[None, me.warpgroup], config.tile_m)
        origin = (key_first, m_block * config.tile_m)
        scores.apply_rules(acc_S, origin, masked, hidden)
        lse_raw = of_columns(mma_S, me.thread, shared.lse[None, stage])
        P = scores.probabilities(acc_S, lse_raw, self.element, origin, kept)
        rP = rounded_operand(P, self.element)
        slot = state.count % lay.DS_STAGES * self.warpgroups
        if cutlass.const_expr(self.needs_ds):
            flight.wait("dP")
            delta = of_columns(mma_S, me.thread, shared.delta[None, stage])
            scores.gradients(acc_S, acc_dP, delta, lse_raw, origin, kept)
            rdS = rounded_operand(acc_S, self.element)
            if cutlass.const_expr(self.needs_q):
                self._store_ds(me, rdS, shared.ds[None, None, slot + me.warpgroup])
        if cutlass.const_expr(self.needs_v):  # runs while the warpgroups meet
            self.gemm(lay.tiled_mma("dV", config), frag.acc_dV, rP, frag.tVrdO[None, None, None, stage], accumulate=True)
            flight.issued("dV")
        if cutlass.const_expr(self.needs_ds):
            if cutlass.const_expr(self.needs_q):
                self._meet()
                self._dq(frag, slot)
                flight.issued("dQ")
            if cutlass.const_expr(self.needs_k):
                self.gemm(lay.tiled_mma("dK", config), frag.acc_dK, rdS, frag.tKrQ[None, None, None, stage], accumulate=True)
                flight.issued("dK")
        flight.wait("dV")
        self.release_rows(pipes.do, state)  # by now all have met, but with a warp barrier here d64 gains 3 %
        if cutlass.const_expr(self.needs_q):
            flight.wait("dQ")
            self._hand_over_dq(me, frag, shared, state.count % ADDERS)
        if cutlass.const_expr(not config.overlap_tiles):
            flight.wait("dK")
            self.release_rows(pipes.q, state, met=self.needs_q)
        state.advance()
        return state

    @cute.jit
    def _pass_over(self, me: BackwardWorker, frag: BackwardFragments, shared: BackwardShared, pipes, state, follows):
        """The same of a query tile that sees none of this warpgroup's keys: its dS is zero, its piece of dQ of the others'
        keys. Returns the pipelines' next state."""
        pipes.q.consumer_wait(state)
        pipes.do.consumer_wait(state)
        if cutlass.const_expr(self.config.overlap_tiles):
            cute.nvgpu.warpgroup.wait_group(0)
            if follows:
                self.release_rows(pipes.q, self.stage_before(state), met=self.needs_q)
        if cutlass.const_expr(self.needs_q):
            slot = state.count % self.lay.DS_STAGES * self.warpgroups
            none = cute.make_rmem_tensor(
                self.lay.tiled_mma("S", self.config).partition_shape_C((self.lay.ROWS_PER_WARPGROUP, self.config.tile_m)),
                self.element,
            )
            none.fill(0.0)
            self._store_ds(me, none, shared.ds[None, None, slot + me.warpgroup])
            self._meet()
            self._dq(frag, slot)
            cute.nvgpu.warpgroup.wait_group(0)
            self._hand_over_dq(me, frag, shared, state.count % ADDERS)
        self.release_rows(pipes.do, state)
        if cutlass.const_expr(not self.config.overlap_tiles):
            self.release_rows(pipes.q, state, met=self.needs_q)
        state.advance()
        return state

    @cute.jit
    def _store_ds(self, me: BackwardWorker, rdS: cute.Tensor, sdS: cute.Tensor):
        """This warpgroup's dSᵀ to shared memory, for all of them once they have met."""
        copy = self.lay.store_accumulator("dS", self.config).get_slice(me.thread)
        cute.copy(copy, copy.retile(rdS), copy.partition_D(sdS))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def _dq(self, frag: BackwardFragments, slot):
        """Issue this warpgroup's piece of dQ = dS·K over all of the block's keys."""
        mma = self.lay.tiled_mma("dQ", self.config)
        cute.nvgpu.warpgroup.fence()
        atom = cute.make_mma_atom(mma.op)
        atom.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, False)
        for w in cutlass.range_constexpr(self.warpgroups):
            a, b = (w, slot + w) if self.lay.turned(self.config) else (slot + w, w)
            for k in cutlass.range_constexpr(cute.size(frag.tQrA, mode=[2])):
                cute.gemm(atom, frag.acc_dQ, frag.tQrA[None, None, k, a], frag.tQrB[None, None, k, b], frag.acc_dQ)
                atom.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, True)
        cute.nvgpu.warpgroup.commit_group()

    @cute.jit
    def _hand_over_dq(self, me: BackwardWorker, frag: BackwardFragments, shared: BackwardShared, adder):
        """This warpgroup's piece of dQ to shared memory, in the order of its registers, for the warp that adds it."""
        cute.arch.barrier(barrier_id=self.empty_barrier + me.warpgroup, number_of_threads=WARPGROUP + 32)
        sdQ = shared.dq[None, None, me.warpgroup]
        into = cute.make_tensor(sdQ.iterator + sdQ.stride[0] * me.thread, cute.select(sdQ.layout, mode=[1]))
        cute.autovec_copy(cute.make_tensor(frag.acc_dQ.iterator, cute.make_layout(into.shape)), into)
        cute.arch.fence_view_async_shared()
        barrier = self.full_barrier + ADDERS * me.warpgroup + adder
        cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=WARPGROUP + 32)

    def _meet(self):
        """All computing warpgroups."""
        cute.arch.barrier(barrier_id=self.first_barrier("dS"), number_of_threads=self.config.mma_threads)

    # ---- epilogue --------------------------------------------------------------------------------------------------

    @cute.jit
    def _store(
        self,
        me: BackwardWorker,
        frag: BackwardFragments,
        operands: TmaOperands,
        shared: BackwardShared,
        values: Values,
        work: Work,
    ):
        """dK and dV to global memory. Where blocks share a key tile, the first one's are the sums of all."""
        if cutlass.const_expr(self.config.head_blocks == 1):
            self._store_from(me, frag, operands, shared, values, work)
        else:
            self._meet()
            parts = []
            if cutlass.const_expr(self.needs_v):
                parts.append((frag.acc_dV, self._sums_over(shared.q, me, frag.acc_dV)))
            if cutlass.const_expr(self.needs_k):
                parts.append((frag.acc_dK, self._sums_over(shared.k, me, frag.acc_dK)))
            sum_in_first_block(parts, self.config.head_blocks)
            if cute.arch.block_in_cluster_idx()[0] == 0:
                self._store_from(me, frag, operands, shared, values, work)

    def _sums_over(self, operands: cute.Tensor, me: BackwardWorker, acc: cute.Tensor) -> cute.Tensor:
        """A thread's accumulator in float32 in the shared memory of two operands, of which ``operands`` is the first."""
        layout = in_turns(WARPGROUP, cute.size(acc), self.config.add_width, self.warpgroups)
        sums = cute.make_tensor(cute.recast_ptr(operands.iterator, dtype=Float32), cute_layout(layout))
        mine = sums[me.thread, None, me.warpgroup]
        return cute.make_tensor(mine.iterator.align(16), mine.layout)

    @cute.jit
    def _store_from(self, me, frag, operands, shared, values, work: Work):
        """By way of the shared memory of K and V: by now nothing reads a warpgroup's V but itself, and its K only until all
        have met."""
        copy, rows = self.lay.store_accumulator, self.lay.ROWS_PER_WARPGROUP
        block = work.block * self.warpgroups + me.warpgroup
        where = (block, work.head_kv, work.k)
        if cutlass.const_expr(self.needs_v):
            self.clear_unused("dV", (rows, self.config.tile_dv), "k", values.seqlen_k, block, frag.acc_dV)
            self.store(copy("dV", self.config), frag.acc_dV, operands.dv, shared.v, me.warpgroup, me.warpgroup, where)
        if cutlass.const_expr(self.needs_k):
            scale = Float32(values.scale(self.problem))
            frag.acc_dK.store(frag.acc_dK.load() * scale)
            self.clear_unused("dK", (rows, self.config.tile_d), "k", values.seqlen_k, block, frag.acc_dK)
            self._meet()
            self.store(copy("dK", self.config), frag.acc_dK, operands.dk, shared.k, me.warpgroup, me.warpgroup, where)
        self.wait_for_store(me.warpgroup)


@cute.jit
def _reduce_add(into: cute.Tensor, source: cute.Tensor):
    """Add a contiguous float32 tensor in shared memory to global memory, by the copy engine; ends with its bulk group."""
    cute.arch.inline_ptx(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], {$r2};",
        read_only_args=[into.iterator.toint(), source.iterator.toint(), Int32(cute.size(source) * 4)],
    )
