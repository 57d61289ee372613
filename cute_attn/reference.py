"""Tiled online softmax in plain torch: the specification of the kernels, and the backend where there is no GPU.

The score matrix never exists as a whole. Each tile of ``tile_m`` queries walks over its tiles of ``tile_n`` keys and
keeps three things a row: the running maximum m, the running sum l and the unnormalised output O. With scores s in base
2 (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135) a tile turns them into

    m' = max(m, max_j s_j),   a = 2^(m − m'),   p_j = 2^(s_j − m'),   l' = a·l + Σ_j p_j,   O' = a·O + Σ_j p_j·v_j

and after the last tile O / l is the output and ln 2 · (m + log2 l) the log-sum-exp. All (batch, head) pairs take a step
at once; a kernel gives each of them a block of its own.

The backward pass (FlashAttention-2, arXiv:2307.08691, algorithm 2) recomputes the scores: the log-sum-exp turns them into
the softmax P itself, without another pass over the keys. With dO and dLSE the gradients of O and of the log-sum-exp,

    dP = dO·Vᵀ,   delta_i = Σ_d dO_id·O_id − dLSE_i,   dS = P ∘ (dP − delta),
    dV = Pᵀ·dO,   dK = scale · dSᵀ·Q,   dQ = scale · dS·K,

where a softcap multiplies dS by its slope. Each tile of keys walks over the tiles of queries that see any of it: its dK and
dV are sums that stay with it, dQ is added to in memory.

**What a user's functions make of scores** (``expressions.py``) comes after the softcap: s' = score(s) of the scaled score s,
and dS is multiplied by ds'/ds. A captured tensor's gradient is Σ dS' · ∂s'/∂t, where dS' = P ∘ (dP − delta); autograd adds it
up tile by tile.

**Dropout** (``dropout.py``): P·V takes m ∘ P / (1 − p), and so do dV, and dP = m ∘ (dO·Vᵀ) / (1 − p); delta is what it was.

**Sinks.** One more logit z_h in the softmax of every row that sees a key: l = Σ_j exp(s_j) + exp(z_h). Nothing but l, and so
the log-sum-exp, knows of it; P = exp(s − lse) has it in the backward pass. Its own weight p = exp(z_h − lse) has no value, so
that ∂out/∂z = −p · out and ∂lse/∂z = p, and with dO·O − dLSE = delta

    dz_h = −Σ_i p_i · delta_i,   over all rows i of head h.

Ragged sequences are taken one after another, each as a batch of its own. So are those whose keys lie in a cache; the rows of
each are gathered first, once the new ones are in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cute_attn import autocast
from cute_attn.dropout import kept, kept_scale
from cute_attn.expressions import TorchOps
from cute_attn.lengths import Lengths
from cute_attn.problem import Call, exact_dtype
from cute_attn.rules import LN_2, LOG2_E, Band, HostOps, TensorOps, score_scales, softcap_slope, softcap_tanh
from cute_attn.stored import Stored


@autocast.outside
def attention(q, k, v, call: Call, *, tile_m: int = 128, tile_n: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``softmax(rules(q kᵀ · scale)) v`` for a call that ``problem.check_call`` has checked; returns ``(out, lse, lse_log2)``.

    q is (batch, seqlen_q, heads, head_dim), k (batch, seqlen_k, heads_kv, head_dim), v (batch, seqlen_k, heads_kv,
    head_dim_v); query head h reads key head h // (heads / heads_kv). ``out`` is (batch, seqlen_q, heads, head_dim_v) in
    the inputs' dtype; ``lse`` is (batch, heads, seqlen_q), natural logarithm, float32 (float64 for float64 inputs);
    ``lse_log2`` is the same in base 2, which :func:`gradients` takes. Of ragged sequences none of these has a batch.

    Products are summed in lse's dtype and P is rounded to the inputs' dtype before P·V, as tensor cores take it. A row
    that sees no key gives zeros and −inf. A row depends on the keys that it sees and on no others, whatever lies there.
    Where there is a mask, a value that is not finite makes NaN of all of a row that sees it. Rows of no ragged sequence, or not
    in use, are zeros and −inf, too, and nothing looks at them.
    """
    acc_dtype = exact_dtype(q.dtype)
    *batch, seqlen_q, heads, _ = q.shape
    out = q.new_zeros(*batch, seqlen_q, heads, call.head_dim_v)
    lse_log2 = q.new_full((*batch, heads, seqlen_q), -torch.inf, dtype=acc_dtype)
    if call.empty:
        return out, lse_log2 * LN_2, lse_log2
    if call.lengths is not None:
        for rows, keys, one in _sequences(call):
            results = attention(q[None, rows], k[None, keys], v[None, keys], one, tile_m=tile_m, tile_n=tile_n)
            out[None, rows], _, lse_log2[None, :, rows] = results
        return out, lse_log2 * LN_2, lse_log2
    mQ, mO = _grouped(q, call), _grouped(out, call)  # (batch, seqlen_q, heads_kv, group, head_dim)
    mLSE = _grouped(lse_log2.transpose(1, 2), call)  # (batch, seqlen_q, heads_kv, group)
    for m in range(0, call.seqlen_q, tile_m):
        rows = slice(m, m + tile_m)
        mO[:, rows], mLSE[:, rows] = _query_tile(mQ[:, rows].to(acc_dtype), k, v, m, tile_n, call)
    return out, lse_log2 * LN_2, lse_log2


