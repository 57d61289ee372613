"""Dropout of probabilities: which are kept, written once for the kernels and the reference.

With probability p of being dropped, out_i = Σ_j m_ij · P_ij / (1 − p) · v_j, where m_ij is 0 or 1 and P the softmax of all
scores; the log-sum-exp knows nothing of it. m_ij depends on the call's seed and on where the score is (batch, head, row and
key, the last two within their sequence) and on nothing else: so it is the same in the forward and the backward pass, in tiles
of any size and shape, and for any mechanism.

**Which.** Philox-4×32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the fewest that
pass its tests) makes four words of 32 bits of a counter and a key of 64 bits, the seed. One counter serves the eight scores of
16 rows and 16 keys that one thread has in an accumulator: rows i and i + 8, keys j, j + 1, j + 8 and j + 9, j even. A word is
two neighbouring keys', 15 bits each, of which a number from 0 on is made; a score is kept if it is at least p · 2¹⁵, or, for p
above 1/2, below (1 − p) · 2¹⁵: p is exact to 2⁻¹⁶. So numbers can be compared as floats of 16 bits, two at a time: these are in
the same order, as far as what they are compared with, at most 2.0.
"""

from __future__ import annotations

from typing import Any

import torch

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85
APART = 8  # rows, or keys, of the scores that share a counter
SIDE = 2 * APART  # so many rows and keys from multiples of it on have all their counters to themselves
HALF, BITS, WORD = 16, 15, 0xFFFFFFFF


def threshold(p: float) -> int:
    """From which number n ≥ 0 on a probability is kept, or, as ~n, below which."""
    return round(p * 2.0**BITS) if p <= 0.5 else ~max(round((1.0 - p) * 2.0**BITS), 1)


def rate(p: float) -> float:
    """The share of probabilities that are dropped, p as it is met."""
    n = threshold(p)
    return n / 2.0**BITS if n >= 0 else 1.0 - ~n / 2.0**BITS


def kept_scale(p: float) -> float:
    """What kept probabilities are multiplied by, 1 / (1 − p)."""
    return 1.0 / (1.0 - rate(p))


def draw_seed(like: torch.Tensor) -> torch.Tensor:
    """A call's seed, int64 ``(1,)``, from torch's generator of a tensor's device: so what replays that (``torch.manual_seed``,
    a CUDA graph, a checkpoint) replays it. That of a fake tensor is fake."""
    return like.new_empty(1, dtype=torch.int64).random_()


def philox(counter: tuple, key: tuple, ops: Any) -> tuple:
    """The four words of a counter of four words under a key of two. ``ops.product(x, constant)`` is the upper and the lower
    word of a product, ``ops.sum(x, constant)`` the lower word of a sum."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for n in range(ROUNDS):
        if n:
            k0, k1 = (ops.sum(k, increment) for k, increment in zip((k0, k1), INCREMENTS, strict=True))
        (high_0, low_0), (high_2, low_2) = (ops.product(c, m) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
    return c0, c1, c2, c3


def counter(batch, head, row, key) -> tuple:
    """Of the eight scores of which this is the one of the lowest row and key."""
    return row, key, head, batch


def word_of(row, key):
    """Which of a counter's words has the number of a score, 0 to 3."""
    return key // APART % 2 * 2 + row // APART % 2


class TensorWordOps:
    """The operations for torch tensors: words are int64."""

    @staticmethod
    def product(x, constant: int):
        low, high = x * (constant & 0xFFFF), x * (constant >> 16)  # below 2⁴⁸
        total = (low >> 16) + high
        return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)

    @staticmethod
    def sum(x, constant: int):
        return (x + constant) & WORD


def kept(seed: torch.Tensor, p: float, batch, head, row, key) -> torch.Tensor:
    """Which probabilities are kept, bool: tensors of positions, int64, that broadcast against one another; ``seed`` is
    :func:`draw_seed`'s."""
    place = counter(batch, head, row - row // APART % 2 * APART, key - key // APART % 2 * APART - key % 2)
    words = philox(place, (seed & WORD, (seed >> 32) & WORD), TensorWordOps)
    which = word_of(row, key)
    lower = torch.where(which % 2 == 1, words[1], words[0])
    upper = torch.where(which % 2 == 1, words[3], words[2])
    word = torch.where(which >= 2, upper, lower)
    number, n = torch.where(key % 2 == 1, word >> HALF, word) & (2**BITS - 1), threshold(p)
    return number >= n if n >= 0 else number < ~n
