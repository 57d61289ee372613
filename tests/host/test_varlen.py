"""Sequences of different lengths: each has the bits that it has by itself, and nothing else is looked at.

By ``attention_varlen``, by ``seqused`` of ``attention``, as nested tensors, and in graphs.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cute_attn import attention, attention_varlen, launch, lengths, reference
from tests import support

# Torch's own, of what it uses itself.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning"),
]

RULES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "left": {"window": (20, None), "scale": 0.3},
    "softcap": {"causal": True, "softcap": 4.0},
}
HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}
# Lengths of queries and of keys: empty ones of either or both, one row, more queries than keys, several tiles.
MIXED = [(5, 7), (0, 3), (150, 150), (1, 1), (40, 0), (0, 0), (33, 8), (2, 290), (0, 0)]


def int32(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def bounds(sizes) -> torch.Tensor:
    return int32(accumulate(sizes, initial=0))


def in_use(sizes, used=None) -> list[slice]:
    begins = accumulate(sizes, initial=0)
    return [slice(begin, begin + n) for begin, n in zip(begins, sizes if used is None else used, strict=False)]


def packed(total_q, total_k, heads=(4, 2), dtype=torch.float32, seed=0):
    """q, k, v, dout, dlse of so many rows."""
    q, k, v = support.make_qkv(1, total_q, total_k, *heads, 16, 24, dtype, seed=seed)
    return [x.squeeze(0) for x in (q, k, v, *support.make_gradients(q, v))]


def both_passes(function, q, k, v, dout, dlse, **options):
    """``[out, lse, dq, dk, dv]``."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    outputs = function(q, k, v, return_lse=True, **options)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, (q, k, v), (dout, dlse)))]


def by_themselves(tensors, rows, keys, **rules):
    """The same of packed sequences, by a call for each; zeros and −inf elsewhere."""
    q, k, v, dout, dlse = tensors
    lse = torch.full_like(dlse, -math.inf)
    out, dq, dk, dv = torch.zeros_like(dout), *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for r, n in zip(rows, keys, strict=True):
        one = (q[r], k[n], v[n], dout[r], dlse[:, r])
        out[r], lse[:, r], dq[r], dk[n], dv[n] = (
            x.squeeze(0) for x in both_passes(attention, *(x.unsqueeze(0) for x in one), **rules)
        )
    return [out, lse, dq, dk, dv]


def assert_same(found, expected):
    for name, got, wanted in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=False):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
        assert torch.equal(got, wanted), name


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_is_each_by_itself(dtype, heads, rules):
    sizes_q, sizes_k = zip(*MIXED, strict=True)
    tensors = packed(sum(sizes_q) + 3, sum(sizes_k) + 200, heads, dtype)  # rows after the last: fewer and more than a tile
    found = both_passes(attention_varlen, *tensors, cu_seqlens_q=bounds(sizes_q), cu_seqlens_k=bounds(sizes_k), **rules)
    assert_same(found, by_themselves(tensors, in_use(sizes_q), in_use(sizes_k), **rules))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_packed_is_attention(dtype, rules):
    """By the policy of all tests, beside float64."""
    sizes_q, sizes_k = (130, 60, 200), (140, 90, 64)
    q, k, v, dout, dlse = packed(sum(sizes_q), sum(sizes_k), dtype=dtype)
    found = both_passes(
        attention_varlen, q, k, v, dout, dlse, cu_seqlens_q=bounds(sizes_q), cu_seqlens_k=bounds(sizes_k), **rules
    )
    for r, n in zip(in_use(sizes_q), in_use(sizes_k), strict=True):
        out, lse, dq, dk, dv = (x[None] for x in (found[0][r], found[1][:, r], found[2][r], found[3][n], found[4][n]))
        inputs = q[None, r], k[None, n], v[None, n]
        support.assert_close((out, lse), *inputs, **rules)
        support.assert_gradients_close((dq, dk, dv), *inputs, dout[None, r], dlse[None, :, r], **rules)


SIZES = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from([127, 128, 129, 260]))


