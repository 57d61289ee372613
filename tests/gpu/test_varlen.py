"""Sequences of different lengths: each as if it were computed by itself, whatever lies beside it, on both mechanisms."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cute_attn import attention, attention_varlen, launch, plan
from tests.support import assert_gradients_close, make_qkv

pytestmark = pytest.mark.usefixtures("in_one_configuration")
BF16 = torch.bfloat16
config_of = launch._config_of_gradients
# (queries, keys) of each sequence: empty ones anywhere, one tile and a row more or less, many tiles.
LENGTHS = [(0, 0), (64, 64), (0, 70), (130, 200), (1, 1), (300, 129), (65, 0), (257, 512)]
LENGTHS += [(128, 128), (3, 1000), (700, 700), (0, 0)]
LENGTH = st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from([63, 64, 65, 127, 128, 129, 191, 192, 193, 600]))
TAIL = 37  # rows that belong to no sequence
# The rules, and whether gradients have the bits of a sequence by itself, whose key tiles begin elsewhere with a left edge.
RULES = {
    "full": ({}, True),
    "causal": ({"causal": True}, True),
    "window": ({"window": (100, 20)}, False),
    "softcap": ({"causal": True, "softcap": 20.0}, True),
}


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def make(lengths, d, dv=None, heads=(4, 2), tail=TAIL):
    """Packed q, k, v, dout and the bounds of queries and keys."""
    sq, sk = (sum(side) + tail for side in zip(*lengths, strict=True))
    q, k, v = (x[0] for x in make_qkv(1, sq, sk, *heads, d, dv or d, BF16, "cuda"))
    dout = make_qkv(1, sq, sk, *heads, dv or d, dv or d, BF16, "cuda", seed=1)[0][0]
    return q, k, v, dout, *(bounds(side) for side in zip(*lengths, strict=True))


def run(q, k, v, dout, *args, dlse=None, call=attention_varlen, **options):
    """``(out, lse), (dq, dk, dv)``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = call(*leaves, *args, backend="cute", return_lse=True, **options)
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return (out.detach(), lse.detach()), torch.autograd.grad(outputs, leaves, gradients)


def each(lengths):
    """``(queries, keys)`` of every sequence, as slices."""
    ends = zip(*(itertools.accumulate(side) for side in zip(*lengths, strict=True)), strict=True)
    return [(slice(q - n, q), slice(k - m, k)) for (q, k), (n, m) in zip(ends, lengths, strict=True)]


def assert_as_alone(results, q, k, v, dout, lengths, rules, same_keys, dlse=None, **options):
    """Each sequence as :func:`attention` has it; rows of none are zeros."""
    (out, lse), (dq, dk, dv) = results
    seen = [torch.zeros(len(x), dtype=torch.bool, device="cuda") for x in (q, k)]
    for i, (rows, keys) in enumerate(each(lengths)):
        seen[0][rows], seen[1][keys] = True, True
        alone = [x[None] for x in (q[rows], k[keys], v[keys])]
        of_lse = None if dlse is None else dlse[None, :, rows]
        (want, want_lse), want_gradients = run(*alone, dout[None, rows], call=attention, dlse=of_lse, **options, **rules)
        where = f"sequence {i}, {lengths[i]}"
        assert torch.equal(out[rows], want[0]), where
        assert torch.equal(lse[:, rows], want_lse[0]), where
        got = dq[rows], dk[keys], dv[keys]
        for name, x, y in zip(("dq", "dk", "dv"), got, want_gradients, strict=True):
            if same_keys:
                assert torch.equal(x, y[0]), f"{name} of {where}"
        if not same_keys and min(lengths[i]) > 100:
            assert_gradients_close([x[None] for x in got], *alone, dout[None, rows], of_lse, **rules)
    for x, where in ((out, seen[0]), (dq, seen[0]), (dk, seen[1]), (dv, seen[1])):
        assert not x[~where].count_nonzero()
    assert (lse[:, ~seen[0]] == -math.inf).all()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (256, 256), (96, 40), (192, 128)])
