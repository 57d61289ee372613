"""Gradients of captured tensors and of biases, and dropout: in the reference, and what of them the host decides."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_attn import attention, attention_varlen, dropout, flash_attn, functions, sdpa
from cute_attn.functions import COPIES_OF_ELEMENT, traced
from tests.captured import CASES, check, seeded
from tests.support import make_gradients, make_qkv

pytestmark = pytest.mark.usefixtures("one_thread")
Q = torch.zeros(2, 6, 4, 8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("p", "kind"), [(0.0, "gaussian"), (0.0, "peaky"), (0.25, "gaussian")])
def test_reference(case, p, kind):
    check(case, (2, 130, 150), (4, 2), (16, 24), torch.bfloat16, "cpu", kind, p=p, backend="reference")


# ---- captured tensors and biases -------------------------------------------------------------------------------------


def partials(score=None, bias=None, batch=2, heads=4, lengths=(6, 10)):
    expression, _ = traced(None, score, (), None, Q, heads, batch, bias, lengths)
    return expression, [partial.alone for partial in expression.partials]


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def test_what_each_score_has_of_its_own_is_stored():
    assert partials(bias=zeros(2, 4, 6, 10))[1] == [True]
    assert partials(bias=zeros(1, 4, 6, 10), batch=1)[1] == [True]
    assert partials(bias=zeros(6, 10), batch=1, heads=1)[1] == [True]
    assert partials(bias=zeros(2, 4, 6, 10), lengths=None)[1] == [False]
    table = zeros(2, 4, 7, 10)  # of which one row is not loaded
    assert partials(lambda s, b, h, i, j: s + table[b, h, i, j])[1] == [False]
    square = zeros(2, 4, 6, 6)
    assert partials(lambda s, b, h, i, j: s + square[b, h, i, j], lengths=(6, 6))[1] == [True]
    assert partials(lambda s, b, h, i, j: s + square[b, h, i, j] + square[b, h, j, i], lengths=(6, 6))[1] == [False] * 2
    assert partials(lambda s, b, h, i, j: s + square[b, h, i, i], lengths=(6, 6))[1] == [False]


def test_what_a_few_share_has_copies(monkeypatch):
    """As many as take some memory, and a few of any size."""
    for bias, copied in ((zeros(1, 4, 6, 10), ("batch",)), (zeros(2, 1, 6, 10), ("head",)), (zeros(6, 10), ("batch", "head"))):
        expression, alone = partials(bias=bias)
        assert alone == [True]
        assert expression.partials[0].copied == copied
    many, size = {"bias": zeros(1, 4, 6, 10)}, 4 * 240
    monkeypatch.setattr(functions, "COPIES_BYTES", 9 * size)
    assert partials(**many, batch=9)[1] == [True]
    assert partials(**many, batch=10)[1] == [False]
    monkeypatch.setattr(functions, "COPIES_BYTES", 0)
    assert partials(**many, batch=COPIES_OF_ELEMENT // 4)[1] == [True]
    assert partials(**many, batch=COPIES_OF_ELEMENT // 4 + 1)[1] == [False]
    assert partials(bias=zeros(6, 10), lengths=None)[1] == [False]


@pytest.mark.parametrize(
    ("dtype", "keys", "fours"), [(torch.bfloat16, 12, True), (torch.float32, 12, False), (torch.float16, 10, False)]
)
def test_gradients_of_four_keys_are_stored_at_once(dtype, keys, fours):
    table = zeros(2, 4, 6, keys, dtype=dtype)
    expression, alone = partials(lambda s, b, h, i, j: s + table[b, h, i, j], lengths=(6, keys))
    assert alone == [True]
    assert expression.partials[0].fours == fours
    other = zeros(2, 4, keys, 6, dtype=dtype)
    assert not partials(lambda s, b, h, i, j: s + other[b, h, j, i], lengths=(6, keys))[0].partials[0].fours


def test_dimensions_along_which_a_bias_is_the_same_have_no_index():
    """Strides of 0 are one; the others come in the order of memory, so that nothing is copied."""
    base = zeros(4, 10)
    for bias, shape in (
        (base[:, None].expand(2, 4, 6, 10), (4, 10)),
        (zeros(6, 10, 4).permute(2, 0, 1), (6, 10, 4)),
        (zeros(1, 1, 1, 1), ()),
        (zeros(10, 6).mT, (10, 6)),
    ):
        _, (captured,) = traced(None, None, (), None, Q, 4, 2, bias, (6, 10))
        assert captured.shape == shape
        assert captured.is_contiguous()


@pytest.mark.parametrize("kept_by", ["a leaf", "retain_grad()"])
def test_an_expanded_bias_that_keeps_its_gradient(kept_by):
    """Has one for each of its elements, though some are one number in memory."""
    q, k, v = make_qkv(2, 6, 10, 4, 2, 8, 8, torch.float64)
    bias = zeros(4, 1, 10, dtype=torch.float64).expand(2, 4, 6, 10)
    if kept_by == "a leaf":
        bias = bias.detach().requires_grad_()
    else:
        bias.retain_grad()
    attention(q, k, v, bias=bias).square().sum().backward()
    whole = torch.zeros(2, 4, 6, 10, dtype=torch.float64, requires_grad=True)
    attention(q, k, v, bias=whole).square().sum().backward()
    torch.testing.assert_close(bias.grad, whole.grad)


@pytest.mark.parametrize(
    ("dtype", "keys", "row", "first", "n"),
    [
        *((torch.bfloat16, 12, 12, 0, 4), (torch.float16, 12, 16, 4, 4), (torch.bfloat16, 12, 14, 0, 2)),
        *((torch.bfloat16, 12, 12, 2, 2), (torch.bfloat16, 12, 13, 0, 1), (torch.bfloat16, 12, 12, 1, 1)),
        *((torch.bfloat16, 10, 12, 0, 2), (torch.bfloat16, 11, 12, 0, 1), (torch.float32, 12, 12, 0, 2)),
    ],
)
def test_how_many_keys_are_loaded_at_once(dtype, keys, row, first, n):
    """As many as rows are long, apart and at addresses that are multiples of, 8 bytes at most."""
    x = torch.zeros(6 * row + first, dtype=dtype)[first:].view(6, row)[:, :keys]
    expression, _ = partials(lambda s, b, h, i, j: s + x[i, j], lengths=(6, keys))
    assert [len(expression.neighbours(many)) for many in (2, 4)] == [n >= 2, n >= 4]


@settings(max_examples=60, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 5)] * 2, st.integers(1, 24)),
    st.tuples(*[st.integers(0, 60)] * 2),
    st.integers(0, 9),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_neighbours_lie_together(shape, strides, first, dtype):
    """Each so many of any row are at a multiple of their size, and twice as many are not, or of more than 8 bytes."""
    x, bytes_ = torch.zeros(700, dtype=dtype).as_strided(shape, (*strides, 1), first), dtype.itemsize
    rows = [[x[i, j, k:].data_ptr() for k in range(shape[2])] for i in range(shape[0]) for j in range(shape[1])]

    def together(n):
        return shape[2] % n == 0 and all(row[k] % (n * bytes_) == 0 for row in rows for k in range(0, shape[2], n))

    n = functions._neighbours(x, shape[2])
    assert together(n)
    used = all(size > 1 or stride % (2 * n) == 0 for size, stride in zip(shape, strides, strict=False))
    assert 2 * n * bytes_ > 8 or not (used and together(2 * n))


def test_what_is_loaded_in_pairs():
    """A score's key is the last index, and there is room for all keys at addresses of two."""
    def pairs(x, score=None, lengths=(6, 10)):
        return len(partials(score, None if score else x, 2, 4, lengths)[0].neighbours(2))

    assert pairs(zeros(2, 4, 6, 10)) == 1
    assert pairs(zeros(10)) == 1
    assert not pairs(zeros(2, 4, 6, 10), lengths=None)
    assert not pairs(zeros(6, 11), lengths=(6, 11))
    assert not pairs(zeros(6, 11)[:, :10])
    assert not pairs(zeros(61)[1:].view(6, 10))
    assert not pairs(zeros(10, 6).mT)
    texts = {"x[i, j]": 1, "x[3, j]": 1, "x[i, i]": 0, "x[i, j // 2]": 0, "x[j, j]": 0, "x[s.int(), j]": 0}
    for text, count in texts.items():
        for size in (10, 8):  # of fewer than all keys the last one stands for the others
            x = zeros(10, size)
            assert pairs(x, eval(f"lambda s, b, h, i, j: s + {text}", {"x": x})) == count * (size == 10), text


