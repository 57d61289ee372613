"""A GPU from outside the package: registered or by an entry point, planned for and compiled; and ``layouts new``."""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cute_attn import launch, layouts
from cute_attn.compile import compile_only
from cute_attn.layouts import __main__ as cli
from cute_attn.layouts import mma_sync, sm80, sm90, sm120
from cute_attn.layouts.base import KIB, Gpu
from cute_attn.plan import _planned, check, configs, explain, plan
from cute_attn.problem import Problem
from tests.host.processes import run_quick

PROBLEM = Problem("bfloat16", 64, 64)
TARGET = "sm_120a"  # the compiler knows it, and no shipped module serves it


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it, and so are the plans made with it."""
    monkeypatch.setattr(layouts, "MODULES", list(layouts.MODULES))
    monkeypatch.setattr(layouts, "_entry_points_loaded", True)
    yield
    for cached in (_planned, launch.device_target, launch.prepared):
        cached.cache_clear()


def written(folder: Path, *options: str, target: str = TARGET, name: str = "sm_of_mine") -> Path:
    """The file that ``new`` writes."""
    path = folder / f"{name}.py"
    assert cli.main(["new", target, *options, "--output", str(path)]) == 0
    return path


def imported(path: Path, package: str = "elsewhere") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(**changes) -> ModuleType:
    """A module without a file, good but for ``changes``; ``None`` leaves a name out."""
    gpu = Gpu("sm_123", {(12, 3): "sm_123"}, 99 * KIB, 100 * KIB)
    good = {"GPU": gpu, "MECHANISMS": {"cp_async": mma_sync}, "configs": sm80.configs}
    module = ModuleType("elsewhere.sm_made")
    vars(module).update({key: value for key, value in (good | changes).items() if value is not None})
    return module


# ---- one file, in use ----------------------------------------------------------------------------------------------


def test_a_module_from_outside_is_in_use(tmp_path):
    with pytest.raises(ValueError, match="known ones are"):
        plan(PROBLEM, TARGET)
    module = imported(written(tmp_path, "--like", "sm_120", "--smem-kib", "99", "--capability", "none"))
    layouts.register(module)
    config = plan(PROBLEM, TARGET)  # the refusal above was not kept
    assert config == replace(plan(PROBLEM, "sm_120"), target=TARGET)
    assert layouts.for_target(TARGET) is module
    words = explain(PROBLEM, config)
    assert f"GPU         {TARGET}: 99 KiB" in words
    assert "sm_of_mine" in words
    assert TARGET in [config.target for config, _ in cli.configs(arch=TARGET)]


@pytest.mark.parametrize(("package", "said"), [("elsewhere.", "from elsewhere.sm_made;"), ("", "from sm_made;")])
def test_its_name_is_said(package, said):
    """A package's module or a single file."""
    module = made()
    module.__name__ = f"{package}sm_made"
    layouts.register(module)
    config = plan(PROBLEM, "sm_123")
    assert said in explain(PROBLEM, config)
    with pytest.raises(ValueError, match=f"{module.__name__}'s table"):
        check(replace(config, stages=9), module.GPU)


def test_it_compiles(tmp_path):
    pytest.importorskip("cutlass")
    layouts.register(imported(written(tmp_path, "--like", "sm_120", "--smem-kib", "99", "--capability", "none")))
    small = Problem("bfloat16", 32, 32)
    assert compile_only(small, plan(small, TARGET)) is not None


def test_a_device_is_served_once_its_module_is_there(monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "get_device_capability", lambda device: (12, 3))
    with pytest.raises(NotImplementedError, match=r"compute capability 12\.3; .*docs/new-gpu\.md"):
        launch.device_target(0)
    layouts.register(made())
    assert launch.device_target(0) == "sm_123"


def test_registering_twice_changes_nothing():
    module = made()
    layouts.register(module)
    layouts.register(module)
    assert layouts.MODULES.count(module) == 1


def test_a_target_without_a_capability():
    config = plan(PROBLEM, "sm_90")
    assert config.mechanism == "cp_async"
    assert config == replace(plan(PROBLEM, "sm_90a", "cp_async"), target="sm_90")
    assert layouts.target_of((9, 0)) == "sm_90a"


def test_where_its_tables_are():
    assert layouts.source(sm90) == "layouts/sm90.py"
    assert layouts.source(made()) == "elsewhere.sm_made"


