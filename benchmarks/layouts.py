"""The layouts' proofs against hardware counters: ``python -m benchmarks.layouts --help``.

One micro-kernel for each copy and shared-memory layout, of a single block that makes the copy once for one tile; as shipped,
with the same layout unswizzled, and, for copies of whole rows, which have no conflicts even so, with one that makes them
conflict. Nsight Compute counts bank conflicts and sectors; ``cute_attn.layouts.tools.counts`` predicts them. Besides, without
the profiler, what each copy moved is checked element by element: the layout and the maps on the host say where in shared
memory, in which thread and value, or where in global memory it must be.

``--compile-only`` needs no GPU: it compiles the kernels and compares how many of its instruction each has with the proof's
count of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cutlass
from cutlass import Int16, Int32, cute, pipeline
from cutlass.cute import runtime
from cutlass.cute.nvgpu import cpasync
from rich.console import Console
from rich.table import Table

from benchmarks.counters import ALSO, AS_PREDICTED, COUNTERS, Case, Counted, CountersRecord, cases, parse, show
from cute_attn import command, layouts
from cute_attn.fill import processors
from cute_attn.layouts.base import WARP, Box, cute_layout
from cute_attn.layouts.fragments import transposed
from cute_attn.layouts.tools import algebra, prove
from cute_attn.mainloop.warps import MMA_K, LdmatrixOperand

HEAD_DIMS = (64, 96, 128, 256)
LOG_WIDTH = 180
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL
KERNELS = "regex:kernel_cutlass"
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
        if cutlass.const_expr(self.check and self.case.verb in ("load", "out")):
            self._move(image, raw, thread)
            if cutlass.const_expr(atom is not None):
                cute.arch.fence_view_async_shared()
            cute.arch.sync_threads()
        if cutlass.const_expr(atom is not None):
            self._tma(atom, coordinates, s, smem)
        elif cutlass.const_expr(self.case.verb == "in"):
            self._copy_in(mX, s, thread)
        elif cutlass.const_expr(self.case.verb == "load"):
            self._load(s, image, thread)
        elif cutlass.const_expr(self.case.verb == "store"):
            self._store(s, thread)
        else:
            self._copy_out(s, mX, thread)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.case.verb in ("in", "store")):
            if cutlass.const_expr(self.check):
                self._move(raw, image, thread)
            elif cutlass.const_expr(self.case.verb == "store"):
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

    def _tiled_copy(self):
        return prove.tiled_copy(self.case.step, self.case.operand, self.config, self.lay)

    @cute.jit
    def _copy_in(self, mX: cute.Tensor, s: cute.Tensor, thread: Int32):
        copy = self._tiled_copy()
        part = copy.get_slice(thread)
        cute.copy(copy, part.partition_S(mX), part.partition_D(s[None, None, 0]))
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)

    @cute.jit
    def _load(self, s: cute.Tensor, image: cute.Tensor, thread: Int32):
        """As the mainloops do, one step of the product after the other."""
        role, letter = prove.in_registers(self.case.step, self.case.operand, self.lay)
        mma = self.lay.tiled_mma(role, self.config)
        shape = self.case.shape
        if cutlass.const_expr(self.case.copy.transposed):
            s, shape = transposed(s), shape[::-1]
        where = getattr(mma.get_slice(thread), f"partition_{letter}")(cute.make_identity_tensor(shape))
        of_step = getattr(mma, f"partition_shape_{letter}")((shape[0], MMA_K))
        operand = LdmatrixOperand.of(self._tiled_copy(), s, of_step, thread)
        found = Int32(0)
        for k in cutlass.range_constexpr(shape[1] // MMA_K):
            loaded = operand.load(k, (0,))
            if cutlass.const_expr(self.check):
                found += self._misplaced(loaded, where[None, None, k])
            else:
                words = cute.recast_tensor(loaded, Int32)
                for i in cutlass.range_constexpr(cute.size(words)):
                    found = found ^ words[i]  # every value takes part: none may be left out
        image[thread] = (found if cutlass.const_expr(self.check) else found ^ (found >> 16)).to(Int16)

    @cute.jit
    def _misplaced(self, fragment: cute.Tensor, where) -> Int32:
        """Of the values of a fragment, those that are not the element that the MMA's map says."""
        numbers = cute.recast_tensor(fragment, Int16)
        wrong = Int32(0)
        for i in cutlass.range_constexpr(cute.size(numbers)):
            row, column = where[i][0], where[i][1]
            if cutlass.const_expr(self.case.copy.transposed):
                row, column = column, row
            expected = (row * self.case.shape[1] + column).to(Int16)
            wrong += Int32(1) if numbers[i] != expected else Int32(0)
        return wrong

    @cute.jit
    def _store(self, s: cute.Tensor, thread: Int32):
        role, _ = prove.in_registers(self.case.step, self.case.operand, self.lay)
        mma = self.lay.tiled_mma(role, self.config)
        part = mma.get_slice(thread)
        where = part.partition_C(cute.make_identity_tensor(self.case.shape))
        fragment = cute.make_rmem_tensor(part.partition_shape_C(self.case.shape), self.lay.element(self.config))
        numbers = cute.recast_tensor(fragment, Int16)
        for i in cutlass.range_constexpr(cute.size(numbers)):
            numbers[i] = (where[i][0] * self.case.shape[1] + where[i][1]).to(Int16)
        copy = self._tiled_copy()
        mine = copy.get_slice(thread)
        cute.copy(copy, mine.retile(fragment), mine.partition_D(s[None, None, 0]))

    @cute.jit
    def _copy_out(self, s: cute.Tensor, mX: cute.Tensor, thread: Int32):
        copy = self._tiled_copy()
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


