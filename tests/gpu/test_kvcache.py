"""Attention to a cache on a GPU, by the policy of all tests; whatever is in no sequence's rows doesn't count."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import accumulate

import pytest
import torch

from benchmarks import serving
from cute_attn import attention, attention_kvcache, kvcache, serve
from tests.caches import Case
from tests.support import assert_close, oracle

BF16 = torch.bfloat16
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 256, 1000, 3, 2049]
UNEQUAL = [9000, 1, 700, 0, 30, 4097]
RULES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (100, 2)},
    "softcap": {"causal": True, "softcap": 4.0},
    "left": {"window": (70, None), "scale": 0.3},
}


def case(lengths, queries=1, heads=(8, 2), dims=(128, 128), dtype=BF16, kind="gaussian"):
    queries = [queries] * len(lengths) if isinstance(queries, int) else queries
    return Case(lengths, queries, heads, dims, dtype, "cuda", kind)


@pytest.mark.parametrize("page_size", [0, 1, 16, 32, 64, 128, 256, 1024, 7])
@pytest.mark.parametrize("queries", [1, 4])
def test_page_sizes(queries, page_size):
    one = case(LENGTHS, queries)
    one.check(one.attend(one.paged(page_size) if page_size else one.contiguous(2300), causal=True), False, causal=True)


@pytest.mark.parametrize("queries", range(1, 18))
@pytest.mark.parametrize("heads", [(4, 4), (8, 4), (12, 3), (16, 2), (16, 1)], ids=lambda heads: f"{heads[0]}/{heads[1]}")
def test_queries_and_groups(heads, queries):
    one = case(LENGTHS, queries, heads)
    one.check(one.attend(one.paged(64), causal=True), False, causal=True)


@pytest.mark.parametrize("mechanism", [None, "cp_async"])
@pytest.mark.parametrize("where", ["contiguous", "paged", "padded"])
def test_a_chunk_of_a_prompt(where, mechanism):
    """Many queries: by the kernels for these, whose mechanisms get their keys gathered, and by the cache's own."""
    one = case([300, 1300, 700], 300)
    places = one.paged(32) if where == "paged" else one.contiguous(1400, [5, 0, 17] if where == "padded" else None)
    one.check(one.attend(places, causal=True, mechanism=mechanism), False, causal=True)


PLACES = ("contiguous", "indexed", "padded", *(f"pages of {n}" for n in (1, 16, 32, 64, 128, 256)))
COMBINED = 48


def combined(number: int) -> dict:
    """One of all combinations, another for each number below :data:`COMBINED`: all places and all groups are in several."""
    draw = random.Random(number)
    where, queries = PLACES[number % len(PLACES)], draw.choice((*(1,) * 6, *range(2, 18), 300))
    group, heads_kv = 1 + number // 3, draw.choice((1, 2))
    near = int(where.split()[-1]) if where.startswith("pages") else 64
    edges = [n for count in (1, 2, 5) for n in (count * near - 1, count * near, count * near + 1)]
    lengths = [0, 1, draw.randint(3000, 6000), *draw.sample(edges, 3), draw.randint(2, 700)]
    draw.shuffle(lengths)
    return {
        "where": where,
        "lengths": lengths,
        "queries": queries,
        "heads": (group * heads_kv, heads_kv),
        "dims": draw.choice([(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]),
        "rules": draw.choice([{}, {"causal": True}, {"causal": True, "window": (100, None)}, {"causal": True, "softcap": 4.0}]),
        "packed": draw.random() < 0.3,
        "invariant": draw.random() < 0.3,
    }


@pytest.mark.parametrize("number", range(COMBINED))
def test_combinations(number):
    """Of where keys lie, page sizes, numbers of queries, groups, head dims, rules, and very unequal lengths."""
    made = combined(number)
    one = case(made["lengths"], made["queries"], made["heads"], made["dims"])
    where = made["where"]
    if where.startswith("pages"):
        places = one.paged(int(where.split()[-1]))
    else:
        pads = [*range(len(one.lengths))] if where == "padded" else None
        places = one.contiguous(max(one.lengths) + 9, pads, spare=2 if where == "indexed" else 0)
    out, lse = one.attend(places, made["packed"], batch_invariant=made["invariant"], **made["rules"])
    for i, (q, k, v) in enumerate(zip(one.q, one.k, one.v, strict=True)):
        rows = slice(i * made["queries"], (i + 1) * made["queries"])
        found = (out[None, rows], lse[None, :, rows]) if made["packed"] else (out[i : i + 1], lse[i : i + 1])
        tensors = [x[None] for x in (q, k, v)]
        if len(k) >= 64 and q[..., 0].numel() >= 32:
            assert_close(found, *tensors, lse_dtype=torch.float32, **made["rules"])
        else:  # of few elements plain attention may have no error, by luck
            expected = oracle(*tensors, **made["rules"])
            torch.testing.assert_close(found[0].double(), expected[0], rtol=2**-7, atol=2**-7)
            torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_rules(dtype, rows, rules):
    one = case(LENGTHS, rows, (64, 16), dtype=dtype, kind="peaky")  # few elements may have no error by luck
    one.check(one.attend(one.paged(16), **rules), False, **rules)


@pytest.mark.parametrize("queries", [1, 6, 17])
@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 64), (96, 96), (192, 128), (256, 256), (72, 40)], ids=str)
def test_head_dims(dims, queries):
    one = case(LENGTHS, queries, (4, 1), dims)
    one.check(one.attend(one.contiguous(2100), causal=True), False, causal=True)


