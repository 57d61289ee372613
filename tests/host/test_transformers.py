"""Models of Transformers with cute_attn: beside eager attention, in every way in which a model asks for attention."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from cute_attn import transformers as integration
from cute_attn.transformers import Beyond, register
from tests import models, support
from tests.host.processes import run_quick

pytest.importorskip("transformers")

from transformers import AttentionInterface, masking_utils

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("error:the model asks for"),  # where nothing should be handed on
]
OURS, FLOAT64 = integration.IMPLEMENTATION, torch.float64


@pytest.fixture(autouse=True)
def registered():
    """Without a fallback, as a process begins; on one thread, as models this small would wait for each other's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    integration._warned.clear()
    register()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fallback():
    register(fallback="sdpa")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of attention's functions as they are called."""
    names: list[str] = []
    for name in ("attention", "attention_varlen", "attention_kvcache"):
        function = getattr(integration, name)
        monkeypatch.setattr(integration, name, lambda *a, f=function, **k: names.append(f.__name__) or f(*a, **k))
    return names


def assert_case(case: str, model=None, run=None):
    """By the policy of all tests: beside float64, with the error of eager attention in float32 as the measure."""
    name, ask = models.CASES[case]
    got = models.answer(models.built(name, OURS) if model is None else model, ask(), run)
    models.assert_follows(got, *models.expected(case), times=support.TIMES_PLAIN[torch.float32])


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", models.CASES)
def test_logits_and_gradients(case):
    assert_case(case)


def test_every_layer_calls_attention(calls):
    """In whichever way: none falls back silently."""
    for name, count in (("llama", 2), ("gemma3", 2), ("bert", 2), ("vit", 2), ("whisper", 1 + 2 * 2)):
        asked = next(ask for case, (model, ask) in models.CASES.items() if model == name)()
        models.built(name, OURS)(**asked.inputs)
        assert len(calls) == count, name
        calls.clear()


def test_a_model_that_there_is_already():
    model = models.built("gemma2", "eager")
    model.set_attn_implementation(OURS)
    register()  # once more
    assert_case("gemma2", model)


def test_a_copied_a_saved_and_a_loaded_model(tmp_path):
    """A copy keeps its attention. A configuration on disk holds none, of any implementation: it is said again."""
    import transformers

    model = models.built("llama", OURS)
    assert_case("llama, left padding", copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    assert OURS not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=OURS)
    assert loaded.config._attn_implementation == OURS
    assert_case("llama, left padding", loaded)


def test_gradient_checkpointing():
    model = models.built("mistral", OURS).train()
    model.gradient_checkpointing_enable()
    assert_case("mistral, both sides padded", model)


# ---- generation ------------------------------------------------------------------------------------------------------


def tokens(model, used=None, **how):
    """What a model generates after the symbols in use: in float64, so that the same draws choose the same symbols."""
    ids = models.symbols()
    used = torch.ones_like(ids) if used is None else used
    torch.manual_seed(0)
    with models.exact(), torch.no_grad():
        how |= {"max_new_tokens": 14, "do_sample": True, "temperature": 3.0, "pad_token_id": 0}
        return model.generate(ids, attention_mask=used, **how)


GENERATE = [(name, padding) for name in ("llama", "mistral", "gemma2", "gemma3") for padding in ("none", "left")]


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("name", "padding"), [*GENERATE, ("llama", "between")])
def test_generates_what_eager_does(name, padding, cache):
    """Past the window: the sliding layers' caches drop keys. ``between``: as prompts before left padding have it."""
    used = None if padding == "none" else models.padded("left").inputs["attention_mask"]
    if padding == "between":
        used[:, 0] = 1
    how = {} if cache is None else {"cache_implementation": cache}
    expected = tokens(models.built(name, "eager", FLOAT64), used, **how)
    assert len(expected[0, models.LENGTH :].unique()) > 4  # not one symbol over and over
    assert torch.equal(tokens(models.built(name, OURS, FLOAT64), used, **how), expected)


