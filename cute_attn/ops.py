"""Attention as operators of ``torch.library``: what torch has of it where it traces, intercepts, or knows shapes only.

``cute_attn::attention`` and ``cute_attn::attention_backward`` compute what an eager call does, by the same functions, and are
opaque: one node of a graph each, whatever the lengths. An eager call doesn't come here, since an operator written in Python
takes three times as long to call. Here is what comes: calls in torch.compile and torch.export, under a mode that sees every
operator (selective checkpointing, counters of FLOPs, ``make_fx``), of fake and meta tensors, and under ``torch.vmap``.

    attention(q, k, v, *lengths, scale, softcap, left, right, return_lse, for_backward, deterministic, backend, mechanism)
        -> (out, lse, kept)
    attention_backward(q, k, v, *lengths, out, kept, dout, dlse, scale, softcap, left, right, needs, deterministic, backend,
        mechanism) -> (dq, dk, dv)

Arguments are those of :func:`cute_attn.attention`, except that ``left`` and ``right`` are the edges of the band, None where it
is unbounded (``causal`` is ``right = 0``), and that ``lengths`` are four, ``lengths.NAMES``. All are None for a rectangle; with
any of them q, k, v are ``(1, rows of all sequences, heads, head_dim)``, and without cu_seqlens each sequence has equally many.
``lse`` counts with ``return_lse`` only and ``kept``, what the backward pass has of each row, with ``for_backward``; ``needs``,
part of ``"qkv"``, names the gradients that count. What doesn't count has size 0. All results are contiguous, and memory of
their own. The operators check their arguments themselves.

torch.compile makes one graph for all values of a float only if no operator takes it as a float. So each operator has an
overload ``Tensor``, whose ``scale`` and ``softcap`` are of 0 dimensions, float64, on the CPU. It reads them when it runs, which
a CUDA graph can't record: its tag says so, and Inductor runs it between two of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from cute_attn import autograd, launch, reference, wrapped
from cute_attn.arguments import check_memory
from cute_attn.lengths import NAMES, check_lengths
from cute_attn.private import is_known
from cute_attn.problem import Call, check_call, check_for_kernels, strides_for_kernels

_LIBRARY = torch.library.Library("cute_attn", "DEF")
_TENSORS = ", ".join(["Tensor q, Tensor k, Tensor v", *(f"Tensor? {name}" for name in NAMES)])
_ARGUMENTS = {
    "attention": "{tensors}, {rules}, bool return_lse, bool for_backward, {how}",
    "attention_backward": "{tensors}, Tensor out, Tensor kept, Tensor dout, Tensor? dlse, {rules}, str needs, {how}",
}
_RECTANGLE = (None,) * len(NAMES)
_EDGES, _HOW = "SymInt? left, SymInt? right", "bool deterministic, str backend, str? mechanism"
_NUMBERS = {"default": "float? scale, float? softcap", "Tensor": "Tensor? scale, Tensor? softcap"}


def attention(q, k, v, call: Call, return_lse: bool, deterministic: bool, backend: str, mechanism: str | None):
    """``(out, lse)`` of a checked call by the operator."""
    for_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if for_backward:
        wrapped.check_device(q)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    softcap = call.softcap if isinstance(call.softcap, torch.Tensor) else call.softcap or None
    rules = *_as_operands(call.scale, softcap), call.left, call.right
    how = deterministic, backend, mechanism
    lengths = _RECTANGLE if call.lengths is None else call.lengths.tensors
    out, lse, _ = _overload("attention", rules)(q, k, v, *lengths, *rules, return_lse, for_backward, *how)
    return out, lse


def _overload(name: str, rules) -> Callable:
    """The overload for a scale and a softcap. Torch's own choice would read a tensor, to see whether a float is in it."""
    packet = getattr(torch.ops.cute_attn, name)
    return packet.Tensor if any(isinstance(x, torch.Tensor) for x in rules[:2]) else packet.default


def on_reference(backend: str, q: torch.Tensor) -> bool:
    """Whether the reference computes, and not the kernels."""
    return backend == "reference" or (backend == "auto" and not q.is_cuda)


