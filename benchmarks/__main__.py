"""The command line: ``python -m benchmarks {attention,training,model,masks,serving,parts,show,peers,docs} --help``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import ahead, arguments, documents, masks, model, report, serving, training
from benchmarks import anchors as anchors_
from benchmarks import compare as compare_
from benchmarks import peers as peers_
from benchmarks import plot as plot_
from benchmarks.cases import DIRECTIONS, DTYPE_BYTES, GRIDS, SUITES, Case, Grid, cases_of, single_cases
from benchmarks.parts import command as parts
from benchmarks.results import KINDS, RATES, Keeper, Record, about_run, is_ours
from benchmarks.schedule import Schedule
from benchmarks.settings import Crew, Settings
from benchmarks.supervise import Supervisor, WorkerError
from cute_attn import command
from cute_attn.fill import processors

LOG_WIDTH = 240  # tables that are wrapped can't be read
# A grid's axes and the options that replace them.
AXES = {"head_dims": "head_dim", "causal": "mask", "seqlens": "seqlen", "directions": "direction"}
AXES |= {
    name: name for name in ("tokens", "batch", "heads", "gqa", "seqlen_k", "head_dim_v", "window", "softcap", "dtype")
}
EXIT_STATUS = """\
exit status: 1 where something that was asked for failed (a cell of ours or of a peer named by --peers; a peer that isn't
installed or doesn't compute a case is no failure, a run without any figure is one), where --compare found something worse,
or where the results can't be written; 2 for bad usage; 130 for Ctrl-C and 143 for SIGTERM, which keep what was measured
"""
EPILOG = f"""\
examples:
  python -m benchmarks attention --quick                        eight cells, under a minute
  python -m benchmarks attention --json r.json                  the whole grid, forward and backward, in bursts
  python -m benchmarks attention --backward --budget 150 --json r.json
  python -m benchmarks attention --suite models --json m.json    what models have and the grid does not; or --suite ragged
  python -m benchmarks attention --kind sustained --head-dim 128 --causal --seqlen 8k
  python -m benchmarks attention --kind burst host memory first --json r.json
  python -m benchmarks training --json t.json --plot training   a small transformer, beside eager attention
  python -m benchmarks model --json m.json                      a training step of a Llama, by its attention
  python -m benchmarks masks --json k.json                      users' masks and scores, beside FlexAttention
  python -m benchmarks show r.json --plot plots --compare old.json --anchors recorded.json

{EXIT_STATUS}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is :data:`EXIT_STATUS`."""
    return command.run(_parser(), COMMANDS, argv, LOG_WIDTH)


def measure(options: argparse.Namespace, console: Console) -> int:
    """``attention``: measure, keeping the JSON file up to date, then show."""
    began = time.monotonic()
    old, recorded = _inputs(options)
    crew = Crew(_names(options), tuple(options.peers_from), options.quick)
    settings = _settings(options)
    _check_cases(options, crew)
    record, interrupted = Record(), 0
    keeper = Keeper(options.json, lambda line: console.print(line, style="red"))
    ahead.switch_caches_on()
    with Watch(console) as watch:
        supervisor = Supervisor(crew, settings, watch.turn)
        try:
            supervisor.start()
            device = supervisor.about["card"]["device"]
            if device != "cuda":
                console.print("no CUDA GPU was found: measuring the reference and torch's CPU attention at small sizes")
            record.about = about_run(supervisor.about, settings, options)
            jobs = _jobs(options, device)
            if device == "cuda":
                _compile_ahead(jobs, record, settings, options, watch)
            _work(Schedule(jobs, settings, options.budget, began=began), supervisor, record, options, watch, keeper)
            record.about["after"] = supervisor.finish()
        except KeyboardInterrupt as error:
            interrupted = command.interrupted(error)
        except WorkerError as error:
            console.print(f"error: {error}", style="red")
            return 1
        finally:
            supervisor.stop()
    keeper.save(record)
    status = _show(record, old, recorded, options, console)
    if why := record.failure(crew.names or ()):
        console.print(why, style="red", highlight=False)
        status = 1
    return interrupted or status or int(keeper.failed)


def _compile_ahead(
    jobs: list[tuple[str, Case]], record: Record, settings: Settings, options: argparse.Namespace, watch: Watch
) -> None:
    work = ahead.tasks(record.about["peers"], jobs)
    if options.compile_jobs < 2 or len(work) < 2:
        return
    watch.begin(f"compiling, {options.compile_jobs} at a time", len(work))
    seconds = ahead.compile_ahead(work, options.compile_jobs, options.peers_from, settings.limit_s, watch.done)
    record.about["compile_ahead"] = {"kernels": len(work), "jobs": options.compile_jobs, "seconds": seconds}
    watch.restart()


def _work(
    schedule: Schedule,
    supervisor: Supervisor,
    record: Record,
    options: argparse.Namespace,
    watch: Watch,
    keeper: Keeper,
) -> None:
    """Make the visits in turn, as many as fit into the budget; none to a cell that everybody has lost."""
    last = 0
    for number, kind, case, rounds in schedule:
        if options.fresh_process and number != last:
            supervisor.stop()
        last = number
        watch.begin(f"pass {number + 1}, {kind}: {case.label}", len(schedule))
        if record.all_lost(kind, case):
            watch.advance()
            continue
        visit = supervisor.cell(kind, case, rounds, record.lost(kind, case))
        record.add(visit)
        record.complete = schedule.complete
        keeper.save(record)
        watch.done(report.cell_line(visit))
    record.complete = schedule.complete


class Watch:
    """The progress bar: which cell, whose turn. A log, which has no bar, gets a line for each cell that is done."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[peer]}", markup=False),
        )
        self._console = console
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("starting", total=None, peer="")

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, cell: str, total: int) -> None:
        self._progress.update(self._task, description=cell, total=total)

    def turn(self, peer: str | None) -> None:
        self._progress.update(self._task, peer=peer or "")

    def restart(self) -> None:
        self._progress.reset(self._task)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def done(self, line: str) -> None:
        self.advance()
        if not self._console.is_terminal:
            self._console.print(line, highlight=False)


