"""Traces kept from call to call: which are, and that none is used where the function would do something else now."""

import functools
import math
import random
import types

import pytest
import torch

from cute_attn import attention, functions, masks, memo, scores
from cute_attn.functions import traced
from tests.support import make_qkv

pytestmark = pytest.mark.usefixtures("one_thread")
Q = torch.zeros(2, 4, 2, 8)
TABLE, LIMIT = torch.arange(9.0), 3
OTHER = types.ModuleType("other")
OTHER.LIMIT = 3


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(memo, "_kept", {})


@pytest.fixture
def count(monkeypatch):
    """How often functions have been called."""
    calls, called = [], functions._called

    def counting(*arguments):
        calls.append(arguments)
        return called(*arguments)

    monkeypatch.setattr(functions, "_called", counting)
    return lambda: len(calls)


def graph(mask=None, score=None, tensors=(), alibi_slopes=None):
    return traced(mask, score, tensors, alibi_slopes, Q, 2, 2)


def by_a_limit(limit):
    return lambda batch, head, q_idx, kv_idx: q_idx - kv_idx < limit


# ---- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"mask": masks.causal},
        {"mask": masks.window(3)},
        {"mask": masks.and_masks(masks.document(torch.zeros(9).int()), masks.not_mask(masks.dilated(2)))},
        {"score": scores.bucketed(torch.zeros(2, 8), 64)},
        {"score": scores.softcap(3.0), "mask": masks.causal},
        {"score": lambda s, b, h, i, j, table: s + table[h, j], "tensors": (torch.zeros(2, 9),)},
        {"score": lambda s, *where, cap=2.0: cap * torch.tanh(s / cap)},
        {"score": lambda s, b, h, i, j: s + TABLE[(i - j).clamp(0, TABLE.shape[0] - 1)] * math.pi},
        {"alibi_slopes": torch.zeros(2)},
    ],
)
def test_a_function_is_called_once(asked, count):
    first = graph(**asked)
    calls = count()
    for _ in range(3):
        again = graph(**asked)
        assert again[0] is first[0]
        assert len(again[1]) == len(first[1])
        assert all(x is y for x, y in zip(again[1], first[1], strict=True))
    assert count() == calls


def test_one_that_is_made_anew_captures_its_own_tensors(count):
    """Another of the same shape; other values, too."""
    for i in range(4):
        ids, table = torch.full((9,), i), torch.full((2, 9), float(i))
        mask = masks.and_masks(masks.causal, masks.document(ids))
        expression, captured = graph(mask, lambda s, b, h, i, j, table=table: s + table[h, j])
        assert [x is y for x, y in zip(captured, (ids, table), strict=True)] == [True, True]
        assert len(expression.tensors) == 2
    assert count() == 2


# ---- what is not -----------------------------------------------------------------------------------------------------


def differs(change, make=by_a_limit, **asked):
    """That a function is traced anew after a change, and is another one then."""
    mask = make(3)
    first = graph(mask, **asked)[0]
    change(mask)
    assert graph(mask, **asked)[0] != first


def test_closures():
    def into(mask):
        mask.__closure__[0].cell_contents = 5

    differs(into)
    found = [graph(by_a_limit(limit))[0] for limit in (1, 1.0, 0.0, -0.0, 2, 1)]
    assert len(set(found)) == 5
    assert found[0] == found[-1]


def test_functions_in_closures():
    inner = by_a_limit(3)
    outer = masks.not_mask(inner)
    first = graph(outer)[0]
    inner.__closure__[0].cell_contents = 4
    second = graph(outer)[0]
    outer.__closure__[0].cell_contents = masks.causal
    assert len({first, second, graph(outer)[0]}) == 3


def test_code_and_defaults():
    def other(batch, head, q_idx, kv_idx, limit=3):
        return q_idx - kv_idx > limit

    def mask(batch, head, q_idx, kv_idx, limit=3):
        return q_idx - kv_idx < limit

    found = [graph(mask)[0]]
    mask.__defaults__ = (4,)
    found.append(graph(mask)[0])
    mask.__code__ = other.__code__
    found.append(graph(mask)[0])
    assert len(set(found)) == 3
    mask = functools.partial(lambda batch, head, q_idx, kv_idx, limit: q_idx < limit, limit=3)
    first = graph(lambda *where: mask(*where))[0]
    mask.keywords["limit"] = 4
    assert graph(lambda *where: mask(*where))[0] != first


def test_a_name_that_is_defined_again():
    namespace: dict = {}
    found = []
    for limit in (3, 4, 3):
        exec(f"LIMIT = {limit}\ndef mask(b, h, i, j): return i - j < {limit}", namespace)
        exec("def by_name(b, h, i, j): return i < LIMIT", namespace)
        found.append((graph(namespace["mask"])[0], graph(namespace["by_name"])[0]))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_globals(monkeypatch):
    def change(mask):
        monkeypatch.setitem(globals(), "LIMIT", 5)

    differs(change, lambda _: lambda batch, head, q_idx, kv_idx: q_idx - kv_idx < LIMIT)
    namespace = {"abs": abs}
    exec("def mask(b, h, i, j): return max(LIMIT, 2) > i\nLIMIT = 1", namespace)
    first = graph(namespace["mask"])[0]
    namespace["max"] = lambda x, y: 7
    assert graph(namespace["mask"])[0] != first


