"""The kernels against the oracle, by the policy of tests/support.py, on both mechanisms."""

import math

import pytest
import torch

from cute_attn import attention, launch
from cute_attn.rules import GROWTH_LOG2
from tests.support import SHAPES, assert_close, make_qkv

# One kernel each and mechanism: head dims at and between the padded sizes, V's own, both dtypes, every rule.
KERNELS = [
    pytest.param(64, 64, torch.bfloat16, {}, id="d64"),
    pytest.param(64, 64, torch.float16, {"causal": True}, id="d64-causal-fp16"),
    pytest.param(128, 128, torch.bfloat16, {}, id="d128"),
    pytest.param(128, 128, torch.bfloat16, {"causal": True}, id="d128-causal"),
    pytest.param(128, 128, torch.float16, {"causal": True, "softcap": 20.0}, id="d128-causal-softcap-fp16"),
    pytest.param(256, 256, torch.bfloat16, {"causal": True}, id="d256-causal"),
    pytest.param(256, 256, torch.float16, {}, id="d256-fp16"),
    pytest.param(8, 8, torch.float16, {"causal": True}, id="d8-causal-fp16"),
    pytest.param(96, 96, torch.bfloat16, {"window": (100, 30)}, id="d96-window"),
    pytest.param(40, 104, torch.bfloat16, {"window": (70, None)}, id="d40-dv104-left"),
    pytest.param(192, 128, torch.bfloat16, {"causal": True, "window": (300, -1)}, id="d192-dv128-causal-window"),
    pytest.param(192, 128, torch.bfloat16, {}, id="d192-dv128"),
    pytest.param(192, 128, torch.float16, {"causal": True}, id="d192-dv128-causal"),
    pytest.param(136, 72, torch.bfloat16, {"causal": True, "softcap": 20.0}, id="d136-dv72-causal-softcap"),
    pytest.param(72, 200, torch.float16, {"softcap": 5.0}, id="d72-dv200-softcap-fp16"),
]

# (dtype, how many times q and k are larger), and caps: plain PyTorch's scores, and what it multiplies by the cap, end at the
# dtype's largest number, 65504 for float16, and the tolerance is measured by them.
LARGE = [(torch.bfloat16, times) for times in (30.0, 100.0, 1e3, 1e5, 1e15)] + [(torch.float16, 15.0)]
CAPS = [(torch.float16, cap) for cap in (1.0, 15.0, 100.0, 1e3)]
CAPS += [(torch.bfloat16, cap) for cap in (50.0, 1e5, 1e7, 1e30)]


def run(q, k, v, mechanism, **rules):
    return attention(q, k, v, backend="cute", mechanism=mechanism, return_lse=True, **rules)


@pytest.mark.parametrize(("d", "dv", "dtype", "rules"), KERNELS)
@pytest.mark.parametrize("kind", ["gaussian", "peaky"])
def test_matches_oracle(d, dv, dtype, rules, kind, mechanism):
    for sq, sk in SHAPES:
        heads = (2, 2) if max(sq, sk) > 2000 else (6, 2)
        q, k, v = make_qkv(2, sq, sk, *heads, d, dv, dtype, "cuda", kind=kind, seed=sq + sk)
        result = run(q, k, v, mechanism, **rules)
        try:
            assert_close(result, q, k, v, **rules)
        except AssertionError as error:
            raise AssertionError(f"at (seqlen_q, seqlen_k) = ({sq}, {sk}): {error}") from error


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (5, 1)])
def test_head_groups(heads, mechanism):
    q, k, v = make_qkv(3, 300, 500, *heads, 128, 128, torch.bfloat16, "cuda")
    assert_close(run(q, k, v, mechanism, causal=True), q, k, v, causal=True)


def test_without_lse_same_output(mechanism):
    q, k, v = make_qkv(2, 333, 333, 4, 4, 64, 64, torch.bfloat16, "cuda")
    out, _ = run(q, k, v, mechanism)
    assert torch.equal(out, attention(q, k, v, mechanism=mechanism))


