"""What a call costs on paper, by each method: FLOPs, bytes, seconds of a forward pass. ``method="auto"`` chooses by it.

A rank of the ring computes in step t and receives for step t + 1 meanwhile, so a step takes the longer of the two, and the
ring as long as its slowest rank. Ulysses sends q, k, v and the output before and after it computes: nothing hides that.
"""

from __future__ import annotations

from dataclasses import dataclass

from cute_attn.distributed.schedule import Shards, pieces, spanned
from cute_attn.distributed.ulysses import copies
from cute_attn.problem import Call

HOST_RANKS = 8  # that NVLink joins; more are joined by a network


@dataclass(frozen=True)
class Card:
    """What a card does a second: FLOPs of attention, and bytes that it sends while it receives as many."""

    flops: float
    link: float


def card_of(ranks: int) -> Card:
    """A Hopper among so many: 16-bit attention at long lengths; NVLink in a host, a network card of 400 Gb/s each beyond it."""
    return Card(600e12, 300e9 if ranks <= HOST_RANKS else 40e9)


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


def of_ring(q: Shards, k: Shards, call: Call, band: tuple, item_bytes: int, card: Card) -> Costs:
    """``call`` has the heads and head dims of a rank. Of many ranks the first, the middle and the last are looked at."""
    columns = call.batch * (call.head_dim + call.head_dim_v)
    found = []
    for rank in sorted({0, q.ranks // 2, q.ranks - 1}):
        steps = [pieces(q, k, rank, (rank - step) % q.ranks, *band) for step in range(q.ranks)]
        flops = [2.0 * columns * call.heads * sum(piece.scores for piece in parts) for parts in steps]
        received = [float(columns * call.heads_kv * item_bytes * len(spanned(parts))) for parts in steps[1:]]
        computing = [x / card.flops for x in flops]
        seconds = sum(map(max, computing, [*(x / card.link for x in received), 0.0]))
        found.append(Costs("ring", sum(flops), sum(received), seconds, seconds - sum(computing)))
    return max(found, key=lambda costs: costs.seconds)


def of_ulysses(q: Shards, k: Shards, call: Call, band: tuple, item_bytes: int, card: Card) -> Costs:
    """``call`` has all heads."""
    columns, ranks = call.batch * (call.head_dim + call.head_dim_v), q.ranks
    whole = pieces(Shards(q.seqlen, 1, "contiguous"), Shards(k.seqlen, 1, "contiguous"), 0, 0, *band)
    flops = 2.0 * columns * call.heads * sum(piece.scores for piece in whole) / ranks
    rows = q.rows * call.heads + k.rows * call.heads_kv * copies(call.heads_kv, ranks)
    received = columns * item_bytes * rows * (ranks - 1) / ranks
    waits = received / card.link
    return Costs("ulysses", flops, received, flops / card.flops + waits, waits)
