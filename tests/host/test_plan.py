"""The plan: what it refuses, that everything it offers fits the GPU it is for, and that no size of a call enters it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch

from cute_attn import layouts
from cute_attn.fields import rounds_beside
from cute_attn.layouts.base import ADDED, COUNTED_KEYS, KIB, Config, Gpu
from cute_attn.plan import (
    check,
    configs,
    explain,
    head_blocks,
    plan,
    registers_per_thread,
    rows_of_query_tile,
    takes_one_kernel,
    takes_short,
)
from cute_attn.problem import Problem, check_call, problem_of

HEAD_DIMS = range(8, 257, 8)

# Shared memory a block may ask for, and a multiprocessor has, in KiB: the CUDA C++ programming guide's table of compute
# capabilities. Written here again, so that a slip in a layouts module shows.
SHARED_MEMORY = {
    **dict.fromkeys(["sm_80", "sm_87"], (163, 164)),
    **dict.fromkeys(["sm_86", "sm_88", "sm_89", "sm_120", "sm_121"], (99, 100)),
    **dict.fromkeys(["sm_90", "sm_100", "sm_103", "sm_110"], (227, 228)),
}
WAYS = [(target, mechanism) for target in layouts.known_targets() for mechanism in layouts.for_target(target).MECHANISMS]
ways = pytest.mark.parametrize(("target", "mechanism"), WAYS)


def refusal(config: Config, gpu: Gpu | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the tests look at the message
        check(config, gpu or layouts.for_target(config.target).GPU)
    return str(caught.value)


def shared_memory(target: str) -> tuple[int, int]:
    return SHARED_MEMORY[target.rstrip("af")]


def planned(target: str, mechanism: str | None = None, head_dim: int = 128) -> Config:
    return plan(Problem("bfloat16", head_dim, head_dim), target, mechanism)


# ---- what it refuses -----------------------------------------------------------------------------------------------


def test_a_tile_larger_than_shared_memory():
    """2 stages of 256 keys of K and of V are 256 KiB; Q and O add 64."""
    message = refusal(replace(planned("sm_90a"), tile_n=256))
    assert "tma_wgmma with tiles 128×256 and 2 stages takes 325.3 KiB of shared memory" in message
    assert "Q 32.0, K 128.0, V 128.0, O 32.0" in message
    assert "sm_90a has 227 KiB" in message
    assert "try a smaller tile_n or fewer stages in layouts/sm90.py" in message


def test_a_tile_larger_than_a_small_shared_memory():
    """The same tiles fit an A100 and not an RTX card."""
    big = planned("sm_80", head_dim=256)
    message = refusal(replace(big, target="sm_89"))
    assert "takes 128.0 KiB" in message
    assert "sm_86 has 99 KiB" in message
    assert "layouts/sm86.py" in message


def test_blocks_that_do_not_fit_side_by_side():
    """CUDA takes 1 KiB more of each block: two blocks of 50 KiB do not share 100 KiB."""
    two = replace(planned("sm_86", head_dim=64), tile_m=80, tile_n=80, mma_warps=5)  # 80·64·2 + 4·80·64·2 bytes
    assert layouts.family(two).smem_bytes(two) == 50 * KIB
    assert two.blocks_per_multiprocessor == 2
    message = refusal(two)
    assert "takes 50.0 KiB" in message
    assert "49 KiB for a block, 2 to a multiprocessor" in message
    check(planned("sm_86", head_dim=64), layouts.for_target("sm_86").GPU)  # 48 KiB
    check(replace(two, blocks_per_multiprocessor=1), layouts.for_target("sm_86").GPU)


def test_more_accumulators_than_a_thread_has_registers():
    message = refusal(replace(planned("sm_90a"), tile_n=256, stages=1))
    assert "tma_wgmma with tiles 128×256 keeps 288 registers a thread" in message
    assert "sm_90a gives it 240" in message
    assert "try a smaller tile_n" in message
    message = refusal(replace(planned("sm_80"), tile_n=128))
    assert "cp_async with tiles 128×128 keeps 256 registers a thread" in message
    assert "sm_80 gives it 255" in message


def test_more_blocks_than_registers():
    """Two blocks of 256 threads leave each thread 128 registers."""
    config = replace(planned("sm_80", head_dim=64), mma_warps=8, tile_m=256)
    check(replace(config, blocks_per_multiprocessor=1), layouts.for_target("sm_80").GPU)
    message = refusal(replace(config, tile_n=80))
    assert "keeps 144 registers" in message
    assert "sm_80 gives it 128" in message


def test_warpgroups_that_ask_for_more_registers_than_there_are():
    """setmaxnreg waits until the registers are free: for ever, if they never are."""
    message = refusal(replace(planned("sm_90a"), mma_registers=240, copy_registers=32))
    assert "256 threads 240 registers and 128 threads 32, 65536 in all" in message
    assert "on sm_90a a block of 384 threads holds 64512" in message  # 168 each
    assert "try fewer mma_registers in layouts/sm90.py" in message
    assert "copy_registers is 20; setmaxnreg takes multiples of 8 from 24 to 256" in refusal(
        replace(planned("sm_90a"), copy_registers=20)
    )
    check(planned("sm_90a"), layouts.for_target("sm_90a").GPU)  # 240 and 24


def test_more_barriers_than_a_block_has():
    many = {"tile_m": 512, "tile_n": 16, "stages": 1, "mma_registers": 0, "copy_registers": 0}
    message = refusal(replace(planned("sm_90a", head_dim=64), **many))
    assert "tma_wgmma takes 17 named barriers (the block 1, turns 8, epilogues 8); a block has 16" in message


BACKWARD = Problem("bfloat16", 128, 128, gradients="qkv")
NARROW = replace(BACKWARD, head_dim=64, head_dim_v=64)
THREE = {"tile_m": 64, "tile_n": 192, "mma_warps": 12, "mma_registers": 160, "dq_stages": 1}  # warpgroups
MISFITS = [  # (problem, mechanism, what is changed, what is said)
    (replace(BACKWARD, gradients=""), "tma_wgmma", {"tile_m": 96}, "96 queries a tile; a multiple of 64 is needed"),
    (replace(BACKWARD, gradients=""), "tma_wgmma", {"mma_warps": 4}, "4 warps for 128 queries; 8 are needed"),
    (replace(BACKWARD, gradients=""), "tma_wgmma", {"stages": 0}, "0 stages; 1 at least is needed"),
    (replace(NARROW, gradients=""), "tma_wgmma", {"q_stages": 3, "tile_m": 64, "mma_warps": 4}, "3 stages of Q; 1 or 2 are"),
    (replace(BACKWARD, gradients=""), "tma_wgmma", {"q_stages": 2, "separate_o": False}, "O lies over the first"),
    (replace(BACKWARD, gradients=""), "tma_wgmma", {"q_in_registers": 24}, "24 columns of Q in registers; a multiple of 16"),
    (replace(BACKWARD, gradients=""), "cp_async", {"stages": 1}, "1 stages; 2 at least are needed"),
    (replace(BACKWARD, gradients=""), "cp_async", {"tile_m": 80}, "80 queries for 4 warps: try tile_m=64"),
    (replace(BACKWARD, gradients=""), "cp_async", {"tile_n": 56}, "56 keys a tile; a multiple of 16 is needed"),
    (replace(BACKWARD, gradients=""), "cp_async", {"tile_n": 80, "mma_warps": 8}, "8 warps can't copy in whole passes"),
    (BACKWARD, "tma_wgmma", {"tile_n": 96}, "96 keys a tile; a multiple of 64 is needed"),
    (BACKWARD, "tma_wgmma", {"mma_warps": 4}, "4 warps for 128 keys; 8 are needed"),
    (NARROW, "tma_wgmma", THREE, "3 warpgroups for a 64×64 dQ, 64 rows and a multiple"),
    (BACKWARD, "tma_wgmma", {"tile_m": 32, "separate_dk": False}, "32 queries a tile, whose dQ has no room for 128 rows of dK"),
    (NARROW, "tma_wgmma", {"tile_m": 64, "dq_stages": 3}, "3 stages of dQ, which 2 warps"),
    (BACKWARD, "tma_wgmma", {"late_dv": 24}, "24 queries whose part of dV comes late"),
    (BACKWARD, "tma_wgmma", {"stages": 1}, "1 stages; 2 at least are needed"),
    (NARROW, "tma_wgmma", {"tile_m": 64, "tile_dv": 192}, "dV is 192 columns wide"),
    (replace(BACKWARD, head_dim=256), "tma_wgmma", {"stages": 1}, "1 stages; 2 at least are needed"),
    (replace(BACKWARD, head_dim=256), "tma_wgmma", {"tile_n": 32}, "32 keys a tile; 64 are needed"),
    (replace(BACKWARD, head_dim=256), "tma_wgmma", {"mma_warps": 4, "mma_registers": 240}, "4 warps; 8 are needed"),
    (replace(BACKWARD, head_dim=256), "tma_wgmma", {"k_in_registers": 40}, "40 columns of K in registers; a multiple of 16"),
    (BACKWARD, "tma_wgmma", {"head_blocks": 2, "stages": 1, "overlap_tiles": False}, "2 blocks to a key tile, whose sums"),
    (BACKWARD, "cp_async", {"stages": 0}, "0 stages; 1 at least is needed"),
    (BACKWARD, "cp_async", {"key_warps": 3}, "8 warps, of which 3 split the keys; a divisor is needed"),
    (BACKWARD, "cp_async", {"tile_n": 32}, "32 keys for 4 warps: try tile_n=64"),
    (BACKWARD, "cp_async", {"step_m": 48}, "64 queries in steps of 48: try a divisor"),
    (BACKWARD, "cp_async", {"step_m": 16}, "steps of 16 queries: try step_m=32"),
]


@pytest.mark.parametrize(("problem", "mechanism", "changed", "said"), MISFITS)
def test_what_would_hang_or_read_past_its_memory(problem, mechanism, changed, said):
    message = refusal(replace(plan(problem, "sm_90a", mechanism), **changed))
    assert said in message
    assert message.endswith("in layouts/sm90.py's table")


def test_too_many_threads():
    message = refusal(replace(planned("sm_80", head_dim=32), mma_warps=36, blocks_per_multiprocessor=1))
    assert "asks for 1152 threads a block" in message
    assert "sm_80 has 1024" in message
    assert "try a smaller tile_m" in message


@pytest.mark.parametrize("target", ["sm_75", "sm_90b", "", "9.0"])
def test_an_unknown_target(target):
    with pytest.raises(ValueError, match="known ones are ") as caught:
        plan(Problem("bfloat16", 64, 64), target)
    message = str(caught.value)
    assert f"target is {target!r}" in message
    assert message.endswith(", ".join(layouts.known_targets()))


@ways
def test_an_unknown_mechanism(target, mechanism):
    with pytest.raises(ValueError, match="pass one of them, or None") as caught:
        plan(Problem("bfloat16", 64, 64), target, mechanism + "_v2")
    assert f"mechanism is '{mechanism}_v2'" in str(caught.value)
    assert f"'{mechanism}'" in str(caught.value).split(";")[1]


def test_a_mechanism_of_another_gpu():
    with pytest.raises(ValueError, match="mechanism is 'tma_wgmma'; sm_120 has 'cp_async': pass one of them"):
        plan(Problem("bfloat16", 64, 64), "sm_120", "tma_wgmma")


@pytest.mark.parametrize("head_dim", [-8, 0, 4, 20, 255, 264, 512])
@pytest.mark.parametrize("field", ["head_dim", "head_dim_v"])
def test_head_dims_out_of_range(field, head_dim):
    with pytest.raises(ValueError, match=f"{field} is {head_dim}; a multiple of 8 from 8 to 256 is needed: pad it"):
        plan(replace(Problem("bfloat16", 64, 64), **{field: head_dim}), "sm_90a")


@pytest.mark.parametrize("dtype", ["float32", "float64", "torch.bfloat16", "float8_e4m3fn"])
def test_a_wrong_dtype(dtype):
    with pytest.raises(ValueError, match="'float16' or 'bfloat16' is needed: convert, or use the reference") as caught:
        plan(Problem(dtype, 64, 64), "sm_90a")
    assert f"dtype is {dtype!r}" in str(caught.value)


# ---- what it offers ------------------------------------------------------------------------------------------------


def operand_bytes(config: Config) -> int:
    """The shared memory of Q, the stages of K and V, and O, from their shapes alone. O may lie over Q."""
    q, o = config.tile_m * config.tile_d * 2, config.tile_m * config.tile_dv * 2
    k_v = config.stages * config.tile_n * (config.tile_d + config.tile_dv) * 2
    return k_v + (q + o if config.separate_o else max(q, o))


@ways
def test_every_config_fits_its_gpu(target, mechanism):
    """Every pair of head dims, for every limit, from numbers that are not the plan's own."""
    per_block, per_multiprocessor = (size * KIB for size in shared_memory(target))
    gpu = layouts.for_target(target).GPU
    for head_dim, head_dim_v in itertools.product(HEAD_DIMS, HEAD_DIMS):
        problem = Problem("bfloat16", head_dim, head_dim_v)
        for config in configs(problem, target, mechanism):
            check(config, gpu)
            blocks, family = config.blocks_per_multiprocessor, layouts.family(config)
            smem = family.smem_bytes(config)
            assert operand_bytes(config) <= smem <= per_block
            assert blocks * (smem + KIB) <= per_multiprocessor
            assert config.threads <= 1024
            assert config.threads * blocks <= 1536  # what the smaller multiprocessors hold
            assert family.accumulator_registers(config) < registers_per_thread(config, gpu) <= 255
            assert config.tile_d >= head_dim
            assert config.tile_dv >= head_dim_v
            assert (config.target, config.mechanism, config.dtype) == (target, mechanism, "bfloat16")
            # An MMA's worth: 16 rows a warp (64 a warpgroup), 16 keys, 32 columns.
            rows_at_once = 16 * config.mma_warps
            assert config.tile_m % rows_at_once == 0
            assert config.tile_n % 16 == config.tile_d % 32 == config.tile_dv % 32 == 0
            if mechanism == "tma_wgmma":
                assert config.tile_m == rows_at_once
                assert max(config.tile_n, config.tile_dv) <= 256  # columns of one warpgroup MMA
                assert config.threads == config.mma_threads + 128
                # setmaxnreg takes multiples of 8 from 24 to 256, and the sum must be there.
                for registers in (config.mma_registers, config.copy_registers):
                    assert registers % 8 == 0
                    assert 24 <= registers <= 256
                assert config.mma_threads * config.mma_registers + 128 * config.copy_registers <= 65536


