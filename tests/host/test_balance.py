"""How the key tiles of a cache are shared out, on the host: the kernel's own functions, on plain numbers."""

import math
import runpy
from collections import defaultdict
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cutlass.cute")

import cutlass
from cutlass import cute

from cute_attn.stored import UNITS_MAX, unit_tiles

# Copies of the module: once the DSL has traced a function, it is no longer what it was.
module = runpy.run_path(find_spec("cute_attn.balance").origin)
CachedKeys, Stretches, PartPlaces = module["CachedKeys"], module["Stretches"], module["PartPlaces"]
part_of, place_of = module["part_of_stretch"].__wrapped__, PartPlaces.of.__wrapped__
part_from, start_after, PartStart = module["part_from"].__wrapped__, module["start_after"].__wrapped__, module["PartStart"]
block_of = Stretches.block_of.__wrapped__
EvenStretches, first_start = module["EvenStretches"], module["first_start"].__wrapped__
even_block_of, either = EvenStretches.block_of.__wrapped__, module["either"].__wrapped__
places_of = module["places_of"]
Kernel = runpy.run_path(find_spec("cute_attn.mainloop.cp_async_cache").origin)["Forward"]
sequence_of, row_of, find = CachedKeys.sequence.__wrapped__, CachedKeys.of_row.__wrapped__, CachedKeys.find.__wrapped__
tiles_of_lanes = CachedKeys.tiles_of_lanes.__wrapped__
CONFIG = SimpleNamespace(tile_n=64, tile_m=16)
lanes = np.arange(32)


@contextmanager
def plain_numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutlass, "min", np.minimum)
        patch.setattr(cutlass, "max", np.maximum)
        patch.setattr(cutlass, "const_expr", lambda x: x)
        patch.setattr(cutlass, "Uint32", int)
        patch.setattr(CachedKeys, "tiles_of_lanes", tiles_of_lanes)
        patch.setitem(sequence_of.__globals__, "Int32", int)
        patch.setattr(Stretches, "block_of", block_of)
        patch.setattr(CachedKeys, "sequence", sequence_of)
        patch.setattr(EvenStretches, "block_of", even_block_of)
        plainly = {"Float32": np.float32, "either": either, "part_of_stretch": part_of, "start_after": start_after}
        for name, function in plainly.items():
            patch.setitem(sequence_of.__globals__, name, function)
        for name, function in {
            "lane_idx": lambda: lanes,
            "shuffle_sync_up": lambda x, step: x[np.maximum(lanes - step, 0)],
            "shuffle_sync": lambda x, lane: x[lane],
            "vote_ballot_sync": lambda x: sum(1 << int(lane) for lane in lanes[x]),
            "popc": lambda x: (int(x) % 2**32).bit_count(),
        }.items():
            patch.setattr(cute.arch, name, function)
        yield


def cached(
    lengths, seqlen_q=1, heads_kv=2, packed=4, invariant=False, bounds=None, units=UNITS_MAX, left=None, right=None, steps=()
):
    edges = {"bounded_left": left is not None, "bounded_right": right is not None}
    problem = SimpleNamespace(**edges, invariant=invariant, expression=SimpleNamespace(neighbours=lambda _: ()))
    sizes = len(lengths), 10**6, 1, 1, seqlen_q, 0, heads_kv, packed
    return CachedKeys(*sizes, left, right, units, lengths, None, None, None, bounds, None, problem, CONFIG, *steps)


def computed(keys, blocks):
    """Of each walk (sequence, key head, row tile) the parts that blocks compute, as (part, places); tiles of each block."""
    sequences = [keys.sequence(i) for i in range(int(keys.all_sequences))]
    begins = np.cumsum([0, *(s.tiles * keys.walks(s) for s in sequences)])
    stretches = Stretches.of(int(begins[-1]), blocks)
    walks, taken = defaultdict(list), []
    for block in range(blocks):
        at, end, count, start = stretches.begin(block), stretches.begin(block + 1), 0, None
        while at < end:
            i = int(np.searchsorted(begins, at, side="right")) - 1
            part, passed = part_of(keys, sequences[i], int(begins[i]), at, end)
            assert passed > 0
            at += passed
            if part.begin < part.end:
                if start is not None:
                    assert start.sequence == i
                    assert part_from(keys, sequences[i], start, end) == part
                start = start_after(keys, sequences[i], part)
                places = places_of(keys, sequences[i], part, stretches)
                walks[i, int(part.head_kv), int(part.row_tile)].append((part, places))
                count += part.end - part.begin
        taken.append(count)
    for i, sequence in enumerate(sequences):
        assert sum(walk[0] == i for walk in walks) == keys.walks(sequence)
    return sequences, walks, taken


lengths = st.lists(st.integers(0, 3000) | st.sampled_from([0, 1, 64, 65, 40_000]), min_size=1, max_size=12)


