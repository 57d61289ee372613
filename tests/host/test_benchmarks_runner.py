"""How the benchmarks measure: clocks, turns, the oracle, and that a faulty peer loses only its own cell."""

import threading
from dataclasses import replace

import pytest
import torch

from benchmarks import card, timing
from benchmarks.cases import DIRECTIONS
from benchmarks.check import Judge, WrongError, make_inputs
from benchmarks.flops import bytes_moved
from benchmarks.peers import REGISTRY, Peer, without_batch
from benchmarks.runner import Bench, DeviceLostError, Runner, Step
from benchmarks.settings import Settings
from tests.host import benchmarks_fakes as fakes

SETTINGS = Settings(limit_s=60.0)
ROUNDS = range(4)


class FakeBench(Bench):
    """A CPU on a fake clock, where products and copies are fakes as well."""

    copy_tbytes_per_s = 1.0

    def __init__(self, clock, **facts):
        super().__init__("cpu", clock, **facts)

    def matmul(self, dtype):
        return lambda: self.clock.work(2e-3), 1e12


@pytest.fixture
def clock():
    return fakes.FakeClock()


def rates(clock, *peers, kind="burst", case=fakes.CASE, settings=SETTINGS, lost=None, rounds=ROUNDS, **bench):
    runner = Runner(FakeBench(clock, **bench), settings)
    return runner.rates(kind, case, peers, lost or {}, rounds)


# --- timing ----------------------------------------------------------------------------------------------------------


def test_a_burst_rests_warms_up_and_times_about_the_time_it_was_given(clock):
    calls = []
    turn = timing.burst(clock, lambda: (calls.append(clock.now()), clock.work(1e-3)), 1e-3, busy=0.010, idle=0.050)
    assert clock.slept == [0.050]
    assert len(calls) == 2 + 10  # 2 ms of warm-up
    assert turn.samples == pytest.approx([1e-3])
    assert not turn.host_bound


def test_a_burst_times_a_slow_call_once(clock):
    turn = timing.burst(clock, lambda: clock.work(0.3), 0.3, busy=0.010, idle=0.0)
    assert turn.samples == pytest.approx([0.3])


def test_a_burst_says_when_the_host_was_the_slower_one(clock):
    turn = timing.burst(clock, lambda: clock.work(1e-5, host=5e-5), 5e-5, busy=0.010, idle=0.0)
    assert turn.host_bound
    assert turn.samples == pytest.approx([5e-5], rel=0.1)


def test_sustained_load_has_no_gaps_and_counts_only_what_has_settled(clock):
    speed = [1e-3]

    def call():
        clock.work(speed[0])
        if clock.now() > 0.1:
            speed[0] = 2e-3  # the card lowers its clock

    turn = timing.sustained(clock, call, 1e-3, seconds=1.0)
    assert not clock.slept
    assert turn.samples == pytest.approx([2e-3] * len(turn.samples))
    assert 5 <= len(turn.samples) <= 20
    assert turn.began == pytest.approx(0.3)
    assert turn.ended >= 1.0


def test_sustained_load_of_a_call_slower_than_its_turn(clock):
    assert timing.sustained(clock, lambda: clock.work(3.0), 3.0, seconds=1.0).samples


def test_host_side_times_calls_without_the_device(clock):
    turn = timing.host_side(clock, lambda: clock.work(1e-3, host=2e-5), calls=120)
    assert turn.samples == pytest.approx([2e-5] * 120)


def test_summary_by_hand():
    median, spread = timing.summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (median, spread) == (3.0, 1.0 / 3.0)  # quartiles 2 and 4
    assert timing.summary([7.0]) == (7.0, 0.0)


# --- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["", "[N/A], 3, 4", "Unable to determine the device handle"])
def test_a_line_that_is_no_reading(line):
    assert card.parse_smi(line, 0.0) is None


def test_a_line_of_nvidia_smi():
    assert card.parse_smi("1980, 312.05, 41\n", 7.0) == card.Reading(7.0, 1980, 312.05, 41)


class FakeSource:
    """Readings at 0, 1, 2 … seconds, then none."""

    def readings(self, stop):
        for second, (mhz, watts) in enumerate([(1980, 100), (1500, 690), (1470, 700), (1480, 710), (345, 80)]):
            yield card.Reading(second, mhz, watts, 50)


def test_the_meter_reads_the_stretch_it_is_asked_for():
    meter = card.Meter(FakeSource())
    assert meter.latest() is not None
    meter.close()
    assert meter.over(1, 3) == (1480, 700)
    assert meter.over(10, 20) is None
    assert meter.latest() == {"sm_mhz": 345, "watts": 80, "celsius": 50}


