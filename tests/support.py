"""The one oracle and the one tolerance of all tests, for every backend and device.

A result is right when its error against float64 eager attention is at most twice the error of plain PyTorch attention
in the same dtype, plus the rounding of the result to that dtype. There are no fixed tolerances. Errors are measured in
two norms: the largest one finds a wrong element, the root mean square a small error everywhere.

Twice is for the 16-bit dtypes, where storing the scores and P in 16 bits makes nearly all of plain attention's error.
In float32 and float64 the sums themselves make it, and the order in which two correct matrix products add up changes
their errors by a factor of several: there it is ten times. (A wrong rule is off by orders of magnitude more.)

Gradients are judged by the same rule, against plain attention's by autograd. There its error can vanish where that of
another correct algorithm can't: where a row sees one key, plain attention subtracts a number from itself, and the gradients
of q and k are exactly 0; recomputed from a log-sum-exp, with rowsum(dO ∘ O) for a sum over keys, they are differences of
two roundings. So plain attention's error counts as at least that of summing in float32 (float64 for float64 inputs), which
in the 16-bit dtypes is far less than what rounding P makes wherever a row sees more.

Nothing here uses the package under test. Attention is computed block of rows by block of rows, so that the score matrix
in float64 takes at most about half a GiB, and the matrices of its gradients a few of them in blocks of a quarter that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

# (seqlen_q, seqlen_k): one below, at and above the edges of tiles, much longer on one side, many tiles; then sizes 0.
SHAPES = [
    (1, 1),
    (3, 3),
    (64, 1),
    (239, 1),
    (799, 3),
    (113, 203),
    (108, 256),
    (255, 256),
    (1023, 1024),
    (1024, 1023),
    (4224, 4224),
    (0, 0),
    (0, 5),
    (5, 0),
]
MAX_SCORES = 1 << 26  # in one block of rows: 512 MiB in float64
TIMES_PLAIN = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 10, torch.float64: 10}
PEAK_LOGIT = 16.0
PEAK_KEYS = 4


def make_qkv(batch, sq, sk, heads, heads_kv, d, dv=None, dtype=torch.float32, device="cpu", kind="gaussian", seed=0):
    """q, k, v as (batch, seqlen, heads, head_dim); the same numbers on every device.

    ``kind="gaussian"``: independent and standard normal: all keys weigh about the same. ``kind="peaky"``: the queries
    of a key head share a direction with a few keys of it, whose logits at the default scale are about 16 above the
    others': these keys take nearly all the weight of the rows that see them.
    """
    generator = torch.Generator().manual_seed(seed)
    made_in = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=made_in)

    q = normal(batch, sq, heads, d)
    k = normal(batch, sk, heads_kv, d)
    v = normal(batch, sk, heads_kv, d if dv is None else dv)
    if kind == "peaky":
        direction = torch.nn.functional.normalize(normal(batch, 1, heads_kv, d), dim=-1)
        direction = direction * math.sqrt(PEAK_LOGIT * math.sqrt(d))  # |direction|² / √d is the logit
        q = q + direction.repeat_interleave(heads // max(heads_kv, 1), dim=2)
        place = normal(batch, sk, heads_kv, 1)
        peaks = place >= place.sort(dim=1, descending=True).values[:, min(PEAK_KEYS, sk) - 1, None] if sk else place > 0
        k = k + direction * peaks
    elif kind != "gaussian":
        raise ValueError(f"kind is {kind!r}; 'gaussian' or 'peaky' is needed")
    return tuple(x.to(dtype).to(device) for x in (q, k, v))


def make_gradients(q, v, seed=1):
    """``(dout, dlse)``, gradients of attention's outputs for q and v: independent and standard normal, the same numbers on
    every device; dlse is float32 (float64 for float64 inputs)."""
    generator = torch.Generator().manual_seed(seed)
    (batch, sq, heads, _), exact = q.shape, _exact(q.dtype)
    dout = torch.randn(batch, sq, heads, v.shape[3], generator=generator, dtype=exact)
    dlse = torch.randn(batch, heads, sq, generator=generator, dtype=exact)
    return dout.to(q.dtype).to(q.device), dlse.to(q.device)


def oracle(q, k, v, *, scale=None, causal=False, window=None, softcap=0.0, **functions):
    """``(out, lse)`` of eager attention in float64: out (batch, sq, heads, dv), lse (batch, heads, sq), natural log.

    A row that sees no key has zeros and −inf.
    """
    out, lse = _outputs(q, v, torch.float64, torch.float64)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    for block in _row_blocks(q, k, v, causal, window, **functions):
        scores = torch.einsum("mhgd,nhd->hgmn", block.q.double() * scale, block.k.double())
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = block.changed(scores).masked_fill(~block.visible, -math.inf)
        block_lse = block.lse(scores)
        scores -= block_lse.masked_fill(block_lse == -math.inf, 0.0)[..., None]
        block.write(out, torch.einsum("hgmn,nhd->mhgd", block.dropped(scores.exp_()), block.v.double()))
        block.write_lse(lse, block_lse)
    return out, lse


def eager(q, k, v, *, scale=None, causal=False, window=None, softcap=0.0, lse_dtype=None, **functions):
    """``(out, lse)`` of plain PyTorch attention, every step of it in the inputs' dtype.

    ``lse`` is the log-sum-exp of those scores, not rounded to the dtype again: float32 (float64 for float64 inputs).
    With ``lse_dtype`` its scores are computed in that dtype instead. A row that sees no key has zeros and −inf.
    """
    exact = _exact(q.dtype)
    out, lse = _outputs(q, v, q.dtype, exact)
    for block in _row_blocks(q, k, v, causal, window, **functions):
        scores = _scores(block, scale, softcap)
        block.write(out, _weighted(scores, block))
        if lse_dtype is not None:
            scores = _scores(block.to(lse_dtype), scale, softcap)
        block.write_lse(lse, block.lse(scores.to(exact)))
    return out, lse


def _scores(block, scale, softcap):
    """A block's scores, (heads_kv, group, rows, sk), in its dtype; −inf where a row does not see a key."""
    scale = 1.0 / math.sqrt(block.q.shape[3]) if scale is None else scale
    scores = torch.einsum("mhgd,nhd->hgmn", block.q, block.k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return block.changed(scores).masked_fill(~block.visible, -math.inf)


def _weighted(scores, block):
    """softmax(scores)·V, (rows, heads_kv, group, dv); 0 in a row that sees no key."""
    keys, visible = scores.shape[-1], block.visible.any(-1, keepdim=True)
    if block.sinks is not None:
        scores = torch.cat((scores, block.sinks.to(scores).expand(*scores.shape[:-1], 1)), -1)
    P = block.dropped(torch.where(visible, scores.softmax(-1)[..., :keys], 0.0))
    return torch.einsum("hgmn,nhd->mhgd", P, block.v)


def oracle_gradients(q, k, v, dout, dlse=None, **rules):
    """``(dq, dk, dv)`` of eager attention in float64; ``dlse`` None is zeros. ``rules`` are those of :func:`oracle`.

    A log-sum-exp of −inf is a constant: its gradient does not count.

    ``functions`` are ``mask(batch, head, q_idx, kv_idx)``, ``score(score, batch, …)``, ``sinks`` (heads), and of dropout
    ``weight(batch, head, q_idx, kv_idx)``, by which a probability is multiplied.
    """
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    return eager_gradients(q, k, v, dout, None if dlse is None else dlse.double(), **rules)


def eager_gradients(q, k, v, dout, dlse=None, *, scale=None, causal=False, window=None, softcap=0.0, **functions):
    """``(dq, dk, dv)`` of plain PyTorch attention by autograd, every step of it in the inputs' dtype."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v))
    for block in _row_blocks(q, k, v, causal, window, MAX_SCORES // 4, **functions):
        leaves = [x.detach().requires_grad_() for x in (block.q, block.k, block.v)]
        with torch.enable_grad():
            scores = _scores(block.of(*leaves), scale, softcap)
            outputs = [_weighted(scores, block.of(*leaves))]
            if dlse is not None:
                outputs.append(block.lse(scores.to(dlse.dtype)))
        dq_block, dk_block, dv_block = torch.autograd.grad(outputs, leaves, block.read_gradients(dout, dlse))
        block.write(dq, dq_block)
        dk[block.batch] += dk_block
        dv[block.batch] += dv_block
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def captured_gradients(captured, q, k, v, dout, dlse=None, *, scale=None, causal=False, window=None, softcap=0.0, **functions):
    """Those of the tensors ``captured``, which the functions read, in float64: of plain PyTorch attention by autograd, every
    step of it in the inputs' dtype."""
    found = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in captured]
    for block in _row_blocks(q, k, v, causal, window, MAX_SCORES // 4, **functions):
        with torch.enable_grad():
            scores = _scores(block, scale, softcap)
            outputs = [_weighted(scores, block)]
            if dlse is not None:
                outputs.append(block.lse(scores.to(dlse.dtype)))
            gradients = torch.autograd.grad(outputs, captured, block.read_gradients(dout, dlse), allow_unused=True)
        for total, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return found


def assert_captured_gradients_close(gradients, captured, make, q, k, v, dout, dlse=None, **rules):
    """Assert that ``gradients`` are those of the tensors ``captured`` under the rules and ``make(*captured)``, more of them,
    by the tolerance of :func:`assert_gradients_close`. Of 16-bit inputs: there rounding them makes nearly all of plain
    attention's error."""
    results = []
    for dtype in (torch.float64, None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in captured]
        inputs = [x if x is None or dtype is None else x.to(dtype) for x in (q, k, v, dout, dlse)]
        results.append(captured_gradients(leaves, *inputs, **{**rules, **make(*leaves)}))
    for i, (got, of, true, plain) in enumerate(zip(gradients, captured, *results, strict=True)):
        _check(f"the gradient of captured tensor {i}", got, of.dtype, true, TIMES_PLAIN[q.dtype] * (plain - true).abs())


def _rounding_of_gradients(q, k, v, dout, dlse=None, *, scale=None, causal=False, window=None, softcap=0.0, **functions):
    """The error of (dq, dk, dv) to expect, in units of rounding, from rounding the sums over head_dim: to first order, and
    independent errors add up in squares. A rounded score or log-sum-exp changes P by as much, relative to P.

    A running sum of n terms t is a random walk that is rounded n times, each time by 1/√12 of a unit: Σ c·t²/12 over
    c = 1 … n, or n/24 times the sum of the squares of its terms.
    """
    squares = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in (q, k, v)]
    factor = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    walk, walk_v = (max(1.0, x.shape[3] / 24) for x in (q, v))
    for block in _row_blocks(*(x.double() for x in (q, k, v)), causal, window, MAX_SCORES // 4, **functions):
        dO, *dLSE = (x.double() for x in block.read_gradients(dout, dlse))
        scores = _scores(block, scale, softcap)
        lse = block.lse(scores)[..., None]
        lse.masked_fill_(lse == -math.inf, 0.0)
        P = (scores - lse).exp()
        dP = block.dropped(torch.einsum("mhgd,nhd->hgmn", dO, block.v))
        terms = dO * _weighted(scores, block)
        delta = terms.sum(-1).movedim(0, -1) - sum(dLSE)
        Q, K, V, dO = (x.square() for x in (block.q, block.k, block.v, dO))
        in_P = 1.0 + torch.einsum("mhgd,nhd->hgmn", Q, K) * (factor**2 * walk) + lse.square() + scores.square()
        in_P = P.square() * in_P.masked_fill(~block.visible, 0.0)
        in_delta = terms.square().sum(-1).movedim(0, -1) * walk_v + sum(dLSE) ** 2
        in_dP = block.dropped(block.dropped(torch.einsum("mhgd,nhd->hgmn", dO, V))) * walk_v + in_delta[..., None]
        in_dS = (in_P * (dP - delta[..., None]).square() + P.square() * in_dP) * factor**2
        block.write(squares[0], torch.einsum("hgmn,nhd->mhgd", in_dS, K))
        squares[1][block.batch] += torch.einsum("hgmn,mhgd->nhd", in_dS, Q)
        squares[2][block.batch] += torch.einsum("hgmn,mhgd->nhd", block.dropped(block.dropped(in_P)), dO)
    return [x.sqrt() for x in squares]


def assert_close(result, q, k, v, *, scale=None, causal=False, window=None, softcap=0.0, lse_dtype=None, **functions):
    """Assert that ``result``, an output or ``(out, lse)``, is attention of q, k, v with these rules.

    The error of each element, less the rounding of the element to the result's dtype, may be at most ``TIMES_PLAIN``
    times the error of :func:`eager`, in the largest and in the root mean square. The log-sum-exp is float32 (float64
    for float64 inputs) and rounded as such; ``lse_dtype=torch.float32`` compares it with that of float32 scores, which
    is much stricter than that of scores in the inputs' dtype. Rows that see no key must be exactly 0 and −inf.
    """
    out, lse = result if isinstance(result, tuple) else (result, None)
    rules = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, **functions}
    true_out, true_lse = oracle(q, k, v, **rules)
    allowed_out, allowed_lse = _allowed(q, k, v, true_out, true_lse, rules, lse_dtype)

    _check("out", out, q.dtype, true_out, allowed_out)
    sees = true_lse != -math.inf
    assert not out[~sees.transpose(1, 2)].count_nonzero(), "out is not 0 in a row that sees no key"
    if lse is not None:
        assert lse.shape == sees.shape, f"lse has shape {tuple(lse.shape)}, expected {tuple(sees.shape)}"
        assert torch.equal(lse == -math.inf, ~sees), "lse is not −inf in exactly the rows that see no key"
        _check("lse", lse.where(sees, 0.0), _exact(q.dtype), true_lse.where(sees, 0.0), allowed_lse.where(sees, 0.0))


