"""Attention for ``torch.autograd``: what is kept from the forward pass, and which gradients are asked for.

The backend comes in as two functions, the reference's or the kernels'. Between the passes only q, k, v, the output and a
number of each row are kept: the backward pass recomputes the scores from them, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import compress, product
from typing import Any

import torch

from cute_attn.arguments import shown
from cute_attn.problem import Call
from cute_attn.wrapped import gradient

_NEEDS = {needed: "".join(compress("qkv", needed)) for needed in product((False, True), repeat=3)}


class Attention(torch.autograd.Function):
    """``(out, lse)`` of q, k, v, both of them differentiable, or out alone where nobody asked for the other; ``others`` are the
    call's sinks and captured tensors.

    ``call.passes`` are two functions. ``forward(q, k, v, call)`` returns ``(out, lse, kept)``, where lse may be None if nobody
    asked for it, and ``kept`` is each row's log-sum-exp once more, in the form in which the backend's backward pass uses it:
    taken there from another, it would be off by a rounding, which large scores turn into probabilities above 1.
    ``gradients(q, k, v, out, kept, dout, dlse, call, needs)`` returns ``(dq, dk, dv, *dothers)``, None for what the string
    ``needs``, part of ``"qkv"``, does not name, and for others that require none; without others it may leave these out.
    ``dlse`` is None where the log-sum-exp was not used; ``dout`` has the dtype of ``out`` and any strides. Needed is what has
    ``requires_grad``: torch doesn't tell which of these inputs ``torch.autograd.grad`` was asked for.
    """

    @staticmethod
    def forward(ctx, q, k, v, call: Call, *others):  # type: ignore[override]
        assert call.passes is not None
        out, lse, kept = call.passes[0](q, k, v, call)
        lengths = () if call.lengths is None else call.lengths.tensors
        if call.plans is None:
            keep(ctx, q, k, v, out, kept, *lengths, *others)
        else:  # what comes back otherwise, those notice who compute
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(q, k, v, out, kept, *lengths)
        call.packs = True  # an operator's results are memory of their own; these needn't be
        ctx.call = call
        return out if lse is None else (out, lse)

    @staticmethod
    def backward(ctx, dout, dlse=None):  # type: ignore[override]
        arguments = arguments_of_gradients(ctx, dout, dlse)
        if arguments is None:
            return (None,) * len(ctx.needs_input_grad)
        call = ctx.call
        if call.lengths is not None or call.others:
            arguments, others = arguments[:8], arguments[8:]
            if call.lengths is not None:
                saved, others = others[:4], others[4:]
                if any(x is not was for x, was in zip(saved, call.lengths.tensors, strict=True)):
                    call = replace(call, lengths=replace(call.lengths, tensors=saved))
            if others:
                call = replace(call, sinks=others[0], captured=others[1:])
        if torch.is_grad_enabled():
            dq, dk, dv, *dothers = _Gradients.apply(*arguments, call, call.passes[1])
        else:  # nobody can differentiate once more, and the function's own cost is spared
            dq, dk, dv, *dothers = computed(ctx, *arguments, call, call.passes[1])  # type: ignore[call-arg]
        return dq, dk, dv, None, *dothers


# Attention.apply without torch's look for transforms of torch.func: for calls that are in none.
differentiable = super(torch.autograd.Function, Attention).apply


def keep(ctx, q, k, v, out, kept, *others) -> None:
    """What :func:`arguments_of_gradients` will need: these, and the lengths of ragged sequences, sinks and captured tensors,
    which torch then knows not to be changed in place."""
    ctx.set_materialize_grads(False)  # an output that nobody used has None for its gradient, not a tensor of zeros
    ctx.save_for_backward(q, k, v, out, kept, *others)
    dtype = q.dtype  # and k's, v's and out's
    ctx.were = q.device, (dtype, dtype, dtype, dtype, kept.dtype, *[x if x is None else x.dtype for x in others])


def arguments_of_gradients(ctx, dout, dlse) -> Any:
    """``(q, k, v, out, kept, dout, dlse, needs, *others kept)``, or None where no gradient is needed or all are zeros."""
    needed = ctx.needs_input_grad
    if not any(needed) or (dout is None and dlse is None):
        return None
    saved = ctx.saved_tensors
    if (were := getattr(ctx, "were", None)) is not None:
        # Hooks that offload or compress what is saved may bring it back elsewhere, or as something else.
        device, dtypes = were
        saved = [
            x if x is None or (x.dtype is dtype and x.device == device) else x.to(device, dtype).requires_grad_(x.requires_grad)
            for x, dtype in zip(saved, dtypes, strict=True)
        ]
    q, k, v, out, kept, *lengths = saved
    needs = _NEEDS[needed[:3]]
    dout = torch.zeros_like(out) if dout is None else gradient("the gradient of out", dout)
    dlse = None if dlse is None else gradient("the gradient of lse", dlse)
    return q, k, v, out, kept, dout, dlse, needs, *lengths


def check_order(call: Call, on_reference: bool, deterministic: bool) -> None:
    """Refuse gradients that are added up in any order, where one is to be fixed: torch fixes its own if it is told to."""
    fixed = torch.are_deterministic_algorithms_enabled()
    if not call.expression or not (deterministic or fixed) or (on_reference and fixed):
        return
    for slot, by in call.expression.derived.items():
        if not by.alone:
            raise NotImplementedError(
                f"a bias or a captured tensor, {shown(call.captured[slot])}, requires a gradient, which is added up in any "
                f"order, and deterministic is True; False is needed: leave it out, or try backend='reference' and "
                f"torch.use_deterministic_algorithms(True), or, of a bias, bias.expand(batch, heads, -1, -1).contiguous()"
            )


def computed(ctx, q, k, v, out, kept, dout, dlse, needs: str, call: Call, gradients: Callable):
    """``gradients(…)`` of :class:`Attention`; zeros where no score was computed."""
    if call.empty:
        if call.kept_for is not None:  # nobody has looked yet at what hooks on saved tensors bring back
            q, k, v = (x.to(*call.kept_for) for x in (q, k, v))
        of_inputs = (x.new_zeros(x.shape) if name in needs else None for name, x in zip("qkv", (q, k, v), strict=True))
        return *of_inputs, *(torch.zeros_like(x) if x is not None and x.requires_grad else None for x in call.others)
    return gradients(q, k, v, out, kept, dout, dlse, call, needs)


def refuse_double_backward(ctx, *_):
    raise RuntimeError(
        "gradients of attention's gradients are asked for (double backward); there are first derivatives only: "
        "try torch.nn.functional.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that differentiating it once more says what to do instead."""

    forward = staticmethod(computed)
    backward = staticmethod(refuse_double_backward)