@pytest.mark.parametrize("queries", [1, 5])
def test_all_rows_of_a_tile(queries):
    """16 and more of a key head, of heads whose tile of queries is no whole number of copies by all threads."""
    one = case([300, 17], queries, (16, 1), (96, 96))
    one.check(one.attend(one.contiguous(301), causal=True), False, causal=True)


def test_many_walks_of_padded_heads():
    """Blocks have many walks, each of one tile, and clear the columns past the head for each: the same bits each time."""
    one = case([128] * 64, 1, (64, 4), (80, 80))
    where = one.contiguous(128)
    first = one.attend(where)
    one.check(first, False)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(one.attend(where), first, strict=True))


@pytest.mark.parametrize("pads", [None, [3, 0, 7]])
@pytest.mark.parametrize("dims", [(16, 16), (128, 128)], ids=str)
def test_strides(dims, pads):
    """Heads before rows in memory, k otherwise than v, and q a part of something."""
    one = case([40, 500, 33], 3, (8, 2), dims)  # of one key few log-sum-exps have an error beside which ours counts
    places = one.contiguous(520, pads)
    places["k_cache"] = places["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    v_cache = torch.full((4, 530, 2, 3 * dims[1]), math.nan, dtype=BF16, device="cuda")[:3, 5:525, :, dims[1] : 2 * dims[1]]
    places["v_cache"] = v_cache.copy_(places["v_cache"])
    q = torch.stack(one.q).transpose(1, 2).contiguous().transpose(1, 2)
    one.check(attention_kvcache(q, **places, causal=True, return_lse=True), False, causal=True)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("heads", [(32, 8), (64, 1)], ids=lambda heads: f"{heads[0]}/{heads[1]}")
def test_unequal_lengths(heads, invariant):
    one = case(UNEQUAL, 1, heads)
    one.check(one.attend(one.paged(64), batch_invariant=invariant), False)


def test_a_block_has_more_sequences_than_a_warp_has_lanes():
    """Each lane holds a length; others are read. Walks of a tile are not cut, so few sequences have the same bits."""
    q, k, v = (torch.randn(5000, *shape, 128, device="cuda", dtype=BF16) for shape in ((1, 4), (4, 1), (4, 1)))
    lengths = torch.arange(5000, dtype=torch.int32, device="cuda") % 5
    some = [slice(i, i + 50) for i in range(0, 5000, 50)]
    few = [attention_kvcache(q[i], k[i], v[i], lengths=lengths[i]) for i in some]
    assert torch.equal(attention_kvcache(q, k, v, lengths=lengths), torch.cat(few))


def test_one_long_sequence_among_short_ones():
    """Blocks end a walk of another block, have several of their own, and begin one that goes on: the same bits each time."""
    one = case([300, 20_000, *range(400, 520), 6000, 1, 0, 700], 1, (32, 8))
    where = one.contiguous(20_000)
    first = one.attend(where)
    one.check(first, False)
    for _ in range(50):
        assert all(torch.equal(x, y) for x, y in zip(one.attend(where), first, strict=True))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("heads", [(32, 8), (64, 1)], ids=lambda heads: f"{heads[0]}/{heads[1]}")
@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_pages_of_parts_of_any_length(page_size, heads, invariant):
    """Shorter than a block's ring and longer: numbers of pages come ahead of these, or are read when it is their turn."""
    one = case([1 + 411 * i % 1500 for i in range(150)], 1, heads)
    one.check(one.attend(one.paged(page_size), batch_invariant=invariant), False)


@pytest.mark.parametrize("group", [40, 64, 128])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 32), (96, 96), (128, 128)], ids=str)
def test_a_walk_that_two_blocks_share(dims, group):
    """As many walks of one length as pairs of blocks, of few rows or of all, each in two parts of unequal lengths: over shared
    memory, where a GPU has clusters; and with one sequence more over global memory. The same bits each time."""
    pairs = torch.cuda.get_device_properties(0).multi_processor_count // 2
    for count in (pairs // -(-group // 64), pairs // -(-group // 64) + 1):
        one = case([400] * count, 1, (group, 1), dims)
        where = one.contiguous(400)
        first = one.attend(where)
        one.check(first, False)
        for _ in range(20):
            assert all(torch.equal(x, y) for x, y in zip(one.attend(where), first, strict=True))


@pytest.mark.parametrize(("lengths", "queries"), [([1100] + [1024] * 63, 1), ([897] * 32, 2)], ids=["odd", "hidden"])
def test_blocks_that_share_a_walk_may_have_other_numbers_of_tiles(lengths, queries):
    """On 132 multiprocessors: one block has a tile more than the other, or sees one more, and ends at another slot."""
    one = case(lengths, queries, (64, 1), (128, 128))
    one.check(one.attend(one.contiguous(max(lengths)), causal=True), False, causal=True)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("where", ["contiguous", "indexed", "padded", "pages"])
def test_packed_queries(where, invariant):
    one = case(LENGTHS, [1, 1, 0, 4, 17, 200, 3, 1, 1, 30, 1, 0, 1])
    if where == "pages":
        places = one.paged(16)
    else:
        places = one.contiguous(2100, [*range(13)] if where == "padded" else None, spare=2 if where == "indexed" else 0)
    one.check(one.attend(places, packed=True, causal=True, batch_invariant=invariant), True, causal=True)


def test_rows_of_no_sequence():
    one = case([40, 500], [3, 5])
    places = one.contiguous(600)
    packed = one.packed_queries()
    q = torch.cat((packed["q"], torch.full_like(packed["q"], math.nan)))
    out, lse = attention_kvcache(q, **places, cu_seqlens_q=packed["cu_seqlens_q"], return_lse=True)
    one.check((out[:8], lse[:, :8]), True)
    assert not out[8:].count_nonzero()
    assert (lse[:, 8:] == -math.inf).all()


@pytest.mark.parametrize("edges", [{"causal": True}, {"window": (101, 0)}], ids=str)
def test_functions_and_sinks(edges):
    one = case(LENGTHS, 3, (8, 2))
    sinks, bias = torch.randn(8, device="cuda"), torch.randn(8, 4096, device="cuda")

    def odd(batch, head, q_idx, kv_idx):
        return (kv_idx + head + q_idx) % 3 != 1

    def biased(score, batch, head, q_idx, kv_idx):
        return score + bias[head, kv_idx]

    rules = {**edges, "sinks": sinks, "mask": odd, "score": biased}
    one.check(one.attend(one.paged(16), **rules), False, **rules)


@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["contiguous", "padded", "pages of 1", "pages of 16"])
def test_append(where, packed, rotary):
    """As the reference has it: the same rows in the cache, everything else untouched, and attention of the new rows, too."""
    news = [0, 1, 3, 2, 17, 40, 1] if packed else [2] * 7
    old = [0, 1, 15, 16, 17, 300, 64]
    one = case([n + new for n, new in zip(old, news, strict=True)], news)
    places = one.paged(int(where.split()[-1])) if where.startswith("pages") else one.contiguous(
        400, [3, 0, 1, 0, 11, 0, 2] if where == "padded" else None
    )
    places["lengths"] -= one.int32(news)
    gathered = torch.cat if packed else torch.stack
    options: dict = {"causal": True}
    for name, held in (("k_new", one.k), ("v_new", one.v)):
        options[name] = gathered([x[len(x) - n :] for x, n in zip(held, news, strict=True)])
    if rotary:
        angles = torch.arange(400, device="cuda")[:, None] / 50.0 ** (torch.arange(16, device="cuda") / 16)
        options |= {"rotary": (angles.cos().to(BF16), angles.sin().to(BF16)), "rotary_interleaved": rotary == "interleaved"}
    caches = [{**places, **{name: places[name].clone() for name in ("k_cache", "v_cache")}} for _ in range(2)]
    found = one.attend(caches[0], packed, **options)
    expected = one.attend(caches[1], packed, backend="reference", **options)
    for name in ("k_cache", "v_cache"):  # a product and a sum may be rounded once or twice
        torch.testing.assert_close(caches[0][name], caches[1][name], equal_nan=True, rtol=2**-7, atol=2**-8 if rotary else 0.0)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)
    if not rotary:
        one.check(found, packed, causal=True)


