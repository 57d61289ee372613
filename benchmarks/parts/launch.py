"""Launches: what one costs the host, and what an empty kernel costs the device.

Host: the calls that queue a memset of one byte through cuda-python (the least there is to queue), an empty kernel, and
a forward kernel on small tensors. Device: a row of empty kernels in a CUDA graph, of one warp each, and with a
configuration's blocks, threads and shared memory.

``how`` ``clock`` is no launch but the clock reader: a thread that counts SM clocks while the global timer runs.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Int64, cute
from cutlass.cute import runtime

from benchmarks.parts.common import fake_vector
from cute_attn import layouts

HOST = "host"
PER_GRAPH = 200  # empty kernels in a row, launched by a CUDA graph so that the host isn't what is timed
SPIN_NS = 100_000


def expects(kernel) -> tuple[str, ...]:
    return ("CS2R",) if kernel.how == "clock" else ()


def function(kernel) -> tuple[Any, tuple]:
    if kernel.how == "clock":
        return _read_clock, (fake_vector(Int64), Int32(0), runtime.make_fake_stream())
    config = kernel.config
    one_warp = kernel.how == "one warp"
    threads = 32 if one_warp else config.threads
    smem = 0 if one_warp else layouts.family(config).smem_bytes(config)
    resident = 1 if one_warp else config.blocks_per_multiprocessor

    @cute.jit
    def empty(sink: cute.Tensor, blocks: Int32, stream):
        _nothing(sink, blocks).launch(
            grid=[blocks, 1, 1],
            block=[threads, 1, 1],
            smem=smem,
            stream=stream,
            min_blocks_per_mp=resident,
            preferred_smem_carveout=100,
        )

    return empty, (fake_vector(Float32), Int32(0), runtime.make_fake_stream())


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    """``size`` ``host``: one call. ``device``: a graph of many. Without a kernel: the least that can be queued."""
    if probe.kernel is None:
        return device.memset(), {"launch": 1}
    config = probe.kernel.config
    blocks = 1 if probe.kernel.how == "one warp" else device.sm_count * config.blocks_per_multiprocessor
    sink = device.sink(32)

    def call() -> None:
        compiled(sink, blocks, device.stream())

    if probe.size == HOST:
        return call, {"launch": 1}
    return device.graph_of(call, PER_GRAPH), {"launch": PER_GRAPH}


@cute.kernel
def _nothing(sink: cute.Tensor, blocks: Int32):
    if blocks < 0:  # never
        sink[0] = Float32(0.0)


@cute.jit
def _read_clock(ticks: cute.Tensor, ns: Int32, stream):
    _spin(ticks, ns).launch(grid=[1, 1, 1], block=[1, 1, 1], stream=stream)


@cute.kernel
def _spin(ticks: cute.Tensor, ns: Int32):
    """``ticks = (SM clocks, nanoseconds)`` of the same stretch, from one step of the global timer to another."""
    before = cute.arch.globaltimer()
    begin = cute.arch.globaltimer()
    while begin == before:
        begin = cute.arch.globaltimer()
    first = cute.arch.clock64()
    now = begin
    while now - begin < Int64(ns):
        now = cute.arch.globaltimer()
    ticks[0] = cute.arch.clock64() - first
    ticks[1] = now - begin
