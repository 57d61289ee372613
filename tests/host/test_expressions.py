"""A user's masks and scores, and sinks: what is traced, and what the reference makes of it, against float64 and autograd."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from cute_attn import attention, attention_varlen, block_mask, flash_attn, masks, reference, scores
from cute_attn.expressions import NOTHING, TorchOps
from cute_attn.functions import restored, traced
from tests import functions
from tests.planted import plant
from tests.support import make_gradients, make_qkv

pytestmark = pytest.mark.usefixtures("one_thread")
Q = torch.zeros(2, 4, 2, 8)


def graph(mask=None, score=None, tensors=(), alibi_slopes=None):
    """``(expression, captured tensors)`` of two heads and a batch of 2."""
    return traced(mask, score, tensors, alibi_slopes, Q, 2, 2)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", functions.CASES)
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float64, "gaussian"), (torch.bfloat16, "gaussian"), (torch.bfloat16, "peaky")]
)
def test_reference(case, dtype, kind):
    functions.check(case, (2, 150, 170), (4, 2), (16, 24), dtype, "cpu", kind=kind, backend="reference")


@pytest.mark.parametrize("case", ["document", "nothing", "slope", "alibi", "sinks", "everything"])
@pytest.mark.parametrize("in_use", [False, True])
def test_each_sequence_as_alone(case, in_use):
    """Positions are a sequence's own, and ``batch`` is its number."""
    lengths = [(40, 60), (0, 5), (150, 130), (7, 0), (33, 33)]
    batch, heads = len(lengths), (4, 2)
    q, k, v = make_qkv(batch, 150, 150, *heads, 16, 8, torch.float64)
    made = functions.CASES[case](batch, heads[0], "cpu", 0).asked
    if in_use:
        used = {
            f"seqused_{x}": torch.tensor(side, dtype=torch.int32)
            for x, side in zip("qk", zip(*lengths, strict=True), strict=True)
        }
        out, lse = attention(q, k, v, **used, return_lse=True, **made)
        found = [(out[i, :n], lse[i, :, :n]) for i, (n, _) in enumerate(lengths)]
    else:
        packed = [torch.cat([x[i, : length[side]] for i, length in enumerate(lengths)]) for x, side in ((q, 0), (k, 1), (v, 1))]
        bounds = [torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32) for side in zip(*lengths, strict=True)]
        out, lse = attention_varlen(*packed, *bounds, return_lse=True, **made)
        rows = [slice(int(first), int(past)) for first, past in itertools.pairwise(bounds[0])]
        found = [(out[where], lse[:, where]) for where in rows]
    for i, ((n, m), got) in enumerate(zip(lengths, found, strict=True)):
        call = reference_call(q[i : i + 1, :n], k[i : i + 1, :m], v[i : i + 1, :m], made, batch)
        want = reference.attention(q[i : i + 1, :n], k[i : i + 1, :m], v[i : i + 1, :m], replace(call, sequence=i))
        torch.testing.assert_close(got[0], want[0][0])
        torch.testing.assert_close(got[1], want[1][0])


def reference_call(q, k, v, made: dict, batch: int):
    from cute_attn.problem import check_call

    call = check_call(q, k, v, None, made.get("causal", False), made.get("window"), made.get("softcap"))
    call.sinks = made.get("sinks")
    asked = made.get("mask"), made.get("score"), (), made.get("alibi_slopes")
    call.expression, call.captured = traced(*asked, q, q.shape[2], batch)
    return call


