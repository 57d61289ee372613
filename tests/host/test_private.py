"""Names that torch and the DSL don't promise to keep: which release lacks one, and that they stand in one module."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from cute_attn import private

ROOT = Path(__file__).parents[2]
OTHERS = ("torch", "cutlass", "tvm_ffi", "cuda")
# Names with an underscore that torch's own documentation and messages tell users to set.
FOR_USERS = ("torch._dynamo.config", "torch._functorch.config")


def imported_anew():
    """The module as a process finds it with torch as it now is."""
    spec = spec_from_file_location("private_anew", private.__file__)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def holder_of(path: str):
    module, _, name = path.rpartition(".")
    return import_module(module), name


@pytest.fixture
def with_cuda(monkeypatch):
    """A torch that has the names of a build with CUDA, whichever it is."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.setattr(torch._C, name, lambda *_: 0, raising=False)


def test_this_torch_has_them_all(with_cuda):
    """The import says which one a release lacks; what is left is that each is what it is taken for."""
    module = imported_anew()
    assert len(module.NAMES) == len(set(module.NAMES)) == 12
    assert module.any_autocast_enabled() is False
    assert module.dispatch_modes() == 0
    assert module.transforms_active() is False
    assert module.dual_level() == -1
    with torch.autocast("cpu"):
        assert module.any_autocast_enabled() is True
    with torch.autograd.forward_ad.dual_level():
        assert module.dual_level() == 0
    assert torch.func.vmap(lambda x: x * module.transforms_active())(torch.ones(1)) == 1
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert module.dispatch_modes() == 1


@pytest.mark.parametrize(
    "path",
    [
        "torch._C._is_any_autocast_enabled",
        "torch._C._are_functorch_transforms_active",
        "torch.autograd.forward_ad._current_level",
        "torch._C._functorch.is_batchedtensor",
        "torch._C._functorch.is_functorch_wrapped_tensor",
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.functional_tensor.FunctionalTensor",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._cuda_getDevice",
        "torch._C._cuda_getCurrentRawStream",
        "torch._C._dynamo.guards._empty_strided_cuda",
    ],
)
def test_a_release_of_torch_that_lacks_one_is_told(path, with_cuda, monkeypatch):
    monkeypatch.delattr(*holder_of(path))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(ImportError, match=rf"torch 9\.9\.9 has no {re.escape(path)}, which tells cute-attn .*: try"):
        imported_anew()


def test_a_torch_without_cuda_lacks_nothing(monkeypatch):
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.delattr(torch._C, name, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    module = imported_anew()
    for function in (module.current_device, module.raw_stream, module.empty_strided):
        with pytest.raises(NotImplementedError, match="built without CUDA"):
            function(0)


def test_this_dsl_has_them_all():
    cutlass = pytest.importorskip("cutlass")
    protocol = import_module("cutlass.base_dsl.typing").DynamicExpression
    for name in private.DSL_NAMES:
        assert hasattr(protocol, name), f"the DSL {cutlass.__version__} has no {name}"
        assert hasattr(private.NoRunTimeValues, name)


def private_names(text: str) -> set[str]:
    """The names of others with a component that begins with an underscore, as a source imports or spells them out."""
    tree, known, found = ast.parse(text), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                known[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                found.add(name.name)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                found.add(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts, inner = [inner.attr, *parts], inner.value
        if parts and isinstance(inner, ast.Name):
            found.add(".".join([known.get(inner.id, inner.id), *parts]))
    found = {name for name in found if name.split(".")[0] in OTHERS and re.search(r"\._[^_]", name)}
    found -= {name.rpartition(".")[0] for name in found}  # torch._C of torch._C.thing
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return found | defined & set(private.DSL_NAMES)


def test_what_counts_as_a_private_name():
    text = """
import torch, torch._dynamo.config
from torch.autograd import forward_ad as ad
from torch._C import thing
class A:
    def __extract_mlir_values__(self): return torch.__version__, self._own, torch.ok
print(torch._C._one(), ad._current_level)
"""
    assert private_names(text) == {
        "torch._dynamo.config",
        "torch._C.thing",
        "torch._C._one",
        "torch.autograd.forward_ad._current_level",
        "__extract_mlir_values__",
    }


@pytest.mark.parametrize("package", ["cute_attn", "layouts", "benchmarks"])
def test_they_stand_in_one_module(package):
    users = {}
    for path in (ROOT / package).rglob("*.py"):
        names = {name for name in private_names(path.read_text(encoding="utf-8")) if not name.startswith(FOR_USERS)}
        if names and path != Path(private.__file__):
            users[path.relative_to(ROOT).as_posix()] = sorted(names)
    assert users == {}, "import them from cute_attn/private.py"
