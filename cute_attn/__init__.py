"""Exact fused attention for PyTorch, written in Python with NVIDIA's CuTe DSL."""

from cute_attn import sources as sources  # first: it notes the files before any of them is read
from cute_attn.api import attention, attention_varlen

__version__ = "0.1.0"
__all__ = ["attention", "attention_varlen"]
