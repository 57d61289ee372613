"""The contract of the layouts modules, and what must hold of every layout: nothing lies on anything else, nothing is
left out, and the sizes are those the plan counts with.

The DSL makes the layouts; here their shapes and strides are evaluated again with numpy.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

import cute_attn
from cute_attn import layouts
from cute_attn.layouts import base
from cute_attn.layouts.base import Config, Gpu
from cute_attn.plan import configs, plan
from cute_attn.problem import Problem
from tests.host.processes import run_quick

FAMILIES = {family.__name__: family for module in layouts.MODULES for family in module.MECHANISMS.values()}
BACKWARD = {family.__name__: family for module in layouts.MODULES for family in module.BACKWARD.values()}
MECHANISMS = sorted({name for module in layouts.MODULES for name in module.MECHANISMS})
HEAD_DIMS = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256), (40, 104), (104, 40)]
PIECE = 16  # bytes that one thread copies, and one row of an 8×8 tile that ldmatrix or a warpgroup MMA reads
BANKS = 128  # bytes that shared memory delivers at a time


def shipped(gradients: str = "") -> list[Config]:
    """The configs of each GPU, mechanism and head dims, equal ones once; with ``gradients``, of the backward pass, in any order
    of dQ's sums and in a fixed one."""
    found = (
        config
        for target in layouts.known_targets()
        for mechanism in layouts.for_target(target).MECHANISMS
        for d, dv in HEAD_DIMS
        for ordered in ((False, True) if gradients else (False,))
        for config in configs(
            Problem("bfloat16", d, dv, bounded_right=ordered, gradients=gradients, deterministic=ordered), target, mechanism
        )
        if config.head_blocks == 1
    )
    return list(dict.fromkeys(found))


def name(config: Config) -> str:
    return f"{config.target}-{config.backward or config.mechanism}-{config.tile_d}-{config.tile_dv}"


every_module = pytest.mark.parametrize("module", layouts.MODULES, ids=lambda m: m.GPU.name)
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.__name__.rsplit(".", 1)[1])
every_backward_family = pytest.mark.parametrize("family", BACKWARD.values(), ids=lambda f: f.__name__.rsplit(".", 1)[1])
every_config = pytest.mark.parametrize("config", shipped(), ids=name)


# ---- the contract --------------------------------------------------------------------------------------------------


@every_module
def test_a_gpu_module(module: ModuleType):
    assert isinstance(module.GPU, Gpu)
    for (major, minor), target in module.GPU.targets.items():
        assert target.removesuffix("a") == f"sm_{major}{minor}"
    assert 0 < module.GPU.smem_per_block <= module.GPU.smem_per_multiprocessor
    assert list(inspect.signature(module.configs).parameters) == ["problem", "mechanism", "target"]
    assert module.__doc__
    assert module.MECHANISMS


@every_module
def test_a_gpu_module_is_data(module: ModuleType):
    """A new GPU is tables and one function that reads them, if not a shared one: no classes, and no layouts of its own."""
    own = [x for x in vars(module).values() if getattr(x, "__module__", None) == module.__name__]
    assert own in ([module.configs], [])


@every_module
def test_every_mechanism_has_a_mainloop_of_its_name(module: ModuleType):
    for mechanism, family in module.MECHANISMS.items():
        assert (Path(cute_attn.__file__).parent / "mainloop" / f"{mechanism}.py").is_file()
        assert family.__name__ in FAMILIES


CONTRACT = {
    "tile_dim": ["head_dim"],
    "smem_parts": ["config"],
    "smem_bytes": ["config"],
    "accumulator_registers": ["config"],
    "barriers": ["config"],
    "tile": ["operand", "config"],
    "smem": ["operand", "config"],
    "mma": ["role", "config"],
    "copies": ["config"],
    "element": ["config"],
    "tiled_mma": ["role", "config"],
    "smem_layout": ["operand", "config"],
    "copy_in": ["operand", "config"],
    "copy_out": ["operand", "config"],
    "store_accumulator": ["config"],
}


