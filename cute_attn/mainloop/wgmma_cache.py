"""Attention to a cache with cp.async copies and warpgroup MMA: many query rows of one key head, as multi-query attention has
them.

The kernel is that of ``cp_async_cache.py`` with warpgroups for groups, and with other products: the tensor cores read K and V
from shared memory themselves. What threads copy there they announce before they meet.

Two blocks may be a cluster. A walk that is all that both have, each a part of it, they merge over shared memory, all groups of
both at once; other walks that are cut go by way of the workspace.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from cute_attn.layouts.fragments import transposed
from cute_attn.layouts.mma_sync_cache import PIECE, PIECE_COLUMNS
from cute_attn.mainloop import cp_async_cache
from cute_attn.mainloop.cache_merge import CacheBlock, Exchanged, SeenTiles, floats
from cute_attn.mainloop.cluster import meet, stay
from cute_attn.mainloop.warpgroups import Kernel, rounded_operand
from cute_attn.softmax import anchored


class Forward(cp_async_cache.Forward):
    """The kernel of one (problem, config). Products are waited for at once: what overlaps them is another block's."""

    gemm, issue = Kernel.gemm, Kernel.issue  # as all warpgroups multiply

    def _operand_at(self, place, name: str) -> cute.Tensor:
        layout = self.lay.smem_layout(name, self.config)
        return cute.make_tensor(cute.recast_ptr(place, layout.inner), layout.outer)

    @cute.jit
    def _sync_group(self, block: CacheBlock):
        self._publish()
        cute.arch.barrier(barrier_id=cp_async_cache.GROUP_BARRIER + block.group, number_of_threads=self.group_threads)

    def _publish(self):
        cute.arch.fence_view_async_shared()

    def _operands(self, shared: tuple, mmas: tuple, thread) -> tuple:
        (sQ, sK, sV), (S, O) = shared, (mma.get_slice(0) for mma in mmas)  # noqa: E741
        return (
            S.make_fragment_A(S.partition_A(sQ)),
            S.make_fragment_B(S.partition_B(sK)),
            O.make_fragment_B(O.partition_B(transposed(sV))),
        )

    def _queries(self, block: CacheBlock, parity):
        return block.tSrQ[None, None, None, parity]

    def _scores(self, block: CacheBlock, of_q, slot) -> cute.Tensor:
        acc = cute.make_rmem_tensor(block.mma_S.partition_shape_C((self.config.tile_m, self.keys_of_group)), Float32)
        self.gemm(block.mma_S, acc, of_q, block.tSrK[None, None, None, slot], accumulate=False)
        warpgroup.wait_group(0)
        return acc

    def _add(self, block: CacheBlock, acc_S: cute.Tensor, acc_O: cute.Tensor, slot):
        p = rounded_operand(acc_S, block.sV.element_type)
        self.gemm(block.mma_O, acc_O, p, block.tOrV[None, None, None, slot], accumulate=True)
        warpgroup.wait_group(0)

    # ---- a walk that two blocks share --------------------------------------------------------------------------------

    @property
    def shares_walks(self) -> bool:
        return self.config.walk_blocks > 1 and not self.problem.invariant

    def _is_shared(self, block: CacheBlock, seen: SeenTiles):
        """Whether a part's walk is all that the blocks of the cluster have, each of which has one part of it then."""
        blocks, part = self.config.walk_blocks, seen.part
        first = cute.arch.block_idx()[0] // blocks * blocks
        begin, end = (block.stretches.begin(number) for number in (first, first + blocks))
        return (part.at - part.begin == begin) & (seen.sequence.tiles == end - begin) & (seen.places.parts == blocks)

    @cute.jit
    def _merge(self, block: CacheBlock, seen: SeenTiles, rows, softmax, exchanged):
        merge = super()._merge
        if cutlass.const_expr(not self.shares_walks):
            merge(block, seen, rows, softmax, exchanged)
        elif self._is_shared(block, seen):
            exchanged = self._exchanged(block, 0)  # a place that both know: each is at a tile of its own when its part ends
            self._sum_rows(softmax)
            self._hand_over(block, exchanged, rows, softmax, self._exist(block, seen), 0)
            meet()
            self._merge_blocks(block, seen, exchanged)
            stay()  # nobody ends whose memory is being read
        else:
            merge(block, seen, rows, softmax, exchanged)

    @cute.jit
    def _arrive(self, block: CacheBlock, seen: SeenTiles, written):
        if cutlass.const_expr(self.shares_walks):  # nobody counts parts that the blocks have merged already
            if self._is_shared(block, seen):
                seen = replace(seen, places=replace(seen.places, parts=Int32(0)))
        super()._arrive(block, seen, written)

    @cute.jit
    def _merge_blocks(self, block: CacheBlock, seen: SeenTiles, exchanged: Exchanged):
        """What all groups of both blocks have handed over, to the outputs. Of the two rows that threads of one number have, a
        block merges one, and of its columns each group some: what is here first, then what is there."""
        config, rank = self.config, cute.arch.block_in_cluster_idx()[0]
        pieces, each = config.tile_dv // PIECE_COLUMNS, config.tile_dv // PIECE_COLUMNS // config.key_warps
        begin, row = block.group * each, self._coordinates(block)[rank, 0][0]
        there = Exchanged(*(cute.arch.map_dsmem_ptr(place, 1 - rank) for place in (exchanged.o, exchanged.of_rows)))
        sources = [(source, group) for source in (exchanged, there) for group in range(config.key_warps)]
        if row < self._exist(block, seen):
            held = cute.make_rmem_tensor((PIECE, each, len(sources)), Float32)
            found = cute.make_rmem_tensor((2, len(sources)), Float32)
            for i in cutlass.range_constexpr(len(sources)):
                source, group = sources[i]
                cute.autovec_copy(floats(source.of_rows, group * config.tile_m + row, 2), found[None, i])
                for k in cutlass.range_constexpr(each):
                    if self._is_stored(begin + k):  # nobody waits for what isn't used, and stay() says that all has come
                        piece = self._handed(block, source, group, rank * pieces + begin + k)
                        cute.autovec_copy(piece, held[None, k, i])
            row_max = -Float32.inf
            for i in cutlass.range_constexpr(len(sources)):
                row_max = cute.arch.fmax(row_max, found[0, i])
            row_sum, merged = Float32(0.0), cute.make_rmem_tensor((PIECE, each), Float32)
            merged.fill(0.0)
            for i in cutlass.range_constexpr(len(sources)):
                weight = cute.math.exp2((found[0, i] - anchored(row_max)) * seen.values.exponent(self.problem), fastmath=True)
                row_sum += found[1, i] * weight
                for k in cutlass.range_constexpr(each):
                    merged[None, k].store(merged[None, k].load() + held[None, k, i].load() * weight)
            of_row = self._end_row(block, seen, row, (block.group == 0) & self._writes(block, True), row_max, row_sum)
            for k in cutlass.range_constexpr(each):
                self._store(block, seen, of_row, begin + k, merged[None, k])

    def _is_stored(self, n):
        """Whether a row's n-th piece has columns that there are."""
        columns = self.problem.head_dim_v
        return self.config.tile_dv - columns < PIECE_COLUMNS or n * PIECE_COLUMNS < columns
