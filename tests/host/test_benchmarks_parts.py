"""The parts benchmark: limits against hand-worked numbers, the list of probes, kernels cross-compiled, the runner with
a fake device, the sentence, the plots."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from xml.etree import ElementTree

import pytest

from benchmarks.__main__ import main
from benchmarks.parts import catalogue, command, kernels, show
from benchmarks.parts.limits import Limits, assess
from benchmarks.parts.results import Figure, PartsRecord
from benchmarks.parts.shapes import SHAPES, Shape, key_tiles, loaded_bytes, named, output_bytes, work
from benchmarks.parts.stages import FULL, VARIANTS, Stages
from benchmarks.parts.verdict import verdict, verdicts
from benchmarks.parts.worker import Bench, DeviceLostError, Measurer, figure_of, lost_figure
from benchmarks.settings import Settings
from tests.host import machine_code, test_cross_compile
from tests.host.benchmarks_fakes import FakeClock

TARGET = "sm_90a"
HZ = 1.5e9
LIMITS = Limits(sm_count=132, tensor_flop_per_clock=132 * 4096, copy_bytes_per_s=4e12)
SETTINGS = Settings(rounds=3, burst_s=0.008, idle_s=0.02)


# ---- limits --------------------------------------------------------------------------------------------------------


def test_rates_of_a_hopper_card_at_a_clock():
    assert LIMITS.rate("tensor", 1.83e9) == pytest.approx(989e12, rel=1e-3)  # the H200's datasheet
    assert LIMITS.rate("exp", HZ) == 16 * 132 * 1.5e9
    assert LIMITS.rate("sm_in", HZ) == 128 * 132 * 1.5e9
    assert LIMITS.rate("copy", HZ) == LIMITS.rate("copy", 1e9) == 4e12


def test_the_l2_caches_rate_is_the_cards_and_needs_no_sm_clock():
    card = {"name": "NVIDIA H200", "sm_count": 132, "tensor_flop_per_clock": None}
    found = assess({"l2": 5.1136e12}, 1.0, None, Limits.of(card, None))
    assert (found.limit, found.ratio) == (pytest.approx(10.2272), pytest.approx(0.5))
    assert Limits.of(card | {"name": "another"}, None).rate("l2", HZ) is None


def test_a_128_by_128_tile_at_head_dim_64_costs_tensor_cores_and_special_functions_the_same():
    one_sm = Limits(1, 4096, None)
    tile = {"tensor": 2 * 2 * 128 * 128 * 64, "exp": 128 * 128}
    for kind, amount in tile.items():
        assert one_sm.floor({kind: amount}, 1.0) == (1024, kind)  # clocks


def test_the_floor_is_that_of_the_slowest_kind():
    seconds, kind = LIMITS.floor({"tensor": 1e12, "copy": 8e9}, HZ)  # 1.23 ms and 2 ms
    assert (seconds, kind) == (0.002, "copy")
    assert LIMITS.floor({"unheard of": 1.0}, HZ) is None


def test_rate_limit_and_ratio_are_in_the_first_kinds_unit():
    found = assess({"tensor": 1e12, "copy": 8e9}, 0.004, HZ, LIMITS)
    assert (found.unit, found.rate, found.limit, found.ratio) == ("TFLOP/s", 250.0, 500.0, 0.5)
    assert found.limit_is == "measured device copy rate"
    found = assess({"exp": 8 * 132 * HZ}, 1.0, HZ, LIMITS)
    assert (found.unit, found.rate, found.limit, found.ratio) == ("exp/clk/SM", 8.0, 16.0, 0.5)
    found = assess({"copy": 3e12}, 1.0, HZ, LIMITS)
    assert (found.unit, found.rate, found.limit, found.ratio) == ("TB/s", 3.0, 4.0, 0.75)


def test_launches_are_times_and_their_limit_a_lesser_launch():
    found = assess({"launch": 200}, 400e-6, HZ, LIMITS, beside=1e-6)
    assert (found.unit, found.rate, found.limit, found.ratio) == ("µs", pytest.approx(2.0), 1.0, pytest.approx(0.5))
    found = assess({"launch": 1}, 5e-6, None, LIMITS)
    assert (found.rate, found.limit, found.ratio) == (pytest.approx(5.0), None, None)


def test_without_a_clock_only_bytes_have_a_limit():
    assert assess({"copy": 3e12}, 1.0, None, LIMITS).ratio == 0.75
    for kind in ("tensor", "exp", "sm_in"):
        found = assess({kind: 3e12}, 1.0, None, LIMITS)
        assert (found.rate, found.limit, found.ratio) == (3.0, None, None)
    assert assess({"tensor": 1e12}, 1.0, HZ, dataclasses.replace(LIMITS, tensor_flop_per_clock=None)).limit is None


# ---- shapes: what a call amounts to --------------------------------------------------------------------------------


def test_key_tiles_of_a_full_and_a_causal_square():
    config = SHAPES["d128"].config(TARGET, "tma_wgmma")
    full, causal = SHAPES["d128"].case(1024), SHAPES["d128-causal"].case(1024)
    m, n = config.tile_m, config.tile_n
    assert key_tiles(full, config) == 16 * 16 * (1024 // m) * (1024 // n)
    by_hand = sum(math.ceil(min((i + 1) * m, 1024) / n) for i in range(1024 // m))
    assert key_tiles(causal, config) == 16 * 16 * by_hand


def test_work_of_a_call_by_kind():
    shape = SHAPES["d64"]
    case, config = shape.case(1024), shape.config(TARGET, "tma_wgmma")
    assert (case.batch, case.heads) == (16, 32)
    found = work(case, config)
    assert found["tensor"] == 4 * 16 * 32 * 1024 * 1024 * 64
    assert found["exp"] == 16 * 32 * 1024 * 1024
    assert output_bytes(case) == found["out"] == 16 * 1024 * 32 * 64 * 2
    assert found["in"] == 3 * found["out"]
    q = 16 * 32 * 1024 * 64 * 2
    assert loaded_bytes(case, config) == q + key_tiles(case, config) * config.tile_n * 2 * 64 * 2
    assert work(SHAPES["d64-causal"].case(1024), config)["exp"] == found["exp"] / 2


def test_variants_count_what_they_keep():
    whole = {"tensor": 8.0, "exp": 4.0, "sm_in": 2.0, "in": 0.75, "out": 0.25}
    assert VARIANTS[FULL].work(whole) == {"tensor": 8.0, "exp": 4.0, "sm_in": 2.0, "copy": 1.0}
    assert VARIANTS["products only"].work(whole) == {"tensor": 8.0}
    assert VARIANTS["softmax only"].work(whole) == {"exp": 4.0}
    assert VARIANTS["loads only"].work(whole) == {"sm_in": 2.0, "copy": 0.75}
    assert VARIANTS["softmax twice"].work(whole)["exp"] == 8.0
    assert "exp" not in VARIANTS["no softmax"].work(whole)


# ---- the list of probes --------------------------------------------------------------------------------------------


def probes(*names, **more):
    return catalogue.probes(TARGET, [named(name) for name in names], **more)


def test_everything_holds_every_part_config_and_mechanism_once():
    found = probes(*SHAPES)
    assert len({probe.key for probe in found}) == len(found)
    assert {probe.part for probe in found} == set(catalogue.PARTS)
    assert {probe.shape.name for probe in found if probe.part == "whole"} == set(SHAPES)
    for part in ("copies", "products", "softmax", "epilogue"):
        assert {probe.mechanism for probe in found if probe.part == part} == {"tma_wgmma", "cp_async"}
    assert {probe.kernel.how for probe in found if probe.part == "copies"} == {"tma", "cp_async", "plain"}
    jobs = catalogue.jobs(found)
    assert sorted(p.key for job in jobs for p in job) == sorted(p.key for p in found)
    assert len(jobs) == len({probe.turns for probe in found})


def test_one_config_is_measured_on_one_mechanism_and_without_the_sweep():
    found = probes("d128-causal", every=False)
    assert {probe.mechanism for probe in found} == {"tma_wgmma"}
    assert {probe.shape for probe in found} == {Shape(128, True), Shape(128, False)}
    assert [probe.what for probe in found if probe.part == "whole"] == list(VARIANTS)
    assert all(probe.kernel.problem.bounded_right for probe in found if probe.part == "whole")
    asked = probes("d128-causal", every=False, mechanism="cp_async")
    assert {probe.mechanism for probe in asked} == {"cp_async"}


def test_stages_of_copies_fit_into_shared_memory_and_the_shipped_number_is_marked():
    for mechanism in ("tma_wgmma", "cp_async"):
        for name in ("d64", "d128", "d256"):
            found = [p for p in probes(name, parts=["copies"], mechanism=mechanism) if p.size == catalogue.MEMORY]
            shipped = SHAPES[name].config(TARGET, mechanism)
            for probe in found:
                config = probe.kernel.config
                bytes_ = config.stages * config.tile_n * config.tile_d * 2 * config.blocks_per_multiprocessor
                assert bytes_ <= 228 * 1024
                assert probe.shipped == (config.stages == shipped.stages)
            assert any(probe.shipped for probe in found)


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_120"])
def test_gpus_without_tma_have_their_own_probes(target):
    found = catalogue.probes(target, list(SHAPES.values()))
    assert {probe.mechanism for probe in found} == {"cp_async"}
    assert {probe.kernel.config.target for probe in found if probe.kernel} == {target}


def test_launches_name_an_existing_limit():
    found = probes("d64", "d256", parts=["launch"])
    names = {(p.shape, p.what) for p in found}
    assert all(not p.beside or (p.shape, p.beside) in names for p in found)
    assert sum(p.kernel is None for p in found) == 2


# ---- machine code --------------------------------------------------------------------------------------------------

LISTING = """
	Function : kernel_one
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00 */
        /*0010*/                   MUFU.EX2 R2, R2 ;                     /* 0x00 */
        /*0020*/              @!P0 FADD R2, R2, R2 ;                     /* 0x00 */
        /*0030*/               @P0 BRA 0x10 ;                            /* 0x00 */
        /*0040*/                   STG.E desc[UR4][R2.64], R5 ;          /* 0x00 */
        /*0050*/               @P1 BRA 0x60 ;                            /* 0x00 */
        /*0060*/                   EXIT ;                                /* 0x00 */
        /*0070*/                   BRA 0x70;                             /* 0x00 */
