"""The scores of a tile: what the rules make of the products Q·K, and, in the backward pass, the probabilities and gradients
that follow. The only door between a product and P or dS, and the only place in the kernels that knows what changes a score.

With the log-sum-exp in raw units and the difference first, P = 2^((s − lse_raw) · scale_log2) is exactly 1 where one key
outweighs all others.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property, partial

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from cute_attn import dropout
from cute_attn.arithmetic import either
from cute_attn.layouts.base import BLOCK, BY_ROWS, CUT, KIND_BITS, NONE, WARP
from cute_attn.layouts.fragments import rows_columns
from cute_attn.mainloop import fours
from cute_attn.mainloop.captured import CapturedGradients
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.elements import Elements
from cute_attn.mainloop.guard import HIDDEN
from cute_attn.rules import LN_2, LOG2_E, rational_tanh, softcap_slope, softcap_tanh

PAIRS_AHEAD = 16  # columns
HELD = 2  # registers for what a mask loads of rows
SECTOR = 8  # elements of 4 bytes that come to the L1 cache together
ROWS = 64  # of a tile, or of a warpgroup's part of it, at most where masks are unrolled


class UsualCapOps:
    """The functions of a softcap that are no operators, for the DSL's values."""

    @staticmethod
    def tanh_of_product(x, factor):
        """``1 − 2 / (1 + e^{2 · x · factor})``: off by a unit in the last place of 1, where the hardware's own tanh is off by
        2⁻¹¹, more than a 16-bit result forgives. ``factor`` is the same for all scores."""
        return 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + cute.math.exp2(x * (factor * (2.0 * LOG2_E)), fastmath=True))


class LargeCapOps:
    """The same, with a tanh that is exact in relation to its own size."""

    @staticmethod
    def tanh_of_product(x, factor):
        return rational_tanh(x * factor, LargeCapOps)

    @staticmethod
    def clamp(x, bound):
        """``x`` from −bound to bound; a NaN stays one."""
        return cute.arch.fmin(cute.arch.fmax(x, -bound, nan=True), bound, nan=True)

    @staticmethod
    def reciprocal(x):
        return cute.arch.rcp_approx(x)


class WordOps:
    """The operations of ``dropout.philox`` for the DSL's words."""

    @staticmethod
    def product(x, constant):
        whole = cute.arch.mul_wide(x, Uint32(constant))
        return Uint32(whole >> 32), Uint32(whole)

    @staticmethod
    def sum(x, constant):
        return x + Uint32(constant)

    @staticmethod
    def at_least(x, least):
        """Ones in those halves of a word whose number is at least that of ``least``: not less as floats, of which the largest
        numbers are NaNs."""
        code = "{ .reg .b32 x; abs.f16x2 x, {$r0}; set.geu.u32.f16x2 {$w0}, x, {$r1}; }"
        return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[x, least])

    @staticmethod
    def signs(x):
        """Each half of a word as its upper bit, 16 times."""
        return cute.arch.inline_ptx("prmt.b32 {$w0}, {$r0}, 0, 0xBB99;", write_only_types=[Uint32], read_only_args=[x])


