"""Every wrong input, one row each: what is called, the exception, and what its message must say.

A message has three parts: what was got, what is needed, and what to try. A row names words of each.
"""

from __future__ import annotations

import ast
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import create_block_mask

from cute_attn import (
    PagedCache,
    attention,
    attention_kvcache,
    attention_varlen,
    block_mask,
    cache,
    compile,
    flash_attn,
    functions,
    launch,
    layouts,
    lengths,
    masks,
    paged_cache,
    plan,
    problem,
    scores,
    sdpa,
    stored,
    tracing,
    transformers,
)

HALF = torch.bfloat16


class Row(NamedTuple):
    """One wrong input. ``try_`` is empty where what is needed says it all."""

    what: str
    call: Callable[[], object]
    error: type[Exception]
    got: str
    needed: str
    try_: str = ""


def tensors(q=(2, 6, 4, 16), k=(2, 10, 2, 16), v=(2, 10, 2, 16), dtype=HALF) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(q, dtype=dtype), torch.zeros(k, dtype=dtype), torch.zeros(v, dtype=dtype)


def check(*qkv, scale=None, causal=False, window=None, softcap=0.0):
    return lambda: problem.check_call(*qkv, scale=scale, causal=causal, window=window, softcap=softcap)


def shapes(**changed):
    return check(*tensors(**changed))


def rules(**changed):
    return check(*tensors(), **changed)


def for_gpu(q=(2, 6, 4, 16), k=(2, 10, 2, 16), v=(2, 10, 2, 16), dtype=HALF, **rules):
    qkv = tensors(q, k, v, dtype)
    return lambda: problem.check_tensors_for_gpu(*qkv, check(*qkv, **rules)())


def strides(x, name="k"):
    return lambda: problem.check_strides(name, x)


def a_problem(*values, **named):
    return lambda: problem.Problem(*values, **named)


q, k, v = tensors()
FLAT = torch.zeros(2 * 10 * 2 * 16 + 1, dtype=HALF)

CHECKS = [
    Row("q is a list", check([1.0], k, v), TypeError, "q is a list", "torch.Tensor is needed", "torch.as_tensor(q)"),
    Row("k is None", check(q, None, v), TypeError, "k is a NoneType", "torch.Tensor is needed", "torch.as_tensor(k)"),
    Row("v is a number", check(q, k, 1), TypeError, "v is a int", "torch.Tensor is needed", "torch.as_tensor(v)"),
    Row(
        "3 dimensions",
        shapes(v=(10, 2, 16)),
        ValueError,
        "v has shape (10, 2, 16)",
        "(batch, seqlen, heads, head_dim) are needed",
        "v.unsqueeze(0)",
    ),
    Row("5 dimensions", shapes(q=(1, 2, 6, 4, 16)), ValueError, "q has shape (1, 2, 6, 4, 16)", "4 dimensions"),
    Row(
        "two dtypes",
        check(q, k.half(), v),
        ValueError,
        "torch.bfloat16, torch.float16, torch.bfloat16",
        "one dtype is needed",
        "k.to(q.dtype)",
    ),
    Row(
        "two devices",
        check(q, k, v.to("meta")),
        ValueError,
        "lie on cpu, cpu, meta",
        "one device is needed",
        ".to(q.device)",
    ),
    Row("batches of k", shapes(k=(3, 10, 2, 16)), ValueError, "2, 3, 2", "equal ones are needed", "expand"),
    Row("batches of v", shapes(v=(1, 10, 2, 16)), ValueError, "2, 2, 1", "equal ones are needed", "expand"),
    Row(
        "lengths of k and v",
        shapes(v=(2, 11, 2, 16)),
        ValueError,
        "k is (2, 10, 2, 16) and v is (2, 11, 2, 16)",
        "equal (seqlen, heads) are needed",
        "only head_dim may differ",
    ),
    Row(
        "heads of k and v",
        shapes(v=(2, 10, 4, 16)),
        ValueError,
        "v is (2, 10, 4, 16)",
        "equal (seqlen, heads) are needed",
        "only head_dim may differ",
    ),
    Row(
        "head dims of q and k",
        shapes(k=(2, 10, 2, 24)),
        ValueError,
        "head_dim of q is 16 and of k is 24",
        "equal ones are needed",
        "check k's layout",
    ),
    Row(
        "heads not a multiple",
        shapes(q=(2, 6, 5, 16)),
        ValueError,
        "q has 5 heads and k has 2",
        "must be a multiple",
        "repeat k's and v's heads",
    ),
    Row("fewer heads than k", shapes(q=(2, 6, 1, 16)), ValueError, "q has 1 heads and k has 2", "must be a multiple"),
    Row(
        "no key heads",
        shapes(k=(2, 10, 0, 16), v=(2, 10, 0, 16)),
        ValueError,
        "q has 4 heads and k has 0",
        "must be a multiple",
    ),
    Row("head_dim 0", shapes(q=(2, 6, 4, 0), k=(2, 10, 2, 0)), ValueError, "head_dim is 0 and", "at least 1 is needed"),
    Row("head_dim_v 0", shapes(v=(2, 10, 2, 0)), ValueError, "head_dim_v is 0", "at least 1 is needed"),
    Row("integers", shapes(dtype=torch.int32), ValueError, "dtype is torch.int32", "bfloat16", ".to(torch.bfloat16)"),
    Row("complex", shapes(dtype=torch.complex64), ValueError, "torch.complex64", "is needed", ".to(torch.bfloat16)"),
    Row("8-bit floats", shapes(dtype=torch.float8_e4m3fn), ValueError, "float8_e4m3fn", "is needed", ".to("),
    Row("scale nan", rules(scale=math.nan), ValueError, "scale is nan", "finite number is needed", "1/√head_dim"),
    Row("softcap negative", rules(softcap=-1.0), ValueError, "softcap is -1.0", "≥ 0 is needed", "0 for none"),
    Row("window a number", rules(window=5), TypeError, "window is 5", "pair (left, right) is needed", "None or -1"),
    Row("window of one", rules(window=(5,)), TypeError, "window is a tuple, (5,)", "pair (left, right)", "None or -1"),
    Row("window of three", rules(window=(5, 5, 5)), TypeError, "(5, 5, 5)", "pair (left, right)", "None or -1"),
    Row("window a mask", rules(window=q > 0), TypeError, "a Tensor of shape (2, 6, 4, 16)", "pair (left, right)", "None or -1"),
    Row("window negative", rules(window=(-2, 0)), ValueError, "left side is -2", "≥ 0 is needed", "None or -1"),
    Row("window negative right", rules(window=(0, -5)), ValueError, "right side is -5", "≥ 0 is needed", "None or -1"),
    Row("window far negative", rules(window=(0, -(10**9999))), ValueError, "an int of about 10000 digits", "≥ 0 is needed"),
    # What float32 can't hold.
    *(
        Row(
            f"{what} with {values}",
            rules(**values),
            ValueError,
            f"{what} is ",
            "from 1.18e-38 to 3.4e+38 is needed",
            "try scale=None, for 1/√head_dim, and a softcap such as 50",
        )
        for what, values in (
            ("scale · log2 e", {"scale": 1e300}),
            ("scale · log2 e", {"scale": -3e38}),
            ("scale · log2 e", {"scale": 1e-300}),
            ("scale · log2 e", {"scale": 8e-39}),
            ("softcap · log2 e", {"softcap": 1e300}),
            ("softcap · log2 e", {"softcap": 1e-39}),
            ("softcap · log2 e", {"softcap": 5e-324}),
            ("softcap · log2 e", {"softcap": 1e300, "scale": 0.0}),
            ("scale / softcap", {"softcap": 1e38}),
            ("scale / softcap", {"softcap": 1e-30, "scale": 1e10}),
            ("scale / softcap", {"softcap": 1e30, "scale": 5e-324}),
            ("scale", {"softcap": 1e30, "scale": 1e50}),
        )
    ),
    # A Problem that is written by hand.
    Row("head_dim a float", a_problem("bfloat16", 64.0, 64), TypeError, "head_dim is 64.0", "a value of type int is needed"),
    Row("softcap a number", a_problem("bfloat16", 64, 64, softcap=3.0), TypeError, "softcap is 3.0", "type bool is needed"),
    Row("a dtype of torch", a_problem(HALF, 64, 64), TypeError, "a dtype, torch.bfloat16", "type str is needed"),
    Row("gradients out of order", a_problem("float16", 64, 64, gradients="kq"), ValueError, "'kq'", "'qk', 'qv'", "is needed"),
    # What only the kernels need.
    Row("float32 kernels", for_gpu(dtype=torch.float32), ValueError, "float32", "float16 and bfloat16", "'reference'"),
    Row("float64 kernels", for_gpu(dtype=torch.float64), ValueError, "float64", "float16 and bfloat16", "'reference'"),
    Row(
        "head_dim 20",
        for_gpu(q=(2, 6, 4, 20), k=(2, 10, 2, 20)),
        ValueError,
        "head_dim is 20",
        "multiple of 8 up to 256 is needed",
        "torch.nn.functional.pad",
    ),
    Row(
        "head_dim 264",
        for_gpu(q=(2, 6, 4, 264), k=(2, 10, 2, 264)),
        ValueError,
        "head_dim is 264",
        "multiple of 8 up to 256 is needed",
        "backend='reference'",
    ),
    Row("scale 0 of the kernels", for_gpu(scale=0), ValueError, "scale is 0.0", "one above 0", "backend='reference'"),
    Row("scale below 0 of the kernels", for_gpu(scale=-2.0), ValueError, "scale is -2.0", "one above 0", "negate q"),
    Row("a tiny scale of the kernels", for_gpu(scale=1e-36), ValueError, "scale is 1e-36", "from 1e-33 to 1e+33", "multiply q"),
    Row("a huge scale of the kernels", for_gpu(scale=1e35), ValueError, "scale is 1e+35", "from 1e-33 to 1e+33", "multiply q"),
    Row("a tiny cap of the kernels", for_gpu(softcap=1e-36), ValueError, "softcap is 1e-36", "from 1e-33 to", "multiply q"),
    Row("a huge cap of the kernels", for_gpu(softcap=1e35), ValueError, "softcap is 1e+35", "from 1e-33 to", "multiply q"),
    Row("head_dim_v 12", for_gpu(v=(2, 10, 2, 12)), ValueError, "head_dim_v is 12", "multiple of 8", "pad"),
    Row(
        "last dimension strided",
        strides(torch.zeros(2, 10, 2, 32, dtype=HALF)[..., ::2]),
        ValueError,
        "last dimension of k has stride 2",
        "1 is needed",
        "k.contiguous()",
    ),
    Row(
        "heads last in memory",
        strides(torch.zeros(2, 10, 16, 2, dtype=HALF).transpose(2, 3), "v"),
        ValueError,
        "last dimension of v has stride 2",
        "1 is needed",
        "v.contiguous()",
    ),
    Row(
        "misaligned address",
        strides(FLAT[1:].view(2, 10, 2, 16)),
        ValueError,
        "address that is 2 past a multiple of 16 bytes",
        "multiple is needed",
        "k.clone()",
    ),
    Row(
        "misaligned stride",
        strides(torch.zeros(2, 10, 2, 20, dtype=HALF)[..., :16]),
        ValueError,
        "k has strides (400, 40, 20, 1)",
        "multiples of 8 elements (16 bytes) are needed",
        "k.contiguous()",
    ),
]


