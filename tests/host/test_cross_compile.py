"""Every GPU × mechanism × row of its table, compiled to machine code without that GPU, and what the code must show: no
more registers than a thread has, nothing spilled that is not accounted for below, the tensor cores' instructions, and
products that run while the softmax does.

Each kernel is compiled once in a run, by the first of its processes (the DSL compiles one at a time in each) that asks for
it: ``python -m pytest -n auto`` uses all cores. A plain run of few tests compiles only what they read. Every run takes a
sample, ``in_every_run``; ``-m whole_tables`` is the rest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import pytest

from cute_attn import cubin, layouts
from cute_attn.layouts.base import Config
from cute_attn.plan import configs, plan, takes_tickets
from cute_attn.problem import Problem
from tests.host import machine_code

RULES = {
    "full": Problem("bfloat16", 0, 0),
    "causal": Problem("bfloat16", 0, 0, bounded_right=True, return_lse=True),
    # Three copies of the loop over key tiles, two of which mask, and a tanh for each score.
    "all rules": Problem("bfloat16", 0, 0, bounded_left=True, bounded_right=True, softcap=True, return_lse=True),
    "ragged": Problem("bfloat16", 0, 0, bounded_right=True, return_lse=True, ragged="cu_seqlens_q cu_seqlens_k"),
    "in use": Problem("bfloat16", 0, 0, return_lse=True, ragged="seqused_q seqused_k"),
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    target: str
    mechanism: str
    head_dim: int
    head_dim_v: int
    rules: str
    dtype: str = "bfloat16"

    @property
    def problem(self) -> Problem:
        return replace(RULES[self.rules], dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v)

    @property
    def config(self) -> Config:
        return plan(self.problem, self.target, self.mechanism)

    @property
    def anchored(self) -> bool:
        """Whether whole tiles look for no maximum (``softmax.py``)."""
        return self.dtype == "bfloat16"

    @property
    def has_second_pass(self) -> bool:
        """Whether a block may have to do its tiles again (``mainloop/guard.py``)."""
        return self.problem.masked or self.anchored

    @property
    def exception(self) -> tuple[str, str, int]:
        """Its key in EXCEPTIONS."""
        return (layouts.for_target(self.target).GPU.name, *self.row[1:])

    @property
    def row(self) -> tuple[str, str, int]:
        """The row of the GPU's table: rows are keyed by the wider of the two padded head dims."""
        return self.target, self.mechanism, max(self.config.tile_d, self.config.tile_dv)

    def __str__(self) -> str:
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}-{self.head_dim_v}"
        return f"{self.target}-{self.mechanism}-{dims}-{self.rules.replace(' ', '_')}"


HEAD_DIMS = range(8, 257, 8)
WHOLE = ("sm_80", "sm_86", "sm_90a", "sm_120")  # every row is compiled, whether or not another has the same
# One target of each GPU module, and the others.
FIRST = list({layouts.for_target(target).GPU.name: target for target in reversed(layouts.known_targets())}.values())
OTHERS = [target for target in layouts.known_targets() if target not in FIRST]


def head_dims(target: str, mechanism: str, gradients: str = "") -> Iterable[int]:
    """Those of a table that are compiled: all, or a sample where one of ``WHOLE`` has the same table."""

    def table(of: str) -> list[Config]:
        problems = [Problem("bfloat16", d, d, gradients=gradients) for d in HEAD_DIMS]
        return [replace(plan(problem, of, mechanism), target="") for problem in problems]

    others = [other for other in WHOLE if mechanism in layouts.for_target(other).MECHANISMS]
    if target in WHOLE or table(target) not in map(table, others):
        return HEAD_DIMS
    return (128,) if target in OTHERS else (32, 128)


@lru_cache(maxsize=1)
def rows() -> dict[tuple[str, str, int], int]:
    """The rows of every table that are compiled, and the widest head dim each serves."""
    found = {}
    for target in layouts.known_targets():
        for mechanism in layouts.for_target(target).MECHANISMS:
            for d in head_dims(target, mechanism):
                case = Case(target, mechanism, d, d, "full")
                found[case.row] = d
    return found


def cases(rules: str, targets: list[str], mechanism: str = "") -> list[Case]:
    """A case for every row of the targets' tables, or of one mechanism's."""
    return [Case(t, m, d, d, rules) for (t, m, _), d in rows().items() if t in targets and mechanism in ("", m)]


CASES = [
    *cases("all rules", FIRST),
    *cases("full", ["sm_90a", *OTHERS]),
    *cases("causal", ["sm_90a"]),
    # Head dims that are no tiles, and differ: padding in shared memory, predicated copies.
    Case("sm_90a", "tma_wgmma", 40, 104, "all rules"),
    Case("sm_90a", "cp_async", 104, 40, "causal", "float16"),
    # Where weights above 1 don't fit, whole tiles look for maxima, too.
    Case("sm_90a", "tma_wgmma", 64, 128, "causal", "float16"),
    # Sequences of different lengths.
    *[Case("sm_90a", "tma_wgmma", d, d, rules) for d in (64, 128, 256) for rules in ("ragged", "in use")],
    Case("sm_80", "cp_async", 64, 64, "ragged"),
]

