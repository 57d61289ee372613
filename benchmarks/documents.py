"""The measured figures in the documents, written from the result files: ``python -m benchmarks docs``.

A document marks a place with ``<!-- figures: NAME FILE -->`` … ``<!-- end of figures -->``; what lies between is one of
:data:`BLOCKS`, made from ``benchmarks/results/FILE``; ``agreement`` takes two files, the older run first. A test compares
every document with what this module would write, so a figure can't outlive its file.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import compare, model, serving, training
from benchmarks.anchors import geometric_mean
from benchmarks.cases import short
from benchmarks.markdown import ran_on, table
from benchmarks.parts.catalogue import PARTS
from benchmarks.parts.results import Figure, PartsRecord
from benchmarks.parts.show import MARKED, SHIPPED, number
from benchmarks.parts.verdict import verdicts
from benchmarks.report import HOST_BOUND, PAIRS, headline, is_of_host, mebibytes, pair, ratio
from benchmarks.results import THREE_IN_FOUR, Cell, Measurement, Record
from cute_attn.command import write_whole

if TYPE_CHECKING:
    from benchmarks.counters import CountersRecord

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md", "docs/performance.md", "docs/counters.md", "docs/context-parallelism.md")
BLOCK = re.compile(
    r"(?P<mark><!-- figures: (?P<name>[\w-]+) (?P<files>[\w.-]+(?: [\w.-]+)*) -->\n).*?(?P<end><!-- end of figures -->)",
    re.DOTALL,
)
NOTED = 0.01  # spreads from here on stand beside their figure


def write_all() -> list[str]:
    """Rewrite every marked place; returns the documents that changed."""
    changed = []
    for name in DOCUMENTS:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            write_whole(path, new)
            changed.append(name)
    return changed


def rendered(text: str) -> str:
    """A document's text with every marked place made anew. Raises ``ValueError`` for an unknown block or file."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"a document asks for the figures {name!r}; known ones are {', '.join(BLOCKS)}")
        load, block = BLOCKS[name]
        return match["mark"] + block(*(load(RESULTS / file) for file in match["files"].split())) + match["end"]

    return BLOCK.sub(replace, text)


def conditions(record: Any) -> str:
    """What a run ran on."""
    return headline(record).replace("\n", "; ") + "\n"


def overview(*records: Record, direction: str = "forward") -> str:
    """A row per head dim and mask: our rate at each length and, in brackets, the ratio to the best peer. Of a case that several
    records have, the last one's."""
    cells = list({cell.case: cell for record in records for cell in record.of("burst", direction)}.values())
    lengths = sorted({cell.case.seqlen_q for cell in cells})
    rows = []
    for head_dim, causal in dict.fromkeys((cell.case.head_dim, cell.case.causal) for cell in cells):
        row = {c.case.seqlen_q: c for c in cells if (c.case.head_dim, c.case.causal) == (head_dim, causal)}
        rows.append([f"d{head_dim} {'causal' if causal else 'full'}", *(_overview(row.get(n)) for n in lengths)])
    return table(["TFLOP/s (÷ best peer)", *map(short, lengths)], rows)


def _overview(cell: Cell | None) -> str:
    if cell is None or cell.ours is None:
        return ""
    over = ratio(cell)
    return f"{cell.ours:.0f}" + (f" ({over:.2f})" if over else "")


