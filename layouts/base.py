"""The contract of a GPU's layouts, and the two records it speaks in.

A **GPU module** (``sm80.py``, ``sm90.py``, …) is data. It defines

- ``GPU``: a :class:`Gpu`, its limits and the compute capabilities it serves;
- ``MECHANISMS``: the names of the mechanisms it can run, best first, each with the **family module** that lays out its
  operands (``mma_sync``, ``wgmma``);
- ``configs(problem, mechanism)``: the configurations for a problem, best first, from the module's tables.

A **family module** is the layouts of one family of instructions. It defines, as plain functions of a :class:`Config`,

- ``tile_dims(head_dim)``: the columns a head takes in shared memory;
- ``smem_bytes(config)`` and ``accumulator_registers(config)``: what a block takes, for the plan, without the DSL;
- ``tiled_mma(role, config)``: role ``"S"`` (Q·Kᵀ) or ``"O"`` (P·V);
- ``smem_layout(operand, config)``: operand ``"Q"``, ``"K"``, ``"V"`` or ``"O"``;
- ``copy_in(operand, config)``, ``copy_out(operand, config)``: global → shared and shared → global copies.

Only the last four import the DSL, and only when called.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of one element: the kernels take float16 and bfloat16
KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits, from the CUDA C++ programming guide's table of compute capabilities.

    ``targets`` maps a compute capability to the name the compiler takes for it.
    """

    name: str
    targets: dict[tuple[int, int], str]
    smem_per_block: int
    smem_per_multiprocessor: int
    registers_per_multiprocessor: int = 65536
    registers_per_thread: int = 255
    threads_per_block: int = 1024


@dataclass(frozen=True)
class Config:
    """How a problem is computed: with a :class:`~cute_attn.problem.Problem`, the key of a compiled kernel.

    ``tile_d`` and ``tile_dv`` are the head dims as they lie in shared memory, padded to what the copies and the tensor
    cores take; the padding exists there only.
    """

    target: str  # what the compiler is told: "sm_90a"
    mechanism: str  # "tma_wgmma" or "cp_async"
    dtype: str
    tile_m: int  # query rows a block holds
    tile_n: int  # key rows it copies at a time
    tile_d: int  # columns of Q and K
    tile_dv: int  # columns of V and O
    stages: int  # K tiles (and as many V tiles) in flight
    mma_warps: int  # warps that compute; each warp (or warpgroup) owns whole rows
    blocks_per_multiprocessor: int = 1
    # tma_wgmma only
    mma_registers: int = 0  # registers a thread of a computing warpgroup has after setmaxnreg
    copy_registers: int = 0  # and of the copying one
    ping_pong: bool = False  # warpgroups take turns on the tensor cores
    separate_o: bool = False  # O has shared memory of its own, so that the next Q can arrive before O has left
    rescale_early: bool = False  # O is rescaled while Q·Kᵀ runs, not after the softmax: frees registers at wide heads

    @property
    def mma_threads(self) -> int:
        return 32 * self.mma_warps

    @property
    def threads(self) -> int:
        """Threads of a block: the computing warps, and one more warpgroup where copies have warps of their own."""
        return self.mma_threads + (128 if self.mechanism == "tma_wgmma" else 0)
