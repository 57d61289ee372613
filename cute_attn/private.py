"""The names of torch and the DSL that neither promises to keep, each in this one place: its users import it from here.

They are bound once, so that a call looks up nothing. A release of torch that lacks one is told by ``import cute_attn``: an
``ImportError`` with the release, the name, and what it is for. Nothing here imports the DSL.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

NAMES: list[str] = []  # of torch's, those that only a build with CUDA has left out where this one has none
COLLECTIVES = "torch.distributed._functional_collectives"  # who passes a tensor of its has imported it, and nobody else
_UNSEEN: dict[Callable, Callable] = {}  # functions, and what calls them where torch.compile doesn't look into it
DSL_NAMES = ("__extract_mlir_values__", "__new_from_mlir_values__")


def _holder(path: str, purpose: str) -> tuple[Any, str]:
    """The module that holds a name, and the name in it."""
    NAMES.append(path)
    module, _, name = path.rpartition(".")
    try:
        holder = import_module(module)
        getattr(holder, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"torch {torch.__version__} has no {path}, which tells cute-attn {purpose}: "
            f"try another release of torch, or a newer one of cute-attn"
        ) from error
    return holder, name


def _bound(path: str, purpose: str) -> Callable:
    return getattr(*_holder(path, purpose))


def _of_cuda(path: str, purpose: str) -> Callable:
    return _bound(path, purpose) if torch.backends.cuda.is_built() else _without_cuda


def _without_cuda(*_: object) -> int:
    raise NotImplementedError(f"torch {torch.__version__} was built without CUDA: install one with it, or backend='reference'")


any_autocast_enabled: Callable[[], bool] = _bound("torch._C._is_any_autocast_enabled", "whether any device autocasts")
transforms_active: Callable[[], bool] = _bound(
    "torch._C._are_functorch_transforms_active", "whether torch.func transforms a call"
)
# A variable of theirs: -1 outside.
_level = _holder("torch.autograd.forward_ad._current_level", "whether a call is inside of dual_level()")
dual_level: Callable[[], int] = partial(getattr, *_level)
is_batched: Callable[[torch.Tensor], bool] = _bound("torch._C._functorch.is_batchedtensor", "whether torch.vmap maps a tensor")
is_transformed: Callable[[torch.Tensor], bool] = _bound(
    "torch._C._functorch.is_functorch_wrapped_tensor", "whether a tensor stands for others inside of torch.func"
)
FakeTensor: Any = _bound("torch._subclasses.fake_tensor.FakeTensor", "whether a tensor has a shape only")
FunctionalTensor: Any = _bound("torch._subclasses.functional_tensor.FunctionalTensor", "whether torch traces a call")
dispatch_modes: Callable[[], int] = _bound("torch._C._len_torch_dispatch_stack", "whether a mode sees every operator")
current_device: Callable[[], int] = _of_cuda("torch._C._cuda_getDevice", "which device is current")
raw_stream: Callable[[int], int] = _of_cuda("torch._C._cuda_getCurrentRawStream", "a device's current stream")
# (sizes, strides, dtype), on the current device: half of the time that torch.empty and its like take goes into a look for
# whoever wants to see operators, which calls that come this far have none of.
empty_strided: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = _of_cuda(
    "torch._C._dynamo.guards._empty_strided_cuda", "where there is memory on the current device"
)
assert_on_device: Callable[[torch.Tensor, str], None] = _bound(
    "torch._assert_async", "that what is checked on the device need not be waited for"
)


def version_of(x: torch.Tensor) -> int | None:
    """What changes whenever a tensor is written to; ``None`` where torch doesn't count."""
    return None if x.is_inference() else x._version


def is_known(number: float) -> bool:
    """Whether torch.compile has the value of a number, or a symbol for it."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # comes with sympy: too slow for an import

    return has_static_value(number)


def is_recorded() -> bool:
    """Whether what is done to tensors becomes a graph of operators, as in torch.export."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # comes with sympy, too

    return get_proxy_mode() is not None


def constant_in_graphs(function: Callable) -> Callable:
    """Have torch.compile call a function of constants where it makes a graph, and not trace it. This is all that
    ``torch.compiler.assume_constant_result`` does but import ``torch._dynamo``, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def unseen(function: Callable) -> Callable:
    """A function into which torch.compile doesn't look: it leaves this call out of its graph, or has done so already, and would
    look into what that calls. (To say so beforehand would import ``torch._dynamo``, which takes seconds.)"""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _UNSEEN:
        why = "cute_attn looks here at what functions and tensors hold, which a graph can't: call it outside of one"
        _UNSEEN[function] = torch.compiler.disable(function, reason=why)
    return _UNSEEN[function]


def never_begin_a_graph(function: Callable) -> None:
    """Have torch.compile, which is imported, call a function as it is where it could not make it a part of a graph."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def with_side_effects(function: Callable, *arguments: Any) -> Any:
    """Call a function that enters a mode, which torch.compile takes for a side effect, and refuses in a checkpoint's graph
    unless it is told not to, as it can be from torch 2.11 on at the latest."""
    from torch._dynamo import utils

    call = getattr(utils, "_disable_side_effect_safety_checks_for_current_subtracer", None)
    return function(*arguments) if call is None else call(function, *arguments)


def ragged_dim(x: torch.Tensor) -> int:
    """The dimension of a jagged tensor that has other lengths for each element of the batch."""
    return x._ragged_idx  # type: ignore[attr-defined]


class NoRunTimeValues:
    """A base class of what crosses into a kernel and holds nothing that is known at run time only. The DSL asks it for its
    values, and for itself with the values that they have become, by :data:`DSL_NAMES`."""

    def __extract_mlir_values__(self) -> list:
        return []

    def __new_from_mlir_values__(self, _: list) -> NoRunTimeValues:
        return self
