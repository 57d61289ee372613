"""Tiles that one warp of a block finds and hands to the others, ahead of time.

Where the tiles of a call can't be told by arithmetic alone, each costs a search in global memory. A persistent block would wait
for it before every tile; so a warp that has nothing else to do searches, and puts what it finds into a ring of slots in shared
memory. The others take each tile from there when they come to it; a tile with a negative ``block`` says that there are no more.

Where blocks draw tickets for tiles, one that a block holds and hasn't begun is one that another might have finished: such a
block is given its next tile only once it has asked for it, as late as will do; or a warp that copies draws it when it has asked
for all that the tile before takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cutlass
from cutlass import Boolean, Int32, cute, pipeline

from cute_attn.layouts.base import ROW_PADDING
from cute_attn.layouts.tma import WORK_FIELDS, WORK_SLOTS
from cute_attn.scheduler import Work
from cute_attn.sequences import Span, padded_first


@dataclass(frozen=True)
class WorkQueue:
    """The ring: ``slots`` in shared memory ``(field, slot)``, ``pipe`` between the warp that finds tiles and those that take
    them, ``asked``, of one stage, to the former from the one that asks for tiles where there are tickets, ``arrive`` as a whole
    warp arrives there (:meth:`Kernel.arrive <cute_attn.mainloop.warpgroups.Kernel.arrive>`)."""

    slots: cute.Tensor
    pipe: pipeline.PipelineAsync
    asked: pipeline.PipelineAsync | None
    arrive: cutlass.Constexpr
    numbered: cutlass.Constexpr[bool] = False  # whether tiles say which sequence they are of: heads have 16 bits then
    of_k: cutlass.Constexpr[bool] = False  # tiles of keys; ``ragged``, if of ragged sequences
    ragged: cutlass.Constexpr[bool] = True
    headed: cutlass.Constexpr[bool] = False  # tiles that come with what their lists begin with
    both_ways: cutlass.Constexpr[bool] = False  # tiles of keys that say from which end they walk
    padding: cutlass.Constexpr[int] = ROW_PADDING  # of what is padded

    @staticmethod
    def slots_in(smem, slots: int = WORK_SLOTS) -> cute.Tensor:
        """Shared memory for the slots."""
        return smem.allocate_tensor(Int32, cute.make_layout((WORK_FIELDS, slots)), 16)

    @property
    def size(self) -> int:
        """How many slots there are."""
        return cute.size(self.slots, mode=[1])

    def taker(self) -> Taker:
        """For one of the warps that take tiles."""
        turn = cute.make_rmem_tensor(1, Int32)
        turn.fill(0)
        return Taker(self, turn)

    @cute.jit
    def hand_out(self, tiles: cutlass.Constexpr, state, begin=None, header: cutlass.Constexpr = None):
        """One warp: every tile of this block, and that there are no more. Returns the ring's next state and the position of the
        first tile, with which, as ``begin``, the same tiles are handed out again. ``header(work)`` finds out what a tile's list
        begins with."""
        turn, position, begun = Int32(0), Int32(0), Int32(0)
        first, before, more = Int32(0), Int32(0), Boolean(True)
        while more:
            if cutlass.const_expr(tiles.tickets is None):
                position = tiles.position(turn)
            elif cutlass.const_expr(begin is None):
                if turn > 0:
                    self.asked.consumer_wait(pipeline.PipelineState(1, turn, Int32(0), (turn - 1) % 2))
                position = tiles.tickets.draw(turn == 0, position)
            elif turn == 0:
                position = begin
            else:
                position = tiles.tickets.after(position)
            if turn == 0:
                begun = position
            work, first, before = tiles.seek(position, first, before)
            if cutlass.const_expr(header is not None):
                work = replace(work, header=header(work))
            self.pipe.producer_acquire(state)
            self._write(work, self.slots[None, state.index])
            self.arrive(self.pipe.producer_commit, state)
            state.advance()
            turn += 1
            more = work.exists
        if cutlass.const_expr(tiles.tickets is not None and begin is None):
            tiles.tickets.end()
        return state, begun

    @cute.jit
    def lead(
        self,
        tiles: cutlass.Constexpr,
        first,
        following: cutlass.Constexpr,
        body: cutlass.Constexpr,
        state,
        alone: cutlass.Constexpr = None,
        header: cutlass.Constexpr = None,
    ):
        """One warp, which tells the others of each tile of the block and then takes its own part in it: ``state = body(state,
        work)``. Positions are ``first`` and then ``following(turn)``, up to the last tile of all. With ``alone(work)`` nobody
        is told of tiles of keys without a row in use: the warp does them by itself. ``header``: see :meth:`hand_out`."""
        ring = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.size)
        turn, position = Int32(0), Int32(first)
        while position < tiles.count():
            work = tiles.work(position)
            if cutlass.const_expr(header is not None):
                work = replace(work, header=header(work))
            if cutlass.const_expr(work.exists is None):
                ring = self._tell(work, ring)
                state = body(state, work)
            else:
                told = work.exists
                if cutlass.const_expr(alone is not None):
                    told = told & (work.block * tiles.tile < work.k.length)
                    if work.exists & (told == False):  # noqa: E712
                        alone(work)
                if told:
                    ring = self._tell(work, ring)
                    state = body(state, work)
            turn += 1
            position = following(turn)
        self._tell(None, ring)

    @cute.jit
    def lead_counted(self, tiles: cutlass.Constexpr, first, following: cutlass.Constexpr, body: cutlass.Constexpr, state):
        """The same of ragged tiles, of which those alone count that have rows in use."""
        ring = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.size)
        turn, position = Int32(0), Int32(first)
        sequence, before, more = Int32(0), Int32(0), Boolean(True)
        while more:
            work, sequence, before = tiles.seek(position, sequence, before)
            more = work.exists
            if more:
                ring = self._tell(work, ring)
                state = body(state, work)
                turn += 1
                position = following(turn)
        self._tell(None, ring)

    @cute.jit
    def _tell(self, work: cutlass.Constexpr, state):
        """Of a tile, or, None, that there are no more. Returns the ring's next state."""
        self.pipe.producer_acquire(state)
        slot = self.slots[None, state.index]
        if cutlass.const_expr(work is None):
            slot[0] = Int32(-1)
        else:
            self._write(work, slot)
        self.arrive(self.pipe.producer_commit, state)
        state.advance()
        return state

    @cute.jit
    def ask(self):
        """One warp, once for each tile: the next one is wanted."""
        self.arrive(self.asked.producer_commit, pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1))

    @cute.jit
    def _write(self, work: Work, slot: cute.Tensor):
        held = cute.make_rmem_tensor(WORK_FIELDS, Int32)
        q, k = work.q, work.k
        if cutlass.const_expr(self.of_k and not self.ragged):
            fields = (work.block, work.head, k.batch)
            if cutlass.const_expr(work.header is not None):
                fields = (*fields, *work.header)
            elif cutlass.const_expr(self.both_ways):
                fields = (*fields, work.from_last)
        elif cutlass.const_expr(self.of_k):
            fields = (work.block, work.head, work.sequence, q.first, q.length, k.first, k.length, k.capacity)
        else:
            block = work.block
            if cutlass.const_expr(work.exists is not None):
                block = work.block if work.exists else Int32(-1)
            if cutlass.const_expr(not self.ragged):
                fields = (block, work.head, work.head_kv, q.batch)
                if cutlass.const_expr(work.header is not None):
                    fields = (*fields, *work.header)
            elif cutlass.const_expr(self.numbered):
                heads = work.head | (work.head_kv << 16)
                fields = (block, heads, work.sequence, q.first, q.length, q.capacity, k.first, k.length)
            else:
                fields = (block, work.head, work.head_kv, q.first, q.length, q.capacity, k.first, k.length)
        for i in cutlass.range_constexpr(len(fields)):
            held[i] = fields[i]
        with cute.arch.elect_one():
            cute.autovec_copy(held, slot)


