"""What is asked of the kernels: a frozen description of one attention call, without any length in it.

A :class:`Problem` and a :class:`~cute_attn.layouts.base.Config` are together the key under which a kernel is compiled
and cached. So a Problem holds only what changes the code of a kernel. Batch, lengths, strides, head counts, the values
of ``scale``, ``window`` and ``softcap`` are run-time values; they live in :class:`Call`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from cute_attn import stored
from cute_attn.arguments import check_layout, check_memory, check_tensor, flag, integer, is_traced, number, shown
from cute_attn.expressions import NOTHING, Expression
from cute_attn.lengths import Lengths
from cute_attn.rules import USUAL_CAP, score_scales

GPU_DTYPES = (torch.float16, torch.bfloat16)
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in ALL_DTYPES}
HEAD_DIM_STEP = 8
HEAD_DIM_MAX = 256
SCALE_MIN, SCALE_MAX = 1e-33, 1e33  # of the kernels: with up to 2³¹ keys, float32 holds all that they make of it and of 1 / it
ALIGN_BYTES = 16  # TMA and 16-byte cp.async both need it of the base address and of every stride
ALIGN_ELEMENTS = ALIGN_BYTES // 2  # the same for a stride counted in elements, of either of GPU_DTYPES
GRADIENTS = ("", "q", "k", "v", "qk", "qv", "kv", "qkv")
INT64_MAX = torch.iinfo(torch.int64).max
TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # below TINY digits are lost
SCALES, SOFTCAPS = "or None for 1/√head_dim", "above 0, or 0 for none"
UNBOUNDED = "with None or -1 for an unbounded side"


@dataclass(frozen=True)
class Problem:
    """What changes a kernel's code, and nothing else.

    ``dtype`` is torch's name of it (``"bfloat16"``). ``bounded_left`` and ``bounded_right`` say on which sides the band
    of visible keys has an edge (``causal`` is a right edge at 0); where the edges lie is a run-time value.

    ``gradients`` makes it the backward pass, for the inputs it names (``"qkv"``, ``"kv"``, …); ``""`` is the forward pass.
    In the backward pass ``return_lse`` says that the log-sum-exp has a gradient, too, and ``deterministic`` that dQ's
    parts are added in a fixed order. In the forward pass ``for_backward`` says that a backward pass will want the log-sum-exp
    in its own units.

    ``ragged`` names what says how long each sequence is, a part of ``lengths.NAMES`` in this order, with spaces between; ``""``
    is a rectangle.

    ``merges`` makes it the kernel that merges partial results (``merge.py``): the dtype of the output so far, ``"float32"`` or
    ``dtype``; ``""`` is attention.

    ``large_cap`` is of a softcap above ``rules.USUAL_CAP``, for which the kernels take a slower tanh.

    ``expression`` is what the user's functions compute, ``sinks`` says that each row's softmax has one more logit, and
    ``dropout`` that probabilities are dropped.

    ``blocks`` is ``"listed"`` where a block mask says which tiles there are to visit, and ``"classified"`` makes it the kernel
    that finds out which a mask hides (``classify.py``), ``"key lists"`` and ``"query lists"`` the kernels that make such lists
    of tiles (``enlist.py``).

    ``rows`` makes it attention to a cache, in tiles of so many rows; 0 is none. ``stored`` names what says where keys and
    queries lie, a part of ``stored.CODE_NAMES``, with spaces between, and ``invariant`` that keys are split at fixed places.
    ``appends`` makes it the kernel that writes new keys into a cache: ``"as they are"``, or turned, in ``"halves"`` or
    ``"interleaved"``.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    bounded_left: bool = False
    bounded_right: bool = False
    softcap: bool = False
    return_lse: bool = False
    gradients: str = ""
    deterministic: bool = False
    for_backward: bool = False
    large_cap: bool = False
    ragged: str = ""
    sinks: bool = False
    expression: Expression = NOTHING
    merges: str = ""
    dropout: bool = False
    blocks: str = ""
    rows: int = 0
    stored: str = ""
    invariant: bool = False
    appends: str = ""

    def __post_init__(self):
        """A value of another kind would be another key, even if it is equal."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                raise TypeError(f"Problem's {field.name} is {shown(value)}; a value of type {field.type} is needed")
        if self.gradients not in GRADIENTS:
            raise ValueError(f"Problem's gradients is {self.gradients!r}; one of {GRADIENTS} is needed")

    def has_unused(self, side: str) -> bool:
        """Whether a tile may have rows of q or k (``side``) that its sequence doesn't have, and whose results are written."""
        return f"seqused_{side}" in self.ragged

    @property
    def packed(self) -> bool:
        """Whether the rows of all sequences are one after another, so that tensors have no batch."""
        return bool(self.ragged) or "cu_seqlens_q" in self.stored

    @property
    def masked(self) -> bool:
        """Whether a tile may hold keys that some of its rows see and others don't."""
        return self.bounded_left or self.bounded_right or self.expression.mask is not None

    @property
    def takes_registers(self) -> bool:
        """Whether what is computed of a score takes registers that a thread of warpgroup MMA would hold other things in:
        functions, dropout, a tanh."""
        return self.has_places or self.softcap

    @property
    def has_places(self) -> bool:
        """Whether what is computed of a score depends on its sequence, head and positions."""
        return bool(self.expression) or self.dropout

    @property
    def masks_all(self) -> bool:
        """Whether any key may be hidden from any query, so that every tile has to mask."""
        return self.expression.mask is not None and not self.blocks

    @property
    def unequal(self) -> bool:
        """Whether tiles of a head cost unequal time, and those at an end of its sequence the most."""
        return self.bounded_right or bool(self.blocks)

    @staticmethod
    @lru_cache(maxsize=1024)
    def intern(*fields, **named) -> Problem:
        """The one Problem with these fields; spares an eager call the construction and the comparison."""
        return Problem(*fields, **named)


