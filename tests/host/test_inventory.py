"""How much the cache folder may hold, what goes first, and ``python -m cute_attn cache``."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from cute_attn import cache, compile, inventory, sources
from cute_attn.__main__ import main
from cute_attn.cache import CACHE_DIR_VARIABLE
from cute_attn.inventory import CACHE_SIZE_VARIABLE, DAY_SECONDS
from tests.host.compile_cache import CONFIG, NAME, PROBLEM, files, hit, works

OURS, OTHER = sources.fingerprint(), "0123456789abcdef" * 4
KIB = 1 << 10


def name_of(number: int, fingerprint: str = OTHER) -> str:
    return f"cp_async_sm_80_bfloat16_d64_{fingerprint[:12]}_{number:024x}"


def put(folder: Path, name: str, days: float = 0, size: int = KIB) -> str:
    """An entry of a size in all, last used some days ago."""
    record = json.dumps({"code": f"{name}.so"})
    for suffix, content in ((".so", bytes(size - len(record))), (".json", record.encode())):
        (folder / f"{name}{suffix}").write_bytes(content)
        if days:
            age(folder / f"{name}{suffix}", days)
    return name


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY_SECONDS,) * 2)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in inventory.entries(folder))


# ---- the limit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 2 << 30),
        ("0", 0),
        ("1000", 1000),
        ("3K", 3 << 10),
        ("500M", 500 << 20),
        (" 500 MiB ", 500 << 20),
        ("2g", 2 << 30),
        ("1TB", 1 << 40),
    ],
)
def test_sizes(monkeypatch, text, size):
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, text)
    assert inventory.size_limit() == size


@pytest.mark.parametrize("text", ["-1", "2 GB more", "1.5G", "G", "inf", "1e9", "9" * 16])
def test_what_is_no_size(monkeypatch, text):
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{CACHE_SIZE_VARIABLE} is '{text}'; a number of bytes is needed, such as 500M"):
        inventory.size_limit()


def test_the_default_without_the_variable(monkeypatch):
    monkeypatch.delenv(CACHE_SIZE_VARIABLE, raising=False)
    assert inventory.size_limit() == 2 << 30


# ---- what goes -----------------------------------------------------------------------------------------------------


def test_below_the_limit_nothing_goes(tmp_path):
    kept = [put(tmp_path, name_of(i), days=1000) for i in range(4)]
    assert inventory.evict(tmp_path, 4 * KIB, OURS, kept[0]) == []
    assert names(tmp_path) == kept


def test_the_least_recently_used_go_first(tmp_path):
    for i, days in enumerate([3, 1, 4, 2]):
        put(tmp_path, name_of(i), days)
    gone = inventory.evict(tmp_path, 2 * KIB, OURS, "none")
    assert [entry.name for entry in gone] == [name_of(2), name_of(0)]
    assert names(tmp_path) == [name_of(1), name_of(3)]
    assert files(tmp_path) == {f"{name_of(i)}{suffix}" for i in (1, 3) for suffix in (".so", ".json")}


def test_those_of_other_versions_go_before_any_of_this_one(tmp_path):
    old = [put(tmp_path, name_of(i, OURS), days=100 + i) for i in range(3)]
    for i in range(3):
        put(tmp_path, name_of(i, OTHER), days=i)
    inventory.evict(tmp_path, 4 * KIB, OURS, "none")
    assert names(tmp_path) == sorted([*old, name_of(0, OTHER)])
    inventory.evict(tmp_path, 2 * KIB, OURS, "none")
    assert names(tmp_path) == sorted(old[:2])


def test_what_was_stored_just_now_stays(tmp_path):
    kept = put(tmp_path, name_of(0, OURS), days=9, size=9 * KIB)
    put(tmp_path, name_of(1, OURS))
    inventory.evict(tmp_path, 0, OURS, kept)
    assert names(tmp_path) == [kept]


def test_a_hit_is_a_use(warm):
    """Noted once a day, without making the entry look rewritten."""
    record = warm.path(".json")
    age(record, 5)
    written = record.stat().st_mtime_ns
    assert hit(warm)
    assert record.stat().st_atime > time.time() - DAY_SECONDS
    assert record.stat().st_mtime_ns == written
    used = record.stat().st_atime_ns
    inventory.mark_used(record)
    assert record.stat().st_atime_ns == used


def test_a_use_that_can_not_be_noted_is_a_hit(warm, monkeypatch):
    def utime(*_, **__):
        raise OSError(30, "Read-only file system")

    age(warm.path(".json"), 5)
    monkeypatch.setattr(inventory.os, "utime", utime)
    assert hit(warm)


def test_what_processes_left_goes_after_a_day(tmp_path):
    """The lock and the folder of one that was killed, and code without a record. A younger one may be about to complete it."""
    for number, days in ((1, 0.5), (2, 1.5)):
        scratch, lock = (tmp_path / f"{name_of(number)}{suffix}" for suffix in (".x1y2z3_a", ".lock"))
        code = tmp_path / f"{name_of(number + 2)}.so"
        scratch.mkdir()
        for path in (scratch / f"{name_of(number)}.o", lock, code):
            path.write_bytes(b"x")
            age(path, days)
        age(scratch, days)
    inventory.evict(tmp_path, 1 << 30, OURS, "none")
    assert files(tmp_path) == {f"{name_of(1)}.x1y2z3_a", f"{name_of(1)}.lock", f"{name_of(3)}.so"}


STRANGE = ("notes.txt", "one.json", "libother.so", f"{name_of(1)}.json.bak", f"{name_of(1)}x.so", "README")


def test_files_of_others_are_never_touched(tmp_path):
    """The variable may name a folder that holds other things."""
    for name in STRANGE:
        (tmp_path / name).write_text("mine")
        age(tmp_path / name, 1000)
    (tmp_path / "parts").mkdir()
    put(tmp_path, name_of(7))
    inventory.evict(tmp_path, 0, OURS, "none")
    inventory.remove(inventory.entries(tmp_path))
    assert files(tmp_path) == {*STRANGE, "parts"}


def test_a_store_tidies_the_folder_and_a_hit_does_not(cold, monkeypatch):
    cold.folder.mkdir(mode=0o700)
    old = put(cold.folder, name_of(1), days=400)
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "1K")
    assert works(compile.compiled(PROBLEM, CONFIG))
    assert names(cold.folder) == [NAME]
    put(cold.folder, old, days=400)
    assert hit(cold)
    assert names(cold.folder) == sorted([NAME, old])
    compile.compiled(replace(PROBLEM, softcap=True), CONFIG)
    assert len(names(cold.folder)) == 1
    assert not hit(cold)  # over the limit those of this version go, too


def test_a_limit_that_is_none_is_told_and_nothing_goes(cold, monkeypatch):
    cold.folder.mkdir(mode=0o700)
    put(cold.folder, name_of(1), days=400)
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "plenty")
    with pytest.warns(RuntimeWarning, match=f"{CACHE_SIZE_VARIABLE} is 'plenty'.*grows without a limit"):
        assert works(compile.compiled(PROBLEM, CONFIG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was told
        assert works(compile.compiled(replace(PROBLEM, softcap=True), CONFIG))
    assert len(names(cold.folder)) == 3


def test_a_folder_that_can_not_be_tidied_is_no_failure(cold, monkeypatch):
    def unlink(*_, **__):
        raise PermissionError(13, "Permission denied")

    cold.folder.mkdir(mode=0o700)
    put(cold.folder, name_of(1), days=400)
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "0")
    monkeypatch.setattr(inventory, "_remove", unlink)
    assert works(compile.compiled(PROBLEM, CONFIG))


def test_many_at_once(tmp_path):
    """Some store and tidy, some look: nobody fails, and whoever finds a record finds its code, or that both are gone."""
    rounds, stop = 60, threading.Event()

    def store(me: int) -> None:
        for i in range(rounds):
            put(tmp_path, name_of(1000 * me + i))
            inventory.evict(tmp_path, 8 * KIB, OURS, "none")

    def look() -> int:
        torn = 0
        while not stop.is_set():
            for record in tmp_path.glob("*.json"):
                if record.exists() and not record.with_suffix(".so").exists() and record.exists():
                    torn += 1
        return torn

    with ThreadPoolExecutor(6) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        storing = [pool.submit(store, me) for me in range(4)]
        wait(storing)
        stop.set()
        assert [done.exception() for done in storing] == [None] * 4
        assert [done.result() for done in looking] == [0, 0]
    inventory.evict(tmp_path, 8 * KIB, OURS, "none")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 * KIB
    assert all((tmp_path / f"{name}.so").exists() for name in names(tmp_path))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(folder))
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "3M")
    for i in range(2):
        put(folder, name_of(i, OURS), size=256 * KIB)
    put(folder, name_of(5, OTHER), size=1 << 20)
    (folder / "notes.txt").write_text("mine")
    return folder


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_what_the_cache_holds(filled, capsys):
    assert main(["cache"]) == 0
    shown = said(capsys)
    assert str(filled) in shown.replace(" ", "")
    for line in ("holds 3 kernels, 1.5 MiB", "of this version 2 kernels, 0.5 MiB", "of others 1 kernel, 1.0 MiB"):
        assert line in shown
    assert "limit 3.0 MiB" in shown
    assert CACHE_SIZE_VARIABLE in shown
    assert len(names(filled)) == 3


def test_clearing_the_cache(filled, capsys):
    assert main(["cache", "--clear-others"]) == 0
    assert "removed 1 kernel, 1.0 MiB from" in said(capsys)
    assert names(filled) == [name_of(0, OURS), name_of(1, OURS)]
    assert main(["cache", "--clear"]) == 0
    assert "removed 2 kernels, 0.5 MiB from" in said(capsys)
    assert files(filled) == {"notes.txt"}
    assert main(["cache", "--clear"]) == 0
    assert "removed 0 kernels" in said(capsys)


def test_a_cache_that_is_not_there(filled, capsys, monkeypatch):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(filled / "nowhere"))
    for arguments in ([], ["--clear"]):
        assert main(["cache", *arguments]) == 0
        assert "0 kernels, 0.0 MiB" in said(capsys)


def test_a_cache_that_can_not_be_cleared(filled, capsys, monkeypatch):
    def unlink(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(inventory, "_remove", unlink)
    assert main(["cache", "--clear"]) == 1
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--clear", "--clear-others"], ["--clean"]])
def test_bad_usage(filled, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(["cache", *arguments])
    assert len(names(filled)) == 3


def test_a_size_that_is_none(filled, capsys, monkeypatch):
    monkeypatch.setenv(CACHE_SIZE_VARIABLE, "plenty")
    with pytest.raises(SystemExit, match="2"):
        main(["cache"])
    assert "a number of bytes is needed" in capsys.readouterr().err


def test_without_a_home(filled, capsys, monkeypatch):
    def unknown(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE_DIR_VARIABLE)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", unknown)
    cache._absolute.cache_clear()
    assert main(["cache"]) == 1
    assert "the home directory is not known" in capsys.readouterr().err
    assert main(["info"]) == 0
    assert "cache none: the home directory is not known" in said(capsys)
    cache._absolute.cache_clear()
