"""Where keys and values lie in a cache, and how many of them a sequence has: what the host knows of it.

That is little, as in ``lengths.py``: tensors on the device, whose values only the reference and checks read back. A cache holds
``(elements, capacity, heads_kv, head_dim)``, an element for each sequence, or ``(pages, page_size, heads_kv, head_dim)``, of
which a table names the pages of each sequence in their order. Whatever the tensors say, nothing outside the cache is read or
written.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch

from cute_attn.arguments import check_memory, check_tensor, shown
from cute_attn.lengths import are_checked, check_within, in_one_piece, names_of, sequences_of

PAGE_SIZE_MAX = 1024
UNITS_MAX = 64  # where keys are split at fixed places: into so many parts at most
NAMES = ("lengths", "page_table", "cache_batch_idx", "leftpad_k", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_begin")
CODE_NAMES = NAMES[1:6]  # of those that are None or not, which a kernel's code depends on


@dataclass(slots=True)
class Stored:
    """The keys of a call, in a cache. Tensors of :data:`NAMES` are int32 on the device of q, and None where there is none.

    Their names, and those of the new rows, are :func:`~cute_attn.attention_kvcache`'s, which says what they mean. A sequence
    has at most ``capacity`` rows, in pages of ``page_size`` (0 without pages), and gets ``seqlen_new`` new ones, 0 where
    ``cu_seqlens_k_new`` says how many.
    """

    batch: int
    capacity: int
    page_size: int
    lengths: torch.Tensor
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    leftpad_k: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    rotary_begin: torch.Tensor | None = None
    k_new: torch.Tensor | None = None
    v_new: torch.Tensor | None = None
    seqlen_new: int = 0
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    rotary_interleaved: bool = False
    batch_invariant: bool = False

    @property
    def names(self) -> str:
        """Which of :data:`CODE_NAMES` there are: what ``Problem.stored`` is."""
        return names_of(CODE_NAMES, self.where[1:])

    @property
    def packed(self) -> bool:
        """Whether queries of all sequences lie one after another."""
        return self.cu_seqlens_q is not None

    @property
    def where(self) -> tuple[torch.Tensor | None, ...]:
        """Those of :data:`NAMES` that every kernel takes: all but the last."""
        return tuple([getattr(self, name) for name in NAMES[:-1]])

    def check_values(self, elements: int, rows: int, bounded: bool) -> None:
        """With ``CUTE_ATTN_CHECK=1`` read the tensors back and refuse wrong ones. ``elements`` are those of the cache (pages,
        with a table), ``rows`` those of q, of each sequence or packed; ``bounded``: the band has an edge."""
        if not are_checked():
            return
        counts = {"cu_seqlens_q": [rows] * self.batch, "cu_seqlens_k_new": [self.seqlen_new] * self.batch}
        for name, total in (("cu_seqlens_q", rows), ("cu_seqlens_k_new", 0 if self.k_new is None else self.k_new.shape[0])):
            if (bounds := getattr(self, name)) is not None:
                values = bounds.tolist()
                if values[0] != 0 or values[-1] > total or any(after < before for before, after in pairwise(values)):
                    raise ValueError(
                        f"{name} is {values}; ascending bounds from 0 to at most {total}, the rows there are, are needed: try "
                        f"torch.cumsum of how many each sequence has, with a 0 before it"
                    )
                counts[name] = [after - before for before, after in pairwise(values)]
        queries, new, lengths = counts["cu_seqlens_q"], counts["cu_seqlens_k_new"], self.lengths.tolist()
        for i, (length, more) in enumerate(zip(lengths, new, strict=True)):
            if not 0 <= length <= self.capacity - more:
                behind = f" and room for {more} new ones behind them" if more else ""
                raise ValueError(
                    f"lengths[{i}] is {length}; from 0 to {self.capacity} keys, as many as the cache has rows for a sequence"
                    f"{behind}, are needed: check how lengths was made, or take a larger cache or more pages"
                )
        pads = [0] * self.batch if self.leftpad_k is None else self.leftpad_k.tolist()
        for i, (pad, length) in enumerate(zip(pads, lengths, strict=True)):
            check_within("leftpad_k", i, pad, length, "the length of that sequence")
        if self.cache_batch_idx is not None:
            for i, element in enumerate(self.cache_batch_idx.tolist()):
                check_within("cache_batch_idx", i, element, elements - 1, "the elements of the cache")
        if self.page_table is not None:
            for i, pages in enumerate(self.page_table.tolist()):
                for place in range(pads[i] // self.page_size, -(-(lengths[i] + new[i]) // self.page_size)):
                    what = "the pages of the cache, up to the sequence's length"
                    check_within("page_table", f"{i}, {place}", pages[place], elements - 1, what)
        if self.rotary is not None:
            begins, positions = lengths if self.rotary_begin is None else self.rotary_begin.tolist(), self.rotary[0].shape[0]
            for i, (begin, more, turned) in enumerate(zip(begins, new, queries, strict=True)):
                used = max(more, turned if bounded else min(turned, 1))
                if used and not 0 <= begin <= positions - used:
                    raise ValueError(
                        f"sequence {i} has the positions {begin} to {begin + used - 1}; from 0 to {positions - 1}, "
                        f"which cos and sin have rows for, are needed: make these for more positions"
                    )


def unit_tiles(rows: int) -> int:
    """Tiles of such a part at least, whose results are of so many ``rows``: of 128 columns, 3% to write of what is read."""
    return max(rows // 4, 4)


def check_stored(q: torch.Tensor, k_cache: torch.Tensor, tensors: tuple[Any, ...]) -> Stored:
    """Check what the host sees of where keys lie, in the order of :data:`NAMES`: kinds, dtypes, devices, shapes.

    Raises ``TypeError`` and ``ValueError``.
    """
    _, page_table, cache_batch_idx, _, cu_seqlens_q, *_ = tensors
    batch = sequences_of("lengths", tensors[0], q.device)
    for name, x in zip(NAMES[1:], tensors[1:], strict=True):
        if x is not None and (of := sequences_of(name, x, q.device)) != batch:
            _refuse_count(name, of, batch)
    if cu_seqlens_q is None and q.shape[0] != batch:
        _refuse_count("q", q.shape[0], batch)
    elements, capacity = k_cache.shape[:2]
    page_size = 0
    if page_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(
                "page_table and cache_batch_idx are given; one of them is needed, since a table says which pages are a "
                "sequence's: leave cache_batch_idx out, or try page_table[cache_batch_idx.long()]"
            )
        page_size = capacity
        if not 1 <= page_size <= PAGE_SIZE_MAX:
            raise ValueError(
                f"pages of k_cache and v_cache have {page_size} rows; from 1 to {PAGE_SIZE_MAX} are needed: try "
                f"k_cache.unflatten(1, (-1, 256)).flatten(0, 1), with a table of so many more pages"
            )
        capacity = page_table.shape[1] * page_size
    elif cache_batch_idx is None and elements != batch:
        raise ValueError(
            f"k_cache has {elements} elements for {batch} sequences; one for each is needed: try cache_batch_idx, or "
            f"page_table if these are pages"
        )
    return Stored(batch, capacity, page_size, *in_one_piece(tensors))


def check_new(stored: Stored, k_cache: torch.Tensor, v_cache: torch.Tensor, k_new, v_new) -> None:
    """Check the new keys and values, and note them."""
    given = {"k_new": (k_new, k_cache), "v_new": (v_new, v_cache)}
    for name, (x, _) in given.items():
        check_tensor(name, x, "with new keys there are new values, both torch.Tensor: pass k_new and v_new")
    packed = stored.cu_seqlens_k_new is not None
    rows = k_new.shape[:-2]
    for name, (x, cache) in given.items():
        heads, columns = cache.shape[2:]
        if x.dim() != (3 if packed else 4) or x.shape[-2:] != (heads, columns) or x.shape[:-2] != rows:
            before = "all new rows" if packed else f"{stored.batch}, seqlen_new"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; ({before}, {heads}, {columns}) is needed, with equal rows in k_new and "
                f"v_new: check the cache's heads and head_dim"
            )
        _check_alike(name, x, "the cache", cache, f"{name}.to(k_cache)")
    if not packed and rows[0] != stored.batch:
        _refuse_count("k_new", rows[0], stored.batch)
    stored.k_new, stored.v_new, stored.seqlen_new = k_new, v_new, 0 if packed else rows[1]


def check_rotary(stored: Stored, q: torch.Tensor, rotary, interleaved: bool) -> None:
    """Check the tables by which queries and new keys are turned, and note them."""
    if stored.k_new is None:
        raise ValueError(
            "rotary is given without k_new; new keys are needed, whose positions those of the queries are: turn q yourself, or "
            "pass k_new and v_new"
        )
    if not (isinstance(rotary, (tuple, list)) and len(rotary) == 2 and all(isinstance(x, torch.Tensor) for x in rotary)):
        raise TypeError(f"rotary is {shown(rotary)}; a pair of tensors (cos, sin) is needed, each (positions, rotary_dim / 2)")
    cos, sin = rotary
    for name, x in (("cos", cos), ("sin", sin)):
        check_memory(f"rotary's {name}", x)
        _check_alike(f"rotary's {name}", x, "q", q, f"{name}.to(q)")
    half = q.shape[-1] // 2
    if cos.dim() != 2 or cos.shape != sin.shape or not cos.shape[0] or not 0 < cos.shape[1] <= half or cos.shape[1] % 8:
        raise ValueError(
            f"rotary's cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; equal ones (positions, rotary_dim / 2) are "
            f"needed, with 1 position at least and a multiple of 8 up to {half} columns: try cos[:, : rotary_dim // 2]"
        )
    stored.rotary, stored.rotary_interleaved = (cos.contiguous(), sin.contiguous()), interleaved


def _check_alike(name: str, x: torch.Tensor, of_other: str, other: torch.Tensor, remedy: str) -> None:
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device} and {of_other} {other.dtype} on {other.device}; equal ones are needed: "
            f"try {remedy}"
        )


def _refuse_count(name: str, of: int, batch: int) -> NoReturn:
    raise ValueError(
        f"{name} is of {of} sequences where lengths is of {batch}; one element for each is needed: check how {name} was made"
    )
