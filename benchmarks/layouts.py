"""The layouts' proofs against hardware counters: ``python -m benchmarks.layouts --help``.

One micro-kernel for each copy and shared-memory layout, of a single block that makes the copy once for one tile; as shipped,
and with the same layout unswizzled. Nsight Compute counts bank conflicts and sectors; ``cute_attn.layouts.prove`` predicts
them. Besides, without the profiler, what each copy moved is checked element by element: the layout and the maps on the host
say where in shared memory, in which thread and value, or where in global memory it must be.

``--compile-only`` needs no GPU: it compiles the kernels and compares how many of its instruction each has with the proof's
count of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Int16, Int32, cute, pipeline
from cutlass.cute import runtime
from cutlass.cute.nvgpu import cpasync
from rich.console import Console
from rich.table import Table

from cute_attn import layouts
from cute_attn.layouts import algebra, prove
from cute_attn.layouts.__main__ import configs
from cute_attn.layouts.base import Box, Config, Copy, Layout, cute_layout
from cute_attn.layouts.fragments import transposed

WARP = 32
HEAD_DIMS = (64, 96, 128, 256)
LOG_WIDTH = 180
KERNELS = "regex:kernel_cutlass"
# The counters of an instruction, the first that the profiler has: of bank conflicts, of accesses of the banks, of sectors.
_CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared"
_ACCESSES = "l1tex__data_pipe_lsu_wavefronts_mem_shared"
_SECTORS = "l1tex__t_sectors_pipe_lsu_mem_global_op"
_OF_LOADS: dict[str, tuple[str, ...]] = {"conflicts": (f"{_CONFLICTS}_op_ld.sum",), "accesses": (f"{_ACCESSES}_op_ld.sum",)}
_OF_STORES: dict[str, tuple[str, ...]] = {"conflicts": (f"{_CONFLICTS}_op_st.sum",), "accesses": (f"{_ACCESSES}_op_st.sum",)}
COUNTERS: dict[str, dict[str, tuple[str, ...]]] = {
    "cp.async": {
        "conflicts": (f"{_CONFLICTS}_op_ldgsts.sum", f"{_CONFLICTS}.sum"),
        "accesses": (f"{_ACCESSES}_op_ldgsts.sum", f"{_ACCESSES}.sum"),
        "sectors": (f"{_SECTORS}_ldgsts.sum", f"{_SECTORS}_ldgsts_cache_bypass.sum", f"{_SECTORS}_ld.sum"),
    },
    "ldmatrix": _OF_LOADS,
    "ldmatrix.trans": _OF_LOADS,
    "stmatrix": _OF_STORES,
    "st.shared.b32": _OF_STORES,
    "ld.shared.b128, st.global.b128": _OF_LOADS | {"sectors": (f"{_SECTORS}_st.sum",)},
    "TMA load": {"sectors": ("lts__t_sectors_op_read.sum",)},
    "TMA store": {"sectors": ("lts__t_sectors_op_write.sum",)},
}
# Whatever else explains a difference, for the JSON file.
ALSO = ("l1tex__data_bank_conflicts_pipe_lsu.sum", "smsp__inst_executed.sum", "sm__cycles_elapsed.max")
PTX = {
    "cp.async": r"cp\.async\.c[ag]\.shared",
    "ldmatrix": r"ldmatrix\.sync\S*\.x4\.shared",
    "ldmatrix.trans": r"ldmatrix\.sync\S*\.x4\.trans",
    "stmatrix": r"stmatrix\.sync\S*\.x4",
    "st.shared.b32": r"st\.shared\.(?:v2\.b16|[bus]32)",
    "ld.shared.b128, st.global.b128": r"ld\.shared\.v[24]",
    "TMA load": r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global",
    "TMA store": r"cp\.async\.bulk\.tensor\S*\.global\.shared",
}


@dataclass(frozen=True)
class Case:
    """One copy of one operand's tile, in the layout as shipped or unswizzled."""

    config: Config
    operand: str
    step: str
    swizzled: bool

    @property
    def name(self) -> str:
        c = self.config
        return f"{c.mechanism} d{c.tile_d} {self.operand} {self.step}{'' if self.swizzled else ', unswizzled'}"

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
        size = self.shape[0] * self.shape[1]
        return replace(whole, shape=(*shape, 1), stride=(*stride, size), swizzle=whole.swizzle if self.swizzled else None)

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
            found = prove.box_sectors(self.copy, self.shape, self.shape[1], self.shape[1])
            return {"instructions": found.instructions, "sectors": found.asked}
        rows, columns = prove.accesses(self.copy, self.shape)
        banks = prove.banks(algebra.offset(self.layout, rows, columns, 0))
        found = {"instructions": banks.instructions, "conflicts": banks.conflicts, "accesses": banks.accesses}
        if "sectors" in COUNTERS[self.instruction]:
            found["sectors"] = prove.sectors(rows, columns, self.shape[1], self.shape[1]).asked
        return found

    def same(self) -> tuple:
        """Equal for cases that make the same kernel, as K's and V's."""
        return self.instruction, replace(self.copy, operand=""), self.shape, self.layout, self.threads


