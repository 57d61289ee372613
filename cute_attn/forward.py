"""The forward pass on the host: torch's tensors in CuTe's view, the run-time values, the grid; then the mainloop's kernel."""

from __future__ import annotations

import importlib
from dataclasses import replace

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute import runtime

from cute_attn.fields import FORWARD, Field, Fields, floats_of_a_row, named
from cute_attn.layouts.base import IN_TURN, ROW_PADDING, VECTOR, element, row_padding
from cute_attn.mainloop.common import Values
from cute_attn.scheduler import Tickets, Tiles
from cute_attn.sequences import Sequences, Side
from cute_attn.softmax import LogSumExp


def host_function(problem, config, mainloop=None):
    """The function of :data:`~cute_attn.fields.FORWARD`'s values to compile.

    ``mainloop`` takes the place of the mechanism's own ``Forward``: the benchmarks leave stages out of it.
    """
    if mainloop is None:
        mainloop = importlib.import_module(f"cute_attn.mainloop.{config.mechanism}").Forward(problem, config)

    @cute.jit
    def forward(*arguments):
        given = named(FORWARD, arguments)
        q, k, v, o = (heads_apart(m, problem, given.heads_first) for m in (given.q, given.k, given.v, given.out))
        lse = LogSumExp(*(rows_first(m, problem) for m in (given.lse, given.lse_raw)))
        seqlen_q, seqlen_k = q.shape[0], k.shape[0]
        sequences = sequences_of(problem, q, k, given)
        shift = seqlen_k - seqlen_q if cutlass.const_expr(sequences is None) else 0
        band = shift - given.left, shift + given.right
        names = "sinks", "seed", "drop_below", "kept_scale", "key_lists", "kinds"
        others = {name: getattr(given, name) for name in names}
        values = Values(seqlen_q, seqlen_k, *band, given.scale_log2, given.scale_by_cap, captured_of(problem, given), **others)
        heads_per_kv = q.shape[2] // k.shape[2]
        tiles = Tiles.of(q.shape, heads_per_kv, config.tile_m, given.blocks, problem.unequal, sequences)
        if cutlass.const_expr(given.tickets is not None):
            tiles = replace(tiles, tickets=Tickets(given.tickets))
        if cutlass.const_expr(given.key_lists is not None):
            tiles = replace(tiles, in_turn=given.key_lists[None, None, None, IN_TURN])
        mainloop.launch(q, k, v, o, lse, values, tiles, given.blocks, given.stream)

    return forward


