"""The contract of a GPU's layouts, and the records it speaks in.

A **GPU module** (``sm80.py``, ``sm90.py``, …) is data. It defines

- ``GPU``: a :class:`Gpu`, its limits and the compute capabilities it serves;
- ``MECHANISMS``: the names of the mechanisms it can run, best first, each with the **family module** that lays out its
  operands (``mma_sync``, ``wgmma``);
- ``BACKWARD``, if it has the backward pass: the names of its mainloops, each with the family module of that;
- ``CACHE``, if it has attention to a cache: the names of its mainloops, best first, each with the family module of that, whose
  own ``configs(problem, gpu, target)`` say which problems it serves;
- ``configs(problem, mechanism, target)``: the configurations for a problem, best first, from the module's tables.

A **family module** is the layouts of one family of instructions. It defines, as plain functions of a :class:`Config`,

- ``TILE_DIMS`` and ``tile_dim(head_dim)``: the columns a head takes in shared memory;
- ``smem_parts(config)``, ``smem_bytes(config)``, ``accumulator_registers(config)`` and ``barriers(config)``: what a
  block takes, for the plan and the proofs;
- ``misfit(config)``: in words, what of a config its kernels would compute wrongly, read past their memory with or wait for ever
  in, with what to try; ``""`` where all is well;
- ``tile(operand, config)``: the (rows, columns) that are copied at a time; operand ``"Q"``, ``"K"``, ``"V"``, ``"O"``;
- ``smem(operand, config)`` → :class:`Layout`, ``mma(role, config)`` → :class:`Mma` and ``copies(config)``, the
  :class:`Copy` or :class:`Box` of each (step, operand): the layouts as data, for the proofs and the pictures, and for
  the functions below, which make the DSL's objects from them;
- ``element(config)``: the DSL's type of an element;
- ``tiled_mma(role, config)``: role ``"S"`` (Q·Kᵀ) or ``"O"`` (P·V);
- ``smem_layout(operand, config)``: where an operand's elements lie, aligned to ``SMEM_ALIGN`` bytes;
- ``copy_in(operand, config)``, ``copy_out(operand, config)``: global → shared and shared → global copies;
- ``store_accumulator(config)``: O from the MMA's registers to shared memory;
- of warpgroup MMA, ``columns_in_registers(role, config)``: the first columns of a product's operand A that threads hold. The
  role of these has an ``r`` in front, and ``load_operand(role, operand, config)`` brings them from shared memory.

A family module of the backward pass defines the same, with names of its own: ``OPERANDS``, ``ROLES`` and ``READS``, from a
role to the operands A and B that its MMA may read from shared memory (``""`` for one always in registers);
``store_accumulator(operand, config)`` and, where warps load operands, ``load_operand(role, operand, config)``; and for dQ,
where parts of it are added up in global memory, ``pieces(config)``, (row, column) of each, ``piece_shape(config)``,
``piece_threads(config)``, how many threads hold one, ``sums(config)``, the layout of the sums, ``turned(config)``, whether they
are of dQ's transpose, whose operands A and B are the other way round, and ``FIRST_STORES``, whether the first that is added is
stored, even where no order is fixed, and dQ may be rounded while others are added (``fields.rounds_beside``), and
``CLEARS_QUERIES``, whether dQ of queries that aren't in use is cleared by whoever adds, if no blocks share a tile. For the
pictures of a block it says besides ``stages(operand, config)``, ``over(config)``, from an operand to the one whose memory it
takes, and, where warps do nothing but copy, ``WARPS``, from an operand to theirs; with several kernels, ``KERNELS``, from a
kernel's name to its operands.

Only those from ``element`` on import the DSL, and only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

BYTES = 2  # of one element: the kernels take float16 and bfloat16
VECTOR = 8  # elements of a 16-byte access
WARP = 32  # threads
OPERANDS = ("Q", "K", "V", "O")
ROLES = ("S", "O")
READS = {"S": ("Q", "K"), "O": ("", "V")}
IntTuple: TypeAlias = "int | tuple[IntTuple, ...]"
Modes: TypeAlias = tuple[tuple[int, int, int], ...]
KIB = 1024
SMEM_RESERVED = KIB  # CUDA C++ programming guide: what it takes of a multiprocessor's shared memory for each block
BANKS, BANK_BYTES = 32, 4  # of shared memory
NAMED_BARRIERS = 16  # of a block
SETMAXNREG = range(24, 257, 8)  # PTX ISA, setmaxnreg
LISTED_ROWS = 192  # of a query tile that has a list of key tiles, at most
ROW_PADDING = 128  # rows that those of ragged sequences are padded to in the backward pass, by whole tiles: fewer, or one tile
# Words of a backward call's int32 signals in global memory: whether to copy carefully (mainloop/guard.py: ``CARE``, or 1 where
# a kernel of zeros comes first), the next ticket of a block that computes, and of one that rounds dQ, and how many warps have
# ended that add to dQ; behind them, a counter of each query tile.
CAREFUL, TICKET, ROUNDING_TICKET, ENDED, COUNTERS = range(5)
CARE = 0x5CA1AB1E  # no small number, and as a float a large one: what other tensors left in this memory is hardly ever that
TICKET_COUNTERS = 4  # words before the forward pass's tickets, of which two count (scheduler.py)
# What a counter is at least once dQ has been stored, where the first to come stores; below, who has come, two warps at the most
# of each block that runs. And what it grows by for each part of dQ that is there, up to so many keys.
STORED, ADDED, COUNTED_KEYS = 1 << 10, 1 << 11, 1 << 26
BLOCK = 32  # queries, and keys, of a block of a block mask (blocks.py): sides of tiles that have lists are multiples of it
NONE, CUT, WHOLE = 0, 1, 2  # kinds of blocks, and of tiles: no query sees any key of it, some see some, each sees all
BY_ROWS = 3  # of blocks that are cut: each query sees all keys or none
KIND_BITS = 2
# A list of tiles there is HEADER words, and one for each tile: its number in the lower TILE_BITS, and more above.
HEADER, TILE_BITS = 4, 20
IN_TURN = 3  # the word of a header of key tiles that says whose list is taken when
TILE_MASK = (1 << TILE_BITS) - 1
UNSEEN_BIT, WHOLE_BIT, WARPGROUP_BITS = 0, 1, 2  # of a key tile for each warpgroup: it sees none of it, or all
MEMBER_BIT = TILE_BITS + 2  # of a query tile, the lowest of its member; below, a bit for each warpgroup: all see its keys


@dataclass(frozen=True)
class Gpu:
    """A GPU's limits, from the CUDA C++ programming guide's table of compute capabilities.

    ``targets`` maps a compute capability to the name the compiler takes for it. Where it is empty, ``name`` is the target,
    and a kernel is compiled for it only where it is asked for by name.
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
    backward: str = ""  # the mainloop of the backward pass; "" is the forward pass, whose mainloop is the mechanism's
    overlap_tiles: bool = False  # backward, tma_wgmma: a query tile's last product runs into the next tile: takes registers
    every_lane_arrives: bool = False  # at barriers, not one for its warp, or a warp by itself; racecheck follows no warp
    head_blocks: int = 1  # backward, tma_wgmma: blocks of a cluster share a key tile, each with a part of its query heads
    separate_dk: bool = False  # backward, tma_wgmma: dK has shared memory of its own, and need not wait for dQ's
    results_from_registers: bool = False  # backward, tma_wgmma: dK and dV take no shared memory but leave from registers
    ds_from_shared: bool = False  # backward, tma_wgmma: dK's product takes dS from there, as dQ's does, not from registers
    dq_stages: int = 1  # and query tiles whose dQ has some on its way to global memory
    late_dv: int = 0  # queries of a tile whose part of dV's product comes behind dQ's, so that dQ is stored ahead of dK's
    add_width: int = 4  # backward: floats of dQ's sums that a thread hands on at once, so the order in which they lie
    cache: str = ""  # the mainloop of attention to a cache; "" is none
    page_numbers: bool = False  # caches: shared memory holds the numbers of pages that are to be copied
    walk_blocks: int = 1  # caches: blocks of a cluster; a walk that is all that they have they merge over shared memory
    # backward pass and caches on cp_async only
    key_warps: int = 0  # of the computing warps, as many split the keys; the others split queries and columns
    # backward pass on cp_async only
    step_m: int = 0  # queries whose scores a warp holds at once
    # tma_wgmma only
    q_in_registers: int = 0  # forward: columns of Q that computing threads hold while a query tile lasts
    k_in_registers: int = 0  # backward: columns of K and V, while a key tile does
    mma_registers: int = 0  # registers a thread of a computing warpgroup has after setmaxnreg
    copy_registers: int = 0  # and of the copying one
    ping_pong: bool = False  # warpgroups take turns on the tensor cores
    separate_o: bool = False  # O has shared memory of its own, so that the next Q can arrive before O has left
    o_from_registers: bool = False  # O takes no shared memory but leaves from registers, for the same end
    q_stages: int = 1  # forward: query tiles in shared memory; of two, the next one arrives while this one is read
    rescale_early: bool = False  # O is rescaled while Q·Kᵀ runs, not after the softmax: frees registers at wide heads

    @property
    def mma_threads(self) -> int:
        return 32 * self.mma_warps

    @property
    def threads(self) -> int:
        """Threads of a block: the computing warps, and one more warpgroup where copies have warps of their own."""
        return self.mma_threads + (128 if self.mechanism == "tma_wgmma" else 0)


