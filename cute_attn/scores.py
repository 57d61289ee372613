"""Scores to pass to attention as ``score=``, and how one is written: what becomes of a scaled score at two positions.

Positions are as in :mod:`cute_attn.masks`. Each works in torch's FlexAttention, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cute_attn.arguments import check_tensor, shown


def relative(table: torch.Tensor) -> Callable:
    """A bias by distance: ``table``, float ``(heads, 2 · farthest + 1)``, has that of the distance ``kv_idx − q_idx`` at
    ``farthest + distance``; what is farther has the farthest one's."""
    _check_table(table, 1, "(heads, 2 · farthest + 1)")
    farthest = table.shape[-1] // 2

    def score(score, batch, head, q_idx, kv_idx):
        return score + table[head, torch.clamp(kv_idx - q_idx, -farthest, farthest) + farthest]

    return score


def bucketed(table: torch.Tensor, farthest: int, both_sides: bool = True) -> Callable:
    """T5's bias (arXiv:1910.10683, §2.1): ``table``, float ``(heads, buckets)``. Half of a side's buckets are a distance each,
    the others grow up to ``farthest`` as logarithms do; with ``both_sides`` the second half is for keys after the query."""
    _check_table(table, 4 if both_sides else 2, "(heads, buckets)")
    buckets = table.shape[-1] // (2 if both_sides else 1)
    exact = buckets // 2
    if not farthest > exact:
        need = f"more than {exact}, the distances of a bucket each, is needed"
        raise ValueError(f"farthest is {farthest}; {need}: try {8 * exact}")

    def score(score, batch, head, q_idx, kv_idx):
        ahead = kv_idx - q_idx
        distance = torch.abs(ahead) if both_sides else torch.clamp(-ahead, min=0)
        steps = torch.log(torch.clamp(distance, min=1) / exact) * ((buckets - exact) / math.log(farthest / exact))
        large = (steps + 1e-4).int()  # where a bucket begins, a logarithm may be a rounding too small
        bucket = torch.where(distance < exact, distance, torch.clamp(exact + large, max=buckets - 1))
        return score + table[head, torch.where(ahead > 0, bucket + buckets, bucket) if both_sides else bucket]

    return score


def alibi(slopes: torch.Tensor) -> Callable:
    """ALiBi (arXiv:2108.12409) of queries and keys that begin at the same position; ``slopes``, float ``(heads,)``."""
    check_tensor("slopes", slopes, "a float tensor (heads,) is needed: try torch.tensor(slopes)")
    return lambda score, batch, head, q_idx, kv_idx: score - slopes[head] * torch.abs(q_idx - kv_idx)


def softcap(cap: float) -> Callable:
    """No score is larger than ``cap``, nor smaller than −cap."""
    return lambda score, batch, head, q_idx, kv_idx: cap * torch.tanh(score / cap)


def _check_table(table: torch.Tensor, least: int, need: str) -> None:
    check_tensor("table", table, f"a float tensor {need} is needed: try torch.tensor(table)")
    if table.dim() != 2 or table.shape[1] < least:
        raise ValueError(f"table is {shown(table)}; {need}, at least {least} for each head, is needed: check how it was made")
