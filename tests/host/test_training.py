"""What models are trained and served with: wrappers of modules, checkpoints, copies, and processes that load data."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from cute_attn import attention
from tests.host.processes import start_quick


class Layer(torch.nn.Module):
    """Causal self-attention, which holds the callable."""

    def __init__(self, width=32, attend=attention):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.attend = attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(-3)
        return x + self.attend(q, k, v, causal=True, window=(20, None), softcap=5.0).flatten(-2)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(), Layer())


def batch(size=4):
    return torch.randn(size, 30, 32, generator=torch.Generator().manual_seed(1))


def gradients(module, x, function=None):
    module.zero_grad()
    (module if function is None else function)(x).square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


# ---- processes that train together -----------------------------------------------------------------------------------


def check_training(rank, path):
    """In each of two processes: the gradients of half the batch each, averaged, are those of all of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(path, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = batch()
    half = whole.chunk(2)[rank]
    expected = [x / 2 for x in gradients(model(), whole)]

    def distributed():
        return DistributedDataParallel(model())

    def sharded():
        module = model()
        for layer in module:
            fully_shard(layer, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    for wrap in (distributed, sharded):
        for function in (lambda module: module, lambda module: torch.compile(module, backend="aot_eager")):
            module = wrap()
            got = gradients(module, half, function(module))
            for x, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(x.full_tensor() if hasattr(x, "full_tensor") else x, wanted)
    torch.distributed.barrier()  # a group that is left while the other process still uses it can abort
    torch.distributed.destroy_process_group()


def test_data_parallel_and_fully_sharded(tmp_path):
    """DDP and FSDP2, eager and compiled."""
    start_quick(check_training, (str(tmp_path / "store"),), 2)


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(reentrant, compiled):
    """The same bits; compiled, too: without ``use_reentrant`` as one graph."""
    module, x = model(), batch().requires_grad_()

    def function(x):
        for layer in module:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    expected = gradients(model(), x)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=not reentrant)
    assert all(map(torch.equal, gradients(module, x, function), expected))


def test_functional_call():
    module, other, x = model(), model(), batch()
    parameters = {name: torch.randn_like(value).requires_grad_() for name, value in module.named_parameters()}
    other.load_state_dict(parameters)
    out = torch.func.functional_call(module, parameters, (x,))
    assert torch.equal(out, other(x))
    got = torch.autograd.grad(out.square().sum(), list(parameters.values()))
    assert all(map(torch.equal, got, gradients(other, x)))


def test_inference_mode():
    module, x = model(), batch()
    with torch.inference_mode():
        out = module(x)
    assert out.is_inference()
    assert torch.equal(out, module(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    assert copied(attention) is attention
    module, x = model(), batch()
    other = copied(module)
    assert other[0].attend is attention
    assert torch.equal(other(x), module(x))


def test_a_whole_module_in_a_file(tmp_path):
    module, x = model(), batch()
    torch.save(module, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), module(x))


# ---- processes that load data ----------------------------------------------------------------------------------------


class Attended(Dataset):
    """Examples that are attention's output, computed by the process that loads them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.randn(1, 9, 2, 16, generator=torch.Generator().manual_seed(index))
        return attention(x, x, x, causal=True)[0], os.getpid()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_data_loader_workers(start):
    """Also where the parent has called attention before."""
    here = [Attended()[i][0] for i in range(4)]
    (loaded, pids), *_ = DataLoader(Attended(), batch_size=4, num_workers=1, multiprocessing_context=start)
    assert os.getpid() not in pids.tolist()
    assert torch.equal(loaded, torch.stack(here))
