"""The command line: what it says of this machine, filling a cache, and names it does not know."""

from __future__ import annotations

import sys
from concurrent.futures import Future

import pytest
from rich.console import Console

from cute_attn import demo, fill, layouts, machine
from cute_attn.__main__ import main
from cute_attn.cache import CACHE_DIR_VARIABLE
from tests.host.processes import run_quick

needs_dsl = pytest.mark.skipif(bool(machine.missing()), reason=f"{machine.missing()} not installed")
CHEAP = ["compile", "--arch", "sm_80", "--head-dim", "32", "--causal"]  # with and without the LSE: two kernels


def usage_error(capsys, *arguments: str) -> str:
    """What a refused command line says; its exit status is 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    name = f"cp_async_sm_80_bfloat16_d64_{12 * 'a'}_{24 * 'b'}"
    (tmp_path / f"{name}.json").write_text("{}")
    (tmp_path / f"{name}.so").write_bytes(b"x")
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 kernel, 0.0 MiB" in said
    assert str(tmp_path) in said.replace(" ", "")
    for package in machine.PACKAGES:
        assert package in said
    assert f"backend {machine.backend()[0]}" in said


def test_info_of_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "GPU none; kernels can be compiled here for sm_100" in said
    assert "backend reference" in said


def test_info_of_other_libraries(capsys, monkeypatch):
    """Installed, not installed, and there without a version; none of them is imported for it."""
    monkeypatch.setattr(machine, "_version", {"flash-attn": "2.7.4", "torch": None}.get)
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "transformers" else sys)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it now fails
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "flash-attn flash-attn 2.7.4 (cute_attn.flash_attn: its functions; install() puts them in its place)" in said
    assert "Transformers transformers not installed (its models can run on attention)" in said
    assert "SDPA torch installed, of no known version (cute_attn.sdpa: torch's function" in said


class FakeGpu:
    total_memory = 16 * 2**30
    name = "a GPU"

    def __init__(self, capability: tuple[int, int]) -> None:
        self.major, self.minor = capability


@pytest.fixture
def gpu(monkeypatch):
    """Let torch see one GPU of a capability."""

    def see(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(machine.torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(machine.torch.cuda, "get_device_properties", lambda index: FakeGpu(capability))

    return see


def test_info_of_a_hopper_gpu(capsys, gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(machine, "missing", list)
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a GPU, 16 GiB, capability 9.0: sm_90a, layouts/sm90.py, tma_wgmma or cp_async" in said
    assert "backend cute: a GPU runs tma_wgmma" in said


def test_a_gpu_that_no_module_serves(gpu, monkeypatch):
    gpu((7, 0))
    monkeypatch.setattr(machine, "missing", list)
    assert machine.backend()[0] == "reference"
    assert "compute capability 7.0; there are kernels for 8.0" in machine.backend()[1]


def test_a_gpu_without_the_dsl(gpu, monkeypatch):
    gpu((8, 0))
    monkeypatch.setattr(machine, "missing", lambda: ["nvidia-cutlass-dsl"])
    backend, why = machine.backend()
    assert backend == "reference"
    assert "nvidia-cutlass-dsl not installed: try pip install 'cute-attn[cu13]'" in why
    assert "ask for it with backend='reference'" in why


@needs_dsl
def test_compile_fills_a_cache_that_is_then_read_without_the_dsl(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    assert main([*CHEAP, "-j", "2"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert first[0] == f"2 kernels for {tmp_path}"
    assert sorted(line.split("(")[1] for line in first[1:3]) == ["bounded right)", "bounded right, return lse)"]
    assert first[-1].startswith("2 compiled in ")
    program = f"import sys; from cute_attn.__main__ import main; main({CHEAP!r}); print('cutlass' in sys.modules)"
    again = run_quick(program, **{CACHE_DIR_VARIABLE: str(tmp_path)}).stdout.splitlines()
    assert again[-2].startswith("2 hit in ")
    if list(tmp_path.glob("*.so")):  # an object, where there is no linker, is loaded by the DSL
        assert again[-1] == "False"


def test_a_kernel_that_fails_is_reported_and_the_others_go_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    seen = []

    def compiled(problem, config):
        seen.append(problem)
        if problem.return_lse:
            raise RuntimeError("no registers left")

    monkeypatch.setattr(fill, "compiled", compiled)
    assert main([*CHEAP, "-j", "1"]) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no registers left" in said
    assert "1 not kept, 1 failed" in said
    assert len(seen) == 2


def test_a_kernel_that_is_not_kept_is_a_failure(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fill, "compiled", lambda problem, config: None)
    assert main([*CHEAP, "-j", "1"]) == 1
    assert "2 not kept in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ([], 4),
        (["--no-lse"], 2),
        (["--all"], 16),
        (["--all", "--lse"], 8),
        (["--window-left", "--window-right", "--softcap"], 2),
        (["--causal", "--lse"], 1),
        (["--causal", "--lse", "--gradients"], 3),
        (["--gradients"], 10),
        (["--dtype", "float16", "bfloat16"], 8),
        (["--head-dim", "64", "128", "192", "--head-dim-v", "128"], 12),
        (["--arch", "sm_80", "sm_90a"], 8),
        (["--arch", "sm_90a", "--mechanism", "cp_async"], 4),
    ],
)
def test_what_options_ask_for(capsys, monkeypatch, options, kernels):
    asked = []
    monkeypatch.setattr(fill, "fill", lambda pairs, workers: asked.extend(pairs) or iter(()))
    assert main(["compile", "--arch", "sm_80", "--head-dim", "64", *options]) == 0
    assert len(asked) == len(set(asked)) == kernels


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError])
def test_the_demo_goes_on_without_kernels(error):
    """What a machine lacks is said once, and is no failure; what stopped a kernel's compilation is one, for each."""
    kernels, summary = {name: Future() for name in demo.TARGETS}, demo.Summary()
    for future in kernels.values():
        future.set_exception(error("no tool"))
    demo._compiled(Console(quiet=True), summary, kernels)
    if error is NotImplementedError:
        assert (summary.lines, summary.left_out) == ([], ["what the compiler makes of the kernels: no tool"])
    else:
        assert (len(summary.lines), summary.left_out) == (len(kernels), [])
    assert summary.failed is (error is RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["frobnicate"], ["info", "compile", "demo"]),
        (["compile", "--arch", "sm_70"], layouts.known_targets()),
        (["compile", "--arch", "sm_80", "--mechanism", "magic"], ["tma_wgmma", "cp_async"]),
        (["compile", "--arch", "sm_80", "--mechanism", "tma_wgmma"], ["sm_80 has 'cp_async'"]),
        (["compile", "--arch", "sm_80", "--dtype", "float32"], ["float16", "bfloat16"]),
        (["compile", "--arch", "sm_80", "--head-dim", "100"], ["--head-dim: got '100'; a multiple of 8 from 8 to 256"]),
        (["compile", "--arch", "sm_80", "--head-dim-v", "0"], ["--head-dim-v: got '0'; a multiple of 8 from 8 to 256"]),
        (["compile", "--arch", "sm_80", "-j", "0"], ["--jobs: got '0'; a whole number of at least 1"]),
        (["compile", "--arch", "sm_80", "--all", "--causal"], ["leave out --causal"]),
    ],
)
def test_names_and_values_that_can_not_be(capsys, arguments, known):
    said = usage_error(capsys, *arguments)
    assert "error:" in said
    for name in known:
        assert name in said


def test_without_a_gpu_the_arch_is_needed(capsys, monkeypatch):
    monkeypatch.setattr(machine, "devices", list)
    assert "--arch is needed where there is no GPU: one or more of sm_100" in usage_error(capsys, "compile")
