"""The pictures of layouts: well-formed, every element once, nothing off the canvas, and the facts those of the layouts."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace
from itertools import pairwise, product
from xml.etree import ElementTree

import numpy as np
import pytest

from cute_attn import layouts
from cute_attn.layouts.base import Box, Config
from cute_attn.plan import plan
from cute_attn.problem import Problem

pytest.importorskip("pycute")

from cute_attn.layouts import __main__ as command
from cute_attn.layouts.tools import algebra, blocks, blocks_backward, draw, gallery, pictures

SVG = "{http://www.w3.org/2000/svg}"
KINDS = [("sm_90a", "tma_wgmma"), ("sm_80", "cp_async")]


def config(target: str, mechanism: str, head_dim: int, gradients: str = "") -> Config:
    return plan(Problem("bfloat16", head_dim, head_dim, gradients=gradients), target, mechanism)


def every_picture():
    forward = [config(*kind, head_dim) for kind, head_dim in product(KINDS, (64, 96, 128, 256))]
    backward = [config(*kind, head_dim, "qkv") for kind, head_dim in product(KINDS, (64, 128, 256))]
    for chosen in (*forward, *backward):
        for operand in pictures.operands(chosen):
            for picture in pictures.known(operand, chosen):
                mainloop = chosen.backward or chosen.mechanism
                yield pytest.param(operand, picture, chosen, id=f"{mainloop}-{chosen.tile_d}-{operand}-{picture}")


every = pytest.mark.parametrize(("operand", "picture", "chosen"), list(every_picture()))


def covered(cells) -> list[tuple[int, int]]:
    return [
        (row, column)
        for first_row, first_column, rows, columns in cells
        for row in range(first_row, first_row + rows)
        for column in range(first_column, first_column + columns)
    ]


def inside(root: ElementTree.Element) -> bool:
    """Whether all rectangles and the anchors of all texts are on the canvas."""
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    found = []
    for x in root.iter(f"{SVG}rect"):
        left, top = float(x.get("x", 0)), float(x.get("y", 0))
        found.append(0 <= left <= left + float(x.get("width", 0)) <= width)
        found.append(0 <= top <= top + float(x.get("height", 0)) <= height)
    for x in root.iter(f"{SVG}text"):
        found.append(0 <= float(x.get("x", 0)) <= width and 0 <= float(x.get("y", 0)) <= height)
    return all(found)


@every
def test_each_element_is_drawn_once(operand, picture, chosen):
    grids = pictures.figure(operand, picture, chosen)
    for grid in grids:
        found = covered((cell.row, cell.column, cell.rows, cell.columns) for cell in grid.cells)
        assert sorted(found) == list(product(range(grid.size[0]), range(grid.size[1])))
    canvas = pictures.drawn(operand, picture, chosen)
    root = ElementTree.fromstring(canvas.svg())
    drawn = [tuple(map(int, x.get("data-cells", "").split(","))) for x in root.iter(f"{SVG}rect") if x.get("data-cells")]
    assert len(drawn) == sum(len(grid.cells) for grid in grids)
    assert sorted(covered(drawn)) == sorted(x for grid in grids for x in product(range(grid.size[0]), range(grid.size[1])))
    assert len({(x.get("x"), x.get("y")) for x in root.iter(f"{SVG}rect") if x.get("data-cells")}) == len(drawn)


@every
def test_a_picture_holds_its_canvas_and_names_its_layout(operand, picture, chosen):
    canvas = pictures.drawn(operand, picture, chosen)
    root = ElementTree.fromstring(canvas.svg())
    title = root.findtext(f"{SVG}title") or ""
    written = [x.text for x in root.iter(f"{SVG}text")]
    assert inside(root)
    width, height = canvas.size()
    for label in (x for x in canvas.shapes if isinstance(x, pictures.Label)):
        left, top, right, bottom = label.box()
        assert 0 <= left < right <= width, label.text
        assert 0 <= top < bottom <= height, label.text
    for grid in pictures.figure(operand, picture, chosen):
        if picture != pictures.MEMORY or grid.notation.startswith("Sw"):
            assert grid.notation in title
        assert grid.notation in " ".join(filter(None, written))
        assert not grid.legend or grid.legend[0] in written
    if picture == pictures.MEMORY:
        assert str(layouts.family(chosen).smem(operand, chosen)) in title


@every
def test_numbers_are_those_of_the_layout(operand, picture, chosen):
    """T and V of each cell, looked up in the map the kernel's copy is made from."""
    family = layouts.family(chosen)
    if picture == pictures.MEMORY or picture.startswith(pictures.MMA):
        return
    copy = family.copies(chosen)[picture.replace("-", " "), operand]
    *_, grid = pictures.figure(operand, picture, chosen)
    if isinstance(copy, Box):
        for cell in grid.cells:
            assert int(cell.label) * pictures.CHUNK == algebra.offset(family.smem(operand, chosen), cell.row, cell.column, 0)
        return
    table = algebra.table(copy.values)
    for cell in grid.cells:
        thread, first = int(cell.label[1:]), int(cell.more[1:].replace(",", "–").split("–")[0])
        for i, j in np.ndindex(cell.rows, cell.columns):
            at = (cell.column + j, cell.row + i) if copy.transposed else (cell.row + i, cell.column + j)
            assert table[thread, first + i + j] == at[0] + copy.tile[0] * at[1]


