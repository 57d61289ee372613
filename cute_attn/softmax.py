"""Online softmax, one tile at a time, in base 2.

With **raw** scores s, which are as the product Q·K and the rules leave them, ``scale_log2`` to scale them to base 2, and a
running row maximum m and row sum l (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135):

    m' = max(m, max_j s_j),   a = 2^((m − m') · scale_log2),   p_j = 2^((s_j − m') · scale_log2),   l' = a·l + Σ_j p_j

so that O' = a·O + p·V, and in the end O / l is the output and (m · scale_log2 + log2 l) · ln 2 the log-sum-exp. Each thread
keeps the sum of its own columns; the quad that shares a row adds up once, at the end.

**Large scores.** One fused multiply-add makes an exponent of a score, s · scale_log2 less m · scale_log2, which was rounded;
so the largest score of a row does not weigh 1, but 2^off, where ``off`` is that rounding. This cancels in O / l as far as P
is exact; but P is rounded to the operands' dtype before P·V, and l is not, so that a row with one key that outweighs all
others would not give just that key's value, once scores are so large (from 2¹² on) that 2^off rounds to anything but 1.
Therefore, in the end, l counts the largest score as P·V did (:meth:`Softmax.finish`). Where a unit in the last place of an
exponent comes close to 1 (from 2²² on), the scale is cut to a power of two, which makes m · scale exact: there a difference
that is not 0 is larger than any that leaves a weight. All this costs a register a row; where registers are scarcer than
instructions, the difference comes first (``fused=False``), and the largest score weighs 1 to begin with.

**Anchored.** What P is taken from need not be the maximum: any m gives the same O / l, as long as nothing overflows. So once a
row has seen keys, m may stay where it is (:meth:`Softmax.anchored_step`): no maximum is looked for, and nothing is rescaled.
bfloat16 has float32's range. Where weights have grown past 2⁴⁰ after all, that shows in l (:meth:`Softmax.note_growth`), and
whoever anchors has to do such rows again, by steps that ``hold`` m as long as no weight grows past 2⁴¹. They give a row that
has not grown the bits that it had, so that it doesn't matter to a row what others of its block have seen.

The backward pass takes the log-sum-exp in raw units, ``lse_raw = m + log2 l / scale_log2``, straight from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.layouts.fragments import THREADS_PER_ROW
from cute_attn.rules import GROWTH_LOG2, LN_2, LOG2_E

COARSE_FROM = 2.0**22  # the exponent, in base 2, of a row's largest score
EXPONENT_BITS = 0x7F800000  # of a float32


@dataclass(frozen=True)
class LogSumExp:
    """The log-sum-exp of rows: in registers those of a thread, (rows), or in global memory ``(seqlen_q, heads, batch)``, where
    what nobody asked for is ``None``.

    ``natural`` is what users get, −∞ for a row that sees no key; ``raw`` is what the backward pass gets, in the units of a
    raw score, +∞ for such a row, so that it weighs nothing there.
    """

    natural: cute.Tensor | None
    raw: cute.Tensor | None

    @staticmethod
    def like(rows: cute.Tensor) -> LogSumExp:
        """Registers for as many rows."""
        return LogSumExp(*(cute.make_rmem_tensor_like(rows) for _ in range(2)))


@dataclass(frozen=True)
class Softmax:
    """The running state of the rows a thread holds: ``row_max`` of raw scores, ``row_sum`` of this thread's columns."""

    row_max: cute.Tensor  # (rows)
    row_sum: cute.Tensor  # (rows)
    scale_log2: Float32
    coarse: Float32  # the power of two below it
    coarse_from: Float32  # the largest score of a row from which on that is taken
    fused: cutlass.Constexpr[bool]  # whether an exponent is one fused multiply-add
    grown: cute.Tensor  # (1), int32: whether a row's weights have

    @staticmethod
    def start(rows: int, scale_log2: Float32, fused: bool) -> Softmax:
        coarse = (scale_log2.bitcast(Int32) & EXPONENT_BITS).bitcast(Float32)
        coarse_from = COARSE_FROM * cute.arch.rcp_approx(scale_log2)
        of_rows = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
        softmax = Softmax(*of_rows, scale_log2, coarse, coarse_from, fused, cute.make_rmem_tensor(1, Int32))
        softmax.reset()
        return softmax

    def reset(self):
        """Rows that have seen no key."""
        self.row_max.fill(-Float32.inf)
        self.row_sum.fill(0.0)
        self.grown.fill(0)

    @cute.jit
    def step(self, scores: cute.Tensor, rescale: cute.Tensor, hold: Boolean | None = None, begins: cute.Tensor | None = None):
        """One tile: turns ``scores`` (rows, columns) into P in place and writes each row's factor a to ``rescale``. With
        ``hold`` m stays if it can. ``begins`` is what all of a thread's scores of a row lack in this tile."""
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            row = scores[r, None]
            old = self.row_max[r]
            if cutlass.const_expr(begins is None):
                new = _quad_max(_tree(row, cute.arch.fmax, old))
            else:  # which is another number in each thread of a quad
                new = cute.arch.fmax(old, _quad_max(_tree(row, cute.arch.fmax, -Float32.inf) + begins[r]))
            if cutlass.const_expr(hold is not None):
                new = old if hold & ((new - old) * self._scale(old) <= GROWTH_LOG2 + 1) else new
            anchor = anchored(new)
            scale = self._scale(anchor)
            of_tile = anchor if begins is None else anchor - begins[r]
            row.store(cute.math.exp2(self._exponents(row.load(), of_tile, scale), fastmath=True))
            a = cute.math.exp2((old - anchor) * scale, fastmath=True)
            self.row_max[r] = new
            self.row_sum[r] = _tree(row, lambda x, y: x + y, self.row_sum[r] * a)
            rescale[r] = a

    @cute.jit
    def anchored_step(self, scores: cute.Tensor, begins: cute.Tensor | None = None):
        """The same from the maximum of the tiles before, which stays. All rows must have seen a key."""
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            row, anchor = scores[r, None], self.row_max[r]
            of_tile = anchor if begins is None else anchor - begins[r]
            row.store(cute.math.exp2(self._exponents(row.load(), of_tile, self._scale(anchor)), fastmath=True))
            self.row_sum[r] = _tree(row, lambda x, y: x + y, self.row_sum[r])

    @cute.jit
    def note_growth(self):
        """Whether weights of a row have grown so far that m should not have stayed. (A sum that is NaN has, too.)"""
        for r in cutlass.range_constexpr(cute.size(self.row_sum)):
            if not self.row_sum[r] < 2.0**GROWTH_LOG2:
                self.grown[0] = Int32(1)

    def _exponents(self, scores, anchor: Float32, scale: Float32):
        return scores * scale - anchor * scale if self.fused else (scores - anchor) * scale

    @cute.jit
    def _scale(self, anchor: Float32):
        """To base 2, of a row whose largest score is ``anchor``."""
        scale = self.scale_log2
        if cutlass.const_expr(self.fused):
            scale = scale if cute.math.absf(anchor) < self.coarse_from else self.coarse
        return scale

    @cute.jit
    def finish(
        self,
        normalize: cute.Tensor,
        lse: LogSumExp,
        dtype: cutlass.Constexpr,
        sink: Float32 | None = None,
        kept_scale: Float32 | None = None,
    ):
        """After the last tile: writes 1 / l (0 for a row that saw no key) and the log-sum-exp of each row. ``dtype`` is what P
        was rounded to. A ``sink`` is one more logit of those that saw a key; l is in units of the larger of the two, whichever
        that is. ``kept_scale`` is what dropout multiplies kept probabilities by."""
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=THREADS_PER_ROW)
            seen = total != 0.0  # true for NaN: a NaN in q or in a visible key shows
            safe = total if seen else Float32(1.0)
            anchor, scale = self.row_max[r], self._scale(self.row_max[r])
            off_log2, weights = Float32(0.0), safe
            if cutlass.const_expr(self.fused):
                off_log2 = _fused(anchor, scale, -(anchor * scale))
                largest = cute.math.exp2(off_log2, fastmath=True)
                weights = safe + (largest.to(dtype).to(Float32) - largest)
            unit_log2, unit = Float32(0.0), Float32(1.0)
            if cutlass.const_expr(sink is not None):
                unit_log2, unit, of_sink = _of_sink(sink, anchor, self.scale_log2)
                safe, weights = safe * unit + of_sink, weights * unit + of_sink
            normalize[r] = cute.arch.rcp_approx(weights) if seen else Float32(0.0)
            sum_log2 = cute.math.log2(safe, fastmath=True)
            if cutlass.const_expr(sink is not None):
                normalize[r] = normalize[r] * unit
                sum_log2 += unit_log2
            if cutlass.const_expr(kept_scale is not None):
                normalize[r] = normalize[r] * kept_scale
            natural = (anchor * self.scale_log2 + sum_log2) * LN_2
            raw = anchor + (sum_log2 - off_log2) * cute.arch.rcp_approx(scale)
            lse.natural[r] = natural if seen else -Float32.inf
            lse.raw[r] = raw if seen else Float32.inf


