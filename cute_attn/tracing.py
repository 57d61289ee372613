"""A mask or a score that a user writes as a function, traced: called with symbols in the place of numbers, it makes a graph.

Torch hands what a function does to a :class:`Symbol`, or to a tensor that it indexes by one, to :class:`Tracing`, which makes
nodes of it (``expressions.py``) in a :class:`Graph`; all else is computed.

**Derivative.** Next to each node x that depends on the score s lies, on demand, dx/ds: a dual number is two nodes. So the
gradient's factor ds'/ds is one more output of the same graph, and where it is 1 (a bias) there is nothing to compute. The same
with an element of a captured tensor in the place of s gives that tensor's gradient: each node that loads one which requires a
gradient is a direction of its own. Where there is none it is what torch's autograd says: of abs 0 at 0, of maximum and minimum
of equal operands a half each, and of clamp at a bound that of the number, so that its two are operations of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from cute_attn.arguments import check_layout, shown
from cute_attn.expressions import KINDS, number_of

RANK_MAX = 4
_BLANK = {kind: torch.empty(1, dtype=dtype, device="meta") for kind, dtype in KINDS.items()}
LOADED = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), "float"),
    **dict.fromkeys((torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64), "int"),
    torch.bool: "bool",
}
ALLOWED = (
    "arithmetic, comparisons, & | ~, torch.where, minimum, maximum, clamp, abs, exp, log, tanh, sqrt, // and %, conversions "
    "and tensors that are indexed"
)


class Symbol(torch.Tensor):
    """A number that is not known yet, in a function that is being traced: a node of a graph, or a captured tensor of which some
    dimensions have an index (``node`` is None, ``part`` the tensor and the nodes)."""

    graph: Graph
    node: int | None
    part: tuple

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "__repr__":
            return "a symbol of mask or score"
        graph = next(x.graph for x in _flat((args, kwargs or {})) if isinstance(x, Symbol))
        if graph.called_elsewhere:
            return Tracing(graph).__torch_function__(func, types, args, kwargs)
        raise RuntimeError(
            "a symbol is used outside of the function that it was made for; one that is used inside is needed: return what "
            "mask and score compute, and keep nothing of it"
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        """A tensor that is indexed by a symbol comes here where no :class:`Tracing` is: torch asks the tensor alone whether it
        overrides that."""
        if func is not torch.ops.aten.index.Tensor:
            _refuse_operation(func.__name__)
        x, where = args
        return next(i.graph for i in where if isinstance(i, Symbol)).index(x, tuple(where))


class Graph:
    """The nodes of a mask and a score while they are traced, each once. ``called_elsewhere``: not by ``functions.traced``, but
    where what torch.compile made of the functions is called, with ``functions.positions``."""

    def __init__(self, device: torch.device, called_elsewhere: bool = False):
        self.device, self.called_elsewhere = device, called_elsewhere
        self.nodes: list[tuple] = []
        self.numbers: dict[tuple, int] = {}
        self.captured: list[torch.Tensor] = []
        self.slopes: dict[tuple[int, int], int | None] = {}
        self.pure = True  # whether nothing is computed of tensors but what symbols say

    # ---- making nodes

    def make(self, op: str, kind: str, *operands) -> int:
        made = (op, kind, *operands)
        node = self.numbers.setdefault(made, len(self.nodes))
        if node == len(self.nodes):
            self.nodes.append(made)
        return node

    def constant(self, value: bool | int | float) -> int:
        kind = type(value).__name__
        if kind == "int" and not -(2**31) <= value < 2**31:
            refuse(f"the constant {value}", "integers of 32 bits are needed", "a float, or a captured tensor")
        return self.make("constant", kind, value.hex() if isinstance(value, float) else repr(value))

    def kind(self, node: int) -> str:
        return self.nodes[node][1]

    def cast(self, node: int, kind: str) -> int:
        op, had, *operands = self.nodes[node]
        if had == kind:
            return node
        if op == "constant":
            value = number_of(had, operands[0])
            if kind == "int" and not math.isfinite(value):
                refuse(f"a conversion of {value} to an integer", "a finite number is needed", "torch.where around it")
            return self.constant({"bool": bool, "int": int, "float": float}[kind](value))
        return self.make("cast", kind, node)

    def alike(self, *nodes: int, at_least: str = "bool") -> list[int]:
        """The nodes in the kind that holds them all."""
        order = list(KINDS)
        kind = order[max(order.index(k) for k in (at_least, *map(self.kind, nodes)))]
        return [self.cast(node, kind) for node in nodes]

    def apply(self, op: str, *nodes: int, at_least: str = "bool") -> int:
        nodes = tuple(self.alike(*nodes, at_least=at_least))
        return self.make(op, self.kind(nodes[0]), *nodes)

    def symbol(self, node: int | None, part: tuple = ()) -> Symbol:
        made = _BLANK["float" if node is None else self.kind(node)].as_subclass(Symbol)
        made.graph, made.node, made.part = self, node, part
        return made

    def leaf(self, name: str) -> Symbol:
        return self.symbol(self.make("leaf", "float" if name == "score" else "int", name))

    # ---- what functions hand over

    def operand(self, x: Any) -> int:
        """The node of a symbol, a number, or a tensor of 0 dimensions, which is captured."""
        if isinstance(x, Symbol):
            if x.node is None:
                tensor, where = x.part
                left = f"{tensor.dim() - len(where)} of its {tensor.dim()} dimensions"
                refuse(f"a captured tensor without an index for {left}", "a number is needed", "an index for each dimension")
            return x.node
        if isinstance(x, (np.bool_, np.number)):
            x = x.item()
        if isinstance(x, torch.SymBool):  # a number that a graph to come has a symbol for is a constant of that graph
            x = bool(x)
        if isinstance(x, (bool, int, float, torch.SymInt, torch.SymFloat)):
            whole = isinstance(x, (int, torch.SymInt))
            return self.constant(x if isinstance(x, bool) else int(x) if whole else float(x))
        if isinstance(x, torch.Tensor):
            if x.dim():
                refuse(
                    f"a tensor of shape {tuple(x.shape)} that is no number", "one element of it is needed for each score",
                    "an index for each dimension, such as tensor[head, q_idx]",
                )  # fmt: skip
            return self.load(x, ())
        refuse(f"{shown(x)} as an operand", "a number or a tensor is needed", "float() or torch.tensor() of it")

    def load(self, tensor: torch.Tensor, where: tuple) -> int:
        slot = next((i for i, x in enumerate(self.captured) if x is tensor), len(self.captured))
        if slot == len(self.captured):
            self._check_captured(tensor)
            self.captured.append(tensor)
        return self.make("load", LOADED[tensor.dtype], slot, *where)

    def _check_captured(self, x: torch.Tensor) -> None:
        check_layout("a captured tensor", x)
        got = f"a captured tensor of shape {tuple(x.shape)} and dtype {x.dtype}"
        if x.dim() > RANK_MAX:
            refuse(got, f"at most {RANK_MAX} dimensions are needed", "flatten() of some of them before the call")
        if x.dtype not in LOADED:
            refuse(got, "floats, integers of up to 64 bits or bools are needed", ".to(torch.float32)")
        if not x.numel():
            refuse(got, "at least one element is needed", "leaving the function out", ValueError)
        if x.dim() and x.device != self.device:
            refuse(f"{got} on {x.device}, with q on {self.device}", "one device is needed", ".to(q.device)", ValueError)

    def index(self, x: torch.Tensor, where: Any) -> Symbol:
        if isinstance(x, Symbol) and x.node is not None:
            refuse("an index into a number", "a captured tensor is needed", "the tensor itself")
        tensor, before = x.part if isinstance(x, Symbol) else (x, ())
        where = where if isinstance(where, tuple) else (where,)
        found = []
        for i in where:
            if isinstance(i, (slice, type(None), type(...), list)):
                text = "..." if i is ... else repr(i)
                refuse(f"the index {text}", "one number for each dimension is needed", "the indexing before the call")
            node = self.operand(i)
            if self.kind(node) != "int":
                refuse(f"an index of kind {self.kind(node)}", "an integer is needed", ".to(torch.int32)")
            op, _, *value = self.nodes[node]
            if op == "constant" and int(value[0]) < 0:  # of any kind of int: numpy's, too
                refuse(f"the index {i}", "an index from 0 on is needed", f"tensor.shape[…] - {value[0][1:]}")
            found.append(node)
        indices = (*before, *found)
        if len(indices) > tensor.dim():
            refuse(f"{len(indices)} indices of a tensor of shape {tuple(tensor.shape)}", "one a dimension is needed", "fewer")
        if len(indices) == tensor.dim():
            return self.symbol(self.load(tensor, indices))
        return self.symbol(None, (tensor, indices))

    # ---- derivatives

    def slope(self, node: int, of: int) -> int | None:
        """The node of dx/dy, of x by the node y = ``of``, the score or an element that is loaded; None where it is 0."""
        if (node, of) not in self.slopes:
            self.slopes[node, of] = self._slope(node, of)
        return self.slopes[node, of]

    def _slope(self, node: int, of: int) -> int | None:
        op, kind, *x = self.nodes[node]
        if node == of:
            return self.constant(1.0)
        if op in ("leaf", "load", "constant") or kind != "float":
            return None
        d: list[Any] = [self.slope(i, of) if self.kind(i) == "float" else None for i in x]
        if all(dx is None for dx in d):
            return None
        if op == "add":
            return self._sum(d[0], d[1])
        if op == "sub":
            return self._sum(d[0], self._times(d[1], self.constant(-1.0)))
        if op == "neg":
            return self._times(d[0], self.constant(-1.0))
        if op == "mul":
            return self._sum(self._times(d[0], x[1]), self._times(d[1], x[0]))
        if op == "div":  # x / y: (dx − (x / y) · dy) / y
            minus: Any = None if d[1] is None else self._times(d[1], self.apply("neg", node))
            rise: Any = self._sum(d[0], minus)
            return self.apply("div", rise, x[1])
        zero = self.constant(0.0)
        whole = [zero if dx is None else dx for dx in d]
        if op == "where":
            return self.apply_where(x[0], *whole[1:])
        if op in ("clamp_min", "clamp_max"):
            inside = self.make("ge" if op == "clamp_min" else "le", "bool", *x)
            return self.apply_where(inside, *whole)
        if op in ("maximum", "minimum"):
            if d[0] == d[1]:
                return d[0]
            halves = self._sum(*(self._times(dx, self.constant(0.5)) for dx in d))
            other = self.apply_where(self.make("eq", "bool", *x), halves, whole[1])  # type: ignore[arg-type]
            return self.apply_where(self.make("gt" if op == "maximum" else "lt", "bool", *x), whole[0], other)
        one, y = self.constant(1.0), node
        factors: dict[str, Callable[[], int]] = {
            "abs": lambda: self.apply_where(
                self.make("gt", "bool", x[0], zero), one,
                self.apply_where(self.make("lt", "bool", x[0], zero), self.constant(-1.0), zero),
            ),
            "exp": lambda: y,
            "exp2": lambda: self.apply("mul", y, self.constant(math.log(2.0))),
            "log": lambda: self.apply("div", one, x[0]),
            "log2": lambda: self.apply("div", self.constant(1.0 / math.log(2.0)), x[0]),
            "tanh": lambda: self.apply("sub", one, self.apply("mul", y, y)),
            "sqrt": lambda: self.apply("div", self.constant(0.5), y),
        }
        return self._times(d[0], factors[op]())

    def apply_where(self, condition: int, x: int, y: int) -> int:
        x, y = self.alike(x, y)
        return x if x == y else self.make("where", self.kind(x), self.cast(condition, "bool"), x, y)

    def _sum(self, x: int | None, y: int | None) -> int | None:
        return y if x is None else x if y is None else self.apply("add", x, y)

    def _times(self, x: int | None, y: int) -> int | None:
        one = self.constant(1.0)
        if x is None or x == one:
            return None if x is None else y
        held = [float.fromhex(self.nodes[i][2]) for i in (x, y) if self.nodes[i][0] == "constant"]
        if len(held) == 2:
            return self.constant(held[0] * held[1])
        return x if y == one else self.apply("mul", x, y)


# ---- what functions may do -------------------------------------------------------------------------------------------

_SYNONYMS = {
    "subtract": "sub", "multiply": "mul", "truediv": "div", "true_divide": "div", "divide": "div", "floor_divide": "floordiv",
    "remainder": "mod", "negative": "neg", "absolute": "abs", "not_equal": "ne", "less": "lt", "less_equal": "le",
    "greater": "gt", "greater_equal": "ge", "bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or",
    "bitwise_xor": "xor", "logical_xor": "xor", "bitwise_not": "invert", "logical_not": "invert", "max": "maximum",
    "min": "minimum", "clip": "clamp", "long": "int", "short": "int", "double": "float", "half": "float", "bfloat16": "float",
    "type": "to", "type_as": "to",
}  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGIC = ("and", "or", "xor")
_OF_BOOLS = {"add": "or", "maximum": "or", "mul": "and", "minimum": "and"}  # as in torch: these make bools of bools
_FLOATS = ("exp", "exp2", "log", "log2", "tanh", "sqrt")  # of one operand
_ARITHMETIC = ("add", "sub", "mul", "div", "floordiv", "mod", "maximum", "minimum", "neg", "abs")
_BINARY = (*_ARITHMETIC[:-2], "pow", *_COMPARISONS, *_LOGIC)
_FILLED = {"new_ones": 1, "new_zeros": 0, "new_full": None, "ones_like": 1, "zeros_like": 0, "full_like": None}
_METADATA = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "__len__")  # of tensors: memo.py compares it
KNOWN = frozenset(
    (*_SYNONYMS, *_BINARY, *_FLOATS, *_FILLED, *_METADATA, *KINDS, *dir(torch.dtype), "neg", "abs", "where", "clamp", "to")
) | {str(dtype).removeprefix("torch.") for dtype in LOADED}
_INSTEAD = {
    "bool": "torch.where(condition, …, …) instead of if, & | ~ instead of and, or, not",
    "index": "a captured tensor, indexed, instead of a list",
    **dict.fromkeys(("item", "float", "int"), "the symbol itself, or its .float() or .int(), which need no value"),
    "sin": "a captured table", "cos": "a captured table",
    "max": "torch.maximum(x, y)", "min": "torch.minimum(x, y)", "where": "torch.where(condition, x, y)",
}  # fmt: skip


class Tracing(TorchFunctionMode):
    """What is called with symbols becomes nodes; all else is computed."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, graph = func.__name__, self.graph
        if not any(isinstance(x, Symbol) for x in _flat((args, kwargs))):
            asked = func.__self__.__name__ if name == "__get__" else name
            graph.pure = graph.pure and asked in _METADATA
            return func(*args, **kwargs)
        if name == "__get__":
            return self._attribute(func.__self__.__name__, args[0])
        if name == "__getitem__":
            return graph.index(*args)
        reverse = False
        if name.startswith("__"):
            name = name[2:-2]
            if name[0] in "ri" and (_SYNONYMS.get(name[1:], name[1:]) in _BINARY):
                name, reverse = name[1:], name[0] == "r"
        others = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.Tensor) or name == "where"]
        if name in ("max", "min", "where") and not others:
            refuse(f"{name} of one tensor", f"{ALLOWED} are there", _INSTEAD[name])
        name = _SYNONYMS.get(name, name)
        if func is torch.Tensor.where:
            given = dict(zip(("condition", "other"), args[1:], strict=False)) | kwargs
            args, kwargs = (given["condition"], args[0], given["other"]), {}
        if (name in _FILLED or name in ("to", "bool", "int", "float")) and not func.__name__.startswith("__"):
            return self._converted(name, args, kwargs)
        if name not in (*_BINARY, *_FLOATS, "neg", "abs", "invert", "where", "clamp"):
            _refuse_operation(func.__name__)
        rounding = kwargs.pop("rounding_mode", None)
        if rounding not in (None, "floor"):
            refuse(f"{func.__name__} with rounding_mode={rounding!r}", "'floor' or None is needed", "// of absolute values")
        if more := [key for key in kwargs if key not in ("min", "max", "other", "exponent", "value")]:
            refuse(f"{func.__name__} with {', '.join(more)}", "its operands alone are needed", "leaving these out")
        args = args[::-1] if reverse else args
        if func.__name__.startswith("logical_"):  # of numbers whether they are 0, where & takes their bits
            args, kwargs = tuple(graph.symbol(graph.cast(graph.operand(x), "bool")) for x in (*args, *kwargs.values())), {}
        return graph.symbol(self._node("floordiv" if rounding else name, args, kwargs))

    def _node(self, name: str, args: tuple, kwargs: dict) -> int:
        graph = self.graph
        if name in ("clamp", "pow"):
            return getattr(self, f"_{name}")(*args, **kwargs)
        nodes = [graph.operand(x) for x in (*args, *kwargs.values())]
        if {"bool"} == set(map(graph.kind, nodes)):
            name = _OF_BOOLS.get(name, name)
        if name in _FLOATS:
            return graph.apply(name, *nodes, at_least="float")
        if name in _COMPARISONS:
            return graph.make(name, "bool", *graph.alike(*nodes))
        if name in _LOGIC:
            if "float" in map(graph.kind, nodes):
                refuse(f"{name} of floats", "conditions or integers are needed", "a comparison")
            return graph.apply(name, *nodes)
        if name in ("floordiv", "mod") and "float" in map(graph.kind, nodes):
            refuse(f"{name} of floats", "integers are needed", ".to(torch.int32)")
        if name in ("floordiv", "mod") and graph.nodes[nodes[1]] == ("constant", "int", "0"):
            refuse(f"{name} by 0", "another divisor is needed", "1 or more", ValueError)
        if name in _ARITHMETIC:
            return graph.apply(name, *nodes, at_least="float" if name == "div" else "int")
        if name == "where":
            return graph.apply_where(*nodes)
        if graph.kind(nodes[0]) != "bool":  # of invert
            refuse("~ of numbers", "a condition is needed", "-1 - x, or a comparison")
        return graph.make("invert", "bool", *nodes)

    def _attribute(self, name: str, symbol: Symbol):
        if name == "dtype":
            return KINDS[self.graph.kind(self.graph.operand(symbol))]
        if name == "device":
            return self.graph.device
        _refuse_operation(name)

    def _converted(self, name: str, args: tuple, kwargs: dict) -> Symbol:
        graph = self.graph
        if name in _FILLED:
            fill = _FILLED[name] if _FILLED[name] is not None else kwargs.get("fill_value", args[-1])
            dtype = kwargs.get("dtype")
            node = graph.operand(fill)
            kind = graph.kind(graph.operand(args[0])) if dtype is None else self._kind_of(dtype)
            return graph.symbol(graph.cast(node, kind))
        if name == "to":
            kinds = [x for x in _flat((args[1:], kwargs)) if isinstance(x, (torch.dtype, torch.Tensor))]
            if not kinds:
                return args[0]
            dtype = self._attribute("dtype", kinds[0]) if isinstance(kinds[0], Symbol) else getattr(kinds[0], "dtype", kinds[0])
            name = self._kind_of(dtype)
        return graph.symbol(graph.cast(graph.operand(args[0]), name))

    def _kind_of(self, dtype: Any) -> str:
        if dtype not in LOADED:
            refuse(f"a conversion to {dtype}", "a float, an integer or bool is needed", "torch.float32")
        return LOADED[dtype]

    # ---- operations of other numbers of operands, or made of others

    def _clamp(self, x, min=None, max=None):
        node = self.graph.operand(x)
        for bound, op in ((min, "clamp_min"), (max, "clamp_max")):
            node = node if bound is None else self.graph.apply(op, node, self.graph.operand(bound), at_least="int")
        return node

    def _pow(self, base, exponent):
        graph = self.graph
        if isinstance(exponent, torch.SymInt):  # a constant of the graph to come
            exponent = int(exponent)
        if isinstance(base, (int, float)) and base == 2:
            return graph.apply("exp2", graph.operand(exponent), at_least="float")
        if isinstance(exponent, Symbol):
            refuse("a power with a symbol for the exponent", "a base of 2, or a number, is needed", "torch.exp")
        if exponent == 0.5:
            return graph.apply("sqrt", graph.operand(base), at_least="float")
        if not (type(exponent) is int and 1 <= exponent <= 8):
            refuse(f"a power with the exponent {shown(exponent)}", "an int from 1 to 8, or 0.5, is needed", "torch.exp")
        node = first = graph.operand(base)
        for _ in range(exponent - 1):
            node = graph.apply("mul", node, first, at_least="int")
        return node


def _flat(values: Any):
    for x in values.values() if isinstance(values, dict) else values:
        if isinstance(x, (tuple, list, dict)):
            yield from _flat(x)
        else:
            yield x


def _refuse_operation(name: str) -> NoReturn:
    plain = name.strip("_") if name.startswith("__") else name
    instead = _INSTEAD.get(plain, "x = x + y instead of x += y" if plain.endswith("_") else "one of these")
    refuse(f"{plain}()" if name.startswith("__") else plain, f"{ALLOWED} are there", instead)


def refuse(got: str, needed: str, instead: str, error: type[Exception] = NotImplementedError) -> NoReturn:
    raise error(f"mask or score has {got}; {needed}: try {instead}")
