"""packed_attention: causal attention over rows of several documents each, none of which sees another.

    packing_tables(document)              on the CPU, where a batch is put together: where each token goes
    packed_attention(q, k, v, tables)     on any device

    out_i = sum_j p_ij v_j,   p_ij = softmax_j(s q_i.k_j),   over the j <= i of the document that i is in

A document of n tokens goes into the bucket of M tokens, M the smallest power of two, from 16 on, that holds it (at most
L, the length of a row). The documents of a bucket are gathered as rows of their own, [K, M], padding behind them,
attended by flash_attention with causal_block=1, and put back. No mask is needed: the padding comes after every real
token of its row. So nothing has the size L x L, and the time is that of the documents, not of the rows: 4D FLOPs a pair
of a bucket's triangle forward, some 1.7 times the pairs of its documents where their lengths are spread evenly, and
below 4 times for any of 9 tokens or more.

Bytes: q, k, v and out are copied once each, forward and backward, with fewer than n or 16 tokens of padding a document.
Both directions of both copies are plain gathers, because "unpack" and "repack" are each other's inverse: no atomics, so
the same bits in every run. Dtype: that of flash_attention.
Krell et al., "Efficient Sequence Packing without Cross-contamination" (2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.arguments import check_tensors
from trunkline.kernels.attention.flash import flash_attention
from trunkline.kernels.first_order import first_order

SMALLEST_BUCKET = 16
_UNPACK = "unpack_"


def packing_tables(document: Tensor) -> dict[str, Tensor]:
    """The tables of packed_attention for document [B, L] int64 on the CPU.

    document[b, l] is the number of the document within its row: 0, 1, 2 and so on, each in one piece, and -1 for the
    padding at the row's end. Positions p = b L + l count through the batch. For each bucket of M tokens that the batch
    has documents in:
    "unpack_{M}" [B, W] int64, flattened the positions of the bucket's documents, M for each, some token's where there
    is none; and "repack" [B, L] int64, the place of each position in the buckets, which follow one another in the
    order of M, 0 at padding. They have B as first dimension, as all of a batch has, yet they belong to the batch as a
    whole: rows of a batch can not be taken out, or joined, with their tables.

    Raises ValueError for what is not such a numbering.
    """
    _check_document(document)
    B, L = document.shape
    real = document >= 0
    columns = int(document.max()) + 2
    of_row = document + 1 + torch.arange(B)[:, None] * columns  # the first column of a row is its padding
    lengths = of_row.flatten().bincount(minlength=B * columns).view(B, columns)
    lengths[:, 0] = 0
    starts = (lengths.cumsum(1) - lengths).flatten()
    documents = lengths.flatten().nonzero().squeeze(1)
    sizes = torch.tensor([SMALLEST_BUCKET << i for i in range(L.bit_length()) if SMALLEST_BUCKET << i < L] + [L])
    bucket = torch.searchsorted(sizes, lengths.flatten()[documents])
    counts = bucket.bincount(minlength=len(sizes))
    if len(documents) == 0:  # even a batch of nothing but padding has a bucket
        counts[0] = 1
    widths = (counts * sizes + B - 1) // B
    places = widths * B // sizes * sizes  # of each bucket: the tables may hold a document more, but no part of one

    bucket, order = bucket.sort(stable=True)
    rank = torch.arange(len(documents)) - (counts.cumsum(0) - counts)[bucket]
    first_place = torch.zeros_like(starts)
    first_place[documents[order]] = (places.cumsum(0) - places)[bucket] + rank * sizes[bucket]
    repack = (torch.arange(L) + (first_place - starts)[of_row]).masked_fill_(~real, 0)

    position = real.flatten().nonzero().squeeze(1)
    somewhere = int(position[0]) if len(position) else 0  # never padding, whose values may be anything
    joined = torch.full((int(places.sum()),), somewhere)
    joined[repack.flatten()[position]] = position
    tables = {"repack": repack}
    for size, width, part in zip(sizes.tolist(), widths.tolist(), joined.split(places.tolist()), strict=True):
        if width:
            table = torch.full((B * width,), somewhere)
            table[: len(part)] = part
            tables[f"{_UNPACK}{size}"] = table.view(B, width)
    return tables


def _check_document(document: Tensor) -> None:
    if document.dim() != 2 or document.dtype != torch.int64 or document.numel() == 0:
        raise ValueError(f"document must be int64 [B, L], not empty; got {document.dtype} {list(document.shape)}")
    if document.device.type != "cpu":
        raise ValueError(f"document must be on the CPU, where batches are put together; it is on {document.device}")
    before = torch.cat([torch.full_like(document[:, :1], -1), document[:, :-1]], dim=1)
    goes_on = (document == before) | (document == before + 1)
    goes_on[:, 1:] &= (before[:, 1:] >= 0) | (document[:, 1:] < 0)
    wrong = ~(goes_on | (document == -1))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"document must count 0, 1, 2 and so on along a row, with -1 only at its end; row {b} has "
            f"{document[b, i].item()} at {i}" + (f", after {document[b, i - 1].item()}" if i else "")
        )


class _Rearrange(torch.autograd.Function):
    """rows[index], zero where `keep` is false. `inverse` is the index that leads back, `inverse_keep` where it does."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # [R, H, D]
        index: Tensor,  # [S]
        keep: Tensor | None,  # [S] bool
        inverse: Tensor,  # [R]
        inverse_keep: Tensor | None,  # [R] bool
    ) -> Tensor:
        ctx.save_for_backward(index, keep, inverse, inverse_keep)
        out = rows.index_select(0, index)
        return out if keep is None else out.masked_fill_(~keep[:, None, None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, keep, inverse, inverse_keep = ctx.saved_tensors
        return _Rearrange.apply(grad, inverse, inverse_keep, index, keep), None, None, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor], softmax_scale: float | None = None
) -> Tensor:
    """Causal attention within documents; q [B, L, Hq, D], k and v [B, L, Hkv, D], the result like q.

    `tables` are those of packing_tables, on q's device. The result is 0 at padding, whose values are not read, and
    neither is its gradient there (a batch of nothing but padding has one token, its first, which attends to itself).
    Heads, dtypes and `softmax_scale` are those of flash_attention.

    Raises ValueError for arguments that do not fit together.
    """
    buckets = _check(q, k, v, tables)
    q, k, v = first_order("packed_attention", q, k, v)
    B, L = q.shape[:2]
    unpack = torch.cat([index.flatten() for index in buckets])  # [J], the position of each place
    repack = tables["repack"].flatten()  # [B L], the place of each position
    # Where there is nothing, they lead somewhere, but not back.
    is_place = repack[unpack] == torch.arange(len(unpack), device=q.device)
    is_token = unpack[repack] == torch.arange(len(repack), device=q.device)

    def by_bucket(x: Tensor) -> list[Tensor]:
        """x [B, L, H, D] as [K, M, H, D] for each bucket."""
        # Places without a token hold a copy of one. Their gradient is 0, so that of the one place that is it is whole.
        x = _Rearrange.apply(x.flatten(0, 1), unpack, None, repack, is_token)
        parts = x.split([index.numel() for index in buckets])
        return [part.view(*index.shape, *x.shape[1:]) for part, index in zip(parts, buckets, strict=True)]

    out = [
        flash_attention(*qkv, causal_block=1, softmax_scale=softmax_scale).flatten(0, 1)
        for qkv in zip(by_bucket(q), by_bucket(k), by_bucket(v), strict=True)
    ]
    return _Rearrange.apply(torch.cat(out), repack, is_token, unpack, is_place).unflatten(0, (B, L))