# ---- what the registry refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"GPU": None}, "GPU is missing"),
        ({"GPU": None, "configs": None}, "GPU is missing; configs is missing"),
        ({"MECHANISMS": None}, "MECHANISMS is missing"),
        ({"GPU": {"name": "sm_123"}}, "GPU is a dict, not a Gpu"),
        ({"MECHANISMS": {}}, "MECHANISMS is not a dict"),
        ({"MECHANISMS": {"tcgen05": mma_sync}}, "mechanism 'tcgen05' has no mainloop cute_attn/mainloop/tcgen05.py"),
        ({"MECHANISMS": {"../x": mma_sync}}, "mechanism '../x' has no mainloop"),
        ({"MECHANISMS": {"cp_async": SimpleNamespace(tile_dim=len)}}, "of mechanism 'cp_async' lacks smem_parts, smem_bytes"),
        ({"BACKWARD": {"tcgen05_backward": mma_sync}}, "BACKWARD has 'tcgen05_backward', and there is no mainloop"),
        (
            {"BACKWARD": {"cp_async_backward": SimpleNamespace()}},
            "the family module of BACKWARD's 'cp_async_backward' lacks tile",
        ),
        ({"configs": 7}, "configs is not a function of (problem, mechanism, target)"),
        ({"configs": lambda problem: ()}, "configs is not a function of (problem, mechanism, target)"),
        (
            {"GPU": Gpu("sm_123", {(12, 3): "sm_123"}, 99, 98)},
            "smem_per_block is 99, not from 1 to smem_per_multiprocessor (98)",
        ),
        ({"GPU": Gpu("sm_123", {(12, 3): "hopper"}, 9, 9)}, "'hopper', which is not a target"),
        ({"GPU": Gpu("sm_123", {"12.3": "sm_123"}, 9, 9)}, "'12.3', which is not a compute capability"),  # type: ignore[dict-item]
        ({"GPU": Gpu("sm_123", {(12, 3): "sm_123", (12, 4): "sm_123"}, 9, 9)}, "GPU.targets has a target twice"),
        ({"GPU": Gpu("my GPU", {}, 9, 9)}, "GPU.targets is empty and GPU.name is 'my GPU'"),
    ],
)
def test_bad_modules(changes, said):
    before = list(layouts.MODULES)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        layouts.register(made(**changes))
    assert "elsewhere.sm_made is no GPU's layouts: " in str(caught.value)
    assert "layouts/base.py documents" in str(caught.value)
    assert before == layouts.MODULES


@pytest.mark.parametrize(
    ("targets", "name", "said"),
    [
        ({(12, 3): "sm_86"}, "sm_86", "target sm_86, which layouts/sm86.py serves"),
        ({(9, 0): "sm_123"}, "sm_123", "compute capability 9.0, which layouts/sm90.py serves"),
        ({(8, 0): "sm_80"}, "sm_80", "target sm_80 and compute capability 8.0, which layouts/sm80.py serves"),
        ({}, "sm_90", "target sm_90, which layouts/sm90_plain.py serves"),
    ],
)
def test_what_is_served_already(targets, name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        layouts.register(made(GPU=Gpu(name, targets, 99 * KIB, 100 * KIB)))
    assert layouts.for_target("sm_86").__name__.endswith("sm86")


# ---- entry points --------------------------------------------------------------------------------------------------


class Entry:
    """An entry point that gives a module, or raises."""

    def __init__(self, name, gives):
        self.name, self.value, self.gives, self.loads = name, f"elsewhere.{name}", gives, 0

    def load(self):
        self.loads += 1
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.fixture
def entries(monkeypatch):
    """Entry points yet to be loaded, as an installed package would bring them."""
    found: list[Entry] = []
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: found if group == "cute_attn.layouts" else [])
    monkeypatch.setattr(layouts, "_entry_points_loaded", False)
    return found


def test_an_entry_point_is_loaded_once_and_late(entries):
    entries.append(Entry("good", made()))
    assert entries[0].loads == 0
    assert layouts.target_of((12, 3)) == "sm_123"
    assert "sm_123" in layouts.known_targets()
    assert entries[0].loads == 1