def test_each_sequence_as_alone(d, dv, rules, mechanism):
    rules, same_keys = RULES[rules]
    q, k, v, dout, *cu = make(LENGTHS, d, dv)
    options = {"mechanism": mechanism, "deterministic": True}
    results = run(q, k, v, dout, *cu, **options, **rules)
    assert_as_alone(results, q, k, v, dout, LENGTHS, rules, same_keys, **options)


@pytest.mark.parametrize("rules", ["full", "causal"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gradients_in_any_order_and_of_the_lse(d, rules, mechanism):
    rules, _ = RULES[rules]
    lengths = [(300, 300), (1000, 700), (129, 513)]
    q, k, v, dout, *cu = make(lengths, d)
    dlse = torch.randn(q.shape[1], q.shape[0], device="cuda")
    _, (dq, dk, dv) = run(q, k, v, dout, *cu, dlse=dlse, mechanism=mechanism, **rules)
    for rows, keys in each(lengths):
        alone = [x[None] for x in (q[rows], k[keys], v[keys])]
        got = [x[None] for x in (dq[rows], dk[keys], dv[keys])]
        assert_gradients_close(got, *alone, dout[None, rows], dlse[None, :, rows], **rules)


@pytest.mark.parametrize("rules", ["full", "causal"])
@pytest.mark.parametrize("needs", ["k", "v", "kv"])
def test_some_inputs_only(needs, rules, mechanism):
    """Without dQ nothing counts what is added to it; dK and dV have the bits that they have when all are asked for."""
    rules, _ = RULES[rules]
    q, k, v, dout, *cu = make(LENGTHS, 64)
    _, every = run(q, k, v, dout, *cu, mechanism=mechanism, **rules)
    leaves = [x.detach().requires_grad_(name in needs) for name, x in zip("qkv", (q, k, v), strict=True)]
    out = attention_varlen(*leaves, *cu, backend="cute", mechanism=mechanism, **rules)
    some = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)
    for name, x in zip(needs, some, strict=True):
        assert torch.equal(x, every["qkv".index(name)])


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rules", ["full", "causal"])
@pytest.mark.parametrize("needs", ["q", "k", "v", "kv"])
def test_some_inputs_of_which_few_rows_are_in_use(needs, rules, d, mechanism):
    """Zeros are written by warps that have something else to do only where that gradient is asked for. Without dQ there is no
    order to be fixed, and key tiles take their queries from the first on."""
    rules, _ = RULES[rules]
    q, k, v = make_qkv(20, 600, 600, 4, 2, d, d, BF16, "cuda")
    dout = torch.randn_like(q)
    used = torch.tensor([600, 0, 1, 300, 30] * 4, dtype=torch.int32, device="cuda")
    options = {"seqused_q": used, "seqused_k": used, "mechanism": mechanism, "deterministic": "q" in needs, **rules}
    _, every = run(q, k, v, dout, call=attention, **options)
    leaves = [x.detach().requires_grad_(name in needs) for name, x in zip("qkv", (q, k, v), strict=True)]
    out = attention(*leaves, backend="cute", **options)
    some = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], dout)
    past = torch.arange(600, device="cuda")[None] >= used[:, None]
    for name, x in zip(needs, some, strict=True):
        assert torch.equal(x, every["qkv".index(name)])
        assert not x[past].count_nonzero()


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("rules", ["full", "causal", "window"])
def test_nothing_comes_from_a_neighbour(rules, d, mechanism):
    """NaN and infinities in every other sequence and in rows of none: the same bits in the others."""
    rules, _ = RULES[rules]
    q, k, v, dout, *cu = make(LENGTHS, d)
    options = {"mechanism": mechanism, "deterministic": True, **rules}
    want = run(q, k, v, dout, *cu, **options)
    planted = [x.clone() for x in (q, k, v, dout)]
    kept = [torch.zeros(len(x), dtype=torch.bool, device="cuda") for x in (q, k)]
    for i, spans in enumerate(each(LENGTHS)):
        for x, span in zip(kept, spans, strict=True):
            x[span] = i % 2 == 1
    for x, where, value in zip(planted, (kept[0], kept[1], kept[1], kept[0]), (math.nan, math.inf) * 2, strict=True):
        x[~where] = value
    got = run(*planted, *cu, **options)
    for x, y, where in zip((got[0][0], *got[1]), (want[0][0], *want[1]), (kept[0], kept[0], kept[1], kept[1]), strict=True):
        assert torch.equal(x[where], y[where])
    assert torch.equal(got[0][1][:, kept[0]], want[0][1][:, kept[0]])


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("many", [40, 3])
def test_a_value_that_is_not_finite_reaches_those_who_see_it_alone(many, d, mechanism):
    """Blocks do their tiles again, and find the same ones: more tiles than a GPU has blocks, and fewer."""
    lengths = [(700, 700), (33, 60), (128, 128)] * many
    q, k, v, _, *cu = make(lengths, d)
    clean, clean_lse = attention_varlen(q, k, v, *cu, causal=True, mechanism=mechanism, return_lse=True)
    rows = [sequence for sequence, _ in each(lengths)]
    for i, (_, keys) in enumerate(each(lengths)):
        if i % 2:
            v[keys.stop - 1] = math.nan if i % 3 else math.inf
    out, lse = attention_varlen(q, k, v, *cu, causal=True, mechanism=mechanism, return_lse=True)
    for i, of in enumerate(rows):
        end = of.stop - i % 2
        assert torch.equal(out[of.start : end], clean[of.start : end]), f"sequence {i}"
        assert torch.equal(lse[:, of.start : end], clean_lse[:, of.start : end]), f"sequence {i}"
        assert not out[end : of.stop].isfinite().any(), f"sequence {i}"


