"""flash-attn's functions, computed by cute-attn: for code that was written for flash-attn 2.8.

Names, arguments, their order and defaults, results and their shapes are that package's:

    flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, …)

with ``flash_attn_varlen_func``, the ``qkvpacked`` and ``kvpacked`` forms of the two, ``flash_attn_with_kvcache``, and, of its
module ``bert_padding``, ``pad_input``, ``unpad_input`` and ``index_first_axis``. :func:`install` makes ``import flash_attn``
resolve to them, for code that can't be edited.

Arguments mean what those of :func:`cute_attn.attention` do: ``softmax_scale`` is its ``scale``, ``window_size`` its ``window``;
those of a cache are :func:`cute_attn.attention_kvcache`'s (``k`` is ``k_new``, ``cache_seqlens`` ``lengths``, ``cache_leftpad``
``leftpad_k``, ``rotary_seqlens`` ``rotary_begin``). Errors name them as they are here.

All functions that compute attention also take

- ``return_lse``: return ``(out, softmax_lse)``;
- by name, what FlashAttention-3 and -4 add: hints (``num_splits``, ``pack_gqa``, ``sm_margin``, …), of which nothing depends
  here, are checked for their kind; ``learnable_sink``, ``(heads,)``, is ``sinks``; ``page_table`` is ``block_table``; what
  isn't there yet (``qv``, …) is refused unless it is None.

What ``dropout_p`` drops is drawn from torch's generator, by another rule than flash-attn's: the same seed drops others. What
isn't in a function's signature it can't do: callers that look there, as Transformers does, find out before they call.

Where flash-attn says nothing, or less: head dims that are no multiple of 8 are padded with zeros, except a cache's, and tensors
whose last dimension is not contiguous are copied, as it does; ``softmax_lse`` has a gradient, and is −inf, not inf, where a
query sees no key; an empty batch is no error; a ``softcap`` below 0 and windows below −1 are errors; CPU tensors run the
reference backend.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cute_attn.api import attention, attention_varlen
from cute_attn.arguments import check_layout, check_tensor, flag, integer, number, shown, unscriptable
from cute_attn.kvcache import attention_kvcache
from cute_attn.launch import packed_of
from cute_attn.lengths import sequences_of
from cute_attn.private import dispatch_modes, transforms_active
from cute_attn.problem import HEAD_DIM_STEP
from cute_attn.wrapped import check_read

__version__ = "2.8.4"  # of the flash-attn whose interface this is
UNBOUNDED = (-1, -1)
Window = tuple[int | None, int | None]
_FLEX = "torch.nn.attention.flex_attention"
# By name: what nothing here depends on, ints, flags, and what is not looked at.
_INTS = ("num_splits", "sm_margin", "min_seqlen_k", "seqlen_k_per_split")
_FLAGS = ("pack_gqa", "disable_scheduler_metadata")
_UNREAD = ("scheduler_metadata",)
# What isn't there yet of the newer interfaces, by name, and what to do instead.
_NEWER = {
    "qv": "q of torch.cat((q, qv), -1) and k of torch.cat((k, v), -1)",
    "q_descale": "q.to(torch.bfloat16) * q_descale",
    "k_descale": "k.to(torch.bfloat16) * k_descale",
    "v_descale": "v.to(torch.bfloat16) * v_descale",
    "attention_chunk": "a call for each chunk, or window_size",
    "num_heads_q": "q, k, v of qkv.split((num_heads_q, heads_kv, heads_kv), -2), and flash_attn_func",
    "gather_kv_indices": "k and v gathered before the call",
    **dict.fromkeys(("score_mod", "score_mod_bwd", "mask_mod", "aux_tensors", "aux_scalars"), _FLEX),
    **dict.fromkeys(("block_sparse_tensors", "block_sparse_tensors_bwd"), _FLEX),
}
_NUMBERS = ("attention_chunk",)  # of these 0 is none, and not None
# What arguments of attention are here, and those of a cache.
_NAMES = {"scale": "softmax_scale", "window": "window_size", "sinks": "learnable_sink"}
_NAMES_OF_CACHE = {
    "k_new": "k", "v_new": "v", "lengths": "cache_seqlens", "leftpad_k": "cache_leftpad", "rotary_begin": "rotary_seqlens",
    "rotary's cos": "rotary_cos", "rotary's sin": "rotary_sin", "rotary": "(rotary_cos, rotary_sin)",
    "page_table": "block_table",
}  # fmt: skip


# ---- attention -------------------------------------------------------------------------------------------------------


@unscriptable
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, return_lse: bool = False, **others: Any,
) -> Any:  # fmt: skip
    """``softmax(softmax_scale · q kᵀ) v`` by :func:`cute_attn.attention`.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        k: ``(batch, seqlen_k, nheads_k, headdim)``, ``nheads`` a multiple of ``nheads_k``.
        v: ``(batch, seqlen_k, nheads_k, headdim_v)``.
        dropout_p: from 0 to below 1.
        softmax_scale: ``None`` is 1/√headdim.
        causal: the last query is aligned with the last key (bottom-right).
        window_size: ``(left, right)``; −1 or ``None`` is unbounded.
        softcap: 0 is none.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``.
        return_attn_probs: return ``(out, softmax_lse, S_dmask)``. S_dmask, which flash-attn has for its tests, is of size 0.
        return_lse: return ``(out, softmax_lse)``.

    Returns:
        ``out``, ``(batch, seqlen_q, nheads, headdim_v)``; ``softmax_lse``, ``(batch, nheads, seqlen_q)``, float32.

    Raises:
        NotImplementedError: what isn't there yet, see the module.
        Otherwise as :func:`cute_attn.attention` does.
    """
    extras = {"alibi_slopes": alibi_slopes, "sinks": others.pop("learnable_sink", None), "dropout_p": dropout_p}
    if others:
        _check_others(others)
    usual = window_size is UNBOUNDED and return_attn_probs is return_lse is False and alibi_slopes is extras["sinks"] is None
    if usual and type(dropout_p) is float and not dropout_p and getattr(q, "is_cuda", False) and not is_compiling():
        try:
            return attention(q, k, v, scale=softmax_scale, causal=causal, softcap=softcap, deterministic=deterministic)
        except (TypeError, ValueError):  # rows that kernels can't read as they are, or an error, which comes again
            pass
    rules = softmax_scale, causal, window_size, softcap, deterministic
    return _attend(attention, q, k, v, extras, *rules, return_attn_probs, return_lse)


@unscriptable
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, return_lse: bool = False, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_func` with k and v in one tensor, ``(batch, seqlen_k, 2, nheads_k, headdim)``; neither is copied."""
    k, v = _unpacked("kv", kv, 5)
    rules: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *rules, return_lse=return_lse, **others)


