"""Which tiles a block of attention to a cache copies when, and to where, on the host: the kernel's own loop over the parts of
its stretch, with copies that only say what they copy."""

import runpy
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, groupby
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("cutlass.cute")

import cutlass
from cutlass import cute

from cute_attn.layouts import mma_sync_cache
from cute_attn.layouts.base import WARP
from cute_attn.plan import plan
from cute_attn.problem import Problem

# A copy of the module: once the DSL has traced a function, it is no longer what it was.
module = runpy.run_path(find_spec("cute_attn.mainloop.cp_async_cache").origin)
Kernel, KeySource = module["Forward"], module["KeySource"]
Part = namedtuple("Part", "number at begin end row_tile", defaults=(0, 0, 1, 0))
Start = namedtuple("Start", "at sequence head_kv row_tile begin", defaults=(0, 0, 0, 0))
Sequence = namedtuple("Sequence", "begin")


class Scale:
    def exponent(self, problem):
        return 1.0


NOWHERE, SCALE = Sequence(0), Scale()


@dataclass(frozen=True)
class Seen:
    part: Part
    count: int
    begin: int = 5
    whole_begin: int = 0
    whole_end: int = 0
    sequence: Sequence = NOWHERE
    values: Scale = SCALE
    places: object = None


class Block:
    """A block, of one group, that computes parts of so many tiles, of these ``walks``, and what its shared memory holds."""

    def __init__(self, counts, walks, stages, invariant):
        self.counts, self.walks = counts, walks
        self.config = SimpleNamespace(stages=stages, tile_d=1, tile_dv=1, tile_m=16, tile_n=1)
        self.problem = SimpleNamespace(head_dim=1, head_dim_v=1, masks_all=False, masked=False, invariant=invariant)
        self.group = self.keys_of_group = self.thread = 0
        self.mma_O = self.mma_S = MagicMock()
        self.keys = self.stretches = None
        self.slots, self.numbers, self.queries = [None] * stages, [None] * stages, [None, None]
        self.pending, self.groups, self.asked, self.computed, self.arrived = [], [], [], [], []

    def commit(self):
        self.groups.append(self.pending)
        self.pending = []

    def wait(self, most):
        """For the copies of all groups but the last ``most``."""
        while len(self.groups) > most:
            for memory, place, what in self.groups.pop(0):
                memory[place] = what

    def on_its_way(self, memory, place):
        return any(m is memory and p == place for group in (*self.groups, self.pending) for m, p, _ in group)

    def _copy(self, block, source, n, stage, numbered=False):
        if numbered:
            assert not self.on_its_way(self.numbers, stage)
            assert self.numbers[stage] == (source.number, n), "numbers of another tile's pages"
        else:
            assert (source.number, n) not in self.asked, "a table that is read twice"
        assert not self.on_its_way(self.slots, stage)
        assert self.slots[stage] in (None, "done"), "a tile that nobody has computed with"
        self.pending.append((self.slots, stage, (source.number, n)))

    def _ask(self, block, source, n, stage):
        assert not self.on_its_way(self.numbers, stage)
        self.pending.append((self.numbers, stage, (source.number, n)))
        self.asked.append((source.number, n))

    def _copy_q(self, block, seen, parity):
        assert self.queries[parity] != self.part, "of the part that is being computed"
        self.pending.append((self.queries, parity, seen.part.number))

    def _source(self, seen):
        return KeySource(seen.part.number, 0, 0, 0)

    def _part_from(self, block, start, end):
        count = self.counts[start.at] if start.at < len(self.counts) else 7  # of a part that there isn't
        return Seen(Part(start.at), count)

    def _queries(self, block, parity):
        assert self.counts[self.part] == 0 or self.queries[parity] == self.part
        return None

    def _scores(self, block, of_q, slot):
        self.computed.append(self.slots[slot[1]])

    def _add(self, block, acc_S, acc_O, slot):
        self.slots[slot[1]] = "done"

    def _exchanged(self, block, stage):
        assert not self.on_its_way(self.slots, stage)
        assert self.slots[stage] in (None, "done")

    def _copy_ahead(self, *what):
        Kernel._copy_ahead.__wrapped__(self, *what)

    def _ahead(self, *what):
        return Kernel._ahead(self, *what)

    def _with_places(self, *what):
        return Kernel._with_places(self, *what)

    def start_after(self, keys, sequence, part):
        """Of the same walk, it begins behind that one's first tile."""
        following = part.number + 1
        return Start(following, begin=int(self.walks[part.number : following + 1].count(self.walks[part.number]) > 1))

    def _arrive(self, block, seen, written):
        self.arrived.append([*range(self.part - written + 1, self.part + 1)])

    _publish = _sync_group = _merge = lambda self, *_: None

    def run(self):
        """All parts; the numbers of parts are their places, too."""
        self.part, stage, parity, written, end = 0, 0, 0, 0, len(self.counts)
        Kernel._begin.__wrapped__(self, self, self._part_from(self, Start(0), end))
        while self.part < end:
            start = Start(self.part)
            after, stage, written = Kernel._part.__wrapped__(self, self, start, end, stage, parity, written)
            assert after.at == self.part + 1
            self.part, parity = after.at, 1 - parity
        self.wait(0)


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=9), st.integers(2, 6), st.booleans())
def test_every_tile_is_there_when_it_is_computed_with(parts, stages, invariant):
    """And where its pages' numbers come ahead of it they are there when it is copied; most do. Each part is said to be written
    once, with others of its walk if its keys are split at fixed places."""
    counts = [count for count, _ in parts]
    walks = [*accumulate(int(first) for _, first in parts)]
    block = Block(counts, walks, stages, invariant)
    names = Kernel._part.__wrapped__.__globals__
    plainly = {
        "start_after": block.start_after,
        "either": lambda condition, x, y: x if condition else y,
        "places_of": MagicMock(),
        "Int32": int,
        **{name: MagicMock() for name in ("Softmax", "Scores", "Coordinates", "rows_columns", "scale_rows")},
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(names, plainly))
        stack.enter_context(patch.multiple(cutlass, range=lambda *of, unroll: range(*of), const_expr=lambda x: x))
        stack.enter_context(patch.multiple(cute, make_rmem_tensor=MagicMock(), size=MagicMock()))
        arch = {"cp_async_commit_group": block.commit, "cp_async_wait_group": block.wait, "sync_threads": lambda: None}
        stack.enter_context(patch.multiple(cute.arch, **arch))
        block.run()
    assert block.computed == [(part, n) for part, count in enumerate(counts) for n in range(count)]
    assert not block.pending
    assert len(set(block.asked)) == len(block.asked)
    long = {(part, n) for part, count in enumerate(counts) for n in range(2 * stages, count)}
    assert long <= set(block.asked) <= set(block.computed)
    together = groupby(range(len(counts)), key=walks.__getitem__ if invariant else None)
    assert block.arrived == [[*of_walk] for _, of_walk in together]


