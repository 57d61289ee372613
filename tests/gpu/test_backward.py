"""Gradients of the kernels against the oracle, by the policy of tests/support.py, on both mechanisms."""

import gc
import itertools
import math
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cute_attn import api, attention, launch, plan
from cute_attn.layouts.base import CARE, CAREFUL, STORED, TICKET
from tests.gpu.test_forward import CAPS, KERNELS, LARGE
from tests.support import SHAPES, assert_close, assert_gradients_close, make_gradients, make_qkv

BF16 = torch.bfloat16


def run(q, k, v, mechanism, dout, dlse=None, *, needs="qkv", **options):
    """``(dq, dk, dv)`` of the kernels, None for what ``needs`` does not name. Options are attention's."""
    q, k, v = (x.detach().requires_grad_(name in needs) for name, x in zip("qkv", (q, k, v), strict=True))
    out, lse = attention(q, k, v, backend="cute", mechanism=mechanism, return_lse=True, **options)
    outputs = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    gradients = iter(torch.autograd.grad(outputs[0], [x for x in (q, k, v) if x.requires_grad], outputs[1]))
    return tuple(next(gradients) if name in needs else None for name in "qkv")


def make(batch, sq, sk, heads, heads_kv, d, dv=None, dtype=BF16, **options):
    """q, k, v, dout and dlse on the GPU."""
    q, k, v = make_qkv(batch, sq, sk, heads, heads_kv, d, d if dv is None else dv, dtype, "cuda", **options)
    return q, k, v, *make_gradients(q, v)


def assert_same_bits(gradients, expected):
    for name, got, wanted in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert (got is None) == (wanted is None), f"{name} is {got}, expected {wanted}"
        assert got is None or torch.equal(got, wanted), f"{name} has other bits"


@pytest.mark.parametrize(("d", "dv", "dtype", "rules"), KERNELS)
@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
def test_matches_oracle(d, dv, dtype, rules, kind, mechanism):
    for sq, sk in SHAPES:
        for heads in ((2, 2), (6, 2)) if max(sq, sk) <= 2000 else ((1, 1), (2, 1)):
            # Few rows or keys in larger batches: the tolerance is measured, and a few elements may have no error by luck.
            q, k, v, dout, _ = make(16 if min(sq, sk) < 64 else 2, sq, sk, *heads, d, dv, dtype, kind=kind, seed=sq + sk)
            result = run(q, k, v, mechanism, dout, **rules)
            try:
                assert_gradients_close(result, q, k, v, dout, **rules)
            except AssertionError as error:
                raise AssertionError(f"at (seqlen_q, seqlen_k) = ({sq}, {sk}), heads {heads}: {error}") from error


@pytest.mark.parametrize(
    ("d", "dv", "dtype", "rules"),
    [
        (192, 128, BF16, {}),
        (192, 128, torch.float16, {"causal": True}),
        (136, 72, BF16, {"causal": True}),
        (160, 128, BF16, {"window": (None, 30)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
def test_one_kernel_of_wide_heads(d, dv, dtype, rules, kind, in_one_kernel):
    for sq, sk in SHAPES:
        for heads in ((2, 2), (6, 2)) if max(sq, sk) <= 2000 else ((1, 1), (2, 1)):
            q, k, v, dout, dlse = make(16 if min(sq, sk) < 64 else 2, sq, sk, *heads, d, dv, dtype, kind=kind, seed=sq + sk)
            result = run(q, k, v, "tma_wgmma", dout, dlse, **rules)
            try:
                assert_gradients_close(result, q, k, v, dout, dlse, **rules)
            except AssertionError as error:
                raise AssertionError(f"at (seqlen_q, seqlen_k) = ({sq}, {sk}), heads {heads}: {error}") from error
            assert_same_bits((None, *run(q, k, v, "tma_wgmma", dout, dlse, **rules)[1:]), (None, *result[1:]))


def test_wide_heads_have_one_kernel_where_sequences_are_long(monkeypatch):
    """And no order is asked for: dQ's sums have none there; nor are there too few key tiles for a GPU."""
    config_of, chosen = launch._config_of_gradients, []
    monkeypatch.setattr(launch, "_config_of_gradients", lambda *of: chosen.append(config_of(*of)) or chosen[-1])
    monkeypatch.setattr(launch, "takes_one_kernel", lambda *of: plan.takes_one_kernel(*of[:-1], at_once=16))
    for n, heads, rules, expected in (
        (1023, 3, {}, "tma_wgmma_wide"),
        (1024, 3, {}, "tma_wgmma_backward"),
        (1024, 1, {}, "tma_wgmma_wide"),
        (1024, 3, {"deterministic": True}, "tma_wgmma_wide"),
        (2047, 3, {"causal": True}, "tma_wgmma_wide"),
        (2048, 3, {"causal": True}, "tma_wgmma_backward"),
    ):
        q, k, v, dout, dlse = make(1, n, n, heads, heads, 192, 128)
        result = run(q, k, v, "tma_wgmma", dout, dlse, **rules)
        assert chosen.pop().backward == expected
        assert_gradients_close(result, q, k, v, dout, dlse, causal=rules.get("causal", False))
        if rules.get("deterministic"):
            assert_same_bits(run(q, k, v, "tma_wgmma", dout, dlse, **rules), result)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (5, 1)])
def test_head_groups(heads, mechanism):
    for d, rules in ((128, {"causal": True}), (64, {}), (256, {"causal": True})):
        q, k, v, dout, _ = make(3, 300, 500, *heads, d)
        assert_gradients_close(run(q, k, v, mechanism, dout, **rules), q, k, v, dout, **rules)


@pytest.mark.parametrize("head_blocks", [1, 2, 4])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (96, 40)])
def test_blocks_that_share_a_key_tile(d, dv, head_blocks, monkeypatch):
    """Whatever the plan would have chosen; dK and dV have the same bits each time, and as many as the plan chooses from."""
    monkeypatch.setattr(launch, "head_blocks", lambda *_: head_blocks)
    for rules in ({"causal": True}, {"window": (70, None), "softcap": 20.0}):
        for heads in ((8, 2), (4, 1)):
            q, k, v, dout, dlse = make(2, 300, 333, *heads, d, dv)
            result = run(q, k, v, "tma_wgmma", dout, dlse, **rules)
            assert_gradients_close(result, q, k, v, dout, dlse, **rules)
            assert_same_bits((None, *run(q, k, v, "tma_wgmma", dout, dlse, **rules)[1:]), (None, *result[1:]))