def assert_gradients_close(gradients, q, k, v, dout, dlse=None, **rules):
    """Assert that ``gradients``, ``(dq, dk, dv)`` with None for what was not asked for, are those of attention of q, k, v
    with these rules (of :func:`oracle`) where the gradients of its outputs are ``dout`` and ``dlse``.

    The error of each element, less its rounding, may be at most ``TIMES_PLAIN`` times the error of
    :func:`eager_gradients`, in the largest and in the root mean square. A row that sees no key, and a key that no row
    sees, must have exactly 0.
    """
    true = oracle_gradients(q, k, v, dout, dlse, **rules)
    allowed = _allowed_gradients(q, k, v, dout, dlse, true, rules)
    unseen_rows, unseen_keys = _unseen(q, k, rules.get("causal", False), rules.get("window"), rules.get("mask"))
    names = ("dq", "dk", "dv"), (unseen_rows, unseen_keys, unseen_keys)
    for got, *expected in zip(gradients, *names, true, allowed, strict=True):
        if got is not None:
            name, unseen, true_gradient, allowed_gradient = expected
            _check(name, got, q.dtype, true_gradient, allowed_gradient)
            assert not got[unseen].count_nonzero(), f"{name} is not 0 where no key or row is seen"


def _allowed_gradients(q, k, v, dout, dlse, true, rules):
    """The error of plain PyTorch attention's gradients, or that of rounding where it is larger, times TIMES_PLAIN."""
    inputs, exact = (q, k, v, dout, dlse), _exact(q.dtype)
    times, times_rounding = TIMES_PLAIN[q.dtype], TIMES_PLAIN[exact] * torch.finfo(exact).eps
    rounding = _rounding_of_gradients(*inputs, **rules)
    if q.dtype == torch.float64:  # as in _allowed
        inputs = tuple(x if x is None else x.float() for x in inputs)
        times = (times + 1) * torch.finfo(exact).eps / torch.finfo(torch.float32).eps
        true = oracle_gradients(*inputs, **rules)
    plain = eager_gradients(*inputs, **rules)
    candidates = [(times * (p.double() - t).abs(), times_rounding * r) for p, t, r in zip(plain, true, rounding, strict=True)]
    return [max(errors, key=lambda error: error.square().sum()) for errors in candidates]


