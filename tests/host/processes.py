"""Processes for the tests of interrupts: started with SIGINT ignored or not, whatever this process was started with."""

import os
import subprocess
import sys
import time
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
    """Whether nothing is left of a process and of all that it started."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False