def code(case: Case) -> str:
    """The PTX of the case's kernel, of nothing but the copy."""
    with tempfile.TemporaryDirectory() as folder:
        compiled(case, False, f"--keep-ptx --dump-dir={folder}")
        return next(Path(folder).rglob("*.ptx")).read_text()


def compile_only(chosen: Sequence[Case], console: Console) -> int:
    """Compile each kernel here and compare how often its instruction is in the code with the proof's count."""
    table = Table(title="compiled", title_justify="left")
    for name in ("case", "instruction", "layout"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "in the code"):
        table.add_column(name, justify="right")
    wrong = 0
    for case in chosen:
        compiled(case, True)
        each = 1 if isinstance(case.copy, Box) else case.threads // WARP
        predicted, found = case.predicted()["instructions"] // each, len(re.findall(PTX[case.instruction], code(case)))
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
        if check and case.verb == "in":
            tensor.copy_(torch.from_numpy(numbers.astype(np.int16)))
        elif check and case.verb in ("load", "out"):
            image.copy_(torch.from_numpy(there.astype(np.int16)))
            wanted = numbers if case.verb == "out" else np.zeros(case.threads, dtype=np.int64)
        function = compiled(case, check)
        function(tensor.view(torch.bfloat16).view(rows, columns), image, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        got = (tensor if case.verb == "out" else image).cpu().numpy()[: wanted.size]
        wrong = int((got != wanted.astype(np.int16)).sum()) if check else 0
        where = "threads got others" if case.verb == "load" else "elements elsewhere"
        said.append(f"{wrong} of {wanted.size} {where}" if wrong else AS_PREDICTED)
    return said


class FailedError(RuntimeError):
    """A process that counts or checks has failed."""


def measure(chosen: Sequence[Case], arguments: Sequence[str], ncu: str, jobs: int, console: Console) -> CountersRecord:
    """Run the kernels in processes of their own, once checked and once under the profiler.

    Raises ``FailedError`` where one of them fails."""
    again = [sys.executable, "-m", "benchmarks.layouts", *arguments]
    images = _checked(again, len(chosen), jobs)
    wanted = {name for counters in COUNTERS.values() for names in counters.values() for name in names} | set(ALSO)
    if known := _known_metrics(ncu):
        wanted = {name for name in wanted if name.rsplit(".", 1)[0] in known}
    profiled = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "-k", KERNELS]
    profiled += ["--metrics", ",".join(sorted(wanted)), *again, "--run", "count"]
    console.print(" ".join(profiled), style="dim", highlight=False, soft_wrap=True)
    with started(profiled, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, errors = process.communicate()
    counted = [{name: row[name] for name in sorted(wanted & row.keys())} for row in parse(said)]
    if process.returncode or len(counted) != len(chosen):
        tail = "\n".join((said + errors).splitlines()[-20:])
        raise FailedError(f"the profiler counted {len(counted)} kernels of {len(chosen)} ({process.returncode}):\n{tail}")
    return CountersRecord(_about(ncu), [Counted(*one) for one in zip(chosen, counted, images, strict=True)])


def _checked(again: Sequence[str], count: int, jobs: int) -> list[str]:
    """What is wrong with what each kernel moved; ``jobs`` processes, since compiling takes most of the time."""
    jobs = min(jobs, count)
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / f"{i}.json" for i in range(jobs)]
        with ExitStack() as stack:
            running = [
                stack.enter_context(started([*again, "--run", "check", "--slice", str(i), str(jobs), "--json", str(answer)]))
                for i, answer in enumerate(answers)
            ]
            codes = [process.wait() for process in running]
        if any(codes):
            raise FailedError("what the kernels moved could not be checked: a process failed, see above")
        said = [""] * count
        for i, answer in enumerate(answers):
            said[i::jobs] = json.loads(answer.read_text())
    return said


