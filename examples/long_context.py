"""Train a small transformer on one long text whose rows are shared by any number of ranks, on GPUs (NCCL) or CPUs (gloo):

    torchrun --standalone --nproc-per-node 2 examples/long_context.py --seqlen 65536 --json two.json
    torchrun --standalone --nproc-per-node 1 examples/long_context.py --seqlen 65536 --plot curves.png --beside two.json

A byte is a token. Each rank embeds, projects and predicts its own rows; only attention looks beyond them. The loss is a sum
over rows, so ranks add up their gradients, and the curve is that of one rank, whatever their number.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cute_attn import distributed
from cute_attn.command import drawn, output_file, picture_file, positive
from cute_attn.distributed.calls import METHODS

ROOT = Path(__file__).resolve().parents[1]
HEAD_DIM, HEADS, HEADS_KV, LAYERS = 64, 8, 2, 2
WIDTH = HEADS * HEAD_DIM


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embeddings of rows ``(batch, rows, heads, head_dim)``, each at its position in the whole text."""
    half = HEAD_DIM // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = positions[:, None, None] * frequencies
    a, b = x.float().split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, positions: Tensor, seqlen: int, method: str) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, HEADS_KV, HEADS_KV), 2)
        q, k = rotated(q, positions), rotated(k, positions)
        x = x + self.out(distributed.attention(q, k, v, causal=True, seqlen=seqlen, method=method).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.logits = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, symbols: Tensor, positions: Tensor, seqlen: int, method: str) -> Tensor:
        x = self.symbols(symbols)
        for block in self.blocks:
            x = block(x, positions, seqlen, method)
        return self.logits(self.norm(x))


def train(seqlen: int, steps: int, method: str, device: torch.device) -> list[float]:
    """The loss before each step, in nats a byte: the same on all ranks."""
    files = ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("cute_attn/*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()
    text = text.repeat(-(-(seqlen + 1) // len(text)))[None, : seqlen + 1].to(device)
    symbols, targets = distributed.shard(text[:, :-1]), distributed.shard(text[:, 1:])
    positions = distributed.positions(seqlen, device=device)
    targets = targets.masked_fill(positions >= seqlen, -100)  # padding predicts nothing
    torch.manual_seed(0)
    model = Model().to(device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(symbols, positions, seqlen, method)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / seqlen
        optimizer.zero_grad()
        loss.backward()
        of_all = loss.detach().clone()
        for x in (of_all, *(p.grad for p in model.parameters())):
            dist.all_reduce(x)
        losses.append(of_all.item())
        optimizer.step()
    return losses


def draw(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib import pyplot

    for name, losses in curves.items():
        pyplot.plot(range(1, len(losses) + 1), losses, label=name, linestyle="-" if len(pyplot.gca().lines) == 0 else "--")
    pyplot.xlabel("step")
    pyplot.ylabel("loss, nats a byte")
    pyplot.legend()
    pyplot.savefig(path)


def curve(text: str) -> tuple[str, list[float]]:
    """A type of argument: a file that ``--json`` has written."""
    try:
        found = json.loads(Path(text).read_text())
        return found["name"], found["losses"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"got {text!r} ({error}); a file that --json has written is needed") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=positive, default=4096, help="bytes of the text (%(default)s)")
    parser.add_argument("--steps", type=positive, default=20, help="(%(default)s)")
    parser.add_argument("--method", choices=METHODS, default="auto", help="(%(default)s)")
    writes = os.environ.get("RANK", "0") == "0"  # one rank
    file, picture = (output_file, picture_file) if writes else (Path, Path)
    parser.add_argument("--json", type=file, metavar="FILE", help="write the losses here")
    parser.add_argument("--plot", type=drawn(picture), metavar="FILE", help="draw the curve")
    parser.add_argument("--beside", type=curve, metavar="FILE", nargs="*", default=[], help="and those that --json wrote")
    options = parser.parse_args()
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        launched = "torchrun --standalone --nproc-per-node 1 examples/long_context.py"
        parser.error(f"{', '.join(missing)}: not in the environment, by which ranks find each other: try {launched}")
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=2))
    device = torch.device("cuda", dist.get_node_local_rank(0)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    losses = train(options.seqlen, options.steps, options.method, device)
    if dist.get_rank() == 0:
        print("\n".join(f"step {step:3}  loss {loss:.4f}" for step, loss in enumerate(losses, start=1)))
        name = f"{dist.get_world_size()} × {device.type}"
        if options.json:
            options.json.write_text(json.dumps({"name": name, "losses": losses}) + "\n")
        if options.plot:
            draw({name: losses} | dict(options.beside), options.plot)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
