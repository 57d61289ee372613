"""flash-attn's functions: signatures, results beside float64, graphs; and ``import flash_attn`` by code of others."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_attn import attention, flash_attn, reference
from tests import interfaces, support
from tests.host.processes import run_quick
from tests.interfaces import EACH, FORMS, bounds, packed_as

# Torch's own, of what it uses itself.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*treespec:FutureWarning"),
]


_NEEDED = inspect.Parameter.empty
_RULES = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_LENGTHS = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), _NEEDED)
# Of flash-attn 2.8: names, order and defaults; all may be given by position and by name.
SIGNATURES = {
    "flash_attn_func": {"q": _NEEDED, "k": _NEEDED, "v": _NEEDED, **_RULES},
    "flash_attn_kvpacked_func": {"q": _NEEDED, "kv": _NEEDED, **_RULES},
    "flash_attn_qkvpacked_func": {"qkv": _NEEDED, **_RULES},
    "flash_attn_varlen_func": {"q": _NEEDED, "k": _NEEDED, "v": _NEEDED, **_LENGTHS, **_RULES, "block_table": None},
    "flash_attn_varlen_kvpacked_func": {"q": _NEEDED, "kv": _NEEDED, **_LENGTHS, **_RULES},
    "flash_attn_varlen_qkvpacked_func": {"qkv": _NEEDED, "cu_seqlens": _NEEDED, "max_seqlen": _NEEDED, **_RULES},
    "flash_attn_with_kvcache": {
        **dict.fromkeys(("q", "k_cache", "v_cache"), _NEEDED),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")),
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
    "unpad_input": {"hidden_states": _NEEDED, "attention_mask": _NEEDED, "unused_mask": None},
    "pad_input": dict.fromkeys(("hidden_states", "indices", "batch", "seqlen"), _NEEDED),
}
# By name only, what the newer interfaces add and functions here can do; the rest of theirs is in no signature.
BY_NAME = {"return_lse": False}
BY_NAME_VARLEN = {"seqused_q": None, "seqused_k": None, **BY_NAME}
BY_NAME_OF = {
    "flash_attn_varlen_func": {**BY_NAME_VARLEN, "page_table": None},
    "flash_attn_varlen_kvpacked_func": BY_NAME_VARLEN,
    "flash_attn_with_kvcache": dict.fromkeys(
        ("page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens")
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    kinds = {kind: {x.name: x.default for x in parameters if x.kind is kind} for kind in inspect._ParameterKind}
    found = kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(found.items()) == list(SIGNATURES[name].items())
    by_name = kinds[inspect.Parameter.KEYWORD_ONLY]
    assert by_name == BY_NAME_OF.get(name, BY_NAME if name.endswith("_func") else {})
    assert not kinds[inspect.Parameter.POSITIONAL_ONLY]
    assert not kinds[inspect.Parameter.VAR_POSITIONAL]


@pytest.mark.parametrize(("form", "option"), EACH)
def test_dense(form, option):
    interfaces.check_dense(form, option)


@pytest.mark.parametrize(("form", "option"), EACH)
def test_varlen(form, option):
    interfaces.check_varlen(form, option)


@pytest.mark.parametrize("form", FORMS)
def test_head_dims_that_are_no_multiple_of_8(form):
    """Of q and k, of v, or of both. The scale is that of the head dim that there was."""
    interfaces.check_dense(form, "causal", dtype=torch.bfloat16, dims=(20, 12), sizes=(20, 30))
    interfaces.check_varlen(form, "left", dtype=torch.float64, dims=(16, 20) if form == "" else (4, 4))


@pytest.mark.parametrize("form", FORMS[:2])
def test_rows_in_use(form):
    interfaces.check_varlen(form, "causal", seqused=True)


def test_padded_head_dims_are_those_of_the_kernels(monkeypatch):
    """And rows are of one piece. What comes back has the columns that there were."""
    q, k, v = support.make_qkv(1, 5, 5, 2, 2, 20, 13)
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    seen = []
    monkeypatch.setattr(flash_attn, "attention", lambda *qkv, **options: seen.extend(qkv) or attention(*qkv, **options))
    out = flash_attn.flash_attn_func(q, k, v)
    assert out.shape == (1, 5, 2, 13)
    assert [x.shape[3] for x in seen] == [24, 24, 16]
    assert all(x.stride(-1) == 1 for x in seen)
    support.assert_close(out, q, k, v)


def test_usual_tensors_are_not_copied(monkeypatch):
    """Nor are parts of packed ones."""
    seen = []
    monkeypatch.setattr(flash_attn, "attention", lambda *qkv, **options: seen.extend(qkv))
    qkv = torch.zeros(1, 5, 3, 2, 16)
    flash_attn.flash_attn_qkvpacked_func(qkv)
    flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:])
    flash_attn.flash_attn_func(*qkv.unbind(2))
    flash_attn.flash_attn_func(*qkv.transpose(1, 3).unbind(2))
    assert len(seen) == 12
    assert {x.untyped_storage().data_ptr() for x in seen} == {qkv.untyped_storage().data_ptr()}


@pytest.mark.parametrize("packs", [False, True])
def test_gradients_that_are_packed_are_not_copied(packs, monkeypatch):
    """The reference's are not, and are stacked."""
    room = torch.zeros(2, 5, 3, 2, 16)

    def gradients(*arguments):
        found = reference.gradients(*arguments)
        return tuple(part.copy_(x) for part, x in zip(room.unbind(2), found, strict=True)) if packs else found

    monkeypatch.setattr(reference, "PASSES", (reference.attention, gradients))
    qkv = torch.randn(2, 5, 3, 2, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dout = torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), qkv, dout)
    assert (found.data_ptr() == room.data_ptr()) is packs
    support.assert_gradients_close(found.unbind(2), *qkv.detach().unbind(2), dout, causal=True)


