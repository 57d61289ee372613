"""New keys and values into a cache, and queries turned with them, in one kernel: what comes before attention to the cache.

A thread has 16 bytes of a row of one of the three, or, where columns of both halves of a head are turned together, of both. It
reads them once and writes them once; angles are the tables' (``stored.py``), and the products float32.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from cute_attn.attend import cached_keys, with_elements
from cute_attn.balance import CachedKeys
from cute_attn.fields import APPEND, named
from cute_attn.layouts.base import VECTOR
from cute_attn.layouts.fragments import vector, vector_at

THREADS = 128


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.APPEND`'s values to compile."""
    kernel = Append(problem)

    @cute.jit
    def append(*arguments):
        given = named(APPEND, arguments)
        k_new, v_new, q, turned = (with_elements(m, problem) for m in (given.k_new, given.v_new, given.q, given.q_turned))
        some = k_new if cutlass.const_expr(q is None) else q
        keys = cached_keys(problem, config, given, some, given.k_cache.shape[2])
        rotary = given.cos, given.sin, given.rotary_begin
        kernel.launch((given.k_cache, given.v_cache), (k_new, v_new), q, turned, rotary, keys, given.stream)

    return append


class Append:
    """The kernel of one problem."""

    def __init__(self, problem):
        self.problem = problem
        self.turns = problem.appends != "as they are"

    @cute.jit
    def launch(self, caches, new, q, turned, rotary, keys: CachedKeys, stream):
        threads = sum(_vectors(m) for m in new)
        if cutlass.const_expr(self.turns):
            threads += _vectors(q)
        self.kernel(caches, new, q, turned, rotary, keys).launch(
            grid=[(threads + THREADS - 1) // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, caches, new, q, turned, rotary, keys: CachedKeys):
        n = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        for i in cutlass.range_constexpr(2):
            here = _vectors(new[i])
            if (n >= 0) & (n < here):
                self._append(caches[i], new[i], rotary if i == 0 else None, keys, n)
            n -= here
        if cutlass.const_expr(self.turns):
            if (n >= 0) & (n < _vectors(q)):
                self._turn_query(q, turned, rotary, keys, n)

    @cute.jit
    def _append(self, cache: cute.Tensor, new: cute.Tensor, rotary: Any, keys: CachedKeys, n):
        element, row, head, column = _place(new, n)
        i, j = keys.of_row(keys.cu_seqlens_k_new, element, row)
        if (i < keys.count) & (j >= 0):
            old, _ = keys.old_and_new(i)
            if old + j < keys.capacity:
                to_element, to_row = keys.place(i, old + j)
                source, into = new[element, None, head, None], cache[to_element, None, head, None]
                if cutlass.const_expr(rotary is None or not self.turns):
                    vector_at(into, to_row, column).store(vector(source, row, column).load())
                else:
                    self._turn(source, row, into, to_row, column, rotary, self._begin(rotary, i, old) + j)

    @cute.jit
    def _turn_query(self, q: cute.Tensor, turned: cute.Tensor, rotary: Any, keys: CachedKeys, n):
        element, row, head, column = _place(q, n)
        i, j = keys.of_row(keys.cu_seqlens_q, element, row)
        if (i < keys.count) & (j >= 0):
            old, _ = keys.old_and_new(i)
            position = self._begin(rotary, i, old)
            if cutlass.const_expr(self.problem.bounded_left or self.problem.bounded_right):
                position += j
            self._turn(q[element, None, head, None], row, turned[element, None, head, None], row, column, rotary, position)

    def _begin(self, rotary: Any, i, old):
        """The position of a sequence's first new row."""
        return old if rotary[2] is None else rotary[2][i]

    @cute.jit
    def _turn(self, source: cute.Tensor, row, into: cute.Tensor, to_row, column, rotary: Any, position):
        """One vector of a row, or two that are turned together."""
        cos, sin, _ = rotary
        position = cutlass.min(cutlass.max(position, 0), cos.shape[0] - 1)
        half = cos.shape[1] // VECTOR  # vectors of the tables
        x = vector(source, row, column).load().to(Float32)
        out = cute.make_rmem_tensor(VECTOR, Float32)
        out.store(x)
        if cutlass.const_expr(self.problem.appends == "interleaved"):
            if column < 2 * half:
                c, s = (vector(m, position, column // 2) for m in (cos, sin))
                first = column % 2 * (VECTOR // 2)
                for pair in cutlass.range_constexpr(VECTOR // 2):
                    even, odd = x[2 * pair], x[2 * pair + 1]
                    angle = c[first + pair].to(Float32), s[first + pair].to(Float32)
                    out[2 * pair] = even * angle[0] - odd * angle[1]
                    out[2 * pair + 1] = even * angle[1] + odd * angle[0]
            vector_at(into, to_row, column).store(out.load().to(into.element_type))
        else:
            if column < half:
                c, s = (vector(m, position, column).load().to(Float32) for m in (cos, sin))
                y = vector(source, row, column + half).load().to(Float32)
                out.store(x * c - y * s)
                vector_at(into, to_row, column + half).store((x * s + y * c).to(into.element_type))
            if (column < half) | (column >= 2 * half):  # those between go with the ones before them
                vector_at(into, to_row, column).store(out.load().to(into.element_type))


def _vectors(m: Any):
    """Of a tensor ``(elements, rows, heads, columns)``."""
    return m.shape[0] * m.shape[1] * m.shape[2] * (m.shape[3] // VECTOR)


def _place(m: Any, n) -> tuple[Int32, Int32, Int32, Int32]:
    """(element, row, head, vector) of vector ``n``."""
    vectors, heads, rows = m.shape[3] // VECTOR, m.shape[2], m.shape[1]
    return n // vectors // heads // rows, n // vectors // heads % rows, n // vectors % heads, n % vectors
