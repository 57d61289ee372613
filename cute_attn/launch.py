"""From torch's tensors to a kernel on the caller's device and stream.

tvm-ffi launches (a compiled kernel's callable is a function of its), cuda-python answers questions about the device.
Nothing here synchronises, and the forward pass allocates nothing but its outputs, and tickets where sequences are ragged or
have block masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from cute_attn import dropout, rules
from cute_attn.compile import compiled
from cute_attn.expressions import Expression
from cute_attn.fields import counts_tiles, has_sums, walks_over_keys
from cute_attn.layouts import family, target_of
from cute_attn.layouts.base import COUNTERS, ROW_PADDING
from cute_attn.layouts.tma import ROWS_PER_WARPGROUP
from cute_attn.plan import configs, head_blocks, plan, takes_tickets
from cute_attn.private import current_device, raw_stream
from cute_attn.problem import (
    DTYPE_NAMES,
    HEAD_DIM_STEP,
    Call,
    Problem,
    check_strides,
    check_tensors_for_gpu,
    is_aligned,
    problem_of,
)

NO_LENGTHS = (None, None, None, None, 0)


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device."""
    try:
        from cuda.bindings import runtime
    except ImportError as missing:
        raise NotImplementedError(
            f"cuda-python can't be imported ({missing}); the kernels are launched with it: "
            f"try pip install cuda-python, or backend='reference'"
        ) from missing
    error, count = runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrMultiProcessorCount, device)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA can't tell device {device}'s multiprocessors ({error.name}): is it visible to the process?")
    return count


def capture_of(stream: int) -> int:
    """The number of the capture that records a stream, which no other capture of the process has."""
    from cuda.bindings import runtime

    error, _, number, *_ = runtime.cudaStreamGetCaptureInfo(stream)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA can't tell which capture records the current stream ({error.name}): is it still going on?")
    return int(number)


@lru_cache(maxsize=64)
def device_target(device: int) -> str:
    """The compiler's target of a device. Raises ``NotImplementedError`` for a GPU that no layouts module serves."""
    return target_of(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=4096)
def prepared(problem: Problem, mechanism: str | None, device: int, head_blocks: int = 1) -> tuple[Callable, int]:
    """The compiled kernel of a problem on a device, and how many of its blocks the device holds at once."""
    config = plan(problem, device_target(device), mechanism)
    if head_blocks != config.head_blocks:
        config = replace(config, head_blocks=head_blocks)
    return compiled(problem, config), multiprocessors(device) * config.blocks_per_multiprocessor


@lru_cache(maxsize=4096)
def sums_of(problem: Problem, mechanism: str | None, device: int) -> tuple[int, int, int] | None:
    """``(rows of a tile, its pieces, values of a piece)`` of dQ's float32 sums in memory; ``None`` where there are none."""
    config = plan(problem, device_target(device), mechanism)
    if not has_sums(problem, config):
        return None
    return config.tile_m, len(family(config).pieces(config)), math.prod(family(config).piece_shape(config))


@lru_cache(maxsize=4096)
def _counts(problem: Problem, mechanism: str | None, device: int) -> bool:
    """Whether each query tile has a counter in memory."""
    return counts_tiles(problem, plan(problem, device_target(device), mechanism))


@lru_cache(maxsize=4096)
def tiles_of_lists(problem: Problem, mechanism: str | None, device: int) -> tuple[int, int, int]:
    """``(tile_m, tile_n, rows)`` of the tiles that a block mask lists; ``rows`` are those of the query tiles that walk over
    keys, in the backward pass 0 where none do."""
    config = plan(problem, device_target(device), mechanism)
    if not problem.gradients:
        return config.tile_m, config.tile_n, config.tile_m
    rows = family(config).warpgroups(config) * ROWS_PER_WARPGROUP if walks_over_keys(problem, config) else 0
    return config.tile_m, config.tile_n, rows


@lru_cache(maxsize=4096)
def _sharing(problem: Problem, mechanism: str | None, device: int) -> tuple[int, tuple[int, ...]]:
    """``(rows of a key tile, how many blocks may share one)`` in the backward pass."""
    found = configs(problem, device_target(device), mechanism)
    return found[0].tile_n, tuple(config.head_blocks for config in found)


