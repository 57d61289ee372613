"""A mask or a score that a user writes as a function, as data: traced once, and computed by the kernels and by the reference.

    mask(batch, head, q_idx, kv_idx, *tensors) -> bool              score(score, batch, head, q_idx, kv_idx, *tensors) -> score

The function is called with symbols in the place of numbers. What it does to them becomes an :class:`Expression`, a graph of
operations and constants: no tensor's value is in it, so it is a part of a kernel's key. Tensors that are indexed by a symbol,
whether the function got them as arguments or holds them in a closure, are *captured*: a kernel reads them when it runs.

Each node is ``(operation, kind, *operands)``, where operands are nodes before it, and a kind is ``"bool"``, ``"int"`` (32 bits)
or ``"float"`` (the dtype in which scores are added up). Whoever computes it brings the operations that differ between torch and
the DSL as ``ops``: :class:`TorchOps` here, the kernels' in ``mainloop/elements.py``.

**Derivative.** Next to each node x that depends on the score s lies, on demand, dx/ds: a dual number is two nodes. So the
gradient's factor ds'/ds is one more output of the same graph, and where it is 1 (a bias) there is nothing to compute. The same
with an element of a captured tensor in the place of s gives that tensor's gradient: each node that loads one which requires a
gradient is a direction of its own. Where there is none it is what torch's autograd says: of abs 0 at 0, of maximum and minimum
of equal operands a half each, and of clamp at a bound that of the number, so that its two are operations of their own.

**A ramp** is a score to which a multiple of positions is added, and nothing else is done (ALiBi, where all keys that are seen
come before the query). Kernels need no conversion of each distance then, and scores keep the unit that products have.

**Indices** that are too large read a dimension's last element, and those below 0 its first one: a score is computed before the
mask hides it, and where it is hidden an index may be anything.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from cute_attn import memo
from cute_attn.arguments import check_layout, check_tensor, shown
from cute_attn.lengths import are_checked
from cute_attn.private import FakeTensor, is_recorded

RANK_MAX = 4
LEAST_SCALE_OF_RAMPS = 2.0**-40  # what they are divided by it must stay far from infinity
RESTORED_MAX = 1024  # expressions; each of another text, or tensors
# Copies of a gradient may take so much memory, or so many bytes an element; what is added up takes 4.
COPIES_BYTES, COPIES_OF_ELEMENT = 1 << 30, 8
KINDS = {"bool": torch.bool, "int": torch.int32, "float": torch.float32}
_BLANK = {kind: torch.empty(1, dtype=dtype, device="meta") for kind, dtype in KINDS.items()}
POSITIONS = ("batch", "head", "q_idx", "kv_idx", "shift")  # shift: of the key that query 0 is aligned with
LOADED = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), "float"),
    **dict.fromkeys((torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64), "int"),
    torch.bool: "bool",
}
ALLOWED = (
    "arithmetic, comparisons, & | ~, torch.where, minimum, maximum, clamp, abs, exp, log, tanh, sqrt, // and %, conversions "
    "and tensors that are indexed"
)


class Partial(NamedTuple):
    """The derivative of the score by what a node loads: ``slope`` is its node, None where it is 1. ``alone`` says that no two
    scores of a batch element and head load the same element, so that a gradient is stored and not added: in a copy for each
    value of the positions ``copied``, of which a sum is taken afterwards. ``fours`` says that those of four neighbouring keys,
    16 bits each, can be stored at once."""

    load: int
    slope: int | None
    alone: bool
    copied: tuple[str, ...] = ()
    fours: bool = False


class Ramp(NamedTuple):
    """``score + sign · factor · (Σ coefficient · position + constant)``: ``factor`` is a node that depends on the batch and the
    head alone, and coefficients are ints."""

    factor: int
    sign: int
    coefficients: tuple[tuple[str, int], ...]
    constant: int

    def of(self, name: str) -> int:
        """The coefficient of a position."""
        return dict(self.coefficients).get(name, 0)


@dataclass(frozen=True)
class Expression:
    """What a mask and a score compute. Without functions it is empty, and false.

    ``mask``, ``score`` and ``slope`` are numbers of nodes: whether a query sees a key; the score; its derivative by the score
    it was given, ``None`` where that is 1. ``tensors`` is of each captured one its dtype, as torch names it, its rank, and
    how many neighbours can be loaded at once; ``partials`` are the derivatives by those that require a gradient. ``ramp`` is
    what the score is, if it is one that the kernels may take as such.
    """

    nodes: tuple = ()
    mask: int | None = None
    score: int | None = None
    slope: int | None = None
    tensors: tuple = ()
    partials: tuple[Partial, ...] = ()
    ramp: Ramp | None = None

    def __bool__(self) -> bool:
        return bool(self.nodes)

    def __hash__(self) -> int:  # asked for in every call
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.mask, self.score, self.slope, self.tensors, self.partials, self.ramp))

    @property
    def natural(self) -> bool:
        """Whether kernels compute the score, in natural logarithms."""
        return self.score is not None and self.ramp is None

    @cached_property
    def without_partials(self) -> Expression:
        """What a pass takes that adds up no gradients of captured tensors."""
        return _trimmed(replace(self, partials=())) if self.partials else self

    @cached_property
    def derived(self) -> dict[int, Partial]:
        """The numbers of the captured tensors that have gradients, in order, and a derivative by each."""
        slots = [self.nodes[partial.load][2] for partial in self.partials]
        return {slot: self.partials[slots.index(slot)] for slot in sorted(set(slots))}

    def fitting(self, call: Any) -> Expression:
        """The same for a call whose other rules are known. The sinks' gradient takes the log-sum-exp, of which the backward
        pass takes off a part of a ramp; and a ramp is divided by the scale."""
        if self.ramp is not None and (call.softcap or call.sinks is not None or call.scale < LEAST_SCALE_OF_RAMPS):
            return replace(self, ramp=None)
        return self

    def value(self, node: int, leaf: Callable, ops: Any, known: dict, place: Callable = lambda node: node) -> Any:
        """What a node is worth. ``leaf(name)`` is a position's or the score's value; ``known`` has what was computed before, at
        ``place(node)``, from which the value is taken if it is there."""
        at = place(node)
        if at not in known:
            op, kind, *operands = self.nodes[node]
            if op == "constant":
                known[at] = ops.constant(kind, operands[0])
            elif op == "leaf":
                known[at] = leaf(operands[0])
            elif op == "load":
                known[at] = ops.load(operands[0], kind, self.indices(node, leaf, ops, known, place))
            else:
                values = [self.value(i, leaf, ops, known, place) for i in operands]
                known[at] = _OPERATORS[op](*values) if op in _OPERATORS else ops.compute(op, kind, *values)
        return known[at]

    def indices(self, node: int, leaf: Callable, ops: Any, known: dict, place: Callable = lambda node: node) -> list[tuple]:
        """Of a node that loads, each index's value, and whether it is a position as it is."""
        where = self.nodes[node][3:]
        return [(self.value(i, leaf, ops, known, place), self.nodes[i][2] in POSITIONS) for i in where]

    def neighbours(self, n: int) -> tuple[int, ...]:
        """The nodes that load ``n`` neighbouring keys at once, if a thread asks for these: their last index is the key."""
        found = []
        for node, (op, _, *operands) in enumerate(self.nodes):
            if op == "load" and self.tensors[operands[0]][2] >= n:
                *before, last = operands[1:]
                names = set().union(*(self.leaves()[i] for i in before))
                if self.nodes[last] == ("leaf", "int", "kv_idx") and not names & {"kv_idx", "score"}:
                    found.append(node)
        return tuple(found)

    def leaves(self) -> list[frozenset[str]]:
        """Of each node the names of the leaves that it depends on."""
        found: list[frozenset[str]] = []
        for node in self.nodes:
            found.append(frozenset(node[2:]) if node[0] == "leaf" else frozenset().union(*(found[i] for i in _inputs(node))))
        return found