@pytest.mark.parametrize("needs", ["q", "k", "v", "kv"])
def test_some_inputs_of_blocks_that_share_a_key_tile(needs, monkeypatch):
    monkeypatch.setattr(launch, "head_blocks", lambda *_: 2)
    q, k, v, dout, _ = make(2, 300, 333, 8, 2, 128)
    some = run(q, k, v, "tma_wgmma", dout, needs=needs, causal=True)
    assert_gradients_close(some, q, k, v, dout, causal=True)


@pytest.mark.parametrize(("d", "dv", "dtype"), [(128, 128, BF16), (104, 40, torch.float16)])
@pytest.mark.parametrize("rules", [{}, {"softcap": 20.0}], ids=["full", "softcap"])
def test_query_tiles_of_80_rows(d, dv, dtype, rules, monkeypatch):
    """Of lengths that cross their edges, where the plan would have chosen them and where not; NaN in memory behind the rows
    doesn't show."""
    chosen = []
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: chosen.append(max(choices)) or chosen[-1])
    monkeypatch.setattr(launch, "head_blocks", lambda *_: 1)
    for sq, sk in ((1, 70), (79, 128), (80, 65), (81, 300), (240, 257), (1030, 513), (700, 700)):
        for heads in ((2, 2), (6, 2)):
            q, k, v, dout, dlse = make(16 if sq == 1 else 3, sq, sk, *heads, d, dv, dtype)
            beyond = [torch.cat((x, torch.full_like(x, math.nan)), 1)[:, : x.shape[1]] for x in (q, k, v, dout)]
            result = run(*beyond[:3], "tma_wgmma", beyond[3], dlse, **rules)
            assert_gradients_close(result, q, k, v, dout, dlse, **rules)
    assert set(chosen) == {80}


@pytest.mark.parametrize(("sq", "sk", "heads"), [(1, 70, 2), (81, 300, 6), (1030, 513, 2), (400, 400, 48)])
def test_query_tiles_of_80_rows_in_a_fixed_order(sq, sk, heads, monkeypatch):
    """Always the same bits; at last with many key tiles a block, in groups of heads of which the first takes the rest."""
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: max(choices))
    q, k, v, dout, dlse = make(16 if sq == 1 else 3, sq, sk, heads, 2 if heads == 6 else heads, 128)
    result = run(q, k, v, "tma_wgmma", dout, dlse, deterministic=True)
    assert_gradients_close(result, q, k, v, dout, dlse)
    assert_same_bits(run(q, k, v, "tma_wgmma", dout, dlse, deterministic=True), result)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rules", [{}, {"softcap": 20.0}], ids=["causal", "softcap"])
