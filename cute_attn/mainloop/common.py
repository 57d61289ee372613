"""What the mainloops share: the run-time values of a call, and what passes between the kernels of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, Uint32, cute

from cute_attn.layouts.base import CARE, CAREFUL, COUNTERS, ENDED, STORED, TICKET
from cute_attn.rules import LN_2, LOG2_E, Band
from cute_attn.scheduler import Work


@dataclass(frozen=True)
class Values:
    """The run-time values of a call as a kernel takes them. An unbounded side's edge is passed but never read.

    Those of ragged sequences have no lengths, and edges as if query 0 were aligned with key 0, until they are :meth:`of` one.

    ``captured`` are the tensors that the user's functions read, of ranks from 1 on, None without functions, ``of_captured`` the
    gradients of some. ``sinks`` is (heads), or None. Of dropout: the ``seed``, as two words in memory, and once these are
    :meth:`of` a sequence as words; up to which word a probability is dropped, and the scale of others. ``sequence`` and
    ``head`` are where functions and dropout are computed.

    Where there is a block mask, ``key_lists`` are those of the query tiles and ``query_lists`` those of the key tiles, as
    ``blocks.py`` says, ``(batch, heads, tile, …)``, ``ranks`` the order in which dQ is added up, where it is fixed, ``visits``
    how many key tiles add to it, where whoever rounds it asks, and ``kinds`` those of blocks of 32 × 32, ``(batch, heads, …)``.

    Where a tile's rows are ``packed``, each query is as many rows, one for each query head of a key head from ``head`` on.
    ``rise`` is what a ramp adds from one position to the next, in raw units, where it has been computed for all of a tile.
    ``header`` and ``from_last`` are a tile's, if it has them (:class:`Work <cute_attn.scheduler.Work>`).
    """

    seqlen_q: Int32
    seqlen_k: Int32
    lo: Int32
    hi: Int32
    scale_log2: Float32
    scale_by_cap: Float32
    captured: tuple | None = None
    sinks: cute.Tensor | None = None
    of_captured: tuple | None = None
    seed: Any = None
    drop_below: Int32 | None = None
    kept_scale: Float32 | None = None
    sequence: Int32 | None = None
    head: Int32 | None = None
    key_lists: cute.Tensor | None = None
    query_lists: cute.Tensor | None = None
    ranks: cute.Tensor | None = None
    visits: cute.Tensor | None = None
    kinds: cute.Tensor | None = None
    packed: Int32 | None = None
    rise: Float32 | None = None
    header: tuple | None = None
    from_last: Int32 | None = None

    def query(self, row):
        """The query that a row is of."""
        return row if self.packed is None else row // self.packed

    def head_of(self, row):
        """Its head."""
        return self.head if self.packed is None else self.head + row % self.packed

    def of(self, work: Work) -> Values:
        """The values of a tile's sequence and head."""
        here = replace(self, header=work.header, from_last=work.from_last)
        if self.seed is not None:
            here = replace(here, seed=tuple(Uint32(self.seed[i]) for i in range(2)))
        if self.has_place:
            here = replace(here, sequence=work.q.batch if work.sequence is None else work.sequence, head=work.head)
        return here.of_lengths(work.q.length, work.k.length)

    def of_lengths(self, seqlen_q: Int32 | None, seqlen_k: Int32 | None) -> Values:
        """The values of a ragged sequence; the same, where all have one length."""
        if seqlen_q is None:
            return self
        shift = seqlen_k - seqlen_q
        return replace(self, seqlen_q=seqlen_q, seqlen_k=seqlen_k, lo=self.lo + shift, hi=self.hi + shift)

    def of_head(self, head) -> Values:
        """Those of another head of the same sequence."""
        return replace(self, head=head) if self.has_place else self

    @property
    def has_place(self) -> bool:
        """Whether what is computed of a score depends on the sequence and the head."""
        return self.captured is not None or self.seed is not None

    def sink(self, work: Work) -> Float32 | None:
        """The logit of a tile's head that has no value."""
        return None if self.sinks is None else self.sinks[work.head]

    def scale_kept(self, acc: cute.Tensor):
        """A sum over kept probabilities, in place: times dropout's scale, if there is dropout."""
        if self.kept_scale is not None:
            acc.store(acc.load() * self.kept_scale)

    def exponent(self, problem):
        """What makes an exponent of 2 of a score as the rules leave it: a function's are natural logarithms."""
        return Float32(LOG2_E) if problem.expression.natural else self.scale_log2

    def band(self, problem) -> Band:
        return Band(self.lo if problem.bounded_left else None, self.hi if problem.bounded_right else None)

    def scale(self, problem):
        """Of a product Q·K: what :func:`~cute_attn.rules.score_scales` made two numbers of."""
        natural = self.scale_log2 * LN_2
        return natural * self.scale_by_cap if problem.softcap else natural


@dataclass(frozen=True)
class Rows:
    """What the backward pass needs of each query row, both float32, ``(rows, heads, batch)``, rows padded to a multiple of
    every tile: the log-sum-exp in the units of a raw score (+∞ for a row that sees no key or does not exist, so that it weighs
    nothing) and delta = Σ dO ∘ O − dLSE."""

    lse_raw: cute.Tensor
    delta: cute.Tensor