# Rows whose kernels may spill: at most so many bytes of stack a thread (the worst kernel's, rounded up to 32), and why they
# are shipped all the same. Keyed by the GPU module's name, the mechanism and the wider padded head dim. All others spill
# nothing.
TALL = (
    "a warp owns 32 rows, so that each ldmatrix feeds two MMAs; S and O then take 128 to 192 of the 255 registers, and "
    "their operands most of the rest; of bfloat16 more is spilled where a block's second pass is a loop of its own, since "
    "whole tiles look for no maximum, which is 3 to 14 % faster all the same (docs/performance.md, 'Anchors on cp_async')"
)
CAPPED = (
    "with a softcap and both edges, where a tanh for each score takes what registers there are, four values of the loop over "
    "whole tiles; it is faster than one without spills that looks for maxima"
)
EXCEPTIONS: dict[tuple[str, str, int], tuple[int, str]] = {
    ("sm_80", "cp_async", 64): (96, TALL),
    ("sm_80", "cp_async", 96): (160, TALL),
    ("sm_80", "cp_async", 128): (128, TALL),
    ("sm_86", "cp_async", 64): (96, TALL),
    ("sm_86", "cp_async", 96): (160, TALL),
    ("sm_86", "cp_async", 128): (128, TALL),
    ("sm_90", "cp_async", 128): (64, TALL),
    ("sm_90a", "cp_async", 64): (160, TALL),
    ("sm_90a", "cp_async", 96): (160, TALL),
    ("sm_90a", "cp_async", 128): (160, TALL),
    ("sm_90a", "tma_wgmma", 64): (32, CAPPED),
    ("sm_100", "cp_async", 128): (160, TALL),
    ("sm_120", "cp_async", 64): (160, TALL),
    ("sm_120", "cp_async", 96): (160, TALL),
    ("sm_120", "cp_async", 128): (128, TALL),
}

# The rows of cp_async that every run compiles with all rules, so with every piece of the mainloop: one or two of each GPU, and
# of those that aren't named what is compiled soonest.
ALL_RULES = {"sm_80": (192,), "sm_86": (96, 256)}
SOONEST = (32,)


# The rows of tma_wgmma that every run compiles with all rules; the others without any, which takes half the time.
WITH_RULES, WITHOUT_RULES = (64, 128, 256), (96, 192)


def in_every_run(case: Case) -> bool:
    """Each row of tma_wgmma, most with all rules, and with fewer the head dims that models have most; of cp_async a sample."""
    if case.rules == "all rules" and case.mechanism == "tma_wgmma":
        return case.row[2] in WITH_RULES and (case.row[2] != 128 or case.head_dim != 128)  # 128 is that of 40 and 104
    if case.rules == "all rules":
        return case.row[2] in ALL_RULES.get(case.target, SOONEST)
    if case.dtype != "bfloat16":
        return True
    if case.mechanism == "cp_async":
        return case.head_dim == 64 and case.rules in ("full", "ragged")
    return case.head_dim in {"full": (64, *WITHOUT_RULES)}.get(case.rules, (128,))


every_case = machine_code.each(CASES, in_every_run)
wgmma_cases = machine_code.each([c for c in CASES if c.mechanism == "tma_wgmma"], in_every_run)


# ---- compiling -----------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What became of a case."""

    code: cubin.Compiled
    sass: str
    smem_bytes: int  # what the kernel allocates of shared memory, alignment included


def compile_kernel(problem: Problem, config: Config) -> Kernel:
    """The mainloop's."""
    code = machine_code.compiled(problem, config)
    (smem_bytes,) = code.smem_bytes or [0]
    sass = cubin.code_of(code.sass, "mainloop")
    return Kernel(cubin.parse(code.resources, code.sass, "mainloop"), sass, smem_bytes)


@pytest.fixture(scope="session")
def kernels(shared_folder) -> machine_code.Shared:
    """The kernels of all tests of this run."""
    pytest.importorskip("cutlass")
    return machine_code.Shared(shared_folder, compile_kernel)


@pytest.fixture
def kernel(case: Case, kernels) -> Kernel:
    return kernels[case]


# ---- what is compiled ----------------------------------------------------------------------------------------------


def test_every_row_of_every_table_is_compiled():
    """And every instruction set: with all rules for one target of each GPU module."""
    assert {case.row for case in CASES} == set(rows())
    assert {case.exception for case in CASES if case.rules == "all rules"} == {
        (layouts.for_target(target).GPU.name, mechanism, row) for target, mechanism, row in rows()
    }
    assert len(set(map(str, CASES))) == len(CASES)


