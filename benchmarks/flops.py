"""How work is counted: FLOPs and bytes of a case, as the field counts them, so that rates can be laid side by side.

**FLOPs.** A query–key pair that is seen costs ``2 · head_dim`` in S = QKᵀ and ``2 · head_dim_v`` in O = PV; the softmax
counts as nothing. Forward: ``batch · heads · pairs · 2 · (head_dim + head_dim_v)``, which is ``4 · b · h · s² · d`` for
square problems. Backward runs five products of that kind instead of two: 2.5 times the forward. ``both`` is their sum.

**Pairs.** ``seqlen_q · seqlen_k`` where everything is seen. A causal square counts exactly half of that (the field's
convention; the diagonal makes it ``s/2`` more). Every other band is counted pair by pair; packed sequences one by one.
Of padded ones the rows in use are counted, and nothing else.

**Bytes.** Each tensor once, as if caches were perfect: forward reads Q, K, V and writes O. Backward reads Q, K, V, O,
dO and the log-sum-exp (float32, one per query and head) and writes dQ, dK, dV.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from benchmarks.cases import DTYPE_BYTES, Case

DIRECTION_FACTOR = {"forward": 1.0, "recorded": 1.0, "backward": 2.5, "both": 3.5}


def pairs(case: Case) -> float:
    """Query–key pairs that are seen, for one head of one batch entry."""
    case = case.in_use
    if case.packed:
        one = replace(case, packed=())
        return sum(count * pairs(replace(one, seqlen_q=n, seqlen_k=n)) for n, count in Counter(case.packed).items())
    left, right = case.edges
    sq, sk = case.seqlen_q, case.seqlen_k
    if left is None and right is None:
        return float(sq * sk)
    if left is None and right == 0 and sq == sk:
        return sq * sk / 2
    shift = sk - sq
    seen = 0
    for row in range(sq):
        first = 0 if left is None else max(row + shift - left, 0)
        last = sk - 1 if right is None else min(row + shift + right, sk - 1)
        seen += max(last - first + 1, 0)
    return float(seen)


def flops(case: Case) -> float:
    """Floating-point operations of one call in the case's direction."""
    forward = case.batch * case.heads * pairs(case) * 2 * (case.head_dim + case.head_dim_v)
    return forward * DIRECTION_FACTOR[case.direction]


def bytes_moved(case: Case) -> int:
    """The fewest bytes that one call moves through device memory."""
    case, size = case.in_use, DTYPE_BYTES[case.dtype]
    q, k, v, o = (math.prod(case.shape_of(name)) * size for name in ("q", "k", "v", "out"))
    lse = case.batch * case.heads * case.seqlen_q * 4
    forward = q + k + v + o
    backward = (q + k + v + o + o + lse) + (q + k + v)
    recorded = forward + lse
    return {"forward": forward, "recorded": recorded, "backward": backward, "both": recorded + backward}[case.direction]
