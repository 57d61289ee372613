"""Functions, biases, ALiBi, sinks, dropout and block masks in graphs: one operator a pass, and the bits of eager."""

from __future__ import annotations

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cute_attn import attention, attention_varlen, block_mask, masks, scores, sdpa
from cute_attn.flash_attn import flash_attn_func
from cute_attn.functions import traced
from tests import functions
from tests.host.processes import run_quick
from tests.host.test_torch_compile import anew, calls, compiled, lowered  # noqa: F401
from tests.support import make_qkv

# Torch's own, of what it uses itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning")

FORWARD, BACKWARD = "cute_attn.attention.default", "cute_attn.attention_backward_captured.default"
SQ, SK, HEADS = 37, 41, 4
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.arange(300) // 9
BYTES = torch.arange(300).remainder(90).to(torch.uint8)
QUERY_IDS, KEY_IDS = (torch.randint(0, 3, (9, n), generator=GENERATOR) for n in (120, 130))
TABLE = torch.randn(HEADS, 101, generator=GENERATOR, requires_grad=True)
BIAS = torch.randn(1, HEADS, SQ, SK, generator=GENERATOR, requires_grad=True)
SINKS = torch.randn(HEADS, generator=GENERATOR, requires_grad=True)
SLOPES = torch.rand(HEADS, generator=GENERATOR)
TENSORS = TABLE, BIAS, SINKS
BLOCKS = block_mask(masks.causal, None, None, SQ, SK, device="cpu")


def relative(score, batch, head, q_idx, kv_idx):
    return score + TABLE[head, torch.clamp(kv_idx - q_idx, -50, 50) + 50]


def in_two_steps(score, batch, head, q_idx, kv_idx, table):
    row = table[head]
    return torch.where(q_idx % 3 == 0, score, score * torch.tanh(row[kv_idx]))


def same_ids(batch, head, q_idx, kv_idx, ids):
    return ids[q_idx] == ids[kv_idx]


def same_rows_ids(batch, head, q_idx, kv_idx):
    return QUERY_IDS[batch][q_idx] == KEY_IDS[batch][kv_idx]


def of_bytes(score, batch, head, q_idx, kv_idx):
    """Elements of bytes, one index after another, and operators that torch writes as others where numbers come first."""
    return (1 - score) * TABLE[head][BYTES[kv_idx]] + 2.0 / (1 + q_idx) + (7 - kv_idx % 5) * TABLE[head][1]


OPTIONS = {
    "mask": {"mask": masks.causal},
    "ids one index after another": {"mask": same_rows_ids},
    "bytes as indices": {"score": of_bytes},
    "closures": {"mask": masks.and_masks(masks.document(IDS), masks.not_mask(masks.window(3, 1)))},
    "tensors": {"mask": same_ids, "tensors": (IDS,)},
    "score": {"score": relative, "causal": True},
    "score in steps": {"score": in_two_steps, "tensors": (TABLE,)},
    "buckets": {"score": scores.bucketed(TABLE[:, :32], 128), "softcap": 9.0},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "bias": {"bias": BIAS, "scale": 0.2},
    "sinks": {"sinks": SINKS, "window": (9, 4)},
    "dropout": {"dropout_p": 0.3},
    "block mask": {"mask": masks.causal, "block_mask": BLOCKS},
    "all": {
        "mask": masks.document(IDS), "score": relative, "alibi_slopes": SLOPES, "bias": BIAS, "sinks": SINKS,
        "dropout_p": 0.2, "window": (30, 3), "softcap": 20.0, "scale": 0.2,
    },
}  # fmt: skip
IN_TURN = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def leaves(batch=2, sq=SQ, sk=SK, dtype=torch.float32):
    return [x.requires_grad_() for x in make_qkv(batch, sq, sk, HEADS, 2, 16, 24, dtype)]


def both_passes(function, tensors, others=TENSORS):
    """Outputs, and gradients of all tensors, in one list; dropout draws the same in each call."""
    torch.manual_seed(0)
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad([x.sin().sum() for x in outputs], [*tensors, *others], allow_unused=True)]