def _as_operands(*numbers):
    """Numbers as they are where the graph to come may hold them, else as tensors."""
    constants = all(x is None or (not isinstance(x, torch.Tensor) and is_known(x)) for x in numbers)
    if constants or not torch.compiler.is_compiling():
        return numbers
    # Of what makes a tensor of a float, torch.compile replaces a product alone by the tensor in which it has the float.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [x.to(torch.float64) if isinstance(x, torch.Tensor) else None if x is None else one * x for x in numbers]


# ---- what they compute -----------------------------------------------------------------------------------------------


def _forward(q, k, v, *others):
    lengths, rules, (return_lse, for_backward, _, backend, mechanism) = others[:4], others[4:8], others[8:]
    call = _call(q, k, v, lengths, rules)
    if call.lengths is not None:
        call.lengths.check_values((call.seqlen_q, call.seqlen_k))
    if on_reference(backend, q):
        _check_memory(q=q, k=k, v=v)
        out, lse, kept = reference.attention(q, k, v, call)
    else:
        out, lse, kept = launch.forward(call, mechanism, return_lse, for_backward, q, k, v)
    return out, _or_nothing(lse if return_lse else None, out), _or_nothing(kept if for_backward else None, out)


def _backward(q, k, v, *others):
    lengths, (out, kept, dout, dlse), rules = others[:4], others[4:8], others[8:12]
    needs, deterministic, backend, mechanism = others[12:]
    call = _call(q, k, v, lengths, rules)
    if on_reference(backend, q):
        _check_memory(q=q, k=k, v=v, out=out, dout=dout)
        gradients = reference.gradients
    else:
        _, gradients = launch.passes(False, mechanism, deterministic)
    results = autograd.computed(None, q, k, v, out, kept, dout, dlse, needs, call, gradients)
    return tuple(_or_nothing(dx, out) for dx in results)


def _call(q, k, v, lengths: tuple, rules: tuple) -> Call:
    scale, softcap, *window = (x.item() if isinstance(x, torch.Tensor) else x for x in rules)
    return _checked(q, k, v, lengths, scale, window, softcap)


def _checked(q, k, v, lengths: tuple, scale, window, softcap) -> Call:
    ragged = any(x is not None for x in lengths)
    call = check_call(q, k, v, scale, False, window, softcap, packed=ragged)
    if ragged:
        call.lengths = check_lengths(q, None, lengths)
    return call