def _inputs(node: tuple) -> tuple[int, ...]:
    """The nodes whose values a node is computed of."""
    return () if node[0] in ("leaf", "constant") else node[3 if node[0] == "load" else 2 :]


NOTHING = Expression()
_OPERATORS: dict[str, Callable] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "lt", "le", "gt", "ge", "eq", "ne")},
    **{name: getattr(operator, f"{name}_") for name in ("and", "or")},
    "xor": operator.xor,
}


class TorchOps:
    """The operations for torch: numbers are tensors, which broadcast against one another; floats are ``dtype``."""

    NAMES: ClassVar = {"invert": "logical_not", "div": "true_divide", "floordiv": "floor_divide", "mod": "remainder"}

    def __init__(self, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype, device: torch.device):
        self.tensors, self.device = tensors, device
        self.dtypes = {**KINDS, "float": dtype}

    def constant(self, kind: str, text: str):
        return torch.tensor(number_of(kind, text), dtype=self.dtypes[kind], device=self.device)

    def load(self, slot: int, kind: str, indices: list):
        tensor = self.tensors[slot]
        where = tuple(i.clamp(0, size - 1) for (i, _), size in zip(indices, tensor.shape, strict=True))
        return tensor[where].to(self.dtypes[kind])

    def compute(self, op: str, kind: str, *values):
        return values[0].to(self.dtypes[kind]) if op == "cast" else getattr(torch, self.NAMES.get(op, op))(*values)


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
    """The nodes of a mask and a score while they are traced, each once. ``called_elsewhere``: not by :func:`traced`, but where
    what torch.compile made of the functions is called, with :func:`positions`."""

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
            _refuse(f"the constant {value}", "integers of 32 bits are needed", "a float, or a captured tensor")
        return self.make("constant", kind, value.hex() if isinstance(value, float) else repr(value))

    def kind(self, node: int) -> str:
        return self.nodes[node][1]

    def cast(self, node: int, kind: str) -> int:
        op, had, *operands = self.nodes[node]
        if had == kind:
            return node
        if op == "constant":
            return self.constant({"bool": bool, "int": int, "float": float}[kind](number_of(had, operands[0])))
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
                _refuse(f"a captured tensor without an index for {left}", "a number is needed", "an index for each dimension")
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
                _refuse(
                    f"a tensor of shape {tuple(x.shape)} that is no number", "one element of it is needed for each score",
                    "an index for each dimension, such as tensor[head, q_idx]",
                )  # fmt: skip
            return self.load(x, ())
        _refuse(f"{shown(x)} as an operand", "a number or a tensor is needed", "float() or torch.tensor() of it")

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
            _refuse(got, f"at most {RANK_MAX} dimensions are needed", "flatten() of some of them before the call")
        if x.dtype not in LOADED:
            _refuse(got, "floats, integers of up to 64 bits or bools are needed", ".to(torch.float32)")
        if not x.numel():
            _refuse(got, "at least one element is needed", "leaving the function out", ValueError)
        if x.dim() and x.device != self.device:
            _refuse(f"{got} on {x.device}, with q on {self.device}", "one device is needed", ".to(q.device)", ValueError)

    def index(self, x: torch.Tensor, where: Any) -> Symbol:
        if isinstance(x, Symbol) and x.node is not None:
            _refuse("an index into a number", "a captured tensor is needed", "the tensor itself")
        tensor, before = x.part if isinstance(x, Symbol) else (x, ())
        where = where if isinstance(where, tuple) else (where,)
        found = []
        for i in where:
            if isinstance(i, (slice, type(None), type(...), list)):
                text = "..." if i is ... else repr(i)
                _refuse(f"the index {text}", "one number for each dimension is needed", "the indexing before the call")
            node = self.operand(i)
            if self.kind(node) != "int":
                _refuse(f"an index of kind {self.kind(node)}", "an integer is needed", ".to(torch.int32)")
            op, _, *value = self.nodes[node]
            if op == "constant" and int(value[0]) < 0:  # of any kind of int: numpy's, too
                _refuse(f"the index {i}", "an index from 0 on is needed", f"tensor.shape[…] - {value[0][1:]}")
            found.append(node)
        indices = (*before, *found)
        if len(indices) > tensor.dim():
            _refuse(f"{len(indices)} indices of a tensor of shape {tuple(tensor.shape)}", "one a dimension is needed", "fewer")
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
        if op == "where":
            return self.apply_where(x[0], *(zero if dx is None else dx for dx in d[1:]))
        if op in ("clamp_min", "clamp_max"):
            inside = self.make("ge" if op == "clamp_min" else "le", "bool", *x)
            return self.apply_where(inside, *(zero if dx is None else dx for dx in d))
        if op in ("maximum", "minimum"):
            if d[0] == d[1]:
                return d[0]
            halves = self._sum(*(self._times(dx, self.constant(0.5)) for dx in d))
            first, second = (zero if dx is None else dx for dx in d)
            other = self.apply_where(self.make("eq", "bool", *x), halves, second)  # type: ignore[arg-type]
            return self.apply_where(self.make("gt" if op == "maximum" else "lt", "bool", *x), first, other)
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
_KNOWN = frozenset(
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
            _refuse(f"{name} of one tensor", f"{ALLOWED} are there", _INSTEAD[name])
        name = _SYNONYMS.get(name, name)
        if func is torch.Tensor.where:
            args = (args[1], args[0], args[2])
        if (name in _FILLED or name in ("to", "bool", "int", "float")) and not func.__name__.startswith("__"):
            return self._converted(name, args, kwargs)
        if name not in (*_BINARY, *_FLOATS, "neg", "abs", "invert", "where", "clamp"):
            _refuse_operation(func.__name__)
        rounding = kwargs.pop("rounding_mode", None)
        if rounding not in (None, "floor"):
            _refuse(f"{func.__name__} with rounding_mode={rounding!r}", "'floor' or None is needed", "// of absolute values")
        if more := [key for key in kwargs if key not in ("min", "max", "other", "exponent", "value")]:
            _refuse(f"{func.__name__} with {', '.join(more)}", "its operands alone are needed", "leaving these out")
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
                _refuse(f"{name} of floats", "conditions or integers are needed", "a comparison")
            return graph.apply(name, *nodes)
        if name in ("floordiv", "mod") and "float" in map(graph.kind, nodes):
            _refuse(f"{name} of floats", "integers are needed", ".to(torch.int32)")
        if name in ("floordiv", "mod") and graph.nodes[nodes[1]] == ("constant", "int", "0"):
            _refuse(f"{name} by 0", "another divisor is needed", "1 or more", ValueError)
        if name in _ARITHMETIC:
            return graph.apply(name, *nodes, at_least="float" if name == "div" else "int")
        if name == "where":
            return graph.apply_where(*nodes)
        if graph.kind(nodes[0]) != "bool":  # of invert
            _refuse("~ of numbers", "a condition is needed", "-1 - x, or a comparison")
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
            _refuse(f"a conversion to {dtype}", "a float, an integer or bool is needed", "torch.float32")
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
            _refuse("a power with a symbol for the exponent", "a base of 2, or a number, is needed", "torch.exp")
        if exponent == 0.5:
            return graph.apply("sqrt", graph.operand(base), at_least="float")
        if not (type(exponent) is int and 1 <= exponent <= 8):
            _refuse(f"a power with the exponent {shown(exponent)}", "an int from 1 to 8, or 0.5, is needed", "torch.exp")
        node = first = graph.operand(base)
        for _ in range(exponent - 1):
            node = graph.apply("mul", node, first, at_least="int")
        return node


def traced(
    mask: Callable | None, score: Callable | None, tensors: Any, alibi_slopes, q: torch.Tensor, heads: int, batch: int,
    bias: torch.Tensor | None = None, lengths: tuple[int, int] | None = None, behind: bool = False, as_text: bool = False,
):  # fmt: skip
    """``(expression, captured tensors)`` of what a user passes: a mask and a score, what they get beside positions, and the
    slopes of ALiBi and a bias, which are added last. Calls each function once. ``lengths`` are (seqlen_q, seqlen_k), None where
    sequences have their own. ``behind``: no query sees a key that comes after the one it is aligned with. ``as_text`` returns
    in the place of the expression what :func:`restored` makes one of, where the tensors have no values or addresses yet.

    Raises ``TypeError``, ``ValueError`` and ``NotImplementedError`` for what a function can't do, or tensors that don't fit.
    """
    check_functions(mask, score, tensors)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, heads, batch)
    code = getattr(mask if mask is not None else score if score is not None else _alibi, "__code__", None)
    sizes = dict(zip(POSITIONS, (batch, heads, *(lengths or (None, None))), strict=False))
    element = element_of(bias) if bias is not None and _is_bias(bias, q, sizes) else None
    graph = next((f.graph for f in (mask, score) if isinstance(f, Called) and f.graph), None) or Graph(q.device)
    if as_text:
        ends = _recorded(graph, mask, score, tensors, alibi_slopes, element, behind)
        if shapes := [f.result for f in (mask, score) if isinstance(f, Called) and f.of_shapes]:
            return OF_SHAPES, (*_on_device(graph.captured, q.device), *shapes)  # whose gradients make the output require one
        if ends == (None, None):
            return "", ()
        return repr((graph.nodes, *ends)), _on_device(graph.captured, q.device)
    given = mask, score, tuple(tensors), alibi_slopes, element, q.device, torch.is_grad_enabled(), behind
    kept = memo.find(code, given, lambda trace, captured: _fits(trace, captured, sizes))
    if kept is not None:
        (expression, _), captured = kept
        return expression, _on_device(captured, q.device)
    matches = memo.matcher(given, _KNOWN)
    seen, changed = _recorded(graph, mask, score, tensors, alibi_slopes, element, behind)
    if seen is None and changed is None:
        return NOTHING, ()
    captured = _on_device(graph.captured, q.device)
    expression = _completed(graph, seen, changed, captured, sizes, torch.is_grad_enabled())
    if matches is not None and graph.pure and code is not None:
        memo.keep(code, given, matches, (expression, sizes if expression.partials else None), tuple(graph.captured))
    return expression, captured


