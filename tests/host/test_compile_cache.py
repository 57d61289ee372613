"""The compile cache: what its keys depend on, that a kernel is compiled once, and that nothing wrong with the cache is
worse than a miss or a warning.

Few kernels are really compiled here. Most tests put a function of an earlier compilation in the compiler's place.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cute_attn import cache, compile, sources
from cute_attn.cache import CACHE_DIR_VARIABLE
from cute_attn.expressions import Expression
from cute_attn.inventory import OURS
from cute_attn.plan import plan
from cute_attn.problem import Problem, check_call, problem_of
from tests.host.compile_cache import ASK, CONFIG, NAME, PROBLEM, Cache, assert_warned, files, hit, works
from tests.host.processes import run_quick

# ---- keys ----------------------------------------------------------------------------------------------------------


def changed(record, field: dataclasses.Field):
    """The record with another value in one field."""
    value = getattr(record, field.name)
    if isinstance(value, Expression):
        return dataclasses.replace(record, expression=Expression((("constant", "bool", "True"),), 0))
    other = not value if isinstance(value, bool) else value + 8 if isinstance(value, int) else f"{value}x" if value else "qkv"
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
    assert all(OURS.fullmatch(f"{name}.json") for name in names)


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
    monkeypatch.setattr(sources, "fingerprint", lambda: 12 * "another ")
    assert compile.entry_name(PROBLEM, CONFIG) != NAME


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


def test_a_hit_in_a_new_process_never_imports_the_dsl(entry):
    """Which alone takes longer than all the rest of a first call."""
    program = f"import sys\n{ASK}\nassert 'cutlass' not in sys.modules, 'the DSL was imported'\n"
    done = run_quick(program, **{CACHE_DIR_VARIABLE: str(entry)})
    assert done.returncode == 0, done.stderr


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


WRONG: dict[str, tuple[Callable[[Cache], object], str]] = {  # and what is said of it at debug level
    "no code": (lambda c: c.path(".so").unlink(), f"there is no .*{NAME}.so"),
    "empty code": (lambda c: replace(c.path(".so"), b""), "checksum"),
    "truncated code": (lambda c: replace(c.path(".so"), c.path(".so").read_bytes()[:-100]), "checksum"),
    "a byte of the code": (flip_a_byte, "checksum"),
    "garbage for code": (garbage_with_the_right_checksum, "Failed to load"),
    "no record": (lambda c: c.path(".json").unlink(), f"there is no .*{NAME}.json"),
    "empty record": (lambda c: c.path(".json").write_bytes(b""), "JSONDecodeError"),
    "truncated record": (lambda c: c.path(".json").write_bytes(c.path(".json").read_bytes()[:40]), "JSONDecodeError"),
    "a record of bytes": (lambda c: c.path(".json").write_bytes(bytes(range(256))), "UnicodeDecodeError"),
    "a record that is no JSON": (lambda c: c.path(".json").write_text("code = 1"), "JSONDecodeError"),
    "a record that is a list": (lambda c: c.path(".json").write_text("[1, 2]"), "TypeError"),
    "a record that is null": (lambda c: c.path(".json").write_text("null"), "TypeError"),
    "a record without a key": (without_a_key, "KeyError: 'libraries'"),
    "a wrong checksum": (lambda c: amend(c, sha256="0" * 64), "checksum"),
    "a checksum that is no string": (lambda c: amend(c, sha256=None), "checksum"),
    "the name of another file": (lambda c: amend(c, code="other.so"), "its record names .*other.so"),
    "the name of no file": (lambda c: amend(c, code=17), "TypeError"),
    "a library that is gone": (lambda c: amend(c, libraries=["/no/such/library.so"]), "/no/such/library.so"),
    "libraries that are no list": (lambda c: amend(c, libraries=3), "TypeError"),
}


@pytest.mark.parametrize(("spoil", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_entry_is_a_miss_and_rewritten(warm, caplog, spoil, reason):
    caplog.set_level(logging.DEBUG, "cute_attn")
    spoil(warm)
    assert not hit(warm)
    assert len(warm.asked) == 1
    said = [record.getMessage() for record in caplog.records if record.name == "cute_attn"]
    assert re.search(f"{NAME}: a miss: .*{reason}", said[0])
    assert hit(warm)
    assert files(warm.folder) == {f"{NAME}.so", f"{NAME}.json"}


def test_an_entry_that_names_a_file_elsewhere(warm, tmp_path):
    """The folder is believed, and no other."""
    elsewhere = tmp_path / f"{NAME}.so"
    warm.path(".so").rename(elsewhere)
    amend(warm, code=f"../{NAME}.so")
    assert not hit(warm)


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
    with pytest.warns(RuntimeWarning, match=CACHE_DIR_VARIABLE):
        assert callable(compile.compiled(PROBLEM, CONFIG))
    assert len(warm.asked) == 1


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


# Eight processes of 32 threads, on a cold cache, started together: every thread asks for every kernel, each for another one
# first, and calls what it gets. Processes are forked from one that has imported all they need, and differ from processes
# started one by one in nothing that the cache knows of. A stand-in for the compiler copies a kernel compiled before.
MANY = """
import os, shutil, sys, threading, time, traceback, warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import tvm_ffi
from cute_attn import compile, sources
from cute_attn.plan import plan
from cute_attn.problem import Problem