def test_only_what_requires_a_gradient_is_in_the_key_and_of_the_backward_pass_only():
    table = torch.zeros(4, 10)
    plain, _ = partials(lambda s, b, h, i, j: s * table[h, j])
    table.requires_grad_()
    derived, _ = partials(lambda s, b, h, i, j: s * table[h, j])
    assert derived != plain
    assert not plain.partials
    assert derived.without_partials == plain
    with torch.no_grad():
        assert partials(lambda s, b, h, i, j: s * table[h, j])[0] == plain


def test_gradients_of_tensors_that_no_score_depends_on_are_zeros():
    q, k, v = make_qkv(1, 6, 10, 4, 4, 8, 8)
    table = zeros(10)
    out = attention(q, k, v, mask=lambda b, h, i, j: table[j] >= 0, score=lambda s, *_: 2.0 * s)
    assert not torch.autograd.grad(out.sum(), table)[0].count_nonzero()


LOADS = ["a[head, q_idx]", "a[head, kv_idx]", "b[q_idx, kv_idx]", "c[head]", "b[kv_idx, q_idx % 3]", "d"]
FORMS = ["({} + {})", "({} * {})", "torch.tanh({} + {})", "torch.where(q_idx > kv_idx, {}, {})", "({} - 0.5 * {})"]


