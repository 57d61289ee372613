"""What this process's kernels come from: the package's sources as they were imported, and the versions of what compiles them.

A process may live through an upgrade of the package. The DSL traces a kernel from the text of its functions, which it reads
from the files at that time, and mainloops are imported when the first kernel is traced: both would be of the new version, and
the rest of the process of the old one. So the files' times and sizes are noted when the package is imported, by this module
before any other is. While they are unchanged,

- the files are read, once, which makes the fingerprint;
- before the first kernel is traced, all that kernels consist of is imported.

From then on the DSL is given the text that was read, and kernels are what their names say, whatever becomes of the files.
Where files change earlier, :class:`Changed` is raised instead.
"""

from __future__ import annotations

import hashlib
import linecache
import pkgutil
import platform
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, find_spec
from io import StringIO
from pathlib import Path
from types import ModuleType

COMPILER = "nvidia-cutlass-dsl"
VERSIONED = (
    COMPILER,
    "nvidia-cutlass-dsl-libs-cu12",  # which of the two is there decides which CUDA's compiler is used
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
    "cuda-python",
    "torch",
)
# What no kernel is made from, so that a change to a picture makes no other kernel: how layouts are proved and drawn, the
# command line, what several ranks do, the interfaces of others, and functions that are traced. All other files count.
APART_FOLDERS = {"distributed", "tools"}
APART = {
    "layouts": {"__main__.py"},
    "cute_attn": {
        *("__main__.py", "command.py", "cubin.py", "demo.py", "fill.py", "machine.py"),
        *("flash_attn.py", "sdpa.py", "transformers.py", "masks.py", "scores.py"),
    },
}


class Changed(RuntimeError):  # noqa: N818
    """The package's files are not those that this process imported."""


def _folders() -> list[Path]:
    """Where the package's sources lie. In an editable installation the layouts are not inside."""
    package, layouts = Path(__file__).parent, find_spec("cute_attn.layouts")
    outside = [Path(folder) for folder in (layouts and layouts.submodule_search_locations) or []]
    return [package, *(folder for folder in outside if not folder.is_relative_to(package))]


def _stamps() -> dict[Path, tuple[int, int]]:
    """Each source's time and size, by which Python, too, tells whether what it keeps compiled is still the same."""
    stamps = {}
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            with suppress(FileNotFoundError):  # an editor's
                found = path.stat()
                stamps[path] = (found.st_mtime_ns, found.st_size)
    return stamps


_FOLDERS = _folders()
_IMPORTED = _stamps()
_outside: dict[ModuleType, dict[Path, bytes]] = {}  # registered modules that are not the package's


# ---- names ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Whatever a kernel's code depends on besides its problem and config, as one hash."""
    made_of = {path: text for path, text in _texts().items() if not is_apart(path)}
    digest = hashlib.sha256(_digest(_FOLDERS, made_of))
    for name, version in versions().items():
        digest.update(f"{name}={version}\n".encode())
    digest.update(f"{sys.version_info[:2]} {platform.system()} {platform.machine()}".encode())
    return digest.hexdigest()


def is_apart(path: Path) -> bool:
    """Whether no kernel is made from a file of the package."""
    folder = path.parent.name
    return folder in APART_FOLDERS or path.name in APART.get(folder, ())


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The version and folder of each package in :data:`VERSIONED`, as they were when this was first asked."""
    return {name: _installed(name) for name in VERSIONED}


def other_compiler() -> str | None:
    """The DSL that this process has imported, in words, if it is not the one of :func:`fingerprint`."""
    version = getattr(sys.modules.get("cutlass"), "__version__", None)
    named = versions()[COMPILER].partition(" ")[0]
    return f"{COMPILER} {version}" if version and version != named else None


def note(modules: Iterable[ModuleType]) -> None:
    """Read the sources of modules that were imported just now and don't belong to the package."""
    for module in modules:
        _text_of(module)


def fingerprint_of(modules: Iterable[ModuleType]) -> str:
    """What :func:`fingerprint` is for the package, for modules that don't belong to it."""
    return hashlib.sha256(b"".join(text for module in modules for text in _text_of(module).values())).hexdigest()


def _digest(folders: Iterable[Path], texts: Mapping[Path, bytes]) -> bytes:
    """A hash of the files' names and texts, wherever the folders lie."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in texts if path.is_relative_to(folder)):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + texts[path])
    return digest.digest()


def _text_of(module: ModuleType) -> dict[Path, bytes]:
    """A module's file and its text when first asked; empty for the package's own and for one without a file."""
    if module not in _outside:
        path = Path(getattr(module, "__file__", None) or "")
        ours = any(path.is_relative_to(folder) for folder in _FOLDERS)
        _outside[module] = {} if ours or not path.is_file() else {path: path.read_bytes()}
    return _outside[module]


def _installed(name: str) -> str:
    """A package's version and folder. The folder keeps environments apart that share a cache: an entry made in one names
    its libraries, and a process that loads two copies of the launcher's aborts."""
    with suppress(metadata.PackageNotFoundError):
        found = metadata.distribution(name)
        return f"{found.version} in {found.locate_file('')}"
    return "absent"


# ---- text ----------------------------------------------------------------------------------------------------------


def hold() -> None:
    """Before a kernel is traced: give the DSL the text that was imported. It asks ``inspect``, and that ``linecache``.

    Raises :class:`Changed` where files changed before the first kernel was traced, or a module was imported anew since.
    """
    for name, spec in _parts().items():
        if name in sys.modules and sys.modules[name].__spec__ is not spec:
            raise Changed(f"{name} was imported anew after kernels had been compiled: restart the process")
    linecache.cache.update(_lines(_texts()))
    for texts in _outside.values():
        linecache.cache.update(_lines(texts))


@lru_cache(maxsize=1)
def _parts() -> dict[str, ModuleSpec | None]:
    """All that kernels consist of, imported."""
    _texts()
    mainloops = import_module("cute_attn.mainloop")
    for name in import_module("cute_attn.fields").TABLES:
        import_module(f"cute_attn.{name}")
    for found in pkgutil.iter_modules(mainloops.__path__):
        import_module(f"{mainloops.__name__}.{found.name}")
    _check_unchanged()
    return {name: module.__spec__ for name, module in sys.modules.items() if name.split(".")[0] == "cute_attn"}


@lru_cache(maxsize=1)
def _texts() -> dict[Path, bytes]:
    """The package's sources."""
    texts = {path: path.read_bytes() for path in _IMPORTED if path.is_file()}
    _check_unchanged()
    return texts


def _check_unchanged() -> None:
    stamps = _stamps()
    changed = sorted(path for path in stamps.keys() | _IMPORTED if stamps.get(path) != _IMPORTED.get(path))
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise Changed(
            f"cute_attn was changed or upgraded after this process had imported it ({changed[0]}{others}); a kernel that was "
            f"compiled now would be half of either version: restart the process"
        )


def _lines(texts: Mapping[Path, bytes]) -> dict[str, tuple[int, None, list[str], str]]:
    """Entries of ``linecache``; those without a time are never compared with the file."""
    lines = {str(path): list(StringIO(decode_source(text))) for path, text in texts.items()}
    return {path: (len(found), None, found, path) for path, found in lines.items()}