def test_a_bias_beside_a_static_cache():
    """T5's decoder: the cache has counted on when a layer reads the mask."""
    how = {"cache_implementation": "static", "decoder_start_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    found, expected = (tokens(models.built("t5", kind, FLOAT64), **how).logits for kind in (OURS, "eager"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("padding", "cache"), [("none", None), ("left", None), ("left", "static"), ("between", "static")])
def test_steps_read_keys_where_they_are(padding, cache, calls):
    """A token at a time is attention to a cache, of which nothing is moved, but where padding is between the keys."""
    used = None if padding == "none" else models.padded("left").inputs["attention_mask"]
    if padding == "between":
        used[:, 0] = 1
    tokens(models.built("llama", OURS), used, **({} if cache is None else {"cache_implementation": cache}))
    layers, steps = 2, 14
    assert len(calls) == layers * steps
    assert calls.count("attention_kvcache") == (0 if padding == "between" else layers * (steps - 1))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_several_queries_of_a_cache(name, calls):
    """As speculative decoding asks: each sees the keys before its own; sequences begin after padding."""
    from transformers import DynamicCache, StaticCache

    asked, first, steps = models.padded("left"), 18, 3
    ids, used = asked.inputs["input_ids"], asked.inputs["attention_mask"]
    positions = (used.cumsum(1) - 1).clamp(min=0)

    def logits(kind: str, made):
        model, parts = models.built(name, kind, FLOAT64), []
        cache = made(model.config)
        for begin, end in zip([0, *range(first, models.LENGTH, steps)], range(first, models.LENGTH + 1, steps), strict=True):
            where = {"attention_mask": used[:, :end], "position_ids": positions[:, begin:end]}
            parts.append(model(ids[:, begin:end], past_key_values=cache, **where).logits[:, -steps:])
        return torch.cat(parts, 1)

    with models.exact(), torch.no_grad():
        for made in (lambda config: DynamicCache(config=config), lambda config: StaticCache(config, max_cache_len=40)):
            torch.testing.assert_close(logits(OURS, made), logits("eager", made))
            assert calls.count("attention_kvcache") == 2 * 2
            calls.clear()


def test_whisper_generates_what_eager_does():
    features = models.speech().inputs["input_features"].double()
    how = {"max_new_tokens": 10, "do_sample": False}
    with torch.no_grad():
        eager, ours = (models.built("whisper", kind, FLOAT64).generate(features, **how) for kind in ("eager", OURS))
    assert torch.equal(ours, eager)


# ---- continuous batching ---------------------------------------------------------------------------------------------

needs_pages = pytest.mark.skipif(not models.serves(), reason="Transformers' continuous batching, of 5.24 on, is not there")


def one_by_one(model, new: int = 12) -> list[list[int]]:
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    asked = [torch.tensor([prompt]) for prompt in models.PROMPTS]
    return [model.generate(x, attention_mask=torch.ones_like(x), **how)[0, x.shape[1] :].tolist() for x in asked]


@needs_pages
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_continuous_batching_generates_what_eager_does(name, calls):
    """Of full and sliding layers, softcaps, sinks; prompts in parts, beside sequences that get a token each."""
    with models.exact(), torch.no_grad():
        expected = one_by_one(models.built(name, "eager", FLOAT64))
        assert models.served(models.built(name, OURS, FLOAT64)) == expected
    assert len({tuple(x) for x in expected}) == len(models.PROMPTS)
    assert ("attention_kvcache" in calls) is (name == "llama")  # Transformers' sliding layers have no tables of pages


@needs_pages
def test_steps_of_continuous_batching_write_to_the_pages(calls):
    """Without the path for these, Transformers copies all keys of a step; to ask for other pages changes no token."""
    model = models.built("llama", OURS, FLOAT64)
    tables = models.served(model)
    steps = calls.count("attention_kvcache")
    assert steps >= 2 * 8
    calls.clear()
    assert models.served(model, max_blocks_per_request=0) == tables
    assert "attention_kvcache" not in calls


@needs_pages
def test_steps_of_continuous_batching_are_filled_up(calls, monkeypatch):
    """As they are for graphs, of torch.compile or of CUDA: with sequences that there are not. Here nothing is compiled."""
    from transformers import CompileConfig

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = models.built("llama", OURS, FLOAT64)
    expected = models.served(model)
    calls.clear()
    filled = {"varlen_compile_config": CompileConfig(), "decode_compile_config": CompileConfig()}
    how = {**filled, "max_requests_per_batch": 4, "use_cuda_graph": False}
    assert models.served(model, **how) == expected
    assert "attention_kvcache" in calls


@needs_pages
def test_what_is_greedy_enough():
    """The measure of what the GPU serves finds a wrong token, and no fault with those of another dtype."""
    model = models.built("llama", OURS, torch.bfloat16)
    prompt, found = models.PROMPTS[1], models.served(model)[1]
    models.assert_greedy(model, prompt, found, times=4)
    with pytest.raises(AssertionError, match="is missing to the best logit"):
        models.assert_greedy(model, prompt, [*found[:5], (found[5] + 1) % models.SYMBOLS, *found[6:]], times=4)


@pytest.mark.parametrize("compiled", [False, True])
def test_sequences_that_there_are_not(compiled):
    """Transformers fills a step up with sequences without queries, keys and pages: no row of theirs is written or read. A graph
    of the model ends before a step, and begins anew after it."""
    attend, counter = integration.attend, CompileCounterWithBackend("eager")
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, backend=counter)
    q, k, v = (x.transpose(1, 2) for x in support.make_qkv(1, 4, 4, 4, 2, 8))
    k_cache, v_cache = (torch.full((5, 2, 2, 8), math.nan) for _ in range(2))
    table = torch.tensor([[3, -1], [1, 4], [-1, -1], [-1, -1]], dtype=torch.int32)
    past = support.make_qkv(1, 2, 2, 4, 2, 8, seed=1)[1:]
    for cache, x in zip((k_cache, v_cache), past, strict=True):
        cache[1] = x[0]
    before = k_cache.clone()
    bounds_q, bounds_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 2, 2], [0, 1, 4, 4, 4]))
    step = {"block_table": table, "k_cache": k_cache, "v_cache": v_cache, "cu_seq_lens_q": bounds_q, "cu_seq_lens_k": bounds_k}
    with pytest.raises(ValueError, match="block_table is given without cu_seq_lens_q and cu_seq_lens_k; both are needed"):
        integration.attend(SimpleNamespace(), q, k, v, None, is_causal=True, **(step | {"cu_seq_lens_k": None}))
    out, weights = attend(SimpleNamespace(), q, k, v, None, is_causal=True, **step)
    assert (out.shape, weights, counter.frame_count) == ((1, 4, 4, 8), None, 2 if compiled else 0)
    assert not out[:, 2:].count_nonzero()
    assert torch.equal(k_cache[3, 0], k[0, :, 0])
    assert torch.equal(k_cache[4, 0], k[0, :, 1])
    changed = (k_cache.nan_to_num() != before.nan_to_num()).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[3, 0], [4, 0]]
    for row, keys in ((0, k[:, :, :1]), (1, torch.cat((past[0].transpose(1, 2), k[:, :, 1:2]), 2))):
        values = v[:, :, :1] if row == 0 else torch.cat((past[1].transpose(1, 2), v[:, :, 1:2]), 2)
        one = (x.transpose(1, 2) for x in (q[:, :, row : row + 1], keys, values))
        support.assert_close(out[:, row : row + 1], *one)


