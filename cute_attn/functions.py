"""From what users pass that changes scores, a mask and a score as functions, ALiBi's slopes and a bias, to an expression.

Each function is called once, as ``tracing.py`` says, and what is known of it is kept (``memo.py``). While torch.compile follows
one, it is called with :func:`positions`; the graph to come has the expression as text, of which :func:`restored` makes it.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from cute_attn import memo
from cute_attn.arguments import check_tensor, shown
from cute_attn.expressions import KINDS, NOTHING, POSITIONS, Expression, Partial, ramp_of, trimmed
from cute_attn.lengths import are_checked
from cute_attn.private import FakeTensor, is_recorded
from cute_attn.tracing import Graph, Symbol, Tracing, refuse

_TAKES = {"mask": "batch, head, q_idx, kv_idx", "score": "score, batch, head, q_idx, kv_idx"}
RESTORED_MAX = 1024  # expressions; each of another text, or tensors
# Copies of a gradient may take so much memory, or so many bytes an element; what is added up takes 4.
COPIES_BYTES, COPIES_OF_ELEMENT = 1 << 30, 8


def traced(
    mask: Callable | None, score: Callable | None, tensors: Any, alibi_slopes, q: torch.Tensor, heads: int, batch: int,
    bias: torch.Tensor | None = None, lengths: tuple[int, int] | None = None, behind: bool = False, as_text: bool = False,
):  # fmt: skip
    """``(expression, captured tensors)`` of what a user passes: a mask and a score, what they get beside positions, and the
    slopes of ALiBi and a bias, which are added last. Calls each function once. ``lengths`` are (seqlen_q, seqlen_k), None where
    sequences have their own. ``behind``: no query sees a key that comes after the one it is aligned with. ``as_text`` returns
    in the place of the expression what :func:`restored` makes one of, where the tensors have no values or addresses yet.

    Raises ``TypeError``, ``ValueError`` and ``NotImplementedError`` for what a function can't do, or tensors that don't fit.
    """
    check_functions(mask, score, tensors)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, q, heads, batch)
    code = getattr(mask if mask is not None else score if score is not None else _alibi, "__code__", None)
    sizes = dict(zip(POSITIONS, (batch, heads, *(lengths or (None, None))), strict=False))
    element = element_of(bias) if bias is not None and _is_bias(bias, q, sizes) else None
    graph = next((f.graph for f in (mask, score) if isinstance(f, Called) and f.graph), None) or Graph(q.device)
    if as_text:
        ends = _recorded(graph, mask, score, tensors, alibi_slopes, element, behind)
        if shapes := [f.result for f in (mask, score) if isinstance(f, Called) and f.of_shapes]:
            return OF_SHAPES, (*_on_device(graph.captured, q.device), *shapes)  # whose gradients make the output require one
        if ends == (None, None):
            return "", ()
        return repr((graph.nodes, *ends)), _on_device(graph.captured, q.device)
    given = mask, score, tuple(tensors), alibi_slopes, element, q.device, torch.is_grad_enabled(), behind
    kept = memo.find(code, given, lambda trace, captured: _fits(trace, captured, sizes))
    if kept is not None:
        (expression, _), captured = kept
        return expression, _on_device(captured, q.device)
    matches = memo.matcher(given)
    seen, changed = _recorded(graph, mask, score, tensors, alibi_slopes, element, behind)
    if seen is None and changed is None:
        return NOTHING, ()
    captured = _on_device(graph.captured, q.device)
    expression = _completed(graph, seen, changed, captured, sizes, torch.is_grad_enabled())
    if matches is not None and graph.pure and code is not None:
        memo.keep(code, given, matches, (expression, sizes if expression.partials else None), tuple(graph.captured))
    return expression, captured


def check_functions(mask: Any, score: Any, tensors: Any) -> None:
    """Refuse what are no functions, or no tensors that these get."""
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(x, torch.Tensor) for x in tensors):
        raise TypeError(f"tensors is {shown(tensors)}; a tuple of tensors is needed: try tensors=(table,)")
    if tensors and mask is None and score is None:
        raise TypeError(
            "tensors are given without mask or score; a function that reads them is needed: try score=fn, or leave them out"
        )
    for name, function in (("mask", mask), ("score", score)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {shown(function)}; a function is needed: try {name}=lambda {_TAKES[name]}: …")


def _check_parameters(name: str, function: Callable, arguments: tuple) -> None:
    """Refuse a function that can't be called so. Python's own words would be of a call that nobody wrote."""
    try:
        parameters = signature(function)
    except (TypeError, ValueError):  # as those of some callables that aren't written in Python
        return
    try:
        parameters.bind(*arguments)
    except TypeError:
        takes = f"{_TAKES[name]}{', *tensors' * (len(arguments) > len(_TAKES[name].split()))}"
        raise TypeError(
            f"{name} has the parameters {parameters}; those of {name}({takes}) are needed: try {name}=lambda {takes}: …"
        ) from None


def check_values(captured: tuple[torch.Tensor, ...]) -> None:
    """With ``CUTE_ATTN_CHECK=1`` read integers of 64 bits back and refuse those that would be cut."""
    for x in captured:
        if x.dtype == torch.int64 and are_checked():
            least, most = (int(end) for end in x.aminmax())
            if not -(2**31) <= least <= most < 2**31:
                got = f"a captured tensor of shape {tuple(x.shape)} with values from {least} to {most}"
                refuse(got, "integers of 32 bits are needed", "torch.unique(x, return_inverse=True)[1]", ValueError)


def _recorded(graph: Graph, mask, score, tensors, alibi_slopes, element, behind: bool) -> tuple[int | None, int | None]:
    """The nodes of whether a key is seen, and of what becomes of the score; None where there is nothing to compute."""
    batch, head, q_idx, kv_idx, shift = map(graph.leaf, POSITIONS)
    seen = None
    if mask is not None:
        seen = graph.cast(_called(graph, "mask", mask, (batch, head, q_idx, kv_idx, *tensors), "bool"), "bool")
    scored = before = graph.leaf("score")
    if score is not None:
        scored = graph.symbol(_called(graph, "score", score, (scored, batch, head, q_idx, kv_idx, *tensors), "float"))
    if alibi_slopes is not None:
        arguments = (scored, batch, head, q_idx, kv_idx, shift, alibi_slopes, behind)
        scored = graph.symbol(_called(graph, "alibi_slopes", _alibi, arguments, "float"))
    if element is not None:
        to_bias = (scored, batch, head, q_idx, kv_idx)
        scored = graph.symbol(_called(graph, "bias", lambda score, *where: score + element(*where), to_bias, "float"))
    return seen, None if scored.node == before.node else scored.node


def _called(graph: Graph, name: str, function: Any, arguments: tuple, kind: str) -> int:
    """The node that a function returns."""
    try:
        with Tracing(graph):
            result = function(*arguments)
    except TypeError:
        _check_parameters(name, function, arguments)
        raise
    if not isinstance(result, (Symbol, bool, int, float, np.generic, torch.Tensor)):
        raise TypeError(f"{name} returns {shown(result)}; a {kind} is needed: try return of what the function computes")
    node = graph.operand(result)
    if (graph.kind(node) == "bool") != (kind == "bool"):
        instead = "a comparison, or score= for biases" if kind == "bool" else "torch.where(condition, score, …), or mask="
        raise TypeError(f"{name} returns values of kind {graph.kind(node)}; a {kind} is needed: try {instead}")
    return graph.cast(node, kind)


def _completed(
    graph: Graph, seen: int | None, changed: int | None, captured: tuple, sizes: dict[str, int | None], differentiated: bool
) -> Expression:
    """The expression of two nodes, with the derivatives that are needed. ``captured`` lie where they are read."""
    slope: int | None = None
    partials: tuple[Partial, ...] = ()
    if changed is not None:
        slope = graph.slope(changed, graph.make("leaf", "float", "score"))
        slope = graph.constant(0.0) if slope is None else None if slope == graph.constant(1.0) else slope
        partials = _partials(graph, changed, sizes) if differentiated else ()
    kinds = tuple((str(x.dtype).removeprefix("torch."), x.dim(), _neighbours(x, sizes["kv_idx"])) for x in captured)
    expression = trimmed(Expression(tuple(graph.nodes), seen, changed, slope, kinds, partials))
    if changed is not None and not partials:
        expression = replace(expression, ramp=ramp_of(expression))
    return expression


def _on_device(captured, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(x if x.device == device else x.to(device) for x in captured)


# ---- captured tensors ------------------------------------------------------------------------------------------------


def _fits(trace: tuple, captured: tuple, sizes: dict[str, int | None]) -> bool:
    """Whether a trace that is kept is right for these sizes and addresses."""
    (expression, of_sizes), keys = trace, sizes["kv_idx"]
    alike = (n == _neighbours(x, keys) for (_, _, n), x in zip(expression.tensors, captured, strict=True))
    return of_sizes in (None, sizes) and all(alike)


def _neighbours(x: torch.Tensor, keys: int | None) -> int:
    """How many elements, of 8 bytes at most, are at an address that is a multiple of all, from each multiple of so many on, for
    all of so many keys."""
    if not x.dim() or x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or keys is None or x.shape[-1] < keys:
        return 1
    *strides, last = x.stride()
    n = 8 // x.element_size()
    while n > 1 and any(size % n for size in (x.shape[-1], *strides, x.data_ptr() // x.element_size())):
        n //= 2
    return n if last == 1 else 1


def _partials(graph: Graph, score: int, sizes: dict[str, int | None]) -> tuple[Partial, ...]:
    """The score's derivatives by what is loaded of captured tensors that require a gradient."""
    found = []
    for load in range(len(graph.nodes)):
        op, kind, *operands = graph.nodes[load]
        if op == "load" and kind == "float" and graph.captured[operands[0]].requires_grad:
            slope = graph.slope(score, load)
            if slope is not None:
                one = slope == graph.constant(1.0)
                found.append(Partial(load, None if one else slope, False))
    slots = [graph.nodes[partial.load][2] for partial in found]
    for i, (partial, slot) in enumerate(zip(found, slots, strict=True)):
        copied, x = _copied(graph, partial.load, sizes), graph.captured[slot]
        if copied is not None and slots.count(slot) == 1:
            by_key = graph.nodes[graph.nodes[partial.load][-1]] == ("leaf", "int", "kv_idx") and not x.shape[-1] % 4
            found[i] = partial._replace(alone=True, copied=copied, fours=by_key and x.element_size() == 2)
    return tuple(found)


