"""The scores of a tile: what the rules make of the products Q·K, and, in the backward pass, the probabilities and gradients
that follow. The only door between a product and P or dS, and the only place in the kernels that knows what changes a score.

With the log-sum-exp in raw units and the difference first, P = 2^((s − lse_raw) · scale_log2) is exactly 1 where one key
outweighs all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.layouts.fragments import rows_columns
from cute_attn.mainloop.common import DeviceOps, Values
from cute_attn.mainloop.elements import Elements
from cute_attn.mainloop.guard import HIDDEN
from cute_attn.rules import LN_2, LOG2_E, rational_tanh, softcap_slope, softcap_tanh


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


@dataclass(frozen=True)
class Scores:
    """The scores of the tiles of one sequence, ``(queries, keys)``, or, ``transposed``, ``(keys, queries)``; ``where`` says
    which of a tile a thread has. A rule that changes scores has its place in these methods, and nowhere else in the kernels."""

    where: Coordinates
    values: Values
    problem: cutlass.Constexpr
    transposed: cutlass.Constexpr[bool] = False

    @cute.jit
    def apply_rules(self, acc: cute.Tensor, origin, masked, hidden=None):
        """An accumulator's products to scores, in place, −inf where a query does not see a key.

        ``origin`` is the tile's first row and column in the sequence. ``masked`` is a Python bool where the loop knows it, a
        run-time Boolean where it doesn't. ``hidden`` is None, or (whether there are hidden keys, what says which of the
        thread's keys are): see ``guard.py``.

        A user's score is computed here in the forward pass, and in the backward pass in :meth:`probabilities`, with its slope.
        """
        scores = rows_columns(acc)
        self._cap(scores)
        if cutlass.const_expr(self.problem.expression.score is not None and not self.problem.gradients):
            self._score(scores, self._elements(origin))
        if cutlass.const_expr(hidden is not None):
            if hidden[0]:
                self._hide(scores, hidden[1])
        if cutlass.const_expr(self.problem.masks_all):
            self._mask(scores, origin)
        elif cutlass.const_expr(not isinstance(masked, bool)):
            if masked:
                self._mask(scores, origin)
        elif cutlass.const_expr(masked):
            self._mask(scores, origin)

    def probabilities(self, acc: cute.Tensor, lse_raw: cute.Tensor, dtype, origin) -> cute.Tensor:
        """An accumulator's scores to P in place; returns it, for dV. Where a rule has a slope, to P ∘ the slopes, which is what
        dS takes, and P itself, which is returned, is in ``dtype``. Both at once, since P, its slopes and dP together would take
        more registers than there are. ``lse_raw`` is the log-sum-exp of a thread's queries, in shared memory if transposed."""
        scale_log2, softcap, scores = self.values.scale_log2, self.problem.softcap, rows_columns(acc)
        if self.problem.expression.score is not None:
            rounded = acc
            if self.transposed and (softcap or self.problem.expression.slope is not None):
                rounded = cute.make_rmem_tensor_like(acc, dtype)
            self._changed_probabilities(scores, lse_raw, origin, None if rounded is acc else rows_columns(rounded))
            return rounded
        if not self.transposed:
            _probabilities_by_row(scores, lse_raw, scale_log2, softcap)
        elif softcap:
            rounded = cute.make_rmem_tensor_like(acc, dtype)
            _capped_probabilities(scores, lse_raw, scale_log2, rows_columns(rounded))
            return rounded
        else:
            _probabilities(scores, lse_raw, scale_log2)
        return acc

    def gradients(self, acc: cute.Tensor, acc_dP: cute.Tensor, delta: cute.Tensor):
        """An accumulator's P (∘ the slopes) to dS = P ∘ (dP − delta) in place, with the delta of each query."""
        P, dP = rows_columns(acc), rows_columns(acc_dP)
        if self.transposed:
            _gradients(P, dP, delta)
        else:
            for r in range(cute.size(delta)):
                P[r, None].store(P[r, None].load() * (dP[r, None].load() - delta[r]))

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
                return first + self.where.zero[0, c][1]
            row = origin[0] + self.where.thread[r, 0][0]
            if name == rows:
                return self.values.query(row)
            if name == "shift":
                return self.values.seqlen_k - self.values.seqlen_q
            return self.values.head_of(row) if name == "head" else self.values.sequence

        return Elements(self.problem.expression, self.values.captured, leaf, along_rows, columns)

    def _each(self, scores: cute.Tensor):
        """(row, column) of a thread's scores, column by column: what is known of a column is needed twice and then no more."""
        rows, columns = (cute.size(scores, mode=[mode]) for mode in range(2))
        return ((r, c) for c in range(columns) for r in range(rows))

    def _score(self, scores: cute.Tensor, elements: Elements):
        """Scores to what the user's function makes of them, natural logarithms."""
        natural = self.values.scale_log2 * LN_2
        for r, c in self._each(scores):
            scores[r, c] = elements.value(self.problem.expression.score, r, c, scores[r, c] * natural)

    def _changed_probabilities(self, scores: cute.Tensor, lse_raw: cute.Tensor, origin, rounded: cute.Tensor | None):
        """``scores`` before the user's function, −∞ or as low as a hidden key's where they don't count, to P ∘ the slopes in
        place; ``rounded`` gets P."""
        elements, expression, natural = self._elements(origin), self.problem.expression, self.values.scale_log2 * LN_2
        pairs = _pairs(lse_raw) if self.transposed else ((c, None) for c in range(0, cute.size(scores, mode=[1]), 2))
        for c, pair in pairs:
            for r in range(cute.size(scores, mode=[0])):
                P = cute.make_rmem_tensor(2, Float32)
                for i in range(2):
                    score, lse = scores[r, c + i], pair[i] if self.transposed else lse_raw[r]
                    counts = score > HIDDEN
                    changed = _select(counts, elements.value(expression.score, r, c + i, score * natural), score)
                    P[i] = cute.math.exp2((changed - lse) * LOG2_E, fastmath=True)
                    slopes = P[i] * _slope(score) if self.problem.softcap else P[i]
                    if expression.slope is not None:
                        slope = elements.value(expression.slope, r, c + i, score * natural)
                        slopes = slopes * _select(counts, slope, Float32(0.0))
                    scores[r, c + i] = slopes
                if rounded is not None:
                    place = rounded.iterator + rounded.layout((r, c))
                    cute.make_tensor(place, P.layout).store(P.load().to(rounded.element_type))

    @cute.jit
    def _hide(self, scores: cute.Tensor, hidden: cute.Tensor):
        """The scores of hidden keys, so low that they weigh nothing; ``hidden`` is of a thread's keys."""
        for i in cutlass.range_constexpr(cute.size(hidden)):
            if hidden[i] != 0:
                scores[(i, None) if self.transposed else (None, i)].fill(HIDDEN)

    def _mask_by_function(self, scores: cute.Tensor, elements: Elements):
        for r, c in self._each(scores):
            scores[r, c] = _select(elements.value(self.problem.expression.mask, r, c), scores[r, c], Float32(-Float32.inf))

    @cute.jit
    def _mask(self, scores: cute.Tensor, origin):
        """One comparison an edge and score, against a compile-time column. Of keys by queries, rows past the last are masked as
        well: queries past theirs weigh nothing anyway."""
        band, values = self.values.band(self.problem), self.values
        if cutlass.const_expr(self.problem.masks_all):
            self._mask_by_function(scores, self._elements(origin))
        columns, rows = values.seqlen_k, None
        if cutlass.const_expr(self.transposed):
            band, columns, rows = band.transposed(), values.seqlen_q, values.seqlen_k
        column_first = origin[1] + self.where.thread[0, 0][1]
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            row = self.values.query(origin[0] + self.where.thread[r, 0][0])
            begin, end = band.key_range(row, row, columns, DeviceOps)
            if cutlass.const_expr(rows is not None):
                end = end if row < rows else 0
            begin, end = begin - column_first, end - column_first
            for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
                column = self.where.zero[0, c][1]
                visible = column < end
                if cutlass.const_expr(band.lo is not None):
                    visible = visible & (column >= begin)
                scores[r, c] = scores[r, c] if visible else -Float32.inf


