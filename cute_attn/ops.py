"""Attention as operators of ``torch.library``: what torch has of it where it traces, intercepts, or knows shapes only.

``cute_attn::attention`` and ``cute_attn::attention_backward`` compute what an eager call does, by the same functions, and are
opaque: one node of a graph each, whatever the lengths. An eager call doesn't come here, since an operator written in Python
takes three times as long to call. Here is what comes: calls in torch.compile and torch.export, under a mode that sees every
operator (selective checkpointing, counters of FLOPs, ``make_fx``), of fake and meta tensors, and under ``torch.vmap``.

    attention(q, k, v, *lengths, sinks, seed, kinds, captured, expression, derived, dropout_p, scale, softcap, left, right,
        return_lse, for_backward, deterministic, backend, mechanism) -> (out, lse, kept)
    attention_backward(q, k, v, *lengths, sinks, …, dropout_p, out, kept, dout, dlse, scale, softcap, left, right, needs,
        deterministic, backend, mechanism) -> (dq, dk, dv, dsinks)

Arguments are those of :func:`cute_attn.attention`, except that ``left`` and ``right`` are the edges of the band, None where it
is unbounded (``causal`` is ``right = 0``), and that ``lengths`` are four, ``lengths.NAMES``. All are None for a rectangle; with
any of them q, k, v are ``(1, rows of all sequences, heads, head_dim)``, and without cu_seqlens each sequence has equally many.
``lse`` counts with ``return_lse`` only and ``kept``, what the backward pass has of each row, with ``for_backward``; ``needs``,
part of ``"qkvs"``, names the gradients that count, ``s`` that of the sinks. What doesn't count has size 0. All results are
contiguous, and memory of their own. The operators check their arguments themselves.

``expression`` is the text of what functions compute (``functions.restored``), so that a graph can be saved, and loaded where
the functions are not. ``captured`` are the tensors that it reads, a bias and the slopes of ALiBi among them, and ``derived``
names the numbers of those that have gradients. ``seed`` decides which probabilities are dropped (``dropout.draw_seed``, for
which a graph has torch's own operators); ``kinds`` are those of a block mask. There is none of what is None, empty, or 0.

Where captured tensors have gradients, ``attention_backward_captured`` takes the place of ``attention_backward``. It returns a
list of these, too, which Inductor's wrapper in C++ takes of no operator.

torch.compile makes one graph for all values of a float only if no operator takes it as a float. So each operator has an
overload ``Tensor``, whose ``scale`` and ``softcap`` are of 0 dimensions, float64, on the CPU. It reads them when it runs, which
a CUDA graph can't record: its tag says so, and Inductor runs it between two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from cute_attn import autograd, launch, reference, wrapped
from cute_attn.arguments import check_memory
from cute_attn.blocks import BlockMask
from cute_attn.functions import check_values, restored
from cute_attn.lengths import NAMES, NO_LENGTHS, check_lengths
from cute_attn.private import is_known
from cute_attn.problem import Call, check_call, check_for_kernels, check_sinks, exact_dtype, strides_for_kernels

_LIBRARY = torch.library.Library("cute_attn", "DEF")
_INPUTS = ", ".join([
    *("Tensor q", "Tensor k", "Tensor v", *(f"Tensor? {name}" for name in NAMES)),
    "Tensor? sinks, Tensor? seed, Tensor? kinds, Tensor[]? captured, str expression, str derived, float dropout_p",
])
_RULES, _HOW = "{numbers}, SymInt? left, SymInt? right", "bool deterministic, str backend, str? mechanism"
_OF_GRADIENTS = f"({_INPUTS}, Tensor out, Tensor kept, Tensor dout, Tensor? dlse, {_RULES}, str needs, {_HOW}) -> "
_SCHEMAS = {
    "attention": f"({_INPUTS}, {_RULES}, bool return_lse, bool for_backward, {_HOW}) -> (Tensor, Tensor, Tensor)",
    "attention_backward": _OF_GRADIENTS + "(Tensor, Tensor, Tensor, Tensor)",
    "attention_backward_captured": _OF_GRADIENTS + "(Tensor, Tensor, Tensor, Tensor, Tensor[])",
}
_NUMBERS = {"default": "float? scale, float? softcap", "Tensor": "Tensor? scale, Tensor? softcap"}


def attention(q, k, v, call: Call, return_lse: bool, for_backward: bool, deterministic: bool, backend: str, mechanism):
    """``(out, lse)`` of a checked call by the operator."""
    if for_backward:
        wrapped.check_device(q)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    softcap = call.softcap if isinstance(call.softcap, (torch.Tensor, torch.SymFloat)) else call.softcap or None
    kinds = None if call.blocks is None else call.blocks.kinds
    derived = " ".join([str(i) for i, x in enumerate(call.captured) if x.requires_grad and for_backward])
    more = call.sinks, call.seed, kinds, list(call.captured) or None, call.expression or "", derived, call.dropout
    rules = *_as_operands(call.scale, softcap, of_graph=call.has_rules), call.left, call.right
    how = return_lse, for_backward, deterministic, backend, mechanism
    lengths = NO_LENGTHS if call.lengths is None else call.lengths.tensors
    out, lse, _ = _overload("attention", rules)(q, k, v, *lengths, *more, *rules, *how)
    return out, lse


def _overload(name: str, rules) -> Callable:
    """The overload for a scale and a softcap. Torch's own choice would read a tensor, to see whether a float is in it."""
    packet = getattr(torch.ops.cute_attn, name)
    return packet.Tensor if any(isinstance(x, torch.Tensor) for x in rules[:2]) else packet.default


