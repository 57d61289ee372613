"""The examples run, as they stand in the repository, for a few steps."""

import random
from importlib import import_module
from itertools import islice

import pytest
import torch

from tests.host.processes import ROOT

pytest.importorskip("transformers")


@pytest.fixture
def folder(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def example(folder):
    return import_module("train_transformers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("folder", "one_thread")
def test_serving_finds_what_generate_finds(capsys):
    """For one sequence at a time, also where the cache was full and sequences have had to wait; all pages come back."""
    serve = import_module("serve")
    server = serve.main(["--requests", "8", "--pages", "30"])
    assert server.sent_back > 0
    assert server.most_pages == 30
    assert server.pages_in_use == -(-len(serve.PREFIX) // server.cache.page_size)
    assert "8 requests" in capsys.readouterr().out
    server.model.set_attn_implementation("eager")
    for request in server.done:
        ids = torch.tensor([[*serve.PREFIX, *request.tokens[: request.prompt]]])
        how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        expected = server.model.generate(ids, max_new_tokens=request.new, **how)[0, ids.shape[1] :]
        assert request.found == expected.tolist() == serve.alone(server.model, request)
    assert len({token for request in server.done for token in request.found}) > 20


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "arguments",
    [
        *("serve --pages 0", "serve --pages 18", "serve --at-once 0", "train_transformers --steps 0"),
        *("train_transformers --plot /nowhere/x.png", "train_transformers --backend foo", "long_context --seqlen 0"),
        *("train_transformers --plot loss.foo", "train_transformers --plot loss", "long_context --plot curve.foo"),
        *("serve --seed 9999999999", "train_transformers --seed -1"),
        *("long_context --method foo", "long_context --json /nowhere/x.json", "long_context --beside /nowhere/x.json"),
    ],
)
def test_what_can_not_be_is_refused_before_any_work(capsys, monkeypatch, arguments):
    name, *rest = arguments.split()
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(SystemExit, match="2"):
        import_module(name).main()
    assert f"argument {rest[0]}: " in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_ranks_that_nobody_has_launched(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["long_context"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        import_module("long_context").main()
    assert "RANK" in (said := capsys.readouterr().err)
    assert "try torchrun --standalone" in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("folder", "one_thread")
def test_serving_with_the_fewest_pages():
    serve = import_module("serve")
    least = serve.SIZES["cuda" if torch.cuda.is_available() else "cpu"].least_pages
    assert len(serve.main(["--requests", "4", "--pages", str(least)]).done) == 4
