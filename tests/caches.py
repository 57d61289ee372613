"""Caches for tests, of known sequences: contiguous or in pages, with NaN in every row that is no sequence's key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from cute_attn import attention_kvcache
from tests import support


@dataclass
class Case:
    """Sequences of ``lengths`` keys, the new ones among them, of which ``queries`` have queries each: q, k, v are lists."""

    lengths: list[int]
    queries: list[int]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 24)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    kind: str = "gaussian"
    q: list = field(default_factory=list)
    k: list = field(default_factory=list)
    v: list = field(default_factory=list)

    def __post_init__(self):
        for i, (keys, rows) in enumerate(zip(self.lengths, self.queries, strict=True)):
            made = support.make_qkv(1, rows, keys, *self.heads, *self.dims, self.dtype, self.device, self.kind, seed=i)
            for held, x in zip((self.q, self.k, self.v), made, strict=True):
                held.append(x[0])

    def int32(self, values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def packed_queries(self) -> dict:
        return {"q": torch.cat(self.q), "cu_seqlens_q": self.int32(accumulate(self.queries, initial=0))}

    def contiguous(self, capacity: int, pads=None, spare: int = 0) -> dict:
        """A cache of one element a sequence, or, with ``spare`` elements more, with an index to them in another order."""
        batch = len(self.lengths)
        pads = [0] * batch if pads is None else pads
        order = torch.randperm(batch + spare, generator=torch.Generator().manual_seed(1))[:batch].tolist()
        order = order if spare else list(range(batch))
        caches = [self._nothing(batch + spare, capacity, x) for x in (self.k[0], self.v[0])]
        for i, (element, pad) in enumerate(zip(order, pads, strict=True)):
            for cache, x in zip(caches, (self.k[i], self.v[i]), strict=True):
                cache[element, pad : pad + len(x)] = x
        found = {"k_cache": caches[0], "v_cache": caches[1]}
        found["lengths"] = self.int32(n + pad for n, pad in zip(self.lengths, pads, strict=True))
        if spare:
            found["cache_batch_idx"] = self.int32(order)
        if any(pads):
            found["leftpad_k"] = self.int32(pads)
        return found

    def paged(self, page_size: int, spare: int = 3, unused: int = -1) -> dict:
        """A cache of pages in random order; ``unused`` is in the table where a sequence has no page."""
        counts = [-(-n // page_size) for n in self.lengths]
        pages = sum(counts) + spare
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(2)).tolist()
        table = torch.full((len(counts), max(*counts, 1) + 1), unused, dtype=torch.int32)
        caches = [self._nothing(pages, page_size, x) for x in (self.k[0], self.v[0])]
        for i, count in enumerate(counts):
            for place in range(count):
                page = order.pop()
                table[i, place] = page
                for cache, x in zip(caches, (self.k[i], self.v[i]), strict=True):
                    rows = x[place * page_size : (place + 1) * page_size]
                    cache[page, : len(rows)] = rows
        table = table.to(self.device)
        return {"k_cache": caches[0], "v_cache": caches[1], "lengths": self.int32(self.lengths), "page_table": table}

    def _nothing(self, elements: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_full((elements, rows, *like.shape[1:]), math.nan)

    def check(self, found: tuple[torch.Tensor, torch.Tensor], packed: bool, **rules) -> None:
        """That ``(out, lse)`` are attention of each sequence, by the policy of all tests."""
        out, lse = found
        bounds = list(accumulate(self.queries, initial=0))
        for i, (q, k, v) in enumerate(zip(self.q, self.k, self.v, strict=True)):
            rows = slice(bounds[i], bounds[i + 1])
            one = (out[rows], lse[:, rows]) if packed else (out[i], lse[i])
            support.assert_close((one[0][None], one[1][None]), q[None], k[None], v[None], lse_dtype=self.lse_dtype, **rules)

    @property
    def lse_dtype(self):
        return torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else None

    def attend(self, where: dict, packed: bool = False, **options):
        """``(out, lse)`` of the call."""
        queries = self.packed_queries() if packed else {"q": torch.stack(self.q)}
        return attention_kvcache(**queries, **where, return_lse=True, **options)
