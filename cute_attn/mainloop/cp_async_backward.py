"""Backward attention with cp.async copies and mma.sync: all gradients in one kernel.

A block owns a tile of keys and walks over the query tiles that see any of them, of each query head that shares the keys
(FlashAttention-2, arXiv:2307.08691, algorithm 2). Five products a tile:

    Sᵀ = K·Qᵀ,   dPᵀ = V·dOᵀ,   dV += Pᵀ·dO,   dK += dSᵀ·Q,   dQ = dS·K

The first two are transposed, so that Pᵀ and dSᵀ lie in registers as the A operands that dV and dK take, and only dS goes
through shared memory. It has two slots there, so that a tile's dQ is computed one tile late, after the barrier that the
next tile needs anyway: one barrier a tile publishes Q, dO and dS, and frees the slots of the tile before. Where heads are so
wide that several warps share the columns of dV and dK, P takes the way through shared memory as well, all three
products wait for a second barrier, and dQ isn't late.

dQ is added in float32 to global memory by atomics, in the order of the accumulator's registers, so that a warp's fall on
whole lines; where key tiles take turns, the first stores. Rows past a sequence's end are read as the last one; their
log-sum-exp, or a mask, says that they weigh 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Boolean, Float32, Int32, cute

from cute_attn.epilogue import clear_rows_past, converted, put
from cute_attn.fields import first_stores
from cute_attn.layouts.base import cute_layout
from cute_attn.layouts.fragments import as_operand_a, rows_columns, transposed
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Signals, Values
from cute_attn.mainloop.guard import any_of, clear_marked, hide_keys, known_here, of_keys
from cute_attn.mainloop.scores import Coordinates, Scores
from cute_attn.mainloop.walk import QueryTiles
from cute_attn.mainloop.warps import MMA_K, LdmatrixOperand, Stream, WarpKernel, product
from cute_attn.scheduler import Tiles, Work

WAITER, PASSER = 0, 32  # threads that take turns for their block, where dQ's parts come in a fixed order


@dataclass(frozen=True)
class BlockShared:
    """The operands in shared memory: ``(tile_n, columns)`` for K and V, ``(tile_m, columns, stage)`` for Q and dO,
    ``(tile_n, tile_m, slot)`` for dS, ``(tile_m, stage)`` for a row's values. P, where it is shared, takes the slot that dS
    leaves. They take turns: were a slot known at compile time, each ldmatrix would get a register for its address."""

    k: cute.Tensor
    v: cute.Tensor
    q: cute.Tensor
    do: cute.Tensor
    ds: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    hidden: cute.Tensor | None  # (tile_n): keys that ``guard.py`` hides


@dataclass(frozen=True)
class BackwardOperands:
    """What the five products read from shared memory, named as everywhere: ``tSrK`` is K for the product S."""

    tSrK: LdmatrixOperand
    tSrQ: LdmatrixOperand
    tPrV: LdmatrixOperand
    tPrdO: LdmatrixOperand
    tVrP: LdmatrixOperand | None
    tVrdO: LdmatrixOperand
    tKrdS: LdmatrixOperand | None
    tKrQ: LdmatrixOperand
    tQrdS: LdmatrixOperand
    tQrK: LdmatrixOperand


@dataclass(frozen=True)
class Block:
    """A block's place, what it accumulates, and what it reads and writes."""

    thread: Int32
    work: Work
    visited: QueryTiles
    heads_per_kv: Int32
    values: Values
    gradients: Gradients
    signals: Signals | None
    shared: BlockShared
    q: Stream
    do: Stream
    rows: Rows
    acc_dV: cute.Tensor
    acc_dK: cute.Tensor
    careful: Boolean | None = None  # whether there are marked rows or hidden keys


