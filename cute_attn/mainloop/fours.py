"""Four neighbouring keys of a query, 16 bits each, as memory has them, and scores of keys × queries, as a warp has them.

There a thread has one key, and the one 8 further on, of two neighbouring queries: 2 bytes here and 2 bytes there of memory in
which keys are neighbours. If the warp's matrices of 8 × 8 are transposed, it has two neighbouring keys of one query, and the
two 8 further on; and two threads that exchange halves have four each, 8 bytes. Four threads have all of a query's 16 keys, a
whole sector.
"""

from __future__ import annotations

from cutlass import Int32, Uint32, cute

from cute_attn.arithmetic import either

FOUR = 4


def transposed(word: Uint32) -> Uint32:
    """Two neighbours in a row of a warp's 8 × 8 matrix of 16 bits to those of the transposed matrix."""
    code = "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};"
    return cute.arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[word])


def offsets() -> tuple[Int32, Int32]:
    """How far the query and the first key of a thread's four are from its own first query and key."""
    lane = cute.arch.lane_idx()
    row, pair = lane // FOUR, lane % FOUR
    return row - pair * 2, pair * 2 + pair % 2 * 6 - row


def to_memory(low: Uint32, high: Uint32) -> tuple[Uint32, Uint32]:
    """What a thread has of its key, two queries, and of the key 8 further on, to its four keys of a query."""
    return _exchanged(transposed(low), transposed(high))


def from_memory(first: Uint32, second: Uint32) -> tuple[Uint32, Uint32]:
    """And back."""
    low, high = _exchanged(first, second)
    return transposed(low), transposed(high)


def _exchanged(first: Uint32, second: Uint32) -> tuple[Uint32, Uint32]:
    """The even ones of neighbouring threads have both first words, the odd ones both second words, and the other way round."""
    odd = cute.arch.lane_idx() % 2 != 0
    other = cute.arch.shuffle_sync_bfly(either(odd, first, second), 1)
    return either(odd, other, first), either(odd, second, other)
