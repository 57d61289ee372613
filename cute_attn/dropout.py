"""Dropout of probabilities: which are kept, written once for the kernels and the reference.

With probability p of being dropped, out_i = Σ_j m_ij · P_ij / (1 − p) · v_j, where m_ij is 0 or 1 and P the softmax of all
scores; the log-sum-exp knows nothing of it. m_ij depends on the call's seed and on where the score is (batch, head, row and
key, the last two within their sequence) and on nothing else: so it is the same in the forward and the backward pass, in tiles
of any size and shape, and for any mechanism.

**Which.** Philox-4×32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the fewest that
pass its tests) makes four words of 32 bits of a counter and a key of 64 bits, the seed. One counter serves four scores: rows
i and i + 8 of 16, keys j and j + 8 of 16, which one thread has in every accumulator, transposed or not. A score is kept if its
word is at least ``threshold(p)``: p is exact to 2⁻³².
"""

from __future__ import annotations

from typing import Any

import torch

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85
APART = 8  # rows, or keys, of the scores that share a counter
TOGETHER = 2 * APART  # rows, or keys, from a multiple of this on, have all their counters to themselves
WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """From which word on a probability is kept."""
    return min(round(p * 2.0**32), WORD)


def kept_scale(p: float) -> float:
    """What kept probabilities are multiplied by, 1 / (1 − p)."""
    return 1.0 / (1.0 - threshold(p) / 2.0**32)


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
    """Of the four scores of which this is the one of the lower row and key."""
    return key, head, row, batch


def number(of_row, of_key):
    """Which of a counter's words is that of a score: whether its row, and its key, is the upper one of two (0 or 1)."""
    return 2 * of_row + of_key


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
    place = counter(batch, head, row & ~APART, key & ~APART)
    words = philox(place, (seed & WORD, (seed >> 32) & WORD), TensorWordOps)
    which = number((row & APART) // APART, (key & APART) // APART)
    lower = torch.where(which & 1 == 1, words[1], words[0])
    upper = torch.where(which & 1 == 1, words[3], words[2])
    return torch.where(which >= 2, upper, lower) >= threshold(p)
