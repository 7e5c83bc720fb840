"""relative_attention: attention with a bias by relative position, over rows of several documents each.

    out_i = sum_j p_ij v_j,   p_ij = softmax_j(s q_i.k_j + b_{j-i}),   over the j of the document that i is in
    dv_j = sum_i p_ij do_i    ds_ij = p_ij (do_i.v_j - sum_j p_ij do_i.v_j)    db_d = sum over j - i = d of ds_ij

Scores are held for one tile of queries, and nothing of the size N x M is kept for the backward pass, which computes the
probabilities again. A tile reads the keys from the first to the last whose document one of its queries may be of. So
where documents stand in ascending order, a row of several costs little more than its documents.

On a GPU of compute capability 8.0 or later the Triton kernels of relative_kernels.py do it, for heads of a multiple of
8 channels, up to 128, in 16 bits and in fp32. Elsewhere plain PyTorch does, as below: 4 N M D FLOPs a head forward, 10
backward. Padding costs nothing there if there is more than one tile. The bias of a tile is a view: with n rows of
W = N + M - 1 entries each, all rows alike, element (i, j) lies at i W + j - i. Its gradient is added through the same
view, and summed over the rows: no atomics, so the same bits in every run.
Dtype: the products take query, key and value in their dtype (autocast's where that is on) and round to it; bias,
softmax, and sums over tiles are in fp32, in fp64 for fp64.
Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020);
Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from trunkline.kernels.arguments import autocast_dtype, check_positive, check_tensors
from trunkline.kernels.attention.relative_op import RelativeAttention, takes
from trunkline.kernels.first_order import no_forward_mode, no_second_order

# A tile's scores in fp32: what a core's cache holds; on a GPU, what keeps it busy.
_CPU_TILE_BYTES, _GPU_TILE_BYTES = 2**22, 2**26
_MOST_QUERIES = 128  # of a tile: of short documents in long rows, more would reach over more keys than they see
_NAME = "relative_attention"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_document: Tensor, key_document: Tensor,
    bias: Tensor | None = None, causal: bool = False, softmax_scale: float = 1.0, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """[B, N, H, D] from query [B, N, H, D], key and value [B, M, H, D], of one dtype.

    Args:
        query_document, key_document: int64 [B, N] and [B, M], the number of the document that a token is of, -1 at
            padding. A query attends to the keys of its document. One without any, such as padding, gets 0. Padding may
            hold any values whose products are finite. A number must be below 2**31, which is not checked: of a higher
            one the kernels read the lower 32 bits. Numbers counted from 0 along a row are below N and M.
        bias: [H, N + M - 1]; entry j - i + N - 1 is added to the score of query i and key j.
        causal: key j is seen from query i >= j on.
        dropout: the share of probabilities that are set to 0; the others are divided by 1 - dropout. A call takes one
            number from torch's global generator of the CPU, from which all that is dropped follows; but the kernels
            drop others than plain PyTorch does.

    Differentiable once in query, key, value and bias. Raises ValueError for arguments that do not fit together, and
    RuntimeError where it is differentiated twice, or in forward mode.
    """
    dtype = _check(query, key, value, query_document, key_document, bias, softmax_scale, dropout)
    no_forward_mode(_NAME, query, key, value, bias)
    if isinstance(query, FakeTensor):  # which has no values to drop
        dropout = 0.0
    seed = int(torch.randint(2**62, ())) if dropout else 0
    if takes(query, dtype):
        inputs = (x.to(dtype) for x in (query, key, value))
        return RelativeAttention.apply(
            *inputs, bias, query_document, key_document, bool(causal), float(softmax_scale), float(dropout), seed
        )[0]
    how = _How(bool(causal), softmax_scale, dropout, seed, dtype)
    return _Relative.apply(query, key, value, bias, query_document, key_document, how)[0]


class _How(NamedTuple):
    causal: bool
    scale: float
    dropout: float
    seed: int
    dtype: torch.dtype  # of the products

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class _Tile(NamedTuple):
    """Queries of some rows, and the keys that they may see."""

    rows: slice
    queries: slice
    keys: slice


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, query_document: Tensor,
        key_document: Tensor, how: _How,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        out = torch.zeros(query.shape, dtype=how.dtype, device=query.device)
        # kept in place of the given ones, which nothing else needs: by head, so that a tile is a view
        query, key, value = (x.to(how.dtype).transpose(1, 2).contiguous() for x in (query, key, value))
        tiles = _tiles(query_document, key_document, query.shape[1], how.causal)
        with torch.autocast(query.device.type, enabled=False):
            by_distance = _rows_of_bias(bias, tiles, how)
            for number, tile in enumerate(tiles):
                rows, queries, keys = tile
                q, k, v = _part(query, rows, queries), _part(key, rows, keys), _part(value, rows, keys)
                p, some = _probabilities(tile, q, k, by_distance, query_document, key_document, how)
                if how.dropout:
                    p *= _noise(p, number, how)
                heads = torch.bmm(p.to(how.dtype), v).unflatten(0, (-1, query.shape[1]))
                torch.mul(heads.transpose(1, 2), some, out=out[rows, queries])
        link = out.new_zeros(())
        ctx.save_for_backward(link, query, key, value, bias, query_document, key_document)
        ctx.how, ctx.tiles = how, tiles
        return out, link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        link, query, key, value, bias, query_document, key_document = ctx.saved_tensors
        how, tiles, needs = ctx.how, ctx.tiles, ctx.needs_input_grad
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            grads = [torch.zeros(x.shape, dtype=how.wide, device=x.device) for x in (query, key, value)]
            by_distance = _rows_of_bias(bias, tiles, how)
            grad_by_distance = torch.zeros_like(by_distance) if by_distance is not None and needs[3] else None
            for number, tile in enumerate(tiles):
                rows, queries, keys = tile
                q, k, v = _part(query, rows, queries), _part(key, rows, keys), _part(value, rows, keys)
                p, some = _probabilities(tile, q, k, by_distance, query_document, key_document, how)
                grad = torch.empty_like(q, memory_format=torch.contiguous_format).unflatten(0, (-1, query.shape[1]))
                torch.mul(upstream[rows, queries].transpose(1, 2), some.transpose(1, 2), out=grad)
                grad = grad.flatten(0, 1)
                grad_p, kept = torch.bmm(grad, v.mT).to(how.wide), p
                if how.dropout:
                    noise = _noise(p, number, how)
                    kept, grad_p = p * noise, grad_p.mul_(noise)
                _add_product(_part(grads[2], rows, keys), kept.to(how.dtype).mT, grad)
                grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, how.wide)
                if grad_by_distance is not None:
                    of_rows = grad_scores.unflatten(0, (-1, query.shape[1])).sum(0)
                    _view(grad_by_distance, tile, query.shape[2]).add_(of_rows)
                grad_scores = grad_scores.to(how.dtype)
                _add_product(_part(grads[0], rows, queries), grad_scores, k, how.scale)
                _add_product(_part(grads[1], rows, keys), grad_scores.mT, q, how.scale)
            gradients = [grad.to(dtype).transpose(1, 2) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
            grad_bias = None if grad_by_distance is None else grad_by_distance.sum(1).to(bias.dtype)
        return *no_second_order(_NAME, link, upstream, *gradients, grad_bias), None, None, None


def _tiles(query_document: Tensor, key_document: Tensor, heads: int, causal: bool) -> list[_Tile]:
    """Those that see any key. One that holds all is given without a look at the documents."""
    (B, N), M = query_document.shape, key_document.shape[1]
    limit = (_GPU_TILE_BYTES if query_document.is_cuda else _CPU_TILE_BYTES) // 4
    if B * heads * N * M <= limit:
        return [_Tile(slice(0, B), slice(0, N), slice(0, M))]
    n = min(N, _MOST_QUERIES, max(16, limit // (heads * M)))
    r = min(B, max(1, limit // (heads * n * M)))
    T, G = -(-N // n), -(-B // r)
    document = F.pad(query_document, (0, T * n - N), value=-1).view(B, T, n)
    first = document.masked_fill(document < 0, torch.iinfo(torch.int64).max).amin(2, keepdim=True)
    last = document.amax(2, keepdim=True)
    seen = (key_document[:, None] >= first) & (key_document[:, None] <= last)  # [B, T, M], and some that no query sees
    if causal:
        place = torch.arange(max(T * n, M), device=seen.device)
        seen &= place[:M] < place[n - 1 : T * n : n, None] + 1
    seen = F.pad(seen, (0, 0, 0, 0, 0, G * r - B)).view(G, r, T, M).any(1).to(torch.uint8)
    ranges = torch.stack([seen.argmax(2), M - seen.flip(2).argmax(2), seen.amax(2).long()], 2)
    held = [[[0, M, 1]] * T] * G if isinstance(ranges, FakeTensor) else ranges.tolist()
    return [
        _Tile(slice(g * r, min(B, g * r + r)), slice(t * n, min(N, t * n + n)), slice(start, stop))
        for g, row in enumerate(held)
        for t, (start, stop, some) in enumerate(row)
        if some
    ]


def _part(x: Tensor, rows: slice, places: slice) -> Tensor:
    """[R H, n, D] of [B, H, N, D], a view."""
    return x[rows, :, places].flatten(0, 1)


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """out += factor a @ b, in out's dtype, which may be wider than that of a and b."""
    if out.dtype == a.dtype and out.is_contiguous():  # else torch would multiply head by head
        out.baddbmm_(a, b, alpha=factor)
    else:
        out.add_(torch.bmm(a, b), alpha=factor)


