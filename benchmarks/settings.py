"""How to measure and who is asked: what the command line decides and the measuring process is told."""

from __future__ import annotations

from dataclasses import dataclass

# In a host cell, for one in another: with kernels they take milliseconds, and one of them is to find the machine quiet.
HOST_ROUNDS = {"cuda": 10, "cpu": 1}


@dataclass(frozen=True)
class Settings:
    """How to measure. Times are in seconds; ``limit_s`` is what one peer may use of one cell, with all it compiles.

    A burst is ``burst_s`` of work after ``idle_s`` of rest, ``rounds`` times. Sustained load is ``sustained_s`` per
    peer and cell, in ``sustained_rounds`` turns. The rounds of a cell are spread over ``passes`` visits to it, between
    which all the other cells are visited: rounds of one visit are seconds apart, and agree better with each other than
    with a second run.
    """

    rounds: int = 6
    passes: int = 3
    burst_s: float = 0.010
    idle_s: float = 0.050
    sustained_s: float = 2.0
    sustained_rounds: int = 2
    limit_s: float = 120.0
    seed: int = 0

    def rounds_of(self, kind: str) -> int:
        """The rounds that a cell takes in all its visits; kinds that a repetition teaches nothing take one."""
        return {"burst": self.rounds, "host": self.rounds, "sustained": self.sustained_rounds}.get(kind, 1)


@dataclass(frozen=True)
class Crew:
    """Who is asked to take part: peer names (``None`` for all that can), and modules that register more of them."""

    names: tuple[str, ...] | None = None
    modules: tuple[str, ...] = ()
    quick: bool = False