@st.composite
def texts(draw, depth=3) -> str:
    if not depth or not draw(st.integers(0, 3)):
        return draw(st.sampled_from([*LOADS, "score"]))
    return draw(st.sampled_from(FORMS)).format(draw(texts(depth - 1)), draw(texts(depth - 1)))


@settings(max_examples=30, derandomize=True)
@given(texts())
def test_partials_of_random_expressions(text):
    """Dual numbers, in the place of what is loaded, against autograd."""
    shapes = {"a": (2, 9), "b": (9, 9), "c": (2,), "d": ()}
    space = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    score = eval(f"lambda score, batch, head, q_idx, kv_idx: score + {text}", {"torch": torch, **space})
    expression, captured = traced(None, score, (), None, Q, 2, 2)
    from cute_attn.expressions import TorchOps

    batch, head, q_idx, kv_idx = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 7, 9)), indexing="ij")
    names = {"score": torch.randn(2, 2, 7, 9).double(), "batch": batch, "head": head, "q_idx": q_idx, "kv_idx": kv_idx}
    found = [torch.zeros_like(x) for x in captured]
    ops = TorchOps(tuple(x.detach() for x in captured), torch.float64, torch.device("cpu"))
    dS, known = torch.randn(2, 2, 7, 9).double(), {}
    for partial in expression.partials:
        slope = 1.0 if partial.slope is None else expression.value(partial.slope, names.get, ops, known)
        where = tuple(i.expand(dS.shape) for i, _ in expression.indices(partial.load, names.get, ops, known))
        total = found[expression.nodes[partial.load][2]]
        total.index_put_(where, dS * slope, accumulate=True) if where else total.add_((dS * slope).sum())
    value = score(*names.values()).expand(dS.shape)
    want = torch.autograd.grad(value, captured, dS, allow_unused=True, materialize_grads=True) if captured else ()
    for got, x in zip(found, want, strict=True):
        torch.testing.assert_close(got, x)