@st.composite
def batches(draw):
    """``(sizes, used)`` of queries and of keys, ``used`` None for all; and rows that follow."""
    many_of_one = draw(st.booleans())
    count = draw(st.integers(0, 30 if many_of_one else 5))
    sides = []
    for _ in range(2):
        sizes = [1] * count if many_of_one else draw(st.lists(SIZES, min_size=count, max_size=count))
        used = [draw(st.integers(0, n)) for n in sizes] if draw(st.booleans()) else None
        sides.append((sizes, used))
    return *sides, draw(st.integers(0, 5)), draw(st.integers(0, 5))


@given(batches(), st.sampled_from(list(RULES.values())))
@settings(max_examples=150, derandomize=True)
def test_any_lengths(batch, rules):
    (sizes_q, used_q), (sizes_k, used_k), tail_q, tail_k = batch
    tensors = packed(sum(sizes_q) + tail_q, sum(sizes_k) + tail_k)
    given = {"cu_seqlens_q": bounds(sizes_q), "cu_seqlens_k": bounds(sizes_k)}
    given |= {name: int32(used) for name, used in (("seqused_q", used_q), ("seqused_k", used_k)) if used is not None}
    found = both_passes(attention_varlen, *tensors, **given, **rules)
    assert_same(found, by_themselves(tensors, in_use(sizes_q, used_q), in_use(sizes_k, used_k), **rules))


@pytest.mark.parametrize("rules", [RULES["full"], RULES["softcap"]], ids=["full", "softcap"])
def test_nothing_else_is_looked_at(rules):
    """NaN in all other sequences, in rows not in use and after the last: a sequence has the same bits, other rows zeros."""
    sizes_q, used_q, sizes_k, used_k = (40, 3, 140, 7), (33, 3, 129, 0), (50, 9, 150, 5), (50, 4, 131, 2)
    clean = packed(sum(sizes_q) + 6, sum(sizes_k) + 6)
    given = {
        "cu_seqlens_q": bounds(sizes_q),
        "cu_seqlens_k": bounds(sizes_k),
        "seqused_q": int32(used_q),
        "seqused_k": int32(used_k),
    }
    rows, keys = in_use(sizes_q, used_q), in_use(sizes_k, used_k)
    expected = both_passes(attention_varlen, *clean, **given, **rules)
    unused_q, unused_k = (torch.ones(len(clean[i]), dtype=torch.bool) for i in (0, 1))
    for r, n in zip(rows, keys, strict=True):
        unused_q[r], unused_k[n] = False, False
    for r, n in zip(rows, keys, strict=True):
        planted = [torch.full_like(x, math.nan) for x in clean]
        for x, y, where in zip(planted, clean, (r, n, n, r), strict=False):
            x[where] = y[where]
        planted[4][:, r] = clean[4][:, r]
        out, lse, dq, dk, dv = both_passes(attention_varlen, *planted, **given, **rules)
        found = [out[r], lse[:, r], dq[r], dk[n], dv[n]]
        assert_same(found, [expected[0][r], expected[1][:, r], expected[2][r], expected[3][n], expected[4][n]])
        for x, unused in ((out, unused_q), (dq, unused_q), (dk, unused_k), (dv, unused_k)):
            assert not x[unused].count_nonzero()
        assert (lse[:, unused_q] == -math.inf).all()


def test_keys_have_the_queries_bounds_unless_given():
    sizes = (30, 0, 70)
    tensors = packed(100, 100)
    found = both_passes(attention_varlen, *tensors, cu_seqlens_q=bounds(sizes), causal=True)
    assert_same(found, by_themselves(tensors, in_use(sizes), in_use(sizes), causal=True))