def test_packed_tensors_without_values():
    """Meta tensors, and fake ones."""

    def gradient(qkv):
        return torch.autograd.grad(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True).sum(), qkv)[0]

    assert gradient(torch.zeros(2, 5, 3, 2, 16, device="meta", requires_grad=True)).shape == (2, 5, 3, 2, 16)
    with FakeTensorMode():
        assert gradient(torch.zeros(2, 5, 3, 2, 16, requires_grad=True)).shape == (2, 5, 3, 2, 16)


def test_what_is_returned():
    q, k, v = support.make_qkv(1, 5, 6, 2, 2, 16)
    out = flash_attn.flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    for given, count in (({"return_lse": True}, 2), ({"return_attn_probs": True}, 3)):
        results = flash_attn.flash_attn_func(q, k, v, **given)
        assert len(results) == count
        assert torch.equal(results[0], out)
        assert results[1].shape == (1, 2, 5)
    assert len(flash_attn.flash_attn_func(q, k, v, return_lse=True, return_attn_probs=True)) == 3


def test_hints_are_not_read():
    """A tensor that says how long the longest sequence is may lie on a GPU: to read it would wait for that."""
    q, k, v = (x[0] for x in support.make_qkv(1, 9, 9, 2, 2, 16))
    unread = torch.zeros((), dtype=torch.int64, device="meta")
    hints = {"num_splits": 2, "pack_gqa": False, "sm_margin": unread, "scheduler_metadata": object(), "min_seqlen_k": None}
    out = flash_attn.flash_attn_varlen_func(q, k, v, bounds((4, 5)), bounds((4, 5)), unread, None, **hints)
    assert torch.equal(out, flash_attn.flash_attn_varlen_func(q, k, v, bounds((4, 5)), bounds((4, 5)), 5, 5))


def test_nothing_that_is_not_there_yet_is_asked_for():
    q, k, v = support.make_qkv(1, 5, 5, 2, 2, 16)
    none = {name: 0 if name in flash_attn._NUMBERS else None for name in flash_attn._NEWER}
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, **none), attention(q, k, v))