# ---- graphs ----------------------------------------------------------------------------------------------------------

COMPILED = ["llama", "llama, padding inside", "llama, packed", "llama, packed, lengths given", "mistral, both sides padded"]


RULED = ["llama, a mask that is added", "llama4", "t5, padding inside"]  # masks, biases


@pytest.mark.parametrize("case", [*COMPILED, "bert, right padding", *RULED])
def test_compiled(case):
    """In one graph, forward and backward, though no value can be read while it is made."""
    torch._dynamo.reset()
    name, _ = models.CASES[case]
    model = models.built(name, OURS, use_cache=False)
    assert_case(case, model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_compiled_generation():
    """A static cache: one graph for the prompt, and one for all steps after it."""
    torch._dynamo.reset()
    used = models.padded("left").inputs["attention_mask"]
    expected = tokens(models.built("llama", "eager", FLOAT64), used, cache_implementation="static")
    model, counter = models.built("llama", OURS, FLOAT64), CompileCounterWithBackend("eager")
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True, dynamic=False)
    assert torch.equal(tokens(model, used, cache_implementation="static"), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize("why", ["short", "between"])
def test_what_a_graph_can_not_read_is_checked_when_it_runs(why):
    """Sequences that are more than there is room for, and padding between keys under a window."""
    torch._dynamo.reset()
    model = models.built("mistral", OURS, use_cache=False)
    asked = models.padded("inside")
    inputs = {"position_ids": torch.zeros(2, models.LENGTH, dtype=torch.long)} if why == "short" else dict(asked.inputs)
    assert len(integration.UNREAD) < 255  # else CUDA's check refuses the words, whether it holds or not
    with pytest.raises(RuntimeError, match="fewer than 16 rows on average: run without a graph"):
        torch.compile(model, backend="eager", fullgraph=True)(**{**inputs, "input_ids": asked.inputs["input_ids"]})


# ---- what there is not -----------------------------------------------------------------------------------------------


# Where attention understands no function: the model, what it is asked, and what the error and the warning say of it.
HANDED_ON = {
    "chunks": ("llama4", lambda: models.plain().inputs, "a mask that is not a band of keys around each query"),
    "padding": ("mistral", lambda: models.padded("inside").inputs, "padding between the keys of a sequence under a window"),
}
handed_on = pytest.mark.parametrize("what", HANDED_ON)


def answers(what: str, implementation: str) -> torch.Tensor:
    name, ask, _ = HANDED_ON[what]
    model = models.built(name, implementation)
    with patch.object(integration, "_is_traced", lambda *_: False):
        return model(**ask()).logits


@handed_on
def test_refused(what):
    with pytest.raises(Beyond) as caught:
        answers(what, OURS)
    said = str(caught.value)
    assert f"the model asks for {HANDED_ON[what][2]}; " in said
    assert "is needed" in said
    assert "try attn_implementation='sdpa', or register(fallback='sdpa')" in said


@handed_on
@pytest.mark.filterwarnings("default:the model asks for")
def test_handed_on(what, fallback):
    """The same bits as with torch's attention; of which a warning tells, once."""
    with pytest.warns(RuntimeWarning, match="'sdpa' computes it instead") as caught:
        got = [answers(what, OURS) for _ in range(2)]
    said = [str(warning.message) for warning in caught if "computes it instead" in str(warning.message)]
    assert said == [f"the model asks for {HANDED_ON[what][2]}: 'sdpa' computes it instead"]
    expected = answers(what, "sdpa")
    counts = models.padded("inside").counts if what == "padding" else slice(None)
    for x in got:
        assert torch.equal(x[counts], expected[counts])


def test_with_a_fallback_the_rest_is_computed(fallback):
    """A layer whose mask is a band hands it on in the fallback's form only where it must."""
    assert_case("llama, left padding")
    assert_case("gemma2")


INTS = torch.zeros(1, 1, 3, 3).int()
NEVER = {
    "weights": (None, {"output_attentions": True}, "attention weights, which are never in memory"),
    "keys": (None, {"indices": torch.zeros(1)}, "keys that are chosen for each query (indices)"),
    "blocks": (None, {"block_indices": torch.zeros(1)}, "blocks of keys that are chosen for each query (block_indices)"),
    "a mask beside sinks": (INTS, {"s_aux": torch.zeros(4)}, "a mask of its own, a Tensor of shape (1, 1, 3, 3)"),
    "a mask under a softcap": (INTS, {"softcap": 3.0}, "a mask of its own, a Tensor of shape (1, 1, 3, 3)"),
}


@pytest.mark.parametrize("what", NEVER)
def test_torch_would_ignore_it(what, fallback):
    """Nothing is handed on that would be lost there."""
    seen, asked, words = NEVER[what]
    model = models.built("llama", OURS)
    layer, x = model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8)
    attend = AttentionInterface()[OURS]
    with pytest.raises(Beyond) as caught:
        attend(layer, x, x, x, seen, **asked)
    assert f"the model asks for {words}; " in str(caught.value)
    assert "try attn_implementation='eager'" in str(caught.value)


