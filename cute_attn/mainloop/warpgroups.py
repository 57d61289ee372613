"""What the kernels of ``tma_wgmma`` share: operands as TMA sees them, and groups of warpgroup MMAs in flight."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Float32, cute
from cutlass.cute.nvgpu import cpasync, warpgroup

from cute_attn.layouts.fragments import as_operand_a, rows_columns
from cute_attn.mainloop.common import Values
from cute_attn.softmax import capped_probabilities, probabilities

WARPGROUP = 128
ROWS = 64  # of an accumulator


@dataclass(frozen=True)
class Operand:
    """One tensor in global memory as TMA sees it: the copy atom, and the tensor of its coordinates (s, d, h, b)."""

    atom: cute.CopyAtom
    m: cute.Tensor


def tma_operand(op, layout, tile, m: cute.Tensor) -> Operand:
    """The operand that ``op`` copies ``tile`` of at a time, to or from a slot of ``layout`` (rows, columns, …slots)."""
    slot = cute.select(layout, mode=[0, 1])
    return Operand(*cpasync.make_tiled_tma_atom(op, m, slot, tile))


def tma_tiles(operand: Operand, s: cute.Tensor, head, batch, row):
    """The tiles of one head from ``row`` on, and the slots in shared memory: ``(copy, tile)`` and ``(copy, slot)``."""
    g = cute.domain_offset((row, 0), operand.m[None, None, head, batch])
    g = cute.local_tile(g, cute.product_each(s.shape)[:2], (None, 0))
    tXsX, tXgX = cpasync.tma_partition(
        operand.atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
    )
    return tXgX, tXsX


@cute.jit
def copy_row_values(source: cute.Tensor, into: cute.Tensor, barrier):
    """Start copying a float32 of each of a tile's rows to shared memory; ``barrier`` counts its bytes."""
    atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32, num_bits_per_copy=32 * cute.size(into))
    with cute.arch.elect_one():
        cute.copy(atom, source, into, mbar_ptr=barrier)


def of_columns(mma: cute.TiledMma, thread, sRow: cute.Tensor) -> cute.Tensor:
    """A value of each query in shared memory, for the columns of a thread's scores (keys, queries)."""
    queries = cute.size(sRow)
    wide = cute.make_tensor(sRow.iterator, cute.make_layout((ROWS, queries), stride=(0, 1)))
    return rows_columns(mma.get_slice(thread).partition_C(wide))[0, None]


def rounded_operand(acc: cute.Tensor, dtype) -> cute.Tensor:
    """An accumulator as an A operand in ``dtype``, one MMA's worth at a time so that conversions pair up."""
    a = as_operand_a(acc)
    out = cute.make_rmem_tensor(a.shape, dtype)
    for k in range(cute.size(a, mode=[2])):
        out[None, None, k].store(a[None, None, k].load().to(dtype))
    return out


def rounded_probabilities(acc_S: cute.Tensor, lse_log2: cute.Tensor, values: Values, problem, dtype) -> cute.Tensor:
    """For the backward pass, transposed: scores to P in place (∘ the softcap's slopes, if there is one); returns P in
    ``dtype``, as the A operand of dV."""
    P = rows_columns(acc_S)
    if problem.softcap:
        rounded = cute.make_rmem_tensor_like(acc_S, dtype)
        capped_probabilities(P, lse_log2, values.scale_log2, rows_columns(rounded))
        return as_operand_a(rounded)
    probabilities(P, lse_log2, values.scale_log2)
    return rounded_operand(acc_S, dtype)


@cute.jit
def gemm(mma: cute.TiledMma, acc, tA, tB, accumulate: cutlass.Constexpr[bool]):
    """Issue ``acc (+)= A·B`` as one group of warpgroup MMAs; the caller waits."""
    warpgroup.fence()
    atom = cute.make_mma_atom(mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(tA, mode=[2])):
        cute.gemm(atom, acc, tA[None, None, k], tB[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


class InFlight:
    """The groups of warpgroup MMAs a warpgroup has issued and not waited for, in order, by name; known at compile time.

    Groups end in the order they were issued, so waiting for one waits for those before it too.
    """

    def __init__(self, *names: str):
        self.names = list(names)

    def issued(self, name: str):
        self.names.append(name)

    def wait(self, name: str):
        """Until the named group has ended; nothing if it was never issued or is already waited for."""
        if name in self.names:
            after = len(self.names) - 1 - self.names.index(name)
            warpgroup.wait_group(after)
            self.names = self.names[len(self.names) - after :] if after else []
