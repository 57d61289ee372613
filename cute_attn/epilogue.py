"""What the ends of the kernels share: the log-sum-exp's way to global memory, and rounding."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.arithmetic import either
from cute_attn.layouts.base import VECTOR, WARP
from cute_attn.layouts.fragments import vector_at
from cute_attn.scheduler import Work
from cute_attn.softmax import LogSumExp, Softmax


def store_lse(mLSE: LogSumExp, lse: LogSumExp, where: cute.Tensor, row_first: Int32, work: Work):
    """Write what is asked for of the log-sum-exp. ``where`` is the (row, column) within the tile of the thread's outputs."""
    for m, held in ((mLSE.natural, lse.natural), (mLSE.raw, lse.raw)):
        if m is not None:
            _store_rows(work.q.stored.row_values(m, work.head), held, where, row_first)


@cute.jit
def clear_rows_past(length, row_first: Int32, where: cute.Tensor, acc: cute.Tensor, softmax: Softmax | None = None):
    """Zeros for the rows of an accumulator (rows, columns) that its sequence doesn't have, as if they saw no key."""
    for r in cutlass.range_constexpr(cute.size(acc, mode=[0])):
        if row_first + where[r, 0][0] >= length:
            acc[r, None].fill(0.0)
            if cutlass.const_expr(softmax is not None):
                softmax.row_sum[r] = Float32(0.0)


@cute.jit
def _store_rows(m: cute.Tensor, held: cute.Tensor, where: cute.Tensor, row_first: Int32):
    """Write a value of each row once: the thread that holds column 0 does."""
    if where[0, 0][1] == 0:
        for r in cutlass.range_constexpr(cute.size(held)):
            row = row_first + where[r, 0][0]
            if row < m.shape[0]:
                m[row] = held[r]


@cute.jit
def store_nothing_seen(mO: cute.Tensor, mLSE: LogSumExp, work: Work, shape: cutlass.Constexpr[tuple]):
    """One warp: the results of a tile (rows, columns) of queries none of which sees a key, as if it had been computed."""
    gO, first, lane = work.q.stored.rows(mO, work.head), work.block * shape[0], cute.arch.lane_idx()
    last = cutlass.min(first + shape[0], gO.shape[0])
    store_zeros(gO, work.block, shape)
    for m, nothing in ((mLSE.natural, -Float32.inf), (mLSE.raw, Float32.inf)):
        if cutlass.const_expr(m is not None):
            of_rows = work.q.stored.row_values(m, work.head)
            for r in cutlass.range(first + lane, last, WARP, unroll=1):
                of_rows[r] = nothing


