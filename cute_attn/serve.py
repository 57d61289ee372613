"""Attention to a cache by the kernels: one launch, or two where there are new keys; many queries go to the kernels of
``launch.py``.

Besides the output, and with rotary tables the turned queries, a call allocates nothing that it does not keep
(``workspace.py``): room for partial results (``balance.py``).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from cute_attn import launch, rules
from cute_attn.launch import as_read, check_have_memory, contiguous, device_target, prepared, run
from cute_attn.layouts import for_target
from cute_attn.layouts.mma_sync_cache import OF_ROW, ROWS, columns_written
from cute_attn.lengths import Lengths
from cute_attn.plan import plan
from cute_attn.private import current_device, empty_strided, raw_stream
from cute_attn.problem import DTYPE_NAMES, Call, Problem, check_for_kernels, check_strides, problem_of
from cute_attn.stored import UNITS_MAX, Stored, unit_tiles
from cute_attn.workspace import Workspaces

MANY_QUERIES = 256  # of each sequence: from here on arithmetic takes longer than reading keys
GATHERED_MAX = 1 << 30  # bytes of keys and values that are gathered for these
_workspaces = Workspaces(torch.float32)


class Step:
    """A call that has been checked and planned, for all calls with tensors of the same shapes and dtypes and with the same
    rules: what the kernels are given besides tensors.

    What else they need of tensors, which are on their device, strides and alignment, the launcher looks at itself; it raises
    before it launches anything.
    """

    __slots__ = ("append", "device", "function", "numbers", "out", "rows", "size")

    def __init__(self, call: Call, return_lse: bool, q):
        stored = call.stored
        assert stored is not None
        self.device, self.out = q.get_device(), contiguous(q.dtype, *q.shape[:-1], call.head_dim_v)
        packed = stored.packed
        right, group = call.right, call.heads // call.heads_kv
        if right is not None and right >= call.seqlen_q - 1 and not packed:
            right = None  # the last query sees the last key, and the first one, too
        queries = -(-call.seqlen_q // max(stored.batch, 1)) if packed else call.seqlen_q
        rows = next((n for n in ROWS if n >= queries * group), ROWS[-1])
        if packed and stored.batch_invariant:  # how many queries a sequence has says the device; the mean is the batch's
            rows = ROWS[-1]
        of_cache = {"rows": rows, "stored": stored.names, "invariant": stored.batch_invariant}
        problem = replace(problem_of(q.dtype, call, return_lse), bounded_right=right is not None, **of_cache)
        self.function, blocks = prepared(problem, None, self.device)
        config = plan(problem, device_target(self.device))
        blocks = even_blocks(blocks, stored.batch * call.heads_kv * -(-queries * group // rows), config.walk_blocks)
        units, places, counters = 0, 2 * blocks, blocks
        if stored.batch_invariant:
            units, places, counters = _units(call, stored, rows, group, config.tile_n)
        rows_kept = rows if packed else min(rows, queries * group)
        self.size = counters, places * rows_kept * (columns_written(call.head_dim_v) + OF_ROW)
        self.rows = None
        if return_lse:
            self.rows = contiguous(torch.float32, *(() if packed else (call.batch,)), call.heads, call.seqlen_q)
        scales = rules.score_scales(call.scale, call.softcap)
        self.numbers = stored.seqlen_new, units, places, rows_kept, call.left or 0, right or 0, *scales, blocks
        self.append = None if stored.k_new is None else _appending(call, stored, q)

    def __call__(self, q, k_cache, v_cache, where: tuple, new: tuple | None, sinks, captured):
        """``(out, lse)``, on the current stream. ``where`` is as in ``stored.NAMES``, without the last, and ``new`` (k_new,
        v_new, cos, sin, rotary_begin)."""
        check_have_memory(q, k_cache, v_cache)
        if new is not None and new[0].numel():
            check_have_memory(q, *new[:2])
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self(q, k_cache, v_cache, where, new, sinks, captured)
        stream = raw_stream(self.device)
        if self.append is not None and new is not None:
            q = _append(self.append, q, k_cache, v_cache, where, new, self.numbers[0], stream)
        out = empty_strided(*self.out)
        lse = None if self.rows is None else empty_strided(*self.rows)
        workspace = _workspaces.of(q, self.device, stream, *self.size)
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
        room = workspace.words, workspace.counters
        arguments = q, k_cache, v_cache, out, lse, *room, sinks, captured, *where, *self.numbers, stream
        run(self.function, arguments)
        return out, lse


def forward(call: Call, mechanism: str | None, return_lse: bool, q, k_cache, v_cache):
    """``(out, lse, step)`` of a checked call, on the current stream; lse is None if not asked for, and ``step`` what computes
    calls like this one, if one launch for attention is all that there is to them."""
    check_for_kernels(q.dtype, call)
    stored = call.stored
    assert stored is not None
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_new": stored.k_new, "v_new": stored.v_new}
    q, k_cache, v_cache, k_new, v_new = (x if x is None else check_strides(name, x) for name, x in given.items())
    where, new = stored.where, None
    if k_new is not None:
        new = k_new, v_new, *(stored.rotary or (None, None)), stored.rotary_begin if stored.rotary else None
    device = q.get_device()
    nothing = not (q.numel() and k_cache.numel() and v_cache.numel())
    if nothing or _goes_to_many(call, stored, mechanism, (k_cache, v_cache), device):
        if new is not None and k_cache.numel() and v_cache.numel():
            how = _appending(call, stored, q), q, k_cache, v_cache, where, new, stored.seqlen_new, raw_stream(device)
            with torch.cuda.device(device):
                q = _append(*how)
        if nothing:
            of_rows = (call.heads, q.shape[0]) if stored.packed else (call.batch, call.heads, call.seqlen_q)
            lse = q.new_full(of_rows, -math.inf, dtype=torch.float32) if return_lse else None
            return q.new_zeros((*q.shape[:-1], call.head_dim_v)), lse, None
        return *_many(call, stored, mechanism, return_lse, q, k_cache, v_cache), None
    step = Step(call, return_lse, q)
    captured = tuple(map(as_read, call.captured)) if call.captured else None
    return *step(q, k_cache, v_cache, where, new, call.sinks, captured), step


def _append(function: tuple, q, k_cache, v_cache, where: tuple, new: tuple, seqlen_new: int, stream: int):
    """Write the new keys and values into the cache; returns q, or the turned one."""
    launch_append, turns = function
    k_new, v_new, cos, sin, rotary_begin = new
    turned = torch.empty_like(q, memory_format=torch.contiguous_format) if turns else None
    if k_new.numel() or (turns and q.numel()):
        queries = (q, turned) if turns else (None, None)
        arguments = k_cache, v_cache, k_new, v_new, *queries, cos, sin, rotary_begin, *where, seqlen_new, stream
        run(launch_append, arguments)
    return turned if turns else q


def _appending(call: Call, stored: Stored, q) -> tuple:
    """The compiled kernel that writes new keys, and whether it turns queries."""
    turns = stored.rotary is not None
    how = ("interleaved" if stored.rotary_interleaved else "halves") if turns else "as they are"
    names = stored.names if not turns or stored.rotary_begin is None else f"{stored.names} rotary_begin"
    edges = turns and call.left is not None, turns and call.right is not None
    problem = Problem(DTYPE_NAMES[q.dtype], call.head_dim, call.head_dim_v, *edges, stored=names, appends=how)
    return prepared(problem, None, q.get_device())[0], turns


def even_blocks(blocks: int, walks: int, of_cluster: int = 1) -> int:
    """The most blocks, of so many or up to a sixteenth fewer, on which ``walks`` of one length come out even: blocks have whole
    ones, or walks whole blocks. Fewer results are partial then; and memory is the limit, which fewer blocks reach, too. They
    are whole clusters."""
    blocks -= blocks % of_cluster
    fewer = range(blocks, blocks - blocks // 16 - 1, -of_cluster)
    return next((n for n in fewer if walks and (n % walks == 0 or walks % n == 0)), blocks)


def _units(call: Call, stored: Stored, rows: int, group: int, tile_n: int) -> tuple[int, int, int]:
    """Where keys are split at fixed places: ``(units of a walk at most, of all walks, walks)``, as ``balance.py`` counts
    them."""
    all_rows = (call.seqlen_q if stored.packed else call.seqlen_q * stored.batch) * group
    walks = (all_rows // rows + stored.batch + 2) * call.heads_kv
    units = min(UNITS_MAX, -(-max(-(-stored.capacity // tile_n), 1) // unit_tiles(rows)))
    return units, walks * units, walks


# ---- many queries ----------------------------------------------------------------------------------------------------


def _goes_to_many(call: Call, stored: Stored, mechanism: str | None, caches: tuple, device: int) -> bool:
    """Whether the kernels for many queries compute: where the host knows that each sequence has many."""
    if mechanism is not None or stored.packed or call.seqlen_q < MANY_QUERIES:
        return mechanism not in (None, "cp_async")
    if next(iter(for_target(device_target(device)).MECHANISMS)) == "cp_async":
        return False
    gathers = not stored.page_table is stored.cache_batch_idx is None
    gathers = gathers or any(x.stride(0) != x.shape[1] * x.stride(1) for x in caches)
    row = caches[0].element_size() * call.heads_kv * (call.head_dim + call.head_dim_v)
    # An invariant step may not depend on how much there is to gather for the others.
    return not gathers or stored.batch_invariant or call.batch * call.seqlen_k * row <= GATHERED_MAX


def _many(call: Call, stored: Stored, mechanism: str | None, return_lse: bool, q, k_cache, v_cache):
    """The same by :func:`cute_attn.launch.forward`, of ragged sequences: what is not one sequence after another is gathered."""
    packed, batch, capacity = stored.packed, stored.batch, stored.capacity
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