def assert_same_bits(function, fast, tensors, others=TENSORS):
    for got, wanted in zip(both_passes(fast, tensors, others), both_passes(function, tensors, others), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            assert torch.equal(got, wanted)


@IN_TURN
def test_everything_that_attention_takes(options):
    def function(q, k, v):
        return attention(q, k, v, return_lse=True, **options)

    fast, counter = compiled(function)
    assert_same_bits(function, fast, leaves())
    with torch.no_grad():
        torch.manual_seed(1)
        got = fast(*leaves())
        torch.manual_seed(1)
        assert all(map(torch.equal, got, function(*leaves())))
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["cu_seqlens", "seqused"])
def test_sequences_of_different_lengths(kind):
    bounds, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 20, 70], [40, 11]))
    rules = {"mask": masks.causal, "score": relative, "alibi_slopes": SLOPES, "sinks": SINKS, "dropout_p": 0.2}

    def function(q, k, v):
        if kind == "seqused":
            return attention(q, k, v, seqused_k=used, return_lse=True, **rules)
        return attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), bounds, return_lse=True, **rules)

    fast, counter = compiled(function)
    assert_same_bits(function, fast, leaves())
    assert counter.frame_count == 1


def test_masks_in_tensors_of_any_size():
    def function(q, k, v, seen):
        return attention(q, k, v, mask=masks.given(seen))

    fast, counter = compiled(function, dynamic=True)
    for batch, sq, sk in [(3, 37, 41), (5, 71, 90)]:
        for seen in (torch.rand(batch, 1, sq, sk) > 0.4, torch.rand(batch, sk)[:, None, None] > 0.4):
            q, k, v = (x.detach() for x in leaves(batch, sq, sk))
            assert torch.equal(fast(q, k, v, seen), function(q, k, v, seen))
    assert counter.frame_count == 2


def test_one_operator_a_pass():
    def function(q, k, v):
        return attention(q, k, v, mask=masks.document(IDS), score=relative, sinks=SINKS, causal=True)

    forward, backward = lowered(function, *leaves())
    assert (forward, backward) == ([FORWARD], [BACKWARD])


@pytest.mark.parametrize("case", functions.CASES)
def test_what_is_computed_is_what_eager_computes(case):
    """To the node: so a graph runs the same kernels."""
    asked = functions.CASES[case](2, HEADS, "cpu", SK - SQ).asked
    texts = []

    def keep(graph, inputs):
        texts.extend(x for node in graph.graph.nodes if FORWARD in str(node.target) for x in node.args if isinstance(x, str))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep)
    torch.compile(lambda q, k, v: attention(q, k, v, **asked), backend=backend, fullgraph=True)(*(x.detach() for x in leaves()))
    rules = [asked.get(name) for name in ("mask", "score", "alibi_slopes")]
    behind = asked.get("causal", False) or asked.get("window", (0, 1))[1] == 0
    expected, _ = traced(*rules[:2], (), rules[2], torch.zeros(1), HEADS, 2, None, (SQ, SK), behind, as_text=True)
    assert texts[0] == expected


def test_inductor():
    """Which draws other numbers than eager, where it draws them itself; a seed it doesn't."""

    def function(q, k, v):
        rules = {"score": relative, "mask": masks.window(9), "sinks": SINKS, "dropout_p": 0.1}
        return attention(q * 2, k, v, bias=BIAS * 2, **rules)

    assert_same_bits(function, compiled(function, "inductor")[0], leaves())


def test_inductor_and_tables_of_any_strides():
    tables = [x.detach().requires_grad_() for x in (torch.randn(101, HEADS).t(), torch.randn(HEADS, 202)[:, ::2])]

    def function(q, k, v):
        return attention(q, k, v, score=lambda s, b, h, i, j: s * tables[0][h, j] + tables[1][h, i])

    assert_same_bits(function, compiled(function, "inductor")[0], leaves(), tables)


# Sizes that are equal where the graph is made are one size to torch.compile: here no two are.
SIZES = [(3, 37, 41), (5, 71, 90), (7, 40, 129)]


def test_lengths_values_and_batches_recompile_nothing():
    def function(q, k, v, ids, bias, slopes, limit, scale):
        rules = {"mask": masks.document(ids), "bias": bias, "alibi_slopes": slopes, "sinks": slopes, "dropout_p": 0.1}
        rules["score"] = lambda score, batch, head, q_idx, kv_idx: torch.minimum(score, limit)
        return attention(q, k, v, scale=scale, **rules)

    fast, counter = compiled(function, dynamic=True)
    for i, (batch, sq, sk) in enumerate(SIZES):
        given = torch.arange(max(sq, sk) + 7) // (i + 3), torch.randn(batch, 1, sq, sk), torch.rand(HEADS) * (i + 1)
        tensors = leaves(batch, sq, sk)

        def of_tensors(f):
            return lambda q, k, v: f(q, k, v, *given, torch.tensor(0.5 + i), 0.1 + i)  # noqa: B023

        assert_same_bits(of_tensors(function), of_tensors(fast), tensors)
    assert counter.frame_count == 1