"""


def test_only_what_a_backward_branch_encloses_is_in_a_loop():
    assert kernels.instructions_in_loops(LISTING) == ["MUFU.EX2", "FADD", "BRA"]


REPRESENTATIVE = {
    "TMA copies": ("copies", "tma", "d128", "tma_wgmma"),
    "cp.async copies": ("copies", "cp_async", "d64", "cp_async"),
    "plain copies": ("copies", "plain", "d256", "cp_async"),
    "WGMMA, A shared": ("products", "S shared", "d256", "tma_wgmma"),
    "WGMMA, A registers": ("products", "O registers", "d64", "tma_wgmma"),
    "mma.sync by ldmatrix": ("products", "O shared", "d128", "cp_async"),
    "mma.sync, registers": ("products", "S registers", "d128", "cp_async"),
    "softmax": ("softmax", "step", "d128", "tma_wgmma"),
    "softmax, rescale": ("softmax", "step, rescale", "d64", "cp_async"),
    "epilogue": ("epilogue", "store", "d128", "tma_wgmma"),
    "no loads": ("whole", "no loads", "d64", "tma_wgmma"),
    "softmax only, causal": ("whole", "softmax only", "d128-causal", "tma_wgmma"),
    "products only": ("whole", "products only", "d64", "cp_async"),
    "clock": ("launch", "clock", "d128", "tma_wgmma"),
    "empty": ("launch", "empty", "d128", "tma_wgmma"),
}


def kernel_of(part, how, name, mechanism):
    shape = SHAPES[name]
    return kernels.Kernel(part, how, shape.problem, shape.config(TARGET, mechanism))


@pytest.fixture(scope="module")
def dsl():
    pytest.importorskip("cutlass", reason="kernels are compiled with the DSL")
    if not kernels.can_look():
        pytest.skip("cuobjdump and nvdisasm are needed to look into the code")


@pytest.mark.parametrize("spec", REPRESENTATIVE.values(), ids=REPRESENTATIVE.keys())
def test_micro_kernels_hold_what_they_measure_in_a_loop(spec, dsl, tmp_path):
    built = kernels.compile_one(kernel_of(*spec), tmp_path)
    assert built.error is None
    assert built.missing == ()
    assert built.spills == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".o", ".json"}


COUNTED = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "MUFU", "FMNMX", "F2FP", "BAR", "SYNCS")


@pytest.mark.parametrize("mechanism", ["tma_wgmma", "cp_async"])
def test_a_kernel_with_every_stage_is_the_kernel_itself(mechanism, dsl, shared_folder, tmp_path):
    """The variants replace methods of the mainloop: with nothing left out, the machine code has to be its own."""
    import importlib

    from cute_attn import cubin, fields, forward

    shape = SHAPES["d64"]
    config = shape.config(TARGET, mechanism)
    staged = importlib.import_module(f"benchmarks.parts.whole_{mechanism}").Staged(shape.problem, config, Stages())
    function = forward.host_function(shape.problem, config, staged)
    options = f"--enable-tvm-ffi --gpu-arch={TARGET} --keep-cubin --dump-dir={tmp_path}"
    arguments = forward.stand_ins(fields.FORWARD, shape.problem, config)
    importlib.import_module("cutlass.cute").compile(function, *arguments, options=options)
    found = cubin.read(next(tmp_path.glob("*.cubin")))
    case = test_cross_compile.Case(TARGET, mechanism, 64, 64, "full")
    assert (case.problem, case.config) == (shape.problem, config)
    whole = machine_code.Shared(shared_folder, test_cross_compile.compile_kernel)[case].code  # as other tests have it
    assert {name: found.count(name) for name in COUNTED} == {name: whole.count(name) for name in COUNTED}
    assert whole.count("MUFU") > 0


def test_a_variant_leaves_its_stage_out(dsl, tmp_path):
    from cute_attn import cubin

    left_out = {"no softmax": ("MUFU", "FMNMX"), "no products": ("HGMMA",), "loads only": ("HGMMA", "FMNMX")}
    for how, names in left_out.items():
        folder = tmp_path / how.replace(" ", "-")
        folder.mkdir()
        kernel = kernel_of("whole", how, "d64", "tma_wgmma")
        kernels.compile_kernel(kernel, f"--keep-cubin --dump-dir={folder}")
        found = cubin.read(next(folder.glob("*.cubin")))
        in_loops = kernels.instructions_in_loops(cubin.listing(next(folder.glob("*.cubin"))))
        for name in names:
            if name == "MUFU":  # integer division takes a reciprocal
                assert not any(word.startswith("MUFU.EX2") for word in in_loops)
            else:
                assert found.count(name) == 0, (how, name)
        assert found.count("UTMALDG") > 0


def test_a_kernel_that_cannot_be_compiled_loses_only_itself(monkeypatch, tmp_path):
    def compile_kernel(kernel, options=""):
        if kernel.how == "O registers":
            raise RuntimeError("no such\ninstruction")
        with open(options.split("--dump-dir=")[1] + "/kernel.cubin", "w"):
            return FakeCompiled()

    monkeypatch.setattr(kernels, "compile_kernel", compile_kernel)
    monkeypatch.setattr(kernels, "look_into", lambda kernel, code: {"registers": 90, "spills": 0, "missing": ()})
    wanted = [kernel_of("products", how, "d128", "tma_wgmma") for how in ("S shared", "O registers", "S shared")]
    heard = []
    done = kernels.build(wanted, tmp_path, jobs=1, watch=lambda kernel, built: heard.append(kernel))
    assert [built.ok for built in done.values()] == [True, False]
    assert done[wanted[1]].error == "RuntimeError: no such instruction"
    assert heard == wanted[:2]
    monkeypatch.setattr(kernels, "compile_kernel", None)  # what is on disk isn't compiled again
    assert kernels.build(wanted[:1], tmp_path, jobs=1)[wanted[0]].registers == 90
    code = tmp_path / kernels.name_of(wanted[0])
    code.chmod(0o666)  # but what others could have written is, and isn't loaded
    assert "NoneType" in kernels.build(wanted[:1], tmp_path, jobs=1)[wanted[0]].error
    pytest.importorskip("cutlass")
    with pytest.raises(PermissionError, match=f"others may write to {code}"):
        kernels.load(wanted[0], tmp_path)
    code.chmod(0o644)
    for path in tmp_path.glob("*.json"):
        path.write_text("{")  # a damaged entry is none
    assert "NoneType" in kernels.build(wanted[:1], tmp_path, jobs=1)[wanted[0]].error


class FakeCompiled:
    def export_to_c(self, path, function_name):
        assert function_name == kernels.SYMBOL
        with open(path, "w") as file:
            file.write("code")


def test_kernels_have_names_of_their_own():
    found = probes(*SHAPES)
    wanted = {probe.kernel for probe in found if probe.kernel is not None}
    assert len({kernels.name_of(kernel) for kernel in wanted}) == len(wanted)


# ---- the runner, with a fake clock and a fake device ---------------------------------------------------------------


class FakeDevice:
    """Stands in for ``prepare``: every probe's call takes the seconds that are given for it."""

    sm_count = 132


