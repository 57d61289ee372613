"""The benchmarks' data: cases, counts, result files, comparison, anchors, tables, and the command line around them."""

import csv
import io
import json
import multiprocessing
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import ahead, anchors, compare, documents, report
from benchmarks.__main__ import main
from benchmarks.arguments import length
from benchmarks.cases import DIRECTIONS, GRIDS, SUITES, Case, Grid, cases_of, short, single_cases
from benchmarks.check import Judge, WrongError, make_inputs
from benchmarks.flops import bytes_moved, flops, pairs
from benchmarks.peers import REGISTRY, Peer, UnsupportedError, choose
from benchmarks.results import Cell, Measurement, Record
from benchmarks.runner import Step
from benchmarks.schedule import Schedule
from benchmarks.settings import Settings
from benchmarks.timing import scatter
from cute_attn import attention
from tests.host import benchmarks_fakes as fakes
from tests.host.processes import until

BIG = Case(batch=2, seqlen_q=8192, seqlen_k=8192, heads=16, heads_kv=16, head_dim=128, head_dim_v=128)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_default_grid():
    cases = GRIDS["full"].cases()
    assert len(cases) == len(set(cases)) == 2 * 3 * 2 * 5
    assert {case.head_dim for case in cases} == {64, 128, 256}
    assert {case.seqlen_q for case in cases} == {512, 1024, 2048, 8192, 16384}
    assert [case.direction for case in cases] == ["forward"] * 30 + ["backward"] * 30
    for case in cases:
        assert case.batch * case.seqlen_q == 16384
        assert case.heads * case.head_dim == 2048


def test_the_cases_that_are_no_grid():
    (short_one, long_one) = single_cases("memory", ("backward",))
    assert (short_one.seqlen_q, long_one.seqlen_q) == (16384, 65536)
    assert {case.direction for case in (short_one, long_one)} == {"backward"}
    assert long_one.batch == 1
    ragged = single_cases("host", ("forward",))[-1]
    assert ragged.packed
    assert [case.direction for case in single_cases("host", ("forward",))] == ["forward", "forward"]
    assert [case.direction for case in single_cases("host", ("backward",))] == [*DIRECTIONS, "forward"]
    assert [case.direction for case in single_cases("first", ("forward", "backward"))] == ["forward"]


def test_every_label_of_a_grid_is_different():
    grid = replace(GRIDS["full"], directions=("forward", "backward", "both"))
    labels = [case.label for case in grid.cases()]
    assert len(set(labels)) == len(labels)
    assert "forward d128 causal 8k" in labels


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_of_a_suite_has_a_name_of_its_own(suite):
    """And is small where there is no GPU."""
    labels = [case.label for case in cases_of(suite, ("forward", "backward"))]
    assert len(set(labels)) == len(labels)
    smaller = cases_of(suite, ("forward",), 64)
    assert len(smaller) * 2 == len(labels)
    assert max(case.batch * case.seqlen_q for case in smaller) <= 1024


def test_packed_sequences():
    case = replace(BIG, batch=1, seqlen_q=7, seqlen_k=7, heads_kv=16, causal=True, packed=(2, 4, 1))
    assert case.label == "forward d128 causal 3×1…4 packed"
    assert pairs(case) == (4 + 16 + 1) / 2
    assert bytes_moved(case) == bytes_moved(replace(case, packed=()))
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
    lengths = next(case for case in cases_of("ragged", ("forward",)) if "64×" in case.label).packed
    assert abs(sum(lengths) / 64 - 1024) < 1


@pytest.mark.parametrize("window", [None, (3, 1)])
def test_packed_sequences_are_checked_as_each_alone(window):
    """By the judge, for which ours passes and attention of all rows to all rows doesn't."""
    lengths = {"seqlen_q": 97, "seqlen_k": 97, "packed": (30, 1, 66)}
    case = replace(BIG, batch=1, heads=4, heads_kv=2, window=window, dtype="float32", **lengths)
    for direction in ("forward", "backward"):
        one = replace(case, direction=direction)
        inputs = make_inputs(one, "cpu", 0)
        judge = Judge(one, inputs)
        step = Step(one, REGISTRY["ours_reference"], inputs)
        assert judge.verdict(step.outputs(step.call())) < 1e-5
        step = Step(replace(one, packed=()), REGISTRY["ours_reference"], inputs)
        with pytest.raises(WrongError, match="is off by"):
            judge.verdict(step.outputs(step.call()))


def test_packed_sequences_of_one_length_as_a_rectangle(monkeypatch):
    """The same outputs and gradients; other lengths have no rectangle."""
    monkeypatch.setattr("benchmarks.peers._ours", lambda case, q, k, v, **how: lambda: attention(q, k, v, causal=case.causal))
    lengths = {"seqlen_q": 60, "seqlen_k": 60, "packed": (20, 20, 20)}
    case = replace(BIG, batch=1, heads=2, heads_kv=2, causal=True, dtype="float32", **lengths)
    for direction in ("forward", "backward"):
        one = replace(case, direction=direction)
        inputs = make_inputs(one, "cpu", 0)
        step = Step(one, REGISTRY["ours_rectangle"], inputs)
        assert Judge(one, inputs).verdict(step.outputs(step.call())) < 1e-5
    q = make_inputs(case, "cpu", 0).q
    for packed in ((), (20, 40)):
        with pytest.raises(UnsupportedError, match="of one length"):
            REGISTRY["ours_rectangle"].build(replace(case, packed=packed), q, q, q)


PADDED = replace(BIG, seqlen_q=60, seqlen_k=60, heads=4, heads_kv=2, causal=True, dtype="float32", used=23)


