"""What users call: attention of shards, and what is done for it in words."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch.compiler import disable

from cute_attn import api, autocast, launch, reference, wrapped
from cute_attn.arguments import flag, integer, name_of, shown
from cute_attn.distributed import costs
from cute_attn.distributed.agreement import agree, refuse
from cute_attn.distributed.ring import ALONE, LseUnit, Members, Ring, RingAttention
from cute_attn.distributed.schedule import Shards, pieces
from cute_attn.distributed.shards import Places, length_of, order_of, places_of
from cute_attn.distributed.ulysses import copies, to_heads, to_rows
from cute_attn.lengths import check_lengths
from cute_attn.plan import mechanism_name
from cute_attn.private import any_autocast_enabled
from cute_attn.problem import Call, check_call, edges_of

METHODS = ("auto", "ring", "ulysses")
_NO_RULES = {"scale": None, "causal": False, "window": None, "softcap": None}
_ONE_METHOD = f"one of {', '.join(map(repr, METHODS))} is needed"


@disable(reason="attention over several ranks talks to them in the order of Python's calls: a graph would break here anyway")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group=None,
    mesh=None,
    method: str = "auto",
    order: str | None = None,
    seqlen: int | None = None,
    seqlen_k: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    mechanism: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`cute_attn.attention` of sequences that are sharded over ranks: q, k, v and the results are this rank's shards.

    All ranks call it alike, with equally many rows, and all run the backward pass. The first call of a kind compares shapes
    and rules between the ranks; with ``CUTE_ATTN_CHECK=1`` in the environment every call does.

    Args:
        q: ``(batch, rows, heads, head_dim)``, as :func:`shard` gives them; ``(rows, heads, head_dim)`` of packed sequences.
        k: ``(batch, rows_k, heads_kv, head_dim)``.
        v: ``(batch, rows_k, heads_kv, head_dim_v)``.
        group: the process group whose ranks share the sequence; ``None`` is the default one.
        mesh: a ``DeviceMesh`` in the place of a group: of one dimension, or of two, the ring's first, that of heads second.
        method: ``"ring"``: queries stay, keys and values travel, each step's transfer under the computation of the one before;
            ``"ulysses"``: the sequence is exchanged for heads, which must be a multiple of the ranks, and back; or
            ``"auto"``: the faster one on paper, see :func:`explain`. A mesh of two dimensions uses both.
        order: of the rows, :func:`shard`'s; ``None`` is ``"zigzag"``, of DTensors ``"contiguous"``.
        seqlen: of the whole sequence, without padding; ``None`` is all ranks' rows.
        seqlen_k: the same of the keys; ``None`` is q's where there are as many rows, else all ranks' rows.
        cu_seqlens: of packed sequences, int32 ``(batch + 1,)`` on q's device, as :func:`cute_attn.attention_varlen` takes them:
            bounds in the whole sequence, the same on all ranks. With several ranks in the ring these take no ``window``.

    All others are those of :func:`cute_attn.attention`. DTensors are taken whose sequence (dimension 1) is sharded on one
    dimension of their mesh, whose ranks are then the group; on others they may be sharded by batch or heads, or replicated.
    torch.compile breaks its graph here.

    Returns:
        ``out``, ``(batch, rows, heads, head_dim_v)`` in q's dtype; with ``return_lse`` also ``lse``, ``(batch, heads, rows)``;
        of packed sequences without a batch. Rows of padding are zeros and −inf.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`cute_attn.attention` does; a ValueError also where the ranks
            differ, which names those that do.
        RuntimeError: another rank refused its first call.

    Algorithm: ring attention (Liu et al., arXiv:2310.01889), in zigzag order; DeepSpeed-Ulysses (arXiv:2309.14509).
    """
    if any_autocast_enabled():
        q, k, v = autocast.cast(q), autocast.cast(k), autocast.cast(v)
    rules = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    how = {"return_lse": return_lse, "deterministic": deterministic, "backend": backend, "mechanism": mechanism}
    if any(wrapped.is_dtensor(x) for x in (q, k, v)):
        if group is not None or mesh is not None or cu_seqlens is not None or order not in (None, "contiguous"):
            raise TypeError(
                "DTensors are given with group, mesh, cu_seqlens, or an order that isn't contiguous; they say themselves who "
                "shares the sequence, in contiguous order: leave these out, or pass x.to_local()"
            )
        sizes = {"method": method, "seqlen": seqlen, "seqlen_k": seqlen_k}
        return _of_dtensors(q, k, v, {**sizes, **rules, **how})
    q, k, v = map(wrapped.finished, (q, k, v))
    places = places_of(group, mesh)
    try:
        plan = _plan(q, k, v, places, method, order, seqlen, seqlen_k, cu_seqlens, rules)
        return_lse, ring = flag("return_lse", return_lse), _ring(q, k, v, plan, cu_seqlens, how)
    except (TypeError, ValueError, NotImplementedError) as error:
        for members in places:
            refuse(members, error, q.device if isinstance(q, torch.Tensor) else torch.device("cpu"))
        raise
    for members in places:
        agree(members, plan.fields | how | _shapes(q, k, v), q.device)
    packed, heads, (of_q, of_k) = cu_seqlens is not None, plan.places.heads, plan.exchanged
    if packed:
        q, k, v = q[None], k[None], v[None]
    if heads.size > 1:
        times = copies(k.shape[2], heads.size)
        if times > 1:
            k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        q, k, v = to_heads(q, heads, of_q), to_heads(k, heads, of_k), to_heads(v, heads, of_k)
    out, lse = RingAttention.apply(q, k, v, cu_seqlens, ring)
    if heads.size > 1:
        out = to_rows(out, heads, of_q)
        if return_lse:
            lse = to_rows(lse.transpose(1, 2).unsqueeze(-1), heads, of_q).squeeze(-1).transpose(1, 2)
    if packed:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def explain(q, k, v, *, ranks: int, method="auto", order=None, seqlen=None, seqlen_k=None, **rules) -> str:
    """What :func:`attention` does with such shards on ``ranks`` ranks, and why: in words, without any process or value; tensors
    may be on the device ``"meta"``. Costs are on paper (docs/context-parallelism.md). Arguments, of which ``rules`` are
    ``scale``, ``causal``, ``window`` and ``softcap``, and errors are :func:`attention`'s."""
    ranks = integer("ranks", ranks, "how many share the sequence")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; at least 1 is needed: how many share the sequence")
    unknown = sorted(rules.keys() - _NO_RULES.keys())
    if unknown:
        raise TypeError(f"{', '.join(unknown)} is given; rules are {', '.join(_NO_RULES)}: leave others out")
    plan = _plan(q, k, v, Places(Members(None, 0, ranks)), method, order, seqlen, seqlen_k, None, _NO_RULES | rules)
    lines = [f"{plan.fields['method']}: {plan.reason}", *(f"  {found}" for found in plan.found)]
    if plan.places.ring.size > 1:
        (of_q, of_k), last = plan.sharded, ranks - 1
        lines.append(f"  {of_q.rows} rows a rank, in {of_q.order} order; the last rank's steps:")
        for step in range(ranks):
            there = (last - step) % ranks
            steps = pieces(of_q, of_k, last, there, *plan.band)
            calls = "; ".join(
                f"rows {p.rows.start} to {p.rows.stop} × keys {p.keys.start} to {p.keys.stop}"
                f"{', under the band' * (p.edges != (None, None))}"
                for p in steps
            )
            lines.append(f"    keys of rank {there}: {calls or 'nothing is seen, nothing sent'}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """What is done: ``places`` says who is in the ring and who exchanges heads, ``sharded`` which rows of q and k the ring's
    ranks have, ``exchanged`` the same of those that exchange heads; ``call`` is the ring's, ``band`` the whole sequence's."""

    places: Places
    sharded: tuple[Shards, Shards]
    exchanged: tuple[Shards, Shards]
    call: Call
    band: tuple[int | None, int | None]
    fields: dict[str, object]  # what has to be the same on all ranks
    reason: str
    found: tuple[costs.Costs, ...]


def _plan(q, k, v, places: Places, method, order, seqlen, seqlen_k, cu_seqlens, rules: dict) -> Plan:
    method = name_of("method", method, _ONE_METHOD)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; {_ONE_METHOD}")
    order, packed = "zigzag" if order is None else order_of(order), cu_seqlens is not None
    window, causal = rules["window"], rules["causal"]
    call = check_call(q, k, v, rules["scale"], causal, None, rules["softcap"], packed)
    length_q = _length("seqlen", seqlen, call.seqlen_q, places, order)
    if seqlen_k is None and call.seqlen_q == call.seqlen_k:
        seqlen_k = length_q
    length_k = _length("seqlen_k", seqlen_k, call.seqlen_k, places, order)
    left, right = edges_of(flag("causal", causal), (None, None) if window is None else window, length_q + length_k)
    shift = length_k - length_q
    band = None if left is None else shift - left, None if right is None else shift + right
    if packed:
        check_lengths(q, None, (cu_seqlens, cu_seqlens, None, None)).check_values((length_q, length_k))
        if length_q != length_k:
            raise ValueError(
                f"seqlen is {length_q} and seqlen_k is {length_k} with cu_seqlens, which are q's and k's alike; equal ones are "
                f"needed: pack keys as queries are packed"
            )
    impossible = {}
    if packed and (left is not None or right not in (None, 0)):
        impossible["ring"] = (
            f"window is ({left}, {right}) with cu_seqlens, whose sequences the band would cut at places that only the device "
            f"knows; on a ring none, or causal, is needed: try method='ulysses'"
        )
    ranks = places.ring.size if places.heads is ALONE else places.heads.size
    if call.heads % ranks:
        impossible["ulysses"] = (
            f"q has {call.heads} heads and {ranks} ranks exchange the sequence for them; a multiple is needed: try "
            f"method='ring'"
        )
    reason, found = "asked for", tuple[costs.Costs, ...]()
    if places.heads is not ALONE:
        if method != "auto":
            raise ValueError(
                f"method is {method!r} and mesh has two dimensions, which use both; 'auto' is needed: leave it out, or pass "
                f"one dimension of the mesh"
            )
        method, reason = "ring of ulysses", f"a mesh of {places.ring.size} × {places.heads.size}"
        needed = ["ring"] * (places.ring.size > 1) + ["ulysses"] * (places.heads.size > 1)
    else:
        whole = places.shards(length_q, order), places.shards(length_k, order)
        paper = {"ring": costs.of_ring, "ulysses": costs.of_ulysses}
        sizes = costs.Sizes(call.batch, call.heads, call.heads_kv, call.head_dim + call.head_dim_v, q.element_size())
        arguments = *whole, band, sizes, costs.card_of(ranks)
        found = tuple(paper[name](*arguments) for name in paper if name not in impossible)
        if method == "auto":
            method, reason = min(found, key=lambda one: one.seconds).method if found else "ring", "the faster one on paper"
            reason = next((f"not {name}: {why}" for name, why in impossible.items()), reason)
        needed = [method] if ranks > 1 else []
        if method == "ulysses":
            places = Places(ALONE, places.ring)
    for name in needed:
        if name in impossible:
            raise ValueError(impossible[name])
    fields = {"method": method, "order": order, "seqlen": length_q, "seqlen_k": length_k, "packed": packed and len(cu_seqlens)}
    fields |= {"left": left, "right": right, "scale": call.scale, "softcap": call.softcap}
    heads = places.heads
    if method == "ulysses":
        sharded = Shards(length_q, 1, "contiguous"), Shards(length_k, 1, "contiguous")
        exchanged = Shards(length_q, heads.size, order), Shards(length_k, heads.size, order)
    else:
        sharded = places.shards(length_q, order), places.shards(length_k, order)
        exchanged = Shards(sharded[0].rows, heads.size, "contiguous"), Shards(sharded[1].rows, heads.size, "contiguous")
    of_kv = call.heads_kv * copies(call.heads_kv, heads.size) // heads.size
    call = replace(call, heads=call.heads // heads.size, heads_kv=of_kv)
    return Plan(places, sharded, exchanged, call, band, fields, reason, found)


def _length(name: str, given, rows: int, places: Places, order: str) -> int:
    """A sequence's length, of which each rank has so many rows."""
    ranks = places.ring.size * places.heads.size
    length = rows * ranks if given is None else length_of(name, given)
    if (needed := places.rows(length, order)) != rows:
        raise ValueError(
            f"{name} is {length} and each of {ranks} ranks has {rows} rows; {needed} are needed in {order} order, padding "
            f"included: try shard(), and {name}= the length of what it was given"
        )
    return length


def _ring(q, k, v, plan: Plan, cu_seqlens, how: dict) -> Ring:
    backend, mechanism = api.backend_name(how["backend"]), mechanism_name(how["mechanism"])
    deterministic = flag("deterministic", how["deterministic"])
    if not wrapped.are_read(q, k, v, None):
        raise TypeError(
            f"q, k, v are {shown(q)}, {shown(k)}, {shown(v)}, which torch traces or which have no values; ranks exchange "
            f"values, so tensors that have some are needed: try cute_attn.distributed.explain, for which shapes are enough"
        )
    on_reference = api.computed_by_reference(backend, mechanism, q)
    passes = api.REFERENCE if on_reference else launch.passes(False, mechanism, deterministic)
    together, unit = reference.merge if on_reference else launch.merge, LseUnit.of(plan.call, on_reference)
    return Ring(plan.places.ring, *plan.sharded, plan.call, plan.band, passes, together, unit, cu_seqlens is not None)


def _shapes(q, k, v) -> dict[str, object]:
    """What has to be the same on all ranks of the tensors."""
    gradient = {x: ", with a gradient" if torch.is_grad_enabled() and x.requires_grad else "" for x in (q, k, v)}
    return {name: f"{tuple(x.shape)}, {x.dtype}{gradient[x]}" for name, x in zip("qkv", (q, k, v), strict=True)}


def _of_dtensors(q, k, v, options: dict):
    """The same of DTensors whose dimension 1 is sharded: of what each rank has, wrapped again."""
    distributed = sys.modules[wrapped.DTENSORS]
    inputs = {"q": q, "k": k, "v": v}
    kinds = {name: f"{type(x).__name__}{getattr(x, 'placements', '')}" for name, x in inputs.items()}
    same = all(wrapped.is_dtensor(x) for x in inputs.values()) and q.device_mesh == k.device_mesh == v.device_mesh
    by_sequence = [dim for dim, at in enumerate(q.placements) if at == distributed.Shard(1)] if same else []
    others = (distributed.Shard(0), distributed.Shard(1), distributed.Shard(2), distributed.Replicate())
    alike = same and q.placements == k.placements == v.placements and set(q.placements) <= set(others)
    if not alike or len(by_sequence) != 1:
        raise ValueError(
            f"q, k, v are {kinds}; DTensors of one mesh with equal placements are needed, of which one is Shard(1), the "
            f"sequence, and the others are Shard(0), Shard(2) or Replicate(): try x.redistribute(placements=…), or "
            f"cute_attn.attention where the sequence is not sharded"
        )
    mesh, dim = q.device_mesh, by_sequence[0]
    if any(x.shape[1] % mesh.size(dim) for x in inputs.values()):
        raise ValueError(
            f"DTensors have {q.shape[1]} queries and {k.shape[1]} keys on {mesh.size(dim)} ranks; multiples are needed, since "
            f"all ranks must have equally many rows: try shard(), which pads, and its plain tensors with seqlen"
        )
    call = check_call(q, k, v, *(options[name] for name in _NO_RULES))
    wrapped.check_shards_of_heads(call, mesh, q.placements)
    local = [x.to_local() for x in inputs.values()]
    results = attention(*local, group=mesh.get_group(dim), order="contiguous", **options)
    of_lse = {distributed.Shard(1): distributed.Shard(2), distributed.Shard(2): distributed.Shard(1)}  # (batch, heads, rows)
    return wrapped.whole(results, call, mesh, q.placements, [of_lse.get(at, at) for at in q.placements])
