"""Context parallelism, by processes that talk to each other through gloo: what one process computes, by the tests' policy.

Four processes are started once for all tests, with a group of each size; each test sends them work. What a ring's steps compute
is tested without any, on their schedule.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import time
import weakref
from bisect import bisect_right
from datetime import timedelta
from itertools import accumulate, chain, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import context_parallel
from cute_attn import attention, cubin, distributed, plan, problem, reference, rules
from cute_attn.distributed import calls, ring, schedule, shards
from cute_attn.distributed.schedule import ORDERS, Shards
from tests import support
from tests.host.processes import ROOT
from tests.host.test_errors import Row, assert_raises, raises, reached, table
from tests.host.test_wrapped import freed, world
from tests.ranks import Ranks, among, assert_gradients_of_a_model_close, both_passes, in_a_model, packed_passes

RANKS = 4


# ---- the schedule ----------------------------------------------------------------------------------------------------


@st.composite
def bands(draw):
    """``(seqlen_q, seqlen_k, ranks, order, lo, hi)``."""
    seqlen_q = draw(st.integers(0, 70))
    seqlen_k = draw(st.one_of(st.just(seqlen_q), st.integers(0, 70)))
    left, right = (draw(st.one_of(st.none(), st.just(0), st.integers(0, 80))) for _ in range(2))
    shift = seqlen_k - seqlen_q
    lo, hi = None if left is None else shift - left, None if right is None else shift + right
    return seqlen_q, seqlen_k, draw(st.integers(1, 5)), draw(st.sampled_from(ORDERS)), lo, hi


def position(shards: Shards, rank: int, row: int) -> int:
    return shards.positions(rank)[row // shards.chunk] + row % shards.chunk


@st.composite
def packed_bands(draw):
    """The same of packed sequences, some of them empty, and their bounds."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 4), st.integers(5, 60)), max_size=6))
    seqlen = sum(lengths) + draw(st.integers(0, 9))
    left, right = (draw(st.one_of(st.none(), st.just(0), st.integers(0, 80))) for _ in range(2))
    band = None if left is None else -left, right
    return (seqlen, seqlen, draw(st.integers(1, 5)), draw(st.sampled_from(ORDERS)), *band), list(accumulate(lengths, initial=0))


@given(st.one_of(st.tuples(bands(), st.none()), packed_bands()))
@settings(max_examples=200, derandomize=True)
def test_every_visible_pair_once_and_no_other(case):
    (seqlen_q, seqlen_k, ranks, order, lo, hi), bounds = case
    q, k = Shards(seqlen_q, ranks, order), Shards(seqlen_k, ranks, order)
    packed = None if bounds is None else schedule.Packed(tuple(bounds))
    seen = []
    for of_q in range(ranks):
        for of_k in range(ranks):
            parts = schedule.pieces(q, k, of_q, of_k, lo, hi, packed)
            assert not any(piece.packed for piece in parts) or of_q == of_k  # nothing ragged travels
            count = 0
            for piece in chain.from_iterable(part.sequences() if part.packed else [part] for part in parts):
                left, right = piece.edges
                assert left is None or left >= 0
                assert right is None or right >= 0
                rows, keys = len(piece.rows), len(piece.keys)
                visible = support._visible(range(rows), rows, keys, False, (left, right), "cpu")
                assert visible.any(0).all()  # no row and no key in vain
                assert visible.any(1).all()
                assert piece.scores == visible.sum()
                pairs = [(piece.rows[i], piece.keys[j]) for i, j in visible.nonzero().tolist()]
                seen += [(position(q, of_q, row), position(k, of_k, key)) for row, key in pairs]
                count += len(pairs)
                assert set(piece.keys) <= set(schedule.spanned(parts))
                assert set(piece.rows) <= set(schedule.spanned(parts, "rows"))
            assert bool(count) == bool(schedule.spanned(parts)) == bool(schedule.spanned(parts, "rows"))
            assert sum(part.scores for part in parts) == count
    expected = [
        (row, key)
        for row in range(seqlen_q)
        for key in range(seqlen_k)
        if (lo is None or row + lo <= key) and (hi is None or key <= row + hi)
        if bounds is None or (row < bounds[-1] > key and bisect_right(bounds, row) == bisect_right(bounds, key))
    ]
    assert sorted(seen) == expected


