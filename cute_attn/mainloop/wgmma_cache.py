"""Attention to a cache with cp.async copies and warpgroup MMA: many query rows of one key head, as multi-query attention has
them.

The kernel is that of ``cp_async_cache.py`` with warpgroups for groups, and with other products: the tensor cores read K and V
from shared memory themselves. What threads copy there they announce before they meet.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import warpgroup

from cute_attn.layouts.fragments import transposed
from cute_attn.mainloop import cp_async_cache
from cute_attn.mainloop.cp_async_cache import CacheBlock, Outputs, Workspace
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