def _check_memory(**tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        check_memory(name, x)


def _or_nothing(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``x``, or a tensor of size 0 where nobody asked for it: an operator can't return None."""
    return like.new_empty(0) if x is None else x


# ---- their shapes ----------------------------------------------------------------------------------------------------


def _shapes(q, k, v, *others):
    lengths, rules, (return_lse, for_backward, _, backend, _) = others[:4], others[4:8], others[8:]
    compiling = torch.compiler.is_compiling()  # an error here would be wrapped in torch's own; one of the running graph is not
    scale, softcap = (None if compiling or isinstance(x, torch.Tensor) else x for x in rules[:2])
    call = _checked(q, k, v, lengths, scale, None, softcap)
    if not on_reference(backend, q):
        check_for_kernels(q.dtype, call)
        for name, x in (("q", q), ("k", k), ("v", v)):
            strides_for_kernels(name, x)
    *batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(*batch, seqlen_q, heads, call.head_dim_v)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse, kept = (q.new_empty(*batch, heads, seqlen_q, dtype=dtype) for _ in range(2))
    return out, _or_nothing(lse if return_lse else None, out), _or_nothing(kept if for_backward else None, out)


def _shapes_of_gradients(q, k, v, *others):
    needs = others[12]
    return tuple(x.new_empty(x.shape if name in needs else 0) for name, x in (("q", q), ("k", k), ("v", v)))


# ---- their gradients -------------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output):
    q, k, v, *others = inputs
    lengths, ctx.rules, (ctx.return_lse, ctx.for_backward, *ctx.how) = others[:4], others[4:8], others[8:]
    out, lse, kept = output
    ctx.mark_non_differentiable(kept) if ctx.return_lse else ctx.mark_non_differentiable(lse, kept)
    autograd.keep(ctx, q, k, v, out, kept, *lengths)


def _differentiate(ctx, dout, dlse, _):
    gradients = [None] * len(ctx.needs_input_grad)
    arguments = autograd.arguments_of_gradients(ctx, dout, dlse if ctx.return_lse else None)
    if arguments is not None:
        q, k, v, out, kept, dout, dlse, needs, *lengths = arguments
        if not ctx.for_backward:  # of a graph that was made where no gradient was needed
            _, _, kept = _overload("attention", ctx.rules)(q, k, v, *lengths, *ctx.rules, False, True, *ctx.how)
        operator = _overload("attention_backward", ctx.rules)
        results = operator(q, k, v, *lengths, out, kept, dout, dlse, *ctx.rules, needs, *ctx.how)
        gradients[:3] = (dx if name in needs else None for name, dx in zip("qkv", results, strict=True))
    return tuple(gradients)


# ---- their members' under torch.vmap ---------------------------------------------------------------------------------


def _mapped(operator: Callable) -> Callable:
    """The rule of ``torch.vmap``: the mapped dimension joins the batch, which comes first in all tensors."""

    def rule(info, in_dims, *arguments):
        members = info.batch_size

        def joined(x, dim):
            if not isinstance(x, torch.Tensor) or not x.dim():
                return x
            return (x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        wrapped.check_mapped(*arguments[:3])
        if any(x is not None for x in arguments[3:7]):
            raise NotImplementedError(
                "torch.vmap maps attention with cu_seqlens or seqused; a call without these is needed, whose batch the mapped "
                "dimension joins: try one call with the lengths of all, or a loop"
            )
        results = operator(*map(joined, arguments, in_dims))
        return tuple(x.unflatten(0, (members, x.shape[0] // max(members, 1))) for x in results), (0,) * len(results)

    return rule


# ---- what they cost --------------------------------------------------------------------------------------------------


def _flops(q, k, v, *others, **_) -> int:
    """As torch counts those of its own attention: two products, whatever a mask hides."""
    return 2 * _scores(q, k, others[:4]) * (q.shape[-1] + v.shape[-1])


def _flops_of_gradients(q, k, v, *others, **_) -> int:
    """Five products: the scores anew and dQ, dK of one head_dim; dP and dV of the other."""
    return 2 * _scores(q, k, others[:4]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _scores(q, k, lengths: tuple) -> int:
    """How many there are. Lengths are read back; where they have no values, sequences count as equally long."""
    *batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[-3]
    if batch:
        return heads * batch[0] * seqlen_q * seqlen_k
    ragged = check_lengths(q, None, lengths)
    if q.is_meta or isinstance(q, wrapped.TRACED):
        return heads * seqlen_q * seqlen_k // max(ragged.count, 1)
    spans = zip(ragged.in_use(0, seqlen_q), ragged.in_use(1, seqlen_k), strict=True)
    return heads * sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in spans)


# ---- registered ------------------------------------------------------------------------------------------------------


def _register(name: str, compute, shapes, flops, differentiate, keep=None) -> None:
    for overload, numbers in _NUMBERS.items():
        operator = name if overload == "default" else f"{name}.{overload}"
        arguments = _ARGUMENTS[name].format(tensors=_TENSORS, rules=f"{numbers}, {_EDGES}", how=_HOW)
        tags = {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides}
        if overload == "Tensor":
            tags.add(torch.Tag.cudagraph_unsafe)
        _LIBRARY.define(f"{operator}({arguments}) -> (Tensor, Tensor, Tensor)", tags=tuple(tags))
        _LIBRARY.impl(operator, compute, "CompositeExplicitAutograd")
        operator = f"cute_attn::{operator}"
        torch.library.register_fake(operator, shapes, lib=_LIBRARY)
        torch.library.register_autograd(operator, differentiate, setup_context=keep, lib=_LIBRARY)
        torch.library.register_vmap(operator, _mapped(getattr(getattr(torch.ops.cute_attn, name), overload)), lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.cute_attn, name), get_raw=True)(flops)


_register("attention", _forward, _shapes, _flops, _differentiate, _keep)
_register("attention_backward", _backward, _shapes_of_gradients, _flops_of_gradients, autograd.refuse_double_backward)
