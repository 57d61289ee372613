"""What the micro-kernels share: their usual arguments, random operands, and how to keep a result alive."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute import runtime


def fake_arguments() -> tuple:
    """Stand-ins for ``(float32 sink, count, stream)``."""
    return (fake_vector(Float32), Int32(0), runtime.make_fake_stream())


def fake_vector(dtype):
    return runtime.make_fake_compact_tensor(dtype, (cute.sym_int(),), assumed_align=16)


def keep(fragments: tuple, sink: cute.Tensor, thread: Int32, threads: int):
    """Write the sum of some fragments, so that whatever made them has to happen."""
    total = Float32(0.0)
    for r in fragments:
        for i in range(cute.size(r)):
            total += r[i].to(Float32)
    sink[cute.arch.block_idx()[0] * threads + thread] = total


def keep_alive(r: cute.Tensor):
    """Let nothing that made a fragment be left out: a store that needs its sum, and whose predicate is never true."""
    total = Float32(0.0)
    for i in range(cute.size(r)):
        total += r[i].to(Float32)
    cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 a; mov.b32 a, 0; setp.eq.f32 p, {$r0}, 0f7149F2CA; @p st.volatile.shared.f32 [a], {$r0}; }",
        read_only_args=[total],
    )


def _hash(i: Int32) -> Int32:
    h = i * Int32(-1640531527)  # 2³² / golden ratio
    return h ^ (h >> 15)


def noise(i: Int32) -> Float32:
    """A number in [−1, 1) that differs from its neighbours' in most bits: random enough to be multiplied. Zeros would
    run cooler, and so faster; numbers from memory would take long to come."""
    return Float32(_hash(i) & 0xFFFF) * (1.0 / 32768.0) - 1.0


@cute.jit
def fill_noise(s: cute.Tensor, thread: Int32, threads: cutlass.Constexpr[int]):
    """Fill shared memory with bf16 numbers of random sign and mantissa in ±[0.5, 1), two at a time in address order."""
    size = cute.cosize(s.layout.outer if isinstance(s.layout, cute.ComposedLayout) else s.layout)
    words = cute.make_tensor(cute.recast_ptr(s.iterator, dtype=Int32), cute.make_layout(size // 2))
    for i in cutlass.range(thread, size // 2, threads, unroll=4):
        words[i] = (_hash(i) & Int32(-0x7F807F81)) | Int32(0x3F003F00)


def fill_registers_noise(r: cute.Tensor):
    """The same for a fragment, other numbers for each thread."""
    for i in range(cute.size(r)):
        r[i] = noise(cute.arch.thread_idx()[0] * cute.size(r) + i).to(r.element_type)


def ramp(r: cute.Tensor, seed: Float32):
    """Fill a fragment with numbers that cost one addition each."""
    for i in range(cute.size(r)):
        r[i] = seed + i / 64.0


def use_bits(r: cute.Tensor, acc: cute.Tensor):
    """Have a 16-bit fragment matter to ``acc[0]``: one operation for every four elements of it or so."""
    words = cute.recast_tensor(r, Int32)
    bits = words[0]
    for i in range(1, cute.size(words)):
        bits = bits ^ words[i]
    acc[0] = acc[0] + Float32(bits & 1)
