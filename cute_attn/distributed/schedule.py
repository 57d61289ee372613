"""Which rows of a sequence lie on which rank, and what of them a step of the ring computes: numbers only, and no processes.

**Shards.** A sequence is cut into chunks of equally many rows, and the last ones are filled up with padding, which nobody sees.
In zigzag order rank r of n holds the chunks r and 2n − 1 − r, so that under a right edge all ranks have equal work: what its
first chunk sees less of than another rank's, its second one sees more of. In contiguous order it holds chunk r.

**Steps.** In step t rank r's queries meet the keys of rank (r − t) mod n. The band cuts a rectangle out of each pair of
chunks, or nothing. Where several are one under one band in the shards' own rows, as a shard's chunks under a causal mask are,
they are one call. What a rank needs of another's rows is what its rectangles span: nothing else is sent.

**Packed sequences.** Two chunks have rows of one sequence in common at most, since one that reaches from the first into the
second has all that lies between. So they meet in one rectangle, whose edges are known here; only a chunk with itself is ragged.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise, product

import torch

from cute_attn.rules import Band, HostOps

ORDERS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Shards:
    """``seqlen`` rows of a sequence on ``ranks`` ranks. ``split`` ranks share each of these shards once more, contiguously."""

    seqlen: int
    ranks: int
    order: str = "zigzag"
    split: int = 1

    @property
    def chunks(self) -> int:
        """How many a shard has."""
        return 2 if self.order == "zigzag" else 1

    @property
    def chunk(self) -> int:
        """Rows of one, padding included."""
        return -(-self.seqlen // (self.ranks * self.chunks * self.split)) * self.split

    @property
    def rows(self) -> int:
        """Rows of a shard, padding included."""
        return self.chunk * self.chunks

    def positions(self, rank: int) -> tuple[int, ...]:
        """Where in the sequence the chunks of a rank begin."""
        chunks = (rank, 2 * self.ranks - 1 - rank) if self.order == "zigzag" else (rank,)
        return tuple(i * self.chunk for i in chunks)

    def in_use(self, rank: int) -> Iterator[tuple[range, int]]:
        """Of each chunk its rows in the shard that are no padding, and the position of the first one."""
        for i, position in enumerate(self.positions(rank)):
            first = i * self.chunk
            yield range(first, first + max(0, min(self.chunk, self.seqlen - position))), position

    def together(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The sequence ``(…, seqlen, …)`` from all shards ``(…, ranks, rows, …)``, whose ranks are dimension ``dim``."""
        if self.order == "zigzag":
            first, second = x.unflatten(dim + 1, (2, self.chunk)).unbind(dim + 1)
            x = torch.cat([first, second.flip(dim)], dim)
        return x.flatten(dim, dim + 1).narrow(dim, 0, self.seqlen)

    def apart(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The shards ``(…, ranks, rows, …)`` of a sequence ``(…, seqlen, …)``; padding is zeros."""
        x = padded(x, dim, self.ranks * self.rows).unflatten(dim, (self.ranks * self.chunks, self.chunk))
        if self.order == "contiguous":
            return x
        first, second = x.split(self.ranks, dim)
        return torch.stack([first, second.flip(dim)], dim + 1).flatten(dim + 1, dim + 2)


def padded(x: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    """``x`` with zeros at the end of a dimension, as many as make it ``rows``."""
    missing = rows - x.shape[dim]
    return torch.cat([x, x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :])], dim) if missing else x


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed sequences, by where each begins in all rows, ascending, and where the last one ends."""

    bounds: tuple[int, ...]

    def parts(self, rows: range, keys: range) -> list[tuple[range, range]]:
        """What some rows and some keys have of each sequence of which both have some."""
        first = bisect_right(self.bounds, max(rows.start, keys.start)) - 1
        past = bisect_left(self.bounds, min(rows.stop, keys.stop)) + 1
        each = [range(*bounds) for bounds in pairwise(self.bounds[max(first, 0) : past])]
        return [(_both(rows, one), _both(keys, one)) for one in each if _both(rows, one) and _both(keys, one)]


@dataclass(frozen=True)
class Piece:
    """Attention of some rows of a shard to some keys of another, both counted within these: ``row + lo ≤ key ≤ row + hi``.

    An edge that cuts nothing is ``None``. All rows see a key, and all keys are seen. With ``packed`` it is a chunk with itself,
    which begins at ``position`` of all rows and has several sequences in it.
    """

    rows: range
    keys: range
    lo: int | None
    hi: int | None
    packed: Packed | None = None
    position: int = 0

    @property
    def edges(self) -> tuple[int | None, int | None]:
        """``(left, right)`` of attention of just these rows and keys, the last of which are aligned; neither is negative."""
        shift = self.keys.stop - self.rows.stop
        return None if self.lo is None else shift - self.lo, None if self.hi is None else self.hi - shift

    @property
    def scores(self) -> int:
        """How many are visible."""
        if self.packed is not None:
            return sum(piece.scores for piece in self.sequences())
        rows, hidden = len(self.rows), []
        if self.hi is not None:  # of the first row, and one fewer of each that follows: a triangle at the last keys
            hidden.append(self.keys.stop - 1 - self.rows.start - self.hi)
        if self.lo is not None:  # of the last row, the same at the first keys
            hidden.append(self.rows.stop - 1 + self.lo - self.keys.start)
        return rows * len(self.keys) - sum(_triangle(side) - _triangle(side - rows) for side in hidden)

    @property
    def diagonals(self) -> tuple[int, int]:
        """The least and the greatest ``key − row`` that is visible."""
        least = self.keys.start - self.rows.stop + 1 if self.lo is None else self.lo
        return least, self.keys.stop - 1 - self.rows.start if self.hi is None else self.hi

    def __str__(self) -> str:
        rows, keys = (f"{x.start} to {x.stop}" for x in (self.rows, self.keys))
        under = ", under the band" if self.edges != (None, None) else ""
        return f"rows {rows} × keys {keys}{under}{', sequence by sequence' if self.packed else ''}"

    def sequences(self) -> list[Piece]:
        """Those of a chunk, each as a piece."""
        assert self.packed is not None
        chunk = _moved(self.rows, self.position - self.rows.start)
        each = [_moved(rows, self.rows.start - self.position) for rows, _ in self.packed.parts(chunk, chunk)]
        return [piece for rows in each if (piece := cut(rows, rows, self.lo, self.hi)) is not None]


def _triangle(side: int) -> int:
    return side * (side + 1) // 2 if side > 0 else 0


def _both(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _moved(rows: range, by: int) -> range:
    return range(rows.start + by, rows.stop + by)


def cut(rows: range, keys: range, lo: int | None, hi: int | None) -> Piece | None:
    """The piece of a rectangle that a band leaves; ``None`` where no row sees a key."""
    first, past = rows.start, rows.stop
    if hi is not None:
        first = max(first, keys.start - hi)
    if lo is not None:
        past = min(past, keys.stop - lo)
    if first >= past or not keys:
        return None
    begin, end = Band(lo, hi).key_range(first, past - 1, keys.stop, HostOps)
    kept_rows, kept_keys = range(first, past), range(max(begin, keys.start), end)
    lo = None if lo is None or past - 1 + lo <= kept_keys.start else lo
    hi = None if hi is None or first + hi >= end - 1 else hi
    return Piece(kept_rows, kept_keys, lo, hi)


def joined(a: Piece, b: Piece) -> Piece | None:
    """The one piece that is both of these, which share no score; ``None`` where there is none: where the narrowest band around
    both has more in it."""
    if a.packed is not None or b.packed is not None:
        return None
    rows = range(min(a.rows.start, b.rows.start), max(a.rows.stop, b.rows.stop))
    keys = range(min(a.keys.start, b.keys.start), max(a.keys.stop, b.keys.stop))
    least, most = zip(a.diagonals, b.diagonals, strict=True)
    union = cut(rows, keys, min(least), max(most))
    return union if union is not None and union.scores == a.scores + b.scores else None


@lru_cache(maxsize=1 << 14)
def pieces(
    q: Shards, k: Shards, of_q: int, of_k: int, lo: int | None, hi: int | None, packed: Packed | None = None
) -> tuple[Piece, ...]:
    """What the queries of rank ``of_q`` see of the keys of rank ``of_k`` in the band ``row + lo ≤ key ≤ row + hi`` of the
    sequence, or, where they are ``packed``, of each of them."""
    found: list[Piece | None] = []
    for (rows, row_position), (keys, key_position) in product(q.in_use(of_q), k.in_use(of_k)):
        at_row, at_key = rows.start - row_position, keys.start - key_position  # from all rows to the shards'
        edges = [None if edge is None else edge + at_key - at_row for edge in (lo, hi)]
        if packed is not None:
            each = packed.parts(_moved(rows, -at_row), _moved(keys, -at_key))
            if len(each) > 1:
                found.append(Piece(rows, keys, edges[0], edges[1], packed, row_position))
            if len(each) != 1:
                continue
            rows, keys = _moved(each[0][0], at_row), _moved(each[0][1], at_key)
        found.append(cut(rows, keys, edges[0], edges[1]))
    return tuple(_joined([piece for piece in found if piece is not None]))


def _joined(parts: list[Piece]) -> list[Piece]:
    for a, b in combinations(parts, 2):
        if (union := joined(a, b)) is not None:
            return _joined([union, *(piece for piece in parts if piece not in (a, b))])
    return parts


def spanned(parts: tuple[Piece, ...], side: str = "keys") -> range:
    """The keys, or the rows, from the first to the last that pieces have."""
    sides: list[range] = [getattr(piece, side) for piece in parts]
    return range(min((side.start for side in sides), default=0), max((side.stop for side in sides), default=0))
