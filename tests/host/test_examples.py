"""The examples run, as they stand in the repository, for a few steps."""

import random
from importlib import import_module
from itertools import islice

import pytest
import torch

from tests.host.processes import ROOT

pytest.importorskip("transformers")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return import_module("train_transformers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_learns(example, tmp_path, capsys):
    """In one graph, whatever number of documents a step has."""
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    torch._dynamo.reset()
    losses = example.main(["--steps", "12", "--backend", "eager", "--plot", str(tmp_path / "loss.png")])
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 1
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 12 steps" in capsys.readouterr().out


def test_documents_are_packed(example):
    """Each step's row is full, each document begins at position 0, and nothing foretells its first token."""
    size = example.SIZES["cpu"]
    counts = set()
    for batch in islice(example.batches(size, random.Random(0), "cpu"), 30):
        bounds, positions = batch["cu_seq_lens_q"].tolist(), batch["position_ids"][0]
        assert (bounds[0], bounds[-1], len(bounds)) == (0, size.tokens, size.documents + 1)
        begins = (positions == 0).nonzero().flatten()
        assert begins.tolist() == [bound for bound in bounds if bound < size.tokens]
        assert torch.equal(positions.diff()[positions[1:] > 0], torch.ones(size.tokens - len(begins)).long())
        hidden = batch["labels"][0] == -100
        assert torch.equal(hidden.nonzero().flatten(), begins)
        assert torch.equal(batch["labels"][0][~hidden], batch["input_ids"][0][~hidden])
        counts.add(len(begins))
    assert len(counts) > 1