def cases(arch: str, head_dims: Sequence[int]) -> list[Case]:
    """Every copy of the shipped configs, without those that are the same as one before."""
    found: dict[tuple, Case] = {}
    for head_dim in head_dims:
        for config, _ in configs(arch, head_dim, dtype="bfloat16"):
            for step, operand in layouts.family(config).copies(config):
                for swizzled in (True, False):
                    case = Case(config, operand, step, swizzled)
                    found.setdefault(case.same(), case)
    return list(found.values())


# ---- kernels ---------------------------------------------------------------------------------------------------------


class Micro:
    """The kernel of a case: ``(mX (rows, columns) bf16, image (rows · columns) int16, stream)``.

    With ``check``, the copy's input is what the image or mX holds and its output is written to the other; without it, the
    kernel does nothing but the copy and what keeps the compiler from dropping it.
    """

    def __init__(self, case: Case, check: bool):
        self.case, self.check = case, check
        self.config, self.lay = case.config, layouts.family(case.config)

    @cute.jit
    def launch(self, mX: cute.Tensor, image: cute.Tensor, stream):
        atom, coordinates = None, None
        if cutlass.const_expr(isinstance(self.case.copy, Box)):
            slot = cute.select(cute_layout(self.case.layout), mode=[0, 1])
            make = self.lay.copy_out if self.case.copy.store else self.lay.copy_in
            atom, coordinates = cpasync.make_tiled_tma_atom(make(self.case.operand, self.config), mX, slot, self.case.shape)
        self.kernel(atom, coordinates, mX, image).launch(grid=[1, 1, 1], block=[self.case.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, atom, coordinates, mX: cute.Tensor, image: cute.Tensor):
        thread = cute.arch.thread_idx()[0]
        smem = cutlass.memory.SmemAllocator()
        raw = smem.allocate_tensor(Int16, cute.make_layout(cute.size(image)), self.lay.SMEM_ALIGN)
        s = self._view(raw)
        if cutlass.const_expr(self.check and self.case.step in ("load", "out")):
            self._move(image, raw, thread)
            if cutlass.const_expr(atom is not None):
                cute.arch.fence_view_async_shared()
            cute.arch.sync_threads()
        if cutlass.const_expr(atom is not None):
            self._tma(atom, coordinates, s, smem)
        elif cutlass.const_expr(self.case.step == "in"):
            self._copy_in(mX, s, thread)
        elif cutlass.const_expr(self.case.step == "load"):
            self._load(s, image, thread)
        elif cutlass.const_expr(self.case.step == "store"):
            self._store(s, thread)
        else:
            self._copy_out(s, mX, thread)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.case.step in ("in", "store")):
            if cutlass.const_expr(self.check):
                self._move(raw, image, thread)
            elif cutlass.const_expr(self.case.step == "store"):
                image[thread] = raw[thread]

    def _view(self, raw: cute.Tensor) -> cute.Tensor:
        """Shared memory in the case's layout; a swizzle on bytes goes into the pointer."""
        layout, element = cute_layout(self.case.layout), self.lay.element(self.config)
        if self.case.layout.swizzle is not None and self.case.layout.unit_bytes == 1:
            return cute.make_tensor(cute.recast_ptr(raw.iterator, layout.inner, dtype=element), layout.outer)
        return cute.make_tensor(cute.recast_ptr(raw.iterator, dtype=element), layout)

    @cute.jit
    def _move(self, source: cute.Tensor, into: cute.Tensor, thread: Int32):
        for i in cutlass.range(thread, cute.size(source), self.case.threads, unroll=1):
            into[i] = source[i]

    @cute.jit
    def _tma(self, atom, coordinates, s: cute.Tensor, smem):
        g = cute.local_tile(coordinates, self.case.shape, (0, 0))
        tXsX, tXgX = cpasync.tma_partition(atom, 0, cute.make_layout(1), cute.group_modes(s, 0, 2), cute.group_modes(g, 0, 2))
        pipe = pipeline.PipelineTmaAsync.create(
            num_stages=1,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, self.case.threads // WARP),
            tx_count=self.lay.slot_bytes(self.case.operand, self.config),
            barrier_storage=smem.allocate_array(cutlass.Int64, 2),
            defer_sync=True,
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
            if cutlass.const_expr(self.case.copy.store):
                cute.copy(atom, tXsX[None, 0], tXgX)
                cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=False)
            else:
                state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
                pipe.producer_acquire(state)
                cute.copy(atom, tXgX, tXsX[None, 0], tma_bar_ptr=pipe.producer_get_barrier(state))
        if cutlass.const_expr(not self.case.copy.store):
            pipe.consumer_wait(pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, 1))

    @cute.jit
    def _copy_in(self, mX: cute.Tensor, s: cute.Tensor, thread: Int32):
        copy = self.lay.copy_in(self.case.operand, self.config)
        part = copy.get_slice(thread)
        cute.copy(copy, part.partition_S(mX), part.partition_D(s[None, None, 0]))
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def _load(self, s: cute.Tensor, image: cute.Tensor, thread: Int32):
        operand = self.case.operand
        mma = self.lay.tiled_mma("O" if operand == "V" else "S", self.config)
        part = mma.get_slice(thread)
        if cutlass.const_expr(operand == "V"):
            s = transposed(s)
        s = s[None, None, 0]  # type: ignore[assignment]
        if cutlass.const_expr(operand == "Q"):
            fragment = part.make_fragment_A(part.partition_A(s))
        else:
            fragment = part.make_fragment_B(part.partition_B(s))
        copy = self.lay.load_operand(operand, self.config)
        source, into = copy.get_slice(thread).partition_S(s), copy.get_slice(thread).retile(fragment)
        total = Int32(0)
        for i in cutlass.range_constexpr(cute.size(into, mode=[2])):
            cute.copy(copy, source[None, None, i], into[None, None, i])
            words = cute.recast_tensor(fragment[None, None, i], Int32)
            for j in cutlass.range_constexpr(cute.size(words)):
                total = total ^ words[j]
        if cutlass.const_expr(self.check):
            image[thread] = self._misplaced(part, fragment).to(Int16)
        else:
            image[thread] = (total ^ (total >> 16)).to(Int16)  # every value takes part: none may be left out

    @cute.jit
    def _misplaced(self, part, fragment: cute.Tensor) -> Int32:
        """Of the values of a fragment, those that are not the element that the MMA's map says."""
        rows, columns = self.case.shape
        shape = (columns, rows) if self.case.operand == "V" else (rows, columns)
        identity = cute.make_identity_tensor(shape)
        where = part.partition_A(identity) if self.case.operand == "Q" else part.partition_B(identity)
        numbers = cute.recast_tensor(fragment, Int16)
        wrong = Int32(0)
        for i in cutlass.range_constexpr(cute.size(numbers)):
            first, second = where[i][0], where[i][1]
            if cutlass.const_expr(self.case.operand == "V"):
                first, second = second, first
            expected = (first * columns + second).to(Int16)
            wrong += Int32(1) if numbers[i] != expected else Int32(0)
        return wrong

    @cute.jit
    def _store(self, s: cute.Tensor, thread: Int32):
        mma = self.lay.tiled_mma("O", self.config)
        part = mma.get_slice(thread)
        where = part.partition_C(cute.make_identity_tensor(self.case.shape))
        fragment = cute.make_rmem_tensor(part.partition_shape_C(self.case.shape), self.lay.element(self.config))
        numbers = cute.recast_tensor(fragment, Int16)
        for i in cutlass.range_constexpr(cute.size(numbers)):
            numbers[i] = (where[i][0] * self.case.shape[1] + where[i][1]).to(Int16)
        copy = self.lay.store_accumulator(self.config)
        mine = copy.get_slice(thread)
        cute.copy(copy, mine.retile(fragment), mine.partition_D(s[None, None, 0]))

    @cute.jit
    def _copy_out(self, s: cute.Tensor, mX: cute.Tensor, thread: Int32):
        copy = self.lay.copy_out(self.case.operand, self.config)
        part = copy.get_slice(thread)
        source, into = part.partition_S(s[None, None, 0]), part.partition_D(mX)
        for i in cutlass.range_constexpr(cute.size(source, mode=[1])):
            for j in cutlass.range_constexpr(cute.size(source, mode=[2])):
                piece = cute.make_rmem_tensor_like(source[None, i, j])
                cute.copy(copy, source[None, i, j], piece)
                cute.copy(copy, piece, into[None, i, j])


