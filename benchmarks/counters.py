"""The layouts' micro-kernels as data: what the proofs predict of each, and what the profiler's counters say.

Needs neither a GPU nor the DSL: a result file holds what was counted, and the predictions are made anew whenever it is
read. So the file that is kept holds the proofs of today against the hardware.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import read_json, write_json
from cute_attn import layouts
from cute_attn.layouts.__main__ import configs
from cute_attn.layouts.base import Box, Config, Copy, Layout
from cute_attn.layouts.tools import counts

UNIT = 8  # elements of 16 bytes together
SCHEMA = "layouts 1"
AS_PREDICTED = "as predicted"
KINDS = ("conflicts", "accesses", "sectors")
SHIPPED, UNSWIZZLED, COLUMNS = "shipped", "unswizzled", "columns of 16 bytes"
# The counters of an instruction, the first that the profiler has: of bank conflicts, of accesses of the banks, of sectors.
# cp.async writes to shared memory when its data comes in, and the load-store pipe's own counters leave that out; the
# profiler counts the accesses by instrumenting the instruction (``smsp__sass_``). Its counters of cp.async's conflicts
# stay 0 where the accesses are eight times as many, so conflicts are taken from the accesses. TMA isn't in the load-store
# pipe at all: its sectors are those that cross between the multiprocessor and the L2 cache.
_CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared"
_ACCESSES = "l1tex__data_pipe_lsu_wavefronts_mem_shared"
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op"
_OF_LOADS: dict[str, tuple[str, ...]] = {"conflicts": (f"{_CONFLICTS}_op_ld.sum",), "accesses": (f"{_ACCESSES}_op_ld.sum",)}
_OF_STORES: dict[str, tuple[str, ...]] = {"conflicts": (f"{_CONFLICTS}_op_st.sum",), "accesses": (f"{_ACCESSES}_op_st.sum",)}
COUNTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "cp.async": {
        "accesses": ("smsp__sass_l1tex_data_pipe_lsu_wavefronts_mem_shared_op_ldgsts.sum",),
        "sectors": ("smsp__sass_l1tex_t_sectors_pipe_lsu_mem_global_op_ldgsts.sum", f"{_SECTORS}_ld.sum"),
    },
    "ldmatrix": _OF_LOADS,
    "ldmatrix.trans": _OF_LOADS,
    "stmatrix": _OF_STORES,
    "st.shared.b32": _OF_STORES,
    "ld.shared.b128, st.global.b128": _OF_LOADS | {"sectors": (f"{_SECTORS}_st.sum",)},
    "TMA load": {"sectors": ("l1tex__m_xbar2l1tex_read_sectors_mem_global_op_tma_ld.sum",)},
    "TMA store": {"sectors": ("l1tex__m_l1tex2xbar_write_sectors_mem_global_op_tma_st.sum",)},
}
# Whatever else explains a difference, for the JSON file.
ALSO = (
    f"{_CONFLICTS}.sum",
    f"{_CONFLICTS}_op_ldgsts.sum",
    "smsp__sass_l1tex_data_bank_conflicts_pipe_lsu_mem_shared_op_ldgsts.sum",
    f"{_ACCESSES}.sum",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "smsp__inst_executed.sum",
)


@dataclass(frozen=True)
class Case:
    """One copy of one operand's tile, in the layout as shipped or in a variant of it."""

    config: Config
    operand: str
    step: str
    variant: str = SHIPPED

    @property
    def name(self) -> str:
        c, variant = self.config, "" if self.variant == SHIPPED else f", {self.variant}"
        return f"{c.backward or c.mechanism} d{c.tile_d} {self.operand} {self.step}{variant}"

    @property
    def verb(self) -> str:
        """``in``, ``load``, ``store`` or ``out``: the step, of a ``load`` without the product that it is for."""
        return self.step.split()[0]

    @cached_property
    def copy(self) -> Copy | Box:
        return layouts.family(self.config).copies(self.config)[self.step, self.operand]

    @cached_property
    def shape(self) -> tuple[int, int]:
        return layouts.family(self.config).tile(self.operand, self.config)

    @cached_property
    def layout(self) -> Layout:
        """One slot of the operand: ``(rows, columns, 1)``."""
        whole = layouts.family(self.config).smem(self.operand, self.config)
        shape, stride = whole.shape[:2], whole.stride[:2]  # type: ignore[index]
        rows, columns = self.shape
        size = rows * columns
        if self.variant == COLUMNS:  # what threads side by side copy lies 16 · rows bytes apart: in the same banks
            shape, stride = (rows, (UNIT, columns // UNIT)), (UNIT, (1, UNIT * rows))
        swizzle = whole.swizzle if self.variant == SHIPPED else None
        return replace(whole, shape=(*shape, 1), stride=(*stride, size), swizzle=swizzle)

    @property
    def instruction(self) -> str:
        if isinstance(self.copy, Box):
            return f"TMA {'store' if self.copy.store else 'load'}"
        return self.copy.instruction

    @property
    def threads(self) -> int:
        """Of the block. Only one warpgroup takes part where TMA or stmatrix copy."""
        return 128 if self.config.mechanism == "tma_wgmma" else self.config.threads

    def predicted(self) -> dict[str, int]:
        """What the proof counts: ``instructions`` of a warp, and what applies of ``conflicts``, ``accesses``, ``sectors``."""
        if isinstance(self.copy, Box):
            found = counts.of_box(self.copy, self.shape, self.shape[1], self.shape[1])
            return {"instructions": found.instructions, "sectors": found.asked}
        banks, sectors = counts.of_copy(self.copy, self.layout, self.shape, self.shape[1], self.shape[1])
        found = {"instructions": banks.instructions, "conflicts": banks.conflicts, "accesses": banks.accesses}
        return found | ({} if sectors is None else {"sectors": sectors.asked})

    def same(self) -> tuple:
        """Equal for cases that make the same kernel, as K's and V's."""
        return self.instruction, replace(self.copy, operand=""), self.shape, self.layout, self.threads


def cases(arch: str, head_dims: Sequence[int]) -> list[Case]:
    """Every copy of the shipped configs, the forward pass's first, without those that are the same as one before."""
    found: dict[tuple, Case] = {}
    for gradients, head_dim in itertools.product(("", "qkv"), head_dims):
        for config, _ in configs(arch, head_dim, dtype="bfloat16", gradients=gradients):
            for step, operand in layouts.family(config).copies(config):
                for variant in (SHIPPED, UNSWIZZLED, COLUMNS):
                    case = Case(config, operand, step, variant)
                    if variant != COLUMNS or (step in ("in", "out") and not isinstance(case.copy, Box)):
                        found.setdefault(case.same(), case)
    return list(found.values())


@dataclass(frozen=True)
class Counted:
    """One kernel's run: the profiler's counters by name, and ``contents``, what is wrong with what it moved, if anything."""

    case: Case
    counters: Mapping[str, float]
    contents: str

    @cached_property
    def compared(self) -> dict[str, Compared]:
        """Predicted against counted, of what applies to the case's instruction."""
        predicted = self.case.predicted()
        found = {}
        for what, names in COUNTERS[self.case.instruction].items():
            name = next((name for name in names if name in self.counters), None)
            found[what] = Compared(predicted[what], None if name is None else int(self.counters[name]))
        if "accesses" in found and "conflicts" not in found:
            accesses, least = found["accesses"].counted, predicted["accesses"] - predicted["conflicts"]
            found["conflicts"] = Compared(predicted["conflicts"], None if accesses is None else accesses - least)
        return found

    @property
    def met(self) -> bool:
        """Whether nothing that was counted contradicts the proof."""
        return self.contents == AS_PREDICTED and all(one.met for one in self.compared.values())


@dataclass(frozen=True)
class Compared:
    """``counted`` is ``None`` where the profiler has no counter."""

    predicted: int
    counted: int | None

    @property
    def met(self) -> bool:
        return self.counted in (None, self.predicted)

    def __str__(self) -> str:
        return f"{self.predicted} / {'?' if self.counted is None else self.counted}"


@dataclass
class CountersRecord:
    """A whole run. ``about`` says on what: card, versions, date."""

    about: dict[str, Any] = field(default_factory=dict)
    kernels: list[Counted] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """How many predictions were met, in a sentence."""
        missed = sum(not one.met for one in self.kernels)
        unknown = sum(x.counted is None for one in self.kernels for x in one.compared.values())
        text = f"{missed} predictions missed" if missed else "every prediction met"
        without = f", but for {unknown} numbers (?) the profiler has no counter" if unknown else ""
        return f"{len(self.kernels)} kernels: {text}{without}"

    def save(self, path: Path) -> None:
        """What was counted, without the predictions."""
        kernels = [
            {
                "config": asdict(one.case.config),
                "operand": one.case.operand,
                "step": one.case.step,
                "variant": one.case.variant,
                "counters": dict(one.counters),
                "contents": one.contents,
            }
            for one in self.kernels
        ]
        write_json(path, {"schema": SCHEMA, "about": self.about, "kernels": kernels})

    @staticmethod
    def load(path: Path) -> CountersRecord:
        needed = "a result file written by benchmarks.layouts --json is needed"
        found = read_json(path, needed)
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"{path} holds no counters of layouts, or of another version; {needed}")
        kernels = [
            Counted(Case(Config(**k["config"]), k["operand"], k["step"], k["variant"]), k["counters"], k["contents"])
            for k in found["kernels"]
        ]
        return CountersRecord(found["about"], kernels)


def parse(text: str) -> list[dict[str, float]]:
    """The profiler's CSV, raw page: a row of names, a row of units, a row for each kernel in the order of launch."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[first:]))
    found = []
    for row in rows:
        if not (row.get("ID") or "").strip().isdigit():
            continue  # the units
        numbers = {}
        for name, value in row.items():
            if name and "__" in name and value:
                try:
                    numbers[name] = float(value.replace(",", ""))
                except ValueError:
                    continue
        found.append(numbers)
    return found


def show(record: CountersRecord, console: Console) -> bool:
    """The table; whether every prediction was met."""
    table = Table(title="predicted / counted", title_justify="left")
    for name in ("case", "instruction", "layout"):
        table.add_column(name, overflow="fold")
    for name in KINDS:
        table.add_column(name, justify="right")
    table.add_column("contents")
    for one in record.kernels:
        cells = [str(one.compared.get(what, "")) for what in KINDS]
        row = (one.case.name, one.case.instruction, str(one.case.layout), *cells, one.contents)
        table.add_row(*row, style="" if one.met else "red")
    console.print(table)
    console.print(record.summary)
    return all(one.met for one in record.kernels)
