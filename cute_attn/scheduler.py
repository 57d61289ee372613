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
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Int32, cute

BLOCKS_PER_HEAD = 4  # that run at the same time, where groups are not small
LEAST_BLOCKS_PER_HEAD = 8  # that run at the same time, where groups are small


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

    @staticmethod
    def of(q_shape, heads_kv, tile_m: int, blocks: Int32, long_first: bool) -> Tiles:
        """The tiles of queries ``(seqlen_q, head_dim, heads, batch)`` for a GPU that holds ``blocks`` blocks at once."""
        seqlen_q, _, heads, batch = q_shape
        group = cutlass.max(blocks // BLOCKS_PER_HEAD, 1)
        return Tiles(cute.ceil_div(seqlen_q, tile_m), heads, batch, heads // heads_kv, group, None, long_first)

    @staticmethod
    def of_keys(k_shape, heads_per_kv, tile_n: int, blocks: Int32, long_first: bool) -> Tiles:
        """The tiles of keys ``(seqlen_k, head_dim, heads_kv, batch)``; a tile's ``head`` is a key head, and whoever takes
        it walks over its ``heads_per_kv`` query heads."""
        return replace(Tiles.of(k_shape, k_shape[2], tile_n, blocks, long_first), heads_per_kv=heads_per_kv)

    def in_small_groups(self, blocks: Int32) -> Tiles:
        """The same tiles. Of a head's, the mean is half as long as the longest."""
        group = cutlass.min(cute.ceil_div(2 * blocks, self.m_blocks), cutlass.max(blocks // LEAST_BLOCKS_PER_HEAD, 1))
        return replace(self, group=group, lacking=(group - self.heads * self.batch % group) % group)

    @cute.jit
    def launched(self, blocks: Int32, long):
        """``(tiles, blocks)`` to launch where blocks can be persistent: they are, unless tiles are unequal and ``long``."""
        at_once, group, lacking = cutlass.min(blocks, self.count()), self.group, Int32(0)
        if cutlass.const_expr(self.long_first):
            small = self.in_small_groups(blocks)
            if long:
                at_once, group, lacking = self.count(), small.group, small.lacking
        return replace(self, group=group, lacking=lacking), at_once

    def count(self):
        return self.m_blocks * self.heads * self.batch

    @cute.jit
    def position(self, round: Int32):
        """The tile of this block in a round; at or past ``count()`` there is none, then or later."""
        block = cute.arch.block_idx()[0]
        blocks = cute.arch.grid_dim()[0]
        place = block
        if cutlass.const_expr(self.long_first):
            place = block if round % 2 == 0 else blocks - 1 - block
        return round * blocks + place

    @cute.jit
    def coordinates(self, position: Int32):
        """``(m_block, head, head_kv, batch)`` of a tile."""
        slices = self.heads * self.batch
        if cutlass.const_expr(self.long_first):
            first, members, position = self._group(position, slices)
            m_block = self.m_blocks - 1 - position // members
            rest = first + position % members
        else:
            m_block = position % self.m_blocks
            rest = position // self.m_blocks
        head = rest % self.heads
        return m_block, head, head // self.heads_per_kv, rest // self.heads

    def _group(self, position, slices):
        """A tile's group: ``(first (head, batch) pair, number of pairs, the tile's position in it)``."""
        group_tiles = self.group * self.m_blocks
        if cutlass.const_expr(self.lacking is None):  # simpler, and cp_async has no registers to spare
            first = position // group_tiles * self.group
            return first, cutlass.min(self.group, slices - first), position % group_tiles
        begin = (position + self.lacking * self.m_blocks) // group_tiles * self.group - self.lacking
        first = cutlass.max(begin, 0)
        return first, cutlass.min(begin + self.group, slices) - first, position - first * self.m_blocks

    def query_tile(self):
        """``(m_block, head, head_kv, batch)`` of this block, where each has one tile."""
        return self.coordinates(cute.arch.block_idx()[0] if self.ticket is None else self.ticket)

    def key_tile(self):
        """``(n_block, head_kv, batch)`` of this block, where each has one tile. The first keys come first: with a right edge
        more queries see them than later ones, and where dQ is added in a fixed order a tile must come after those that it
        waits for."""
        block, head_kv, _, batch = self.query_tile()
        return self.m_blocks - 1 - block if self.long_first else block, head_kv, batch
