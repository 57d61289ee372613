"""Reading cubins: the parser on what the tools print, and one kernel compiled for real."""

from __future__ import annotations

from importlib import metadata

import pytest

from cute_attn import cubin, machine
from cute_attn.plan import plan
from cute_attn.problem import Problem

RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel_attention_0:
  REG:168 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:1380 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90a
	.target	sm_90a

		Function : kernel_attention_0
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P1 BRA 0x230 ;                                 /* 0x00000000006c1947 */
        /*0020*/             @!UP0 UIADD3 UR4, -UR4, 0x100000, URZ ;           /* 0x000fc8000fffe13f */
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
        /*0050*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR24], R24 ;
        /*0060*/                   STL.64 [R1+0x8], R2 ;
        /*0070*/               @P0 LDL.LU R3, [R1+0x8] ;
        /*0080*/                   LDL R3, [R1+0xc] ;
        /*12340*/                  EXIT ;
        /*12350*/                  BRA 0x12350;
"""


def test_parser():
    found = cubin.parse(RESOURCES, SASS)
    assert (found.registers, found.stack_bytes, found.local_bytes, found.static_smem_bytes) == (168, 8, 16, 1024)
    assert found.instructions == {
        "HGMMA.64x128x16.F32.BF16": 2,
        "HGMMA.64x256x16.F32.BF16": 1,
        "BRA": 2,
        "LDC": 1,
        "UIADD3": 1,
        "STL.64": 1,
        "LDL.LU": 1,
        "LDL": 1,
        "EXIT": 1,
    }
    assert (found.count("HGMMA"), found.count("HMMA"), found.spill_stores, found.spill_loads, found.size) == (3, 0, 1, 2, 11)


def test_one_of_several_kernels():
    """The backward pass has three in a cubin: picked by a part of the name."""
    resources = RESOURCES + RESOURCES.split("GLOBAL:0", 1)[1].replace("attention_0", "cast_1").replace("REG:168", "REG:32")
    sass = SASS + "\t\tFunction : kernel_cast_1\n        /*0000*/                   EXIT ;\n"
    assert cubin.parse(resources, sass, "attention") == cubin.parse(RESOURCES, SASS)
    assert cubin.parse(resources, sass, "cast").registers == 32
    assert cubin.parse(resources, sass, "cast").instructions == {"EXIT": 1}
    with pytest.raises(RuntimeError, match="lists 0 kernels of delta; 1 is needed"):
        cubin.parse(resources, sass, "delta")
    with pytest.raises(RuntimeError, match="lists 2 kernels of kernel_; 1 is needed"):
        cubin.parse(resources, sass, "kernel_")


def test_a_mnemonic_is_counted_whole():
    found = cubin.parse(RESOURCES, "  /*0000*/  LDSM.16.M88.4 R4, [R2] ;\n  /*0010*/  LDS.128 R4, [R2] ;\n")
    assert (found.count("LDS"), found.count("LDSM"), found.count("LD")) == (1, 1, 0)


@pytest.mark.parametrize(
    ("resources", "sass", "message"),
    [
        ("nothing", SASS, "lists 0 kernels; 1 is needed"),
        (RESOURCES + RESOURCES.split("GLOBAL:0", 1)[1], SASS, "lists 2 kernels; 1 is needed"),
        (RESOURCES.replace("STACK:8", ""), SASS, "isn't understood"),
        (RESOURCES, "", "isn't understood"),
    ],
)
def test_output_that_is_not_understood(resources, sass, message):
    with pytest.raises(RuntimeError, match=message):
        cubin.parse(resources, sass)


def test_missing_tools_are_named(monkeypatch, tmp_path):
    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", nothing)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotImplementedError, match=r"cuobjdump is not installed.*pip install 'cute-attn\[test\]'"):
        cubin.inspect(Problem("bfloat16", 32, 32), plan(Problem("bfloat16", 32, 32), "sm_80"))


def test_tools_on_the_path_serve_too(monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "files", lambda name: None)
    for name in ("cuobjdump", "nvdisasm"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cubin.tools() == (tmp_path / "cuobjdump", tmp_path / "nvdisasm")


@pytest.mark.skipif(bool(machine.missing()), reason=f"{machine.missing()} not installed")
def test_a_file_that_is_no_cubin(tmp_path):
    (tmp_path / "x.cubin").write_bytes(b"not ELF")
    with pytest.raises(RuntimeError, match=r"cuobjdump .*x\.cubin failed"):
        cubin.read(tmp_path / "x.cubin")


@pytest.mark.skipif(bool(machine.missing()), reason=f"{machine.missing()} not installed")
def test_a_real_kernel():
    problem = Problem("bfloat16", 32, 32)
    config = plan(problem, "sm_80")
    found = cubin.inspect(problem, config)
    # Unrolled, the first tile and the loop: S takes tile_m/16 × tile_n/8 × tile_d/16 MMAs over the warps, O as many.
    once = config.tile_m * config.tile_n * (config.tile_d + config.tile_dv) // (16 * 8 * 16) // config.mma_warps
    assert found.count("HMMA") > 0
    assert found.count("HMMA") % once == 0
    assert found.count("HGMMA") == 0
    assert found.count("LDGSTS") > 0
    assert 0 < found.registers <= 255
    assert found.spill_stores == found.spill_loads == 0
