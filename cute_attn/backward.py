"""The backward pass on the host: what is compiled is three kernels, which follow one another on a stream, or the last of
which begins beside the second.

1. :class:`RowValues`: for each query row, delta = Σ_c dO_c · O_c − dLSE, once for all key tiles that will read it, beside its
   log-sum-exp; it also clears the memory in which dQ is added up, or in which is counted who adds to it.
2. the mainloop's ``Backward``: dK, dV, and dQ in float32; of most wide heads, by another kernel, dQ as it is to be.
3. :class:`CastQueries`: dQ scaled and rounded to the inputs' dtype, each query tile once nothing is added to it any more.

Mathematics, with P = exp(S − LSE) recomputed tile by tile (FlashAttention, arXiv:2205.14135, §B.2; the gradient of the
log-sum-exp enters through delta, since ∂LSE_i / ∂S_ij = P_ij):

    dV = Pᵀ·dO,   dP = dO·Vᵀ,   dS = P ∘ (dP − delta),   dQ = scale · dS·K,   dK = scale · dSᵀ·Q
"""

from __future__ import annotations

import importlib

import cutlass
from cutlass import Int32, cute

from cute_attn.cast_queries import CastQueries
from cute_attn.fields import BACKWARD, has_sums, named, sizes_of_sums
from cute_attn.forward import captured_of, heads_apart, rows_first, select_modes, sequences_of
from cute_attn.layouts.base import row_padding
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Signals, Values
from cute_attn.row_values import RowValues
from cute_attn.scheduler import Tiles, write_zeros


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.BACKWARD`'s values to compile."""
    mainloop = importlib.import_module(f"cute_attn.mainloop.{config.backward}").Backward(problem, config)
    row_values, cast = RowValues(problem, config), CastQueries(problem, config)

    @cute.jit
    def backward(*arguments):
        given = named(BACKWARD, arguments)
        operands = (given.q, given.k, given.v, given.out, given.dout, given.dq, given.dk, given.dv)
        q, k, v, o, do, dq, dk, dv = (heads_apart(m, problem, given.heads_first) for m in operands)
        lse, dlse = (rows_first(m, problem) for m in (given.lse_raw, given.dlse))
        dq_sum = _sums_behind(given.rows, problem, config)
        rows = Rows(*(select_modes(given.rows, [0, 3, 2, 1])[i, None, None, None] for i in range(2)))  # (rows, heads, batch)
        seqlen_q, seqlen_k = q.shape[0], k.shape[0]
        sequences = sequences_of(problem, q, k, given, row_padding(config))
        shift = seqlen_k - seqlen_q if cutlass.const_expr(sequences is None) else 0
        lo, hi = shift - given.left, shift + given.right
        if cutlass.const_expr(problem.bounded_left and sequences is None and not problem.has_places):
            # Keys before the first that any query sees don't exist here: key tiles begin at multiples of tile_n, and would
            # read them otherwise. Their gradients are zeroed on the host. (Of ragged sequences, and where what is
            # computed depends on positions, they are tiles that no query sees.)
            unseen = cutlass.max(lo, 0)
            k, v, dk, dv = (_rows_from(m, unseen) for m in (k, v, dk, dv))
            seqlen_k, lo, hi = seqlen_k - unseen, lo - unseen, hi - unseen
        names = "of_captured", "seed", "drop_below", "kept_scale", "key_lists", "query_lists", "ranks", "visits"
        others = {name: getattr(given, name) for name in names}
        values = Values(seqlen_q, seqlen_k, lo, hi, given.scale_log2, given.scale_by_cap, captured_of(problem, given), **others)
        # Where dQ is added in a fixed order heads are taken in groups, too: fewer key tiles of one then wait for one another.
        long_first = problem.unequal or problem.deterministic
        heads_per_kv = q.shape[2] // k.shape[2]
        tiles = Tiles.of(k.shape, heads_per_kv, config.tile_n, given.blocks, long_first, sequences, of_k=True)
        gradients = Gradients(dq if dq_sum is None else dq_sum, dk, dv, dq if cutlass.const_expr(cast.leaves_unused) else None)
        padded, heads, batch = rows.delta.shape
        signals = Signals.of(given.signals, padded // config.tile_m, heads, batch, row_values.clears)
        if cutlass.const_expr(signals is not None and not row_values.clears):
            write_zeros(signals.words, given.stream)

        of_ramp = values if cutlass.const_expr(problem.expression.ramp is not None) else None
        row_values.launch(q, o, do, lse, dlse, rows, dq_sum, signals, sequences, of_ramp, given.stream)
        taken = mainloop.launch(Inputs(q, k, v, do), rows, gradients, signals, values, tiles, given.blocks, given.stream)
        if cutlass.const_expr(dq_sum is not None):
            cast.launch(dq_sum, dq, values, signals, sequences, taken, given.blocks, given.stream)

    return backward


@cute.jit
def _sums_behind(rows: cute.Tensor, problem: cutlass.Constexpr, config: cutlass.Constexpr) -> cute.Tensor | None:
    """dQ's sums, ``(values, piece, m_block, heads, batch)``, which lie behind two values of each row."""
    if cutlass.const_expr(not has_sums(problem, config)):
        return None
    (_, batch, heads, padded), (values, pieces) = rows.shape, sizes_of_sums(config)
    m_blocks, of_block = padded // config.tile_m, values * pieces
    of_head = cutlass.Int64(m_blocks) * of_block
    strides = (cute.assume(x, of_block) for x in (cutlass.Int64(of_block), of_head, of_head * heads))
    layout = cute.make_layout((values, pieces, m_blocks, heads, batch), stride=(1, values, *strides))
    return cute.make_tensor(rows[2, None, None, None].iterator, layout)


def _rows_from(m: cute.Tensor | None, first: Int32) -> cute.Tensor | None:
    """``(seqlen, head_dim, heads, batch)`` from row ``first`` on."""
    if m is None:
        return None
    shape = (m.shape[0] - first, *m.shape[1:])
    return cute.make_tensor(cute.domain_offset((first, 0, 0, 0), m).iterator, cute.make_layout(shape, stride=m.stride))
