"""The card: what it is, what its clocks and its power say while it works, and which software drives it.

Readings come from NVML, the library behind ``nvidia-smi``, which every driver installs; where it can't be loaded,
``nvidia-smi`` itself is read. Nothing here changes a setting of the card.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import platform
import shutil
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

PERIOD_SECONDS = 0.05
# Dense bf16 FLOPs of one SM's tensor cores in one clock, by compute capability: datasheet rate / (SMs · boost clock).
# A100: 312e12 / (108 · 1.41e9); H100 and H200 SXM: 989e12 / (132 · 1.83e9); B200: 2.25e15 / (148 · 1.85e9).
TENSOR_FLOP_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
PACKAGES = (
    "torch", "triton", "nvidia-cutlass-dsl", "cuda-bindings", "apache-tvm-ffi", "flash-attn", "flash-attn-3",
    "flash-attn-4", "cute-attn",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One look at the card: host time (perf_counter) in s, SM clock in MHz, board power in W, temperature in °C."""

    time: float
    sm_mhz: float
    watts: float
    celsius: float | None = None


class Source(Protocol):
    def driver(self) -> str:
        """The driver's version."""
        ...

    def power_limit(self) -> float:
        """The board's power limit in W."""
        ...

    def readings(self, stop: threading.Event) -> Iterator[Reading]:
        """A reading every 50 ms until ``stop`` is set."""
        ...


class Nvml:
    """NVML through ctypes: a handful of its functions, no package needed."""

    CLOCK_SM, TEMPERATURE_GPU, POWER_INSTANT = 1, 0, 186  # nvml.h

    class _Field(ctypes.Structure):  # nvmlFieldValue_t
        _fields_ = (
            ("field", ctypes.c_uint),
            ("scope", ctypes.c_uint),
            ("timestamp", ctypes.c_longlong),
            ("latency", ctypes.c_longlong),
            ("value_type", ctypes.c_int),
            ("status", ctypes.c_int),
            ("value", ctypes.c_ulonglong),
        )

    def __init__(self, pci: str) -> None:
        self._lib = ctypes.CDLL("libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByPciBusId_v2", pci.encode(), ctypes.byref(self._device))

    def _ask(self, function: str, *arguments: Any) -> None:
        if status := getattr(self._lib, function)(*arguments):
            raise OSError(f"NVML answered {status} to {function}")

    def _number(self, function: str, *arguments: Any) -> int:
        number = ctypes.c_uint()
        self._ask(function, self._device, *arguments, ctypes.byref(number))
        return number.value

    def driver(self) -> str:
        text = ctypes.create_string_buffer(80)
        self._ask("nvmlSystemGetDriverVersion", text, len(text))
        return text.value.decode()

    def power_limit(self) -> float:
        return self._number("nvmlDeviceGetEnforcedPowerLimit") / 1000

    def _watts(self) -> float:
        # The plain power reading is a mean over one second, longer than many a turn; this field is not.
        field = self._Field(field=self.POWER_INSTANT)
        status = self._lib.nvmlDeviceGetFieldValues(self._device, 1, ctypes.byref(field))
        if status or field.status:
            return self._number("nvmlDeviceGetPowerUsage") / 1000
        return (field.value & 0xFFFFFFFF) / 1000

    def readings(self, stop: threading.Event) -> Iterator[Reading]:
        while not stop.is_set():
            mhz = self._number("nvmlDeviceGetClockInfo", self.CLOCK_SM)
            celsius = self._number("nvmlDeviceGetTemperature", self.TEMPERATURE_GPU)
            yield Reading(time.perf_counter(), mhz, self._watts(), celsius)
            stop.wait(PERIOD_SECONDS)


