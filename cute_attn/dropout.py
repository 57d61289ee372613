"""Dropout of probabilities: which are kept, written once for the kernels and the reference.

With probability p of being dropped, out_i = Σ_j m_ij · P_ij / (1 − p) · v_j, where m_ij is 0 or 1 and P the softmax of all
scores; the log-sum-exp knows nothing of it. m_ij depends on the call's seed and on where the score is (batch, head, row and
key, the last two within their sequence) and on nothing else: so it is the same in the forward and the backward pass, in tiles
of any size and shape, and for any mechanism.

**Which.** Philox-4×32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the fewest that
pass its tests) makes four words of 32 bits of a counter and a key of 64 bits, the seed. One counter serves eight scores, 16
bits each: rows i and i + 8 of 16, and every eighth key of 32. One thread has them all in the accumulators of queries × keys,
and a half of them in those of keys × queries, where a warp has 16 keys. A score is kept if its number is at least
``threshold(p)``: p is exact to 2⁻¹⁶.
"""

from __future__ import annotations

from typing import Any

import torch

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85
APART = 8  # rows, or keys, of the scores that share a counter
ROWS, KEYS = 2 * APART, 4 * APART  # so many from a multiple of these on have all their counters to themselves
BITS, WORD = 16, 0xFFFFFFFF


def threshold(p: float) -> int:
    """From which number of 16 bits on a probability is kept."""
    return min(round(p * 2.0**BITS), 2**BITS - 1)


def kept_scale(p: float) -> float:
    """What kept probabilities are multiplied by, 1 / (1 − p)."""
    return 1.0 / (1.0 - threshold(p) / 2.0**BITS)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A call's seed, int64 ``(1,)``, from torch's generator of the device: so what replays that (``torch.manual_seed``, a CUDA
    graph, a checkpoint) replays it."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


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
    return key, head, row, batch


def word_of(row, key):
    """Which of a counter's words has the number of a score, 0 to 3."""
    return key // ROWS % 2 * 2 + row // APART % 2


def is_upper(key):
    """Whether it is the word's upper half, 1, or its lower one, 0."""
    return key // APART % 2


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
    place = counter(batch, head, row - row % ROWS + row % APART, key - key % KEYS + key % APART)
    words = philox(place, (seed & WORD, (seed >> 32) & WORD), TensorWordOps)
    which = word_of(row, key)
    lower = torch.where(which % 2 == 1, words[1], words[0])
    upper = torch.where(which % 2 == 1, words[3], words[2])
    word = torch.where(which >= 2, upper, lower)
    return torch.where(is_upper(key) == 1, word >> BITS, word & (2**BITS - 1)) >= threshold(p)
