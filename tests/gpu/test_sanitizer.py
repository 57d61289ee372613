"""Small shapes of every kind of kernel, for compute-sanitizer (CONTRIBUTING.md has the commands); right without it too."""

import math

import pytest
import torch

from cute_attn import attention, attention_varlen, block_mask, launch
from tests import captured
from tests.caches import Case
from tests.support import assert_close, assert_gradients_close, make_gradients, make_qkv

# At a pipeline's barriers one lane arrives for its warp. racecheck counts an arrival for that lane's reads and writes only: it
# follows no warp barrier (nothing is left of it in the machine code), nor a block's in between. So that it sees the order that
# the kernels rely on, here every lane arrives; nothing else is different.
pytestmark = pytest.mark.usefixtures("every_lane_arrives")


def on_gpu(*tensors):
    """Copies. What is expected is computed on the CPU: the sanitizer's time goes to the kernels under test alone."""
    return tuple(x.cuda() for x in tensors)


@pytest.mark.parametrize(
    ("sq", "sk", "d", "rules"),
    [
        (130, 200, 64, {}),
        (130, 300, 64, {"causal": True}),
        (200, 130, 128, {"causal": True}),
        (70, 300, 96, {"window": (50, 20), "softcap": 10.0}),
        (129, 161, 256, {}),
        (5000, 100, 256, {"causal": True}),
    ],
    ids=["d64", "d64-causal", "d128-causal", "d96-window-softcap", "d256", "d256-many-tiles"],
)
def test_small(sq, sk, d, rules, mechanism):
    q, k, v = make_qkv(1, sq, sk, 8, 4, d, d, torch.bfloat16)
    result = attention(*on_gpu(q, k, v), backend="cute", mechanism=mechanism, return_lse=True, **rules)
    assert_close(tuple(x.cpu() for x in result), q, k, v, **rules)


