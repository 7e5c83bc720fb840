"""The dense definitions of every kernel, for tests and benchmarks only.

They compute in fp32, and in fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal_block: int | None = None,
    key_mask: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """trunkline.kernels.attention.flash with an N x M matrix. The result is fp32 or fp64, not rounded to q's dtype."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    seen = visible_pairs(q.shape[1], k.shape[1], causal_block, key_mask, q.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    some = seen.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~some, 0), dim=-1).masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, document: Tensor, softmax_scale: float | None = None
) -> Tensor:
    """kernels/attention/packed.py, for the documents' numbers instead of their tables, with an L x L matrix a row."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    seen = (document[:, :, None] == document[:, None, :]).tril() & (document >= 0)[:, :, None]
    some = seen.any(dim=-1)[:, None, :, None]
    weights = torch.softmax(scores.masked_fill(~seen[:, None] & some, float("-inf")), dim=-1).masked_fill(~some, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def relative_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, query_document: Tensor, key_document: Tensor,
    bias: Tensor | None = None, causal: bool = False, softmax_scale: float = 1.0, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """trunkline.kernels.attention.relative with an N x M matrix, without dropout. fp32 or fp64."""
    assert dropout == 0.0
    query, key, value = _wide(query), _wide(key), _wide(value)
    N, M = query.shape[1], key.shape[1]
    i, j = torch.arange(N, device=query.device)[:, None], torch.arange(M, device=query.device)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * softmax_scale
    if bias is not None:
        scores = scores + _wide(bias)[:, j - i + N - 1]
    seen = (query_document[:, :, None] == key_document[:, None]) & (query_document >= 0)[:, :, None]
    seen = (seen & (j <= i) if causal else seen)[:, None]
    some = seen.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~seen & some, float("-inf")), dim=-1).masked_fill(~some, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, value)


def visible_pairs(
    num_queries: int,
    num_keys: int,
    causal_block: int | None,
    key_mask: Tensor | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[B or 1, 1, N, M] bool: whether query i sees key j."""
    i, j = torch.arange(num_queries, device=device)[:, None], torch.arange(num_keys, device=device)
    seen = torch.ones_like(i + j, dtype=torch.bool) if causal_block is None else j // causal_block <= i // causal_block
    return seen[None, None] if key_mask is None else seen & key_mask[:, None, None, :]


def masked_mse_reference(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """trunkline.kernels.masked_mse, value by value."""
    pred, target = _wide(pred), _wide(target)
    weights = torch.ones_like(pred) if mask is None else mask.to(pred.dtype).expand(pred.shape)
    chosen = weights != 0
    return (weights[chosen] * (pred[chosen] - target[chosen]) ** 2).sum(), weights.sum()


def linear_masked_mse_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """trunkline.kernels.linear_masked_mse, prediction first."""
    return masked_mse_reference(_wide(hidden) @ _wide(weight) + _wide(bias), target, mask)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """trunkline.kernels.linear_cross_entropy, logits first."""
    logits = _wide(hidden) @ _wide(weight).T
    logits = logits if bias is None else logits + _wide(bias)
    chosen = targets != ignore_index
    log_p = logits.log_softmax(dim=1).gather(1, targets.where(chosen, 0)[:, None]).squeeze(1)
    losses = -log_p.masked_fill(~chosen, 0)
    return losses.sum() if reduction == "sum" else losses


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