@ways
def test_a_head_is_padded_no_further_than_it_must(target, mechanism):
    """Padding costs shared memory and products: the next power of two, or half-way to it, is as far as it goes."""
    for head_dim in HEAD_DIMS:
        for other in (64, 256):
            config = plan(Problem("bfloat16", head_dim, other), target, mechanism)
            mirrored = plan(Problem("bfloat16", other, head_dim), target, mechanism)
            assert config.tile_d == mirrored.tile_dv
            assert config.tile_d <= max(64, head_dim + 63)


@pytest.mark.parametrize(
    ("tiles", "heads_per_kv", "unequal", "blocks"),
    [
        (128, 4, True, 2),  # one wave of unequal tiles: the longest holds all others up
        (60, 4, True, 4),
        (60, 2, True, 2),
        (60, 3, True, 1),  # nothing to share
        (60, 1, True, 1),
        (1000, 8, True, 1),  # many waves
        (128, 4, False, 1),  # one wave of equal tiles
        (140, 4, False, 4),  # a little more than one
        (66, 8, False, 2),
        (1000, 8, False, 1),
    ],
)
def test_how_many_blocks_share_a_key_tile(tiles, heads_per_kv, unequal, blocks):
    assert head_blocks((1, 2, 4), tiles, heads_per_kv, 132, unequal) == blocks
    assert head_blocks((1,), tiles, heads_per_kv, 132, unequal) == 1


