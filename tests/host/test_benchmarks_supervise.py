"""The supervisor against measuring processes that hang and die, and whole runs of the command line on the CPU."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import supervise
from benchmarks.__main__ import main
from benchmarks.results import Record
from benchmarks.settings import Crew, Settings
from tests.host import benchmarks_fakes as fakes

ROOT = Path(__file__).resolve().parents[2]
HANGS, CRASHES, LOSES_THE_DEVICE = (replace(fakes.CASE, batch=batch) for batch in (2, 3, 4))
FINE = replace(fakes.CASE, batch=1)


@pytest.fixture
def supervisor(monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    supervisor = supervise.Supervisor(Crew(), Settings(limit_s=0.3), target=fakes.scripted_worker)
    yield supervisor
    supervisor.stop()


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        (HANGS, "timeout", "no answer within 0 s"),
        (CRASHES, "failed", "died with exit status 7"),
        (LOSES_THE_DEVICE, "failed", "illegal address"),
    ],
)
def test_a_peer_that_takes_the_process_down_loses_one_cell(supervisor, case, status, words):
    cell = supervisor.cell("burst", case)
    assert cell.results["bad"].status == status
    assert words in cell.results["bad"].reason
    assert cell.results["good"].ok
    assert supervisor.cell("burst", FINE).results["bad"].ok  # back in the next cell


def test_one_process_serves_cells_until_one_is_lost(supervisor):
    supervisor.start()
    first = supervisor.about["pid"]
    supervisor.cell("burst", FINE)
    assert supervisor.about["pid"] == first
    assert supervisor.finish() == {"sm_mhz": 1000.0, "watts": 100.0}
    assert supervisor.finish() is None


def test_a_process_that_cannot_start_is_an_error():
    supervisor = supervise.Supervisor(Crew(), Settings(), target=fakes.worker_that_cannot_start)
    with pytest.raises(supervise.WorkerError, match="exit status 5"):
        supervisor.start()


def test_a_run_on_the_cpu_with_faulty_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "torch_math,fake_right,fake_wrong,fake_failing,fake_crashing"
    arguments = [
        "--peers-from",
        "tests.host.benchmarks_fakes",
        "--peers",
        names,
        "--seqlen",
        "64",
        "--causal",
        "--rounds",
        "2",
    ]
    outputs = ["--json", "r.json", "--csv", "r.csv", "--plot", "plots"]
    assert main(["attention", "--kind", "burst", "host", *arguments, *outputs]) == 0
    record = Record.load(tmp_path / "r.json")
    assert record.complete
    assert [cell.kind for cell in record.cells] == ["burst", "host"]
    for cell in record.cells:
        statuses = {name: m.status for name, m in cell.results.items()}
        expected = {
            "torch_math": "ok",
            "fake_right": "ok",
            "fake_wrong": "wrong",
            "fake_failing": "failed",
            "fake_crashing": "failed",
        }
        assert statuses == expected
    assert record.cells[0].ceiling.ok
    assert record.about["card"]["device"] == "cpu"
    assert record.about["versions"]["torch"]
    output = capsys.readouterr().out
    assert "no CUDA GPU was found" in output
    assert "fake_crashing failed: its process died with exit status 7" in output
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".svg", ".png"}


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """A real Ctrl-C to a real run, once its first cell is in the file."""
    path = tmp_path / "r.json"
    names = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_right"]
    command = [sys.executable, "-m", "benchmarks", "attention", *names, "--rounds", "2", "--json", str(path)]
    command += ["--seqlen", "16", *(str(32 + i) for i in range(400))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("burst:"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
            break
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "not completed" in output
    fields = json.loads(path.read_text())
    assert not fields["complete"]
    assert 1 <= len(fields["cells"]) < 400


def test_a_budget_ends_a_run_early(tmp_path):
    arguments = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_right", "--budget", "-1"]
    assert main(["attention", *arguments, "--json", str(tmp_path / "r.json")]) == 0
    record = Record.load(tmp_path / "r.json")
    assert not record.complete
    assert not record.cells