def test_ramps():
    """What is one: a multiple of a sum of positions, added to the score; the multiple may be another for each head."""
    slopes = torch.rand(2)
    forms = {
        lambda s, b, h, i, j: s - slopes[h] * (i - j): (-1, {"q_idx": 1, "kv_idx": -1}, 0),
        lambda s, b, h, i, j: (3 - (j - 2 - i)) * (2.0 * slopes[h]) + s: (1, {"q_idx": 1, "kv_idx": -1}, 5),
        lambda s, b, h, i, j: s + slopes[h] * (j + j): (1, {"kv_idx": 2}, 0),
    }
    for score, (sign, coefficients, constant) in forms.items():
        expression, _ = graph(score=score)
        assert expression.ramp[1:] == (sign, tuple(sorted(coefficients.items())), constant)
        assert not expression.natural
    others = (
        lambda s, b, h, i, j: s - slopes[h] * torch.abs(i - j),
        lambda s, b, h, i, j: slopes[h] * (i - j) - s,
        lambda s, b, h, i, j: 2.0 * s + slopes[h] * (i - j),
        lambda s, b, h, i, j: s + slopes[i % 2] * (i - j),
        lambda s, b, h, i, j: s + slopes[h] * i,
        lambda s, b, h, i, j: s + slopes[h] * (i * j),
        lambda s, b, h, i, j: s + slopes[h] * (h - j),
        lambda s, b, h, i, j: 1.0,
        lambda s, b, h, i, j: slopes[h],
        scores.softcap(3.0),
    )
    for score in others:
        expression, _ = graph(score=score)
        assert expression.natural
    assert graph(masks.causal)[0].ramp is None
    asked = (None, None, (), slopes, Q, 2, 2, None, None)
    assert [traced(*asked, behind)[0].natural for behind in (False, True)] == [True, False]
    with_a_gradient = slopes.clone().requires_grad_()
    assert graph(score=lambda s, b, h, i, j: s + with_a_gradient[h] * (i - j))[0].natural


@pytest.mark.parametrize(("rules", "natural"), [
    ({}, True), ({"causal": True}, False), ({"window": (50, 0)}, False), ({"window": (50, 3)}, True),
    ({"causal": True, "softcap": 5.0}, True), ({"causal": True, "scale": 1e-20}, True),
    ({"causal": True, "sinks": torch.zeros(2)}, True),
])  # fmt: skip
def test_alibi_is_a_ramp_where_no_key_is_ahead(rules, natural, monkeypatch):
    calls = []
    monkeypatch.setattr(reference, "attention", lambda q, k, v, call: calls.append(call) or (q, None, None))
    q, k, v = make_qkv(1, 8, 8, 2, 2, 8, 8, torch.float32)
    attention(q, k, v, alibi_slopes=torch.rand(2), **rules)
    assert calls[0].expression.natural == natural


def test_gradients_of_captured_tensors():
    """Of any rank, whether they are arguments or in a closure, in both layouts; a tensor that requires none has none."""
    q, k, v = make_qkv(2, 40, 30, 4, 2, 8, 8, torch.float64)
    bias, gain, plain = (torch.randn(*s, dtype=torch.float64) for s in ((4, 40, 30), (2,), (40,)))
    bias.requires_grad_()
    gain.requires_grad_()

    def score(score, batch, head, q_idx, kv_idx, gain):
        return torch.tanh(score * gain[batch]) + bias[head, q_idx, kv_idx] * plain[q_idx]

    found = torch.autograd.grad(attention(q, k, v, score=score, tensors=(gain,), causal=True).square().sum(), (bias, gain))
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    places = torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij")
    s = score(s, *places, gain).masked_fill(places[3] > places[2] - 10, -math.inf)
    P = torch.where(places[2] < 10, 0.0, s.masked_fill(places[2] < 10, 0.0).softmax(-1))
    want = torch.autograd.grad(torch.einsum("bhmn,bnhd->bmhd", P, v.repeat_interleave(2, 2)).square().sum(), (bias, gain))
    torch.testing.assert_close(found, want)

    bounds = torch.tensor([0, 40, 80], dtype=torch.int32), torch.tensor([0, 30, 60], dtype=torch.int32)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    out = attention_varlen(*packed, *bounds, score=score, tensors=(gain,), causal=True)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (bias, gain)), want)


