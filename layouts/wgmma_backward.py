"""Layouts of the ``tma_wgmma`` mechanism's backward pass in one kernel, for heads up to 128 wide, and some wider ones.

A block owns ``tile_n`` keys, 64 for each computing warpgroup, and walks over query tiles. Everything is transposed: a
warpgroup's scores are (64 keys × ``tile_m`` queries), so that Pᵀ and dSᵀ, as they lie in registers, are the A operands of
dV and dK. dS takes the way through shared memory, where dQ's product reads all of its keys (and dK's its own, with
``ds_from_shared``); each warpgroup computes a piece of the tile's dQ, such as 64 × 64.

What all families of such operands share, the swizzle first, is in ``tma``.
"""

from __future__ import annotations

from dataclasses import replace

from . import base, wgmma_wide
from .base import BYTES, Config, Layout, Mma, element
from .tma import (
    BARRIER_BYTES,
    ROWS_PER_WARPGROUP,
    SMEM_ALIGN,
    WARPGROUP,
    WORK_FIELDS,
    WORK_SLOTS,
    Family,
    copy_in,
    copy_out,
    in_registers_misfit,
    warpgroup_mma,
)

__all__ = ["SMEM_ALIGN", "WARPGROUP", "copy_in", "copy_out", "element"]

TILE_DIMS = (64, 96, 128)
tile_dim = base.padded_to(TILE_DIMS)
OPERANDS = ("K", "V", "Q", "dO", "dS", "dK", "dV")
FIRST = ("rS", "rdP")  # with an r in front: of the first columns, where A is in registers
ROLES = ("S", "dP", "dV", "dK", "dQ", *FIRST)
READS = {
    **{"S": ("K", "Q"), "dP": ("V", "dO"), "dV": ("", "dO"), "dK": ("dS", "Q"), "dQ": ("dS", "K")},
    **{"rS": ("K", "Q"), "rdP": ("V", "dO")},
}
MMA_QUERIES = 16  # that one MMA of dV or dK adds up
PIECE_ROWS, PIECE_COLUMNS = 64, 16  # of the dQ that a warpgroup computes: so many rows, a multiple of so many columns
ACCUMULATOR_BYTES = 4
HEAD_BLOCKS = (1, 2, 4)  # blocks that may share a key tile, each with a part of its query heads; the plan chooses
FIRST_STORES = True  # of the key tiles that add to a query tile's dQ, the first to come stores: its memory needs no zeros
CLEARS_QUERIES = True  # of queries that aren't in use dQ's zeros are written while others are computed
UNUSED_FIELDS = 8  # int32 that say where a block is among the rows that it clears
ZERO_BYTES = 1536, 1280, 512  # of zeros for the copy engine to store there; where dK has no memory by itself; and dQ two stages
DS_STAGES = 2  # a warpgroup writes the next dS while the other's dQ may still read this one
WARPS = {"K": (0,), "Q": (0,), "V": (1,), "dO": (1,), "dQ": (2, 3)}  # that copy it, or add it, in turns


