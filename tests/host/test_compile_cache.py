"""The compile cache: what its keys depend on, that a kernel is compiled once, and that nothing wrong with the cache is
worse than a miss or a warning.

Few kernels are really compiled here. Most tests put a function of an earlier compilation in the compiler's place.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from cute_attn import compile, layouts
from cute_attn.plan import plan
from cute_attn.problem import Problem, check_call, problem_of

PROBLEM = Problem("bfloat16", 32, 32)
CONFIG = plan(PROBLEM, "sm_80", "cp_async")
NAME = compile.entry_name(PROBLEM, CONFIG)

# How a process that knows nothing of these tests asks for the kernel.
ASK = """
from cute_attn import compile
from cute_attn.plan import plan
from cute_attn.problem import Problem
problem = Problem("bfloat16", 32, 32)
config = plan(problem, "sm_80", "cp_async")
function = compile.compiled(problem, config)
assert callable(function)
"""


@pytest.fixture(scope="session")
def kernel():
    """The compiler's function, really compiled: a kernel for an A100, which needs no GPU until it is called."""
    pytest.importorskip("cutlass")
    return compile.compile_only(PROBLEM, CONFIG)


@pytest.fixture(scope="session")
def entry(kernel, tmp_path_factory) -> Path:
    """A folder with a right entry in it."""
    folder = tmp_path_factory.mktemp("entry")
    compile._store(folder, NAME, kernel)
    assert {path.name for path in folder.iterdir()} == {f"{NAME}.so", f"{NAME}.json"}
    return folder


class Cache(NamedTuple):
    """A cache of a test's own, and what was asked of the compiler."""

    folder: Path
    asked: list

    def path(self, suffix: str) -> Path:
        return self.folder / f"{NAME}{suffix}"

    def forget(self) -> None:
        """As a new process would find it: with nothing in memory."""
        compile._memory.clear()


@pytest.fixture
def cold(kernel, tmp_path, monkeypatch) -> Cache:
    """An empty cache, and a compiler that only counts."""
    cache = Cache(tmp_path / "cache", [])

    def compile_only(*key):
        cache.asked.append(key)
        return kernel

    monkeypatch.setenv(compile.CACHE_DIR_VARIABLE, str(cache.folder))
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setattr(compile, "compile_only", compile_only)
    return cache


@pytest.fixture
def warm(cold, entry) -> Cache:
    """The same with the entry in it."""
    shutil.copytree(entry, cold.folder)
    return cold


def works(function) -> bool:
    """Whether it is the kernel: called with nothing, it says what it takes."""
    with pytest.raises(TypeError, match="mQ"):
        function()
    return True


def hit(cache: Cache) -> bool:
    """Whether the kernel is found on disk, without a warning."""
    before = len(cache.asked)
    cache.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(compile.compiled(PROBLEM, CONFIG))
    return len(cache.asked) == before


