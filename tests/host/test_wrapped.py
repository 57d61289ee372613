"""Tensors that stand for others, or for a shape: each works, or is refused in words, and no null pointer is ever launched.

GPUs are played by tensors that say they lie on one and by a launch that looks at what it is given; processes by a group of
one, by torch's group that only pretends to communicate, and, once, by two that do.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cute_attn import arguments, attention, attention_kvcache, attention_varlen, launch, problem, scores, wrapped
from tests.host.processes import run_quick, start_quick
from tests.host.test_arguments import KINDS, fake, inputs, k, q, v
from tests.host.test_errors import Row, assert_raises, raises, reached, table
from tests.support import make_qkv

RULES = {"causal": True, "window": (30, None), "softcap": 5.0}


# ---- tensors without memory of their own -----------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Tensors say they lie on a GPU. What its kernels are given, each time: every tensor has memory. They do nothing."""
    given = []

    def launched(*arguments):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        assert all(x.data_ptr() for x in tensors), "a null pointer"
        given.append(tensors)
        for x in tensors[3:]:
            x.zero_()

    def gradients(call, mechanism, needs, deterministic, q, k, v, out, lse, dout, dlse):
        assert all(x.data_ptr() for x in (q, k, v, out, lse, dout)), "a null pointer"
        given.append((q, k, v, dout))
        return tuple(torch.zeros_like(x) if name in needs else None for name, x in zip("qkv", (q, k, v), strict=True))

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launch, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launch, "_choices", launch._choices.__wrapped__)
    monkeypatch.setattr(launch, "prepared", lambda *_: (launched, 1))
    monkeypatch.setattr(launch, "gradients", gradients)
    return given


@contextmanager
def world(backend="gloo", size=1):
    """A process group of this process alone, or, ``"fake"``, as rank 0 of several that it never hears of."""
    store = torch.distributed.HashStore() if backend == "gloo" else FakeStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


