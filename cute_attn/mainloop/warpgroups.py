"""What the kernels of ``tma_wgmma`` share: operands as TMA sees them, groups of warpgroup MMAs in flight, set-up, and the walk
of a block that owns keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup

from cute_attn import layouts
from cute_attn.arithmetic import of_first_lane
from cute_attn.epilogue import clear_rows_past, converted, store_vectors, store_zeros
from cute_attn.layouts.base import WARP
from cute_attn.layouts.fragments import as_operand_a, rows_columns
from cute_attn.layouts.tma import ROWS_PER_WARPGROUP, WARPGROUP
from cute_attn.mainloop.common import Gradients, Inputs, Rows, Values
from cute_attn.mainloop.guard import UnmarkedRows, any_of, copy_carefully, hide_keys
from cute_attn.mainloop.scores import Coordinates
from cute_attn.mainloop.walk import KeyTiles, ListedKeys, QueryTiles
from cute_attn.mainloop.work_queue import DrawnAhead
from cute_attn.scheduler import Work
from cute_attn.sequences import Span

ENDLESS = 1 << 30  # rows
NONE_DONE = (0, 0)  # by a persistent block: key tiles, query tiles
AROUND = 1 << 33  # elements of 16 bits: ENDLESS · AROUND of them are 2⁶⁴ bytes, which is once around all addresses


def with_an_end_for_each(m: cute.Tensor) -> cute.Tensor:
    """Packed rows ``(rows, columns, heads, 1)`` so that TMA ends at a sequence's end, which it can do at a tensor's only: it
    reads zeros there and writes nothing.

    It has 2³⁰ rows, of which a sequence of n takes the last n; a dimension more, of the same stride, moves them to where the
    sequence is, and another, of 2³⁰ times a stride that together with 2³⁰ rows makes 2⁶⁴ bytes, takes the 2³⁰ rows back.
    (As Triton's ragged TMA does, ``triton/tools/ragged_tma.py``.)
    """
    row, column, head, _ = m.stride
    shape = (ENDLESS, m.shape[1], m.shape[2], ENDLESS, ENDLESS + 1)
    return cute.make_tensor(m.iterator, cute.make_layout(shape, stride=(row, column, head, row, cutlass.Int64(AROUND) - row)))


@dataclass(frozen=True)
class TmaOperand:
    """One tensor in global memory as TMA sees it: the copy atom, and the tensor of its coordinates (s, d, h, b); of ragged
    sequences, :func:`with_an_end_for_each`."""

    atom: cute.CopyAtom
    m: cute.Tensor

    def tiles(self, s: cute.Tensor, span: Span, head, row=0):
        """The tiles of one head from ``row`` of a sequence on, and the slots in shared memory: ``(copy, tile)`` and ``(copy,
        slot)``."""
        if span.first is None:
            g = cute.domain_offset((row, 0), self.m[None, None, head, span.batch])
        else:
            whole = self.m[None, None, head, span.first + span.length, ENDLESS]
            g = cute.domain_offset((ENDLESS - span.length + row, 0), whole)
        g = cute.local_tile(g, cute.product_each(s.shape)[:2], (None, 0))
        tXsX, tXgX = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2)
        )
        return tXgX, tXsX


def key_tile(operand: TmaOperand, tXgX: cute.Tensor, s: cute.Tensor, work: Work, keys: KeyTiles | ListedKeys, n):
    """What to copy of the key tile at a place: of ``tXgX``, the tiles from the first key on, or, of a list, from any block."""
    if isinstance(keys, ListedKeys):
        return operand.tiles(s, work.k, work.head_kv, keys.first_key(n))[0][None, 0]
    return tXgX[None, keys.tile(n)]


@cute.jit
def copy_row_values(source: cute.Tensor, into: cute.Tensor, barrier):
    """Start copying a float32 of each of a tile's rows to shared memory; ``barrier`` counts its bytes."""
    atom = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32, num_bits_per_copy=32 * cute.size(into))
    with cute.arch.elect_one():
        cute.copy(atom, source, into, mbar_ptr=barrier)


