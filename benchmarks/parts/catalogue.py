"""What can be measured: every probe, as data. Nothing here needs a GPU or the DSL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.parts.kernels import Kernel
from benchmarks.parts.shapes import SEQLEN, Shape, mechanisms
from benchmarks.parts.stages import FULL, VARIANTS

if TYPE_CHECKING:
    from cute_attn.layouts.base import Config

MEMORY, L2, HOST, DEVICE = "memory", "L2", "host", "device"
WAYS = {"tma_wgmma": {"tma": "TMA"}, "cp_async": {"cp_async": "cp.async", "plain": "loads"}}
SWEEP = (64, 96, 128, 192, 256)  # widths of a WGMMA
SWEEP_SHAPE = Shape(128, False)
MEMSET, ONE_WARP, EMPTY = "host: memset of a byte", "device: kernel of one warp", "host: empty kernel"


@dataclass(frozen=True)
class Probe:
    """One thing that is measured.

    ``what`` tells it from the others of its part, configuration and mechanism. ``size`` is where copies come from, or
    whose time a launch takes; ``beside`` names the probe whose time is the limit of a launch; ``shipped`` marks what
    the plan ships where there are other choices beside it.
    """

    part: str
    shape: Shape
    mechanism: str
    what: str
    kernel: Kernel | None
    size: str = ""
    beside: str = ""
    shipped: bool = False
    seqlen: int = SEQLEN

    @property
    def key(self) -> str:
        return f"{self.part}: {self.shape.name} {self.mechanism}: {self.what}"

    @property
    def turns(self) -> tuple[str, Shape, str]:
        """Probes that agree in this take turns with each other."""
        return self.part, self.shape, self.mechanism


def copies(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    """K's tiles by every way the mechanism's layout allows, one to four stages; the shipped number also from L2."""
    config = shape.config(target, mechanism)
    for how, words in WAYS[mechanism].items():
        for stages in range(1, 5):
            changed = replace(config, stages=stages)
            if not _ring_fits(changed):
                continue
            kernel = Kernel("copies", how, shape.problem, changed)
            shipped = stages == config.stages
            plural = "s" if stages > 1 else ""
            what = f"{words} {config.tile_n}×{config.tile_d}, {stages} stage{plural}"
            yield Probe("copies", shape, mechanism, what, kernel, MEMORY, shipped=shipped)
            if shipped:
                yield Probe("copies", shape, mechanism, f"{what}, from L2", kernel, L2, shipped=True)


def products(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    """Both products of a configuration, by where their operands come from."""
    config = shape.config(target, mechanism)
    for role, of_wgmma in (("S", "shared"), ("O", "registers")):
        for source in (of_wgmma,) if mechanism == "tma_wgmma" else ("shared", "registers"):
            kernel = Kernel("products", f"{role} {source}", shape.problem, config)
            yield Probe("products", shape, mechanism, _product(role, source, config), kernel, shipped=True)


def sweep(target: str) -> Iterator[Probe]:
    """WGMMA over its widths, A from shared memory (Q·Kᵀ's layouts) and from registers (P·V's)."""
    config = SWEEP_SHAPE.config(target, "tma_wgmma")
    for role, source in (("S", "shared"), ("O", "registers")):
        for n in SWEEP:
            changed = replace(config, tile_n=n) if role == "S" else replace(config, tile_dv=n)
            kernel = Kernel("products", f"{role} {source}", SWEEP_SHAPE.problem, changed)
            if changed != config:  # the shipped one is there already
                yield Probe("products", SWEEP_SHAPE, "tma_wgmma", _product(role, source, changed), kernel)


def softmax(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    """Steps with and without the rescale of O; bare exponentials once."""
    config = shape.config(target, mechanism)
    for how in ("step", "step, rescale", *(("exp2",) if shape.head_dim == 128 else ())):
        words = {"step": "step", "step, rescale": "step and rescale of O", "exp2": "bare exponentials"}[how]
        what = f"{words}, {config.tile_n} keys" if how != "exp2" else words
        kernel = Kernel("softmax", how, shape.problem, config)
        yield Probe("softmax", shape, mechanism, what, kernel, shipped=how != "exp2")


def epilogue(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    config = shape.config(target, mechanism)
    what = f"O {config.tile_m}×{config.tile_dv}"
    kernel = Kernel("epilogue", "store", shape.problem, config)
    yield Probe("epilogue", shape, mechanism, what, kernel, shipped=True)


def whole(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    config = shape.config(target, mechanism)
    for how in VARIANTS:
        kernel = Kernel("whole", how, shape.problem, config)
        yield Probe("whole", shape, mechanism, how, kernel, shipped=how == FULL)


def launch(shape: Shape, mechanism: str, target: str) -> Iterator[Probe]:
    config = shape.config(target, mechanism)

    def kernel(how: str) -> Kernel:
        return Kernel("launch", how, shape.problem, config)

    blocks = f"{config.threads} threads, {config.blocks_per_multiprocessor} a multiprocessor"
    yield Probe("launch", shape, mechanism, MEMSET, None, HOST, shipped=True)
    yield Probe("launch", shape, mechanism, EMPTY, kernel("empty"), HOST, MEMSET, shipped=True)
    forward = Kernel("whole", FULL, shape.problem, config)
    yield Probe("launch", shape, mechanism, "host: forward kernel", forward, HOST, EMPTY, shipped=True)
    yield Probe("launch", shape, mechanism, ONE_WARP, kernel("one warp"), DEVICE, shipped=True)
    empty = kernel("empty")
    yield Probe("launch", shape, mechanism, f"device: blocks of {blocks}", empty, DEVICE, ONE_WARP, shipped=True)


Lister = Callable[[Shape, str, str], Iterator[Probe]]
# The masked twin of a head dim differs from it in ``whole`` and, on the host's side, ``launch`` only.
PARTS: dict[str, Lister] = {
    "copies": copies,
    "products": products,
    "softmax": softmax,
    "epilogue": epilogue,
    "whole": whole,
    "launch": launch,
}
MASKED = ("whole",)
BEST_ONLY = ("whole", "launch")  # of which every mechanism is too much unless it is asked for


def probes(
    target: str,
    shapes: Sequence[Shape],
    parts: Sequence[str] = tuple(PARTS),
    mechanism: str | None = None,
    *,
    every: bool = True,
    seqlen: int = SEQLEN,
) -> list[Probe]:
    """The probes of some parts and configurations. ``every``: all mechanisms where they are cheap, and the sweep.

    Raises ``ValueError`` for a part or a mechanism that isn't known.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"no part is called {', '.join(unknown)}; known: {', '.join(PARTS)}")
    known = mechanisms(target)
    if mechanism is not None and mechanism not in known:
        raise ValueError(f"{target} has no mechanism {mechanism}; known: {', '.join(known)}")
    unmasked = list(dict.fromkeys(Shape(shape.head_dim, False) for shape in shapes))
    found: list[Probe] = []
    for part in dict.fromkeys(parts):
        several = every and mechanism is None and part not in BEST_ONLY
        for name in known if several else (mechanism or known[0],):
            for shape in shapes if part in MASKED else unmasked:
                found += PARTS[part](shape, name, target)
            if part == "products" and every and name == "tma_wgmma":
                found += sweep(target)
    return [replace(probe, seqlen=seqlen) for probe in found]


def jobs(found: Sequence[Probe]) -> list[list[Probe]]:
    """Probes that take turns, together."""
    together: dict[tuple, list[Probe]] = {}
    for probe in found:
        together.setdefault(probe.turns, []).append(probe)
    return list(together.values())


def _product(role: str, source: str, config: Config) -> str:
    """``S: m64n128, k 128, A from shared memory``: one tile's product as its instruction sees it."""
    n, k = (config.tile_n, config.tile_d) if role == "S" else (config.tile_dv, config.tile_n)
    if config.mechanism == "tma_wgmma":
        where = "A from shared memory" if source == "shared" else "A from registers"
        return f"{role}: m64n{n}, k {k}, {where}"
    where = "ldmatrix" if source == "shared" else "registers"
    return f"{role}: m16n8 over {config.tile_m}×{n}, k {k}, {where}"


def _ring_fits(config: Config) -> bool:
    """Whether the stages of K alone fit into shared memory."""
    from cute_attn import layouts

    gpu = layouts.for_target(config.target).GPU
    blocks = config.blocks_per_multiprocessor
    limit = gpu.smem_per_block if blocks == 1 else gpu.smem_per_multiprocessor // blocks
    return config.stages * config.tile_n * config.tile_d * 2 + 2048 <= limit