class Wrapper(torch.Tensor):
    """A tensor that holds another and has a way of its own to compute."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is asked of it")


class Named(torch.Tensor):
    """A tensor with memory, and nothing but a name."""


def on_meshes(shape, *placements, change=None, **options):
    """A call of DTensors on a mesh of four pretended processes."""
    with world("fake", math.prod(shape)):
        mesh = init_device_mesh("cpu", shape)
        tensors = [DTensor.from_local(x, mesh, placements, run_check=False) for x in (q, k, v)]
        return attention(*(tensors if change is None else change(mesh, *tensors)), return_lse=True, **RULES, **options)


def batched_gradients(vectorized):
    x = q.clone().requires_grad_()
    out = attention(x, k, v)
    vectorized(out, x, torch.stack([out, out]).detach())


def of_two_gradients(out, x, douts):
    torch.autograd.grad(out, x, douts, is_grads_batched=True)


def of_mapped_gradients(out, x, douts):
    torch.vmap(lambda dout: torch.autograd.grad(out, x, dout))(douts)


def of_a_jacobian(out, x, douts):
    torch.autograd.functional.jacobian(lambda x: attention(x, k, v), x.detach(), vectorize=True)


def legacy_vmap(q):
    torch._vmap_internals._vmap(lambda q: attention(q, k, v))(torch.stack([q, q]))


def jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


def lengths_of(*values):
    return torch.tensor(values, dtype=torch.int32)


BOUNDS = lengths_of(0, 13, 33)
USED = torch.tensor([5, 3])
MESH_PLACEMENTS = "Shard(0), the batch, Shard(2), the heads, or Replicate() is needed"
TENSORS = [
    Row("no tensor", lambda: attention(q, k, v, bias=[0.0]), TypeError, "bias is a list", "is needed", "torch.tensor(bias)"),
    Row(
        "sinks under vmap",
        lambda: torch.vmap(lambda x: attention(x, x, x, sinks=torch.zeros(1)))(torch.zeros(2, 1, 3, 1, 8)),
        NotImplementedError,
        "sinks, dropout_p or block_mask are given inside a transform of torch.func",
        "a plain call is needed",
        "flatten(0, 1)",
    ),
    Row(
        "sparse",
        lambda: attention(q.to_sparse(), k, v),
        TypeError,
        "q has layout torch.sparse_coo",
        "strided is needed",
        ".to_dense()",
    ),
    Row(
        "mkldnn",
        lambda: attention(q, k.to_mkldnn(), v),
        TypeError,
        "k has layout torch._mkldnn",
        "strided is needed",
        ".to_dense()",
    ),
    Row(
        "one of three is nested",
        lambda: attention(jagged(q), k, v),
        TypeError,
        "q, k, v are torch.jagged, nested; a Tensor of shape (2, 40, 2, 16) and dtype torch.float32; a Tensor",
        "nested tensors of layout torch.jagged are needed",
        "torch.nested.nested_tensor(…, layout=torch.jagged) of each, or attention_varlen",
    ),
    Row(
        "nested and strided",
        lambda: attention(*(torch.nested.nested_tensor(list(x), layout=torch.strided) for x in (q, k, v))),
        TypeError,
        "q is a nested tensor of layout torch.strided",
        "all nested, of layout torch.jagged",
        "q.values() and attention_varlen",
    ),
    Row(
        "nested beside a list",
        lambda: attention(jagged(q), [1.0], None),
        TypeError,
        "q, k, v are torch.jagged, nested; a list, [1.0]; None",
        "nested tensors of layout torch.jagged are needed",
    ),
    Row(
        "nested and packed",
        lambda: attention_varlen(jagged(q), k[0], v[0], BOUNDS),
        TypeError,
        "q is a nested tensor of layout torch.jagged",
        "a plain one is needed",
        "q.values() and attention_varlen",
    ),
    Row(
        "nested, and lengths besides",
        lambda: attention(*map(jagged, (q, k, k)), seqused_q=lengths_of(3, 3)),
        TypeError,
        "seqused_q or seqused_k is given with nested tensors",
        "is needed",
        "torch.nested.narrow",
    ),
    Row(
        "nested, heads before lengths",
        lambda: attention(jagged(q).transpose(1, 2), jagged(k), jagged(v)),
        ValueError,
        "q has shape (2, 4, ",
        "with lengths in dimension 1, is needed",
        "q.transpose(1, 2)",
    ),
    Row(
        "nested of 3 dimensions",
        lambda: attention(jagged(q), jagged(k), jagged(v[:, :, 0])),
        ValueError,
        "v has shape (2, ",
        "(batch, seqlen, heads, head_dim), with lengths in dimension 1, is needed",
    ),
    Row(
        "nested, other offsets of v",
        lambda: attention(jagged(q), jagged(k), jagged(v)),
        ValueError,
        "q, k, v have shapes (2, j",
        "the same offsets of k and v, are needed",
        "torch.nested.nested_tensor_from_jagged(v.values(), k.offsets(), k.lengths())",
    ),
    Row(
        "nested, other offsets of v and the same lengths, of which torch makes the shape",
        lambda: attention(jagged(q), *(torch.nested.nested_tensor_from_jagged(x[0], x.new_tensor(at), USED)
                                       for x, at in ((k, (0, 9, 20)), (v, (4, 12, 20))))),
        ValueError,
        "the same offsets of k and v, are needed",
        "torch.nested.nested_tensor_from_jagged(v.values(), k.offsets(), k.lengths())",
    ),
    Row(
        "nested, another batch of k",
        lambda: attention(jagged(q[:1]), *[jagged(k)] * 2),
        ValueError,
        "q, k, v have shapes (1, j",
        "one batch, and the same offsets of k and v, are needed",
    ),
    Row(
        "distributed lengths",
        lambda: on_meshes((4,), Shard(0), seqused_q=lengths_of(3, 3)),
        TypeError,
        "DTensors are given with cu_seqlens or seqused",
        "tensors of each rank's own are needed",
        "x.to_local()",
    ),
    Row(
        "a wrapper of lengths",
        lambda: attention(q, k, v, seqused_k=Wrapper(lengths_of(3, 3))),
        TypeError,
        "seqused_k is a Wrapper",
        "a tensor that holds its values itself",
        "pass the one that seqused_k wraps",
    ),
    Row(
        "freed lengths",
        lambda: attention(q, k, v, seqused_q=freed(lengths_of(3, 3))),
        RuntimeError,
        "seqused_q has shape (2,) and no memory",
        "is needed",
        "fill it",
    ),
    Row(
        "fake lengths",
        lambda: attention(q, k, v, seqused_q=fake(2, dtype=torch.int32)),
        TypeError,
        "q, k, v, seqused_q are a Tensor, a Tensor, a Tensor, a FakeTensor",
        "all or none with values is needed",
        "fake_mode.from_tensor",
    ),
    *(
        Row(
            f"freed {name}",
            lambda asked=asked: attention(q, k, v, **asked()),
            RuntimeError,
            "sinks has shape" if name == "sinks" else "bias has shape" if name == "bias" else "a captured tensor has shape",
            "memory is needed",
            "fill it",
        )
        for name, asked in {
            "sinks": lambda: {"sinks": freed(torch.zeros(4))},
            "bias": lambda: {"bias": freed(torch.zeros(33, 40))},
            "table": lambda: {"score": scores.alibi(freed(torch.zeros(4)))},
        }.items()
    ),
    *(
        Row(
            f"fake {name}",
            lambda name=name, shape=shape: attention(q, k, v, **{name: fake(*shape)}),
            TypeError,
            f"{name} is a FakeTensor on cpu",
            "a tensor that holds its values itself is needed",
            "pass one on a CPU or a GPU",
        )
        for name, shape in {"sinks": (4,), "alibi_slopes": (4,), "bias": (33, 40)}.items()
    ),
    Row(
        "vmap of lengths",
        lambda: torch.vmap(lambda q: attention(q, k, v, seqused_q=lengths_of(3, 3)))(torch.stack([q, q])),
        NotImplementedError,
        "torch.vmap maps attention with cu_seqlens or seqused",
        "a call without these is needed",
        "one call with the lengths of all, or a loop",
    ),
    Row(
        "masked",
        lambda: attention(q, torch.masked.masked_tensor(k, k > 0), v),
        TypeError,
        "k is a MaskedTensor",
        "a plain tensor is needed",
        "k.to_tensor(0.0)",
    ),
    Row(
        "freed",
        lambda: attention(q, k, freed(v)),
        RuntimeError,
        "v has shape (2, 40, 2, 24) and no memory",
        "is needed",
        "fill it",
    ),
    Row(
        "a wrapper",
        lambda: attention(q, Wrapper(k), v),
        TypeError,
        "k is a Wrapper, a subclass of torch.Tensor with a __torch_dispatch__",
        "a tensor that holds its values itself",
        "pass the one that k wraps",
    ),
    Row(
        "a wrapper that the kernels get",
        lambda: problem.check_strides("dout", Wrapper(q)),
        TypeError,
        "dout is a Wrapper, a subclass of torch.Tensor without memory of its own",
        "a tensor that holds its values is needed",
        "pass the one that dout wraps",
    ),
    *(
        Row(
            vectorized.__name__,
            lambda vectorized=vectorized: batched_gradients(vectorized),
            NotImplementedError,
            "the gradient of out stands for several gradients at once",
            "takes one",
            "one by one, or vectorize=False",
        )
        for vectorized in (of_two_gradients, of_mapped_gradients, of_a_jacobian)
    ),
    Row(
        "torch.autograd's vmap",
        lambda: legacy_vmap(q),
        NotImplementedError,
        "q is a tensor inside a transform",
        "is needed",
        "outside",
    ),
    Row(
        "functionalize",
        lambda: torch.func.functionalize(lambda k: attention(q, k, v))(k),
        NotImplementedError,
        "k is a tensor inside a transform",
        "memory of its own; one that has is needed",
        "outside the transform",
    ),
    Row(
        "reverse mode around vmap",
        lambda: torch.func.grad(lambda x: torch.vmap(attention)(x, x, x).sum())(torch.ones(2, 1, 3, 1, 8)),
        NotImplementedError,
        "q is a tensor inside a transform of torch.func",
        "memory of its own; one that has is needed",
        "outside the transform",
    ),
    Row(
        "reverse mode of torch.func",
        lambda: torch.func.grad(lambda x: attention(q, x, v).sum())(k),
        NotImplementedError,
        "inside a transform of torch.func",
        "for torch.autograd only",
        "torch.autograd.grad, or torch.nn.functional.scaled_dot_product_attention",
    ),
    Row(
        "vmap of 3 dimensions",
        lambda: torch.vmap(lambda q: attention(q, k, v))(q),
        ValueError,
        "q has shape (33, 4, 16)",
        "4 dimensions (batch, seqlen, heads, head_dim) are needed",
        "q.unsqueeze(0)",
    ),
    Row(
        "some fake",
        lambda: attention(fake(*q.shape), k, v),
        TypeError,
        "q, k, v are a FakeTensor, a Tensor, a Tensor",
        "all or none with values is needed",
        "fake_mode.from_tensor",
    ),
    Row(
        "some distributed",
        lambda: on_meshes((4,), Replicate(), change=lambda mesh, q, k, v: (q, k.to_local(), v)),
        TypeError,
        "q, k, v are a DTensor, a Tensor, a DTensor",
        "DTensors or none is needed",
        "q.full_tensor()",
    ),
    Row(
        "two meshes",
        lambda: on_meshes((2, 2), Shard(0), Shard(0), change=lambda mesh, q, k, v: (q, k, on_one_dimension(mesh, v))),
        ValueError,
        "lie on the meshes",
        "one is needed",
        "redistribute",
    ),
    Row(
        "two placements",
        lambda: on_meshes(
            (4,), Shard(0), change=lambda mesh, q, k, v: (q, k, DTensor.from_local(v.to_local(), mesh, [Shard(2)]))
        ),
        ValueError,
        "batch sizes of q, k, v are 8, 8, 2",
        "equal ones are needed",
    ),
    *(
        Row(
            f"placement {placement}",
            lambda placement=placement: on_meshes((4,), placement),
            ValueError,
            f"q, k, v have the placements ({placement!r},)",
            MESH_PLACEMENTS,
            "redistribute(placements=…)",
        )
        for placement in (Shard(1), Partial())
    ),
    Row(
        "alike in shape and not in placement",
        lambda: on_meshes(
            (1,), Shard(0), change=lambda mesh, q, k, v: (q, k, DTensor.from_local(v.to_local(), mesh, [Shard(2)]))
        ),
        ValueError,
        "(Shard(dim=0),), (Shard(dim=0),), (Shard(dim=2),)",
        MESH_PLACEMENTS,
        "redistribute(placements=…)",
    ),
    Row(
        "too few key heads",
        lambda: on_meshes((4,), Replicate(), change=sharded_by_heads),
        ValueError,
        "k has 2 heads in 4 shards",
        "a multiple is needed where q has more heads (GQA)",
        "shard the batch, or repeat k's and v's heads",
    ),
    Row(
        "TorchScript",
        lambda: torch.jit.script(attention),
        NotImplementedError,
        "torch.jit.script compiles attention",
        "Python that TorchScript has no words for",
        "try torch.compile",
    ),
    Row(
        "a cache without values",
        lambda: attention_kvcache(*(x.to("meta") for x in (q, k, v)), lengths=torch.ones(len(q), device="meta").int()),
        TypeError,
        "q is a Tensor on meta",
        "a tensor that holds its values itself is needed",
        "pass one on a CPU or a GPU",
    ),
]


def on_one_dimension(mesh, x):
    return DTensor.from_local(x.to_local(), mesh["dim_0"] if mesh.mesh_dim_names else init_device_mesh("cpu", (4,)), [Shard(0)])


def sharded_by_heads(mesh, q, k, v):
    return [x.redistribute(placements=[Shard(2)]) for x in (q, k, v)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked)", "ignore:.torch.jit.script. is deprecated")
@table(TENSORS)
def test_tensors(row):
    assert_raises(row)


def kernel_rows():
    """The same where the kernels would run: nothing is launched."""
    one = q.half()
    return [
        ("sparse", lambda: one.to_sparse(), "layout torch.sparse_coo"),
        ("nested", lambda: torch.nested.nested_tensor(list(one)), "nested tensor"),
        ("freed", lambda: freed(one), "no memory"),
        ("zeros without memory", lambda: torch._efficientzerotensor(one.shape, dtype=one.dtype), "no memory"),
        ("a wrapper", lambda: Wrapper(one), "a Wrapper"),
        ("masked", lambda: torch.masked.masked_tensor(one, one > 0), "MaskedTensor"),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked)")
@pytest.mark.parametrize(("make", "words"), [pytest.param(*row[1:], id=row[0]) for row in kernel_rows()])
@pytest.mark.parametrize("place", range(3))
def test_nothing_without_memory_is_launched(make, words, place, kernels):
    x = make()
    tensors = [inputs(dtype=torch.float16, heads=4, heads_kv=4, sq=33, sk=33)[0] for _ in range(3)]
    tensors[place] = x
    with pytest.raises((TypeError, RuntimeError), match=words):
        attention(*tensors)
    assert not kernels


def test_a_transform_without_gradients_launches_nothing(kernels):
    with pytest.raises(NotImplementedError, match="q is a tensor inside a transform"):
        torch._vmap_internals._vmap(lambda q: attention(q, k.half(), v.half()))(torch.stack([q, q]).half())
    assert not kernels


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|Masked)", "ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("module", [arguments, wrapped], ids=["arguments", "wrapped"])
def test_every_refusal_has_a_row(module):
    """Each ``raise`` is reached by a row: whoever adds one adds a row."""
    missing = raises(module.__file__) - reached([*KINDS, *TENSORS, *TRACED_ROWS], module.__file__)
    assert not missing, f"no row for {module.__name__}, lines {sorted(missing)}"


def test_subclasses_with_memory_are_tensors(kernels):
    named = q.half().as_subclass(Named)
    attention(named, k.half(), torch.nn.Parameter(v.half(), requires_grad=False))
    assert len(kernels) == 1


# ---- collectives and shards ------------------------------------------------------------------------------------------


def gathered(x):
    x = collectives.all_gather_tensor_autograd(x, 0, torch.distributed.group.WORLD)
    assert isinstance(x, collectives.AsyncCollectiveTensor)
    assert x.data_ptr() == 0
    return x


deprecated_name = pytest.mark.filterwarnings("ignore:.*all_gather_tensor.* is deprecated")


@deprecated_name
def test_results_of_collectives_are_waited_for():
    """What sequence parallelism passes on, and gradients through it, back to the collective's input."""
    dout = torch.randn(2, 33, 4, 24)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    attention(*plain, **RULES).backward(dout)
    with world():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(gathered(leaves[0]), gathered(leaves[1]).view(2, 40, 2, 16), leaves[2], **RULES)
        # The gradient that comes back to attention is a collective's result, too.
        collected = gathered(out)
        collected.wait()
        collected.backward(dout)
    for x, expected in zip(leaves, plain, strict=True):
        torch.testing.assert_close(x.grad, expected.grad)


