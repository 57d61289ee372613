"""``cp_async``'s forward kernel with some of its stages: what ``whole`` and ``epilogue`` measure.

Its ``_step`` does everything in one piece, so it is written out again here, in parts; a test compares the machine code
of the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from benchmarks.parts.common import fill_registers_noise, keep_alive, noise, ramp, use_bits
from benchmarks.parts.stages import Stages
from cute_attn.epilogue import converted
from cute_attn.layouts.fragments import as_operand_a, rows_columns
from cute_attn.mainloop.cp_async import Forward
from cute_attn.mainloop.scores import Scores
from cute_attn.mainloop.warps import MMA_K, product
from cute_attn.softmax import scale_rows


class Staged(Forward):
    """The kernel of one (problem, config) with ``stages``. Without loads, the first tiles still come, and stay."""

    def __init__(self, problem, config, stages: Stages):
        super().__init__(problem, config)
        self.stages = stages
        if stages != Stages():  # what a variant leaves in O need not be finite, and is not to be done again
            self.careful = self.anchored = False
        self.kept: Any = None  # scores, where no product makes them

    def _shared(self):
        if not self.stages.products:
            shape = self.lay.tiled_mma("S", self.config).partition_shape_C((self.config.tile_m, self.config.tile_n))
            self.kept = cute.make_rmem_tensor(shape, Float32)
            if self.stages.softmax:
                fill_registers_noise(self.kept)
        return Forward._shared(self)

    def _copy_q(self, *arguments):
        if self.stages.loads or self.stages.products:
            Forward._copy_q(self, *arguments)

    @cute.jit
    def _copy_first(self, tile):
        Forward._copy_first(self, tile)
        if cutlass.const_expr(not self.stages.loads):
            Forward._copy_pair(self, tile, tile.keys.place(0), self.config.stages - 1)

    def _copy_pair(self, tile, n, slot):
        Forward._copy_pair(self, tile, n, slot)
        if not self.stages.loads and slot == 0:  # the slot that the loop would fill first
            Forward._copy_pair(self, tile, n, self.config.stages - 1)

    @cute.jit
    def _step(self, tile, again: cutlass.Constexpr, slot: Int32, where, parts: cutlass.Constexpr = 0):
        n, masked = where
        anchored = self.anchored and masked is False
        stages, acc_O = self.config.stages, tile.acc_O
        cute.arch.cp_async_wait_group(stages - 2 + parts)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.stages.loads):
            before = (slot + stages - 1) % stages
            self._copy_pair(tile, n - (stages - 1), before)
        acc_S = self._scores(tile, slot, parts)
        if cutlass.const_expr(self.stages.softmax):
            origin = (tile.row_first, tile.keys.begin + n * self.config.tile_n)
            for _ in cutlass.range_constexpr(self.stages.softmax):
                Scores(tile.cS, tile.values, self.problem).apply_rules(acc_S, origin, masked)
                if cutlass.const_expr(anchored):
                    tile.softmax.anchored_step(rows_columns(acc_S))
                else:
                    hold = tile.keys.is_anchored(n) if cutlass.const_expr(self.anchored and again) else None
                    tile.softmax.step(rows_columns(acc_S), tile.rescale, hold)
            if cutlass.const_expr(not anchored):
                scale_rows(rows_columns(acc_O), tile.rescale)
        if cutlass.const_expr(parts > 0):
            self._wait_for_part(0)
        if cutlass.const_expr(self.stages.products or self.stages.softmax):
            self._accumulate(tile, acc_S, slot)
        return (slot + 1) % stages

    @cute.jit
    def _scores(self, tile, slot: Int32, parts: cutlass.Constexpr):
        """S = Q·Kᵀ, part by part of the columns."""
        acc_S = self.kept
        if cutlass.const_expr(self.stages.products):
            shape = tile.mma_S.partition_shape_C((self.config.tile_m, self.config.tile_n))
            acc_S = cute.make_rmem_tensor(shape, Float32)
            acc_S.fill(0.0)
            q, k = tile.q, tile.k
            for again in cutlass.range_constexpr(self.stages.products):
                self._forget(again)
                steps = self.config.tile_d // MMA_K // max(parts, 1)
                for i in cutlass.range_constexpr(max(parts, 1)):
                    if cutlass.const_expr(i > 0 and again == 0):
                        self._wait_for_part(parts - i)
                    product(tile.mma_S, acc_S, (i + 1) * steps, q.load, partial(k.load, slot=(slot,)), i * steps)
        return acc_S

    @cute.jit
    def _accumulate(self, tile, acc_S, slot: Int32):
        """O += P·V."""
        v, acc_O = tile.v, tile.acc_O
        p = as_operand_a(acc_S)

        def rounded(step):
            return converted(p[None, None, step], v.fragment.element_type)

        for again in cutlass.range_constexpr(max(self.stages.products, 1)):
            self._forget(again)
            if cutlass.const_expr(self.stages.products):
                product(tile.mma_O, acc_O, self.config.tile_n // MMA_K, rounded, partial(v.load, slot=(slot,)))
            else:
                for step in cutlass.range_constexpr(self.config.tile_n // MMA_K):
                    use_bits(rounded(step), acc_O)

    def _forget(self, again: int):
        """Before a product is done again: a fence for the compiler, which would keep the operands in registers."""
        if again:
            cute.arch.sync_warp()

    def _store_o(self, acc_O, *arguments):
        if not self.stages.products and not self.stages.softmax:
            ramp(acc_O, noise(cute.arch.thread_idx()[0]))
        if self.stages.epilogue:
            Forward._store_o(self, acc_O, *arguments)
        else:
            keep_alive(acc_O)