def files(folder: Path) -> set[str]:
    """What lies in a cache beside the locks."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# ---- keys ----------------------------------------------------------------------------------------------------------


def changed(record, field: dataclasses.Field):
    """The record with another value in one field."""
    value = getattr(record, field.name)
    other = not value if isinstance(value, bool) else value + 8 if isinstance(value, int) else value + "x"
    return dataclasses.replace(record, **{field.name: other})


@pytest.mark.parametrize("field", dataclasses.fields(Problem), ids=lambda f: f.name)
def test_every_field_of_a_problem_is_in_the_name(field):
    assert compile.entry_name(changed(PROBLEM, field), CONFIG) != NAME


@pytest.mark.parametrize("field", dataclasses.fields(CONFIG), ids=lambda f: f.name)
def test_every_field_of_a_config_is_in_the_name(field):
    assert compile.entry_name(PROBLEM, changed(CONFIG, field)) != NAME


def test_no_two_keys_share_a_name():
    problems = [PROBLEM, *(changed(PROBLEM, field) for field in dataclasses.fields(PROBLEM))]
    configs = [CONFIG, *(changed(CONFIG, field) for field in dataclasses.fields(CONFIG))]
    names = {compile.entry_name(problem, config) for problem in problems for config in configs}
    assert len(names) == len(problems) * len(configs)
    assert all(name.replace("_", "").isalnum() for name in names)  # fit for any file system


def test_equal_keys_share_a_name():
    assert compile.entry_name(dataclasses.replace(PROBLEM), dataclasses.replace(CONFIG)) == NAME


def test_lengths_are_not_in_the_name():
    """Nor the batch, the head counts, the strides, the scale and where the band's edges lie."""
    names = set()
    for batch, seqlen_q, seqlen_k, heads, window in [(1, 1, 1, 1, (0, 0)), (7, 1023, 16384, 32, (1 << 20, 3))]:
        q = torch.empty(batch, seqlen_q, heads, 32, dtype=torch.bfloat16, device="meta")
        k = torch.empty(batch, seqlen_k, 1, 32, dtype=torch.bfloat16, device="meta")
        call = check_call(q, k, k, scale=0.1 * seqlen_q, causal=False, window=window, softcap=0.0)
        problem = problem_of(q.dtype, call, return_lse=False)
        names.add(compile.entry_name(problem, plan(problem, "sm_80")))
    assert len(names) == 1


def test_the_fingerprint_is_in_the_name(monkeypatch):
    monkeypatch.setattr(compile, "fingerprint", lambda: "another")
    assert compile.entry_name(PROBLEM, CONFIG) != NAME


def fingerprint() -> str:
    """The fingerprint as a new process would take it."""
    return compile.fingerprint.__wrapped__()


@pytest.mark.parametrize("package", compile.VERSIONED)
def test_versions_are_in_the_fingerprint(package, monkeypatch):
    """And folders: an entry names libraries of the environment that made it, and no process may load them twice."""
    before, find = fingerprint(), compile.metadata.distribution
    seen = {before}
    for version, folder in [("0.0.1", "/one"), ("0.0.2", "/one"), ("0.0.1", "/other")]:
        fake = SimpleNamespace(version=version, locate_file=lambda _, folder=folder: folder)
        monkeypatch.setattr(compile.metadata, "distribution", lambda x, fake=fake: fake if x == package else find(x))
        seen.add(fingerprint())
    assert len(seen) == 4
    monkeypatch.setattr(compile.metadata, "distribution", find)
    assert fingerprint() == before


def test_an_absent_package_is_in_the_fingerprint(monkeypatch):
    before = fingerprint()
    monkeypatch.setattr(compile, "VERSIONED", ("no-such-package", *compile.VERSIONED))
    assert fingerprint() != before


def test_python_and_the_machine_are_in_the_fingerprint(monkeypatch):
    before = fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(compile, "sys", SimpleNamespace(version_info=(3, 99, 0)))
        assert fingerprint() != before
    with monkeypatch.context() as patch:
        patch.setattr(compile.platform, "machine", lambda: "riscv64")
        assert fingerprint() != before
    with monkeypatch.context() as patch:
        patch.setattr(compile.platform, "system", lambda: "Plan 9")
        assert fingerprint() != before


