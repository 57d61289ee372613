"""Models of Transformers on the GPU, beside eager attention in float64; all else is in ``tests/host/test_transformers.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cute_attn import transformers as integration
from cute_attn.transformers import register
from tests import models

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
HALF, BRAIN = torch.float16, torch.bfloat16
# A model adds up its layers' rounding, of which attention's is a part: errors are another draw, not a part of eager's.
TIMES = 4
CASES = [
    "llama",
    "llama, left padding",
    "llama, padding inside",
    "llama, packed, lengths given",
    "mistral, both sides padded",
    "mistral, packed",
    "gemma2",
    "gpt_oss, left padding",
    "bert, right padding",
    "whisper",
    "t5, padding inside",
    "llama, a mask that is added",
]


@pytest.fixture(autouse=True)
def registered():
    register()


def assert_case(case: str, dtype: torch.dtype, run=lambda model: None):
    name, ask = models.CASES[case]
    model = models.built(name, integration.IMPLEMENTATION, dtype, "cuda")
    got = models.answer(model, ask(), run(model))
    models.assert_follows(got, *models.expected(case, dtype, "cuda"), times=TIMES)


@pytest.mark.parametrize(("case", "dtype"), [*((case, BRAIN) for case in CASES), ("llama", HALF), ("gemma3", HALF)])
def test_logits_and_gradients(case, dtype):
    assert_case(case, dtype)


@pytest.mark.parametrize("case", ["llama", "llama, padding inside", "llama, packed, lengths given"])
def test_compiled(case):
    torch._dynamo.reset()
    assert_case(case, BRAIN, lambda model: torch.compile(model, fullgraph=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_steps_with_a_cache(name, cache):
    """A prompt, padded on the left, then a token at a time, beside one pass over all of them without a cache."""
    from transformers import DynamicCache, StaticCache

    asked, first = models.padded("left"), 16
    ids, used = (asked.inputs[x].cuda() for x in ("input_ids", "attention_mask"))

    def logits(implementation: str, dtype: torch.dtype, steps: bool) -> dict[str, torch.Tensor]:
        model = models.built(name, implementation, dtype, "cuda")
        if not steps:
            return {"logits": model(input_ids=ids, attention_mask=used).logits[:, first - 1 :]}
        made = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=40)
        ends = [first, *range(first + 1, models.LENGTH + 1)]
        parts = []
        for begin, end in zip([0, *ends], ends, strict=False):
            positions = (used[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:end]
            out = model(ids[:, begin:end], attention_mask=used[:, :end], position_ids=positions, past_key_values=made)
            parts.append(out.logits[:, -1:])
        return {"logits": torch.cat(parts, 1)}

    with torch.no_grad(), models.exact():
        true, plain = (logits("eager", dtype, True) for dtype in (torch.float64, BRAIN))
        models.assert_follows(logits(integration.IMPLEMENTATION, BRAIN, True), true, plain, times=TIMES)


def test_nothing_is_waited_for():
    """Once the mask is made, by no layer; and where a graph is captured, not for the mask either."""
    used = models.padded("inside").counts.cuda()
    asked = {"mask_function": lambda batch, head, query, key: key <= query, "attention_mask": used, "device": used.device}
    q, k, v = (torch.randn(2, heads, models.LENGTH, 64, device="cuda", dtype=BRAIN, requires_grad=True) for heads in (4, 2, 2))
    module = torch.nn.Module()

    def both_passes(mask):
        out, _ = integration.attend(module, q, k, v, mask)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    mask = integration.mask(2, models.LENGTH, models.LENGTH, **asked)
    expected = both_passes(mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both_passes(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(integration.mask(2, models.LENGTH, models.LENGTH, **asked))
    graph.replay()
    torch.cuda.synchronize()
    for results in (again, captured):
        assert torch.equal(results[0], expected[0])
        for got, wanted in zip(results[1:], expected[1:], strict=True):
            torch.testing.assert_close(got, wanted)


def test_what_a_graph_can_not_read_ends_it():
    """The words come from the device; the process can't use it any more, so another one is asked."""
    program = (
        "import torch\nfrom cute_attn import transformers as t\n"
        "mask = t.Mask((1, 1, 8, 8), (3, 0), {'cu_seqlens_q': torch.tensor([0, 8], dtype=torch.int32, device='cuda')})\n"
        "mask.holds = torch.tensor(False, device='cuda')\n"
        "x = torch.zeros(1, 2, 8, 64, device='cuda', dtype=torch.bfloat16)\n"
        "t.attend(torch.nn.Module(), x, x, x, mask)\ntorch.cuda.synchronize()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    assert "padding between keys under a window" in ran.stdout + ran.stderr
