"""A fake clock and fake peers for the tests of the benchmarks, good ones and faulty ones.

Also a module for ``--peers-from``: importing it registers the peers.
"""

import ctypes
import os
import subprocess
import time
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.peers import Peer, UnsupportedError, peer
from benchmarks.results import Cell, Measurement, Record

CASE = Case(batch=2, seqlen_q=16, seqlen_k=16, heads=2, heads_kv=2, head_dim=8, head_dim_v=8, dtype="float32")
NEEDS = {"needs": "torch:Tensor", "devices": ()}
HANGING = "FAKE_HANGING"  # the environment variable with a path that a hanging peer leaves a file at, once it hangs


class FakeClock:
    """A host and a device, each with its time. Work is queued by :meth:`work`; nothing here takes real time."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0
        self.slept = []

    def work(self, device=0.0, host=0.0):
        """Queue ``device`` seconds of work, which takes the host ``host`` seconds."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def now(self):
        return self.host

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.host += seconds

    def mark(self):
        self.device = max(self.device, self.host)
        return self.device

    def between(self, first, last):
        self.host = max(self.host, last)
        return last - first

    def sync(self):
        self.host = max(self.host, self.device)


def right(case, q, k, v):
    """Eager attention, heads by heads: what a correct peer returns."""
    import torch

    from benchmarks.check import eager

    group = case.heads // case.heads_kv
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    return eager(case, q, k, v, torch.arange(case.seqlen_q)).transpose(1, 2)


def timed_peer(name, clock, seconds, result=right, host=0.0, **more):
    """A peer that is right (unless ``result`` isn't) and takes ``seconds`` of a fake clock."""

    def build(case, q, k, v):
        answer = right(case, q, k, v)

        def call():
            clock.work(seconds, host)
            return answer if result is right else result(case, q, k, v)

        return call

    return Peer(name, "a fake", build, "torch:Tensor", **more)


def wrong(case, q, k, v):
    return right(case, q, k, v) * 1.5


def not_finite(case, q, k, v):
    out = right(case, q, k, v)
    out[-1, -1, -1, -1] = float("nan")
    return out


def failing(case, q, k, v):
    raise RuntimeError("the kernel\nfell over")


def unsupported(case, q, k, v):
    raise UnsupportedError("no such rule here")


def hanging(case, q, k, v):
    if path := os.environ.get(HANGING):
        Path(path).touch()
    time.sleep(600)


def crashing(case, q, k, v):
    os._exit(7)


for _result in (right, wrong, not_finite, failing, unsupported, hanging, crashing):

    @peer(f"fake_{_result.__name__}", "a fake", **NEEDS)
    def _build(case, q, k, v, result=_result):
        return lambda: result(case, q, k, v)


@peer("fake_missing", "a fake whose library isn't installed", needs="not_there:attention", devices=())
def _missing(case, q, k, v): ...


# --- a measuring process without torch: it acts on the case's batch size ----------------------------------------------


def scripted_worker(connection, crew, settings):
    """Answers like ``benchmarks.worker``; its peer "bad" hangs at batch 2, crashes at 3, loses the device at 4."""
    connection.send(("about", {"card": {"device": "cpu"}, "pid": os.getpid()}))
    while (job := connection.recv()) is not None:
        kind, case, lost, rounds = job
        results = dict(lost)
        for name in ("good", "bad"):
            if name in lost:
                continue
            connection.send(("turn", name))
            if name == "bad" and case.batch == 2:
                time.sleep(600)
            if name == "bad" and case.batch == 3:
                os._exit(7)
            if name == "bad" and case.batch == 4:
                connection.send(("lost", name, "an illegal address"))
                return
            connection.send(("turn", None))
            results[name] = Measurement(seconds=1e-3, samples=[1e-3] * len(rounds))
        connection.send(("cell", Cell(kind, case, results)))
    connection.send(("state", {"sm_mhz": 1000.0, "watts": 100.0}))


def scripted_worker_on_a_gpu(connection, crew, settings):
    """A measuring process that found a GPU and two of our peers, and answers every job with a figure of one."""
    connection.send(("about", {"card": {"device": "cuda"}, "peers": {"ours_tma_wgmma": "", "ours_deterministic": ""}}))
    while (job := connection.recv()) is not None:
        connection.send(("cell", Cell(job[0], job[1], {"ours_tma_wgmma": Measurement(seconds=1e-3, samples=[1e-3])})))
    connection.send(("state", None))


def worker_that_cannot_start(connection, crew, settings):
    os._exit(5)


# --- records ---------------------------------------------------------------------------------------------------------


def measured(seconds, tflops=None, spread=0.01, visits=3, **more):
    return Measurement(seconds=seconds, spread=spread, samples=[seconds], tflops=tflops, visits=visits, **more)


def record_of(*cells, **about):
    return Record(
        {"card": {"name": "A Card", "driver": "1.2"}, "versions": {"torch": "2.13"}, **about}, list(cells), True
    )


def job(what: str, folder: str) -> str:
    """For ``supervise.apart``. One that hangs is deaf to signals, as a process is while another of its threads compiles, and
    has started a process of its own."""
    if what == "hangs":
        other = subprocess.Popen(["sleep", "1000"])
        Path(folder, "hangs.part").write_text(f"{os.getpid()} {other.pid}")
        Path(folder, "hangs.part").rename(Path(folder, "hangs"))
        ctypes.PyDLL(None).sleep(1000)
    if what == "dies":
        os._exit(7)
    return what.upper()
