"""One visit to a cell: peers checked against the oracle, then taking turns for some rounds; each loses only its own cell."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.card import Meter
from benchmarks.cases import Case
from benchmarks.check import Inputs, Judge, WrongError, make_inputs
from benchmarks.flops import bytes_moved, flops
from benchmarks.peers import Peer, UnsupportedError
from benchmarks.results import Cell, DeviceLostError, Measurement, one_line
from benchmarks.settings import Settings
from benchmarks.timing import Call, Clock, Turn, burst, estimate, host_side, scatter, summary, sustained

SETS_MAX = 64  # input sets; small cases need no more to be out of the L2 cache by the time they come round again
HOST_CALLS = 200  # timed eager calls per round
MATMUL = {"cuda": 8192, "cpu": 512}  # M = N = K of the matrix product that serves as the ceiling
COPY_BYTES = {"cuda": 2**30, "cpu": 2**22}
SHIFT_BYTES, SHIFT_STEP = 2**30, 2**21  # how far a later visit's tensors lie from the first one's; one page


@dataclass
class Bench:
    """The device that is measured on: its clock, its meter, and what of it the runner has to know."""

    device: str
    clock: Clock
    meter: Meter | None = None
    l2_bytes: int = 0
    tensor_flop_per_clock: float | None = None

    def matmul(self, dtype: str) -> tuple[Call, float]:
        """A large square matrix product, the ceiling of everything made of products; and its FLOPs."""
        size = MATMUL[self.device]
        a, b = (torch.randn(size, size, device=self.device, dtype=getattr(torch, dtype)) for _ in range(2))
        return lambda: a @ b, 2.0 * size**3

    @cached_property
    def copy_tbytes_per_s(self) -> float:
        """The rate of a copy within the device's memory, reads and writes counted: measured once per process."""
        size = COPY_BYTES[self.device]
        source = torch.randint(-128, 128, (size,), device=self.device, dtype=torch.int8)
        target = torch.empty_like(source)
        seconds, _ = summary([estimate(self.clock, lambda: target.copy_(source)) for _ in range(5)])
        return 2 * size / seconds / 1e12

    def state(self) -> dict[str, Any] | None:
        """The last reading of the card, if it is read."""
        return None if self.meter is None else self.meter.latest()

    def close(self) -> None:
        if self.meter is not None:
            self.meter.close()

    @property
    def reads_memory(self) -> bool:
        """Whether the allocator keeps count of what is in use: the one for the GPU does."""
        return self.device == "cuda"

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak_memory(self, call: Call) -> tuple[Any, int]:
        """The call's result, and how many bytes of the card it had allocated at its peak."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.clock.sync()
        return result, torch.cuda.max_memory_allocated() - before

    def shifted_memory(self, first_round: int) -> Any:
        """Memory to hold during a visit, so that its tensors lie elsewhere than those of other visits: on which channels
        and in which half of the L2 cache they lie is chance, and the same for all rounds of a visit."""
        if self.device != "cuda":
            return None
        torch.cuda.empty_cache()
        pages = random.Random(first_round).randrange(SHIFT_BYTES // SHIFT_STEP) if first_round else 0
        return torch.empty(pages * SHIFT_STEP, device="cuda", dtype=torch.uint8)


@dataclass
class Entrant:
    """A peer in one cell: what it calls, what it has used, what it has given so far."""

    name: str
    around: Callable[[], AbstractContextManager] = nullcontext
    call: Call | None = None
    per_call: float = 0.0
    spent: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    result: Measurement = field(default_factory=Measurement)

    @property
    def alive(self) -> bool:
        return self.result.status == "ok"

    def lose(self, status: str, reason: str) -> None:
        self.call = None  # lets go of its inputs and graphs
        self.result.status, self.result.reason = status, reason


class Runner:
    """Measures cells on a bench. ``notify`` hears whose turn it is, ``None`` for nobody's: a supervisor's watch."""

    def __init__(self, bench: Bench, settings: Settings, notify: Callable[[str | None], None] = lambda _: None) -> None:
        self._bench = bench
        self._settings = settings
        self._notify = notify
        self._checked: set[tuple[Case, str]] = set()

    def rates(
        self, kind: str, case: Case, peers: Sequence[Peer], lost: Mapping[str, Measurement], rounds: range
    ) -> Cell:
        """A visit to a ``burst`` or ``sustained`` cell; peers in ``lost`` have lost it already and are left out."""
        shift = self._bench.shifted_memory(rounds.start)
        matmul, work = Entrant("matmul"), 0.0
        with self._turn(matmul):
            matmul.call, work = self._bench.matmul(case.dtype)
            matmul.per_call = estimate(self._bench.clock, matmul.call)
        entrants = self._enter(case, [peer for peer in peers if peer.name not in lost])
        self._take_turns([matmul, *entrants], self._turn_of(kind), rounds)
        ceiling = self._finish(matmul, kind, work=work, traffic=None)
        cell = Cell(kind, case, dict(lost), ceiling if ceiling.ok else None, self._bench.copy_tbytes_per_s)
        for entrant in entrants:
            cell.results[entrant.name] = self._finish(entrant, kind, flops(case), bytes_moved(case))
        del shift
        return cell

    def host(self, case: Case, peers: Sequence[Peer], lost: Mapping[str, Measurement], rounds: range) -> Cell:
        """A visit to a ``host`` cell: microseconds that an eager call keeps the caller."""
        entrants = self._enter(case, [peer for peer in peers if peer.name not in lost])
        clock = self._bench.clock
        self._take_turns(entrants, lambda call, _: host_side(clock, call, calls=HOST_CALLS), rounds)
        cell = Cell("host", case, dict(lost))
        for entrant in entrants:
            cell.results[entrant.name] = self._finish(entrant, "host", work=None, traffic=None)
        return cell

    def memory(self, case: Case, peers: Sequence[Peer], lost: Mapping[str, Measurement]) -> Cell:
        """A ``memory`` cell: what a call needs beyond its outputs, peer by peer, and what the forward pass keeps for the
        backward pass beyond its inputs and output."""
        cell = Cell("memory", case, dict(lost))
        entrants = [(peer, Entrant(peer.name, peer.around)) for peer in peers if peer.name not in lost]
        inputs = judge = None
        for peer, entrant in entrants:
            with self._turn(entrant):
                if not self._bench.reads_memory:
                    raise UnsupportedError("memory in use is known of a GPU only")
                if inputs is None or judge is None:
                    inputs = make_inputs(case, self._bench.device, self._settings.seed)
                    judge = Judge(case, inputs, self._settings.seed)
                self._weigh(entrant, case, peer, inputs, judge)
            cell.results[entrant.name] = entrant.result
        return cell

    def _weigh(self, entrant: Entrant, case: Case, peer: Peer, inputs: Inputs, judge: Judge) -> None:
        Step(case, peer, inputs)  # what a library allocates once is not a call's
        before = self._bench.allocated()
        step = Step(case, peer, inputs)
        kept = self._bench.allocated() - before - step.held_bytes
        self._check(entrant, step, judge)
        entrant.result.seconds = estimate(self._bench.clock, step.call)
        entrant.result.spread = 0.0
        if case.direction == "backward":
            entrant.result.extra["kept_bytes"] = max(0, kept)

    def _turn_of(self, kind: str) -> Callable[[Call, float], Turn]:
        s, clock = self._settings, self._bench.clock
        if kind == "burst":
            return lambda call, per_call: burst(clock, call, per_call, busy=s.burst_s, idle=s.idle_s)
        # Turns follow each other without a rest, so the card is under load for the whole visit.
        seconds = s.sustained_s / s.sustained_rounds
        return lambda call, per_call: sustained(clock, call, per_call, seconds=seconds)

    def _enter(self, case: Case, peers: Sequence[Peer]) -> list[Entrant]:
        """Build every peer and, in a process's first visit to the cell, check it; whoever fails has lost the cell."""
        sets = [make_inputs(case, self._bench.device, self._settings.seed + i) for i in range(self._input_sets(case))]
        entrants = [Entrant(peer.name, peer.around) for peer in peers]
        new = {peer.name for peer in peers if (case, peer.name) not in self._checked}
        judge = Judge(case, sets[0], self._settings.seed) if new else None
        for peer, entrant in zip(peers, entrants, strict=True):
            with self._turn(entrant):
                steps = [Step(case, peer, inputs) for inputs in sets]
                if judge is not None and peer.name in new:
                    self._check(entrant, steps[0], judge)
                    self._checked.add((case, peer.name))
                call = in_rotation([step.call for step in steps])
                entrant.per_call = estimate(self._bench.clock, call)
                entrant.call = call
        return entrants

    def _check(self, entrant: Entrant, step: Step, judge: Judge) -> None:
        """Run once, compare with the oracle, and read the memory that a second run needs beyond its outputs."""
        began = self._bench.clock.now()
        step.poison()
        outputs = step.outputs(step.call())
        entrant.result.error = judge.verdict(outputs, step.unpadded)
        entrant.result.extra["first_call_s"] = self._bench.clock.now() - began
        if step.zeros_from and (unlike := [name for name, x in outputs.items() if x[:, step.zeros_from :].any()]):
            raise WrongError(f"{' and '.join(unlike)}: rows not in use are not zeros, which was promised")
        if step.repeatable:
            again = step.outputs(step.call())
            if differing := [name for name, x in outputs.items() if not torch.equal(x, again[name])]:
                raise WrongError(f"{' and '.join(differing)}: not the same bits in two calls, which were promised")
            del again
        del outputs
        if self._bench.reads_memory:
            result, peak = self._bench.peak_memory(step.call)
            own = sum(x.numel() * x.element_size() for x in step.outputs(result).values())
            entrant.result.peak_bytes = max(0, peak - own)

    def _input_sets(self, case: Case) -> int:
        """How many input sets make sure that none is still in the L2 cache when its turn comes again."""
        moved = bytes_moved(case)
        if moved >= 2 * self._bench.l2_bytes:
            return 1
        return min(SETS_MAX, math.ceil(2 * self._bench.l2_bytes / moved) + 1)

    def _take_turns(self, entrants: Sequence[Entrant], turn: Callable[[Call, float], Turn], rounds: range) -> None:
        for round_ in rounds:
            first = round_ % max(len(entrants), 1)  # so that nobody always runs behind the same neighbour
            for entrant in (*entrants[first:], *entrants[:first]):
                if entrant.call is not None and entrant.alive:
                    with self._turn(entrant):
                        entrant.turns.append(turn(entrant.call, entrant.per_call))

    @contextmanager
    def _turn(self, entrant: Entrant) -> Iterator[None]:
        """What happens inside is the entrant's: its exceptions cost it the cell, its time counts against its limit."""
        clock, limit = self._bench.clock, self._settings.limit_s
        began = clock.now()
        self._notify(entrant.name)
        try:
            with entrant.around():
                yield
        except (UnsupportedError, NotImplementedError) as why:
            entrant.lose("unsupported", one_line(why) if isinstance(why, NotImplementedError) else str(why))
        except WrongError as why:
            entrant.lose("wrong", str(why))
        except Exception as error:
            entrant.lose("failed", one_line(error))
            del error  # its traceback holds the peer's tensors
            self._recover(entrant)
        finally:
            self._notify(None)
        entrant.spent += clock.now() - began
        if entrant.alive and entrant.spent > limit:
            entrant.lose(
                "timeout", f"used {entrant.spent:.0f} s of the {limit:.0f} s it may use of a cell: try --limit"
            )

    def _recover(self, entrant: Entrant) -> None:
        """After a peer's exception: free what it held, and see whether the device still answers."""
        gc.collect()
        try:
            self._bench.clock.sync()
            if self._bench.device == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(
                entrant.name, f"{entrant.result.reason}; the device is lost: {one_line(error)}"
            ) from None

    def _finish(self, entrant: Entrant, kind: str, work: float | None, traffic: float | None) -> Measurement:
        """Turn the entrant's turns into its measurement; ``work`` in FLOPs, ``traffic`` in bytes per call."""
        result = entrant.result
        if not entrant.alive or not entrant.turns:
            return result
        result.samples = [statistics.median(turn.samples) for turn in entrant.turns]
        result.seconds, result.spread = scatter(result.samples)
        # The CPU has no queue of its own to fall behind with.
        result.host_bound = self._bench.device != "cpu" and sum(turn.host_bound for turn in entrant.turns) * 2 > len(
            entrant.turns
        )
        if work is not None:
            result.tflops = work / result.seconds / 1e12
        if traffic is not None:
            result.tbytes_per_s = traffic / result.seconds / 1e12
        if kind == "sustained":
            self._read_meter(entrant)
        return result

    def _read_meter(self, entrant: Entrant) -> None:
        """Clock, power, and utilization = rate / (SMs · FLOPs per SM and clock · clock)."""
        meter, result = self._bench.meter, entrant.result
        readings = [r for t in entrant.turns if meter is not None and (r := meter.over(t.began, t.ended)) is not None]
        if not readings:
            return
        result.sm_mhz = sum(mhz for mhz, _ in readings) / len(readings)
        result.watts = sum(watts for _, watts in readings) / len(readings)
        per_clock = self._bench.tensor_flop_per_clock
        if per_clock and result.tflops and result.sm_mhz:
            result.utilization = result.tflops * 1e12 / (per_clock * result.sm_mhz * 1e6)