NUMBERS = {
    "floats": lambda i: (0.1 + i, 3.0 + i, 7),
    "windows": lambda i: (None, None, 3 + i),
    "tensors": lambda i: (torch.tensor(0.1 + i), torch.tensor(3.0 + i), torch.tensor(3 + i)),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_change_share_a_graph(kind):
    """The first ones are constants, if they are no tensors."""

    def function(q, k, v, scale, softcap, right):
        return attention(q, k, v, scale=scale, softcap=softcap, window=(9, right), alibi_slopes=SLOPES, sinks=SINKS)

    fast, counter = compiled(function)
    for i in range(4):
        numbers = NUMBERS[kind](i)
        assert torch.equal(fast(*leaves(), *numbers), function(*leaves(), *numbers))
    assert counter.frame_count == 1 + (kind != "tensors")


def test_another_function_is_another_graph():
    """The same one is the same, and numbers in a closure are constants, whatever symbols torch.compile has for them."""

    def function(q, k, v, mask, cap):
        return attention(q, k, v, mask=mask, score=scores.softcap(cap))

    fast, counter = compiled(function)
    counts = []
    for mask, cap in ((masks.causal, 2.0), (masks.window(3), 2.0), (masks.causal, 2.0), (masks.window(3), 2.0)):
        assert torch.equal(fast(*leaves(), mask, cap), function(*leaves(), mask, cap))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2]
    for mask, cap in ((masks.window(4), 2.0), (masks.window(5), 3.0), (masks.window(6), 4.0)):
        assert torch.equal(fast(*leaves(), mask, cap), function(*leaves(), mask, cap))


def test_powers_that_change():
    def function(q, k, v, power):
        return attention(q, k, v, score=lambda s, b, h, i, j: s - (i - j) ** power / 99)

    fast, _ = compiled(function)
    for power in (1, 2, 3):
        assert torch.equal(fast(*leaves(), power), function(*leaves(), power))


def test_a_gradient_of_a_captured_tensor_alone():
    def function(q, k, v):
        return attention(q, k, v, score=relative)

    fast, _ = compiled(function)
    tensors = [x.detach() for x in leaves()]
    got, wanted = (torch.autograd.grad(f(*tensors).sum(), TABLE) for f in (fast, function))
    assert torch.equal(*got, *wanted)


class Hundredfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dx):
        return dx * 100


def test_outputs_require_a_gradient_for_a_captured_tensor_alone():
    """While torch.compile follows what comes behind, too."""

    def function(q, k, v):
        out = attention(q, k, v, score=relative)
        return Hundredfold.apply(out) if out.requires_grad else out

    fast, _ = compiled(function)
    tensors = [x.detach() for x in leaves()]
    got, wanted = (torch.autograd.grad(f(*tensors).sum(), TABLE) for f in (fast, function))
    assert torch.equal(*got, *wanted)


def test_checkpoints_hold_functions():
    """And what dropout drew is what it draws again."""

    def function(q, k, v):
        block = lambda q, k, v: attention(q * 1.0, k, v, mask=masks.document(IDS), score=relative, dropout_p=0.3)  # noqa: E731
        return checkpoint(block, q, k, v, use_reentrant=False)

    fast, _ = compiled(function)
    assert_same_bits(function, fast, leaves())


def test_blocks_of_flex_attention():
    flex = create_block_mask(lambda b, h, i, j: (IDS[i] == IDS[j]) & (i >= j), None, None, 200, 200, device="cpu")
    tensors = leaves(sq=200, sk=200)

    def function(q, k, v):
        return attention(q, k, v, block_mask=flex)

    assert_same_bits(function, compiled(function)[0], tensors, ())


def test_a_block_mask_that_is_made_between_graphs():
    """Of a mask that an eager call has seen before, of one that holds what a graph gets, and of other lengths later."""

    def function(q, k, v, ids):
        mask = masks.and_masks(masks.causal, masks.document(ids))
        return attention(q, k, v, mask=mask, block_mask=block_mask(mask, None, None, len(ids), len(ids)))

    fast = torch.compile(function, backend="eager")
    for n in (64, 96, 128, 64):
        q, k, v = make_qkv(1, n, n, 2, 2, 32, 32, torch.float32)
        assert torch.equal(function(q, k, v, IDS[:n]), fast(q, k, v, IDS[:n]))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call it outside of one"):
        torch.compile(function, fullgraph=True)(q, k, v, IDS[:64])


