"""Sequences of different lengths on the reference: each as if it were computed by itself, whatever lies beside it."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from cute_attn import attention, attention_varlen
from tests.support import assert_close, assert_gradients_close, make_qkv

RULES = [{}, {"causal": True}, {"window": (5, 3)}, {"causal": True, "softcap": 5.0, "scale": 0.3}]


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make(lengths, dtype=torch.float32, heads=(4, 2), d=16, dv=24, tail=5):
    """Packed q, k, v that need gradients, dout, and the bounds of queries and keys."""
    sides = tuple(zip(*lengths, strict=True)) or ((), ())
    sq, sk = (sum(side) + tail for side in sides)
    q, k, v = (x[0].requires_grad_() for x in make_qkv(1, sq, sk, *heads, d, dv, dtype))
    dout = make_qkv(1, sq, sk, *heads, dv, dv, dtype, seed=1)[0][0]
    return (q, k, v), dout, [bounds(side) for side in sides]


def run(leaves, dout, *args, call=attention_varlen, **options):
    out, lse = call(*leaves, *args, return_lse=True, **options)
    return (out.detach(), lse.detach()), torch.autograd.grad(out, leaves, dout)


def each(lengths):
    ends = zip(*(itertools.accumulate(side) for side in zip(*lengths, strict=True)), strict=True)
    return [(slice(q - n, q), slice(k - m, k)) for (q, k), (n, m) in zip(ends, lengths, strict=True)]


def assert_as_alone(lengths, rules, dtype=torch.float32, **shapes):
    leaves, dout, cu = make(lengths, dtype, **shapes)
    (out, lse), gradients = run(leaves, dout, *cu, **rules)
    q, k, v = leaves
    unused = [torch.ones(len(x), dtype=torch.bool) for x in (q, k)]
    for rows, keys in each(lengths):
        alone = [x[None].detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
        (want, want_lse), want_gradients = run(alone, dout[None, rows], call=attention, **rules)
        assert torch.equal(out[rows], want[0])
        assert torch.equal(lse[:, rows], want_lse[0])
        for got, wanted, where in zip(gradients, want_gradients, (rows, keys, keys), strict=True):
            assert torch.equal(got[where], wanted[0])
        unused[0][rows], unused[1][keys] = False, False
    for x, where in ((out, unused[0]), *zip(gradients, (unused[0], unused[1], unused[1]), strict=True)):
        assert not x[where].count_nonzero()
    assert (lse[:, unused[0]] == -math.inf).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    st.sampled_from(RULES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 9),
)
def test_each_sequence_as_alone(lengths, rules, dtype, tail):
    assert_as_alone(lengths, rules, dtype, tail=tail)


@pytest.mark.parametrize("lengths", [[(1, 1)] * 300, [(300, 300)], [(0, 0)] * 3, [(130, 140), (0, 3), (257, 128)]])
def test_many_one_and_none(lengths):
    assert_as_alone(lengths, {"causal": True})


def test_no_sequence_at_all():
    leaves, dout, _ = make([])
    (out, lse), gradients = run(leaves, dout, bounds([]))
    assert not any(x.count_nonzero() for x in (out, *gradients))
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("rules", RULES)
def test_against_float64(rules):
    lengths = [(100, 120), (64, 130)]
    leaves, dout, cu = make(lengths, torch.bfloat16)
    (out, lse), gradients = run(leaves, dout, *cu, **rules)
    for rows, keys in each(lengths):
        q, k, v = (x[None].detach() for x in (leaves[0][rows], leaves[1][keys], leaves[2][keys]))
        assert_close((out[None, rows], lse[None, :, rows]), q, k, v, **rules)
        parts = [x[None, where] for x, where in zip(gradients, (rows, keys, keys), strict=True)]
        assert_gradients_close(parts, q, k, v, dout[None, rows], **rules)


@pytest.mark.parametrize("rules", RULES)
def test_nothing_comes_from_a_neighbour(rules):
    lengths = [(20, 30), (9, 40), (33, 33)]
    leaves, dout, cu = make(lengths)
    want = run(leaves, dout, *cu, **rules)
    rows, keys = each(lengths)[1]
    planted = [x.detach().clone() for x in (*leaves, dout)]
    for x, where in zip(planted, (rows, keys, keys, rows), strict=True):
        kept = x[where].clone()
        x.fill_(math.nan)
        x[where] = kept
    *qkv, dout = planted
    got = run([x.requires_grad_() for x in qkv], dout, *cu, **rules)
    assert torch.equal(got[0][0][rows], want[0][0][rows])
    for x, y, where in zip(got[1], want[1], (rows, keys, keys), strict=True):
        assert torch.equal(x[where], y[where])


@pytest.mark.parametrize("rules", RULES)
def test_rows_in_use(rules):
    """Of a padded rectangle, and of packed rows."""
    used = [(9, 20), (0, 3), (20, 0), (20, 20)]
    q, k, v = make_qkv(4, 20, 20, 4, 2, 16, 24, torch.float32)
    dout = torch.ones(4, 20, 4, 24)
    sides = (torch.tensor(side, dtype=torch.int32) for side in zip(*used, strict=True))
    lengths = dict(zip(("seqused_q", "seqused_k"), sides, strict=True))
    for b, (n, m) in enumerate(used):
        q[b, n:], dout[b, n:], k[b, m:], v[b, m:] = math.nan, math.nan, math.nan, math.inf
    padded = run([x.clone().requires_grad_() for x in (q, k, v)], dout, call=attention, **lengths, **rules)
    flat = [x.flatten(0, 1).requires_grad_() for x in (q, k, v)]
    packed = run(flat, dout.flatten(0, 1), bounds([20] * 4), **lengths, **rules)
    for x, y in zip((padded[0][0], *padded[1]), (packed[0][0], *packed[1]), strict=True):
        assert torch.equal(x.flatten(0, 1), y)
    assert torch.equal(padded[0][1].transpose(0, 1).flatten(1), packed[0][1])
    for b, (n, m) in enumerate(used):
        alone = [x.clone().requires_grad_() for x in (q[b : b + 1, :n], k[b : b + 1, :m], v[b : b + 1, :m])]
        (out, lse), gradients = run(alone, dout[b : b + 1, :n], call=attention, **rules)
        assert torch.equal(padded[0][0][b, :n], out[0])
        assert torch.equal(padded[0][1][b, :, :n], lse[0])
        for x, y, where in zip(padded[1], gradients, (n, m, m), strict=True):
            assert torch.equal(x[b, :where], y[0])
            assert not x[b, where:].count_nonzero()


def test_q_k_and_v_in_one_tensor():
    qkv = torch.randn(50, 3, 4, 16)
    cu = bounds([20, 0, 30])
    want = attention_varlen(*(x.contiguous() for x in qkv.unbind(1)), cu, causal=True)
    assert torch.equal(attention_varlen(*qkv.unbind(1), cu, causal=True), want)


def test_lengths_that_change_before_the_backward_pass():
    leaves, dout, (cu, _) = make([(9, 9), (5, 5)])
    out = attention_varlen(*leaves, cu)
    cu[1] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_the_example_of_the_readme():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in text.split("```python\n")[1:] if "attention_varlen" in block.partition("```")[0])
    names = {"torch": torch, "device": "cpu"}
    exec(example.partition("```")[0], names)
    out, (q, k, v) = names["out"], names["packed"]
    assert torch.equal(out[317:1017], attention(q[None, 317:1017], k[None, 317:1017], v[None, 317:1017], causal=True)[0])
    assert not out[1017:].count_nonzero()


def test_gradcheck():
    leaves, _, cu = make([(3, 4), (0, 2), (5, 5)], torch.float64, heads=(2, 1), d=4, dv=4)
    assert torch.autograd.gradcheck(lambda *qkv: attention_varlen(*qkv, *cu, causal=True, return_lse=False), leaves)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_nested_tensors():
    def nested(heads, d, offsets):
        values = torch.randn(int(offsets[-1]), heads, d)
        return torch.nested.nested_tensor_from_jagged(values, offsets).detach().requires_grad_()

    of_q, of_k = (bounds(lengths).long() for lengths in ([5, 0, 130], [9, 3, 200]))
    q, k, v = nested(4, 16, of_q), nested(2, 16, of_k), nested(2, 24, of_k)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    gradients = torch.autograd.grad(out.values().sum(), (q, k, v))
    parts = zip(*(x.unbind() for x in (q, k, v, out, lse, *gradients)), strict=True)
    for q1, k1, v1, got, got_lse, *of_inputs in parts:
        alone = [x[None].detach().requires_grad_() for x in (q1, k1, v1)]
        want, want_lse = attention(*alone, causal=True, return_lse=True)
        assert torch.equal(got, want[0])
        assert torch.equal(got_lse, want_lse[0])
        for x, y in zip(of_inputs, torch.autograd.grad(want.sum(), alone), strict=True):
            assert torch.equal(x, y[0])


def test_one_graph_for_every_batch():
    """Of other lengths, totals and numbers of sequences, forward and backward, with eager's bits."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(attention_varlen, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([(5, 9), (30, 30), (2, 7), (8, 1), (1, 1)], [(40, 20)] * 4, [(3, 3), (9, 11)], [(17, 19)] * 7):
        leaves, dout, cu = make(lengths)
        got, want = (run(leaves, dout, *cu, call=call, causal=True) for call in (function, attention_varlen))
        for x, y in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 1


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu):
            return attention_varlen(q, k, v, cu, causal=True)

    def inputs(lengths):
        (q, k, v), _, (cu, _) = make([(n, n) for n in lengths], tail=0)
        return q.detach(), k.detach(), v.detach(), cu

    rows = torch.export.Dim("rows", min=2)
    shapes = {0: rows}, {0: rows}, {0: rows}, {0: torch.export.Dim("bounds", min=2)}
    program = torch.export.export(Model(), inputs([9, 30, 2]), dynamic_shapes=shapes)
    for lengths in ([40, 3], [7], [1, 2, 3, 4, 5]):
        arguments = inputs(lengths)
        assert torch.equal(program.module()(*arguments), Model()(*arguments))
