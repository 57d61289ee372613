"""Gradients of captured tensors: what a thread's scores add to them.

Each node that loads an element is a direction of its own: dS' · ∂s'/∂element, where dS' is the gradient of what a user's
function made of a score. Where the index doesn't depend on a score's row, its column or either, a warp adds up what it has of
each element before that goes to memory. Where it depends on both, but is not the two positions themselves (a distance, a
bucket), neighbours in a row often load the same element: a thread adds these up as long as they do. Sums are float32, in any
order. Where each score has an element of its own, its gradient is stored, in the tensor's own dtype; where it is that of a few
batch elements or heads, each of these has a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cutlass import Boolean, Float32, Int16, Int32, Int64, Uint32, cute

from cute_attn.layouts.base import WARP
from cute_attn.layouts.fragments import THREADS_PER_ROW
from cute_attn.mainloop import fours
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.elements import Elements


class CapturedGradients:
    """What the scores of a thread, at (row, column), add: :meth:`add` of all rows of a column, :meth:`end_column`, and so on,
    and :meth:`finish`. All threads of a warp do it together."""

    def __init__(self, elements: Elements, values: Values, zero: cute.Tensor, whole: bool):
        """``whole``: the keys are all that the captured tensors have, and not some that are in use."""
        self.elements, self.values, self.zero, self.directions = elements, values, zero, []
        expression = elements.expression
        into = dict(zip(expression.derived, values.of_captured, strict=True))
        for partial in expression.partials:
            slot, *where = expression.nodes[partial.load][2:]
            by_row, by_column = (along[partial.load] for along in (elements.along_rows, elements.along_columns))
            names = [expression.nodes[i][2] if expression.nodes[i][0] == "leaf" else "" for i in where]
            names = [*partial.copied, *names]
            fours = partial.fours and elements.columns == "q_idx" and whole
            self.directions.append(_Direction(partial, into[slot], by_row, by_column, names, fours))

    def add(self, row: int, column: int, dS: Float32, score: Float32 | None = None):
        """Of one score; ``score`` as a function gets it, where a derivative depends on it."""
        for d in self.directions:
            value, partial = dS, d.partial
            if partial.slope is not None:  # where dS is 0 a derivative may be anything
                value = _product(dS, self.elements.value(partial.slope, row, column, score))
            if not (d.by_row and d.by_column):
                place = row if d.by_row else None
                d.sums[place] = value + d.sums[place] if place in d.sums else value
                if place not in d.offsets or not d.by_row:
                    d.offsets[place] = self.elements.offset(partial.load, d.into, row, column, score)
                continue
            if d.fours:
                d.sums[row, column] = value
                continue
            if partial.alone:
                self._store(d, row, column, value)
                continue
            offset = self.elements.offset(partial.load, d.into, row, column, score)
            if d.each:
                _add(d.into, offset, value)
            elif row in d.sums:
                d.offsets[row], d.sums[row] = _continued(d.into, d.offsets[row], d.sums[row], offset, value)
            else:
                d.offsets[row], d.sums[row] = offset, value

    def end_column(self):
        """All rows of a column are added."""
        for d in self.directions:
            if d.fours:
                self._store_fours(d)
            elif d.by_column and not d.by_row:
                _add_of_lanes(d.into, d.offsets.pop(None), d.sums.pop(None), (THREADS_PER_ROW, 8, 16))

    def finish(self):
        """All columns are."""
        for d in self.directions:
            for row, total in d.sums.items():
                if d.by_row and d.by_column:
                    _add_of_warp(d.into, d.offsets[row], total)
                else:
                    _add_of_lanes(d.into, d.offsets[row], total, (1, 2) if d.by_row else (1, 2, 4, 8, 16))

    def _store(self, d: _Direction, row: int, column: int, value: Float32):
        """The gradient of an element of which each score has its own, if row and key exist. Addresses follow one another."""
        elements = self.elements
        place = self._place(d, row, column, lambda name: elements.leaf(name, row, column))
        exists = elements.leaf("q_idx", row, column) < self.values.seqlen_q
        exists = exists & (elements.leaf("kv_idx", row, column) < self.values.seqlen_k)
        _store(place, value.to(d.into.element_type), exists)

    def _place(self, d: _Direction, row: int, column: int, leaf: Callable) -> Int64:
        """The address of the element at the positions that ``leaf`` says."""
        width = d.into.element_type.width // 8
        if row not in d.offsets:
            place = d.into.iterator.toint() + cute.crd2idx(tuple(map(leaf, d.names)), d.into.layout) * width
        else:
            place, before = d.offsets[row]
            step = d.into.stride[d.names.index(self.elements.columns)] * width
            place = place + (self.zero[0, column][1] - self.zero[0, before][1]) * step
        d.offsets[row] = place, column
        return place

    def _store_fours(self, d: _Direction):
        """The same of four neighbouring keys at once, once there are two columns, queries, of keys × queries."""
        (first, column), *more = d.sums
        if column == max(c for _, c in more):
            return
        for row in range(first, 1 + max(r for r, _ in more), 2):
            pair = cute.make_rmem_tensor((2, 2), d.into.element_type)
            for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
                pair[i, j] = d.sums.pop((row + j, column + i)).to(d.into.element_type)
            words = cute.recast_tensor(pair, Uint32)
            first_word, second_word = fours.to_memory(words[0], words[1])
            where = {name: self.elements.leaf_of_four(name, row, column) for name in (*d.names, "q_idx", "kv_idx")}
            place = self._place(d, row, column, where.__getitem__)
            exists = (where["q_idx"] < self.values.seqlen_q) & (where["kv_idx"] < self.values.seqlen_k)
            code = "st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};"
            cute.arch.inline_ptx(code, read_only_args=[place, first_word, second_word], predicate=exists)


class _Direction:
    """One of the derivatives, the memory of its tensor's gradient, and offsets and sums of elements by what they depend on.
    ``names`` are of the indices that are positions; with both positions of a score no other of a head loads the same."""

    def __init__(self, partial, into: cute.Tensor, by_row: bool, by_column: bool, names: list[str], fours: bool):
        self.partial, self.into, self.by_row, self.by_column, self.names = partial, into, by_row, by_column, names
        self.fours = fours
        self.each = {"q_idx", "kv_idx"} <= set(names)
        self.offsets: dict[Any, Int64] = {}
        self.sums: dict[Any, Float32] = {}


@cute.jit
def _product(dS: Float32, slope: Float32):
    return dS * slope if dS != 0.0 else Float32(0.0)


def _add(into: cute.Tensor, offset: Int64, value: Float32):
    """Atomically, what is not 0: without a branch, since neighbours come next."""
    place = (into.iterator + offset).toint()
    code = "red.relaxed.gpu.global.add.f32 [{$r0}], {$r1};"
    cute.arch.inline_ptx(code, read_only_args=[place, value], predicate=value != 0.0)


def _store(place: Int64, value, exists: Boolean):
    """An element at an address, if it exists."""
    held = cute.make_rmem_tensor(1, value.dtype)
    held[0] = value
    words = cute.recast_tensor(held, {16: Int16, 32: Int32, 64: Int64}[value.dtype.width])
    code = f"st.global.b{value.dtype.width} [{{$r0}}], {{$r1}};"
    cute.arch.inline_ptx(code, read_only_args=[place, words[0]], predicate=exists)


@cute.jit
def _continued(into: cute.Tensor, offset: Int64, total: Float32, here: Int64, value: Float32):
    """``(offset, sum)`` of a run of scores that load the same element, which ends where the next one loads another."""
    if here != offset:
        _add(into, offset, total)
        total = Float32(0.0)
    return here, total + value


@cute.jit
def _add_of_lanes(into: cute.Tensor, offset: Int64, total: Float32, apart):
    """What lanes have whose numbers differ by bits of ``apart``: the first of them adds it."""
    first = Boolean(True)
    for bit in apart:
        total = total + cute.arch.shuffle_sync_bfly(total, bit)
        first = first & (cute.arch.lane_idx() & bit == 0)
    if first:
        _add(into, offset, total)


@cute.jit
def _add_of_warp(into: cute.Tensor, offset: Int64, total: Float32):
    """What the lanes have, at once if it is of the same element."""
    same = Boolean(True)
    for word in (Int32(offset), Int32(offset >> 32)):
        same = same & (word == cute.arch.shuffle_sync(word, 0))
    if cute.arch.vote_all_sync(same):
        total = cute.arch.warp_reduction_sum(total, threads_in_group=WARP)
        if cute.arch.lane_idx() == 0:
            _add(into, offset, total)
    else:
        _add(into, offset, total)
