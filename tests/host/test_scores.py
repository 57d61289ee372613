"""What the kernels make of a tile's products, thread by thread, on the machine's own processor: masks, scores, slopes, sinks.

Two of the GPU's instructions that a processor hasn't are replaced by its arithmetic. Where a thread's scores lie, which
positions those are and what becomes of them is the kernels' own code."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from cute_attn import block_mask, dropout, layouts, masks
from cute_attn.functions import traced
from cute_attn.plan import plan
from cute_attn.problem import Problem
from tests.functions import documents, table

cutlass = pytest.importorskip("cutlass")
from cutlass import Float32, Int32, Uint32, Uint64, cute  # noqa: E402
from cutlass.cute.nvgpu import warpgroup  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402

from cute_attn.layouts.fragments import rows_columns  # noqa: E402
from cute_attn.mainloop import captured, elements, fours  # noqa: E402
from cute_attn.mainloop.common import Values  # noqa: E402
from cute_attn.mainloop.scores import Coordinates, Scores, WordOps, rise_in_tile, with_rise  # noqa: E402
from cute_attn.softmax import LogSumExp, Softmax  # noqa: E402

SEQUENCE, HEAD, SEQLEN_Q, SEQLEN_K, SCALE = 1, 3, 290, 303, 0.25
IDS, BIAS = documents(2, "cpu"), table(4, 801, device="cpu")


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    monkeypatch.setattr(cute.arch, "rcp_approx", lambda x: 1.0 / x)
    monkeypatch.setattr(cute.arch, "fmax", lambda x, y, nan=False: elements.either(x > y, x, y))
    monkeypatch.setattr(cute.arch, "warp_reduction_sum", lambda x, threads_in_group: x)


def changed(score, batch, head, q_idx, kv_idx):
    return 3.0 * torch.tanh((score + BIAS[head, torch.clamp(q_idx - kv_idx + 400, 0, 800)]) / 3.0)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["forward", "keys of a block", "queries of a block"])
def test_a_tile(kind, softcap):
    """A tile that both sides end in: scores of the forward pass, or P and P ∘ the slopes of either kind of backward loop."""
    transposed, gradients = kind == "keys of a block", "" if kind == "forward" else "qkv"
    expression, captured = traced(masks.document(IDS), changed, (), None, torch.zeros(2, 4, 4, 8), 4, 2)
    rules = {"bounded_right": True, "softcap": softcap > 0.0, "gradients": gradients, "expression": expression}
    problem = Problem("bfloat16", 64, 64, **rules)
    config = plan(problem, "sm_80", "cp_async")
    lay = layouts.family(config)
    shape = (config.tile_n, config.step_m) if gradients else (config.tile_m, config.tile_n)
    rows, columns = torch.arange(shape[0])[:, None] + 256, torch.arange(shape[1]) + 256
    q_idx, kv_idx = (x.expand(shape) for x in ((columns, rows) if transposed else (rows, columns)))
    scale_log2, by_cap = (softcap * math.log2(math.e), SCALE / softcap) if softcap else (SCALE * math.log2(math.e), 0.0)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4.0
    found, lse = torch.full((3, *shape), math.nan), table(shape[1 if transposed else 0], device="cpu") + 2.0

    @cute.jit
    def compute(found: cute.Tensor, given: cute.Tensor, lse: cute.Tensor, tensors, thread: Int32):
        mma = lay.tiled_mma("S", config)
        where = Coordinates.of(mma, thread, shape)
        acc = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
        held = rows_columns(acc)
        places = [(r, c) for r in range(cute.size(held, mode=[0])) for c in range(cute.size(held, mode=[1]))]
        for r, c in places:
            held[r, c] = given[where.thread[r, c]]
        lengths = Int32(SEQLEN_Q), Int32(SEQLEN_K), Int32(0), Int32(SEQLEN_K - SEQLEN_Q)
        place = {"captured": tensors, "sequence": Int32(SEQUENCE), "head": Int32(HEAD)}
        scores = Scores(where, Values(*lengths, Float32(scale_log2), Float32(by_cap), **place), problem, transposed)
        scores.apply_rules(acc, (256, 256), True)
        for r, c in places:
            found[(0, *where.thread[r, c])] = held[r, c]
        if cutlass.const_expr(gradients != ""):
            wide = cute.make_tensor(lse.iterator, cute.make_layout(shape, stride=(0, 1) if transposed else (1, 0)))
            along = rows_columns(mma.get_slice(thread).partition_C(wide))
            P = scores.probabilities(acc, along[0, None] if transposed else along[None, 0], cutlass.Float16, (256, 256))
            for r, c in places:
                found[(1, *where.thread[r, c])] = rows_columns(P)[r, c].to(Float32)
                found[(2, *where.thread[r, c])] = held[r, c]

    arguments = from_dlpack(found), from_dlpack(given), from_dlpack(lse), tuple(map(from_dlpack, captured))
    compiled = cute.compile(compute, *arguments, Int32(0))
    for thread in range(config.threads):
        compiled(*arguments, Int32(thread))

    scaled = (given.double() * SCALE).requires_grad_()
    capped = softcap * torch.tanh(scaled / softcap) if softcap else scaled
    want = changed(capped, SEQUENCE, HEAD, q_idx, kv_idx)
    (slope,) = torch.autograd.grad(want.sum(), scaled)
    visible = (IDS[SEQUENCE, q_idx] == IDS[SEQUENCE, kv_idx]) & (kv_idx <= q_idx + SEQLEN_K - SEQLEN_Q) & (kv_idx < SEQLEN_K)
    there = q_idx < SEQLEN_Q
    assert 0.05 < visible[there].float().mean() < 0.95
    assert torch.equal((found[0] == -math.inf)[there], ~visible[there])
    if not gradients:
        torch.testing.assert_close(found[0][there & visible], want[there & visible].detach().float(), rtol=1e-5, atol=1e-5)
        return
    P = ((want.detach() - (lse if transposed else lse[:, None])).exp() * visible)[there].float()
    if transposed:
        torch.testing.assert_close(found[1][there], P, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found[2][there], P * slope[there].float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_band_shows(left, right, transposed):
    """Of tiles that an edge cuts anywhere, and of such that it doesn't."""
    problem = Problem("bfloat16", 64, 64, bounded_left=left, bounded_right=right, gradients="qkv" if transposed else "")
    config = plan(problem, "sm_80", "cp_async")
    lay = layouts.family(config)
    shape = (config.tile_n, config.step_m) if transposed else (config.tile_m, config.tile_n)

    @cute.jit
    def compute(found: cute.Tensor, first: Int32, lo: Int32, hi: Int32, thread: Int32):
        mma = lay.tiled_mma("S", config)
        where = Coordinates.of(mma, thread, shape)
        scores = Scores(where, Values(Int32(290), Int32(303), lo, hi, Float32(1.0), Float32(0.0)), problem, transposed)
        assert scores._masks_by_words
        acc = cute.make_rmem_tensor(mma.partition_shape_C(shape), Float32)
        acc.fill(1.0)
        scores.apply_rules(acc, (128, first), True)
        held = rows_columns(acc)
        for r in range(cute.size(held, mode=[0])):
            for c in range(cute.size(held, mode=[1])):
                found[where.thread[r, c]] = held[r, c]

    found = torch.zeros(shape)
    arguments = from_dlpack(found), *(Int32(0) for _ in range(4))
    compiled = cute.compile(compute, *arguments)
    for first in (0, 128, 229, 256):
        rows, columns = torch.arange(shape[0])[:, None] + 128, torch.arange(shape[1]) + first
        q_idx, kv_idx = (columns, rows) if transposed else (rows, columns)
        for lo, hi in ((-300, 300), (-77, 13), (-7, -5), (-1, 0), (0, 0), (40, 100), (200, 300), (-300, -200)):
            for thread in range(config.threads):
                compiled(arguments[0], Int32(first), Int32(lo), Int32(hi), Int32(thread))
            visible = (kv_idx >= q_idx + lo) | (not left)
            visible = visible & ((kv_idx <= q_idx + hi) | (not right)) & (kv_idx < 303)
            there = (q_idx < 290).expand(shape)
            assert torch.equal((found == 1.0)[there], visible.expand(shape)[there])
            assert torch.equal((found == -math.inf)[there], ~visible.expand(shape)[there])


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
def test_where_a_biass_gradient_is_stored(shape, monkeypatch):
    """Each score's in the copy for its batch element and head, where others share the bias, and nowhere else."""
    monkeypatch.setattr(captured, "_store", _store_on_the_processor)
    bias = torch.zeros(*shape, SEQLEN_Q, SEQLEN_K, requires_grad=True)
    q = torch.zeros(2, SEQLEN_Q, 4, 8)
    expression, read = traced(None, None, (), None, q, 4, 2, bias, (SEQLEN_Q, SEQLEN_K))
    assert expression.partials[0].copied == tuple(x for x, n in zip(("batch", "head"), shape, strict=True) if n == 1)
    problem = Problem("bfloat16", 64, 64, gradients="qkv", expression=expression)
    config = plan(problem, "sm_80", "cp_async")
    lay, tile = layouts.family(config), (config.tile_n, config.step_m)
    generator = torch.Generator().manual_seed(0)
    given, dP = (torch.randn(tile, generator=generator) for _ in range(2))
    lse, delta = (torch.randn(tile[1], generator=generator) for _ in range(2))
    copies = [n for n, mine in zip((2, 4), shape, strict=True) if mine == 1]
    names = [n for n in shape if n > 1]
    found = torch.full((*copies, *names, SEQLEN_Q, SEQLEN_K), math.nan)

    @cute.jit
    def compute(found: cute.Tensor, given: cute.Tensor, dP: cute.Tensor, rows, tensors, thread: Int32):
        mma = lay.tiled_mma("S", config)
        where = Coordinates.of(mma, thread, tile)
        acc, acc_dP = (cute.make_rmem_tensor(mma.partition_shape_C(tile), Float32) for _ in range(2))
        for x, source in ((acc, given), (acc_dP, dP)):
            held = rows_columns(x)
            for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(held, mode=[1])):
                    held[r, c] = source[where.thread[r, c]]
        lengths = Int32(SEQLEN_Q), Int32(SEQLEN_K), Int32(0), Int32(SEQLEN_K - SEQLEN_Q)
        place = {"captured": tensors, "of_captured": (found,), "sequence": Int32(SEQUENCE), "head": Int32(HEAD)}
        scores = Scores(where, Values(*lengths, Float32(math.log2(math.e)), Float32(0.0), **place), problem, True)
        along = [
            rows_columns(mma.get_slice(thread).partition_C(cute.make_tensor(x.iterator, cute.make_layout(tile, stride=(0, 1)))))
            for x in rows
        ]
        scores.probabilities(acc, along[0][0, None], cutlass.Float16, (256, 256))
        scores.gradients(acc, acc_dP, along[1][0, None], along[0][0, None], (256, 256))

    arguments = *map(from_dlpack, (found, given, dP)), tuple(map(from_dlpack, (lse, delta)))
    arguments = *arguments, tuple(from_dlpack(x.detach()) for x in read)
    compiled = cute.compile(compute, *arguments, Int32(0))
    for thread in range(config.mma_threads):
        compiled(*arguments, Int32(thread))
    dS = ((given - lse).exp() * (dP - delta)).T
    rows, keys = min(SEQLEN_Q - 256, tile[1]), min(SEQLEN_K - 256, tile[0])
    want = torch.full((2, 4, SEQLEN_Q, SEQLEN_K), math.nan)
    want[SEQUENCE, HEAD, 256 : 256 + rows, 256 : 256 + keys] = dS[:rows, :keys]
    by_batch_and_head = found.reshape(2, 4, SEQLEN_Q, SEQLEN_K) if shape != (2, 1) else found.transpose(0, 1)
    torch.testing.assert_close(by_batch_and_head, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@cute.jit
def _store_on_the_processor(place, value, exists):
    if exists:
        into = cute.make_ptr(value.dtype, place, cute.AddressSpace.generic)
        cute.make_tensor(into, cute.make_layout(1))[0] = value


@pytest.mark.parametrize("mechanism", ["cp_async", "tma_wgmma"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_dropout_keeps_of_a_tile(transposed, mechanism, monkeypatch):
    """Bit for bit what the reference does, whichever scores a thread has, at once or as bits, and however it asks for them."""
    for name in ("product", "at_least", "signs"):
        monkeypatch.setattr(WordOps, name, staticmethod(globals()[f"_{name}_of_words"]))
    monkeypatch.setattr(warpgroup.MmaF16BF16Op, "__post_init__", lambda self: None)  # which asks for a GPU that has it
    problem = Problem("bfloat16", 64, 64, gradients="qkv" if transposed else "", dropout=True)
    config = plan(problem, "sm_90a", mechanism)
    lay = layouts.family(config)
    shape = (config.tile_n, config.tile_m) if transposed else (config.tile_m, config.tile_n)
    if mechanism == "tma_wgmma":
        shape = (lay.ROWS_PER_WARPGROUP, shape[1])
    elif transposed:
        shape = (config.tile_n, config.step_m)
    first, seed = (1040, 112), torch.tensor([0x7EDCBA9876543210])
    threads = 128 if mechanism == "tma_wgmma" else config.mma_threads
    found, words = torch.full((3, *shape), math.nan), seed.view(torch.int32)
    exchanged = torch.zeros(2, threads, shape[0] * shape[1] // threads // 32, dtype=torch.int32)

    @cute.jit
    def compute(found: cute.Tensor, words: cute.Tensor, exchanged: cute.Tensor, below: Int32, thread: Int32):
        asked = []

        def transposed_by_warp(x):
            asked.append(x)
            exchanged[0, thread, len(asked) - 1] = Int32(x)
            return Uint32(exchanged[1, thread, len(asked) - 1])

        monkeypatch.setattr(fours, "transposed", transposed_by_warp)
        where = Coordinates.of(lay.tiled_mma("S", config), thread, shape)
        key = tuple(Uint32(words[i]) for i in range(2))
        place = {"seed": key, "drop_below": below, "kept_scale": Float32(1.0), "sequence": Int32(SEQUENCE), "head": Int32(HEAD)}
        numbers = (Int32(0), Int32(0), Int32(0), Int32(0), Float32(1.0), Float32(0.0))
        scores = Scores(where, Values(*numbers, **place), problem, transposed)
        acc = cute.make_rmem_tensor(lay.tiled_mma("S", config).partition_shape_C(shape), cutlass.Float16)
        acc.fill(1.0)
        kept, held = scores.kept(first), rows_columns(acc)
        if cutlass.const_expr(not transposed):
            scores.drop(acc, first)
        for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
            for c in cutlass.range_constexpr(0, cute.size(held, mode=[1]), 2):
                pair = kept.of_pair(r, c)
                for i in cutlass.range_constexpr(2):
                    place = where.thread[r, c + i]
                    one = kept.of(Float32(1.0), r, c + i)
                    found[(0, *place)] = one if transposed else held[r, c + i].to(Float32)
                    found[(1, *place)] = one
                    found[(2, *place)] = Float32((pair >> 16 * i) & Uint32(0xFFFF)) / 65535.0

    tensors = from_dlpack(found), from_dlpack(words), from_dlpack(exchanged)
    compiled = cute.compile(compute, *tensors, Int32(0), Int32(0))
    rows, columns = (torch.arange(n) + start for n, start in zip(shape, first, strict=True))
    q_idx, kv_idx = (columns, rows[:, None]) if transposed else (rows[:, None], columns)
    for p in (0.3, 0.9 if transposed else 0.8):
        found.fill_(math.nan)
        for _ in range(1 + transposed):
            for thread in range(threads):
                compiled(*tensors, Int32(dropout.threshold(p)), Int32(thread))
            number = exchanged.shape[2]
            halves = exchanged[0].view(torch.int16).view(-1, 8, 4, number, 2)  # (warp, row, its threads, word, half)
            matrices = halves.permute(0, 3, 2, 4, 1).reshape(-1, number, 8, 8)  # (warp, word, column, row)
            turned = matrices.unflatten(3, (4, 2)).permute(0, 2, 3, 1, 4).reshape(threads, -1)
            exchanged[1] = turned.contiguous().view(torch.int32)
        want = dropout.kept(seed, p, torch.tensor(SEQUENCE), torch.tensor(HEAD), q_idx, kv_idx)
        assert abs(want.float().mean() + p - 1.0) < 0.05
        assert torch.equal(found, want.float().expand(3, -1, -1))


def _on_tensor_cores(monkeypatch, problem, rows_of_scores):
    """``(layouts, tiled MMA's maker, shape)`` of a warpgroup's scores on ``tma_wgmma``."""
    monkeypatch.setattr(warpgroup.MmaF16BF16Op, "__post_init__", lambda self: None)  # which asks for a GPU that has it
    monkeypatch.setattr(cute.arch, "make_warp_uniform", lambda x: x)
    config = plan(problem, "sm_90a", "tma_wgmma")
    lay = layouts.family(config)
    return partial(lay.tiled_mma, "S", config), (lay.ROWS_PER_WARPGROUP, getattr(config, rows_of_scores))


def test_masks_that_are_computed_ahead(monkeypatch):
    """Of a list's cut tiles, block by block, before there are scores; inside of the tensors, and past either end. Some are cut
    by rows, and what is loaded of rows is loaded before."""
    blocks = block_mask(masks.document(IDS), 2, None, SEQLEN_Q, SEQLEN_K, (), "cpu")
    expression, captured = traced(masks.document(IDS), None, (), None, torch.zeros(2, 4, 4, 8), 4, 2)
    problem = Problem("bfloat16", 64, 64, expression=expression, blocks="listed")
    tiled_mma, shape = _on_tensor_cores(monkeypatch, problem, "tile_n")
    found, kinds = torch.full(shape, math.nan), blocks.kinds_in_a_row(2, 1).contiguous()

    @cute.jit
    def compute(found: cute.Tensor, kinds: cute.Tensor, tensors, row: Int32, column: Int32, thread: Int32):
        where = Coordinates.of(tiled_mma(), thread, shape)
        lengths = Int32(SEQLEN_Q), Int32(SEQLEN_K), Int32(0), Int32(0), Float32(1.0), Float32(0.0)
        values = Values(*lengths, captured=tensors, sequence=Int32(SEQUENCE), head=Int32(0), kinds=kinds)
        scores = Scores(where, values, problem)
        scores = replace(scores, loaded=scores.loaded_of_rows(row))
        assert len(scores.loaded) == 2
        acc = cute.make_rmem_tensor(tiled_mma().partition_shape_C(shape), Float32)
        acc.fill(1.0)
        place, held = (row, column), rows_columns(acc)
        scores.apply_rules(acc, place, True, seen=scores.seen(place, True, scores.kinds(place)))
        for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(held, mode=[1])):
                found[where.thread[r, c]] = held[r, c]

    arguments = from_dlpack(found), from_dlpack(kinds), tuple(map(from_dlpack, captured))
    compiled = cute.compile(compute, *arguments, Int32(0), Int32(0), Int32(0))
    for origin in ((64, 0), (128, 32), (192, 160), (256, 224), (0, 288)):
        found.fill_(math.nan)
        for thread in range(128):
            compiled(*arguments, *map(Int32, origin), Int32(thread))
        rows, columns = torch.arange(shape[0])[:, None] + origin[0], torch.arange(shape[1]) + origin[1]
        held = tuple(x.clamp(max=IDS.shape[1] - 1) for x in (rows, columns))
        seen = (IDS[SEQUENCE, held[0]] == IDS[SEQUENCE, held[1]]) & (columns < SEQLEN_K)
        there = (rows < SEQLEN_Q).expand(shape)
        assert torch.equal((found == 1.0)[there], seen[there]), origin
        assert torch.equal((found == -math.inf)[there], ~seen[there]), origin


@pytest.mark.parametrize("rises", [False, True])
@pytest.mark.parametrize("kind", ["forward", "keys of a block", "queries of a block", "queries over warps"])
def test_ramps(kind, rises, monkeypatch):
    """Scores with what their row lacks, and P by a log-sum-exp from which a query's part is off. A maximum that a quad shares
    is the same in all of its threads, whose columns begin elsewhere."""
    largest = 400.0  # of the quad, somewhere else in it
    monkeypatch.setattr(cute.arch, "warp_reduction_max", lambda x, threads_in_group: cute.arch.fmax(x, Float32(largest)))
    over_warps, gradients, sign = kind == "queries over warps", "" if kind == "forward" else "qkv", 1.0 if rises else -1.0
    transposed = over_warps or kind == "keys of a block"
    slopes = torch.tensor([0.0, 0.0, 0.0, 0.25])
    ramp = lambda score, batch, head, q_idx, kv_idx: score + (3 + q_idx + q_idx - kv_idx) * (sign * slopes[head])  # noqa: E731
    expression, captured = traced(None, ramp, (), None, torch.zeros(2, 4, 4, 8), 4, 2)
    assert not expression.natural
    d = 256 if over_warps else 64
    problem = Problem("bfloat16", d, d, gradients=gradients, expression=expression, bounded_right=True)
    if over_warps:
        config = plan(problem, "sm_90a", "cp_async")
        tiled_mma, shape = partial(layouts.family(config).tiled_mma, "S", config), (config.tile_n, config.step_m)
    else:
        tiled_mma, shape = _on_tensor_cores(monkeypatch, problem, "tile_m" if gradients else "tile_n")
    threads = config.threads if over_warps else 128
    origin, scale_log2 = (128, 128), SCALE * math.log2(math.e)
    rows, columns = torch.arange(shape[0])[:, None] + origin[0], torch.arange(shape[1]) + origin[1]
    q_idx, kv_idx = (x.expand(shape) for x in ((columns, rows) if transposed else (rows, columns)))
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4.0
    want = given.double() + sign * 0.25 / SCALE * (3 + 2 * q_idx - kv_idx)
    seen = kv_idx <= q_idx + SEQLEN_K - SEQLEN_Q
    lse = want.masked_fill(~seen, -math.inf).logsumexp(0 if transposed else 1).float()
    found, begun = torch.full((2, *shape), math.nan), torch.full((128, 2), math.nan)
    monkeypatch.setattr(cute.arch, "sync_warp", lambda: None)
    shared = torch.full((shape[1] // 2,), math.nan)

    @cute.jit
    def compute(found: cute.Tensor, begun: cute.Tensor, given: cute.Tensor, lse: cute.Tensor, shared, tensors, thread: Int32):
        where = Coordinates.of(tiled_mma(), thread, shape)
        lengths = Int32(SEQLEN_Q), Int32(SEQLEN_K), Int32(0), Int32(SEQLEN_K - SEQLEN_Q), Float32(scale_log2), Float32(0.0)
        values = Values(*lengths, captured=tensors, sequence=Int32(SEQUENCE), head=Int32(HEAD))
        values = with_rise(values, problem)
        scores, place = Scores(where, values, problem, transposed), (Int32(origin[0]), Int32(origin[1]))
        acc = cute.make_rmem_tensor(tiled_mma().partition_shape_C(shape), Float32)
        acc.fill(0.0)
        held = rows_columns(acc)
        if cutlass.const_expr(gradients == ""):
            for lane in cutlass.range_constexpr(32):
                scores.write_ramp(shared, Int32(lane))
            scores.started(acc, shared)
        for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(held, mode=[1])):
                held[r, c] = held[r, c] + given[where.thread[r, c]]
        begins = scores.ramp_of_rows(place)
        scores.apply_rules(acc, place, True, apart=gradients == "")
        if cutlass.const_expr(gradients == ""):
            for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
                for c in cutlass.range_constexpr(cute.size(held, mode=[1])):
                    found[(0, *where.thread[r, c])] = held[r, c] + begins[r]
            softmax = Softmax.start(2, Float32(scale_log2), fused=True)
            softmax.step(held, cute.make_rmem_tensor(2, Float32), None, begins)
            for r in cutlass.range_constexpr(2):
                begun[thread, r] = softmax.row_max[r]
        else:
            less = cute.make_rmem_tensor(cute.size(held, mode=[1 if transposed else 0]), Float32)
            for i in cutlass.range_constexpr(cute.size(less)):
                of = where.thread[(0, i) if transposed else (i, 0)][1 if transposed else 0]
                query = of + origin[1 if transposed else 0]
                less[i] = lse[of] - rise_in_tile(values, problem, query, shape[transposed])
            scores.probabilities(acc, less, cutlass.Float16, place)
        for r in cutlass.range_constexpr(cute.size(held, mode=[0])):
            for c in cutlass.range_constexpr(cute.size(held, mode=[1])):
                found[(1, *where.thread[r, c])] = held[r, c]

    arguments = *map(from_dlpack, (found, begun, given, lse, shared)), tuple(map(from_dlpack, captured))
    compiled = cute.compile(compute, *arguments, Int32(0))
    for thread in range(threads):
        compiled(*arguments, Int32(thread))
    if gradients:
        along = lse.double() if transposed else lse.double()[:, None]
        P = ((want - along) * SCALE).exp() * seen
        torch.testing.assert_close(found[1], P.float(), rtol=1e-3, atol=1e-6)
        return
    torch.testing.assert_close(found[0][seen], want[seen].float(), rtol=1e-5, atol=1e-3)
    assert begun.eq(largest).all()
    torch.testing.assert_close(found[1], (((want - largest) * SCALE).exp() * seen).float(), rtol=1e-3, atol=1e-30)


def _product_of_words(x, constant):
    """As the GPU's instruction does it; so the others."""
    whole = Uint64(x) * Uint64(constant)
    return Uint32(whole >> 32), Uint32(whole)


def _at_least_of_words(x, least):
    halves = (((x >> i) & Uint32(0x7FFF)) >= ((least >> i) & Uint32(0x7FFF)) for i in (0, 16))
    lower, upper = (elements.either(is_one, Uint32(0xFFFF), Uint32(0)) for is_one in halves)
    return lower | (upper << 16)


def _signs_of_words(x):
    lower, upper = (elements.either((x >> i) & Uint32(1) != 0, Uint32(0xFFFF), Uint32(0)) for i in (15, 31))
    return lower | (upper << 16)


@pytest.mark.parametrize("sink", [1.5, -math.inf])
@pytest.mark.parametrize("scale_log2", [1.0, 0.3])
def test_the_end_of_a_softmax_with_a_sink(scale_log2, sink):
    """Of rows whose largest score is far below the sink, near it, far above it, and of one that saw no key."""
    row_max, row_sum = torch.tensor([-400.0, -3.0, 0.0, 500.0, -math.inf]), torch.tensor([1.0, 2.0, 7.5, 3.0, 0.0])
    found = torch.zeros(3, 5)

    @cute.jit
    def compute(found: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor, sink: Float32):
        softmax = Softmax.start(5, Float32(scale_log2), fused=False)
        normalize = cute.make_rmem_tensor(5, Float32)
        for r in range(5):
            softmax.row_max[r], softmax.row_sum[r] = row_max[r], row_sum[r]
        lse = LogSumExp.like(normalize)
        softmax.finish(normalize, lse, cutlass.BFloat16, sink)
        for r in range(5):
            found[0, r], found[1, r], found[2, r] = normalize[r], lse.natural[r], lse.raw[r]

    arguments = *map(from_dlpack, (found, row_max, row_sum)), Float32(sink)
    cute.compile(compute, *arguments)(*arguments)
    unit = scale_log2 * math.log(2.0)
    of_keys = row_max.double() * unit + row_sum.double().log()
    lse = torch.logaddexp(of_keys, torch.tensor(sink).double()).where(row_sum > 0, -math.inf)
    torch.testing.assert_close(found[1], lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], torch.where(row_sum > 0, lse / unit, math.inf).float(), rtol=1e-5, atol=1e-5)
    want = torch.where(row_sum > 0, (row_max.double() * unit - lse).exp(), 0.0)
    torch.testing.assert_close(found[0], want.float(), rtol=1e-5, atol=0.0)