@pytest.fixture
def measured(monkeypatch):
    """Measure a job with a part module whose ``prepare`` is given; returns (figures, clock)."""

    def run(job, prepare, lost=None, hz=HZ, clock=None):
        clock = clock or FakeClock()
        module = type("part", (), {"prepare": staticmethod(lambda probe, compiled, device: prepare(probe, clock))})
        monkeypatch.setattr("benchmarks.parts.worker.importlib.import_module", lambda name: module)
        bench = Bench(clock, LIMITS, FakeDevice(), SETTINGS, read_clock=lambda: hz, load=lambda kernel, folder: None)
        return bench.figures((job, None, lost or {})), clock

    return run


def working(seconds, work):
    return lambda probe, clock: (lambda: clock.work(seconds, 1e-6), work)


def test_a_job_gives_seconds_rates_and_the_clock(measured):
    job = probes("d128", parts=["softmax"], every=False)
    figures, _ = measured(job, working(0.0005, {"exp": 0.0005 * 12 * 132 * HZ}))
    for figure in figures:
        assert figure.ok
        assert figure.seconds == pytest.approx(0.0005, rel=1e-2)
        assert figure.rate == pytest.approx(12, rel=1e-2)
        assert (figure.unit, figure.limit) == ("exp/clk/SM", pytest.approx(16))
        assert figure.sm_mhz == 1500
        assert len(figure.samples) == SETTINGS.rounds


