"""dK and dV of heads wider than 128, with TMA copies and warpgroup MMA (Hopper): see ``tma_wgmma_wide.py``.

A block owns 64 keys; two warpgroups walk over the query tiles side by side. The first takes Sᵀ = K·Qᵀ, P, and dV += Pᵀ·dO; the
second dPᵀ = V·dOᵀ, dS, and dK += dSᵀ·Q. P passes from the first to the second in the operands' dtype, as it lies in registers.
Each has its own pace: while one multiplies, the other takes exponentials or differences. With ``overlap_tiles`` a tile's dV and
dK run while the next one's P and dS are taken. Of K and V, which stay, each holds
the first columns in registers, if there is room.

What comes with a stage for each row (log-sum-exp, delta) has gone into a product before the stage is released. A read of shared
memory that is merely issued before is not enough: where the release follows at once, the next tile's values have been seen to
come first, though both are one thread's and in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup

from cute_attn.layouts.base import cute_layout, row_padding
from cute_attn.layouts.fragments import as_operand_a, transposed
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Values
from cute_attn.mainloop.guard import of_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.mainloop.warpgroups import (
    NONE_DONE,
    WARPGROUP,
    KeyBlocks,
    KeyPipelines,
    TmaOperands,
    of_columns,
    rounded_operand,
)
from cute_attn.mainloop.work_queue import WorkQueue
from cute_attn.scheduler import Tiles, Work

COPY_K_Q_WARP, COPY_V_DO_WARP = 0, 1


@dataclass(frozen=True)
class KeyShared:
    """Shared memory: ``(rows, columns, slot)`` for the operands, ``(thread, value, slot)`` for P, ``(tile_m, stage)`` for
    a row's values, ``(tile_n)`` for which keys are hidden (``guard.py``), the block's tiles, and how operands come."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    p: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    hidden: cute.Tensor | None
    work: cute.Tensor
    pipes: KeyPipelines | None = None
    entries = None  # of lists come from global memory: nobody here acquires


@dataclass(frozen=True)
class KeyWalk:
    """What a thread of one of the two computing warpgroups walks over the query tiles of a key tile with: the operands of its
    two products, the accumulator of the second, and, with ``overlap_tiles``, that one's operand of the tile before."""

    rA: cute.Tensor | None  # the first columns of K or V
    tA: cute.Tensor  # K or V
    tB: cute.Tensor  # Q or dO
    tRows: cute.Tensor  # dO or Q, as the B operand of dV or dK
    acc: cute.Tensor
    held: cute.Tensor
    cS: Coordinates
    shared: KeyShared
    values: Values
    work: Work
    visited: QueryTiles
    members: Int32  # query heads
    k_state: pipeline.PipelineState  # of the pipelines of K and V
    states: tuple  # of those of Q and dO, and of P's, to begin with


