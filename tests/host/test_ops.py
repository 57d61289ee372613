"""The operators of torch.library: what torch checks of them, and all that comes by them outside of torch.compile."""

from __future__ import annotations

import itertools

import pytest
import torch
from functorch.compile import aot_function, nop
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cute_attn import attention, attention_varlen, launch, masks, reference
from cute_attn.functions import OF_SHAPES, traced
from cute_attn.lengths import NAMES
from tests.support import make_gradients, make_qkv

# Torch's own, of what it uses itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning")

OPS = torch.ops.cute_attn
NUMBERS = {"default": lambda x: x, "Tensor": lambda x: None if x is None else torch.tensor(x, dtype=torch.float64)}
RULES = [  # scale, softcap, left, right
    (None, None, None, None),
    (0.3, 5.0, 30, 0),
    (None, 2.0, None, 7),
]
RECTANGLE = dict.fromkeys(NAMES)
NOTHING = None, None, None, None, "", "", 0.0  # sinks, seed, kinds, captured, expression, derived, dropout_p


def leaves(dtype=torch.float32, needs="qkv", sq=9, sk=11):
    return [x.requires_grad_(name in needs) for name, x in zip("qkv", make_qkv(3, sq, sk, 4, 2, 16, 24, dtype), strict=True)]


def forward_arguments(q, k, v, rules, numbers, return_lse=True, for_backward=True, lengths=RECTANGLE, more=NOTHING):
    scale, softcap, *edges = rules
    rules = numbers(scale), numbers(softcap), *edges
    return q, k, v, *lengths.values(), *more, *rules, return_lse, for_backward, False, "auto", None


