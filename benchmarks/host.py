"""The first call of a fresh process, cold and warm: ``python -m benchmarks.host PEER CASE_JSON`` is that process.

Cold means that every cache that compilers are known to keep on disk lies in an empty folder; warm is the same again
with that folder as the cold run left it. The clock starts after ``import torch`` and stops at the first result; the
CUDA context and the inputs, which are nobody's fault, are also given on their own.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.peers import REGISTRY, Peer, UnsupportedError
from benchmarks.results import Cell, Measurement
from cute_attn.command import interruptible

CACHE_VARIABLES = (
    "CUTE_ATTN_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
)
ROOT = Path(__file__).resolve().parents[1]


def first_calls(
    case: Case,
    peers: Sequence[Peer],
    lost: Mapping[str, Measurement],
    limit_s: float,
    modules: Sequence[str],
    notify: Callable[[str | None], None],
) -> Cell:
    """A ``first`` cell: seconds of a cold first call; ``extra`` has the warm one and both contexts.

    While it lasts SIGTERM raises ``KeyboardInterrupt``, so that no fresh process outlives the one that started it.
    """
    cell = Cell("first", case, dict(lost))
    with interruptible(signal.SIGTERM):
        for peer in peers:
            if peer.name not in lost:
                notify(peer.name)
                cell.results[peer.name] = _cold_and_warm(case, peer, limit_s / 2, modules)
                notify(None)
    return cell


def _cold_and_warm(case: Case, peer: Peer, limit_s: float, modules: Sequence[str]) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="first-call-") as folder:
        environment = {**os.environ, **{name: os.path.join(folder, name.lower()) for name in CACHE_VARIABLES}}
        environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"  # off by default; warm would mean nothing
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
        command = [sys.executable, "-m", "benchmarks.host", peer.name, json.dumps(case.to_dict()), *modules]
        seconds: dict[str, float] = {}
        for state in ("cold", "warm"):
            try:
                run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
            except subprocess.TimeoutExpired:
                return Measurement("timeout", f"the {state} first call took more than {limit_s:.0f} s: try --limit")
            if run.returncode:
                last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                unsupported = run.returncode == UNSUPPORTED_EXIT
                return Measurement("unsupported" if unsupported else "failed", last[:300])
            answer = json.loads(run.stdout.strip().splitlines()[-1])
            seconds |= {f"{state}_s": answer["total_s"], f"{state}_context_s": answer["context_s"]}
    return Measurement(seconds=seconds["cold_s"], spread=0.0, extra=seconds)


UNSUPPORTED_EXIT = 3


def main(peer: str, case_json: str, *modules: str) -> int:
    """The fresh process: prints its seconds as one line of JSON."""
    import torch

    began = time.perf_counter()
    from benchmarks.check import make_inputs

    for module in modules:
        importlib.import_module(module)
    case = Case.from_dict(json.loads(case_json))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    inputs = make_inputs(case, device, seed=0)
    wait()
    ready = time.perf_counter()
    chosen = REGISTRY[peer]
    try:
        with chosen.around():
            chosen.build(case, inputs.q, inputs.k, inputs.v)()
    except UnsupportedError as why:
        print(why, file=sys.stderr)
        return UNSUPPORTED_EXIT
    wait()
    print(json.dumps({"total_s": time.perf_counter() - began, "context_s": ready - began}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
