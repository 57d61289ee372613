"""What lies in the cache folder, and what is removed from it.

The folder may hold as much as :func:`size_limit` says. When a kernel has been stored and there is more, entries go: those of
other fingerprints (other versions of the package, or of what compiles it) first, and of either kind the one whose last use
is longest ago. Files that aren't the cache's own are never touched.

Several processes may do so at once, beside others that load and store. An entry's record goes first: without it there is no
entry, and a process that had read it finds the code gone, which is a miss.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CACHE_SIZE_VARIABLE = "CUTE_ATTN_CACHE_SIZE"
SIZE_DEFAULT = "2G"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = re.compile(r"(\d{1,15}) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
# The record of an entry, its code, its lock, and the folder in which a process is making it.
OURS = re.compile(r"(?P<name>[a-z]\w*_(?P<of>[0-9a-f]{12})_[0-9a-f]{24})\.(?:json|so|o|lock|[a-z0-9_]{8})")
DAY_SECONDS = 86400.0

log = logging.getLogger("cute_attn")


@dataclass(frozen=True)
class Entry:
    """The files of one name. Without a record it is what a process left, or is about to complete."""

    name: str
    fingerprint: str  # its beginning
    files: tuple[Path, ...]
    size: int
    used: float  # seconds since the epoch

    @property
    def record(self) -> Path | None:
        """The file without which there is no entry."""
        return next((path for path in self.files if path.suffix == ".json"), None)


def described(found: Collection[Entry]) -> str:
    """How many and how large, in words."""
    kernels, size = sum(entry.record is not None for entry in found), sum(entry.size for entry in found)
    return f"{kernels:,} kernel{'' if kernels == 1 else 's'}, {size / 2**20:,.1f} MiB"


def size_limit() -> int:
    """How many bytes the cache may hold: ``$CUTE_ATTN_CACHE_SIZE``, such as ``500M``. Raises ``ValueError`` for what isn't."""
    text = os.environ.get(CACHE_SIZE_VARIABLE) or SIZE_DEFAULT
    found = SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{CACHE_SIZE_VARIABLE} is {text!r}; a number of bytes is needed, such as 500M or {SIZE_DEFAULT}")
    return int(found[1]) * UNITS[found[2].upper()]


def entries(folder: Path) -> list[Entry]:
    """What is in the cache; nothing where there is no folder."""
    found: dict[tuple[str, str], list[Path]] = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            if ours := OURS.fullmatch(path.name):
                found.setdefault((ours["name"], ours["of"]), []).append(path)
    return [_entry(*names, files) for names, files in found.items()]


def evict(folder: Path, limit: int, fingerprint: str, spared: str) -> list[Entry]:
    """Bring the folder below the limit, but for the entry ``spared``; what was removed."""
    now, found = time.time(), entries(folder)
    gone = [entry for entry in found if not entry.record and entry.used < now - DAY_SECONDS and entry.name != spared]
    total = sum(entry.size for entry in found) - sum(entry.size for entry in gone)
    if total > limit:
        whole = [entry for entry in found if entry.record and entry.name != spared]
        for entry in sorted(whole, key=lambda entry: (fingerprint.startswith(entry.fingerprint), entry.used)):
            if total <= limit:
                break
            total -= entry.size
            gone.append(entry)
    remove(gone)
    return gone


def remove(gone: Iterable[Entry]) -> None:
    """Remove entries, as far as the folder lets one; raises the last ``OSError`` met."""
    failed = None
    for entry in gone:
        log.debug("removed %s: %d bytes", entry.name, entry.size)
        for path in sorted(entry.files, key=lambda path: path != entry.record):
            try:
                _remove(path)
            except OSError as error:
                failed = error
    if failed:
        raise failed


def mark_used(record: Path) -> None:
    """Note that an entry is in use, once a day at most. Its time of access is what the system itself notes, or doesn't."""
    with suppress(OSError):  # someone else's, or on a disk that is read-only: then it isn't removed from here either
        found = record.stat()
        if found.st_atime < time.time() - DAY_SECONDS:
            os.utime(record, ns=(time.time_ns(), found.st_mtime_ns))


def _entry(name: str, fingerprint: str, files: list[Path]) -> Entry:
    size, used = 0, 0.0
    for path in files:
        for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
            with suppress(FileNotFoundError):  # another process has removed it
                found = part.stat()
                size += found.st_size
                used = max(used, found.st_mtime, found.st_atime if part.suffix == ".json" else 0.0)
    return Entry(name, fingerprint, tuple(files), size, used)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