def test_a_key_that_no_row_sees_does_not_reach_any():
    q, k, v = make_qkv(1, 300, 300, 2, 1, 16, 16, torch.bfloat16)
    dout, _ = make_gradients(q, v)
    hidden = torch.arange(300) % 5 == 2
    seen = [x.clone() for x in (k, v)]
    for i, x in enumerate(seen):
        plant(x, hidden[None], i)
    results = []
    for keys, values in ((k, v), seen):
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        out, lse = attention(*leaves, mask=lambda batch, head, q_idx, kv_idx: ~hidden[kv_idx], return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not results[0][3][:, hidden].count_nonzero()


FLEX_MASKS = [masks.causal, masks.window(9, 2), masks.dilated(3), masks.document(functions.documents(1, "cpu")[0])]
FLEX_SCORES = [
    scores.softcap(2.0),
    scores.relative(functions.table(4, 61, device="cpu")),
    scores.alibi(torch.rand(4)),
    scores.bucketed(functions.table(4, 32, device="cpu"), 64),
    scores.bucketed(functions.table(4, 32, device="cpu"), 64, both_sides=False),
    # ALiBi as attention-gym publishes it, by its definition: https://github.com/meta-pytorch/attention-gym
    lambda score, b, h, q_idx, kv_idx: score + (kv_idx - q_idx) * torch.exp2(-((h + 1) * 8.0 / 4)),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "score", [*FLEX_SCORES, *(lambda s, *where, mask=mask: torch.where(mask(*where), s, -torch.inf) for mask in FLEX_MASKS)]
)
def test_functions_are_flex_attentions(score):
    """The same function gives the same results there, computed as it is, and here."""
    q, k, v = make_qkv(2, 40, 40, 4, 4, 16, 16)
    want = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=score).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v, score=score), want)


def test_flash_attns_functions_have_sinks_and_alibi():
    q, k, v = make_qkv(2, 20, 30, 4, 2, 16, 16)
    sinks, slopes = torch.randn(4), torch.rand(2, 4)
    out, lse = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes, learnable_sink=sinks, causal=True, return_lse=True)
    without, lse_without = attention(q, k, v, alibi_slopes=slopes, causal=True, return_lse=True)
    torch.testing.assert_close(out, without * torch.sigmoid(lse_without - sinks[:, None]).transpose(1, 2)[..., None])
    torch.testing.assert_close(lse, torch.logaddexp(lse_without, sinks[:, None]))
    distance = (torch.arange(20)[:, None] + 10 - torch.arange(30)).abs()
    bias = -slopes[:, :, None, None] * distance + torch.where(torch.arange(30) > torch.arange(20)[:, None] + 10, -math.inf, 0.0)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(without, want)
    bounds = torch.tensor([0, 20, 40], dtype=torch.int32), torch.tensor([0, 30, 60], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    of_varlen = flash_attn.flash_attn_varlen_func(
        *packed, *bounds, 20, 30, alibi_slopes=slopes, learnable_sink=sinks, causal=True
    )
    torch.testing.assert_close(of_varlen.unflatten(0, (2, 20)), out)
    cache = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=30, alibi_slopes=slopes, learnable_sink=sinks, causal=True
    )
    torch.testing.assert_close(cache, out)


@pytest.mark.parametrize("far", [-math.inf, -300.0, 300.0])
def test_a_sink_far_from_all_scores(far):
    """Of rows the first of which sees no key."""
    q, k, v = make_qkv(1, 6, 5, 1, 1, 8, 8, torch.bfloat16)
    out, lse = attention(q, k, v, sinks=torch.tensor([far]), causal=True, return_lse=True)
    want, want_lse = attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(out, want if far < 0 else torch.zeros_like(out))
    torch.testing.assert_close(lse, want_lse if far < 0 else want_lse.clamp(min=far).where(want_lse > -math.inf, -math.inf))


# ---- what is traced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*functions.CASES, *functions.RANDOM])
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_text_is_the_same_expression(case, differentiated):
    """So a graph runs the kernels of an eager call."""
    asked = (functions.CASES | functions.RANDOM)[case](2, 4, "cpu", 3).asked
    mask, score, slopes = (asked.get(name) for name in ("mask", "score", "alibi_slopes"))
    bias = torch.zeros(4, 10, 12, requires_grad=differentiated)
    given = mask, score, (), slopes, torch.zeros(1), 4, 2, bias, (10, 12), True
    expression, captured = traced(*given)
    text, again = traced(*given, as_text=True)
    assert all(map(torch.equal, again, captured))
    found = restored(text, captured, 2, 4, (10, 12))
    assert found == expression
    assert restored(text, captured, 2, 4, (10, 12)) is found