def test_padded_rectangles():
    """Only the rows in use count."""
    assert replace(PADDED, seqlen_q=2048, seqlen_k=2048, used=1024, dtype="bfloat16").label == (
        "forward d128 causal 2×1k/2k padded gqa2"
    )
    for direction in DIRECTIONS:
        case = replace(PADDED, direction=direction)
        alone = replace(case, seqlen_q=23, seqlen_k=23, used=0)
        assert (case.in_use, alone.in_use) == (alone, alone)
        assert (flops(case), bytes_moved(case)) == (flops(alone), bytes_moved(alone))
    assert Case.from_dict(json.loads(json.dumps(PADDED.to_dict()))) == PADDED
    of_old_file = {name: value for name, value in BIG.to_dict().items() if name != "used"}
    assert Case.from_dict(of_old_file) == BIG
    found = [case for case in cases_of("ragged", ("forward",)) if case.form == "padded"]
    assert [(x.batch, x.seqlen_q, x.used, x.causal) for x in found] == [(16, 2048, 1024, True), (16, 2048, 1024, False)]
    assert [(x.seqlen_q, x.used) for x in cases_of("ragged", ("forward",), 64) if x.form == "padded"] == [(32, 16)] * 2


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["ours_reference", "ours_rectangle"])
def test_padded_sequences_are_checked_as_their_rows_in_use(name, direction, monkeypatch):
    """With all rows, or with the rows in use alone; attention that minds the other rows is found out."""
    if name == "ours_rectangle":
        monkeypatch.setattr("benchmarks.peers._ours", lambda case, *qkv, **how: lambda: attention(*qkv, causal=case.causal))
    case = replace(PADDED, direction=direction)
    inputs = make_inputs(case, "cpu", 0)
    judge, step = Judge(case, inputs), Step(case, REGISTRY[name], inputs)
    outputs = step.outputs(step.call())
    assert judge.verdict(outputs, step.unpadded) < 1e-5
    assert {x.shape[1] for x in outputs.values()} == {60 if name == "ours_reference" else 23}
    with pytest.raises(WrongError, match=r"has shape .* is needed"):
        judge.verdict(outputs, not step.unpadded)
    assert not any(x[:, step.zeros_from :].any() for x in outputs.values())
    for x in outputs.values():
        x[:, 23:] = float("nan")  # which another library may leave there
    assert judge.verdict(outputs, step.unpadded) < 1e-5
    step = Step(replace(case, used=0, causal=False), REGISTRY["ours_reference"], inputs)
    with pytest.raises(WrongError, match="is off by"):
        judge.verdict(step.outputs(step.call()))


@pytest.mark.parametrize("name", ["torch_math", "torch_flex", "torch_varlen", "flash_attn"])
def test_who_has_no_padded_rectangles(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=None))
    q = make_inputs(PADDED, "cpu", 0).q
    with pytest.raises(UnsupportedError, match=r"rectangles|packed"):
        REGISTRY[name].build(PADDED, q, q, q)


def test_padded_rectangles_by_flash_attention_4(monkeypatch):
    """Its function for varying lengths gets the rectangle, and how many rows of each are in use."""
    given = {}
    functions = {"flash_attn_func": None, "flash_attn_varlen_func": lambda q, k, v, **rules: given.update(rules) or (q, None)}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=SimpleNamespace(**functions)))
    q = make_inputs(PADDED, "cpu", 0).q
    assert REGISTRY["fa4"].build(PADDED, q, q, q)() is q
    assert {name: given[name].tolist() for name in ("seqused_q", "seqused_k")} == {"seqused_q": [23, 23], "seqused_k": [23, 23]}
    assert not any(name.startswith(("cu_", "max_")) for name in given)


def test_packed_and_padded_are_held_against_rectangles_each():
    cases = {"packed": replace(BIG, batch=1, packed=(4096, 4096)), "padded": replace(BIG, used=4096)}
    rates = {"packed": 99.0, "padded": 96.0}
    record = fakes.record_of(*(
        Cell("burst", case, {
            "ours_tma_wgmma": fakes.measured(1e-3, rates[form]), "ours_rectangle": fakes.measured(1e-3, 100.0)
        }) for form, case in cases.items()
    ))  # fmt: skip
    heading, _, *rows = documents.every_rate(record).splitlines()
    assert heading == "| case | ours_tma_wgmma | ours_rectangle | packed ÷ rectangle | padded ÷ rectangle | ours ÷ best peer |"
    assert [row.split("|")[4:6] for row in rows[:2]] == [[" 0.99 ", "  "], ["  ", " 0.96 "]]
    text = shown(record)
    assert "packed ÷ rectangle: 0.990 in the geometric mean" in text
    assert "padded ÷ rectangle: 0.960 in the geometric mean, 0.960 at the lowest (d128 full 2×4k/8k padded)" in text
    assert {change.verdict for change in compare.compare(record, record)} == {"same"}


def test_a_label_names_what_is_unusual():
    case = replace(BIG, seqlen_q=1, heads_kv=4, head_dim_v=64, window=(128, -1), softcap=30.0, dtype="float16")
    assert case.label == "forward d128/64 full 1×8k gqa4 window128:-1 softcap30 float16"


@pytest.mark.parametrize(
    ("causal", "window", "edges"),
    [
        (False, None, (None, None)),
        (True, None, (None, 0)),
        (False, (128, -1), (128, None)),
        (True, (128, 5), (128, 0)),
        (False, (-1, 3), (None, 3)),
    ],
)
def test_edges(causal, window, edges):
    assert replace(BIG, causal=causal, window=window).edges == edges


def test_lengths_read_back():
    for number in (1, 512, 1000, 1024, 16384):
        assert length(short(number)) == number


def test_a_case_survives_json():
    case = replace(BIG, window=(128, -1), softcap=1.5)
    assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"heads_kv": 3}, "16 query heads"),
        ({"dtype": "int8"}, "known: bfloat16"),
        ({"direction": "up"}, "known: forward"),
        ({"packed": (3, 4)}, "packed sequences have 7 rows in all"),
        ({"used": 8193}, "used is 8193 of 8192 queries"),
        ({"used": -1}, "used is -1"),
        ({"batch": 1, "packed": (8192,), "used": 5}, "of packed sequences"),
    ],
)
def test_an_impossible_case_says_why(change, words):
    with pytest.raises(ValueError, match=words):
        replace(BIG, **change)


