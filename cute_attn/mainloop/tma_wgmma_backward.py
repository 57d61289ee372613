"""Backward attention with TMA copies and warpgroup MMA (Hopper): all gradients in one kernel, for heads up to 128 wide, and
for some wider ones.

A block owns a tile of keys at a time, 64 for each computing warpgroup, and walks over the query tiles that see any of them
(FlashAttention-2, arXiv:2307.08691, algorithm 2; on Hopper, FlashAttention-3, arXiv:2407.08608). Five products a tile:

    Sᵀ = K·Qᵀ,   dPᵀ = V·dOᵀ,   dV += Pᵀ·dO,   dK += dSᵀ·Q,   dQ = dS·K

The first two are transposed, so that Pᵀ and dSᵀ lie in registers as the operands that dV and dK take, and only dS goes
through shared memory, for dQ. A product runs whenever a warpgroup computes something else: dPᵀ while P is taken, one half of
dV while dS is taken, the other while it is shared, dK while dQ is handed over and until the next tile's Sᵀ begins. Where
``late_dv`` says so, a part of dV comes behind dQ: dQ is stored while that runs, and dK while the copy engine reads dQ. Where
dK and dV leave a thread few registers (``ds_from_shared``), dS is taken from the P that dV's product reads, which ends before
dQ's begins, and dK's reads dS where dQ's does.

Four warps copy: one K, Q and the rows' LSE, which also finds the block's tiles; one V, dO and the rows' delta; two take turns
with dQ, which is added in float32 in global memory (``adders.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Boolean, Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync

from cute_attn.epilogue import put
from cute_attn.layouts.base import WARP, cute_layout, in_turns, row_padding
from cute_attn.layouts.fragments import as_operand_a, transposed
from cute_attn.mainloop.adders import Adders
from cute_attn.mainloop.beside import Beside
from cute_attn.mainloop.cluster import sum_in_first_block
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Values
from cute_attn.mainloop.guard import known_here, of_keys
from cute_attn.mainloop.scores import Coordinates, Scores, with_rise
from cute_attn.mainloop.walk import ListedQueries, QueryTiles
from cute_attn.mainloop.warpgroups import (
    NONE_DONE,
    WARPGROUP,
    InFlight,
    KeyBlocks,
    KeyPipelines,
    TmaOperands,
    of_columns,
    rounded_operand,
)
from cute_attn.mainloop.work_queue import WorkQueue
from cute_attn.scheduler import Work

COPY_K_Q_WARP, COPY_V_DO_WARP, ADD_DQ_WARP = 0, 1, 2


@dataclass(frozen=True)
class BackwardShared:
    """The operands in shared memory: ``(64, columns, warpgroup)`` for K and V, ``(tile_m, columns, stage)`` for Q and dO,
    ``(64, tile_m, warpgroup + warpgroups · stage)`` for dS, ``(tile_m, stage)`` for a row's values, ``(thread, value,
    warpgroup + warpgroups · stage)`` for dQ, ``(64, warpgroup)`` for which keys are hidden (``guard.py``), ``(stage)`` for what
    a list says of a query tile, ``(field, side)`` for where the block is among the rows that it clears, and zeros; and how
    operands come there."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    ds: cute.Tensor
    dq: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    hidden: cute.Tensor | None
    dk: cute.Tensor | None  # None where it lies over dQ
    dv: cute.Tensor | None  # nor this one, where results leave from registers
    work: cute.Tensor
    pipes: KeyPipelines
    entries: cute.Tensor | None = None
    unused: cute.Tensor | None = None
    zeros: cute.Tensor | None = None


