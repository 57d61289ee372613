"""Traces kept from call to call: to trace a function takes the host longer than all the rest of a call.

A trace may be used again where nothing that the function can reach has changed: its code and that of functions it calls, their
defaults, what they hold in closures, the globals they name. All of this is compared, by value, with what it was when the
function was traced. Of tensors only what a trace can depend on is compared, which is not their values; so a function that is
made anew in each call or for each layer, around other tensors of the same shape, needs no new trace. Tensors are noted in the
order in which they are reached, and a captured one is known by its place there.

Where a change might go unnoticed (an object with attributes, a list, a module of the user's that is asked for what it doesn't
hold, a call of time or chance), nothing is kept. Nor is it where a function computes something of a tensor that is no symbol
(``tracing.Graph.pure``): the result might be another one the next time.
"""

from __future__ import annotations

import dis
import functools
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch

from cute_attn.tracing import KNOWN

Matches = Callable[[Any, list], bool]  # whether a value is as it was; notes the tensors that it finds
TRUSTED = frozenset({"torch", "math", "operator", "_operator", "numpy", "functools", "_functools", "builtins"})
BUILTINS = frozenset(map(operator.attrgetter("__name__"), (
    abs, all, any, bool, divmod, enumerate, float, int, isinstance, len, max, min, pow, range, reversed, round, sum, tuple, zip
)))  # fmt: skip
CODES, TRACES = 256, 64  # at most so many functions' code, and traces of each
DEPTH = 32  # of functions in functions
_MISSING = object()
_ATTRIBUTES = KNOWN | {*dir(math), *dir(operator), "reduce", "partial"}  # that functions may ask for
_kept: dict[types.CodeType, list[tuple[Matches, tuple, Any, tuple]]] = {}


class Uncertain(Exception):  # noqa: N818
    """A function reaches something whose change would go unnoticed."""


def matcher(given: Any) -> Matches | None:
    """What tells whether a value is as ``given`` is now; None where that can't be told."""
    try:
        return _Walk().of(given)
    except Uncertain:
        return None


def find(code: types.CodeType | None, given: Any, fits: Callable[[Any, tuple], bool]) -> tuple[Any, tuple] | None:
    """``(trace, captured tensors)`` that :func:`keep` was given for such functions and arguments, of a trace that ``fits``."""
    for matches, alike, trace, places in _kept.get(code, ()) if code else ():
        found: list = []
        if matches(given, found) and _alike(found) == alike:
            captured = tuple(found[i] for i in places)
            if fits(trace, captured):
                return trace, captured
    return None


def keep(code: types.CodeType, given: Any, matches: Matches, trace: Any, captured: tuple) -> None:
    """Keep a trace, if all tensors that it captures are among what the function reaches."""
    found: list = []
    if not matches(given, found):
        return  # the function changes what it reaches
    places = [next((i for i, x in enumerate(found) if x is one), None) for one in captured]
    if None in places:
        return
    if len(_kept) >= CODES:
        _kept.clear()
    traces = _kept.setdefault(code, [])
    traces.insert(0, (matches, _alike(found), trace, tuple(places)))
    del traces[TRACES:]


