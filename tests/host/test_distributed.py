"""Context parallelism, by processes that talk to each other through gloo: what one process computes, by the tests' policy.

Four processes are started once for all tests, with a group of each size; each test sends them work. What a ring's steps compute
is tested without any, on their schedule.
"""

from __future__ import annotations

import math
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import distributed
from cute_attn.distributed import ring, schedule
from cute_attn.distributed.schedule import ORDERS, Shards
from tests import support
from tests.host.processes import quick

RANKS = 4
SECONDS = 120  # after which a test's processes count as waiting for one another


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


@given(bands(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_visible_pair_once_and_no_other(band, joins):
    seqlen_q, seqlen_k, ranks, order, lo, hi = band
    q, k = Shards(seqlen_q, ranks, order), Shards(seqlen_k, ranks, order)
    seen = []
    for of_q in range(ranks):
        for of_k in range(ranks):
            parts = schedule.pieces(q, k, of_q, of_k, lo, hi, joins)
            count = 0
            for piece in parts:
                left, right = piece.edges
                assert left is None or left >= 0
                assert right is None or right >= 0
                visible = support._visible(range(len(piece.rows)), len(piece.rows), len(piece.keys), False, (left, right), "cpu")
                assert visible.any(0).all()  # no row and no key in vain
                assert visible.any(1).all()
                assert piece.scores == visible.sum()
                pairs = [(piece.rows[i], piece.keys[j]) for i, j in visible.nonzero().tolist()]
                seen += [(position(q, of_q, row), position(k, of_k, key)) for row, key in pairs]
                count += len(pairs)
                assert set(piece.keys) <= set(schedule.spanned(parts))
            assert bool(count) == bool(schedule.spanned(parts))
    expected = [
        (row, key)
        for row in range(seqlen_q)
        for key in range(seqlen_k)
        if (lo is None or row + lo <= key) and (hi is None or key <= row + hi)
    ]
    assert sorted(seen) == expected


def test_zigzag_causal_is_one_balanced_call_a_step():
    shards = Shards(128, 4)
    steps = [[schedule.pieces(shards, shards, rank, (rank - t) % 4, None, 0) for t in range(4)] for rank in range(4)]
    assert {len(parts) for of_rank in steps for parts in of_rank} == {1}
    assert len({sum(parts[0].scores for parts in of_rank) for of_rank in steps}) == 1


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 3), st.sampled_from(ORDERS))
@settings(max_examples=60, deadline=None, derandomize=True)
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
    """A log-sum-exp in its unit stays as it is to the last bit; what sees nothing changes nothing, and nothing merged is nothing."""
    out, more = (torch.randn(1, 3, 2, 4, dtype=dtype) for _ in range(2))
    lse = torch.tensor([[[1.0e4 / 3, -math.inf, -math.inf], [5.0, 7.0, -math.inf]]], dtype=dtype)
    lse_of_more = torch.tensor([[[1.0, 3.0, -math.inf], [-math.inf, 7.0, -math.inf]]], dtype=dtype)
    merged, merged_lse = out.clone(), lse.clone()
    ring.merge(merged, merged_lse, more, lse_of_more, 0.37)
    assert torch.equal(merged_lse[0, :, 0], lse[0, :, 0])
    assert torch.equal(merged[:, 0], out[:, 0])
    assert torch.equal(merged[0, 1, 0], more[0, 1, 0])
    torch.testing.assert_close(merged[0, 1, 1], (out + more)[0, 1, 1] / 2)
    torch.testing.assert_close(merged_lse[0, 1, 1], torch.tensor(7.0 + 1 / 0.37, dtype=dtype))
    assert (merged_lse[0, :, 2] == -math.inf).all()
    assert not merged[:, 2].count_nonzero()


