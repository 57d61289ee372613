"""Global → shared memory: plain loads, cp.async or TMA, K's tiles in the layout that a configuration ships.

As many blocks as the GPU holds at once walk over the tiles of a tensor ``(rows, heads, head_dim)`` as attention has
it, heads next to each other; every stage is kept in flight. Each tile is waited for and one element of it is read by
each thread, as little as makes its arrival matter. Two sizes of tensor: one the L2 cache can't hold, one it can.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, cute, pipeline
from cutlass.cute import runtime
from cutlass.cute.nvgpu import cpasync

from benchmarks.parts.common import fake_vector
from benchmarks.parts.shapes import WIDTH
from cute_attn import layouts
from cute_attn.layouts.base import WARP

TENSOR_BYTES = {"memory": 512 << 20, "L2": 16 << 20}
BYTES_PER_LAUNCH = 4 << 30
ROUNDS = 12  # a block's tiles come in multiples of it, so that any number of stages up to 4 divides them
EXPECTS = {"plain": ("LDG", "STS", "LDS"), "cp_async": ("LDGSTS", "LDS"), "tma": ("UTMALDG", "LDS")}


def expects(kernel) -> tuple[str, ...]:
    """Instructions that the loop must hold."""
    return EXPECTS[kernel.how]


def function(kernel) -> tuple[Any, tuple]:
    """``(mX (rows, heads, head_dim), sink, blocks, rounds, stream)`` and stand-ins for them."""
    kind = {"plain": Plain, "cp_async": CpAsync, "tma": Tma}[kernel.how](kernel.config)

    @cute.jit
    def copies(mX: cute.Tensor, sink: cute.Tensor, blocks: Int32, rounds: Int32, stream):
        kind.launch(cute.make_tensor(mX.iterator, cute.select(mX.layout, mode=[0, 2, 1])), sink, blocks, rounds, stream)

    columns = kernel.config.tile_d
    mX = runtime.make_fake_compact_tensor(
        BFloat16, (cute.sym_int(), WIDTH // columns, columns), stride_order=(2, 1, 0), assumed_align=16
    )
    return copies, (mX, fake_vector(Float32), Int32(0), Int32(0), runtime.make_fake_stream())


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    """One launch, and the bytes it brings."""
    config = probe.kernel.config
    heads = WIDTH // config.tile_d
    x = device.random(TENSOR_BYTES[probe.size] // 2).view(-1, heads, config.tile_d)
    tile_bytes = config.tile_n * config.tile_d * 2
    blocks = device.sm_count * config.blocks_per_multiprocessor
    rounds = max(BYTES_PER_LAUNCH // (tile_bytes * blocks) // ROUNDS, 1) * ROUNDS
    sink = device.sink(blocks * config.threads)
    kind = "copy" if probe.size == "memory" else "l2"
    return lambda: compiled(x, sink, blocks, rounds, device.stream()), {kind: blocks * rounds * tile_bytes}


class _Copies:
    """Which tile is whose: block b of B takes tiles b, b + B, … of K, heads first, and starts over at the end."""

    def __init__(self, config):
        self.config, self.lay = config, layouts.family(config)
        self.tile = self.lay.tile("K", config)

    def _tile(self, m: cute.Tensor, at: Int32):
        """Tile ``at``: ``(tile_n, head_dim)`` of global memory."""
        heads = m.shape[2]
        return cute.local_tile(m[None, None, at % heads], self.tile, (at // heads, 0))

    @cute.jit
    def _after(self, m: cute.Tensor, at: Int32) -> Int32:
        """The block's next tile. There are more tiles than blocks, so one subtraction wraps; a division would be slow
        enough to show where tiles come from the L2 cache."""
        tiles = m.shape[0] // self.tile[0] * m.shape[2]
        at = at + cute.arch.grid_dim()[0]
        return at - tiles if at >= tiles else at

    @cute.jit
    def _touch(self, s: cute.Tensor, slot, thread: Int32) -> Float32:
        """One element of a slot: a row of its own for each thread."""
        return s[thread % self.tile[0], 0, slot].to(Float32)

    @cute.jit
    def _finish(self, total: Float32, sink: cute.Tensor, threads: cutlass.Constexpr[int]):
        sink[cute.arch.block_idx()[0] * threads + cute.arch.thread_idx()[0]] = total


class Tma(_Copies):
    """One warp asks for tiles, one waits for them."""

    @cute.jit
    def launch(self, m: cute.Tensor, sink: cute.Tensor, blocks: Int32, rounds: Int32, stream):
        slot = cute.select(self.lay.smem_layout("K", self.config), mode=[0, 1])
        atom, coordinates = cpasync.make_tiled_tma_atom(self.lay.copy_in("K", self.config), m, slot, self.tile)
        self.kernel(atom, coordinates, sink, rounds).launch(
            grid=[blocks, 1, 1], block=[2 * WARP, 1, 1], stream=stream, min_blocks_per_mp=1
        )

    @cute.kernel
    def kernel(self, atom: cute.CopyAtom, m: cute.Tensor, sink: cute.Tensor, rounds: Int32):
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()
        layout = lay.smem_layout("K", config)
        s = smem.allocate_tensor(lay.element(config), layout.outer, lay.SMEM_ALIGN, layout.inner)
        pipe = pipeline.PipelineTmaAsync.create(
            num_stages=config.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
            tx_count=lay.slot_bytes("K", config),
            barrier_storage=smem.allocate_array(cutlass.Int64, 2 * config.stages),
            defer_sync=True,
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, config.stages)
            at = Int32(cute.arch.block_idx()[0])
            for _ in cutlass.range(rounds, unroll=1):
                tXsX, tXgX = cpasync.tma_partition(
                    atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(self._tile(m, at), 0, 2)
                )
                at = self._after(m, at)
                pipe.producer_acquire(state)
                cute.copy(atom, tXgX, tXsX[None, state.index], tma_bar_ptr=pipe.producer_get_barrier(state))
                state.advance()
        else:
            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, config.stages)
            total = Float32(0.0)
            for _ in cutlass.range(rounds, unroll=1):
                pipe.consumer_wait(state)
                total += self._touch(s, state.index, cute.arch.thread_idx()[0])
                cute.arch.sync_warp()
                pipe.consumer_release(state)
                state.advance()
            self._finish(total, sink, 2 * WARP)


class _ByThreads(_Copies):
    """All threads of a block copy, 16 bytes each."""

    @cute.jit
    def launch(self, m: cute.Tensor, sink: cute.Tensor, blocks: Int32, rounds: Int32, stream):
        self.kernel(m, sink, rounds).launch(
            grid=[blocks, 1, 1],
            block=[self.config.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,
        )

    def _shared(self) -> cute.Tensor:
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()
        return smem.allocate_tensor(lay.element(config), lay.smem_layout("K", config), lay.SMEM_ALIGN)


class CpAsync(_ByThreads):
    """A group of cp.async for each stage; the oldest is waited for, read and started anew."""

    @cute.kernel
    def kernel(self, m: cute.Tensor, sink: cute.Tensor, rounds: Int32):
        stages, thread = self.config.stages, cute.arch.thread_idx()[0]
        copy = self.lay.copy_in("K", self.config)
        part = copy.get_slice(thread)
        s = self._shared()
        tXsX = part.partition_D(s)
        at = Int32(cute.arch.block_idx()[0])
        for i in cutlass.range_constexpr(stages):
            cute.copy(copy, part.partition_S(self._tile(m, at)), tXsX[None, None, None, i])
            cute.arch.cp_async_commit_group()
            at = self._after(m, at)
        total = Float32(0.0)
        slot = Int32(0)
        for i in cutlass.range(rounds, unroll=1):
            cute.arch.cp_async_wait_group(stages - 1)
            cute.arch.sync_threads()
            total += self._touch(s, slot, thread)
            cute.arch.sync_threads()
            if i + stages < rounds:
                cute.copy(copy, part.partition_S(self._tile(m, at)), tXsX[None, None, None, slot])
            cute.arch.cp_async_commit_group()
            at = self._after(m, at)
            slot = (slot + 1) % stages
        self._finish(total, sink, self.config.threads)


class Plain(_ByThreads):
    """Loads into registers, as many tiles as there are stages at once, then stores to shared memory."""

    @cute.kernel
    def kernel(self, m: cute.Tensor, sink: cute.Tensor, rounds: Int32):
        stages, thread = self.config.stages, cute.arch.thread_idx()[0]
        who_copies_what = self.lay.copy_in("K", self.config)
        atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.lay.element(self.config), num_bits_per_copy=128)
        copy = cute.make_tiled_copy(atom, who_copies_what.layout_tv_tiled, who_copies_what.tiler_mn)
        part = copy.get_slice(thread)
        s = self._shared()
        tXsX = part.partition_D(s)
        pieces = cute.make_rmem_tensor(tXsX.shape, s.element_type)
        total = Float32(0.0)
        at = Int32(cute.arch.block_idx()[0])
        for _ in cutlass.range(rounds // stages, unroll=1):
            for slot in cutlass.range_constexpr(stages):
                cute.copy(copy, part.partition_S(self._tile(m, at)), pieces[None, None, None, slot])
                at = self._after(m, at)
            cute.arch.sync_threads()
            for slot in cutlass.range_constexpr(stages):
                cute.copy(copy, pieces[None, None, None, slot], tXsX[None, None, None, slot])
            cute.arch.sync_threads()
            for slot in cutlass.range_constexpr(stages):
                total += self._touch(s, slot, thread)
        self._finish(total, sink, self.config.threads)