def _query_tile(tQ, k, v, m: int, tile_n: int, call: Call):
    """The output and the log-sum-exp in base 2 of the query tile tQ (batch, rows, heads_kv, group, head_dim) from row m on."""
    batch, rows, heads_kv, group, _ = tQ.shape
    acc_O = tQ.new_zeros(batch, rows, heads_kv, group, call.head_dim_v)
    row_max = tQ.new_full((batch, rows, heads_kv, group), -torch.inf)
    row_sum = tQ.new_zeros(batch, rows, heads_kv, group)
    begin, end = _band(call).key_range(m, m + rows - 1, call.seqlen_k, HostOps)
    # Tiles begin at the first key that any row sees and go from the last to the first: the masked end comes first.
    for n in reversed(range(begin, end, tile_n)):
        n_end = min(n + tile_n, end)
        tK, tV = k[:, n:n_end].to(tQ.dtype), v[:, n:n_end].to(tQ.dtype)  # (batch, keys, heads_kv, head_dim)
        if call.masked:  # a value that is not finite must not meet the 0 of a row that doesn't see it
            bad = ~tV.isfinite().all(-1, keepdim=True)
            tK, tV = tK.masked_fill(bad, torch.nan), tV.masked_fill(bad, 0.0)
        acc_S, _ = _scores(tQ, tK, m, n, call)
        P, rescale, row_max, row_sum = _online_step(acc_S, row_max, row_sum)
        P = P.to(v.dtype).to(tQ.dtype)
        if call.seed is not None:
            P = P.where(_kept(call, P, m, n), 0.0)
        acc_O = acc_O * rescale[..., None] + torch.einsum("bmhgn,bnhd->bmhgd", P, tV)

    seen = row_sum != 0.0  # true for NaN: a NaN in q or in a visible key shows
    safe_sum = torch.where(seen, row_sum, 1.0)
    acc_O = acc_O / safe_sum[..., None] * kept_scale(call.dropout)
    lse_log2 = row_max.where(seen, 0.0) + safe_sum.log2()  # not yet −∞, of which a sink of −∞ would make a NaN
    if call.sinks is not None:
        without = lse_log2
        lse_log2 = torch.logaddexp2(without, call.sinks.to(tQ.dtype).view(heads_kv, group) * LOG2_E)
        acc_O = acc_O * (without - lse_log2).exp2()[..., None]
    return acc_O, torch.where(seen, lse_log2, -torch.inf)


