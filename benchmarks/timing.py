"""Clocks and the ways to use them: a burst from a cool card, continuous load, the host's side of a call.

A clock has a host side (``now``, ``sleep``) and a device side (``mark`` goes into the stream, ``between`` waits for two
marks and gives the seconds between them). Tests bring a clock of their own.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Call = Callable[[], Any]

WARM_SECONDS = 0.002  # untimed calls before a burst: clocks wake up, and the host gets ahead of the device
WINDOW_SECONDS = 0.05  # continuous load is timed in windows of this length
SETTLE = 0.3  # the share of a sustained turn that isn't counted: power and clock find their level
QUEUE_AHEAD = 3  # windows queued beyond the one that is running
UNWAITED_CALLS = 50  # of the host, before the device is waited for


class Clock(Protocol):
    def now(self) -> float:
        """Host time in seconds."""
        ...

    def sleep(self, seconds: float) -> None: ...

    def mark(self) -> Any:
        """A point in the device's work queue."""
        ...

    def between(self, first: Any, last: Any) -> float:
        """Wait until the device has passed both marks; the device's seconds between them."""
        ...

    def sync(self) -> None:
        """Wait until the device is idle."""
        ...


class HostClock:
    """For work that runs on the host: a mark is the time."""

    now = staticmethod(time.perf_counter)
    mark = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    def between(self, first: float, last: float) -> float:
        return last - first

    def sync(self) -> None:
        pass


class CudaClock:
    """Marks are CUDA events of the driver API, on torch's current stream."""

    now = staticmethod(time.perf_counter)
    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        import torch
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # makes torch's context the current one
        self._driver = driver
        self._stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        self.sync = torch.cuda.synchronize

    def mark(self) -> _Event:
        event = _Event(self._driver)
        _check(self._driver.cuEventRecord(event.handle, self._stream))
        return event

    def between(self, first: _Event, last: _Event) -> float:
        _check(self._driver.cuEventSynchronize(last.handle))
        return _check(self._driver.cuEventElapsedTime(first.handle, last.handle)) * 1e-3


class _Event:
    """A CUDA event that lives as long as this object."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.handle = _check(driver.cuEventCreate(0))  # 0: with timing

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._driver.cuEventDestroy(self.handle)


def _check(answer: tuple) -> Any:
    """The driver's ``(error, value…)`` without the error, which is raised if there is one."""
    error, *values = answer
    if int(error):
        raise RuntimeError(f"the CUDA driver answered {error.name} ({int(error)}) to an event call")
    return values[0] if values else None


@dataclass(frozen=True)
class Turn:
    """What one peer's turn gave: seconds per call, one sample per timed stretch, and when on the host's clock."""

    samples: tuple[float, ...]
    began: float
    ended: float
    host_bound: bool = False


def estimate(clock: Clock, call: Call) -> float:
    """Seconds per call, from one timed call after an untimed one."""
    call()
    first = clock.mark()
    call()
    return max(clock.between(first, clock.mark()), 1e-7)


def burst(clock: Clock, call: Call, per_call: float, *, busy: float, idle: float) -> Turn:
    """Time about ``busy`` seconds of calls after ``idle`` seconds of rest: one sample, from a cool clock.

    The turn is host-bound when queueing the calls took the host about as long as running them took the device: then the
    figure says how fast the host is.
    """
    clock.sync()
    clock.sleep(idle)
    began = clock.now()
    for _ in range(math.ceil(WARM_SECONDS / per_call)):
        call()
    calls = max(1, round(busy / per_call))
    first = clock.mark()
    queued_from = clock.now()
    for _ in range(calls):
        call()
    queued_until = clock.now()
    seconds = clock.between(first, clock.mark())
    host_bound = calls > 1 and queued_until - queued_from > 0.9 * seconds
    return Turn((seconds / calls,), began, clock.now(), host_bound)


def sustained(clock: Clock, call: Call, per_call: float, *, seconds: float) -> Turn:
    """Load the device for ``seconds`` without a gap; one sample per window of about 50 ms, once power has settled."""
    calls = max(1, round(WINDOW_SECONDS / per_call))
    began = clock.now()
    counted_from = began + SETTLE * seconds
    marks: deque[Any] = deque([clock.mark()])
    samples: list[float] = []
    while len(marks) < 2 or clock.now() - began < seconds:
        for _ in range(calls):
            call()
        marks.append(clock.mark())
        if len(marks) > QUEUE_AHEAD:
            window = clock.between(marks[0], marks[1])
            marks.popleft()
            if clock.now() - window >= counted_from:
                samples.append(window / calls)
    ended = clock.now()
    samples += [clock.between(a, b) / calls for a, b in itertools.pairwise(marks)]
    return Turn(tuple(samples), counted_from, ended)


def host_side(clock: Clock, call: Call, *, calls: int) -> Turn:
    """Host seconds of each of ``calls`` calls; the device is waited for, untimed, every few calls."""
    call()
    clock.sync()
    began = clock.now()
    samples = []
    for i in range(calls):
        if i % UNWAITED_CALLS == 0:
            clock.sync()
        start = clock.now()
        call()
        samples.append(clock.now() - start)
    clock.sync()
    return Turn(tuple(samples), began, clock.now())


def scatter(rounds: Sequence[float]) -> tuple[float, float]:
    """``(median, spread)`` of a few rounds; the spread is half of their whole range as a fraction of the median.

    With a handful of rounds a quartile is one of them, and leaves out just the visit in which the card was another.
    """
    median = statistics.median(rounds)
    return median, (max(rounds) - min(rounds)) / 2 / median if median else 0.0


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """``(median, spread)``; the spread is half the interquartile range as a fraction of the median."""
    median = statistics.median(samples)
    if len(samples) < 2 or median == 0:
        return median, 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, (high - low) / 2 / median