def row_padding(config: Config) -> int:
    """Values of query rows in memory are a multiple of so many, whole tiles, in the backward pass."""
    return config.tile_m * max(ROW_PADDING // config.tile_m, 1)


def registers_per_thread(config: Config, gpu: Gpu) -> int:
    """Registers a computing thread may use."""
    return config.mma_registers or registers_at_launch(config, gpu)


def registers_at_launch(config: Config, gpu: Gpu) -> int:
    """Registers each thread is launched with: those of a multiprocessor in equal parts, in steps of 8. What ``setmaxnreg``
    hands from one warpgroup to another comes out of a block's, in which the rest of that division is missing."""
    share = gpu.registers_per_multiprocessor // (config.threads * config.blocks_per_multiprocessor)
    return min(share // 8 * 8, gpu.registers_per_thread)


def names(family: ModuleType) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[str, str]]]:
    """A family's ``OPERANDS``, ``ROLES`` and ``READS``: its own, or the forward pass's."""
    if hasattr(family, "READS"):
        return family.OPERANDS, family.ROLES, family.READS
    return OPERANDS, ROLES, READS


# ---- layouts as data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """``Sw<bits,base,shift> o 0 o shape:stride``: from a coordinate to an offset in elements.

    The offset is the inner product of the coordinate and ``stride``; then the swizzle exclusive-ors ``bits`` of its
    bits, from bit ``base + shift`` on, into those from bit ``base`` on. A swizzle acts on ``unit_bytes``: 2 for the
    offset in elements, 1 for the address in bytes, as TMA and warpgroup MMA have it. ``algebra`` computes with it.
    """

    shape: IntTuple
    stride: IntTuple
    swizzle: tuple[int, int, int] | None = None
    unit_bytes: int = BYTES

    def __str__(self) -> str:
        plain = f"{_notation(self.shape)}:{_notation(self.stride)}"
        return plain if self.swizzle is None else "Sw<{},{},{}> o 0 o ".format(*self.swizzle) + plain


def padded_to(dims: tuple[int, ...]) -> Callable[[int], int]:
    """From a head dim to the columns that it takes in shared memory, of these the fewest."""
    return lambda head_dim: next(d for d in dims if d >= head_dim)


def first_misfit(*found: tuple[bool, str]) -> str:
    """Of pairs of (whether something is wrong, what in words) the first that is wrong, or ``""``."""
    return next((text for wrong, text in found if wrong), "")


@dataclass(frozen=True)
class Mma:
    """A tiled MMA. ``a`` (m, k), ``b`` (n, k) and ``c`` (m, n) say which thread holds which element of ``tile`` in
    which value: ``(thread, value)`` to ``row + rows · column``. An operand in ``from_shared`` is read by the
    tensor core itself; its map is that of all threads together."""

    shape: tuple[int, int, int]  # of one instruction: m, n, k
    tile: tuple[int, int, int]  # of all warps together, as one ldmatrix feeds them
    warps: int  # one above the other
    a: Layout
    b: Layout
    c: Layout
    from_shared: str = ""  # of "AB"
    across: int = 1  # warps side by side


@dataclass(frozen=True)
class Copy:
    """A tiled copy by threads: ``values`` maps ``(thread, value)`` to ``row + rows · column`` of ``tile``.

    For ``ldmatrix`` and ``stmatrix`` the values are those in registers; ``algebra.addresses`` says what each thread
    points at. ``transposed`` copies see the operand as (columns, rows).
    """

    instruction: str  # a key of algebra.INSTRUCTIONS
    operand: str
    tile: tuple[int, int]
    values: Layout
    transposed: bool = False


@dataclass(frozen=True)
class Box:
    """One TMA copy's box: ``rows`` of ``columns`` elements, swizzled as the tensor map says. Boxes of a slot lie
    side by side; ``swizzle_bytes`` is the tensor map's swizzle span, 0 without one."""

    operand: str
    rows: int
    columns: int
    swizzle_bytes: int
    store: bool = False


