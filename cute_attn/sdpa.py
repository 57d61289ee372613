"""torch's ``scaled_dot_product_attention``, computed by cute-attn where it can be.

:func:`scaled_dot_product_attention` has the arguments and the meaning of the function in ``torch.nn.functional``; calls that
can't run here it hands to that one, and :func:`why_not` says why. :func:`replaced` puts it in that one's place, for code that
can't be edited.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from threading import Lock
from typing import Any

import torch
from torch.compiler import is_compiling
from torch.overrides import get_overridable_functions

from cute_attn import autocast, launch, machine, masks
from cute_attn.api import BACKENDS, attention, attention_heads_first
from cute_attn.arguments import choice, shown, unscriptable
from cute_attn.private import any_autocast_enabled, constant_in_graphs, dispatch_modes, dual_level, transforms_active
from cute_attn.problem import (
    ALL_DTYPES,
    DTYPE_NAMES,
    GPU_DTYPES,
    HEAD_DIM_MAX,
    HEAD_DIM_STEP,
    SCALE_MAX,
    SCALE_MIN,
    check_strides,
    strides_for_kernels,
)
from cute_attn.wrapped import TRACED

_torchs = torch.nn.functional.scaled_dot_product_attention
_TORCHS = frozenset({torch.Tensor, torch.nn.Parameter})
_TAKEN = _TORCHS.union(TRACED)
_lock = Lock()
_active: list[Any] = []  # the name's values: what was there, then those of the blocks that are open


@unscriptable
def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    *, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """``softmax(scale · query keyᵀ) value``, as :func:`torch.nn.functional.scaled_dot_product_attention` defines it.

    CUDA tensors of float16 and bfloat16 run cute-attn's kernels; what these can't compute (:func:`why_not` says why) goes to
    torch's function with the same arguments, and so do CPU tensors, for which it is the faster one. So wrong arguments get
    torch's errors.

    Args:
        query: ``(…, heads, seqlen_q, head_dim)``, with one dimension before heads, several, or none.
        key: ``(…, heads_kv, seqlen_k, head_dim)``. Heads are those of query, or one, or, with ``enable_gqa``, a divisor.
        value: ``(…, heads_kv, seqlen_k, head_dim_v)``.
        attn_mask: ``None``, or a tensor that broadcasts to ``(…, heads, seqlen_q, seqlen_k)``: bools say which keys a
            query sees, floats, of query's dtype, are added to the scores and get a gradient.
        dropout_p: the probability of dropping one, from 0 to below 1, drawn as :func:`cute_attn.attention` does.
        is_causal: query i sees the keys up to i (**top-left**), also where the lengths differ.
        scale: ``None`` is 1/√head_dim.
        enable_gqa: query head h reads key head ``h // (heads / heads_kv)``.
        backend: ``"auto"`` as above, or ``"reference"``: :func:`cute_attn.attention`'s reference, on any device.

    Returns:
        ``(…, heads, seqlen_q, head_dim_v)``, a view of memory in which heads come after seqlen.

    There are first derivatives only: for those of gradients call torch's function.
    """
    if any_autocast_enabled():
        query, key, value, attn_mask = map(autocast.cast, (query, key, value, attn_mask))
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    if _is_usual(*arguments, backend):
        try:  # what attention's own checks refuse is looked at afterwards
            return attention_heads_first(query, key, value, scale, is_causal)
        except (TypeError, ValueError, NotImplementedError):
            if why_not(*arguments, backend=backend) is None:
                raise
    elif why_not(*arguments, backend=backend) is None:
        backend = "cute" if backend == "auto" else backend
        return _attend(query, key, value, attn_mask, float(dropout_p), is_causal, scale, backend)
    return _torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _is_usual(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend) -> bool:
    """Whether attention's checks are all that an eager call needs, which spares it those of :func:`why_not`."""
    try:
        return (
            attn_mask is None
            and dropout_p == 0.0
            and type(dropout_p) is float
            and backend == "auto"
            and type(is_causal) is type(enable_gqa) is bool
            and (scale is None or type(scale) is float)
            and query.is_cuda
            and type(query) in _TORCHS
            and type(key) in _TORCHS
            and type(value) in _TORCHS
            and not (is_compiling() or transforms_active() or dispatch_modes())
            and len(shape := query.shape) == 4
            and (shape[1] == key.shape[1] or enable_gqa)
            and not (is_causal and shape[2] != key.shape[2])
        )
    except (AttributeError, IndexError, RuntimeError):  # not tensors, other dimensions, nested tensors
        return False


