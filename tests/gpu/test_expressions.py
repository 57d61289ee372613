"""A user's masks and scores, ALiBi and sinks in the kernels, forward and backward, on both mechanisms."""

import itertools
import math

import pytest
import torch

from cute_attn import attention, attention_varlen, launch, masks
from tests.functions import CASES, RANDOM, assert_sinks_gradient_close, check, documents, gradient_of_sinks, table
from tests.planted import plant
from tests.support import make_gradients, make_qkv

BF16 = torch.bfloat16
DIMS = [(64, 64), (128, 128), (256, 256)]


@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(case, dims, kind, mechanism):
    """Of the log-sum-exp, too; key heads are shared, and lengths are no multiple of a tile."""
    check(case, (2, 333, 421), (4, 2), dims, BF16, "cuda", kind=kind, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 700), (1, 600, 5), (2, 256, 256), (3, 699, 698)])
@pytest.mark.parametrize("case", ["causal", "nothing", "slope", "sinks", "everything"])
def test_other_lengths(case, sizes, mechanism):
    check(case, sizes, (2, 1), (64, 64), BF16, "cuda", backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("dims", [*DIMS, (96, 72)])
@pytest.mark.parametrize(("case", "sizes"), [("ramp", (1, 400, 421)), ("alibi behind", (1, 1500, 1700))])
def test_ramps_over_many_tiles(case, sizes, dims, mechanism):
    """In full attention with higher query tiles, too, of which 400 rows are five."""
    check(case, sizes, (4, 2), dims, BF16, "cuda", backend="cute", mechanism=mechanism)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("case", RANDOM)
def test_random_functions(case, mechanism):
    """Dense and packed, of all kinds: each is one of them on one mechanism, and another on the other."""
    i = list(RANDOM).index(case) + (mechanism == "cp_async")
    how = {"kind": ("gaussian", "peaky")[i // 3 % 2], "packed": i // 6 % 2 == 1, "mechanism": mechanism}
    check(case, (2, 333, 321), (4, 2), DIMS[i % 3], BF16, "cuda", backend="cute", **how)


@pytest.mark.parametrize("dims", [(96, 40), (192, 128), (40, 104)])
@pytest.mark.parametrize("case", ["document", "slope", "everything"])
def test_other_head_dims_and_float16(case, dims, mechanism):
    check(case, (1, 300, 300), (2, 2), dims, torch.float16, "cuda", of_lse=False, backend="cute", mechanism=mechanism)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("case", ["document", "slope", "everything"])
def test_a_fixed_order(case, dims, mechanism):
    """The same bits each time, and the same gradients."""
    check(case, (1, 500, 500), (4, 1), dims, BF16, "cuda", backend="cute", mechanism=mechanism, deterministic=True)
    q, k, v = make_qkv(1, 500, 500, 4, 1, *dims, BF16, "cuda")
    made, (dout, _) = CASES[case](1, 4, q.device, 0).asked, make_gradients(q, v)
    results = []
    for _ in range(20):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, backend="cute", mechanism=mechanism, deterministic=True, **made)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("needs", ["q", "k", "v", "kv", ""])
@pytest.mark.parametrize("d", [64, 256])
def test_some_gradients(needs, d, mechanism):
    """And the sinks' alone."""
    q, k, v = make_qkv(1, 300, 300, 4, 2, d, d, BF16, "cuda")
    made, (dout, dlse) = CASES["everything"](1, 4, q.device, 0).asked, make_gradients(q, v)
    results = []
    for names in ("qkv", needs):
        leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in zip("qkv", (q, k, v), strict=True)}
        sinks = made["sinks"].clone().requires_grad_()
        options = {"backend": "cute", "mechanism": mechanism, "deterministic": True, "return_lse": True}
        outputs = attention(*leaves.values(), **options, **{**made, "sinks": sinks})
        wanted = {name: leaves[name] for name in names} | {"sinks": sinks}
        results.append(dict(zip(wanted, torch.autograd.grad(outputs, list(wanted.values()), [dout, dlse]), strict=True)))
    for name, gradient in results[1].items():
        torch.testing.assert_close(gradient, results[0][name])


LENGTHS = [(0, 0), (64, 64), (0, 70), (130, 200), (1, 1), (300, 129), (65, 0), (257, 512), (3, 600), (128, 128)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("case", ["document", "nothing", "slope", "alibi", "sinks", "everything"])
@pytest.mark.usefixtures("in_one_configuration")
def test_each_sequence_as_alone(case, d, causal, mechanism):
    """Positions are a sequence's own, ``batch`` is its number, and blocks that draw tickets know it, too."""
    batch, heads = len(LENGTHS), 4
    made = dict(CASES[case](batch, heads, torch.device("cuda"), 0).asked)
    made |= {"causal": True} if causal and "window" not in made else {}
    sq, sk = (sum(side) for side in zip(*LENGTHS, strict=True))
    q, k, v = (x[0] for x in make_qkv(1, sq, sk, heads, 2, d, d, BF16, "cuda"))
    dout = torch.randn_like(q)
    bounds = [
        torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32, device="cuda") for side in zip(*LENGTHS, strict=True)
    ]
    options = {"backend": "cute", "mechanism": mechanism, "deterministic": True, "return_lse": True}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention_varlen(*leaves, *bounds, **options, **made)
    gradients = torch.autograd.grad(out, leaves, dout)
    ends = [bound.tolist() for bound in bounds]
    for i, (n, m) in enumerate(LENGTHS):
        rows, keys = (slice(end[i], end[i + 1]) for end in ends)
        alone = alone_as(made, i)
        inputs = [x[None].detach().clone().requires_grad_() for x in (q[rows], k[keys], v[keys])]
        want, want_lse = attention(*inputs, **options, **alone)
        assert torch.equal(out[rows], want[0]), f"sequence {i}, {n} × {m}"
        assert torch.equal(lse[:, rows], want_lse[0])
        for got, x in zip(
            (gradients[0][rows], gradients[1][keys], gradients[2][keys]),
            torch.autograd.grad(want, inputs, dout[None, rows]),
            strict=True,
        ):
            torch.testing.assert_close(got, x[0], msg=lambda text, i=i: f"sequence {i}: {text}")


@pytest.mark.parametrize("d", [64, 256])
def test_gradient_of_sinks_of_ragged_sequences(d, mechanism, monkeypatch):
    """A sum over rows in use, whatever memory held before."""
    sq, sk = (sum(side) for side in zip(*LENGTHS, strict=True))
    q, k, v = (x[0] for x in make_qkv(1, sq, sk, 4, 2, d, d, BF16, "cuda"))
    bounds = [
        torch.tensor([0, *itertools.accumulate(side)], dtype=torch.int32, device="cuda") for side in zip(*LENGTHS, strict=True)
    ]
    sinks, dout, found = torch.tensor([0.5, -1.0, 3.0, 0.0], device="cuda"), torch.randn_like(q), []
    made = launch.empty_strided
    for fill in (0.0, math.nan):
        with monkeypatch.context() as patch:
            filling = lambda *room, fill=fill: _filled(made(*room), fill)  # noqa: E731
            patch.setattr(launch, "empty_strided", filling)
            leaf = sinks.clone().requires_grad_()
            options = {"backend": "cute", "mechanism": mechanism, "deterministic": True}
            out = attention_varlen(q, k, v, *bounds, sinks=leaf, **options)
            found.append(torch.autograd.grad(out, leaf, dout)[0])
    assert torch.equal(*found)
    expected = torch.zeros_like(sinks, dtype=torch.float64)
    for i, (n, m) in enumerate(LENGTHS):
        if n and m:
            rows, keys = (slice(*bound[i : i + 2].tolist()) for bound in bounds)
            alone = [x[None] for x in (q[rows], k[keys], v[keys], dout[rows])]
            expected += gradient_of_sinks(*alone, torch.zeros(1, 4, n, device="cuda"), {"sinks": sinks})
    assert_sinks_gradient_close(found[1], expected, BF16, sq * d)


def _filled(x: torch.Tensor, value: float) -> torch.Tensor:
    return x.fill_(value) if x.is_floating_point() else x


def alone_as(made: dict, i: int) -> dict:
    """The same functions for a batch of one that is number ``i``."""
    alone = dict(made)
    if "mask" in made:
        alone["mask"] = lambda batch, head, q_idx, kv_idx: made["mask"](batch + i, head, q_idx, kv_idx)
    if "score" in made:
        alone["score"] = lambda score, batch, head, q_idx, kv_idx: made["score"](score, batch + i, head, q_idx, kv_idx)
    return alone


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rows_in_use(d, mechanism):
    """What is past them is NaN, is not read, and gets zeros and −inf, with sinks, too."""
    used = [(300, 300), (0, 20), (129, 64), (300, 0)]
    q, k, v = make_qkv(len(used), 300, 300, 4, 2, d, d, BF16, "cuda")
    made = CASES["everything"](len(used), 4, q.device, 0).asked
    used_q, used_k = (torch.tensor(side, dtype=torch.int32, device="cuda") for side in zip(*used, strict=True))
    for b, (n, m) in enumerate(used):
        q[b, n:], k[b, m:], v[b, m:] = math.nan, math.inf, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, seqused_q=used_q, seqused_k=used_k, mechanism=mechanism, return_lse=True, **made)
    gradients = torch.autograd.grad(out.sum(), leaves)
    for b, (n, m) in enumerate(used):
        assert not out[b, n:].count_nonzero()
        assert (lse[b, :, n:] == -math.inf).all()
        assert not gradients[0][b, n:].count_nonzero()
        assert not any(x[b, m:].count_nonzero() for x in gradients[1:])
        if m:
            assert lse[b, :, :n].isfinite().any() or not n
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("what", ["keys", "band"])
def test_nothing_gets_out_of_a_masked_key(what, dims, mechanism):
    """NaN and infinities in keys and values that a function hides: the same bits in all results, where they are not seen."""
    q, k, v = make_qkv(2, 300, 300, 2, 1, *dims, BF16, "cuda")
    dout, _ = make_gradients(q, v)
    hidden = torch.arange(300, device="cuda") % 5 == 2 if what == "keys" else torch.arange(300, device="cuda") >= 140
    mask = {
        "keys": lambda batch, head, q_idx, kv_idx: ~hidden[kv_idx],
        "band": lambda batch, head, q_idx, kv_idx: (kv_idx < 140) | (q_idx >= 200),
    }[what]
    rows = slice(None) if what == "keys" else slice(0, 200)
    planted = [x.clone() for x in (k, v)]
    for i, x in enumerate(planted):
        plant(x, hidden[None], i)
    results = []
    for keys, values in ((k, v), planted):
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        out, lse = attention(*leaves, mask=mask, mechanism=mechanism, deterministic=True, return_lse=True)
        results.append((out, lse.transpose(1, 2), torch.autograd.grad(out, leaves, dout)))
    for x, y in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(x[:, rows], y[:, rows])
    assert torch.equal(*(gradients[0][:, rows] for _, _, gradients in results))
    if what == "keys":
        assert torch.equal(*(gradients[1][:, ~hidden] for _, _, gradients in results))
        assert torch.equal(*(gradients[2][:, ~hidden] for _, _, gradients in results))


