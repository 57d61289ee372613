"""What users call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import are_deterministic_algorithms_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from cute_attn import autocast, blocks, dropout, launch, ops, reference, wrapped
from cute_attn.arguments import Unread, choice, flag, integer, is_traced, number, shown, unscriptable
from cute_attn.autograd import Attention, check_order, differentiable
from cute_attn.functions import Called, Indexing, check_functions, check_values, indexed, positions, score_of, traced
from cute_attn.lengths import NAMES, Lengths, are_checked, check_lengths
from cute_attn.plan import mechanism_name
from cute_attn.private import (
    any_autocast_enabled,
    constant_in_graphs,
    dispatch_modes,
    dual_level,
    never_begin_a_graph,
    transforms_active,
    unseen,
    with_side_effects,
)
from cute_attn.problem import SCALES, UNBOUNDED, Call, check_call, check_sinks
from cute_attn.tracing import Symbol

BACKENDS = ("auto", "cute", "reference")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_ON_GPU = frozenset({"auto", "cute"})
# Arguments that are handed on together, as ``rules``, ``how`` and ``extras``.
_RULES, _HOW = ("scale", "causal", "window", "softcap"), ("return_lse", "deterministic", "backend", "mechanism")
_EXTRAS = "mask", "score", "tensors", "alibi_slopes", "bias", "sinks", "dropout_p"
_NUMBER, _REACH = frozenset({float, type(None)}), frozenset({int, type(None)})
_kept: dict[tuple | None, Any] = {}  # a Call, or, of ragged sequences, what one is made of
KEPT_MAX = 1024  # calls; each of another shape or rule


@unscriptable
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *, scale: float | None = None, causal: bool = False, window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None, mask: Callable | None = None, score: Callable | None = None,
    tensors: tuple[torch.Tensor, ...] = (), block_mask: Any = None, alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None, dropout_p: float = 0, return_lse: bool = False,
    deterministic: bool = False, backend: str = "auto", mechanism: str | None = None,
    seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Exact softmax attention, fused: ``softmax(scale · q kᵀ) v`` without the score matrix in memory.

    For each batch and head, with ``s_ij = scale · q_i · k_j``, or ``softcap · tanh(s_ij / softcap)`` under a softcap,

        out_i = Σ_j exp(s_ij − lse_i) · v_j,        lse_i = ln Σ_j exp(s_ij),

    where j runs over the keys that query i sees. Query i is aligned with key ``i + seqlen_k − seqlen_q``: the last query
    with the last key (**bottom-right**), as in flash-attn, also when the lengths differ. It sees the keys from ``left``
    before to ``right`` after that position. A query that sees no key gives zeros and an lse of −inf.

    Args:
        q: ``(batch, seqlen_q, heads, head_dim)``. Any strides with the last dimension contiguous; on the GPU, strides and
            address are multiples of 16 bytes. A transposed ``(batch, heads, seqlen, head_dim)`` tensor is not copied.
        k: ``(batch, seqlen_k, heads_kv, head_dim)``. ``heads`` is a multiple of ``heads_kv``; query head h reads key head
            ``h // (heads / heads_kv)`` (grouped-query attention; one key head is multi-query attention).
        v: ``(batch, seqlen_k, heads_kv, head_dim_v)``.
        scale: of the scores; ``None`` is 1/√head_dim. The kernels need one above 0.
        causal: no query sees past its aligned key: the same as ``right = 0``.
        window: ``(left, right)``, how many keys before and after its aligned one a query sees; ``None`` or −1 is unbounded.
        softcap: bounds scores to ±softcap; ``None`` or 0 is none.
        mask: ``mask(batch, head, q_idx, kv_idx, *tensors) -> bool``, which keys a query sees, of those that the arguments above
            let it see, as FlexAttention's ``mask_mod``. Positions are rows of q and of k, from 0 on. The function is traced
            (:mod:`cute_attn.tracing`): it gets symbols and may do arithmetic, comparisons, ``& | ~``, ``torch.where``,
            minimum, maximum, clamp, abs, exp, log, tanh, sqrt, ``//`` and ``%`` of integers, conversions, and index tensors of
            up to 4 dimensions, in ``tensors`` or in a closure: an index past a tensor's end takes its last element. Ready-made
            ones are :mod:`cute_attn.masks`.
        score: ``score(score, batch, head, q_idx, kv_idx, *tensors) -> score``, what is made of a scaled (and capped) score, as
            FlexAttention's ``score_mod``; :mod:`cute_attn.scores`. Gradients go through it, and into captured float tensors
            that require one, which are added up in float32.
        tensors: more arguments of the two functions. Of integers 32 bits are taken; ``CUTE_ATTN_CHECK=1`` refuses larger ones.
        block_mask: what :func:`cute_attn.block_mask` found out about ``mask``: tiles that it hides are not computed, and only
            those that it cuts are masked. It must be of the same mask, and of what its tensors hold now; nobody looks whether
            that is so, and the reference takes the mask alone. Or FlexAttention's ``BlockMask``, whose ``mask_mod`` is the mask
            where there is no other. Goes without causal, window and sequences of different lengths.
        alibi_slopes: float32 ``(heads,)`` or ``(batch, heads)``: ``slope · |i + seqlen_k − seqlen_q − j|`` is taken from s_ij,
            after all else.
        bias: added to s_ij, after all else: a tensor that broadcasts to ``(batch, heads, seqlen_q, seqlen_k)``, of q's dtype or
            float32, with any strides. Its gradient has its shape; where elements of the batch or heads share it, each has a
            copy of the gradient for a while, if these take 1 GiB at most, or 8 bytes an element of it. −inf hides a key, if
            that is finite; a mask hides any.
        sinks: floats ``(heads,)``: one more logit in the softmax of each row, without a value. The lse counts it, except in a
            row that sees no key.
        dropout_p: each ``exp(s_ij − lse_i)`` becomes 0 with this probability, from 0 to below 1, and else is divided by
            ``1 − dropout_p``; the lse stays as it is. Which do is drawn from torch's generator of q's device
            (``torch.manual_seed``), and doesn't depend on the mechanism; see :mod:`cute_attn.dropout`.
        return_lse: return ``(out, lse)``.
        deterministic: of the gradients. The kernels' backward pass adds the parts of dQ in an order that differs from run
            to run (atomically), and with it the last bits of q's gradient; ``True`` fixes the order, which takes longer:
            same inputs on the same GPU, same bits. ``torch.use_deterministic_algorithms(True)`` has the same effect. Everything
            else, and all of the reference, is deterministic anyway, but for gradients of captured tensors and of a bias: these
            are refused here, unless each score of a head has an element of its own, and memory can be had for each head's.
        backend: ``"cute"`` (the fused kernels), ``"reference"`` (the same algorithm in plain torch, on any device), or
            ``"auto"``: ``"cute"`` for CUDA tensors, ``"reference"`` for others.
        mechanism: of the kernels: ``"tma_wgmma"``, ``"cp_async"``, or ``None`` for the GPU's best.
        seqused_q: int32 ``(batch,)`` on q's device: how many rows of each element of the batch are in use; the last of these
            is aligned with the last key in use. The others are neither read nor computed: their outputs and gradients are
            zeros, their lse −inf. Nothing reads the values back. What is not of one piece in memory is copied.
        seqused_k: the same for k and v.

    Flags are bools, numbers are real or have an ``__index__``, from Python, numpy or a tensor of 0 dimensions on the CPU; a
    bool is no number, and 1 is no flag. ``scale`` and ``softcap`` are numbers that float32 can hold, and so are the products
    that scores are multiplied by (``scale · log2 e``, ``softcap · log2 e``, ``scale / softcap``), whatever the backend.

    Tensors that stand for others are taken too: the result of an asynchronous collective is waited for (on the current stream);
    DTensors that are sharded by batch or heads, or replicated, q, k and v alike, are computed shard by shard; under
    ``torch.vmap`` the mapped dimension joins the batch; for fake and meta tensors the outputs are fake and meta. In a graph of
    torch.compile or torch.export attention is one operator, ``cute_attn::attention`` (:mod:`cute_attn.ops`); there flags are
    Python's bools, and numbers in a function's closure and ``dropout_p`` are constants of the graph. DTensors and
    ``torch.vmap`` go without functions, a bias, slopes, sinks, dropout, a block mask and ``seqused``.

    Nested tensors of layout ``torch.jagged`` are sequences of different lengths, see :func:`attention_varlen`: the dimension of
    these is seqlen's, and k and v have the same offsets. Outputs are nested, too, with q's offsets in the place of seqlen_q.
    Rows that ``torch.nested.narrow`` leaves out are not in use.

    dtypes: float16 and bfloat16 on the GPU (products in float32), these, float32 and float64 in the reference. Head dims
    on the GPU: multiples of 8 up to 256, for q/k and v separately.

    Returns:
        ``out``, ``(batch, seqlen_q, heads, head_dim_v)`` in q's dtype; with ``return_lse`` also ``lse``,
        ``(batch, heads, seqlen_q)``, float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        TypeError: an argument of a wrong kind.
        ValueError: shapes, dtypes, devices, strides, alignment or values that don't fit.
        RuntimeError: a tensor whose storage was freed.
        NotImplementedError: a GPU without kernels, a missing DSL, forward-mode differentiation, a transform of
            ``torch.func`` other than ``vmap``, or several gradients at once (``is_grads_batched=True``).

    Algorithm: FlashAttention (Dao et al., arXiv:2205.14135; backward arXiv:2307.08691; on Hopper arXiv:2407.08608).
    """
    if any_autocast_enabled():
        q, k, v = autocast.cast(q), autocast.cast(k), autocast.cast(v)
    extras, none = None, None is mask is score is alibi_slopes is bias is sinks and type(tensors) is tuple and not tensors
    if not (none and type(dropout_p) is int and not dropout_p):  # else the function says the same, and takes longer
        extras = extras_of_call(mask, score, tensors, alibi_slopes, bias, sinks, dropout_p)
    transformed = transforms_active()
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN and not transformed
    ragged = not (seqused_q is seqused_k is None)
    call: Call | None = None
    if plain and extras is None and block_mask is None and not ragged:  # the usual case
        call = _kept_call(q, k, v, scale, causal, window, softcap, return_lse, deterministic, mechanism, backend)
        if call.plans is not None:
            return _by_kernels(q, k, v, call, return_lse, mechanism)
    rules, how = (scale, causal, window, softcap), (return_lse, deterministic, backend, mechanism)
    plain = plain and are_plain((seqused_q, seqused_k))
    handle = None if plain else wrapped.handler(q, k, v, seqused_q=seqused_q, seqused_k=seqused_k)
    if block_mask is not None and (ragged or handle is not None):
        raise NotImplementedError(
            "block_mask is given with nested tensors, DTensors, results of collectives or seqused; plain tensors with "
            "sequences of one length are needed: try mask= alone, or masks.document for sequences that are packed in one"
        )
    if handle is not None:
        used = {"seqused_q": seqused_q, "seqused_k": seqused_k} if ragged else {}
        return _of_others(handle, attention, q, k, v, rules, extras, how, used)
    if ragged:
        return _of_lengths(q, k, v, (None, None, seqused_q, seqused_k), rules, extras, how, plain, transformed)
    if (extras is not None or block_mask is not None) and is_dynamo_compiling():
        return _in_graph(attention, (q, k, v), {}, rules, extras, block_mask, how)
    if call is None:
        call = check_call(q, k, v, scale, causal, window, softcap)
    if block_mask is not None:
        call.blocks, mask = blocks.taken(block_mask, mask, call, q)
        extras = mask, score, tensors, alibi_slopes, bias, sinks, dropout_p
    if extras is not None:
        take_extras(call, q, extras, call.batch, (call.seqlen_q, call.seqlen_k))
    out, lse = _computed(q, k, v, call, scale, how, plain, transformed)
    return (out, lse) if return_lse else out


