"""The configurations by name (``d128-causal``), and what one of their calls amounts to. The DSL isn't imported here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.cases import DTYPE_BYTES, Case, Grid
from benchmarks.flops import bytes_moved, flops, pairs

if TYPE_CHECKING:
    from cute_attn.layouts.base import Config
    from cute_attn.problem import Problem

HEAD_DIMS = (64, 128, 256)
WIDTH = Grid().width  # heads × head_dim, as in the grid of attention cases
SEQLEN = 8192


@dataclass(frozen=True)
class Shape:
    """A head dim and a mask; bf16, without the log-sum-exp."""

    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        return f"d{self.head_dim}" + ("-causal" if self.causal else "")

    @property
    def problem(self) -> Problem:
        from cute_attn.problem import Problem

        return Problem("bfloat16", self.head_dim, self.head_dim, bounded_right=self.causal)

    def config(self, target: str, mechanism: str) -> Config:
        """What the plan ships for it."""
        from cute_attn.plan import plan

        return plan(self.problem, target, mechanism)

    def case(self, seqlen: int = SEQLEN) -> Case:
        """The case that ``python -m benchmarks attention`` measures under the same name."""
        return Grid(head_dims=(self.head_dim,), causal=(self.causal,), seqlens=(seqlen,)).cases()[0]


SHAPES = {shape.name: shape for shape in (Shape(d, causal) for d in HEAD_DIMS for causal in (False, True))}


def named(name: str) -> Shape:
    """A configuration by its name. Raises ``ValueError`` for an unknown one, with the known ones."""
    if name not in SHAPES:
        raise ValueError(f"no configuration is called {name}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def mechanisms(target: str) -> tuple[str, ...]:
    """A GPU's mechanisms, best first."""
    from cute_attn import layouts

    return tuple(layouts.for_target(target).MECHANISMS)


def key_tiles(case: Case, config: Config) -> int:
    """Key tiles that are loaded and multiplied, over all query tiles: those a mask cuts count whole."""
    from cute_attn.rules import Band, HostOps

    left, right = case.edges
    shift = case.seqlen_k - case.seqlen_q
    band = Band(None if left is None else shift - left, None if right is None else shift + right)
    count = 0
    for row in range(0, case.seqlen_q, config.tile_m):
        last = min(row + config.tile_m, case.seqlen_q) - 1
        begin, end = band.key_range(row, last, case.seqlen_k, HostOps)
        count += max(-(-(end - begin) // config.tile_n), 0)
    return count * case.batch * case.heads


def loaded_bytes(case: Case, config: Config) -> int:
    """Bytes a call brings to shared memory: Q once, a tile of K and one of V for each key tile."""
    size = DTYPE_BYTES[case.dtype]
    q = case.batch * case.heads * case.seqlen_q * config.tile_d
    return size * (q + key_tiles(case, config) * config.tile_n * (config.tile_d + config.tile_dv))


def work(case: Case, config: Config) -> dict[str, float]:
    """A call's work by kind. FLOPs and exponentials as the field counts them (a causal square is half of a full one);
    bytes ``sm_in``, into the multiprocessors, as the tiles are loaded; bytes ``in`` from and ``out`` to device memory each
    once."""
    return {
        "tensor": flops(case),
        "exp": case.batch * case.heads * pairs(case),
        "sm_in": loaded_bytes(case, config),
        "in": bytes_moved(case) - output_bytes(case),
        "out": output_bytes(case),
    }


def output_bytes(case: Case) -> int:
    return math.prod(case.shape_of("out")) * DTYPE_BYTES[case.dtype]