def test_a_grid_keeps_tokens_and_width_where_axes_change():
    (case,) = Grid(head_dims=(96,), causal=(True,), seqlens=(4096,), directions=("forward",), gqa=3).cases()
    assert (case.batch, case.heads, case.heads_kv) == (4, 21, 7)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_forward_flops_by_hand():
    assert flops(BIG) == 4 * 2 * 16 * 8192 * 8192 * 128


def test_causal_counts_half_and_backward_two_and_a_half():
    causal = replace(BIG, causal=True)
    assert flops(causal) == flops(BIG) / 2
    assert flops(replace(BIG, direction="backward")) == 2.5 * flops(BIG)
    assert flops(replace(BIG, direction="both")) == 3.5 * flops(BIG)
    assert flops(replace(BIG, direction="recorded")) == flops(BIG)


def test_flops_by_hand_with_another_head_dim_for_v():
    case = Case(batch=1, seqlen_q=3, seqlen_k=5, heads=4, heads_kv=2, head_dim=8, head_dim_v=16)
    assert flops(case) == 4 * 15 * (2 * 8 + 2 * 16)


@pytest.mark.parametrize(
    ("sq", "sk", "causal", "window", "seen"),
    [
        (4, 4, True, None, 8),  # the field's half, not 10
        (2, 4, True, None, 3 + 4),
        (4, 2, True, None, 0 + 0 + 1 + 2),
        (4, 4, False, (1, 1), 2 + 3 + 3 + 2),
        (4, 4, True, (1, -1), 1 + 2 + 2 + 2),
        (4, 4, False, (-1, -1), 16),
        (1, 8, False, (2, 0), 3),
    ],
)
def test_pairs_by_hand(sq, sk, causal, window, seen):
    assert pairs(Case(1, sq, sk, 1, 1, 8, 8, causal=causal, window=window)) == seen


def test_bytes_by_hand():
    case = Case(batch=1, seqlen_q=3, seqlen_k=5, heads=4, heads_kv=2, head_dim=8, head_dim_v=16)
    q, k, v, o, lse = 3 * 4 * 8 * 2, 5 * 2 * 8 * 2, 5 * 2 * 16 * 2, 3 * 4 * 16 * 2, 4 * 3 * 4
    assert bytes_moved(case) == q + k + v + o
    assert bytes_moved(replace(case, direction="backward")) == 2 * (q + k + v) + 2 * o + lse
    assert bytes_moved(replace(case, direction="recorded")) == q + k + v + o + lse
    assert bytes_moved(replace(case, direction="both")) == 3 * (q + k + v) + 3 * o + 2 * lse
    assert bytes_moved(replace(case, dtype="float32")) == 2 * (q + k + v + o)


# --- peers -----------------------------------------------------------------------------------------------------------


def test_an_unknown_peer_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no peer is called nobody; known: .*torch_cudnn"):
        choose(["torch_math", "nobody"], "cpu", "burst")


def test_a_missing_library_is_named_with_the_reason():
    ghost = Peer("ghost", "", fakes.right, "no_such_package:attention")
    assert "No module named 'no_such_package'" in ghost.why_not()
    assert "ImportError" not in (REGISTRY["torch_math"].why_not() or "")


def test_quick_leaves_slow_starters_out_unless_they_are_asked_for():
    chosen, missing = choose(None, "cuda", "burst", quick=True)
    assert "torch_flex" not in [peer.name for peer in chosen]
    assert "--peers" in missing["torch_flex"]
    assert [peer.name for peer in choose(["torch_flex"], "cuda", "burst", quick=True)[0]] == ["torch_flex"]


def test_peers_take_part_where_they_belong():
    on_cpu = {peer.name for peer in choose(None, "cpu", "burst")[0]}
    assert {"torch_math", "torch_cpu"} <= on_cpu
    assert not {"torch_cudnn", "ours"} & on_cpu


# --- result files ----------------------------------------------------------------------------------------------------


def some_record(directions=("forward",)):
    cells = []
    for case in replace(GRIDS["full"], directions=directions).cases():
        results = {
            "torch_cudnn": fakes.measured(1e-3, 500.0, error=0.002, peak_bytes=2**20),
            "ours_tma_wgmma": fakes.measured(1e-3, 550.0, error=0.002, peak_bytes=0),
            "fa3": Measurement("wrong", "out is off"),
            "torch_flash2": Measurement("unsupported", "no window"),
        }
        cells.append(Cell("burst", case, results, fakes.measured(1e-3, 700.0), 4.2))
    return fakes.record_of(*cells, missing={"fa4": "not installed"}, date="today")


def test_a_record_survives_its_file(tmp_path):
    record = some_record()
    record.save(tmp_path / "deep" / "r.json")
    assert Record.load(tmp_path / "deep" / "r.json") == record
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("{", "not JSON"),
        ("\xff\xfe", "r.json is not JSON"),
        ("[]", "holds no results"),
        ('{"schema": 99}', "schema 99; 1 is needed"),
        ('{"schema": ""}', "schema ; 1 is needed"),
        ('{"schema": 1}', r"lacks some of its results \(KeyError: 'about'\)"),
        ('{"schema": 1, "about": {}, "cells": 4}', "lacks some of its results"),
    ],
)
def test_a_file_that_is_no_record_says_so(tmp_path, text, words):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=words):
        Record.load(path)