def test_packed_sequences_have_biases_of_their_own():
    q, k, v = make_qkv(2, 20, 30, 4, 2, 8, 8, torch.float64)
    bias = torch.randn(2, 4, 25, 30, dtype=torch.float64, requires_grad=True)
    want = attention(q, k, v, bias=bias[:, :, :20], causal=True)
    bounds = torch.tensor([0, 20, 40], dtype=torch.int32), torch.tensor([0, 30, 60], dtype=torch.int32)
    out = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *bounds, bias=bias, causal=True)
    torch.testing.assert_close(out.unflatten(0, (2, 20)), want)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in (out, want)))
    used = torch.tensor([20, 11], dtype=torch.int32)
    out = attention(q, k, v, bias=bias[:, :, :20], seqused_q=used, seqused_k=used)
    alone = attention(q[1:, :11], k[1:, :11], v[1:, :11], bias=bias[1:, :, :11, :11])
    torch.testing.assert_close(out[1:, :11], alone)


@pytest.mark.parametrize("model", ["Swin", "AlphaFold"])
def test_biases_of_models(model):
    """Swin's, gathered from a table of offsets in windows of 7 × 7, with its mask of shifted windows; AlphaFold's, projected
    from a representation of pairs, beside a mask of residues: with gradients of the table and of the projection, beside torch's
    function."""
    n, heads, batch = (49, 4, 6) if model == "Swin" else (23, 4, 2)
    q, k, v = make_qkv(batch, n, n, heads, heads, 8, 8, torch.float64)
    if model == "Swin":
        weight = torch.randn(13 * 13, heads, dtype=torch.float64, requires_grad=True)
        place = torch.cartesian_prod(torch.arange(7), torch.arange(7))
        ahead = place[:, None] - place + 6
        bias = weight[ahead[..., 0] * 13 + ahead[..., 1]].permute(2, 0, 1)
        regions = torch.randint(0, 3, (batch, n))
        hidden = regions[:, :, None] != regions[:, None]
    else:
        weight = torch.randn(5, heads, dtype=torch.float64, requires_grad=True)
        bias = (torch.randn(batch, n, n, 5, dtype=torch.float64) @ weight).permute(0, 3, 1, 2)
        hidden = (torch.rand(batch, n) < 0.2)[:, None].expand(-1, n, -1)
    ours = attention(q, k, v, bias=bias, mask=lambda b, h, i, j: ~hidden[b, i, j])
    mask = bias.masked_fill(hidden[:, None], -math.inf)
    torchs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(ours, torchs.transpose(1, 2))
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), weight, retain_graph=True)[0] for x in (ours, torchs)))


@pytest.mark.parametrize("no", ["rows", "keys", "batch"])
def test_biases_of_nothing(no):
    batch, sq, sk = (0, 6, 10) if no == "batch" else (2, 0, 10) if no == "rows" else (2, 6, 0)
    q, k, v = make_qkv(batch, sq, sk, 4, 4, 8, 8)
    bias = zeros(batch, 4, sq, sk)
    out = attention(q.requires_grad_(), k, v, bias=bias, dropout_p=0.5)
    assert not out.count_nonzero()
    torch.autograd.grad(out.sum(), q)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_is_the_published_one(word, words):
    """The known answers of 7 rounds that come with its authors' code."""
    x = torch.tensor([word])
    assert [int(found) for found in dropout.philox((x,) * 4, (x,) * 2, dropout.TensorWordOps)] == list(words)


