"""The pictures of ``blocks`` for the backward pass: each mainloop's own walk, as its file under ``cute_attn/mainloop`` says it.

A :class:`Walk` is what a mainloop's picture has beyond what its layouts say. A step is one turn of its loop: a tile of
queries, or, in the kernel for queries alone, of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from .. import family
from ..base import KIB, Config
from . import algebra
from .blocks import (
    COLOURS,
    COLUMN,
    COPIED,
    FROM_REGISTERS,
    MADE,
    READ,
    TO_CORES,
    WAITS,
    Cell,
    Lanes,
    Part,
    Way,
    done,
    explained,
    held,
    kept,
    lies,
    lined,
    moved,
    shares,
    steps,
    table,
    titled,
    ways,
    working,
)
from .draw import MARGIN, Canvas, Label
from .pictures import is_read, product

STEP_WIDE = 7 * COLUMN  # pixels of the parts of a step, as of the table of stages
MADE_HEADS = (FROM_REGISTERS[0], FROM_REGISTERS[1], "to the tensor cores, or to global memory")
SOFTMAX = "mask, P = exp2(S − LSE)"
DIFFERENCES = "dS = P∘(dP − delta)"


@dataclass
class Walk:
    """What a mainloop does: in words; the lanes of its table of stages; and the parts of a step, one after another."""

    line: str
    lanes: Lanes
    actors: tuple[str, ...]  # of the parts of a step: who works
    turns: Sequence[tuple[str, ...]]  # what each does; "" where it has nothing to do
    notes: list[str]
    made: list[Way] = field(default_factory=list)  # ways of what has no layout of its own


def block(config: Config, kernel: str) -> Canvas:
    """A whole block of one of a mainloop's kernels."""
    lay = family(config)
    operands = [name for name in (lay.KERNELS[kernel] if kernel else lay.OPERANDS) if _is_shared(name, config)]
    walk = WALKS[config.backward, kernel](config)
    canvas = titled(f" of the kernel for {kernel}" if kernel else "", config, operands[0], walk.line)
    over = [f"{name} lies over {_plain(lay.over(config)[name])}" for name in operands if name in lay.over(config)]
    y = shares(canvas, config, _parts(config, kernel), over, 86)
    copied = [name for name in operands if ("in", name) in lay.copies(config)]
    made = [*walk.made, *(_way(name, config) for name in operands if name not in copied)]
    made.sort(key=lambda way: list(COLOURS).index(way.name))
    y = ways(canvas, ((TO_CORES, [_way(name, config) for name in copied]), (MADE_HEADS, made)), y + MARGIN)
    y = table(canvas, config, "Stage by stage: what each slot holds, and who does what", walk.lanes, y + MARGIN)
    y = explained(canvas, walk.lanes, walk.notes, y) + MARGIN
    canvas.shapes.append(Label(MARGIN, y, "One step, from left to right", 13, "start", bold=True))
    parts = [f"part {i}" for i in range(len(walk.turns))]
    by_actor = zip(walk.actors, zip(*walk.turns, strict=True), strict=True)
    lined(canvas, parts, {actor: done(texts) for actor, texts in by_actor}, STEP_WIDE / len(parts), y + 16)
    return canvas


def _is_shared(operand: str, config: Config) -> bool:
    return any(name == operand for _, name in family(config).copies(config))


def _plain(operand: str) -> str:
    """An operand's name without the kernel's."""
    return operand.removeprefix("q")


def _parts(config: Config, kernel: str) -> list[Part]:
    lay = family(config)
    sizes = lay.smem_parts_of(kernel, config) if kernel else lay.smem_parts(config)
    names = {name: f"q{name}" if kernel == "queries" else name for name in sizes}
    return [Part(name, size, lay.stages(names[name], config)) for name, size in sizes.items()]


# ---- ways ------------------------------------------------------------------------------------------------------------