def _alike(tensors: list) -> tuple:
    """Which of them are one and the same."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(id(x), i) for i, x in enumerate(tensors))


class _Walk:
    """Through all that functions reach. ``within`` are the functions and modules that it is in now."""

    def __init__(self, *within: Any):
        self.within = within

    def into(self, value: Any) -> _Walk:
        if len(self.within) > DEPTH or any(value is other for other in self.within):
            raise Uncertain
        return _Walk(*self.within, value)

    def of(self, value: Any) -> Matches:
        kind = type(value)
        if kind is float:
            text = value.hex()
            return lambda x, found: type(x) is float and x.hex() == text
        if value is None or kind in (bool, int, str, bytes, torch.dtype, torch.device, type(...)):
            return lambda x, found: type(x) is kind and x == value
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if kind is tuple:
            return self.each(value)
        if kind is functools.partial:
            parts = self.each((value.func, value.args, *value.keywords.items()))
            return lambda x, found: type(x) is kind and parts((x.func, x.args, *x.keywords.items()), found)
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)) and _is_trusted(value):
            return lambda x, found: x is value
        if kind is types.FunctionType:
            return self.into(value).function(value)
        raise Uncertain

    def each(self, values: tuple) -> Matches:
        """Of a tuple."""
        parts = tuple(self.of(x) for x in values)

        def matches(x: Any, found: list) -> bool:
            if type(x) is not tuple or len(x) != len(parts):
                return False
            return all(part(y, found) for part, y in zip(parts, x, strict=True))

        return matches

    def function(self, value: types.FunctionType) -> Matches:
        code, namespace = value.__code__, value.__globals__
        names, attributes = _named_in(code)
        named = [(name, self.named(name, namespace, attributes)) for name in names]
        modules = [x for x in map(namespace.get, names) if isinstance(x, types.ModuleType)]
        if any(name not in _ATTRIBUTES and not any(name in vars(x) for x in modules) for name in attributes):
            raise Uncertain
        held = self.each(_held(value))

        def matches(x: Any, found: list) -> bool:
            if type(x) is not types.FunctionType or x.__code__ is not code or x.__globals__ is not namespace:
                return False
            for name, as_it_was in named:
                if not as_it_was(namespace.get(name, _MISSING), found):
                    return False
            return held(_held(x), found)

        return matches

    def named(self, name: str, namespace: dict, attributes: frozenset[str]) -> Matches:
        """Of what is looked up in a module's namespace, then among the builtins."""
        if name not in namespace:
            if name not in BUILTINS:
                raise Uncertain
            return lambda x, found: x is _MISSING
        value = namespace[name]
        if not isinstance(value, types.ModuleType) or _is_trusted(value):
            return self.of(value)
        inside, walk = vars(value), self.into(value)
        held = [(n, walk.named(n, inside, attributes)) for n in sorted(attributes & inside.keys())]
        return lambda x, found: x is value and all(matches(inside.get(n, _MISSING), found) for n, matches in held)


def _tensor(value: torch.Tensor) -> Matches:
    if value.is_nested:  # of some, nobody may ask for the shape
        raise Uncertain
    kind, shape, dtype, strides, device = type(value), value.shape, value.dtype, value.stride(), value.device
    differentiated = value.requires_grad

    def matches(x: Any, found: list) -> bool:
        found.append(x)
        same = type(x) is kind and x.shape == shape and x.dtype is dtype and x.requires_grad is differentiated
        return same and x.stride() == strides and x.device == device

    return matches


def _is_trusted(value: Any) -> bool:
    """Whether it is torch's, numpy's or Python's, and gives the same result for the same operands."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in TRUSTED
    owner = getattr(value, "__self__", None)
    if isinstance(owner, (type, types.ModuleType)):
        return _is_trusted(owner)
    return owner is None and str(getattr(value, "__module__", "")).partition(".")[0] in TRUSTED


def _held(function: types.FunctionType) -> tuple:
    """What a function has in its closure and its defaults."""
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as empty:
        raise Uncertain from empty
    return (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())


@functools.lru_cache(maxsize=1024)
def _named_in(code: types.CodeType) -> tuple[tuple[str, ...], frozenset[str]]:
    """The globals that code names, and the attributes that it asks for, with the functions in it. Raises :class:`Uncertain` for
    what is imported, written to a namespace, or an attribute that no tensor or known module has."""
    names: dict[str, None] = {}
    attributes: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[step.argval] = None
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
        elif step.opname.startswith(("IMPORT_", "STORE_GLOBAL", "STORE_ATTR", "STORE_DEREF", "DELETE_", "STORE_SUBSCR")):
            if step.opname != "STORE_DEREF" or step.argval in code.co_freevars:
                raise Uncertain
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, asked = _named_in(constant)
            names |= dict.fromkeys(inner)
            attributes |= asked
    return tuple(names), frozenset(attributes)
