"""What a user's functions compute, for a thread's scores: the operations of ``expressions.py`` on the DSL's values.

Each node is computed as often as it has to be: for each score what depends on it or on both positions, for each row or column
of the thread what depends on one position, and once what depends on neither, such as a slope of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, Uint32, cute

from cute_attn.arithmetic import either
from cute_attn.expressions import Expression, number_of
from cute_attn.mainloop import fours
from cute_attn.rules import LN_2, LOG2_E

KINDS = {"bool": Boolean, "int": Int32, "float": Float32}


class ElementOps:
    """The operations for the DSL's values, of 32 bits; ``tensors`` are the captured ones."""

    def __init__(self, tensors: tuple):
        self.tensors = tensors

    def constant(self, kind: str, text: str):
        return KINDS[kind](number_of(kind, text))

    def load(self, slot: int, kind: str, indices: list):
        """An element of a captured tensor."""
        tensor = _words(self.tensors[slot])
        value = tensor[_cut(tensor, indices)]
        return value != 0 if kind == "bool" else value.to(KINDS[kind])

    def load_neighbours(self, slot: int, indices: list, n: int):
        """``n`` elements, of 4 or 8 bytes together, from a multiple of ``n`` on; of tensors whose size is one."""
        tensor = self.tensors[slot]
        *where, _ = _cut(tensor, indices)
        words = cute.recast_ptr(tensor.iterator, dtype=Int32 if tensor.element_type.width * n == 32 else Int64)
        rows = cute.make_layout(tensor.shape[:-1], stride=tuple(stride // n for stride in tensor.stride[:-1]))
        first = words + cute.crd2idx(tuple(where), rows) if where else words
        last = Uint32(cutlass.min(indices[-1][0], tensor.shape[-1] - n)) // n
        found = cute.make_rmem_tensor(n, tensor.element_type)
        cute.recast_tensor(found, words.dtype)[0] = cute.make_tensor(first + Int64(last), cute.make_layout(1))[0]
        return found

    def compute(self, op: str, kind: str, *values):
        return getattr(self, f"_{op}")(kind, *values)

    def _cast(self, kind, x):
        if kind == "bool":
            return x != 0
        return either(x, KINDS[kind](1), KINDS[kind](0)) if x.dtype is Boolean else x.to(KINDS[kind])

    def _invert(self, kind, x):
        return x == Boolean(False)

    def _where(self, kind, condition, x, y):
        return either(condition, x, y)

    def _maximum(self, kind, x, y):
        return cute.arch.fmax(x, y, nan=True) if kind == "float" else cutlass.max(x, y)

    def _minimum(self, kind, x, y):
        return -cute.arch.fmax(-x, -y, nan=True) if kind == "float" else cutlass.min(x, y)

    _clamp_min, _clamp_max = _maximum, _minimum

    def _abs(self, kind, x):
        return cute.math.absf(x) if kind == "float" else cutlass.max(x, -x)

    def _div(self, kind, x, y):
        return x * cute.arch.rcp_approx(y)

    def _floordiv(self, kind, x, y):
        """Rounded down, whatever the signs are, by a division of what has none: of the DSL's own, what makes it round down has
        been seen to be lost in compilation."""
        x, y = either(y < 0, -x, x), either(y < 0, -y, y)
        sign = x >> 31
        return Int32(Uint32(x ^ sign) // Uint32(y)) ^ sign

    def _mod(self, kind, x, y):
        return x - self._floordiv(kind, x, y) * y

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


def _cut(tensor: cute.Tensor, indices: list) -> Any:
    """Where in a captured tensor an element is. Indices are cut to what there is: scores past a sequence's end are computed,
    too."""
    where = _cut_to(tensor, indices)
    return tuple(where) if where else 0


def _cut_to(tensor: cute.Tensor, indices: list) -> list:
    """The first indices of an element's."""
    where = []
    for dim, (index, is_position) in enumerate(indices):
        index = cutlass.min(index, tensor.shape[dim] - 1)
        where.append(index if is_position else cutlass.max(index, 0))
    return where


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
        self.expression, self.ops, self.leaf, self.columns = expression, ElementOps(tensors), leaf, columns
        leaves = expression.leaves()
        self.along_rows = [bool(names & (rows | {"score"})) for names in leaves]
        self.along_columns = [bool(names & {columns, "score"}) for names in leaves]
        self.known: dict[tuple, Any] = {}

    def of_columns(self) -> list[int]:
        """The nodes that load an element for each column: its position is their last index, others are the same for all."""
        found, nodes = [], self.expression.nodes
        for node, (op, _, *operands) in enumerate(nodes):
            if op == "load" and len(operands) > 1 and nodes[operands[-1]][2:] == (self.columns,):
                if not any(self.along_rows[i] or self.along_columns[i] for i in operands[1:-1]):
                    found.append(node)
        return found

    def of_rows(self) -> list[int]:
        """The nodes that load an element for each row."""
        nodes = enumerate(self.expression.nodes)
        return [i for i, (op, *_) in nodes if op == "load" and self.along_rows[i] and not self.along_columns[i]]

    def held(self, columns: Int32) -> Int32:
        """So many of the columns have an element of their own in all tensors that :meth:`load_column` reads."""
        for node in self.of_columns():
            columns = cutlass.min(columns, self.ops.tensors[self.expression.nodes[node][2]].shape[-1])
        return columns

    def load_column(self, column: int, first: int, offset: int):
        """Load what is loaded of a column whose position is ``offset`` past column ``first``'s, where all are :meth:`held`:
        from one address, and with numbers that are known at compile time."""
        for node in self.of_columns():
            _, kind, *operands = self.expression.nodes[node]
            leaf, place = self._at(0, first, None)
            if (node, "first") not in self.known:
                tensor = _words(self.ops.tensors[operands[0]])
                *before, last = self.expression.indices(node, leaf, self.ops, self.known, place)
                where = (*_cut_to(tensor, before), last[0])
                self.known[node, "first"] = tensor.iterator + cute.crd2idx(where, tensor.layout), tensor.stride[-1]
            begin, step = self.known[node, "first"]
            value = cute.make_tensor(begin + offset * step, cute.make_layout(1))[0]
            place = self._at(0, column, None)[1]
            self.known[place(node)] = value != 0 if kind == "bool" else value.to(KINDS[kind])

    def value(self, node: int, row: int, column: int, score: Any = None) -> Any:
        """What a node is worth there."""
        leaf, place = self._at(row, column, score)
        return self.expression.value(node, leaf, self.ops, self.known, place)

    def load_pairs(self, row: int, column: int):
        """Load at once what is loaded for a thread's two neighbouring keys, at an even column and the next one."""
        expression, (leaf, place) = self.expression, self._at(row, column, None)
        for node in expression.neighbours(2):
            if place(node) not in self.known:
                slot = expression.nodes[node][2]
                indices = expression.indices(node, leaf, self.ops, self.known, place)
                pair = self.ops.load_neighbours(slot, indices, 2)
                for i in range(2):
                    self.known[self._at(row, column + i, None)[1](node)] = pair[i].to(Float32)

    def load_fours(self, row: int, column: int):
        """The same of keys × queries, for two rows, keys, from an even one on, and two columns: by ``fours.py``."""
        expression, known = self.expression, {}
        for node in expression.neighbours(fours.FOUR):
            slot = expression.nodes[node][2]
            indices = expression.indices(node, lambda name: self.leaf_of_four(name, row, column), self.ops, known)
            words = cute.recast_tensor(self.ops.load_neighbours(slot, indices, fours.FOUR), Uint32)
            for j, word in enumerate(fours.from_memory(words[0], words[1])):
                pair = cute.make_rmem_tensor(2, self.ops.tensors[slot].element_type)
                cute.recast_tensor(pair, Uint32)[0] = word
                for i in range(2):
                    self.known[self._at(row + j, column + i, None)[1](node)] = pair[i].to(Float32)

    def leaf_of_four(self, name: str, row: int, column: int):
        """What a position is for the first of a thread's four keys."""
        where = dict(zip(("q_idx", "kv_idx"), fours.offsets(), strict=True))
        return self.leaf(name, row, column) + where[name] if name in where else self.leaf(name, row, column)

    def offset(self, load: int, into: cute.Tensor, row: int, column: int, score: Any = None) -> Int64:
        """Where in ``into``, of a captured tensor's shape, lies the element that a node loads there."""
        leaf, place = self._at(row, column, score)
        indices = self.expression.indices(load, leaf, self.ops, self.known, place)
        return Int64(cute.crd2idx(_cut(into, indices), into.layout))

    def _at(self, row: int, column: int, score: Any) -> tuple[Callable, Callable]:
        def leaf(name: str):
            return score if name == "score" else self.leaf(name, row, column)

        def place(node: int) -> tuple:
            return node, row if self.along_rows[node] else None, column if self.along_columns[node] else None

        return leaf, place