def test_sources_are_in_the_fingerprint(monkeypatch, tmp_path):
    """Every file of both folders: a changed byte, a new file, a renamed one. Not where the folders lie."""
    before = fingerprint()
    package, modules = tmp_path / "cute_attn", tmp_path / "layouts"
    ignore = shutil.ignore_patterns("__pycache__", "layouts")
    shutil.copytree(Path(compile.__file__).parent, package, ignore=ignore)
    shutil.copytree(Path(layouts.__file__).parent, modules, ignore=ignore)
    monkeypatch.setattr(compile, "__file__", str(package / "compile.py"))
    monkeypatch.setattr(layouts, "__file__", str(modules / "__init__.py"))
    assert fingerprint() == before
    sources = [*package.rglob("*.py"), *modules.rglob("*.py")]
    assert {"forward.py", "cp_async.py", "rules.py", "sm90.py", "mma_sync.py"} <= {path.name for path in sources}
    for path in sources:
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert fingerprint() != before, path
        path.write_bytes(text)
    (modules / "sm999.py").touch()
    assert fingerprint() != before
    (modules / "sm999.py").unlink()
    (modules / "sm80.py").rename(modules / "sm81.py")
    assert fingerprint() != before


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv(compile.CACHE_DIR_VARIABLE, str(tmp_path))
    assert compile.cache_dir() == tmp_path
    monkeypatch.delenv(compile.CACHE_DIR_VARIABLE)
    default = compile.cache_dir()
    assert default.is_absolute()
    assert default.name == "cute_attn"
    monkeypatch.setenv(compile.CACHE_DIR_VARIABLE, "")
    assert compile.cache_dir() == default


# ---- hits ----------------------------------------------------------------------------------------------------------


def test_a_miss_is_compiled_and_kept(cold):
    assert works(compile.compiled(PROBLEM, CONFIG))
    assert cold.asked == [(PROBLEM, CONFIG)]
    assert files(cold.folder) == {f"{NAME}.so", f"{NAME}.json"}
    assert hit(cold)


def test_memory_is_asked_first(cold):
    """The same object, also when the folder is gone."""
    function = compile.compiled(PROBLEM, CONFIG)
    shutil.rmtree(cold.folder)
    assert compile.compiled(dataclasses.replace(PROBLEM), dataclasses.replace(CONFIG)) is function
    assert len(cold.asked) == 1
    assert not cold.folder.exists()


def test_another_key_is_another_kernel(cold):
    compile.compiled(PROBLEM, CONFIG)
    compile.compiled(PROBLEM, dataclasses.replace(CONFIG, tile_n=32))
    compile.compiled(dataclasses.replace(PROBLEM, softcap=True), CONFIG)
    assert len(cold.asked) == len(set(cold.asked)) == 3
    assert len(files(cold.folder)) == 6


def test_a_hit_does_not_touch_the_folder(warm):
    """So that a filled cache may be read-only."""
    before = {path.name: path.stat().st_mtime_ns for path in warm.folder.iterdir()}
    assert hit(warm)
    assert {path.name: path.stat().st_mtime_ns for path in warm.folder.iterdir()} == before
    assert warm.asked == []


