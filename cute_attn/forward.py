"""The forward pass on the host: torch's tensors in CuTe's view, the run-time values, the grid; then the mainloop's kernel."""

from __future__ import annotations

import importlib
from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute import runtime

from cute_attn.layouts.base import element
from cute_attn.lengths import NAMES
from cute_attn.mainloop.common import Values
from cute_attn.plan import takes_tickets
from cute_attn.scheduler import Tickets, Tiles
from cute_attn.sequences import Sequences, Side
from cute_attn.softmax import LogSumExp


def host_function(problem, config, mainloop=None):
    """The function to compile: ``(mQ, mK, mV, mO, mLSE, mLSE_raw, mTickets, lengths, left, right, scale_log2, scale_by_cap,
    blocks, stream)``.

    Tensors come as torch holds them, ``(batch, seqlen, heads, head_dim)``, the log-sum-exp, natural and in raw units, as
    ``(batch, heads, seqlen_q)``, those of ragged sequences without a batch; ``mTickets`` is int32
    (:class:`~cute_attn.scheduler.Tickets`); ``lengths`` are those of ragged sequences, see :func:`sequences_of`. What isn't
    asked for is ``None``.

    ``mainloop`` takes the place of the mechanism's own ``Forward``: the benchmarks leave stages out of it.
    """
    if mainloop is None:
        mainloop = importlib.import_module(f"cute_attn.mainloop.{config.mechanism}").Forward(problem, config)

    @cute.jit
    def forward(
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE,
        mLSE_raw,
        mTickets,
        mCuQ,
        mCuK,
        mUsedQ,
        mUsedK,
        count: Int32,
        left: Int32,
        right: Int32,
        scale_log2: Float32,
        scale_by_cap: Float32,
        blocks: Int32,
        stream,
    ):
        q, k, v, o = (heads_apart(m, problem) for m in (mQ, mK, mV, mO))  # (seqlen, head_dim, heads, batch)
        lse = LogSumExp(*(rows_first(m, problem) for m in (mLSE, mLSE_raw)))  # (seqlen_q, heads, batch)
        seqlen_q, seqlen_k = q.shape[0], k.shape[0]
        sequences = sequences_of(problem, q, k, (mCuQ, mCuK, mUsedQ, mUsedK), count)
        shift = seqlen_k - seqlen_q if cutlass.const_expr(sequences is None) else 0
        values = Values(seqlen_q, seqlen_k, shift - left, shift + right, scale_log2, scale_by_cap)
        heads_per_kv = q.shape[2] // k.shape[2]
        tiles = Tiles.of(q.shape, heads_per_kv, config.tile_m, blocks, problem.bounded_right, sequences)
        if cutlass.const_expr(mTickets is not None):
            tiles = replace(tiles, tickets=Tickets(mTickets))
            tiles.tickets.reset(stream)
        mainloop.launch(q, k, v, o, lse, values, tiles, blocks, stream)

    return forward


def sequences_of(problem, q: cute.Tensor, k: cute.Tensor, lengths: tuple, count: Int32) -> Sequences | None:
    """Where ``count`` ragged sequences lie in q and k ``(rows, …)``, from ``lengths`` = (cu_seqlens_q, cu_seqlens_k, seqused_q,
    seqused_k), which may be ``None``: rows are equally many for each sequence then, and all in use."""
    if not problem.ragged:
        return None
    cu_q, cu_k, used_q, used_k = lengths
    rows_q, rows_k, each = q.shape[0], k.shape[0], cutlass.max(count, 1)
    return Sequences(count, Side(rows_q, rows_q // each, cu_q, used_q), Side(rows_k, rows_k // each, cu_k, used_k))


def fake_lengths(problem) -> tuple:
    """Stand-ins for :func:`sequences_of`'s lengths, and their count."""

    def vector(asked):
        return runtime.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4) if asked else None

    return *(vector(name in problem.ragged) for name in NAMES), Int32(0)


def heads_apart(m: cute.Tensor | None, problem) -> cute.Tensor | None:
    """``(batch, seqlen, heads, head_dim)``, of ragged sequences without a batch, as ``(seqlen, head_dim, heads, batch)``."""
    return select_modes(m, [0, 2, 1, None] if problem.ragged else [1, 3, 2, 0])


def rows_first(m: cute.Tensor | None, problem) -> cute.Tensor | None:
    """``(batch, heads, seqlen)``, of ragged sequences without a batch, as ``(seqlen, heads, batch)``."""
    return select_modes(m, [1, 0, None] if problem.ragged else [2, 1, 0])


def select_modes(m: cute.Tensor | None, modes: list) -> cute.Tensor | None:
    """The same memory with its modes in another order, and one of size 1 for a ``None`` at the end; ``None`` stays ``None``."""
    if m is None:
        return None
    layout = cute.select(m.layout, mode=[mode for mode in modes if mode is not None])
    if modes[-1] is None:
        layout = cute.make_layout((*layout.shape, 1), stride=(*layout.stride, 0))
    return cute.make_tensor(m.iterator, layout)


def fake_operand(problem, asked: bool = True):
    """A stand-in for a tensor of the inputs' dtype, as torch holds it, with every size and stride unknown. Strides are 64-bit,
    so that offsets past 2³¹ elements are exact, and multiples of 16 bytes but for the contiguous one."""
    outer = range(2 if problem.ragged else 3)
    shape = (*(cute.sym_int() for _ in outer), cute.sym_int(divisibility=8))
    stride = (*(cute.sym_int64(divisibility=8) for _ in outer), 1)
    return runtime.make_fake_tensor(element(problem), shape, stride, assumed_align=16) if asked else None


def fake_row_values(problem, asked: bool = True):
    """The same for a float32 of each row."""
    outer = range(1 if problem.ragged else 2)
    shape = (*(cute.sym_int() for _ in outer), cute.sym_int())
    stride = (*(cute.sym_int64() for _ in outer), 1)
    return runtime.make_fake_tensor(Float32, shape, stride, assumed_align=4) if asked else None


def fake_arguments(problem, config) -> tuple:
    """Stand-ins for :func:`host_function`'s arguments: the kernel fits all of them."""
    numbers = (Int32(0), Int32(0), Float32(0.0), Float32(0.0), Int32(0))
    lse = (fake_row_values(problem, asked) for asked in (problem.return_lse, problem.for_backward))
    tickets = None
    if takes_tickets(problem, config):
        tickets = runtime.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    tensors = (*(fake_operand(problem) for _ in range(4)), *lse, tickets)
    return (*tensors, *fake_lengths(problem), *numbers, runtime.make_fake_stream())
