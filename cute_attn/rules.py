"""Masks and score rules, each written once: the same functions run on torch tensors in the reference and on the DSL's
values inside a kernel.

They use operators only. What operators can't say (a maximum, a power of two) comes in as ``ops``: the reference passes
:class:`HostOps` and :class:`TensorOps`; a kernel ``cutlass``, or what ``mainloop/scores.py`` has.

**The band.** There is one mask. Query ``row`` is aligned with key ``row + shift``, ``shift = seqlen_k − seqlen_q``, so
that the last query is aligned with the last key (bottom-right). It sees the keys ``col`` with

    row + shift − left ≤ col ≤ row + shift + right,          0 ≤ col < seqlen_k.

``causal`` is ``right = 0``; a window bounds one or both sides; an unbounded side is ``None``. With ``lo = shift − left``
and ``hi = shift + right`` this is ``row + lo ≤ col ≤ row + hi``. Seen from a key it is a band as well:
``col − hi ≤ row ≤ col − lo`` (:meth:`Band.transposed`).

**The softcap** bounds a scaled score: ``cap · tanh(score / cap)`` (Gemma 2, arXiv:2408.00118, §2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# How far weights may grow over an anchor (softmax.py): beyond what sums of many of them have, and far below what float32 has.
GROWTH_LOG2 = 40


class HostOps:
    """The non-operator functions for Python numbers."""

    max = staticmethod(max)
    min = staticmethod(min)

    @staticmethod
    def tanh_of_product(x, factor):
        return math.tanh(x * factor)


class TensorOps:
    """The non-operator functions for torch tensors; the bound of a maximum or minimum is a number."""

    @staticmethod
    def max(x, bound):
        return x.clamp(min=bound)

    @staticmethod
    def min(x, bound):
        return x.clamp(max=bound)

    @staticmethod
    def tanh_of_product(x, factor):
        return (x * factor).tanh()


@dataclass(frozen=True)
class Band:
    """The visible band ``row + lo ≤ col ≤ row + hi``; ``None`` is an unbounded side. Ints or the DSL's Int32."""

    lo: Any
    hi: Any

    def transposed(self) -> Band:
        """The same band with the roles of rows and columns swapped: ``col − hi ≤ row ≤ col − lo``.

        Its ranges are of the queries (of ``seqlen_q``) that see keys ``first … last``.
        """
        return Band(None if self.hi is None else -self.hi, None if self.lo is None else -self.lo)

    def key_range(self, first, last, length, ops):
        """``(begin, end)``: outside these keys, of ``length``, the rows ``first … last`` see nothing.

        For a single row (``first = last``) these are just the keys it sees: this is the mask.
        """
        begin = first * 0 if self.lo is None else ops.max(first + self.lo, 0)
        end = length if self.hi is None else ops.min(last + self.hi + 1, length)
        return begin, end

    def whole_range(self, first, last, length, ops):
        """``(begin, end)``: every one of the rows ``first … last`` sees every key in it, so no mask is needed."""
        begin = first * 0 if self.lo is None else ops.max(last + self.lo, 0)
        end = length if self.hi is None else ops.min(first + self.hi + 1, length)
        return begin, end


# Up to here 1 − 2 / (1 + e^{2x}) will do for a kernel's tanh: it is off by up to 2.4e-7, however small x is, and the cap
# multiplies that; a 16-bit result forgives an exponent 1e-4.
USUAL_CAP = 128.0

# tanh(x) = x · P(x²) / Q(x²) for |x| up to TANH_END, minimax in the relative error, which is 1.7e-7; beyond, it is 1 − 2e-7.
# Powers of x² ascend.
TANH_END = 8.0
TANH_P = (0.9999998652372799, 0.12924136501858574, 0.0029493645629059275, 1.1410267054871942e-05)
TANH_Q = (1.0, 0.462573522003426, 0.023808814641598456, 0.00023843287621084827, 2.453405119249787e-07)


def rational_tanh(x, ops):
    """``tanh(x)`` in float32 with a small *relative* error, at most 5e-7, since a cap of any size multiplies it."""
    x = ops.clamp(x, TANH_END)
    square = x * x
    numerator, denominator = (_polynomial(square, powers) for powers in (TANH_P, TANH_Q))
    return x * numerator * ops.reciprocal(denominator)


def _polynomial(x, coefficients):
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def softcap_tanh(score, scale_by_cap, ops):
    """``tanh(score · scale / cap)``, which ``cap · log2 e`` then turns into a capped score in base 2."""
    return ops.tanh_of_product(score, scale_by_cap)


def softcap_slope(t):
    """The softcap's derivative, ``1 − tanh²``, from ``t = softcap_tanh(…)``: what one unit of a scaled score adds to the
    capped one."""
    return 1.0 - t * t


def score_scales(scale: float, softcap: float) -> tuple[float, float]:
    """``(scale_log2, scale_by_cap)``: a raw score s becomes ``s · scale_log2`` in base 2, or, under a softcap,
    ``softcap_tanh(s, scale_by_cap) · scale_log2``."""
    if softcap > 0.0:
        return softcap * LOG2_E, scale / softcap
    return scale * LOG2_E, 0.0
