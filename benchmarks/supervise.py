"""Keeps a measuring process at work: gives it jobs, watches whose turn it is, replaces it when a peer hangs.

A hung kernel or a crashed library can't be cleaned up from inside its process, so the measuring is done in a child, and
the peer that took it down loses its cell and nothing else. Nor can a process be interrupted in which torch.compile works on a
backward pass: that is a thread of autograd's, for which the main thread waits outside of Python (:func:`apart`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case
from benchmarks.results import Cell, Measurement
from benchmarks.settings import Crew, Settings
from benchmarks.worker import main
from cute_attn.command import leave_interrupts_to_parent

START_SECONDS = 300.0  # imports from a cold disk, the CUDA context, and whatever belongs to no peer
GRACE_SECONDS = 5.0  # past its limit a peer is stopped between two turns, and only after this in the middle of one


@dataclass(frozen=True)
class _Lost:
    peer: str | None
    status: str
    reason: str


class WorkerError(RuntimeError):
    """The measuring process can't be started."""


class Supervisor:
    """A measuring process and its replacements. ``watch`` hears whose turn it is."""

    def __init__(
        self,
        crew: Crew,
        settings: Settings,
        watch: Callable[[str | None], None] = lambda _: None,
        target: Callable[..., None] = main,
    ) -> None:
        self._arguments = (crew, settings)
        self._target = target
        self._limit_s = settings.limit_s
        self._watch = watch
        self._process: Any = None
        self._connection: Any = None
        self.about: dict[str, Any] = {}

    def start(self) -> None:
        """Start the measuring process unless one is running, and hear what it found."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._target, args=(theirs, *self._arguments), daemon=False)
        self._process.start()
        theirs.close()
        answer = self._listen()
        if isinstance(answer, _Lost):
            self.stop()
            raise WorkerError(f"the measuring process didn't start: {answer.reason}")
        self.about = self.about or answer

    def cell(
        self, kind: str, case: Case, rounds: range = range(1), lost: Mapping[str, Measurement] | None = None
    ) -> Cell:
        """One visit to a cell, for some of its rounds, without those who lost it in an earlier one. A peer that hangs or
        takes the process down has lost it; the rest start over."""
        lost = dict(lost or {})
        while True:
            try:
                self.start()
            except WorkerError as error:
                return Cell(kind, case, lost, note=str(error))
            answer = self._ask((kind, case, lost, rounds))
            if isinstance(answer, Cell):
                return answer
            self.stop()
            if answer.peer is None or answer.peer in lost:
                return Cell(kind, case, lost, note=answer.reason)
            lost[answer.peer] = Measurement(answer.status, answer.reason)

    def _ask(self, job: tuple | None) -> Any:
        """Send a job, or ``None`` for the end, and wait for the answer."""
        try:
            self._connection.send(job)
        except OSError:
            return self._died(None)
        return self._listen()

    def _died(self, busy: str | None) -> _Lost:
        self._process.join(timeout=GRACE_SECONDS)
        return _Lost(busy, "failed", f"its process died with exit status {self._process.exitcode}")

    def _listen(self) -> Any:
        """The next answer: the body of an ``about``, ``cell`` or ``state`` message, or a :class:`_Lost`."""
        busy: str | None = None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                    limit = START_SECONDS if busy is None else self._limit_s
                    return _Lost(busy, "timeout", f"gave no answer within {limit:.0f} s; its process was ended")
                word, *body = self._connection.recv()
            except (EOFError, OSError):
                return self._died(busy)
            if word == "turn":
                (busy,) = body
                deadline = time.monotonic() + (START_SECONDS if busy is None else self._limit_s + GRACE_SECONDS)
                self._watch(busy)
            elif word == "lost":
                return _Lost(body[0], "failed", body[1])
            else:
                return body[0]

    def finish(self) -> dict[str, Any] | None:
        """Ask for the card's state, then let the process go."""
        if self._process is None:
            return None
        answer = self._ask(None)
        self.stop()
        return answer if isinstance(answer, dict) else None

    def stop(self) -> None:
        """End the measuring process, in good faith first."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.join(timeout=GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()  # not before: the process would end in a traceback if it just sends something
        self._process = self._connection = None


def apart(work: Callable[..., Any], jobs: Sequence[Any], limit_s: float, *arguments: Any) -> Generator[tuple[Any, Any]]:
    """``(job, work(job, *arguments))`` of each job, from another process; after a job that takes it down, or takes longer
    than ``limit_s``, from a new one, and that job's result is a :class:`WorkerError`. When this generator is closed the process
    ends, whatever it does, and so does all that it has started."""
    done, context = 0, multiprocessing.get_context("spawn")
    while done < len(jobs):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, work, jobs[done:], arguments))
        try:
            process.start()
            theirs.close()
            limit = START_SECONDS
            for job in jobs[done:]:
                done += 1
                try:
                    answered = ours.poll(limit)
                    result = ours.recv() if answered else WorkerError(f"no result within {limit:.0f} s; its process was ended")
                except (EOFError, OSError):
                    process.join(timeout=GRACE_SECONDS)
                    answered, result = False, WorkerError(f"its process died with exit status {process.exitcode}")
                yield job, result
                if not answered:
                    break
                limit = limit_s
        finally:
            _end_group(process)
            ours.close()


def _work(connection: Any, work: Callable[..., Any], jobs: Sequence[Any], arguments: tuple) -> None:
    os.setpgid(0, 0)  # what it starts is of the same group, and ends with it
    leave_interrupts_to_parent()
    for job in jobs:
        connection.send(work(job, *arguments))


def _end_group(process: Any) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has no group yet, or has ended
        process.kill()
    process.join()
