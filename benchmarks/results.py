"""What a run leaves behind: one JSON file, rewritten whole after every cell, so that a killed run keeps what it has."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.card import date
from benchmarks.cases import Case
from benchmarks.flops import bytes_moved, flops
from benchmarks.settings import Settings
from benchmarks.timing import scatter
from cute_attn.command import write_whole

SCHEMA = 1
KINDS = {
    "burst": "bursts of about 10 ms from a cool clock",
    "sustained": "continuous load at the power limit",
    "host": "host time of an eager call on small tensors",
    "memory": "peak memory of a call on long sequences",
    "first": "first call of a fresh process, with empty caches",
}
RATES = ("burst", "sustained")  # the kinds that give TFLOP/s over a grid; the others measure one small case
THREE_IN_FOUR = 0.75
DETERMINISTIC = "_deterministic"  # how the names of such peers end
_IN_DOCUMENTS = "python -m benchmarks docs, which writes its table,"
SHOWN_BY = {  # files of other kinds, by how their schema begins
    "parts": "python -m benchmarks parts --show",
    "layouts": "python -m benchmarks.layouts --show",
    **dict.fromkeys(("training", "serving", "masks", "model", "variants", "context"), _IN_DOCUMENTS),
}


@dataclass
class Measurement:
    """One peer in one cell.

    ``status`` is ``ok``, or why there is no figure: ``wrong`` (the result is), ``failed`` (it raised), ``timeout``,
    ``unsupported`` (the library doesn't compute this case). ``samples`` has the seconds per call of each round, its
    median where a round times several; ``visits`` is how many times the cell was visited for them. ``seconds`` is the
    median of the samples, ``spread`` half their range as a fraction of it. ``utilization`` is the share of what the
    tensor cores could do at ``sm_mhz``. ``error`` is ‖result − float64‖ / ‖float64‖, the largest over the outputs.
    ``peak_bytes`` is the memory a call needs beyond its outputs. ``host_bound``: the device was waiting for the host.
    """

    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    spread: float | None = None
    samples: list[float] = field(default_factory=list)
    tflops: float | None = None
    tbytes_per_s: float | None = None
    sm_mhz: float | None = None
    watts: float | None = None
    utilization: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    host_bound: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    visits: int = 1

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.seconds is not None

    @property
    def least(self) -> float | None:
        """Of the rounds the least, what a call costs the host: other processes only add to it."""
        return min(self.samples, default=self.seconds)

    @property
    def above_least(self) -> float:
        """How far a quarter of the rounds reach above the least, as a fraction of it: what another least would differ by."""
        if not self.least or len(self.samples) < 2:
            return 0.0
        return statistics.quantiles(self.samples, n=4, method="inclusive")[0] / self.least - 1

    def joined(self, later: Measurement) -> Measurement:
        """One measurement of this and of a later visit. Who failed in one of them has no figure."""
        if not self.ok:
            return self
        if not later.ok:
            return replace(later, visits=self.visits + later.visits)
        samples = [*self.samples, *later.samples]
        seconds, spread = scatter(samples)

        def rate(of: str) -> float | None:  # work / seconds, where work is the same in both
            now = getattr(later, of)
            return None if now is None else now * (later.seconds or 0.0) / seconds

        def mean(of: str) -> float | None:
            then, now = getattr(self, of), getattr(later, of)
            both = then is not None and now is not None
            return (then * self.visits + now * later.visits) / (self.visits + later.visits) if both else then or now

        return Measurement(
            seconds=seconds,
            spread=spread,
            samples=samples,
            tflops=rate("tflops"),
            tbytes_per_s=rate("tbytes_per_s"),
            sm_mhz=mean("sm_mhz"),
            watts=mean("watts"),
            utilization=mean("utilization"),
            error=_largest(self.error, later.error),
            peak_bytes=_largest(self.peak_bytes, later.peak_bytes),
            host_bound=self.host_bound or later.host_bound,
            extra={**later.extra, **self.extra},
            visits=self.visits + later.visits,
        )


def _largest(*values: Any) -> Any:
    """The largest of those that aren't ``None``."""
    return max((value for value in values if value is not None), default=None)


@dataclass
class Cell:
    """One case under one kind of measurement: a measurement per peer, and the matrix product that took turns with them.

    ``copy_tbytes_per_s`` is the device's measured copy rate, reads and writes counted.
    """

    kind: str
    case: Case
    results: dict[str, Measurement] = field(default_factory=dict)
    ceiling: Measurement | None = None
    copy_tbytes_per_s: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, Case]:
        return self.kind, self.case

    def rates(self) -> dict[str, float]:
        """TFLOP/s of every peer that has one."""
        return {name: m.tflops for name, m in self.results.items() if m.ok and m.tflops}

    @property
    def ours(self) -> float | None:
        """TFLOP/s of what a user gets by default: the better mechanism, ``deterministic=True`` left out."""
        rates = (rate for name, rate in self.rates().items() if is_ours(name) and not name.endswith(DETERMINISTIC))
        return max(rates, default=None)

    @property
    def memory_bound(self) -> bool:
        """At the measured limits, moving the case's bytes takes longer than its matrix products."""
        if not self.copy_tbytes_per_s or self.ceiling is None or not self.ceiling.tflops:
            return False
        return bytes_moved(self.case) / self.copy_tbytes_per_s > flops(self.case) / self.ceiling.tflops

    def joined(self, later: Cell) -> Cell:
        """One cell of this and of a later visit."""
        names = {**self.results, **later.results}
        results = {name: _joined(self.results.get(name), later.results.get(name)) for name in names}
        copy_rate = _largest(self.copy_tbytes_per_s, later.copy_tbytes_per_s)
        ceiling = None
        if self.ceiling is not None or later.ceiling is not None:
            ceiling = _joined(self.ceiling, later.ceiling)
        return Cell(self.kind, self.case, results, ceiling, copy_rate, self.note or later.note)

    @staticmethod
    def from_dict(fields: dict) -> Cell:
        ceiling = fields.get("ceiling")
        return Cell(
            fields["kind"],
            Case.from_dict(fields["case"]),
            {name: Measurement(**m) for name, m in fields["results"].items()},
            None if ceiling is None else Measurement(**ceiling),
            fields.get("copy_tbytes_per_s"),
            fields.get("note", ""),
        )


