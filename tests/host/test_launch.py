"""The launch on the host: which device and stream a kernel is given, with the GPU played by fakes."""

import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi

from cute_attn import api, block_mask, kvcache, masks, reference, serve, workspace
from cute_attn import launch as launching
from cute_attn.fields import BACKWARD, FORWARD, MERGE, Field, floats_of_a_row, has_sums, in_order, named, sizes_of_sums
from cute_attn.functions import traced
from cute_attn.launch import Refused, packed_of
from cute_attn.layouts import family, for_target
from cute_attn.layouts.base import COUNTERS, TICKET, TICKET_COUNTERS, WARP, row_padding
from cute_attn.lengths import CHECK, NAMES, Lengths, check_lengths
from cute_attn.plan import configs, plan
from cute_attn.problem import Call, Problem, check_call, problem_of
from cute_attn.rules import LOG2_E
from tests.support import make_gradients, make_qkv

CALL = Call(1, 2, 2, 10, 12, 64, 64, 0.125, None, 3, 0.0)


@pytest.fixture
def gpu(monkeypatch):
    """Two devices of which 0 is current; every device has a raw stream of its own."""
    state = SimpleNamespace(current=0, log=[])

    @contextmanager
    def device(index):
        before, state.current = state.current, index
        yield
        state.current = before

    monkeypatch.setattr(launching, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launching, "_tickets", workspace.Workspaces(torch.int32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "_choices", launching._choices.__wrapped__)
    monkeypatch.setattr(launching, "current_device", lambda: state.current)
    monkeypatch.setattr(launching, "raw_stream", lambda index: 1000 + index)
    monkeypatch.setattr(torch.cuda, "device", device)
    state.kernel = lambda *arguments: state.log.append((state.current, arguments))
    return state


@pytest.mark.parametrize("current", [-1, 0])
def test_kernels_run_on_the_tensors_device_and_its_stream(gpu, monkeypatch, current):
    """Whichever is current; what they are given is made there, too. (Tensors on the CPU have the number −1.)"""
    made, made_on, gpu.current = launching.empty_strided, [], current
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    monkeypatch.setattr(launching, "empty_strided", lambda *room: made_on.append(gpu.current) or made(*room))
    q, k, v = make_qkv(1, 10, 12, 2, 2, 64, 64, torch.bfloat16)
    out, _, lse_raw = launching.forward(CALL, None, False, True, q, k, v)
    launching.gradients(CALL, None, "qkv", False, q, k, v, out, lse_raw, torch.ones_like(out), None)
    for ran_on, arguments in gpu.log:
        assert ran_on == -1
        assert arguments[-1] == 999
    assert set(made_on) == {-1}
    assert gpu.current == current, "the caller's current device has changed"


def names_of(fields):
    return [name for field in fields for name in ([field.name] if isinstance(field, Field) else names_of(field))]


@pytest.mark.parametrize("plans", [None, {}])
def test_arguments_are_the_calls_values_in_the_order_of_the_table(gpu, monkeypatch, plans):
    """What kept calls have in common is one value of the launcher's own; of what most have nothing of there is nothing."""
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    q, k, v = make_qkv(1, 10, 12, 2, 2, 64, 64, torch.bfloat16)
    out, lse, lse_raw = launching.forward(replace(CALL, plans=plans), None, True, True, q, k, v)
    ((_, arguments),) = gpu.log
    assert type(arguments[-2]) is (tuple if plans is None else tvm_ffi.Array)
    assert arguments[-3] is None
    given = vars(named(FORWARD, arguments))
    assert names_of(FORWARD) == list(given)
    assert in_order(FORWARD, given) == (*arguments[:-2], tuple(arguments[-2]), arguments[-1])
    for name, x in {"q": q, "k": k, "v": v, "out": out, "lse": lse, "lse_raw": lse_raw}.items():
        assert given.pop(name) is x
    assert math.isclose(given.pop("scale_log2"), 0.125 * LOG2_E)
    values = {"count": 0, "left": 0, "right": 3, "scale_by_cap": 0.0, "heads_first": 0, "blocks": 132, "stream": 999}
    values |= dict.fromkeys(("captured", "seed", "drop_below", "kept_scale", "tickets", "sinks", "key_lists", "kinds"))
    assert given == {**values, **dict.fromkeys(NAMES)}


def test_a_block_masks_lists_are_for_the_tiles_of_few_keys(gpu, monkeypatch):
    """Where a call takes the smaller ones: of the widest heads under a right edge, on cp_async."""
    planned = []
    monkeypatch.setattr(launching, "prepared", lambda *key: planned.append(key[-1]) or (gpu.kernel, 132))
    blocks = block_mask(masks.causal, None, None, 500, 600, device="cpu")
    call = Call(1, 4, 2, 500, 600, 256, 256, 0.125, None, 0, 0.0, blocks=blocks)
    q, k, v = (torch.zeros(1, n, heads, 256, dtype=torch.bfloat16) for n, heads in ((500, 4), (600, 2), (600, 2)))
    launching.forward(call, "cp_async", False, False, q, k, v)
    ((_, arguments),), (config,) = gpu.log, planned
    assert (config.tile_m, config.tile_n) == (64, 32)
    assert torch.equal(named(FORWARD, arguments).key_lists, blocks.key_lists(64, 32, 1, 4))


@pytest.mark.parametrize(("d", "rows"), [(64, None), (256, 128)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_block_masks_lists_are_arguments(gpu, monkeypatch, d, rows, deterministic):
    """For the tiles of the plan; of key tiles, where dQ's kernel walks over them, and ranks, where dQ's sums have an order."""
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    blocks = block_mask(masks.causal, None, None, 500, 600, device="cpu")
    call = Call(1, 4, 2, 500, 600, d, d, 0.125, None, None, 0.0, blocks=blocks)
    q, k, v = (torch.zeros(1, n, heads, d, dtype=torch.bfloat16) for n, heads in ((500, 4), (600, 2), (600, 2)))
    config = plan(problem_of(q.dtype, call, False), "sm_90a")
    launching.forward(call, None, False, False, q, k, v)
    ((_, arguments),) = gpu.log
    given = named(FORWARD, arguments)
    assert torch.equal(given.key_lists, blocks.key_lists(config.tile_m, config.tile_n, 1, 4))
    assert torch.equal(given.kinds, blocks.kinds_in_a_row(1, 4))
    assert given.tickets.numel() >= TICKET_COUNTERS + 4 * -(-500 // config.tile_m)
    assert not given.tickets[:TICKET_COUNTERS].count_nonzero()
    assert not launching._tickets.of_streams, "memory that stays, of a call that isn't kept"
    gpu.log.clear()
    launching.gradients(call, None, "qkv", deterministic, q, k, v, q, torch.zeros(1, 4, 500), q, None)
    ((_, arguments),) = gpu.log
    given, config = named(BACKWARD, arguments), plan(problem_of(q.dtype, call, False, "qkv"), "sm_90a")
    assert torch.equal(given.query_lists, blocks.query_lists(config.tile_m, config.tile_n, 2, 1, 2))
    assert (given.key_lists is None) == (rows is None)
    assert rows is None or torch.equal(given.key_lists, blocks.key_lists(rows, config.tile_n, 1, 4))
    assert (given.ranks is not None) == (deterministic and d == 64)


def test_captured_tensors_and_sinks_are_arguments(gpu, monkeypatch):
    """As kernels take them: sinks in float32, bools as bytes, numbers as tensors of one; whatever they require."""
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    captured = torch.ones(2, 3, dtype=torch.bool), torch.tensor(2.0), torch.ones(4, 6)[:, ::2]
    call = replace(CALL, captured=captured, sinks=torch.ones(4, dtype=torch.bfloat16).requires_grad_())
    launching.forward(call, None, True, True, *make_qkv(1, 10, 12, 2, 2, 64, 64, torch.bfloat16))
    ((_, arguments),) = gpu.log
    given = named(FORWARD, arguments)
    expected = [(torch.uint8, (2, 3)), (torch.float32, (1,)), (torch.float32, (4, 3))]
    assert [(x.dtype, x.shape) for x in given.captured] == expected
    assert given.captured[2].is_contiguous()
    assert given.captured[0].data_ptr() == captured[0].data_ptr()
    assert given.sinks.dtype == torch.float32
    assert not given.sinks.requires_grad


def kept(q, **changed):
    """A call that is kept, of tensors that say that they lie on a GPU."""
    rules = {"scale": None, "causal": True, "window": None, "softcap": None} | changed
    stand_in = SimpleNamespace(shape=q.shape, dtype=q.dtype, device=torch.device("cuda:0"), is_cuda=True, get_device=lambda: 0)
    return api._kept_call(stand_in, stand_in, stand_in, *rules.values(), False, False, None)


def test_one_call_is_kept_for_all_that_are_alike():
    q, other = torch.empty(2, 10, 4, 64, dtype=torch.float16), torch.empty(2, 11, 4, 64, dtype=torch.float16)
    assert kept(q) is kept(q)
    assert replace(kept(q), plans=None, kept_for=None, passes=None) == check_call(q, q, q, None, True, None, None)
    rules = {"causal": False}, {"scale": 0.5}, {"window": (3, 0)}, {"softcap": 9.0}
    differ = [kept(q), kept(other), kept(q.float()), *(kept(q, **changed) for changed in rules)]
    assert len({id(call) for call in differ}) == len(differ)
    assert all(call.plans == {} for call in differ)
    for wrong in ({"causal": 2}, {"scale": "1"}, {"softcap": -1.0}, {"window": (True, "0")}):
        with pytest.raises((TypeError, ValueError)):
            kept(q, **wrong)


def test_values_of_other_kinds_meet_no_kept_call():
    """They may be equal: 1.0 is True, and a NumPy number may be refused."""
    q = torch.empty(2, 10, 4, 64, dtype=torch.float16)
    kept(q, scale=1.0, window=(1, 0))
    assert kept(q, scale=1, window=(1, 0)).plans is None
    with pytest.raises(TypeError):
        kept(q, scale=True)
    with pytest.raises(TypeError):
        kept(q, window=(True, 0))


def test_values_of_other_kinds_meet_no_step_of_a_cache():
    q, cache, lengths = torch.empty(1, 1, 2, 64), torch.empty(1, 9, 2, 64), torch.empty(1)

    def key(window=None, scale=None, causal=True):
        rules = scale, window, None, causal, False, False, False, "auto", None
        return kvcache._key(q, cache, cache, (lengths, *[None] * 5), None, None, rules)

    assert key() == key() != key((1, 0))
    assert None not in (key(), key((1, 0)), key(scale=1.0))
    assert key((True, 0)) is key(scale=True) is key(causal=1) is None


@pytest.mark.parametrize("place", range(5))
def test_no_step_of_a_cache_is_taken_without_memory(place):
    """The launcher, which looks at all else, takes an address of 0. What is refused is looked at again."""
    step = object.__new__(serve.Step)
    tensors = [torch.ones(1, 1, 2, 64) for _ in range(5)]
    tensors[place].untyped_storage().resize_(0)
    q, k_cache, v_cache, k_new, v_new = tensors
    with pytest.raises(Refused, match="memory"):
        step(q, k_cache, v_cache, (None,) * 6, (k_new, v_new, None, None, None), None, None)


@pytest.mark.parametrize("error", [Refused, AttributeError])
def test_a_kept_step_is_looked_at_again_if_it_is_refused_and_for_nothing_else(gpu, monkeypatch, error):
    """Any other error would make each call slow, unnoticed."""
    made, q, cache = [], torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 9, 2, 64, dtype=torch.bfloat16)

    class Step:
        def __init__(self, *_):
            made.append(self)

        def __call__(self, q, *_):
            if len(made) == 1 and len(gpu.log) == 1:
                raise error("said by the launcher")
            gpu.log.append(q)
            return q, None

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(serve, "Step", Step)
    lengths = torch.ones(2, dtype=torch.int32)
    kvcache.attention_kvcache(q, cache, cache, lengths=lengths)
    with pytest.raises(AttributeError, match="said by") if error is AttributeError else nullcontext():
        kvcache.attention_kvcache(q, cache, cache, lengths=lengths)
    assert len(made) == (1 if error is AttributeError else 2)


def test_a_capture_has_a_workspace_for_each_stream(monkeypatch):
    held, q, capture, capturing = workspace.Workspaces(torch.float32), torch.empty(1), [7], [False]
    monkeypatch.setattr(workspace, "capture_of", lambda stream: capture[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    plain = held.of(q, 0, 5, 4, 100)
    assert held.of(q, 0, 5, 3, 90) is plain is not held.of(q, 0, 6, 3, 90)
    assert not plain.words[: plain.counters].count_nonzero()
    capturing[0] = True
    first, other = held.of(q, 0, 5, 4, 100), held.of(q, 0, 6, 4, 100)
    assert held.of(q, 0, 5, 4, 100) is first is not other
    assert first is not plain
    larger = held.of(q, 0, 5, 8, 50)
    assert larger is not first
    assert (larger.counters, larger.room) == (8, 100)
    capture[0] = 8
    assert held.of(q, 0, 5, 8, 50) is not larger
    assert len(held.recorded) == 1


def test_calls_of_as_many_sequences_share_their_plans_and_no_lengths(gpu, monkeypatch):
    """Which may be one tensor for both sides, or two; and nothing is kept where their values are to be checked."""
    planned = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *key: planned.append(key) or (gpu.kernel, 132))
    q, k, v = (x[0].requires_grad_() for x in make_qkv(1, 10, 12, 4, 2, 64, 64, torch.float16))
    ends = [torch.tensor([0, i, 10], dtype=torch.int32) for i in range(4)]
    for cu_seqlens_q in ends[:3]:
        out = api.attention_varlen(q, k, v, cu_seqlens_q, ends[3], causal=True)
        out.backward(torch.zeros_like(out))
        (_, forward), (_, backward) = gpu.log[-2:]
        for given in (named(FORWARD, forward), named(BACKWARD, backward)):
            assert given.cu_seqlens_q is cu_seqlens_q
            assert given.cu_seqlens_k is ends[3]
            assert given.count == 2
        assert named(FORWARD, forward).tickets is launching._tickets.of_streams[-1, 999].words
    assert len(planned) == 2
    api.attention_varlen(q, k, v, ends[0][:2], ends[0][:2])
    api.attention_varlen(q, k, v, ends[0], seqused_k=ends[0][:2])
    assert len(planned) == 4
    # What a kept call is first planned for is looked at as in a first call.
    apart = torch.stack((ends[0], ends[0]), 1)[:, 0]
    api.attention_varlen(q, k, v, apart, ends[3], causal=True, return_lse=True)
    assert named(FORWARD, gpu.log[-1][1]).cu_seqlens_q.is_contiguous()
    for k_given, bounds, words in ((k, ends[0].long(), "int32 is needed"), (k.float(), ends[0], "one dtype is needed")):
        with pytest.raises(ValueError, match=words):
            api.attention_varlen(q, k_given, v, bounds, ends[3], causal=True, mechanism="tma_wgmma")
    monkeypatch.setenv(CHECK, "1")
    monkeypatch.setattr(api, "_kept", {})
    api.attention_varlen(q, k, v, ends[0])
    assert not api._kept


def test_as_many_calls_are_kept_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(api, "KEPT_MAX", 3)
    for seqlen in range(1, 9):
        kept(torch.empty(1, seqlen, 2, 64, dtype=torch.float16))
        assert len(api._kept) <= 3


@pytest.mark.parametrize("for_backward", [False, True])
def test_a_kept_call_is_planned_once_and_launched_alike(gpu, monkeypatch, for_backward):
    planned = []
    monkeypatch.setattr(launching, "prepared", lambda *key: planned.append(key) or (gpu.kernel, 132))
    q, k, v = make_qkv(2, 10, 12, 4, 2, 64, 32, torch.float16)
    call = replace(check_call(q, k, v, None, True, None, None), plans={})
    first, again = (launching.forward(call, None, True, for_backward, q, k, v) for _ in range(2))
    assert len(planned) == 1
    (_, arguments), (_, as_planned) = gpu.log
    assert arguments[:3] == as_planned[:3] == (q, k, v)
    assert arguments[6:] == as_planned[6:]
    for x, y in zip(first, again, strict=True):
        assert (x is None) == (y is None) == (x is first[2] and not for_backward)
        assert x is None or (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


def test_what_the_launcher_refuses_is_looked_at(gpu, monkeypatch):
    """Strides and alignment belong to no plan: the launcher looks at them, and the words are those of a first call."""

    def kernel(*arguments):
        if len(gpu.log) == 1:
            gpu.log.append(None)
            raise ValueError("Misaligned Tensor data")
        gpu.log.append(arguments)

    monkeypatch.setattr(launching, "prepared", lambda *_: (kernel, 132))
    q, k, v = make_qkv(2, 10, 12, 4, 2, 64, 32, torch.float16)
    call = replace(check_call(q, k, v, None, True, None, None), plans={})
    launching.forward(call, None, False, False, q, k, v)
    out, _, _ = launching.forward(call, None, False, False, q, k, v)
    assert len(gpu.log) == 3
    assert gpu.log[2][3] is out
    misaligned = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    gpu.log[1:] = []
    with pytest.raises(ValueError, match="q starts at an address that is 2 past a multiple of 16 bytes"):
        launching.forward(call, None, False, False, misaligned, k, v)
    gone = q.clone()
    gone.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match="storage"):
        launching.forward(call, None, False, False, gone, k, v)


def test_a_kept_call_is_looked_at_again_for_nothing_else(gpu, monkeypatch):
    """Where there is no memory for the results, there is none a moment later."""
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    q, k, v = make_qkv(2, 10, 12, 4, 2, 64, 32, torch.float16)
    call, asked = replace(check_call(q, k, v, None, True, None, None), plans={}), []
    launching.forward(call, None, False, False, q, k, v)

    def none_left(*_):
        asked.append(1)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(launching, "empty_strided", none_left)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        launching.forward(call, None, False, False, q, k, v)
    assert len(asked) == 1


@pytest.mark.parametrize("ragged", [False, True])
def test_what_hooks_bring_back_to_a_kept_call_is_made_what_it_was(gpu, monkeypatch, ragged):
    """Before it is planned, and then once the launcher has refused it: nobody notes dtypes and devices of such a call's."""

    def kernel(*arguments):
        given = named(BACKWARD, arguments)
        if given.q.dtype != torch.float16 or (ragged and given.cu_seqlens_q.dtype != torch.int32):
            raise ValueError("Mismatched Tensor")
        gpu.log.append(given)

    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (kernel, 132))
    wider, bounds = [x.double() for x in make_qkv(1, 10, 10, 2, 2, 64, 64, torch.float16)], torch.tensor([0, 4, 10])
    call = Call(1, 2, 2, 10, 10, 64, 64, 0.125, None, 0, 0.0, plans={}, kept_for=(torch.device("cpu"), torch.float16))
    if ragged:
        call.lengths, wider = Lengths(2, (bounds, bounds, None, None)), [x[0] for x in wider]
    rows, dout = torch.zeros(wider[0].shape[:-1], dtype=torch.float64).transpose(-1, -2), wider[0].half()
    for _ in range(2):
        launching.gradients(call, None, "qkv", False, *wider, wider[0], rows, dout, None)
    for given in gpu.log:
        assert {x.dtype for x in (given.q, given.k, given.v, given.out, given.dq)} == {torch.float16}
        assert given.lse_raw.dtype == torch.float32
        assert not ragged or {given.cu_seqlens_q.dtype, given.cu_seqlens_k.dtype} == {torch.int32}
    assert len(gpu.log) == 2
    assert torch.equal(gpu.log[1].q, dout)


@pytest.mark.parametrize("ragged", [False, True])
def test_arguments_of_the_backward_pass_are_in_the_order_of_the_table(gpu, monkeypatch, ragged):
    """Each is known by its shape, or is the very tensor that was passed."""
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    call, batch = Call(1, 4, 2, 10, 12, 64, 32, 0.125, None, 3, 0.0), () if ragged else (1,)
    lengths = dict.fromkeys(NAMES)
    if ragged:
        lengths |= {name: torch.tensor([0, i], dtype=torch.int32) for i, name in zip((10, 12), NAMES[:2], strict=True)}
        call.lengths = check_lengths(torch.empty(0), None, tuple(lengths.values()))
    shapes = {"q": (10, 4, 64), "k": (12, 2, 64), "v": (12, 2, 32), "out": (10, 4, 32), "dout": (10, 4, 32)}
    tensors = {name: torch.zeros(*batch, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    lse_raw, dlse = (torch.zeros(*batch, 4, 10) for _ in range(2))
    q, k, v, out, dout = tensors.values()
    found = launching.gradients(call, None, "qkv", True, q, k, v, out, lse_raw, dout, dlse)
    ((_, arguments),) = gpu.log
    given = vars(named(BACKWARD, arguments))
    for name, x in {**tensors, **lengths, "lse_raw": lse_raw, "dlse": dlse}.items():
        assert (given[name] is None) == (x is None), name
        assert x is None or given[name].data_ptr() == x.data_ptr(), name
    assert all(given[f"d{name}"] is dx for name, dx in zip("qkv", found, strict=True))
    assert given["rows"].shape == (2 + 64, 1, 4, 256 if ragged else 128)
    assert given["signals"].dtype == torch.int32
    assert (given["count"], given["blocks"], given["stream"]) == (int(ragged), 132, 999)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_one_kernel_of_wide_heads_where_sequences_are_long(gpu, monkeypatch, ragged, deterministic):
    """Its sums take memory that the pair for short ones doesn't; another mean length compiles nothing, nor does anything that
    an order forbids."""
    planned: list = []
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *key: planned.append(key[-1]) or (gpu.kernel, 132))
    for n in (1000, 1100):
        cu = torch.tensor([0, n], dtype=torch.int32)
        lengths = Lengths(1, (cu, cu, None, None)) if ragged else None
        call = Call(1, 16, 16, n, n, 192, 128, 0.1, None, None, 0.0, lengths=lengths)
        q, v = (torch.zeros(*(() if ragged else (1,)), n, 16, d, dtype=torch.bfloat16) for d in (192, 128))
        launching.gradients(call, None, "qkv", deterministic, q, q, v, v, torch.zeros(16, n), v, None)
        chosen = planned[-1]
        assert chosen.backward == ("tma_wgmma_backward" if n == 1100 and not deterministic else "tma_wgmma_wide")
        one, padding = chosen.backward == "tma_wgmma_backward", row_padding(chosen)
        padded = (n // padding + 2 if ragged else -(-n // padding)) * padding
        assert named(BACKWARD, gpu.log[-1][1]).rows.shape == (2 + 192 * one, 1, 16, padded)
        mainloops = {config.backward for config in planned}
        assert len(mainloops) == (2 if (ragged or n == 1100) and not deterministic else 1)


def test_memory_of_rows_holds_the_sums_of_their_tiles():
    """Behind two values of each row: as many floats as the row has columns, wherever dQ is added up in memory."""
    seen = set()
    for target, d, dv, needs in itertools.product(("sm_80", "sm_90a"), range(8, 257, 8), (64, 128, 256), ("qkv", "kv")):
        problem = Problem("bfloat16", d, dv, gradients=needs)
        for config in configs(problem, target, None):
            if has_sums(problem, config):
                assert math.prod(sizes_of_sums(config)) == config.tile_m * config.tile_d
            assert floats_of_a_row(problem, config) == 2 + config.tile_d * has_sums(problem, config)
            seen.add((needs, has_sums(problem, config)))
    assert seen == {("qkv", True), ("qkv", False), ("kv", False)}


def test_whoever_rounds_a_piece_of_dq_holds_it_as_whoever_adds_it():
    """As many threads have as many values each in memory as an accumulator of that shape has."""
    pytest.importorskip("cutlass.cute")
    from cute_attn.cast_queries import CastQueries

    seen = set()
    for target, d, dv in itertools.product(("sm_80", "sm_86", "sm_90a"), range(8, 257, 8), (64, 128, 256)):
        problem = Problem("bfloat16", d, dv, gradients="qkv")
        mechanisms = for_target(target).MECHANISMS
        for config in itertools.chain.from_iterable(configs(problem, target, mechanism) for mechanism in mechanisms):
            if not has_sums(problem, config):
                continue
            kernel, lay = CastQueries(problem, config), family(config)
            mma, (rows, columns) = lay.mma("dQ", config), lay.piece_shape(config)
            values = math.prod(kernel.product_shape()) // (WARP * mma.warps * mma.across)
            assert values * kernel.threads == rows * columns
            seen.add((config.backward, config.tile_m, lay.turned(config)))
    assert len(seen) >= 6


@pytest.mark.parametrize("ragged", ["", "cu_seqlens_q cu_seqlens_k"], ids=["rectangle", "ragged"])
def test_all_signals_are_cleared_where_the_first_kernel_does(ragged):
    """By so many words a block, but for the one that this kernel itself may set."""
    pytest.importorskip("cutlass.cute")
    from cute_attn.row_values import RowValues

    seen = set()
    for target, d, dv, causal in itertools.product(("sm_80", "sm_90a"), range(8, 257, 8), (64, 128, 256), (False, True)):
        problem = Problem("bfloat16", d, dv, bounded_right=causal, gradients="qkv", ragged=ragged)
        for config in configs(problem, target, None):
            kernel = RowValues(problem, config)
            assert kernel.clears == (config.backward == "tma_wgmma_backward")
            for tiles in range(1, 40) if kernel.clears else ():
                padded = tiles * row_padding(config)
                blocks = -(-padded // (kernel.rows * kernel.steps))
                assert blocks * kernel.words >= COUNTERS - TICKET + padded // config.tile_m
                assert kernel.words <= kernel.threads
                seen.add(config.tile_m)
    assert seen == {48, 64, 80, 128}


def test_a_stride_that_is_never_used_is_one_that_kernels_count_on():
    """Of a dimension of size 1, which a gradient may have from expanding: 0, or what is no multiple."""
    x = torch.zeros(512, dtype=torch.bfloat16)
    for strides in ((0, 64, 16, 1), (3, 64, 16, 1), (512, 64, 16, 1)):
        given = x.as_strided((1, 8, 4, 16), strides)
        read = launching._readable(given)
        assert read.data_ptr() == given.data_ptr()
        assert read.stride(0) > 0
        assert read.stride(0) % 8 == 0
    expanded = x.as_strided((2, 8, 4, 16), (0, 64, 16, 1))
    assert launching._readable(expanded).is_contiguous()


def test_heads_may_come_first(gpu, monkeypatch):
    """Then outputs and gradients are views of memory in which they don't, and parts of a packed tensor where q, k, v are."""
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    packed = torch.zeros(2, 10, 3, 4, 64, dtype=torch.bfloat16)
    for parts, packs in ((packed.unbind(2), True), ([x.clone() for x in packed.unbind(2)], False)):
        q, k, v = (x.transpose(1, 2) for x in parts)
        call = check_call(q, k, v, None, True, None, None, heads_first=True)
        call.packs = True
        assert (call.heads, call.heads_kv, call.seqlen_q, call.seqlen_k) == (4, 4, 10, 10)
        out, _, lse_raw = launching.forward(call, None, False, True, q, k, v)
        gradients = launching.gradients(call, None, "qkv", False, q, k, v, out, lse_raw, torch.zeros_like(out), None)
        for x in (out, *gradients):
            assert x.shape == (2, 4, 10, 64)
            assert x.transpose(1, 2)[0].is_contiguous() == (x is out or not packs)
        assert (launching.packed_of(*(x.transpose(1, 2) for x in gradients)) is not None) == packs
        for (_, arguments), fields in zip(gpu.log, (FORWARD, BACKWARD), strict=True):
            assert named(fields, arguments).heads_first == 1
        gpu.log.clear()


@pytest.mark.parametrize("so_far", [torch.bfloat16, torch.float32])
def test_arguments_of_merging_are_in_the_order_of_the_table(gpu, monkeypatch, so_far):
    """In float32 what is so far is where the result goes; else that is a tensor of its own."""
    asked = []
    monkeypatch.setattr(launching, "prepared", lambda *key: asked.append(key) or (gpu.kernel, 132))
    out, more = (torch.zeros(1, 3, 2, 40, dtype=dtype) for dtype in (so_far, torch.bfloat16))
    lse, lse_more = (torch.zeros(1, 2, 3) for _ in range(2))
    merged = launching.merge(out, lse, more, lse_more, 0.5)
    ((_, arguments),) = gpu.log
    assert (merged.dtype, merged.shape) == (torch.float32, out.shape)
    in_place = so_far == torch.float32
    assert (merged is out) == in_place
    given = {"so_far": None if in_place else out, "lse": lse, "more": more, "lse_more": lse_more, "to_log2": 0.5, "stream": 999}
    found = vars(named(MERGE, arguments))
    assert all(found[name] is x or found[name] == x for name, x in {"into": merged, **given}.items())
    ((of, mechanism, _),) = asked
    assert (of.dtype, of.head_dim_v, of.merges, mechanism) == ("bfloat16", 40, str(so_far).removeprefix("torch."), None)
    launching.merge(out[:, :0], lse[:, :, :0], more[:, :0], lse_more[:, :, :0], 0.5)
    assert len(gpu.log) == 1, "there was nothing to merge"


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("score", [None, lambda score, *_: 0.5 * score])
def test_gradient_of_sinks(gpu, monkeypatch, score, softcap):
    """From what the kernels leave of each row, in raw units, it is the reference's."""
    q, k, v = make_qkv(2, 20, 12, 4, 2, 16, 16, torch.bfloat16)
    call = check_call(q, k, v, None, True, None, softcap)
    call.sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], requires_grad=True)
    call.expression, call.captured = traced(None, score, (), None, q, 4, 2)
    out, lse, lse_log2 = reference.attention(q, k, v, call)
    dout, dlse = make_gradients(q, v)
    want = reference.gradients(q, k, v, out, lse_log2, dout, dlse, call)
    unit = 1.0 if score else softcap or call.scale

    def kernel(*arguments):
        rows, seen = named(BACKWARD, arguments).rows, lse != -math.inf
        rows[0], rows[1] = math.inf, 0.0
        rows[0, ..., :20] = torch.where(seen, lse / unit, math.inf)
        rows[1, ..., :20] = torch.where(seen, (dout.float() * out).sum(-1).transpose(1, 2) - dlse, 0.0)

    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (kernel, 132))
    found = launching.gradients(call, None, "", False, q, k, v, out, lse, dout, dlse)
    assert len(found) == 4
    torch.testing.assert_close(found[3], want[3])


def test_gradient_of_sinks_of_ragged_sequences(gpu, monkeypatch):
    """Memory holds NaN at first, and kernels write the rows in use alone, of each sequence from a multiple of 128 on."""
    ends = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    q, k, v = (x[0] for x in make_qkv(1, 20, 20, 4, 2, 16, 16, torch.bfloat16))
    call = Call(1, 4, 2, 20, 20, 16, 16, 0.25, None, None, 0.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0], requires_grad=True))
    call.lengths = check_lengths(torch.empty(0), None, (ends, ends, None, None))
    out, lse, lse_log2 = (x.detach() for x in reference.attention(q, k, v, call))
    dout = make_gradients(q[None], v[None])[0][0]
    with torch.no_grad():
        want = reference.gradients(q, k, v, out, lse_log2, dout, None, call)

    def kernel(*arguments):
        rows = named(BACKWARD, arguments).rows
        for i, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
            there = slice((begin // 128 + i) * 128, (begin // 128 + i) * 128 + end - begin)
            rows[0, 0, :, there] = lse[:, begin:end] / call.scale
            rows[1, 0, :, there] = (dout.float() * out).sum(-1).T[:, begin:end]

    made = launching.empty_strided

    def full_of_nans(*room):
        x = made(*room)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(launching, "empty_strided", full_of_nans)
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (kernel, 132))
    found = launching.gradients(call, "cp_async", "", False, q, k, v, out, lse, dout, None)
    torch.testing.assert_close(found[3], want[3])


def test_device_is_restored_when_the_launch_fails(gpu, monkeypatch):
    def fails(*_):
        raise RuntimeError("launch failed")

    entered = []

    class Device:
        def __init__(self, index):
            entered.append(index)

        def __enter__(self):
            gpu.current = -1

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launching, "prepared", lambda *_: (fails, 132))
    with pytest.raises(RuntimeError, match="launch failed"):
        launching.forward(CALL, None, False, False, *make_qkv(1, 10, 12, 2, 2, 64, 64, torch.bfloat16))
    assert entered == [-1, "left"]


@pytest.mark.parametrize(("head_dim", "needs", "ordered"), [(128, "qkv", True), (128, "kv", False), (256, "qkv", False)])
def test_an_order_is_fixed_only_where_dq_has_sums(gpu, monkeypatch, head_dim, needs, ordered):
    """Elsewhere ``deterministic=True`` is the same kernel: heads wider than 128 have no sums in memory on Hopper."""
    problems = []
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda problem, *_: (problems.append(problem) or gpu.kernel, 132))
    q, k, v, dout, out = (torch.zeros(1, 10, 2, head_dim, dtype=torch.bfloat16) for _ in range(5))
    lse = torch.zeros(1, 2, 10)
    call = Call(1, 2, 2, 10, 10, head_dim, head_dim, 0.125, None, None, 0.0)
    gradients = launching.gradients(call, "tma_wgmma", needs, True, q, k, v, out, lse, dout, None)
    assert [gradient is not None for gradient in gradients] == [name in needs for name in "qkv"]
    assert [problem.deterministic for problem in problems] == [ordered]
    ((_, arguments),) = gpu.log
    rows, signals = arguments[7:9]
    assert (len(rows) > 2) == (signals is not None) == ordered


