"""Compiled kernels on disk: where, in what files, and which of them are believed.

An entry is a shared library ``NAME.so`` and a record ``NAME.json`` with its checksum and the libraries it needs. The launcher
alone (tvm-ffi) loads it, without importing the DSL. Where there is no linker, or what it links can't be loaded from the
folder, the code is an object file ``NAME.o``, which the DSL loads.

Loading code runs it. So a folder or file that another user owns or may write to is left alone.

Whatever is wrong with an entry makes it a miss, and the logger ``cute_attn`` tells at debug level what it was. Whatever is
wrong with the folder is a warning, once a process, and kernels are kept in memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import filelock
import platformdirs

from cute_attn import inventory
from cute_attn.inventory import log

CACHE_DIR_VARIABLE = "CUTE_ATTN_CACHE_DIR"
LINKERS = ("cc", "gcc", "clang")
LOCK_SECONDS = 300.0
ANEW = "every process will compile anew"
AS_OBJECTS = "kernels are kept as object files, and each process that loads one imports the DSL first"

_warned: set[tuple[str, object]] = set()


class Untrusted(PermissionError):  # noqa: N818
    """Another user could have written this code."""


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``$CUTE_ATTN_CACHE_DIR``, or the user's cache folder.

    Raises ``OSError`` where the user has no home and the variable doesn't name a folder, or where a file is in the way.
    """
    folder = _absolute(os.environ.get(CACHE_DIR_VARIABLE, ""))
    if file := next(filter(os.path.isfile, (folder, *folder.parents)), None):
        need = f"a folder is needed: try another {CACHE_DIR_VARIABLE}"
        raise NotADirectoryError(f"the cache would be {folder}, and {file} is a file; {need}")
    return folder


@lru_cache(maxsize=16)
def _absolute(text: str) -> Path:
    """A relative path is below the working directory when first asked, wherever the process goes later."""
    try:
        folder = Path(text).expanduser() if text else Path(platformdirs.user_cache_dir("cute_attn", appauthor=False))
    except (RuntimeError, KeyError) as error:
        raise OSError(f"the home directory is not known: {error}") from error
    if not text and not folder.is_absolute():  # what is left of ~ where nobody knows it
        raise OSError(f"the home directory is not known: {folder}")
    return folder.absolute()


# ---- loading -------------------------------------------------------------------------------------------------------


def load(folder: Path, name: str) -> Callable | None:
    """The entry's callable, or ``None`` if there is none or anything at all is wrong with it."""
    try:
        function = _load(folder, name)
    except Untrusted as error:
        _warn_untrusted(folder, error)
    except FileNotFoundError as error:
        log.debug("%s: a miss: there is no %s", name, error.filename)
    except Exception as error:  # the kernel is compiled again and the entry rewritten
        log.debug("%s: a miss: %s: %s", name, type(error).__name__, error)
    else:
        inventory.mark_used(folder / f"{name}.json")
        return function
    return None


def _load(folder: Path, name: str) -> Callable:
    note = folder / f"{name}.json"
    check_trust(folder)
    check_trust(note)
    record = json.loads(note.read_text(encoding="utf-8"))
    code = folder / record["code"]
    if code not in (folder / f"{name}.so", folder / f"{name}.o"):
        raise ValueError(f"its record names {code}")
    check_trust(code)
    if hashlib.sha256(code.read_bytes()).hexdigest() != record["sha256"]:
        raise ValueError(f"{code.name} is not what the record has the checksum of")
    if code.suffix == ".o":
        return importlib.import_module("cutlass.cute.runtime").load_module(str(code), enable_tvm_ffi=True)["attention"]
    for library in record["libraries"]:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    as_utf8 = os.fsencode(code).decode()  # which the launcher takes every string for; Python's own of the path may be ASCII
    return importlib.import_module("tvm_ffi").load_module(as_utf8)["attention"]


def check_trust(path: Path) -> None:
    """That nobody but this user and root could have written it. Of a folder's parents nothing is asked: who could exchange
    the folder, could not make it this user's."""
    if not hasattr(os, "geteuid"):
        return
    found, user = path.stat(), os.geteuid()
    if found.st_uid not in (user, 0):
        raise Untrusted(f"{path} belongs to user {found.st_uid}, and this process is user {user}'s")
    if found.st_mode & 0o022:
        raise Untrusted(f"others may write to {path}, whose mode is {found.st_mode & 0o777:o} (try chmod go-w)")


def close_to_others(path: Path) -> None:
    """Let nobody else write to a file, which the umask may allow a group: it would not be trusted."""
    path.chmod(path.stat().st_mode & ~0o022)


# ---- storing -------------------------------------------------------------------------------------------------------


