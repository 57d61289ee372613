"""The benchmark of masks and scores: that both ways are timed, and that another result is told."""

import json
import signal

import pytest
import torch

from benchmarks import masks
from benchmarks.__main__ import main


@pytest.fixture(autouse=True)
def quick(one_thread, monkeypatch):
    monkeypatch.setattr(masks, "BUSY_SECONDS", 0.001)
    monkeypatch.setattr(masks, "IDLE_SECONDS", 0.0)


@pytest.mark.parametrize("command", ["masks --only", "serving --row"])
def test_rows_that_there_are_not(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "nonsense"])
    assert "nonsense; known: " in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    asked = ["masks", "--rounds", "2", "--only", "expression", "sinks", "FA4", "block_mask"]
    assert main([*asked, "--json", str(tmp_path / "k.json")]) == 0
    found = json.loads((tmp_path / "k.json").read_text())
    assert found["schema"] == masks.SCHEMA
    assert found["complete"]
    (made,) = found["block_masks"]
    assert made["seconds"] > 0
    assert "lists" not in made  # which a GPU's kernel makes
    assert made["bytes"] < 256 * 256
    cells = {(cell["row"].partition(" ÷")[0], cell["direction"]): cell for cell in found["cells"]}
    assert len(cells) == 8
    assert all("flash_attn" in cells[name, "forward"]["why_not"] for name in ("document", "window"))
    for name in ("causal as an expression", "sinks"):
        for direction in (masks.FORWARD, masks.BACKWARD):
            cell = cells[name, direction]
            assert (cell["seqlen"], cell["head_dim"]) == (masks.SMALL["seqlen"], masks.SMALL["head_dim"])
            assert len(cell["ours"]) == len(cell["other"]) == 2
            assert min(cell["ours"]) > 0
            assert (cell["alike"] is None) == (name == "sinks")
    printed = capsys.readouterr().out
    assert "causal as an expression" in printed
    assert "block_mask of documents" in printed


def test_another_result_is_told(monkeypatch, capsys):
    monkeypatch.setattr(masks.masks, "causal", lambda batch, head, q_idx, kv_idx: q_idx <= kv_idx)
    masks.function.cache_clear()
    assert main(["masks", "--rounds", "1", "--only", "expression"]) == 1
    assert "two results: causal as an expression" in capsys.readouterr().out
    masks.function.cache_clear()


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    measure = masks.measure

    def interrupted(job, *more):
        if "FA4" in job.name:
            raise KeyboardInterrupt(signal.SIGTERM)
        return measure(job, *more)

    monkeypatch.setattr(masks, "measure", interrupted)
    path = tmp_path / "k.json"
    asked = ["masks", "--rounds", "1", "--only", "expression", "FA4", "--json", str(path)]
    assert main(asked) == 128 + signal.SIGTERM
    found = json.loads(path.read_text())
    assert not found["complete"]
    assert {cell["row"] for cell in found["cells"]} == {"causal as an expression ÷ built in"}


@pytest.mark.parametrize(("budget", "rows"), [("0.001", 1), ("3600", 2)])
def test_no_row_begins_after_the_budget(budget, rows, tmp_path, capsys):
    path = tmp_path / "k.json"
    asked = ["masks", "--rounds", "1", "--only", "expression", "sinks", "--direction", "forward", "--budget", budget]
    assert main([*asked, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["cells"]) == rows
    assert found["complete"] == (rows == 2)
    assert ("not completed" in capsys.readouterr().out) == (rows == 1)


@pytest.mark.parametrize("seqlen", [16384, 131072])
def test_documents(seqlen):
    ids = masks.document_ids(seqlen, "cpu")
    lengths = ids.bincount()
    assert ids.dtype == torch.int32
    assert len(lengths) == masks.DOCUMENTS
    assert lengths.sum() == seqlen
    assert lengths.max() < 3.1 * lengths.min()
