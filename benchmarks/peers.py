"""Who is measured: one short function per peer.

A peer's function gets a case and the tensors ``q``, ``k``, ``v``, each ``(batch, seqlen, heads, head_dim)``. It returns
what is to be timed: a function without arguments that returns the output, differentiable by ``torch.autograd`` if it is
to take part in backward cases too. Whatever can be done ahead of a call (imports, transposed views, block masks) belongs
in front of it. It raises :class:`UnsupportedError` for a case that its library doesn't compute. To add one, here or in a
module named by ``--peers-from``::

    @peer("mine", "what it is, and whose", needs="my_package:attention")
    def mine(case, q, k, v):
        from my_package import attention
        return lambda: attention(q, k, v, causal=case.causal)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

from benchmarks.cases import DIRECTIONS, Case

Build = Callable[[Case, Any, Any, Any], Callable[[], Any]]


class UnsupportedError(Exception):
    """The peer's library doesn't compute this case; the message says what is missing."""


@dataclass(frozen=True)
class Peer:
    """A peer and when it takes part.

    ``needs`` is ``module:attribute``, imported to see whether it is there. ``devices`` are where it takes part unasked.
    ``heads_first``: its output is ``(batch, heads, seqlen, head_dim)``. ``slow_start``: it compiles for many seconds
    per case, so ``--quick`` leaves it out. ``host_only``: it takes part only where the host's cost is measured.
    ``directions`` are the ones it takes part in. ``repeatable``: it promises the same bits at every call, which is
    checked. ``zeros``: rows not in use are zeros in its outputs and gradients, which is checked. ``unpadded``: of a padded
    rectangle it gets the rows in use alone. ``compiles``: what has a kernel of its own that its library compiles and keeps
    on disk, ``"rules"`` (any two lengths share it), ``"case"``, or nothing. ``around`` makes a context that is entered for
    each of its turns.
    """

    name: str
    about: str
    build: Build
    needs: str
    devices: tuple[str, ...] = ("cuda",)
    heads_first: bool = False
    slow_start: bool = False
    host_only: bool = False
    directions: tuple[str, ...] = DIRECTIONS
    repeatable: bool = False
    zeros: bool = False
    unpadded: bool = False
    compiles: str = ""
    around: Callable[[], AbstractContextManager] = nullcontext

    def why_not(self) -> str | None:
        """Why this peer can't take part, or ``None`` when it can."""
        module, _, attribute = self.needs.partition(":")
        try:
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # an extension module built for another torch raises all sorts of things
            return f"{self.needs} can't be imported: {type(error).__name__}: {error}".splitlines()[0]
        return None

    def to_bshd(self, tensor: Any) -> Any:
        """The peer's own layout to ``(batch, seqlen, heads, head_dim)``, or back: the same swap."""
        return tensor.transpose(1, 2) if self.heads_first else tensor


REGISTRY: dict[str, Peer] = {}


def peer(name: str, about: str, *, needs: str, **when: Any) -> Callable[[Build], Build]:
    """Registers what it decorates, or is called with."""

    def register(build: Build) -> Build:
        REGISTRY[name] = Peer(name, about, build, needs, **when)
        return build

    return register


def choose(
    names: Iterable[str] | None, device: str, kind: str, *, quick: bool = False
) -> tuple[list[Peer], dict[str, str]]:
    """The peers that take part in a kind of measurement, and the missing ones, each with its reason.

    ``names`` asks for exactly these, whatever they take part in by themselves; ``None`` for all that can.
    """
    wanted = list(REGISTRY) if names is None else list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in REGISTRY]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; known: {', '.join(REGISTRY)}")
    chosen, missing = [], {}
    for candidate in (REGISTRY[name] for name in wanted):
        if names is None:
            if device not in candidate.devices or (candidate.host_only and kind not in ("host", "first")):
                continue
            if quick and candidate.slow_start:
                missing[candidate.name] = (
                    "compiles for many seconds per case; --quick leaves it out: ask for it by --peers"
                )
                continue
        reason = candidate.why_not()
        if reason is None:
            chosen.append(candidate)
        else:
            missing[candidate.name] = reason
    return chosen, missing


# --- ours ------------------------------------------------------------------------------------------------------------


def _rules(case: Case) -> dict[str, Any]:
    """A case's rules as attention() takes them."""
    return {"causal": case.causal, "window": case.window, "softcap": case.softcap}


def check_ours(case: Case, on_gpu: bool) -> None:
    """Raise ``ValueError`` for a case that attention() doesn't take, by its own checks, on tensors without elements."""
    import torch

    from cute_attn.problem import check_call, check_tensors_for_gpu

    q, k, v = (torch.empty((0, *case.shape_of(name)[1:]), dtype=getattr(torch, case.dtype)) for name in "qkv")
    if case.packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    call = check_call(q, k, v, scale=None, **_rules(case), packed=bool(case.packed))
    if on_gpu:
        check_tensors_for_gpu(q, k, v, call)


