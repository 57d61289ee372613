"""What kernels compute of numbers where the DSL has no expression for it, or a slow one."""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Uint32, cute


@cute.jit
def either(condition, x, y):
    """``x`` where a condition holds, else ``y``; also in functions that the compiler doesn't rewrite."""
    return x if condition else y


def divided(x, n) -> tuple[Any, Any]:
    """``(x // n, x % n)`` of numbers that are not negative, which takes a third of what floor division takes."""
    quotient = Int32(Uint32(x) // Uint32(n))
    return quotient, x - quotient * n