def forward_mode():
    x = torch.ones(1, 3, 1, 8)
    with forward_ad.dual_level():
        attention(forward_ad.make_dual(x, x), x, x)


def twice_differentiated():
    x = torch.ones(1, 3, 1, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x, x, x).sum(), x, create_graph=True)
    gradient.sum().backward()


def calls_attention(x: torch.Tensor) -> torch.Tensor:
    return attention(x, x, x)


# Through attention() itself.
API = [
    Row(
        "unknown backend",
        lambda: attention(q, k, v, backend="triton"),
        ValueError,
        "backend is 'triton'",
        "'auto', 'cute', 'reference'",
    ),
    Row("backend a list", lambda: attention(q, k, v, backend=["cute"]), TypeError, "a list, ['cute']", "'auto', 'cute'"),
    Row("backend an array", lambda: attention(q, k, v, backend=np.ones(2)), TypeError, "of shape (2,)", "'auto', 'cute'"),
    Row(
        "mechanism a list",
        lambda: attention(q, k, v, mechanism=["cp_async"]),
        TypeError,
        "mechanism is a list, ['cp_async']",
        "the name of one is needed",
        "None for the best",
    ),
    Row(
        "mechanism False", lambda: attention(q, k, v, mechanism=False), TypeError, "mechanism is False", "name of one is needed"
    ),
    Row(
        "a mechanism of the reference",
        lambda: attention(q, k, v, mechanism="cp_async"),
        ValueError,
        "mechanism is 'cp_async' and the reference backend runs",
        "leave it out, or pass CUDA tensors",
    ),
    Row("empty backend", lambda: attention(q, k, v, backend=""), ValueError, "backend is ''", "'auto'"),
    Row(
        "kernels on CPU tensors",
        lambda: attention(q, k, v, backend="cute"),
        ValueError,
        "lie on cpu",
        "need CUDA tensors",
        "backend='auto'",
    ),
    Row("auto checks", lambda: attention(q, k, k[0]), ValueError, "v has shape (10, 2, 16)", "4 dimensions"),
    Row(
        "reference checks",
        lambda: attention(q, k, k[:, 1:], backend="reference"),
        ValueError,
        "v is (2, 9, 2, 16)",
        "equal (seqlen, heads) are needed",
    ),
    Row(
        "kernels check first",
        lambda: attention(q, k, v, softcap=-2, backend="cute"),
        ValueError,
        "softcap is -2.0",
        "≥ 0 is needed",
    ),
    Row(
        "double backward",
        twice_differentiated,
        RuntimeError,
        "gradients of attention's gradients are asked for (double backward)",
        "first derivatives only",
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    ),
    Row(
        "forward-mode differentiation",
        forward_mode,
        NotImplementedError,
        "an input carries a tangent",
        "reverse mode only",
        ".backward(), or torch.nn.functional.scaled_dot_product_attention",
    ),
    Row(
        "forward mode of torch.func",
        lambda: torch.func.jvp(lambda x: attention(x, k.float(), v.float()), (q.float(),), (q.float(),)),
        NotImplementedError,
        "an input carries a tangent",
        "reverse mode only",
        ".backward(), or torch.nn.functional.scaled_dot_product_attention",
    ),
    Row(
        "torch.jit.script",
        lambda: torch.jit.script(attention),
        NotImplementedError,
        "torch.jit.script compiles attention",
        "TorchScript has no words for",
        "torch.compile, or torch.export.export",
    ),
    Row(
        "torch.jit.script of a caller",
        lambda: torch.jit.script(calls_attention),
        NotImplementedError,
        "torch.jit.script compiles attention",
        "TorchScript has no words for",
        "torch.compile, or torch.export.export",
    ),
    *(
        Row(
            f"torch.jit.script of {function.__name__}",
            lambda function=function: torch.jit.script(function),
            NotImplementedError,
            f"torch.jit.script compiles {function.__name__}",
            "TorchScript has no words for",
            "torch.compile, or torch.export.export",
        )
        for function in (
            *(attention_varlen, attention_kvcache, sdpa.scaled_dot_product_attention),
            *(getattr(flash_attn, name) for name in flash_attn._FUNCTIONS),
        )
    ),
]


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU, for what attention() checks before it launches anything."""

    is_cuda = property(lambda self: True)


def on_gpu(*xs):
    return [x.detach().as_subclass(OnGpu) for x in xs]


def with_grad(*xs):
    return [x.requires_grad_() for x in on_gpu(*xs)]


# The same, on tensors that say they lie on a GPU of compute capability 7.5 or 9.0.
ON_TURING = [
    Row(
        "a GPU without kernels",
        lambda: attention(*on_gpu(q, k, v)),
        NotImplementedError,
        "compute capability 7.5",
        "8.0",
        "backend='reference'",
    ),
    Row(
        "gradients on a GPU without kernels",
        lambda: attention(*with_grad(q, k, v)),
        NotImplementedError,
        "compute capability 7.5",
        "8.0",
        "backend='reference'",
    ),
]
ON_HOPPER = [
    Row(
        "float32 on a GPU",
        lambda: attention(*on_gpu(*tensors(dtype=torch.float32))),
        ValueError,
        "dtype is torch.float32",
        "float16 and bfloat16",
        "backend='reference'",
    ),
    Row(
        "head_dim 20 on a GPU",
        lambda: attention(*on_gpu(*tensors((2, 6, 4, 20), (2, 10, 2, 20)))),
        ValueError,
        "head_dim is 20",
        "multiple of 8 up to 256",
        "pad",
    ),
    Row(
        "k misaligned on a GPU",
        lambda: attention(*on_gpu(q, FLAT[1:].view(2, 10, 2, 16), v)),
        ValueError,
        "k starts at an address that is 2 past",
        "multiple is needed",
        "k.clone()",
    ),
    Row(
        "unknown mechanism",
        lambda: attention(*on_gpu(q, k, v), mechanism="mma_v1"),
        ValueError,
        "mechanism is 'mma_v1'",
        "'tma_wgmma'",
        "pass one of them",
    ),
    Row(
        "no DSL",
        lambda: attention(*on_gpu(q, k, v)),
        NotImplementedError,
        "CuTe DSL can't be imported",
        "compiled with it",
        "pip install 'nvidia-cutlass-dsl[cu13]' (Linux only), or backend='reference'",
    ),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


BOUNDS_Q, BOUNDS_K = int32(0, 2, 6), int32(0, 0, 9)


def packed(q=q[0], k=k[0], v=v[0], cu_seqlens_q=BOUNDS_Q, cu_seqlens_k=BOUNDS_K, **options):
    return lambda: attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


def used(**lengths):
    return lambda: attention(q, k, v, **lengths)


CACHE = torch.zeros(2, 10, 2, 16, dtype=HALF)
TURN = torch.zeros(20, 8, dtype=HALF)


def cached(q=q, k_cache=CACHE, v_cache=CACHE, lengths=int32(3, 4), **options):  # noqa: B008
    return lambda: attention_kvcache(q, k_cache, v_cache, lengths=lengths, **options)


def appended(k_new=CACHE[:, :1], v_new=CACHE[:, :1], **options):
    return cached(k_new=k_new, v_new=v_new, **options)


def forward_mode_of_a_cache():
    with forward_ad.dual_level():
        appended(k_new=forward_ad.make_dual(CACHE[:, :1].clone(), CACHE[:, :1].clone()))()


def forward_mode_of_slopes():
    with forward_ad.dual_level():
        cached(alibi_slopes=forward_ad.make_dual(torch.ones(4), torch.ones(4)))()


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the older layout
        return torch.nested.nested_tensor([CACHE[0, :3], CACHE[0, :5]], layout=layout)


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def fake_cache():
    cached(v_cache=FakeTensorMode().from_tensor(CACHE))()


def on_meta(q, cache, **lengths):
    lengths = {name: x.to("meta") for name, x in lengths.items()}
    return cached(q.to("meta"), cache.to("meta"), cache.to("meta"), **lengths)


ITSELF = "a tensor that holds its values itself is needed"
PACKED = {"q": q[0], "cu_seqlens_q": int32(0, 2, 6)}
ONE_EACH = "one element for each is needed"


def large_pages() -> dict:
    pages = torch.zeros(2, 1025, 2, 16, dtype=HALF)
    return {"k_cache": pages, "v_cache": pages, "page_table": int32([0], [1])}


CACHES = [
    Row("cache a list", cached(k_cache=[1.0]), TypeError, "k_cache is a list", "torch.Tensor is needed"),
    Row("cache of 3 dimensions", cached(v_cache=CACHE[0]), ValueError, "v_cache has shape (10, 2, 16)", "(pages, page_size,"),
    Row("q of 3 dimensions", cached(q=q[0]), ValueError, "q has shape (6, 4, 16)", "4 dimensions (batch", "q.unsqueeze(1)"),
    Row("packed q of 4", cached(**PACKED | {"q": q}), ValueError, "q has shape (2, 6", "3 dimensions", "q.flatten(0, 1)"),
    Row("caches of two sizes", cached(v_cache=CACHE[:, 1:]), ValueError, "v_cache is (2, 9, 2, 16)", "equal sizes are needed"),
    Row("cache of another dtype", cached(v_cache=CACHE.half()), ValueError, "q, k_cache, v_cache have dtypes", "v_cache.to(q"),
    Row("cache elsewhere", cached(k_cache=CACHE.to("meta")), ValueError, "v_cache lie on cpu, meta, cpu", "k_cache.to("),
    Row("heads of the cache", cached(q=q[:, :, :3]), ValueError, "q has 3 heads and k_cache has 2", "multiple of k_cache's"),
    Row("columns of the cache", cached(q=q[..., :8]), ValueError, "q is 8 and of k_cache is 16", "check k_cache's layout"),
    Row("lengths a number", cached(lengths=3), TypeError, "lengths is 3", "int32 tensor on cpu", "dtype=torch.int32"),
    Row("lengths in 64 bits", cached(lengths=int32(3, 4).long()), ValueError, "lengths has dtype torch.int64", "lengths.int()"),
    Row("lengths elsewhere", cached(lengths=int32(3, 4).to("meta")), ValueError, "lengths lies on meta", "one device"),
    Row("one length of a cache", cached(lengths=int32(3)[0]), ValueError, "lengths has shape ()", "(batch,) is needed"),
    Row("lengths of 3", cached(lengths=int32(3, 4, 5)), ValueError, "q is of 2 sequences where lengths is of 3", ONE_EACH),
    Row("table of 3", cached(page_table=int32([0], [0], [0])), ValueError, "page_table is of 3", ONE_EACH),
    Row("table of one", cached(page_table=int32(0, 1)), ValueError, "page_table has shape (2,)", "(batch, max_pages)", "-1)"),
    Row("index a list", cached(cache_batch_idx=[0, 1]), TypeError, "cache_batch_idx is a list", "int32 tensor on cpu"),
    Row("padding of 3", cached(leftpad_k=int32(0, 0, 0)), ValueError, "leftpad_k is of 3 sequences", ONE_EACH),
    Row(
        "a table and an index",
        cached(page_table=int32([0], [1]), cache_batch_idx=int32(0, 1)),
        ValueError,
        "page_table and cache_batch_idx are given",
        "one of them is needed",
        "page_table[cache_batch_idx.long()]",
    ),
    Row("large pages", cached(**large_pages()), ValueError, "have 1025 rows", "from 1 to 1024 are needed", "unflatten"),
    Row("elements", cached(k_cache=CACHE[:1], v_cache=CACHE[:1]), ValueError, "1 elements for 2", "one for each", "page_table"),
    Row("new keys alone", appended(v_new=None), TypeError, "v_new is None", "new values", "pass k_new and v_new"),
    Row("new heads", appended(CACHE[:, :1, :1]), ValueError, "k_new has shape (2, 1, 1, 16)", "(2, seqlen_new, 2, 16) is"),
    Row("new floats", appended(v_new=CACHE[:, :1].float()), ValueError, "v_new is torch.float32", "equal", "v_new.to(k_cache)"),
    Row("new of 1", appended(CACHE[:1, :1], CACHE[:1, :1]), ValueError, "k_new is of 1 sequences where", ONE_EACH),
    Row("packed new", appended(**PACKED), ValueError, "k_new has shape (2, 1, 2, 16)", "(all new rows, 2, 16) is needed"),
    Row(
        "bounds of nothing new",
        cached(**PACKED, cu_seqlens_k_new=int32(0, 1, 2)),
        ValueError,
        "cu_seqlens_k_new is given without k_new",
        "both are needed",
        "leave it out",
    ),
    Row("rotary of no keys", cached(rotary=(TURN, TURN)), ValueError, "rotary is given without k_new", "new keys are needed"),
    Row("positions of none", appended(rotary_begin=int32(0, 0)), ValueError, "rotary_begin is given without", "both are"),
    Row("rotary a tensor", appended(rotary=TURN), TypeError, "rotary is a Tensor", "a pair of tensors (cos, sin) is needed"),
    Row("rotary of 6", appended(rotary=(TURN[:, :6],) * 2), ValueError, "cos has shape (20, 6)", "multiple of 8 up to 8"),
    Row("rotary in float32", appended(rotary=(TURN, TURN.float())), ValueError, "sin is torch.float32", "equal", "sin.to(q)"),
    Row("rotary flag", appended(rotary_interleaved=1), TypeError, "rotary_interleaved is 1", "True or False is needed"),
    Row("gradients of a cache", cached(q=q.clone().requires_grad_()), NotImplementedError, "require a gradient", "no_grad"),
    Row(
        "gradients of rotary",
        appended(rotary=[TURN, TURN.clone().requires_grad_()]),
        NotImplementedError,
        "rotary, sinks or what functions read require a gradient",
        "no_grad",
    ),
    Row(
        "gradients of slopes",
        cached(alibi_slopes=torch.ones(4, requires_grad=True)),
        NotImplementedError,
        "what functions read require a gradient",
        "a call that records none is needed",
        "no_grad",
    ),
    Row(
        "a tangent of slopes",
        forward_mode_of_slopes,
        NotImplementedError,
        "an input carries a tangent",
        "in reverse mode only",
        ".backward()",
    ),
    Row(
        "a cache under vmap",
        lambda: torch.vmap(lambda q: attention_kvcache(q, CACHE, CACHE, lengths=int32(3, 4)))(q[None]),
        NotImplementedError,
        "a transform of torch.func",
        "a plain call is needed",
        "torch.compiler.disable",
    ),
    Row(
        "forward mode of a cache",
        forward_mode_of_a_cache,
        NotImplementedError,
        "an input carries a tangent",
        "reverse mode only",
        "try .backward()",
    ),
    Row("nested q of a cache", cached(q=nested(torch.jagged)), TypeError, "q is a nested tensor", "a plain one is needed"),
    Row("sparse cache", cached(k_cache=CACHE.to_sparse()), TypeError, "k_cache has layout", "torch.strided is needed"),
    Row("index in an array", cached(cache_batch_idx=np.zeros(2, np.int32)), TypeError, "a ndarray", "int32 tensor on cpu"),
    Row("cache on meta", on_meta(q, CACHE, lengths=int32(3, 4)), TypeError, "q is a Tensor on meta", ITSELF, "or a GPU"),
    Row(
        "fake cache",
        fake_cache,
        TypeError,
        "v_cache is a FakeTensor on cpu",
        ITSELF,
        "what v_cache wraps",
    ),
    Row("freed cache", cached(k_cache=freed(CACHE)), RuntimeError, "k_cache has shape", "memory is needed", "fill it again"),
    Row("freed lengths", cached(lengths=freed(int32(3, 4))), RuntimeError, "lengths has shape", "memory is needed"),
    Row(
        "nested rotary",
        appended(rotary=(TURN, nested(torch.strided))),
        TypeError,
        "rotary's sin is a nested tensor",
        "a plain one is needed",
    ),
    Row("freed rotary", appended(rotary=(freed(TURN), TURN)), RuntimeError, "rotary's cos has shape", "memory is needed"),
    Row("nested sinks", cached(sinks=nested(torch.strided)), TypeError, "sinks is a nested", "a plain one is needed"),
    Row("nested slopes", cached(alibi_slopes=nested(torch.strided)), TypeError, "alibi_slopes is a nested", "a plain one is"),
    Row("nested mask", cached(mask=nested(torch.strided)), TypeError, "mask is a Tensor of several", "a function is needed"),
    # With CUTE_ATTN_CHECK=1.
    Row("length too large", cached(lengths=int32(3, 11)), ValueError, "lengths[1] is 11", "from 0 to 10 keys", "larger cache"),
    Row("no room", appended(lengths=int32(10, 3)), ValueError, "lengths[0] is 10", "room for 1 new ones", "more pages"),
    Row("length below 0", cached(lengths=int32(3, -1)), ValueError, "lengths[1] is -1", "from 0 to 10 keys"),
    Row("too much padding", cached(leftpad_k=int32(0, 5)), ValueError, "leftpad_k[1] is 5", "from 0 to 4, the length"),
    Row("no such element", cached(cache_batch_idx=int32(0, 2)), ValueError, "cache_batch_idx[1] is 2", "from 0 to 1"),
    Row("no such page", cached(page_table=int32([0], [2])), ValueError, "page_table[1, 0] is 2", "from 0 to 1, the pages"),
    Row("falling bounds of q", cached(**PACKED | {"cu_seqlens_q": int32(0, 4, 2)}), ValueError, "is [0, 4, 2]", "ascending"),
    Row("no such position of q", appended(rotary=(TURN[:8],) * 2, causal=True), ValueError, "positions 3 to 8", "from 0 to 7"),
    Row(
        "no such position of a query alone",
        appended(CACHE[:, :0], CACHE[:, :0], rotary=(TURN[:3],) * 2),
        ValueError,
        "sequence 0 has the positions 3 to 3",
        "from 0 to 2",
    ),
    Row("no such position", appended(rotary=(TURN[:4],) * 2), ValueError, "the positions 4 to 4", "from 0 to 3", "more"),
]



CU, USED = "(batch + 1,), from 0 up to all rows, is needed", "(batch,) is needed"
LENGTHS = [
    Row("packed q a list", packed(q=[1.0]), TypeError, "q is a list", "torch.Tensor is needed", "torch.as_tensor(q)"),
    Row("packed v of 4 dimensions", packed(v=v), ValueError, "v has shape (2, 10, 2, 16)", "3 dimensions", "v.flatten(0, 1)"),
    Row("packed k of 2 dimensions", packed(k=k[0, 0]), ValueError, "k has shape (2, 16)", "3 dimensions (rows of all"),
    Row("sparse packed q", packed(q=q[0].to_sparse()), TypeError, "q has layout torch.sparse_coo", "strided is needed"),
    Row("totals of k and v", packed(v=v[0, 1:]), ValueError, "v is (9, 2, 16)", "equal (seqlen, heads) are needed"),
    Row("no bounds", packed(cu_seqlens_q=None), TypeError, "cu_seqlens_q is None", "an int32 tensor is needed"),
    Row(
        "bounds a list",
        packed(cu_seqlens_k=[0, 5]),
        TypeError,
        "cu_seqlens_k is a list, [0, 5]",
        "int32 tensor on cpu is needed",
    ),
    Row(
        "used a number",
        used(seqused_q=3),
        TypeError,
        "seqused_q is 3",
        "int32 tensor on cpu",
        "torch.tensor(…, dtype=torch.int32)",
    ),
    Row("sparse bounds", packed(cu_seqlens_k=int32(0, 5, 9).to_sparse()), TypeError, "cu_seqlens_k has layout", "is needed"),
    Row("empty bounds", packed(cu_seqlens_q=int32()), ValueError, "cu_seqlens_q has shape (0,)", CU, "check how"),
    Row(
        "bounds of a batch",
        packed(cu_seqlens_k=int32(0, 5, 9)[None]),
        ValueError,
        "cu_seqlens_k has shape (1, 3)",
        CU,
        "flatten",
    ),
    Row("one length of a batch", used(seqused_k=int32(3)[0]), ValueError, "seqused_k has shape ()", USED),
    Row(
        "int64 bounds",
        packed(cu_seqlens_q=int32(0, 2, 6).long()),
        ValueError,
        "torch.int64",
        "int32 is needed",
        "cu_seqlens_q.int()",
    ),
    Row("a mask of rows in use", used(seqused_k=int32(3, 3) > 0), ValueError, "dtype torch.bool", "int32 is needed"),
    Row("floats", used(seqused_k=torch.ones(2, requires_grad=True)), ValueError, "dtype torch.float32", "int32 is needed"),
    Row(
        "bounds elsewhere",
        packed(cu_seqlens_k=int32(0, 5, 9).to("meta")),
        ValueError,
        "cu_seqlens_k lies on meta and q on cpu",
        "one device is needed",
        "cu_seqlens_k.to(q.device)",
    ),
    *(
        Row(
            f"other counts, {name}",
            wrong,
            ValueError,
            f"{name} is of {n} sequences where there are 2",
            "one length for each is needed",
        )
        for name, n, wrong in (
            ("cu_seqlens_k", 3, packed(cu_seqlens_k=int32(0, 1, 2, 3))),
            ("seqused_q", 1, packed(seqused_q=int32(1))),
            ("seqused_k", 3, packed(seqused_k=int32(1, 1, 1))),
            ("seqused_k", 3, used(seqused_k=int32(1, 1, 1))),
        )
    ),
    # With CUTE_ATTN_CHECK=1.
    Row(
        "falling",
        packed(cu_seqlens_q=int32(0, 5, 2)),
        ValueError,
        "falls from 5 to 2 after element 1",
        "ascending",
        "torch.cumsum",
    ),
    Row(
        "not from 0", packed(cu_seqlens_q=int32(1, 5, 6)), ValueError, "goes from 1 to 6", "from 0 to at most 6", "torch.cumsum"
    ),
    Row(
        "negative",
        packed(cu_seqlens_k=int32(-1, 5, 6)),
        ValueError,
        "goes from -1 to 6",
        "from 0 to at most 10",
        "torch.cumsum",
    ),
    Row(
        "past the rows",
        packed(cu_seqlens_k=int32(0, 5, 11)),
        ValueError,
        "goes from 0 to 11",
        "at most 10, the rows there are,",
    ),
    Row(
        "of more rows",
        packed(seqused_k=int32(1, 1)),
        ValueError,
        "seqused_k[0] is 1",
        "from 0 to 0, the rows of that",
        "check how",
    ),
    Row("of fewer than 0", packed(seqused_q=int32(1, -1)), ValueError, "seqused_q[1] is -1", "from 0 to 4, the rows of that"),
    Row("of more rows of a batch", used(seqused_k=int32(1, 11)), ValueError, "seqused_k[1] is 11", "from 0 to 10, the rows of"),
]


def scored(function, **options):
    return lambda: attention(q, k, v, score=function, **options)


def blocked(batch=None, heads=None, seqlen_k=10):
    return block_mask(masks.causal, batch, heads, 6, seqlen_k, device="cpu")


def masked_by(function, **options):
    return lambda: attention(q, k, v, mask=function, **options)


def compiled(call):
    return torch.compile(call, backend="eager", fullgraph=True)


def a_symbol_that_gets_out():
    found = []
    attention(q, k, v, mask=lambda batch, head, q_idx, kv_idx: found.append(q_idx) or q_idx >= kv_idx)
    found[0] + 1


def of_kernels(**options):
    """As if the CPU's tensors were a GPU's: what is refused before anything is launched."""
    with patch("cute_attn.ops.on_reference", lambda *_: False), patch.object(torch.Tensor, "is_cuda", True):
        attention(q, k, v, **options)


def under_vmap(**options):
    torch.vmap(lambda x: attention(x, x, x, **options))(torch.zeros(2, 1, 3, 1, 8))


TABLE, LIST = torch.zeros(2, 9), [1.0, 2.0]
HASHES = torch.tensor([7, 2**40, -5])
CUT_HASHES = "with values from -5 to 1099511627776", "32 bits are needed", "torch.unique(x, return_inverse=True)[1]"
THERE = "torch.where, minimum, maximum"
# What a user's functions can't do, and what is passed beside them.
FUNCTIONS = [
    Row(
        "a graph of shapes",
        lambda: functions.restored(functions.OF_SHAPES, (), 1, 1, (1, 1)),
        RuntimeError,
        "what it computes is not known",
        "a graph that torch.compile or torch.export has made is needed",
        "try torch.compiler.disable",
    ),
    Row("if", scored(lambda s, b, h, i, j: s if i > j else -s), NotImplementedError, "has bool()", THERE, "instead of if"),
    Row("not", masked_by(lambda b, h, i, j: not i > j), NotImplementedError, "has bool()", THERE, "& | ~ instead of and, or"),
    Row("a list", scored(lambda s, b, h, i, j: s + LIST[h]), NotImplementedError, "has index()", THERE, "a captured tensor"),
    Row("item", scored(lambda s, b, h, i, j: s * i.item()), NotImplementedError, "has item", THERE, "need no value"),
    Row("a float", scored(lambda s, b, h, i, j: s * float(i)), NotImplementedError, "has float()", THERE, "its .float()"),
    Row("a sine", scored(lambda s, b, h, i, j: torch.sin(s)), NotImplementedError, "has sin", THERE, "a captured table"),
    Row("in place", scored(lambda s, b, h, i, j: s.add_(1)), NotImplementedError, "has add_", THERE, "x = x + y instead"),
    Row("a sum", scored(lambda s, b, h, i, j: s.sum()), NotImplementedError, "has sum", THERE, "one of these"),
    Row("a row's largest", scored(lambda s, b, h, i, j: s.max()), NotImplementedError, "has max of one", THERE, "maximum(x"),
    Row("along keys", scored(lambda s, b, h, i, j: torch.min(s, 0)), NotImplementedError, "has min of one", THERE, "minimum(x"),
    Row("a place", scored(lambda s, b, h, i, j: torch.where(s)), NotImplementedError, "has where of one", THERE, "ition, x"),
    Row(
        "complex zeros",
        scored(lambda s, b, h, i, j: s + torch.zeros_like(s, dtype=torch.complex64)),
        NotImplementedError,
        "to torch.complex64",
        "a float",
        "torch.float32",
    ),
    Row("gradient's", scored(lambda s, b, h, i, j: s.grad), NotImplementedError, "has grad", THERE, "one of these"),
    Row(
        "a table as it is",
        scored(lambda s, b, h, i, j: s + TABLE),
        NotImplementedError,
        "(2, 9) that is no number",
        "one element",
        "tensor[head, q_idx]",
    ),
    Row(
        "half a table",
        scored(lambda s, b, h, i, j: s + TABLE[h]),
        NotImplementedError,
        "without an index for 1 of its 2",
        "a number is",
        "for each",
    ),
    Row(
        "slices",
        scored(lambda s, b, h, i, j: s + TABLE[h, :]),
        NotImplementedError,
        "the index slice",
        "one number for each",
        "before the call",
    ),
    Row(
        "an ellipsis",
        scored(lambda s, b, h, i, j: s + TABLE[..., h]),
        NotImplementedError,
        "the index ...",
        "one number",
        "before",
    ),
    Row(
        "from the end",
        scored(lambda s, b, h, i, j: s + TABLE[h, -1]),
        NotImplementedError,
        "the index -1",
        "from 0 on",
        "shape",
    ),
    Row(
        "from the end, in numpy's int",
        scored(lambda s, b, h, i, j: s + TABLE[h, np.int64(-1)]),
        NotImplementedError,
        "the index -1",
        "from 0 on",
        "shape",
    ),
    Row(
        "bits of floats",
        scored(lambda s, b, h, i, j: s & i),
        NotImplementedError,
        "and of floats",
        "conditions or integers",
        "a comparison",
    ),
    Row(
        "a power of 3",
        scored(lambda s, b, h, i, j: s + 3**i),
        NotImplementedError,
        "a power with a symbol for the exponent",
        "a base of 2",
        "torch.exp",
    ),
    Row(
        "a quotient rounded to 0",
        scored(lambda s, b, h, i, j: s + torch.div(i - j, 2, rounding_mode="trunc")),
        NotImplementedError,
        "div with rounding_mode='trunc'",
        "'floor' or None",
        "absolute",
    ),
    Row(
        "a float for an index",
        scored(lambda s, b, h, i, j: s + TABLE[h, s]),
        NotImplementedError,
        "an index of kind float",
        "an integer",
        ".to(torch.int32)",
    ),
    Row(
        "3 indices",
        scored(lambda s, b, h, i, j: s + TABLE[h, i, j]),
        NotImplementedError,
        "3 indices",
        "one a dimension",
        "fewer",
    ),
    Row(
        "a number's index",
        scored(lambda s, b, h, i, j: s[h]),
        NotImplementedError,
        "an index into a number",
        "captured tensor",
        "itself",
    ),
    Row(
        "5 dimensions",
        scored(lambda s, b, h, i, j: s + torch.zeros(1, 1, 1, 1, 1)[b, h, i, j, j]),
        NotImplementedError,
        "(1, 1, 1, 1, 1)",
        "at most 4",
        "flatten()",
    ),
    Row(
        "complex numbers",
        scored(lambda s, b, h, i, j: s + TABLE.cfloat()[h, i]),
        NotImplementedError,
        "complex64",
        "floats, integers",
        ".to(torch.float32)",
    ),
    Row(
        "nothing in it",
        scored(lambda s, b, h, i, j: s + torch.zeros(0)[i]),
        ValueError,
        "(0,)",
        "at least one element",
        "leaving",
    ),
    Row(
        "another device",
        scored(lambda s, b, h, i, j: s + TABLE.to("meta")[h, i]),
        ValueError,
        "on meta, with q on cpu",
        "one device",
        ".to(q.device)",
    ),
    Row(
        "// of floats",
        scored(lambda s, b, h, i, j: s // 2),
        NotImplementedError,
        "floordiv of floats",
        "integers are",
        ".to(torch.int32)",
    ),
    Row("~ of an int", masked_by(lambda b, h, i, j: ~i), NotImplementedError, "~ of numbers", "a condition is", "a comparison"),
    Row(
        "powers",
        scored(lambda s, b, h, i, j: s**2.5),
        NotImplementedError,
        "a power with the exponent 2.5",
        "from 1 to 8",
        "torch.exp",
    ),
    Row(
        "64 bits", masked_by(lambda b, h, i, j: i < 2**40), NotImplementedError, "constant 1099511627776", "32 bits", "a float"
    ),
    Row(
        "an infinite integer",
        scored(lambda s, b, h, i, j: s + torch.full_like(i, math.inf)),
        NotImplementedError,
        "a conversion of inf to an integer",
        "a finite number",
        "torch.where",
    ),
    Row("every 0th key", masked_by(masks.dilated(0)), ValueError, "has mod by 0", "another divisor is needed", "1 or more"),
    Row("blocks of 0", masked_by(masks.block_diagonal(0)), ValueError, "has floordiv by 0", "another divisor", "1 or more"),
    # Ready-made ones.
    Row("no masks", lambda: masks.and_masks(), TypeError, "and_masks is given ()", "one function or more", "masks.causal"),
    Row("none of them", lambda: masks.or_masks(), TypeError, "or_masks is given ()", "one function or more", "no mask at all"),
    Row("ids in a list", lambda: masks.document(LIST), TypeError, "ids is a list", "an int tensor (seqlen,)", "torch.tensor("),
    Row("a length", lambda: masks.prefix_lm(3), TypeError, "lengths is 3", "an int tensor (batch,) is", "torch.tensor("),
    Row("seen in a list", lambda: masks.given(LIST), TypeError, "seen is a list", "a tensor of bools is", "torch.tensor(seen)"),
    Row("a slope", lambda: scores.alibi(0.5), TypeError, "slopes is 0.5", "a float tensor (heads,) is", "torch.tensor("),
    Row("a table in a list", lambda: scores.relative(LIST), TypeError, "table is a list", "(heads, 2 · farthest + 1)", "try"),
    Row("a table of no heads", lambda: scores.relative(TABLE[0]), ValueError, "shape (9,)", "(heads, 2 · farthest", "how"),
    Row("3 buckets", lambda: scores.bucketed(TABLE[:, :3], 9), ValueError, "shape (2, 3)", "at least 4 for each", "how"),
    Row("1 bucket", lambda: scores.bucketed(TABLE[:, :1], 9, False), ValueError, "shape (2, 1)", "at least 2 for each", "how"),
    Row("near buckets", lambda: scores.bucketed(TABLE, 2), ValueError, "farthest is 2", "more than 2, the dist", "try 16"),
    # With CUTE_ATTN_CHECK=1.
    Row("ids of 64 bits", masked_by(masks.document(HASHES)), ValueError, *CUT_HASHES),
    Row("blocks of them", lambda: block_mask(masks.document(HASHES), 1, 1, 5, 5, device="cpu"), ValueError, *CUT_HASHES),
    Row("ids in a graph", lambda: compiled(masked_by(masks.document(HASHES)))(), ValueError, *CUT_HASHES),
    Row(
        "complex constants",
        scored(lambda s, b, h, i, j: torch.add(s, 1j)),
        NotImplementedError,
        "1j",
        "a number or a tensor",
        "float()",
    ),
    Row(
        "to complex",
        scored(lambda s, b, h, i, j: s.to(torch.complex64)),
        NotImplementedError,
        "to torch.complex64",
        "a float",
        "torch.float32",
    ),
    Row(
        "alpha",
        scored(lambda s, b, h, i, j: torch.add(s, s, alpha=2)),
        NotImplementedError,
        "add with alpha",
        "operands alone",
        "leaving",
    ),
    Row("out of the function", a_symbol_that_gets_out, RuntimeError, "used outside", "inside is needed", "return what"),
    Row("mask a bool", masked_by(True), TypeError, "mask is True", "a function is needed", "mask=lambda batch, head"),
    Row("mask of two", masked_by(lambda b, h: True), TypeError, "mask has the parameters (b", "mask(batch, head", "try mask="),
    Row(
        "score without its tensor",
        scored(lambda score, b, h, q_idx, kv_idx: score, tensors=(TABLE,)),
        TypeError,
        "score has the parameters (score, b, h, q_idx, kv_idx)",
        "score(score, batch, head, q_idx, kv_idx, *tensors)",
        "try score=",
    ),
    Row(
        "score a tensor",
        scored(TABLE),
        TypeError,
        "score is a Tensor of shape (2, 9)",
        "a function is",
        "score=lambda score, batch",
    ),
    Row("a score of None", scored(lambda *_: None), TypeError, "score returns None", "a float is needed", "return of what"),
    Row(
        "a mask of floats",
        masked_by(lambda b, h, i, j: i * 0.5),
        TypeError,
        "values of kind float",
        "a bool is",
        "a comparison",
    ),
    Row("a score of bools", scored(lambda s, b, h, i, j: i > j), TypeError, "values of kind bool", "a float is", "or mask="),
    Row(
        "tensors alone",
        lambda: attention(q, k, v, tensors=(q,)),
        TypeError,
        "tensors are given without",
        "function",
        "score=fn",
    ),
    Row("tensors a tensor", masked_by(len, tensors=TABLE), TypeError, "tensors is a Tensor", "a tuple of tensors", "(table,)"),
    Row(
        "slopes a list",
        lambda: attention(q, k, v, alibi_slopes=LIST),
        TypeError,
        "alibi_slopes is a list",
        "float32 (4,) or (2, 4)",
        "torch.tensor(",
    ),
    Row(
        "3 slopes",
        lambda: attention(q, k, v, alibi_slopes=torch.ones(3)),
        ValueError,
        "of shape (3,)",
        "float32 (4,) or (2, 4)",
        "a slope for each of 4 heads",
    ),
    Row(
        "a block mask of another kind",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=TABLE),
        TypeError,
        "block_mask is a Tensor",
        "a BlockMask is",
        "cute_attn.block_mask(mask, …)",
    ),
    Row(
        "a block mask alone",
        lambda: attention(q, k, v, block_mask=blocked()),
        TypeError,
        "without mask",
        "the function that it was made of",
        "mask=fn",
    ),
    Row(
        "a block mask of other lengths",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked(seqlen_k=11)),
        ValueError,
        "6 queries × 11 keys",
        "6 queries × 10 keys are",
        "cute_attn.block_mask() for these lengths",
    ),
    Row(
        "a block mask of another batch",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked(batch=3)),
        ValueError,
        "of batch 3",
        "batch 2, or 1 for all",
        "batch=2",
    ),
    Row(
        "a block mask of key heads",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked(heads=2)),
        ValueError,
        "heads 2",
        "heads 4, or 1 for all",
        "heads=4",
    ),
    Row(
        "a block mask elsewhere",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked().to("meta")),
        ValueError,
        "lies on meta",
        "cpu, as q",
        "block_mask.to(q.device)",
    ),
    Row(
        "a block mask and causal",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked(), causal=True),
        ValueError,
        "with causal or window",
        "the mask alone",
        "masks.and_masks(mask, masks.causal)",
    ),
    Row(
        "a block mask and rows in use",
        lambda: attention(q, k, v, mask=masks.causal, block_mask=blocked(), seqused_k=torch.ones(2).int()),
        NotImplementedError,
        "with nested tensors, DTensors, results of collectives or seqused",
        "sequences of one length are",
        "mask= alone",
    ),
    Row("blocks of no mask", lambda: block_mask(None, 1, 1, 5, 5), TypeError, "mask is None", "a function is", "causal"),
    Row(
        "a block mask of very many heads",
        lambda: attention(*tensors((1, 6, 4096, 8), (1, 10, 1, 8), (1, 10, 1, 8)), mask=masks.causal, block_mask=blocked()),
        ValueError,
        "4096 query heads share 1",
        "at most 512 for each are",
        "mask= alone",
    ),
    Row("blocks elsewhere", lambda: block_mask(len, 1, 1, 5, 5, device="gpu"), ValueError, "device is a str, 'gpu'", "'cuda'"),
    Row("moved nowhere", lambda: blocked().to(1.5), TypeError, "device is 1.5", "a torch.device or its name is", "'cuda'"),
    Row("odd tiles", lambda: blocked().tiles(64, 33), ValueError, "tile_n is 33", "a multiple of 32 is needed", "try 128"),
    Row("tiles of 0", lambda: blocked().tiles(0, 64), ValueError, "tile_m is 0", "a multiple of 32 is needed", "try 128"),
    Row("no tile", lambda: blocked().tiles(None, 64), TypeError, "tile_m is None", "an int is needed, a multiple of 32"),
    Row("half a query", lambda: block_mask(len, 1, 1, 5.5, 5), TypeError, "seqlen_q is 5.5", "an int is", "int(seqlen_q)"),
    Row("-1 heads", lambda: block_mask(len, 1, -1, 5, 5), ValueError, "heads is -1", "a number from 0", "of a part"),
    Row(
        "FlexAttention's block mask of odd blocks",
        lambda: attention(q, k, v, block_mask=create_block_mask(masks.causal, None, None, 6, 10, device="cpu", BLOCK_SIZE=24)),
        ValueError,
        "blocks of 24 × 24",
        "multiples of 32 are",
        "BLOCK_SIZE=128",
    ),
    Row(
        "sinks a list",
        lambda: attention(q, k, v, sinks=LIST),
        TypeError,
        "sinks is a list",
        "floats (4,), one a head",
        "torch.tensor(sinks)",
    ),
    Row(
        "3 sinks",
        lambda: attention(q, k, v, sinks=torch.ones(3)),
        ValueError,
        "of shape (3,)",
        "floats (4,)",
        "one for each of 4 heads",
    ),
    Row(
        "sinks of ints",
        lambda: attention(q, k, v, sinks=torch.ones(4).int()),
        ValueError,
        "int32 on cpu",
        "floats (4,)",
        ".float()",
    ),
    Row(
        "under vmap",
        lambda: under_vmap(sinks=torch.ones(1)),
        NotImplementedError,
        "inside a transform of torch.func",
        "a plain call is",
        "flatten(0, 1)",
    ),
    Row(
        "captured gradients in a fixed order",
        scored(lambda s, b, h, i, j: s + TABLE.clone().requires_grad_()[h, 0], deterministic=True),
        NotImplementedError,
        "requires a gradient, which is added up in any order",
        "False is needed",
        "torch.use_deterministic_algorithms(True)",
    ),
    Row(
        "a bias's gradient in a fixed order",
        lambda: of_kernels(bias=torch.zeros(1, 10, dtype=HALF, requires_grad=True), deterministic=True),
        NotImplementedError,
        "a bias or a captured tensor, a Tensor of shape (10,)",
        "False is needed",
        "backend='reference'",
    ),
    Row("a bias in a list", lambda: attention(q, k, v, bias=LIST), TypeError, "bias is a list", "(2, 4, 6, 10)", "torch.tens"),
    Row(
        "a bias of other sizes",
        lambda: attention(q, k, v, bias=torch.zeros(4, 6, 9)),
        ValueError,
        "bias has shape (4, 6, 9)",
        "broadcasts to (batch, heads, seqlen_q, seqlen_k), (2, 4, 6, 10), of torch.bfloat16 or torch.float32",
        "unsqueeze",
    ),
    Row(
        "a bias of 5 dimensions",
        lambda: attention(q, k, v, bias=torch.zeros(1, 2, 4, 6, 10)),
        ValueError,
        "bias has shape (1, 2, 4, 6, 10)",
        "(2, 4, 6, 10)",
        "unsqueeze",
    ),
    Row(
        "a bias of another batch",
        lambda: attention_varlen(q[0], k[0], v[0], BOUNDS_Q, BOUNDS_K, bias=torch.zeros(3, 1, 9, 9)),
        ValueError,
        "bias has shape (3, 1, 9, 9)",
        "(2, 4, any, any)",
        "unsqueeze",
    ),
    Row(
        "a bias of ints",
        lambda: attention(q, k, v, bias=torch.zeros(6, 10).int()),
        ValueError,
        "bias is a Tensor of shape (6, 10) and dtype torch.int32 on cpu",
        "torch.bfloat16 or torch.float32",
        ".to(q.dtype)",
    ),
    Row(
        "a bias that is a mask",
        lambda: attention(q, k, v, bias=torch.ones(6, 10, dtype=torch.bool)),
        ValueError,
        "bias is a Tensor of shape (6, 10) and dtype torch.bool on cpu",
        "torch.bfloat16 or torch.float32",
        "mask=cute_attn.masks.given(bias)",
    ),
    Row("dropout in words", lambda: attention(q, k, v, dropout_p="0.1"), TypeError, "dropout_p is a str", "from 0 to below 1"),
    Row("dropout True", lambda: attention(q, k, v, dropout_p=True), TypeError, "dropout_p is True", "from 0 to below 1"),
    Row("all dropped", lambda: attention(q, k, v, dropout_p=1.0), ValueError, "dropout_p is 1.0", "to below 1", "try 0.1"),
    Row("dropout below 0", lambda: attention(q, k, v, dropout_p=-0.1), ValueError, "dropout_p is -0.1", "is needed", "try 0.1"),
    Row(
        "dropout under vmap",
        lambda: under_vmap(dropout_p=0.1),
        NotImplementedError,
        "dropout_p or block_mask are given inside a transform of torch.func",
        "a plain call is",
        "flatten(0, 1)",
    ),
]

# flash-attn's functions: their own checks, and attention's under its names.
QKV, KV = torch.zeros(2, 6, 3, 2, 16, dtype=HALF), torch.zeros(2, 10, 2, 2, 16, dtype=HALF)
INDICES = torch.tensor([0, 5])


def flash(q=q, k=k, v=v, **options):
    return lambda: flash_attn.flash_attn_func(q, k, v, **options)


def flash_varlen(**options):
    lengths = {"cu_seqlens_q": BOUNDS_Q, "cu_seqlens_k": BOUNDS_K, "max_seqlen_q": 4, "max_seqlen_k": 9}
    return lambda: flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], **{**lengths, **options})


def kvcache(**options):
    return lambda: flash_attn.flash_attn_with_kvcache(q, k, v, **options)


def with_another_flash_attn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", sys)
        flash_attn.install()


YET = "is needed, since it isn't there yet"
FLASH_ATTN = [
    # Not there yet.
    Row("all dropped", flash(dropout_p=1.0), ValueError, "dropout_p is 1.0", "from 0 to below 1 is needed", "try 0.1"),
    Row(
        "pages and rows in use",
        flash_varlen(page_table=int32([0], [1]), seqused_q=int32(1, 1)),
        NotImplementedError,
        "seqused_q is a Tensor of shape (2,) and dtype torch.int32 beside pages",
        "None is needed",
        "cu_seqlens_q of the rows in use",
    ),
    Row(
        "dropped pages",
        flash_varlen(block_table=int32([0], [1]), dropout_p=0.1),
        NotImplementedError,
        "dropout_p is 0.1 beside pages",
        "0 is needed",
        "leave it out",
    ),
    Row(
        "bounds of pages in 64 bits",
        flash_varlen(block_table=int32([0], [1]), cu_seqlens_k=BOUNDS_K.long()),
        ValueError,
        "cu_seqlens_k has dtype torch.int64",
        "torch.int32 is needed",
        "cu_seqlens_k.int()",
    ),
    Row("too many rows", kvcache(cache_seqlens=10**30), ValueError, "cache_seqlens is 1", "from 0 to 10 rows", "more pages"),
    Row(
        "nested queries of a cache",
        lambda: flash_attn.flash_attn_with_kvcache(nested(torch.jagged), k, v),
        TypeError,
        "q is a nested tensor",
        "a plain one is needed",
    ),
    Row("rows of 64 bits", kvcache(cache_seqlens=INDICES), ValueError, "cache_seqlens has dtype", "is needed", "seqlens.int()"),
    Row("rows of 1", kvcache(cache_seqlens=int32(3)), ValueError, "q is of 2 sequences where cache_seqlens is", ONE_EACH, "q"),
    Row("padding", kvcache(cache_leftpad=[0]), TypeError, "cache_leftpad is a list", "int32 tensor on cpu is needed", "try"),
    Row("its table", kvcache(block_table=int32(0, 1)), ValueError, "block_table has shape (2,)", "is needed", "len(cache_seq"),
    Row("FA3's", kvcache(page_table=int32(0, 1)), ValueError, "page_table has shape (2,)", "is needed", "len(cache_seql"),
    Row("new columns", kvcache(k=k[:, :, :1], v=v, cache_seqlens=0), ValueError, "k has shape (2, 10, 1, 16)", "in k and v"),
    Row("floats", kvcache(k=k, v=v.float(), cache_seqlens=0), ValueError, "v is torch.float32", "equal ones", "v.to(k_cache)"),
    Row(
        "a table of floats",
        kvcache(k=k[:, :1], v=v[:, :1], cache_seqlens=0, rotary_cos=TURN, rotary_sin=TURN.float()),
        ValueError,
        "rotary_sin is torch.float32",
        "equal ones are needed",
        "sin.to(q)",
    ),
    Row("no new rows", kvcache(rotary_cos=TURN, rotary_sin=TURN), ValueError, "rotary_sin) is given without k;", "new keys"),
    Row("many keys", kvcache(cache_seqlens=int32(3, 11)), ValueError, "cache_seqlens[1] is 11", "from 0 to 10", "larger cache"),
    Row(
        "pages of one",
        lambda: flash_attn.flash_attn_varlen_func(q[0], k, v, BOUNDS_Q, BOUNDS_K, 4, 9, block_table=int32([0])),
        ValueError,
        "block_table is of 1 sequences where cu_seqlens_k.diff() is of 2",
        ONE_EACH,
        "check how block_table was made",
    ),
    Row(
        "half a key in pages",
        lambda: flash_attn.flash_attn_varlen_func(
            q[0], k, v, BOUNDS_Q, BOUNDS_K, 4, 9, block_table=int32([0], [1]), seqused_k=0.5
        ),
        TypeError,
        "seqused_k is 0.5",
        "an int is needed, or an int32 tensor",
    ),
    Row("rows below 0", kvcache(cache_seqlens=-1), ValueError, "cache_seqlens is -1", "from 0 to 10 rows", "larger cache"),
    Row(
        "sparse odd rows",
        flash(q=q[..., :12].to_sparse(), k=k[..., :12]),
        TypeError,
        "q has layout torch.sparse_coo",
        "strided is needed",
    ),
    Row(
        "freed odd rows",
        flash(*(freed(x[..., :12]) for x in (q, k, v))),
        RuntimeError,
        "q has shape (2, 6, 4, 12) and no memory",
        "memory is needed",
        "fill it again",
    ),
    Row("packed pages", flash_varlen(block_table=int32([0], [1])), ValueError, "k has shape (10, 2, 16)", "page_size"),
    Row("a sink a head", flash(learnable_sink=torch.ones(3)), ValueError, "learnable_sink is a Tensor of", "(4,), one"),
    Row("qv", flash(qv=q), NotImplementedError, "qv is a Tensor of shape (2, 6, 4, 16)", YET, "torch.cat((q, qv), -1)"),
    Row("8-bit floats' scales", flash(k_descale=torch.ones(2, 2)), NotImplementedError, "k_descale is", YET, "* k_descale"),
    Row("chunks", flash(attention_chunk=64), NotImplementedError, "attention_chunk is 64", f"0 {YET}", "window_size"),
    Row("a user's score", flash(score_mod=len), NotImplementedError, "score_mod is a builtin_function", YET, "flex_attention"),
    Row("heads of q", flash(num_heads_q=4), NotImplementedError, "num_heads_q is 4", YET, "qkv.split"),
    Row("new rows", kvcache(k=k, v=v), ValueError, "k is given and cache_seqlens is None", "is needed", "cache_seqlens=0"),
    Row("cosines", kvcache(rotary_cos=q), ValueError, "rotary_cos is a Tensor", "both or none", "pass the other"),
    Row(
        "two tables",
        kvcache(block_table=int32([0], [1]), page_table=int32([0], [1])),
        ValueError,
        "block_table and page_table are given",
        "one is needed",
        "leave page_table out",
    ),
    Row("a table's name", kvcache(block_table="x"), TypeError, "block_table is a str", "int32 tensor on cpu is needed"),
    Row(
        "a table of 0 dimensions",
        kvcache(cache_seqlens=3, page_table=int32(0)[0]),
        ValueError,
        "page_table has shape ()",
        "(batch, max_pages) is needed",
        "try page_table.view(len(cache_seqlens), -1)",
    ),
    Row("a bound", kvcache(cu_seqlens_q=int32(0)[0]), ValueError, "cu_seqlens_q has shape ()", "(batch + 1,)", "flatten()"),
    Row(
        "a query of 0 dimensions",
        lambda: flash_attn.flash_attn_with_kvcache(torch.ones(()), k, v),
        ValueError,
        "q has shape ()",
        "4 dimensions (batch, seqlen, heads, head_dim) are needed",
    ),
    Row("queries of a cache", kvcache(max_seqlen_q="6"), TypeError, "max_seqlen_q is a str", "an int is needed", "None"),
    # Kinds.
    Row("dropout a string", flash(dropout_p="0"), TypeError, "dropout_p is a str", "finite number is needed", "from 0 to"),
    Row("dropout a flag", flash(dropout_p=False), TypeError, "dropout_p is False", "finite number is needed", "from 0 to"),
    Row("splits a float", flash(num_splits=1.5), TypeError, "num_splits is 1.5", "an int is needed", "or None"),
    Row("a margin of flags", flash(sm_margin=True), TypeError, "sm_margin is True", "an int is needed", "or None"),
    Row("pack_gqa a number", flash(pack_gqa=1), TypeError, "pack_gqa is 1", "True or False is needed", "pack_gqa=True"),
    Row(
        "an unknown argument",
        flash(dropout=0.0),
        TypeError,
        "dropout is no argument of flash-attn",
        "by name there are return_lse, num_splits",
        "leave it out",
    ),
    Row("longest a float", flash_varlen(max_seqlen_q=4.0), TypeError, "max_seqlen_q is 4.0", "an int is needed", "or None"),
    Row("longest of each", flash_varlen(max_seqlen_k=INDICES), TypeError, "max_seqlen_k is a Tensor", "an int is needed"),
    Row("returned 1", flash(return_attn_probs=1), TypeError, "return_attn_probs is 1", "True or False is needed"),
    Row("lse None", flash(return_lse=None), TypeError, "return_lse is None", "True or False is needed", "leave it out"),
    Row("lse of a cache", kvcache(return_softmax_lse=0), TypeError, "return_softmax_lse is 0", "True or False is needed"),
    Row("interleaved 1", kvcache(rotary_interleaved=1), TypeError, "rotary_interleaved is 1", "True or False is needed"),
    Row("cache's length", kvcache(cache_seqlens=2.0), TypeError, "cache_seqlens is 2.0", "an int is needed", "int32 tensor"),
    Row("no keys of pages", flash_varlen(cu_seqlens_k=None, page_table=int32([0])), TypeError, "cu_seqlens_k is None", "int32"),
    Row("no bounds of keys", flash_varlen(cu_seqlens_k=None), TypeError, "cu_seqlens_k is None", "is needed", "cu_seqlens_q"),
    # Attention's.
    Row("flash q a list", flash(q=[1.0]), TypeError, "q is a list", "torch.Tensor is needed", "torch.as_tensor(q)"),
    Row("flash v of 0 dimensions", flash(v=torch.ones(())), ValueError, "v has shape ()", "4 dimensions"),
    Row("causal a string", flash(causal="yes"), TypeError, "causal is a str", "True or False is needed", "causal=True"),
    Row("a scale in words", flash(softmax_scale="1"), TypeError, "softmax_scale is a str", "finite number is", "1/√head_dim"),
    Row("one side", flash(window_size=5), TypeError, "window_size is 5", "pair (left, right) is needed", "None or -1"),
    Row("windows below -1", flash(window_size=(-2, 0)), ValueError, "window_size's left side is -2", "≥ 0 is needed"),
    Row("caps below 0", flash(softcap=-1.0), ValueError, "softcap is -1.0", "≥ 0 is needed", "0 for none"),
    Row("deterministic None", flash(deterministic=None), TypeError, "deterministic is None", "True or False is needed"),
    Row("bounds of int64", flash_varlen(cu_seqlens_q=BOUNDS_Q.long()), ValueError, "torch.int64", "int32 is needed", ".int()"),
    Row("lengths of flags", flash_varlen(seqused_k=[True]), TypeError, "seqused_k is a list", "int32 tensor on cpu is needed"),
    Row(
        "head dims that are equal if padded",
        flash(q=q.new_zeros(2, 6, 4, 20), k=q.new_zeros(2, 10, 2, 24)),
        ValueError,
        "head_dim of q is 20 and of k is 24",
        "equal ones are needed",
        "check k's layout",
    ),
    # Packed tensors.
    Row(
        "qkv of two",
        lambda: flash_attn.flash_attn_qkvpacked_func(KV),
        ValueError,
        "qkv has shape (2, 10, 2, 2, 16)",
        "(batch, seqlen, 3, heads, head_dim) is needed",
        "torch.stack of q, k and v, dim=-3",
    ),
    Row(
        "packed qkv of a batch",
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(QKV, BOUNDS_Q, 4),
        ValueError,
        "qkv has shape (2, 6, 3, 2, 16)",
        "(rows of all sequences, 3, heads, head_dim) is needed",
    ),
    Row(
        "bounds of all three",
        lambda: flash_attn.flash_attn_varlen_qkvpacked_func(QKV[0], BOUNDS_Q.long(), 4),
        ValueError,
        "cu_seqlens has dtype torch.int64",
        "torch.int32 is needed",
        "try cu_seqlens.int()",
    ),
    Row(
        "kv a pair",
        lambda: flash_attn.flash_attn_kvpacked_func(q, (k, v)),
        TypeError,
        "kv is a tuple",
        "torch.Tensor is needed",
        "torch.stack of k and v, dim=-3",
    ),
    Row(
        "kv sparse",
        lambda: flash_attn.flash_attn_varlen_kvpacked_func(q, KV.to_sparse(), BOUNDS_Q, BOUNDS_K, 4, 9),
        TypeError,
        "kv has layout torch.sparse_coo",
        "torch.strided is needed",
        "kv.to_dense()",
    ),
    # Padding.
    Row("rows a list", lambda: flash_attn.index_first_axis([1], INDICES), TypeError, "x is a list", "is needed", "torch.as"),
    Row(
        "indices of flags",
        lambda: flash_attn.index_first_axis(q, INDICES > 0),
        ValueError,
        "indices has shape (2,) and dtype torch.bool",
        "int64 or int32 (rows,) is needed",
        "nonzero()",
    ),
    Row("a row", lambda: flash_attn.unpad_input(INDICES, q), ValueError, "has shape (2,)", "2 dimensions or more", "check how"),
    Row("no mask", lambda: flash_attn.unpad_input(q, None), TypeError, "attention_mask is None", "torch.Tensor is needed"),
    Row(
        "a mask of keys",
        lambda: flash_attn.unpad_input(q, torch.ones(2, 6), torch.ones(2, 10)),
        ValueError,
        "unused_mask has shape (2, 10)",
        "(2, 6), the (batch, seqlen) of hidden_states, is needed",
        "check how it was made",
    ),
    Row("batch 2.0", lambda: flash_attn.pad_input(INDICES, INDICES, 2.0, 3), TypeError, "batch is 2.0", "an int is needed"),
    Row(
        "an index too few",
        lambda: flash_attn.pad_input(torch.ones(3, 4), INDICES, 2, 6),
        ValueError,
        "batch is 2, seqlen 6, and there are 2 indices of 3 rows",
        "an index for each row are needed",
        "pass what unpad_input returned",
    ),
    Row(
        "another flash_attn",
        with_another_flash_attn,
        RuntimeError,
        "has been imported",
        "a process without it is needed",
        "call cute_attn.flash_attn.install() before",
    ),
    # scaled_dot_product_attention hands all else to torch, see test_sdpa.py.
    Row("sdpa's backend", lambda: sdpa.why_not(q, k, v, backend="mps"), ValueError, "backend is 'mps'", "is needed", "'auto'"),
    Row(
        "backend of a call",
        lambda: sdpa.scaled_dot_product_attention(q, k, v, backend=None),
        TypeError,
        "backend is None",
        "one of 'auto', 'cute', 'reference' is needed",
    ),
    Row("backend of a block", lambda: sdpa.replaced(1).__enter__(), TypeError, "backend is 1", "one of 'auto'", "is needed"),
]


def layer(mask=None, seqlen=6, **asked):
    """As a layer of a model of Transformers calls attention."""
    x = torch.zeros(2, 4, seqlen, 16, dtype=HALF)
    return lambda: transformers.attend(torch.nn.Module(), x, x, x, mask, **asked)


def not_traced(call):
    """As if attention understood no mask function."""

    def run():
        with patch("cute_attn.transformers._is_traced", lambda *_: False):
            call()

    return run


def masked(function=lambda batch, head, query, key: key <= query, **asked):
    """As a model asks for its layers' mask."""
    return lambda: transformers.mask(2, 6, 6, mask_function=function, **asked)