def _of_lengths(q, k, v, lengths: tuple, rules: tuple, extras, how: tuple, plain: bool, transformed: bool):
    """What attention of sequences of different lengths returns: packed ones, or, without bounds of queries, rectangles of which
    some rows aren't in use, which are sequences to whatever computes."""
    packed, scale, (return_lse, _, _, mechanism) = lengths[0] is not None, rules[0], how
    if extras is not None and is_dynamo_compiling():
        named = {name: x for name, x in zip(NAMES, lengths, strict=True) if packed or name in ("seqused_q", "seqused_k")}
        return _in_graph(attention_varlen if packed else attention, (q, k, v), named, rules, extras, None, how)
    if extras is None and plain:
        call = _kept_call_of_lengths(q, k, v, lengths, rules, how)
    else:
        call = _call_of_lengths(q, k, v, lengths, rules)
    if extras is not None:
        assert call.lengths is not None
        take_extras(call, q, extras, call.lengths.count, None if packed else (q.shape[1], k.shape[1]))
    if not packed:
        batch, seqlen_q, _, _ = q.shape
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if call.plans is None:
        found: Any = _computed(q, k, v, call, scale, how, plain, transformed)
    else:
        found = _by_kernels(q, k, v, call, return_lse, mechanism)
        if packed:
            return found
    out, lse = found if type(found) is tuple else (found, None)
    if not packed:
        out = out.view(batch, seqlen_q, *out.shape[1:])
        lse = lse.view(call.heads, batch, seqlen_q).transpose(0, 1) if return_lse else None
    return (out, lse) if return_lse else out


