"""What a compiled pass takes: a table of fields for each, in their order.

The stand-ins for which it is compiled and the names inside it follow from the table (``forward.py``, ``backward.py``,
``merge.py``), and the order in which the host hands over the values (``launch.py``) is the table's. A field that a problem
hasn't is ``None``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from cute_attn import layouts
from cute_attn.layouts.base import ADDED, COUNTED_KEYS, Config
from cute_attn.lengths import NAMES
from cute_attn.plan import takes_tickets
from cute_attn.problem import Problem
from cute_attn.stored import CODE_NAMES


class Field(NamedTuple):
    """One of them. Kinds: an ``operand`` is as torch holds it, in the inputs' dtype, ``(batch, seqlen, heads, head_dim)`` or,
    if ``heads_first``, ``(batch, heads, seqlen, head_dim)``, and ``row values`` are a float32 for each of its rows, ``(batch,
    heads, seqlen)``; of ragged sequences both have no batch. An ``exact operand`` is one in float32. ``padded row values`` are
    :func:`floats_of_a_row`, ``(n, batch, heads, rows)``, from the third on the memory of dQ's sums; ``words`` int32 ``(n,)``,
    ``floats`` float32 ``(n,)``, ``lists`` int32 ``(batch, heads, tiles, n)``, ``kinds`` of blocks uint8 ``(batch, heads, rows,
    columns)``; ``captured`` are all tensors that functions read, ``of captured`` the gradients of some; and there are numbers
    and the ``stream``. A ``cache`` is an operand of all its elements, ``tables`` int32 ``(batch, max_pages)``, ``angles`` in
    the inputs' dtype, and a ``workspace`` float32 ``(n,)`` at a multiple of 16 bytes."""

    name: str
    kind: str
    asked: Callable[[Problem, Config], bool] = lambda problem, config: True


Fields = tuple["Field | tuple[Field, ...]", ...]


def _is(flag: str) -> Callable[[Problem, Config], bool]:
    return lambda problem, config: bool(getattr(problem, flag))


def _in(names: str, name: str) -> Callable[[Problem, Config], bool]:
    return lambda problem, config: name in getattr(problem, names)


def has_sums(problem: Problem, config: Config) -> bool:
    """Whether parts of dQ are added up in memory."""
    return "q" in problem.gradients and bool(layouts.family(config).pieces(config))


