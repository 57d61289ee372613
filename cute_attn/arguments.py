"""What kinds of values an argument may have, in one place: flags, numbers, names and tensors.

A value counts by its kind, never by its truth: ``"false"`` is no flag and ``True`` no number. Numbers and flags may come
from Python, from numpy and in a tensor of 0 dimensions on the CPU. What is refused is refused with what was got, what is
needed and what to try. The functions for tensors say whether a kernel, or torch's operators, can read one.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from cute_attn.private import is_transformed

MASKS = (
    "True or False is needed, and no argument takes a mask in a tensor: try mask=, a function, which may index one, or "
    "torch.nn.functional.scaled_dot_product_attention with attn_mask"
)

_F = TypeVar("_F", bound=Callable)


def unscriptable(function: _F) -> _F:
    """``function``, which torch.jit.script is told in words not to compile."""

    def refuse() -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script compiles {function.__name__}, which is Python that TorchScript has no words for: "
            f"try torch.compile, or torch.export.export for a graph that can be saved"
        )

    function.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]  # torch.jit.script calls it
    return function


# ---- flags, numbers, names -------------------------------------------------------------------------------------------


def flag(name: str, value: object) -> bool:
    """``value`` as a bool: Python's, numpy's, or that of a tensor of 0 dimensions on the CPU."""
    if type(value) is bool:
        return value
    if getattr(value, "ndim", 0):
        raise TypeError(f"{name} is {shown(value)}; {MASKS if name == 'causal' else 'True or False is needed'}")
    if is_traced(value):
        raise TypeError(
            f"{name} is {shown(torch.as_tensor(value))} inside of torch.compile or torch.export, where a graph is made before "
            f"any value is known; True or False is needed: pass bool({name}) from outside"
        )
    scalar = _scalar(name, value, "True or False is needed")
    if isinstance(scalar, (bool, np.bool_)):
        return bool(scalar)
    raise TypeError(f"{name} is {shown(value)}; True or False is needed, a bool: try {name}=True, or leave it out")


def integer(name: str, value: object, otherwise: str) -> int:
    """``value`` as an int: whatever ``operator.index`` takes, but no bool. ``otherwise`` is what else may be passed."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):  # an int that a trace has a symbol for
        return value  # type: ignore[return-value]
    needed = f"an int is needed, {otherwise}"
    scalar = _scalar(name, value, needed)
    if isinstance(scalar, torch.Tensor) and not scalar.is_floating_point():
        return scalar.item()  # type: ignore[return-value]
    if not isinstance(scalar, (bool, np.bool_)):
        with suppress(TypeError):
            return operator.index(scalar)  # type: ignore[arg-type]
    raise TypeError(f"{name} is {shown(value)}; {needed}")


def number(name: str, value: object, otherwise: str) -> float:
    """``value`` as a finite float: any real number, or what ``operator.index`` takes, but no bool. ``otherwise`` as above.

    In a graph that is being made, what was in a tensor stays in one of 0 dimensions: the operators of ``ops.py`` read it.
    """
    if type(value) is float and -math.inf < value < math.inf:
        return value
    if isinstance(value, Unread):
        return value.tensor  # type: ignore[return-value]
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # that a trace has a symbol for
        return torch.sym_float(value)  # type: ignore[return-value]
    needed = f"a finite number is needed, {otherwise}"
    scalar = _scalar(name, value, needed)
    if isinstance(scalar, torch.Tensor):
        return scalar  # type: ignore[return-value]
    real = isinstance(scalar, numbers.Real) and not isinstance(scalar, bool)
    try:
        result = float(scalar if real else integer(name, scalar, ""))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {shown(value)}; {needed}: try float({name})") from None
    except OverflowError:
        result = math.inf
    if not -math.inf < result < math.inf:
        raise ValueError(f"{name} is {shown(value)}; {needed}")
    return result


@dataclass(frozen=True)
class Unread:
    """A number that :func:`number` left in a tensor, where the graph that is made then is run to make another one."""

    tensor: torch.Tensor


def name_of(argument: str, value: object, needed: str) -> str:
    """``value`` as a plain ``str``: one of a subclass would be another key of a cache."""
    if not isinstance(value, str):
        raise TypeError(f"{argument} is {shown(value)}; {needed}")
    return str.__str__(value)


def choice(argument: str, value: object, choices: tuple[str, ...]) -> str:
    """``value``, one of the names that there are, as a plain ``str``."""
    if type(value) is str and value in choices:
        return value
    needed = f"one of {', '.join(map(repr, choices))} is needed"
    name = name_of(argument, value, needed)
    if name not in choices:
        raise ValueError(f"{argument} is {name!r}; {needed}")
    return name