@dataclass(slots=True)
class Call:
    """The run-time values of one call, checked: sizes, the scale, the band's edges, the softcap.

    One is made in every eager call, so it is neither frozen nor a tuple: those take longer to make or to read.

    ``left`` and ``right`` are how far a query sees to either side of its aligned position; ``None`` is unbounded. With
    ``lengths`` the batch is 1, the seqlens are all rows, and the tensors have no dimension for the batch: ``(rows, heads,
    head_dim)``, and of the log-sum-exp ``(heads, rows)``.

    While a graph is made they may be symbols, the scale and the softcap tensors, and the scale None, for 1/√head_dim.

    ``heads_first`` says that the tensors are ``(batch, heads, seqlen, head_dim)``, as torch's own attention takes them.
    ``packs`` says that gradients may be parts of one tensor, where q, k and v are: whoever unpacked these has them packed then.

    ``plans`` is a place for how calls with tensors of the same shapes are computed (``launch.py``), where one is kept for all
    of them; ``kept_for`` is the device and the dtype of these then. ``passes`` are a backend's, as ``autograd.Attention`` takes
    them.

    ``captured`` are the tensors that ``expression`` reads, which while a graph is made is a text (``functions.restored``);
    ``sinks`` are ``(heads,)``, ``dropout`` is the probability of being dropped and ``seed`` what decides who is
    (``dropout.draw_seed``). ``sequence`` is the number of the first element of the batch, as functions get it.

    ``stored`` says where keys and values lie in a cache; ``batch`` and ``seqlen_k`` are sequences and the most keys of one
    then.
    """

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    scale: Any
    left: int | None
    right: int | None
    softcap: Any
    lengths: Lengths | None = None
    packs: bool = False
    heads_first: bool = False
    expression: Any = None  # or an Expression, of which torch.compile can't make a default
    captured: tuple[torch.Tensor, ...] = ()
    sinks: torch.Tensor | None = None
    sequence: int = 0
    plans: dict[Any, Any] | None = None
    kept_for: tuple[torch.device, torch.dtype] | None = None
    passes: tuple[Any, Any] | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None
    blocks: Any = None  # or a BlockMask
    stored: stored.Stored | None = None

    @property
    def others(self) -> tuple[torch.Tensor | None, ...]:
        """What may have a gradient besides q, k and v: the sinks and the captured tensors; nothing where there are none."""
        return () if self.sinks is None and not self.captured else (self.sinks, *self.captured)

    @property
    def has_rules(self) -> bool:
        """Whether anything but the usual rules changes scores, or what is made of them."""
        return bool(self.expression) or not self.sinks is self.seed is self.blocks is None

    @property
    def shift(self) -> int:
        """The key position that query 0 is aligned with: the last query is aligned with the last key."""
        return self.seqlen_k - self.seqlen_q

    @property
    def bounded(self) -> bool:
        """Whether the band has an edge."""
        return self.left is not None or self.right is not None

    @property
    def masked(self) -> bool:
        """Whether there may be keys that some queries see and others don't."""
        return self.bounded or (self.expression is not None and self.expression.mask is not None)

    @property
    def empty(self) -> bool:
        """No score is computed at all: the output is zeros and the log-sum-exp is −inf."""
        return self.batch == 0 or self.heads == 0 or self.seqlen_q == 0 or self.seqlen_k == 0


