"""From a sequence to this rank's rows of it, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cute_attn.arguments import check_tensor, choice, device_of, integer, shown
from cute_attn.distributed.ring import ALONE, Members, carries
from cute_attn.distributed.schedule import ORDERS, Shards, padded


class Places(NamedTuple):
    """Who shares a sequence: the ranks of the ring, and, of a mesh of two dimensions, those that share each shard of it once
    more and exchange it for heads."""

    ring: Members
    heads: Members = ALONE

    def shards(self, seqlen: int, order: str) -> Shards:
        """Of the ring, whose shards ``heads`` split."""
        return Shards(seqlen, self.ring.size, order, self.heads.size)

    def rows(self, seqlen: int, order: str) -> int:
        """Rows of a rank, padding included."""
        return self.shards(seqlen, order).rows // self.heads.size

    def spans(self, seqlen: int, order: str) -> list[range]:
        """The positions of this rank's rows, padding included, in pieces."""
        shards, rows = self.shards(seqlen, order), self.rows(seqlen, order)
        chunk, found = shards.chunk, []
        for i, at in enumerate(shards.positions(self.ring.rank)):
            first = self.heads.rank * rows - i * chunk  # of its rows in this chunk
            found.append(range(at, at + chunk)[max(first, 0) : max(first + rows, 0)])
        return [span for span in found if span]


def places_of(group: Any, mesh: Any) -> Places:
    """The ranks that a process group, a DeviceMesh of one or two dimensions, or, without both, the default group, has."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "torch.distributed has no process group; one is needed: try torch.distributed.init_process_group() in each of the "
            "processes that torchrun starts"
        )
    if group is not None and mesh is not None:
        raise TypeError("group and mesh are given; one of them is needed: leave the other out")
    if mesh is not None:
        if not isinstance(mesh, dist.DeviceMesh):
            raise TypeError(f"mesh is {shown(mesh)}; a DeviceMesh is needed: try torch.distributed.init_device_mesh")
        if mesh.ndim not in (1, 2):
            raise ValueError(
                f"mesh has {mesh.ndim} dimensions; one is needed, or two (the ring's, and that of heads): try mesh[name], or "
                f"mesh[ring, heads], of its names"
            )
        return Places(*(_members(mesh.get_group(dim)) for dim in range(mesh.ndim)))
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is {shown(group)}; a ProcessGroup with this rank is needed: try torch.distributed.new_group")
    return Places(_members(dist.group.WORLD if group is None else group))


def _members(group) -> Members:
    return Members(group, dist.get_rank(group), dist.get_world_size(group))


def length_of(name: str, seqlen: object) -> int:
    """A sequence's length, without padding."""
    seqlen = integer(name, seqlen, "the length of the whole sequence without padding")
    if seqlen < 0:
        raise ValueError(f"{name} is {seqlen}; an int ≥ 0 is needed, the length of the whole sequence without padding")
    return seqlen


def _dimension(x: torch.Tensor, dim: object) -> int:
    check_tensor("x", x, "a torch.Tensor is needed: try torch.as_tensor(x)")
    dim = integer("dim", dim, "the dimension of the sequence")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim is {dim} and x has shape {tuple(x.shape)}; one of its {x.dim()} dimensions is needed: try dim=1")
    return dim % x.dim()


def shard(x: torch.Tensor, *, group=None, mesh=None, dim: int = 1, order: str = "zigzag") -> torch.Tensor:
    """This rank's rows of ``x``, which every rank has whole: ``(…, seqlen, …)`` becomes ``(…, rows, …)``, a copy.

    Args:
        x: any tensor, the same on all ranks: embeddings, token ids, labels.
        group: the process group whose ranks share the sequence; ``None`` is the default one.
        mesh: a ``DeviceMesh`` in the place of a group: of one dimension, or of two, of which the first is the ring's, and the
            second exchanges the sequence for heads.
        dim: the dimension of the sequence.
        order: ``"zigzag"``: rank r of n holds the chunks r and 2n − 1 − r of 2n, which balances causal attention; or
            ``"contiguous"``: the chunk r of n.

    All ranks get equally many rows. Where the length doesn't divide, the last ones are zeros, which attention leaves out when
    it is told the length (``seqlen``). Gradients flow to the rows that this rank has.

    Raises:
        TypeError, ValueError: arguments of a wrong kind, or that don't fit; no process group.
    """
    places, order, dim = places_of(group, mesh), choice("order", order, ORDERS), _dimension(x, dim)
    seqlen = x.shape[dim]
    there = [range(min(span.start, seqlen), min(span.stop, seqlen)) for span in places.spans(seqlen, order)]
    rows = [x.narrow(dim, span.start, len(span)) for span in there]
    return padded(torch.cat(rows, dim) if rows else x.narrow(dim, 0, 0), dim, places.rows(seqlen, order))


def positions(seqlen: int, *, group=None, mesh=None, order: str = "zigzag", device=None) -> torch.Tensor:
    """The positions in a sequence of this rank's rows, ``(rows,)``, int64: those of padding are ``seqlen`` and more.

    Arguments and errors are those of :func:`shard`.
    """
    device = device_of(device)
    places, order, seqlen = places_of(group, mesh), choice("order", order, ORDERS), length_of("seqlen", seqlen)
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=device)] + [
        torch.arange(span.start, span.stop, device=device) for span in places.spans(seqlen, order)
    ])


def unshard(x: torch.Tensor, seqlen: int, *, group=None, mesh=None, dim: int = 1, order: str = "zigzag") -> torch.Tensor:
    """The whole sequence ``(…, seqlen, …)``, on every rank, from the rows ``(…, rows, …)`` of each: :func:`shard` undone.

    A rank's rows get their gradient from the whole sequence's on the same rank: what follows is meant to be the same on all.
    Arguments and errors are those of :func:`shard`.
    """
    places, order = places_of(group, mesh), choice("order", order, ORDERS)
    seqlen, dim = length_of("seqlen", seqlen), _dimension(x, dim)
    rows = places.rows(seqlen, order)
    if x.shape[dim] != rows:
        raise ValueError(
            f"x has {x.shape[dim]} rows in dimension {dim}; of a sequence of {seqlen} in {order} order each rank has {rows}: "
            f"check seqlen, dim and order"
        )
    if places.heads.size > 1:
        shards = places.shards(seqlen, order)
        x = Shards(shards.rows, places.heads.size, "contiguous").together(_gathered(x, places.heads, dim), dim)
    return places.shards(seqlen, order).together(_gathered(x, places.ring, dim), dim)


def _gathered(x: torch.Tensor, members: Members, dim: int) -> torch.Tensor:
    """``(…, ranks, rows, …)`` of everybody's ``(…, rows, …)``; a gradient flows to this rank's own."""
    own = x.detach()
    own = (own if carries(members.group, x.device) else own.cpu()).contiguous()
    gathered = [torch.empty_like(own) for _ in range(members.size)]
    dist.all_gather(gathered, own, group=members.group)
    return torch.stack([x if rank == members.rank else part.to(x.device) for rank, part in enumerate(gathered)], dim)
