"""Which tiles of the scores a mask hides, cuts or leaves whole: found out once, so that attention computes no hidden tile, and
masks only those that are cut.

A :class:`BlockMask` knows the *kind* of every block of 32 queries × 32 keys. A kernel's tiles are made of these, whatever their
shape is; so one block mask serves the forward and the backward pass of every head dim and mechanism. The kernels read lists,
which another one (``enlist.py``) makes of the kinds when a tile shape first asks for them, and which are kept:

    (cut tiles, all tiles, …, in turn, tile, tile, …, unused)     int32; HEADER words, the tiles that are cut, whole ones

For each query tile a list of key tiles, last ones first, and for each key tile one of query tiles, of all query heads that
share the keys. The lower TILE_BITS bits of an entry are a query tile's number, or that of a key tile's first block: key tiles
begin at the first block that the query tile sees, and anew behind a gap.

- **Of key tiles** lists with the most of them are taken first: ``in turn``, in the i-th list of a head, is the number of the
  i-th list to be taken. Those that are cut and come before all whole ones, as a window's left edge does, are the last in a
  list; the third word says where they begin. Above an entry's number are two bits for each 64 rows of the query tile: whether
  they see none of its keys, or all.
- **Of query tiles** an entry also has which member of the heads that share the keys it is of, and below that a bit for each 64
  keys of two: whether all of the tile's queries see them.

Memory is taken by blocks and tiles, never by pairs of a query and a key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from functools import wraps
from itertools import groupby, product
from typing import Any, NoReturn

import torch
from torch.nn.functional import pad

from cute_attn.arguments import device_of, integer, shown
from cute_attn.expressions import Expression, TorchOps
from cute_attn.functions import check_values, traced
from cute_attn.layouts.base import (
    BLOCK,
    BY_ROWS,
    CUT,
    HEADER,
    KIND_BITS,
    LISTED_ROWS,
    MEMBER_BIT,
    NONE,
    TILE_BITS,
    WHOLE,
)
from cute_attn.private import FakeTensor, dispatch_modes, raw_stream, unseen

ROWS_OF_WARPGROUP = 64
LENGTH_MAX = BLOCK << TILE_BITS
MEMBERS_MAX = 1 << (31 - MEMBER_BIT)
PIECE = 1 << 22  # pairs of a query and a key that torch looks at at a time
_SHADES = " ░█"
_COLOURS = {CUT: "#9ecae1", WHOLE: "#08519c"}


def _made_once(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What a method of :class:`BlockMask` returns, :func:`_once`, and expanded to a batch and heads, two more arguments."""

    @wraps(make)
    def kept(self: BlockMask, *arguments: int) -> torch.Tensor:
        *of, batch, heads = arguments
        found = _once(self._kept, (make, *of), self.kinds, lambda: make(self, *of), lambda found: (found, self.kinds))
        return found.expand(batch, heads, -1, -1)

    return kept


def _once(kept: MutableMapping, key: Any, like: torch.Tensor, make: Callable[[], Any], read: Callable[[Any], tuple]) -> Any:
    """What ``make`` returns, made once on the device of ``like`` and ``kept``. Another stream than the one that made it waits
    for it; ``read(found)`` are the tensors that kernels read then. What a CUDA graph records is the graph's: it is not kept."""
    on_gpu = like.is_cuda
    stream = raw_stream(like.get_device()) if on_gpu else 0
    found, made_on, event = kept.get(key, (None, stream, None))
    if found is None:
        found = make()
        if not (on_gpu and torch.cuda.is_current_stream_capturing()):
            event = torch.cuda.current_stream(like.device).record_event() if on_gpu else None
            kept[key] = found, stream, event
    elif made_on != stream and not torch.cuda.is_current_stream_capturing():
        here = torch.cuda.current_stream(like.device)
        here.wait_event(event)
        for x in read(found):
            x.record_stream(here)
    return found


