"""A block mask's lists in plain Python, tile by tile: what ``enlist.py``'s kernel makes, for block masks on the CPU."""

from __future__ import annotations

from itertools import product

import torch
from torch.nn.functional import pad

from cute_attn.blocks import ROWS_OF_WARPGROUP, BlockMask
from cute_attn.layouts.base import (
    BLOCK,
    CUT,
    HEADER,
    IN_TURN,
    MEMBER_BIT,
    NONE,
    TILE_BITS,
    UNSEEN_BIT,
    WARPGROUP_BITS,
    WHOLE,
    WHOLE_BIT,
)


def enlist(which: str, kinds: torch.Tensor, lists: torch.Tensor, down: int, across: int, members: int) -> None:
    """``launch.enlist``."""
    blocks = BlockMask(kinds, 0, 0)  # lengths aren't asked for
    if which == "key lists":
        _of_keys(blocks, lists, down * BLOCK, across)
    else:
        _of_queries(blocks, lists, down * BLOCK, across * BLOCK, members)


def _of_keys(blocks: BlockMask, lists: torch.Tensor, tile_m: int, across: int) -> None:
    kinds, groups = blocks.tiles(ROWS_OF_WARPGROUP, BLOCK), tile_m // ROWS_OF_WARPGROUP
    missing = (0, 0, 0, -kinds.shape[2] % groups)  # rows that there aren't see none and all
    none, every = (pad(kinds.eq(kind), missing, value=True).unflatten(2, (-1, groups)) for kind in (NONE, WHOLE))
    for place in product(*map(range, lists.shape[:3])):
        header, entries = _list_of_keys(none[place].tolist(), every[place].tolist(), across)
        lists[place][: HEADER + len(entries)] = torch.tensor([*header, 0, *entries])
    lists[..., IN_TURN] = lists[..., 1].argsort(dim=-1, descending=True, stable=True)


def _list_of_keys(none: list[list[bool]], every: list[list[bool]], across: int) -> tuple[tuple[int, int, int], list[int]]:
    """``(header, entries)`` of the list of a query tile, of each 64 of whose rows it is known which columns of blocks they see
    nothing of, and which all of. A tile begins at each column that is seen and in no tile before it."""
    led: list[int] = []
    whole: list[int] = []
    cut: list[int] = []
    begin, columns = 0, len(none[0])
    while begin < columns:
        if all(row[begin] for row in none):
            begin += 1
            continue
        held, entry, full = slice(begin, begin + across), begin, begin + across <= columns
        of_rows = [(all(x[held]), full and all(y[held])) for x, y in zip(none, every, strict=True)]
        for w, (unseen, seen) in enumerate(of_rows):
            entry |= (unseen << UNSEEN_BIT | seen << WHOLE_BIT) << TILE_BITS + WARPGROUP_BITS * w
        (whole if all(seen for _, seen in of_rows) else cut if whole else led).append(entry)
        begin += across
    if not whole:
        led, cut = cut, led
    return (len(cut), len(led) + len(whole) + len(cut), len(whole) + len(cut)), [*cut[::-1], *whole[::-1], *led[::-1]]


def _of_queries(blocks: BlockMask, lists: torch.Tensor, tile_m: int, tile_n: int, members: int) -> None:
    kinds, halves = blocks.tiles(tile_m, tile_n), None
    heads, tiles = kinds.shape[1:3]
    if tile_n == 2 * ROWS_OF_WARPGROUP:
        halves = pad(blocks.tiles(tile_m, ROWS_OF_WARPGROUP), (0, 1)).eq(WHOLE).int()
    for b, h, n in product(*map(range, lists.shape[:3])):
        found: dict[int, list[int]] = {NONE: [], CUT: [], WHOLE: []}
        for member, m in product(range(members), range(tiles)):
            head, entry = (h * members + member) % heads, m | member << MEMBER_BIT
            if halves is not None:
                entry |= sum(int(halves[b, head, m, 2 * n + w]) << TILE_BITS + w for w in range(2))
            found[int(kinds[b, head, m, n])].append(entry)
        entries = found[CUT] + found[WHOLE]
        lists[b, h, n, : HEADER + len(entries)] = torch.tensor([len(found[CUT]), len(entries), 0, 0, *entries])
