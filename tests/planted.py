"""NaN and infinities where a query does not look, and what must not change: for the kernels and for the reference.

A check takes ``run(q, k, v, dout, **rules)``, which returns ``(out, lse), (dq, dk, dv)``, lse as (batch, seqlen_q, heads), and
gives the same bits for the same inputs.
"""

import math

import torch

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


def edges(q, k, rules):
    """``(lo, hi)``: row i sees the keys from i + lo to i + hi."""
    left, right = (math.inf if side is None else side for side in rules.get("window", (None, None)))
    shift = k.shape[1] - q.shape[1]
    return shift - left, shift + (min(right, 0) if rules.get("causal") else right)


def plant(x, rows, seed):
    """NaN and infinities in ``rows`` (bool) of each batch element: whole rows, and single elements of others."""
    generator = torch.Generator(x.device).manual_seed(seed)
    chance = torch.rand(x.shape[:2], device=x.device, generator=generator)
    whole, one = rows & (chance < 0.5), rows & (chance >= 0.5)
    x[whole] = torch.where(torch.rand(x[whole].shape, device=x.device, generator=generator) < 0.5, math.nan, math.inf).to(x)
    column = int(torch.randint(x.shape[3], (), device=x.device, generator=generator))
    x[..., column][one] = math.nan


def plant_infinities(x, rows, seed):
    """An infinity in one column of ``rows`` (bool) of each batch element: keys that score ±∞, or ±cap."""
    generator = torch.Generator(x.device).manual_seed(seed)
    column = int(torch.randint(x.shape[3], (), device=x.device, generator=generator))
    signs = torch.rand(x.shape[:3], device=x.device, generator=generator) < 0.5
    infinite = torch.where(signs, math.inf, -math.inf).to(x)
    x[..., column] = torch.where(rows[..., None], infinite, x[..., column])


def assert_same(name, got, want, where):
    """The same bits in the rows ``where`` (batch, rows)."""
    differs = (got != want).flatten(2).any(-1) & where
    assert where.any(), f"{name}: nothing is compared"
    assert not differs.any(), f"{name} differs in {int(differs.sum())} of {int(where.sum())} rows: first {differs.nonzero()[0]}"


def _borders(q, k, every):
    """Border rows, (batch, 1), one of ``every`` so many; and all rows and keys."""
    steps = ((q.shape[1], every), (q.shape[1], 1), (k.shape[1], 1))
    border, row, key = (torch.arange(0, n, step, device=q.device) for n, step in steps)
    return border[:, None], row, key


def check_masked_keys(run, q, k, v, dout, rules, every=3):
    """Each batch element has another border row. The rows up to it, or from it on, see none of the planted keys, and their
    outputs and gradients have the bits that they have without. The other rows' queries and gradients are planted, too; or
    nothing is but infinities in K, which leave rows finite."""
    lo, hi = edges(q, k, rules)
    border, row, key = _borders(q, k, every)
    clean = [x.expand(len(border), *x.shape[1:]) for x in (q, k, v, dout)]
    (out, lse), (dq, _, _) = run(*clean, **rules)
    for rows, unseen in ((row <= border, key > border + hi), (row >= border, key < border + lo)):
        if not unseen.any():
            continue
        many, infinite = ([x.clone() for x in clean] for _ in range(2))
        for seed, (x, where) in enumerate(zip(many, (~rows, unseen, unseen, ~rows), strict=True)):
            plant(x, where, seed)
        plant_infinities(infinite[1], unseen, 0)
        for planted in (many, infinite):
            (got_out, got_lse), (got_dq, _, _) = run(*planted, **rules)
            for name, got, want in (("out", got_out, out), ("lse", got_lse, lse), ("dq", got_dq, dq)):
                assert_same(name, got, want, rows)


def check_queries_that_do_not_see(run, q, k, v, dout, rules, every=3):
    """dK and dV of keys that no planted query sees, and dQ of the queries that aren't planted, have the bits that they have
    without."""
    lo, hi = edges(q, k, rules)
    border, row, key = _borders(q, k, every)
    clean = [x.expand(len(border), *x.shape[1:]) for x in (q, k, v, dout)]
    _, (dq, dk, dv) = run(*clean, **rules)
    for planted, unseen in ((row <= border, key > border + hi), (row >= border, key < border + lo)):
        if not unseen.any():
            continue
        many = [x.clone() for x in clean]
        plant(many[0], planted, 1)
        plant(many[3], planted, 2)
        _, (got_dq, got_dk, got_dv) = run(*many, **rules)
        if not planted.all():
            assert_same("dq", got_dq, dq, ~planted)
        assert_same("dk", got_dk, dk, unseen)
        assert_same("dv", got_dv, dv, unseen)


def check_what_is_seen_shows(run, q, k, v, dout, where):
    """A key that is NaN in one column, of itself or of its value, makes NaN of every row that sees it, and of every gradient
    that such a row has a part in; and of nothing else. q, k, v have 300 rows."""
    bad, left = 130, 50
    {"k": k, "v": v}[where][0, bad, :, 3] = math.nan
    (out, lse), (dq, dk, dv) = run(q, k, v, dout, window=(left, 0))
    row = torch.arange(300, device=q.device)
    sees = (row >= bad) & (row <= bad + left)
    seen = (row >= bad - left) & (row <= bad + left)  # by such a row
    for x in (out, lse[..., None], dq):
        assert x[0, sees].isnan().all()
        assert x[0, ~sees].isfinite().all()
    for x in (dk, dv):
        assert x[0, seen].isnan().all()
        assert x[0, ~seen].isfinite().all()


def check_a_key_that_scores_minus_infinity(run, q, k, v, dout, planted_row):
    """It has no part in any gradient, as a key whose weight is 0 otherwise, whether or not some other row is not finite. q, k,
    v have 300 rows."""
    q[..., 3] = -q[..., 3].abs() - 1.0
    far, infinite = k.clone(), k.clone()
    far[:, 140, :, 3], infinite[:, 140, :, 3] = 1e6, math.inf
    if planted_row is not None:
        dout[:, planted_row] = math.nan
    rules = {"window": (20, 0)}
    (out, lse), want = run(q, far, v, dout, **rules)
    (got_out, got_lse), got = run(q, infinite, v, dout, **rules)
    assert torch.equal(got_out, out)
    assert torch.equal(got_lse, lse)
    assert not want[2][:, 140].count_nonzero()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
