"""From (problem, config) to a callable: from memory, then from disk, then from ``cute.compile``.

An entry on disk is a shared library ``NAME.so`` and a record ``NAME.json`` with its checksum and the libraries it needs.
It is loaded by the launcher alone (tvm-ffi), without importing the DSL. ``NAME`` is a hash of the problem, the config and
a fingerprint of whatever else the code depends on: the package's sources, layouts included, the versions of the DSL,
the launcher, Python and CUDA, and where these are installed, since the record names their libraries. Where there is no
linker, the entry is an object file ``NAME.o`` that the DSL loads.

Whatever is wrong with an entry makes it a miss; whatever is wrong with the folder, a warning.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import filelock
import platformdirs

from cute_attn import layouts
from cute_attn.layouts.base import Config
from cute_attn.problem import Problem

CACHE_DIR_VARIABLE = "CUTE_ATTN_CACHE_DIR"
VERSIONED = (
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-cu12",  # which of the two is there decides which CUDA's compiler is used
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "cuda-python",
    "torch",
)
LOCK_SECONDS = 300.0

_memory: dict[tuple[Problem, Config], Callable] = {}
_memory_lock = threading.Lock()


def compiled(problem: Problem, config: Config) -> Callable:
    """The callable of a (problem, config), compiled at most once in a process and, with a working cache, on a machine.

    Raises ``NotImplementedError`` where the DSL or the launcher is not installed.
    """
    key = (problem, config)
    function = _memory.get(key)
    if function is None:
        with _memory_lock:  # the DSL compiles one kernel at a time anyway
            function = _memory.get(key)
            if function is None:
                function = _memory[key] = _from_disk_or_compiler(problem, config)
    return function


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``$CUTE_ATTN_CACHE_DIR``, or the user's cache folder."""
    return Path(os.environ.get(CACHE_DIR_VARIABLE) or platformdirs.user_cache_dir("cute_attn", appauthor=False))


def entry_name(problem: Problem, config: Config) -> str:
    """The name of an entry on disk: a readable part, and a hash of every field and of the fingerprint."""
    digest = hashlib.sha256(f"{problem!r}\n{config!r}\n{fingerprint()}{_outside_sources(config)}".encode()).hexdigest()
    return f"{config.mechanism}_{config.target}_{problem.dtype}_d{problem.head_dim}_{digest[:24]}"


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Whatever a kernel's code depends on besides its problem and config, as one hash."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(layouts.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    for name in VERSIONED:
        digest.update(f"{name}={_installed(name)}\n".encode())
    digest.update(f"{sys.version_info[:2]} {platform.system()} {platform.machine()}".encode())
    return digest.hexdigest()


def _outside_sources(config: Config) -> str:
    """A hash of the modules behind a config that lie outside the package: :func:`fingerprint` covers what is inside."""
    inside = Path(layouts.__file__).parent
    digest = hashlib.sha256()
    with suppress(ValueError, KeyError):  # no module serves such a config: it has a name, but nothing will compile it
        for module in (layouts.for_target(config.target), layouts.family(config)):
            path = Path(module.__file__ or "")
            if not path.is_relative_to(inside) and path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_only(problem: Problem, config: Config, options: str = ""):
    """Compile with the DSL and return its function, untouched by any cache. Needs no GPU."""
    dsl = _import_dsl()
    host = importlib.import_module("cute_attn.backward" if problem.gradients else "cute_attn.forward")
    arguments = host.fake_arguments(problem, config)
    options = f"--enable-tvm-ffi --gpu-arch={config.target} {options}"
    return dsl.compile(host.host_function(problem, config), *arguments, options=options)


# ---- disk ----------------------------------------------------------------------------------------------------------


def _from_disk_or_compiler(problem: Problem, config: Config) -> Callable:
    name = entry_name(problem, config)
    folder = cache_dir()
    function = _load(folder, name)
    if function is not None:
        return function
    with _writable(folder, name) as may_write:
        if not may_write:
            return compile_only(problem, config)
        function = _load(folder, name)  # another process may have filled it while this one waited
        if function is not None:
            return function
        compiled_function = compile_only(problem, config)
        try:
            _store(folder, name, compiled_function)
        except Exception as error:  # the kernel is there; not keeping it is no reason to fail
            _warn(folder, error)
        return _load(folder, name) or compiled_function


@contextmanager
def _writable(folder: Path, name: str):
    """Hold the entry's lock; yields whether the folder can be written at all."""
    lock = filelock.FileLock(folder / f"{name}.lock", timeout=LOCK_SECONDS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, filelock.Timeout) as error:
        _warn(folder, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _store(folder: Path, name: str, function) -> None:
    """Write the entry: each file under a name of its own first, then renamed, the record last."""
    runtime = importlib.import_module("cutlass.cute.runtime")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.") as scratch:
        code = Path(scratch) / f"{name}.o"
        function.export_to_c(str(code), function_name="attention")
        code = _link(code) or code
        record = {
            "code": code.name,
            "sha256": hashlib.sha256(code.read_bytes()).hexdigest(),
            "libraries": runtime.find_runtime_libraries(enable_tvm_ffi=True),
        }
        note = Path(scratch) / f"{name}.json"
        note.write_text(json.dumps(record))
        code.replace(folder / code.name)
        note.replace(folder / note.name)


def _link(code: Path) -> Path | None:
    """The object file as a shared library, or ``None`` where no compiler driver is at hand to link it."""
    linker = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if linker is None:
        return None
    library = code.with_suffix(".so")
    done = subprocess.run([linker, "-shared", "-o", str(library), str(code)], capture_output=True, check=False)
    return library if done.returncode == 0 else None


def _load(folder: Path, name: str) -> Callable | None:
    """The entry's callable, or ``None`` if there is none or anything at all is wrong with it."""
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        code = folder / record["code"]
        if hashlib.sha256(code.read_bytes()).hexdigest() != record["sha256"]:
            return None
        if code.suffix == ".o":
            return importlib.import_module("cutlass.cute.runtime").load_module(str(code), enable_tvm_ffi=True)["attention"]
        for library in record["libraries"]:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tvm_ffi").load_module(str(code))["attention"]
    except Exception:  # a miss, whatever it was: the kernel is compiled again and the entry rewritten
        return None


def _warn(folder: Path, error: Exception) -> None:
    warnings.warn(
        f"kernels can't be kept in {folder} ({error}); every process will compile anew: "
        f"set {CACHE_DIR_VARIABLE} to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _import_dsl():
    """``cutlass.cute``, imported only where something has to be compiled: it takes more than a second."""
    try:
        importlib.import_module("tvm_ffi")
    except (ImportError, OSError) as error:
        raise NotImplementedError(
            f"tvm-ffi can't be imported ({error}); the GPU kernels are launched with it: "
            f"try pip install apache-tvm-ffi, or backend='reference'"
        ) from error
    try:
        return importlib.import_module("cutlass.cute")
    except (ImportError, OSError) as error:
        raise NotImplementedError(
            f"CUTLASS's CuTe DSL can't be imported ({error}); the GPU kernels are compiled with it: "
            f"try pip install 'nvidia-cutlass-dsl[cu13]', or backend='reference'"
        ) from error


def _installed(name: str) -> str:
    """A package's version and folder. The folder keeps environments apart that share a cache: an entry made in one names
    its libraries, and a process that loads two copies of the launcher's aborts."""
    with suppress(metadata.PackageNotFoundError):
        found = metadata.distribution(name)
        return f"{found.version} in {found.locate_file('')}"
    return "absent"