@pytest.mark.filterwarnings("ignore:Graph break from .Tensor.item:UserWarning")
def test_what_torch_compile_can_not_follow_is_left_out():
    """And computed as ever, with all that is around it compiled."""

    def mask(batch, head, q_idx, kv_idx):
        torch._dynamo.graph_break()
        return q_idx >= kv_idx

    def function(q, k, v):
        return attention(q * 2, k, v, mask=mask, sinks=SINKS).sin()

    assert_same_bits(function, torch.compile(function, backend="aot_eager"), leaves())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(function)[0](*leaves())


WRONG = {
    "if": ({"mask": lambda b, h, i, j: j if i > j else i}, "Data-dependent"),
    "an operation": ({"mask": lambda b, h, i, j: torch.sin(i) > j}, "mask or score has sin; .*try a captured table"),
    "a part of a tensor": ({"score": lambda s, b, h, i, j: s + TABLE[h]}, "has a captured tensor without an index for"),
    "a slice": ({"score": lambda s, b, h, i, j: s + TABLE[:, h]}, "mask or score has the index None"),
    "an int": ({"mask": lambda b, h, i, j: i + j}, "mask returns values of kind int; a bool is needed"),
    "nothing": ({"mask": lambda b, h, i, j: None}, "mask returns None; a bool is needed"),
    "no function": ({"mask": 3}, "mask is 3; a function is needed"),
    "no tensors": ({"mask": masks.causal, "tensors": 3}, "tensors is 3; a tuple of tensors"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p is 1.5; a number from 0 to below 1 is needed"),
    "dropout in a tensor": ({"dropout_p": torch.tensor(0.1)}, r"dropout_p is a Tensor .* from 0 to below 1 is needed"),
    "sinks": ({"sinks": torch.ones(3)}, r"floats \(4,\), one a head, on cpu are needed"),
    "bias": ({"bias": torch.ones(3, 3)}, r"bias has shape \(3, 3\); a tensor that broadcasts"),
    "blocks": ({"mask": masks.causal, "block_mask": block_mask(masks.causal, 1, 1, 5, 5)}, "5 queries × 5 keys; 37 queries"),
    "order": ({"bias": BIAS[:, :, :1], "deterministic": True}, "added up in any order, and deterministic is True"),
}


@pytest.mark.parametrize(("options", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(options, words):
    fast, _ = compiled(lambda q, k, v: attention(q, k, v, **options))
    with pytest.raises(Exception, match=words):
        fast(*leaves())


def test_vmap_is_refused():
    fast, _ = compiled(lambda x: torch.vmap(lambda x: attention(x, x, x, mask=masks.causal))(x))
    for function in (fast, lambda x: torch.vmap(lambda x: attention(x, x, x, bias=x[0, :, 0, :1, None]))(x)):
        with pytest.raises(Exception, match=r"inside a transform of torch\.func.*a plain call is needed"):
            function(torch.zeros(3, 1, 5, 2, 8))


# ---- out of torch.compile ---------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    """With what it captures in parameters, buffers and closures."""

    def __init__(self):
        super().__init__()
        self.table, self.sinks = (torch.nn.Parameter(x.detach().clone()) for x in (TABLE, SINKS))
        self.register_buffer("ids", IDS.clone())
        self.mask = masks.document(self.ids)

    def forward(self, q, k, v, bias):
        def score(score, batch, head, q_idx, kv_idx):
            return score + self.table[head, torch.clamp(q_idx - kv_idx, 0, 100)]

        return attention(q, k, v, mask=self.mask, score=score, bias=bias, sinks=self.sinks)


FRESH = """
import sys, torch, cute_attn
torch.set_num_threads(1)
program, tensors, result = sys.argv[1:]
run = torch.export.load(program).module()
torch.save([run(*inputs) for inputs in torch.load(tensors)], result)
"""


def exported(strict: bool):
    batch, sq, sk = Dim("batch"), Dim("sq"), Dim("sk")
    dims = {"q": {0: batch, 1: sq}, "k": {0: batch, 1: sk}, "v": {0: batch, 1: sk}, "bias": {3: sk}}
    inputs = [(*(x.detach() for x in leaves(*sizes)), torch.randn(1, HEADS, 1, sizes[2])) for sizes in SIZES]
    return torch.export.export(Model(), inputs[0], dynamic_shapes=dims, strict=strict), inputs


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    program, inputs = exported(strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    found = torch.export.load(buffer).module()
    assert FORWARD in calls(found)
    for tensors in inputs:
        assert torch.equal(found(*tensors), Model()(*tensors))


def test_gradients_of_what_required_none_when_it_was_exported():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, q, k, v, bias):
            return attention(self.linear(q), k, v, bias=bias)

    model, (q, k, v) = Learned(), (x.detach() for x in leaves())
    found = torch.export.export(model, (q, k, v, BIAS.detach())).module()
    got, wanted = (torch.autograd.grad(f(q, k, v, BIAS).sin().sum(), BIAS)[0] for f in (found, model))
    assert torch.equal(got, wanted)


def test_export_to_a_fresh_process(tmp_path):
    """Which knows nothing of the functions."""
    program, inputs = exported(False)
    paths = [str(tmp_path / name) for name in ("program.pt2", "inputs", "outputs")]
    torch.export.save(program, paths[0])
    torch.save(inputs, paths[1])
    run_quick(FRESH, *paths).check_returncode()
    for got, tensors in zip(torch.load(paths[2]), inputs, strict=True):
        assert torch.equal(got, Model()(*tensors))


@pytest.mark.parametrize("made", ["meta", "fake"])
def test_tensors_without_values(made):
    with FakeTensorMode() if made == "fake" else torch.device("meta"):
        q, k, v, captured, bias, sinks, slopes = (
            torch.empty(shape, requires_grad=len(shape) > 1)
            for shape in ((2, 9, 4, 16), (2, 11, 2, 16), (2, 11, 2, 24), (9, 2), (9, 11), (4,), (4,))
        )

        def score(score, batch, head, q_idx, kv_idx):
            return score + captured[q_idx, head // 2]

        rules = {"mask": masks.causal, "score": score, "bias": bias, "sinks": sinks, "alibi_slopes": slopes, "dropout_p": 0.1}
        out, lse = attention(q, k, v, return_lse=True, **rules)
        inputs = q, k, v, captured, bias
        found = torch.autograd.grad(out.sum(), inputs)
    assert (out.shape, lse.shape) == ((2, 9, 4, 24), (2, 4, 9))
    assert [x.shape for x in found] == [x.shape for x in inputs]


def test_modes_that_see_every_operator():
    """The bits of a plain call; FLOPs are those of all scores."""

    def function(q, k, v):
        return attention(q, k, v, mask=masks.causal, score=relative, sinks=SINKS)

    tensors = leaves()
    with FlopCounterMode(display=False) as mode:
        found = both_passes(function, tensors)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, both_passes(function, tensors), strict=True))
    assert mode.get_total_flops() == 2 * 2 * HEADS * SQ * SK * (16 + 24 + 3 * 16 + 2 * 24)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode):
    def function(q, k, v):
        return attention(q, k, v, mask=masks.causal, alibi_slopes=SLOPES, bias=q[..., 0].transpose(1, 2)[..., None])

    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*(x.detach() for x in leaves()))
    assert calls(graph).count(FORWARD) == 1
    tensors = [x.detach() for x in (leaves(sq=70) if mode == "symbolic" else leaves())]
    assert torch.equal(graph(*tensors), function(*tensors))


# ---- the interfaces of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"attn_mask": BIAS.detach()}, {"attn_mask": BIAS.detach() > -1.0}, {"dropout_p": 0.3}])
def test_sdpa(options):
    def function(q, k, v):
        tensors = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa.scaled_dot_product_attention(*tensors, enable_gqa=True, backend="reference", **options)

    fast, counter = compiled(function)
    assert_same_bits(function, fast, leaves(), ())
    assert any("cute_attn.attention" in name or "_of_graph" in name for name in calls(counter.graphs[0]))


def test_flash_attn():
    def function(q, k, v):
        rules = {"dropout_p": 0.2, "alibi_slopes": SLOPES, "learnable_sink": SINKS, "window_size": (20, 0)}
        return flash_attn_func(q, k, v, causal=True, **rules)

    assert_same_bits(function, compiled(function)[0], leaves())
