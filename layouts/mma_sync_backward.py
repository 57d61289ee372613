"""Layouts of the ``cp_async`` mechanism's backward pass: operands of ``mma.sync`` m16n8k16 by way of ``ldmatrix``.

A block owns ``tile_n`` keys and walks over query tiles. Everything is transposed: scores are (keys × queries). Where every
warp has keys of its own (``key_warps = mma_warps``), Pᵀ and dSᵀ as they lie in its registers are the A operands of dV and
dK, and only dS goes through shared memory, for dQ. Heads so wide that the rows of dK and dV of 16 keys don't fit one warp's
registers are cut: ``key_warps`` warps split the keys, and the others split the queries of the scores and the columns of dK
and dV; then P goes through shared memory, too.

Shared memory is swizzled as in ``mma_sync``.
"""

from __future__ import annotations

from collections.abc import Callable

from . import base, mma_sync
from .base import BYTES, FRAGMENT_A, FRAGMENT_B, FRAGMENT_C, FRAGMENT_THREADS, Config, Copy, Layout, Mma, element
from .mma_sync import ROWS_PER_MMA, SMEM_ALIGN, TILE_DIMS, MmaSyncFamily, barriers, in_whole_passes, tile_dim

__all__ = ["SMEM_ALIGN", "TILE_DIMS", "barriers", "element", "tile_dim"]

OPERANDS = ("K", "V", "Q", "dO", "P", "dS", "dK", "dV")
ROLES = ("S", "dP", "dV", "dK", "dQ")
READS = {  # P and dS for dV and dK lie in registers where warps have keys of their own
    "S": ("K", "Q"),
    "dP": ("V", "dO"),
    "dV": ("P", "dO"),
    "dK": ("dS", "Q"),
    "dQ": ("dS", "K"),
}
TRANSPOSED = {("dV", "dO"), ("dK", "Q"), ("dQ", "dS"), ("dQ", "K")}  # (role, operand): read by ldmatrix.trans
ACCUMULATOR_BYTES = 4
FIRST_STORES = False  # dQ's sums are zeros at first, but in a fixed order
CLEARS_QUERIES = False
TICKET_BYTES = 4  # this block's place in the order in which blocks have started
DS_STAGES = 2  # dS and that of the tile before, whose dQ is being computed; or dS and P


def configs(problem, table, target: str, add_width: int) -> tuple[Config, ...]:
    """The configuration for ``problem`` from a GPU's table: the wider padded head dim -> the fields of Config that the
    table decides. ``add_width`` floats are added to global memory at once."""
    wider = tile_dim(max(problem.head_dim, problem.head_dim_v))
    choice = table[next(d for d in sorted(table) if d >= wider)]
    return (
        Config(
            target=target,
            mechanism="cp_async",
            dtype=problem.dtype,
            tile_d=_columns(problem.head_dim, **choice),
            tile_dv=_columns(problem.head_dim_v, **choice),
            backward="cp_async_backward",
            add_width=add_width,
            **choice,
        ),
    )


def of_tables(table, backward_table, add_width: int) -> Callable:
    """The ``configs`` of a GPU module that has no other mechanism, from its tables for both passes."""

    def of_both(problem, mechanism: str, target: str) -> tuple[Config, ...]:
        if problem.gradients:
            return configs(problem, backward_table, target, add_width)
        return mma_sync.configs(problem, table, target)

    return of_both


