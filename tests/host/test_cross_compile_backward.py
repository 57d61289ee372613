"""The backward pass of every GPU × mechanism × row of its table, compiled to machine code without that GPU: no more
registers than a thread has, nothing spilled that is not accounted for below, the tensor cores' instructions, and as many
of them as the gradients asked for need. Every run takes a sample, as in test_cross_compile.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import pytest

from cute_attn import cubin, layouts
from cute_attn.fields import rounds_beside
from cute_attn.layouts.base import Config
from cute_attn.plan import configs
from cute_attn.problem import Problem
from tests.host import machine_code
from tests.host.test_cross_compile import (
    ALL_RULES,
    FIRST,
    OTHERS,
    RULES,
    SOONEST,
    WITH_RULES,
    WITHOUT_RULES,
    head_dims,
)

KERNELS = {  # of a mainloop, by parts of their names
    "cp_async_backward": ["cp_async_backward"],
    "tma_wgmma_backward": ["tma_wgmma_backward"],
    "tma_wgmma_wide": ["KeyGradients", "QueryGradients"],
}


@dataclass(frozen=True)
class Case:
    """One backward pass to compile."""

    target: str
    mechanism: str
    head_dim: int
    head_dim_v: int
    rules: str
    dtype: str = "bfloat16"
    gradients: str = "qkv"
    deterministic: bool = False
    head_blocks: int = 1
    tile_m: int = 0  # 0 is the plan's first

    @property
    def problem(self) -> Problem:
        asked = replace(RULES[self.rules], dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v)
        return replace(asked, gradients=self.gradients, deterministic=self.deterministic)

    @property
    def config(self) -> Config:
        found = configs(self.problem, self.target, self.mechanism)
        wanted = self.head_blocks, self.tile_m or found[0].tile_m
        return next(config for config in found if (config.head_blocks, config.tile_m) == wanted)

    @property
    def row(self) -> tuple[str, str, int]:
        """The row of the GPU's table: rows are keyed by the wider of the two padded head dims."""
        return self.target, self.config.backward, max(self.config.tile_d, self.config.tile_dv)

    @property
    def exception(self) -> tuple[str, str, int]:
        """Its key in EXCEPTIONS."""
        return (layouts.for_target(self.target).GPU.name, *self.row[1:])

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}-{self.head_dim_v}"
        order = "-deterministic" if self.deterministic else f"-{self.head_blocks}-blocks" if self.head_blocks > 1 else ""
        order += f"-{self.tile_m}-queries" * bool(self.tile_m)
        return f"{self.target}-{self.mechanism}-{dims}-{self.rules.replace(' ', '_')}-{self.gradients}{order}"


@lru_cache(maxsize=1)
def rows() -> dict[tuple[str, str, int], tuple[str, int]]:
    """The rows of every table that are compiled: their mechanism, and the widest head dim each serves."""
    found = {}
    for target in layouts.known_targets():
        for mechanism in layouts.for_target(target).MECHANISMS:
            for d in head_dims(target, mechanism, "qkv"):
                found[Case(target, mechanism, d, d, "full").row] = mechanism, d
    return found


def cases(rules: str, targets: list[str], **more) -> list[Case]:
    """A case for every row of the targets' tables."""
    return [
        Case(target, mechanism, d, d, rules, **more) for (target, *_), (mechanism, d) in rows().items() if target in targets
    ]


CASES = [
    *cases("all rules", FIRST),
    *cases("full", ["sm_90a", *OTHERS]),
    *cases("causal", ["sm_90a"]),
    # The order of dQ's sums, another dtype, heads of different widths of which the narrower needs padding.
    Case("sm_90a", "cp_async", 128, 128, "causal", deterministic=True),
    *[Case("sm_90a", "tma_wgmma", d, d, "causal", deterministic=True) for d in (64, 128)],
    Case("sm_90a", "cp_async", 104, 40, "causal", "float16"),
    Case("sm_86", "cp_async", 40, 256, "causal", "float16"),
    # Sequences of different lengths.
    *[Case("sm_90a", "tma_wgmma", d, d, rules) for d in (64, 128, 256) for rules in ("ragged", "in use")],
    Case("sm_80", "cp_async", 64, 64, "ragged"),
    # Blocks that share a key tile.
    *[Case("sm_90a", "tma_wgmma", d, d, "causal", head_blocks=blocks) for d, blocks in ((64, 4), (128, 2))],
    # Higher query tiles.
    *[Case("sm_90a", "tma_wgmma", 128, 128, rules, tile_m=80) for rules in ("full", "in use", "causal", "ragged")],
    *[Case("sm_90a", "tma_wgmma", 128, 128, rules, deterministic=True, tile_m=80) for rules in ("full", "causal")],
    # One kernel for wide heads of which V's are narrower.
    *[Case("sm_90a", "tma_wgmma", 192, 128, rules, tile_m=48) for rules in ("full", "causal", "ragged", "in use")],
    # Gradients that nobody asked for.
    *[Case("sm_90a", "tma_wgmma", d, d, "causal", gradients=names) for d in (64, 96, 128) for names in ("q", "k", "v", "kv")],
    *[Case("sm_90a", "tma_wgmma", 64, 64, "in use", gradients=names) for names in ("q", "k", "v", "kv")],
    *[Case("sm_80", "cp_async", d, d, "full", gradients=names) for d in (64, 128) for names in ("q", "k", "v", "kv")],
]

