"""What tests of the interfaces of others share, on the CPU and on a GPU: calls of each function beside float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from cute_attn import flash_attn, sdpa
from tests import support

# Of flash-attn's functions: each argument off its default, and what it makes of attention's rules.
OPTIONS = {
    "full": ({}, {}),
    "causal": ({"causal": True, "deterministic": True, "num_splits": 3}, {"causal": True}),
    "window": ({"window_size": (9, 3), "softmax_scale": 0.3, "dropout_p": 0}, {"window": (9, 3), "scale": 0.3}),
    "left": ({"window_size": (20, None), "causal": True, "pack_gqa": True}, {"window": (20, 0)}),
    "softcap": ({"softcap": 4.0, "window_size": (None, None), "sm_margin": 1}, {"softcap": 4.0}),
}
FORMS = ("", "kvpacked_", "qkvpacked_")
EACH = [("", option) for option in OPTIONS] + [(form, option) for form in FORMS[1:] for option in ("causal", "window")]
SIZES = ((60, 70), (0, 5), (3, 150), (40, 0))  # of queries and of keys, of each sequence
# Of scaled_dot_product_attention: shapes of query and key, arguments.
CALLS = {
    "plain": ((2, 4, 70, 16), (2, 4, 90, 16), {}),
    "scale": ((2, 4, 70, 16), (2, 4, 90, 16), {"scale": 0.3}),
    "causal": ((2, 4, 90, 16), (2, 4, 90, 16), {"is_causal": True}),
    "more keys": ((2, 4, 70, 16), (2, 4, 90, 16), {"is_causal": True}),
    "more queries": ((2, 4, 90, 16), (2, 4, 70, 16), {"is_causal": True, "scale": 0.3}),
    "grouped": ((2, 4, 70, 16), (2, 2, 90, 16), {"enable_gqa": True, "is_causal": True}),
    "one key head": ((2, 4, 70, 16), (2, 1, 90, 16), {}),
    "3 dimensions": ((4, 70, 16), (4, 90, 16), {"is_causal": True}),
    "3 dimensions, one length": ((4, 70, 16), (4, 70, 16), {}),
    "5 dimensions, one length": ((2, 3, 4, 30, 16), (2, 3, 4, 30, 16), {}),
    "5 dimensions": ((2, 3, 4, 30, 16), (2, 3, 2, 20, 16), {"enable_gqa": True, "is_causal": True}),
    "no keys": ((2, 4, 70, 16), (2, 4, 0, 16), {"is_causal": True}),
    "no queries": ((2, 4, 0, 16), (2, 4, 90, 16), {"is_causal": True}),
}


def bounds(sizes, device="cpu") -> torch.Tensor:
    return torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32, device=device)


def spans(sizes) -> list[slice]:
    return [slice(end - n, end) for n, end in zip(sizes, accumulate(sizes), strict=True)]


def packed_as(form: str, q, k, v) -> tuple[torch.Tensor, ...]:
    """q, k, v as the arguments of a form of flash-attn's functions."""
    if form == "":
        return q, k, v
    return (q, torch.stack((k, v), -3)) if form == "kvpacked_" else (torch.stack((q, k, v), -3),)


def unpacked(*tensors: torch.Tensor, dims: int) -> tuple[torch.Tensor, ...]:
    """The inverse, of gradients: packed tensors have a dimension more."""
    return tuple(part for x in tensors for part in (x.unbind(-3) if x.dim() > dims else (x,)))