@every_family
def test_a_family_module(family: ModuleType):
    for function, parameters in CONTRACT.items():
        inspect.signature(getattr(family, function)).bind(*parameters)  # TypeError if it takes others
    assert family.SMEM_ALIGN % PIECE == 0


@every_module
def test_every_gpu_has_the_backward_pass(module: ModuleType):
    for mainloop, family in module.BACKWARD.items():
        assert (Path(cute_attn.__file__).parent / "mainloop" / f"{mainloop}.py").is_file()
        assert family.__name__ in BACKWARD
    for mechanism in module.MECHANISMS:
        assert any(mainloop.startswith(mechanism) for mainloop in module.BACKWARD)


@every_backward_family
def test_a_family_module_of_the_backward_pass(family: ModuleType):
    of_gradients = {"store_accumulator": ["operand", "config"], "pieces": ["config"], "turned": ["config"]}
    if family.__name__.endswith("mma_sync_backward"):
        of_gradients["load_operand"] = ["role", "operand", "config"]
    for function, parameters in (CONTRACT | of_gradients).items():
        inspect.signature(getattr(family, function)).bind(*parameters)  # TypeError if it takes others
        assert f"``{function}({', '.join(parameters)})``" in " ".join(base.__doc__.split())
    assert family.SMEM_ALIGN % PIECE == 0
    assert set(family.READS) == set(family.ROLES)
    assert {operand for operands in family.READS.values() for operand in operands if operand} <= set(family.OPERANDS)


@pytest.mark.parametrize("config", shipped("qkv"), ids=name)
def test_the_pieces_of_dq_are_the_whole(config: Config):
    """Pieces cover a query tile's dQ once, each thread a multiple of what it adds at once, and a row's padding holds whole
    tiles: what the host allocates is what the kernels fill."""
    family = layouts.family(config)
    assert base.row_padding(config) % config.tile_m == 0
    assert base.row_padding(config) <= max(base.ROW_PADDING, config.tile_m)
    if pieces := family.pieces(config):
        rows, columns = family.piece_shape(config)
        covered = np.zeros((config.tile_m, config.tile_d), dtype=int)
        for row, column in pieces:
            covered[row : row + rows, column : column + columns] += 1
        assert (covered == 1).all()
        assert rows * columns % (family.piece_threads(config) * config.add_width) == 0


@pytest.mark.parametrize("config", shipped("qkv"), ids=name)
def test_the_plan_of_the_backward_pass(config: Config):
    family = layouts.family(config)
    parts = family.smem_parts(config)
    padding = family.smem_bytes(config) - sum(parts.values())
    assert padding in (0, family.SMEM_ALIGN)
    held = config.tile_n * (config.tile_d + config.tile_dv) // config.mma_threads  # dK and dV
    if config.backward != "tma_wgmma_wide":  # which has them in turn
        assert held < family.accumulator_registers(config)
    if config.backward == "cp_async_backward":
        for role in family.ROLES:
            down, across = family.grid(role, config)
            assert down * across == config.mma_warps
        assert config.tile_m % config.step_m == 0
        sizes = [
            size for part, size in parts.items() if part not in ("rows", "hidden", "ticket")
        ]  # the rest begins where one ends
        assert all(size % family.SMEM_ALIGN == 0 for size in sizes)


@pytest.mark.parametrize("target", {layouts.for_target(target): target for target in layouts.known_targets()}.values())
@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("gradients", ["", "qkv"])
def test_every_pair_of_head_dims_has_a_config(target, mechanism, gradients):
    """Heads of different widths, of which the narrower may need more columns than alone: threads copy tiles in whole passes."""
    if mechanism not in layouts.for_target(target).MECHANISMS:
        return
    for d in range(8, 257, 8):
        for dv in range(8, 257, 8):
            config = plan(Problem("bfloat16", d, dv, gradients=gradients), target, mechanism)
            family = layouts.family(config)
            assert config.tile_d >= d
            assert config.tile_dv >= dv
            for (_, operand), copy in family.copies(config).items() if mechanism == "cp_async" else ():
                rows, columns = family.tile(operand, config)[:: -1 if copy.transposed else 1]
                assert rows % copy.tile[0] == columns % copy.tile[1] == 0