def every_rate(record: Record, direction: str = "forward") -> str:
    """A row per case, a column per peer, in TFLOP/s, the best in bold; then what ours is of what it is measured by. Below,
    what the marks are."""
    cells = record.of("burst", direction)
    peers = record.peer_names(cells)
    pairs = {title: who for title, who in PAIRS.items() if any(pair(cell, *who) for cell in cells)}
    lines: list[list[str]] = []
    rows: list[list[tuple[float | None, bool]]] = []  # figures, and whether they are the host's
    for cell in cells:
        rates = cell.rates()
        ratios = [*((pair(cell, *who), is_of_host(cell, *who[:2])) for who in pairs.values()), (ratio(cell), is_of_host(cell))]
        rows.append([*((rates.get(name), is_of_host(cell, name)) for name in peers), *ratios])
        shown = [_marked(cell.results.get(name), rates.get(name) == max(rates.values())) for name in peers]
        lines.append([_name(cell), *shown, *(_number(x, 2, of_host) for x, of_host in ratios)])
    means = []  # of whole columns only: means over different rows don't compare
    for i, column in enumerate(zip(*rows, strict=True)):
        whole = [value for value, _ in column if value]
        mean = geometric_mean(whole) if len(whole) == len(column) else None
        means.append(_number(mean, 0 if i < len(peers) else 2, any(of_host for _, of_host in column)))
    lines.append(["geometric mean", *means])
    marks = (
        f"± is given from {NOTED:.0%} on; three in four figures have ±{record.usual_spread('burst', THREE_IN_FOUR):.1%} or "
        f"less. {HOST_BOUND} the device waited for the host: the figure is the host's, or made of one that is."
    )
    return table(["case", *peers, *pairs, "ours ÷ best peer"], lines) + f"\n{marks}\n"


def _marked(m: Measurement | None, best: bool) -> str:
    if m is None or not m.ok or m.tflops is None:
        return ""
    text = f"**{m.tflops:.0f}**" if best else f"{m.tflops:.0f}"
    spread = m.spread or 0.0
    return text + (f" ±{spread:.0%}" if spread >= NOTED else "") + (HOST_BOUND if m.host_bound else "")


def agreement(old: Record, new: Record) -> str:
    """How far two runs of the same thing agree."""
    found = compare.agreement(compare.compare(old, new))
    moved = [("ours", found.ours), ("the others", found.others)]
    figures = {
        "figures in both runs": str(found.figures),
        "agree within their two spreads": str(found.within),
        "unchanged": str(found.same),
        "largest difference": f"{found.largest:.1%}",
        **{f"time per call, {who}": f"{mean - 1:+.1%}" for who, mean in moved if mean is not None},
    }
    return table([*figures], [[*figures.values()]])


def sustained(record: Record, direction: str = "forward") -> str:
    """A row per case and peer under two seconds of load: rate, how busy the tensor cores were, clock and power."""
    rows = []
    for cell in record.of("sustained", direction):
        for peer, m in cell.results.items():
            if peer != "ours" and m.ok:
                busy = f"{100 * (m.utilization or 0):.0f} %"
                rows.append([_name(cell), peer, f"{m.tflops:.0f}", busy, f"{m.sm_mhz:.0f} MHz", f"{m.watts:.0f} W"])
    return table(["case", "peer", "TFLOP/s", "tensor cores busy", "SM clock", "power"], rows)


def host(record: Record) -> str:
    """Microseconds of host time for an eager call: without gradients, where they are recorded, the backward pass, a call with
    its backward pass, and one of packed sequences, as far as these were measured: the least of the rounds (their median)."""
    cells = record.of_kind("host")
    titles = {"forward": "µs a call", "recorded": "with gradients", "backward": "backward", "both": "with its backward pass"}
    headings = ["packed" if cell.case.packed else titles[cell.case.direction] for cell in cells]
    rows = [[peer, *(_of_rounds(cell.results.get(peer)) for cell in cells)] for peer in record.peer_names(cells)]
    return table(["peer", *headings], rows)


def _of_rounds(m: Measurement | None) -> str:
    if m is None or not m.ok or m.least is None or m.seconds is None:
        return ""
    return f"{m.least * 1e6:.1f}" + (f" ({m.seconds * 1e6:.1f})" if m.samples else "")


