"""Gradients of captured tensors and of biases, and dropout, in the kernels, on both mechanisms."""

import itertools
import math

import pytest
import torch

from cute_attn import attention, attention_varlen, block_mask, dropout, functions, masks
from tests.captured import CASES, check, made, seeded
from tests.functions import documents
from tests.support import assert_captured_gradients_close, assert_close, assert_gradients_close, make_gradients, make_qkv

BF16 = torch.bfloat16


def kernels(*names: str):
    """``case-d-mechanism`` of those that are compiled: each is run in one test, in every way."""
    made = [(case, int(d), how) for case, d, how in (name.split("-") for name in names)]
    return pytest.mark.parametrize(("case", "d", "mechanism"), made, indirect=["mechanism"])


@kernels(
    *(f"{case}-64-tma_wgmma" for case in CASES),
    *(f"{case}-{d}-tma_wgmma" for case in ("bias", "gated") for d in (128, 256)),
    *("bias-64-cp_async", "gated-64-cp_async", "keys-128-cp_async", "gated-256-cp_async", "relative-256-tma_wgmma"),
)
def test_captured_gradients(case, d, mechanism):
    for kind in ("gaussian", "peaky"):
        check(case, (2, 334, 422), (4, 2), (d, d), BF16, "cuda", kind, backend="cute", mechanism=mechanism)


@kernels("gated-64-tma_wgmma", "gated-64-cp_async")
def test_other_lengths(case, d, mechanism):
    for sizes in ((1, 1, 1), (1, 3, 650), (1, 600, 5), (1, 256, 256), (3, 699, 698)):
        check(case, sizes, (2, 1), (d, d), BF16, "cuda", backend="cute", mechanism=mechanism)


@kernels("bias-64-tma_wgmma", "bias-40-cp_async", "bias-104-tma_wgmma")
def test_a_bias_of_each_score(case, d, mechanism):
    """Stored, in 16 bits: of odd lengths, of even ones, and where there is one row or key."""
    for sizes in ((1, 300, 301), (1, 130, 300), (1, 1, 1), (3, 1, 4), (1, 37, 68)):
        check(case, sizes, (2, 2), (d, 72), torch.float16, "cuda", of=torch.float16, backend="cute", mechanism=mechanism)


@kernels(
    *("gated-64-tma_wgmma", "pair-128-tma_wgmma", "gated-256-tma_wgmma", "keys-64-tma_wgmma"),
    *("keys-256-tma_wgmma", "gated-64-cp_async", "heads-128-cp_async"),
)
def test_dropout(case, d, mechanism):
    """With windows, softcaps, slopes and captured gradients."""
    for kind in ("gaussian", "peaky"):
        check(case, (2, 333, 421), (4, 2), (d, d), BF16, "cuda", kind, p=0.2, backend="cute", mechanism=mechanism)


@kernels("causal-64-tma_wgmma", "causal-128-tma_wgmma", "causal-256-tma_wgmma", "causal-64-cp_async")
def test_dropout_beside_a_ramp(case, d, mechanism):
    """Which is added to scores then, and not to exponents."""
    q, k, v = make_qkv(1, 300, 421, 4, 2, d, d, BF16, "cuda")
    dout, slopes, results = torch.randn_like(q), torch.rand(4, device="cuda"), []
    for how in ({"backend": "cute", "mechanism": mechanism}, {"backend": "reference"}):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with seeded(3, q.device):
            out = attention(*leaves, alibi_slopes=slopes, dropout_p=0.3, causal=True, **how)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)


@kernels(
    *("full-64-tma_wgmma", "window-64-tma_wgmma", "full-64-cp_async", "window-64-cp_async"),
    *("causal-128-tma_wgmma", "window-128-cp_async", "window-256-tma_wgmma"),
)
def test_what_dropout_keeps(case, d, mechanism):
    """Bit for bit what the reference keeps: all keys weigh the same, and each has a value of its own place."""
    rules = {"full": {}, "causal": {"causal": True}, "window": {"window": (77, 9)}}[case]
    n, heads = 384, 3
    q, k = (torch.zeros(2, n, heads, d, dtype=BF16, device="cuda") for _ in range(2))
    for first in range(0, n, d):
        v = torch.zeros(2, n, heads, d, dtype=BF16, device="cuda")
        here = min(d, n - first)
        v[:, torch.arange(first, first + here), :, torch.arange(here)] = 1.0
        with seeded(5, q.device) as weight:
            out = attention(q, k, v, dropout_p=0.3, backend="cute", mechanism=mechanism, **rules)
        row, key = torch.arange(n, device="cuda")[:, None], torch.arange(n, device="cuda")
        left, right = rules.get("window", (n, 0 if "causal" in rules else n))
        seen = (key >= row - left) & (key <= row + right)
        batch, head = (torch.arange(x, device="cuda") for x in (2, heads))
        kept = weight(0.3)(batch[:, None, None, None], head[:, None, None], row, key) > 0
        want = (kept & seen)[..., first : first + here].permute(0, 2, 1, 3)
        assert torch.equal(out[..., :here] > 0, want)


