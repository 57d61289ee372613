"""What is asked of the kernels: a frozen description of one attention call, without any length in it.

A :class:`Problem` and a :class:`~cute_attn.layouts.base.Config` are together the key under which a kernel is compiled
and cached. So a Problem holds only what changes the code of a kernel. Batch, lengths, strides, head counts, the values
of ``scale``, ``window`` and ``softcap`` are run-time values; they live in :class:`Call`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

GPU_DTYPES = (torch.float16, torch.bfloat16)
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIM_STEP = 8
HEAD_DIM_MAX = 256
ALIGN_BYTES = 16  # TMA and 16-byte cp.async both need it of the base address and of every stride


@dataclass(frozen=True)
class Problem:
    """What changes a kernel's code, and nothing else.

    ``dtype`` is torch's name of it (``"bfloat16"``). ``bounded_left`` and ``bounded_right`` say on which sides the band
    of visible keys has an edge (``causal`` is a right edge at 0); where the edges lie is a run-time value.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    bounded_left: bool = False
    bounded_right: bool = False
    softcap: bool = False
    return_lse: bool = False

    @staticmethod
    @lru_cache(maxsize=1024)
    def intern(*fields) -> Problem:
        """The one Problem with these fields; spares an eager call the construction and the comparison."""
        return Problem(*fields)


@dataclass(frozen=True)
class Call:
    """The run-time values of one call, checked: sizes, the scale, the band's edges, the softcap.

    ``left`` and ``right`` are how far a query sees to either side of its aligned position; ``None`` is unbounded.
    """

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    left: int | None
    right: int | None
    softcap: float

    @property
    def shift(self) -> int:
        """The key position that query 0 is aligned with: the last query is aligned with the last key."""
        return self.seqlen_k - self.seqlen_q

    @property
    def empty(self) -> bool:
        """No score is computed at all: the output is zeros and the log-sum-exp is −inf."""
        return self.batch == 0 or self.heads == 0 or self.seqlen_q == 0 or self.seqlen_k == 0