def test_the_contract_is_documented():
    for function, parameters in CONTRACT.items():
        assert f"``{function}({', '.join(parameters)})``" in base.__doc__
    assert "``configs(problem, mechanism, target)``" in base.__doc__


def test_every_module_is_registered():
    """A new file beside the others that defines a GPU is found missing from the registry here."""
    files = {path.stem for path in Path(layouts.__file__).parent.glob("sm[0-9]*.py")}
    names = [module.__name__.rpartition(".") for module in layouts.MODULES]
    assert {name for package, _, name in names if package == layouts.__name__} == files


def test_no_gpu_is_claimed_twice():
    capabilities = [c for module in layouts.MODULES for c in module.GPU.targets]
    targets = [t for module in layouts.MODULES for t in module.GPU.targets.values()]
    assert len(set(capabilities)) == len(capabilities)
    assert len(set(targets)) == len(targets)
    assert set(targets) <= set(layouts.known_targets())


@every_module
def test_look_up_by_capability(module: ModuleType):
    for capability, target in module.GPU.targets.items():
        assert layouts.target_of(capability) == target
        assert layouts.for_target(target) is module


@pytest.mark.parametrize("target", layouts.known_targets())
def test_look_up_by_target(target):
    module = layouts.for_target(target)
    assert module in layouts.MODULES
    for mechanism, family in module.MECHANISMS.items():
        assert layouts.family(plan(Problem("float16", 64, 64), target, mechanism)) is family


def test_the_gpus_of_this_release():
    """The least that must be served, and by what first."""
    least = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (12, 0): "sm_120"}
    assert {capability: layouts.target_of(capability) for capability in least} == least
    assert list(layouts.for_target("sm_90a").MECHANISMS) == ["tma_wgmma", "cp_async"]
    assert all("cp_async" in layouts.for_target(target).MECHANISMS for target in least.values())


@pytest.mark.parametrize("capability", [(7, 5), (9, 9), (0, 0)])
def test_an_unknown_capability_lists_the_known(capability):
    with pytest.raises(NotImplementedError) as caught:
        layouts.target_of(capability)
    message = str(caught.value)
    assert f"compute capability {capability[0]}.{capability[1]};" in message
    for module in layouts.MODULES:
        assert all(f"{major}.{minor}" in message for major, minor in module.GPU.targets)
    assert "backend='reference'" in message


@pytest.mark.parametrize("target", ["sm_90b", "sm_75", "hopper"])
def test_an_unknown_target_lists_the_known(target):
    with pytest.raises(ValueError, match="known ones are ") as caught:
        layouts.for_target(target)
    message = str(caught.value)
    assert f"target is {target!r}" in message
    assert all(known in message for known in layouts.known_targets())


def test_a_plan_needs_no_dsl():
    """The registry, the tables, the plan and its words, in a process that could not import the DSL if it tried."""
    program = """
import sys
sys.modules["cutlass"] = None
from cute_attn import layouts
from cute_attn.plan import configs, explain
from cute_attn.problem import Problem
problem = Problem("bfloat16", 128, 64)
for target in layouts.known_targets():
    for mechanism, family in layouts.for_target(target).MECHANISMS.items():
        for config in configs(problem, target, mechanism):
            print(explain(problem, config), family.tile("Q", config))
"""
    done = run_quick(program)
    assert done.returncode == 0, done.stderr
    ways = sum(len(layouts.for_target(target).MECHANISMS) for target in layouts.known_targets())
    assert done.stdout.count("mechanism ") == ways


@every_config
def test_shared_memory_is_the_sum_of_its_parts(config: Config):
    """And no more than one alignment beside it, which is what ``smem_bytes`` says of its padding."""
    family = layouts.family(config)
    parts = family.smem_parts(config)
    padding = family.smem_bytes(config) - sum(parts.values())
    assert padding in (0, family.SMEM_ALIGN)
    if padding == 0:  # then the parts must need none: each ends where the next may begin
        assert all(size % family.SMEM_ALIGN == 0 for size in parts.values())
    tiles = {operand: math.prod(family.tile(operand, config)) * base.BYTES for operand in "QKVO"}
    assert parts["K"] == config.stages * tiles["K"]
    assert parts["V"] == config.stages * tiles["V"]


