"""Attention to keys and values in a cache: a step of serving, in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.compiler import is_compiling

from cute_attn import api, autocast, launch, reference, serve, stored, wrapped
from cute_attn.arguments import choice, flag, unscriptable
from cute_attn.lengths import are_checked
from cute_attn.plan import mechanism_name
from cute_attn.private import any_autocast_enabled, dispatch_modes, dual_level, transforms_active
from cute_attn.problem import check_call_of_cache

STEPS_MAX = 1024
_NONE = [None] * 4
_steps: dict[tuple | None, serve.Step] = {}


@unscriptable
def attention_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    *, lengths: torch.Tensor, page_table: torch.Tensor | None = None, cache_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None, cu_seqlens_q: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None, v_new: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None, rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False, rotary_begin: torch.Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
    mask: Callable | None = None, score: Callable | None = None, tensors: tuple[torch.Tensor, ...] = (),
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None, return_lse: bool = False,
    batch_invariant: bool = False, backend: str = "auto", mechanism: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`~cute_attn.attention` of some queries to all keys of their sequence, which lie in a cache: a step of serving.

    Sequence i has the keys up to ``lengths[i]``, and behind them those of ``k_new``, which the call writes into the cache
    first. Its last query is aligned with its last key, as everywhere: of a step of several queries (speculative decoding, a
    chunk of a prompt) each sees, with ``causal=True``, the keys before it and those of the step up to its own.

    Nothing is read back from the device, and nothing need be planned: the work is balanced there, from ``lengths``. So a call
    can be captured in a CUDA graph and replayed with other lengths, pages and numbers of queries in the same tensors. With few
    queries it is one launch, or two with new keys.

    Args:
        q: ``(batch, seqlen_q, heads, head_dim)``; with ``cu_seqlens_q`` ``(total_q, heads, head_dim)``, of numbers of queries
            that differ.
        k_cache: ``(batch, capacity, heads_kv, head_dim)``, or, with ``page_table``, ``(pages, page_size, heads_kv, head_dim)``,
            pages of 1 to 1024 rows. Rows that are no sequence's keys are never looked at.
        v_cache: the same with ``head_dim_v``.
        lengths: int32 ``(batch,)`` on q's device: how many rows of the cache each sequence has, before ``k_new``.
        page_table: int32 ``(batch, max_pages)``: the pages of each sequence in their order; of those past its length anything.
            Sequences may share pages that none of them writes to.
        cache_batch_idx: int32 ``(batch,)``: the element of the cache that each sequence has, if not its own number.
        leftpad_k: int32 ``(batch,)``: how many of the first rows are no keys. ``lengths`` counts them.
        cu_seqlens_q: int32 ``(batch + 1,)``, see :func:`~cute_attn.attention_varlen`.
        k_new: ``(batch, seqlen_new, heads_kv, head_dim)``, or, with ``cu_seqlens_q``, ``(total_new, heads_kv, head_dim)``: keys
            that are written behind those in the cache, and seen. What there is no room for is left out.
        v_new: the same with ``head_dim_v``.
        cu_seqlens_k_new: int32 ``(batch + 1,)``, with ``cu_seqlens_q`` only: where each sequence's new keys begin; ``None`` is
            ``cu_seqlens_q``.
        rotary: ``(cos, sin)``, each ``(positions, rotary_dim / 2)`` in q's dtype, rotary_dim a multiple of 16: turn the first
            rotary_dim columns of the new keys and of q (RoPE, Su et al., arXiv:2104.09864) before anything else. Key j of
            ``k_new`` is at position ``lengths[i] + j``, and so is query j if there is a right edge or a left one (``causal``,
            ``window``); without any, all queries are at ``lengths[i]``, as in flash-attn. q itself is not changed.
        rotary_interleaved: pairs are columns 2c and 2c + 1, not c and c + rotary_dim / 2.
        rotary_begin: int32 ``(batch,)``: positions are counted from here instead of from ``lengths``.
        batch_invariant: a sequence has the same bits whatever else is in the batch, and wherever it is in it. Without it how
            its keys are split among blocks, and so the order of sums, depends on all lengths; the same call has the same bits
            always. Packed queries take tiles for many rows with it, and the keys of 256 queries and more of each sequence are
            gathered, if in pages, whatever memory that takes.
        mechanism: of the kernels: ``"cp_async"``, one for few queries that shares out the keys; ``"tma_wgmma"`` for many, which
            gathers pages first; or ``None`` for what is best for so many queries.

    All others are those of :func:`~cute_attn.attention`. A function's ``q_idx`` and ``kv_idx`` count the queries of the call
    and the keys of a sequence (behind ``leftpad_k``) from 0 on. With ``CUTE_ATTN_CHECK=1`` in the environment, from the
    process's first call on, lengths, pages and the others are read back and checked; without it, wrong ones give wrong
    results, but nothing outside the cache is read or written.

    Returns:
        ``out``, as q with ``head_dim_v`` columns; with ``return_lse`` also ``lse``, ``(batch, heads, seqlen_q)`` or ``(heads,
        total_q)``. Queries that see no key, or are no sequence's, have zeros and −inf.

    Raises:
        As :func:`~cute_attn.attention` does; ``NotImplementedError`` for inputs that require gradients while these are
        recorded, and inside of torch.compile.

    Algorithm: FlashAttention with split keys (Dao et al., "Flash-Decoding", 2023), in the order of "stream-K" (Osama et al.,
    arXiv:2301.03598).
    """
    if any_autocast_enabled():
        q, k_new, v_new = autocast.cast(q), autocast.cast(k_new), autocast.cast(v_new)
        if isinstance(rotary, (tuple, list)):  # as q is, whose dtype it has
            rotary = tuple(map(autocast.cast, rotary))  # type: ignore[assignment]
    if is_compiling() or dispatch_modes() or transforms_active():
        raise NotImplementedError(
            "attention_kvcache is called inside of torch.compile, torch.export, a transform of torch.func or a mode that sees "
            "every operator; a plain call is needed: try torch.compiler.disable around it"
        )
    inputs = q, k_cache, v_cache, k_new, v_new, sinks, *(rotary if isinstance(rotary, (tuple, list)) else ())
    if dual_level() >= 0:
        api.refuse_tangents(*inputs)
    packed = cu_seqlens_q is not None
    if cu_seqlens_k_new is not None and (k_new is None or not packed):
        raise ValueError(
            "cu_seqlens_k_new is given without k_new or without cu_seqlens_q; both are needed, of packed rows: leave it out, "
            "or pass cu_seqlens_q"
        )
    if packed and k_new is not None and cu_seqlens_k_new is None:
        cu_seqlens_k_new = cu_seqlens_q
    differentiable = torch.is_grad_enabled() and True in [getattr(x, "requires_grad", False) for x in inputs]
    where = lengths, page_table, cache_batch_idx, leftpad_k, cu_seqlens_q, cu_seqlens_k_new
    key = None
    if mask is score is alibi_slopes is None and type(tensors) is tuple and not tensors and not differentiable:
        cos, sin = rotary if type(rotary) is tuple and len(rotary) == 2 else (rotary, None)
        new = None
        if not k_new is v_new is rotary is rotary_begin is None:
            new = k_new, v_new, cos, sin, rotary_begin
        rules = scale, window, softcap, causal, return_lse, batch_invariant, rotary_interleaved, backend, mechanism
        key = _key(q, k_cache, v_cache, where, new, sinks, rules)
        if (step := _steps.get(key)) is not None:
            try:
                out, lse = step(q, k_cache, v_cache, where, new, sinks, None)
                return (out, lse) if return_lse else out
            except launch.Refused:  # suppress() would take longer; why is said below, or how they can be read
                pass
    of_sequences: tuple = (*where, rotary_begin)
    if not api.are_plain((q, k_new, v_new, *of_sequences)):
        q, k_new, v_new = map(wrapped.finished, (q, k_new, v_new))
        of_sequences = tuple(map(wrapped.finished, of_sequences))
    call = check_call_of_cache(q, k_cache, v_cache, of_sequences, scale, causal, window, softcap)
    keys = call.stored
    assert keys is not None
    return_lse, rotary_interleaved = flag("return_lse", return_lse), flag("rotary_interleaved", rotary_interleaved)
    keys.batch_invariant = flag("batch_invariant", batch_invariant)
    if k_new is not None or v_new is not None:
        stored.check_new(keys, k_cache, v_cache, k_new, v_new)
    if rotary is not None:
        stored.check_rotary(keys, q, rotary, rotary_interleaved)
    elif rotary_begin is not None:
        raise ValueError("rotary_begin is given without rotary, whose positions it is of; both are needed: pass rotary, too")
    named = dict(zip(stored.NAMES, of_sequences, strict=True))
    wrapped.check_read(q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new, **named)
    if (extras := api.extras_of_call(mask, score, tensors, alibi_slopes, None, sinks, 0)) is not None:
        api.take_extras(call, q, extras, keys.batch)
        differentiable = differentiable or (torch.is_grad_enabled() and any(x.requires_grad for x in call.captured))
        if dual_level() >= 0:
            api.refuse_tangents(*call.captured)
    backend, mechanism = choice("backend", backend, api.BACKENDS), mechanism_name(mechanism)
    on_reference = api.computed_by_reference(backend, mechanism, q)
    if differentiable:
        raise NotImplementedError(
            "q, the cache, new keys, rotary, sinks or what functions read require a gradient, which attention to a cache has "
            "none of; a call that records none is needed: try torch.no_grad() around it, or attention()"
        )
    keys.check_values(k_cache.shape[0], call.seqlen_q, call.bounded)
    if on_reference:
        out, lse = reference.attention_kvcache(q, k_cache, v_cache, call)
    else:
        out, lse, step = serve.forward(call, mechanism, return_lse, q, k_cache, v_cache)
        if key is not None and step is not None and not are_checked():
            if len(_steps) >= STEPS_MAX:
                _steps.clear()
            _steps[key] = step
    return (out, lse) if return_lse else out


def _key(q, k_cache, v_cache, where: tuple, new: tuple | None, sinks, rules: tuple) -> tuple | None:
    """What a call's step depends on; None where that can't be told at first sight."""
    scale, window, softcap, causal, return_lse, batch_invariant, rotary_interleaved, backend, mechanism = rules
    are_flags = type(causal) is type(return_lse) is type(batch_invariant) is type(rotary_interleaved) is bool
    named = type(backend) is str and (mechanism is None or type(mechanism) is str)
    if not (are_flags and named and api.are_usual_kinds(scale, window, softcap)):
        return None
    if not type(q) is type(k_cache) is type(v_cache) is torch.Tensor:
        return None
    lengths, table, *others = where
    more: tuple = ()
    try:
        if new is not None or sinks is not None or others != _NONE:
            more = tuple([x if x is None else x.shape for x in (*others, *(new or ()), sinks)])
        pages = table if table is None else table.shape
        return q.shape, q.dtype, q.get_device(), k_cache.shape, v_cache.shape, lengths.shape, pages, more, rules
    except (AttributeError, RuntimeError, ValueError):  # no tensors, arrays, or nested ones: which, is said later
        return None
