"""What this machine has, and so which backend a call gets: for ``python -m cute_attn info`` and the demo.

Nothing here imports the DSL.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch

from cute_attn import layouts

PACKAGES = {
    "torch": "tensors",
    "nvidia-cutlass-dsl": "compiles the kernels",
    "apache-tvm-ffi": "launches them",
    "cuda-python": "asks about captured graphs",
    "nvidia-cutlass": "pycute: layouts on the host",
    "nvidia-cuda-cuobjdump": "reads what was compiled",
    "nvidia-cuda-nvdisasm": "reads what was compiled",
}
# Interfaces of others: the package that each is of, the module that says that it is there, and what cute-attn has of it.
INTEGRATIONS = {
    "flash-attn": ("flash-attn", "flash_attn", "cute_attn.flash_attn: its functions; install() puts them in its place"),
    "Transformers": ("transformers", "transformers", "its models can run on attention"),
    "SDPA": ("torch", "torch", "cute_attn.sdpa: torch's function; replaced() puts it in its place"),
}
NEEDED_FOR_KERNELS = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi", "cuda": "cuda-python"}


@dataclass(frozen=True)
class Device:
    """A CUDA GPU. If no layouts module serves it, ``target``, ``module``, ``mechanisms`` are empty; ``why_not`` says why."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    target: str = ""
    module: str = ""
    mechanisms: tuple[str, ...] = ()
    why_not: str = ""


def devices() -> list[Device]:
    """The GPUs that torch sees."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        known = (properties.name, (properties.major, properties.minor), properties.total_memory)
        try:
            target = layouts.target_of(known[1])
        except NotImplementedError as error:
            found.append(Device(*known, why_not=str(error)))
            continue
        module = layouts.for_target(target)
        found.append(Device(*known, target=target, module=layouts.source(module), mechanisms=tuple(module.MECHANISMS)))
    return found


def versions() -> dict[str, str | None]:
    """The version of each package in :data:`PACKAGES`; ``None`` where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def integrations() -> dict[str, tuple[str, str]]:
    """Of each of :data:`INTEGRATIONS` what was found, without importing it, and what cute-attn has of it."""
    found = {}
    for name, (package, module, ours) in INTEGRATIONS.items():
        absent = "not installed" if find_spec(module) is None else "installed, of no known version"
        found[name] = f"{package} {_version(package) or absent}", ours
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing() -> list[str]:
    """The packages that the kernels need and that can't be found."""
    return [package for module, package in NEEDED_FOR_KERNELS.items() if find_spec(module) is None]


def backend() -> tuple[str, str]:
    """What ``attention(…)`` runs at its best here, ``"cute"`` or ``"reference"``, and why."""
    if not torch.backends.cuda.is_built():
        return "reference", f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "reference", "torch finds no CUDA GPU: is there one, and a driver for it?"
    if absent := missing():
        why = f"{', '.join(absent)} not installed: try pip install 'cute-attn[cu13]' (Linux only)"
        return "reference", f"{why}; for CUDA tensors, ask for it with backend='reference'"
    found = devices()
    best = next((device for device in found if device.target), None)
    if best is None:
        return "reference", f"{found[0].why_not}; for CUDA tensors, ask for it with backend='reference'"
    return "cute", f"{best.name} runs {best.mechanisms[0]} ({best.target}, {best.module})"
