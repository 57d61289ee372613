"""What a run of the parts leaves behind: one JSON file, rewritten whole after every job."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.parts.limits import Assessment, Limits, assess
from benchmarks.results import read_json, write_json

SCHEMA = "parts 1"


@dataclass
class Figure:
    """One probe's outcome. ``seconds`` is the median of one launch, ``spread`` half the interquartile range of
    ``samples`` as a fraction of it; ``rate`` and ``limit`` are in ``unit``; ``ratio`` is the share of the limit."""

    part: str
    config: str
    mechanism: str
    what: str
    shipped: bool = False
    seqlen: int = 0
    spills: int | None = None  # of the kernel, where its code was read: then it isn't only the part that takes time
    status: str = "ok"
    reason: str = ""
    seconds: float | None = None
    spread: float | None = None
    samples: list[float] = field(default_factory=list)
    sm_mhz: float | None = None
    watts: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    rate: float | None = None
    limit: float | None = None
    ratio: float | None = None
    limit_is: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.seconds is not None

    @property
    def label(self) -> str:
        return f"{self.config} {self.what}"

    def lose(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def take(self, found: Assessment) -> None:
        self.unit, self.rate, self.limit = found.unit, found.rate, found.limit
        self.ratio, self.limit_is = found.ratio, found.limit_is


@dataclass
class PartsRecord:
    """A whole run. ``about`` says on what: card, its state before and after, versions, limits, settings."""

    about: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    complete: bool = False

    def of_part(self, part: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.part == part]

    def save(self, path: Path) -> None:
        fields = {"schema": SCHEMA, "complete": self.complete, "about": self.about}
        write_json(path, fields | {"figures": [asdict(figure) for figure in self.figures]})

    @staticmethod
    def load(path: Path) -> PartsRecord:
        needed = "a result file written by parts --json is needed"
        fields = read_json(path, needed)
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise ValueError(f"{path} holds no figures of parts, or of another version; {needed}")
        record = PartsRecord(fields["about"], [Figure(**figure) for figure in fields["figures"]], fields["complete"])
        record.assess()
        return record

    def assess(self) -> None:
        """Hold what was measured against the limits as they are known now; launches have theirs from beside them."""
        card = self.about.get("card", {})
        if "sm_count" not in card:
            return
        copy_rate = self.about.get("copy_tbytes_per_s")
        limits = Limits.of(card, copy_rate and copy_rate * 1e12)
        for figure in self.figures:
            if figure.ok and figure.seconds and figure.work and figure.part != "launch":
                hz = None if figure.sm_mhz is None else figure.sm_mhz * 1e6
                figure.take(assess(figure.work, figure.seconds, hz, limits))