def test_a_map_by_hand():
    """PTX's picture of the accumulator of m16n8k16: row 1 begins with thread 4; row 8 is thread 0 again, values 2, 3."""
    *_, c = pictures.figure("Q", pictures.MMA, config("sm_80", "cp_async", 128))
    cells = {(cell.row, cell.column): (cell.label, cell.more) for cell in c.cells}
    assert cells[0, 0] == ("T0", "V0,1")
    assert cells[0, 6] == ("T3", "V0,1")
    assert cells[1, 0] == ("T4", "V0,1")
    assert cells[8, 0] == ("T0", "V2,3")
    assert cells[0, 8] == ("T0", "V4,5")
    assert "Of 64 rows, 16 are shown: each 16 further are the same with thread + 32." in c.notes


def test_a_colour_of_a_block_is_an_operand_and_nothing_else():
    """What happens to one is said in stripes and greys, further apart than print or colour blindness makes them look."""
    operands = set(blocks.COLOURS.values())
    states = [background for (background, _), _ in blocks.LEGEND]
    assert all(len(set(textwrap.wrap(state[1:], 2))) == 1 for state in states)
    assert not {background for background, _ in operands} & set(states)
    solid = sorted(int(state[1:3], 16) for state in states if state != draw.STRIPED)
    assert min(b - a for a, b in pairwise(solid)) > 50
    for kind, gradients in product(KINDS, ("", "qkv")):
        root = ElementTree.fromstring(blocks.block(config(*kind, 128, gradients)).svg())
        fills = [x.get("fill") for x in root.iter(f"{SVG}rect")]
        assert "url(#stripes)" in fills
        assert [x.get("id") for x in root.iter(f"{SVG}pattern")] == ["stripes"]


@pytest.mark.parametrize("target", layouts.known_targets())
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_a_block(target, head_dim):
    for mechanism in layouts.for_target(target).MECHANISMS:
        chosen = config(target, mechanism, head_dim)
        canvas = blocks.block(chosen)
        root = ElementTree.fromstring(canvas.svg())
        assert inside(root)
        assert str(layouts.family(chosen).smem("K", chosen)) in (root.findtext(f"{SVG}title") or "")
        for label in (x for x in canvas.shapes if isinstance(x, pictures.Label)):
            left, _, right, _ = label.box()
            assert 0 <= left <= right <= canvas.size()[0], label.text
        written = "\n".join(line.plain for line in canvas.lines())
        assert f"K, slot {chosen.stages - 1}" in written
        assert f"K, slot {chosen.stages}" not in written


@pytest.mark.parametrize(("target", "mechanism"), KINDS)
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_slot_is_filled_before_it_is_read_and_read_before_it_is_refilled(target, mechanism, stages):
    chosen = replace(config(target, mechanism, 64), stages=stages)
    for operand, slot in product("KV", range(stages)):
        held, read = None, set()
        for step in (None, *range(20)):
            text, _ = blocks._held(operand, slot, step, chosen)
            tile = text.split()[-1] if text else None
            if text.startswith("copy"):
                assert held is None or held in read
                held = tile
            elif tile:
                assert tile == held
            if text.startswith("read"):
                read.add(tile)
        assert len(read) >= 4


