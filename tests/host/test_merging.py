"""How the groups of a block hand on what they found, and how that and the parts of a walk are merged, on the host: the kernel's
own functions, of each thread in turn, or a Python thread for each lane of a warp."""

import runpy
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cutlass.cute")

import cutlass
from cutlass import cute

# A copy of the module: once the DSL has traced a function, it is no longer what it was.
module = runpy.run_path(find_spec("cute_attn.mainloop.cp_async_cache").origin)
Forward, Workspace = module["Forward"], module["Workspace"]
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


class Warp:
    """32 threads that hand each other values."""

    def __init__(self, number):
        self.number, self.here, self.values = number, threading.local(), [0.0] * 32
        self.barrier = threading.Barrier(32, timeout=20)

    def run(self, function):
        failed = []

        def of_lane(lane):
            self.here.lane = lane
            try:
                function()
            except Exception as error:
                failed.append(error)
                self.barrier.abort()

        lanes = [threading.Thread(target=of_lane, args=(lane,)) for lane in range(32)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        if failed:
            raise failed[0]

    def all_values(self, mine):
        self.values[self.here.lane] = mine
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def of_group(self, mine, lanes):
        first = self.here.lane // lanes * lanes
        return self.all_values(mine)[first : first + lanes]

    def patch(self, monkeypatch):
        for name, function in {
            "lane_idx": lambda: self.here.lane,
            "thread_idx": lambda: (32 * self.number + self.here.lane,),
            "shuffle_sync": lambda x, lane: self.all_values(x)[lane],
            "warp_reduction_max": lambda x, threads_in_group: max(self.of_group(x, threads_in_group)),
            "warp_reduction_sum": lambda x, threads_in_group: sum(self.of_group(x, threads_in_group)),
        }.items():
            monkeypatch.setattr(cute.arch, name, function)


@pytest.fixture
def plain(monkeypatch):
    """The kernel's functions compute with plain numbers."""
    for name, function in {
        "assume": lambda x, _: x,
        "make_layout": lambda shape: (shape,) if isinstance(shape, int) else shape,
        "make_tensor": lambda m, shape: Memory(m.floats, m.place, shape),
        "make_rmem_tensor": lambda shape, _: Memory(np.full(np.prod(shape), UNTOUCHED), 0, np.atleast_1d(shape)),
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
    anchor = module["_anchor"].__wrapped__
    for name, plainly in {"divided": divmod, "Float32": Float, "_anchor": anchor}.items():
        monkeypatch.setitem(Forward._merge_parts.__wrapped__.__globals__, name, plainly)


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


def kernel(groups, rows, columns, threads, stored):
    """What the functions take of theirs; ``stored`` gets ``(row, piece): O`` and ``row: (maximum, sum)``."""

    def end_row(serving, seen, row, writes, row_max, row_sum):
        if writes:
            assert stored.setdefault(row, (row_max, row_sum)) == (row_max, row_sum)
        return row, 0, 1.0

    def store(serving, seen, of_row, piece, o):
        row, _, normalize = of_row
        assert (row, piece) not in stored
        stored[row, piece] = o.load() * normalize

    config = SimpleNamespace(tile_m=rows, key_warps=groups, threads=threads, mma_warps=threads // 32)
    problem = SimpleNamespace(head_dim_v=HEAD_DIM_V)
    lay = SimpleNamespace(exchanged_columns=lambda config: columns, rows_merged=lambda config: {16: 1, 32: 2, 64: 8}[rows])
    return SimpleNamespace(config=config, problem=problem, lay=lay, _identity=lambda: None, _end_row=end_row, _store=store)


def compare(stored, o, row_max, row_sum):
    rows, pieces = range(len(o)), range(HEAD_DIM_V // 4)
    assert set(stored) == {*rows, *((r, p) for r in rows for p in pieces)}
    for r in rows:
        np.testing.assert_allclose(stored[r], (row_max[r], row_sum[r]))
        np.testing.assert_allclose(np.concatenate([stored[r, p] for p in pieces]), o[r, :HEAD_DIM_V])


def seen_by(exponent=EXPONENT):
    return SimpleNamespace(values=SimpleNamespace(exponent=lambda problem: exponent))


@pytest.mark.parametrize(
    ("groups", "columns", "exist", "parts"), [(1, 96, 16, 1), (2, 32, 5, 3), (4, 96, 4, 3), (4, 32, 1, 1)], ids=str
)
def test_groups(plain, monkeypatch, groups, columns, exist, parts):
    rows, lanes, tile_dv = 16, 32, 96
    rng = np.random.default_rng(groups)
    found = [some(rng, rows, tile_dv) for _ in range(groups)]
    stored = {}
    forward = kernel(groups, rows, columns, lanes * groups, stored)
    shared = [Memory(np.full(groups * rows * n, UNTOUCHED)) for n in (columns, 2)]
    exchanged = SimpleNamespace(o=shared[0], of_rows=shared[1])
    written = Memory(np.full(3 * exist * HEAD_DIM_V, UNTOUCHED)), Memory(np.full(3 * exist * 2, UNTOUCHED))
    workspace = Workspace(None, *written, exist, HEAD_DIM_V)
    places = SimpleNamespace(parts=parts, number=1, of=lambda number: 2)
    lane_rows, lane_columns = (0, 8), [8 * (c // 2) + c % 2 for c in range(tile_dv // 4)]
    monkeypatch.setitem(
        Forward._hand_over.__wrapped__.__globals__,
        "rows_columns",
        lambda lane: {
            (r, c): (lane // 4 + lane_rows[r], 2 * (lane % 4) + lane_columns[c])
            for r in range(2)
            for c in range(len(lane_columns))
        },
    )
    for first in range(0, HEAD_DIM_V, columns):
        for group in range(groups):
            for lane in range(lanes):
                o, row_max, row_sum = found[group]
                mine = [lane // 4, lane // 4 + 8]
                held = Memory(o[np.ix_(mine, [2 * (lane % 4) + c for c in lane_columns])].T.ravel(), 0, (2, len(lane_columns)))
                block = SimpleNamespace(
                    group=group,
                    thread=lane,
                    mma_O=SimpleNamespace(get_slice=lambda t: SimpleNamespace(partition_C=lambda _: t)),
                )
                softmax = SimpleNamespace(row_max=row_max[mine], row_sum=row_sum[mine])
                Forward._hand_over.__wrapped__(forward, block, exchanged, held, softmax, exist, first)
        for thread in range(lanes * groups):
            monkeypatch.setattr(cute.arch, "thread_idx", lambda thread=thread: (thread,))
            Forward._merge_groups.__wrapped__(
                forward, exchanged, SimpleNamespace(workspace=workspace), seen_by(), places, exist, first
            )
    o, row_max, row_sum = (x[:exist] for x in expected(found))
    if parts == 1:
        compare(stored, o, row_max, row_sum)
    else:
        into, of_rows = (x.floats.reshape(3, exist, -1) for x in written)
        np.testing.assert_allclose(into[2], o[:, :HEAD_DIM_V])
        np.testing.assert_allclose(of_rows[2], np.stack((row_max, row_sum), 1))
        assert np.isnan(into[:2]).all()


@pytest.mark.parametrize(
    ("parts", "exist", "rows"), [(2, 16, 64), (8, 3, 16), (9, 6, 32), (16, 4, 16), (17, 6, 64), (41, 3, 16)], ids=str
)
def test_parts(plain, monkeypatch, parts, exist, rows):
    rng = np.random.default_rng(parts)
    found = [some(rng, exist, HEAD_DIM_V) for _ in range(parts)]
    first, others, step = 3, 10, 2
    places = SimpleNamespace(parts=parts, others=others, step=step, of=lambda i: first if i == 0 else others + i * step)
    written = Memory(np.full(100 * exist * HEAD_DIM_V, UNTOUCHED)), Memory(np.full(100 * exist * 2, UNTOUCHED))
    for i, (o, row_max, row_sum) in enumerate(found):
        into, of_rows = (x.floats.reshape(100, exist, -1) for x in written)
        into[places.of(i)], of_rows[places.of(i)] = o, np.stack((row_max, row_sum), 1)
    stored = {}
    forward = kernel(4, rows, HEAD_DIM_V, 128, stored)
    serving = SimpleNamespace(workspace=Workspace(None, *written, exist, HEAD_DIM_V))
    for number in range(4):
        warp = Warp(number)
        warp.patch(monkeypatch)
        warp.run(lambda: Forward._merge_parts.__wrapped__(forward, serving, seen_by(), places, exist))
    o, row_max, row_sum = expected(found)
    compare(stored, o, row_max, row_sum)