def configs(problem, table, ordered, tall, wide, mixed, registers: tuple[int, int], target: str) -> tuple[Config, ...]:
    """The configurations for ``problem`` from a GPU's table, the wider padded head dim -> fields of Config; for heads wider
    than any there, which ``wgmma_wide`` lays out, from ``wide``. ``registers`` are of a computing and a copying thread. They
    differ in how many blocks share a key tile; where dQ is added in a fixed order none do, since a tile is a ticket there, nor
    where there is a list of all heads' query tiles. ``ordered`` and ``tall``, keyed like the table, are what is different in a
    fixed order of unequal tiles, and with a higher query tile, where every key counts, or all but those past a right edge.
    ``mixed``, the padded head dims -> fields, is of wide heads that one kernel serves, too, where nothing takes registers."""
    head_blocks: tuple[int, ...] = (1,)
    plain = not (problem.bounded_left or problem.blocks or problem.has_places)
    plain = plain and not (problem.deterministic and problem.ragged)  # where tiles wait for one another the longer
    others: tuple[dict, ...] = ()
    wider = max(problem.head_dim, problem.head_dim_v)
    if wider <= max(table):
        wider = tile_dim(wider)
        choice = {"tile_d": wider, "tile_dv": wider, "backward": "tma_wgmma_backward", **table[wider]}
        if problem.has_places and "k_in_registers" in choice:  # as below; dK's product may run into the next query tile then
            choice |= {"k_in_registers": 0, "overlap_tiles": True}
        if problem.deterministic and problem.bounded_right and not problem.blocks:
            choice |= ordered.get(wider, {})
        choice["mma_warps"] = choice["tile_n"] // ROWS_PER_WARPGROUP * 4
        head_blocks = (1,) if problem.deterministic or problem.blocks else HEAD_BLOCKS
        others = (tall[wider],) if plain and problem.gradients == "qkv" and wider in tall else ()
    else:
        dims = wgmma_wide.tile_dim(problem.head_dim), wgmma_wide.tile_dim(problem.head_dim_v)
        choice = {"tile_d": dims[0], "tile_dv": dims[1], "backward": "tma_wgmma_wide", "mma_warps": 8, **wide[max(dims)]}
        if problem.has_places:  # functions and dropout take the registers
            choice["k_in_registers"] = 0
        spare = plain and not (problem.deterministic or problem.softcap)
        if spare and problem.gradients == "qkv" and dims in mixed:
            others = ({"backward": "tma_wgmma_backward", "k_in_registers": 0, **mixed[dims]},)
    base_config = Config(
        target=target,
        mechanism="tma_wgmma",
        dtype=problem.dtype,
        mma_registers=registers[0],
        copy_registers=registers[1],
        **choice,
    )
    shared = tuple(replace(base_config, head_blocks=blocks) for blocks in head_blocks)
    return *shared, *(replace(base_config, **fields) for fields in others)


def warpgroups(config: Config) -> int:
    """Warpgroups that compute."""
    return config.tile_n // ROWS_PER_WARPGROUP


def turned(config: Config) -> bool:
    """Whether dQ is computed as its transpose, Kᵀ·dSᵀ: a product has 64 rows, which not every query tile is a multiple of. One
    of fewer rows wastes some where its columns are no 64 for each warpgroup."""
    return config.tile_m % PIECE_ROWS > 0 and config.tile_d == PIECE_ROWS * warpgroups(config)


def zero_bytes(config: Config) -> int:
    """Zeros in shared memory for rows that aren't in use: as many as there is room for, since each copy costs the same."""
    return ZERO_BYTES[0 if config.separate_dk else config.dq_stages]


