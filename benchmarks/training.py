"""Does a model learn with cute_attn what it learns with eager attention? ``python -m benchmarks training``.

A small transformer is trained on the repository's own texts, from the same weights and on the same batches, once with each
attention. Training amplifies rounding, so two runs that differ in nothing but the order in which sums are added up part as
well. How far is measured in the same go: eager attention with its keys in two other orders, and torch's fused attention,
which like ours keeps the scores in float32. Ours may part from eager by at most twice as far as the farthest of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import arguments
from benchmarks.results import write_json
from cute_attn import command

SCHEMA = "training 1"
ROOT = Path(__file__).parent.parent
ABOUT = "train a small transformer with cute_attn and with eager attention, and compare the loss curves"
OURS, EAGER = "cute_attn", "eager"
TIMES = 2  # as everywhere else: at most twice the error of plain attention


@dataclass(frozen=True)
class Outcome:
    """The loss curves by attention, the seconds each run took, and what it all ran on."""

    about: dict[str, Any]
    curves: dict[str, list[float]]
    seconds: dict[str, float]

    @property
    def differences(self) -> dict[str, float]:
        """How far each curve is from eager attention's at the most; not a number where one has no number."""
        eager = self.curves[EAGER]
        found = {}
        for name, curve in self.curves.items():
            if name != EAGER:
                gaps = [abs(a - b) for a, b in zip(curve, eager, strict=True)]
                found[name] = max(gaps) if all(gap == gap for gap in gaps) else float("nan")
        return found

    @property
    def bound(self) -> float:
        return TIMES * max(gap for name, gap in self.differences.items() if name != OURS)

    @property
    def follows(self) -> bool:
        return self.differences[OURS] <= self.bound  # false for NaN

    @property
    def sentence(self) -> str:
        steps, gap = len(self.curves[EAGER]), self.differences[OURS]
        verdict = "follows eager attention's" if self.follows else "parts from eager attention's"
        return (
            f"Over {steps} steps the loss curve with cute_attn {verdict}: they differ by at most {gap:.4f}, where "
            f"{self.bound:.4f} is allowed ({TIMES} × the largest difference of the other runs)."
        )

    def save(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @staticmethod
    def load(path: Path) -> Outcome:
        fields = json.loads(path.read_bytes())
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {fields.get('schema')}; {SCHEMA} is needed: train again")
        return Outcome(fields["about"], fields["curves"], fields["seconds"])


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("training", help=ABOUT, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--steps", type=command.positive, help="200; a few on the CPU, which also takes a smaller model")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the weights and the batches (%(default)s)")
    parser.add_argument("--mechanism", choices=command.mechanisms(), help="of cute_attn's kernels; default: the GPU's best")
    parser.add_argument("--deterministic", action="store_true", help="deterministic=True for cute_attn")
    parser.add_argument("--json", type=command.output_file, metavar="FILE", help="write the curves here, once all are there")
    pictures = command.drawn(command.picture_stem)
    parser.add_argument("--plot", type=pictures, metavar="FILE", help="draw them: FILE.svg and FILE.png")


def run(options: argparse.Namespace, console: Console) -> int:
    """``training``: exit status 1 where the curves part."""
    import torch

    from benchmarks import card, transformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = transformer.SIZES[device]
    if options.steps is not None:
        size = dataclasses.replace(size, steps=options.steps)
    how = {"mechanism": options.mechanism, "deterministic": options.deterministic or None}
    attentions = {
        OURS: transformer.cute_attn(**{name: value for name, value in how.items() if value is not None}),
        EAGER: transformer.eager(),
        "eager, other key order": transformer.eager(order=1),
        "eager, third key order": transformer.eager(order=2),
        "torch, fused": transformer.torch_fused(),
    }
    text = own_text()
    about = card.about() | {
        "size": dataclasses.asdict(size),
        "options": {name: value for name, value in how.items() if value is not None} | {"seed": options.seed},
        "text": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()},
    }
    found = Outcome(about, {}, {})
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=size.steps * len(attentions))
        for name, attend in attentions.items():
            progress.update(task, description=name)
            began = time.monotonic()
            found.curves[name] = transformer.train(
                attend, size, text, device, options.seed, lambda: progress.advance(task)
            )
            found.seconds[name] = time.monotonic() - began
    if options.json:
        found.save(options.json)
    console.print(table(found))
    console.print(found.sentence, style=None if found.follows else "red", highlight=False)
    if options.plot:
        for path in plot(found, options.plot):
            console.print(f"wrote {path}", soft_wrap=True)
    return 0 if found.follows else 1


def own_text() -> bytes:
    """The repository's own prose, always in the same order."""
    return b"\n".join(path.read_bytes() for path in (ROOT / "LICENSE", ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))))


def table(found: Outcome) -> Table:
    shown = Table(title="loss of a small transformer, by attention", title_justify="left")
    for heading in ("attention", "first step", "last step", "largest difference from eager", "seconds"):
        shown.add_column(heading, justify="left" if heading == "attention" else "right")
    differences = found.differences
    for name, curve in found.curves.items():
        gap = f"{differences[name]:.4f}" if name in differences else ""
        shown.add_row(name, f"{curve[0]:.4f}", f"{curve[-1]:.4f}", gap, f"{found.seconds[name]:.1f}")
    return shown


def plot(found: Outcome, path: Path) -> list[Path]:
    """The curves above, their distances from eager attention's below, with the bound; SVG and PNG."""
    from benchmarks.plot import CEILING, GRID, OTHERS, STYLES, drawing, save

    colors = {OURS: STYLES["ours_tma_wgmma"][0], EAGER: STYLES["torch_cudnn"][0]}
    rest = [name for name in found.curves if name not in colors]
    colors |= {name: OTHERS[i % len(OTHERS)][0] for i, name in enumerate(rest)}
    lines = {OURS: "-", EAGER: "--", **dict.fromkeys(rest, ":")}
    steps = range(1, len(found.curves[EAGER]) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with drawing():
        from matplotlib import pyplot

        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
        for name, curve in found.curves.items():
            wide = 2.4 if name == OURS else 1.2
            above.plot(steps, curve, label=name, color=colors[name], linestyle=lines[name], linewidth=wide)
            if name != EAGER:
                gaps = [abs(a - b) for a, b in zip(curve, found.curves[EAGER], strict=True)]
                below.plot(steps, gaps, color=colors[name], linestyle=lines[name], linewidth=wide / 2)
        below.axhline(found.bound, color=CEILING, linestyle="--", linewidth=1.2)
        below.annotate("allowed", (1, found.bound), xytext=(0, 3), textcoords="offset points", fontsize=8)
        below.set_yscale("log")
        above.set_ylabel("loss, nats per byte")
        below.set_ylabel("difference from eager")
        below.set_xlabel("step")
        for axis in (above, below):
            axis.grid(color=GRID, linewidth=0.6)
        above.legend(frameon=False)
        figure.suptitle(f"{found.about.get('card', {}).get('name') or 'CPU'}: a small transformer, by attention")
        return save(figure, path.with_suffix(""))