@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_else_counts(invariant):
    """NaN or zeros in every other row and page, pages elsewhere, pages shared: the same bits."""
    one = case(UNEQUAL, 3)
    options = {"causal": True, "batch_invariant": invariant}
    places = one.paged(16)
    expected = one.attend(places, **options)
    finite = {**places, **{name: places[name].nan_to_num(0.0) for name in ("k_cache", "v_cache")}}
    contiguous = one.contiguous(9001)
    for other in (finite, contiguous, one.paged(16, spare=50, unused=7), one.paged(256)):
        for x, y in zip(one.attend(other, **options), expected, strict=True):
            assert torch.equal(x, y)
    shared = {**places, "page_table": places["page_table"][[0, 0]], "lengths": places["lengths"][[0, 0]]}
    out = attention_kvcache(torch.stack([one.q[0], one.q[0]]), **shared, **options)
    torch.testing.assert_close(out[0], expected[0][0], rtol=2**-6, atol=2**-7)
    assert torch.equal(out[0], out[1]) or not invariant


def test_a_value_that_is_not_finite_reaches_those_who_see_it():
    """Of a step's queries, those before a key's own don't."""
    one = case([500, 700], 4)
    for v in one.v:
        v[-2] = math.nan
    out, _ = one.attend(one.paged(16), causal=True)
    assert out[:, :2].isfinite().all()
    assert out[:, 2:].isnan().all()