def test_query_tiles_of_80_rows_under_a_right_edge(rules, deterministic, monkeypatch):
    """The same where the edge cuts two query tiles of each key tile, of which the first may begin before it; at last with many
    key tiles a block. In a fixed order always the same bits, and NaN in a row or a key stays where it is seen."""
    chosen, rules = [], {"causal": True, **rules}
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: chosen.append(max(choices)) or chosen[-1])
    monkeypatch.setattr(launch, "head_blocks", lambda *_: 1)
    for sq, sk, heads in ((1, 70, 2), (79, 128, 6), (81, 300, 2), (240, 257, 6), (1030, 513, 2), (700, 700, 6), (400, 400, 48)):
        q, k, v, dout, dlse = make(16 if sq == 1 else 3, sq, sk, heads, 2 if heads == 6 else heads, 128)
        beyond = [torch.cat((x, torch.full_like(x, math.nan)), 1)[:, : x.shape[1]] for x in (q, k, v, dout)]
        result = run(*beyond[:3], "tma_wgmma", beyond[3], dlse, deterministic=deterministic, **rules)
        assert_gradients_close(result, q, k, v, dout, dlse, **rules)
        again = run(q, k, v, "tma_wgmma", dout, dlse, deterministic=deterministic, **rules)
        assert_same_bits((None, *again[1:]), (None, *result[1:]))
        assert not deterministic or torch.equal(again[0], result[0])
    k[:, 200] = math.nan  # the first 200 rows don't see it
    spoiled = run(q, k, v, "tma_wgmma", dout, dlse, deterministic=deterministic, **rules)
    assert spoiled[0][:, :200].isfinite().all()
    assert spoiled[0][:, 200:].isnan().all()
    assert set(chosen) == {80}


@pytest.mark.parametrize(("d", "dv", "dtype", "rules"), [KERNELS[3], KERNELS[4], KERNELS[5], KERNELS[9]])
@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
def test_gradient_of_lse(d, dv, dtype, rules, kind, mechanism):
    for sq, sk in ((113, 203), (255, 256), (1023, 300)):
        q, k, v, dout, dlse = make(2, sq, sk, 6, 2, d, dv, dtype, kind=kind)
        assert_gradients_close(run(q, k, v, mechanism, dout, dlse, **rules), q, k, v, dout, dlse, **rules)


def test_lse_alone(mechanism):
    q, k, v, dout, dlse = make(2, 200, 300, 4, 2, 128)
    for x in (q, k, v):
        x.requires_grad_()
    _, lse = attention(q, k, v, mechanism=mechanism, return_lse=True, causal=True)
    gradients = torch.autograd.grad(lse, (q, k, v), dlse)
    q, k, v = (x.detach() for x in (q, k, v))
    assert_gradients_close(gradients, q, k, v, torch.zeros_like(dout), dlse, causal=True)


def test_strided_gradient_of_lse(mechanism):
    q, k, v, dout, dlse = make(2, 200, 300, 4, 2, 64)
    want = run(q, k, v, mechanism, dout, dlse, deterministic=True)
    strided = dlse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_same_bits(run(q, k, v, mechanism, dout, strided, deterministic=True), want)
    one = torch.ones((), device="cuda").expand(2, 4, 200)
    want = run(q, k, v, mechanism, dout, one.contiguous(), deterministic=True)
    assert_same_bits(run(q, k, v, mechanism, dout, one, deterministic=True), want)


def test_scale(mechanism):
    q, k, v, dout, _ = make(1, 200, 200, 2, 2, 128)
    for rules in ({"scale": 0.3}, {"scale": 0.3, "softcap": 4.0}, {"scale": -0.3, "softcap": 4.0}):
        assert_gradients_close(run(q, k, v, mechanism, dout, **rules), q, k, v, dout, **rules)


@pytest.mark.parametrize(("dtype", "times"), LARGE)
@pytest.mark.parametrize("rules", [{}, {"causal": True}], ids=["full", "causal"])
def test_scores_up_to_the_dtypes_range(dtype, times, rules, mechanism):
    """The two passes see the same numbers: P is exactly 1 where one key outweighs all others."""
    for d in (64, 128, 256):
        q, k, v, dout, _ = make(2, 200, 300, 4, 2, d, dtype=dtype)
        q, k = q * times, k * times
        assert_gradients_close(run(q, k, v, mechanism, dout, **rules), q, k, v, dout, **rules)


@pytest.mark.parametrize(("dtype", "cap"), CAPS)
def test_softcap_of_any_size(dtype, cap, mechanism):
    for times in (1.0, 20.0):
        q, k, v, dout, _ = make(2, 200, 300, 4, 2, 128, dtype=dtype)
        rules, q = {"softcap": cap, "causal": True}, q * times
        assert_gradients_close(run(q, k, v, mechanism, dout, **rules), q, k, v, dout, **rules)


OTHERWISE = {
    "on-the-cpu": lambda x: x.cpu(),
    "strided": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "wider": lambda x: x.double(),
}


