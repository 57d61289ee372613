"""Ranks for tests: processes that compute together, each with a group of the first n of them; and what they are asked for."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from cute_attn import distributed
from tests import support
from tests.host.processes import quick

SECONDS = 120  # after which ranks count as waiting for one another


class Ranks:
    """Started once for many tests, which send them work. On ``"cuda"`` each has a GPU, or all share the one there is."""

    def __init__(self, store: Path, count: int, backend: str = "gloo", device: str = "cpu"):
        context = quick()
        self.pipes, self.processes, self.waits = [], [], False
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, str(store), backend, device, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, count: int, work: Callable, *arguments) -> list[tuple]:
        """``work(rank, group, *arguments)`` on so many: ``("returned", value)`` of each, or the error's name and words."""
        assert not self.waits, "an earlier test has left ranks that wait for one another"
        message = pickle.dumps((count, work, arguments))
        for pipe in self.pipes[:count]:
            pipe.send_bytes(message)
        return [self._answer(rank) for rank in range(count)]

    def results(self, count: int, work: Callable, *arguments) -> list:
        """What each returned."""
        answers = self.run(count, work, *arguments)
        assert all(kind == "returned" for kind, _ in answers), answers
        return [result for _, result in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _answer(self, rank: int) -> tuple:
        self.waits = not self.pipes[rank].poll(SECONDS)
        assert not self.waits, f"rank {rank} waits for the others"
        try:
            return pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            return "ended", ""


def _serve(rank: int, ranks: int, store: str, backend: str, device: str, pipe) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    timeout = timedelta(seconds=SECONDS / 2)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    groups = {count: dist.new_group(range(count)) for count in range(1, ranks + 1)}
    while True:
        try:
            count, work, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            answer = "returned", work(rank, groups[count], *_moved(arguments, device))
        except Exception as error:  # whatever it is, the test wants to know
            answer = type(error).__name__, f"{error}\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps((answer[0], _moved(answer[1], "cpu"))))


def _moved(x, device: str):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x)(_moved(y, device) for y in x) if isinstance(x, (list, tuple)) else x


# ---- what they are asked for -------------------------------------------------------------------------------------------


def among(group, device: str, options: dict) -> tuple[dict, dict]:
    """Who shares sequences, as keywords, and the other options: the group, or, of all ranks, a ``mesh`` of such a shape."""
    options = dict(options)
    shape = options.pop("mesh", None)
    return {"mesh": dist.init_device_mesh(device, shape)} if shape else {"group": group}, options


def both_passes(rank, group, tensors, options):
    """``[out, lse, dq, dk, dv]`` of whole sequences, computed on shards of them; on the first rank."""
    whole_q, whole_k = tensors[0].shape[1], tensors[1].shape[1]
    where, options = among(group, tensors[0].device.type, options)
    where["order"] = options.pop("order", "zigzag")
    q, k, v, dout = (distributed.shard(x, **where) for x in tensors[:4])
    dlse = distributed.shard(tensors[4], dim=2, **where)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sizes = {"seqlen": whole_q, "seqlen_k": whole_k}
    options |= {name: x.to(q.device) for name, x in options.items() if name == "sinks"}
    outputs = distributed.attention(*leaves, return_lse=True, **sizes, **where, **options)
    gradients = torch.autograd.grad(outputs, leaves, (dout, dlse))
    seqlens, dims = (whole_q,) * 3 + (whole_k,) * 2, (1, 2, 1, 1, 1)
    found = [
        distributed.unshard(x.detach(), seqlen, dim=dim, **where)
        for x, seqlen, dim in zip((*outputs, *gradients), seqlens, dims, strict=True)
    ]
    return found if rank == 0 else None


def packed_passes(rank, group, tensors, cu_seqlens, options):
    """The same of packed sequences, without the log-sum-exp's gradient."""
    rows = tensors[0].shape[0]
    where, options = among(group, tensors[0].device.type, options)
    q, k, v, dout = (distributed.shard(x, dim=0, **where).requires_grad_() for x in tensors[:4])
    out, lse = distributed.attention(q, k, v, seqlen=rows, cu_seqlens=cu_seqlens, return_lse=True, **where, **options)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    found = [distributed.unshard(x.detach(), rows, dim=0, **where) for x in (out, *gradients)]
    found.insert(1, distributed.unshard(lse.detach(), rows, dim=1, **where))
    return found if rank == 0 else None


# ---- a model ---------------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Attention between two projections, over this rank's rows of so many."""

    def __init__(self, attend: Callable, device, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        with torch.device(device):
            self.before, self.after = torch.nn.Linear(64, 3 * 4 * 64, bias=False), torch.nn.Linear(4 * 64, 64, bias=False)
        self.attend = attend
        self.to(dtype)

    def forward(self, x):
        q, k, v = self.before(x).unflatten(-1, (3, 4, 64)).unbind(2)
        return self.after(self.attend(q, k, v).flatten(2))

    def gradients(self, model, x, rows):
        """Of both weights, from the mean over ``rows`` rows of the outputs' squares."""
        (model(x).double().square().sum() / rows).backward()
        return [self.before.weight.grad, self.after.weight.grad]


def in_a_model(rank, group, x, way):
    """A block's gradients under DDP or FSDP2, which take means over ranks; all of these must be in the group."""
    seqlen, ranks = x.shape[1], dist.get_world_size(group)
    attend = partial(distributed.attention, group=group, causal=True, seqlen=seqlen)
    block = Block(attend, x.device, x.dtype)
    if way == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(block, process_group=group)
    else:
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(block, mesh=dist.init_device_mesh(x.device.type, (ranks,)))
    gradients = block.gradients(model, distributed.shard(x, group=group), seqlen / ranks)
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]


def heads_first(q, k, v):
    """Plain attention, in any dtype."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def assert_gradients_of_a_model_close(gradients, x):
    """Beside float64, at most the multiple of plain attention's error in the same block, and a rounding: the tests' policy."""
    exact, plain = Block(heads_first, x.device, x.dtype).double(), Block(heads_first, x.device, x.dtype)
    exact, plain = exact.gradients(exact, x.double(), x.shape[1]), plain.gradients(plain, x, x.shape[1])
    times = support.TIMES_PLAIN[x.dtype]
    for got, allowed, want in zip(gradients, plain, exact, strict=True):
        error, of_plain = ((one.to(x.device).double() - want).square().mean().sqrt() for one in (got, allowed))
        assert error <= times * of_plain + torch.finfo(x.dtype).eps / 2 * want.square().mean().sqrt()