# Rows whose kernels may spill, as in test_cross_compile: at most so many bytes of stack a thread, and why.
FULL = (
    "dK, dV, P and dP take up to 192 of a thread's 255 registers; what is set aside are a few of the block's coordinates and "
    "addresses, read about twice for each query tile, and under a softcap some of the scores and of what their tanh takes"
)
CAREFUL = (
    "the copying warp, which has few registers, sets three aside for careful copies of masked tiles, which rarely run; under a "
    "softcap a computing thread sets one aside, which it reads once for each query tile"
)
COPYING = "a copying warp, which has few registers, sets up to three aside, which it reads once for each key tile"
EXCEPTIONS: dict[tuple[str, str, int], tuple[int, str]] = {
    ("sm_80", "cp_async_backward", 64): (192, FULL),
    ("sm_80", "cp_async_backward", 96): (160, FULL),
    ("sm_80", "cp_async_backward", 128): (64, FULL),
    ("sm_80", "cp_async_backward", 256): (32, FULL),
    ("sm_86", "cp_async_backward", 64): (64, FULL),
    ("sm_86", "cp_async_backward", 192): (96, FULL),
    ("sm_86", "cp_async_backward", 256): (32, FULL),
    ("sm_90", "cp_async_backward", 32): (32, FULL),
    ("sm_90", "cp_async_backward", 128): (64, FULL),
    ("sm_90a", "cp_async_backward", 32): (32, FULL),
    ("sm_90a", "cp_async_backward", 64): (64, FULL),
    ("sm_90a", "cp_async_backward", 96): (32, FULL),
    ("sm_90a", "cp_async_backward", 128): (64, FULL),
    ("sm_90a", "cp_async_backward", 192): (32, FULL),
    ("sm_90a", "cp_async_backward", 256): (96, FULL),
    ("sm_90a", "tma_wgmma_backward", 128): (32, CAREFUL),
    ("sm_90a", "tma_wgmma_backward", 192): (32, COPYING),
    ("sm_100", "cp_async_backward", 128): (32, FULL),
    ("sm_120", "cp_async_backward", 256): (64, FULL),
}

# Which gradients every run asks for of those that are asked for alone, by rules and head dim.
SOME_GRADIENTS = {("full", 64): "q k v kv", ("causal", 64): "q k v kv", ("in use", 64): "v"}


def in_every_run(case: Case) -> bool:
    """Each row of tma_wgmma, most with all rules, and with fewer the head dims that models have most; of cp_async a sample.
    What has a config or a dtype of its own is in it, though not each with all that it is tested with."""
    if case.rules == "all rules":
        return case.row[2] in (WITH_RULES if case.mechanism == "tma_wgmma" else ALL_RULES.get(case.target, SOONEST))
    if case.tile_m:  # a fixed order and masks at once; of wide heads masks alone
        return case.rules == "causal" if case.head_dim > 128 else case.rules != "causal" or case.deterministic
    if case.dtype != "bfloat16":
        return case.head_dim < case.head_dim_v
    if case.deterministic or case.head_blocks > 1:
        return True
    if case.gradients != "qkv":
        return case.gradients in SOME_GRADIENTS.get((case.rules, case.head_dim), "").split()
    if case.mechanism == "cp_async":
        return case.rules == "ragged"
    return case.head_dim in {"full": WITHOUT_RULES, "causal": (64, 128), "ragged": (128,), "in use": (256,)}[case.rules]


every_case = machine_code.each(CASES, in_every_run)


# ---- compiling -----------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """What became of a case: the mainloop's kernels, those around it, and the shared memory each allocates."""

    own: dict[str, cubin.Compiled]
    others: dict[str, cubin.Compiled]
    smem_bytes: list[int]