@deprecated_name
def test_lengths_from_collectives_are_waited_for():
    with world():
        used, bounds = (collectives.all_gather_tensor(x, 0, torch.distributed.group.WORLD) for x in (lengths_of(20, 3), BOUNDS))
        assert isinstance(used, collectives.AsyncCollectiveTensor)
        found = attention(q, k, v, seqused_k=used), attention_varlen(q[0], q[1], q[0], bounds)
    assert torch.equal(found[0], attention(q, k, v, seqused_k=lengths_of(20, 3)))
    assert torch.equal(found[1], attention_varlen(q[0], q[1], q[0], BOUNDS))


@deprecated_name
def test_what_changes_scores_may_come_from_collectives():
    """Sinks, slopes, biases and what functions read, with their gradients, where q, k and v are tensors of a rank's own."""
    plain = {"sinks": torch.randn(4), "bias": torch.randn(33, 40), "slopes": torch.randn(4), "table": torch.randn(4)}
    dout, results = torch.randn(2, 33, 4, 24), []
    for of in (lambda x: x, gathered):
        leaves = {name: x.clone().requires_grad_(name != "slopes") for name, x in plain.items()}
        with world():
            given = {name: of(x) for name, x in leaves.items()}
            scored = {"score": scores.alibi(given["table"]), "bias": given["bias"], "sinks": given["sinks"]}
            out = attention(q, k, v, **scored)
            found = torch.autograd.grad(out, [x for x in leaves.values() if x.requires_grad], dout)
            results.append((out, *found, attention(q, k, v, alibi_slopes=given["slopes"])))
    assert all(map(torch.equal, *results))


