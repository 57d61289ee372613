"""Kernels with a user's functions, compiled to machine code without their GPU: nothing is spilled where a mask is simple, and
what is captured is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch

from cute_attn import cubin, layouts, masks
from cute_attn.expressions import Expression
from cute_attn.functions import traced
from cute_attn.layouts.base import Config
from cute_attn.plan import explain, plan
from cute_attn.problem import Problem
from tests.host import machine_code
from tests.host.test_cross_compile_backward import KERNELS

RAGGED = "cu_seqlens_q cu_seqlens_k"
Q, TABLE = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((2, 4, 2, 8), (2, 9)))
IDS = torch.zeros(2, 9, dtype=torch.int64)

SLOPES = torch.zeros(2)
BIAS = torch.zeros(2, 2, 4, 12, dtype=torch.bfloat16, requires_grad=True)


def _score(score, batch, head, q_idx, kv_idx):
    return 20.0 * torch.tanh(score * TABLE[head, kv_idx] / 20.0)


def _ramp(score, batch, head, q_idx, kv_idx):
    return score - SLOPES[head] * (q_idx - kv_idx)


def _of_places(score, batch, head, q_idx, kv_idx):
    return score - torch.where(q_idx >= kv_idx, batch, head.float())


def expression(mask=None, score=None, alibi_slopes=None, bias=None) -> Expression:
    return traced(mask, score, (), alibi_slopes, Q, 2, 2, bias, (4, 12))[0]


PROBLEMS = {
    "mask": Problem("bfloat16", 0, 0, return_lse=True, expression=expression(masks.causal)),
    "alibi": Problem("bfloat16", 0, 0, bounded_right=True, expression=expression(alibi_slopes=torch.zeros(2))),
    "ramp": Problem("bfloat16", 0, 0, bounded_right=True, expression=expression(score=_ramp)),
    "places": Problem("bfloat16", 0, 0, expression=expression(score=_of_places)),
    "listed": Problem("bfloat16", 0, 0, expression=expression(masks.document(IDS)), blocks="listed"),
    "classified": Problem("bfloat16", 0, 0, expression=expression(masks.document(IDS)), blocks="classified"),
    "bias": Problem("bfloat16", 0, 0, expression=expression(bias=BIAS)),
    "dropout": Problem("bfloat16", 0, 0, bounded_left=True, dropout=True),
    "all": Problem(
        "bfloat16", 0, 0, return_lse=True, ragged=RAGGED, expression=expression(masks.document(IDS), _score, torch.zeros(2))
    ),
}


@dataclass(frozen=True)
class FunctionCase:
    """A forward or a backward pass."""

    mechanism: str
    head_dim: int
    what: str
    gradients: str = ""

    @property
    def problem(self) -> Problem:
        of = PROBLEMS[self.what]
        of = of if self.gradients else replace(of, expression=of.expression.without_partials)
        sinks = self.what == "all" and not self.gradients
        return replace(of, head_dim=self.head_dim, head_dim_v=self.head_dim, gradients=self.gradients, sinks=sinks)

    @property
    def config(self) -> Config:
        return plan(self.problem, "sm_90a", self.mechanism)

    def __str__(self) -> str:
        return f"{self.mechanism}-d{self.head_dim}-{self.what}-{self.gradients or 'forward'}"


CASES = [
    FunctionCase("tma_wgmma", 128, "mask"),
    *[FunctionCase("tma_wgmma", d, "mask", "qkv") for d in (64, 256)],
    FunctionCase("cp_async", 64, "mask", "qkv"),
    FunctionCase("tma_wgmma", 64, "alibi"),
    *[FunctionCase("tma_wgmma", 128, "all", gradients) for gradients in ("", "qkv")],
    FunctionCase("cp_async", 128, "all"),
    FunctionCase("cp_async", 128, "places"),
    FunctionCase("tma_wgmma", 128, "listed", "qkv"),
    *[FunctionCase("tma_wgmma", 128, "bias", gradients) for gradients in ("", "qkv")],
    *[FunctionCase("tma_wgmma", 128, "dropout", gradients) for gradients in ("", "qkv")],
]


def in_every_run(case: FunctionCase) -> bool:
    """All but a mask's gradients on tma_wgmma, which cp_async and ``all`` have, slopes, which ``all`` has, and forward passes
    of what a backward pass computes, too."""
    if case.what == "mask" and case.gradients:
        return case.mechanism == "cp_async"
    return case.what != "alibi" and (case.what not in ("bias", "dropout") or case.gradients != "")


# Bytes of a thread's stack: masks need none where warpgroups compute. All functions together need more on cp_async, where a
# block's second pass is a loop of its own.
ROOM = {"mask": {"tma_wgmma": 0, "cp_async": 64}, "alibi": {"tma_wgmma": 0}, "all": {"tma_wgmma": 96, "cp_async": 176}}
ROOM |= {"bias": {"tma_wgmma": 0}, "dropout": {"tma_wgmma": 0}, "listed": {"tma_wgmma": 0}, "places": {"cp_async": 176}}


def compile_kernels(problem: Problem, config: Config) -> list[cubin.Compiled]:
    """The mainloop's."""
    code = machine_code.compiled(problem, config)
    names = KERNELS[config.backward] if problem.gradients else ["mainloop"]
    return [cubin.parse(code.resources, code.sass, name) for name in names]


@pytest.fixture(scope="session")
def kernels(shared_folder) -> machine_code.Shared:
    pytest.importorskip("cutlass")
    return machine_code.Shared(shared_folder, compile_kernels)


