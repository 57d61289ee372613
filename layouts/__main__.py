"""The command line: ``python -m cute_attn.layouts check --help``. Needs neither a GPU nor CUDA."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from . import family, for_target, known_targets
from .base import KIB, OPERANDS, Config

LOG_WIDTH = 180  # a log has no width of its own
DTYPES = ("float16", "bfloat16")
DETAILS = 2  # configs at most whose every step is shown unasked
EPILOG = """\
examples:
  python -m cute_attn.layouts check                              every shipped config, one line each
  python -m cute_attn.layouts check sm_90a --head-dim 128        every step of every operand, and the budgets
  python -m cute_attn.layouts check sm_90a --operand K --details
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 1 where something was found, 2 for bad usage."""
    parser = _parser()
    options = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    try:
        return COMMANDS[options.command](options, console)
    except ValueError as error:
        parser.error(str(error))


def check(options: argparse.Namespace, console: Console) -> int:
    """``check``: prove what must hold of each layout; print what was counted, and what does not hold."""
    chosen = configs(options.arch, options.head_dim, options.head_dim_v, options.dtype)
    try:
        from . import prove
    except ImportError as error:
        console.print(f"left out: all proofs ({error}): try pip install nvidia-cutlass, which has pycute", markup=False)
        return 1
    operands = _operands(options.operand)
    found: list[prove.Finding] = []
    reports = []
    for config, head_dim in chosen:
        rows = prove.report(config, head_dim)
        shown = [row for row in rows if row.operand in operands or (row.operand == "P" and not options.operand)]
        reports.append((config, shown))
        found += [finding for row in shown for finding in row.findings]
        if not options.operand:
            found += prove.budget_findings(config, for_target(config.target).GPU, family(config))
    only = [config for config, _ in chosen]
    left_out = ""
    try:
        found += prove.against_dsl(only)
    except (ImportError, NotImplementedError) as error:
        left_out = f"left out: the DSL's layouts against these ({error})"
    if options.details or len(reports) <= DETAILS:
        for config, rows in reports:
            console.print(_steps(prove.title(config), rows))
            if not options.operand:
                console.print(_budget(config))
    else:
        console.print(_summary(reports))
    for finding in found:
        console.print(f"{finding.check}: {finding}", style="red", markup=False, highlight=False)
    if left_out:
        console.print(left_out, style="yellow", markup=False, highlight=False)
    every = sum(len(rows) for _, rows in reports)
    text = f"{_count(len(reports), 'config')}, {_count(every, 'step')}: " + (
        _count(len(found), "finding") if found else "everything holds"
    )
    console.print(text, style="bold red" if found else "bold green", highlight=False)
    return 1 if found else 0


def configs(
    arch: str | None = None, head_dim: int | None = None, head_dim_v: int | None = None, dtype: str | None = None
) -> list[tuple[Config, int | None]]:
    """The shipped configs that are asked for, each with the tensors' head dim (``None``: as wide as the tile).

    Without a head dim, every one that a mechanism has a tile for. Raises ``ValueError`` with what is known.
    """
    from cute_attn.problem import HEAD_DIM_MAX, HEAD_DIM_STEP, Problem  # it brings torch: not before the usage is read

    targets, dtypes = known_targets(), (dtype,) if dtype else DTYPES
    if arch is not None and arch not in targets:
        raise ValueError(f"arch is {arch!r}; known ones are {', '.join(targets)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known ones are {', '.join(DTYPES)}")
    for name, value in (("head dim", head_dim), ("head dim of V", head_dim_v)):
        if value is not None and (not 0 < value <= HEAD_DIM_MAX or value % HEAD_DIM_STEP):
            known = f"{HEAD_DIM_STEP}, {2 * HEAD_DIM_STEP} … {HEAD_DIM_MAX}"
            raise ValueError(f"{name} is {value}; known ones are the multiples of {HEAD_DIM_STEP}: {known}")
    found: dict[Config, int | None] = {}
    for target in (arch,) if arch else targets:
        module = for_target(target)
        for mechanism, operands in module.MECHANISMS.items():
            for dim in (head_dim,) if head_dim else operands.TILE_DIMS:
                for name in dtypes:
                    for bounded in (False, True):
                        problem = Problem(name, dim, head_dim_v or dim, bounded_right=bounded)
                        for config in module.configs(problem, mechanism, target):
                            found.setdefault(config, head_dim)
    return list(found.items())


def _operands(name: str | None) -> tuple[str, ...]:
    if name is not None and name not in OPERANDS:
        raise ValueError(f"operand is {name!r}; known ones are {', '.join(OPERANDS)}")
    return (name,) if name else OPERANDS


# ---- tables ----------------------------------------------------------------------------------------------------------


def _steps(title: str, rows) -> Table:
    """Every step of a config. ``bytes`` are those of a thread's access to global memory, or of a row of a TMA box; ``a
    request`` those of a warp's or of a whole box, in whole sectors."""
    table = Table(title=title, title_justify="left")
    for name in ("operand", "step", "instruction", "layout, map or box"):
        table.add_column(name, overflow="fold")
    for name in ("bank accesses", "conflicts", "bytes", "a request", "sectors", "needed", "holds"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        banks, sectors = row.banks, row.sectors
        if last not in (None, row.operand):
            table.add_section()
        table.add_row(
            row.operand if row.operand != last else "",
            row.step,
            row.instruction,
            row.layout,
            str(banks.accesses) if banks else "",
            str(banks.conflicts) if banks else "",
            str(sectors.access_bytes) if sectors else "",
            f"{sectors.request_bytes:.0f}" if sectors else "",
            str(sectors.asked) if sectors else "",
            str(sectors.needed) if sectors else "",
            _verdict(len(row.findings)),
        )
        last = row.operand
    return table


def _budget(config: Config) -> Table:
    """What takes what."""
    from . import prove

    table = Table(title=f"{prove.title(config)}: what takes what", title_justify="left")
    for name, justify in (("resource", "left"), ("part", "left"), ("takes", "right"), ("of", "right"), ("", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    last = None
    for line in prove.budget(config, for_target(config.target).GPU, family(config)):
        if last not in (None, line.resource):
            table.add_section()
        share = f"{line.amount / line.limit:.0%}" if line.limit else ""
        style = "" if line.limit is None else "red" if line.amount > line.limit else "green"
        resource = line.resource if line.resource != last else ""
        table.add_row(resource, line.part, _amount(line.amount, line.unit), _amount(line.limit, line.unit), share, style=style)
        last = line.resource
    return table


def _summary(reports) -> Table:
    """One line for each config."""
    table = Table(title="layouts", title_justify="left")
    for name in ("arch", "mechanism", "dtype", "head", "tiles", "stages"):
        table.add_column(name)
    table.add_column("K in shared memory", no_wrap=True)
    for name in ("shared KiB", "registers", "conflicts", "sectors / needed", "holds"):
        table.add_column(name, justify="right")
    from . import prove

    merged: dict[Config, list] = {}
    for config, rows in reports:  # the dtypes of one config share a line
        merged.setdefault(replace(config, dtype=""), []).append((config.dtype, rows))
    last = None
    for config, group in merged.items():
        module, rows = family(config), [row for _, rows in group for row in rows]
        gpu = for_target(config.target).GPU
        if last not in (None, (config.target, config.mechanism)):
            table.add_section()
        last = (config.target, config.mechanism)
        moved = [row.sectors for row in rows if row.sectors]
        wrong = sum(len(row.findings) for row in rows) + len(prove.budget_findings(config, gpu, module))
        table.add_row(
            config.target,
            config.mechanism,
            "both" if len(group) > 1 else group[0][0],
            str(config.tile_d) if config.tile_d == config.tile_dv else f"{config.tile_d}/{config.tile_dv}",
            f"{config.tile_m}×{config.tile_n}",
            str(config.stages),
            str(module.smem("K", config)),
            f"{module.smem_bytes(config) / KIB:.0f}/{gpu.smem_per_block / KIB:.0f}",
            f"{module.accumulator_registers(config)}/{prove.registers_per_thread(config, gpu)}",
            str(sum(row.banks.conflicts for row in rows if row.banks) // len(group)),
            f"{sum(x.asked for x in moved) / max(1, sum(x.needed for x in moved)):.2f}",
            _verdict(wrong),
        )
    return table


def _amount(number: int | None, unit: str) -> str:
    if number is None:
        return ""
    return f"{number / KIB:.1f} KiB" if unit == "bytes" else str(number)


def _verdict(findings: int) -> str:
    return f"[red]{_count(findings, 'finding')}[/]" if findings else "[green]yes[/]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


# ---- usage -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cute_attn.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="prove what must hold of every layout")
    one.add_argument("arch", nargs="?", metavar="ARCH", help=f"one of {', '.join(known_targets())}; default: all")
    one.add_argument("--head-dim", type=int, metavar="D", help="of the tensors; default: every tile's")
    one.add_argument("--head-dim-v", type=int, metavar="D", help="of V and O, where it differs")
    one.add_argument("--dtype", metavar="T", help=f"{' or '.join(DTYPES)}; default: both")
    one.add_argument("--operand", metavar="X", help=f"one of {', '.join(OPERANDS)}; default: all, and the budgets")
    one.add_argument("--details", action="store_true", help="every step, however many configs there are")
    return parser


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {"check": check}


if __name__ == "__main__":
    sys.exit(main())