def imported_as(module):
    """``register()`` where this is what is there of Transformers."""

    def call():
        with patch.dict(sys.modules, {"transformers": module}):
            transformers.register()

    return call


HOLES, SDPA = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]).bool(), "attn_implementation='sdpa', or register(fallback='sdpa')"
PARTS = HOLES.int()
BAND = "causal or full attention is needed, in a window or not, of padded or packed sequences, or under a mask"
TRANSFORMERS = [
    Row("a fallback of True", lambda: transformers.register(fallback=True), TypeError, "fallback is True", "None or 'sdpa'"),
    Row(
        "another fallback",
        lambda: transformers.register(fallback="eager"),
        ValueError,
        "fallback is 'eager'",
        "None or 'sdpa' is needed",
        "leave it out",
    ),
    Row(
        "no Transformers",
        imported_as(None),
        ImportError,
        "transformers is not installed",
        "version 5 or newer is needed",
        "pip install 'transformers>=5'",
    ),
    Row(
        "Transformers 4",
        imported_as(SimpleNamespace(__version__="4.57.1")),
        ImportError,
        "transformers is 4.57.1",
        "version 5 or newer",
        "pip install -U transformers",
    ),
    Row(
        "a mask of other sizes",
        lambda: layer(masked()(), seqlen=5)(),
        ValueError,
        "5 queries and 5 keys, and its mask is of 6 and 6",
        "of the same is needed",
        "check which cache or mask",
    ),
    Row(
        "padding and lengths",
        lambda: layer(masked(attention_mask=HOLES)(), cu_seq_lens_q=int32(0, 6, 12))(),
        ValueError,
        "cu_seq_lens_q is given, and a mask with padding",
        "one of the two is needed",
        "leave out attention_mask",
    ),
    Row("a window of True", layer(sliding_window=True), TypeError, "sliding_window is True", "an int is needed, or None"),
    Row("lengths in a list", layer(cu_seq_lens_q=[0, 6, 12]), TypeError, "cu_seqlens_q is a list", "an int32 tensor on cpu is"),
    *(
        Row(name, call, transformers.Beyond, got, BAND, SDPA)
        for name, got, call in (
            ("a mask of ints", "a mask of its own, a Tensor of shape (2, 1, 6, 6)", layer(torch.zeros(2, 1, 6, 6).int())),
            ("lengths and a bias", "beside cu_seq_lens_q", layer(position_bias=torch.zeros(1), cu_seq_lens_q=int32(0, 6, 12))),
        )
    ),
    *(
        Row(name, layer(**{name: x}), transformers.Beyond, got, BAND, "attn_implementation='eager'")
        for name, got, x in (
            ("output_attentions", "attention weights, which are never in memory", True),
            ("indices", "keys that are chosen for each query", torch.zeros(1)),
            ("block_indices", "blocks of keys that are chosen for each query", torch.zeros(1)),
        )
    ),
    *(
        Row(f"{name} beside pages", layer(block_table=int32([0], [1]), **asked), transformers.Beyond, got, BAND, "'eager'")
        for name, got, asked in (
            ("dropout", "dropout of 0.1 beside pages", {"dropout": 0.1}),
            ("a bias", "a bias of the scores beside pages", {"position_bias": torch.zeros(1)}),
        )
    ),
    Row(
        "a mask of one's own",
        not_traced(masked(lambda batch, head, query, key: (key <= query) | (key < 3))),
        transformers.Beyond,
        "a mask that is not a band of keys around each query",
        BAND,
        SDPA,
    ),
    Row(
        "packed sequences and padding",
        not_traced(masked(lambda batch, head, query, key: PARTS[batch, query] == PARTS[batch, key], attention_mask=HOLES)),
        transformers.Beyond,
        "packed sequences with a cache or padding",
        BAND,
        SDPA,
    ),
    Row(
        "sequences in parts",
        not_traced(masked(lambda batch, head, query, key: PARTS[batch, query] == PARTS[batch, key])),
        transformers.Beyond,
        "packed sequences whose numbers don't ascend",
        BAND,
        SDPA,
    ),
    Row(
        "a window, and padding between keys",
        not_traced(masked(lambda batch, head, query, key: (key <= query) & (key > query - 3), attention_mask=HOLES)),
        transformers.Beyond,
        "padding between the keys of a sequence under a window",
        BAND,
        SDPA,
    ),
    Row(
        "a window ahead of a cache's end",
        not_traced(masked(lambda batch, head, query, key: key - 2 <= query, q_offset=torch.tensor(3))),
        transformers.Beyond,
        "a window past each query's own key",
        BAND,
        SDPA,
    ),
]