def test_few_keys_have_smaller_tiles():
    """On cp_async, of the widest heads under a right edge, where a query sees up to 16 tiles of 64 keys."""
    problem = Problem("bfloat16", 256, 256, bounded_right=True)
    found = configs(problem, "sm_90a", "cp_async")
    assert [(x.tile_m, x.tile_n, x.blocks_per_multiprocessor) for x in found] == [(128, 64, 1), (64, 32, 2)]
    assert [takes_short(found, keys) for keys in (1, 1024, 1025)] == [True, True, False]
    assert "; 64 × 32 where a query sees 16 tiles of keys at most" in explain(problem, found[0])
    others = [{"gradients": "qkv"}, {"bounded_right": False}, {"ragged": "cu_seqlens_q"}, {"head_dim": 128, "head_dim_v": 128}]
    for changed in others:
        assert not takes_short(configs(replace(problem, **changed), "sm_90a", "cp_async"), 1)


def test_what_may_share_a_key_tile():
    """In a fixed order of dQ's sums, in wide heads and on ``cp_async`` nothing does."""
    ways = {128: (1, 2, 4), 256: (1,)}
    for d, expected in ways.items():
        problem = Problem("bfloat16", d, d, gradients="qkv")
        found = configs(problem, "sm_90a")
        shared = found[: len(expected)]
        assert tuple(config.head_blocks for config in shared) == expected
        assert all(config.head_blocks == 1 for config in found[len(expected) :])
        assert all(("share a tile of keys" in explain(problem, config)) == (config.head_blocks > 1) for config in found)
        assert all(config.head_blocks == 1 for config in configs(replace(problem, deterministic=True), "sm_90a"))
        assert [config.head_blocks for config in configs(problem, "sm_90a", "cp_async")] == [1]


