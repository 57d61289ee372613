"""Is a peer's result right? Asked before it is timed, on a sample: a case of 16k keys is answered in milliseconds.

The oracle is eager attention in float64. A result passes when its largest error is at most twice that of plain torch
attention computed in the case's own dtype (ten times in float32, where the order of a sum alone changes it by a factor of
several), plus that dtype's rounding of the result; and when all of it is finite. For
outputs, some hundred query rows of a few (batch, head) pairs are computed; for gradients, whole (batch, key head)
pairs, because dK and dV are sums over every query. Of padded sequences all of this is said of the rows in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.cases import Case

TIMES_PLAIN = {"float16": 2, "bfloat16": 2, "float32": 10}
ROWS = 256
OUTPUT_PAIRS, GRADIENT_PAIRS = 4, 2
CHUNK = 2048  # query rows at a time where all of them are needed: 16k keys of float64 scores are 268 MB


class WrongError(Exception):
    """The result is not attention; the message says which part is off, and by how much."""


@dataclass(frozen=True)
class Inputs:
    """One set of tensors, ``(batch, seqlen, heads, head_dim)``; ``dout`` is the gradient that comes in, or ``None``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None

    def in_use(self, case: Case) -> Inputs:
        """Of a padded rectangle the rows in use, as tensors of their own."""

        def cut(x: Tensor) -> Tensor:
            return x[:, : case.used].contiguous()

        if not case.used:
            return self
        return Inputs(cut(self.q), cut(self.k), cut(self.v), None if self.dout is None else cut(self.dout))


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Gaussian tensors from a seed: never zeros, on which the card runs cooler and faster."""
    generator = torch.Generator(device).manual_seed(seed)

    def gaussian(name: str) -> Tensor:
        return torch.randn(case.shape_of(name), generator=generator, device=device, dtype=getattr(torch, case.dtype))

    q, k, v = map(gaussian, "qkv")
    return Inputs(q, k, v, gaussian("dout") if case.has_gradients else None)


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """softmax(QKᵀ/√d) V in the dtype of its inputs: q ``(…, rows, d)`` holds the queries at positions ``rows``."""
    scores = q @ k.mT * (1 / math.sqrt(case.head_dim))
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    left, right = case.edges
    if left is None and right is None and not case.packed:
        return torch.softmax(scores, -1) @ v
    key = torch.arange(case.seqlen_k, device=q.device)
    aligned = rows[:, None] + (case.seqlen_k - case.seqlen_q)
    visible = torch.ones((len(rows), case.seqlen_k), dtype=torch.bool, device=q.device)
    if left is not None:
        visible &= key >= aligned - left
    if right is not None:
        visible &= key <= aligned + right
    if case.packed:
        sequence = torch.arange(len(case.packed)).repeat_interleave(torch.tensor(case.packed)).to(q.device)
        visible &= sequence[rows][:, None] == sequence
    # A query that sees nothing gives zeros; masking all of its scores would give NaN, in the gradients too.
    sighted = visible.any(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(~visible & sighted, -math.inf), -1)
    return (probabilities * sighted) @ v


def eager_gradients(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) of one key head, in its inputs' dtype: q, dout ``(group, seqlen_q, …)``, k, v ``(seqlen_k, …)``."""
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    # Chunks are added up in float32 or better, as one whole product would do.
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv, dq = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide), []
    for first in range(0, case.seqlen_q, CHUNK):
        part = q[:, first : first + CHUNK].detach().requires_grad_()
        rows = torch.arange(first, first + part.shape[1], device=q.device)
        out = eager(case, part, k, v, rows)
        gradients = torch.autograd.grad(out, (part, k, v), dout[:, first : first + CHUNK])
        dq.append(gradients[0])
        dk, dv = dk + gradients[1], dv + gradients[2]
    return torch.cat(dq, 1), dk.to(k.dtype), dv.to(v.dtype)