@pytest.mark.parametrize("dims", DIMS)
def test_what_is_seen_shows(dims, mechanism):
    """A value that is NaN makes NaN of every row that sees it, and of no other."""
    q, k, v = make_qkv(1, 300, 300, 2, 2, *dims, BF16, "cuda")
    v[0, 130, :, 3] = math.nan
    out = attention(q, k, v, mask=masks.window(50), mechanism=mechanism)
    row = torch.arange(300, device="cuda")
    sees = (row >= 130) & (row <= 180)
    assert out[0, sees].isnan().all()
    assert out[0, ~sees].isfinite().all()


@pytest.mark.parametrize("d", [64, 128])
def test_captured_data_that_changes_is_no_other_kernel(d, mechanism, monkeypatch):
    """In place, of other sizes and strides: nothing is compiled anew, and results are right. But a bias whose keys aren't
    neighbours can't be read two at a time, which is another kernel."""
    q, k, v = make_qkv(2, 200, 300, 2, 2, d, d, BF16, "cuda")
    check_data = []

    def run(ids, bias):
        def score(score, batch, head, q_idx, kv_idx):
            return score + bias[head, kv_idx]

        results = [attention(q, k, v, mask=masks.document(ids), score=score, backend=b, mechanism=m) for b, m in how]
        check_data.append(results[0])
        torch.testing.assert_close(*(x.float() for x in results), atol=3e-2, rtol=3e-2)

    how = [("cute", mechanism), ("reference", None)]
    ids, bias = documents(2, "cuda"), table(2, 400, device="cuda")
    run(ids, bias)
    compile_kernel, asked = launch.compiled, []
    monkeypatch.setattr(launch, "compiled", lambda *how: (asked.append(how), compile_kernel(*how))[1])
    ids.copy_(documents(2, "cuda", seed=5))
    run(ids, bias)
    run(documents(2, "cuda", seed=7)[:, :350].contiguous(), table(2, 800, device="cuda")[:, 100:480])
    assert not asked
    assert not torch.equal(check_data[0], check_data[1])
    run(ids, table(800, 2, device="cuda").t())
    assert len(asked) == 1


