"""The steps that ``python -m benchmarks serving`` times, and what it makes of the times."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command_line
from benchmarks import serving


def test_rows():
    names = [row.name for row in serving.ROWS]
    assert len(set(names)) == len(names)
    assert all(row.base in ("", "dense", *names) for row in serving.ROWS)
    row = next(row for row in serving.ROWS if row.name == "64 × 8k")
    assert row.bytes == 64 * 8192 * 8 * 128 * 2 * 2


def test_what_times_are_judged_by():
    row = serving.Row("a", (1024,), heads_kv=1, needs=0.9)
    cell = serving.cell_of(row, {"a": 1e-6}, row.bytes / 0.95e-6)
    assert cell["of_read_rate"] == pytest.approx(0.95)
    assert (cell["met"], cell["of_base"]) == (True, None)
    assert serving.cell_of(row, {"a": 2e-6}, row.bytes / 0.95e-6)["met"] is False
    paged = dataclasses.replace(row, name="b", base="a")
    assert serving.cell_of(paged, {"a": 0.95e-6, "b": 1e-6}, 1.0)["met"] is True
    assert serving.cell_of(paged, {"a": 0.8e-6, "b": 1e-6}, 1.0)["met"] is False
    assert serving.cell_of(dataclasses.replace(row, most_us=14.0), {"a": 15e-6}, 1.0)["met"] is False
    assert serving.cell_of(dataclasses.replace(row, needs=0.0), {"a": 15e-6}, 1.0)["met"] is None


def test_it_is_shown():
    row = serving.Row("a", (1024,), needs=0.9)
    console = Console(record=True, width=120)
    serving.show([serving.cell_of(row, {"a": 1e-6}, 1e12) | {"read_seconds": 0.7e-6}], 1e12, 9e-6, [1, 2], console)
    text = console.export_text()
    assert "missed" not in text
    assert "9.0 µs" in text
    assert "launches a call: 1, with new keys 2" in text
    json.dumps(serving.cell_of(row, {"a": 1e-6}, 1e12))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["serving"])
    assert "no CUDA GPU" in capsys.readouterr().err
