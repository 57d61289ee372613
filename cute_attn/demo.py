"""What ``make demo`` shows: attention on the best backend there is beside float64 and PyTorch's own; what the compiler
makes of a Hopper and an Ampere kernel, which needs no GPU; the layout of an operand; what the plan chose and why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch.nn.functional import scaled_dot_product_attention

from cute_attn import attention, cubin, fill, machine
from cute_attn.layouts.base import Config
from cute_attn.layouts.tools import draw
from cute_attn.plan import explain, plan
from cute_attn.problem import Problem, check_call, problem_of

SHOWN = Problem("bfloat16", 128, 128, bounded_right=True, return_lse=True)
TARGETS = {"Hopper": "sm_90a", "Ampere": "sm_80"}
DTYPE = torch.bfloat16
SEED = 0
NEXT = ("make test", "python -m cute_attn info", "python -m cute_attn compile --help")
TIMES_PLAIN = 2.0  # the tests' policy: at most twice plain PyTorch's error, plus the rounding of the result


class Case(NamedTuple):
    """One call: what is asked, in words, attention()'s rules, and ``(seqlen, heads, head_dim)`` of q, of k, and of v."""

    name: str
    rules: dict[str, Any]
    shapes: tuple[tuple[int, int, int], ...]

    def tensors(self, device: str, times: int) -> list[torch.Tensor]:
        """q, k, v, ``(2, seqlen, heads, head_dim)``, with ``times`` the lengths."""
        generator = torch.Generator().manual_seed(SEED)
        shapes = ((2, times * seqlen, *others) for seqlen, *others in self.shapes)
        return [torch.randn(shape, generator=generator).to(DTYPE).to(device) for shape in shapes]


CASES = (
    Case("full", {}, ((256, 4, 64),) * 3),
    Case("causal", {"causal": True}, ((256, 4, 128),) * 3),
    Case("causal, 4 query heads a key head, lengths differ", {"causal": True}, ((200, 8, 128), *((333, 2, 128),) * 2)),
    Case("window of 64 keys before, 16 after", {"window": (64, 16)}, ((256, 4, 64),) * 3),
    Case("softcap 20, head dims 96 and 64", {"softcap": 20.0}, ((256, 4, 96), (256, 4, 96), (256, 4, 64))),
)


@dataclass
class Summary:
    """What the last panel says."""

    lines: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: bool = False


def run(console: Console) -> int:
    """Show what this machine can; returns the exit status, 1 where a result was wrong or a kernel did not compile."""
    summary = Summary()
    with fill.processes(len(TARGETS)) as pool:  # while attention runs here
        kernels = {name: pool.submit(_inspect, SHOWN, plan(SHOWN, target)) for name, target in TARGETS.items()}
        console.rule("attention")
        _attention(console, summary)
        console.rule("what the compiler made of two kernels")
        _compiled(console, summary, kernels)
    console.rule("one operand in shared memory")
    _picture(console, summary)
    console.rule("what was chosen, and why")
    for name, target in TARGETS.items():
        console.print(name, style="bold")
        console.print(explain(SHOWN, plan(SHOWN, target)), highlight=False)
    lines = summary.lines + [f"left out: {why}" for why in summary.left_out]
    said = Text("\n".join([*lines, f"next: {', '.join(NEXT)}"]))
    said.highlight_words(NEXT, "bold")
    console.print(Panel(said, title="summary", border_style="red" if summary.failed else "green"))
    return 1 if summary.failed else 0


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention(console: Console, summary: Summary) -> None:
    """Every case on the best backend, its errors beside those of PyTorch in the same dtype."""
    backend, why = machine.backend()
    console.print(Text.assemble("backend ", (backend, "bold"), f": {why}"))
    if backend == "cute":
        gpu, target = next((i, device.target) for i, device in enumerate(machine.devices()) if device.target)
        cases = [(case, case.tensors(f"cuda:{gpu}", 8)) for case in CASES]
        _compile_first(console, cases, target)
    else:
        cases = [(case, case.tensors("cpu", 1)) for case in CASES]
    table = Table(caption="largest error against float64, inputs and outputs in bfloat16; the log-sum-exp is float32")
    for column in ("case", "q", "k, v", "this", "PyTorch's SDPA", "plain PyTorch", "log-sum-exp", ""):
        table.add_column(column, justify="left" if column == "case" else "right")
    right = 0
    with torch.no_grad():
        for case, (q, k, v) in cases:
            cells, good = _compare(case, q, k, v)
            verdict = Text("right", "green") if good else Text("WRONG", "red")
            table.add_row(case.name, *("×".join(map(str, x.shape)) for x in (q, v)), *cells, verdict)
            right += good
    console.print(table)
    summary.lines.append(f"attention on the {backend} backend: {right} of {len(CASES)} cases right ({why})")
    summary.failed |= right < len(CASES)


def _compile_first(console: Console, cases, target: str) -> None:
    """Fill the cache for all cases at once rather than one after the other in their calls."""
    rules = {"scale": None, "causal": False, "window": None, "softcap": 0.0}
    problems = {problem_of(DTYPE, check_call(*qkv, **(rules | case.rules)), True): None for case, qkv in cases}
    with console.status("compiling the kernels of these cases, once"):
        outcomes = list(fill.fill([(problem, plan(problem, target)) for problem in problems], fill.processors()))
    hits = sum(outcome.how == "hit" for outcome in outcomes)
    console.print(f"{len(outcomes)} kernels: {hits} from the cache, {len(outcomes) - hits} compiled", highlight=False)