def check_functions(mask: Any, score: Any, tensors: Any) -> None:
    """Refuse what are no functions, or no tensors that these get."""
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(x, torch.Tensor) for x in tensors):
        raise TypeError(f"tensors is {shown(tensors)}; a tuple of tensors is needed: try tensors=(table,)")
    if tensors and mask is None and score is None:
        raise TypeError(
            "tensors are given without mask or score; a function that reads them is needed: try score=fn, or leave them out"
        )
    for name, function in (("mask", mask), ("score", score)):
        if function is not None and not callable(function):
            takes = f"{'score, ' * (name == 'score')}batch, head, q_idx, kv_idx"
            raise TypeError(f"{name} is {shown(function)}; a function is needed: try {name}=lambda {takes}: …")


def check_values(captured: tuple[torch.Tensor, ...]) -> None:
    """With ``CUTE_ATTN_CHECK=1`` read integers of 64 bits back and refuse those that would be cut."""
    for x in captured:
        if x.dtype == torch.int64 and are_checked():
            least, most = (int(end) for end in x.aminmax())
            if not -(2**31) <= least <= most < 2**31:
                got = f"a captured tensor of shape {tuple(x.shape)} with values from {least} to {most}"
                _refuse(got, "integers of 32 bits are needed", "torch.unique(x, return_inverse=True)[1]", ValueError)