def _joined(first: Measurement | None, later: Measurement | None) -> Measurement:
    if first is None or later is None:
        return first or later or Measurement()
    return first.joined(later)


@dataclass
class Record:
    """A whole run. ``about`` says on what: card, its state before and after, versions, peers, settings."""

    about: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    complete: bool = False

    def of_kind(self, *kinds: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind in kinds]

    def of(self, kind: str, direction: str) -> list[Cell]:
        return [cell for cell in self.cells if (cell.kind, cell.case.direction) == (kind, direction)]

    def usual_spread(self, kind: str, share: float) -> float:
        """What ``share`` of the figures of one kind scatter by, or less."""
        figures = (m for cell in self.of_kind(kind) for m in cell.results.values())
        spreads = sorted(m.spread for m in figures if m.ok and m.spread is not None)
        return spreads[math.ceil(share * len(spreads)) - 1] if spreads else 0.0

    def printed_spread(self, kind: str, m: Measurement) -> float:
        """The ± of a figure: its own spread, but no less than what three in four of the run's figures have. A few rounds agree
        by chance more closely than the next run will agree with them; all figures of a run are seldom so lucky."""
        return max(m.spread or 0.0, self.usual_spread(kind, THREE_IN_FOUR))

    def add(self, visit: Cell) -> None:
        """A cell's visit: its first, or one more."""
        for i, cell in enumerate(self.cells):
            if cell.key == visit.key:
                self.cells[i] = cell.joined(visit)
                return
        self.cells.append(visit)

    def lost(self, kind: str, case: Case) -> dict[str, Measurement]:
        """The peers that have no figure in a cell, after the visits that it has had."""
        cells = (cell for cell in self.cells if cell.key == (kind, case))
        return {name: m for cell in cells for name, m in cell.results.items() if not m.ok}

    def all_lost(self, kind: str, case: Case) -> bool:
        """Whether a cell has been visited and nobody has a figure in it: a later visit has nobody to measure."""
        results = [m for cell in self.cells if cell.key == (kind, case) for m in cell.results.values()]
        return bool(results) and not any(m.ok for m in results)

    def failure(self, asked: Collection[str]) -> str:
        """What was asked for and failed, in a sentence, or nothing: visits that were lost, and cells of ours and of the peers
        in ``asked`` without the figure that they should have. Who isn't there or doesn't compute a case fails nothing."""
        failed = {
            name: sum(m.status not in ("ok", "unsupported") for m in found)
            for name in self.peer_names()
            if is_ours(name) or name in asked
            for found in [[cell.results[name] for cell in self.cells if name in cell.results]]
        }
        said = [f"{name} in {count} of its cells" for name, count in failed.items() if count]
        said += [f"{lost} whole cells"] if (lost := sum(bool(cell.note) for cell in self.cells)) else []
        if said:
            return f"failed: {', '.join(said)}; the reasons are above"
        if self.cells and not any(m.ok for cell in self.cells for m in cell.results.values()):
            return "failed: no peer has given any figure; who is missing, and why, is said above"
        return ""

    def peer_names(self, cells: list[Cell] | None = None) -> list[str]:
        """The peers of some cells, ours first, otherwise in the order in which they took part."""
        names = dict.fromkeys(name for cell in (self.cells if cells is None else cells) for name in cell.results)
        return sorted(names, key=lambda name: not is_ours(name))

    def save(self, path: Path) -> None:
        fields = {"schema": SCHEMA, "complete": self.complete, "about": self.about}
        write_json(path, fields | {"cells": [asdict(cell) for cell in self.cells]})

    @staticmethod
    def load(path: Path) -> Record:
        needed = "a result file written by --json is needed"
        fields = read_json(path, needed)
        if not isinstance(fields, dict) or "schema" not in fields:
            raise ValueError(f"{path} holds no results; {needed}")
        if other := SHOWN_BY.get(str(fields["schema"]).partition(" ")[0]):
            raise ValueError(f"{path} holds results of another kind ({fields['schema']}): {other} is for them")
        if fields["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {fields['schema']}; {SCHEMA} is needed: measure again")
        try:
            return Record(fields["about"], [Cell.from_dict(cell) for cell in fields["cells"]], fields["complete"])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks some of its results ({type(error).__name__}: {error}); {needed}") from None

    def save_csv(self, path: Path) -> None:
        """One line per peer and cell, with the counts that turn seconds into rates."""
        columns = ["status", "seconds", "least", "spread", "visits", "tflops", "tbytes_per_s", "sm_mhz", "watts", "utilization",
                   "error", "peak_bytes", "host_bound", "reason"]  # fmt: skip
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["kind", *Case.__dataclass_fields__, "flops", "bytes", "peer", *columns])
        for cell in self.cells:
            case = [cell.kind, *cell.case.to_dict().values(), flops(cell.case), bytes_moved(cell.case)]
            ceiling = {} if cell.ceiling is None else {"matmul": cell.ceiling}
            for name, m in {**cell.results, **ceiling}.items():
                writer.writerow([*case, name, *(getattr(m, column) for column in columns)])
        write_whole(path, text.getvalue())