def check_call(q, k, v, scale, causal, window, softcap, packed: bool = False, heads_first: bool = False) -> Call:
    """Check what holds for every backend, and return the call's run-time values; ``packed`` without the lengths, which are
    :func:`~cute_attn.lengths.check_lengths`'s; ``heads_first`` of tensors ``(batch, heads, seqlen, head_dim)``.

    Raises ``TypeError`` for a value of a wrong kind and ``ValueError`` for shapes, dtypes and values that don't fit
    together; each message says what was got, what is needed and what to try.
    """
    try:
        fits = isinstance(q.dtype, torch.dtype) and isinstance(k.dtype, torch.dtype) and isinstance(v.dtype, torch.dtype)
        nested = getattr(q, "is_nested", False) or getattr(k, "is_nested", False) or getattr(v, "is_nested", False)
        if packed:
            batch = batch_k = batch_v = 1
            seqlen_q, heads, head_dim = q.shape
            seqlen_k, heads_kv, head_dim_k = k.shape
            seqlen_v, heads_v, head_dim_v = v.shape
        elif heads_first:
            batch, heads, seqlen_q, head_dim = q.shape
            batch_k, heads_kv, seqlen_k, head_dim_k = k.shape
            batch_v, heads_v, seqlen_v, head_dim_v = v.shape
        else:
            batch, seqlen_q, heads, head_dim = q.shape
            batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
            batch_v, seqlen_v, heads_v, head_dim_v = v.shape
    except (AttributeError, TypeError, ValueError, RuntimeError):  # not tensors, other dimensions, nested tensors
        fits = nested = False
    if nested or not fits:
        _check_shapes(q, k, v, packed)
    check_alike(q, k, v)
    if not batch == batch_k == batch_v:
        raise ValueError(f"batch sizes of q, k, v are {batch}, {batch_k}, {batch_v}; equal ones are needed: expand k and v")
    if seqlen_k != seqlen_v or heads_kv != heads_v:
        raise ValueError(
            f"k is {tuple(k.shape)} and v is {tuple(v.shape)}; equal (seqlen, heads) are needed: only head_dim may differ"
        )
    _check_heads(heads, heads_kv, head_dim, head_dim_k, head_dim_v)
    sizes = batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
    return _with_rules(sizes, scale, causal, window, softcap, heads_first)


def _check_heads(heads, heads_kv, head_dim, head_dim_k, head_dim_v, k="k", v="v") -> None:
    """Refuse heads that are no multiple of the key heads, and head dims that don't fit or are none."""
    if head_dim != head_dim_k:
        raise ValueError(f"head_dim of q is {head_dim} and of {k} is {head_dim_k}; equal ones are needed: check {k}'s layout")
    if heads != heads_kv and (not heads_kv or heads % heads_kv):
        raise ValueError(
            f"q has {heads} heads and {k} has {heads_kv}; q's must be a multiple of {k}'s (GQA): "
            f"repeat {k}'s and {v}'s heads or check that the last dimension but one is the heads"
        )
    if not head_dim or not head_dim_v:
        raise ValueError(
            f"head_dim is {head_dim} and head_dim_v is {head_dim_v}; at least 1 is needed: check the last dimension"
        )