@dataclass(frozen=True)
class DrawnAhead:
    """A ticket that one warp draws while its block is at the tile before, in a register: to draw it and to find its tile takes
    longer than that tile's last steps do, in which its memory becomes free."""

    another: cutlass.Constexpr
    held: cute.Tensor

    @staticmethod
    def by(another: cutlass.Constexpr) -> DrawnAhead:
        """``another()`` draws one."""
        held = cute.make_rmem_tensor(1, Int32)
        held.fill(0)
        return DrawnAhead(another, held)

    def draw(self):
        self.held[0] = self.another()

    def taken(self, turn) -> Int32:
        """The last one."""
        return self.held[0]


@dataclass(frozen=True)
class Taker:
    """One warp's place in the ring: ``turn`` is how many tiles it has taken, in a register."""

    queue: WorkQueue
    turn: cute.Tensor

    @cute.jit
    def each(self, body: cutlass.Constexpr, state):
        """``state = body(state, work)`` for every tile that is handed out; returns the last state. A slot is released after its
        tile, when everything read from it has been used."""
        more = self._wait()
        while more:
            state = body(state, self._work())
            self._release()
            more = self._wait()
        self._release()
        return state

    def _state(self) -> pipeline.PipelineState:
        slots, turn = self.queue.size, self.turn[0]
        return pipeline.PipelineState(slots, turn, turn % slots, turn // slots % 2)

    def _slot(self) -> cute.Tensor:
        return self.queue.slots[None, self.turn[0] % self.queue.size]

    def _wait(self) -> Boolean:
        """For the next tile, if there is one."""
        self.queue.pipe.consumer_wait(self._state())
        return self._slot()[0] >= 0

    def _work(self) -> Work:
        held = cute.make_rmem_tensor(WORK_FIELDS, Int32)
        cute.autovec_copy(self._slot(), held)
        if self.queue.of_k:
            return self._key_tile(*(cute.arch.make_warp_uniform(held[i]) for i in range(WORK_FIELDS)))
        block, head, head_kv, q_first, q_length, q_capacity, k_first, k_length = (held[i] for i in range(WORK_FIELDS))
        if not self.queue.ragged:
            header = tuple(held[i] for i in range(4, WORK_FIELDS)) if self.queue.headed else None
            return Work(block, head, head_kv, Span(q_first), Span(q_first), header=header)
        sequence, padded = None, None
        if self.queue.numbered:
            head, head_kv, sequence = head & 0xFFFF, head >> 16, head_kv
            padded = padded_first(q_first, sequence, self.queue.padding)
        q, k = Span(Int32(0), q_first, q_length, q_capacity, padded), Span(Int32(0), k_first, k_length, k_length)
        return Work(block, head, head_kv, q, k, sequence=sequence)

    def _key_tile(self, block, head, sequence, q_first, q_length, k_first, k_length, k_capacity) -> Work:
        if not self.queue.ragged:
            span = Span(sequence)
            header = (q_first, q_length) if self.queue.headed else None
            from_last = q_first if self.queue.both_ways else None  # listed tiles all walk one way
            return Work(block, head, head, span, span, header=header, from_last=from_last)
        padded = [padded_first(first, sequence, self.queue.padding) for first in (q_first, k_first)]
        q = Span(Int32(0), q_first, q_length, None, padded[0])
        return Work(block, head, head, q, Span(Int32(0), k_first, k_length, k_capacity, padded[1]), sequence=sequence)

    def _release(self):
        self.queue.arrive(self.queue.pipe.consumer_release, self._state())
        self.turn[0] += 1