@kernels("shared-64-tma_wgmma", "shared-64-cp_async")
def test_a_bias_that_many_share(case, d, mechanism, monkeypatch):
    """More than have copies of the gradient."""
    monkeypatch.setattr(functions, "COPIES_BYTES", 0)
    check(case, (9, 130, 140), (2, 1), (d, d), BF16, "cuda", of=BF16, backend="cute", mechanism=mechanism)


@kernels(
    *("264 264 0-64-tma_wgmma", "264 268 4-64-tma_wgmma", "264 266 0-64-tma_wgmma", "264 264 1-64-tma_wgmma"),
    *("262 262 0-64-tma_wgmma", "261 264 3-128-tma_wgmma", "264 264 0-256-tma_wgmma", "264 264 0-64-cp_async"),
)
def test_addresses_of_a_bias(case, d, mechanism):
    """So many keys, elements from a row to the next one, and before the first: what is loaded and stored at once."""
    keys, row, first = map(int, case.split())
    q, k, v = make_qkv(2, 150, keys, 4, 2, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    base = torch.randn(2 * 4 * 150 * row + first, device="cuda", dtype=BF16)
    used = torch.tensor([keys, 190], dtype=torch.int32, device="cuda")  # 190 is no multiple of 4
    for rules in ({}, {"causal": True}, {"seqused_k": used})[: 1 if mechanism == "cp_async" else 3]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, base)]

        def places(x):
            return x[first:].view(2, 4, 150, row)[..., :keys]

        out = attention(*leaves[:3], bias=places(leaves[3]), backend="cute", mechanism=mechanism, **rules)
        found = torch.autograd.grad(out, leaves, dout)
        for b, n in enumerate(used.tolist() if "seqused_k" in rules else [keys] * 2):
            alone, bias = [q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n]], places(base)[b : b + 1, ..., :n]
            of_it, causal = dout[b : b + 1], {"causal": True} if "causal" in rules else {}

            def added(bias):
                return {"score": lambda s, _, head, q_idx, kv_idx: s + bias[0, head, q_idx, kv_idx]}

            asked = {**causal, **added(bias.double())}
            assert_close(out[b : b + 1].detach(), *alone, **asked)
            of_b = [x[b : b + 1, : y.shape[1]] for x, y in zip(found[:3], alone, strict=True)]
            assert_gradients_close(of_b, *alone, of_it, **asked)
            by_bias = places(found[3])[b : b + 1, ..., :n]
            assert_captured_gradients_close([by_bias], [bias], added, *alone, of_it, **causal)
        elsewhere = found[3].clone()
        places(elsewhere).zero_()
        assert not elsewhere.count_nonzero()


LENGTHS = [(0, 0), (64, 64), (0, 70), (130, 200), (1, 1), (300, 129), (65, 0), (257, 512), (3, 600)]


@kernels("causal-64-tma_wgmma", "causal-256-tma_wgmma", "causal-64-cp_async")
def test_each_sequence_as_in_the_reference(case, d, mechanism):
    """Packed, with a bias of each sequence's own and its gradient."""
    batch, heads = len(LENGTHS), 4
    sq, sk = (sum(side) for side in zip(*LENGTHS, strict=True))
    q, k, v = (x[0] for x in make_qkv(1, sq, sk, heads, 2, d, d, BF16, "cuda"))
    bias = torch.randn(batch, heads, 300, 600, device="cuda")
    dout = torch.randn_like(q)
    bounds = [
        torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32, device="cuda") for side in zip(*LENGTHS, strict=True)
    ]
    results = []
    for how in ({"backend": "cute", "mechanism": mechanism}, {"backend": "reference"}):
        leaves = [x.detach().to(BF16 if x is not bias else x.dtype).requires_grad_() for x in (q, k, v, bias)]
        with seeded(3, q.device):
            out = attention_varlen(*leaves[:3], *bounds, bias=leaves[3], dropout_p=0.3, causal=True, **how)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)


@kernels("none-64-tma_wgmma", "k-256-tma_wgmma", "v-64-cp_async")
def test_captured_gradients_alone(case, d, mechanism):
    """And with some others."""
    needs = case.replace("none", "")
    q, k, v = make_qkv(1, 300, 300, 4, 2, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    results = []
    for names in ("qkv", needs):
        leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in zip("qkv", (q, k, v), strict=True)}
        tensors = [x.requires_grad_() for x in made("gated", (1, 4, 300, 300), q.device)]
        out = attention(*leaves.values(), **CASES["gated"].asked(*tensors), backend="cute", mechanism=mechanism)
        wanted = {name: leaves[name] for name in names} | dict(enumerate(tensors))
        results.append(dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), dout), strict=True)))
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][name], atol=1e-3, rtol=1e-2)