def _philox(counter: list[int], key: list[int]) -> list[int]:
    """As its authors write it down, in Python's numbers."""
    for n in range(7):
        if n:
            key = [(k + step) % 2**32 for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        (high_0, low_0), (high_1, low_1) = divmod(0xD2511F53 * counter[0], 2**32), divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
    return counter


@settings(max_examples=100, derandomize=True)
@given(
    st.integers(-(2**63), 2**63 - 1), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 2**20), st.integers(0, 2**10),
    st.tuples(*[st.integers(0, 2**31 - 40)] * 2),
)  # fmt: skip
def test_which_probabilities_are_kept(seed, p, batch, head, place):
    """Of any call, 32 × 32 scores from anywhere on."""
    rows, keys = (torch.arange(n, n + 32) for n in place)
    where = (torch.tensor(batch), torch.tensor(head), rows[:, None], keys)
    found, least = dropout.kept(torch.tensor([seed]), p, *where), round(min(p, 1.0 - p) * 2**15)
    for row, key in ((0, 0), (9, 3), (31, 31), (17, 24), (24, 17)):
        i, j = int(rows[row]), int(keys[key])
        words = _philox([i & ~8, j & ~9, head, batch], [seed % 2**32, (seed >> 32) % 2**32])
        word = words[(j & 8) // 4 + (i & 8) // 8]
        number = (word >> 16 if j % 2 else word) % 2**15
        assert found[row, key] == (number >= least if p <= 0.5 else number < max(least, 1))


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_the_rate_that_is_met(p):
    assert abs(dropout.rate(p) - p) <= 2**-15 if p > 1.0 - 2**-16 else abs(dropout.rate(p) - p) <= 2**-16
    assert dropout.kept_scale(p) <= 2**15


def places(*sizes: int) -> list[torch.Tensor]:
    return [torch.arange(n).view(-1, *[1] * (3 - i)) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_of_dropout(p):
    """Within 4 σ: of all, of each word of a counter, of neighbours, and of two seeds together."""
    torch.manual_seed(0)
    seeds = [dropout.draw_seed(torch.empty(0)) for _ in range(2)]
    first, second = (dropout.kept(seed, p, *places(2, 3, 256, 256)) for seed in seeds)

    assert abs(dropout.rate(p) - p) <= 2**-16
    p = dropout.rate(p)

    def assert_rate(kept, rate, times=1):
        assert abs(kept.double().mean() - rate) < 4 * math.sqrt(times * rate * (1 - rate) / kept.numel())

    assert_rate(first, 1 - p)
    for n in range(0, 32, 8):
        assert_rate(first[:, :, n : n + 8], 1 - p)
        assert_rate(first.unflatten(3, (-1, 32))[..., n : n + 8], 1 - p)
    both = (1 - p) ** 2
    keys = [(first[..., n:], first[..., :-n]) for n in (1, 8, 16)]
    assert_rate(first & second, both)
    neighbours = *keys, (first[:, :, 8:], first[:, :, :-8]), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])
    for one, other in neighbours:  # most scores are in two pairs, so that the variance is up to twice that of pairs apart
        assert_rate(one & other, both, times=2)


def test_numbers_of_dropout():
    assert [dropout.threshold(p) for p in (0.0, 1e-6, 0.5, 0.75, 1.0 - 1e-6)] == [0, 0, 2**14, ~(2**13), ~1]
    assert [dropout.kept_scale(p) for p in (0.5, 0.75, 1.0 - 1e-6)] == [2.0, 4.0, 2**15]
    q, k, v = make_qkv(1, 9, 9, 2, 2, 8, 8)
    assert torch.equal(attention(q, k, v, dropout_p=1e-6), attention(q, k, v))