def test_scale(mechanism):
    q, k, v = make_qkv(1, 200, 200, 2, 2, 128, 128, torch.bfloat16, "cuda")
    assert_close(run(q, k, v, mechanism, scale=0.3), q, k, v, scale=0.3)


@pytest.mark.parametrize(("dtype", "times"), LARGE)
@pytest.mark.parametrize("rules", [{}, {"causal": True}], ids=["full", "causal"])
def test_scores_up_to_the_dtypes_range(dtype, times, rules, mechanism):
    for d in (64, 128, 256):
        q, k, v = make_qkv(2, 200, 300, 4, 2, d, d, dtype, "cuda")
        q, k = q * times, k * times
        assert_close(run(q, k, v, mechanism, **rules), q, k, v, **rules)


def rising(d: int, sq: int, jump: float):
    """Inputs whose scores rise by ``jump`` powers of two in all, from the last key, where the kernels begin, to the first; with
    values so small that no output is infinite."""
    q, k, v = make_qkv(1, sq, 1000, 2, 2, d, d, torch.bfloat16, "cuda")
    q[..., 0] = 1.0
    k[..., 0] = torch.linspace(jump * math.log(2.0) * math.sqrt(d), 0.0, 1000, device="cuda")[None, :, None]
    return q, k, v * 2.0**-60


def growth(q, k) -> float:
    """How many powers of two the largest weight is over that of the last 64 keys, at most of any row."""
    scores = torch.einsum("bmhd,bnhd->bhmn", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return (scores.amax(-1) - scores[..., -64:].amax(-1)).max().item() / math.log(2.0)


@pytest.mark.parametrize(("jump", "path"), [(10.0, "anchored"), (100.0, "again"), (160.0, "again"), (1e4, "again")])
@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (600, 5)}], ids=["full", "causal", "window"])
def test_scores_that_rise_from_tile_to_tile(jump, path, rules, mechanism):
    """A little, which leaves the anchor where it is; past what it may, and past float32: then a block does its tiles again."""
    for d, sq in ((64, 700), (128, 1000), (256, 513)):
        q, k, v = rising(d, sq, jump)
        assert (growth(q, k) > GROWTH_LOG2 + 1) == (path == "again")
        assert_close(run(q, k, v, mechanism, **rules), q, k, v, **rules)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_other_rows_do_not_matter_to_a_row(d, mechanism):
    """If they rise so far that their block does its tiles again, the others have the bits that they have without."""
    q, k, v = rising(d, 300, 200.0)
    odd = torch.arange(300, device="cuda") % 2 == 1
    q[:, ~odd, :, 0] = 0.0
    calm = q.clone()
    calm[..., 0] = 0.0
    assert growth(q[:, odd], k) > GROWTH_LOG2 + 1 > growth(calm, k) + 1
    for rules in ({}, {"causal": True}, {"window": (250, 5)}):
        for found, alone in zip(run(q, k, v, mechanism, **rules), run(calm, k, v, mechanism, **rules), strict=True):
            rows = 1 if found.dim() == 4 else 2
            assert torch.equal(found.movedim(rows, 0)[~odd], alone.movedim(rows, 0)[~odd])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_scores_that_jump_anywhere(seed, dtype, mechanism):
    """At some keys, up and down, by up to 2³⁰⁰; in some rows, at one key more."""
    pick = torch.Generator().manual_seed(seed)
    d = (64, 128, 256)[seed % 3]
    q, k, v = make_qkv(1, 400, 900, 2, 2, d, d, dtype, "cuda")
    jumps = torch.randint(900, (6,), generator=pick)
    powers = torch.rand(6, generator=pick) * 600 - 300
    q[..., 0] = 1.0
    k[:, jumps, :, 0] += (powers * math.log(2.0) * math.sqrt(d)).to(k)[None, :, None]
    q[:, torch.randint(400, (5,), generator=pick), :, 1] = 8.0
    k[:, torch.randint(900, (1,), generator=pick), :, 1] = 20.0 * math.sqrt(d)
    v = v * 2.0**-8
    for rules in ({}, {"causal": True}):
        assert_close(run(q, k, v, mechanism, **rules), q, k, v, **rules)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_one_key_that_outweighs_all_others_weighs_exactly_1(d, mechanism):
    """With q and k up to the largest float16, 4·10⁹ and more a product."""
    q, k, v = make_qkv(2, 200, 300, 4, 4, d, d, torch.float16, "cuda")
    q, k = ((x * 1e4).clamp(-65504.0, 65504.0) for x in (q, k))
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) / math.sqrt(d)
    (best, second), (key, _) = (x.unbind(-1) for x in scores.topk(2))
    off = 1e-5 * best.abs()  # more than float32 sums are
    clear = best - second > off
    assert clear.double().mean() > 0.9
    out, lse = run(q, k, v, mechanism)
    chosen = v.transpose(1, 2).gather(2, key[..., None].expand(*key.shape, d))
    assert torch.equal(out.transpose(1, 2)[clear], chosen[clear])
    assert ((lse - best).abs() <= off)[clear].all()