@autocast.outside
def gradients(q, k, v, out, lse_log2, dout, dlse, call: Call, needs: str = "qkv", *, tile_m: int = 128, tile_n: int = 128):
    """``(dq, dk, dv)``, and, where there are sinks or captured tensors, theirs: the gradients from those of :func:`attention`'s
    outputs; None for what the string ``needs`` does not name, or requires none. ``dlse`` may be None, for zeros.

    Each has the shape and dtype of its input; a key head's are sums over the query heads that read it. Products are summed
    in lse_log2's dtype, and P and dS are rounded to the inputs' dtype before they are multiplied, as tensor cores take them. A
    row that sees no key, or a key that no row sees, has zeros; so has what is in no ragged sequence, or not in use.
    """
    of_others: list = [  # in which gradients are added up
        torch.zeros_like(x, dtype=torch.promote_types(x.dtype, lse_log2.dtype), requires_grad=False)
        if x is not None and x.requires_grad else None
        for x in call.others
    ]  # fmt: skip
    captures = bool(call.expression) and bool(call.expression.partials)
    if call.lengths is not None:
        found = tuple(x.new_zeros(x.shape) if name in needs else None for name, x in zip("qkv", (q, k, v), strict=True))
        for rows, keys, one in _sequences(call):
            kept, of_lse = lse_log2[None, :, rows], None if dlse is None else dlse[None, :, rows]
            tensors = q[None, rows], k[None, keys], v[None, keys], out[None, rows], kept, dout[None, rows], of_lse
            parts = gradients(*tensors, one, needs, tile_m=tile_m, tile_n=tile_n)
            for dx, part, where in zip(found, parts, (rows, keys, keys), strict=False):
                if dx is not None:
                    dx[None, where] = part
            for i, part in enumerate(parts[3:]):
                of_others[i] = part if of_others[i] is None else of_others[i] + part
        return *found, *_as_others(of_others, call)
    dtype, acc_dtype = q.dtype, lse_log2.dtype
    dq, dk, dv = (
        x.new_zeros(x.shape, dtype=acc_dtype) if name in needs else None for name, x in zip("qkv", (q, k, v), strict=True)
    )
    delta = (dout.to(acc_dtype) * out).sum(-1)  # (batch, seqlen_q, heads)
    if dlse is not None:
        delta = delta - dlse.transpose(1, 2)
    lse_log2 = lse_log2.transpose(1, 2)
    unseen = lse_log2 == -torch.inf
    # 2^(s − ∞) = 0 for every score, where s = lse = −∞ would make a NaN; nor does dLSE count in a row that sees nothing.
    delta, lse_log2 = delta.masked_fill(unseen, 0.0), lse_log2.masked_fill(unseen, torch.inf)
    if of_others and call.sinks is not None and of_others[0] is not None:
        weight = (call.sinks.to(acc_dtype) * LOG2_E - lse_log2).exp2()
        of_others[0] = -(weight * delta).sum((0, 1))

    k_of_dq = k
    if call.masked:
        q, k_of_dq, v, dout, lse_log2, delta = _marked(q, k, v, dout, lse_log2, delta)
    band = _band(call)
    mQ, mdO, delta, lse_log2 = (_grouped(x, call) for x in (q, dout, delta, lse_log2))
    mdQ = None if dq is None else _grouped(dq, call)
    first, last = band.key_range(0, call.seqlen_q - 1, call.seqlen_k, HostOps)
    for n_tile in range(first, last, tile_n):
        n_last = min(n_tile + tile_n, last) - 1
        m_begin, m_end = band.transposed().key_range(n_tile, n_last, call.seqlen_q, HostOps)
        for m in range(m_begin, m_end, tile_m):
            rows = slice(m, min(m + tile_m, m_end))
            # Of the key tile, what the query tile sees.
            begin, end = band.key_range(m, rows.stop - 1, call.seqlen_k, HostOps)
            keys = slice(max(n_tile, begin), min(n_last + 1, end))
            tQ, tdO = mQ[:, rows].to(acc_dtype), mdO[:, rows].to(acc_dtype)
            tK, tV = k[:, keys].to(acc_dtype), v[:, keys].to(acc_dtype)  # scores have K as it is: −∞ there weighs 0
            acc_S, slope = _scores(tQ, tK, m, keys.start, call)
            P = kept_P = (acc_S - lse_log2[:, rows, ..., None]).exp2()
            if call.seed is not None:
                weight = _kept(call, P, m, keys.start) * kept_scale(call.dropout)
                kept_P = P * weight
            if dv is not None:
                dv[:, keys] += torch.einsum("bmhgn,bmhgd->bnhd", kept_P.to(dtype).to(acc_dtype), tdO)
            if needs in ("", "v") and not captures:
                continue
            acc_dP = torch.einsum("bmhgd,bnhd->bmhgn", tdO, tV)
            if call.seed is not None:
                acc_dP = acc_dP * weight
            dS = P * (acc_dP - delta[:, rows, ..., None])
            if captures:
                _add_of_captured(of_others[1:], dS, acc_S, tQ, tK, m, keys.start, call)
            dS = (dS * slope).to(dtype).to(acc_dtype)
            if dk is not None:
                dk[:, keys] += torch.einsum("bmhgn,bmhgd->bnhd", dS, tQ) * call.scale
            if mdQ is not None:
                mdQ[:, rows] += torch.einsum("bmhgn,bnhd->bmhgd", dS, k_of_dq[:, keys].to(acc_dtype)) * call.scale
    return *(None if dx is None else dx.to(dtype) for dx in (dq, dk, dv)), *_as_others(of_others, call)


