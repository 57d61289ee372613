"""What several kernels compute of numbers, and the DSL has no function for."""

from __future__ import annotations

import cutlass
from cutlass import Int32, cute

MOST = 2**31 - 1  # an int32 can be


@cute.jit
def either(condition, x, y):
    """``x`` where a condition holds, else ``y``; also in functions that the compiler doesn't rewrite."""
    return x if condition else y


@cute.jit
def of_first_lane(value: cutlass.Constexpr) -> Int32:
    """A whole warp: what ``value()`` is to its first lane."""
    found = Int32(0)
    if cute.arch.lane_idx() == 0:
        found = value()
    return cute.arch.shuffle_sync(found, 0)


def summed_up_to_lane(x):
    """A whole warp: the sum of what the lanes up to this one have."""
    lane, total = cute.arch.lane_idx(), x
    for step in (1, 2, 4, 8, 16):
        lower = cute.arch.shuffle_sync_up(total, step)
        total = total + lower * cutlass.min(lane // step, 1)  # a lower lane's, if there is one
    return total
