"""Which of the backward pass's blocks take key tiles, where another kernel rounds dQ meanwhile (Hopper).

That one begins on multiprocessors which the others leave: so many that it takes as long as they do (``Tiles.without_some``).
Where it is known on the device only how much there is to do, each block finds out by itself, and ends if it is one too many.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.fields import rounds_beside
from cute_attn.layouts.base import WARP
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.scheduler import LONG_WALK, Tiles

SAMPLED = 128  # sequences, or query tiles with lists, that are looked at


class Beside:
    """Of one (problem, config), whose blocks are ``persistent`` or not, and whose tiles cost the same (``equal``) or not.
    ``beside`` is everywhere whether dQ is rounded meanwhile, None: it is, or with lists may be."""

    def __init__(self, problem, config, persistent: bool, equal: bool):
        self.problem, self.config, self.persistent, self.equal = problem, config, persistent, equal
        self.rounds = rounds_beside(problem, config)
        # Whether how many blocks are to take tiles is known on the device only.
        self.looks = self.rounds and persistent and bool(problem.ragged or problem.blocks)

    @cute.jit
    def launched(self, tiles: Tiles, values: Values, blocks):
        """On the host: ``(blocks, beside)``, how many blocks are to be launched if the GPU holds ``blocks``."""
        beside = None
        if cutlass.const_expr(self.rounds and not self.looks):
            middle = cute.ceil_div(values.seqlen_q, self.config.tile_m) // 2
            visits = QueryTiles.visits(values, self.problem, middle, self.config)
            if cutlass.const_expr(self.equal):  # where rounding takes little, these are faster by themselves
                beside = visits <= 2 * LONG_WALK
            if cutlass.const_expr(self.persistent):
                fewer = Tiles.without_some(blocks, tiles.count(), 100 * visits)
                if cutlass.const_expr(beside is None):  # noqa: SIM114
                    blocks = fewer
                elif beside:
                    blocks = fewer
        return blocks, beside

    @cute.jit
    def begin(self, beside):
        """From now on the kernel that rounds dQ may begin, where it does so meanwhile."""
        if cutlass.const_expr(beside is None):  # noqa: SIM114
            cute.arch.griddepcontrol_launch_dependents()
        elif beside:
            cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def found_out(self, tiles: Tiles, values: Values, beside, looks):
        """In the kernel: ``(tiles, beside)`` where it is found out here how many blocks take tiles, by the warps that ``looks``
        is true of. With lists nobody rounds meanwhile unless some leave."""
        listed, at_once = bool(self.problem.blocks), Int32(0)
        if looks:
            at_once = self._that_take_tiles(tiles, values)
            if cutlass.const_expr(listed):
                self.begin(at_once < cute.arch.grid_dim()[0])
        tiles = replace(tiles, at_once=cute.arch.make_warp_uniform(at_once))
        if cutlass.const_expr(listed):
            beside = tiles.at_once < cute.arch.grid_dim()[0]
        return tiles, beside

    @cute.jit
    def _that_take_tiles(self, tiles: Tiles, values: Values):
        """One warp: how many of the grid's blocks do, by the lengths of up to 128 ragged sequences, or by how many key tiles
        visit as many query tiles."""
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(self.problem.blocks):
            # An odd number apart, which goes through all heads and batches where these are a power of 2.
            apart, visits = cute.ceil_div(cute.size(values.visits), SAMPLED) | 1, Int32(0)
            sampled = cute.ceil_div(cute.size(values.visits), apart)
            for number in cutlass.range(lane, sampled, WARP, unroll=1):
                visits += values.visits[number * apart]
            steps = 100 * cute.arch.warp_redux_sync(visits, "add") // sampled
            return Tiles.without_some(cute.arch.grid_dim()[0], tiles.count(), steps)
        count = cutlass.max(tiles.sequences.count, 1)
        apart = cute.ceil_div(count, SAMPLED)
        sampled = cute.ceil_div(count, apart)
        of_q = of_k = visits = Float32(0.0)
        for number in cutlass.range(lane, sampled, WARP, unroll=1):
            q, k = tiles.sequences.spans(number * apart)
            m_blocks, n_blocks = cute.ceil_div(q.length, self.config.tile_m), cute.ceil_div(k.length, self.config.tile_n)
            of_middle = QueryTiles.visits(values.of_lengths(q.length, k.length), self.problem, m_blocks // 2, self.config)
            visits += Float32(m_blocks) * Float32(of_middle)
            of_q, of_k = of_q + Float32(m_blocks), of_k + Float32(n_blocks)
        of_q, of_k, visits = (cute.arch.warp_reduction_sum(x) for x in (of_q, of_k, visits))
        n_blocks = Int32(cutlass.min(of_k * Float32(apart) * Float32(tiles.heads), Float32(1 << 24)))
        steps = Int32(100.0 * visits * cute.arch.rcp_approx(cutlass.max(of_q, Float32(1.0))))
        return Tiles.without_some(cute.arch.grid_dim()[0], n_blocks, steps)
