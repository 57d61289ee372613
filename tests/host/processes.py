"""Processes for the tests of interrupts: started with SIGINT ignored or not, whatever this process was started with."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIGINT_AT_START = ("ignored", "default")
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
