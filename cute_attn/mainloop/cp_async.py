"""Forward attention with cp.async copies and mma.sync (Ampere, Ada, consumer Blackwell; it runs on Hopper too).

Every warp copies, multiplies and takes its own rows' softmax. K and V tiles go round a ring of stages: while tile i is
computed, tile i + stages − 1 is on its way, and one barrier a tile both publishes tile i and frees the slot of tile i − 1.
The blocks are as many as there are query tiles; the hardware hands the next one to whichever multiprocessor is free. This
is FlashAttention-2's loop (arXiv:2307.08691) on a deeper ring.

Rows of K and V past the last key that the query tile sees are read as that key instead: a mask hides what they score, and
they weigh 0. So no copy needs a predicate on its row, and a key that no row of the tile sees is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.epilogue import clear_rows_past, converted, store_lse
from cute_attn.layouts.fragments import as_operand_a, rows_columns, transposed
from cute_attn.mainloop.common import Values
from cute_attn.mainloop.guard import any_of, not_finite, poison_keys, used_here
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.walk import KeyTiles, walk
from cute_attn.mainloop.warps import MMA_K, LdmatrixOperand, Stream, WarpKernel, product
from cute_attn.scheduler import Tiles, Work
from cute_attn.softmax import LogSumExp, Softmax, scale_rows


@dataclass(frozen=True)
class QueryTile:
    """The rows a block computes and the key tiles they see: Q, K and V on their way to shared memory, K and V there,
    ``(tile_n, columns, stage)``, both products and their operands, and what they accumulate into."""

    row_first: Int32
    keys: KeyTiles
    values: Values
    cS: Coordinates
    copies: tuple[Stream, Stream, Stream]
    sK: cute.Tensor
    sV: cute.Tensor
    q: LdmatrixOperand
    k: LdmatrixOperand
    v: LdmatrixOperand
    mma_S: cute.TiledMma
    mma_O: cute.TiledMma
    acc_O: cute.Tensor
    rescale: cute.Tensor  # (rows): the factor that a step asks of O
    softmax: Softmax


class Forward(WarpKernel):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.careful = problem.masked  # whether a second pass takes care of keys that aren't finite (guard.py)
        # Whole tiles look for no maximum. float16 has no room for weights above 1, and what a function makes of scores may hide
        # any key, as may a list of tiles.
        self.anchored = config.dtype == "bfloat16" and not problem.expression
        self.one_loop = problem.unequal or problem.masks_all
        # Where no other block computes meanwhile, the first scores begin once some columns of Q and K are there, and don't wait
        # for values: in so many parts of columns, 0 if they do.
        alone = config.blocks_per_multiprocessor == 1 and not self.one_loop
        self.first_parts = config.tile_d // self.lay.copies(config)["in", "Q"].tile[1] if alone else 0

    @cute.jit
    def launch(self, mQ, mK, mV, mO, mLSE, values: Values, tiles: Tiles, blocks: Int32, stream):
        """Launch a block for each query tile; ``blocks``, what the GPU holds at once, is the hardware's business here."""
        if cutlass.const_expr(self.config.tile_d > 64):  # narrower ones lose more by other registers than they gain
            tiles = tiles.divided_by_products()
        self.kernel(mQ, mK, mV, mO, mLSE, values, tiles).launch(
            grid=[tiles.count(), 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,  # per cent; left out, the DSL asks a GPU that need not be there
        )

    @cute.kernel
    def kernel(self, mQ, mK, mV, mO, mLSE, values: Values, tiles: Tiles):
        tiles.one(partial(self._query_tile, mQ, mK, mV, mO, mLSE, values))

    @cute.jit
    def _query_tile(self, mQ, mK, mV, mO, mLSE, values: Values, work: Work):
        """The block's tile."""
        config, lay = self.config, self.lay
        thread = cute.arch.thread_idx()[0]
        values = values.of(work)
        keys = KeyTiles.of(values, self.problem, work.block, config)
        if cutlass.const_expr(self.anchored):
            keys = keys.after_a_seen_key(values, self.problem, work.block, config)
        row_first = work.block * config.tile_m

        sQ, sK, sV, sO = self._shared()
        q = self.stream("Q", work.q.rows(mQ, work.head), sQ, self.problem.head_dim)
        k = self.stream("K", work.k.rows(mK, work.head_kv), sK, self.problem.head_dim)
        v = self.stream("V", work.k.rows(mV, work.head_kv), sV, self.problem.head_dim_v)
        mma_S, mma_O = lay.tiled_mma("S", config), lay.tiled_mma("O", config)
        acc_O = cute.make_rmem_tensor(mma_O.partition_shape_C((config.tile_m, config.tile_dv)), Float32)
        acc_O.fill(0.0)  # of a tile that sees no key
        rows = rows_columns(acc_O)
        rescale = cute.make_rmem_tensor(cute.size(rows, mode=[0]), Float32)
        softmax = Softmax.start(cute.size(rescale), values.exponent(self.problem), fused=False)
        cS = Coordinates.of(mma_S, thread, (config.tile_m, config.tile_n))
        cO = Coordinates.of(mma_O, thread, (config.tile_m, config.tile_dv))

        if keys.count > 0:
            operands = (
                self._operand("Q", mma_S.partition_shape_A((config.tile_m, MMA_K)), sQ),
                self._operand("K", mma_S.partition_shape_B((config.tile_n, MMA_K)), sK),
                self._operand("V", mma_O.partition_shape_B((config.tile_dv, MMA_K)), transposed(sV)),
            )
            # V's padding only reaches columns of O that are not stored; but all of them are looked at, where that is done.
            for x in (q, k, v) if cutlass.const_expr(self.careful or self.anchored) else (q, k):
                x.clear_padding()
            results = mma_S, mma_O, acc_O, rescale, softmax
            tile = QueryTile(row_first, keys, values, cS, (q, k, v), sK, sV, *operands, *results)
            if cutlass.const_expr(self.first_parts > 0):
                self._copy_first(tile)
            else:
                self._copy_q(tile)
            self._attend(tile, again=False)
            if cutlass.const_expr(self.careful or self.anchored):
                failed = not_finite(acc_O)
                if cutlass.const_expr(self.anchored):
                    softmax.note_growth()
                    failed = failed | (softmax.grown[0] != 0)
                if any_of(failed, 0, config.threads):
                    self._attend(tile, again=True)

        if cutlass.const_expr(self.problem.has_unused("q")):
            clear_rows_past(values.seqlen_q, row_first, cO.thread, rows, softmax)
        lse = LogSumExp.like(rescale)
        softmax.finish(rescale, lse, lay.element(config), values.sink(work), values.kept_scale)
        scale_rows(rows, rescale)
        store_lse(mLSE, lse, cO.thread, row_first, work)
        self._store_o(acc_O, sO, work.q.stored.rows(mO, work.head), row_first)

    @cute.jit
    def _attend(self, tile: QueryTile, again: cutlass.Constexpr[bool]):
        """All key tiles, from the last to the first, once Q is on its way, and, in parts, the first of them; ``again`` in one
        loop."""
        keys, first_parts = tile.keys, 0 if again else self.first_parts
        tile.acc_O.fill(0.0)
        tile.softmax.reset()
        for slot in cutlass.range_constexpr(min(first_parts, 1), self.config.stages - 1):
            self._copy_pair(tile, keys.place(slot), slot)
        step = partial(self._step, tile, again)
        slot = Int32(0)
        if cutlass.const_expr(again):
            for i in cutlass.range(keys.count, unroll=1):
                slot = step(slot, (keys.place(i), True))
        else:
            # For the last tile and those that a right edge cuts.
            if cutlass.const_expr(not self.one_loop):
                slot = step(slot, (keys.place(0), keys.last_is_masked()), first_parts)
            # The steps after whole tiles rescale l.
            after = tile.softmax.note_growth if cutlass.const_expr(self.anchored and self.problem.bounded_left) else None
            walk(step, slot, keys, self.problem, last=self.one_loop, around_whole=(None, after))

    # ---- setup -----------------------------------------------------------------------------------------------------

    def _shared(self):
        """Q ``(tile_m, tile_d)``, K and V ``(tile_n, tile_d, stage)``, and O, which lies over Q."""
        smem, config = cutlass.memory.SmemAllocator(), self.config
        tensor = partial(self.tensor, smem)
        if config.tile_d >= config.tile_dv:
            sQ = tensor("Q")
            sO = self.over("O", sQ)
        else:
            sO = tensor("O")
            sQ = self.over("Q", sO)
        return sQ, tensor("K"), tensor("V"), sO

    def _operand(self, name: str, shape, s: cute.Tensor) -> LdmatrixOperand:
        return LdmatrixOperand.of(self.lay.load_operand(name, self.config), s, shape, cute.arch.thread_idx()[0])

    # ---- copies ----------------------------------------------------------------------------------------------------

    def _copy_q(self, tile: QueryTile, part=None):
        """Start copying the block's queries, or a part of their columns."""
        tile.copies[0].start(tile.row_first, tile.values.seqlen_q, part=part)

    @cute.jit
    def _copy_first(self, tile: QueryTile):
        """Start copying the block's queries and its first key tile, in the order in which they are needed: a group for each
        part of Q's and K's columns, and one for V."""
        (_, k, v), keys = tile.copies, tile.keys
        first = keys.first_key(keys.place(0), self.config.tile_n)
        for part in cutlass.range_constexpr(self.first_parts):
            self._copy_q(tile, part)
            k.start(first, keys.end, (0,), part)
            cute.arch.cp_async_commit_group()
        v.start(first, keys.end, (0,))
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _copy_pair(self, tile: QueryTile, n, slot):
        """Start copying the key tile of K and V at place ``n``, if there is one, to a slot; one group either way."""
        keys = tile.keys
        if keys.exists(n):
            first = keys.first_key(n, self.config.tile_n)
            for x in tile.copies[1:]:
                x.start(first, keys.end, (slot,))
        cute.arch.cp_async_commit_group()

    # ---- one key tile ----------------------------------------------------------------------------------------------

    @cute.jit
    def _step(self, tile: QueryTile, again: cutlass.Constexpr[bool], slot: Int32, where, parts: cutlass.Constexpr[int] = 0):
        """Scores, softmax and P·V of the key tile at place ``n``, while the one ``stages − 1`` after it is on its way. One that
        comes in ``parts`` of Q's and K's columns, and V behind them, is taken part by part. Returns the next slot."""
        n, masked = where
        stages, acc_O = self.config.stages, tile.acc_O
        cute.arch.cp_async_wait_group(stages - 2 + parts)
        cute.arch.sync_threads()  # the tile has arrived for every thread; every thread is done with the slot of the one before
        if cutlass.const_expr(self.careful and again):
            threads = used_here(cute.arch.thread_idx()[0]), self.config.threads
            poison_keys(tile.sK[None, None, slot], tile.sV[None, None, slot], threads)
            cute.arch.sync_threads()
        before = (slot + stages - 1) % stages
        self._copy_pair(tile, tile.keys.later(n, stages - 1), before)

        acc_S = cute.make_rmem_tensor(tile.mma_S.partition_shape_C((self.config.tile_m, self.config.tile_n)), Float32)
        acc_S.fill(0.0)
        q, k, v = tile.q, tile.k, tile.v
        steps = self.config.tile_d // MMA_K // max(parts, 1)
        for i in cutlass.range_constexpr(max(parts, 1)):
            if cutlass.const_expr(i > 0):
                self._wait_for_part(parts - i)
            product(tile.mma_S, acc_S, (i + 1) * steps, q.load, partial(k.load, slot=(slot,)), i * steps)

        origin = (tile.row_first, tile.keys.first_key(n, self.config.tile_n))
        scores = Scores(tile.cS, tile.values, self.problem, unrolls=False)
        scores.apply_rules(acc_S, origin, masked)
        if cutlass.const_expr(self.anchored and masked is False):
            tile.softmax.anchored_step(rows_columns(acc_S))
        else:
            hold = tile.keys.is_anchored(n) if cutlass.const_expr(self.anchored and again) else None
            tile.softmax.step(rows_columns(acc_S), tile.rescale, hold)
            scale_rows(rows_columns(acc_O), tile.rescale)
        P = acc_S
        if cutlass.const_expr(self.problem.dropout):
            P = converted(acc_S, v.fragment.element_type)
            scores.drop(P, origin)
        p = as_operand_a(P)

        def rounded(step):  # just in time: frees two registers for each it takes
            return converted(p[None, None, step], v.fragment.element_type)

        if cutlass.const_expr(parts > 0):
            self._wait_for_part(0)
        product(tile.mma_O, acc_O, self.config.tile_n // MMA_K, rounded, partial(v.load, slot=(slot,)))
        return (slot + 1) % stages

    def _wait_for_part(self, later: int):
        """Until a part of the first key tile is there for every thread, behind which so many come ``later``, and the tiles that
        are on their way."""
        cute.arch.cp_async_wait_group(self.config.stages - 1 + later)
        cute.arch.sync_threads()

    # ---- epilogue --------------------------------------------------------------------------------------------------

    @cute.jit
    def _store_o(self, acc_O: cute.Tensor, sO: cute.Tensor, mO: cute.Tensor, row_first: Int32):
        """Registers → shared memory → global memory."""
        cute.arch.sync_threads()  # O lies over Q, which other warps may still read
        self.to_shared(self.lay.store_accumulator(self.config), acc_O, sO)
        cute.arch.sync_threads()
        self.to_global("O", sO, mO, row_first, self.problem.head_dim_v)