def _with_rules(sizes: tuple, scale, causal, window, softcap, heads_first: bool = False) -> Call:
    """The Call of these sizes, once the usual rules are checked."""
    batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v = sizes
    if type(causal) is not bool:
        causal = flag("causal", causal)
    if window is None:
        left, right = None, (0 if causal else None)
    else:
        left, right = edges_of(causal, window, seqlen_q + seqlen_k)
    if softcap is None:
        softcap = 0.0
    if scale is None and type(softcap) is float and not softcap:
        scale = head_dim**-0.5
    else:
        scale, softcap = _scores(head_dim**-0.5 if scale is None else scale, softcap)
    sizes = batch, heads, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
    return Call(*sizes, scale, left, right, softcap, heads_first=heads_first)


def check_call_of_cache(q, k_cache, v_cache, where: tuple, scale, causal, window, softcap) -> Call:
    """:func:`check_call` of queries ``(batch, seqlen_q, heads, head_dim)``, or packed ones, ``(rows, heads, head_dim)``, and a
    cache; ``where`` are the tensors of ``stored.NAMES``."""
    _check_kinds({"q": q, "k_cache": k_cache, "v_cache": v_cache})
    packed = where[stored.NAMES.index("cu_seqlens_q")] is not None
    if q.dim() != (3 if packed else 4):
        need = "3 dimensions (rows of all sequences" if packed else "4 dimensions (batch, seqlen"
        raise ValueError(
            f"q has shape {tuple(q.shape)}; {need}, heads, head_dim) are needed: try "
            + ("q.flatten(0, 1)" if packed else "q.unsqueeze(1) of one query each, or cu_seqlens_q")
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; 4 dimensions (batch, capacity, heads, head_dim) or (pages, page_size, "
                f"heads, head_dim) are needed: check its layout"
            )
    seqlen_q, heads, head_dim = q.shape[-3:]
    (*rows, heads_kv, head_dim_k), (*rows_v, heads_v, head_dim_v) = k_cache.shape, v_cache.shape
    if rows != rows_v or heads_kv != heads_v:
        raise ValueError(
            f"k_cache is {tuple(k_cache.shape)} and v_cache is {tuple(v_cache.shape)}; "
            f"equal sizes are needed: only head_dim may differ"
        )
    check_alike(q, k_cache, v_cache, "k_cache", "v_cache")
    _check_heads(heads, heads_kv, head_dim, head_dim_k, head_dim_v, "k_cache", "v_cache")
    keys = stored.check_stored(q, k_cache, where)
    sizes = keys.batch, heads, heads_kv, seqlen_q, keys.capacity, head_dim, head_dim_v
    call = _with_rules(sizes, scale, causal, window, softcap)
    call.stored = keys
    return call


def _check_kinds(tensors: dict[str, Any]) -> None:
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed: try torch.as_tensor({name})")
    for name, x in tensors.items():
        check_layout(name, x)


def _check_shapes(q, k, v, packed: bool) -> None:
    """Refuse what is no tensor of as many dimensions as are needed."""
    tensors = {"q": q, "k": k, "v": v}
    _check_kinds(tensors)
    for name, x in tensors.items():
        if packed and x.dim() != 3:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; 3 dimensions (rows of all sequences, heads, head_dim) are needed: "
                f"try {name}.flatten(0, 1) of a batch of sequences, or attention()"
            )
        if not packed and x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; 4 dimensions (batch, seqlen, heads, head_dim) are needed: "
                f"add the missing ones with {name}.unsqueeze(0)"
            )