def test_a_broken_entry_point_is_a_warning_and_stops_no_other(entries):
    entries += [
        Entry("bad", ImportError("no module named x")),
        Entry("empty", ModuleType("elsewhere.empty")),
        Entry("served", sm_80_again := made(GPU=replace(sm80.GPU))),
        Entry("good", made()),
    ]
    with pytest.warns(RuntimeWarning) as caught:
        assert layouts.for_target("sm_80") is sm80
    said = [str(warning.message) for warning in caught]
    assert len(said) == 3
    assert "entry point bad = elsewhere.bad of cute_attn.layouts is left out: ImportError: no module named x" in said[0]
    assert "entry point empty" in said[1]
    assert "GPU is missing; MECHANISMS is missing; configs is missing" in said[1]
    assert "entry point served" in said[2]
    assert sm_80_again not in layouts.MODULES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layouts.target_of((12, 3)) == "sm_123"


def test_an_entry_point_may_register_itself_and_look_things_up(entries, monkeypatch):
    module = made()

    def load():
        assert "sm_80" in layouts.known_targets()
        layouts.register(module)
        return module

    entry = Entry("busy", module)
    monkeypatch.setattr(entry, "load", load)
    entries.append(entry)
    assert layouts.for_target("sm_123") is module
    assert layouts.MODULES.count(module) == 1


# ---- new -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("like", "kib"), [("sm_80", 163), ("sm_80", 99), ("sm_86", 99), ("sm_90a", 227), ("sm_90a", 100)])
def test_what_new_writes_is_a_gpus_module(tmp_path, like, kib):
    module = imported(written(tmp_path, "--like", like, "--smem-kib", str(kib), target="sm_123"))
    assert module.__doc__
    assert layouts.check(module) == []
    assert Gpu("sm_123", {(12, 3): "sm_123"}, kib * KIB, (kib + 1) * KIB) == module.GPU
    layouts.register(module)
    for head_dim in range(8, 257, 8):
        for gradients in ("", "qkv"):
            for config in configs(Problem("float16", head_dim, head_dim, gradients=gradients), "sm_123"):  # checks that it fits
                assert config.target == "sm_123"


