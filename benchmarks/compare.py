"""What changed between two result files by more than the figures scatter."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.results import Cell, Measurement, Record

# What two runs of the same thing differ by at the least, by kind: one card's clock from day to day, a loaded host.
FLOOR = {"burst": 0.01, "sustained": 0.01, "host": 0.05, "first": 0.25}
WORSE = ("slower", "broken")


@dataclass(frozen=True)
class Change:
    """One peer in one cell, then and now.

    ``verdict`` is ``slower``, ``faster`` or ``same`` (seconds per call, against ``threshold``), ``broken`` (had a
    figure, has none now), ``mended``, ``gone`` or ``new``. ``change`` is new / old − 1 in seconds: slower is above 0.
    """

    cell: Cell
    peer: str
    verdict: str
    change: float | None = None
    threshold: float | None = None
    reason: str = ""

    def describe(self) -> str:
        what = f"{self.cell.kind}: {self.cell.case.label}: {self.peer}"
        if self.change is None or self.threshold is None:
            return f"{what}: {self.verdict}" + (f" ({self.reason})" if self.reason else "")
        return f"{what}: {self.verdict}, {self.change:+.1%} time per call (more than ±{self.threshold:.1%} counts)"


def compare(old: Record, new: Record) -> list[Change]:
    """Every peer of every cell of either run. Times differ by more than both spreads together and the floor."""
    before = {cell.key: cell for cell in old.cells}
    after = {cell.key: cell for cell in new.cells}
    changes = []
    for key, cell in {**before, **after}.items():
        then = before[key].results if key in before else {}
        now = after[key].results if key in after else {}
        changes += [_change(cell, peer, then.get(peer), now.get(peer)) for peer in {**then, **now}]
    return changes


def _change(cell: Cell, peer: str, then: Measurement | None, now: Measurement | None) -> Change:
    if then is None or now is None:
        return Change(cell, peer, "new" if then is None else "gone")
    if not then.ok or not now.ok:
        verdict = "same" if then.ok == now.ok else "broken" if then.ok else "mended"
        return Change(cell, peer, verdict, reason=now.status if not now.reason else f"{now.status}: {now.reason}")
    if then.seconds is None or now.seconds is None:  # ok says otherwise; this says it to the type checker
        return Change(cell, peer, "same")
    change = now.seconds / then.seconds - 1
    threshold = max((then.spread or 0.0) + (now.spread or 0.0), FLOOR[cell.kind])
    verdict = "slower" if change > threshold else "faster" if change < -threshold else "same"
    return Change(cell, peer, verdict, change, threshold)


def caveats(old: Record, new: Record) -> list[str]:
    """What makes two runs hard to compare: another card, driver, or version."""
    found = []
    for part, names in (("card", ("name", "driver", "power_limit_watts")), ("versions", ())):
        then, now = old.about.get(part, {}), new.about.get(part, {})
        for name in names or sorted({*then, *now}):
            if then.get(name) != now.get(name):
                found.append(f"{name} was {then.get(name, 'not there')} and is {now.get(name, 'not there')}")
    return found
