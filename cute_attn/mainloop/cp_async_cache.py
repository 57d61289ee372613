"""Attention to a cache with cp.async copies and mma.sync: few query rows, many keys, at the rate at which memory gives them.

A block computes its stretch of all key tiles (``balance.py``), part of a walk after part of a walk. Its warps are groups, each
of which copies keys of its own into a ring of its own and takes its rows' softmax of them by itself, so that nothing is waited
for but memory; a part's end merges what the groups found. If that is all of a walk, it is the result. If not, it goes to the
workspace, and the block that comes last merges all parts.

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
from cute_attn.balance import CachedKeys, Sequence, Stretches, WalkPart, divided, part_of_stretch, places_of
from cute_attn.epilogue import converted
from cute_attn.layouts.base import VECTOR, WARP
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
    def of(m: cute.Tensor, places: Int32, rows: Int32, columns: int) -> Workspace:
        """The three in one piece of memory, the counters last."""
        per_place = cutlass.Int64(rows) * columns
        o = cute.make_tensor(m.iterator, cute.make_layout((places, rows, columns), stride=(per_place, columns, 1)))
        after = m.iterator + places * per_place
        of_rows = cute.make_tensor(after, cute.make_layout((places, rows, 2), stride=(rows * 2, 2, 1)))
        after = cute.recast_ptr(after + places * rows * 2, dtype=Int32)
        return Workspace(o, of_rows, cute.make_tensor(after, cute.make_layout(m.shape[0])))


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
    merged_o: cute.Tensor  # (group, row, column), float32, over K and V
    merged_rows: cute.Tensor  # (group, row, maximum and sum)
    word: cute.Tensor
    group: Int32
    thread: Int32  # in the group
    first_slot: Int32  # of the group's ring


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
        at, end = stretches.begin(number), stretches.begin(number + 1)
        i, before = keys.find(at, of_lane)
        while at < end:
            sequence = keys.sequence(i)
            tiles = sequence.tiles * keys.walks(sequence)
            if at >= before + tiles:
                i, before = i + 1, before + tiles
            else:
                part, passed = part_of_stretch(keys, sequence, before, at, end)
                at += passed
                if part.begin < part.end:
                    self._part(block, mQ, outputs, values, keys, workspace, (sequence, part, stretches))

    # ---- setup -----------------------------------------------------------------------------------------------------

    def _block(self, mK, mV) -> CacheBlock:
        config, lay = self.config, self.lay
        thread = cute.arch.thread_idx()[0]
        group, thread = thread // self.group_threads, thread % self.group_threads
        smem = cutlass.memory.SmemAllocator()

        sQ, sK, sV = (self._tensor(smem, name) for name in ("Q", "K", "V"))
        if lay.smem_parts(config)["merged"]:
            smem.allocate_tensor(cutlass.Int8, cute.make_layout(lay.smem_parts(config)["merged"]), 16)
        word = smem.allocate_tensor(Int32, cute.make_layout(4), 16)
        rows, columns = config.tile_m, config.tile_dv
        pitch = columns + lay.PADDING
        over = self._floats(sK)
        merged_o = cute.make_tensor(over, cute.make_layout((config.key_warps, rows, columns), stride=(rows * pitch, pitch, 1)))
        merged_rows = cute.make_tensor(
            over + config.key_warps * rows * pitch,
            cute.make_layout((config.key_warps, rows, lay.OF_ROW), stride=(rows * lay.OF_ROW, lay.OF_ROW, 1)),
        )
        stream = partial(Stream.of, lay, config)
        k, v = stream("K", mK, sK, thread, self.problem.head_dim), stream("V", mV, sV, thread, self.problem.head_dim_v)
        mma_S, mma_O = lay.tiled_mma("S", config), lay.tiled_mma("O", config)

        operands = self._operands((sQ, sK, sV), (mma_S, mma_O), thread)
        first_slot = group * config.stages
        places = merged_o, merged_rows, word, group, thread, first_slot
        return CacheBlock(sQ, k, v, sK, sV, operands, mma_S, mma_O, *places)

    def _tensor(self, smem, name: str) -> cute.Tensor:
        """Shared memory of an operand."""
        lay, config = self.lay, self.config
        return smem.allocate_tensor(lay.element(config), lay.smem_layout(name, config), lay.SMEM_ALIGN)

    def _floats(self, s: cute.Tensor):
        """The place of an operand in shared memory, for floats."""
        return cute.recast_ptr(s.iterator, swizzle_=None, dtype=Float32)

    @cute.jit
    def _sync_group(self, block: CacheBlock):
        if cutlass.const_expr(self.group_threads == WARP and not self.config.every_lane_arrives):
            cute.arch.sync_warp()
        else:
            cute.arch.barrier(barrier_id=GROUP_BARRIER + block.group, number_of_threads=self.group_threads)

    # ---- copies ----------------------------------------------------------------------------------------------------

    @cute.jit
    def _load_q(self, block: CacheBlock, mQ: cute.Tensor, keys: CachedKeys, sequence: Sequence, part: WalkPart):
        """All threads: the rows of the tile; those that don't exist, and columns past head_dim, are zeros."""
        config, sQ = self.config, self._rows_of_q(block)
        vectors = config.tile_d // VECTOR
        for at in cutlass.range_constexpr(config.tile_m * vectors // config.threads):
            n = at * config.threads + cute.arch.thread_idx()[0]
            row, column = n // vectors, n % vectors
            r = part.row_tile * config.tile_m + row
            query, head = divided(r, keys.packed)
            head += part.head_kv * keys.packed
            piece = cute.make_rmem_tensor(VECTOR, sQ.element_type)
            piece.fill(0.0)
            if (query < sequence.queries) & (column * VECTOR < self.problem.head_dim):
                source = vector_at(mQ[sequence.element, None, head, None], sequence.first + query, column)
                cute.autovec_copy(source, piece)
            cute.autovec_copy(piece, vector_at(sQ, row, column))

    @cute.jit
    def _copy(self, block: CacheBlock, keys: CachedKeys, sequence: Sequence, part: WalkPart, tile, slot):
        """A group: start copying its keys of a tile, if there is one, to a slot of its ring; one group of copies either way."""
        if tile < part.end:
            first = sequence.begin + tile * self.config.tile_n + block.group * self.keys_of_group
            k, v = block.k, block.v
            for i in cutlass.range_constexpr(cute.size(k.tXcX, mode=[1])):
                key = cutlass.min(first + k.tXcX[0, i, 0][0], sequence.keys - 1)
                place = keys.place(sequence.number, sequence.pad + key)
                k.start_row(i, place, part.head_kv, slot)
                if cutlass.const_expr(self.same_rows):
                    v.start_row(i, place, part.head_kv, slot)
            if cutlass.const_expr(not self.same_rows):
                for i in cutlass.range_constexpr(cute.size(v.tXcX, mode=[1])):
                    key = cutlass.min(first + v.tXcX[0, i, 0][0], sequence.keys - 1)
                    v.start_row(i, keys.place(sequence.number, sequence.pad + key), part.head_kv, slot)
        cute.arch.cp_async_commit_group()

    @property
    def same_rows(self) -> bool:
        """Whether a thread copies the same rows of K and of V."""
        widths = [self.lay.copies(self.config)["in", name].tile for name in ("K", "V")]
        return widths[0] == widths[1]

    # ---- a part of a walk --------------------------------------------------------------------------------------------

    @cute.jit
    def _part(
        self,
        block: CacheBlock,
        mQ,
        outputs: Outputs,
        values: Values,
        keys: CachedKeys,
        workspace: Workspace,
        where: cutlass.Constexpr[tuple],
    ):
        """A part of a sequence's walk; ``where`` is (sequence, part, stretches)."""
        config = self.config
        sequence, part, _ = where
        row_first = part.row_tile * config.tile_m
        values = replace(
            values,
            seqlen_q=sequence.queries,
            seqlen_k=sequence.keys,
            lo=sequence.keys - sequence.queries - keys.left,
            hi=sequence.keys - sequence.queries + keys.right,
            packed=keys.packed,
        )
        if cutlass.const_expr(values.captured is not None):
            values = replace(values, sequence=sequence.number, head=part.head_kv * keys.packed)
        # Of the part, the tiles that any row of the tile sees; those that need no mask.
        n, band = config.tile_n, values.band(self.problem)
        first = row_first // keys.packed
        last = cutlass.min((row_first + config.tile_m - 1) // keys.packed, sequence.queries - 1)
        begin, end = band.key_range(first, last, sequence.keys, DeviceOps)
        whole_begin, whole_end = band.whole_range(first, last, sequence.keys, DeviceOps)
        seen = replace(
            part,
            begin=cutlass.max(part.begin, (begin - sequence.begin) // n),
            end=cutlass.min(part.end, (end - sequence.begin + n - 1) // n),
        )
        whole_begin = (whole_begin - sequence.begin + n - 1) // n
        whole_end = cutlass.max(whole_end - sequence.begin, 0) // n

        acc_O = cute.make_rmem_tensor(block.mma_O.partition_shape_C((config.tile_m, config.tile_dv)), Float32)
        acc_O.fill(0.0)
        rows = rows_columns(acc_O)
        rescale = cute.make_rmem_tensor(cute.size(rows, mode=[0]), Float32)
        softmax = Softmax.start(cute.size(rescale), values.exponent(self.problem), fused=False)
        cS = Coordinates.of(block.mma_S, block.thread, (config.tile_m, self.keys_of_group))

        for x in (block.k, block.v):
            x.clear_padding()  # what was merged lay there
        for stage in cutlass.range_constexpr(config.stages - 1):
            self._copy(block, keys, sequence, seen, seen.begin + stage, block.first_slot + stage)
        self._load_q(block, mQ, keys, sequence, part)
        self._publish()
        cute.arch.sync_threads()
        of_q = self._queries(block)

        slot = Int32(0)
        for tile in cutlass.range(seen.begin, seen.end, unroll=1):
            cute.arch.cp_async_wait_group(config.stages - 2)
            self._sync_group(block)
            masked = (tile < whole_begin) | (tile >= whole_end)
            here = block.first_slot + slot
            if cutlass.const_expr(self.problem.masks_all):
                self._poison(block, here)
            elif cutlass.const_expr(self.problem.masked):
                if masked:
                    self._poison(block, here)
            before = block.first_slot + (slot + config.stages - 1) % config.stages
            self._copy(block, keys, sequence, seen, tile + config.stages - 1, before)

            acc_S = self._scores(block, of_q, here)
            origin = (row_first, sequence.begin + tile * n + block.group * self.keys_of_group)
            Scores(cS, values, self.problem).apply_rules(acc_S, origin, masked)
            softmax.step(rows_columns(acc_S), rescale)
            scale_rows(rows, rescale)
            self._add(block, acc_S, acc_O, here)
            slot = (slot + 1) % config.stages

        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # what is merged lies over K and V, and the next Q over this one
        self._share(block, rows, softmax)
        cute.arch.sync_threads()
        self._finish(block, outputs, values, keys, workspace, where)
        cute.arch.sync_threads()

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
    def _share(self, block: CacheBlock, rows: cute.Tensor, softmax: Softmax):
        """A group's O, and each row's maximum and sum, to shared memory."""
        config = self.config
        identity = cute.make_identity_tensor((config.tile_m, config.tile_dv))
        cO = rows_columns(block.mma_O.get_slice(block.thread).partition_C(identity))
        for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
            total = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=THREADS_PER_ROW)
            row = cO[r, 0][0]
            if cO[0, 0][1] == 0:
                block.merged_rows[block.group, row, 0] = softmax.row_max[r]
                block.merged_rows[block.group, row, 1] = total
            for c in cutlass.range_constexpr(0, cute.size(rows, mode=[1]), 2):
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0], pair[1] = rows[r, c], rows[r, c + 1]
                where = cute.local_tile(block.merged_o[block.group, row, None], (2,), (cO[r, c][1] // 2,))
                cute.autovec_copy(pair, cute.make_tensor(where.iterator.align(8), pair.layout))

    @cute.jit
    def _finish(
        self,
        block: CacheBlock,
        outputs: Outputs,
        values: Values,
        keys: CachedKeys,
        workspace: Workspace,
        where: cutlass.Constexpr[tuple],
    ):
        """What the groups found, merged: to the outputs if it is all of the walk, else to the workspace; and if all other parts
        are there, these, merged."""
        config, exponent = self.config, values.exponent(self.problem)
        sequence, part, stretches = where
        places = places_of(keys, sequence, part, stretches)
        pieces = self.problem.head_dim_v // PIECE
        exist = cutlass.min(sequence.queries * keys.packed - part.row_tile * config.tile_m, config.tile_m)
        thread = cute.arch.thread_idx()[0]
        for n in cutlass.range(thread, exist * pieces, config.threads, unroll=1):
            row, piece = n // pieces, n % pieces
            row_max, row_sum, o = _nothing()
            for group in cutlass.range_constexpr(config.key_warps):
                more = _row(block.merged_o, block.merged_rows, (group, row), piece)
                row_max, row_sum = _merge(o, row_max, row_sum, more, exponent)
            if places.parts == 1:
                self._store(outputs, values, keys, sequence, part, (row, piece), (row_max, row_sum, o))
            else:
                place = places.of(places.number)
                _piece(workspace.o, (place, row), piece).store(o.load())
                if piece == 0:
                    workspace.of_rows[place, row, 0] = row_max
                    workspace.of_rows[place, row, 1] = row_sum
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
                for n in cutlass.range(thread, exist * pieces, config.threads, unroll=1):
                    row, piece = n // pieces, n % pieces
                    row_max, row_sum, o = _nothing()
                    for first in cutlass.range(0, places.parts, AT_ONCE, unroll=1):
                        many = []
                        for j in cutlass.range_constexpr(AT_ONCE):  # past the last one that one again, without weight
                            i = cutlass.min(first + j, places.parts - 1)
                            more = _row(workspace.o, workspace.of_rows, (places.of(i), row), piece)
                            many.append((*more, first + j < places.parts))
                        for found_max, found_sum, found_o, counts in many:
                            found_max = found_max if counts else -Float32.inf
                            row_max, row_sum = _merge(o, row_max, row_sum, (found_max, found_sum, found_o), exponent)
                    self._store(outputs, values, keys, sequence, part, (row, piece), (row_max, row_sum, o))

    @cute.jit
    def _store(self, outputs: Outputs, values: Values, keys: CachedKeys, sequence: Sequence, part: WalkPart, where, found):
        """Some columns of a row of O, and its log-sum-exp, of all keys."""
        (row, piece), (row_max, row_sum, o) = where, found
        r = part.row_tile * self.config.tile_m + row
        query, head = divided(r, keys.packed)
        head += part.head_kv * keys.packed
        sink = None if outputs.sinks is None else outputs.sinks[head]
        normalize, lse = finished(row_max, row_sum, values.exponent(self.problem), sink)
        into = _piece(outputs.o[sequence.element, sequence.first + query, head, None], (), piece)
        into.store((o.load() * normalize).to(into.element_type))
        if cutlass.const_expr(outputs.lse is not None):
            if piece == 0:
                outputs.lse[sequence.element, head, sequence.first + query] = lse


def _nothing():
    """A row that has seen no key: maximum, sum, and columns of O."""
    o = cute.make_rmem_tensor(PIECE, Float32)
    o.fill(0.0)
    return Float32(-Float32.inf), Float32(0.0), o


def _piece(m: cute.Tensor, where: tuple, piece) -> cute.Tensor:
    """Where PIECE columns of a row of ``(…, columns)`` are."""
    row = m[(*where, None)] if where else m
    begin = cute.local_tile(row, (PIECE,), (piece,)).iterator
    return cute.make_tensor(begin.align(PIECE * row.element_type.width // 8), cute.make_layout(PIECE))


def _row(o: cute.Tensor, of_rows: cute.Tensor, where: tuple, piece):
    """``(maximum, sum, columns of O)`` of a partial row."""
    held = cute.make_rmem_tensor(PIECE, Float32)
    cute.autovec_copy(_piece(o, where, piece), held)
    return of_rows[(*where, 0)], of_rows[(*where, 1)], held


@cute.jit
def _merge(o: cute.Tensor, row_max, row_sum, more, exponent):
    """A partial row of more keys to ``o`` in place; returns the maximum and the sum of both."""
    max_of_more, sum_of_more, o_of_more = more
    new = cute.arch.fmax(row_max, max_of_more)
    anchor = Float32(0.0) if new == -Float32.inf else new  # −inf − −inf would make a NaN
    weight, weight_of_more = (cute.math.exp2((x - anchor) * exponent, fastmath=True) for x in (row_max, max_of_more))
    o.store(o.load() * weight + o_of_more.load() * weight_of_more)
    return new, row_sum * weight + sum_of_more * weight_of_more
