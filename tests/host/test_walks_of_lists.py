"""The walk over a list of key tiles, by the kernels' own code with Python's numbers in the place of the DSL's: what each
warpgroup computes, masks, leaves to the others, and takes from an anchor."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import block_mask, masks
from tests.host.test_blocks import pairs, random_mask

pytest.importorskip("cutlass")
SPEC = importlib.util.find_spec("cute_attn.mainloop.walk")
SPEC = importlib.util.spec_from_file_location(f"{__name__}_copy", SPEC.origin)
walks = importlib.util.module_from_spec(SPEC)  # this file's alone: the DSL rewrites the functions of a module that it compiles
sys.modules[SPEC.name] = walks  # dataclasses look there for what annotations mean
SPEC.loader.exec_module(walks)

LISTED = SimpleNamespace(blocks="listed", masks_all=False, bounded_left=False, bounded_right=False)
# The parts of the DSL that the walk uses.
PYTHON = SimpleNamespace(
    max=max, min=min, const_expr=bool, range=lambda *ends, unroll: range(*ends), Int32=int, Constexpr=None
)
IDS = torch.tensor([0] * 130 + [1] * 300 + [2] * 90 + [3] * 400)
MASKS = {
    "causal": masks.causal,
    "window": masks.window(300, 20),
    "document": masks.document(IDS),
    "prefix": masks.prefix_lm(torch.tensor([200, 500, 10])),
    "nothing": lambda batch, head, q_idx, kv_idx: (q_idx > 300) & (kv_idx < 700),
    **{f"random {seed}": random_mask(seed) for seed in range(3)},
}


class Words(list):
    """A list of int32 as the kernels see it: nothing outside of it is read."""

    def __getitem__(self, i: int) -> int:
        assert 0 <= i < len(self), f"word {i} of {len(self)}"
        return super().__getitem__(i)


@pytest.fixture(autouse=True)
def python(one_thread, monkeypatch):
    monkeypatch.setattr(walks, "cutlass", PYTHON)
    monkeypatch.setattr(walks, "Int32", int)
    is_cut = walks.ListedKeys.is_cut
    monkeypatch.setattr(walks.ListedKeys, "is_cut", lambda keys, i: int(is_cut(keys, i)))  # known at run time alone


def visits(keys, leads: bool) -> list[tuple]:
    """``(tile, masked, anchored)`` of each that is computed, as ``tma_wgmma.Forward._attend`` takes them."""
    found = []

    def step(state, where, anchored=None):
        place, masked = where
        found.append((keys.first_key(place), masked, place, leads and (masked is False if anchored is None else anchored)))
        return state

    if keys.count > 0:
        found.append((keys.first_key(keys.place(0)), keys.last_is_masked(), keys.place(0), False))
        walks.walk.__wrapped__(step, None, keys, LISTED, last=False)
    return found


@settings(max_examples=40)
@given(
    what=st.sampled_from(sorted(MASKS)), sizes=st.tuples(st.integers(1, 380), st.integers(1, 380)),
    tile=st.sampled_from([(192, 128), (128, 128), (128, 96), (128, 64)]), leads=st.booleans(), scale=st.sampled_from([1, 2]),
)  # fmt: skip
def test_what_a_warpgroup_computes(what, sizes, tile, leads, scale):
    sq, sk = (n * (1 if what.startswith("random") else scale) for n in sizes)
    seen = pairs(MASKS[what], 1, 1, sq, sk)[0, 0]
    lists = block_mask(MASKS[what], None, None, sq, sk, device="cpu").key_lists(*tile, 1, 1)[0, 0].tolist()
    for m_block, words in enumerate(lists):
        entries = Words(words)
        of_all = walks.ListedKeys(entries, sk, 0, entries[1], entries[0], entries[2])
        of_all = of_all.after_a_seen_key(None, LISTED, m_block, None) if leads else of_all
        listed = [of_all.first_key(of_all.place(i)) for i in range(of_all.count)]
        for w in range(tile[0] // 64):
            first = m_block * tile[0] + w * 64
            rows = seen[first : first + 64]
            config = SimpleNamespace(tile_m=tile[0])
            keys, skipped = walks.ListedKeys.of_rows.__wrapped__(of_all, None, LISTED, first, 64, config)
            assert skipped + keys.count + (keys.skipped_last or 0) == len(listed)
            computed = visits(keys, leads)
            names = [name for name, *_ in computed]
            assert names == listed[skipped : skipped + keys.count]
            assert [place for _, _, place, _ in computed] == list(range(keys.count))
            if not len(rows):
                continue
            so_far = torch.zeros(len(rows), dtype=torch.bool)
            for name, masked, place, anchored in computed:
                part = rows[:, name : name + tile[1]]
                assert masked or (part.all() and name + tile[1] <= sk)
                assert anchored == (leads and place > 0 and keys.is_anchored(place))
                assert so_far.all() or not anchored
                so_far |= part.any(1)
            times = torch.zeros(sk + tile[1], dtype=torch.int32)
            for name in names:
                times[name : name + tile[1]] += 1
            assert times.max() <= 1
            assert not rows[:, times[:sk] == 0].any()


@settings(max_examples=20)
@given(what=st.sampled_from(sorted(MASKS)), n=st.integers(1, 380), tile=st.sampled_from([(128, 128), (128, 64)]))
def test_a_walk_without_warpgroups_takes_all_tiles(what, n, tile):
    """As ``cp_async`` does, and dQ's kernel of wide heads: each tile once, and no mask for whole ones."""
    blocks, seen = block_mask(MASKS[what], None, None, n, n, device="cpu"), pairs(MASKS[what], 1, 1, n, n)[0, 0]
    for m_block, words in enumerate(blocks.key_lists(*tile, 1, 1)[0, 0].tolist()):
        keys, found = walks.ListedKeys(Words(words), n, 0, words[1], words[0], words[2]), []

        def step(state, where, found=found, keys=keys):
            found.append((keys.first_key(where[0]), bool(where[1]), bool(keys.needs_mask(where[0]))))
            return state

        walks.walk.__wrapped__(step, None, keys, LISTED, last=True)
        rows, times = seen[m_block * tile[0] : (m_block + 1) * tile[0]], torch.zeros(n + tile[1], dtype=torch.int32)
        for name, masked, needed in found:
            times[name : name + tile[1]] += 1
            assert rows[:, name : name + tile[1]].any()
            assert masked == needed == (not rows[:, name : name + tile[1]].all() or name + tile[1] > n)
        assert times.max() <= 1
        assert not rows[:, times[:n] == 0].any()


@pytest.mark.parametrize("what", ["causal", "window", "document"])
def test_little_is_masked(what):
    """A warpgroup masks the tiles that it sees a part of, and no others; it computes few of those that it doesn't see."""
    n, tile = 900, (192, 128)
    seen = pairs(MASKS[what], 1, 1, n, n)[0, 0]
    lists = block_mask(MASKS[what], None, None, n, n, device="cpu").key_lists(*tile, 1, 1)[0, 0].tolist()
    unneeded = 0
    for m_block, words in enumerate(lists):
        of_all = walks.ListedKeys(Words(words), n, 0, words[1], words[0], words[2])
        for first in range(m_block * 192, min(m_block * 192 + 192, n), 64):
            keys, _ = walks.ListedKeys.of_rows.__wrapped__(of_all, None, LISTED, first, 64, SimpleNamespace(tile_m=192))
            for name, masked, *_ in visits(keys, leads=False):
                part = seen[first : first + 64, name : name + 128]
                assert bool(masked) == bool(not part.all() or name + 128 > n)
                unneeded += int(not part.any())
    assert unneeded <= 2