class Smi:
    """The same from ``nvidia-smi``, whose lines are read as they come."""

    def __init__(self, pci: str) -> None:
        if shutil.which("nvidia-smi") is None:
            raise OSError("nvidia-smi is not on the PATH")
        self._command = ["nvidia-smi", f"--id={pci}", "--format=csv,noheader,nounits"]

    def _query(self, fields: str) -> str:
        command = [*self._command, f"--query-gpu={fields}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    def driver(self) -> str:
        return self._query("driver_version")

    def power_limit(self) -> float:
        return float(self._query("enforced.power.limit"))

    def readings(self, stop: threading.Event) -> Iterator[Reading]:
        fields = "--query-gpu=clocks.sm,power.draw,temperature.gpu"
        command = [*self._command, fields, f"--loop-ms={PERIOD_SECONDS * 1e3:.0f}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                for line in process.stdout or ():
                    if (reading := parse_smi(line, time.perf_counter())) is not None:
                        yield reading
                    if stop.is_set():
                        return
            finally:
                process.terminate()


def parse_smi(line: str, now: float) -> Reading | None:
    """``1980, 312.05, 41`` → a reading; ``None`` for a line that isn't one (``[N/A]``, an error message)."""
    try:
        mhz, watts, celsius = (float(part) for part in line.split(","))
    except ValueError:
        return None
    return Reading(now, mhz, watts, celsius)


class Meter:
    """Reads the card every 50 ms in a thread of its own, and says what held over a stretch of time."""

    def __init__(self, source: Source) -> None:
        self._readings: deque[Reading] = deque(maxlen=100_000)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
        self._thread.start()

    def _run(self, source: Source) -> None:
        try:
            for reading in source.readings(self._stop):
                self._readings.append(reading)
        except Exception:  # a lost meter costs the clock and power columns, not the run
            return

    def over(self, began: float, ended: float) -> tuple[float, float] | None:
        """``(MHz, W)``: the median clock and the mean power between two host times; ``None`` without a reading."""
        inside = [r for r in tuple(self._readings) if began <= r.time <= ended]
        if not inside:
            return None
        return statistics.median(r.sm_mhz for r in inside), statistics.fmean(r.watts for r in inside)

    def latest(self) -> dict | None:
        """The last reading, as the "before" and "after" of a result file."""
        deadline = time.perf_counter() + 2
        while not self._readings and self._thread.is_alive() and time.perf_counter() < deadline:
            time.sleep(PERIOD_SECONDS)
        return {k: v for k, v in asdict(self._readings[-1]).items() if k != "time"} if self._readings else None

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2)


def open_source() -> Source | None:
    """The first source that gives a reading of torch's current CUDA device."""
    for kind in (Nvml, Smi):
        try:
            source = kind(pci_bus_id())
            source.driver(), source.power_limit(), next(source.readings(threading.Event()))
            return source
        except Exception:  # a driver without one of NVML's functions, an nvidia-smi that prints [N/A]: try the next
            continue
    return None


def pci_bus_id() -> str:
    """The PCI address of torch's current CUDA device; unlike its index, NVML and CUDA agree on it."""
    import torch
    from cuda.bindings import runtime

    error, text = runtime.cudaDeviceGetPCIBusId(32, torch.cuda.current_device())
    if int(error):
        raise RuntimeError(f"the CUDA runtime answered {error.name} when asked for the card's PCI address")
    return (text.decode() if isinstance(text, bytes) else str(text)).split("\0")[0]


def date() -> str:
    """Now, as result files have it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def about() -> dict[str, Any]:
    """What a result file says of its run: when it was, on what, and with which versions."""
    return {"date": date(), "card": describe(open_source()), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of everything that can change a figure; packages that aren't installed are left out."""
    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def describe(source: Source | None) -> dict[str, Any]:
    """The machine's part of a result file: name, size and driver of the card, or the processor where there is none."""
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (facts.major, facts.minor)
    return {
        "device": "cuda",
        "name": facts.name,
        "capability": capability,
        "sm_count": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "memory_bytes": facts.total_memory,
        "tensor_flop_per_clock": facts.multi_processor_count * TENSOR_FLOP_PER_CLOCK.get(capability, 0) or None,
        "power_limit_watts": source.power_limit() if source else None,
        "driver": source.driver() if source else None,
    }
