"""The kernels as operators of torch.library: torch.compile, CUDA graphs, torch.export, AOTInductor, selective checkpoints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cute_attn import attention, attention_varlen, block_mask, launch, masks
from tests.support import make_gradients, make_qkv

OPS = torch.ops.cute_attn
RULES = {"causal": True, "window": (200, None), "softcap": 20.0, "scale": 0.2}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()


def leaves(batch=2, sq=300, sk=400, d=64, dv=64, heads=(4, 2)):
    return [x.requires_grad_() for x in make_qkv(batch, sq, sk, *heads, d, dv, torch.bfloat16, "cuda")]


def both_passes(function, q, k, v, *arguments):
    out, lse = function(q, k, v, *arguments)
    return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), make_gradients(q.detach(), v.detach()))]


def assert_same_bits(found, expected):
    for got, wanted in zip(found, expected, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert torch.equal(got, wanted)


def attend(mechanism, **options):
    return lambda q, k, v: attention(
        q, k, v, return_lse=True, deterministic=True, mechanism=mechanism, backend="cute", **{**RULES, **options}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("numbers", [float, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["floats", "tensors"])
def test_opcheck(numbers, mechanism):
    q, k, v = leaves()
    rules = numbers(0.2), numbers(20.0), 200, 0
    how = True, "cute", mechanism
    overload = "default" if numbers is float else "Tensor"
    forward, backward = (getattr(packet, overload) for packet in (OPS.attention, OPS.attention_backward))
    nothing = (None,) * 8 + ("", "", 0.0)  # lengths; functions, sinks, dropout, a block mask
    torch.library.opcheck(forward, (q, k, v, *nothing, *rules, True, True, *how))
    q, k, v = (x.detach() for x in (q, k, v))
    out, _, kept = forward(q, k, v, *nothing, *rules, True, True, *how)
    dout, dlse = make_gradients(q, v)
    for needs, of_lse in (("qkv", dlse), ("k", None)):
        torch.library.opcheck(backward, (q, k, v, *nothing, out, kept, dout, of_lse, *rules, needs, *how))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_compiled_is_eager_bit_by_bit(d, mechanism):
    """And no length or batch makes a graph more than the two of constants and symbols."""
    function, counter = attend(mechanism), CompileCounterWithBackend("aot_eager")
    fast = torch.compile(function, backend=counter, fullgraph=True)
    for batch, sq, sk in ((3, 300, 400), (5, 170, 900), (7, 129, 1000), (9, 100, 130)):
        tensors = leaves(batch, sq, sk, d, d)
        assert_same_bits(both_passes(fast, *tensors), both_passes(function, *tensors))
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode, mechanism):
    """Head-first tensors that Inductor fuses something into; with CUDA graphs, which are recorded and then played."""

    def function(q, k, v):
        q, k, v = (2.0 * x.transpose(1, 2) for x in (q, k, v))
        out, lse = attend(mechanism)(q, k, v)
        return out.transpose(1, 2) * 3.0, lse - 1.0

    fast = torch.compile(function, mode=mode, fullgraph=True)
    for _ in range(4):
        tensors = [torch.randn(2, 4, 300, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
        douts = torch.randn_like(tensors[0]), torch.randn(2, 4, 300, device="cuda")
        results = []
        for f in (fast, function):
            torch.compiler.cudagraph_mark_step_begin()
            outputs = f(*tensors)
            results.append([x.clone() for x in (*outputs, *torch.autograd.grad(outputs, tensors, douts))])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["floats", "tensors"])
def test_a_scale_that_changes_under_cuda_graphs(kind, mechanism):
    """A recorded launch would have the first one for ever."""

    def function(q, k, v, scale):
        return attention(q * 2.0, k, v, scale=scale, mechanism=mechanism) + 1.0

    fast = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    q, k, v = (x.detach() for x in leaves())
    for i in range(1, 8):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(fast(q, k, v, kind(0.05 * i)).clone(), function(q, k, v, 0.05 * i))


def test_a_window_that_changes_under_cuda_graphs(mechanism):
    def function(q, k, v, left):
        return attention(q * 2.0, k, v, causal=True, window=(left, None), mechanism=mechanism) + 1.0

    fast = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    q, k, v = (x.detach() for x in leaves())
    for left in (10, 20, 40, 20, 40, 10, 40):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(fast(q, k, v, left).clone(), function(q, k, v, left))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_other_lengths_in_a_graph(mode, mechanism):
    """Packed sequences, both passes; a recorded launch reads the lengths anew."""

    def function(q, k, v, cu_seqlens):
        q, k, v = (2.0 * x for x in (q, k, v))
        out = attention_varlen(q, k, v, cu_seqlens, causal=True, mechanism=mechanism, backend="cute", deterministic=True)
        return out + 1.0

    fast = torch.compile(function, mode=mode, fullgraph=True)
    q, k, v = (x[0].detach().requires_grad_() for x in leaves(batch=1, sq=300, sk=300))
    dout = torch.randn_like(q)
    for ends in ([0, 100, 300, 300], [0, 1, 299, 300], [0, 0, 130, 257], [0, 300, 300, 300], [0, 64, 128, 192]):
        cu_seqlens, results = torch.tensor(ends, dtype=torch.int32, device="cuda"), []
        for f in (fast, function):
            torch.compiler.cudagraph_mark_step_begin()
            out = f(q, k, v, cu_seqlens)
            results.append([x.clone() for x in (out, *torch.autograd.grad(out, (q, k, v), dout))])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


def ruled(kind: str):
    """What a call has more than the usual rules, and the tensors besides q, k and v that get a gradient."""
    ids = torch.arange(400, device="cuda") // 90
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 801, generator=generator).cuda().requires_grad_()
    sinks = torch.randn(4, generator=generator).cuda().requires_grad_()

    def score(score, batch, head, q_idx, kv_idx):
        return score + table[head, q_idx - kv_idx + 400]

    bias = torch.randn(1, 4, 1, 400, generator=generator).cuda().bfloat16().requires_grad_()
    documents = masks.document(ids)
    blocks = block_mask(documents, None, None, 400, 400)
    return {
        "functions": ({"mask": documents, "score": score}, [table]),
        "bias, sinks, dropout": ({"bias": bias, "sinks": sinks, "dropout_p": 0.2, "causal": True}, [bias, sinks]),
        "blocks, alibi": ({"mask": documents, "block_mask": blocks, "alibi_slopes": sinks.detach().sigmoid()}, []),
    }[kind]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", ["functions", "bias, sinks, dropout", "blocks, alibi"])
def test_functions_and_all_else(kind, mode):
    """As eager calls compute them, by the same kernels; recorded launches, too, draw anew what is dropped."""
    rules, others = ruled(kind)

    def function(q, k, v):
        return attention(2.0 * q, k, v, **rules) + 1.0

    fast = torch.compile(function, mode=mode, fullgraph=True)
    drawn = []
    for seed in (0, 1, 2, 2, None, None):
        tensors = [x.detach().requires_grad_() for x in leaves(sq=400, sk=400)]
        results = []
        for f in (fast, function):
            if seed is not None:
                torch.manual_seed(seed)
            torch.compiler.cudagraph_mark_step_begin()
            out = f(*tensors)
            results.append([x.clone() for x in (out, *torch.autograd.grad(out, [*tensors, *others], torch.ones_like(out)))])
        drawn.append(results[0][0])
        if seed is None and "dropout" in kind:
            continue
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    if "dropout" in kind:
        assert torch.equal(drawn[2], drawn[3])
        assert not torch.equal(drawn[4], drawn[5])


def test_autocast(mechanism):
    def function(q, k, v):
        with torch.autocast("cuda", torch.bfloat16):
            return attend(mechanism)(q, k, v)

    tensors = [x.detach().float().requires_grad_() for x in leaves()]
    fast = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(fast(*tensors), function(*tensors), strict=True):
        assert torch.equal(got, wanted)


def test_selective_checkpointing(mechanism, monkeypatch):
    """The forward kernel is launched once where its results are saved by name, and twice where they are not."""
    launched = []
    plain = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *arguments: launched.append(1) or plain(*arguments))
    q, k, v = leaves()
    for policy, count in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)):

        def decide(context, operator, *arguments, policy=policy, **options):
            return policy if operator is OPS.attention.default else CheckpointPolicy.PREFER_RECOMPUTE

        launched.clear()
        out, _ = checkpoint(
            attend(mechanism),
            q,
            k,
            v,
            use_reentrant=False,
            context_fn=lambda decide=decide: create_selective_checkpoint_contexts(decide),
        )
        out.sum().backward()
        assert len(launched) == count


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, return_lse=True, **RULES)


def exported():
    batch, sq, sk = Dim("batch"), Dim("sq"), Dim("sk")
    shapes = {"q": {0: batch, 1: sq}, "k": {0: batch, 1: sk}, "v": {0: batch, 1: sk}}
    return torch.export.export(Attend(), tuple(x.detach() for x in leaves()), dynamic_shapes=shapes)


SIZES = ((2, 300, 400), (5, 170, 900), (1, 1, 130))


def test_export(tmp_path):
    torch.export.save(exported(), tmp_path / "attend.pt2")
    module = torch.export.load(tmp_path / "attend.pt2").module()
    for sizes in SIZES:
        tensors = [x.detach() for x in leaves(*sizes)]
        assert_same_bits(module(*tensors), Attend()(*tensors))


FRESH = """
import faulthandler, sys, torch, cute_attn
faulthandler.enable()
package, tensors, result = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
print("loaded", flush=True)
results = []
for inputs in torch.load(tensors):
    results.append(run(*inputs))
    torch.cuda.synchronize()
    print("ran", flush=True)
