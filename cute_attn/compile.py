"""From (problem, config) to a callable: from memory, then from disk, then from ``cute.compile``.

What an entry on disk is, :mod:`cute_attn.cache` says. Its name is a hash of the problem, the config and a fingerprint of
whatever else the code depends on: the package's sources, layouts included, the versions of the DSL, the launcher, Python and
CUDA, and where these are installed, since the record names their libraries.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable

from cute_attn import cache, layouts, sources
from cute_attn.cache import cache_dir
from cute_attn.fields import TABLES
from cute_attn.layouts.base import Config
from cute_attn.problem import Problem

_memory: dict[tuple[Problem, Config], Callable] = {}
_memory_lock = threading.Lock()


def compiled(problem: Problem, config: Config) -> Callable:
    """The callable of a (problem, config), compiled at most once in a process and, with a working cache, on a machine.

    Raises ``NotImplementedError`` where the DSL or the launcher is not installed, ``sources.Changed`` (a ``RuntimeError``)
    where the package was exchanged under the process before that knew all it consists of.
    """
    key = (problem, config)
    function = _memory.get(key)
    if function is None:
        with _memory_lock:  # the DSL compiles one kernel at a time anyway
            function = _memory.get(key)
            if function is None:
                function = _memory[key] = _from_disk_or_compiler(problem, config)
    return function


def entry_name(problem: Problem, config: Config) -> str:
    """The name of an entry on disk: a readable part, the beginning of the fingerprint, and a hash of it and every field."""
    of = sources.fingerprint()
    digest = hashlib.sha256(f"{problem!r}\n{config!r}\n{of}{_outside_sources(config)}".encode()).hexdigest()
    return f"{config.mechanism}_{config.target}_{problem.dtype}_d{problem.head_dim}_{of[:12]}_{digest[:24]}"


def compile_only(problem: Problem, config: Config, options: str = ""):
    """Compile with the DSL and return its function, untouched by any cache. Needs no GPU."""
    dsl = _import_dsl()
    sources.hold()
    forward = importlib.import_module("cute_attn.forward")
    name = _host_of(problem)
    host = importlib.import_module(f"cute_attn.{name}")
    arguments = forward.stand_ins(TABLES[name], problem, config)
    options = f"--enable-tvm-ffi --gpu-arch={config.target} {options}"
    return dsl.compile(host.host_function(problem, config), *arguments, options=options)


def _host_of(problem: Problem) -> str:
    """The module of a problem's host function."""
    if problem.merges:
        return "merge"
    if problem.appends:
        return "append"
    if problem.rows:
        return "attend"
    if problem.blocks == "classified":
        return "classify"
    if problem.blocks in ("key lists", "query lists"):
        return "enlist"
    return "backward" if problem.gradients else "forward"


def _from_disk_or_compiler(problem: Problem, config: Config) -> Callable:
    try:
        folder = cache_dir()
    except OSError as error:
        cache.warn_of_folder("the cache's folder", error)
        return compile_only(problem, config)
    if _named_after_another():
        return compile_only(problem, config)
    name = entry_name(problem, config)
    if (function := cache.load(folder, name)) is not None:
        return function
    with cache.filling(folder, name) as may_write:
        # Another process may have filled it while this one waited.
        if may_write and (function := cache.load(folder, name)) is not None:
            return function
        function = compile_only(problem, config)
        if may_write and not _named_after_another():
            function = cache.keep(folder, name, function, sources.fingerprint())
        return function


def _named_after_another() -> bool:
    """Whether the entry's name would be that of another DSL's kernel: one was exchanged for the other under this process."""
    imported = sources.other_compiler()
    if imported:
        named = sources.versions()[sources.COMPILER]
        text = f"this process compiles with {imported}, where {named} is installed by now"
        cache.warn("exchanged", imported, f"{text}; kernels are kept in memory only: restart the process")
    return imported is not None


def _outside_sources(config: Config) -> str:
    """The fingerprint of the modules behind a config, as far as they lie outside the package."""
    try:
        return sources.fingerprint_of((layouts.for_target(config.target), layouts.family(config)))
    except (ValueError, KeyError):  # no module serves such a config: it has a name, but nothing will compile it
        return ""


def _import_dsl():
    """``cutlass.cute``, imported only where something has to be compiled: it takes more than a second."""
    for module, name, used, package in (
        ("tvm_ffi", "tvm-ffi", "launched", "apache-tvm-ffi"),
        ("cutlass.cute", "CUTLASS's CuTe DSL", "compiled", "'nvidia-cutlass-dsl[cu13]'"),
    ):
        try:
            found = importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise NotImplementedError(
                f"{name} can't be imported ({error}); the GPU kernels are {used} with it: "
                f"try pip install {package} (Linux only), or backend='reference'"
            ) from error
    return found