@pytest.mark.parametrize("of_out", [True, False], ids=["out and lse", "lse alone"])
@pytest.mark.parametrize("how", OTHERWISE)
def test_saved_tensors_may_come_back_otherwise(how, of_out, mechanism):
    """From hooks that offload or pack them: another device, other strides, another address, another dtype. Whether such a call
    has been planned or not."""
    q, k, v, dout, dlse = make(2, 200, 300, 4, 2, 64)
    rules = {"causal": True, "deterministic": True}
    want = run(q, k, v, mechanism, dout if of_out else torch.zeros_like(dout), dlse, **rules)
    used, gradients = (slice(None), (dout, dlse)) if of_out else (slice(1, None), (dlse,))
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(OTHERWISE[how], lambda x: x):
            leaves = [x.requires_grad_() for x in (q, k, v)]
            outputs = attention(*leaves, mechanism=mechanism, return_lse=True, **rules)
        assert_same_bits(torch.autograd.grad(outputs[used], leaves, gradients), want)
        api._kept.clear()


def test_blocks_take_tickets(mechanism, monkeypatch):
    """Where dQ has a fixed order, as many as there are key tiles; then it does not matter in which order blocks start. Those
    that are persistent draw one more each, which no tile is left for."""
    made, empty_strided = [], launch.empty_strided
    q, k, v, dout, _ = make(3, 300, 700, 4, 2, 128)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "empty_strided", lambda *room: made.append(empty_strided(*room)) or made[-1])
        run(q, k, v, mechanism, dout, causal=True, deterministic=True)
    (signals,) = (x for x in made if x.dtype == torch.int32)
    tiles = 3 * 2 * -(-700 // 128)
    blocks = min(tiles, torch.cuda.get_device_properties(0).multi_processor_count) if mechanism == "tma_wgmma" else 0
    assert signals[TICKET].item() == tiles + blocks
    assert signals[CAREFUL].item() == 0


@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (70, 30)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("word", [-1, 7, STORED, CARE], ids=["-1", "7", "stored", "care"])
def test_memory_of_signals_may_hold_anything(word, rules, mechanism, monkeypatch):
    """The kernels clear what they need, and leave nothing that asks for care: a graph, which always has the same memory, is as
    fast after NaN as before."""
    made, empty_strided = [], launch.empty_strided
    q, k, v, dout, dlse = make(3, 300, 700, 4, 2, 128)
    other, expected = torch.full_like(k, math.nan), run(q, k, v, mechanism, dout, dlse, deterministic=True, **rules)

    def filled(sizes, strides, dtype):
        x = empty_strided(sizes, strides, dtype)
        if dtype == torch.int32:
            made.append(x.fill_(word))
        return x

    monkeypatch.setattr(launch, "empty_strided", filled)
    assert_same_bits(run(q, k, v, mechanism, dout, dlse, deterministic=True, **rules), expected)
    assert_gradients_close(run(q, k, v, mechanism, dout, dlse, **rules), q, k, v, dout, dlse, **rules)
    other[:, :-1] = k[:, :-1]  # NaN in the last key alone
    run(q, other, v, mechanism, dout, dlse, **rules)
    if mechanism == "tma_wgmma":
        assert len(made) == 3
        assert not rules or not any(x[CAREFUL].item() for x in made)


SUBSETS = ["".join(names) for n in (1, 2, 3) for names in itertools.combinations("qkv", n)]
ASKED = [
    *((needs, 128, 128, (4, 2)) for needs in SUBSETS),
    ("q", 64, 64, (3, 3)),
    ("k", 256, 256, (4, 2)),
    ("v", 256, 256, (4, 4)),
    ("kv", 256, 256, (4, 4)),
    *((needs, 192, 128, (4, 2)) for needs in ("q", "k", "v", "kv")),
    ("qv", 96, 40, (4, 1)),
]


@pytest.mark.parametrize(("needs", "d", "dv", "heads"), ASKED, ids=str)
def test_some_inputs_only(needs, d, dv, heads, mechanism):
    """What is not asked for is not there, and what is has the bits that it has when all are asked for. (The fixed order of
    dQ's sums turns that of dK's and dV's around, so both calls have it or neither: without dQ there is none to fix.)"""
    q, k, v, dout, _ = make(2, 300, 411, *heads, d, dv)
    rules = {"causal": True, "deterministic": "q" in needs}
    every = run(q, k, v, mechanism, dout, **rules)
    assert_gradients_close(every, q, k, v, dout, causal=True)
    some = run(q, k, v, mechanism, dout, needs=needs, **rules)
    assert_same_bits(some, [x if name in needs else None for name, x in zip("qkv", every, strict=True)])


@pytest.mark.parametrize("rules", [{"causal": True}, {"window": (None, 30)}], ids=["causal", "right"])
def test_rows_that_see_nothing(rules, mechanism):
    """Zeros, whatever is in their gradients of lse."""
    q, k, v, dout, dlse = make(2, 500, 200, 4, 2, 128)
    want = run(q, k, v, mechanism, dout, dlse, deterministic=True, **rules)
    assert_gradients_close(want, q, k, v, dout, dlse, **rules)
    assert not want[0][:, :200].count_nonzero()
    dlse[:, :, :200] = math.nan
    assert_same_bits(run(q, k, v, mechanism, dout, dlse, deterministic=True, **rules), want)


def test_more_batches_than_a_grid_has_layers(mechanism):
    """A grid's second and third dimension end at 65,535."""
    q, k, v = make_qkv(65_600, 1, 2, 1, 1, 64, 64, torch.bfloat16, "cuda")
    dout = make_gradients(q, v)[0]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = torch.autograd.grad(attention(q, k, v, mechanism=mechanism), (q, k, v), dout)
    some = slice(65_500, 65_600)
    assert_gradients_close([x[some] for x in got], *(x.detach()[some] for x in (q, k, v, dout)))


def test_keys_that_nobody_sees(mechanism):
    """Zeros, and they are not read."""
    q, k, v, dout, _ = make(2, 100, 700, 4, 2, 128)
    for left in (0, 37, 200):
        rules = {"causal": True, "window": (left, None)}
        want = run(q, k, v, mechanism, dout, deterministic=True, **rules)
        assert_gradients_close(want, q, k, v, dout, **rules)
        first_seen = 600 - left
        assert not want[1][:, :first_seen].count_nonzero()
        assert not want[2][:, :first_seen].count_nonzero()
        dirty_k, dirty_v = k.clone(), v.clone()
        for x in (dirty_k, dirty_v):
            x[:, :first_seen] = math.nan
        assert_same_bits(run(q, dirty_k, dirty_v, mechanism, dout, deterministic=True, **rules), want)


def test_strided_inputs(mechanism):
    """Transposed, sliced out of a fused projection, and expanded tensors give the bits of their contiguous copies."""
    b, s, h, d = 2, 321, 4, 128
    fused, _, _, dout, _ = make(b, s, s, 3 * h, 3 * h, d)
    q, k, v = fused.chunk(3, dim=2)
    dout = dout[:, :, :h]

    def gradients(q, k, v, dout):
        return run(q, k, v, mechanism, dout, causal=True, deterministic=True)

    want = gradients(*(x.contiguous() for x in (q, k, v, dout)))
    assert_gradients_close(want, q, k, v, dout, causal=True)
    assert_same_bits(gradients(q, k, v, dout), want)
    assert_same_bits(gradients(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))), want)
    one_head = [x[:, :, :1].expand(b, s, h, d) for x in (k, v)]
    want = gradients(q.contiguous(), *(x.contiguous() for x in one_head), dout)
    assert_same_bits(gradients(q, *one_head, dout), want)