@pytest.mark.parametrize(
    ("sq", "sk", "d", "dv", "rules"),
    [
        (130, 200, 64, 64, {}),
        (130, 300, 64, 64, {"causal": True}),
        (200, 130, 128, 128, {"causal": True}),
        (70, 300, 96, 40, {"window": (50, 20), "softcap": 10.0}),
        (129, 161, 256, 256, {}),
        (200, 300, 192, 128, {"causal": True}),
        (70, 4300, 128, 128, {}),
        (70, 2200, 256, 256, {"causal": True}),
        (2200, 70, 256, 256, {"causal": True}),
    ],
    ids=[
        *("d64", "d64-causal", "d128-causal", "d96-dv40-window-softcap", "d256", "d192-dv128"),
        *("d128-many-key-tiles", "d256-many-key-tiles", "d256-many-query-tiles"),  # more blocks than an H200 holds at once
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_small_backward(sq, sk, d, dv, rules, deterministic, mechanism):
    q, k, v = make_qkv(1, sq, sk, 8, 4, d, dv, torch.bfloat16)
    dout, dlse = make_gradients(q, v)
    leaves = [x.requires_grad_() for x in on_gpu(q, k, v)]
    options = {"backend": "cute", "mechanism": mechanism, "deterministic": deterministic, "return_lse": True}
    result = torch.autograd.grad(attention(*leaves, **options, **rules), leaves, on_gpu(dout, dlse))
    assert_gradients_close([x.cpu() for x in result], q, k, v, dout, dlse, **rules)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rules", [{}, {"causal": True}], ids=str)
def test_higher_query_tiles(rules, deterministic, monkeypatch):
    """Several key tiles a block, so that results leave while the next tile's operands come."""
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: max(choices))
    q, k, v = make_qkv(1, 200, 4400, 4, 4, 128, 128, torch.bfloat16)
    dout, dlse = make_gradients(q, v)
    leaves = [x.requires_grad_() for x in on_gpu(q, k, v)]
    options = {"backend": "cute", "mechanism": "tma_wgmma", "deterministic": deterministic, "return_lse": True}
    gradients = torch.autograd.grad(attention(*leaves, **options, **rules), leaves, on_gpu(dout, dlse))
    assert_gradients_close([x.cpu() for x in gradients], q, k, v, dout, dlse, **rules)


@pytest.mark.parametrize("rules", [{}, {"causal": True}], ids=str)
def test_one_kernel_of_wide_heads(rules, in_one_kernel):
    """Several key tiles a block, whose results leave from registers while the next tile's operands come."""
    q, k, v = make_qkv(1, 200, 4400, 4, 4, 192, 128, torch.bfloat16)
    dout, dlse = make_gradients(q, v)
    leaves = [x.requires_grad_() for x in on_gpu(q, k, v)]
    out = attention(*leaves, backend="cute", mechanism="tma_wgmma", return_lse=True, **rules)
    gradients = torch.autograd.grad(out, leaves, on_gpu(dout, dlse))
    assert_gradients_close([x.cpu() for x in gradients], q, k, v, dout, dlse, **rules)


@pytest.mark.parametrize("d", [128, 192])
@pytest.mark.parametrize("used", [[0, 190, 1, 400], [2**30, -7, 90, 80]], ids=["in-use", "wrong"])
def test_other_query_tiles_of_different_lengths(used, d, in_one_kernel, monkeypatch):
    """And zeros for what isn't in use, a part after each query tile; wrong lengths give wrong results and no wrong access."""
    monkeypatch.setattr(launch, "rows_of_query_tile", lambda choices, *_: max(choices))
    q, k, v = make_qkv(4, 400, 400, 12, 12, d, 128, torch.bfloat16)
    dout = torch.ones(4, 400, 12, 128, dtype=torch.bfloat16)
    leaves, seqused = [x.requires_grad_() for x in on_gpu(q, k, v)], torch.tensor(used, dtype=torch.int32, device="cuda")
    out = attention(*leaves, seqused_q=seqused, seqused_k=seqused, backend="cute", mechanism="tma_wgmma")
    gradients = [x.cpu() for x in torch.autograd.grad(out, leaves, dout.cuda())]
    for b, n in enumerate(used):
        if used[0] == 0 and n:
            parts = [x[b : b + 1, :n] for x in gradients]
            assert_gradients_close(parts, *(x[b : b + 1, :n] for x in (q, k, v, dout)))
            assert not any(x[b, n:].count_nonzero() for x in gradients)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_careful_copies(d, mechanism):
    """What is not finite where some rows don't look, in both passes. (Not for racecheck: a warp's lanes write a stage, and one
    of them arrives for all at a barrier that otherwise only TMA completes.)"""
    q, k, v = on_gpu(*make_qkv(1, 130, 300, 2, 1, d, d, torch.bfloat16))
    dout = torch.ones(1, 130, 2, d, dtype=torch.bfloat16, device="cuda")
    results = []
    for value in (0.0, math.nan):
        v[:, 200:] = value  # row 29 is the last that sees none of it
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, backend="cute", mechanism=mechanism, causal=True, deterministic=True)
        results.append((out.detach(), torch.autograd.grad(out, leaves, dout)[0]))
    for clean, planted in zip(*results, strict=True):
        assert torch.equal(planted[:, :30], clean[:, :30])
        assert planted[:, 30:].isnan().all()


@pytest.mark.parametrize(("d", "rules"), [(64, {"causal": True}), (128, {}), (256, {"causal": True})])
@pytest.mark.parametrize("bounds", [[0, 130, 130, 133, 300], [0, 400, 20, -7, 2**30]], ids=["ragged", "wrong-bounds"])
def test_sequences_of_different_lengths(bounds, d, rules, mechanism):
    """Both passes; wrong lengths give wrong results and no wrong access."""
    q, k, v = (x[0] for x in make_qkv(1, 310, 310, 4, 2, d, d, torch.bfloat16))
    dout = torch.ones(310, 4, d, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in on_gpu(q, k, v)]
    cu = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out = attention_varlen(*leaves, cu, backend="cute", mechanism=mechanism, deterministic=True, **rules)
    gradients = torch.autograd.grad(out, leaves, dout.cuda())
    if bounds[-1] == 300:
        for begin, end in ((0, 130), (133, 300)):
            alone = [x[None, begin:end] for x in (q, k, v)]
            assert_close(out[None, begin:end].cpu(), *alone, **rules)
            parts = [x[None, begin:end].cpu() for x in gradients]
            assert_gradients_close(parts, *alone, dout[None, begin:end], **rules)


