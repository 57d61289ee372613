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
    ``(batch, heads, seqlen_q)``; ``mTickets`` is int32 (:class:`~cute_attn.scheduler.Tickets`); ``lengths`` are those of ragged
    sequences, see :func:`sequences_of`. What isn't asked for is ``None``.
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
        q, k, v, o = (select_modes(m, [1, 3, 2, 0]) for m in (mQ, mK, mV, mO))  # (seqlen, head_dim, heads, batch)
        lse = LogSumExp(*(select_modes(m, [2, 1, 0]) for m in (mLSE, mLSE_raw)))  # (seqlen_q, heads, batch)
        seqlen_q, seqlen_k = q.shape[0], k.shape[0]
        sequences = sequences_of(problem, q, k, (mCuQ, mCuK, mUsedQ, mUsedK), count)
        shift = seqlen_k - seqlen_q if cutlass.const_expr(sequences is None) else 0
        values = Values(seqlen_q, seqlen_k, shift - left, shift + right, scale_log2, scale_by_cap)
        heads_per_kv = q.shape[2] // k.shape[2]
        tiles = Tiles.of(q.shape, heads_per_kv, config.tile_m, blocks, problem.bounded_right, sequences)
        if cutlass.const_expr(mTickets is not None):
            tiles = replace(tiles, tickets=Tickets(mTickets))
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


def select_modes(m: cute.Tensor | None, modes: list[int]) -> cute.Tensor | None:
    """The same memory with its modes in another order; ``None`` stays ``None``."""
    return None if m is None else cute.make_tensor(m.iterator, cute.select(m.layout, mode=modes))


def fake_arguments(problem, config) -> tuple:
    """Stand-ins for :func:`host_function`'s arguments, with every size and stride unknown: the kernel fits all of them.

    Strides are 64-bit, so that offsets past 2³¹ elements are exact, and multiples of 16 bytes but for the contiguous one.
    """
    dtype = element(problem)

    def tensor():
        shape = (*(cute.sym_int() for _ in range(3)), cute.sym_int(divisibility=8))
        stride = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
        return runtime.make_fake_tensor(dtype, shape, stride, assumed_align=16)

    def vectors(asked):
        shape = tuple(cute.sym_int() for _ in range(3))
        stride = (cute.sym_int64(), cute.sym_int64(), 1)
        return runtime.make_fake_tensor(Float32, shape, stride, assumed_align=4) if asked else None

    numbers = (Int32(0), Int32(0), Float32(0.0), Float32(0.0), Int32(0))
    tensors = (*(tensor() for _ in range(4)), vectors(problem.return_lse), vectors(problem.for_backward))
    tickets = None
    if takes_tickets(problem, config):
        tickets = runtime.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    return (*tensors, tickets, *fake_lengths(problem), *numbers, runtime.make_fake_stream())
