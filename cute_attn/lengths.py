"""How long the sequences of a call are, where they aren't all of one length: what the host knows of it.

That is little: a tensor on the device for each side, whose values nobody reads back but the reference. What the kernels know is
in ``cute_attn.sequences``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cute_attn.arguments import shown

NAMES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
CHECK = os.environ.get("CUTE_ATTN_CHECK") == "1"  # whether to read lengths back and check them


@dataclass(slots=True)
class Lengths:
    """Of ragged sequences, int32 on the device of q, in the order of :data:`NAMES`; None for what there is not.

    Their rows lie one after another: those of sequence i from ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, or, without these,
    equally many for each; of these the first ``seqused[i]`` are in use, or, without those, all.
    """

    count: int
    tensors: tuple[torch.Tensor | None, ...]

    @staticmethod
    def of(*tensors: torch.Tensor | None) -> Lengths | None:
        """Of tensors that :func:`check_lengths` has checked; None if there are none."""
        for name, x in zip(NAMES, tensors, strict=True):
            if x is not None:
                return Lengths(x.shape[0] - (1 if name.startswith("cu") else 0), tensors)
        return None

    def spans(self, rows_q: int, rows_k: int) -> Iterator[tuple[slice, slice]]:
        """The rows of each sequence in use, of q and of k. Reads the lengths back."""
        sides = [self._side(side, rows) for side, rows in enumerate((rows_q, rows_k))]
        return zip(*sides, strict=True)

    def _side(self, side: int, rows: int) -> list[slice]:
        bounds, used = (None if x is None else x.tolist() for x in self.tensors[side::2])
        if bounds is None:
            bounds = [i * (rows // max(self.count, 1)) for i in range(self.count + 1)]
        bounds = [min(max(bound, 0), rows) for bound in bounds]
        found = []
        for i, (first, after) in enumerate(itertools.pairwise(bounds)):
            length = max(after - first, 0)
            found.append(slice(first, first + (length if used is None else min(max(used[i], 0), length))))
        return found

    @property
    def names(self) -> str:
        """Of those that there are: what ``Problem.ragged`` is."""
        return _NAMES[tuple(x is not None for x in self.tensors)]


_NAMES: dict[tuple[bool, ...], str] = {
    there: " ".join(name for name, is_there in zip(NAMES, there, strict=True) if is_there)
    for there in itertools.product((False, True), repeat=len(NAMES))
}


def check_lengths(q: torch.Tensor, count: int | None, tensors: tuple[Any, Any, Any, Any], rows: tuple[int, int]) -> Lengths:
    """Check what the host sees of lengths: kind, dtype, device, shape. ``count`` is how many sequences there are, None where
    ``cu_seqlens_q`` says so; ``rows`` are all of q and of k. With ``CUTE_ATTN_CHECK=1`` their values, too, which takes a
    synchronisation.

    Raises ``TypeError`` and ``ValueError``.
    """
    device, before = q.device, None
    for name, x in zip(NAMES, tensors, strict=True):
        if x is None or x is before:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name} is {shown(x)}; an int32 tensor on {device} is needed: try torch.tensor(…, dtype=torch.int32)"
            )
        more = 1 if name.startswith("cu") else 0
        if x.dim() != 1 or (more and not x.shape[0]):
            need = "(batch + 1,), from 0 up to all rows" if more else "(batch,)"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; {need} is needed: try {name}.flatten()")
        if x.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {x.dtype}; torch.int32 is needed: try {name}.int()")
        if x.device != device:
            raise ValueError(f"{name} lies on {x.device} and q on {device}; one device is needed: try {name}.to(q.device)")
        before = x
        if count is None:
            count = x.shape[0] - 1
        if x.shape[0] - more != count:
            raise ValueError(
                f"{name} is of {x.shape[0] - more} sequences where there are {count}; one length for each is needed: "
                f"check how {name} was made"
            )
    assert count is not None
    held = tuple(x if x is None or x.is_contiguous() else x.contiguous() for x in tensors)
    if CHECK:
        _check_values(held, count, rows)
    return Lengths(count, held)


def _check_values(tensors, count: int, rows: tuple[int, int]) -> None:
    for side in range(2):
        bounds, used = tensors[side::2]
        if bounds is None:
            each = [rows[side] // count] * count if count else []
        else:
            name, values = NAMES[side], bounds.tolist()
            each = [after - before for before, after in itertools.pairwise(values)]
            for i, length in enumerate(each):
                if length < 0:
                    raise ValueError(
                        f"{name} falls from {values[i]} to {values[i + 1]} at {i}; lengths ≥ 0 are needed: try their cumsum"
                    )
            if values[0] != 0 or values[-1] > rows[side]:
                raise ValueError(
                    f"{name} goes from {values[0]} to {values[-1]}; from 0 to at most {rows[side]}, the rows there are, is "
                    f"needed: check how {name} was made"
                )
        if used is not None:
            for i, (length, room) in enumerate(zip(used.tolist(), each, strict=True)):
                if not 0 <= length <= room:
                    raise ValueError(
                        f"{NAMES[2 + side]}[{i}] is {length}; from 0 to {room}, the sequence's rows, is needed: "
                        f"check how {NAMES[2 + side]} was made"
                    )
