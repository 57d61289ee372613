"""What a kernel is named after is what it was compiled from: the fingerprint, and processes that live through an upgrade."""

from __future__ import annotations

import ast
import importlib
import linecache
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cute_attn import compile, layouts, sources
from cute_attn.cache import CACHE_DIR_VARIABLE
from tests.host.compile_cache import CONFIG, PROBLEM, files
from tests.host.processes import run_quick

# ---- the fingerprint -----------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """The fingerprint as a new process would take it."""
    sources.versions.cache_clear()
    return sources.fingerprint.__wrapped__()


@pytest.fixture(autouse=True)
def versions_as_they_are():
    yield
    sources.versions.cache_clear()


PARTS = """
import sys
from cute_attn import sources
sources._parts()
print(*(m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "cute_attn"), sep="\\n")
"""


def test_kernels_are_made_of_all_that_counts_and_of_nothing_else():
    """What is imported before the first kernel is traced is what the fingerprint reads."""
    ran = run_quick(PARTS)
    assert ran.returncode == 0, ran.stderr
    apart = set(filter(sources.is_apart, sources._texts()))
    assert {path.name for path in apart} >= set().union(*sources.APART.values())
    assert {path.parent.name for path in apart} >= sources.APART_FOLDERS
    assert set(map(Path, ran.stdout.split("\n")[:-1])) == set(sources._texts()) - apart


def test_a_picture_makes_no_other_kernel(monkeypatch):
    before, texts = fingerprint(), sources._texts()
    for name, same in (("pictures.py", True), ("demo.py", True), ("tma.py", False), ("softmax.py", False)):
        (path,) = (path for path in texts if path.name == name)
        monkeypatch.setattr(sources, "_texts", lambda path=path: {**texts, path: texts[path] + b"#"})
        assert (fingerprint() == before) is same


@pytest.mark.parametrize("package", sources.VERSIONED)
def test_versions_are_in_the_fingerprint(package, monkeypatch):
    """And folders: an entry names libraries of the environment that made it, and no process may load them twice."""
    before, find = fingerprint(), metadata.distribution
    seen = {before}
    for version, folder in [("0.0.1", "/one"), ("0.0.2", "/one"), ("0.0.1", "/other")]:
        fake = SimpleNamespace(version=version, locate_file=lambda _, folder=folder: folder)
        monkeypatch.setattr(metadata, "distribution", lambda x, fake=fake: fake if x == package else find(x))
        seen.add(fingerprint())
    assert len(seen) == 4
    monkeypatch.setattr(metadata, "distribution", find)
    assert fingerprint() == before


def test_an_absent_package_is_in_the_fingerprint(monkeypatch):
    before = fingerprint()
    monkeypatch.setattr(sources, "VERSIONED", ("no-such-package", *sources.VERSIONED))
    assert fingerprint() != before


def test_python_and_the_machine_are_in_the_fingerprint(monkeypatch):
    before = fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "sys", SimpleNamespace(version_info=(3, 99, 0)))
        assert fingerprint() != before
    with monkeypatch.context() as patch:
        patch.setattr(sources.platform, "machine", lambda: "riscv64")
        assert fingerprint() != before
    with monkeypatch.context() as patch:
        patch.setattr(sources.platform, "system", lambda: "Plan 9")
        assert fingerprint() != before


def test_sources_are_in_the_fingerprint():
    """Every file of both folders: a changed byte, a new file, a renamed one. Not where the folders lie."""
    texts = sources._texts()
    before = sources._digest(sources._FOLDERS, texts)
    assert {"forward.py", "cp_async.py", "rules.py", "sm90.py", "mma_sync.py"} <= {path.name for path in texts}
    assert {Path(module.__file__ or "") for module in (compile, layouts)} <= set(texts)
    for path in texts:
        assert sources._digest(sources._FOLDERS, texts | {path: texts[path] + b"\n"}) != before, path
        renamed = {path.with_name("other.py") if other == path else other: text for other, text in texts.items()}
        assert sources._digest(sources._FOLDERS, renamed) != before, path
    assert sources._digest(sources._FOLDERS, texts | {sources._FOLDERS[0] / "new.py": b""}) != before
    elsewhere = [Path("/elsewhere", str(i)) for i in range(len(sources._FOLDERS))]
    moved = {
        there / path.relative_to(here): text
        for here, there in zip(sources._FOLDERS, elsewhere, strict=True)
        for path, text in texts.items()
        if path.is_relative_to(here)
    }
    assert sources._digest(elsewhere, moved) == before