def test_views_of_one_tensor():
    """q, k, v of one projection: strides are free, and gradients have the shape of the whole."""
    qkv = torch.randn(90, 3, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cu_seqlens = bounds((50, 40))
    dout = torch.ones(90, 2, 16)
    (got,) = torch.autograd.grad(attention_varlen(*qkv.unbind(1), cu_seqlens, causal=True), qkv, dout)
    leaves = [x.detach().clone().requires_grad_() for x in qkv.unbind(1)]
    wanted = torch.autograd.grad(attention_varlen(*leaves, cu_seqlens, causal=True), leaves, dout)
    assert torch.equal(got, torch.stack(wanted, 1))


def test_gradcheck():
    sizes_q, sizes_k, used_k = (4, 0, 3, 2), (5, 2, 3, 3), (3, 2, 0, 3)
    q, k, v = (x.squeeze(0) for x in support.make_qkv(1, 11, 14, 4, 2, 3, 2, torch.float64))  # each element is two calls
    given = {"cu_seqlens_q": bounds(sizes_q), "cu_seqlens_k": bounds(sizes_k), "seqused_k": int32(used_k)}

    def function(*tensors):
        out, lse = attention_varlen(*tensors, **given, causal=True, softcap=3.0, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in (q, k, v)])


@pytest.mark.parametrize("zero", ["no sequence", "no row", "no sequence, no row", "no key"])
def test_sizes_of_zero(zero):
    total, total_k = 0 if "no row" in zero else 6, 0 if "no row" in zero or zero == "no key" else 6
    tensors = packed(total, total_k)
    cu_seqlens, cu_seqlens_k = (int32([0] if "no sequence" in zero else [0, n // 2, n]) for n in (total, total_k))
    found = both_passes(attention_varlen, *tensors, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    assert_same(found, by_themselves(tensors, [], []))


@pytest.mark.parametrize(
    ("wrong", "as_if"),
    [
        ({"cu_seqlens_q": [-5, 4, 20]}, {"cu_seqlens_q": [0, 4, 10]}),
        ({"cu_seqlens_k": [-(2**31), 4, 2**31 - 1]}, {"cu_seqlens_k": [0, 4, 10]}),
        ({"cu_seqlens_k": [3, 8, 6]}, {"cu_seqlens_k": [3, 8, 8]}),
        ({"seqused_q": [5, 7]}, {"seqused_q": [4, 6]}),
        ({"seqused_k": [-2, 2**31 - 1]}, {"seqused_k": [0, 6]}),
    ],
)
def test_wrong_lengths_reach_no_other_rows(wrong, as_if):
    """What is past the rows ends with them, as in the kernels (``sequences.Side``)."""
    tensors, right = packed(10, 10), {"cu_seqlens_q": [0, 4, 10], "cu_seqlens_k": [0, 4, 10]}
    assert_same(
        *(
            both_passes(attention_varlen, *tensors, **{name: int32(values) for name, values in {**right, **given}.items()})
            for given in (wrong, as_if)
        )
    )


def test_lengths_may_not_change_between_the_passes():
    q, k, v, dout, _ = packed(10, 10)
    for name in ("cu_seqlens_q", "seqused_k"):
        given = {"cu_seqlens_q": bounds((4, 6)), "seqused_k": int32((3, 3))}
        out = attention_varlen(q.requires_grad_(), k, v, **given)
        given[name].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(dout)


def test_autocast():
    tensors = packed(10, 10)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_varlen(*tensors, bounds((4, 6)))
    assert torch.equal(out, attention_varlen(*(x.bfloat16() for x in tensors), bounds((4, 6))))


def test_what_the_kernels_are_given(monkeypatch):
    """In both passes, the lengths; and what they return comes back."""
    tensors = packed(12, 14, dtype=torch.bfloat16)
    given = {"cu_seqlens_q": bounds((4, 6)), "cu_seqlens_k": bounds((8, 5)), "seqused_q": int32((4, 1))}
    expected = both_passes(attention_varlen, *tensors, **given, causal=True)
    seen = []

    def forward(call, mechanism, return_lse, for_backward, q, k, v):
        seen.append(call)
        return reference.attention(q, k, v, call)

    def gradients(call, mechanism, needs, deterministic, q, k, v, out, kept, dout, dlse):
        seen.append(call)
        return reference.gradients(q, k, v, out, kept, dout, dlse, call, needs)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(launch, "gradients", gradients)
    assert_same(both_passes(attention_varlen, *tensors, **given, causal=True), expected)
    for call in seen:
        assert (call.batch, call.seqlen_q, call.seqlen_k, call.lengths.count) == (1, 12, 14, 2)
        assert call.lengths.names == "cu_seqlens_q cu_seqlens_k seqused_q"
        assert all(x is given.get(name) for name, x in zip(lengths.NAMES, call.lengths.tensors, strict=True))
    assert len(seen) == 2


# ---- rows in use of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["q", "k", "qk"])
@pytest.mark.parametrize("head_first", [False, True])
def test_rows_in_use_of_a_batch(given, head_first):
    """Beside slices; NaN in the others changes nothing."""
    sq, sk, used = 140, 150, {"q": (140, 3, 0), "k": (129, 0, 150)}
    q, k, v = support.make_qkv(3, sq, sk, 4, 2, 16, 24)
    tensors = [q, k, v, *support.make_gradients(q, v)]
    used = {side: used[side] if side in given else (n,) * 3 for side, n in (("q", sq), ("k", sk))}
    expected = []
    for i, (r, n) in enumerate(zip(used["q"], used["k"], strict=True)):
        sides = (r, n, n, r)
        one = [x[i, :size] for x, size in zip(tensors, sides, strict=False)] + [tensors[4][i, :, :r]]
        expected.append(by_themselves(one, [slice(r)], [slice(n)], causal=True))
        for x, size in zip(tensors, sides, strict=False):
            x[i, size:] = math.nan
        tensors[4][i, :, r:] = math.nan
    if head_first:
        tensors[:3] = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3])
    found = both_passes(attention, *tensors, causal=True, **{f"seqused_{side}": int32(used[side]) for side in given})
    for i, (r, n) in enumerate(zip(used["q"], used["k"], strict=True)):
        out, lse, dq, dk, dv = (x[i] for x in found)
        assert_same((out[:r], lse[:, :r], dq[:r], dk[:n], dv[:n]), expected[i])
        assert not any(x.count_nonzero() for x in (out[r:], dq[r:], dk[n:], dv[n:]))
        assert (lse[:, r:] == -math.inf).all()


@pytest.mark.parametrize("sizes", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_rows_in_use_of_nothing(sizes):
    batch, sq, sk = sizes
    q, k, v = support.make_qkv(batch, sq, sk, 4, 2, 16, 24)
    gradients = support.make_gradients(q, v)
    used = {"seqused_q": int32([sq] * batch), "seqused_k": int32([sk] * batch)}
    assert_same(both_passes(attention, q, k, v, *gradients, **used), both_passes(attention, q, k, v, *gradients))


# ---- nested tensors --------------------------------------------------------------------------------------------------


def jagged(x, offsets, used=None, dim=1):
    return torch.nested.nested_tensor_from_jagged(x, offsets, used, jagged_dim=dim)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("narrowed", [False, True])
def test_nested(narrowed, compiled):
    """Other lengths of keys than of queries, gradients of nested leaves, results that are as ragged as q. Gradients of narrowed
    ones torch can't compile, whatever is computed."""
    differentiated = not (narrowed and compiled)
    sizes_q, sizes_k = (30, 0, 70, 4), (50, 7, 80, 2)
    used_q, used_k = ((20, 0, 70, 1), (50, 3, 41, 2)) if narrowed else (None, None)
    tensors = packed(104, 139)
    offsets_q, offsets_k = (bounds(sizes).long() for sizes in (sizes_q, sizes_k))
    lengths_q, lengths_k = (None if used is None else torch.tensor(used) for used in (used_q, used_k))
    q = jagged(tensors[0], offsets_q, lengths_q).requires_grad_(differentiated)
    k, v = (jagged(x, offsets_k, lengths_k).requires_grad_(differentiated) for x in tensors[1:3])

    def function(q, k, v):
        return attention(q, k, v, causal=True, return_lse=True)

    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    out, lse = function(q, k, v)
    assert out.layout is lse.layout is torch.jagged
    assert out.shape == (4, q.shape[1], 4, 24)
    assert lse.shape == (4, 4, q.shape[1])
    douts = jagged(tensors[3], q.offsets(), q.lengths()), jagged(tensors[4], q.offsets(), q.lengths(), 2)
    gradients = torch.autograd.grad((out, lse), (q, k, v), douts) if differentiated else ()
    assert_same(
        [x.values() for x in (out, lse, *gradients)],
        by_themselves(tensors, in_use(sizes_q, used_q), in_use(sizes_k, used_k), causal=True),
    )


def test_nested_of_a_list():
    """As most are made; operations of the result with q need no other offsets."""
    parts = [torch.randn(n, 2, 16, generator=torch.Generator().manual_seed(n)) for n in (3, 50, 1)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = x + attention(x, x, x, window=(9, 0))
    for one, got in zip(parts, y.unbind(), strict=True):
        assert torch.equal(got, one + attention(*[one[None]] * 3, window=(9, 0))[0])


@pytest.mark.parametrize("checked", [False, True])
def test_narrowed_behind_the_first_rows(checked, monkeypatch):
    """torch.nested.narrow may leave out rows before the first sequence, of which a backend writes nothing: whatever memory has
    there, results are zeros, and so are gradients."""
    x = torch.randn(2, 10, 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    begins, used = torch.tensor([3, 1]), torch.tensor([4, 9])
    first, y = int(begins[0]), x.detach().requires_grad_()
    parts = [y[i : i + 1, begin : begin + n] for i, (begin, n) in enumerate(zip(begins, used, strict=True))]
    wanted = [attention(part, part, part, causal=True)[0] for part in parts]

    def unwritten(function):
        def write_behind_the_first(*arguments):
            results = function(*arguments)
            for y in (results[0], *(y for y in results[1:] if y is not None)):
                y[(slice(None),) * (y.dim() == 2) + (slice(first),)] = math.nan
            return results

        return write_behind_the_first

    monkeypatch.setattr(reference, "PASSES", tuple(map(unwritten, reference.PASSES)))
    if checked:
        monkeypatch.setenv(lengths.CHECK, "1")
    narrowed = torch.nested.narrow(x, 1, begins, used, layout=torch.jagged)
    out, lse = attention(narrowed, narrowed, narrowed, causal=True, return_lse=True)
    assert (out.values()[:first] == 0).all()
    assert (lse.values()[:, :first] == -torch.inf).all()
    gradient = torch.autograd.grad(sum(y.square().sum() for y in out.unbind()), x)[0]
    assert all(map(torch.equal, out.unbind(), wanted))
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(part.square().sum() for part in wanted), y)[0])


def test_nested_tensors_share_a_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), backend=counter, fullgraph=True, dynamic=True)
    for sizes_q, sizes_k in BATCHES:
        q, k, v, *_ = packed(sum(sizes_q), sum(sizes_k))
        offsets_q, offsets_k = bounds(sizes_q).long(), bounds(sizes_k).long()
        out = fast(jagged(q, offsets_q), jagged(k, offsets_k), jagged(v, offsets_k))
        assert torch.equal(out.values(), attention_varlen(q, k, v, offsets_q.int(), offsets_k.int(), causal=True))
    assert counter.frame_count == 1


# ---- graphs ----------------------------------------------------------------------------------------------------------


def causal(q, k, v, cu_seqlens_q, cu_seqlens_k=None, return_lse=True, **used):
    rules = {"causal": True, "window": (40, None)}
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=return_lse, **rules, **used)