@machine_code.each(CASES, in_every_run)
def test_kernels_with_functions(case: FunctionCase, kernels):
    config = case.config
    for code in kernels[case]:
        assert 0 < -(-code.registers // 8) * 8 * config.threads * config.blocks_per_multiprocessor <= 65536
        assert code.stack_bytes + code.local_bytes <= ROOM[case.what][case.mechanism]
        assert code.count("HGMMA" if case.mechanism == "tma_wgmma" else "HMMA") > 0
    if case.what == "all":
        assert sum(code.count("LDG") for code in kernels[case]) > 16
    if case.what == "bias" and case.gradients:  # of a thread's 32 scores four keys at once, and nothing narrower
        (code,) = kernels[case]
        found = {name: n for name, n in code.instructions.items() if name.startswith(("LDG", "STG"))}
        assert {name: n for name, n in found.items() if "STRONG" not in name} == {  # those are of signals
            "LDG.E.64": 8,
            "STG.E.64": 8,
        }


@pytest.mark.parametrize(("what", "unneeded"), [("listed", ("LDG", "FMNMX")), ("ramp", ("FMNMX",))])
def test_whole_tiles_compute_no_mask(what, unneeded):
    """One of the forward pass's loops over key tiles looks for no maximum, and reads no entry of a list. To what a ramp adds
    products are added: it takes no multiply-add once they are there."""
    pytest.importorskip("cutlass")
    case = FunctionCase("tma_wgmma", 64, what)
    code = machine_code.compiled(case.problem, case.config)
    parsed = cubin.parse(*code[:2], kernel="Forward")
    assert parsed.stack_bytes + parsed.local_bytes <= 32
    plain = [body for body in loops_of(code.sass) if not any(word in line for line in body for word in unneeded)]
    whole = [body for body in plain if sum("MUFU.EX2" in line for line in body) >= 64]
    assert whole
    assert min(sum("FFMA" in line for line in body) for body in whole) <= 64 + 4


def test_no_product_waits_for_a_list():
    """In the backward pass what a list says of a tile comes while another one is computed."""
    pytest.importorskip("cutlass")
    case = FunctionCase("tma_wgmma", 64, "listed", "qkv")
    code = machine_code.compiled(case.problem, case.config)
    body = min(loops_of(cubin.code_of(code.sass, "mainloop")), key=len)
    first = {word: next(i for i, line in enumerate(body) if word in line) for word in ("LDG", "HGMMA")}
    assert first["LDG"] > first["HGMMA"]


def loops_of(sass: str) -> list[list[str]]:
    """Stretches of instructions with products that a branch back repeats, the innermost ones."""
    lines, begins, found = sass.splitlines(), {}, []
    for i, line in enumerate(lines):
        if line.startswith(".L_x"):
            begins[line.strip().rstrip(":")] = i
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in begins:
            begin = begins[branch[1]]
            if any("HGMMA" in inside for inside in lines[begin:i]) and not any(begin <= first for first, _ in found):
                found.append((begin, i))
    return [lines[begin:end] for begin, end in found]


def test_blocks_are_classified_by_two_comparisons_a_pair():
    case = FunctionCase("tma_wgmma", 64, "classified")
    pytest.importorskip("cutlass")
    code = cubin.parse(*machine_code.compiled(case.problem, case.config)[:2])
    assert code.stack_bytes + code.local_bytes == 0
    assert code.count("ISETP") < 2.5 * 128
    assert code.count("LDG") == 8 + 16


@pytest.mark.parametrize(("which", "kernels"), [("key lists", ("kernel", "order")), ("query lists", ("kernel",))])
def test_kernels_that_make_lists(which, kernels):
    pytest.importorskip("cutlass")
    problem = Problem("bfloat16", 8, 8, blocks=which)
    code = machine_code.compiled(problem, plan(problem, "sm_90a"))
    for name in kernels:
        made = cubin.parse(*code[:2], kernel=f"cutlass_{name}")
        assert made.stack_bytes + made.local_bytes == 0
        assert made.registers <= 64


@pytest.mark.parametrize("what", PROBLEMS)
def test_problems_are_explained(what):
    case = FunctionCase("tma_wgmma", 64, what)
    text = explain(case.problem, case.config)
    assert ("a mask function" in text) == (what in ("mask", "listed", "classified", "all"))
    assert ("a block mask" in text) == (what in ("listed", "classified"))
    assert ("a score function" in text) == (what in ("alibi", "ramp", "bias", "places", "all"))
    assert ("sinks" in text) == (what == "all")
    assert ("dropout" in text) == (what == "dropout")
    case = FunctionCase("tma_wgmma", 64, what, "qkv")
    assert ("gradients of captured tensors" in explain(case.problem, case.config)) == (what == "bias")


def test_a_kernel_takes_what_its_functions_read():
    from cute_attn.fields import FORWARD, Field

    problem = FunctionCase("tma_wgmma", 64, "all").problem
    config = plan(problem, "sm_90a", None)
    fields = [field for some in FORWARD for field in ([some] if isinstance(some, Field) else some)]
    asked = {field.name: field.asked(problem, config) for field in fields}
    assert asked["captured"]
    assert asked["sinks"]
    assert problem.expression.tensors == (("int64", 2, 1), ("bfloat16", 2, 1), ("float32", 1, 1))
    plain = replace(problem, expression=expression(masks.causal), sinks=False)
    assert not any(field.asked(plain, config) for field in fields if field.name in ("captured", "sinks"))
    assert layouts.family(config) is not None