def test_who_raises_loses_its_figure_and_nobody_elses(measured):
    job = probes("d128", parts=["products"], every=False)

    def prepare(probe, clock):
        if probe.what.startswith("O"):
            raise RuntimeError("an illegal\ninstruction")
        return working(0.001, {"tensor": 1e9})(probe, clock)

    figures, _ = measured(job, prepare)
    assert [figure.status for figure in figures] == ["ok", "failed"]
    assert figures[1].reason == "RuntimeError: an illegal instruction"
    assert figures[1].rate is None


def test_who_is_lost_already_is_left_out(measured):
    job = probes("d128", parts=["products"], every=False)
    figures, _ = measured(job, working(0.001, {"tensor": 1e9}), lost={job[0].key: ("timeout", "hung")})
    assert (figures[0].status, figures[0].reason) == ("timeout", "hung")
    assert figures[1].ok


def test_a_dead_device_ends_the_process(measured):
    class Dead(FakeClock):
        def sync(self):
            raise RuntimeError("gone")

    job = probes("d128", parts=["products"], every=False)

    def prepare(probe, clock):
        raise RuntimeError("illegal address")

    with pytest.raises(DeviceLostError, match="illegal address; the device is lost") as caught:
        measured(job, prepare, clock=Dead())
    assert caught.value.peer == job[0].key