@pytest.mark.parametrize("rules", ["full", "causal", "window"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_rows_in_use(d, rules, mechanism):
    """A padded rectangle: what is past the rows in use is NaN, is not read, and gets zeros."""
    rules, same_keys = RULES[rules]
    used = [(300, 300), (0, 20), (1, 300), (129, 64), (300, 0), (200, 257)]
    q, k, v = make_qkv(len(used), 300, 300, 4, 2, d, d, BF16, "cuda")
    dout = torch.randn_like(q)
    used_q, used_k = (torch.tensor(side, dtype=torch.int32, device="cuda") for side in zip(*used, strict=True))
    for b, (n, m) in enumerate(used):
        q[b, n:], dout[b, n:], k[b, m:], v[b, m:] = math.nan, math.nan, math.inf, math.nan
    options = {"mechanism": mechanism, "deterministic": True}
    (out, lse), (dq, dk, dv) = run(q, k, v, dout, call=attention, seqused_q=used_q, seqused_k=used_k, **options, **rules)
    assert out.shape == q.shape
    assert lse.shape == (len(used), 4, 300)
    for b, (n, m) in enumerate(used):
        assert not any(x.count_nonzero() for x in (out[b, n:], dq[b, n:], dk[b, m:], dv[b, m:]))
        assert (lse[b, :, n:] == -math.inf).all()
        alone = q[b : b + 1, :n], k[b : b + 1, :m], v[b : b + 1, :m]
        (want, want_lse), want_gradients = run(*alone, dout[b : b + 1, :n], call=attention, **options, **rules)
        assert torch.equal(out[b, :n], want[0])
        assert torch.equal(lse[b, :, :n], want_lse[0])
        if same_keys:
            for x, y in zip((dq[b, :n], dk[b, :m], dv[b, :m]), want_gradients, strict=True):
                assert torch.equal(x, y[0])


@pytest.mark.parametrize("rules", ["full", "causal"])
@pytest.mark.parametrize(
    ("d", "deterministic", "parts"),
    [(40, False, False), (64, False, False), (96, False, False), (128, False, False), (128, True, False), (128, False, True)],
)
def test_many_tiles_without_a_row_in_use(d, deterministic, parts, rules, monkeypatch):
    """More than there are blocks, several in succession, among others and alone; memory that nobody writes to holds NaN. Where
    inputs are ``parts`` of one tensor, gradients are, too."""
    batch, rows = 40, 1000
    used = [(n * 97) % (rows + 1) if n % 5 else (n % 10 != 0) * 1 for n in range(batch)]  # 0 and 1 often
    q, k, v = make_qkv(batch, rows, rows, 8, 8, d, d, BF16, "cuda")
    q, k, v = torch.stack((q, k, v), 2).unbind(2) if parts else (q, k, v)
    dout, made = torch.randn_like(q, memory_format=torch.contiguous_format), launch.empty_strided
    past = torch.arange(rows)[None] >= torch.tensor(used)[:, None]
    past = past.cuda()
    for x in (q, k, v, dout):
        x[past] = math.nan
    seqused = torch.tensor(used, dtype=torch.int32, device="cuda")

    def poison(*room):
        x = made(*room)
        return x.fill_(math.nan) if x.is_floating_point() else x

    options = {"mechanism": "tma_wgmma", "deterministic": deterministic, **RULES[rules][0]}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "empty_strided", poison)
        (out, lse), gradients = run(q, k, v, dout, call=attention, seqused_q=seqused, seqused_k=seqused, **options)
    for x in (out, *gradients):
        assert not x[past].count_nonzero()
    assert all(x.stride() == y.stride() for x, y in zip(gradients, (q, k, v), strict=True))
    assert (lse.transpose(1, 2)[past] == -math.inf).all()
    for b in (3, 6, 7, 39):
        n = used[b]
        alone = [x[b : b + 1, :n] for x in (q, k, v)]
        (want, _), want_gradients = run(*alone, dout[b : b + 1, :n], call=attention, **options)
        assert torch.equal(out[b, :n], want[0])
        if deterministic:
            assert all(torch.equal(x[b, :n], y[0]) for x, y in zip(gradients, want_gradients, strict=True))
        else:
            assert_gradients_close([x[b : b + 1, :n] for x in gradients], *alone, dout[b : b + 1, :n], None, **RULES[rules][0])


OTHER_TILES = {  # head dims, dtype, rows of a query tile, rules
    **{f"d128-{rules}": (128, 128, BF16, 80, RULES[rules][0]) for rules in ("full", "causal")},
    **{f"d104-dv40-{rules}": (104, 40, torch.float16, 80, RULES[rules][0]) for rules in ("full", "causal")},
    "d128-softcap": (128, 128, BF16, 80, {"softcap": 20.0}),
    "d104-dv40-softcap": (104, 40, torch.float16, 80, {"softcap": 20.0}),
    "d192-dv128-full": (192, 128, BF16, 48, {}),
    "d192-dv128-causal": (192, 128, torch.float16, 48, {"causal": True}),
}


@pytest.mark.parametrize("case", OTHER_TILES)
@pytest.mark.parametrize("rectangle", [False, True], ids=["packed", "in-use"])
def test_other_query_tiles(rectangle, case, in_one_kernel, monkeypatch):
    """Of lengths that cross their edges; memory that nobody writes to holds NaN, and so do rows that aren't in use."""
    d, dv, dtype, rows_of_tile, rules = OTHER_TILES[case]
    chosen, made = [], launch.empty_strided
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: max(choices))
    monkeypatch.setattr(launch, "_config_of_gradients", lambda *of: chosen.append(config_of(*of)) or chosen[-1])
    monkeypatch.setattr(launch, "head_blocks", lambda *_: 1)
    lengths = [(0, 0), (80, 64), (0, 70), (130, 200), (1, 1), (300, 129), (65, 0), (81, 512), (79, 128), (3, 1000), (700, 700)]
    used = [torch.tensor(side, dtype=torch.int32, device="cuda") for side in zip(*lengths, strict=True)]
    batch, heads = len(lengths), (6, 2)
    q, k, v = make_qkv(batch, 700, 1000, *heads, d, dv, dtype, "cuda")
    dout, dlse = torch.randn(*q.shape[:3], dv, dtype=dtype, device="cuda"), torch.randn(batch, heads[0], 700, device="cuda")
    keep_q, keep_k = (torch.arange(x.shape[1], device="cuda") < n[:, None] for x, n in zip((q, k), used, strict=True))
    for x, keep in ((q, keep_q), (dout, keep_q), (k, keep_k), (v, keep_k)):
        x[~keep] = math.nan

    def poison(*room):
        x = made(*room)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(launch, "empty_strided", poison)
    options = {"mechanism": "tma_wgmma", **rules}
    if rectangle:
        options |= {"call": attention, "seqused_q": used[0], "seqused_k": used[1]}
        _, (dq, dk, dv) = run(q, k, v, dout, dlse=dlse, **options)
        for x, keep in ((dq, keep_q), (dk, keep_k), (dv, keep_k)):
            assert not x[~keep].count_nonzero()
    else:
        packed = (x[keep] for x, keep in ((q, keep_q), (k, keep_k), (v, keep_k), (dout, keep_q)))
        of_lse = dlse.transpose(1, 2)[keep_q].T.contiguous()
        _, got = run(*packed, *(bounds(n.tolist()) for n in used), dlse=of_lse, **options)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for x, keep, y in zip((dq, dk, dv), (keep_q, keep_k, keep_k), got, strict=True):
            x[keep] = y
    assert {config.tile_m for config in chosen} == {rows_of_tile}
    for b, (n, m) in enumerate(lengths):
        alone = [x[b : b + 1, :rows] for x, rows in ((q, n), (k, m), (v, m))]
        got = [x[b : b + 1, :rows] for x, rows in ((dq, n), (dk, m), (dv, m))]
        if n * m:
            assert_gradients_close(got, *alone, dout[b : b + 1, :n], dlse[b : b + 1, :, :n], **rules)
        else:
            assert not any(x.count_nonzero() for x in got)