def _way(operand: str, config: Config) -> Way:
    lay, copies = family(config), family(config).copies(config)
    slots = algebra.flat_shape(lay.smem(operand, config).shape)[2:]
    groups = slots[0] // lay.stages(operand, config) if slots else 1
    warps = getattr(lay, "WARPS", {}).get(operand, ())
    layout, size = lies(operand, config)
    first = moved(copies.get(("in", operand), copies.get(("store", operand))), config, groups, warps)
    last = moved(copies["out", operand], config, groups) if ("out", operand) in copies else _fed(operand, config)
    under = lay.over(config).get(operand)
    over = f", over {_plain(under)}" if under else ""
    return Way(_plain(operand), (first, (layout, size + over), last))


def _fed(operand: str, config: Config) -> tuple[str, str]:
    """How the tensor cores get an operand, and for which products."""
    lay, copies = family(config), family(config).copies(config)
    loads, shapes = [], []
    for role in filter(partial(is_read, operand, config=config), lay.READS):
        result, copy = product(role, config).partition(" ")[0], copies.get((f"load {role}", operand))
        if copy is not None:
            loads.append(f"{copy.instruction} for {result}")
        shapes.append(f"{result} {'×'.join(map(str, lay.mma(role, config).shape))}")
    return ", ".join(loads) or "read where it lies", ", ".join(dict.fromkeys(shapes))


# ---- lanes -----------------------------------------------------------------------------------------------------------


def _kept_until_next(names: Iterable[str], config: Config) -> Lanes:
    """Operands that stay through the loop, of a block whose next tile's come while results leave."""
    return {name: [*kept(name, config)[:-1], (f"copy the next {name}", COPIED)] for name in names}


def _ring(name: str, config: Config, before: int, stages: int, lingers: bool = False) -> Lanes:
    """An operand whose tiles come one after another; ``lingers``: a step still reads the one before its own, first."""
    lanes: Lanes = {}
    for slot in range(stages):
        cells = [ring_held(name, slot, step, stages, before, lingers) for step in (None, *steps(config))]
        lanes[f"{name}, slot {slot}" if stages > 1 else name] = [*cells, ("…", WAITS)]
    return lanes


def ring_held(name: str, slot: int, step: int | None, stages: int, before: int, lingers: bool) -> Cell:
    """As ``blocks.held``; a single slot is read and copied to in the same step."""
    text, colour = held(name, slot, step, stages, before)
    if step is None:
        return text, colour
    if stages == 1:
        return (f"{name}{step}, then copy {name}{step + 1}" if before else f"copy, read {name}{step}"), READ
    if lingers and colour == COPIED:
        return f"{name}{step - 1}, then {text}", READ
    return text, colour


def _copying(first: str, texts: Iterable[str]) -> list[Cell]:
    return [*done((first, *texts), COPIED), ("…", WAITS)]


def _walking(config: Config) -> Lanes:
    """The two warps that copy a key tile, then query tiles."""
    lanes: Lanes = {}
    for key, query in (("K", "Q"), ("V", "dO")):
        first = ", ".join((key, *(f"{query}{i}" for i in range(config.stages))))
        later = [f"{query}{i + config.stages - 1}" if i else "" for i in steps(config)]
        lanes[f"warp {family(config).WARPS[key][0]}"] = _copying(first, later)
    return lanes


def _alternating(name: str, config: Config, slots: int, text: str) -> Lanes:
    """What each step writes to a slot of its own, and is there for a step more."""
    lanes: Lanes = {}
    for slot in range(slots):
        cells: list[Cell] = [("", WAITS)]
        for i in steps(config):
            last = i - (i - slot) % slots
            mine: Cell = (f"{text} {name}{i}", MADE) if last == i else (f"{name}{last}" if last >= 0 else "", WAITS)
            cells.append(mine)
        lanes[f"{name}, slot {slot}"] = [*cells, ("…", WAITS)]
    return lanes


def _sum(role: str, config: Config) -> str:
    """A product that is added to an accumulator."""
    return product(role, config).replace(" = ", " += ")


# ---- mainloops -------------------------------------------------------------------------------------------------------


