"""The benchmarks' data: cases, counts, result files, comparison, anchors, tables, and the command line around them."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import anchors, compare, report
from benchmarks.__main__ import main
from benchmarks.cases import GRIDS, Case, Grid, length, short
from benchmarks.flops import bytes_moved, flops, pairs
from benchmarks.peers import REGISTRY, Peer, choose
from benchmarks.results import Cell, Measurement, Record
from tests.host import benchmarks_fakes as fakes

BIG = Case(batch=2, seqlen_q=8192, seqlen_k=8192, heads=16, heads_kv=16, head_dim=128, head_dim_v=128)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_default_grid_is_the_forward_half_of_the_table():
    cases = GRIDS["full"].cases()
    assert len(cases) == len(set(cases)) == 3 * 2 * 5
    assert {case.head_dim for case in cases} == {64, 128, 256}
    for case in cases:
        assert case.batch * case.seqlen_q == 16384
        assert case.heads * case.head_dim == 2048
        assert case.direction == "forward"


def test_every_label_of_a_grid_is_different():
    grid = replace(GRIDS["full"], directions=("forward", "backward", "both"))
    labels = [case.label for case in grid.cases()]
    assert len(set(labels)) == len(labels)
    assert "forward d128 causal 8k" in labels


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
    ],
)
def test_an_impossible_case_says_why(change, words):
    with pytest.raises(ValueError, match=words):
        replace(BIG, **change)


def test_a_grid_keeps_tokens_and_width_where_axes_change():
    (case,) = Grid(head_dims=(96,), causal=(True,), seqlens=(4096,), gqa=3).cases()
    assert (case.batch, case.heads, case.heads_kv) == (4, 21, 7)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_forward_flops_by_hand():
    assert flops(BIG) == 4 * 2 * 16 * 8192 * 8192 * 128


def test_causal_counts_half_and_backward_two_and_a_half():
    causal = replace(BIG, causal=True)
    assert flops(causal) == flops(BIG) / 2
    assert flops(replace(BIG, direction="backward")) == 2.5 * flops(BIG)
    assert flops(replace(BIG, direction="both")) == 3.5 * flops(BIG)


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


def some_record():
    cells = []
    for case in GRIDS["full"].cases():
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
        ("[]", "holds no results"),
        ('{"schema": 99}', "schema 99; 1 is needed"),
    ],
)
def test_a_file_that_is_no_record_says_so(tmp_path, text, words):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
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


def test_anchors_are_rescaled_by_a_peer_in_both(tmp_path):
    record = fakes.record_of(
        Cell("burst", BIG, {"torch_cudnn": fakes.measured(1e-3, 570.0), "ours_tma_wgmma": fakes.measured(1e-3, 690.0)})
    )
    found = anchors.load(anchor_file(tmp_path)).rescaled_to(record)
    assert (found.scaled_by, found.common) == ("torch_cudnn", 1)
    assert found.factor == pytest.approx(0.95)
    assert found.rates[BIG]["fa3"] == pytest.approx(665)
    assert found.rates[BIG]["fa4"] == pytest.approx(617.5)
    assert report.ratio(record.cells[0]) == pytest.approx(690 / 570)
    assert report.ratio(record.cells[0], found) == pytest.approx(690 / 665)
    text = shown(record, found)
    assert "665 ±" not in text
    assert "690 ±1.0% ★" in text
    assert "recorded on A Card, long ago; rescaled × 0.950" in text
    assert "torch_cudnn over 1 cells" in text


def test_anchors_without_a_common_peer_say_so(tmp_path):
    found = anchors.load(anchor_file(tmp_path)).rescaled_to(fakes.record_of())
    assert found.factor == 1
    assert "not rescaled" in found.describe()


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
        (["attention", "--head-dim", "0"], "head_dim is 0"),
        (["attention", "--compare", "missing.json"], "missing.json can't be read"),
        (["attention", "--gqa", "3"], "--heads"),
        (["show", "missing.json"], "missing.json can't be read"),
    ],
)
def test_bad_usage_is_answered_at_once(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


def test_peers_names_those_that_are_missing(capsys):
    assert main(["peers"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for name in REGISTRY:
        assert name in output
