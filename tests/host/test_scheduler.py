"""The order of tiles on the host: the scheduler's functions, before the DSL traces them, work on plain numbers as well."""

import runpy
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate, groupby, takewhile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cutlass.cute")

import cutlass
from cutlass import cute

from cute_attn.layouts.base import ROW_PADDING
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.walk import KeyTiles
from cute_attn.plan import plan
from cute_attn.problem import Problem

# Copies of the modules: once the DSL has traced a function, it is no longer what it was.
Tiles = runpy.run_path(find_spec("cute_attn.scheduler").origin)["Tiles"]
QueryTiles = runpy.run_path(find_spec("cute_attn.mainloop.walk").origin)["QueryTiles"]
query_tiles = QueryTiles._in_band.__wrapped__
sequences_module = runpy.run_path(find_spec("cute_attn.sequences").origin)
Side, Sequences = sequences_module["Side"], sequences_module["Sequences"]
whole = runpy.run_path(find_spec("cute_attn.mainloop.cp_async_backward").origin)["Backward"]._whole.__wrapped__
UnusedRows = runpy.run_path(find_spec("cute_attn.mainloop.unused_rows").origin)["UnusedRows"]

counts = st.integers(1, 9)
tiles = st.builds(
    lambda m_blocks, heads_kv, heads_per_kv, batch, group, lacking, long_first: Tiles(
        m_blocks, heads_kv * heads_per_kv, batch, heads_per_kv, group, lacking, long_first
    ),
    *(counts, counts, st.integers(1, 3), counts, st.integers(1, 40), st.sampled_from([None, 0]), st.booleans()),
)


coordinates, work_at = Tiles._coordinates.__wrapped__, Tiles.work.__wrapped__
at, span_of, seek = Side.at.__wrapped__, Side.span.__wrapped__, Sequences.seek.__wrapped__
plain_begin = UnusedRows.begin.__wrapped__


def in_order(tiles):
    return [coordinates(tiles, position) for position in range(tiles.count())]


def assert_every_tile_once(tiles, order):
    wanted = {(m, head, batch) for m in range(tiles.m_blocks) for head in range(tiles.heads) for batch in range(tiles.batch)}
    assert sorted(order) == sorted(wanted)


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
    slices = [(batch * tiles.heads + head, m) for m, head, batch in in_order(tiles)]
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
    tiles, following = replace(tiles.in_small_groups(blocks) if small else tiles, of_k=True), Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "_coordinates", coordinates)
        patch.setattr(Tiles, "work", work_at)
        for block in range(tiles.count()):
            patch.setattr(cute.arch, "block_idx", lambda block=block: (block, 0, 0))
            work = tiles.mine()
            head = work.head, work.q.batch
            assert work.head_kv == work.head
            assert work.block == following[head]
            following[head] += 1


