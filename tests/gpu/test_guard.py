"""A row depends on the keys it sees and on nothing else, bit for bit: NaN and infinities everywhere it does not look."""

import math

import pytest
import torch

from cute_attn import attention
from tests.planted import (
    BANDS,
    check_a_key_that_scores_minus_infinity,
    check_masked_keys,
    check_queries_that_do_not_see,
    check_what_is_seen_shows,
)
from tests.support import make_gradients, make_qkv

BF16 = torch.bfloat16
# Every band in each of the kernels, and heads of two widths, whose copies are of other shapes, in two.
CASES = [(band, d, d) for band in BANDS for d in (64, 128, 256)]
CASES += [(band, d, dv) for band in ("causal", "window") for d, dv in ((96, 40), (192, 128))]


@pytest.fixture
def run(mechanism):
    def forward_and_backward(q, k, v, dout, **rules):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        options = {"backend": "cute", "mechanism": mechanism, "deterministic": True, "return_lse": True}
        out, lse = attention(*leaves, **options, **rules)
        return (out.detach(), lse.detach().transpose(1, 2)), torch.autograd.grad(out, leaves, dout)

    return forward_and_backward


def make(sq, sk, d, dv, heads=(2, 1)):
    q, k, v = make_qkv(1, sq, sk, *heads, d, dv, BF16, "cuda")
    return q, k, v, make_gradients(q, v)[0]


@pytest.mark.parametrize(("band", "d", "dv"), CASES)
def test_nothing_gets_out_of_a_masked_key(band, d, dv, run):
    sq, sk, rules = BANDS[band]
    check_masked_keys(run, *make(sq, sk, d, dv), rules)


@pytest.mark.parametrize(("band", "d", "dv"), CASES)
def test_nothing_gets_out_of_a_query_that_does_not_see(band, d, dv, run):
    sq, sk, rules = BANDS[band]
    check_queries_that_do_not_see(run, *make(sq, sk, d, dv), rules)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_seen_shows(where, d, dv, run):
    check_what_is_seen_shows(run, *make(300, 300, d, dv, (2, 2)), where)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("planted_row", [None, 190])
def test_a_key_that_scores_minus_infinity_has_no_part_in_gradients(planted_row, d, dv, run):
    check_a_key_that_scores_minus_infinity(run, *make(300, 300, d, dv), planted_row)


@pytest.mark.parametrize("needs", ["q", "k", "v"])
def test_one_gradient_alone(needs, mechanism):
    """Of heads so wide that dQ has a kernel of its own: the one that looks at keys is another."""
    q, k, v, dout = make(300, 300, 256, 256)
    k[:, 200, :, 3] = math.inf
    results = []
    for names in ("qkv", needs):
        leaves = [x.detach().clone().requires_grad_(name in names) for name, x in zip("qkv", (q, k, v), strict=True)]
        out = attention(*leaves, causal=True, mechanism=mechanism, deterministic=True)
        wanted = [x for x in leaves if x.requires_grad]
        results.append(dict(zip(names, torch.autograd.grad(out, wanted, dout), strict=True))[needs])
    assert torch.equal(*(x.nan_to_num() for x in results))
    if needs == "q":
        assert results[0][:, :200].isfinite().all()


def test_many_tiles_a_block_are_done_again(mechanism):
    """Persistent blocks with several query tiles each: all of them are right, whichever was not finite."""
    q, k, v = make_qkv(8, 1000, 1000, 16, 4, 64, 64, BF16, "cuda")
    want = attention(q, k, v, causal=True, mechanism=mechanism)
    v = v.clone()
    v[::2, 500:] = math.nan
    got = attention(q, k, v, causal=True, mechanism=mechanism)
    assert torch.equal(got[1::2], want[1::2])
    assert torch.equal(got[::2, :500], want[::2, :500])
    assert got[::2, 500:].isnan().all()


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_gradients_of_many_tiles_a_block(d, dv, mechanism):
    """Persistent blocks with several tiles each: what is noted of one tile's keys isn't taken for the next one's."""
    q, k, v = make_qkv(8, 1000, 1000, 8, 4, d, dv, BF16, "cuda")
    dout = make_gradients(q, v)[0]

    def gradients(k, v):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, mechanism=mechanism, deterministic=True)
        return torch.autograd.grad(out, leaves, dout)

    want = gradients(k, v)
    k, v = k.clone(), v.clone()
    k[::2, 500:], v[::2, 700:] = math.nan, math.inf
    got = gradients(k, v)
    assert all(torch.equal(x[1::2], y[1::2]) for x, y in zip(got, want, strict=True))
    assert torch.equal(got[0][::2, :500], want[0][::2, :500])
    assert got[0][::2, 500:].isnan().all()


def test_gradients_of_one_kernel_of_wide_heads(in_one_kernel):
    """The same of sums of dQ that have no order: dK and dV have the same bits, and dQ but for their last."""
    q, k, v = make_qkv(8, 1000, 1000, 8, 4, 192, 128, BF16, "cuda")
    dout = make_gradients(q, v)[0]

    def gradients(k, v):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attention(*leaves, causal=True, mechanism="tma_wgmma"), leaves, dout)

    want = gradients(k, v)
    k, v = k.clone(), v.clone()
    k[::2, 500:], v[::2, 700:] = math.nan, math.inf
    got = gradients(k, v)
    assert all(torch.equal(x[1::2], y[1::2]) for x, y in zip(got[1:], want[1:], strict=True))
    torch.testing.assert_close(got[0][1::2], want[0][1::2], rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(got[0][::2, :500], want[0][::2, :500], rtol=8e-3, atol=1e-5)
    assert got[0][::2, 500:].isnan().all()