@pytest.mark.parametrize("target", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (32, 256), (16, 16)], ids=str)
@pytest.mark.parametrize("rows", mma_sync_cache.ROWS)
def test_every_thread_finds_the_pages_of_its_rows(rows, dims, target):
    """A lane has the number of one row's page, and a thread copies rows that lanes of its warp have."""
    config = plan(Problem("bfloat16", *dims, rows=rows, stored="page_table"), target)
    assert config.page_numbers
    kernel = Kernel(None, config)
    first, n = 7, 1
    source = SimpleNamespace(first=first, last=first + 2 * config.tile_n - 3)
    at_once = kernel.lay.copies(config)["in", "K"].tile[0]
    threads_of_row, numbered = kernel.group_threads // at_once, []
    for group in range(config.key_warps):
        begin = first + n * config.tile_n + group * kernel.keys_of_group
        for warp in range(kernel.group_threads // WARP):
            held = []
            for lane in range(WARP):
                with patch.object(cute.arch, "lane_idx", lambda lane=lane: lane), patch.object(cutlass, "min", min):
                    block = SimpleNamespace(group=group, thread=warp * WARP + lane)
                    held.append(kernel._key_of_lane(block, source, n))
                    if lane < kernel.keys_of_group * WARP // kernel.group_threads:
                        numbered.append(group * kernel.keys_of_group + kernel._row_of_lane(block))
            for lane in range(WARP):
                with patch.object(cute.arch, "lane_idx", lambda lane=lane: lane):
                    lanes = [kernel._lane_of_row(i) for i in range(kernel.keys_of_group // at_once)]
                row = (warp * WARP + lane) // threads_of_row
                assert [held[x] for x in lanes] == [min(begin + row + i * at_once, source.last) for i in range(len(lanes))]
    assert sorted(numbered) == [*range(config.tile_n)]
