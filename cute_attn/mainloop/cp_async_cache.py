"""Attention to a cache with cp.async copies and mma.sync: few query rows, many keys, at the rate at which memory gives them.

A block computes its stretch of all key tiles (``balance.py``), part of a walk after part of a walk. Its warps are groups, each
of which copies keys of its own into a ring of its own and takes its rows' softmax of them by itself, so that nothing is waited
for but memory; a part's end merges what the groups found. If that is all of a walk, it is the result. If not, it goes to the
workspace, and the block that comes last merges all parts (``cache_merge.py``).

A slot of a ring is filled again as soon as its group is done with it, over the ends of parts: the last tiles of one start the
copies of the next one's first tiles and queries, which therefore have two places. Only the last tile's slot waits until the
groups have exchanged there what they found.

Rows of K and V past the last key are read as that key instead, as in ``cp_async.py``. Where some rows see keys that others
don't, tiles that are masked are looked through for values that are not finite (``guard.py``), always: they are few.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.arithmetic import either
from cute_attn.balance import (
    CachedKeys,
    PartStart,
    Sequence,
    WalkPart,
    divided,
    first_start,
    next_part,
    part_from,
    part_of_stretch,
    places_of,
    start_after,
)
from cute_attn.epilogue import converted
from cute_attn.layouts.base import BYTES, VECTOR, WARP
from cute_attn.layouts.fragments import as_operand_a, rows_columns, transposed, vector_at
from cute_attn.layouts.mma_sync_cache import NUMBER
from cute_attn.mainloop.cache_merge import CacheBlock, Merging, Outputs, SeenTiles, Workspace
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.guard import poison_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.warps import MMA_K, LdmatrixOperand, Stream, copy_word, product
from cute_attn.softmax import Softmax, scale_rows

GROUP_BARRIER = 1  # the first of the named barriers, one a group


class KeySource(NamedTuple):
    """Where a part's keys are copied from: of a sequence, rows from ``first`` up to ``last`` at most."""

    number: Int32
    first: Int32
    last: Int32
    head_kv: Int32


