"""Fixtures of several modules: a compile cache of a test's own, with a compiler that only counts."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Hashable
from pathlib import Path

import pytest
import torch

from cute_attn import api, cache, compile, kvcache, launch, serve
from cute_attn.sources import fingerprint
from tests.host.compile_cache import CONFIG, NAME, PROBLEM, Cache, files, works
from tests.host.processes import quick


def pytest_collection_modifyitems(items):
    """The tests of a compiled kernel stand together: whoever takes over half of a worker's tests has kernels of its own to
    compile, instead of waiting for the other's."""
    place: dict[Hashable, int] = {}

    def group(item) -> Hashable:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return item if case is None or not {"kernel", "kernels"} & set(item.fixturenames) else (item.path, str(case))

    items.sort(key=lambda item: place.setdefault(group(item), len(place)))


@pytest.fixture(autouse=True)
def memory_of_the_cpu(monkeypatch):
    """For whoever says that a tensor lies on a GPU: tensors' number is −1 here, and so is that of the current device. How such
    calls were planned is of each test alone."""
    monkeypatch.setattr(api, "_kept", {})
    monkeypatch.setattr(kvcache, "_steps", {})
    for module in (launch, serve):
        monkeypatch.setattr(module, "current_device", lambda: -1)
        monkeypatch.setattr(module, "raw_stream", lambda device: 0)
        monkeypatch.setattr(module, "empty_strided", lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype))


@pytest.fixture(scope="module")
def one_thread():
    """Of torch, for tests of small tensors: more take as much time in all, and far more where others use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick_processes(monkeypatch):
    """Whoever asks multiprocessing for fresh processes gets quick ones. How they are started is not what such a test is of."""
    context = quick()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.fixture(scope="session")
def kernel():
    """The compiler's function, really compiled: a kernel for an A100, which needs no GPU until it is called."""
    pytest.importorskip("cutlass")
    return compile.compile_only(PROBLEM, CONFIG)


@pytest.fixture(scope="session")
def entry(kernel, tmp_path_factory) -> Path:
    """A folder with a right entry in it."""
    folder = tmp_path_factory.mktemp("entry")
    assert works(cache.keep(folder, NAME, kernel, fingerprint()))
    assert files(folder) == {f"{NAME}.so", f"{NAME}.json"}
    return folder


@pytest.fixture
def cold(kernel, tmp_path, monkeypatch) -> Cache:
    """An empty cache, and a compiler that only counts."""
    made = Cache(tmp_path / "cache", [])

    def compile_only(*key):
        made.asked.append(key)
        return kernel

    monkeypatch.setenv(cache.CACHE_DIR_VARIABLE, str(made.folder))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(compile, "_memory", {})
    monkeypatch.setattr(compile, "compile_only", compile_only)
    return made


@pytest.fixture
def warm(cold, entry) -> Cache:
    """The same with the entry in it."""
    shutil.copytree(entry, cold.folder)
    return cold
