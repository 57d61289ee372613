"""The benchmark of a model: that steps and attention are timed, and that another result is told."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from benchmarks import model
from benchmarks.__main__ import main
from cute_attn import transformers as integration

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = ["--tokens", "64", "--hidden", "32", "--layers", "2", "--rounds", "2"]


@pytest.fixture(autouse=True)
def quick(one_thread, monkeypatch):
    """Turns of a few calls, and a compiler that leaves the model as it is."""
    monkeypatch.setattr(model, "TURN_SECONDS", 0.001)
    monkeypatch.setattr(model, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda module: module)


@pytest.mark.parametrize("sequences", [1, 4, 7])
def test_sizes(sequences):
    size = replace(model.SIZES["cpu"], sequences=sequences)
    assert sum(model.sizes(size)) == size.tokens
    assert len(model.sizes(size)) == sequences
    assert min(model.sizes(size)) > 0


def test_the_command(tmp_path, capsys):
    assert main(["model", *SMALL, "--json", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["schema"] == model.SCHEMA
    assert found["about"]["size"] == {**vars(model.SIZES["cpu"]), "tokens": 64, "hidden": 32, "layers": 2}
    cells = {(cell["mode"], cell["implementation"]): cell for cell in found["cells"]}
    assert set(cells) == {(mode, name) for mode in model.MODES for name in (model.TORCH, model.OURS)}
    for cell in cells.values():
        assert len(cell["steps"]) == len(cell["attention"]) == 2
        assert min(cell["attention"]) > 0
        assert cell["alike"] > 0.9999
        assert cell["loss"] == pytest.approx(cells["eager", model.TORCH]["loss"])
    assert "of the step" in capsys.readouterr().out


def test_torch_takes_part_whoever_is_asked_for(tmp_path):
    assert main(["model", *SMALL, "--implementation", "cute_attn", "--mode", "eager", "--json", str(tmp_path / "m.json")]) == 0
    cells = json.loads((tmp_path / "m.json").read_text())["cells"]
    assert [cell["implementation"] for cell in cells] == ["sdpa", "cute_attn"]


def test_an_interrupted_run_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    plain, turns = model.Bench.turn, []

    def turn(bench, cell):
        if len(turns) == 2:
            raise KeyboardInterrupt(signal.SIGTERM)
        turns.append(cell)
        plain(bench, cell)

    monkeypatch.setattr(model.Bench, "turn", turn)
    assert main(["model", *SMALL, "--json", str(tmp_path / "m.json")]) == 128 + signal.SIGTERM
    found = json.loads((tmp_path / "m.json").read_text())
    assert not found["complete"]
    assert [(cell["mode"], cell["implementation"]) for cell in found["cells"]] == [(x.mode, x.implementation) for x in turns]
    assert "not completed" in capsys.readouterr().out


def test_a_peer_that_cannot_run_is_told_and_left_out(monkeypatch, tmp_path, capsys):
    """That of another library; an error of ours ends the run."""
    plain = model.Bench.compare

    def compare(bench, cell):
        if cell.implementation == fails:
            raise RuntimeError("no kernel\nfor this card")
        plain(bench, cell)

    monkeypatch.setattr(model.Bench, "compare", compare)
    monkeypatch.setattr(model, "installed", lambda device: ["flash_attention_2"])
    fails = "flash_attention_2"
    assert main(["model", *SMALL, "--mode", "eager", "--json", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert [cell["implementation"] for cell in found["cells"]] == ["sdpa", "cute_attn"]
    assert found["failed"] == {"flash_attention_2 (eager)": "RuntimeError: no kernel"}
    assert "flash_attention_2 (eager) could not run: RuntimeError: no kernel" in capsys.readouterr().out
    fails = "cute_attn"
    with pytest.raises(RuntimeError, match="no kernel"):
        main(["model", *SMALL, "--mode", "eager"])


def test_another_result_is_told(monkeypatch, capsys):
    """Of attention that doesn't keep the packed sequences apart."""

    def as_one(q, k, v, *, cu_seqlens_q, cu_seqlens_k, **rules):
        return integration.attention(q[None], k[None], v[None], **rules)[0]

    monkeypatch.setattr(integration, "attention_varlen", as_one)
    assert main(["model", *SMALL]) == 1
    assert "another result than sdpa's: cute_attn (eager), cute_attn (compiled)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--heads", "3"], "a multiple of twice the heads"),
        (["--heads-kv", "3"], "of these a multiple of heads-kv"),
        (["--tokens", "15"], "at least 4 in each"),
        (["--layers", "0"], "at least 1"),
        (["--implementation", "xformers"], "invalid choice"),
    ],
)
def test_bad_usage(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["model", *given])
    assert said in capsys.readouterr().err
