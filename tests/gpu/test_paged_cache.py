"""Serving on the GPU: pages, Transformers' continuous batching in CUDA graphs, the example; all else is in ``tests/host``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from cute_attn import PagedCache, transformers
from tests import caches, models

BRAIN = torch.bfloat16
TIMES = 4  # as in test_transformers.py


@pytest.mark.parametrize("page_size", [1, 16])
def test_attention_to_pages_of_a_cache(page_size):
    caches.check_pages(BRAIN, "cuda", page_size, 64)


def test_nothing_is_waited_for():
    """Sequences are numbers of the host, and what the device needs of them is sent there."""
    cache = PagedCache(64, 4, 2, 64, layers=2, dtype=BRAIN, device="cuda")
    sequences = [cache.new() for _ in range(8)]
    cache.append(sequences, 6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forks = [cache.fork(sequence) for sequence in sequences]
        lengths, table = cache.append(forks, 3), cache.page_table(forks)  # with copies of pages
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lengths.tolist() == [6] * 8
    assert len(table[:, 1:].unique()) == 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_continuous_batching(name, graphs):
    """Steps of pages and of gathered keys, in CUDA graphs or not: the tokens are those of float64, but for rounding."""
    pytest.importorskip("transformers")
    if not models.serves():
        pytest.skip("Transformers' continuous batching, of 5.24 on, is not there")
    transformers.register()
    model = models.built(name, transformers.IMPLEMENTATION, BRAIN, "cuda")
    for prompt, found in zip(models.PROMPTS, models.served(model, use_cuda_graph=graphs), strict=True):
        models.assert_greedy(model, prompt, found, TIMES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_example_serves(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    serve = import_module("serve")
    server = serve.main(["--requests", "12", "--pages", "60"])
    assert len(server.done) == 12
    for request in server.done:
        models.assert_greedy(server.model, [*serve.PREFIX, *request.tokens[: request.prompt]], request.found, TIMES)