@dataclass(frozen=True)
class Kept:
    """Which of a thread's probabilities dropout keeps, a bit each: of two neighbours in a row in the halves of a word. And what
    these are multiplied by."""

    bits: cute.Tensor
    rows: cutlass.Constexpr[int]
    scale: Float32

    def of(self, x: Float32, row: int, column: int) -> Float32:
        """A value at (row, column), 0 where the probability is dropped."""
        word, bit = self._place(row, column)
        return either(self.bits[word] & Uint32(1 << bit + column % 2 * dropout.HALF) != 0, x, Float32(0.0))

    def of_pair(self, row: int, column: int) -> Uint32:
        """Ones in those halves of a word whose probability is kept, of an even column and the next one."""
        word, bit = self._place(row, column)
        return WordOps.signs(self.bits[word] << (dropout.HALF - 1 - bit))

    def _place(self, row: int, column: int) -> tuple[int, int]:
        return divmod(column // 2 * self.rows + row, dropout.HALF)


@dataclass(frozen=True)
class Coordinates:
    """Where a thread's scores lie in a tile: ``thread`` as (row, column) of each, in the accumulator's layout; ``zero``
    the same of thread 0, whose columns are compile-time numbers. Threads differ from it by one offset for all columns."""

    thread: cute.Tensor
    zero: cute.Tensor

    @staticmethod
    def of(mma: cute.TiledMma, thread: Int32, shape: tuple[int, int]) -> Coordinates:
        identity = cute.make_identity_tensor(shape)
        return Coordinates(*(rows_columns(mma.get_slice(t).partition_C(identity)) for t in (thread, 0)))

    @cached_property
    def columns(self) -> list[int]:
        """Those of thread 0's scores. Found once: each is an operation of the compiler's, and each score asks for its own."""
        return [self.zero[0, c][1] for c in range(cute.size(self.zero, mode=[1]))]


@dataclass(frozen=True)
class Scores:
    """The scores of the tiles of one sequence, ``(queries, keys)``, or, ``transposed``, ``(keys, queries)``; ``where`` says
    which of a tile a thread has. A rule that changes scores has its place in these methods, and nowhere else in the kernels.
    ``unrolls``: a thread has the registers for two ways to mask a tile, of which the usual one is quick, and for words."""

    where: Coordinates
    values: Values
    problem: cutlass.Constexpr
    transposed: cutlass.Constexpr[bool] = False
    unrolls: cutlass.Constexpr[bool] = True
    loaded: tuple = ()

    @cute.jit
    def apply_rules(self, acc: cute.Tensor, origin, masked, hidden=None, apart: cutlass.Constexpr[bool] = False, seen=None):
        """An accumulator's products to scores, in place, −inf where a query does not see a key.

        ``origin`` is the tile's first row and column in the sequence. ``masked`` is a Python bool where the loop knows it, a
        run-time Boolean where it doesn't. ``hidden`` is None, or (whether there are hidden keys, what says which of the
        thread's keys are): see ``guard.py``.

        A user's score is computed here in the forward pass, and in the backward pass in :meth:`probabilities`, with its slope.
        With ``apart`` :meth:`ramp_of_rows` is left to the caller. ``seen`` is what :meth:`seen` says of the tile, if asked.
        """
        scores = rows_columns(acc)
        self._cap(scores)
        if cutlass.const_expr(self.problem.expression.ramp is not None and not (apart or self._ramp_is_late)):
            self._add_ramp(scores, origin)
        elif cutlass.const_expr(self.problem.expression.natural and not self.problem.gradients):
            self._score(scores, self._elements(origin))
        if cutlass.const_expr(hidden is not None):
            if hidden[0]:
                self._hide(scores, hidden[1])
        mask = self._mask_listed if self.problem.blocks else self._mask
        if cutlass.const_expr(seen is not None):
            mask = partial(self._hide_unseen, seen=seen)
        if cutlass.const_expr(self.problem.masks_all):
            self._mask(scores, origin)
        elif cutlass.const_expr(not isinstance(masked, bool)):
            if masked:
                mask(scores, origin)
        elif cutlass.const_expr(masked):
            mask(scores, origin)

    @property
    def _ramp_is_late(self) -> bool:
        """Whether a ramp is added with the scale, which takes no instruction more."""
        return self.transposed and bool(self.problem.gradients) and not self.problem.dropout

    def probabilities(
        self, acc: cute.Tensor, lse_raw: cute.Tensor, dtype, origin, kept: Kept | None = None, ramp=None
    ) -> cute.Tensor:
        """An accumulator's scores to P in place; returns it, for dV. Where a rule has a slope, to P ∘ the slopes, which is what
        dS takes, and P itself, which is returned, is in ``dtype``. Both at once, since P, its slopes and dP together would take
        more registers than there are. ``lse_raw`` is the log-sum-exp of a thread's queries, in shared memory if transposed.

        Where a captured tensor's gradient takes a score, scores stay as they are until :meth:`gradients`. ``kept`` is of
        dropout: what dV takes of P, without its scale, and P is as it was for dS. ``ramp`` is :meth:`ramp_of_rows`, if it was
        asked for."""
        problem, scores = self.problem, rows_columns(acc)
        apart = problem.dropout or problem.softcap or problem.expression.slope is not None or self._takes_scores
        rounded = cute.make_rmem_tensor_like(acc, dtype) if self.transposed and apart else acc
        if not (self.transposed or problem.expression.natural):
            _probabilities_by_row(scores, lse_raw, self.values.scale_log2, problem.softcap)
        elif self.transposed or not self._takes_scores:
            ramp = self.ramp_of_rows(origin) if ramp is None else ramp
            self._to_probabilities(scores, lse_raw, origin, None if rounded is acc else rows_columns(rounded), kept, ramp)
        return rounded

    def gradients(
        self, acc: cute.Tensor, acc_dP: cute.Tensor, delta: cute.Tensor, lse_raw=None, origin=None, kept: Kept | None = None
    ):
        """An accumulator's P (∘ the slopes) to dS = P ∘ (dP − delta) in place, with the delta of each query; and what captured
        tensors get of it. ``lse_raw``, ``origin`` and ``kept`` are those of :meth:`probabilities`."""
        P, dP = rows_columns(acc), rows_columns(acc_dP)
        if not (self.transposed or self.problem.dropout or self.problem.expression.partials):
            for r in range(cute.size(delta)):
                P[r, None].store(P[r, None].load() * (dP[r, None].load() - delta[r]))
            return
        natural, elements, captured = self.values.scale_log2 * LN_2, None, None
        if self.problem.expression.partials:
            elements = self._elements(origin)
            captured = CapturedGradients(elements, self.values, self.where.zero, whole=not self.problem.ragged)
        rows = range(cute.size(P, mode=[0]))
        for c, of_query, *lse in self._by_query(P, delta, *([lse_raw] if self._takes_scores else [])):
            pairs = [(r, i) for r in rows for i in range(2)]
            for r, i in pairs if captured is kept is None else sorted(pairs, key=lambda pair: pair[1]):
                given, slopes, score = P[r, c + i], None, None
                if self._takes_scores:
                    score = either(given > HIDDEN, given * natural, Float32(0.0))
                    given, slopes = self._probability(elements, given, lse[0](r, i), r, c + i)
                of_P = dP[r, c + i]
                if kept is not None:
                    of_P = kept.of(of_P, r, c + i) * kept.scale
                dS = given * (of_P - of_query(r, i))
                P[r, c + i] = dS if slopes is None else dS * slopes
                if captured is not None:
                    captured.add(r, c + i, dS, score)
                    if r == rows[-1]:
                        captured.end_column()
        if captured is not None:
            captured.finish()

    def kept(self, origin) -> Kept:
        """Which of a thread's probabilities dropout keeps in the tile at ``origin``, whose first query is a multiple of 16, and
        its first key, too. It takes no scores: it may be asked for while these are computed.

        Where scores are keys × queries, a thread finds out for a warp's 16 × 16 what it would have if they were queries × keys:
        it takes one transposition for all of a word's bits."""
        rows, columns = (cute.size(self.where.zero, mode=[mode]) for mode in range(2))
        bits = cute.make_rmem_tensor(-(-rows * columns // 32), Uint32)
        bits.fill(0)
        kept = Kept(bits, rows, self.values.kept_scale)
        inverted = self._inverted()
        for r, c, at_least in self._at_least(origin):
            word, bit = kept._place(r, c)
            bits[word] = bits[word] | (at_least & Uint32((1 + (1 << dropout.HALF)) << bit))
        for word in range(cute.size(bits)):
            found = bits[word] ^ inverted
            bits[word] = fours.transposed(found) if self.transposed else found
        return kept

    def drop(self, P: cute.Tensor, origin):
        """P of the forward pass, rounded, to what P·V takes of it, without the scale."""
        inverted, halves = self._inverted(), rows_columns(P)
        for r, c, at_least in self._at_least(origin):
            _keep(halves, r, c, at_least ^ inverted)

    def _inverted(self) -> Uint32:
        """All ones where numbers below a threshold are kept."""
        return Uint32(self.values.drop_below >> 31)

    def _at_least(self, origin):
        """(row, column, ones in those halves of a word whose number is at least the threshold) of a thread's neighbours in a
        row of queries × keys; (row, column), if scores are transposed, is where their bits come to be."""
        values, zero, thread, apart = self.values, self.where.zero, self.where.thread, dropout.APART
        n = Uint32(values.drop_below ^ (values.drop_below >> 31))
        least, low = n | (n << dropout.HALF), Uint32(apart - 1)
        rows, columns = (range(cute.size(zero, mode=[mode])) for mode in range(2))
        at = {(zero[r, c][0], zero[r, c][1]): (r, c) for c in columns for r in rows}
        for (row, column), (r, _) in at.items():
            if row & apart or column & apart or column % 2:
                continue
            q_idx, kv_idx = Uint32(origin[0] + thread[r, 0][0]), Uint32(origin[1] + thread[0, 0][1] + column)
            if self.transposed:  # the same place in a warp's 8 × 8 queries × keys
                q_idx, kv_idx = (kv_idx & ~low) | (q_idx & low), (q_idx & ~low) | (kv_idx & low)
            counter = dropout.counter(Uint32(values.sequence), Uint32(values.head), q_idx, kv_idx)
            words = dropout.philox(counter, values.seed, WordOps)
            for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
                of_query, of_key = (j, i) if self.transposed else (i, j)
                word = words[dropout.word_of(of_query * apart, of_key * apart)]
                yield *at[row + i * apart, column + j * apart], WordOps.at_least(word, least)

    @property
    def _takes_scores(self) -> bool:
        """Whether captured tensors' gradients take scores, or dS without slopes that P already has."""
        expression = self.problem.expression
        if not expression.partials:
            return False
        names = set().union(*(expression.leaves()[x.slope] for x in expression.partials if x.slope is not None))
        return self.problem.softcap or expression.slope is not None or "score" in names

    @cute.jit
    def _cap(self, scores: cute.Tensor):
        """Scores to tanh(score · scale / cap), where there is a softcap."""
        if cutlass.const_expr(self.problem.softcap):
            ops = LargeCapOps if self.problem.large_cap else UsualCapOps
            for i in cutlass.range_constexpr(cute.size(scores)):
                scores[i] = softcap_tanh(scores[i], self.values.scale_by_cap, ops)

    def _elements(self, origin) -> Elements:
        """What the user's functions compute in a tile."""
        first = origin[1] + self.where.thread[0, 0][1]
        rows, columns = ("kv_idx", "q_idx") if self.transposed else ("q_idx", "kv_idx")
        along_rows = {rows} if self.values.packed is None else {rows, "head"}

        def leaf(name: str, r: int, c: int):
            if name == columns:
                return first + self.where.columns[c]
            row = origin[0] + self.where.thread[r, 0][0]
            if name == rows:
                return self.values.query(row)
            if name == "shift":
                return self.values.seqlen_k - self.values.seqlen_q
            return self.values.head_of(row) if name == "head" else self.values.sequence

        elements = Elements(self.problem.expression, self.values.captured, leaf, along_rows, columns)
        if self.loaded:
            elements.known |= dict(zip(self._of_rows(elements), self.loaded, strict=True))
        return elements

    def _of_rows(self, elements: Elements) -> list[tuple]:
        rows = range(cute.size(self.where.zero, mode=[0]))
        return [(node, r, None) for node in elements.of_rows() for r in rows]

    def loaded_of_rows(self, row_first) -> tuple:
        """What a mask loads for a thread's rows, where that is little enough to be held for all of a query tile's keys:
        ``loaded`` of its other tiles."""
        elements = self._elements((row_first, 0))
        places = self._of_rows(elements)
        if len(places) > HELD:
            return ()
        return tuple(elements.value(node, r, 0) for node, r, _ in places)

    def _each(self, scores: cute.Tensor):
        """(row, column) of a thread's scores, column by column: what is known of a column is needed twice and then no more."""
        rows, columns = (cute.size(scores, mode=[mode]) for mode in range(2))
        return ((r, c) for c in range(columns) for r in range(rows))

    def _score(self, scores: cute.Tensor, elements: Elements):
        """Scores to what the user's function makes of them, natural logarithms."""
        natural = self.values.scale_log2 * LN_2
        for r, c in self._each(scores):
            if r == 0 and c % PAIRS_AHEAD == 0:
                self._load_pairs(scores, elements, c)
            scores[r, c] = elements.value(self.problem.expression.score, r, c, scores[r, c] * natural)

    def ramp_of_rows(self, origin) -> cute.Tensor | None:
        """What a ramp adds to each of a thread's rows: in the forward pass to scores in the tile's first column, the rest
        having :meth:`started`; in the backward pass to exponents. None where :meth:`apply_rules` adds it. It takes no scores:
        it may be asked for while these are computed."""
        if self.problem.expression.ramp is None or (self.problem.gradients and not self._ramp_is_late):
            return None
        return self._begins(origin, self.values.scale_log2 if self.problem.gradients else 1.0)[0]

    def _begins(self, origin, scale=1.0) -> tuple[cute.Tensor, list]:
        """What a ramp adds in the tile's first column in each of a thread's rows, and from one position to the next, in scores'
        own unit times ``scale``. In the backward pass without what :func:`rise_in_tile` has taken off the log-sum-exp."""
        ramp, elements, values, where = self.problem.expression.ramp, self._elements(origin), self.values, self.where
        along_row, along_column = ("kv_idx", "q_idx") if self.transposed else ("q_idx", "kv_idx")
        fixed = (values.seqlen_k - values.seqlen_q) * ramp.of("shift") + ramp.constant
        first = origin[1] if self.problem.gradients and self.transposed else origin[1] + where.thread[0, 0][1]
        begins, rises = cute.make_rmem_tensor(cute.size(where.zero, mode=[0]), Float32), []
        for r in range(cute.size(begins)):
            rises.append((_rise(ramp, elements, values, r) if values.rise is None else values.rise) * scale)
            of_tile = self.problem.gradients and not self.transposed
            row = values.query(origin[0] if of_tile else origin[0] + where.thread[r, 0][0])
            begins[r] = rises[r] * Float32(row * ramp.of(along_row) + first * ramp.of(along_column) + fixed)
        return begins, rises

    @cute.jit
    def write_ramp(self, into: cute.Tensor, lane: Int32):
        """One warp: what a warpgroup's accumulators of a head are :meth:`started` with, the same in all of its threads, in
        shared memory of the warp's own: to load it takes a quarter of the instructions that computing it does."""
        along, n = self.problem.expression.ramp.of("kv_idx"), cute.size(into)
        cute.arch.sync_warp()  # all have read what was there
        for i in cutlass.range_constexpr(-(-n // WARP)):
            at = i * WARP + lane
            if at < n:
                # Of every eight columns an accumulator has two neighbours, for each of two rows.
                into[at] = self.values.rise * Float32(along * (at // 4 * 8 + at % 2))
        cute.arch.sync_warp()

    def started(self, acc: cute.Tensor, ramp: cute.Tensor | None) -> cute.Tensor | None:
        """An accumulator to which the products are to be added, where a ramp adds to them: what that is more in each column
        than in the first one. Made while there is time, before they are there."""
        if ramp is None:
            return None
        cute.autovec_copy(ramp, cute.make_tensor(acc.iterator, cute.make_layout(cute.size(acc))))
        return acc

    def _add_ramp(self, scores: cute.Tensor, origin):
        begins, rises = self._begins(origin)
        along = self.problem.expression.ramp.of("q_idx" if self.transposed else "kv_idx")
        for r, c in self._each(scores):
            if not (self.problem.gradients and self.transposed):
                scores[r, c] = scores[r, c] + rises[r] * Float32(along * self.where.columns[c])
            scores[r, c] = scores[r, c] + begins[r]

    def _load_pairs(self, scores: cute.Tensor, elements: Elements, first: int):
        """Begin to load what some columns from the first on will take, so that many loads are on their way at the same time."""
        rows, columns = (cute.size(scores, mode=[mode]) for mode in range(2))
        for c in range(first, min(first + PAIRS_AHEAD, columns), 2):
            for r in range(0, rows, 1 + self.transposed):
                (elements.load_fours if self.transposed else elements.load_pairs)(r, c)

    def _to_probabilities(
        self, scores: cute.Tensor, lse_raw: cute.Tensor, origin, rounded: cute.Tensor | None, kept: Kept | None, ramp
    ):
        """``scores``, before a user's function −∞ or as low as a hidden key's where they don't count, to P ∘ the slopes in
        place; ``rounded`` gets P, or what dropout leaves of it."""
        elements = self._elements(origin) if self.problem.expression.natural else None
        for c, lse in self._by_query(scores, lse_raw):
            if elements is not None and c % PAIRS_AHEAD == 0:
                self._load_pairs(scores, elements, c)
            for r in range(cute.size(scores, mode=[0])):
                P = cute.make_rmem_tensor(2, Float32)
                for i in range(2):
                    P[i], slopes = self._probability(elements, scores[r, c + i], lse(r, i), r, c + i, ramp)
                    if not self._takes_scores:
                        scores[r, c + i] = P[i] if slopes is None else P[i] * slopes
                if rounded is not None:
                    place = rounded.iterator + rounded.layout((r, c))
                    cute.make_tensor(place, P.layout).store(P.load().to(rounded.element_type))
                    if kept is not None:
                        _keep(rounded, r, c, kept.of_pair(r, c))

    def _probability(self, elements: Elements | None, score: Float32, lse: Float32, r: int, c: int, ramp=None):
        """``(P, slopes)`` of a score before the user's function; slopes are None where they are 1. ``ramp`` is what the
        exponents of each row lack."""
        expression, natural, softcap = self.problem.expression, self.values.scale_log2 * LN_2, self.problem.softcap
        if not expression.natural:
            exponent = (score - lse) * self.values.scale_log2
            P = cute.math.exp2(exponent if ramp is None else exponent + ramp[r], fastmath=True)
            return P, _slope(score) if softcap else None
        slopes = _slope(score) if softcap else None
        counts = score > HIDDEN
        changed = either(counts, elements.value(expression.score, r, c, score * natural), score)
        P = cute.math.exp2((changed - lse) * LOG2_E, fastmath=True)
        if expression.slope is not None:
            slope = either(counts, elements.value(expression.slope, r, c, score * natural), Float32(0.0))
            slopes = slope if slopes is None else slopes * slope
        return P, slopes

    def _by_query(self, scores: cute.Tensor, *of_queries):
        """Of two columns at a time the first, and functions of (row, 0 or 1) that say what a query has."""
        for c in range(0, cute.size(scores, mode=[1]), 2):
            if self.transposed:
                pairs = [_pair(x, c) for x in of_queries]
                yield c, *((lambda r, i, pair=pair: pair[i]) for pair in pairs)
            else:
                yield c, *((lambda r, i, x=x: x[r]) for x in of_queries)

    @cute.jit
    def _hide(self, scores: cute.Tensor, hidden: cute.Tensor):
        """The scores of hidden keys, so low that they weigh nothing; ``hidden`` is of a thread's keys."""
        for i in cutlass.range_constexpr(cute.size(hidden)):
            if hidden[i] != 0:
                scores[(i, None) if self.transposed else (None, i)].fill(HIDDEN)

    def _mask_by_function(self, scores: cute.Tensor, elements: Elements):
        for r, c in self._each(scores):
            scores[r, c] = either(elements.value(self.problem.expression.mask, r, c), scores[r, c], Float32(-Float32.inf))

    @cute.jit
    def _mask_listed(self, scores: cute.Tensor, origin):
        """A tile that a block mask's function cuts; there is no band beside it, but a last key."""
        every = range(cute.size(scores, mode=[1]))
        if cutlass.const_expr(not self.unrolls):
            self._mask_columns(scores, origin, every, False)
        elif self._is_inside(origin):
            self._mask_columns(scores, origin, every, True)
        else:
            self._mask_columns(scores, origin, every, False)

    def _is_inside(self, origin):
        """Whether no key of a tile is past an end, and no column past that of a tensor that the functions read."""
        ends = origin[1] + len(self._blocks()) * BLOCK
        if self.transposed:
            of_rows = origin[0] + ROWS - self.values.seqlen_k
            return (ends <= self._elements(origin).held(self.values.seqlen_q)) & (of_rows <= 0)
        return ends <= self._elements(origin).held(self.values.seqlen_k)

    def kinds(self, origin) -> Int32 | None:
        """Those of a tile's blocks that a warp's rows are in, which are 16 and in one row of blocks, where there is a block
        mask. Ask early: they come from global memory."""
        if self.values.kinds is None:
            return None
        kinds = self.values.kinds[self.values.sequence, self.values.head, None, None]
        row = (origin[0] + self.where.thread[0, 0][0]) // BLOCK
        return Int32(kinds[cutlass.min(row, kinds.shape[0] - 1), origin[1] // BLOCK])  # a row past the end may be any other

    @cute.jit
    def seen(self, origin, masked, kinds):
        """``(kinds, which of a thread's scores in blocks that are cut are seen, a bit each)``, for a tile that a block mask's
        function cuts; None where there is none. It takes no scores: it may be asked for while these are computed."""
        found = None
        if cutlass.const_expr(kinds is not None):
            bits = cute.make_rmem_tensor(-(-cute.size(self.where.zero) // 32), Int32)
            kinds = cute.arch.make_warp_uniform(kinds)
            if cutlass.const_expr(isinstance(masked, bool)) or masked:
                self._see(bits, origin, kinds)
            found = kinds, bits
        return found

    @cute.jit
    def _see(self, bits: cute.Tensor, origin, kinds):
        bits.fill(0)
        lower = sum(1 << i * KIND_BITS for i in range(len(self._blocks())))
        if (kinds & (kinds >> 1) & lower) != 0:
            self._see_rows(bits, origin, kinds)
        if self._is_inside(origin):
            self._see_blocks(bits, origin, kinds, True)
        else:
            self._see_blocks(bits, origin, kinds, False)

    @cute.jit
    def _see_rows(self, bits: cute.Tensor, origin, kinds):
        """Of blocks that are cut by rows, what their first columns show; of all at once, so that what they load is on its way
        at the same time."""
        elements, rows = self._elements(origin), cute.size(self.where.zero, mode=[0])
        for i in cutlass.range_constexpr(len(self._blocks())):
            by_rows = _kind(kinds, i) == BY_ROWS
            for r in cutlass.range_constexpr(rows):
                n = self._blocks()[i][0] * rows + r
                seen = elements.value(self.problem.expression.mask, r, self._blocks()[i][0])
                bits[n // 32] = bits[n // 32] | either(seen & by_rows, Int32(_bit(n)), Int32(0))

    @cute.jit
    def _see_blocks(self, bits: cute.Tensor, origin, kinds, inside: cutlass.Constexpr):
        rows = cute.size(self.where.zero, mode=[0])
        for i in cutlass.range_constexpr(len(self._blocks())):
            if _kind(kinds, i) == CUT:
                for r, c, seen in self._seen(origin, self._blocks()[i], inside):
                    n = c * rows + r
                    bits[n // 32] = bits[n // 32] | either(seen, Int32(_bit(n)), Int32(0))

    @cute.jit
    def _hide_unseen(self, scores: cute.Tensor, origin, seen):
        """The scores of a tile by :meth:`seen`."""
        (kinds, bits), rows = seen, cute.size(scores, mode=[0])
        for i in cutlass.range_constexpr(len(self._blocks())):
            kind = _kind(kinds, i)
            if kind == CUT:
                for c in self._blocks()[i]:
                    for r in range(rows):
                        n = c * rows + r
                        scores[r, c] = either(bits[n // 32] & Int32(_bit(n)) != 0, scores[r, c], Float32(-Float32.inf))
            elif kind == BY_ROWS:
                for r in range(rows):
                    n = self._blocks()[i][0] * rows + r
                    seen_by_row = bits[n // 32] & Int32(_bit(n)) != 0
                    for c in self._blocks()[i]:
                        scores[r, c] = either(seen_by_row, scores[r, c], Float32(-Float32.inf))
            elif kind == NONE:
                for c in self._blocks()[i]:
                    scores[None, c].fill(-Float32.inf)

    def _blocks(self) -> list[range]:
        """A thread's columns, by the blocks of 32 that they are in."""
        columns = self.where.columns
        return [range(*(bisect_left(columns, n) for n in (begin, begin + BLOCK))) for begin in range(0, columns[-1], BLOCK)]

    def _mask_columns(self, scores: cute.Tensor, origin, columns: range, inside: bool):
        for r, c, seen in self._seen(origin, columns, inside):
            scores[r, c] = either(seen, scores[r, c], Float32(-Float32.inf))

    def _seen(self, origin, columns: range, inside: bool):
        """(row, column, whether it is seen) of a thread's scores, by the function. ``inside``: see :meth:`_is_inside`."""
        elements, last, at = self._elements(origin), self.values.seqlen_k - 1, self.where.columns
        rows = range(cute.size(self.where.zero, mode=[0]))
        first = origin[1] + self.where.thread[0, 0][1]
        exist = [origin[0] + self.where.thread[r, 0][0] <= last for r in rows]
        for c in columns:
            if inside:
                elements.load_column(c, columns[0], at[c] - at[columns[0]])
            for r in rows:
                seen = elements.value(self.problem.expression.mask, r, c)
                if not inside:
                    seen = seen & (exist[r] if self.transposed else at[c] <= last - first)
                yield r, c, seen

    @property
    def _masks_by_words(self) -> bool:
        """Whether what a band shows of a thread's row is found as a word of bits, one a column, of which predicates are made
        seven at a time: its columns are two of each eight. Not in the forward pass under a softcap, whose tanh takes the
        registers."""
        columns = self.where.columns
        bounded = self.problem.bounded_left or self.problem.bounded_right
        has_room = self.unrolls and (self.transposed or not self.problem.softcap)
        return has_room and bounded and len(columns) <= 32 and columns == [c // 2 * 8 + c % 2 for c in range(len(columns))]

    @cute.jit
    def _mask(self, scores: cute.Tensor, origin):
        """By a word for each row, or else by one comparison an edge and score, against a compile-time column. Of keys by
        queries, rows past the last are masked as well: queries past theirs weigh nothing anyway."""
        band, values = self.values.band(self.problem), self.values
        if cutlass.const_expr(self.problem.masks_all):
            self._mask_by_function(scores, self._elements(origin))
        columns, rows = values.seqlen_k, None
        if cutlass.const_expr(self.transposed):
            band, columns, rows = band.transposed(), values.seqlen_q, values.seqlen_k
        column_first = origin[1] + self.where.thread[0, 0][1]
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            row = self.values.query(origin[0] + self.where.thread[r, 0][0])
            begin, end = band.key_range(row, row, columns, cutlass)
            if cutlass.const_expr(rows is not None):
                end = end if row < rows else 0
            begin, end = begin - column_first, end - column_first
            if cutlass.const_expr(self._masks_by_words):
                word = ~_from_column(end)
                if cutlass.const_expr(band.lo is not None):
                    word = word & _from_column(begin)
            for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                if cutlass.const_expr(self._masks_by_words):
                    visible = word & Int32(_bit(c)) != 0
                else:
                    column = self.where.columns[c]
                    visible = column < end
                    if cutlass.const_expr(band.lo is not None):
                        visible = visible & (column >= begin)
                scores[r, c] = scores[r, c] if visible else -Float32.inf


def _from_column(column: Int32) -> Int32:
    """Ones in a word for those columns of an accumulator's first thread that are at least ``column``: it has two neighbours of
    each eight."""
    before = cutlass.min(cutlass.max((column >> 3) * 2 + cutlass.min(column & 7, 2), 0), 32)
    return Int32(Int64(-1) << Int64(before))


def _kind(kinds: Int32, i: int) -> Int32:
    """Of the i-th block of :meth:`Scores.kinds`."""
    return (kinds >> i * KIND_BITS) & ((1 << KIND_BITS) - 1)


@cute.jit
def read_ahead(values: Values, problem: cutlass.Constexpr, block: Int32, rows: cutlass.Constexpr, keys: Int32):
    """A whole warp: bring to the L1 cache what masks of a query tile of so many ``rows`` read of its two tiles of 128 keys at
    most, of which ``keys`` is the first block, in half of the lanes of one and in the others of the other. Returns a word of no
    meaning, for which all of it has to be read."""
    lane, kinds = cute.arch.lane_idx() % (WARP // 2), values.kinds[values.sequence, values.head, None, None]
    row = cutlass.min(block * (rows // BLOCK) + lane % (rows // BLOCK), kinds.shape[0] - 1)
    place = {"batch": values.sequence, "head": values.head, "q_idx": block * rows, "shift": values.seqlen_k - values.seqlen_q}
    place["kv_idx"] = keys * BLOCK + lane * SECTOR
    elements = Elements(problem.expression, values.captured, lambda name, r, c: place[name], {"q_idx"}, "kv_idx")
    word = Int32(kinds[row, keys])
    for node in elements.of_columns():
        word = word ^ Int32(elements.value(node, 0, 0))
    return Int32(cute.arch.vote_any_sync(word == -1))


def with_rise(values: Values, problem) -> Values:
    """The values of a head with what is the same in all of its tiles, so that it is loaded and computed once."""
    ramp = problem.expression.ramp
    if ramp is None or values.packed is not None:
        return values
    place = {"batch": values.sequence, "head": values.head}
    elements = Elements(problem.expression, values.captured, lambda name, row, column: place[name], set(), "")
    return replace(values, rise=_rise(ramp, elements, values, 0))


def rise_in_tile(values: Values, problem, row, rows: int):
    """What a ramp adds to a query's scores for its place in a tile of so many rows: the same for all keys, and so a part of the
    log-sum-exp."""
    return values.rise * Float32(row % rows * problem.expression.ramp.of("q_idx"))


def _rise(ramp, elements: Elements, values: Values, row: int) -> Float32:
    return elements.value(ramp.factor, row, 0) * (cute.arch.rcp_approx(values.scale_log2 * LN_2) * ramp.sign)


def _probabilities_by_row(scores: cute.Tensor, lse_raw: cute.Tensor, scale_log2: Float32, softcap: bool):
    """``scores`` (queries, keys) to P in place, or under a softcap to P ∘ (1 − t²), with the log-sum-exp of each row."""
    for r in range(cute.size(lse_raw)):
        if softcap:
            for c in range(cute.size(scores, mode=[1])):
                P = cute.math.exp2((scores[r, c] - lse_raw[r]) * scale_log2, fastmath=True)
                scores[r, c] = P * _slope(scores[r, c])
        else:
            row = scores[r, None]
            row.store(cute.math.exp2((row.load() - lse_raw[r]) * scale_log2, fastmath=True))


def _slope(t: Float32) -> Float32:
    """The softcap's slope at a score's tanh; where it is masked anything finite will do, since P is 0."""
    return softcap_slope(cutlass.max(t, Float32(-1.0)))


def _pair(values: cute.Tensor, c: int) -> cute.Tensor:
    """Two neighbours of a row in shared memory, read only when they are needed: all of it would take as many registers as a row
    of scores."""
    pair = cute.make_rmem_tensor(2, values.element_type)
    first = cute.make_tensor(values.iterator + values.layout(c), pair.layout)
    cute.autovec_copy(first, pair)
    return pair


def _keep(halves: cute.Tensor, row: int, column: int, ones: Uint32):
    """Of two neighbours in a row, 16 bits each in registers, those where ``ones`` has ones; others become 0."""
    place = cute.recast_ptr(halves.iterator + halves.layout((row, column)), dtype=Uint32)
    word = cute.make_tensor(place, cute.make_layout(1))
    word[0] = word[0] & ones


def _bit(n: int) -> int:
    """The n-th bit of words of 32, as an int32."""
    return (1 << n % 32) - (1 << 32) * (n % 32 == 31)