def check_call(q, k, v, *, scale, causal, window, softcap) -> Call:
    """Check what holds for every backend, and return the call's run-time values.

    Raises ``TypeError`` for what is not a tensor or a number and ``ValueError`` for shapes, dtypes and values that
    don't fit together; each message says what was got, what is needed and what to try.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed: try torch.as_tensor({name})")
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    if len(shape_q) != 4 or len(shape_k) != 4 or len(shape_v) != 4:
        name, x = next((n, x) for n, x in (("q", q), ("k", k), ("v", v)) if x.dim() != 4)
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; 4 dimensions (batch, seqlen, heads, head_dim) are needed: "
            f"add the missing ones with {name}.unsqueeze(0)"
        )
    batch, seqlen_q, heads, head_dim = shape_q
    batch_k, seqlen_k, heads_kv, head_dim_k = shape_k
    batch_v, seqlen_v, heads_v, head_dim_v = shape_v
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; one dtype is needed: try k.to(q.dtype), v.to(q.dtype)"
        )
    if q.device != k.device or q.device != v.device:
        raise ValueError(
            f"q, k, v lie on {q.device}, {k.device}, {v.device}; one device is needed: try k.to(q.device)"
        )
    if batch != batch_k or batch != batch_v:
        raise ValueError(f"batch sizes of q, k, v are {batch}, {batch_k}, {batch_v}; equal ones are needed: expand k and v")
    if seqlen_k != seqlen_v or heads_kv != heads_v:
        raise ValueError(
            f"k is {tuple(shape_k)} and v is {tuple(shape_v)}; equal (seqlen, heads) are needed: only head_dim may differ"
        )
    if head_dim != head_dim_k:
        raise ValueError(f"head_dim of q is {head_dim} and of k is {head_dim_k}; equal ones are needed: check k's layout")
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv):
        raise ValueError(
            f"q has {heads} heads and k has {heads_kv}; q's must be a multiple of k's (GQA): "
            f"repeat k's and v's heads or check that dimension 2 is the heads"
        )
    if head_dim == 0 or head_dim_v == 0:
        raise ValueError(f"head_dim is {head_dim} and head_dim_v is {head_dim_v}; at least 1 is needed")
    if q.dtype not in ALL_DTYPES:
        raise ValueError(f"dtype is {q.dtype}; float16, bfloat16, float32 or float64 is needed: try .to(torch.bfloat16)")
    left, right = _edges(causal, window)
    return Call(
        batch,
        heads,
        heads_kv,
        seqlen_q,
        seqlen_k,
        head_dim,
        head_dim_v,
        _scale(scale, head_dim),
        left,
        right,
        _softcap(softcap),
    )


def problem_of(dtype: torch.dtype, call: Call, return_lse: bool) -> Problem:
    """The Problem of a checked call."""
    return Problem.intern(
        str(dtype)[6:],  # "torch.bfloat16" -> "bfloat16"
        call.head_dim,
        call.head_dim_v,
        call.left is not None,
        call.right is not None,
        call.softcap > 0.0,
        return_lse,
    )


def check_tensors_for_gpu(q, k, v) -> None:
    """Check what the kernels need beyond :func:`check_call`: dtype, head dims, strides and alignment."""
    if q.dtype not in GPU_DTYPES:
        raise ValueError(
            f"dtype is {q.dtype}; the GPU kernels take float16 and bfloat16: try .to(torch.bfloat16), or backend='reference'"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        head_dim = x.shape[3]
        if head_dim % HEAD_DIM_STEP or head_dim > HEAD_DIM_MAX:
            raise ValueError(
                f"head_dim of {name} is {head_dim}; a multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX} is needed: "
                f"pad with torch.nn.functional.pad, or use backend='reference'"
            )
        check_strides(name, x)


def check_strides(name: str, x: torch.Tensor) -> None:
    """Check that 16-byte copies can read ``x``: last dimension contiguous, address and strides multiples of 16 bytes."""
    size = x.element_size()
    *outer, last = x.stride()
    if last != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"the last dimension of {name} has stride {last}; 1 is needed (head_dim contiguous): try {name}.contiguous()"
        )
    if x.data_ptr() % ALIGN_BYTES:
        raise ValueError(
            f"{name} starts at an address that is {x.data_ptr() % ALIGN_BYTES} past a multiple of {ALIGN_BYTES} bytes; "
            f"a multiple is needed: try {name}.clone()"
        )
    for stride, extent in zip(outer, x.shape, strict=False):
        if extent > 1 and stride * size % ALIGN_BYTES:
            raise ValueError(
                f"{name} has strides {tuple(x.stride())}; multiples of {ALIGN_BYTES // size} elements "
                f"({ALIGN_BYTES} bytes) are needed: try {name}.contiguous()"
            )


def _scale(scale, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale is a {type(scale).__name__}; a number is needed: try float(scale), or None for 1/√head_dim")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; a finite number is needed, or None for 1/√head_dim")
    return float(scale)


def _softcap(softcap) -> float:
    if softcap is None:
        return 0.0
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap is a {type(softcap).__name__}; a number is needed, or 0 for none: try float(softcap)")
    if not (math.isfinite(softcap) and softcap >= 0.0):
        raise ValueError(f"softcap is {softcap}; a finite number ≥ 0 is needed: 0 is none")
    return float(softcap)


def _edges(causal, window) -> tuple[int | None, int | None]:
    """The band's edges from ``causal`` and ``window``: causal is a right edge at 0."""
    if window is None:
        return (None, 0) if causal else (None, None)
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise TypeError(f"window is {window!r}; a pair (left, right) is needed, with None or -1 for an unbounded side")
    edges: list[int | None] = []
    for side, reach in zip(("left", "right"), window, strict=True):
        if reach is not None and not isinstance(reach, int):
            raise TypeError(f"window's {side} side is a {type(reach).__name__}; an int is needed, or None for unbounded")
        if reach is not None and reach < -1:
            raise ValueError(f"window's {side} side is {reach}; an int ≥ 0 is needed, or None or -1 for unbounded")
        edges.append(None if reach is None or reach == -1 else reach)
    left, right = edges
    return left, (0 if right is None else min(right, 0)) if causal else right
