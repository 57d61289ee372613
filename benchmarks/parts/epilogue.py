"""The epilogue alone: O from registers, most often by way of shared memory, to global memory: the kernels' own ``_store_o``.

The forward kernel without loads, products and softmax, on a single key tile, so that its loop over keys does nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.parts import shapes, whole
from benchmarks.parts.stages import EPILOGUE_ONLY

BATCH_FACTOR = 4  # outputs several times the size of the L2 cache, which would take them at its own pace


def expects(kernel) -> tuple[str, ...]:
    # cp_async's blocks store one tile each: there is no loop to find the stores in.
    if kernel.config.mechanism != "tma_wgmma":
        return ()
    return ("STG", "SHFL") if kernel.config.o_from_registers else ("UTMASTG", "STSM")


def function(kernel) -> tuple[Any, tuple]:
    return whole.staged(kernel, EPILOGUE_ONLY)


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    config, case = probe.kernel.config, probe.shape.case()
    case = replace(case, batch=case.batch * BATCH_FACTOR, seqlen_k=config.tile_n)
    return whole.launcher(compiled, config, case, device), {"copy": shapes.output_bytes(case)}