# ---- processes -------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that compute together; each has the groups of the first n of them."""

    def __init__(self, store: Path):
        context = quick()
        self.pipes, self.processes = [], []
        for rank in range(RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, count: int, work: Callable, *arguments) -> list:
        """``work(rank, group, *arguments)`` in so many of them: what each returned, or the words that it raised."""
        message = pickle.dumps((count, work, arguments))
        for pipe in self.pipes[:count]:
            pipe.send_bytes(message)
        found = []
        for rank, pipe in enumerate(self.pipes[:count]):
            assert pipe.poll(SECONDS), f"rank {rank} waits"
            found.append(pickle.loads(pipe.recv_bytes()))
        return found

    def results(self, count: int, work: Callable, *arguments) -> list:
        found = self.run(count, work, *arguments)
        assert all(kind == "returned" for kind, _ in found), found
        return [result for _, result in found]

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(rank: int, store: str, pipe) -> None:
    import os

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    groups = {count: dist.new_group(range(count)) for count in range(1, RANKS + 1)}
    while True:
        try:
            count, work, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = "returned", work(rank, groups[count], *arguments)
        except Exception as error:  # whatever it is, the test wants to know
            answer = type(error).__name__, f"{error}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    started = Workers(tmp_path_factory.mktemp("distributed") / "store")
    yield started
    started.end()


def both_passes(rank, group, tensors, options):
    """``(out, lse, dq, dk, dv)`` of whole sequences, computed on shards of them; on the first rank."""
    whole_q, whole_k = tensors[0].shape[1], tensors[1].shape[1]
    order, where = options.get("order", "zigzag"), {"group": group}
    q, k, v, dout = (distributed.shard(x, dim=1, order=order, **where) for x in tensors[:4])
    dlse = distributed.shard(tensors[4], dim=2, order=order, **where)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outputs = distributed.attention(*leaves, seqlen=whole_q, seqlen_k=whole_k, return_lse=True, **where, **options)
    gradients = torch.autograd.grad(outputs, leaves, (dout, dlse))
    found = []
    for x, seqlen, dim in zip((*outputs, *gradients), (whole_q,) * 3 + (whole_k,) * 2, (1, 2, 1, 1, 1), strict=True):
        found.append(distributed.unshard(x.detach(), seqlen, dim=dim, order=order, **where))
    return found if rank == 0 else None


def inputs(seqlen_q, seqlen_k=None, heads=(4, 2), batch=2, dtype=torch.float32, dv=24):
    q, k, v = support.make_qkv(batch, seqlen_q, seqlen_q if seqlen_k is None else seqlen_k, *heads, 16, dv, dtype)
    return [q, k, v, *support.make_gradients(q, v)]


def assert_right(found, tensors, **rules):
    out, lse, *gradients = found
    support.assert_close((out, lse), *tensors[:3], **rules)
    support.assert_gradients_close(gradients, *tensors, **rules)


CASES = {
    "causal": (4, inputs(150), {"causal": True}),
    "full": (3, inputs(50), {}),
    "window": (4, inputs(90), {"window": (20, 7)}),
    "narrow": (4, inputs(90), {"window": (3, 0), "order": "contiguous"}),  # most shards see no other
    "softcap": (2, inputs(61), {"causal": True, "softcap": 3.0, "scale": 0.4}),
    "longer keys": (3, inputs(40, 91), {"causal": True}),
    "longer queries": (4, inputs(91, 40), {"causal": True}),
    "fewer rows than chunks": (4, inputs(5), {"causal": True}),
    "MQA": (4, inputs(64, heads=(4, 1)), {"causal": True, "deterministic": True}),
    "16 bits": (4, inputs(200, dtype=torch.bfloat16), {"causal": True}),
    "64 bits": (2, inputs(40, dtype=torch.float64), {"causal": True}),
    "alone": (1, inputs(40), {"causal": True}),
}


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, method, workers):
    ranks, tensors, options = CASES[case]
    if method == "ulysses" and tensors[0].shape[2] % ranks:
        ranks = 2
    found = workers.results(ranks, both_passes, tensors, {"method": method, **options})[0]
    assert_right(found, tensors, **{name: x for name, x in options.items() if name not in ("order", "deterministic")})


def packed_passes(rank, group, tensors, cu_seqlens, options):
    """The same of packed sequences, without the log-sum-exp's gradient."""
    rows = tensors[0].shape[0]
    q, k, v, dout = (distributed.shard(x, dim=0, group=group).requires_grad_() for x in tensors[:4])
    out, lse = distributed.attention(q, k, v, group=group, seqlen=rows, cu_seqlens=cu_seqlens, return_lse=True, **options)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    found = [distributed.unshard(x.detach(), rows, dim=0, group=group) for x in (out, *gradients)]
    found.insert(1, distributed.unshard(lse.detach(), rows, dim=1, group=group))
    return found if rank == 0 else None


