"""Attention to a cache: the reference, and what is checked on the host."""

from __future__ import annotations

import math

import pytest
import torch

from cute_attn import api, attention, attention_kvcache, serve, stored
from cute_attn.problem import check_call_of_cache
from cute_attn.workspace import Workspaces
from tests.caches import Case

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (9, 2)},
    "left": {"window": (40, None), "scale": 0.3},
    "softcap": {"causal": True, "softcap": 4.0},
}
LENGTHS = [0, 1, 15, 16, 17, 300, 64]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("where", ["contiguous", "indexed", "padded", "pages of 1", "pages of 16"])
@pytest.mark.parametrize("queries", [1, 5])
def test_is_attention_of_each_sequence(queries, where, rules):
    case = Case(LENGTHS, [queries] * len(LENGTHS))
    case.check(case.attend(made(case, where), **rules), False, **rules)


def made(case, where):
    if where.startswith("pages"):
        return case.paged(int(where.split()[-1]))
    return case.contiguous(351, [3, 0, 1, 0, 11, 0, 2] if where == "padded" else None, spare=2 if where == "indexed" else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", ["contiguous", "pages of 16"])
def test_packed_queries(where, dtype):
    case = Case(LENGTHS, [1, 1, 0, 4, 17, 200, 3], dtype=dtype)
    case.check(case.attend(made(case, where), packed=True, causal=True), True, causal=True)


def test_a_cache_that_was_made_in_inference_mode():
    new = torch.randn(2, 1, 2, 16)
    with torch.inference_mode():
        cache = torch.zeros(2, 8, 2, 16)
    attention_kvcache(torch.randn(2, 1, 4, 16), cache, cache, lengths=torch.tensor([3, 5]).int(), k_new=new, v_new=new)
    assert torch.equal(cache[[0, 1], [3, 5]], new[:, 0])


def test_sinks_and_functions():
    case = Case(LENGTHS, [3] * len(LENGTHS))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])

    def odd(batch, head, q_idx, kv_idx):
        return (kv_idx + batch + q_idx) % 2 == 1

    found = case.attend(case.paged(16), causal=True, sinks=sinks, mask=odd)
    for i, (q, k, v) in enumerate(zip(case.q, case.k, case.v, strict=True)):
        of_it = attention(
            *(x[None] for x in (q, k, v)),
            causal=True,
            sinks=sinks,
            mask=lambda batch, head, q_idx, kv_idx, i=i: (kv_idx + i + q_idx) % 2 == 1,
            return_lse=True,
        )
        for got, expected in zip(found, of_it, strict=True):
            torch.testing.assert_close(got[i], expected[0])


@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
@pytest.mark.parametrize("where", ["contiguous", "indexed", "padded", "pages of 1", "pages of 16"])
@pytest.mark.parametrize("packed", [False, True])
def test_append(packed, where, rotary):
    """The new keys are in the cache afterwards, and seen; everything else in the cache is as it was."""
    news = [2, 2, 2, 2, 2, 2, 2] if not packed else [0, 1, 3, 2, 17, 40, 1]
    case = Case([n + new for n, new in zip(LENGTHS, news, strict=True)], news, dims=(32, 24))
    full = made(case, where)
    before = {name: x.clone() for name, x in full.items()}
    before["lengths"] -= torch.tensor(news)
    new = [[x[len(x) - n :] for x, n in zip(held, news, strict=True)] for held in (case.k, case.v)]
    options: dict = {}
    if rotary:
        angles = torch.arange(360)[:, None] / 50.0 ** (torch.arange(8) / 8)
        options = {"rotary": (angles.cos(), angles.sin()), "rotary_interleaved": rotary == "interleaved"}
        for i, n in enumerate(news):
            begin = int(before["lengths"][i])
            old, fresh = case.k[i].split((len(case.k[i]) - n, n))
            case.q[i], turned = (by_hand(x, angles[begin : begin + n], rotary) for x in (case.q[i], fresh))
            case.k[i] = torch.cat((old, turned))
        full = made(case, where)
    plain = Case(case.lengths, case.queries, dims=(32, 24))
    for name in ("k_cache", "v_cache"):  # forget the new ones
        for i, n in enumerate(news):
            forget(before, name, i, n)
    gathered = torch.cat if packed else torch.stack
    found = plain.attend(before, packed, k_new=gathered(new[0]), v_new=gathered(new[1]), causal=True, **options)
    case.check(found, packed, causal=True)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(before[name], full[name], equal_nan=True)


