"""A kernel that reads memory and does nothing else: the rate that serving is measured by. Imports the DSL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
import torch
from cutlass import Int32, cute
from cutlass.cute import runtime

from cute_attn.private import raw_stream

THREADS, BLOCKS, AT_ONCE = 256, 8, 8  # of a block; blocks of a multiprocessor; loads of 16 bytes that a thread has on their way
WORDS = 4


@cute.kernel
def _read(m: Any, sink: Any):
    first, step = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0], cute.arch.grid_dim()[0] * THREADS
    held = cute.make_rmem_tensor((WORDS, AT_ONCE), Int32)
    found = Int32(0)
    for row in cutlass.range(first, m.shape[0], step * AT_ONCE, unroll=1):
        for i in cutlass.range_constexpr(AT_ONCE):
            place = cute.local_tile(m, (1, WORDS), (cutlass.min(row + i * step, m.shape[0] - 1), 0)).iterator.align(16)
            cute.autovec_copy(cute.make_tensor(place, cute.make_layout(WORDS)), held[None, i])
        for i in cutlass.range_constexpr(cute.size(held)):
            found = found ^ held[i]
    if found == 1:  # never: all words are zeros
        sink[0] = found


@cute.jit
def _launch(m: Any, sink: Any, blocks: Int32, stream):
    _read(m, sink).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)


def compile_for(target: str):
    """The function of (words, sink, blocks, stream)."""
    words = runtime.make_fake_tensor(Int32, (cute.sym_int(), WORDS), (WORDS, 1), assumed_align=16)
    sink = runtime.make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    options = f"--enable-tvm-ffi --gpu-arch={target}"
    return cute.compile(_launch, words, sink, Int32(0), runtime.make_fake_stream(), options=options)


def reader(size: int, target: str, multiprocessors: int) -> Callable[[int, int], None]:
    """What reads so many of ``size`` bytes once, from a multiple of as many on, on the current device and its stream."""
    function = compile_for(target)
    words = torch.zeros(size // (4 * WORDS), WORDS, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(count: int, place: int) -> None:
        rows = count // (4 * WORDS)
        first = place % max(len(words) // rows, 1) * rows
        function(words[first : first + rows], sink, BLOCKS * multiprocessors, raw_stream(words.get_device()))

    return read