def test_a_hit_in_a_new_process_is_cheap(entry):
    """It never imports the DSL, which alone takes longer than all of this may. CPU time, since other processes may be
    running."""
    program = f"import sys, time, torch\nstart = time.process_time()\n{ASK}\nprint(time.process_time() - start)\n"
    program += "assert 'cutlass' not in sys.modules, 'the DSL was imported'\n"
    environment = {**os.environ, compile.CACHE_DIR_VARIABLE: str(entry)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0


def test_a_hit_needs_no_dsl(warm, monkeypatch):
    for module in ("cutlass", "cutlass.cute", "cutlass.cute.runtime"):
        monkeypatch.setitem(sys.modules, module, None)
    assert hit(warm)


# ---- wrong entries -------------------------------------------------------------------------------------------------


def replace(path: Path, content: bytes) -> None:
    """A new file of that name. Not written in place: a library that is mapped must not change under its process."""
    path.unlink()
    path.write_bytes(content)


def amend(cache: Cache, **fields) -> None:
    record = json.loads(cache.path(".json").read_text())
    cache.path(".json").write_text(json.dumps(record | fields))


def flip_a_byte(cache: Cache) -> None:
    code = bytearray(cache.path(".so").read_bytes())
    code[len(code) // 2] ^= 1
    replace(cache.path(".so"), bytes(code))


def garbage_with_the_right_checksum(cache: Cache) -> None:
    garbage = b"not a library" * 100
    replace(cache.path(".so"), garbage)
    amend(cache, sha256=hashlib.sha256(garbage).hexdigest())


def without_a_key(cache: Cache) -> None:
    record = json.loads(cache.path(".json").read_text())
    del record["libraries"]
    cache.path(".json").write_text(json.dumps(record))


WRONG: dict[str, Callable[[Cache], object]] = {
    "no code": lambda c: c.path(".so").unlink(),
    "empty code": lambda c: replace(c.path(".so"), b""),
    "truncated code": lambda c: replace(c.path(".so"), c.path(".so").read_bytes()[:-100]),
    "a byte of the code": flip_a_byte,
    "garbage for code": garbage_with_the_right_checksum,
    "no record": lambda c: c.path(".json").unlink(),
    "empty record": lambda c: c.path(".json").write_bytes(b""),
    "truncated record": lambda c: c.path(".json").write_bytes(c.path(".json").read_bytes()[:40]),
    "a record of bytes": lambda c: c.path(".json").write_bytes(bytes(range(256))),
    "a record that is no JSON": lambda c: c.path(".json").write_text("code = 1"),
    "a record that is a list": lambda c: c.path(".json").write_text("[1, 2]"),
    "a record that is null": lambda c: c.path(".json").write_text("null"),
    "a record without a key": without_a_key,
    "a wrong checksum": lambda c: amend(c, sha256="0" * 64),
    "a checksum that is no string": lambda c: amend(c, sha256=None),
    "the name of another file": lambda c: amend(c, code="other.so"),
    "the name of no file": lambda c: amend(c, code=17),
    "a library that is gone": lambda c: amend(c, libraries=["/no/such/library.so"]),
    "libraries that are no list": lambda c: amend(c, libraries=3),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_wrong_entry_is_a_miss_and_rewritten(warm, spoil):
    spoil(warm)
    assert not hit(warm)
    assert len(warm.asked) == 1
    assert hit(warm)
    assert files(warm.folder) == {f"{NAME}.so", f"{NAME}.json"}


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_an_unreadable_file_is_a_miss_and_rewritten(warm, monkeypatch, suffix):
    """A file of mode 000, as any user but root sees it."""
    unreadable = warm.path(suffix)
    inode = unreadable.stat().st_ino

    def guarded(read):
        def guard(path, *args, **kwargs):
            if path == unreadable and path.stat().st_ino == inode:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return read(path, *args, **kwargs)

        return guard

    monkeypatch.setattr(Path, "read_bytes", guarded(Path.read_bytes))
    monkeypatch.setattr(Path, "read_text", guarded(Path.read_text))
    assert not hit(warm)
    assert hit(warm)


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_folder_where_a_file_should_be(warm, suffix):
    """It can neither be read nor replaced: a warning, and a kernel."""
    warm.path(suffix).unlink()
    warm.path(suffix).mkdir()
    with pytest.warns(RuntimeWarning, match=compile.CACHE_DIR_VARIABLE):
        assert callable(compile.compiled(PROBLEM, CONFIG))
    assert len(warm.asked) == 1


# ---- wrong folders -------------------------------------------------------------------------------------------------


def assert_warned(cache: Cache, folder: Path) -> None:
    """One warning, that names the folder and the remedy; a kernel all the same."""
    with pytest.warns(RuntimeWarning) as caught:
        function = compile.compiled(PROBLEM, CONFIG)
    assert callable(function)
    assert len(cache.asked) == 1
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(folder) in message
    assert f"set {compile.CACHE_DIR_VARIABLE} to a folder that can be written" in message
    assert compile.compiled(PROBLEM, CONFIG) is function  # kept in memory at least


def test_a_folder_below_a_file(cold, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv(compile.CACHE_DIR_VARIABLE, str(folder))
    assert_warned(cold, folder)


def test_a_folder_that_cannot_be_made(cold, monkeypatch):
    def mkdir(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_warned(cold, cold.folder)


def test_a_folder_without_room_for_a_lock(cold, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(compile.filelock.FileLock, "acquire", acquire)
    assert_warned(cold, cold.folder)


def test_a_full_disk(cold, monkeypatch):
    """Nothing is left behind that could be taken for an entry."""

    def write_text(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    assert_warned(cold, cold.folder)
    assert files(cold.folder) == set()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes where it likes")
def test_a_read_only_folder(cold):
    cold.folder.mkdir(mode=0o555)
    assert_warned(cold, cold.folder)


# ---- many at once --------------------------------------------------------------------------------------------------


def test_many_threads_compile_once(cold, monkeypatch):
    count = 8
    together, patiently = threading.Barrier(count), compile.compile_only

    def slow(*key):
        time.sleep(0.2)  # long enough for all the others to arrive
        return patiently(*key)

    def ask(_):
        together.wait()
        return compile.compiled(PROBLEM, CONFIG)

    monkeypatch.setattr(compile, "compile_only", slow)
    with ThreadPoolExecutor(count) as pool:
        functions = list(pool.map(ask, range(count)))
    assert len(cold.asked) == 1
    assert all(function is functions[0] for function in functions)
    assert works(functions[0])


def test_many_processes_compile_once(kernel, tmp_path):
    """On a cold cache, started together; each says whether it compiled."""
    count = 3
    program = f"""
import pathlib, sys, time
from cute_attn import compile
here, me = pathlib.Path({str(tmp_path)!r}), sys.argv[1]
compiler = compile.compile_only
def compile_only(*key):
    (here / f"compiled-{{me}}").touch()
    return compiler(*key)
compile.compile_only = compile_only
(here / f"ready-{{me}}").touch()
while not (here / "go").exists():
    time.sleep(0.01)
{ASK}
print(function)
"""
    environment = {**os.environ, compile.CACHE_DIR_VARIABLE: str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    while len(list(tmp_path.glob("ready-*"))) < count and all(p.poll() is None for p in started):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Function" in out
        assert "Warning" not in err
    assert len(list(tmp_path.glob("compiled-*"))) == 1
    assert files(tmp_path / "cache") == {f"{NAME}.so", f"{NAME}.json"}


@pytest.fixture
def held(cold) -> Iterator[subprocess.Popen]:
    """Another process that holds the entry's lock and makes nothing of it."""
    cold.folder.mkdir()
    program = """
import filelock, sys, time
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(cold.path(".lock"))], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_that_is_never_released(cold, held, monkeypatch):
    monkeypatch.setattr(compile, "LOCK_SECONDS", 0.1)
    assert_warned(cold, cold.folder)
    assert files(cold.folder) == set()


def test_a_process_that_dies_gives_its_lock_back(cold, held):
    held.kill()
    held.wait()
    assert not hit(cold)
    assert hit(cold)


# ---- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linker", [None, shutil.which("false")], ids=["no linker", "a linker that fails"])
def test_without_a_linker_the_entry_is_an_object_file(cold, monkeypatch, linker):
    monkeypatch.setattr(compile.shutil, "which", lambda name: linker)
    assert works(compile.compiled(PROBLEM, CONFIG))
    assert files(cold.folder) == {f"{NAME}.o", f"{NAME}.json"}
    assert hit(cold)
    assert cold.asked == [(PROBLEM, CONFIG)]


MISSING = {
    "cutlass.cute": ("CuTe DSL can't be imported", "try pip install 'nvidia-cutlass-dsl[cu13]'"),
    "tvm_ffi": ("tvm-ffi can't be imported", "try pip install apache-tvm-ffi"),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_module_says_what_to_install(module, monkeypatch, tmp_path):
    monkeypatch.setenv(compile.CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails as if it were not installed
    with pytest.raises(NotImplementedError) as caught:
        compile.compiled(PROBLEM, CONFIG)
    for words in (*MISSING[module], "backend='reference'"):
        assert words in str(caught.value)
    assert compile._memory == {}