def test_a_module_from_outside_is_named_as_it_was_when_it_was_registered(tmp_path, monkeypatch):
    """And traced from that text."""
    path = tmp_path / "sm_outside.py"
    path.write_text("GPU = 1\n")
    module = ModuleType("sm_outside")
    module.__file__ = str(path)
    monkeypatch.setattr(sources, "_outside", {})
    nothing = sources.fingerprint_of([layouts, ModuleType("without_a_file")])
    sources.note([module, layouts])
    before = sources.fingerprint_of([module])
    assert before != nothing
    path.write_text("GPU = 2\n")
    assert sources.fingerprint_of([module]) == before
    pytest.importorskip("cutlass")
    sources.hold()
    assert linecache.getlines(str(path)) == ["GPU = 1\n"]
    monkeypatch.setattr(sources, "_outside", {})
    assert sources.fingerprint_of([module]) != before


def test_registering_notes_the_sources(monkeypatch):
    noted: list = []
    monkeypatch.setattr(layouts, "MODULES", [])
    monkeypatch.setattr(sources, "note", noted.extend)
    module = layouts.sm90
    layouts.register(module)
    assert set(noted) == {module, *module.MECHANISMS.values(), *module.BACKWARD.values()}


# ---- the DSL -------------------------------------------------------------------------------------------------------


def test_the_dsl_has_the_version_that_its_package_says():
    """Else no kernel would be kept."""
    pytest.importorskip("cutlass")
    assert sources.other_compiler() is None


@pytest.fixture
def exchanged(monkeypatch):
    """Another version of the DSL is installed than this process has imported."""
    cutlass = pytest.importorskip("cutlass")
    monkeypatch.setattr(cutlass, "__version__", "0.0.1")


def test_kernels_of_another_dsl_are_not_kept(cold, exchanged):
    said = r"compiles with nvidia-cutlass-dsl 0\.0\.1, where .* restart the process"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        assert callable(compile.compiled(PROBLEM, CONFIG))
    assert len(caught) == 1
    assert not cold.folder.exists()


def test_nor_is_one_of_another_dsl_loaded(warm, exchanged):
    with pytest.warns(RuntimeWarning, match="restart the process"):
        compile.compiled(PROBLEM, CONFIG)
    assert len(warm.asked) == 1


def test_a_dsl_that_was_exchanged_before_it_was_imported(cold, monkeypatch):
    """The name was made of the one, and the kernel by the other."""
    cutlass, compiler = pytest.importorskip("cutlass"), compile.compile_only

    def compile_only(*key):
        monkeypatch.setattr(cutlass, "__version__", "0.0.1")
        return compiler(*key)

    monkeypatch.setattr(compile, "compile_only", compile_only)
    with pytest.warns(RuntimeWarning, match="restart the process"):
        compile.compiled(PROBLEM, CONFIG)
    assert files(cold.folder) == set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        cold.forget()
        compile.compiled(PROBLEM, CONFIG)


# ---- an upgrade under a running process ----------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder of packages with a copy of this one in it."""
    ignore = shutil.ignore_patterns("__pycache__", "layouts")
    folder = tmp_path / "site"
    shutil.copytree(Path(compile.__file__).parent, folder / "cute_attn", ignore=ignore)
    shutil.copytree(Path(layouts.__file__).parent, folder / "cute_attn" / "layouts", ignore=ignore)
    return folder


def ran(site: Path, program: str) -> str:
    """What a process says that has the copy, and two kernels to ask for."""
    prelude = f"""
import sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import cute_attn
site = Path({str(site)!r})
assert Path(cute_attn.__file__).is_relative_to(site)
from cute_attn import compile, sources
from cute_attn.plan import plan
from cute_attn.problem import Problem

def ask(head_dim, gradients=""):
    problem = Problem("bfloat16", head_dim, head_dim, gradients=gradients)
    config = plan(problem, "sm_80", "cp_async")
    assert callable(compile.compiled(problem, config))
    return compile.entry_name(problem, config)

def upgrade(name="mainloop/cp_async.py", text="raise RuntimeError('the new version')\\n"):
    (site / "cute_attn" / name).write_text(text)

def found(*asked):
    compiled = []
    compile.compile_only = lambda *key: compiled.append(key) or len
    compile.cache.keep = lambda folder, name, function, fingerprint: function
    ask(*asked)
    return not compiled
"""
    done = run_quick(prelude + program, folder=site, **{CACHE_DIR_VARIABLE: str(site.parent / "cache")})
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_dsl = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="the DSL is not installed")


