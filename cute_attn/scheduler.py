"""Which block computes which tile, and in what order: of queries, or, in the backward pass, of keys.

A block takes one tile, and the hardware hands the next one to whichever multiprocessor is free; or, persistent, blocks as
many as the GPU holds at once walk over all tiles of the call in rounds. Producer and consumers of a block compute the same
sequence by themselves, so nothing is communicated and nothing is allocated.

- Without a right edge all tiles cost the same: the tiles of a head come one after another, so that blocks which run at
  the same time read the same keys and values from the L2 cache.
- With one (causal) the tiles with many keys come first: long ones first leave only short ones for the uneven end
  (longest-processing-time-first, Graham 1969). Heads are taken in groups, of a quarter as many as there are blocks, or
  small ones: the fewer heads, the more blocks ask the L2 cache for the same keys and values at a time, and the more of
  them it holds. But while the longest tile of the last group runs, the rest of it must keep all other blocks busy: a
  small group's tiles are, in all, worth the longest one for each block. Where tiles are so short that this takes more
  heads than the cache holds, a group is an eighth as many as there are blocks. If the heads don't come out even, the
  small group that lacks some is the first.
- Persistent blocks that walk over such tiles take the rounds in alternating direction, like a snake, so that whoever got
  the longest tile of one round gets the shortest of the next. That evens out only with many more tiles in a group than in
  a round. What persistent blocks save, a start for each tile, is worth more than what small groups gain where tiles are
  short, and less where they are long.
- Of ragged sequences nothing evens out by arithmetic. Where tiles cost the same within a sequence, rounds still give every
  block as many of each; where they don't, persistent blocks draw tickets (:class:`Tickets`).
- What a query tile costs that has a list is known on the device only. There the lists say in which order a head's tiles are
  taken, and persistent blocks draw tickets, too. Key tiles with lists are taken as under a right edge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Boolean, Int32, cute

from cute_attn.arithmetic import of_first_lane
from cute_attn.layouts.base import TICKET_COUNTERS
from cute_attn.sequences import Sequences, Span

BLOCKS_PER_HEAD = 4  # that run at the same time, where groups are not small
THREADS = 256  # of a block that writes zeros
LONG_WALK = 16  # steps of a tile, from which on a card's power, not memory, is what a block lacks
FINISHED_IN = 30  # hundredths of a step of the backward pass, in which a query tile's dQ is rounded
LEAST_BLOCKS_PER_HEAD = 8  # that run at the same time, where groups are small


@dataclass(frozen=True)
class Work:
    """One tile to compute: which ``block`` of rows of which head, of which sequence's queries ``q`` and keys ``k``. Where some
    are past their sequence's end, ``exists`` says whether this one has any rows. ``sequence`` is the number of a ragged one,
    ``header`` what its list begins with, where another warp has read that. ``from_last`` says of a key tile whether it walks
    from its last query tile to its first, where some do and some don't (:meth:`Tiles.in_turns`)."""

    block: Int32
    head: Int32
    head_kv: Int32
    q: Span
    k: Span
    exists: Boolean | None = None
    sequence: Int32 | None = None
    header: tuple | None = None
    from_last: Int32 | None = None