def test_another_mean_length_compiles_nothing(monkeypatch):
    """Though it takes other query tiles."""
    monkeypatch.setattr(launch, "rows_of_query_tile", plan.rows_of_query_tile)
    chosen, misses = [], []
    monkeypatch.setattr(launch, "_config_of_gradients", lambda *of: chosen.append(config_of(*of)) or chosen[-1])
    for lengths in ([(300, 300), (700, 700)], [(1080, 1080), (1000, 1000)]):
        q, k, v, dout, *cu = make(lengths, 128, heads=(2, 2), tail=0)
        run(q, k, v, dout, *cu, mechanism="tma_wgmma")
        misses.append(launch.prepared.cache_info().misses)
    assert [config.tile_m for config in chosen] == [64, 80]
    assert misses[0] == misses[1]


def test_rows_in_use_are_planned_once(mechanism, monkeypatch):
    """Calls that are alike share what was planned for the first, whatever their lengths; others are refused in words."""
    q, k, v = make_qkv(3, 200, 300, 4, 2, 64, 64, BF16, "cuda")
    dout, used = torch.randn_like(q), torch.tensor([200, 17, 130], dtype=torch.int32, device="cuda")
    options = {"call": attention, "mechanism": mechanism, "deterministic": True}
    run(q, k, v, dout, seqused_q=used, seqused_k=used, **options)
    with monkeypatch.context() as patch:
        for name in ("_PlannedForward", "_PlannedGradients"):
            patch.setattr(launch, name, None)
        (out, _), (dq, _, _) = run(q, k, v, dout, seqused_q=used - 10, seqused_k=used, **options)
    assert not torch.cat([x[b, n - 10 :].flatten() for x in (out, dq) for b, n in enumerate(used.tolist())]).count_nonzero()
    with pytest.raises(ValueError, match=r"seqused_k has dtype torch\.int64"):
        run(q, k, v, dout, seqused_q=used, seqused_k=used.long(), **options)
    with pytest.raises(ValueError, match="batch sizes of q, k, v"):
        run(q, *(x.reshape(6, 150, 2, 64) for x in (k, v)), dout, seqused_q=used, seqused_k=used, **options)