def memory(record: Record) -> str:
    """MiB of the card that a call needs beyond its outputs, and what the forward pass keeps for the backward pass."""
    cells = record.of_kind("memory")
    rows = []
    for peer in record.peer_names(cells):
        found = (cell.results.get(peer) for cell in cells)
        rows.append([peer, *((mebibytes(m, 0) if m and m.ok else None) or "" for m in found)])
    return table(["peer", *(cell.case.label for cell in cells)], rows)


def trained(found: training.Outcome) -> str:
    """A row per run of the small transformer: its last losses, and how far its curve is from eager attention's."""
    rows = []
    for name, curve in found.curves.items():
        off = found.differences.get(name)
        rows.append([name, f"{curve[-1]:.4f}", "" if off is None else f"{off:.4f}", f"{found.seconds[name]:.1f}"])
    headings = "attention", "loss at the end", "largest difference from eager", "seconds"
    return table(headings, rows) + f"\n{found.sentence}\n"


def first_call(record: Record) -> str:
    """Seconds to the first result of a fresh process, after ``import torch``."""
    (cell,) = record.of_kind("first")
    names = "cold_s", "warm_s", "warm_context_s"
    rows = [[peer, *(f"{m.extra[name]:.2f} s" for name in names)] for peer, m in cell.results.items()]
    return table(["peer", "cold cache", "warm cache", "of which CUDA context and inputs"], rows)


def variants(runs: dict) -> str:
    """A table for each thing that was tried: a row per case, a column per variant, and cuDNN in the same run."""
    text = []
    for run in runs["runs"]:
        names = list(dict.fromkeys(name for row in run["rows"] for name in row["tflops"]))
        rows = []
        for row in run["rows"]:
            case = f"d{row['head_dim']} {'causal' if row['causal'] else 'full'} {short(row['seqlen'])}"
            rows.append([case, *(str(row["tflops"].get(name, "")) for name in names), str(row["torch_cudnn"])])
        text.append(table([run["title"], *names, "cuDNN"], rows))
    return "\n".join(text)


def whole(record: PartsRecord) -> str:
    """The forward kernels with stages left out or done twice, a column each, and the sentences that this adds up to."""
    figures = {(figure.what, figure.config): figure for figure in record.of_part("whole") if figure.ok}
    configs = list(dict.fromkeys(config for _, config in figures))
    rows = [
        [what, *(_microseconds(figures.get((what, config))) for config in configs)]
        for what in dict.fromkeys(what for what, _ in figures)
    ]
    sentences = [f"- {verdict.sentence}" for verdict in verdicts(record.figures)]
    return table(["µs of the kernel with", *configs], rows) + "\n" + "\n".join(sentences) + "\n"


def _microseconds(figure: Figure | None) -> str:
    if figure is None or not figure.seconds:
        return ""
    return f"{figure.seconds * 1e6:.0f}" + (f" ({figure.spills} spills)" if figure.spills else "")


def part(record: PartsRecord, name: str) -> str:
    """A row per figure of a part: rate, limit, and the share of the limit that is reached."""
    rows = []
    for figure in record.of_part(name):
        if figure.ok and figure.rate is not None:
            what = f"{figure.what} {SHIPPED}" if figure.shipped and name in MARKED else figure.what
            limit = "" if figure.limit is None else number(figure.limit)
            share = "" if figure.ratio is None else f"{100 * figure.ratio:.0f} %"
            rate = f"{number(figure.rate)} {figure.unit}"
            rows.append([figure.config, figure.mechanism, what, rate, limit, share, figure.limit_is])
    marked = f"\n{SHIPPED} what the plan ships\n" if name in MARKED else ""
    return table(["config", "mechanism", "what", "rate", "limit", "of it", "the limit is"], rows) + marked


def l2_requests(found: dict) -> str:
    """A row per kernel: sectors that TMA brought, that the L2 cache was asked for, that came from memory, in millions."""
    rows = []
    for kernel in found["kernels"]:
        counts = (f"{kernel[name] / 1e6:.1f}" for name in ("sectors_to_sm", "sectors_from_l2", "sectors_from_memory"))
        rows.append([f"{kernel['config']}, {kernel['what']}", f"{kernel['us']:.0f} µs", *counts])
    return table(["kernel", "time", "to shared memory", "from the L2 cache", "from memory"], rows)