@pytest.mark.parametrize(("dtype", "cap"), CAPS)
def test_softcap_of_any_size(dtype, cap, mechanism):
    for times in (1.0, 20.0):
        q, k, v = make_qkv(2, 200, 300, 4, 2, 128, 128, dtype, "cuda")
        q = q * times
        assert_close(run(q, k, v, mechanism, softcap=cap, causal=True), q, k, v, softcap=cap, causal=True)


@pytest.mark.parametrize("cap", [1e5, 1e7, 1e30])
def test_a_softcap_far_above_the_scores_changes_nothing(cap, mechanism):
    """To the dtype's accuracy: it is held to that of attention without one."""
    q, k, v = make_qkv(2, 200, 300, 4, 2, 128, 128, torch.float16, "cuda")
    assert_close(run(q, k, v, mechanism, softcap=cap, causal=True), q, k, v, causal=True)


def test_window_reaches_past_everything(mechanism):
    q, k, v = make_qkv(1, 200, 300, 2, 2, 64, 64, torch.bfloat16, "cuda")
    for got, want in zip(run(q, k, v, mechanism, window=(2**40, 2**62)), run(q, k, v, mechanism), strict=True):
        assert torch.equal(got, want)


def test_strided_inputs_are_read_in_place(mechanism):
    """Transposed, sliced out of a fused projection, and expanded tensors give the bits of their contiguous copies."""
    b, s, h, d = 2, 321, 4, 128
    fused = make_qkv(b, s, s, 3 * h, 3 * h, d, d, torch.bfloat16, "cuda")[0]
    q, k, v = fused.chunk(3, dim=2)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = run(q.contiguous(), k.contiguous(), v.contiguous(), mechanism, causal=True)
    for inputs in ((q, k, v), transposed):
        for got, want in zip(run(*inputs, mechanism, causal=True), expected, strict=True):
            assert torch.equal(got, want)
    one_head = [x[:, :, :1].expand(b, s, h, d) for x in (k, v)]
    expected = run(q.contiguous(), *(x.contiguous() for x in one_head), mechanism, causal=True)
    for got, want in zip(run(q, *one_head, mechanism, causal=True), expected, strict=True):
        assert torch.equal(got, want)


def test_stride_of_a_dimension_of_size_1_is_free(mechanism):
    q, k, v = make_qkv(1, 100, 100, 1, 1, 64, 64, torch.bfloat16, "cuda")
    odd = [x.as_strided(x.shape, (3, 64, 5, 1)) for x in (q, k, v)]
    for got, want in zip(run(*odd, mechanism), run(q, k, v, mechanism), strict=True):
        assert torch.equal(got, want)