def _attend(query, key, value, attn_mask, dropout_p: float, is_causal: bool, scale, backend: str) -> torch.Tensor:
    """Attention of tensors ``(…, heads, seqlen, head_dim)``."""
    dims = query.dim()
    if dims != 4:
        leading = query.shape[:-3]
        if attn_mask is not None and attn_mask.dim() > 3:  # of 3 dimensions or fewer it is the same for all
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).reshape(-1, *attn_mask.shape[-3:])
        query, key, value = (x.unsqueeze(0) if dims == 3 else x.flatten(0, -4) for x in (query, key, value))
    window: Any = None
    if is_causal and (extra := query.shape[2] - key.shape[2]):
        # Attention aligns the last query with the last key. Of more keys, those past the last query's nobody sees; of more
        # queries, each sees as many keys past the one that it is aligned with.
        if extra < 0:
            key, value = (x.narrow(2, 0, query.shape[2]) for x in (key, value))
        else:
            window, is_causal = (None, extra), False
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    rules: dict[str, Any] = {} if attn_mask is None else {"bias": attn_mask}
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        rules = {"mask": masks.given(attn_mask)}
    out: Any = attention(
        query, key, value, scale=scale, causal=is_causal, window=window, backend=backend, dropout_p=dropout_p, **rules
    )
    out = out.transpose(1, 2)
    return out if dims == 4 else out.view(*leading, *out.shape[1:])


def why_not(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    *, backend: str = "auto",
) -> str | None:  # fmt: skip
    """Why :func:`scaled_dot_product_attention` hands a call with these arguments to torch's function: a sentence that says what
    was got, what is needed, and what to try. ``None`` where it computes the call itself. Nothing is computed or compiled.

    Raises:
        TypeError, ValueError: a ``backend`` that there isn't; torch's function has no such argument.
    """
    if any_autocast_enabled():
        query, key, value, attn_mask = map(autocast.cast, (query, key, value, attn_mask))
    backend = choice("backend", backend, BACKENDS)
    if type(dropout_p) not in (float, int) or not 0.0 <= dropout_p < 1.0:
        return f"dropout_p is {shown(dropout_p)}; a number from 0.0 to below 1.0 is needed: try 0.0 in evaluation"
    if attn_mask is not None and is_causal:
        return "attn_mask is given and is_causal is True; one of the two is needed: leave out is_causal"
    if not type(is_causal) is type(enable_gqa) is bool:
        return f"is_causal is {shown(is_causal)} and enable_gqa {shown(enable_gqa)}; bools are needed: try bool(is_causal)"
    if scale is not None and not _is_scale(scale):
        return f"scale is {shown(scale)}; a float from {SCALE_MIN:g} to {SCALE_MAX:g} is needed: try None, for 1/√head_dim"
    if not (type(query) in _TAKEN and type(key) in _TAKEN and type(value) in _TAKEN):
        kinds = ", ".join(type(x).__name__ for x in (query, key, value))
        return f"query, key, value are of the types {kinds}; torch.Tensor is needed: pass what they wrap"
    if transforms_active() or dual_level() >= 0:
        return "torch.func transforms the call, or forward mode differentiates it; neither is needed: try torch.autograd.grad"
    try:
        (*batch, heads, _, head_dim), (*batch_k, heads_k, seqlen_k, head_dim_k) = query.shape, key.shape
        *batch_v, heads_v, seqlen_v, head_dim_v = value.shape
        dtype, device = query.dtype, query.device
        fits = (
            batch == batch_k == batch_v
            and heads_k == heads_v
            and (heads == heads_k or heads_k == 1 or (enable_gqa and heads_k and not heads % heads_k))
            and seqlen_k == seqlen_v
            and head_dim == head_dim_k
            and head_dim
            and head_dim_v
            and dtype is key.dtype is value.dtype
            and device == key.device == value.device
            and query.layout is key.layout is value.layout is torch.strided
        )
    except (ValueError, RuntimeError):  # fewer dimensions, nested tensors
        fits = False
    if not fits:
        return (
            f"query, key, value are {shown(query)}, {shown(key)}, {shown(value)}; (…, heads, seqlen, head_dim) of one dtype, "
            f"device and batch are needed, where heads of key and value are those of query, or 1, or a divisor with "
            f"enable_gqa: try expand"
        )
    if attn_mask is not None and (why := _why_no_mask(attn_mask, query, seqlen_k)) is not None:
        return why
    if backend == "reference":
        return None if dtype in ALL_DTYPES else f"dtype is {dtype}; {_dtypes(ALL_DTYPES)} is needed: try .to(torch.bfloat16)"
    if not query.is_cuda:
        return f"query lies on {device}, where torch's function is the faster one; CUDA is needed: try backend='reference'"
    if dtype not in GPU_DTYPES:
        return f"dtype is {dtype}; {_dtypes(GPU_DTYPES)} is needed: try .to(torch.bfloat16)"
    if head_dim % HEAD_DIM_STEP or head_dim_v % HEAD_DIM_STEP or max(head_dim, head_dim_v) > HEAD_DIM_MAX:
        return (
            f"head_dim is {head_dim} and head_dim_v {head_dim_v}; multiples of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX} are "
            f"needed: pad with torch.nn.functional.pad"
        )
    if (why := _why_unreadable(query, key, value)) is not None:
        return why
    return _without_kernels(query.get_device())


