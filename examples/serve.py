"""Serve a small Llama to many at once, its keys and values in pages: ``python examples/serve.py``.

Continuous batching in a page of Python. Each step is one pass of the model over all sequences: a token of each that is being
continued, beside the whole prompts of those that have just come, rows one after another. All begin with the same instructions,
whose pages are computed once and shared (``PagedCache.fork``). Where the cache is full, the last one to come gives its pages
back and waits; later it is computed anew.

The model is Transformers', with random weights; its layers call ``attention_kvcache``, which writes a step's keys and values
into the pages and reads all there are. ``--check`` compares the tokens with those that Transformers' ``generate`` finds for one
sequence at a time, with eager attention. In float32, on a CPU, all are equal; in bfloat16 rounding may choose among equals.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from rich.console import Group
from rich.live import Live
from rich.table import Table
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from cute_attn import PagedCache, attention_kvcache
from cute_attn.command import positive, whole

PREFIX = [*range(1, 39)]  # the instructions: as many tokens
SHOWN = 16  # sequences of the table


@dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    heads_kv: int
    head_dim: int
    symbols: int
    pages: int
    page_size: int
    requests: int
    at_once: int  # sequences of a step, at most
    prompt: int  # tokens, at most
    new: int
    dtype: torch.dtype

    @property
    def least_pages(self) -> int:
        """For the instructions, and a copy of their last page and all that one sequence may come to."""
        shared = len(PREFIX) // self.page_size
        return -(-len(PREFIX) // self.page_size) + (len(PREFIX) + self.prompt + self.new) // self.page_size + 1 - shared


SIZES = {
    "cuda": Size(8, 16, 4, 128, 4096, 640, 64, 256, 64, 900, 400, torch.bfloat16),
    "cpu": Size(2, 4, 2, 16, 512, 48, 8, 20, 8, 60, 40, torch.float32),
}


@dataclass
class Request:
    """``tokens`` are the prompt's and those that the model has found, of which it is to find ``new``."""

    name: int
    tokens: list[int]
    new: int
    prompt: int = 0
    stored: int = 0  # tokens in the cache, behind the instructions
    sequence: int = -1  # in the cache

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def found(self) -> list[int]:
        return self.tokens[self.prompt :]


@dataclass(frozen=True)
class Step:
    """What layers need to know of a step, of all its sequences: how many tokens each has had before, its pages, and where its
    rows of this step begin."""

    cache: PagedCache
    lengths: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor


def attend(module, query, key, value, attention_mask, *, step: Step, scaling: float, **_) -> tuple[torch.Tensor, None]:
    """Attention as Transformers' layers call it, of the rows of all sequences, ``(1, heads, tokens, head_dim)``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attention_kvcache(
        q,
        step.cache.k[module.layer_idx],
        step.cache.v[module.layer_idx],
        lengths=step.lengths,
        page_table=step.page_table,
        cu_seqlens_q=step.cu_seqlens_q,
        k_new=k,
        v_new=v,
        scale=scaling,
        causal=True,
    )
    return out[None], None  # type: ignore[index]  # there is no lse


@dataclass
class Server:
    """Requests that wait, those that are being served, and the cache that holds the tokens of the latter."""

    model: LlamaForCausalLM
    cache: PagedCache
    at_once: int
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    done: list[Request] = field(default_factory=list)
    sent_back: int = 0  # how often the cache was full
    most_pages: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.prefix = self.cache.new()
        self.run([self.prefix], [PREFIX], [0])

    def step(self) -> None:
        """A token more of every sequence that is being served."""
        while self.waiting and len(self.running) < self.at_once and self.has_room_for(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            self.running[-1].sequence = self.cache.fork(self.prefix)
        while True:
            sequences = [request.sequence for request in self.running]
            rows = [request.tokens[request.stored :] for request in self.running]
            try:
                found = self.run(sequences, rows, [len(PREFIX) + request.stored for request in self.running])
                break
            except MemoryError:  # nothing has happened: with one sequence less there may be room
                if len(self.running) == 1:
                    raise
                self.cache.free(self.running[-1].sequence)
                self.running[-1].stored = 0
                self.waiting.appendleft(self.running.pop())
                self.sent_back += 1
        self.most_pages = max(self.most_pages, self.pages_in_use)
        for request, token in zip(self.running, found, strict=True):
            request.stored = len(request.tokens)
            request.tokens.append(token)
        for request in [request for request in self.running if len(request.found) == request.new]:
            self.running.remove(request)
            self.cache.free(request.sequence)
            self.done.append(request)

    def run(self, sequences: Sequence[int], rows: Sequence[Sequence[int]], begins: Sequence[int]) -> list[int]:
        """The token that follows each sequence, once its ``rows``, from position ``begins`` on, are in the cache."""
        counts, device = [len(x) for x in rows], self.cache.k.device
        lengths = self.cache.append(sequences, counts)
        bounds = torch.tensor([*accumulate(counts, initial=0)], dtype=torch.int32, device=device)
        step = Step(self.cache, lengths, self.cache.page_table(sequences), bounds)
        positions = [begin + t for begin, n in zip(begins, counts, strict=True) for t in range(n)]
        ids = torch.tensor([[token for x in rows for token in x], positions], device=device)
        last = bounds[1:].long() - 1
        with torch.inference_mode():
            logits = self.model(ids[None, 0], position_ids=ids[None, 1], use_cache=False, step=step, logits_to_keep=last).logits
        return logits[0].argmax(-1).tolist()

    def has_room_for(self, request: Request) -> bool:
        """For its tokens, and a page more of each that is being served."""
        pages = (len(PREFIX) + len(request.tokens)) // self.cache.page_size + 1 - len(PREFIX) // self.cache.page_size
        return self.cache.free_pages >= pages + len(self.running)

    @property
    def pages_in_use(self) -> int:
        return self.cache.pages - self.cache.free_pages

    @property
    def tokens_per_second(self) -> float:
        found = sum(len(request.found) for request in (*self.done, *self.running, *self.waiting))
        return found / (time.perf_counter() - self.began)

    def __rich__(self) -> Group:
        table = Table("request", "prompt", "found", "pages", "", box=None)
        for request in self.running[:SHOWN]:
            pages = -(-(len(PREFIX) + request.stored) // self.cache.page_size)
            part = 20 * len(request.found) // request.new
            row = request.name, request.prompt, f"{len(request.found)} of {request.new}", pages, "━" * part + "─" * (20 - part)
            table.add_row(*map(str, row))
        return Group(
            table,
            f"{len(self.running)} running, {len(self.waiting)} waiting, {len(self.done)} done, {self.sent_back} sent back; "
            f"{self.pages_in_use} of {self.cache.pages} pages in use; {self.tokens_per_second:.0f} tokens/s",
        )


def main(argv: list[str] | None = None) -> Server:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[device]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=positive, default=size.requests, help="%(default)s")
    parser.add_argument("--at-once", type=positive, default=size.at_once, help="sequences of a step, at most (%(default)s)")
    help_ = f"of {size.page_size} tokens (%(default)s)"
    parser.add_argument("--pages", type=whole(size.least_pages), default=size.pages, help=help_)
    parser.add_argument("--seed", type=whole(0), default=0, help="of the weights and the prompts (%(default)s)")
    parser.add_argument("--check", action="store_true", help="compare the tokens with those of Transformers' generate")
    options = parser.parse_args(argv)

    if device == "cpu":
        torch.set_num_threads(1)  # a model this small takes no longer, and far less where others use the cores
    AttentionInterface.register("pages", attend)  # without a function for masks, Transformers makes none
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM._from_config(config(size), attn_implementation="pages", dtype=size.dtype).to(device).eval()
    shape = options.pages, size.page_size, size.heads_kv, size.head_dim
    cache = PagedCache(*shape, layers=size.layers, dtype=size.dtype, device=device)
    server = Server(model, cache, options.at_once)
    server.waiting.extend(requests(size, options.requests, random.Random(options.seed)))
    with Live(server, refresh_per_second=8, transient=True):
        while server.waiting or server.running:
            server.step()
    found = sum(len(request.found) for request in server.done)
    print(
        f"{len(server.done)} requests, {found} tokens, {server.tokens_per_second:.0f} tokens/s; at most {server.most_pages} of "
        f"{cache.pages} pages in use, {server.sent_back} sent back"
    )
    if options.check:
        model.set_attn_implementation("eager")
        equal = sum(request.found == alone(model, request) for request in server.done)
        print(f"{equal} of {len(server.done)} requests got the tokens that generate finds for them alone")
    return server


def config(size: Size) -> LlamaConfig:
    width = size.heads * size.head_dim
    return LlamaConfig(
        vocab_size=size.symbols,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads_kv,
        head_dim=size.head_dim,
        max_position_embeddings=len(PREFIX) + size.prompt + size.new,
        initializer_range=2 / width**0.5,  # large: a model that says more than one word
        bos_token_id=None,
        eos_token_id=None,
    )


def requests(size: Size, count: int, draw: random.Random) -> list[Request]:
    prompts = [[draw.randrange(size.symbols) for _ in range(draw.randint(1, size.prompt))] for _ in range(count)]
    return [Request(name, prompt, draw.randint(1, size.new)) for name, prompt in enumerate(prompts)]


def alone(model: LlamaForCausalLM, request: Request) -> list[int]:
    """What Transformers' ``generate`` finds for a request by itself, without pages."""
    ids = torch.tensor([[*PREFIX, *request.tokens[: request.prompt]]], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.new, do_sample=False, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


if __name__ == "__main__":
    main()