def on_reference(backend: str, q: torch.Tensor) -> bool:
    """Whether the reference computes, and not the kernels."""
    return backend == "reference" or (backend == "auto" and not q.is_cuda)


def _as_operands(*numbers, of_graph: bool):
    """Numbers as they are where the graph to come may hold them, else as tensors. ``of_graph``: those may be of torch.compile's
    graph, out of which it makes the one to come (``api._in_graph``)."""
    constants = all(x is None or (not isinstance(x, torch.Tensor) and is_known(x)) for x in numbers)
    symbols = of_graph and any(isinstance(x, torch.SymFloat) for x in numbers)
    if constants or not (symbols or torch.compiler.is_compiling()):
        return numbers
    # Of what makes a tensor of a float, torch.compile replaces a product alone by the tensor in which it has the float.
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [x.to(torch.float64) if isinstance(x, torch.Tensor) else None if x is None else one * x for x in numbers]


# ---- what they compute -----------------------------------------------------------------------------------------------

_FORWARD = 3, len(NAMES), 7, 4, 5  # of a call's arguments how many belong together
_BACKWARD = 3, len(NAMES), 7, 4, 4, 4


def _parted(arguments: tuple, sizes: tuple[int, ...]) -> list[tuple]:
    """Arguments that belong together."""
    return [tuple(arguments[begin:end]) for begin, end in pairwise(accumulate(sizes, initial=0))]


def _of_parts(function: Callable, sizes: tuple[int, ...], results: int) -> Callable:
    """A function of parts as one of arguments, that returns the first of its results."""
    return lambda *arguments: function(*_parted(arguments, sizes))[:results]


def _forward(tensors, lengths, more, rules, how):
    q, k, v = tensors
    return_lse, for_backward, deterministic, backend, mechanism = how
    call = _call(tensors, lengths, more, rules)
    if call.lengths is not None:
        call.lengths.check_values((call.seqlen_q, call.seqlen_k))
    check_values(call.captured)
    if for_backward:
        autograd.check_order(call, on_reference(backend, q), deterministic)
    if on_reference(backend, q):
        _check_memory(q=q, k=k, v=v)
        out, lse, kept = reference.attention(q, k, v, call)
    else:
        out, lse, kept = launch.forward(call, mechanism, return_lse, for_backward, q, k, v)
    return out, _or_nothing(lse if return_lse else None, out), _or_nothing(kept if for_backward else None, out)


def _backward(tensors, lengths, more, results, rules, how):
    (q, k, v), (out, kept, dout, dlse), (needs, deterministic, backend, mechanism) = tensors, results, how
    call = _call(tensors, lengths, more, rules, "s" in needs)
    if on_reference(backend, q):
        _check_memory(q=q, k=k, v=v, out=out, dout=dout)
        gradients = reference.gradients
    else:
        _, gradients = launch.passes(False, mechanism, deterministic)
    of_inputs = needs.removesuffix("s")
    dq, dk, dv, *of_others = autograd.computed(None, q, k, v, out, kept, dout, dlse, of_inputs, call, gradients)
    dsinks, *of_captured = of_others or [None]
    return *(_or_nothing(dx, out) for dx in (dq, dk, dv, dsinks)), [of_captured[i].contiguous() for i in _numbers(more[5])]