@deprecated_name
def test_a_step_waits_for_collectives():
    """Queries, new keys and lengths of a cache."""
    lengths, caches = lengths_of(20, 3), [[x.clone() for x in (k, v)] for _ in range(2)]
    expected = attention_kvcache(q, *caches[0], lengths=lengths, k_new=k[:, :2], v_new=v[:, :2])
    with world():
        group = torch.distributed.group.WORLD
        given = [collectives.all_gather_tensor(x, 0, group) for x in (q, k[:, :2].contiguous(), v[:, :2].contiguous(), lengths)]
        assert all(isinstance(x, collectives.AsyncCollectiveTensor) for x in given)
        found = attention_kvcache(given[0], *caches[1], lengths=given[3], k_new=given[1], v_new=given[2])
    assert torch.equal(found, expected)
    assert all(map(torch.equal, *caches))


@deprecated_name
def test_the_kernels_get_the_finished_result(kernels):
    with world():
        tensors = [x.half().requires_grad_() for x in (q, k, v)]
        out = attention(*(gathered(x) for x in tensors))
        assert type(out) is torch.Tensor
        gathered(out).sum().backward()
        with torch.no_grad():
            attention(*(gathered(x) for x in tensors))
    assert len(kernels) == 3


def test_a_gradient_without_memory_is_refused(kernels):
    x = q.half().requires_grad_()
    out = attention(x, k.half(), v.half())
    with pytest.raises(RuntimeError, match=r"the gradient of out has shape .* and no memory"):
        out.backward(freed(torch.ones_like(out)))
    assert len(kernels) == 1