def pages(method, *arguments, **sizes):
    """A method of a cache of two sequences, 0 of 8 tokens and 1 of none, that has a page left."""
    cache = PagedCache(**{"pages": 3, "page_size": 4, "heads_kv": 1, "head_dim": 8, **sizes})
    cache.append([cache.new(), cache.new()], [8, 0])
    return getattr(cache, method)(*arguments)


GIVEN_OUT = "one is needed that new() or fork() has returned"
PAGED_CACHE = [
    Row("no pages", lambda: pages("new", pages=0), ValueError, "pages is 0", "an int of 1 or more is needed", "check how"),
    Row("very many pages", lambda: pages("new", pages=10**400), ValueError, "an int of about 401 digits", "of 1 or more is"),
    Row("half a layer", lambda: pages("new", layers=0.5), TypeError, "layers is 0.5", "an int is needed, of 1 or more"),
    Row("no dtype", lambda: pages("new", dtype="half"), TypeError, "dtype is a str, 'half'", "a torch.dtype is", "bfloat16"),
    Row("another device", lambda: pages("new", device="gpu"), ValueError, "device is a str, 'gpu'", "its name is", "'cuda'"),
    Row("no device", lambda: pages("new", device=0.5), TypeError, "device is 0.5", "a torch.device or its name", "'cuda'"),
    Row("another's sequence", lambda: pages("free", 2), ValueError, "sequence 2 is not among the 2", GIVEN_OUT, "was freed"),
    Row("sequences in a tensor", lambda: pages("lengths", torch.tensor([0])), ValueError, "sequence a Tensor", GIVEN_OUT),
    Row("a sequence alone", lambda: pages("append", 0), TypeError, "sequences is 0", "a list of what new()", "try [sequence]"),
    Row("True for sequence 1", lambda: pages("append", [0, True]), ValueError, "sequence True is not among the 2", GIVEN_OUT),
    Row("1.0 for sequence 1", lambda: pages("free", 1.0), ValueError, "sequence 1.0 is not among the 2", GIVEN_OUT),
    Row("a list for a sequence", lambda: pages("fork", [0]), ValueError, "sequence a list, [0]", GIVEN_OUT),
    Row("a longer fork", lambda: pages("fork", 0, 9), ValueError, "length is 9, and sequence 0 has 8", "from 0 to", "try None"),
    Row("a fork below 0", lambda: pages("fork", 0, -1), ValueError, "length is -1", "from 0 to as many are needed", "try None"),
    Row("one number of two", lambda: pages("append", [0, 1], [1]), ValueError, "tokens a list, [1]", "as many numbers", "once"),
    Row("a sequence twice", lambda: pages("append", [0, 0]), ValueError, "a list, [0, 0]", "sequences that differ", "once"),
    Row("fewer tokens", lambda: pages("append", [0], -1), ValueError, "tokens -1", "numbers of 0 or more", "once"),
    Row("half a token", lambda: pages("append", [0], 0.5), TypeError, "tokens is 0.5", "an int is needed, or one for each"),
    Row("a full cache", lambda: pages("append", [0, 1], 1), MemoryError, "1 of 3 pages are free", "2 of 4 tokens", "free()"),
    Row("few columns", lambda: pages("page_table", [1, 0], 1), ValueError, "columns is 1, and a sequence has 2", "as many are"),
]