def show(options: argparse.Namespace, console: Console) -> int:
    """``show``: tables, plots and comparison of a result file."""
    old, recorded = _inputs(options)
    return _show(Record.load(options.file), old, recorded, options, console)


def peers(options: argparse.Namespace, console: Console) -> int:
    """``peers``: who would take part on this machine, and who wouldn't, and why."""
    _register(options)
    for name, peer in peers_.REGISTRY.items():
        here = [device for device in peer.devices if device == "cpu" or torch.cuda.is_available()]
        found = peer.why_not() or (f"available on {' and '.join(here)}" if here else "needs a CUDA GPU, and torch finds none")
        console.print(f"{name}: {peer.about}: {found}")
    return 0


def docs(options: argparse.Namespace, console: Console) -> int:
    """``docs``: write the figures in the documents anew from the result files."""
    for name in documents.write_all() or ["nothing: the documents hold what the files say"]:
        console.print(f"wrote {name}")
    return 0


COMMANDS = {"attention": measure, "training": training.run, "model": model.run, "masks": masks.run, "serving": serving.run}
COMMANDS |= {"show": show, "peers": peers, "parts": parts.run, "docs": docs}


def _show(record: Record, old: Record | None, recorded: Any, options: argparse.Namespace, console: Console) -> int:
    if recorded is not None:
        recorded = recorded.rescaled_to(record)
    report.show(record, console, recorded)
    if options.csv:
        record.save_csv(options.csv)
    if options.plot:
        for path in plot_.plot(record, options.plot, recorded):
            console.print(f"wrote {path}", soft_wrap=True)
    if old is None:
        return 0
    return report.show_changes(compare_.compare(old, record), compare_.caveats(old, record), console)


def _inputs(options: argparse.Namespace) -> tuple[Record | None, anchors_.Anchors | None]:
    """The files that are read, read before anything is measured: a wrong path shouldn't cost a run."""
    old = Record.load(options.compare) if options.compare else None
    return old, anchors_.load(options.anchors) if options.anchors else None