def about_run(found: dict[str, Any], settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """What a record says of its run: when it was, how it was asked for, and what the measuring process ``found``."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if v is not None}
    return {"date": date(), "options": given, "settings": asdict(settings), **found}


class Keeper:
    """Keeps a run's file up to date, if it has one. Where it can't be written any more (a full disk, a lost mount), the run
    goes on; the first failure is said, and ``failed`` tells whether the last attempt was one."""

    def __init__(self, path: Path | None, say: Callable[[str], None]) -> None:
        self._path, self._say, self._said = path, say, False
        self.failed = False

    def save(self, record: Any) -> None:
        """Write a record, of whichever kind."""
        if self._path is None:
            return
        try:
            record.save(self._path)
            self.failed = False
        except OSError as error:
            self.failed = True
            if not self._said:
                self._say(f"{self._path} can't be written ({error}): measuring goes on, and the next cell tries again")
            self._said = True


def write_json(path: Path, fields: dict[str, Any], **how: Any) -> None:
    """Write a file of results so that a reader sees the old one or the new one, never half of one."""
    write_whole(path, json.dumps(fields, indent=1, **how) + "\n")


def read_json(path: Path, needed: str) -> Any:
    """What a file of results holds. Raises ``ValueError``, with what is ``needed``, where there is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); {needed}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {needed}") from None


class DeviceLostError(RuntimeError):
    """What ``peer`` did has left the device unusable for this process, which has to go."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(reason)
        self.peer = peer


def one_line(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def is_ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours_")
