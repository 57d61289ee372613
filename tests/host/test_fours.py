"""How four keys of a query come from memory to a warp's scores, and back: a warp's 32 threads as vectors of numpy."""

import numpy as np
import pytest

pytest.importorskip("cutlass")
from cutlass import cute

from cute_attn.mainloop import fours

LANES = np.arange(32)
ROW, PAIR = LANES // 4, LANES % 4 * 2  # a thread's row of a matrix of 8 × 8, and the first of its two columns
VALUES = np.random.default_rng(0).permutation(16 * 8).reshape(16, 8).astype(np.uint32)  # of 16 keys × 8 queries


def words(lower, upper):
    return lower | upper << 16


def transposed(word):
    matrix = np.stack([word & 0xFFFF, word >> 16], axis=1).reshape(8, 8).T.reshape(32, 2)
    return words(matrix[:, 0], matrix[:, 1])


@pytest.fixture(autouse=True)
def warp(monkeypatch):
    monkeypatch.setattr(cute.arch, "lane_idx", lambda: LANES)
    monkeypatch.setattr(cute.arch, "shuffle_sync_bfly", lambda x, bit: x[LANES ^ bit])
    monkeypatch.setattr(fours, "transposed", transposed)
    monkeypatch.setattr(fours, "either", np.where)


def test_four_keys_go_to_memory_and_back():
    low, high = (words(VALUES[key, PAIR], VALUES[key, PAIR + 1]) for key in (ROW, ROW + 8))
    to_query, to_key = fours.offsets()
    query, key = PAIR + to_query, ROW + to_key
    assert not (key % 4).any()  # an address of 8 bytes
    assert len(set(zip(query, key, strict=True))) == 32
    found = fours.to_memory(low, high)
    for i, word in enumerate(found):
        assert (word == words(VALUES[key + 2 * i, query], VALUES[key + 2 * i + 1, query])).all()
    for got, want in zip(fours.from_memory(*found), (low, high), strict=True):
        assert (got == want).all()