def _head_blocks(problem: Problem, mechanism: str | None, device: int, call: Call) -> int:
    """How many blocks share a key tile of the backward pass of ``call``."""
    if call.heads == call.heads_kv:
        return 1
    tile, choices = _sharing(problem, mechanism, device)
    tiles = -(-call.seqlen_k // tile) if call.lengths is None else call.lengths.slots(call.seqlen_k, tile)
    unequal = problem.bounded_right and not problem.bounded_left
    heads_per_kv = call.heads // call.heads_kv
    return head_blocks(choices, tiles * call.heads_kv * call.batch, heads_per_kv, multiprocessors(device), unequal)


@lru_cache(maxsize=4096)
def tile_of_tickets(problem: Problem, mechanism: str | None, device: int) -> int:
    """Rows of the tiles for which the forward pass's blocks draw tickets; 0 where they don't."""
    config = plan(problem, device_target(device), mechanism)
    return config.tile_m if takes_tickets(problem, config) else 0


def passes(return_lse: bool, mechanism: str | None, deterministic: bool) -> tuple[Callable, Callable]:
    """The kernels' forward and backward pass, as :class:`cute_attn.autograd.Attention` calls them."""
    deterministic = bool(deterministic or torch.are_deterministic_algorithms_enabled())

    def forward_pass(q, k, v, call):
        return forward(call, mechanism, return_lse, True, q, k, v)

    def backward_pass(q, k, v, out, lse_raw, dout, dlse, call, needs):
        return gradients(call, mechanism, needs, deterministic, q, k, v, out, lse_raw, dout, dlse)

    return forward_pass, backward_pass


def forward(call: Call, mechanism: str | None, return_lse: bool, for_backward: bool, q, k, v):
    """``(out, lse, lse_raw)``, the last for the backward pass; None for what is not asked for. Plan, compile or look up, and
    launch. Allocates these and, where tiles' costs are known on the device only, an int32 a tile; nothing else."""
    how = return_lse, for_backward, mechanism
    if call.plans and (planned := call.plans.get(how)) is not None:
        try:
            return _forward_as_planned(planned, call, return_lse, for_backward, q, k, v)
        except (TypeError, ValueError, RuntimeError):
            pass  # what the launcher refuses, before it launches anything, is looked at below
    q, k, v = check_tensors_for_gpu(q, k, v, call)
    out, lse, lse_raw = _room_of_results(call, return_lse, for_backward, q)
    if call.empty:  # the backward pass won't look at lse_raw either
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return out, lse, lse_raw
    device = q.get_device()
    problem = problem_of(q.dtype, call, return_lse, for_backward=for_backward)
    function, blocks = prepared(problem, mechanism, device)
    tickets = None
    if (call.lengths or call.blocks) is not None and (tile := tile_of_tickets(problem, mechanism, device)):
        slots = -(-call.seqlen_q // tile) * call.batch if call.lengths is None else call.lengths.slots(call.seqlen_q, tile)
        tickets = q.new_empty(1 + slots * call.heads, dtype=torch.int32)
    key_lists = None
    if call.blocks is not None:
        tile_m, tile_n, _ = tiles_of_lists(problem, mechanism, device)
        key_lists = call.blocks.key_lists(tile_m, tile_n, call.batch, call.heads)
    launch(function, blocks, device, call, q, k, v, out, lse, lse_raw, tickets, key_lists)
    if call.plans is not None:
        call.plans[how] = function, device, _besides_tensors(call, blocks)
    return out, lse, lse_raw


def _room_of_results(call: Call, return_lse: bool, for_backward: bool, q):
    """Memory for ``(out, lse, lse_raw)``."""
    if call.heads_first:
        out = _heads_first(q, call.batch, call.heads, call.seqlen_q, call.head_dim_v)
        of_rows: tuple = call.batch, call.heads, call.seqlen_q
    elif call.lengths is None:
        out = q.new_empty(call.batch, call.seqlen_q, call.heads, call.head_dim_v)  # a tuple of sizes would take 0.5 µs more
        of_rows = call.batch, call.heads, call.seqlen_q
    else:
        out = q.new_empty(call.seqlen_q, call.heads, call.head_dim_v)
        of_rows = call.heads, call.seqlen_q
    lse = q.new_empty(of_rows, dtype=torch.float32) if return_lse else None
    lse_raw = q.new_empty(of_rows, dtype=torch.float32) if for_backward else None
    return out, lse, lse_raw


def _forward_as_planned(planned: tuple, call: Call, return_lse: bool, for_backward: bool, q, k, v):
    """:func:`forward` of a kept call. The launcher looks at dtypes, devices, strides and alignment itself."""
    if not (q.data_ptr() and k.data_ptr() and v.data_ptr()):
        raise ValueError("a tensor without memory")
    function, device, rest = planned
    out, lse, lse_raw = _room_of_results(call, return_lse, for_backward, q)
    run_on(function, device, (q, k, v, out, lse, lse_raw, None, None, None, None, *rest, raw_stream(device)))
    return out, lse, lse_raw


def launch(
    function: Callable, blocks: int, device: int, call: Call, q, k, v, out, lse, lse_raw, tickets=None, key_lists=None
) -> None:
    """Run a compiled kernel on the current stream of the tensors' device, whichever device is current."""
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    kinds = None if call.blocks is None else call.blocks.kinds_in_a_row(call.batch, call.heads)
    _run(function, blocks, device, call, (q, k, v, out, lse, lse_raw, tickets, sinks, key_lists, kinds))


def gradients(call: Call, mechanism: str | None, needs: str, deterministic: bool, q, k, v, out, lse_raw, dout, dlse):
    """``(dq, dk, dv)`` on the current stream, ``None`` for those that ``needs`` (a part of ``"qkv"``) doesn't name. Where there
    are sinks or captured tensors, theirs follow, if they require one (:mod:`cute_attn.reference` derives the sinks'). The call
    must not be empty.

    All may have any strides, and ``dlse`` be ``None`` where nothing depends on the log-sum-exp; what the kernels can't read in
    place is copied. Besides the gradients this allocates two float32 a query row and, where dQ's parts
    are added up in memory, their float32 sums; of both the rows are a multiple of 128, and of the sums the columns those that
    a head takes in shared memory; an int32 a query tile, for signals; and where a bias is shared, copies of its gradient.
    """
    wanted = needs
    if not needs or (call.expression and call.expression.partials and "q" not in needs):
        needs = f"q{needs}"  # for the sinks alone; and whoever adds to dQ knows dS
    gradient = _room(call, needs, q, k, v)
    # The forward pass has checked these. But what hooks on saved tensors bring back may lie in memory otherwise.
    q, k, v, out = (x if is_aligned(x) else _readable(x) for x in (q, k, v, out))
    lse_raw = lse_raw.contiguous()
    dout, dlse = _readable(dout), None if dlse is None else dlse.contiguous()
    planned = _plan_gradients(call, mechanism, needs, deterministic, dlse is not None, q)
    rows = q.new_empty(planned.rows, dtype=torch.float32)
    if call.lengths is not None and call.sinks is not None and call.sinks.requires_grad:
        rows[0].fill_(math.inf), rows[1].zero_()  # all are summed below, and the kernels write those alone that are in use
    dq_sum = None if planned.sums is None else q.new_empty(planned.sums, dtype=torch.float32)
    signals = q.new_empty(planned.signals, dtype=torch.int32) if planned.signals else None
    # Keys that no query sees, which the kernels never touch where a batch is a rectangle.
    if call.lengths is None and call.left is not None and call.shift > call.left:
        for x in (gradient["k"], gradient["v"]):
            if x is not None:
                x[:, : call.shift - call.left].zero_()
    of_captured = _room_of_captured(call)
    lists = None, None, None
    if call.blocks is not None:
        lists = _lists_of_gradients(call, planned.problem, mechanism, planned.device)
    into = *gradient.values(), *lists, tuple(of_captured.values()) or None
    tensors = q, k, v, out, dout, lse_raw, dlse, rows, dq_sum, signals, *into
    run_on(planned.function, planned.device, (*tensors, *planned.rest, raw_stream(planned.device)))
    found = tuple(x if name in wanted else None for name, x in gradient.items())
    if not call.others:
        return found
    dsinks = None
    if call.sinks is not None and call.sinks.requires_grad:
        natural = call.expression and call.expression.natural
        unit = 1.0 if natural else rules.score_scales(call.scale, call.softcap)[0] * rules.LN_2
        weight = (call.sinks.detach().float()[:, None] - rows[0] * unit).exp_()
        dsinks = -(weight * rows[1]).sum((0, 2)).to(call.sinks.dtype)
    return *found, dsinks, *map(partial(_of_captured, of_captured), range(len(call.captured)), call.captured)


class _PlannedGradients(NamedTuple):
    """How the backward pass of a call is computed: the kernels, the shapes of what they take besides the call's tensors (None
    or 0 for what they don't), and the rest of their arguments."""

    problem: Problem
    function: Callable
    device: int
    rows: tuple[int, ...]
    sums: tuple[int, ...] | None
    signals: int
    rest: tuple


def _plan_gradients(call: Call, mechanism: str | None, needs: str, deterministic: bool, of_lse: bool, q) -> _PlannedGradients:
    how = needs, deterministic, of_lse, mechanism
    if call.plans and (planned := call.plans.get(how)) is not None:
        return planned
    device = q.get_device()
    sums = sums_of(problem_of(q.dtype, call, of_lse, needs), mechanism, device)
    ordered = deterministic and sums is not None  # without sums there is no order to fix
    problem = problem_of(q.dtype, call, of_lse, needs, ordered)
    function, blocks = prepared(problem, mechanism, device, _head_blocks(problem, mechanism, device, call))
    rows_padded = -(-call.seqlen_q // ROW_PADDING) * ROW_PADDING
    if call.lengths is not None:  # cute_attn.sequences says where each begins
        rows_padded = call.lengths.slots(call.seqlen_q, ROW_PADDING) * ROW_PADDING
    tiles: tuple[int, ...] = ()
    counts = _counts(problem, mechanism, device)
    if sums is not None:
        tile_m, *of_tile = sums
        tiles = call.batch, call.heads, rows_padded // tile_m
    planned = _PlannedGradients(
        problem,
        function,
        device,
        rows=(2, call.batch, call.heads, rows_padded),
        sums=None if sums is None else (*tiles, *of_tile),
        signals=COUNTERS + (math.prod(tiles) if counts else 0) if counts or problem.masked else 0,
        rest=_besides_tensors(call, blocks),
    )
    if call.plans is not None:
        call.plans[how] = planned
    return planned


def _room_of_captured(call: Call) -> dict[int, torch.Tensor]:
    """Memory for the captured tensors' gradients by their numbers: zeros, but where each element is stored."""
    if not call.expression:
        return {}
    room, copies = {}, {"batch": call.batch, "head": call.heads}
    for slot, by in call.expression.derived.items():
        x = call.captured[slot]
        make = torch.empty if by.alone and call.lengths is None and not call.masked else torch.zeros
        shape = *(copies[name] for name in by.copied), *(x.shape or (1,))
        room[slot] = make(shape, dtype=x.dtype if by.alone else torch.float32, device=x.device)
    return room


def _of_captured(room: dict[int, torch.Tensor], slot: int, x: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a captured tensor; zeros of one that no score depends on."""
    if slot in room:
        copies = room[slot].dim() - max(x.dim(), 1)
        found = room[slot].sum(tuple(range(copies))) if copies else room[slot]
        return found.to(x.dtype).view(x.shape)
    return torch.zeros_like(x) if x.requires_grad else None


def _lists_of_gradients(call: Call, problem: Problem, mechanism: str | None, device: int) -> tuple:
    """A block mask's lists of query tiles and, where a kernel walks over them, of key tiles, and ranks."""
    (tile_m, tile_n, rows), batch, heads = tiles_of_lists(problem, mechanism, device), call.batch, call.heads
    return (
        call.blocks.query_lists(tile_m, tile_n, batch, heads, call.heads_kv),
        call.blocks.key_lists(rows, tile_n, batch, heads) if rows else None,
        call.blocks.ranks(tile_m, tile_n, batch, heads) if problem.deterministic else None,
    )


def classify(kinds: torch.Tensor, expression: Expression, captured: tuple, seqlen_q: int, seqlen_k: int) -> None:
    """``blocks.classified`` by a kernel, on the current stream."""
    device = kinds.get_device()
    function, _ = prepared(_classifying(expression), None, device)
    read = tuple(map(as_read, captured)) if captured else None
    with torch.cuda.device(device):
        function(kinds, read, seqlen_q, seqlen_k, raw_stream(device))


@lru_cache(maxsize=64)
def _classifying(expression: Expression) -> Problem:
    return Problem("bfloat16", HEAD_DIM_STEP, HEAD_DIM_STEP, expression=expression, blocks="classified")


def as_read(x: torch.Tensor) -> torch.Tensor:
    """A captured tensor as the kernels take it: of one dimension or more, the last one contiguous, and bools as bytes. What is
    not contiguous there is copied."""
    x = x.detach().view(torch.uint8) if x.dtype == torch.bool else x.detach()
    x = x if x.dim() else x.reshape(1)
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _heads_first(x: torch.Tensor, batch: int, heads: int, seqlen: int, columns: int) -> torch.Tensor:
    """Memory like ``x`` in which heads come after seqlen, as ``(batch, heads, seqlen, columns)``."""
    strides = seqlen * heads * columns, columns, heads * columns, 1
    return x.new_empty_strided((batch, heads, seqlen, columns), strides)


def merge(out, lse, more, lse_of_more, to_log2: float):
    """``reference.merge`` in one kernel, on the current stream: ``out`` is in float32 or in the dtype of ``more``."""
    into, so_far = (out, None) if out.dtype is torch.float32 else (torch.empty_like(out, dtype=torch.float32), out)
    if out.numel():
        device = out.get_device()
        function, _ = prepared(_merging(DTYPE_NAMES[more.dtype], out.shape[3], DTYPE_NAMES[out.dtype]), None, device)
        with torch.cuda.device(device):
            function(into, so_far, lse, more, lse_of_more, to_log2, raw_stream(device))
    return into


@lru_cache(maxsize=64)
def _merging(dtype: str, head_dim_v: int, so_far: str) -> Problem:
    return Problem(dtype, head_dim_v, head_dim_v, merges=so_far)


def _room(call: Call, needs: str, q, k, v) -> dict[str, torch.Tensor | None]:
    """Memory for the gradients that are needed: parts of one tensor where q, k, v, or k, v, are, and ``call.packs``."""
    inputs = {"q": q, "k": k, "v": v}
    if call.heads_first:
        room = _room(replace(call, heads_first=False), needs, *(x.transpose(1, 2) for x in inputs.values()))
        return {name: None if x is None else x.transpose(1, 2) for name, x in room.items()}
    room = dict.fromkeys(inputs)
    for names in ("qkv", "kv") if call.packs else ():
        if names in needs and (packed := packed_of(*(inputs[name] for name in names))) is not None:
            room |= zip(names, packed.new_empty(packed.shape).unbind(-3), strict=True)
            break
    return {name: x.new_empty(x.shape) if name in needs and room[name] is None else room[name] for name, x in inputs.items()}


def packed_of(*parts: torch.Tensor) -> torch.Tensor | None:
    """The tensor ``(…, parts, heads, head_dim)`` whose ``unbind(-3)`` the parts ``(…, heads, head_dim)`` are; None if there is
    none, since they lie elsewhere."""
    first = parts[0]
    if first.storage_offset() == parts[1].storage_offset():  # the usual case of tensors by themselves
        return None
    shape, strides = first.shape, first.stride()
    begin, step = first.storage_offset(), strides[-2] * shape[-2]
    for i, x in enumerate(parts):
        if x.storage_offset() != begin + i * step or (x.shape, x.stride()) != (shape, strides):
            return None
    if len({x.untyped_storage().data_ptr() for x in parts}) > 1:
        return None
    return first.as_strided((*shape[:-2], len(parts), *shape[-2:]), (*strides[:-2], step, *strides[-2:]))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` where 16-byte copies can read it in place (an expanded one can't always), else a copy."""
    if all(x.stride()) and is_aligned(x):  # the usual case
        return x
    expanded = any(stride == 0 and extent > 1 for stride, extent in zip(x.stride(), x.shape, strict=True))
    with suppress(ValueError):
        if not expanded:
            return check_strides("x", x)
    return x.clone(memory_format=torch.contiguous_format)


def _run(function: Callable, blocks: int, device: int, call: Call, tensors: tuple) -> None:
    run_on(function, device, (*tensors, *_besides_tensors(call, blocks), raw_stream(device)))


def _besides_tensors(call: Call, blocks: int) -> tuple:
    """What a pass takes of a call behind its own tensors and before the stream."""
    scale_log2, scale_by_cap = rules.score_scales(call.scale, call.softcap)
    lengths = call.lengths
    where = NO_LENGTHS if lengths is None else (*lengths.tensors, lengths.count)
    captured = tuple(map(as_read, call.captured)) if call.captured else None
    drops: tuple = None, None, None
    if call.seed is not None:
        drops = call.seed.view(torch.int32), dropout.threshold(call.dropout), dropout.kept_scale(call.dropout)
    numbers = call.left or 0, call.right or 0, scale_log2, scale_by_cap, int(call.heads_first), blocks
    return captured, *drops, *where, *numbers


def run_on(function: Callable, device: int, arguments: tuple) -> None:
    """Call a compiled kernel on a device, whichever is current."""
    if current_device() == device:
        function(*arguments)
    else:
        with torch.cuda.device(device):
            function(*arguments)
