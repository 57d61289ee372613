"""Attention in autograd: what is kept, what is computed, and the company it keeps (checkpoints, autocast, hooks).

Both backends take part. The kernels are played by the reference, which a fake launch runs in their place: what is
tested there is everything around them.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cute_attn import api, attention, launch, reference
from tests.support import assert_close, assert_gradients_close, make_gradients, make_qkv

SUBSETS = ["".join(names) for n in (1, 2, 3) for names in itertools.combinations("qkv", n)]
RULES = {"causal": True, "window": (30, None), "softcap": 5.0}


@pytest.fixture(params=["reference", "cute"])
def backend(request, monkeypatch):
    """The name of a backend; ``"cute"`` runs on tensors that say they lie on a GPU."""
    if request.param == "cute":
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
        monkeypatch.setattr(launch, "device_target", lambda device: "sm_90a")
        monkeypatch.setattr(launch, "_choices", launch._choices.__wrapped__)
        monkeypatch.setattr(launch, "prepared", lambda problem, *_: (problem, 1))
        monkeypatch.setattr(launch._PlannedForward, "__call__", fake_forward)
        monkeypatch.setattr(launch, "gradients", FakeGradients())
    return request.param


def fake_forward(planned, call, q, k, v):
    """What is asked for, by the reference."""
    problem = planned.function
    assert (problem.return_lse, problem.for_backward) == (planned.return_lse, planned.for_backward)
    out, lse, kept = reference.attention(q, k, v, call)
    return out, lse if problem.return_lse else None, kept if problem.for_backward else None


class FakeGradients:
    """``launch.gradients`` by the reference; ``seen`` is what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, call, mechanism, needs, deterministic, q, k, v, out, kept, dout, dlse):
        self.seen.append({"needs": needs, "deterministic": deterministic, "mechanism": mechanism, "dlse": dlse, "dout": dout})
        return reference.gradients(q, k, v, out, kept, dout, dlse, call, needs)


def leaves(dtype=torch.bfloat16, needs="qkv", sq=70, sk=90, **options):
    tensors = make_qkv(2, sq, sk, 4, 2, 16, 24, dtype, **options)
    return [x.requires_grad_(name in needs) for name, x in zip("qkv", tensors, strict=True)]


def bits(gradients, expected):
    """Assert that two sequences of tensors have the same bits."""
    for got, wanted in zip(gradients, expected, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(got, wanted)


def gradients_of(q, k, v, dout, dlse=None, **options):
    """``(dq, dk, dv)``, None for an input that requires none."""
    out, lse = attention(q, k, v, return_lse=True, **options)
    outputs = [(out, dout)] + ([] if dlse is None else [(lse, dlse)])
    for x in (q, k, v):
        x.grad = None
    torch.autograd.backward(*zip(*outputs, strict=True))
    return [None if x.grad is None else x.grad.clone() for x in (q, k, v)]


def test_gradients(backend):
    q, k, v = leaves()
    dout, dlse = make_gradients(q, v)
    for extra in (None, dlse):
        result = gradients_of(q, k, v, dout, extra, backend=backend, **RULES)
        assert_gradients_close(result, q.detach(), k.detach(), v.detach(), dout, extra, **RULES)


def test_outputs_are_those_without_gradients(backend):
    q, k, v = leaves()
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert out.requires_grad
    assert lse.requires_grad
    with torch.no_grad():
        bits((out, lse), attention(q, k, v, return_lse=True, backend=backend))
    alone = attention(q, k, v, backend=backend)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("needs", SUBSETS)
def test_only_what_is_asked_for_is_computed(needs, backend, monkeypatch):
    q, k, v = leaves(needs=needs)
    dout, dlse = make_gradients(q, v)
    seen = []
    if backend == "reference":
        forward, gradients = reference.PASSES

        def recorded(*arguments):
            seen.append(arguments[-1])
            return gradients(*arguments)

        monkeypatch.setattr(reference, "PASSES", (forward, recorded))
    got = gradients_of(q, k, v, dout, dlse, backend=backend, **RULES)
    assert [x is not None for x in got] == [name in needs for name in "qkv"]
    if backend == "cute":
        seen = [call["needs"] for call in launch.gradients.seen]
    assert seen == [needs]
    every = gradients_of(*leaves(), dout, dlse, backend=backend, **RULES)
    bits(got, [x if name in needs else None for name, x in zip("qkv", every, strict=True)])


def test_gradients_by_autograd_grad(backend):
    q, k, v = leaves()
    dout, _ = make_gradients(q, v)
    every = gradients_of(q, k, v, dout, backend=backend)
    out = attention(q, k, v, backend=backend)
    bits(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), every)
    bits(torch.autograd.grad(out, (v, k), dout), every[:0:-1])