def _why_no_mask(x, query: torch.Tensor, seqlen_k: int) -> str | None:
    """Why a mask is none that is added or that hides."""
    hint, where = "torch.tensor(attn_mask)", ""
    if isinstance(x, torch.Tensor):
        hint, where = "unsqueeze for dimensions that are missing", f" on {x.device}"
    try:
        whole = torch.broadcast_shapes(x.shape, shape := (*query.shape[:-1], seqlen_k))
        if type(x) in _TAKEN and x.dtype in (torch.bool, query.dtype) and x.device == query.device and whole == shape:
            empty = not x.numel() or x.layout is not torch.strided
            return "attn_mask is empty or sparse; a dense one is needed: try None" if empty else None
        if whole == shape:
            hint = ".to(query.dtype)" if x.device == query.device else ".to(query.device)"
    except (AttributeError, RuntimeError):  # no tensor, other shapes
        pass
    return (
        f"attn_mask is {shown(x)}{where}; a tensor that broadcasts to (…, heads, seqlen_q, seqlen_k), of torch.bool or "
        f"{query.dtype}, on {query.device} is needed: try {hint}"
    )


def _is_scale(scale: object) -> bool:
    """Whether a scale is a number that the kernels take. torch.compile may have a symbol for it: the operator looks at that."""
    if isinstance(scale, bool) or not isinstance(scale, (float, int)):
        return False
    return is_compiling() or SCALE_MIN <= scale <= SCALE_MAX


def _why_unreadable(query, key, value) -> str | None:
    """Why the kernels can't read one of the tensors in place, if they can't. What is traced has no address, but strides."""
    check = strides_for_kernels if is_compiling() or isinstance(query, TRACED) else check_strides
    for name, x in (("query", query), ("key", key), ("value", value)):
        try:
            check(name, x)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
    return None


@constant_in_graphs
def _without_kernels(device: int) -> str | None:
    """Why a GPU runs no kernels, if it runs none."""
    return _looked_at(device)


@lru_cache(maxsize=64)
def _looked_at(device: int) -> str | None:
    name, why = machine.backend()
    if name == "reference":
        return why
    try:
        launch.device_target(device)
    except NotImplementedError as error:
        return str(error)
    return None


def _dtypes(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)


# ---- in the place of torch's -----------------------------------------------------------------------------------------


@contextmanager
def replaced(backend: str = "auto") -> Iterator[None]:
    """Put :func:`scaled_dot_product_attention`, with this ``backend``, in the place of torch's function, for code that can't be
    edited: ``with cute_attn.sdpa.replaced(): model(x)``, or as a decorator.

    What is replaced is the name in ``torch.nn.functional``, and so for **all threads**. Blocks may be nested, and may overlap
    in threads: the one that was entered last counts, and after the last one the name is what it was. What torch.compile has
    compiled outside is compiled anew where it is called in a block; but ``torch.nn.MultiheadAttention`` keeps the function that
    it was compiled with. Not affected are code that has imported the function by its name (``from torch.nn.functional import
    scaled_dot_product_attention``) and C++ (the fast path of ``torch.nn.TransformerEncoder``).

    Raises:
        TypeError, ValueError: a ``backend`` that there isn't.
    """
    backend = choice("backend", backend, BACKENDS)

    @wraps(scaled_dot_product_attention)
    def replacement(*arguments, **options):
        return scaled_dot_product_attention(*arguments, **options, backend=backend)

    get_overridable_functions()  # torch lists its functions once, when torch.compile first asks: not with this one among them
    with _lock:
        if not _active:
            _active.append(torch.nn.functional.scaled_dot_product_attention)
        _active.append(replacement)
        torch.nn.functional.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        with _lock:
            _active.remove(replacement)
            torch.nn.functional.scaled_dot_product_attention = _active[-1]
            if len(_active) == 1:
                _active.clear()
