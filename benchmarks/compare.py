"""What changed between two result files by more than the figures scatter.

A figure's spread is half the range of its rounds, or what three in four of its run's figures scatter by, if that is more: so
it is printed, and two runs of the same thing differ by no more than their two. To count as a change, a difference has to be
larger than that, and than what nine in ten of all figures of the two runs scatter by. Of the host's figures the least of the
rounds are compared, and as far as a quarter of the rounds reach above it is what they scatter by; of all others the medians.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.anchors import geometric_mean
from benchmarks.results import RATES, Cell, Measurement, Record, is_ours

# What two runs of the same thing differ by at the least, by kind: one card's clock from day to day, a loaded host.
FLOOR = {"burst": 0.01, "sustained": 0.01, "host": 0.05, "memory": 0.01, "first": 0.25}
# Rounds of a single visit say nothing of the drift between two: runs of single visits were seen to differ by up to this.
ONE_VISIT_FLOOR = 0.04
NINE_IN_TEN = 0.9
WORSE = ("slower", "more", "broken")


@dataclass(frozen=True)
class Change:
    """One peer in one cell, then and now.

    ``verdict`` is ``slower``, ``faster`` or ``same`` (seconds per call, against ``threshold``; of ``memory``, bytes and
    ``more`` or ``less``), ``broken`` (had a figure, has none now), ``mended``, ``gone`` or ``new``. ``change`` is
    new / old − 1: slower is above 0. ``spread`` is what is printed with both figures, together.
    """

    cell: Cell
    peer: str
    verdict: str
    change: float | None = None
    threshold: float | None = None
    spread: float = 0.0
    reason: str = ""

    def describe(self) -> str:
        what = f"{self.cell.kind}: {self.cell.case.label}: {self.peer}"
        if self.change is None or self.threshold is None:
            return f"{what}: {self.verdict}" + (f" ({self.reason})" if self.reason else "")
        of = "memory" if self.cell.kind == "memory" else "time per call"
        return f"{what}: {self.verdict}, {self.change:+.1%} {of} (more than ±{self.threshold:.1%} counts)"


def compare(old: Record, new: Record) -> list[Change]:
    """Every peer of every cell of either run."""
    before = {cell.key: cell for cell in old.cells}
    after = {cell.key: cell for cell in new.cells}
    changes = []
    for key, cell in {**before, **after}.items():
        then = before[key].results if key in before else {}
        now = after[key].results if key in after else {}
        changes += [_change(cell, peer, (then.get(peer), now.get(peer)), (old, new)) for peer in {**then, **now}]
    return changes


def _change(
    cell: Cell, peer: str, figures: tuple[Measurement | None, Measurement | None], runs: tuple[Record, Record]
) -> Change:
    then, now = figures
    if then is None or now is None:
        return Change(cell, peer, "new" if then is None else "gone")
    if not then.ok or not now.ok:
        verdict = "same" if then.ok == now.ok else "broken" if then.ok else "mended"
        return Change(cell, peer, verdict, reason=now.status if not now.reason else f"{now.status}: {now.reason}")
    if cell.kind == "memory":
        return _change_of_memory(cell, peer, then.peak_bytes, now.peak_bytes)
    of_least = cell.kind == "host"
    seconds = [m.least if of_least else m.seconds for m in (then, now)]
    if seconds[0] is None or seconds[1] is None:  # ok says otherwise; this says it to the type checker
        return Change(cell, peer, "same")
    change = seconds[1] / seconds[0] - 1
    if of_least:  # which a round that was disturbed doesn't move
        spread, usual = then.above_least + now.above_least, 0.0
    else:
        spread = sum(run.printed_spread(cell.kind, m) for run, m in zip(runs, (then, now), strict=True))
        usual = sum(run.usual_spread(cell.kind, NINE_IN_TEN) for run in runs)
    one_visit = cell.kind in RATES and min(then.visits, now.visits) == 1
    threshold = max(spread, usual, ONE_VISIT_FLOOR if one_visit else FLOOR[cell.kind])
    verdict = "slower" if change > threshold else "faster" if change < -threshold else "same"
    return Change(cell, peer, verdict, change, threshold, spread)


def _change_of_memory(cell: Cell, peer: str, then: int | None, now: int | None) -> Change:
    if then is None or now is None:
        return Change(cell, peer, "same")
    change, threshold = (now - then) / max(then, 1), FLOOR["memory"]
    verdict = "more" if change > threshold else "less" if change < -threshold else "same"
    return Change(cell, peer, verdict, change, threshold)


@dataclass(frozen=True)
class Agreement:
    """How far two runs agree, over the figures that both have: ``within`` of them differ by no more than both printed
    spreads together, ``same`` by no more than what counts as a change. ``ours`` and ``others`` are the geometric means of
    new / old in seconds: where both moved alike, it was the card."""

    figures: int
    within: int
    same: int
    largest: float
    ours: float | None
    others: float | None


def agreement(changes: list[Change]) -> Agreement:
    """Of bursts."""
    both = [c for c in changes if c.cell.kind == "burst" and c.change is not None]
    moved = {mine: [1 + (c.change or 0.0) for c in both if is_ours(c.peer) == mine] for mine in (True, False)}
    means = {mine: geometric_mean(found) if found else None for mine, found in moved.items()}
    return Agreement(
        len(both),
        sum(abs(c.change or 0.0) <= c.spread for c in both),
        sum(c.verdict == "same" for c in both),
        max((abs(c.change or 0.0) for c in both), default=0.0),
        means[True],
        means[False],
    )


def caveats(old: Record, new: Record) -> list[str]:
    """What makes two runs hard to compare: another card, driver, or version."""
    found = []
    for part, names in (("card", ("name", "driver", "power_limit_watts")), ("versions", ())):
        then, now = old.about.get(part, {}), new.about.get(part, {})
        for name in names or sorted({*then, *now}):
            if then.get(name) != now.get(name):
                found.append(f"{name} was {then.get(name, 'not there')} and is {now.get(name, 'not there')}")
    return found
