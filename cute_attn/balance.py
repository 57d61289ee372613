"""Where the keys of sequences lie in a cache, and which block computes which of them: what the kernels know of caches.

**Walks.** A walk is all key tiles that a tile of rows sees: of one sequence, one key head, and ``rows`` of its queries, each
once for every query head of the key head, so that all of them share one read of the keys. Tiles begin at the first key that any
query of the sequence sees. A walk without keys has one tile with none.

**Balance.** All walks one after another are a line of tiles: sequence by sequence, key head by key head, row tile by row tile.
It is cut into as many equal stretches as there are blocks, to within a tile. Ends of walks take time, too, and blocks with many
short walks would be the last ones: so the line has steps, of which a tile takes ``tile_steps`` and the end of a walk
``end_steps`` (1 and 0 where blocks have few walks). Each block finds its stretch from the lengths, so nothing is planned and
nothing allocated for it. A walk that is cut has partial results, ``(O, maximum, sum)`` of each row in float32, in a workspace;
the block that is last to finish one merges all of them, in the order of their keys, whoever it is. Which one is last a counter
says, which that block sets back to 0: a call leaves them all as it found them.

A block has two places for partial results at most, one of a walk that began before its stretch, one of a walk that goes on
behind it, and the counter of a walk is that of the block in which it begins. So the workspace depends on the GPU and on nothing
else.

**Invariant.** Where a sequence's results must not depend on the others, a walk is cut into *units* of a length that follows
from its own: as many as :data:`UNITS_MAX`, of :func:`unit_tiles` tiles at least. A block takes the units that begin in its
stretch. Each unit has a place of its own, and each walk a counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.arithmetic import either, summed_up_to_lane
from cute_attn.layouts.base import WARP
from cute_attn.stored import UNITS_MAX, unit_tiles

COUNTED = 4  # sequences of a lane, whose lengths are on their way at the same time


@dataclass(frozen=True)
class Sequence:
    """One sequence of a call: ``rows`` of q from row ``first`` of element ``element`` on, and the ``keys`` from row ``pad`` of
    the cache on. ``begin`` is the first key that any query sees, and ``tiles`` a walk's key tiles; ``row_tiles`` of a key
    head."""

    number: Int32
    element: Int32
    first: Int32
    queries: Int32
    pad: Int32
    keys: Int32
    begin: Int32
    end: Int32
    tiles: Int32
    row_tiles: Int32


@dataclass(frozen=True)
class CachedKeys:
    """All sequences of a call, see ``stored.Stored``. ``seqlen_q`` is of each sequence or, packed, of all. Tiles of all
    sequences together are counted in steps."""

    count: Int32
    capacity: Int32
    elements: Int32  # of the cache
    page_size: Int32
    seqlen_q: Int32
    seqlen_new: Int32
    heads_kv: Int32
    packed: Int32  # query heads of a key head
    left: Int32
    right: Int32
    units: Int32  # places that a walk has for its units
    lengths: cute.Tensor
    page_table: Any
    cache_batch_idx: Any
    leftpad_k: Any
    cu_seqlens_q: Any
    cu_seqlens_k_new: Any
    problem: cutlass.Constexpr
    config: cutlass.Constexpr
    tile_steps: cutlass.Constexpr[int] = 1  # of the line that blocks share: a tile has so many
    end_steps: cutlass.Constexpr[int] = 0  # and the end of a walk, behind its last tile
    near: Any = None  # (a sequence, lengths from it on, one in each lane), of those that a block computes with

    @property
    def all_sequences(self):
        """With the rows that come after the last packed sequence as one more, without keys."""
        return self.count + 1 if self.cu_seqlens_q is not None else self.count

    def bound(self, i):
        """Row of packed queries at which sequence ``i`` begins."""
        return cutlass.min(cutlass.max(self.cu_seqlens_q[i], 0), self.seqlen_q)

    def old_and_new(self, i):
        """``(rows in the cache before the new ones, new rows)`` of a sequence."""
        length = self.lengths[i] if self.near is None else self._near_length(i)
        old = cutlass.min(cutlass.max(length, 0), self.capacity)
        new = self.seqlen_new
        if self.cu_seqlens_k_new is not None:
            new = cutlass.max(self.cu_seqlens_k_new[i + 1] - self.cu_seqlens_k_new[i], 0)
        return old, new

    def near_to(self, i) -> CachedKeys:
        """A whole warp: the same with the lengths from sequence ``i`` on at hand. A fence empties the L1 cache, and while
        memory is busy a length takes as long as keys do."""
        lane = cute.arch.lane_idx()
        return replace(self, near=(i, self.lengths[cutlass.min(i + lane, self.count - 1)]))

    @cute.jit
    def _near_length(self, i):
        """A whole warp: of a sequence that all lanes ask for."""
        length: Any = Int32(0)
        first, held = self.near
        lane = i - first
        if (lane >= 0) & (lane < WARP):
            length = cute.arch.shuffle_sync(held, lane)
        else:
            length = self.lengths[i]
        return length

    @cute.jit
    def of_row(self, bounds: Any, element, row):
        """``(sequence, which of its rows)`` of a row of queries or of new keys; ``count`` or more where it is no sequence's."""
        i, j = Int32(element), Int32(row)
        if cutlass.const_expr(bounds is not None):
            low, high = Int32(0), self.count
            while low < high:
                middle = (low + high) // 2
                if bounds[middle + 1] <= row:
                    low = middle + 1
                else:
                    high = middle
            i = low
            if i < self.count:
                j = row - bounds[i]
        return i, j

    @cute.jit
    def sequence(self, i) -> Sequence:
        """Of a number below :attr:`all_sequences`."""
        problem, config = self.problem, self.config
        element, first, queries = Int32(i), Int32(0), self.seqlen_q
        keys, pad, exists = Int32(0), Int32(0), i < self.count
        if cutlass.const_expr(self.cu_seqlens_q is not None):
            element, first = Int32(0), self.bound(i)
            past = self.seqlen_q
            if exists:
                past = self.bound(i + 1)
            queries = cutlass.max(past - first, 0)
        if exists:
            old, new = self.old_and_new(i)
            if cutlass.const_expr(self.leftpad_k is not None):
                pad = cutlass.min(cutlass.max(self.leftpad_k[i], 0), old)
            keys = cutlass.min(old + new, self.capacity) - pad
        shift, begin, end = keys - queries, Int32(0), keys
        if cutlass.const_expr(problem.bounded_left):
            begin = cutlass.min(cutlass.max(shift - self.left, 0), keys)
            if cutlass.const_expr(bool(problem.expression.neighbours(2))):
                begin = begin // 2 * 2  # two neighbouring keys that are loaded for begin at an even one
        if cutlass.const_expr(problem.bounded_right):
            end = cutlass.max(cutlass.min(keys + self.right, keys), begin)
        tiles = cutlass.max(divided(end - begin + config.tile_n - 1, config.tile_n)[0], 1)
        row_tiles = divided(queries * self.packed + config.tile_m - 1, config.tile_m)[0]
        return Sequence(Int32(i), element, first, queries, pad, keys, begin, end, tiles, row_tiles)

    def walks(self, sequence: Sequence):
        """How many a sequence has."""
        return sequence.row_tiles * self.heads_kv

    def steps(self, sequence: Sequence):
        """Of a walk."""
        return sequence.tiles * self.tile_steps + self.end_steps

    def tiles_begun(self, steps):
        """How many tiles begin in so many steps from a tile's first one on."""
        if self.tile_steps == 1:
            return steps
        return divided(cutlass.max(steps, 0) + self.tile_steps - 1, self.tile_steps)[0]

    def stretches(self, steps, blocks, number):
        """Of so many blocks, of which the one with this number asks."""
        if self.end_steps == 0:
            return Stretches.of(steps, blocks)
        return EvenStretches.of_steps(steps, blocks, self.tile_steps, number)

    def inside(self, named: tuple) -> tuple:
        """A place in the cache, whatever the table says."""
        return cutlass.min(cutlass.max(named[0], 0), self.elements - 1), named[1]

    def place(self, sequence_number, row) -> tuple:
        """``(element or page of the cache, row there)`` of a row of a sequence."""
        if self.page_table is not None:
            place, row = divided(row, self.page_size)
            return self.inside((self.page_table[sequence_number, place], row))
        if self.cache_batch_idx is not None:
            return self.inside((self.cache_batch_idx[sequence_number], row))
        return sequence_number, row

    @cute.jit
    def _tiles(self, i):
        """Of all walks of sequence ``i``, in steps; 0 if there is none."""
        tiles = Int32(0)
        if i < self.all_sequences:
            sequence = self.sequence(i)
            tiles = self.steps(sequence) * self.walks(sequence)
        return tiles

    @cute.jit
    def tiles_of_lanes(self, first):
        """A whole warp, of which each lane has :data:`COUNTED` sequences, one after another from ``first`` on: ``(tiles of each
        of them, those of all sequences from first up to the lane's last)``."""
        lane = cute.arch.lane_idx()
        mine = tuple(self._tiles(first + lane * COUNTED + j) for j in range(COUNTED))  # loads on their way at the same time
        return mine, summed_up_to_lane(sum(mine))

    @cute.jit
    def all_tiles(self):
        """A whole warp: ``(how many tiles there are, tiles_of_lanes(0))``, for :meth:`find`."""
        lanes = self.tiles_of_lanes(Int32(0))
        total = cute.arch.shuffle_sync(lanes[1], WARP - 1)
        for first in cutlass.range(COUNTED * WARP, self.all_sequences, COUNTED * WARP, unroll=1):
            total += cute.arch.shuffle_sync(self.tiles_of_lanes(first)[1], WARP - 1)
        return total, lanes

    @cute.jit
    def find(self, tile, lanes):
        """A whole warp: ``(sequence, tiles before it)`` of a tile of all; the sequence is past the last if there is no such
        tile. ``lanes`` is what :meth:`tiles_of_lanes` has of the first ones."""
        first, before, found = Int32(0), Int32(0), Boolean(False)
        number = self.all_sequences
        mine, passed = lanes
        while (found == False) & (first < self.all_sequences):  # noqa: E712
            total = cute.arch.shuffle_sync(passed, WARP - 1)
            if tile < before + total:
                found = Boolean(True)
                owner = cute.arch.popc(cute.arch.vote_ballot_sync(tile >= before + passed))
                begin = before + passed - sum(mine)
                mine_before, skipped = begin, 0  # of a lane's sequences; the owner's count
                for tiles in mine[:-1]:
                    begin = begin + tiles
                    past = cutlass.min(cutlass.max(tile + 1 - begin, 0), 1)
                    mine_before, skipped = mine_before + past * tiles, skipped + past
                number = first + owner * COUNTED + cute.arch.shuffle_sync(skipped, owner)
                before = cute.arch.shuffle_sync(mine_before, owner)
            else:
                first, before = first + COUNTED * WARP, before + total
                mine, passed = self.tiles_of_lanes(first)
        return number, before