def test_wrong_numbers_stay_inside():
    """Out of the range of pages, elements and lengths: nothing fails, others are right. (memcheck looks at it, too.)"""
    one = case([500, 700, 90], 1)
    places = one.paged(16)
    places["page_table"][0, 3:20] = torch.tensor([2**31 - 1, -(2**31), 10**6, -5] * 4 + [99999], device="cuda")
    places["lengths"][0] = 2**31 - 1
    out, _ = one.attend(places)
    expected, _ = one.attend(one.paged(16))
    torch.testing.assert_close(out[1:], expected[1:])


@pytest.mark.parametrize("pages", [(0, 16), (3, 16)], ids=["no page", "no column"])
@pytest.mark.parametrize("queries", [1, 300])
def test_a_cache_of_no_pages(queries, pages):
    """Nothing is seen, and nothing is written, whatever lengths say."""
    q, new = (torch.randn(2, queries, heads, 128, dtype=BF16, device="cuda") for heads in (8, 2))
    caches = [torch.full((*pages, 2, 128), 7.0, dtype=BF16, device="cuda") for _ in range(2)]
    table = torch.zeros(2, 0 if pages[0] else 2, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([20, 3], dtype=torch.int32, device="cuda")
    out, lse = attention_kvcache(q, *caches, lengths=lengths, page_table=table, k_new=new, v_new=new, return_lse=True)
    assert not out.count_nonzero()
    assert (lse == -math.inf).all()
    assert all((x == 7.0).all() for x in caches)


def test_batch_invariance():
    """A sequence has the same bits alone, among others, and elsewhere in the batch."""
    one = case([5000, 64, 3000, 12_000, 1], 2, (8, 2))
    places = one.paged(16)
    expected = one.attend(places, causal=True, batch_invariant=True)
    for order in ([0], [3], [3, 0, 1], [4, 2, 2, 0, 3, 1, 1]):
        some = {**places, "page_table": places["page_table"][order], "lengths": places["lengths"][order]}
        found = attention_kvcache(
            torch.stack([one.q[i] for i in order]), **some, causal=True, batch_invariant=True, return_lse=True
        )
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y[order])


