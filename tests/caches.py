"""Caches for tests, of known sequences: contiguous or in pages, with NaN in every row that is no sequence's key."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from cute_attn import PagedCache, attention_kvcache
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


def check_pages(dtype: torch.dtype = torch.float32, device: str = "cpu", page_size: int = 4, dims: int = 16) -> None:
    """A :class:`~cute_attn.PagedCache` as a server uses it, NaN wherever nothing was written: a prompt that several sequences
    share, and steps of a few tokens each, of which some end and others come. Each step is attention to all of its sequence."""
    draw, heads, heads_kv = random.Random(0), 4, 2
    cache = PagedCache(128, page_size, heads_kv, dims, layers=2, dtype=dtype, device=device)
    cache.k.fill_(math.nan), cache.v.fill_(math.nan)
    k, v = (x[0] for x in support.make_qkv(1, 0, 1000, heads, heads_kv, dims, None, dtype, device)[1:])
    rows: dict[int, list[int]] = {}  # of k and v, those of each sequence
    unused = iter(range(1000))

    def step(counts: dict[int, int]) -> None:
        new = {sequence: [next(unused) for _ in range(n)] for sequence, n in counts.items()}
        before = [len(rows[sequence]) for sequence in counts]
        lengths = cache.append(list(counts), list(counts.values()))
        assert lengths.tolist() == before
        for sequence in counts:
            rows[sequence] = rows[sequence] + new[sequence]
        q = support.make_qkv(1, sum(counts.values()), 0, heads, heads_kv, dims, None, dtype, device, seed=len(rows))[0][0]
        bounds = torch.tensor(list(accumulate(counts.values(), initial=0)), dtype=torch.int32, device=device)
        where = {"lengths": lengths, "page_table": cache.page_table(list(counts)), "cu_seqlens_q": bounds}
        mine = torch.tensor([row for x in new.values() for row in x], device=device)
        for layer, (of_k, of_v) in enumerate(((k, v), (v, k))):
            pages = cache.k[layer], cache.v[layer]
            out, lse = attention_kvcache(q, *pages, **where, k_new=of_k[mine], v_new=of_v[mine], causal=True, return_lse=True)
            for i, sequence in enumerate(counts):
                one = slice(*bounds[i : i + 2].tolist())
                seen = (x[torch.tensor(rows[sequence], device=device)][None] for x in (of_k, of_v))
                found = out[None, one], lse[None, :, one]
                support.assert_close(found, q[None, one], *seen, causal=True, lse_dtype=torch.float32)

    first = cache.new()
    rows[first] = []
    step({first: 2 * page_size + 3})
    for _ in range(12):
        parent = draw.choice(list(rows))
        kept = draw.choice((None, len(rows[parent]) // 2))
        fork = cache.fork(parent, kept)
        rows[fork] = rows[parent][:kept]
        if len(rows) > 4:
            ended = draw.choice(list(rows))
            cache.free(ended)
            del rows[ended]
        step({sequence: draw.randint(1, 4) for sequence in rows})
    for sequence in rows:
        cache.free(sequence)
    assert cache.free_pages == cache.pages
