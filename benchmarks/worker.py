"""The process that measures. It opens the device, says what it found, and answers one job at a time.

Messages to the supervisor are tuples: ``("about", dict)`` once; ``("turn", peer or None)`` before and after whatever
belongs to a peer; then ``("cell", Cell)``, or ``("lost", peer, reason)`` when a peer has left the device unusable,
after which this process ends. Jobs are ``(kind, case, lost, rounds)``, one visit to a cell each; ``None`` asks for
``("state", dict)`` and the end.
"""

from __future__ import annotations

import importlib
import warnings
from multiprocessing.connection import Connection

from benchmarks.peers import choose
from benchmarks.results import KINDS
from benchmarks.settings import HOST_ROUNDS, Crew, Settings
from cute_attn.command import leave_interrupts_to_parent


def main(connection: Connection, crew: Crew, settings: Settings) -> None:
    """Serve jobs until told to stop. Ctrl-C is the supervisor's business."""
    leave_interrupts_to_parent()
    warnings.filterwarnings("ignore")  # torch explains at length why a backend won't run; the error says it too
    from benchmarks import card
    from benchmarks.host import first_calls
    from benchmarks.runner import DeviceLostError, Runner

    for module in crew.modules:
        importlib.import_module(module)
    bench, source = open_bench()
    teams = {kind: choose(crew.names, bench.device, kind, quick=crew.quick) for kind in KINDS}

    def notify(peer: str | None) -> None:
        connection.send(("turn", peer))

    about = {
        "card": card.describe(source),
        "versions": card.versions(),
        "before": bench.state(),
        "peers": {p.name: p.about for chosen, _ in teams.values() for p in chosen},
        "missing": {name: why for _, missing in teams.values() for name, why in missing.items()},
    }
    connection.send(("about", about))
    runner = Runner(bench, settings, notify)
    while (job := connection.recv()) is not None:
        kind, case, lost, rounds = job
        peers = [peer for peer in teams[kind][0] if case.direction in peer.directions]
        try:
            if kind == "host":
                each = HOST_ROUNDS[bench.device]
                cell = runner.host(case, peers, lost, range(rounds.start * each, rounds.stop * each))
            elif kind == "memory":
                cell = runner.memory(case, peers, lost)
            elif kind == "first":
                cell = first_calls(case, peers, lost, settings.limit_s, crew.modules, notify)
            else:
                cell = runner.rates(kind, case, peers, lost, rounds)
        except DeviceLostError as error:
            connection.send(("lost", error.peer, str(error)))
            return
        except KeyboardInterrupt:  # the supervisor has ended this process, in the middle of a first call
            return
        connection.send(("cell", cell))
    connection.send(("state", bench.state()))
    bench.close()


def open_bench():
    """The GPU if there is one, otherwise the CPU; with the source that the card's description is read from."""
    import torch

    from benchmarks import card
    from benchmarks.runner import Bench
    from benchmarks.timing import CudaClock, HostClock

    if not torch.cuda.is_available():
        return Bench("cpu", HostClock()), None
    clock = CudaClock()
    source = card.open_source()
    facts = card.describe(source)
    meter = None if source is None else card.Meter(source)
    return Bench("cuda", clock, meter, facts["l2_bytes"], facts["tensor_flop_per_clock"]), source