def test_what_is_tried_instead_of_a_sink_and_of_qv():
    """What the messages say is right."""
    q, k, v = (x.double() for x in support.make_qkv(1, 5, 9, 2, 2, 16))
    sink = torch.tensor([0.3, -1.0], dtype=torch.float64)
    out, lse = flash_attn.flash_attn_func(q, k, v, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    weights = torch.cat((scores, sink.expand(1, 5, 2).transpose(1, 2)[..., None]), -1).softmax(-1)[..., :-1]
    wanted = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(out * torch.sigmoid(lse.transpose(1, 2) - sink)[..., None], wanted)
    qv = support.make_qkv(1, 5, 9, 2, 2, 16, seed=3)[0].double()
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) + torch.einsum("bqhd,bkhd->bhqk", qv, v)) / 4
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    found = flash_attn.flash_attn_func(torch.cat((q, qv), -1), torch.cat((k, v), -1), v, softmax_scale=0.25)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("given", [None, 30, "tensor"])
def test_cache(given):
    q, k, v = support.make_qkv(2, 3, 40, 4, 2, 16, 24)
    lengths = {None: [40, 40], 30: [30, 30], "tensor": [7, 33]}[given]
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32) if given == "tensor" else given
    options = {"causal": True, "softcap": 5.0, "window_size": (20, 0), "softmax_scale": 0.2, "num_splits": 4}
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, return_softmax_lse=True, **options)
    alone = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=cache_seqlens, rotary_interleaved=False, **options)
    assert torch.equal(alone, out)
    for i, n in enumerate(lengths):
        one = [x[i : i + 1] for x in (q, k[:, :n], v[:, :n])]
        support.assert_close((out[i : i + 1], lse[i : i + 1]), *one, window=(20, 0), softcap=5.0, scale=0.2)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("where", ["pages", "elements"])
def test_new_rows_of_a_cache(where, interleaved):
    interfaces.check_cache(where, interleaved)


def test_pages_of_packed_sequences():
    """As engines that serve call ``flash_attn_varlen_func``: some with a prompt, some with a token each."""
    sizes_q, sizes_k = (1, 6, 1), (9, 6, 4)
    q, k, v = support.make_qkv(1, 8, 19, 4, 2, 16, 24)
    q, table = q[0], torch.tensor([[4, 2, 0], [1, 5, -1], [3, -1, -1]], dtype=torch.int32)
    k_pages, v_pages = (torch.full((6, 4, *x.shape[2:]), torch.nan) for x in (k, v))
    for pages, keys, n in zip(table.tolist(), interfaces.spans(sizes_k), sizes_k, strict=True):
        for t in range(n):
            for cache, x in ((k_pages, k), (v_pages, v)):
                cache[pages[t // 4], t % 4] = x[0, keys.start + t]
    lengths = bounds(sizes_q), bounds(sizes_k), 6, 9
    options = {"causal": True, "softcap": 3.0, "return_attn_probs": True}
    out, lse, dropped = flash_attn.flash_attn_varlen_func(q, k_pages, v_pages, *lengths, **options, block_table=table)
    assert dropped.numel() == 0
    used = torch.tensor(sizes_k, dtype=torch.int32)
    for nowhere in (bounds((12, 12, 12)), None):  # None is what FlashAttention-4 asks for
        again = flash_attn.flash_attn_varlen_func(
            q, k_pages, v_pages, lengths[0], nowhere, 6, 9, causal=True, softcap=3.0, page_table=table, seqused_k=used
        )
        assert torch.equal(again, out)
    for rows, keys in zip(interfaces.spans(sizes_q), interfaces.spans(sizes_k), strict=True):
        one = q[None, rows], k[:, keys], v[:, keys]
        support.assert_close((out[None, rows], lse[None, :, rows]), *one, causal=True, softcap=3.0)


def test_a_cache_for_more_sequences():
    """As engines keep one for their largest batch: the first elements are the batch's, and the others stay as they are."""
    q, k, v = support.make_qkv(2, 3, 8, 4, 2, 16)
    caches = [torch.cat((x, torch.full_like(x, torch.nan))) for x in (k, v)]
    new = [x[:, 5:].clone() for x in (k, v)]
    for cache in caches:
        cache[:2, 5:] = torch.nan
    found = flash_attn.flash_attn_with_kvcache(q, *caches, *new, cache_seqlens=5, causal=True, return_softmax_lse=True)
    support.assert_close(found, q, k, v, causal=True)
    for cache, x in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[:2], x)
        assert cache[2:].isnan().all()


def test_names_of_flash_attention_3():
    """Packed queries of a cache, new rows of theirs, and positions that are counted from elsewhere."""
    q, k, v = (x[0] for x in support.make_qkv(1, 5, 5, 4, 2, 16))
    caches = [[torch.zeros(2, 8, 2, 16) for _ in range(2)] for _ in range(2)]
    angles = torch.rand(30, 8, generator=torch.Generator().manual_seed(3))
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "causal": True}
    begins = torch.tensor([9, 20], dtype=torch.int32)
    packed = flash_attn.flash_attn_with_kvcache(
        q, *caches[0], k, v, cache_seqlens=2, cu_seqlens_q=bounds((2, 3)), cu_seqlens_k_new=bounds((2, 3)), max_seqlen_q=3,
        rotary_seqlens=begins, **options
    )  # fmt: skip
    for i, rows in enumerate(interfaces.spans((2, 3))):
        one = [x[i : i + 1] for x in caches[1]]
        out = flash_attn.flash_attn_with_kvcache(
            q[None, rows], *one, k[None, rows], v[None, rows], cache_seqlens=2, rotary_seqlens=begins[i : i + 1], **options
        )
        torch.testing.assert_close(packed[None, rows], out)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    assert caches[0][0][:, 2:4].count_nonzero()


