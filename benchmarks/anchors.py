"""Rates recorded earlier on the same kind of card, for peers that can't be had where the live run takes place.

Two cards of one kind differ, and so do two days, and how hot the card was: one case by nothing, another by 20 %. The peers
that are in the recording and in the live run say by how much: the recorded rates of a case are multiplied by the geometric
mean of live / recorded over them in that case.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.results import Record

NAMES = {"fa4_cute": "fa4"}  # the recording's name of a peer, where it isn't ours
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}


@dataclass(frozen=True)
class Scale:
    """What the recorded rates of one direction were multiplied by, a factor a case, each from ``peers``."""

    peers: tuple[str, ...]
    factors: dict[Case, float]

    def describe(self) -> str:
        low, high = min(self.factors.values()), max(self.factors.values())
        return (
            f"rescaled case by case by the geometric mean of live / recorded of {', '.join(self.peers)}: "
            f"× {low:.3f} to {high:.3f} over {len(self.factors)} cases"
        )


@dataclass(frozen=True)
class Anchors:
    """Recorded TFLOP/s by case and peer, and how they were brought to the live run's scale, by direction; a case in which no
    recorded peer has taken part live keeps its rates."""

    origin: str
    rates: dict[Case, dict[str, float]]
    scales: dict[str, Scale] = field(default_factory=dict)

    def describe(self) -> str:
        if not self.scales:
            return f"{self.origin}; not rescaled, as no recorded peer took part in this run"
        return "; ".join([self.origin, *(f"{name} {scale.describe()}" for name, scale in self.scales.items())])

    def rescaled_to(self, record: Record) -> Anchors:
        """The same rates on the scale of a live run's bursts."""
        scales = {direction: self._scale(record, direction) for direction in DIRECTIONS.values()}
        factors = {case: factor for scale in scales.values() for case, factor in scale.factors.items()}
        rates = {
            case: {peer: rate * factors.get(case, 1.0) for peer, rate in row.items()} for case, row in self.rates.items()
        }
        return Anchors(self.origin, rates, {direction: scale for direction, scale in scales.items() if scale.factors})

    def _scale(self, record: Record, direction: str) -> Scale:
        """By the peers that are in both."""
        peers: dict[str, None] = {}
        factors: dict[Case, float] = {}
        for cell in record.of("burst", direction):
            recorded = self.rates.get(cell.case, {})
            quotients = {name: rate / recorded[name] for name, rate in cell.rates().items() if name in recorded}
            if quotients:
                factors[cell.case] = geometric_mean(list(quotients.values()))
                peers.update(dict.fromkeys(quotients))
        return Scale(tuple(peers), factors)


def load(path: Path) -> Anchors:
    """Read a recording. Raises ``ValueError`` for a file that isn't one."""
    try:
        fields = json.loads(path.read_bytes())
        dtype = fields["dtype"]
        rates = {_case(cell, dtype): _named(cell["tflops"]) for cell in fields["cells"]}
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); a file of recorded rates is needed") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of recorded rates ({type(error).__name__}: {error}); needed are dtype and cells, each "
            f"with mode, batch, heads, heads_kv, head_dim, seqlen, causal and tflops by peer"
        ) from None
    return Anchors(f"recorded on {fields.get('card', 'an unnamed card')}, {fields.get('date', 'undated')}", rates)


def _named(rates: dict[str, float]) -> dict[str, float]:
    return {NAMES.get(name, name): rate for name, rate in rates.items()}


def _case(cell: dict, dtype: str) -> Case:
    return Case(
        batch=cell["batch"],
        seqlen_q=cell["seqlen"],
        seqlen_k=cell["seqlen"],
        heads=cell["heads"],
        heads_kv=cell["heads_kv"],
        head_dim=cell["head_dim"],
        head_dim_v=cell["head_dim"],
        causal=cell["causal"],
        dtype=dtype,
        direction=DIRECTIONS[cell["mode"]],
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
