"""What a call costs on paper, by each method: FLOPs, bytes, seconds of a forward pass. ``method="auto"`` chooses by it.

A rank of the ring computes in step t and receives for step t + 1 meanwhile, so a step takes the longer of the two, and the
ring as long as its slowest rank. Keys travel, or queries, with what comes back. Ulysses sends q, k, v and the output before and
after it computes: nothing hides that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cute_attn.distributed.schedule import Packed, Shards, pieces, spanned
from cute_attn.distributed.ulysses import copies

HOST_RANKS = 8  # that NVLink joins; more are joined by a network


@dataclass(frozen=True)
class Card:
    """What a card does a second: FLOPs of attention, and bytes that it sends while it receives as many."""

    flops: float
    link: float


def card_of(ranks: int) -> Card:
    """A Hopper among so many: 16-bit attention at long lengths; NVLink in a host, a network card of 400 Gb/s each beyond it."""
    return Card(600e12, 300e9 if ranks <= HOST_RANKS else 40e9)


class Sizes(NamedTuple):
    """Of a rank's tensors; ``head_dims`` is that of q and k with that of v."""

    batch: int
    heads: int
    heads_kv: int
    head_dims: int
    item_bytes: int


@dataclass(frozen=True)
class Costs:
    """Of the slowest rank: FLOPs, bytes that it receives, seconds in all, and those of them in which it only waits."""

    method: str
    flops: float
    received_bytes: float
    seconds: float
    waits: float

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.flops / 1e12:.4g} TFLOP and {self.received_bytes / 1e6:.4g} MB received by the slowest "
            f"rank, {self.seconds * 1e3:.4g} ms, {self.waits * 1e3:.4g} ms of it without computing"
        )


def queries_travel(q: Shards, k: Shards, sizes: Sizes) -> bool:
    """Whether a ring has less to send of queries, outputs and log-sum-exps than of keys and values. In both passes it is three
    times as much of either: there twice, and their gradients."""
    return q.rows * _of_query(sizes) < k.rows * sizes.heads_kv * sizes.head_dims * sizes.item_bytes


def _of_query(sizes: Sizes) -> int:
    """Bytes of a row of queries and of its results."""
    return sizes.heads * (sizes.head_dims * sizes.item_bytes + 4)


@lru_cache(maxsize=1024)
def of_ring(q: Shards, k: Shards, band: tuple, packed: Packed | None, sizes: Sizes, card: Card) -> Costs:
    """Of many ranks the first, the middle and the last are looked at."""
    columns, found, turned = sizes.batch * sizes.head_dims, [], queries_travel(q, k, sizes)
    side, of_row = ("rows", _of_query(sizes)) if turned else ("keys", sizes.heads_kv * sizes.head_dims * sizes.item_bytes)
    for rank in sorted({0, q.ranks // 2, q.ranks - 1}):
        others = [(rank - step) % q.ranks for step in range(q.ranks)]
        steps = [pieces(q, k, *((other, rank) if turned else (rank, other)), *band, packed) for other in others]
        flops = [2.0 * columns * sizes.heads * sum(piece.scores for piece in parts) for parts in steps]
        received = [float(sizes.batch * of_row * len(spanned(parts, side))) for parts in steps[1:]]
        computing = [x / card.flops for x in flops]
        seconds = sum(map(max, computing, [*(x / card.link for x in received), 0.0]))
        found.append(Costs("ring", sum(flops), sum(received), seconds, seconds - sum(computing)))
    return max(found, key=lambda costs: costs.seconds)


@lru_cache(maxsize=1024)
def of_ulysses(q: Shards, k: Shards, band: tuple, packed: Packed | None, sizes: Sizes, card: Card) -> Costs:
    """Key heads that several ranks need count as often."""
    columns, ranks = sizes.batch * sizes.head_dims, q.ranks
    whole = pieces(Shards(q.seqlen, 1, "contiguous"), Shards(k.seqlen, 1, "contiguous"), 0, 0, *band, packed)
    flops = 2.0 * columns * sizes.heads * sum(piece.scores for piece in whole) / ranks
    rows = q.rows * sizes.heads + k.rows * sizes.heads_kv * copies(sizes.heads_kv, ranks)
    received = columns * sizes.item_bytes * rows * (ranks - 1) / ranks
    waits = received / card.link
    return Costs("ulysses", flops, received, flops / card.flops + waits, waits)