def test_the_key_holds_operations_and_constants_and_no_values():
    def make(limit, table):
        return lambda batch, head, q_idx, kv_idx: table[kv_idx] < limit

    first, one = graph(make(3, torch.zeros(5)))
    again, other = graph(make(3, torch.ones(9)))
    assert first == again
    assert hash(first) == hash(again)
    assert repr(first) == repr(again)
    assert one[0].shape != other[0].shape
    different = [graph(make(4, torch.zeros(5))), graph(make(3.0, torch.zeros(5))), graph(make(3, torch.zeros(5).int()))]
    assert len({first, *(expression for expression, _ in different)}) == 3  # beside a float 3 is 3.0
    assert graph(lambda *_: True)[0] != graph(lambda *_: False)[0]
    nan = graph(None, lambda score, *_: score * math.nan)[0]
    assert nan == graph(None, lambda score, *_: score * math.nan)[0]


def test_a_redefined_function_is_another_key():
    made = []
    for bound in ("q_idx >= kv_idx", "q_idx > kv_idx"):
        names: dict = {}
        exec(f"def mask(batch, head, q_idx, kv_idx): return {bound}", names)
        made.append(graph(names["mask"])[0])
    assert made[0] != made[1]


def test_what_does_nothing_is_nothing():
    assert graph(None, lambda score, *_: score) == (NOTHING, ())
    assert not NOTHING
    q, k, v = make_qkv(1, 9, 9, 1, 1, 8, 8)
    assert torch.equal(attention(q, k, v, score=lambda score, *_: score), attention(q, k, v))
    given_nothing = masks.given(torch.ones(1, 1, 0, 9, dtype=torch.bool))
    assert attention(q[:, :0], k, v, mask=given_nothing).shape == (1, 0, 1, 8)
    assert attention(q[:, :0], k, v, mask=given_nothing, block_mask=block_mask(given_nothing, 1, 1, 0, 9)).shape == (1, 0, 1, 8)


def test_where_as_a_method():
    want = graph(None, lambda s, b, h, i, j: torch.where(i >= j, s, 2.0))
    forms = (
        lambda s, b, h, i, j: s.where(i >= j, 2.0),
        lambda s, b, h, i, j: s.where(i >= j, other=2.0),
        lambda s, b, h, i, j: s.where(other=2.0, condition=i >= j),
    )
    assert all(graph(None, score) == want for score in forms)


def test_a_bias_has_no_slope():
    assert graph(None, lambda score, batch, head, q_idx, kv_idx: 3.0 - (kv_idx - score))[0].slope is None
    assert graph(None, None, (), torch.ones(2))[0].slope is None


def test_functions_are_called_once():
    calls = []

    def mask(batch, head, q_idx, kv_idx):
        calls.append(1)
        return q_idx >= kv_idx

    attention(*make_qkv(2, 300, 300, 2, 2, 8, 8), mask=mask)
    assert calls == [1]


def test_tensors_and_closures_are_one():
    table = torch.randn(2, 4)
    expression, captured = graph(
        lambda batch, head, q_idx, kv_idx, given: given[head][q_idx] > table[batch, kv_idx], None, (table,)
    )
    assert len(captured) == 1
    assert captured[0] is table
    assert expression.tensors == (("float32", 2, 1),)


def test_a_value_that_changes_between_calls():
    q, k, v = make_qkv(1, 50, 50, 2, 2, 8, 8)
    ids = functions.documents(1, "cpu")[0]
    mask = masks.document(ids)
    before = attention(q, k, v, mask=mask)
    ids.copy_(torch.arange(len(ids)))
    torch.testing.assert_close(attention(q, k, v, mask=mask), v)
    assert not torch.equal(before, v)


# ---- what is computed, as torch does ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "computed",
    [
        lambda i, j: torch.logical_and(i % 4, j % 4),  # whose bits may have none in common
        lambda i, j: torch.logical_xor(i % 4, other=j % 4),
        lambda i, j: torch.logical_or(i * 0.5, j > 3),
        lambda i, j: (i % 4).logical_not(),
        lambda i, j: (i > 3) + (j > 3),
        lambda i, j: (i > 3) * (j > 3),
        lambda i, j: torch.maximum(i > 3, j > 3),
        lambda i, j: torch.minimum(i > 3, j > 3),
    ],
)
def test_logic_of_numbers_and_arithmetic_of_bools_are_torchs(computed):
    q, kv = torch.arange(9)[:, None], torch.arange(11)
    expression, _ = graph(lambda b, h, i, j: computed(i, j), lambda s, b, h, i, j: s + computed(i, j))
    names = {"q_idx": q, "kv_idx": kv, "score": torch.zeros(())}
    want, ops = computed(q, kv), TorchOps((), torch.float64, torch.device("cpu"))
    assert want.dtype == torch.bool
    assert torch.equal(expression.value(expression.mask, names.get, ops, {}), want)
    assert torch.equal(expression.value(expression.score, names.get, ops, {}), want.double())