def test_shards_over_a_mesh_of_two_dimensions():
    """Batch over one dimension, heads over the other: every shape is that of the whole."""
    out, lse = on_meshes((2, 2), Shard(0), Shard(2))
    assert (out.shape, lse.shape) == ((4, 33, 8, 24), (4, 8, 33))
    assert out.placements == (Shard(0), Shard(2))
    assert lse.placements == (Shard(0), Shard(1))
    local_out, local_lse = attention(q, k, v, return_lse=True, **RULES)
    assert torch.equal(out.to_local(), local_out)
    assert torch.equal(lse.to_local(), local_lse)


@pytest.mark.parametrize("placement", [Shard(0), Shard(2), Replicate()])
def test_compiled_shards(placement):
    """One graph that holds the operator; outputs, their placements, and gradients as without it."""

    def function(q, k, v):
        return attention(q, k, v, return_lse=True, **RULES)

    torch._dynamo.reset()
    with world("fake", 4):
        mesh = init_device_mesh("cpu", (4,))
        whole = [x.repeat(1, 1, 2, 1) if placement == Shard(2) else x for x in (q, k, v)]
        results = []
        for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
            tensors = [DTensor.from_local(x, mesh, [placement], run_check=False).requires_grad_() for x in whole]
            out, lse = f(*tensors)
            (out.to_local().sum() + lse.to_local().sum()).backward()
            results.append([out, lse, *(x.grad for x in tensors)])
        for got, wanted in zip(*results, strict=True):
            assert got.placements == wanted.placements
            assert torch.equal(got.to_local(), wanted.to_local())


