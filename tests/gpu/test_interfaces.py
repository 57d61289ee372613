"""flash-attn's functions and torch's scaled_dot_product_attention on the kernels, beside float64."""

import pytest
import torch
from torch.nn import functional

from cute_attn import flash_attn, sdpa
from tests import interfaces
from tests.interfaces import CALLS, EACH, FORMS

BF16 = torch.bfloat16
TORCHS = functional.scaled_dot_product_attention


@pytest.fixture
def torchs_calls(monkeypatch):
    """The calls that are handed to torch."""
    calls = []
    monkeypatch.setattr(sdpa, "_torchs", lambda *arguments, **options: calls.append(arguments) or TORCHS(*arguments, **options))
    return calls


@pytest.mark.parametrize(("form", "option"), EACH)
def test_dense(form, option):
    interfaces.check_dense(form, option, dtype=BF16, device="cuda", dims=(64, 64), sizes=(300, 400))


@pytest.mark.parametrize(("form", "option"), EACH)
def test_varlen(form, option):
    interfaces.check_varlen(form, option, dtype=BF16, device="cuda", dims=(128, 128))


@pytest.mark.parametrize("form", FORMS)
def test_head_dims_that_are_no_multiple_of_8(form):
    interfaces.check_dense(form, "causal", dtype=BF16, device="cuda", dims=(60, 36))
    interfaces.check_varlen(form, "left", dtype=BF16, device="cuda", dims=(60, 36))


def test_rows_in_use():
    interfaces.check_varlen("", "causal", dtype=BF16, device="cuda", dims=(64, 64), seqused=True)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("where", ["pages", "elements"])
def test_new_rows_of_a_cache(where, interleaved):
    interfaces.check_cache(where, interleaved, dtype=BF16, device="cuda", dims=(64, 64))


def test_nothing_is_read_back():
    """No function waits for the device but unpad_input, which says so."""
    qkv = torch.randn(20, 3, 4, 64, dtype=BF16, device="cuda", requires_grad=True)
    lengths, longest = interfaces.bounds((5, 15), "cuda"), torch.tensor(15, device="cuda")
    flash_attn.flash_attn_varlen_qkvpacked_func(qkv, lengths, longest, causal=True).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, lengths, longest, causal=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("form", FORMS[1:])
def test_gradients_of_packed_tensors_are_written_in_place(form, d, monkeypatch):
    """They have the bits that they have apart, and nothing stacks them."""
    qkv = torch.randn(2, 300, 3, 4, d, dtype=BF16, device="cuda")
    apart = [x.clone().requires_grad_() for x in qkv.unbind(2)]
    leaves = [x.clone().requires_grad_() for x in interfaces.packed_as(form, *qkv.unbind(2))]
    dout, options = torch.randn_like(apart[0]), {"causal": True, "deterministic": True}
    expected = torch.autograd.grad(flash_attn.flash_attn_func(*apart, **options), apart, dout)
    out = getattr(flash_attn, f"flash_attn_{form}func")(*leaves, **options)
    monkeypatch.delattr(torch, "stack")
    for got, wanted in zip(interfaces.unpacked(*torch.autograd.grad(out, leaves, dout), dims=4), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", CALLS)
def test_sdpa(name, torchs_calls):
    interfaces.check_sdpa(name, dtype=BF16, device="cuda")
    assert not torchs_calls


def test_sdpa_of_what_goes_to_torch(torchs_calls):
    q, k, v = (torch.randn(2, 4, 20, 64, dtype=BF16, device="cuda") for _ in range(3))
    strided = torch.randn(2, 4, 64, 20, dtype=BF16, device="cuda").mT
    for tensors in ((q, strided, v), (q.float(), k.float(), v.float())):
        assert sdpa.why_not(*tensors) is not None
        assert torch.equal(sdpa.scaled_dot_product_attention(*tensors), TORCHS(*tensors))
    assert len(torchs_calls) == 2


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_sdpa(kind, torchs_calls):
    """Beside float32, with the gradient of one that is added."""
    mask = torch.randn(2, 1, 130, 140, device="cuda")
    mask = mask > -1.0 if kind == "bool" else mask.to(BF16)
    results = []
    for call, dtype in ((sdpa.scaled_dot_product_attention, BF16), (TORCHS, torch.float32)):
        generator = torch.Generator("cuda").manual_seed(0)
        leaves = [torch.randn(2, 4, n, 64, device="cuda", generator=generator).to(BF16).to(dtype) for n in (130, 140, 140)]
        leaves += [] if kind == "bool" else [mask.to(dtype)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = call(*leaves[:3], attn_mask=mask if kind == "bool" else leaves[3])
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert not torchs_calls
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.float(), want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)


def test_a_model_in_a_block(torchs_calls):
    """Under autocast, which makes bfloat16 of what comes; and as a graph."""
    layer = torch.nn.MultiheadAttention(256, 4, batch_first=True, device="cuda")
    x = torch.randn(2, 40, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", BF16):
        expected = layer(x, x, x, need_weights=False)[0]
        with sdpa.replaced():
            out = layer(x, x, x, need_weights=False)[0]
            compiled = torch.compile(layer)(x, x, x, need_weights=False)[0]
    assert not torchs_calls
    out.float().sum().backward()
    assert x.grad.isfinite().all()
    for got in (out, compiled):
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["causal", "more keys", "more queries", "grouped", "5 dimensions"])
def test_sdpa_compiled(name, torchs_calls):
    torch._dynamo.reset()
    interfaces.check_sdpa(name, torch.compile(sdpa.scaled_dot_product_attention, fullgraph=True), dtype=BF16, device="cuda")
    assert not torchs_calls