def _ours(case: Case, q, k, v, **how):
    from cute_attn import attention, attention_varlen, layouts

    if q.is_cuda and "mechanism" in how:
        import torch

        target = layouts.target_of(torch.cuda.get_device_capability(q.device))
        if how["mechanism"] not in layouts.for_target(target).MECHANISMS:
            raise UnsupportedError(f"{target} has no {how['mechanism']}")
    rules = _rules(case) | how | rows_in_use(case, q.device)
    if case.packed:
        bounds = bounds_of(case, q.device)
        return lambda: output_of(attention_varlen(*without_batch(q, k, v), bounds, **rules)).unsqueeze(0)
    return lambda: attention(q, k, v, **rules)


def output_of(result) -> Any:
    """Of what some functions, or versions of them, return with the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def without_batch(q, k, v) -> tuple[Any, Any, Any]:
    """Tensors without the dimension of their one batch element, for functions of packed sequences. Not ``q[0]``, whose gradient
    is zeros and a copy, in kernels that would be timed with the backward pass."""
    return q.squeeze(0), k.squeeze(0), v.squeeze(0)


def bounds_of(case: Case, device) -> Any:
    """``cu_seqlens`` of packed sequences: where each begins, and where the last ends."""
    import torch

    return torch.tensor([0, *accumulate(case.packed)], dtype=torch.int32, device=device)


def rows_in_use(case: Case, device) -> dict[str, Any]:
    """A padded rectangle's ``seqused``, as ours and FlashAttention-4's functions take them."""
    import torch

    if not case.used:
        return {}
    return dict.fromkeys(("seqused_q", "seqused_k"), torch.full((case.batch,), case.used, dtype=torch.int32, device=device))


OURS: dict[str, Any] = {"needs": "cute_attn:attention", "compiles": "rules", "zeros": True}
RECTANGLE = "cute_attn, mechanism tma_wgmma, packed sequences of one length, or padded ones' rows in use, as a rectangle"
# The forward pass is the default's; what determinism costs, the backward pass alone shows.
DETERMINISTIC: dict[str, Any] = {**OURS, "directions": ("backward",), "repeatable": True}


peer("ours", "cute_attn.attention, as a user calls it", **OURS, devices=("cuda", "cpu"), host_only=True)(_ours)
peer("ours_tma_wgmma", "cute_attn, mechanism tma_wgmma", **OURS)(partial(_ours, mechanism="tma_wgmma"))


@peer("ours_rectangle", RECTANGLE, **OURS, devices=(), unpadded=True)
def ours_rectangle(case, q, k, v):
    if case.used:
        return _ours(case.in_use, q, k, v, mechanism="tma_wgmma")
    if len(set(case.packed)) != 1:
        raise UnsupportedError("it is here for packed sequences of one length, and for padded ones")
    length = case.packed[0]
    q, k, v = (x.unflatten(0, (-1, length)) for x in without_batch(q, k, v))
    case = replace(case, batch=len(case.packed), seqlen_q=length, seqlen_k=length, packed=())
    rectangle = _ours(case, q, k, v, mechanism="tma_wgmma")
    return lambda: rectangle().flatten(0, 1).unsqueeze(0)


peer("ours_cp_async", "cute_attn, mechanism cp_async", **OURS)(partial(_ours, mechanism="cp_async"))
peer("ours_deterministic", "cute_attn, mechanism tma_wgmma, deterministic=True", **DETERMINISTIC)(
    partial(_ours, mechanism="tma_wgmma", deterministic=True)
)
peer("ours_cp_async_deterministic", "cute_attn, mechanism cp_async, deterministic=True", **DETERMINISTIC)(
    partial(_ours, mechanism="cp_async", deterministic=True)
)
peer("ours_reference", "cute_attn, the reference in plain torch", **OURS, devices=("cpu",))(partial(_ours, backend="reference"))


# --- torch -----------------------------------------------------------------------------------------------------------


def only(backend: str) -> Callable[[], AbstractContextManager]:
    """Holds torch's scaled_dot_product_attention to one backend for a whole turn, as switching in every call would show
    up in the host's cost."""

    def around() -> AbstractContextManager:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.__members__[backend])

    return around


def _refuse_ragged(case: Case) -> None:
    if case.form:
        raise UnsupportedError(f"it takes whole rectangles, and the case has {case.form} sequences")


def _sdpa(case: Case, q, k, v):
    """torch's scaled_dot_product_attention, which is heads-first and knows no window or softcap."""
    from torch.nn.functional import scaled_dot_product_attention

    _refuse_ragged(case)
    if case.window is not None or case.softcap:
        raise UnsupportedError("scaled_dot_product_attention has no window and no softcap")
    if case.causal and case.seqlen_q != case.seqlen_k:
        raise UnsupportedError("its causal mask is aligned top-left, another problem where the lengths differ")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rules: dict[str, Any] = {"is_causal": case.causal, "enable_gqa": case.heads != case.heads_kv}
    return lambda: scaled_dot_product_attention(q, k, v, **rules)