def floats_of_a_row(problem: Problem, config: Config) -> int:
    """How many float32 a query row takes in the backward pass: its log-sum-exp and delta, and its part of dQ's sums."""
    return 2 + (math.prod(sizes_of_sums(config)) // config.tile_m if has_sums(problem, config) else 0)


def sizes_of_sums(config: Config) -> tuple[int, int]:
    """``(values of a piece, pieces)`` of dQ's sums of a query tile."""
    return math.prod(layouts.family(config).piece_shape(config)), len(layouts.family(config).pieces(config))


def counts_tiles(problem: Problem, config: Config) -> bool:
    """Whether each query tile has a counter of the key tiles that have added to its dQ."""
    return has_sums(problem, config) and (problem.deterministic or layouts.family(config).FIRST_STORES)


def first_stores(problem: Problem, config: Config) -> bool:
    """Whether of the parts of a query tile's dQ the first is stored, so that their sums' memory needs no zeros: in a fixed
    order it is known which that is, unless a list says so."""
    ordered = problem.deterministic and not problem.blocks
    return has_sums(problem, config) and (ordered or layouts.family(config).FIRST_STORES)


def rounds_beside(problem: Problem, config: Config) -> bool:
    """Whether dQ's sums are rounded while others are added up: query tiles have counters, of which 31 bits hold how many key
    tiles add to each. Not of ragged sequences where blocks share a key tile: those without a tile never say that they have
    ended, which whoever rounds would wait for if bounds were wrong."""
    known = not (problem.ragged and config.head_blocks > 1) and COUNTED_KEYS // config.tile_n * ADDED < 2**31
    return counts_tiles(problem, config) and layouts.family(config).FIRST_STORES and known


def has_signals(problem: Problem, config: Config) -> bool:
    """Whether the kernels and their blocks tell one another something: that keys or rows are masked, who has added to dQ, and,
    where a kernel each draws tickets, which tiles of ragged sequences have been drawn."""
    draws = bool(problem.ragged) and not layouts.family(config).pieces(config)
    return problem.masked or counts_tiles(problem, config) or draws


def _is_listed(problem: Problem, config: Config) -> bool:
    return problem.blocks == "listed"


def walks_over_keys(problem: Problem, config: Config) -> bool:
    """Whether a kernel of the backward pass takes query tiles and walks over keys, as dQ's does where it has no sums."""
    return "q" in problem.gradients and not has_sums(problem, config)


_LENGTHS = tuple(Field(name, "words", _in("ragged", name)) for name in NAMES)
_CAPTURED = Field("captured", "captured", lambda problem, config: bool(problem.expression.tensors))
_ALIKE = (
    _CAPTURED,
    Field("seed", "words", _is("dropout")),
    Field("drop_below", "int32", _is("dropout")),
    Field("kept_scale", "float32", _is("dropout")),
    *(Field(name, "int32") for name in ("count", "left", "right")),
    *(Field(name, "float32") for name in ("scale_log2", "scale_by_cap")),
    *(Field(name, "int32") for name in ("heads_first", "blocks")),
)
_STREAM = Field("stream", "stream")
FORWARD: Fields = (
    *(Field(name, "operand") for name in ("q", "k", "v", "out")),
    Field("lse", "row values", _is("return_lse")),
    Field("lse_raw", "row values", _is("for_backward")),
    (
        Field("tickets", "words", takes_tickets),
        Field("sinks", "floats", _is("sinks")),
        Field("key_lists", "lists", _is_listed),
        Field("kinds", "kinds", _is_listed),
        *_LENGTHS,
    ),
    _ALIKE,
    _STREAM,
)
BACKWARD: Fields = (
    *(Field(name, "operand") for name in ("q", "k", "v", "out", "dout")),
    Field("lse_raw", "row values"),
    Field("dlse", "row values", _is("return_lse")),
    Field("rows", "padded row values"),
    Field("signals", "words", has_signals),
    *(Field(f"d{name}", "operand", _in("gradients", name)) for name in "qkv"),
    (
        Field("query_lists", "lists", _is_listed),
        Field("key_lists", "lists", lambda problem, config: _is_listed(problem, config) and walks_over_keys(problem, config)),
        Field("ranks", "lists", lambda problem, config: _is_listed(problem, config) and problem.deterministic),
        Field("visits", "lists", lambda problem, config: _is_listed(problem, config) and rounds_beside(problem, config)),
        Field("of_captured", "of captured", lambda problem, config: bool(problem.expression.partials)),
        *_LENGTHS,
    ),
    _ALIKE,
    _STREAM,
)
CLASSIFY: Fields = (
    Field("kinds", "kinds"),
    _CAPTURED,
    *(Field(name, "int32") for name in ("seqlen_q", "seqlen_k")),
    _STREAM,
)
ENLIST: Fields = (
    Field("kinds", "kinds"),
    Field("lists", "lists"),
    *(Field(name, "int32") for name in ("down", "across", "members")),
    _STREAM,
)
MERGE: Fields = (
    Field("into", "exact operand"),
    Field("so_far", "operand", lambda problem, config: problem.merges == problem.dtype),
    Field("lse", "row values"),
    Field("more", "operand"),
    Field("lse_more", "row values"),
    Field("to_log2", "float32"),
    _STREAM,
)
_STORED = (
    Field("lengths", "words"),
    Field("page_table", "tables", _in("stored", "page_table")),
    *(Field(name, "words", _in("stored", name)) for name in CODE_NAMES[1:]),
    Field("seqlen_new", "int32"),
)
ATTEND: Fields = (
    Field("q", "operand"),
    *(Field(name, "cache") for name in ("k_cache", "v_cache")),
    Field("out", "operand"),
    Field("lse", "row values", _is("return_lse")),
    Field("workspace", "workspace"),
    Field("counters", "int32"),
    Field("sinks", "floats", _is("sinks")),
    _CAPTURED,
    *_STORED,
    *(Field(name, "int32") for name in ("units", "places", "rows_kept", "left", "right")),
    *(Field(name, "float32") for name in ("scale_log2", "scale_by_cap")),
    Field("blocks", "int32"),
    _STREAM,
)


def _turns(problem: Problem, config: Config) -> bool:
    return problem.appends in ("halves", "interleaved")


APPEND: Fields = (
    *(Field(name, "cache") for name in ("k_cache", "v_cache")),
    *(Field(name, "operand") for name in ("k_new", "v_new")),
    *(Field(name, "operand", _turns) for name in ("q", "q_turned")),
    *(Field(name, "angles", _turns) for name in ("cos", "sin")),
    Field("rotary_begin", "words", _in("stored", "rotary_begin")),
    *_STORED,
    _STREAM,
)

# By the module that has the function to compile; there are no others.
TABLES: dict[str, Fields] = {
    "forward": FORWARD, "backward": BACKWARD, "merge": MERGE, "classify": CLASSIFY, "enlist": ENLIST, "attend": ATTEND,
    "append": APPEND,
}  # fmt: skip


def named(fields: Fields, values: Sequence) -> Any:
    """The values by the fields' names."""
    found = SimpleNamespace()
    for field, value in zip(fields, values, strict=True):
        if isinstance(field, Field):
            setattr(found, field.name, value)
        else:
            vars(found).update(vars(named(field, (None,) * len(field) if value is None else value)))
    return found


def in_order(fields: Fields, values: dict[str, Any]) -> tuple:
    """The values as a compiled pass takes them, None for what isn't among them."""
    found: list[Any] = []
    for field in fields:
        if isinstance(field, Field):
            found.append(values.get(field.name))
        else:
            group = in_order(field, values)
            found.append(None if all(x is None for x in group) else group)
    return tuple(found)