def compiled(case: Case, check: bool, options: str = "") -> Any:
    """The case's kernel, compiled. Needs no GPU."""
    rows, columns = case.shape
    micro = Micro(case, check)

    @cute.jit
    def host(mX: cute.Tensor, image: cute.Tensor, stream):
        micro.launch(mX, image, stream)

    element = layouts.family(case.config).element(case.config)
    mX = runtime.make_fake_compact_tensor(element, (rows, columns), stride_order=(1, 0), assumed_align=16)
    image = runtime.make_fake_compact_tensor(Int16, (rows * columns,), assumed_align=16)
    options = f"--enable-tvm-ffi --gpu-arch={case.config.target} {options}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This static loop")  # every element's coordinate is a constant
        return cute.compile(host, mX, image, runtime.make_fake_stream(), options=options)


# ---- compile only ----------------------------------------------------------------------------------------------------


def compile_only(chosen: Sequence[Case], console: Console) -> int:
    """Compile each kernel here and compare how often its instruction is in the code with the proof's count."""
    table = Table(title="compiled", title_justify="left")
    for name in ("case", "instruction", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "in the code"):
        table.add_column(name, justify="right")
    wrong = 0
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            compiled(case, True)
            compiled(case, False, f"--keep-ptx --dump-dir={folder}")
            code = next(Path(folder).rglob("*.ptx")).read_text()
        each = 1 if isinstance(case.copy, Box) else case.threads // WARP
        predicted, found = case.predicted()["instructions"] // each, len(re.findall(PTX[case.instruction], code))
        wrong += predicted != found
        style = "" if predicted == found else "red"
        table.add_row(case.name, case.instruction, str(case.layout), str(predicted), str(found), style=style)
    console.print(table)
    console.print(f"{len(chosen)} kernels compiled for {chosen[0].config.target}; {wrong} differ in instructions")
    return 1 if wrong else 0