def _recorded(graph: Graph, mask, score, tensors, alibi_slopes, element, behind: bool) -> tuple[int | None, int | None]:
    """The nodes of whether a key is seen, and of what becomes of the score; None where there is nothing to compute."""
    batch, head, q_idx, kv_idx, shift = map(graph.leaf, POSITIONS)
    seen = None
    if mask is not None:
        seen = graph.cast(_called(graph, "mask", mask, (batch, head, q_idx, kv_idx, *tensors), "bool"), "bool")
    scored = before = graph.leaf("score")
    if score is not None:
        scored = graph.symbol(_called(graph, "score", score, (scored, batch, head, q_idx, kv_idx, *tensors), "float"))
    if alibi_slopes is not None:
        arguments = (scored, batch, head, q_idx, kv_idx, shift, alibi_slopes, behind)
        scored = graph.symbol(_called(graph, "alibi_slopes", _alibi, arguments, "float"))
    if element is not None:
        to_bias = (scored, batch, head, q_idx, kv_idx)
        scored = graph.symbol(_called(graph, "bias", lambda score, *where: score + element(*where), to_bias, "float"))
    return seen, None if scored.node == before.node else scored.node


def _completed(
    graph: Graph, seen: int | None, changed: int | None, captured: tuple, sizes: dict[str, int | None], differentiated: bool
) -> Expression:
    """The expression of two nodes, with the derivatives that are needed. ``captured`` lie where they are read."""
    slope: int | None = None
    partials: tuple[Partial, ...] = ()
    if changed is not None:
        slope = graph.slope(changed, graph.make("leaf", "float", "score"))
        slope = graph.constant(0.0) if slope is None else None if slope == graph.constant(1.0) else slope
        partials = _partials(graph, changed, sizes) if differentiated else ()
    kinds = tuple((str(x.dtype).removeprefix("torch."), x.dim(), _neighbours(x, sizes["kv_idx"])) for x in captured)
    expression = _trimmed(Expression(tuple(graph.nodes), seen, changed, slope, kinds, partials))
    if changed is not None and not partials:
        expression = replace(expression, ramp=_ramp(expression))
    return expression