@pytest.mark.parametrize(
    ("seqlen_q", "rows"),
    [(79, 80), (80, 80), (775, 64), (776, 80), (1024, 80), (8192, 80), (1, 64), (64, 64), (81, 64), (512, 64)],
)
def test_how_many_rows_a_query_tile_has(seqlen_q, rows):
    """As many as waste few of them."""
    assert rows_of_query_tile((64, 80), seqlen_q) == rows
    assert rows_of_query_tile((64,), seqlen_q) == 64
    assert rows_of_query_tile((64, 80), seqlen_q, True) == (80 if seqlen_q >= 8192 else 64)
    assert rows_of_query_tile((64, 80), 16 * seqlen_q, True) == (80 if 16 * seqlen_q >= 8192 else 64)


def test_higher_query_tiles():
    """Where every key counts, or all but those past a right edge; in a fixed order of rectangles only."""

    def rows(**changed):
        return {config.tile_m for config in configs(replace(BACKWARD, **changed), "sm_90a")}

    ragged = {"ragged": "seqused_q seqused_k"}
    edge, fixed = {"bounded_right": True}, {"deterministic": True}
    for changed in ({}, {"softcap": True}, ragged, edge, {**ragged, **edge}, fixed, {**edge, **fixed}):
        assert rows(**changed) == {64, 80}
    others = {"bounded_left": True, "dropout": True}, {"gradients": "kv"}, {"head_dim": 256}
    for changed in (*others, {**ragged, **fixed}, {**ragged, **edge, **fixed}):
        assert rows(**changed) == {64}
    assert rows(head_dim=64, head_dim_v=64) == {128}
    assert "; 80 × 128 where few rows are padding" in explain(BACKWARD, plan(BACKWARD, "sm_90a"))


