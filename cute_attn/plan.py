"""From a problem and a GPU to a configuration: what is possible, what is chosen, and why, in words."""

from __future__ import annotations

from functools import lru_cache

from cute_attn import layouts
from cute_attn.arguments import name_of, shown
from cute_attn.layouts.base import (
    KIB,
    NAMED_BARRIERS,
    SETMAXNREG,
    SMEM_RESERVED,
    Config,
    Gpu,
    registers_at_launch,
    registers_per_thread,
)
from cute_attn.problem import HEAD_DIM_MAX, HEAD_DIM_STEP, Problem

SHORT_WALK = 16  # key tiles
MANY_QUERY_TILES = 128  # of a sequence in the backward pass
MANY_VISITS = 16  # of a key tile by query tiles: from here on one kernel of wide heads' gradients gains on two


def plan(problem: Problem, target: str, mechanism: str | None = None) -> Config:
    """The best configuration of ``problem`` on a GPU, given as the compiler's target (``"sm_90a"``).

    ``mechanism`` asks for one by name; ``None`` takes the GPU's best. Raises ``ValueError`` for a target, mechanism or
    problem that can't work, with the value, the limit and the remedy.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is {shown(problem)}; a Problem is needed, such as Problem('bfloat16', 128, 128)")
    target = name_of("target", target, "a compiler's target is needed, such as 'sm_90a'")
    return _planned(problem, target, mechanism_name(mechanism))


@lru_cache(maxsize=4096)
def _planned(problem: Problem, target: str, mechanism: str | None) -> Config:
    return configs(problem, target, mechanism)[0]


def head_blocks(choices: tuple[int, ...], tiles: int, heads_per_kv: int, at_once: int, unequal: bool) -> int:
    """How many blocks are to share a key tile in the backward pass, each with a part of the query heads of its key head: of
    ``choices``, in ascending order, that divide these the one with which the last of ``tiles`` ends first, on a GPU that
    holds ``at_once`` blocks; fewer where more wouldn't gain a tenth.

    The unit is the time of a tile, of the longest one where they are ``unequal``: these take half of it on average, and come
    first. Shared by n blocks a tile takes an n-th.
    """

    def end(blocks: int) -> float:
        if unequal:
            return max(1 / blocks, tiles / (2 * at_once))
        return -(-tiles * blocks // at_once) / blocks

    best = 1
    for blocks in choices:
        if heads_per_kv % blocks == 0 and end(blocks) < 0.9 * end(best):
            best = blocks
    return best


def rows_of_query_tile(choices: tuple[int, ...], seqlen_q: int, cut: bool = False) -> int:
    """How many rows a query tile of the backward pass is to have: of ``choices``, the usual number and higher ones, the highest
    with which the padding of a sequence's last tile is at most one row in 32. Where a right edge has ``cut`` some, of which
    more is wasted the higher they are, the usual number unless there are many."""
    if cut and seqlen_q < MANY_QUERY_TILES * choices[0]:
        return choices[0]
    return max((rows for rows in choices[1:] if 32 * (-seqlen_q % rows) <= seqlen_q), default=choices[0])


def takes_one_kernel(found: tuple[Config, ...], seqlen_q: int, cut: bool, tiles: int, at_once: int) -> bool:
    """Whether the gradients of wide heads are to come from one kernel, the last of their configurations if it serves them, and
    not from two, which take more products, but less time to begin and end a key tile: where many query tiles visit it, half as
    many on average if a right edge has ``cut`` them; and where its key ``tiles`` keep a GPU busy that holds ``at_once`` blocks,
    the average tile as long as the longest, or half as long: two kernels have shorter ones, and dQ's are of queries."""
    many, busy = (1 + cut) * MANY_VISITS * found[0].tile_m, (1 + cut) * at_once
    return found[-1].backward != found[0].backward and seqlen_q >= many and tiles >= busy


def takes_short(found: tuple[Config, ...], keys: int) -> bool:
    """Whether the forward pass is to take the second of its configurations, if there is one: smaller tiles, where a query sees
    16 of the first one's key tiles at most, half of them on average, which are ``keys``."""
    return len(found) > 1 and keys <= SHORT_WALK * found[0].tile_n


def takes_tickets(problem: Problem, config: Config) -> bool:
    """Whether the forward pass needs memory for tickets, which persistent blocks draw for tiles whose costs are unequal and
    known on the device only (``scheduler.py``)."""
    unequal = (bool(problem.ragged) and problem.bounded_right) or problem.blocks == "listed"
    return unequal and not problem.gradients and hasattr(layouts.family(config), "WORK_SLOTS")


