"""The sequence exchanged for heads: an all-to-all gives each rank whole sequences of some heads, another one gives the outputs
back (DeepSpeed-Ulysses, arXiv:2309.14509)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from cute_attn.distributed.ring import Members, carries
from cute_attn.distributed.schedule import Shards


def copies(heads_kv: int, ranks: int) -> int:
    """How many of each key head there must be so that all ranks have equally many: no more than ranks that need it."""
    return ranks // math.gcd(heads_kv, ranks)


def to_heads(x: torch.Tensor, members: Members, shards: Shards) -> torch.Tensor:
    """``(batch, rows, heads, …)`` of all heads as ``(batch, seqlen, heads / ranks, …)`` of all rows."""
    parts = x.unflatten(2, (members.size, -1)).movedim(2, 0)  # (ranks, batch, rows, heads / ranks, …)
    return shards.together(AllToAll.apply(parts, members.group).movedim(0, 1), 1)


def to_rows(x: torch.Tensor, members: Members, shards: Shards) -> torch.Tensor:
    """The other way round."""
    parts = shards.apart(x, 1).movedim(1, 0)  # (ranks, batch, rows, heads / ranks, …)
    return AllToAll.apply(parts, members.group).movedim(0, 2).flatten(2, 3)


class AllToAll(torch.autograd.Function):
    """Part i of x ``(ranks, …)`` goes to rank i, and what comes from rank i becomes part i. It is its own transpose."""

    @staticmethod
    def forward(ctx, x, group):  # type: ignore[override]
        ctx.group = group
        carrier = x.contiguous() if carries(group, x.device) else x.cpu().contiguous()
        received = torch.empty_like(carrier)
        dist.all_to_all_single(received, carrier, group=group)
        return received.to(x.device)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[override]
        return AllToAll.apply(dx, ctx.group), None
