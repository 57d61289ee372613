"""Online-softmax steps on registers: ``cute_attn.softmax.Softmax.step`` as the kernels call it, nothing around it.

A step turns a fragment of scores into P in place; the next step takes that P as its scores, so nothing is computed in
vain and nothing can be left out. ``how``: ``step``; ``step, rescale`` also multiplies a fragment of O by the factors
of each step; ``exp2`` takes bare exponentials, which shows what the special-function units really reach.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from benchmarks.parts.common import fake_arguments, fill_registers_noise, keep
from cute_attn import layouts
from cute_attn.layouts.fragments import rows_columns
from cute_attn.softmax import Softmax, scale_rows

EXPONENTIALS_PER_LAUNCH_AND_SM = 32 << 20  # more than a millisecond
SCALE_LOG2 = 0.125
ROWS_PER_THREAD = {"tma_wgmma": lambda config: 2, "cp_async": lambda config: config.tile_m // config.mma_warps // 8}


def expects(kernel) -> tuple[str, ...]:
    return ("MUFU.EX2",) if kernel.how == "exp2" else ("MUFU.EX2", "FADD", "FMNMX")


def function(kernel) -> tuple[Any, tuple]:
    """``(sink, steps, stream)``, on as many blocks as the sink has room for, and stand-ins."""
    config = kernel.config
    steps_of = Steps(kernel.how, config)

    @cute.jit
    def softmax(sink: cute.Tensor, steps: Int32, stream):
        steps_of.kernel(sink, steps).launch(
            grid=[cute.size(sink) // config.mma_threads, 1, 1],
            block=[config.mma_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=config.blocks_per_multiprocessor,
            preferred_smem_carveout=100,
        )

    return softmax, fake_arguments()


def exponentials(how: str, config) -> int:
    """That one step of one block takes: a score each, and a factor for each row that a thread holds part of."""
    factors = config.mma_threads * ROWS_PER_THREAD[config.mechanism](config)
    return config.tile_m * config.tile_n + (0 if how == "exp2" else factors)


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    config = probe.kernel.config
    each = exponentials(probe.kernel.how, config)
    blocks = device.sm_count * config.blocks_per_multiprocessor
    steps = max(EXPONENTIALS_PER_LAUNCH_AND_SM // each // config.blocks_per_multiprocessor, 1)
    sink = device.sink(blocks * config.mma_threads)
    return lambda: compiled(sink, steps, device.stream()), {"exp": blocks * steps * each}


class Steps:
    """Fragments of S and O as a configuration's MMAs leave them."""

    def __init__(self, how: str, config):
        self.how, self.config, self.lay = how, config, layouts.family(config)
        self.rows = config.tile_m if config.mechanism == "cp_async" else self.lay.ROWS_PER_WARPGROUP

    @cute.kernel
    def kernel(self, sink: cute.Tensor, steps: Int32):
        config, thread = self.config, cute.arch.thread_idx()[0]
        scores = self._fragment("S", config.tile_n)
        fill_registers_noise(scores)
        rescale = cute.make_rmem_tensor(cute.size(scores, mode=[0]), Float32)
        fused = config.mechanism == "tma_wgmma"  # as its mainloop has it
        softmax = Softmax.start(cute.size(rescale), Float32(SCALE_LOG2), fused)
        if cutlass.const_expr(self.how == "step, rescale"):
            acc_O = self._fragment("O", config.tile_dv)
            fill_registers_noise(acc_O)
            for _ in cutlass.range(steps, unroll=1):
                softmax.step(scores, rescale)
                scale_rows(acc_O, rescale)
            keep((acc_O, scores, softmax.row_sum), sink, thread, config.mma_threads)
        else:
            for _ in cutlass.range(steps, unroll=1):
                if cutlass.const_expr(self.how == "step"):
                    softmax.step(scores, rescale)
                else:
                    scores.store(cute.math.exp2(scores.load() * Float32(-SCALE_LOG2), fastmath=True))
            keep((scores, softmax.row_sum), sink, thread, config.mma_threads)

    def _fragment(self, role: str, columns: int) -> cute.Tensor:
        mma = self.lay.tiled_mma(role, self.config)
        shape = mma.get_slice(0).partition_shape_C((self.rows, columns))
        return rows_columns(cute.make_rmem_tensor(shape, Float32))
