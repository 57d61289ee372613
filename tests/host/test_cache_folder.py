"""Where the compile cache is, and folders in which it can't be: a warning with the remedy, once, and a kernel all the same."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cute_attn import cache, compile
from cute_attn.__main__ import main
from cute_attn.cache import CACHE_DIR_VARIABLE, cache_dir
from tests.host.compile_cache import ASK, CONFIG, NAME, PROBLEM, assert_warned, files, hit, works

# ---- where it is ---------------------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv(CACHE_DIR_VARIABLE)
    default = cache_dir()
    assert default.is_absolute()
    assert default.name == "cute_attn"
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "")
    assert cache_dir() == default


def test_a_tilde_that_no_shell_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "~/kernels-of-a-test")
    assert cache_dir() == Path("/home/someone/kernels-of-a-test")


def test_a_relative_path_stays_where_it_was(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_DIR_VARIABLE, f"kernels/{tmp_path.name}")
    assert cache_dir() == tmp_path / "kernels" / tmp_path.name
    monkeypatch.chdir("/")
    assert cache_dir() == tmp_path / "kernels" / tmp_path.name


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A container's arbitrary user id: no variable names a home, and there is no entry in the list of users."""

    def unknown(user):
        raise KeyError(f"uid not found: {user}")

    for variable in ("HOME", "XDG_CACHE_HOME", CACHE_DIR_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    monkeypatch.chdir(tmp_path)
    cache._absolute.cache_clear()
    yield
    cache._absolute.cache_clear()


@pytest.mark.parametrize("asked", ["", "~/kernels", "~nobody/kernels"])
def test_without_a_home_kernels_are_kept_in_memory(cold, homeless, monkeypatch, tmp_path, asked):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, asked)
    assert_warned(cold, "the home directory is not known")
    assert list(tmp_path.iterdir()) == []  # no folder is called ~


def test_what_an_older_platformdirs_makes_of_it(cold, homeless, monkeypatch, tmp_path):
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda *_, **__: "~/.cache/cute_attn")
    assert_warned(cold, "the home directory is not known")
    assert list(tmp_path.iterdir()) == []


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(("name", "locale"), [("größe", C_LOCALE), ("gr\udcf6\udcdfe", {})], ids=["a C locale", "Latin-1"])
def test_a_folder_whose_name_is_not_ascii(entry, tmp_path, name, locale):
    """A process finds what another one has kept there. What the launcher can't open is an object file."""
    folder = tmp_path / name
    environment = {**os.environ, **locale, CACHE_DIR_VARIABLE: os.fsencode(folder)}
    program = f"""{ASK}
import sys
if sys.argv[1] == "again":
    assert "cute_attn.forward" not in sys.modules, "compiled again"
"""
    for run in ("first", "again"):
        done = subprocess.run([sys.executable, "-c", program, run], env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        warned = b"RuntimeWarning" in done.stderr
        assert warned == (name != "größe" and run == "first"), done.stderr.decode()
    assert files(folder) == {f"{NAME}.so" if name == "größe" else f"{NAME}.o", f"{NAME}.json"}


# ---- folders that can't be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_file_in_its_place(cold, tmp_path, monkeypatch, capsys, name):
    file, folder = tmp_path / "file", tmp_path / name
    file.touch()
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(folder))
    words = f"the cache would be {folder}, and {file} is a file; a folder is needed"
    assert_warned(cold, words, "to a folder that can be written")
    for command in ("cache", "compile"):
        with pytest.raises(SystemExit, match="2"):
            main([command])
        assert f"error: {words}: try another {CACHE_DIR_VARIABLE}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(cold, monkeypatch):
    def mkdir(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_warned(cold, str(cold.folder), "to a folder that can be written")


def test_a_folder_without_room_for_a_lock(cold, monkeypatch):
    def acquire(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache.filelock.FileLock, "acquire", acquire)
    assert_warned(cold, str(cold.folder), "to a folder that can be written")


def test_a_full_disk(cold, monkeypatch):
    """Nothing is left behind that could be taken for an entry."""

    def write_text(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)
    assert_warned(cold, str(cold.folder), "to a folder that can be written")
    assert files(cold.folder) == set()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes where it likes")
def test_a_read_only_folder(cold):
    cold.folder.mkdir(mode=0o555)
    assert_warned(cold, str(cold.folder), "to a folder that can be written")


# ---- folders from which nothing can be loaded ----------------------------------------------------------------------


@pytest.fixture
def noexec(monkeypatch):
    """A folder from which no library can be mapped as code, which object files needn't be."""
    import tvm_ffi

    def load_module(path):
        raise RuntimeError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(tvm_ffi, "load_module", load_module)
    monkeypatch.setattr(cache.os, "statvfs", lambda folder: SimpleNamespace(f_flag=os.ST_NOEXEC))


def test_a_folder_mounted_noexec(cold, noexec):
    """Said once. Other processes load the object file."""
    assert_warned(cold, str(cold.folder), "mounted noexec", "failed to map segment", "that allows execution")
    assert {f"{NAME}.o", f"{NAME}.json"} < files(cold.folder)
    assert not list(cold.folder.glob("*.so"))
    assert hit(cold)


def test_an_entry_that_can_not_be_loaded_at_all(cold, noexec, monkeypatch):
    runtime = pytest.importorskip("cutlass.cute.runtime")
    monkeypatch.setattr(runtime, "load_module", lambda *_, **__: {})
    with pytest.warns(RuntimeWarning) as caught:
        assert callable(compile.compiled(PROBLEM, CONFIG))
    assert len(caught) == 2  # of the library and of the object
    assert "just written and can't be loaded" in str(caught[1].message)
    assert "every process will compile anew" in str(caught[1].message)


# ---- linkers -------------------------------------------------------------------------------------------------------


def linker(monkeypatch, tmp_path, script: str) -> None:
    """Let every linker be a shell script; ``$library`` is what it should make."""
    path = tmp_path / "bin" / "linker"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\nlibrary=$3\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(cache, "LINKERS", (str(path),))


def test_without_a_linker_the_entry_is_an_object_file(cold, monkeypatch):
    monkeypatch.setattr(cache, "LINKERS", ())
    assert works(compile.compiled(PROBLEM, CONFIG))
    assert files(cold.folder) == {f"{NAME}.o", f"{NAME}.json"}
    assert hit(cold)
    assert cold.asked == [(PROBLEM, CONFIG)]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no such target >&2; exit 1", "can't link kernels (no such target)"),
        ("exit 3", "can't link kernels (exit status 3)"),
        ("exit 0", "can't link kernels (exit status 0)"),  # and makes nothing
        ('echo garbage > "$library"', "just linked and can't be loaded"),
        (': > "$library"', "just linked and can't be loaded"),
    ],
    ids=["says why", "fails", "makes nothing", "makes garbage", "makes an empty file"],
)
def test_a_linker_that_fails_is_told_and_the_entry_is_an_object_file(cold, monkeypatch, tmp_path, script, said):
    linker(monkeypatch, tmp_path, script)
    with pytest.warns(RuntimeWarning) as caught:
        assert works(compile.compiled(PROBLEM, CONFIG))
    assert len(caught) == 1
    message = str(caught[0].message)
    for words in (said, str(tmp_path / "bin" / "linker"), "kept as object files"):
        assert words in message
    assert files(cold.folder) == {f"{NAME}.o", f"{NAME}.json"}
    assert hit(cold)
    assert cold.asked == [(PROBLEM, CONFIG)]