warnings.simplefilter("error", RuntimeWarning)
PROCESSES, THREADS = 8, 32
here, code, *libraries = sys.argv[1:]
plain = Problem("bfloat16", 32, 32, blocks="query lists")
problems = [plain, replace(plain, blocks="key lists")]
if code:
    problems += [replace(plain, return_lse=True), replace(plain, bounded_right=True)]
configs = {problem: plan(problem, "sm_80", "cp_async") for problem in problems}
compiler = compile.compile_only


def compile_only(problem, config, options=""):
    Path(here, f"compiled-{problems.index(problem)}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if not code:
        return compiler(problem, config, options)
    time.sleep(0.1)  # long enough for all the others to come
    return SimpleNamespace(export_to_c=lambda path, function_name: shutil.copy(code, path))


compile.compile_only = compile_only
if code:
    sys.modules["cutlass.cute.runtime"] = SimpleNamespace(find_runtime_libraries=lambda enable_tvm_ffi: libraries)


def process():
    together, right, got = threading.Barrier(THREADS), [], {problem: set() for problem in problems}

    def ask(i):
        try:
            together.wait()
            for k in range(len(problems)):
                problem = problems[(i + k) % len(problems)]
                function = compile.compiled(problem, configs[problem])
                got[problem].add(function)
                try:
                    function()
                except TypeError as error:  # called with nothing, a kernel says what it takes
                    assert "when calling: `enlist(" in str(error), error
                else:
                    raise AssertionError("it took nothing for its arguments")
            right.append(i)
        except BaseException:
            traceback.print_exc()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(right) == THREADS and all(len(functions) == 1 for functions in got.values())


try:  # A process's first error of tvm-ffi takes a second, for debug information; the second none, nor do those of its children.
    tvm_ffi.load_module("missing.so")
except Exception:
    pass
ready, go = os.pipe()
children = []
for _ in range(PROCESSES):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(ready, 1)  # until the parent closes its end
        os._exit(0 if process() else 1)
    children.append(child)
os.close(go)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


@pytest.mark.parametrize("compiler", ["a stand-in", "the DSL"])
def test_many_processes_of_many_threads_compile_once(compiler, kernel, tmp_path):
    """Each kernel in one thread of one process; every thread has each kernel, no process warns, and no other file is left."""
    copied, kernels = [""], 2
    if compiler == "a stand-in":
        kernel.export_to_c(str(tmp_path / "kernel.o"), function_name="attention")
        runtime = importlib.import_module("cutlass.cute.runtime")
        copied, kernels = [str(tmp_path / "kernel.o"), *runtime.find_runtime_libraries(enable_tvm_ffi=True)], 4
    folder = tmp_path / "cache"
    done = run_quick(MANY, str(tmp_path), *copied, **{CACHE_DIR_VARIABLE: str(folder)})
    assert (done.returncode, done.stderr) == (0, "")
    compiled = sorted(path.name.split("-")[1] for path in tmp_path.glob("compiled-*"))
    assert compiled == [str(i) for i in range(kernels)]
    names = {path.stem for path in folder.iterdir()}
    assert len(names) == kernels
    assert files(folder) == {f"{name}{suffix}" for name in names for suffix in (".so", ".json")}


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
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.1)
    assert_warned(cold, str(cold.folder))
    assert {name for name in files(cold.folder) if NAME in name} == {f"{NAME}.lock"}  # the other's


def test_a_process_that_dies_gives_its_lock_back(cold, held):
    held.kill()
    held.wait()
    assert not hit(cold)
    assert hit(cold)
