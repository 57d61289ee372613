"""Sums over the blocks of a cluster, through one another's shared memory (Hopper's thread block clusters, CUDA C++ programming
guide, "Distributed shared memory").

Every thread holds a part of the sum that the same thread of the other blocks holds in the same registers. All blocks but the
first lay theirs down in shared memory, and the first adds them in the order of the blocks: the same bits each time.
"""

from __future__ import annotations

import cutlass
from cutlass import Float32, cute


@cute.jit
def sum_in_first_block(parts, blocks: cutlass.Constexpr[int]):
    """Accumulators of the first of ``blocks`` become the sums over all; others keep theirs. ``parts`` are pairs (accumulator,
    this thread's floats of shared memory, as many, which nothing else uses any more). All threads of the cluster that have not
    ended call this, and it returns once nobody reads another block's memory."""
    rank = cute.arch.block_in_cluster_idx()[0]
    if rank > 0:
        for acc, place in parts:
            cute.autovec_copy(cute.make_tensor(acc.iterator, cute.make_layout(place.shape)), place)
    _meet()
    if rank == 0:
        for block in cutlass.range_constexpr(1, blocks):
            for acc, place in parts:
                theirs = cute.make_rmem_tensor(place.shape, Float32)
                there = cute.arch.map_dsmem_ptr(place.iterator, block)
                cute.autovec_copy(cute.make_tensor(there, place.layout), theirs)
                held = cute.make_tensor(acc.iterator, cute.make_layout(place.shape))
                held.store(held.load() + theirs.load())
    _meet()


def _meet():
    """All threads of the cluster; what they have written is there for all."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
