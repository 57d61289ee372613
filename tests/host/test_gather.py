"""How the groups of a block hand on what they found, on the host: the kernel's own function, a Python thread for each
thread."""

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
gather = module["Forward"]._gather.__wrapped__


class Registers:
    """A tensor in memory of its own, column-major."""

    def __init__(self, memory, shape):
        self.iterator, self.shape = memory, shape

    def _place(self, where):
        index = np.arange(self.iterator.size).reshape(self.shape, order="F")
        return index[tuple(slice(None) if i is None else i for i in where) if isinstance(where, tuple) else where]

    def __getitem__(self, where):
        place = self._place(where)
        return self.iterator[place] if np.ndim(place) == 0 else Part(self.iterator, place)

    def __setitem__(self, where, value):
        self.iterator[self._place(where)] = value


class Part:
    def __init__(self, memory, place):
        self.memory, self.place = memory, place


def copy(source, into):
    values = source.memory[source.place] if isinstance(source, Part) else source.iterator
    if isinstance(into, Part):
        into.memory[into.place] = values
    else:
        into.iterator[:] = values


def weights(row_max, more, exponent):
    new = max(row_max, more)
    anchor = 0.0 if new == -np.inf else new
    return new, np.exp2((row_max - anchor) * exponent), np.exp2((more - anchor) * exponent)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("blocks_of_rows", [1, 2])
def test_the_first_group_has_what_all_found(groups, blocks_of_rows):
    threads, columns, exponent = 8, 3, 0.7
    held, count = 2 * blocks_of_rows, 4 * blocks_of_rows * columns
    rng = np.random.default_rng(groups)
    found = {
        (g, t): [rng.standard_normal(held), rng.random(held) + 0.1, rng.standard_normal(count)]
        for g in range(groups)
        for t in range(threads)
    }
    rows = np.arange(count) // 2 % 2 + 2 * (np.arange(count) // 4 % blocks_of_rows)  # an accumulator's order
    row_max, row_sum, o = found[groups - 1, 0]  # whose row 0 has seen no key
    row_max[0], row_sum[0], o[rows == 0] = -np.inf, 0.0, 0.0
    expected = {}
    for t in range(threads):
        most = np.max([found[g, t][0] for g in range(groups)], 0)
        anchor = np.where(most == -np.inf, 0.0, most)
        parts = [np.exp2((found[g, t][0] - anchor) * exponent) for g in range(groups)]
        total = sum(w * found[g, t][1] for g, w in enumerate(parts))
        expected[t] = most, total, sum(w[rows] * found[g, t][2] for g, w in enumerate(parts))

    barrier, shared, of_rows = threading.Barrier(groups * threads), np.zeros(10_000), np.zeros(10_000)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in {
            "make_layout": lambda shape: shape,
            "make_tensor": lambda memory, shape: Registers(memory, shape),
            "make_rmem_tensor": lambda shape, dtype: Registers(np.zeros(np.prod(shape)), np.atleast_1d(shape)),
            "size": lambda x, mode=None: x.iterator.size if mode is None else x.shape[mode[0]],
            "autovec_copy": copy,
        }.items():
            patch.setattr(cute, name, function)
        patch.setattr(cute.arch, "sync_threads", barrier.wait)
        patch.setattr(cutlass, "range_constexpr", range)
        patch.setattr(cutlass, "const_expr", lambda x: x)
        patch.setitem(gather.__globals__, "_floats", lambda m, n, size: Part(m, np.arange(n * size, (n + 1) * size)))
        patch.setitem(gather.__globals__, "_weights", weights)

        def run(g, t):
            row_max, row_sum, o = found[g, t]
            of_rows_here = (Registers(x, (held,)) for x in (row_max, row_sum))
            softmax = SimpleNamespace(**dict(zip(("row_max", "row_sum"), of_rows_here, strict=True)), scale_log2=exponent)
            block = SimpleNamespace(exchange=(shared, of_rows), group=g, thread=t)
            kernel = SimpleNamespace(group_threads=threads, config=SimpleNamespace(key_warps=groups))
            gather(kernel, block, Registers(o, (count,)), softmax)

        running = [threading.Thread(target=run, args=place) for place in found]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(20)
    for t in range(threads):
        for got, wanted in zip(found[0, t], expected[t], strict=True):
            np.testing.assert_allclose(got, wanted)