SHARDS = [
    ({}, Shard(0)),
    ({"batch": 3}, Shard(0)),  # two on one, one on the other
    ({"batch": 1}, Shard(0)),  # nothing on the other
    ({}, Shard(2)),
    ({"heads": 3, "heads_kv": 3}, Shard(2)),
    ({"heads": 1, "heads_kv": 1}, Shard(2)),
    ({}, Replicate()),
]


def check_shards(rank, path):
    """In each of two processes: attention of DTensors, and its gradients, are those of the whole."""
    warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(path, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for sizes, placement in SHARDS:
        whole = [x.requires_grad_() for x in inputs(**sizes)]
        expected = attention(*whole, return_lse=True, **RULES)
        dout, dlse = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in expected)
        torch.autograd.backward(expected, (dout, dlse))
        shards = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in whole]
        out, lse = attention(*shards, return_lse=True, **RULES)
        of_lse = Shard(1) if placement == Shard(2) else placement
        assert (out.placements, lse.placements) == ((placement,), (of_lse,))
        torch.autograd.backward(
            (out, lse), [distribute_tensor(dout, mesh, [placement]), distribute_tensor(dlse, mesh, [of_lse])]
        )
        for got, wanted in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(got.full_tensor(), wanted)
        for got, wanted in zip(shards, whole, strict=True):
            assert got.grad.placements == (placement,)
            torch.testing.assert_close(got.grad.full_tensor(), wanted.grad)
        assert isinstance(attention(*shards), DTensor)
    x = torch.full((1, 3, 1, 8), float(rank))
    both = attention(*(collectives.all_gather_tensor(x, 1, torch.distributed.group.WORLD) for _ in range(3)))
    assert both.shape == (1, 6, 1, 8)
    torch.distributed.barrier()  # a group that is left while the other process still uses it can abort
    torch.distributed.destroy_process_group()