def are_usual_kinds(scale, window, softcap) -> bool:
    """Whether rules are of the kinds whose equal values mean the same, so that calls can be known by them: True is equal to 1,
    and is no reach of a window."""
    if scale is window is softcap is None:
        return True
    if not (type(scale) in _NUMBER and type(softcap) in _NUMBER):
        return False
    return window is None or (type(window) is tuple and _REACH.issuperset(map(type, window)))


def _kept_call(
    q, k, v, scale, causal, window, softcap, return_lse, deterministic, mechanism, backend="auto", heads_first=False
) -> Call:
    """:func:`check_call`'s; one for all eager calls on CUDA tensors of the same shapes, of q's dtype and device, with the same
    rules, and by the same kernels, so that these are checked and planned once. The dtypes and devices of k and v the launcher
    looks at."""
    key = _key(q, k, v, scale, causal, window, softcap, return_lse, deterministic, mechanism, backend, heads_first)
    call = _kept.get(key)
    if call is None:
        call = check_call(q, k, v, scale, causal, window, softcap, heads_first=heads_first)
        if key is not None:
            call.plans, call.kept_for = {}, (q.device, q.dtype)
            call.passes = launch.passes(return_lse, mechanism, deterministic)
            _keep(key, call)
    return call


def _kept_call_of_lengths(q, k, v, lengths: tuple, rules: tuple, how: tuple) -> Call:
    """The same of ragged sequences, as many of them: a call of its own, which has its lengths, with the plans of all alike. The
    lengths' dtypes and devices the launcher looks at, too. As for :func:`_call_of_lengths`."""
    (scale, causal, window, softcap), (return_lse, deterministic, backend, mechanism) = rules, how
    first, second, used_q, used_k = lengths  # a loop takes twice as long
    of_used = None if used_q is None else used_q.numel(), None if used_k is None else used_k.numel()
    sizes = None if first is None else first.numel(), None if second is None else second.numel(), of_used
    key = _key(q, k, v, scale, causal, window, softcap, return_lse, deterministic, mechanism, backend, sizes)
    kept = None if key is None else _kept.get(key)
    if kept is not None:
        make, count = kept
        return make(lengths=Lengths(count, lengths))
    call = _call_of_lengths(q, k, v, lengths, rules)
    if key is not None and call.lengths is not None and not are_checked():
        shape = call.batch, call.heads, call.heads_kv, call.seqlen_q, call.seqlen_k, call.head_dim, call.head_dim_v
        call.plans, call.kept_for = {}, (q.device, q.dtype)
        call.passes = launch.passes(return_lse, mechanism, deterministic)
        checked = call.scale, call.left, call.right, call.softcap
        make = partial(Call, *shape, *checked, plans=call.plans, kept_for=call.kept_for, passes=call.passes)
        _keep(key, (make, call.lengths.count))
    return call