def test_launches_are_held_against_the_lesser_one(measured):
    job = probes("d128", parts=["launch"], every=False)
    seconds = {catalogue.MEMSET: 2e-6, catalogue.EMPTY: 4e-6, "host: forward kernel": 8e-6}

    def prepare(probe, clock):
        if probe.size == catalogue.HOST:
            return (lambda: clock.work(0.0, seconds[probe.what])), {"launch": 1}
        each = 1e-6 if probe.what == catalogue.ONE_WARP else 2e-6
        return (lambda: clock.work(200 * each, 1e-6)), {"launch": 200}

    figures, _ = measured(job, prepare)
    found = {figure.what: figure for figure in figures}
    assert found[catalogue.MEMSET].ratio is None
    assert found[catalogue.EMPTY].ratio == pytest.approx(0.5)
    assert found["host: forward kernel"].rate == pytest.approx(8.0)
    assert found["host: forward kernel"].limit == pytest.approx(4.0)
    blocks = found[job[-1].what]
    assert blocks.unit == "µs"
    assert (blocks.rate, blocks.ratio) == (pytest.approx(2.0, rel=0.02), pytest.approx(0.5, rel=0.02))


def dying_worker(connection, crew, settings):
    """A measuring process that dies on its first probe each time, until that is lost."""
    connection.send(("about", {}))
    while (job := connection.recv()) is not None:
        job_probes, _, lost = job
        for probe in job_probes:
            if probe.key not in lost:
                connection.send(("turn", probe.key))
                if probe.what.startswith("S"):
                    raise SystemExit(3)
        connection.send(
            ("figures", [lost_figure(p, *lost[p.key]) if p.key in lost else figure_of(p) for p in job_probes])
        )
    connection.send(("state", {}))