def _as_others(found: list, call: Call) -> tuple:
    """Gradients of sinks and captured tensors, in the dtypes of these."""
    return tuple(dx if x is None or dx is None else dx.to(x.dtype) for dx, x in zip(found, call.others, strict=True))


def _add_of_captured(sums: list, dS, acc_S, tQ, tK, m: int, n: int, call: Call) -> None:
    """Add to the sums of the captured tensors that have one what a tile's gradients of changed scores make of them."""
    given, _, scale_log2 = _given(tQ, tK, call)
    value = _computed(call, given * (scale_log2 * LN_2), m, n)
    for by in call.expression.partials:
        total = sums[call.expression.nodes[by.load][2]]
        part = dS if by.slope is None else dS * value(by.slope)
        part = part.masked_fill(acc_S == -torch.inf, 0.0).to(total.dtype)  # a slope there may be anything
        places = call.expression.indices(by.load, **value.keywords)
        if places:
            where = torch.broadcast_tensors(*(i.clamp(0, n - 1) for (i, _), n in zip(places, total.shape, strict=True)))
            total.index_put_(where, part.sum_to_size(where[0].shape), accumulate=True)
        else:
            total += part.sum()


def _sequences(call: Call) -> Iterator[tuple[slice, slice, Call]]:
    """Of each ragged sequence its rows of q, those of k, and the call that it is by itself."""
    lengths, call = call.lengths, replace(call, lengths=None)
    assert lengths is not None
    sides = zip(lengths.in_use(0, call.seqlen_q), lengths.in_use(1, call.seqlen_k), strict=True)
    for i, (rows, keys) in enumerate(sides):
        yield rows, keys, replace(call, seqlen_q=rows.stop - rows.start, seqlen_k=keys.stop - keys.start, sequence=i)


def _marked(q, k, v, dout, lse_log2, delta):
    """The same tensors, without what is not finite, where some rows see a key and others don't (``mainloop/guard.py``): P is
    infinite where a row with an infinity or a NaN sees a key, and ∞ · 0 = NaN; where it sees none, 0 · 0 = 0."""
    row = lse_log2.isnan() | ~delta.isfinite()  # (batch, seqlen_q, heads)
    for x in (q, dout):
        row |= ~x.isfinite().all(-1)
    key = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    q, dout = (x.masked_fill(row[..., None], 0.0) for x in (q, dout))
    k, v = (x.masked_fill(key[..., None], 0.0) for x in (k, v))
    lowest = torch.finfo(lse_log2.dtype).min
    return q, k, v, dout, lse_log2.masked_fill(row, lowest), delta.masked_fill(row, 0.0)


def _scores(tQ, tK, m: int, n: int, call: Call):
    """The scores in base 2 (batch, rows, heads_kv, group, keys) of rows from m on and keys from n on, −inf where a row
    does not see the key; and the slope of the softcap and of a function there, or 1."""
    rows, keys = tQ.shape[1], tK.shape[1]
    acc_S, slope, scale_log2 = _given(tQ, tK, call)
    value = _computed(call, acc_S * (scale_log2 * LN_2), m, n) if call.expression else None
    if value and call.expression.score is not None:
        acc_S, scale_log2 = value(call.expression.score).expand(acc_S.shape), LOG2_E
        if call.expression.slope is not None:
            slope = slope * value(call.expression.slope)
    acc_S = acc_S * scale_log2
    visible = None
    begin, end = _band(call).whole_range(m, m + rows - 1, call.seqlen_k, HostOps)
    if n < begin or n + keys > end:
        row = torch.arange(m, m + rows, device=tQ.device)[:, None]
        col = torch.arange(n, n + keys, device=tQ.device)
        begin, end = _band(call).key_range(row, row, call.seqlen_k, TensorOps)
        visible = ((begin <= col) & (col < end))[:, None, None]  # (rows, 1, 1, keys)
    if value and call.expression.mask is not None:
        seen = value(call.expression.mask)
        visible = seen if visible is None else seen & visible
    if visible is not None:
        acc_S = acc_S.masked_fill(~visible, -torch.inf)
        if isinstance(slope, torch.Tensor):  # of a NaN that a row does not see, too
            slope = torch.where(visible, slope, 0.0)
    return acc_S, slope


PASSES = attention, gradients  # as autograd.Attention calls them