def test_captured_tensors_of_all_kinds(mechanism):
    """Every dtype and rank, numbers on the CPU among them."""
    q, k, v = make_qkv(2, 150, 150, 2, 2, 64, 64, BF16, "cuda")
    kinds = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    ints = [torch.randint(0, 2, (150,), device="cuda").to(dtype) for dtype in kinds]
    floats = [
        torch.rand(2, 2, 3, 150, device="cuda").to(dtype) for dtype in (torch.float16, BF16, torch.float32, torch.float64)
    ]
    number, on_cpu = torch.tensor(0.5, device="cuda"), torch.tensor(1.5)

    def score(score, batch, head, q_idx, kv_idx):
        for x in ints[:-1]:
            score = score + x[q_idx] * 0.125
        for x in floats:
            score = score + x[batch, head, kv_idx % 3, kv_idx] * number
        return torch.where(ints[-1][kv_idx], score, score * on_cpu)

    got = attention(q, k, v, score=score, backend="cute", mechanism=mechanism)
    want = attention(*(x.float() for x in (q, k, v)), score=score, backend="reference")
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("far", [-300.0, 300.0])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_sink_far_from_all_scores(far, d, mechanism):
    q, k, v = make_qkv(1, 200, 200, 2, 2, d, d, BF16, "cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sinks = torch.full((2,), far, device="cuda", requires_grad=True)
    out, lse = attention(*leaves, sinks=sinks, mechanism=mechanism, return_lse=True)
    want, want_lse = attention(q, k, v, mechanism=mechanism, return_lse=True)
    torch.testing.assert_close(out, want if far < 0 else torch.zeros_like(out))
    torch.testing.assert_close(lse, want_lse if far < 0 else torch.full_like(lse, far))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum() + lse.sum(), [*leaves, sinks]))


def test_many_tiles_a_block(mechanism):
    """Persistent blocks with several query tiles each, dense and packed."""
    batch, rows, heads = 8, 1000, 16
    q, k, v = make_qkv(batch, rows, rows, heads, 4, 64, 64, BF16, "cuda")
    ids = torch.arange(rows, device="cuda") // 130
    mask = masks.and_masks(masks.document(ids), masks.causal)
    out = attention(q, k, v, mask=mask, mechanism=mechanism)
    assert torch.equal(out[5:6], attention(q[5:6], k[5:6], v[5:6], mask=mask, mechanism=mechanism))
    bounds = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * rows
    packed = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), bounds, mask=mask, mechanism=mechanism)
    assert torch.equal(packed.unflatten(0, (batch, rows)), out)
