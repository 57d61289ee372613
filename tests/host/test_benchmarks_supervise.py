"""The supervisor against measuring processes that hang and die, and whole runs of the command line on the CPU."""

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks import host, supervise
from benchmarks.__main__ import main
from benchmarks.peers import REGISTRY
from benchmarks.results import Record
from benchmarks.settings import Crew, Settings
from tests.host import benchmarks_fakes as fakes
from tests.host.processes import INTERRUPTS, group_is_gone, start, until

# Real processes of the command line, which start theirs as they do anywhere, are in the tests of interrupts.
pytestmark = pytest.mark.usefixtures("quick_processes")

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


def test_a_run_on_the_cpu_with_faulty_peers(tmp_path, capsys):
    names = "torch_math,fake_right,fake_wrong,fake_failing,fake_crashing"
    peers = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", names]
    case = ["--seqlen", "64", "--causal", "--rounds", "2", "--passes", "2", "--burst-ms", "1", "--idle-ms", "0"]
    outputs = [f"--json={tmp_path}/r.json", f"--csv={tmp_path}/r.csv", f"--plot={tmp_path}/plots"]
    assert main(["attention", *peers, *case, *outputs]) == 1
    record = Record.load(tmp_path / "r.json")
    assert record.complete
    assert [cell.case.direction for cell in record.cells] == ["forward", "backward"]
    for cell in record.cells:
        assert {name: m.status for name, m in cell.results.items()} == {
            "torch_math": "ok",
            "fake_right": "ok",
            "fake_wrong": "wrong",
            "fake_failing": "failed",
            "fake_crashing": "failed",
        }
        assert cell.ceiling.ok
        assert cell.results["fake_right"].visits == len(cell.results["fake_right"].samples) == 2
    assert "dq is off" in record.cells[1].results["fake_wrong"].reason
    assert record.about["card"]["device"] == "cpu"
    assert record.about["versions"]["torch"]
    output = capsys.readouterr().out
    assert "no CUDA GPU was found" in output
    assert "fake_crashing failed: its process died with exit status 7" in output
    (failed,) = (line for line in output.splitlines() if line.startswith("failed: "))
    assert all(f"fake_{name} in 2 of its cells" in failed for name in ("wrong", "failing", "crashing"))
    assert "fake_right" not in failed
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".svg", ".png"}


def test_jobs_apart(tmp_path):
    """One that takes its process down, or longer than it may, loses its own result; with it ends what it had started."""
    found = dict(supervise.apart(fakes.job, ["one", "dies", "two"], 120.0, str(tmp_path)))
    assert (found["one"], found["two"]) == ("ONE", "TWO")
    assert "exit status 7" in str(found["dies"])
    found = dict(supervise.apart(fakes.job, ["one", "hangs", "two"], 1.0, str(tmp_path)))
    assert (found["one"], found["two"]) == ("ONE", "TWO")
    assert "no result within" in str(found["hangs"])
    if (tmp_path / "hangs").exists():  # a busy machine may not have come so far
        until(lambda: not any(map(_runs, (tmp_path / "hangs").read_text().split())))


def test_jobs_apart_end_with_an_interrupt(tmp_path):
    """Even where the process hears no signal. (What is started in the background of a shell ignores interrupts.)"""
    here, before = threading.get_ident(), signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        until((tmp_path / "hangs").exists)
        time.sleep(0.2)  # most often the other waits by then
        signal.pthread_kill(here, signal.SIGINT)

    with closing(supervise.apart(fakes.job, ["one", "hangs"], 300.0, str(tmp_path))) as results:
        next(results)
        try:
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                threading.Thread(target=interrupt).start()
                next(results)
        finally:
            signal.signal(signal.SIGINT, before)
    until(lambda: not any(map(_runs, (tmp_path / "hangs").read_text().split())))


def _runs(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("sigint", "number", "to"), INTERRUPTS)
def test_an_interrupted_run_keeps_what_was_measured(tmp_path, sigint, number, to):
    """A real signal to a real run, once its first cell is in the file."""
    path = tmp_path / "r.json"
    names = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_right"]
    lengths = ["--seqlen", "16", *(str(32 + i) for i in range(400))]
    process = start(sigint, "-m", "benchmarks", "attention", *names, "--rounds", "2", "--json", str(path), *lengths)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("burst:"):
            to(process.pid, number)
            break
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "not completed" in output
    assert "Traceback" not in output
    fields = json.loads(path.read_text())
    assert not fields["complete"]
    assert 1 <= len(fields["cells"]) < 400
    until(lambda: group_is_gone(process))