@pytest.mark.parametrize("form", FORMS)
def test_one_graph(form):
    torch._dynamo.reset()
    q, k, v = support.make_qkv(2, 12, 12, 2, 2, 20)

    def functions(*tensors):
        dense, varlen = (getattr(flash_attn, f"flash_attn_{kind}{form}func") for kind in ("", "varlen_"))
        rows = [x.flatten(0, 1) for x in tensors]
        lengths = (bounds((12, 12)), 12) if form == "qkvpacked_" else (bounds((12, 12)), bounds((12, 12)), 12, 12)
        results = dense(*tensors, causal=True, window_size=(5, -1), return_attn_probs=True)
        return *results[:2], varlen(*rows, *lengths, softcap=3.0)

    results = []
    for function in (functions, torch.compile(functions, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in packed_as(form, q, k, v)]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], leaves)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


# ---- padding ---------------------------------------------------------------------------------------------------------


MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
UNUSED = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("unused", [False, True])
def test_padding(dtype, unused):
    x = torch.arange(24.0).view(3, 4, 2).requires_grad_()
    kept = (MASK | UNUSED if unused else MASK).bool()
    masks = [MASK.to(dtype), *([UNUSED.to(dtype)] if unused else [])]
    rows, indices, cu_seqlens, longest, used = flash_attn.unpad_input(x, *masks)
    assert torch.equal(rows, x[kept])
    assert torch.equal(indices, kept.flatten().nonzero().flatten())
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 4, 5, 6] if unused else [0, 3, 3, 4], torch.int32)
    assert (longest, type(longest)) == (4 if unused else 3, int)
    assert (used.tolist(), used.dtype) == ([3, 0, 1], torch.int32)
    again = flash_attn.pad_input(rows, indices, 3, 4)
    assert torch.equal(again, x * kept[..., None])
    (gradient,) = torch.autograd.grad(again, x, torch.ones_like(x) * 3)
    assert torch.equal(gradient, 3.0 * kept[..., None].expand_as(x))


def test_padding_of_nothing():
    rows, indices, cu_seqlens, longest, used = flash_attn.unpad_input(torch.zeros(0, 4, 2), torch.zeros(0, 4))
    assert (rows.shape, indices.shape, cu_seqlens.tolist(), longest, used.shape) == ((0, 2), (0,), [0], 0, (0,))
    assert flash_attn.pad_input(rows, indices, 0, 4).shape == (0, 4, 2)


def test_index_first_axis():
    x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    indices = torch.tensor([4, 1, 4])
    rows = flash_attn.index_first_axis(x, indices)
    assert torch.equal(rows, x[indices])
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert gradient[:, 0, 0].tolist() == [0, 1, 0, 0, 2, 0]


# ---- import flash_attn -----------------------------------------------------------------------------------------------

