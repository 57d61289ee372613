"""How long does a training step of a model take, by its attention? ``python -m benchmarks model``.

A Llama of Transformers, with random weights and packed sequences, takes forward and backward passes with cute_attn, with
torch's attention (``sdpa``) and with FlashAttention where it is installed, in turns, as it is and compiled. Each is given what
it needs for the same result: positions, of which Transformers makes a mask of all scores for ``sdpa``, and the lengths of
sequences for the others. What share of a step attention is, is a layer's attention alone, both passes, times the layers.

Whether results are the same is seen by the gradient of the first layer's query projection, which each attention changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import arguments, card, markdown, timing
from benchmarks.results import write_json
from cute_attn import command

SCHEMA = "model 1"
ABOUT = "time a training step of a Llama of Transformers with cute_attn, torch's attention and FlashAttention"
OURS, TORCH, FLASH = "cute_attn", "sdpa", ("flash_attention_2", "flash_attention_3", "flash_attention_4")
MODES = ("eager", "compiled")
ALIKE = 0.98  # the cosine of two gradients, at least; rounding leaves 0.999, another mask far less
TURN_SECONDS, IDLE_SECONDS = 0.5, 0.05


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    heads_kv: int
    tokens: int  # of a step, in one row
    sequences: int  # of them, of several lengths
    vocabulary: int


SIZES = {
    "cuda": Size(8, 4096, 11008, heads=32, heads_kv=8, tokens=8192, sequences=8, vocabulary=8192),
    "cpu": Size(2, 64, 128, heads=4, heads_kv=2, tokens=256, sequences=4, vocabulary=256),
}


@dataclass
class Cell:
    """One attention in one mode: seconds of a step and of all layers' attention, one of each round."""

    implementation: str
    mode: str
    alike: float = float("nan")  # the cosine with torch's
    loss: float = float("nan")
    steps: list[float] = dataclasses.field(default_factory=list)
    attention: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.implementation} ({self.mode})"

    @property
    def seconds(self) -> float:
        return statistics.median(self.steps)

    @property
    def share(self) -> float:
        return statistics.median(self.attention) / self.seconds


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("model", help=ABOUT, description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for field in dataclasses.fields(Size):
        default = f"{getattr(SIZES['cuda'], field.name)}; less on the CPU"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=command.positive, metavar="N", help=default)
    parser.add_argument("--implementation", nargs="+", choices=(OURS, TORCH, *FLASH), help="default: all that are installed")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--rounds", type=command.positive, default=5, help="turns of each (%(default)s)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of weights and tokens (%(default)s)")
    parser.add_argument("--json", type=command.output_file, metavar="FILE", help="write the results here")