def assert_places(sequences, walks, blocks=None):
    """Every tile is in one part, and parts have places and walks counters of their own; so many as ``blocks`` have room for."""
    places, counters = set(), set()
    for (i, _, _), parts in walks.items():
        ends = [0, *(int(part.end) for part, _ in parts)]
        assert [int(part.begin) for part, _ in parts] == ends[:-1]
        assert ends[-1] == sequences[i].tiles
        assert {int(at.parts) for _, at in parts} == {len(parts)}
        assert [int(at.number) for _, at in parts] == list(range(len(parts)))
        if len(parts) > 1:
            assert len({int(at.counter) for _, at in parts}) == 1
            mine = {int(place_of(parts[0][1], n)) for n in range(len(parts))}
            assert mine == {int(place_of(at, at.number)) for _, at in parts}
            assert len(mine) == len(parts)
            assert not mine & places
            assert int(parts[0][1].counter) not in counters
            places |= mine
            counters.add(int(parts[0][1].counter))
    if blocks is not None:
        assert places <= set(range(2 * blocks))
        assert counters <= set(range(blocks))


@given(lengths, st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_every_tile_once_and_every_part_has_a_place_of_its_own(lengths, blocks, seqlen_q, invariant):
    with plain_numbers():
        sequences, walks, _ = computed(cached(lengths, seqlen_q, invariant=invariant), blocks)
        assert_places(sequences, walks, None if invariant else blocks)


def computed_in_steps(keys, blocks):
    """The same where tiles have steps, and the ends of walks: as the kernel goes through its stretch."""
    sequences = [keys.sequence(i) for i in range(int(keys.all_sequences))]
    begins = np.cumsum([0, *(keys.steps(s) * keys.walks(s) for s in sequences)])
    walks, taken = defaultdict(list), []
    for block in range(blocks):
        stretches = keys.stretches(int(begins[-1]), blocks, block)
        at, end, steps = int(stretches.begin(block)), int(stretches.begin(block + 1)), 0
        if at < end:
            i = int(np.searchsorted(begins, at, side="right")) - 1
            start = first_start(keys, i, int(begins[i]), at, end)
            while start.at < end:
                sequence = sequences[int(start.sequence)]
                part = part_from(keys, sequence, start, end)
                assert part.begin < part.end
                walk = int(start.sequence), int(part.head_kv), int(part.row_tile)
                walks[walk].append((part, places_of(keys, sequence, part, stretches)))
                steps += (part.end - part.begin) * keys.tile_steps + (part.end == sequence.tiles) * keys.end_steps
                start = start_after(keys, sequence, part)
        taken.append(int(steps))
    return sequences, walks, taken


@given(lengths, st.integers(1, 40), st.integers(1, 9), st.sampled_from([(8, 3), (4, 1), (2, 2)]))
def test_ends_of_walks_count(lengths, blocks, seqlen_q, steps):
    """Every part has a place of its own; blocks have as many steps, to within a tile and an end."""
    with plain_numbers():
        sequences, walks, taken = computed_in_steps(cached(lengths, seqlen_q, steps=steps), blocks)
        assert len(walks) == sum(s.row_tiles * 2 for s in sequences)
        assert_places(sequences, walks, blocks)
    if sum(taken) >= blocks * steps[0]:
        assert max(taken) - min(taken) <= 2 * sum(steps)


@given(lengths, st.integers(1, 40), st.sampled_from([(8, 3), (4, 1)]))
def test_every_part_of_a_cut_walk_is_counted_once(lengths, blocks, steps):
    """When its block is done: nothing is on its way then for which a fence would wait."""
    counted, arrive = defaultdict(list), Kernel._arrive.__wrapped__

    class Counting:
        def _part_from(self, mine, start, end):
            sequence = sequences[int(start.sequence)]
            return SimpleNamespace(sequence=sequence, part=part_from(keys, sequence, start, end))

        def _with_places(self, mine, seen):
            places = places_of(keys, seen.sequence, seen.part, mine.stretches)
            return SimpleNamespace(sequence=seen.sequence, part=seen.part, places=places)

        def _count(self, mine, seen, written):
            assert done
            if seen.places.parts > 1:
                walk = int(seen.sequence.number), int(seen.part.head_kv), int(seen.part.row_tile)
                counted[walk].append(int(seen.places.number))

    with plain_numbers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutlass, "range", lambda *of, unroll: range(*map(int, of)))
        patch.setattr(cute.arch, "sync_threads", lambda: None)
        for name, function in {"either": either, "Int32": int}.items():
            patch.setitem(arrive.__globals__, name, function)
        keys = cached(lengths, steps=steps)
        sequences, walks, _ = computed_in_steps(keys, blocks)
        begins = np.cumsum([0, *(keys.steps(s) * keys.walks(s) for s in sequences)])
        for block in range(blocks):
            stretches = keys.stretches(int(begins[-1]), blocks, block)
            at, end = int(stretches.own.begin), int(stretches.own.end)
            if at >= end:
                continue
            i = int(np.searchsorted(begins, at, side="right")) - 1
            start = first_start(keys, i, int(begins[i]), at, end)
            mine = SimpleNamespace(keys=keys, stretches=stretches, first=start)
            while start.at < end:
                seen = Counting()._part_from(mine, start, end)
                start = start_after(keys, seen.sequence, seen.part)
                done = start.at >= end
                arrive(Counting(), mine, Counting()._with_places(mine, seen), 1)
        for walk, parts in walks.items():
            assert sorted(counted[walk]) == (list(range(len(parts))) if len(parts) > 1 else [])