class Forward(Merging):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.keys_of_group = self.lay.tile("K", config)[0]

    @cute.jit
    def launch(self, mQ, mK, mV, outputs: Outputs, values: Values, keys: CachedKeys, workspace: Workspace, blocks, stream):
        self.kernel(mQ, mK, mV, outputs, values, keys, workspace).launch(
            grid=[blocks, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.config.walk_blocks, 1, 1] if self.config.walk_blocks > 1 else None,
            stream=stream,
            min_blocks_per_mp=self.config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, mQ, mK, mV, outputs: Outputs, values: Values, keys: CachedKeys, workspace: Workspace):
        block = self._block((mQ, outputs, values, keys, workspace), mK, mV)
        steps, lanes = keys.all_tiles()
        number = cute.arch.block_idx()[0]
        stretches = keys.stretches(steps, cute.arch.grid_dim()[0], number)
        at, end = stretches.begin(number), stretches.begin(number + 1)
        i, before = keys.find(at, lanes)
        if cutlass.const_expr(keys.end_steps > 0):
            keys = keys.near_to(i)
        block = replace(block, keys=keys, stretches=stretches)
        if cutlass.const_expr(self.problem.invariant):  # or there is a part there
            i, before, at = next_part(keys, i, before, at, end)
        start = PartStart(i, Int32(0), Int32(0), Int32(0), at)
        stage, parity, written = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(keys.end_steps > 0):
            if at < end:
                start = first_start(keys, i, before, at, end)
            if start.at < end:
                self._begin(block, self._part_from(block, start, end))
        elif at < end:
            sequence = keys.sequence(i)
            part, _ = part_of_stretch(keys, sequence, before, at, end)
            start = PartStart(i, part.head_kv, part.row_tile, part.begin, at)
            self._begin(block, self._seen(block, sequence, part))
        block = replace(block, first=start)
        while start.at < end:
            start, stage, written = self._part(block, start, end, stage, parity, written)
            parity = 1 - parity

    # ---- setup -----------------------------------------------------------------------------------------------------

    def _block(self, given: tuple, mK, mV) -> CacheBlock:
        config, lay = self.config, self.lay
        thread = cute.arch.thread_idx()[0]
        group, thread = thread // self.group_threads, thread % self.group_threads
        smem = cutlass.memory.SmemAllocator()

        parts = lay.smem_parts(config)
        of_q, ring = (
            smem.allocate_tensor(lay.element(config), cute.make_layout(size // BYTES), lay.SMEM_ALIGN).iterator
            for size in (parts["Q"], parts["K"] + parts["V"] + parts["merged"])
        )
        sQ, sK = self._operand_at(of_q, "Q"), self._operand_at(ring, "K")
        sV = self._operand_at(ring + config.tile_n * config.tile_d, "V")
        floats = smem.allocate_tensor(Float32, cute.make_layout(parts["rows"] // 4), 16)
        if config.page_numbers:
            word = cute.make_tensor(cute.recast_ptr(floats.iterator, dtype=Int32), cute.make_layout(1))
            numbers = smem.allocate_tensor(Int32, cute.make_layout(parts["numbers"] // NUMBER), 16).iterator
        else:
            word, numbers = smem.allocate_tensor(Int32, cute.make_layout(4), 16), None
        stream = partial(Stream.of, lay, config)
        k, v = stream("K", mK, sK, thread, self.problem.head_dim), stream("V", mV, sV, thread, self.problem.head_dim_v)
        mma_S, mma_O = lay.tiled_mma("S", config), lay.tiled_mma("O", config)
        operands = self._operands((sQ, sK, sV), (mma_S, mma_O), thread)
        place = ring, floats.iterator, word, numbers, group, thread
        return CacheBlock(*given, sQ, k, v, sK, sV, *operands, mma_S, mma_O, *place)

    def _operand_at(self, place, name: str) -> cute.Tensor:
        """An operand in shared memory, from a place on."""
        return cute.make_tensor(place, self.lay.smem_layout(name, self.config))

    @cute.jit
    def _sync_group(self, block: CacheBlock):
        if cutlass.const_expr(self.group_threads == WARP and not self.config.every_lane_arrives):
            cute.arch.sync_warp()
        else:
            cute.arch.barrier(barrier_id=GROUP_BARRIER + block.group, number_of_threads=self.group_threads)

    # ---- copies ----------------------------------------------------------------------------------------------------

    @cute.jit
    def _copy_q(self, block: CacheBlock, seen: SeenTiles, parity):
        """All threads: start copying the rows of the tile; those that don't exist, and columns past head_dim, are zeros."""
        config, sQ, keys = self.config, block.sQ[None, None, parity], block.keys
        vectors = config.tile_d // VECTOR
        for n in cutlass.range(cute.arch.thread_idx()[0], config.tile_m * vectors, config.threads, unroll=1):
            row, column = n // vectors, n % vectors
            query, head = divided(seen.part.row_tile * config.tile_m + row, keys.packed)
            head += seen.part.head_kv * keys.packed
            into = vector_at(sQ, row, column)
            if (query < seen.sequence.queries) & (column * VECTOR < self.problem.head_dim):
                of_head = block.mQ[seen.sequence.element, None, head, None]
                cute.copy(block.k.copy, vector_at(of_head, seen.sequence.first + query, column), into)
            else:
                into.fill(0.0)

    @cute.jit
    def _copy(self, block: CacheBlock, source: KeySource, n, stage, numbered=False):
        """A group: start copying its keys of a part's tile n to a stage of its ring. ``numbered`` says whether the numbers of
        their pages have come to the stage already."""
        slot, first = (block.group, stage), source.first + n * self.config.tile_n + block.group * self.keys_of_group
        k, v = block.k, block.v
        of_lane = self._place_of_lane(block, source, n, stage, numbered)
        for i in cutlass.range_constexpr(cute.size(k.tXcX, mode=[1])):
            place: Any = ()
            if cutlass.const_expr(self.config.page_numbers):
                place = tuple(cute.arch.shuffle_sync(x, self._lane_of_row(i)) for x in of_lane)
            else:
                place = block.keys.place(source.number, cutlass.min(first + k.tXcX[0, i, 0][0], source.last))
            k.start_row(i, place, source.head_kv, slot)
            if cutlass.const_expr(self.same_rows):
                v.start_row(i, place, source.head_kv, slot)
        if cutlass.const_expr(not self.same_rows):
            for i in cutlass.range_constexpr(cute.size(v.tXcX, mode=[1])):
                key = cutlass.min(first + v.tXcX[0, i, 0][0], source.last)
                v.start_row(i, block.keys.place(source.number, key), source.head_kv, slot)

    @cute.jit
    def _copy_ahead(self, block: CacheBlock, seen: SeenTiles, then: SeenTiles, n, stage, parity):
        """Start copying tile n from a part's first one on, which past its end is one of the part behind it; the first one of
        that with its queries."""
        ahead = self.config.stages
        if (n == seen.count) & (then.count > 0):
            self._copy_q(block, then, 1 - parity)
        if n - seen.count < then.count:
            source, tile = self._ahead(seen, then, n)
            # asked for with the tile a ring before it, of whose part the one before it knew, or of this one
            self._copy(block, source, tile, stage, (n < seen.count) | (n >= 2 * ahead))
        if n + ahead - seen.count < then.count:
            source, tile = self._ahead(seen, then, n + ahead)
            self._ask(block, source, tile, stage)
        cute.arch.cp_async_commit_group()

    def _ahead(self, seen: SeenTiles, then: SeenTiles, n) -> tuple[KeySource, Any]:
        """Of whom tile n from a part's first one on is, and which of its tiles."""
        here, sources = n < seen.count, zip(self._source(seen), self._source(then), strict=True)
        return KeySource(*(either(here, x, y) for x, y in sources)), either(here, n, n - seen.count)

    # ---- numbers of pages --------------------------------------------------------------------------------------------

    @cute.jit
    def _ask(self, block: CacheBlock, source: KeySource, n, stage):
        """Start copying the numbers of a part's tile n, with those keys that are a ring ahead of it: they have come when it is
        its turn. Each lane has a row of K that its warp copies, and reads no number but its own, so nobody waits for others."""
        if cutlass.const_expr(self.config.page_numbers):
            if cute.arch.lane_idx() < self._lanes_with_rows:
                page = divided(self._key_of_lane(block, source, n), block.keys.page_size)[0]
                number = cute.local_tile(block.keys.page_table[source.number, None], (1,), (page,))
                copy_word(number.iterator.toint(), self._number_of_lane(block, stage).iterator.toint())

    @cute.jit
    def _place_of_lane(self, block: CacheBlock, source: KeySource, n, stage, numbered) -> tuple:
        """Where the row of K is that this lane has of a part's tile n, of pages."""
        place: tuple = ()
        if cutlass.const_expr(self.config.page_numbers):
            page, row = divided(self._key_of_lane(block, source, n), block.keys.page_size)
            number = Int32(0)
            if cutlass.const_expr(self._lanes_with_rows == WARP) or cute.arch.lane_idx() < self._lanes_with_rows:
                if numbered:
                    number = self._number_of_lane(block, stage)[0]
                else:
                    number = block.keys.page_table[source.number, page]
            place = block.keys.inside((number, row))
        return place

    def _key_of_lane(self, block: CacheBlock, source: KeySource, n):
        """The row of the cache, of a part's tile n, that this lane has."""
        first = source.first + n * self.config.tile_n + block.group * self.keys_of_group
        return cutlass.min(first + self._row_of_lane(block), source.last)

    def _number_of_lane(self, block: CacheBlock, stage) -> cute.Tensor:
        """Where the number of its page is."""
        n = stage * self.config.tile_n + block.group * self.keys_of_group + self._row_of_lane(block)
        return cute.make_tensor(block.numbers + n, cute.make_layout(1))

    def _row_of_lane(self, block: CacheBlock):
        """The row of a group's tile that this lane has, of those that its warp copies. If these are fewer than lanes, some have
        the same, and no number."""
        rows, of_warp = self._rows_at_once
        lane, warp = cute.arch.lane_idx() % (self.keys_of_group * of_warp // rows), block.thread // WARP
        return lane // of_warp * rows + warp * of_warp + lane % of_warp

    @property
    def _lanes_with_rows(self) -> int:
        """How many of a warp's lanes have a row that no other has."""
        return min(self.keys_of_group * WARP // self.group_threads, WARP)

    def _lane_of_row(self, i: int):
        """The lane that has this thread's i-th row of K."""
        of_warp = self._rows_at_once[1]
        return i * of_warp + cute.arch.lane_idx() // (WARP // of_warp)

    @property
    def _rows_at_once(self) -> tuple[int, int]:
        """How many rows of K a group copies at a time, and each of its warps."""
        rows = self.lay.copies(self.config)["in", "K"].tile[0]
        return rows, rows * WARP // self.group_threads

    def _source(self, seen: SeenTiles) -> KeySource:
        """Of a part's tiles."""
        sequence = seen.sequence
        first = sequence.pad + sequence.begin + seen.begin * self.config.tile_n
        return KeySource(sequence.number, first, sequence.pad + sequence.keys - 1, seen.part.head_kv)

    @property
    def same_rows(self) -> bool:
        """Whether a thread copies the same rows of K and of V."""
        widths = [self.lay.copies(self.config)["in", name].tile for name in ("K", "V")]
        return widths[0] == widths[1]

    # ---- a part of a walk --------------------------------------------------------------------------------------------

    @cute.jit
    def _part_from(self, block: CacheBlock, start: PartStart, end) -> SeenTiles:
        """The part that begins there, of a block whose tiles go up to ``end``."""
        sequence = block.keys.sequence(start.sequence)
        return self._seen(block, sequence, part_from(block.keys, sequence, start, end))

    @cute.jit
    def _seen(self, block: CacheBlock, sequence: Sequence, part: WalkPart) -> SeenTiles:
        """What of a part its rows see."""
        config, keys = self.config, block.keys
        shift = sequence.keys - sequence.queries
        values = replace(block.values, seqlen_q=sequence.queries, seqlen_k=sequence.keys, packed=keys.packed)
        values = replace(values, lo=shift - keys.left, hi=shift + keys.right)
        if cutlass.const_expr(values.captured is not None):
            values = replace(values, sequence=sequence.number, head=part.head_kv * keys.packed)
        n, band = config.tile_n, values.band(self.problem)
        row_first = part.row_tile * config.tile_m
        first = divided(row_first, keys.packed)[0]
        last = cutlass.min(divided(row_first + config.tile_m - 1, keys.packed)[0], sequence.queries - 1)
        begin, past = band.key_range(first, last, sequence.keys, cutlass)
        whole_begin, whole_end = band.whole_range(first, last, sequence.keys, cutlass)

        def tiles(key, and_begun: bool):
            """Tiles up to a key: those that end before it, or all that have begun."""
            return divided(cutlass.max(key - sequence.begin, 0) + and_begun * (n - 1), n)[0]

        seen_begin = cutlass.max(part.begin, tiles(begin, False))
        seen_end = cutlass.min(part.end, tiles(past, True))
        return SeenTiles(
            *(sequence, part, values),
            begin=seen_begin,
            count=cutlass.max(seen_end - seen_begin, 0),
            whole_begin=tiles(whole_begin, True),
            whole_end=tiles(whole_end, False),
        )

    def _with_places(self, block: CacheBlock, seen: SeenTiles) -> SeenTiles:
        """The same, of a part that is computed."""
        return replace(seen, places=places_of(block.keys, seen.sequence, seen.part, block.stretches))

    @cute.jit
    def _begin(self, block: CacheBlock, seen: SeenTiles):
        """Start the first part's first copies: those of all stages, and with the first those of its queries."""
        source = self._source(seen)
        for n in cutlass.range(self.config.stages, unroll=1):  # code that has come once comes sooner again
            if n < seen.count:
                self._copy(block, source, n, n)
            if n == 0:
                self._copy_q(block, seen, 0)
            if n + self.config.stages < seen.count:
                self._ask(block, source, n + self.config.stages, n)
            cute.arch.cp_async_commit_group()

    @cute.jit
    def _part(self, block: CacheBlock, start: PartStart, end, stage, parity, written):
        """A part whose first copies have started, as many as there are stages, the first to ``stage``, and those of its queries
        to the place ``parity``. ``written`` parts of the same walk that the block has computed before it are in no counter yet.
        Returns the next one's start, its stage, and how many are written by then."""
        config, keys, ahead = self.config, block.keys, self.config.stages
        seen = self._part_from(block, start, end)
        after = start_after(keys, seen.sequence, seen.part)
        then = self._part_from(block, after, end)
        then = replace(then, count=either(after.at < end, then.count, Int32(0)))
        seen = self._with_places(block, seen)  # while copies are on their way
        acc_O = cute.make_rmem_tensor(block.mma_O.partition_shape_C((config.tile_m, config.tile_dv)), Float32)
        acc_O.fill(0.0)
        rows = rows_columns(acc_O)
        rescale = cute.make_rmem_tensor(cute.size(rows, mode=[0]), Float32)
        softmax = Softmax.start(cute.size(rescale), seen.values.exponent(self.problem), fused=False)
        cS = Coordinates.of(block.mma_S, block.thread, (config.tile_m, self.keys_of_group))

        if cutlass.const_expr((config.tile_d, config.tile_dv) != (self.problem.head_dim, self.problem.head_dim_v)):
            for x in (block.k, block.v):  # again for each part: what groups exchange lies there, too
                x.clear_padding()
        cute.arch.cp_async_wait_group(ahead - 1)
        self._publish()
        cute.arch.sync_threads()
        of_q = self._queries(block, parity)

        primed = either(seen.count > 0, ahead, ahead - 1)  # but for a slot in which to exchange
        for n in cutlass.range(seen.count, primed, unroll=1):  # tiles that a longer part would start later
            self._copy_ahead(block, seen, then, n, (stage + n) % ahead, parity)
        for n in cutlass.range(seen.count, unroll=1):
            cute.arch.cp_async_wait_group(ahead - 1)
            self._sync_group(block)
            tile, slot = seen.begin + n, (block.group, stage)
            masked = (tile < seen.whole_begin) | (tile >= seen.whole_end)
            if cutlass.const_expr(self.problem.masks_all):
                self._poison(block, slot)
            elif cutlass.const_expr(self.problem.masked):
                if masked:
                    self._poison(block, slot)

            acc_S = self._scores(block, of_q, slot)
            first = seen.sequence.begin + tile * config.tile_n + block.group * self.keys_of_group
            origin = (seen.part.row_tile * config.tile_m, first)
            Scores(cS, seen.values, self.problem, unrolls=False).apply_rules(acc_S, origin, masked)
            softmax.step(rows_columns(acc_S), rescale)
            scale_rows(rows, rescale)
            self._add(block, acc_S, acc_O, slot)
            if n + 1 < seen.count:
                self._sync_group(block)
                self._copy_ahead(block, seen, then, n + ahead, stage, parity)
            stage = (stage + 1) % ahead

        cute.arch.sync_threads()  # all groups are done with the slot that no copy is on its way to
        free = (stage + ahead - 1) % ahead
        self._merge(block, seen, rows, softmax, self._exchanged(block, free))
        cute.arch.sync_threads()  # the slot is free, and what all have written is there for whoever sees that they have arrived
        self._copy_ahead(block, seen, then, seen.count + ahead - 1, free, parity)
        if cutlass.const_expr(not self.problem.invariant):
            self._arrive(block, seen, 1)
        else:
            written += 1
            if (after.at >= end) | (after.begin == 0):  # the block's last part of this walk: one fence for all of them
                self._arrive(block, seen, written)
                written = Int32(0)
        return after, stage, written

    @cute.jit
    def _poison(self, block: CacheBlock, slot):
        """A group: its keys of a tile whose values aren't finite."""
        poison_keys(block.sK[None, None, slot], block.sV[None, None, slot], (block.thread, self.group_threads))
        self._sync_group(block)

    # ---- products ----------------------------------------------------------------------------------------------------

    def _operands(self, shared: tuple, mmas: tuple, thread) -> tuple:
        """What products take of (Q, K, V) in shared memory; V's rows are what P·V sums over."""
        config = self.config
        (sQ, sK, sV), (S, O) = shared, mmas  # noqa: E741

        def operand(name, shape, s):
            return LdmatrixOperand.of(self.lay.load_operand(name, config), s, shape, thread)

        return (
            operand("Q", S.partition_shape_A((config.tile_m, MMA_K)), sQ),
            operand("K", S.partition_shape_B((self.keys_of_group, MMA_K)), sK),
            operand("V", O.partition_shape_B((config.tile_dv, MMA_K)), transposed(sV)),
        )

    def _publish(self):
        """What this thread has written to shared memory is for the products; they read as threads do."""

    def _queries(self, block: CacheBlock, parity):
        """What gives Q's registers of a step: all of them are held, or each is loaded again for every tile."""
        load = partial(block.tSrQ.load, slot=(parity,))
        if self.config.tile_m // self.lay.row_warps(self.config) > self.lay.ROWS[0]:  # a warp has too many to hold
            return load
        held = []
        for step in range(self.config.tile_d // MMA_K):
            held.append(cute.make_rmem_tensor_like(block.tSrQ.fragment))
            held[step].store(load(step).load())
        return held.__getitem__

    def _scores(self, block: CacheBlock, of_q, slot) -> cute.Tensor:
        """Q·Kᵀ with the keys of a slot."""
        acc = cute.make_rmem_tensor(block.mma_S.partition_shape_C((self.config.tile_m, self.keys_of_group)), Float32)
        acc.fill(0.0)
        product(block.mma_S, acc, self.config.tile_d // MMA_K, of_q, partial(block.tSrK.load, slot=(slot,)))
        return acc

    def _add(self, block: CacheBlock, acc_S: cute.Tensor, acc_O: cute.Tensor, slot):
        """P·V with the values of a slot."""
        p, dtype = as_operand_a(acc_S), block.sV.element_type

        def rounded(step):  # just in time
            return converted(p[None, None, step], dtype)

        product(block.mma_O, acc_O, self.keys_of_group // MMA_K, rounded, partial(block.tOrV.load, slot=(slot,)))

    # ---- who merges the parts of a walk ------------------------------------------------------------------------------

    @cute.jit
    def _arrive(self, block: CacheBlock, seen: SeenTiles, written):
        """What all threads found of this part is written, and of ``written`` parts in all of its walk since the block last said
        so: if these are the last ones, merge all parts. What ends a walk at the beginning of a block's stretch is counted
        when the block is done: a fence waits for all copies on their way."""
        if cutlass.const_expr(block.keys.end_steps > 0):
            keys, part = block.keys, seen.part
            past = part.at + (part.end - part.begin) * keys.tile_steps + keys.end_steps  # of the walk, if it ends here
            if past >= block.stretches.own.end:
                late = (block.first.begin > 0) & (block.first.at < seen.part.at)
                for n in cutlass.range(either(late, Int32(2), Int32(1)), unroll=1):
                    if n == 1:
                        cute.arch.sync_threads()  # all have read what the last part's counter said
                        seen = self._with_places(block, self._part_from(block, block.first, block.stretches.own.end))
                    self._count(block, seen, written)
        else:
            self._count(block, seen, written)
