"""Masks to pass to attention as ``mask=``, and how one is written: a function of positions, or one that makes it.

Positions are rows of q and of k, from 0 on, in each sequence: where q is shorter than k, it is ``causal=True`` that aligns the
last query with the last key. Each works in torch's FlexAttention, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import torch

from cute_attn.arguments import check_tensor
from cute_attn.functions import element_of


def causal(batch, head, q_idx, kv_idx):
    """No query sees past its own position."""
    return q_idx >= kv_idx


def window(left: int, right: int = 0) -> Callable:
    """``left`` keys before a query's position, and ``right`` after it."""
    return lambda batch, head, q_idx, kv_idx: (kv_idx >= q_idx - left) & (kv_idx <= q_idx + right)


def document(ids: torch.Tensor) -> Callable:
    """A query sees the keys of its own document; ``ids``, int ``(seqlen,)`` or ``(batch, seqlen)``, number them."""
    check_tensor("ids", ids, "an int tensor (seqlen,) or (batch, seqlen) is needed: try torch.tensor(ids)")
    if ids.dim() == 1:
        return lambda batch, head, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]
    return lambda batch, head, q_idx, kv_idx: ids[batch, q_idx] == ids[batch, kv_idx]


def prefix_lm(lengths: torch.Tensor) -> Callable:
    """All see the prefix, of ``lengths``, int ``(batch,)``; what follows it is causal."""
    check_tensor("lengths", lengths, "an int tensor (batch,) is needed: try torch.tensor(lengths)")
    return lambda batch, head, q_idx, kv_idx: (kv_idx < lengths[batch]) | (q_idx >= kv_idx)


def dilated(step: int) -> Callable:
    """Every ``step``-th key, counted from a query's position."""
    return lambda batch, head, q_idx, kv_idx: (q_idx - kv_idx) % step == 0


def block_diagonal(size: int) -> Callable:
    """Blocks of ``size`` positions, each of which sees itself."""
    return lambda batch, head, q_idx, kv_idx: q_idx // size == kv_idx // size


def given(seen: torch.Tensor) -> Callable:
    """What a tensor of bools says, which broadcasts to ``(batch, heads, seqlen_q, seqlen_k)``."""
    check_tensor("seen", seen, "a tensor of bools is needed: try torch.tensor(seen)")
    if not seen.numel():  # nor are there queries and keys to ask about
        return lambda batch, head, q_idx, kv_idx: q_idx < 0
    return element_of(seen)


def and_masks(*masks: Callable) -> Callable:
    """What all of them let a query see."""
    _check_some("and_masks", masks)
    return lambda batch, head, q_idx, kv_idx: reduce(operator.and_, (mask(batch, head, q_idx, kv_idx) for mask in masks))


def or_masks(*masks: Callable) -> Callable:
    """What any of them lets a query see."""
    _check_some("or_masks", masks)
    return lambda batch, head, q_idx, kv_idx: reduce(operator.or_, (mask(batch, head, q_idx, kv_idx) for mask in masks))


def not_mask(mask: Callable) -> Callable:
    """What it hides."""
    return lambda batch, head, q_idx, kv_idx: ~mask(batch, head, q_idx, kv_idx)


def _check_some(name: str, masks: tuple) -> None:
    if not masks or not all(map(callable, masks)):
        raise TypeError(f"{name} is given {masks}; one function or more is needed: try masks.causal, or no mask at all")