A_PROBLEM = problem.Problem("bfloat16", 64, 64)

# What `python -m cute_attn compile` and other callers reach without a tensor.
PLAN = [
    Row(
        "unknown target",
        lambda: plan.plan(problem.Problem("bfloat16", 64, 64), "sm_75"),
        ValueError,
        "target is 'sm_75'",
        "sm_80",
    ),
    Row(
        "a mechanism the GPU lacks",
        lambda: plan.plan(problem.Problem("bfloat16", 64, 64), "sm_80", "tma_wgmma"),
        ValueError,
        "mechanism is 'tma_wgmma'",
        "sm_80 has 'cp_async'",
        "pass one of them",
    ),
    Row(
        "plan head_dim 20",
        lambda: plan.plan(problem.Problem("bfloat16", 20, 64), "sm_80"),
        ValueError,
        "head_dim is 20",
        "multiple of 8 from 8 to 256 is needed",
        "pad it",
    ),
    Row(
        "plan head_dim_v 512",
        lambda: plan.plan(problem.Problem("bfloat16", 64, 512), "sm_80"),
        ValueError,
        "head_dim_v is 512",
        "multiple of 8 from 8 to 256 is needed",
        "pad it",
    ),
    Row(
        "plan float32",
        lambda: plan.plan(problem.Problem("float32", 64, 64), "sm_80"),
        ValueError,
        "dtype is 'float32'",
        "'float16' or 'bfloat16' is needed",
        "use the reference",
    ),
    Row(
        "a plan of a dict",
        lambda: plan.plan({"dtype": "bfloat16"}, "sm_80"),
        TypeError,
        "problem is a dict",
        "a Problem is needed",
        "Problem('bfloat16', 128, 128)",
    ),
    Row(
        "a list of targets",
        lambda: plan.plan(A_PROBLEM, ["sm_80"]),
        TypeError,
        "target is a list",
        "target is needed",
        "'sm_90a'",
    ),
    Row(
        "a list of mechanisms",
        lambda: plan.plan(A_PROBLEM, "sm_80", ["cp_async"]),
        TypeError,
        "mechanism is a list",
        "the name of one is needed",
        "None for the best",
    ),
    Row("capability a list", lambda: layouts.target_of([9, 0]), TypeError, "capability is [9, 0]", "pair of ints is needed"),
    Row("capability a string", lambda: layouts.target_of("9.0"), TypeError, "capability is '9.0'", "pair of ints is needed"),
    Row(
        "capability 7.5",
        lambda: layouts.target_of((7, 5)),
        NotImplementedError,
        "compute capability 7.5",
        "8.0",
        "add a module under layouts/",
    ),
]


