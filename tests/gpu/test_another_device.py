"""Everything public with tensors on a device that isn't the current one: it runs there, gives what is right, and leaves the
current device as it was. Needs two GPUs."""

from __future__ import annotations

import pytest
import torch

from cute_attn import attention, attention_kvcache, attention_varlen, flash_attn, sdpa, serve
from cute_attn.workspace import Workspaces
from tests import caches, captured, functions
from tests.support import assert_close, assert_gradients_close, make_gradients, make_qkv

BF16 = torch.bfloat16
OTHER = "cuda:1"

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def the_first_is_current():
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


def inputs(seqlen=300, heads=(4, 2), d=128):
    q, k, v = make_qkv(1, seqlen, seqlen, *heads, d, d, BF16, OTHER)
    return q, k, v, make_gradients(q, v)[0]


def check_both_passes(function, q, k, v, dout):
    """Causal, of ``(batch, seqlen, heads, head_dim)``."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout)
    q, k, v = (x.detach() for x in leaves)
    assert all(x.device == q.device for x in (out, lse, *gradients))
    assert_close((out.detach(), lse.detach()), q, k, v, causal=True)
    assert_gradients_close(gradients, q, k, v, dout, causal=True)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_attention(d, deterministic, mechanism):
    asked = {"causal": True, "return_lse": True, "mechanism": mechanism, "deterministic": deterministic}
    check_both_passes(lambda *x: attention(*x, **asked), *inputs(d=d))


def test_key_heads_shared_by_a_cluster(mechanism):
    check_both_passes(lambda *x: attention(*x, causal=True, return_lse=True, mechanism=mechanism), *inputs(1000, (8, 2)))


def test_attention_varlen(mechanism):
    """Two sequences of the same rows each as the dense one has them."""
    q, k, v, dout = inputs()
    bounds = torch.tensor([0, 300, 600], dtype=torch.int32, device=OTHER)

    def packed(*qkv):
        twice = (torch.cat([x[0], x[0]]) for x in qkv)
        out, lse = attention_varlen(*twice, bounds, causal=True, return_lse=True, mechanism=mechanism)
        return out[None, 300:], lse[None, :, 300:]

    check_both_passes(packed, q, k, v, dout)


def test_lengths_in_use(mechanism):
    q, k, v, dout = inputs(290)
    pad = torch.nn.functional.pad
    used = torch.tensor([290], dtype=torch.int32, device=OTHER)

    def padded(*qkv):
        longer = (pad(x, (0, 0, 0, 0, 0, 38)) for x in qkv)
        asked = {"causal": True, "return_lse": True, "mechanism": mechanism, "seqused_q": used, "seqused_k": used}
        out, lse = attention(*longer, **asked)
        return out[:, :290], lse[:, :, :290]

    check_both_passes(padded, q, k, v, dout)


@pytest.mark.parametrize("compiled", [False, True])
def test_interfaces(compiled):
    """Of flash-attn and of torch, eager and in a compiled graph."""
    q, k, v, dout = inputs()

    def of_flash_attn(*qkv):
        out, lse, _ = flash_attn.flash_attn_func(*qkv, causal=True, return_attn_probs=True)
        return out, lse

    check_both_passes(torch.compile(of_flash_attn) if compiled else of_flash_attn, q, k, v, dout)
    heads_first = [x.detach().transpose(1, 2) for x in (q, k, v)]
    out = sdpa.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    assert torch.equal(out.transpose(1, 2), attention(q.detach(), k.detach(), v.detach(), causal=True))


@pytest.mark.parametrize("queries", [1, 5, 300])
@pytest.mark.parametrize("where", ["contiguous", "paged"])
def test_attention_kvcache(where, queries):
    one = caches.Case([300, 1300, 700], [queries] * 3, (8, 2), (128, 128), BF16, OTHER)
    places = one.paged(32) if where == "paged" else one.contiguous(1400)
    one.check(one.attend(places, causal=True), False, causal=True)


def test_pages_with_new_keys():
    caches.check_pages(BF16, OTHER, 16, 64)


@pytest.mark.parametrize("case", ["document", "heads"])
def test_block_masks(case, mechanism):
    sizes = (2, 333, 421), (4, 2), (64, 64)
    functions.check(case, *sizes, BF16, OTHER, blocks=True, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_captured_gradients_and_dropout(p, mechanism):
    captured.check("gated", (2, 334, 422), (4, 2), (64, 64), BF16, OTHER, p=p, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("current", [0, 1])
def test_a_graph_captured_there(current, monkeypatch):
    """The workspace of a captured call is its device's, and the graph's own, whichever device is current then."""
    workspaces = Workspaces(torch.float32)
    monkeypatch.setattr(serve, "_workspaces", workspaces)
    q, k, v, _ = inputs()
    bounds = torch.tensor([0, 300], dtype=torch.int32, device=OTHER)
    used = torch.tensor([300], dtype=torch.int32, device=OTHER)

    def both():
        packed = attention_varlen(q[0], k[0], v[0], bounds, causal=True)
        return packed, attention_kvcache(q[:, -1:], k, v, lengths=used, causal=True)

    with torch.cuda.device(1):
        wanted = [x.clone() for x in both()]
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            both()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph), torch.cuda.device(current):
            found = both()
    assert {device for device, *_ in workspaces.recorded} == {1}
    for x in found:
        x.fill_(torch.nan)
    with torch.cuda.device(1):
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
