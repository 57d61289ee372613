"""The layouts that the kernels get from the DSL are those that the host proves and draws: traced here without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("pycute")
pytest.importorskip("cutlass.cute")

from cute_attn.layouts import family
from cute_attn.layouts.__main__ import configs
from cute_attn.layouts.base import OPERANDS, Layout
from cute_attn.layouts.tools import prove
from cute_attn.problem import Problem
from tests.host import machine_code

CONFIGS = [config for config, _ in configs(dtype="bfloat16")]
TARGETS = sorted({config.target for config in CONFIGS})


def test_every_layout_map_and_copy():
    """Of heads of two widths. With one width, `check` compares every config's (test_prove.py, test_check_everything).
    Equal layouts are compared once, whatever their targets; the next test asks the DSL for every index of some."""
    chosen = configs(head_dim=192, head_dim_v=128, dtype="float16")
    chosen += configs(head_dim=192, head_dim_v=40, dtype="float16", gradients="qkv")
    assert {config.target for config, _ in chosen} == set(TARGETS)
    assert prove.against_dsl([config for config, _ in chosen], limit=64) == []


@pytest.mark.parametrize("mechanism", ["tma_wgmma", "cp_async"])
def test_every_single_index_that_the_dsl_computes(mechanism):
    config = next(c for c, _ in configs("sm_90a", 64, dtype="bfloat16") if c.mechanism == mechanism)
    assert prove.against_dsl([config], limit=1 << 30) == []


@pytest.mark.parametrize("mechanism", ["tma_wgmma", "cp_async"])
def test_a_difference_is_found(monkeypatch, mechanism):
    """A description that the DSL's object was not made from: other rows, or another swizzle."""
    config = next(c for c, _ in configs("sm_90a", 128, dtype="bfloat16") if c.mechanism == mechanism)
    module = family(config)
    honest = module.smem
    monkeypatch.setattr(module, "smem", lambda operand, c: _skewed(honest(operand, c)))
    found = prove.against_dsl([config])
    assert {finding.check for finding in found} == {"DSL"}
    assert len(found) == len({honest(operand, config) for operand in OPERANDS})


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
    """One kernel of each step and instruction, compiled without a GPU, as shipped."""
    from rich.console import Console

    from benchmarks.counters import SHIPPED, Case, cases
    from benchmarks.layouts import PTX, compile_only

    found: dict[tuple, Case] = {}
    for case in cases("sm_90a", [96]):
        if case.variant == SHIPPED:
            found.setdefault((case.step, case.instruction), case)
    assert {case.instruction for case in found.values()} == set(PTX)
    assert {step for step, _ in found} >= {"in", "load", "load S", "load dV", "load dQ", "store", "out"}
    assert compile_only(list(found.values()), Console(width=200)) == 0
    assert f"{len(found)} kernels compiled for sm_90a; 0 differ" in capsys.readouterr().out


@pytest.mark.parametrize("gradients", ["", "qkv"])
def test_every_copy_of_every_shipped_config_has_a_kernel(gradients):
    """The copy's own, or one that is the same."""
    from benchmarks.counters import Case, cases
    from benchmarks.layouts import HEAD_DIMS

    found = {case.same() for case in cases("sm_90a", HEAD_DIMS)}
    chosen = [c for d in HEAD_DIMS for c, _ in configs("sm_90a", d, dtype="bfloat16", gradients=gradients)]
    every = [Case(config, operand, step) for config in chosen for step, operand in family(config).copies(config)]
    assert [case.name for case in every if case.same() not in found] == []
    mainloops = {"tma_wgmma_backward", "tma_wgmma_wide", "cp_async_backward"} if gradients else {"tma_wgmma", "cp_async"}
    assert {case.name.split()[0] for case in every} == mainloops


@machine_code.whole_tables
def test_cases_that_are_taken_to_be_the_same_have_the_same_code():
    """So what is counted of the forward pass holds of the backward pass on tma_wgmma, which has kernels of its own only for K
    of 96 columns, in rows of 32 bytes, and for query tiles of 80 rows at head dim 128."""
    from benchmarks.counters import Case, cases
    from benchmarks.layouts import HEAD_DIMS, code

    def unnamed(case: Case) -> str:
        text = code(case)
        name = re.search(r"\.entry (\w+)\(", text)[1]  # type: ignore[index]
        return text.replace(name, "kernel")

    first = {case.same(): case for case in cases("sm_90a", HEAD_DIMS)}
    assert {case.config.tile_d for case in first.values() if case.config.backward.startswith("tma_wgmma")} == {96, 128}
    compared = 0
    for config, _ in configs("sm_90a", 64, dtype="bfloat16", gradients="qkv"):
        for step, operand in family(config).copies(config):
            case = Case(config, operand, step)
            if (other := first[case.same()]) != case:
                assert unnamed(case) == unnamed(other), (case.name, other.name)
                compared += 1
    assert compared > 12


