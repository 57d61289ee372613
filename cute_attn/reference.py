"""Tiled online softmax in plain torch: the specification of the kernels, and the backend where there is no GPU.

The score matrix never exists as a whole. Each tile of ``tile_m`` queries walks over its tiles of ``tile_n`` keys and
keeps three things a row: the running maximum m, the running sum l and the unnormalised output O. With scores s in base
2 (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135) a tile turns them into

    m' = max(m, max_j s_j),   a = 2^(m − m'),   p_j = 2^(s_j − m'),   l' = a·l + Σ_j p_j,   O' = a·O + Σ_j p_j·v_j

and after the last tile O / l is the output and ln 2 · (m + log2 l) the log-sum-exp. All (batch, head) pairs take a step
at once; a kernel gives each of them a block of its own.
"""

from __future__ import annotations

import torch

from cute_attn.problem import Call
from cute_attn.rules import LN_2, Band, HostOps, TensorOps, score_scales, softcap_tanh


def attention(q, k, v, call: Call, *, tile_m: int = 128, tile_n: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(rules(q kᵀ · scale)) v`` for a call that ``problem.check_call`` has checked; returns ``(out, lse)``.

    q is (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (batch, seqlen_k, heads_kv,
    head_dim_v); query head h reads key head h // (heads / heads_kv). ``out`` is (batch, seqlen_q, heads, head_dim_v) in
    the inputs' dtype; ``lse`` is (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs).

    Products are summed in lse's dtype and P is rounded to the inputs' dtype before P·V, as tensor cores take it. A row
    that sees no key gives zeros and −inf. Keys that no row of a query tile sees are not read: NaN there changes
    nothing. Nothing is written in place, so that autograd works through it.
    """
    acc_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if call.empty:
        # An empty sum is 0 and ties the zeros to the graph: backward() works here as for any other size.
        zero = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
        out = zero.expand(call.batch, call.seqlen_q, call.heads, call.head_dim_v).contiguous()
        return out, torch.full((call.batch, call.heads, call.seqlen_q), -torch.inf, dtype=acc_dtype, device=q.device)

    mQ = q.unflatten(2, (call.heads_kv, call.heads // call.heads_kv))  # (batch, seqlen_q, heads_kv, group, head_dim)
    out_tiles, lse_tiles = [], []
    for m in range(0, call.seqlen_q, tile_m):
        out, lse = _query_tile(mQ[:, m : m + tile_m].to(acc_dtype), k, v, m, tile_n, call)
        out_tiles.append(out.to(q.dtype))
        lse_tiles.append(lse)
    out = torch.cat(out_tiles, dim=3)  # (batch, heads_kv, group, seqlen_q, head_dim_v)
    lse = torch.cat(lse_tiles, dim=3)  # (batch, heads_kv, group, seqlen_q)
    return out.flatten(1, 2).transpose(1, 2).contiguous(), lse.flatten(1, 2)


def _query_tile(tQ, k, v, m: int, tile_n: int, call: Call):
    """The output and the log-sum-exp of the query tile tQ (batch, rows, heads_kv, group, head_dim) from row m on."""
    scale_log2, scale_by_cap = score_scales(call.scale, call.softcap)
    band = _band(call)
    row_last = m + tQ.shape[1] - 1
    begin, end = band.key_range(m, row_last, call.seqlen_k, HostOps)
    whole_begin, whole_end = band.whole_range(m, row_last, call.seqlen_k, HostOps)

    batch, rows, heads_kv, group, _ = tQ.shape
    acc_O = tQ.new_zeros(batch, heads_kv, group, rows, call.head_dim_v)
    row_max = tQ.new_full((batch, heads_kv, group, rows), -torch.inf)
    row_sum = tQ.new_zeros(batch, heads_kv, group, rows)
    # Tiles begin at the first key that any row sees and go from the last to the first: the masked end comes first.
    for n in reversed(range(begin, end, tile_n)):
        n_end = min(n + tile_n, end)
        tK, tV = k[:, n:n_end].to(tQ.dtype), v[:, n:n_end].to(tQ.dtype)  # (batch, keys, heads_kv, head_dim)
        acc_S = torch.einsum("bmhgd,bnhd->bhgmn", tQ, tK)
        if call.softcap > 0.0:
            acc_S = softcap_tanh(acc_S, scale_by_cap, TensorOps)
        acc_S = acc_S * scale_log2
        if n < whole_begin or n_end > whole_end:
            acc_S = acc_S.masked_fill(~_visible(band, m, row_last, n, n_end, call.seqlen_k, acc_S.device), -torch.inf)
        P, rescale, row_max, row_sum = _online_step(acc_S, row_max, row_sum)
        P = P.to(v.dtype).to(tQ.dtype)
        acc_O = acc_O * rescale[..., None] + torch.einsum("bhgmn,bnhd->bhgmd", P, tV)

    seen = row_sum != 0.0  # true for NaN: a NaN in q or in a visible key shows
    safe_sum = torch.where(seen, row_sum, 1.0)
    lse = torch.where(seen, (row_max + safe_sum.log2()) * LN_2, -torch.inf)
    return acc_O / safe_sum[..., None], lse


def _online_step(scores, row_max, row_sum):
    """One tile of base-2 scores (…, rows, keys): returns (P, rescale, row_max, row_sum)."""
    # Results don't depend on the maximum (it cancels), so no gradient flows through it.
    new_max = torch.maximum(row_max, scores.detach().amax(-1))
    # A row that has seen no key yet has m = −inf; 0 in its place keeps −inf − −inf from making a NaN.
    anchor = torch.where(new_max == -torch.inf, 0.0, new_max)
    P = (scores - anchor[..., None]).exp2()
    rescale = (row_max - anchor).exp2()
    return P, rescale, new_max, row_sum * rescale + P.sum(-1)


def _band(call: Call) -> Band:
    lo = None if call.left is None else call.shift - call.left
    hi = None if call.right is None else call.shift + call.right
    return Band(lo, hi)


def _visible(band: Band, row_first: int, row_last: int, key_first: int, key_end: int, seqlen_k: int, device):
    """What the rows row_first … row_last see of the keys key_first … key_end − 1: bool, (rows, keys)."""
    row = torch.arange(row_first, row_last + 1, device=device)[:, None]
    col = torch.arange(key_first, key_end, device=device)
    begin, end = band.key_range(row, row, seqlen_k, TensorOps)
    return (begin <= col) & (col < end)