def test_lengths_that_torch_would_not_know(fallback):
    """Of packed sequences that only ``cu_seq_lens`` tells apart."""
    x = torch.zeros(1, 4, 3, 8)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)
    layer = models.built("llama", OURS).model.layers[0].self_attn
    bias = torch.zeros(1)
    with pytest.raises(ValueError, match=r"beside cu_seq_lens_q, which 'sdpa' computes without lengths; position_ids"):
        AttentionInterface()[OURS](layer, x, x, x, None, position_bias=bias, cu_seq_lens_q=cu_seqlens)


def test_a_mask_of_bools():
    """Which eager attention adds to the scores; torch's takes it for what it is."""
    asked = models.own_mask().inputs
    ours, torchs = (models.built("llama", kind, FLOAT64)(**asked).logits for kind in (OURS, "sdpa"))
    torch.testing.assert_close(ours, torchs)


def test_dropout_in_training():
    """Drawn anew in each step, from torch's generator; none in evaluation."""
    asked = models.padded("left").inputs
    model = models.built("phi3", OURS, attention_dropout=0.5)
    expected = models.built("phi3", OURS)(**asked).logits
    assert torch.equal(model(**asked).logits, expected)
    model.train()
    torch.manual_seed(0)
    first, second = model(**asked).logits, model(**asked).logits
    torch.manual_seed(0)
    assert torch.equal(model(**asked).logits, first)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean():
    """Within 5 σ of 400 draws, of a layer."""
    q, k, v = (x.transpose(1, 2) for x in support.make_qkv(1, 9, 9, 2, 2, 8))
    draws = torch.stack([integration.attend(SimpleNamespace(), q, k, v, None, dropout=0.3)[0] for _ in range(400)])
    true, _ = integration.attend(SimpleNamespace(), q, k, v, None)
    assert ((draws.mean(0) - true).abs() <= 5 * draws.std(0) / 20 + 1e-6).all()