def _one_kernel(config: Config) -> Walk:
    """``tma_wgmma_backward``."""
    lay, n = family(config), config.stages
    groups = f"{lay.warpgroups(config)} warpgroups"
    late, behind, direct = config.overlap_tiles, config.late_dv > 0, config.results_from_registers
    adders = lay.WARPS["dQ"]
    lanes: Lanes = _kept_until_next("KV", config)
    lanes |= _ring("Q", config, n, n, lingers=late) | _ring("dO", config, n, n)
    ds = _alternating("dS", config, lay.DS_STAGES, "write, read")
    lanes |= ds if direct else {name: [*cells[:-1], ("dV copied out", COPIED)] for name, cells in ds.items()}
    dqs = [list(cells) for cells in _alternating("dQ", config, config.dq_stages, "write").values()]
    if config.separate_dk:
        lanes["dK"] = [*[("", WAITS)] * len(steps(config)), ("", WAITS), ("dK copied out", COPIED)]
    elif not direct:
        dqs[len(steps(config)) % len(dqs)][-1] = ("dK copied out", COPIED)
    lanes |= {f"dQ, slot {slot}" if len(dqs) > 1 else "dQ": cells for slot, cells in enumerate(dqs)}
    lanes |= _walking(config)
    for k, warp in enumerate(adders):
        mine = [i > 0 and (i - 1) % len(adders) == k for i in steps(config)]
        lanes[f"warp {warp}"] = working(f"add dQ{i - 1}" if mine[i] else "" for i in steps(config))
    lanes[groups] = working((f"S{i}, dP{i}, dV{i},\ndQ{i}, dK{i}" for i in steps(config)), "dV, dK")
    sums = lay.sums(config)
    rows, columns = lay.piece_shape(config)
    size = lay.smem_parts(config)["dQ"]
    dq = Way(
        "dQ",
        (
            ("st.shared, 16 bytes each", f"{lay.piece_threads(config)} threads: {rows}×{columns}; {groups}"),
            (str(sums), f"threads × values, float32, {size / KIB:.1f} KiB"),
            (
                "cp.reduce.async.bulk adds it in float32",
                f"asked for by warps {' and '.join(map(str, adders))} in turns",
            ),
        ),
    )
    return Walk(
        f"{config.tile_n} keys, {lay.ROWS_PER_WARPGROUP} for each of {groups}; queries {config.tile_m} at a time, {n} stages; "
        f"4 warps besides: 2 copy, 2 add dQ",
        lanes,
        ("tensor cores", "warps"),
        [
            (
                "dK of the step before;\n" * late + product("S", config),
                "wait for S" + ", which frees\nthe Q before" * late,
            ),
            (product("dP", config), SOFTMAX),
            (
                _sum("dV", config) + ",\nmost of it" * behind,
                f"{DIFFERENCES};\nstored; all meet{'; wait for dV' * config.ds_from_shared}",
            ),
            *(
                [
                    (product("dQ", config), "wait for dQ"),
                    ("the rest of dV", "dQ to shared memory"),
                    (_sum("dK", config), "dQ handed over; wait\nfor dV, which frees dO"),
                ]
                if behind
                else [
                    (product("dQ", config), "wait for dV, which frees\ndO, and for dQ"),
                    (_sum("dK", config) + ",\nuntil the next S is there" * late, "dQ to shared memory"),
                ]
            ),
        ],
        [
            "A step is one tile of queries; steps are not drawn to scale. With Q comes the rows' LSE, with dO their delta.",
            f"A warpgroup's S and dP are {lay.ROWS_PER_WARPGROUP} keys × {config.tile_m} queries, its dQ a piece of "
            f"{rows}×{columns} over all {config.tile_n} keys.",
        ],
        [dq, *(_straight(role, f"each of {groups}", config) for role in ("dK", "dV") if direct)],
    )


def _straight(role: str, who: str, config: Config) -> Way:
    """A result that goes from registers to global memory."""
    mma = family(config).mma(role, config)
    size = "×".join(map(str, mma.tile[:2]))
    return Way(
        role,
        (
            ("in registers, float32", f"{size}; {who}"),
            (str(mma.c), "not there: four threads exchange theirs"),
            ("st.global, 16 bytes each", "nobody waits"),
        ),
    )


def _two_products(scores: str, made: str, gradient: str, config: Config) -> list[str]:
    """What a warpgroup of the kernel for keys does in each step: its gradient may come a step later."""
    if config.overlap_tiles:
        return [f"{scores}{i}, {made}{i}" + (f",\n{gradient}{i - 1}" if i else "") for i in steps(config)]
    return [f"{scores}{i}, {made}{i}, {gradient}{i}" for i in steps(config)]


