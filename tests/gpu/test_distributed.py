"""Context parallelism on GPUs: two with NCCL, where there are two, and several ranks on one GPU with gloo carrying the tensors.

Each is held against one process by the tests' policy, so a wrong stream, a buffer reused too early or a wrong merge shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate, pairwise

import pytest
import torch

from cute_attn import launch, reference
from tests import support
from tests.host.processes import ROOT
from tests.ranks import Ranks, assert_gradients_of_a_model_close, both_passes, in_a_model, packed_passes

BF16 = torch.bfloat16
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")


@pytest.fixture(scope="module", params=[pytest.param(("nccl", 2), marks=TWO_GPUS), ("gloo", 3)], ids=["nccl", "gloo"])
def ranks(request, tmp_path_factory):
    backend, count = request.param
    started = Ranks(tmp_path_factory.mktemp("distributed") / "store", count, backend, "cuda")
    started.count = count
    yield started
    started.end()


def inputs(seqlen_q, seqlen_k=None, heads=(6, 2), batch=1, d=128, dv=None):
    q, k, v = support.make_qkv(batch, seqlen_q, seqlen_k or seqlen_q, *heads, d, dv or d, BF16, "cuda")
    return [q, k, v, *support.make_gradients(q, v)]


def moved(tensors, device="cuda"):
    return [x.to(device) for x in tensors]


CASES = {
    "causal": ({"seqlen_q": 3001}, {"causal": True}),
    "full": ({"seqlen_q": 2000, "d": 64}, {}),
    "batch, window": ({"seqlen_q": 1500, "batch": 2}, {"window": (700, 100)}),
    "contiguous window": ({"seqlen_q": 1500}, {"window": (200, 0), "order": "contiguous"}),
    "softcap": ({"seqlen_q": 1000, "d": 256}, {"causal": True, "softcap": 15.0}),
    "longer keys": ({"seqlen_q": 700, "seqlen_k": 1900, "d": 96, "dv": 40}, {"causal": True}),
    "MQA": ({"seqlen_q": 2048, "heads": (6, 1)}, {"causal": True, "deterministic": True}),
    "few queries": ({"seqlen_q": 200, "seqlen_k": 3000}, {"causal": True, "deterministic": True}),  # which travel
    "few queries, window": ({"seqlen_q": 130, "seqlen_k": 2000, "batch": 2}, {"window": (900, 100), "softcap": 15.0}),
    "few rows": ({"seqlen_q": 5}, {"causal": True}),
    "sinks": ({"seqlen_q": 1500}, {"window": (300, 0), "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, -torch.inf, 8.0])}),
}


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("case", CASES)
def test_as_one_process(case, method, ranks):
    sizes, options = CASES[case]
    tensors = inputs(**sizes)
    asked = moved(tensors, "cpu"), {"method": method, "backend": "cute", **options}
    out, lse, *gradients = found = moved(ranks.results(ranks.count, both_passes, *asked)[0])
    rules = {name: x for name, x in options.items() if name not in ("order", "deterministic")}
    rules |= {name: x.to("cuda") for name, x in rules.items() if name == "sinks"}
    support.assert_close((out, lse), *tensors[:3], **rules)
    support.assert_gradients_close(gradients, *tensors, **rules)
    if options.get("deterministic"):
        again = moved(ranks.results(ranks.count, both_passes, *asked)[0])
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize(("heads", "dv"), [(3, 128), (1, 64), (2, 40), (5, 256)])
@pytest.mark.parametrize("so_far", [BF16, torch.float32])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_the_kernel_that_merges_does_as_torch_does(dtype, so_far, heads, dv):
    """Rows of a longer tensor, some of which have seen nothing, on one side or on both."""
    so_far, rows = dtype if so_far == BF16 else so_far, slice(3, 80)
    made = torch.Generator("cuda").manual_seed(0)
    whole = torch.randn(2, 90, heads, dv, generator=made, device="cuda").to(so_far)
    more = torch.randn(2, 77, heads, dv, generator=made, device="cuda").to(dtype)
    lse, lse_more = (20 * torch.randn(2, heads, n, generator=made, device="cuda") for n in (90, 77))
    lse[:, :, 5:20], lse_more[:, :, 10:30] = -torch.inf, -torch.inf
    whole[:, 5:20], more[:, 10:30] = 0.0, 0.0
    before, before_lse = whole.clone(), lse.clone()
    true_lse = lse[:, :, rows].double()
    true = reference.merge(whole[:, rows].double(), true_lse, more, lse_more.double(), 0.37)
    plain_lse = lse[:, :, rows].clone()
    plain = reference.merge(whole[:, rows].clone(), plain_lse, more, lse_more, 0.37)
    merged = launch.merge(whole[:, rows], lse[:, :, rows], more, lse_more, 0.37)
    assert merged.dtype == torch.float32
    assert (merged.data_ptr() == whole[:, rows].data_ptr()) == (so_far == torch.float32)
    sees = true_lse != -torch.inf
    assert torch.equal(lse[:, :, rows] == -torch.inf, ~sees)
    assert not merged[~sees.transpose(1, 2)].count_nonzero()
    times, eps = support.TIMES_PLAIN[torch.float32], torch.finfo(torch.float32).eps
    pairs = (merged, plain, true), (lse[:, :, rows][sees], plain_lse[sees], true_lse[sees])
    for got, of_torch, want in pairs:
        error, allowed = ((x.double() - want).abs().max() for x in (got, of_torch))
        assert error <= times * allowed + eps * want.abs().max()
    outside = [*range(rows.start), *range(rows.stop, 90)]
    assert torch.equal(whole[:, outside], before[:, outside])
    assert torch.equal(lse[:, :, outside], before_lse[:, :, outside])


SIZES = (3, 0, 1300, 1, 200, 37, 1024)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "method": "ring"},
        {"method": "ring"},
        {"window": (700, 0), "method": "ring"},
        {"window": (90, 40), "softcap": 15.0, "method": "ring"},
        {"causal": True, "method": "ulysses"},
    ],
)
def test_packed_sequences_across_shards(options, ranks):
    q, k, v, dout, _ = inputs(sum(SIZES) + 100)
    packed, bounds = [x[0].cpu() for x in (q, k, v, dout)], list(accumulate(SIZES, initial=0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out, lse, *gradients = moved(ranks.results(ranks.count, packed_passes, packed, cu_seqlens, options)[0])
    rules = {name: x for name, x in options.items() if name != "method"}
    for begin, end in pairwise(bounds):
        one = [x[:, begin:end] for x in (q, k, v)]
        support.assert_close((out[None, begin:end], lse[None, :, begin:end]), *one, **rules)
        found = [x[None, begin:end] for x in gradients]
        support.assert_gradients_close(found, *one, dout[:, begin:end], **rules)
    for x in (out, *gradients):
        assert not x[bounds[-1] :].count_nonzero()


@TWO_GPUS
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_under_ddp_and_fsdp2(way, ranks):
    if ranks.count != 2:
        pytest.skip("shown with NCCL")
    x = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    for gradients in ranks.results(ranks.count, in_a_model, x, way):
        assert_gradients_of_a_model_close(gradients, x.cuda())


@TWO_GPUS
def test_the_example_learns_the_same_on_two_cards(tmp_path):
    losses = []
    for count in (1, 2):
        log = tmp_path / f"{count}.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        script = [str(ROOT / "examples" / "long_context.py"), "--steps", "8", "--seqlen", "2048", "--json", str(log)]
        ran = subprocess.run([*launcher, *script], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr[-4000:]
        losses.append(json.loads(log.read_text())["losses"])
    one, two = losses
    assert one[-1] < one[0]
    assert max(abs(x - y) for x, y in zip(one, two, strict=True)) <= 0.02 * one[0]