def test_every_run_compiles_a_sample():
    """Of each GPU and mechanism a row with all rules, which has every piece of the mainloop; each row of the tables on some
    GPU; every set of rules and every dtype by each mechanism that is tested with it."""
    chosen = list(filter(in_every_run, CASES))
    ways = {(layouts.for_target(case.target).GPU.name, case.mechanism) for case in CASES}
    with_all = [case for case in chosen if case.rules == "all rules"]
    assert {(layouts.for_target(case.target).GPU.name, case.mechanism) for case in with_all} == ways
    assert {case.row[1:] for case in chosen} == {case.row[1:] for case in CASES}
    assert {(case.mechanism, case.rules) for case in chosen} == {(case.mechanism, case.rules) for case in CASES}
    assert {(case.mechanism, case.dtype) for case in chosen} == {(case.mechanism, case.dtype) for case in CASES}


@machine_code.whole_tables
def test_one_code_for_several_targets(kernels):
    """Where one code is compiled for two targets, the other's is the same, to the instruction and its operands."""
    for (target, mechanism), other in machine_code.SAME_CODE.items():
        case = Case(target, mechanism, 64, 64, "full")
        own = compile_kernel(case.problem, case.config)
        shared = kernels[Case(other, mechanism, 64, 64, "full")]
        assert len(INSTRUCTION.findall(own.sass)) > 1000
        assert INSTRUCTION.findall(own.sass) == INSTRUCTION.findall(shared.sass)
        assert own.code == shared.code


# ---- registers and shared memory -----------------------------------------------------------------------------------


