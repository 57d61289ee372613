"""What the mainloops share: the run-time values of a call, and which tiles of keys or queries see one another."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.layouts.base import CAREFUL, COUNTERS, TICKET
from cute_attn.rules import LN_2, Band
from cute_attn.scheduler import Work


class DeviceOps:
    """The functions of ``rules.Band`` that are no operators, for the DSL's values."""

    max = staticmethod(cutlass.max)
    min = staticmethod(cutlass.min)


@dataclass(frozen=True)
class Values:
    """The run-time values of a call as a kernel takes them. An unbounded side's edge is passed but never read.

    Those of ragged sequences have no lengths, and edges as if query 0 were aligned with key 0, until they are :meth:`of` one.
    """

    seqlen_q: Int32
    seqlen_k: Int32
    lo: Int32
    hi: Int32
    scale_log2: Float32
    scale_by_cap: Float32

    def of(self, work: Work) -> Values:
        """The values of a tile's sequence."""
        if work.q.length is None:
            return self
        shift = work.k.length - work.q.length
        return replace(self, seqlen_q=work.q.length, seqlen_k=work.k.length, lo=self.lo + shift, hi=self.hi + shift)

    def band(self, problem) -> Band:
        return Band(self.lo if problem.bounded_left else None, self.hi if problem.bounded_right else None)

    def scale(self, problem):
        """Of a product Q·K: what :func:`~cute_attn.rules.score_scales` made two numbers of."""
        natural = self.scale_log2 * LN_2
        return natural * self.scale_by_cap if problem.softcap else natural


