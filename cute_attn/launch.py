"""From torch's tensors to a kernel on the caller's device and stream.

tvm-ffi launches (a compiled kernel's callable is a function of its), cuda-python answers questions about the device.
Nothing here synchronises, and the forward pass allocates nothing but its outputs, and tickets where sequences are ragged or
have block masks; those of kept calls stay (``workspace.py``).
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
from cute_attn.fields import counts_tiles, has_signals, has_sums, walks_over_keys
from cute_attn.layouts import family, target_of
from cute_attn.layouts.base import COUNTERS, TICKET_COUNTERS, Config, row_padding
from cute_attn.layouts.tma import ROWS_PER_WARPGROUP
from cute_attn.lengths import NAMES, check_lengths
from cute_attn.plan import configs, head_blocks, plan, rows_of_query_tile, takes_short, takes_tickets
from cute_attn.private import current_device, raw_stream
from cute_attn.problem import (
    DTYPE_NAMES,
    HEAD_DIM_STEP,
    Call,
    Problem,
    check_alike,
    check_strides,
    check_tensors_for_gpu,
    is_aligned,
    problem_of,
)
from cute_attn.workspace import Workspaces

_tickets = Workspaces(torch.int32)
NO_LENGTHS, _NO_LISTS = (None,) * len(NAMES), (None,) * 3


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


@lru_cache(maxsize=64)
def device_target(device: int) -> str:
    """The compiler's target of a device. Raises ``NotImplementedError`` for a GPU that no layouts module serves."""
    return target_of(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=4096)
def prepared(problem: Problem, mechanism: str | None, device: int, config: Config | None = None) -> tuple[Callable, int]:
    """The compiled kernel of a problem on a device, and how many of its blocks the device holds at once; in the best
    configuration, or in ``config``."""
    config = plan(problem, device_target(device), mechanism) if config is None else config
    return compiled(problem, config), multiprocessors(device) * config.blocks_per_multiprocessor


def sums_of(problem: Problem, config: Config) -> tuple[int, int, int] | None:
    """``(rows of a tile, its pieces, values of a piece)`` of dQ's float32 sums in memory; ``None`` where there are none."""
    if not has_sums(problem, config):
        return None
    return config.tile_m, len(family(config).pieces(config)), math.prod(family(config).piece_shape(config))


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
def _choices(problem: Problem, mechanism: str | None, device: int) -> tuple[Config, ...]:
    return configs(problem, device_target(device), mechanism)


def _config_of_gradients(problem: Problem, mechanism: str | None, device: int, call: Call) -> Config:
    """In which of a problem's configurations the gradients of ``call`` are computed."""
    found = _choices(problem, mechanism, device)
    blocks = _head_blocks(found, problem, device, call)
    shared = tuple(config for config in found if config.head_blocks == blocks)
    rows = rows_of_query_tile(tuple(config.tile_m for config in shared), call.seqlen_q)
    return next(config for config in shared if config.tile_m == rows)


def _is_short(problem: Problem, mechanism: str | None, device: int, call: Call) -> bool:
    """Whether the forward pass of ``call`` takes the configuration for few keys."""
    window = call.seqlen_k if call.left is None or call.right is None else call.left + call.right + 1
    return takes_short(_choices(problem, mechanism, device), min(call.seqlen_k, window))


def _head_blocks(found: tuple[Config, ...], problem: Problem, device: int, call: Call) -> int:
    """How many blocks share a key tile of the backward pass of ``call``."""
    if call.heads == call.heads_kv:
        return 1
    tile, choices = found[0].tile_n, tuple(dict.fromkeys(config.head_blocks for config in found))
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
    return _passes(return_lse, mechanism, deterministic or torch.are_deterministic_algorithms_enabled())


@lru_cache(maxsize=64)
def _passes(return_lse: bool, mechanism: str | None, deterministic: bool) -> tuple[Callable, Callable]:
    def forward_pass(q, k, v, call):
        return forward(call, mechanism, return_lse, True, q, k, v)

    def backward_pass(q, k, v, out, lse_raw, dout, dlse, call, needs):
        return gradients(call, mechanism, needs, deterministic, q, k, v, out, lse_raw, dout, dlse)

    return forward_pass, backward_pass


