"""Attention to a cache by the kernels."""

from __future__ import annotations


def forward(call, mechanism: str | None, return_lse: bool, q, k_cache, v_cache):
    raise NotImplementedError("the kernels of attention_kvcache are not there yet: use backend='reference'")