def test_one_kernel_of_wide_heads():
    """Where V's heads are so much narrower that dK and dV of 128 keys fit, nothing takes registers, and no order is asked for;
    of long sequences."""
    wide = replace(BACKWARD, head_dim=192)

    def mainloops(**changed):
        return [config.backward for config in configs(replace(wide, **changed), "sm_90a")]

    edge = {"bounded_right": True}
    for changed in ({}, edge, {"head_dim": 136, "head_dim_v": 72}, {"ragged": "seqused_k"}):
        assert mainloops(**changed) == ["tma_wgmma_wide", "tma_wgmma_backward"]
    others = {"softcap": True}, {"bounded_left": True}, {"deterministic": True}, {"gradients": "kv"}
    for changed in (*others, {"dropout": True}, {"head_dim_v": 192}, {"head_dim_v": 64}, {"head_dim": 256}):
        assert mainloops(**changed) == ["tma_wgmma_wide"]
    two, both = configs(replace(wide, **edge, softcap=True), "sm_90a"), configs(replace(wide, **edge), "sm_90a")
    assert not takes_one_kernel(two, 1 << 20, True, 1 << 20, 132)
    for cut, least in ((False, 1024), (True, 2048)):
        lengths, busy = (1, least - 1, least, 1 << 20), 132 * (1 + cut)
        assert [takes_one_kernel(both, n, cut, busy, 132) for n in lengths] == [False, False, True, True]
        assert not takes_one_kernel(both, least, cut, busy - 1, 132)
    words = explain(replace(wide, **edge), both[0])
    assert "; 48 × 128 where one kernel serves a sequence of 32 tiles of queries or more" in words


@ways
def test_a_problem_has_a_handful_of_configs(target, mechanism):
    """And plan() takes the best, which is the first."""
    for head_dim in HEAD_DIMS:
        problem = Problem("float16", head_dim, head_dim, True, True, True, True)
        found = configs(problem, target, mechanism)
        assert 1 <= len(set(found)) == len(found) <= 4
        assert plan(problem, target, mechanism) == found[0]