@dataclass(frozen=True)
class Tickets:
    """Numbers that persistent blocks draw for their tiles, so that the next one is always whose block is free first. In global
    memory, int32: how many have been drawn, and how many blocks draw no more, zeros as every kernel leaves them
    (``workspace.py``); then, for each number, which one its block drew next."""

    words: cute.Tensor

    @cute.jit
    def draw(self, first, last: Int32):
        """A whole warp: the next number for this block, whose last one was ``last``; ``first`` says that there was none. Past
        the last one of all there is none."""
        number = of_first_lane(lambda: cute.arch.atomic_add(self.words.iterator, Int32(1), sem="relaxed", scope="gpu"))
        number = cutlass.min(number, self.words.shape[0] - TICKET_COUNTERS)  # tiles
        if (cute.arch.lane_idx() == 0) & (first == False):  # noqa: E712
            self.words[TICKET_COUNTERS + last] = number
        return number

    @cute.jit
    def end(self):
        """A whole warp: this block draws no more. The last one leaves zeros."""
        if cute.arch.lane_idx() == 0:
            ended = cute.arch.atomic_add(self.words.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if ended == cute.arch.grid_dim()[0] - 1:
                self.words[0], self.words[1] = Int32(0), Int32(0)

    @cute.jit
    def after(self, last: Int32):
        """A whole warp: which number this block has drawn after ``last``."""
        return of_first_lane(lambda: self.words[TICKET_COUNTERS + last])


@cute.jit
def write_zeros(words: cute.Tensor, stream):
    """Zeros in int32 words, before the kernels that come next on the stream. One launch, as torch's would be, without what
    torch's takes of the host."""
    _write_zeros(words).launch(grid=[cute.ceil_div(cute.size(words), THREADS), 1, 1], block=[THREADS, 1, 1], stream=stream)


@cute.kernel
def _write_zeros(words: cute.Tensor):
    i = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
    if i < cute.size(words):
        words[i] = Int32(0)


def place_of_block(blocks, heads, last_first: bool = False):
    """``(block, head, batch)`` of this block, of ``blocks`` for each head. A grid's other dimensions end at 65,535. Heads come
    one after another: most often a row of all of them is one piece of memory."""
    index = cute.arch.block_idx()[0]
    if last_first:
        index = cute.arch.grid_dim()[0] - 1 - index
    return index // heads % blocks, index % heads, index // heads // blocks


@dataclass(frozen=True)
class Tiles:
    """All query tiles of a call, or, for the backward pass, all key tiles. ``long_first`` is compile-time; the counts are
    run-time."""

    m_blocks: Int32
    heads: Int32
    batch: Int32
    heads_per_kv: Int32  # query heads that share a key head
    group: Int32  # (head, batch) pairs that are taken together where long_first
    lacking: Int32 | None  # so many fewer are in the first group; None: the last group is the one that lacks some
    long_first: cutlass.Constexpr[bool]
    ticket: Int32 | None = None  # the number of this block, if not the hardware's
    sequences: Sequences | None = None  # ragged ones: m_blocks is of them all then, and batch is 1
    tile: cutlass.Constexpr[int] = 0  # rows of a tile
    of_k: cutlass.Constexpr[bool] = False  # tiles of keys
    in_key_order: cutlass.Constexpr[bool] = False  # tiles of queries as key tiles leave them (:meth:`left_behind`)
    small: Int32 | None = None  # of ragged sequences, if groups are small: how many blocks the GPU holds
    tickets: Tickets | None = None  # of tiles whose costs are unequal, and known on the device only
    in_turn: cute.Tensor | None = None  # (batch, heads, tiles): which of a head's is taken when, where lists say so
    by: tuple | None = None  # divisors that are multiplied by: m_blocks, heads and heads_per_kv
    both_ways: cutlass.Constexpr[bool] = False  # whether all groups but the last take the short tiles first
    at_once: Int32 | None = None  # blocks that take tiles, where not all do

    @staticmethod
    def of(shape, heads_per_kv, tile: int, blocks: Int32, long_first: bool, sequences=None, of_k: bool = False) -> Tiles:
        """The tiles of queries ``(seqlen_q, head_dim, heads, batch)``, or, ``of_k``, of keys, for a GPU that holds ``blocks``
        blocks at once. Of keys, a tile's ``head`` is a key head, and whoever takes it walks over its ``heads_per_kv`` query
        heads."""
        rows, _, heads, batch = shape
        group = cutlass.max(blocks // BLOCKS_PER_HEAD, 1)
        if sequences is None:
            m_blocks = cute.ceil_div(rows, tile)
        else:
            m_blocks = (sequences.k if of_k else sequences.q).all_slots(sequences.count, tile)
        return Tiles(
            *(m_blocks, heads, batch, heads_per_kv, group, None, long_first), sequences=sequences, tile=tile, of_k=of_k
        )

    def divided_by_products(self) -> Tiles:
        """The same tiles, whose blocks multiply where they would divide, on the host: where each tile has a block and these
        aren't taken in groups, that is what a block begins with."""
        if self.sequences is not None or self.long_first:
            return self
        return replace(self, by=tuple(map(cute.fast_divmod_create_divisor_v2, (self.m_blocks, self.heads, self.heads_per_kv))))

    def in_small_groups(self, blocks: Int32) -> Tiles:
        """The same tiles. Of a head's, the mean is half as long as the longest."""
        if self.sequences is not None:
            return replace(self, small=blocks)
        group = cutlass.min(cute.ceil_div(2 * blocks, self.m_blocks), cutlass.max(blocks // LEAST_BLOCKS_PER_HEAD, 1))
        return replace(self, group=group, lacking=(group - self.heads * self.batch % group) % group)

    def in_turns(self, blocks: Int32, steps: Int32, both_ways: bool) -> Tiles:
        """The same key tiles of rectangles, where those of a head take turns at each query tile's dQ, and walk over ``steps``
        of these: in groups of as many heads as have a tile for each block, or, where walks are short, as have a head's next
        one begin two steps later. No more: blocks at different query tiles read all of a head's queries and dQ at once, and of
        more heads the L2 cache doesn't hold them. Equal tiles begin at the same time once, at first, and wait the longer, the
        fewer heads the first group has: the last one lacks some.

        With ``both_ways`` they are unequal, and those of a head whose queries end first, the short ones, come first; each walks
        from its first query tile, which the tile before has left already, to its last, and is never held up. The last group
        begins with the long ones, so that short ones are left for the uneven end. It finds the blocks at work on long ones, so
        that its own don't begin at the same time. There tile n walks from its last query tile, behind tile n − 1."""
        slices = self.heads * self.batch
        group = cutlass.max(blocks // self.m_blocks, cute.ceil_div(2 * blocks, cutlass.max(steps, 1)))
        if cutlass.const_expr(not both_ways):
            return replace(self, group=group)
        return replace(self, group=group, lacking=(group - slices % group) % group, both_ways=both_ways)

    def left_behind(self, rows: Int32, tile: int, heads_at_once: int, pieces: int) -> Tiles:
        """Of these key tiles the query tiles of so many ``rows`` each, in about the order in which they are visited last; a
        ``head`` is a piece of as many as are taken at once."""
        of_heads = lambda n: None if n is None else cute.ceil_div(n * self.heads_per_kv, heads_at_once) * pieces  # noqa: E731
        by_heads = {name: of_heads(getattr(self, name)) for name in ("heads", "group", "lacking")}
        small = None if self.small is None else of_heads(self.small * self.tile // tile)
        ragged = self.sequences
        m_blocks = cute.ceil_div(rows, tile) if ragged is None else ragged.q.all_slots(ragged.count, tile)
        how = {"m_blocks": m_blocks, "tile": tile, "small": small, "of_k": False, "in_key_order": True, "both_ways": False}
        return replace(self, **by_heads, **how)

    @cute.jit
    def launched(self, blocks: Int32, long):
        """``(tiles, blocks)`` to launch where blocks can be persistent: they are, unless tiles are unequal and ``long``. Of
        ragged sequences, and where they draw tickets, they always are."""
        at_once, group, lacking = cutlass.min(blocks, self.count()), self.group, Int32(0)
        if cutlass.const_expr(self.sequences is not None or self.tickets is not None):
            return self.in_small_groups(blocks), at_once
        if cutlass.const_expr(self.long_first):
            small = self.in_small_groups(blocks)
            if long:
                at_once, group, lacking = self.count(), small.group, small.lacking
        return replace(self, group=group, lacking=lacking), at_once

    @cute.jit
    def even_blocks(self, blocks: Int32, steps: Int32):
        """How many of ``blocks`` take equal tiles of so many ``steps`` in rounds: where these are many no more than as many
        rounds take, since those that idle in the last round draw power in the others."""
        if steps >= LONG_WALK:
            blocks = cute.ceil_div(self.count(), cute.ceil_div(self.count(), blocks))
        return blocks

    @staticmethod
    def without_some(blocks: Int32, tiles: Int32, steps: Int32):
        """How many of ``blocks`` take so many key ``tiles`` of so many hundredths of a step, if the rest leave their place to
        a kernel that finishes query tiles meanwhile: as many as keep it as long at work, unless a few tiles would come in more
        rounds then. What a key tile takes besides makes up for steps where these are fewer than three."""
        spared = blocks * FINISHED_IN // (FINISHED_IN + cutlass.max(steps, 300)) * Int32(steps >= 200)
        rounds = cutlass.max(cute.ceil_div(tiles, blocks), 1)
        return cutlass.max(blocks - spared, cute.ceil_div(tiles, rounds + rounds // 8))

    def count(self):
        return self.m_blocks * self.heads * self.batch

    @cute.jit
    def position(self, round: Int32):
        """The tile of this block in a round; at or past ``count()`` there is none, then or later."""
        block = cute.arch.block_idx()[0]
        blocks = self.blocks()
        place = block
        if cutlass.const_expr(self.long_first):
            place = block if round % 2 == 0 else blocks - 1 - block
        position = round * blocks + place
        if cutlass.const_expr(self.at_once is not None):
            position = position if block < blocks else self.count()
        return position

    def blocks(self):
        """How many take tiles."""
        return cute.arch.grid_dim()[0] if self.at_once is None else self.at_once

    @cute.jit
    def each(self, body: cutlass.Constexpr, state):
        """``state = body(state, work)`` for every tile of a persistent block; returns the last state. (Of ragged sequences,
        with lists, and in the backward pass another warp finds them: ``mainloop/work_queue.py``.)"""
        turn = Int32(0)
        position = self.position(turn)
        while position < self.count():
            state = body(state, self.work(position))
            turn += 1
            position = self.position(turn)
        return state

    @cute.jit
    def one(self, body: cutlass.Constexpr):
        """``body(work)`` for the tile of a block that has one."""
        work = self.mine()
        if cutlass.const_expr(work.exists is None):
            body(work)
        else:
            if work.exists:
                body(work)

    @cute.jit
    def work(self, position: Int32) -> Work:
        """The tile at a position."""
        if cutlass.const_expr(self.sequences is not None):
            return self._ragged(position)
        block, head, batch = self._coordinates(position)
        if cutlass.const_expr(self.in_turn is not None):
            block = self.in_turn[batch, head, self.m_blocks - 1 - block]
        elif cutlass.const_expr((self.of_k or self.in_key_order) and self.long_first):
            block = self.m_blocks - 1 - block
        from_last = None
        if cutlass.const_expr(self.both_ways):
            from_last = Int32(batch * self.heads + head >= self.heads * self.batch - self.group)
            block = block if from_last != 0 else self.m_blocks - 1 - block
        span = Span(batch)
        return Work(block, head, self._head_kv(head), span, span, from_last=from_last)

    @cute.jit
    def _ragged(self, position: Int32) -> Work:
        """The same of ragged sequences: those before this one have so many slots, and within it tiles are taken as in a
        rectangle of one sequence."""
        i, begin, end = self._side().at(position // self.heads, self.sequences.count, self.tile)
        block, head, q, k = self._within(i, end - begin, position - begin * self.heads)
        capacity = k.capacity if cutlass.const_expr(self.of_k) else q.capacity
        return Work(block, head, self._head_kv(head), q, k, block * self.tile < capacity, i)

    @cute.jit
    def seek(self, position: Int32, first: Int32, before: Int32, unused: cutlass.Constexpr[bool] = False):
        """A whole warp: the tile at a position, of ragged ones if only those count that have rows in use, or, ``unused``, only
        the others: ``(work, first, before)``, the last two to go on from with a later position (:meth:`Sequences.seek`)."""
        if cutlass.const_expr(self.sequences is None):
            exists = position < self.count()
            work = self.work(cutlass.min(position, self.count() - 1))
            return replace(work, exists=exists), first, before
        side, wanted, kind = self._side(), position // self.heads, int(unused)
        exists, i, begin, first, before = self.sequences.seek(wanted, first, before, (side, self.tile, kind))
        held = side.tiles(i, self.sequences.count, self.tile)
        # Wrong bounds may count more tiles than there can be, and past 32 bits.
        exists = exists & (position < self.count()) & (begin <= wanted) & (wanted - begin < held[kind])
        block, head, q, k = self._within(i, cutlass.max(held[kind], 1), position - begin * self.heads)
        if cutlass.const_expr(unused):
            block += held[0]
        return Work(block, head, self._head_kv(head), q, k, exists, i), first, before

    @cute.jit
    def _within(self, i: Int32, m_blocks: Int32, position: Int32):
        """``(block, head, spans of queries and keys)`` of a tile of sequence ``i``, taken as if there were no other."""
        alone = replace(self, m_blocks=m_blocks, batch=Int32(1), sequences=None)
        if cutlass.const_expr(self.long_first and self.small is not None):
            alone = alone.in_small_groups(self.small)
        block, head, _ = alone._coordinates(position)
        if cutlass.const_expr((self.of_k or self.in_key_order) and self.long_first):
            block = m_blocks - 1 - block
        return block, head, *self.sequences.spans(i)

    def _side(self):
        """The side of ragged sequences whose tiles these are."""
        return self.sequences.k if self.of_k else self.sequences.q

    def _head_kv(self, head):
        if self.by is not None:
            return Int32(head // self.by[2])
        return head if self.of_k else head // self.heads_per_kv

    @cute.jit
    def _coordinates(self, position: Int32):
        """``(block, head, batch)`` of a tile."""
        if cutlass.const_expr(self.by is not None):
            rest, block = divmod(position, self.by[0])
            batch, head = divmod(rest, self.by[1])
            return Int32(block), Int32(head), Int32(batch)  # a user's function may take them, for which they need a type
        slices = self.heads * self.batch
        if cutlass.const_expr(self.long_first):
            first, members, position = self._group(position, slices)
            block = self.m_blocks - 1 - position // members
            rest = first + position % members
        else:
            block = position % self.m_blocks
            rest = position // self.m_blocks
        return block, rest % self.heads, rest // self.heads

    def _group(self, position, slices):
        """A tile's group: ``(first (head, batch) pair, number of pairs, the tile's position in it)``."""
        group_tiles = self.group * self.m_blocks
        if cutlass.const_expr(self.lacking is None):  # simpler, and cp_async has no registers to spare
            first = position // group_tiles * self.group
            return first, cutlass.min(self.group, slices - first), position % group_tiles
        begin = (position + self.lacking * self.m_blocks) // group_tiles * self.group - self.lacking
        first = cutlass.max(begin, 0)
        return first, cutlass.min(begin + self.group, slices) - first, position - first * self.m_blocks

    def mine(self) -> Work:
        """This block's, where each has one tile. The first keys come first: with a right edge more queries see them than later
        ones, and where dQ is added in a fixed order a tile must come after those that it waits for."""
        return self.work(cute.arch.block_idx()[0] if self.ticket is None else self.ticket)