@needs_dsl
def test_a_process_goes_on_compiling_what_it_imported(site):
    """After its first kernel it has all of it, text included; what it keeps is the old version's."""
    exchanged = "mainloop/cp_async_backward.py"  # of which the first kernel reads nothing
    program = f"print(ask(32))\nupgrade({exchanged!r})\nprint(ask(32, 'qkv'))"
    names = ran(site, program).split()
    assert {f"{name}.so" for name in names} <= files(site.parent / "cache")
    assert ran(site, "print(found(32), found(32, 'qkv'))") == "False False\n"  # the new version finds none of them
    shutil.copy(Path(compile.__file__).parent / exchanged, site / "cute_attn" / exchanged)
    assert ran(site, "print(found(32), found(32, 'qkv'))") == "True True\n"


REFUSED = """
try:
    ask(32)
except sources.Changed as error:
    assert "restart the process" in str(error)
    print(error)
"""


def test_an_upgrade_between_the_import_and_the_first_call(site):
    """Modules and text would be of different versions. Any file counts, and a new one."""
    changes = ["mainloop/cp_async.py", "api.py", "layouts/sm80.py", "mainloop/new.py"]
    said = ran(site, "".join(f"upgrade({name!r}, '# new')\n{REFUSED}" for name in changes)).splitlines()
    assert all(line.startswith("cute_attn was changed or upgraded after this process had imported it (") for line in said)
    assert [" and " in line for line in said] == [False, True, True, True]
    for line, words in zip(said, ("cp_async.py)", " and 1 more)", " and 2 more)", " and 3 more)"), strict=True):
        assert words in line
    assert not (site.parent / "cache").exists()


@needs_dsl
def test_an_upgrade_between_the_first_call_and_the_first_compilation(site):
    """What is in the cache is found still, under the old version's name, and nothing is added to it."""
    ran(site, "ask(64)")
    before = files(site.parent / "cache")
    said = ran(site, f"ask(64)\nassert 'cutlass' not in sys.modules\nupgrade('api.py', '# new')\n{REFUSED}\nask(64)")
    assert "api.py" in said
    assert files(site.parent / "cache") == before


@needs_dsl
def test_an_upgrade_while_the_mainloops_are_imported(site):
    program = f"""
import importlib
before = sources.import_module
def import_module(name):
    if name == "cute_attn.backward":
        upgrade("softmax.py", "# new")
    return before(name)
sources.import_module = import_module
{REFUSED}"""
    assert "softmax.py" in ran(site, program)
    assert files(site.parent / "cache") == set()


@needs_dsl
def test_a_module_that_is_imported_anew(site):
    program = f"import importlib\nask(64)\nimportlib.reload(sys.modules['cute_attn.mainloop.cp_async'])\n{REFUSED}"
    assert "cute_attn.mainloop.cp_async was imported anew" in ran(site, program)


def test_an_editors_files_do_not_count(site):
    (site / "cute_attn" / ".#api.py").symlink_to("someone@somewhere.123")
    assert ran(site, "print(len(sources.fingerprint()))") == "64\n"


# ---- the import ----------------------------------------------------------------------------------------------------


def test_the_import_notes_the_files_first_and_reads_none(site):
    """``sources`` comes before any module of which a kernel is made, and leaves reading to who asks for a kernel."""
    program = """
ours = [name for name in sys.modules if name.startswith("cute_attn")]
print(ours[:2], sources._texts.cache_info().currsize, "cutlass" in sys.modules)
"""
    in_order = ran(site, program)
    assert "cute_attn.sources" in in_order
    assert in_order.endswith(" 0 False\n")


@needs_dsl
def test_all_that_kernels_consist_of_is_imported_before_the_first(site):
    """Every module that imports the DSL at its top, and none comes later: neither pass imports another one."""
    program = """
parts = set(sources._parts())
from dataclasses import replace
problem = Problem("bfloat16", 32, 32)
for asked in (problem, replace(problem, gradients="qkv")):
    compile.compile_only(asked, plan(asked, "sm_80", "cp_async"))
print(*sorted(parts), *sorted({name for name in sys.modules if name.split(".")[0] == "cute_attn"} - parts and ["MORE"]))
"""
    parts = ran(site, program).split()
    assert "MORE" not in parts
    for path in (site / "cute_attn").rglob("*.py"):
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.name if isinstance(node, ast.Import) else node.module or "" for node in imports for name in node.names}
        if any(name.split(".")[0] == "cutlass" for name in names):
            assert ".".join(path.relative_to(site).with_suffix("").parts) in parts
