"""Which block computes which query tile, and in what order.

A grid of as many blocks as the GPU holds at once walks over all tiles of the call (a persistent loop). Producer and
consumers of a block compute the same sequence by themselves, so nothing is communicated and nothing is allocated.

- Without a right edge all tiles cost the same: the tiles of a head come one after another, so that blocks which run at
  the same time read the same keys and values from the L2 cache.
- With one (causal) the tiles with many keys come first, and blocks take the rounds in alternating direction, like a
  snake: whoever got the longest tile of one round gets the shortest of the next. Long tiles first leaves only short ones
  for the uneven end (longest-processing-time-first, Graham 1969); the snake evens out what is left within the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, cute


@dataclass(frozen=True)
class Tiles:
    """All query tiles of a call. ``long_first`` is compile-time; the counts are run-time."""

    m_blocks: Int32
    heads: Int32
    batch: Int32
    heads_per_kv: Int32
    long_first: cutlass.Constexpr[bool]

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
        if cutlass.const_expr(self.long_first):
            slices = self.heads * self.batch
            m_block = self.m_blocks - 1 - position // slices
            rest = position % slices
        else:
            m_block = position % self.m_blocks
            rest = position // self.m_blocks
        head = rest % self.heads
        return m_block, head, head // self.heads_per_kv, rest // self.heads
