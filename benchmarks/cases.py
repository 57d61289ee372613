"""Cases as data: what is computed, never by whom. Imports nothing heavy, so that ``--help`` answers at once."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, replace

DIRECTIONS = ("forward", "recorded", "backward", "both")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # float64 is the oracle's: nothing says how far one may be off


@dataclass(frozen=True)
class Case:
    """One attention problem with its sizes.

    ``window`` is ``(left, right)`` in keys to either side of a query's aligned position, −1 for an unbounded side; the
    last query is aligned with the last key. ``packed`` are the lengths of sequences that lie one after another, queries and
    keys alike: of the one batch element, whose length is their sum. ``used``: how many rows of each sequence of a padded
    rectangle are in use, the first ones, of queries and keys alike; 0: all are. ``direction`` is what is timed: the forward
    pass, the same where gradients are recorded, the backward pass alone, or ``both``, one after the other.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    dtype: str = "bfloat16"
    direction: str = "forward"
    packed: tuple[int, ...] = ()
    used: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim", "head_dim_v"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed to measure anything")
        if self.heads % self.heads_kv:
            raise ValueError(
                f"{self.heads} query heads don't divide among {self.heads_kv} key heads; a multiple is needed: "
                f"try --heads or another --gqa"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction is {self.direction!r}; known: {', '.join(DIRECTIONS)}")
        if self.packed and (self.batch, self.seqlen_q, self.seqlen_k) != (1, sum(self.packed), sum(self.packed)):
            raise ValueError(
                f"packed sequences have {sum(self.packed)} rows in all, and the case has {self.batch} times {self.seqlen_q} "
                f"queries and {self.seqlen_k} keys; once as many of both are needed"
            )
        if self.used and (self.packed or not 0 < self.used <= min(self.seqlen_q, self.seqlen_k)):
            of = "packed sequences" if self.packed else f"{self.seqlen_q} queries and {self.seqlen_k} keys"
            raise ValueError(f"used is {self.used} of {of}; a number of a rectangle's rows is needed, or 0 for all")

    def shape_of(self, name: str) -> tuple[int, int, int, int]:
        """``(batch, seqlen, heads, head_dim)`` of ``q``, ``k``, ``v`` or ``out``, or of one's gradient, ``dq``."""
        of = name.removeprefix("d")
        rows = (self.seqlen_q, self.heads) if of in ("q", "out") else (self.seqlen_k, self.heads_kv)
        return self.batch, *rows, self.head_dim if of in ("q", "k") else self.head_dim_v

    @property
    def has_gradients(self) -> bool:
        """Whether there are some among what is computed."""
        return self.direction in ("backward", "both")

    @property
    def edges(self) -> tuple[int | None, int | None]:
        """How far a query sees to the left and to the right of its aligned key; ``None`` is unbounded."""
        left, right = (None if reach < 0 else reach for reach in self.window or (-1, -1))
        return left, (0 if self.causal else right)

    @property
    def form(self) -> str:
        """``packed`` or ``padded``; nothing where sequences are a rectangle whose rows are all in use."""
        return "packed" if self.packed else "padded" if self.used else ""

    @property
    def in_use(self) -> Case:
        """Of a padded rectangle that of the rows in use; else the case itself."""
        return replace(self, seqlen_q=self.used, seqlen_k=self.used, used=0) if self.used else self

    @property
    def label(self) -> str:
        """A short name that tells the cases of a run apart: ``forward d128 causal 8k``."""
        dims = f"d{self.head_dim}" + (f"/{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        parts = [self.direction, dims, "causal" if self.causal else "full", self.lengths]
        if self.form:
            parts.append(self.form)
        if self.heads != self.heads_kv:
            parts.append(f"gqa{self.heads // self.heads_kv}")
        if self.window is not None:
            parts.append("window{}:{}".format(*self.window))
        if self.softcap:
            parts.append(f"softcap{self.softcap:g}")
        if self.dtype != "bfloat16":
            parts.append(self.dtype)
        return " ".join(parts)

    @property
    def lengths(self) -> str:
        """The sequence length in words, ``8k``; ``1×8k`` where queries and keys differ; of packed ones ``512×128``, or
        ``64×70…4k``, their number and the shortest and the longest; of padded ones ``16×1k/2k``, rows in use and rows."""
        if self.packed:
            least, most = (short(of(self.packed)) for of in (min, max))
            return f"{len(self.packed)}×{least}" + ("" if least == most else f"…{most}")
        q, k = short(self.seqlen_q), short(self.seqlen_k)
        rows = q if q == k else f"{q}×{k}"
        return f"{self.batch}×{short(self.used)}/{rows}" if self.used else rows

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict) -> Case:
        window, packed = fields.get("window"), fields.get("packed", ())
        return Case(**{**fields, "window": None if window is None else tuple(window), "packed": tuple(packed)})


@dataclass(frozen=True)
class Grid:
    """Axes whose product is a list of cases.

    ``tokens`` is batch × query length and ``width`` heads × head_dim; both are kept constant along the other axes, so
    that every cell of a grid moves the same number of bytes. ``batch`` and ``heads`` override them.
    """

    head_dims: tuple[int, ...] = (64, 128, 256)
    causal: tuple[bool, ...] = (False, True)
    seqlens: tuple[int, ...] = (512, 1024, 2048, 8192, 16384)
    directions: tuple[str, ...] = ("forward", "backward")
    tokens: int = 16384
    width: int = 2048
    batch: int | None = None
    heads: int | None = None
    gqa: int = 1
    seqlen_k: int | None = None
    head_dim_v: int | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    dtype: str = "bfloat16"

    def cases(self) -> list[Case]:
        return [
            self._case(*point)
            for point in itertools.product(self.directions, self.head_dims, self.causal, self.seqlens)
        ]

    def _case(self, direction: str, head_dim: int, causal: bool, seqlen: int) -> Case:
        for name, value in (("head_dim", head_dim), ("seqlen", seqlen), ("gqa", self.gqa)):
            if value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        heads = max(1, self.width // head_dim) if self.heads is None else self.heads
        if heads % self.gqa:
            raise ValueError(f"{heads} heads don't divide into groups of {self.gqa}: try --heads {heads * self.gqa}")
        return Case(
            batch=max(1, self.tokens // seqlen) if self.batch is None else self.batch,
            seqlen_q=seqlen,
            seqlen_k=seqlen if self.seqlen_k is None else self.seqlen_k,
            heads=heads,
            heads_kv=heads // self.gqa,
            head_dim=head_dim,
            head_dim_v=head_dim if self.head_dim_v is None else self.head_dim_v,
            causal=causal,
            window=self.window,
            softcap=self.softcap,
            dtype=self.dtype,
            direction=direction,
        )


GRIDS = {
    "full": Grid(),
    "quick": Grid(head_dims=(128,), seqlens=(1024, 8192)),
    # Without a GPU only the runner itself is tested, so the cases are as small as still means something.
    "cpu": Grid(head_dims=(64,), seqlens=(128, 256), tokens=256, width=256),
}


def _models() -> list[Case]:
    """What models have and the grid doesn't: grouped heads, other head dims, a window, few queries."""
    grouped = [
        Case(batch, seqlen, seqlen, 32, 8, 128, 128, causal=True)
        for batch, seqlen in ((1, 2048), (1, 16384), (4, 4096), (16, 1024))
    ]
    dims = [Case(4, 4096, 4096, 16, 16, d, dv, causal=True) for d, dv in ((96, 96), (192, 128))]
    return [
        *grouped,
        *dims,
        Case(1, 16384, 16384, 16, 16, 128, 128, causal=True, window=(512, 0)),
        *(Case(16, sq, sk, 16, 16, 128, 128) for sq, sk in ((1024, 16384), (16384, 1024))),
    ]


def _ragged() -> list[Case]:
    """Packed sequences: lengths of a log-normal distribution with mean 1k, one long among short ones, many short ones; and of
    equal lengths, to be held against rectangles of as many tokens. Padded rectangles, half of whose rows are in use, to be held
    against rectangles of these."""
    draw = random.Random(0)
    drawn = [draw.lognormvariate(0.0, 0.8) for _ in range(64)]
    log_normal = tuple(max(1, round(x * 65536 / sum(drawn))) for x in drawn)
    mixes = [log_normal, (16384, *[256] * 63), (128,) * 512]
    equal = [(seqlen,) * (16384 // seqlen) for seqlen in (512, 1024, 2048, 8192, 16384)]
    lengths = [*((x, True) for x in (*mixes, *equal)), *((x, False) for x in equal)]
    packed = [Case(1, sum(x), sum(x), 16, 16, 128, 128, causal=causal, packed=x) for x, causal in lengths]
    return packed + [Case(16, 2048, 2048, 16, 16, 128, 128, causal=causal, used=1024) for causal in (True, False)]


SUITES = {"models": _models, "ragged": _ragged}


def cases_of(suite: str, directions: tuple[str, ...], smaller: int = 1) -> list[Case]:
    """A suite's cases, their lengths divided by ``smaller``: without a GPU only the runner itself is tested."""

    def less(seqlen: int) -> int:
        return max(1, seqlen // smaller)

    found = []
    for case in SUITES[suite]():
        packed = tuple(map(less, case.packed))
        rows = (sum(packed),) * 2 if packed else (less(case.seqlen_q), less(case.seqlen_k))
        used = case.used and less(case.used)
        found.append(replace(case, batch=less(case.batch), seqlen_q=rows[0], seqlen_k=rows[1], packed=packed, used=used))
    return [replace(case, direction=direction) for direction in directions for case in found]


# Small tensors: the device is done long before the host has queued the next call.
HOST_CASE = Case(batch=1, seqlen_q=128, seqlen_k=128, heads=4, heads_kv=4, head_dim=64, head_dim_v=64, causal=True)
RAGGED_HOST_CASE = replace(HOST_CASE, packed=(64, 64))
# Four times the length is four times the memory, and sixteen times where a score matrix is kept.
MEMORY_CASES = Grid(head_dims=(128,), causal=(True,), seqlens=(16384, 65536), batch=1)


def single_cases(kind: str, directions: tuple[str, ...]) -> list[Case]:
    """The cases of a kind that measures no grid. The host's cost of a call with gradients is that of each pass, and of both."""
    if kind == "memory":
        return replace(MEMORY_CASES, directions=directions).cases()
    if kind == "host":
        found = ("forward",) if directions == ("forward",) else DIRECTIONS
        return [*(replace(HOST_CASE, direction=direction) for direction in found), RAGGED_HOST_CASE]
    return [HOST_CASE]


def short(length: int) -> str:
    """``8192`` → ``8k``; a length that isn't a multiple of 1,024 stays as it is."""
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)