@dataclass(frozen=True)
class KeyTiles:
    """The key tiles of one query tile: they begin at the first key any of its rows sees, not at a multiple of tile_n,
    so that no key before it is ever read. ``end`` is past the last one any sees; a last tile that is not full reads on.

    ``count`` tiles, walked from the last to the first; tiles ``whole_begin … whole_end − 1`` need no mask.
    """

    begin: Int32
    end: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32

    @staticmethod
    def of(values: Values, problem, m_block: Int32, config) -> KeyTiles:
        band, n = values.band(problem), config.tile_n
        row_first = m_block * config.tile_m
        row_last = cutlass.min(row_first + config.tile_m, values.seqlen_q) - 1
        begin, end = band.key_range(row_first, row_last, values.seqlen_k, DeviceOps)
        inner_begin, inner_end = band.whole_range(row_first, row_last, values.seqlen_k, DeviceOps)
        if problem.ragged:  # a tile past its sequence's end sees nothing; a factor of 0 or 1, which no length makes overflow
            exists = cutlass.min(cutlass.max(values.seqlen_q - row_first, 0), 1)
            end = end * exists
        count = cutlass.max(cute.ceil_div(end - begin, n), 0)
        whole_begin = cutlass.min(cutlass.max(cute.ceil_div(inner_begin - begin, n), 0), count)
        whole_end = cutlass.min(cutlass.max(inner_end - begin, 0) // n, count)
        return KeyTiles(begin, end, count, whole_begin, cutlass.max(whole_end, whole_begin))

    def last_is_masked(self):
        """Whether the last tile, which is the first to be computed, needs a mask."""
        return (self.count > self.whole_end) | (self.count <= self.whole_begin)


@dataclass(frozen=True)
class QueryTiles:
    """The query tiles that see any key of one key tile, for the backward pass. They begin at multiples of tile_m.

    ``count`` tiles from ``begin`` on, of which all but ``whole_begin … whole_end − 1`` need a mask.
    """

    n_block: Int32
    begin: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32

    @staticmethod
    @cute.jit
    def of(values: Values, problem: cutlass.Constexpr, n_block: Int32, config: cutlass.Constexpr) -> QueryTiles:
        band, m = values.band(problem).transposed(), config.tile_m
        key_first = n_block * config.tile_n
        key_end = key_first + config.tile_n
        key_last = cutlass.min(key_end, values.seqlen_k) - 1
        first, last = band.key_range(key_first, key_last, values.seqlen_q, DeviceOps)
        inner_first, inner_last = band.whole_range(key_first, key_last, values.seqlen_q, DeviceOps)
        if cutlass.const_expr(problem.ragged):
            last = last if key_first < values.seqlen_k else 0
        begin = first // m
        end = cute.ceil_div(last, m) if first < last else begin
        whole_begin = cutlass.min(cute.ceil_div(inner_first, m), end)
        # Queries past the last need no mask: their log-sum-exp says that they weigh nothing. Keys past the last do.
        whole_end = end if inner_last >= values.seqlen_q else cutlass.min(cutlass.max(inner_last, 0) // m, end)
        whole_end = whole_end if key_end <= values.seqlen_k else whole_begin
        whole_end = cutlass.max(whole_end, whole_begin)
        return QueryTiles(n_block, begin, end - begin, whole_begin, whole_end)

    def in_order(self, i, problem):
        """The i-th tile without regard to masks. Where dQ is added in a fixed order, key tile by key tile, the last one comes
        first: with a right edge, key tile n then finds that tile n − 1 has just left each query tile that it comes to."""
        return self.begin + (self.count - 1 - i if problem.deterministic else i)

    def needs_mask(self, m_block):
        return (m_block < self.whole_begin) | (m_block >= self.whole_end)

    def rank(self, values: Values, problem, m_block: Int32, config):
        """How many key tiles come before this one in the fixed order in which a query tile's dQ is added up: from the
        first key that it sees on."""
        band = values.band(problem)
        row_first = m_block * config.tile_m
        row_last = cutlass.min(row_first + config.tile_m, values.seqlen_q) - 1
        begin, _ = band.key_range(row_first, row_last, values.seqlen_k, DeviceOps)
        return self.n_block - begin // config.tile_n


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
    head, batch)``; where the layouts have no pieces, dQ itself, ``(seqlen_q, head_dim, heads, batch)``.
    """

    mdQ: cute.Tensor | None
    mdK: cute.Tensor | None
    mdV: cute.Tensor | None


@dataclass(frozen=True)
class Signals:
    """How the kernels and blocks of a backward call tell one another something: int32 in global memory, zeros before it.
    ``words`` are all of them, ``counters`` those of the query tiles, ``(m_block, head, batch)``: how many key tiles have added
    to each one's dQ, where their order is fixed."""

    words: cute.Tensor
    counters: cute.Tensor

    @staticmethod
    def of(words: cute.Tensor | None, m_blocks: Int32, heads: Int32, batch: Int32) -> Signals | None:
        if words is None:
            return None
        return Signals(words, cute.make_tensor(words.iterator + COUNTERS, cute.make_layout((m_blocks, heads, batch))))

    def ask_for_care(self):
        """The kernels that follow are to copy carefully."""
        self.words[CAREFUL] = Int32(1)

    def care(self):
        """Whether to copy carefully."""
        return self.words[CAREFUL] != 0

    def ticket(self):
        """One thread: how many blocks have asked before this one. So a block with a ticket knows that those with lower ones
        have started, and may wait for them, in whatever order the hardware starts blocks."""
        return cute.arch.atomic_add(self.words.iterator + TICKET, Int32(1), sem="relaxed", scope="gpu")

    def _counter(self, where):
        return self.counters.iterator + cute.crd2idx(where, self.counters.layout)

    @cute.jit
    def wait_for_turn(self, where, rank):
        """One thread: until the ``rank`` key tiles that come before its own have added to the dQ of the query tile at
        ``where`` = (m_block, head, batch)."""
        arrived = Int32(-1)
        while arrived < rank:
            arrived = cute.arch.load(self._counter(where), Int32, sem="acquire", scope="gpu")

    @cute.jit
    def pass_turn(self, where):
        """One thread: what it added is complete, the next key tile may add its own."""
        cute.arch.red(self._counter(where), Int32(1), op="add", dtype="s32", sem="release", scope="gpu")


@cute.jit
def walk(step: cutlass.Constexpr, state, keys: KeyTiles, problem: cutlass.Constexpr, last: cutlass.Constexpr[bool]):
    """``state = step(state, (n, masked))`` over the key tiles, in descending order; with the ``last`` or without.

    Three loops, so that each knows at compile time whether it masks: tiles cut by the right edge, whole tiles, tiles cut
    by the left edge. The last is among the first ones.
    """
    top = keys.count - 1
    whole_end = cutlass.min(top, keys.whole_end)
    if cutlass.const_expr(last):
        for i in cutlass.range(keys.count - whole_end, unroll=1):
            state = step(state, (top - i, True))
    elif cutlass.const_expr(problem.bounded_right):
        for i in cutlass.range(top - keys.whole_end, unroll=1):
            state = step(state, (top - 1 - i, True))
    for i in cutlass.range(whole_end - keys.whole_begin, unroll=1):
        state = step(state, (whole_end - 1 - i, False))
    if cutlass.const_expr(problem.bounded_left):
        left_end = cutlass.min(top, keys.whole_begin)
        for i in cutlass.range(left_end, unroll=1):
            state = step(state, (left_end - 1 - i, True))
    return state
