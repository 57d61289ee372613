"""The warps of the backward pass that add dQ in global memory, and how those that compute hand it to them (Hopper).

Two warps take turns with a block's query tiles, so that one may wait until its sum is complete, pass its turn on and wait for
the next, while the other adds. The copy engine does, in float32 (``cp.reduce.async.bulk``): a tile's sums lie in shared memory
in the order of the accumulator's registers, which costs no bank conflict, and are one piece of global memory. Who comes to a
query tile first, stores. At a key tile's end these warps say what they have added, since another kernel rounds dQ meanwhile. Of
sequences with rows that aren't in use they also have the copy engine write the zeros.
"""

from __future__ import annotations

from functools import partial

import cutlass
from cutlass import Int32, cute

from cute_attn import layouts
from cute_attn.epilogue import copy_zeros
from cute_attn.fields import rounds_beside
from cute_attn.layouts.base import ADDED, COUNTED_KEYS, STORED, WARP
from cute_attn.layouts.tma import WARPGROUP
from cute_attn.mainloop.common import Gradients
from cute_attn.mainloop.unused_rows import UnusedRows
from cute_attn.mainloop.walk import QueryTiles

STORE = "cp.async.bulk.global.shared::cta.bulk_group"
ADD = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"


class Adders:
    """Those of one (problem, config): a block's warps from ``first_warp`` on. Of the named barriers from ``first_barrier`` on
    one for each warpgroup and each of these warps says that the sums are there, and one for each stage of their memory and each
    warpgroup that it is free again."""

    WARPS = 2  # of a block

    def __init__(self, problem, config, first_warp: int, first_barrier: int):
        self.problem, self.config, self.first_warp = problem, config, first_warp
        self.warpgroups = layouts.family(config).warpgroups(config)
        self.full_barrier, self.empty_barrier = first_barrier, first_barrier + self.WARPS * self.warpgroups
        self.needed = "q" in problem.gradients
        self.rounds_beside = rounds_beside(problem, config)

    # ---- those that compute ----------------------------------------------------------------------------------------

    def wait_until_empty(self, step, warpgroup):
        """A warpgroup: until its part of the memory for a step's sums is free. Returns which stage it is."""
        stage = step % self.config.dq_stages
        cute.arch.barrier(barrier_id=self.empty(stage, warpgroup), number_of_threads=WARPGROUP + WARP)
        return stage

    @cute.jit
    def hand_over(self, step, warpgroup):
        """It, once it has stored a step's sums there."""
        cute.arch.fence_view_async_shared()
        barrier = self.full_barrier + self.WARPS * warpgroup + step % self.WARPS
        cute.arch.barrier_arrive(barrier_id=barrier, number_of_threads=WARPGROUP + WARP)

    def empty(self, stage, warpgroup):
        """The barrier of a warpgroup's part of a stage's memory."""
        return self.empty_barrier + stage * self.warpgroups + warpgroup

    # ---- these warps -----------------------------------------------------------------------------------------------

    def unused(self, gradients: Gradients, tiles, zeros: cute.Tensor, places: cute.Tensor) -> tuple[UnusedRows | None, ...]:
        """The rows that aren't in use that each warp is to clear. Of keys there may always be some: those after the last
        sequence."""
        of_queries = of_keys = None
        if gradients.unused_dq is not None:
            clear = partial(_clear, zeros, [gradients.unused_dq])
            of_queries = UnusedRows(tiles, (tiles.sequences.q, self.config.tile_m, 2), clear, places[None, 0])
        of_key_tiles = [m for m in (gradients.mdK, gradients.mdV) if m is not None]
        if self.problem.ragged and of_key_tiles:
            clear = partial(_clear, zeros, of_key_tiles)
            of_keys = UnusedRows(tiles, (tiles.sequences.k, self.config.tile_n, 2), clear, places[None, 1])
        return of_queries, of_keys  # the second warp's first dQ comes later, and these are twice as much

    @cute.jit
    def run(self, each: cutlass.Constexpr, gradients: Gradients, signals, beside, sdQ, warp: Int32, unused: tuple):
        """What a warp does, if it is one of these, at ``each`` of the block's key tiles. ``beside``: whether dQ is rounded
        meanwhile, if only the device knows."""
        if cutlass.const_expr(self.needed):
            if warp >= self.first_warp:
                for stage in cutlass.range_constexpr(self.config.dq_stages):
                    if warp == self.first_warp + stage:
                        self._offer(stage)
        self._clearing(unused, warp, UnusedRows.begin, self.first_warp)
        if cutlass.const_expr(self.needed):
            if warp >= self.first_warp:
                each(partial(self._add, gradients, signals, beside, sdQ, warp - self.first_warp, unused))
                if cutlass.const_expr(self.rounds_beside):
                    cute.arch.cp_async_bulk_wait_group(0, read=False)
                    if cute.arch.lane_idx() == 0:
                        signals.end()
        self._clearing(unused, warp, _clear_the_rest, self.first_warp)

    @cute.jit
    def _clearing(self, unused: cutlass.Constexpr, mine: Int32, do: cutlass.Constexpr, first: cutlass.Constexpr[int] = 0):
        """A warp: ``do(own)`` for the rows that it is to clear, if it is one of these and there may be any. ``mine`` is its
        number, from the ``first`` one's on."""
        for warp, own in enumerate(unused, first):
            if cutlass.const_expr(own is not None):
                if mine == warp:
                    do(own)

    @cute.jit
    def _add(self, gradients: Gradients, signals, beside, sdQ: cute.Tensor, mine: Int32, unused: tuple, values, where, done):
        """The dQ of a key tile's even or odd query tiles, by the block's count."""
        self._clearing(unused, mine, UnusedRows.begin_tile)
        lane = cute.arch.lane_idx()
        step, stages = Int32(done[1]), self.config.dq_stages
        work, members = where
        visited = QueryTiles.of(values, self.problem, work.block, self.config)
        for member in cutlass.range(visited.members(members), unroll=1):
            for i in cutlass.range(visited.count, unroll=1):
                if step % self.WARPS == mine:
                    m_block, of = visited.tile(i, member, self.problem)
                    head = work.head + of
                    place = (work.q.padded_tile(m_block, self.config.tile_m), head, work.q.batch)
                    before = Int32(0)
                    if cutlass.const_expr(self.problem.deterministic):
                        before = visited.rank(values.of_head(head), self.problem, m_block, self.config)
                        if lane == 0:
                            signals.wait_for_turn(place, before)
                        cute.arch.sync_warp()
                    else:
                        before = signals.count(place)
                    for w in cutlass.range_constexpr(self.warpgroups):
                        barrier = self.full_barrier + self.WARPS * w + mine
                        cute.arch.barrier(barrier_id=barrier, number_of_threads=WARPGROUP + WARP)
                    first = before == 0
                    if lane == 0:
                        if cutlass.const_expr(not self.problem.deterministic):
                            first = signals.comes_first(place, before)
                        if first:
                            self._hand_on(STORE, gradients.mdQ, place, sdQ, step % stages)
                        else:
                            # What was acquired orders this thread's own accesses; the copy engine's, which add, are another
                            # proxy's (PTX ISA, "Async proxy"). The other way none is needed: a bulk operation that is
                            # complete is followed by such a fence (ibid.).
                            cute.arch.fence_proxy("async.global")
                            self._hand_on(ADD, gradients.mdQ, place, sdQ, step % stages)
                    cute.arch.sync_warp()
                    self._offer(step % stages)
                    if lane == 0:
                        if cutlass.const_expr(self.problem.deterministic):
                            cute.arch.cp_async_bulk_wait_group(0, read=False)
                            signals.pass_turn(place)
                        elif first:
                            cute.arch.cp_async_bulk_wait_group(0, read=False)
                            signals.pass_turn(place, STORED)
                    self._clearing(unused, mine, UnusedRows.between)
                step += 1
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        if cutlass.const_expr(self.rounds_beside and not self.problem.deterministic):
            counted = (values.seqlen_k <= COUNTED_KEYS) & (True if beside is None else beside)
            if counted:
                self._pass_turns(signals, mine, visited, where, Int32(done[1]))

    @cute.jit
    def _pass_turns(self, signals, mine: Int32, visited: QueryTiles, where, step):
        """At a key tile's end: all that this warp has added, from the block's ``step`` on, is there."""
        work, members = where
        cute.arch.cp_async_bulk_wait_group(0, read=False)
        cute.arch.sync_warp()
        cute.arch.fence_acq_rel_gpu()
        for member in cutlass.range(visited.members(members), unroll=1):
            own = self.WARPS * cute.arch.lane_idx() + (step + mine) % self.WARPS
            for i in cutlass.range(own, visited.count, self.WARPS * WARP, unroll=1):
                m_block, of = visited.tile(i, member, self.problem)
                place = (work.q.padded_tile(m_block, self.config.tile_m), work.head + of, work.q.batch)
                signals.pass_turn(place, ADDED, sem="relaxed")
            step += visited.count

    def _hand_on(self, how: str, mdQ: cute.Tensor, place, sdQ: cute.Tensor, stage):
        """One thread: a tile's dQ to global memory by the copy engine, until it has been read."""
        for w in range(self.warpgroups):
            _copy_bulk(how, mdQ[(None, w, *place)], sdQ[None, None, stage * self.warpgroups + w])
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _offer(self, stage):
        """A stage of dQ's shared memory to those that compute, for another tile."""
        for w in range(self.warpgroups):
            cute.arch.barrier_arrive(barrier_id=self.empty(stage, w), number_of_threads=WARPGROUP + WARP)


def _clear(zeros: cute.Tensor, gradients: list, first, past):
    """One warp: these rows of all heads of gradients."""
    for m in gradients:
        copy_zeros(zeros, m[None, None, None, 0], first, past)


def _clear_the_rest(own: UnusedRows):
    """What a warp has left to clear, until its zeros have been read."""
    own.rest()
    cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def _copy_bulk(how: cutlass.Constexpr[str], into: cute.Tensor, source: cute.Tensor):
    """Store or add a contiguous float32 tensor in shared memory to global memory, by the copy engine; ends with its bulk
    group."""
    cute.arch.inline_ptx(
        how + " [{$r0}], [{$r1}], {$r2};",
        read_only_args=[into.iterator.toint(), source.iterator.toint(), Int32(cute.size(source) * 4)],
    )