@pytest.mark.parametrize("computed", [
    lambda s, x: torch.abs(s - x),
    lambda s, x: torch.maximum(s, 2.0 * x),
    lambda s, x: torch.minimum(3.0 * s, x) + torch.maximum(s - x, x - s),
    lambda s, x: torch.maximum(s + x, s - x),
    lambda s, x: torch.maximum(s, torch.zeros_like(s)) * x,
    lambda s, x: torch.clamp(s, -1.0, 1.0) * x,
    lambda s, x: torch.clamp(s, min=x) + torch.clamp(x, max=s),
])  # fmt: skip
def test_gradients_at_ties_are_torchs(computed):
    """By the score and by a captured tensor, of which each element is that of a score that is equal to it, or to its bound."""
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    s, table = values[:, None].expand(4, 4).clone().requires_grad_(), values.expand(4, 4).clone().requires_grad_()
    expression, captured = graph(None, lambda s, b, h, i, j: computed(s, table[i, j]))
    names = {"q_idx": torch.arange(4)[:, None], "kv_idx": torch.arange(4), "score": s}
    ops = TorchOps(captured, torch.float64, torch.device("cpu"))
    wanted = torch.autograd.grad(computed(s, table).sum(), (s, table))
    for node, want in zip((expression.slope, expression.partials[0].slope), wanted, strict=True):
        found = expression.value(node, names.get, ops, {}) if node is not None else torch.ones_like(want)
        torch.testing.assert_close(found.expand_as(want), want)