@dataclass(frozen=True)
class BackwardWalk:
    """What a thread of a computing warpgroup walks over the query tiles of its 64 keys with: its place, where its scores lie in
    a tile, and what it holds or points to all the while."""

    warpgroup: Int32
    thread: Int32
    cS: Coordinates
    shared: BackwardShared
    visited: QueryTiles
    key_first: Int32
    k_state: pipeline.PipelineState  # of the pipelines of K and V
    state: pipeline.PipelineState  # of those of Q and dO, to begin with
    rK: cute.Tensor | None  # the first columns of K
    rV: cute.Tensor | None  # and of V
    tSrK: cute.Tensor  # (MMA, 1, K)
    tSrQ: cute.Tensor  # (MMA, 1, K, stage)
    tPrV: cute.Tensor  # (MMA, 1, K)
    tPrdO: cute.Tensor  # (MMA, 1, K, stage)
    tVrdO: cute.Tensor  # (MMA, 1, K, stage): as the B operand of dV
    tKrQ: cute.Tensor  # (MMA, 1, K, stage): as the B operand of dK
    tKrdS: cute.Tensor | None  # (MMA, 1, K, warpgroup + warpgroups · stage): the A operand, where that comes from shared memory
    tQrdS: cute.Tensor  # (MMA, 1, K, warpgroup + warpgroups · stage): an operand of dQ, A or, of its transpose, B
    tQrK: cute.Tensor  # (MMA, 1, K, warpgroup): the other one
    acc_dV: cute.Tensor
    acc_dK: cute.Tensor
    acc_dQ: cute.Tensor


