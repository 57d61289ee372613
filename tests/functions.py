"""Masks and scores that users write, for the tests of the kernels and of the reference: each as attention gets it, and as the
oracle does, which calls the same function with whole tensors of positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cute_attn import attention, block_mask, masks, scores
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


def check(
    case: str, sizes, heads, dims, dtype, device, of_lse: bool = True, kind: str = "gaussian", blocks=False, **options
) -> None:
    """Outputs and gradients, the sinks' among them, against the oracle. ``sizes`` are (batch, queries, keys); with ``blocks``
    attention gets a block mask as well."""
    batch, sq, sk = sizes
    q, k, v = make_qkv(batch, sq, sk, *heads, *dims, dtype, device, kind)
    asked, oracle = (CASES | BLOCKED)[case](batch, heads[0], q.device, sk - sq)
    if blocks:
        of = (heads[0] if case in ("heads", "nothing") else None), sq, sk
        options = {**options, "block_mask": block_mask(asked["mask"], batch, *of, device=device)}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    of_sinks = asked.get("sinks")
    if of_sinks is not None:
        asked = {**asked, "sinks": of_sinks.clone().requires_grad_()}
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