class KeyGradients(KeyBlocks):
    """The kernel of dK and dV of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.needs_k, self.needs_v = "k" in problem.gradients, "v" in problem.gradients
        self.draws = problem.masked or bool(problem.ragged)

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values: Values, tiles, blocks, stream):
        """Make the TMA descriptors and launch persistent blocks."""
        operands = TmaOperands(*self.input_operands(inputs))
        tiles, count = self.launched(tiles, blocks, self.draws)
        self.kernel(operands, inputs.if_masked(self.problem), rows, gradients, signals, values, tiles).launch(
            grid=[count, 1, 1], block=[self.config.threads, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, operands: TmaOperands, plain: Inputs | None, rows: Rows, gradients, signals, values: Values, tiles: Tiles):
        care = signals.care() if cutlass.const_expr(self.problem.masked) else None
        shared = self._setup()
        ragged = bool(self.problem.ragged)
        ragged_tiles = {"ragged": ragged, "padding": row_padding(self.config)}
        queue = WorkQueue(shared.work, shared.pipes.work, None, self.arrive, of_k=True, **ragged_tiles)
        of_tile = partial(self.key_tile, values, tiles.heads_per_kv)
        each = lambda part: queue.taker().each(partial(of_tile, part), NONE_DONE)  # noqa: E731
        alone = partial(self.clear_keys, gradients) if self.problem.has_unused("k") else None
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp < WARPGROUP // 32:
            cute.arch.setmaxregister_decrease(self.config.copy_registers)
            if warp == COPY_K_Q_WARP:
                part = partial(of_tile, partial(self.copy_k_q, operands, shared, plain, rows, care))
                self.lead(queue, tiles, signals.ticket if self.draws else None, NONE_DONE, part, alone)
            if warp == COPY_V_DO_WARP:
                each(partial(self.copy_v_do, operands, shared, plain, rows, care))
        else:
            cute.arch.setmaxregister_increase(self.config.mma_registers)
            if warp < 2 * WARPGROUP // 32:
                each(partial(self._values_warpgroup, gradients, shared, signals))
            else:
                each(partial(self._keys_warpgroup, gradients, shared))

    def _setup(self):
        """Allocate shared memory and initialise the barriers."""
        config, lay, half = self.config, self.lay, self.config.mma_warps // 2
        smem = cutlass.memory.SmemAllocator()

        shared = KeyShared(
            *(self.tensor(smem, name) for name in ("K", "V", "Q", "dO")),
            p=smem.allocate_tensor(self.element, cute_layout(lay.handed_over(config)), 128),
            lse=self.floats(smem, config.tile_m, config.stages),
            delta=self.floats(smem, config.tile_m, config.stages),
            hidden=self.hidden_keys(smem, config.tile_n),
            work=WorkQueue.slots_in(smem),
        )
        pipes = KeyPipelines(
            *self.input_pipes(smem, half, 1),
            p=self.hand_over_pipe(smem, lay.P_STAGES, half),
            work=self.hand_over_pipe(smem, lay.WORK_SLOTS, 1, 1 + config.mma_warps),
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return replace(shared, pipes=pipes)

    @cute.jit
    def _values_warpgroup(self, gradients: Gradients, shared: KeyShared, signals, values, where, done):
        """The warpgroup of P and dV. If it has to hide keys, the kernel of dQ has to copy them carefully."""
        operands, pipes = ((shared.k, shared.q), shared.do), shared.pipes
        me = self._key_walk("S", "dV", operands, self.config.tile_dv, self.filling, shared, values, where, done)
        pipes.k.consumer_wait(me.k_state)
        hides = None
        if cutlass.const_expr(self.problem.masked):
            hides = self.hide_keys(shared.k[None, None, 0], None, shared.hidden, self.group())
            if hides:
                signals.ask_for_care()
        self.load_first_columns("S", "K", me.rA, shared.k[None, None, 0])
        steps = me.visited.count * me.visited.members(me.members)
        self._walk(me, partial(self._values_step, me, steps, hides), steps, ("dV", pipes.q, pipes.do))
        if steps == 0:
            pipes.k.consumer_release(me.k_state)
        if cutlass.const_expr(self.needs_v):
            values.scale_kept(me.acc)
            self._store("dV", me, gradients.mdV, self.config.tile_dv)

    @cute.jit
    def _keys_warpgroup(self, gradients: Gradients, shared: KeyShared, values: Values, where, done):
        """The warpgroup of dS and dK."""
        operands, pipes = ((shared.v, shared.do), shared.q), shared.pipes
        me = self._key_walk("dP", "dK", operands, self.config.tile_d, self.emptying, shared, values, where, done)
        pipes.v.consumer_wait(me.k_state)
        if cutlass.const_expr(self.problem.masked):
            self.hide_keys(None, shared.v[None, None, 0], shared.hidden, self.group())
        self.load_first_columns("dP", "V", me.rA, shared.v[None, None, 0])
        steps = me.visited.count * me.visited.members(me.members)
        self._walk(me, partial(self._keys_step, me, steps), steps, ("dK", pipes.do, pipes.q))
        if steps == 0:
            pipes.v.consumer_release(me.k_state)
        if cutlass.const_expr(self.needs_k):
            me.acc.store(me.acc.load() * Float32(values.scale(self.problem)))
            self._store("dK", me, gradients.mdK, self.config.tile_d)

    def _key_walk(
        self, scores: str, gradient: str, operands, columns: int, of_p, shared: KeyShared, values: Values, where, done
    ) -> KeyWalk:
        """Of the warpgroup whose products are ``scores`` and ``gradient``, of these ``operands``; ``of_p`` makes a state of P's
        pipeline."""
        ((keys, queries), rows), (work, members) = operands, where
        thread, shape = cute.arch.thread_idx()[0] % WARPGROUP, (self.config.tile_n, self.config.tile_m)
        mma, of_rows = (self.lay.tiled_mma(role, self.config).get_slice(0) for role in (scores, gradient))
        acc = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
        return KeyWalk(
            rA=self.first_columns(scores),
            tA=mma.make_fragment_A(mma.partition_A(keys[None, None, 0])),
            tB=mma.make_fragment_B(mma.partition_B(queries)),
            tRows=of_rows.make_fragment_B(of_rows.partition_B(transposed(rows))),
            acc=self.accumulator(gradient, columns),
            held=cute.make_rmem_tensor(as_operand_a(acc).shape, self.element),
            cS=Coordinates.of(self.lay.tiled_mma(scores, self.config), thread, shape),
            k_state=self.emptying(1, done[0]),
            states=(self.emptying(self.config.stages, done[1]), of_p(self.lay.P_STAGES, done[1])),
            visited=QueryTiles.of(values, self.problem, work.block, self.config),
            **{"shared": shared, "values": values, "work": work, "members": members},
        )

    @cute.jit
    def _walk(self, me: KeyWalk, step: cutlass.Constexpr, steps, late):
        """So many ``steps``, one for each query tile of each head. ``late`` is the product that may run into the next one, the
        pipeline whose values of rows it needs, and that of its operand."""
        state, p_state = me.states
        role, rows_pipe, pipe = late
        i, first = Int32(0), Int32(0)
        if cutlass.const_expr(self.config.overlap_tiles):
            if steps > 0:
                state, p_state = step(False, (i, first), state, p_state)
                i, first = Int32(1) if me.visited.count > 1 else Int32(0), Int32(1)
        for j in cutlass.range(first, steps, unroll=1):
            state, p_state = step(self.config.overlap_tiles, (i, j), state, p_state)
            i = i + 1 if i + 1 < me.visited.count else Int32(0)
        if cutlass.const_expr(self.config.overlap_tiles):
            if steps > 0:
                self._multiply(role, me, me.held, rows_pipe, self.stage_before(state))
                self._multiplied(pipe, self.stage_before(state))

    def _store(self, role: str, me: KeyWalk, m: cute.Tensor, columns: int):
        """dV or dK of the key tile."""
        self.clear_unused(role, (self.config.tile_n, columns), "k", me.values.seqlen_k, me.work.block, me.acc)
        self.store_rows(role, me.acc, m, me.work.k, me.work.head_kv, me.work.block)

    def _multiply(self, role: str, me: KeyWalk, operand: cute.Tensor, rows_pipe, state):
        """Issue a query tile's dV or dK. From here on its values of rows are needed no more, and what they came with isn't."""
        if self.needs_v if role == "dV" else self.needs_k:
            self.gemm(self.lay.tiled_mma(role, self.config), me.acc, operand, me.tRows[None, None, None, state.index], True)
        self.release_rows(rows_pipe, state)

    def _multiplied(self, pipe, state):
        """Once it has ended, which frees the slot that it read."""
        warpgroup.wait_group(0)
        pipe.consumer_release(state)

    @cute.jit
    def _values_step(self, me: KeyWalk, steps, hides, follows: cutlass.Constexpr, place, state, p_state):
        """P of a query tile, and dV; if it ``follows`` one whose dV is still to come, that runs while P is taken, and its own
        comes later."""
        (i, j), work, shared, pipes = place, me.work, me.shared, me.shared.pipes
        thread, S = cute.arch.thread_idx()[0] % WARPGROUP, self.lay.tiled_mma("S", self.config)
        pipes.q.consumer_wait(state)
        acc_S = self.scores("S", self.config.tile_m, me.tA, me.tB[None, None, None, state.index], rA=me.rA)
        if cutlass.const_expr(follows):
            self._multiply("dV", me, me.held, pipes.q, self.stage_before(state))
        m_block, member = me.visited.tile(i, j // me.visited.count, self.problem)
        origin = (work.block * self.config.tile_n, m_block * self.config.tile_m)
        scores = Scores(me.cS, me.values.of_head(work.head + member), self.problem, transposed=True)
        kept = scores.kept(origin) if cutlass.const_expr(self.problem.dropout) else None
        warpgroup.wait_group(int(follows and self.needs_v))
        hidden = None
        if cutlass.const_expr(hides is not None):
            hidden = hides, of_keys(S, thread, shared.hidden, self.config.tile_m)
        scores.apply_rules(acc_S, origin, me.visited.needs_mask(i, m_block), hidden)
        if j + 1 == steps:
            self.release_rows(pipes.k, me.k_state, met=not self.problem.masked)  # and with it what is noted of its keys
        P = scores.probabilities(acc_S, of_columns(S, thread, shared.lse[None, state.index]), self.element, origin, kept)
        rounded, slot = None, p_state.index
        if cutlass.const_expr(self.needs_k):
            rounded = rounded_operand(acc_S, self.element)
            p_state = self._hand_over(rounded, shared, thread, p_state)
        if cutlass.const_expr(follows):
            self._multiplied(pipes.do, self.stage_before(state))
        pipes.do.consumer_wait(state)
        if cutlass.const_expr(not self.config.overlap_tiles):
            rP = rounded if cutlass.const_expr(P is acc_S and self.needs_k) else rounded_operand(P, self.element)
            self._multiply("dV", me, rP, pipes.q, state)
            self._multiplied(pipes.do, state)
        elif cutlass.const_expr(P is acc_S and self.needs_k):
            # Not what was handed over itself: where the operand of a product is made while another runs, ptxas has all wait.
            cute.autovec_copy(shared.p[thread, None, slot], self._in_turn(me.held, shared))
        else:
            rounded_operand(P, self.element, me.held)
        state.advance()
        return state, p_state

    @cute.jit
    def _keys_step(self, me: KeyWalk, steps, follows: cutlass.Constexpr, place, state, p_state):
        """dS of a query tile, and dK, in the same way."""
        (_, j), work, shared, pipes = place, me.work, me.shared, me.shared.pipes
        thread, dP = cute.arch.thread_idx()[0] % WARPGROUP, self.lay.tiled_mma("dP", self.config)
        pipes.do.consumer_wait(state)
        if cutlass.const_expr(self.needs_k):
            acc_dP = self.scores("dP", self.config.tile_m, me.tA, me.tB[None, None, None, state.index], rA=me.rA)
        if cutlass.const_expr(follows):
            self._multiply("dK", me, me.held, pipes.do, self.stage_before(state))
        if cutlass.const_expr(self.needs_k):
            kept = None
            if cutlass.const_expr(self.problem.dropout):  # which each of the two warpgroups finds out by itself
                m_block, member = me.visited.tile(j % me.visited.count, j // me.visited.count, self.problem)
                of_head = Scores(me.cS, me.values.of_head(work.head + member), self.problem, transposed=True)
                kept = of_head.kept((work.block * self.config.tile_n, m_block * self.config.tile_m))
            warpgroup.wait_group(int(follows))
        if j + 1 == steps:
            pipes.v.consumer_release(me.k_state)
        if cutlass.const_expr(self.needs_k):
            P, p_state = self._take_over(acc_dP, shared, thread, p_state)
            delta = of_columns(dP, thread, shared.delta[None, state.index])
            Scores(None, me.values, self.problem, transposed=True).gradients(P, acc_dP, delta, kept=kept)  # which lie nowhere
        if cutlass.const_expr(follows):
            self._multiplied(pipes.q, self.stage_before(state))
        pipes.q.consumer_wait(state)
        rdS = None
        if cutlass.const_expr(self.needs_k):
            rdS = rounded_operand(P, self.element, me.held if self.config.overlap_tiles else None)
        if cutlass.const_expr(not self.config.overlap_tiles):
            self._multiply("dK", me, rdS, pipes.do, state)
            self._multiplied(pipes.q, state)
        state.advance()
        return state, p_state

    def _in_turn(self, rP: cute.Tensor, shared: KeyShared) -> cute.Tensor:
        """A thread's P in the order of its registers, as it is handed over."""
        return cute.make_tensor(rP.iterator, cute.make_layout(shared.p[0, None, 0].shape))

    @cute.jit
    def _hand_over(self, rP: cute.Tensor, shared: KeyShared, thread, p_state):
        """P to the other warpgroup, each thread's registers as they are: the same thread there has the same scores."""
        pipe = shared.pipes.p
        pipe.producer_acquire(p_state)
        cute.autovec_copy(self._in_turn(rP, shared), shared.p[thread, None, p_state.index])
        self.arrive(pipe.producer_commit, p_state)
        p_state.advance()
        return p_state

    @cute.jit
    def _take_over(self, acc_dP: cute.Tensor, shared: KeyShared, thread, p_state):
        """P from the other warpgroup, as float32 in the layout of dP."""
        rP = cute.make_rmem_tensor(as_operand_a(acc_dP).shape, self.element)
        shared.pipes.p.consumer_wait(p_state)
        source = shared.p[thread, None, p_state.index]
        cute.autovec_copy(source, cute.make_tensor(rP.iterator, cute.make_layout(source.shape)))
        self.arrive(shared.pipes.p.consumer_release, p_state)
        p_state.advance()
        P = cute.make_rmem_tensor_like(acc_dP)
        as_operand_a(P).store(rP.load().to(Float32))
        return P, p_state