def check_alike(q, k, v, of_k="k", of_v="v") -> None:
    """Refuse tensors that differ in dtype or device, or whose dtype no backend takes; ``of_k`` and ``of_v`` are their names."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, {of_k}, {of_v} have dtypes {q.dtype}, {k.dtype}, {v.dtype}; one dtype is needed: "
            f"try {of_k}.to(q.dtype), {of_v}.to(q.dtype)"
        )
    if q.dtype not in ALL_DTYPES:
        raise ValueError(f"dtype is {q.dtype}; float16, bfloat16, float32 or float64 is needed: try .to(torch.bfloat16)")
    if not q.device == k.device == v.device:
        where = f"{q.device}, {k.device}, {v.device}"
        raise ValueError(f"q, {of_k}, {of_v} lie on {where}; one device is needed: try {of_k}.to(q.device)")


def check_sinks(sinks, q: torch.Tensor, heads: int) -> None:
    check_tensor("sinks", sinks, f"floats ({heads},), one a head, are needed: try torch.tensor(sinks)")
    if sinks.shape != (heads,) or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks is {shown(sinks)} on {sinks.device}; floats ({heads},), one a head, on {q.device} are needed: try "
            + (".float() and .to(q.device)" if sinks.shape == (heads,) else f"one for each of {heads} heads")
        )


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype products of inputs in ``dtype`` are added up, and log-sum-exps are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def problem_of(
    dtype: torch.dtype, call: Call, return_lse: bool,
    gradients: str = "", deterministic: bool = False, for_backward: bool = False,
) -> Problem:  # fmt: skip
    """The Problem of a checked call, or of its backward pass: ``gradients`` names the inputs, in the order of ``"qkv"``."""
    return Problem.intern(
        DTYPE_NAMES[dtype],
        call.head_dim,
        call.head_dim_v,
        call.left is not None,
        call.right is not None,
        call.softcap > 0.0,
        bool(return_lse),  # a key must not depend on how it was spelt
        gradients,
        deterministic,
        for_backward,
        call.softcap > USUAL_CAP,
        "" if call.lengths is None else call.lengths.names,
        call.sinks is not None and not gradients,  # a backward pass has them in the log-sum-exp
        (call.expression if gradients else call.expression.without_partials) if call.expression else NOTHING,
        "",
        call.dropout > 0.0,
        "" if call.blocks is None else "listed",
    )


def check_tensors_for_gpu(q, k, v, call: Call):
    """Check what the kernels need beyond :func:`check_call`: dtype, head dims, strides and alignment.

    Returns q, k, v as the kernels can read them: the same memory, see :func:`check_strides`.
    """
    check_for_kernels(q.dtype, call)
    return check_strides("q", q), check_strides("k", k), check_strides("v", v)


def check_for_kernels(dtype: torch.dtype, call: Call) -> None:
    """Check what the kernels need of a call whose tensors need not exist."""
    if dtype not in GPU_DTYPES:
        raise ValueError(
            f"dtype is {dtype}; the GPU kernels take float16 and bfloat16: try .to(torch.bfloat16), or backend='reference'"
        )
    for name, head_dim in (("head_dim", call.head_dim), ("head_dim_v", call.head_dim_v)):
        if head_dim % HEAD_DIM_STEP or head_dim > HEAD_DIM_MAX:
            raise ValueError(
                f"{name} is {head_dim}; a multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX} is needed: "
                f"pad with torch.nn.functional.pad, or use backend='reference'"
            )
    if not call.softcap and call.scale <= 0.0:
        raise ValueError(
            f"scale is {call.scale}; the GPU kernels need one above 0, since they look for a row's largest score before "
            f"they multiply by it: negate q instead, or use backend='reference'"
        )
    name, value = ("softcap", call.softcap) if call.softcap else ("scale", call.scale)
    if not SCALE_MIN <= value <= SCALE_MAX:
        raise ValueError(
            f"{name} is {value}; the GPU kernels take one from {SCALE_MIN:g} to {SCALE_MAX:g}, since they divide by it: "
            f"multiply q instead, or use backend='reference'"
        )


def is_aligned(x: torch.Tensor) -> bool:
    """One look for the usual case: every address that a row of a GPU dtype can have is a multiple of 16 bytes."""
    try:
        strides = x.stride()
        s0, s1, s2, s3 = strides if len(strides) == 4 else (0, *strides)
        address = x.data_ptr()
    except (RuntimeError, ValueError):  # a tensor without memory of its own, or of other dimensions: check_strides looks closer
        return False
    return bool(s3 == 1 and address) and not ((s0 | s1 | s2) % ALIGN_ELEMENTS or address % ALIGN_BYTES)


def check_strides(name: str, x: torch.Tensor) -> torch.Tensor:
    """Check that 16-byte copies can read ``x``: memory of its own, last dimension contiguous, address and strides multiples
    of 16 bytes. Returns ``x`` as the kernels can read it: the same memory, see :func:`strides_for_kernels`.
    """
    if is_aligned(x):
        return x
    check_memory(name, x)
    view = strides_for_kernels(name, x)
    if x.data_ptr() % ALIGN_BYTES:
        raise ValueError(
            f"{name} starts at an address that is {x.data_ptr() % ALIGN_BYTES} past a multiple of {ALIGN_BYTES} bytes; "
            f"a multiple is needed: try {name}.clone()"
        )
    return view


def strides_for_kernels(name: str, x: torch.Tensor) -> torch.Tensor:
    """Check the strides of ``x``, which may have a shape only.

    The stride of a dimension of size 1 is never used, so any is welcome; but the compiled kernels count on multiples, so
    what is returned is a view of ``x`` that has one there.
    """
    size = x.element_size()
    *outer, last = x.stride()
    if last != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"the last dimension of {name} has stride {last}; 1 is needed (head_dim contiguous): try {name}.contiguous()"
        )
    for stride, extent in zip(outer, x.shape, strict=False):
        if extent > 1 and stride * size % ALIGN_BYTES:
            raise ValueError(
                f"{name} has strides {tuple(x.stride())}; multiples of {ALIGN_BYTES // size} elements "
                f"({ALIGN_BYTES} bytes) are needed: try {name}.contiguous()"
            )
    unused = -(-x.shape[-1] * size // ALIGN_BYTES) * ALIGN_BYTES // size
    return x.as_strided(x.shape, [unused if n == 1 else s for s, n in zip(outer, x.shape, strict=False)] + [last])


def _scores(scale, softcap) -> tuple[float, float]:
    """Scale and softcap, checked: with them float32 can hold what a score is multiplied by. One rule for every backend."""
    if type(scale) is not float:
        scale = number("scale", scale, SCALES)
    if type(softcap) is not float:
        softcap = number("softcap", softcap, SOFTCAPS)
    unknown = (torch.Tensor, torch.SymFloat)
    if torch.compiler.is_dynamo_compiling() or isinstance(scale, unknown) or isinstance(softcap, unknown):
        return scale, softcap  # the operator will look at them: torch.compile may have symbols here, and tensors no values yet
    log2, by_cap = score_scales(scale, softcap)
    fits = TINY <= abs(scale) <= LARGEST and TINY <= abs(log2) <= LARGEST
    if not (fits and (softcap == 0.0 or (softcap > 0.0 and TINY <= abs(by_cap) <= LARGEST))):
        _check_scores(scale, softcap)
    return scale, softcap


def _check_scores(scale: float, softcap: float) -> None:
    """Refuse a scale or a softcap that _scores could not pass at first sight, in words; a scale of 0 is none of these."""
    number("scale", scale, SCALES)
    number("softcap", softcap, SOFTCAPS)
    if softcap < 0.0:
        raise ValueError(f"softcap is {softcap}; a number ≥ 0 is needed, or 0 for none")
    names = ("softcap · log2 e", "scale / softcap", "scale") if softcap else ("scale · log2 e",)
    for name, factor in zip(names, (*score_scales(scale, softcap), scale), strict=False):
        if not (TINY <= abs(factor) <= LARGEST or factor == scale == 0.0):
            raise ValueError(
                f"{name} is {factor:.3g}, with scale {scale:.3g} and softcap {softcap:.3g}; scores and gradients are "
                f"multiplied by it in float32, so from {TINY:.3g} to {LARGEST:.3g} is needed: "
                f"try scale=None, for 1/√head_dim, and a softcap such as 50"
            )


def edges_of(causal, window, farthest: int) -> tuple[int | None, int | None]:
    """The band's edges from ``causal`` and ``window``: causal is a right edge at 0.

    No query sees farther than ``farthest``, the sum of the lengths; a greater reach, which 32 bits might not hold, is cut. In a
    graph that is being made, whose lengths may be others later, that is left to the operator, which comes here again.
    """
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise TypeError(f"window is {shown(window)}; a pair (left, right) is needed, {UNBOUNDED}")
    if torch.compiler.is_compiling() or type(farthest) is not int:
        farthest = INT64_MAX
    edges: list[int | None] = []
    for side, given in zip(("left", "right"), window, strict=True):
        reach = given
        if reach is not None and type(reach) is not int:
            reach = integer(f"window's {side} side", reach, "or None for unbounded")
        if not (is_traced(given) or isinstance(reach, torch.SymInt)):
            if reach is not None and reach < -1:
                raise ValueError(f"window's {side} side is {shown(reach)}; an int ≥ 0 is needed, or None or -1 for unbounded")
            reach = None if reach is None or reach == -1 else min(reach, farthest)
        edges.append(reach)
    left, right = edges
    return left, 0 if causal else right