@pytest.mark.parametrize(
    ("walks", "tiles", "blocks"),
    [(8, 64, 128), (8, 1024, 128), (128, 64, 128), (512, 32, 128), (33, 8, 132), (16, 66, 96)],
)
def test_equal_walks_that_come_out_even_are_cut_evenly(walks, tiles, blocks):
    with plain_numbers():
        _, found, _ = computed_in_steps(cached([tiles * 64] * walks, heads_kv=1, steps=(8, 3)), blocks)
    each = -(-blocks // walks)
    for parts in found.values():
        assert [int(part.begin) for part, _ in parts] == [tiles * n // each for n in range(each)]


@given(lengths, st.integers(1, 40))
def test_blocks_have_as_much_to_do(lengths, blocks):
    with plain_numbers():
        _, _, taken = computed(cached(lengths), blocks)
    assert max(taken) - min(taken) <= 1


@given(lengths, st.integers(1, 40), st.integers(1, 40), st.integers(0, 5000))
def test_units_depend_on_their_sequence_alone(lengths, blocks, others, more):
    """And they are never more than there are places."""
    with plain_numbers():
        _, alone, _ = computed(cached(lengths[:1], invariant=True), blocks)
        _, among, _ = computed(cached([*lengths, more], invariant=True), others)
    ends = [[[int(part.end) for part, _ in walks[0, head, 0]] for head in range(2)] for walks in (alone, among)]
    assert ends[0] == ends[1]
    most = min(UNITS_MAX, math.ceil(max(lengths[0], 1) / (64 * unit_tiles(16))))
    assert all(len(walk) <= most for walk in ends[0])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 300)), min_size=1, max_size=9), st.integers(0, 20), st.booleans())
def test_packed_queries(sequences, tail, invariant):
    """Each row is in one tile of one walk of each key head, those behind the last sequence, too, which see no key."""
    queries, keys = zip(*sequences, strict=True)
    bounds = [0, *np.cumsum(queries).tolist()]
    with plain_numbers():
        given_keys = cached(list(keys), bounds[-1] + tail, invariant=invariant, bounds=bounds)
        found, walks, _ = computed(given_keys, 7)
        assert [int(s.queries) for s in found] == [*queries, tail]
        assert [int(s.keys) for s in found] == [*keys, 0]
        assert sum(int(s.row_tiles) for s in found) == sum(-(-4 * n // 16) for n in (*queries, tail))
        if invariant:
            counters = [int(parts[0][1].counter) for parts in walks.values()]
            assert len(set(counters)) == len(counters)
            assert max(counters, default=0) < ((bounds[-1] + tail) * 4 // 16 + len(keys) + 2) * 2
        for row in range(bounds[-1] + tail):
            i, j = row_of(given_keys, bounds, 0, row)
            assert (i == len(keys)) == (row >= bounds[-1])
            assert i == len(keys) or (bounds[i] + j == row and 0 <= j < queries[i])


@given(st.integers(1, 9), st.integers(0, 2000), st.integers(0, 300), st.integers(0, 5))
def test_tiles_of_a_band(queries, keys, left, right):
    """From the first key that any query sees to the last one."""
    with plain_numbers():
        sequence = cached([keys], queries, left=left, right=right).sequence(0)
    shift = keys - queries
    seen = [j for j in range(keys) if any(i + shift - left <= j <= i + shift + right for i in range(queries))]
    assert sequence.tiles == max(-(-len(seen) // 64), 1)
    if seen:
        assert (sequence.begin, sequence.end) == (seen[0], seen[-1] + 1)


@given(st.lists(st.integers(0, 9), max_size=100), st.integers(0, 900))
def test_a_warp_finds_a_tile(tiles, tile):
    held = np.array([*tiles, *[0] * 64])
    with plain_numbers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedKeys, "_tiles", lambda self, i: held[np.minimum(i, len(held) - 1)])
        keys = cached([0] * len(tiles))
        i, before = find(keys, tile, keys.tiles_of_lanes(0))
    owners = np.repeat(np.arange(len(tiles)), tiles)
    if tile < len(owners):
        assert (i, before) == (owners[tile], sum(tiles[: owners[tile]]))
    else:
        assert i >= len(tiles)
