"""Attention to a cache with cp.async copies and warpgroup MMA: many query rows of one key head, as multi-query attention has
them.

The kernel is that of ``cp_async_cache.py`` with warpgroups for groups, and with other products: the tensor cores read K and V
from shared memory themselves. What threads copy there they announce before they meet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from cute_attn.balance import PartPlaces
from cute_attn.layouts.fragments import transposed
from cute_attn.mainloop import cp_async_cache
from cute_attn.mainloop.cluster import meet, stay
from cute_attn.mainloop.cp_async_cache import (
    PIECE,
    PIECE_COLUMNS,
    CacheBlock,
    Exchanged,
    Outputs,
    SeenTiles,
    Serving,
    Workspace,
    anchor,
    floats,
    store_pair,
)
from cute_attn.mainloop.warpgroups import rounded_operand

__all__ = ["Forward", "Outputs", "Workspace"]


@dataclass(frozen=True)
class DescribedOperands:
    """Both products' operands as the tensor cores find them."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor


class Forward(cp_async_cache.Forward):
    """The kernel of one (problem, config)."""

    def _operand_at(self, place, name: str) -> cute.Tensor:
        layout = self.lay.smem_layout(name, self.config)
        return cute.make_tensor(cute.recast_ptr(place, layout.inner), layout.outer)

    @cute.jit
    def _sync_group(self, block: CacheBlock):
        self._publish()
        cute.arch.barrier(barrier_id=cp_async_cache.GROUP_BARRIER + block.group, number_of_threads=self.group_threads)

    def _publish(self):
        cute.arch.fence_view_async_shared()

    def _operands(self, shared: tuple, mmas: tuple, thread):
        (sQ, sK, sV), (S, O) = shared, (mma.get_slice(0) for mma in mmas)  # noqa: E741
        return DescribedOperands(
            S.make_fragment_A(S.partition_A(sQ)),
            S.make_fragment_B(S.partition_B(sK)),
            O.make_fragment_B(O.partition_B(transposed(sV))),
        )

    def _queries(self, block: CacheBlock, parity):
        return block.operands.q[None, None, None, parity]

    def _scores(self, block: CacheBlock, of_q, slot) -> cute.Tensor:
        acc = cute.make_rmem_tensor(block.mma_S.partition_shape_C((self.config.tile_m, self.keys_of_group)), Float32)
        self._multiply(block.mma_S, acc, of_q, block.operands.k[None, None, None, slot], accumulate=False)
        return acc

    def _add(self, block: CacheBlock, acc_S: cute.Tensor, acc_O: cute.Tensor, slot):
        p = rounded_operand(acc_S, block.sV.element_type)
        self._multiply(block.mma_O, acc_O, p, block.operands.v[None, None, None, slot], accumulate=True)

    # ---- a walk that two blocks share --------------------------------------------------------------------------------

    def _is_shared(self, serving: Serving, seen: SeenTiles, places: PartPlaces):
        """Whether a part's walk is all that the blocks of the cluster have, each of which has one part of it then."""
        blocks, part = self.config.walk_blocks, seen.part
        first = cute.arch.block_idx()[0] // blocks * blocks
        begin, end = (serving.stretches.begin(block) for block in (first, first + blocks))
        return (part.at - part.begin == begin) & (seen.sequence.tiles == end - begin) & (places.parts == blocks)

    @cute.jit
    def _merge(self, block: CacheBlock, serving: Serving, seen: SeenTiles, places: PartPlaces, rows, softmax, exchanged):
        super()._merge(block, serving, seen, places, rows, softmax, exchanged)
        if cutlass.const_expr(self.config.walk_blocks > 1):
            if self._is_shared(serving, seen, places):
                meet()
                self._merge_blocks(block, serving, seen, exchanged)
                stay()  # nobody ends whose memory is being read

    @cute.jit
    def _pass_on(
        self,
        block: CacheBlock,
        exchanged: Exchanged,
        serving: Serving,
        seen: SeenTiles,
        places: PartPlaces,
        where: tuple,
        found: tuple,
    ):
        """As there, or, if the other block of the cluster has more, back to where it was handed over."""
        plain = super()._pass_on
        if cutlass.const_expr(self.config.walk_blocks == 1):
            plain(block, exchanged, serving, seen, places, where, found)
        elif self._is_shared(serving, seen, places):
            (r, row, _), (row_max, row_sum, merged) = where, found
            if self._writes(block, True):
                store_pair(exchanged.of_rows, self.config.key_warps * self.config.tile_m + row, row_max, row_sum)
            pieces = self.config.tile_dv // PIECE_COLUMNS
            for n in cutlass.range_constexpr(pieces):
                cute.autovec_copy(merged[None, n], self._handed(block, exchanged, block.group, r * pieces + n))
        else:
            plain(block, exchanged, serving, seen, places, where, found)

    @cute.jit
    def _arrive(self, block: CacheBlock, serving: Serving, seen: SeenTiles, places: PartPlaces, written):
        if cutlass.const_expr(self.config.walk_blocks > 1):  # nobody counts parts that the blocks have merged already
            if self._is_shared(serving, seen, places):
                places = replace(places, parts=Int32(0))
        super()._arrive(block, serving, seen, places, written)

    @cute.jit
    def _merge_blocks(self, block: CacheBlock, serving: Serving, seen: SeenTiles, exchanged: Exchanged):
        """What all groups of both blocks found, to the outputs: each block half of the columns, a thread those of the row that
        it has merged before."""
        blocks, row = self.config.walk_blocks, self._coordinates(block)[block.group, 0][0]
        pieces = self.config.tile_dv // PIECE_COLUMNS
        each = pieces // blocks
        begin = cute.arch.block_in_cluster_idx()[0] * each
        if row < self._exist(serving, seen):
            held, found = cute.make_rmem_tensor((PIECE, each, blocks), Float32), cute.make_rmem_tensor((2, blocks), Float32)
            for i in cutlass.range_constexpr(blocks):
                there = Exchanged(*(cute.arch.map_dsmem_ptr(place, i) for place in (exchanged.o, exchanged.of_rows)))
                cute.autovec_copy(floats(there.of_rows, self.config.key_warps * self.config.tile_m + row, 2), found[None, i])
                for k in cutlass.range_constexpr(each):
                    piece = self._handed(block, there, block.group, block.group * pieces + begin + k)
                    cute.autovec_copy(piece, held[None, k, i])
            row_max = -Float32.inf
            for i in cutlass.range_constexpr(blocks):
                row_max = cute.arch.fmax(row_max, found[0, i])
            row_sum, merged = Float32(0.0), cute.make_rmem_tensor((PIECE, each), Float32)
            merged.fill(0.0)
            for i in cutlass.range_constexpr(blocks):
                weight = cute.math.exp2((found[0, i] - anchor(row_max)) * seen.values.exponent(self.problem), fastmath=True)
                row_sum += found[1, i] * weight
                for k in cutlass.range_constexpr(each):
                    merged[None, k].store(merged[None, k].load() + held[None, k, i].load() * weight)
            of_row = self._end_row(serving, seen, row, self._writes(block, begin == 0), row_max, row_sum)
            for k in cutlass.range_constexpr(each):
                self._store(block, serving, seen, of_row, begin + k, merged[None, k])

    # ---- products ----------------------------------------------------------------------------------------------------

    @cute.jit
    def _multiply(self, mma: cute.TiledMma, acc: cute.Tensor, a, b, accumulate: cutlass.Constexpr[bool]):
        """``acc (+)= A·B``, and wait for it: what overlaps it is another block's."""
        warpgroup.fence()
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, accumulate)
        for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
            cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
            atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        warpgroup.wait_group(0)
