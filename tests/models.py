"""Small models of Transformers, built in code with random weights, and what they are asked: ``cute_attn.transformers``'s tests.

A result is right when its error beside eager attention in float64 is at most a few times that of eager attention in the same
dtype: the policy of :mod:`tests.support`, for all of a model's outputs and gradients.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from tests import support

BATCH, LENGTH, WINDOW, SYMBOLS = 2, 24, 7, 64
# Attention that is far from uniform: large weights. No embedding is that of padding.
SIZE = {
    "vocab_size": SYMBOLS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPS = {"num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": SYMBOLS,
    "init_std": 0.25,
    "dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}
# Of each model its class, that of its configuration, and what is in this.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZE | GROUPS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZE | GROUPS),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZE | GROUPS | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SIZE | GROUPS | ALTERNATING | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZE | GROUPS | ALTERNATING),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZE | {"num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZE | NO_DROPOUT),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        SIZE | {"local_attention": 2 * WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": None, "sep_token_id": None},
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        SIZE
        | NO_DROPOUT
        | {"image_size": 20, "patch_size": 4, "num_channels": 1},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SPEECH | {"num_mel_bins": 4, "max_source_positions": 20, "max_target_positions": 32},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        SIZE | GROUPS | ALTERNATING | {"num_local_experts": 2, "num_experts_per_tok": 2},  # which is no choice that flips
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": SYMBOLS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SIZE | GROUPS | {"num_local_experts": 1, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "moe_layers": []},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SPEECH | {"max_position_embeddings": 32}),
}


def built(name: str, implementation: str, dtype=torch.float32, device="cpu", **changed):
    """A model with the weights that it has for every implementation and dtype."""
    import transformers

    kind, config, values = MODELS[name]
    torch.manual_seed(0)
    how = {"attn_implementation": implementation, "experts_implementation": "eager"}  # grouped products have no float64
    made = getattr(transformers, kind)._from_config(
        getattr(transformers, config)(**(values | changed)), dtype=torch.float32, **how
    )
    assert made.config._attn_implementation == implementation
    return made.to(device, dtype).eval()


# ---- what a model is asked -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Inputs, and which rows of the logits count: not those of padding."""

    inputs: dict[str, Any]
    counts: torch.Tensor


def symbols(batch=BATCH, length=LENGTH) -> torch.Tensor:
    return torch.randint(0, SYMBOLS, (batch, length), generator=torch.Generator().manual_seed(1))


def plain(**_) -> Asked:
    return Asked({"input_ids": symbols()}, torch.ones(BATCH, LENGTH, dtype=torch.bool))


def padded(side: str) -> Asked:
    """Of two sequences one is shorter, padded on one side or on both, or one has padding inside."""
    used = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side != "right":
        used[1, :5] = 0
    if side != "left":
        used[1, -3:] = 0
    if side == "inside":
        used[1, 8:11] = 0
    return Asked({"input_ids": symbols(), "attention_mask": used}, used.bool())


SIZES = (9, 1, 17, 21)  # two of each row of the batch, or all of one


def packed(rows=1, lengths=False) -> Asked:
    positions = torch.cat([torch.arange(n) for n in SIZES])
    if rows == 2:
        positions = torch.cat([positions, positions])
    inputs = {"input_ids": symbols(rows, sum(SIZES)), "position_ids": positions.view(rows, -1), "use_cache": False}
    if lengths:
        cu = torch.tensor([0, *SIZES]).cumsum(0).int()
        inputs |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(SIZES), "max_length_k": max(SIZES)}
    return Asked(inputs, torch.ones(rows, sum(SIZES), dtype=torch.bool))


def pictures() -> Asked:
    pixels = torch.randn(BATCH, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    return Asked({"pixel_values": pixels}, torch.ones(BATCH, dtype=torch.bool))


def speech() -> Asked:
    features = torch.randn(BATCH, 4, 40, generator=torch.Generator().manual_seed(1))
    return Asked({"input_features": features, "decoder_input_ids": symbols()}, torch.ones(BATCH, LENGTH, dtype=torch.bool))


def own_mask(dtype=torch.bool) -> Asked:
    """Which keys a query sees, in a mask of the user's own, bools or floats to be added."""
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.where(seen, 0.0, -30.0).to(dtype)
    return Asked({"input_ids": symbols(), "attention_mask": mask}, torch.ones(BATCH, LENGTH, dtype=torch.bool))


def translated() -> Asked:
    """An encoder with padding, which its own attention and the decoder's see, and a decoder of another length."""
    asked = padded("inside")
    return Asked(asked.inputs | {"decoder_input_ids": symbols(length=11)}, torch.ones(BATCH, 11, dtype=torch.bool))


# (model, what is asked of it)
CASES: dict[str, tuple[str, Callable[[], Asked]]] = {
    **{name: (name, plain) for name in ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "bert", "modernbert")},
    "llama, right padding": ("llama", lambda: padded("right")),
    "llama, left padding": ("llama", lambda: padded("left")),
    "llama, padding inside": ("llama", lambda: padded("inside")),
    "llama, packed": ("llama", packed),
    "llama, packed, two rows": ("llama", lambda: packed(2)),
    "llama, packed, lengths given": ("llama", lambda: packed(lengths=True)),
    "mistral, both sides padded": ("mistral", lambda: padded("both")),
    "mistral, packed": ("mistral", packed),
    "gemma2, left padding": ("gemma2", lambda: padded("left")),
    "gemma3, packed": ("gemma3", packed),
    "gpt_oss, left padding": ("gpt_oss", lambda: padded("left")),
    "gpt_oss, packed": ("gpt_oss", packed),
    "bert, right padding": ("bert", lambda: padded("right")),
    "bert, padding inside": ("bert", lambda: padded("inside")),
    "modernbert, right padding": ("modernbert", lambda: padded("right")),
    "vit": ("vit", pictures),
    "whisper": ("whisper", speech),
    "bart, padding inside": ("bart", translated),
    "mistral, padding inside": ("mistral", lambda: padded("inside")),
    "t5, padding inside": ("t5", translated),
    "llama4": ("llama4", plain),
    "llama4, left padding": ("llama4", lambda: padded("left")),
    "llama, a mask that is added": ("llama", lambda: own_mask(torch.float32)),
}


