"""A row depends on the keys it sees and on nothing else, bit for bit: NaN and infinities everywhere it does not look."""

import math

import pytest
import torch

from cute_attn import attention
from tests.support import make_gradients, make_qkv

BF16 = torch.bfloat16
# (seqlen_q, seqlen_k, rules): each edge of the band, both, rows that see nothing, and tiles that see nothing.
BANDS = {
    "causal": (300, 300, {"causal": True}),
    "causal-more-keys": (200, 431, {"causal": True}),
    "causal-rows-that-see-nothing": (400, 150, {"causal": True}),
    "right": (300, 260, {"window": (None, 9)}),
    "left": (300, 300, {"window": (40, None)}),
    "window": (300, 310, {"window": (70, 20)}),
    "softcap": (260, 260, {"causal": True, "softcap": 8.0}),
}
WIDTHS = [(64, 64), (128, 128), (96, 40), (256, 256), (192, 128)]


def edges(sq, sk, rules):
    """``(lo, hi)``: row i sees the keys from i + lo to i + hi."""
    left, right = rules.get("window", (None, None))
    left, right = (math.inf if side is None else side for side in (left, right))
    return sk - sq - left, sk - sq + (min(right, 0) if rules.get("causal") else right)


def plant(x, rows, seed):
    """NaN and infinities in ``rows`` (bool) of each batch element: whole rows, and single elements of others."""
    generator = torch.Generator(x.device).manual_seed(seed)
    chance = torch.rand(x.shape[:2], device=x.device, generator=generator)
    whole, one = rows & (chance < 0.5), rows & (chance >= 0.5)
    x[whole] = torch.where(torch.rand(x[whole].shape, device=x.device, generator=generator) < 0.5, math.nan, math.inf).to(x)
    column = int(torch.randint(x.shape[3], (), device=x.device, generator=generator))
    x[..., column][one] = math.nan


def run(q, k, v, dout, mechanism, rules):
    """``(out, lse), (dq, dk, dv)``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {"backend": "cute", "mechanism": mechanism, "deterministic": True}
    out, lse = attention(*leaves, return_lse=True, **options, **rules)
    return (out.detach(), lse.detach().transpose(1, 2)), torch.autograd.grad(out, leaves, dout)


def assert_same(name, got, want, where):
    """The same bits in the rows ``where`` (batch, rows)."""
    differs = (got != want).flatten(2).any(-1) & where
    assert where.any(), f"{name}: nothing is compared"
    assert not differs.any(), f"{name} differs in {int(differs.sum())} of {int(where.sum())} rows: first {differs.nonzero()[0]}"


@pytest.mark.parametrize(("d", "dv"), WIDTHS)
@pytest.mark.parametrize("band", BANDS)
def test_nothing_gets_out_of_a_masked_key(band, d, dv, mechanism):
    """Each batch element has another border row. The rows up to it, or from it on, see none of the planted keys, and their
    outputs and gradients have the bits that they have without. The other rows' queries and gradients are planted, too."""
    sq, sk, rules = BANDS[band]
    lo, hi = edges(sq, sk, rules)
    q, k, v = make_qkv(1, sq, sk, 2, 1, d, dv, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    (out, lse), (dq, _, _) = run(q, k, v, dout, mechanism, rules)
    border = torch.arange(0, sq, 3, device="cuda")[:, None]  # (batch, 1)
    row, key = torch.arange(sq, device="cuda"), torch.arange(sk, device="cuda")
    for rows, unseen in (
        (row <= border, key > border + hi),  # rows up to the border see none of the keys past its right edge
        (row >= border, key < border + lo),
    ):
        if not unseen.any():
            continue
        many = [x.expand(len(border), *x.shape[1:]).clone() for x in (q, k, v, dout)]
        for seed, (x, where) in enumerate(zip(many, (~rows, unseen, unseen, ~rows), strict=True)):
            plant(x, where, seed)
        (got_out, got_lse), (got_dq, _, _) = run(*many, mechanism, rules)
        for name, got, want in (("out", got_out, out), ("lse", got_lse, lse), ("dq", got_dq, dq)):
            assert_same(name, got, want, rows)


@pytest.mark.parametrize(("d", "dv"), WIDTHS)
@pytest.mark.parametrize("band", BANDS)
def test_nothing_gets_out_of_a_query_that_does_not_see(band, d, dv, mechanism):
    """dK and dV of keys that no planted query sees, and dQ of the queries that aren't planted."""
    sq, sk, rules = BANDS[band]
    lo, hi = edges(sq, sk, rules)
    q, k, v = make_qkv(1, sq, sk, 2, 1, d, dv, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    _, (dq, dk, dv) = run(q, k, v, dout, mechanism, rules)
    border = torch.arange(0, sq, 3, device="cuda")[:, None]
    row, key = torch.arange(sq, device="cuda"), torch.arange(sk, device="cuda")
    for planted, unseen in ((row <= border, key > border + hi), (row >= border, key < border + lo)):
        if not unseen.any():
            continue
        many = [x.expand(len(border), *x.shape[1:]).clone() for x in (q, k, v, dout)]
        plant(many[0], planted, 1)
        plant(many[3], planted, 2)
        _, (got_dq, got_dk, got_dv) = run(*many, mechanism, rules)
        if not planted.all():
            assert_same("dq", got_dq, dq, ~planted)
        assert_same("dk", got_dk, dk, unseen)
        assert_same("dv", got_dv, dv, unseen)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_is_seen_shows(where, d, dv, mechanism):
    """A key that is NaN, in one column of its value, makes NaN of every row that sees it, and of every gradient that such a row
    has a part in."""
    q, k, v = make_qkv(1, 300, 300, 2, 2, d, dv, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    rules, bad = {"window": (50, 0)}, 130
    {"k": k, "v": v}[where][0, bad, :, 3] = math.nan
    (out, lse), (dq, dk, dv) = run(q, k, v, dout, mechanism, rules)
    row = torch.arange(300, device="cuda")
    sees = (row >= bad) & (row <= bad + 50)
    seen = (row >= bad - 50) & (row <= bad + 50)  # by such a row
    for x in (out, lse[..., None], dq):
        assert x[0, sees].isnan().all()
        assert x[0, ~sees].isfinite().all()
    for x in (dk, dv):
        assert x[0, seen].isnan().all()
        assert x[0, ~seen].isfinite().all()


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
