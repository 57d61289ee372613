"""What copies of a layout cost, by enumeration on the host: accesses of shared memory's banks, sectors of global memory.

- **Coalescing**: sectors of 32 bytes asked for, warp by warp, over sectors that the tile lies in.
- **Bank conflicts**: shared memory has 32 banks of 4 bytes; byte a lies in bank ``a / 4 mod 32``. The threads of a
  warp are served 128 bytes at a time (8 threads of 16 bytes, 32 of 4), and such a phase takes as many accesses as the
  fullest bank has different words: ``Σ phases (max over banks of words) − phases`` are conflicts. A matrix
  instruction has one phase for each 8×8 matrix. ``cp.async`` writes as its data comes in, one line of the L1 cache at
  a time: a phase is what a warp's instruction brings from one line of 128 bytes, and where that conflicts, each access
  asks for its sectors by itself. So counted on an H200 (``benchmarks/layouts.py``); of older GPUs it is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..base import BANK_BYTES, BANKS, BYTES, WARP, Box, Copy, Layout
from . import algebra

PHASE_BYTES = BANKS * BANK_BYTES
SECTOR_BYTES = 32
LINE_BYTES = 128  # of the L1 cache


@dataclass(frozen=True)
class Banks:
    """Accesses of the shared-memory banks for one tile, all warps together."""

    instructions: int  # of a whole warp
    accesses: int
    least: int  # accesses without a conflict

    @property
    def conflicts(self) -> int:
        return self.accesses - self.least


@dataclass(frozen=True)
class Sectors:
    """Sectors of global memory for one tile, all warps together."""

    instructions: int  # of a whole warp, or TMA boxes
    asked: int
    needed: int
    access_bytes: int  # of one thread, or of a row of a box

    @property
    def ratio(self) -> float:
        return self.asked / self.needed

    @property
    def request_bytes(self) -> float:
        """What one instruction of a warp, or one box, brings on average: whole sectors."""
        return self.asked * SECTOR_BYTES / self.instructions


# ---- where accesses go -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def accesses(copy: Copy, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of every element of every access to memory, over all tiles of an operand.

    Arrays (instruction of a warp, thread, element), in the operand's own rows and columns.
    """
    return grouped(algebra.addresses(copy), copy, shape)