def _probabilities(scores: cute.Tensor, lse_raw: cute.Tensor, scale_log2: Float32):
    """``scores`` (keys, queries) to P in place, with the log-sum-exp of each query in shared memory."""
    for c, lse in _pairs(lse_raw):
        for r in range(cute.size(scores, mode=[0])):
            for i in range(2):
                scores[r, c + i] = cute.math.exp2((scores[r, c + i] - lse[i]) * scale_log2, fastmath=True)


def _capped_probabilities(t: cute.Tensor, lse_raw: cute.Tensor, scale_log2: Float32, rounded: cute.Tensor):
    """The same under a softcap: ``t``, the tanh of a score or −∞ where it is masked, to P ∘ (1 − t²); ``rounded`` gets P."""
    for c, lse in _pairs(lse_raw):
        for r in range(cute.size(t, mode=[0])):
            P = cute.make_rmem_tensor(2, Float32)
            for i in range(2):
                P[i] = cute.math.exp2((t[r, c + i] - lse[i]) * scale_log2, fastmath=True)
                t[r, c + i] = P[i] * _slope(t[r, c + i])
            place = rounded.iterator + rounded.layout((r, c))
            cute.make_tensor(place, P.layout).store(P.load().to(rounded.element_type))


def _gradients(P: cute.Tensor, dP: cute.Tensor, delta: cute.Tensor):
    """P (keys, queries) to dS in place, with the delta of each query in shared memory."""
    for c, of_query in _pairs(delta):
        for r in range(cute.size(P, mode=[0])):
            for i in range(2):
                P[r, c + i] = P[r, c + i] * (dP[r, c + i] - of_query[i])


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


@cute.jit
def _select(condition, x, y):
    return x if condition else y


def _pairs(values: cute.Tensor):
    """The values of a row in shared memory, two neighbours at a time, read only when they are needed: all of them would
    take as many registers as a row of scores."""
    for c in range(0, cute.size(values), 2):
        pair = cute.make_rmem_tensor(2, values.element_type)
        first = cute.make_tensor(values.iterator + values.layout(c), pair.layout)
        cute.autovec_copy(first, pair)
        yield c, pair
