"""The end of a part of a walk over a cache: what the groups of a block found of it, merged over shared memory by all threads,
and all parts of a walk, merged by the block that comes last. To the outputs goes what is of all keys, the rest to a workspace.

A partial result is a row's largest score, and the sum of its weights and O with weights in relation to that score. Of several
the largest score of all is the one that weights are in relation to, each multiplied by what lies between
(arXiv:1805.02867, §3.1). All of that is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn import layouts
from cute_attn.balance import CachedKeys, PartPlaces, Sequence, WalkPart, divided
from cute_attn.layouts.base import WARP
from cute_attn.layouts.fragments import THREADS_PER_ROW, rows_columns
from cute_attn.layouts.mma_sync_cache import PIECE, PIECE_COLUMNS
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.warps import Stream
from cute_attn.softmax import Softmax, anchored, finished

AT_ONCE = 32  # pieces of partial results that a thread has on their way at the same time


@dataclass(frozen=True)
class Workspace:
    """Partial results in global memory, of each place O ``(rows, columns)``, a row's columns in the order in which four threads
    hold them, and all maxima and sums ``(places, rows, 2)`` behind them; and counters ahead."""

    counters: cute.Tensor
    o: cute.Pointer
    of_rows: cute.Pointer
    rows: Int32
    columns: cutlass.Constexpr[int]

    @staticmethod
    def of(m: cute.Tensor, counters: Int32, places: Int32, rows: Int32, columns: int) -> Workspace:
        """All in one piece of memory, ``counters`` words first, a multiple of 4."""
        words = cute.make_tensor(cute.recast_ptr(m.iterator, dtype=Int32), cute.make_layout(counters))
        after = m.iterator + cute.assume(counters, 4)
        of_rows = after + cute.assume(cutlass.Int64(places * rows) * columns, 4)
        return Workspace(words, after, of_rows, rows, columns)

    def of_row(self, place, row) -> tuple[Any, Any]:
        """Where a row of O is, and where its maximum and its sum."""
        number = cutlass.Int64(place * self.rows + row)
        o, of_row = number * cutlass.Int64(self.columns), number * cutlass.Int64(2)
        return self.o + cute.assume(o, 4), self.of_rows + cute.assume(of_row, 2)


@dataclass(frozen=True)
class Outputs:
    """O ``(elements, rows, heads, columns)`` and the log-sum-exp ``(elements, heads, rows)`` or None; sinks ``(heads)`` or
    None."""

    o: cute.Tensor
    lse: cute.Tensor | None
    sinks: cute.Tensor | None


@dataclass(frozen=True)
class Exchanged:
    """What all groups found, in shared memory: columns of O, and (maximum, sum) of each row."""

    o: cute.Pointer  # (group, piece of a thread, thread, 4): as threads hold it
    of_rows: cute.Pointer  # (groups, rows, 2)


@dataclass(frozen=True)
class CacheBlock:
    """What all parts of a block's stretch have in common: what the call is given, the block's shared memory, and this thread's
    part of its group's. Products' operands are on their way to registers, or as the tensor cores find them."""

    mQ: cute.Tensor  # (elements, rows, heads, columns)
    outputs: Outputs
    values: Values
    keys: CachedKeys
    workspace: Workspace
    sQ: cute.Tensor
    k: Stream
    v: Stream
    sK: cute.Tensor
    sV: cute.Tensor
    tSrQ: Any
    tSrK: Any
    tOrV: Any
    mma_S: cute.TiledMma
    mma_O: cute.TiledMma
    ring: cute.Pointer
    of_rows: cute.Pointer
    word: cute.Tensor
    numbers: Any  # of pages, (keys of a tile, stages)
    group: Int32
    thread: Int32  # in the group
    stretches: Any = None  # Stretches of all blocks
    first: Any = None  # where the block's first part begins


@dataclass(frozen=True)
class SeenTiles:
    """A part of a walk: of its tiles, the ``count`` from ``begin`` on that any row of its tile sees, of which those from
    ``whole_begin`` up to ``whole_end`` need no mask, and the values there; and the ``places`` of a walk that is computed."""

    sequence: Sequence
    part: WalkPart
    values: Values
    begin: Int32
    count: Int32
    whole_begin: Int32
    whole_end: Int32
    places: PartPlaces | None = None


class Merging:
    """What a kernel of attention to a cache does at a part's end."""

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.lay = layouts.family(config)
        self.group_threads = WARP * self.lay.row_warps(config)

    def _exchanged(self, block: CacheBlock, stage) -> Exchanged:
        """Where the groups exchange what they found: over a stage of K and V, or behind all of them if there is no room."""
        config = self.config
        of_stage = config.tile_n * (config.tile_d + config.tile_dv)
        inside = self.lay.smem_parts(config)["merged"] == 0
        place = block.ring + cute.assume((stage if inside else config.stages) * of_stage, of_stage)
        return Exchanged(cute.recast_ptr(place, dtype=Float32), block.of_rows)

    @cute.jit
    def _merge(self, block: CacheBlock, seen: SeenTiles, rows: cute.Tensor, softmax: Softmax, exchanged: Exchanged):
        """What all groups found, merged by all threads: to the outputs if it is all of the walk, else to the workspace.
        ``rows`` are those of O."""
        columns, exist = self.lay.exchanged_columns(self.config), self._exist(block, seen)
        self._sum_rows(softmax)
        for first in cutlass.range_constexpr(0, self.problem.head_dim_v, columns):
            if cutlass.const_expr(first > 0):
                cute.arch.sync_threads()
            self._hand_over(block, exchanged, rows, softmax, exist, first)
            cute.arch.sync_threads()
            self._merge_groups(block, exchanged, seen, exist, first)

    @cute.jit
    def _sum_rows(self, softmax: Softmax):
        """Rows' sums over all threads that have some of them."""
        for r in cutlass.range_constexpr(cute.size(softmax.row_sum)):
            softmax.row_sum[r] = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=THREADS_PER_ROW)

    def _exist(self, block: CacheBlock, seen: SeenTiles):
        """How many rows of the tile there are."""
        first = seen.part.row_tile * self.config.tile_m
        return cutlass.min(seen.sequence.queries * block.keys.packed - first, self.config.tile_m)

    @cute.jit
    def _hand_over(self, block: CacheBlock, exchanged: Exchanged, rows, softmax: Softmax, exist, first: cutlass.Constexpr[int]):
        """What this thread found of the rows that exist to shared memory, of O the columns from ``first`` on for which there is
        room: as it holds them, 4 at a time."""
        pieces, cO = self.lay.exchanged_columns(self.config) // PIECE_COLUMNS, self._coordinates(block)
        for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
            row, column = cO[r, 0]
            if row < exist:
                if cutlass.const_expr(first == 0):
                    if column == 0:
                        place = block.group * self.config.tile_m + row
                        _store_pair(exchanged.of_rows, place, softmax.row_max[r], softmax.row_sum[r])
                for n in cutlass.range_constexpr(pieces):
                    piece, begin = cute.make_rmem_tensor(PIECE, Float32), first // THREADS_PER_ROW + n * PIECE
                    for c in cutlass.range_constexpr(PIECE):
                        piece[c] = rows[r, begin + c]
                    cute.autovec_copy(piece, self._handed(block, exchanged, block.group, r * pieces + n))

    def _handed(self, block: CacheBlock, exchanged: Exchanged, group, n) -> cute.Tensor:
        """Where the n-th piece is that a group's thread of this one's number has handed over."""
        each = self.config.tile_m * self.lay.exchanged_columns(self.config) // (PIECE * self.group_threads)
        return floats(exchanged.o, (group * each + n) * self.group_threads + block.thread, PIECE)

    @property
    def shares(self) -> tuple[int, int]:
        """``(rows, groups)``: of the rows that a thread has of O its group merges so many, and as many groups their columns."""
        of_thread = self.config.tile_m * THREADS_PER_ROW // self.group_threads
        return max(of_thread // self.config.key_warps, 1), max(self.config.key_warps // of_thread, 1)

    @cute.jit
    def _merge_groups(self, block: CacheBlock, exchanged: Exchanged, seen: SeenTiles, exist, first: cutlass.Constexpr[int]):
        """What the groups have handed over, to the outputs or to the workspace: a thread merges its share of what those of its
        number hold in all groups."""
        config, (rows, sharing), groups = self.config, self.shares, self.config.key_warps
        pieces, begin = self.lay.exchanged_columns(config) // PIECE_COLUMNS, first // PIECE_COLUMNS
        each = -(-pieces // sharing)
        for j in cutlass.range_constexpr(rows):
            r = block.group // sharing * rows + j
            row = self._coordinates(block)[r, 0][0]
            if row < exist:
                of_rows, weights = cute.make_rmem_tensor((2, groups), Float32), cute.make_rmem_tensor(groups, Float32)
                for group in cutlass.range_constexpr(groups):
                    cute.autovec_copy(floats(exchanged.of_rows, group * config.tile_m + row, 2), of_rows[None, group])
                row_max, row_sum = -Float32.inf, Float32(0.0)
                for group in cutlass.range_constexpr(groups):
                    row_max = cute.arch.fmax(row_max, of_rows[0, group])
                for group in cutlass.range_constexpr(groups):
                    exponent = (of_rows[0, group] - anchored(row_max)) * seen.values.exponent(self.problem)
                    weights[group] = cute.math.exp2(exponent, fastmath=True)
                    row_sum += of_rows[1, group] * weights[group]
                merged, handed = (cute.make_rmem_tensor((PIECE, n), Float32) for n in (each, 1))
                merged.fill(0.0)
                for k in cutlass.range_constexpr(each):
                    n = self._mine(block, k)
                    if _below(n, pieces, sharing):
                        for group in cutlass.range_constexpr(groups):
                            cute.autovec_copy(self._handed(block, exchanged, group, r * pieces + n), handed[None, 0])
                            merged[None, k].store(merged[None, k].load() + handed[None, 0].load() * weights[group])
                if seen.places.parts == 1:
                    of_row = self._end_row(block, seen, row, self._writes(block, first == 0), row_max, row_sum)
                    for k in cutlass.range_constexpr(each):
                        n = self._mine(block, k)
                        if _below(n, pieces, sharing):
                            self._store(block, seen, of_row, begin + n, merged[None, k])
                else:
                    o, of = block.workspace.of_row(seen.places.of(seen.places.number), row)
                    if self._writes(block, first == 0):
                        _store_pair(of, 0, row_max, row_sum)
                    for k in cutlass.range_constexpr(each):
                        n = self._mine(block, k)
                        if _below(n, pieces, sharing) and (begin + n) * PIECE_COLUMNS < self.problem.head_dim_v:
                            cute.autovec_copy(merged[None, k], self._written(block, o, begin + n))

    def _mine(self, block: CacheBlock, k: int):
        """The k-th piece of a row that this thread merges."""
        return k * self.shares[1] + block.group % self.shares[1]

    def _writes(self, block: CacheBlock, condition):
        """Whether of the threads that have a row this is the one that writes what there is once."""
        return condition & (block.group % self.shares[1] == 0) & (block.thread % THREADS_PER_ROW == 0)

    def _written(self, block: CacheBlock, row, n) -> cute.Tensor:
        """Where this thread's n-th piece of a row of O is in the workspace: in the order in which threads hold columns."""
        return floats(row, n * THREADS_PER_ROW + block.thread % THREADS_PER_ROW, PIECE)

    @cute.jit
    def _count(self, block: CacheBlock, seen: SeenTiles, written):
        """Count so many parts, and merge all of them if there are no others."""
        workspace, places = block.workspace, seen.places
        if places.parts > 1:
            if cute.arch.thread_idx()[0] == 0:
                counter = workspace.counters.iterator + places.counter
                arrived = cute.arch.atomic_add(counter, Int32(written), sem="acq_rel", scope="gpu")
                if arrived == places.parts - written:
                    workspace.counters[places.counter] = Int32(0)
                block.word[0] = arrived
            cute.arch.sync_threads()
            if block.word[0] == places.parts - written:
                self._merge_parts(block, seen, self._exist(block, seen))

    @cute.jit
    def _merge_parts(self, block: CacheBlock, seen: SeenTiles, exist):
        """All parts of a walk, in the order of their keys, to the outputs: of rows and columns as :meth:`_merge_groups`."""
        rows, sharing = self.shares
        for j in cutlass.range_constexpr(rows):
            row = self._coordinates(block)[block.group // sharing * rows + j, 0][0]
            if row < exist:
                self._merge_row(block, seen, row)

    @cute.jit
    def _merge_row(self, block: CacheBlock, seen: SeenTiles, row):
        """All parts' pieces that this thread has of a row."""
        all_pieces = -(-self.problem.head_dim_v // PIECE_COLUMNS)
        pieces = -(-all_pieces // self.shares[1])
        places, at_once = seen.places, max(AT_ONCE // pieces, 1)
        exponent, parts = seen.values.exponent(self.problem), places.parts
        merged, held = (cute.make_rmem_tensor((PIECE, pieces, n), Float32) for n in (1, at_once))
        found = cute.make_rmem_tensor((2, at_once), Float32)
        merged.fill(0.0)
        row_max, row_sum = -Float32.inf, Float32(0.0)
        for part in cutlass.range(0, parts, at_once, unroll=1):
            for i in cutlass.range_constexpr(at_once):
                place = places.of(cutlass.min(part + i, parts - 1))  # past the last one that one again, without weight
                o, of_row = block.workspace.of_row(place, row)
                cute.autovec_copy(floats(of_row, 0, 2), found[None, i])
                for k in cutlass.range_constexpr(pieces):
                    n = cutlass.min(self._mine(block, k), all_pieces - 1)
                    cute.autovec_copy(self._written(block, o, n), held[None, k, i])
            old_max = row_max
            for i in cutlass.range_constexpr(at_once):
                if part + i >= parts:
                    found[0, i] = -Float32.inf
                row_max = cute.arch.fmax(row_max, found[0, i])
            from_here = anchored(row_max)
            old = cute.math.exp2((old_max - from_here) * exponent, fastmath=True)
            row_sum *= old
            for k in cutlass.range_constexpr(pieces):
                merged[None, k, 0].store(merged[None, k, 0].load() * old)
            for i in cutlass.range_constexpr(at_once):
                weight = cute.math.exp2((found[0, i] - from_here) * exponent, fastmath=True)
                row_sum += found[1, i] * weight
                for k in cutlass.range_constexpr(pieces):
                    merged[None, k, 0].store(merged[None, k, 0].load() + held[None, k, i].load() * weight)
        of_row = self._end_row(block, seen, row, self._writes(block, True), row_max, row_sum)
        for k in cutlass.range_constexpr(pieces):
            if _below(self._mine(block, k), all_pieces, self.shares[1]):
                self._store(block, seen, of_row, self._mine(block, k), merged[None, k, 0])

    @cute.jit
    def _end_row(self, block: CacheBlock, seen: SeenTiles, row, writes, row_max, row_sum):
        """Of a row of all keys ``(query, head, what its O is scaled by)``, and by whoever ``writes`` the log-sum-exp."""
        keys, outputs = block.keys, block.outputs
        query, head = divided(seen.part.row_tile * self.config.tile_m + row, keys.packed)
        head += seen.part.head_kv * keys.packed
        query += seen.sequence.first
        sink = None if outputs.sinks is None else outputs.sinks[head]
        normalize, lse = finished(row_max, row_sum, seen.values.exponent(self.problem), sink)
        if cutlass.const_expr(outputs.lse is not None):
            if writes:
                outputs.lse[seen.sequence.element, head, query] = lse
        return query, head, normalize

    @cute.jit
    def _store(self, block: CacheBlock, seen: SeenTiles, of_row: tuple, n, o: cute.Tensor):
        """This thread's n-th piece of O of all keys to the outputs; ``of_row`` is what :meth:`_end_row` gave."""
        query, head, normalize = of_row
        row = block.outputs.o[seen.sequence.element, query, head, None]
        for pair in cutlass.range_constexpr(2):
            column = n * PIECE_COLUMNS + pair * (PIECE_COLUMNS // 2) + block.thread % THREADS_PER_ROW * 2
            if column < self.problem.head_dim_v:
                of_pair = cute.make_rmem_tensor(2, row.element_type)
                for c in cutlass.range_constexpr(2):
                    of_pair[c] = (o[2 * pair + c] * normalize).to(row.element_type)
                cute.autovec_copy(of_pair, _pair(row, column))

    def _coordinates(self, block: CacheBlock) -> cute.Tensor:
        """(row, column) of what this thread has of O, ``(rows, columns)``."""
        identity = cute.make_identity_tensor((self.config.tile_m, self.config.tile_dv))
        return rows_columns(block.mma_O.get_slice(block.thread).partition_C(identity))


def floats(place, n, count: int) -> cute.Tensor:
    """The n-th ``count`` floats from a place on."""
    return cute.make_tensor((place + cute.assume(n * count, count)).align(4 * count), cute.make_layout(count))


def _pair(row: cute.Tensor, column) -> cute.Tensor:
    """Where two columns of a row are."""
    begin = cute.local_tile(row, (2,), (column // 2,)).iterator
    return cute.make_tensor(begin.align(2 * row.element_type.width // 8), cute.make_layout(2))


def _below(n, pieces: int, sharing: int):
    """Whether there is an n-th of so many pieces, which as many groups share."""
    return pieces % sharing == 0 or n < pieces


def _store_pair(place, n, first: Float32, second: Float32):
    """To the n-th two floats from a place in shared memory on."""
    pair = cute.make_rmem_tensor(2, Float32)
    pair[0], pair[1] = first, second
    cute.autovec_copy(pair, floats(place, n, 2))