def mechanism_name(mechanism: object) -> str | None:
    """A mechanism that is asked for, or None for the GPU's best."""
    if mechanism is None:
        return None
    return name_of("mechanism", mechanism, "the name of one is needed, such as 'cp_async', or None for the best")


def configs(problem: Problem, target: str, mechanism: str | None = None) -> tuple[Config, ...]:
    """Every configuration that ``problem`` may get on a GPU and that fits it, best first: a handful."""
    module = layouts.for_target(target)
    _check_problem(problem)
    if mechanism is None:
        mechanism = next(iter(module.MECHANISMS))
    if mechanism not in module.MECHANISMS:
        raise ValueError(
            f"mechanism is {mechanism!r}; {target} has {', '.join(map(repr, module.MECHANISMS))}: pass one of them, or None"
        )
    if problem.gradients and not hasattr(module, "BACKWARD"):
        raise NotImplementedError(
            f"{layouts.source(module)} has no backward pass: give it BACKWARD and a table, as layouts/sm80.py has them, "
            f"or use backend='reference'"
        )
    if problem.rows:
        if not hasattr(module, "CACHE"):
            raise NotImplementedError(
                f"{layouts.source(module)} has no kernel for caches: give it CACHE, as layouts/sm80.py has it, or use "
                f"backend='reference'"
            )
        found = next(filter(None, (family.configs(problem, module.GPU, target) for family in module.CACHE.values())))
    else:
        found = tuple(module.configs(problem, mechanism, target))
    for config in found:
        check(config, module.GPU)
    return found


