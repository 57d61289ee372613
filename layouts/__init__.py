"""Layouts of every supported GPU: the registry, from a compute capability to its module. ``base`` documents the contract.

The modules are the files ``smNN.py`` beside this one, then those that :func:`register` or the entry points of the group
``cute_attn.layouts`` bring from elsewhere. Nothing here imports the DSL until a layout is asked for, and no entry point
is loaded before the first look-up.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import threading
import warnings
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

from cute_attn import sources

from .base import Config, Gpu

ENTRY_POINTS = "cute_attn.layouts"
PARAMETERS = ["problem", "mechanism", "target"]  # of a GPU module's configs
FAMILY = [  # what a family module has to define for a plan and a kernel
    *("tile_dim", "smem_parts", "smem_bytes", "accumulator_registers", "barriers", "misfit", "tile", "element"),
    *("tiled_mma", "smem_layout", "copy_in", "copy_out", "store_accumulator"),
]
MODULES: list[ModuleType] = [
    import_module(f"{__name__}.{found.name}")
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name)
    if re.match(r"sm\d", found.name)
]

_lock = threading.RLock()
_entry_points_loaded = False


# ---- look-ups ------------------------------------------------------------------------------------------------------


def modules() -> list[ModuleType]:
    """Every GPU's module, those of entry points included."""
    global _entry_points_loaded
    with _lock:
        if not _entry_points_loaded:
            _entry_points_loaded = True  # first: what is loaded may look something up itself
            _load_entry_points()
        return list(MODULES)


def family(config: Config) -> ModuleType:
    """The family module that lays out a config's operands."""
    module = for_target(config.target)
    if config.cache:
        return module.CACHE[config.cache]
    return module.BACKWARD[config.backward] if config.backward else module.MECHANISMS[config.mechanism]


def for_target(target: str) -> ModuleType:
    """The GPU module of a compiler target such as ``"sm_90a"``."""
    for module in modules():
        if target in targets(module):
            return module
    raise ValueError(f"target is {target!r}; known ones are {', '.join(known_targets())}")


def target_of(capability: tuple[int, int]) -> str:
    """The compiler target of a GPU. Raises ``NotImplementedError`` for one that no module serves."""
    if not (isinstance(capability, tuple) and [type(x) for x in capability] == [int, int]):
        raise TypeError(f"the compute capability is {capability!r}; a pair of ints is needed, such as (9, 0)")
    for module in modules():
        if capability in module.GPU.targets:
            return module.GPU.targets[capability]
    known = sorted(c for module in modules() for c in module.GPU.targets)
    raise NotImplementedError(
        f"the GPU has compute capability {capability[0]}.{capability[1]}; there are kernels for "
        f"{', '.join(f'{a}.{b}' for a, b in known)}: use backend='reference', or add a module under layouts/ "
        f"(docs/new-gpu.md)"
    )


def targets(module: ModuleType) -> tuple[str, ...]:
    """The compiler targets of a GPU module. One that serves no compute capability is asked for by its ``GPU.name``."""
    return tuple(module.GPU.targets.values()) or (module.GPU.name,)


def known_targets() -> list[str]:
    """Every compiler target some module serves."""
    return sorted({target for module in modules() for target in targets(module)})


def source(module: ModuleType) -> str:
    """Where a GPU module's tables are, for messages: ``layouts/sm90.py``, or the name of a module from elsewhere."""
    package, _, name = module.__name__.rpartition(".")
    return f"layouts/{name}.py" if package == __name__ else module.__name__


# ---- modules from elsewhere ----------------------------------------------------------------------------------------


