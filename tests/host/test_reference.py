"""The reference against float64 attention, what it promises beyond that, and the tolerance that judges it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import reference
from cute_attn.autograd import Attention
from cute_attn.problem import check_call
from tests import planted, support

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RULES: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (40, 70)},
    {"window": (None, 3)},
    {"causal": True, "window": (130, -1), "scale": 0.3},
    # Of the size of the scores: the softcap's rounding error is in proportion to the cap.
    {"softcap": 2.0},
    {"causal": True, "softcap": 3.0, "window": (7, None)},
]
HEADS = [(2, 2), (4, 2), (3, 1)]  # multi-head, grouped-query, multi-query
DIMS = [(64, 64), (40, 72), (8, 128), (128, 16), (256, 8)]
KINDS = ["gaussian", "peaky"]


def attend(q, k, v, *, tile_m=128, tile_n=128, scale=None, causal=False, window=None, softcap=0.0):
    call = check_call(q, k, v, scale=scale, causal=causal, window=window, softcap=softcap)
    functions = reference.attention, reference.gradients
    passes = tuple(partial(function, tile_m=tile_m, tile_n=tile_n) for function in functions)
    return Attention.apply(q, k, v, replace(call, passes=passes))


def gradients(q, k, v, dout, dlse=None, **rules):
    """``(dq, dk, dv)`` by autograd; ``dlse`` None is a log-sum-exp that nobody used."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, **rules)
    if dlse is None:
        return torch.autograd.grad(out, (q, k, v), dout)
    return torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))


def batch_of(sq, sk):
    """Small shapes in large batches: the tolerance is measured, and a few elements may have no error by luck."""
    return 1 if sq * sk > 1 << 16 else 64 if sq < 64 else 8 if sk < 64 else 2