def test_attributes_of_modules(monkeypatch):
    def change(mask):
        monkeypatch.setattr(OTHER, "LIMIT", 5)

    differs(change, lambda _: lambda batch, head, q_idx, kv_idx: q_idx - kv_idx < OTHER.LIMIT)


def test_objects_and_lists():
    held, limits = types.SimpleNamespace(limit=3), [3]

    def change(mask):
        held.limit = limits[0] = 5

    differs(change, lambda _: lambda batch, head, q_idx, kv_idx: q_idx - kv_idx < held.limit)
    limits[0] = 3
    differs(change, lambda _: lambda batch, head, q_idx, kv_idx: q_idx - kv_idx < limits[0])
    made = held.limit = 3

    class Mask:
        def __init__(self):
            self.limit = made

        def __call__(self, batch, head, q_idx, kv_idx):
            return q_idx - kv_idx < self.limit

    mask = Mask()
    first = graph(mask)[0], graph(mask.__call__)[0]
    mask.limit = 5
    assert graph(mask)[0] != first[0]
    assert graph(mask.__call__)[0] != first[1]


def test_what_a_function_remembers():
    calls = 0

    def mask(batch, head, q_idx, kv_idx):
        nonlocal calls
        calls += 1
        return q_idx < calls

    assert len({graph(mask)[0] for _ in range(3)}) == 3


def test_chance():
    assert len({graph(lambda b, h, i, j: i < random.randrange(2**30))[0] for _ in range(3)}) == 3
    drawn = [graph(lambda b, h, i, j: i < torch.randint(0, 2**30, ()))[1][0].item() for _ in range(3)]
    assert len(set(drawn)) == 3


def test_values_of_tensors():
    """A constant that was read of one, or a tensor that was computed of one, is what it is now."""
    table = torch.ones(9)

    def read(score, batch, head, q_idx, kv_idx):
        return score * float(table[0])

    def computed(score, batch, head, q_idx, kv_idx):
        return score + (table * 2.0)[kv_idx]

    first, (twice,) = graph(score=read)[0], graph(score=computed)[1]
    table.fill_(2.0)
    assert graph(score=read)[0] != first
    assert graph(score=computed)[1][0].equal(2.0 * twice)


def test_shapes_and_kinds_of_tensors():
    def score(score, batch, head, q_idx, kv_idx, table):
        return score + table[kv_idx % table.shape[0]]

    found = [graph(score=score, tensors=(table,))[0] for table in (torch.ones(9), torch.ones(8), torch.ones(9).int())]
    assert len(set(found)) == 3
    table = torch.ones(9)
    first = graph(score=score, tensors=(table,))[0]
    table.resize_(7)
    assert graph(score=score, tensors=(table,))[0] != first


def test_which_tensors_are_the_same():
    def score(score, batch, head, q_idx, kv_idx, x, y):
        return score + x[q_idx] * y[kv_idx]

    one, two = torch.ones(9), torch.ones(9)
    for tensors in ((one, two), (one, one), (two, one)):
        expression, captured = graph(score=score, tensors=tensors)
        assert len(captured) == len(expression.tensors) == len(set(map(id, tensors)))
        assert all(x is y for x, y in zip(captured, tensors, strict=False))


def test_another_device_refuses():
    graph(mask=(mask := masks.document(torch.zeros(9).int())))
    with pytest.raises(ValueError, match="one device is needed"):
        traced(mask, None, (), None, Q.to("meta"), 2, 2)


def test_attention_of_a_function_that_changes():
    q, k, v = make_qkv(1, 20, 20, 1, 1, 8, 8)
    limit = 3

    def mask(batch, head, q_idx, kv_idx):
        return (q_idx - kv_idx < limit) & (q_idx >= kv_idx)

    for limit in (3, 5, 3):
        want = attention(q, k, v, causal=True, window=(limit - 1, 0))
        torch.testing.assert_close(attention(q, k, v, mask=mask), want)


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(memo, "CODES", 3)
    monkeypatch.setattr(memo, "TRACES", 4)
    for limit in range(9):
        graph(by_a_limit(limit))
    assert [len(traces) for traces in memo._kept.values()] == [4]
    for name in "abcdefg":
        namespace: dict = {}
        exec(f"def {name}(b, h, i, j): return i < j", namespace)
        graph(namespace[name])
    assert len(memo._kept) <= 3


def test_no_tensor_is_held():
    import gc
    import weakref

    table = torch.ones(2, 9)
    graph(score=lambda s, b, h, i, j, table=table: s + table[h, j])
    held = weakref.ref(table)
    del table
    gc.collect()
    assert held() is None
