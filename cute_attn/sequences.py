"""Where the rows of a sequence lie in the tensors of a call: what a tile's rows are rows of.

Sequences of one length are a rectangle: each is an element of the batch. **Ragged** ones, of their own lengths, lie one after
another in the rows of tensors whose batch is 1; where each begins and how many rows it has is in global memory and nowhere else
(:class:`Sequences`), so that a block finds its own sequence on the device, and the host needs to know totals only.

**Tiles of ragged sequences.** With tiles of t rows, sequence i is given the slots from ``first(i) // t + i`` on, up to the
next one's. That is a closed form, so nothing has to be summed up, and it is enough of them: at least ⌈length / t⌉, at most one
more. The same with t = 128, or a tile that doesn't divide it, says where its rows begin in what is padded
(:attr:`Span.padded`). A slot without a tile is a tile past its sequence's end: it sees nothing, and nothing of it is stored. A
warp can also count the tiles that there really are (:meth:`Sequences.seek`), 128 sequences at a time; blocks that walk over
many tiles have one do that ahead of the others, and another for tiles without any row in use, whose results are zeros.

What follows the last sequence, and what follows each one's rows in use, belongs to a sequence too, but is none of its rows: the
results there are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
from cutlass import Boolean, Int32, cute

from cute_attn.arithmetic import summed_up_to_lane
from cute_attn.layouts.base import ROW_PADDING, WARP

PER_LANE = 4  # sequences that a lane counts the tiles of at a time


@dataclass(frozen=True)
class Span:
    """The rows of one sequence in tensors of queries, or of keys.

    In a rectangle all that is known is ``batch``. Of a ragged one, ``first`` is the row of the tensors at which it begins,
    ``length`` how many it has, ``capacity`` how many there are up to the next sequence, and ``padded`` where it begins in
    tensors whose sequences have a multiple of :attr:`Side.padding` rows.
    """

    batch: Int32
    first: Int32 | None = None
    length: Int32 | None = None
    capacity: Int32 | None = None
    padded: Int32 | None = None

    @property
    def stored(self) -> Span:
        """The rows in what is written: those that are none of the sequence's, too, up to the next one."""
        return self if self.first is None else replace(self, length=self.capacity)

    def rows(self, m: Any, head) -> Any:
        """``(length, columns)`` of ``(rows, columns, heads, batch)``."""
        return self._of(m[None, None, head, self.batch])

    def row_values(self, m: Any, head) -> Any:
        """``(length)`` of a value of each row, ``(rows, heads, batch)``."""
        return self._of(m[None, head, self.batch])

    def padded_row_values(self, m: Any, head) -> Any:
        """``(rows)`` of a value of each row, padded, ``(rows, heads, batch)``; a multiple of the padding from the first on."""
        m = m[None, head, self.batch]
        if self.padded is None:
            return m
        return cute.make_tensor((m.iterator + self.padded).align(16), m.layout)

    def padded_tile(self, block, tile: int):
        """The number of a tile in what is padded."""
        return block if self.padded is None else self.padded // tile + block

    def _of(self, m: Any) -> Any:
        """The sequence's rows of ``(rows, …)``."""
        if self.first is None:
            return m
        rank = cute.rank(m)
        begin = cute.domain_offset((self.first, *(0,) * (rank - 1)), m).iterator
        return cute.make_tensor(begin, cute.make_layout((self.length, *m.shape[1:]), stride=m.stride))


