"""The lists of tiles that kernels read, made of the kinds of blocks, as ``blocks.py`` says they are.

A warp makes a list, and goes through its tiles twice: it counts them, and writes each where it belongs. Of key lists a second
kernel says which is taken when.
"""

from __future__ import annotations

import cutlass
from cutlass import Boolean, Int32, cute

from cute_attn.fields import ENLIST, named
from cute_attn.layouts.base import (
    CUT,
    HEADER,
    IN_TURN,
    LISTED_ROWS,
    MEMBER_BIT,
    NONE,
    TILE_BITS,
    UNSEEN_BIT,
    WARP,
    WARPGROUP_BITS,
    WHOLE,
    WHOLE_BIT,
)

GROUPS = LISTED_ROWS // 64  # of 64 rows, at most, in a query tile
PAIRED = 2  # blocks of each
THREADS = 128


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.ENLIST`'s values to compile."""
    kernel = ListsOfKeys() if problem.blocks == "key lists" else ListsOfQueries()

    @cute.jit
    def enlist(*arguments):
        given = named(ENLIST, arguments)
        kernel.launch(given.kinds, given.lists, given.down, given.across, given.members, given.stream)

    return enlist


def _place(lists, index):
    """``(batch, head, tile)`` of the list of this number."""
    _, heads, tiles, _ = lists.shape
    return index // tiles // heads, index // tiles % heads, index % tiles


class ListsOfKeys:
    """The kernels of lists of key tiles: ``down`` × ``across`` blocks are a tile."""

    @cute.jit
    def launch(self, mKinds, mLists, down: Int32, across: Int32, members: Int32, stream):
        batch, heads, tiles, _ = mLists.shape
        count = batch * heads * tiles
        self.kernel(mKinds, mLists, down, across).launch(grid=[count, 1, 1], block=[WARP, 1, 1], stream=stream)
        self.order(mLists).launch(grid=[cute.ceil_div(count, THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mKinds, mLists, down: Int32, across: Int32):
        batch, head, tile = _place(mLists, cute.arch.block_idx()[0])
        kinds, entries = mKinds[batch, head, None, None], mLists[batch, head, tile, None]
        rows = tile * down, down
        zeros = Int32(0), Int32(0), Int32(0)
        led, whole, cut = self._walk(kinds, rows, across, zeros, Int32(0), None)
        if whole == 0:
            led, cut = Int32(0), led
        ends = led + whole + cut, whole + cut, cut
        self._walk(kinds, rows, across, ends, Int32(whole == 0), entries)
        if cute.arch.lane_idx() == 0:
            entries[0], entries[1], entries[2] = cut, led + whole + cut, whole + cut

    @cute.jit
    def _walk(self, kinds, rows, across: Int32, ends, passed: Int32, into: cutlass.Constexpr):
        """The tiles of some ``rows`` (first, number) of blocks, each from the first block on that is seen and in no tile before
        it: how many are cut and before all whole ones, whole, and cut elsewhere, ``ends`` and these. Or their entries, ``into``
        a list, from these ``ends`` down; then a whole one may be said to have ``passed`` already."""
        step, lane, columns = 1 if into is None else -1, cute.arch.lane_idx(), kinds.shape[1]
        led, whole, cut = ends
        begin = Int32(0)
        while begin < columns:
            none, every, seen = self._look(kinds, rows, begin + lane)
            following = begin + WARP
            while seen != 0:
                at = Int32(cute.arch.clz(cute.arch.brev(seen)))
                if at + across > WARP:
                    following, seen = begin + at, Int32(0)
                else:
                    held, entry, is_whole = ((Int32(1) << across) - 1) << at, begin + at, Int32(1)
                    for g in cutlass.range_constexpr(GROUPS):
                        unseen, all_seen = (Int32((x[g] & held) == held) for x in (none, every))
                        said = unseen << UNSEEN_BIT | all_seen << WHOLE_BIT
                        exists = Int32(PAIRED * g < rows[1])
                        entry = entry | said * exists << TILE_BITS + WARPGROUP_BITS * g
                        is_whole = is_whole & all_seen
                    of_whole, of_led, of_cut = is_whole, (1 - is_whole) * (1 - passed), (1 - is_whole) * passed
                    whole, led, cut = whole + step * of_whole, led + step * of_led, cut + step * of_cut
                    passed, seen = passed | is_whole, seen & (held ^ -1)
                    if cutlass.const_expr(into is not None):
                        if lane == 0:
                            into[HEADER + of_whole * whole + of_led * led + of_cut * cut] = entry
            begin = following
        return led, whole, cut

    def _look(self, kinds, rows, column: Int32):
        """A whole warp, a column of blocks each: of each 64 rows whether they see nothing of it, and all of it, a bit each; and
        whether any sees some."""
        (first, count), (blocks, columns) = rows, kinds.shape
        none, every, seen, exists = [], [], Int32(0), column < columns
        for g in range(GROUPS):
            of_none, of_every = Boolean(True), Boolean(True)
            for i in range(PAIRED * g, PAIRED * (g + 1)):
                row = cutlass.min(first + cutlass.min(i, count - 1), blocks - 1)
                missing = (count <= i) | (first + i >= blocks)
                kind = Int32(kinds[row, cutlass.min(column, columns - 1)])
                of_none = of_none & ((kind == NONE) | missing)
                of_every = of_every & ((kind == WHOLE) | missing)
            none.append(cute.arch.vote_ballot_sync(of_none | (exists == False)))  # noqa: E712
            every.append(cute.arch.vote_ballot_sync(of_every & exists))
            seen = seen | (none[g] ^ -1)
        return none, every, seen

    @cute.kernel
    def order(self, mLists):
        """Which list of a head is to be taken when: the one with the most tiles first."""
        index = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        batch, heads, tiles, _ = mLists.shape
        if index < batch * heads * tiles:
            b, h, mine = _place(mLists, index)
            lists, before = mLists[b, h, None, None], Int32(0)
            for other in cutlass.range(tiles, unroll=4):
                more = lists[other, 1] - lists[mine, 1]
                before += Int32((more > 0) | ((more == 0) & (other < mine)))
            lists[before, IN_TURN] = mine


class ListsOfQueries:
    """The kernel of lists of query tiles, of ``members`` heads that share keys."""

    @cute.jit
    def launch(self, mKinds, mLists, down: Int32, across: Int32, members: Int32, stream):
        batch, heads, tiles, _ = mLists.shape
        grid = [batch * heads * tiles, 1, 1]
        self.kernel(mKinds, mLists, (down, across), members).launch(grid=grid, block=[WARP, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mKinds, mLists, sides, members: Int32):
        batch, head, tile = _place(mLists, cute.arch.block_idx()[0])
        entries, head = mLists[batch, head, tile, None], head * members
        cut, total = self._walk(mKinds, (batch, head, tile), sides, members, (Int32(0), Int32(0)), None)
        self._walk(mKinds, (batch, head, tile), sides, members, (Int32(0), cut), entries)
        if cute.arch.lane_idx() == 0:
            entries[0], entries[1] = cut, cut + total

    @cute.jit
    def _walk(self, mKinds, place, sides, members: Int32, begins, into: cutlass.Constexpr):
        """A whole warp, a tile each: how many are cut, and how many are whole, ``begins`` and these; or, ``into`` a list, their
        entries from there on."""
        batch, head, tile = place
        cut, whole = begins
        lane = cute.arch.lane_idx()
        tiles = cute.ceil_div(mKinds.shape[2], sides[0])
        for member in cutlass.range(members, unroll=1):
            kinds = mKinds[batch, (head + member) % mKinds.shape[1], None, None]
            for first in cutlass.range(0, tiles, WARP, unroll=1):
                kind, every = self._kind(kinds, first + lane, tile, sides)
                is_cut, is_whole = (cute.arch.vote_ballot_sync(kind == x) for x in (CUT, WHOLE))
                if cutlass.const_expr(into is not None):
                    if kind != NONE:
                        behind = whole if kind == WHOLE else cut
                        of_kind = is_whole if kind == WHOLE else is_cut
                        behind += cute.arch.popc(of_kind & cute.arch.lanemask_lt())
                        into[HEADER + behind] = first + lane | every << TILE_BITS | member << MEMBER_BIT
                cut, whole = cut + cute.arch.popc(is_cut), whole + cute.arch.popc(is_whole)
        return cut, whole

    @cute.jit
    def _kind(self, kinds, tile: Int32, key_tile: Int32, sides):
        """``(the kind of a tile, whether each query sees all of 64 keys of two, a bit each)``; no bits where a tile has not 128
        keys."""
        (rows, columns), (down, across) = kinds.shape, sides
        some, lacking = Boolean(False), Int32(0)
        for r in cutlass.range(down, unroll=1):
            row = tile * down + r
            if row < rows:
                for c in cutlass.range(across, unroll=1):
                    column = key_tile * across + c
                    kind = Int32(NONE)
                    if column < columns:
                        kind = Int32(kinds[row, column])
                    some = some | (kind != NONE)
                    lacking = lacking | Int32(kind != WHOLE) << c // PAIRED
        found, every = Int32(NONE), Int32(0)
        if some:
            found = Int32(WHOLE) if lacking == 0 else Int32(CUT)
        if across == 2 * PAIRED:
            every = (lacking ^ -1) & 3
        return found, every
