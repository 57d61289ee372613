"""The peak of WGMMA and mma.sync: nothing but products, on operands that already lie where they are read.

``how`` is a role and a source. Role ``S`` is Q·Kᵀ, role ``O`` is P·V, each with the tiled MMA, the tile shape and the
shared-memory layouts that a configuration ships. WGMMA reads B from shared memory always and A from shared memory
(``S``) or registers (``O``). mma.sync reads both from registers; source ``shared`` brings them there by ldmatrix before
each step, as the kernels do; source ``registers`` keeps one step's operands there and shows the bare rate.

Operands are random. The accumulators run on for the whole kernel.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warpgroup

from benchmarks.parts.common import fake_arguments, fill_noise, fill_registers_noise, keep
from cute_attn import layouts
from cute_attn.layouts.fragments import transposed

FLOP_PER_LAUNCH_AND_SM = 8 << 30  # more than a millisecond
WARPGROUP = 128


def expects(kernel) -> tuple[str, ...]:
    if kernel.config.mechanism == "tma_wgmma":
        return ("HGMMA",)
    return ("HMMA", "LDSM") if kernel.how.endswith("shared") else ("HMMA",)


def function(kernel) -> tuple[Any, tuple]:
    """``(sink, tiles, stream)``, on as many blocks as the sink has room for, and stand-ins."""
    role, source_is = kernel.how.split()
    config = kernel.config
    if config.mechanism == "tma_wgmma":
        kind: Any = Wgmma(role, config)
    else:
        kind = (MmaSyncShared if source_is == "shared" else MmaSyncRegisters)(role, config)

    @cute.jit
    def products(sink: cute.Tensor, tiles: Int32, stream):
        kind.kernel(sink, tiles).launch(
            grid=[cute.size(sink) // config.mma_threads, 1, 1],
            block=[config.mma_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,
        )

    return products, fake_arguments()


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    """One launch, and its FLOPs: 2 · queries · keys · head_dim a tile."""
    config = probe.kernel.config
    role = probe.kernel.how.split()[0]
    per_tile = 2 * config.tile_m * config.tile_n * (config.tile_d if role == "S" else config.tile_dv)
    tiles = max(FLOP_PER_LAUNCH_AND_SM // per_tile // config.blocks_per_multiprocessor // 2, 1) * 2
    blocks = device.sm_count * config.blocks_per_multiprocessor
    sink = device.sink(blocks * config.mma_threads)
    return lambda: compiled(sink, tiles, device.stream()), {"tensor": blocks * tiles * per_tile}


class Wgmma:
    """A group of WGMMAs for each tile; the next is issued while it runs."""

    def __init__(self, role: str, config):
        self.role, self.config, self.lay = role, config, layouts.family(config)

    @cute.kernel
    def kernel(self, sink: cute.Tensor, tiles: Int32):
        config, lay, threads = self.config, self.lay, self.config.mma_threads
        thread = cute.arch.thread_idx()[0]
        mma = lay.tiled_mma(self.role, config)
        part = mma.get_slice(0)
        smem = cutlass.memory.SmemAllocator()
        if cutlass.const_expr(self.role == "S"):
            sQ, sK = self._tensor(smem, "Q"), self._tensor(smem, "K")
            fill_noise(sQ, thread, threads)
            fill_noise(sK, thread, threads)
            group = cute.arch.make_warp_uniform(thread // WARPGROUP)
            tA = part.make_fragment_A(part.partition_A(sQ[None, None, group]))
            tB = part.make_fragment_B(part.partition_B(sK))
            shape = (lay.ROWS_PER_WARPGROUP, config.tile_n)
        else:
            sV = self._tensor(smem, "V")
            fill_noise(sV, thread, threads)
            tA = cute.make_rmem_tensor(part.partition_shape_A((lay.ROWS_PER_WARPGROUP, config.tile_n)), lay.element(config))
            fill_registers_noise(tA)
            tB = part.make_fragment_B(part.partition_B(transposed(sV)))
            shape = (lay.ROWS_PER_WARPGROUP, config.tile_dv)
        acc = cute.make_rmem_tensor(part.partition_shape_C(shape), Float32)
        acc.fill(0.0)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        atom = cute.make_mma_atom(mma.op)
        atom.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.fence()
        for i in cutlass.range(tiles, unroll=1):
            slot = i % config.stages
            for k in cutlass.range_constexpr(cute.size(tA, mode=[2])):
                cute.gemm(atom, acc, tA[None, None, k], tB[None, None, k, slot], acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
        warpgroup.wait_group(0)
        keep((acc,), sink, thread, threads)

    def _tensor(self, smem, name: str) -> cute.Tensor:
        layout = self.lay.smem_layout(name, self.config)
        return smem.allocate_tensor(self.lay.element(self.config), layout.outer, self.lay.SMEM_ALIGN, layout.inner)


class _MmaSync:
    """Operands in shared memory, and their way to registers by ldmatrix."""

    def __init__(self, role: str, config):
        self.role, self.config, self.lay = role, config, layouts.family(config)
        self.mma_shape = (config.tile_m, config.tile_n if role == "S" else config.tile_dv)

    def _operands(self, thread: Int32):
        """``(mma, copy A, copy B)``; a copy is ``(tiled copy, its source, its target, the fragment)``. P has none."""
        config, lay = self.config, self.lay
        smem = cutlass.memory.SmemAllocator()
        mma = lay.tiled_mma(self.role, config)
        part = mma.get_slice(thread)
        a_name, b_name = ("Q", "K") if self.role == "S" else ("P", "V")
        sB = smem.allocate_tensor(lay.element(config), lay.smem_layout(b_name, config), lay.SMEM_ALIGN)
        fill_noise(sB, thread, config.mma_threads)
        if b_name == "V":
            sB = transposed(sB)
        rB = part.make_fragment_B(part.partition_B(sB[None, None, 0]))
        b = self._copy(b_name, sB, rB, thread)
        if a_name == "P":
            rA = cute.make_rmem_tensor(part.partition_shape_A((config.tile_m, config.tile_n)), lay.element(config))
            fill_registers_noise(rA)
            return mma, (None, None, None, rA), b
        sA = smem.allocate_tensor(lay.element(config), lay.smem_layout(a_name, config), lay.SMEM_ALIGN)
        fill_noise(sA, thread, config.mma_threads)
        return mma, self._copy(a_name, sA, part.make_fragment_A(part.partition_A(sA)), thread), b

    def _copy(self, name: str, s: cute.Tensor, fragment: cute.Tensor, thread: Int32):
        copy = self.lay.load_operand(name, self.config)
        return copy, copy.get_slice(thread).partition_S(s), copy.get_slice(thread).retile(fragment), fragment

    def _accumulator(self, mma: cute.TiledMma) -> cute.Tensor:
        acc = cute.make_rmem_tensor(mma.partition_shape_C(self.mma_shape), Float32)
        acc.fill(0.0)
        return acc


class MmaSyncShared(_MmaSync):
    """ldmatrix before each step, and one barrier a tile, as the kernels have."""

    @cute.kernel
    def kernel(self, sink: cute.Tensor, tiles: Int32):
        config, thread = self.config, cute.arch.thread_idx()[0]
        mma, (copy_a, from_a, into_a, rA), (copy_b, from_b, into_b, rB) = self._operands(thread)
        acc = self._accumulator(mma)
        for i in cutlass.range(tiles, unroll=1):
            cute.arch.sync_threads()  # also keeps the compiler from loading operands once and for all
            slot = i % config.stages
            for k in cutlass.range_constexpr(cute.size(rB, mode=[2])):
                if cutlass.const_expr(copy_a is not None):
                    cute.copy(copy_a, from_a[None, None, k], into_a[None, None, k])
                cute.copy(copy_b, from_b[None, None, k, slot], into_b[None, None, k])
                cute.gemm(mma, acc, rA[None, None, k], rB[None, None, k], acc)
        keep((acc,), sink, thread, config.mma_threads)


class MmaSyncRegisters(_MmaSync):
    """The first step's operands over and over."""

    @cute.kernel
    def kernel(self, sink: cute.Tensor, tiles: Int32):
        thread = cute.arch.thread_idx()[0]
        mma, (copy_a, from_a, into_a, rA), (copy_b, from_b, into_b, rB) = self._operands(thread)
        acc = self._accumulator(mma)
        cute.arch.sync_threads()
        if cutlass.const_expr(copy_a is not None):
            cute.copy(copy_a, from_a[None, None, 0], into_a[None, None, 0])
        cute.copy(copy_b, from_b[None, None, 0, 0], into_b[None, None, 0])
        for _ in cutlass.range(tiles, unroll=1):
            for _ in cutlass.range_constexpr(cute.size(rB, mode=[2])):
                cute.gemm(mma, acc, rA[None, None, 0], rB[None, None, 0], acc)
        keep((acc,), sink, thread, self.config.mma_threads)