def compile_kernels(problem: Problem, config: Config) -> Kernels:
    """A backward pass."""
    code = machine_code.compiled(problem, config)
    around = ["RowValues"] + ["CastQueries"] * ("CastQueries" in code.sass)
    own, others = (
        {name: cubin.parse(code.resources, code.sass, name) for name in names} for names in (KERNELS[config.backward], around)
    )
    return Kernels(own, others, code.smem_bytes)


@pytest.fixture(scope="session")
def compiled(shared_folder) -> machine_code.Shared:
    """The kernels of all tests of this run."""
    pytest.importorskip("cutlass")
    return machine_code.Shared(shared_folder, compile_kernels)


@pytest.fixture
def kernels(case: Case, compiled) -> Kernels:
    return compiled[case]


# ---- what is compiled ----------------------------------------------------------------------------------------------


def test_every_row_of_every_table_is_compiled():
    """With all rules for one target of each GPU module."""
    assert {case.row for case in CASES} >= set(rows())
    assert {case.row for case in CASES if case.rules == "all rules"} == {row for row in rows() if row[0] in FIRST}
    assert {case.config.backward for case in CASES} == set(KERNELS)
    assert len(set(map(str, CASES))) == len(CASES)


def test_every_run_compiles_a_sample():
    """As of the forward pass; and gradients that are asked for alone, by every mechanism that is tested with them."""
    chosen = list(filter(in_every_run, CASES))
    with_all = [case for case in chosen if case.rules == "all rules"]
    assert {case.exception[:2] for case in with_all} == {case.exception[:2] for case in CASES}
    assert {case.row[1:] for case in chosen} == {case.row[1:] for case in CASES}
    assert {(case.mechanism, case.rules) for case in chosen} == {(case.mechanism, case.rules) for case in CASES}
    for asked in ("gradients", "deterministic", "dtype", "head_blocks", "tile_m"):
        have, all_have = ({(case.mechanism, getattr(case, asked)) for case in some} for some in (chosen, CASES))
        assert have == all_have, asked


# ---- registers and shared memory -----------------------------------------------------------------------------------


