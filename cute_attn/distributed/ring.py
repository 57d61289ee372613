"""Attention on a ring of ranks: keys and values travel, or queries do, and partial results are merged by their log-sum-exp.

In step t a rank computes with what it gets of the rank t before it, straight from there, while the step before computes; so a
shard is sent to those that see some of it, and no more of it than they see. A step is a few calls of the backend's own passes
(``schedule.py`` says which). With partial results O_i and log-sum-exps L_i of a row,

    L = ln Σ_i exp L_i,      O = Σ_i exp(L_i − L) · O_i,

added up in float32 and rounded once; the O_i come in the inputs' dtype, as the passes give them. The backward pass has all sent
anew. Since P = exp(S − L) and delta = Σ_c dO_c · O_c − dL are of the whole row, a piece's gradients are its part of the sums:
it takes the merged output and log-sum-exp, and nothing has to be merged.

**Keys travel**, each step's dK and dV go back to where these came from, and dQ is added up here. Or, where that is less to
send, **queries travel**: their partial results, and later dQ, go back, and dK and dV are added up here.

Between the passes a rank keeps its shards of q, k, v, the output, and a number of each row. Beside these a step has what came
for it and what comes for the next one: two shards of what travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cute_attn import autograd
from cute_attn.distributed.schedule import Packed, Piece, Shards, pieces, spanned
from cute_attn.lengths import Lengths
from cute_attn.problem import Call, exact_dtype
from cute_attn.rules import LN_2


class Members(NamedTuple):
    """Some ranks, and which of them this one is; ``group`` is None where it is alone."""

    group: Any
    rank: int
    size: int


ALONE = Members(None, 0, 1)


class Engine(NamedTuple):
    """Who computes: ``passes`` as ``autograd.Attention`` takes them, and ``merge``, which is ``reference.merge`` or does as it.

    It keeps a row's log-sum-exp for its backward pass in a unit of its own: ``to_log2`` times it is in base 2, and ``unseen``
    is what a row has that sees no key. Merged in this unit, it is exact where one part outweighs all others (``softmax.py``).
    """

    passes: tuple[Callable, Callable]
    merge: Callable
    to_log2: float
    unseen: float


class Exchange:
    """Tensors ``(batch, rows, …)`` on their way between ranks, each way in the order of the arguments: ``sends`` are (tensor,
    to), ``receives`` (tensor like it, rows, from). Of the two ways that are under way at once, there and ``back``, the tags
    differ, for gloo to tell them apart. With NCCL they travel on its own stream, as soon as what was asked of the current one
    before is done. A batch goes element by element, since each of these has its rows in one piece of memory."""

    def __init__(self, members: Members, sends: list[tuple], receives: list[tuple], back: bool = False):
        self.device = (sends or receives)[0][0].device
        carrier = self.device if carries(members.group, self.device) else torch.device("cpu")
        self.sent = [[part.contiguous() for part in x.to(carrier).unbind(0)] for x, _ in sends]
        self.received = [x.new_empty((x.shape[0], rows, *x.shape[2:]), device=carrier) for x, rows, _ in receives]
        operations = [
            dist.P2POp(function, part, group=members.group, group_peer=peer, tag=2 * i + back)
            for function, tensors, peers in ((dist.isend, self.sent, sends), (dist.irecv, self.received, receives))
            for i, (parts, (*_, peer)) in enumerate(zip(tensors, peers, strict=True))
            for part in parts
            if part.numel()
        ]
        self.peers = sorted({peer for *_, peer in (*sends, *receives)})
        with self._named():
            self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[torch.Tensor]:
        """What is received, once it is there; on a GPU the current stream waits, and not the host."""
        with self._named():
            for work in self.works:
                work.wait()
        self.sent = []
        return [x.to(self.device) for x in self.received]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"an exchange with rank {' and rank '.join(map(str, self.peers))} of the group broke off: {error}; a rank has "
                f"raised, has died, or has not made the same call in time: look for an error of its own"
            ) from error


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
    """Partial results of a tensor's rows, as they come: the output in float32, the log-sum-exp in an engine's unit, −∞ for rows
    that have seen no key. What one part is all of is that part, bit for bit."""

    def __init__(self, engine: Engine, q: torch.Tensor, v: torch.Tensor):
        self.engine, self.like = engine, q
        self.shape = *q.shape[:3], v.shape[3]  # (batch, rows, heads, head_dim_v)
        self.out: torch.Tensor | None = None
        self.lse: torch.Tensor | None = None

    def add(self, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
        """``out`` (batch, rows, heads, head_dim_v) and ``lse`` (batch, heads, rows) of some more keys."""
        lse = lse.masked_fill(lse == self.engine.unseen, -torch.inf)
        whole = out.shape == self.shape
        if self.out is None and whole:
            self.out, self.lse = out, lse
            return
        so_far, so_far_lse = self._begun()
        if whole:
            self.out = self.engine.merge(so_far, so_far_lse, out, lse, self.engine.to_log2)
        else:
            self.out = so_far.to(exact_dtype(self.like.dtype))
            self.engine.merge(self.out[:, rows], so_far_lse[:, :, rows], out, lse, self.engine.to_log2)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(out, lse)``, the output rounded to the inputs' dtype."""
        out, lse = self._begun()
        return out.to(self.like.dtype), lse

    def _begun(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.out is None or self.lse is None:
            batch, rows, heads, _ = self.shape
            self.out = self.like.new_zeros(self.shape, dtype=exact_dtype(self.like.dtype))
            self.lse = self.like.new_full((batch, heads, rows), -torch.inf, dtype=exact_dtype(self.like.dtype))
        return self.out, self.lse


class Sum:
    """A sum over parts of a tensor's rows, in float32. What one part is all of is that part as it is."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.total: torch.Tensor | None = None

    def add(self, rows: slice, x: torch.Tensor) -> None:
        if self.total is None and x.shape == self.like.shape:
            self.total = x
            return
        exact = exact_dtype(self.like.dtype)
        self.total = self.like.new_zeros(self.like.shape, dtype=exact) if self.total is None else self.total.to(exact)
        self.total[:, rows] += x

    def rounded(self) -> torch.Tensor:
        return self.like.new_zeros(self.like.shape) if self.total is None else self.total.to(self.like.dtype)


@dataclass(frozen=True)
class Ring:
    """What the ranks of a ring compute: ``q`` and ``k`` say which rows each has, ``call`` has heads, scale and softcap,
    ``band`` is ``(lo, hi)`` of the whole sequence, or of each of those that are ``packed``."""

    members: Members
    q: Shards
    k: Shards
    call: Call
    band: tuple[int | None, int | None]
    packed: Packed | None
    queries_travel: bool

    def pieces(self, here: int, there: int) -> tuple[Piece, ...]:
        """What a rank computes with that which travels to it from another."""
        of_q, of_k = (there, here) if self.queries_travel else (here, there)
        return pieces(self.q, self.k, of_q, of_k, *self.band, self.packed)

    def needed(self, here: int, there: int) -> range:
        """Which rows of another's a rank needs of what travels."""
        return spanned(self.pieces(here, there), "rows" if self.queries_travel else "keys")

    def forward(self, engine: Engine, q, k, v, call: Call) -> tuple:
        """``(out, lse, kept)`` of this rank's queries, for ``autograd.Attention``: ``kept`` is the log-sum-exp in the engine's
        unit, −∞ for a row that sees no key."""
        mine = Merged(engine, q, v)

        def compute(step: int, there: list, parts: list[tuple]) -> list:
            q_there, k_there, v_there = (*there, k, v) if self.queries_travel else (q, *there)
            found = Merged(engine, q_there, v) if self.queries_travel and step else mine
            for piece, rows, keys in parts:
                inputs = self._of(piece, q_there[:, rows], k_there[:, keys], v_there[:, keys])
                out, _, lse = engine.passes[0](*inputs, self._call(piece, call))
                found.add(rows, *((out[None], lse[None]) if piece.packed else (out, lse)))
            if found is mine:
                return []
            out, lse = found.result()
            return [out, lse.transpose(1, 2)]

        def take(rows: slice, out, lse) -> None:
            mine.add(rows, out, lse.transpose(1, 2).contiguous())

        if self.queries_travel:
            batch, _, heads, head_dim_v = mine.shape
            results = q.new_empty((batch, 0, heads, head_dim_v)), q.new_empty((batch, 0, heads), dtype=exact_dtype(q.dtype))
            self._walk([q], list(results), compute, take)
        else:
            self._walk([k, v], [], compute, take)
        out, lse = mine.result()
        return out, lse * (engine.to_log2 * LN_2), lse

    def gradients(self, engine: Engine, q, k, v, out, lse, dout, dlse, call: Call, needs: str):
        """``(dq, dk, dv)`` of this rank's shards, None for what ``needs`` does not name."""
        lse = lse.masked_fill(lse == -torch.inf, engine.unseen)
        if dlse is None and self.queries_travel:  # others' may have one, which are sent as this one's are
            dlse = torch.zeros_like(lse)
        of_rows = [q, out, dout, *(x.transpose(1, 2) for x in (lse, dlse) if x is not None)]  # (batch, rows, heads, …), all
        own = {"q": q, "k": k, "v": v}
        sums = {name: Sum(own[name]) for name in needs}
        away = [name for name in ("q" if self.queries_travel else "kv") if name in needs]

        def compute(step: int, there: list, parts: list[tuple]) -> list:
            rows_there, keys_there = (there, [k, v]) if self.queries_travel else (of_rows, there)
            arrived = dict(zip("q" if self.queries_travel else "kv", there, strict=False))
            totals = sums | ({name: Sum(arrived[name]) for name in away} if step else {})
            for piece, rows, keys in parts:
                of_q, of_out, of_dout, *of_lse = (x[:, rows] for x in rows_there)
                inputs = of_q, *(x[:, keys] for x in keys_there), of_out
                kept, of_dlse = (*(x.transpose(1, 2) for x in of_lse), None)[:2]
                tensors = self._of(piece, *inputs, kept, of_dout, of_dlse)
                asked = *tensors, needs, self._call(piece, call), engine.passes[1]
                found = autograd.computed(None, *asked)
                for name, dx in zip("qkv", found, strict=True):
                    if dx is not None:
                        totals[name].add(rows if name == "q" else keys, dx[None] if piece.packed else dx)
            return [totals[name].rounded() for name in away] if step else []

        def take(rows: slice, *found) -> None:
            for name, dx in zip(away, found, strict=True):
                sums[name].add(rows, dx)

        self._walk(of_rows if self.queries_travel else [k, v], [own[name] for name in away], compute, take)
        return tuple(sums[name].rounded() if name in needs else None for name in "qkv")

    def _walk(self, travels: list, returns: list, compute: Callable, take: Callable) -> None:
        """Step by step ``compute(step, there, parts)``, where ``there`` is what of ``travels`` came for the step, and ``parts``
        are its pieces with their slices of the rows and the keys; meanwhile the next step's is on its way. What it returns,
        alike to ``returns``, goes back to where it came from, and ``take(rows, …)`` is given what comes back for rows of this
        rank."""
        _, rank, size = self.members
        first, there, coming = 0, travels, None

        def take_back() -> None:
            if coming is not None and (found := coming[1].wait()) and coming[0]:
                take(_slice(coming[0]), *found)

        for step in range(size):
            ahead = ready = None
            if step + 1 < size:
                to, source = (rank + step + 1) % size, (rank - step - 1) % size
                ready, going = self.needed(rank, source), _slice(self.needed(to, rank))
                ahead = Exchange(self.members, [(x[:, going], to) for x in travels], [(x, len(ready), source) for x in travels])
            at_row, at_key = (first, 0) if self.queries_travel else (0, first)
            parts = [(x, _slice(x.rows, at_row), _slice(x.keys, at_key)) for x in self.pieces(rank, (rank - step) % size)]
            results = compute(step, there, parts)
            if step and returns:
                take_back()
                to, source = (rank - step) % size, (rank + step) % size
                rows = self.needed(source, rank)
                back = Exchange(self.members, [(x, to) for x in results], [(x, len(rows), source) for x in returns], back=True)
                coming = rows, back
            if ahead is not None and ready is not None:
                first, there = ready.start, ahead.wait()
        take_back()

    def _call(self, piece: Piece, call: Call) -> Call:
        """The call that a piece of one is by itself. Of packed sequences it has those that begin, end or continue in its
        chunk."""
        left, right = piece.edges
        lengths = None
        if piece.packed:
            of_all: Any = call.lengths
            bounds = (of_all.tensors[0] - piece.position).clamp(0, len(piece.rows))
            lengths = Lengths(of_all.count, (bounds, bounds, None, None))
        sizes = len(piece.rows), len(piece.keys)
        return replace(self.call, seqlen_q=sizes[0], seqlen_k=sizes[1], left=left, right=right, lengths=lengths)

    @staticmethod
    def _of(piece: Piece, *tensors) -> Any:
        """Tensors as a piece's call takes them: ragged ones have no batch."""
        return [x if x is None else x[0] for x in tensors] if piece.packed else tensors


def _slice(rows: range, first: int = 0) -> slice:
    return slice(rows.start - first, rows.stop - first)