@unscriptable
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, return_lse: bool = False, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_func` with q, k and v in one tensor, ``(batch, seqlen, 3, nheads, headdim)``; none is copied."""
    q, k, v = _unpacked("qkv", qkv, 5)
    rules: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    return flash_attn_func(q, k, v, *rules, return_lse=return_lse, **others)


@unscriptable
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
    *, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, return_lse: bool = False,
    page_table: Tensor | None = None, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_func` of sequences one after another in the rows, by :func:`cute_attn.attention_varlen`; where keys are
    in pages, by :func:`cute_attn.attention_kvcache`, without gradients.

    Args:
        q: ``(total_q, nheads, headdim)``.
        k: ``(total_k, nheads_k, headdim)``; with a ``block_table`` ``(pages, page_size, nheads_k, headdim)``.
        v: ``(total_k, nheads_k, headdim_v)``, or pages of so many columns.
        cu_seqlens_q: int32 ``(batch + 1,)``: where in q each sequence begins and, at last, where the last one ends.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: a hint; nothing depends on it, and nothing reads it, if it is a tensor.
        max_seqlen_k: the same.
        block_table: int32 ``(batch, max_pages)``: the pages of each sequence; ``cu_seqlens_k`` then says how many keys it has,
            or, whatever that is, ``seqused_k``.
        seqused_q: int32 ``(batch,)``, how many rows of each sequence are in use; without pages.
        seqused_k: the same for k and v.

    Returns:
        ``out``, ``(total_q, nheads, headdim_v)``, and as above ``softmax_lse``, ``(nheads, total_q)``.

    Raises:
        As :func:`flash_attn_func` does.
    """
    extras = {"alibi_slopes": alibi_slopes, "sinks": others.pop("learnable_sink", None), "dropout_p": dropout_p}
    if others or not type(max_seqlen_q) is type(max_seqlen_k) is int:
        _check_hint("max_seqlen_q", max_seqlen_q)
        _check_hint("max_seqlen_k", max_seqlen_k)
        _check_others(others)
    if (table := _table_of(block_table, page_table)) is not None:
        if seqused_q is not None:
            raise NotImplementedError(
                f"seqused_q is {shown(seqused_q)} beside pages; None is needed: try cu_seqlens_q of the rows in use"
            )
        if number("dropout_p", extras.pop("dropout_p"), "from 0 to below 1"):
            raise NotImplementedError(
                f"dropout_p is {shown(dropout_p)} beside pages; 0 is needed, as model.eval() has it: leave it out"
            )
        used = seqused_k
        if used is None:
            sequences_of("cu_seqlens_k", cu_seqlens_k, getattr(q, "device", torch.device("cpu")))
            check_read(cu_seqlens_k=cu_seqlens_k)
            used = cu_seqlens_k.flatten().diff()
        where = extras | {"page_table": table, "cu_seqlens_q": cu_seqlens_q}
        probs, return_lse = flag("return_attn_probs", return_attn_probs), flag("return_lse", return_lse)
        asked = probs or return_lse
        try:
            found = _attend_to_cache(q, k, v, None, None, used, where, softmax_scale, causal, window_size, softcap, asked)
        except (TypeError, ValueError) as error:
            names = {"k_cache": "k", "v_cache": "v", "lengths": "cu_seqlens_k.diff()" if seqused_k is None else "seqused_k"}
            _rename(error, names | ({"page_table": "block_table"} if page_table is None else {}))
            raise
        return (*found, q.new_empty(0)) if probs else found
    if cu_seqlens_k is None:  # which attention_varlen would take for that of q
        raise TypeError("cu_seqlens_k is None; an int32 tensor is needed: try cu_seqlens_q, if k has the lengths of q")
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "seqused_q": seqused_q, "seqused_k": seqused_k}
    rules = softmax_scale, causal, window_size, softcap, deterministic
    return _attend(attention_varlen, q, k, v, lengths | extras, *rules, return_attn_probs, return_lse)


@unscriptable
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
    *, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, return_lse: bool = False, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_varlen_func` with k and v in one tensor, ``(total_k, 2, nheads_k, headdim)``; neither is copied."""
    k, v = _unpacked("kv", kv, 4)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    rules: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    others |= {"seqused_q": seqused_q, "seqused_k": seqused_k, "return_lse": return_lse}
    return flash_attn_varlen_func(q, k, v, *lengths, *rules, **others)