def forward(call: Call, mechanism: str | None, return_lse: bool, for_backward: bool, q, k, v):
    """``(out, lse, lse_raw)``, the last for the backward pass; None for what is not asked for. Plan, compile or look up, and
    launch. Allocates these and nothing else that it doesn't keep."""
    how = return_lse, for_backward, mechanism
    if call.plans and (planned := call.plans.get(how)) is not None and _have_memory(q, k, v):
        try:
            return _forward_as_planned(planned, call, return_lse, for_backward, q, k, v)
        except Refused:  # why is looked at below
            pass
    if call.plans is not None:  # a kept call, of which these may be others' tensors
        check_alike(q, k, v)
        if call.lengths is not None:
            call.lengths = check_lengths(q, call.lengths.count, call.lengths.tensors)
    q, k, v = check_tensors_for_gpu(q, k, v, call)
    if call.empty:  # the backward pass won't look at lse_raw either
        out, lse, lse_raw = _room_of_results(call, return_lse, for_backward, q, _of_dtype(torch.float32, q))
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return out, lse, lse_raw
    planned = _plan_forward(call, mechanism, return_lse, for_backward, q)
    if call.plans is not None:
        call.plans[how] = planned
    return _forward_as_planned(planned, call, return_lse, for_backward, q, k, v)


def _have_memory(q, k, v) -> bool:
    """Whether all have an address, for which torch raises where there is no storage."""
    try:
        return bool(q.data_ptr() and k.data_ptr() and v.data_ptr())
    except RuntimeError:
        return False


class _PlannedForward(NamedTuple):
    """How the forward pass of a call is computed: the kernel, a tensor of the dtype of row values, how many tickets, the size
    of the tiles in a block mask's lists, and the rest of its arguments."""

    function: Callable
    device: int
    floats: torch.Tensor
    tickets: int
    tile: tuple[int, int] | None
    rest: tuple[tuple, tuple]


