"""What the parts of the package know of one another, read from their import statements."""

import ast
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from tests.host.processes import run_quick

PACKAGE = Path(importlib.util.find_spec("cute_attn").origin).parent
# The mainloops' files. What a row may see is known in common.py and walk.py, what changes a score in scores.py and elements.py.
DOORS = ("__init__.py", "common.py", "walk.py", "scores.py", "elements.py")
MAINLOOPS = [path for path in sorted((PACKAGE / "mainloop").glob("*.py")) if path.name not in DOORS]
OF_SEVERAL = (
    *("adders", "beside", "cluster", "guard", "unused_rows", "warps", "warpgroups", "work_queue"),
    *("wide_keys", "wide_queries", "cp_async_cache", "cache_merge"),
)
SHARED = {f"mainloop.{name}" for name in OF_SEVERAL}
# Where the rules are, and what sequences of different lengths are on the host.
UNKNOWN = {"rules", "lengths", "problem", "api", "ops", "autograd", "wrapped", "reference", "launch", "plan"}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, without the package's own name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cute_attn":
            inside = node.module.split(".")[1:]
            found |= {".".join(inside)} if inside else {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("cute_attn.")}
    return found


def test_imported(tmp_path):
    file = tmp_path / "x.py"
    text = "import os\nimport cute_attn.plan\nfrom cute_attn import rules, launch\nfrom cute_attn.layouts.base import x\n"
    file.write_text(text)
    assert imported(file) == {"plan", "rules", "launch", "layouts.base"}


@pytest.mark.parametrize("path", MAINLOOPS, ids=lambda path: path.stem)
def test_mainloops_know_neither_rules_nor_lengths(path):
    assert not imported(path) & UNKNOWN
    names = {name.id for name in ast.walk(ast.parse(path.read_text())) if isinstance(name, ast.Name)}
    assert not names & {"cu_seqlens", "seqused", "Sequences", "Band"}
    attributes = {name.attr for name in ast.walk(ast.parse(path.read_text())) if isinstance(name, ast.Attribute)}
    assert not attributes & {"softcap", "large_cap", "scale_by_cap"}


@pytest.mark.parametrize("path", MAINLOOPS, ids=lambda path: path.stem)
def test_mainloops_do_not_import_each_other(path):
    mechanisms = {f"mainloop.{other.stem}" for other in MAINLOOPS} - SHARED
    assert not imported(path) & mechanisms


def test_a_class_name_means_one_thing():
    """But for the names by which mechanisms are found."""
    folders = PACKAGE, *importlib.util.find_spec("cute_attn.layouts").submodule_search_locations
    files = {path.resolve() for folder in folders for path in Path(folder).rglob("*.py")}
    trees = (ast.walk(ast.parse(path.read_text())) for path in files)
    names = Counter(node.name for tree in trees for node in tree if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} == {"Forward", "Backward"}


def test_interfaces_of_others_are_imported_when_they_are_asked_for():
    program = """
import sys
import cute_attn
names = {"distributed", "flash_attn", "sdpa", "transformers"}
assert names == set(cute_attn._INTERFACES)
assert not {f"cute_attn.{name}" for name in names} & set(sys.modules)
assert cute_attn.sdpa.replaced and cute_attn.flash_attn.install and cute_attn.transformers.register
assert cute_attn.distributed.shard
assert "cutlass" not in sys.modules and "flash_attn" not in sys.modules and "transformers" not in sys.modules
print(hasattr(cute_attn, "attention_of_no_kind"))
"""
    ran = run_quick(program)
    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
