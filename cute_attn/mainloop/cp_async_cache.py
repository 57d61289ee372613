"""Attention to a cache with cp.async copies and mma.sync: few query rows, many keys, at the rate at which memory gives them.

A block computes its stretch of all key tiles (``balance.py``), part of a walk after part of a walk. Its warps are groups, each
of which copies keys of its own into a ring of its own and takes its rows' softmax of them by itself, so that nothing is waited
for but memory; a part's end merges what the groups found. If that is all of a walk, it is the result. If not, it goes to the
workspace, and the block that comes last merges all parts. The next part's first copies start before a part's end.

Rows of K and V past the last key are read as that key instead, as in ``cp_async.py``. Where some rows see keys that others
don't, tiles that are masked are looked through for values that are not finite (``guard.py``), always: they are few.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn import layouts
from cute_attn.balance import (
    CachedKeys,
    PartPlaces,
    Sequence,
    Stretches,
    WalkPart,
    divided,
    next_part,
    part_of_stretch,
    places_of,
)
from cute_attn.epilogue import converted
from cute_attn.layouts.base import BYTES, VECTOR, WARP
from cute_attn.layouts.fragments import THREADS_PER_ROW, as_operand_a, rows_columns, transposed, vector_at
from cute_attn.mainloop.common import DeviceOps, Values
from cute_attn.mainloop.guard import poison_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.warps import MMA_K, LdmatrixOperand, Stream, product
from cute_attn.softmax import Softmax, finished, scale_rows

PIECE = 4  # columns of O that a thread merges at a time
GROUP_BARRIER = 1  # the first of the named barriers, one a group
AT_ONCE = 16  # partial results whose loads are on their way at the same time


@dataclass(frozen=True)
class Workspace:
    """Partial results in global memory, of each place ``(columns, rows)`` of O and ``(2, rows)``, a maximum and a sum, and
    counters."""

    o: cute.Tensor  # (places, rows, columns)
    of_rows: cute.Tensor  # (places, rows, 2)
    counters: cute.Tensor

    @staticmethod
    def of(m: cute.Tensor, counters: Int32, places: Int32, rows: Int32, columns: int) -> Workspace:
        """The three in one piece of memory, ``counters`` words first, a multiple of 4."""
        per_place = cutlass.Int64(rows) * columns
        after = m.iterator + cute.assume(counters, 4)
        o = cute.make_tensor(after, cute.make_layout((places, rows, columns), stride=(per_place, columns, 1)))
        of_rows = cute.make_layout((places, rows, 2), stride=(rows * 2, 2, 1))
        of_rows = cute.make_tensor(after + places * per_place, of_rows)
        words = cute.make_tensor(cute.recast_ptr(m.iterator, dtype=Int32), cute.make_layout(counters))
        return Workspace(o, of_rows, words)


@dataclass(frozen=True)
class Outputs:
    """O ``(elements, rows, heads, columns)`` and the log-sum-exp ``(elements, heads, rows)`` or None; sinks ``(heads)`` or
    None."""

    o: cute.Tensor
    lse: cute.Tensor | None
    sinks: cute.Tensor | None


@dataclass(frozen=True)
class LoadedOperands:
    """Both products' operands on their way to registers."""

    q: LdmatrixOperand
    k: LdmatrixOperand
    v: LdmatrixOperand


@dataclass(frozen=True)
class CacheBlock:
    """A block's shared memory, and this thread's part of its group's."""

    sQ: cute.Tensor
    k: Stream
    v: Stream
    sK: cute.Tensor
    sV: cute.Tensor
    operands: Any
    mma_S: cute.TiledMma
    mma_O: cute.TiledMma
    exchange: tuple  # O on its way from one half of the groups to the other, over the last stage; maxima and sums with it
    word: cute.Tensor
    group: Int32
    thread: Int32  # in the group


@dataclass(frozen=True)
class Serving:
    """What all parts of a block's stretch have in common."""

    mQ: cute.Tensor  # (elements, rows, heads, columns)
    outputs: Outputs
    values: Values
    keys: CachedKeys
    workspace: Workspace
    stretches: Stretches