def test_csv_has_a_line_per_peer_and_cell(tmp_path):
    record = some_record()
    record.save_csv(tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == 30 * (4 + 1)
    row = next(row for row in rows if row["peer"] == "ours_tma_wgmma")
    assert float(row["tflops"]) == 550
    assert float(row["flops"]) == flops(record.cells[0].case)
    assert {row["peer"] for row in rows} == {"torch_cudnn", "ours_tma_wgmma", "fa3", "torch_flash2", "matmul"}


def test_a_case_is_memory_bound_where_bytes_take_longer():
    decode = Case(batch=64, seqlen_q=1, seqlen_k=8192, heads=16, heads_kv=16, head_dim=128, head_dim_v=128)
    ceiling = fakes.measured(1e-3, 700.0)
    assert Cell("burst", decode, {}, ceiling, 4.2).memory_bound
    assert not Cell("burst", BIG, {}, ceiling, 4.2).memory_bound
    assert not Cell("burst", decode, {}, ceiling, None).memory_bound


# --- visits ----------------------------------------------------------------------------------------------------------


def test_the_spread_of_a_few_rounds_is_half_their_range():
    assert scatter([3.0, 2.0, 2.0, 1.0]) == (2.0, 0.5)
    assert scatter([7.0]) == (7.0, 0.0)


def test_two_visits_join_into_one_figure():
    first = Measurement(
        seconds=1.0, spread=0.0, samples=[1.0, 1.0], tflops=10.0, error=0.1, peak_bytes=7, sm_mhz=1900.0
    )
    first.extra["first_call_s"] = 5.0
    later = Measurement(seconds=1.2, spread=0.0, samples=[1.2, 1.2], tflops=10 / 1.2, sm_mhz=1700.0)
    both = first.joined(later)
    assert both.samples == [1.0, 1.0, 1.2, 1.2]
    assert both.seconds == pytest.approx(1.1)
    assert both.spread == pytest.approx(0.1 / 1.1)  # the drift between the visits, which neither of them saw
    assert both.tflops == pytest.approx(10 / 1.1)
    assert (both.error, both.peak_bytes, both.sm_mhz, both.visits) == (0.1, 7, 1800.0, 2)
    assert both.extra == {"first_call_s": 5.0}
    third = both.joined(Measurement(seconds=1.0, samples=[1.0], sm_mhz=1500.0))
    assert (third.sm_mhz, third.visits) == (1700.0, 3)


def test_who_fails_in_one_visit_has_no_figure():
    good, bad = Measurement(seconds=1.0, samples=[1.0]), Measurement("wrong", "dq is off")
    assert good.joined(bad).status == "wrong"
    assert bad.joined(good) is bad


def test_a_record_joins_visits_to_the_same_cell():
    record = Record()
    record.add(Cell("burst", BIG, {"a": fakes.measured(1.0), "b": Measurement("failed", "x")}, fakes.measured(1.0)))
    record.add(Cell("host", BIG, {"a": fakes.measured(1.0)}))
    record.add(Cell("burst", BIG, {"a": fakes.measured(3.0), "b": Measurement("failed", "x")}, None, 4.0))
    burst, host = record.cells
    assert burst.results["a"].seconds == 2.0
    assert (burst.ceiling.seconds, burst.copy_tbytes_per_s) == (1.0, 4.0)
    assert host.results["a"].seconds == 1.0
    assert list(record.lost("burst", BIG)) == ["b"]
    assert record.lost("sustained", BIG) == {}


JOBS = [("burst", BIG), ("burst", replace(BIG, direction="backward")), ("sustained", BIG), ("first", BIG)]


def visits(clock, seconds_per_round, budget=None, setup=0.0, **settings):
    """A schedule's visits as (pass, kind, rounds), with work that takes its time on a fake clock."""
    schedule = Schedule(JOBS, Settings(**settings), budget, now=clock.now)
    found = []
    for number, kind, _, rounds in schedule:
        found.append((number, kind, list(rounds)))
        clock.sleep(setup * (number == 0) + seconds_per_round * len(rounds))
    return found, schedule


def test_rounds_are_spread_over_passes_through_all_cells():
    found, schedule = visits(fakes.FakeClock(), 1.0, rounds=5, passes=3)
    assert found == [
        (0, "burst", [0, 1]),
        (0, "burst", [0, 1]),
        (0, "sustained", [0]),
        (0, "first", [0]),
        (1, "burst", [2, 3]),
        (1, "burst", [2, 3]),
        (1, "sustained", [1]),
        (2, "burst", [4]),
        (2, "burst", [4]),
    ]
    assert schedule.complete
    assert len(schedule) == len(found)


def test_fewer_rounds_than_passes():
    found, schedule = visits(fakes.FakeClock(), 1.0, rounds=1, passes=3)
    kinds = ["burst", "burst", "sustained", "first"]
    assert [(number, kind) for number, kind, _ in found] == [*((0, kind) for kind in kinds), (1, "sustained")]
    assert len(schedule) == len(found)


def test_a_budget_gives_every_cell_a_figure_first_and_then_what_there_is_time_for():
    wide, schedule = visits(fakes.FakeClock(), 1.0, budget=1000.0, rounds=6, passes=3)
    assert [rounds for _, kind, rounds in wide if kind == "burst"][::2] == [[0], [1, 2, 3], [4, 5]]
    assert schedule.complete

    narrow, schedule = visits(fakes.FakeClock(), 1.0, budget=9.5, rounds=6, passes=3)
    assert [rounds for _, kind, rounds in narrow if kind == "burst"][::2] == [[0], [1], [2]]
    assert schedule.complete

    clock = fakes.FakeClock()
    spent, schedule = visits(clock, 1.0, budget=5.5, rounds=6, passes=3)
    assert [number for number, _, _ in spent] == [0, 0, 0, 0, 1, 1]
    assert schedule.complete  # every cell has a figure, some of more visits than others
    assert clock.now() <= 5.5 + 1.0  # over by the last visit at most

    cut, schedule = visits(fakes.FakeClock(), 1.0, budget=2.5, rounds=6, passes=3)
    assert len(cut) == 3
    assert not schedule.complete


def test_a_budget_counts_from_the_start_of_the_command():
    clock = fakes.FakeClock()
    clock.sleep(100.0)
    assert list(Schedule(JOBS, Settings(), 50.0, began=0.0, now=clock.now)) == []


# --- compiling ahead -------------------------------------------------------------------------------------------------


def test_each_kernel_is_compiled_once_ahead():
    cases = [*replace(GRIDS["full"], head_dims=(128,)).cases(), replace(BIG, window=(5, 5)), replace(BIG, window=(9, 5))]
    jobs = [*(("burst", case) for case in cases), ("host", fakes.CASE), ("first", replace(BIG, softcap=1.0))]
    forms = [BIG, replace(BIG, used=5), replace(BIG, used=9), replace(BIG, batch=1, packed=(8192,))]
    assert len(ahead.tasks(["ours_tma_wgmma"], [("burst", case) for case in forms])) == 3
    work = ahead.tasks(["ours_tma_wgmma", "ours_deterministic", "ours", "torch_cudnn"], jobs)
    ours = [case for name, case in work if name == "ours_tma_wgmma"]
    # Full and causal, forward and backward; any window is the same kernel; and the host's.
    assert len(ours) == 2 * 2 + 1 + 1
    assert {case.seqlen_q for case in ours if case.window is None} == {512, fakes.CASE.seqlen_q}  # the shortest
    assert [case for name, case in work if name == "ours"] == [fakes.CASE]
    assert {(name, case.direction) for name, case in work if name == "ours_deterministic"} == {
        ("ours_deterministic", "backward")
    }
    assert "torch_cudnn" not in {name for name, _ in work}
    assert len(ahead.tasks(["torch_flex"], jobs)) == len(cases) + 1


def slow_or_faulty(name, case, modules):
    if name == "dies":
        os._exit(3)
    if name == "fails":
        raise RuntimeError("no such kernel")
    if name == "hangs":
        time.sleep(600)
    return 0.5


def test_what_fails_ahead_fails_quietly(quick_processes):
    lines = []
    work = [("good", BIG), ("fails", BIG)]
    ahead.compile_ahead(work, 1, (), 60.0, lines.append, slow_or_faulty)
    assert sorted(lines) == [f"fails, {BIG.label}: no such kernel", f"good, {BIG.label}: 0.5 s"]


@pytest.mark.parametrize(("name", "words"), [("dies", "its process died"), ("hangs", "not done after 1 s")])
def test_a_process_that_is_lost_ahead_ends_the_compiling_only(quick_processes, name, words):
    lines, others = [], set(multiprocessing.active_children())
    ahead.compile_ahead([(name, BIG)], 1, (), 1.0 if name == "hangs" else 60.0, lines.append, slow_or_faulty)
    assert words in lines[-1]
    until(lambda: set(multiprocessing.active_children()) <= others)  # what hangs is ended, not waited for


def test_a_real_first_call_ahead():
    assert ahead.first_call_of("torch_math", replace(fakes.CASE, direction="backward"), ()) > 0


# --- comparison ------------------------------------------------------------------------------------------------------


def two_runs(old, new, kind="burst"):
    return [fakes.record_of(Cell(kind, BIG, {"ours": m} if m is not None else {})) for m in (old, new)]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (fakes.measured(1.00), fakes.measured(1.019), "same"),  # within 1 % + 1 %
        (fakes.measured(1.00), fakes.measured(1.03), "slower"),
        (fakes.measured(1.00), fakes.measured(0.97), "faster"),
        (fakes.measured(1.00, spread=0.2), fakes.measured(1.10), "same"),
        (fakes.measured(1.00, spread=0.0), fakes.measured(1.008, spread=0.0), "same"),  # the floor
        (fakes.measured(1.00, visits=1), fakes.measured(1.035), "same"),  # rounds of one visit know of no drift
        (fakes.measured(1.00, visits=1), fakes.measured(1.045, visits=1), "slower"),
        (fakes.measured(1.00), Measurement("wrong", "out is off"), "broken"),
        (Measurement("failed", "x"), fakes.measured(1.0), "mended"),
        (Measurement("failed", "x"), Measurement("timeout", "y"), "same"),
        (None, fakes.measured(1.0), "new"),
        (fakes.measured(1.0), None, "gone"),
    ],
)
def test_what_counts_as_a_change(old, new, verdict):
    (change,) = compare.compare(*two_runs(old, new))
    assert change.verdict == verdict