def counters(record: CountersRecord) -> str:
    """A row per micro-kernel of the layouts: predicted / counted."""
    from benchmarks.counters import KINDS

    rows = []
    for one in record.kernels:
        cells = [str(one.compared.get(what, "")) for what in KINDS]
        rows.append([one.case.name, one.case.instruction, f"`{one.case.layout}`", *cells])
    return table(["case", "instruction", "layout", *KINDS], rows) + f"\n{record.summary}.\n"


def masks(record: dict[str, Any]) -> str:
    """The other's time ÷ ours, by row, length and head dim; and what finding out blocks takes."""
    ratios: dict[tuple, dict[str, str]] = {}
    for cell in record["cells"]:
        found = ratios.setdefault((cell["row"], cell["seqlen"], cell["head_dim"], cell["goal"]), {})
        if cell["ours"]:
            found[cell["direction"]] = f"{statistics.median(cell['other']) / statistics.median(cell['ours']):.2f}"
    rows = []
    for (name, seqlen, head_dim, goal), found in ratios.items():
        both = (found.get(direction, "–") for direction in ("forward", "backward"))
        rows.append([name, short(seqlen), str(head_dim), *both, f"{goal:.2f}"])
    lines = [
        ran_on(record["about"], ("torch", "nvidia-cutlass-dsl", "cudnn", "triton")),  # what most depends on
        table(["what ÷ what", "length", "d", "forward", "backward", "asked for"], rows),
        *(
            f"`block_mask`, {short(found['seqlen'])} × {short(found['seqlen'])}: {found['seconds'] * 1e6:.0f} µs, "
            f"{found['bytes'] / 2**20:.2f} MiB."
            for found in record["block_masks"]
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _counters(path: Path) -> CountersRecord:
    from benchmarks.counters import CountersRecord  # needs what proves layouts; the other documents don't

    return CountersRecord.load(path)


def _json(path: Path) -> dict:
    return json.loads(path.read_bytes())


def _context_parallel(record: dict[str, Any]) -> str:
    """Imported when it is used: with it come torch's process groups and its compiler, a second of every command's start."""
    from benchmarks import context_parallel

    return context_parallel.table(record)


BLOCKS: dict[str, tuple[Callable, Callable[..., str]]] = {
    "conditions": (Record.load, conditions),
    "overview": (Record.load, overview),
    "overview-backward": (Record.load, partial(overview, direction="backward")),
    "every-rate": (Record.load, every_rate),
    "every-rate-backward": (Record.load, partial(every_rate, direction="backward")),
    "every-rate-both": (Record.load, partial(every_rate, direction="both")),
    "agreement": (Record.load, agreement),
    "sustained": (Record.load, sustained),
    "sustained-backward": (Record.load, partial(sustained, direction="backward")),
    "memory": (Record.load, memory),
    "training": (training.Outcome.load, trained),
    "host": (Record.load, host),
    "context-parallel": (_json, _context_parallel),
    "model": (_json, model.figures),
    "serving": (_json, serving.figures),
    "masks": (_json, masks),
    "first-call": (Record.load, first_call),
    "variants": (_json, variants),
    "whole": (PartsRecord.load, whole),
    "conditions-parts": (PartsRecord.load, conditions),
    **{f"parts-{name}": (PartsRecord.load, partial(part, name=name)) for name in PARTS if name != "whole"},
    "l2-requests": (_json, l2_requests),
    "conditions-counters": (_counters, conditions),
    "counters": (_counters, counters),
}


def _number(value: float | None, digits: int, of_host: bool = False) -> str:
    return "" if value is None else f"{value:.{digits}f}" + HOST_BOUND * of_host


def _name(cell: Cell) -> str:
    return cell.case.label.partition(" ")[2]
