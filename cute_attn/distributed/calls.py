"""What users call: attention of shards, and what is done for it in words."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.compiler import disable
from torch.utils.weak import WeakTensorKeyDictionary

from cute_attn import api, autocast, autograd, launch, reference, wrapped
from cute_attn.arguments import choice, flag, integer, shown
from cute_attn.distributed import costs
from cute_attn.distributed.agreement import agree, refuse
from cute_attn.distributed.ring import ALONE, Engine, Members, Ring
from cute_attn.distributed.schedule import ORDERS, Packed, Shards
from cute_attn.distributed.shards import Places, length_of, places_of
from cute_attn.distributed.ulysses import copies, to_heads, to_rows
from cute_attn.lengths import Lengths, check_lengths
from cute_attn.plan import mechanism_name
from cute_attn.private import any_autocast_enabled, assert_on_device, dual_level, version_of
from cute_attn.problem import Call, check_call, check_sinks, edges_of
from cute_attn.rules import score_scales

METHODS = ("auto", "ring", "ulysses")
_packed_of = WeakTensorKeyDictionary()  # of cu_seqlens: (version, rows, its values then if on a GPU, Packed)
UNCOUNTED = (  # a GPU takes fewer than 255 characters
    "cute_attn: cu_seqlens has other values than when it was read, and torch has counted no change, as of what collectives or "
    "numpy write: pass cu_seqlens.clone(), or a new tensor for other sequences"
)


@disable(reason="attention over several ranks talks to them in the order of Python's calls: a graph would break here anyway")
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *, group=None, mesh=None, method: str = "auto", order: str | None = None, seqlen: int | None = None,
    seqlen_k: int | None = None, cu_seqlens: torch.Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None, return_lse: bool = False, deterministic: bool = False, backend: str = "auto",
    mechanism: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """:func:`cute_attn.attention` of sequences that are sharded over ranks: q, k, v and the results are this rank's shards.

    All ranks call it alike, with equally many rows, and all run the backward pass. The first call of a kind compares shapes
    and rules between the ranks; with ``CUTE_ATTN_CHECK=1`` in the environment every call does.

    Args:
        q: ``(batch, rows, heads, head_dim)``, as :func:`shard` gives them; ``(rows, heads, head_dim)`` of packed sequences.
        k: ``(batch, rows_k, heads_kv, head_dim)``.
        v: ``(batch, rows_k, heads_kv, head_dim_v)``.
        group: the process group whose ranks share the sequence; ``None`` is the default one.
        mesh: a ``DeviceMesh`` in the place of a group: of one dimension, or of two, the ring's first, that of heads second.
        method: ``"ring"``: keys and values travel, or queries where that is less to send, each step's transfer under the
            computation of the one before; ``"ulysses"``: the sequence is exchanged for heads, which must be a multiple of the
            ranks, and back; or ``"auto"``: the faster one on paper, see :func:`explain`. A mesh of two dimensions uses both.
        order: of the rows, :func:`shard`'s; ``None`` is ``"zigzag"``, of DTensors ``"contiguous"``.
        seqlen: of the whole sequence, without padding; ``None`` is all ranks' rows.
        seqlen_k: the same of the keys; ``None`` is q's where there are as many rows, else all ranks' rows.
        cu_seqlens: of packed sequences, int32 ``(batch + 1,)`` on q's device, as :func:`cute_attn.attention_varlen` takes them:
            bounds in all rows, the same on all ranks. They are read back, once for a tensor that isn't changed. torch counts no
            change of what a collective receives: on a GPU pass a new tensor, or its clone, for other sequences; an assertion
            there says so.
        sinks: floats ``(heads,)``, the same on all ranks. A rank's gradient is its rows' (or heads') part, and the sum over the
            ranks the whole one, as of any parameter.

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
        if sinks is not None:
            raise NotImplementedError(
                "sinks are given with DTensors; tensors of each rank's own are needed: try x.to_local() of q, k and v, with "
                "order='contiguous'"
            )
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
        arranged = _arranged(q, k, v, places, method, order, seqlen, seqlen_k, cu_seqlens, rules)
        return_lse, engine = flag("return_lse", return_lse), _engine(q, k, v, arranged.ring.call, how)
        if sinks is not None:
            check_sinks(sinks, q, q.shape[-2])
            wrapped.check_read(sinks=sinks)
        if dual_level() >= 0:
            api.refuse_tangents(q, k, v, sinks)
    except (TypeError, ValueError, RuntimeError) as error:
        for members in places:
            refuse(members, error, q.device if isinstance(q, torch.Tensor) else torch.device("cpu"))
        raise
    for members in places:
        agree(members, arranged.fields | how | _shapes(q, k, v) | {"sinks": sinks is not None}, q.device)
    heads, (of_q, of_k) = arranged.heads, arranged.exchanged
    if cu_seqlens is not None:
        q, k, v = q[None], k[None], v[None]
    if heads.size > 1:
        times = copies(k.shape[2], heads.size)
        if times > 1:
            k, v = k.repeat_interleave(times, 2), v.repeat_interleave(times, 2)
        q, k, v = to_heads(q, heads, of_q), to_heads(k, heads, of_k), to_heads(v, heads, of_k)
    ring = arranged.ring
    lengths = None if cu_seqlens is None else Lengths(len(cu_seqlens) - 1, (cu_seqlens, cu_seqlens, None, None))
    call = replace(ring.call, lengths=lengths, passes=(partial(ring.forward, engine), partial(ring.gradients, engine)))
    out, lse = autograd.Attention.apply(q, k, v, call)
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks.tensor_split(heads.size)[heads.rank])
    if heads.size > 1:
        out = to_rows(out, heads, of_q)
        if return_lse:
            lse = to_rows(lse.transpose(1, 2).unsqueeze(-1), heads, of_q).squeeze(-1).transpose(1, 2)
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _with_sinks(out, lse, sinks):
    """What one more logit s, without a value, makes of a row: O · exp(L − L') and L' = ln(exp L + exp s). A row that sees no
    key has zeros and −∞ still."""
    sinks, unseen = sinks.to(lse.dtype)[:, None], lse == -torch.inf
    lse = lse.masked_fill(unseen, 0.0)  # −∞ − (−∞), of a sink that is none, would make a NaN
    weight = (lse - sinks).sigmoid().transpose(1, 2).unsqueeze(-1)
    return (out * weight).to(out.dtype), torch.logaddexp(lse, sinks).masked_fill(unseen, -torch.inf)


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    *, ranks: int, method: str = "auto", order: str | None = None, seqlen: int | None = None,
    seqlen_k: int | None = None, cu_seqlens: torch.Tensor | None = None, scale: float | None = None,
    causal: bool = False, window: tuple[int | None, int | None] | None = None, softcap: float | None = None,
) -> str:  # fmt: skip
    """What :func:`attention` does with such shards on ``ranks`` ranks, and why: in words, without any process or value, so that
    q, k and v may be on the device ``"meta"``. Costs are on paper (docs/context-parallelism.md). Arguments and errors are
    :func:`attention`'s."""
    ranks = integer("ranks", ranks, "how many share the sequence")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; at least 1 is needed: how many share the sequence")
    rules = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    arranged = _arranged(q, k, v, Places(Members(None, 0, ranks)), method, order, seqlen, seqlen_k, cu_seqlens, rules)
    ring = arranged.ring
    lines = [f"{arranged.fields['method']}: {arranged.reason}", *(f"  {found}" for found in arranged.found)]
    if ring.members.size > 1:
        last, turned = ranks - 1, ring.queries_travel
        travels = f"{'queries and their results' if turned else 'keys and values'} travel, which is less to send"
        lines.append(f"  {ring.q.rows} rows a rank, in {ring.q.order} order; {travels}; the last rank's steps:")
        for there in range(last, -1, -1):
            calls = "; ".join(map(str, ring.pieces(last, there)))
            lines.append(f"    {'queries' if turned else 'keys'} of rank {there}: {calls or 'nothing is seen, nothing sent'}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Arrangement:
    """What is done: ``heads`` exchange the sequence for heads, of which ``exchanged`` says which rows of q and k each has; what
    they have then is a shard of the ``ring``."""

    ring: Ring
    heads: Members
    exchanged: tuple[Shards, Shards]
    fields: dict[str, object]  # what has to be the same on all ranks
    reason: str
    found: tuple[costs.Costs, ...]


def _arranged(q, k, v, places: Places, method, order, seqlen, seqlen_k, cu_seqlens, rules: dict) -> Arrangement:
    method, order = choice("method", method, METHODS), "zigzag" if order is None else choice("order", order, ORDERS)
    packs = cu_seqlens is not None
    window, causal = rules["window"], rules["causal"]
    call = check_call(q, k, v, rules["scale"], causal, None, rules["softcap"], packs)
    length_q = _length("seqlen", seqlen, call.seqlen_q, places, order)
    if seqlen_k is None and call.seqlen_q == call.seqlen_k:
        seqlen_k = length_q
    length_k = _length("seqlen_k", seqlen_k, call.seqlen_k, places, order)
    left, right = edges_of(flag("causal", causal), (None, None) if window is None else window, length_q + length_k)
    shift = length_k - length_q
    band = None if left is None else shift - left, None if right is None else shift + right
    packed = _packed(q, cu_seqlens, length_q, length_k) if packs else None
    exchanging = places.ring.size if places.heads is ALONE else places.heads.size
    no_ulysses = call.heads % exchanging and (
        f"q has {call.heads} heads and {exchanging} ranks exchange the sequence for them; a multiple is needed: try "
        f"method='ring'"
    )
    reason, found = "asked for", tuple[costs.Costs, ...]()
    sizes = costs.Sizes(call.batch, call.heads, call.heads_kv, call.head_dim + call.head_dim_v, q.element_size())
    if places.heads is not ALONE:
        if method != "auto":
            raise ValueError(
                f"method is {method!r} and mesh has two dimensions, which use both; 'auto' is needed: leave it out, or pass "
                f"one dimension of the mesh"
            )
        method, reason = "ring of ulysses", f"a mesh of {places.ring.size} × {places.heads.size}"
    else:
        whole = places.shards(length_q, order), places.shards(length_k, order)
        ways = (costs.of_ring,) if no_ulysses else (costs.of_ring, costs.of_ulysses)
        found = tuple(of(*whole, band, packed, sizes, costs.card_of(exchanging)) for of in ways)
        if method == "auto":
            method = min(found, key=lambda one: one.seconds).method
            reason = f"not ulysses: {no_ulysses}" if no_ulysses else "the faster one on paper"
        if method == "ulysses":
            places = Places(ALONE, places.ring)
    heads = places.heads
    if heads.size > 1 and no_ulysses:
        raise ValueError(no_ulysses)
    bounds = packed and f"{len(packed.bounds) - 1} sequences, of hash {hash(packed.bounds):x}"
    fields = {"method": method, "order": order, "seqlen": length_q, "seqlen_k": length_k, "cu_seqlens": bounds}
    fields |= {"left": left, "right": right, "scale": call.scale, "softcap": call.softcap}
    if method == "ulysses":
        sharded = Shards(length_q, 1, "contiguous"), Shards(length_k, 1, "contiguous")
        exchanged = Shards(length_q, heads.size, order), Shards(length_k, heads.size, order)
    else:
        sharded = places.shards(length_q, order), places.shards(length_k, order)
        exchanged = Shards(sharded[0].rows, heads.size, "contiguous"), Shards(sharded[1].rows, heads.size, "contiguous")
    of_kv = call.heads_kv * copies(call.heads_kv, heads.size) // heads.size
    call = replace(call, heads=call.heads // heads.size, heads_kv=of_kv)
    turned = costs.queries_travel(*sharded, sizes._replace(heads=call.heads, heads_kv=of_kv))
    return Arrangement(Ring(places.ring, *sharded, call, band, packed, turned), heads, exchanged, fields, reason, found)


def _packed(q: torch.Tensor, cu_seqlens, length_q: int, length_k: int) -> Packed:
    """Where packed sequences begin, read back from the device."""
    beside = cu_seqlens if q.is_meta and isinstance(cu_seqlens, torch.Tensor) else q  # explain() needs no values but these
    check_lengths(beside, None, (cu_seqlens, cu_seqlens, None, None)).check_values((length_q, length_k))
    if length_q != length_k:
        raise ValueError(
            f"seqlen is {length_q} and seqlen_k is {length_k} with cu_seqlens, which are q's and k's alike; equal ones are "
            f"needed: pack keys as queries are packed"
        )
    was = version_of(cu_seqlens), length_q
    *known, read, packed = _packed_of.get(cu_seqlens, (None, None, None, None))
    if cu_seqlens.is_cuda and tuple(known) == was and was[0] is not None:
        assert_on_device((cu_seqlens == read).all(), UNCOUNTED)
        return packed
    read = cu_seqlens.clone() if cu_seqlens.is_cuda else None  # on a CPU to read costs nothing, and is done each time
    bounds = tuple(min(max(bound, 0), length_q) for bound in cu_seqlens.tolist())
    if packed is None or packed.bounds != bounds:
        packed = Packed(bounds)
    _packed_of[cu_seqlens] = *was, read, packed
    return packed


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


def _engine(q, k, v, call: Call, how: dict) -> Engine:
    backend, mechanism = choice("backend", how["backend"], api.BACKENDS), mechanism_name(how["mechanism"])
    deterministic = flag("deterministic", how["deterministic"])
    if not wrapped.are_read(q, k, v, None):
        raise TypeError(
            f"q, k, v are {shown(q)}, {shown(k)}, {shown(v)}, which torch traces or which have no values; ranks exchange "
            f"values, so tensors that have some are needed: try cute_attn.distributed.explain, for which shapes are enough"
        )
    if api.computed_by_reference(backend, mechanism, q):
        return Engine(reference.PASSES, reference.merge, 1.0, -torch.inf)
    passes = launch.passes(False, mechanism, deterministic)
    return Engine(passes, launch.merge, score_scales(call.scale, call.softcap)[0], torch.inf)


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
    call = check_call(q, k, v, *(options[name] for name in ("scale", "causal", "window", "softcap")))
    attend = partial(attention, group=mesh.get_group(dim), order="contiguous", **options)
    return wrapped.of_shards(attend, q, k, v, call)
