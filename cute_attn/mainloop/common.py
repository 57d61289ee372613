"""What the mainloops share: the run-time values of a call, and the rules as a kernel applies them."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.layouts.fragments import rows_columns
from cute_attn.rules import LOG2_E, Band, softcap_tanh


class DeviceOps:
    """The non-operator functions of ``rules`` for the DSL's values."""

    max = staticmethod(cutlass.max)
    min = staticmethod(cutlass.min)

    @staticmethod
    def tanh(x):
        """``1 − 2 / (1 + e^{2x})``: off by a unit in the last place of 1, where the hardware's own tanh is off by 2⁻¹¹,
        more than a 16-bit result forgives."""
        return 1.0 - 2.0 * cute.arch.rcp_approx(1.0 + cute.math.exp2(x * (2.0 * LOG2_E), fastmath=True))


@dataclass(frozen=True)
class Values:
    """The run-time values of a call as a kernel takes them. An unbounded side's edge is passed but never read."""

    seqlen_q: Int32
    seqlen_k: Int32
    lo: Int32
    hi: Int32
    scale_log2: Float32
    scale_by_cap: Float32

    def band(self, problem) -> Band:
        return Band(self.lo if problem.bounded_left else None, self.hi if problem.bounded_right else None)


@dataclass(frozen=True)
class KeyTiles:
    """The key tiles of one query tile: they begin at the first key any of its rows sees, not at a multiple of tile_n,
    so that no key before it is ever read. ``end`` is past the last one any sees; a last tile that is not full reads on.

    ``count`` tiles, walked from the last to the first; tiles ``whole_begin … whole_end − 1`` need no mask.
    """

    begin: Int32
    end: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32

    @staticmethod
    def of(values: Values, problem, m_block: Int32, config) -> KeyTiles:
        band, n = values.band(problem), config.tile_n
        row_first = m_block * config.tile_m
        row_last = cutlass.min(row_first + config.tile_m, values.seqlen_q) - 1
        begin, end = band.key_range(row_first, row_last, values.seqlen_k, DeviceOps)
        inner_begin, inner_end = band.whole_range(row_first, row_last, values.seqlen_k, DeviceOps)
        count = cutlass.max(cute.ceil_div(end - begin, n), 0)
        whole_begin = cutlass.min(cutlass.max(cute.ceil_div(inner_begin - begin, n), 0), count)
        whole_end = cutlass.min(cutlass.max(inner_end - begin, 0) // n, count)
        return KeyTiles(begin, end, count, whole_begin, cutlass.max(whole_end, whole_begin))


    def last_is_masked(self):
        """Whether the last tile, which is the first to be computed, needs a mask."""
        return (self.count > self.whole_end) | (self.count <= self.whole_begin)


@cute.jit
def walk(step: cutlass.Constexpr, state, keys: KeyTiles, problem: cutlass.Constexpr):
    """``state = step(state, (n, masked))`` over the key tiles before the last, in descending order.

    Three loops, so that each knows at compile time whether it masks: tiles cut by the right edge, whole tiles, tiles cut
    by the left edge.
    """
    top = keys.count - 1
    if cutlass.const_expr(problem.bounded_right):
        for i in cutlass.range(top - keys.whole_end, unroll=1):
            state = step(state, (top - 1 - i, True))
    whole_end = cutlass.min(top, keys.whole_end)
    for i in cutlass.range(whole_end - keys.whole_begin, unroll=1):
        state = step(state, (whole_end - 1 - i, False))
    if cutlass.const_expr(problem.bounded_left):
        left_end = cutlass.min(top, keys.whole_begin)
        for i in cutlass.range(left_end, unroll=1):
            state = step(state, (left_end - 1 - i, True))
    return state


@dataclass(frozen=True)
class Coordinates:
    """Where a thread's scores lie in a tile: ``thread`` as (row, column) of each, in the accumulator's layout; ``zero``
    the same of thread 0, whose columns are compile-time numbers. Threads differ from it by one offset for all columns."""

    thread: cute.Tensor
    zero: cute.Tensor

    @staticmethod
    def of(mma: cute.TiledMma, thread: Int32, shape: tuple[int, int]) -> Coordinates:
        identity = cute.make_identity_tensor(shape)
        return Coordinates(*(rows_columns(mma.get_slice(t).partition_C(identity)) for t in (thread, 0)))


@cute.jit
def apply_rules(scores: cute.Tensor, where: Coordinates, origin, values: Values, problem: cutlass.Constexpr, masked):
    """Softcap and mask the scores (rows, columns) of a tile in place.

    ``origin`` is the tile's first row and key. ``masked`` is a Python bool where the loop knows it, a run-time Boolean
    where it doesn't.
    """
    if cutlass.const_expr(problem.softcap):
        for i in cutlass.range(cute.size(scores), unroll_full=True):
            scores[i] = softcap_tanh(scores[i], values.scale_by_cap, DeviceOps)
    if cutlass.const_expr(not isinstance(masked, bool)):
        if masked:
            _mask(scores, where, origin, values, problem)
    elif cutlass.const_expr(masked):
        _mask(scores, where, origin, values, problem)


@cute.jit
def _mask(scores: cute.Tensor, where: Coordinates, origin, values: Values, problem: cutlass.Constexpr):
    """Set what a row does not see to −inf. One comparison an edge and score, against a compile-time column."""
    band = values.band(problem)
    column_first = origin[1] + where.thread[0, 0][1]
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row = origin[0] + where.thread[r, 0][0]
        begin, end = band.key_range(row, row, values.seqlen_k, DeviceOps)
        begin, end = begin - column_first, end - column_first
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = where.zero[0, c][1]
            visible = column < end
            if cutlass.const_expr(problem.bounded_left):
                visible = visible & (column >= begin)
            scores[r, c] = scores[r, c] if visible else -Float32.inf
