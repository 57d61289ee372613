"""Train a small Llama on packed documents, with cute_attn as its attention: ``python examples/train_transformers.py``.

The documents are Python's own help topics, which every installation has; a byte is a token. Those of a step lie one after
another in one row, without padding, and ``cu_seq_lens`` says where each begins: none sees another. The model is Transformers',
with random weights, compiled by torch.compile into one graph. About a minute on a GPU; without one a smaller model on the CPU.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, LlamaConfig

import cute_attn.transformers
from cute_attn.command import picture_file, positive, whole

BEGIN, SYMBOLS = 256, 264  # a token before each document, after the bytes; the vocabulary, a multiple of 8


@dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    tokens: int  # of a step
    documents: int  # of a step, at most
    steps: int


SIZES = {
    "cuda": Size(layers=8, heads=8, heads_kv=2, head_dim=64, tokens=16384, documents=64, steps=300),
    "cpu": Size(layers=2, heads=4, heads_kv=2, head_dim=16, tokens=512, documents=4, steps=80),
}


def main(argv: list[str] | None = None) -> list[float]:
    """The loss of every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[device]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=size.steps, help="%(default)s")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the weights and the documents' order (%(default)s)")
    backends = torch.compiler.list_backends(())
    help_ = "of torch.compile (%(default)s); eager takes no compiler"
    parser.add_argument("--backend", metavar="NAME", choices=backends, default="inductor", help=help_)
    parser.add_argument("--plot", type=picture_file, default="loss.png", metavar="FILE", help="the loss, drawn (%(default)s)")
    options = parser.parse_args(argv)

    cute_attn.transformers.register()
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(config(size), attn_implementation="cute_attn").to(device)
    step = torch.compile(model, fullgraph=True, backend=options.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if device == "cuda" else 5e-3)
    losses: list[float] = []
    shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown) as progress:
        task = progress.add_task("compiling", total=options.steps)
        for _, batch in zip(range(options.steps), batches(size, random.Random(options.seed), device), strict=False):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = step(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f} nats a byte")
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps of {size.tokens} tokens")
    plot(losses, options.plot)
    return losses


def config(size: Size) -> LlamaConfig:
    width = size.heads * size.head_dim
    return LlamaConfig(
        vocab_size=SYMBOLS,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads_kv,
        head_dim=size.head_dim,
        max_position_embeddings=size.tokens,
        use_cache=False,
        bos_token_id=BEGIN,
        eos_token_id=None,
    )


def batches(size: Size, order: random.Random, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Documents in rows of as many tokens as a step has; one that doesn't fit is continued in the next row.

    ``cu_seq_lens`` has one size for any number of documents, so that one graph does for all: those that there aren't
    are empty, at the end.
    """
    stream = documents(order)
    rest: list[int] = []
    while True:
        tokens, begins = [], []
        while len(tokens) < size.tokens and len(begins) < size.documents:
            document = rest or next(stream)
            begins.append(len(tokens))
            room = size.tokens - len(tokens)
            tokens += document[:room]
            rest = document[room:]
        if len(tokens) < size.tokens:  # too many short ones: a step has whole rows only
            continue
        row = torch.tensor(tokens)
        first = torch.tensor(begins)
        labels = row.clone()
        labels[first] = -100  # nothing foretells a document's first token
        place = torch.arange(size.tokens)
        bounds = torch.full((size.documents + 1,), size.tokens, dtype=torch.int32)
        bounds[: len(begins)] = first
        positions = place - first[torch.searchsorted(first, place, right=True) - 1]
        batch = {"input_ids": row, "position_ids": positions, "labels": labels}
        lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        yield {name: x[None].to(device) for name, x in batch.items()} | {name: x.to(device) for name, x in lengths.items()}


def documents(order: random.Random) -> Iterator[list[int]]:
    """Python's help topics as tokens, again and again, each time in another order."""
    texts = [topics[name].encode() for name in sorted(topics)]
    while True:
        order.shuffle(texts)
        yield from ([BEGIN, *text] for text in texts)


def plot(losses: list[float], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed, try pip install matplotlib")
        return
    figure, axes = pyplot.subplots(layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="a small Llama with cute_attn")
    figure.savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
