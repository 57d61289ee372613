"""Layouts: proofs, pictures, and new modules. The command line, which needs neither a GPU nor CUDA."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cute_attn import command, plan
from cute_attn.problem import HEAD_DIM_MAX, HEAD_DIM_STEP, Problem

from . import ENTRY_POINTS, family, for_target, known_targets, modules, source
from .base import KIB, OPERANDS, SMEM_RESERVED, Config, Gpu

LOG_WIDTH = 180
BACKWARD_FIELDS = ("tile_m", "tile_n", "step_m", "stages", "mma_warps", "key_warps", "blocks_per_multiprocessor")
EPILOG = """\
examples:
  python -m cute_attn.layouts check                              every shipped config, one line each
  python -m cute_attn.layouts check sm_90a --head-dim 128        every step of every operand, and the budgets
  python -m cute_attn.layouts check sm_90a --operand dO --details  every step of dO, at every head dim
  python -m cute_attn.layouts show sm_90a K --head-dim 128       K in shared memory, in colours
  python -m cute_attn.layouts show sm_80 V --picture load --svg v.svg --png v.png
  python -m cute_attn.layouts show sm_90a block --svg block.svg  who copies what where, stage by stage
  python -m cute_attn.layouts show sm_90a dS --gradients --picture store              the backward pass's
  python -m cute_attn.layouts show sm_90a block --gradients --head-dim 256 --picture queries
  python -m cute_attn.layouts show sm_90a block --gradients --head-dim 192 --head-dim-v 128 --tile-m 48
  python -m cute_attn.layouts new sm_123 --like sm_80 --smem-kib 99      the module of a new GPU
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 1 where something was found, 2 for bad usage."""
    return command.run(_parser(), COMMANDS, argv, LOG_WIDTH)


def check(options: argparse.Namespace, console: Console) -> int:
    """``check``: prove what must hold of each layout; print what was counted, and what does not hold."""
    asked = options.arch, options.head_dim, options.head_dim_v, options.dtype
    chosen = configs(*asked) + configs(*asked, gradients="qkv")
    try:
        from .tools import prove
    except ImportError as error:
        console.print(f"left out: all proofs ({error}): try pip install nvidia-cutlass, which has pycute")
        return 1
    if operand := options.operand:
        known = list(dict.fromkeys(name for config, _ in chosen for name in prove.operands(config)))
        if operand not in known:
            raise ValueError(f"operand is {operand!r}; known ones are {', '.join(known)}")
        chosen = [(config, head_dim) for config, head_dim in chosen if operand in prove.operands(config)]
    found: list[prove.Finding] = []
    reports = []
    for config, head_dim in chosen:
        shown = [row for row in prove.report(config, head_dim) if operand in (None, row.operand)]
        reports.append((config, shown))
        found += [finding for row in shown for finding in row.findings]
        if not operand:
            found += prove.budget_findings(config, for_target(config.target).GPU, family(config))
    only = [config for config, _ in chosen]
    left_out = ""
    try:
        found += prove.against_dsl(only)
    except (ImportError, NotImplementedError) as error:
        left_out = f"left out: the DSL's layouts against these ({error})"
    if options.details or (options.arch and options.head_dim):
        for config, rows in _alike(reports):
            console.print(_steps(prove.title(config), rows))
            if not operand:
                console.print(_budget(config))
    else:
        console.print(_summary(reports))
    for finding in found:
        console.print(f"{finding.check}: {finding}", style="red", highlight=False)
    if left_out:
        console.print(left_out, style="yellow", highlight=False)
    every = sum(len(rows) for _, rows in reports)
    text = f"{_count(len(reports), 'config')}, {_count(every, 'step')}: " + (
        _count(len(found), "finding") if found else "everything holds"
    )
    console.print(text, style="bold red" if found else "bold green", highlight=False)
    return 1 if found else 0


def show(options: argparse.Namespace, console: Console) -> int:
    """``show``: one picture, in the terminal and in files."""
    config = _shown(options)
    try:
        from .tools import blocks, pictures
    except ImportError as error:
        console.print(f"left out: the picture ({error}): try pip install nvidia-cutlass, which has pycute")
        return 1
    if options.operand == pictures.BLOCK:
        canvas = blocks.block(config, options.picture or blocks.kernels(config)[0])
        for line in canvas.lines():
            console.print(line, highlight=False)
    else:
        picture = options.picture or pictures.first(options.operand, config)
        grids = pictures.figure(options.operand, picture, config)
        console.print(pictures.title(options.operand, picture, config), style="bold", highlight=False)
        for grid in grids:
            console.print(pictures.terminal(grid))
        canvas = pictures.drawn(options.operand, picture, config)
    if options.svg:
        command.write_whole(options.svg, canvas.svg())
    if options.png:
        canvas.png(options.png)
    return 0


def gallery(options: argparse.Namespace, console: Console) -> int:
    """``gallery``: the shipped layouts as SVGs, and the README.md that shows them."""
    try:
        from .tools import gallery as shipped
    except ImportError as error:
        console.print(f"left out: the gallery ({error}): try pip install nvidia-cutlass, which has pycute")
        return 1
    folder, files = options.output, shipped.gallery()
    for name, text in files.items():
        command.write_whole(folder / name, text)
    size = sum(len(text.encode()) for text in files.values())
    console.print(f"{_count(len(files), 'file')}, {size / KIB:.0f} KiB, in {folder}", highlight=False, soft_wrap=True)
    return 0


def _shown(options: argparse.Namespace) -> Config:
    """The one config that a picture is of. Raises ``ValueError`` with what is known."""
    configs(options.arch, options.head_dim, options.head_dim_v, options.dtype)  # refuses what is unknown
    gradients, head_dim_v = "qkv" if options.gradients else "", options.head_dim_v or options.head_dim
    problem = Problem(options.dtype, options.head_dim, head_dim_v, bounded_right=options.causal, gradients=gradients)
    found = plan.configs(problem, options.arch, options.mechanism)
    for config in found:
        if options.tile_m in (None, config.tile_m):
            return config
    known = ", ".join(map(str, dict.fromkeys(config.tile_m for config in found)))
    raise ValueError(f"tile-m is {options.tile_m}; of this problem there are {known}")


def configs(
    arch: str | None = None,
    head_dim: int | None = None,
    head_dim_v: int | None = None,
    dtype: str | None = None,
    gradients: str = "",
) -> list[tuple[Config, int | None]]:
    """The shipped configs that are asked for, each with the tensors' head dim (``None``: as wide as the tile); with
    ``gradients`` those of the backward pass.

    Without a head dim, every one that a mechanism has a tile for; and of V's narrower ones those of which more differs. Raises
    ``ValueError`` with what is known.
    """
    targets, dtypes = known_targets(), (dtype,) if dtype else command.DTYPES
    if arch is not None and arch not in targets:
        raise ValueError(f"arch is {arch!r}; known ones are {', '.join(targets)}")
    if dtype is not None and dtype not in command.DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known ones are {', '.join(command.DTYPES)}")
    for name, value in (("head dim", head_dim), ("head dim of V", head_dim_v)):
        if value is not None and (not 0 < value <= HEAD_DIM_MAX or value % HEAD_DIM_STEP):
            known = f"{HEAD_DIM_STEP}, {2 * HEAD_DIM_STEP} … {HEAD_DIM_MAX}"
            raise ValueError(f"{name} is {value}; known ones are the multiples of {HEAD_DIM_STEP}: {known}")
    found: dict[Config, int | None] = {}
    for target in (arch,) if arch else targets:
        module = for_target(target)
        if gradients and not hasattr(module, "BACKWARD"):
            continue
        for mechanism, operands in module.MECHANISMS.items():
            dims = (head_dim,) if head_dim else operands.TILE_DIMS
            pairs = [(dim, head_dim_v or dim) for dim in dims]
            if not (head_dim or head_dim_v):
                pairs += [(dim, dim_v) for dim in dims for dim_v in dims if dim_v < dim]
            for (dim, dim_v), name in product(pairs, dtypes):
                for bounded, ordered in product((False, True), (False, True) if gradients else (False,)):
                    problem = Problem(name, dim, dim_v, bounded_right=bounded, gradients=gradients, deterministic=ordered)
                    for config in module.configs(problem, mechanism, target):
                        # Blocks that share a key tile have the layouts of one that doesn't, and the order of products has none.
                        config = replace(config, head_blocks=1, late_dv=0)
                        if replace(config, tile_dv=config.tile_d) not in found:
                            found.setdefault(config, head_dim)
    return list(found.items())


# ---- tables ----------------------------------------------------------------------------------------------------------


def _alike(reports) -> list[tuple[Config, list]]:
    """Each report once: the dtypes that share one are named together."""
    merged: dict[tuple, list[str]] = {}
    for config, rows in reports:
        merged.setdefault((replace(config, dtype=""), *rows), []).append(config.dtype)
    return [(replace(config, dtype=" and ".join(dtypes)), rows) for (config, *rows), dtypes in merged.items()]


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
    from .tools import prove

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
    from .tools import prove

    merged: dict[Config, list] = {}
    for config, rows in reports:  # the dtypes of one config share a line
        merged.setdefault(replace(config, dtype=""), []).append((config.dtype, rows))
    last = None
    for config, group in merged.items():
        module, rows = family(config), [row for _, rows in group for row in rows]
        gpu = for_target(config.target).GPU
        if last not in (None, (config.target, config.backward or config.mechanism)):
            table.add_section()
        last = (config.target, config.backward or config.mechanism)
        moved = [row.sectors for row in rows if row.sectors]
        wrong = sum(len(row.findings) for row in rows) + len(prove.budget_findings(config, gpu, module))
        table.add_row(
            config.target,
            config.backward or config.mechanism,
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


def _verdict(findings: int) -> Text:
    return Text(_count(findings, "finding"), "red") if findings else Text("yes", "green")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


# ---- a new GPU -------------------------------------------------------------------------------------------------------

MODULE = '''\
"""{target}{serves}: {kib} KiB of shared memory a block. Written from {like}'s tables."""