@every_family
def test_tile_dim(family: ModuleType):
    """Enough columns for the head, no fewer for a wider one, and none to spare where the head is as wide as a tile."""
    dims = [family.tile_dim(d) for d in range(8, 257, 8)]
    assert dims == sorted(dims)
    assert all(tile >= d for tile, d in zip(dims, range(8, 257, 8), strict=True))
    assert all(family.tile_dim(d) == d for d in dims)
    assert {64, 128, 256} <= set(dims)


# ---- the layouts ---------------------------------------------------------------------------------------------------


class Mapping(NamedTuple):
    """A layout as nested shape and stride, a swizzle (bits, base, shift) if it has one, and what the DSL makes of it."""

    shape: tuple
    stride: tuple
    swizzle: tuple[int, int, int] | None = None
    cosize: int = 0
    sampled: tuple[tuple[tuple[int, ...], int], ...] = ()


class Partition(NamedTuple):
    """Which elements of a tile of ``tiler`` a thread holds: ``(thread, value) -> element``."""

    tv: Mapping
    tiler: tuple[int, int]


class Traced(NamedTuple):
    """What the DSL makes of a config."""

    smem: dict[str, Mapping]
    copies: dict[str, Partition]
    mma: dict[str, tuple[Partition, int]]  # and its threads
    store: Partition


@cache  # of all configs: tests take them in turn, each test all of them
def traced(config: Config) -> Traced:
    """The layouts of a config. They exist only while the DSL traces something: an empty function is traced for them."""
    cutlass = pytest.importorskip("cutlass")
    cute, found = cutlass.cute, []

    def mapping(layout) -> Mapping:
        return Mapping(layout.shape, layout.stride)

    def swizzled(layout) -> Mapping:
        """A composed layout; sampled, where it is evaluated as it stands, which is how ``mma_sync`` uses its own."""
        inner = layout.inner
        coordinates = [(r, c, 0)[: cute.rank(layout)] for r in range(9) for c in (0, 1, 8, 31)]
        sampled = tuple((x, cute.crd2idx(x, layout)) for x in coordinates)
        bits = (inner.num_bits, inner.num_base, inner.num_shift)
        return Mapping(layout.outer.shape, layout.outer.stride, bits, cute.cosize(layout), sampled)

    def partition(tv, tiler) -> Partition:
        rows, columns = (x if isinstance(x, int) else cute.size(x) for x in tiler)
        return Partition(mapping(tv), (rows, columns))

    def collect():
        family = layouts.family(config)
        copies = {}
        if config.mechanism == "cp_async":
            into = {operand: family.copy_in(operand, config) for operand in "QKV"}
            for operand, copy in {**into, "O": family.copy_out("O", config)}.items():
                copies[operand] = partition(copy.layout_dst_tv_tiled, copy.tiler_mn)
        products = {}
        for role in "SO":
            mma = family.tiled_mma(role, config)
            tiler = mma.get_tile_size(0), mma.get_tile_size(1)
            products[role] = partition(mma.tv_layout_C_tiled, tiler), mma.size
        store = family.store_accumulator(config)
        smem = {operand: swizzled(family.smem_layout(operand, config)) for operand in "QKVO"}
        found.append(Traced(smem, copies, products, partition(store.layout_tv_tiled, store.tiler_mn)))

    @cute.jit
    def nothing():
        collect()

    cute.compile(nothing, options=f"--gpu-arch={config.target}")
    return found[0]


def flat(x) -> list[int]:
    return [x] if isinstance(x, int) else [leaf for part in x for leaf in flat(part)]


def offsets(shape, stride) -> np.ndarray:
    """The index of every coordinate of a layout, the first mode running fastest."""
    out = np.zeros(1, dtype=np.int64)
    for extent, step in zip(flat(shape), flat(stride), strict=True):
        out = (np.arange(extent)[:, None] * step + out[None, :]).reshape(-1)
    return out


