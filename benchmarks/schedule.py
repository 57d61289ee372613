"""Which cell is visited when: the whole list of cells in several passes, so that a cell's rounds lie minutes apart.

A card's clock and temperature drift, and where tensors come to lie in its memory changes rates too. Rounds of one visit
share all of that and agree to a few tenths of a per cent where a second run differs by several. Spread over passes, they
see what a second run would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.cases import Case
from benchmarks.settings import Settings

Job = tuple[str, Case]


class Schedule:
    """The visits to a list of jobs, ``(pass, kind, case, rounds)``; ``rounds`` are those of the cell's rounds that the
    visit takes.

    With a budget in seconds, counted from ``began``, the first pass takes one round, so that every cell gets a figure
    first. A later pass takes more where the pass before it says that there is time for all that is planned. No visit
    begins once the budget is spent.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        budget: float | None = None,
        *,
        began: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs, self._settings, self._budget, self._now = jobs, settings, budget, now
        self._began = now() if began is None else began
        self._taken = dict.fromkeys((kind for kind, _ in jobs), 0)
        self.complete = False  # whether every job has been visited at least once

    def __iter__(self) -> Iterator[tuple[int, str, Case, range]]:
        pace = math.inf  # seconds for one round of every job, with all else that a visit takes
        for number in range(self._settings.passes):
            counts = self._counts(number, pace)
            began = self._now()
            for kind, case in self._jobs:
                first = self._taken[kind]
                if counts[kind]:
                    if self._left() < 0:
                        return
                    yield number, kind, case, range(first, first + counts[kind])
            self.complete = True
            for kind, count in counts.items():
                self._taken[kind] += count
            pace = (self._now() - began) / max(1, *counts.values())

    def _left(self) -> float:
        return math.inf if self._budget is None else self._budget - (self._now() - self._began)

    def _counts(self, number: int, pace: float) -> dict[str, int]:
        """The rounds that each kind takes in a pass: an even share of those that are left."""
        left = {kind: self._settings.rounds_of(kind) - taken for kind, taken in self._taken.items()}
        counts = {kind: math.ceil(rounds / (self._settings.passes - number)) for kind, rounds in left.items()}
        if self._budget is not None and pace * max(left.values(), default=0) > self._left():
            return {kind: min(count, 1) for kind, count in counts.items()}
        return counts

    def __len__(self) -> int:
        """The visits of all passes, were there time for them."""
        passes, rounds_of = self._settings.passes, self._settings.rounds_of
        return sum(min(passes, rounds_of(kind)) for kind, _ in self._jobs)