@pytest.mark.parametrize("target", layouts.known_targets())
def test_no_mechanism_is_the_gpus_best(target):
    best = next(iter(layouts.for_target(target).MECHANISMS))
    assert planned(target).mechanism == best == ("tma_wgmma" if target == "sm_90a" else "cp_async")
    assert planned(target) == planned(target, best)


# ---- no size of a call enters it -----------------------------------------------------------------------------------

CALLS = [
    (1, 1, 1, 1, 1),
    (1, 16384, 16384, 16, 16),
    (2, 3, 5, 8, 2),
    (64, 239, 1, 32, 1),
    (3, 1023, 1024, 7, 7),
    (1, 1, 1 << 20, 1, 1),
]  # batch, seqlen_q, seqlen_k, heads, heads_kv


@pytest.mark.parametrize("rules", [{}, {"causal": True}, {"window": (37, 5), "softcap": 20.0}], ids=str)
def test_other_sizes_are_the_same_problem(rules):
    """The identical object, so that the identical config and kernel are found."""
    rules = {"scale": None, "causal": False, "window": None, "softcap": 0.0} | rules
    problems = []
    for batch, seqlen_q, seqlen_k, heads, heads_kv in CALLS:
        q = torch.empty(batch, seqlen_q, heads, 64, dtype=torch.float16, device="meta")
        k = torch.empty(batch, seqlen_k, heads_kv, 64, dtype=torch.float16, device="meta")
        v = torch.empty(batch, seqlen_k, heads_kv, 96, dtype=torch.float16, device="meta")
        call = check_call(q, k, v, **rules)
        assert (call.batch, call.seqlen_q, call.seqlen_k, call.heads, call.heads_kv) == (
            batch,
            seqlen_q,
            seqlen_k,
            heads,
            heads_kv,
        )
        problems.append(problem_of(q.dtype, call, return_lse=True))
    assert all(problem is problems[0] for problem in problems)
    assert len({id(plan(problem, "sm_90a")) for problem in problems}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scale": 0.1}, {"scale": 0.2}),
        ({"window": (1, 2)}, {"window": (300, 400)}),
        ({"causal": True}, {"window": (None, 0)}),
        ({"softcap": 1.0}, {"softcap": 50.0}),
    ],
    ids=str,
)
def test_other_values_are_the_same_problem(one, other):
    x = torch.empty(1, 2, 3, 8, dtype=torch.float16, device="meta")
    none = {"scale": None, "causal": False, "window": None, "softcap": 0.0}
    first, second = (problem_of(x.dtype, check_call(x, x, x, **(none | rules)), False) for rules in (one, other))
    assert first is second


def test_a_problem_says_what_was_asked():
    x = torch.empty(1, 2, 3, 40, dtype=torch.bfloat16, device="meta")
    v = torch.empty(1, 2, 3, 104, dtype=torch.bfloat16, device="meta")
    call = check_call(x, x, v, scale=None, causal=False, window=(7, None), softcap=3.0)
    assert problem_of(x.dtype, call, True) == Problem("bfloat16", 40, 104, True, False, True, True)
    call = check_call(x, x, v, scale=None, causal=True, window=None, softcap=0.0)
    assert problem_of(x.dtype, call, False) == Problem("bfloat16", 40, 104, False, True, False, False)


def test_problem_and_config_have_no_field_for_a_size():
    """A new field makes another kernel for each of its values: whoever adds one says here that it is no run-time size."""
    assert {f.name for f in dataclasses.fields(Problem)} == {
        "dtype",
        "head_dim",
        "head_dim_v",
        "bounded_left",
        "bounded_right",
        "softcap",
        "return_lse",
        "gradients",
        "deterministic",
        "for_backward",
        "expression",
        "sinks",
        "dropout",
        "large_cap",
        "ragged",
        "rows",
        "stored",
        "invariant",
        "appends",
        "merges",
        "blocks",
    }
    for record in (Problem, Config):
        for field in dataclasses.fields(record):
            for size in ("batch", "seqlen", "length", "heads", "stride", "scale"):
                assert size not in field.name.replace("rescale", ""), f"{record.__name__}.{field.name}"