@autocast.outside
def attention_kvcache(q, k_cache, v_cache, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a call that :func:`cute_attn.attention_kvcache` has checked, once the new keys and values are written
    into the cache. Whatever lengths and tables say, they are cut to what there is."""
    stored = call.stored
    assert stored is not None
    capacity = stored.capacity if k_cache.shape[0] else 0  # a table may name pages where there are none
    lengths = [min(max(n, 0), capacity) for n in stored.lengths.tolist()]
    pads = [0] * call.batch if stored.leftpad_k is None else stored.leftpad_k.tolist()
    keys = [range(min(max(pad, 0), n), n) for pad, n in zip(pads, lengths, strict=True)]
    queries = q if stored.packed else q.flatten(0, 1)
    if stored.k_new is not None:  # all of them are written before any is read: sequences may share pages
        queries, added = _append(queries, k_cache, v_cache, call, stored, lengths, capacity)
        keys = [range(old.start, old.stop + n) for old, n in zip(keys, added, strict=True)]
    out = q.new_zeros(len(queries), call.heads, call.head_dim_v)
    lse = q.new_full((call.heads, len(queries)), -torch.inf, dtype=exact_dtype(q.dtype))
    for i, rows in enumerate(_rows_of(stored.cu_seqlens_q, call.batch, queries)):
        where = _rows_of_cache(stored, i, keys[i], k_cache)
        tensors = queries[None, rows], k_cache[where][None], v_cache[where][None]
        one = replace(call, batch=1, seqlen_q=tensors[0].shape[1], seqlen_k=len(keys[i]), sequence=i, stored=None)
        out[None, rows], lse[None, :, rows], _ = attention(*tensors, one)
    if stored.packed:
        return out, lse
    return out.view(*q.shape[:-1], call.head_dim_v), lse.unflatten(1, (call.batch, call.seqlen_q)).transpose(0, 1).contiguous()


def _append(q, k_cache, v_cache, call: Call, stored: Stored, lengths: list[int], capacity: int) -> tuple:
    """Write the new keys and values behind those in the cache; ``(q, how many of each sequence)``, q turned as its keys are."""
    begins = lengths if stored.rotary_begin is None else stored.rotary_begin.tolist()
    tensors: Any = stored.k_new, stored.v_new
    k_new, v_new = (x if stored.packed else x.flatten(0, 1) for x in tensors)
    added = []
    for i, rows in enumerate(_rows_of(stored.cu_seqlens_k_new, call.batch, k_new)):
        k, v = _turned(k_new[rows], stored, begins[i]), v_new[rows]
        added.append(min(len(k), capacity - lengths[i]))
        where = _rows_of_cache(stored, i, range(lengths[i], lengths[i] + added[i]), k_cache)
        # As the kernels do, also what was made in inference mode, to which torch writes nowhere else.
        with torch.inference_mode() if k_cache.is_inference() or v_cache.is_inference() else nullcontext():
            k_cache[where], v_cache[where] = k[: added[i]], v[: added[i]]
    if stored.rotary is not None:
        q, step = q.clone(), int(call.bounded)
        for i, rows in enumerate(_rows_of(stored.cu_seqlens_q, call.batch, q)):
            q[rows] = _turned(q[rows], stored, begins[i], step)
    return q, added


def _rows_of(cu_seqlens, batch: int, x) -> list[slice]:
    """Which rows of ``x`` each sequence has."""
    return Lengths(batch, (cu_seqlens, None, None, None)).in_use(0, len(x))


def _rows_of_cache(stored: Stored, i: int, rows: range, cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Where some rows of sequence i lie in the cache: (element or page, row) of each."""
    row = torch.arange(rows.start, rows.stop, device=cache.device)
    last = cache.shape[0] - 1
    if stored.page_table is not None:
        size = stored.page_size
        return stored.page_table[i].long()[row // size].clamp(0, last), row % size
    element = i if stored.cache_batch_idx is None else min(max(int(stored.cache_batch_idx[i]), 0), last)
    return torch.full_like(row, element), row


def _turned(x, stored: Stored, begin: int, step: int = 1) -> torch.Tensor:
    """``x`` (rows, heads, head_dim) by the rotary tables' rows of its positions, from ``begin`` on, rounded once; as it is
    without tables."""
    if stored.rotary is None:
        return x
    dtype = exact_dtype(x.dtype)
    positions = begin + step * torch.arange(len(x), device=x.device)
    where = positions.clamp(0, stored.rotary[0].shape[0] - 1)
    cos, sin = (table[where][:, None].to(dtype) for table in stored.rotary)
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :]
    even, odd = (head[..., 0::2], head[..., 1::2]) if stored.rotary_interleaved else head.split(half, -1)
    pair = even * cos - odd * sin, even * sin + odd * cos
    turned = torch.stack(pair, -1).flatten(-2) if stored.rotary_interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, lse_more: torch.Tensor, to_log2: float) -> torch.Tensor:
    """Merge two partial results of the same rows, ``out`` and ``more`` (batch, rows, heads, head_dim_v), of other keys each:

        L = ln Σ_i exp L_i,      O = Σ_i exp(L_i − L) · O_i.

    Returns O in the dtype of the log-sum-exps (batch, heads, rows): ``out`` itself where that is its own; ``lse`` becomes L in
    place. ``to_log2`` times a log-sum-exp is in base 2; −∞ is that of a row that sees no key.
    """
    most = torch.maximum(lse, lse_more)
    anchor = most.masked_fill(most == -torch.inf, 0.0)  # −∞ − (−∞) would make a NaN
    weight, weight_more = (((x - anchor) * to_log2).exp2_() for x in (lse, lse_more))
    total = weight + weight_more
    lse.copy_(anchor + total.log2() / to_log2)
    total.masked_fill_(total == 0.0, 1.0)
    weight, weight_more = ((x / total).transpose(1, 2).unsqueeze(-1) for x in (weight, weight_more))
    scaled = out.mul_(weight) if out.dtype == lse.dtype else out * weight
    return scaled.addcmul_(more, weight_more)  # reads 16 bits and adds up in 32