def linear(layout: Mapping) -> np.ndarray:
    """The index of every (row, column[, slot]) before any swizzle, as an array of three dimensions."""
    modes = [offsets(*mode) for mode in zip(layout.shape, layout.stride, strict=True)]
    modes += [np.zeros(1, dtype=np.int64)] * (3 - len(modes))
    return modes[0][:, None, None] + modes[1][None, :, None] + modes[2][None, None, :]


def swizzle(x: np.ndarray, bits: int, base_: int, shift: int) -> np.ndarray:
    """``Sw<bits, base, shift>``: XOR bits base … base + bits − 1 with those ``shift`` above."""
    return x ^ ((x >> shift) & (((1 << bits) - 1) << base_))


def byte_addresses(config: Config, layout: Mapping) -> np.ndarray:
    """Where each (row, column, slot) lies, in bytes. ``mma_sync`` swizzles elements, ``wgmma`` bytes, as TMA does."""
    assert layout.swizzle
    if config.mechanism == "cp_async":
        return swizzle(linear(layout), *layout.swizzle) * base.BYTES
    return swizzle(linear(layout) * base.BYTES, *layout.swizzle)


def test_the_evaluation():
    """On layouts small enough to write down."""
    assert offsets((2, (2, 2)), (1, (4, 2))).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert swizzle(np.arange(16), 1, 0, 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 11, 10, 13, 12, 15, 14]
    assert swizzle(np.array([0b1_0000_0000, 0b11_0000_0000]), 2, 3, 5).tolist() == [0b1_0000_1000, 0b11_0001_1000]


@every_config
def test_the_evaluation_is_the_dsls(config: Config):
    for layout in traced(config).smem.values():
        assert layout.swizzle
        mine = swizzle(linear(layout), *layout.swizzle)
        for coordinate, index in layout.sampled:
            assert mine[coordinate + (0,) * (3 - len(coordinate))] == index


@every_config
def test_layouts_take_what_the_plan_counts(config: Config):
    family = layouts.family(config)
    parts, smem = family.smem_parts(config), traced(config).smem
    sizes = {operand: layout.cosize * base.BYTES for operand, layout in smem.items()}
    assert (sizes["K"], sizes["V"]) == (parts["K"], parts["V"])
    if config.separate_o:
        assert (sizes["Q"], sizes["O"]) == (parts["Q"], parts["O"])
    else:  # O lies over Q
        assert max(sizes["Q"], sizes["O"]) == parts["Q"]
    for operand, layout in smem.items():
        rows, columns, slots = linear(layout).shape
        assert (rows, columns) == family.tile(operand, config)
        if operand in "KV":
            assert (rows, slots) == (config.tile_n, config.stages)
        else:  # warpgroup MMA: a slot of Q and O is a warpgroup's 64 rows
            assert rows * slots == config.tile_m
        assert columns == (config.tile_d if operand in "QK" else config.tile_dv)


@every_config
def test_nothing_lies_on_anything_else(config: Config):
    """Every layout is a bijection onto its part of shared memory, and stays one in every slot."""
    for operand, layout in traced(config).smem.items():
        addresses = byte_addresses(config, layout)
        assert sorted(addresses.ravel().tolist()) == list(range(0, addresses.size * base.BYTES, base.BYTES)), operand
        slots = addresses.min(axis=(0, 1))
        size = addresses[:, :, 0].size * base.BYTES
        assert slots.tolist() == [slot * size for slot in range(len(slots))]
        assert size % (8 * BANKS) == 0  # so that the swizzle, which repeats every 8 rows of 128 bytes, fits every slot