@pytest.mark.parametrize("record", [Problem("bfloat16", 64, 64), planned("sm_90a")], ids=lambda r: type(r).__name__)
def test_problem_and_config_are_frozen_keys(record):
    assert len({record, dataclasses.replace(record)}) == 1
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, getattr(record, field.name))


# ---- in words ------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_explain(target, mechanism, head_dim):
    problem = Problem("bfloat16", head_dim, head_dim, bounded_left=True, bounded_right=True, softcap=True, return_lse=True)
    config = plan(problem, target, mechanism)
    family = layouts.family(config)
    words = explain(problem, config)
    assert f"bfloat16, head_dim {head_dim}" in words
    assert "keys bounded on the left and right, softcap, with the log-sum-exp" in words
    assert f"mechanism   {mechanism}" in words
    assert f"tiles       {config.tile_m} queries × {config.tile_n} keys" in words
    assert f"pipeline    {config.stages} tiles of K and of V in flight; {config.mma_warps} warps compute" in words
    assert f"{family.smem_bytes(config) / KIB:.1f} with alignment" in words
    assert f"{shared_memory(target)[0]} KiB of shared memory a block" in words
    assert f"{family.accumulator_registers(config)} of {registers_per_thread(config, layouts.for_target(target).GPU)}" in words
    assert ("taking turns" in words) == config.ping_pong
    assert (f"{config.blocks_per_multiprocessor} blocks a multiprocessor" in words) == (config.blocks_per_multiprocessor > 1)
    assert f"layouts/{layouts.for_target(target).__name__.rsplit('.', 1)[1]}.py" in words


@pytest.mark.parametrize(("gradients", "field", "name"), [("", "q_in_registers", "Q"), ("qkv", "k_in_registers", "K and V")])
def test_operands_leave_registers_to_functions_and_dropout(gradients, field, name):
    problem = Problem("bfloat16", 256, 256, gradients=gradients)
    config = plan(problem, "sm_90a", "tma_wgmma")
    assert getattr(config, field) > 0
    assert f"hold accumulators and {getattr(config, field)} columns of {name}" in explain(problem, config)
    dropping = replace(problem, dropout=True)
    bare = plan(dropping, "sm_90a", "tma_wgmma")
    assert getattr(bare, field) == 0
    assert bare == replace(config, **{field: 0})
    assert "columns of" not in explain(dropping, bare).partition("registers")[2].partition("shared")[0]


def test_explain_the_plain_problem():
    problem = Problem("float16", 40, 104)
    words = explain(problem, plan(problem, "sm_90a", "cp_async"))
    assert "float16, head_dim 40 (V: 104), all keys, without the log-sum-exp" in words
    assert "the requested one of tma_wgmma, cp_async" in words
    assert "heads take 64 columns in shared memory (V: 128)" in words
    assert "the best of tma_wgmma, cp_async" in explain(problem, plan(problem, "sm_90a"))


def test_o_over_a_q_of_another_width_is_refused():
    config = plan(Problem("bfloat16", 192, 128), "sm_90a")
    assert config.separate_o
    with pytest.raises(ValueError, match=r"O is 128 columns wide .* Q, which is 192; .* try separate_o=True"):
        check(replace(config, separate_o=False), layouts.for_target("sm_90a").GPU)


@pytest.mark.parametrize("ragged", ["", "cu_seqlens_q cu_seqlens_k"])
@pytest.mark.parametrize("deterministic", [False, True])
@ways
def test_where_dq_is_rounded_while_it_is_added(target, mechanism, ragged, deterministic):
    """Where each block says that it adds no more, which clusters without a ragged tile don't, and counts fit 31 bits."""
    problem = Problem("bfloat16", 128, 128, gradients="qkv", ragged=ragged, deterministic=deterministic)
    for config in configs(problem, target, mechanism):
        says_so = mechanism == "tma_wgmma" and not (ragged and config.head_blocks > 1)
        assert rounds_beside(problem, config) == says_so
        assert ("dQ is rounded meanwhile" in explain(problem, config)) == says_so
        assert not says_so or -(-COUNTED_KEYS // config.tile_n) * ADDED + ADDED < 2**31
        assert rounds_beside(replace(problem, blocks="listed"), config) == says_so
        assert not rounds_beside(replace(problem, gradients="kv"), config)
    if mechanism == "tma_wgmma":
        assert not rounds_beside(problem, replace(config, tile_n=64))