def _keys(config: Config) -> Walk:
    """``tma_wgmma_wide``, dK and dV."""
    lay, n = family(config), config.stages
    lanes: Lanes = _kept_until_next("KV", config)
    lanes |= _ring("Q", config, n, n) | _ring("dO", config, n, n)
    lanes |= _alternating("P", config, lay.P_STAGES, "write, read")
    lanes |= _walking(config)
    late = config.overlap_tiles
    lanes["warpgroup 1"] = working(_two_products("S", "P", "dV", config), "dV")
    lanes["warpgroup 2"] = working(_two_products("dP", "dS", "dK", config), "dK")
    size = lay.smem_parts_of("keys", config)["P"]
    p = Way(
        "P",
        (
            ("st.shared, 16 bytes each", f"warpgroup 1: {config.tile_n}×{config.tile_m}, as in registers"),
            (str(lay.handed_over(config)), f"threads × values, {lay.P_STAGES} slots, {size / KIB:.1f} KiB"),
            ("ld.shared, 16 bytes each", "warpgroup 2, each thread what the same one stored"),
        ),
    )
    return Walk(
        f"{config.tile_n} keys; queries {config.tile_m} at a time, {n} stages; 2 warpgroups share the products; "
        f"4 warps besides, of which 2 copy",
        lanes,
        ("1: tensor cores", "1: warps", "2: tensor cores", "2: warps"),
        [
            (product("S", config), "wait for S", product("dP", config), "wait for dP"),
            (_sum("dV", config), SOFTMAX, _sum("dK", config), "take P over"),
            ("of the step before", "hand P over", "of the step before", DIFFERENCES),
            ("", "wait for dV, which frees\nthe Q and dO before", "", "wait for dK, which frees\nthe dO and Q before"),
        ]
        if late
        else [
            (product("S", config), "wait for S", product("dP", config), "wait for dP"),
            ("", SOFTMAX, "", "take P over"),
            ("", "free Q, hand P over", "", f"{DIFFERENCES};\nfree dO"),
            (_sum("dV", config), "wait for dV, free dO", _sum("dK", config), "wait for dK, free Q"),
        ],
        [
            "A step is one tile of queries; steps are not drawn to scale. With Q comes the rows' LSE, with dO their delta.",
            "Each warpgroup has its own pace: what one is done with, the other may still read.",
        ],
        [p, _straight("dV", "warpgroup 1", config), _straight("dK", "warpgroup 2", config)],
    )


def _queries(config: Config) -> Walk:
    """``tma_wgmma_wide``, dQ."""
    lay, n = family(config), config.stages
    groups = f"{lay.warpgroups(config)} warpgroups"
    lanes: Lanes = _kept_until_next(("Q", "dO"), config)
    lanes |= _ring("K", config, n, n, lingers=True) | _ring("V", config, lay.v_stages(config), lay.v_stages(config))
    key_warp, query_warp = lay.WARPS["qK"][0], lay.WARPS["qQ"][0]
    first = ", ".join(("K0, V0", *(f"K{i}" for i in range(1, n))))
    lanes[f"warp {key_warp}"] = _copying(first, (f"K{i + n - 1}, V{i + 1}" if i else "V1" for i in steps(config)))
    lanes[f"warp {query_warp}"] = _copying("Q, dO", ("" for _ in steps(config)))
    lanes[groups] = working((f"S{i}, dP{i}, dQ{i}" for i in steps(config)), "dQ")
    return Walk(
        f"{lay.warpgroups(config) * lay.ROWS_PER_WARPGROUP} queries, {lay.ROWS_PER_WARPGROUP} for each of {groups}; keys "
        f"{config.tile_n} at a time, {n} stages of K, {lay.v_stages(config)} of V; 4 warps besides, of which 2 copy",
        lanes,
        ("tensor cores", "warps"),
        [
            (f"dQ of the step before;\n{product('qS', config)}", "wait for S;\nfree the K before"),
            (product("qdP", config), SOFTMAX),
            ("", f"free V;\n{DIFFERENCES}"),
            (f"{_sum('dQ', config)},\nuntil the next S is there", "the next step"),
        ],
        ["A step is one tile of keys, the last ones first; steps are not drawn to scale. LSE and delta lie in registers."],
        [_straight("dQ", f"each of {groups}", config)],
    )