def of_columns(mma: cute.TiledMma, thread, sRow: cute.Tensor) -> cute.Tensor:
    """A value of each query in shared memory, for the columns of a thread's scores (keys, queries)."""
    queries = cute.size(sRow)
    wide = cute.make_tensor(sRow.iterator, cute.make_layout((ROWS_PER_WARPGROUP, queries), stride=(0, 1)))
    return rows_columns(mma.get_slice(thread).partition_C(wide))[0, None]


def rounded_operand(acc: cute.Tensor, dtype, out: cute.Tensor | None = None) -> cute.Tensor:
    """An accumulator as an A operand in ``dtype``, one MMA's worth at a time so that conversions pair up; in registers of its
    own, ``out``, where these are given, else perhaps in the accumulator's."""
    a = as_operand_a(acc)
    if acc.element_type is dtype and out is None:
        return a
    out = cute.make_rmem_tensor(a.shape, dtype) if out is None else out
    for k in range(cute.size(a, mode=[2])):
        out[None, None, k].store(a[None, None, k].load().to(dtype))
    return out


class InFlight:
    """The groups of warpgroup MMAs a warpgroup has issued and not waited for, in order, by name; known at compile time.

    Groups end in the order they were issued, so waiting for one waits for those before it too.
    """

    def __init__(self, *names: str):
        self.names = list(names)

    def issued(self, name: str):
        self.names.append(name)

    def wait(self, name: str):
        """Until the named group has ended; nothing if it was never issued or is already waited for."""
        if name in self.names:
            after = len(self.names) - 1 - self.names.index(name)
            warpgroup.wait_group(after)
            self.names = self.names[len(self.names) - after :] if after else []