@dataclass(frozen=True)
class SeenTiles:
    """A part of a walk: of its tiles, those from ``begin`` up to ``end`` that any row of its tile sees, of which
    ``whole_begin`` up to ``whole_end`` need no mask, and the values there."""

    sequence: Sequence
    part: WalkPart
    values: Values
    begin: Int32
    end: Int32
    whole_begin: Int32
    whole_end: Int32


class Forward:
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.lay = layouts.family(config)
        self.group_threads = WARP * self.lay.row_warps(config)
        self.keys_of_group = self.lay.tile("K", config)[0]
        self.holds_q = config.tile_m // self.lay.row_warps(config) == self.lay.ROWS[0]  # in registers

    @cute.jit
    def launch(self, mQ, mK, mV, outputs: Outputs, values: Values, keys: CachedKeys, workspace: Workspace, blocks, stream):
        self.kernel(mQ, mK, mV, outputs, values, keys, workspace).launch(
            grid=[blocks, 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, mQ, mK, mV, outputs: Outputs, values: Values, keys: CachedKeys, workspace: Workspace):
        block = self._block(mK, mV)
        number = cute.arch.block_idx()[0]
        tiles, of_lane = keys.all_tiles()
        stretches = Stretches.of(tiles, cute.arch.grid_dim()[0])
        serving = Serving(mQ, outputs, values, keys, workspace, stretches)
        at, end = stretches.begin(number), stretches.begin(number + 1)
        i, before = keys.find(at, of_lane)
        i, before, at = next_part(keys, i, before, at, end)
        if at < end:
            self._begin(block, serving, i, before, at, end)
        while at < end:
            i, before, at = self._part(block, serving, i, before, at, end)

    # ---- setup -----------------------------------------------------------------------------------------------------

    def _block(self, mK, mV) -> CacheBlock:
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
        last = ring + (config.stages - 1) * config.tile_n * (config.tile_d + config.tile_dv)
        floats = smem.allocate_tensor(Float32, cute.make_layout(parts["rows"] // 4), 16)
        word = smem.allocate_tensor(Int32, cute.make_layout(4), 16)
        stream = partial(Stream.of, lay, config)
        k, v = stream("K", mK, sK, thread, self.problem.head_dim), stream("V", mV, sV, thread, self.problem.head_dim_v)
        mma_S, mma_O = lay.tiled_mma("S", config), lay.tiled_mma("O", config)
        operands = self._operands((sQ, sK, sV), (mma_S, mma_O), thread)
        exchange = cute.recast_ptr(last, dtype=Float32), floats.iterator
        return CacheBlock(sQ, k, v, sK, sV, operands, mma_S, mma_O, exchange, word, group, thread)

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
    def _copy_q(self, block: CacheBlock, serving: Serving, seen: SeenTiles):
        """All threads: start copying the rows of the tile; those that don't exist, and columns past head_dim, are zeros."""
        config, sQ, keys = self.config, self._rows_of_q(block), serving.keys
        vectors = config.tile_d // VECTOR
        for n in cutlass.range(cute.arch.thread_idx()[0], config.tile_m * vectors, config.threads, unroll=1):
            row, column = n // vectors, n % vectors
            query, head = divided(seen.part.row_tile * config.tile_m + row, keys.packed)
            head += seen.part.head_kv * keys.packed
            into = vector_at(sQ, row, column)
            if (query < seen.sequence.queries) & (column * VECTOR < self.problem.head_dim):
                of_head = serving.mQ[seen.sequence.element, None, head, None]
                cute.copy(block.k.copy, vector_at(of_head, seen.sequence.first + query, column), into)
            else:
                into.fill(0.0)

    @cute.jit
    def _copy(self, block: CacheBlock, keys: CachedKeys, seen: SeenTiles, tile, stage):
        """A group: start copying its keys of a tile, if there is one, to a stage of its ring; one group of copies either
        way."""
        sequence, slot = seen.sequence, (block.group, stage)
        if tile < seen.end:
            first = sequence.begin + tile * self.config.tile_n + block.group * self.keys_of_group
            k, v = block.k, block.v
            for i in cutlass.range_constexpr(cute.size(k.tXcX, mode=[1])):
                key = cutlass.min(first + k.tXcX[0, i, 0][0], sequence.keys - 1)
                place = keys.place(sequence.number, sequence.pad + key)
                k.start_row(i, place, seen.part.head_kv, slot)
                if cutlass.const_expr(self.same_rows):
                    v.start_row(i, place, seen.part.head_kv, slot)
            if cutlass.const_expr(not self.same_rows):
                for i in cutlass.range_constexpr(cute.size(v.tXcX, mode=[1])):
                    key = cutlass.min(first + v.tXcX[0, i, 0][0], sequence.keys - 1)
                    v.start_row(i, keys.place(sequence.number, sequence.pad + key), seen.part.head_kv, slot)
        cute.arch.cp_async_commit_group()

    @property
    def same_rows(self) -> bool:
        """Whether a thread copies the same rows of K and of V."""
        widths = [self.lay.copies(self.config)["in", name].tile for name in ("K", "V")]
        return widths[0] == widths[1]

    # ---- a part of a walk --------------------------------------------------------------------------------------------

    @cute.jit
    def _seen(self, serving: Serving, i, before, at, end) -> SeenTiles:
        """The part that begins at tile ``at`` of a block's, which go up to ``end``: of sequence i, before which there are
        ``before`` tiles."""
        config, keys = self.config, serving.keys
        sequence = keys.sequence(i)
        part, _ = part_of_stretch(keys, sequence, before, at, end)
        shift = sequence.keys - sequence.queries
        values = replace(serving.values, seqlen_q=sequence.queries, seqlen_k=sequence.keys, packed=keys.packed)
        values = replace(values, lo=shift - keys.left, hi=shift + keys.right)
        if cutlass.const_expr(values.captured is not None):
            values = replace(values, sequence=sequence.number, head=part.head_kv * keys.packed)
        n, band = config.tile_n, values.band(self.problem)
        row_first = part.row_tile * config.tile_m
        first = divided(row_first, keys.packed)[0]
        last = cutlass.min(divided(row_first + config.tile_m - 1, keys.packed)[0], sequence.queries - 1)
        begin, past = band.key_range(first, last, sequence.keys, DeviceOps)
        whole_begin, whole_end = band.whole_range(first, last, sequence.keys, DeviceOps)
        return SeenTiles(
            *(sequence, part, values),
            begin=cutlass.max(part.begin, (begin - sequence.begin) // n),
            end=cutlass.min(part.end, (past - sequence.begin + n - 1) // n),
            whole_begin=(whole_begin - sequence.begin + n - 1) // n,
            whole_end=cutlass.max(whole_end - sequence.begin, 0) // n,
        )

    @cute.jit
    def _begin(self, block: CacheBlock, serving: Serving, i, before, at, end):
        """Start a part's first copies: those of its queries, and all stages but the last."""
        seen = self._seen(serving, i, before, at, end)
        self._copy_q(block, serving, seen)
        for stage in cutlass.range(self.config.stages - 1, unroll=1):  # code that has come once comes sooner again
            self._copy(block, serving.keys, seen, seen.begin + stage, stage)

    @cute.jit
    def _part(self, block: CacheBlock, serving: Serving, i, before, at, end):
        """A part whose first copies have started. Returns the next one."""
        config, keys = self.config, serving.keys
        seen = self._seen(serving, i, before, at, end)
        acc_O = cute.make_rmem_tensor(block.mma_O.partition_shape_C((config.tile_m, config.tile_dv)), Float32)
        acc_O.fill(0.0)
        rows = rows_columns(acc_O)
        rescale = cute.make_rmem_tensor(cute.size(rows, mode=[0]), Float32)
        softmax = Softmax.start(cute.size(rescale), seen.values.exponent(self.problem), fused=False)
        cS = Coordinates.of(block.mma_S, block.thread, (config.tile_m, self.keys_of_group))

        for x in (block.k, block.v):
            x.clear_padding()  # where groups exchange something, too
        cute.arch.cp_async_wait_group(config.stages - 2)
        self._publish()
        cute.arch.sync_threads()
        of_q = self._queries(block)

        stage = Int32(0)
        for tile in cutlass.range(seen.begin, seen.end, unroll=1):
            cute.arch.cp_async_wait_group(config.stages - 2)
            self._sync_group(block)
            masked = (tile < seen.whole_begin) | (tile >= seen.whole_end)
            slot = (block.group, stage)
            if cutlass.const_expr(self.problem.masks_all):
                self._poison(block, slot)
            elif cutlass.const_expr(self.problem.masked):
                if masked:
                    self._poison(block, slot)
            self._copy(block, keys, seen, tile + config.stages - 1, (stage + config.stages - 1) % config.stages)

            acc_S = self._scores(block, of_q, slot)
            first = seen.sequence.begin + tile * config.tile_n + block.group * self.keys_of_group
            origin = (seen.part.row_tile * config.tile_m, first)
            Scores(cS, seen.values, self.problem).apply_rules(acc_S, origin, masked)
            softmax.step(rows_columns(acc_S), rescale)
            scale_rows(rows, rescale)
            self._add(block, acc_S, acc_O, slot)
            stage = (stage + 1) % config.stages

        cute.arch.sync_threads()  # all groups are done with Q and with all stages
        following = next_part(keys, i, before, seen.part.at + seen.part.end - seen.part.begin, end)
        if following[2] < end:
            self._begin(block, serving, *following, end)
        self._gather(block, acc_O, softmax)
        self._finish(block, serving, seen, rows, softmax)
        return following

    @cute.jit
    def _poison(self, block: CacheBlock, slot):
        """A group: its keys of a tile whose values aren't finite."""
        poison_keys(block.sK[None, None, slot], block.sV[None, None, slot], (block.thread, self.group_threads))
        self._sync_group(block)

    # ---- products ----------------------------------------------------------------------------------------------------

    def _operands(self, shared: tuple, mmas: tuple, thread):
        """What products take of (Q, K, V) in shared memory; V's rows are what P·V sums over."""
        config, lay = self.config, self.lay
        (sQ, sK, sV), (S, O) = shared, mmas  # noqa: E741

        def operand(name, shape, s):
            fragment = cute.make_rmem_tensor(shape, s.element_type)
            return LdmatrixOperand.of(lay.load_operand(name, config), s, fragment, thread)

        return LoadedOperands(
            operand("Q", S.partition_shape_A((config.tile_m, MMA_K)), sQ),
            operand("K", S.partition_shape_B((self.keys_of_group, MMA_K)), sK),
            operand("V", O.partition_shape_B((config.tile_dv, MMA_K)), transposed(sV)),
        )

    def _rows_of_q(self, block: CacheBlock) -> cute.Tensor:
        return block.sQ

    def _publish(self):
        """What this thread has written to shared memory is for the products; they read as threads do."""

    def _queries(self, block: CacheBlock):
        """What gives Q's registers of a step: all of them are held, or each is loaded again for every tile."""
        if not self.holds_q:
            return block.operands.q.load
        held = []
        for step in range(self.config.tile_d // MMA_K):
            held.append(cute.make_rmem_tensor_like(block.operands.q.fragment))
            held[step].store(block.operands.q.load(step).load())
        return held.__getitem__

    def _scores(self, block: CacheBlock, of_q, slot) -> cute.Tensor:
        """Q·Kᵀ with the keys of a slot."""
        acc = cute.make_rmem_tensor(block.mma_S.partition_shape_C((self.config.tile_m, self.keys_of_group)), Float32)
        acc.fill(0.0)
        product(block.mma_S, acc, self.config.tile_d // MMA_K, of_q, partial(block.operands.k.load, slot=(slot,)))
        return acc

    def _add(self, block: CacheBlock, acc_S: cute.Tensor, acc_O: cute.Tensor, slot):
        """P·V with the values of a slot."""
        p, dtype = as_operand_a(acc_S), block.sV.element_type

        def rounded(step):  # just in time
            return converted(p[None, None, step], dtype)

        product(block.mma_O, acc_O, self.keys_of_group // MMA_K, rounded, partial(block.operands.v.load, slot=(slot,)))

    # ---- the end of a part -------------------------------------------------------------------------------------------

    @cute.jit
    def _gather(self, block: CacheBlock, acc_O: cute.Tensor, softmax: Softmax):
        """What all groups found to the first one's registers: half of the groups hand theirs to the other half, until there is
        one."""
        o, of_rows = block.exchange
        flat = cute.make_tensor(acc_O.iterator, cute.make_layout((PIECE, cute.size(acc_O) // PIECE)))
        threads, pieces, held = self.group_threads, cute.size(flat, mode=[1]), cute.size(softmax.row_max)
        half = self.config.key_warps // 2
        while cutlass.const_expr(half > 0):
            if (block.group >= half) & (block.group < 2 * half):
                place = (block.group - half) * threads + block.thread
                for r in cutlass.range_constexpr(held):
                    pair = cute.make_rmem_tensor(2, Float32)
                    pair[0], pair[1] = softmax.row_max[r], softmax.row_sum[r]
                    cute.autovec_copy(pair, _floats(of_rows, place * held + r, 2))
                for c in cutlass.range_constexpr(pieces):
                    where = ((block.group - half) * pieces + c) * threads + block.thread
                    cute.autovec_copy(flat[None, c], _floats(o, where, PIECE))
            cute.arch.sync_threads()
            if block.group < half:
                place, weights = block.group * threads + block.thread, cute.make_rmem_tensor((2, held), Float32)
                for r in cutlass.range_constexpr(held):
                    pair = cute.make_rmem_tensor(2, Float32)
                    cute.autovec_copy(_floats(of_rows, place * held + r, 2), pair)
                    found = _weights(softmax.row_max[r], pair[0], softmax.scale_log2)
                    softmax.row_max[r], weights[0, r], weights[1, r] = found
                    softmax.row_sum[r] = softmax.row_sum[r] * weights[0, r] + pair[1] * weights[1, r]
                for c in cutlass.range_constexpr(pieces):  # of each, two columns of two rows
                    more = cute.make_rmem_tensor(PIECE, Float32)
                    cute.autovec_copy(_floats(o, (block.group * pieces + c) * threads + block.thread, PIECE), more)
                    for j in cutlass.range_constexpr(PIECE):
                        r = j // 2 + 2 * (c % (held // 2))
                        flat[j, c] = flat[j, c] * weights[0, r] + more[j] * weights[1, r]
            cute.arch.sync_threads()
            half = half // 2

    @cute.jit
    def _finish(self, block: CacheBlock, serving: Serving, seen: SeenTiles, rows: cute.Tensor, softmax: Softmax):
        """What the first group has: to the outputs if it is all of the walk, else to the workspace; and if all other parts are
        there, these, merged. ``rows`` are those of O."""
        config, problem = self.config, self.problem
        sequence, part, workspace = seen.sequence, seen.part, serving.workspace
        places = places_of(serving.keys, sequence, part, serving.stretches)
        exist = cutlass.min(sequence.queries * serving.keys.packed - part.row_tile * config.tile_m, config.tile_m)
        thread = cute.arch.thread_idx()[0]
        if block.group == 0:
            cO = rows_columns(block.mma_O.get_slice(block.thread).partition_C(self._identity()))
            for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
                row_max = softmax.row_max[r]
                row_sum = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=THREADS_PER_ROW)
                row, column = cO[r, 0]
                if row < exist:
                    if places.parts == 1:
                        of_row, normalize = self._store_lse(serving, seen, row, column, row_max, row_sum)
                        for c in cutlass.range_constexpr(0, cute.size(rows, mode=[1]), 2):
                            pair = rows[r, c] * normalize, rows[r, c + 1] * normalize
                            _store_pair(of_row, cO[r, c][1], *pair, problem.head_dim_v)
                    else:
                        place = places.of(places.number)
                        if column == 0:
                            workspace.of_rows[place, row, 0] = row_max
                            workspace.of_rows[place, row, 1] = row_sum
                        for c in cutlass.range_constexpr(0, cute.size(rows, mode=[1]), 2):
                            into = workspace.o[place, row, None]
                            _store_pair(into, cO[r, c][1], rows[r, c], rows[r, c + 1], problem.head_dim_v)
        if places.parts > 1:
            cute.arch.sync_threads()  # what all have written is there for whoever sees that this one has arrived
            if thread == 0:
                counter = workspace.counters.iterator + places.counter
                arrived = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu")
                if arrived == places.parts - 1:
                    workspace.counters[places.counter] = Int32(0)
                block.word[0] = arrived
            cute.arch.sync_threads()
            if block.word[0] == places.parts - 1:
                self._merge_parts(serving, seen, places, exist)

    @cute.jit
    def _merge_parts(self, serving: Serving, seen: SeenTiles, places: PartPlaces, exist):
        """All threads: all parts of a walk, in the order of their keys, to the outputs."""
        workspace, exponent = serving.workspace, seen.values.exponent(self.problem)
        pieces = self.problem.head_dim_v // PIECE
        for n in cutlass.range(cute.arch.thread_idx()[0], exist * pieces, self.config.threads, unroll=1):
            row, piece = n // pieces, n % pieces
            row_max, row_sum = Float32(-Float32.inf), Float32(0.0)
            o = cute.make_rmem_tensor(PIECE, Float32)
            o.fill(0.0)
            for first in cutlass.range(0, places.parts, AT_ONCE, unroll=1):
                many = []
                for j in cutlass.range_constexpr(AT_ONCE):  # past the last one that one again, without weight
                    place = places.of(cutlass.min(first + j, places.parts - 1))
                    held = cute.make_rmem_tensor(PIECE, Float32)
                    cute.autovec_copy(_piece(workspace.o[place, row, None], piece), held)
                    found_max = workspace.of_rows[place, row, 0]
                    found_max = found_max if first + j < places.parts else -Float32.inf
                    many.append((found_max, workspace.of_rows[place, row, 1], held))
                for found_max, found_sum, held in many:
                    row_max, weight, weight_of_more = _weights(row_max, found_max, exponent)
                    o.store(o.load() * weight + held.load() * weight_of_more)
                    row_sum = row_sum * weight + found_sum * weight_of_more
            of_row, normalize = self._store_lse(serving, seen, row, piece, row_max, row_sum)
            _piece(of_row, piece).store((o.load() * normalize).to(of_row.element_type))

    @cute.jit
    def _store_lse(self, serving: Serving, seen: SeenTiles, row, column, row_max, row_sum):
        """Of a row of all keys the log-sum-exp, by whoever has column 0; returns where its O goes, and what that is scaled
        by."""
        keys, outputs = serving.keys, serving.outputs
        query, head = divided(seen.part.row_tile * self.config.tile_m + row, keys.packed)
        head += seen.part.head_kv * keys.packed
        query += seen.sequence.first
        sink = None if outputs.sinks is None else outputs.sinks[head]
        normalize, lse = finished(row_max, row_sum, seen.values.exponent(self.problem), sink)
        if cutlass.const_expr(outputs.lse is not None):
            if column == 0:
                outputs.lse[seen.sequence.element, head, query] = lse
        return outputs.o[seen.sequence.element, query, head, None], normalize

    def _identity(self) -> cute.Tensor:
        return cute.make_identity_tensor((self.config.tile_m, self.config.tile_dv))


def _floats(place, n, count: int) -> cute.Tensor:
    """The n-th ``count`` floats from a place in shared memory on."""
    return cute.make_tensor((place + n * count).align(4 * count), cute.make_layout(count))


def _piece(row: cute.Tensor, piece) -> cute.Tensor:
    """Where PIECE columns of a row are."""
    begin = cute.local_tile(row, (PIECE,), (piece,)).iterator
    return cute.make_tensor(begin.align(PIECE * row.element_type.width // 8), cute.make_layout(PIECE))


@cute.jit
def _store_pair(row: cute.Tensor, column, first: Float32, second: Float32, columns: cutlass.Constexpr[int]):
    """Two neighbouring columns of a row in global memory, if it has them."""
    if column < columns:
        pair = cute.make_rmem_tensor(2, Float32)
        pair[0], pair[1] = first, second
        begin = cute.local_tile(row, (2,), (column // 2,)).iterator.align(2 * row.element_type.width // 8)
        cute.make_tensor(begin, pair.layout).store(pair.load().to(row.element_type))


@cute.jit
def _weights(row_max: Float32, max_of_more: Float32, exponent: Float32):
    """``(maximum, weight, weight of more)`` of a partial row and another of more keys."""
    new = cute.arch.fmax(row_max, max_of_more)
    anchor = Float32(0.0) if new == -Float32.inf else new  # −inf − −inf would make a NaN
    return new, *(cute.math.exp2((x - anchor) * exponent, fastmath=True) for x in (row_max, max_of_more))
