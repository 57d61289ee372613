"""Attention to a cache by the kernels: one launch, or two where there are new keys; many queries go to the kernels of
``launch.py``.

Besides the output a call allocates nothing that it does not keep: a workspace for partial results (``balance.py``), one for
each stream of a device, which grows with the largest call. What a CUDA graph records gets one of its own, so that graphs may be
replayed on any streams. With rotary tables the turned queries are allocated, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch

from cute_attn import launch, rules
from cute_attn.launch import as_read, device_target, prepared
from cute_attn.layouts import for_target
from cute_attn.layouts.mma_sync_cache import ROWS
from cute_attn.lengths import Lengths
from cute_attn.plan import plan
from cute_attn.private import current_device, raw_stream
from cute_attn.problem import DTYPE_NAMES, NOTHING, USUAL_CAP, Call, Problem, check_for_kernels, check_strides, is_aligned
from cute_attn.stored import UNIT_TILES, UNITS_MAX, Stored

MANY_QUERIES = 256  # of each sequence: from here on arithmetic takes longer than reading keys
GATHERED_MAX = 1 << 30  # bytes of keys and values that are gathered for these
_workspaces: dict[tuple, tuple] = {}


def forward(call: Call, mechanism: str | None, return_lse: bool, q, k_cache, v_cache, in_graph: bool = False):
    """``(out, lse)`` of a checked call, on the current stream; lse is None if not asked for. ``in_graph``: by the
    operator, which keeps no memory, since what it allocates may be a CUDA graph's."""
    check_for_kernels(q.dtype, call)
    q = q if is_aligned(q) else check_strides("q", q)
    k_cache = k_cache if is_aligned(k_cache) else check_strides("k_cache", k_cache)
    v_cache = v_cache if is_aligned(v_cache) else check_strides("v_cache", v_cache)
    stored = call.stored
    assert stored is not None
    device = q.get_device()
    packed = stored.cu_seqlens_q is not None
    nothing = not (k_cache.numel() and v_cache.numel())
    if stored.k_new is not None and not nothing:
        q = _append(call, q, k_cache, v_cache, device)
    if nothing or not q.numel():
        return _nothing_seen(call, return_lse, q, packed)
    if _goes_to_many(call, mechanism, k_cache, v_cache, device, packed):
        return _many(call, mechanism, return_lse, q, k_cache, v_cache)

    right, group = call.right, call.heads // call.heads_kv
    if right is not None and right >= call.seqlen_q - 1 and not packed:
        right = None  # the last query sees the last key, and the first one, too
    queries = -(-call.seqlen_q // max(stored.batch, 1)) if packed else call.seqlen_q
    rows = next((n for n in ROWS if n >= queries * group), ROWS[-1])
    problem = Problem.intern(
        *(DTYPE_NAMES[q.dtype], call.head_dim, call.head_dim_v, call.left is not None, right is not None, call.softcap > 0.0),
        *(return_lse, "", False, False, call.softcap > USUAL_CAP, "", call.sinks is not None, call.expression or NOTHING, ""),
        *(rows, stored.names, stored.batch_invariant),
    )
    function, blocks = prepared(problem, None, device)
    out = q.new_empty((*q.shape[:-1], call.head_dim_v))
    lse = None
    if return_lse:
        of_rows = (call.heads, call.seqlen_q) if packed else (call.batch, call.heads, call.seqlen_q)
        lse = q.new_empty(of_rows, dtype=torch.float32)
    stream = raw_stream(device)
    units, places, counters = 0, 2 * blocks, blocks
    if stored.batch_invariant:
        units, places, counters = _units(call, rows, group, _tile_n(problem, device))
    rows_kept = rows if packed else min(rows, queries * group)
    sizes = places, rows_kept, call.head_dim_v, counters
    workspace = _made(q, *sizes) if in_graph else _workspace(q, device, stream, *sizes)
    scale_log2, scale_by_cap = rules.score_scales(call.scale, call.softcap)
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    captured = tuple(map(as_read, call.captured)) if call.captured else None
    numbers = stored.seqlen_new, units, call.left or 0, right or 0, scale_log2, scale_by_cap, blocks, stream
    where = stored.lengths, stored.page_table, stored.cache_batch_idx, stored.leftpad_k
    bounds = stored.cu_seqlens_q, stored.cu_seqlens_k_new
    _run(function, device, (q, k_cache, v_cache, out, lse, *workspace, sinks, captured, *where, *bounds, *numbers))
    return out, lse


def _run(function, device: int, arguments: tuple) -> None:
    if current_device() == device:
        function(*arguments)
    else:
        with torch.cuda.device(device):
            function(*arguments)


def _append(call: Call, q, k_cache, v_cache, device: int):
    """Write the new keys and values into the cache; returns q, or the turned one."""
    stored = call.stored
    assert stored is not None
    assert stored.k_new is not None
    assert stored.v_new is not None
    new = tuple(x if is_aligned(x) else check_strides(n, x) for n, x in (("k_new", stored.k_new), ("v_new", stored.v_new)))
    turned, how, begin = None, "as they are", None
    angles: tuple = None, None
    if stored.rotary is not None:
        turned, angles, begin = torch.empty_like(q, memory_format=torch.contiguous_format), stored.rotary, stored.rotary_begin
        how = "interleaved" if stored.rotary_interleaved else "halves"
    if not (new[0].numel() or (turned is not None and q.numel())):
        return q
    names = stored.names if begin is None else f"{stored.names} rotary_begin"
    problem = _appending(
        DTYPE_NAMES[q.dtype], call.head_dim, call.head_dim_v, call.left is not None, call.right is not None, names, how
    )
    function, _ = prepared(problem, None, device)
    where = stored.lengths, stored.page_table, stored.cache_batch_idx, stored.leftpad_k
    bounds = stored.cu_seqlens_q, stored.cu_seqlens_k_new
    queries = (None, None) if turned is None else (q, turned)
    arguments = (k_cache, v_cache, *new, *queries, *angles, begin, *where, *bounds, stored.seqlen_new, raw_stream(device))
    _run(function, device, arguments)
    return q if turned is None else turned


@lru_cache(maxsize=256)
def _appending(dtype: str, head_dim: int, head_dim_v: int, left: bool, right: bool, stored: str, how: str) -> Problem:
    edges = left and how != "as they are", right and how != "as they are"
    return Problem(dtype, head_dim, head_dim_v, *edges, stored=stored, appends=how)


def _nothing_seen(call: Call, return_lse: bool, q, packed: bool):
    out = q.new_zeros((*q.shape[:-1], call.head_dim_v))
    of_rows = (call.heads, q.shape[0]) if packed else (call.batch, call.heads, call.seqlen_q)
    return out, q.new_full(of_rows, -math.inf, dtype=torch.float32) if return_lse else None


# ---- the workspace ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _tile_n(problem: Problem, device: int) -> int:
    return plan(problem, device_target(device)).tile_n


def _units(call: Call, rows: int, group: int, tile_n: int) -> tuple[int, int, int]:
    """Where keys are split at fixed places: ``(units of a walk at most, of all walks, walks)``, as ``balance.py`` counts
    them."""
    stored = call.stored
    assert stored is not None
    packed = stored.cu_seqlens_q is not None
    all_rows = (call.seqlen_q if packed else call.seqlen_q * stored.batch) * group
    walks = (all_rows // rows + stored.batch + 2) * call.heads_kv
    units = min(UNITS_MAX, -(-max(-(-stored.capacity // tile_n), 1) // UNIT_TILES))
    return units, walks * units, walks


def _workspace(q, device: int, stream: int, places: int, rows: int, columns: int, counters: int) -> tuple:
    """``(partial O, partial rows' maxima and sums, counters)``, the counters zeros, as every call leaves them."""
    key = device, stream, places, rows, columns, counters
    if torch.cuda.is_current_stream_capturing():
        return _made(q, places, rows, columns, counters)
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = _made(q, places, rows, columns, counters)
    return found


def _made(q, places: int, rows: int, columns: int, counters: int) -> tuple:
    floats = q.new_empty(places, rows, columns, dtype=torch.float32), q.new_empty(places, rows, 2, dtype=torch.float32)
    return *floats, q.new_zeros(counters, dtype=torch.int32)


# ---- many queries ----------------------------------------------------------------------------------------------------


def _goes_to_many(call: Call, mechanism: str | None, k_cache, v_cache, device: int, packed: bool) -> bool:
    """Whether the kernels for many queries compute: where the host knows that each sequence has many."""
    best = next(iter(for_target(device_target(device)).MECHANISMS))
    if mechanism is not None or packed or call.seqlen_q < MANY_QUERIES:
        return mechanism not in (None, "cp_async")
    row = k_cache.element_size() * call.heads_kv * (call.head_dim + call.head_dim_v)
    return best != "cp_async" and call.batch * call.seqlen_k * row <= GATHERED_MAX


def _many(call: Call, mechanism: str | None, return_lse: bool, q, k_cache, v_cache):
    """The same by :func:`cute_attn.launch.forward`, of ragged sequences: what is not one sequence after another is gathered."""
    stored = call.stored
    assert stored is not None
    packed, batch, capacity = stored.cu_seqlens_q is not None, stored.batch, stored.capacity
    lengths = stored.lengths.clamp(0, capacity)
    pads = None if stored.leftpad_k is None else torch.minimum(stored.leftpad_k.clamp(min=0), lengths)
    if stored.k_new is not None:
        new = stored.seqlen_new if stored.cu_seqlens_k_new is None else stored.cu_seqlens_k_new.diff()
        lengths = (lengths + new).clamp(max=capacity)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * capacity
    if pads is not None:
        lengths = lengths - pads
        bounds[:batch] += pads
    k, v = (_gathered(stored, cache) for cache in (k_cache, v_cache))
    of_them = replace(
        call,
        batch=1,
        seqlen_q=q.shape[0] if packed else batch * call.seqlen_q,
        seqlen_k=k.shape[0],
        lengths=Lengths(batch, (stored.cu_seqlens_q, bounds, None, lengths)),
        stored=None,
    )
    out, lse, _ = launch.forward(of_them, mechanism, return_lse, False, q if packed else q.flatten(0, 1), k, v)
    if packed:
        return out, lse
    if lse is not None:
        lse = lse.unflatten(1, (batch, call.seqlen_q)).transpose(0, 1)
    return out.unflatten(0, (batch, call.seqlen_q)), lse


def _gathered(stored: Stored, cache: torch.Tensor) -> torch.Tensor:
    """All rows of the sequences one after another: a view where they are so already."""
    if stored.page_table is not None:
        cache = cache[stored.page_table.clamp(0, cache.shape[0] - 1)].flatten(0, 1)
    elif stored.cache_batch_idx is not None:
        cache = cache[stored.cache_batch_idx.clamp(0, cache.shape[0] - 1)]
    return cache.flatten(0, 1)



