"""The picture of an operand's tile in shared memory: which banks each 16-byte chunk lies in, computed without the DSL.

Shared memory is 32 banks of 4 bytes; byte address a lies in bank ``a / 4 mod 32``. The kernels read and write 16 bytes
a thread, so 4 neighbouring banks at a time: there are 8 such groups, and 8 threads are served at once if their chunks
lie in 8 different ones. ``ldmatrix``, ``stmatrix`` and warpgroup MMA take one chunk of 8 rows, one below the other:
in a plain row-major tile these share a group or two and are served one after the other. The swizzle spreads them.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from types import ModuleType

from rich.text import Text

from . import family
from .base import BYTES, Config

BANKS, BANK_BYTES, CHUNK_BYTES = 32, 4, 16
GROUP_BANKS = CHUNK_BYTES // BANK_BYTES
GROUPS = BANKS // GROUP_BANKS
ROWS_AT_ONCE = 8  # chunks that are read or written together
CHUNKS_SHOWN = 16
CELL = 4  # characters
# Okabe and Ito's colours, which colour-blind people tell apart too; grey for their black. (background, text)
PALETTE = (
    ("#999999", "black"),
    ("#E69F00", "black"),
    ("#56B4E9", "black"),
    ("#009E73", "white"),
    ("#F0E442", "black"),
    ("#0072B2", "white"),
    ("#D55E00", "white"),
    ("#CC79A7", "black"),
)


def bank_groups(operand: str, config: Config, rows: int = ROWS_AT_ONCE, swizzled: bool = True) -> list[list[int]]:
    """The bank group of each chunk of the first ``rows`` rows: ``(rows, chunks of a row)``, numbers 0 … 7.

    Without ``swizzled``, where the same layout without its swizzle would put them.
    """
    algebra = _algebra()
    layout = family(config).smem(operand, config)
    tile_rows, columns = family(config).tile(operand, config)
    if not 0 < rows <= tile_rows:
        raise ValueError(f"rows is {rows}; 1 … {tile_rows} is needed: the rows of a tile of {operand}")
    if not swizzled:
        layout = algebra.unswizzled(layout)
    slot = (0,) * (len(layout.shape) - 2)
    return [
        [
            algebra.offset(layout, row, column, *slot) * BYTES // CHUNK_BYTES % GROUPS
            for column in range(0, columns, CHUNK_BYTES // BYTES)
        ]
        for row in range(rows)
    ]


def serial_accesses(groups: list[list[int]]) -> int:
    """How often the banks must be asked for one column of chunks, in the worst 8 rows: 1 is without a conflict."""
    return max(
        max(Counter(groups[row + i][chunk] for i in range(ROWS_AT_ONCE)).values())
        for row in range(0, len(groups) - ROWS_AT_ONCE + 1, ROWS_AT_ONCE)
        for chunk in range(len(groups[0]))
    )


def picture(operand: str, config: Config, rows: int = ROWS_AT_ONCE) -> Text:
    """The first rows of an operand's tile for a terminal: a cell is a 16-byte chunk, its colour the bank group, the
    number in it the first of the chunk's 4 banks."""
    groups = bank_groups(operand, config, rows)
    tile_rows, columns = family(config).tile(operand, config)
    bits, base, shift, width = family(config).swizzle_atom(operand, config)
    shown = min(len(groups[0]), CHUNKS_SHOWN)
    text = Text(no_wrap=True)
    text.append(f"{operand}: {tile_rows} × {columns} {config.dtype}, ")
    text.append(f"rows of {width * BYTES} bytes, swizzle <{bits},{base},{shift}> on elements\n")
    text.append(f"{'column':>8}", "dim")
    for chunk in range(shown):
        text.append(f"{chunk * CHUNK_BYTES // BYTES:>{CELL}}", "dim")
    text.append("\n" if shown == len(groups[0]) else f" … {columns - CHUNK_BYTES // BYTES}\n", "dim")
    for row, line in enumerate(groups):
        text.append(f"{f'row {row}':>8}", "dim")
        for group in line[:shown]:
            background, foreground = PALETTE[group]
            text.append(f"{group * GROUP_BANKS:>{CELL - 1}} ", f"{foreground} on {background}")
        text.append("\n")
    if rows >= ROWS_AT_ONCE:
        plain = serial_accesses(bank_groups(operand, config, rows, swizzled=False))
        text.append(f"8 chunks below each other take {_times(serial_accesses(groups))}; unswizzled, {_times(plain)}")
    return text


def legend() -> Text:
    """What the colours of :func:`picture` stand for."""
    text = Text("banks   ", no_wrap=True)
    for group, (background, foreground) in enumerate(PALETTE):
        first = group * GROUP_BANKS
        text.append(f" {first}–{first + GROUP_BANKS - 1} ", f"{foreground} on {background}")
    return text


def _times(accesses: int) -> str:
    return "1 access" if accesses == 1 else f"{accesses} accesses"


def _algebra() -> ModuleType:
    try:
        return import_module(".algebra", __package__)
    except ImportError as error:
        raise NotImplementedError(
            f"layouts can't be computed on the host ({error}): try pip install nvidia-cutlass, which has pycute"
        ) from error