def _columns(head_dim: int, tile_m: int, tile_n: int, mma_warps: int, key_warps: int, **_) -> int:
    """Columns of a head that make whole instructions of the warps that share them, and whose tiles of ``tile_m`` and
    ``tile_n`` rows all threads copy in whole passes: the narrower of two heads may need more than :func:`tile_dim` says."""

    def fits(columns: int) -> bool:
        return columns % (16 * (mma_warps // key_warps)) == 0 and in_whole_passes(columns, tile_m, tile_n, mma_warps)

    return next(d for d in TILE_DIMS if d >= head_dim and fits(d))


def p_is_shared(config: Config) -> bool:
    """Whether P goes through shared memory, since a warp needs other warps' for its columns of dV and dK."""
    return config.key_warps < config.mma_warps


def over(config: Config) -> dict[str, str]:
    """From an operand to the one whose shared memory it takes."""
    return {"dK": "K", "dV": "V", "P": "dS"}


def stages(operand: str, config: Config) -> int:
    """Tiles of an operand that shared memory has room for; P takes turns with dS."""
    return {"Q": config.stages, "dO": config.stages, "P": DS_STAGES, "dS": DS_STAGES}.get(operand, 1)


def pieces(config: Config) -> list[tuple[int, int]]:
    """(row, column) within a query tile where each piece of dQ begins: all warps' together is one."""
    return [(0, 0)]


def turned(config: Config) -> bool:
    """dQ is never computed as its transpose."""
    return False


def piece_shape(config: Config) -> tuple[int, int]:
    """(rows, columns) of such a piece."""
    return config.tile_m, config.tile_d


def piece_threads(config: Config) -> int:
    """Threads that hold it."""
    return config.mma_threads


def sums(config: Config) -> Layout:
    """dQ in float32 in global memory, ``(thread, value, piece)``."""
    return base.in_turns(config.mma_threads, config.tile_m * config.tile_d // config.mma_threads, config.add_width)


def grid(role: str, config: Config) -> tuple[int, int]:
    """How many warps share the rows of a product, and how many its columns.

    dQ's is the one where a warp reads the least, of those whose warps have whole instructions.
    """
    if role != "dQ":
        return config.key_warps, config.mma_warps // config.key_warps
    rows, columns = config.tile_m, config.tile_d
    fitting = [
        (down, config.mma_warps // down)
        for down in range(1, config.mma_warps + 1)
        if config.mma_warps % down == 0
        and rows % (ROWS_PER_MMA * down) == 0
        and columns % (16 * (config.mma_warps // down)) == 0
    ]
    return min(fitting, key=lambda warps: rows // warps[0] + columns // warps[1])


def smem_parts(config: Config) -> dict[str, int]:
    """Bytes of shared memory by part. dK lies over K and dV over V, once their products are done."""
    return {
        "K": config.tile_n * config.tile_d * BYTES,
        "V": config.tile_n * config.tile_dv * BYTES,
        "Q": config.stages * config.tile_m * config.tile_d * BYTES,
        "dO": config.stages * config.tile_m * config.tile_dv * BYTES,
        "dS": DS_STAGES * config.tile_n * config.tile_m * BYTES,
        "rows": config.stages * 2 * config.tile_m * ACCUMULATOR_BYTES,
        "hidden": config.tile_n,  # keys, a byte each
        "ticket": TICKET_BYTES,
    }


def accumulator_registers(config: Config) -> int:
    """Registers a thread needs for dK and dV, and for P and dP or for dQ."""
    gradients = config.tile_n * (config.tile_d + config.tile_dv)
    scores = 2 * config.tile_n * config.step_m
    return (gradients + max(scores, config.tile_m * config.tile_d)) // config.mma_threads


def misfit(config: Config) -> str:
    """What the kernel can't do: warps in a full grid, whole instructions each, and queries in whole steps."""
    warps, down = config.mma_warps, max(config.key_warps, 1)
    rows, columns, step = ROWS_PER_MMA * down, 16 * (warps // down), config.step_m
    queries, keys = config.tile_m, config.tile_n
    whole = all(in_whole_passes(d, queries, keys, warps) for d in (config.tile_d, config.tile_dv))
    return base.first_misfit(
        (warps % down > 0, f"{warps} warps, of which {down} split the keys; a divisor is needed: try key_warps={warps}"),
        (keys % rows > 0, f"{keys} keys for {down} warps: try tile_n={rows} or a multiple"),
        (step < 1 or queries % max(step, 1) > 0, f"{queries} queries in steps of {step}: try a divisor for step_m"),
        (not whole, f"tiles of {queries} and {keys} rows, which {warps} warps can't copy in whole passes: try fewer mma_warps"),
        (step % columns > 0, f"steps of {step} queries: try step_m={columns} or a multiple"),
        (config.stages < 1, f"{config.stages} stages; 1 at least is needed: try stages=2"),
    )


def mma(role: str, config: Config) -> Mma:
    """``mma.sync`` m16n8k16 of a role, named after what it computes: Sᵀ = K·Qᵀ, dPᵀ = V·dOᵀ, dV = Pᵀ·dO, dK = dSᵀ·Q,
    dQ = dS·K. Warps lie in a grid, numbered down, then across.

    Each warp takes 16 neighbouring columns at a time, so that one ``ldmatrix`` of four 8×8 tiles fills two MMAs' worth of
    B, and the scores that a warp holds are whole steps of the products that sum over queries.
    """
    down, across = grid(role, config)
    m, n, k = ROWS_PER_MMA * down, 16 * across, 16
    return Mma(
        shape=(ROWS_PER_MMA, 8, 16),
        tile=(m, n, k),
        warps=down,
        across=across,
        a=base.by_modes((m, k), (*FRAGMENT_THREADS, (down, ROWS_PER_MMA, 0), (across, 0, 0)), FRAGMENT_A),
        b=base.by_modes((n, k), (*FRAGMENT_THREADS, (down, 0, 0), (across, 16, 0)), (*FRAGMENT_B, (2, 8, 0))),
        c=base.by_modes((m, n), (*FRAGMENT_THREADS, (down, ROWS_PER_MMA, 0), (across, 0, 16)), (*FRAGMENT_C, (2, 0, 8))),
    )


def copies(config: Config) -> dict[tuple[str, str], Copy]:
    """Every tiled copy by (step, operand): ``in`` from global memory, ``load ROLE`` to the registers of a product's MMA,
    ``store`` from an accumulator to shared memory and ``out`` to global memory."""
    found = {("in", name): _family.by_rows("cp.async", name, config) for name in ("K", "V", "Q", "dO")}
    for role, (a, b) in READS.items():
        what = mma(role, config)
        for letter, operand in (("a", a), ("b", b)):
            if letter == "a" and role in ("dV", "dK") and not p_is_shared(config):
                continue
            trans = (role, operand) in TRANSPOSED
            extent = what.tile[0] if letter == "a" else what.tile[1]
            values = getattr(what, letter)
            instruction = "ldmatrix.trans" if trans else "ldmatrix"
            found[f"load {role}", operand] = Copy(instruction, operand, (extent, what.tile[2]), values, transposed=trans)
    scores = mma("S", config)
    for operand in ("P", "dS") if p_is_shared(config) else ("dS",):
        found["store", operand] = Copy("st.shared.b32", operand, scores.tile[:2], scores.c)
    for operand in ("dK", "dV"):
        what = mma(operand, config)
        found["store", operand] = Copy("st.shared.b32", operand, what.tile[:2], what.c)
        found["out", operand] = _family.by_rows("ld.shared.b128, st.global.b128", operand, config)
    return found


def _shape(operand: str, config: Config) -> tuple[int, ...]:
    """``(tile_n, columns)`` of K, V, dK and dV, ``(tile_m, columns, stage)`` of Q and dO, and as (keys, queries) ``(tile_n,
    tile_m, slot)`` of dS and P."""
    return {
        "K": (config.tile_n, config.tile_d),
        "V": (config.tile_n, config.tile_dv),
        "dK": (config.tile_n, config.tile_d),
        "dV": (config.tile_n, config.tile_dv),
        "Q": (config.tile_m, config.tile_d, config.stages),
        "dO": (config.tile_m, config.tile_dv, config.stages),
        "P": (config.tile_n, config.tile_m, DS_STAGES),
        "dS": (config.tile_n, config.tile_m, DS_STAGES),
    }[operand]


# From that, the rest of the contract.
_family = MmaSyncFamily(_shape, smem_parts, copies, mma)
tile, smem, smem_layout, smem_bytes = _family.tile, _family.smem, _family.smem_layout, _family.smem_bytes
tiled_mma = _family.tiled_mma
copy_in, copy_out, store_accumulator = _family.copy_in, _family.copy_out, _family.store_accumulator


def load_operand(role: str, operand: str, config: Config):
    """Shared memory → the fragment of a product's MMA."""
    return _family.load_operand(f"load {role}", operand, config)