def test_zigzag_causal_is_one_balanced_call_a_step():
    shards = Shards(128, 4)
    steps = [[schedule.pieces(shards, shards, rank, (rank - t) % 4, None, 0) for t in range(4)] for rank in range(4)]
    assert {len(parts) for of_rank in steps for parts in of_rank} == {1}
    assert len({sum(parts[0].scores for parts in of_rank) for of_rank in steps}) == 1


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 3), st.sampled_from(ORDERS))
@settings(max_examples=60, derandomize=True)
def test_shards_hold_each_row_once(seqlen, ranks, split, order):
    shards = Shards(seqlen, ranks, order, split)
    x = torch.arange(2 * seqlen).view(2, seqlen)
    apart = shards.apart(x, 1)
    assert apart.shape == (2, ranks, shards.rows)
    assert shards.rows % split == 0
    assert torch.equal(shards.together(apart, 1), x)
    for rank in range(ranks):
        for rows, at in shards.in_use(rank):
            assert torch.equal(apart[:, rank, rows.start : rows.stop], x[:, at : at + len(rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_is_exact_where_one_part_outweighs(dtype):
    """There a log-sum-exp stays as it is to the last bit; what sees nothing changes nothing, and two such are nothing."""
    out, more = (torch.randn(1, 3, 2, 4, dtype=dtype) for _ in range(2))
    lse = torch.tensor([[[1.0e4 / 3, -math.inf, -math.inf], [5.0, 7.0, -math.inf]]], dtype=dtype)
    lse_of_more = torch.tensor([[[1.0, 3.0, -math.inf], [-math.inf, 7.0, -math.inf]]], dtype=dtype)
    merged, merged_lse = out.clone(), lse.clone()
    reference.merge(merged, merged_lse, more, lse_of_more, 0.37)
    assert torch.equal(merged_lse[0, :, 0], lse[0, :, 0])
    assert torch.equal(merged[:, 0], out[:, 0])
    assert torch.equal(merged[0, 1, 0], more[0, 1, 0])
    torch.testing.assert_close(merged[0, 1, 1], (out + more)[0, 1, 1] / 2)
    torch.testing.assert_close(merged_lse[0, 1, 1], torch.tensor(7.0 + 1 / 0.37, dtype=dtype))
    assert (merged_lse[0, :, 2] == -math.inf).all()
    assert not merged[:, 2].count_nonzero()


@pytest.mark.parametrize(("target", "so_far"), [("sm_90a", "bfloat16"), ("sm_80", "float32")])
def test_the_kernel_that_merges_reads_and_writes_16_bytes_at_a_time(target, so_far):
    pytest.importorskip("cutlass")
    of = problem.Problem("bfloat16", 96, 96, merges=so_far)
    code = cubin.inspect(of, plan.plan(of, target))
    assert (code.stack_bytes, code.local_bytes) == (0, 0)
    count = {name: sum(n for full, n in code.instructions.items() if full.startswith(name)) for name in ("LDG", "STG")}
    wide = {name: sum(n for full, n in code.instructions.items() if full.startswith(name) and ".128" in full) for name in count}
    heads = importlib.import_module("cute_attn.merge").Merge.HEADS
    assert wide == {"LDG": (2 if so_far == "bfloat16" else 3) * heads, "STG": 2 * heads}
    assert count == {"LDG": wide["LDG"] + 2 * heads, "STG": 3 * heads}  # a log-sum-exp each, read and written


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("distributed") / "store", RANKS)
    yield started
    started.end()


def inputs(seqlen_q, seqlen_k=None, heads=(4, 2), batch=2, dtype=torch.float32, dv=24):
    q, k, v = support.make_qkv(batch, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k, *heads, 16, dv, dtype)
    return [q, k, v, *support.make_gradients(q, v)]


def assert_right(found, tensors, **rules):
    out, lse, *gradients = found
    support.assert_close((out, lse), *tensors[:3], **rules)
    support.assert_gradients_close(gradients, *tensors, **rules)


CASES = {
    "causal": (4, inputs(150), {"causal": True}),
    "full": (3, inputs(50, heads=(6, 2)), {}),
    "window": (4, inputs(90), {"window": (20, 7)}),
    "narrow": (4, inputs(90), {"window": (3, 0), "order": "contiguous"}),  # most shards see no other
    "softcap": (2, inputs(61), {"causal": True, "softcap": 3.0, "scale": 0.4}),
    "longer keys": (3, inputs(40, 91, heads=(3, 3)), {"causal": True}),
    "few queries": (4, inputs(11, 90), {"causal": True}),  # which travel
    "few queries, window": (3, inputs(9, 91, heads=(6, 2)), {"window": (40, 9), "softcap": 3.0}),
    "longer queries": (4, inputs(91, 40), {"causal": True}),
    "fewer rows than chunks": (4, inputs(5), {"causal": True}),
    "MQA": (4, inputs(64, heads=(4, 1)), {"causal": True, "deterministic": True}),
    "sinks": (4, inputs(70), {"window": (25, 0), "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}),
    "a sink that is none": (2, inputs(70, 40), {"causal": True, "sinks": torch.tensor([0.5, -math.inf, 3.0, 0.0])}),
    "16 bits": (4, inputs(200, dtype=torch.bfloat16), {"causal": True}),
    "64 bits": (2, inputs(40, dtype=torch.float64), {"causal": True}),
    "alone": (1, inputs(40), {"causal": True}),
}


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, method, ranks):
    count, tensors, options = CASES[case]
    found = ranks.results(count, both_passes, tensors, {"method": method, **options})[0]
    assert_right(found, tensors, **{name: x for name, x in options.items() if name not in ("order", "deterministic")})


def gradient_of_sinks(rank, group, tensors, options):
    """This rank's part of it, of a loss of the output and the log-sum-exp."""
    q, k, v, dout = (distributed.shard(x, group=group) for x in tensors[:4])
    dlse, sinks = distributed.shard(tensors[4], dim=2, group=group), options["sinks"].clone().requires_grad_()
    options = {**options, "sinks": sinks, "seqlen": tensors[0].shape[1], "return_lse": True}
    outputs = distributed.attention(q, k, v, group=group, **options)
    return torch.autograd.grad(outputs, sinks, (dout, dlse))


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_gradients_of_sinks_add_up(method, ranks):
    """Over the ranks to that of one process."""
    _, tensors, options = CASES["sinks"]
    tensors = [x.double() for x in tensors]
    q, k, v, dout, dlse = tensors
    sinks = options["sinks"].requires_grad_()
    outputs = attention(q, k, v, window=options["window"], sinks=sinks, return_lse=True)
    (want,) = torch.autograd.grad(outputs, sinks, (dout, dlse))
    options = {"method": method, "window": options["window"], "sinks": sinks.detach()}
    parts = ranks.results(4, gradient_of_sinks, tensors, options)
    torch.testing.assert_close(sum(part for (part,) in parts), want, rtol=1e-5, atol=1e-6)


def with_raw_scores(rank, group, tensors, options):
    """With a backend that keeps log-sum-exps as the kernels do: in the unit of raw scores, +∞ where a row sees no key."""

    def to_log2(call):
        return rules.score_scales(call.scale, call.softcap)[0]

    def forward(q, k, v, call):
        out, _, lse = reference.attention(q, k, v, call)
        return out, None, (lse / to_log2(call)).masked_fill(lse == -math.inf, math.inf)

    def gradients(q, k, v, out, lse, dout, dlse, call, needs):
        assert not (lse == -math.inf).any()
        lse = (lse * to_log2(call)).masked_fill(lse == math.inf, -math.inf)
        return reference.gradients(q, k, v, out, lse, dout, dlse, call, needs)

    engine_of = calls._engine

    def as_the_kernels(q, k, v, call, how):
        return engine_of(q, k, v, call, how)._replace(passes=(forward, gradients), to_log2=to_log2(call), unseen=math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "_engine", as_the_kernels)
        return both_passes(rank, group, tensors, options)


@pytest.mark.parametrize(
    ("sizes", "options"), [((91, 40), {"causal": True}), ((91, 40), {"window": (30, 5), "softcap": 3.0}), ((9, 80), {})]
)
def test_log_sum_exps_in_the_unit_of_the_kernels(sizes, options, ranks):
    tensors = inputs(*sizes)
    found = ranks.results(3, with_raw_scores, tensors, {"method": "ring", **options})[0]
    assert_right(found, tensors, **options)


def sent(rank, group, tensors, options):
    """Bytes that a rank sends, by the ranks to which."""
    bytes_to = dict.fromkeys(range(dist.get_world_size(group)), 0)
    posted = dist.batch_isend_irecv

    def counted(operations):
        for operation in operations:
            if operation.op is dist.isend:
                bytes_to[operation.group_peer] += operation.tensor.nbytes
        return posted(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        both_passes(rank, group, tensors, {"method": "ring", **options})
    return bytes_to


ROW_OF_KEYS, ROW_OF_QUERIES = 2 * 2 * (16 + 24) * 4, 2 * 4 * (16 + 24) * 4  # batch, heads, columns, bytes


def test_what_is_sent_is_what_is_seen(ranks):
    """Keys once for each pass and their gradients once, by those, and to those, that a window lets see each other."""
    found = ranks.results(4, sent, inputs(80), {"window": (7, 3), "order": "contiguous"})
    for rank, bytes_to in enumerate(found):
        for other, count in bytes_to.items():
            seen_of_mine = {rank + 1: 7, rank - 1: 3}.get(other, 0)  # keys of this rank's that the other needs
            needed_of_theirs = {rank - 1: 7, rank + 1: 3}.get(other, 0)
            assert count == (2 * seen_of_mine + needed_of_theirs) * ROW_OF_KEYS, (rank, other)


def test_few_queries_travel_in_the_place_of_many_keys(ranks):
    """There twice with output and gradient; the results, and their gradients, once."""
    found = ranks.results(2, sent, inputs(8, 96), {})
    assert [sum(bytes_to.values()) for bytes_to in found] == [4 * (3 * ROW_OF_QUERIES + 2 * 4 * 3 * 4)] * 2


def test_partial_results_are_merged_in_float32(ranks):
    """All that a ring adds to one process's error is that of their own rounding to 16 bits, which the result has once more."""
    q, k, v, dout, dlse = inputs(256, dtype=torch.bfloat16, batch=1)
    exact = attention(q.double(), k.double(), v.double())
    errors = []
    for count in (1, 4):
        out, *_ = ranks.results(count, both_passes, [q, k, v, dout, dlse], {"method": "ring"})[0]
        errors.append((out.double() - exact).square().mean().sqrt())
    assert errors[1] <= 1.5 * errors[0]


def memory(rank, group, rows, method):
    """In bytes, at most at once: allocated in both passes beyond what was there; of keys and values that came."""
    q, k, v = (torch.randn(2, rows, heads, 64).requires_grad_() for heads in (4, 4, 4))
    rooms, most = [], [0]
    start = ring.Exchange.__init__

    def counted(self, members, sends, receives, back=False):
        start(self, members, sends, receives, back)
        rooms.extend(weakref.ref(x) for x in ([] if back else self.received))
        most[0] = max(most[0], sum(x.nbytes for room in rooms if (x := room()) is not None))

    with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        patch.setattr(ring.Exchange, "__init__", counted)
        out = distributed.attention(q, k, v, group=group, causal=True, method=method)
        torch.autograd.grad(out.sum(), (q, k, v))
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(change for _, change in changes)), most[0]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_memory_is_linear_in_the_shard(method, ranks):
    """Twice the rows take twice as much, a longer sequence on more ranks no more; in a ring keys of two shards are there."""
    peaks = {}
    for count, rows in ((3 if method == "ring" else 2, 128), (4, 128), (4, 256)):
        found = ranks.results(count, memory, rows, method)
        peaks[count, rows] = max(peak for peak, _ in found)
        shards = 2 if method == "ring" else 0
        assert all(received <= shards * 2 * (2 * rows * 4 * 64 * 4) for _, received in found)
    fewer, more, longer = peaks.values()
    noise = 1.05 if method == "ring" else 1.3  # gloo's threads free what an all-to-all had when they like
    assert more <= noise * fewer
    assert longer <= 2 * noise * more
    assert longer <= 24 * (2 * 256 * 4 * 64 * 4)  # shards of q; of these are the reference's tiles, too


SIZES = (3, 0, 70, 1, 20, 37)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (4, {"causal": True, "method": "ring"}),
        (3, {"method": "ring"}),
        (2, {"causal": True, "method": "ulysses"}),
        (4, {"window": (9, 0), "method": "ring"}),
        (3, {"window": (30, 5), "softcap": 3.0, "method": "ring"}),
        (2, {"window": (0, 11), "method": "ulysses"}),
        (4, {"window": (12, 0), "mesh": (2, 2)}),
    ],
)
def test_packed_sequences_across_shards(count, options, ranks):
    q, k, v, dout, _ = inputs(sum(SIZES) + 6, batch=1)
    packed, bounds = [x[0] for x in (q, k, v, dout)], list(accumulate(SIZES, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, lse, *gradients = ranks.results(count, packed_passes, packed, cu_seqlens, options)[0]
    rules = {name: x for name, x in options.items() if name not in ("method", "mesh")}
    for begin, end in pairwise(bounds):
        one = [x[:, begin:end] for x in (q, k, v)]
        support.assert_close((out[None, begin:end], lse[None, :, begin:end]), *one, **rules)
        found = [x[None, begin:end] for x in gradients]
        support.assert_gradients_close(found, *one, dout[:, begin:end], **rules)
    for x in (out, *gradients):
        assert not x[bounds[-1] :].count_nonzero()
    assert (lse[:, bounds[-1] :] == -math.inf).all()


def test_bounds_are_read_back_once_for_each_content():
    q, bounds = torch.empty(9, 1, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = calls._packed(q, bounds, 9, 9)
    assert packed.bounds == (0, 4, 9)
    assert calls._packed(q, bounds, 9, 9) is packed
    bounds[1] = 5
    assert calls._packed(q, bounds, 9, 9).bounds == (0, 5, 9)
    with torch.inference_mode():  # where torch doesn't count changes
        bounds = bounds.clone()
        bounds[1] = calls._packed(q, bounds, 9, 9).bounds[1] + 1
        assert calls._packed(q, bounds, 9, 9).bounds == (0, 6, 9)


@pytest.mark.parametrize("is_cuda", [False, True])
def test_bounds_that_are_changed_without_torch_s_counting(is_cuda):
    """As what a collective receives. A CPU's are read each time; a GPU's are compared with those that were read."""

    class Bounds(torch.Tensor):
        pass

    Bounds.is_cuda = is_cuda
    q, bounds = torch.empty(9, 1, 8), torch.tensor([0, 4, 9], dtype=torch.int32).as_subclass(Bounds)
    assert calls._packed(q, bounds, 9, 9) is calls._packed(q, bounds, 9, 9)
    bounds.numpy()[1] = 5
    if not is_cuda:
        assert calls._packed(q, bounds, 9, 9).bounds == (0, 5, 9)
        return
    assert len(calls.UNCOUNTED) < 255  # else CUDA's check refuses the words, whether it holds or not
    with pytest.raises(RuntimeError, match="cu_seqlens has other values than when it was read"):
        calls._packed(q, bounds, 9, 9)


def test_a_mesh_of_two_dimensions_uses_both_methods(ranks):
    tensors, rules = inputs(75, heads=(4, 1)), {"causal": True, "window": (30, None)}
    found = ranks.results(4, both_passes, tensors, {"mesh": (2, 2), **rules})[0]
    assert_right(found, tensors, **rules)


def test_positions_are_those_of_the_rows(ranks):
    for mesh in (None, (2, 2), (4, 1)):
        ranks.results(4, positions, 75, mesh)


def positions(rank, group, seqlen, mesh):
    where, _ = among(group, "cpu", {"mesh": mesh})
    x = torch.arange(seqlen)
    at = distributed.positions(seqlen, **where)
    shard = distributed.shard(x, dim=0, **where)
    assert torch.equal(shard[at < seqlen], at[at < seqlen])
    assert torch.equal(distributed.unshard(shard, seqlen, dim=0, **where), x)


def of_dtensors(rank, group, tensors, on, options):
    mesh, at = dist.init_device_mesh("cpu", (2, 2)), (on, Shard(1))
    q, k, v, dout = (distribute_tensor(x, mesh, at) for x in tensors[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = distributed.attention(*leaves, return_lse=True, **options)
    assert isinstance(out, DTensor)
    dlse = distribute_tensor(tensors[4], mesh, lse.placements)
    found = out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return [x.detach().full_tensor() for x in found]


@pytest.mark.parametrize(("on", "batch"), [(Shard(0), 3), (Shard(2), 1), (Replicate(), 1)])
def test_dtensors(on, batch, ranks):
    """Sharded by sequence, and by batch, unevenly, or by heads, or replicated."""
    tensors = inputs(64, batch=batch)
    for results in ranks.results(4, of_dtensors, tensors, on, {"causal": True, "method": "ring"}):
        assert_right(results, tensors, causal=True)


def test_under_fsdp2(ranks):
    x = torch.randn(1, 101, 64)
    for gradients in ranks.results(RANKS, in_a_model, x, "fsdp2"):
        assert_gradients_of_a_model_close(gradients, x)


def in_other_ways(rank, group, x, weights):
    """Activation checkpointing, torch.compile of what is around, autocast: the same loss and gradients as without."""
    from torch.utils.checkpoint import checkpoint

    def model(x, weight):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 16)).unbind(2)
        return distributed.attention(q, k, v, group=group, causal=True, seqlen=30).flatten(2).square()

    x, found = distributed.shard(x, group=group), []
    ways = [model, torch.compile(model, backend="eager"), lambda *given: checkpoint(model, *given, use_reentrant=False)]
    for way in ways:
        weight = weights.clone().requires_grad_()
        way(x, weight).sum().backward()
        found.append(weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x, weights).dtype == torch.bfloat16
    return found


def test_checkpoints_graphs_and_autocast(ranks):
    for plain, *others in ranks.results(2, in_other_ways, torch.randn(1, 30, 32), torch.randn(32, 96) / 6):
        assert plain.count_nonzero()
        assert all(torch.equal(plain, other) for other in others)


def example(rank, group, *arguments):
    found = importlib.util.spec_from_file_location("long_context", ROOT / "examples" / "long_context.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.train(*arguments, torch.device("cpu"))


def test_the_example_has_one_loss_curve(ranks):
    with world():
        alone = example(0, None, 61, 2, "auto")
    assert alone[1] < alone[0]
    for losses in ranks.results(RANKS, example, 61, 2, "ring"):
        assert losses == pytest.approx(alone, rel=1e-4)  # sums of float32 in another order, once through the optimizer


# ---- what is refused, and what is said ---------------------------------------------------------------------------------


def shards_of(q=(2, 8, 4, 16), k=(2, 8, 2, 16), **options):
    """A call on the first of four pretended ranks."""

    def made():
        with world("fake", RANKS):
            mesh = options.get("mesh")
            given = {**options, "mesh": dist.init_device_mesh("cpu", mesh)} if isinstance(mesh, tuple) else options
            return distributed.attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), **given)

    return made


def on_ranks(function, *arguments, **options):
    def made():
        with world("fake", RANKS):
            return function(*arguments, **options)

    return made


def dtensors_of(*placements, mesh=(2, 2), plain=False, **options):
    def made():
        with world("fake", RANKS):
            on = dist.init_device_mesh("cpu", mesh)
            q, k, v = (torch.zeros(2, 8, 4, 16) for _ in range(3))
            q, k, v = (DTensor.from_local(x, on, placements, run_check=False) for x in (q, k, v))
            return distributed.attention(q, k, v.to_local() if plain else v, **options)

    return made


def uneven_dtensors():
    with world("fake", RANKS):
        x = distribute_tensor(torch.zeros(2, 9, 4, 16), dist.init_device_mesh("cpu", (4,)), [Shard(1)], src_data_rank=None)
        distributed.attention(x, x, x)


def on_cuda_only():
    with world("fake", RANKS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        ring.carries(dist.group.WORLD, torch.device("cpu"))


def broken_off():
    def raising(operations):
        raise RuntimeError("Connection closed by peer")

    with world("fake", RANKS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", raising)
        q, k, v, *_ = inputs(8)
        distributed.attention(q, k, v, method="ring")


def a_tangent():
    with forward_ad.dual_level():
        shards_of(sinks=forward_ad.make_dual(torch.zeros(4), torch.ones(4)))()


X, PACKED = torch.zeros(2, 8, 4, 16), {"q": (8, 4, 16), "k": (8, 2, 16), "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}
ERRORS = [
    Row("no processes", lambda: distributed.shard(X), ValueError, "no process group", "one is needed", "init_process_group"),
    Row(
        "group and mesh",
        shards_of(group=1, mesh=(4,)),
        TypeError,
        "group and mesh",
        "one of them is needed",
        "leave the other",
    ),
    Row("a group's name", shards_of(group="tp"), TypeError, "group is a str", "a ProcessGroup", "new_group"),
    Row("a mesh's shape", shards_of(mesh=[2, 2]), TypeError, "mesh is a list", "a DeviceMesh is needed", "init_device_mesh"),
    Row(
        "three dimensions",
        shards_of(mesh=(2, 2, 1)),
        ValueError,
        "mesh has 3 dimensions",
        "one is needed, or two",
        "mesh[name]",
    ),
    Row("a device", lambda: distributed.positions(8, device="gpu"), ValueError, "device is a str, 'gpu'", "its name is"),
    Row("order", shards_of(order="striped"), ValueError, "order is 'striped'", "one of 'zigzag', 'contiguous' is needed"),
    Row("order's kind", shards_of(order=1), TypeError, "order is 1", "one of 'zigzag', 'contiguous' is needed"),
    Row("method", shards_of(method="tree"), ValueError, "method is 'tree'", "one of 'auto', 'ring', 'ulysses' is needed"),
    Row("method's kind", shards_of(method=None), TypeError, "method is None", "one of 'auto', 'ring', 'ulysses' is needed"),
    Row("seqlen's kind", shards_of(seqlen=8.0), TypeError, "seqlen is 8.0", "an int is needed, the length of the whole"),
    Row("a negative seqlen", shards_of(seqlen=-1), ValueError, "seqlen is -1", "an int ≥ 0 is needed, the length of the whole"),
    Row("seqlen", shards_of(seqlen=40), ValueError, "seqlen is 40 and each of 4 ranks has 8 rows", "10 are needed", "shard()"),
    Row(
        "seqlen_k",
        shards_of(seqlen_k=8),
        ValueError,
        "seqlen_k is 8 and each of 4",
        "2 are needed in zigzag order",
        "shard()",
    ),
    Row(
        "odd rows",
        shards_of((2, 7, 4, 16), (2, 7, 2, 16)),
        ValueError,
        "each of 4 ranks has 7 rows",
        "8 are needed",
        "shard()",
    ),
    Row("window", shards_of(window=3), TypeError, "window is 3", "a pair (left, right) is needed"),
    Row("causal", shards_of(causal=1), TypeError, "causal is 1", "True or False is needed"),
    Row(
        "heads",
        shards_of((2, 8, 6, 16), method="ulysses"),
        ValueError,
        "q has 6 heads and 4 ranks",
        "a multiple",
        "method='ring'",
    ),
    Row(
        "both",
        shards_of(method="ring", mesh=(2, 2)),
        ValueError,
        "mesh has two dimensions",
        "'auto' is needed",
        "leave it out",
    ),
    Row(
        "other keys",
        shards_of(**PACKED, seqlen_k=30),
        ValueError,
        "seqlen is 32 and seqlen_k is 30",
        "equal ones",
        "pack keys",
    ),
    Row("return_lse", shards_of(return_lse=1), TypeError, "return_lse is 1", "True or False is needed"),
    Row("deterministic", shards_of(deterministic=1), TypeError, "deterministic is 1", "True or False is needed"),
    Row("backend", shards_of(backend="cute"), ValueError, "the tensors lie on cpu", "the kernels need CUDA tensors", ".cuda()"),
    Row("mechanism", shards_of(mechanism="cp_async"), ValueError, "the reference backend runs", "has none", "leave it out"),
    Row(
        "no values",
        on_ranks(distributed.attention, *[torch.zeros(2, 8, 4, 16, device="meta")] * 3),
        TypeError,
        "have no values",
        "tensors that have some are needed",
        "distributed.explain",
    ),
    Row("x", on_ranks(distributed.shard, [1.0]), TypeError, "x is a list", "a torch.Tensor is needed", "torch.as_tensor(x)"),
    Row("dim", on_ranks(distributed.shard, X, dim=4), ValueError, "dim is 4", "one of its 4 dimensions is needed", "dim=1"),
    Row("dim's kind", on_ranks(distributed.shard, X, dim="seq"), TypeError, "dim is a str", "the dimension of the sequence"),
    Row(
        "rows",
        on_ranks(distributed.unshard, X, 8),
        ValueError,
        "x has 8 rows in dimension 1",
        "each rank has 2",
        "check seqlen",
    ),
    Row("ranks", lambda: distributed.explain(X, X, X, ranks=0), ValueError, "ranks is 0", "at least 1", "how many share"),
    Row("ranks' kind", lambda: distributed.explain(X, X, X, ranks=2.0), TypeError, "ranks is 2.0", "an int is needed"),
    Row(
        "batch",
        dtensors_of(Shard(0), Replicate()),
        ValueError,
        "(Shard(dim=0), Replicate())",
        "one is Shard(1)",
        "redistribute",
    ),
    Row(
        "a plain v",
        dtensors_of(Shard(0), Shard(1), plain=True),
        ValueError,
        "'v': 'Tensor'",
        "DTensors of one mesh",
        "redistribute",
    ),
    Row("uneven", uneven_dtensors, ValueError, "9 queries and 9 keys on 4 ranks", "multiples are needed", "shard()"),
    Row(
        "a transfer",
        broken_off,
        RuntimeError,
        "an exchange with rank 1 and rank 3 of the group broke off: Connection closed by peer",
        "raised, has died, or has not made the same call",
        "look for an error of its own",
    ),
    Row("a device", on_cuda_only, ValueError, "lie on cpu", "sends those on cuda", "another backend"),
    Row(
        "a group",
        dtensors_of(Shard(1), mesh=(4,), group=1),
        TypeError,
        "DTensors are given with group",
        "leave",
        "x.to_local()",
    ),
    Row(
        "sinks with DTensors",
        dtensors_of(Shard(1), mesh=(4,), sinks=torch.zeros(4)),
        NotImplementedError,
        "sinks are given with DTensors",
        "of each rank's own are needed",
        "x.to_local()",
    ),
    Row(
        "freed sinks",
        lambda: shards_of(sinks=freed(torch.zeros(4)))(),
        RuntimeError,
        "sinks has shape (4,) and no memory",
        "memory is needed",
        "fill it",
    ),
    Row("a tangent", a_tangent, NotImplementedError, "an input carries a tangent", "in reverse mode only", ".backward()"),
    Row("sinks", shards_of(sinks=torch.zeros(3)), ValueError, "sinks is a Tensor of shape (3,)", "one a head", "one for each"),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
@table(ERRORS)
def test_errors(row):
    assert_raises(row)


def test_every_error_has_a_row():
    for file in (calls.__file__, ring.__file__, shards.__file__):
        missing = raises(file) - reached(ERRORS, file)
        assert not missing, f"no row for {file}, lines {sorted(missing)}"


def test_explain_says_why_and_what_is_computed():
    q, k = (torch.empty(1, 4096, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    said = distributed.explain(q, k, k, ranks=4, causal=True)
    assert said.startswith("ring: the faster one on paper\n")
    assert said.count("keys of rank") == 4
    assert "rows 0 to 4096 × keys 0 to 4096, under the band" in said
    assert "; keys and values travel, which is less to send" in said
    few = distributed.explain(q[:, :512], k, k, ranks=4, causal=True)
    assert "; queries and their results travel, which is less to send" in few
    assert "    queries of rank 3: rows 0 to 512 × keys 0 to 4096\n" in few
    rows = [x[0, :100] for x in (q, k, k)]
    packed = distributed.explain(*rows, ranks=2, causal=True, cu_seqlens=torch.tensor([0, 20, 90, 200], dtype=torch.int32))
    assert "; rows 0 to 50 × keys 0 to 50, under the band, sequence by sequence\n" in packed
    assert packed.endswith("\n    keys of rank 0: rows 0 to 40 × keys 20 to 50")
    assert "nothing is seen, nothing sent" in distributed.explain(q, k, k, ranks=4, order="contiguous", window=(10, 0))
    assert distributed.explain(q, k, k, ranks=3).startswith("ring: not ulysses: q has 32 heads and 3 ranks")
    assert distributed.explain(q, k, k, ranks=4, method="ulysses").startswith("ulysses: asked for\n")
    short = [x[:, :8] for x in (q, k, k)]
    assert distributed.explain(*short, ranks=16).startswith("ulysses: the faster one on paper")


def test_the_document_has_the_model_s_figures():
    assert context_parallel.predicted() in (ROOT / "docs" / "context-parallelism.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--json /nowhere/x.json", "argument --json: /nowhere/x.json can't be written"),
        ("--merging --seqlen 0", "argument --seqlen: got '0'"),
        ("--merging", "there is no CUDA GPU"),
        ("--json x.json", "there is no CUDA GPU"),
    ],
)
def test_what_can_not_be_measured_is_refused_in_words(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        context_parallel.main(arguments.split())
    assert said in capsys.readouterr().err


def test_ranks_that_torchrun_has_not_started_or_that_have_no_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in (names := ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        context_parallel.main(["--json", "x.json"])
    assert "try torchrun --standalone" in capsys.readouterr().err
    for name in names:
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit, match="2"):
        context_parallel.main(["--json", "x.json"])
    assert "a GPU for each is needed" in capsys.readouterr().err


def test_measured_figures_as_a_table():
    cell = {
        "seqlen": 65536,
        "causal": True,
        "direction": "forward",
        "seconds": {"ring": 0.5},
        "TFLOP/s a card": {"one card": 600.4},
        "of one card": {"ring": 0.951, "ulysses": 0.9},
        "memory beyond, in shards of k and v": {"ring": 2.04},
        "of one step": {"transfers": 2.0, "kernels": 3.0, "transfers under kernels": 1.5},
        context_parallel.PEER: 0.6,
    }
    record = {"ranks": 2, "card": "card", "date": "today", "cells": [cell, cell | {context_parallel.PEER: "no"}]}
    *_, first, second = context_parallel.table(record).splitlines()
    assert first == "| causal, 64k, forward | 600 | 0.951 | 0.900 | 1.20 | 75% | 2.0 |"
    assert second == "| causal, 64k, forward | 600 | 0.951 | 0.900 |  | 75% | 2.0 |"
    said = context_parallel.said_of_merging({"copy": 4e12, "float32": 3.8e12})
    assert said.splitlines()[1] == "float32   3.800 TB/s  0.950 of a copy's"


def test_alone_is_attention_to_the_last_bit():
    tensors = inputs(40)
    with world():
        found = both_passes(0, dist.group.WORLD, tensors, {"causal": True, "softcap": 4.0})
    leaves = [x.requires_grad_() for x in tensors[:3]]
    outputs = attention(*leaves, causal=True, softcap=4.0, return_lse=True)
    expected = *outputs, *torch.autograd.grad(outputs, leaves, tensors[3:])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_double_backward_is_refused():
    with world():
        leaves = [x.requires_grad_() for x in inputs(8)[:3]]
        (dq,) = torch.autograd.grad(distributed.attention(*leaves).sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            dq.sum().backward()


# ---- ranks that differ -----------------------------------------------------------------------------------------------


def call(rank, group, odd, options, odd_options):
    """One rank calls otherwise than the others."""
    rows, *rules = (odd_options if rank == odd else options).items()
    q, k, v, *_ = inputs(rows[1], batch=1)
    distributed.attention(q, k, v, group=group, **dict(rules))
    return "computed"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"rows": 12, "causal": True}, ("rank 1 has", "q = (1, 12, 4, 16)", "has (1, 8, 4, 16)", "shard()")),
        ({"rows": 8, "causal": True, "softcap": 5.0}, ("rank 1 has softcap = 5.0 where rank 0 has 0.0",)),
    ],
)
def test_ranks_that_differ_are_named_on_all(odd, words, ranks):
    answers = ranks.run(3, call, 1, {"rows": 8, "causal": True, "method": "ring"}, {**odd, "method": "ring"})
    for kind, message in answers:
        assert kind == "ValueError"
        assert all(word in message for word in words), message
    assert ranks.results(3, call, None, {"rows": 8, "method": "ring"}, {}) == ["computed"] * 3


def packed_call(rank, group, odd):
    q, k, v, *_ = (x[0] for x in inputs(8, batch=1))
    bounds = torch.tensor([0, 9 if rank == odd else 8, 24], dtype=torch.int32)
    distributed.attention(q, k, v, group=group, cu_seqlens=bounds, method="ring")


def test_ranks_that_pack_otherwise_are_named(ranks):
    for kind, message in ranks.run(3, packed_call, 2):
        assert kind == "ValueError"
        assert "rank 2 has cu_seqlens = 2 sequences, of hash" in message


def first_call(rank, group, odd, is_freed):
    group = dist.new_group(range(4))
    q, k, v, *_ = inputs(8, batch=1)
    if rank == odd and is_freed:
        q = freed(q)
    distributed.attention(q, k, v, group=group, causal="yes" if rank == odd and not is_freed else True)


@pytest.mark.parametrize(("is_freed", "words"), [(False, "causal is"), (True, "q has shape")])
def test_a_rank_that_refuses_its_first_call_is_named_by_the_others(is_freed, words, ranks):
    answers = ranks.run(4, first_call, 2, is_freed)
    kind, text = answers.pop(2)
    assert kind == ("RuntimeError" if is_freed else "TypeError")
    assert text.startswith(words)
    assert all(kind == "RuntimeError" for kind, _ in answers)
    assert all(f"rank 2 of the group refused its call of attention: {words}" in text for _, text in answers)


def of_two(rank, group, dies):
    if rank == 1 and dies:
        os._exit(1)
    q, k, v, *_ = inputs(8, batch=1)
    distributed.attention(q, k, v, group=group, method="ring", causal=True)


def test_a_rank_that_dies_ends_the_others(tmp_path):
    """In the middle of work that was agreed upon: with a message, and long before the time limit."""
    started = Ranks(tmp_path / "store", 2)
    assert started.results(2, of_two, False) == [None, None]
    (kind, message), died = started.run(2, of_two, True)
    started.end()
    assert died == ("ended", "")
    assert kind == "RuntimeError"
    assert "an exchange with rank 1 of the group broke off" in message
    assert "onnection" in message  # gloo's own: closed by peer, or reset


def of_three(rank, group, odd, seconds):
    """One rank raises in its backward pass, in the middle of the others' work."""
    group = dist.new_group(range(3), timeout=timedelta(seconds=seconds))
    leaves = [x.requires_grad_() for x in inputs(12, batch=1)[:3]]
    out = distributed.attention(*leaves, group=group, method="ring", causal=True)
    if rank == odd:
        raise ArithmeticError("out of numbers")
    began = time.monotonic()
    try:
        out.sum().backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "computed", 0.0


def test_a_rank_that_raises_ends_the_others_in_bounded_time(tmp_path):
    """By their group's time limit, with a message that names whom they waited for; one that dies is known at once."""
    started = Ranks(tmp_path / "store", 3)
    answers = started.run(3, of_three, 1, 2.0)
    started.end()
    assert answers[1][0] == "ArithmeticError"
    for rank in (0, 2):
        kind, (message, seconds) = answers[rank]
        assert kind == "returned"
        assert "an exchange with rank" in message
        assert " broke off: " in message
        assert seconds < 20