BATCHES = [((5, 0, 7, 0, 1), (8, 3, 9, 0, 0)), ((9, 8), (150, 2)), ((1,) * 31, (2,) * 31), ((60,) * 9, (7,) * 9)]


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
@pytest.mark.parametrize("with_used", [False, True])
def test_one_graph_for_all_lengths(dynamic, graphs, with_used):
    """Sizes that are equal where a graph is made are one size to torch.compile: here no two are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(causal, backend=counter, fullgraph=True, dynamic=dynamic)
    for sizes_q, sizes_k in BATCHES:
        tensors = packed(sum(sizes_q) + 1, sum(sizes_k))
        given = {"cu_seqlens_q": bounds(sizes_q), "cu_seqlens_k": bounds(sizes_k)}
        if with_used:
            given |= {"seqused_q": int32(n // 2 for n in sizes_q), "seqused_k": int32(sizes_k)}
        assert_same(*(both_passes(function, *tensors, **given) for function in (fast, causal)))
    assert counter.frame_count == graphs


def test_one_graph_for_all_rows_in_use():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    for batch, sq, sk in ((3, 20, 30), (2, 150, 40), (5, 7, 9)):
        q, k, v = support.make_qkv(batch, sq, sk, 4, 2, 16, 24)
        used = {"seqused_q": int32(range(batch)), "seqused_k": int32(range(2, 2 + batch))}
        gradients = support.make_gradients(q, v)
        assert_same(*(both_passes(function, q, k, v, *gradients, causal=True, **used) for function in (fast, attention)))
    assert counter.frame_count == 1


class Packed(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k):
        return causal(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=seqused_k)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    """Totals and the number of sequences are dynamic; there and back through a file."""
    batch, total_q, total_k = Dim("batch"), Dim("total_q"), Dim("total_k")
    shapes = [{0: total_q}, {0: total_k}, {0: total_k}, {0: batch + 1}, {0: batch + 1}, {0: batch}]
    arguments = (*packed(12, 14)[:3], bounds((5, 3, 4)), bounds((9, 1, 4)), int32((4, 1, 2)))
    program = torch.export.export(Packed(), arguments, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "packed.pt2")
    graph = torch.export.load(tmp_path / "packed.pt2").module()
    for count in (3, 7):
        arguments = (*packed(9 * count, 11 * count)[:3], bounds([9] * count), bounds([11] * count), int32(range(count)))
        assert_same(graph(*arguments), Packed()(*arguments))


def test_meta_tensors():
    q, k, v, *_ = (x.to("meta") for x in packed(12, 14))
    out, lse = causal(q, k, v, bounds((5, 7)).to("meta"), bounds((5, 9)).to("meta"))
    assert (out.shape, lse.shape, out.device.type) == ((12, 4, 24), (4, 12), "meta")


def of_a_rectangle(q, k, v, used):
    return attention(*(x.unflatten(0, (2, 6)) for x in (q, k, v)), seqused_k=used, return_lse=True)


def of_nested(q, k, v, offsets):
    return [x.values() for x in attention(*(jagged(x, offsets) for x in (q, k, v)), return_lse=True)]


@pytest.mark.parametrize("made", ["meta", "fake"])
@pytest.mark.parametrize(
    ("function", "lengths"),
    [(causal, bounds((5, 0, 7))), (of_a_rectangle, int32((3, 6))), (of_nested, bounds((5, 0, 7)).long())],
    ids=["packed", "in use", "nested"],
)
def test_results_without_values_lie_as_real_ones_do(function, lengths, made):
    """Shapes, strides and dtypes of both outputs and of all gradients."""
    real = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in packed(12, 12)[:3]]
    mode = FakeTensorMode(shape_env=ShapeEnv()) if made == "fake" else nullcontext()
    others = [x.to("meta") if made == "meta" else mode.from_tensor(x) for x in (*real, lengths)]
    results = []
    for tensors, within in (((*real, lengths), nullcontext()), (others, mode)):
        with within:
            leaves = [x.requires_grad_() for x in tensors[:3]]
            outputs = function(*leaves, tensors[3])
            gradients = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
        results.append([(x.shape, x.stride(), x.dtype) for x in (*outputs, *gradients)])
    assert results[0] == results[1]


def test_a_graph_checks_values_when_it_runs(monkeypatch):
    monkeypatch.setenv(lengths.CHECK, "1")
    torch._dynamo.reset()
    fast = torch.compile(causal, backend="aot_eager", fullgraph=True)
    q, k, v, *_ = packed(12, 12)
    fast(q, k, v, bounds((5, 7)))
    with pytest.raises(ValueError, match="cu_seqlens_q goes from 0 to 13"):
        fast(q, k, v, bounds((5, 8)))


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (example,) = (block for block in blocks if "attention_varlen" in block)
    names = {"torch": torch, "attention": attention, "device": "cpu"}
    exec(example, names)
    packed_out, nested_out = names["out"], names["nested"]
    assert torch.equal(nested_out.values(), packed_out)
    assert names["last"].shape == (2, 1, 8, 128)
