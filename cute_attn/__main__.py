"""The command line: ``python -m cute_attn {info,compile,cache,demo} --help``."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from itertools import product

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cute_attn import command, fill, inventory, layouts, machine, sources
from cute_attn.cache import LINKERS, cache_dir, linker
from cute_attn.plan import configs
from cute_attn.problem import Problem

LOG_WIDTH = 120
EPILOG = """\
examples:
  python -m cute_attn info
  python -m cute_attn compile --arch sm_90a --head-dim 64 128         full and causal, with and without the LSE
  python -m cute_attn compile --arch sm_80 sm_86 --head-dim 128 --causal --no-lse -j 4
  python -m cute_attn compile --arch sm_90a --head-dim 128 --window-left --window-right --softcap
  python -m cute_attn compile --arch sm_90a --head-dim 128 --causal --gradients
  python -m cute_attn cache                                           what is in it, and how much may be
  python -m cute_attn demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 1 where something failed, 2 for bad usage, 130 for Ctrl-C, 143 for SIGTERM."""
    return command.run(_parser(), COMMANDS, argv, LOG_WIDTH)


def info(options: argparse.Namespace, console: Console) -> int:
    """``info``: what this machine has and which backend it gets."""
    table = _facts()
    table.add_row("machine", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in machine.versions().items():
        table.add_row(name, Text.assemble(version or "not installed", (f" ({machine.PACKAGES[name]})", "dim")))
    for name, (found, ours) in machine.integrations().items():
        table.add_row(name, Text.assemble(found, (f" ({ours})", "dim")))
    devices = machine.devices()
    for index, device in enumerate(devices):
        serves = f"{device.target}, {device.module}, {' or '.join(device.mechanisms)}" if device.target else device.why_not
        capability = ".".join(map(str, device.capability))
        table.add_row(
            f"GPU {index}", f"{device.name}, {device.memory_bytes / 2**30:.0f} GiB, capability {capability}: {serves}"
        )
    if not devices:
        table.add_row("GPU", f"none; kernels can be compiled here for {', '.join(layouts.known_targets())}")
    try:
        table.add_row("cache", f"{cache_dir()}: {inventory.described(inventory.entries(cache_dir()))}")
    except OSError as error:
        table.add_row("cache", f"none: {error}")
    none = f"none of {', '.join(LINKERS)}: kernels are kept as objects, and loading one imports the DSL"
    table.add_row("linker", linker() or none)
    name, why = machine.backend()
    table.add_row("backend", Text.assemble((name, "bold green"), f": {why}"))
    if name == "cute":
        table.add_row("", "CUDA tensors run the kernels; others, or backend='reference', the reference")
    console.print(table)
    return 0


def compile_kernels(options: argparse.Namespace, console: Console) -> int:
    """``compile``: fill the cache. Exit status 1 where a kernel can't be compiled, or not be kept."""
    command.output_folder(str(cache_dir()))
    kernels = [
        (problem, config)
        for target in options.arch or _targets_here()
        for problem in _problems(options)
        for config in configs(problem, target, options.mechanism)
    ]
    began, counts = time.monotonic(), dict.fromkeys(("hit", "compiled", "not kept", "failed"), 0)
    console.print(f"{len(kernels)} kernels for {cache_dir()}", highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(kernels))
        for outcome in fill.fill(kernels, options.jobs):
            counts[outcome.how] += 1
            progress.advance(task)
            line = f"{outcome.name}  {outcome.seconds:6.2f} s  {outcome.how}  ({outcome.asked})"
            progress.console.print(line, style="red" if outcome.error else None, highlight=False, soft_wrap=True)
            if outcome.error:
                progress.console.print(f"  {outcome.error}", highlight=False)
    summary = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
    console.print(f"{summary} in {time.monotonic() - began:.1f} s", highlight=False)
    return 1 if counts["failed"] or counts["not kept"] else 0


