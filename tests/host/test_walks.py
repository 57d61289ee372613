"""The walk of a query tile over its keys, and of a warpgroup's part of it: which tiles are visited, masked, and taken without a
maximum, on plain numbers against the band itself."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cutlass.cute")

from cute_attn.mainloop.common import Values
from cute_attn.mainloop.walk import KeyTiles
from cute_attn.problem import Problem

ROWS = 64  # of a warpgroup
lengths = st.integers(1, 700)
tiles = st.sampled_from([64, 128, 192])


@given(lengths, lengths, st.none() | st.integers(0, 500), st.none() | st.integers(0, 300), tiles, tiles)
def test_a_warpgroups_walk(q, k, left, right, tile_m, tile_n):
    """Its rows find all their keys, and a mask where some of them don't see all of a tile; elsewhere there is none, but in one
    tile at most that has to show them a key first."""
    problem = Problem("bfloat16", 128, 128, bounded_left=left is not None, bounded_right=right is not None)
    config, alone = SimpleNamespace(tile_m=tile_m, tile_n=tile_n), SimpleNamespace(tile_m=ROWS, tile_n=tile_n)
    values = Values(q, k, 0 if left is None else k - q - left, 0 if right is None else k - q + right, 1.0, 0.0)

    def keys_of(row):
        begin = 0 if left is None else max(row + values.lo, 0)
        return range(begin, k if right is None else min(row + values.hi + 1, k))

    for first in range(0, q, ROWS):
        of_all = KeyTiles.of(values, problem, first // tile_m, config)
        if of_all.count == 0:
            continue
        keys, skipped = of_all.of_rows(values, problem, first, ROWS, config)
        keys = keys.after_a_seen_key(values, problem, first // ROWS, alone)
        rows = [keys_of(row) for row in range(first, min(first + ROWS, q))]
        assert skipped + keys.count == of_all.count
        assert keys.count > 0
        assert all(seen.stop <= keys.end for seen in rows if seen)
        before = set(range(keys.begin + keys.count * tile_n, k))  # what tiles nearer to the end have
        assert not any(before & set(seen) for seen in rows)
        assert all(seen.start >= keys.begin for seen in rows if seen)
        needless = 0
        for n in reversed(range(keys.count)):
            of_tile = range(keys.first_key(n, tile_n), keys.first_key(n, tile_n) + tile_n)
            whole = of_tile.stop <= k
            whole &= all(seen and seen.start <= of_tile.start and of_tile.stop <= seen.stop for seen in rows)
            assert whole or keys.needs_mask(n)
            needless += whole and keys.needs_mask(n)
            if keys.is_anchored(n) and n < keys.count - 1 and right is not None:
                assert all(max(seen.start, of_tile.stop) < seen.stop for seen in rows)
        assert needless <= 1
