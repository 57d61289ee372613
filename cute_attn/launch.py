"""From torch's tensors to a kernel on the caller's device and stream.

tvm-ffi launches (a compiled kernel's callable is a function of its), torch answers questions about the device.
Nothing here synchronises, and the forward pass allocates nothing but its outputs, and tickets where sequences are ragged or
have block masks; those of kept calls stay (``workspace.py``).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from cute_attn import dropout, rules
from cute_attn.compile import compiled
from cute_attn.expressions import Expression
from cute_attn.fields import counts_tiles, floats_of_a_row, has_signals, has_sums, rounds_beside, walks_over_keys
from cute_attn.layouts import family, target_of
from cute_attn.layouts.base import COUNTERS, TICKET_COUNTERS, Config, row_padding
from cute_attn.layouts.tma import ROWS_PER_WARPGROUP
from cute_attn.lengths import NO_LENGTHS, check_lengths
from cute_attn.plan import configs, head_blocks, plan, rows_of_query_tile, takes_one_kernel, takes_short, takes_tickets
from cute_attn.private import current_device, empty_strided, raw_stream
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
    strides_for_kernels,
)
from cute_attn.workspace import Workspaces

_tickets = Workspaces(torch.int32)
WITHOUT_MEMORY = "a tensor without memory"
_NO_LISTS = (None,) * 4


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


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


@lru_cache(maxsize=4096)
def _choices(problem: Problem, mechanism: str | None, device: int, ordered: bool = False) -> tuple[Config, ...]:
    """The configurations that a call's sizes choose among; where gradients are to be ``ordered``, to have the same bits each
    time, those of one mainloop, since wide heads' single kernel adds dQ in no order."""
    found = configs(problem, device_target(device), mechanism)
    return tuple(config for config in found if not ordered or config.backward == found[0].backward)


