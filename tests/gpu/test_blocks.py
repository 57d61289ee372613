"""Block masks: made by a kernel, and walked over by the kernels of both passes, on both mechanisms."""

import math

import pytest
import torch

from cute_attn import attention, block_mask, launch, masks
from cute_attn.blocks import WHOLE, BlockMask, classified
from cute_attn.functions import traced
from tests.functions import BLOCKED, check, documents
from tests.planted import plant
from tests.support import assert_close, make_gradients, make_qkv

BF16 = torch.bfloat16
DIMS = [(64, 64), (128, 128), (256, 256)]


@pytest.mark.parametrize("sizes", [(1, 1), (31, 700), (700, 33), (333, 421), (256, 256)])
@pytest.mark.parametrize("case", BLOCKED)
def test_the_kernel_finds_what_torch_finds(case, sizes):
    made = BLOCKED[case](3, 2, torch.device("cuda"), 0)
    found = block_mask(made.asked["mask"], 3, 2, *sizes, device="cuda")
    want = torch.empty_like(found.kinds)
    expression, captured = traced(made.asked["mask"], None, (), None, want, 2, 3)
    classified(want, expression, captured, *sizes)
    assert torch.equal(found.kinds, want)


@pytest.mark.parametrize("tile", [(192, 128), (128, 128), (64, 64), (128, 96), (64, 32)])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 4, 1, 70), (1, 2, 70, 1), (3, 4, 37, 41), (1, 2, 130, 140)])
@pytest.mark.parametrize("empty", [0.1, 0.8, 0.99])
def test_the_kernel_lists_what_python_lists(sizes, tile, empty):
    """Of any kinds, whatever gaps there are."""
    *heads, rows, columns = sizes
    generator = torch.Generator().manual_seed(rows)
    kinds = torch.randint(1, 4, sizes, generator=generator) * torch.rand(sizes, generator=generator).gt(empty)
    coarse = torch.randint(0, 4, (*heads, -(-rows // 9), -(-columns // 9)), generator=generator)
    coarse = coarse.repeat_interleave(9, 2).repeat_interleave(9, 3)[:, :, :rows, :columns]
    kinds = kinds.where(coarse > WHOLE, coarse.clamp(max=WHOLE) // WHOLE * WHOLE).byte()
    of_cpu = BlockMask(kinds, rows * 32, columns * 32)
    of_gpu = of_cpu.to("cuda")
    assert torch.equal(of_gpu.key_lists(*tile, *heads).cpu(), of_cpu.key_lists(*tile, *heads))
    for heads_kv in {1, heads[1]}:
        asked = *tile, heads[1] // heads_kv, heads[0], heads_kv
        assert torch.equal(of_gpu.query_lists(*asked).cpu(), of_cpu.query_lists(*asked))


def test_a_large_one():
    """Of 40,000 × 40,000, whose pairs 32 bits would hold and whose scores no memory should."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = block_mask(masks.causal, None, None, 40_000, 40_000, device="cuda")
    found.key_lists(128, 128, 1, 1)
    assert torch.cuda.max_memory_allocated() - before < 2**22
    row = torch.arange(1250, device="cuda")
    want = torch.where(row[:, None] > row, 2, torch.where(row[:, None] == row, 1, 0)).byte()
    assert torch.equal(found.kinds[0, 0], want)


@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("case", BLOCKED)
def test_results_and_gradients(case, dims, kind, mechanism):
    """Key heads are shared, and lengths are no multiple of a tile."""
    check(case, (2, 333, 421), (4, 2), dims, BF16, "cuda", kind=kind, blocks=True, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 700), (1, 600, 5), (2, 256, 256), (3, 699, 698)])
@pytest.mark.parametrize("case", ["causal", "document", "heads"])
def test_other_lengths(case, sizes, mechanism):
    check(case, sizes, (2, 1), (64, 64), BF16, "cuda", blocks=True, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("dims", [(96, 40), (192, 128), (40, 104)])
@pytest.mark.parametrize("case", ["prefix", "heads"])
def test_other_head_dims_and_float16(case, dims, mechanism):
    check(
        case, (1, 500, 500), (2, 2), dims, torch.float16, "cuda", False, blocks=True, backend="cute", mechanism=mechanism
    )


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("case", ["causal", "heads"])
def test_a_fixed_order(case, dims, mechanism):
    """The same bits each time, and the same gradients."""
    options = {"backend": "cute", "mechanism": mechanism, "deterministic": True}
    check(case, (2, 690, 690), (4, 1), dims, BF16, "cuda", blocks=True, **options)
    q, k, v = make_qkv(2, 690, 690, 4, 1, *dims, BF16, "cuda")
    mask, (dout, _) = BLOCKED[case](2, 4, q.device, 0).asked["mask"], make_gradients(q, v)
    blocks, results = block_mask(mask, 2, 4, 690, 690, device="cuda"), []
    for _ in range(20):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, mask=mask, block_mask=blocks, **options)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needs", ["q", "k", "v", "kv"])
@pytest.mark.parametrize("d", [64, 256])
def test_some_gradients(needs, d, mechanism):
    q, k, v = make_qkv(1, 300, 300, 4, 2, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    blocks, results = block_mask(masks.causal, None, None, 300, 300, device="cuda"), []
    for names in ("qkv", needs):
        leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in zip("qkv", (q, k, v), strict=True)}
        options = {"mask": masks.causal, "block_mask": blocks, "mechanism": mechanism, "deterministic": True}
        wanted = {name: leaves[name] for name in names}
        found = torch.autograd.grad(attention(*leaves.values(), **options), list(wanted.values()), dout)
        results.append(dict(zip(wanted, found, strict=True)))
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][name])


def rising(rows: int, d: int, jump: float):
    """Scores that rise by ``jump`` powers of two in all, from the last key to the first; values so small that no output is
    infinite."""
    q, k, v = make_qkv(1, rows, rows, 2, 2, d, d, BF16, "cuda")
    q[..., 0], k[..., 0] = 1.0, (jump * math.log(2.0) * math.sqrt(d) * torch.linspace(1, 0, rows, device="cuda"))[None, :, None]
    return q, k, v * 2.0**-60


@pytest.mark.parametrize("jump", [10.0, 100.0, 160.0, 1e4])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("mask", [masks.causal, masks.window(700)], ids=["causal", "window"])
def test_scores_that_rise_from_tile_to_tile(mask, d, jump, mechanism):
    """Whole tiles look for no maximum, nor do those after them; where scores rise far, a block does its tiles again."""
    q, k, v = rising(1500, d, jump)
    blocks = block_mask(mask, None, None, 1500, 1500, device="cuda")
    got = attention(q, k, v, mask=mask, block_mask=blocks, mechanism=mechanism, return_lse=True)
    assert_close(got, q, k, v, mask=mask)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_query_tiles_across_documents(d, mechanism):
    """Warpgroups of one tile that see other documents leave tiles to one another, at either end."""
    ids = torch.arange(2000, device="cuda") // 130 * (torch.arange(2000, device="cuda") % 2000 < 1700).int()
    q, k, v = make_qkv(1, 2000, 2000, 2, 2, d, d, BF16, "cuda")
    for mask in (masks.document(ids), masks.and_masks(masks.document(ids), masks.causal), masks.window(300, 20)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        blocks = block_mask(mask, None, None, 2000, 2000, device="cuda")
        results = []
        for given in (None, blocks):
            out = attention(*leaves, mask=mask, block_mask=given, mechanism=mechanism)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_many_key_tiles_few_to_a_query(d, deterministic, mechanism):
    """So many rounds of key tiles that some blocks leave their place to those that round dQ, as none do for a head alone."""
    seqlen, heads = 2176, 80
    mask = masks.document(torch.arange(seqlen, device="cuda") // 300)
    blocks = block_mask(mask, None, None, seqlen, seqlen, device="cuda")
    q, k, v = make_qkv(1, seqlen, seqlen, heads, heads, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)

    def gradients(*of_heads):
        leaves = [x[:, :, slice(*of_heads)].clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, mask=mask, block_mask=blocks, mechanism=mechanism, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, dout[:, :, slice(*of_heads)])

    dq, dk, dv = gradients(0, heads)
    for head in (0, 41, heads - 1):
        of_head = slice(head, head + 1)
        dq_alone, dk_alone, dv_alone = gradients(head, head + 1)
        assert torch.equal(dk[:, :, of_head], dk_alone)
        assert torch.equal(dv[:, :, of_head], dv_alone)
        if deterministic:
            assert torch.equal(dq[:, :, of_head], dq_alone)
        torch.testing.assert_close(dq[:, :, of_head], dq_alone, atol=1e-5, rtol=8e-3)


def test_a_table_that_ends_before_the_keys(mechanism):
    """Keys past its end read its last element, in tiles that are inside of the sequence, too."""
    q, k, v = make_qkv(1, 700, 700, 2, 2, 64, 64, BF16, "cuda")
    shown = torch.arange(300, device="cuda") % 7 != 3
    mask = lambda batch, head, q_idx, kv_idx: shown[kv_idx] & (q_idx >= kv_idx)  # noqa: E731
    blocks = block_mask(mask, None, None, 700, 700, device="cuda")
    got = attention(q, k, v, mask=mask, block_mask=blocks, mechanism=mechanism)
    whole = torch.cat((shown, shown[-1].expand(400)))
    want = attention(q, k, v, mask=lambda batch, head, q_idx, kv_idx: whole[kv_idx] & (q_idx >= kv_idx), mechanism=mechanism)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dims", DIMS)
def test_nothing_gets_out_of_a_masked_key(dims, mechanism):
    """NaN and infinities in keys and values that a function hides from some rows: the same bits in all results of those."""
    q, k, v = make_qkv(2, 600, 600, 2, 1, *dims, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    mask = lambda batch, head, q_idx, kv_idx: (kv_idx < 300) | (q_idx >= 400)  # noqa: E731
    hidden, rows = torch.arange(600, device="cuda") >= 300, slice(0, 400)
    planted = [x.clone() for x in (k, v)]
    for i, x in enumerate(planted):
        plant(x, hidden[None], i)
    blocks, results = block_mask(mask, None, None, 600, 600, device="cuda"), []
    for keys, values in ((k, v), planted):
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        options = {"mask": mask, "block_mask": blocks, "mechanism": mechanism, "deterministic": True, "return_lse": True}
        out, lse = attention(*leaves, **options)
        results.append((out, lse.transpose(1, 2), torch.autograd.grad(out, leaves, dout)[0]))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x[:, rows], y[:, rows])


def test_lists_are_made_once_and_serve_other_streams_and_graphs(mechanism, monkeypatch):
    q, k, v = make_qkv(1, 700, 700, 2, 2, 64, 64, BF16, "cuda")
    mask = masks.document(documents(1, "cuda")[0])
    blocks = block_mask(mask, None, None, 700, 700, device="cuda")
    options = {"mask": mask, "mechanism": mechanism}
    want = attention(q, k, v, block_mask=blocks, **options)
    monkeypatch.setattr(BlockMask, "_enlisted", lambda *_: pytest.fail("made again"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(attention(q, k, v, block_mask=blocks, **options), want)
    torch.cuda.current_stream().wait_stream(side)
    monkeypatch.undo()
    fresh, graph = blocks.to("cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, block_mask=fresh, **options)
        again = attention(q, k, v, block_mask=blocks, **options)
    for x in (out, again):
        x.zero_()
    graph.replay()
    assert torch.equal(out, want)
    assert torch.equal(again, want)
    assert torch.equal(attention(q, k, v, block_mask=fresh, **options), want)


def test_data_that_changes_is_no_other_kernel(mechanism, monkeypatch):
    q, k, v = make_qkv(1, 700, 700, 2, 2, 64, 64, BF16, "cuda")

    def run(ids):
        mask = masks.document(ids)
        blocks = block_mask(mask, None, None, 700, 700, device="cuda")
        got = attention(q, k, v, mask=mask, block_mask=blocks, mechanism=mechanism)
        torch.testing.assert_close(got, attention(q, k, v, mask=mask, mechanism=mechanism), atol=2e-2, rtol=2e-2)

    run(documents(1, "cuda")[0])
    monkeypatch.setattr(launch, "compiled", lambda *_: pytest.fail("compiled again"))
    run(documents(1, "cuda", seed=5)[0])


def test_flex_attentions(mechanism):
    """Its block masks, of other sizes of blocks too, with their own functions."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = make_qkv(2, 500, 500, 4, 2, 64, 64, BF16, "cuda")
    ids = documents(2, "cuda")
    for mask, sizes, side in ((masks.causal, (None, None), 128), (masks.document(ids), (2, 4), 64)):
        flex = create_block_mask(mask, *sizes, 500, 500, device="cuda", BLOCK_SIZE=side)
        want = attention(q, k, v, mask=mask, mechanism=mechanism)
        graph, first = torch.cuda.CUDAGraph(), attention(q, k, v, block_mask=flex, mechanism=mechanism)
        torch.testing.assert_close(first, want, atol=2e-2, rtol=2e-2)
        fresh = create_block_mask(mask, *sizes, 500, 500, device="cuda", BLOCK_SIZE=side)
        with torch.cuda.graph(graph):
            out = attention(q, k, v, block_mask=fresh, mechanism=mechanism)
        assert torch.equal(attention(q, k, v, block_mask=fresh, mechanism=mechanism), first)  # before any replay
        graph.replay()
        assert torch.equal(out, first)