def cases():
    """Every shape with every rule, but for the biggest, and every dtype; heads, head dims and kinds of input take turns. Where
    rows are many, half of the dtypes take turns, too, and heads are few."""
    number = 0
    for sq, sk in support.SHAPES:
        big = sq * sk > 1 << 21
        if big:  # made for a GPU's many blocks; here they come one after another, and 10 tiles of 128 are as good as 33
            sq = sk = 1280
        for r, rules in enumerate(RULES[:2] if big else RULES):
            for dtype in DTYPES[(r + (sq > sk)) % 2 :: 2] if sq > 1000 else DTYPES:
                heads = (1, 1) if big else (2, 1) if sq > 1000 else HEADS[number % 3]
                kind = KINDS[(number + number // 4) % 2]
                d, dv = DIMS[number % 5]
                said = "-".join(f"{key}={value}" for key, value in rules.items()) or "full"
                name = f"{sq}x{sk}-{said}-{str(dtype)[6:]}-heads{heads[0]}:{heads[1]}-d{d}:{dv}-{kind}"
                yield pytest.param(sq, sk, rules, dtype, heads, d, dv, kind, id=name)
                number += 1


@pytest.mark.parametrize(("sq", "sk", "rules", "dtype", "heads", "d", "dv", "kind"), list(cases()))
def test_is_attention(sq, sk, rules, dtype, heads, d, dv, kind):
    q, k, v = support.make_qkv(batch_of(sq, sk), sq, sk, heads[0], heads[1], d, dv, dtype, kind=kind, seed=sq + d)
    # Scores are summed in float32 also for 16-bit inputs, so the log-sum-exp is judged by that of float32 scores.
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    support.assert_close(attend(q, k, v, **rules), q, k, v, **rules, lse_dtype=lse_dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [15.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_softcaps_of_real_models(dtype, softcap, kind):
    q, k, v = support.make_qkv(1, 239, 255, 4, 2, 64, 64, dtype, kind=kind)
    support.assert_close(attend(q, k, v, softcap=softcap), q, k, v, softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_finite_scale(scale, dtype):
    q, k, v = support.make_qkv(1, 40, 70, 2, 1, 16, 16, dtype)
    rules = {"scale": scale, "causal": True}
    support.assert_close(attend(q, k, v, **rules, tile_n=32), q, k, v, **rules)


def test_strides_are_free():
    q, k, v = support.make_qkv(2, 33, 65, 4, 2, 24, 40)
    expected = attend(q, k, v, causal=True)
    head_first_q, head_first_k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    got = attend(head_first_q, head_first_k, v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), causal=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


# What a row sees. V is the identity, so that the output of a row is its P: the keys it sees have weight.


def visible_keys(sq, sk, **rules):
    q, k = torch.zeros(1, sq, 1, 8), torch.zeros(1, sk, 1, 8)
    out, lse = attend(q, k, torch.eye(sk)[None, :, None], tile_m=2, tile_n=2, **rules)
    seen = [set(row.nonzero().flatten().tolist()) for row in out[0, :, 0]]
    for row, keys in enumerate(seen):
        assert lse[0, 0, row].item() == pytest.approx(math.log(len(keys))) if keys else lse[0, 0, row] == -math.inf
    return seen


def test_causal_aligns_the_last_query_with_the_last_key():
    assert visible_keys(2, 5, causal=True) == [{0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    assert visible_keys(5, 2, causal=True) == [set(), set(), set(), {0}, {0, 1}]
    assert visible_keys(3, 3, causal=True) == [{0}, {0, 1}, {0, 1, 2}]


def test_window_aligns_the_last_query_with_the_last_key():
    assert visible_keys(2, 5, window=(1, 0)) == [{2, 3}, {3, 4}]
    assert visible_keys(3, 3, window=(0, 1)) == [{0, 1}, {1, 2}, {2}]
    assert visible_keys(5, 2, window=(None, 1)) == [set(), set(), {0}, {0, 1}, {0, 1}]
    assert visible_keys(2, 5, window=(1, -1)) == [{2, 3, 4}, {3, 4}]
    assert visible_keys(3, 3, window=(1, 2), causal=True) == [{0}, {0, 1}, {1, 2}]


def test_lse_is_a_natural_logarithm_in_float32():
    # 96 equal scores of 3: ln Σ e³ = 3 + ln 96.
    q = torch.full((1, 4, 2, 16), 0.75, dtype=torch.bfloat16)
    k = torch.ones(1, 96, 1, 16, dtype=torch.bfloat16)
    out, lse = attend(q, k, k, scale=0.25)
    assert out.dtype == torch.bfloat16
    assert out.shape == (1, 4, 2, 16)
    assert lse.dtype == torch.float32
    assert lse.shape == (1, 2, 4)
    torch.testing.assert_close(lse, torch.full_like(lse, 3 + math.log(96)))
    assert attend(q.double(), k.double(), k.double())[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_is_rounded_as_tensor_cores_take_it(dtype):
    # P is 1 and e^(−2⁻¹³): 16 bits round it to 1 in the product with V = (1, −1), and nothing rounds it in the sum.
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    k, v = (torch.tensor(x, dtype=dtype).view(1, 2, 1, 1) for x in ([0.0, -1.0], [1.0, -1.0]))
    out, lse = attend(q, k, v, scale=2.0**-13)
    assert out.item() == pytest.approx(0.0 if dtype.itemsize == 2 else math.tanh(2.0**-14), rel=1e-3, abs=0.0)
    assert lse.item() == pytest.approx(math.log1p(math.exp(-(2.0**-13))), rel=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 4, 4, 0), (0, 0, 0, 0)])
def test_sizes_of_zero(shape, dtype):
    batch, sq, sk, heads = shape
    q, k, v = (x.requires_grad_() for x in support.make_qkv(batch, sq, sk, heads, heads, 16, 24, dtype))
    out, lse = attend(q, k, v, causal=True)
    assert out.shape == (batch, sq, heads, 24)
    assert lse.shape == (batch, heads, sq)
    assert out.dtype == dtype
    assert not out.count_nonzero()
    assert bool((lse == -math.inf).all())
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert not x.grad.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile_m", [4, 16, 128])  # a whole tile masked, part of one, and all rows in one
def test_fully_masked_rows_are_zero_with_zero_gradients(dtype, tile_m):
    q, k, v = (x.requires_grad_() for x in support.make_qkv(1, 50, 20, 2, 1, 16, 16, dtype))
    out, lse = attend(q, k, v, causal=True, tile_m=tile_m, tile_n=8)
    assert not out[:, :30].count_nonzero()
    assert bool((lse[..., :30] == -math.inf).all())
    assert bool(lse[..., 30:].isfinite().all())
    (out.float().square().sum() + lse[..., 30:].sum()).backward()
    for x in (q, k, v):
        assert bool(x.grad.isfinite().all())
    assert not q.grad[:, :30].count_nonzero()
    assert bool(q.grad[:, 31:].abs().amax(-1).all())  # row 30 sees one key: its P is 1 whatever q is


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_row_of_a_tile_sees_do_not_leak(poison, dtype):
    # 64 queries are aligned with keys 136 … 199 and see 10 keys to the left, 3 to the right.
    q, k, v = support.make_qkv(2, 64, 200, 4, 2, 16, 24, dtype)
    rules = {"window": (10, 3), "tile_m": 16, "tile_n": 32}
    clean_out, clean_lse = attend(q, k, v, **rules)
    for tile in range(4):
        rows = slice(16 * tile, 16 * tile + 16)
        first, last = 136 + 16 * tile - 10, 136 + 16 * tile + 15 + 3
        dirty_k, dirty_v = k.clone(), v.clone()
        for x in (dirty_k, dirty_v):
            x[:, :first] = poison
            x[:, last + 1 :] = poison
        out, lse = attend(q, dirty_k, dirty_v, **rules)
        assert torch.equal(out[:, rows], clean_out[:, rows])
        assert torch.equal(lse[..., rows], clean_lse[..., rows])
        dirty_v[:, first] = poison  # and the first key that is seen does show
        assert not attend(q, dirty_k, dirty_v, **rules)[0][:, rows].isfinite().all()


def forward_and_backward(q, k, v, dout, **rules):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, **rules)
    return (out.detach(), lse.detach().transpose(1, 2)), torch.autograd.grad(out, leaves, dout)


def planted_inputs(sq, sk, dtype, heads=(2, 1)):
    q, k, v = support.make_qkv(1, sq, sk, *heads, 16, 24, dtype)
    return q, k, v, support.make_gradients(q, v)[0]


@pytest.mark.parametrize("band", planted.BANDS)
def test_nothing_gets_out_of_a_masked_key(band):
    sq, sk, rules = planted.BANDS[band]
    planted.check_masked_keys(forward_and_backward, *planted_inputs(sq, sk, torch.bfloat16), rules, every=23)


@pytest.mark.parametrize("band", planted.BANDS)
def test_nothing_gets_out_of_a_query_that_does_not_see(band):
    sq, sk, rules = planted.BANDS[band]
    planted.check_queries_that_do_not_see(forward_and_backward, *planted_inputs(sq, sk, torch.float32), rules, every=23)


@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_seen_shows(where):
    planted.check_what_is_seen_shows(forward_and_backward, *planted_inputs(300, 300, torch.float64, (2, 2)), where)


@pytest.mark.parametrize("planted_row", [None, 190])
def test_a_key_that_scores_minus_infinity_has_no_part_in_gradients(planted_row):
    inputs = planted_inputs(300, 300, torch.float32)
    planted.check_a_key_that_scores_minus_infinity(forward_and_backward, *inputs, planted_row)


# (dtype, times): q and k are so many times larger, their products up to the largest number of the dtype, in which plain
# PyTorch, which the tolerance is measured by, has them.
LARGE = [(torch.float16, 15.0), (torch.bfloat16, 100.0), (torch.bfloat16, 1e5), (torch.bfloat16, 1e15)]
LARGE += [(torch.float32, 100.0), (torch.float32, 1e4), (torch.float32, 1e15), (torch.float64, 1e4)]


@pytest.mark.parametrize(("dtype", "times"), LARGE)
@pytest.mark.parametrize("rules", [{}, {"causal": True}])
def test_scores_up_to_the_dtypes_range(dtype, times, rules):
    """The two passes see the same numbers: no probability is above 1."""
    q, k, v = support.make_qkv(2, 100, 150, 4, 2, 64, 64, dtype)
    dout, dlse = support.make_gradients(q, v)
    q, k = q * times, k * times
    support.assert_close(attend(q, k, v, **rules), q, k, v, **rules)
    support.assert_gradients_close(gradients(q, k, v, dout, dlse, **rules), q, k, v, dout, dlse, **rules)


def test_a_large_scale():
    q, k, v = support.make_qkv(2, 100, 150, 4, 2, 64, 64, torch.float32)
    dout, _ = support.make_gradients(q, v)
    support.assert_gradients_close(gradients(q, k, v, dout, scale=1e4), q, k, v, dout, scale=1e4)


def test_nan_that_is_seen_shows():
    q, k, v = support.make_qkv(1, 8, 8, 1, 1, 8, 8)
    q[0, 3] = math.nan
    out, lse = attend(q, k, v)
    assert bool(out[0, 3].isnan().all())
    assert bool(lse[0, 0, 3].isnan())
    assert bool(out[0, 4:].isfinite().all())
    assert bool(lse[0, 0, 4:].isfinite().all())


def test_groups_of_heads_read_their_key_head():
    q, k, v = support.make_qkv(2, 20, 30, 6, 2, 16, 16)
    grouped = attend(q, k, v)
    repeated = attend(q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2))
    for a, b in zip(grouped, repeated, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_are_not_written():
    q, k, v = support.make_qkv(1, 20, 30, 2, 1, 16, 16)
    before = [x.clone() for x in (q, k, v)]
    attend(q, k, v, causal=True, softcap=5.0)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


SIDE = st.none() | st.integers(0, 40)


@settings(max_examples=120)
@given(
    sq=st.integers(1, 60),
    sk=st.integers(1, 60),
    tile_m=st.integers(1, 70),
    tile_n=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.tuples(SIDE, SIDE),
    softcap=st.sampled_from([0.0, 2.0]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_tile_sizes_change_rounding_only(sq, sk, tile_m, tile_n, causal, window, softcap, kind, seed):
    q, k, v = support.make_qkv(1, sq, sk, 2, 1, 8, 16, torch.float64, kind=kind, seed=seed)
    rules = {"causal": causal, "window": window, "softcap": softcap}
    out, lse = attend(q, k, v, tile_m=tile_m, tile_n=tile_n, **rules)
    true_out, true_lse = support.oracle(q, k, v, **rules)
    # In float64 the rounding is some 1e-14 and any wrong mask is orders of magnitude more.
    torch.testing.assert_close(out, true_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, true_lse, rtol=1e-10, atol=1e-12)


# Gradients.


@pytest.mark.parametrize(("sq", "sk", "rules", "dtype", "heads", "d", "dv", "kind"), list(cases())[::3])
def test_gradients_are_those_of_attention(sq, sk, rules, dtype, heads, d, dv, kind):
    q, k, v = support.make_qkv(batch_of(sq, sk), sq, sk, heads[0], heads[1], d, dv, dtype, kind=kind, seed=sq + d)
    dout, dlse = support.make_gradients(q, v)
    if (sq + sk + dv) % 3:
        dlse = None
    support.assert_gradients_close(gradients(q, k, v, dout, dlse, **rules), q, k, v, dout, dlse, **rules)


def finite_lse(*args, **options):
    """``(out, lse)`` with 0 for −inf: a difference of infinities has no derivative."""
    out, lse = attend(*args, **options)
    return out, lse.where(lse != -math.inf, 0.0)


# Heads take turns: how many read a key head is nothing to the rules.
@pytest.mark.parametrize(
    ("rules", "sq", "sk", "heads"),
    [
        pytest.param(rules, *lengths, HEADS[(2 * r + i) % 3], id=f"{HEADS[(2 * r + i) % 3]}-{lengths}-{rules}")
        for r, rules in enumerate([*RULES, {"causal": True, "softcap": 1.0, "scale": -0.4}])
        for i, lengths in enumerate([(5, 9), (9, 5)])
    ],
)
def test_gradcheck(rules, sq, sk, heads):
    if "window" in rules:  # as narrow as the lengths
        rules = {**rules, "window": tuple(side and min(side, 2) for side in rules["window"])}
    q, k, v = (x.requires_grad_() for x in support.make_qkv(1, sq, sk, *heads, 3, 2, torch.float64))
    # Random sums of derivatives instead of each: test_gradcheck_of_sizes_up_to_a_tile_and_one looks at each.
    assert torch.autograd.gradcheck(partial(finite_lse, tile_m=4, tile_n=3, **rules), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("sq", range(1, 5))
@pytest.mark.parametrize("sk", range(1, 5))
def test_gradcheck_of_sizes_up_to_a_tile_and_one(sq, sk):
    q, k, v = (x.requires_grad_() for x in support.make_qkv(1, sq, sk, 2, 1, 2, 3, torch.float64))
    assert torch.autograd.gradcheck(partial(finite_lse, tile_m=3, tile_n=3, causal=True), (q, k, v))


def test_gradients_of_large_scores_under_a_small_softcap():
    q, k, v = support.make_qkv(1, 8, 8, 1, 1, 8, 8)
    dout, dlse = support.make_gradients(q, v)
    for gradient in gradients(q, k, v, dout, dlse, scale=1e4, softcap=1.0):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [15.0, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_softcaps_of_real_models(dtype, softcap, kind):
    q, k, v = support.make_qkv(1, 239, 255, 4, 2, 64, 64, dtype, kind=kind)
    dout, dlse = support.make_gradients(q, v)
    result = gradients(q, k, v, dout, dlse, softcap=softcap)
    support.assert_gradients_close(result, q, k, v, dout, dlse, softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_at_any_finite_scale(scale, dtype):
    q, k, v = support.make_qkv(1, 40, 70, 2, 1, 16, 16, dtype)
    dout, dlse = support.make_gradients(q, v)
    rules = {"scale": scale, "causal": True}
    support.assert_gradients_close(gradients(q, k, v, dout, dlse, **rules, tile_n=32), q, k, v, dout, dlse, **rules)


@settings(max_examples=80)
@given(
    sq=st.integers(1, 60),
    sk=st.integers(1, 60),
    tile_m=st.integers(1, 70),
    tile_n=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.tuples(SIDE, SIDE),
    softcap=st.sampled_from([0.0, 2.0]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_tile_sizes_change_the_rounding_of_gradients_only(sq, sk, tile_m, tile_n, causal, window, softcap, kind, seed):
    q, k, v = support.make_qkv(1, sq, sk, 2, 1, 8, 16, torch.float64, kind=kind, seed=seed)
    rules = {"causal": causal, "window": window, "softcap": softcap}
    dout, dlse = support.make_gradients(q, v)
    got = gradients(q, k, v, dout, dlse, tile_m=tile_m, tile_n=tile_n, **rules)
    for x, expected in zip(got, support.oracle_gradients(q, k, v, dout, dlse, **rules), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_and_ds_are_rounded_as_tensor_cores_take_them(dtype):
    # Three keys of 0: P is 1/3 and delta, a rounded output, as well; dP is (1, 0, 0), and dK is dS.
    q, k = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 3, 1, 1, dtype=dtype)
    v = torch.tensor([1.0, 0.0, 0.0], dtype=dtype).view(1, 3, 1, 1)
    _, dk, dv = gradients(q, k, v, torch.ones(1, 1, 1, 1, dtype=dtype), scale=1.0)
    third = torch.tensor(1 / 3, dtype=dtype).item()
    rounded = [torch.tensor((dP - third) / 3, dtype=dtype).item() for dP in (1.0, 0.0, 0.0)]
    assert dv.flatten().tolist() == pytest.approx([third] * 3, rel=1e-6)
    assert dk.flatten().tolist() == pytest.approx(rounded, rel=1e-6)


@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_gradients_that_are_not_needed_are_none_and_change_no_bit_of_the_others(needs):
    q, k, v = support.make_qkv(2, 70, 90, 4, 2, 16, 24, torch.bfloat16)
    rules = {"scale": None, "causal": True, "window": (30, None), "softcap": 3.0}
    call = check_call(q, k, v, **rules)
    out, _, lse_log2 = reference.attention(q, k, v, call)
    dout, dlse = support.make_gradients(q, v)
    every = reference.gradients(q, k, v, out, lse_log2, dout, dlse, call)
    some = reference.gradients(q, k, v, out, lse_log2, dout, dlse, call, needs, tile_m=128)
    for name, x, got, expected in zip("qkv", (q, k, v), some, every, strict=True):
        assert expected.dtype == x.dtype
        assert expected.shape == x.shape
        assert torch.equal(got, expected) if name in needs else got is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradients_read_no_key_that_a_tile_does_not_see(poison):
    # 64 queries are aligned with keys 136 … 199 and see 10 keys to the left: keys 0 … 125 are seen by none.
    q, k, v = support.make_qkv(2, 64, 200, 4, 2, 16, 24)
    dout, dlse = support.make_gradients(q, v)
    rules = {"window": (10, 0), "tile_m": 16, "tile_n": 32}
    clean = gradients(q, k, v, dout, dlse, **rules)
    for x in (k, v):
        x[:, :126] = poison
    for got, expected in zip(gradients(q, k, v, dout, dlse, **rules), clean, strict=True):
        assert torch.equal(got, expected)
    for x in (k, v):
        x[:, 152:] = poison  # the second query tile sees it, the first one does not
    dq, _, _ = gradients(q, k, v, dout, dlse, **rules)
    assert torch.equal(dq[:, :16], clean[0][:, :16])
    assert not dq[:, 16].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlse_does_not_count_in_rows_that_see_nothing(dtype):
    q, k, v = support.make_qkv(1, 50, 20, 2, 1, 16, 16, dtype)
    dout, dlse = support.make_gradients(q, v)
    expected = gradients(q, k, v, dout, dlse, causal=True, tile_m=16)
    dlse[..., :30] = math.nan
    for got, wanted in zip(gradients(q, k, v, dout, dlse, causal=True, tile_m=16), expected, strict=True):
        assert torch.equal(got, wanted)
    support.assert_gradients_close(expected, q, k, v, dout, dlse, causal=True)


def test_gradients_of_strided_inputs_and_gradients():
    q, k, v = support.make_qkv(2, 33, 65, 4, 2, 24, 40)
    dout, dlse = support.make_gradients(q, v)
    expected = gradients(q, k, v, dout, dlse, causal=True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    strided.append(dlse.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    for got, wanted in zip(gradients(*strided, causal=True), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    one = torch.ones(()).expand(2, 33, 4, 40)
    for got, wanted in zip(gradients(q, k, v, one), gradients(q, k, v, one.clone()), strict=True):
        assert torch.equal(got, wanted)


def test_gradients_of_groups_of_heads_are_sums():
    q, k, v = support.make_qkv(2, 20, 30, 6, 2, 16, 16, torch.float64)
    dout, dlse = support.make_gradients(q, v)
    dq, dk, dv = gradients(q, k, v, dout, dlse)
    apart = gradients(q, k.repeat_interleave(3, dim=2), v.repeat_interleave(3, dim=2), dout, dlse)
    torch.testing.assert_close(dq, apart[0])
    torch.testing.assert_close(dk, apart[1].unflatten(2, (2, 3)).sum(3))
    torch.testing.assert_close(dv, apart[2].unflatten(2, (2, 3)).sum(3))


# The tolerance itself: it accepts PyTorch's own attention and rejects what is a little wrong.

SMALL = {"batch": 1, "sq": 113, "sk": 203, "heads": 4, "heads_kv": 2, "d": 64, "dv": 32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tolerance_accepts_plain_attention(dtype, kind, rules):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype, kind=kind)
    support.assert_close(support.eager(q, k, v, **rules), q, k, v, **rules)


def spoil_scale(out, lse):
    return out * 1.05, lse


def spoil_row(out, lse):
    out = out.clone()
    out[:, [50, 51]] = out[:, [51, 50]]
    return out, lse


def spoil_element(out, lse):
    out = out.clone()
    out[0, 60, 1, 3] += 0.5
    return out, lse


def spoil_heads(out, lse):
    return out.roll(1, dims=2), lse


def spoil_nan(out, lse):
    out = out.clone()
    out[0, -1, -1, -1] = math.nan
    return out, lse


def spoil_lse_base(out, lse):
    return out, lse / math.log(2)


def spoil_lse_row(out, lse):
    lse = lse.clone()
    lse[0, 0, 70] = -math.inf
    return out, lse


def spoil_lse_nan(out, lse):
    lse = lse.clone()
    lse[0, 0, 70] = math.nan
    return out, lse


def spoil_dtype(out, lse):
    return (out.float() if out.dtype != torch.float32 else out.double()), lse


def spoil_shape(out, lse):
    return out.transpose(1, 2), lse


SPOILED = [
    spoil_scale,
    spoil_row,
    spoil_element,
    spoil_heads,
    spoil_nan,
    spoil_lse_base,
    spoil_lse_row,
    spoil_lse_nan,
    spoil_dtype,
    spoil_shape,
]


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_rejects_spoiled_results(spoil, dtype):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype)
    result = attend(q, k, v, causal=True)
    support.assert_close(result, q, k, v, causal=True)
    with pytest.raises(AssertionError):
        support.assert_close(spoil(*result), q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("computed", "asked"),
    [
        ({}, {"softcap": 2.0}),
        ({"softcap": 2.0}, {}),
        ({}, {"causal": True}),
        ({"window": (30, 10)}, {"window": (30, 9)}),  # one key too many
        ({"window": (29, 10)}, {"window": (30, 10)}),  # one key missing
        ({"scale": 0.135}, {"scale": 0.125}),
    ],
    ids=str,
)
def test_tolerance_rejects_other_rules(computed, asked, dtype, kind):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype, kind=kind)
    with pytest.raises(AssertionError):
        support.assert_close(attend(q, k, v, **computed), q, k, v, **asked)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_rejects_a_value_in_a_row_that_sees_nothing(dtype):
    q, k, v = support.make_qkv(1, 30, 20, 1, 1, 8, 8, dtype)
    out, lse = attend(q, k, v, causal=True)
    out[0, 3, 0, 0] = torch.finfo(dtype).smallest_normal
    with pytest.raises(AssertionError):
        support.assert_close((out, lse), q, k, v, causal=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_tolerance_accepts_plain_gradients(dtype, kind, rules):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype, kind=kind)
    dout, dlse = support.make_gradients(q, v)
    plain = support.eager_gradients(q, k, v, dout, dlse, **rules)
    support.assert_gradients_close(plain, q, k, v, dout, dlse, **rules)


def spoil_each(change):
    """The gradients with one of them changed, in turn."""
    return [lambda result, i=i: [change(x) if j == i else x for j, x in enumerate(result)] for i in range(3)]


def swapped_rows(x):
    """The largest row and the one before it."""
    x, row = x.clone(), int(x.abs().amax((0, 2, 3)).argmax())
    x[:, [row, row - 1]] = x[:, [row - 1, row]]
    return x


def nan_at_the_end(x):
    x = x.clone()
    x[0, -1, -1, -1] = math.nan
    return x


SPOILED_GRADIENTS = [
    *spoil_each(lambda x: x * 1.05),
    *spoil_each(lambda x: x.roll(1, dims=2)),
    *spoil_each(swapped_rows),
    *spoil_each(nan_at_the_end),
    *spoil_each(torch.zeros_like),
    *spoil_each(lambda x: x.float() if x.dtype != torch.float32 else x.double()),
    *spoil_each(lambda x: x.transpose(1, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tolerance_rejects_spoiled_gradients(dtype, kind):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype, kind=kind)
    dout, dlse = support.make_gradients(q, v)
    true = support.oracle_gradients(q, k, v, dout, dlse)
    allowed = support._allowed_gradients(q, k, v, dout, dlse, true, {})
    result = gradients(q, k, v, dout, dlse)
    support.assert_gradients_close(result, q, k, v, dout, dlse)
    for spoil in SPOILED_GRADIENTS:
        # The same judgement as assert_gradients_close's, with the oracle taken once.
        with pytest.raises(AssertionError):  # noqa: PT012
            for got, expected, error in zip(spoil(result), true, allowed, strict=True):
                support._check("gradient", got, dtype, expected, error)
    if kind == "gaussian":
        with pytest.raises(AssertionError, match="dv"):
            support.assert_gradients_close([*result[:2], result[2] * 1.05], q, k, v, dout, dlse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("computed", "asked"),
    [
        ({}, {"softcap": 2.0}),
        ({"softcap": 2.0}, {}),
        ({}, {"causal": True}),
        ({"window": (30, 10)}, {"window": (30, 9)}),  # one key too many
        ({"window": (29, 10)}, {"window": (30, 10)}),  # one key missing
        ({"scale": 0.15}, {"scale": 0.125}),
    ],
    ids=str,
)
def test_tolerance_rejects_gradients_of_other_rules(computed, asked, dtype, kind):
    q, k, v = support.make_qkv(**SMALL, dtype=dtype, kind=kind)
    dout, _ = support.make_gradients(q, v)
    for i, x in enumerate(gradients(q, k, v, dout, **computed)):
        one = [None, None, None]
        one[i] = x
        with pytest.raises(AssertionError):
            support.assert_gradients_close(one, q, k, v, dout, **asked)


def test_tolerance_rejects_gradients_without_that_of_lse():
    q, k, v = support.make_qkv(**SMALL)
    dout, dlse = support.make_gradients(q, v)
    for wrong in (gradients(q, k, v, dout), gradients(q, k, v, dout, -dlse)):
        with pytest.raises(AssertionError):
            support.assert_gradients_close(wrong, q, k, v, dout, dlse)


def test_tolerance_rejects_a_gradient_where_nothing_is_seen():
    q, k, v = support.make_qkv(1, 30, 20, 1, 1, 8, 8, torch.bfloat16)
    dout, _ = support.make_gradients(q, v)
    dq, dk, dv = gradients(q, k, v, dout, causal=True)
    dq[0, 3, 0, 0] = torch.finfo(torch.bfloat16).smallest_normal
    with pytest.raises(AssertionError, match="not 0"):
        support.assert_gradients_close((dq, dk, dv), q, k, v, dout, causal=True)
    q, k, v = support.make_qkv(1, 20, 30, 1, 1, 8, 8, torch.bfloat16)
    dout, _ = support.make_gradients(q, v)
    dq, dk, dv = gradients(q, k, v, dout, window=(2, 0))
    dv[0, 3, 0, 0] = torch.finfo(torch.bfloat16).smallest_normal
    with pytest.raises(AssertionError, match="not 0"):
        support.assert_gradients_close((dq, dk, dv), q, k, v, dout, window=(2, 0))


def test_blocks_of_rows_change_nothing(monkeypatch):
    q, k, v = support.make_qkv(2, 30, 20, 4, 2, 8, 16)
    dout, dlse = support.make_gradients(q, v)

    def everything():
        yield from (support.oracle(q, k, v, causal=True), support.eager(q, k, v, causal=True))
        for function in (support.oracle_gradients, support.eager_gradients, support._rounding_of_gradients):
            yield tuple(function(q, k, v, dout, dlse, causal=True))
        yield tuple(x for _, x in support._unseen(q, k, causal=True, window=None))

    whole = list(everything())
    monkeypatch.setattr(support, "MAX_SCORES", 7 * 4 * 20)
    torch.testing.assert_close(list(everything()), whole)


def test_oracle_agrees_with_pytorch():
    q, k, v = support.make_qkv(2, 30, 30, 4, 2, 8, 16, torch.float64)
    out, lse = support.oracle(q, k, v, causal=True)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert lse[0, 0, 0].item() == pytest.approx(float(q[0, 0, 0] @ k[0, 0, 0]) / math.sqrt(8))

    dout, _ = support.make_gradients(q, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sdpa(*(x.transpose(1, 2) for x in leaves), is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(out, leaves, dout.transpose(1, 2))
    torch.testing.assert_close(support.oracle_gradients(q, k, v, dout, causal=True), expected)


def test_oracle_has_the_gradient_of_lse():
    # lse = ln Σ exp(s): its gradient by s is the softmax.
    q, k, v = support.make_qkv(1, 5, 7, 1, 1, 4, 4, torch.float64)
    dq, dk, dv = support.oracle_gradients(q, k, v, torch.zeros(1, 5, 1, 4).double(), torch.ones(1, 1, 5).double())
    P = (q[0, :, 0] @ k[0, :, 0].T / 2.0).softmax(-1)
    torch.testing.assert_close(dq[0, :, 0], P @ k[0, :, 0] / 2.0)
    torch.testing.assert_close(dk[0, :, 0], P.T @ q[0, :, 0] / 2.0)
    assert not dv.count_nonzero()


def test_peaky_inputs_have_a_few_dominating_keys():
    q, k, _ = support.make_qkv(1, 200, 300, 2, 1, 64, 8, torch.float64, kind="peaky")
    P, _ = support.oracle(q, k, torch.eye(300, dtype=torch.float64)[None, :, None])
    weight = P[0].sum((0, 1)).sort(descending=True).values / 400
    assert weight[: support.PEAK_KEYS].sum() > 0.9
    assert weight[1] > 0.01  # not one key alone
    q, k, _ = support.make_qkv(1, 200, 300, 2, 1, 64, 8, torch.float64, kind="gaussian")
    flat, _ = support.oracle(q, k, torch.eye(300)[None, :, None])
    assert flat[0].sum((0, 1)).max() / 400 < 0.05
    for kind in KINDS:
        again = (support.make_qkv(1, 9, 9, 2, 1, 8, kind=kind, seed=3) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