def _about(ncu: str) -> dict[str, Any]:
    """On what the counters were read."""
    from benchmarks import card

    said = subprocess.run([ncu, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Version (\S+)", said)
    about = card.about()
    about["versions"] |= {"nsight-compute": version[1]} if version else {}
    return about


def _known_metrics(ncu: str) -> set[str]:
    """The names of the profiler's metrics on this GPU; empty where it won't say."""
    said = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    return {line.split()[0] for line in said.stdout.splitlines() if "__" in line.split(" ")[0]}


@contextmanager
def started(arguments: Sequence[str], **how: Any) -> Iterator[subprocess.Popen]:
    """A process that doesn't outlive what waits for it: SIGTERM first, on which a profiler ends what it profiles."""
    process = subprocess.Popen(arguments, **how)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a prediction missed or nothing could be counted, 2 for bad usage, 130 for Ctrl-C."""
    return command.run(_parser(), COMMANDS, argv, LOG_WIDTH)


def layouts_against_counters(options: argparse.Namespace, console: Console) -> int:
    """The only command."""
    if options.show:
        return 0 if show(CountersRecord.load(options.show), console) else 1
    chosen = cases(options.arch, options.head_dim)
    if options.compile_only:
        return compile_only(chosen, console)
    if options.run:
        first, step = options.slice
        said = run(chosen[first::step], options.run == "check")
        if options.json:
            options.json.write_text(json.dumps(said))
        return 0
    if shutil.which(options.ncu) is None:
        raise ValueError(f"Nsight Compute is {options.ncu!r}, which is not found: give --ncu PATH, or --compile-only")
    passed = ["--arch", options.arch, "--head-dim", *map(str, options.head_dim)]
    try:
        found = measure(chosen, passed, options.ncu, options.jobs, console)
    except FailedError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 1
    if options.json:
        found.save(options.json)
    return 0 if show(found, console) else 1


COMMANDS = {"layouts": layouts_against_counters}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(command="layouts")
    parser.add_argument("--arch", default="sm_90a", help="compiler target of the GPU (default: %(default)s)")
    parser.add_argument("--head-dim", type=command.head_dim, nargs="+", default=list(HEAD_DIMS), metavar="D")
    parser.add_argument("--compile-only", action="store_true", help="compile here, without a GPU")
    parser.add_argument("--json", type=command.output_file, metavar="FILE", help="write everything that was counted")
    parser.add_argument("--show", type=Path, metavar="FILE", help="count nothing: what is predicted now beside such a file")
    parser.add_argument("--ncu", default=shutil.which("ncu") or "ncu", help="Nsight Compute (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=command.positive, default=min(8, processors()), help="processes that compile (%(default)s)"
    )
    parser.add_argument("--run", choices=("check", "count"), help=argparse.SUPPRESS)
    parser.add_argument("--slice", type=command.whole(0), nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