class Kernel:
    """The kernel of one (problem, config): what all of them need to set up and to multiply."""

    def __init__(self, problem, config):
        self.problem, self.config = problem, config
        self.lay = layouts.family(config)
        self.warpgroups = self.lay.warpgroups(config)
        self.arrivals = WARP if config.every_lane_arrives else 1  # of a warp at a pipeline's barrier

    def first_barrier(self, use: str) -> int:
        """The first of the named barriers that the layouts count for a use, in their order."""
        counted = self.lay.barriers(self.config)
        return sum(list(counted.values())[: list(counted).index(use)])

    @property
    def epilogue_barrier(self) -> int:
        return self.first_barrier("epilogues")

    @property
    def element(self):
        return self.lay.element(self.config)

    def operand(self, name: str, m, copy) -> TmaOperand:
        """A tensor in global memory as ``copy`` (the layouts' ``copy_in`` or ``copy_out``) moves it."""
        lay, config = self.lay, self.config
        m = with_an_end_for_each(m) if self.problem.ragged else m
        slot = cute.select(lay.smem_layout(name, config), mode=[0, 1])
        return TmaOperand(*cpasync.make_tiled_tma_atom(copy(name, config), m, slot, lay.tile(name, config)))

    def input_operands(self, inputs: Inputs, prefix: str = "") -> tuple[TmaOperand, ...]:
        """Q, K, V and dO of the backward pass; ``prefix`` is of their names in the layouts."""
        named = (("Q", inputs.q), ("K", inputs.k), ("V", inputs.v), ("dO", inputs.do))
        return tuple(self.operand(prefix + name, m, self.lay.copy_in) for name, m in named)

    def tensor(self, smem, name: str, times: int = 1):
        """Shared memory of an operand, or so many ``times`` that."""
        layout = self.lay.smem_layout(name, self.config, times)
        return smem.allocate_tensor(self.element, layout.outer, self.lay.SMEM_ALIGN, layout.inner)

    def over(self, name: str, other: cute.Tensor):
        """An operand in the shared memory of another."""
        layout = self.lay.smem_layout(name, self.config)
        place = other.iterator.align(self.lay.SMEM_ALIGN)
        return cute.make_tensor(cute.recast_ptr(place, layout.inner, dtype=self.element), layout.outer)

    def floats(self, smem, *shape):
        """Shared memory of float32."""
        return smem.allocate_tensor(Float32, cute.make_layout(shape), 128)

    def hidden_keys(self, smem, *shape):
        """Shared memory for which keys are hidden (``guard.py``), where some may be."""
        return smem.allocate_tensor(cutlass.Int8, cute.make_layout(shape), 16) if self.problem.masked else None

    def pipe(self, smem, stages: int, warps: int, bytes: int):
        """A pipeline whose stages each bring ``bytes``, which ``warps`` read."""
        pipe = pipeline.PipelineTmaAsync.create(
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, warps * self.arrivals),
            tx_count=bytes,
            barrier_storage=smem.allocate_array(cutlass.Int64, 2 * stages),
            defer_sync=True,
        )
        return pipe if self.arrivals == 1 else replace(pipe, is_signaling_thread=cutlass.Boolean(True))

    def emptying(self, stages: int, done) -> pipeline.PipelineState:
        """A consumer's state of a pipeline of which so many stages have been released."""
        return pipeline.PipelineState(stages, Int32(done), Int32(done % stages), Int32(done // stages % 2))

    def filling(self, stages: int, done) -> pipeline.PipelineState:
        """A producer's, of which so many have been filled."""
        return pipeline.PipelineState(stages, Int32(done), Int32(done % stages), Int32(1 - done // stages % 2))

    def copy(self, operand: TmaOperand, source: cute.Tensor, slots: cute.Tensor, pipe: pipeline.PipelineTmaAsync, state):
        """One warp: start copying a tile to a pipeline's stage, which has been acquired."""
        cute.copy(operand.atom, source, slots[None, state.index], tma_bar_ptr=pipe.producer_get_barrier(state))

    def acquire_for_threads(self, pipe: pipeline.PipelineTmaAsync, state):
        """Wait until a stage is free that a warp's threads will fill, not TMA: no bytes are expected."""
        pipe.sync_object_empty.wait(state.index, state.phase)

    def publish_by_threads(self, pipe: pipeline.PipelineTmaAsync, state):
        """Hand on a stage that a warp's threads have filled."""
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(pipe.producer_get_barrier(state))

    def gemm(self, mma: cute.TiledMma, acc, tA, tB, accumulate: bool, steps=None, first=None):
        """Issue ``acc (+)= A·B``, or those of its ``steps`` of 16, as one group of warpgroup MMAs; the caller waits. ``first``
        are the MMA and the operand A of the first steps, where these are in registers."""
        warpgroup.fence()
        self.issue(mma, acc, tA, tB, accumulate, steps, first)
        warpgroup.commit_group()

    def issue(self, mma: cute.TiledMma, acc, tA, tB, accumulate: bool, steps=None, first=None):
        """The same, neither fenced nor a group."""
        held = 0 if first is None else cute.size(first[1], mode=[2])
        for k in range(cute.size(tA, mode=[2])) if steps is None else steps:
            of, a = first if k < held else (mma, tA)
            atom = cute.make_mma_atom(of.op)
            atom.set(warpgroup.Field.ACCUMULATE, accumulate)
            cute.gemm(atom, acc, a[None, None, k], tB[None, None, k], acc)
            accumulate = True

    def first_columns(self, role: str) -> cute.Tensor | None:
        """Registers for a thread's part of as many columns of a product's operand A as the layouts say."""
        steps = self.lay.columns_in_registers(role, self.config) // 16
        return cute.make_rmem_tensor(cute.make_layout(((2, 2, 2), 1, steps)), self.element) if steps else None

    def load_first_columns(self, role: str, operand: str, rA: cute.Tensor | None, s: cute.Tensor):
        """A warpgroup: bring them from shared memory."""
        if rA is not None:
            part = self.lay.load_operand(f"r{role}", operand, self.config).get_slice(cute.arch.thread_idx()[0] % WARPGROUP)
            source, into = part.partition_S(s), part.retile(rA)
            for k in range(cute.size(rA, mode=[2])):
                cute.copy(part, source[None, None, k], into[None, None, k])

    def scores(self, role: str, columns: int, tA, tB, started=None, rA=None):
        """Issue a product of two operands in shared memory, but for A's first columns where there is ``rA``, added to what has
        ``started``, if anything; the caller waits."""
        acc = self.registers(role, columns) if started is None else started
        first = None if rA is None else (self.lay.tiled_mma(f"r{role}", self.config), rA)
        self.gemm(self.lay.tiled_mma(role, self.config), acc, tA, tB, accumulate=started is not None, first=first)
        return acc

    def accumulator(self, role: str, columns: int):
        """64 rows of zeros."""
        acc = self.registers(role, columns)
        acc.fill(0.0)
        return acc

    def registers(self, role: str, columns: int):
        """Those of a product of 64 rows."""
        mma = self.lay.tiled_mma(role, self.config)
        return cute.make_rmem_tensor(mma.get_slice(0).partition_shape_C((ROWS_PER_WARPGROUP, columns)), Float32)

    def hand_over_pipe(self, smem, stages: int, warps: int, consumers: int | None = None):
        """A pipeline from ``warps`` warps to as many others, or to ``consumers`` of them; see :meth:`arrive`."""
        consumers = warps if consumers is None else consumers
        producer, consumer = (pipeline.CooperativeGroup(pipeline.Agent.Thread, n * self.arrivals) for n in (warps, consumers))
        return pipeline.PipelineAsync.create(
            num_stages=stages,
            producer_group=producer,
            consumer_group=consumer,
            barrier_storage=smem.allocate_array(cutlass.Int64, 2 * stages),
            defer_sync=True,
        )

    @cute.jit
    def arrive(self, arrival: cutlass.Constexpr, state):
        """``arrival`` (the commit or the release of :meth:`hand_over_pipe`) for a warp whose lanes each wrote or read a part of
        what it guards."""
        if cutlass.const_expr(self.arrivals > 1):
            arrival(state)
        else:
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                arrival(state)

    def launched(self, tiles, blocks, draws: bool):
        """``(tiles, blocks)`` to launch where blocks are persistent, and draw tickets or not."""
        if draws:
            return tiles.in_small_groups(blocks), cutlass.min(tiles.count(), blocks)
        return tiles.launched(blocks, long=False)

    def lead(
        self,
        queue,
        tiles,
        ticket,
        state,
        part,
        alone=None,
        in_order: bool = False,
        counted: bool = False,
        header=None,
        draws_ahead: bool = False,
    ):
        """The warp that finds a persistent block's tiles: its ``part`` of each, from ``state`` on, and what it does ``alone``,
        while others compute. One thread draws a ``ticket`` for each but, unless tiles are to begin ``in_order``, the first;
        None: they come in rounds. ``counted``: those of ragged ones that have rows in use, and no others. ``header``: see
        :meth:`WorkQueue.hand_out`. With ``draws_ahead`` a ticket is drawn when ``part`` says, which is given ``ahead``."""
        first, following = cute.arch.block_idx()[0] if tiles.at_once is None else tiles.position(Int32(0)), tiles.position
        if ticket is not None:
            skipped = 0 if in_order else tiles.blocks()
            following = lambda _: skipped + of_first_lane(ticket)  # noqa: E731
            if in_order:
                first = self._first_drawn(tiles, following, first)
            if draws_ahead:
                drawn = DrawnAhead.by(partial(following, None))
                part, following = partial(part, ahead=drawn.draw), drawn.taken
        if counted:
            queue.lead_counted(tiles, first, following, part, state)
        else:
            queue.lead(tiles, first, following, part, state, alone, header)

    @cute.jit
    def _first_drawn(self, tiles, following: cutlass.Constexpr, first):
        """A block's first ticket, if it takes any."""
        if cutlass.const_expr(tiles.at_once is None) or cute.arch.block_idx()[0] < tiles.at_once:
            first = following(0)
        return first

    @cute.jit
    def store(self, copy: cute.TiledCopy, acc, operand: TmaOperand, s: cute.Tensor, group, slot, where):
        """Computing warpgroup ``group``: its accumulator by ``copy`` to a slot of shared memory, from there to global memory
        by one TMA store; the caller waits."""
        block, head, span = where
        thread = cute.arch.thread_idx()[0] % WARPGROUP
        part = copy.get_slice(thread)
        cute.copy(copy, part.retile(converted(acc, s.element_type)), part.partition_D(s[None, None, slot]))
        cute.arch.fence_view_async_shared()
        self.gather(group)
        if thread < WARP:
            tXgX, tXsX = operand.tiles(s, span.stored, head)
            cute.copy(operand.atom, tXsX[None, slot], tXgX[None, block])
            cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def by_care(self, care, usual: cutlass.Constexpr, carefully: cutlass.Constexpr):
        """``carefully()`` where care is asked for (``guard.py``), which nobody can where that is None, else ``usual()``."""
        if cutlass.const_expr(care is None):
            usual()
        elif care:
            carefully()
        else:
            usual()

    @cute.jit
    def clear_unused(self, role: cutlass.Constexpr, shape, side: cutlass.Constexpr, length, block, acc):
        """Zeros for the rows of an accumulator of 64 that their sequence doesn't have, where they are written all the same."""
        if cutlass.const_expr(self.problem.has_unused(side)):
            where = Coordinates.of(self.lay.tiled_mma(role, self.config), cute.arch.thread_idx()[0] % WARPGROUP, shape)
            clear_rows_past(length, block * ROWS_PER_WARPGROUP, where.thread, rows_columns(acc))

    def store_rows(self, role: str, acc, m: cute.Tensor, span: Span, head, block):
        """A computing warpgroup: an accumulator of 64 rows, the ``block``-th of a sequence, to global memory by the threads
        that hold it. Nobody waits for that, and it takes no shared memory."""
        into, thread = span.stored.rows(m, head), cute.arch.thread_idx()[0] % WARPGROUP
        shape = ROWS_PER_WARPGROUP, self.lay.mma(role, self.config).tile[1]
        where = Coordinates.of(self.lay.tiled_mma(role, self.config), thread, shape).thread
        store_vectors(into, into.shape[0], block * ROWS_PER_WARPGROUP, where, rows_columns(acc))

    def wait_for_store(self, group):
        """Until the warpgroup's last store has read its shared memory, for all its threads."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        self.gather(group)

    def gather(self, group):
        """All threads of a computing warpgroup."""
        cute.arch.barrier(barrier_id=self.epilogue_barrier + group, number_of_threads=WARPGROUP)

    def group(self):
        """Which of the computing warpgroups this is."""
        return cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARPGROUP - 1)

    def release_rows(self, pipe: pipeline.PipelineTmaAsync, state, met: bool = False):
        """Release a stage with a value of each row, which lanes read by themselves while only one of them releases. Where all
        of a block's have ``met`` since, that orders them too."""
        if self.arrivals == 1 and not met:
            cute.arch.sync_warp()
        pipe.consumer_release(state)

    def stage_before(self, state):
        """The stage before; enough of its state to release it."""
        return pipeline.PipelineState(
            self.config.stages, state.count, (state.index + self.config.stages - 1) % self.config.stages, state.phase
        )


@dataclass(frozen=True)
class TmaOperands:
    """The tensors that TMA copies for the backward pass. A gradient that is not asked for is ``None``; one that leaves from
    registers is a plain tensor, or not here."""

    q: TmaOperand
    k: TmaOperand
    v: TmaOperand
    do: TmaOperand
    dk: TmaOperand | cute.Tensor | None = None
    dv: TmaOperand | cute.Tensor | None = None


@dataclass(frozen=True)
class KeyPipelines:
    """K and V have one stage each, Q (with the rows' log-sum-exp) and dO (with their delta) several. P's, if there is one, is
    from one computing warpgroup to another."""

    k: pipeline.PipelineTmaAsync
    v: pipeline.PipelineTmaAsync
    q: pipeline.PipelineTmaAsync
    do: pipeline.PipelineTmaAsync
    work: pipeline.PipelineAsync
    p: pipeline.PipelineAsync | None = None


class KeyBlocks(Kernel):
    """A kernel of the backward pass each of whose blocks owns a key tile, or shares it with the others of its cluster, and
    walks over query tiles."""

    skips_unseen = False  # whether keys that no query sees aren't copied
    queries_first = False  # whether a tile's first queries come before its keys, whose memory is free later

    def input_pipes(self, smem, warps: int, slots: int) -> tuple[pipeline.PipelineTmaAsync, ...]:
        """Of K and V, so many ``slots`` at once, each for ``warps``; of Q and dO for all that compute."""
        lay, config = self.lay, self.config
        row_bytes = config.tile_m * lay.ACCUMULATOR_BYTES
        keys = (self.pipe(smem, 1, warps, slots * lay.slot_bytes(name, config)) for name in ("K", "V"))
        bytes_of = (lay.slot_bytes(name, config) + row_bytes for name in ("Q", "dO"))
        return *keys, *(self.pipe(smem, config.stages, config.mma_warps, size) for size in bytes_of)

    def query_heads(self, work: Work, heads_per_kv):
        """``(work, members)``: the tile, with the first query head that this block takes, and how many there are."""
        members = heads_per_kv // self.config.head_blocks
        first = work.head_kv * heads_per_kv
        if self.config.head_blocks > 1:
            first += cute.arch.block_in_cluster_idx()[0] * members
        return replace(work, head=first), members

    @cute.jit
    def key_tile(
        self, values: Values, heads_per_kv, part: cutlass.Constexpr, done, work: Work, ahead: cutlass.Constexpr = None
    ):
        """A warp's part of one tile. Returns how many key tiles and query tiles the block has had, ``done`` and this one. If
        not None, ``ahead`` is what the warp that copies Q is to do before its last query tile."""
        values, where = values.of(work), self.query_heads(work, heads_per_kv)
        part(values, where, done) if ahead is None else part(values, where, done, ahead)
        visited = QueryTiles.of(values, self.problem, work.block, self.config)
        keys = cutlass.min(visited.count, 1) if cutlass.const_expr(self.skips_unseen) else 1
        return done[0] + keys, done[1] + visited.count * visited.members(where[1])

    @cute.jit
    def clear_keys(self, gradients: Gradients, work: Work):
        """One warp: dK and dV of a tile without a row in use."""
        for m, columns in ((gradients.mdK, self.config.tile_d), (gradients.mdV, self.config.tile_dv)):
            if cutlass.const_expr(m is not None):
                store_zeros(work.k.stored.rows(m, work.head), work.block, (self.config.tile_n, columns))

    def copy_k_q(self, operands, shared, plain: Inputs | None, rows: Rows, care, values: Values, where, done, ahead=None):
        """One warp: K, and Q with the rows' log-sum-exp. ``plain`` and ``care`` are for careful copies (``guard.py``)."""
        keys, queries = (operands.k, shared.k, shared.pipes.k), (operands.q, shared.q, shared.pipes.q)
        careful = None if plain is None else (plain.q, rows.lse_raw, care)
        self.copy_tiles(keys, queries, (rows.lse_raw, shared.lse), careful, values, where, done, shared.entries, ahead)

    def copy_v_do(self, operands, shared, plain: Inputs | None, rows: Rows, care, values: Values, where, done):
        """One warp: V, and dO with the rows' delta."""
        keys, queries = (operands.v, shared.v, shared.pipes.v), (operands.do, shared.do, shared.pipes.do)
        careful = None if plain is None else (plain.do, rows.lse_raw, care)
        self.copy_tiles(keys, queries, (rows.delta, shared.delta), careful, values, where, done)

    @cute.jit
    def copy_tiles(
        self,
        keys,
        queries,
        row_values,
        careful,
        values: Values,
        where,
        done,
        entries=None,
        ahead: cutlass.Constexpr = None,
    ):
        """One warp: the key tile of one operand (K or V), then the query tiles of another (Q or dO) with a value of each row.

        Each of ``keys`` and ``queries`` is (operand, shared memory, pipeline); ``row_values`` is (global, shared) memory.
        ``careful`` is None, or (Q or dO in global memory, the log-sum-exp that marks rows, whether there are such); ``where``
        is what :meth:`query_heads` says of the block, and ``done`` how many key tiles and query tiles it has had before. What a
        list says of each tile goes to shared memory, too, to those ``entries``, if any, for whoever computes: they would wait
        for it, since the warps that add dQ acquire, which empties the L1 cache. ``ahead()`` comes before the last query tile.
        """
        k, sK, _ = keys
        slots = cute.size(sK, mode=[2])
        k_state, state = self.filling(1, done[0]), self.filling(self.config.stages, done[1])
        work, _ = where
        visited = QueryTiles.of(values, self.problem, work.block, self.config)
        tKgK, tKsK = k.tiles(sK, work.k, work.head_kv)
        copy_keys = partial(self._copy_keys, keys, tKgK, tKsK, work.block * slots, k_state)
        later = copy_keys if self.queries_first else None
        if cutlass.const_expr(self.queries_first):
            self._ask_for_keys(k, tKgK, work.block * slots, slots)
            if cutlass.const_expr(not self.skips_unseen):
                keys_first = visited.count == 0
                if cutlass.const_expr(careful is not None):
                    keys_first = keys_first | careful[2]
                if keys_first:
                    copy_keys()
        elif cutlass.const_expr(not self.skips_unseen):  # noqa: SIM114
            copy_keys()
        elif visited.count > 0:
            copy_keys()
        care = None if cutlass.const_expr(careful is None) else careful[2]
        if cutlass.const_expr(ahead is not None):
            at_once = visited.count == 0
            if cutlass.const_expr(care is not None):
                at_once = at_once | care
            if at_once:
                ahead()
        of_queries = queries, row_values, visited, where, state, entries
        usual, carefully = partial(self._copy_queries, later, ahead), partial(self._copy_queries_carefully, careful)
        self.by_care(care, partial(usual, *of_queries), partial(carefully, *of_queries))

    @cute.jit
    def _ask_for_keys(self, k, tKgK, first, slots: cutlass.Constexpr[int]):
        """A key tile's memory is free no sooner than the tile before is done with: it comes to the L2 cache meanwhile."""
        with cute.arch.elect_one():
            for w in cutlass.range_constexpr(slots):
                cute.prefetch(k.atom, tKgK[None, first + w])

    @cute.jit
    def _copy_keys(self, keys, tKgK, tKsK, first, state):
        k, _, pipe = keys
        pipe.producer_acquire(state)
        for w in cutlass.range_constexpr(cute.size(tKsK, mode=[1])):
            cute.copy(k.atom, tKgK[None, first + w], tKsK[None, w], tma_bar_ptr=pipe.producer_get_barrier(state))

    @cute.jit
    def _copy_queries(
        self,
        later: cutlass.Constexpr,
        ahead: cutlass.Constexpr,
        queries,
        row_values,
        visited: QueryTiles,
        where,
        state,
        entries,
    ):
        """The tiles that are ``visited``; behind the first, what is to be copied ``later``; before the last, ``ahead()``."""
        (q, sQ, q_pipe), (mRow, sRow), (work, members) = queries, row_values, where
        for member in cutlass.range(visited.members(members), unroll=1):
            of_head = self._queries_of(q, sQ, mRow, work, work.head + member)
            for i in cutlass.range(visited.count, unroll=1):
                m_block, of = visited.tile(i, member, self.problem)
                tQgQ, tQsQ, gRow = of_head
                if cutlass.const_expr(ahead is not None):
                    if (member + 1 == visited.members(members)) & (i + 1 == visited.count):
                        ahead()
                if cutlass.const_expr(self.problem.blocks):
                    tQgQ, tQsQ, gRow = self._queries_of(q, sQ, mRow, work, work.head + of)
                if cutlass.const_expr(entries is None):
                    q_pipe.producer_acquire(state)
                else:
                    self.acquire_for_threads(q_pipe, state)
                    self._write_entry(entries, state, visited.entry(i))
                    q_pipe.sync_object_full.arrive(state.index, q_pipe.producer_mask)
                barrier = q_pipe.producer_get_barrier(state)
                cute.copy(q.atom, tQgQ[None, m_block], tQsQ[None, state.index], tma_bar_ptr=barrier)
                copy_row_values(gRow[None, m_block], sRow[None, state.index], barrier)
                state.advance()
                if cutlass.const_expr(later is not None):
                    if (member == 0) & (i == 0):
                        later()

    @cute.jit
    def _write_entry(self, entries: cute.Tensor, state, entry: Int32):
        """A whole warp: to the stage's place, before it arrives."""
        if cute.arch.lane_idx() == 0:
            entries[state.index] = entry
        cute.arch.sync_warp()

    def _queries_of(self, q, sQ: cute.Tensor, mRow: cute.Tensor, work: Work, head):
        """The query tiles of a head, the slots that they come to, and the tiles of its rows' values."""
        gRow = cute.local_tile(work.q.padded_row_values(mRow, head), (self.config.tile_m,), (None,))
        return *q.tiles(sQ, work.q, head), gRow

    @cute.jit
    def _copy_queries_carefully(self, careful, queries, row_values, visited: QueryTiles, where, state, entries):
        """The same by the warp's threads, with zeros for marked rows."""
        (_, sQ, q_pipe), (mRow, sRow), (work, members) = queries, row_values, where
        mQ, lse_raw, _ = careful
        lane, step = cute.arch.lane_idx(), self.config.tile_m
        for member in cutlass.range(visited.members(members), unroll=1):
            head = work.head + member
            gQ, gRow = work.q.rows(mQ, head), work.q.padded_row_values(mRow, head)
            unmarked = UnmarkedRows(work.q.padded_row_values(lse_raw, head))
            for i in cutlass.range(visited.count, unroll=1):
                m_block, of = visited.tile(i, member, self.problem)
                if cutlass.const_expr(self.problem.blocks):
                    head = work.head + of
                    gQ, gRow = work.q.rows(mQ, head), work.q.padded_row_values(mRow, head)
                    unmarked = UnmarkedRows(work.q.padded_row_values(lse_raw, head))
                first = m_block * step
                self.acquire_for_threads(q_pipe, state)
                into = sQ[None, None, state.index]
                copy_carefully(gQ, into, first, (lane, WARP), unmarked, 0.0)
                for r in cutlass.range(lane, step, WARP, unroll=1):
                    sRow[r, state.index] = gRow[first + r]
                if cutlass.const_expr(entries is not None):
                    self._write_entry(entries, state, visited.entry(i))
                self.publish_by_threads(q_pipe, state)
                state.advance()

    def hide_keys(self, k, v, hidden: cute.Tensor, group):
        """A computing warpgroup looks at its K, V or both in shared memory: see ``guard.py``. Whether it has hidden keys."""
        found = hide_keys(k, v, hidden, (cute.arch.thread_idx()[0] % WARPGROUP, WARPGROUP))
        cute.arch.fence_view_async_shared()
        return any_of(found, self.epilogue_barrier + group, WARPGROUP)