@dataclass(frozen=True)
class Inputs:
    """What the backward pass reads, in global memory, ``(seqlen, head_dim, heads, batch)``."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    do: cute.Tensor

    def if_masked(self, problem) -> Inputs | None:
        """For careful copies (``guard.py``), which there are only where there is a mask."""
        return self if problem.masked else None


@dataclass(frozen=True)
class Gradients:
    """Where the main kernel of the backward pass puts the gradients; what is not asked for is ``None``.

    ``mdQ`` is float32 sums, a query tile's values in the order of the accumulator's registers: ``(values, piece, m_block,
    head, batch)``; where the layouts have no pieces, dQ itself, ``(seqlen_q, head_dim, heads, batch)``. ``unused_dq`` is dQ
    where this kernel writes the zeros of query tiles without a row in use.
    """

    mdQ: cute.Tensor | None
    mdK: cute.Tensor | None
    mdV: cute.Tensor | None
    unused_dq: cute.Tensor | None = None


@dataclass(frozen=True)
class Signals:
    """How the kernels and blocks of a backward call tell one another something: int32 in global memory, zeros at first, which
    a kernel of its own writes or, ``cleared_late``, the first one.
    ``words`` are all of them, ``counters`` those of the query tiles, ``(m_block, head, batch)``: how many key tiles have added
    to each one's dQ, where their order is fixed; else how many have come while nothing was stored, ``STORED`` then, and
    ``ADDED`` for each one whose part is there, if dQ is rounded meanwhile.
    ``cleared_late`` says that nothing is zero before the first kernel, which clears all but what it may ask for itself: that is
    ``CARE``, and anything else that lies there asks for nothing. Where it is ``CARE`` by chance, needless care is taken.
    """

    words: cute.Tensor
    counters: cute.Tensor
    cleared_late: cutlass.Constexpr[bool]

    @staticmethod
    def of(words: cute.Tensor | None, m_blocks: Int32, heads: Int32, batch: Int32, cleared_late: bool) -> Signals | None:
        if words is None:
            return None
        counters = cute.make_tensor(words.iterator + COUNTERS, cute.make_layout((m_blocks, heads, batch)))
        return Signals(words, counters, cleared_late)

    def ask_for_care(self):
        """The kernels that follow are to copy carefully."""
        self.words[CAREFUL] = Int32(CARE if self.cleared_late else 1)

    def care(self):
        """Whether to copy carefully."""
        word = self.words[CAREFUL]
        return word == CARE if self.cleared_late else word != 0

    @cute.jit
    def care_no_more(self):
        """A block of the last kernel: the same memory is the next call's, if a graph is replayed."""
        if cute.arch.thread_idx()[0] == 0:
            self.words[CAREFUL] = Int32(0)

    @cute.jit
    def clear(self, each: cutlass.Constexpr[int]):
        """In the first kernel, ``each`` words a block, which are enough for all but what it may ask for."""
        thread = cute.arch.thread_idx()[0]
        place = TICKET + cute.arch.block_idx()[0] * each + thread
        if (thread < each) & (place < cute.size(self.words)):
            self.words[place] = Int32(0)

    def ticket(self, of: int = TICKET):
        """One thread: how many blocks have asked before this one, ``of`` a kind. So a block with a ticket knows that those with
        lower ones have started, and may wait for them, in whatever order the hardware starts blocks."""
        return cute.arch.atomic_add(self.words.iterator + of, Int32(1), sem="relaxed", scope="gpu")

    def _counter(self, where):
        return self.counters.iterator + cute.crd2idx(where, self.counters.layout)

    @cute.jit
    def wait_for_turn(self, where, rank):
        """One thread: until the ``rank`` key tiles that come before its own have added to the dQ of the query tile at
        ``where`` = (m_block, head, batch)."""
        arrived = Int32(-1)
        while arrived < rank:
            arrived = cute.arch.load(self._counter(where), Int32, sem="acquire", scope="gpu")

    def pass_turn(self, where, turns: int = 1, sem: str = "release"):
        """One thread: what it added is complete, the next key tile may add its own. ``"relaxed"``: behind a fence for many."""
        cute.arch.red(self._counter(where), Int32(turns), op="add", dtype="s32", sem=sem, scope="gpu")

    @cute.jit
    def wait_for_all(self, where, turns: Int32, enders: Int32):
        """A thread, or all of a warp: until so many turns have been passed, or whoever passes turns has ended."""
        there = Boolean(False)
        while there == False:  # noqa: E712
            there = self.count(where) >= turns
            if there == False:  # noqa: E712
                there = cute.arch.load(self.words.iterator + ENDED, Int32, sem="acquire", scope="gpu") == enders

    def end(self):
        """One thread, of ``enders``: it passes no more turns."""
        cute.arch.red(self.words.iterator + ENDED, Int32(1), op="add", dtype="s32", sem="release", scope="gpu")

    def count(self, where):
        """What the query tile's counter is by now."""
        return cute.arch.load(self._counter(where), Int32, sem="acquire", scope="gpu")

    @cute.jit
    def comes_first(self, where, count: Int32):
        """One thread, whose tile's dQ is there: whether to store it, as the first; else what was is stored by now. ``count`` is
        what the counter was before. Whoever waits waits for one that waits for nobody."""
        first = Boolean(False)
        if count < STORED:
            first = cute.arch.atomic_add(self._counter(where), Int32(1), sem="relaxed", scope="gpu") == 0
            if first == False:  # noqa: E712
                self.wait_for_turn(where, STORED)
        return first
