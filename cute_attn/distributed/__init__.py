"""Attention of sequences that are sharded over ranks of ``torch.distributed`` (context parallelism), forward and backward.

    from cute_attn import distributed

    x = distributed.shard(x, dim=1)                       # this rank's rows
    positions = distributed.positions(seqlen)             # and where in the sequence they are, for rotary embeddings
    out = distributed.attention(q, k, v, causal=True, seqlen=seqlen)
    whole = distributed.unshard(out, seqlen, dim=1)       # seldom needed: losses are sums over rows

docs/context-parallelism.md says what it costs, and what becomes of torch's ``context_parallel``.
"""

from cute_attn.distributed.calls import attention, explain
from cute_attn.distributed.shards import positions, shard, unshard

__all__ = ["attention", "explain", "positions", "shard", "unshard"]