def check_dense(form: str, option: str, *, dtype=torch.float32, device="cpu", dims=(16, 24), sizes=(70, 90)) -> None:
    """``flash_attn_func`` and its packed forms, both passes, beside float64."""
    options, rules = OPTIONS[option]
    sq, sk, heads_kv = (sizes[0], sizes[0], 4) if "q" in form else (*sizes, 2)
    q, k, v = support.make_qkv(2, sq, sk, 4, heads_kv, dims[0], dims[0] if form else dims[1], dtype, device)
    leaves = [x.requires_grad_() for x in packed_as(form, q, k, v)]
    out, lse, dropped = getattr(flash_attn, f"flash_attn_{form}func")(*leaves, **options, return_attn_probs=True)
    assert (dropped.numel(), dropped.dtype) == (0, dtype)
    dout, dlse = support.make_gradients(q, v)
    gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    q, k, v = (x.detach() for x in (q, k, v))
    support.assert_close((out.detach(), lse.detach()), q, k, v, **rules)
    support.assert_gradients_close(unpacked(*gradients, dims=4), q, k, v, dout, dlse, **rules)


def check_varlen(form: str, option: str, *, dtype=torch.float32, device="cpu", dims=(16, 24), seqused=False) -> None:
    """``flash_attn_varlen_func`` and its packed forms: each sequence beside float64."""
    options, rules = OPTIONS[option]
    sizes_q, sizes_k = zip(*SIZES, strict=True)
    sizes_k, heads_kv = (sizes_q, 4) if "q" in form else (sizes_k, 2)
    totals, dims = (sum(sizes_q), sum(sizes_k)), (dims[0], dims[0] if form else dims[1])
    q, k, v = support.make_qkv(1, *totals, 4, heads_kv, *dims, dtype, device)
    dout, dlse = support.make_gradients(q, v)
    q, k, v, dout, dlse = (x.squeeze(0) for x in (q, k, v, dout, dlse))
    leaves = [x.requires_grad_() for x in packed_as(form, q, k, v)]
    lengths = [bounds(sizes_q, device), max(sizes_q)]
    if "q" not in form:
        lengths = [lengths[0], bounds(sizes_k, device), max(sizes_q), torch.tensor(max(sizes_k), device=device)]
    used = [min(n, 30) for n in sizes_k] if seqused else sizes_k
    if seqused:
        options = {**options, "seqused_k": torch.tensor(used, dtype=torch.int32, device=device)}
    function = getattr(flash_attn, f"flash_attn_varlen_{form}func")
    out, lse = function(*leaves, *lengths, **options, return_lse=True)
    gradients = unpacked(*torch.autograd.grad((out, lse), leaves, (dout, dlse)), dims=3)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    for rows, keys, n in zip(spans(sizes_q), spans(sizes_k), used, strict=True):
        keys = slice(keys.start, keys.start + n)
        one = [x[None] for x in (q[rows], k[keys], v[keys])]
        support.assert_close((out[None, rows], lse[None, :, rows]), *one, **rules)
        parts = [x[None, where] for x, where in zip(gradients, (rows, keys, keys), strict=True)]
        support.assert_gradients_close(parts, *one, dout[None, rows], dlse[None, :, rows], **rules)


def turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``x`` (rows, heads, columns), in float64: pairs of its first columns as complex numbers, each turned by its angle (rows,
    pairs)."""
    n, x = 2 * angles.shape[-1], x.double()
    pairs = x[..., :n].unflatten(-1, (-1, 2)) if interleaved else x[..., :n].unflatten(-1, (2, -1)).mT
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles[:, None]))
    return torch.cat(((pairs if interleaved else pairs.mT).flatten(-2), x[..., n:]), -1)


def check_cache(where: str, interleaved: bool, *, dtype=torch.float64, device="cpu", dims=(24, 16)) -> None:
    """``flash_attn_with_kvcache`` of new rows: turned, written in place behind those that there are, and seen, in ``"pages"``
    of 4 rows or in ``"elements"`` of a cache with padding; NaN in all other rows. Turned by multiples of a quarter, so that no
    rounding comes in between; with queries whose columns are no neighbours in memory."""
    past, new = [5, 0, 11], 3
    q, k, v = support.make_qkv(3, new, 14, 4, 2, *dims, dtype, device)
    quarters = torch.randint(0, 4, (20, 8), generator=torch.Generator().manual_seed(3)).to(device)
    angles = quarters.double() * torch.pi / 2
    order, pads, sizes = torch.randperm(12, generator=torch.Generator().manual_seed(4)).view(3, 4), [0, 0, 0], (12, 4)
    options: dict = {"block_table": order.int().to(device)}
    if where == "elements":
        order, pads, sizes = torch.tensor([[2], [0], [3]]), [2, 0, 1], (4, 16)
        options = {"cache_batch_idx": order[:, 0].int(), "cache_leftpad": torch.tensor(pads, dtype=torch.int32)}
        options = {name: x.to(device) for name, x in options.items()}
    k_cache, v_cache = (x.new_full((*sizes, *x.shape[2:]), torch.nan) for x in (k, v))

    def rows(cache, i):
        """Those of sequence i, copied."""
        return cache[order[i]].flatten(0, 1)[pads[i] : pads[i] + past[i] + new]

    for i, n in enumerate(past):
        for cache, x in ((k_cache, k), (v_cache, v)):
            mine = cache[order[i]].flatten(0, 1)
            mine[pads[i] : pads[i] + n] = x[i, :n]
            cache[order[i]] = mine.unflatten(0, (len(order[i]), -1))
    k_new, v_new = (torch.stack([x[i, n : n + new] for i, n in enumerate(past)]) for x in (k, v))
    seqlens = torch.tensor([n + pad for n, pad in zip(past, pads, strict=True)], dtype=torch.int32, device=device)
    options |= {"rotary_cos": angles.cos().round().to(dtype), "rotary_sin": angles.sin().round().to(dtype), "causal": True}
    options |= {"cache_seqlens": seqlens, "rotary_interleaved": interleaved, "return_softmax_lse": True}
    found = flash_attn.flash_attn_with_kvcache(q.mT.contiguous().mT, k_cache, v_cache, k_new, v_new, **options)
    for i, n in enumerate(past):
        at = angles[n + pads[i] : n + pads[i] + new]
        keys = torch.cat((k[i, :n], turned(k_new[i], at, interleaved).to(dtype)))
        torch.testing.assert_close(rows(k_cache, i), keys)
        assert torch.equal(rows(v_cache, i), v[i, : n + new])
        one = turned(q[i], at, interleaved).to(dtype)[None], keys[None], v[i : i + 1, : n + new]
        support.assert_close((found[0][i : i + 1], found[1][i : i + 1]), *one, causal=True, lse_dtype=torch.float32)


def check_sdpa(name: str, call: Callable = sdpa.scaled_dot_product_attention, *, dtype=torch.float32, device="cpu") -> None:
    """``scaled_dot_product_attention``, both passes, beside float64: what a query sees is written out here."""
    shape_q, shape_k, options = CALLS[name]
    *_, heads, sq, d = shape_q
    *_, heads_kv, sk, _ = shape_k
    batch = torch.Size(shape_q[:-3]).numel()
    made = support.make_qkv(batch, sq, sk, heads, heads_kv, d, d + 8, dtype, device)
    shapes = shape_q, shape_k, (*shape_k[:-1], d + 8)
    leaves = [x.transpose(1, 2).reshape(shape).requires_grad_() for x, shape in zip(made, shapes, strict=True)]
    out = call(*leaves, **options)
    assert out.shape == (*shape_q[:-1], d + 8)
    dout, _ = support.make_gradients(made[0], made[2])
    gradients = torch.autograd.grad(out, leaves, dout.transpose(1, 2).reshape(out.shape))
    out, *gradients = (x.detach().reshape(batch, *x.shape[-3:]).transpose(1, 2) for x in (out, *gradients))
    q, k, v = made
    rules = {"scale": options.get("scale")}
    if options.get("is_causal"):  # the first query sees the first key
        k, v = k[:, :sq], v[:, :sq]
        assert not any(x[:, sq:].count_nonzero() for x in gradients[1:])
        gradients[1:] = (x[:, :sq] for x in gradients[1:])
        rules["window"] = (None, max(sq - sk, 0))
    support.assert_close(out, q, k, v, **rules)
    support.assert_gradients_close(gradients, q, k, v, dout, **rules)