def table(rows):
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in rows])


def assert_raises(row: Row):
    with pytest.raises(row.error) as caught:
        row.call()
    assert type(caught.value) is row.error
    message = str(caught.value)
    for words in (row.got, row.needed, row.try_):
        assert words in message


@table(CHECKS)
def test_checks(row):
    assert_raises(row)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
@table(API)
def test_attention(row):
    assert_raises(row)


@table(FUNCTIONS)
def test_functions(row, monkeypatch):
    monkeypatch.setenv(lengths.CHECK, "1")
    assert_raises(row)


@table(LENGTHS)
def test_lengths(row, monkeypatch):
    monkeypatch.setenv(lengths.CHECK, "1")
    assert_raises(row)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
@table(CACHES)
def test_caches(row, monkeypatch):
    monkeypatch.setenv(lengths.CHECK, "1")
    assert_raises(row)


@table(FLASH_ATTN)
def test_flash_attn_and_sdpa(row, monkeypatch):
    monkeypatch.setenv(lengths.CHECK, "1")
    assert_raises(row)


@table(TRANSFORMERS)
def test_transformers(row):
    assert_raises(row)


@table(PAGED_CACHE)
def test_paged_cache(row):
    assert_raises(row)


@table(PLAN)
def test_plan(row):
    assert_raises(row)