class Judge:
    """Knows what is right for a sample of one case's results."""

    def __init__(self, case: Case, inputs: Inputs, seed: int = 0) -> None:
        self._whole, self._case, inputs = case, case.in_use, inputs.in_use(case)
        case = self._case
        self._samples: list[tuple[str, tuple, Tensor]] = []  # output, index into it, float64 values there
        self._plain_error: dict[str, float] = {}
        self._rounding: dict[str, float] = {}
        draw = torch.Generator().manual_seed(seed)
        if case.direction != "backward":
            for batch, head_kv in self._pairs(OUTPUT_PAIRS, draw):
                group = case.heads // case.heads_kv
                head = head_kv * group + int(torch.randint(group, (), generator=draw))
                self._expect_output(inputs, batch, head, self._rows(draw).to(inputs.q.device))
        if case.has_gradients:
            for batch, head_kv in self._pairs(GRADIENT_PAIRS, draw):
                self._expect_gradients(inputs, batch, head_kv)

    def _pairs(self, count: int, draw: torch.Generator) -> list[tuple[int, int]]:
        """(batch, key head) pairs: the first, the last, and some in between."""
        total = self._case.batch * self._case.heads_kv
        picked = {0, total - 1, *torch.randperm(total, generator=draw)[: count - 2].tolist()}
        return [divmod(pair, self._case.heads_kv) for pair in sorted(picked)]

    def _rows(self, draw: torch.Generator) -> Tensor:
        """Query rows: both ends, where masks go wrong, and some from anywhere."""
        total = self._case.seqlen_q
        if total <= ROWS:
            return torch.arange(total)
        ends = torch.cat([torch.arange(ROWS // 4), torch.arange(total - ROWS // 4, total)])
        return torch.cat([ends, torch.randperm(total, generator=draw)[: ROWS // 2]]).unique()

    def _expect_output(self, inputs: Inputs, batch: int, head: int, rows: Tensor) -> None:
        head_kv = head // (self._case.heads // self._case.heads_kv)
        parts = inputs.q[batch, rows, head], inputs.k[batch, :, head_kv], inputs.v[batch, :, head_kv]
        q, k, v = (x.double() for x in parts)
        exact = eager(self._case, q, k, v, rows)
        self._expect("out", (batch, rows, head), exact, eager(self._case, *parts, rows))

    def _expect_gradients(self, inputs: Inputs, batch: int, head_kv: int) -> None:
        group = self._case.heads // self._case.heads_kv
        heads = slice(head_kv * group, (head_kv + 1) * group)
        parts = (
            inputs.q[batch, :, heads].transpose(0, 1),
            inputs.k[batch, :, head_kv],
            inputs.v[batch, :, head_kv],
            cast(Tensor, inputs.dout)[batch, :, heads].transpose(0, 1),
        )
        exact = eager_gradients(self._case, *(x.double() for x in parts))
        plain = eager_gradients(self._case, *parts)
        everything = slice(None)
        self._expect("dq", (batch, everything, heads), exact[0].transpose(0, 1), plain[0].transpose(0, 1))
        self._expect("dk", (batch, everything, head_kv), exact[1], plain[1])
        self._expect("dv", (batch, everything, head_kv), exact[2], plain[2])

    def _expect(self, name: str, index: tuple, exact: Tensor, plain: Tensor) -> None:
        self._samples.append((name, index, exact))
        rounded = exact.to(plain.dtype).double()
        self._plain_error[name] = max(self._plain_error.get(name, 0.0), _largest(plain.double() - exact))
        self._rounding[name] = max(self._rounding.get(name, 0.0), _largest(rounded - exact))

    def verdict(self, outputs: dict[str, Any], unpadded: bool = False) -> float:
        """The relative error of a peer's outputs, ‖x − exact‖ / ‖exact‖, the largest over the outputs. ``unpadded``: it was
        given the rows in use alone.

        Raises :class:`WrongError` for one that is missing, misshapen, not finite or further off than allowed.
        """
        worst: dict[str, tuple[float, float, float]] = {}  # largest error, squared error, squared norm
        checked = {name: self._checked(name, outputs.get(name), unpadded) for name in self._plain_error}
        for name, index, exact in self._samples:
            off = checked[name][index].double() - exact
            largest, squared, norm = worst.get(name, (0.0, 0.0, 0.0))
            squares = float(off.square().sum()), float(exact.square().sum())
            worst[name] = max(largest, _largest(off)), squared + squares[0], norm + squares[1]
        for name, (largest, _, _) in worst.items():
            times = TIMES_PLAIN[self._case.dtype]
            allowed = times * self._plain_error[name] + self._rounding[name]
            if not largest <= allowed:
                raise WrongError(
                    f"{name} is off by up to {largest:.3g} from float64; {allowed:.3g} is allowed "
                    f"({times} × plain torch's {self._plain_error[name]:.3g} plus rounding)"
                )
        return max(math.sqrt(squared / norm) if norm else 0.0 for _, squared, norm in worst.values())

    def _checked(self, name: str, got: Any, unpadded: bool) -> Tensor:
        """An output's rows in use, all of which are finite; who was given these alone gives no others."""
        if not isinstance(got, Tensor):
            raise WrongError(f"{name} is a {type(got).__name__}; a tensor is needed")
        in_use = self._case.shape_of(name)
        needed = in_use if unpadded else self._whole.shape_of(name)
        if tuple(got.shape) != needed:
            raise WrongError(f"{name} has shape {tuple(got.shape)}; {needed} is needed")
        got = got.detach()[:, : in_use[1]]
        if unfit := got.numel() - int(torch.isfinite(got).sum()):
            raise WrongError(f"{name} has {unfit} values that are not finite, of {got.numel()}")
        return got


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
