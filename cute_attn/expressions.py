"""What a mask or a score computes that a user writes as a function, as data: computed by the kernels and by the reference.

    mask(batch, head, q_idx, kv_idx, *tensors) -> bool              score(score, batch, head, q_idx, kv_idx, *tensors) -> score

The function is called once (``functions.py``), with symbols (``tracing.py``), and what it does becomes an :class:`Expression`:
a graph of operations and constants. No tensor's value is in it, so it is a part of a kernel's key. Tensors that are indexed by
a symbol, whether the function got them as arguments or holds them in a closure, are *captured*: a kernel reads them when it
runs.

Each node is ``(operation, kind, *operands)``, where operands are nodes before it, and a kind is ``"bool"``, ``"int"`` (32 bits)
or ``"float"`` (the dtype in which scores are added up). Whoever computes it brings the operations that differ between torch and
the DSL as ``ops``: :class:`TorchOps` here, the kernels' in ``mainloop/elements.py``.

**A ramp** is a score to which a multiple of positions is added, and nothing else is done (ALiBi, where all keys that are seen
come before the query). Kernels need no conversion of each distance then, and scores keep the unit that products have.

**Indices** that are too large read a dimension's last element, and those below 0 its first one: a score is computed before the
mask hides it, and where it is hidden an index may be anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch

LEAST_SCALE_OF_RAMPS = 2.0**-40  # what they are divided by it must stay far from infinity
KINDS = {"bool": torch.bool, "int": torch.int32, "float": torch.float32}
POSITIONS = ("batch", "head", "q_idx", "kv_idx", "shift")  # shift: of the key that query 0 is aligned with


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
        return trimmed(replace(self, partials=())) if self.partials else self

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


def number_of(kind: str, text: str) -> bool | int | float:
    """What a constant's node says."""
    return float.fromhex(text) if kind == "float" else text == "True" if kind == "bool" else int(text)


def trimmed(whole: Expression) -> Expression:
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


def ramp_of(expression: Expression) -> Ramp | None:
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