class BlockMask:
    """What :func:`block_mask` returns: ``kinds``, uint8 ``(batch, heads, ⌈seqlen_q / 32⌉, ⌈seqlen_k / 32⌉)``, and lengths. It
    can be pickled, saved by ``torch.save``, moved by :meth:`to` and used for every call of these lengths.

    A kind is 0 where no query of a block sees any of its keys, 2 where each sees all, else 1, or 3 where each sees all or
    none."""

    def __init__(self, kinds: torch.Tensor, seqlen_q: int, seqlen_k: int):
        self.kinds, self.seqlen_q, self.seqlen_k = kinds, seqlen_q, seqlen_k
        self.batch, self.heads = kinds.shape[:2]
        self.device = kinds.device
        self._kept: dict[tuple, tuple] = {}

    def __reduce__(self) -> tuple:
        return BlockMask, (self.kinds, self.seqlen_q, self.seqlen_k)

    def to(self, device: Any) -> BlockMask:
        """The same on another device."""
        return BlockMask(self.kinds.to(device_of(device)), self.seqlen_q, self.seqlen_k)

    @property
    def density(self) -> float:
        """The share of its blocks in which some query sees some key. Reads it from the device."""
        return self.kinds.bool().double().mean().item() if self.kinds.numel() else 0.0

    # ---- what kernels read

    def tiles(self, tile_m: int, tile_n: int) -> torch.Tensor:
        """The kinds of tiles of ``tile_m`` queries × ``tile_n`` keys, uint8 ``(batch, heads, m_blocks, n_blocks)``. A tile that
        reaches past the last key is not whole."""
        for name, n in (("tile_m", tile_m), ("tile_n", tile_n)):
            if integer(name, n, f"a multiple of {BLOCK}") < BLOCK or n % BLOCK:
                _refuse(f"{name} is {shown(n)}", f"a multiple of {BLOCK} is needed", "128")
        down, across = tile_m // BLOCK, tile_n // BLOCK
        missing, past = -self.kinds.shape[2] % down, -self.kinds.shape[3] % across
        kinds = pad(self.kinds.masked_fill(self.kinds.eq(BY_ROWS), CUT), (0, past))
        each = (pad(kinds, (0, 0, 0, missing), value=value) for value in (NONE, WHOLE))  # rows that there aren't change nothing
        high, low = (x.unflatten(3, (-1, across)).unflatten(2, (-1, down)) for x in each)
        return high.amax((3, 5)).ne(NONE).byte() + low.amin((3, 5)).eq(WHOLE)

    @_made_once
    def key_lists(self, tile_m: int, tile_n: int) -> torch.Tensor:
        """A list of key tiles for each query tile, ``(batch, heads, m_blocks, HEADER + n_blocks + 1)``."""
        if tile_m % ROWS_OF_WARPGROUP or tile_m > LISTED_ROWS:
            raise NotImplementedError(
                f"a list of key tiles is of a query tile of {ROWS_OF_WARPGROUP} rows or a multiple of it up to {LISTED_ROWS}; "
                f"got tile_m={tile_m}: try {LISTED_ROWS} or fewer"
            )
        batch, heads, rows, columns = self.kinds.shape
        sizes = batch, heads, -(-rows * BLOCK // tile_m), HEADER - (-columns * BLOCK // tile_n) + 1
        return self._enlisted("key lists", sizes, tile_m, tile_n, 1)

    @_made_once
    def query_lists(self, tile_m: int, tile_n: int, members: int) -> torch.Tensor:
        """A list of query tiles for each key tile, of all ``members`` that share a key head, ``(batch, heads_kv, n_blocks,
        HEADER + …)``."""
        batch, heads, rows, columns = self.kinds.shape
        of_list = HEADER - members * (-rows * BLOCK // tile_m) + 1
        sizes = batch, max(heads // members, 1), -(-columns * BLOCK // tile_n), of_list
        return self._enlisted("query lists", sizes, tile_m, tile_n, members)

    def _enlisted(self, which: str, sizes: tuple[int, ...], tile_m: int, tile_n: int, members: int) -> torch.Tensor:
        """Lists that a kernel makes."""
        lists = self.kinds.new_zeros(sizes, dtype=torch.int32)
        if lists.numel() and self.kinds.numel():
            from cute_attn import launch  # which imports what needs a GPU

            launch.enlist(which, self.kinds, lists, tile_m // BLOCK, tile_n // BLOCK, members)
        return lists

    @_made_once
    def ranks(self, tile_m: int, tile_n: int) -> torch.Tensor:
        """How many key tiles before each one a query tile visits, int32 ``(batch, heads, m_blocks, n_blocks)``."""
        seen = self.tiles(tile_m, tile_n).ne(NONE).int()
        return seen.cumsum(3, dtype=torch.int32) - seen

    @_made_once
    def visits(self, tile_m: int, tile_n: int) -> torch.Tensor:
        """How many key tiles visit each query tile, int32 ``(batch, heads, m_blocks, 1)``."""
        return self.tiles(tile_m, tile_n).ne(NONE).sum(3, keepdim=True, dtype=torch.int32)

    @_made_once
    def kinds_in_a_row(self) -> torch.Tensor:
        """Of each block the kinds of it and the next ones in its row, two bits each from the lowest on, uint8, as ``kinds``."""
        found = self.kinds.clone()
        for i in range(1, 8 // KIND_BITS):
            found[..., :-i] |= self.kinds[..., i:] << i * KIND_BITS
        return found

    # ---- for people

    @property
    def _is_read(self) -> bool:
        return not (self.kinds.is_meta or isinstance(self.kinds, FakeTensor))

    def __repr__(self) -> str:
        sizes = f"batch {self.batch}, heads {self.heads}, {self.seqlen_q} queries × {self.seqlen_k} keys"
        share = f", {self.density:.1%} of its blocks" if self._is_read else ""
        return f"BlockMask({sizes}{share}, on {self.device})"

    def __str__(self) -> str:
        """The first head as text: ``█`` is whole, ``░`` is cut."""
        kinds = self._drawn(64, 32)
        return "\n".join((repr(self), *("".join(_SHADES[kind] for kind in row) for row in kinds)))

    def to_svg(self) -> str:
        """The first head as a picture: dark is whole, light is cut."""
        kinds, size = self._drawn(256, 256), 4
        high, wide = len(kinds) * size, len(kinds[0]) * size if kinds else 0
        shapes = []
        for y, row in enumerate(kinds):
            x = 0
            for kind, alike in groupby(row):
                width = len(list(alike)) * size
                if kind != NONE:
                    place = f'x="{x}" y="{y * size}" width="{width}" height="{size}"'
                    shapes.append(f'<rect {place} fill="{_COLOURS[kind]}"/>')
                x += width
        frame = f'<rect width="{wide}" height="{high}" fill="white" stroke="black"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}"><title>{self!r}</title>'
        return "\n".join((head, frame, *shapes, "</svg>"))

    def _drawn(self, columns: int, rows: int) -> list[list[int]]:
        """The kinds of the first head, of so many tiles at most."""
        if not (self.kinds.numel() and self._is_read):
            return []
        high, wide = self.kinds.shape[2:]
        tile = max(-(-wide // columns), -(-high // rows)) * BLOCK
        tiles = BlockMask(self.kinds[:1, :1].cpu(), self.seqlen_q, self.seqlen_k).tiles(tile, tile)
        return tiles[0, 0].tolist()


torch.serialization.add_safe_globals([BlockMask])  # for torch.load, which by default makes nothing that it doesn't know


def block_mask(
    mask: Callable, batch: int | None, heads: int | None, seqlen_q: int, seqlen_k: int,
    tensors: tuple[torch.Tensor, ...] = (), device: Any = None,
) -> BlockMask:  # fmt: skip
    """Which tiles ``mask`` hides, cuts or leaves whole, for ``attention(…, mask=mask, block_mask=…)``.

    Args:
        mask: the function that attention gets: ``mask(batch, head, q_idx, kv_idx, *tensors) -> bool``.
        batch: of the calls that it is for; ``None`` or 1 where the mask is the same for all of the batch.
        heads: how many query heads; ``None`` or 1 where the mask is the same for all of them.
        seqlen_q: rows of q.
        seqlen_k: rows of k.
        tensors: more arguments of the function.
        device: where; that of the tensors, or else of CUDA, where there is a GPU.

    Each pair of a query and a key is looked at, on the GPU by a kernel that is made from the function, and nothing is held of
    them. What captured tensors hold is read now: after they have changed, a new block mask is needed. torch.compile leaves this
    out of its graphs: call it outside of one that must be whole.

    Raises:
        TypeError, ValueError, NotImplementedError: what :func:`cute_attn.attention` raises for a mask; sizes that are no ints.
    """
    return unseen(_block_mask)(mask, batch, heads, seqlen_q, seqlen_k, tensors, device)


def _block_mask(mask, batch, heads, seqlen_q, seqlen_k, tensors, device) -> BlockMask:
    batch, heads = (1 if n is None else n for n in (batch, heads))
    sizes = {"batch": batch, "heads": heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    for name, n in sizes.items():
        if type(n) is not int:
            raise TypeError(f"{name} is {shown(n)}; an int is needed: try int({name})")
        if not 0 <= n <= LENGTH_MAX:
            raise ValueError(f"{name} is {n}; a number from 0 to {LENGTH_MAX} is needed: try a block mask of a part")
    device = device_of(device)
    if device is None:
        given = next((x.device for x in tensors if isinstance(x, torch.Tensor)), None)
        device = given or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blank = torch.empty(0, device=device)
    expression, captured = traced(mask, None, tensors, None, blank, heads, batch)
    if expression.mask is None:
        raise TypeError("mask is None; a function is needed: try mask=cute_attn.masks.causal")
    check_values(captured)
    kinds = blank.new_empty(batch, heads, -(-seqlen_q // BLOCK), -(-seqlen_k // BLOCK), dtype=torch.uint8)
    if kinds.numel() and kinds.is_cuda:
        from cute_attn import launch  # which imports what needs a GPU

        launch.classify(kinds, expression, captured, seqlen_q, seqlen_k)
    elif kinds.numel():
        classified(kinds, expression, captured, seqlen_q, seqlen_k)
    return BlockMask(kinds, seqlen_q, seqlen_k)


def classified(kinds: torch.Tensor, expression: Expression, captured: tuple, seqlen_q: int, seqlen_k: int) -> None:
    """Fill ``kinds`` in plain torch, a few rows of one head at a time."""
    batch, heads, _, columns = kinds.shape
    ops = TorchOps(captured, torch.float32, kinds.device)
    rows = max(PIECE // (columns * BLOCK), 1) * BLOCK

    def counted(first: int, past: int, *shape: int):
        return torch.arange(first, past, dtype=torch.int32, device=kinds.device).view(shape)

    keys = counted(0, seqlen_k, 1, -1)
    for b, h, m in product(range(batch), range(heads), range(0, seqlen_q, rows)):
        queries = counted(m, min(m + rows, seqlen_q), -1, 1)
        leaves = {"batch": counted(b, b + 1, 1, 1), "head": counted(h, h + 1, 1, 1), "q_idx": queries, "kv_idx": keys}
        leaves["shift"] = counted(seqlen_k - seqlen_q, seqlen_k - seqlen_q + 1, 1, 1)
        seen = expression.value(expression.mask, leaves.__getitem__, ops, {})  # type: ignore[arg-type]
        seen = pad(seen.expand(len(queries), seqlen_k), (0, -seqlen_k % BLOCK))
        some, every = (pad(seen, (0, 0, 0, -len(queries) % BLOCK), value=missing) for missing in (False, True))
        some, every = (x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)) for x in (some, every))
        some, every, first = some.any(3), every.all(3), m // BLOCK
        found = some.any(1).byte() + every.all(1).byte()
        by_rows = found.eq(CUT) & (every | ~some).all(1)
        kinds[b, h, first : first + len(some)] = found.masked_fill(by_rows, BY_ROWS)


# ---- what attention is given -----------------------------------------------------------------------------------------

_CONVERTED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def taken(given: Any, mask: Callable | None, call: Any, q: torch.Tensor) -> tuple[BlockMask, Callable]:
    """:func:`with_mask` of a checked call. Raises ``TypeError`` and ``ValueError`` for what doesn't fit it."""
    blocks, mask = with_mask(given, mask)
    if mask is None:
        raise TypeError("block_mask is given without mask; the function that it was made of is needed: try mask=fn as well")
    got = f"block_mask is of batch {blocks.batch}, heads {blocks.heads}, {blocks.seqlen_q} queries × {blocks.seqlen_k} keys"
    if (blocks.seqlen_q, blocks.seqlen_k) != (call.seqlen_q, call.seqlen_k):
        _refuse(got, f"{call.seqlen_q} queries × {call.seqlen_k} keys are needed", "cute_attn.block_mask() for these lengths")
    for name, n, of_call in (("batch", blocks.batch, call.batch), ("heads", blocks.heads, call.heads)):
        if n not in (1, of_call):
            _refuse(got, f"{name} {of_call}, or 1 for all, is needed", f"cute_attn.block_mask() with {name}={of_call}")
    if blocks.device != q.device:
        _refuse(f"block_mask lies on {blocks.device}", f"{q.device}, as q, is needed", "block_mask.to(q.device)")
    if call.bounded:
        _refuse(
            "block_mask is given with causal or window", "the mask alone, of which it was made, is needed",
            "masks.and_masks(mask, masks.causal) for both",
        )  # fmt: skip
    if call.heads // call.heads_kv > MEMBERS_MAX:
        got = f"block_mask is given where {call.heads} query heads share {call.heads_kv} key heads"
        _refuse(got, f"at most {MEMBERS_MAX} for each are needed", "mask= alone")
    return blocks, mask


def with_mask(given: Any, mask: Callable | None) -> tuple[BlockMask, Callable | None]:
    """A block mask of either kind, and its mask function: that which is given, or FlexAttention's own."""
    blocks, of_its_own = (given, None) if isinstance(given, BlockMask) else _from_flex_attention(given)
    return blocks, of_its_own if mask is None else mask


def _from_flex_attention(given: Any) -> tuple[BlockMask, Callable]:
    if not all(hasattr(given, name) for name in ("kv_num_blocks", "full_kv_num_blocks", "BLOCK_SIZE", "mask_mod")):
        raise TypeError(f"block_mask is {shown(given)}; a BlockMask is needed: try cute_attn.block_mask(mask, …)")
    if torch.compiler.is_compiling() or dispatch_modes():  # what is made here is the graph's
        return _converted(given)
    return _once(_CONVERTED, given, given.kv_num_blocks, lambda: _converted(given), lambda found: (found[0].kinds,))


def _converted(given: Any) -> tuple[BlockMask, Callable]:
    (seqlen_q, seqlen_k), sides = given.seq_lengths, given.BLOCK_SIZE
    if any(side % BLOCK for side in sides):
        _refuse(f"block_mask has blocks of {sides[0]} × {sides[1]}", f"multiples of {BLOCK} are needed", "BLOCK_SIZE=128")
    cut = given.kv_num_blocks
    if cut.shape[-1] * sides[0] < seqlen_q:  # kernels would read past the lists
        _refuse(
            f"block_mask has {cut.shape[-1]} rows of blocks of {sides[0]} queries",
            f"as many as its {seqlen_q} queries take are needed", "the whole of it, not a slice",
        )  # fmt: skip
    kinds = cut.new_zeros((*cut.shape, -(-seqlen_k // sides[1]) + 1), dtype=torch.uint8)
    for kind, counts, columns in (CUT, cut, given.kv_indices), (WHOLE, given.full_kv_num_blocks, given.full_kv_indices):
        if counts is not None:
            listed = torch.arange(columns.shape[-1], device=columns.device) < counts[..., None]
            kinds.scatter_(-1, columns.long().where(listed, kinds.shape[-1] - 1), kind)
    kinds = kinds[..., :-1].repeat_interleave(sides[0] // BLOCK, -2).repeat_interleave(sides[1] // BLOCK, -1)
    kinds = kinds[..., : -(-seqlen_q // BLOCK), : -(-seqlen_k // BLOCK)].contiguous()
    if seqlen_k % BLOCK:
        kinds[..., -1].clamp_(max=CUT)
    blocks = BlockMask(kinds, seqlen_q, seqlen_k)
    if getattr(given.mask_mod, "__name__", "") != "noop_mask":
        return blocks, given.mask_mod
    several, per_head = int(blocks.batch > 1), int(blocks.heads > 1)  # it was made of blocks alone

    def seen(batch, head, q_idx, kv_idx):
        return kinds[batch * several, head * per_head, q_idx // BLOCK, kv_idx // BLOCK] != NONE

    return blocks, seen


def _refuse(got: str, needed: str, instead: str) -> NoReturn:
    raise ValueError(f"{got}; {needed}: try {instead}")
