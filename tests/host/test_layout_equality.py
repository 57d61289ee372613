"""The layouts that the kernels get from the DSL are those that the host proves and draws: traced here without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("pycute")
pytest.importorskip("cutlass.cute")

from cute_attn.layouts import family, prove
from cute_attn.layouts.__main__ import configs
from cute_attn.layouts.base import OPERANDS, Layout
from cute_attn.problem import Problem

CONFIGS = [config for config, _ in configs(dtype="bfloat16")]
CONFIGS += [config for config, _ in configs(head_dim=192, head_dim_v=128, dtype="float16")]
TARGETS = sorted({config.target for config in CONFIGS})


@pytest.mark.parametrize("target", TARGETS)
def test_every_layout_map_and_copy(target):
    assert prove.against_dsl([config for config in CONFIGS if config.target == target]) == []


@pytest.mark.parametrize("mechanism", ["tma_wgmma", "cp_async"])
def test_every_single_index_that_the_dsl_computes(mechanism):
    config = next(c for c, _ in configs("sm_90a", 64, dtype="bfloat16") if c.mechanism == mechanism)
    assert prove.against_dsl([config], limit=1 << 30) == []


@pytest.mark.parametrize("mechanism", ["tma_wgmma", "cp_async"])
def test_a_difference_is_found(monkeypatch, mechanism):
    """A description that the DSL's object was not made from: other rows, or another swizzle."""
    config = next(c for c, _ in configs("sm_90a", 128, dtype="bfloat16") if c.mechanism == mechanism)
    module = family(config)
    honest, dsl = module.smem, module.smem_layout
    monkeypatch.setattr(module, "smem_layout", lambda operand, c: _traced(honest(operand, c)))
    monkeypatch.setattr(module, "smem", lambda operand, c: _skewed(honest(operand, c)))
    found = prove.against_dsl([config])
    assert {finding.check for finding in found} == {"DSL"}
    assert len(found) == len({honest(operand, config) for operand in OPERANDS})
    assert dsl is not module.smem_layout


def _traced(layout: Layout):
    from cute_attn.layouts.base import cute_layout

    return cute_layout(layout)


def _skewed(layout: Layout) -> Layout:
    bits, base, shift = layout.swizzle  # type: ignore[misc]
    return replace(layout, swizzle=(bits - 1, base, shift))


def test_configs_cover_what_is_planned():
    """What ``check`` proves is what ``plan`` hands out."""
    from cute_attn.plan import plan

    for target in TARGETS:
        for head_dim in (64, 96, 128, 192, 256):
            assert plan(Problem("bfloat16", head_dim, head_dim), target) in CONFIGS


# ---- the micro-kernels that hold the proofs against hardware counters ------------------------------------------------


def test_the_code_has_as_many_instructions_as_the_proof_counts(capsys):
    """One kernel of each instruction, compiled without a GPU, as shipped."""
    from rich.console import Console

    from benchmarks.layouts import Case, cases, compile_only

    found: dict[str, Case] = {}
    for case in cases("sm_90a", [96]):
        if case.swizzled:
            found.setdefault(case.instruction, case)
    assert len(found) == 8
    assert compile_only(list(found.values()), Console(width=200)) == 0
    assert "8 kernels compiled for sm_90a; 0 differ" in capsys.readouterr().out


def test_cases_come_swizzled_and_not_and_once_each():
    from benchmarks.layouts import cases

    found = cases("sm_90a", [64, 128])
    assert len({case.same() for case in found}) == len(found)
    assert {(case.step, case.operand) for case in found} >= {("in", "Q"), ("load", "V"), ("store", "O"), ("out", "O")}
    for case in found:
        predicted = case.predicted()
        assert predicted.get("conflicts", 0) == 0 or not case.swizzled
        if case.step == "load" and not case.swizzled:
            assert predicted["conflicts"] == 7 * 4 * predicted["instructions"]


PROFILE = """\
==PROF== Connected to process 7
==PROF== Profiling "kernel_cutlass_kernel": 0%....100%
"ID","Process ID","Kernel Name","l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum","lts__t_sectors_op_read.sum"
"","","","","sector"
"0","7","kernel_cutlass_kernel_a","1,792","40"
"1","7","kernel_cutlass_kernel_b","0","n/a"
"""


def test_the_profilers_table():
    from benchmarks.layouts import parse

    conflicts = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum"
    assert parse(PROFILE) == [{conflicts: 1792.0, "lts__t_sectors_op_read.sum": 40.0}, {conflicts: 0.0}]
    assert parse("==ERROR== no permission") == []


@pytest.mark.parametrize(("off_by", "contents", "missed"), [(0, "as predicted", 0), (3, "as predicted", 1), (0, "moved", 1)])
def test_a_prediction_that_misses(capsys, off_by, contents, missed):
    from rich.console import Console

    from benchmarks.layouts import COUNTERS, cases, compare, show

    case = next(case for case in cases("sm_90a", [64]) if case.instruction == "ldmatrix" and not case.swizzled)
    predicted = case.predicted()
    names = {what: found[0] for what, found in COUNTERS["ldmatrix"].items()}
    counted = {name: float(predicted[what] + off_by * (what == "conflicts")) for what, name in names.items()}
    result = {"case": case.name, "instruction": case.instruction, "layout": str(case.layout), "contents": contents}
    assert show([result | {"compared": compare(case, counted)}], Console(width=200)) == missed
    said = capsys.readouterr().out
    assert f"{predicted['conflicts']} / {predicted['conflicts'] + off_by}" in said
    assert ("every prediction met" in said) == (not missed)