@pytest.mark.parametrize("like", ["sm_80", "sm_86", "sm_100", "sm_120"])
def test_new_with_the_same_memory_is_the_same_table(tmp_path, like):
    other = layouts.for_target(like)
    path = written(tmp_path, "--like", like, "--smem-kib", str(other.GPU.smem_per_block // KIB), target="sm_123")
    module = imported(path)
    assert other.TABLE == module.TABLE
    assert (other.BACKWARD_TABLE, other.ADD_WIDTH) == (module.BACKWARD_TABLE, module.ADD_WIDTH)


def test_smaller_tiles_from_another_table(tmp_path, capsys):
    """sm_80's 128×32 tiles at head dim 256 take 128 KiB; sm_86's 64×32 fit."""
    module = imported(written(tmp_path, "--like", "sm_80", "--smem-kib", "99", target="sm_123"))
    assert module.TABLE[256] == (64, 32, 2, 4, 1)
    said = capsys.readouterr().out
    assert "head dim 256: sm_80's tiles 128×32, 2 stages take 128 KiB of shared memory, 29 more than 99" in said
    assert "took tiles 64×32, 2 stages" in said


def test_smaller_tiles_of_the_backward_pass(tmp_path, capsys):
    module = imported(written(tmp_path, "--like", "sm_80", "--smem-kib", "99", target="sm_123"))
    assert module.BACKWARD_TABLE[256]["tile_n"] < sm80.BACKWARD_TABLE[256]["tile_n"]
    assert "backward, head dim 256: sm_80's tiles 64×64, 1 stage take 145 KiB of shared memory" in capsys.readouterr().out


def test_a_module_without_the_backward_pass_says_so(tmp_path):
    layouts.register(made())
    with pytest.raises(NotImplementedError, match=r"elsewhere\.sm_made has no backward pass: give it BACKWARD"):
        plan(replace(PROBLEM, gradients="qkv"), "sm_123")
    assert cli.configs("sm_123", gradients="qkv") == []
    with pytest.raises(ValueError, match="like is sm_123, which has no backward pass"):
        cli.new_module("sm_124", "sm_123", 99)


def test_fewer_blocks_before_smaller_tiles(tmp_path, capsys):
    """Two blocks of 48 KiB, each with 1 KiB for CUDA, don't fit 97 KiB."""
    module = imported(written(tmp_path, "--like", "sm_86", "--smem-kib", "96", target="sm_123"))
    assert sm120.TABLE[64] == (128, 64, 2, 4, 2)
    assert module.TABLE[64] == (128, 64, 2, 4, 1)
    assert "head dim 64: sm_86's tiles 128×64, 2 stages, 2 blocks take 97 KiB of shared memory, 1 more than 96: took " in (
        capsys.readouterr().out
    )
    check(replace(plan(Problem("bfloat16", 64, 64), "sm_86"), blocks_per_multiprocessor=1), module.GPU)


def test_new_leaves_other_mechanisms_out(tmp_path, capsys):
    module = imported(written(tmp_path, "--like", "sm_90a", "--smem-kib", "227", target="sm_123"))
    assert list(module.MECHANISMS) == ["cp_async"]
    assert "left out: sm_90a's tma_wgmma" in capsys.readouterr().out


def test_new_says_how_to_use_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "sm_123a", "--like", "sm_80", "--smem-kib", "163", "--capability", "14.2"]) == 0
    said = capsys.readouterr().out
    assert "wrote sm123a.py: serve it with cute_attn.layouts.register(sm123a), or an entry point" in said
    assert imported(tmp_path / "sm123a.py").GPU.targets == {(14, 2): "sm_123a"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sm_123", "--like", "sm_42", "--smem-kib", "99"], "like is 'sm_42'; known ones are sm_100, "),
        (["gpu", "--like", "sm_80", "--smem-kib", "99"], "target is 'gpu'; a name such as sm_120"),
        (["sm_86", "--like", "sm_80", "--smem-kib", "99"], "target sm_86 is served by layouts/sm86.py"),
        (["sm_120a", "--like", "sm_80", "--smem-kib", "99"], "compute capability 12.0 is served by layouts/sm120.py: pass"),
        (["sm_123", "--like", "sm_80", "--smem-kib", "99", "--capability", "12"], "capability is '12'; one such as 12.0"),
        (["sm_123", "--like", "sm_80", "--smem-kib", "99", "--capability", "9.0"], "9.0 is served by layouts/sm90.py"),
        (["sm_123", "--like", "sm_80", "--smem-kib", "0"], "--smem-kib: got '0'; "),
        (
            ["sm_123", "--like", "sm_80", "--smem-kib", "48"],
            "head dim 256: sm_80's tiles 128×32, 2 stages take 128 KiB of shared memory, 80 more than 48; the smallest that is "
            "known, tiles 64×32, 2 stages of sm_120, takes 96: pass --smem-kib 96 or more",
        ),
    ],
)
def test_bad_usage_of_new(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        cli.main(["new", *arguments, "--output", str(tmp_path / "x.py")])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_memory_it_asks_for_is_enough(tmp_path, capsys):
    with pytest.raises(SystemExit):
        written(tmp_path, "--like", "sm_80", "--smem-kib", "16", target="sm_123")
    (least,) = re.findall(r"pass --smem-kib (\d+) or more", capsys.readouterr().err)
    assert layouts.check(imported(written(tmp_path, "--like", "sm_80", "--smem-kib", least, target="sm_123"))) == []


def test_new_never_overwrites(tmp_path, capsys):
    path = written(tmp_path, "--like", "sm_80", "--smem-kib", "163", target="sm_123")
    path.write_text("mine")
    with pytest.raises(SystemExit):
        written(tmp_path, "--like", "sm_80", "--smem-kib", "163", target="sm_123")
    assert "is there already and stays as it is" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_new_in_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        written(tmp_path / "nowhere", "--like", "sm_80", "--smem-kib", "163", target="sm_123")
    assert "can't be written" in capsys.readouterr().err


def test_writing_a_module_needs_no_dsl(tmp_path):
    """Nor does registering it."""
    program = """
import sys
sys.modules["cutlass"] = None
from cute_attn import layouts
from cute_attn.layouts.__main__ import main
assert main(["new", "sm_123", "--like", "sm_80", "--smem-kib", "99", "--output", "sm_123.py"]) == 0
sys.path.insert(0, ".")
import sm_123
layouts.register(sm_123)
assert layouts.target_of((12, 3)) == "sm_123"
"""
    done = run_quick(program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