def by_modes(tile: tuple[int, int], threads: Modes, values: Modes) -> Layout:
    """The (thread, value) map of a tile from its modes, fastest first: each ``(extent, rows, columns)`` that it
    steps."""
    strides = tuple(tuple(rows + tile[0] * columns for _, rows, columns in modes) for modes in (threads, values))
    return Layout(tuple(tuple(extent for extent, _, _ in modes) for modes in (threads, values)), strides)


# Which thread of a warp holds which element: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". A
# quad of threads shares a row. Warpgroup MMA (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16") has the
# same, warps one above the other. As modes of (extent, rows, columns):
FRAGMENT_THREADS: Modes = ((4, 0, 2), (8, 1, 0))
FRAGMENT_A: Modes = ((2, 0, 1), (2, 8, 0), (2, 0, 8))  # rows m, columns k
FRAGMENT_B: Modes = ((2, 0, 1), (2, 0, 8))  # rows n, columns k
FRAGMENT_C: Modes = ((2, 0, 1), (2, 8, 0))  # rows m, columns n; 8 columns an instruction of mma.sync


def tiled_rows(shape: tuple[int, ...], width: int, swizzle: tuple[int, int, int], unit_bytes: int) -> Layout:
    """Rows of ``width`` elements one after another; where a tile has more columns, the next ``width`` of all its rows
    after that. ``shape`` is ``(rows, columns)``, with the number of slots behind it where there are several."""
    rows, columns, *slots = shape
    across: tuple[IntTuple, IntTuple] = (width, 1)
    if columns > width:
        across = ((width, columns // width), (1, rows * width))
    return Layout((rows, across[0], *slots), (width, across[1], *[rows * columns] * len(slots)), swizzle, unit_bytes)


def in_turns(threads: int, values: int, width: int, slots: int = 1) -> Layout:
    """``(thread, value, slot)``: ``width`` values of each thread in turn, in the order of its registers."""
    return Layout((threads, (width, values // width), slots), (width, (1, width * threads), values * threads))


def swizzle_atom(columns: int) -> tuple[int, int, int, int]:
    """What a tile of ``columns`` 16-bit columns in shared memory is made of: ``(bits, base, shift, width)``.

    8 rows of ``width`` elements one after another, then the swizzle on the offset in elements: ``bits`` bits of it from
    ``base + shift`` on are exclusive-ored into those from ``base`` on. Tiles repeat it down, then right. Rows of 64
    elements are 128 bytes, all 32 banks; a head that is 32 or 96 wide takes 32, and what is read in pieces of 48 takes 16.
    """
    width = next(width for width in (64, 32, 16) if columns % width == 0)
    return {64: 3, 32: 2, 16: 1}[width], 3, 3, width


def row_width(layout: Layout) -> int:
    """The ``width`` of :func:`tiled_rows`."""
    columns = layout.shape[1]  # type: ignore[index]
    return columns[0] if isinstance(columns, tuple) else columns  # type: ignore[return-value]


def element(config):
    """The DSL's type of an element of the operands of a config (or a problem: both have a ``dtype``)."""
    import cutlass

    return {"float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}[config.dtype]


def cute_layout(layout: Layout):
    """The same layout as the DSL's object, inside ``@cute.jit``."""
    from cutlass import cute

    plain = cute.make_layout(layout.shape, stride=layout.stride)
    return plain if layout.swizzle is None else cute.make_composed_layout(cute.make_swizzle(*layout.swizzle), 0, plain)


def _notation(x: IntTuple) -> str:
    return f"({','.join(map(_notation, x))})" if isinstance(x, tuple) else str(x)