@table(ON_TURING)
def test_attention_on_a_gpu_without_kernels(row, monkeypatch):
    pretend_capability(monkeypatch, (7, 5))
    assert_raises(row)


@table(ON_HOPPER)
def test_attention_on_hopper_without_the_dsl(row, monkeypatch, tmp_path):
    pretend_capability(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "cutlass.cute", None)  # importing it now fails as if it were not installed
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setenv(cache.CACHE_DIR_VARIABLE, str(tmp_path))
    assert_raises(row)


def pretend_capability(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(launch, "device_target", launch.device_target.__wrapped__)  # not the one with a memory


def reached(rows, file: str) -> set[int]:
    """The lines of ``file`` at which the rows' errors are raised."""
    lines = set()
    for row in rows:
        with pytest.raises(row.error) as caught:
            row.call()
        lines |= {entry.lineno + 1 for entry in caught.traceback if str(entry.path) == file}
    return lines


def raises(file: str) -> set[int]:
    """The lines of ``file`` at which it raises something of its own."""
    return {node.lineno for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Raise) and node.exc}


def test_every_error_of_the_checks_has_a_row(monkeypatch):
    """Each ``raise`` in these files is reached by a row: whoever adds one adds a row."""
    monkeypatch.setenv(lengths.CHECK, "1")
    of_cache = sys.modules[attention_kvcache.__module__]
    for module in (problem, lengths, stored, of_cache, flash_attn, functions, tracing, masks, scores, paged_cache):
        file = str(module.__file__)
        missing = raises(file) - reached([*CHECKS, *LENGTHS, *CACHES, *FLASH_ATTN, *FUNCTIONS, *PAGED_CACHE], file)
        assert not missing, f"no row for {file}, lines {sorted(missing)}"


