"""A compile cache of a test's own, and a kernel to put in it. The fixtures are in ``conftest.py``."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from cute_attn import compile
from cute_attn.cache import CACHE_DIR_VARIABLE
from cute_attn.plan import plan
from cute_attn.problem import Problem

# Lists of tiles: of all kernels the one that is compiled soonest, in a tenth of the time of attention's smallest. How long it
# takes is all that it differs in here; test_cli.py fills a cache with kernels of attention.
PROBLEM = Problem("bfloat16", 32, 32, blocks="query lists")
CONFIG = plan(PROBLEM, "sm_80", "cp_async")
NAME = compile.entry_name(PROBLEM, CONFIG)

# How a process that knows nothing of these tests asks for the kernel.
ASK = """
from cute_attn import compile
from cute_attn.cache import CACHE_DIR_VARIABLE
from cute_attn.plan import plan
from cute_attn.problem import Problem
problem = Problem("bfloat16", 32, 32, blocks="query lists")
config = plan(problem, "sm_80", "cp_async")
function = compile.compiled(problem, config)
assert callable(function)
"""


class Cache(NamedTuple):
    """A cache of a test's own, and what was asked of the compiler."""

    folder: Path
    asked: list

    def path(self, suffix: str) -> Path:
        return self.folder / f"{NAME}{suffix}"

    def forget(self) -> None:
        """As a new process would find it: with nothing in memory."""
        compile._memory.clear()


def works(function) -> bool:
    """Whether it is the kernel: called with nothing, it says what it takes."""
    with pytest.raises(TypeError, match=r"when calling: `enlist\("):
        function()
    return True


def hit(cache: Cache) -> bool:
    """Whether the kernel is found on disk, without a warning."""
    before = len(cache.asked)
    cache.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(compile.compiled(PROBLEM, CONFIG))
    return len(cache.asked) == before


def files(folder: Path) -> set[str]:
    """What lies in a cache."""
    return {path.name for path in folder.iterdir()}


def assert_warned(made: Cache, *words: str) -> None:
    """One warning, that has the words and the remedy in it; a kernel all the same, and no second warning for another one."""
    with pytest.warns(RuntimeWarning) as caught:
        function = compile.compiled(PROBLEM, CONFIG)
    assert callable(function)
    assert len(made.asked) == 1
    assert len(caught) == 1
    message = str(caught[0].message)
    for word in (*words, f"set {CACHE_DIR_VARIABLE} to a folder"):
        assert word in message
    assert compile.compiled(PROBLEM, CONFIG) is function  # kept in memory at least
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(compile.compiled(replace(PROBLEM, softcap=True), CONFIG))
    assert len(made.asked) == 2