def _key(q, k, v, scale, causal, window, softcap, return_lse, deterministic, mechanism, backend, more) -> tuple | None:
    """What an eager call on CUDA tensors is known by; None of any other, and where that can't be told at first sight."""
    if not type(causal) is type(return_lse) is type(deterministic) is bool or not (mechanism is None or type(mechanism) is str):
        return None
    if type(backend) is not str or backend not in _ON_GPU or not q.is_cuda or is_dynamo_compiling() or dispatch_modes():
        return None
    if not (scale is window is softcap is None or are_usual_kinds(scale, window, softcap)):
        return None
    fixed, device = deterministic or are_deterministic_algorithms_enabled(), q.get_device()
    try:
        return q.shape, k.shape, v.shape, q.dtype, device, scale, causal, window, softcap, return_lse, mechanism, fixed, more
    except RuntimeError:  # a strided nested tensor
        return None


def _keep(key: tuple, kept: Call | tuple) -> None:
    if len(_kept) >= KEPT_MAX:
        _kept.clear()
    _kept[key] = kept


def _call_of_lengths(q, k, v, lengths: tuple, rules: tuple) -> Call:
    """That of packed sequences, or, without bounds of queries, of rectangles some of whose rows are in use."""
    packed = lengths[0] is not None
    scale, causal, window, softcap = rules
    call = check_call(q, k, v, scale, causal, window, softcap, packed=packed)
    call.lengths = check_lengths(q, None if packed else call.batch, lengths)
    if not packed:
        call.seqlen_q, call.seqlen_k, call.batch = call.batch * call.seqlen_q, call.batch * call.seqlen_k, 1
    return call


