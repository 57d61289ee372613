"""Exact fused attention for PyTorch, written in Python with NVIDIA's CuTe DSL."""

from cute_attn.api import attention

__version__ = "0.1.0"
__all__ = ["attention"]