def padded_first(first, i, padding: int):
    """Where sequence ``i``, which begins at row ``first``, begins in what is padded."""
    return (first // padding + i) * padding


@dataclass(frozen=True)
class Side:
    """One side of ragged sequences, queries or keys: ``rows`` are those of the tensors. Sequence i begins at ``bounds[i]`` or,
    without them, at ``i · pitch``, and has ``used[i]`` rows or, without them, all up to the next one. Whatever these say, no
    span reaches past ``rows``. In what is padded, a sequence has a multiple of ``padding`` rows."""

    rows: Int32
    pitch: Int32
    bounds: Any  # cute.Tensor (count + 1), or None
    used: Any  # cute.Tensor (count), or None
    padding: cutlass.Constexpr[int] = ROW_PADDING

    def first(self, i):
        """The row at which sequence ``i`` begins."""
        begin = i * self.pitch if self.bounds is None else cutlass.max(self.bounds[i], 0)
        return cutlass.min(begin, self.rows)

    @cute.jit
    def span(self, i, count):
        """Of sequence ``i`` of ``count``; of what comes after the last, if there is no such one."""
        first, past = self.first(i), self.rows
        length = Int32(0)
        if i < count:
            past = cutlass.max(self.first(i + 1), first)
            length = past - first
            if cutlass.const_expr(self.used is not None):
                length = cutlass.min(cutlass.max(self.used[i], 0), length)
        return Span(Int32(0), first, length, past - first, padded_first(first, i, self.padding))

    @cute.jit
    def tiles(self, i, count, tile: cutlass.Constexpr[int]):
        """Of sequence ``i``, or of what comes after the last: ``(how many tiles have rows in use, how many more there are)``.
        There is nothing after that."""
        length, capacity = Int32(0), Int32(0)
        if i <= count:
            span = self.span(i, count)
            length, capacity = span.length, span.capacity
        used = (length + tile - 1) // tile
        return used, (capacity + tile - 1) // tile - used

    @cute.jit
    def unused_rows(self, i, count, tile: cutlass.Constexpr[int]):
        """How many rows of sequence ``i``, or of what comes after the last, are in tiles without a row in use."""
        rows = Int32(0)
        if i <= count:
            span = self.span(i, count)
            rows = cutlass.max(span.capacity - (span.length + tile - 1) // tile * tile, 0)
        return rows

    def slots(self, i, tile: int):
        """How many slots of ``tile`` rows come before sequence ``i``'s."""
        return self.first(i) // tile + i

    def all_slots(self, count, tile: int):
        """How many there are."""
        return self.rows // tile + count + 1

    @cute.jit
    def at(self, slot, count, tile: cutlass.Constexpr[int]):
        """A whole warp: ``(sequence, its first slot, the next one's)`` of a slot, by a search that asks 32 sequences at a time.
        Each slot is some sequence's, and each sequence's are without gaps, even if bounds are wrong."""
        low, high = Int32(0), Int32(count)
        begin, end = Int32(0), self.all_slots(count, tile)
        lane = cute.arch.lane_idx()
        while low < high:
            step = (high - low + WARP - 1) // WARP
            probe = low + (lane + 1) * step
            first = self.slots(cutlass.min(probe, high), tile)
            asked = cute.arch.vote_ballot_sync((first <= slot) & (probe <= high))
            n = cute.arch.popc(asked & ~(asked + 1))  # lanes up to the first that says no
            begin = cutlass.max(begin, cute.arch.warp_redux_sync(first * cutlass.min(cutlass.max(n - lane, 0), 1), "max"))
            if low + (n + 1) * step <= high:
                end = cutlass.min(end, cute.arch.shuffle_sync(first, n))
            low, high = low + n * step, cutlass.min(high, low + (n + 1) * step - 1)
        return low, begin, end


@dataclass(frozen=True)
class Sequences:
    """All ragged sequences of a call."""

    count: Int32
    q: Side
    k: Side

    @cute.jit
    def seek(self, wanted: Int32, first: Int32, before: Int32, of: cutlass.Constexpr[tuple]):
        """A whole warp: where tile number ``wanted`` is among those of sequence ``first`` and later ones, before which there
        are ``before`` tiles: ``(whether there is one, its sequence, how many tiles come before that one's, first, before)``,
        the last two to go on from with a later tile; if there is none, ``before`` is how many there are. ``of`` is (the side,
        rows of a tile, 0 to count tiles with rows in use, 1 to count the others, or 2 to count the rows of these)."""
        side, tile, kind = of
        if cutlass.const_expr(kind == 2):
            counted = lambda i: side.unused_rows(i, self.count, tile)  # noqa: E731
        else:
            counted = lambda i: side.tiles(i, self.count, tile)[kind]  # noqa: E731
        lane = cute.arch.lane_idx()
        found, sequence, begin = Boolean(False), Int32(0), Int32(0)
        while (found == False) & (first <= self.count):  # noqa: E712
            held = [counted(first + lane * PER_LANE + j) for j in range(PER_LANE)]
            upto = [sum(held[: j + 1]) for j in range(PER_LANE)]
            mine = upto[-1]
            passed = summed_up_to_lane(mine)
            total = cute.arch.shuffle_sync(passed, WARP - 1)
            if wanted < before + total:
                found = Boolean(True)
                owner = cute.arch.popc(cute.arch.vote_ballot_sync(wanted >= before + passed))
                begin = before + cute.arch.shuffle_sync(passed - mine, owner)
                sequence = first + owner * PER_LANE
                ahead = Int32(0)
                for j, mine_upto in enumerate(upto[:-1], 1):
                    end = cute.arch.shuffle_sync(mine_upto, owner)
                    if wanted >= begin + end:
                        sequence, ahead = first + owner * PER_LANE + j, end
                begin = begin + ahead
            else:
                first, before = first + WARP * PER_LANE, before + total
        return found, sequence, begin, first, before

    def spans(self, i) -> tuple[Span, Span]:
        """Of sequence ``i``'s queries and keys."""
        return self.q.span(i, self.count), self.k.span(i, self.count)


def padded_span(sequences: Sequences | None, row, batch):
    """The queries of the sequence that a row of what is padded belongs to, ``(span, row within it, number)``."""
    if sequences is None:
        return Span(batch), row, batch
    q = sequences.q
    i, _, _ = q.at(row // q.padding, sequences.count, q.padding)
    span = q.span(i, sequences.count)
    return span, row - span.padded, i
