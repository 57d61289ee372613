"""Layouts of every supported GPU: the registry, from a compute capability to its module. ``base`` documents the contract.

Nothing here imports the DSL until a layout is asked for.
"""

from __future__ import annotations

from types import ModuleType

from . import sm80, sm86, sm90, sm120
from .base import Config

MODULES: list[ModuleType] = [sm80, sm86, sm90, sm120]


def family(config: Config) -> ModuleType:
    """The family module that lays out a config's operands."""
    return for_target(config.target).MECHANISMS[config.mechanism]


def for_target(target: str) -> ModuleType:
    """The GPU module of a compiler target such as ``"sm_90a"``."""
    for module in MODULES:
        if target in module.GPU.targets.values():
            return module
    raise ValueError(f"target is {target!r}; known ones are {', '.join(known_targets())}")


def target_of(capability: tuple[int, int]) -> str:
    """The compiler target of a GPU. Raises ``NotImplementedError`` for one that no module serves."""
    for module in MODULES:
        if capability in module.GPU.targets:
            return module.GPU.targets[capability]
    known = sorted(c for module in MODULES for c in module.GPU.targets)
    raise NotImplementedError(
        f"the GPU has compute capability {capability[0]}.{capability[1]}; there are kernels for "
        f"{', '.join(f'{a}.{b}' for a, b in known)}: use backend='reference', or add a module under layouts/"
    )


def known_targets() -> list[str]:
    """Every compiler target some module serves."""
    return sorted({t for module in MODULES for t in module.GPU.targets.values()})