def _check(q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]) -> list[Tensor]:
    """For each bucket, smallest first, the positions of its documents, [K, M]."""
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must be [batch, sequence, heads, head_dim], of one batch and sequence with q "
                f"{list(q.shape)}; got {list(x.shape)}"
            )
    if not isinstance(tables, dict):
        raise ValueError(f"tables must be those of packing_tables, a dict; got a {type(tables).__name__}")
    check_tensors(**{f"tables[{name!r}]": table for name, table in tables.items()})
    sizes = sorted(int(name.removeprefix(_UNPACK)) for name in tables if name.startswith(_UNPACK))
    if not sizes or "repack" not in tables:
        raise ValueError(f"tables must be those of packing_tables, 'unpack_...' and 'repack'; got {sorted(tables)}")
    B, L = q.shape[:2]
    expected = {"repack": [B, L]} | {f"{_UNPACK}{M}": [B, tables[f"{_UNPACK}{M}"].shape[-1]] for M in sizes}
    for name, shape in expected.items():
        table = tables[name]
        if table.dtype != torch.int64 or list(table.shape) != shape:
            raise ValueError(
                f"tables[{name!r}] must be int64 {shape} to go with q {list(q.shape)}; got {table.dtype} "
                f"{list(table.shape)}"
            )
        if table.device != q.device:
            raise ValueError(f"tables[{name!r}] is on {table.device}, q on {q.device}; they must be on one device")
    flat = [tables[f"{_UNPACK}{M}"].flatten() for M in sizes]
    return [table[: table.numel() // M * M].view(-1, M) for M, table in zip(sizes, flat, strict=True)]
