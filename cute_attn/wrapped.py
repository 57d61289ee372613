"""Tensors that stand for others: those of ``torch.distributed``, ``torch.nested`` and ``torch.func``, and those without values.

They have no address that a kernel could read. Attention of what ``torch.distributed`` and ``torch.nested`` wrap is attention of
what is inside, wrapped again; what ``torch.vmap`` maps, what is traced, and tensors with a shape and no values go to the
operators of ``ops.py``. Other classes of tensors with a ``__torch_dispatch__`` are refused in words. Nothing here imports
``torch.distributed``: who passes one of its tensors has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch

from cute_attn.arguments import check_layout, check_memory, computes_in_its_own_way, shown
from cute_attn.lengths import NAMES, Lengths
from cute_attn.private import COLLECTIVES, FakeTensor, FunctionalTensor, is_batched, is_transformed, ragged_dim
from cute_attn.problem import Call, check_call

TRACED = (FakeTensor, FunctionalTensor)  # torch's own, with which it finds out what is computed
DTENSORS = "torch.distributed.tensor"


def handler(q, k, v, **lengths) -> Callable | None:
    """The function that calls ``attention`` on what is inside q, k, v and wraps what it returns; None where they, and the
    ``lengths``, are what is to be read. It takes ``(attention, q, k, v, rules, others)``: the keywords of ``check_call``, and
    the remaining ones. ``attention`` is the function that was called; for :func:`nested` it is ``attention_varlen``."""
    tensors = {name: x for name, x in {"q": q, "k": k, "v": v, **lengths}.items() if isinstance(x, torch.Tensor)}
    if "cu_seqlens_q" not in lengths and any(x.is_nested for x in tensors.values()):
        return nested
    if any(_is(x, COLLECTIVES, "AsyncCollectiveTensor") for x in tensors.values()):
        return _waited
    if any(map(is_dtensor, tensors.values())):
        return _sharded
    for name, x in tensors.items():
        if isinstance(x, torch.masked.MaskedTensor):
            raise TypeError(
                f"{name} is a MaskedTensor; a plain tensor is needed, as attention has no mask of elements: try "
                f"{name}.to_tensor(0.0), with causal and window for which keys a query sees"
            )
        if computes_in_its_own_way(type(x)) and not x.is_nested and not isinstance(x, TRACED):
            raise TypeError(
                f"{name} is a {type(x).__name__}, a subclass of torch.Tensor with a __torch_dispatch__; a tensor that holds "
                f"its values itself, a DTensor or the result of a collective is needed: pass the one that {name} wraps"
            )
    return None


def gradient(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of an output as the backward pass can read it: it may come from a collective, too."""
    if x is None or torch.compiler.is_compiling():
        return x
    if type(x) is torch.Tensor and x.is_cuda and not is_transformed(x) and _has_memory(x):  # the usual case
        return x
    if has_no_values(x):
        return x
    if type(x) is not torch.Tensor:
        x = finished(x)
    try:
        check_memory(name, x)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{name} stands for several gradients at once (is_grads_batched=True, jacobian(vectorize=True), or torch.vmap); "
            f"attention's backward pass takes one: try them one by one, or vectorize=False"
        ) from error
    return x


def _has_memory(x: torch.Tensor) -> bool:
    """Whether a tensor has an address, for which torch raises where there is no storage."""
    try:
        return bool(x.data_ptr())
    except RuntimeError:
        return False


def finished(x):
    """``x``, or the result that it stands for if an asynchronous collective computes it: kernels to come wait for it."""
    if _is(x, COLLECTIVES, "AsyncCollectiveTensor"):
        return sys.modules[COLLECTIVES].wait_tensor(x)
    return x


def _is(x: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)


def is_dtensor(x: object) -> bool:
    """Whether a tensor is a shard of another, or stands for one that is replicated."""
    return _is(x, DTENSORS, "DTensor")


def _waited(attention: Callable, q, k, v, rules: dict, others: dict):
    return attention(finished(q), finished(k), finished(v), **rules, **{name: finished(x) for name, x in others.items()})


# ---- shards ----------------------------------------------------------------------------------------------------------