def test_a_figure_whose_rounds_happen_to_agree_is_not_held_to_them():
    def run(seconds):
        results = {f"p{i}": fakes.measured(1.0, spread=0.02) for i in range(9)}
        return fakes.record_of(Cell("burst", BIG, {**results, "ours": fakes.measured(seconds, spread=0.0)}))

    def verdict(seconds):
        changes = compare.compare(run(1.0), run(seconds))
        return next(change.verdict for change in changes if change.peer == "ours")

    assert verdict(1.035) == "same"
    assert verdict(1.045) == "slower"


def test_the_printed_spread_is_no_less_than_most_of_the_runs():
    spreads = [0.0, 0.001, 0.002, 0.003]
    record = fakes.record_of(*(
        Cell("burst", replace(BIG, batch=i + 1), {"ours": fakes.measured(1.0, spread=spread)})
        for i, spread in enumerate(spreads)
    ))
    printed = [record.printed_spread("burst", cell.results["ours"]) for cell in record.cells]
    assert printed == [0.002, 0.002, 0.002, 0.003]
    assert record.printed_spread("host", fakes.measured(1.0, spread=0.001)) == 0.001  # no other figure of that kind


def test_two_runs_agree_within_what_is_printed():
    """Rounds that happened to agree don't make a run's figures differ: the run's others tell what they scatter by."""

    def run(seconds):
        results = {f"p{i}": fakes.measured(1.0, spread=0.002) for i in range(9)}
        return fakes.record_of(Cell("burst", BIG, {**results, "ours": fakes.measured(seconds, spread=0.0)}))

    found = [compare.agreement(compare.compare(run(1.0), run(seconds))) for seconds in (1.0039, 1.0041)]
    assert [(one.figures, one.within) for one in found] == [(10, 10), (10, 9)]


