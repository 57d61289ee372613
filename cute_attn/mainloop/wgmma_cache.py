"""Attention to a cache with cp.async copies and warpgroup MMA: many query rows of one key head, as multi-query attention has
them.

The kernel is that of ``cp_async_cache.py`` with warpgroups for groups, and with other products: the tensor cores read K and V
from shared memory themselves. What threads copy there they announce before they meet.

Two blocks may be a cluster. A walk that is all that both have, each a part of it, they merge over shared memory, all groups of
both at once; other walks that are cut go by way of the workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from cute_attn.balance import PartPlaces
from cute_attn.layouts.fragments import transposed
from cute_attn.layouts.mma_sync_cache import PIECE, PIECE_COLUMNS
from cute_attn.mainloop import cp_async_cache
from cute_attn.mainloop.cluster import meet, stay
from cute_attn.mainloop.cp_async_cache import (
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
from cute_attn.softmax import Softmax

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

    @property
    def shares_walks(self) -> bool:
        return self.config.walk_blocks > 1 and not self.problem.invariant

    def _is_shared(self, serving: Serving, seen: SeenTiles, places: PartPlaces):
        """Whether a part's walk is all that the blocks of the cluster have, each of which has one part of it then."""
        blocks, part = self.config.walk_blocks, seen.part
        first = cute.arch.block_idx()[0] // blocks * blocks
        begin, end = (serving.stretches.begin(block) for block in (first, first + blocks))
        return (part.at - part.begin == begin) & (seen.sequence.tiles == end - begin) & (places.parts == blocks)

    @cute.jit
    def _merge(
        self,
        block: CacheBlock,
        serving: Serving,
        seen: SeenTiles,
        places: PartPlaces,
        rows: cute.Tensor,
        softmax: Softmax,
        exchanged: Exchanged,
    ):
        merge = super()._merge
        if cutlass.const_expr(not self.shares_walks):
            merge(block, serving, seen, places, rows, softmax, exchanged)
        elif self._is_shared(serving, seen, places):
            exchanged = self._exchanged(block, 0)  # a place that both know: each is at a tile of its own when its part ends
            self._sum_rows(softmax)
            self._merge_blocks(block, serving, seen, rows, softmax, exchanged)
            stay()  # nobody ends whose memory is being read
        else:
            merge(block, serving, seen, places, rows, softmax, exchanged)

    @cute.jit
    def _arrive(self, block: CacheBlock, serving: Serving, seen: SeenTiles, places: PartPlaces, written):
        if cutlass.const_expr(self.shares_walks):  # nobody counts parts that the blocks have merged already
            if self._is_shared(serving, seen, places):
                places = replace(places, parts=Int32(0))
        super()._arrive(block, serving, seen, places, written)

    @cute.jit
    def _merge_blocks(
        self, block: CacheBlock, serving: Serving, seen: SeenTiles, rows: cute.Tensor, softmax: Softmax, exchanged: Exchanged
    ):
        """What all groups of both blocks found, to the outputs. Of the two rows that threads of one number have a group merges
        one, of both groups, and a block half of its columns, of both blocks; what is merged elsewhere is handed over."""
        config, rank, exponent = self.config, cute.arch.block_in_cluster_idx()[0], seen.values.exponent(self.problem)
        pieces, group, other = config.tile_dv // PIECE_COLUMNS, block.group, 1 - block.group
        half, is_first = pieces // 2, group == 0
        coordinates = self._coordinates(block)
        row, given_row, column = coordinates[group, 0][0], coordinates[other, 0][0], coordinates[0, 0][1]
        merged, held = (cute.make_rmem_tensor((PIECE, pieces), Float32) for _ in range(2))
        piece, found = cute.make_rmem_tensor(PIECE, Float32), cute.make_rmem_tensor(2, Float32)
        for n in cutlass.range_constexpr(pieces):
            for c in cutlass.range_constexpr(PIECE):
                first, second = rows[0, n * PIECE + c], rows[1, n * PIECE + c]
                merged[c, n] = first if is_first else second
                piece[c] = second if is_first else first
            cute.autovec_copy(piece, self._given(block, exchanged, group * pieces + n))
        row_max = softmax.row_max[0] if is_first else softmax.row_max[1]
        row_sum = softmax.row_sum[0] if is_first else softmax.row_sum[1]
        if column == 0:
            given_max = softmax.row_max[1] if is_first else softmax.row_max[0]
            given_sum = softmax.row_sum[1] if is_first else softmax.row_sum[0]
            store_pair(exchanged.of_rows, group * config.tile_m + given_row, given_max, given_sum)
        cute.arch.sync_threads()

        cute.autovec_copy(floats(exchanged.of_rows, other * config.tile_m + row, 2), found)
        for n in cutlass.range_constexpr(pieces):
            cute.autovec_copy(self._given(block, exchanged, other * pieces + n), held[None, n])
        row_max, row_sum = _merge_into(merged, held, row_max, row_sum, found, exponent)
        kept = cute.make_rmem_tensor((PIECE, half), Float32)
        for k in cutlass.range_constexpr(half):
            for c in cutlass.range_constexpr(PIECE):
                kept[c, k] = merged[c, k] if rank == 0 else merged[c, half + k]
                piece[c] = merged[c, half + k] if rank == 0 else merged[c, k]
            cute.autovec_copy(piece, self._given(block, exchanged, 2 * pieces + group * half + k))
        if column == 0:
            store_pair(exchanged.of_rows, group * config.tile_m + row, row_max, row_sum)
        meet()

        there = Exchanged(*(cute.arch.map_dsmem_ptr(place, 1 - rank) for place in (exchanged.o, exchanged.of_rows)))
        if row < self._exist(serving, seen):
            theirs = cute.make_rmem_tensor((PIECE, half), Float32)
            cute.autovec_copy(floats(there.of_rows, group * config.tile_m + row, 2), found)
            for k in cutlass.range_constexpr(half):
                if self._is_stored(rank * half + k):  # nobody waits for what isn't used, and stay() says that all has come
                    cute.autovec_copy(self._given(block, there, 2 * pieces + group * half + k), theirs[None, k])
            all_max, all_sum = _merge_into(kept, theirs, row_max, row_sum, found, exponent)
            of_row = self._end_row(serving, seen, row, (rank == 0) & (column == 0), all_max, all_sum)
            for k in cutlass.range_constexpr(half):
                self._store(block, serving, seen, of_row, rank * half + k, kept[None, k])

    def _given(self, block: CacheBlock, exchanged: Exchanged, n) -> cute.Tensor:
        """Where a group's n-th piece is of threads of this one's number."""
        return floats(exchanged.o, n * self.group_threads + block.thread, PIECE)

    def _is_stored(self, n):
        """Whether a row's n-th piece has columns that there are."""
        columns = self.problem.head_dim_v
        return self.config.tile_dv - columns < PIECE_COLUMNS or n * PIECE_COLUMNS < columns

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


@cute.jit
def _merge_into(merged: cute.Tensor, others: cute.Tensor, row_max, row_sum, found: cute.Tensor, exponent) -> tuple:
    """Of a row add what others found, whose ``(maximum, sum)`` is ``found``: ``(maximum, sum)`` of both."""
    both = cute.arch.fmax(row_max, found[0])
    mine = cute.math.exp2((row_max - anchor(both)) * exponent, fastmath=True)
    theirs = cute.math.exp2((found[0] - anchor(both)) * exponent, fastmath=True)
    merged.store(merged.load() * mine + others.load() * theirs)
    return both, row_sum * mine + found[1] * theirs