@cute.jit
def store_zeros(m: cute.Tensor, block: Int32, shape: cutlass.Constexpr[tuple]):
    """One warp: a tile (rows, columns) of a tensor in global memory, as far as that has rows and columns."""
    first, lane = block * shape[0], cute.arch.lane_idx()
    pieces = min(shape[1] // VECTOR, WARP)  # of a row, one for each lane
    row, piece = lane // pieces, lane % pieces
    rows = WARP // pieces
    into = vector_at(m, first + row, piece).iterator.toint()
    step = cutlass.Int64(m.stride[0]) * (rows * m.element_type.width // 8)
    if piece * VECTOR < m.shape[1]:
        for _ in cutlass.range(first + row, cutlass.min(first + shape[0], m.shape[0]), rows, unroll=4):
            cute.arch.inline_ptx(
                "st.global.cs.v4.b32 [{$r0}], {{$r1}, {$r1}, {$r1}, {$r1}};", read_only_args=[into, Int32(0)]
            )
            into += step


@cute.jit
def copy_zeros(zeros: cute.Tensor, m: cute.Tensor, first: Int32, past: Int32):
    """One warp: rows of all heads of a tensor ``(rows, columns, heads)`` in global memory, which the copy engine stores from
    zeros in shared memory. One thread starts the copies, as large as these are, and waits for none. They leave the L2 cache
    first."""
    width, least = m.element_type.width // 8, cute.size(zeros) * zeros.element_type.width // 8
    rows, heads, piece = past - first, Int32(m.shape[2]), cutlass.Int64(m.shape[1]) * width
    if m.stride[2] == m.shape[1]:  # of a row all heads are one piece of memory
        heads, piece = Int32(1), piece * m.shape[2]
        if m.stride[0] == cutlass.Int64(m.shape[1]) * m.shape[2]:  # and all rows
            rows, piece = Int32(1), piece * rows
    with cute.arch.elect_one():
        for row in cutlass.range(first, first + rows, unroll=1):
            for head in cutlass.range(heads, unroll=1):
                into = m.iterator.toint() + (cutlass.Int64(row) * m.stride[0] + cutlass.Int64(head) * m.stride[2]) * width
                past_last = into + piece
                while into < past_last:
                    cute.arch.inline_ptx(
                        "{{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; "
                        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [{$r0}], [{$r1}], {$r2}, policy; }}",
                        read_only_args=[into, zeros.iterator.toint(), Int32(cutlass.min(past_last - into, least))],
                    )
                    into += least
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def store_vectors(m: cute.Tensor, length, first, where: cute.Tensor, acc: cute.Tensor):
    """An accumulator (rows, columns) of whole warps, rounded, to a tensor ``(rows, columns)`` in global memory, of which
    ``length`` rows are written, from row ``first`` on. ``where`` is the (row, column) of what the thread holds. Four neighbours
    have 8 columns of an MMA together, and exchange those of four MMAs: each stores 16 bytes, all of them 64."""
    lane = cute.arch.lane_idx()
    odd, late = lane % 2 != 0, lane % 4 >= 2
    for r in cutlass.range_constexpr(cute.size(acc, mode=[0])):
        row = first + where[r, 0][0]
        for c in cutlass.range_constexpr(0, cute.size(acc, mode=[1]), 8):
            held = cute.make_rmem_tensor(8, m.element_type)
            for i in cutlass.range_constexpr(8):
                held[i] = acc[r, c + i].to(m.element_type)
            words = cute.recast_tensor(held, Int32)
            w = [words[i] for i in range(4)]
            for a in (0, 2):
                theirs = cute.arch.shuffle_sync_bfly(either(odd, w[a], w[a + 1]), 1)
                w[a], w[a + 1] = either(odd, theirs, w[a]), either(odd, w[a + 1], theirs)
            for a in (0, 1):
                theirs = cute.arch.shuffle_sync_bfly(either(late, w[a], w[a + 2]), 2)
                w[a], w[a + 2] = either(late, theirs, w[a]), either(late, w[a + 2], theirs)
            for i in cutlass.range_constexpr(4):
                words[i] = w[i]
            column = where[r, c][1] + lane % 4 * 6  # of the MMA with the thread's number among the four
            if row < length and column < m.shape[1]:
                cute.autovec_copy(held, vector_at(m, row, column // VECTOR))


def put(how: str, into: cute.Pointer, values: list[Float32], where=None) -> None:
    """Store neighbouring floats to memory, or add them to what is there: ``how`` is the instruction of it; if ``where``."""
    names = ", ".join(f"{{$r{i + 1}}}" for i in range(len(values)))
    several = f".v{len(values)}" if len(values) > 1 else ""
    names = f"{{{names}}}" if several else names
    cute.arch.inline_ptx(f"{how}{several}.f32 [{{$r0}}], {names};", read_only_args=[into.toint(), *values], predicate=where)


def converted(acc: cute.Tensor, dtype) -> cute.Tensor:
    """A copy of an fp32 fragment in the output's dtype, in the same layout."""
    out = cute.make_rmem_tensor_like(acc, dtype)
    out.store(acc.load().to(dtype))
    return out