def _sharded(attention: Callable, q, k, v, rules: dict, others: dict):
    """Attention of DTensors, shard by shard. What is refused is refused on every rank alike: none is left waiting."""
    if any(name in others for name in NAMES):
        raise TypeError(
            "DTensors are given with cu_seqlens or seqused, or as these; tensors of each rank's own are needed there: try "
            "x.to_local() of all, where whole sequences or heads are sharded"
        )
    distributed = sys.modules[DTENSORS]
    if not all(isinstance(x, distributed.DTensor) for x in (q, k, v)):
        raise TypeError(
            f"q, k, v are a {', a '.join(type(x).__name__ for x in (q, k, v))}; DTensors or none is needed: try "
            f"DTensor.from_local, or q.full_tensor()"
        )
    if not q.device_mesh == k.device_mesh == v.device_mesh:
        raise ValueError(
            f"q, k, v lie on the meshes {q.device_mesh}, {k.device_mesh}, {v.device_mesh}; one is needed: redistribute them"
        )
    call = check_call(q, k, v, **rules)
    those = distributed.Shard(0), distributed.Shard(2), distributed.Replicate()
    if not (q.placements == k.placements == v.placements and all(placement in those for placement in q.placements)):
        raise ValueError(
            f"q, k, v have the placements {q.placements}, {k.placements}, {v.placements}; Shard(0), the batch, Shard(2), the "
            f"heads, or Replicate() is needed on each dimension of the mesh, alike for all three: try "
            f"x.redistribute(placements=…) of each"
        )
    return of_shards(partial(attention, **rules, **others), q, k, v, call)


def of_shards(attention: Callable, q, k, v, call: Call):
    """The DTensors of which ``attention`` of the shards of q, k and v returns the shards: the output, or ``(out,
    lse)``. ``call`` is that of all. Refuses shards of q, by heads, that don't find theirs of k."""
    distributed = sys.modules[DTENSORS]
    mesh, placements = q.device_mesh, q.placements
    shards = math.prod([mesh.size(i) for i, placement in enumerate(placements) if placement == distributed.Shard(2)])
    if call.heads != call.heads_kv and call.heads_kv % shards:
        raise ValueError(
            f"k has {call.heads_kv} heads in {shards} shards; a multiple is needed where q has more heads (GQA), so that each "
            f"shard of q finds its heads of k: shard the batch, or repeat k's and v's heads"
        )

    def whole(local, placements, *shape):
        stride = torch.empty(shape, device="meta").stride()
        return distributed.DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    results = attention(*(x.to_local() for x in (q, k, v)))
    shape = call.batch, call.seqlen_q, call.heads, call.head_dim_v
    if not isinstance(results, tuple):
        return whole(results, placements, *shape)
    turned = {distributed.Shard(1): distributed.Shard(2), distributed.Shard(2): distributed.Shard(1)}  # (batch, heads, rows)
    of_lse = [turned.get(placement, placement) for placement in placements]
    return whole(results[0], placements, *shape), whole(results[1], of_lse, call.batch, call.heads, call.seqlen_q)


# ---- nested tensors --------------------------------------------------------------------------------------------------


def nested(varlen: Callable, q, k, v, rules: dict, others: dict):
    """Attention of jagged tensors ``(batch, seqlen, heads, head_dim)``, by ``attention_varlen`` of their values and offsets;
    results are such tensors, of q's lengths. Rows that ``torch.nested.narrow`` leaves out are not in use."""
    tensors = {"q": q, "k": k, "v": v}
    if not all(isinstance(x, torch.Tensor) and x.layout is torch.jagged for x in tensors.values()):
        kinds = [f"{x.layout}, nested" if isinstance(x, torch.Tensor) and x.is_nested else shown(x) for x in tensors.values()]
        raise TypeError(
            f"q, k, v are {'; '.join(kinds)}; nested tensors of layout torch.jagged are needed, or none: try "
            f"torch.nested.nested_tensor(…, layout=torch.jagged) of each, or attention_varlen"
        )
    if any(name in others for name in NAMES):
        raise TypeError(
            "seqused_q or seqused_k is given with nested tensors; nothing but the lengths that these have is needed: try "
            "torch.nested.narrow where rows are not in use"
        )
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    for name, x in tensors.items():
        if x.dim() != 4 or ragged_dim(x) != 1:
            raise ValueError(
                f"{name} has shape {shapes[name]} with lengths in dimension {ragged_dim(x)}; (batch, seqlen, heads, head_dim), "
                f"with lengths in dimension 1, is needed: try {name}.transpose(1, 2)"
            )
    # By their lengths, if they have some, torch says which shapes are equal, and not by where these begin.
    apart = k.lengths() is not None and k.offsets() is not v.offsets()
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or apart:
        raise ValueError(
            f"q, k, v have shapes {shapes['q']}, {shapes['k']}, {shapes['v']}; one batch, and the same offsets of k and v, are "
            f"needed: try torch.nested.nested_tensor_from_jagged(v.values(), k.offsets(), k.lengths())"
        )
    cu_seqlens = [x.offsets().int() for x in (q, k)]
    seqused = [None if x.lengths() is None else x.lengths().int() for x in (q, k)]
    lengths = dict(zip(NAMES, (*cu_seqlens, *seqused), strict=True))
    before_q, before_k = map(_before, (q, k))
    values = _with_gradients(q, before_q), _with_gradients(k, before_k), _with_gradients(v, before_k)
    results = varlen(*values, **lengths, **rules, **others)

    def like_q(values, dim):
        if before_q is not None:
            values = values.masked_fill(before_q, 0.0) if dim == 1 else values.masked_fill(before_q[:, 0, 0], -torch.inf)
        return torch.nested.nested_tensor_from_jagged(values, q.offsets(), q.lengths(), jagged_dim=dim)

    return (like_q(results[0], 1), like_q(results[1], 2)) if isinstance(results, tuple) else like_q(results, 1)