class Backward(WarpKernel):
    """The kernel of one (problem, config)."""

    def __init__(self, problem, config):
        super().__init__(problem, config)
        self.across = config.mma_warps // config.key_warps  # warps that share the same keys
        self.shares_p = self.lay.p_is_shared(config)
        self.needs_q, self.needs_k, self.needs_v = (name in problem.gradients for name in "qkv")
        self.needs_ds = self.needs_q or self.needs_k
        self.ordered = problem.deterministic and self.needs_q
        self.first_stores = first_stores(problem, config)
        # Whether short key tiles come first. Equal ones of a head come one right behind the other, in large groups of heads.
        self.in_turns = problem.deterministic and problem.unequal and not (bool(problem.ragged) or bool(problem.blocks))

    # ---- host ------------------------------------------------------------------------------------------------------

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values, tiles, blocks, stream):
        """Launch a block for each key tile; ``blocks``, what the GPU holds at once, is the hardware's business here, but where
        key tiles take turns."""
        if cutlass.const_expr(self.in_turns):
            steps = cute.ceil_div(values.seqlen_q, self.config.tile_m) * tiles.heads_per_kv
            tiles = tiles.in_turns(blocks, steps, both_ways=True)
        self.kernel(inputs, rows, gradients, signals, values, tiles).launch(
            grid=[tiles.count(), 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,  # per cent; left out, the DSL asks a GPU that need not be there
        )

    # ---- kernel ----------------------------------------------------------------------------------------------------

    @cute.kernel
    def kernel(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values: Values, tiles: Tiles):
        problem = self.problem
        thread = cute.arch.thread_idx()[0]
        smem = cutlass.memory.SmemAllocator()
        shared = self._shared(smem)
        if cutlass.const_expr(problem.deterministic):
            tiles = replace(tiles, ticket=self._ticket(smem, signals, thread))
        tiles.one(partial(self._key_tile, inputs, rows, gradients, signals, shared, values, tiles.heads_per_kv))

    @cute.jit
    def _key_tile(
        self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, shared: BlockShared, values, heads_per_kv, work
    ):
        """The block's tile."""
        problem, thread = self.problem, cute.arch.thread_idx()[0]
        values = values.of(work)
        visited = QueryTiles.of(values, problem, work.block, self.config)
        k = self.stream("K", work.k.rows(inputs.k, work.head_kv), shared.k, problem.head_dim)
        v = self.stream("V", work.k.rows(inputs.v, work.head_kv), shared.v, problem.head_dim_v)
        me = Block(
            thread,
            work,
            visited,
            heads_per_kv,
            values,
            gradients,
            signals,
            shared,
            self.stream("Q", inputs.q, shared.q, problem.head_dim),
            self.stream("dO", inputs.do, shared.do, problem.head_dim_v),
            rows,
            *(self._accumulator(role) for role in ("dV", "dK")),
        )
        if visited.count > 0:
            self._query_tiles(me, k, v)
        self._store(me)

    def _accumulator(self, role: str) -> cute.Tensor:
        tile = self.lay.tile(role, self.config)
        acc = cute.make_rmem_tensor(self.lay.tiled_mma(role, self.config).partition_shape_C(tile), Float32)
        acc.fill(0.0)
        return acc

    @cute.jit
    def _ticket(self, smem: cutlass.Constexpr, signals: Signals, thread):
        """This block's ticket, for all its threads."""
        place = cute.make_tensor(smem.allocate_array(Int32, 1), cute.make_layout(1))
        if thread == 0:
            place[0] = signals.ticket()
        cute.arch.sync_threads()
        return place[0]

    def _shared(self, smem) -> BlockShared:
        config = self.config

        def floats():
            return smem.allocate_tensor(Float32, cute.make_layout((config.tile_m, config.stages)), 16)

        k, v, q, do, ds = (self.tensor(smem, name) for name in ("K", "V", "Q", "dO", "dS"))
        lse, delta = floats(), floats()
        hidden = None
        if cutlass.const_expr(self.problem.masked):
            hidden = smem.allocate_tensor(cutlass.Int8, cute.make_layout(config.tile_n), 16)
        return BlockShared(k, v, q, do, ds, lse, delta, hidden)

    def _operands(self, me: Block) -> BackwardOperands:
        s, config = me.shared, self.config

        def operand(role, name, letter, tensor, rows):
            mma = self.lay.tiled_mma(role, config)
            shape = mma.partition_shape_A((rows, MMA_K)) if letter == "A" else mma.partition_shape_B((rows, MMA_K))
            return LdmatrixOperand.of(self.lay.load_operand(role, name, config), tensor, shape, me.thread)

        sKt, sQt, sdOt, sdSt = map(transposed, (s.k, s.q, s.do, s.ds))
        return BackwardOperands(
            tSrK=operand("S", "K", "A", s.k, config.tile_n),
            tSrQ=operand("S", "Q", "B", s.q, config.step_m),
            tPrV=operand("dP", "V", "A", s.v, config.tile_n),
            tPrdO=operand("dP", "dO", "B", s.do, config.step_m),
            tVrP=operand("dV", "P", "A", s.ds, config.tile_n) if self.shares_p else None,
            tVrdO=operand("dV", "dO", "B", sdOt, config.tile_dv),
            tKrdS=operand("dK", "dS", "A", s.ds, config.tile_n) if self.shares_p else None,
            tKrQ=operand("dK", "Q", "B", sQt, config.tile_d),
            tQrdS=operand("dQ", "dS", "A", sdSt, config.tile_m),
            tQrK=operand("dQ", "K", "B", sKt, config.tile_d),
        )

    # ---- the walk over query tiles ---------------------------------------------------------------------------------

    @cute.jit
    def _query_tiles(self, me: Block, k: Stream, v: Stream):
        """Every query tile of every head that shares the block's keys. Three loops, so that each knows at compile time whether
        it masks; with care all tiles are the first one's."""
        stages, late_dq = self.config.stages, self.needs_q and not self.shares_p
        operands = self._operands(me)
        for x in (k, v, me.q, me.do):
            x.clear_padding()
        row = me.work.block * self.config.tile_n
        for x in (k, v):
            x.start(row, me.values.seqlen_k)
        if cutlass.const_expr(self.problem.masked):
            cute.arch.cp_async_commit_group()
        for slot in cutlass.range_constexpr(stages - 1):
            self._copy_queries(me, *self._after(me, Int32(0), Int32(0), slot), Int32(slot))
        if cutlass.const_expr(late_dq):
            self._clear_ds(me)
        if cutlass.const_expr(self.problem.masked):
            me = replace(me, careful=self._takes_care(me))
        count = me.visited.count
        whole_begin, whole_end = self._whole(me.visited, me.careful)
        for member in cutlass.range(self._members(me), unroll=1):
            for i in cutlass.range(whole_begin, unroll=1):
                self._step(me, operands, member, i, True)
            if cutlass.const_expr(not self.problem.masks_all):
                for i in cutlass.range(whole_begin, whole_end, unroll=1):
                    self._step(me, operands, member, i, False)
            right_edge_last = self.problem.bounded_right and self.problem.deterministic
            if cutlass.const_expr((self.problem.bounded_left or right_edge_last) and not self.problem.masks_all):
                for i in cutlass.range(whole_end, count, unroll=1):
                    self._step(me, operands, member, i, True)
        if cutlass.const_expr(late_dq):
            self._late_dq(me, operands, Int32(self._members(me)), Int32(0), last=True)
        if cutlass.const_expr(self.ordered):
            cute.arch.sync_threads()  # every thread has added
            self._pass_turn(me, Int32(self._members(me)), Int32(0), 1)

    @cute.jit
    def _takes_care(self, me: Block):
        """Whether the block has marked rows or hidden keys, once K and V are there: before anything else reads them."""
        cute.arch.cp_async_wait_group(self.config.stages - 1)
        cute.arch.sync_threads()
        found = hide_keys(me.shared.k, me.shared.v, me.shared.hidden, (me.thread, self.config.threads))
        return me.signals.care() | any_of(found, 0, self.config.threads)

    @cute.jit
    def _whole(self, visited: QueryTiles, careful):
        """``(begin, end)`` of the tiles that need no mask, in the order they are visited; both are the tiles' count where
        there are none, so that what comes after them is the other edge's, if there is one."""
        whole = visited.whole_end - visited.whole_begin
        if cutlass.const_expr(careful is not None):
            whole = Int32(0) if careful else whole
        begin = visited.whole_begin - visited.begin
        if cutlass.const_expr(self.problem.deterministic and not self.problem.blocks):
            from_last = visited.count - begin - whole
            begin = from_last if visited.from_last is None else begin + visited.from_last * (from_last - begin)
        begin = begin if whole > 0 else visited.count
        return begin, begin + whole

    @cute.jit
    def _clear_ds(self, me: Block):
        """The first tile has none before it: what it computes of it is zeros, and is not added."""
        last = me.shared.ds[None, None, 1]
        part = self.lay.store_accumulator("dS", self.config).get_slice(me.thread).partition_D(last)
        part.fill(0.0)

    @cute.jit
    def _after(self, me: Block, member, i, steps: cutlass.Constexpr[int]):
        """``(member, i)`` of the tile ``steps`` after this one."""
        for _ in cutlass.range_constexpr(steps):
            i += 1
            ends = i == me.visited.count
            member = member + 1 if ends else member
            i = Int32(0) if ends else i
        return member, i

    @cute.jit
    def _before(self, me: Block, member, i, steps: cutlass.Constexpr[int] = 1):
        """``(head, m_block)`` of the tile ``steps`` before this one; of the first, where there is none."""
        for _ in cutlass.range_constexpr(steps):
            wraps = (i == 0) & (member > 0)
            member = member - 1 if wraps else member
            i = me.visited.count if wraps else i
            i = cutlass.max(i - 1, 0)
        return self._tile(me, i, member)

    def _members(self, me: Block):
        """How many times the block walks over its query tiles."""
        return me.visited.members(me.heads_per_kv)

    def _tile(self, me: Block, i, member):
        """``(head, m_block)`` of the i-th tile of a walk."""
        m_block, member = me.visited.tile(i, member, self.problem)
        return me.work.head_kv * me.heads_per_kv + member, m_block

    @cute.jit
    def _copy_queries(self, me: Block, member, i, slot):
        """Start copying a query tile of Q and dO with its rows' values to a slot, if there is such a tile; one group either
        way."""
        config = self.config
        if member < self._members(me):
            head, m_block = self._tile(me, i, member)
            row, end = m_block * config.tile_m, me.values.seqlen_q
            for x in (me.q, me.do):
                x.start(row, end, (slot,), m=me.work.q.rows(x.m, head))
            self._copy_rows(me, head, m_block, slot)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def _copy_rows(self, me: Block, head, m_block, slot):
        """16 bytes a thread of the rows' values: the first threads take the log-sum-exp, the next delta."""
        vectors = self.config.tile_m // 4
        atom = cute.make_copy_atom(
            cute.nvgpu.cpasync.CopyG2SOp(cache_mode=cute.nvgpu.cpasync.LoadCacheMode.GLOBAL), Float32, num_bits_per_copy=128
        )
        for n in cutlass.range_constexpr(2):
            m, s = ((me.rows.lse_raw, me.shared.lse), (me.rows.delta, me.shared.delta))[n]
            if cutlass.const_expr(n == 0 or self.needs_ds):
                place = me.thread - n * vectors
                if (place >= 0) & (place < vectors):
                    source = cute.local_tile(me.work.q.padded_row_values(m, head), (4,), (m_block * vectors + place,))
                    into = cute.local_tile(s[None, slot], (4,), (place,))
                    source, into = (cute.make_tensor(x.iterator.align(16), cute.make_layout(4)) for x in (source, into))
                    cute.copy(atom, source, into)

    # ---- one query tile --------------------------------------------------------------------------------------------

    @cute.jit
    def _step(self, me: Block, operands: BackwardOperands, member, i, masked: cutlass.Constexpr[bool]):
        """One query tile, while the one ``stages − 1`` after it is on its way."""
        config, stages = self.config, self.config.stages
        count = member * me.visited.count + i
        slot = count % stages
        if cutlass.const_expr(stages == 1):
            cute.arch.sync_threads()  # every thread is done with the slot
            self._copy_queries(me, member, i, slot)
        cute.arch.cp_async_wait_group(max(stages - 2, 0))
        if cutlass.const_expr(self.needs_q and not self.shares_p):
            self._late_dq(me, operands, member, i)
        else:
            cute.arch.sync_threads()  # the tile has arrived for every thread; every thread is done with the one before
            self._take_turns(me, member, i, 1)
        if cutlass.const_expr(stages > 1):
            self._copy_queries(me, *self._after(me, member, i, stages - 1), (count + stages - 1) % stages)
        if cutlass.const_expr(masked and self.problem.masked):
            if me.careful:
                tensors = [m[None, None, slot] for m in (me.shared.q, me.shared.do)]
                clear_marked(tensors, me.shared.lse[None, slot], (me.thread, config.threads))
                cute.arch.sync_threads()
        head, m_block = self._tile(me, i, member)
        slots = (slot, count % 2, (count + 1) % 2)
        for part in cutlass.range_constexpr(config.tile_m // config.step_m):
            self._scores(me, operands, head, m_block, part, slots, masked)
        if cutlass.const_expr(self.shares_p):
            self._other_queries(me, operands, head, m_block, slots)

    @cute.jit
    def _scores(self, me: Block, operands: BackwardOperands, head, m_block, part: cutlass.Constexpr[int], slots, masked):
        """P and dS of ``step_m`` queries, and what they add to dV and dK where they stay in registers."""
        config, lay, x = self.config, self.lay, operands
        slot, ds_slot, p_slot = slots
        shape = (config.tile_n, config.step_m)
        S, dP, dV, dK = (lay.tiled_mma(role, config) for role in ("S", "dP", "dV", "dK"))
        acc_S, acc_dP = (cute.make_rmem_tensor(S.partition_shape_C(shape), Float32) for _ in range(2))
        row, values = part * cute.size(x.tSrQ.into, mode=[1]), me.values.of_head(head)
        kept = hidden = ramp = None
        if cutlass.const_expr(self.problem.dropout or self.problem.expression.ramp is not None):
            origin = (me.work.block * config.tile_n, m_block * config.tile_m + part * config.step_m)
            ahead = Scores(Coordinates.of(S, me.thread, shape), values, self.problem, transposed=True)
            ramp = known_here(ahead.ramp_of_rows(origin))
            if cutlass.const_expr(self.problem.dropout):
                kept = ahead.kept(origin)
        acc_S.fill(0.0)
        product(S, acc_S, config.tile_d // MMA_K, x.tSrK.load, partial(x.tSrQ.load, slot=(slot,), row=row))
        scores = Scores(Coordinates.of(S, me.thread, shape), values, self.problem, transposed=True, unrolls=False)
        origin = (me.work.block * config.tile_n, m_block * config.tile_m + part * config.step_m)
        if cutlass.const_expr(masked and self.problem.masked):
            hidden = me.careful, of_keys(S, me.thread, me.shared.hidden, config.step_m)
        scores.apply_rules(acc_S, origin, masked, hidden)
        if cutlass.const_expr(self.needs_ds):
            acc_dP.fill(0.0)
            product(dP, acc_dP, config.tile_dv // MMA_K, x.tPrV.load, partial(x.tPrdO.load, slot=(slot,), row=row))

        lse_raw = self._of_columns(me, me.shared.lse[None, slot], part)
        P = scores.probabilities(acc_S, lse_raw, lay.element(config), origin, kept, ramp)
        if cutlass.const_expr(self.needs_v):
            if cutlass.const_expr(self.shares_p):
                self._share("P", me, P, me.shared.ds[None, None, p_slot], part)
            self._own_queries(dV, me.acc_dV, P, x.tVrdO, slot, part)
        if cutlass.const_expr(self.needs_ds):
            delta = self._of_columns(me, me.shared.delta[None, slot], part)
            scores.gradients(acc_S, acc_dP, delta, lse_raw, origin, kept)
            if cutlass.const_expr(self.needs_q or self.shares_p):
                self._share("dS", me, acc_S, me.shared.ds[None, None, ds_slot], part)
            if cutlass.const_expr(self.needs_k):
                self._own_queries(dK, me.acc_dK, acc_S, x.tKrQ, slot, part)

    def _own_queries(self, mma, acc: cute.Tensor, scores: cute.Tensor, b: LdmatrixOperand, slot, part: int):
        """What the queries whose scores a warp holds add to its dV or dK: Pᵀ or dSᵀ, rounded to the operands' dtype just in
        time, times dO or Q."""
        a = as_operand_a(scores)
        steps = self.config.step_m // MMA_K // self.across
        first = part * steps * self.across + self._column()

        def rounded(k):
            return converted(a[None, None, k], self.lay.element(self.config))

        product(mma, acc, steps, rounded, lambda k: b.load(first + k * self.across, (slot,)))

    @cute.jit
    def _other_queries(self, me: Block, x: BackwardOperands, head, m_block, slots):
        """What those queries add to dV and dK whose scores the other warps with the same keys hold; and dQ."""
        slot, ds_slot, p_slot = slots
        cute.arch.sync_threads()  # P and dS are there
        if cutlass.const_expr(self.needs_v):
            self._add_others("dV", me.acc_dV, partial(x.tVrP.load, slot=(p_slot,)), partial(x.tVrdO.load, slot=(slot,)))
        if cutlass.const_expr(self.needs_k):
            self._add_others("dK", me.acc_dK, partial(x.tKrdS.load, slot=(ds_slot,)), partial(x.tKrQ.load, slot=(slot,)))
        if cutlass.const_expr(self.needs_q):
            self._dq(me, x, head, m_block, ds_slot)

    def _add_others(self, role: str, acc: cute.Tensor, a, b):
        steps = self.config.tile_m // MMA_K // self.across
        for other in range(1, self.across):
            first = (self._column() + other) % self.across

            def load(operand, k, first=first):
                return operand(first + k * self.across)

            product(self.lay.tiled_mma(role, self.config), acc, steps, partial(load, a), partial(load, b))

    def _column(self):
        """A warp's place among those with the same keys."""
        if self.across == 1:
            return 0
        return cute.arch.make_warp_uniform(cute.arch.warp_idx()) // self.config.key_warps

    def _of_columns(self, me: Block, sRow: cute.Tensor, part: int) -> cute.Tensor:
        """A value of each query in shared memory, for the columns of this thread."""
        shape = (self.config.tile_n, self.config.step_m)
        wide = cute.make_tensor(sRow.iterator + part * self.config.step_m, cute.make_layout(shape, stride=(0, 1)))
        return rows_columns(self.lay.tiled_mma("S", self.config).get_slice(me.thread).partition_C(wide))[0, None]

    @cute.jit
    def _share(self, name: cutlass.Constexpr, me: Block, acc: cute.Tensor, s: cute.Tensor, part: cutlass.Constexpr[int]):
        """Pᵀ or dSᵀ of ``step_m`` queries to shared memory."""
        copy = self.lay.store_accumulator(name, self.config).get_slice(me.thread)
        into = copy.partition_D(s)
        source = copy.retile(converted(acc, s.element_type))
        columns = cute.size(source, mode=[2])
        for c in cutlass.range_constexpr(columns):
            cute.copy(copy, source[None, None, c], into[None, None, part * columns + c])

    # ---- dQ --------------------------------------------------------------------------------------------------------

    @cute.jit
    def _late_dq(self, me: Block, operands: BackwardOperands, member, i, last: cutlass.Constexpr[bool] = False):
        """The barrier at the start of a tile, or behind the last one, and the dQ of the tile before it, if there is one."""
        head, m_block = self._before(me, member, i)
        count = member * me.visited.count + i
        cute.arch.sync_threads()  # the tile, and dS of the one before, are there; every thread is done with the one before
        self._take_turns(me, member, i, 2, last)
        self._dq(me, operands, head, m_block, (count + 1) % 2, None if last else count > 0)

    @cute.jit
    def _dq(self, me: Block, x: BackwardOperands, head, m_block, slot, exists=None):
        """Add dQ = dS·K of one tile to global memory, each thread its accumulator, if the tile ``exists``, which isn't asked
        where it surely does."""
        config = self.config
        mma = self.lay.tiled_mma("dQ", config)
        acc = cute.make_rmem_tensor(mma.partition_shape_C((config.tile_m, config.tile_d)), Float32)
        acc.fill(0.0)
        product(mma, acc, config.tile_n // MMA_K, partial(x.tQrdS.load, slot=(slot,)), x.tQrK.load)
        sums = cute_layout(self.lay.sums(config))
        into = me.gradients.mdQ[(None, 0, *self._place(me, head, m_block))].iterator + sums.stride[0] * me.thread
        stored, added = None, exists
        if cutlass.const_expr(self.first_stores):
            stored = me.visited.rank(me.values.of_head(head), self.problem, m_block, config) == 0
            added = stored == False  # noqa: E712
            if cutlass.const_expr(exists is not None):
                stored, added = stored & exists, added & exists
        width = config.add_width
        for n in cutlass.range_constexpr(0, cute.size(acc), width):
            part = into + sums((0, n, 0)), [acc[n + j] for j in range(width)]
            if cutlass.const_expr(self.first_stores):
                put("st.global", *part, stored)
            put("red.relaxed.gpu.global.add", *part, added)  # each atomically, in no order with anything else

    def _place(self, me: Block, head, m_block):
        """A query tile in what is padded."""
        return me.work.q.padded_tile(m_block, self.config.tile_m), head, me.work.q.batch

    @cute.jit
    def _take_turns(self, me: Block, member, i, added: cutlass.Constexpr[int], last: cutlass.Constexpr[bool] = False):
        """Right behind the barrier of a tile: all threads have added to the dQ of the one ``added`` before it, and behind the
        next barrier they may add to its own. One thread says so, one waits, in warps of their own, while the others begin the
        tile's products."""
        if cutlass.const_expr(self.ordered):
            if member * me.visited.count + i >= added:
                self._pass_turn(me, member, i, added)
            if cutlass.const_expr(not last):
                if me.thread == WAITER:
                    head, m_block = self._tile(me, i, member)
                    rank = me.visited.rank(me.values.of_head(head), self.problem, m_block, self.config)
                    me.signals.wait_for_turn(self._place(me, head, m_block), rank)

    @cute.jit
    def _pass_turn(self, me: Block, member, i, added: cutlass.Constexpr[int]):
        """One thread, behind a barrier: all have added to the dQ of the tile ``added`` before this one."""
        if me.thread == PASSER:
            head, m_block = self._before(me, member, i, added)
            me.signals.pass_turn(self._place(me, head, m_block))

    # ---- epilogue --------------------------------------------------------------------------------------------------

    @cute.jit
    def _store(self, me: Block):
        """dK and dV to global memory, by way of the shared memory of K and V."""
        cute.arch.sync_threads()  # every thread has read K and V for the last time
        if cutlass.const_expr(self.needs_k):
            me.acc_dK.store(me.acc_dK.load() * Float32(me.values.scale(self.problem)))
            self._clear("dK", me, me.acc_dK)
            self.to_shared(self.lay.store_accumulator("dK", self.config), me.acc_dK, me.shared.k)
        if cutlass.const_expr(self.needs_v):
            me.values.scale_kept(me.acc_dV)
            self._clear("dV", me, me.acc_dV)
            self.to_shared(self.lay.store_accumulator("dV", self.config), me.acc_dV, me.shared.v)
        cute.arch.sync_threads()
        row, of_keys = me.work.block * self.config.tile_n, partial(me.work.k.stored.rows, head=me.work.head_kv)
        if cutlass.const_expr(self.needs_k):
            self.to_global("dK", me.shared.k, of_keys(me.gradients.mdK), row, self.problem.head_dim)
        if cutlass.const_expr(self.needs_v):
            self.to_global("dV", me.shared.v, of_keys(me.gradients.mdV), row, self.problem.head_dim_v)

    @cute.jit
    def _clear(self, role: cutlass.Constexpr, me: Block, acc: cute.Tensor):
        """Rows that the sequence doesn't have, in what is written."""
        if cutlass.const_expr(self.problem.has_unused("k")):
            mma, tile = self.lay.tiled_mma(role, self.config), self.lay.tile(role, self.config)
            where = rows_columns(mma.get_slice(me.thread).partition_C(cute.make_identity_tensor(tile)))
            clear_rows_past(me.values.seqlen_k, me.work.block * self.config.tile_n, where, rows_columns(acc))