@pytest.mark.parametrize("tiles", [(128, 128), (48, 80), (16, 200)])
def test_what_is_kept_does_not_depend_on_tiles(tiles):
    from cute_attn import reference
    from cute_attn.problem import check_call

    q, k, v = make_qkv(2, 150, 170, 4, 2, 8, 8, torch.float64)
    call = check_call(q, k, v, None, False, (60, 9), None)
    call.dropout, call.seed = 0.4, torch.tensor([12345678901234])
    want = reference.attention(q, k, v, call)
    found = reference.attention(q, k, v, call, tile_m=tiles[0], tile_n=tiles[1])
    torch.testing.assert_close(found[0], want[0])
    dout, _ = make_gradients(q, v)
    for x, y in zip(
        *(
            reference.gradients(q, k, v, want[0], want[2], dout, None, call, tile_m=m, tile_n=n)
            for m, n in ((128, 128), tiles)
        ),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


def test_a_seed_makes_the_same_again():
    q, k, v = make_qkv(1, 40, 40, 2, 2, 8, 8)
    torch.manual_seed(5)
    first, second = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    leaf = q.clone().requires_grad_()
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(lambda x: attention(x, k, v, dropout_p=0.5), leaf, use_reentrant=False)
    assert torch.equal(again, first)
    (of_checkpoint,) = torch.autograd.grad(again.square().sum(), leaf)
    torch.manual_seed(5)
    (want,) = torch.autograd.grad(attention(leaf, k, v, dropout_p=0.5).square().sum(), leaf)
    assert torch.equal(of_checkpoint, want)


def test_sequences_drop_what_the_batch_drops():
    """A sequence's number is its place in the batch."""
    q, k, v = make_qkv(2, 20, 30, 4, 2, 8, 8, torch.float64)
    bounds = torch.tensor([0, 20, 40], dtype=torch.int32), torch.tensor([0, 30, 60], dtype=torch.int32)
    with seeded(3, q.device):
        want = attention(q, k, v, dropout_p=0.3)
        packed = attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), *bounds, dropout_p=0.3)
        of_flash = flash_attn.flash_attn_func(q, k, v, 0.3)
        of_flash_packed = flash_attn.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), *bounds, 20, 30, 0.3)
    torch.testing.assert_close(packed.unflatten(0, (2, 20)), want)
    torch.testing.assert_close(of_flash_packed, packed)
    torch.testing.assert_close(of_flash, want)


# ---- torch's function ------------------------------------------------------------------------------------------------

MASKS = [(2, 4, 20, 30), (20, 30), (2, 1, 1, 30), (4, 20, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_sdpa(shape, kind):
    """Beside torch's own, with the gradient of a mask that is added."""
    q, k, v = (x.transpose(1, 2) for x in make_qkv(2, 20, 30, 4, 4, 8, 8, torch.float64))
    mask = torch.randn(shape, dtype=torch.float64)
    mask = mask > -1.0 if kind == "bool" else mask
    results = []
    for call in (
        lambda *x, **how: sdpa.scaled_dot_product_attention(*x, backend="reference", **how),
        torch.nn.functional.scaled_dot_product_attention,
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        given_mask = mask.clone() if kind == "bool" else mask.clone().requires_grad_()
        out = call(*leaves, attn_mask=given_mask)
        wanted = leaves if kind == "bool" else [*leaves, given_mask]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_masks_of_sdpa_in_other_dimensions():
    mine, torchs = sdpa.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(2, 3, 4, 20, 8)
    for tensor, mask in ((q, torch.randn(2, 1, 4, 20, 20)), (q, torch.randn(4, 1, 20)), (q[0, 0], torch.randn(1, 20, 20))):
        assert sdpa.why_not(tensor, tensor, tensor, mask, backend="reference") is None
        got = mine(tensor, tensor, tensor, mask, backend="reference")
        torch.testing.assert_close(got, torchs(tensor, tensor, tensor, mask))


def test_dropout_of_sdpa():
    q = torch.randn(2, 4, 20, 8)
    with seeded(3, q.device):
        got = sdpa.scaled_dot_product_attention(q, q, q, None, 0.25, backend="reference")
        want = attention(*(x.transpose(1, 2) for x in (q, q, q)), dropout_p=0.25).transpose(1, 2)
    torch.testing.assert_close(got, want)