SDPA: dict[str, Any] = {"needs": "torch.nn.functional:scaled_dot_product_attention", "heads_first": True}


peer("torch_flash2", "torch SDPA, FlashAttention-2", **SDPA, around=only("FLASH_ATTENTION"))(_sdpa)
peer("torch_cudnn", "torch SDPA, cuDNN", **SDPA, around=only("CUDNN_ATTENTION"))(_sdpa)
peer("torch_efficient", "torch SDPA, memory-efficient", **SDPA, around=only("EFFICIENT_ATTENTION"))(_sdpa)
peer("torch_math", "torch SDPA, plain matrix products", **SDPA, devices=("cpu",), around=only("MATH"))(_sdpa)
peer("torch_cpu", "torch SDPA, what it picks on the CPU", **SDPA, devices=("cpu",))(_sdpa)


@peer("torch_varlen", "torch varlen_attn, FlashAttention-2", needs="torch.nn.attention.varlen:varlen_attn")
def torch_varlen(case, q, k, v):
    from torch.nn.attention.varlen import varlen_attn

    if not case.packed or case.softcap:
        raise UnsupportedError("it is here for packed sequences, and has no softcap")
    left, right = (-1 if edge is None else edge for edge in case.edges)
    bounds, longest = bounds_of(case, q.device), max(case.packed)
    rules: dict[str, Any] = {"window_size": (left, right)}
    if case.heads != case.heads_kv:
        rules["enable_gqa"] = True
    return lambda: output_of(varlen_attn(*without_batch(q, k, v), bounds, bounds, longest, longest, **rules)).unsqueeze(0)


FLEX = "torch.nn.attention.flex_attention:flex_attention"


@peer("torch_flex", "torch FlexAttention, compiled", needs=FLEX, heads_first=True, slow_start=True, compiles="case")
def torch_flex(case, q, k, v):
    _refuse_ragged(case)
    attend = _flex(case, str(q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: attend(q, k, v)


def compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled for each shape."""
    import torch
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # Each case is a new shape, and torch stops compiling after a handful of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._functorch.config.donated_buffer = False  # else no second backward pass of one forward pass
    return torch.compile(flex_attention, dynamic=False)


@lru_cache
def _flex(case: Case, device: str) -> Callable[..., Any]:
    """FlexAttention for one case, whose rules it takes as functions of coordinates."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    left, right = case.edges
    shift = case.seqlen_k - case.seqlen_q

    def band(b, h, row, col):
        seen = None
        if left is not None:
            seen = col >= row + (shift - left)
        if right is not None:
            below = col <= row + (shift + right)
            seen = below if seen is None else seen & below
        return seen

    def softcap(score, b, h, row, col):
        return case.softcap * torch.tanh(score / case.softcap)

    rules: dict[str, Any] = {"enable_gqa": case.heads != case.heads_kv}
    if case.edges != (None, None):
        rules["block_mask"] = create_block_mask(band, None, None, case.seqlen_q, case.seqlen_k, device=device)
    if case.softcap:
        rules["score_mod"] = softcap
    return partial(compiled_flex(), **rules)


# --- FlashAttention --------------------------------------------------------------------------------------------------


def _flash(module, case: Case, q, k, v, unbounded, padded=None):
    """The three packages share their names: softmax_scale, causal, window_size (aligned as ours is), softcap.
    ``padded`` takes rectangles with ``seqused``."""
    attention = padded if case.used else module.flash_attn_func
    if attention is None:
        raise UnsupportedError("it takes no rectangles of which some rows aren't in use")
    window = tuple(unbounded if reach < 0 else reach for reach in case.window or (-1, -1))
    rules = {"causal": case.causal, "window_size": window, "softcap": case.softcap} | rows_in_use(case, q.device)
    if case.packed:
        bounds, longest = bounds_of(case, q.device), max(case.packed)
        rules |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}

        def attention(q, k, v, **rules):
            return output_of(module.flash_attn_varlen_func(*without_batch(q, k, v), **rules)).unsqueeze(0)

    return lambda: output_of(attention(q, k, v, **rules))


@peer("flash_attn", "flash_attn, FlashAttention-2", needs="flash_attn:flash_attn_func")
def flash_attn(case, q, k, v):
    import flash_attn as package

    return _flash(package, case, q, k, v, unbounded=-1)


@peer("fa3", "flash_attn_interface, FlashAttention-3", needs="flash_attn_interface:flash_attn_func")
def fa3(case, q, k, v):
    import flash_attn_interface

    return _flash(flash_attn_interface, case, q, k, v, unbounded=-1)


@peer("fa4", "flash_attn.cute, FlashAttention-4", needs="flash_attn.cute:flash_attn_func", compiles="rules")
def fa4(case, q, k, v):
    from flash_attn import cute

    return _flash(cute, case, q, k, v, unbounded=None, padded=cute.flash_attn_varlen_func)