@contextmanager
def filling(folder: Path, name: str) -> Iterator[bool]:
    """Hold the entry's lock; yields whether there is a folder to fill."""
    lock = filelock.FileLock(folder / f"{name}.lock", timeout=LOCK_SECONDS)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_trust(folder)
        lock.acquire()
    except Untrusted as error:
        _warn_untrusted(folder, error)
    except (OSError, filelock.Timeout) as error:
        warn_of_folder(folder, error)
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with suppress(OSError):  # whoever waits for it makes one anew, and finds the entry
                Path(lock.lock_file).unlink()
            lock.release()


def keep(folder: Path, name: str, function, fingerprint: str) -> Callable:
    """Write the entry; its callable as any later process will have it, or ``function`` where there is none."""
    for linked in (True, False):
        try:
            code = _store(folder, name, function, linked)
        except Exception as error:  # the kernel is there; not keeping it is no reason to fail
            warn_of_folder(folder, error)
            return function
        try:
            found = _load(folder, name)
        except Exception as error:
            _warn_unloadable(folder, code, error)
            code.unlink(missing_ok=True)
        else:
            _evict(folder, fingerprint, name)
            return found
    return function


def linker() -> str | None:
    """The compiler driver that links kernels; ``None`` where there is none."""
    return next((found for found in map(shutil.which, LINKERS) if found), None)


def _store(folder: Path, name: str, function, linked: bool) -> Path:
    """Write the entry, its code as a shared library or as an object file: each file under a name of its own first, then
    renamed, the record last."""
    runtime = importlib.import_module("cutlass.cute.runtime")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}.") as scratch:
        code = Path(scratch) / f"{name}.o"
        function.export_to_c(str(code), function_name="attention")
        if linked:
            code = _link(folder, code) or code
        record = {
            "code": code.name,
            "sha256": hashlib.sha256(code.read_bytes()).hexdigest(),
            "libraries": runtime.find_runtime_libraries(enable_tvm_ffi=True),
        }
        note = Path(scratch) / f"{name}.json"
        note.write_text(json.dumps(record), encoding="utf-8")
        for path in (code, note):
            close_to_others(path)
            path.replace(folder / path.name)
        return folder / code.name


def _link(folder: Path, code: Path) -> Path | None:
    """The object file as a shared library, or ``None`` where it can't be linked."""
    driver, library = linker(), code.with_suffix(".so")
    if driver is None:
        return None
    done = subprocess.run([driver, "-shared", "-o", str(library), str(code)], capture_output=True, check=False)
    if done.returncode == 0 and library.is_file():
        return library
    said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
    remedy = f"look into it, or leave {', '.join(LINKERS)} off the PATH"
    warn("not linked", folder, f"{driver} can't link kernels ({said}); {AS_OBJECTS}: {remedy}")
    return None


def _evict(folder: Path, fingerprint: str, spared: str) -> None:
    try:
        inventory.evict(folder, inventory.size_limit(), fingerprint, spared)
    except ValueError as error:
        warn("no limit", "", f"{error}; the cache in {folder} grows without a limit")
    except OSError as error:
        log.debug("%s can't be tidied: %s", folder, error)


# ---- warnings ------------------------------------------------------------------------------------------------------


def warn(reason: str, about: object, text: str) -> None:
    """Warn, once in a process for a reason and what it is about."""
    log.debug("%s", text)
    if (reason, about) not in _warned:
        _warned.add((reason, about))
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def warn_of_folder(folder: object, error: Exception) -> None:
    """Say that kernels can't be kept, and what to do."""
    remedy = f"set {CACHE_DIR_VARIABLE} to a folder that can be written"
    warn("not kept", folder, f"kernels can't be kept in {folder} ({error}); {ANEW}: {remedy}")


def _warn_untrusted(folder: Path, error: Untrusted) -> None:
    remedy = f"change that, or set {CACHE_DIR_VARIABLE} to a folder of your own"
    text = f"kernels in {folder} are not used, since to load one is to run it: {error}"
    warn("untrusted", folder, f"{text}; they are compiled anew: {remedy}")


def _warn_unloadable(folder: Path, code: Path, error: Exception) -> None:
    noexec = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0) if hasattr(os, "statvfs") else 0
    why = f"the folder is mounted noexec: {error}" if noexec else str(error)
    remedy = f"set {CACHE_DIR_VARIABLE} to a folder that allows execution"
    if code.suffix == ".so":
        remedy += "" if noexec else f", if it is not {linker()} that is at fault"
        warn("not loaded", folder, f"{code} was just linked and can't be loaded ({why}); {AS_OBJECTS}: {remedy}")
    else:
        warn("object not loaded", folder, f"{code} was just written and can't be loaded ({why}); {ANEW}: {remedy}")
