"""Ranks that were called with different arguments would wait for one another: before they compute, they compare."""

from __future__ import annotations

import os
from collections import Counter
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from cute_attn.distributed.ring import Members, backends_of, carries
from cute_attn.lengths import CHECK

MESSAGE_BYTES = 1024
AT_MOST = 4096  # calls that are remembered: packed sequences are others in each step of a training
REFUSED = "refused"
_agreed: WeakKeyDictionary = WeakKeyDictionary()  # of a group: the calls that all its ranks have been seen to make alike


def agree(members: Members, call: dict[str, object], device: torch.device) -> None:
    """Compare a call with the other ranks', once for each that is new here, or each time with ``CUTE_ATTN_CHECK=1``: one small
    gather, whose result is read back.

    Raises ``ValueError``, on all ranks, which names those that differ, and in what; ``RuntimeError`` where one refused its own.
    """
    text = "\n".join(f"{name}\t{value}" for name, value in call.items())
    if members.size == 1 or (text in _agreed.get(members.group, ()) and os.environ.get(CHECK) != "1"):
        return
    texts = _gathered(members, text, device)
    fields = [dict(line.split("\t", 1) for line in other.split("\n") if "\t" in line) for other in texts]
    for rank, of_rank in enumerate(fields):
        if REFUSED in of_rank:
            raise RuntimeError(f"rank {rank} of the group refused its call of attention: {of_rank[REFUSED]}")
    usual = Counter(texts).most_common(1)[0][0]
    if any(other != usual for other in texts):
        expected = fields[texts.index(usual)]
        differ = [
            f"rank {rank} has {name} = {value} where rank {texts.index(usual)} has {expected.get(name)}"
            for rank, of_rank in enumerate(fields)
            for name, value in of_rank.items()
            if value != expected.get(name)
        ]
        raise ValueError(
            f"the ranks of a group call attention differently: {'; '.join(differ)}; the same shapes and rules are needed on "
            f"all: try shard(), which gives each rank equally many rows"
        )
    agreed = _agreed.setdefault(members.group, set())
    if len(agreed) == AT_MOST:
        agreed.clear()  # on all ranks, since all have seen the same ones
    agreed.add(text)


def refuse(members: Members, error: Exception, device: torch.device) -> None:
    """Tell the others, where they are about to compare their first call, that this rank refuses its own."""
    if members.size > 1 and members.group not in _agreed:
        _gathered(members, f"{REFUSED}\t{error}", device)


def _gathered(members: Members, text: str, device: torch.device) -> list[str]:
    message = bytearray(text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0"))
    by = backends_of(members.group)  # the tensors' own, if there is one: NCCL connects all ranks in its first collective
    there = device if device.type in by and carries(members.group, device) else "cpu" if "cpu" in by else next(iter(by))
    mine = torch.frombuffer(message, dtype=torch.uint8).to(there)
    gathered = [torch.empty_like(mine) for _ in range(members.size)]
    dist.all_gather(gathered, mine, group=members.group)
    return [bytes(x.tolist()).rstrip(b"\0").decode(errors="replace") for x in gathered]