def _allowed(q, k, v, true_out, true_lse, rules, lse_dtype):
    """The error of plain PyTorch attention times TIMES_PLAIN, element by element: ``(out, lse)``."""
    times, times_lse = TIMES_PLAIN[q.dtype], TIMES_PLAIN[lse_dtype or q.dtype]
    if q.dtype != torch.float64:
        out, lse = eager(q, k, v, **rules, lse_dtype=lse_dtype)
        return times * (out.double() - true_out).abs(), times_lse * (lse.double() - true_lse).abs()
    # The error of float64 can't be measured against float64. But rounding errors scale with the unit of rounding: it is
    # that of float32, scaled. Once more, because the oracle has an error of that size as well.
    q, k, v = (x.float() for x in (q, k, v))
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    pairs = zip(eager(q, k, v, **rules), oracle(q, k, v, **rules), strict=True)
    return tuple((times + 1) * ratio * (plain.double() - true).abs() for plain, true in pairs)


def _check(name, got, dtype, true, allowed):
    """The tolerance: |got − true|, less the rounding of ``true`` to dtype, is at most ``allowed``, in the two norms."""
    assert got.shape == true.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    assert got.dtype == dtype, f"{name} is {got.dtype}, expected {dtype}"
    assert got.device == true.device, f"{name} lies on {got.device}, expected {true.device}"
    if got.numel() == 0:
        return
    error = (got.double() - true).abs()
    assert error.isfinite().all(), f"{name} has {int((~error.isfinite()).sum())} of {error.numel()} elements not finite"
    finfo = torch.finfo(dtype)
    # Half a unit in the last place, at least half of the smallest subnormal number.
    rounding = (true.abs() * (finfo.eps / 2)).clamp_(min=finfo.smallest_normal * finfo.eps / 2)
    beyond = (error - rounding).clamp_(min=0.0)
    where = tuple(int(i) for i in torch.unravel_index(beyond.argmax(), got.shape))
    assert beyond.max() <= allowed.max(), (
        f"{name}{list(where)} is {got[where].item():.6g}, expected {true[where].item():.6g}: an error of "
        f"{error[where].item():.3g}; allowed by plain PyTorch's is {allowed.max().item():.3g}, by rounding "
        f"{rounding[where].item():.3g}; {int((beyond > allowed.max()).sum())} of {got.numel()} elements are off"
    )
    rms, rms_allowed = (x.square().mean().sqrt().item() for x in (beyond, allowed))
    assert rms <= rms_allowed, (
        f"{name} is off by {rms:.3g} beyond rounding in the root mean square; allowed by plain PyTorch's is {rms_allowed:.3g}"
    )