# ---- mask functions --------------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6, 0]])
SEEN = {
    "causal": (masking_utils.causal_mask_function, (None, 0)),
    "full": (masking_utils.bidirectional_mask_function, (None, None)),
    "window": (masking_utils.sliding_window_causal_mask_function(4), (3, 0)),
    "window of one": (masking_utils.sliding_window_causal_mask_function(1), (0, 0)),
    "both sides": (masking_utils.sliding_window_bidirectional_mask_function(2), (2, 2)),
    "nested": (
        masking_utils.and_masks(
            masking_utils.causal_mask_function, masking_utils.sliding_window_bidirectional_mask_function(3)
        ),
        (3, 0),
    ),
    "one's own": (lambda batch, head, query, key: (key >= query - 2) & (query >= key - 1), (2, 1)),
    "one's own, open": (lambda batch, head, query, key: query - 3 < key, (2, None)),
}


def is_seen(function) -> torch.Tensor:
    """The mask that Transformers makes of a function."""
    return masking_utils.sdpa_mask(2, 9, 9, mask_function=function, allow_is_causal_skip=False, use_vmap=False)[:, 0]


@pytest.mark.parametrize(
    ("what", "is_packed"), [*((what, False) for what in SEEN), *((what, True) for what in ("causal", "window", "one's own"))]
)
def test_what_a_mask_function_says(what, is_packed):
    """Read exactly: the band, drawn, is the mask that Transformers makes of it."""
    function, window = SEEN[what]
    if is_packed:
        function = masking_utils.and_masks(
            masking_utils.remap_positions_for_packed_sequence(function, POSITIONS),
            masking_utils.packed_sequence_mask_function(IDS),
        )
    seen = integration._seen_by(function)
    assert (seen.left, seen.right) == window
    assert (seen.ids is IDS) is is_packed
    row, column = torch.arange(9)[:, None], torch.arange(9)
    left, right = (9 if side is None else side for side in window)
    drawn = (column >= row - left) & (column <= row + right)
    drawn = drawn & (IDS[:, :, None] == IDS[:, None, :]) if is_packed else drawn.expand(2, 9, 9)
    assert torch.equal(drawn, is_seen(function))