def cache(options: argparse.Namespace, console: Console) -> int:
    """``cache``: what the folder of compiled kernels holds, and clearing it."""
    folder, ours = cache_dir(), sources.fingerprint()
    found = inventory.entries(folder)
    mine = [entry for entry in found if ours.startswith(entry.fingerprint)]
    others = [entry for entry in found if entry not in mine]
    if options.clear or options.clear_others:
        gone = found if options.clear else others
        inventory.remove(gone)
        console.print(f"removed {inventory.described(gone)} from {folder}", highlight=False, soft_wrap=True)
        return 0
    table = _facts()
    table.add_row("folder", str(folder))
    table.add_row("holds", inventory.described(found))
    table.add_row("of this version", inventory.described(mine))
    table.add_row("of others", inventory.described(others))
    table.add_row("limit", f"{inventory.size_limit() / 2**20:,.1f} MiB ({inventory.CACHE_SIZE_VARIABLE})")
    console.print(table)
    return 0


def demo(options: argparse.Namespace, console: Console) -> int:
    """``demo``: attention here, and what the compiler makes of the kernels."""
    from cute_attn import demo as demo_

    return demo_.run(console)


COMMANDS = {"info": info, "compile": compile_kernels, "cache": cache, "demo": demo}


def _facts() -> Table:
    """Names and what there is to say of them."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def _targets_here() -> list[str]:
    """The targets of this machine's GPUs."""
    targets = sorted({device.target for device in machine.devices() if device.target})
    if not targets:
        raise ValueError(f"--arch is needed where there is no GPU: one or more of {', '.join(layouts.known_targets())}")
    return targets


def _problems(options: argparse.Namespace) -> list[Problem]:
    """What the options ask for: one combination of rules if any is given, otherwise every one, or what most models have."""
    rules = (options.window_left, options.causal or options.window_right, options.softcap)
    if options.all and any(rules):
        raise ValueError("--all is every combination of rules: leave out --causal, --window-left, --window-right, --softcap")
    off, either = (False,), (False, True)
    sets = [rules] if any(rules) else list(product(either, either, either) if options.all else product(off, either, off))
    lse = either if options.lse is None else (options.lse,)
    found = [
        Problem(dtype, head_dim, options.head_dim_v or head_dim, left, right, softcap, asked)
        for dtype, head_dim, (left, right, softcap), asked in product(options.dtype, options.head_dim, sets, lse)
    ]
    if options.gradients:
        found += fill.training(found)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cute_attn",
        description="Exact fused attention: this machine, its compile cache, and a demonstration.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this machine has, other libraries included, and which backend a call gets and why")
    kept = commands.add_parser("cache", help="what the compile cache holds, and clearing it")
    clear = kept.add_mutually_exclusive_group()
    clear.add_argument("--clear", action="store_true", help="remove every kernel; files of other programs stay")
    clear.add_argument(
        "--clear-others", action="store_true", help="remove kernels of other versions of cute-attn, the DSL, torch or Python"
    )
    commands.add_parser("demo", help="attention here against float64, and what the compiler makes of the kernels")

    ahead = commands.add_parser("compile", help="fill the compile cache ahead of time, for any GPU")
    targets = layouts.known_targets()
    ahead.add_argument("--arch", nargs="+", choices=targets, help="default: this machine's GPU")
    ahead.add_argument("--mechanism", choices=command.mechanisms(), help="default: the GPU's best")
    ahead.add_argument("--head-dim", type=command.head_dim, nargs="+", default=[64, 128], help="of q and k; default: 64 128")
    ahead.add_argument("--head-dim-v", type=command.head_dim, help="of v; default: as --head-dim")
    ahead.add_argument("--dtype", nargs="+", choices=command.DTYPES, default=["bfloat16"], help="default: bfloat16")
    rules = ahead.add_argument_group(
        "rules", "the ones a call uses, together; without any, full and causal attention are compiled"
    )
    rules.add_argument("--causal", action="store_true", help="causal=True: the same kernel as --window-right")
    rules.add_argument("--window-left", action="store_true", help="a window with a bound on the left, of any size")
    rules.add_argument("--window-right", action="store_true", help="a window with a bound on the right, of any size")
    rules.add_argument("--softcap", action="store_true", help="a softcap of any size")
    rules.add_argument("--lse", action=argparse.BooleanOptionalAction, help="return_lse=True, or not; default: both")
    rules.add_argument("--all", action="store_true", help="every combination of rules")
    ahead.add_argument("--gradients", action="store_true", help="the backward pass too, for gradients of q, k and v")
    said = "worker processes; default: one a CPU"
    ahead.add_argument("-j", "--jobs", type=command.positive, default=fill.processors(), metavar="N", help=said)
    return parser


if __name__ == "__main__":
    sys.exit(main())