def test_a_probe_that_takes_the_process_down_loses_only_itself(quick_processes, tmp_path):
    job = probes("d128", parts=["products"], every=False)
    measurer = Measurer(SETTINGS, None, tmp_path, target=dying_worker)
    try:
        figures = measurer.figures(job)
    finally:
        measurer.stop()
    assert [figure.status for figure in figures] == ["failed", "ok"]
    assert "exit status 3" in figures[0].reason


# ---- what is made of the figures -----------------------------------------------------------------------------------

TIMES = {  # ms of a d128-causal call
    FULL: 1.00,
    "no loads": 0.98,
    "no products": 0.60,
    "no softmax": 0.78,
    "no epilogue": 0.99,
    "loads only": 0.30,
    "products only": 0.74,
    "softmax only": 0.55,
    "products twice": 1.75,
    "softmax twice": 1.40,
}


def canned(times=None, config="d128-causal"):
    """Figures of one configuration, as a run would give them."""
    figures = []
    for what, ms in (times or TIMES).items():
        figure = Figure("whole", config, "tma_wgmma", what, what == FULL, 8192, seconds=ms / 1e3, spread=0.004)
        figure.sm_mhz = 1500
        shape = SHAPES[config]
        figure.work = VARIANTS[what].work(work(shape.case(), shape.config(TARGET, "tma_wgmma")))
        figure.take(assess(figure.work, ms / 1e3, HZ, LIMITS))
        figures.append(figure)
    epilogue = Figure("epilogue", "d128", "tma_wgmma", "O 128×128", True, seconds=1e-4, spread=0.001, sm_mhz=1500)
    epilogue.take(assess({"copy": 3e8}, 1e-4, HZ, LIMITS))
    copies = Figure("copies", "d128", "tma_wgmma", "TMA 128×128, 3 stages", seconds=1e-3, spread=0.001, sm_mhz=1500)
    copies.take(assess({"copy": 3.5e9}, 1e-3, HZ, LIMITS))
    launch = Figure("launch", "d128", "tma_wgmma", catalogue.EMPTY, seconds=5e-6, spread=0.01)
    launch.take(assess({"launch": 1}, 5e-6, None, LIMITS, 2e-6))
    return [copies, epilogue, *figures, launch]


