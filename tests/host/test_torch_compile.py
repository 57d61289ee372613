"""torch.compile, torch.export and AOTInductor: one node of a graph, whatever the lengths and values, and the bits of eager."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from cute_attn import attention, attention_varlen, masks
from tests.host.processes import run_quick
from tests.support import make_gradients, make_qkv

# Torch's own, of what it uses itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning")

FORWARD, BACKWARD = "cute_attn.attention.default", "cute_attn.attention_backward.default"
# Everything that attention takes but the tensors.
OPTIONS = {
    "nothing": {},
    "causal": {"causal": True},
    "window": {"window": (30, 5)},
    "one side": {"window": (30, None)},
    "both sides open": {"window": (-1, None)},
    "causal window": {"causal": True, "window": [30, 4]},
    "scale": {"scale": 0.3},
    "an int scale": {"scale": 1},
    "softcap": {"softcap": 5.0},
    "no softcap": {"softcap": None},
    "deterministic": {"deterministic": True},
    "reference": {"backend": "reference"},
    "all": {"scale": 0.2, "causal": True, "window": (30, None), "softcap": 5.0, "deterministic": True, "backend": "auto"},
}


@pytest.fixture(autouse=True)
def anew():
    """No graphs of other tests; and one thread, since tests that share cores would wait for one another's."""
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compiled(function, backend="aot_eager", **options):
    """The compiled function, which may not break its graph, and the counter of the graphs that were made."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def leaves(batch=2, sq=70, sk=90, heads=4, heads_kv=2, dtype=torch.bfloat16, seed=0):
    return [x.requires_grad_() for x in make_qkv(batch, sq, sk, heads, heads_kv, 16, 24, dtype, seed=seed)]


def both_passes(function, q, k, v, *arguments):
    """Outputs and gradients of all of them, in one list."""
    outputs = function(q, k, v, *arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = make_gradients(q.detach(), v.detach())
    return [*outputs, *torch.autograd.grad(outputs, (q, k, v), gradients[: len(outputs)])]


def assert_same_bits(function, compiled, *arguments):
    for got, wanted in zip(both_passes(compiled, *arguments), both_passes(function, *arguments), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_everything_that_attention_takes(options, return_lse):
    def function(q, k, v):
        return attention(q, k, v, return_lse=return_lse, **options)

    fast, counter = compiled(function)
    assert_same_bits(function, fast, *leaves())
    with torch.no_grad():
        assert_same_outputs(function, fast, *leaves())
    assert counter.frame_count == 2


def assert_same_outputs(function, compiled, *arguments):
    found, expected = (f(*arguments) for f in (compiled, function))
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


def lowered(function, *arguments):
    """The operators of the graphs that a compiler is handed: the forward pass's and the backward pass's."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([name for name in calls(graph) if "getitem" not in name and "aten.detach" not in name])
        return make_boxed_func(graph.forward)

    fast = torch.compile(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    out = fast(*arguments)
    torch.autograd.grad(out, [x for x in arguments if x.requires_grad], torch.randn_like(out))
    return graphs


def test_the_reference_is_one_operator():
    """However many tiles it has: a node of the forward pass, a node of the backward pass."""

    def function(q, k, v):
        return attention(q, k, v, causal=True, softcap=3.0)

    assert lowered(function, *leaves(sq=300, sk=2048)) == [[FORWARD], [BACKWARD]]


# Sizes that are equal where the graph is made are one size to torch.compile: here no two are.
SIZES = [(3, 70, 90), (5, 71, 300), (7, 40, 129), (9, 128, 131), (3, 64, 80)]


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_lengths_and_batches_recompile_nothing(dynamic, graphs):
    """The first sizes are constants unless all are asked to be dynamic; the second ones make the graph for all others."""

    def function(q, k, v):
        return attention(q, k, v, causal=True, window=(40, None), return_lse=True)

    fast, counter = compiled(function, dynamic=dynamic)
    for sizes in SIZES:
        assert_same_bits(function, fast, *leaves(*sizes))
    assert counter.frame_count == graphs


def scaled(q, k, v, scale):
    return attention(q, k, v, scale=scale)


def capped(q, k, v, cap):
    return attention(q, k, v, scale=0.1, softcap=cap)


def in_a_window(q, k, v, left):
    return attention(q, k, v, causal=True, window=(left, None))


def of_shapes(q, k, v, length):
    return attention(q, k[:, :length], v[:, :length], window=(length // 2, length), scale=q.shape[-1] ** -0.5)


def with_all(q, k, v, i):
    return attention(q, k, v, scale=0.05 * i, softcap=10.0 * i, window=(i + 3, i), return_lse=True)


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (scaled, [0.1, 0.2, 0.3, 0.4]),
        (scaled, [2, 3, 4]),
        (scaled, [np.float64(0.1 * i) for i in range(1, 4)]),
        (scaled, [torch.tensor(0.1 * i) for i in range(1, 4)]),
        (capped, [10.0, 20.0, 30.0, 40.0]),
        (in_a_window, [10, 20, 30, 40]),
        (in_a_window, [np.int64(10 * i) for i in range(1, 4)]),
        (in_a_window, [torch.tensor(10 * i) for i in range(1, 4)]),
        (of_shapes, [20, 30, 40, 50]),
        (with_all, [2, 3, 4, 5]),
    ],
)
def test_values_recompile_nothing(function, values):
    """The first value is a constant; the second makes the graph for all others."""
    fast, counter = compiled(function)
    q, k, v = leaves()
    for value in values:
        assert_same_bits(function, fast, q, k, v, value)
    assert counter.frame_count <= 2


class Layer(torch.nn.Module):
    """Self-attention whose rules are its own."""

    def __init__(self, scale=None, softcap=0.0, window=None, width=32, attend=attention):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.rules = {"scale": scale, "softcap": softcap, "window": window}
        self.attend = attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(-3)
        return x + self.attend(q, k, v, causal=True, **self.rules).flatten(-2)


@pytest.mark.parametrize("left", [lambda i: None, lambda i: torch.tensor(10 * i)], ids=["none", "tensor"])
def test_layers_that_differ_share_one_graph(left):
    """Ints that are attributes of a module are constants to torch.compile, whoever uses them; in a tensor they are not."""
    torch.manual_seed(0)
    layers = [Layer(scale=0.1 * i, softcap=5.0 * i, window=(left(i), None)) for i in range(1, 6)]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    x = torch.randn(3, 60, 32)
    for layer in layers:
        assert torch.equal(layer(x), layer.forward(x))
    assert counter.frame_count == 2


class InAWindow(torch.nn.Module):
    """Attention whose window is an attribute."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def forward(self, x):
        return attention(x, x, x, causal=True, window=(self.left, 0))


@pytest.mark.parametrize(("dynamic", "graphs"), [(False, 4), (True, 2)])
def test_ints_of_modules_are_constants_if_torch_makes_them_so(dynamic, graphs):
    """As it does unless told otherwise."""
    layers, counter = [InAWindow(10 * i) for i in range(1, 5)], CompileCounterWithBackend("aot_eager")
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=dynamic):
        for layer in layers:
            layer.compile(backend=counter, fullgraph=True)
        x = torch.randn(3, 60, 2, 16)
        for layer in layers:
            assert torch.equal(layer(x), layer.forward(x))
    assert counter.frame_count == graphs


def test_numbers_are_constants_of_a_graph_that_has_them_all():
    """A CUDA graph can record the operator that takes them, and not the one that reads tensors."""
    assert lowered(lambda q, k, v: attention(q, k, v, scale=0.3, softcap=5.0), *leaves()) == [[FORWARD], [BACKWARD]]
    for name in ("attention", "attention_backward"):
        packet = getattr(torch.ops.cute_attn, name)
        assert torch.Tag.cudagraph_unsafe in packet.Tensor.tags
        assert torch.Tag.cudagraph_unsafe not in packet.default.tags


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    """Transposed views, and products around the operator that Inductor fuses: strides are those that eager has."""

    def function(q, k, v, scale):
        q, k, v = (2.0 * x.transpose(1, 2) for x in (q, k, v))
        out, lse = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        return out.transpose(1, 2) * 3.0, lse - 1.0

    fast = torch.compile(function, mode=mode, fullgraph=True)
    for sizes, scale in ((70, 0.1), (90, 0.2), (110, 0.3)):
        q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves(sq=sizes, dtype=torch.float32))
        outputs, expected = fast(q, k, v, scale), function(q, k, v, scale)
        douts = [torch.randn_like(x) for x in expected]
        found = [*outputs, *torch.autograd.grad(outputs, (q, k, v), douts)]
        for got, wanted in zip(found, [*expected, *torch.autograd.grad(expected, (q, k, v), douts)], strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where):
    def function(q, k, v):
        if where == "around":
            return attention(q, k, v, causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v, causal=True)

    fast, counter = compiled(function)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        q, k, v = leaves(dtype=torch.float32)
        assert fast(q, k, v).dtype == torch.bfloat16
        assert_same_bits(function, fast, q, k, v)
    assert counter.frame_count == 1


def test_a_device_without_autocast():
    """To ask whether it is enabled there is an error; a call under another device's has to say nothing of it."""
    fast, counter = compiled(lambda q, k, v: attention(q, k, v))
    q, k, v = (x.detach().to("meta") for x in leaves(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == fast(q, k, v).dtype == torch.float32
    assert counter.frame_count == 1


def test_inference_mode():
    fast, _ = compiled(lambda q, k, v: attention(q, k, v, causal=True, return_lse=True))
    with torch.inference_mode():
        assert_same_outputs(lambda q, k, v: attention(q, k, v, causal=True, return_lse=True), fast, *leaves())


@pytest.mark.parametrize("empty", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_sizes_of_zero(empty):
    def function(q, k, v):
        return attention(q, k, v, return_lse=True, causal=True)

    fast, _ = compiled(function)
    assert_same_bits(function, fast, *leaves(*empty))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_in_cpp():
    """Its wrapper there takes operators that return tensors, and no lists of these."""
    q, k, v = leaves(sq=30, sk=30, dtype=torch.float32)
    quick = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
    with torch._inductor.config.patch(cpp_wrapper=True, **quick):
        out = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True)(q, k, v)
        got = torch.autograd.grad(out.sum(), (q, k, v))
    for x, y in zip(got, torch.autograd.grad(attention(q, k, v, causal=True).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(x, y)


def test_vmap():
    mapped = torch.vmap(lambda q, k, v: attention(q, k, v, causal=True), (0, 0, None))
    fast, _ = compiled(mapped)
    q, k, _ = (torch.stack([x.detach() for x in member]) for member in zip(leaves(), leaves(seed=1), strict=True))
    *_, v = leaves()
    q, k = q.requires_grad_(), k.requires_grad_()
    outs = fast(q, k, v), mapped(q, k, v)
    dout = torch.randn_like(outs[0])
    for got, wanted in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in outs), strict=True):
        assert torch.equal(got, wanted)


def test_gradients_of_some_inputs():
    fast, _ = compiled(lambda q, k, v: attention(q, k, v, causal=True))
    for needs in ("q", "kv", "v"):
        q, k, v = (x.detach().requires_grad_(name in needs) for name, x in zip("qkv", leaves(), strict=True))
        inputs = [x for x in (q, k, v) if x.requires_grad]
        got = torch.autograd.grad(fast(q, k, v).square().sum(), inputs)
        for x, wanted in zip(got, torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), inputs), strict=True):
            assert torch.equal(x, wanted)


# ---- wrong arguments -------------------------------------------------------------------------------------------------


q, k, v = make_qkv(2, 9, 11, 4, 2, 16, 24, torch.float32)
WRONG = {
    "shape": (lambda: (q, k, v[:, 1:]), {}, "equal (seqlen, heads) are needed: only head_dim may differ"),
    "dimensions": (lambda: (q, k, v[0]), {}, "add the missing ones with v.unsqueeze(0)"),
    "dtype": (lambda: (q, k, v.half()), {}, "one dtype is needed: try k.to(q.dtype)"),
    "heads": (lambda: (q[:, :, :3], k, v), {}, "q's must be a multiple of k's (GQA)"),
    "causal": (lambda: (q, k, v), {"causal": "false"}, "causal is a str, 'false'; True or False is needed"),
    "a flag in a tensor": (lambda: (q, k, v), {"causal": torch.tensor(True)}, "pass bool(causal) from outside"),
    "window": (lambda: (q, k, v), {"window": (-3, 0)}, "window's left side is -3; an int ≥ 0 is needed, or None or -1"),
    "window's kind": (lambda: (q, k, v), {"window": 3}, "window is 3; a pair (left, right) is needed"),
    "scale": (lambda: (q, k, v), {"scale": "0.1"}, "scale is a str, '0.1'; a finite number is needed"),
    "a small scale": (lambda: (q, k, v), {"scale": 1e-44}, "in float32, so from 1.18e-38 to 3.4e+38 is needed"),
    "an infinite scale": (lambda: (q, k, v), {"scale": float("inf")}, "scale is inf; a finite number is needed"),
    "softcap": (lambda: (q, k, v), {"softcap": -1.0}, "softcap is -1.0; a number ≥ 0 is needed"),
    "backend": (lambda: (q, k, v), {"backend": "triton"}, "backend is 'triton'; one of 'auto', 'cute', 'reference'"),
    "device": (lambda: (q, k, v), {"backend": "cute"}, "the kernels need CUDA tensors: try .cuda(), or backend='auto'"),
    "mechanism": (lambda: (q, k, v), {"mechanism": "cp_async"}, "mechanism is 'cp_async' and the reference backend runs"),
}


@pytest.mark.parametrize(("tensors", "options", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_wrong_arguments_keep_their_message(tensors, options, words, fullgraph):
    """Whole graphs end in torch's exception, which holds the message; others in the message's own."""
    fast = torch.compile(lambda q, k, v: attention(q, k, v, **options), backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fast(*tensors())
    assert words in str(caught.value)
    if not fullgraph:
        assert isinstance(caught.value, (TypeError, ValueError))


@pytest.mark.parametrize(("tensors", "options", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_of_what_is_exported(tensors, options, words):
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        torch.export.export(Attend(**options), tensors())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": torch.tensor(1e-44)}, "in float32, so from"),
        ({"softcap": torch.tensor(-2.0)}, "softcap is -2.0; a number ≥ 0 is needed"),
        ({"window": (torch.tensor(-3), 0)}, "window's left side is -3; an int ≥ 0 is needed"),
    ],
)
def test_values_in_tensors_are_looked_at_when_the_graph_runs(options, words):
    fast, _ = compiled(lambda q, k, v, **options: attention(q, k, v, **options))
    with pytest.raises(ValueError, match=re.escape(words)):
        fast(q, k, v, **options)


def test_forward_mode_and_transforms_say_so():
    for transform, words in (
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "reverse mode only: try .backward()"),
        (torch.func.grad, "attention has them for torch.autograd only: try torch.autograd.grad"),
    ):
        fast, _ = compiled(transform(lambda x: attention(x, k, v).sum()))
        with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
            fast(q)
        assert words in str(caught.value)


def test_double_backward_says_so():
    fast, _ = compiled(lambda q, k, v: attention(q, k, v))
    x = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x, k, v).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


# ---- export ----------------------------------------------------------------------------------------------------------


class Attend(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return attention(q, k, v, return_lse=True, **self.options)


def exported(options, strict):
    batch, sq, sk = Dim("batch"), Dim("sq"), Dim("sk")
    shapes = {"q": {0: batch, 1: sq}, "k": {0: batch, 1: sk}, "v": {0: batch, 1: sk}}
    return torch.export.export(Attend(**options), (q, k, v), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize(("options", "strict"), [({}, False), (OPTIONS["all"], False), (OPTIONS["all"], True)])
def test_export_with_dynamic_batch_and_lengths(options, strict, tmp_path):
    """There and back through a file; gradients flow through what was exported without them."""
    program = exported(options, strict)
    torch.export.save(program, tmp_path / "attend.pt2")
    loaded = torch.export.load(tmp_path / "attend.pt2")
    for graph in (program, loaded):
        assert [name for name in calls(graph) if "getitem" not in name] == [FORWARD]
        for sizes in ((3, 9, 11), (5, 150, 140), (1, 1, 1)):
            assert_same_bits(Attend(**options), graph.module(), *leaves(*sizes, dtype=torch.float32))


class OfShapes(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, scale=q.shape[-1] ** -0.5, window=(k.shape[1] // 2, 3))


class OfTensors(torch.nn.Module):
    def forward(self, q, k, v, scale, left):
        return attention(q, k, v, scale=scale, window=(left, 0))


def test_values_of_exported_graphs():
    """From shapes they follow them, and in tensors they are inputs."""
    batch, sq, sk = Dim("batch"), Dim("sq"), Dim("sk")
    shapes = {"q": {0: batch, 1: sq}, "k": {0: batch, 1: sk}, "v": {0: batch, 1: sk}}
    graph = torch.export.export(OfShapes(), (q, k, v), dynamic_shapes=shapes).module()
    for sizes in ((3, 9, 11), (5, 150, 140)):
        assert_same_bits(OfShapes(), graph, *leaves(*sizes, dtype=torch.float32))
    values = [(torch.tensor(scale), torch.tensor(left)) for scale, left in ((0.3, 4), (0.2, 2), (1.0, -1))]
    graph = torch.export.export(OfTensors(), (q, k, v, *values[0])).module()
    for value in values:
        assert torch.equal(graph(q, k, v, *value), OfTensors()(q, k, v, *value))


def test_export_decomposes_and_compiles():
    program = exported({"causal": True}, False).run_decompositions()
    fast, counter = compiled(program.module(), dynamic=True)
    for sizes in ((3, 9, 11), (5, 150, 140)):
        assert_same_bits(Attend(causal=True), fast, *leaves(*sizes, dtype=torch.float32))
    assert counter.frame_count == 1


FRESH = """
import sys, torch, cute_attn
torch.set_num_threads(1)  # as here: where threads share a tensor, a logarithm may have another last bit
package, tensors, result = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save([run(*inputs) for inputs in torch.load(tensors)], result)
"""


class AttendToAll(Attend):
    """And to the elements of a batch as sequences of different lengths; and with functions, which the package holds."""

    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k):
        packed = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q, cu_seqlens_k, **self.options)
        ruled = attention(q, k, v, mask=masks.window(40, 3), bias=q[:, :1, :1, :1])
        sunk = attention(q, k, v, sinks=q[0, 0, :, 0])
        return *super().forward(q, k, v), packed, ruled, sunk


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, and there is no g++")
def test_aotinductor_in_a_fresh_process(tmp_path):
    options = {"causal": True, "window": (30, None), "softcap": 5.0, "scale": 0.2}
    batch, sq, sk = Dim("batch"), Dim("sq"), Dim("sk")
    dims = {"q": {0: batch, 1: sq}, "k": {0: batch, 1: sk}, "v": {0: batch, 1: sk}}
    dims |= {"cu_seqlens_q": {0: Dim("ends_q")}, "cu_seqlens_k": {0: Dim("ends_q")}}
    sizes, inputs = ((2, 9, 11), (5, 70, 90)), []
    for count, *lengths in sizes:
        cu_seqlens = (torch.tensor([0, n, *[count * n] * 2], dtype=torch.int32) for n in lengths)
        inputs.append([*(x.detach() for x in leaves(count, *lengths, dtype=torch.float32)), *cu_seqlens])
    program = torch.export.export(AttendToAll(**options), tuple(inputs[0]), dynamic_shapes=dims)
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "attend.pt2"),
        # Headers that are compiled ahead take longer than to read them for one package, and nobody times this one.
        inductor_configs={"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    torch.save(inputs, tmp_path / "inputs")
    paths = [str(package), str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    run_quick(FRESH, *paths).check_returncode()
    for found, tensors in zip(torch.load(tmp_path / "outputs"), inputs, strict=True):
        same = [torch.equal(*x) for x in zip(found, AttendToAll(**options)(*tensors), strict=True)]
        assert same == [True] * len(found)


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    (example,) = (block for block in blocks if "torch.compile" in block)
    q, k, v = (torch.randn(3, 64, 2, 16) for _ in range(3))
    names = {"torch": torch, "attention": attention, "q": q, "k": k, "v": v, "x": q.clone().requires_grad_()}
    exec(example.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), names)
    wanted = attention(q.requires_grad_(), k, v, causal=True)
    wanted.sum().backward()
    assert torch.equal(names["x"].grad, q.grad)
    assert torch.equal(torch.export.load("attend.pt2").module()(q, k, v), wanted)