def test_any_strides_of_the_incoming_gradient(mechanism):
    b, s, h, d = 2, 200, 4, 64
    q, k, v, dout, _ = make(b, s, 300, h, 2, d)

    def gradients(dout):
        return run(q, k, v, mechanism, dout, deterministic=True)

    want = gradients(dout)
    last_strided = dout.transpose(1, 3).contiguous().transpose(1, 3)
    misaligned = torch.empty(dout.numel() + 1, dtype=BF16, device="cuda")[1:].view(dout.shape).copy_(dout)
    odd_rows = torch.empty(b, s, h, d + 3, dtype=BF16, device="cuda")[..., :d].copy_(dout)
    for strided in (last_strided, misaligned, odd_rows):
        assert torch.equal(strided, dout)
        assert_same_bits(gradients(strided), want)
    row = dout[:1, :1, :1]
    number = torch.full((), 0.5, dtype=BF16, device="cuda")
    for expanded in (row.expand(b, s, h, d), dout[:, :1].expand(b, s, h, d), number.expand(b, s, h, d)):
        assert_same_bits(gradients(expanded), gradients(expanded.contiguous()))


def test_sum(mechanism):
    """``out.sum().backward()``: its gradient is a single number, expanded."""
    q, k, v, dout, _ = make(2, 200, 300, 4, 2, 128)
    want = run(q, k, v, mechanism, torch.ones_like(dout), deterministic=True)
    for x in (q, k, v):
        x.requires_grad_()
    attention(q, k, v, mechanism=mechanism, deterministic=True).sum().backward()
    assert_same_bits([x.grad for x in (q, k, v)], want)


FAR_APART = {
    "batches": lambda s, h, d: (1 << 30, h * d, d, 1),
    "rows": lambda s, h, d: (h * d, 1 << 23, d, 1),
    "heads": lambda s, h, d: (s * d, d, (1 << 31) + 64, 1),
}


