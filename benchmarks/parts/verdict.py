"""What holds a configuration back: computed from its whole kernel with stages left out, said in one sentence.

A stage's *saving* is the share of the time that goes away with it: ``1 − time without it / time of everything``. Stages
overlap, so savings don't add up to 1; one that is hidden behind others saves nothing. The stage that saves the most
holds the kernel back. A stage *alone* says how much of the time it needs at least: the epilogue's is its bytes at the
rate it reaches by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.parts.results import Figure
from benchmarks.parts.shapes import named, output_bytes
from benchmarks.parts.stages import FULL

STAGES = ("products", "softmax", "loads", "epilogue")
WORDS = {"products": "the products", "softmax": "the softmax", "loads": "the loads", "epilogue": "the epilogue"}
SINGULAR = ("softmax", "epilogue")
# Below this no single stage is to blame: what is left is how they overlap.
SMALL = 0.05


@dataclass(frozen=True)
class Verdict:
    """Which stage holds a configuration back, savings and times alone as shares of the whole, and the sentence."""

    config: str
    mechanism: str
    stage: str
    savings: dict[str, float]
    alone: dict[str, float]
    sentence: str


def verdicts(figures: Sequence[Figure]) -> list[Verdict]:
    """One for each configuration whose whole kernel was measured."""
    wholes = dict.fromkeys((f.config, f.mechanism) for f in figures if f.part == "whole")
    found = (verdict(figures, config, mechanism) for config, mechanism in wholes)
    return [one for one in found if one is not None]


def verdict(figures: Sequence[Figure], config: str, mechanism: str) -> Verdict | None:
    """``None`` where what it would be computed from is missing."""
    ours = [f for f in figures if f.ok and f.mechanism == mechanism]
    whole = {f.what: f for f in ours if f.part == "whole" and f.config == config}
    full = whole.get(FULL)
    if full is None or not full.seconds:
        return None
    savings = {
        stage: 1 - (left.seconds or 0.0) / full.seconds for stage in STAGES if (left := whole.get(f"no {stage}")) is not None
    }
    if not savings:
        return None
    alone = {
        stage: (only.seconds or 0.0) / full.seconds for stage in STAGES if (only := whole.get(f"{stage} only")) is not None
    }
    stored = [f for f in ours if f.part == "epilogue" and f.config == config.removesuffix("-causal")]
    if stored and stored[0].rate:
        bytes_ = output_bytes(named(config).case(full.seqlen))
        alone["epilogue"] = bytes_ / (stored[0].rate * 1e12) / full.seconds
    stage = max(savings, key=lambda name: savings[name])
    sentence = _sentence(full, config, mechanism, stage, savings, alone, whole.get(f"{stage} only"))
    return Verdict(config, mechanism, stage, savings, alone, sentence)


def _sentence(
    full: Figure,
    config: str,
    mechanism: str,
    stage: str,
    savings: dict[str, float],
    alone: dict[str, float],
    only: Figure | None,
) -> str:
    one = stage in SINGULAR
    hold, them, themselves, take, their = (
        ("holds", "it", "itself", "it takes", "its") if one else ("hold", "them", "themselves", "they take", "their")
    )
    blame = f"{WORDS[stage]} {hold} it back"
    if savings[stage] < SMALL:
        blame = f"no single part holds it back, {WORDS[stage]} the most"
    others = sorted((name for name in savings if name != stage), key=lambda name: -savings[name])
    rest = ", ".join(f"{_change(savings[name])} without {WORDS[name]}" for name in others)
    sentence = f"{config} on {mechanism}: {blame}: without {them} a call of {(full.seconds or 0.0) * 1e3:.3g} ms "
    sentence += f"would take {_change(savings[stage])}" + (f" ({rest})" if rest else "")
    if stage in alone:
        sentence += f"; by {themselves} {take} {alone[stage]:.0%} of it"
        if only is not None and only.ratio is not None:
            sentence += f", at {only.ratio:.0%} of {their} limit"
    return sentence + "."


def _change(saving: float) -> str:
    return f"{saving:.0%} less" if saving >= 0 else f"{-saving:.0%} more"