@dataclass(frozen=True)
class _RowBlock:
    """Some rows of one batch element: q (rows, heads_kv, group, d), all of its k and v, and what the rows see."""

    batch: int
    rows: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor  # (rows, sk), bool, or (heads_kv, group, rows, sk)
    score: Callable | None = None  # of what becomes of a score
    places: tuple = ()  # batch, head, row and key, which broadcast to (heads_kv, group, rows, sk)
    sinks: torch.Tensor | None = None  # (heads_kv, group, 1, 1)
    weight: torch.Tensor | None = None  # of probabilities, (heads_kv, group, rows, sk)

    def changed(self, scores):
        return scores if self.score is None else self.score(scores, *self.places).to(scores.dtype)

    def dropped(self, P):
        return P if self.weight is None else P * self.weight.to(P.dtype)

    def lse(self, scores):
        lse = scores.logsumexp(-1)
        if self.sinks is None:
            return lse
        return torch.logaddexp(lse, self.sinks.to(lse)[..., 0]).where(self.visible.any(-1), -math.inf)

    def of(self, q, k, v) -> _RowBlock:
        return replace(self, q=q, k=k, v=v)

    def to(self, dtype) -> _RowBlock:
        return self.of(*(x.to(dtype) for x in (self.q, self.k, self.v)))

    def read_gradients(self, dout, dlse):
        """[dout, dlse] of the block, of the shapes of its output and log-sum-exp; [dout] where dlse is None."""
        _, heads_kv, group, _ = self.q.shape
        dout = dout[self.batch, self.rows].unflatten(1, (heads_kv, group))
        if dlse is None:
            return [dout]
        dlse = dlse[self.batch, :, self.rows].unflatten(0, (heads_kv, group))
        return [dout, dlse.where(self.visible.any(-1), 0.0)]

    def write(self, out, value):  # (rows, heads_kv, group, dv)
        out[self.batch, self.rows] = value.flatten(1, 2)

    def write_lse(self, lse, value):  # (heads_kv, group, rows)
        lse[self.batch, :, self.rows] = value.flatten(0, 1)


