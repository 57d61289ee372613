"""Tensors that attention reads beside q, k and v and that get gradients, and dropout: cases for the tests of the kernels and of
the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cute_attn import api, attention, dropout, scores
from tests.functions import ROWS, table
from tests.support import assert_captured_gradients_close, assert_close, assert_gradients_close, make_gradients, make_qkv


class Captured(NamedTuple):
    """Shapes of tensors, by (batch, heads, queries, keys), the keywords of attention and those of the oracle that they make,
    and more keywords for both."""

    shapes: Callable
    asked: Callable
    oracle: Callable
    rules: dict


def _bias(*dims: int, **rules) -> Captured:
    """A bias that differs along dimensions of (batch, heads, queries, keys)."""

    def shapes(*sizes):
        return [[size if dim in dims else 1 for dim, size in enumerate(sizes)]]

    def oracle(bias):
        def score(score, *where):
            return score + bias[tuple(i if dim in dims else 0 for dim, i in enumerate(where))]

        return {"score": score}

    return Captured(shapes, lambda bias: {"bias": bias}, oracle, rules)


def _score(shapes: Callable, make: Callable, **rules) -> Captured:
    def asked(*tensors):
        return {"score": make(*tensors)}

    return Captured(shapes, asked, asked, rules)


def _gated(gates, of_heads, of_rows):
    """A derivative that takes the score, elements that depend on a row, on a column and on neither, and one that is loaded
    twice."""

    def score(score, batch, head, q_idx, kv_idx):
        return torch.tanh(score * gates[head, kv_idx]) * of_rows[q_idx] + of_heads[head] * score + of_rows[kv_idx]

    return score


CASES = {
    "bias": _bias(0, 1, 2, 3),
    "shared": _bias(1, 2, 3),
    "pair": _bias(0, 2, 3, causal=True),
    "rows": _bias(1, 2),
    "keys": _bias(0, 3, window=(70, 5)),
    "heads": _bias(0, 1, softcap=5.0),
    "relative": _score(lambda b, h, n, m: [[h, 101]], scores.relative),
    "bucketed": _score(lambda b, h, n, m: [[h, 32]], lambda x: scores.bucketed(x, 128), causal=True),
    "gated": _score(lambda b, h, n, m: [[h, ROWS], [h], [ROWS]], _gated, softcap=4.0, window=(200, None)),
}


def made(case: str, sizes: tuple, device, dtype=torch.float32) -> list[torch.Tensor]:
    """A case's tensors; sizes are (batch, heads, queries, keys)."""
    return [table(*shape, device=device, seed=i).to(dtype) for i, shape in enumerate(CASES[case].shapes(*sizes))]


def check(
    case: str, sizes, heads, dims, dtype, device, kind="gaussian", of=torch.float32, p: float = 0.0, expected_on="", **options
) -> None:
    """Outputs and all gradients of a case against the oracle. ``sizes`` are (batch, queries, keys), ``of`` the dtype of
    captured tensors; with ``p`` probabilities are dropped. The oracle computes on ``device``, or ``expected_on``."""
    batch, sq, sk = sizes
    q, k, v = make_qkv(batch, sq, sk, *heads, *dims, dtype, expected_on or device, kind)
    dout, dlse = make_gradients(q, v)
    tensors, case_ = made(case, (batch, heads[0], sq, sk), q.device, of), CASES[case]
    inputs, leaves = ([x.detach().to(device, copy=True).requires_grad_() for x in xs] for xs in ((q, k, v), tensors))
    rules = dict(case_.rules)
    with seeded(7 if p else None, q.device) as weight:
        out, lse = attention(*inputs, return_lse=True, dropout_p=p, **case_.asked(*leaves), **rules, **options)
    if p:
        rules["weight"] = weight(p)
    dlse = torch.where(lse.to(q.device) == -math.inf, 0.0, dlse)
    found = torch.autograd.grad([out, lse], [*inputs, *leaves], [dout.to(device), dlse.to(device)])
    out, lse, *found = (x.detach().to(q.device) for x in (out, lse, *found))
    oracle = {**rules, **case_.oracle(*(x.double() for x in tensors))}
    assert_close((out, lse), q, k, v, **oracle)
    assert_gradients_close(found[:3], q, k, v, dout, dlse, **oracle)
    assert_captured_gradients_close(found[3:], tensors, case_.oracle, q, k, v, dout, dlse, **rules)


class seeded:  # noqa: N801
    """Within, dropout's seed is this one on every device; gives a function from p to the oracle's ``weight``."""

    def __init__(self, seed: int | None, device):
        self.seed, self.device = seed, device

    def __enter__(self):
        self.before = dropout.draw_seed
        if self.seed is not None:
            seed = torch.tensor([self.seed * 0x0123456789ABCDEF], device=self.device)
            api.dropout.draw_seed = lambda like: seed.to(like.device)

        def weight(p):
            def of(*where):
                return dropout.kept(seed, p, *(x.long() for x in where)).double() * dropout.kept_scale(p)

            return of

        return weight

    def __exit__(self, *_):
        dropout.draw_seed = self.before