torch.save(results, result)
print("saved", flush=True)
"""


class Double(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def in_a_fresh_process(tmp_path, program, inputs):
    """A package of the program, loaded and run there: ``(the process, its results)``."""
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    torch.save(inputs, tmp_path / "inputs")
    paths = [str(package), str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    done = subprocess.run([sys.executable, "-c", FRESH, *paths], capture_output=True, text=True, check=False)
    return done, torch.load(tmp_path / "outputs") if done.returncode == 0 else None


def test_aotinductor_in_a_fresh_process(tmp_path):
    inputs = [[x.detach() for x in leaves(*sizes)] for sizes in SIZES]
    done, results = in_a_fresh_process(tmp_path, exported(), inputs)
    if done.returncode < 0:  # a signal ended it: is attention to blame?
        x = torch.ones(8, device="cuda")
        other, _ = in_a_fresh_process(tmp_path, torch.export.export(Double(), (x,)), [[x]])
        if (other.returncode, other.stdout) == (done.returncode, done.stdout):
            pytest.skip(f"torch {torch.__version__} ends with signal {-done.returncode} where it loads a package of 2 · x, too")
    said = f"exit status {done.returncode}, after: {done.stdout.split()}\n{done.stderr}"
    assert (done.returncode, done.stdout.split()) == (0, ["loaded", *["ran"] * len(SIZES), "saved"]), said
    for found, tensors in zip(results, inputs, strict=True):
        # Packages of torch 2.11 go on where an operator raises, and return None: it has then said why on stderr.
        assert all(x is not None for x in found), said
        assert_same_bits(found, Attend()(*tensors))


WRONG = {
    "float32": (lambda x: x.float(), "the GPU kernels take float16 and bfloat16"),
    "head_dim": (lambda x: x[..., :20], "a multiple of 8 up to 256 is needed"),
    "strides": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "1 is needed (head_dim contiguous)"),
    "alignment": (lambda x: x[..., 4:60], "a multiple is needed: try q.clone()"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_keep_their_message(change, words):
    tensors = [change(x.detach()) for x in leaves()]
    fast = torch.compile(lambda q, k, v: attention(q, k, v), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(*tensors)
    assert words in str(caught.value)
