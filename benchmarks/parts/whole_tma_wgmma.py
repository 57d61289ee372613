"""``tma_wgmma``'s forward kernel with some of its stages: what ``whole`` and ``epilogue`` measure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cutlass import Float32, cute

from benchmarks.parts.common import fill_noise, fill_registers_noise, keep_alive, noise, ramp, use_bits
from benchmarks.parts.stages import Stages
from cute_attn.mainloop.tma_wgmma import Forward, ForwardPipelines
from cute_attn.private import NoRunTimeValues


@dataclass(frozen=True)
class NoPipe(NoRunTimeValues):
    """A pipeline on which nothing is ever waited for."""

    def consumer_wait(self, *_: Any) -> None: ...

    def consumer_release(self, *_: Any) -> None: ...


class Staged(Forward):
    """The kernel of one (problem, config) with ``stages``."""

    def __init__(self, problem, config, stages: Stages):
        super().__init__(problem, config)
        self.stages = stages
        if stages != Stages():  # what a variant leaves in O need not be finite, and is not to be done again
            self.guarded = self.anchored = False
        self.kept: Any = None  # scores, where no product makes them

    def _setup(self, draws):
        shared = Forward._setup(self, draws)
        if self.stages.loads:
            return shared
        if self.stages.products:
            for s in (shared.q, shared.k, shared.v):
                fill_noise(s, cute.arch.thread_idx()[0], self.config.threads)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_threads()
        return replace(shared, pipes=ForwardPipelines(NoPipe(), NoPipe(), NoPipe(), None))

    def _copy_q(self, *arguments):
        return Forward._copy_q(self, *arguments) if self.stages.loads else arguments[-2]  # the pipeline's state

    def _copy_k_v(self, *arguments):
        return Forward._copy_k_v(self, *arguments) if self.stages.loads else arguments[-2]

    def _worker(self):
        me = Forward._worker(self)
        if not self.stages.products:
            self.kept = cute.make_rmem_tensor(self._scores_shape(me), Float32)
            if self.stages.softmax:
                fill_registers_noise(self.kept)
        return me

    def _fragments(self, me, shared, slot):
        frag = Forward._fragments(self, me, shared, slot)
        if not self.stages.products:
            ramp(frag.acc_O, noise(cute.arch.clock()))  # not of the thread: numbers that never change are stored early
        return frag

    def _scores(self, tile, k_state, *started):
        self._leave_rescale(tile)
        return Forward._scores(self, tile, k_state, *started) if self.stages.products else self.kept

    def _scores_shape(self, me):
        return me.mma_S.get_slice(0).partition_shape_C((self.lay.ROWS_PER_WARPGROUP, self.config.tile_n))

    def gemm(self, mma, acc, tA, tB, accumulate, **how):
        if self.stages.products:
            Forward.gemm(self, mma, acc, tA, tB, accumulate, **how)
        elif accumulate and self.stages.softmax:
            use_bits(tA, acc)  # P, which no product reads

    def issue(self, mma, acc, tA, tB, accumulate, *how):
        """A product, or several times the same as one group: two groups would be waited for differently."""
        for again in range(self.stages.products):
            Forward.issue(self, mma, acc, tA, tB, accumulate or again > 0, *how)

    def _softmax(self, *arguments, **of_half):
        for _ in range(self.stages.softmax):
            Forward._softmax(self, *arguments, **of_half)

    def _exponentials_begin(self, p):
        if self.stages.softmax:  # without, p is no exponential, and its sign no promise
            Forward._exponentials_begin(self, p)

    def _probabilities(self, tile, acc_S):
        if self.stages.products or self.stages.softmax:
            Forward._probabilities(self, tile, acc_S)
        self._leave_rescale(tile)

    def _leave_rescale(self, tile):
        """Without a softmax O is multiplied by 1 where the kernel would rescale it, which the compiler leaves out."""
        if not self.stages.softmax:
            tile.frag.rescale.fill(1.0)

    def _normalize(self, *arguments):
        if self.stages.softmax:
            Forward._normalize(self, *arguments)

    def _store_o(self, tile, *arguments):
        if self.stages.epilogue:
            Forward._store_o(self, tile, *arguments)
        else:
            keep_alive(tile.frag.acc_O)