class Step:
    """A peer's call on one set of inputs, in the case's direction, and what comes out of it under which name."""

    def __init__(self, case: Case, peer: Peer, inputs: Inputs) -> None:
        self._case, self._peer, self._device = case, peer, inputs.q.device
        self.repeatable = peer.repeatable
        self.zeros_from = case.used if peer.zeros else 0  # rows; 0: none are promised
        self.unpadded = peer.unpadded
        if peer.unpadded:
            inputs = inputs.in_use(case)
        self.held_bytes = 0  # of the output that a backward pass starts from
        if case.direction == "forward":
            self.call = peer.build(case, inputs.q, inputs.k, inputs.v)
            return
        leaves = tuple(x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        attend = peer.build(case, *leaves)
        if case.direction == "recorded":
            self.call = attend
            return
        dout = peer.to_bshd(inputs.dout)
        if case.direction == "both":
            self.call = lambda: (out := attend(), *torch.autograd.grad(out, leaves, dout))
        else:
            # The forward pass is made here, once: what is timed is the way back alone, over the graph that is kept.
            out = attend()
            self.held_bytes = out.numel() * out.element_size()
            self.call = lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def outputs(self, result: Any) -> dict[str, Any]:
        """The result's tensors by name, each ``(batch, seqlen, heads, head_dim)``."""
        if not self._case.has_gradients:
            return {"out": self._peer.to_bshd(result)}
        names = ("dq", "dk", "dv") if self._case.direction == "backward" else ("out", "dq", "dk", "dv")
        named = dict(zip(names, result, strict=True))
        if "out" in named:
            named["out"] = self._peer.to_bshd(named["out"])
        return named

    def poison(self) -> None:
        """Leave NaN in freed memory of the outputs' sizes, and of a float32 dQ that is added up, which the allocator hands
        out next: what a peer doesn't write then shows up as not finite."""
        case, dtype = self._case, getattr(torch, self._case.dtype)
        outputs = [("out", dtype)]
        if case.has_gradients:
            outputs += [*((name, dtype) for name in ("dq", "dk", "dv")), ("dq", torch.float32)]
        poisoned = [torch.full(case.shape_of(name), math.nan, dtype=kind, device=self._device) for name, kind in outputs]
        del poisoned  # all at once, so that no two of them were the same memory


def in_rotation(calls: Sequence[Call]) -> Call:
    """A call that is each of ``calls`` in turn."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()
