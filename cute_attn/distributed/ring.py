"""Attention on a ring of ranks: keys and values travel, partial results are merged by their log-sum-exp.

Each rank keeps its queries. In step t it gets the keys and values that it needs of the rank t before it, straight from there,
while the step before computes; so a shard is sent to those that see some of it, and no more of it than they see. A step is a
few calls of the backend's own passes (``schedule.py`` says which). With partial results O_i and log-sum-exps L_i of a row,

    L = ln Σ_i exp L_i,      O = Σ_i exp(L_i − L) · O_i,

added up in float32 and rounded once. The backward pass has the keys sent anew, and each step's dK and dV go back to where
these came from. Since P = exp(S − L) and delta = Σ_c dO_c · O_c − dL are of the whole row, a piece's gradients are its part of
the sums: it takes the merged output and log-sum-exp, and nothing has to be merged.

Between the passes a rank keeps its shards of q, k, v, the output, and a number of each row. Beside these a step has what came
for it and what comes for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cute_attn import autograd
from cute_attn.distributed.schedule import Piece, Shards, pieces, spanned
from cute_attn.lengths import Lengths
from cute_attn.problem import Call
from cute_attn.rules import LN_2, score_scales


class Members(NamedTuple):
    """Some ranks, and which of them this one is; ``group`` is None where it is alone."""

    group: Any
    rank: int
    size: int


ALONE = Members(None, 0, 1)


class LseUnit(NamedTuple):
    """How a backend keeps a row's log-sum-exp for its backward pass: ``to_log2`` times it is in base 2, and ``unseen`` is what
    a row has that sees no key. Merged in this unit, it is exact where one part outweighs all others (``softmax.py``)."""

    to_log2: float
    unseen: float

    @staticmethod
    def of(call: Call, on_reference: bool) -> LseUnit:
        return LseUnit(1.0, -torch.inf) if on_reference else LseUnit(score_scales(call.scale, call.softcap)[0], torch.inf)


class Exchange:
    """Tensors on their way between ranks, each way in the order of the arguments: ``sends`` are (tensor, to), ``receives``
    (shape, from), of ``like``'s dtype and device. Of two under way at once the tags differ, for gloo to tell them apart. With
    NCCL they travel on its own stream, as soon as what was asked of the current one before is done."""

    def __init__(self, group, like: torch.Tensor, sends: Iterable[tuple], receives: Iterable[tuple], first_tag: int = 0):
        device = like.device if carries(group, like.device) else "cpu"
        self.device, self.sent = like.device, [(x.to(device).contiguous(), to) for x, to in sends]
        self.received = [(like.new_empty(shape, device=device), source) for shape, source in receives]
        operations = [
            dist.P2POp(function, x, group=group, group_peer=peer, tag=tag)
            for function, tensors in ((dist.isend, self.sent), (dist.irecv, self.received))
            for tag, (x, peer) in enumerate(tensors, start=first_tag)
            if x.numel()
        ]
        self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[torch.Tensor]:
        """What is received, once it is there; on a GPU the current stream waits, and not the host."""
        for work in self.works:
            work.wait()
        self.sent = []
        return [x.to(self.device) for x, _ in self.received]


def carries(group, device: torch.device) -> bool:
    """Whether a group's backend sends tensors from where they lie. Gloo doesn't send a GPU's: they go by way of the host."""
    backends = backends_of(group)
    if device.type not in backends:
        raise ValueError(
            f"the tensors lie on {device} and their group sends those on {', '.join(backends)}; one device is needed: try "
            f".to({next(iter(backends))!r}), or a group of another backend"
        )
    return device.type == "cpu" or backends[device.type] != "gloo"


