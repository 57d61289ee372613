"""Pages of keys and values, and which sequence has which: the memory that ``attention_kvcache`` reads, shared by many.

Everything but the pages themselves is on the host, and what changes there is a few ints a call: no page is looked at, and
nothing is read back from the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cute_attn.arguments import device_of, integer, shown

NO_PAGE = -1  # in a table, after a sequence's pages


@dataclass
class _Held:
    """What a sequence has: ``length`` tokens, and in order the ⌈length / page_size⌉ pages that they are in."""

    pages: array
    length: int


class PagedCache:
    """Keys and values of many sequences, in pages that they take as they grow.

        cache = PagedCache(pages=1024, page_size=64, heads_kv=8, head_dim=128, layers=32, dtype=torch.bfloat16, device="cuda")
        sequences = [cache.new(), cache.new()]
        lengths = cache.append(sequences, 1)        # room for a token each, and how many there were before
        table = cache.page_table(sequences)
        for layer in range(32):
            out = attention_kvcache(
                q, cache.k[layer], cache.v[layer], lengths=lengths, page_table=table, k_new=k, v_new=v, causal=True
            )

    All layers share one table: token ``t`` of a sequence is row ``t % page_size`` of page ``table[sequence, t // page_size]``
    of each layer. A page belongs to one sequence, or to several that began as copies (:meth:`fork`); these read it, and who
    appends to it gets a copy first (copy-on-write). So no page has two writers. A page that a sequence gave back is soon
    another's, so the cache is for one stream, whose kernels run one after another.

    Attributes:
        k: ``(layers, pages, page_size, heads_kv, head_dim)``; nothing is written there but the copies of shared pages.
        v: ``(layers, pages, page_size, heads_kv, head_dim_v)``.
        free_pages: how many pages no sequence has.

    Args:
        pages: how many there are, for all sequences together.
        page_size: tokens a page. Small ones waste less at the end of each sequence; large ones make shorter tables.
        heads_kv, head_dim, head_dim_v: of the model's keys and values; ``head_dim_v=None`` is ``head_dim``.
        layers: of the model.
        dtype, device: as of ``torch.empty``.

    Raises:
        TypeError, ValueError: sizes that are no ints of 1 or more, sequences that aren't there.
        MemoryError: of :meth:`append`, the cache is full; nothing has changed.

    Source: PagedAttention (Kwon et al., arXiv:2309.06180).
    """

    def __init__(
        self, pages: int, page_size: int, heads_kv: int, head_dim: int, *, head_dim_v: int | None = None, layers: int = 1,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        sizes = {"layers": layers, "pages": pages, "page_size": page_size, "heads_kv": heads_kv}
        sizes |= {"head_dim": head_dim, "head_dim_v": head_dim_v}
        for name, size in sizes.items():
            sizes[name] = integer(name, size, "of 1 or more")
            if not 1 <= sizes[name] < 1 << 31:
                raise ValueError(f"{name} is {shown(size)}; an int of 1 or more is needed, of 32 bits: check how it was made")
        if not (dtype is None or isinstance(dtype, torch.dtype)):
            raise TypeError(f"dtype is {shown(dtype)}; a torch.dtype is needed, or None: try torch.bfloat16")
        device = device_of(device)
        *shape, head_dim, head_dim_v = sizes.values()
        with torch.inference_mode(False):  # what is made within it can't be written to outside
            self.k = torch.empty(*shape, head_dim, dtype=dtype, device=device)
            self.v = torch.empty(*shape, head_dim_v, dtype=dtype, device=device)
        _, self.pages, self.page_size, _ = shape
        self._sequences: dict[int, _Held] = {}
        self._next = 0  # name; none is used again: one that was freed is told from those that are there
        self._owners = [0] * self.pages  # of each page
        self._free = [*range(self.pages)]

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def new(self) -> int:
        """A new sequence without tokens, and so without pages: the number that names it in every call."""
        return self._add(array("i"), 0)

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins with the first ``length`` tokens of another (``None``: all), whose pages it shares."""
        original = self._of(sequence)
        length = original.length if length is None else integer("length", length, "or None")
        if not 0 <= length <= original.length:
            raise ValueError(
                f"length is {length}, and sequence {sequence} has {original.length} tokens; from 0 to as many are needed: "
                f"try None for all of them"
            )
        shared = original.pages[: -(-length // self.page_size)]
        for page in shared:
            self._owners[page] += 1
        return self._add(shared, length)

    def free(self, sequence: int) -> None:
        """Forget a sequence, and free the pages that are no other's."""
        for page in reversed(self._of(sequence).pages):
            self._give_up(page)
        del self._sequences[sequence]

    def append(self, sequences: Sequence[int], tokens: int | Sequence[int] = 1) -> torch.Tensor:
        """Make room for ``tokens`` more tokens, of each sequence or one number for all.

        Returns:
            int32 ``(len(sequences),)`` on the device: how many there were before, which is what ``attention_kvcache`` takes as
            ``lengths`` with the keys and values of the new ones.

        Raises:
            MemoryError: there are not enough pages. No sequence has changed, and none of the others is lost.
        """
        sequences = _listed(sequences)
        several = isinstance(tokens, Sequence) or getattr(tokens, "ndim", 0) > 0  # arrays, too
        counts = list(tokens) if several else [tokens] * len(sequences)  # type: ignore[arg-type]
        counts = [integer("tokens", n, "or one for each sequence") for n in counts]
        grown = list(zip(map(self._of, sequences), counts, strict=False))
        if len(counts) != len(sequences) or len(set(sequences)) != len(sequences) or min(counts, default=0) < 0:
            raise ValueError(
                f"sequences are {shown(sequences)} and tokens {shown(tokens)}; sequences that differ, and as many numbers of "
                f"0 or more, are needed: name each sequence once"
            )
        # Who writes to the last page of a sequence while others have it gets a copy; if all of its owners do, one keeps it.
        writers: dict[int, list[_Held]] = {}
        for held, n in grown:
            if n and held.length % self.page_size:
                writers.setdefault(held.pages[-1], []).append(held)
        copied = [held for page, of_it in writers.items() for held in of_it[: self._owners[page] - 1]]
        needed = len(copied) + sum(-(-(held.length + n) // self.page_size) - len(held.pages) for held, n in grown)
        if needed > len(self._free):
            raise MemoryError(
                f"the cache is full: {len(self._free)} of {self.pages} pages are free; {needed} of {self.page_size} tokens are "
                f"needed for {sum(counts)} more tokens of {len(sequences)} sequences: free() a sequence, or try more pages"
            )
        before = self._on_device(np.array([held.length for held, _ in grown], dtype=np.int32))
        if copied:  # before anything is noted: if there is no memory for it, nothing has changed
            copies = [held.pages[-1] for held in copied], self._free[: -len(copied) - 1 : -1]  # as _taken() will find them
            old, new = self._on_device(np.array(copies, dtype=np.int32))
            for x in (self.k, self.v):
                x.index_copy_(1, new.long(), x.index_select(1, old))
        for held in copied:
            self._give_up(held.pages[-1])
            held.pages[-1] = self._taken()
        for held, n in grown:
            held.length += n
            while len(held.pages) * self.page_size < held.length:
                held.pages.append(self._taken())
        return before

    def lengths(self, sequences: Sequence[int]) -> torch.Tensor:
        """int32 ``(len(sequences),)`` on the device: how many tokens each sequence has."""
        return self._on_device(np.array([self._of(sequence).length for sequence in _listed(sequences)], dtype=np.int32))

    def page_table(self, sequences: Sequence[int], columns: int | None = None) -> torch.Tensor:
        """int32 ``(len(sequences), columns)`` on the device: the pages of each sequence in order, then −1.

        ``columns=None`` is as many as the longest has. A fixed number is for tables that are copied to one place, as a CUDA
        graph reads them.
        """
        held = [self._of(sequence).pages for sequence in _listed(sequences)]
        longest = max(map(len, held), default=0)
        columns = longest if columns is None else integer("columns", columns, "or None")
        if columns < longest:
            raise ValueError(f"columns is {columns}, and a sequence has {longest} pages; as many are needed: try None")
        table = np.full((len(held), columns), NO_PAGE, dtype=np.int32)
        for row, pages in zip(table, held, strict=True):
            row[: len(pages)] = pages
        return self._on_device(table)

    def _of(self, sequence: int) -> _Held:
        # True and 1.0 are equal to 1, and name no sequence.
        named = isinstance(sequence, (int, np.integer)) and not isinstance(sequence, bool)
        if not named or (held := self._sequences.get(sequence)) is None:
            raise ValueError(
                f"sequence {shown(sequence)} is not among the {len(self._sequences)} of the cache; one is needed that new() or "
                f"fork() has returned: check whether it was freed"
            )
        return held

    def _add(self, pages: array, length: int) -> int:
        name, self._next = self._next, self._next + 1
        self._sequences[name] = _Held(pages, length)
        return name

    def _taken(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _give_up(self, page: int) -> None:
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        """On a GPU without waiting for it: the copy is made in the stream's order."""
        host = torch.from_numpy(values)
        return host.pin_memory().to(self.k.device, non_blocking=True) if self.k.is_cuda else host.to(self.k.device)


def _listed(sequences: Sequence[int]) -> list[int]:
    try:
        return list(sequences)
    except TypeError:
        raise TypeError(
            f"sequences is {shown(sequences)}; a list of what new() or fork() has returned is needed: try [sequence]"
        ) from None
