"""Which blocks of 32 queries × 32 keys a mask function hides, cuts or leaves whole, in one kernel: what ``blocks.classified``
is in torch, on a GPU.

A warp looks at 64 × 64 pairs of a query and a key, each thread at 8 rows of 16 columns, so that what the function computes of
one position alone, such as the document of a query, is computed once for each row and column of a thread.
"""

from __future__ import annotations

from functools import reduce
from operator import and_, or_

import cutlass
from cutlass import Int32, cute

from cute_attn.fields import CLASSIFY, named
from cute_attn.forward import captured_of
from cute_attn.layouts.base import BLOCK, BY_ROWS, CUT, WARP
from cute_attn.mainloop.elements import Elements

ALL_LANES = -1


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.CLASSIFY`'s values to compile."""
    kernel = Classify(problem)

    @cute.jit
    def classify(*arguments):
        given = named(CLASSIFY, arguments)
        kernel.launch(given.kinds, given.seqlen_q, given.seqlen_k, captured_of(problem, given), given.stream)

    return classify


class Classify:
    """The kernel of one mask function."""

    WARPS = 4
    ACROSS = 4  # threads of a warp that share rows
    PAIRED = 2  # blocks of each side that a warp looks at

    def __init__(self, problem):
        self.problem = problem
        self.down = WARP // self.ACROSS

    @cute.jit
    def launch(self, mKinds, seqlen_q: Int32, seqlen_k: Int32, captured, stream):
        batch, heads, rows, columns = mKinds.shape
        across = cute.ceil_div(columns, self.PAIRED * self.WARPS)
        self.kernel(mKinds, seqlen_q, seqlen_k, captured).launch(
            grid=[across * cute.ceil_div(rows, self.PAIRED) * heads * batch, 1, 1],
            block=[WARP * self.WARPS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mKinds, seqlen_q: Int32, seqlen_k: Int32, captured):
        _, heads, rows, columns = mKinds.shape
        across, downward = cute.ceil_div(columns, self.PAIRED * self.WARPS), cute.ceil_div(rows, self.PAIRED)
        index, lane = cute.arch.block_idx()[0], cute.arch.lane_idx()
        row = index // across % downward * self.PAIRED
        column = (index % across * self.WARPS + cute.arch.warp_idx()) * self.PAIRED
        head, batch = index // across // downward % heads, index // across // downward // heads
        first = row * BLOCK + lane // self.ACROSS, column * BLOCK + lane % self.ACROSS
        elements = self._elements(captured, (batch, head), first, (seqlen_q, seqlen_k))
        for i in cutlass.range_constexpr(self.PAIRED):
            for j in cutlass.range_constexpr(self.PAIRED):
                of_rows = self._seen(elements, i, j)
                some, every = (cute.arch.vote_ballot_sync(reduce(by, x)) for by, x in zip((or_, and_), of_rows, strict=True))
                inside = (column + j + 1) * BLOCK <= seqlen_k
                kind = Int32(some != 0) + Int32((every == ALL_LANES) & inside)
                if (kind == CUT) & inside:
                    if self._is_by_rows(*of_rows):
                        kind = Int32(BY_ROWS)
                if (lane == 0) & (row + i < rows) & (column + j < columns):
                    mKinds[batch, head, row + i, column + j] = kind.to(cutlass.Uint8)

    def _elements(self, captured, where, first, lengths) -> Elements:
        """What the function computes at a thread's rows and columns; those past an end are the last one again."""
        fixed = {"batch": where[0], "head": where[1], "shift": lengths[1] - lengths[0]}

        def leaf(name: str, r: int, c: int):
            if name in fixed:
                return fixed[name]
            side, step = (0, r * self.down) if name == "q_idx" else (1, c * self.ACROSS)
            return cutlass.min(first[side] + step, lengths[side] - 1)

        return Elements(self.problem.expression, captured, leaf, {"q_idx"}, "kv_idx")

    def _seen(self, elements: Elements, i: int, j: int):
        """Of each of a thread's rows whether it sees some of its columns, and whether all of them, in one of the warp's
        blocks."""
        rows, columns = (range(BLOCK // side) for side in (self.down, self.ACROSS))
        at = lambda r, c: (i * len(rows) + r, j * len(columns) + c)  # noqa: E731
        seen = [[elements.value(self.problem.expression.mask, *at(r, c)) for c in columns] for r in rows]
        return [reduce(or_, row) for row in seen], [reduce(and_, row) for row in seen]

    def _is_by_rows(self, some, every):
        """A whole warp: whether each row of a block sees all of its columns, or none."""
        word, n = Int32(0), len(some)
        for r in range(n):
            word = word | Int32(some[r]) << r | Int32(every[r] == False) << (n + r)  # noqa: E712
        for lanes in (1, 2):  # those that share rows
            word = word | cute.arch.shuffle_sync_bfly(word, lanes)
        return cute.arch.vote_any_sync((word & (word >> n) & ((1 << n) - 1)) != 0) == False  # noqa: E712