@unscriptable
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = UNBOUNDED, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, *, return_lse: bool = False, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_varlen_func` with q, k and v in one tensor, ``(total, 3, nheads, headdim)``; none is copied."""
    q, k, v = _unpacked("qkv", qkv, 4)
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    rules: Any = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    try:
        return flash_attn_varlen_func(q, k, v, *lengths, *rules, return_lse=return_lse, **others)
    except (TypeError, ValueError) as error:
        _rename(error, {f"{name}_{side}": name for name in ("cu_seqlens", "max_seqlen") for side in "qk"})
        raise


@unscriptable
def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = UNBOUNDED, softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
    *, page_table: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None, **others: Any,
) -> Any:  # fmt: skip
    """:func:`flash_attn_func` of a cache of keys and values, by :func:`cute_attn.attention_kvcache`. There are no gradients.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``; with ``cu_seqlens_q`` ``(total_q, nheads, headdim)``.
        k_cache: ``(batch, seqlen_cache, nheads_k, headdim)``, or more elements, of which the first are the batch's; with
            ``block_table`` ``(pages, page_size, nheads_k, headdim)``.
        v_cache: the same with ``headdim_v``.
        k: ``(batch, seqlen_new, nheads_k, headdim)``, or packed like q: new keys, written into the cache behind the others.
        v: the same with ``headdim_v``.
        rotary_cos: ``(positions, rotary_dim / 2)``, by which q and k are turned first.
        rotary_sin: the same.
        cache_seqlens: how many rows of the cache each sequence has, before ``k``: an int, or int32 ``(batch,)``; without ``k``
            also ``None``, all there are.
        cache_batch_idx: int32 ``(batch,)``: each sequence's element of the cache; ``None`` is its own number.
        cache_leftpad: int32 ``(batch,)``: where in its rows each sequence begins.
        block_table: int32 ``(batch, max_pages)``: the pages of each sequence, of 1 to 1024 rows.
        rotary_interleaved: pairs are columns next to each other, and not half of rotary_dim apart.
        num_splits: a hint; nothing depends on it.
        page_table: FlashAttention-3's name of ``block_table``.
        cu_seqlens_q: and what follows, FlashAttention-3's: int32 ``(batch + 1,)``, where in q each sequence begins.
        cu_seqlens_k_new: the same of k and v; ``None`` is ``cu_seqlens_q``.
        max_seqlen_q: a hint, as of :func:`flash_attn_varlen_func`.
        rotary_seqlens: int32 ``(batch,)``: positions are counted from here, and not from ``cache_seqlens``.

    Returns:
        ``out``, or ``(out, softmax_lse)``, as of :func:`flash_attn_func`.

    Raises:
        As :func:`flash_attn_func` does.
    """
    sinks = others.pop("learnable_sink", None)
    _check_hint("num_splits", num_splits)
    _check_hint("max_seqlen_q", max_seqlen_q)
    _check_others(others)
    if (rotary_cos is None) is not (rotary_sin is None):
        raise ValueError(
            f"rotary_cos is {shown(rotary_cos)} and rotary_sin {shown(rotary_sin)}; both or none are needed: pass the other one"
        )
    if k is not None and cache_seqlens is None:
        raise ValueError(
            "k is given and cache_seqlens is None; how many rows come before the new ones is needed: try cache_seqlens=0"
        )
    rotary = None if rotary_cos is None else (rotary_cos, rotary_sin)
    more = {
        "page_table": _table_of(block_table, page_table), "cache_batch_idx": cache_batch_idx, "leftpad_k": cache_leftpad,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new, "alibi_slopes": alibi_slopes, "sinks": sinks,
        "rotary": rotary, "rotary_begin": rotary_seqlens, "rotary_interleaved": rotary_interleaved,
    }  # fmt: skip
    rules = softmax_scale, causal, window_size, softcap, flag("return_softmax_lse", return_softmax_lse)
    if cache_batch_idx is block_table is page_table is cu_seqlens_q is None:
        k_cache, v_cache = _of_batch(q, k_cache), _of_batch(q, v_cache)
    try:
        return _attend_to_cache(q, k_cache, v_cache, k, v, cache_seqlens, more, *rules)
    except (TypeError, ValueError) as error:
        _rename(error, _NAMES_OF_CACHE if page_table is None else _NAMES_OF_CACHE | {"page_table": "page_table"})
        raise


def _table_of(block_table: Tensor | None, page_table: Tensor | None) -> Tensor | None:
    """The one of the two names that is given."""
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table are given, two names of one argument; one is needed: leave page_table out")
    return page_table if block_table is None else block_table


def _attend_to_cache(q, k_cache, v_cache, k, v, used, more: dict, scale, causal, window, softcap, return_lse: bool):
    """:func:`~cute_attn.attention_kvcache`, whose names refusals have, where ``used`` is a number of rows for all sequences,
    all there are, or a tensor."""
    if not isinstance(used, Tensor):
        used = _lengths_of_all(used, q, k_cache, more["page_table"], more["cu_seqlens_q"])
    q, k, v, window = _in_rows(q), _in_rows(k), _in_rows(v), None if window is UNBOUNDED else window
    rules = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "return_lse": return_lse}
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        return attention_kvcache(q, k_cache, v_cache, lengths=used, k_new=k, v_new=v, **more, **rules)


def _of_batch(q, cache):
    """The elements of a cache that the batch has: there may be more behind them."""
    are_tensors = isinstance(q, Tensor) and isinstance(cache, Tensor) and q.dim() == cache.dim() == 4
    if not are_tensors or cache.size(0) <= q.size(0) or cache.is_nested or not _are_dense(cache):  # or an error is to come
        return cache
    return cache[: q.size(0)]


def _lengths_of_all(used: Any, q, k_cache, table, bounds) -> Any:
    """The lengths of all sequences where one number is given, or none; as they are where there is an error to come."""
    if not (isinstance(q, Tensor) and isinstance(k_cache, Tensor)) or not q.dim() or k_cache.dim() != 4:
        return used
    check_layout("q", q)
    count = len(q) if bounds is None else sequences_of("cu_seqlens_q", bounds, q.device)
    rows = k_cache.shape[1]
    if table is not None:
        sequences_of("page_table", table, q.device)
        rows *= table.shape[1]
    given = rows if used is None else integer("lengths", used, "or an int32 tensor (batch,)")
    if not 0 <= given <= rows:
        raise ValueError(
            f"lengths is {shown(given)}; from 0 to {rows} rows, as many as the cache has for a sequence, are needed: check how "
            f"it was made, or take a larger cache or more pages"
        )
    return torch.full((count,), given, dtype=torch.int32, device=q.device)


def _attend(attend: Callable, q, k, v, lengths: dict, scale, causal, window, softcap, deterministic, probs, return_lse):
    """``attend(q, k, v, …)``, of tensors as the kernels read them, and results as flash-attn returns them."""
    probs, return_lse = flag("return_attn_probs", probs), flag("return_lse", return_lse)
    columns = None
    if not _as_is(q, k, v) and q.shape[-1] == k.shape[-1] and _are_dense(q, k, v):  # else attention refuses them
        scale, columns = max(q.shape[-1], 1) ** -0.5 if scale is None else scale, v.shape[-1]
        q, k, v = _padded(q), _padded(k), _padded(v)
    window = None if window is UNBOUNDED else window
    asked = probs or return_lse
    rules = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "deterministic": deterministic}
    try:
        results = attend(q, k, v, **lengths, **rules, return_lse=asked)
    except (TypeError, ValueError) as error:
        _rename(error, {})
        raise
    if not asked:
        return results if columns is None else results[..., :columns]
    out, lse = results
    out = out if columns is None else out[..., :columns]
    return (out, lse, out.new_empty(0)) if probs else (out, lse)


def _rename(error: Exception, names: dict[str, str]) -> None:
    """Have a refusal of attention speak of arguments as the caller knows them.

    By its words, among which an argument's name is never anything else (``tests/host/test_errors.py``): to hand names down to
    all that refuses something, or to check all of it here first, is more to keep right, and costs calls that nobody refuses.
    """
    if not is_compiling() and error.args and isinstance(error.args[0], str):
        names = _NAMES | names
        some = rf"\b({'|'.join(names)})\b"
        error.args = (re.sub(some, lambda found: names[found[0]], error.args[0]), *error.args[1:])


def _as_is(q, k, v) -> bool:
    """Whether 16-byte copies can read the rows; also of what are no strided tensors: attention says what they are."""
    try:
        whole_rows = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        return whole_rows and not (q.shape[-1] % HEAD_DIM_STEP or v.shape[-1] % HEAD_DIM_STEP)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return True


def _in_rows(x):
    """``x`` with rows of one piece, a copy if need be; what attention refuses as it is."""
    try:
        return x if x is None or x.stride(-1) == 1 or not _are_dense(x) else x.contiguous()
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return x


def _are_dense(*tensors: Tensor) -> bool:
    """Whether torch can copy them: what is sparse, or freed, it copies with a message of its own, or none."""
    if not all(x.layout is torch.strided for x in tensors):
        return False
    traced = is_compiling() or transforms_active() or dispatch_modes()
    return bool(traced) or all(type(x) is not Tensor or x.untyped_storage().size() or not x.numel() for x in tensors)


def _padded(x: Tensor) -> Tensor:
    """``x`` with columns of zeros up to a multiple of 8, and rows of one piece."""
    if missing := -x.shape[-1] % HEAD_DIM_STEP:
        x = torch.nn.functional.pad(x, (0, missing))
    return _in_rows(x)


def _unpacked(name: str, packed: Tensor, dims: int) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, views of it: one for each letter of its name."""
    names = {"qkv": "q, k and v", "kv": "k and v"}[name]
    rows = "batch, seqlen" if dims == 5 else "rows of all sequences"
    check_tensor(name, packed, f"a torch.Tensor is needed: try torch.stack of {names}, dim=-3")
    if packed.dim() != dims or packed.shape[-3] != len(name):
        raise ValueError(
            f"{name} has shape {tuple(packed.shape)}; ({rows}, {len(name)}, heads, head_dim) is needed: try torch.stack of "
            f"{names}, dim=-3"
        )
    if packed.requires_grad and torch.is_grad_enabled() and not (is_compiling() or transforms_active() or dispatch_modes()):
        return _Unpacked.apply(packed)
    return packed.unbind(-3)


class _Unpacked(torch.autograd.Function):
    """``packed.unbind(-3)``, whose gradient is not copied where the parts' gradients are parts of one tensor already."""

    @staticmethod
    def forward(ctx, packed):  # type: ignore[override]
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        packed = packed_of(*gradients)
        return torch.stack(gradients, -3) if packed is None else packed


def _check_others(others: dict[str, Any]) -> None:
    """Check hints for their kind, and refuse what isn't there yet."""
    for name, value in others.items():
        if name in _INTS:
            _check_hint(name, value)
        elif name in _FLAGS:
            if value is not None:
                flag(name, value)
        elif name in _NEWER:
            none = 0 if name in _NUMBERS else None
            if not (value is None if none is None else number(name, value, "0 for none") == 0.0):
                raise NotImplementedError(
                    f"{name} is {shown(value)}; {none} is needed, since it isn't there yet: try {_NEWER[name]}"
                )
        elif name not in _UNREAD:
            known = ", ".join((*_INTS, *_FLAGS, *_UNREAD, "learnable_sink", *_NEWER))
            raise TypeError(f"{name} is no argument of flash-attn; by name there are return_lse, {known}: leave it out")


def _check_hint(name: str, value: object) -> None:
    """Refuse what is no int. A tensor is not read, wherever it lies."""
    if isinstance(value, Tensor) and not value.dim() and not value.is_floating_point() and value.dtype != torch.bool:
        return
    if value is not None:
        integer(name, value, "or None")


# ---- bert_padding ----------------------------------------------------------------------------------------------------


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``, the rows of ``x`` ``(rows, …)`` that ``indices`` ``(n,)`` names: ``(n, …)``.

    Raises:
        TypeError: not tensors. ValueError: shapes or dtypes that don't fit.
    """
    _check_tensor("x", x, 1)
    _check_indices(indices)
    return x.index_select(0, indices)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of ``hidden_states`` ``(batch, seqlen, …)`` that a mask keeps, one sequence after another.

    Args:
        attention_mask: ``(batch, seqlen)``, bool or int: which rows are in use.
        unused_mask: the same: which rows, though not in use, keep a place.

    Returns:
        ``(rows, indices, cu_seqlens, max_seqlen, seqused)``: the rows ``(total, …)``; where in ``(batch · seqlen)`` they were,
        int64 ``(total,)``; int32 ``(batch + 1,)``; the longest sequence, an int, for which the host waits; int32 ``(batch,)``,
        how many rows of each sequence are in use.

    Raises:
        TypeError: not tensors. ValueError: shapes that don't fit.
    """
    _check_tensor("hidden_states", hidden_states, 2)
    masks = {"attention_mask": attention_mask} | ({} if unused_mask is None else {"unused_mask": unused_mask})
    for name, mask in masks.items():
        _check_tensor(name, mask, 2)
        if mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(mask.shape)}; {tuple(hidden_states.shape[:2])}, the (batch, seqlen) of "
                f"hidden_states, is needed: check how it was made"
            )
    used = attention_mask.bool()
    kept = used if unused_mask is None else used | unused_mask.bool()
    sizes = kept.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
    indices = kept.flatten().nonzero().flatten()
    longest = int(sizes.max()) if sizes.numel() else 0
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of :func:`unpad_input`: rows ``(total, …)`` where they were, ``(batch, seqlen, …)``, and zeros elsewhere.

    Raises:
        TypeError: values of a wrong kind. ValueError: shapes or dtypes that don't fit.
    """
    _check_tensor("hidden_states", hidden_states, 1)
    _check_indices(indices)
    batch, seqlen = integer("batch", batch, "≥ 0"), integer("seqlen", seqlen, "≥ 0")
    if len(indices) != len(hidden_states) or batch < 0 or seqlen < 0:
        raise ValueError(
            f"batch is {batch}, seqlen {seqlen}, and there are {len(indices)} indices of {len(hidden_states)} rows; sizes ≥ 0 "
            f"and an index for each row are needed: pass what unpad_input returned"
        )
    rows = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return rows.index_copy_(0, indices.long(), hidden_states).unflatten(0, (batch, seqlen))


def _check_tensor(name: str, x: Tensor, dims: int) -> None:
    check_tensor(name, x, f"a torch.Tensor is needed: try torch.as_tensor({name})")
    if x.dim() < dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {dims} dimensions or more are needed: check how it was made")


def _check_indices(indices: Tensor) -> None:
    _check_tensor("indices", indices, 1)
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and dtype {indices.dtype}; int64 or int32 (rows,) is needed: try "
            f"mask.flatten().nonzero().flatten()"
        )


# ---- import flash_attn -----------------------------------------------------------------------------------------------


_FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
_MODULES = {
    "flash_attn": ("__version__", *_FUNCTIONS),
    "flash_attn.flash_attn_interface": _FUNCTIONS,
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "unpad_input"),
}


def install() -> None:
    """Make ``import flash_attn`` this module in this process, for code that can't be edited. Nothing does so by itself.

    The package ``flash_attn`` then has the functions above and the ``__version__`` of the flash-attn whose interface they are,
    and so have its modules ``flash_attn_interface`` and ``bert_padding``. ``importlib.util.find_spec`` and
    ``importlib.metadata`` find it, as libraries ask that want to know whether it is installed; some ask once, when they are
    imported, so this goes first. A flash-attn that is installed is hidden. To install twice changes nothing;
    :func:`uninstall` undoes it.

    Raises:
        RuntimeError: another ``flash_attn`` has been imported: functions of either would be in use.
    """
    found = sys.modules.get("flash_attn")
    if found is not None and getattr(found, "__loader__", None) is not _FINDER:
        where = getattr(found, "__file__", None) or "somewhere"
        raise RuntimeError(
            f"flash_attn {getattr(found, '__version__', '')} from {where} has been imported, and what imported it has its "
            f"functions; a process without it is needed: call cute_attn.flash_attn.install() before the first import of it"
        )
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)  # type: ignore[arg-type]


def uninstall() -> None:
    """Undo :func:`install`: the next ``import flash_attn`` finds what is installed. What was imported before keeps working."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)  # type: ignore[arg-type]
    for name in _MODULES:
        if getattr(sys.modules.get(name), "__loader__", None) is _FINDER:
            del sys.modules[name]


class _Finder:
    """Finds and loads the modules of :data:`_MODULES`, for ``import``, and the distribution that they are of."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in _MODULES:
            return None
        inside: list[str] | None = [] if name == "flash_attn" else None  # nothing else is found inside
        return spec_from_file_location(name, __file__, loader=self, submodule_search_locations=inside)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        for name in _MODULES[module.__name__]:
            setattr(module, name, globals()[name])
        if module.__name__ == "flash_attn":
            import_module("flash_attn.flash_attn_interface")

    def find_distributions(self, context: metadata.DistributionFinder.Context) -> Iterator[metadata.Distribution]:
        if context.name is None or context.name.replace("_", "-").lower() == "flash-attn":
            yield _Distribution()


class _Distribution(metadata.Distribution):
    """flash-attn's, as far as anybody asks: its name, its version, and the package it has."""

    _TEXTS: ClassVar = {
        "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {__version__}\n",
        "top_level.txt": "flash_attn\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._TEXTS.get(filename)

    def locate_file(self, path):
        return Path(__file__).parent / path


_FINDER = _Finder()