def _probabilities(
    tile: _Tile, q: Tensor, k: Tensor, by_distance: Tensor | None, query_document: Tensor, key_document: Tensor,
    how: _How,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p [R H, n, m] in a wide dtype; and [R, n, 1, 1], 1 where a query sees any key, else 0: then p is not to be used.

    Masks are numbers: they are added and multiplied in a tenth of the time that torch takes to fill in by bools.
    """
    rows, queries, keys = tile
    mine, theirs = query_document[rows, queries, None], key_document[rows, None, keys]
    mine, theirs = mine.masked_fill(mine < 0, -1), theirs.masked_fill(theirs < 0, -2)
    seen = torch.empty(len(mine), mine.shape[1], theirs.shape[2], dtype=how.wide, device=q.device)
    torch.eq(mine, theirs, out=seen)
    if how.causal:
        seen.tril_(queries.start - keys.start)
    some = seen.amax(-1)[..., None, None].to(how.dtype)
    # half of the lowest number, so that a product can be added; where nothing is seen all are equal, and none is NaN
    masked = seen.sub_(1).mul_(torch.finfo(how.wide).max / 2)[:, None]
    if by_distance is None:
        scores = masked.repeat(1, len(q) // len(masked), 1, 1).flatten(0, 1)
    else:
        scores = (masked + _view(by_distance, tile, query_document.shape[1])).flatten(0, 1)
    _add_product(scores, q, k.mT, how.scale)
    return scores.softmax(-1), some


def _rows_of_bias(bias: Tensor | None, tiles: list[_Tile], how: _How) -> Tensor | None:
    """The bias as often as a tile has queries, [H, n, W]."""
    if bias is None:
        return None
    n = max([1, *(tile.queries.stop - tile.queries.start for tile in tiles)])
    return bias.to(how.wide)[:, None].expand(-1, n, -1).clone(memory_format=torch.contiguous_format)


def _view(by_distance: Tensor, tile: _Tile, num_queries: int) -> Tensor:
    """[H, n, m], the entry of each query and key of a tile."""
    H, rows, W = by_distance.shape
    (i, i_end), (j, j_end) = ((at.start, at.stop) for at in (tile.queries, tile.keys))
    return by_distance.as_strided((H, i_end - i, j_end - j), (rows * W, W - 1, 1), j - i + num_queries - 1)


def _noise(p: Tensor, number: int, how: _How) -> Tensor:
    """0, or 1 / (1 - dropout): the same for a tile in both passes. 32 random bits an entry, two from one draw."""
    generator = torch.Generator(p.device).manual_seed(how.seed + number)
    drawn = torch.empty((p.numel() + 1) // 2, dtype=torch.int64, device=p.device).random_(
        -(2**63), None, generator=generator
    )
    bits = drawn.view(torch.int32)[: p.numel()].view(p.shape)
    kept = torch.ge(bits, int(how.dropout * 2**32) - 2**31, out=torch.empty_like(p))
    return kept.mul_(1 / (1 - how.dropout))


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_document: Tensor, key_document: Tensor, bias: Tensor | None,
    softmax_scale: float, dropout: float,
) -> torch.dtype:  # fmt: skip
    """The dtype of the products."""
    tensors = {"query": query, "key": key, "value": value}
    documents = {"query_document": query_document, "key_document": key_document}
    others = {} if bias is None else {"bias": bias}
    check_tensors(**tensors, **documents, **others)
    check_positive("softmax_scale", softmax_scale)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number from 0 to below 1; got {dropout!r:.80}")
    if query.dim() != 4 or query.numel() == 0:
        raise ValueError(f"query must be [B, N, H, D], not empty; got {list(query.shape)}")
    B, N, H, D = query.shape
    M = key.shape[1] if key.dim() > 1 else 0
    shapes = {
        "key": [B, max(M, 1), H, D], "value": [B, M, H, D], "query_document": [B, N], "key_document": [B, M],
        "bias": [H, N + M - 1],
    }  # fmt: skip
    for name, x in (tensors | documents | others).items():
        if name != "query" and list(x.shape) != shapes[name]:
            raise ValueError(
                f"{name} must be {shapes[name]} to go with query {list(query.shape)} and key {list(key.shape)}; got "
                f"{list(x.shape)}"
            )
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, query on {query.device}; they must be on one device")
    dtype = autocast_dtype(query)
    for name, x in tensors.items():
        if x.dtype not in _DTYPES or autocast_dtype(x) != dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype}; query ({query.dtype}), key and value must share one of bf16, fp16, fp32, "
                "fp64, or be cast by autocast"
            )
    if bias is not None and bias.dtype not in _DTYPES:
        raise ValueError(f"bias has dtype {bias.dtype}; it must be bf16, fp16, fp32 or fp64")
    for name, x in documents.items():
        if x.dtype != torch.int64:
            raise ValueError(f"{name} must be int64; got {x.dtype}")
    return dtype
