"""Backward attention with TMA copies and warpgroup MMA (Hopper), for heads wider than 128: two kernels. (One serves long
sequences of some of them: ``tma_wgmma_backward.py``.)

dK and dV of 128 keys and 256 columns would fill a multiprocessor's registers, and with fewer keys a block the float32 sums
of dQ would go to memory too often. So the gradients of keys and of queries have a kernel each (``wide_keys.py``,
``wide_queries.py``), which computes the scores anew: seven products instead of five, but no sums in global memory, nothing to
clear or to cast, and the same bits each time. Blocks of both are persistent, and draw tickets where tiles are unequal: the next
tile's operands come while results leave, straight from registers.
"""

from __future__ import annotations

from dataclasses import replace

import cutlass
from cutlass import cute

from cute_attn.mainloop.common import Gradients, Inputs, Rows, Signals
from cute_attn.mainloop.guard import finite_row
from cute_attn.mainloop.wide_keys import KeyGradients
from cute_attn.mainloop.wide_queries import QueryGradients


class Backward:
    """The kernels of one (problem, config)."""

    def __init__(self, problem, config):
        without = replace(problem, expression=problem.expression.without_partials)  # what captured tensors get is added once
        self.keys = KeyGradients(without, config)
        self.queries = QueryGradients(problem, config)

    @cute.jit
    def launch(self, inputs: Inputs, rows: Rows, gradients: Gradients, signals, values, tiles, blocks, stream):
        """Launch the kernels whose gradients are asked for."""
        if cutlass.const_expr(gradients.mdK is not None or gradients.mdV is not None):
            self.keys.launch(inputs, rows, gradients, signals, values, tiles, blocks, stream)
        elif cutlass.const_expr(self.queries.problem.masked):
            LookAtKeys().launch(inputs.k, signals, stream)
        if cutlass.const_expr(gradients.mdQ is not None):
            self.queries.launch(inputs, rows, gradients, signals, values, tiles.sequences, blocks, stream)


class LookAtKeys:
    """Asks for care where a key is not finite, if no block of :class:`KeyGradients` does."""

    THREADS = 128

    @cute.jit
    def launch(self, mK: cute.Tensor, signals: Signals, stream):
        """A thread a key."""
        keys, _, heads_kv, batch = mK.shape
        blocks = cute.ceil_div(keys, self.THREADS) * heads_kv * batch
        self.kernel(mK, signals).launch(grid=[blocks, 1, 1], block=[self.THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mK: cute.Tensor, signals: Signals):
        keys, _, heads_kv, _ = mK.shape
        blocks = cute.ceil_div(keys, self.THREADS)
        index = cute.arch.block_idx()[0]
        row = index % blocks * self.THREADS + cute.arch.thread_idx()[0]
        if row < keys:
            if not finite_row(mK[None, None, index // blocks % heads_kv, index // blocks // heads_kv], row):
                signals.ask_for_care()
