"""How long the sequences of a call are, where they aren't all of one length: what the host knows of it.

That is little: a tensor on the device for each side, whose values only the reference and checks read back.
``cute_attn.sequences`` is what the kernels know.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NoReturn

import torch

from cute_attn.arguments import check_layout, shown

NAMES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_MORE = (1, 1, 0, 0)  # how many values there are of each besides one for each sequence
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
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k = self.tensors
        return _NAMES[cu_seqlens_q is not None, cu_seqlens_k is not None, seqused_q is not None, seqused_k is not None]

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
            if values[0] != 0 or values[-1] > rows:
                raise ValueError(
                    f"{name} goes from {values[0]} to {values[-1]}; from 0 to at most {rows}, the rows there are, is needed: "
                    f"try torch.cumsum of the lengths, with a 0 before it"
                )
        if (seqused := self.tensors[2 + side]) is not None:
            name = NAMES[2 + side]
            for i, (used, (first, past)) in enumerate(zip(seqused.tolist(), self.bounds(side, rows), strict=True)):
                if not 0 <= used <= past - first:
                    raise ValueError(
                        f"{name}[{i}] is {used}; from 0 to {past - first}, the rows of that sequence, is needed: check how "
                        f"{name} was made"
                    )


_NAMES: dict[tuple[bool, ...], str] = {
    there: " ".join(name for name, is_there in zip(NAMES, there, strict=True) if is_there)
    for there in product((False, True), repeat=len(NAMES))
}


def are_checked() -> bool:
    """Whether lengths are to be read back and checked."""
    return os.environ.get(CHECK) == "1"


def check_lengths(q: torch.Tensor, count: int | None, tensors: tuple[Any, ...]) -> Lengths:
    """Check what the host sees of lengths, in the order of :data:`NAMES`: kind, dtype, device, shape. ``count`` is how many
    sequences there are, None where the first of the lengths says so.

    Raises ``TypeError`` and ``ValueError``.
    """
    device, whole, before = q.device, True, None
    for x, more in zip(tensors, _MORE, strict=True):
        if x is None or x is before:  # often one tensor is the bounds of queries and of keys
            continue
        try:
            (size,) = x.shape
            fits = (
                isinstance(x, torch.Tensor)
                and x.dtype is torch.int32
                and x.device == device
                and x.layout is torch.strided
                and not x.is_nested
            )
        except (AttributeError, ValueError, RuntimeError):  # not a tensor, other dimensions, nested tensors
            fits = False
        if fits and count is None:
            count = size - more
        if not fits or count is None or size - more != count or count < 0:
            _explain_misfit(q, count, tensors)
        whole, before = whole and x.is_contiguous(), x if more else None
    assert count is not None
    return Lengths(count, tensors if whole else tuple(x if x is None else x.contiguous() for x in tensors))


def check_int32(name: str, x: object, device: torch.device) -> None:
    """Refuse what is no int32 tensor on q's device."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {shown(x)}; an int32 tensor on {device} is needed: try torch.tensor(…, dtype=torch.int32)")
    check_layout(name, x)
    if x.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {x.dtype}; torch.int32 is needed: try {name}.int()")
    if x.device != device:
        raise ValueError(f"{name} lies on {x.device} and q on {device}; one device is needed: try {name}.to(q.device)")


def _explain_misfit(q: torch.Tensor, count: int | None, tensors: tuple[Any, ...]) -> NoReturn:
    """Say which of check_lengths's conditions lengths break."""
    for name, more, x in zip(NAMES, _MORE, tensors, strict=True):
        if x is None:
            continue
        check_int32(name, x, q.device)
        if x.dim() != 1 or x.shape[0] < more:
            need = "(batch + 1,), from 0 up to all rows," if more else "(batch,)"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; {need} is needed: try {name}.flatten(), or check how it was made"
            )
        if count is None:
            count = x.shape[0] - more
        if x.shape[0] - more != count:
            break
    raise ValueError(
        f"{name} is of {x.shape[0] - more} sequences where there are {count}; one length for each is needed: "
        f"check how {name} was made"
    )
