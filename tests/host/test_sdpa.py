"""torch's scaled_dot_product_attention by cute-attn: beside float64, what goes to torch and why, and in torch's place."""

from __future__ import annotations

import inspect
import math
import threading

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn import functional

from cute_attn import launch, machine, reference, sdpa
from tests import interfaces
from tests.interfaces import CALLS

# Torch's own, of what it uses itself.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning"),
]
TORCHS = functional.scaled_dot_product_attention


def on_reference(*tensors, **options):
    assert sdpa.why_not(*tensors, **options, backend="reference") is None
    return sdpa.scaled_dot_product_attention(*tensors, **options, backend="reference")


def made(shape_q=(2, 4, 6, 16), shape_k=None, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = shape_q, shape_k or shape_q, shape_k or shape_q
    return [torch.randn(x, generator=generator).to(dtype).requires_grad_(requires_grad) for x in shapes]


def test_signature():
    """That of torch's documentation; C++ functions have no other."""
    parameters = inspect.signature(sdpa.scaled_dot_product_attention).parameters
    documented = TORCHS.__doc__.partition("(")[2].partition(")")[0]
    names = [name.partition("=")[0].strip() for name in documented.split(",")]
    assert [*names, "backend"] == list(parameters)
    defaults = {name: x.default for name, x in parameters.items() if x.default is not inspect.Parameter.empty}
    for name in names[3:]:
        assert f"{name}={defaults[name]}" in documented
    assert list(inspect.signature(sdpa.why_not).parameters) == list(parameters)


@pytest.mark.parametrize("name", CALLS)
def test_beside_float64(name):
    interfaces.check_sdpa(name, on_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    interfaces.check_sdpa("more queries", on_reference, dtype=dtype)


@pytest.mark.parametrize("sizes", [(5, 5), (5, 9), (9, 5), (1, 4), (4, 1), (3, 0), (0, 3)])
def test_a_query_sees_what_torch_says(sizes):
    """Where all scores are 0 and values are rows of the unit matrix, the output says which keys a query saw."""
    sq, sk = sizes
    q, k, v = torch.zeros(1, 1, sq, 8), torch.zeros(1, 1, sk, 8), torch.eye(sk, max(sk, 1))[None, None]
    for is_causal in (False, True):
        seen, wanted = (function(q, k, v, is_causal=is_causal) for function in (on_reference, TORCHS))
        assert seen.shape == wanted.shape
        assert torch.equal(seen != 0, wanted != 0)


def test_autocast():
    tensors = made((1, 2, 6, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out, wanted = on_reference(*tensors), sdpa.scaled_dot_product_attention(*tensors)
    assert out.dtype is wanted.dtype is torch.bfloat16
    assert torch.equal(out, on_reference(*(x.bfloat16() for x in tensors)))


# ---- what goes to torch ----------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = property(lambda self: True)
    get_device = lambda self: 0  # noqa: E731


@pytest.fixture
def a_gpu(monkeypatch):
    """Tensors that a kernel, which is the reference, takes for its own; and the calls that come there."""
    seen = []

    def forward(call, mechanism, return_lse, for_backward, q, k, v):
        tensors = launch.check_tensors_for_gpu(q, k, v, call)
        seen.append(call)
        return reference.attention(*(x.as_subclass(torch.Tensor) for x in tensors), call)

    monkeypatch.setattr(sdpa, "_TAKEN", {*sdpa._TAKEN, OnGpu})
    monkeypatch.setattr(sdpa, "_without_kernels", lambda device: None)
    monkeypatch.setattr(launch, "forward", forward)
    return seen


def gpu_tensors(*shapes, dtype=torch.bfloat16):
    return [x.as_subclass(OnGpu) for x in made(*shapes, dtype=dtype)]


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("no ")])
def test_what_comes_to_the_kernels(a_gpu, name):
    shape_q, shape_k, options = CALLS[name]
    tensors = gpu_tensors(shape_q, shape_k)
    assert sdpa.why_not(*tensors, **options) is None
    out = sdpa.scaled_dot_product_attention(*tensors, **options)
    (call,) = a_gpu
    assert call.heads_kv == shape_k[-3]
    assert call.batch == math.prod(shape_q[:-3])
    assert torch.equal(out, on_reference(*(x.as_subclass(torch.Tensor) for x in tensors), **options))


def torchs_instead(monkeypatch):
    """What comes to torch's function."""
    calls = []
    monkeypatch.setattr(sdpa, "_torchs", lambda *arguments, **options: calls.append((arguments, options)))
    return calls


# Arguments that are other than usual, as shapes if they are tensors, and words of the reason.
REASONS = [
    ({"attn_mask": torch.ones(6, 6)}, "attn_mask is a Tensor of shape (6, 6)", "of torch.bool or torch.bfloat16", "try .to("),
    ({"attn_mask": torch.ones(6, 6, device="meta").bool()}, "dtype torch.bool on meta", "on cpu is", "try .to(query.device)"),
    ({"attn_mask": torch.ones(5, 6).bool()}, "is a Tensor of shape (5, 6)", "(…, heads, seqlen_q, seqlen_k)", "try unsqu"),
    ({"attn_mask": torch.ones(6, 6).bool(), "is_causal": True}, "is_causal is True", "one of the two", "leave out"),
    ({"attn_mask": [True]}, "attn_mask is a list", "is needed", "try torch.tensor"),
    ({"dropout_p": 1.0}, "dropout_p is 1.0", "from 0.0 to below 1.0 is needed", "try 0.0"),
    ({"dropout_p": "0"}, "dropout_p is a str, '0'", "from 0.0 to below 1.0 is needed", "try 0.0"),
    ({"is_causal": 1}, "is_causal is 1", "bools are needed", "try bool(is_causal)"),
    ({"scale": -1.0}, "scale is -1.0", "a float from 1e-33 to 1e+33 is needed", "try None"),
    ({"scale": True}, "scale is True", "is needed", "try None"),
    ({"scale": torch.ones(())}, "scale is a Tensor of shape ()", "is needed", "try None"),
    ({"query": "q"}, "of the types str, OnGpu, OnGpu", "torch.Tensor is needed", "pass what they wrap"),
    ({"key": (2, 2, 6, 16), "value": (2, 2, 6, 16)}, "(2, 2, 6, 16)", "are needed", "try expand"),
    ({"key": (2, 3, 6, 16), "value": (2, 3, 6, 16), "enable_gqa": True}, "(2, 3, 6, 16)", "a divisor with", "try expand"),
    ({"key": (1, 4, 6, 16), "value": (1, 4, 6, 16)}, "(1, 4, 6, 16)", "one dtype, device and batch are needed", "try expand"),
    ({"value": (2, 4, 5, 16)}, "(2, 4, 5, 16)", "(…, heads, seqlen, head_dim)", "try expand"),
    ({"value": (2, 1, 6, 16)}, "(2, 1, 6, 16)", "(…, heads, seqlen, head_dim)", "try expand"),
    ({"query": (6, 16), "key": (6, 16), "value": (6, 16)}, "a OnGpu of shape (6, 16)", "are needed", "try expand"),
    ({"dtype": torch.float32}, "dtype is torch.float32", "float16 or bfloat16 is needed", "try .to(torch.bfloat16)"),
    ({"query": (2, 4, 6, 20), "key": (2, 4, 6, 20)}, "head_dim is 20", "multiples of 8 up to 256", "pad with"),
    ({"value": (2, 4, 6, 264)}, "head_dim_v 264", "multiples of 8 up to 256", "pad with"),
    ({"step": 2}, "the last dimension of key has stride 2", "1 is needed", "try key.contiguous()"),
]


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: "-".join(reason[0]))
def test_what_goes_to_torch(a_gpu, reason, monkeypatch):
    """And why: every sentence says what was got, what is needed, and what to try."""
    changed, *words = reason
    dtype, step = changed.get("dtype", torch.bfloat16), changed.get("step", 1)
    given = dict.fromkeys(("query", "key", "value"), (2, 4, 6, 16)) | changed
    given = {name: x for name, x in given.items() if name not in ("dtype", "step")}
    for name, x in given.items():
        if isinstance(x, tuple):
            every = step if name == "key" else 1
            given[name] = torch.zeros(*x[:-1], x[-1] * every, dtype=dtype)[..., ::every].as_subclass(OnGpu)
    calls = torchs_instead(monkeypatch)
    why = sdpa.why_not(**given)
    assert why is not None
    for part in words:
        assert part in why
    sdpa.scaled_dot_product_attention(**given)
    ((arguments, others),) = calls
    for got, name in zip(arguments[:4], ("query", "key", "value", "attn_mask"), strict=True):
        assert got is given.get(name)
    assert arguments[4:] == (given.get("dropout_p", 0.0), given.get("is_causal", False))
    assert others == {"scale": given.get("scale"), "enable_gqa": given.get("enable_gqa", False)}
    assert not a_gpu


def test_numbers_that_are_taken(a_gpu):
    tensors = gpu_tensors()
    for given in ({"scale": np.float64(0.5)}, {"scale": 1}, {"dropout_p": 0}):
        assert sdpa.why_not(*tensors, **given) is None


def test_tensors_on_the_cpu_go_to_torch(monkeypatch):
    tensors = made()
    why = sdpa.why_not(*tensors)
    assert why == "query lies on cpu, where torch's function is the faster one; CUDA is needed: try backend='reference'"
    assert torch.equal(sdpa.scaled_dot_product_attention(*tensors, is_causal=True), TORCHS(*tensors, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_the_reference_does_not_take():
    tensors = made()
    assert "dtype is torch.int32; float16 or bfloat16" in sdpa.why_not(*(x.int() for x in tensors), backend="reference")
    assert "dtype, device and batch" in sdpa.why_not(tensors[0].to_sparse(), *tensors[1:], backend="reference")
    nested = torch.nested.nested_tensor([torch.zeros(4, 6, 16)] * 2)
    assert "several shapes" in sdpa.why_not(nested, nested, nested, backend="reference")
    assert sdpa.scaled_dot_product_attention(nested, nested, nested, backend="reference").is_nested


def test_transforms_go_to_torch():
    tensors = made()
    seen = []

    def function(q, k, v):
        seen.append(sdpa.why_not(q, k, v, backend="reference"))
        return sdpa.scaled_dot_product_attention(q, k, v, backend="reference").sum()

    gradient = torch.func.grad(function)(*tensors)
    (wanted,) = torch.autograd.grad(TORCHS(*(x.requires_grad_() for x in tensors)).sum(), tensors[0])
    torch.testing.assert_close(gradient, wanted)
    with forward_ad.dual_level():
        function(*(x.detach() for x in tensors))
    assert [why.partition(",")[0] for why in seen] == ["torch.func transforms the call"] * 2


def test_wrong_arguments_get_torchs_errors():
    q, k, v = made((2, 4, 6, 16), (2, 3, 6, 16))
    with pytest.raises(RuntimeError, match="must match"):
        sdpa.scaled_dot_product_attention(q, k, v, backend="reference")


def test_an_error_that_has_nothing_to_do_with_the_call_is_raised(a_gpu, monkeypatch):
    """What attention refuses goes to torch if there is a reason, and only then."""

    def broken(*_):
        raise ValueError("something else")

    monkeypatch.setattr(launch, "forward", broken)
    with pytest.raises(ValueError, match="something else"):
        sdpa.scaled_dot_product_attention(*gpu_tensors())


def test_a_gpu_without_kernels(monkeypatch):
    sdpa._looked_at.cache_clear()
    monkeypatch.setattr(machine, "backend", lambda: ("reference", "there is no driver"))
    assert sdpa._without_kernels(0) == "there is no driver"
    sdpa._looked_at.cache_clear()
    monkeypatch.setattr(machine, "backend", lambda: ("cute", ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(launch, "device_target", launch.device_target.__wrapped__)
    assert "compute capability 7.5" in sdpa._without_kernels(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert sdpa._without_kernels(1) is None
    sdpa._looked_at.cache_clear()


# ---- in torch's place ------------------------------------------------------------------------------------------------


def calls_torchs(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_replaced(monkeypatch):
    """A model that knows nothing of us, and torch's own modules."""
    tensors = made((1, 2, 6, 16))
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(sdpa, "attention", lambda *a, plain=sdpa.attention, **options: seen.append(a) or plain(*a, **options))
    torch._dynamo.reset()
    with sdpa.replaced("reference"):
        out = calls_torchs(*tensors)
        eager = layer(x, x, x, need_weights=False)[0]
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, x, x, need_weights=False)[0]
    assert functional.scaled_dot_product_attention is TORCHS
    assert len(seen) >= 3
    assert torch.equal(out, on_reference(*tensors, is_causal=True))
    for mixed in (eager, compiled):
        torch.testing.assert_close(mixed, layer(x, x, x, need_weights=False)[0])


def test_replaced_on_the_cpu_is_torchs():
    tensors = made()
    with sdpa.replaced():
        assert functional.scaled_dot_product_attention is not TORCHS
        assert torch.equal(calls_torchs(*tensors), TORCHS(*tensors, is_causal=True))


def test_blocks_in_blocks_and_exceptions():
    def backend():
        found = functional.scaled_dot_product_attention
        if found is TORCHS:
            return None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sdpa, "scaled_dot_product_attention", lambda *arguments, backend: backend)
            return found()

    @sdpa.replaced("cute")
    def decorated():
        return backend()

    def in_a_block(error=None):
        with sdpa.replaced("reference"):
            if error is not None:
                raise error
            return backend()

    with sdpa.replaced():
        assert in_a_block() == "reference"
        assert decorated() == "cute"
        with pytest.raises(KeyError):
            in_a_block(KeyError())
        assert backend() == "auto"
    assert backend() is None
    first, second = sdpa.replaced("reference"), sdpa.replaced("cute")  # as they overlap in threads
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    assert backend() == "cute"
    first.__exit__(None, None, None)
    assert backend() == "cute"
    second.__exit__(None, None, None)
    assert backend() is None


def test_another_replacement_comes_back(monkeypatch):
    """The name gets what was there."""
    theirs = lambda *arguments, **options: None  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", theirs)
    with sdpa.replaced():
        assert functional.scaled_dot_product_attention is not theirs
    assert functional.scaled_dot_product_attention is theirs


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "more keys", "more queries", "grouped", "3 dimensions", "5 dimensions"])
def test_one_graph(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sdpa.scaled_dot_product_attention, backend=counter, fullgraph=True)
    interfaces.check_sdpa(name, lambda *tensors, **options: compiled(*tensors, **options, backend="reference"))
    assert counter.frame_count == 1
    assert any("cute_attn.attention" in str(node.target) for node in counter.graphs[0].graph.nodes)


def test_a_graph_of_what_goes_to_torch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sdpa.scaled_dot_product_attention, backend=counter, fullgraph=True)
    tensors = made()
    assert torch.equal(compiled(*tensors, is_causal=True), TORCHS(*tensors, is_causal=True))


@pytest.mark.parametrize(("shape", "is_read"), [((2, 4, 6, 16), True), ((2, 4, 6, 20), False), ((3, 2, 4, 6, 16), True)])
def test_a_graph_asks_whether_kernels_can_read_tensors(shape, is_read, monkeypatch):
    """By their strides; addresses there are none. Nor does it look at the machine more than once."""
    torch._dynamo.reset()
    asked: list[str] = []
    monkeypatch.setattr(launch, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(machine, "backend", lambda: ("cute", asked.append("once")))
    sdpa._looked_at.cache_clear()

    def function(x):
        return x + 1 if sdpa._why_unreadable(x, x, x) is None and sdpa._without_kernels(0) is None else x - 1

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.zeros(shape, dtype=torch.bfloat16)[..., :16]
    for _ in range(2):
        assert torch.equal(compiled(x), x + 1 if is_read else x - 1)
    assert asked == ["once"] * is_read
    sdpa._looked_at.cache_clear()


def test_one_graph_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sdpa.scaled_dot_product_attention, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for sq, sk in ((20, 30), (40, 70), (11, 90)):
        tensors = made((2, 4, sq, 16), (2, 4, sk, 16))
        out = compiled(*tensors, is_causal=True, backend="reference")
        assert torch.equal(out, on_reference(*tensors, is_causal=True))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3  # torch.compile begins the first anew, for a float that is only compared, dropout_p


def test_what_was_compiled_outside_of_a_block():
    """It is compiled anew in the block, and found again after it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, tensors = torch.compile(calls_torchs, backend=counter, fullgraph=True), made((1, 2, 6, 16))
    for _ in range(2):
        assert torch.equal(compiled(*tensors), TORCHS(*tensors, is_causal=True))
        with sdpa.replaced("reference"):
            assert torch.equal(compiled(*tensors), on_reference(*tensors, is_causal=True))
    targets = [{str(node.target) for node in found.graph.nodes} for found in counter.graphs]
    assert ["cute_attn.attention.default" in names for names in targets] == [False, True]


@pytest.mark.parametrize(("dims", "usual"), [(2, False), (3, False), (4, True), (5, False)])
def test_only_4_dimensions_go_straight_to_the_kernels(dims, usual, monkeypatch):
    """Of equal lengths, which tells nothing of the dimensions; tensors that say that they are CUDA's."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(sdpa, "_TORCHS", {OnGpu})
    x = torch.zeros((2,) * dims).as_subclass(OnGpu)
    assert sdpa._is_usual(x, x, x, None, 0.0, False, None, False, "auto") == usual
