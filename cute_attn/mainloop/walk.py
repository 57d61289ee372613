"""Which tiles one tile visits, and which of them need a mask: key tiles of a query tile, query tiles of a key tile.

A walk has up to three segments, tiles cut by one edge of the band, whole tiles, tiles cut by the other, so that each loop knows
at compile time whether it masks. Whoever copies and whoever computes take the same walk, each by itself.

Where there is a block mask, the tiles are those of a list in global memory (:mod:`cute_attn.blocks`), whose segments are the
same: tiles that a mask function cuts, whole ones, others that it cuts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Int32, cute

from cute_attn.dropout import SIDE
from cute_attn.layouts.base import BLOCK, HEADER, MEMBER_BIT, TILE_BITS, TILE_MASK, UNSEEN_BIT, WARP, WARPGROUP_BITS, WHOLE_BIT
from cute_attn.mainloop.common import Values


@dataclass(frozen=True)
class KeyTiles:
    """The key tiles of one query tile: they begin at the first key any of its rows sees, not at a multiple of tile_n,
    so that no key before it is ever read; or, with dropout, which is decided for 16 keys at a time, and with biases, of which
    two are loaded at a time, at a multiple of these.
    ``end`` is past the last one any sees; a last tile that is not full reads on.

    ``count`` tiles, walked from the last to the first; tiles ``whole_begin … whole_end − 1`` need no mask. A tile's *place* is
    its number here, and in a list (:class:`ListedKeys`) where it stands there. ``to_left``: where tiles come that the left edge
    cuts, each row has seen a key, as where whole ones do.
    """

    begin: Int32
    end: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32
    to_left: cutlass.Constexpr[bool] = False

    @staticmethod
    def of(values: Values, problem, m_block: Int32, config) -> KeyTiles | ListedKeys:
        if problem.blocks:
            return ListedKeys.of(values, m_block)
        band, n = values.band(problem), config.tile_n
        row_first = m_block * config.tile_m
        row_last = cutlass.min(row_first + config.tile_m, values.seqlen_q) - 1
        begin, end = band.key_range(row_first, row_last, values.seqlen_k, cutlass)
        if (problem.dropout or problem.expression.neighbours(2)) and problem.bounded_left:
            begin = begin // SIDE * SIDE
        if problem.ragged:  # a tile past its sequence's end sees nothing; a factor of 0 or 1, which no length makes overflow
            exists = cutlass.min(cutlass.max(values.seqlen_q - row_first, 0), 1)
            end = end * exists
        count = cutlass.max(cute.ceil_div(end - begin, n), 0)
        return KeyTiles(begin, end, count, *KeyTiles._whole(values, problem, (row_first, row_last), begin, count, n))

    @staticmethod
    def _whole(values: Values, problem, rows, begin, count, n: int):
        """``(whole_begin, whole_end)`` for the rows from one to another."""
        if problem.masks_all:
            return Int32(0), Int32(0)
        inner_begin, inner_end = values.band(problem).whole_range(*rows, values.seqlen_k, cutlass)
        whole_begin = cutlass.min(cutlass.max(cute.ceil_div(inner_begin - begin, n), 0), count)
        whole_end = cutlass.min(cutlass.max(inner_end - begin, 0) // n, count)
        return whole_begin, cutlass.max(whole_end, whole_begin)

    def after_a_seen_key(self, values: Values, problem, m_block: Int32, config, to_left: bool = False) -> KeyTiles:
        """The same walk, whose whole tiles come when each row has seen a key: where the first row sees none in the tiles that
        the right edge cuts, one more counts as such. With ``to_left`` as many more as it takes, so that all that follow come
        when each row has, where both edges cut tiles."""
        if not problem.bounded_right:
            return self
        row = m_block * config.tile_m
        _, row_end = values.band(problem).key_range(row, row, values.seqlen_k, cutlass)
        if to_left and problem.bounded_left:
            seen_by_all = cutlass.max(cute.ceil_div(row_end - self.begin, config.tile_n) - 1, 0)
            # 0 where the tile's last row, which need not exist, sees none at all
            seen_by_all *= cutlass.min(cutlass.max(values.seqlen_k - (row + config.tile_m - 1 + values.lo), 0), 1)
            whole_end = cutlass.min(self.whole_end, seen_by_all)
            return replace(self, whole_begin=cutlass.min(self.whole_begin, whole_end), whole_end=whole_end, to_left=True)
        unseen = (row_end <= self.begin + self.whole_end * config.tile_n) & (self.whole_end < self.count)
        return replace(self, whole_end=cutlass.max(self.whole_end - cutlass.Int32(unseen), self.whole_begin))

    def of_rows(self, values: Values, problem, row_first: Int32, rows: int, config):
        """``(walk, skipped)`` of some of the query tile's rows: the same walk without the tiles that come first and of which
        none of them sees a key, and of the others those that they see all of need no mask. At least one tile is left."""
        band, n = values.band(problem), config.tile_n
        row_last = cutlass.min(row_first + rows, values.seqlen_q) - 1
        _, end = band.key_range(row_first, row_last, values.seqlen_k, cutlass)
        exist = cutlass.min(cutlass.max(values.seqlen_q - row_first, 0), 1)
        count = cutlass.min(cutlass.max(cute.ceil_div(end * exist - self.begin, n), 1), self.count)
        whole_begin, whole_end = KeyTiles._whole(values, problem, (row_first, row_last), self.begin, count, n)
        some = replace(self, end=end, count=count, whole_begin=whole_begin, whole_end=whole_end)
        return some, self.count - count

    def place(self, i):
        """Of the i-th tile that is visited."""
        return self.count - 1 - i

    def place_before(self, i):
        """Of the tile that is visited before the i-th."""
        return self.count - i

    def first_before(self, first, i, tile_n: int):
        """The first key of the tile that is visited before the i-th, whose first one is ``first``."""
        return first + tile_n

    def later(self, n, steps):
        """The place that is visited so many tiles after another."""
        return n - steps

    def exists(self, n):
        """Whether there is a tile at a place from :meth:`later`."""
        return n >= 0

    def tile(self, n):
        """The number of the tile at a place, from ``begin`` on."""
        return n

    def first_key(self, n, tile_n: int):
        """Of the tile at a place."""
        return self.begin + n * tile_n

    def needs_mask(self, n):
        return (n >= self.whole_end) | (n < self.whole_begin)

    def is_anchored(self, n: Int32):
        """Whether a tile but the last takes no maximum, where some don't: it is one of the whole ones."""
        if self.to_left:
            return n < self.whole_end
        return (n >= self.whole_begin) & (n < self.whole_end)

    def last_is_masked(self):
        """Whether the last tile, which is the first to be computed, needs a mask."""
        return (self.count > self.whole_end) | (self.count <= self.whole_begin)


