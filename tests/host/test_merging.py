"""How the groups of a block hand on what they found, and how that and the parts of a walk are merged, on the host: the kernel's
own functions, of each thread in turn."""

import runpy
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cutlass.cute")

import cutlass
from cutlass import cute

from cute_attn.layouts.mma_sync_cache import columns_written

# A copy of the module: once the DSL has traced a function, it is no longer what it was.
module, softmax = (runpy.run_path(find_spec(f"cute_attn.{name}").origin) for name in ("mainloop.cache_merge", "softmax"))
Merging, Workspace = module["Merging"], module["Workspace"]
EXPONENT, HEAD_DIM_V, UNTOUCHED = 0.7, 88, np.nan


class Float(float):
    """float32's, as the kernel calls it."""

    inf = np.inf


class Memory:
    """A place in memory, and floats from there on: a pointer, and a tensor of ``shape``, column-major."""

    def __init__(self, floats, place=0, shape=()):
        self.floats, self.place, self.shape = floats, place, shape

    def __add__(self, more):
        return Memory(self.floats, self.place + int(more))

    def align(self, _):
        return self

    def _places(self, where):
        index = self.place + np.arange(np.prod(self.shape, dtype=int)).reshape(self.shape, order="F")
        where = where if isinstance(where, tuple) else (where,)
        return index[tuple(slice(None) if i is None else i for i in where)]

    def __getitem__(self, where):
        places = self._places(where)
        return self.floats[places] if np.ndim(places) == 0 else Memory(self.floats, places.flat[0], places.shape)

    def __setitem__(self, where, value):
        self.floats[self._places(where)] = value

    def load(self):
        return self.floats[self.place : self.place + np.prod(self.shape)].copy()

    def store(self, values):
        self.floats[self.place : self.place + np.prod(self.shape)] = values

    fill = store


@pytest.fixture
def plain(monkeypatch):
    """The kernel's functions compute with plain numbers."""
    for name, function in {
        "assume": lambda x, _: x,
        "make_layout": lambda shape: (shape,) if isinstance(shape, int) else shape,
        "make_tensor": lambda m, shape: Memory(m.floats, m.place, shape),
        "make_rmem_tensor": lambda shape, _: Memory(np.full(np.prod(shape), UNTOUCHED), 0, tuple(np.atleast_1d(shape))),
        "size": lambda x, mode: x.shape[mode[0]],
        "autovec_copy": lambda source, into: into.store(source.load()),
    }.items():
        monkeypatch.setattr(cute, name, function)
    monkeypatch.setattr(cute.arch, "fmax", max)
    monkeypatch.setattr(cute.math, "exp2", lambda x, fastmath: np.exp2(x))
    monkeypatch.setattr(cutlass, "range_constexpr", range)
    monkeypatch.setattr(cutlass, "range", lambda *of, unroll: range(*map(int, of)))
    monkeypatch.setattr(cutlass, "const_expr", lambda x: x)
    monkeypatch.setattr(cutlass, "min", min)
    monkeypatch.setattr(cutlass, "Int64", int)
    anchored = softmax["anchored"].__wrapped__
    monkeypatch.setitem(anchored.__globals__, "Float32", Float)
    for name, plainly in {"divided": divmod, "Float32": Float, "Int32": int, "anchored": anchored}.items():
        monkeypatch.setitem(Merging._merge_parts.__wrapped__.__globals__, name, plainly)


def expected(found):
    """``(O, maximum, sum)`` of rows of what each of some ``(O, maximum, sum)`` has found."""
    o, most, total = (np.stack(x) for x in zip(*found, strict=True))
    row_max = most.max(0)
    weights = np.exp2((most - np.where(row_max == -np.inf, 0, row_max)) * EXPONENT)
    return (weights[..., None] * o).sum(0), row_max, (weights * total).sum(0)


def some(rng, rows, columns):
    """As one finds it, of whose rows the first has seen no key."""
    o, row_max, row_sum = rng.standard_normal((rows, columns)), rng.standard_normal(rows), rng.random(rows) + 0.1
    o[0], row_max[0], row_sum[0] = 0.0, -np.inf, 0.0
    return o, row_max, row_sum


