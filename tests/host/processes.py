"""Processes for tests: with SIGINT ignored or not, whatever this process was started with; and quick ones, that begin with
torch imported, which is most of what a fresh one takes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIGINT_AT_START = ("ignored", "default")
INTERRUPTS = [  # with SIGINT so, what comes: as a terminal sends it, to the whole group; and as a supervisor ends a job
    *[pytest.param(sigint, signal.SIGINT, os.killpg, id=f"SIGINT-{sigint}") for sigint in SIGINT_AT_START],
    pytest.param("ignored", signal.SIGTERM, os.kill, id="SIGTERM"),
]
_START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignored" else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def start(sigint: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Python with ``arguments``, in a group of its own, with SIGINT as a shell leaves it: ``ignored`` in the background."""
    command = [sys.executable, "-c", _START, sigint, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def until(holds, seconds: float = 120.0) -> None:
    """Wait for ``holds()``; a machine that is busy may take its time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group_is_gone(process: subprocess.Popen) -> bool:
    """Whether nothing of a process and of all that it started runs any more. What has ended and was not yet collected counts
    as gone: the machine's first process does that when it likes and, in some containers, never."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return sys.platform == "linux" and not any(map(_runs_in(process.pid), Path("/proc").glob("[0-9]*/stat")))


def _runs_in(group: int) -> Callable[[Path], bool]:
    def runs(stat: Path) -> bool:
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            return False
        return int(its_group) == group and state not in ("Z", "X")

    return runs


# ---- quick ones ----------------------------------------------------------------------------------------------------


def quick() -> BaseContext:
    """Processes that are forked from one that has imported torch and has done nothing else. They are as fresh as others; but
    their environment and their output are what they were when the first of them was started."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def run_quick(program: str, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -c program arguments`` in a quick process, started in a folder, with more in its environment."""
    with TemporaryDirectory() as said:
        paths = Path(said, "out"), Path(said, "err")
        asked = program, arguments, folder, {**os.environ, **environment}, paths
        process = quick().Process(target=_run, args=asked)  # type: ignore[attr-defined]
        process.start()
        process.join()
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in paths)
        return subprocess.CompletedProcess([program, *arguments], process.exitcode, out, err)


def start_quick(function: Callable[..., None], arguments: tuple, count: int) -> None:
    """``function(rank, *arguments)`` in so many quick processes that talk to each other; raises what one of them raised."""
    from torch.multiprocessing import start_processes

    method = quick().get_start_method()
    start_processes(_on_this_machine, (function, *arguments), nprocs=count, start_method=method)


def _on_this_machine(rank: int, function: Callable[..., None], *arguments) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    function(rank, *arguments)


def _run(program: str, arguments: tuple, folder: Path, environment: Mapping[str, str], paths: tuple[Path, Path]) -> None:
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