def test_cases_come_in_their_variants_and_once_each():
    from benchmarks.counters import COLUMNS, SHIPPED, UNSWIZZLED, cases

    found = cases("sm_90a", [64, 128])
    assert len({case.same() for case in found}) == len(found)
    assert {(case.step, case.operand) for case in found} >= {("in", "Q"), ("load", "V"), ("store", "O"), ("out", "O")}
    assert {(case.step, case.operand) for case in found} >= {("load S", "K"), ("load dQ", "dS"), ("store", "dS")}
    assert len({case.name for case in found}) == len(found)
    for case in found:
        predicted = case.predicted()
        assert predicted.get("conflicts", 0) == 0 or case.variant != SHIPPED
        if (case.verb == "load" and case.variant == UNSWIZZLED) or case.variant == COLUMNS:  # 8 threads, one bank
            assert predicted["conflicts"] == 7 * 4 * predicted["instructions"]
    assert {case.instruction for case in found if case.variant == COLUMNS} == {"cp.async", "ld.shared.b128, st.global.b128"}


PROFILE = """\
==PROF== Connected to process 7
==PROF== Profiling "kernel_cutlass_kernel": 0%....100%
"ID","Process ID","Kernel Name","l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum","lts__t_sectors_op_read.sum"
"","","","","sector"
"0","7","kernel_cutlass_kernel_a","1,792","40"
"1","7","kernel_cutlass_kernel_b","0","n/a"
"""


def test_the_profilers_table():
    from benchmarks.counters import parse

    conflicts = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum"
    assert parse(PROFILE) == [{conflicts: 1792.0, "lts__t_sectors_op_read.sum": 40.0}, {conflicts: 0.0}]
    assert parse("==ERROR== no permission") == []


@pytest.mark.parametrize(("off_by", "contents", "missed"), [(0, "as predicted", 0), (3, "as predicted", 1), (0, "moved", 1)])
def test_a_prediction_that_misses(capsys, off_by, contents, missed):
    from rich.console import Console

    from benchmarks.counters import COUNTERS, UNSWIZZLED, Counted, CountersRecord, cases, show

    found = cases("sm_90a", [64])
    case = next(case for case in found if case.instruction == "ldmatrix" and case.variant == UNSWIZZLED)
    predicted = case.predicted()
    names = {what: found[0] for what, found in COUNTERS["ldmatrix"].items()}
    counted = {name: float(predicted[what] + off_by * (what == "conflicts")) for what, name in names.items()}
    record = CountersRecord(kernels=[Counted(case, counted, contents)])
    assert show(record, Console(width=200)) == (not missed)
    said = capsys.readouterr().out
    assert f"{predicted['conflicts']} / {predicted['conflicts'] + off_by}" in said
    assert ("every prediction met" in said) == (not missed)
    assert (f"{missed} predictions missed" in said) == bool(missed)


def test_a_counter_that_the_profiler_lacks_is_shown_as_missing():
    from benchmarks.counters import Counted, CountersRecord, cases

    case = next(case for case in cases("sm_90a", [64]) if case.instruction == "cp.async")
    one = Counted(case, {}, "as predicted")
    assert [str(one.compared[what]) for what in ("conflicts", "accesses", "sectors")] == ["0 / ?", "128 / ?", "512 / ?"]
    assert "for 3 numbers (?) the profiler has no counter" in CountersRecord(kernels=[one]).summary


def test_the_recorded_counters_are_what_the_proofs_predict(tmp_path):
    """What Nsight Compute counted on an H200, against the predictions of today: a changed proof must still meet them."""
    from benchmarks.counters import COLUMNS, SHIPPED, UNSWIZZLED, CountersRecord
    from benchmarks.documents import RESULTS

    record = CountersRecord.load(RESULTS / "h200_layouts.json")
    assert [one.case.name for one in record.kernels if not one.met] == []
    assert "every prediction met" in record.summary
    assert "no counter" not in record.summary
    assert {one.case.variant for one in record.kernels} == {SHIPPED, UNSWIZZLED, COLUMNS}
    assert all(one.compared["conflicts"].counted for one in record.kernels if one.case.variant == COLUMNS)
    record.save(tmp_path / "again.json")
    assert CountersRecord.load(tmp_path / "again.json") == record


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "attention 1"}'])
def test_a_file_without_counters(tmp_path, text):
    from benchmarks.counters import CountersRecord

    with pytest.raises(ValueError, match=r"written by benchmarks\.layouts --json"):
        CountersRecord.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"written by benchmarks\.layouts --json"):
        CountersRecord.load(tmp_path / "other.json")