def _on_device(captured, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(x if x.device == device else x.to(device) for x in captured)


# ---- in graphs -------------------------------------------------------------------------------------------------------

OF_SHAPES = "of shapes only"
_restored: dict[tuple, Expression] = {}


def restored(
    text: str, captured: tuple[torch.Tensor, ...], batch: int, heads: int, lengths: tuple[int, int] | None
) -> Expression:
    """The expression whose text :func:`traced` returned, with derivatives by those of the tensors that require a gradient."""
    sizes = dict(zip(POSITIONS, (batch, heads, *(lengths or (None, None))), strict=False))
    alike = tuple((x.dtype, x.shape, x.requires_grad, _neighbours(x, sizes["kv_idx"])) for x in captured)
    differentiated = any(x.requires_grad for x in captured)
    key = text, alike, tuple(sizes.values()) if differentiated else None
    found = _restored.get(key)
    if found is None:
        if text == OF_SHAPES:
            raise RuntimeError(
                "mask or score was called to see what shapes there are, and what it computes is not known; a graph that "
                "torch.compile or torch.export has made is needed: try torch.compiler.disable around attention"
            )
        nodes, seen, changed = ast.literal_eval(text)
        graph = Graph(captured[0].device if captured else torch.device("cpu"))
        graph.nodes, graph.captured = nodes, list(captured)
        graph.numbers = {node: i for i, node in enumerate(nodes)}
        found = _completed(graph, seen, changed, captured, sizes, differentiated)
        if len(_restored) >= RESTORED_MAX:
            _restored.clear()
        _restored[key] = found
    return found


@dataclass(frozen=True)
class Called:
    """A function that was called before, with :func:`positions`, and what it returned, by whose graph."""

    result: Any
    graph: Graph | None

    @property
    def of_shapes(self) -> bool:
        """Whether it was called with no symbols, but to see what shapes there are."""
        return isinstance(self.result, FakeTensor) and self.result.dim() > 0

    def __call__(self, *_: Any) -> Any:
        return self.result.new_empty(()) if self.of_shapes else self.result


def positions(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The positions that functions are called with while torch.compile follows them: symbols where what it made of them is run.
    Before, where it looks for shapes only, tensors without values; of one element, since torch would read an index of 0
    dimensions."""
    if isinstance(q, FakeTensor) and not is_recorded():
        return tuple(q.new_empty(1, dtype=KINDS["int"]) for _ in POSITIONS[:-1])
    graph = Graph(q.device, called_elsewhere=True)
    return tuple(map(graph.leaf, POSITIONS))[:-1]


def score_of(position: torch.Tensor) -> torch.Tensor:
    """The score to such a position, from when on it is asked for: nodes have the order that :func:`traced` gives them."""
    if isinstance(position, Symbol):
        return position.graph.leaf("score")
    return position.new_empty(1, dtype=KINDS["float"])


_REVERSED = {f"__r{name}__": getattr(operator, name) for name in ("sub", "truediv", "floordiv", "mod", "pow")}
_REVERSED["__rdiv__"] = operator.truediv


class Indexing(TorchFunctionMode):
    """Has :func:`element` take elements of tensors while torch.compile follows functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return element(*args)
        if func.__name__ in _REVERSED:  # torch writes these in Python, of other operations
            return _REVERSED[func.__name__](args[1], args[0])
        return func(*args, **(kwargs or {}))


def element(x: torch.Tensor, where: Any) -> torch.Tensor:
    """``x[where]``; where torch.compile looks for shapes only, of the shape that numbers for indices leave: those of
    :func:`positions` have one element, for which torch leaves a dimension, and what is loaded is of any integer dtype."""
    if not isinstance(x, FakeTensor) or is_recorded():
        return x[where]
    indices = where if isinstance(where, tuple) else (where,)
    numbers = all(isinstance(i, (int, torch.SymInt, torch.Tensor)) and not isinstance(i, bool) for i in indices)
    symbols = [i for i in indices if isinstance(i, torch.Tensor) and i.shape == (1,)]
    if not (numbers and symbols and len(indices) <= x.dim()) or any(i.is_floating_point() for i in symbols):
        return x[where]
    return x.new_empty(x.shape[len(indices) :] or (1,)).requires_grad_(x.requires_grad and torch.is_grad_enabled())


def _fits(trace: tuple, captured: tuple, sizes: dict[str, int | None]) -> bool:
    """Whether a trace that is kept is right for these sizes and addresses."""
    (expression, of_sizes), keys = trace, sizes["kv_idx"]
    alike = (n == _neighbours(x, keys) for (_, _, n), x in zip(expression.tensors, captured, strict=True))
    return of_sizes in (None, sizes) and all(alike)


def _neighbours(x: torch.Tensor, keys: int | None) -> int:
    """How many elements, of 8 bytes at most, are at an address that is a multiple of all, from each multiple of so many on, for
    all of so many keys."""
    if not x.dim() or x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or keys is None or x.shape[-1] < keys:
        return 1
    *strides, last = x.stride()
    n = 8 // x.element_size()
    while n > 1 and any(size % n for size in (x.shape[-1], *strides, x.data_ptr() // x.element_size())):
        n //= 2
    return n if last == 1 else 1


def _partials(graph: Graph, score: int, sizes: dict[str, int | None]) -> tuple[Partial, ...]:
    """The score's derivatives by what is loaded of captured tensors that require a gradient."""
    found = []
    for load in range(len(graph.nodes)):
        op, kind, *operands = graph.nodes[load]
        if op == "load" and kind == "float" and graph.captured[operands[0]].requires_grad:
            slope = graph.slope(score, load)
            if slope is not None:
                one = slope == graph.constant(1.0)
                found.append(Partial(load, None if one else slope, False))
    slots = [graph.nodes[partial.load][2] for partial in found]
    for i, (partial, slot) in enumerate(zip(found, slots, strict=True)):
        copied, x = _copied(graph, partial.load, sizes), graph.captured[slot]
        if copied is not None and slots.count(slot) == 1:
            by_key = graph.nodes[graph.nodes[partial.load][-1]] == ("leaf", "int", "kv_idx") and not x.shape[-1] % 4
            found[i] = partial._replace(alone=True, copied=copied, fours=by_key and x.element_size() == 2)
    return tuple(found)


def _copied(graph: Graph, load: int, sizes: dict[str, int | None]) -> tuple[str, ...] | None:
    """For which positions a gradient has to have copies, so that each score has an element of its own: there are indices for
    its row, its key, and all else that differs. None if it can't have them, or not so many."""
    slot, *where = graph.nodes[load][2:]
    names, x = [graph.nodes[i][2] if graph.nodes[i][0] == "leaf" else "" for i in where], graph.captured[slot]
    fits = all(sizes.get(name) == size for name, size in zip(names, x.shape, strict=True))
    if not fits or len(set(names)) != len(names) or not {"q_idx", "kv_idx"} <= set(names):
        return None
    missing = {name: size for name, size in sizes.items() if name not in names and size not in (None, 1)}
    copies = math.prod(missing.values())
    many = max(COPIES_OF_ELEMENT, COPIES_BYTES // max(x.numel(), 1)) // x.element_size()
    return tuple(missing) if copies <= many else None


def _called(graph: Graph, name: str, function: Any, arguments: tuple, kind: str) -> int:
    """The node that a function returns."""
    with Tracing(graph):
        result = function(*arguments)
    if not isinstance(result, (Symbol, bool, int, float, np.generic, torch.Tensor)):
        raise TypeError(f"{name} returns {shown(result)}; a {kind} is needed: try return of what the function computes")
    node = graph.operand(result)
    if (graph.kind(node) == "bool") != (kind == "bool"):
        instead = "a comparison, or score= for biases" if kind == "bool" else "torch.where(condition, score, …), or mask="
        raise TypeError(f"{name} returns values of kind {graph.kind(node)}; a {kind} is needed: try {instead}")
    return graph.cast(node, kind)


def _trimmed(whole: Expression) -> Expression:
    """The same without the nodes that no output needs: they are no part of the key."""
    ends = [node for node in (whole.mask, whole.score, whole.slope) if node is not None]
    ends += [node for partial in whole.partials for node in partial[:2] if node is not None]
    needed = set(ends)
    for node in range(len(whole.nodes) - 1, -1, -1):
        if node in needed:
            needed |= set(_inputs(whole.nodes[node]))
    place: dict[int | None, int | None] = {node: i for i, node in enumerate(sorted(needed))}
    nodes = []
    for node in map(whole.nodes.__getitem__, sorted(needed)):
        inputs = _inputs(node)
        nodes.append((*node[: len(node) - len(inputs)], *map(place.__getitem__, inputs)))
    place[None] = None
    partials = tuple(x._replace(load=place[x.load], slope=place[x.slope]) for x in whole.partials)  # type: ignore[arg-type]
    return Expression(tuple(nodes), place[whole.mask], place[whole.score], place[whole.slope], whole.tensors, partials)


def _ramp(expression: Expression) -> Ramp | None:
    """What the score is, if it is a ramp along the keys."""
    nodes, leaves = expression.nodes, expression.leaves()
    op, _, *terms = nodes[expression.score]  # type: ignore[index]
    if op not in ("add", "sub"):
        return None
    before = [nodes[i] == ("leaf", "float", "score") for i in terms]
    if sum(before) != 1 or (op == "sub" and before[1]):
        return None
    added = nodes[terms[before.index(False)]]
    if added[0] != "mul":
        return None
    for factor, positions in (added[2:], added[:1:-1]):
        if leaves[factor] <= {"batch", "head"} and nodes[positions][0] == "cast":
            found = _sum_of_positions(nodes, nodes[positions][2])
            if found is not None and found.get("kv_idx"):
                constant = found.pop("", 0)
                return Ramp(factor, 1 if op == "add" else -1, tuple(sorted(found.items())), constant)
    return None


def _sum_of_positions(nodes: tuple, node: int) -> dict[str, int] | None:
    """The coefficients of positions in a sum of them, and of ``""`` its constant."""
    op, kind, *x = nodes[node]
    if kind != "int" or op not in ("leaf", "constant", "neg", "add", "sub") or x[0] in ("batch", "head"):
        return None
    if op in ("leaf", "constant"):
        return {x[0]: 1} if op == "leaf" else {"": int(x[0])}
    parts = [_sum_of_positions(nodes, i) for i in x]
    signs = (-1,) if op == "neg" else (1, 1 if op == "add" else -1)
    found: dict[str, int] = {}
    for part, sign in zip(parts, signs, strict=True):
        if part is None:
            return None
        for name, n in part.items():
            found[name] = found.get(name, 0) + sign * n
    return found


def _alibi(score, batch, head, q_idx, kv_idx, shift, slopes, behind: bool):
    slope = slopes[head] if slopes.dim() == 1 else slopes[batch, head]
    distance = q_idx + shift - kv_idx
    return score - slope * (distance if behind else torch.abs(distance))


def _check_slopes(x: Any, q: torch.Tensor, heads: int, batch: int) -> None:
    need = f"float32 ({heads},) or ({batch}, {heads}), (heads,) or (batch, heads), on {q.device}"
    check_tensor("alibi_slopes", x, f"a tensor, {need}, is needed: try torch.tensor(alibi_slopes)")
    if x.dtype != torch.float32 or x.device != q.device or x.shape not in ((heads,), (batch, heads)):
        hint = ".float() and .to(q.device)" if x.shape in ((heads,), (batch, heads)) else f"a slope for each of {heads} heads"
        raise ValueError(f"alibi_slopes is {shown(x)} on {x.device}; {need}, is needed: try {hint}")


def element_of(x: torch.Tensor) -> Callable:
    """A function of positions that takes an element of ``x``, which broadcasts to ``(batch, heads, seqlen_q, seqlen_k)``. It
    has an index for each dimension along which x differs, those that are closest in memory last."""
    strides = dict(zip(range(4 - x.dim(), 4), zip(x.shape, x.stride(), strict=True), strict=True))
    differ = [n for n, (size, stride) in strides.items() if size > 1 and stride]
    # By how many strides are larger, and not by the stride itself: torch.compile may have a symbol for that, and sorts by none.
    dims = tuple(sorted(differ, key=lambda n: len([m for m in differ if strides[m][1] > strides[n][1]])))
    part = x[tuple(slice(None) if dim in dims else 0 for dim in strides)]
    part = part.permute([sorted(dims).index(dim) for dim in dims])
    return lambda *where: part[tuple(where[dim] for dim in dims)]


def _is_bias(x: Any, q: torch.Tensor, sizes: dict[str, int | None]) -> bool:
    """Refuse what is no bias; whether it has any element."""
    rows = ("any" if size is None else str(size) for size in sizes.values())
    dtypes = " or ".join(dict.fromkeys(str(dtype) for dtype in (q.dtype, torch.float32)))
    need = f"a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), ({', '.join(rows)}), of {dtypes}, on {q.device}"
    check_tensor("bias", x, f"{need}, is needed: try torch.tensor(bias)")
    sized = zip(reversed(x.shape), reversed(list(sizes.values())), strict=False)
    if x.dim() > 4 or not all(n == 1 or size is None or n == size for n, size in sized):
        raise ValueError(f"bias has shape {tuple(x.shape)}; {need}, is needed: try unsqueeze for dimensions that are missing")
    if x.dtype not in (q.dtype, torch.float32) or x.device != q.device:
        hint = "mask=cute_attn.masks.given(bias)" if x.dtype == torch.bool else ".to(q.dtype) and .to(q.device)"
        raise ValueError(f"bias is {shown(x)} on {x.device}; {need}, is needed: try {hint}")
    return bool(x.numel())


def number_of(kind: str, text: str) -> bool | int | float:
    """What a constant's node says."""
    return float.fromhex(text) if kind == "float" else text == "True" if kind == "bool" else int(text)


def _flat(values: Any):
    for x in values.values() if isinstance(values, dict) else values:
        if isinstance(x, (tuple, list, dict)):
            yield from _flat(x)
        else:
            yield x


def _refuse_operation(name: str) -> NoReturn:
    plain = name.strip("_") if name.startswith("__") else name
    instead = _INSTEAD.get(plain, "x = x + y instead of x += y" if plain.endswith("_") else "one of these")
    _refuse(f"{plain}()" if name.startswith("__") else plain, f"{ALLOWED} are there", instead)


def _refuse(got: str, needed: str, instead: str, error: type[Exception] = NotImplementedError) -> NoReturn:
    raise error(f"mask or score has {got}; {needed}: try {instead}")