@given(
    *(st.integers(1, 900) for _ in range(2)),
    st.sampled_from([(64, 128), (80, 128), (128, 128), (64, 96)]),
    *(st.booleans(), st.booleans(), st.data()),
)
def test_how_many_key_tiles_visit_a_query_tile(q, k, tile, left, right, data):
    """What rounds a query tile's dQ waits for as many; too few would be a wrong sum, too many a wait without end."""
    (tile_m, tile_n), shift = tile, k - q
    lo, hi = shift - data.draw(st.integers(-40, 700)), shift + data.draw(st.just(0) | st.integers(-40, 300))
    problem = SimpleNamespace(bounded_left=left, bounded_right=right, blocks="", ragged="", masks_all=False)
    values, config = Values(q, k, lo, max(lo, hi), 1.0, 0.0), SimpleNamespace(tile_m=tile_m, tile_n=tile_n)
    came = Counter()
    for n_block in range(-(-k // tile_n)):
        visited = query_tiles(values, problem, n_block, config)
        came.update(range(visited.begin, visited.begin + visited.count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(QueryTiles.visits.__globals__, "Int32", int)
        m_blocks = range(-(-q // tile_m) + 3)  # some of them past the last query
        assert [came[m] for m in m_blocks] == [QueryTiles.visits(values, problem, m, config) for m in m_blocks]


@given(tiles, st.integers(1, 40), st.sampled_from(["", "small", "in turns"]), st.integers(1, 500), *[st.integers(1, 4)] * 2)
def test_every_tile_is_left_once(tiles, blocks, how, rows, heads_at_once, pieces):
    """The query tiles behind key tiles, a piece of as many heads at once as are asked for; the first rows come first in each
    group."""
    tiles = replace(tiles, heads=tiles.heads // tiles.heads_per_kv, of_k=True)
    if how == "small":
        tiles = tiles.in_small_groups(blocks)
    elif how and tiles.long_first:
        tiles = tiles.in_turns(blocks, 3, both_ways=True)
    left = tiles.left_behind(rows, 64, heads_at_once, pieces)
    assert left.heads == -(-tiles.heads * tiles.heads_per_kv // heads_at_once) * pieces
    assert left.m_blocks == -(-rows // 64)
    assert_every_tile_once(left, in_order(left))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "_coordinates", coordinates)
        works, following = [work_at(left, position) for position in range(left.count())], Counter()
    for work in works:
        assert work.block == following[work.head, work.q.batch], "a head's rows come in order"
        following[work.head, work.q.batch] += 1


@given(st.integers(1, 200), st.integers(1, 10**6), st.integers(0, 10**5))
def test_blocks_that_leave_their_place(blocks, tiles, steps):
    """A step in three takes a query tile's rounding; one in eight rounds more is what a few tiles may take for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Tiles.without_some.__globals__, "Int32", int)
        left = Tiles.without_some(blocks, tiles, steps)
    rounds = -(-tiles // blocks)
    assert 1 <= left <= blocks
    assert -(-tiles // left) <= rounds + rounds // 8
    assert (blocks - left) * 330 <= blocks * 30
    assert steps >= 200 or left == blocks


@given(
    *(st.integers(1, n) for n in (900, 900, 5, 3, 3, 40)),
    st.sampled_from([(64, 128), (128, 128), (64, 96), (64, 64)]),
    *(st.booleans(), st.booleans(), st.data()),
)
def test_in_a_fixed_order_one_block_is_enough(q, k, heads, per_kv, batch, blocks, tile, left, right, data):
    """A block alone takes all tickets one after another and finds it to be its turn at every query tile: nobody waits for a
    tile that comes later. Other tiles of a head, begun at the same time, find each query tile left by the one before. Those
    that need no mask come one after another, where ``cp_async`` takes them to be."""
    (tile_m, tile_n), shift = tile, k - q
    lo, hi = shift - data.draw(st.integers(0, 700)), shift + data.draw(st.just(0) | st.integers(0, 300))
    problem = SimpleNamespace(
        bounded_left=left, bounded_right=right, deterministic=True, unequal=right, blocks="", ragged="", masks_all=False
    )
    values = Values(q, k, lo, hi, 1.0, 0.0)
    config = SimpleNamespace(tile_m=tile_m, tile_n=tile_n)
    tiles = Tiles(-(-k // tile_n), heads, batch, per_kv, 33, None, True, of_k=True)
    tiles = tiles.in_turns(blocks, -(-q // tile_m) * per_kv, both_ways=right)
    turns, seen, of_heads = Counter(), set(), defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiles, "_coordinates", coordinates)
        patch.setitem(work_at.__globals__, "Int32", int)
        for ticket in range(tiles.count()):
            work = work_at(tiles, ticket)
            seen.add((work.block, work.head, work.q.batch))
            values = replace(values, from_last=work.from_last)
            walk = query_tiles(values, problem, work.block, config)
            order = [walk.in_order(i, problem) for i in range(walk.count)]
            assert sorted(order) == list(range(walk.begin, walk.begin + walk.count))
            unmasked = [i for i, m_block in enumerate(order) if not walk.needs_mask(i, m_block)]
            assert unmasked == list(range(*whole(SimpleNamespace(problem=problem), walk, None)))
            ranks = [walk.rank(values, problem, m_block, config) for m_block in order]
            for m_block, rank in zip(order, ranks, strict=True):
                at = work.head, work.q.batch, m_block
                assert turns[at] == rank
                turns[at] += 1
            of_heads[work.q.batch * heads + work.head].append((work.from_last, order, ranks))
    assert len(seen) == tiles.count()
    both_ways = sum(walks[0][0] == 0 for walks in of_heads.values())
    assert both_ways == (max(heads * batch - tiles.group, 0) if right else 0)
    for walks in of_heads.values():
        if walks[0][0] == 0 and shift == 0 and not left and values.hi == 0:
            left_behind = Counter()
            for step in range(max(len(order) for _, order, _ in walks)):
                here = [(order[step], ranks[step]) for _, order, ranks in walks if step < len(order)]
                assert all(left_behind[m_block] == rank for m_block, rank in here)
                left_behind.update(m_block for m_block, _ in here)


lengths = st.lists(st.integers(0, 500), max_size=12) | st.lists(st.integers(0, 3), max_size=150)
lanes = np.arange(32)


@contextmanager
def a_warp():
    """Its lanes are a vector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutlass, "min", np.minimum)
        patch.setattr(cutlass, "max", np.maximum)
        patch.setitem(at.__globals__, "Int32", int)
        for name, function in {
            "lane_idx": lambda: lanes,
            "shuffle_sync_up": lambda x, step: x[np.maximum(lanes - step, 0)],
            "shuffle_sync": lambda x, lane: x[lane],
            "vote_ballot_sync": lambda x: sum(1 << int(lane) for lane in lanes[x]),
            "popc": lambda x: (int(x) % 2**32).bit_count(),
            "warp_redux_sync": lambda x, kind: getattr(x, kind)(),
        }.items():
            patch.setattr(cute.arch, name, function)
        yield


@contextmanager
def all_on_the_host():
    """What the DSL would trace is called as it is."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Side, Sequences, UnusedRows):
            for name, function in vars(cls).copy().items():
                if hasattr(function, "__wrapped__"):
                    patch.setattr(cls, name, function.__wrapped__)
        for name in ("tiles", "unused_rows"):  # which lanes take of a sequence each, or all of one
            plain = getattr(Side, name)

            def of_each(side, i, *rest, plain=plain):
                return plain(side, i, *rest) if np.isscalar(i) else np.array([plain(side, int(n), *rest) for n in i]).T

            patch.setattr(Side, name, of_each)
        for name in ("Int32", "Boolean"):
            for module in (seek.__globals__, plain_begin.__globals__):
                patch.setitem(module, name, int)
        patch.setattr(UnusedRows, "_get", lambda self, i: tuple(self.place[i : i + 4]))
        patch.setattr(UnusedRows, "_set", lambda self, i, *values: self.place.__setitem__(slice(i, i + 4), values))
        patch.setattr(cute, "ceil_div", lambda a, b: -(-a // b))
        yield


def find(side, slot, count, tile):
    with a_warp():
        return tuple(int(x) for x in at(side, slot, count, tile))


def sides(lengths, tail=0):
    """Of sequences of these lengths and of ``tail`` rows of none; with bounds, and, where all are as long, without."""
    yield Side(sum(lengths) + tail, 0, np.array([0, *accumulate(lengths)]), None)
    if len(set(lengths)) == 1 and not tail:
        yield Side(sum(lengths), lengths[0], None, None)


@given(lengths, st.sampled_from([64, 128, 192]), st.integers(0, 300))
def test_every_row_has_a_slot_of_its_own_sequence(lengths, tile, tail):
    for side in sides(lengths, tail):
        count, rows = len(lengths), []
        for slot in range(side.all_slots(count, tile)):
            i, begin, end = find(side, slot, count, tile)
            assert begin <= slot < end
            span = span_of(side, i, count)
            assert span.length == (0 if i == count else lengths[i])
            first = (slot - begin) * tile
            rows += range(span.first + first, span.first + min(first + tile, span.capacity))
        assert rows == list(range(side.rows))


@given(st.lists(st.integers(0, 9), max_size=400), st.integers(1, 40), st.integers(0, 5), st.integers(0, 1))
def test_a_warp_finds_every_tile_once_and_in_order(tiles, step, start, kind):
    """Tiles of sequences that have so many each, every ``step``-th, going on from where the last was; then none. A warp is a
    vector of 32 lanes."""
    held = np.array([*tiles, *[0] * 200])

    def counts(i, count, tile):
        wanted = np.where(i <= count, held[np.minimum(i, len(held) - 1)], 0)
        return (wanted, 7 - wanted) if kind == 0 else (7 - wanted, wanted)

    side = SimpleNamespace(tiles=counts)
    owners = np.repeat(np.arange(len(tiles)), tiles)
    begins = np.cumsum([0, *tiles])
    with a_warp():
        sequences = Sequences(len(tiles), side, side)
        first = before = 0
        for wanted in range(start, len(owners) + 2 * step, step):
            found, sequence, begin, first, before = seek(sequences, wanted, first, before, (side, 64, kind))
            assert bool(found) == (wanted < len(owners))
            if found:
                assert (sequence, begin) == (owners[wanted], begins[owners[wanted]])


@given(lengths, st.sampled_from([64, 128, 192]), st.integers(0, 300), st.data())
def test_tiles_in_use_and_others(lengths, tile, tail, data):
    """Together they are all there are; those in use come first, and no row in use is in another."""
    used = [data.draw(st.integers(0, length)) for length in lengths]
    for side in sides(lengths, tail):
        side = replace(side, used=used)
        with a_warp(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Side, "span", span_of)
            for i in range(len(lengths) + 2):
                with_rows, others = Side.tiles.__wrapped__(side, i, len(lengths), tile)
                length, in_use = [*lengths, tail, 0][i], [*used, 0, 0][i]
                assert with_rows + others == -(-length // tile)
                assert with_rows == -(-in_use // tile)


@given(lengths, st.sampled_from([80, 128]), st.integers(0, 300), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.data())
@settings(deadline=None, max_examples=40)
def test_unused_rows_are_cleared_once(lengths, tile, tail, heads, blocks, packed, data):
    """By the blocks together: those in tiles without a row in use, and no other; most of them while tiles are computed. Of
    packed sequences these are all behind the last."""
    used = lengths if packed else [data.draw(st.sampled_from([0, length, length // 2])) for length in lengths]
    side = replace(next(iter(sides(lengths, tail))), used=None if packed else used)
    firsts = [0, *accumulate(lengths)]
    bounds = zip(firsts, [*firsts[1:], side.rows], [*used, 0], strict=True)
    wanted = [row for first, past, n in bounds for row in range(first + -(-n // tile) * tile, past)]
    with a_warp(), all_on_the_host():
        tiles = Tiles(0, heads, 1, 1, 0, None, True, sequences=Sequences(len(lengths), side, side), tile=tile, of_k=True)
        computed, found = sum(-(-n // tile) for n in used) * heads, []
        for block in range(blocks):
            cleared = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cute.arch, "block_idx", lambda block=block: (block, 0, 0))
                patch.setattr(cute.arch, "grid_dim", lambda: (blocks, 1, 1))
                clear = lambda first, past, to=cleared: to.extend(range(first, past))  # noqa: E731
                rows = UnusedRows(tiles, (side, tile, 2), clear, [0] * 8)
                rows.begin()
            for _ in range(computed // blocks):
                rows.begin_tile()
                for _ in range(data.draw(st.integers(0, 9))):
                    rows.between()
            rows.rest()
            found += cleared
        assert sorted(found) == wanted


@given(lengths, st.integers(0, 300), st.sampled_from([ROW_PADDING, 96, 80]))
def test_padded_rows_of_sequences_do_not_meet(lengths, tail, padding):
    for side in sides(lengths, tail):
        side, end, count = replace(side, padding=padding), 0, len(lengths)
        for i in range(count + 1):
            span = span_of(side, i, count)
            assert span.padded % padding == 0
            assert span.padded >= end
            end = span.padded + span.capacity
        assert end <= side.all_slots(count, padding) * padding


@given(st.integers(0, 2**24), st.integers(0, 2**27), st.integers(0, 2**17))
def test_a_tile_past_its_sequences_end_sees_nothing(seqlen_q, seqlen_k, m_block):
    """And any other what it sees in a rectangle, with no number on the way that 32 bits don't hold."""
    config = plan(Problem("bfloat16", 128, 128), "sm_90a")
    ragged, rectangle = (
        KeyTiles.of(Values(Small(seqlen_q), Small(seqlen_k), 0, 0, 1.0, 0.0), problem, m_block, config)
        for problem in (Problem("bfloat16", 128, 128, ragged="cu_seqlens_q"), Problem("bfloat16", 128, 128))
    )
    assert ragged.count == (rectangle.count if m_block * config.tile_m < seqlen_q else 0)


@given(
    *(st.integers(1, 700), st.integers(1, 700), st.integers(0, 500), st.just(0) | st.integers(0, 300)),
    st.sampled_from([64, 128, 192]),
)
def test_without_a_maximum_only_where_each_row_has_seen_a_key(q, k, left, right, tile_m):
    """Of a window's tiles, rows past the last included, as each warpgroup walks them."""
    problem = Problem("bfloat16", 128, 128, bounded_left=True, bounded_right=True)
    config, own = (SimpleNamespace(tile_m=rows, tile_n=128) for rows in (tile_m, 64))
    values = Values(q, k, k - q - left, k - q + right, 1.0, 0.0)
    for first in range(0, -(-q // tile_m) * tile_m, 64):
        whole = KeyTiles.of(values, problem, first // tile_m, config)
        some, _ = whole.of_rows(values, problem, first, 64, config)
        walked = some.after_a_seen_key(values, problem, first // 64, own, to_left=True)
        rows = range(first, first + 64)
        ends = [min(row + values.hi + 1, k) for row in rows]
        for n in range(walked.count - 1):
            assert walked.needs_mask(n) or not some.needs_mask(n)
            if walked.is_anchored(n):
                seen_from = [max(row + values.lo, walked.begin + (n + 1) * 128) for row in rows]
                assert all(begin < end for begin, end in zip(seen_from, ends, strict=True))
            else:
                assert n >= walked.whole_end


class Small(int):
    """A number whose products must fit in 32 bits."""

    def __mul__(self, other):
        assert abs(int(self) * int(other)) < 2**31
        return Small(int(self) * int(other))

    __rmul__ = __mul__


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9), st.integers(0, 900), st.data())
def test_wrong_bounds_reach_no_other_rows(bounds, rows, data):
    """Whatever the lengths are: spans lie within the tensors, and a sequence's slots are without gaps, from its first tile on,
    so that whoever waits for an earlier tile waits for one that there is."""
    count, tile = len(bounds) - 1, 64
    used = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=count, max_size=count))
    side = Side(rows, 0, np.array(bounds), used)
    for i in range(count + 1):
        span = span_of(side, i, count)
        assert 0 <= span.length <= span.capacity
        assert 0 <= span.first <= span.first + span.capacity <= rows
        assert span.padded + span.capacity <= side.all_slots(count, ROW_PADDING) * ROW_PADDING
    found = [find(side, slot, count, tile) for slot in range(side.all_slots(count, tile))]
    for slot, (i, begin, end) in enumerate(found):
        assert begin <= slot < end
        assert found[begin] == (i, begin, end)


@pytest.mark.parametrize(
    ("long_first", "long", "at_once", "group"), [(True, True, 360, 14), (True, False, 132, 33), (False, True, 132, 33)]
)
def test_long_unequal_tiles_have_a_block_each(long_first, long, at_once, group):
    tiles, blocks = Tiles.launched.__wrapped__(Tiles(20, 6, 3, 1, 33, None, long_first), 132, long)
    assert (blocks, tiles.group) == (at_once, group)