def test_past_two_to_the_31_elements(mechanism):
    """The last batch element starts past 2³¹ elements; it must equal the same data by itself."""
    b, s, h, d = 3, 256, 2, 128
    buffers = [torch.empty((b - 1) * (1 << 30) + (1 << 27), dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    q, k, v = (x.as_strided((b, s, h, d), (1 << 30, h * d, d, 1)) for x in buffers)
    for big, small in zip((q, k, v), make_qkv(b, s, s, h, h, d, d, torch.bfloat16, "cuda"), strict=True):
        big.copy_(small)
    got = run(q, k, v, mechanism, causal=True)
    want = run(q.contiguous(), k.contiguous(), v.contiguous(), mechanism, causal=True)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    assert_close((got[0][-1:], got[1][-1:]), q[-1:].clone(), k[-1:].clone(), v[-1:].clone(), causal=True)


@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (40, 20)}], ids=["full", "causal", "window"])
def test_nan_beyond_the_sequence_changes_nothing(rules, mechanism):
    """Rows of the same storage past seqlen_q and seqlen_k hold NaN."""
    b, sq, sk, h, d = 2, 203, 333, 2, 128
    q, k, v = make_qkv(b, sq, sk, h, h, d, d, torch.bfloat16, "cuda")
    want = run(q, k, v, mechanism, **rules)
    poisoned = []
    for x in (q, k, v):
        storage = torch.full((b, x.shape[1] + 300, h, d), math.nan, dtype=x.dtype, device="cuda")
        storage[:, : x.shape[1]] = x
        poisoned.append(storage[:, : x.shape[1]])
    for got, expected in zip(run(*poisoned, mechanism, **rules), want, strict=True):
        assert torch.equal(got, expected)


def test_nan_in_unseen_keys_changes_nothing(mechanism):
    """Keys before every query's window are never read, in K or in V, wherever they fall in a tile."""
    b, sq, sk, h, d = 2, 100, 700, 2, 128
    for left in (0, 37, 200):
        q, k, v = make_qkv(b, sq, sk, h, h, d, d, torch.bfloat16, "cuda")
        rules = {"causal": True, "window": (left, None)}
        want = run(q, k, v, mechanism, **rules)
        first_seen = sk - sq - left
        k[:, :first_seen] = math.nan
        v[:, :first_seen] = math.nan
        for got, expected in zip(run(q, k, v, mechanism, **rules), want, strict=True):
            assert torch.equal(got, expected)


def test_nan_in_a_seen_key_shows(mechanism):
    q, k, v = make_qkv(1, 64, 64, 1, 1, 64, 64, torch.bfloat16, "cuda")
    k[0, 10] = math.nan
    out, lse = run(q, k, v, mechanism)
    assert out.isnan().all()
    assert lse.isnan().all()


def test_outputs_are_tensors_as_torch_makes_them(mechanism):
    """Of the mode and the device that there are, whether a call is planned or was before."""
    q, k, v = make_qkv(2, 257, 129, 3, 3, 96, 40, torch.float16, "cuda")
    for inference in (False, False, True, True):
        with torch.inference_mode(inference):
            for x in run(q, k, v, mechanism):
                assert x.is_inference() == inference
                assert (x.device, x.is_contiguous(), x.requires_grad) == (q.device, True, False)
                assert inference or x._version == 0
                x.add_(1)


def test_outputs_are_all_written(mechanism, monkeypatch):
    """Outputs that start as NaN end without one."""
    made, poisoned = launch.empty_strided, []

    def poison(*room):
        poisoned.append(made(*room).fill_(math.nan))
        return poisoned[-1]

    q, k, v = make_qkv(2, 257, 129, 3, 3, 96, 40, torch.float16, "cuda")
    monkeypatch.setattr(launch, "empty_strided", poison)
    out, lse = run(q, k, v, mechanism)
    assert len(poisoned) == 2
    assert not out.isnan().any()
    assert not lse.isnan().any()


