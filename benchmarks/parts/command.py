"""The command line of the parts: ``python -m benchmarks parts``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import arguments
from benchmarks.parts import catalogue, kernels, show
from benchmarks.parts import plot as plot_
from benchmarks.parts.catalogue import Probe
from benchmarks.parts.results import PartsRecord
from benchmarks.parts.shapes import SEQLEN, SHAPES, named
from benchmarks.parts.worker import Measurer, lost_figure
from benchmarks.results import Keeper, about_run
from benchmarks.settings import Settings
from benchmarks.supervise import WorkerError
from cute_attn import command
from cute_attn.fill import processors

ABOUT = "the parts of the kernels against the hardware's limits, and the part that holds a configuration back"
DEFAULT_TARGET = "sm_90a"
NO_GPU = 2
ROUNDS, BURST_SECONDS, IDLE_SECONDS, LIMIT_SECONDS = 3, 0.008, 0.02, 60.0
EPILOG = """\
examples:
  python -m benchmarks parts --json parts.json --plot plots     everything
  python -m benchmarks parts --config d128-causal               one configuration, and what holds it back
  python -m benchmarks parts copies softmax --mechanism cp_async
  python -m benchmarks parts --compile-only --arch sm_90a       compile all of it, without a GPU
  python -m benchmarks parts --show parts.json --plot plots     tables and plots of a result file
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "parts", help=ABOUT, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, description=ABOUT
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(catalogue.PARTS)}")
    parser.add_argument("--config", nargs="+", metavar="NAME", help=f"only these: {', '.join(SHAPES)}")
    parser.add_argument("--mechanism", help="instead of the GPU's best, and of all where that is cheap")
    parser.add_argument("--seqlen", type=arguments.length, default=SEQLEN, help="of the whole kernels, 8192 or 8k (8k)")
    parser.add_argument("--rounds", type=command.positive, default=ROUNDS, help=f"turns that each probe takes ({ROUNDS})")
    parser.add_argument("--limit", type=arguments.seconds, default=LIMIT_SECONDS, metavar="SECONDS", help="of one probe")
    build = parser.add_argument_group("compiling")
    build.add_argument("--compile-only", action="store_true", help="compile and look into the code; needs no GPU")
    build.add_argument("--arch", help=f"target to compile for (the GPU's; {DEFAULT_TARGET} where there is none)")
    jobs = max(1, processors() - 1)
    build.add_argument("--jobs", type=command.positive, default=jobs, help="processes that compile (%(default)s)")
    build.add_argument("--cache", type=command.output_folder, metavar="DIR", help="of compiled kernels (the project's)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=command.output_file, metavar="FILE", help="write the results here, after every job")
    pictures = command.drawn(command.output_folder)
    output.add_argument("--plot", type=pictures, metavar="DIR", help="bars with their limits as SVG and PNG")
    output.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: show a file written by --json")


def run(options: argparse.Namespace, console: Console) -> int:
    """``parts``: compile, measure, show. Exit status: 1 where something failed, 2 without a GPU or for bad usage."""
    if options.show:
        return _show(PartsRecord.load(options.show), options, console)
    target, device = find_target(options.arch)
    shapes = [named(name) for name in dict.fromkeys(options.config or SHAPES)]
    parts = options.parts or tuple(catalogue.PARTS)
    every = options.config is None
    found = catalogue.probes(target, shapes, parts, options.mechanism, every=every, seqlen=options.seqlen)
    folder = options.cache or command.output_folder(str(cache_folder()))
    if device and not options.compile_only and target != find_target(None)[0]:
        raise ValueError(f"--arch is {target} and the GPU is another; add --compile-only, or leave --arch out")
    if options.compile_only:
        return _compile_only(found, folder, options.jobs, console)
    if not device:
        console.print(show.listing(found))
        console.print("no CUDA GPU was found: nothing was measured (--compile-only compiles without one)")
        return NO_GPU
    return _measure(found, target, folder, options, console)


def _measure(found: list[Probe], target: str, folder: Path, options: argparse.Namespace, console: Console) -> int:
    clock = clock_kernel(target)
    wanted = [probe.kernel for probe in found if probe.kernel is not None]
    done = _build([clock, *wanted], folder, options.jobs, console)
    failed = {kernel: why_not(built) for kernel, built in done.items() if not built.ok}
    record = PartsRecord()
    settings = Settings(rounds=options.rounds, burst_s=BURST_SECONDS, idle_s=IDLE_SECONDS, limit_s=options.limit)
    jobs = catalogue.jobs(found)
    interrupted = 0
    keeper = Keeper(options.json, lambda line: console.print(line, style="red"))
    with _progress(console) as progress:
        task = progress.add_task("measuring", total=len(found))
        measurer = Measurer(
            settings,
            None if clock in failed else clock,
            folder,
            lambda key: progress.update(task, description=key or "measuring"),
        )
        try:
            measurer.start()
            record.about = about_run(measurer.about, settings, options)
            for job in jobs:
                ready = [probe for probe in job if probe.kernel not in failed]
                figures = {p.key: lost_figure(p, "failed", failed[p.kernel]) for p in job if p.kernel in failed}
                if ready:
                    figures |= {p.key: f for p, f in zip(ready, measurer.figures(ready), strict=True)}
                for probe in job:
                    figures[probe.key].spills = done[probe.kernel].spills if probe.kernel else None
                record.figures += [figures[probe.key] for probe in job]
                progress.advance(task, len(job))
                if not console.is_terminal:
                    console.print(show.job_line(job[0].turns, record.figures[-len(job) :]))
                keeper.save(record)
            record.complete = True
            record.about["after"] = measurer.finish()
        except KeyboardInterrupt as error:
            interrupted = command.interrupted(error)
        except WorkerError as error:
            console.print(f"error: {error}", style="red")
        finally:
            measurer.stop()
    keeper.save(record)
    return interrupted or _show(record, options, console) or int(keeper.failed)


def _show(record: PartsRecord, options: argparse.Namespace, console: Console) -> int:
    if options.plot:
        for path in plot_.plot(record, options.plot):
            console.print(f"wrote {path}", soft_wrap=True)
    show.show(record, console)  # last, so that the sentence ends it
    return 0 if record.complete and all(figure.status == "ok" for figure in record.figures) else 1


def _compile_only(found: list[Probe], folder: Path, jobs: int, console: Console) -> int:
    """Compile everything anew and look into the code; 1 where a kernel can't be compiled or lacks its instructions."""
    wanted = [probe.kernel for probe in found if probe.kernel is not None]
    if any(probe.part == "launch" for probe in found):
        wanted.append(clock_kernel(wanted[0].config.target))
    if not kernels.can_look():
        console.print("without cuobjdump and nvdisasm (pip install 'cute-attn[test]') the code isn't looked into")
    done = _build(wanted, folder, jobs, console, anew=True)
    bad = [kernel for kernel, built in done.items() if not built.ok]
    console.print(f"{len(done)} kernels compiled, {len(bad)} of them failed or lack what they are to measure")
    return 1 if bad else 0


def _build(
    wanted: Sequence[kernels.Kernel], folder: Path, jobs: int, console: Console, anew: bool = False
) -> dict[kernels.Kernel, kernels.Built]:
    with _progress(console) as progress:
        task = progress.add_task("compiling", total=len(set(wanted)))

        def watch(kernel: kernels.Kernel, built: kernels.Built) -> None:
            progress.advance(task)
            if anew or not built.ok:
                console.print(show.built_line(kernel.label, built), highlight=False)

        return kernels.build(wanted, folder, jobs=jobs, anew=anew, watch=watch)


def why_not(built: kernels.Built) -> str:
    """Why a kernel isn't measured: it could not be compiled, or doesn't do what it would be measured for."""
    return built.error or f"the compiler left out {', '.join(built.missing)}"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def clock_kernel(target: str) -> kernels.Kernel:
    """The kernel that the SM clock is read with; the configuration it carries says no more than the target."""
    from benchmarks.parts.shapes import mechanisms

    shape = SHAPES["d128"]
    return kernels.Kernel("launch", "clock", shape.problem, shape.config(target, mechanisms(target)[0]))


def find_target(arch: str | None) -> tuple[str, bool]:
    """``(compiler's target, whether a GPU is there)``. Raises ``ValueError`` for a target without layouts."""
    import torch

    from cute_attn import layouts

    device = torch.cuda.is_available()
    try:
        if arch is None:
            arch = layouts.target_of(torch.cuda.get_device_capability()) if device else DEFAULT_TARGET
        layouts.for_target(arch)
    except NotImplementedError as error:
        raise ValueError(str(error)) from None
    return arch, device


def cache_folder() -> Path:
    from cute_attn.cache import cache_dir

    return cache_dir() / "parts"
