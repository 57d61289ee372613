"""The order of tiles on the host: the scheduler's functions, before the DSL traces them, work on plain numbers as well."""

import runpy
from collections import Counter
from importlib.util import find_spec
from itertools import groupby, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cutlass.cute")

from cutlass import cute

# A copy of the module: once the DSL has traced a function, it is no longer what it was.
Tiles = runpy.run_path(find_spec("cute_attn.scheduler").origin)["Tiles"]

counts = st.integers(1, 9)
tiles = st.builds(
    lambda m_blocks, heads_kv, heads_per_kv, batch, group, lacking, long_first: Tiles(
        m_blocks, heads_kv * heads_per_kv, batch, heads_per_kv, group, lacking, long_first
    ),
    *(counts, counts, st.integers(1, 3), counts, st.integers(1, 40), st.sampled_from([None, 0]), st.booleans()),
)


coordinates = Tiles.coordinates.__wrapped__


def in_order(tiles):
    return [coordinates(tiles, position) for position in range(tiles.count())]


def assert_every_tile_once(tiles, order):
    wanted = {(m, head, batch) for m in range(tiles.m_blocks) for head in range(tiles.heads) for batch in range(tiles.batch)}
    assert sorted((m, head, batch) for m, head, _, batch in order) == sorted(wanted)
    assert all(head_kv == head // tiles.heads_per_kv for _, head, head_kv, _ in order)


@given(tiles, st.integers(1, 40), st.booleans())
def test_every_tile_once(tiles, blocks, small):
    tiles = tiles.in_small_groups(blocks) if small else tiles
    assert_every_tile_once(tiles, in_order(tiles))


@given(tiles, st.integers(1, 40))
def test_every_tile_once_in_rounds(tiles, blocks):
    """What persistent blocks take, a round after another until there is none."""
    order = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cute.arch, "grid_dim", lambda: (blocks, 1, 1))
        for block in range(blocks):
            patch.setattr(cute.arch, "block_idx", lambda block=block: (block, 0, 0))
            rounds = (Tiles.position.__wrapped__(tiles, round) for round in range(tiles.count() + 1))
            order += [coordinates(tiles, position) for position in takewhile(lambda at: at < tiles.count(), rounds)]
    assert_every_tile_once(tiles, order)


@given(tiles.filter(lambda tiles: tiles.long_first), st.integers(1, 40), st.booleans())
def test_groups_of_heads_and_in_each_the_longest_tiles_first(tiles, blocks, small):
    tiles = tiles.in_small_groups(blocks) if small else tiles
    slices = [(batch * tiles.heads + head, m) for m, head, _, batch in in_order(tiles)]
    groups = [list(group) for _, group in groupby(slices, lambda tile: (tile[0] + (tiles.lacking or 0)) // tiles.group)]
    assert len(groups) == -(-(tiles.heads * tiles.batch) // tiles.group), "a group has been left and come back to"
    for group in groups:
        lengths = [m for _, m in group]
        assert lengths == sorted(lengths, reverse=True)
    if small:
        assert all(len(group) == tiles.group * tiles.m_blocks for group in groups[1:]), "only the first may lack heads"


@given(tiles, st.integers(1, 300))
def test_a_small_groups_tiles_are_worth_the_longest_one_for_each_block(tiles, blocks):
    """Where a tile that sees n key tiles costs n. With one head less they would not be, all but rounding; with so short tiles
    that this takes more than an eighth as many heads as there are blocks, it is an eighth."""
    group, longest = tiles.in_small_groups(blocks).group, tiles.m_blocks
    eighth = max(blocks // 8, 1)
    assert group <= eighth
    assert group == eighth or group * longest * (longest + 1) // 2 >= blocks * longest
    assert (group - 1) * longest * longest / 2 < blocks * longest


@given(tiles.filter(lambda tiles: tiles.long_first), st.integers(1, 40), st.booleans())
def test_key_tiles_of_a_head_in_ascending_order(tiles, blocks, small):
    """A key tile that adds dQ in a fixed order waits for those before it, which must be of blocks that start earlier."""
    tiles, following = tiles.in_small_groups(blocks) if small else tiles, Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "coordinates", coordinates)
        for block in range(tiles.count()):
            patch.setattr(cute.arch, "block_idx", lambda block=block: (block, 0, 0))
            n_block, *head = tiles.key_tile()
            assert n_block == following[*head]
            following[*head] += 1


@pytest.mark.parametrize(
    ("long_first", "long", "at_once", "group"), [(True, True, 360, 14), (True, False, 132, 33), (False, True, 132, 33)]
)
def test_long_unequal_tiles_have_a_block_each(long_first, long, at_once, group):
    tiles, blocks = Tiles.launched.__wrapped__(Tiles(20, 6, 3, 1, 33, None, long_first), 132, long)
    assert (blocks, tiles.group) == (at_once, group)
