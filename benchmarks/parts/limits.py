"""What the hardware allows, and how each limit is derived.

A probe counts its work by *kind*; a kind's limit is a rate, so ``work / rate`` is the shortest time it can take, its
*floor*. Work of several kinds can overlap perfectly at best: the floor of a kernel is the longest of its kinds' floors.

- ``tensor``: dense bf16 FLOPs with float32 sums. ``FLOPs a clock and SM · SMs · clock``: the datasheet's rate at the
  clock read during the run (Hopper: 4,096 a clock and SM). WGMMA can reach it. ``mma.sync`` on Hopper can't: it issues
  from one warp at a time and gets to about 62 %; its bars are drawn against the same datasheet rate.
- ``exp``: base-2 exponentials. ``16 · SMs · clock``: results a clock and SM of the special-function units (CUDA C++
  programming guide, throughput of native arithmetic instructions, compute capabilities 8.0 to 9.0 and 12.0).
- ``copy``: bytes read from, or written to, device memory, against the rate of a copy within it, measured on the same
  card in the same run, reads and writes counted. Reads alone can be somewhat faster than a copy.
- ``l2``: bytes read from the L2 cache, no SM the same ones at the same time. ``L2_BYTES_PER_SECOND`` of the card: what
  Nsight Compute gives as the peak of ``lts__t_sectors_op_read``, times its ``lts__cycles_elapsed`` a second. The cache
  has a clock of its own, which can't be read during the run.
- ``sm_in``: bytes that kernels bring to shared memory. ``128 · SMs · clock``: what an SM can take (Nsight Compute's peak
  of ``l1tex__m_xbar2l1tex_read_bytes``). It can be more than the cache gives: where SMs ask for the same data at the same
  time, their requests are combined on the way.
- ``launch``: launches; their limit is the time of a lesser launch that is measured beside them, so it is no rate here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXPONENTIALS_PER_CLOCK = 16
BYTES_INTO_SM_PER_CLOCK = 128
L2_BYTES_PER_SECOND = {"NVIDIA H200": 188 * 32 * 1.70e9}  # sectors a clock, bytes of one, clock of the cache
ABOUT = {
    "tensor": "datasheet rate at this clock",
    "exp": "16 exponentials a clock and SM",
    "copy": "measured device copy rate",
    "l2": "peak of the L2 cache",
    "sm_in": "128 bytes a clock into an SM",
    "launch": "the lesser launch above",
}
NEED_NO_CLOCK = ("copy", "l2")
UNITS = {"tensor": "TFLOP/s", "exp": "exp/clk/SM", "copy": "TB/s", "l2": "TB/s", "sm_in": "TB/s", "launch": "µs"}


@dataclass(frozen=True)
class Limits:
    """What the floors are computed from; ``None`` where it isn't known. ``tensor_flop_per_clock`` is of all SMs."""

    sm_count: int
    tensor_flop_per_clock: float | None
    copy_bytes_per_s: float | None
    l2_bytes_per_s: float | None = None

    @staticmethod
    def of(card: Mapping[str, Any], copy_bytes_per_s: float | None) -> Limits:
        """Of a card as ``benchmarks.card`` describes it."""
        l2 = L2_BYTES_PER_SECOND.get(card["name"])
        return Limits(card["sm_count"], card["tensor_flop_per_clock"], copy_bytes_per_s, l2)

    def rate(self, kind: str, hz: float) -> float | None:
        """The most work of a kind in a second at an SM clock of ``hz``."""
        if kind == "tensor":
            return None if self.tensor_flop_per_clock is None else self.tensor_flop_per_clock * hz
        if kind == "exp":
            return EXPONENTIALS_PER_CLOCK * self.sm_count * hz
        if kind == "sm_in":
            return BYTES_INTO_SM_PER_CLOCK * self.sm_count * hz
        return {"copy": self.copy_bytes_per_s, "l2": self.l2_bytes_per_s}.get(kind)

    def floor(self, work: Mapping[str, float], hz: float) -> tuple[float, str] | None:
        """``(seconds, kind)``: the longest floor of the work's kinds, and whose it is; ``None`` without any limit."""
        floors = [(amount / rate, kind) for kind, amount in work.items() if (rate := self.rate(kind, hz))]
        return max(floors) if floors else None

    def scale(self, kind: str, hz: float) -> float:
        """Work a second → the unit it is shown in."""
        return self.sm_count * hz if kind == "exp" else 1e12


@dataclass(frozen=True)
class Assessment:
    """Rate and limit in the unit of the work's first kind; ``ratio`` is the share of the limit that is reached."""

    unit: str
    rate: float
    limit: float | None
    ratio: float | None
    limit_is: str


def assess(
    work: Mapping[str, float], seconds: float, hz: float | None, limits: Limits, beside: float | None = None
) -> Assessment:
    """What ``work`` in ``seconds`` amounts to. ``hz`` is the SM clock (``None``: not read, limits that need it are left
    out); ``beside`` the seconds a launch of the reference took."""
    kind, amount = next(iter(work.items()))
    if kind == "launch":
        each = seconds / amount
        limit = None if beside is None else beside * 1e6
        ratio = None if beside is None else beside / each
        return Assessment(UNITS[kind], each * 1e6, limit, ratio, ABOUT[kind] if beside is not None else "")
    if not hz and kind not in NEED_NO_CLOCK:
        scale = 1e12
        return Assessment("Texp/s" if kind == "exp" else UNITS[kind], amount / seconds / scale, None, None, "")
    floor = limits.floor(work, hz or 1.0)
    scale = limits.scale(kind, hz or 1.0)
    if floor is None:
        return Assessment(UNITS[kind], amount / seconds / scale, None, None, "")
    limit = amount / floor[0] / scale
    return Assessment(UNITS[kind], amount / seconds / scale, limit, floor[0] / seconds, ABOUT[floor[1]])