def pieces(config: Config) -> list[tuple[int, int]]:
    """(row, column) within a query tile where each warpgroup's piece of dQ begins."""
    rows, columns = piece_shape(config)
    below = config.tile_m // rows
    return [(w % below * rows, w // below * columns) for w in range(warpgroups(config))]


def piece_shape(config: Config) -> tuple[int, int]:
    """(rows, columns) of such a piece."""
    if turned(config):
        return config.tile_m, config.tile_d // warpgroups(config)
    rows = min(config.tile_m, PIECE_ROWS)
    return rows, config.tile_m * config.tile_d // (rows * warpgroups(config))


def piece_threads(config: Config) -> int:
    """Threads of a warpgroup that hold some of it: a warp has 16 rows of a product."""
    return WARPGROUP if turned(config) else piece_shape(config)[0] * WARPGROUP // PIECE_ROWS


def over(config: Config) -> dict[str, str]:
    """From an operand to the one whose shared memory it takes."""
    if config.results_from_registers:
        return {}
    return {"dV": "dS"} if config.separate_dk else {"dV": "dS", "dK": "dQ"}


def stages(operand: str, config: Config) -> int:
    """Tiles of an operand that shared memory has room for."""
    return {"Q": config.stages, "dO": config.stages, "dS": DS_STAGES, "dQ": config.dq_stages}.get(operand, 1)


def sums(config: Config) -> Layout:
    """dQ in float32 on its way to global memory and there, ``(thread, value, warpgroup)``, with one stage after another."""
    (rows, columns), threads = piece_shape(config), piece_threads(config)
    return base.in_turns(threads, rows * columns // threads, config.add_width, warpgroups(config) * config.dq_stages)


def ds_columns(config: Config) -> int:
    """Queries that dS has room for: those of dQ's product, though some be no queries of the tile."""
    return config.tile_m if turned(config) else max(config.tile_m, PIECE_ROWS)


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. What lies over another part does once nothing reads that; a next tile's K and V come
    while results leave."""
    warps_rows = warpgroups(config) * ROWS_PER_WARPGROUP
    return {
        "K": warps_rows * config.tile_d * BYTES,
        "V": warps_rows * config.tile_dv * BYTES,
        "Q": config.stages * config.tile_m * config.tile_d * BYTES,
        "dO": config.stages * config.tile_m * config.tile_dv * BYTES,
        "dS": DS_STAGES * warps_rows * ds_columns(config) * BYTES,
        **({"dK": warps_rows * config.tile_d * BYTES} if config.separate_dk else {}),
        "dQ": config.dq_stages * config.tile_m * config.tile_d * ACCUMULATOR_BYTES,
        "rows": config.stages * 2 * config.tile_m * ACCUMULATOR_BYTES,
        "barriers": BARRIER_BYTES * 2 * (2 + 2 * config.stages),
        "hidden": config.tile_n,  # keys, a byte each
        "entries": config.stages * 4,  # of lists
        "work": WORK_SLOTS * (4 * WORK_FIELDS + 2 * BARRIER_BYTES),
        "unused": len(WARPS["dQ"]) * 4 * UNUSED_FIELDS + zero_bytes(config),  # rows of ragged sequences
    }


def accumulator_registers(config: Config) -> int:
    """Registers a computing thread needs for dK, dV, P, dP, P in the operands' dtype and columns of K and V at once."""
    held = sum(first_columns(config).values()) // 4
    return (config.tile_d + config.tile_dv) // 2 + config.tile_m + config.tile_m // 4 + held


def misfit(config: Config) -> str:
    """What the kernel can't do: a warpgroup owns 64 keys and computes one piece of dQ, and where a product runs into the next
    tile, that one's operands must have a slot of their own."""
    keys, warps = config.tile_n, 4 * warpgroups(config)
    least = 2 if config.overlap_tiles else 1
    parts_bytes, sums_bytes = smem_parts(config), keys * ACCUMULATOR_BYTES
    room = {
        "dK": parts_bytes["K"] + parts_bytes["V"] - sums_bytes * config.tile_d,
        "dV": parts_bytes["Q"] + parts_bytes["dO"] - sums_bytes * config.tile_dv,
    }
    return base.first_misfit(
        (keys % ROWS_PER_WARPGROUP > 0, f"{keys} keys a tile; a multiple of {ROWS_PER_WARPGROUP} is needed: try tile_n=128"),
        (config.mma_warps != warps, f"{config.mma_warps} warps for {keys} keys; {warps} are needed: try mma_warps={warps}"),
        (
            not _in_pieces(config),
            f"{warpgroups(config)} warpgroups for a {config.tile_m}×{config.tile_d} dQ, {PIECE_ROWS} rows and a multiple of "
            f"{PIECE_COLUMNS} columns each, or all rows and {PIECE_ROWS} columns, or fewer rows: try tile_m={PIECE_ROWS}",
        ),
        (
            "dK" in over(config) and keys * BYTES > config.tile_m * ACCUMULATOR_BYTES,
            f"{config.tile_m} queries a tile, whose dQ has no room for {keys} rows of dK: "
            f"try tile_m={keys * BYTES // ACCUMULATOR_BYTES}",
        ),
        (
            "dV" in over(config) and config.tile_dv > DS_STAGES * ds_columns(config),
            f"dV is {config.tile_dv} columns wide and would lie over dS, which has room for {DS_STAGES * ds_columns(config)}: "
            f"try tile_m={config.tile_m * 2}",
        ),
        (
            config.dq_stages not in (1, len(WARPS["dQ"])),
            f"{config.dq_stages} stages of dQ, which {len(WARPS['dQ'])} warps add in turns: try dq_stages=1",
        ),
        in_registers_misfit(config),
        (
            config.late_dv % MMA_QUERIES > 0 or 2 * config.late_dv > config.tile_m,
            f"{config.late_dv} queries whose part of dV comes late; a multiple of {MMA_QUERIES} up to half a tile is needed: "
            f"try late_dv={MMA_QUERIES}",
        ),
        (config.stages < least, f"{config.stages} stages; {least} at least are needed: try stages={least}"),
        (
            config.head_blocks > 1 and min(room.values()) < 0,
            f"{config.head_blocks} blocks to a key tile, whose sums of dK and dV take {-min(room.values())} bytes more than "
            f"K and V, or Q and dO, have: try head_blocks=1",
        ),
    )


def _in_pieces(config: Config) -> bool:
    """Whether the warpgroups' pieces are a query tile's dQ."""
    rows, of_warpgroups = config.tile_m // PIECE_ROWS, warpgroups(config)
    if turned(config):
        return config.tile_m % PIECE_COLUMNS == 0 and config.tile_d == PIECE_ROWS * of_warpgroups
    if not rows:
        return config.tile_m % PIECE_COLUMNS == 0 and config.tile_d % (of_warpgroups * PIECE_COLUMNS) == 0
    whole = config.tile_m % PIECE_ROWS == 0 and of_warpgroups % rows == 0
    return whole and config.tile_d * rows % (of_warpgroups * PIECE_COLUMNS) == 0


def mma(role: str, config: Config) -> Mma:
    """The warpgroup MMA of a role, named after what it computes.

    ``"S"``: Sᵀ = K·Qᵀ and ``"dP"``: dPᵀ = V·dOᵀ, both operands from shared memory; ``"dV"``: Pᵀ·dO and ``"dK"``: dSᵀ·Q,
    A from registers, or of dK from shared memory; ``"dQ"``: a piece of dS·K, both from shared memory, dS transposed on the way.
    """
    n = {"S": config.tile_m, "dP": config.tile_m, "dV": config.tile_dv, "dK": config.tile_d}
    n["dQ"] = piece_shape(config)[0 if turned(config) else 1]
    held = ("dV", *FIRST) if config.ds_from_shared else ("dV", "dK", *FIRST)
    return warpgroup_mma(n[role.removeprefix("r")], in_registers=role in held)


def first_columns(config: Config) -> dict[tuple[str, str], int]:
    """Columns of K and V that threads hold, for the products that read them there."""
    return {("rS", "K"): min(config.k_in_registers, config.tile_d), ("rdP", "V"): min(config.k_in_registers, config.tile_dv)}


def barriers(config: Config) -> dict[str, int]:
    """Named barriers by use, of the 16 a block has."""
    of_warpgroup = len(WARPS["dQ"]) + config.dq_stages
    return {"the block": 1, "dS": 1, "dQ": of_warpgroup * warpgroups(config), "epilogues": warpgroups(config)}


def _shape(operand: str, config: Config) -> tuple[int, int, int]:
    """(rows, columns, slots) of an operand: dS lies as (keys, queries), a stage's warpgroups one after another."""
    w = warpgroups(config)
    return {
        "K": (ROWS_PER_WARPGROUP, config.tile_d, w),
        "V": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "dK": (ROWS_PER_WARPGROUP, config.tile_d, w if config.separate_dk else 1),  # else in a warpgroup's part of dQ's
        "dV": (ROWS_PER_WARPGROUP, config.tile_dv, w),
        "Q": (config.tile_m, config.tile_d, config.stages),
        "dO": (config.tile_m, config.tile_dv, config.stages),
        "dS": (ROWS_PER_WARPGROUP, ds_columns(config), w * DS_STAGES),
    }[operand]


def _read_columns(operand: str, config: Config) -> int:
    """The columns of an operand that a product reads at a time: of K, those of a piece of dQ."""
    return piece_shape(config)[1] if operand == "K" else _shape(operand, config)[1]


# From that, the rest of the contract.
_family = Family(
    _shape,
    smem_parts,
    mma,
    loaded=("K", "V", "Q", "dO"),
    stored={"dS": "S", "dK": "dK", "dV": "dV"},
    results=("dK", "dV"),
    over_rows=("dV", "dK", "dQ"),
    over_rows_of_a=("dQ",),
    read_columns=_read_columns,
    first_columns=first_columns,
)
slot_bytes, smem, smem_layout = _family.slot_bytes, _family.smem, _family.smem_layout
tiled_mma, store_accumulator = _family.tiled_mma, _family.store_accumulator
columns_in_registers, load_operand = _family.columns_in_registers, _family.load_operand


def tile(operand: str, config: Config) -> tuple[int, int]:
    """(rows, columns) that are copied at a time: of dS a query tile's, though there may be room for more."""
    rows, columns, _ = _shape(operand, config)
    return (rows, config.tile_m) if operand == "dS" else (rows, columns)


def copies(config: Config) -> dict[tuple[str, str], base.Copy | base.Box]:
    """Every copy by (step, operand), but for results that leave from registers."""
    gone = _family.results if config.results_from_registers else ()
    return {(step, name): copy for (step, name), copy in _family.copies(config).items() if name not in gone}


def smem_bytes(config: Config) -> int:
    """Shared memory of a block: operands come first, each of whole swizzle atoms, so that no part needs padding."""
    return sum(smem_parts(config).values())