def test_one_side_in_use(mechanism):
    q, k, v = make_qkv(3, 70, 300, 4, 2, 64, 64, BF16, "cuda")
    used = torch.tensor([300, 17, 130], dtype=torch.int32, device="cuda")
    out = attention(q, k, v, seqused_k=used, causal=True, mechanism=mechanism)
    for b, n in enumerate(used.tolist()):
        want = attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True, mechanism=mechanism)
        assert torch.equal(out[b], want[0])


@pytest.mark.parametrize("d", [64, 128])
def test_many_sequences_of_length_1(d, mechanism):
    lengths = [(1, 1)] * 10_000
    q, k, v, dout, *cu = make(lengths, d)
    (out, _), (dq, dk, dv) = run(q, k, v, dout, *cu, causal=True, mechanism=mechanism)
    group = q.shape[1] // k.shape[1]
    assert torch.equal(out[:10_000], v[:10_000].repeat_interleave(group, 1))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4  # dP − delta, which differ by the rounding of sums
    want = dout[:10_000].float().unflatten(1, (-1, group)).sum(2)
    torch.testing.assert_close(dv[:10_000].float(), want, rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize("rules", ["full", "causal", "slopes", "not finite"])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_counts_of_all_rows_change_nothing(d, rules, mechanism):
    """Many sequences to a block of 128 rows, and one to many; empty ones anywhere."""
    lengths = [0, 127, 128, 129, 0, 0, *[1, 2, 0, 3] * 50, 1000, *[0] * 100, *[1] * 100, 31, 64, 0, 33, *[0] * 40]
    lengths = [(n, n) for n in lengths]
    q, k, v, dout, *cu = make(lengths, d)
    options = {"mechanism": mechanism, "deterministic": True, "causal": rules != "full"}
    if rules == "slopes":
        options["alibi_slopes"] = torch.rand(len(lengths), q.shape[1], device="cuda")
    if rules == "not finite":
        for x in (q, v, dout):
            x[torch.randint(len(x), (20,), device="cuda")] = math.nan
    dlse = torch.randn(q.shape[1], q.shape[0], device="cuda")
    used = torch.tensor(lengths, dtype=torch.int32, device="cuda").T.contiguous()
    for of_lse in (None, dlse):
        got = run(q, k, v, dout, *cu, dlse=of_lse, **options)
        want = run(q, k, v, dout, *cu, dlse=of_lse, seqused_q=used[0], seqused_k=used[1], **options)
        for x, y in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_q_k_and_v_in_one_tensor(mechanism):
    lengths = [200, 0, 77, 513]
    qkv = torch.randn(sum(lengths), 3, 4, 128, dtype=BF16, device="cuda")
    cu = bounds(lengths)
    results = []
    for packed in (qkv, None):
        q, k, v = qkv.unbind(1) if packed is not None else (x.contiguous() for x in qkv.unbind(1))
        results.append(run(q, k, v, torch.ones_like(q), cu, causal=True, deterministic=True, mechanism=mechanism))
    for x, y in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
        assert torch.equal(x, y)


def test_another_batch_compiles_nothing(mechanism):
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        lengths = torch.randint(0, 100, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator).tolist()
        q, k, v, dout, cu, _ = make([(n, n) for n in lengths], 64)
        run(q, k, v, dout, cu, causal=True, mechanism=mechanism)
        if step == 0:
            before = launch.prepared.cache_info().misses
    assert launch.prepared.cache_info().misses == before


def test_nested(mechanism):
    """Jagged tensors, other lengths of keys than of queries, narrowed or not, are what they are packed."""
    lengths = [(300, 129), (0, 0), (64, 64), (257, 512)]
    q, k, v, dout, *cu = make(lengths, 64, tail=0)
    used = [torch.tensor([n // 2 for n in side], device="cuda") for side in zip(*lengths, strict=True)]
    options = {"causal": True, "mechanism": mechanism, "deterministic": True}
    nested, (offsets_q, offsets_k) = torch.nested.nested_tensor_from_jagged, (x.long() for x in cu)
    for of_q, of_k in ((None, None), used):
        leaves = [nested(q, offsets_q, of_q), *(nested(x, offsets_k, of_k) for x in (k, v))]
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = attention(*leaves, backend="cute", **options)
        gradients = torch.autograd.grad(out, leaves, nested(dout, leaves[0].offsets(), of_q))
        counts = {} if of_q is None else {"seqused_q": of_q.int(), "seqused_k": of_k.int()}
        (want, _), want_gradients = run(q, k, v, dout, *cu, **counts, **options)
        for x, y in zip((out, *gradients), (want, *want_gradients), strict=True):
            assert torch.equal(x.values(), y)


def test_a_graph_replayed_with_other_lengths(mechanism):
    q, k, v, dout, cu, _ = make([(300, 300), (200, 200), (500, 500)], 128)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step():
        out = attention_varlen(*leaves, cu, causal=True, mechanism=mechanism, deterministic=True)
        return out, *torch.autograd.grad(out, leaves, dout)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1000, 0, 0], [1, 998, 1], [333, 333, 333], [0, 0, 0]):
        cu.copy_(bounds(lengths))
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


def test_the_same_bits_each_time(mechanism):
    lengths = [(n, n) for n in (100, 900, 30, 0, 257, 64)]
    q, k, v, dout, *cu = make(lengths, 128)
    want = run(q, k, v, dout, *cu, causal=True, mechanism=mechanism, deterministic=True)
    for _ in range(1000):
        (out, _), gradients = run(q, k, v, dout, *cu, causal=True, mechanism=mechanism, deterministic=True)
        assert torch.equal(out, want[0][0])
        assert all(map(torch.equal, gradients, want[1]))


@pytest.mark.parametrize("d", [64, 128])
def test_dq_of_each_of_many_calls(d):
    """Its sums are rounded while others are added up, by blocks whose shared memory holds two heads': of a GPU that is busy,
    each head gets its own in every call, up to the order in which they were added."""
    lengths = [(512, 512)] * 32
    q, k, v, dout, *cu = make(lengths, d, heads=(2048 // d,) * 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    want = run(q, k, v, dout, *cu, causal=True, mechanism="tma_wgmma", deterministic=True)[1][0]
    out, bound = attention_varlen(*leaves, *cu, causal=True, mechanism="tma_wgmma"), 2**-7 * want.abs().max()
    for _ in range(100):
        errors = [(torch.autograd.grad(out, leaves, dout, retain_graph=True)[0] - want).abs().max() for _ in range(40)]
        assert torch.stack(errors).max() <= bound


def test_more_than_2_to_the_31_elements(mechanism):
    rows, heads, d = 2**31 // (16 * 128) + 1000, 16, 128
    q = torch.randn(rows, heads, d, dtype=BF16, device="cuda")
    lengths = [512] * (rows // 512)
    out = attention_varlen(q, q, q, bounds(lengths), causal=True, mechanism=mechanism)
    for i in (0, len(lengths) // 2, len(lengths) - 1):
        part = q[None, i * 512 : (i + 1) * 512]
        assert torch.equal(out[i * 512 : (i + 1) * 512], attention(part, part, part, causal=True, mechanism=mechanism)[0])
    assert not out[len(lengths) * 512 :].count_nonzero()


WRONG = [[0, 500, 100, 700], [-5, 100, 2**30, 50], [600, 400, 200, 0], [0, 2**31 - 1, -(2**31), 700], [700, 700, 700], [0]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_bounds_end_and_leave_the_inputs_alone(wrong, causal, mechanism):
    """compute-sanitizer shows that nothing is accessed outside of the tensors; here, that it ends, also where an order is
    fixed, and that right bounds give afterwards what they gave before."""
    q, k, v, dout, right, _ = make([(700, 700)], 64, tail=0)
    options = {"causal": causal, "mechanism": mechanism, "deterministic": True}
    want = run(q, k, v, dout, right, **options)
    for deterministic in (False, True):
        bad = torch.tensor(wrong, dtype=torch.int32, device="cuda")
        run(q, k, v, dout, bad, **{**options, "deterministic": deterministic})
    torch.cuda.synchronize()
    got = run(q, k, v, dout, right, **options)
    for x, y in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "dv", "head_blocks"), [(64, 64, 1), (64, 64, 2), (64, 64, 4), (192, 128, 1)])
def test_wrong_bounds_end_in_other_kernels(d, dv, head_blocks, causal, in_one_kernel, monkeypatch):
    """Whose blocks share a key tile, and the one of wide heads."""
    monkeypatch.setattr(launch, "head_blocks", lambda *_: head_blocks)
    q, k, v, dout, right, _ = make([(700, 700)], d, dv, heads=(8, 2), tail=0)
    options = {"causal": causal, "mechanism": "tma_wgmma"}
    _, (want_dq, *want) = run(q, k, v, dout, right, **options)
    for wrong in WRONG:
        run(q, k, v, dout, torch.tensor(wrong, dtype=torch.int32, device="cuda"), **options)
    torch.cuda.synchronize()
    _, (dq, *got) = run(q, k, v, dout, right, **options)
    torch.testing.assert_close(dq, want_dq, rtol=2**-7, atol=2**-8)  # in whatever order the parts come
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rules", ["full", "causal"])
@given(st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=12), st.integers(0, 70), st.randoms(use_true_random=False))
@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths(mechanism, rules, lengths, tail, draw):
    """In use or not, by counts or without, both passes: the bits of each sequence by itself, and zeros elsewhere."""
    rules, options = RULES[rules][0], {"mechanism": mechanism, "deterministic": True}
    q, k, v, dout, *cu = make(lengths, 64, tail=tail)
    counted = draw.random() < 0.6
    used = [tuple(draw.randint(0, n) for n in both) if counted and draw.random() < 0.5 else both for both in lengths]
    seqused = dict(zip(("seqused_q", "seqused_k"), zip(*used, strict=True), strict=True))
    given_too = {name: torch.tensor(n, dtype=torch.int32, device="cuda") for name, n in seqused.items() if counted}
    (out, lse), (dq, dk, dv) = run(q, k, v, dout, *cu, **given_too, **options, **rules)
    kept = [torch.zeros(len(x), dtype=torch.bool, device="cuda") for x in (q, k)]
    for (rows, keys), (n, m) in zip(each(lengths), used, strict=True):
        r, s = slice(rows.start, rows.start + n), slice(keys.start, keys.start + m)
        kept[0][r], kept[1][s] = True, True
        alone = [x[None] for x in (q[r], k[s], v[s])]
        (want, want_lse), gradients = run(*alone, dout[None, r], call=attention, **options, **rules)
        for x, y in zip((out[r], lse[:, r], dq[r], dk[s], dv[s]), (want, want_lse, *gradients), strict=True):
            assert torch.equal(x, y[0])
    for x, where in ((out, kept[0]), (dq, kept[0]), (dk, kept[1]), (dv, kept[1])):
        assert not x[~where].count_nonzero()
    assert (lse[:, ~kept[0]] == -math.inf).all()


def test_gradients_of_more_than_2_to_the_31_elements(mechanism):
    """Offsets of all of them, and of dQ's sums, in 64 bits; the last sequences have the gradients that they have alone."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("60 GiB of GPU memory are needed")
    rows, heads, d = 2**31 // (16 * 128) + 1000, 16, 128
    q = torch.randn(rows, heads, d, dtype=BF16, device="cuda")
    count, options = rows // 512, {"causal": True, "mechanism": mechanism, "deterministic": True}
    _, found = run(q, q, q, q, bounds([512] * count), **options)
    for i in (0, count // 2, count - 1):
        part = slice(i * 512, (i + 1) * 512)
        _, expected = run(*(q[None, part],) * 4, call=attention, **options)
        torch.testing.assert_close(found[0][part], expected[0][0], rtol=2**-7, atol=2**-8)  # in whatever order the parts come
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(x[part], y[0])
    assert not any(x[count * 512 :].count_nonzero() for x in found)
