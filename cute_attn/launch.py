"""From torch's tensors to a kernel on the caller's device and stream.

tvm-ffi launches (a compiled kernel's callable is a function of its), cuda-python answers questions about the device.
Nothing here synchronises, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from cute_attn import rules
from cute_attn.compile import compiled
from cute_attn.layouts import target_of
from cute_attn.plan import plan
from cute_attn.problem import Call, Problem


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device."""
    try:
        from cuda.bindings import runtime
    except ImportError as missing:
        raise NotImplementedError(
            f"cuda-python can't be imported ({missing}); the kernels are launched with it: "
            f"try pip install cuda-python, or backend='reference'"
        ) from missing
    error, count = runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, device)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA can't tell device {device}'s multiprocessors ({error.name}): is it visible to the process?")
    return count


@lru_cache(maxsize=64)
def device_target(device: int) -> str:
    """The compiler's target of a device. Raises ``NotImplementedError`` for a GPU that no layouts module serves."""
    return target_of(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=4096)
def prepared(problem: Problem, mechanism: str | None, device: int) -> tuple[Callable, int]:
    """The compiled kernel of a problem on a device, and how many of its blocks the device holds at once."""
    config = plan(problem, device_target(device), mechanism)
    return compiled(problem, config), multiprocessors(device) * config.blocks_per_multiprocessor


def launch(function: Callable, blocks: int, device: int, call: Call, q, k, v, out, lse) -> None:
    """Run a compiled kernel on the current stream of the tensors' device, whichever device is current."""
    scale_log2, scale_by_cap = rules.score_scales(call.scale, call.softcap)
    stream = torch._C._cuda_getCurrentRawStream(device)
    arguments = (q, k, v, out, lse, call.left or 0, call.right or 0, scale_log2, scale_by_cap, blocks, stream)
    if torch._C._cuda_getDevice() == device:
        function(*arguments)
    else:
        with torch.cuda.device(device):
            function(*arguments)