@pytest.mark.parametrize("target", [x for x in layouts.known_targets() if hasattr(layouts.for_target(x), "BACKWARD")])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192, 256])
def test_a_block_of_the_backward_pass(target, head_dim):
    for mechanism in layouts.for_target(target).MECHANISMS:
        chosen = config(target, mechanism, head_dim, "qkv")
        for kernel in blocks.kernels(chosen):
            canvas = blocks.block(chosen, kernel)
            width, height = canvas.size()
            assert inside(ElementTree.fromstring(canvas.svg()))
            rectangles = [x for x in canvas.shapes if isinstance(x, pictures.Rect)]
            for label in (x for x in canvas.shapes if isinstance(x, pictures.Label)):
                left, top, right, bottom = label.box()
                assert 0 <= left <= right <= width, label.text
                assert 0 <= top <= bottom <= height, label.text
                *_, on = [None, *(x for x in rectangles if x.holds(label))]
                # no letter is as wide as box() says, on average, by a tenth
                assert on is None or 0.9 * (right - left) <= on.width, f"{label.text} is wider than its cell"
            written = {x.text for x in canvas.shapes if isinstance(x, pictures.Label)}
            operands = layouts.family(chosen).KERNELS[kernel] if kernel else ("K", "V", "Q", "dO", "dS", "dK", "dV", "dQ")
            assert {name.removeprefix("q") for name in operands} <= written


@pytest.mark.parametrize(
    ("stages", "before", "lingers"),
    [(2, 2, False), (2, 2, True), (3, 3, True), (2, 1, False), (3, 2, False), (1, 1, False), (1, 0, False)],
)
def test_a_slot_of_the_backward_pass_is_filled_read_and_refilled_in_this_order(stages, before, lingers):
    seen = set()
    for slot in range(stages):
        held, read = None, set()
        for step in (None, *range(20)):
            text, _ = blocks_backward.ring_held("Q", slot, step, stages, before, lingers)
            for copied, tile in _parts(text):
                if copied:
                    assert held is None or held in read
                    held = tile
                else:
                    assert tile == held
                    read |= {tile} if tile == f"Q{step}" else set()
        seen |= read
    assert seen == {f"Q{i}" for i in range(20)}


def _parts(text: str) -> list[tuple[bool, str]]:
    """What a cell says happens in its slot: whether a tile is copied, or else there or read; and which."""
    if text.startswith("copy, read "):
        return [(True, text.split()[-1]), (False, text.split()[-1])]
    return [(part.startswith("copy"), part.split()[-1]) for part in text.split(", then ") if part]


def test_the_block_says_what_the_mainloops_do():
    """Which warps copy is data of the layouts for the pictures, and of the mainloops' own."""
    pytest.importorskip("cutlass")
    from cute_attn.mainloop import tma_wgmma_backward as narrow
    from cute_attn.mainloop import wide_keys, wide_queries

    one, two = (layouts.family(config("sm_90a", "tma_wgmma", d, "qkv")).WARPS for d in (128, 256))
    assert one["K"] == one["Q"] == (narrow.COPY_K_Q_WARP,)
    assert one["V"] == one["dO"] == (narrow.COPY_V_DO_WARP,)
    assert one["dQ"] == tuple(range(narrow.ADD_DQ_WARP, narrow.ADD_DQ_WARP + narrow.Adders.WARPS))
    assert two["K"] == two["Q"] == (wide_keys.COPY_K_Q_WARP,)
    assert two["V"] == two["dO"] == (wide_keys.COPY_V_DO_WARP,)
    assert two["qK"] == two["qV"] == (wide_queries.COPY_KEYS_WARP,)
    assert two["qQ"] == two["qdO"] == (wide_queries.COPY_QUERIES_WARP,)