@kernels("transposed-64-tma_wgmma", "expanded-64-tma_wgmma", "heads last-64-cp_async")
def test_strides_of_a_bias(case, d, mechanism):
    q, k, v = make_qkv(2, 200, 200, 4, 4, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    base = torch.randn(4, 200, 200, device="cuda", dtype=BF16)
    results = []
    for how in ("cute", "reference"):
        leaf = base.clone().requires_grad_()
        bias = {"transposed": leaf.mT, "expanded": leaf[None].expand(2, -1, -1, -1), "heads last": leaf.permute(1, 2, 0)}[case]
        bias = bias.permute(2, 0, 1) if case == "heads last" else bias
        out = attention(q, k, v, bias=bias, backend=how, mechanism=mechanism if how == "cute" else None)
        results.append((out, *torch.autograd.grad(out, leaf, dout)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)


@kernels("1-64-tma_wgmma", "2-64-tma_wgmma")
def test_a_bias_of_its_own_for_each_score_has_the_same_bits(case, d, mechanism):
    """And one that two elements of the batch share."""
    q, k, v = make_qkv(int(case), 500, 500, 4, 2, 64, 64, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    bias = torch.randn(1, 4, 500, 500, device="cuda", requires_grad=True)
    results = []
    for _ in range(10):
        out = attention(q, k, v, bias=bias, mechanism=mechanism, deterministic=True, causal=True)
        results.append(torch.autograd.grad(out, bias, dout)[0])
    assert all(torch.equal(results[0], x) for x in results[1:])
    assert not results[0][..., torch.ones(500, 500, dtype=torch.bool, device="cuda").triu(1)].count_nonzero()


@kernels("keys-64-tma_wgmma", "rows-64-tma_wgmma")
def test_biases_that_hide_keys(case, d, mechanism):
    """−∞; a row of these sees nothing, and has zeros."""
    q, k, v = make_qkv(1, 200, 200, 2, 2, d, d, BF16, "cuda")
    of_rows = case == "rows"
    bias = torch.zeros(200, 200, device="cuda", dtype=BF16)
    bias[70:90, 20 if not of_rows else slice(None)] = -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    out, lse = attention(q, k, v, bias=bias, mechanism=mechanism, return_lse=True)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    want = attention(q, k, v, mask=lambda batch, head, q_idx, kv_idx: bias.detach()[q_idx, kv_idx] == 0, mechanism=mechanism)
    torch.testing.assert_close(out, want)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[3][bias.isinf()].count_nonzero()
    assert (lse == -math.inf).any() == of_rows


@kernels("full-64-tma_wgmma")
def test_seeds_come_from_torchs_generator(case, d, mechanism):
    """So the same one makes the same output, also of a CUDA graph's replays and of what a checkpoint computes anew."""
    q, k, v = make_qkv(1, 200, 200, 2, 2, 64, 64, BF16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(*inputs):
        return attention(*inputs, dropout_p=0.5, mechanism=mechanism)

    torch.manual_seed(1)
    first, second = run(q, k, v), run(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(run(q, k, v), first)
    assert not torch.equal(first, second)

    torch.manual_seed(1)
    again = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    assert torch.equal(again, first)
    for x, y in zip(*(torch.autograd.grad(out.float().square().sum(), leaves) for out in (again, first)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run(q, k, v)
    torch.manual_seed(1)
    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append(captured.clone())
    assert not torch.equal(*replayed)
    torch.manual_seed(1)
    graph.replay()
    assert torch.equal(captured, replayed[0])


def test_the_rate_of_dropout():
    """Within 4 σ, of 16 million."""
    q, k = (torch.zeros(1, 4096, 1, 64, dtype=BF16, device="cuda") for _ in range(2))
    v = torch.ones(1, 4096, 1, 64, dtype=BF16, device="cuda")
    for p in (0.1, 0.5):
        kept = attention(q, k, v, dropout_p=p)[..., 0].double().mean() * (1 - p)
        assert abs(kept - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 4096**2) + 1e-4
        seed = dropout.draw_seed(q)
        places = [torch.arange(n, device="cuda").view(shape) for n, shape in ((4096, (-1, 1)), (4096, (-1,)))]
        rate = dropout.kept(seed, p, *(torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2)), *places)
        assert abs(rate.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / 4096**2)


@kernels("document-64-tma_wgmma", "document-256-tma_wgmma", "document-64-cp_async")
def test_beside_a_block_mask(case, d, mechanism):
    """The same is dropped, and the same gradients are stored, whichever tiles are visited."""
    q, k, v = make_qkv(1, 400, 400, 4, 2, d, d, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    mask = masks.document(documents(1, "cuda")[0][:400])
    bias, results = torch.randn(1, 4, 400, 400, device="cuda", dtype=BF16), []
    for blocks in (None, block_mask(mask, 1, 4, 400, 400, device="cuda")):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, bias)]
        with seeded(3, q.device):
            how = {"mask": mask, "block_mask": blocks, "dropout_p": 0.3, "mechanism": mechanism}
            out = attention(*leaves[:3], bias=leaves[3], **how)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-2 * want.abs().max().item(), rtol=1e-2)
