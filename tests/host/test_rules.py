"""The rules against brute force: what a row sees, which tiles are empty or whole, the softcap, the scales."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cute_attn.problem import check_call
from cute_attn.rules import LN_2, LOG2_E, Band, HostOps, TensorOps, rational_tanh, score_scales, softcap_slope, softcap_tanh

EDGE = st.none() | st.integers(-30, 30)
SIZE = st.integers(1, 24)


def sees(band, row, col):
    """The band formula, as its docstring writes it."""
    return (band.lo is None or row + band.lo <= col) and (band.hi is None or col <= row + band.hi)


@given(lo=EDGE, hi=EDGE, seqlen_k=SIZE, row=st.integers(0, 24))
def test_key_range_of_one_row_is_the_mask(lo, hi, seqlen_k, row):
    band = Band(lo, hi)
    begin, end = band.key_range(row, row, seqlen_k, HostOps)
    assert [begin <= col < end for col in range(seqlen_k)] == [sees(band, row, col) for col in range(seqlen_k)]
    assert begin >= 0
    assert end <= seqlen_k


@given(lo=EDGE, hi=EDGE, seqlen_k=SIZE, row_first=st.integers(0, 24), rows=st.integers(1, 12))
def test_key_range_holds_what_any_row_sees_and_nothing_before_or_after(lo, hi, seqlen_k, row_first, rows):
    band, tile = Band(lo, hi), range(row_first, row_first + rows)
    begin, end = band.key_range(tile[0], tile[-1], seqlen_k, HostOps)
    seen = [col for col in range(seqlen_k) if any(sees(band, row, col) for row in tile)]
    if seen:
        assert (begin, end) == (seen[0], seen[-1] + 1)
    elif lo is None or hi is None or lo <= hi:  # a band without an inside (left + right < 0) has no user
        assert begin >= end


@given(lo=EDGE, hi=EDGE, seqlen_k=SIZE, row_first=st.integers(0, 24), rows=st.integers(1, 12))
def test_whole_range_holds_exactly_what_every_row_sees(lo, hi, seqlen_k, row_first, rows):
    band, tile = Band(lo, hi), range(row_first, row_first + rows)
    begin, end = band.whole_range(tile[0], tile[-1], seqlen_k, HostOps)
    assert set(range(begin, end)) == {col for col in range(seqlen_k) if all(sees(band, row, col) for row in tile)}


@given(lo=EDGE, hi=EDGE, seqlen_k=SIZE, rows=st.integers(1, 24))
def test_tensors_and_numbers_give_the_same_ranges(lo, hi, seqlen_k, rows):
    band = Band(lo, hi)
    for rule in (band.key_range, band.whole_range):
        row = torch.arange(rows)
        columns = [torch.as_tensor(edge).expand(rows).tolist() for edge in rule(row, row + 2, seqlen_k, TensorOps)]
        assert list(zip(*columns, strict=True)) == [rule(r, r + 2, seqlen_k, HostOps) for r in range(rows)]


@given(lo=EDGE, hi=EDGE, seqlen_q=SIZE, col=st.integers(0, 24))
def test_transposed_band_is_the_mask_seen_from_a_key(lo, hi, seqlen_q, col):
    band = Band(lo, hi)
    begin, end = band.transposed().key_range(col, col, seqlen_q, HostOps)
    assert [begin <= row < end for row in range(seqlen_q)] == [sees(band, row, col) for row in range(seqlen_q)]
    assert band.transposed().transposed() == band


@given(lo=EDGE, hi=EDGE, seqlen_q=SIZE, col_first=st.integers(0, 24), cols=st.integers(1, 12))
def test_ranges_of_a_transposed_band_are_queries(lo, hi, seqlen_q, col_first, cols):
    band, tile = Band(lo, hi), range(col_first, col_first + cols)
    begin, end = band.transposed().key_range(tile[0], tile[-1], seqlen_q, HostOps)
    for row in range(seqlen_q):
        assert begin <= row < end or not any(sees(band, row, col) for col in tile)
    begin, end = band.transposed().whole_range(tile[0], tile[-1], seqlen_q, HostOps)
    assert set(range(begin, end)) == {row for row in range(seqlen_q) if all(sees(band, row, col) for col in tile)}


SIDE = st.none() | st.integers(-1, 20)


@given(sq=SIZE, sk=SIZE, causal=st.booleans(), window=st.none() | st.tuples(SIDE, SIDE))
def test_the_band_of_a_call(sq, sk, causal, window):
    """``causal`` and ``window`` as the user gives them, through the edges of a Call, against their definition."""
    q, k = torch.zeros(1, sq, 1, 1), torch.zeros(1, sk, 1, 1)
    call = check_call(q, k, k, scale=None, causal=causal, window=window, softcap=0.0)
    lo = None if call.left is None else call.shift - call.left
    hi = None if call.right is None else call.shift + call.right
    left, right = window or (None, None)
    for row in range(sq):
        from_the_end = sq - 1 - row  # the last query is aligned with the last key
        aligned = sk - 1 - from_the_end
        expected = [
            not (causal and col > aligned)
            and (left in (None, -1) or aligned - col <= left)
            and (right in (None, -1) or col - aligned <= right)
            for col in range(sk)
        ]
        begin, end = Band(lo, hi).key_range(row, row, sk, HostOps)
        assert [begin <= col < end for col in range(sk)] == expected


@pytest.mark.parametrize(("dtype", "units"), [(torch.float64, 3), (torch.float32, 3)])
@pytest.mark.parametrize("cap", [0.5, 2.0, 15.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 0.125, -2.0])
def test_softcap_is_tanh(dtype, units, cap, scale):
    scale_log2, scale_by_cap = score_scales(scale, cap)
    score = torch.cat([torch.linspace(-300, 300, 4001), torch.tensor([0.0, 1e-30, 1e30, -1e30])]).to(dtype)
    expected = torch.tanh(score.double() * (scale / cap))
    got = softcap_tanh(score, scale_by_cap, TensorOps)
    # The rounding of 1 − 2 / (1 + e), and that of the power, relative to its exponent, where tanh is not flat.
    allowed = units * torch.finfo(dtype).eps * (1 + (score.double() * scale / cap).abs() * (1 - expected**2))
    assert bool(((got.double() - expected).abs() <= allowed).all())
    assert scale_log2 == pytest.approx(cap / math.log(2))


class InTorch:
    """What :func:`rational_tanh` takes from a kernel's operations."""

    @staticmethod
    def clamp(x, bound):
        return x.clamp(-bound, bound)

    @staticmethod
    def reciprocal(x):
        return x.reciprocal()