# ---- on the GPU ------------------------------------------------------------------------------------------------------


def run(chosen: Sequence[Case], check: bool) -> list[str]:
    """Launch each kernel once; with ``check``, what is wrong with what it moved, by case."""
    import numpy as np
    import torch

    said = []
    for case in chosen:
        rows, columns = case.shape
        numbers = np.arange(rows * columns, dtype=np.int64)
        offsets = algebra.offset(case.layout, numbers // columns, numbers % columns, 0)
        there = np.empty(rows * columns, dtype=np.int64)
        there[offsets] = numbers
        image = torch.zeros(rows * columns, dtype=torch.int16, device="cuda")
        tensor = torch.zeros(rows * columns, dtype=torch.int16, device="cuda")
        wanted = there
        if check and case.step == "in":
            tensor.copy_(torch.from_numpy(numbers.astype(np.int16)))
        elif check and case.step in ("load", "out"):
            image.copy_(torch.from_numpy(there.astype(np.int16)))
            wanted = numbers if case.step == "out" else np.zeros(case.threads, dtype=np.int64)
        function = compiled(case, check)
        function(tensor.view(torch.bfloat16).view(rows, columns), image, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        got = (tensor if case.step == "out" else image).cpu().numpy()[: wanted.size]
        wrong = int((got != wanted.astype(np.int16)).sum()) if check else 0
        where = "threads got others" if case.step == "load" else "elements elsewhere"
        said.append(f"{wrong} of {wanted.size} {where}" if wrong else "as predicted")
    return said


def measure(chosen: Sequence[Case], arguments: Sequence[str], ncu: str, console: Console) -> list[dict[str, Any]]:
    """Run the kernels in a process of its own, once checked and once under the profiler."""
    again = [sys.executable, "-m", "benchmarks.layouts", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "images.json"
        subprocess.run([*again, "--run", "check", "--json", str(answer)], check=True)
        images = json.loads(answer.read_text())
    wanted = {name for counters in COUNTERS.values() for names in counters.values() for name in names} | set(ALSO)
    if known := _known_metrics(ncu):
        wanted = {name for name in wanted if name.rsplit(".", 1)[0] in known}
        wanted |= {f"{name}.sum" for name in known if name.startswith((_CONFLICTS, _ACCESSES, _SECTORS))}
    metrics = sorted(wanted)
    command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "-k", KERNELS]
    command += ["--metrics", ",".join(metrics), *again, "--run", "count"]
    console.print(" ".join(command), style="dim", markup=False, highlight=False, soft_wrap=True)
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    counted = parse(said.stdout)
    if said.returncode or len(counted) != len(chosen):
        tail = "\n".join((said.stdout + said.stderr).splitlines()[-20:])
        raise RuntimeError(f"the profiler counted {len(counted)} kernels of {len(chosen)} ({said.returncode}):\n{tail}")
    return [
        {
            "case": case.name,
            "config": asdict(case.config),
            "operand": case.operand,
            "step": case.step,
            "swizzled": case.swizzled,
            "instruction": case.instruction,
            "layout": str(case.layout),
            "predicted": case.predicted(),
            "counted": found,
            "compared": compare(case, found),
            "contents": content,
        }
        for case, found, content in zip(chosen, counted, images, strict=True)
    ]


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


def compare(case: Case, counted: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Predicted against counted, of what applies to the case's instruction."""
    predicted, found = case.predicted(), {}
    for what, names in COUNTERS[case.instruction].items():
        name = next((name for name in names if name in counted), None)
        found[what] = {"predicted": predicted[what], "counted": counted.get(name or ""), "counter": name}
    return found


def show(results: Sequence[dict[str, Any]], console: Console) -> int:
    """The table; how many predictions missed. TMA's sectors are the L2 cache's of the whole kernel: shown, not judged."""
    table = Table(title="predicted / counted", title_justify="left")
    for name in ("case", "instruction", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("conflicts", "accesses", "sectors"):
        table.add_column(name, justify="right")
    table.add_column("contents")
    missed, unknown = 0, 0
    for result in results:
        cells, wrong = [], result["contents"] != "as predicted"
        for what in ("conflicts", "accesses", "sectors"):
            one = result["compared"].get(what)
            if one is None:
                cells.append("")
                continue
            counted = "?" if one["counted"] is None else f"{one['counted']:.0f}"
            if one["counted"] is None:
                unknown += 1
            elif int(one["counted"]) != one["predicted"] and not result["instruction"].startswith("TMA"):
                wrong = True
            cells.append(f"{one['predicted']} / {counted}")
        missed += wrong
        row = (result["case"], result["instruction"], result["layout"], *cells, result["contents"])
        table.add_row(*row, style="red" if wrong else "")
    console.print(table)
    text = f"{missed} predictions missed" if missed else "every prediction met"
    without = f"; for {unknown} numbers (?) the profiler has no counter" if unknown else ""
    console.print(f"{len(results)} kernels: {text}{without}")
    return missed


def _known_metrics(ncu: str) -> set[str]:
    """The names of the profiler's metrics on this GPU; empty where it won't say."""
    said = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    return {line.split()[0] for line in said.stdout.splitlines() if "__" in line.split(" ")[0]}


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a prediction missed, 2 for bad usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="sm_90a", help="compiler target of the GPU (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=list(HEAD_DIMS), metavar="D")
    parser.add_argument("--compile-only", action="store_true", help="compile here, without a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was counted")
    parser.add_argument("--ncu", default=shutil.which("ncu") or "ncu", help="Nsight Compute (default: %(default)s)")
    parser.add_argument("--run", choices=("check", "count"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    try:
        chosen = cases(options.arch, options.head_dim)
    except ValueError as error:
        parser.error(str(error))
    if options.compile_only:
        return compile_only(chosen, console)
    if options.run:
        said = run(chosen, options.run == "check")
        if options.json:
            options.json.write_text(json.dumps(said))
        return 0
    if shutil.which(options.ncu) is None:
        parser.error(f"Nsight Compute is {options.ncu!r}, which is not found: give --ncu PATH, or --compile-only")
    passed = ["--arch", options.arch, "--head-dim", *map(str, options.head_dim)]
    results = measure(chosen, passed, options.ncu, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 1 if show(results, console) else 0


if __name__ == "__main__":
    sys.exit(main())