@every_case
def test_registers(case: Case, kernel: Kernel):
    """As many blocks as the config promises fit a multiprocessor's 65,536 registers, given out 8 a thread at a time."""
    a_thread = -(-kernel.code.registers // 8) * 8
    assert 0 < kernel.code.registers <= 255
    assert a_thread * case.config.threads * case.config.blocks_per_multiprocessor <= 65536


def spilled_bytes(code: cubin.Compiled) -> int:
    return code.stack_bytes + code.local_bytes


@every_case
def test_spills(case: Case, kernel: Kernel):
    """None, or as many as an exception allows."""
    code, (limit, _) = kernel.code, EXCEPTIONS.get(case.exception, (0, ""))
    what = f"spills {spilled_bytes(code)} bytes: {code.spill_stores} stores, {code.spill_loads} loads"
    assert spilled_bytes(code) <= limit, f"{case.exception} {what}; {limit} bytes are allowed"
    if limit == 0:
        assert code.spill_stores == code.spill_loads == 0, f"{case.exception} {what}"


@machine_code.whole_tables
@pytest.mark.parametrize("row", EXCEPTIONS, ids=lambda row: "-".join(map(str, row)))
def test_an_exception_is_needed(row, kernels):
    spilled = [spilled_bytes(kernels[case].code) for case in CASES if case.exception == row]
    machine_code.assert_exception_is_needed(EXCEPTIONS[row], spilled)


@pytest.mark.parametrize("rules", ["causal", pytest.param("all rules", marks=machine_code.whole_tables)])
def test_smaller_tiles(rules):
    """Those for few keys: nothing is spilled, and as many blocks as the config promises fit a multiprocessor."""
    case = Case("sm_90a", "cp_async", 256, 256, rules)
    config = configs(case.problem, case.target, case.mechanism)[1]
    code = compile_kernel(case.problem, config).code
    assert spilled_bytes(code) == code.spill_stores == code.spill_loads == 0
    assert -(-code.registers // 8) * 8 * config.threads * config.blocks_per_multiprocessor <= 65536


@every_case
def test_shared_memory(case: Case, kernel: Kernel):
    """The kernel allocates what the plan counted, but for padding."""
    family, config = layouts.family(case.config), case.config
    needed = {"verdict": case.has_second_pass, "work": case.problem.ragged, "asked": takes_tickets(case.problem, config)}
    needed["ramp"] = case.problem.expression.ramp is not None
    parts = machine_code.allocated(family.smem_parts(config), **needed)
    assert parts <= kernel.smem_bytes <= family.smem_bytes(config)
    assert kernel.code.static_smem_bytes <= 1024  # what CUDA takes for itself, on GPUs where it is counted here


# ---- instructions --------------------------------------------------------------------------------------------------


@every_case
def test_instructions(case: Case, kernel: Kernel):
    """The tensor cores' and the copies' are the mechanism's own."""
    count, config = kernel.code.count, case.config
    if case.mechanism == "tma_wgmma":
        assert count("HGMMA") > 0
        assert count("HMMA") == 0
        assert count("UTMALDG") >= 3  # Q, K and V
        assert (count("UTMASTG") >= 1) == (not config.o_from_registers)
        assert count("LDGSTS") == 0
        # setmaxnreg: what the plan gives, and no more than it counts on.
        given = {int(registers, 16) for registers in re.findall(r"USETMAXREG\S* (?:UP\d, )?(0x[0-9a-f]+)", kernel.sass)}
        assert given == {config.mma_registers, config.copy_registers}
    else:
        assert count("HMMA") > 0
        assert count("HGMMA") == 0
        assert count("LDSM") > 0
        assert count("LDGSTS") > 0
        # Each product of a tile, in every copy of the loop: one for the first tile and those that a right edge cuts, one for
        # whole tiles, one for the left edge, one for the second pass.
        steps = 2 + case.problem.bounded_left + case.has_second_pass
        products = config.tile_m * config.tile_n * (config.tile_d + config.tile_dv) // (16 * 8 * 16) // config.mma_warps
        assert count("HMMA") % products == 0
        assert count("HMMA") <= steps * products


# ---- overlap -------------------------------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.MULTILINE)
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")


class Stretch(NamedTuple):
    """The instructions up to a wait for warpgroup MMAs, and how many groups of them may then still be running."""

    instructions: list[str]
    running: int

    def count(self, name: str) -> int:
        return sum(instruction.startswith(name) for instruction in self.instructions)


def stretches(sass: str) -> list[Stretch]:
    """The code cut at its waits. ptxas keeps each step of the loop in one piece, so the order of the text is enough."""
    found: list[Stretch] = []
    since: list[str] = []
    for instruction, operands in INSTRUCTION.findall(sass):
        if instruction.startswith("WARPGROUP.DEPBAR"):
            wait = WAIT.search(operands)
            assert wait, operands
            found.append(Stretch(since, int(wait[1], 16)))
            since = []
        since.append(instruction)
    return found


def test_stretches():
    """On five lines of code."""
    sass = """
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;   /* 0x01 */
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;                        /* 0x02 */
        /*0030*/              @!P0 FMNMX R1, R2, R3, !PT ;                                /* 0x03 */
        /*0040*/                   MUFU.EX2 R4, R4 ;                                      /* 0x04 */
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                        /* 0x05 */
    """
    one, two = stretches(sass)
    assert (one.running, one.count("HGMMA")) == (1, 1)
    assert (two.running, two.count("FMNMX"), two.count("MUFU.EX2"), two.count("HGMMA")) == (0, 1, 1, 0)


@wgmma_cases
def test_products_are_not_serialised(case: Case, kernel: Kernel):
    """Where ptxas can't prove that registers are left alone while warpgroup MMAs run, it waits after each of them."""
    waits, problem = [stretch.running for stretch in stretches(kernel.sass)], case.problem
    steps = waits.count(1)
    assert steps >= 1 + problem.bounded_left + problem.bounded_right + case.has_second_pass
    # One wait for S and one for O in each copy of the loop; in each pass over the keys one for S before it, one for O after.
    assert len(waits) <= 2 * steps + 2 * (1 + case.has_second_pass)
    assert len(waits) < kernel.code.count("HGMMA") / 2


@wgmma_cases
def test_softmax_overlaps_the_products(case: Case, kernel: Kernel):
    """In every copy of the loop: Q·Kᵀ of this tile and P·V of the last are both issued before the wait for S; then, while
    P·V still runs, come the row maxima of all scores and the first exponential at least, and no product. Left alone,
    ptxas waits for O in the middle of the maxima. Where whole tiles need none, come a row's exponentials, of the two that a
    thread has. The loop of the second pass, which stands last and only runs where a value is not finite, may wait where it
    likes."""
    config, problem, found = case.config, case.problem, stretches(kernel.sass)
    both = config.tile_d // 16 + config.tile_n // 16
    scores = config.tile_n // 2  # of a thread
    tanhs = scores if problem.softcap else 0  # of one exponential each
    steps = [(before, after) for before, after in itertools.pairwise(found) if before.running == 1]
    first_pass = 1 + problem.bounded_left + problem.bounded_right
    assert len(steps) == first_pass + case.has_second_pass
    for i, (before, after) in enumerate(steps[:first_pass]):
        assert before.count("HGMMA") == both
        assert after.running == 0
        assert after.count("HGMMA") == 0
        # The loop over whole tiles and, where one of the right edge comes before it, that of the left edge.
        to_left = i > problem.bounded_right > 0 and not problem.takes_registers  # the loop behind those
        if case.anchored and (i == problem.bounded_right or to_left):
            assert after.count("FMNMX") < scores
            assert after.count("MUFU.EX2") >= tanhs + scores // 2
        else:
            assert after.count("FMNMX") >= scores
            assert after.count("MUFU.EX2") > tanhs
