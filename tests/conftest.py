"""How the tests share a machine where they run in several processes (pytest-xdist): its cores, and what is costly to make.

``make test`` starts them; ``python -m pytest FILE`` is one process, as debuggers need it.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import hypothesis
import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported, here and in the processes that tests start: threads of many would take turns
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
hypothesis.settings.register_profile("busy", deadline=None)  # a machine may be busy: no example is too slow
hypothesis.settings.load_profile("busy")


def pytest_collection_finish():
    """What is there by now stays: the garbage collector needn't look at all modules and thousands of tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run, the same for all its processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if WORKERS > 1 else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def lists_on_the_cpu(monkeypatch):
    """Where a block mask lies on the CPU, which no kernel reads, tests have its lists made in Python."""
    from cute_attn import launch
    from tests import lists

    kernel = launch.enlist
    monkeypatch.setattr(launch, "enlist", lambda *of: (kernel if of[1].is_cuda else lists.enlist)(*of))