def _copied(graph: Graph, load: int, sizes: dict[str, int | None]) -> tuple[str, ...] | None:
    """For which positions a gradient has to have copies, so that each score has an element of its own: there are indices for
    its row, its key, and all else that differs. None if it can't have them, or not so many."""
    slot, *where = graph.nodes[load][2:]
    names, x = [graph.nodes[i][2] if graph.nodes[i][0] == "leaf" else "" for i in where], graph.captured[slot]
    fits = all(sizes.get(name) == size for name, size in zip(names, x.shape, strict=True))
    if not fits or len(set(names)) != len(names) or not {"q_idx", "kv_idx"} <= set(names):
        return None
    missing = {name: size for name, size in sizes.items() if name not in names and size not in (None, 1)}
    copies = math.prod(missing.values())
    many = max(COPIES_OF_ELEMENT, COPIES_BYTES // max(x.numel(), 1)) // x.element_size()
    return tuple(missing) if copies <= many else None


# ---- slopes and biases -----------------------------------------------------------------------------------------------


def _alibi(score, batch, head, q_idx, kv_idx, shift, slopes, behind: bool):
    slope = slopes[head] if slopes.dim() == 1 else slopes[batch, head]
    distance = q_idx + shift - kv_idx
    return score - slope * (distance if behind else torch.abs(distance))


def _check_slopes(x: Any, q: torch.Tensor, heads: int, batch: int) -> None:
    need = f"float32 ({heads},) or ({batch}, {heads}), (heads,) or (batch, heads), on {q.device}"
    check_tensor("alibi_slopes", x, f"a tensor, {need}, is needed: try torch.tensor(alibi_slopes)")
    if x.dtype != torch.float32 or x.device != q.device or x.shape not in ((heads,), (batch, heads)):
        hint = ".float() and .to(q.device)" if x.shape in ((heads,), (batch, heads)) else f"a slope for each of {heads} heads"
        raise ValueError(f"alibi_slopes is {shown(x)} on {x.device}; {need}, is needed: try {hint}")


def element_of(x: torch.Tensor) -> Callable:
    """A function of positions that takes an element of ``x``, which broadcasts to ``(batch, heads, seqlen_q, seqlen_k)``. It
    has an index for each dimension along which x differs, those that are closest in memory last; or its gradient, which of an
    expanded tensor that keeps its own is another for each of the elements that lie at one place."""
    strides = dict(zip(range(4 - x.dim(), 4), zip(x.shape, x.stride(), strict=True), strict=True))
    keeps = x.requires_grad and torch.is_grad_enabled() and (x.is_leaf or x.retains_grad)
    differ = [n for n, (size, stride) in strides.items() if size > 1 and (stride or keeps)]
    # By how many strides are larger, and not by the stride itself: torch.compile may have a symbol for that, and sorts by none.
    dims = tuple(sorted(differ, key=lambda n: len([m for m in differ if strides[m][1] > strides[n][1] > 0])))
    part = x[tuple(slice(None) if dim in dims else 0 for dim in strides)]
    part = part.permute([sorted(dims).index(dim) for dim in dims])
    return lambda *where: part[tuple(where[dim] for dim in dims)]


def _is_bias(x: Any, q: torch.Tensor, sizes: dict[str, int | None]) -> bool:
    """Refuse what is no bias; whether it has any element."""
    rows = ("any" if size is None else str(size) for size in sizes.values())
    dtypes = " or ".join(dict.fromkeys(str(dtype) for dtype in (q.dtype, torch.float32)))
    need = f"a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k), ({', '.join(rows)}), of {dtypes}, on {q.device}"
    check_tensor("bias", x, f"{need}, is needed: try torch.tensor(bias)")
    sized = zip(reversed(x.shape), reversed(list(sizes.values())), strict=False)
    if x.dim() > 4 or not all(n == 1 or size is None or n == size for n, size in sized):
        raise ValueError(f"bias has shape {tuple(x.shape)}; {need}, is needed: try unsqueeze for dimensions that are missing")
    if x.dtype not in (q.dtype, torch.float32) or x.device != q.device:
        hint = "mask=cute_attn.masks.given(bias)" if x.dtype == torch.bool else ".to(q.dtype) and .to(q.device)"
        raise ValueError(f"bias is {shown(x)} on {x.device}; {need}, is needed: try {hint}")
    return bool(x.numel())


# ---- in graphs -------------------------------------------------------------------------------------------------------

OF_SHAPES = "of shapes only"
_restored: dict[tuple, Expression] = {}


def restored(
    text: str, captured: tuple[torch.Tensor, ...], batch: int, heads: int, lengths: tuple[int, int] | None
) -> Expression:
    """The expression whose text :func:`traced` returned, with derivatives by those of the tensors that require a gradient."""
    sizes = dict(zip(POSITIONS, (batch, heads, *(lengths or (None, None))), strict=False))
    alike = tuple((x.dtype, x.shape, x.requires_grad, _neighbours(x, sizes["kv_idx"])) for x in captured)
    differentiated = any(x.requires_grad for x in captured)
    key = text, alike, tuple(sizes.values()) if differentiated else None
    found = _restored.get(key)
    if found is None:
        if text == OF_SHAPES:
            raise RuntimeError(
                "mask or score was called to see what shapes there are, and what it computes is not known; a graph that "
                "torch.compile or torch.export has made is needed: try torch.compiler.disable around attention"
            )
        nodes, seen, changed = ast.literal_eval(text)
        graph = Graph(captured[0].device if captured else torch.device("cpu"))
        graph.nodes, graph.captured = nodes, list(captured)
        graph.numbers = {node: i for i, node in enumerate(nodes)}
        found = _completed(graph, seen, changed, captured, sizes, differentiated)
        if len(_restored) >= RESTORED_MAX:
            _restored.clear()
        _restored[key] = found
    return found


@dataclass(frozen=True)
class Called:
    """A function that was called before, with :func:`positions`, and what it returned, by whose graph."""

    result: Any
    graph: Graph | None

    @property
    def of_shapes(self) -> bool:
        """Whether it was called with no symbols, but to see what shapes there are."""
        return isinstance(self.result, FakeTensor) and self.result.dim() > 0

    def __call__(self, *_: Any) -> Any:
        return self.result.new_empty(()) if self.of_shapes else self.result


def positions(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The positions that functions are called with while torch.compile follows them: symbols where what it made of them is run.
    Before, where it looks for shapes only, tensors without values; of one element, since torch would read an index of 0
    dimensions."""
    if isinstance(q, FakeTensor) and not is_recorded():
        return tuple(q.new_empty(1, dtype=KINDS["int"]) for _ in POSITIONS[:-1])
    graph = Graph(q.device, called_elsewhere=True)
    return tuple(map(graph.leaf, POSITIONS))[:-1]


def score_of(position: torch.Tensor) -> torch.Tensor:
    """The score to such a position, from when on it is asked for: nodes have the order that :func:`traced` gives them."""
    if isinstance(position, Symbol):
        return position.graph.leaf("score")
    return position.new_empty(1, dtype=KINDS["float"])


_REVERSED = {f"__r{name}__": getattr(operator, name) for name in ("sub", "truediv", "floordiv", "mod", "pow")}
_REVERSED["__rdiv__"] = operator.truediv


class Indexing(TorchFunctionMode):
    """Has :func:`indexed` take elements of tensors while torch.compile follows functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func.__name__ in _REVERSED:  # torch writes these in Python, of other operations
            return _REVERSED[func.__name__](args[1], args[0])
        return func(*args, **(kwargs or {}))


def indexed(x: torch.Tensor, where: Any) -> torch.Tensor:
    """``x[where]``; where torch.compile looks for shapes only, of the shape that numbers for indices leave: those of
    :func:`positions` have one element, for which torch leaves a dimension, and what is loaded is of any integer dtype."""
    if not isinstance(x, FakeTensor) or is_recorded():
        return x[where]
    indices = where if isinstance(where, tuple) else (where,)
    numbers = all(isinstance(i, (int, torch.SymInt, torch.Tensor)) and not isinstance(i, bool) for i in indices)
    symbols = [i for i in indices if isinstance(i, torch.Tensor) and i.shape == (1,)]
    if not (numbers and symbols and len(indices) <= x.dim()) or any(i.is_floating_point() for i in symbols):
        return x[where]
    return x.new_empty(x.shape[len(indices) :] or (1,)).requires_grad_(x.requires_grad and torch.is_grad_enabled())