def test_shards_in_two_processes(tmp_path):
    start_quick(check_shards, (str(tmp_path / "store"),), 2)


def test_nothing_slow_is_imported():
    """Neither by the package nor by a call: torch.distributed, what compiles, the kernels' DSL."""
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "SLOW = 'torch.distributed', 'torch._dynamo', 'torch._inductor', 'torch.fx.experimental.symbolic_shapes', 'cutlass'\n"
        "from cute_attn import attention\n"
        "x = torch.randn(1, 3, 1, 8, requires_grad=True)\n"
        "attention(x, x, x, scale=0.3, window=(1, 0)).sum().backward()\n"
        "new = [name for name in set(sys.modules) - before if name.startswith(SLOW)]\n"
        "sys.exit(f'imported: {new}' if new else 0)"
    )
    found = run_quick(program)
    assert found.returncode == 0, found.stderr


# ---- vmap ------------------------------------------------------------------------------------------------------------


def stacked(members=3):
    return [torch.stack(x) for x in zip(*(make_qkv(2, 9, 11, 4, 2, 16, 24, seed=seed) for seed in range(members)), strict=True)]


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, 2, None)])
def test_vmap(in_dims):
    tensors = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked(), in_dims, strict=True)]
    found = torch.vmap(lambda q, k, v: attention(q, k, v, return_lse=True, **RULES), in_dims, out_dims=(1, 0))(*tensors)
    for member in range(3):
        one = [x if dim is None else x.select(dim, member) for x, dim in zip(tensors, in_dims, strict=True)]
        out, lse = attention(*one, return_lse=True, **RULES)
        torch.testing.assert_close(found[0][:, member], out)
        torch.testing.assert_close(found[1][member], lse)


def test_vmap_in_vmap_and_gradients():
    qs, ks, vs = stacked()
    vs = vs[0].requires_grad_()
    every = torch.vmap(lambda q: torch.vmap(lambda k: attention(q, k, vs))(ks))(qs)
    assert every.shape == (3, 3, 2, 9, 4, 24)
    (got,) = torch.autograd.grad(every.square().sum(), vs)
    loop = torch.stack([torch.stack([attention(q, k, vs) for k in ks]) for q in qs])
    torch.testing.assert_close(every, loop)
    torch.testing.assert_close(got, torch.autograd.grad(loop.square().sum(), vs)[0])


def test_vmap_over_kernels(kernels):
    qs, ks, vs = (x.half() for x in stacked())
    out = torch.vmap(attention)(qs, ks, vs)
    assert out.shape == (3, 2, 9, 4, 24)
    ((whole, *_),) = kernels
    assert whole.shape == (6, 9, 4, 16)
    empty = torch.vmap(attention)(qs[:, :0], ks[:, :0], vs[:, :0])
    assert empty.shape == (3, 0, 9, 4, 24)


