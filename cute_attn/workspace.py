"""Memory that outlives a call: counters, zeros as every kernel leaves them, and room for what blocks of a kernel pass on.

There is one for each stream of a device, which grows with the largest call. A CUDA graph gets one of its own for each stream
that it records, so that graphs may be replayed on any streams; its counters are cleared once, not for each call.
"""

from __future__ import annotations

import torch


def capture_of(stream: int) -> int:
    """The number of the capture that records a stream, which no other capture of the process has."""
    from cuda.bindings import runtime

    error, _, number, *_ = runtime.cudaStreamGetCaptureInfo(stream)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA can't tell which capture records the current stream ({error.name}): is it still going on?")
    return int(number)


class StreamWorkspace:
    """``words`` on a device: so many ``counters`` first, then ``room``."""

    __slots__ = ("counters", "room", "words")

    def __init__(self, dtype: torch.dtype, device: torch.device, counters: int, room: int):
        self.counters, self.room = -(-counters // 4) * 4, room
        self.words = torch.empty(self.counters + room, dtype=dtype, device=device)
        self.words[: self.counters].zero_()

    def holds(self, counters: int, room: int) -> bool:
        return counters <= self.counters and room <= self.room


class Workspaces:
    """Those of one kind of kernel, of one dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.of_streams: dict[tuple[int, int], StreamWorkspace] = {}
        self.recorded: dict[tuple[int, int, int], StreamWorkspace] = {}  # captured last: device, stream, which

    def of(self, q: torch.Tensor, device: int, stream: int, counters: int, room: int) -> StreamWorkspace:
        """One that is large enough, on q's device: the stream's, or that of the stream in what is being captured."""
        found = self.of_streams.get((device, stream))
        recorded = stream != 0 and torch.cuda.is_current_stream_capturing()  # which the stream 0 can't be
        if not recorded and found is not None and found.holds(counters, room):
            return found
        held: dict[tuple, StreamWorkspace] = self.of_streams  # type: ignore[assignment]
        key: tuple[int, ...] = (device, stream)
        if recorded:
            held, key = self.recorded, (*key, capture_of(stream))  # type: ignore[assignment]
            for other in [x for x in tuple(held) if x[0] == key[0] and x[2] != key[2]]:
                held.pop(other, None)
        old = held.get(key)
        if old is not None:
            if old.holds(counters, room):
                return old
            counters, room = max(counters, old.counters), max(room, old.room)
        made = held[key] = StreamWorkspace(self.dtype, q.device, counters, room)
        return made