@pytest.mark.parametrize("invariant", [False, True])
def test_the_same_bits_a_thousand_times(invariant):
    one = case(UNEQUAL, 1, (32, 8))
    places, q = one.paged(16), torch.stack(one.q)
    expected = attention_kvcache(q, **places, batch_invariant=invariant)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(1000):
        differ += (attention_kvcache(q, **places, batch_invariant=invariant) != expected).any()
    assert differ.item() == 0
    for workspace in serve._workspaces.of_streams.values():
        assert not workspace.words[: workspace.counters].view(torch.int32).count_nonzero()


def test_graph_with_other_lengths_and_pages():
    """Captured once, replayed with other lengths, pages and new keys in the same tensors."""
    first, second = case(UNEQUAL, 1, (32, 8)), case([4000, 8000, 2, 3000, 0, 77], 1, (32, 8))
    places, q = first.paged(16), torch.stack(first.q)
    pages = max(len(places["k_cache"]), len(second.paged(16)["k_cache"]))
    static = {name: torch.full((pages, 16, 8, 128), math.nan, dtype=BF16, device="cuda") for name in ("k_cache", "v_cache")}
    static["page_table"] = torch.zeros(6, 700, dtype=torch.int32, device="cuda")
    static["lengths"] = torch.zeros(6, dtype=torch.int32, device="cuda")

    def fill(one):
        for name, x in one.paged(16).items():
            if x.dim() == 1:
                static[name].copy_(x)
            elif x.dim() == 2:
                static[name][:, : x.shape[1]] = x
            else:
                static[name][: len(x)] = x
        q.copy_(torch.stack(one.q))

    fill(first)
    attention_kvcache(q, **static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention_kvcache(q, **static, return_lse=True)
        again = attention_kvcache(q, **static)  # with the same workspace
    for one in (first, second, first):
        fill(one)
        graph.replay()
        assert torch.equal(again, out)
        one.check((out, lse), False)


def test_graph_with_other_numbers_of_new_keys_and_queries():
    """Captured once, of packed queries and new keys that are turned; replayed with others in the same tensors. What an eager
    call of the same tensors finds, and writes into the cache, it has bit by bit."""
    pages, rows = 200, 12
    angles = torch.arange(600, device="cuda")[:, None] / 50.0 ** (torch.arange(16, device="cuda") / 16)
    rotary = angles.cos().to(BF16), angles.sin().to(BF16)
    static = {name: torch.randn(pages, 16, 2, 128, dtype=BF16, device="cuda") for name in ("k_cache", "v_cache")}
    static |= {name: torch.randn(rows, 2, 128, dtype=BF16, device="cuda") for name in ("k_new", "v_new")}
    static |= {"q": torch.randn(rows, 8, 128, dtype=BF16, device="cuda")}
    static |= {name: torch.zeros(n, dtype=torch.int32, device="cuda") for name, n in (("lengths", 4), ("cu_seqlens_q", 5))}
    static["page_table"] = torch.zeros(4, 40, dtype=torch.int32, device="cuda")

    def attend(tensors):
        return attention_kvcache(**tensors, rotary=rotary, causal=True, return_lse=True)

    def fill(lengths, bounds, seed):
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[:160]
        given = {"lengths": lengths, "cu_seqlens_q": bounds, "page_table": order.view(4, 40).int()}
        for name, values in given.items():
            static[name].copy_(torch.as_tensor(values, dtype=torch.int32))
        for name in ("q", "k_new", "v_new", "k_cache", "v_cache"):
            static[name].normal_()

    fill([10, 20, 30, 40], [0, 3, 6, 9, 12], 0)
    attend(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend(static)
    steps = ([500, 3, 16, 0], [0, 1, 5, 12, 12]), ([0, 570, 15, 1], [0, 8, 8, 9, 12]), ([31, 32, 33, 400], [0, 0, 0, 1, 10])
    for seed, (lengths, bounds) in enumerate(steps, start=1):
        fill(lengths, bounds, seed)
        eager = {name: x.clone() for name, x in static.items()}
        graph.replay()
        assert all(map(torch.equal, found, attend(eager)))
        assert all(torch.equal(static[name], eager[name]) for name in ("k_cache", "v_cache"))
        reference = {name: x.clone() for name, x in eager.items()}
        expected = attention_kvcache(**reference, rotary=rotary, causal=True, return_lse=True, backend="reference")
        for x, y in zip(found, expected, strict=True):  # the new keys are written once more, where they are already
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-6)


def test_batch_invariance_of_packed_queries():
    """Whatever number of queries the others of the batch have, and of keys."""
    one = case([5000, 64, 3000, 700, 1], [1, 4, 17, 200, 1], (8, 2))
    places, bits = one.paged(16), {}
    for some in ([0], [0, 4], [0, 1, 2, 3, 4], [3, 0], [2, 1], [4, 3, 2, 1]):
        chosen = {**places, **{name: places[name][some] for name in ("lengths", "page_table")}}
        bounds = one.int32(accumulate((one.queries[i] for i in some), initial=0))
        chosen |= {"q": torch.cat([one.q[i] for i in some]), "cu_seqlens_q": bounds}
        out, lse = attention_kvcache(**chosen, causal=True, batch_invariant=True, return_lse=True)
        for i, first, past in zip(some, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            found = out[first:past], lse[:, first:past]
            assert all(map(torch.equal, found, bits.setdefault(i, found)))


def test_batch_invariance_of_chunks(monkeypatch):
    """Many queries of each sequence: also where all of their keys are more than would be gathered."""
    one = case([1300, 300, 700], 300)
    places, found = one.paged(32), []
    for most in (serve.GATHERED_MAX, 1 << 20):
        monkeypatch.setattr(serve, "GATHERED_MAX", most)
        monkeypatch.setattr(kvcache, "_steps", {})
        for order in ([0, 1, 2], [1], [2, 1]):
            some = {**places, **{name: places[name][order] for name in ("lengths", "page_table")}}
            q = torch.stack([one.q[i] for i in order])
            found.append(attention_kvcache(q, **some, causal=True, batch_invariant=True)[order.index(1)])
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("appends", [False, True])
def test_one_launch_or_two(appends):
    """New keys are written by a kernel of their own; nothing is copied or cleared."""
    assert serving.launches(dataclasses.replace(serving.HOST_ROW, appends=appends)) == 1 + appends


def test_nothing_is_waited_for():
    one = case([300, 4000], 2)
    places = one.paged(16)
    places["lengths"] -= 2
    new = {name: torch.stack([x[-2:] for x in held]) for name, held in (("k_new", one.k), ("v_new", one.v))}
    one.attend(places, causal=True, **new)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.attend(places, causal=True, **new)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams():
    """Calls on two streams at a time have workspaces of their own."""
    one = case(UNEQUAL, 1, (32, 8))
    places, q = one.paged(16), torch.stack(one.q)
    expected = attention_kvcache(q, **places)
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attention_kvcache(q, **places))
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in found)


def test_a_large_cache():
    """Past 2³¹ elements."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("24 GiB of GPU memory are needed")
    one = case([300], 1, (4, 1))
    small = one.paged(256)
    pages = 70_000
    k_cache, v_cache = (torch.empty(pages, 256, 1, 128, dtype=BF16, device="cuda") for _ in range(2))
    table = torch.tensor([[69_999, 69_000]], dtype=torch.int32, device="cuda")
    for place in range(2):
        for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
            cache[table[0, place]] = small[name][small["page_table"][0, place]]
    one.check(one.attend({"k_cache": k_cache, "v_cache": v_cache, "page_table": table, "lengths": small["lengths"]}), False)


def test_against_dense():
    """One length for all is what attention computes."""
    one = case([1000] * 3, 4)
    found = one.attend(one.contiguous(1000), causal=True)
    expected = attention(*(torch.stack(x) for x in (one.q, one.k, one.v)), causal=True, return_lse=True)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-7)