def _call(tensors, lengths: tuple, more: tuple, rules: tuple, of_sinks: bool = False) -> Call:
    scale, softcap, *window = (x.item() if isinstance(x, torch.Tensor) else x for x in rules)
    q, k, v = tensors
    call = _checked(q, k, v, lengths, scale, window, softcap)
    sinks, call.seed, kinds, captured, text, derived, call.dropout = more
    if sinks is not None:
        check_sinks(sinks, q, call.heads)
        call.sinks = sinks.detach().requires_grad_(of_sinks)
    if kinds is not None:
        # Its lists go with the call: in a CUDA graph's memory they would be a leak, and old when it is replayed.
        call.blocks = BlockMask(kinds, call.seqlen_q, call.seqlen_k)
    if text:
        batch = call.batch
        of_each: tuple[int, int] | None = (call.seqlen_q, call.seqlen_k)
        if (ragged := call.lengths) is not None:
            batch = ragged.count
            equal = ragged.tensors[0] is None
            of_each = (call.seqlen_q // max(batch, 1), call.seqlen_k // max(batch, 1)) if equal else None
        of_captured = _numbers(derived)
        call.captured = tuple(x.detach().requires_grad_(i in of_captured) for i, x in enumerate(captured or ()))
        expression = restored(text, call.captured, batch, call.heads, of_each)
        call.expression = expression.fitting(call)
    return call


def _checked(q, k, v, lengths: tuple, scale, window, softcap) -> Call:
    ragged = any(x is not None for x in lengths)
    call = check_call(q, k, v, scale, False, window, softcap, packed=ragged)
    if ragged:
        call.lengths = check_lengths(q, None, lengths)
    return call


def _check_memory(**tensors: torch.Tensor) -> None:
    for name, x in tensors.items():
        check_memory(name, x)


def _numbers(text: str) -> list[int]:
    """Numbers of captured tensors; a text, since packages of AOTInductor take an empty list for None."""
    return [int(number) for number in text.split()]


def _or_nothing(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``x``, or a tensor of size 0 where nobody asked for it: an operator can't return None."""
    return like.new_empty(0) if x is None else x


# ---- their shapes ----------------------------------------------------------------------------------------------------


def _shapes(tensors, lengths, _, rules, how):
    (q, k, v), (return_lse, for_backward, _, backend, _) = tensors, how
    compiling = torch.compiler.is_compiling()  # an error here would be wrapped in torch's own; one of the running graph is not
    scale, softcap = (None if compiling or isinstance(x, torch.Tensor) else x for x in rules[:2])
    call = _checked(q, k, v, lengths, scale, None, softcap)
    if not on_reference(backend, q):
        check_for_kernels(q.dtype, call)
        for name, x in zip("qkv", tensors, strict=True):
            strides_for_kernels(name, x)
    *batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(*batch, seqlen_q, heads, call.head_dim_v)
    lse, kept = (q.new_empty(*batch, heads, seqlen_q, dtype=exact_dtype(q.dtype)) for _ in range(2))
    return out, _or_nothing(lse if return_lse else None, out), _or_nothing(kept if for_backward else None, out)


def _shapes_of_gradients(tensors, _, more, results, rules, how):
    sinks, _, _, captured, _, derived, _ = more
    named = *zip("qkv", tensors, strict=True), ("s", sinks)
    found = (x.new_empty(x.shape) if name in how[0] else tensors[0].new_empty(0) for name, x in named)
    return *found, [captured[i].new_empty(captured[i].shape) for i in _numbers(derived)]


# ---- their gradients -------------------------------------------------------------------------------------------------


def _keep(ctx, inputs, output):
    (q, k, v), lengths, (sinks, seed, kinds, captured, *ctx.more), ctx.rules, how = _parted(inputs, _FORWARD)
    ctx.return_lse, ctx.for_backward, *ctx.how = how
    out, lse, kept = output
    ctx.mark_non_differentiable(kept) if ctx.return_lse else ctx.mark_non_differentiable(lse, kept)
    autograd.keep(ctx, q, k, v, out, kept, *lengths, sinks, seed, kinds, *(captured or ()))


def _differentiate(ctx, dout, dlse, _):
    needed, first = ctx.needs_input_grad, sum(_FORWARD[:2])
    of_sinks, of_captured = needed[first], needed[first + 3] or []
    given: dict[int, Any] = {}
    if of_captured:  # of a list
        given[first + 3] = [None] * len(of_captured)
    arguments = autograd.arguments_of_gradients(ctx, dout, dlse if ctx.return_lse else None)
    if arguments is not None:
        q, k, v, out, kept, dout, dlse, needs, *others = arguments
        lengths, (sinks, seed, kinds, *captured) = others[: len(NAMES)], others[len(NAMES) :]
        text, derived, p = ctx.more
        numbers = [i for i, x in enumerate(of_captured) if x]
        again = not (ctx.for_backward and set(numbers) <= set(_numbers(derived)))
        derived = " ".join(map(str, numbers)) if again else derived
        inputs = q, k, v, *lengths, sinks, seed, kinds, captured or None, text, derived, p
        if again:  # of a graph that was made where no gradient, or not all of these, were needed
            _, _, kept = _overload("attention", ctx.rules)(*inputs, *ctx.rules, False, True, *ctx.how)
        operator = _overload(f"attention_backward{'_captured' * bool(derived)}", ctx.rules)
        found = operator(*inputs, out, kept, dout, dlse, *ctx.rules, needs + "s" * of_sinks, *ctx.how)
        given |= {i: dx for i, (name, dx) in enumerate(zip("qkv", found, strict=False)) if name in needs}
        given[first] = found[3] if of_sinks else None
        for i, dx in zip(_numbers(derived), found[4] if derived else (), strict=True):
            given[first + 3][i] = dx
    return tuple(given.get(i) for i in range(len(needed)))


# ---- their members' under torch.vmap ---------------------------------------------------------------------------------


def _mapped(operator: Callable) -> Callable:
    """The rule of ``torch.vmap``: the mapped dimension joins the batch, which comes first in all tensors."""

    def rule(info, in_dims, *arguments):
        members = info.batch_size

        def joined(x, dim):
            if not isinstance(x, torch.Tensor) or not x.dim():
                return x
            return (x.expand(members, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        tensors, lengths, (*operands, text, _, _) = _parted(arguments, _FORWARD[:3])
        wrapped.check_mapped(*tensors)
        if text or any(x is not None for x in operands):
            wrapped.refuse_transforms()
        if any(x is not None for x in lengths):
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
    return 2 * _scores(q, k, others[: len(NAMES)]) * (q.shape[-1] + v.shape[-1])


def _flops_of_gradients(q, k, v, *others, **_) -> int:
    """Five products: the scores anew and dQ, dK of one head_dim; dP and dV of the other."""
    return 2 * _scores(q, k, others[: len(NAMES)]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _scores(q, k, lengths: tuple) -> int:
    """How many there are. Lengths are read back; where they have no values, sequences count as equally long."""
    *batch, seqlen_q, heads, _ = q.shape
    seqlen_k = k.shape[-3]
    if batch:
        return heads * batch[0] * seqlen_q * seqlen_k
    ragged = check_lengths(q, None, lengths)
    if wrapped.has_no_values(q):
        return heads * seqlen_q * seqlen_k // max(ragged.count, 1)
    spans = zip(ragged.in_use(0, seqlen_q), ragged.in_use(1, seqlen_k), strict=True)
    return heads * sum((rows.stop - rows.start) * (keys.stop - keys.start) for rows, keys in spans)


# ---- registered ------------------------------------------------------------------------------------------------------


def _register(name: str, sizes: tuple[int, ...], results: int, compute, shapes, flops, differentiate, keep=None) -> None:
    for overload, numbers in _NUMBERS.items():
        operator = name if overload == "default" else f"{name}.{overload}"
        tags = {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides}
        if overload == "Tensor":
            tags.add(torch.Tag.cudagraph_unsafe)
        _LIBRARY.define(operator + _SCHEMAS[name].format(numbers=numbers), tags=tuple(tags))
        _LIBRARY.impl(operator, _of_parts(compute, sizes, results), "CompositeExplicitAutograd")
        operator = f"cute_attn::{operator}"
        torch.library.register_fake(operator, _of_parts(shapes, sizes, results), lib=_LIBRARY)
        torch.library.register_autograd(operator, differentiate, setup_context=keep, lib=_LIBRARY)
        torch.library.register_vmap(operator, _mapped(getattr(getattr(torch.ops.cute_attn, name), overload)), lib=_LIBRARY)
    register_flop_formula(getattr(torch.ops.cute_attn, name), get_raw=True)(flops)


_register("attention", _FORWARD, 3, _forward, _shapes, _flops, _differentiate, _keep)
_of_gradients = _backward, _shapes_of_gradients, _flops_of_gradients, autograd.refuse_double_backward
_register("attention_backward", _BACKWARD, 4, *_of_gradients)
_register("attention_backward_captured", _BACKWARD, 5, *_of_gradients)