def test_what_passes_in_the_order_of_registers_fills_its_shared_memory():
    narrow, wide = config("sm_90a", "tma_wgmma", 128, "qkv"), config("sm_90a", "tma_wgmma", 256, "qkv")
    sums, handed_over = layouts.family(narrow).sums(narrow), layouts.family(wide).handed_over(wide)
    for layout, size in (
        (sums, layouts.family(narrow).smem_parts(narrow)["dQ"] // 4),
        (handed_over, layouts.family(wide).smem_parts_of("keys", wide)["P"] // 2),
    ):
        assert algebra.inverse(layout).size == size


def test_the_gallery_is_the_one_generated():
    files = gallery.gallery()
    folder = command.Path(__file__).parents[2] / "docs/layouts"
    assert {path.name for path in folder.iterdir()} == set(files)
    for name, text in files.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name}: run python -m cute_attn.layouts gallery"
    assert sum(len(text.encode()) for text in files.values()) < 1.5 * 2**20
    assert all(f"({name})" in files["README.md"] for name in files if name.endswith(".svg"))


def test_a_gallery_elsewhere(tmp_path):
    assert command.main(["gallery", "--output", str(tmp_path / "deep")]) == 0
    assert {path.name for path in (tmp_path / "deep").iterdir()} == set(gallery.gallery())


def test_show_writes_files(capsys, tmp_path):
    svg, png = tmp_path / "k.svg", tmp_path / "k.png"
    pytest.importorskip("matplotlib")
    assert command.main(["show", "sm_90a", "K", "--head-dim", "128", "--svg", str(svg), "--png", str(png)]) == 0
    ElementTree.parse(svg)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Sw<3,4,3> o 0 o (128,(64,2),2):(64,(1,8192),16384)" in capsys.readouterr().out
    assert command.main(["show", "sm_80", "block", "--causal", "--dtype", "float16"]) == 0
    assert "cp.async" in capsys.readouterr().out
    assert command.main(["show", "sm_80", "V", "--picture", "load", "--mechanism", "cp_async"]) == 0
    assert "T31 V6,7" in capsys.readouterr().out
    assert command.main(["show", "sm_80", "dS", "--gradients", "--picture", "load-dQ"]) == 0
    assert "for dQ = dS·K" in capsys.readouterr().out
    assert command.main(["show", "sm_90a", "dQ", "--gradients"]) == 0
    assert "A of dQ = dS·K" in capsys.readouterr().out
    assert command.main(["show", "sm_90a", "block", "--gradients"]) == 0
    assert "cp.reduce.async.bulk" in capsys.readouterr().out
    assert command.main(["show", "sm_90a", "block", "--gradients", "--head-dim", "256", "--picture", "queries"]) == 0
    assert "st.global, 16 bytes each" in capsys.readouterr().out
    one_kernel = ["--gradients", "--head-dim", "192", "--head-dim-v", "128", "--tile-m", "48"]
    assert command.main(["show", "sm_90a", "block", *one_kernel]) == 0
    said = capsys.readouterr().out
    assert "128 keys, 64 for each of 2 warpgroups; queries 48 at a time" in said
    assert "all meet; wait for dV" in said
    assert command.main(["show", "sm_90a", "K", *one_kernel]) == 0
    assert "head dim 192/128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["sm_81", "K"], "known ones are"),
        (["sm_80", "X"], "known ones are Q, K, V, O, block"),
        (["sm_80", "K", "--head-dim", "7"], "a multiple of 8 from 8 to 256 is needed"),
        (["sm_80", "K", "--dtype", "int8"], "known ones are float16, bfloat16"),
        (["sm_80", "K", "--mechanism", "tma_wgmma"], "'cp_async'"),
        (["sm_80", "K", "--picture", "out"], "of K there are memory, in, load, mma"),
        (["sm_90a", "O", "--gradients"], "known ones are K, V, Q, dO, dS, dK, dV, S, dP, dQ, block"),
        (["sm_80", "dS", "--gradients", "--picture", "load"], "memory, load-dK, load-dQ, store, mma-dK, mma-dQ"),
        (["sm_90a", "block", "--gradients", "--head-dim", "256", "--picture", "x"], "of block there are keys, queries"),
        (["sm_90a", "block", "--picture", "keys"], "there is only one"),
        (["sm_90a", "K", "--gradients", "--tile-m", "48"], "tile-m is 48; of this problem there are 64, 80"),
        (["sm_80", "K", "--svg", "/nowhere/k.svg"], "can't be written"),
    ],
)
def test_what_is_unknown_names_the_known(capsys, arguments, known):
    with pytest.raises(SystemExit) as stopped:
        command.main(["show", *arguments])
    assert stopped.value.code == 2
    assert known in capsys.readouterr().err


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.patches", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit):
        command.main(["show", "sm_80", "K", "--png", str(tmp_path / "k.png")])
    assert "pip install 'cute-attn[bench]'" in capsys.readouterr().err