def run(options: argparse.Namespace, console: Console) -> int:
    """``model``: exit status 1 where a result is another than with torch's attention. An interrupt keeps what was measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Size)}
    size = dataclasses.replace(SIZES[device], **{name: x for name, x in given.items() if x is not None})
    check(size)
    names = list(dict.fromkeys([TORCH, *(options.implementation or (OURS, TORCH, *installed(device)))]))
    bench = Bench(size, device, options.seed)
    cells = [Cell(name, mode) for mode in options.mode for name in names]
    stopped, failed = 0, {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(cells) * (1 + options.rounds))
        try:
            for i, cell in enumerate(cells * (1 + options.rounds)):
                progress.update(task, description=str(cell), advance=1)
                if i >= len(cells) and str(cell) not in failed:
                    bench.turn(cell)
                elif i < len(cells) and (why := bench.try_out(cell)):
                    failed[str(cell)] = why
        except KeyboardInterrupt as error:
            stopped = command.interrupted(error)
            console.print("not completed", style="red")
    cells = [cell for cell in cells if cell.attention]
    about = card.about() | {"size": dataclasses.asdict(size), "seed": options.seed}
    about["versions"]["transformers"] = importlib.metadata.version("transformers")
    if options.json:
        found: dict[str, Any] = {"schema": SCHEMA, "complete": not stopped, "about": about, "failed": failed}
        write_json(options.json, found | {"cells": [*map(dataclasses.asdict, cells)]})
    console.print(table(cells, size))
    for name, why in failed.items():
        console.print(f"{name} could not run: {why}", style="red", highlight=False, markup=False)
    others = [str(cell) for cell in cells if not cell.alike >= ALIKE]
    if others:
        console.print(f"another result than {TORCH}'s: {', '.join(others)}", style="red", highlight=False)
    return stopped or int(bool(others))


def check(size: Size) -> None:
    if size.hidden % (2 * size.heads) or size.heads % size.heads_kv:
        raise ValueError(
            f"hidden is {size.hidden}, heads {size.heads}, heads-kv {size.heads_kv}; a multiple of twice the heads, and of "
            f"these a multiple of heads-kv, are needed"
        )
    if size.tokens < 4 * size.sequences:
        raise ValueError(f"{size.tokens} tokens in {size.sequences} sequences: at least 4 in each, on average, are needed")


def installed(device: str) -> list[str]:
    from transformers import utils

    if device != "cuda":
        return []
    there = utils.is_flash_attn_2_available(), utils.is_flash_attn_3_available(), utils.is_flash_attn_4_available()
    return [name for name, is_there in zip(FLASH, there, strict=True) if is_there]


class Bench:
    """One model for all, whose attention is exchanged, and what each of them is given."""

    def __init__(self, size: Size, device: str, seed: int) -> None:
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

        import cute_attn.transformers

        cute_attn.transformers.register()
        self._interface, self._layers = AttentionInterface, size.layers
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads_kv,
            max_position_embeddings=size.tokens,
            use_cache=False,
            initializer_range=size.hidden**-0.5,
        )
        with torch.device(device):  # where random numbers for all its weights take no time
            model: Any = LlamaForCausalLM(config)
        self._model = model.to(torch.bfloat16 if device == "cuda" else torch.float32)
        self._compiled = torch.compile(self._model)
        self._clock: timing.Clock = timing.CudaClock() if device == "cuda" else timing.HostClock()
        tokens = torch.randint(size.vocabulary, (1, size.tokens), device=device)
        lengths = sizes(size)
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
        cu_seq_lens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        self._inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
        self._lengths: dict[str, Any] = {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        self._lengths |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        self._gradient: Any = None
        self._alone: dict[str, tuple[Callable[[], None], float]] = {}
        self._per_step: dict[tuple[str, str], float] = {}

    def _step(self, cell: Cell) -> Callable[[], Any]:
        self._model.set_attn_implementation(cell.implementation)
        inputs = self._inputs if cell.implementation == TORCH else self._inputs | self._lengths
        model = self._model if cell.mode == "eager" else self._compiled

        def step():
            self._model.zero_grad(set_to_none=True)
            loss = model(**inputs).loss
            loss.backward()
            return loss

        return step

    def try_out(self, cell: Cell) -> str | None:
        """:meth:`compare`, and why another library's attention can't run, where it can't."""
        try:
            self.compare(cell)
        except Exception as error:
            if cell.implementation in (OURS, TORCH):
                raise
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None

    def compare(self, cell: Cell) -> None:
        """The loss, and the gradient beside torch's; and what a layer asks of this attention."""
        step = self._step(cell)
        cell.loss = step().item()
        gradient = self._model.model.layers[0].self_attn.q_proj.weight.grad.float().flatten()
        if cell.implementation == TORCH:
            self._gradient = gradient
        cell.alike = torch.nn.functional.cosine_similarity(gradient, self._gradient, dim=0).item()
        self._per_step[cell.implementation, cell.mode] = timing.estimate(self._clock, step)
        if cell.implementation not in self._alone:
            alone = self._layer(cell.implementation)
            self._alone[cell.implementation] = alone, timing.estimate(self._clock, alone)

    def _layer(self, name: str) -> Callable[[], None]:
        """Both passes of one layer's attention alone, with the arguments that it has in the model."""
        function, seen = self._interface()[name], []

        def noted(*arguments, **others):
            seen.append((arguments, others))
            return function(*arguments, **others)

        self._interface.register(name, noted)
        try:
            self._step(Cell(name, "eager"))()
        finally:
            self._interface.register(name, function)
        (module, *qkv, mask), others = seen[0]
        qkv = [x.detach().requires_grad_() for x in qkv]
        dout = torch.randn_like(function(module, *qkv, mask, **others)[0])

        def alone() -> None:
            torch.autograd.grad(function(module, *qkv, mask, **others)[0], qkv, dout)

        return alone

    def turn(self, cell: Cell) -> None:
        """A round: some steps, then some calls of a layer's attention."""
        per_step, (alone, per_call) = self._per_step[cell.implementation, cell.mode], self._alone[cell.implementation]
        cell.steps.append(self._burst(self._step(cell), per_step))
        cell.attention.append(self._burst(alone, per_call) * self._layers)

    def _burst(self, call: Callable[[], Any], per_call: float) -> float:
        return timing.burst(self._clock, call, per_call, busy=TURN_SECONDS, idle=IDLE_SECONDS).samples[0]


def sizes(size: Size) -> list[int]:
    """The packed sequences' lengths, in ratios of 1 : 2 : 3 again and again; ``tokens`` in all."""
    ends = list(accumulate((1 + i % 3 for i in range(size.sequences)), initial=0))
    return [after - before for before, after in pairwise(round(size.tokens * end / ends[-1]) for end in ends)]


HEADINGS = ("mode", "attention", "ms", "± %", "tokens/s", f"× {TORCH}", "attention, ms", "of the step", "loss", "alike")


def rows(cells: list[Cell], tokens: int) -> list[list[str]]:
    """A row a cell, of a step of so many tokens, beside torch's of the same mode, under :data:`HEADINGS`."""
    base = {cell.mode: cell.seconds for cell in cells if cell.implementation == TORCH}
    found = []
    for cell in cells:
        median, spread = timing.scatter(cell.steps)
        found.append([
            cell.mode,
            cell.implementation,
            f"{median * 1e3:.1f}",
            f"{spread * 100:.1f}",
            f"{tokens / median:,.0f}",
            f"{base[cell.mode] / median:.2f}",
            f"{statistics.median(cell.attention) * 1e3:.1f}",
            f"{cell.share:.0%}",
            f"{cell.loss:.4f}",
            f"{cell.alike:.4f}",
        ])  # fmt: skip
    return found


def table(cells: list[Cell], size: Size) -> Table:
    """What was measured."""
    shown = Table(title=f"a training step of {size.tokens} tokens, forward and backward", title_justify="left")
    for i, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if i < 2 else "right")
    for row in rows(cells, size.tokens):
        shown.add_row(*row)
    return shown


def figures(found: dict[str, Any]) -> str:
    """The same of a file, for a document."""
    about = found["about"]
    cells = [Cell(**cell) for cell in found["cells"]]
    return markdown.ran_on(about) + "\n" + markdown.table(HEADINGS, rows(cells, about["size"]["tokens"]))