def test_names_of_arguments_are_no_other_words(monkeypatch):
    """Of attention's refusals: flash-attn's functions put their names in the place of these, wherever they are."""
    monkeypatch.setenv(lengths.CHECK, "1")
    a_word = re.compile(rf"\b(the|they|an?) ({'|'.join([*flash_attn._NAMES, *flash_attn._NAMES_OF_CACHE])})\b")
    for row in [*CHECKS, *CACHES]:
        with pytest.raises(row.error) as caught:
            row.call()
        assert not a_word.search(str(caught.value)), row.what


def test_right_inputs_pass(monkeypatch):
    """The rows are wrong by the one thing they name: without it they are accepted."""
    monkeypatch.setenv(lengths.CHECK, "1")
    flash()(), flash_varlen()(), kvcache(cache_seqlens=9)()
    flash_attn.flash_attn_qkvpacked_func(QKV), flash_attn.flash_attn_kvpacked_func(q, KV)
    flash_attn.index_first_axis(q, INDICES[:1]), flash_attn.unpad_input(q, torch.ones(2, 6)), sdpa.why_not(q, k, v)
    packed(seqused_q=int32(0, 4), seqused_k=int32(0, 9))()
    used(seqused_q=int32(6, 0), seqused_k=int32(0, 10))()
    call = check(q, k, v)()
    assert (call.batch, call.seqlen_q, call.heads, call.head_dim) == (2, 6, 4, 16)
    assert (call.seqlen_k, call.heads_kv, call.head_dim_v, call.shift) == (10, 2, 16, 4)
    assert (call.scale, call.left, call.right, call.softcap) == (0.25, None, None, 0.0)
    problem.check_tensors_for_gpu(q, k, v, call)
    problem.check_tensors_for_gpu(q, k, v, check(q, k, v, scale=-1.0, softcap=5.0)())
    # A transposed (batch, heads, seqlen, head_dim) tensor, a slice that stays aligned, a size of 1 with any stride.
    head_first_q, head_first_k, head_first_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    problem.check_tensors_for_gpu(head_first_q, head_first_k, head_first_v, call)
    problem.check_strides("k", torch.zeros(2, 10, 2, 24, dtype=HALF)[..., 8:])
    odd = torch.randn(30, dtype=HALF).as_strided((1, 2, 1, 8), (3, 16, 7, 1))
    readable = problem.check_strides("k", odd)
    assert readable.data_ptr() == odd.data_ptr()
    assert torch.equal(readable, odd)
    assert all(stride % 8 == 0 for stride in readable.stride()[:3])
    assert rules(window=(None, -1))().left is None
    assert rules(window=[3, 4], causal=True)() == rules(window=(3, 0))()
    assert rules(window=(3, -1), causal=True)().right == 0
    assert rules(softcap=None)().softcap == 0.0
    assert rules(scale=2)().scale == 2.0


def test_auto_on_the_cpu_is_the_reference():
    out, lse = attention(*(torch.ones_like(x) for x in (q, k, v)), return_lse=True)
    assert torch.equal(out, torch.ones(2, 6, 4, 16, dtype=HALF))
    torch.testing.assert_close(lse, torch.full((2, 4, 6), 4.0 + math.log(10)))
    named = attention(q, k, v, backend="reference")
    assert isinstance(named, torch.Tensor)
    assert torch.equal(named, torch.zeros(2, 6, 4, 16, dtype=HALF))