@cute.jit
def anchored(row_max: Float32):
    """What a row's weights are counted from. One that has seen no key yet has m = −inf; 0 in its place keeps −inf − −inf from
    making a NaN."""
    return Float32(0.0) if row_max == -Float32.inf else row_max


@cute.jit
def finished(row_max: Float32, row_sum: Float32, scale_log2: Float32, sink: Float32 | None = None):
    """``(1 / l, log-sum-exp)`` of a row from its maximum of raw scores and its sum, as :meth:`Softmax.finish` has them; 0 and
    −∞ of one that saw no key."""
    seen = row_sum != 0.0
    total = row_sum if seen else Float32(1.0)
    unit_log2, unit = Float32(0.0), Float32(1.0)
    if cutlass.const_expr(sink is not None):
        unit_log2, unit, of_sink = _of_sink(sink, row_max, scale_log2)
        total = total * unit + of_sink
    normalize = cute.arch.rcp_approx(total) * unit if seen else Float32(0.0)
    lse = (row_max * scale_log2 + unit_log2 + cute.math.log2(total, fastmath=True)) * LN_2
    return normalize, lse if seen else -Float32.inf


def _of_sink(sink: Float32, row_max: Float32, scale_log2: Float32) -> tuple[Float32, Float32, Float32]:
    """Of a row with a sink: how far the larger of its largest score and the sink is from that score, to base 2; what weights
    were counted in, in units of that; and what the sink weighs."""
    ahead_log2 = sink * LOG2_E - anchored(row_max) * scale_log2  # a sink of −∞ is none
    unit_log2 = cutlass.max(ahead_log2, Float32(0.0))
    unit = cute.math.exp2(-unit_log2, fastmath=True)
    return unit_log2, unit, cute.math.exp2(ahead_log2 - unit_log2, fastmath=True)


def _fused(a: Float32, b: Float32, c: Float32) -> Float32:
    """``a · b + c`` with one rounding, whatever the compiler makes of the same expression elsewhere."""
    return cute.arch.inline_ptx("fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c])


def scale_rows(acc: cute.Tensor, factor: cute.Tensor):
    """``acc[r, :] *= factor[r]`` on a (rows, columns) view."""
    for r in range(cute.size(factor)):
        acc[r, None].store(acc[r, None].load() * factor[r])


def _quad_max(x: Float32) -> Float32:
    return cute.arch.warp_reduction_max(x, threads_in_group=THREADS_PER_ROW)


def _tree(row: cute.Tensor, combine, start: Float32) -> Float32:
    """Reduce a row over four independent chains, so that the next operation need not wait for the last one."""
    n = cute.size(row)
    chains = [combine(start, row[0]), row[1], row[2], row[3]]
    for i in range(4, n):
        chains[i % 4] = combine(chains[i % 4], row[i])
    return combine(combine(chains[0], chains[1]), combine(chains[2], chains[3]))