def attention_heads_first(q, k, v, scale: float | None, causal: bool) -> torch.Tensor:
    """:func:`attention` by the kernels, of ``(batch, heads, seqlen, head_dim)``; the output is such a view of memory in which
    heads come after seqlen, and so are gradients. For eager calls of torch's own CUDA tensors, out of any transform, which
    spares them the views."""
    call = _kept_call(q, k, v, scale, causal, None, None, False, False, None, heads_first=True)
    return _by_kernels(q, k, v, call, False, None)


def _by_kernels(q, k, v, call: Call, return_lse: bool, mechanism: str | None):
    """What a kept call returns, of torch's own CUDA tensors without captured ones, out of any transform."""
    if dual_level() >= 0:
        refuse_tangents(q, k, v)
    if is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return differentiable(q, k, v, call)
    out, lse, _ = launch.forward(call, mechanism, return_lse, False, q, k, v)
    return (out, lse) if return_lse else out


@unscriptable
def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor | None = None,
    *, seqused_q: torch.Tensor | None = None, seqused_k: torch.Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
    mask: Callable | None = None, score: Callable | None = None, tensors: tuple[torch.Tensor, ...] = (),
    alibi_slopes: torch.Tensor | None = None, bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    dropout_p: float = 0, return_lse: bool = False, deterministic: bool = False, backend: str = "auto",
    mechanism: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`attention` of sequences of different lengths, one after another in the rows of q, k and v.

    Sequence i has the queries from row ``cu_seqlens_q[i]`` up to ``cu_seqlens_q[i + 1]`` and the keys from ``cu_seqlens_k[i]``
    up to ``cu_seqlens_k[i + 1]``. Its queries see its own keys only, the last of them aligned with the last key, as everywhere.
    Nothing reads the lengths back from the device: the same call can be captured in a CUDA graph and replayed with others.

    Args:
        q: ``(total_q, heads, head_dim)``.
        k: ``(total_k, heads_kv, head_dim)``.
        v: ``(total_k, heads_kv, head_dim_v)``.
        cu_seqlens_q: int32 ``(batch + 1,)`` on q's device, from 0, ascending. Rows from the last value on belong to no
            sequence: outputs and gradients of theirs are zeros, the lse is −inf.
        cu_seqlens_k: the same for k and v; ``None`` is that of q.
        seqused_q: int32 ``(batch,)`` on q's device: how many of a sequence's rows are in use, see :func:`attention`.
        seqused_k: the same for k and v.

    All others are those of :func:`attention`; a ``bias`` is ``(batch, heads, rows, keys)`` with as many rows and keys as
    the longest sequence has, or more. With ``CUTE_ATTN_CHECK=1`` in the environment, from the process's first call on, the
    lengths are read back and checked; without it, wrong ones give wrong results, but nothing is written outside of these.

    Returns:
        ``out``, ``(total_q, heads, head_dim_v)`` in q's dtype; with ``return_lse`` also ``lse``, ``(heads, total_q)``.

    Raises:
        As :func:`attention` does.
    """
    if any_autocast_enabled():
        q, k, v = autocast.cast(q), autocast.cast(k), autocast.cast(v)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    extras = extras_of_call(mask, score, tensors, alibi_slopes, bias, sinks, dropout_p)
    lengths = cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
    transformed = transforms_active()
    plain = type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN and not transformed and are_plain(lengths)
    rules, how = (scale, causal, window, softcap), (return_lse, deterministic, backend, mechanism)
    if not plain and (handle := wrapped.handler(q, k, v, **(named := dict(zip(NAMES, lengths, strict=True))))):
        return _of_others(handle, attention_varlen, q, k, v, rules, extras, how, named)
    if cu_seqlens_q is None:
        check_call(q, k, v, scale, causal, window, softcap, packed=True)
        raise TypeError("cu_seqlens_q is None; an int32 tensor is needed: try torch.tensor(…, dtype=torch.int32)")
    return _of_lengths(q, k, v, lengths, rules, extras, how, plain, transformed)


def extras_of_call(mask, score, tensors, alibi_slopes, bias, sinks, dropout_p) -> tuple | None:
    """What a call has besides its usual rules; None where it has none of these."""
    none = None is mask is score is alibi_slopes is bias is sinks and type(tensors) is tuple and not tensors
    if none and type(dropout_p) in (int, float) and not dropout_p:  # an int as default: torch.compile begins anew for a float
        return None
    return mask, score, tensors, alibi_slopes, bias, sinks, dropout_p


def take_extras(call: Call, q: torch.Tensor, extras: tuple, batch: int, lengths: tuple[int, int] | None = None) -> None:
    """Check and trace what a call has besides its usual rules; ``lengths`` are those of all sequences, if they have one."""
    mask, score, tensors, alibi_slopes, bias, sinks, dropout_p = extras
    check_known(dropout_p)
    p = number("dropout_p", dropout_p, "from 0 to below 1")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p is {shown(dropout_p)}; a number from 0 to below 1 is needed: try 0.1, or 0.0 for none")
    p = float(p)  # where it is a symbol, that of a graph to come
    call.dropout = p if dropout.threshold(p) else 0.0
    if extras_of_call(mask, score, tensors, alibi_slopes, bias, sinks, call.dropout) is None:
        return
    if transforms_active():
        wrapped.refuse_transforms()
    if sinks is not None:
        check_sinks(sinks, q, call.heads)
    if call.dropout:
        call.seed = dropout.draw_seed(q)
    as_text = is_compiling() or wrapped.has_no_values(q) or bool(dispatch_modes())
    if not as_text:
        sinks, alibi_slopes, bias = map(wrapped.finished, (sinks, alibi_slopes, bias))
        others = {"sinks": sinks, "alibi_slopes": alibi_slopes, "bias": bias}
        wrapped.check_read(**{name: x for name, x in others.items() if isinstance(x, torch.Tensor)})
    call.sinks = sinks
    if extras_of_call(mask, score, tensors, alibi_slopes, bias, None, 0.0):
        behind = type(call.right) is int and call.right <= 0  # of a symbol nobody knows
        given = mask, score, tensors, alibi_slopes, q, call.heads, batch, bias, lengths, behind, as_text
        expression, call.captured = unseen(traced)(*given)
        call.expression = expression if as_text else expression.fitting(call)
        if not as_text:
            call.captured = tuple(map(wrapped.finished, call.captured))
            for x in call.captured:
                wrapped.check_read(**{"a captured tensor": x})
            check_values(call.captured)


def check_known(dropout_p) -> None:
    """Refuse a probability that is in a tensor of a graph to come, which is made for one."""
    if is_traced(dropout_p):
        raise TypeError(
            f"dropout_p is {shown(torch.as_tensor(dropout_p))} inside of torch.compile or torch.export, where a graph is made "
            f"before any value is known; a number from 0 to below 1 is needed: pass float(dropout_p) from outside"
        )


# ---- what else there is, in a graph ----------------------------------------------------------------------------------


def _in_graph(function: Callable, tensors: tuple, lengths: dict, rules: tuple, extras, block_mask, how: tuple):
    """What :func:`attention` or :func:`attention_varlen` returns of a call with more than its usual rules, while torch.compile
    makes a graph. It follows mask and score, as it does everything a user writes, so that the graph is for what they are now,
    and closures and arguments are its operands. What it made of them comes to :func:`_of_graph`, with symbols, where the graph
    is run to be made another one of operators."""
    scale, causal, window, softcap = rules
    if isinstance(window, (tuple, list)) and any(map(is_traced, window)):
        window = tuple(integer("a side of window", x, UNBOUNDED) if is_traced(x) else x for x in window)
    scale, softcap = (number(name, x, SCALES) if is_traced(x) else x for name, x in (("scale", scale), ("softcap", softcap)))
    named = dict(zip(_HOW + _RULES, (*how, scale, causal, window, softcap), strict=True)) | lengths
    if not is_dynamo_compiling():  # it could not, and has left the call out of its graph
        named |= dict(zip(_EXTRAS, extras or (), strict=False)) | ({} if block_mask is None else {"block_mask": block_mask})
        return unseen(function)(*tensors, **named)
    if transforms_active():
        wrapped.refuse_transforms()
    _prepared()
    mask, score, given, alibi_slopes, bias, sinks, dropout_p = extras or (None, None, (), None, None, None, 0)
    check_known(dropout_p)
    if block_mask is not None:
        found, mask = blocks.with_mask(block_mask, mask)
        block_mask = found.kinds, found.seqlen_q, found.seqlen_k
    check_functions(mask, score, given)
    made: dict[str, tuple] = {}
    if mask is not None or score is not None:
        made = with_side_effects(_followed, mask, score, positions(tensors[0]), given)
    others = {"alibi_slopes": alibi_slopes, "bias": bias, "sinks": sinks, "dropout_p": dropout_p}
    return _of_graph(function is attention_varlen, tensors, made, block_mask, named | others)


def _followed(mask, score, where: tuple, given) -> dict[str, tuple]:
    """What functions return, in tuples, by their names; tensors give them elements for positions."""
    made: dict[str, tuple] = {}
    with Indexing():
        if mask is not None:
            made["mask"] = (mask(*where, *given),)
        if score is not None:
            made["score"] = (score(score_of(where[0]), *where, *given),)
    return made


def _of_graph(varlen: bool, tensors: tuple, made: dict, block_mask: tuple | None, named: dict):
    """What :func:`_in_graph` returns; ``made`` has what functions returned, in tuples."""
    graph = next((x.graph for (x,) in made.values() if isinstance(x, Symbol)), None)
    named = {**named, **{name: Called(x, graph) for name, (x,) in made.items()}}
    named |= {name: Unread(named[name]) for name in ("scale", "softcap") if isinstance(named[name], torch.Tensor)}
    if block_mask is not None:
        named["block_mask"] = blocks.BlockMask(*block_mask)
    return (attention_varlen if varlen else attention)(*tensors, **named)


@constant_in_graphs
def _prepared() -> bool:
    """Tells torch.compile, which is imported by then, what to call in its graphs and not to follow."""
    for function in (positions, score_of, indexed, _of_graph):
        torch.compiler.allow_in_graph(function)
    never_begin_a_graph(_in_graph)
    return True


def _of_others(handle: Callable, function: Callable, q, k, v, rules: tuple, extras, how: tuple, lengths: dict):
    """What a function returns of tensors that stand for others."""
    if extras is not None and handle is not wrapped.nested:
        raise NotImplementedError(
            "mask, score, alibi_slopes, bias, sinks or dropout_p are given with DTensors or results of collectives; tensors of "
            "each rank's own are needed, since positions and heads would be those of a shard: try x.to_local() of q, k and v"
        )
    named = dict(zip(_EXTRAS, extras or (), strict=False))
    named |= dict(zip(_RULES, rules, strict=True))
    others = dict(zip(_HOW, how, strict=True)) | lengths
    return handle(attention_varlen if handle is wrapped.nested else function, q, k, v, named, others)


def are_plain(tensors: tuple) -> bool:
    """Whether all are torch's own tensors, or None."""
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))