def _config_of_gradients(problem: Problem, mechanism: str | None, device: int, call: Call, ordered: bool) -> Config:
    """In which of a problem's configurations the gradients of ``call`` are computed."""
    found = _choices(problem, mechanism, device, ordered)
    rows = call.seqlen_q if call.lengths is None else call.seqlen_q // max(call.lengths.count, 1)
    tiles = _key_tiles(found[-1].tile_n, call)
    if takes_one_kernel(found, rows, problem.bounded_right, tiles, multiprocessors(device)):
        return found[-1]
    tiles, unequal = _key_tiles(found[0].tile_n, call), problem.bounded_right and not problem.bounded_left
    choices = tuple(dict.fromkeys(config.head_blocks for config in found))
    blocks = head_blocks(choices, tiles, call.heads // call.heads_kv, multiprocessors(device), unequal)
    shared = tuple(config for config in found if (config.backward, config.head_blocks) == (found[0].backward, blocks))
    rows = rows_of_query_tile(tuple(config.tile_m for config in shared), rows, problem.bounded_right)
    return next(config for config in shared if config.tile_m == rows)


def _key_tiles(tile: int, call: Call) -> int:
    """How many tiles of so many keys a call has, or of ragged sequences at most, of all key heads."""
    tiles = -(-call.seqlen_k // tile) if call.lengths is None else call.lengths.slots(call.seqlen_k, tile)
    return tiles * call.heads_kv * call.batch


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
    if call.plans and (planned := call.plans.get(for_backward)) is not None:
        try:
            return planned(call, q, k, v)
        except Refused:  # why is looked at below
            pass
    if call.plans is not None:  # a kept call, of which these may be others' tensors
        check_alike(q, k, v)
        if call.lengths is not None:
            call.lengths = check_lengths(q, call.lengths.count, call.lengths.tensors)
    q, k, v = check_tensors_for_gpu(q, k, v, call)
    if call.empty:  # the backward pass won't look at lse_raw either
        rooms = _rooms_of_results(call, q.dtype)
        out, rows = (torch.empty_strided(sizes, strides, dtype=dtype, device=q.device) for sizes, strides, dtype in rooms)
        lse = rows.fill_(-math.inf)
        return out.zero_(), lse if return_lse else None, lse.clone() if for_backward else None
    planned = _PlannedForward(call, mechanism, return_lse, for_backward, q)
    if call.plans is not None:
        call.plans[for_backward] = planned.__call__  # a method is called sooner than what has one
    return planned(call, q, k, v)


class _PlannedForward:
    """How the forward pass of calls that are alike is computed: the kernel, what memory ``out`` and row values take, how many
    tickets, the size of the tiles in a block mask's lists, whether there is anything of what most calls have nothing of, and
    what these calls have in common."""

    __slots__ = ("alike", "device", "for_backward", "function", "out", "return_lse", "rows", "tickets", "tile", "usual")

    def __init__(self, call: Call, mechanism: str | None, return_lse: bool, for_backward: bool, q):
        self.return_lse, self.for_backward, self.device = return_lse, for_backward, q.get_device()
        problem = problem_of(q.dtype, call, return_lse, for_backward=for_backward)
        found = _choices(problem, mechanism, self.device)
        window = call.seqlen_k if call.left is None or call.right is None else call.left + call.right + 1
        config = found[1] if takes_short(found, min(call.seqlen_k, window)) else found[0]
        self.function, blocks = prepared(problem, mechanism, self.device, config)
        self.out, self.rows = _rooms_of_results(call, q.dtype)
        self.tickets = 0
        if takes_tickets(problem, config):
            slots = -(-call.seqlen_q // config.tile_m) * call.batch
            if call.lengths is not None:
                slots = call.lengths.slots(call.seqlen_q, config.tile_m)
            self.tickets = slots * call.heads
        self.tile = None if call.blocks is None else (config.tile_m, config.tile_n)
        self.usual = call.lengths is call.blocks is call.sinks is None
        self.alike = what_is_alike(call, blocks)

    def __call__(self, call: Call, q, k, v):
        """:func:`forward` of what the kernels can read in place. The launcher looks at dtypes, devices, strides and alignment
        itself."""
        device = self.device
        if current_device() != device:
            with torch.cuda.device(device):
                return self(call, q, k, v)
        lse = lse_raw = None
        out = empty_strided(*self.out)
        if self.return_lse:
            lse = empty_strided(*self.rows)
        if self.for_backward:
            lse_raw = empty_strided(*self.rows)
        given = None if self.usual else self._given(call, q)
        try:  # in place: run() and check_have_memory() take time of their own
            if not (q.data_ptr() and k.data_ptr() and v.data_ptr()):
                raise Refused(WITHOUT_MEMORY)
            self.function(q, k, v, out, lse, lse_raw, given, self.alike, raw_stream(device))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Refused(str(error)) from error
        return out, lse, lse_raw

    def _given(self, call: Call, q) -> tuple:
        """Tickets, sinks, a block mask's lists, lengths."""
        sinks = None if call.sinks is None else call.sinks.detach().float().contiguous()
        key_lists = kinds = None
        if self.tile is not None:
            key_lists = call.blocks.key_lists(*self.tile, call.batch, call.heads)
            kinds = call.blocks.kinds_in_a_row(call.batch, call.heads)
        drawn = None
        if self.tickets and call.plans is None:  # where torch makes graphs, it counts the memory that stays as a leak
            drawn = q.new_zeros(TICKET_COUNTERS + self.tickets, dtype=torch.int32)
        elif self.tickets:
            drawn = _tickets.of(q, self.device, raw_stream(self.device), TICKET_COUNTERS, self.tickets).words
        return drawn, sinks, key_lists, kinds, *(NO_LENGTHS if call.lengths is None else call.lengths.tensors)


Room = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # sizes, strides, dtype: what empty_strided takes


@lru_cache(maxsize=4096)  # for calls that aren't kept, and are planned each time
def contiguous(dtype: torch.dtype, *sizes: int) -> Room:
    """Memory of these sizes, of one piece."""
    strides = (math.prod(max(n, 1) for n in sizes[i + 1 :]) for i in range(len(sizes)))
    return sizes, tuple(strides), dtype


def _of_operand(call: Call, dtype: torch.dtype, rows: int, heads: int, columns: int) -> Room:
    """``(batch, rows, heads, columns)``, contiguous, or a view of such memory with the heads first."""
    if call.lengths is not None:
        return contiguous(dtype, rows, heads, columns)
    (batch, rows, heads, columns), strides, _ = contiguous(dtype, call.batch, rows, heads, columns)
    if not call.heads_first:
        return (batch, rows, heads, columns), strides, dtype
    return (batch, heads, rows, columns), (strides[0], strides[2], strides[1], strides[3]), dtype


def _rooms_of_results(call: Call, dtype: torch.dtype) -> tuple[Room, Room]:
    """Of ``out``, and of a float32 for each of its rows."""
    rows = contiguous(torch.float32, *(() if call.lengths is not None else (call.batch,)), call.heads, call.seqlen_q)
    return _of_operand(call, dtype, call.seqlen_q, call.heads, call.head_dim_v), rows


def gradients(call: Call, mechanism: str | None, needs: str, deterministic: bool, q, k, v, out, lse_raw, dout, dlse):
    """``(dq, dk, dv)`` on the current stream, ``None`` for those that ``needs`` (a part of ``"qkv"``) doesn't name. Where there
    are sinks or captured tensors, theirs follow, if they require one (:mod:`cute_attn.reference` derives the sinks'). The call
    must not be empty.

    All may have any strides, and ``dlse`` be ``None`` where nothing depends on the log-sum-exp; what the kernels can't read in
    place is copied. Besides the gradients this allocates two float32 a query row and, behind them, where dQ's parts are added
    up in memory, their float32 sums; of both the rows are a multiple of 128, or of what whole query tiles make instead
    (``row_padding``), and of the sums the columns those that a head takes in shared memory; an int32 a query tile, for signals;
    and where a bias is shared, copies of its gradient.
    """
    how = needs, dlse is not None
    if call.plans and (planned := call.plans.get(how)) is not None and 0 not in dout.stride():
        try:
            return planned(call, needs, q, k, v, out, lse_raw, dout, dlse)
        except Refused:  # suppress() would take longer; what is refused is copied below
            pass
    # The forward pass has checked these. But what hooks on saved tensors bring back may lie in memory otherwise, or elsewhere,
    # or be something else; of calls that aren't kept the last two were looked at before.
    if call.kept_for is not None:
        q, k, v, out, dout = (x.to(*call.kept_for) for x in (q, k, v, out, dout))  # dout, where zeros were made like out
        lse_raw = lse_raw.to(q.device, torch.float32)
        if call.lengths is not None:
            lengths = (None if x is None else x.to(q.device, torch.int32) for x in call.lengths.tensors)
            call = replace(call, lengths=replace(call.lengths, tensors=tuple(lengths)))
    q, k, v, out = (x if is_aligned(x) else _readable(x) for x in (q, k, v, out))
    dout, dlse = _readable(dout), None if dlse is None else dlse.contiguous()
    planned = _PlannedGradients(call, mechanism, needs, deterministic, dlse is not None, q)
    if call.plans is not None:
        call.plans[how] = planned.__call__
    return planned(call, needs, q, k, v, out, lse_raw.contiguous(), dout, dlse)


class _PlannedGradients:
    """How the backward pass of calls that are alike is computed: the kernels, what memory they take besides the call's tensors
    (None for what they don't), how many keys at the beginning no query sees, what a block mask's lists are made for, and what
    these calls have in common."""

    __slots__ = ("alike", "device", "function", "lists", "problem", "rooms", "unseen")

    def __init__(self, call: Call, mechanism: str | None, needs: str, deterministic: bool, of_lse: bool, q):
        if not needs or (call.expression and call.expression.partials and "q" not in needs):
            needs = f"q{needs}"  # for the sinks alone; and whoever adds to dQ knows dS
        self.device = q.get_device()
        problem = problem_of(q.dtype, call, of_lse, needs)
        # Without sums there is no order.
        ordered = deterministic and has_sums(problem, plan(problem, device_target(self.device), mechanism))
        self.problem = problem = problem_of(q.dtype, call, of_lse, needs, ordered)
        config = _config_of_gradients(problem, mechanism, self.device, call, deterministic)
        if call.lengths is not None:  # another batch's mean length may choose another query tile, and is to compile nothing
            for other in _choices(problem, mechanism, self.device, deterministic):
                if other.head_blocks == config.head_blocks == 1:
                    prepared(problem, mechanism, self.device, other)
        self.function, blocks = prepared(problem, mechanism, self.device, config)
        padding = row_padding(config)
        rows_padded = -(-call.seqlen_q // padding) * padding
        if call.lengths is not None:  # cute_attn.sequences says where each begins
            rows_padded = call.lengths.slots(call.seqlen_q, padding) * padding
        n, signals = floats_of_a_row(problem, config), None
        rows = contiguous(torch.float32, n, call.batch, call.heads, rows_padded)
        if has_signals(problem, config):
            tiles = 1  # of a kernel that draws tickets, where no tile is counted
            if counts_tiles(problem, config):
                tiles = call.batch * call.heads * (rows_padded // config.tile_m)
            signals = contiguous(torch.int32, COUNTERS + tiles)
        of_q = _of_operand(call, q.dtype, call.seqlen_q, call.heads, call.head_dim)
        of_k = _of_operand(call, q.dtype, call.seqlen_k, call.heads_kv, call.head_dim)
        of_v = _of_operand(call, q.dtype, call.seqlen_k, call.heads_kv, call.head_dim_v)
        gradients = (x if name in needs else None for name, x in zip("qkv", (of_q, of_k, of_v), strict=True))
        self.rooms: tuple[Room | None, ...] = rows, signals, *gradients
        # Keys that no query sees, which the kernels never touch where a batch is a rectangle.
        self.unseen = 0
        if call.lengths is None and call.left is not None:
            self.unseen = max(call.shift - call.left, 0)
        self.lists: tuple[int, int, int, bool, bool] | None = None
        if call.blocks is not None:
            rows_of_keys = family(config).warpgroups(config) * ROWS_PER_WARPGROUP if walks_over_keys(problem, config) else 0
            self.lists = config.tile_m, config.tile_n, rows_of_keys, ordered, rounds_beside(problem, config)
        self.alike = what_is_alike(call, blocks)

    def __call__(self, call: Call, wanted: str, q, k, v, out, lse_raw, dout, dlse):
        """:func:`gradients` of what the kernels can read in place."""
        if current_device() != self.device:
            with torch.cuda.device(self.device):
                return self(call, wanted, q, k, v, out, lse_raw, dout, dlse)
        packed: tuple = ()  # dq, dk, dv, or dk, dv: parts of one tensor where q, k, v, or k, v, are
        if call.packs and k.storage_offset() != v.storage_offset():  # not as those of tensors by themselves usually are
            packed = self._packed_room(call.heads_first, q, k, v)
        made: list[Any] = [None if room is None else empty_strided(*room) for room in self.rooms[: 5 - len(packed)]]
        rows, signals, dq, dk, dv = *made, *packed
        if self.unseen:
            for x in (dk, dv):
                if x is not None:
                    x.narrow(2 if call.heads_first else 1, 0, self.unseen).zero_()
        given: tuple | None = None
        of_captured: dict[int, torch.Tensor] = {}
        others = call.others
        if others or not call.lengths is call.blocks is None:
            given, of_captured = self._given(call, rows)
        arguments = q, k, v, out, dout, lse_raw, dlse, rows, signals, dq, dk, dv, given, self.alike, raw_stream(self.device)
        run(self.function, arguments)
        if not others:
            return dq, dk, dv
        found = (x if name in wanted else None for name, x in zip("qkv", (dq, dk, dv), strict=True))
        dsinks = None
        if call.sinks is not None and call.sinks.requires_grad:
            natural = call.expression and call.expression.natural
            unit = 1.0 if natural else rules.score_scales(call.scale, call.softcap)[0] * rules.LN_2
            weight = (call.sinks.detach().float()[:, None] - rows[0] * unit).exp_()
            dsinks = -(weight * rows[1]).sum((0, 2)).to(call.sinks.dtype)
        return *found, dsinks, *map(partial(_of_captured, of_captured), range(len(call.captured)), call.captured)

    def _packed_room(self, heads_first: bool, q, k, v) -> tuple:
        """Memory for all three gradients, or for dk and dv, if that of q, k, v, or of k, v, is one tensor; else nothing."""
        for names, parts in (("qkv", (q, k, v)), ("kv", (k, v))):
            if names in self.problem.gradients:
                whole = packed_of(*(x.transpose(1, 2) for x in parts) if heads_first else parts)
                if whole is not None:
                    made = whole.new_empty(whole.shape).unbind(-3)
                    return tuple(x.transpose(1, 2) for x in made) if heads_first else made
        return ()

    def _given(self, call: Call, rows) -> tuple[tuple | None, dict]:
        """A block mask's lists, memory for the gradients of captured tensors, lengths; and that memory by their numbers."""
        if call.lengths is not None and call.sinks is not None and call.sinks.requires_grad:
            rows[0].fill_(math.inf), rows[1].zero_()  # all are summed, and the kernels write those alone that are in use
        of_captured = _room_of_captured(call) if call.expression else {}
        lists = _NO_LISTS if self.lists is None else _lists_of_gradients(call, *self.lists)
        if call.lengths is call.blocks is None and not of_captured:
            return None, of_captured
        lengths = NO_LENGTHS if call.lengths is None else call.lengths.tensors
        return (*lists, tuple(of_captured.values()) or None, *lengths), of_captured


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


def _lists_of_gradients(call: Call, tile_m: int, tile_n: int, rows: int, ordered: bool, visits: bool) -> tuple:
    """A block mask's lists of query tiles and, for so many ``rows`` of queries that walk over them, of key tiles; ranks, where
    dQ is added in a fixed order; and visits of query tiles, where whoever rounds it asks for them."""
    batch, heads = call.batch, call.heads
    return (
        call.blocks.query_lists(tile_m, tile_n, heads // call.heads_kv, batch, call.heads_kv),
        call.blocks.key_lists(rows, tile_n, batch, heads) if rows else None,
        call.blocks.ranks(tile_m, tile_n, batch, heads) if ordered else None,
        call.blocks.visits(tile_m, tile_n, batch, heads) if visits else None,
    )


def classify(kinds: torch.Tensor, expression: Expression, captured: tuple, seqlen_q: int, seqlen_k: int) -> None:
    """``blocks.classified`` by a kernel, on the current stream."""
    problem = Problem.intern("bfloat16", HEAD_DIM_STEP, HEAD_DIM_STEP, expression=expression, blocks="classified")
    _run_alone(problem, kinds, tuple(map(as_read, captured)) if captured else None, seqlen_q, seqlen_k)


def enlist(which: str, kinds: torch.Tensor, lists: torch.Tensor, down: int, across: int, members: int) -> None:
    """Fills ``lists``, zeros so far, with a block mask's ``"key lists"`` or ``"query lists"`` of tiles of ``down`` × ``across``
    blocks, on the current stream."""
    problem = Problem.intern("bfloat16", HEAD_DIM_STEP, HEAD_DIM_STEP, blocks=which)
    _run_alone(problem, kinds, lists, down, across, members)


def as_read(x: torch.Tensor) -> torch.Tensor:
    """A captured tensor as the kernels take it: of one dimension or more, the last one contiguous, and bools as bytes. What is
    not contiguous there is copied."""
    x = x.detach().view(torch.uint8) if x.dtype == torch.bool else x.detach()
    x = x if x.dim() else x.reshape(1)
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def merge(out, lse, more, lse_of_more, to_log2: float):
    """``reference.merge`` in one kernel, on the current stream: ``out`` is in float32 or in the dtype of ``more``."""
    into, so_far = (out, None) if out.dtype is torch.float32 else (torch.empty_like(out, dtype=torch.float32), out)
    if out.numel():
        problem = Problem.intern(DTYPE_NAMES[more.dtype], out.shape[3], out.shape[3], merges=DTYPE_NAMES[out.dtype])
        _run_alone(problem, into, so_far, lse, more, lse_of_more, to_log2)
    return into


def _run_alone(problem: Problem, first: torch.Tensor, *others) -> None:
    """A kernel of which no call's plan knows, on the device of its first argument and the current stream there."""
    device = first.get_device()
    function, _ = prepared(problem, None, device)
    with torch.cuda.device(device):
        function(first, *others, raw_stream(device))


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
            return check_strides("x", strides_for_kernels("x", x))  # dimensions of size 1 may have any, 0 too
    return x.clone(memory_format=torch.contiguous_format)


def what_is_alike(call: Call, blocks: int) -> Any:
    """What the passes of all calls that are alike take, as one argument; of kept calls in the launcher's own form, which takes
    no time to pass."""
    scale_log2, scale_by_cap = rules.score_scales(call.scale, call.softcap)
    captured = tuple(map(as_read, call.captured)) if call.captured else None
    drops: tuple = None, None, None
    if call.seed is not None:
        drops = call.seed.view(torch.int32), dropout.threshold(call.dropout), dropout.kept_scale(call.dropout)
    count = 0 if call.lengths is None else call.lengths.count
    numbers = count, call.left or 0, call.right or 0, scale_log2, scale_by_cap, int(call.heads_first), blocks
    values = captured, *drops, *numbers
    return values if call.plans is None else importlib.import_module("tvm_ffi").convert(values)


class Refused(RuntimeError):  # noqa: N818
    """The launcher takes no such tensors: their dtype, device, strides or alignment. Nothing was launched."""


def run(function: Callable, arguments: tuple) -> None:
    """Call a compiled kernel of the current device. Raises :class:`Refused`."""
    try:
        function(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:  # how the launcher says so
        raise Refused(str(error)) from error


def check_have_memory(q, k, v) -> None:
    """What the launcher doesn't ask: it takes an address of 0. Raises :class:`Refused`; which of them has none is for those to
    say who look at it then."""
    try:
        if q.data_ptr() and k.data_ptr() and v.data_ptr():
            return
    except RuntimeError:  # there is no storage
        pass
    raise Refused(WITHOUT_MEMORY)