def register(module: ModuleType) -> None:
    """Serve a GPU with a module of one's own, as ``base`` describes it. Registering it again changes nothing.

    Raises ``ValueError`` where something is missing, or a target or compute capability is served already. No plan that
    was made before can have become wrong: a target that none served had none.
    """
    if missing := check(module):
        name = getattr(module, "__name__", module)
        raise ValueError(f"{name} is no GPU's layouts: {'; '.join(missing)}: layouts/base.py documents what is needed")
    with _lock:
        if module in MODULES:
            return
        for other in MODULES:
            taken = [f"target {target}" for target in targets(module) if target in targets(other)]
            taken += [f"compute capability {a}.{b}" for a, b in module.GPU.targets if (a, b) in other.GPU.targets]
            if taken:
                raise ValueError(
                    f"{module.__name__} serves {' and '.join(taken)}, which {source(other)} serves already: "
                    f"change its GPU.targets, or edit that module's tables"
                )
        sources.note((module, *module.MECHANISMS.values(), *getattr(module, "BACKWARD", {}).values()))
        MODULES.append(module)


def check(module: ModuleType) -> list[str]:
    """What a GPU module lacks of the contract, in words; empty where nothing is missing."""
    gpu, mechanisms = getattr(module, "GPU", None), getattr(module, "MECHANISMS", None)
    found = [f"{name} is missing" for name in ("GPU", "MECHANISMS", "configs") if not hasattr(module, name)]
    if isinstance(gpu, Gpu):
        found += _check_gpu(gpu)
    elif hasattr(module, "GPU"):
        found.append(f"GPU is a {type(gpu).__name__}, not a Gpu")
    if hasattr(module, "MECHANISMS") and not (isinstance(mechanisms, dict) and mechanisms):
        found.append("MECHANISMS is not a dict from a mechanism's name to its family module, with one entry at least")
    elif mechanisms:
        for name, layouts in mechanisms.items():
            if not (isinstance(name, str) and name.isidentifier() and find_spec(f"cute_attn.mainloop.{name}")):
                found.append(f"mechanism {name!r} has no mainloop cute_attn/mainloop/{name}.py")
            if lacks := [function for function in FAMILY if not callable(getattr(layouts, function, None))]:
                found.append(f"the family module of mechanism {name!r} lacks {', '.join(lacks)}")
    for name, layouts in getattr(module, "BACKWARD", {}).items():
        if not find_spec(f"cute_attn.mainloop.{name}"):
            found.append(f"BACKWARD has {name!r}, and there is no mainloop cute_attn/mainloop/{name}.py")
        if lacks := [function for function in FAMILY if not callable(getattr(layouts, function, None))]:
            found.append(f"the family module of BACKWARD's {name!r} lacks {', '.join(lacks)}")
    if hasattr(module, "configs"):
        configs = module.configs
        if not callable(configs) or list(inspect.signature(configs).parameters) != PARAMETERS:
            found.append(f"configs is not a function of ({', '.join(PARAMETERS)})")
    return found


def _check_gpu(gpu: Gpu) -> list[str]:
    found = []
    for capability, target in gpu.targets.items():
        if not (isinstance(capability, tuple) and [type(x) for x in capability] == [int, int]):
            found.append(f"GPU.targets has {capability!r}, which is not a compute capability such as (12, 0)")
        if not _is_target(target):
            found.append(f"GPU.targets has {target!r}, which is not a target such as 'sm_120'")
    if len(set(gpu.targets.values())) < len(gpu.targets):
        found.append("GPU.targets has a target twice")
    if not gpu.targets and not _is_target(gpu.name):
        found.append(f"GPU.targets is empty and GPU.name is {gpu.name!r}, which is not a target such as 'sm_120' either")
    if not 0 < gpu.smem_per_block <= gpu.smem_per_multiprocessor:
        found.append(
            f"GPU.smem_per_block is {gpu.smem_per_block}, not from 1 to smem_per_multiprocessor ({gpu.smem_per_multiprocessor})"
        )
    return found


def _is_target(target: object) -> bool:
    return isinstance(target, str) and bool(re.fullmatch(r"sm_\d{2,3}[a-z]?", target))


def _load_entry_points() -> None:
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # whatever a stranger's module raises must not stop the others
            text = f"entry point {entry.name} = {entry.value} of {ENTRY_POINTS} is left out: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=4)