def device_of(device: Any) -> torch.device | None:
    """What torch makes of a device's name or number."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device is {shown(device)}; a torch.device or its name is needed, or None: try 'cuda'") from None


def shown(value: object) -> str:
    """A value in a message: numbers as they are, of others the type, and themselves as far as that is short."""
    kind = type(value).__name__
    if isinstance(value, (torch.Tensor, np.ndarray)):
        nested = isinstance(value, torch.Tensor) and value.is_nested
        return f"a {kind} of {'several shapes' if nested else f'shape {tuple(value.shape)}'} and dtype {value.dtype}"
    article = "an" if kind[0] in "aeiou" else "a"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"{article} {kind} of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    try:
        return f"{article} {kind}, {reprlib.repr(value)}"
    except ValueError:  # Python refuses to print an int of thousands of digits, which may be somewhere in it
        return f"{article} {kind}"


def is_traced(value: object) -> bool:
    """Whether a value is in a tensor of a graph that is being made, where arrays are tensors, too."""
    return torch.compiler.is_compiling() and isinstance(value, (torch.Tensor, np.ndarray))


def _scalar(name: str, value: object, needed: str) -> object:
    """``value``, or what is in it if it is an array or a tensor of 0 dimensions, which can be read now and at no cost."""
    if is_traced(value):
        value = torch.as_tensor(value)
    if not isinstance(value, torch.Tensor):
        return value[()] if isinstance(value, np.ndarray) and not value.ndim else value
    got = f"{name} is {shown(value)}"
    if value.dim():
        raise TypeError(f"{got}; {needed}, so a tensor of 0 dimensions: try {name}.item() if it has one element")
    if value.requires_grad:
        raise TypeError(f"{got} that requires a gradient, and none flows to {name}; {needed}: try {name}.item()")
    if value.device.type == "meta":
        raise TypeError(f"{got} on meta, which has no value; {needed}: pass a Python number")
    if value.device.type != "cpu":
        raise TypeError(
            f"{got} on {value.device}, and reading it would wait for all work there (a synchronisation); {needed}, on the "
            f"CPU: keep it there, or pass {name}.item() where waiting does no harm"
        )
    if is_traced(value) and value.dtype != torch.bool:
        return value
    try:
        return value.item()
    except RuntimeError as error:  # under vmap, a fake one
        raise TypeError(f"{got} whose value can't be read ({error}); {needed}: pass a Python number") from error


# ---- tensors ---------------------------------------------------------------------------------------------------------


def check_tensor(name: str, x: object, needed: str) -> None:
    """Refuse what is no tensor, in words that end with what is ``needed`` and what to try; and as :func:`check_layout` does."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {shown(x)}; {needed}")
    check_layout(name, x)


def check_layout(name: str, x: torch.Tensor) -> None:
    """Refuse a nested or sparse tensor."""
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor of layout {x.layout}; a plain one is needed, or q, k and v of attention that are all "
            f"nested, of layout torch.jagged: try {name}.to_padded_tensor(0.0), or {name}.values() and attention_varlen"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; torch.strided is needed: try {name}.to_dense()")


def check_memory(name: str, x: torch.Tensor) -> None:
    """Refuse a tensor without strided memory of its own: no kernel, and no operator outside its class, can read it.

    Only tensors on the CPU and on CUDA devices have an address that says so; on others torch's operators decide.
    """
    check_layout(name, x)
    if x.device.type not in ("cpu", "cuda"):
        return
    try:
        address = None if is_transformed(x) else x.data_ptr()
    except RuntimeError:  # of the vmap that torch.autograd has for itself
        address = None
    if address is None:
        raise NotImplementedError(
            f"{name} is a tensor inside a transform of torch.func or torch.autograd and has no memory of its own; one that has "
            f"is needed: call attention outside the transform, or try torch.nn.functional.scaled_dot_product_attention"
        )
    if address or not x.numel():
        return
    if computes_in_its_own_way(type(x)):
        raise TypeError(
            f"{name} is a {type(x).__name__}, a subclass of torch.Tensor without memory of its own (its address is 0); a "
            f"tensor that holds its values is needed: pass the one that {name} wraps, or try backend='reference'"
        )
    raise RuntimeError(
        f"{name} has shape {tuple(x.shape)} and no memory (its address is 0); memory is needed: if its storage was freed or "
        f"resized to 0, as sharded parameters' is between uses, fill it again before the call"
    )


def computes_in_its_own_way(kind: type) -> bool:
    """Whether a class of tensors has a ``__torch_dispatch__``: whether it has memory, and what that means, it alone knows."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