SIZES = (3, 0, 70, 1, 20, 37)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, {"causal": True, "method": "ring"}),
        (3, {"method": "ring"}),
        (2, {"causal": True, "method": "ulysses"}),
        (4, {"window": (9, 0)}),  # ulysses, as the ring can't
    ],
)
def test_packed_sequences_across_shards(ranks, options, workers):
    q, k, v, dout, _ = inputs(sum(SIZES) + 6, batch=1)
    packed, bounds = [x[0] for x in (q, k, v, dout)], list(accumulate(SIZES, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, lse, *gradients = workers.results(ranks, packed_passes, packed, cu_seqlens, options)[0]
    rules = {name: x for name, x in options.items() if name != "method"}
    for begin, end in zip(bounds, bounds[1:], strict=False):
        one = [x[:, begin:end] for x in (q, k, v)]
        support.assert_close((out[None, begin:end], lse[None, :, begin:end]), *one, **rules)
        found = [x[None, begin:end] for x in gradients]
        support.assert_gradients_close(found, *one, dout[:, begin:end], **rules)
    for x in (out, *gradients):
        assert not x[bounds[-1] :].count_nonzero()
    assert (lse[:, bounds[-1] :] == -math.inf).all()


def on_a_mesh(rank, group, tensors, options):
    mesh = dist.init_device_mesh("cpu", (2, 2))
    seqlen = tensors[0].shape[1]
    q, k, v, dout = (distributed.shard(x, mesh=mesh) for x in tensors[:4])
    dlse = distributed.shard(tensors[4], mesh=mesh, dim=2)
    at = distributed.positions(seqlen, mesh=mesh)
    assert torch.equal(q[:, at < seqlen], tensors[0][:, at[at < seqlen]])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    outputs = distributed.attention(*leaves, mesh=mesh, seqlen=seqlen, return_lse=True, **options)
    found = [*outputs, *torch.autograd.grad(outputs, leaves, (dout, dlse))]
    return [distributed.unshard(x.detach(), seqlen, mesh=mesh, dim=2 if i == 1 else 1) for i, x in enumerate(found)]


def test_a_mesh_of_two_dimensions_uses_both_methods(workers):
    tensors = inputs(75, heads=(4, 1))
    results = workers.results(4, on_a_mesh, tensors, {"causal": True, "window": (30, None)})
    assert_right(results[0], tensors, causal=True, window=(30, None))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


def of_dtensors(rank, group, tensors, options):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2, 2))  # the batch and the sequence
    at = (Shard(0), Shard(1))
    q, k, v, dout = (distribute_tensor(x, mesh, at) for x in tensors[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = distributed.attention(*leaves, return_lse=True, **options)
    assert isinstance(out, DTensor)
    dlse = distribute_tensor(tensors[4], mesh, lse.placements)
    found = out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return [x.detach().full_tensor() for x in found]


def test_dtensors(workers):
    tensors = inputs(64)
    for results in workers.results(4, of_dtensors, tensors, {"causal": True, "method": "ring"}):
        assert_right(results, tensors, causal=True)


def in_a_model(rank, group, x, weights):
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


def test_in_a_model(workers):
    for plain, *others in workers.results(2, in_a_model, torch.randn(1, 30, 32), torch.randn(32, 96) / 6):
        assert plain.count_nonzero()
        assert all(torch.equal(plain, other) for other in others)


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
def test_ranks_that_differ_are_named_on_all(odd, words, workers):
    answers = workers.run(3, call, 1, {"rows": 8, "causal": True, "method": "ring"}, {**odd, "method": "ring"})
    for kind, message in answers:
        assert kind == "ValueError"
        assert all(word in message for word in words), message
    assert workers.results(3, call, None, {"rows": 8, "method": "ring"}, {}) == ["computed"] * 3


def first_call(rank, group, odd):
    group = dist.new_group(range(4))
    q, k, v, *_ = inputs(8, batch=1)
    distributed.attention(q, k, v, group=group, causal="yes" if rank == odd else True)


def test_a_rank_that_refuses_its_first_call_is_named_by_the_others(workers):
    answers = workers.run(4, first_call, 2)
    assert [kind for kind, _ in answers] == ["RuntimeError", "RuntimeError", "TypeError", "RuntimeError"]
    assert all("rank 2 of the group refused its call of attention: causal is" in text for kind, text in answers if kind != "TypeError")
