"""Masks and scores that users write, for the tests of the kernels and of the reference: each as attention gets it, and as the
oracle does, which calls the same function with whole tensors of positions."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from cute_attn import attention, attention_varlen, block_mask, masks, scores
from tests.support import assert_close, assert_gradients_close, make_gradients, make_qkv

ROWS = 700  # captured tensors are of so many positions


class Made(NamedTuple):
    """Keywords of :func:`cute_attn.attention`, and those of the oracle."""

    asked: dict
    oracle: dict


def documents(batch: int, device, seed: int = 0) -> torch.Tensor:
    """Ascending numbers of documents, (batch, ROWS)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (batch, ROWS), generator=generator).sort().values.to(device)


def table(*shape: int, device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _of(name: str, make: Callable) -> Callable:
    """A mask or a score, made with tables in float32 for attention, and in float64 for the oracle."""

    def made(batch, heads, device, shift):
        asked, oracle = ({name: make(batch, heads, device, dtype)} for dtype in (torch.float32, torch.float64))
        return Made(asked, oracle)

    return made


def rows_that_see_nothing(batch, heads, device, dtype):
    blind = torch.arange(ROWS, device=device) // 70 % 3 == 1
    return lambda batch, head, q_idx, kv_idx: ~blind[q_idx] & (q_idx + head >= kv_idx)


def quotients_of_negative_numbers(batch, head, q_idx, kv_idx):
    """Rounded down: to zero, every fourth key would be seen, and others wouldn't."""
    return ((kv_idx - 1) % -4 // 3 > 0) | ((q_idx - kv_idx) // 5 % 3 == 1)


def hidden_by_the_score(batch, heads, device, dtype):
    return lambda score, batch, head, q_idx, kv_idx: torch.where(q_idx >= kv_idx, 1.5 * score, -math.inf)


def with_a_slope(batch, heads, device, dtype):
    gates = table(heads, ROWS, device=device).to(dtype)
    return lambda score, batch, head, q_idx, kv_idx: score * torch.exp(-torch.abs(gates[head, kv_idx])) + gates[0, q_idx]


def alibi(batch, heads, device, shift):
    slopes = torch.exp2(-torch.arange(1, heads + 1, device=device) * 8.0 / heads)

    def score(score, batch, head, q_idx, kv_idx):
        return score - slopes.double()[head] * torch.abs(q_idx + shift - kv_idx)

    return Made({"alibi_slopes": slopes}, {"score": score})


def alibi_behind(batch, heads, device, shift):
    """A ramp: no key is ahead of its query."""
    made = alibi(batch, heads, device, shift)
    return Made({**made.asked, "causal": True}, {**made.oracle, "causal": True})


def ramp(batch, heads, device, dtype):
    """Up to later keys in one head, to earlier ones in the next."""
    rises = (table(heads, device=device) * 0.05).to(dtype)
    return lambda score, batch, head, q_idx, kv_idx: (3 + kv_idx - q_idx) * rises[head] + score


def sinks(batch, heads, device, shift):
    rules = {"sinks": table(heads, device=device) * 2.0, "causal": True}
    return Made(rules, rules)


def everything(batch, heads, device, shift):
    ids, bias, of_heads = documents(batch, device), table(heads, 2 * ROWS + 1, device=device), table(heads, device=device)
    mask = masks.and_masks(masks.document(ids), masks.not_mask(masks.dilated(7)))

    def made(dtype):
        relative = scores.relative(bias.to(dtype))
        rules = {"mask": mask, "sinks": of_heads, "window": (300, 5), "softcap": 6.0}
        return {**rules, "score": lambda score, *where: scores.softcap(4.0)(relative(score, *where), *where)}

    return Made(made(torch.float32), made(torch.float64))


CASES: dict[str, Callable[[int, int, object, int], Made]] = {
    "causal": _of("mask", lambda batch, heads, device, dtype: masks.causal),
    "window": _of("mask", lambda batch, heads, device, dtype: masks.window(90, 3)),
    "document": _of("mask", lambda batch, heads, device, dtype: masks.document(documents(batch, device))),
    "prefix": _of("mask", lambda batch, heads, device, dtype: masks.prefix_lm(torch.arange(batch, device=device) * 111 + 50)),
    "dilated": _of("mask", lambda batch, heads, device, dtype: masks.or_masks(masks.dilated(3), masks.block_diagonal(50))),
    "nothing": _of("mask", rows_that_see_nothing),
    "quotients": _of("mask", lambda batch, heads, device, dtype: quotients_of_negative_numbers),
    "relative": _of("score", lambda batch, heads, device, dtype: scores.relative(table(heads, 401, device=device).to(dtype))),
    "bucketed": _of(
        "score", lambda batch, heads, device, dtype: scores.bucketed(table(heads, 32, device=device).to(dtype), 128)
    ),
    "softcap": _of("score", lambda batch, heads, device, dtype: scores.softcap(3.0)),
    "hidden": _of("score", hidden_by_the_score),
    "slope": _of("score", with_a_slope),
    "alibi": alibi,
    "alibi behind": alibi_behind,
    "ramp": _of("score", ramp),
    "sinks": sinks,
    "everything": everything,
}


def of_each_head(batch, heads, device, dtype):
    """A window of another width, and another document, for each head; in the last one of more than one nobody sees anything."""
    ids, none = documents(heads, device), heads - 1 if heads > 1 else heads

    def mask(batch, head, q_idx, kv_idx):
        near = (q_idx - kv_idx < 30 + 50 * head) & (kv_idx - q_idx < 100 * batch)
        return (near | (ids[head, q_idx] == ids[head, kv_idx])) & (head != none)

    return mask


def with_a_score_and_sinks(batch, heads, device, shift):
    ids, bias, of_heads = documents(batch, device), table(heads, 401, device=device), table(heads, device=device)

    def made(dtype):
        relative = scores.relative(bias.to(dtype))
        return {"mask": masks.document(ids), "score": relative, "sinks": of_heads, "softcap": 6.0}

    return Made(made(torch.float32), made(torch.float64))


# Those with a mask and no band, of which a block mask can be made.
BLOCKED: dict[str, Callable[[int, int, object, int], Made]] = {
    **{name: CASES[name] for name in ("causal", "window", "document", "prefix", "dilated", "nothing")},
    "heads": _of("mask", of_each_head),
    "score": with_a_score_and_sinks,
}


# ---- random expressions ----------------------------------------------------------------------------------------------

LEAVES = {
    "int": ["batch", "head", "q_idx", "kv_idx", "1", "-3", "ids[q_idx]", "ids[kv_idx]"],
    "float": ["score", "score", "0.5", "-1.25", "table[head, q_idx]", "table[batch, kv_idx]", "scalar"],
    "bool": ["(q_idx >= kv_idx)", "(ids[q_idx] == ids[kv_idx])"],
}
# Of each kind, texts with the kinds that stand in them.
DEEPER = {
    "int": [
        "({int} + {int})",
        "({int} - {int})",
        "({int} * {int})",
        "({int} // 3)",
        "({int} % -4)",
        "torch.clamp({int} + 0 * q_idx, -2, 9)",
    ],
    "float": [
        *(
            "({float} + {float})",
            "({float} - {int})",
            "({float} * {float})",
            "({float} / (1.5 + torch.abs({float} + 0.0 * scalar)))",
        ),
        *(
            "torch.where({bool}, {float}, {float})",
            "torch.where({bool}, {int}, {float})",
            "1.0 / (1.0 + torch.exp(-torch.abs({float} + 0.0 * scalar)))",
        ),
        *("torch.minimum({float} * scalar, {float} * scalar)", "torch.maximum({float} * scalar, {float} * scalar)"),
        *("torch.exp(torch.clamp({float} * scalar, -3.0, 2.0))", "torch.tanh({float} * scalar)", "torch.abs({float} * scalar)"),
        *(
            "torch.log(1.0 + torch.abs({float} * scalar))",
            "torch.sqrt(1.0 + torch.abs({float} * scalar))",
            "(0.5 * {float}) ** 2",
        ),
    ],
    "bool": [
        "({float} < {int} + 0 * kv_idx)",
        "({int} + 0 * kv_idx <= {float})",
        "({int} + 0 * kv_idx != {int})",
        "({bool} & {bool})",
        "({bool} | {bool})",
        "(~{bool})",
    ],
}


def random_text(chance: random.Random, kind: str, depth: int = 4, of_score: bool = True) -> str:
    """Of an expression of a kind; ``of_score``: comparisons may be of scores."""
    if depth == 0 or chance.randint(0, 4) == 0:
        return chance.choice([leaf for leaf in LEAVES[kind] if of_score or leaf != "score"])
    form = chance.choice(DEEPER[kind])
    inside = of_score or kind == "float"
    return re.sub(r"{(\w+)}", lambda found: random_text(chance, found[1], depth - 1, inside and found[1] != "bool"), form)


def random_functions(seed: int) -> tuple[str, str]:
    """Texts of a mask and of a score that is continuous in a score, and neither it nor its slope large."""
    chance, n = random.Random(seed), ROWS // 2
    places = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(0, n, 31), torch.arange(0, n, 29), indexing="ij")
    drawn = torch.randn(places[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4.0
    while True:
        texts = random_text(chance, "bool", of_score=False), random_text(chance, "float", of_score=False)
        made = of_texts(texts, torch.device("cpu"), torch.float64)
        given = drawn.clone().requires_grad_()
        found = made["score"](given, *places)
        if found.requires_grad and found.abs().max() < 50.0:
            (slope,) = torch.autograd.grad(found.sum(), given)
            if slope.isfinite().all() and slope.abs().max() < 10.0 and slope.any() and "score" not in texts[0]:
                return texts


def of_texts(texts: tuple[str, str], device, dtype) -> dict[str, Callable]:
    """The mask and the score."""
    space = {"torch": torch, "ids": documents(1, device)[0], "table": table(4, ROWS, device=device).to(dtype)}
    space["scalar"] = torch.tensor(0.75, dtype=dtype, device=device)
    mask, score = (f"({text}) & (kv_idx >= 0)" if i == 0 else f"({text}) + 0.0 * score" for i, text in enumerate(texts))
    return {
        "mask": eval(f"lambda batch, head, q_idx, kv_idx: {mask}", space),
        "score": eval(f"lambda score, batch, head, q_idx, kv_idx: {score}", space),
    }


def random_case(batch, heads, device, shift, seed: int) -> Made:
    texts = random_functions(seed)
    return Made(of_texts(texts, device, torch.float32), of_texts(texts, device, torch.float64))


RANDOM = {f"random {i}": partial(random_case, seed=i) for i in range(30)}


def check(
    case: str, sizes, heads, dims, dtype, device, of_lse: bool = True, kind: str = "gaussian", blocks=False, packed=False,
    **options,
) -> None:
    """Outputs and gradients, the sinks' among them, against the oracle. ``sizes`` are (batch, queries, keys); with ``blocks``
    attention gets a block mask as well, and ``packed`` it gets the batch as sequences, one after another."""
    batch, sq, sk = sizes
    q, k, v = make_qkv(batch, sq, sk, *heads, *dims, dtype, device, kind)
    asked, oracle = (CASES | BLOCKED | RANDOM)[case](batch, heads[0], q.device, sk - sq)
    if blocks:
        of = (heads[0] if case in ("heads", "nothing") else None), sq, sk
        options = {**options, "block_mask": block_mask(asked["mask"], batch, *of, device=device)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    of_sinks = asked.get("sinks")
    if of_sinks is not None:
        asked = {**asked, "sinks": of_sinks.clone().requires_grad_()}
    if packed:
        bounds = (torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device) for n in (sq, sk))
        rows = (x.flatten(0, 1) for x in leaves)
        out, lse = attention_varlen(*rows, *bounds, return_lse=True, **asked, **options)
        out, lse = out.unflatten(0, (batch, sq)), lse.unflatten(1, (batch, sq)).transpose(0, 1)
    else:
        out, lse = attention(*leaves, return_lse=True, **asked, **options)
    dout, dlse = make_gradients(q, v)
    dlse = torch.where(lse == -math.inf, 0.0, dlse) if of_lse else None
    outputs = [out, lse] if of_lse else [out]
    wanted = [*leaves, *([] if of_sinks is None else [asked["sinks"]])]
    found = torch.autograd.grad(outputs, wanted, [dout, dlse] if of_lse else [dout])
    q, k, v = (x.detach() for x in leaves)
    assert_close((out.detach(), lse.detach()), q, k, v, **oracle)
    assert_gradients_close(found[:3], q, k, v, dout, dlse, **oracle)
    if of_sinks is not None:
        expected = gradient_of_sinks(q, k, v, dout, dlse, oracle)
        assert_sinks_gradient_close(found[3], expected, dtype, batch * sq * dims[1])


def assert_sinks_gradient_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, terms: int) -> None:
    """Sums of so many products of out, which is rounded to ``dtype``, with dout."""
    error = (found.double() - expected).abs().max()
    allowed = 4 * torch.finfo(dtype).eps * math.sqrt(terms) + 1e-5 * expected.abs().max()
    assert error <= allowed, f"the sinks' gradient is off by {error:.3g}; {allowed:.3g} is allowed"


def gradient_of_sinks(q, k, v, dout, dlse, oracle) -> torch.Tensor:
    """By autograd, of plain attention in float64 as a whole."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    s = torch.einsum("bmhd,bnhd->bhmn", q, k.repeat_interleave(group, 2)) / math.sqrt(q.shape[3])
    if cap := oracle.get("softcap"):
        s = cap * torch.tanh(s / cap)
    places = torch.meshgrid(*(torch.arange(n, device=q.device) for n in s.shape), indexing="ij")
    s = oracle["score"](s, *places) if "score" in oracle else s
    visible = oracle["mask"](*places) if "mask" in oracle else torch.ones_like(s, dtype=torch.bool)
    left, right = oracle.get("window", (None, 0 if oracle.get("causal") else None))
    ahead = places[3] - places[2] - k.shape[1] + q.shape[1]
    visible = visible & (ahead >= -(math.inf if left is None else left)) & (ahead <= (math.inf if right is None else right))
    z = oracle["sinks"].double().clone().requires_grad_()
    some = visible.any(-1)
    s = s.masked_fill(~visible, -math.inf).masked_fill(~some[..., None], 0.0)
    lse = torch.cat((s, z.view(1, -1, 1, 1).expand(*s.shape[:3], 1)), -1).logsumexp(-1)
    P = (s - lse[..., None]).exp() * some[..., None]
    out = torch.einsum("bhmn,bnhd->bmhd", P, v.repeat_interleave(group, 2))
    total = (out * dout).sum() + (0.0 if dlse is None else (lse.where(some, 0.0) * dlse).sum())
    return torch.autograd.grad(total, z)[0]