def check(config: Config, gpu: Gpu) -> None:
    """Refuse a configuration that can't run on ``gpu``, before anything is compiled."""
    module, family = layouts.for_target(config.target), layouts.family(config)
    table = f"{layouts.source(module)}'s table"
    blocks = config.blocks_per_multiprocessor
    smem = family.smem_bytes(config)
    limit = min(gpu.smem_per_block, gpu.smem_per_multiprocessor // blocks - SMEM_RESERVED)
    if smem > limit:
        parts = ", ".join(f"{name} {size / KIB:.1f}" for name, size in family.smem_parts(config).items() if size)
        raise ValueError(
            f"{config.mechanism} with tiles {config.tile_m}×{config.tile_n} and {config.stages} stages takes "
            f"{smem / KIB:.1f} KiB of shared memory ({parts}); {gpu.name} has {limit / KIB:.0f} KiB for a block"
            + (f", {blocks} to a multiprocessor" if blocks > 1 else "")
            + f": try a smaller tile_n or fewer stages in {table}"
        )
    need, have = family.accumulator_registers(config), registers_per_thread(config, gpu)
    if need > have:
        raise ValueError(
            f"{config.mechanism} with tiles {config.tile_m}×{config.tile_n} keeps {need} registers a thread for accumulators "
            f"and operands; {gpu.name} gives it {have}: try a smaller "
            f"{'tile_m, or k_in_registers=0' if config.backward else 'tile_n'}"
        )
    if config.threads > gpu.threads_per_block:
        raise ValueError(
            f"{config.mechanism} asks for {config.threads} threads a block; {gpu.name} has {gpu.threads_per_block}: "
            f"try a smaller tile_m"
        )
    copy_threads = config.threads - config.mma_threads
    total = config.mma_threads * config.mma_registers + copy_threads * config.copy_registers
    held = registers_at_launch(config, gpu) * config.threads
    if total > held:  # setmaxnreg would wait for ever
        raise ValueError(
            f"{config.mechanism} gives {config.mma_threads} threads {config.mma_registers} registers and {copy_threads} "
            f"threads {config.copy_registers}, {total} in all; on {gpu.name} a block of {config.threads} threads holds {held}: "
            f"try fewer mma_registers in {table}"
        )
    for name in ("mma_registers", "copy_registers"):
        registers = getattr(config, name)
        if registers and registers not in SETMAXNREG:
            raise ValueError(
                f"{name} is {registers}; setmaxnreg takes multiples of 8 from {SETMAXNREG[0]} to {SETMAXNREG[-1]}: "
                f"try {max(registers // 8 * 8, SETMAXNREG[0])} in {table}"
            )
    barriers = family.barriers(config)
    if sum(barriers.values()) > NAMED_BARRIERS:
        parts = ", ".join(f"{name} {count}" for name, count in barriers.items())
        raise ValueError(
            f"{config.backward or config.mechanism} takes {sum(barriers.values())} named barriers ({parts}); a block has "
            f"{NAMED_BARRIERS}: try fewer warpgroups in {table}"
        )
    if found := family.misfit(config):
        raise ValueError(f"{config.backward or config.mechanism} is given {found}, in {table}")


def explain(problem: Problem, config: Config) -> str:
    """What was chosen and why, for a person."""
    from cute_attn.fields import rounds_beside  # which asks the plan

    module = layouts.for_target(config.target)
    gpu, family = module.GPU, layouts.family(config)
    parts = family.smem_parts(config)
    known = () if config.cache else configs(problem, config.target, config.mechanism)
    others = [x for x in known[1:] if x.head_blocks == 1] if known[:1] == (config,) else []
    held = (config.q_in_registers, "Q"), (config.k_in_registers, "K and V")
    where = f"a query sees {SHORT_WALK} tiles of keys at most" if not config.backward else "few rows are padding"
    many = config.backward and problem.bounded_right
    if others and others[-1].backward != config.backward:
        where, many = f"one kernel serves a sequence of {MANY_VISITS * (1 + many)} tiles of queries or more", False
    beside = bool(config.backward) and rounds_beside(problem, config)
    where += f" and a sequence has {MANY_QUERY_TILES} tiles of queries" if many else ""
    lines = [
        f"problem     {problem.dtype}, head_dim {problem.head_dim} (V: {problem.head_dim_v}), {_rules(problem)}, "
        + (f"gradients of {', '.join(problem.gradients)}" if problem.gradients else "")
        + (", in a fixed order" if problem.deterministic else "")
        + ("" if problem.gradients else f"{'with' if problem.return_lse else 'without'} the log-sum-exp"),
        f"GPU         {gpu.name}: {gpu.smem_per_block / KIB:.0f} KiB of shared memory a block",
        f"mechanism   {config.mechanism}, "
        + (
            "the only one for this GPU"
            if len(module.MECHANISMS) == 1
            else ("the best" if config.mechanism == next(iter(module.MECHANISMS)) else "the requested one")
            + f" of {', '.join(module.MECHANISMS)}"
        ),
        f"tiles       {config.tile_m} queries × {config.tile_n} keys, from {layouts.source(module)}; "
        f"heads take {config.tile_d} columns in shared memory (V: {config.tile_dv})"
        + "".join(f"; {x.tile_m} × {x.tile_n} where {where}" for x in others),
        f"pipeline    {config.stages} tiles of {'Q and of dO' if config.backward else 'K and of V'} in flight; "
        f"{config.mma_warps} warps compute"
        + (", 4 more copy" if config.threads > config.mma_threads else " and copy")
        + (", taking turns on the tensor cores" if config.ping_pong else "")
        + (f"; {config.head_blocks} blocks share a tile of keys" if config.head_blocks > 1 else "")
        + ("; dQ is rounded meanwhile, on more multiprocessors the fewer keys a query sees" if beside else ""),
        f"registers   {family.accumulator_registers(config)} of {registers_per_thread(config, gpu)} a thread hold accumulators"
        + "".join(f" and {columns} columns of {name}" for columns, name in held if columns),
        "shared      "
        + ", ".join(f"{name} {size / KIB:.1f}" for name, size in parts.items() if size >= KIB)
        + f" KiB: {family.smem_bytes(config) / KIB:.1f} with alignment"
        + (f", {config.blocks_per_multiprocessor} blocks a multiprocessor" if config.blocks_per_multiprocessor > 1 else ""),
    ]
    return "\n".join(lines)


def _rules(problem: Problem) -> str:
    sides = [side for side in ("left", "right") if getattr(problem, f"bounded_{side}")]
    band = f"keys bounded on the {' and '.join(sides)}" if sides else "all keys"
    asked = {"softcap": problem.softcap, "sinks": problem.sinks, "dropout": problem.dropout}
    asked |= {"a mask function": problem.expression.mask is not None, "a block mask": bool(problem.blocks)}
    asked["a score function"] = problem.expression.score is not None
    asked["gradients of captured tensors"] = bool(problem.expression.partials)
    return ", ".join((band, *(name for name, there in asked.items() if there)))


def _check_problem(problem: Problem) -> None:
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if not 0 < head_dim <= HEAD_DIM_MAX or head_dim % HEAD_DIM_STEP:
            raise ValueError(
                f"{name} is {head_dim}; a multiple of {HEAD_DIM_STEP} from {HEAD_DIM_STEP} to {HEAD_DIM_MAX} is needed: pad it"
            )
    if problem.dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype is {problem.dtype!r}; 'float16' or 'bfloat16' is needed: convert, or use the reference")