def test_an_output_that_nobody_uses_has_no_gradient(backend):
    q, k, v = leaves()
    dout, dlse = make_gradients(q, v)
    nothing, zero_lse = torch.zeros_like(dout), torch.zeros_like(dlse)
    out, lse = attention(q, k, v, return_lse=True, backend=backend)
    of_both = torch.autograd.grad((out, lse), (q, k, v), (dout, zero_lse), retain_graph=True)
    bits(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), of_both)
    of_lse = torch.autograd.grad((out, lse), (q, k, v), (nothing, dlse), retain_graph=True)
    bits(torch.autograd.grad(lse, (q, k, v), dlse), of_lse)
    assert not of_lse[2].count_nonzero()
    assert_gradients_close(of_lse, q.detach(), k.detach(), v.detach(), nothing, dlse)
    if backend == "cute":
        assert [call["dlse"] is None for call in launch.gradients.seen] == [False, True, False, False]


def packed(function):
    """What ``function`` saves for a backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = function()
    return saved, result


@pytest.mark.parametrize("return_lse", [False, True])
def test_only_inputs_the_output_and_a_number_of_each_row_are_kept(return_lse, backend):
    q, k, v = leaves()
    saved, result = packed(lambda: attention(q, k, v, return_lse=return_lse, backend=backend, **RULES))
    *others, kept = saved
    out = result[0] if return_lse else result
    assert [x.data_ptr() for x in others] == [x.data_ptr() for x in (q, k, v, out)]
    assert kept.shape == (q.shape[0], q.shape[2], q.shape[1])


@pytest.mark.parametrize("name", ["sinks", "bias", "alibi_slopes"])
def test_what_hooks_bring_back_as_something_else_has_its_gradient(name):
    q, k, v = leaves(torch.float32)
    given = (torch.ones(70, 90) if name == "bias" else torch.ones(4)).requires_grad_()
    expected = torch.autograd.grad(attention(q, k, v, **{name: given}).square().sum(), (q, given))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.double() if x.is_floating_point() else x, lambda x: x):
        out = attention(q, k, v, **{name: given})
    bits(torch.autograd.grad(out.square().sum(), (q, given)), expected)


def test_nothing_is_kept_without_gradients(backend, monkeypatch):
    monkeypatch.setattr(api.Attention, "apply", None)  # nor is the Function entered
    q, k, v = leaves()
    for inputs, mode in (((q, k, v), torch.no_grad), ((q, k, v), torch.inference_mode), (leaves(needs=""), torch.enable_grad)):
        with mode():
            saved, (out, lse) = packed(lambda inputs=inputs: attention(*inputs, return_lse=True, backend=backend))
        assert not saved
        assert not out.requires_grad
        assert not lse.requires_grad
        assert out.grad_fn is None


def test_lse_is_not_computed_where_nobody_can_use_it(monkeypatch):
    made = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launch, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launch, "_choices", launch._choices.__wrapped__)
    monkeypatch.setattr(launch, "prepared", lambda *_: (lambda *arguments: made.append(arguments[4:6]), 1))
    q, k, v = leaves(needs="")
    attention(q, k, v)
    q.requires_grad_()
    attention(q, k, v)
    attention(q, k, v, return_lse=True)
    assert [[x is not None for x in both] for both in made] == [[False, False], [False, True], [True, True]]


def test_two_backward_passes_over_one_graph(backend):
    q, k, v = leaves()
    dout, dlse = make_gradients(q, v)
    outputs = attention(q, k, v, return_lse=True, backend=backend)
    first = torch.autograd.grad(outputs, (q, k, v), (dout, dlse), retain_graph=True)
    bits(torch.autograd.grad(outputs, (q, k, v), (dout, dlse)), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, (q, k, v), (dout, dlse))


def test_gradients_add_up(backend):
    q, k, v = leaves(torch.bfloat16)
    dout, _ = make_gradients(q, v)
    once = gradients_of(q, k, v, dout, backend=backend)
    attention(q, k, v, backend=backend).backward(dout)
    bits((q.grad, k.grad, v.grad), [2 * x for x in once])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, backend):
    q, k, v = leaves()
    dout, _ = make_gradients(q, v)
    expected = gradients_of(q, k, v, dout, backend=backend, **RULES)
    for x in (q, k, v):
        x.grad = None

    def block(q, k, v):
        return attention(q * 1.0, k * 1.0, v * 1.0, backend=backend, **RULES)

    saved, out = packed(lambda: checkpoint(block, q, k, v, use_reentrant=reentrant))
    # Torch may keep an empty tensor of its own.
    assert {x.data_ptr() for x in saved if x.numel()} <= {x.data_ptr() for x in (q, k, v)}
    out.backward(dout)
    bits((q.grad, k.grad, v.grad), expected)


def test_inputs_that_were_changed_are_noticed(backend):
    q, k, v = leaves()
    out = attention(q, k, v, backend=backend)
    with torch.no_grad():
        k.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradient_of_out_may_be_expanded_or_strided(backend):
    q, k, v = leaves()
    ones = torch.ones(2, 70, 4, 24, dtype=torch.bfloat16)
    expected = gradients_of(q, k, v, ones, backend=backend)
    for x in (q, k, v):
        x.grad = None
    attention(q, k, v, backend=backend).sum().backward()
    bits((q.grad, k.grad, v.grad), expected)
    dout, _ = make_gradients(q, v)
    transposed = dout.transpose(1, 2).contiguous().transpose(1, 2)
    for got, wanted in zip(
        gradients_of(q, k, v, transposed, backend=backend), gradients_of(q, k, v, dout, backend=backend), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 4, 4, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("needs", SUBSETS)
def test_sizes_of_zero(shape, needs, backend, monkeypatch):
    monkeypatch.setattr(launch, "gradients", None)  # there is nothing to launch
    monkeypatch.setattr(reference, "gradients", None)
    batch, sq, sk, heads = shape
    q, k, v = make_qkv(batch, sq, sk, heads, heads, 16, 24, torch.float16)
    for name, x in zip("qkv", (q, k, v), strict=True):
        x.requires_grad_(name in needs)
    for use in (lambda out, lse: out.sum(), lambda out, lse: lse.where(lse != -math.inf, 0.0).sum()):
        out, lse = attention(q, k, v, return_lse=True, causal=True, backend=backend)
        use(out, lse).backward()
        for name, x in zip("qkv", (q, k, v), strict=True):
            if name in needs:
                assert x.grad is not None
                assert x.grad.shape == x.shape
                assert x.grad.dtype == x.dtype
                assert not x.grad.count_nonzero()
            else:
                assert x.grad is None


def test_rows_that_see_nothing(backend):
    q, k, v = leaves(sq=90, sk=40)
    dout, dlse = make_gradients(q, v)
    result = gradients_of(q, k, v, dout, dlse, backend=backend, causal=True)
    assert_gradients_close(result, q.detach(), k.detach(), v.detach(), dout, dlse, causal=True)
    assert not result[0][:, :50].count_nonzero()


def test_merging_partial_attentions(backend):
    """Keys in two parts, put together by their log-sum-exps: gradients flow through both outputs of each."""
    q, k, v = leaves(torch.float16, sk=128)
    dout, _ = make_gradients(q, v)
    outs, lses = zip(
        *(attention(q, k[:, keys], v[:, keys], return_lse=True, backend=backend) for keys in (slice(0, 64), slice(64, 128))),
        strict=True,
    )
    weight = torch.stack(lses).softmax(0).transpose(2, 3)[..., None]  # (part, batch, seqlen, heads, 1)
    merged = (torch.stack(outs).float() * weight).sum(0).half()
    gradients = torch.autograd.grad(merged, (q, k, v), dout)
    expected = make_qkv(2, 70, 128, 4, 2, 16, 24, torch.float16)
    assert_close(merged.detach(), *expected)
    whole = gradients_of(q, k, v, dout, backend=backend)
    for got, wanted in zip(gradients, whole, strict=True):
        assert (got - wanted).abs().max() < 0.01 * wanted.abs().max()


# Determinism: what the kernels are asked for.


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("everywhere", [False, True])
def test_deterministic(asked, everywhere, backend):
    q, k, v = leaves()
    dout, dlse = make_gradients(q, v)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(everywhere)
    try:
        out, lse = attention(q, k, v, return_lse=True, deterministic=asked, backend=backend)
    finally:
        torch.use_deterministic_algorithms(before)
    first = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    bits(torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)), first)
    if backend == "cute":
        assert [call["deterministic"] for call in launch.gradients.seen] == [asked or everywhere] * 2


@pytest.mark.parametrize("mechanism", ["cp_async", None])
@pytest.mark.parametrize("backend", ["cute"], indirect=True)
def test_the_backward_pass_has_the_forwards_mechanism(mechanism, backend):
    q, k, v = leaves()
    attention(q, k, v, mechanism=mechanism, backend=backend).sum().backward()
    assert [call["mechanism"] for call in launch.gradients.seen] == [mechanism]


# Autocast: the dtypes of PyTorch's own attention.


@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float16, torch.bfloat16, torch.float32], repeat=2)), ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_autocast_casts_as_scaled_dot_product_attention(dtypes, target, backend):
    q, k, v = leaves(torch.float32)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x, dtype in zip((q, k, v), (*dtypes, torch.float32), strict=True))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", target):
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        assert out.dtype == sdpa(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).dtype == target
    assert lse.dtype == torch.float32
    dout, dlse = make_gradients(q.detach().to(target), v)
    got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert [x.dtype for x in got] == [x.dtype for x in (q, k, v)]
    # Nothing but the inputs is cast: these are the bits of the same call on cast inputs, with autocast off.
    cast = [x.detach().to(target).requires_grad_() for x in (q, k, v)]
    expected = attention(*cast, return_lse=True, backend=backend)
    bits((out, lse), expected)
    wanted = torch.autograd.grad(expected, cast, (dout, dlse))
    bits(got, [gradient.to(x.dtype) for gradient, x in zip(wanted, (q, k, v), strict=True)])


def test_backward_under_autocast(backend):
    """The backward pass doesn't look at autocast: called inside it or outside, the same bits."""
    q, k, v = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, backend=backend)
        dout, _ = make_gradients(q.detach().bfloat16(), v)
        inside = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        with torch.no_grad():
            assert torch.equal(attention(q, k, v, backend=backend), out)
    bits(torch.autograd.grad(out, (q, k, v), dout), inside)


