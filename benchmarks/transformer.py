"""A small transformer over bytes, in plain torch, that is told which attention to use; and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_DIM = 64
SYMBOLS = 256  # a byte is a token
WARMUP_STEPS = 20

# q, k, v to the output, causal, each (batch, seqlen, heads, head_dim); k and v may have fewer heads.
Attend = Callable[[Tensor, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Size:
    """Of the model, its batches and its training."""

    layers: int
    heads: int
    heads_kv: int
    seqlen: int
    batch: int
    steps: int
    learning_rate: float = 1e-3

    @property
    def width(self) -> int:
        return self.heads * HEAD_DIM


SIZES = {
    "cuda": Size(layers=4, heads=8, heads_kv=2, seqlen=1024, batch=8, steps=200),
    # Longer than a tile of the reference, so that a row's sum is one of several.
    "cpu": Size(layers=2, heads=2, heads_kv=1, seqlen=160, batch=2, steps=12),
}


class Block(nn.Module):
    """Attention, then a multilayer perceptron, each behind a norm and around a residual."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self._heads = size.heads, size.heads_kv, size.heads_kv
        self._attend = attend
        self.norm_attention = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, sum(self._heads) * HEAD_DIM, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        # The three are views of one tensor: strided, as models have them.
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (-1, HEAD_DIM))
        x = x + self.out(self._attend(*qkv.split(self._heads, dim=2)).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Bytes ``(batch, seqlen)`` to the logits of each one's successor."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, size.width)
        self.positions = nn.Embedding(size.seqlen, size.width)
        self.blocks = nn.Sequential(*(Block(size, attend) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.logits = nn.Linear(size.width, SYMBOLS, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        place = torch.arange(symbols.shape[1], device=symbols.device)
        return self.logits(self.norm(self.blocks(self.symbols(symbols) + self.positions(place))))


def train(
    attend: Attend, size: Size, text: bytes, device: str, seed: int, done: Callable[[], None] = lambda: None
) -> list[float]:
    """The loss of every step. The same seed gives the same weights to begin with and the same batches."""
    torch.manual_seed(seed)
    model = Transformer(size, attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    losses = []
    for batch in batches(text, size, device, seed):
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        losses.append(loss.detach())
        done()
    return torch.stack(losses).tolist()


def batches(text: bytes, size: Size, device: str, seed: int) -> Iterator[Tensor]:
    """Stretches of the text from random places, with the byte that follows each."""
    if len(text) <= size.seqlen + 1:
        raise ValueError(f"the text has {len(text)} bytes; more than {size.seqlen + 1} are needed")
    symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(size.seqlen + 1, device=device)
    for _ in range(size.steps):
        first = torch.randint(len(text) - size.seqlen, (size.batch, 1), generator=generator).to(device)
        yield symbols[first + reach]


# --- attention, in several ways --------------------------------------------------------------------------------------


def cute_attn(**how: Any) -> Attend:
    """The package's own."""
    from cute_attn import attention

    return lambda q, k, v: attention(q, k, v, causal=True, **how)


def eager(order: int | None = None) -> Attend:
    """softmax(QKᵀ) V, every step in the dtype of its inputs. With ``order``, a seed, the keys come in another order: the
    same sums, added up differently."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = row = torch.arange(q.shape[1], device=q.device)
        if order is not None:
            key = torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(order)).to(q.device)
            k, v = k[:, key], v[:, key]
        group = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):  # it would take the softmax in float32
            scores = q @ k.mT * (1 / math.sqrt(HEAD_DIM))
            probabilities = torch.softmax(scores.masked_fill(key > row[:, None], -math.inf), -1)
            return (probabilities @ v).transpose(1, 2)

    return attend


def torch_fused() -> Attend:
    """torch's scaled_dot_product_attention, which keeps its scores in float32."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend
