"""Which block computes which tile, and in what order: of queries, or, in the backward pass, of keys.

A block takes one tile a round. Where the grid is as many blocks as the GPU holds at once (``tma_wgmma``), they walk over
all tiles of the call in rounds (a persistent loop); a mechanism that launches a block for each tile has one round. Producer and
consumers of a block compute the same sequence by themselves, so nothing is communicated and nothing is allocated.

- Without a right edge all tiles cost the same: the tiles of a head come one after another, so that blocks which run at
  the same time read the same keys and values from the L2 cache.
- With one (causal) the tiles with many keys come first: long ones first leave only short ones for the uneven end
  (longest-processing-time-first, Graham 1969). Blocks take the rounds in alternating direction, like a snake, so that
  whoever got the longest tile of one round gets the shortest of the next. Heads are taken in groups of a quarter as many as
  there are blocks: about four blocks then read the same keys at the same time, which the L2 cache serves with one read
  of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Int32, cute

BLOCKS_PER_HEAD = 4  # that read a head's keys at the same time


@dataclass(frozen=True)
class Tiles:
    """All query tiles of a call, or, for the backward pass, all key tiles. ``long_first`` is compile-time; the counts are
    run-time."""

    m_blocks: Int32
    heads: Int32
    batch: Int32
    heads_per_kv: Int32  # query heads that share a key head
    group: Int32  # (head, batch) pairs that are taken together where long_first
    long_first: cutlass.Constexpr[bool]

    @staticmethod
    def of(q_shape, heads_kv, tile_m: int, blocks: Int32, long_first: bool) -> Tiles:
        """The tiles of queries ``(seqlen_q, head_dim, heads, batch)`` for a GPU that holds ``blocks`` blocks at once."""
        seqlen_q, _, heads, batch = q_shape
        group = cutlass.max(blocks // BLOCKS_PER_HEAD, 1)
        return Tiles(cute.ceil_div(seqlen_q, tile_m), heads, batch, heads // heads_kv, group, long_first)

    @staticmethod
    def of_keys(k_shape, heads_per_kv, tile_n: int, blocks: Int32, long_first: bool) -> Tiles:
        """The tiles of keys ``(seqlen_k, head_dim, heads_kv, batch)``; a tile's ``head`` is a key head, and whoever takes
        it walks over its ``heads_per_kv`` query heads."""
        return replace(Tiles.of(k_shape, k_shape[2], tile_n, blocks, long_first), heads_per_kv=heads_per_kv)

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
            group_tiles = self.group * self.m_blocks
            first = position // group_tiles * self.group
            members = cutlass.min(self.group, slices - first)
            position = position % group_tiles
            m_block = self.m_blocks - 1 - position // members
            rest = first + position % members
        else:
            m_block = position % self.m_blocks
            rest = position // self.m_blocks
        head = rest % self.heads
        return m_block, head, head // self.heads_per_kv, rest // self.heads

    def key_tile(self, position: Int32):
        """``(n_block, head_kv, batch)`` of a key tile. The first keys come first: with a right edge more queries see them
        than later ones, and where dQ is added in a fixed order a tile must come after those that it waits for."""
        block, head_kv, _, batch = self.coordinates(position)
        return self.m_blocks - 1 - block if self.long_first else block, head_kv, batch
