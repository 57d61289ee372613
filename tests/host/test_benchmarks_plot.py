"""The plots: that they are there, are well-formed, and say what they show."""

from xml.etree import ElementTree

import pytest

from benchmarks.anchors import Anchors
from benchmarks.cases import GRIDS
from benchmarks.results import Cell
from tests.host import benchmarks_fakes as fakes

pytest.importorskip("matplotlib", reason="the plots need matplotlib")
from benchmarks.plot import plot

PNG = b"\x89PNG\r\n\x1a\n"
SVG = "{http://www.w3.org/2000/svg}"


def record(kind="burst"):
    cells = []
    for i, case in enumerate(GRIDS["full"].cases()):
        i %= 30
        rates = {"torch_cudnn": 500 + 5 * i, "torch_flash2": 300, "ours_tma_wgmma": 480 + 7 * i, "mine": 200}
        if case.direction == "backward":
            rates["ours_deterministic"] = 400 + 7 * i
        results = {name: fakes.measured(1e-3, float(rate)) for name, rate in rates.items()}
        cells.append(Cell(kind, case, results, fakes.measured(1e-3, 780.0)))
    return fakes.record_of(*cells)


def words(path):
    return [("".join(element.itertext())).strip() for element in ElementTree.parse(path).iter(f"{SVG}text")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    anchors = Anchors("recorded", {case: {"fa3": 600.0} for case in GRIDS["full"].cases()})
    return {path.name: path for path in plot(record(), folder, anchors)}


def test_svg_and_png_of_both_pictures_of_both_directions(drawn):
    names = [f"{what}-{direction}-burst" for what in ("rates", "ratios") for direction in ("forward", "backward")]
    assert set(drawn) == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    for name, path in drawn.items():
        if name.endswith(".png"):
            assert path.read_bytes().startswith(PNG)


def test_the_rates_name_panels_peers_lengths_and_the_ceiling(drawn):
    text = words(drawn["rates-forward-burst.svg"])
    panels = [f"d{d}, {mask}" for d in (64, 128, 256) for mask in ("full", "causal")]
    peers = ["ours_tma_wgmma", "torch_cudnn", "torch_flash2", "mine", "fa3 (recorded)", "matrix product, measured"]
    for label in (*panels, *peers, "512", "1k", "2k", "8k", "16k", "TFLOP/s", "sequence length"):
        assert label in text, label
    assert any("A Card: forward" in word for word in text)
    assert "ours_deterministic" not in text
    text = words(drawn["rates-backward-burst.svg"])
    assert "ours_deterministic" in text
    assert any("A Card: backward" in word for word in text)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_ratios_have_a_bar_per_case(drawn, direction):
    text = words(drawn[f"ratios-{direction}-burst.svg"])
    for case in GRIDS["full"].cases():
        assert case.label.split(" ", 1)[1] in text
    assert "0.80" in text  # 480 of the recorded 600
    assert {"ours at least as fast", "best peer faster"} <= set(text)


def test_nothing_is_drawn_of_a_run_without_rates(tmp_path):
    assert plot(fakes.record_of(Cell("burst", fakes.CASE)), tmp_path) == []


def test_the_same_figures_give_the_same_file(tmp_path):
    small = record()
    small.cells = small.cells[:2]
    first, second = (plot(small, tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second