@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_an_interrupted_first_call_leaves_no_process(tmp_path, number, to):
    """The process whose first call it is, is a child of the one that measures."""
    hanging = tmp_path / "hanging"
    names = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_hanging", "--kind", "first", "--forward"]
    environment = {fakes.HANGING: str(hanging)}
    process = start("ignored", "-m", "benchmarks", "attention", *names, "--limit", "7200", **environment)
    until(hanging.exists)
    to(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "not completed" in output
    assert "Traceback" not in output
    until(lambda: group_is_gone(process))


@pytest.fixture
def scripted(monkeypatch):
    """The command line with the scripted measuring process behind it."""
    monkeypatch.setattr("benchmarks.__main__.Supervisor", partial(supervise.Supervisor, target=fakes.scripted_worker))


def test_every_kind_is_measured_in_order_and_each_cell_is_saved(scripted, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Record, "save", lambda record, path: saved.append(len(record.cells)))
    kinds = ["--kind", "first", "host", "sustained", "burst"]
    case = ["--seqlen", "64", "--batch", "1", "--forward", "--rounds", "3", "--passes", "2"]
    assert main(["attention", *kinds, *case, "--json", str(tmp_path / "r.json")]) == 0
    # Full and causal for each regime, the host's forward and packed calls, one first call; the same once more but for the first
    # call; the end.
    assert saved == [1, 2, 3, 4, 5, 6, 7] + [7] * 6 + [7]


def test_each_pass_can_have_a_process_of_its_own(monkeypatch):
    started = []

    class Counting(supervise.Supervisor):
        def start(self):
            if self._process is None:
                started.append(None)
            super().start()

    monkeypatch.setattr("benchmarks.__main__.Supervisor", partial(Counting, target=fakes.scripted_worker))
    case = ["--seqlen", "64", "--batch", "1", "--rounds", "3"]
    assert main(["attention", *case]) == 0
    assert len(started) == 1
    assert main(["attention", *case, "--fresh-process"]) == 0
    assert len(started) == 1 + 3


@pytest.mark.parametrize(("jobs", "kernels"), [(4, 3), (1, 0)])
def test_kernels_are_compiled_ahead_where_there_is_a_gpu(monkeypatch, tmp_path, jobs, kernels):
    asked = []

    def compile_ahead(work, jobs, modules, limit_s, done):
        asked.extend(work)
        return 1.0

    monkeypatch.setattr("benchmarks.__main__.ahead.compile_ahead", compile_ahead)
    target = partial(supervise.Supervisor, target=fakes.scripted_worker_on_a_gpu)
    monkeypatch.setattr("benchmarks.__main__.Supervisor", target)
    case = ["--head-dim", "128", "--causal", "--seqlen", "512", "8k", "--compile-jobs", str(jobs)]
    assert main(["attention", *case, "--json", str(tmp_path / "r.json")]) == 0
    assert len(asked) == kernels  # forward, backward, deterministic backward
    assert {case.seqlen_q for _, case in asked} <= {512}
    about = Record.load(tmp_path / "r.json").about
    assert about.get("compile_ahead", {"kernels": 0})["kernels"] == kernels


def test_a_peer_that_was_lost_is_not_visited_again(scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    case = ["--seqlen", "64", "--batch", "3", "--forward", "--full", "--rounds", "3"]
    assert main(["attention", *case, "--json", str(tmp_path / "r.json")]) == 0
    (cell,) = Record.load(tmp_path / "r.json").cells
    assert cell.results["bad"].status == "failed"
    assert cell.results["good"].visits == 3


def test_a_cell_that_everybody_has_lost_is_not_visited_again(capsys):
    names = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_failing"]
    case = ["--seqlen", "16", "--causal", "--forward", "--rounds", "3", "--passes", "3", "--burst-ms", "1", "--idle-ms", "0"]
    assert main(["attention", *names, *case]) == 1
    output = capsys.readouterr().out
    assert sum(line.startswith("burst: ") and line.endswith("fake_failing failed") for line in output.splitlines()) == 1
    assert "failed: fake_failing in 1 of its cells" in output


def test_a_run_in_which_nobody_takes_part_fails(capsys):
    names = ["--peers-from", "tests.host.benchmarks_fakes", "--peers", "fake_missing"]
    assert main(["attention", *names, "--seqlen", "16", "--causal", "--forward", "--passes", "1"]) == 1
    output = capsys.readouterr().out
    assert "without fake_missing: not_there:attention can't be imported" in output
    assert "failed: no peer has given any figure" in output


def test_a_full_disk_does_not_end_a_run(scripted, tmp_path, monkeypatch, capsys):
    """It is said once; the exit status tells whether the results are in the file in the end."""
    kept, full = Record.save, [True, True, False, False]

    def save(record, path):
        if full.pop(0):
            raise OSError(28, "No space left on device")
        kept(record, path)

    monkeypatch.setattr(Record, "save", save)
    case = ["attention", "--seqlen", "64", "--batch", "1", "--forward", "--passes", "3", "--full"]
    path = tmp_path / "r.json"
    assert main([*case, "--json", str(path)]) == 0
    assert Record.load(path).complete
    assert capsys.readouterr().out.count(f"{path} can't be written ([Errno 28] No space left on device)") == 1
    full[:] = [False, False, False, True]
    assert main([*case, "--json", str(path)]) == 1


def test_results_in_a_folder_with_brackets(scripted, tmp_path, capsys):
    """They are no markup, and none of what a peer says is."""
    folder = tmp_path / "[bold]x[" / "nope]"
    folder.mkdir(parents=True)
    outputs = ["--json", str(folder / "r.json"), "--csv", str(folder / "r.csv"), "--plot", str(folder / "plots")]
    case = ["--seqlen", "64", "--batch", "1", "--causal", "--passes", "1"]
    assert main(["attention", *case, *outputs]) == 0
    assert {path.name for path in folder.iterdir()} == {"r.json", "r.csv", "plots"}
    record = Record.load(folder / "r.json")
    record.about["card"]["name"], record.about["missing"] = "a [/card]", {"[x]": "[/why]"}
    record.cells[0].results["[/peer]"] = fakes.Measurement("failed", "[/reason] :bug:")
    record.save(folder / "r.json")
    pictures = ["--plot", str(folder / "plots")] if importlib.util.find_spec("matplotlib") else []
    assert main(["show", str(folder / "r.json"), *pictures]) == 0
    output = capsys.readouterr().out
    for words in ("a [/card]", "without [x]: [/why]", "[/peer] failed: [/reason] :bug:"):
        assert words in output


def test_a_budget_ends_a_run_early(scripted, tmp_path, capsys):
    assert main(["attention", "--budget", "1e-9", "--json", str(tmp_path / "r.json")]) == 0
    record = Record.load(tmp_path / "r.json")
    assert not record.complete
    assert not record.cells
    assert record.about["after"] == {"sm_mhz": 1000.0, "watts": 100.0}
    assert "not completed" in capsys.readouterr().out


# --- first calls -----------------------------------------------------------------------------------------------------


def test_the_first_call_of_a_process_prints_its_seconds(capsys):
    assert host.main("torch_math", json.dumps(fakes.CASE.to_dict())) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 0 < answer["context_s"] < answer["total_s"]
    windowed = replace(fakes.CASE, window=(1, 1))
    assert host.main("torch_math", json.dumps(windowed.to_dict())) == host.UNSUPPORTED_EXIT


def test_cold_and_warm_first_calls_share_caches_of_their_own(monkeypatch):
    runs = []

    def run(command, env, **_):
        runs.append((command[3], env["CUTE_ATTN_CACHE_DIR"], Path(env["CUTE_ATTN_CACHE_DIR"]).parent.is_dir()))
        answer = {"total_s": 9.0 / len(runs), "context_s": 0.5}
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(answer)}\n", "")

    monkeypatch.setattr(host.subprocess, "run", run)
    peer = REGISTRY["torch_math"]
    cell = host.first_calls(fakes.CASE, [peer], {}, 60.0, (), lambda _: None)
    assert cell.results["torch_math"].extra["cold_s"] == 9.0
    assert cell.results["torch_math"].extra["warm_s"] == 4.5
    (name, first_folder, there), (_, second_folder, _) = runs
    assert (name, there) == ("torch_math", True)
    assert first_folder == second_folder
    assert not Path(first_folder).parent.exists()


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no kernel"), "failed"),
        (subprocess.CompletedProcess([], host.UNSUPPORTED_EXIT, "", "no window"), "unsupported"),
        (subprocess.TimeoutExpired([], 30), "timeout"),
    ],
)
def test_a_first_call_that_does_not_come(monkeypatch, outcome, status):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(host.subprocess, "run", run)
    cell = host.first_calls(fakes.CASE, [REGISTRY["torch_math"]], {}, 60.0, (), lambda _: None)
    assert cell.results["torch_math"].status == status