# A library that uses flash-attn if it is there, as many do.
LIBRARY = """
import importlib.util
from importlib.metadata import version
import torch
from torch import nn

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
if HAS_FLASH:
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func
    MODERN = tuple(map(int, version("flash_attn").split(".")[:2])) >= (2, 6) and flash_attn.__version__ >= "2.6"

class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, key_padding_mask=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if key_padding_mask is None:
            y = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, causal=True)
        else:
            batch, seqlen = key_padding_mask.shape
            rows, indices, cu_seqlens, max_seqlen, *rest = unpad_input(qkv, key_padding_mask)
            q, k, v = rows.unbind(1)
            y = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal=True)
            y = pad_input(y, indices, batch, seqlen)
        return self.out(y.flatten(-2))
"""
USES_IT = """
import sys
import torch
import cute_attn
cute_attn.flash_attn.install()
cute_attn.flash_attn.install()
import library
assert library.HAS_FLASH and library.MODERN
from importlib.metadata import distribution, packages_distributions
import flash_attn, flash_attn.bert_padding
assert flash_attn.flash_attn_interface.flash_attn_func is flash_attn.flash_attn_func is cute_attn.flash_attn.flash_attn_func
assert packages_distributions()["flash_attn"] == ["flash-attn"] and distribution("flash-attn").files is None
try:
    import flash_attn.layers.rotary
except ModuleNotFoundError as error:
    print(error)
try:
    from flash_attn import flash_attn_of_no_kind
except ImportError as error:
    assert "'flash_attn' (" + cute_attn.flash_attn.__file__ in str(error)
torch.manual_seed(0)
layer, x = library.SelfAttention(64, 4), torch.randn(2, 10, 64, requires_grad=True)
mask = torch.ones(2, 10, dtype=torch.bool)
mask[1, 7:] = False
whole, padded = layer(x), layer(x, mask)
torch.testing.assert_close(whole[:, :7], padded[:, :7])
whole.sum().backward()
assert x.grad.abs().sum() > 0
cute_attn.flash_attn.uninstall()
assert library.importlib.util.find_spec("flash_attn") is None
assert not [name for name in sys.modules if name.startswith("flash_attn")]
print(torch.equal(layer(x), whole))
"""


def test_a_library_that_knows_nothing_of_us(tmp_path):
    (tmp_path / "library.py").write_text(LIBRARY)
    ran = run_quick(USES_IT, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "No module named 'flash_attn.layers'\nTrue\n"


TRANSFORMERS = """
import torch
import cute_attn
cute_attn.flash_attn.install()
from transformers.utils import import_utils
import_utils.is_torch_cuda_available = lambda: True  # it takes no flash-attn on the CPU
assert import_utils.is_flash_attn_2_available()
assert import_utils.is_flash_attn_greater_or_equal("2.3.3")
from transformers.modeling_flash_attention_utils import _flash_attention_forward as forward
from cute_attn import attention

torch.manual_seed(0)
q, k, v = torch.randn(2, 12, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
given = {"query_length": 12, "is_causal": True, "attn_implementation": "flash_attention_2"}
out = forward(q, k, v, None, **given, sliding_window=5, softcap=3.0, softmax_scale=0.2, deterministic=True)
torch.testing.assert_close(out, attention(q, k, v, window=(4, 0), softcap=3.0, scale=0.2))
mask = torch.ones(2, 12, dtype=torch.int64)
mask[1, :5] = 0  # padded on the left
out = forward(q, k, v, mask, **given)
torch.testing.assert_close(out[0], attention(q, k, v, causal=True)[0])
torch.testing.assert_close(out[1:, 5:], attention(q[1:, 5:], k[1:, 5:], v[1:, 5:], causal=True))
assert not out[1, :5].count_nonzero()
last = forward(q[:, -1:], k, v, mask, **{**given, "query_length": 1})
torch.testing.assert_close(last[1:], out[1:, -1:])
positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
out = forward(q[:1], k[:1], v[:1], None, position_ids=positions, **given)
torch.testing.assert_close(out[:, 5:], attention(q[:1, 5:], k[:1, 5:], v[:1, 5:], causal=True))
print("ran")
"""


def test_transformers_own_code():
    pytest.importorskip("transformers")
    ran = run_quick(TRANSFORMERS)
    assert (ran.returncode, ran.stdout) == (0, "ran\n"), ran.stderr


def test_a_flash_attn_that_has_been_imported(monkeypatch):
    real = ModuleType("flash_attn")
    real.__version__, real.__file__ = "2.7.1", "/site-packages/flash_attn/__init__.py"
    monkeypatch.setitem(sys.modules, "flash_attn", real)
    said = r"flash_attn 2\.7\.1 from /site-packages/.* has been imported.* a process without it is needed: call .*install\(\)"
    with pytest.raises(RuntimeError, match=said):
        flash_attn.install()
    flash_attn.uninstall()  # leaves it alone
    assert sys.modules["flash_attn"] is real
    assert flash_attn._FINDER not in sys.meta_path


def test_the_example_of_the_readme(capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in text.split("```python\n")[1:] if "flash_attn_func" in block.partition("```")[0])
    q, k, v = support.make_qkv(1, 9, 9, 2, 2, 16)
    names = {"torch": torch, "q": q, "k": k, "v": v}
    exec(example.partition("```")[0], names)
    assert "query lies on cpu" in capsys.readouterr().out
    torch.testing.assert_close(names["out"].transpose(1, 2), attention(q, k, v, causal=True))