def test_the_sentence_names_what_saves_the_most():
    found = verdict(canned(), "d128-causal", "tma_wgmma")
    assert found.stage == "products"
    assert found.savings == pytest.approx({"products": 0.4, "softmax": 0.22, "loads": 0.02, "epilogue": 0.01})
    assert found.alone["products"] == pytest.approx(0.74)
    # 16,384 tokens · 16 heads · 128 · 2 bytes at 3 TB/s
    assert found.alone["epilogue"] == pytest.approx(67108864 / 3e12 / 1e-3)
    of_limit = 4 * 2 * 16 * 8192 * 8192 * 128 / 2 / (132 * 4096 * HZ) / 0.74e-3
    assert found.sentence == (
        "d128-causal on tma_wgmma: the products hold it back: without them a call of 1 ms would take 40% less "
        "(22% less without the softmax, 2% less without the loads, 1% less without the epilogue); "
        f"by themselves they take 74% of it, at {of_limit:.0%} of their limit."
    )


def test_the_sentence_of_a_softmax_and_of_a_kernel_without_a_weak_part():
    held = verdict(canned({**TIMES, "no softmax": 0.5}), "d128-causal", "tma_wgmma")
    assert held.stage == "softmax"
    assert "the softmax holds it back: without it a call of 1 ms would take 50% less" in held.sentence
    even = {name: 0.97 if name.startswith("no ") else ms for name, ms in TIMES.items()}
    even |= {"no products": 0.96, "no loads": 1.01}
    fair = verdict(canned(even), "d128-causal", "tma_wgmma")
    assert "no single part holds it back, the products the most" in fair.sentence
    assert "1% more without the loads" in fair.sentence


def test_no_sentence_from_missing_figures():
    figures = [figure for figure in canned() if figure.what != FULL]
    assert verdicts(figures) == []
    assert verdicts([figure for figure in canned() if figure.part != "whole"]) == []
    lost = canned()
    next(f for f in lost if f.what == "no products").lose("failed", "why")
    assert verdict(lost, "d128-causal", "tma_wgmma").stage == "softmax"


def record():
    about = {"card": {"name": "A Card"}, "date": "today", "copy_tbytes_per_s": 4.0, "versions": {"torch": "2"}}
    full = {what: 2 * ms for what, ms in TIMES.items()}
    return PartsRecord(about, canned() + canned(full, config="d128")[2:-1], complete=True)


def test_a_result_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "parts.json"
    record().save(path)
    assert PartsRecord.load(path) == record()
    path.write_text(json.dumps({"schema": 1}))
    with pytest.raises(ValueError, match="no figures of parts"):
        PartsRecord.load(path)