def _computed(q, k, v, call: Call, scale, how: tuple, plain: bool, transformed: bool):
    """``(out, lse)`` of a checked call; ``how`` is (return_lse, deterministic, backend, mechanism), not checked yet. ``plain``:
    q, k, v and lengths are torch's own tensors, and not in a transform of ``torch.func``, as others may be."""
    return_lse, deterministic, backend, mechanism = how
    return_lse, deterministic = flag("return_lse", return_lse), flag("deterministic", deterministic)
    backend, mechanism = choice("backend", backend, BACKENDS), mechanism_name(mechanism)
    on_reference = computed_by_reference(backend, mechanism, q)
    others = call.others
    if dual_level() >= 0:
        refuse_tangents(q, k, v, *others)
    differentiated = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or any(x is not None and x.requires_grad for x in others)
    )
    if transformed:
        wrapped.check_transforms(q, k, v, differentiated)
    of_graph = is_compiling() or dispatch_modes() or type(call.expression) is str
    if of_graph or ((on_reference or not plain) and not wrapped.are_read(q, k, v, call.lengths)):
        call.scale = None if scale is None else call.scale  # 1/√head_dim is for the operator to take: here it may be a symbol
        return ops.attention(q, k, v, call, return_lse, differentiated, deterministic, backend, mechanism)
    if call.lengths is not None:
        call.lengths.check_values((call.seqlen_q, call.seqlen_k))
    if differentiated:
        call.passes = reference.PASSES if on_reference else launch.passes(return_lse, mechanism, deterministic)
        if call.expression:
            check_order(call, on_reference, deterministic)
        found = Attention.apply(q, k, v, call, *others)
        return found if type(found) is tuple else (found, None)
    if on_reference:
        return reference.attention(q, k, v, call)[:2]
    return launch.forward(call, mechanism, return_lse, False, q, k, v)[:2]


def computed_by_reference(backend: str, mechanism: str | None, q: torch.Tensor) -> bool:
    """Whether the reference computes, and not the kernels; refuses what neither can."""
    on_reference = ops.on_reference(backend, q)
    if on_reference:
        if mechanism is not None:
            raise ValueError(
                f"mechanism is {mechanism!r} and the reference backend runs, which has none: leave it out, or pass CUDA tensors"
            )
    elif backend == "cute" and not q.is_cuda:
        raise ValueError(
            f"backend is 'cute' and the tensors lie on {q.device}; the kernels need CUDA tensors: "
            f"try .cuda(), or backend='auto'"
        )
    return on_reference


def refuse_tangents(*tensors) -> None:
    if any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "an input carries a tangent of forward-mode differentiation; attention has gradients in reverse mode only: "
            "try .backward(), or torch.nn.functional.scaled_dot_product_attention under "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )
