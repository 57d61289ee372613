"""Attention to a cache on the host: torch's tensors in CuTe's view, the run-time values, and the kernel."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import cutlass
from cutlass import Int32, cute

from cute_attn import layouts
from cute_attn.balance import CachedKeys
from cute_attn.fields import ATTEND, named
from cute_attn.forward import captured_of
from cute_attn.layouts.mma_sync_cache import columns_written
from cute_attn.mainloop.cache_merge import Outputs, Workspace
from cute_attn.mainloop.common import Values


def host_function(problem, config):
    """The function of :data:`~cute_attn.fields.ATTEND`'s values to compile."""
    kernel = importlib.import_module(f"cute_attn.mainloop.{config.cache}").Forward(problem, config)

    @cute.jit
    def attend(*arguments):
        given = named(ATTEND, arguments)
        q, out, lse = (with_elements(m, problem) for m in (given.q, given.out, given.lse))
        heads_kv = given.k_cache.shape[2]
        keys = cached_keys(problem, config, given, q, heads_kv, (given.left, given.right, given.units))
        if cutlass.const_expr(not problem.invariant):
            family = layouts.family(config)
            keys = replace(keys, tile_steps=family.TILE_STEPS, end_steps=family.END_STEPS)
        nowhere = Int32(0)  # lengths and edges are those of a part of a walk, later
        numbers = given.scale_log2, given.scale_by_cap
        values = Values(nowhere, nowhere, nowhere, nowhere, *numbers, captured_of(problem, given))
        outputs = Outputs(out, lse, given.sinks)
        sizes = given.counters, given.places, given.rows_kept, columns_written(problem.head_dim_v)
        workspace = Workspace.of(given.workspace, *sizes)
        kernel.launch(q, given.k_cache, given.v_cache, outputs, values, keys, workspace, given.blocks, given.stream)

    return attend


def cached_keys(problem, config, given, q: Any, heads_kv, others: tuple = (0, 0, 0)) -> CachedKeys:
    """Where keys lie, as ``given``; ``q`` (elements, rows, heads, …) are the queries, and ``others`` the edges of the band and
    the places of a walk's units."""
    rows, elements = given.k_cache.shape[1], given.k_cache.shape[0]
    table = given.page_table
    capacity = rows if cutlass.const_expr(table is None) else rows * table.shape[1]
    left, right, units = map(Int32, others)
    sizes = given.lengths.shape[0], capacity, elements, rows, q.shape[1], given.seqlen_new, heads_kv, q.shape[2] // heads_kv
    where = given.lengths, table, given.cache_batch_idx, given.leftpad_k, given.cu_seqlens_q, given.cu_seqlens_k_new
    return CachedKeys(*sizes, left, right, units, *where, problem, config)


def with_elements(m: Any, problem) -> Any:
    """Packed rows as those of one element."""
    if m is None or not problem.packed:
        return m
    return cute.make_tensor(m.iterator, cute.make_layout((1, *m.shape), stride=(0, *m.stride)))