@pytest.mark.parametrize(("now", "verdict"), [(100, "same"), (120, "more"), (80, "less")])
def test_memory_is_compared_in_bytes(now, verdict):
    (change,) = compare.compare(*two_runs(
        fakes.measured(1.0, peak_bytes=100), fakes.measured(5.0, peak_bytes=now), "memory"
    ))  # fmt: skip
    assert change.verdict == verdict


def test_the_agreement_of_two_runs():
    old, new = some_record(("forward", "backward")), some_record(("forward", "backward"))
    for i, cell in enumerate(new.cells):
        cell.results["ours_tma_wgmma"].seconds *= 1.015 if i else 1.1
    found = compare.agreement(compare.compare(old, new))
    assert (found.figures, found.within, found.same) == (120, 119, 119)
    assert found.largest == pytest.approx(0.1)
    assert found.ours == pytest.approx(1.015, rel=2e-3)
    assert found.others == pytest.approx(1.0)
    text = documents.agreement(old, new)
    assert "| 120 | 119 | 119 | 10.0% | +1.6% | +0.0% |" in text


def test_cells_of_different_kinds_are_not_compared():
    old, _ = two_runs(fakes.measured(1.0), None, "burst")
    _, new = two_runs(None, fakes.measured(2.0), "sustained")
    assert {change.verdict for change in compare.compare(old, new)} == {"gone", "new"}


