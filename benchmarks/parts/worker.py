"""The process that measures the parts, and the parent's handle on it. Probes of one job take turns, round by round.

The SM clock is read right after every burst, by a kernel that counts SM clocks while the card's global timer runs:
a burst is shorter than the period at which the driver's own readings change.
"""

from __future__ import annotations

import importlib
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.parts import kernels
from benchmarks.parts.catalogue import HOST, Probe
from benchmarks.parts.limits import Limits, assess
from benchmarks.parts.results import Figure
from benchmarks.results import DeviceLostError, one_line
from benchmarks.settings import Crew, Settings
from benchmarks.supervise import Supervisor
from benchmarks.timing import burst, estimate, host_side, summary
from cute_attn.command import leave_interrupts_to_parent

HOST_CALLS = 400
SCRATCH_BYTES = 512 << 20
COPY_BYTES = 1 << 30
Job = tuple[list[Probe], Path, dict[str, tuple[str, str]]]


@dataclass
class Entrant:
    """A probe in its job: what it calls, and what it has given so far."""

    probe: Probe
    figure: Figure
    call: Callable[[], Any] | None = None
    per_call: float = 0.0
    turns: list[Any] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)


class Bench:
    """Measures jobs. ``device`` hands out memory and streams; ``read_clock`` gives the SM clock in Hz, or ``None``."""

    def __init__(
        self,
        clock: Any,
        limits: Limits,
        device: Any,
        settings: Settings,
        *,
        read_clock: Callable[[], float | None] = lambda: None,
        meter: Any = None,
        notify: Callable[[str | None], None] = lambda _: None,
        load: Callable[[kernels.Kernel, Path], Any] = kernels.load,
    ) -> None:
        self._clock, self._limits, self._device, self._settings = clock, limits, device, settings
        self._read_clock, self._meter, self._notify, self._load = read_clock, meter, notify, load

    def figures(self, job: Job) -> list[Figure]:
        """A figure for each probe of a job; those in ``lost`` were lost already."""
        probes, folder, lost = job
        entrants = [Entrant(probe, figure_of(probe)) for probe in probes]
        for entrant in entrants:
            if entrant.probe.key in lost:
                entrant.figure.lose(*lost[entrant.probe.key])
            else:
                self._turn(entrant, self._enter, entrant, folder)
        for _ in range(self._settings.rounds):
            for entrant in entrants:
                if entrant.call is not None:
                    self._turn(entrant, self._take_turn, entrant)
        seconds = {e.probe.what: self._median(e) for e in entrants if e.turns and e.figure.status == "ok"}
        for entrant in entrants:
            self._finish(entrant, seconds)
        return [entrant.figure for entrant in entrants]

    def _enter(self, entrant: Entrant, folder: Path) -> None:
        probe = entrant.probe
        compiled = None if probe.kernel is None else self._load(probe.kernel, folder)
        part = importlib.import_module(f"benchmarks.parts.{probe.kernel.part if probe.kernel else probe.part}")
        call, entrant.figure.work = part.prepare(probe, compiled, self._device)
        entrant.per_call = estimate(self._clock, call)
        entrant.call = call

    def _take_turn(self, entrant: Entrant) -> None:
        s = self._settings
        assert entrant.call is not None
        if entrant.probe.size == HOST:
            entrant.turns.append(host_side(self._clock, entrant.call, calls=HOST_CALLS))
            return
        entrant.turns.append(burst(self._clock, entrant.call, entrant.per_call, busy=s.burst_s, idle=s.idle_s))
        if (hz := self._read_clock()) is not None:
            entrant.clocks.append(hz)

    def _turn(self, entrant: Entrant, do: Callable[..., None], *arguments: Any) -> None:
        """What ``do`` does is the entrant's: its exceptions cost it its figure and nobody else's."""
        self._notify(entrant.probe.key)
        try:
            do(*arguments)
        except Exception as error:
            entrant.call = None
            entrant.figure.lose("failed", one_line(error))
            try:
                self._clock.sync()
            except Exception:
                raise DeviceLostError(entrant.probe.key, f"{entrant.figure.reason}; the device is lost") from None
        finally:
            self._notify(None)

    def _median(self, entrant: Entrant) -> float:
        return summary([sample for turn in entrant.turns for sample in turn.samples])[0]

    def _finish(self, entrant: Entrant, seconds: dict[str, float]) -> None:
        figure, probe = entrant.figure, entrant.probe
        if figure.status != "ok" or not entrant.turns:
            return
        samples = [sample for turn in entrant.turns for sample in turn.samples]
        figure.seconds, figure.spread = summary(samples)
        figure.samples = [] if probe.size == HOST else samples
        hz = statistics.median(entrant.clocks) if entrant.clocks else None
        figure.sm_mhz = None if hz is None else hz / 1e6
        readings = [r for t in entrant.turns if self._meter is not None and (r := self._meter.over(t.began, t.ended))]
        figure.watts = statistics.fmean(watts for _, watts in readings) if readings else None
        beside = seconds.get(probe.beside)
        if beside is not None and probe.size != HOST:  # a graph's time is that of all its launches
            beside /= figure.work["launch"]
        figure.take(assess(figure.work, figure.seconds, hz, self._limits, beside))