BLOCKS, PADDING = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1]]).expand(2, -1), torch.zeros(2, dtype=torch.long)
UNSEEN = {
    "or": masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function),
    "chunks": masking_utils.chunked_causal_mask_function(4, PADDING),
    "blocks": masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(BLOCKS)),
    "padding": masking_utils.padding_mask_function(IDS > 0),
    "positions alone": masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, POSITIONS),
    "not one's own key": lambda batch, head, query, key: key < query,
    "a window ahead": lambda batch, head, query, key: key > query,
    "a distance with a sign": lambda batch, head, query, key: query - key <= 3,
    "a key alone": lambda batch, head, query, key: key >= 2,
    "keys compared with keys": lambda batch, head, query, key: key <= key,
    "a branch": lambda batch, head, query, key: (key <= query) and (key >= query - 3),
    "equal positions": lambda batch, head, query, key: key == query,
    "heads": lambda batch, head, query, key: head <= query,
    "torch's functions": lambda batch, head, query, key: torch.logical_and(IDS[batch, key] > 0, IDS[batch, key] < 2),
    "an element elsewhere": lambda batch, head, query, key: IDS[batch, query - 1] == IDS[batch, key],
    "another element of the batch": lambda batch, head, query, key: IDS[batch - 1, query] == IDS[batch - 1, key],
    "a row": lambda batch, head, query, key: IDS[0, query] == IDS[0, key],
    "an element of an element": lambda batch, head, query, key: IDS[batch, POSITIONS[batch, query]] == IDS[batch, key],
    "a shift that differs": lambda batch, head, query, key: key <= query - PADDING[batch],
    "two numbers of sequences": lambda batch, head, query, key: (IDS[batch, query] == IDS[batch, key])
    & (POSITIONS[batch, query] == POSITIONS[batch, key]),
    "no mask": lambda batch, head, query, key: True,
}


@pytest.mark.parametrize("what", UNSEEN)
def test_a_mask_function_that_says_more(what):
    """Is never taken for what it isn't."""
    with pytest.raises(Beyond, match="not a band"):
        integration._seen_by(UNSEEN[what])


# ---- masks -----------------------------------------------------------------------------------------------------------


@st.composite
def situations(draw):
    """``(kind, queries, keys, keys before the queries, padding, whether that number is on the device)``: queries that stand by
    themselves, or continue a cache, static or not."""
    kind = draw(st.sampled_from(["causal", "full", "window", "both sides"]))
    length, before = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    keys = length + before + draw(st.integers(0, 4)) if kind in ("causal", "window") else length
    before = before if kind in ("causal", "window") else 0
    used = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=2, max_size=2)))
    return kind, length, keys, before, used if draw(st.booleans()) else None, draw(st.booleans())


@given(situations(), st.booleans())
@settings(max_examples=200, derandomize=True)
def test_any_padding(situation, is_unread):
    """Beside softmax under the mask that Transformers makes, for the queries that are no padding; whatever can be read."""
    kind, length, keys, before, used, on_device = situation
    function, window = SEEN[kind]
    offset = torch.tensor(before) if on_device else before
    asked = {"mask_function": function, "attention_mask": used}
    visible = masking_utils.sdpa_mask(2, length, keys, before, allow_is_causal_skip=False, **asked)
    q, k, v = (x.transpose(1, 2) for x in support.make_qkv(2, length, keys, 2, 1, 8, dtype=FLOAT64))
    drawn = [] if used is None else ["".join("01"[x] for x in row) for row in used[:, : before + length].tolist()]
    between = any("0" in row.strip("0") for row in drawn)
    refused = is_unread and window[0] is not None and between and not (kind == "both sides" and on_device)
    outcome = pytest.raises(RuntimeError) if refused else nullcontext()
    with patch.object(integration, "_is_unread", lambda _: is_unread), outcome:
        out, _ = integration.attend(SimpleNamespace(), q, k, v, integration.mask(2, length, keys, offset, **asked))
    if refused:
        return
    counts = torch.ones(2, length, dtype=torch.bool)
    if used is not None and kind != "full":
        counts = used[:, before : before + length]
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~visible, -math.inf)
    expected = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0.0) @ v
    torch.testing.assert_close(out[counts], expected.transpose(1, 2)[counts])