@pytest.mark.parametrize(("seconds", "status"), [(1.0, 0), (0.9, 0), (1.1, 1)])
def test_show_compare_exits_1_where_something_got_slower(tmp_path, capsys, seconds, status):
    old, new = two_runs(fakes.measured(1.0, 100.0), fakes.measured(seconds, 100.0 / seconds))
    new.about["card"] = {"name": "Another Card", "driver": "1.2"}
    for record, name in ((old, "old.json"), (new, "new.json")):
        record.save(tmp_path / name)
    assert main(["show", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json")]) == status
    output = capsys.readouterr().out
    assert "name was A Card and is Another Card" in output
    assert ("slower, +10.0%" in output) == bool(status)


# --- anchors ---------------------------------------------------------------------------------------------------------


def anchor_file(tmp_path, **more):
    cell = {"mode": "fwd", "head_dim": 128, "heads": 16, "heads_kv": 16, "batch": 2, "seqlen": 8192, "causal": False}
    cell["tflops"] = {"torch_cudnn": 600.0, "fa3": 700.0, "fa4_cute": 650.0}
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps({"card": "A Card", "date": "long ago", "dtype": "bfloat16", "cells": [cell], **more}))
    return path


def test_anchors_are_rescaled_by_the_peers_in_both(tmp_path):
    live = {"torch_cudnn": 570.0, "fa4": 650 * 0.9025 / 0.95, "ours_tma_wgmma": 690.0}
    record = fakes.record_of(Cell("burst", BIG, {name: fakes.measured(1e-3, rate) for name, rate in live.items()}))
    found = anchors.load(anchor_file(tmp_path)).rescaled_to(record)
    assert list(found.scales) == ["forward"]
    assert found.scales["forward"] == anchors.Scale(("torch_cudnn", "fa4"), {BIG: pytest.approx(0.95)})
    assert found.rates[BIG]["fa3"] == pytest.approx(665)
    assert found.rates[BIG]["fa4"] == pytest.approx(617.5)
    assert report.ratio(record.cells[0]) == pytest.approx(690 / 617.5)
    assert report.ratio(record.cells[0], found) == pytest.approx(690 / 665)
    text = shown(record, found)
    assert "665 ±" not in text
    assert "690 ±1.0% ★" in text
    assert "recorded on A Card, long ago; forward rescaled case by case" in text
    assert "of torch_cudnn, fa4: × 0.950 to 0.950 over 1 cases" in " ".join(text.split())


def test_anchors_without_a_common_peer_say_so(tmp_path):
    loaded = anchors.load(anchor_file(tmp_path))
    found = loaded.rescaled_to(fakes.record_of())
    assert found.rates == loaded.rates
    assert "not rescaled" in found.describe()


def test_anchors_of_each_case_have_a_scale_of_their_own(tmp_path):
    cell = {"mode": "bwd", "head_dim": 128, "heads": 16, "heads_kv": 16, "batch": 2, "seqlen": 8192, "causal": False}
    cells = [{**cell, "mode": mode, "tflops": {"torch_cudnn": 500.0, "fa3": 600.0}} for mode in ("fwd", "bwd")]
    backward = replace(BIG, direction="backward")
    rates = {BIG: 450.0, backward: 600.0}
    record = fakes.record_of(
        *(Cell("burst", case, {"torch_cudnn": fakes.measured(1e-3, rate)}) for case, rate in rates.items())
    )
    found = anchors.load(anchor_file(tmp_path, cells=cells)).rescaled_to(record)
    assert found.rates[BIG]["fa3"] == pytest.approx(540)
    assert found.rates[backward]["fa3"] == pytest.approx(720)
    text = shown(record, found)
    assert "torch_cudnn: × 1.200 to 1.200 over 1 cases" in " ".join(text.split())
    assert "720" in next(line for line in text.split("backward, bursts")[1].splitlines() if "d128 full 8k" in line)


def test_a_file_that_holds_no_anchors_says_what_is_needed(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"dtype": "bfloat16", "cells": [{"mode": "fwd"}]}')
    with pytest.raises(ValueError, match="needed are dtype and cells"):
        anchors.load(path)


# --- tables ----------------------------------------------------------------------------------------------------------


def shown(record, found=None):
    console = Console(file=io.StringIO(), width=220)
    report.show(record, console, found)
    return console.file.getvalue()


def test_the_table_marks_the_best_and_gives_ratios():
    text = shown(some_record())
    row = next(line for line in text.splitlines() if "d128 causal 8k" in line)
    assert "550 ±1.0% ★" in row
    assert "500 ±1.0% ★" not in row
    assert "1.10" in row  # 550 / 500
    assert "79%" in row  # 550 / 700
    assert "wrong" in row
    assert "without fa4: not installed" in text
    assert "1.100" in next(line for line in text.splitlines() if "geometric mean" in line)
    assert "fa3 wrong: out is off" in text
    assert text.count("torch_flash2: no window") == 1  # once, not once per cell


def backward_record():
    cells = []
    for case in replace(GRIDS["full"], head_dims=(64, 128), directions=("backward",)).cases():
        rates = {"ours_tma_wgmma": 600.0, "ours_deterministic": 540.0, "torch_cudnn": 500.0, "torch_flash2": 280.0}
        rates["ours_cp_async"] = 308.0 if case.seqlen_q != 512 else 252.0
        cells.append(Cell("burst", case, {name: fakes.measured(1e-3, rate) for name, rate in rates.items()}))
    return fakes.record_of(*cells)


def test_the_backward_table_gives_each_pair_its_mean_and_its_lowest():
    text = shown(backward_record())
    assert "backward, bursts" in text
    assert "± is half the range of 1 rounds in 3 visits" in text
    assert "ours ÷ cuDNN: 1.200 in the geometric mean, 1.200 at the lowest (d64 full 512)" in text
    assert "cp_async ÷ FlashAttention-2: 1.057 in the geometric mean, 0.900 at the lowest (d64 full 512)" in text
    assert "deterministic ÷ default: 0.900 in" in text
    assert "default, cp_async" not in text  # it took no part


def test_the_figures_of_the_backward_pass():
    text = documents.every_rate(backward_record(), direction="backward")
    heading, _, first, *_, means, _, marks = text.splitlines()
    assert heading.endswith(
        "| torch_flash2 | ours ÷ cuDNN | cp_async ÷ FlashAttention-2 | deterministic ÷ default | ours ÷ best peer |"
    )
    assert first == "| d64 full 512 | **600** ±1% | 540 ±1% | 252 ±1% | 500 ±1% | 280 ±1% | 1.20 | 0.90 | 0.90 | 1.20 |"
    assert marks.startswith("± is given from 1% on; three in four figures have ±1.0% or less.")
    assert means.startswith("| geometric mean | 600 | 540 |")
    assert documents.overview(backward_record(), direction="backward").splitlines()[2].startswith("| d64 full | 600 (1.20) |")


def test_a_peer_without_a_figure_leaves_its_place_empty():
    record = backward_record()
    record.cells[0].results["torch_cudnn"] = Measurement("failed", "x")
    lines = documents.every_rate(record, direction="backward").splitlines()
    assert lines[2] == "| d64 full 512 | **600** ±1% | 540 ±1% | 252 ±1% |  | 280 ±1% |  | 0.90 | 0.90 | 2.14 |"
    assert lines[-3].split("|")[5].strip() == ""  # no mean over other rows


def test_ours_is_what_a_user_gets_by_default():
    rates = {"ours_tma_wgmma": 500.0, "ours_cp_async": 300.0, "ours_deterministic": 510.0, "torch_cudnn": 400.0}
    cell = Cell("burst", BIG, {name: fakes.measured(1e-3, rate) for name, rate in rates.items()})
    assert cell.ours == 500.0
    assert report.ratio(cell) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("schema", "shown"), [("parts 1", "parts --show"), ("masks 1", "docs, which writes"), ("context parallel 1", "docs, which")]
)
def test_a_file_of_another_kind_says_what_shows_it(schema, shown, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": schema, "figures": []}))
    with pytest.raises(ValueError, match=rf"another kind.*python -m benchmarks {shown}"):
        Record.load(path)


def test_memory_is_shown_in_mib():
    def cell(direction, **extra):
        m = fakes.measured(1e-3, peak_bytes=516 * 2**20, extra=extra)
        case = replace(BIG, batch=1, seqlen_q=65536, seqlen_k=65536, direction=direction)
        return Cell("memory", case, {"ours_tma_wgmma": m, "fa3": Measurement("failed", "no")})

    record = fakes.record_of(cell("forward"), cell("backward", kept_bytes=4 * 2**20))
    text = shown(record)
    assert "516.0 (+ 4.0)" in text
    assert "| ours_tma_wgmma | 516 | 516 (+ 4) |" in documents.memory(record)
    assert report.cell_line(record.cells[0]) == "memory: forward d128 full 64k: ours_tma_wgmma 516.0 MiB, fa3 failed"


def test_the_sustained_table_gives_utilization_at_the_clock():
    m = fakes.measured(1e-3, 671.0, sm_mhz=1470.0, watts=699.0, utilization=0.76)
    text = shown(fakes.record_of(Cell("sustained", BIG, {"fa3": m})))
    assert "76% · 1470 MHz · 699 W" in text


def test_host_and_first_tables():
    host = Cell("host", BIG, {"ours": fakes.measured(12.3e-6), "torch_cudnn": fakes.measured(50e-6)})
    extra = {"cold_s": 9.5, "warm_s": 0.8, "warm_context_s": 0.4}
    first = Cell("first", BIG, {"ours": fakes.measured(9.5, extra=extra), "fa4": Measurement("failed", "no")})
    text = shown(fakes.record_of(host, first))
    assert "12.3 ±1%★" in text
    assert "9.50 / 0.80 (0.40)" in text
    assert "failed" in text


def test_ratios_of_the_hosts_figures_are_marked():
    """And means over them; of figures that are nobody's part, not."""
    slow = fakes.measured(2e-3, 250.0, host_bound=True)
    figures = {"ours_tma_wgmma": fakes.measured(1e-3, 500.0), "torch_cudnn": fakes.measured(1.25e-3, 400.0), "fa4": slow}
    record = fakes.record_of(Cell("burst", BIG, figures))
    assert "| 250ʰ | 1.25 | 1.25 |" in documents.every_rate(record)
    figures["torch_cudnn"].host_bound = True
    lines = documents.every_rate(record).splitlines()
    assert "| 1.25ʰ | 1.25ʰ |" in lines[2]
    assert lines[3].count("1.25ʰ") == 2
    text = shown(record)
    assert "1.25ʰ" in text
    assert "1.250ʰ in the geometric mean" in text


def test_the_hosts_figure_is_the_least_of_its_rounds():
    """Their median stands beside it; a file without rounds has one figure."""
    busy = Measurement(seconds=20e-6, spread=0.25, samples=[20e-6, 14e-6, 24e-6], visits=3)
    record = fakes.record_of(Cell("host", fakes.CASE, {"ours": busy, "torch_cudnn": Measurement(seconds=15e-6, spread=0.0)}))
    assert "14.0, median 20.0 ±25%★" in shown(record)
    text = documents.host(record)
    assert "| ours | 14.0 (20.0) |" in text
    assert "| torch_cudnn | 15.0 |" in text
    quiet = replace(busy, seconds=14.1e-6, spread=0.01, samples=[14.2e-6, 14e-6, 14.1e-6])
    (change,) = compare.compare(*two_runs(busy, quiet, "host"))
    assert (change.verdict, change.change) == ("same", 0.0)
    # A round that something else disturbed hides no change of the least.
    rounds = [14e-6, 14.1e-6, 14.2e-6, 14.3e-6] * 5
    slower = [1.3 * x for x in rounds[:-1]] + [50e-6]
    for before, after, verdict in ((rounds, slower, "slower"), (slower, rounds, "faster"), (slower, slower, "same")):
        (change,) = compare.compare(*two_runs(*(replace(busy, samples=x) for x in (before, after)), "host"))
        assert change.verdict == verdict


def test_an_unfinished_run_says_so():
    record = some_record()
    record.complete = False
    assert "not completed" in shown(record)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--peers", "nobody"], "no peer is called nobody; known: ours"),
        (["attention", "--kind", "slow"], "invalid choice"),
        (["attention", "--head-dim", "0"], "--head-dim: got '0'; a whole number of at least 1"),
        (["attention", "--compare", "missing.json"], "missing.json can't be read"),
        (["attention", "--gqa", "3"], "--heads"),
        (["attention", "--suite", "models", "--seqlen", "1k"], "--suite models is given with seqlen, of the grid"),
        (["attention", "--suite", "ragged", "--quick"], "--suite ragged is given with quick"),
        (["attention", "--head-dim-v", "0"], "--head-dim-v: got '0'"),
        (["attention", "--batch", "0"], "--batch: got '0'"),
        (["attention", "--seqlen-k", "0"], "--seqlen-k: got '0'"),
        (["attention", "--budget", "-3"], "--budget: got '-3'; a finite number above 0"),
        (["attention", "--burst-ms", "0"], "--burst-ms: got '0'; a finite number above 0"),
        (["attention", "--dtype", "float64"], "invalid choice: 'float64' (choose from 'bfloat16', 'float16', 'float32')"),
        (["attention", "--window", "-7", "0"], "--window: got '-7'; a whole number of at least -1"),
        (["attention", "--softcap", "-3"], "--softcap: got '-3'; a finite number of at least 0"),
        (["attention", "--softcap", "nan"], "--softcap: got 'nan'"),
        (["attention", "--softcap", "1e300"], "softcap"),  # attention()'s own check
        (["attention", "--json", "/nowhere/r.json"], "--json: /nowhere/r.json can't be written: its folder"),
        (["attention", "--json", "/"], "--json: / can't be written: it is a folder"),
        (["attention", "--csv", "/proc/r.csv"], "--csv: /proc/r.csv can't be written"),
        (["attention", "--plot", "/proc/plots"], "--plot: "),
        (["training", "--json", "/nowhere/r.json"], "--json: /nowhere/r.json can't be written: its folder"),
        (["training", "--mechanism", "magic"], "invalid choice: 'magic' (choose from 'cp_async', 'tma_wgmma')"),
        (["parts", "--json", "/nowhere/r.json"], "--json: /nowhere/r.json can't be written: its folder"),
        (["parts", "--limit", "nan"], "--limit: got 'nan'; a finite number above 0"),
        (["parts", "--jobs", "0"], "--jobs: got '0'"),
        (["show", "missing.json"], "missing.json can't be read"),
    ],
)
def test_bad_usage_is_answered_at_once(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("benchmarks.__main__.Supervisor", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


class StartedError(Exception):
    """The measuring process would be started now."""


def started(*_):
    raise StartedError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head-dim", "100"], "head_dim is 100; a multiple of 8"),
        (["--head-dim-v", "512"], "head_dim_v is 512; a multiple of 8 up to 256"),
        (["--dtype", "float32"], "dtype is torch.float32; the GPU kernels take float16 and bfloat16"),
    ],
)
def test_what_our_kernels_do_not_take_is_refused_where_they_take_part(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("benchmarks.__main__.Supervisor", started)
    with pytest.raises(SystemExit, match="2"):
        main(["attention", *arguments])
    assert words in capsys.readouterr().err
    with pytest.raises(StartedError):
        main(["attention", "--peers", "torch_math,ours_reference", *arguments])


@pytest.mark.parametrize(("capability", "missing"), [((8, 0), "sm_80 has no tma_wgmma"), ((9, 0), None)])
def test_a_mechanism_that_a_gpu_has_not_is_unsupported(monkeypatch, capability, missing):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, device="cuda")
    for name in ("ours_tma_wgmma", "ours_deterministic"):
        with pytest.raises(UnsupportedError, match=missing) if missing else nullcontext():
            REGISTRY[name].build(BIG, q, q, q)
    assert callable(REGISTRY["ours_cp_async"].build(BIG, q, q, q))


def test_peers_names_those_that_are_missing(capsys):
    assert main(["peers"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for name in REGISTRY:
        assert name in output
