"""What blocks of a cluster do together, through one another's shared memory (Hopper's thread block clusters, CUDA C++
programming guide, "Distributed shared memory"): they meet, and add up what each has a part of.

Of a sum every thread holds a part, and the same thread of the other blocks others in the same registers. All blocks but the
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
    meet()
    if rank == 0:
        for block in cutlass.range_constexpr(1, blocks):
            for acc, place in parts:
                theirs = cute.make_rmem_tensor(place.shape, Float32)
                there = cute.arch.map_dsmem_ptr(place.iterator, block)
                cute.autovec_copy(cute.make_tensor(there, place.layout), theirs)
                held = cute.make_tensor(acc.iterator, cute.make_layout(place.shape))
                held.store(held.load() + theirs.load())
    meet()


def meet():
    """All threads of the cluster; what they have written is there for all."""
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


def stay():
    """Until all threads of the cluster have come here, which have used then what they read of one another's memory. It says
    nothing of what they have written, and so waits for none of it."""
    cute.arch.cluster_arrive_relaxed()
    cute.arch.cluster_wait()