def backends_of(group) -> dict[str, str]:
    """What sends a group's tensors, by their devices."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


class Merged:
    """Partial results of rows, as they come: the output in float32, the log-sum-exp in a backend's unit, −∞ for rows that have
    seen no key. What one part is all of is that part, bit for bit."""

    def __init__(self, merge: Callable, unit: LseUnit, shape: tuple[int, int, int, int], like: torch.Tensor):
        self.merge, self.unit = merge, unit
        self.shape, self.like = shape, like  # (batch, rows, heads, head_dim_v)
        self.exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.out: torch.Tensor | None = None
        self.lse: torch.Tensor | None = None

    def add(self, rows: range, out: torch.Tensor, lse: torch.Tensor) -> None:
        """``out`` (batch, rows, heads, head_dim_v) and ``lse`` (batch, heads, rows) of some more keys."""
        lse = lse.masked_fill(lse == self.unit.unseen, -torch.inf)
        whole, where = len(rows) == self.shape[1], slice(rows.start, rows.stop)
        if self.out is None and whole:
            self.out, self.lse = out, lse
            return
        so_far, so_far_lse = self._begun()
        if whole:
            self.out = self.merge(so_far, so_far_lse, out, lse, self.unit.to_log2)
        else:
            self.out = so_far.to(self.exact)
            self.merge(self.out[:, where], so_far_lse[:, :, where], out, lse, self.unit.to_log2)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)``, the output rounded to the inputs' dtype."""
        out, lse = self._begun()
        return out.to(self.like.dtype), lse

    def _begun(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.out is None or self.lse is None:
            batch, rows, heads, _ = self.shape
            self.out = self.like.new_zeros(self.shape, dtype=self.exact)
            self.lse = self.like.new_full((batch, heads, rows), -torch.inf, dtype=self.exact)
        return self.out, self.lse


class Sum:
    """A sum over parts of a tensor's rows, in float32. What one part is all of is that part as it is."""

    def __init__(self, shape: torch.Size, like: torch.Tensor):
        self.shape, self.like = shape, like
        self.total: torch.Tensor | None = None

    def add(self, rows: slice, x: torch.Tensor) -> None:
        if self.total is None and x.shape == self.shape:
            self.total = x
            return
        exact = torch.float64 if self.like.dtype == torch.float64 else torch.float32
        self.total = self.like.new_zeros(self.shape, dtype=exact) if self.total is None else self.total.to(exact)
        self.total[:, rows] += x

    def rounded(self) -> torch.Tensor:
        return self.like.new_zeros(self.shape) if self.total is None else self.total.to(self.like.dtype)


@dataclass(frozen=True)
class Ring:
    """What the ranks of a ring compute: ``q`` and ``k`` say which rows each has, ``call`` has heads, scale and softcap,
    ``band`` is ``(lo, hi)`` of the whole sequence, ``passes`` are a backend's, as ``autograd.Attention`` takes them, and so is
    :func:`merge`."""

    members: Members
    q: Shards
    k: Shards
    call: Call
    band: tuple[int | None, int | None]
    passes: tuple[Callable, Callable]
    merge: Callable
    unit: LseUnit
    packed: bool

    def pieces(self, of_q: int, of_k: int) -> tuple[Piece, ...]:
        """What a rank's queries see of a rank's keys."""
        return pieces(self.q, self.k, of_q, of_k, *self.band, joins=not self.packed)

    def needed(self, of_q: int, of_k: int) -> range:
        """Which of a rank's keys a rank's queries need."""
        return spanned(self.pieces(of_q, of_k))

    def forward(self, q, k, v, cu_seqlens) -> tuple:
        """``(out, lse)`` of this rank's queries, the log-sum-exp in the backend's unit, −∞ for a row that sees no key."""
        merged = Merged(self.merge, self.unit, (*q.shape[:3], v.shape[3]), q)
        for _, first, k_there, v_there, parts in self._steps(k, v):
            for piece in parts:
                call, keys = self._call(piece, cu_seqlens), _slice(piece.keys, first)
                inputs = self._unbatched(q[:, _slice(piece.rows)], k_there[:, keys], v_there[:, keys])
                out, _, lse = self.passes[0](*inputs, call)
                merged.add(piece.rows, *((out[None], lse[None]) if self.packed else (out, lse)))
        return merged.result()

    def gradients(self, q, k, v, out, lse, dout, dlse, needs: str, cu_seqlens):
        """``(dq, dk, dv)`` of this rank's shards, None for what ``needs`` does not name."""
        lse = lse.masked_fill(lse == -torch.inf, self.unit.unseen)
        inputs, names = {"q": q, "k": k, "v": v}, [name for name in "kv" if name in needs]
        sums = {name: Sum(inputs[name].shape, inputs[name]) for name in needs}
        before: Callable[[], None] | None = None
        for step, first, k_there, v_there, parts in self._steps(k, v):
            there = {"k": k_there, "v": v_there}
            of_keys = {name: Sum(there[name].shape, there[name]) for name in names} if step else sums
            for piece in parts:
                call, rows, keys = self._call(piece, cu_seqlens), _slice(piece.rows), _slice(piece.keys, first)
                of_row = lse[:, :, rows], dout[:, rows], None if dlse is None else dlse[:, :, rows]
                tensors = self._unbatched(q[:, rows], k_there[:, keys], v_there[:, keys], out[:, rows], *of_row)
                asked = *tensors, needs, call, self.passes[1]
                found = autograd.computed(None, *asked)
                for name, dx in zip("qkv", found, strict=True):
                    if dx is not None:
                        total, where = (sums, rows) if name == "q" else (of_keys, keys)
                        total[name].add(where, dx[None] if self.packed else dx)
            after = self._returned(step, sums, of_keys, names, parts, k) if step and names else None
            if before is not None:
                before()
            before = after
        if before is not None:
            before()
        return tuple(sums[name].rounded() if name in needs else None for name in "qkv")

    def _steps(self, k, v) -> Iterator[tuple]:
        """``(step, first key, keys, values, pieces)``; while a step's are in use the next one's are on their way."""
        rank, size = self.members.rank, self.members.size
        first, there = 0, [k, v]
        for step in range(size):
            ahead = self._fetched(k, v, step + 1) if step + 1 < size else None
            yield step, first, *there, self.pieces(rank, (rank - step) % size)
            if ahead is not None:
                first, there = self.needed(rank, (rank - step - 1) % size).start, ahead.wait()

    def _fetched(self, k, v, step: int) -> Exchange:
        """The transfer of a step: this rank's keys and values to the rank so far ahead, and those of the rank as far behind."""
        (group, rank, size), pair = self.members, (k, v)
        to, source = (rank + step) % size, (rank - step) % size
        sent, received = _slice(self.needed(to, rank)), len(self.needed(rank, source))
        shapes = [(x.shape[0], received, *x.shape[2:]) for x in pair]
        return Exchange(group, k, [(x[:, sent], to) for x in pair], [(shape, source) for shape in shapes])

    def _returned(self, step: int, sums: dict, of_keys: dict, names: list[str], parts: tuple, k) -> Callable[[], None]:
        """Send the gradients of a step's keys back. Calling the result adds those that come for this rank's own."""
        group, rank, size = self.members
        to, source = (rank - step) % size, (rank + step) % size
        rows = self.needed(source, rank)
        sent = [(of_keys[name].rounded(), to) for name in names] if parts else []
        shapes = [(sums[name].shape[0], len(rows), *sums[name].shape[2:]) for name in names] if rows else []
        exchange = Exchange(group, k, sent, [(shape, source) for shape in shapes], first_tag=len("kv"))

        def add() -> None:
            for name, x in zip(names if rows else (), exchange.wait(), strict=True):
                sums[name].add(_slice(rows), x)

        return add

    def _call(self, piece: Piece, cu_seqlens) -> Call:
        """The call that a piece is by itself. Of packed sequences it has those that begin, end or continue in its chunks."""
        left, right = piece.edges
        sizes = len(piece.rows), len(piece.keys)
        lengths = None
        if self.packed:
            bounds = [(cu_seqlens - at).clamp(0, rows) for at, rows in zip(piece.positions, sizes, strict=True)]
            lengths = Lengths(len(cu_seqlens) - 1, (*bounds, None, None))
        return replace(self.call, seqlen_q=sizes[0], seqlen_k=sizes[1], left=left, right=right, lengths=lengths)

    def _unbatched(self, *tensors) -> Any:
        return [x if x is None else x[0] for x in tensors] if self.packed else tensors


def _slice(rows: range, first: int = 0) -> slice:
    return slice(rows.start - first, rows.stop - first)


class RingAttention(torch.autograd.Function):
    """``(out, lse)`` of a rank's shards, both of them differentiable; ``cu_seqlens`` of packed sequences, or None."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, ring: Ring):  # type: ignore[override]
        out, lse = ring.forward(q, k, v, cu_seqlens)
        autograd.keep(ctx, q, k, v, out, lse, cu_seqlens)
        ctx.ring = ring
        return out, lse * (ring.unit.to_log2 * LN_2)

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[override]
        arguments = autograd.arguments_of_gradients(ctx, dout, dlse)
        if arguments is None:
            return (None,) * 5
        return *_RingGradients.apply(*arguments, ctx.ring), None, None


class _RingGradients(torch.autograd.Function):
    """As ``autograd._Gradients`` is: differentiating once more says what to do instead."""

    @staticmethod
    def forward(ctx, q, k, v, out, lse, dout, dlse, needs, cu_seqlens, ring: Ring):  # type: ignore[override]
        return ring.gradients(q, k, v, out, lse, dout, dlse, needs, cu_seqlens)

    backward = staticmethod(autograd.refuse_double_backward)
