"""Attention for ``torch.autograd``: what is kept from the forward pass, and which gradients are asked for.

The backend comes in as two functions, the reference's or the kernels'. Between the passes only q, k, v, the output and a
number of each row are kept: the backward pass recomputes the scores from them, tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cute_attn.problem import Call
from cute_attn.wrapped import gradient


class Attention(torch.autograd.Function):
    """``(out, lse)`` of q, k, v, both of them differentiable.

    ``forward(q, k, v, call)`` returns ``(out, lse, kept)``, where lse may be None if nobody asked for it, and ``kept`` is each
    row's log-sum-exp once more, in the form in which the backend's backward pass uses it: taken there from another, it would
    be off by a rounding, which large scores turn into probabilities above 1. ``gradients(q, k, v, out, kept, dout, dlse, call,
    needs)`` returns ``(dq, dk, dv)``, None for what the string ``needs``, part of ``"qkv"``, does not name. ``dlse`` is None
    where the log-sum-exp was not used; ``dout`` has the dtype of ``out`` and any strides. Needed is what has
    ``requires_grad``: torch doesn't tell which of these inputs ``torch.autograd.grad`` was asked for.
    """

    @staticmethod
    def forward(ctx, q, k, v, call: Call, forward: Callable, gradients: Callable):  # type: ignore[override]
        out, lse, kept = forward(q, k, v, call)
        if call.lengths is None:
            keep(ctx, q, k, v, out, kept)
        else:
            keep(ctx, q, k, v, out, kept, *call.lengths.tensors)
        call.packs = True  # an operator's results are memory of their own; these needn't be
        ctx.call, ctx.gradients = call, gradients
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        arguments = arguments_of_gradients(ctx, dout, dlse)
        if arguments is None:
            return (None,) * 6
        call = ctx.call
        if call.lengths is not None:
            arguments, lengths = arguments[:-4], arguments[-4:]
            call = replace(call, lengths=replace(call.lengths, tensors=lengths))
        return *_Gradients.apply(*arguments, call, ctx.gradients), None, None, None


def keep(ctx, *tensors) -> None:
    """What :func:`arguments_of_gradients` will need: q, k, v, out, kept, and the lengths of ragged sequences, which torch then
    knows not to be changed in place."""
    ctx.set_materialize_grads(False)  # an output that nobody used has None for its gradient, not a tensor of zeros
    ctx.save_for_backward(*tensors)
    ctx.were = [None if x is None else (x.device, x.dtype) for x in tensors]


def arguments_of_gradients(ctx, dout, dlse) -> tuple | None:
    """``(q, k, v, out, kept, dout, dlse, needs, *lengths)``, or None where no gradient is needed or all are zeros."""
    needs = "".join(name for name, needed in zip("qkv", ctx.needs_input_grad, strict=False) if needed)
    if not needs or (dout is None and dlse is None):
        return None
    q, k, v, out, kept, *lengths = map(_restored, ctx.saved_tensors, ctx.were)
    dout, dlse = gradient("the gradient of out", dout), gradient("the gradient of lse", dlse)
    return q, k, v, out, kept, torch.zeros_like(out) if dout is None else dout, dlse, needs, *lengths


def _restored(x: Any, was: Any) -> Any:
    """A saved tensor where and as it was: hooks that offload or compress what is saved may bring it back otherwise."""
    return x if x is None or (x.device, x.dtype) == was else x.to(*was)


def computed(ctx, q, k, v, out, kept, dout, dlse, needs: str, call: Call, gradients: Callable):
    """``gradients(…)`` of :class:`Attention`; zeros where no score was computed."""
    if call.empty:
        return tuple(x.new_zeros(x.shape) if name in needs else None for name, x in zip("qkv", (q, k, v), strict=True))
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
