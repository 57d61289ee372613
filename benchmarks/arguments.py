"""Numbers that the benchmarks' command lines take, and the package's don't: refused as those of ``cute_attn.command`` are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from cute_attn.command import INT_MAX, number, positive, whole

SEED_MAX = 2**63 - 1  # of torch's, with room for a few more
SECONDS_MAX = 1e6  # eleven days; the system's calls that wait take little more


def real(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A type of argument: a finite number of at least ``least``, or above it, up to ``most``."""
    needed = f"a finite number {'above' if above else 'of at least'} {least:g}"
    needed += f" and at most {most:g}" if math.isfinite(most) else ""

    def fits(value: float) -> bool:
        return math.isfinite(value) and least <= value <= most and not (above and value == least)

    return number(float, needed, fits)


seed = whole(0, SEED_MAX)
reach = whole(-1)  # of a window's side: -1 is unbounded
softcap = real(0)
seconds = real(0, SECONDS_MAX, above=True)
milliseconds = real(0, 1e3 * SECONDS_MAX, above=True)
rest_milliseconds = real(0, 1e3 * SECONDS_MAX)  # none at all is one, too


def length(text: str) -> int:
    """A type of argument: ``8k`` is 8192, ``512`` is 512."""
    thousands = text.lower().endswith("k")
    try:
        return whole(1, INT_MAX // 1024)(text[:-1]) * 1024 if thousands else positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; a length of at least 1 and at most {INT_MAX} is needed, such as 512 or 8k"
        ) from None