def test_a_meter_that_fails_costs_only_its_readings():
    class Broken(FakeSource):
        def readings(self, stop: threading.Event):
            raise OSError("no card")

    meter = card.Meter(Broken())
    assert meter.latest() is None
    assert meter.over(0, 1e9) is None


# --- the oracle ------------------------------------------------------------------------------------------------------

CASES = {
    "full": fakes.CASE,
    "causal": replace(fakes.CASE, causal=True),
    "gqa": replace(fakes.CASE, heads=4, heads_kv=2, seqlen_q=5, seqlen_k=11, causal=True),
    "blind rows": replace(fakes.CASE, seqlen_q=11, seqlen_k=5, causal=True),
    "window": replace(fakes.CASE, window=(3, 1), head_dim_v=16),
    "softcap": replace(fakes.CASE, softcap=2.0, dtype="bfloat16"),
    "long": replace(fakes.CASE, batch=1, seqlen_q=600, seqlen_k=600, causal=True, dtype="bfloat16"),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_oracle_agrees_with_a_right_peer(case, direction):
    case = replace(case, direction=direction)
    inputs = make_inputs(case, "cpu", 0)
    peer = Peer("right", "", lambda *a: lambda: fakes.right(*a), "")
    step = Step(case, peer, inputs)
    assert Judge(case, inputs).verdict(step.outputs(step.call())) < 0.02


@pytest.mark.parametrize("name", ["ours_reference", "torch_math", "torch_cpu"])
@pytest.mark.parametrize("direction", ["forward", "recorded", "both"])
def test_the_peers_of_the_cpu_are_right(name, direction):
    peer = REGISTRY[name]
    if (why := peer.why_not()) is not None:
        pytest.skip(why)
    case = replace(fakes.CASE, heads=4, causal=True, dtype="bfloat16", direction=direction)
    inputs = make_inputs(case, "cpu", 0)
    step = Step(case, peer, inputs)
    with peer.around():
        assert Judge(case, inputs).verdict(step.outputs(step.call())) < 0.02


@pytest.mark.parametrize("part", ["out", "dq", "dk", "dv"])
def test_the_oracle_finds_each_output_that_is_off(part):
    case = replace(fakes.CASE, direction="both")
    inputs = make_inputs(case, "cpu", 0)
    step = Step(case, Peer("right", "", lambda *a: lambda: fakes.right(*a), ""), inputs)
    outputs = step.outputs(step.call())
    judge = Judge(case, inputs)
    judge.verdict(outputs)
    with pytest.raises(WrongError, match=f"{part} is off by up to"):
        judge.verdict({**outputs, part: outputs[part] * 1.01})
    with pytest.raises(WrongError, match=f"{part} has shape"):
        judge.verdict({**outputs, part: outputs[part][:, :-1]})
    with pytest.raises(WrongError, match=f"{part} is a NoneType"):
        judge.verdict({**outputs, part: None})


def test_an_unfit_value_is_found_outside_the_sample():
    case = replace(CASES["long"], batch=8, heads=8, heads_kv=8)
    inputs = make_inputs(case, "cpu", 0)
    out = torch.zeros(8, 600, 8, 8)
    out[3, 300, 5, 2] = float("inf")
    with pytest.raises(WrongError, match="1 values that are not finite"):
        Judge(case, inputs).verdict({"out": out})


def test_peers_say_what_they_do_not_compute():
    for change, words in (
        ({"window": (4, 4)}, "no window"),
        ({"softcap": 1.0}, "softcap"),
        ({"seqlen_k": 32}, "top-left"),
    ):
        case = replace(fakes.CASE, causal=True, **change)
        cell = rates(fakes.FakeClock(), REGISTRY["torch_math"], case=case)
        assert cell.results["torch_math"].status == "unsupported"
        assert words in cell.results["torch_math"].reason


class CountingBench(FakeBench):
    """A device whose allocator counts: each fake peer says what it takes."""

    in_use = 0

    @property
    def reads_memory(self):
        return True

    def allocated(self):
        return self.in_use

    def peak_memory(self, call):
        before = self.in_use
        result = call()
        peak, self.in_use = self.in_use, before
        return result, peak - before


# --- the backward pass -----------------------------------------------------------------------------------------------

BACKWARD = replace(fakes.CASE, direction="backward")


def with_backward(name, clock, forward_s=0.0, backward_s=0.0, spoil=None, **more):
    """A right peer whose two passes take their time on a fake clock; ``spoil(gradient, call number)`` makes it wrong."""
    calls = [0]

    class Timed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            clock.work(forward_s)
            return out.clone()

        @staticmethod
        def backward(ctx, dout):
            clock.work(backward_s)
            calls[0] += 1
            return dout if spoil is None else spoil(dout, calls[0])

    def build(case, q, k, v):
        return lambda: Timed.apply(fakes.right(case, q, k, v))

    return Peer(name, "a fake", build, "torch:Tensor", **more)


def test_the_backward_pass_is_timed_without_the_forward_pass(clock):
    peer = with_backward("ours_fake", clock, forward_s=5e-3, backward_s=1e-3)
    cell = rates(clock, peer, case=BACKWARD)
    assert cell.results["ours_fake"].seconds == pytest.approx(1e-3)
    assert cell.results["ours_fake"].tflops == pytest.approx(2.5 * 4 * 2 * 2 * 16 * 16 * 8 / 1e-3 / 1e12)
    both = rates(clock, peer, case=replace(fakes.CASE, direction="both"))
    assert both.results["ours_fake"].seconds == pytest.approx(6e-3)
    assert both.results["ours_fake"].tflops == pytest.approx(3.5 * 4 * 2 * 2 * 16 * 16 * 8 / 6e-3 / 1e12)


def test_wrong_gradients_are_found_before_they_are_timed(clock):
    cell = rates(clock, with_backward("bad", clock, spoil=lambda dout, _: dout * 1.5), case=BACKWARD)
    assert cell.results["bad"].status == "wrong"
    assert "is off by up to" in cell.results["bad"].reason
    assert not cell.results["bad"].samples


def test_what_promises_the_same_bits_is_held_to_it(clock):
    def drift(dout, number):
        return dout * (1 + 1e-7 * (number % 2))

    cell = rates(
        clock,
        with_backward("promises", clock, 0.0, 1e-3, drift, repeatable=True),
        with_backward("does_not", clock, 0.0, 1e-3, drift),
        with_backward("keeps", clock, 0.0, 1e-3, repeatable=True),
        case=BACKWARD,
    )
    assert cell.results["promises"].status == "wrong"
    assert "dq and dk and dv: not the same bits in two calls" in cell.results["promises"].reason
    assert cell.results["does_not"].ok
    assert cell.results["keeps"].ok


def test_without_a_backward_pass_a_peer_is_unsupported(clock):
    def build(case, q, k, v):
        raise NotImplementedError("no backward yet")

    cell = rates(clock, Peer("young", "a fake", build, "torch:Tensor"), case=BACKWARD)
    assert cell.results["young"].status == "unsupported"
    assert "no backward yet" in cell.results["young"].reason


def test_deterministic_peers_take_part_in_backward_cases_only():
    for name in ("ours_deterministic", "ours_cp_async_deterministic"):
        assert REGISTRY[name].directions == ("backward",)
        assert REGISTRY[name].repeatable


def test_dout_is_random():
    inputs = make_inputs(BACKWARD, "cpu", 0)
    assert inputs.dout.std() == pytest.approx(1.0, abs=0.2)
    assert make_inputs(fakes.CASE, "cpu", 0).dout is None


def test_rows_not_in_use_are_zeros_where_that_is_promised(clock):
    """Whoever doesn't promise it may leave anything there."""

    def build(left_there):
        def result(case, q, k, v):
            out = torch.full_like(q, left_there)
            out[:, : case.used] = fakes.right(case.in_use, *(x[:, : case.used] for x in (q, k, v)))
            return lambda: (clock.work(1e-3), out)[1]

        return result

    peers = [Peer(name, "", build(left), "", zeros=zeros) for name, left, zeros in (
        ("clean", 0.0, True), ("careless", 1e-3, True), ("other", float("nan"), False)
    )]  # fmt: skip
    found = rates(clock, *peers, case=replace(fakes.CASE, used=7)).results
    assert (found["clean"].status, found["other"].status) == ("ok", "ok")
    assert found["careless"].status == "wrong"
    assert found["careless"].reason == "out: rows not in use are not zeros, which was promised"


def test_a_later_visit_checks_nothing_anew(clock):
    results = []

    def once_right(case, q, k, v):
        results.append(None)
        return fakes.right(case, q, k, v) if len(results) == 1 else fakes.wrong(case, q, k, v)

    runner = Runner(FakeBench(clock), SETTINGS)
    peer = fakes.timed_peer("once", clock, 1e-3, once_right)
    first = runner.rates("burst", fakes.CASE, [peer], {}, range(2))
    later = runner.rates("burst", fakes.CASE, [peer], {}, range(2, 4))
    assert first.results["once"].error < 1e-5
    assert later.results["once"].error is None
    joined = first.joined(later).results["once"]
    assert (len(joined.samples), joined.visits) == (4, 2)
    assert joined.error < 1e-5


def test_a_drift_between_visits_shows_in_the_spread(clock):
    speed = [1e-3]

    def build(case, q, k, v):
        answer = fakes.right(case, q, k, v)
        return lambda: (clock.work(speed[0]), answer)[1]

    runner, peer = Runner(FakeBench(clock), SETTINGS), Peer("warm", "a fake", build, "torch:Tensor")
    cells = []
    for visit in range(3):
        cells.append(runner.rates("burst", fakes.CASE, [peer], {}, range(2 * visit, 2 * visit + 2)))
        speed[0] *= 1.02
    assert all(cell.results["warm"].spread == pytest.approx(0, abs=1e-9) for cell in cells)
    spread = cells[0].joined(cells[1]).joined(cells[2]).results["warm"].spread
    assert spread == pytest.approx(0.02, rel=0.05)


def test_a_memory_cell_weighs_each_peer(clock):
    bench = CountingBench(clock)
    out_bytes = fakes.CASE.batch * fakes.CASE.seqlen_q * fakes.CASE.heads * fakes.CASE.head_dim_v * 4

    def holds(kept, peak):
        """Keeps ``kept`` bytes beyond its output for the backward pass, which needs ``peak`` beyond the gradients."""

        class Held(torch.autograd.Function):
            @staticmethod
            def forward(ctx, out):
                bench.in_use += out_bytes + kept
                return out.clone()

            @staticmethod
            def backward(ctx, dout):
                bench.in_use += 3 * out_bytes + peak
                return dout

        return lambda case, q, k, v: lambda: Held.apply(fakes.right(case, q, k, v))

    peers = [Peer(name, "", holds(*what), "") for name, what in {"ours": (64, 512), "lean": (64, 0)}.items()]
    cell = Runner(bench, SETTINGS).memory(BACKWARD, [*peers, fakes.timed_peer("bad", clock, 0, fakes.failing)], {})
    assert (cell.results["ours"].peak_bytes, cell.results["ours"].extra["kept_bytes"]) == (512, 64)
    assert cell.results["lean"].peak_bytes == 0
    assert cell.results["lean"].ok
    assert cell.results["bad"].status == "failed"


def test_memory_is_not_read_on_the_cpu(clock):
    huge = replace(fakes.CASE, seqlen_q=2**30, seqlen_k=2**30)  # its inputs alone would not fit
    cell = Runner(FakeBench(clock), SETTINGS).memory(huge, [fakes.timed_peer("good", clock, 1e-3)], {})
    assert cell.results["good"].status == "unsupported"


# --- one cell --------------------------------------------------------------------------------------------------------


def test_rates_come_from_the_clock_and_the_counts(clock):
    cell = rates(clock, fakes.timed_peer("quick", clock, 1e-3), fakes.timed_peer("slow", clock, 4e-3))
    quick, slow = cell.results["quick"], cell.results["slow"]
    assert quick.status == slow.status == "ok"
    assert quick.seconds == pytest.approx(1e-3)
    assert quick.tflops == pytest.approx(4 * 2 * 2 * 16 * 16 * 8 / 1e-3 / 1e12)
    assert quick.tbytes_per_s == pytest.approx(bytes_moved(fakes.CASE) / 1e-3 / 1e12)
    assert slow.seconds == pytest.approx(4e-3)
    assert len(quick.samples) == len(ROUNDS)
    assert quick.error < 1e-5
    assert cell.ceiling.tflops == pytest.approx(500)


def test_faulty_peers_lose_only_their_own_cells(clock):
    faults = {
        name: fakes.timed_peer(name, clock, 1e-3, getattr(fakes, name))
        for name in ("wrong", "not_finite", "failing", "unsupported")
    }
    cell = rates(clock, *faults.values(), fakes.timed_peer("good", clock, 1e-3))
    assert {name: m.status for name, m in cell.results.items()} == {
        "wrong": "wrong",
        "not_finite": "wrong",
        "failing": "failed",
        "unsupported": "unsupported",
        "good": "ok",
    }
    assert cell.results["failing"].reason == "RuntimeError: the kernel fell over"
    assert "not finite" in cell.results["not_finite"].reason
    for name in faults:
        assert not cell.results[name].samples  # never timed


def test_a_peer_that_fails_while_it_is_timed(clock):
    calls = []

    def sometimes(case, q, k, v):
        calls.append(None)
        if len(calls) > 10:
            raise ValueError("enough")
        return fakes.right(case, q, k, v)

    cell = rates(clock, fakes.timed_peer("tired", clock, 1e-3, sometimes), fakes.timed_peer("good", clock, 1e-3))
    assert cell.results["tired"].status == "failed"
    assert cell.results["tired"].seconds is None
    assert cell.results["good"].ok


def test_a_slow_peer_runs_into_its_limit_and_the_others_do_not(clock):
    cell = rates(clock, fakes.timed_peer("slow", clock, 25.0), fakes.timed_peer("good", clock, 1e-3))
    assert cell.results["slow"].status == "timeout"
    assert "of the 60 s" in cell.results["slow"].reason
    assert cell.results["good"].ok


def test_peers_take_turns_and_another_one_begins_each_round(clock):
    turns = []
    runner = Runner(FakeBench(clock), SETTINGS, notify=lambda name: turns.append(name) if name else None)
    peers = [fakes.timed_peer(name, clock, 1e-3) for name in "ab"]
    runner.rates("burst", fakes.CASE, peers, {}, range(2))
    assert turns[:3] == ["matmul", "a", "b"]  # built and checked
    assert turns[3:] == ["matmul", "a", "b", "a", "b", "matmul"]
    turns.clear()
    runner.rates("burst", fakes.CASE, peers, {}, range(2, 4))  # the second visit goes on where the first one ended
    assert turns[3:] == ["b", "matmul", "a", "matmul", "a", "b"]


def test_a_peer_that_is_lost_already_stays_out(clock):
    lost = {"bad": fakes.Measurement("timeout", "hung")}
    cell = rates(clock, fakes.timed_peer("bad", clock, 1e-3), fakes.timed_peer("good", clock, 1e-3), lost=lost)
    assert cell.results["bad"].reason == "hung"
    assert cell.results["good"].ok


def test_small_inputs_are_rotated(clock):
    seen = set()

    def spy(case, q, k, v):
        seen.add(q.data_ptr())
        return fakes.right(case, q, k, v)

    rates(clock, fakes.timed_peer("spy", clock, 1e-3, spy), l2_bytes=2 * bytes_moved(fakes.CASE))
    assert len(seen) == 5  # twice the cache, and one more


def test_a_sustained_cell_reads_the_meter_during_the_counted_part(clock):
    stretches = []

    class Meter:
        def over(self, began, ended):
            stretches.append((began, ended))
            return 1000.0, 650.0

    settings = replace(SETTINGS, sustained_s=2.0, sustained_rounds=2)
    cell = rates(
        clock,
        fakes.timed_peer("good", clock, 1e-3),
        kind="sustained",
        rounds=range(2),
        settings=settings,
        meter=Meter(),
        tensor_flop_per_clock=1e6,
    )
    good = cell.results["good"]
    assert (good.sm_mhz, good.watts) == (1000.0, 650.0)
    assert good.utilization == pytest.approx(good.tflops * 1e12 / (1e6 * 1000e6))
    assert not clock.slept
    assert all(ended - began == pytest.approx(0.7, abs=0.3) for began, ended in stretches)


def test_the_bursts_do_not_read_the_meter(clock):
    assert rates(clock, fakes.timed_peer("good", clock, 1e-3)).results["good"].sm_mhz is None


def test_a_host_cell_keeps_a_sample_of_each_round(clock):
    cell = Runner(FakeBench(clock), SETTINGS).host(
        fakes.CASE,
        [fakes.timed_peer("good", clock, 1e-3, host=3e-5), fakes.timed_peer("bad", clock, 0, fakes.wrong)],
        {},
        ROUNDS,
    )
    assert cell.results["good"].seconds == pytest.approx(3e-5)
    assert cell.results["good"].samples == pytest.approx([3e-5] * 4)
    assert cell.results["bad"].status == "wrong"


def test_a_device_that_no_longer_answers_is_reported_with_its_peer(clock):
    def deadly(case, q, k, v):
        clock.sync = lambda: failing()
        return failing()

    def failing():
        raise RuntimeError("an illegal memory access")

    with pytest.raises(DeviceLostError, match="the device is lost") as caught:
        rates(clock, fakes.timed_peer("deadly", clock, 1e-3, deadly))
    assert caught.value.peer == "deadly"


def test_packed_sequences_are_timed_without_the_gradient_of_an_index():
    """Theirs is the same memory, and not zeros and a copy."""
    q, k, v = (torch.zeros(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    dout = torch.ones(6, 2, 8)
    for x, rows in zip((q, k, v), without_batch(q, k, v), strict=True):
        (dx,) = torch.autograd.grad(rows, x, dout)
        assert dx.shape == x.shape
        assert dx.data_ptr() == dout.data_ptr()
