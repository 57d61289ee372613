"""Exact fused attention for PyTorch, written in Python with NVIDIA's CuTe DSL."""

from importlib import import_module
from typing import TYPE_CHECKING

from cute_attn import sources as sources  # first: it notes the files before any of them is read
from cute_attn.api import attention, attention_varlen
from cute_attn.blocks import BlockMask, block_mask
from cute_attn.kvcache import attention_kvcache
from cute_attn.paged_cache import PagedCache

__version__ = "0.1.0"
__all__ = ["BlockMask", "PagedCache", "attention", "attention_kvcache", "attention_varlen", "block_mask"]
# Modules that are imported when they are first asked for: the interfaces of others, and functions to pass.
_INTERFACES = ("distributed", "flash_attn", "sdpa", "transformers")
_FUNCTIONS = ("masks", "scores")

if not TYPE_CHECKING:  # for a type checker it would stand for every module of the package

    def __getattr__(name: str):
        if name in (*_INTERFACES, *_FUNCTIONS):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