def sequences_of(problem, q: cute.Tensor, k: cute.Tensor, given, padding: int = ROW_PADDING) -> Sequences | None:
    """Where ``given.count`` ragged sequences lie in q and k ``(rows, …)``, and in what is padded to a multiple of ``padding``
    rows. Without bounds rows are equally many for each; without counts of those in use, all are."""
    if not problem.ragged:
        return None
    rows_q, rows_k, each = q.shape[0], k.shape[0], cutlass.max(given.count, 1)
    queries = Side(rows_q, rows_q // each, given.cu_seqlens_q, given.seqused_q, padding)
    return Sequences(given.count, queries, Side(rows_k, rows_k // each, given.cu_seqlens_k, given.seqused_k, padding))


def captured_of(problem, given) -> tuple | None:
    """The tensors that the user's functions read; ``None`` where there are no functions."""
    return given.captured or () if problem.expression else None


@cute.jit
def heads_apart(m: cute.Tensor | None, problem: cutlass.Constexpr, heads_first: Int32) -> cute.Tensor | None:
    """``(batch, seqlen, heads, head_dim)`` or, if ``heads_first``, ``(batch, heads, seqlen, head_dim)`` as ``(seqlen, head_dim,
    heads, batch)``; of ragged sequences ``(seqlen, heads, head_dim)``. One kernel serves both."""
    if cutlass.const_expr(m is None or bool(problem.ragged)):
        return select_modes(m, [0, 2, 1, None])
    batch, seqlen, heads, columns = m.shape
    of_batch, of_row, of_head, of_column = m.stride
    if heads_first:
        seqlen, heads, of_row, of_head = heads, seqlen, of_head, of_row
    strides = (cute.assume(of_row, VECTOR), of_column, cute.assume(of_head, VECTOR), of_batch)
    return cute.make_tensor(m.iterator, cute.make_layout((seqlen, columns, heads, batch), stride=strides))


def rows_first(m: cute.Tensor | None, problem) -> cute.Tensor | None:
    """``(batch, heads, seqlen)``, of ragged sequences without a batch, as ``(seqlen, heads, batch)``."""
    return select_modes(m, [1, 0, None] if problem.ragged else [2, 1, 0])


def select_modes(m: cute.Tensor | None, modes: list) -> cute.Tensor | None:
    """The same memory with its modes in another order, and one of size 1 for a ``None`` at the end; ``None`` stays ``None``."""
    if m is None:
        return None
    layout = cute.select(m.layout, mode=[mode for mode in modes if mode is not None])
    if modes[-1] is None:
        layout = cute.make_layout((*layout.shape, 1), stride=(*layout.stride, 0))
    return cute.make_tensor(m.iterator, layout)


def stand_ins(fields: Fields, problem, config) -> tuple:
    """For the values of a pass, with every size and stride unknown: the kernels fit all of them."""

    def of(field: Field | tuple[Field, ...]):
        if not isinstance(field, Field):
            group = stand_ins(field, problem, config)
            return group if any(x is not None for x in group) else None
        return _stand_in(field.kind, problem, config) if field.asked(problem, config) else None

    return tuple(map(of, fields))


def _stand_in(kind: str, problem, config):
    """Strides are 64-bit, so that offsets past 2³¹ elements are exact, and an operand's multiples of 16 bytes but for the
    contiguous one."""

    def some(n: int, divisibility: int = 1) -> tuple:
        return tuple(cute.sym_int64(divisibility=divisibility) for _ in range(n))

    def sizes(n: int, divisibility: int = 1) -> tuple:
        return *(cute.sym_int() for _ in range(n - 1)), cute.sym_int(divisibility=divisibility)

    if kind in ("int32", "float32"):
        return Int32(0) if kind == "int32" else Float32(0.0)
    if kind == "stream":
        return runtime.make_fake_stream()
    anywhere = {"words": (Int32, 1), "tables": (Int32, 2), "lists": (Int32, 4), "kinds": (cutlass.Uint8, 4)}
    anywhere |= {"floats": (Float32, 1), "row values": (Float32, 2 if problem.packed else 3)}
    if kind in anywhere:  # which begin at any element
        dtype, dims = anywhere[kind]
        return runtime.make_fake_tensor(dtype, sizes(dims), (*some(dims - 1), 1), assumed_align=dtype.width // 8)
    if kind == "captured":
        return tuple(_captured(dtype, max(rank, 1), together) for dtype, rank, together in problem.expression.tensors)
    if kind == "of captured":
        of, tensors = problem.expression.derived, problem.expression.tensors
        return tuple(
            _captured(tensors[i][0] if by.alone else "float32", max(tensors[i][1], 1) + len(by.copied)) for i, by in of.items()
        )
    if kind == "angles":
        return runtime.make_fake_tensor(element(problem), sizes(2, 8), (*some(1, 8), 1), assumed_align=16)
    if kind == "workspace":
        return runtime.make_fake_tensor(Float32, sizes(1), (1,), assumed_align=16)
    if kind in ("operand", "exact operand", "cache"):
        dims, dtype = 3 if problem.packed and kind != "cache" else 4, Float32 if kind == "exact operand" else element(problem)
        return runtime.make_fake_tensor(dtype, sizes(dims, 8), (*some(dims - 1, 8), 1), assumed_align=16)
    shape = floats_of_a_row(problem, config), *sizes(3, row_padding(config))
    return runtime.make_fake_tensor(Float32, shape, (*some(3, row_padding(config)), 1), assumed_align=16)


def _captured(dtype: str, rank: int, together: int = 1):
    """Any tensor of a dtype whose last dimension is contiguous and begins at multiples of so many elements; bools are bytes."""
    names = {"bool": "Uint8", "uint8": "Uint8", "bfloat16": "BFloat16"}
    of = getattr(cutlass, names.get(dtype, dtype.capitalize()))
    shape = *(cute.sym_int() for _ in range(rank - 1)), cute.sym_int(divisibility=together)
    stride = tuple(cute.sym_int64(divisibility=together) for _ in range(rank - 1))
    return runtime.make_fake_tensor(of, shape, (*stride, 1), assumed_align=together * of.width // 8)