def divided(x, n) -> tuple[Any, Any]:
    """``(x // n, x % n)`` of numbers that are not negative, which takes a third of what floor division takes."""
    quotient = Int32(cutlass.Uint32(x) // cutlass.Uint32(n))
    return quotient, x - quotient * n


@dataclass(frozen=True)
class Stretch:
    """A block's: from ``begin`` up to ``end``."""

    block: Int32
    begin: Int32
    end: Int32


@dataclass(frozen=True)
class Stretches:
    """All tiles in equal parts: block b has those from ``begin(b)`` up to ``begin(b + 1)``."""

    each: Int32
    longer: Int32  # as many blocks, the first ones, have one more

    @staticmethod
    def of(tiles, blocks) -> Stretches:
        return Stretches(*divided(tiles, blocks))

    def begin(self, block):
        return block * self.each + cutlass.min(block, self.longer)

    @cute.jit
    def block_of(self, tile):
        """The block that has a tile."""
        ahead = self.longer * (self.each + 1)
        block = divided(tile, self.each + 1)[0]
        if tile >= ahead:
            block = self.longer + divided(tile - ahead, cutlass.max(self.each, 1))[0]
        return block


@dataclass(frozen=True)
class EvenStretches(Stretches):
    """The same where tiles have several steps: a tile is the block's in whose stretch its first step is. The longer ones are
    spread among the others, so that equal walks that come out even on all blocks are cut as if their ends had no steps. A block
    mostly asks for its own walks."""

    steps: Int32
    blocks: Int32
    ahead: cutlass.Constexpr[int]  # how far ahead of its share a stretch begins, which rounds to the nearest tile
    own: Any = None  # the Stretch of the block that asks

    @staticmethod
    def of_steps(steps, blocks, tile_steps: int, number) -> EvenStretches:
        each, longer = divided(steps, blocks)
        few = each < tile_steps  # a block that is between two that have tiles of a walk has one, too
        each, longer = either(few, Int32(tile_steps), each), either(few, Int32(0), longer)
        found = EvenStretches(each, longer, steps, blocks, tile_steps // 2)
        return replace(found, own=Stretch(number, found.begin(number), found.begin(number + 1)))

    def begin(self, block):
        share = block * self.each + divided(block * self.longer, self.blocks)[0]
        return cutlass.min(cutlass.max(share - self.ahead, 0), self.steps)

    @cute.jit
    def block_of(self, step):
        block = self.own.block
        if (step < self.own.begin) | (step >= self.own.end):
            rate = Float32(self.blocks) / Float32(self.each * self.blocks + self.longer)  # blocks a step
            block = cutlass.min(Int32(Float32(step + self.ahead) * rate), self.blocks - 1)  # or one beside it
            if self.begin(block + 1) <= step:
                block += 1
            if self.begin(block) > step:
                block -= 1
        return block


@dataclass(frozen=True)
class WalkPart:
    """Of a walk the tiles from ``begin`` up to ``end``, as a block computes them: the walk's key head and row tile. ``at`` is
    the first step of tile ``begin`` among all."""

    head_kv: Int32
    row_tile: Int32
    begin: Int32
    end: Int32
    at: Int32


@dataclass(frozen=True)
class PartStart:
    """Where a part of a walk begins: the walk's sequence, key head and row tile, its key tile ``begin``, whose first step is
    number ``at`` of all."""

    sequence: Int32
    head_kv: Int32
    row_tile: Int32
    begin: Int32
    at: Int32


@dataclass(frozen=True)
class PartPlaces:
    """The parts of a walk: how many there are, the ``number`` of this one, and where partial results lie: of part i in place
    ``first`` (i = 0) or ``others + i · step``. ``counter`` is the walk's."""

    parts: Int32
    number: Int32
    first: Int32
    others: Int32
    step: Int32
    counter: Int32

    @cute.jit
    def of(self, i):
        """Where the partial result of part ``i`` lies."""
        return self.first if i == 0 else self.others + i * self.step


@cute.jit
def part_of_stretch(keys: CachedKeys, sequence: Sequence, before, at, end):
    """``(part, steps that a block has passed then)``: what comes first of a block's steps ``at`` up to ``end``, of a sequence
    before which there are ``before``. A part may have no tiles."""
    walk, begin = divided(at - before, keys.steps(sequence))
    head_kv, row_tile = divided(walk, sequence.row_tiles)
    if cutlass.const_expr(keys.tile_steps > 1):
        offset, begin = begin, cutlass.min(keys.tiles_begun(begin), sequence.tiles)
        at += begin * keys.tile_steps - offset
    count: Any = cutlass.min(sequence.tiles - begin, keys.tiles_begun(end - at))
    skipped: Any = Int32(0)
    if cutlass.const_expr(keys.problem.invariant):
        unit = unit_of(keys, sequence)
        ahead = divided(begin, unit)[1]
        skipped = cutlass.min(unit - ahead, sequence.tiles - begin) if ahead > 0 else 0
        count = cutlass.min(unit, sequence.tiles - begin - skipped) if at + skipped < end else 0
    return WalkPart(head_kv, row_tile, begin + skipped, begin + skipped + count, at + skipped), skipped + count


@cute.jit
def next_part(keys: CachedKeys, i, before, at, end):
    """``(sequence, tiles before it, tile)`` of the first part of a block's tiles ``at`` up to ``end``; the tile is ``end`` or
    more if there is none."""
    found = Boolean(False)
    while (found == False) & (at < end):  # noqa: E712
        sequence = keys.sequence(i)
        tiles = sequence.tiles * keys.walks(sequence)
        if at >= before + tiles:
            i, before = i + 1, before + tiles
        else:
            part, passed = part_of_stretch(keys, sequence, before, at, end)
            found = part.begin < part.end
            at = part.at if found else at + passed
    return i, before, at


@cute.jit
def first_start(keys: CachedKeys, i, before, at, end) -> PartStart:
    """Where the first part of a block's steps ``at`` up to ``end`` begins; at ``end`` or behind it if there is none. The block
    may begin in a walk's end."""
    sequence = keys.sequence(i)
    part, _ = part_of_stretch(keys, sequence, before, at, end)
    start = PartStart(i, part.head_kv, part.row_tile, part.begin, part.at)
    if part.begin >= sequence.tiles:
        start = start_after(keys, sequence, part)
    return start


@cute.jit
def part_from(keys: CachedKeys, sequence: Sequence, start: PartStart, end) -> WalkPart:
    """The part that begins there, of a block whose tiles go up to ``end``."""
    count: Any = cutlass.min(sequence.tiles - start.begin, keys.tiles_begun(end - start.at))
    if cutlass.const_expr(keys.problem.invariant):
        count = cutlass.min(sequence.tiles - start.begin, unit_of(keys, sequence))
    return WalkPart(start.head_kv, start.row_tile, start.begin, start.begin + count, start.at)


@cute.jit
def start_after(keys: CachedKeys, sequence: Sequence, part: WalkPart) -> PartStart:
    """Where the next part begins, if there are tiles after this one's: what :func:`next_part` finds without dividing."""
    i, head_kv, row_tile, begin = sequence.number, part.head_kv, part.row_tile, part.end
    at = part.at + (part.end - part.begin) * keys.tile_steps
    if begin >= sequence.tiles:
        row_tile, begin, at = row_tile + 1, Int32(0), at + keys.end_steps
    if row_tile >= sequence.row_tiles:
        head_kv, row_tile = head_kv + 1, Int32(0)
    if head_kv >= keys.heads_kv:
        i, head_kv = cutlass.min(i + 1, keys.all_sequences - 1), Int32(0)
        if cutlass.const_expr(keys.cu_seqlens_q is not None):  # some may have no rows
            while (keys.sequence(i).row_tiles == 0) & (i < keys.all_sequences - 1):
                i += 1
    return PartStart(i, head_kv, row_tile, begin, at)


def unit_of(keys: CachedKeys, sequence: Sequence):
    """Tiles of a unit of a sequence's walks."""
    return cutlass.max((sequence.tiles + UNITS_MAX - 1) // UNITS_MAX, unit_tiles(keys.config.tile_m))


def places_of(keys: CachedKeys, sequence: Sequence, part: WalkPart, stretches: Stretches) -> PartPlaces:
    """Where the partial results of a part's walk lie."""
    if keys.problem.invariant:
        unit = unit_of(keys, sequence)
        rows = sequence.first if keys.cu_seqlens_q is not None else sequence.number * sequence.queries
        walk = divided(rows * keys.packed, keys.config.tile_m)[0] + sequence.number + part.row_tile
        walk = walk * keys.heads_kv + part.head_kv
        place, parts = walk * keys.units, divided(sequence.tiles + unit - 1, unit)[0]
        return PartPlaces(parts, divided(part.begin, unit)[0], place, place, Int32(1), walk)
    begin = part.at - part.begin * keys.tile_steps
    last_tile = begin + (sequence.tiles - 1) * keys.tile_steps
    first, last, mine = (stretches.block_of(step) for step in (begin, last_tile, part.at))
    return PartPlaces(last - first + 1, mine - first, 2 * first + 1, 2 * first, Int32(2), first)