@pytest.mark.parametrize("is_unread", [False, True])
@pytest.mark.parametrize("numbers", [POSITIONS, POSITIONS + 7, POSITIONS // 2, IDS, -POSITIONS])
def test_numbers_in_packed_sequences_that_are_no_positions(numbers, is_unread, monkeypatch):
    """Blocks, of which a query sees its own and those before it: the mask itself, or where nobody can read them, an error."""
    monkeypatch.setattr(integration, "SHORTEST", 1)
    monkeypatch.setattr(integration, "_is_unread", lambda _: is_unread)
    function = masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, numbers),
        masking_utils.packed_sequence_mask_function(IDS),
    )
    q, k, v = (x.transpose(1, 2) for x in support.make_qkv(2, 9, 9, 2, 1, 8, dtype=FLOAT64))
    refused = is_unread and not torch.equal(numbers.diff(), POSITIONS.diff())
    with pytest.raises(RuntimeError, match="aren't numbered by positions") if refused else nullcontext():
        out, _ = integration.attend(SimpleNamespace(), q, k, v, integration.mask(2, 9, 9, mask_function=function))
    if not refused:
        expected = (q @ k.mT / math.sqrt(8)).masked_fill(~is_seen(function)[:, None], -math.inf).softmax(-1) @ v
        torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(("length", "keys"), [(7, 7), (4, 9), (9, 9)])
def test_numbers_of_more_rows_than_a_call_has(length, keys):
    """A table for longer sequences, and of the keys in a cache."""
    function = masking_utils.and_masks(masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(IDS))
    visible = masking_utils.sdpa_mask(2, length, keys, keys - length, mask_function=function, allow_is_causal_skip=False)
    q, k, v = (x.transpose(1, 2) for x in support.make_qkv(2, length, keys, 2, 1, 8, dtype=FLOAT64))
    asked = integration.mask(2, length, keys, keys - length, mask_function=function)
    out, _ = integration.attend(SimpleNamespace(), q, k, v, asked)
    expected = (q @ k.mT / math.sqrt(8)).masked_fill(~visible, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_nothing_is_moved_where_padding_is_at_the_ends():
    """And where there is none, there are no lengths either."""
    causal = {"mask_function": masking_utils.causal_mask_function}
    for side in ("left", "right", "both"):
        found = integration.mask(2, 24, 24, attention_mask=models.padded(side).counts, **causal)
        assert found.rows_q is None, side
        assert found.lengths["seqused_k"].tolist()[::2] == [0, 0]
    found = integration.mask(2, 24, 24, attention_mask=models.padded("inside").counts, **causal)
    assert found.rows_k.sort().values.tolist() == list(range(48))
    for none in (None, torch.ones(2, 24, dtype=torch.bool)):
        assert not integration.mask(2, 24, 24, attention_mask=none, **causal).lengths


def test_a_mask_on_another_device():
    """What moves a layer's arguments calls ``to``, as of a tensor."""
    function = SEEN["causal"][0]
    found = integration.mask(2, 24, 24, mask_function=function, attention_mask=models.padded("inside").counts)
    moved = found.to("meta", non_blocking=True)
    assert (moved.shape, moved.window, moved.ndim) == ((2, 1, 24, 24), (None, 0), 4)
    assert {x.device.type for x in (*moved.lengths.values(), moved.rows_q, moved.rows_k)} == {"meta"}
    assert {x.device.type for x in found.lengths.values()} == {"cpu"}
    assert integration.mask(2, 24, 24, mask_function=function, attention_mask=found) is found


def test_the_layer_says_what_is_seen_where_there_is_no_mask():
    q, k, v = support.make_qkv(1, 20, 30, 4, 2, 8, dtype=torch.float32)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    for module, how, rules in (
        (SimpleNamespace(), {}, {"causal": True}),
        (SimpleNamespace(is_causal=False), {}, {}),
        (SimpleNamespace(is_causal=True), {"is_causal": False}, {}),
        (SimpleNamespace(), {"sliding_window": 4, "scaling": 0.5}, {"window": (3, 0), "scale": 0.5}),
        (SimpleNamespace(is_causal=False), {"sliding_window": 4, "softcap": 2.0}, {"window": (3, 3), "softcap": 2.0}),
    ):
        out, weights = integration.attend(module, *heads_first, None, **how)
        assert weights is None
        support.assert_close(out, q, k, v, **rules)


def test_the_library_is_imported_when_it_is_asked_for():
    program = "import sys, cute_attn.transformers as t; print('transformers' in sys.modules, t.IMPLEMENTATION)"
    assert run_quick(program).stdout.split() == ["False", OURS]