# More query tiles than three times an H200's 132 multiprocessors, so that a persistent block takes several in turn; and long
# ones, which have a block each, of so many heads that they are taken in groups, of which the first lacks some.
MANY_TILES = [
    pytest.param(64, 64, (2048, 2048), (8, 20, 4), {"causal": True}, id="d64-causal-gqa"),
    pytest.param(128, 128, (1024, 1300), (8, 8, 8), {}, id="d128"),
    pytest.param(128, 128, (1300, 700), (8, 8, 2), {"causal": True}, id="d128-rows-that-see-nothing"),
    pytest.param(128, 128, (1500, 4200), (2, 12, 4), {"causal": True}, id="d128-long"),
    pytest.param(256, 256, (1100, 2100), (2, 12, 12), {"causal": True}, id="d256-long"),
    pytest.param(256, 256, (2048, 256), (4, 16, 16), {"causal": True}, id="d256-tiles-that-see-nothing"),
    pytest.param(256, 192, (1024, 1024), (4, 16, 16), {"window": (200, 0)}, id="d256-dv192-window"),
    pytest.param(192, 256, (1024, 512), (4, 16, 4), {"causal": True}, id="d192-dv256-tiles-that-see-nothing"),
]


@pytest.mark.parametrize(("d", "dv", "lengths", "sizes", "rules"), MANY_TILES)
def test_many_tiles_a_block(d, dv, lengths, sizes, rules, mechanism):
    batch, heads, heads_kv = sizes
    q, k, v = make_qkv(batch, *lengths, heads, heads_kv, d, dv, torch.bfloat16, "cuda")
    result = run(q, k, v, mechanism, **rules)
    assert_close(result, q, k, v, **rules)
    for _ in range(20):
        for again, first in zip(run(q, k, v, mechanism, **rules), result, strict=True):
            assert torch.equal(again, first)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_same_inputs_same_bits(d, mechanism):
    q, k, v = make_qkv(2, 1000, 1000, 4, 2, d, d, torch.bfloat16, "cuda")
    out, lse = run(q, k, v, mechanism, causal=True)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again, lse_again = run(q, k, v, mechanism, causal=True)
        differing += (again != out).sum() + (lse_again != lse).sum()
    assert differing.item() == 0


def test_runs_on_the_callers_stream(mechanism):
    """On a second stream, the kernel waits for what that stream did before it and for nothing else."""
    q, k, v = make_qkv(1, 512, 512, 2, 2, 128, 128, torch.bfloat16, "cuda")
    want = attention(q, k, v, mechanism=mechanism)
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # keeps the default stream busy
    with torch.cuda.stream(other):
        attention(q, k, v, mechanism=mechanism)
    other.synchronize()
    assert not torch.cuda.default_stream().query(), "the kernel waited for a stream that it has nothing to do with"
    late_q = torch.full_like(q, math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late_q.copy_(q)
        got = attention(late_q, k, v, mechanism=mechanism)
    stream.synchronize()
    assert torch.equal(got, want)


def test_captured_in_a_cuda_graph(mechanism):
    q, k, v = make_qkv(1, 512, 512, 2, 2, 128, 128, torch.bfloat16, "cuda")
    attention(q, k, v, causal=True, mechanism=mechanism)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, causal=True, mechanism=mechanism)
    for seed in (1, 2):
        for x, fresh in zip((q, k, v), make_qkv(1, 512, 512, 2, 2, 128, 128, torch.bfloat16, "cuda", seed=seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        assert torch.equal(out, attention(q, k, v, causal=True, mechanism=mechanism))


def test_allocates_outputs_only(mechanism):
    q, k, v = make_qkv(1, 4096, 4096, 4, 4, 128, 128, torch.bfloat16, "cuda")
    attention(q, k, v, mechanism=mechanism)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(q, k, v, mechanism=mechanism)
    assert torch.cuda.max_memory_allocated() - before == out.numel() * out.element_size()