def test_the_tanh_of_large_caps_is_exact_in_relation_to_its_size():
    x = torch.cat([torch.logspace(-37, 2, 200_001), torch.linspace(0, 10, 200_001)[1:], torch.tensor([1e30, math.inf])])
    x = torch.cat([x, -x])
    got, expected = rational_tanh(x, InTorch).double(), x.double().tanh()
    assert ((got / expected - 1).abs() <= 5e-7).all()
    assert (got.abs() <= 1).all()
    assert rational_tanh(torch.tensor([math.nan]), InTorch).isnan()
    assert rational_tanh(torch.tensor([0.0]), InTorch).item() == 0.0


@given(score=st.floats(-300, 300), cap=st.sampled_from([0.5, 2.0, 50.0]), scale=st.sampled_from([1.0, 0.125, -2.0]))
def test_softcap_of_a_number_is_that_of_a_tensor(score, cap, scale):
    _, scale_by_cap = score_scales(scale, cap)
    tensor = softcap_tanh(torch.tensor([score], dtype=torch.float64), scale_by_cap, TensorOps).item()
    if abs(score * scale / cap) < 300:  # Python's floats overflow beyond
        assert softcap_tanh(score, scale_by_cap, HostOps) == pytest.approx(tensor, abs=1e-15)


@pytest.mark.parametrize("score", [1e4, -1e4, 1e30, -1e30, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softcap_of_large_scores_is_one_with_a_gradient_of_zero(score, dtype):
    x = torch.tensor([score], dtype=dtype, requires_grad=True)
    y = softcap_tanh(x, 0.5, TensorOps)
    y.sum().backward()
    assert y.item() == math.copysign(1.0, score)
    assert x.grad is not None
    assert x.grad.item() == 0.0


@given(score=st.floats(-300, 300), cap=st.sampled_from([0.5, 2.0, 50.0]), scale=st.sampled_from([1.0, 0.125, -2.0]))
def test_softcap_slope_is_the_derivative(score, cap, scale):
    x = torch.tensor(score * scale, dtype=torch.float64, requires_grad=True)
    (cap * torch.tanh(x / cap)).backward()
    _, scale_by_cap = score_scales(scale, cap)
    t = softcap_tanh(torch.tensor(score, dtype=torch.float64), scale_by_cap, TensorOps)
    assert x.grad is not None
    assert softcap_slope(t).item() == pytest.approx(x.grad.item(), rel=1e-9, abs=1e-12)
    assert softcap_slope(0.0) == 1.0


@given(score=st.floats(-50, 50), scale=st.floats(-3, 3), cap=st.sampled_from([0.0, 0.7, 5.0, 30.0]))
def test_scales_turn_scores_into_base_2(score, scale, cap):
    scale_log2, scale_by_cap = score_scales(scale, cap)
    if cap:
        log2 = softcap_tanh(torch.tensor(score, dtype=torch.float64), scale_by_cap, TensorOps).item() * scale_log2
        natural = cap * math.tanh(score * scale / cap)
    else:
        log2, natural = score * scale_log2, score * scale
    assert log2 * LN_2 == pytest.approx(natural, rel=1e-12, abs=1e-13)


def test_constants():
    assert math.isclose(LOG2_E * LN_2, 1.0, rel_tol=1e-15)
    assert math.isclose(2.0**LOG2_E, math.e, rel_tol=1e-15)