def test_autocast_leaves_float64_alone():
    q, k, v = leaves(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
        out.sum().backward()
    assert out.dtype == q.grad.dtype == torch.float64
    assert torch.equal(out, attention(q, k, v))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_of_another_device_changes_nothing():
    q, k, v = leaves(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(attention(q, k, v), attention(q, k, v, backend="reference"))
        assert attention(q, k, v).dtype == torch.float32


def test_autocast_can_be_off():
    q, k, v = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(q, k, v).dtype == torch.float32


# What there is none of.


def test_double_backward_is_refused_when_it_is_asked_for(backend):
    q, k, v = leaves()
    dout, _ = make_gradients(q, v)
    expected = gradients_of(q, k, v, dout, backend=backend)
    out = attention(q, k, v, backend=backend)
    first = torch.autograd.grad(out, (q, k, v), dout.requires_grad_(), create_graph=True)
    bits(first, expected)
    for x in first:
        assert x.requires_grad
        with pytest.raises(RuntimeError, match=r"double backward.*SDPBackend\.MATH"):
            torch.autograd.grad(x.sum(), (q, dout), retain_graph=True, allow_unused=True)


def test_double_backward_of_one_input(backend):
    """A penalty on the gradient of one input: refused even if that input is all that requires one."""
    q, k, v = leaves(needs="v")
    out = attention(q, k, v, backend=backend)
    (dv,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dv.square().sum().backward()


def test_what_the_message_recommends_works():
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        gradient.sum().backward()
    assert x.grad is not None


def test_a_bias_with_an_element_for_each_score_of_a_head_has_its_gradient_in_a_fixed_order():
    q, k, v = leaves(torch.float32)
    bias = torch.ones(4, 70, 90, requires_grad=True)
    outs = [attention(q, k, v, bias=bias, deterministic=fixed) for fixed in (True, False)]
    bits(*(torch.autograd.grad(out.sin().sum(), bias) for out in outs))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, at its first forward-mode call
def test_forward_mode_is_refused(backend):
    q, k, v = leaves(needs="")
    forward_ad = torch.autograd.forward_ad
    for i in range(3):
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(x, x) if i == j else x for j, x in enumerate((q, k, v))]
            with pytest.raises(NotImplementedError, match=r"tangent.*reverse mode"):
                attention(*inputs, backend=backend)
    with forward_ad.dual_level():  # no input has a tangent
        attention(q, k, v, backend=backend)
    for name, shape in (("sinks", 4), ("alibi_slopes", 4), ("bias", (70, 90))):
        with forward_ad.dual_level():
            given = {name: forward_ad.make_dual(torch.ones(shape), torch.ones(shape))}
            with pytest.raises(NotImplementedError, match=r"tangent.*reverse mode"):
                attention(q, k, v, backend=backend, **given)


def test_transforms_are_refused(backend):
    q, k, v = leaves(needs="")
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"torch\.func.*torch\.autograd\.grad"):
            transform(lambda q: attention(q, k, v, backend=backend).sum())(q)