def packed(q, k, v):
    """All rows of a batch one after another, heads first in memory; lengths of 3 sequences in them, an empty one among them."""
    rows = (x.detach().flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    leaves = [x.requires_grad_(y.requires_grad) for x, y in zip(rows, (q, k, v), strict=True)]
    values = [0, 20, 20, 26], [0, 9, 11, 33], [17, 0, 6], [9, 2, 21]
    return *leaves, dict(zip(NAMES, (torch.tensor(x, dtype=torch.int32) for x in values), strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overload", NUMBERS)
@pytest.mark.parametrize("rules", RULES)
def test_opcheck(rules, overload):
    """Schema, autograd, shapes, and tracing with static and dynamic ones."""
    q, k, v = leaves()
    arguments = forward_arguments(q, k, v, rules, NUMBERS[overload])
    torch.library.opcheck(getattr(OPS.attention, overload), arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["cu_seqlens", "seqused_k", "seqused", "cu_seqlens_q seqused_k"])
def test_opcheck_with_lengths(given):
    *tensors, lengths = packed(*leaves())
    lengths = {name: x if name in given or name[:-2] in given.split() else None for name, x in lengths.items()}
    arguments = forward_arguments(*tensors, RULES[1], NUMBERS["default"], lengths=lengths)
    torch.library.opcheck(OPS.attention.default, arguments)
    q, k, v = (x.detach() for x in tensors)
    out, _, kept = OPS.attention(q, k, v, *arguments[3:])
    dout, dlse = (x[0] for x in make_gradients(q[None], v[None]))
    inputs = (q, k, v, *arguments[3:14], out, kept, dout, dlse, *arguments[14:18], "qkv", *arguments[20:])
    torch.library.opcheck(OPS.attention_backward.default, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overload", NUMBERS)
@pytest.mark.parametrize("needs", ["qkv", "k"])
def test_opcheck_of_gradients(needs, overload):
    q, k, v = leaves(torch.bfloat16, needs="")
    arguments = forward_arguments(q, k, v, RULES[1], NUMBERS[overload])
    out, _, kept = getattr(OPS.attention, overload)(*arguments)
    dout, dlse = make_gradients(q, v)
    for of_lse in (None, dlse):
        inputs = (*arguments[:14], out, kept, dout, of_lse, *arguments[14:18], needs, *arguments[20:])
        torch.library.opcheck(getattr(OPS.attention_backward, overload), inputs)


RULES_OF = {  # what there is besides the usual rules: which of it is there, and in which form
    "functions": ("expression derived", {}),
    "functions, no gradients": ("expression", {}),
    "sinks": ("sinks", {}),
    "dropout": ("seed dropout_p", {}),
    "blocks": ("kinds expression", {}),
    "all": ("sinks seed kinds expression derived dropout_p", {}),
    "all of sequences": ("sinks seed expression derived dropout_p", {"packed": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overload", NUMBERS)
@pytest.mark.parametrize(("given", "how"), RULES_OF.values(), ids=RULES_OF)
def test_opcheck_with_rules(given, how, overload):
    q, k, v = leaves()
    lengths = RECTANGLE
    if how:
        q, k, v, lengths = packed(q, k, v)
    table = torch.randn(4, 40, requires_grad="derived" in given)

    def score(score, batch, head, q_idx, kv_idx):
        return score + table[head, kv_idx]

    text, captured = traced(masks.causal, score, (), None, q, 4, 3, as_text=True)
    assert captured == (table,)
    more = {
        "sinks": torch.randn(4, requires_grad=True), "seed": torch.tensor([11]),
        "kinds": torch.ones(1, 1, 1, 1, dtype=torch.uint8), "captured": list(captured),
        "expression": text, "derived": "0", "dropout_p": 0.3,
    }  # fmt: skip
    none = {"expression": "", "derived": "", "dropout_p": 0.0}
    given = f"{given} captured" if "expression" in given else given
    more = [x if name in given.split() else none.get(name) for name, x in more.items()]
    arguments = forward_arguments(q, k, v, RULES[1], NUMBERS[overload], lengths=lengths, more=more)
    torch.library.opcheck(getattr(OPS.attention, overload), arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    arguments[10] = arguments[10] and [x.detach() for x in arguments[10]]
    out, lse, kept = getattr(OPS.attention, overload)(*arguments)
    results = out, kept, torch.randn_like(out), torch.randn_like(lse)
    needs = "qkvs" if more[0] is not None else "qv"
    inputs = *arguments[:14], *results, *arguments[14:18], needs, *arguments[20:]
    backward = OPS.attention_backward_captured if more[5] else OPS.attention_backward
    torch.library.opcheck(getattr(backward, overload), inputs)


def test_a_graph_of_rules_made_without_gradients_has_them():
    q, k, v = leaves()
    table, sinks = torch.randn(4, 40, requires_grad=True), torch.randn(4, requires_grad=True)

    def score(score, batch, head, q_idx, kv_idx):
        return score + table[head, kv_idx]

    text, captured = traced(None, score, (), None, q, 4, 3, as_text=True)
    more = sinks, None, None, list(captured), text, "", 0.0
    out, _, _ = OPS.attention(*forward_arguments(q, k, v, RULES[1], NUMBERS["default"], False, False, more=more))
    got = torch.autograd.grad(out.sum(), (q, k, v, table, sinks))
    wanted = attention(q, k, v, scale=0.3, softcap=5.0, window=(30, 0), score=score, sinks=sinks)
    for x, y in zip(got, torch.autograd.grad(wanted.sum(), (q, k, v, table, sinks)), strict=True):
        assert torch.equal(x, y)


def test_a_graph_of_shapes_only_is_no_graph():
    """What was called to see shapes never runs as something else."""
    q, k, v = leaves()
    more = None, None, None, None, OF_SHAPES, "", 0.0
    with pytest.raises(RuntimeError, match="what it computes is not known"):
        OPS.attention(*forward_arguments(q, k, v, RULES[0], NUMBERS["default"], more=more))


@pytest.mark.parametrize(("return_lse", "for_backward"), list(itertools.product([False, True], repeat=2)))
def test_what_nobody_asked_for_has_size_0(return_lse, for_backward):
    q, k, v = leaves(needs="")
    results = OPS.attention(*forward_arguments(q, k, v, RULES[0], NUMBERS["default"], return_lse, for_backward))
    assert [x.numel() > 0 for x in results] == [True, return_lse, for_backward]


def test_an_operator_checks_its_arguments():
    q, k, v = leaves(needs="")
    for rules, words in (((0.1, -2.0, None, None), "softcap is -2.0"), ((None, None, -5, 0), "window's left side is -5")):
        with pytest.raises(ValueError, match=words):
            OPS.attention(*forward_arguments(q, k, v, rules, NUMBERS["default"]))
        with pytest.raises(ValueError, match=words):
            OPS.attention.Tensor(*forward_arguments(q, k, v, rules, NUMBERS["Tensor"]))
    for sinks in (torch.zeros(8), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"floats \(4,\), one a head"):
            OPS.attention(*forward_arguments(q, k, v, RULES[0], NUMBERS["default"], more=(sinks, *NOTHING[1:])))
    *_, lengths = packed(q, k, v)
    with pytest.raises(ValueError, match=r"q has shape \(3, 9, 4, 16\); 3 dimensions"):
        OPS.attention(*forward_arguments(q, k, v, RULES[0], NUMBERS["default"], lengths=lengths))


def counted(monkeypatch):
    """How often the reference computes each pass."""
    seen = {"attention": 0, "gradients": 0}
    for name in seen:
        plain = getattr(reference, name)

        def computes(*arguments, name=name, plain=plain):
            seen[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(reference, name, computes)
    return seen


def test_a_graph_made_without_gradients_has_them(monkeypatch):
    """The forward pass is run once more for what it didn't keep."""
    q, k, v = leaves()
    dout, _ = make_gradients(q.detach(), v.detach())
    seen = counted(monkeypatch)
    out, _, _ = OPS.attention(*forward_arguments(q, k, v, RULES[1], NUMBERS["default"], False, False))
    got = torch.autograd.grad(out, (q, k, v), dout)
    assert seen == {"attention": 2, "gradients": 1}
    expected = torch.autograd.grad(attention(q, k, v, scale=0.3, softcap=5.0, window=(30, 0)), (q, k, v), dout)
    assert all(map(torch.equal, got, expected))


def test_eager_calls_do_not_come_here(monkeypatch):
    monkeypatch.setattr("cute_attn.ops.attention", None)
    out, lse = attention(*leaves(), return_lse=True)
    (out.sum() + lse.sum()).backward()
    with torch.inference_mode():
        attention(*leaves(needs=""))


# ---- modes that see every operator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("policy", "count"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)])
def test_selective_checkpointing_by_name(policy, count, compiled, monkeypatch):
    """What is saved is not computed again."""

    def decide(context, operator, *arguments, **options):
        return policy if operator is OPS.attention.default else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts():
        return create_selective_checkpoint_contexts(decide)

    def block(q, k, v):
        return attention(q * 1.0, k * 1.0, v * 1.0, causal=True).sin()

    def function(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)

    tensors = leaves()
    dout, _ = make_gradients(tensors[0].detach(), tensors[2].detach())
    expected = torch.autograd.grad(block(*tensors), tensors, dout)
    seen = counted(monkeypatch)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
    got = torch.autograd.grad(function(*tensors), tensors, dout)
    assert seen == {"attention": count, "gradients": 1}
    assert all(map(torch.equal, got, expected))


def test_flops_are_counted_as_those_of_torchs_attention():
    q, k, v = leaves()
    with FlopCounterMode(display=False) as mode:
        out = attention(q, k, v, causal=True)
    forward = mode.get_total_flops()
    with mode:
        out.sum().backward()
    q, k, v, out = ((x.shape[0], 4, x.shape[1], x.shape[3]) for x in (q, k, v, out))  # as torch has them, with all heads
    assert forward == sdpa_flop_count(q, k, v)
    assert mode.get_total_flops() == sdpa_backward_flop_count(out, q, k, v)


def test_flops_of_sequences_are_those_of_each():
    """Of the rows in use. Where lengths have no values, sequences count as equally long."""
    q, k, v, lengths = packed(*leaves())
    with FlopCounterMode(display=False) as mode:
        out = attention_varlen(*(x.squeeze(0) for x in (q, k, v)), **lengths)
        forward = mode.get_total_flops()
        out.sum().backward()
    scores = 4 * (17 * 9 + 0 * 2 + 6 * 21)
    assert forward == 2 * scores * (16 + 24)
    assert mode.get_total_flops() - forward == 2 * scores * (3 * 16 + 2 * 24)
    with FlopCounterMode(display=False) as mode:
        attention_varlen(
            *(x.detach().squeeze(0).to("meta") for x in (q, k, v)), **{n: x.to("meta") for n, x in lengths.items()}
        )
    assert mode.get_total_flops() == 2 * (4 * 27 * 33 // 3) * (16 + 24)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    def function(q, k, v):
        return attention(q, k, v, causal=True, window=(30, None), scale=q.shape[-1] ** -0.5, return_lse=True)

    graph = make_fx(function, tracing_mode=mode)(*leaves(needs=""))
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert operators.count(OPS.attention.default) == 1
    tensors = leaves(needs="", sq=70 if mode == "symbolic" else 9)
    assert all(map(torch.equal, graph(*tensors), function(*tensors)))


def test_aot_function():
    q, k, v = leaves()
    out = aot_function(lambda *tensors: attention(*tensors, causal=True), nop)(q, k, v)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), dout)
    assert all(map(torch.equal, torch.autograd.grad(out, (q, k, v), dout), expected))


def test_a_fake_mode_over_tensors_with_values():
    with FakeTensorMode(allow_non_fake_inputs=True):
        out, lse = attention(*leaves(), return_lse=True)
    assert (out.shape, lse.shape) == ((3, 9, 4, 24), (3, 4, 9))


def test_double_backward_of_an_operator_says_so():
    q, k, v = leaves()
    with FlopCounterMode(display=False):
        (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"double backward.*SDPBackend\.MATH"):
            gradient.sum().backward()


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Tensors say they lie on a GPU, and the reference takes the place of the launch. What was launched."""
    seen = []

    def forward(call, mechanism, return_lse, for_backward, q, k, v):
        seen.append(("forward", mechanism, return_lse, for_backward))
        return reference.attention(q, k, v, call)

    def gradients(call, mechanism, needs, deterministic, q, k, v, out, kept, dout, dlse):
        seen.append(("gradients", mechanism, needs, deterministic, dlse is not None))
        return reference.gradients(q, k, v, out, kept, dout, dlse, call, needs)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(launch, "gradients", gradients)
    return seen


def test_the_kernels_are_asked_for_what_is_needed(kernels):
    q, k, v = leaves(torch.float16, needs="qv")
    with FlopCounterMode(display=False):
        out = attention(q, k, v, mechanism="cp_async", deterministic=True)
        out.sum().backward()
        attention(q.detach(), k, v.detach(), return_lse=True)
        attention(q, k, v, return_lse=True)[1].sum().backward()
    assert kernels == [
        ("forward", "cp_async", False, True),
        ("gradients", "cp_async", "qv", True, False),
        ("forward", None, True, False),
        ("forward", None, True, True),
        ("gradients", None, "qv", False, True),
    ]


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_what_the_kernels_return_for_sizes_of_zero(shape, monkeypatch):
    """Nothing is launched, and the results have the shapes that a graph counts on."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launch, "prepared", None)
    batch, sq, sk = shape
    q, k, v = make_qkv(batch, sq, sk, 4, 2, 16, 24, torch.float16)
    found = OPS.attention(*forward_arguments(q, k, v, RULES[0], NUMBERS["default"]))
    meta = OPS.attention(*forward_arguments(*(x.to("meta") for x in (q, k, v)), RULES[0], NUMBERS["default"]))
    assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in meta]


def test_a_graph_of_kernels():
    """Traced where there is no GPU: shapes, strides and the checks of the kernels."""
    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, dtype=torch.float16, device="cuda") for x in leaves())
        strided = torch.empty(3, 9, 16, 4, dtype=torch.float16, device="cuda").transpose(2, 3)
    graph = make_fx(lambda *tensors: attention(*tensors, causal=True), tracing_mode="fake")(q, k, v)
    (node,) = (node for node in graph.graph.nodes if node.target is OPS.attention.default)
    out = node.meta["val"][0]
    assert (tuple(out.shape), out.is_contiguous(), out.device.type) == ((3, 9, 4, 24), True, "cuda")
    with pytest.raises(ValueError, match="last dimension of q has stride 4"):
        make_fx(lambda *tensors: attention(*tensors), tracing_mode="fake")(strided, k, v)
