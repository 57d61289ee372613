"""Zeros for the rows of ragged sequences that aren't in use, which warps with something else to do write meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Boolean, Int32, cute

from cute_attn.arithmetic import MOST
from cute_attn.scheduler import Tiles

PARTS = 4  # in which those of each key tile are cleared


@dataclass(frozen=True)
class UnusedRows:
    """Of ragged sequences the rows in tiles without a row in use, of queries or of keys: a block has a stretch of them, all as
    many, which one of its warps clears by ``clear(first, past)``, so many for each key tile that it is done when the block is.
    ``among`` is what :meth:`Sequences.seek <cute_attn.sequences.Sequences.seek>` is told of them.

    Where it is lies in shared memory, ``place``, since the warp has no registers for it: the next row, the one behind those of
    this sequence, how many are to be cleared by now, and how many for each key tile; of all such rows the number of the next
    sequence's first, and of the one behind the stretch; and where the search goes on."""

    tiles: Tiles
    among: cutlass.Constexpr[tuple]
    clear: cutlass.Constexpr
    place: cute.Tensor

    @cute.jit
    def begin(self):
        """The whole warp, first of all."""
        nothing, heads, blocks = Int32(0), self.tiles.heads, cute.arch.grid_dim()[0]
        (side, tile, _), computed = self.among, nothing
        if cutlass.const_expr(side.used is None):  # those alone that come after the last sequence
            rows = side.unused_rows(self.tiles.sequences.count, self.tiles.sequences.count, tile)
        else:
            _, _, _, _, rows = self.tiles.sequences.seek(Int32(MOST), nothing, nothing, self.among)
        if rows > 0:
            of_tiles = self.tiles.sequences.k, self.tiles.tile, 0
            _, _, _, _, computed = self.tiles.sequences.seek(Int32(MOST), nothing, nothing, of_tiles)
        each = cute.ceil_div(rows, blocks)
        first = cutlass.min(cute.arch.block_idx()[0] * each, rows)
        self._set(0, nothing, nothing, nothing, cute.ceil_div(each, cutlass.max(computed * heads // blocks, 1)))
        self._set(4, first, cutlass.min(first + each, rows), nothing, nothing)

    @cute.jit
    def begin_tile(self):
        """At a key tile's beginning, when there is time for a search."""
        first, past, owed, each = self._get(0)
        self._set(0, first, past, owed + each, each)
        self._find()

    @cute.jit
    def between(self):
        """While it is computed: a part of what is to be cleared for it, and all that is left of those before."""
        _, _, owed, each = self._get(0)
        self._some(cutlass.min(owed, cutlass.max(owed - each, 0) + cute.ceil_div(each, PARTS)))

    @cute.jit
    def rest(self):
        """All that are left."""
        more = Boolean(True)
        while more:
            self._find()
            self._some(Int32(MOST))
            wanted, last, _, _ = self._get(4)
            more = wanted < last

    @cute.jit
    def _some(self, rows: Int32):
        """So many, or as many as were found."""
        first, past, owed, each = self._get(0)
        rows = cutlass.min(rows, past - first)
        if rows > 0:
            self._set(0, first + rows, past, owed - rows, each)
            self.clear(first, first + rows)

    @cute.jit
    def _find(self):
        """The next sequence with any, if those of this one are cleared."""
        first, past, owed, each = self._get(0)
        wanted, last, scanned, before = self._get(4)
        if (first == past) & (wanted < last):
            sequences, (side, tile, _) = self.tiles.sequences, self.among
            found, sequence, begin, scanned, before = sequences.seek(wanted, scanned, before, self.among)
            span = side.span(sequence, sequences.count)
            first = (span.length + tile - 1) // tile * tile + wanted - begin
            more = cutlass.min(span.capacity - first, last - wanted)
            if (found == False) | (begin > wanted) | (first < 0) | (more <= 0):  # noqa: E712
                more, last = Int32(0), wanted  # wrong bounds may have counted other rows than there are, past 2³¹ of them
            self._set(0, span.first + first, span.first + first + more, owed, each)
            self._set(4, wanted + more, last, scanned, before)

    def _get(self, i: int) -> tuple:
        held = cute.make_rmem_tensor(4, Int32)
        cute.autovec_copy(cute.local_tile(self.place, (4,), (i // 4,)), held)
        return tuple(held[j] for j in range(4))

    @cute.jit
    def _set(self, i: cutlass.Constexpr[int], a: Int32, b: Int32, c: Int32, d: Int32):
        held = cute.make_rmem_tensor(4, Int32)
        held[0], held[1], held[2], held[3] = a, b, c, d
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.autovec_copy(held, cute.local_tile(self.place, (4,), (i // 4,)))
        cute.arch.sync_warp()