def test_a_result_file_is_held_against_the_limits_of_today(tmp_path):
    """What was measured is kept; what it is compared with is computed when the file is read."""
    path = tmp_path / "parts.json"
    old = record()
    old.about["card"] |= {"sm_count": 132, "tensor_flop_per_clock": 132 * 4096}
    measured = next(figure for figure in old.figures if figure.part == "copies")
    measured.work, measured.seconds, measured.sm_mhz, measured.limit = {"copy": 2e12}, 1.0, 1500.0, 1.0
    launched = next(figure for figure in old.figures if figure.part == "launch")
    old.save(path)
    found = PartsRecord.load(path)
    again = next(figure for figure in found.figures if figure.part == "copies")
    assert (again.rate, again.limit, again.ratio) == (2.0, 4.0, 0.5)
    assert next(figure for figure in found.figures if figure.part == "launch") == launched


def test_show_prints_tables_and_ends_with_the_sentences(tmp_path, capsys):
    path = tmp_path / "parts.json"
    shown = record()
    shown.figures[0].lose("failed", "it broke")
    shown.save(path)
    assert main(["parts", "--show", str(path)]) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("d128 on tma_wgmma: the products hold it back")
    assert lines[-2].startswith("d128-causal on tma_wgmma: the products hold it back")
    text = "\n".join(lines)
    assert "device copy rate: 4.00 TB/s" in text
    assert "d128 TMA 128×128, 3 stages failed: it broke" in text
    assert re.search(r"O 128×128 .* 3 TB/s ±0.1%.* 4 .* 75%", text)


def test_plots_are_drawn_with_their_limits(tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    from benchmarks.parts.plot import plot

    written = plot(record(), tmp_path)
    assert {path.name for path in written} == {
        f"parts-{part}.{suffix}"
        for part in ("copies", "epilogue", "whole-tma_wgmma", "launch")
        for suffix in ("svg", "png")
    }
    svg = next(path for path in written if path.name == "parts-whole-tma_wgmma.svg")
    words = ["".join(e.itertext()).strip() for e in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "A Card: the forward kernel with stages left out or done twice" in words
    for what in VARIANTS:
        assert words.count(what) == 2  # a panel for each configuration
    assert "limit" in words
    assert "d128-causal, tma_wgmma, 8192 keys" in words
    assert any(word.endswith("of the limit") for word in words)
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_without_a_gpu_it_lists_what_would_run_and_ends_with_2(no_gpu, capsys):
    assert main(["parts", "--config", "d128-causal"]) == command.NO_GPU == 2
    text = capsys.readouterr().out
    for what in ("products only", "TMA 128×128", catalogue.MEMSET, "no CUDA GPU was found"):
        assert what in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "d12"], "no configuration is called d12; known: d64, d64-causal, d128"),
        (["nothing"], "no part is called nothing; known: copies, products, softmax"),
        (["--mechanism", "magic"], "sm_90a has no mechanism magic; known: tma_wgmma, cp_async"),
        (["--arch", "sm_10"], "known ones are"),
        (["--rounds", "0"], "--rounds: got '0'; a whole number of at least 1"),
        (["--show", "/nowhere.json"], "can't be read"),
    ],
)
def test_bad_usage_says_what_is_known(no_gpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["parts", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_compile_only_compiles_and_says_what_is_missing(no_gpu, monkeypatch, capsys, tmp_path):
    def compile_one(kernel, folder):
        missing = ("HGMMA",) if kernel.how.startswith("O") else ()
        return kernels.Built("x.o", 1.0, registers=90, spills=0, missing=missing)

    monkeypatch.setattr(kernels, "compile_one", compile_one)
    monkeypatch.setattr(kernels, "can_look", lambda: True)
    arguments = ["parts", "products", "--config", "d128", "--compile-only", "--arch", "sm_90a", "--jobs", "1"]
    assert main([*arguments, "--cache", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "90 registers, 0 spills" in text
    assert "no loop holds HGMMA" in text
    assert "2 kernels compiled, 1 of them failed or lack what they are to measure" in text


def test_numbers_have_three_digits():
    assert [show.number(x) for x in (0.0012345, 4.289, 15.83, 667.4)] == ["0.00123", "4.29", "15.8", "667"]
    assert [show.duration(x) for x in (5.1e-6, 0.0012, None)] == ["5.1 µs", "1.2 ms", ""]