@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("apart", FAR_APART)
def test_past_two_to_the_31_elements(apart, d, mechanism):
    """The last batch element, row or head lies past 2³¹ elements, in q, k, v and dout."""
    b, s, h = 3, 300, 2
    strides = FAR_APART[apart](s, h, d)
    small = make(b, s, s, h, h, d)[:4]
    elements = 1 + sum((extent - 1) * stride for extent, stride in zip((b, s, h, d), strides, strict=True))
    assert elements > 1 << 31
    storage = torch.empty(elements + (4 << 18), dtype=BF16, device="cuda")  # one for all four, a little apart in it
    big = [storage.as_strided(x.shape, strides, i << 18).copy_(x) for i, x in enumerate(small)]
    q, k, v, dout = small
    want = run(q, k, v, mechanism, dout, causal=True, deterministic=True)
    assert_gradients_close(want, q, k, v, dout, causal=True)
    q, k, v, dout = big
    assert_same_bits(run(q, k, v, mechanism, dout, causal=True, deterministic=True), want)


BEYOND = [
    pytest.param(64, {}, id="d64"),
    pytest.param(128, {}, id="d128"),
    pytest.param(128, {"causal": True}, id="d128-causal"),
    pytest.param(128, {"window": (40, 20)}, id="d128-window"),
    pytest.param(256, {}, id="d256"),
]


@pytest.mark.parametrize(("d", "rules"), BEYOND)
def test_nan_beyond_the_sequence_changes_nothing(d, rules, mechanism):
    """Rows of the same storage past seqlen_q and seqlen_k hold NaN: in q, k, v and dout."""
    q, k, v, dout, _ = make(2, 203, 333, 2, 2, d)
    want = run(q, k, v, mechanism, dout, deterministic=True, **rules)
    poisoned = []
    for x in (q, k, v, dout):
        batch, length, heads, width = x.shape
        storage = torch.full((batch, length + 300, heads, width), math.nan, dtype=BF16, device="cuda")
        storage[:, :length] = x
        poisoned.append(storage[:, :length])
    q, k, v, dout = poisoned
    assert_same_bits(run(q, k, v, mechanism, dout, deterministic=True, **rules), want)