@pytest.mark.parametrize(
    ("heads", "queries", "d"), [((8, 2), 1, 128), ((8, 2), 5, 64), ((16, 1), 3, 128), ((4, 1), 3, 256)], ids=str
)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_cache(heads, queries, d, invariant, wrong):
    """Walks that are whole and in parts, new keys; wrong lengths and pages give wrong results and no wrong access."""
    lengths = [1000, 5, 77, 64, 6]
    case = Case(lengths, [queries] * 5, heads, (d, d), torch.bfloat16, "cuda")
    where = case.paged(16)
    where["lengths"] -= queries if not wrong else -(2**20)
    new = {f"{name}_new": torch.stack([x[-queries:] for x in held]) for name, held in (("k", case.k), ("v", case.v))}
    if wrong:
        where["page_table"][0, 3:9] = torch.tensor([2**31 - 1, -(2**31), -5, 99, 100_000, 7], device="cuda")
    found = case.attend(where, causal=True, batch_invariant=invariant, **new)
    if not wrong:
        case.check(found, False, causal=True)


def in_blocks(batch, head, q_idx, kv_idx):
    """A mask that cuts tiles and leaves some out."""
    return (q_idx // 50 == kv_idx // 100) & (kv_idx % 7 != head)


@pytest.mark.parametrize("d", [64, 128])
def test_block_mask(d, mechanism):
    """Made by a kernel, and walked over by both passes."""
    q, k, v = make_qkv(1, 150, 300, 4, 2, d, d, torch.bfloat16)
    dout, dlse = make_gradients(q, v)
    blocks = block_mask(in_blocks, 1, 4, 150, 300, device="cuda")
    leaves, options = [x.requires_grad_() for x in on_gpu(q, k, v)], {"backend": "cute", "mechanism": mechanism}
    out, lse = attention(*leaves, mask=in_blocks, block_mask=blocks, return_lse=True, **options)
    gradients = torch.autograd.grad([out, lse], leaves, on_gpu(dout, dlse))
    assert_close((out.detach().cpu(), lse.detach().cpu()), q, k, v, mask=in_blocks)
    assert_gradients_close([x.cpu() for x in gradients], q, k, v, dout, dlse, mask=in_blocks)


@pytest.mark.parametrize(("case", "d", "of"), [("bias", 64, torch.bfloat16), ("gated", 128, torch.float32)])
@pytest.mark.parametrize("p", [0.0, 0.2], ids=["all", "dropout"])
def test_captured_gradients_and_dropout(case, d, of, p, mechanism):
    options = {"backend": "cute", "mechanism": mechanism, "expected_on": "cpu"}
    captured.check(case, (1, 130, 200), (4, 2), (d, d), torch.bfloat16, "cuda", of=of, p=p, **options)


@pytest.mark.parametrize("d", [64, 96, 128])
def test_blocks_that_share_a_key_tile(d, monkeypatch):
    monkeypatch.setattr(launch, "head_blocks", lambda *_: 2)
    q, k, v = make_qkv(1, 130, 200, 8, 2, d, d, torch.bfloat16)
    dout, dlse = make_gradients(q, v)
    leaves = [x.requires_grad_() for x in on_gpu(q, k, v)]
    result = attention(*leaves, causal=True, backend="cute", mechanism="tma_wgmma", return_lse=True)
    gradients = torch.autograd.grad(result, leaves, on_gpu(dout, dlse))
    assert_gradients_close([x.cpu() for x in gradients], q, k, v, dout, dlse, causal=True)