def _compare(case: Case, q, k, v) -> tuple[list[str], bool]:
    """The errors of one case, in words, and whether ours is allowed."""
    visible = _visible(q, k, **case.rules)
    true, true_lse = _eager(q.double(), k.double(), v.double(), visible, **case.rules)
    out, lse = attention(q, k, v, return_lse=True, **case.rules)
    plain, _ = _eager(q, k, v, visible, **case.rules)
    ours, theirs = ((x.double() - true).abs().max().item() for x in (out, plain))
    limit = TIMES_PLAIN * theirs + torch.finfo(DTYPE).eps / 2 * true.abs().max().item()
    lse_error = (lse.double() - true_lse).abs().max().item()
    sdpa = "has no softcap"
    if not case.rules.get("softcap"):
        mask, (q, k, v) = visible if case.rules else None, (x.transpose(1, 2) for x in (q, k, v))
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        sdpa = f"{(found.transpose(1, 2).double() - true).abs().max().item():.1e}"
    return [f"{ours:.1e}", sdpa, f"{theirs:.1e}", f"{lse_error:.1e}"], ours <= limit and math.isfinite(lse_error)


def _visible(q, k, causal=False, window=(None, None), softcap=0.0) -> torch.Tensor:
    """Which keys each query sees: bool, ``(seqlen_q, seqlen_k)``; the last query is aligned with the last key."""
    (left, right), rows, keys = (None, 0) if causal else window, q.shape[1], k.shape[1]
    every = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    return every.triu(keys - rows - (keys if left is None else left)).tril(keys - rows + (rows if right is None else right))


def _eager(q, k, v, visible, causal=False, window=None, softcap=0.0):
    """Attention as one writes it down, every step in the inputs' dtype: in float64 it is the oracle."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


# ---- kernels -------------------------------------------------------------------------------------------------------


def _inspect(problem: Problem, config: Config) -> tuple[cubin.Compiled, float]:
    began = time.monotonic()
    return cubin.inspect(problem, config), time.monotonic() - began


def _compiled(console: Console, summary: Summary, kernels: dict[str, Future]) -> None:
    """A table with a column for each kernel."""
    columns = {}
    for name, future in kernels.items():
        try:
            with console.status(f"compiling the {name} kernel"):
                compiled, seconds = future.result()
        except NotImplementedError as error:  # this machine hasn't what all of them need
            summary.left_out.append(f"what the compiler makes of the kernels: {error}")
            break
        except Exception as error:  # the demo goes on: whatever stopped this kernel stands in the summary
            summary.failed = True
            summary.lines.append(f"the {name} kernel did not compile: {type(error).__name__}: {error}")
            continue
        config = plan(SHOWN, TARGETS[name])
        columns[name] = _facts(config, compiled) | {"compiled in": f"{seconds:.1f} s"}
        spills = compiled.spill_stores + compiled.spill_loads
        summary.lines.append(
            f"{name} kernel: {compiled.registers} registers a thread at launch, {spills or 'no'} spill instructions, "
            f"{compiled.count('HGMMA') + compiled.count('HMMA')} tensor-core instructions"
        )
    if not columns:
        console.print("left out: see the summary")
        return
    table = Table(caption="bfloat16, head dim 128, causal, with the log-sum-exp; compiled without a GPU")
    table.add_column("")
    for name in columns:
        table.add_column(f"{name} ({TARGETS[name]})")
    for row in next(iter(columns.values())):
        table.add_row(row, *(facts[row] for facts in columns.values()))
    console.print(table)


def _facts(config: Config, compiled: cubin.Compiled) -> dict[str, str]:
    """The rows of the table for one kernel: what :func:`explain` doesn't say."""
    specialised = config.mma_registers > 0
    tensor_core = {name: n for name, n in compiled.instructions.items() if name.startswith(("HGMMA", "HMMA"))}
    count: Callable[[str], int] = compiled.count
    return {
        "registers a thread": f"{compiled.registers} at launch"
        + (f"; then {config.mma_registers} to compute, {config.copy_registers} to copy" if specialised else ""),
        "spills": f"{compiled.spill_stores} stores, {compiled.spill_loads} loads; stack of {compiled.stack_bytes} B",
        "tensor cores": "\n".join(f"{n} × {name}" for name, n in tensor_core.items()) or "none",
        "copies in": f"{count('UTMALDG')} TMA loads" if count("UTMALDG") else f"{count('LDGSTS')} cp.async",
        "copies out": f"{count('UTMASTG')} TMA stores" if count("UTMASTG") else f"{count('STG')} stores",
        "shared → registers": f"{count('LDSM')} ldmatrix" if count("LDSM") else "none: read by the tensor cores",
        "exponentials": f"{compiled.instructions.get('MUFU.EX2', 0)} MUFU.EX2",
        "instructions": f"{compiled.size}",
    }


def _picture(console: Console, summary: Summary) -> None:
    config = plan(SHOWN, TARGETS["Hopper"])
    try:
        console.print(draw.picture("K", config))
        console.print(draw.legend())
        console.print("a cell is 16 bytes: 8 elements of a row; the number is the first of its 4 banks", style="dim")
    except NotImplementedError as error:
        summary.left_out.append(f"the picture of a layout: {error}")
        console.print("left out: see the summary")
