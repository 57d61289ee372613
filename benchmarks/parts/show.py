"""Tables of a run of the parts for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.parts.catalogue import PARTS, Probe
from benchmarks.parts.kernels import Built
from benchmarks.parts.results import Figure, PartsRecord
from benchmarks.parts.verdict import verdicts
from benchmarks.report import headline

TITLES = {
    "copies": "global → shared memory",
    "products": "matrix products",
    "softmax": "online-softmax steps",
    "epilogue": "epilogue: O from registers to global memory",
    "whole": "the forward kernel with stages left out or done twice",
    "launch": "launches",
}
SHIPPED = "●"
MARKED = ("copies", "products", "softmax", "whole")  # where there is something else beside it


def show(record: PartsRecord, console: Console) -> None:
    """What it ran on, a table per part, why figures are missing, and what holds each configuration back."""
    console.print(headline(record))  # type: ignore[arg-type]
    if (rate := record.about.get("copy_tbytes_per_s")) is not None:
        console.print(f"device copy rate: {rate:.2f} TB/s, reads and writes counted")
    for part in PARTS:
        if figures := record.of_part(part):
            console.print(table(part, figures))
    if any(figure.shipped and figure.part in MARKED for figure in record.figures):
        console.print(f"{SHIPPED} what the plan ships")
    for figure in record.figures:
        if figure.status != "ok":
            console.print(f"{figure.part}: {figure.label} {figure.status}: {figure.reason}")
    if not record.complete:
        console.print("this run was not completed: what is missing above was not measured", style="yellow")
    for verdict in verdicts(record.figures):
        console.print(verdict.sentence, highlight=False, soft_wrap=True)


def table(part: str, figures: Iterable[Figure]) -> Table:
    """A row per figure: rate, limit, and the share of the limit that is reached."""
    found = Table(title=TITLES[part], title_justify="left")
    for heading in ("config", "mechanism", "what"):
        found.add_column(heading, no_wrap=True)
    for heading in ("rate", "limit", "of limit", "time", "SM MHz"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("the limit is", style="dim")
    before: str | None = None
    for figure in figures:
        if before not in (None, figure.config):
            found.add_section()
        before = figure.config
        found.add_row(*row(figure))
    return found


def row(figure: Figure) -> list[str]:
    what = f"{figure.what} {SHIPPED}" if figure.shipped and figure.part in MARKED else figure.what
    if figure.spills:
        what += f" ({figure.spills} spills)"
    if not figure.ok or figure.rate is None:
        return [figure.config, figure.mechanism, what, figure.status, "", "", "", "", ""]
    return [
        figure.config,
        figure.mechanism,
        what,
        f"{number(figure.rate)} {figure.unit} ±{figure.spread or 0:.1%}",
        "" if figure.limit is None else number(figure.limit),
        "" if figure.ratio is None else f"{figure.ratio:.0%}",
        duration(figure.seconds),
        "" if figure.sm_mhz is None else f"{figure.sm_mhz:.0f}",
        figure.limit_is,
    ]


def listing(probes: Iterable[Probe]) -> Table:
    """What would run."""
    found = Table(title="what would run", title_justify="left")
    for heading in ("part", "config", "mechanism", "what"):
        found.add_column(heading, no_wrap=True)
    for probe in probes:
        found.add_row(probe.part, probe.shape.name, probe.mechanism, probe.what)
    return found


def built_line(label: str, built: Built) -> str:
    """One compiled kernel in one line."""
    if built.error:
        return f"{label}: failed: {built.error}"
    facts = [f"{built.seconds:.1f} s"]
    if built.registers is not None:
        facts += [f"{built.registers} registers", f"{built.spills} spills"]
    if built.missing:
        facts.append(f"no loop holds {', '.join(built.missing)}")
    return f"{label}: {', '.join(facts)}"


def job_line(turns: tuple[str, Any, str], figures: list[Figure]) -> str:
    """One finished job in one line, for logs without a progress bar."""
    part, shape, mechanism = turns
    lost = [figure.what for figure in figures if figure.status != "ok"]
    line = f"{part}: {shape.name} {mechanism}: {len(figures) - len(lost)} measured"
    return line + (f", lost: {'; '.join(lost)}" if lost else "")


def number(value: float) -> str:
    """Three digits or so: 0.00123, 4.29, 15.8, 667."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: Any) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