def _before(x) -> torch.Tensor | None:
    """Which rows of a jagged tensor's values come before its first sequence, ``(rows, 1, 1)``: those are no sequence's, and
    kernels write nothing there. None where there are none: they are what ``torch.nested.narrow`` has left out."""
    if x.lengths() is None:
        return None
    values = x.values()
    return (torch.arange(values.shape[0], device=values.device) < x.offsets()[0])[:, None, None]


def _with_gradients(x, before: torch.Tensor | None) -> torch.Tensor:
    """A jagged tensor's values, whose gradient is zeros in the rows ``before``."""
    values = x.values()
    if before is None or not (values.requires_grad and torch.is_grad_enabled()):
        return values
    return values.masked_fill(before, 0.0)


# ---- what the operators get -------------------------------------------------------------------------------------------


def are_read(q, k, v, lengths: Lengths | None) -> bool:
    """Whether the inputs, which ``check_call`` has passed, are what is to be read: they have values of their own, and not just
    shapes as fake and meta tensors do, and nothing traces them or maps them. Refuses what can't be read at all.
    """
    tensors = {"q": q, "k": k, "v": v}
    if lengths is not None:
        tensors.update((name, x) for name, x in zip(NAMES, lengths.tensors, strict=True) if x is not None)
    if any(is_batched(x) or isinstance(x, FunctionalTensor) for x in tensors.values()):
        return False
    shapes = [x.is_meta or isinstance(x, FakeTensor) for x in tensors.values()]
    if not any(shapes):
        for name, x in tensors.items():
            check_memory(name, x)
        return True
    if not all(shapes):
        raise TypeError(
            f"{', '.join(tensors)} are a {', a '.join(type(x).__name__ for x in tensors.values())}; all or none with values is "
            f"needed: try fake_mode.from_tensor of the others"
        )
    return False


def check_read(**tensors: torch.Tensor | None) -> None:
    """Refuse what isn't None and has no values of its own, where no operator takes its place."""
    for name, x in tensors.items():
        if x is None:
            continue
        check_layout(name, x)
        if x.is_meta or computes_in_its_own_way(type(x)):
            raise TypeError(
                f"{name} is a {type(x).__name__} on {x.device}, without values or with another tensor's; a tensor that holds "
                f"its values itself is needed: pass one on a CPU or a GPU, or what {name} wraps, as x.to_local() of a DTensor"
            )
        check_memory(name, x)


def check_transforms(q, k, v, differentiated: bool) -> None:
    """Refuse transforms of ``torch.func`` other than ``torch.vmap``."""
    compiling = torch.compiler.is_compiling()  # which tells what is mapped from the rest, and no more of it
    if (differentiated or compiling) and not any(map(is_batched, (q, k, v))):
        raise NotImplementedError(
            "gradients are asked for inside a transform of torch.func; attention has them for torch.autograd only: "
            "try torch.autograd.grad, or torch.nn.functional.scaled_dot_product_attention"
        )
    if not compiling:
        check_mapped(q, k, v)


def refuse_transforms() -> NoReturn:
    raise NotImplementedError(
        "mask, score, alibi_slopes, bias, sinks, dropout_p or block_mask are given inside a transform of torch.func, such as "
        "torch.vmap; a plain call is needed, whose batch the mapped dimension joins: try flatten(0, 1) of q, k and v"
    )


def has_no_values(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape only, or torch traces what is done with it."""
    return x.is_meta or isinstance(x, TRACED)


def check_mapped(q, k, v) -> None:
    """Refuse what is inside of a transform of ``torch.func`` other than ``torch.vmap``."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if is_transformed(x) and not is_batched(x):
            check_memory(name, x)


def check_device(q) -> None:
    """Refuse to differentiate what torch.autograd can't: it would end the process."""
    if isinstance(q, FakeTensor) and q.is_cuda and not torch.cuda.is_available():
        raise NotImplementedError(
            "gradients of fake CUDA tensors are asked for where there is no CUDA; torch's autograd needs the device's stream: "
            "try torch.no_grad(), or tensors on the device 'meta'"
        )