class Kernel:
    """What the functions take of theirs, for groups of a warp; ``stored`` gets ``(row, column): O`` and, of a row, its maximum
    and its sum."""

    def __init__(self, groups, rows, columns, tile_dv):
        self.config = SimpleNamespace(tile_m=rows, tile_dv=tile_dv, key_warps=groups)
        self.problem, self.group_threads = SimpleNamespace(head_dim_v=HEAD_DIM_V), 32
        self.lay, self.stored = SimpleNamespace(exchanged_columns=lambda config: columns), {}

    def __getattr__(self, name):
        function = vars(Merging)[name]
        if isinstance(function, property):
            return function.fget(self)
        return partial(getattr(function, "__wrapped__", function), self)

    def _coordinates(self, block):
        rows, columns = range(self.config.tile_m // 8), range(self.config.tile_dv // 4)
        lane = block.thread
        where = {(r, c): (lane // 4 + 8 * r, 2 * (lane % 4) + 8 * (c // 2) + c % 2) for r in rows for c in columns}
        return Coordinates(where, (len(rows), len(columns)))

    def _end_row(self, block, seen, row, writes, row_max, row_sum):
        if writes:
            assert row not in self.stored
            self.stored[row] = row_max, row_sum
        return row, 0, 1.0

    def _store(self, block, seen, of_row, n, o):
        row, _, normalize = of_row
        for i, x in enumerate(o.load() * normalize):
            column = 16 * n + 8 * (i // 2) + 2 * (block.thread % 4) + i % 2
            if column < HEAD_DIM_V:
                assert (row, column) not in self.stored
                self.stored[row, column] = x

    def blocks(self):
        """Its threads' views of it."""
        return [SimpleNamespace(group=group, thread=lane) for group in range(self.config.key_warps) for lane in range(32)]

    def compare(self, o, row_max, row_sum):
        rows, columns = range(len(o)), range(HEAD_DIM_V)
        assert set(self.stored) == {*rows, *((r, c) for r in rows for c in columns)}
        for r in rows:
            np.testing.assert_allclose(self.stored[r], (row_max[r], row_sum[r]))
            np.testing.assert_allclose([self.stored[r, c] for c in columns], o[r, :HEAD_DIM_V])


class Coordinates(dict):
    """With the shape of a tensor."""

    def __init__(self, of, shape):
        super().__init__(of)
        self.shape = shape


def seen_by(places, exponent=EXPONENT):
    return SimpleNamespace(values=SimpleNamespace(exponent=lambda problem: exponent), places=places)


def merged_by_groups(kernel, found, exist, workspace, places):
    """What each group has ``found`` of all rows, handed over and merged."""
    groups, rows, columns = kernel.config.key_warps, kernel.config.tile_m, kernel.lay.exchanged_columns(None)
    exchanged = SimpleNamespace(
        o=Memory(np.full(groups * rows * columns, UNTOUCHED)), of_rows=Memory(np.full(groups * rows * 2, UNTOUCHED))
    )
    for first in range(0, HEAD_DIM_V, columns):
        for block in kernel.blocks():
            o, row_max, row_sum = found[block.group]
            where = kernel._coordinates(block)
            shape = where.shape
            held = Memory(np.array([o[where[r, c]] for c in range(shape[1]) for r in range(shape[0])]), 0, shape)
            mine = [where[r, 0][0] for r in range(shape[0])]
            softmax = SimpleNamespace(row_max=row_max[mine], row_sum=row_sum[mine])
            kernel._hand_over(block, exchanged, held, softmax, exist, first)
        for block in kernel.blocks():
            block.workspace = workspace
            kernel._merge_groups(block, exchanged, seen_by(places), exist, first)


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "tile_dv", "exist", "parts"),
    [
        (1, 16, 96, 96, 16, 1),
        (2, 16, 32, 96, 5, 3),
        (4, 16, 96, 96, 1, 1),
        (8, 16, 32, 96, 4, 17),
        (2, 64, 128, 128, 16, 2),
        (1, 16, 96, 96, 2, 10),
        (4, 32, 64, 128, 3, 11),
    ],
    ids=str,
)
def test_groups_and_parts(plain, groups, rows, columns, tile_dv, exist, parts):
    """Of one part its result; of several what all of them found, from a workspace of which nothing else is touched. Some are
    more than a thread has on their way at once, which is 16 or 5, and some of these no multiple."""
    rng = np.random.default_rng(groups)
    found = [[some(rng, rows, tile_dv) for _ in range(groups)] for _ in range(parts)]
    kernel, first, others, step, width = Kernel(groups, rows, columns, tile_dv), 3, 10, 2, columns_written(HEAD_DIM_V)
    written = Memory(np.full(100 * exist * width, UNTOUCHED)), Memory(np.full(100 * exist * 2, UNTOUCHED))
    workspace = Workspace(None, *written, exist, width)

    def of(i):
        return first if i == 0 else others + i * step

    for number in range(parts):
        places = SimpleNamespace(parts=parts, number=number, of=of)
        merged_by_groups(kernel, found[number], exist, workspace, places)
    if parts > 1:
        assert not kernel.stored
        touched = {of(i) for i in range(parts)}
        assert {i for i, x in enumerate(written[1].floats.reshape(100, -1)) if not np.isnan(x).all()} == touched
        for block in kernel.blocks():
            block.workspace = workspace
            kernel._merge_parts(block, seen_by(places), exist)
    else:
        assert all(np.isnan(x.floats).all() for x in written)
    kernel.compare(*(x[:exist] for x in expected([of_group for part in found for of_group in part])))
