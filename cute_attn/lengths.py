"""How long the sequences of a call are, where they aren't all of one length: what the host knows of it.

That is little: a tensor on the device for each side, whose values only the reference and checks read back.
``cute_attn.sequences`` is what the kernels know.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from cute_attn.arguments import check_layout, shown

NAMES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
NO_LENGTHS = (None,) * len(NAMES)  # of a rectangle
CHECK = "CUTE_ATTN_CHECK"  # in the environment: 1 to read lengths back and check them


@dataclass(slots=True)
class Lengths:
    """Of ragged sequences, int32 on the device of q, in the order of :data:`NAMES`; None for what there is not.

    Their rows lie one after another: those of sequence i from ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, or, without these,
    equally many for each; of these the first ``seqused[i]`` are in use, or, without those, all.
    """

    count: int
    tensors: tuple[torch.Tensor | None, ...]

    @property
    def names(self) -> str:
        """Of those that there are: what ``Problem.ragged`` is."""
        return names_of(NAMES, self.tensors)

    def bounds(self, side: int, rows: int) -> list[tuple[int, int]]:
        """Of queries (``side`` 0) or keys (1), ``rows`` in all: from which row up to which each sequence's lie. Read back from
        the device; whatever is there, none reaches past ``rows``, as in ``sequences.Side``."""
        cu_seqlens = self.tensors[side]
        if cu_seqlens is None:
            values = [i * (rows // max(self.count, 1)) for i in range(self.count + 1)]
        else:
            values = [min(max(value, 0), rows) for value in cu_seqlens.tolist()]
        return [(first, max(first, past)) for first, past in pairwise(values)]

    def in_use(self, side: int, rows: int) -> list[slice]:
        """The same of the rows in use, as slices."""
        bounds, seqused = self.bounds(side, rows), self.tensors[2 + side]
        used = [past - first for first, past in bounds] if seqused is None else seqused.tolist()
        return [slice(first, min(first + max(n, 0), past)) for (first, past), n in zip(bounds, used, strict=True)]

    def slots(self, rows: int, tile: int) -> int:
        """How many slots of ``tile`` rows the sequences have in ``rows``, as ``sequences.Side.all_slots`` counts them."""
        return rows // tile + self.count + 1

    def check_values(self, rows: tuple[int, int]) -> None:
        """With ``CUTE_ATTN_CHECK=1`` read the lengths back and refuse wrong ones; ``rows`` are all of q and of k."""
        if are_checked():
            for side in (0, 1):
                self._check_side(side, rows[side])

    def _check_side(self, side: int, rows: int) -> None:
        if (cu_seqlens := self.tensors[side]) is not None:
            name, values = NAMES[side], cu_seqlens.tolist()
            for i, (before, after) in enumerate(pairwise(values)):
                if after < before:
                    raise ValueError(
                        f"{name} falls from {before} to {after} after element {i}; ascending bounds are needed: try "
                        f"torch.cumsum of the lengths, with a 0 before it"
                    )
            narrowed = self.tensors[2 + side] is not None  # the first sequence of such a nested tensor begins anywhere
            if values[0] < 0 or (values[0] and not narrowed) or values[-1] > rows:
                raise ValueError(
                    f"{name} goes from {values[0]} to {values[-1]}; from 0 to at most {rows}, the rows there are, is needed: "
                    f"try torch.cumsum of the lengths, with a 0 before it"
                )
        if (seqused := self.tensors[2 + side]) is not None:
            name = NAMES[2 + side]
            for i, (used, (first, past)) in enumerate(zip(seqused.tolist(), self.bounds(side, rows), strict=True)):
                check_within(name, i, used, past - first, "the rows of that sequence")


def check_within(name: str, where: object, value: int, most: int, what: str) -> None:
    """Refuse a value that was read back and is not from 0 to ``most``."""
    if not 0 <= value <= most:
        raise ValueError(f"{name}[{where}] is {value}; from 0 to {most}, {what}, is needed: check how {name} was made")


def names_of(names: tuple[str, ...], tensors: tuple[Any, ...]) -> str:
    """The names of the tensors that there are, with spaces between, as :class:`~cute_attn.problem.Problem` has them."""
    return " ".join([name for name, x in zip(names, tensors, strict=True) if x is not None])


def are_checked() -> bool:
    """Whether lengths are to be read back and checked."""
    return os.environ.get(CHECK) == "1"


def check_lengths(q: torch.Tensor, count: int | None, tensors: tuple[Any, ...]) -> Lengths:
    """Check what the host sees of lengths, in the order of :data:`NAMES`: kind, dtype, device, shape. ``count`` is how many
    sequences there are, None where the first of the lengths says so.

    Raises ``TypeError`` and ``ValueError``.
    """
    for name, x in zip(NAMES, tensors, strict=True):
        if x is None or (x is tensors[0] and name == "cu_seqlens_k"):  # often one tensor is the bounds of both
            continue
        n = sequences_of(name, x, q.device)
        count = n if count is None else count
        if n != count:
            raise ValueError(
                f"{name} is of {n} sequences where there are {count}; one length for each is needed: check how {name} was made"
            )
    assert count is not None
    return Lengths(count, in_one_piece(tensors))


def sequences_of(name: str, x: Any, device: torch.device) -> int:
    """Of how many sequences a tensor of lengths or bounds is, or a table. Refuses what is no int32 tensor on q's device, and
    other shapes."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {shown(x)}; an int32 tensor on {device} is needed: try torch.tensor(…, dtype=torch.int32)")
    if x.is_nested or x.layout is not torch.strided:
        check_layout(name, x)
    if x.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {x.dtype}; torch.int32 is needed: try {name}.int()")
    if x.device != device:
        raise ValueError(f"{name} lies on {x.device} and q on {device}; one device is needed: try {name}.to(q.device)")
    more, dims = (1 if name.startswith("cu_seqlens") else 0), (2 if name == "page_table" else 1)
    if x.dim() != dims or (size := x.size(0)) < more:
        instead = f"{name}.view(len(lengths), -1)" if dims == 2 else f"{name}.flatten()"
        need = "(batch, max_pages)" if dims == 2 else "(batch + 1,), from 0 up to all rows," if more else "(batch,)"
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {need} is needed: try {instead}, or check how it was made")
    return size - more


def in_one_piece(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors, contiguous, as kernels read them."""
    return tuple([x if x is None or x.is_contiguous() else x.contiguous() for x in tensors])