@every_case
def test_registers(case: Case, kernels: Kernels):
    """As many blocks as the config promises fit a multiprocessor's 65,536 registers, given out 8 a thread at a time."""
    config = case.config
    for code in kernels.own.values():
        assert 0 < code.registers <= 255
        assert -(-code.registers // 8) * 8 * config.threads * config.blocks_per_multiprocessor <= 65536


def spilled_bytes(kernels: Kernels) -> int:
    return max(code.stack_bytes + code.local_bytes for code in kernels.own.values())


@every_case
def test_spills(case: Case, kernels: Kernels):
    """None, or as many as an exception allows; the kernels before and after the mainloop's never."""
    limit, _ = EXCEPTIONS.get(case.exception, (0, ""))
    assert spilled_bytes(kernels) <= limit, f"{case.exception} spills {spilled_bytes(kernels)} bytes; {limit} are allowed"
    for code in kernels.others.values():
        assert code.stack_bytes == code.local_bytes == code.spill_stores == code.spill_loads == 0


@machine_code.whole_tables
@pytest.mark.parametrize("row", EXCEPTIONS, ids=lambda row: "-".join(map(str, row)))
def test_an_exception_is_needed(row, compiled):
    spilled = [spilled_bytes(compiled[case]) for case in CASES if case.exception == row]
    machine_code.assert_exception_is_needed(EXCEPTIONS[row], spilled)


@every_case
def test_shared_memory(case: Case, kernels: Kernels):
    """The largest kernel allocates what the plan counted, but for padding; one that rounds dQ beside it a piece of the sums of
    one head, with two barriers, or of ragged sequences of two, each with as many for one of two tiles, of 8 words, ahead."""
    family, config = layouts.family(case.config), case.config
    rounding = []
    if rounds_beside(case.problem, config):
        rows, columns = family.piece_shape(config)
        one = rows * columns * 4 + 2 * 8
        rounding = [2 * (one + 2 * 8 + 8 * 4) if case.problem.ragged else one]
        assert min(kernels.smem_bytes) == rounding[0]
    assert len(kernels.smem_bytes) == len(kernels.own) + len(rounding)
    parts = machine_code.allocated(family.smem_parts(config), ticket=case.deterministic, hidden=case.problem.masked)
    assert parts <= max(kernels.smem_bytes) <= family.smem_bytes(config)


# ---- instructions --------------------------------------------------------------------------------------------------


@every_case
def test_instructions(case: Case, kernels: Kernels):
    """The tensor cores' and the copies' are the mechanism's own."""
    for code in kernels.own.values():
        if case.mechanism == "tma_wgmma":
            assert code.count("HGMMA") > 0
            assert code.count("HMMA") == 0
            assert code.count("UTMALDG") >= 4  # Q, K, V and dO
            assert code.count("LDGSTS") == 0
        else:
            assert code.count("HMMA") > 0
            assert code.count("HGMMA") == 0
            assert code.count("LDSM") > 0
            assert code.count("LDGSTS") > 0


@every_case
def test_clusters_where_blocks_share_a_key_tile(case: Case, kernels: Kernels):
    for code in kernels.own.values():
        assert (code.count("UCGABAR_WAIT") > 0) == (case.head_blocks > 1)


@machine_code.each([case for case in CASES if case.config.backward == "tma_wgmma_backward"], in_every_run)
def test_products_are_not_serialised(case: Case, kernels: Kernels):
    """Where ptxas can't prove that registers are left alone while products run, it waits after each of them: so where a branch
    comes between two products of which the first still runs."""
    (code,) = kernels.own.values()
    waits = sum(count for name, count in code.instructions.items() if name.startswith("WARPGROUP.DEPBAR"))
    assert 0 < waits < code.count("HGMMA") / 2


def test_sums_are_stored_before_their_memory_is_free():
    """Of dQ, where a block rounds one tile after another: an arrival doesn't wait for what is asked of shared memory."""
    pytest.importorskip("cutlass")
    problem = Problem("bfloat16", 64, 64, gradients="qkv", ragged="cu_seqlens_q cu_seqlens_k")
    config = next(iter(configs(problem, "sm_90a", "tma_wgmma")))
    lines = cubin.code_of(machine_code.compiled(problem, config).sass, "CastQueries").splitlines()
    loads, stores, arrivals = ([i for i, line in enumerate(lines) if op in line] for op in ("LDS.128", " STG.", "SYNCS.ARRIVE"))
    last = max(i for i in loads if all(i - n in loads for n in range(8)))  # of a thread's 32 sums
    released = min(i for i in arrivals if i > last)
    assert sum(last < i < released for i in stores) == 8


@machine_code.each([case for case in CASES if case.config.backward == "tma_wgmma_wide"], in_every_run)
def test_operands_in_registers(case: Case, kernels: Kernels):
    """Columns of K and V are loaded once a tile, 16 at a time, and registers are enough for them: else ptxas waits after each
    product. Under a softcap it does where products run into the next tile, whatever is in registers."""
    columns = layouts.family(case.config).first_columns(case.config).values()
    assert min(columns) > 0
    assert kernels.own["KeyGradients"].count("LDSM") == sum(columns) // 16
    for code in kernels.own.values():
        waits = sum(count for name, count in code.instructions.items() if name.startswith("WARPGROUP.DEPBAR"))
        assert 0 < waits < code.count("HGMMA") / 2 or (case.problem.softcap and case.config.overlap_tiles)


@machine_code.each([case for case in CASES if case.mechanism == "cp_async"], in_every_run)
def test_no_product_that_nobody_asked_for(case: Case, kernels: Kernels):
    """The products of a tile, in every copy of the loop: one that masks, one that does not, one for the other edge; and dQ once
    more, where it is a tile late. dQ is added as many floats at a time as the GPU can."""
    (code,), config, problem, asked = kernels.own.values(), case.config, case.problem, case.gradients
    d, dv = config.tile_d, config.tile_dv
    columns = {"S": d, "dP": dv * (asked != "v"), "dV": dv * ("v" in asked), "dK": d * ("k" in asked), "dQ": d * ("q" in asked)}
    each = {name: n * config.tile_m * config.tile_n // config.mma_warps // (16 * 8 * 16) for name, n in columns.items()}
    late = config.key_warps == config.mma_warps
    loops = 2 + (problem.bounded_left or (problem.bounded_right and problem.deterministic))
    copies, rest = divmod(code.count("HMMA") - late * each["dQ"], sum(each.values()))
    assert rest == 0
    assert loops <= copies <= 2 * loops  # the compiler may make two of one
    added = ("q" in asked) * (config.tile_m * d // config.mma_threads // config.add_width + problem.deterministic)
    passes_the_last = problem.deterministic * ("q" in asked)  # a turn, behind the loops
    assert code.count("RED") + code.count("REDG") == (copies + late) * added + passes_the_last