def _cp_async(config: Config) -> Walk:
    """``cp_async_backward``."""
    lay, n = family(config), config.stages
    shares_p, across = lay.p_is_shared(config), config.mma_warps // config.key_warps
    before = max(n - 1, 0)
    lanes: Lanes = {"K": kept("K", config, "dK"), "V": kept("V", config, "dV")}
    lanes |= _ring("Q", config, before, n) | _ring("dO", config, before, n)
    for slot in range(lay.DS_STAGES):
        cells: list[Cell] = [("clear", MADE) if slot == 1 and not shares_p else ("", WAITS)]
        for i in steps(config):
            if i % lay.DS_STAGES == slot:
                cells.append((f"write, read dS{i}" if shares_p else f"write dS{i}", MADE))
            elif shares_p:
                cells.append((f"write, read P{i}", MADE))
            else:
                cells.append((f"read dS{i - 1}" if i else "read zeros", READ))
        lanes[f"dS{', P' * shares_p}, slot {slot}"] = [*cells, ("…", WAITS)]
    who = f"{config.mma_warps} warps"
    dq = product("dQ", config)
    if shares_p:
        lanes[who] = working((f"S{i}, dP{i}, dV{i},\ndK{i}, dQ{i}" for i in steps(config)), "dK, dV")
        turns = [
            ("", "barrier; next\ncopies begin" if n > 1 else "barrier; copy;\nbarrier"),
            (f"{product('S', config)}\n{product('dP', config)}", ""),
            ("", "P,\nstored"),
            (f"{_sum('dV', config)},\nown queries", ""),
            ("", "dS,\nstored"),
            (f"{_sum('dK', config)},\nown queries", ""),
            ("", "barrier"),
            ("dV, dK,\nothers' queries", ""),
            (dq, "red adds it"),
        ]
        split = f"{config.key_warps} of {config.mma_warps} warps split the keys"
        notes = [f"{split}; {across} share the same ones, and split queries of S and dP, and columns of dV and dK."]
    else:
        late = [f"dQ{i - 1}, " if i else "" for i in steps(config)]
        lanes[who] = working((f"{late[i]}S{i}, dP{i},\ndV{i}, dK{i}" for i in steps(config)), "dQ, dK, dV")
        turns = [
            ("", "barrier" if n > 1 else "barrier; copy;\nbarrier"),
            (dq + ",\none step late", "red adds it"),
            *[("", "next copies\nbegin")][: n - 1],
            (f"{product('S', config)}\n{product('dP', config)}", ""),
            ("", "P"),
            (_sum("dV", config), ""),
            ("", "dS,\nstored"),
            (_sum("dK", config), ""),
        ]
        times = config.tile_m // config.step_m
        again = f"; from S on {times} times, {config.step_m} queries each" if times > 1 else ""
        notes = [f"Each warp has {config.tile_n // config.key_warps} keys of its own{again}. P stays in registers."]
    wide = f".v{config.add_width}" if config.add_width > 1 else ""
    dq_way = Way(
        "dQ",
        (
            ("float32, each its accumulator", f"{config.mma_threads} threads: {config.tile_m}×{config.tile_d}"),
            ("—", "dQ does not pass through it"),
            (f"red.global.add{wide}.f32", f"{4 * config.add_width} bytes each, in the order of registers"),
        ),
    )
    return Walk(
        f"{config.tile_n} keys; queries {config.tile_m} at a time, {n} stage{'s' * (n > 1)}; {config.mma_threads} threads "
        "compute and copy",
        lanes,
        ("tensor cores", "warps"),
        turns,
        [
            "A step is one tile of queries; steps are not drawn to scale. With Q and dO come the rows' LSE and delta.",
            *notes,
        ],
        [dq_way],
    )


WALKS: dict[tuple[str, str], Callable[[Config], Walk]] = {
    ("tma_wgmma_backward", ""): _one_kernel,
    ("tma_wgmma_wide", "keys"): _keys,
    ("tma_wgmma_wide", "queries"): _queries,
    ("cp_async_backward", ""): _cp_async,
}