def test_nan_in_a_seen_key_shows(mechanism):
    q, k, v, dout, _ = make(1, 64, 64, 1, 1, 64)
    k[0, 10] = math.nan
    for gradient in run(q, k, v, mechanism, dout):
        assert gradient.isnan().all()


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (96, 40), (128, 128), (256, 256)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_buffers_that_start_as_nan_leave_none(deterministic, d, dv, mechanism, monkeypatch):
    """Whatever is allocated without being cleared (gradients, dQ's sums, row values) holds NaN before the kernels run."""
    q, k, v, dout, dlse = make(2, 257, 129, 6, 3, d, dv, torch.float16)
    rules = {"causal": True, "deterministic": deterministic}
    poisoned = []

    def poisoning(allocate):
        def allocate_and_poison(*args, **kwargs):
            made = allocate(*args, **kwargs)
            poisoned.append(made.fill_(math.nan) if made.is_floating_point() else made)
            return made

        return allocate_and_poison

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
        for module, name in ((launch, "empty_strided"), (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")):
            patch.setattr(module, name, poisoning(getattr(module, name)))
        result = run(q, k, v, mechanism, dout, dlse, **rules)
    assert len(poisoned) >= 5  # out, lse and three gradients
    assert_gradients_close(result, q, k, v, dout, dlse, causal=True)


# More tiles than three times an H200's 132 multiprocessors, of so many heads that causal ones, and those in a fixed order,
# are taken in several groups, of which the first lacks some.
MANY_TILES = [
    pytest.param(64, 64, (2048, 2048), (9, 20, 4), {"causal": True}, id="d64-causal-gqa"),
    pytest.param(128, 128, (1300, 1024), (9, 8, 8), {}, id="d128"),
    pytest.param(128, 128, (1300, 700), (8, 16, 8), {"causal": True}, id="d128-rows-that-see-nothing"),
    pytest.param(128, 128, (300, 2048), (8, 8, 8), {"window": (100, 0)}, id="d128-keys-that-nobody-sees"),
    pytest.param(128, 128, (1300, 1024), (3, 8, 2), {"window": (300, 20)}, id="d128-window-gqa"),
    pytest.param(96, 96, (1300, 1024), (3, 8, 2), {"causal": True}, id="d96-causal-gqa"),
    pytest.param(80, 72, (1024, 1300), (3, 8, 8), {}, id="d80-dv72"),
    pytest.param(256, 256, (1024, 2048), (5, 12, 12), {"causal": True}, id="d256-causal"),
    pytest.param(256, 256, (1300, 700), (5, 12, 6), {}, id="d256-gqa"),
    pytest.param(256, 256, (1300, 700), (8, 12, 12), {"causal": True}, id="d256-rows-that-see-nothing"),
    pytest.param(256, 256, (300, 2048), (8, 8, 8), {"window": (100, 0)}, id="d256-keys-that-nobody-sees"),
    pytest.param(192, 128, (1300, 1024), (3, 16, 8), {"causal": True}, id="d192-dv128-causal-gqa"),
    pytest.param(160, 136, (700, 1024), (3, 16, 16), {}, id="d160-dv136"),
    pytest.param(256, 192, (1024, 1024), (4, 16, 16), {"window": (200, 0)}, id="d256-dv192-window"),
    pytest.param(192, 256, (512, 1024), (4, 16, 4), {"causal": True}, id="d192-dv256-causal"),
]


@pytest.mark.parametrize(("d", "dv", "lengths", "sizes", "rules"), MANY_TILES)
def test_many_tiles(d, dv, lengths, sizes, rules, mechanism):
    batch, heads, heads_kv = sizes
    q, k, v, dout, _ = make(batch, *lengths, heads, heads_kv, d, dv)
    result = run(q, k, v, mechanism, dout, deterministic=True, **rules)
    assert_gradients_close(result, q, k, v, dout, **rules)
    assert_gradients_close(run(q, k, v, mechanism, dout, **rules), q, k, v, dout, **rules)
    for _ in range(20):
        assert_same_bits(run(q, k, v, mechanism, dout, deterministic=True, **rules), result)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_deterministic_has_the_same_bits_every_time(d, causal, mechanism):
    q, k, v, dout, _ = make(2, 1000, 1000, 4, 2, d)
    first = run(q, k, v, mechanism, dout, causal=causal, deterministic=True)
    assert_gradients_close(first, q, k, v, dout, causal=causal)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for got, want in zip(run(q, k, v, mechanism, dout, causal=causal, deterministic=True), first, strict=True):
            differing += (got != want).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("d", [64, 128, 256])
def test_only_dq_depends_on_the_order_of_atomics(d, mechanism):
    """By default too, the gradients of k and v have the same bits every time."""
    q, k, v, dout, _ = make(2, 1000, 1000, 4, 2, d)
    _, *first = run(q, k, v, mechanism, dout, causal=True)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        for got, want in zip(run(q, k, v, mechanism, dout, causal=True)[1:], first, strict=True):
            differing += (got != want).sum()
    assert differing.item() == 0


def test_two_backward_passes_over_one_graph(mechanism):
    q, k, v, dout, dlse = make(2, 300, 300, 4, 2, 128)
    want = run(q, k, v, mechanism, dout, dlse, causal=True, deterministic=True)
    for x in (q, k, v):
        x.requires_grad_()
    outputs = attention(q, k, v, mechanism=mechanism, causal=True, return_lse=True, deterministic=True)
    for keep in (True, False):
        assert_same_bits(torch.autograd.grad(outputs, (q, k, v), (dout, dlse), retain_graph=keep), want)


def test_activation_checkpointing(mechanism):
    q, k, v, dout, _ = make(2, 300, 300, 4, 2, 128)
    want = run(q, k, v, mechanism, dout, causal=True, deterministic=True)
    for x in (q, k, v):
        x.requires_grad_()

    def block(q, k, v):
        return attention(q, k, v, mechanism=mechanism, causal=True, deterministic=True)

    for reentrant in (False, True):
        for x in (q, k, v):
            x.grad = None
        checkpoint(block, q, k, v, use_reentrant=reentrant).backward(dout)
        assert_same_bits([x.grad for x in (q, k, v)], want)


def test_autocast(mechanism):
    """float32 inputs under autocast: the bits of the same call on cast ones, and gradients in float32."""
    q, k, v, dout, _ = make(2, 300, 300, 4, 2, 128, dtype=torch.float32)
    half = [x.to(BF16) for x in (q, k, v, dout)]
    want = run(*half[:3], mechanism, half[3], deterministic=True)
    for x in (q, k, v):
        x.requires_grad_()
    with torch.autocast("cuda", BF16):
        out = attention(q, k, v, mechanism=mechanism, deterministic=True)
        inside = torch.autograd.grad(out, (q, k, v), half[3], retain_graph=True)
    assert out.dtype == BF16
    for got in (inside, torch.autograd.grad(out, (q, k, v), half[3])):
        assert all(x.dtype == torch.float32 for x in got)
        assert_same_bits([x.to(BF16) for x in got], want)


def test_double_backward_is_refused(mechanism):
    q, k, v, dout, _ = make(1, 64, 64, 1, 1, 64)
    q.requires_grad_()
    out = attention(q, k, v, mechanism=mechanism)
    (dq,) = torch.autograd.grad(out, q, dout, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*SDPBackend\.MATH"):
        dq.sum().backward()


def test_without_gradients_nothing_is_kept(mechanism):
    q, k, v, *_ = make(1, 64, 64, 1, 1, 64)
    q.requires_grad_()
    with torch.no_grad():
        assert attention(q, k, v, mechanism=mechanism).grad_fn is None
    assert not attention(q.detach(), k, v, mechanism=mechanism).requires_grad


def test_runs_on_the_callers_stream(mechanism):
    """The backward pass waits for what the forward pass's stream did before it, and for no other stream."""
    q, k, v, dout, _ = make(1, 512, 512, 2, 2, 128)
    want = run(q, k, v, mechanism, dout, deterministic=True)
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # keeps the default stream busy
    with torch.cuda.stream(other):
        run(q, k, v, mechanism, dout, deterministic=True)
    other.synchronize()
    assert not torch.cuda.default_stream().query(), "the kernels waited for a stream that they have nothing to do with"
    late_q, late_dout = torch.full_like(q, math.nan), torch.full_like(dout, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late_q.copy_(q)
        late_dout.copy_(dout)
        got = run(late_q, k, v, mechanism, late_dout, deterministic=True)
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_captured_in_a_cuda_graph(deterministic, d, mechanism):
    """Forward and backward pass in one graph."""
    sizes = (1, 512, 512, 4, 2, d)
    rules = {"causal": True, "deterministic": deterministic}
    q, k, v, dout, dlse = make(*sizes)
    run(q, k, v, mechanism, dout, dlse, **rules)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(q, k, v, mechanism, dout, dlse, **rules)
    for seed in (1, 2):
        for x, fresh in zip((q, k, v, dout), make(*sizes, seed=seed), strict=False):
            x.copy_(fresh)
        dlse.add_(1.0)
        graph.replay()
        assert_gradients_close(got, q, k, v, dout, dlse, causal=True)
        if deterministic:
            assert_same_bits(got, run(q, k, v, mechanism, dout, dlse, **rules))


def test_compiled_by_torch(mechanism):
    """``torch.compile`` of what calls it: the call itself is a break in the graph."""
    q, k, v, dout, _ = make(2, 200, 300, 4, 2, 64)
    rules = {"mechanism": mechanism, "causal": True, "deterministic": True}
    want = run(q, k, v, dout=dout, **rules)

    @partial(torch.compile, backend="aot_eager")
    def twice(q, k, v):
        return 2 * attention(q, k, v, **rules)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert_same_bits(torch.autograd.grad(twice(*leaves), leaves, dout / 2), want)


@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_memory_at_64k_tokens(d, dv, deterministic, heads, mechanism):
    """Beyond inputs, outputs and gradients: dQ's sums in float32 and 16 bytes a query row for delta, the log-sum-exp and
    counters. That is what the allocator is asked for: of a large block it cuts off nothing smaller than 1 MiB, and counts all
    of it as allocated."""
    sq = 65536
    heads, heads_kv = heads
    sizes = (heads, d), (heads_kv, d), (heads_kv, dv), (heads, dv)
    *leaves, dout = (torch.randn(1, sq, *size, dtype=BF16, device="cuda") for size in sizes)
    q, k, v = (x.requires_grad_() for x in leaves)
    gradient_bytes = sum(x.numel() * x.element_size() for x in (q, k, v))

    def requested(what):
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    def measured():
        gc.collect()  # what other tests left in cycles would go while this is measured
        torch.cuda.synchronize()
        before = requested("current")
        torch.cuda.reset_peak_memory_stats()
        out = attention(q, k, v, causal=True, deterministic=deterministic, mechanism=mechanism)
        kept, at_most = requested("current") - before, requested("peak") - before
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        peak = requested("peak") - before
        del out, gradients
        return kept, at_most, peak

    measured()  # compiles
    kept, at_most, peak = measured()
    assert kept == at_most == dout.numel() * 2 + 4 * heads * sq  # out and its log-sum-exp
    assert gradient_bytes <= peak <= gradient_bytes + 4 * q.numel() + 16 * heads * sq


def test_outputs_are_those_without_gradients(mechanism):
    q, k, v, *_ = make(2, 333, 333, 4, 4, 64)
    want = attention(q, k, v, mechanism=mechanism, return_lse=True, causal=True)
    q.requires_grad_()
    out, lse = attention(q, k, v, mechanism=mechanism, return_lse=True, causal=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    assert_close((out.detach(), lse.detach()), q.detach(), k, v, causal=True)


@pytest.mark.parametrize("every_lane_arrives", [False, True], indirect=True)
@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.usefixtures("every_lane_arrives")
def test_the_same_bits_each_time(d, mechanism):
    """A thousand times, with few query tiles and more key tiles than a GPU has multiprocessors: a stage of a pipeline that is
    refilled too early shows in one block of thousands."""
    q, k, v, dout, dlse = make(1, 70, 2200 * 256 // d, 8, 4, d)
    want = run(q, k, v, mechanism, dout, dlse, causal=True, deterministic=True)
    for _ in range(1000):
        assert_same_bits(run(q, k, v, mechanism, dout, dlse, causal=True, deterministic=True), want)
