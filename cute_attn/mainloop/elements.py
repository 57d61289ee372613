"""What a user's functions compute, for a thread's scores: the operations of ``expressions.py`` on the DSL's values.

Each node is computed as often as it has to be: for each score what depends on it or on both positions, for each row or column
of the thread what depends on one position, and once what depends on neither, such as a slope of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.expressions import Expression
from cute_attn.rules import LN_2, LOG2_E

KINDS = {"bool": Boolean, "int": Int32, "float": Float32}


class ElementOps:
    """The operations for the DSL's values, of 32 bits; ``tensors`` are the captured ones."""

    def __init__(self, tensors: tuple):
        self.tensors = tensors

    def constant(self, kind: str, text: str):
        return KINDS[kind](float.fromhex(text) if kind == "float" else text == "True" if kind == "bool" else int(text))

    def load(self, slot: int, kind: str, indices: list):
        """An element of a captured tensor. Indices are cut to what there is: scores past a sequence's end are computed, too."""
        tensor, where = _words(self.tensors[slot]), []
        for dim, (index, is_position) in enumerate(indices):
            index = cutlass.min(index, tensor.shape[dim] - 1)
            where.append(index if is_position else cutlass.max(index, 0))
        value = tensor[tuple(where) if where else 0]
        return value != 0 if kind == "bool" else value.to(KINDS[kind])

    def compute(self, op: str, kind: str, *values):
        return getattr(self, f"_{op}")(kind, *values)

    def _cast(self, kind, x):
        if kind == "bool":
            return x != 0
        return _select(x, KINDS[kind](1), KINDS[kind](0)) if x.dtype is Boolean else x.to(KINDS[kind])

    def _invert(self, kind, x):
        return x == Boolean(False)

    def _where(self, kind, condition, x, y):
        return _select(condition, x, y)

    def _maximum(self, kind, x, y):
        return cute.arch.fmax(x, y, nan=True) if kind == "float" else cutlass.max(x, y)

    def _minimum(self, kind, x, y):
        return -cute.arch.fmax(-x, -y, nan=True) if kind == "float" else cutlass.min(x, y)

    def _abs(self, kind, x):
        return cute.math.absf(x) if kind == "float" else cutlass.max(x, -x)

    def _div(self, kind, x, y):
        return x * cute.arch.rcp_approx(y)

    def _floordiv(self, kind, x, y):
        return x // y

    def _mod(self, kind, x, y):
        return x - x // y * y

    def _exp(self, kind, x):
        return cute.math.exp2(x * LOG2_E, fastmath=True)

    def _exp2(self, kind, x):
        return cute.math.exp2(x, fastmath=True)

    def _log(self, kind, x):
        return cute.math.log2(x, fastmath=True) * LN_2

    def _log2(self, kind, x):
        return cute.math.log2(x, fastmath=True)

    def _sqrt(self, kind, x):
        return cute.math.sqrt(x, fastmath=True)

    def _tanh(self, kind, x):
        """As that of a usual softcap: off by a unit in the last place of 1."""
        return 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + cute.math.exp2(x * (2.0 * LOG2_E), fastmath=True))


def _words(m: cute.Tensor) -> cute.Tensor:
    """A tensor of 64-bit integers as the lower halves of them: that is all that is used, and half as much to hold."""
    if m.element_type is not cutlass.Int64:
        return m
    strides = tuple(2 * stride for stride in m.stride)
    return cute.make_tensor(cute.recast_ptr(m.iterator, dtype=Int32), cute.make_layout(m.shape, stride=strides))


class Elements:
    """An expression in one tile, at (row, column) of a thread's scores. ``rows`` are the leaves that differ along rows,
    ``columns`` the one that does along columns, and ``leaf(name, row, column)`` says what a position is."""

    def __init__(self, expression: Expression, tensors: tuple, leaf: Callable, rows: set[str], columns: str):
        self.expression, self.ops, self.leaf = expression, ElementOps(tensors), leaf
        leaves = expression.leaves()
        self.along_rows = [bool(names & (rows | {"score"})) for names in leaves]
        self.along_columns = [bool(names & {columns, "score"}) for names in leaves]
        self.known: dict[tuple, Any] = {}

    def value(self, node: int, row: int, column: int, score: Any = None) -> Any:
        """What a node is worth there."""

        def leaf(name: str):
            return score if name == "score" else self.leaf(name, row, column)

        def place(node: int) -> tuple:
            return node, row if self.along_rows[node] else None, column if self.along_columns[node] else None

        return self.expression.value(node, leaf, self.ops, self.known, place)


@cute.jit
def _select(condition, x, y):
    return x if condition else y