# ---- what it answers -------------------------------------------------------------------------------------------------


def answer(model, asked: Asked, run: Callable | None = None) -> dict[str, torch.Tensor]:
    """The logits that count, and the gradients of all parameters; ``run`` is the model, compiled perhaps."""
    place, dtype = next(model.parameters()).device, model.dtype
    inputs = {
        name: x if not isinstance(x, torch.Tensor) else x.to(place, dtype if x.is_floating_point() else x.dtype)
        for name, x in asked.inputs.items()
    }
    model.zero_grad(set_to_none=True)
    logits = (model if run is None else run)(**inputs).logits[asked.counts.to(place)]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (logits * weights.to(place, dtype)).sum().backward()
    return {"logits": logits.detach()} | {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@contextmanager
def exact() -> Iterator[None]:
    """Eager attention in float64 takes its softmax there, too, and not in float32, where that dtype's mask is infinite."""
    softmax = torch.nn.functional.softmax

    def no_rounding(x, *how, dtype=None, **others):
        return softmax(x, *how, dtype=x.dtype if x.dtype == torch.float64 else dtype, **others)

    with patch.object(torch.nn.functional, "softmax", no_rounding):
        yield


def expected(case: str, dtype=torch.float32, device="cpu") -> list[dict[str, torch.Tensor]]:
    """``[true, plain]``: with eager attention in float64, and in ``dtype``."""
    name, ask = CASES[case]
    with exact():
        return [answer(built(name, "eager", kind, device), ask()) for kind in (torch.float64, dtype)]


def assert_follows(got: dict, true: dict, plain: dict, times: float) -> None:
    """That an answer's error is at most ``times`` that of ``plain``, and rounding: each tensor, in the policy's two norms.

    A bias of keys adds the same to all scores of a row, which no probability shows: its gradient is 0, and what is found is
    the rounding of sums that cancel. As much of it as is in the gradient of the queries' bias, of terms alike, may be there."""
    assert got.keys() == true.keys() == plain.keys()
    for name, x in got.items():
        other = name.replace("key.bias", "query.bias")
        allowed = times * (plain[other].double() - true[other]).abs()
        support._check(name, x, x.dtype, true[name].double(), allowed)


# ---- what is served --------------------------------------------------------------------------------------------------

PROMPTS = [torch.randint(0, SYMBOLS, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 17, 5, 30)]


def serves() -> bool:
    """Whether Transformers has the continuous batching that ``register`` joins."""
    from transformers import ContinuousBatchingConfig

    return "page_size" in inspect.signature(ContinuousBatchingConfig).parameters


def served(model, new: int = 12, **how) -> list[list[int]]:
    """What continuous batching makes of all prompts, in a cache of small pages, and parts of a prompt at a time."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    sampling = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(page_size=8, num_blocks=64, max_batch_tokens=24, **how)
    found = model.generate_batch(PROMPTS, generation_config=sampling, continuous_batching_config=sizes, progress_bar=False)
    assert not any(x.error for x in found.values())
    return [found[name].generated_tokens for name in sorted(found)]


def in_dtype(model, dtype):
    """The model in a dtype, but for the frequencies of its rotary embeddings, which Transformers keeps in float32: rounded to
    bfloat16 they are those of another model, a radian off after some hundred tokens."""
    kept = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in kept.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer)
    return model


def assert_greedy(model, prompt: list[int], found: list[int], times: float) -> None:
    """That each token ``found`` after a prompt is the one that is most likely in float64, but for ``times`` the error of
    the model's logits with eager attention, in its dtype: of each token's largest one the mean."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    ids = torch.tensor([[*prompt, *found]], device=model.device)
    logits = []
    for dtype in (eager.dtype, torch.float64):
        with exact(), torch.no_grad():
            logits.append(in_dtype(eager, dtype)(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double())
    plain, true = logits
    short = true.max(-1).values - true.gather(-1, ids[0, len(prompt) :, None])[:, 0]
    allowed = times * 2 * (plain - true).abs().amax(-1).mean()
    assert short.max() <= allowed, f"{short.max():.3g} is missing to the best logit; {allowed:.3g} is rounding"
