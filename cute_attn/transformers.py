"""Attention of Hugging Face Transformers' models: ``register()`` once, then ``attn_implementation="cute_attn"``.

A model of Transformers 5 asks for attention in two steps. First, once a forward pass and kind of layer, it asks for a mask: of
a function over positions (causal, a window, packed sequences, the model's own, and what they make together), a padding mask
``(batch, keys)``, and where queries and keys stand. :func:`mask` answers with a :class:`Mask`, which has no scores' size: a
band of keys around each query, and lengths of sequences. Then each layer hands that on to :func:`attend`.

What a mask function says is read by calling it with positions that note what is done with them (:class:`_Position`). What
makes anything but a band and sequences goes to attention as it is, as ``mask=``, which computes it in every tile; so do masks
that a user passes as tensors.

Padding leaves of each element of a batch some rows in use. Where these are one stretch, they are a sequence between rows that
are not in use, and nothing is moved; else they are gathered before and scattered after. Which of the two it is, is read back
once a forward pass, as Transformers' own masks do, and no layer waits for anything. Where nothing can be read, since a graph is
made or captured, they are gathered.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

import torch
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from cute_attn import masks
from cute_attn.api import are_plain, attention, attention_varlen
from cute_attn.arguments import integer, name_of
from cute_attn.functions import traced
from cute_attn.kvcache import attention_kvcache
from cute_attn.lengths import NAMES
from cute_attn.private import any_autocast_enabled, assert_on_device, dispatch_modes, transforms_active

IMPLEMENTATION = "cute_attn"
FALLBACK = "sdpa"
FEW = 16  # queries: so many read keys as those of a cache
SHORTEST = 16  # rows: where no length can be read, packed sequences may be this short, on average
UNREAD = (  # a GPU takes fewer than 255 characters
    f"cute_attn: in a graph no length is read, and there is padding between keys under a window, or packed sequences don't "
    f"ascend, aren't numbered by positions or have fewer than {SHORTEST} rows on average: run without a graph, or pass "
    f"cu_seq_lens_q and cu_seq_lens_k"
)
# What layers may ask for by keyword and neither attention nor the fallback has.
_BEYOND = {
    "output_attentions": "attention weights, which are never in memory",
    "indices": "keys that are chosen for each query (indices)",
    "block_indices": "blocks of keys that are chosen for each query (block_indices)",
}
_warned: set[str] = set()


class Beyond(NotImplementedError):  # noqa: N818
    """A model asks for what attention has not, ``Beyond(wanted)``; with another argument, ``handed_on``, False, for what the
    fallback hasn't either. It is made of its arguments alone, since torch.compile follows no exception's own ``__init__``."""

    @property
    def wanted(self) -> str:
        return self.args[0]

    @property
    def handed_on(self) -> bool:
        return self.args[1:] != (False,)

    def __str__(self) -> str:
        other = f"{FALLBACK!r}, or register(fallback={FALLBACK!r}) for such calls alone" if self.handed_on else "'eager'"
        return (
            f"the model asks for {self.wanted}; causal or full attention is needed, in a window or not, of padded or packed "
            f"sequences, or under a mask that attention understands: try attn_implementation={other}"
        )


def register(*, fallback: str | None = None) -> None:
    """Make ``"cute_attn"`` an ``attn_implementation`` of Transformers' models, in this process.

        cute_attn.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="cute_attn")
        model.set_attn_implementation("cute_attn")  # or of a model that there is already

    Models ask for causal and bidirectional attention, sliding windows, softcaps, sinks, padding on any side, packed sequences
    (by ``position_ids`` alone, or with ``cu_seq_lens_q`` and ``cu_seq_lens_k``), and caches, dynamic and static ones. Queries
    at padding of a causal mask, or of a window's, get zeros. They may ask for more: masks that are no band (chunks, prefixes,
    blocks, 4-dimensional tensors), biases of the scores (T5), and dropout.

    Args:
        fallback: what computes where a model asks for what there is not. ``"sdpa"`` is torch's attention, with a warning for
            each reason, once; ``None`` refuses these calls. While torch.compile makes a graph it follows a mask function only
            later: one that it can't follow ends there, whatever the fallback. What Transformers' ``"sdpa"`` would ignore
            (sinks, softcaps, attention weights) is refused.

    To register anew changes the fallback. A model's configuration doesn't keep its ``attn_implementation``: say it again in
    ``from_pretrained``.

    Raises:
        TypeError: ``fallback`` is neither None nor a string.
        ValueError: ``fallback`` is another string.
        ImportError: Transformers is not installed, or is older than version 5.

    Later, from a model's forward pass:

        NotImplementedError: :class:`Beyond`, it asks for what there is not.
        ValueError: arguments that don't fit together, as of :func:`cute_attn.attention`.
    """
    needed = f"None or {FALLBACK!r} is needed"
    if fallback is not None and (fallback := name_of("fallback", fallback, needed)) != FALLBACK:
        raise ValueError(f"fallback is {fallback!r}; {needed}: leave it out to have such calls refused")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "transformers is not installed; version 5 or newer is needed: try pip install 'transformers>=5'"
        ) from error
    if int(transformers.__version__.partition(".")[0]) >= 5:
        from transformers import masking_utils

        if "q_offset" in inspect.signature(masking_utils.sdpa_mask).parameters:
            for interface, ours in ((transformers.AttentionInterface, attend), (transformers.AttentionMaskInterface, mask)):
                interface.register(IMPLEMENTATION, partial(ours, fallback=None if fallback is None else interface()[fallback]))
            _join_continuous_batching()
            return
    raise ImportError(
        f"transformers is {transformers.__version__}, whose masks are made in another way; version 5 or newer, the newest of "
        f"those, is needed: try pip install -U transformers"
    )


# ---- continuous batching ---------------------------------------------------------------------------------------------


def _join_continuous_batching() -> None:
    """Have Transformers' continuous batching treat ``"cute_attn"`` as it treats FlashAttention: with lengths in the place of
    masks and, where each sequence gets one token, pages that attention reads and writes itself. It asks for the name alone, in
    functions that can only be replaced; a release where they are others, as before 5.24, refuses ``"cute_attn"`` in words."""
    try:
        from transformers.generation.continuous_batching import cache, continuous_api, initialization

        decided, allocators = initialization.ensure_decode_fast_path_is_available, initialization.ATTN_TYPE_TO_ALLOCATOR
        modules: tuple[Any, ...] = cache, continuous_api, initialization
        asked = [(module, module.is_flash_attention_requested) for module in modules]
    except (AttributeError, ImportError):
        return
    if isinstance(asked[0][1], partial):  # registered before
        return

    @wraps(decided)
    def ensure_decode_fast_path_is_available(config, cb_config, user_requested):
        kinds = initialization.group_layers_by_attn_type(config)
        ours = config._attn_implementation == IMPLEMENTATION
        if not (ours and all(allocators[kind].supports_block_table for kind in kinds)):
            decided(config, cb_config, user_requested)

    initialization.ensure_decode_fast_path_is_available = ensure_decode_fast_path_is_available
    for module, is_requested in asked:
        module.is_flash_attention_requested = partial(_is_requested, is_requested)


def _is_requested(otherwise: Callable, config=None, requested_attention_implementation=None, version=None) -> bool:
    name = requested_attention_implementation if config is None else config._attn_implementation
    return name == IMPLEMENTATION or otherwise(config, requested_attention_implementation, version)


# ---- masks -----------------------------------------------------------------------------------------------------------


@dataclass
class Mask:
    """Which keys queries see, as attention takes it; Transformers' models hand it to their layers.

    ``shape`` is that of a mask of all scores, ``(batch, 1, seqlen_q, seqlen_k)``; ``window`` is attention's. With ``lengths``,
    those of ``attention_varlen``, sequences lie in the rows of all elements of the batch, in the order that ``rows_q`` and
    ``rows_k`` say, or as they are. ``holds`` is whether the lengths are right, where only the device knows. ``function`` says
    all of it, as attention's ``mask``; where ``window`` is None, nothing else does. ``stand_in`` makes the mask that the
    fallback takes; ``beyond`` is why it must. ``stored`` are the ``lengths`` and ``leftpad_k`` by which a few
    queries of each element of the batch, all of them in use, see its keys as those of a cache.
    """

    shape: tuple[int, int, int, int]
    window: tuple[int | None, int | None] | None
    lengths: dict[str, torch.Tensor] = field(default_factory=dict)
    rows_q: torch.Tensor | None = None
    rows_k: torch.Tensor | None = None
    holds: torch.Tensor | None = None
    packed: bool = False
    function: Callable | None = None
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    stand_in: Callable[[], torch.Tensor] | None = None
    beyond: str | None = None
    ndim = 4  # which models ask a mask for: one of 2 dimensions is padding

    def to(self, *where: Any, **how: Any) -> Mask:
        """On another device: what moves a layer's arguments to where the layer lies calls it."""
        tensors = {"rows_q": self.rows_q, "rows_k": self.rows_k, "holds": self.holds}
        moved: dict[str, Any] = {name: x.to(*where, **how) for name, x in tensors.items() if x is not None}
        for name in ("lengths", "stored"):
            moved[name] = {key: x.to(*where, **how) for key, x in getattr(self, name).items()}
        return replace(self, **moved)


def mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
    *, mask_function: Callable, attention_mask: torch.Tensor | Mask | None = None, device: torch.device | str = "cpu",
    fallback: Callable | None = None, **others: Any,
) -> Mask:  # fmt: skip
    """The :class:`Mask` of what Transformers gives its makers of masks: ``mask_function(batch, head, query, key)`` is whether a
    key is seen; queries stand from ``q_offset`` on, which static caches have on the device, and keys from ``kv_offset`` on;
    ``attention_mask`` ``(batch, positions)`` is whether a key is no padding. What attention can't compute is :class:`Beyond`;
    with a fallback the :class:`Mask` only says so."""
    if isinstance(attention_mask, Mask):  # made ahead of the forward pass
        return attention_mask
    shape, stand_in = (batch_size, 1, q_length, kv_length), None
    if fallback is not None:
        others |= {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        others |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        stand_in = partial(fallback, batch_size, q_length, kv_length, q_offset, kv_offset, **others)
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.clone()  # a static cache counts on in its own, in each layer, before the mask is read there
    function = _on_the_whole(mask_function, q_offset, kv_offset, attention_mask, kv_length)
    try:
        seen = _seen_by(mask_function)
        past = q_offset + q_length - kv_offset  # the place among the keys after the last query's own
        aligned = isinstance(past, int) and past == kv_length
        rows: dict[str, Any] = {}
        if seen.ids is not None:
            of_all = all(x is None or x.shape == (batch_size, q_length) for x in (seen.ids, seen.by))
            if not (aligned and of_all) or attention_mask is not None:
                raise Beyond("packed sequences with a cache or padding, or numbers of other rows than a call's")
            rows = _packed(seen.ids, seen.by)
        elif not (aligned or seen.right == 0 or seen.right is seen.left is None):
            raise Beyond("a window past each query's own key where the last query's is not the last key")
        elif attention_mask is not None or not (aligned or seen.right is None):
            rows = _padded(seen, (batch_size, q_length, kv_length), past, kv_offset, attention_mask, device)
        if not rows and q_length <= FEW:
            rows = {"stored": {"lengths": torch.full((batch_size,), kv_length, dtype=torch.int32, device=device)}}
    except Beyond as beyond:
        if _is_traced(function, device):
            return Mask(shape, None, function=function, stand_in=stand_in)
        if stand_in is None:
            raise
        made = stand_in()  # once for all layers
        return Mask(shape, (None, None), stand_in=lambda: made, beyond=beyond.wanted)
    return Mask(shape, (seen.left, seen.right), function=function, stand_in=stand_in, **rows)


def _on_the_whole(mask_function: Callable, q_offset, kv_offset: int, padding: torch.Tensor | None, kv_length: int) -> Callable:
    """All of a mask as a function of rows of q and of k."""
    if padding is not None:  # keys to come are none
        padding = pad(padding, (0, max(kv_offset + kv_length - padding.shape[1], 0)))

    def seen(batch, head, q_idx, kv_idx):
        row, key = q_idx + q_offset, kv_idx + kv_offset
        found = mask_function(batch, head, row, key)
        return found if padding is None else found & padding[batch, key]

    return seen


def _is_traced(mask: Callable, device: torch.device | str) -> bool:
    """Whether attention understands a mask function; a graph that torch.compile makes follows it later."""
    if torch.compiler.is_compiling():
        return True
    try:
        traced(mask, None, (), None, torch.empty(0, device=device), 1, 1)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _packed(ids: torch.Tensor, by: torch.Tensor | None) -> dict[str, Any]:
    """Of packed sequences: one begins where ``ids`` ``(batch, rows)`` are greater than in the row before, and ``by`` is one
    greater in all others."""
    steps = torch.diff(ids, prepend=ids[:, :1] - 1)
    begins = (steps != 0).flatten()
    in_order = steps >= 0
    if by is not None:
        in_order = in_order & ((steps != 0) | (torch.diff(by, prepend=by[:, :1]) == 1))
    rows: dict[str, Any] = {"packed": True}
    if _is_unread(ids):  # the size of a tensor says how many there may be
        count = ids.numel() // SHORTEST + ids.shape[0]
        rows["holds"] = (begins.sum() <= count) & in_order.all()
    else:
        count, ordered = torch.stack([begins.sum(), in_order.all()]).tolist()
        if not ordered:
            raise Beyond("packed sequences whose numbers don't ascend, or with rows numbered other than by positions")
    ordinals = torch.arange(1, count + 2, device=ids.device)
    cu_seqlens = torch.searchsorted(begins.cumsum(0), ordinals, out_int32=True)  # of one that there isn't: after all rows
    return rows | {"lengths": {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}}


def _padded(seen: _Seen, sizes: tuple, past: int | torch.Tensor, kv_offset: int, attention_mask, device) -> dict[str, Any]:
    """Of padding, and of a static cache's keys to come. Where a band has edges, a query stands where its key does, and is left
    out if that is; else all queries are in use."""
    batch, seqlen_q, seqlen_k = sizes
    place = torch.arange(seqlen_k, device=device)
    edged, windowed = not seen.right is seen.left is None, seen.left is not None
    used_k = torch.ones(batch, seqlen_k, dtype=torch.bool, device=device)
    if attention_mask is not None:
        positions = kv_offset + seqlen_k
        used_k = pad(attention_mask, (0, max(positions - attention_mask.shape[1], 0)))[:, kv_offset:positions]
    if edged:
        used_k = used_k & (place < past)
    used_q = used_k.index_select(1, place[:seqlen_q] + (past - seqlen_q)) if edged else used_k.new_ones(batch, seqlen_q)
    rows: dict[str, Any] = {}
    in_place = answered = True
    if attention_mask is not None:
        one_stretch = (torch.diff(used_k.int(), dim=1) > 0).sum(1) + used_k[:, 0] <= 1
        if _is_unread(used_k):
            in_place, answered = windowed, False
            if windowed:
                rows["holds"] = one_stretch.all()
        else:
            in_place, everything, answered = torch.stack([one_stretch.all(), used_k.all(), used_q.all()]).tolist()
            if everything:
                return {}
            if windowed and not in_place:
                raise Beyond("padding between the keys of a sequence under a window")
    if seqlen_q <= FEW and in_place and answered:
        n, first = used_k.sum(1), (used_k.cumsum(1) == 0).sum(1)
        rows["stored"] = {"lengths": (first + n).int()} | ({} if attention_mask is None else {"leftpad_k": first.int()})
    spans = _spans if in_place else _gathered
    (cu_q, n_q, rows_q), (cu_k, n_k, rows_k) = spans(used_q), spans(used_k)
    lengths = {name: x.int() for name, x in zip(NAMES, (cu_q, cu_k, n_q, n_k), strict=True) if x is not None}
    return rows | {"lengths": lengths, "rows_q": rows_q, "rows_k": rows_k}


def _spans(used: torch.Tensor) -> tuple:
    """Rows in use that are one stretch of each element of the batch: a sequence, after one of those before it, none of which is
    in use. ``(cu_seqlens, seqused, rows)``."""
    batch, length = used.shape
    n = used.sum(1)
    first = (used.cumsum(1) == 0).sum(1)
    end = torch.arange(1, batch + 1, device=used.device) * length
    bounds = torch.stack([end - length + first, end], 1).flatten()
    return pad(bounds, (1, 0)), torch.stack([torch.zeros_like(n), n], 1).flatten(), None


def _gathered(used: torch.Tensor) -> tuple:
    """Rows in use wherever they are: a sequence of each element of the batch, and all others after these."""
    return pad(used.sum(1).cumsum(0), (1, 0)), None, (~used.flatten()).int().argsort(stable=True)


def _is_unread(x: torch.Tensor) -> bool:
    """Whether the values of a tensor can't be read now: a graph is made or captured."""
    from transformers.utils.import_utils import is_tracing

    return is_tracing(x)


# ---- what a mask function says ---------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """What a part of a mask function says: keys are seen from ``left`` before to ``right`` after the query's own, of those with
    the query's ``ids``. ``by``: as this tensor numbers positions, which does so within each sequence."""

    left: int | None = None
    right: int | None = None
    ids: torch.Tensor | None = None
    by: torch.Tensor | None = None
    device = None

    def to(self, _: object) -> _Seen:
        return self

    def __and__(self, other: _Seen) -> _Seen:
        left, right = _nearer(self.left, other.left), _nearer(self.right, other.right)
        return _Seen(left, right, _only(self.ids, other.ids), _only(self.by, other.by))

    def __bool__(self) -> bool:
        raise TypeError("a mask function decides by a mask")


def _nearer(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _only(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is not None and b is not None and a is not b:
        raise TypeError("a mask function has two numbers of sequences")
    return b if a is None else a


@dataclass(eq=False)
class _Position:
    """What a mask function is called with: the position of a ``"query"`` or a ``"key"``, moved by ``shift``; or what the tensor
    ``by`` has there. To compare two makes a :class:`_Seen`; whatever else is done with one, an ``AttributeError`` or a
    ``TypeError``."""

    of: str
    shift: int = 0
    by: torch.Tensor | None = None

    def new_ones(self, *_: object, **__: object) -> _Seen:  # what and_masks begins with
        return _Seen()

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, _Position):
            return _Distance(self, other)
        if not isinstance(other, int):
            raise TypeError("a mask function moves a position by what is no int")
        return _Position(self.of, self.shift - other, self.by)

    def __le__(self, other: Any) -> _Seen:
        return _up_to(self, other)

    def __lt__(self, other: Any) -> _Seen:
        return _up_to(self, other, -1)

    def __gt__(self, other: Any) -> _Seen:
        return _up_to(other, self, -1)

    def __ge__(self, other: Any) -> _Seen:
        if isinstance(other, int) and (self.of, self.shift, self.by, other) == ("query", 0, None, 0):
            return _Seen()  # how a mask of all keys is written
        return _up_to(other, self)

    def __eq__(self, other: Any) -> Any:
        _check_pair(self, other)
        if self.by is None or self.shift or other.shift:
            raise TypeError("a mask function compares positions as numbers of sequences")
        return _Seen(ids=self.by)


@dataclass
class _Distance:
    """The difference of two positions."""

    a: _Position
    b: _Position
    absolute: bool = False

    def __abs__(self) -> _Distance:
        return _Distance(self.a, self.b, True)

    def __le__(self, most: Any) -> _Seen:
        if not self.absolute:
            raise TypeError("a mask function compares a distance with a sign")
        return _up_to(self.a, self.b, most) & _up_to(self.b, self.a, most)


def _up_to(a: Any, b: Any, more: int = 0) -> _Seen:
    """``a ≤ b + more``."""
    _check_pair(a, b)
    edge = b.shift - a.shift + more
    if not isinstance(edge, int) or edge < 0:
        raise TypeError("a mask function hides each query's own key")
    return _Seen(right=edge, by=a.by) if a.of == "key" else _Seen(left=edge, by=a.by)


def _check_pair(a: Any, b: Any) -> None:
    if not (isinstance(a, _Position) and isinstance(b, _Position) and a.by is b.by and {a.of, b.of} == {"query", "key"}):
        raise TypeError("a mask function compares what are not positions of a query and a key")


class _Reading(TorchFunctionMode):
    """What a tensor has at a position is another, and nothing else is asked of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            x, (batch, at) = args
            if batch.of == "batch" and at.of in ("query", "key") and batch.shift == at.shift == 0 and at.by is None:
                return _Position(at.of, by=x)
        raise TypeError("a mask function asks torch for more than the elements at positions")


def _seen_by(mask_function: Callable) -> _Seen:
    """What a mask function says, exactly; :class:`Beyond` where that is no band of the same sequence."""
    try:
        with _Reading():
            seen = mask_function(*(_Position(of) for of in ("batch", "head", "query", "key")))
    except (AttributeError, TypeError, ValueError):
        seen = None
    if not isinstance(seen, _Seen) or (seen.ids is None and seen.by is not None):
        raise Beyond("a mask that is not a band of keys around each query")
    return seen


# ---- layers ----------------------------------------------------------------------------------------------------------


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    *, dropout: float = 0.0, scaling: float | None = None, softcap: float | None = None,
    sliding_window: int | None = None, is_causal: bool | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None, fallback: Callable | None = None, **others: Any,
) -> tuple[Any, None]:  # fmt: skip
    """Attention of a layer, ``query`` ``(batch, heads, seqlen, head_dim)``, as Transformers calls it: ``(out, None)``, ``out``
    ``(batch, seqlen, heads, head_dim_v)``, and no weights.

    Without a mask the layer says what is seen: ``is_causal`` and ``sliding_window``, how many keys up to the query's own. With
    ``cu_seq_lens_q`` sequences are packed, whatever ``position_ids`` say. With ``block_table``, ``k_cache`` and ``v_cache``, of
    continuous batching, their keys are in pages, to which those of the step are added."""
    sinks, bias = others.pop("s_aux", None), others.pop("position_bias", None)
    if sinks is None:
        sinks = others.pop("sinks", None)
    own = softcap is not None or sinks is not None
    beyond = _beyond(attention_mask, bias, own, cu_seq_lens_q is not None, others)
    if beyond is not None:
        if fallback is None or not beyond.handed_on:
            raise beyond
        if cu_seq_lens_q is not None and not (isinstance(attention_mask, Mask) and attention_mask.packed):
            raise ValueError(
                f"cu_seq_lens_q is given, and the model asks for {beyond.wanted}, which {FALLBACK!r} computes without lengths; "
                f"position_ids that begin anew in each sequence are needed: pass these too, or leave the fallback out"
            )
        if beyond.wanted not in _warned:
            _warned.add(beyond.wanted)
            warnings.warn(
                f"the model asks for {beyond.wanted}: {FALLBACK!r} computes it instead", RuntimeWarning, stacklevel=2
            )
        given = attention_mask.stand_in() if isinstance(attention_mask, Mask) and attention_mask.stand_in else attention_mask
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        if bias is not None:
            others["position_bias"] = bias
        return fallback(module, query, key, value, given, **others)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    rules: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": sinks, "dropout_p": dropout}
    found: Any = attention_mask
    if isinstance(found, torch.Tensor):
        if found.dtype == torch.bool:
            rules["mask"] = masks.given(found)
        else:
            bias = found if bias is None else bias + found
        return attention(q, k, v, bias=None if bias is None else bias.to(q.dtype), **rules), None
    if found is None:
        left = None if sliding_window is None else integer("sliding_window", sliding_window, "or None for no window") - 1
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        found = Mask((len(query), 1, query.shape[2], key.shape[2]), (left, 0 if causal else left))
    if found.shape[2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"a layer has {query.shape[2]} queries and {key.shape[2]} keys, and its mask is of {found.shape[2]} and "
            f"{found.shape[3]}; a mask of the same is needed: check which cache or mask the model is given"
        )
    if bias is not None:
        rules["bias"] = bias.to(q.dtype)
    if found.window is None or (found.lengths and bias is not None):  # a bias knows rows as they are
        return attention(q, k, v, mask=found.function, **rules), None
    left, right = found.window
    rules["causal"] = right == 0
    if left is not None or right:
        rules["window"] = left, right
    of_cache = {name: value for name, value in rules.items() if name not in ("dropout_p", "bias")}
    if (table := others.get("block_table")) is not None:
        if dropout or bias is not None:
            raise Beyond(f"{f'dropout of {dropout}' if dropout else 'a bias of the scores'} beside pages", False)
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise ValueError(
                "block_table is given without cu_seq_lens_q and cu_seq_lens_k; both are needed, since its keys are in pages: "
                "pass them, as generate_batch does"
            )
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        before = (cu_seq_lens_k - cu_seq_lens_q).diff()  # of sequences that there aren't, behind the others: 0
        step = {"lengths": before, "page_table": table, "cu_seqlens_q": cu_seq_lens_q, "k_new": k, "v_new": v}
        # A graph that is being made ends before it, as it has ended before, where the pages were looked up.
        call = torch.compiler.disable(attention_kvcache) if torch.compiler.is_compiling() else attention_kvcache
        out: Any = call(q, others["k_cache"], others["v_cache"], **step, **of_cache)
        return out[None], None
    if cu_seq_lens_q is not None:
        if found.lengths and not found.packed:
            raise ValueError(
                "cu_seq_lens_q is given, and a mask with padding or a cache; one of the two is needed: leave out attention_mask"
            )
        cu_seqlens = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        lengths = {n: x.int() if isinstance(x, torch.Tensor) else x for n, x in zip(NAMES, cu_seqlens, strict=False)}
        found = Mask(found.shape, found.window, lengths)
    if found.stored and not dropout and bias is None and _read_as_stored(q, k, v, sinks):
        return attention_kvcache(q, k, v, **found.stored, **of_cache), None
    if not found.lengths:
        return attention(q, k, v, **rules), None
    if found.holds is not None:
        assert_on_device(found.holds, UNREAD)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if found.rows_q is not None:
        q, k, v = q.index_select(0, found.rows_q), k.index_select(0, found.rows_k), v.index_select(0, found.rows_k)
    out = attention_varlen(q, k, v, **found.lengths, **rules)
    if found.rows_q is not None:
        out = torch.empty_like(out).index_copy(0, found.rows_q, out)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def _read_as_stored(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> bool:
    """Whether attention to a cache takes these, which is for torch's own tensors, outside of graphs, and without gradients."""
    if torch.compiler.is_compiling() or dispatch_modes() or transforms_active() or any_autocast_enabled():
        return False
    given = q, k, v, sinks
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    return q.dtype == k.dtype == v.dtype and are_plain(given) and not differentiable


def _beyond(attention_mask: object, bias, own: bool, packed: bool, others: dict[str, Any]) -> Beyond | None:
    """What a layer asks for that attention has not; ``own`` says that it also asks for what the fallback has not, ``packed``
    that lengths of sequences are given."""
    for name, wanted in _BEYOND.items():
        if others.get(name) is not None and others[name] is not False:
            return Beyond(wanted, False)
    made = attention_mask if isinstance(attention_mask, Mask) else None
    if made is not None and made.beyond is not None:
        return Beyond(made.beyond, not own)
    if made is None and attention_mask is not None:
        x: Any = attention_mask
        if packed or not isinstance(x, torch.Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
            text = f"a mask of its own, a {type(x).__name__} of shape {tuple(getattr(x, 'shape', ()))}"
            return Beyond(text + " beside cu_seq_lens_q" * packed, not own)
    if packed and (bias is not None or (made is not None and made.window is None)):
        return Beyond("a bias, or a mask that is no band, beside cu_seq_lens_q", not own)
    return None
