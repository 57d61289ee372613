"""The forward kernel itself, whole, and with stages left out or done twice: the differences place the time inside it.

Every variant is the mechanism's own ``Forward`` with a few methods replaced, launched like attention. Its results are
wrong on purpose; what is computed is still random numbers in the ranges of attention's, never zeros.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from benchmarks.parts import shapes
from benchmarks.parts.launch import HOST
from benchmarks.parts.stages import VARIANTS, Stages
from cute_attn import forward, rules
from cute_attn.fields import FORWARD, in_order


def expects(kernel) -> tuple[str, ...]:
    stages = VARIANTS[kernel.how]
    wgmma = kernel.config.mechanism == "tma_wgmma"
    found = []
    if stages.loads:
        found.append("UTMALDG" if wgmma else "LDGSTS")
    if stages.products:
        found.append("HGMMA" if wgmma else "HMMA")
    if stages.softmax:
        found.append("MUFU.EX2")
    if stages.epilogue and wgmma:  # the other mechanism's blocks store once, outside of any loop
        found.append("UTMASTG")
    return tuple(found)


def function(kernel) -> tuple[Any, tuple]:
    return staged(kernel, VARIANTS[kernel.how])


def staged(kernel, stages: Stages) -> tuple[Any, tuple]:
    """The forward pass's host function around a mainloop of ``stages``, and its usual stand-ins."""
    mainloop = None  # the mechanism's own
    if stages != Stages():
        module = importlib.import_module(f"benchmarks.parts.whole_{kernel.config.mechanism}")
        mainloop = module.Staged(kernel.problem, kernel.config, stages)
    function = forward.host_function(kernel.problem, kernel.config, mainloop)
    return function, forward.stand_ins(FORWARD, kernel.problem, kernel.config)


def prepare(probe, compiled, device) -> tuple[Any, dict[str, float]]:
    """One call of a case of the attention benchmark; as a launch, one on tensors so small that the host counts."""
    config = probe.kernel.config
    if probe.size == HOST:
        return launcher(compiled, config, _small(probe.shape.case()), device), {"launch": 1}
    case = probe.shape.case(probe.seqlen)
    call = launcher(compiled, config, case, device)
    return call, VARIANTS[probe.kernel.how].work(shapes.work(case, config))


def _small(case):
    return replace(case, batch=1, heads=4, heads_kv=4, seqlen_q=128, seqlen_k=128)


def launcher(compiled, config, case, device) -> Any:
    """A callable that launches a forward kernel on random tensors of a case."""
    q, k, v = device.inputs(case)
    scale_log2, scale_by_cap = rules.score_scales(case.head_dim**-0.5, 0.0)
    out = device.like(q)
    blocks = device.sm_count * config.blocks_per_multiprocessor
    values = {"q": q, "k": k, "v": v, "out": out, "scale_log2": scale_log2, "scale_by_cap": scale_by_cap, "blocks": blocks}
    values |= dict.fromkeys(("count", "left", "right", "heads_first"), 0)
    *arguments, _ = in_order(FORWARD, values)
    return lambda: compiled(*arguments, device.stream())