def grouped(values: Layout, copy: Copy, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a (thread, value) map repeated over an operand: (instruction of a warp, thread, element)."""
    elements = algebra.INSTRUCTIONS[copy.instruction].elements
    whole = (shape[1], shape[0]) if copy.transposed else shape
    tiles = np.indices((whole[0] // copy.tile[0], whole[1] // copy.tile[1]))
    found = []
    for axis, x in enumerate(algebra.coordinates(values, copy.tile)):
        warps = max(1, len(x) // WARP)
        x = x.reshape(warps, -1, x.shape[1] // elements, elements).transpose(0, 2, 1, 3)  # (warp, instruction, …)
        first = tiles[axis] * copy.tile[axis]
        found.append((first[..., None, None, None, None] + x).reshape(-1, x.shape[-2], elements))
    return (found[1], found[0]) if copy.transposed else (found[0], found[1])


# ---- shared-memory banks ---------------------------------------------------------------------------------------------


def banks(offsets: np.ndarray) -> Banks:
    """Count the accesses of the banks. ``offsets`` in elements: (instruction, thread, element)."""
    instructions, threads, elements = offsets.shape
    size = elements * BYTES
    together = min(threads, PHASE_BYTES // size)
    words = offsets[..., :: BANK_BYTES // BYTES] * BYTES // BANK_BYTES
    words = np.sort(words.reshape(-1, together * words.shape[-1]), axis=1)
    first = np.ones_like(words, dtype=bool)
    first[:, 1:] = words[:, 1:] != words[:, :-1]  # a word asked for twice is read once
    phase = np.broadcast_to(np.arange(len(words))[:, None], words.shape)
    filled = np.bincount((phase * BANKS + words % BANKS)[first], minlength=len(words) * BANKS)
    return Banks(instructions, int(filled.reshape(-1, BANKS).max(axis=1).sum()), len(words))


# ---- global-memory sectors -------------------------------------------------------------------------------------------


def sectors(rows: np.ndarray, columns: np.ndarray, head_dim: int, pitch: int) -> Sectors:
    """Count the sectors of accesses (instruction, thread, element) to rows ``pitch`` elements apart.

    What lies past ``head_dim`` is not accessed. The tensor is taken to begin at a sector.
    """
    first = columns[..., 0]
    present = first < head_dim
    begin = (rows[..., 0] * pitch + first) * BYTES
    size = rows.shape[-1] * BYTES
    touched = begin[..., None] // SECTOR_BYTES + np.arange(-(-size // SECTOR_BYTES))
    last = (begin + size - 1) // SECTOR_BYTES
    touched = np.minimum(touched, last[..., None])
    instruction = np.broadcast_to(np.arange(len(rows))[:, None, None], touched.shape)
    keep = np.broadcast_to(present[..., None], touched.shape)
    asked = np.unique(np.stack([instruction[keep], touched[keep]]), axis=1)
    issued = np.unique(asked[0]).size
    return Sectors(issued, asked.shape[1], np.unique(asked[1]).size, size)


def of_box(box: Box, shape: tuple[int, int], head_dim: int, pitch: int) -> Sectors:
    """The same for TMA's boxes over an operand, up to ``head_dim``. TMA moves row by row, so a sector that two rows
    share is needed twice."""

    def touched(row: int, first: int, end: int) -> int:
        begin, end = (row * pitch + first) * BYTES, (row * pitch + end) * BYTES
        return -(-end // SECTOR_BYTES) - begin // SECTOR_BYTES

    wanted = min(shape[1], head_dim)
    firsts, rows = range(0, wanted, box.columns), range(shape[0])
    asked = sum(touched(row, first, min(first + box.columns, wanted)) for row in rows for first in firsts)
    needed = sum(touched(row, 0, wanted) for row in rows)
    return Sectors(len(firsts) * (shape[0] // box.rows), asked, needed, box.columns * BYTES)


def by_line(rows: np.ndarray, columns: np.ndarray, offsets: np.ndarray, head_dim: int, pitch: int) -> tuple[Banks, Sectors]:
    """Both counts for ``cp.async``, which handles one line of the L1 cache after the other.

    Threads of one line that write the same banks do so in turn, in the order of their numbers; threads that take the same
    turn share the sectors that they ask for, others don't. An access is aligned to its size, so it lies in one line and
    one sector, and takes one slot of as many banks. What lies past ``head_dim`` is filled with zeros; that is taken to be
    written like a store, 128 bytes at a time.
    """
    instructions, threads, elements = offsets.shape
    size = elements * BYTES
    together = PHASE_BYTES // size
    thread = np.tile(np.arange(threads), instructions)
    instruction = np.repeat(np.arange(instructions), threads)
    begin = ((rows[..., 0] * pitch + columns[..., 0]) * BYTES).ravel()
    present = columns[..., 0].ravel() < head_dim
    line = np.where(present, begin // LINE_BYTES, -1 - thread // together)
    slot = offsets[..., 0].ravel() * BYTES // size % together
    order = np.lexsort((thread, slot, line, instruction))
    keys = np.stack([instruction, line, slot])[:, order]
    starts = np.flatnonzero(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(0)))
    turn = np.empty(len(order), dtype=np.int64)
    turn[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    lines = np.unique(np.stack([instruction, line]), axis=1).shape[1]
    turns = np.unique(np.stack([instruction, line, turn]), axis=1).shape[1]
    asked = np.unique(np.stack([instruction, turn, begin // SECTOR_BYTES])[:, present], axis=1)
    needed, issued = np.unique(asked[2]).size, np.unique(asked[0]).size
    return Banks(instructions, turns, lines), Sectors(issued, asked.shape[1], needed, size)


@lru_cache(maxsize=4096)  # GPUs of one family have many copies in common
def of_copy(copy: Copy, layout: Layout, shape: tuple[int, int], head_dim: int, pitch: int) -> tuple[Banks, Sectors | None]:
    """What a copy by threads between a tile in ``layout`` and registers or rows ``pitch`` elements apart is counted at."""
    rows, columns = accesses(copy, shape)
    offsets = algebra.in_first_slot(layout, rows, columns)
    instruction = algebra.INSTRUCTIONS[copy.instruction]
    if copy.instruction == "cp.async":
        return by_line(rows, columns, offsets, head_dim, pitch)
    moves = "global" in (instruction.reads, instruction.writes)
    return banks(offsets), sectors(rows, columns, head_dim, pitch) if moves else None