@every_config
def test_pieces_stay_whole_and_meet_no_bank_twice(config: Config):
    """16 bytes of a row stay together, and the pieces of 8 rows one below the other, which an 8×8 matrix is read by, lie
    in the 8 different 16-byte groups of banks."""
    per_piece = PIECE // base.BYTES
    for operand, layout in traced(config).smem.items():
        addresses = byte_addresses(config, layout)
        rows, columns, slots = addresses.shape
        pieces = addresses.reshape(rows, columns // per_piece, per_piece, slots)
        first = pieces[:, :, :1]
        assert (first % PIECE == 0).all(), operand
        assert (pieces - first == np.arange(per_piece)[None, None, :, None] * base.BYTES).all(), operand
        groups = (first[:, :, 0] % BANKS // PIECE).reshape(rows // 8, 8, columns // per_piece, slots)
        assert (np.sort(groups, axis=1) == np.arange(8)[None, :, None, None]).all(), operand


@pytest.mark.parametrize("config", [c for c in shipped() if c.mechanism == "tma_wgmma"], ids=name)
def test_swizzles_that_tma_knows(config: Config):
    """TMA and warpgroup MMA know a swizzle by the width of a row: ``Sw<3,4,3>`` on bytes for rows of 128 bytes,
    ``Sw<2,4,3>`` for rows of 64."""
    for layout in traced(config).smem.values():
        row_bytes = flat(layout.shape[1])[0] * base.BYTES
        assert flat(layout.stride[1])[0] == 1
        assert layout.swizzle == {128: (3, 4, 3), 64: (2, 4, 3)}[row_bytes]


@pytest.mark.parametrize("config", [c for c in shipped() if c.mechanism == "cp_async"], ids=name)
def test_copies_touch_each_element_once(config: Config):
    """All threads together, over all repetitions of the copy's own tile; each thread 16 bytes of one row at a time."""
    family = layouts.family(config)
    for operand, copy in traced(config).copies.items():
        rows, columns = copy.tiler
        elements = offsets(copy.tv.shape, copy.tv.stride)
        assert sorted(elements.tolist()) == list(range(rows * columns)), operand
        tile_rows, tile_columns = family.tile(operand, config)
        assert tile_rows % rows == tile_columns % columns == 0, operand
        threads = math.prod(flat(copy.tv.shape[0]))
        assert threads == config.threads, operand
        values = elements.reshape(-1, threads)  # (value, thread)
        assert len(values) * base.BYTES == PIECE
        assert (values % rows == values[:1] % rows).all()  # one row
        assert (np.diff(values // rows, axis=0) == 1).all()  # and neighbouring columns


@every_config
def test_accumulators_cover_the_tile(config: Config):
    """Each score and each output is in one register of one thread; so is each output on its way to shared memory."""
    found, family = traced(config), layouts.family(config)
    rows = family.tile("O", config)[0]
    for role, columns in (("S", config.tile_n), ("O", config.tile_dv)):
        (tv, tiler), threads = found.mma[role]
        elements = offsets(tv.shape, tv.stride)
        assert sorted(elements.tolist()) == list(range(math.prod(tiler)))
        assert rows % tiler[0] == columns % tiler[1] == 0
        assert threads == (config.mma_threads if config.mechanism == "cp_async" else 128)
        # The four threads of a quad share their rows, and no other thread has them: the softmax reduces over quads.
        held = (elements % tiler[0]).reshape(-1, threads // 4, 4)  # the row of each (value, quad, thread of the quad)
        assert (held == held[:, :, :1]).all()
        of_quads = [set(held[:, quad, 0].tolist()) for quad in range(threads // 4)]
        assert sum(map(len, of_quads)) == len(set().union(*of_quads)) == tiler[0]
    store = found.store
    assert sorted(offsets(store.tv.shape, store.tv.stride).tolist()) == list(range(math.prod(store.tiler)))
    assert config.tile_dv % store.tiler[1] == 0


@every_config
def test_registers_of_the_accumulators(config: Config):
    """What the plan counts for S and O is at least what a thread holds of them."""
    threads = config.mma_threads
    held = config.tile_m * (config.tile_n + config.tile_dv) // threads
    assert held <= layouts.family(config).accumulator_registers(config)


def test_the_table_is_tested_whole():
    """Every row of every table is among the configs above: tables are keyed by the wider head dim."""
    tested = {(c.target, c.mechanism, max(c.tile_d, c.tile_dv)) for c in shipped()}
    for target in layouts.known_targets():
        for mechanism in layouts.for_target(target).MECHANISMS:
            for head_dim in range(8, 257, 8):
                config = plan(Problem("bfloat16", head_dim, 8), target, mechanism)
                assert (target, mechanism, max(config.tile_d, config.tile_dv)) in tested