@pytest.mark.parametrize(
    ("packed", "needs", "packs", "together"),
    [
        ("qkv", "qkv", True, "qkv"),
        ("qkv", "kv", True, "kv"),
        ("kv", "qkv", True, "kv"),
        ("qkv", "qv", True, ""),
        ("qkv", "qkv", False, ""),
        ("", "qkv", True, ""),
    ],
)
def test_gradients_of_packed_inputs_are_packed(gpu, monkeypatch, packed, needs, packs, together):
    """Where autograd asks for them; kernels take any strides, and operators promise contiguous results."""
    monkeypatch.setattr(launching, "device_target", lambda device: "sm_90a")
    monkeypatch.setattr(launching, "prepared", lambda *_: (gpu.kernel, 132))
    tensors = dict.fromkeys("qkv", torch.zeros(()))
    tensors |= {name: torch.zeros(2, 10, 4, 64, dtype=torch.bfloat16) for name in tensors}
    tensors |= zip(packed, torch.zeros(2, 10, max(len(packed), 1), 4, 64, dtype=torch.bfloat16).unbind(2), strict=False)
    out, dout = torch.zeros(2, 2, 10, 4, 64, dtype=torch.bfloat16)
    call = Call(2, 4, 4, 10, 10, 64, 64, 0.125, None, None, 0.0, packs=packs)
    found = launching.gradients(call, None, needs, False, *tensors.values(), out, torch.zeros(2, 4, 10), dout, None)
    found = dict(zip("qkv", found, strict=True))
    assert {name for name, x in found.items() if x is not None} == set(needs)
    if together:
        whole = packed_of(*(found[name] for name in together))
        assert whole.shape == (2, 10, len(together), 4, 64)
        assert whole.is_contiguous()
    assert all(x.is_contiguous() for name, x in found.items() if name in needs and name not in together)


def test_what_is_packed():
    x = torch.arange(2 * 5 * 3 * 4 * 8).view(2, 5, 3, 4, 8)
    q, k, v = x.unbind(2)
    assert torch.equal(packed_of(q, k, v), x)
    assert packed_of(q, k, v).data_ptr() == x.data_ptr()
    assert torch.equal(packed_of(k, v), x[:, :, 1:])
    strided = x[:, 1:4]
    assert torch.equal(packed_of(*strided.unbind(2)), strided)
    rows = x.flatten(0, 1)
    assert torch.equal(packed_of(*(part[None] for part in rows.unbind(1))), rows[None])
    for parts in ((q, v), (v, k), (k, k), (q, k[..., :4]), (q, x.transpose(0, 1).unbind(2)[1]), x.transpose(0, 2).unbind(2)):
        assert packed_of(*parts) is None
    one = torch.zeros(6, 8)
    assert packed_of(one[:2], torch.zeros(2, 8)) is None