def _row_blocks(
    q, k, v, causal, window, max_scores=None, mask=None, score=None, sinks=None, weight=None
) -> Iterator[_RowBlock]:
    """All rows of q in blocks of at most MAX_SCORES scores, or ``max_scores``; none where there are no scores."""
    batch, sq, heads, _ = q.shape
    sk, heads_kv = k.shape[1], k.shape[2]
    if 0 in (batch, sq, heads, sk):
        return
    step = max(1, (max_scores or MAX_SCORES) // (heads * sk))
    for b in range(batch):
        for first in range(0, sq, step):
            rows = slice(first, min(first + step, sq))
            visible = _visible(rows, sq, sk, causal, window, q.device)
            block = _RowBlock(b, rows, q[b, rows].unflatten(1, (heads_kv, -1)), k[b], v[b], visible)
            if mask is score is sinks is weight is None:
                yield block
                continue
            head, row, key = (torch.arange(n, device=q.device) for n in (heads, sq, sk))
            head = head.view(heads_kv, -1, 1, 1)
            places = torch.full_like(head, b), head, row[rows, None], key
            if mask is not None:
                visible = (visible & mask(*places)).expand(heads_kv, heads // heads_kv, -1, -1)
            sinks_here = None if sinks is None else sinks.view(heads_kv, -1, 1, 1)
            weights = None if weight is None else weight(*places)
            yield replace(block, visible=visible, score=score, places=places, sinks=sinks_here, weight=weights)


def _visible(rows, sq, sk, causal, window, device):
    """The mask, (rows, sk): query i sees ``left`` keys before its aligned key i + sk − sq, and ``right`` after it."""
    left, right = (-1 if side is None else side for side in (window or (None, None)))
    ahead = torch.arange(sk, device=device) - (torch.arange(rows.start, rows.stop, device=device)[:, None] + sk - sq)
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        visible &= ahead <= 0
    if left >= 0:
        visible &= ahead >= -left
    if right >= 0:
        visible &= ahead <= right
    return visible


def _unseen(q, k, causal, window, mask=None):
    """``(rows, keys)``, bool: the rows that see no key and the keys that no row sees, of each batch element and head."""
    sq, sk = q.shape[1], k.shape[1]
    if mask is not None:
        of_rows, of_keys = (torch.ones(x.shape[:3], dtype=torch.bool, device=q.device) for x in (q, k))
        for block in _row_blocks(q, k, k, causal, window, mask=mask):
            visible = block.visible
            of_rows[block.batch, block.rows] = ~visible.any(-1).flatten(0, 1).T
            of_keys[block.batch] &= ~visible.any(1).any(1).T
        return of_rows, of_keys
    rows, keys = (torch.ones(n, dtype=torch.bool, device=q.device) for n in (sq, sk))
    step = max(1, MAX_SCORES // max(sk, 1))
    for first in range(0, sq, step):
        part = slice(first, min(first + step, sq))
        visible = _visible(part, sq, sk, causal, window, q.device)
        rows[part] = ~visible.any(1)
        keys &= ~visible.any(0)
    return (slice(None), rows), (slice(None), keys)


def _exact(dtype):
    """The dtype of the log-sum-exp, and of the sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _outputs(q, v, dtype, lse_dtype):
    """Zeros and −inf: what a row that sees no key has, and every row where there is no key."""
    batch, sq, heads, _ = q.shape
    out = torch.zeros(batch, sq, heads, v.shape[3], dtype=dtype, device=q.device)
    return out, torch.full((batch, heads, sq), -math.inf, dtype=lse_dtype, device=q.device)