from __future__ import annotations

from typing import Any

from cute_attn.layouts import mma_sync, mma_sync_backward
from cute_attn.layouts.base import KIB, Gpu

GPU = Gpu(
    name="{target}",
    targets={{{targets}}},{by_name}
    smem_per_block={kib} * KIB,
    smem_per_multiprocessor={above} * KIB,  # CUDA keeps 1 KiB of it for each block
)

MECHANISMS = {{"cp_async": mma_sync}}
BACKWARD = {{"cp_async_backward": mma_sync_backward}}

# The wider of the two padded head dims -> tile_m, tile_n, stages, warps, blocks a multiprocessor.
TABLE = {{
{rows}
}}

# The same for the backward pass: the wider of the two padded head dims -> the fields of Config that the table decides.
ADD_WIDTH = {add_width}
BACKWARD_TABLE: dict[int, dict[str, Any]] = {{
{backward}
}}

configs = mma_sync_backward.of_tables(TABLE, BACKWARD_TABLE, ADD_WIDTH)
'''


def new(options: argparse.Namespace, console: Console) -> int:
    """``new``: write the module of a GPU that is like another one, with the largest known tiles that fit it."""
    text, notes = new_module(options.target, options.like, options.smem_kib, options.capability)
    path = options.output or Path(f"{options.target.replace('_', '')}.py")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} is there already and stays as it is: pass another --output") from None
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error}): pass another --output") from None
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    used = f"serve it with cute_attn.layouts.register({path.stem}), or an entry point of the group {ENTRY_POINTS}"
    if path.resolve().parent == Path(__file__).resolve().parent and path.match("sm[0-9]*.py"):
        used = "it is found there"
    console.print(f"wrote {path}: {used}", highlight=False, soft_wrap=True)
    return 0


def new_module(target: str, like: str, smem_kib: int, capability: str | None = None) -> tuple[str, list[str]]:
    """The text of a GPU's module, and in words what it could not take over. Raises ``ValueError`` with what would do."""
    if not (parts := re.fullmatch(r"sm_(\d{1,2})(\d)[a-z]?", target)):
        raise ValueError(f"target is {target!r}; a name such as sm_120 or sm_90a is needed")
    if like not in known_targets():
        raise ValueError(f"like is {like!r}; known ones are {', '.join(known_targets())}")
    if target in known_targets():
        raise ValueError(f"target {target} is served by {source(for_target(target))}: edit its tables, or name another")
    if capability and not re.fullmatch(r"\d+\.\d|none", capability):
        raise ValueError(f"capability is {capability!r}; one such as 12.0 is needed, or none")
    served = capability or f"{parts[1]}.{parts[2]}"
    if served == "none":
        targets = {}
    else:
        targets = {(int(served.split(".")[0]), int(served.split(".")[1])): target}
        for module in modules():
            if targets.keys() & module.GPU.targets.keys():
                raise ValueError(
                    f"compute capability {served} is served by {source(module)}: pass another --capability, or none to ask "
                    f"for {target} by its name only"
                )
    if smem_kib < 1:
        raise ValueError(f"smem-kib is {smem_kib}; the KiB of shared memory that a block may have are needed, such as 99")
    if "cp_async" not in for_target(like).MECHANISMS:
        raise ValueError(f"like is {like}, which has no cp_async, the mechanism of every GPU: pass another, such as sm_80")
    if not hasattr(for_target(like), "BACKWARD"):
        raise ValueError(f"like is {like}, which has no backward pass: pass another, such as sm_80")
    gpu = Gpu(target, targets, smem_kib * KIB, (smem_kib + 1) * KIB)
    rows, backward, notes = [], [], []
    # The widest first: where nothing fits, it needs most.
    for head_dim in reversed(for_target(like).MECHANISMS["cp_async"].TILE_DIMS):
        config, note = _fitting(head_dim, like, gpu)
        row = config.tile_m, config.tile_n, config.stages, config.mma_warps, config.blocks_per_multiprocessor
        rows.append(f"    {head_dim}: {row},")
        notes += [note] if note else []
        config, note = _fitting(head_dim, like, gpu, "qkv")
        fields = {name: getattr(config, name) for name in BACKWARD_FIELDS}
        if fields["blocks_per_multiprocessor"] == 1:  # the default
            del fields["blocks_per_multiprocessor"]
        backward.append(f"    {head_dim}: {json.dumps(fields)},")
        notes += [f"backward, {note}"] if note else []
    if left := [name for name in for_target(like).MECHANISMS if name != "cp_async"]:
        notes.append(f"left out: {like}'s {', '.join(left)}: only cp_async is sure to run on another GPU")
    text = MODULE.format(
        target=target,
        serves=f" (compute capability {served})" if targets else "",
        kib=smem_kib,
        above=smem_kib + 1,
        like=like,
        targets=", ".join(f'{key}: "{value}"' for key, value in targets.items()),
        by_name="" if targets else "  # asked for by name",
        rows="\n".join(reversed(rows)),
        add_width=config.add_width,
        backward="\n".join(reversed(backward)),
    )
    return text, notes


def _fitting(head_dim: int, like: str, gpu: Gpu, gradients: str = "") -> tuple[Config, str]:
    """What ``like`` has for a head dim if it fits ``gpu``; else, with a note, the same tiles with fewer blocks a
    multiprocessor, or the largest tiles that fit of any table."""

    def fits(config: Config) -> bool:
        try:
            plan.check(config, gpu)
        except ValueError:
            return False
        return True

    def takes(config: Config) -> int:
        """Shared memory a multiprocessor must have for it, less what it has beyond a block's."""
        blocks = config.blocks_per_multiprocessor
        return blocks * (family(config).smem_bytes(config) + SMEM_RESERVED) - SMEM_RESERVED

    def said(config: Config) -> str:
        blocks = config.blocks_per_multiprocessor
        tiles = f"tiles {config.tile_m}×{config.tile_n}, {_count(config.stages, 'stage')}"
        return tiles + f", {blocks} blocks" * (blocks > 1)

    def size(config: Config) -> tuple[int, int, int]:
        return config.tile_m * config.tile_n, config.stages, config.blocks_per_multiprocessor

    problem = Problem("bfloat16", head_dim, head_dim, gradients=gradients)
    wanted = plan.configs(problem, like, "cp_async")[0]
    if fits(wanted):
        return wanted, ""
    known = [like, *(t for t in known_targets() if t != like and "cp_async" in for_target(t).MECHANISMS)]
    known = [t for t in known if hasattr(for_target(t), "BACKWARD") or not gradients]
    found = [config for target in known for config in plan.configs(problem, target, "cp_async")]
    if gradients:  # the ring may have a single stage there
        found = [replace(config, stages=n) for config in found for n in range(config.stages, 0, -1)]
    every = [replace(c, blocks_per_multiprocessor=n) for c in found for n in range(c.blocks_per_multiprocessor, 0, -1)]
    too_much = (
        f"head dim {head_dim}: {like}'s {said(wanted)} take {takes(wanted) / KIB:.0f} KiB of shared memory, "
        f"{(takes(wanted) - gpu.smem_per_block) / KIB:.0f} more than {gpu.smem_per_block / KIB:.0f}"
    )
    if fitting := [config for config in every if fits(config)]:
        own = [config for config in fitting if config.target == like]
        best = own[0] if own else max(fitting, key=size)
        return best, f"{too_much}: took {said(best)}, as {best.target} has them, {takes(best) / KIB:.0f} KiB"
    least = min(every, key=takes)
    raise ValueError(
        f"{too_much}; the smallest that is known, {said(least)} of {least.target}, takes {takes(least) / KIB:.0f}: pass "
        f"--smem-kib {-(-takes(least) // KIB)} or more"
    )


# ---- usage -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cute_attn.layouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="prove what must hold of every layout")
    one.add_argument("arch", nargs="?", metavar="ARCH", help=f"one of {', '.join(known_targets())}; default: all")
    one.add_argument("--head-dim", type=command.head_dim, metavar="D", help="of the tensors; default: every tile's")
    one.add_argument("--head-dim-v", type=command.head_dim, metavar="D", help="of V and O, where it differs")
    one.add_argument("--dtype", metavar="T", help=f"{' or '.join(command.DTYPES)}; default: both")
    one.add_argument("--operand", metavar="X", help="such as K or, of the backward pass, dO; default: all, and the budgets")
    one.add_argument("--details", action="store_true", help="every step; of one ARCH and head dim, it is shown unasked")
    one = commands.add_parser("show", help="print a layout in colours; draw it")
    one.add_argument("arch", metavar="ARCH", help=f"one of {', '.join(known_targets())}")
    one.add_argument("operand", metavar="OPERAND", help=f"one of {', '.join(OPERANDS)}, or block: all of them, by stage")
    one.add_argument("--gradients", action="store_true", help="of the backward pass, whose operands are K, V, Q, dO, P, dS …")
    one.add_argument("--head-dim", type=command.head_dim, default=128, metavar="D", help="default: %(default)s")
    one.add_argument("--head-dim-v", type=command.head_dim, metavar="D", help="of V and O, where it differs")
    one.add_argument("--dtype", default="bfloat16", metavar="T", help=f"{' or '.join(command.DTYPES)}; default: %(default)s")
    one.add_argument("--mechanism", metavar="M", help="default: the arch's best")
    one.add_argument("--causal", action="store_true", help="the config for a causal mask")
    queries = "queries of a tile, where lengths decide among several; default: the first config's"
    one.add_argument("--tile-m", type=command.positive, metavar="N", help=queries)
    picture = "memory (the default), a copy of it (in, load, store, out) or the mma that takes it; with --gradients load and "
    picture += "mma name their product, such as load-dV; of a block, which kernel, where there are several"
    one.add_argument("--picture", metavar="P", help=picture)
    one.add_argument("--svg", type=command.output_file, metavar="FILE", help="draw it as SVG")
    one.add_argument("--png", type=command.drawn(command.output_file), metavar="FILE", help="draw it as PNG; needs matplotlib")
    one = commands.add_parser("gallery", help="draw the shipped layouts: docs/layouts/")
    one.add_argument(
        "--output", type=command.output_folder, default="docs/layouts", metavar="FOLDER", help="default: %(default)s"
    )
    one = commands.add_parser("new", help="write the module of a new GPU: docs/new-gpu.md")
    one.add_argument("target", metavar="TARGET", help="what the compiler calls the GPU, such as sm_120")
    one.add_argument("--like", required=True, metavar="ARCH", help=f"take its tiles: one of {', '.join(known_targets())}")
    one.add_argument("--smem-kib", required=True, type=command.positive, metavar="N", help="shared memory a block may have")
    one.add_argument("--capability", metavar="X.Y", help="compute capability; none: by name only; default: TARGET's")
    one.add_argument(
        "--output", type=command.output_file, metavar="FILE", help="default: TARGET's name in this folder; never overwritten"
    )
    return parser


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "check": check,
    "show": show,
    "gallery": gallery,
    "new": new,
}


if __name__ == "__main__":
    sys.exit(main())
