"""Online softmax, one tile at a time, in base 2.

With scores s already multiplied by nothing but Q·K, ``scale_log2 = scale · log2 e`` and a running row maximum m and
row sum l (Milakov and Gimelshein, arXiv:1805.02867; FlashAttention, arXiv:2205.14135):

    m' = max(m, max_j s_j),   a = 2^((m − m') · scale_log2),   p_j = 2^((s_j − m') · scale_log2),   l' = a·l + Σ_j p_j

so that O' = a·O + p·V, and in the end O / l is the output and m · scale + ln l the log-sum-exp. Each thread keeps the sum
of its own columns; the quad that shares a row adds up once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Float32, cute

from cute_attn.layouts.fragments import THREADS_PER_ROW
from cute_attn.rules import LN_2, softcap_slope


@dataclass(frozen=True)
class Softmax:
    """The running state of the rows a thread holds: ``row_max`` of raw scores, ``row_sum`` of this thread's columns."""

    row_max: cute.Tensor  # (rows)
    row_sum: cute.Tensor  # (rows)
    scale_log2: Float32

    @staticmethod
    def start(rows: int, scale_log2: Float32) -> Softmax:
        row_max = cute.make_rmem_tensor(rows, Float32)
        row_sum = cute.make_rmem_tensor(rows, Float32)
        row_max.fill(-Float32.inf)
        row_sum.fill(0.0)
        return Softmax(row_max, row_sum, scale_log2)

    @cute.jit
    def step(self, scores: cute.Tensor, rescale: cute.Tensor):
        """One tile: turns ``scores`` (rows, columns) into P in place and writes each row's factor a to ``rescale``."""
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            row = scores[r, None]
            old = self.row_max[r]
            new = _quad_max(_tree(row, cute.arch.fmax, old))
            # A row that has seen no key yet has m = −inf; 0 in its place keeps −inf − −inf from making a NaN.
            anchor = Float32(0.0) if new == -Float32.inf else new
            anchor_log2 = anchor * self.scale_log2
            row.store(cute.math.exp2(row.load() * self.scale_log2 - anchor_log2, fastmath=True))
            a = cute.math.exp2(old * self.scale_log2 - anchor_log2, fastmath=True)
            self.row_max[r] = new
            self.row_sum[r] = _tree(row, lambda x, y: x + y, self.row_sum[r] * a)
            rescale[r] = a

    @cute.jit
    def finish(self, normalize: cute.Tensor, lse: cute.Tensor):
        """After the last tile: writes 1 / l (0 for a row that saw no key) and the natural log-sum-exp of each row."""
        for r in cutlass.range_constexpr(cute.size(self.row_max)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=THREADS_PER_ROW)
            seen = total != 0.0  # true for NaN: a NaN in q or in a visible key shows
            safe = total if seen else Float32(1.0)
            normalize[r] = cute.arch.rcp_approx(safe) if seen else Float32(0.0)
            natural = (self.row_max[r] * self.scale_log2 + cute.math.log2(safe, fastmath=True)) * LN_2
            lse[r] = natural if seen else -Float32.inf


def probabilities(scores: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32):
    """For the backward pass, transposed: ``scores`` (keys, queries) to P = 2^(s · scale_log2 − lse_log2) in place, with
    the log-sum-exp of each query, in base 2, in shared memory."""
    for c, lse in _pairs(lse_log2):
        for r in range(cute.size(scores, mode=[0])):
            for i in range(2):
                scores[r, c + i] = cute.math.exp2(scores[r, c + i] * scale_log2 - lse[i], fastmath=True)


def capped_probabilities(t: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32, rounded: cute.Tensor):
    """The same under a softcap: ``t`` (keys, queries), the tanh of a score or −∞ where it is masked, to P ∘ (1 − t²) in
    place, which is what dS takes; ``rounded`` gets P itself, in 16 bits, for dV. Both at once, since P, its slopes and dP
    together would take more registers than there are."""
    for c, lse in _pairs(lse_log2):
        for r in range(cute.size(t, mode=[0])):
            P = cute.make_rmem_tensor(2, Float32)
            for i in range(2):
                P[i] = cute.math.exp2(t[r, c + i] * scale_log2 - lse[i], fastmath=True)
                t[r, c + i] = P[i] * _slope(t[r, c + i])
            place = rounded.iterator + rounded.layout((r, c))
            cute.make_tensor(place, P.layout).store(P.load().to(rounded.element_type))


def score_gradients(P: cute.Tensor, dP: cute.Tensor, delta: cute.Tensor):
    """For the backward pass, transposed: P (keys, queries) to dS = P ∘ (dP − delta) in place, with the delta of each
    query in shared memory."""
    for c, of_query in _pairs(delta):
        for r in range(cute.size(P, mode=[0])):
            for i in range(2):
                P[r, c + i] = P[r, c + i] * (dP[r, c + i] - of_query[i])


def probabilities_by_row(scores: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32, softcap: bool):
    """``scores`` (queries, keys) to P in place, or under a softcap to P ∘ (1 − t²), with the log-sum-exp of each row."""
    for r in range(cute.size(lse_log2)):
        if softcap:
            for c in range(cute.size(scores, mode=[1])):
                P = cute.math.exp2(scores[r, c] * scale_log2 - lse_log2[r], fastmath=True)
                scores[r, c] = P * _slope(scores[r, c])
        else:
            row = scores[r, None]
            row.store(cute.math.exp2(row.load() * scale_log2 - lse_log2[r], fastmath=True))


def score_gradients_by_row(P: cute.Tensor, dP: cute.Tensor, delta: cute.Tensor):
    """P (queries, keys) to dS = P ∘ (dP − delta) in place, with the delta of each row."""
    for r in range(cute.size(delta)):
        P[r, None].store(P[r, None].load() * (dP[r, None].load() - delta[r]))


def _slope(t: Float32) -> Float32:
    """The softcap's slope at a score's tanh; where it is masked anything finite will do, since P is 0."""
    return softcap_slope(cutlass.max(t, Float32(-1.0)))


def _pairs(values: cute.Tensor):
    """The values of a row in shared memory, two neighbours at a time, read only when they are needed: all of them would
    take as many registers as a row of scores."""
    for c in range(0, cute.size(values), 2):
        pair = cute.make_rmem_tensor(2, values.element_type)
        first = cute.make_tensor(values.iterator + values.layout(c), pair.layout)
        cute.autovec_copy(first, pair)
        yield c, pair


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