def forget(where, name, i, n):
    for row in range(int(where["lengths"][i]), int(where["lengths"][i]) + n):
        if "page_table" in where:
            size = where[name].shape[1]
            where[name][where["page_table"][i, row // size], row % size] = math.nan
        else:
            where[name][where.get("cache_batch_idx", range(99))[i], row] = math.nan


def by_hand(x, angles, how):
    """Columns as complex numbers, turned."""
    head, rest = x[..., :16].double(), x[..., 16:]
    pairs = head.unflatten(-1, (8, 2)) if how == "interleaved" else head.unflatten(-1, (2, 8)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.polar(torch.ones_like(angles), angles).cdouble()[:, None]
    pairs = torch.view_as_real(turned)
    head = pairs.flatten(-2) if how == "interleaved" else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((head.to(x.dtype), rest), -1)


def test_rotary_without_an_edge_is_at_one_position():
    """As flash-attn has it; and positions may count from elsewhere."""
    case = Case([9], [3])
    angles = torch.rand(40, 8)
    new = {"k_new": case.k[0][None, :3], "v_new": case.v[0][None, :3], "rotary": (angles.cos(), angles.sin())}
    where = case.contiguous(20)
    found, _ = case.attend(where, **new, rotary_begin=case.int32([7]))
    plain = Case([12], [3])
    plain.q[0] = by_hand(case.q[0], angles[[7, 7, 7]], "halves")
    plain.k[0] = torch.cat((case.k[0], by_hand(case.k[0][:3], angles[7:10], "halves")))
    plain.v[0] = torch.cat((case.v[0], case.v[0][:3]))
    expected, _ = plain.attend(plain.contiguous(20))
    torch.testing.assert_close(found, expected)


def test_autocast_casts_all_that_has_the_dtype_of_q():
    """The cache has autocast's dtype; queries, new keys and values and rotary tables come as layers outside of it make them."""
    case = Case([9], [3])
    where, angles = case.contiguous(20), torch.rand(40, 8)
    new = case.k[0][None, :3], case.v[0][None, :3], angles.cos(), angles.sin()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, *rotary = (x.to(dtype) for x in (torch.stack(case.q), *new))
        cache = where | {name: where[name].bfloat16() for name in ("k_cache", "v_cache")}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found += [attention_kvcache(q, **cache, k_new=k, v_new=v, rotary=tuple(rotary), causal=True), cache["k_cache"]]
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(found[:2], found[2:], strict=True))


def test_wrong_numbers_stay_inside():
    """Without the check: lengths past the capacity, pages and elements that there are not."""
    case = Case([20, 20], [1, 1])
    where = case.paged(16)
    where["page_table"][0, 1], where["lengths"][1] = 10_000, 10_000
    new = {f"{name}_new": x[0][None, :1].expand(2, -1, -1, -1) for name, x in (("k", case.k), ("v", case.v))}
    out, _ = case.attend(where, **new)
    assert out.shape == (2, 1, 4, 24)
    where = case.contiguous(20)
    case.attend({**where, "cache_batch_idx": case.int32([7, -3]), "lengths": case.int32([-5, 30])})


@pytest.mark.parametrize("pages", [(0, 16), (3, 16)], ids=["no page", "no column"])
def test_a_cache_of_no_pages(pages):
    """Nothing is seen, and nothing is written, whatever lengths say."""
    case = Case([20, 20], [1, 1])
    caches = [torch.full((*pages, *x.shape[1:]), 7.0) for x in (case.k[0], case.v[0])]
    new = [torch.stack([x[:1] for x in held]) for held in (case.k, case.v)]
    table = torch.zeros(2, 0 if pages[0] else 2, dtype=torch.int32)
    out, lse = attention_kvcache(
        torch.stack(case.q), *caches, lengths=case.int32([20, 3]), page_table=table, k_new=new[0], v_new=new[1], return_lse=True
    )
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()
    assert all((x == 7.0).all() for x in caches)


def test_no_sequences():
    case = Case([3], [1])
    out, lse = attention_kvcache(
        case.q[0][None][:0],
        *(x[None][:0] for x in (case.k[0], case.v[0])),
        lengths=case.int32([]),
        return_lse=True,
    )
    assert (out.shape, lse.shape) == ((0, 1, 4, 24), (0, 4, 1))


@pytest.mark.parametrize(
    ("blocks", "walks", "even"),
    [(132, 8, 128), (132, 512, 128), (132, 4, 132), (264, 128, 256), (132, 80, 132), (4, 3, 4), (132, 0, 132)],
)
def test_blocks_on_which_walks_come_out_even(blocks, walks, even):
    assert serve.even_blocks(blocks, walks) == even


@pytest.mark.parametrize(("blocks", "walks", "even"), [(132, 64, 128), (133, 66, 132), (131, 5, 130), (131, 0, 130)])
def test_blocks_are_whole_clusters(blocks, walks, even):
    assert serve.even_blocks(blocks, walks, 2) == even


@pytest.mark.parametrize("invariant", [False, True])
def test_what_an_invariant_step_is_planned_by(invariant, monkeypatch):
    """The sequence's own number of queries, not the batch's mean; nor how much there is to gather for all."""
    planned: list = []
    monkeypatch.setattr(serve, "prepared", lambda problem, *_: planned.append(problem) or ("kernel", 132))
    monkeypatch.setattr(serve, "device_target", lambda _: "sm_90a")
    for queries in ([1, 1, 1], [1, 30, 1], [1, 200, 1]):
        case = Case([70, 300, 16], queries, dtype=torch.bfloat16)
        serve.Step(call_of(case.paged(16), case.packed_queries(), invariant), False, case.packed_queries()["q"])
    assert len({problem.rows for problem in planned}) == (1 if invariant else 3)
    many, case = [], Case([300, 300], [260] * 2, dtype=torch.bfloat16)
    for most in (1 << 30, 0):
        monkeypatch.setattr(serve, "GATHERED_MAX", most)
        for where in (case.paged(16), case.contiguous(300), heads_first(case.contiguous(300))):
            call = call_of(where, {"q": torch.stack(case.q)}, invariant)
            many.append(serve._goes_to_many(call, call.stored, None, (where["k_cache"], where["v_cache"]), 0))
    assert many == [True, True, True, invariant, True, invariant]


def heads_first(where: dict) -> dict:
    return where | {name: where[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_cache", "v_cache")}


def call_of(where: dict, queries: dict, invariant: bool):
    """As :func:`attention_kvcache` checks it."""
    given = {**where, "cu_seqlens_q": None, **queries}
    tensors = [given.get(name) for name in stored.NAMES]
    call = check_call_of_cache(given["q"], given["k_cache"], given["v_cache"], tensors, None, True, None, None)
    call.stored.batch_invariant = invariant
    return call


@pytest.mark.parametrize("news", [0, 2], ids=["nothing new", "new keys"])
@pytest.mark.parametrize("where", ["contiguous", "pages of 16"])
def test_the_same_step_is_planned_once(where, news, monkeypatch):
    """The kernels stand in: what is counted is how often a call is planned. A step that fails is planned again, in silence."""
    case, planned, launched = Case([40, 7], [1, 1], dtype=torch.bfloat16), [], []
    monkeypatch.setattr(serve, "_workspaces", Workspaces(torch.float32))
    monkeypatch.setattr(api, "computed_by_reference", lambda *_: False)
    monkeypatch.setattr(serve, "check_for_kernels", lambda *_: None)
    monkeypatch.setattr(serve, "prepared", lambda problem, *_: planned.append(problem) or ("kernel", 4))
    monkeypatch.setattr(serve, "_goes_to_many", lambda *_: False)
    monkeypatch.setattr(serve, "device_target", lambda _: "sm_90a")
    monkeypatch.setattr(serve, "run", lambda *how: launched.append(how))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    caches = {"k_new": case.k, "v_new": case.v} if news else {}
    new = {name: torch.stack([x[:news] for x in held]) for name, held in caches.items()}
    given = made(case, where)
    for _ in range(3):
        case.attend(given, causal=True, **new)
    assert len(planned) == (2 if news else 1)
    assert len(launched) == 3 * len(planned)