class Backward(KeyBlocks):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.needs_q, self.needs_k, self.needs_v = (name in problem.gradients for name in "qkv")
        self.needs_ds = self.needs_q or self.needs_k
        self.early_dv = config.tile_m // 32
        # A block takes one key tile after another, the next one's operands on their way while results leave; of unequal ones
        # it draws tickets. Only where blocks share a tile has each of them but one.
        self.persistent = config.head_blocks == 1
        # The next tile's K and V are waited for and looked at, and its first queries copied, before results have left. Where dK
        # lies over dQ not: of ragged tiles there may be no next, and equal ones are slower so (performance.md).
        own_memory = config.separate_dk or config.results_from_registers
        self.leaves_results = self.persistent and (own_memory or (problem.masked and not problem.ragged))
        self.draws = problem.masked or problem.deterministic
        self.in_turns = problem.deterministic and not (bool(problem.ragged) or bool(problem.blocks))
        self.skips_unseen = bool(problem.ragged)
        self.beside = Beside(problem, config, self.persistent, equal=not self.draws)
        # Ragged tiles under an edge, which may need care, too, are looked for so late that nothing is gained; where threads
        # hold K and V, the warp that looks for tiles has no registers left.
        plain = not (problem.masked or config.k_in_registers)
        self.queries_first = self.leaves_results and not problem.blocks and (plain or not problem.ragged)
        # The next tile's K and V come as soon as the last product that reads this one's has ended: V's behind dPᵀ, K's behind
        # dQ, unless a part of dV comes behind that: a branch there has ptxas wait for each product. Threads that hold K and V
        # have no registers left for it.
        self.frees_v = self.persistent and self.needs_ds and not config.k_in_registers
        self.frees_k = self.frees_v and self.needs_q and not config.late_dv
        self.adders = Adders(problem, config, ADD_DQ_WARP, self.first_barrier("dQ"))

    # ---- host ------------------------------------------------------------------------------------------------------

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values, tiles, blocks, stream):
        """Make the TMA descriptors and launch persistent blocks, or, where some share a key tile, those of each. Returns the
        tiles as they are taken, how many warps add, and whether another kernel rounds dQ meanwhile (:class:`Beside`)."""
        q, k, v, do = self.input_operands(inputs)
        dk, dv = gradients.mdK, gradients.mdV
        if cutlass.const_expr(not self.config.results_from_registers):
            dk = self.operand("dK", dk, self.lay.copy_out) if cutlass.const_expr(self.needs_k) else None
            dv = self.operand("dV", dv, self.lay.copy_out) if cutlass.const_expr(self.needs_v) else None
        blocks, beside = self.beside.launched(tiles, values, blocks)
        if cutlass.const_expr(self.persistent and not self.draws):
            tiles, count = tiles.launched(blocks, long=False)
            if cutlass.const_expr(not self.problem.ragged):
                count = tiles.even_blocks(count, cute.ceil_div(values.seqlen_q, self.config.tile_m))
        else:
            count = cutlass.min(tiles.count(), blocks) if cutlass.const_expr(self.persistent) else tiles.count()
            if cutlass.const_expr(self.in_turns):
                steps = cute.ceil_div(values.seqlen_q, self.config.tile_m) * tiles.heads_per_kv
                tiles = tiles.in_turns(blocks, steps, both_ways=self.problem.unequal)
            # In a fixed order unequal tiles of a head wait for one another the longer, the more of them run at the same time.
            elif cutlass.const_expr(not (self.problem.deterministic and self.problem.unequal)):
                tiles = tiles.in_small_groups(blocks)
        plain = inputs.if_masked(self.problem)
        self.kernel(TmaOperands(q, k, v, do, dk, dv), plain, rows, gradients, signals, values, tiles, beside).launch(
            grid=[count * self.config.head_blocks, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.config.head_blocks, 1, 1] if self.config.head_blocks > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )
        return tiles, count * self.config.head_blocks * Adders.WARPS, beside

    # ---- kernel ----------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(self, operands: TmaOperands, plain, rows: Rows, gradients: Gradients, signals, values: Values, tiles, beside):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        if cutlass.const_expr(self.beside.rounds and not self.problem.blocks):
            self.beside.begin(beside)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for operand in (operands.q, operands.k, operands.v, operands.do):
                cpasync.prefetch_descriptor(operand.atom)
        if cutlass.const_expr(self.beside.looks):
            # The warp that finds tiles has more registers here than later. With lists those that add want to know it, too.
            looks = warp < WARPGROUP // WARP if cutlass.const_expr(self.problem.blocks) else warp == COPY_K_Q_WARP
            tiles, beside = self.beside.found_out(tiles, values, beside, looks)
        shared = self._setup()
        of_tile = partial(self.key_tile, values, tiles.heads_per_kv)
        roles = partial(self._roles, operands, (plain, rows, care), (gradients, signals, beside), shared)
        if cutlass.const_expr(self.persistent):
            counted, headed = bool(self.problem.ragged), bool(self.problem.blocks)
            kinds = {"ragged": counted, "headed": headed, "both_ways": tiles.both_ways, "padding": row_padding(self.config)}
            queue = WorkQueue(shared.work, shared.pipes.work, None, self.arrive, of_k=True, **kinds)
            ticket = signals.ticket if self.draws else None
            unused = self.adders.unused(gradients, tiles, shared.zeros, shared.unused)
            header = (lambda work: ListedQueries.ahead(values.of(work), work.block)) if headed else None
            in_order = self.problem.deterministic
            ahead = counted and not in_order and not self.config.k_in_registers  # there the warp has no registers left
            how = {"in_order": in_order, "counted": counted, "header": header, "draws_ahead": ahead}
            lead = lambda part: self.lead(queue, tiles, ticket, NONE_DONE, partial(of_tile, part), **how)  # noqa: E731
            roles(lead, lambda part: queue.taker().each(partial(of_tile, part), NONE_DONE), unused)
        else:
            tiles = replace(tiles, ticket=cute.arch.cluster_idx()[0])
            tiles.one(lambda work: roles(*[lambda part: of_tile(part, NONE_DONE, work)] * 2))

    @cute.jit
    def _roles(
        self, operands, given, into, shared: BackwardShared, lead: cutlass.Constexpr, each: cutlass.Constexpr, unused=()
    ):
        """The block's tiles: each warp its part of them, by ``each(part)``, and the one that finds them by ``lead(part)``; and
        ``unused`` rows, if there may be any, which the warps that add dQ clear between theirs."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_K_Q_WARP:
                lead(partial(self.copy_k_q, operands, shared, *given))
            if warp == COPY_V_DO_WARP:
                each(partial(self.copy_v_do, operands, shared, *given))
            self.adders.run(each, *into, shared.dq, warp, unused)
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            each(partial(self._compute, operands, shared))
            if cutlass.const_expr(self.leaves_results):
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _setup(self):
        """Allocate shared memory and initialise the barriers."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()

        k, v, q, do, ds = (self.tensor(smem, name) for name in ("K", "V", "Q", "dO", "dS"))
        dk = self.tensor(smem, "dK") if config.separate_dk else None
        shared = BackwardShared(
            *(k, v, q, do, ds),
            dq=smem.allocate_tensor(Float32, cute_layout(lay.sums(config)), lay.SMEM_ALIGN),
            lse=self.floats(smem, config.tile_m, config.stages),
            delta=self.floats(smem, config.tile_m, config.stages),
            hidden=self.hidden_keys(smem, lay.ROWS_PER_WARPGROUP, self.warpgroups),
            dk=dk,
            dv=None if config.results_from_registers else self.over("dV", ds),
            work=WorkQueue.slots_in(smem),
            pipes=KeyPipelines(
                *self.input_pipes(smem, config.mma_warps, self.warpgroups),
                work=self.hand_over_pipe(smem, lay.WORK_SLOTS, 1, 1 + self.needs_q * Adders.WARPS + config.mma_warps),
            ),
        )
        unused = smem.allocate_tensor(Int32, cute.make_layout((lay.UNUSED_FIELDS, Adders.WARPS)), 16)
        zeros = smem.allocate_tensor(Int32, cute.make_layout(lay.zero_bytes(config) // 4), 16)
        entries = smem.allocate_tensor(Int32, cute.make_layout(config.stages), 4)
        if self.problem.blocks:
            shared = replace(shared, entries=entries)
        if self.problem.ragged:
            shared = replace(shared, unused=unused, zeros=zeros)
            for i in range(0, cute.size(zeros), config.threads):
                zeros[cutlass.min(i + cute.arch.thread_idx()[0], cute.size(zeros) - 1)] = Int32(0)
            cute.arch.fence_view_async_shared()
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return shared

    # ---- copying warps ---------------------------------------------------------------------------------------------

    # ---- computing warpgroups --------------------------------------------------------------------------------------

    @cute.jit
    def _compute(self, operands: TmaOperands, shared: BackwardShared, values: Values, where, done):
        """One computing warpgroup: 64 keys of a tile."""
        work, members = where
        me = self._key_walk(shared, values, work, done)
        visited, state = me.visited, me.state
        hides = Boolean(False) if cutlass.const_expr(self.problem.masked) else None
        if cutlass.const_expr(not self.skips_unseen):
            hides = self._wait_for_keys(me)
        elif cutlass.const_expr(hides is None):
            if visited.count > 0:
                self._wait_for_keys(me)
        else:
            if visited.count > 0:
                hides = self._wait_for_keys(me)
        self.load_first_columns("S", "K", me.rK, shared.k[None, None, me.warpgroup])
        self.load_first_columns("dP", "V", me.rV, shared.v[None, None, me.warpgroup])
        if cutlass.const_expr(self.leaves_results and not self.config.results_from_registers):
            self._results_have_left(me, *done)
        i, member, walked = Int32(0), Int32(0), visited.count * visited.members(members)
        for j in cutlass.range(walked, unroll=1):
            if cutlass.const_expr(self.problem.blocks):
                of_tile = partial(self._of_listed, shared.entries, values, work.head, visited, i)
            else:
                m_block, of = visited.tile(i, member, self.problem)
                needs_mask = visited.needs_mask(i, m_block)
                of_head = with_rise(values.of_head(work.head + of), self.problem)
                of_tile = partial(_same, (of_head, m_block, needs_mask))
            state = self._step(me, of_tile, state, (hides, j > 0, j + 1 == walked))
            i = i + 1 if i + 1 < visited.count else Int32(0)
            member = member + 1 if i == 0 else member
        if cutlass.const_expr(self.config.overlap_tiles):
            cute.nvgpu.warpgroup.wait_group(0)
        if cutlass.const_expr(self.persistent):  # the next tile's are on their way from here on
            if cutlass.const_expr(self.config.overlap_tiles):
                if walked > 0:
                    self.release_rows(shared.pipes.q, self.stage_before(state), met=self.needs_q)
            if cutlass.const_expr(not self.skips_unseen):
                self._release_keys(me, in_step=False)
                if walked == 0:
                    self._release_keys(me, in_step=True)
            elif walked > 0:
                self._release_keys(me, in_step=False)
        steps = cute.arch.make_warp_uniform(done[1] + walked)
        self._store(me, operands, values, work, steps)

    def _of_listed(self, entries: cute.Tensor, values: Values, head, visited: ListedQueries, i, stage):
        """What :meth:`_step` takes of the i-th tile of a list, which the warp that copies Q has put beside it."""
        m_block, member = visited.tile_of(entries[stage])
        of_head = with_rise(values.of_head(head + member), self.problem)
        return of_head, m_block, visited.entry_needs_mask(i, entries[stage])

    @cute.jit
    def _wait_for_keys(self, me: BackwardWalk):
        """Until K and V are there. Where some may be masked, whether any is hidden: see ``guard.py``."""
        shared, pipes = me.shared, me.shared.pipes
        for pipe in (pipes.k, pipes.v):
            pipe.consumer_wait(me.k_state)
        hides = None
        if cutlass.const_expr(self.problem.masked):
            w = me.warpgroup
            hides = self.hide_keys(shared.k[None, None, w], shared.v[None, None, w], shared.hidden[None, w], w)
        return hides

    @cute.jit
    def _release_keys(self, me: BackwardWalk, in_step: cutlass.Constexpr[bool]):
        """Of K and V those that a walk's last step releases, if it has one, or the others."""
        for pipe, early in ((me.shared.pipes.k, self.frees_k), (me.shared.pipes.v, self.frees_v)):
            if cutlass.const_expr(early == in_step):
                pipe.consumer_release(me.k_state)

    def _key_walk(self, shared: BackwardShared, values: Values, work: Work, done) -> BackwardWalk:
        config, lay, thread = self.config, self.lay, cute.arch.thread_idx()[0] % WARPGROUP
        cS = Coordinates.of(lay.tiled_mma("S", config), thread, (lay.ROWS_PER_WARPGROUP, config.tile_m))
        w, states = self.group(), (self.emptying(1, done[0]), self.emptying(config.stages, done[1]))
        visited = QueryTiles.of(values, self.problem, work.block, config).of_warpgroup(w)
        key_first = work.block * config.tile_n + w * lay.ROWS_PER_WARPGROUP
        S, dP, dV, dK, dQ = (lay.tiled_mma(role, config).get_slice(0) for role in ("S", "dP", "dV", "dK", "dQ"))

        turned, below = lay.turned(config), config.tile_m // lay.piece_shape(config)[0]
        rows, columns = lay.mma("dQ", config).tile[1::-1] if turned else lay.mma("dQ", config).tile[:2]
        sdS = cute.local_tile(transposed(shared.ds), (rows, lay.ROWS_PER_WARPGROUP), (w % below, 0, None))
        sKt = cute.local_tile(transposed(shared.k), (columns, lay.ROWS_PER_WARPGROUP), (w // below, 0, None))
        return BackwardWalk(
            *(w, thread, cS, shared, visited, key_first, *states),
            rK=self.first_columns("S"),
            rV=self.first_columns("dP"),
            tSrK=S.make_fragment_A(S.partition_A(shared.k[None, None, w])),
            tSrQ=S.make_fragment_B(S.partition_B(shared.q)),
            tPrV=dP.make_fragment_A(dP.partition_A(shared.v[None, None, w])),
            tPrdO=dP.make_fragment_B(dP.partition_B(shared.do)),
            tVrdO=dV.make_fragment_B(dV.partition_B(transposed(shared.do))),
            tKrQ=dK.make_fragment_B(dK.partition_B(transposed(shared.q))),
            tKrdS=dK.make_fragment_A(dK.partition_A(self._ds(shared))) if config.ds_from_shared else None,
            tQrdS=dQ.make_fragment_B(dQ.partition_B(sdS)) if turned else dQ.make_fragment_A(dQ.partition_A(sdS)),
            tQrK=dQ.make_fragment_A(dQ.partition_A(sKt)) if turned else dQ.make_fragment_B(dQ.partition_B(sKt)),
            acc_dV=self.accumulator("dV", config.tile_dv),
            acc_dK=self.accumulator("dK", config.tile_d),
            acc_dQ=self.accumulator("dQ", rows if turned else columns),
        )

    @cute.jit
    def _step(self, me: BackwardWalk, of_tile: cutlass.Constexpr, state, tile):
        """One query tile, of which ``of_tile(stage)`` says (values, number, whether it needs a mask), once it is there. Returns
        the pipelines' next state.

        With ``overlap_tiles``, dK's product is in flight when it ends, so that the tensor cores have work until the next
        tile's scores are issued; the next step releases Q's slot. Only an accumulator that the loop never reads can stay in
        flight like this, and the operand keeps its registers.
        """
        (hides, follows, last), shared, pipes = tile, me.shared, me.shared.pipes
        config, lay, stage = self.config, self.lay, state.index
        mma_S = lay.tiled_mma("S", config)
        flight = InFlight("dK") if config.overlap_tiles else InFlight()

        pipes.q.consumer_wait(state)
        acc_S = self.scores("S", config.tile_m, me.tSrK, me.tSrQ[None, None, None, stage], rA=me.rK)
        flight.issued("S")
        values, m_block, masked = of_tile(stage)
        scores = Scores(me.cS, values, self.problem, transposed=True)
        ramp = known_here(scores.ramp_of_rows((me.key_first, m_block * config.tile_m)))
        pipes.do.consumer_wait(state)
        if cutlass.const_expr(self.needs_ds):
            acc_dP = self.scores("dP", config.tile_m, me.tPrV, me.tPrdO[None, None, None, stage], rA=me.rV)
            flight.issued("dP")
        kept = hidden = None
        if cutlass.const_expr(self.problem.dropout):
            kept = scores.kept((me.key_first, m_block * config.tile_m))
        flight.wait("S")
        if cutlass.const_expr(config.overlap_tiles):
            if follows:
                self.release_rows(pipes.q, self.stage_before(state), met=self.needs_q)
        if cutlass.const_expr(hides is not None):
            hidden = hides, of_keys(mma_S, me.thread, shared.hidden[None, me.warpgroup], config.tile_m)
        origin = (me.key_first, m_block * config.tile_m)
        scores.apply_rules(acc_S, origin, masked, hidden)
        lse_raw = of_columns(mma_S, me.thread, shared.lse[None, stage])
        P = scores.probabilities(acc_S, lse_raw, self.element, origin, kept, ramp)
        rP = rounded_operand(P, self.element)
        slot = state.count % lay.DS_STAGES * self.warpgroups
        tVrdO, steps, early = me.tVrdO[None, None, None, stage], cute.size(rP, mode=[2]), 0
        late = steps * config.late_dv // config.tile_m if self.needs_q and self.needs_v else 0
        if cutlass.const_expr(self.needs_v and self.needs_ds and self.early_dv > 0):  # runs while dS is taken
            early = self.early_dv
            self.gemm(lay.tiled_mma("dV", config), me.acc_dV, rP, tVrdO, accumulate=True, steps=range(early))
            flight.issued("some of dV")
        if cutlass.const_expr(self.needs_ds):
            flight.wait("dP")
            if cutlass.const_expr(self.frees_v):
                if last:
                    pipes.v.consumer_release(me.k_state)
            if cutlass.const_expr(config.ds_from_shared):  # nor does P stay: what dV takes of it has to do
                as_operand_a(P).store(rP.load().to(Float32))
            delta = of_columns(mma_S, me.thread, shared.delta[None, stage])
            scores.gradients(acc_S, acc_dP, delta, lse_raw, origin, kept)
            rdS = rounded_operand(acc_S, self.element)
            if cutlass.const_expr(self.needs_q):
                self._store_ds(me, rdS, self._ds(shared)[None, None, slot + me.warpgroup])
        if cutlass.const_expr(self.needs_v):  # runs while the warpgroups meet
            self.gemm(lay.tiled_mma("dV", config), me.acc_dV, rP, tVrdO, accumulate=True, steps=range(early, steps - late))
            flight.issued("more of dV" if late else "dV")
        if cutlass.const_expr(self.needs_ds):
            if cutlass.const_expr(self.needs_q):
                cute.arch.fence_view_async_shared()
                self._meet()
                if cutlass.const_expr(config.ds_from_shared):  # which frees P's registers for dQ
                    flight.wait("more of dV" if late else "dV")
                self._dq(me, slot)
                flight.issued("dQ")
                if cutlass.const_expr(late > 0):  # runs while dQ is stored
                    self.gemm(lay.tiled_mma("dV", config), me.acc_dV, rP, tVrdO, True, range(steps - late, steps))
                    flight.issued("dV")
                    flight.wait("dQ")
                    self._store_dq(me, state.count)
            if cutlass.const_expr(self.needs_k):
                rdS = me.tKrdS[None, None, None, slot + me.warpgroup] if config.ds_from_shared else rdS
                self.gemm(lay.tiled_mma("dK", config), me.acc_dK, rdS, me.tKrQ[None, None, None, stage], accumulate=True)
                flight.issued("dK")
        if cutlass.const_expr(late > 0):
            self.adders.hand_over(state.count, me.warpgroup)
        flight.wait("dV")
        self.release_rows(pipes.do, state)  # by now all have met, but with a warp barrier here d64 gains 3 %
        if cutlass.const_expr(self.needs_q and late == 0):
            flight.wait("dQ")
            if cutlass.const_expr(self.frees_k):
                if last:
                    pipes.k.consumer_release(me.k_state)
            self._store_dq(me, state.count)
            self.adders.hand_over(state.count, me.warpgroup)
        if cutlass.const_expr(not config.overlap_tiles):
            flight.wait("dK")
            self.release_rows(pipes.q, state, met=self.needs_q)
        state.advance()
        return state

    def _ds(self, shared: BackwardShared) -> cute.Tensor:
        """dS's shared memory, without what dQ's product reads behind a query tile's last row."""
        return cute.local_tile(shared.ds, (self.lay.ROWS_PER_WARPGROUP, self.config.tile_m), (0, 0, None))

    @cute.jit
    def _store_ds(self, me: BackwardWalk, rdS: cute.Tensor, sdS: cute.Tensor):
        """This warpgroup's dSᵀ to shared memory; the caller fences before all meet."""
        copy = self.lay.store_accumulator("dS", self.config).get_slice(me.thread)
        cute.copy(copy, copy.retile(rdS), copy.partition_D(sdS))

    @cute.jit
    def _dq(self, me: BackwardWalk, slot):
        """Issue this warpgroup's piece of dQ = dS·K over all of the block's keys."""
        mma = self.lay.tiled_mma("dQ", self.config)
        cute.nvgpu.warpgroup.fence()
        atom = cute.make_mma_atom(mma.op)
        atom.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, False)
        for w in cutlass.range_constexpr(self.warpgroups):
            for k in cutlass.range_constexpr(cute.size(me.tQrK, mode=[2])):
                a, b = me.tQrdS[None, None, k, slot + w], me.tQrK[None, None, k, w]
                if cutlass.const_expr(self.lay.turned(self.config)):
                    a, b = b, a
                cute.gemm(atom, me.acc_dQ, a, b, me.acc_dQ)
                atom.set(cute.nvgpu.warpgroup.Field.ACCUMULATE, True)
        cute.nvgpu.warpgroup.commit_group()

    @cute.jit
    def _store_dq(self, me: BackwardWalk, step):
        """This warpgroup's piece of dQ to shared memory, in the order of its registers."""
        sdQ, threads = self._empty_dq(me, step), self.lay.piece_threads(self.config)
        into = cute.make_tensor(sdQ.iterator + sdQ.stride[0] * me.thread, cute.select(sdQ.layout, mode=[1]))
        if cutlass.const_expr(threads == WARPGROUP):
            cute.autovec_copy(cute.make_tensor(me.acc_dQ.iterator, cute.make_layout(into.shape)), into)
        else:  # a branch around that would have dK's product end, which runs meanwhile
            for i in range(0, cute.size(me.acc_dQ), self.config.add_width):
                values = [me.acc_dQ[i + j] for j in range(self.config.add_width)]
                put("st.shared", into.iterator + into.layout(i), values, me.thread < threads)

    def _empty_dq(self, me: BackwardWalk, step):
        """The warpgroup's part of a step's stage of dQ's memory, once it is free."""
        stage = self.adders.wait_until_empty(step, me.warpgroup)
        return me.shared.dq[None, None, stage * self.warpgroups + me.warpgroup]

    def _meet(self):
        """All computing warpgroups."""
        cute.arch.barrier(barrier_id=self.first_barrier("dS"), number_of_threads=self.config.mma_threads)

    # ---- epilogue --------------------------------------------------------------------------------------------------

    @cute.jit
    def _store(self, me: BackwardWalk, operands: TmaOperands, values: Values, work: Work, steps):
        """dK and dV to global memory. Where blocks share a key tile, the first one's are the sums of all."""
        if cutlass.const_expr(self.config.head_blocks == 1):
            self._store_from(me, operands, values, work, steps)
        else:
            self._meet()
            parts = []
            if cutlass.const_expr(self.needs_v):
                parts.append((me.acc_dV, self._sums_over(me.shared.q, me, me.acc_dV)))
            if cutlass.const_expr(self.needs_k):
                parts.append((me.acc_dK, self._sums_over(me.shared.k, me, me.acc_dK)))
            sum_in_first_block(parts, self.config.head_blocks)
            if cute.arch.block_in_cluster_idx()[0] == 0:
                self._store_from(me, operands, values, work, steps)

    def _sums_over(self, operands: cute.Tensor, me: BackwardWalk, acc: cute.Tensor) -> cute.Tensor:
        """A thread's accumulator in float32 in the shared memory of two operands, of which ``operands`` is the first."""
        layout = in_turns(WARPGROUP, cute.size(acc), self.config.add_width, self.warpgroups)
        sums = cute.make_tensor(cute.recast_ptr(operands.iterator, dtype=Float32), cute_layout(layout))
        mine = sums[me.thread, None, me.warpgroup]
        return cute.make_tensor(mine.iterator.align(16), mine.layout)

    @cute.jit
    def _store_from(self, me: BackwardWalk, operands: TmaOperands, values: Values, work: Work, steps):
        """From registers, or by way of shared memory; that of dS is free once all have met, that of the next dQ, after
        ``steps`` of the block's, once an adder has offered it."""
        copy, shared, from_registers = self.lay.store_accumulator, me.shared, self.config.results_from_registers
        block = work.block * self.warpgroups + me.warpgroup
        where = (block, work.head_kv, work.k)
        if cutlass.const_expr(not from_registers):
            if cutlass.const_expr(self.leaves_results):  # what the last tile's dK has left is free once all have met, too
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            self._meet()
        if cutlass.const_expr(self.needs_v):
            values.scale_kept(me.acc_dV)
            self._clear_unused("dV", self.config.tile_dv, values, block, me.acc_dV)
            if cutlass.const_expr(from_registers):
                self.store_rows("dV", me.acc_dV, operands.dv, work.k, work.head_kv, block)
            else:
                self.store(copy("dV", self.config), me.acc_dV, operands.dv, shared.dv, me.warpgroup, me.warpgroup, where)
        if cutlass.const_expr(self.needs_k):
            scale = Float32(values.scale(self.problem))
            me.acc_dK.store(me.acc_dK.load() * scale)
            self._clear_unused("dK", self.config.tile_d, values, block, me.acc_dK)
            if cutlass.const_expr(from_registers):
                self.store_rows("dK", me.acc_dK, operands.dk, work.k, work.head_kv, block)
            elif cutlass.const_expr(self.config.separate_dk):
                self.store(copy("dK", self.config), me.acc_dK, operands.dk, shared.dk, me.warpgroup, me.warpgroup, where)
            else:
                dk = self.over("dK", self._empty_dq(me, steps) if self.needs_q else shared.dq[None, None, me.warpgroup])
                self.store(copy("dK", self.config), me.acc_dK, operands.dk, dk, me.warpgroup, 0, where)
        if cutlass.const_expr(not (self.leaves_results or from_registers)):
            self._results_have_left(me, 1, steps)

    def _clear_unused(self, role: str, columns: int, values: Values, block, acc):
        self.clear_unused(role, (self.lay.ROWS_PER_WARPGROUP, columns), "k", values.seqlen_k, block, acc)

    @cute.jit
    def _results_have_left(self, me: BackwardWalk, tiles, steps):
        """Until dK and dV of the block's last tile, if it has had any ``tiles``, have left shared memory; dV, that of all
        warpgroups' dS, where another tile comes. dK, which left after it, may be on its way where its memory is its own."""
        if cutlass.const_expr(self.persistent):
            behind = self.leaves_results and self.config.separate_dk and self.needs_k and self.needs_v
            cute.arch.cp_async_bulk_wait_group(int(behind), read=True)
            self._meet()
            if cutlass.const_expr(self.needs_q and self.needs_k and not self.config.separate_dk):
                if tiles > 0:
                    self._offer_to_next(me, steps)
        else:
            self.wait_for_store(me.warpgroup)

    @cute.jit
    def _offer_to_next(self, me: BackwardWalk, steps):
        """The memory of dQ that dK has left, all of it by now, as an adder would: of the next warpgroup, since a warp shouldn't
        arrive twice at a barrier."""
        if cute.arch.thread_idx()[0] % WARPGROUP < 32:
            empty = self.adders.empty(steps % self.config.dq_stages, (me.warpgroup + 1) % self.warpgroups)
            cute.arch.barrier_arrive(barrier_id=empty, number_of_threads=WARPGROUP + 32)


def _same(what, stage):
    """What was known before."""
    return what