# ---- shapes without values -------------------------------------------------------------------------------------------


def valueless(kind, dtype):
    real = inputs(dtype=dtype)
    if kind == "meta":
        return [x.to("meta") for x in real]
    with FakeTensorMode():
        return [torch.empty(x.shape, dtype=dtype, device=kind) for x in real]


@pytest.mark.parametrize("kind", ["meta", "cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_shapes_and_dtypes_without_values(kind, dtype):
    """Also of fake CUDA tensors where there is no CUDA, and outside their mode."""
    if kind == "cuda" and dtype != torch.float16:
        with pytest.raises(ValueError, match="the GPU kernels take float16"):
            attention(*valueless(kind, dtype))
        return
    tensors = valueless(kind, dtype)
    expected = attention(*inputs(dtype=dtype), return_lse=True, **RULES)
    found = attention(*tensors, return_lse=True, **RULES)
    for got, wanted in zip(found, expected, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert (type(got), got.device) == (type(tensors[0]), tensors[0].device)
    if kind == "cuda" and not torch.cuda.is_available():  # torch itself would end the process
        with pytest.raises(NotImplementedError, match=r"gradients of fake CUDA tensors.*torch\.no_grad"):
            attention(*(x.detach().requires_grad_() for x in tensors))
        return
    leaves = [x.detach().requires_grad_() for x in tensors]
    with_gradients = attention(*leaves, return_lse=True, **RULES)
    assert [x.shape for x in with_gradients] == [x.shape for x in found]
    for got, x in zip(torch.autograd.grad(with_gradients, leaves, with_gradients), leaves, strict=True):
        assert (got.shape, got.dtype, got.device, type(got)) == (x.shape, x.dtype, x.device, type(tensors[0]))


@pytest.mark.parametrize("kind", ["meta", "cpu"])
def test_dropout_without_values(kind):
    tensors = valueless(kind, torch.float32)
    out = attention(*tensors, dropout_p=0.1)
    assert (type(out), out.shape) == (type(tensors[0]), (2, 33, 4, 24))


def test_fake_cuda_tensors_are_checked_as_real_ones():
    with FakeTensorMode():
        narrow = torch.empty(2, 33, 4, 12, device="cuda", dtype=torch.float16)
        strided = torch.empty(2, 33, 16, 4, device="cuda", dtype=torch.float16).transpose(2, 3)
    for x, words in ((narrow, "head_dim is 12"), (strided, "last dimension of q has stride 4")):
        with pytest.raises(ValueError, match=words):
            attention(x, x, x)


@pytest.mark.parametrize("inside", [False, True])
def test_fake_gradients_without_cuda(inside):
    with FakeTensorMode() if inside else nullcontext(), pytest.raises(NotImplementedError, match="there is no CUDA"):
        fake_gradients_without_cuda()


def fake_gradients_without_cuda():
    x = fake(1, 3, 1, 8, device="cuda", dtype=torch.float16).requires_grad_()
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        attention(x, x, x)


def a_flag_in_a_graph():
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        attention(q, k, v, causal=torch.tensor(True))


TRACED_ROWS = [
    Row(
        "a flag in a tensor of a graph",
        a_flag_in_a_graph,
        TypeError,
        "causal is a Tensor of shape () and dtype torch.bool inside of torch.compile or torch.export",
        "True or False is needed",
        "pass bool(causal) from outside",
    ),
    Row(
        "fake gradients without CUDA",
        fake_gradients_without_cuda,
        NotImplementedError,
        "gradients of fake CUDA tensors are asked for where there is no CUDA",
        "needs the device's stream",
        "torch.no_grad(), or tensors on the device 'meta'",
    ),
]


@table(TRACED_ROWS)
def test_traces(row):
    assert_raises(row)


def test_fake_scores_are_never_made():
    """Lengths at which the reference would take minutes, and memory that no machine has."""
    with FakeTensorMode():
        x = torch.empty(64, 10**6, 16, 64, dtype=torch.bfloat16)
    assert attention(x, x, x, causal=True).shape == x.shape