def figure_of(probe: Probe) -> Figure:
    return Figure(probe.part, probe.shape.name, probe.mechanism, probe.what, shipped=probe.shipped, seqlen=probe.seqlen)


class Device:
    """Memory, streams and graphs of the current CUDA device, as the parts' ``prepare`` asks for them."""

    def __init__(self, sm_count: int) -> None:
        import torch

        from cute_attn.private import raw_stream

        self._torch, self._raw_stream = torch, raw_stream
        self.sm_count = sm_count
        self._scratch = torch.randn(SCRATCH_BYTES // 2, device="cuda", dtype=torch.bfloat16)
        self._index = torch.cuda.current_device()

    def stream(self) -> int:
        return self._raw_stream(self._index)

    def random(self, elements: int) -> Any:
        """The first of the Gaussian bf16 elements that all probes read from."""
        return self._scratch[:elements]

    def sink(self, elements: int) -> Any:
        return self._torch.empty(elements, device="cuda", dtype=self._torch.float32)

    def inputs(self, case: Case) -> tuple[Any, Any, Any]:
        """q, k, v of a case, side by side in the random elements."""
        shapes = [case.shape_of(name) for name in "qkv"]
        sizes = [math.prod(shape) for shape in shapes]
        q, k, v = self._scratch[: sum(sizes)].split(sizes)
        return q.view(shapes[0]), k.view(shapes[1]), v.view(shapes[2])

    def like(self, x: Any) -> Any:
        return self._torch.empty_like(x)

    def memset(self) -> Callable[[], None]:
        """Sets one byte, through cuda-python: the least that can be queued."""
        from cuda.bindings import driver

        byte = self._torch.empty(1, device="cuda", dtype=self._torch.uint8)
        address = byte.data_ptr()

        def call(keep: Any = byte) -> None:
            error = driver.cuMemsetD8Async(address, 0, 1, self.stream())[0]
            if int(error):
                raise RuntimeError(f"the CUDA driver answered {error.name} to a memset")

        return call

    def graph_of(self, call: Callable[[], None], times: int) -> Callable[[], None]:
        """A CUDA graph of ``times`` calls in a row."""
        call()
        self._torch.cuda.synchronize()
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay

    def copy_rate(self, clock: Any) -> float:
        """Bytes a second of a copy within the device's memory, reads and writes counted."""
        source = self._torch.randint(-128, 128, (COPY_BYTES,), device="cuda", dtype=self._torch.int8)
        target = self._torch.empty_like(source)
        seconds, _ = summary([estimate(clock, lambda: target.copy_(source)) for _ in range(9)])
        return 2 * COPY_BYTES / seconds

    def clock_reader(self, compiled: Any, ns: int) -> Callable[[], float | None]:
        """The SM clock in Hz, from ``launch``'s ``clock`` kernel."""
        ticks = self._torch.zeros(2, device="cuda", dtype=self._torch.int64)

        def read() -> float | None:
            compiled(ticks, ns, self.stream())
            clocks, elapsed = ticks.tolist()  # waits for it
            return clocks / elapsed * 1e9 if elapsed > 0 else None

        return read


def main(connection: Connection, crew: Crew, settings: Settings) -> None:
    """Serve jobs until told to stop; the messages are those of ``benchmarks.worker``, with figures instead of a cell.

    A first job ``("clock", kernel, folder)`` brings the clock reader.
    """
    leave_interrupts_to_parent()
    warnings.filterwarnings("ignore")
    from benchmarks import card
    from benchmarks.worker import open_bench

    opened, source = open_bench()
    facts, clock = card.describe(source), opened.clock
    about: dict[str, Any] = {"card": facts, "versions": card.versions(), "before": opened.state()}
    device = None
    limits = Limits(0, None, None)
    if facts["device"] == "cuda":
        device = Device(facts["sm_count"])
        limits = Limits.of(facts, device.copy_rate(clock))
        about["copy_tbytes_per_s"] = (limits.copy_bytes_per_s or 0.0) / 1e12
    connection.send(("about", about))
    read_clock: Callable[[], float | None] = lambda: None  # noqa: E731
    while (job := connection.recv()) is not None:
        if job[0] == "clock":
            read_clock = _reader(device, *job[1:])
            connection.send(("clock", read_clock()))
            continue
        bench = Bench(
            clock,
            limits,
            device,
            settings,
            read_clock=read_clock,
            meter=opened.meter,
            notify=lambda key: connection.send(("turn", key)),
        )
        try:
            found = bench.figures(job)
        except DeviceLostError as error:
            connection.send(("lost", error.peer, str(error)))
            return
        connection.send(("figures", found))
    connection.send(("state", opened.state()))
    opened.close()


def _reader(device: Any, kernel: kernels.Kernel, folder: Path) -> Callable[[], float | None]:
    from benchmarks.parts.launch import SPIN_NS

    try:
        return device.clock_reader(kernels.load(kernel, folder), SPIN_NS)
    except Exception:  # without it, limits that need the clock are missing, and nothing else
        return lambda: None


class Measurer(Supervisor):
    """The measuring process and its replacements: a probe that takes it down has lost its figure and nothing else."""

    def __init__(
        self,
        settings: Settings,
        clock_kernel: kernels.Kernel | None,
        folder: Path,
        watch: Callable[[str | None], None] = lambda _: None,
        target: Callable[..., None] = main,
    ) -> None:
        super().__init__(Crew(), settings, watch, target)
        self._clock_kernel, self._folder = clock_kernel, folder
        self._ready: Any = None

    def figures(self, probes: Sequence[Probe]) -> list[Figure]:
        """Measure a job. Raises ``WorkerError`` where no measuring process can be started at all."""
        lost: dict[str, tuple[str, str]] = {}
        while True:
            self.start()
            self._bring_clock()
            answer = self._ask((list(probes), self._folder, lost))  # type: ignore[arg-type]
            if isinstance(answer, list):
                return answer
            self.stop()
            if answer.peer is None or answer.peer in lost:
                return [lost_figure(probe, "failed", answer.reason) for probe in probes]
            lost[answer.peer] = (answer.status, answer.reason)

    def _bring_clock(self) -> None:
        """Give a new process the clock reader."""
        if self._ready is not self._process and self._clock_kernel is not None:
            self._ask(("clock", self._clock_kernel, self._folder))  # type: ignore[arg-type]
            self._ready = self._process


def lost_figure(probe: Probe, status: str, reason: str) -> Figure:
    figure = figure_of(probe)
    figure.lose(status, reason)
    return figure