# ---- random expressions ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=30, derandomize=True)
@given(st.randoms(use_true_random=False))
def test_random_expressions(chance):
    """Values and dual numbers against torch's operations and autograd, in float64."""
    mask_text, score_text = functions.random_text(chance, "bool"), functions.random_text(chance, "float")
    ids, table, scalar = functions.documents(1, "cpu")[0], torch.randn(4, functions.ROWS).double(), torch.tensor(0.75).double()
    space = {"torch": torch, "ids": ids, "table": table, "scalar": scalar}
    mask = eval(f"lambda batch, head, q_idx, kv_idx: {mask_text} & (kv_idx >= 0)", space)
    if "score" in mask_text:
        mask = None
    score = eval(f"lambda score, batch, head, q_idx, kv_idx: ({score_text}) + 0.0 * score", space)
    expression, captured = graph(mask, score)
    batch, head, q_idx, kv_idx = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 7, 9)), indexing="ij")
    given_scores = torch.randn(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    names = {"score": given_scores, "batch": batch, "head": head, "q_idx": q_idx, "kv_idx": kv_idx}
    ops, known = TorchOps(captured, torch.float64, torch.device("cpu")), {}
    with torch.no_grad():
        value = {
            n: expression.value(n, names.get, ops, known)
            for n in (expression.mask, expression.score, expression.slope)
            if n is not None
        }
    want = score(given_scores, batch, head, q_idx, kv_idx)
    torch.testing.assert_close(value[expression.score].expand_as(want), want.detach())
    (slope,) = torch.autograd.grad(want.sum(), given_scores)
    found = torch.ones_like(slope) if expression.slope is None else value[expression.slope].expand_as(slope)
    torch.testing.assert_close(found, slope)
    if mask is not None:
        seen = mask(batch, head, q_idx, kv_idx)
        assert torch.equal(value[expression.mask].expand_as(seen), seen)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("case", list(functions.RANDOM)[:6])
def test_random_functions(case):
    """Attention with some, in the reference; in the kernels with all (``tests/gpu/test_expressions.py``)."""
    functions.check(case, (2, 90, 70), (4, 2), (16, 8), torch.float32, "cpu", packed=case == "random 5")


# ---- the kernels' operations -----------------------------------------------------------------------------------------

TEXTS = [
    "1.0 * ((q_idx - kv_idx) // 3) + 0.5 * ((q_idx - kv_idx) % -4) + 0.0 * score",
    "torch.where(~(q_idx > kv_idx) & (q_idx != 5) ^ (kv_idx == 2) | (head > 0), torch.abs(q_idx - kv_idx), 2.5) - score",
    "torch.minimum(score, table[head, q_idx - 3]) * torch.maximum(score * scalar, table[batch, kv_idx + 9999]) + flags[q_idx]",
    "torch.clamp(score, -0.5, 0.75) / (1 + torch.abs(score)) + score.int() + (score > 0).float() * ids[kv_idx]",
    "torch.tanh(score) * torch.exp(-score * score) + torch.log(1.0 + score ** 2) + torch.exp2(0.5 * score)",
    "torch.sqrt(2.0 + score.abs()) / (1.0 + torch.exp(-score)) + torch.log2(3.0 + score * score)",
    "torch.maximum(torch.abs(score), 0.5 * score * score) - torch.minimum(score, score * score) * scalar",
]


def test_the_kernels_operations(monkeypatch):
    """Compiled for this machine's processor, with its own arithmetic in the place of two of the GPU's instructions."""
    cutlass = pytest.importorskip("cutlass")
    from cutlass import cute
    from cutlass.cute.runtime import from_dlpack

    from cute_attn.mainloop import elements

    monkeypatch.setattr(cute.arch, "rcp_approx", lambda x: 1.0 / x)
    monkeypatch.setattr(cute.arch, "fmax", lambda x, y, nan: elements.either(x > y, x, y))
    ids, flags = functions.documents(1, "cpu")[0], torch.arange(functions.ROWS, dtype=torch.uint8) % 2
    space = {"torch": torch, "ids": ids, "flags": flags, "table": torch.randn(4, 40), "scalar": torch.tensor(0.75)}
    traced_ones = [graph(None, eval(f"lambda score, batch, head, q_idx, kv_idx: {text}", space)) for text in TEXTS]
    rows, keys = 12, 11
    given_scores = torch.cat([torch.randn(rows - 3, keys) * 2, torch.arange(3.0)[:, None].expand(3, keys)])  # with ties
    found = torch.zeros(len(TEXTS), 2, rows, keys)
    captured = [tuple(from_dlpack(x if x.dim() else x.reshape(1)) for x in tensors) for _, tensors in traced_ones]

    @cute.jit
    def compute(out: cute.Tensor, given: cute.Tensor, tensors):
        for q_idx in range(rows):
            for kv_idx in range(keys):
                where = {"batch": cutlass.Int32(1), "head": cutlass.Int32(0), "q_idx": q_idx, "kv_idx": kv_idx}
                for n in cutlass.range_constexpr(len(TEXTS)):
                    expression = traced_ones[n][0]
                    here = elements.Elements(
                        expression, tensors[n], lambda name, r, c, where=where: where[name], {"q_idx"}, "kv_idx"
                    )
                    out[n, 0, q_idx, kv_idx] = here.value(expression.score, 0, 0, given[q_idx, kv_idx])
                    out[n, 1, q_idx, kv_idx] = here.value(expression.slope, 0, 0, given[q_idx, kv_idx])

    arguments = from_dlpack(found), from_dlpack(given_scores), captured
    cute.compile(compute, *arguments)(*arguments)
    q_idx, kv_idx = torch.meshgrid(torch.arange(rows), torch.arange(keys), indexing="ij")
    names = {"score": given_scores, "batch": torch.tensor(1), "head": torch.tensor(0), "q_idx": q_idx, "kv_idx": kv_idx}
    for n, (expression, tensors) in enumerate(traced_ones):
        ops, known = TorchOps(tensors, torch.float32, torch.device("cpu")), {}
        for i, node in enumerate((expression.score, expression.slope)):
            want = expression.value(node, names.get, ops, known).expand(rows, keys)
            torch.testing.assert_close(found[n, i], want, rtol=2e-5, atol=2e-6, msg=lambda text, n=n: f"{TEXTS[n]}\n{text}")