# ---- who could have written it -------------------------------------------------------------------------------------


def disown(monkeypatch, path: Path) -> None:
    """Let a file or folder be another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(cache.os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("what", ["", f"{NAME}.so", f"{NAME}.json"], ids=["folder", "code", "record"])
def test_what_another_user_owns_is_not_loaded(warm, monkeypatch, what):
    disown(monkeypatch, warm.folder / what)
    assert_warned(warm, str(warm.folder), f"{warm.folder / what} belongs to user", "of your own")


@pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "others"])
@pytest.mark.parametrize("what", ["", f"{NAME}.so", f"{NAME}.json"], ids=["folder", "code", "record"])
def test_what_others_may_write_is_not_loaded(warm, what, mode):
    path = warm.folder / what
    path.chmod(path.stat().st_mode | mode)
    assert_warned(warm, str(warm.folder), f"others may write to {path}", "chmod go-w", "of your own")


def test_nothing_is_written_to_a_folder_of_others(cold):
    cold.folder.mkdir(mode=0o700)
    cold.folder.chmod(0o770)
    assert_warned(cold, str(cold.folder))
    assert files(cold.folder) == set()


def test_an_entry_that_others_could_write_is_made_anew(warm):
    warm.path(".so").chmod(0o775)
    with pytest.warns(RuntimeWarning, match="others may write"):
        compile.compiled(PROBLEM, CONFIG)
    assert hit(warm)


def test_what_root_owns_is_trusted(monkeypatch):
    """Such as an image's cache, filled when it was built. Root may write anything anyway."""
    monkeypatch.setattr(cache.os, "geteuid", lambda: 12345)
    assert Path("/").stat().st_uid == 0
    cache.check_trust(Path("/"))


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_what_is_made_is_for_its_owner_to_write(cold, umask):
    before = os.umask(umask)
    try:
        compile.compiled(PROBLEM, CONFIG)
    finally:
        os.umask(before)
    assert cold.folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cold.folder.iterdir() if path.stat().st_mode & 0o022] == []
    assert hit(cold)


# ---- what is missing -----------------------------------------------------------------------------------------------

MISSING = {
    "cutlass.cute": ("CuTe DSL can't be imported", "try pip install 'nvidia-cutlass-dsl[cu13]'"),
    "tvm_ffi": ("tvm-ffi can't be imported", "try pip install apache-tvm-ffi"),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_module_says_what_to_install(module, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails as if it were not installed
    with pytest.raises(NotImplementedError) as caught:
        compile.compiled(PROBLEM, CONFIG)
    for words in (*MISSING[module], "backend='reference'"):
        assert words in str(caught.value)
    assert compile._memory == {}
