"""``torch.autocast``: what it casts, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from cute_attn.private import constant_in_graphs


def cast(x):
    """``x`` as ``torch.autocast`` hands it to scaled_dot_product_attention: in autocast's dtype, unless it is float64."""
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if _casts(x) else x


def outside(function: Callable) -> Callable:
    """``function(q, …)`` with autocast off: it chooses the dtype of each product itself."""

    @wraps(function)
    def plain(q, *arguments, **options):
        if not _casts(q):
            return function(q, *arguments, **options)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *arguments, **options)

    return plain


def _casts(x: torch.Tensor) -> bool:
    device = x.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@constant_in_graphs  # torch.compile of 2.11 and before can't trace what is asked here
def _has_autocast(device: str) -> bool:
    """Whether a type of device has autocast; of one that hasn't, to ask whether it is enabled is an error."""
    return torch.amp.is_autocast_available(device)