def _given(tQ, tK, call: Call):
    """The scores before a function changes them, the slope of the softcap there, or 1, and the scale to base 2."""
    scale_log2, scale_by_cap = score_scales(call.scale, call.softcap)
    acc_S = torch.einsum("bmhgd,bnhd->bmhgn", tQ, tK)
    slope: torch.Tensor | float = 1.0
    if call.softcap > 0.0:
        acc_S = softcap_tanh(acc_S, scale_by_cap, TensorOps)
        slope = softcap_slope(acc_S)
    return acc_S, slope, scale_log2


def _places(call: Call, of: torch.Tensor, m: int, n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The positions of a tile ``(batch, rows, heads_kv, group, keys)`` from row m and key n on, which broadcast to it."""
    batch, rows, heads_kv, group, keys = of.shape

    def counted(first: int, *shape: int):
        return torch.arange(first, first + math.prod(shape), dtype=dtype, device=of.device).view(shape)

    return {
        "batch": counted(call.sequence, batch, 1, 1, 1, 1),
        "head": counted(0, 1, 1, heads_kv, group, 1),
        "q_idx": counted(m, 1, rows, 1, 1, 1),
        "kv_idx": counted(n, 1, 1, 1, 1, keys),
        "shift": counted(call.shift, 1, 1, 1, 1, 1),
    }


def _kept(call: Call, P: torch.Tensor, m: int, n: int) -> torch.Tensor:
    """Which probabilities of a tile dropout keeps."""
    batch, head, row, key, _ = _places(call, P, m, n, torch.int64).values()
    assert call.seed is not None
    return kept(call.seed, call.dropout, batch, head, row, key)


def _computed(call: Call, given, m: int, n: int) -> partial:
    """What gives a node of the call's expression its values in a tile of scaled scores ``given``."""
    leaves = {"score": given, **_places(call, given, m, n, torch.int32)}
    ops = TorchOps(call.captured, given.dtype, given.device)
    return partial(call.expression.value, leaf=leaves.__getitem__, ops=ops, known={})


def _online_step(scores, row_max, row_sum):
    """One tile of base-2 scores (…, keys): returns (P, rescale, row_max, row_sum)."""
    new_max = torch.maximum(row_max, scores.amax(-1))
    # A row that has seen no key yet has m = −inf; 0 in its place keeps −inf − −inf from making a NaN.
    anchor = torch.where(new_max == -torch.inf, 0.0, new_max)
    P = (scores - anchor[..., None]).exp2()
    rescale = (row_max - anchor).exp2()
    return P, rescale, new_max, row_sum * rescale + P.sum(-1)


def _grouped(x, call: Call):
    """(batch, seqlen_q, heads, …) as (batch, seqlen_q, heads_kv, group, …): a view, so that it can be written to."""
    return x.unflatten(2, (call.heads_kv, call.heads // call.heads_kv))


def _band(call: Call) -> Band:
    lo = None if call.left is None else call.shift - call.left
    hi = None if call.right is None else call.shift + call.right
    return Band(lo, hi)