def _names(options: argparse.Namespace) -> tuple[str, ...] | None:
    """The peers asked for, checked here so that a misspelt one is answered at once."""
    _register(options)
    if options.peers is None:
        return None
    names = tuple(name for name in options.peers.split(",") if name)
    if unknown := [name for name in names if name not in peers_.REGISTRY]:
        raise ValueError(f"no peer is called {', '.join(unknown)}; known: {', '.join(peers_.REGISTRY)}")
    return names


def _register(options: argparse.Namespace) -> None:
    """Import the modules that register more peers."""
    for module in options.peers_from:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--peers-from {module}: {error}; a module that Python can import is needed") from None


def _settings(options: argparse.Namespace) -> Settings:
    given = {
        "rounds": 3 if options.rounds is None and options.quick else options.rounds,
        "passes": options.passes,
        "burst_s": None if options.burst_ms is None else options.burst_ms / 1e3,
        "idle_s": None if options.idle_ms is None else options.idle_ms / 1e3,
        "sustained_s": options.seconds_per_cell,
        "limit_s": options.limit,
        "seed": options.seed,
    }
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _check_cases(options: argparse.Namespace, crew: Crew) -> None:
    """Refuse, before anything starts, sizes that can't be, and cases that our own peers can't compute where they take part."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_suite(options)
    _jobs(options, "cuda")  # the sizes of a run without a GPU are smaller
    names = peers_.REGISTRY if crew.names is None else crew.names
    if ours := [peers_.REGISTRY[name] for name in names if is_ours(name)]:
        on_gpu = device == "cuda" and any(device in peer.devices for peer in ours)
        for case in dict.fromkeys(case for _, case in _jobs(options, device)):
            peers_.check_ours(case, on_gpu)


def _check_suite(options: argparse.Namespace) -> None:
    """A suite's cases are its own: of the grid's axes only the direction says something about them."""
    given = [option for axis, option in AXES.items() if axis != "directions" and getattr(options, option) is not None]
    if options.suite is not None and (given or options.quick):
        raise ValueError(
            f"--suite {options.suite} is given with {', '.join(given or ['quick'])}, of the grid; one of both is needed: leave "
            f"out the one or the other"
        )


def _jobs(options: argparse.Namespace, device: str) -> list[tuple[str, Case]]:
    """What to measure, in the order of ``KINDS``: the rates of a grid, the rest of a case or two."""
    size = "cpu" if device != "cuda" else "quick" if options.quick else "full"
    grid = _grid(options, size)
    rates = grid.cases() if options.suite is None else cases_of(options.suite, grid.directions, 64 if size == "cpu" else 1)
    cases = {kind: rates if kind in RATES else single_cases(kind, grid.directions) for kind in KINDS}
    return [(kind, case) for kind in KINDS if kind in options.kind for case in cases[kind]]


def _grid(options: argparse.Namespace, name: str) -> Grid:
    """The named grid with the axes that were given instead of its own."""
    given: dict[str, Any] = {axis: getattr(options, option) for axis, option in AXES.items()}
    chosen: dict[str, Any] = {
        axis: tuple(x) if isinstance(x, list) else x for axis, x in given.items() if x is not None
    }
    return dataclasses.replace(GRIDS[name], **chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Attention against its peers, measured in turns and checked against float64.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    attention = commands.add_parser(
        "attention",
        help="rates over a grid of cases, against every peer that is installed",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_axes(attention.add_argument_group("cases", "each option replaces an axis of the default grid"))
    about = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    kinds = attention.add_argument_group("kinds of measurement", about)
    kinds.add_argument("--kind", nargs="+", choices=KINDS, default=["burst"], help="one or more; default: burst")
    kinds.add_argument("--burst-ms", type=arguments.milliseconds, help="timed work per burst (10)")
    kinds.add_argument("--idle-ms", type=arguments.rest_milliseconds, help="rest before a burst (50)")
    kinds.add_argument("--seconds-per-cell", type=arguments.seconds, help="sustained load per peer and cell (2)")
    _add_run(attention)

    show = commands.add_parser("show", help="tables, plots and comparison of a result file; needs no GPU")
    show.add_argument("file", type=Path, help="written by --json")
    _add_output(show)

    peers = commands.add_parser("peers", help="who can take part on this machine, and who can't, and why")
    peers.add_argument("--peers-from", nargs="+", default=[], metavar="MODULE", help="modules that register more peers")

    training.add_parser(commands)
    model.add_parser(commands)
    masks.add_parser(commands)
    serving.add_parser(commands)
    parts.add_parser(commands)
    commands.add_parser("docs", help="write the figures in README.md and docs/ anew from benchmarks/results; needs no GPU")
    return parser


def _add_axes(group: Any) -> None:
    grid = Grid()
    group.add_argument("--suite", choices=SUITES, help="cases of models, or packed and padded sequences, not the grid's")
    group.add_argument("--head-dim", type=command.positive, nargs="+", help=f"default: {_words(grid.head_dims)}")
    group.add_argument("--head-dim-v", type=command.positive, help="default: as --head-dim")
    group.add_argument("--seqlen", type=arguments.length, nargs="+", help="of queries, 8192 or 8k; default: 512 1k 2k 8k 16k")
    group.add_argument("--seqlen-k", type=arguments.length, help="of keys; default: as --seqlen")
    mask = group.add_mutually_exclusive_group()
    mask.add_argument("--causal", dest="mask", action="store_const", const=(True,), help="only causal cases")
    mask.add_argument("--full", dest="mask", action="store_const", const=(False,), help="only cases that aren't causal")
    group.add_argument("--window", type=arguments.reach, nargs=2, metavar=("LEFT", "RIGHT"), help="keys seen; -1: unbounded")
    group.add_argument("--softcap", type=arguments.softcap, help="default: 0, none")
    direction = group.add_mutually_exclusive_group()
    direction.add_argument("--direction", nargs="+", choices=DIRECTIONS, help=f"default: {_words(grid.directions)}")
    for name, what in (("forward", "only the forward pass"), ("backward", "only the backward pass")):
        direction.add_argument(f"--{name}", dest="direction", action="store_const", const=[name], help=what)
    group.add_argument("--dtype", choices=DTYPE_BYTES, help=f"default: {grid.dtype}")
    group.add_argument("--tokens", type=arguments.length, help=f"batch × query length; default: {grid.tokens}")
    group.add_argument("--batch", type=command.positive, help="default: tokens / query length")
    group.add_argument("--heads", type=command.positive, help=f"query heads; default: {grid.width} / head dim")
    group.add_argument("--gqa", type=command.positive, help="query heads per key head; default: 1")


def _add_run(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--quick", action="store_true", help="head dim 128, two lengths, three rounds, no slow starters")
    run.add_argument("--peers", metavar="A,B", help=f"only these: {', '.join(peers_.REGISTRY)}")
    run.add_argument("--peers-from", nargs="+", default=[], metavar="MODULE", help="modules that register more peers")
    rounds = "turns of each peer in a burst cell, in all passes (6); ten times as many in a host cell on a GPU"
    run.add_argument("--rounds", type=command.positive, help=rounds)
    run.add_argument("--passes", type=command.positive, help="times that the whole list of cells is gone through (3)")
    run.add_argument("--fresh-process", action="store_true", help="start each pass in a process of its own (seconds more)")
    run.add_argument("--limit", type=arguments.seconds, metavar="SECONDS", help="what one peer may use of one cell (120)")
    run.add_argument("--budget", type=arguments.seconds, metavar="SECONDS", help="fit the rounds into this, from start to end")
    run.add_argument("--compile-jobs", type=command.positive, default=processors(), metavar="N",
                     help="processes that compile kernels ahead; 1: each when its turn comes (%(default)s)")  # fmt: skip
    run.add_argument("--seed", type=arguments.seed, help="of the random inputs (0)")
    run.add_argument("--json", type=command.output_file, metavar="FILE", help="write the results here, after every cell")
    _add_output(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=command.output_file, metavar="FILE", help="one line per peer and cell")
    pictures = command.drawn(command.output_folder)
    output.add_argument("--plot", type=pictures, metavar="DIR", help="rates over length and ratios as SVG and PNG")
    output.add_argument("--compare", type=Path, metavar="OLD.json", help="what changed; exit status 1: something got slower")
    output.add_argument("--anchors", type=Path, metavar="FILE", help="show rates recorded on the same kind of card")


def _words(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