def _plan_forward(call: Call, mechanism: str | None, return_lse: bool, for_backward: bool, q) -> _PlannedForward:
    device = q.get_device()
    problem = problem_of(q.dtype, call, return_lse, for_backward=for_backward)
    config = None
    if _is_short(problem, mechanism, device, call):
        config = _choices(problem, mechanism, device)[1]
    function, blocks = prepared(problem, mechanism, device, config)
    tickets, tile = 0, None
    if (call.lengths or call.blocks) is not None and (rows := tile_of_tickets(problem, mechanism, device)):
        slots = -(-call.seqlen_q // rows) * call.batch if call.lengths is None else call.lengths.slots(call.seqlen_q, rows)
        tickets = slots * call.heads
    if call.blocks is not None:
        tile = tiles_of_lists(problem, mechanism, device)[:2]
    floats = _of_dtype(torch.float32, q)
    return _PlannedForward(function, device, floats, tickets, tile, besides_tensors(call, blocks))


def _forward_as_planned(planned: _PlannedForward, call: Call, return_lse: bool, for_backward: bool, q, k, v):
    """:func:`forward` of what the kernels can read in place. The launcher looks at dtypes, devices, strides and alignment
    itself."""
    function, device, floats, tickets, tile, rest = planned
    out, lse, lse_raw = _room_of_results(call, return_lse, for_backward, q, floats)
    sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
    key_lists = kinds = None
    if tile is not None:
        key_lists = call.blocks.key_lists(*tile, call.batch, call.heads)
        kinds = call.blocks.kinds_in_a_row(call.batch, call.heads)
    drawn = None
    if tickets and call.plans is None:  # memory that stays is for eager calls: where torch makes graphs, it counts what is left
        drawn = q.new_zeros(TICKET_COUNTERS + tickets, dtype=torch.int32)
    elif tickets:
        drawn = _tickets.of(q, device, raw_stream(device), TICKET_COUNTERS, tickets).words
    launch(function, device, call, (q, k, v, out, lse, lse_raw, drawn, sinks, key_lists, kinds), rest)
    return out, lse, lse_raw


def _of_dtype(dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """A tensor of nothing, from which others of its dtype are made."""
    return torch.empty(0, dtype=dtype, device=like.device)


def _room_of_results(call: Call, return_lse: bool, for_backward: bool, q, floats):
    """Memory for ``(out, lse, lse_raw)``. To take the dtype from ``floats`` and sizes one by one, not as an argument and in a
    tuple, spares 0.5 µs each."""
    heads, rows, columns = call.heads, call.seqlen_q, call.head_dim_v
    batch = () if call.lengths is not None else (call.batch,)
    if call.heads_first:
        out = _heads_first(q, call.batch, heads, rows, columns)
    else:
        out = q.new_empty(*batch, rows, heads, columns)
    lse = floats.new_empty(*batch, heads, rows) if return_lse else None
    return out, lse, floats.new_empty(*batch, heads, rows) if for_backward else None


def gradients(call: Call, mechanism: str | None, needs: str, deterministic: bool, q, k, v, out, lse_raw, dout, dlse):
    """``(dq, dk, dv)`` on the current stream, ``None`` for those that ``needs`` (a part of ``"qkv"``) doesn't name. Where there
    are sinks or captured tensors, theirs follow, if they require one (:mod:`cute_attn.reference` derives the sinks'). The call
    must not be empty.

    All may have any strides, and ``dlse`` be ``None`` where nothing depends on the log-sum-exp; what the kernels can't read in
    place is copied. Besides the gradients this allocates two float32 a query row and, where dQ's parts are added up in memory,
    their float32 sums; of both the rows are a multiple of 128, or of higher query tiles, and of the sums the columns those that
    a head takes in shared memory; an int32 a query tile, for signals; and where a bias is shared, copies of its gradient.
    """
    how = needs, deterministic, dlse is not None, mechanism
    if call.plans and (planned := call.plans.get(how)) is not None and 0 not in dout.stride():
        try:
            return _gradients_as_planned(planned, call, needs, q, k, v, out, lse_raw, dout, dlse)
        except Refused:  # suppress() would take longer; what is refused is copied below
            pass
    # The forward pass has checked these. But what hooks on saved tensors bring back may lie in memory otherwise.
    q, k, v, out = (x if is_aligned(x) else _readable(x) for x in (q, k, v, out))
    dout, dlse = _readable(dout), None if dlse is None else dlse.contiguous()
    planned = _plan_gradients(call, mechanism, needs, deterministic, dlse is not None, q)
    if call.plans is not None:
        call.plans[how] = planned
    return _gradients_as_planned(planned, call, needs, q, k, v, out, lse_raw.contiguous(), dout, dlse)


def _gradients_as_planned(planned: _PlannedGradients, call: Call, wanted: str, q, k, v, out, lse_raw, dout, dlse):
    """:func:`gradients` of what the kernels can read in place."""
    gradient = _room(call, planned.problem.gradients, q, k, v)
    rows = planned.floats.new_empty(*planned.rows)
    if call.lengths is not None and call.sinks is not None and call.sinks.requires_grad:
        rows[0].fill_(math.inf), rows[1].zero_()  # all are summed below, and the kernels write those alone that are in use
    dq_sum = None if planned.sums is None else planned.floats.new_empty(*planned.sums)
    signals = planned.words.new_empty(planned.signals) if planned.signals else None
    # Keys that no query sees, which the kernels never touch where a batch is a rectangle.
    if call.lengths is None and call.left is not None and call.shift > call.left:
        for x in (gradient["k"], gradient["v"]):
            if x is not None:
                x[:, : call.shift - call.left].zero_()
    of_captured = _room_of_captured(call) if call.expression else {}
    lists = _NO_LISTS if call.blocks is None else _lists_of_gradients(call, planned)
    into = *gradient.values(), *lists, tuple(of_captured.values()) or None
    tensors = q, k, v, out, dout, lse_raw, dlse, rows, dq_sum, signals, *into
    launch(planned.function, planned.device, call, tensors, planned.rest)
    if not call.others:
        return tuple(gradient.values())
    found = tuple(x if name in wanted else None for name, x in gradient.items())
    dsinks = None
    if call.sinks is not None and call.sinks.requires_grad:
        natural = call.expression and call.expression.natural
        unit = 1.0 if natural else rules.score_scales(call.scale, call.softcap)[0] * rules.LN_2
        weight = (call.sinks.detach().float()[:, None] - rows[0] * unit).exp_()
        dsinks = -(weight * rows[1]).sum((0, 2)).to(call.sinks.dtype)
    return *found, dsinks, *map(partial(_of_captured, of_captured), range(len(call.captured)), call.captured)


class _PlannedGradients(NamedTuple):
    """How the backward pass of a call is computed: the kernels, the shapes of what they take besides the call's tensors (None
    or 0 for what they don't) with tensors of their dtypes, and the rest of their arguments."""

    problem: Problem
    mechanism: str | None
    function: Callable
    device: int
    floats: torch.Tensor
    words: torch.Tensor
    rows: tuple[int, ...]
    sums: tuple[int, ...] | None
    signals: int
    rest: tuple[tuple, tuple]


def _plan_gradients(call: Call, mechanism: str | None, needs: str, deterministic: bool, of_lse: bool, q) -> _PlannedGradients:
    if not needs or (call.expression and call.expression.partials and "q" not in needs):
        needs = f"q{needs}"  # for the sinks alone; and whoever adds to dQ knows dS
    device = q.get_device()
    problem = problem_of(q.dtype, call, of_lse, needs)
    ordered = deterministic and has_sums(problem, plan(problem, device_target(device), mechanism))  # else there is no order
    problem = problem_of(q.dtype, call, of_lse, needs, ordered)
    config = _config_of_gradients(problem, mechanism, device, call)
    function, blocks = prepared(problem, mechanism, device, config)
    sums, padding = sums_of(problem, config), row_padding(config)
    rows_padded = -(-call.seqlen_q // padding) * padding
    if call.lengths is not None:  # cute_attn.sequences says where each begins
        rows_padded = call.lengths.slots(call.seqlen_q, padding) * padding
    tiles: tuple[int, ...] = ()
    counts = counts_tiles(problem, config)
    if sums is not None:
        tile_m, *of_tile = sums
        tiles = call.batch, call.heads, rows_padded // tile_m
    return _PlannedGradients(
        problem,
        mechanism,
        function,
        device,
        _of_dtype(torch.float32, q),
        _of_dtype(torch.int32, q),
        rows=(2, call.batch, call.heads, rows_padded),
        sums=None if sums is None else (*tiles, *of_tile),
        signals=COUNTERS + (math.prod(tiles) if counts else 1) if has_signals(problem, config) else 0,  # 1: a kernel's tickets
        rest=besides_tensors(call, blocks),
    )


def _room_of_captured(call: Call) -> dict[int, torch.Tensor]:
    """Memory for the captured tensors' gradients by their numbers: zeros, but where each element is stored."""
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


def _lists_of_gradients(call: Call, planned: _PlannedGradients) -> tuple:
    """A block mask's lists of query tiles and, where a kernel walks over them, of key tiles, and ranks."""
    problem, batch, heads = planned.problem, call.batch, call.heads
    tile_m, tile_n, rows = tiles_of_lists(problem, planned.mechanism, planned.device)
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


def besides_tensors(call: Call, blocks: int) -> tuple[tuple, tuple]:
    """What a pass takes of a call behind its own tensors, before and behind the lengths."""
    scale_log2, scale_by_cap = rules.score_scales(call.scale, call.softcap)
    captured = tuple(map(as_read, call.captured)) if call.captured else None
    drops: tuple = None, None, None
    if call.seed is not None:
        drops = call.seed.view(torch.int32), dropout.threshold(call.dropout), dropout.kept_scale(call.dropout)
    count = 0 if call.lengths is None else call.lengths.count
    numbers = count, call.left or 0, call.right or 0, scale_log2, scale_by_cap, int(call.heads_first), blocks
    return (captured, *drops), numbers


def launch(function: Callable, device: int, call: Call, tensors: tuple, rest: tuple[tuple, tuple]) -> None:
    """Run a compiled kernel on the current stream of the tensors' device, whichever device is current. ``tensors`` are a pass's
    own, ``rest`` what :func:`besides_tensors` has of the call."""
    before, behind = rest
    lengths = NO_LENGTHS if call.lengths is None else call.lengths.tensors
    run_on(function, device, (*tensors, *before, *lengths, *behind, raw_stream(device)))


class Refused(RuntimeError):  # noqa: N818
    """The launcher takes no such tensors: their dtype, device, strides or alignment. Nothing was launched."""


def run_on(function: Callable, device: int, arguments: tuple) -> None:
    """Call a compiled kernel on a device, whichever is current. Raises :class:`Refused`."""
    try:
        if current_device() == device:
            function(*arguments)
        else:
            with torch.cuda.device(device):
                function(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refused(str(error)) from error