@dataclass(frozen=True)
class ListedKeys:
    """The key tiles of one query tile as a list has them, what :class:`KeyTiles` is for a band: ``count`` of its ``entries``
    from ``first`` on. Those at places ``masked … whole_end − 1`` need no mask; of the others a ``warpgroup`` may need none for
    its own rows. Tiles begin at any block. Where it ``leads``, the first tile that needs no mask comes before those
    that are anchored, and shows each row a key. ``skipped_last`` tiles more are other warpgroups'."""

    entries: cute.Tensor  # (HEADER + tiles + 1)
    end: Int32
    first: Int32
    count: Int32
    masked: Int32
    whole_end: Int32
    skipped_last: Int32 | None = None
    warpgroup: Int32 | None = None
    begin: cutlass.Constexpr[int] = 0
    leads: cutlass.Constexpr[bool] = False

    @staticmethod
    def of(values: Values, m_block: Int32) -> ListedKeys:
        entries = values.key_lists[values.sequence, values.head, m_block, None]
        masked, count, whole_end = [entries[i] for i in range(3)] if values.header is None else values.header[:3]
        return ListedKeys(entries, values.seqlen_k, Int32(0), count, masked, whole_end)

    @staticmethod
    @cute.jit
    def ahead(values: Values, m_block: Int32):
        """A whole warp, ahead of those that take the list: its first three words, and blocks of keys, in half of the lanes its
        first tile's and in the others its last one's, where most often the cut ones are."""
        entries, lane = values.key_lists[values.sequence, values.head, m_block, None], cute.arch.lane_idx()
        word = entries[cutlass.min(lane, entries.shape[0] - 1)]
        header = tuple(cute.arch.shuffle_sync(word, i) for i in range(3))
        place = cutlass.max(header[1] - 1, 0) if lane >= WARP // 2 else 0
        return header, entries[HEADER + place] & TILE_MASK

    def after_a_seen_key(self, values: Values, problem, m_block: Int32, config, to_left: bool = False) -> ListedKeys:
        """The same walk, whose whole tiles come when each row has seen a key."""
        return replace(self, leads=True)

    @cute.jit
    def of_rows(
        self, values: Values, problem: cutlass.Constexpr, row_first: Int32, rows: cutlass.Constexpr, config: cutlass.Constexpr
    ):
        """``(walk, skipped)`` of a warpgroup's rows: the same walk without the tiles that come first, or last, and of which
        none of them sees a key. At least one tile is left."""
        mine = replace(self, warpgroup=row_first // rows % (config.tile_m // rows))
        skipped, past = Int32(0), self.count
        while (skipped < past - 1) & mine._says(skipped, UNSEEN_BIT):
            skipped += 1
        while (skipped < past - 1) & mine._says(past - 1, UNSEEN_BIT):
            past -= 1
        count = past - skipped
        masked, whole_end = (cutlass.min(cutlass.max(end - skipped, 0), count) for end in (self.masked, self.whole_end))
        mine = replace(mine, first=skipped, count=count, masked=masked, whole_end=whole_end, skipped_last=self.count - past)
        return mine, skipped

    def place(self, i):
        return i

    def place_before(self, i):
        return i - 1

    def first_before(self, first, i, tile_n: int):
        return self.first_key(i - 1)

    def later(self, i, steps):
        return i + steps

    def exists(self, i):
        return i < self.count

    def first_key(self, i, tile_n: int = 0):
        return (self.entries[HEADER + self.first + i] & TILE_MASK) * BLOCK

    def needs_mask(self, i):
        return (i < self.masked) | (i >= self.whole_end)

    def is_cut(self, i):
        """Whether the tile at a place outside of the whole ones needs a mask."""
        return True if self.warpgroup is None else self._says(i, WHOLE_BIT) == False  # noqa: E712

    def is_anchored(self, i):
        """The same: each row has seen a key, since a whole tile has come before."""
        return i >= self.masked + int(self.leads)

    def last_is_masked(self):
        return self.is_cut(0)

    def _says(self, i, bit: int):
        """What an entry says of the warpgroup's rows."""
        shift = TILE_BITS + WARPGROUP_BITS * self.warpgroup + bit
        return (self.entries[HEADER + self.first + i] >> shift) & 1 != 0


@dataclass(frozen=True)
class QueryTiles:
    """The query tiles that see any key of one key tile, for the backward pass. They begin at multiples of tile_m.

    ``count`` tiles from ``begin`` on, of which all but ``whole_begin … whole_end − 1`` need a mask. ``from_last`` says which
    way they are walked, where it isn't the same for all key tiles.
    """

    n_block: Int32
    begin: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32
    from_last: Int32 | None = None

    @staticmethod
    def of(values: Values, problem, n_block: Int32, config) -> QueryTiles | ListedQueries:
        if problem.blocks:
            return ListedQueries.of(values, n_block)
        return QueryTiles._in_band(values, problem, n_block, config)

    @staticmethod
    @cute.jit
    def _in_band(values: Values, problem: cutlass.Constexpr, n_block: Int32, config: cutlass.Constexpr) -> QueryTiles:
        band, m = values.band(problem).transposed(), config.tile_m
        key_first = n_block * config.tile_n
        key_end = key_first + config.tile_n
        key_last = cutlass.min(key_end, values.seqlen_k) - 1
        first, last = band.key_range(key_first, key_last, values.seqlen_q, cutlass)
        inner_first, inner_last = band.whole_range(key_first, key_last, values.seqlen_q, cutlass)
        if cutlass.const_expr(problem.ragged):
            last = last if key_first < values.seqlen_k else 0
        begin = first // m
        end = cute.ceil_div(last, m) if first < last else begin
        whole_begin = cutlass.min(cute.ceil_div(inner_first, m), end)
        # Queries past the last need no mask: their log-sum-exp says that they weigh nothing. Keys past the last do.
        whole_end = end if inner_last >= values.seqlen_q else cutlass.min(cutlass.max(inner_last, 0) // m, end)
        whole_end = whole_end if key_end <= values.seqlen_k else whole_begin
        whole_end = cutlass.max(whole_end, whole_begin)
        if cutlass.const_expr(problem.masks_all):
            whole_begin = whole_end = begin
        return QueryTiles(n_block, begin, end - begin, whole_begin, whole_end, values.from_last)

    def of_warpgroup(self, warpgroup):
        """The same walk of some of the keys: a band's edges cut all of a tile or none."""
        return self

    def in_order(self, i, problem):
        """The i-th tile without regard to masks. Where dQ is added in a fixed order, key tile by key tile, the last one comes
        first: with a right edge, key tile n then finds that tile n − 1 has just left each query tile that it comes to. In the
        other order, in which the last key tile adds first, the first one does, and has been left by tile n + 1."""
        if self.from_last is not None:
            return self.begin + i + self.from_last * (self.count - 1 - 2 * i)
        return self.begin + (self.count - 1 - i if problem.deterministic else i)

    def members(self, heads_per_kv):
        """How many times the tiles are walked over: once for each query head that shares the keys."""
        return heads_per_kv

    def tile(self, i, member, problem):
        """``(m_block, member)`` of the i-th tile of a walk: which query head of those that share the keys it is of."""
        return self.in_order(i, problem), member

    def needs_mask(self, i, m_block):
        """Of the i-th tile of a walk."""
        return (m_block < self.whole_begin) | (m_block >= self.whole_end)

    def rank(self, values: Values, problem, m_block: Int32, config):
        """How many key tiles come before this one in the fixed order in which a query tile's dQ is added up: from the
        first key that it sees on, or, where key tiles don't walk from the last query tile, from the last key."""
        begin, end = QueryTiles._keys(values, problem, m_block, config)
        before = self.n_block - begin // config.tile_n
        if self.from_last is None:
            return before
        after = (end - 1) // config.tile_n - self.n_block
        return after + self.from_last * (before - after)

    @staticmethod
    def visits(values: Values, problem, m_block: Int32, config):
        """How many key tiles visit a query tile: none, if it has no rows."""
        if problem.blocks:
            return values.visits[values.sequence, values.head, m_block, 0]
        begin, end = QueryTiles._keys(values, problem, m_block, config)
        some = cutlass.min(end - begin, values.seqlen_q - m_block * config.tile_m) > 0
        return (cute.ceil_div(end, config.tile_n) - begin // config.tile_n) * Int32(some)

    @staticmethod
    def _keys(values: Values, problem, m_block: Int32, config):
        """``(begin, end)`` of the keys that a query tile sees."""
        row_first = m_block * config.tile_m
        row_last = cutlass.min(row_first + config.tile_m, values.seqlen_q) - 1
        return values.band(problem).key_range(row_first, row_last, values.seqlen_k, cutlass)


@dataclass(frozen=True)
class ListedQueries:
    """The query tiles of one key tile as a list has them, what :class:`QueryTiles` is for a band. They are walked over once, of
    all query heads that share the keys: ``count`` of them, and the ``masked`` ones, which need a mask, come first; of these a
    ``warpgroup``'s keys may need none."""

    entries: cute.Tensor  # (HEADER + tiles + 1)
    n_block: Int32
    count: Int32
    masked: Int32
    warpgroup: Int32 | None = None
    begin: cutlass.Constexpr[int] = 0

    @property
    def whole_begin(self):
        return self.masked

    @property
    def whole_end(self):
        return self.count

    @staticmethod
    def of(values: Values, n_block: Int32) -> ListedQueries:
        entries = values.query_lists[values.sequence, values.head, n_block, None]
        said = (entries[1], entries[0]) if values.header is None else values.header
        return ListedQueries(entries, n_block, *said)

    @staticmethod
    def ahead(values: Values, n_block: Int32):
        """A whole warp, ahead of those that take the list: what it begins with."""
        entries = values.query_lists[values.sequence, values.head, n_block, None]
        return entries[1], entries[0]

    def members(self, heads_per_kv):
        return 1

    def tile(self, i, member, problem):
        return self.tile_of(self.entry(i))

    def entry(self, i):
        """What the list says of the i-th tile."""
        return self.entries[HEADER + i]

    def tile_of(self, entry):
        """``(m_block, member)`` of an entry."""
        return entry & TILE_MASK, entry >> MEMBER_BIT

    def of_warpgroup(self, warpgroup):
        return replace(self, warpgroup=warpgroup)

    def needs_mask(self, i, m_block):
        return i < self.masked

    def entry_needs_mask(self, i, entry):
        """The same of a warpgroup's keys, of an entry that is known."""
        return (i < self.masked) & (entry >> TILE_BITS + self.warpgroup & 1 == 0)

    def rank(self, values: Values, problem, m_block: Int32, config):
        return values.ranks[values.sequence, values.head, m_block, self.n_block]


@cute.jit
def walk(
    step: cutlass.Constexpr,
    state,
    keys: KeyTiles | ListedKeys,
    problem: cutlass.Constexpr,
    last: cutlass.Constexpr[bool],
    around_whole: cutlass.Constexpr[tuple] = (None, None),
):
    """``state = step(state, (place, masked))`` over the key tiles, in descending order; with the ``last`` or without.

    Three loops, so that each knows at compile time whether it masks: tiles cut by the right edge, whole tiles, tiles cut
    by the left edge. The last is among the first ones. ``around_whole`` are called before and after the second. There is one
    loop where every tile masks.
    """
    before, after = around_whole
    if cutlass.const_expr(problem.blocks):
        done = keys.masked if cutlass.const_expr(last) else cutlass.max(keys.masked, 1)
        for i in cutlass.range(0 if last else 1, done, unroll=1):
            state = step(state, (i, keys.is_cut(i)))
        if cutlass.const_expr(keys.leads):
            led = cutlass.min(keys.masked + 1, keys.whole_end)
            for i in cutlass.range(done, led, unroll=1):
                state = step(state, (i, False), anchored=False)
            done = cutlass.max(done, led)
        if cutlass.const_expr(before is not None):
            before()
        for i in cutlass.range(done, keys.whole_end, unroll=1):
            state = step(state, (i, False))
        if cutlass.const_expr(after is not None):
            after()
        for i in cutlass.range(cutlass.max(done, keys.whole_end), keys.count, unroll=1):
            if cutlass.const_expr(keys.leads):
                state = step(state, (i, keys.is_cut(i)), anchored=True)
            else:
                state = step(state, (i, keys.is_cut(i)))
    else:
        top = keys.count - 1
        whole_end = cutlass.min(top, keys.whole_end)
        if cutlass.const_expr(last):
            for i in cutlass.range(keys.count - whole_end, unroll=1):
                state = step(state, (top - i, True))
        elif cutlass.const_expr(problem.bounded_right or problem.masks_all):
            for i in cutlass.range(top - keys.whole_end, unroll=1):
                state = step(state, (top - 1 - i, True))
        if cutlass.const_expr(before is not None):
            before()
        if cutlass.const_expr(not problem.masks_all):
            for i in cutlass.range(whole_end - keys.whole_begin, unroll=1):
                state = step(state, (whole_end - 1 - i, False))
        if cutlass.const_expr(after is not None):
            after()
        if cutlass.const_expr(problem.bounded_left and not problem.masks_all):
            left_end = cutlass.min(top, keys.whole_begin)
            for i in cutlass.range(left_end, unroll=1):
                if cutlass.const_expr(keys.to_left):
                    state = step(state, (left_end - 1 - i, True), anchored=True)
                else:
                    state = step(state, (left_end - 1 - i, True))
    return state
