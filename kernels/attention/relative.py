"""relative_attention: attention with a bias by relative position, over rows of several documents each.

    out_i = sum_j p_ij v_j,   p_ij = softmax_j(s q_i.k_j + b_{j-i}),   over the j of the document that i is in

Plain PyTorch, a tile of queries at a time.
Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, *, query_document: Tensor, key_document: Tensor,
    bias: Tensor | None = None, causal: bool = False, softmax_scale: float = 1.0, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """[B, N, H, D] from query [B, N, H, D], key and value [B, M, H, D].

    Args:
        query_document, key_document: int64 [B, N] and [B, M], the number of the document that a token is of, -1 at
            padding. A query attends to the keys of its document. One without any, such as padding, gets 0.
        bias: [H, N + M - 1]; entry j - i + N - 1 is added to the score of query i and key j.
        causal: key j is seen from query i >= j on.
        dropout: the share of probabilities that are set to 0, drawn from torch's global generator.
    """
    N, M = query.shape[1], key.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key).float() * softmax_scale
    if bias is not None:
        scores = scores + bias.float().unfold(1, M, 1).flip(1)
    sees = (query_document[:, :, None] == key_document[:, None, :]) & (query_document[:, :, None] >= 0)
    if causal:
        sees = sees & torch.ones(N, M, dtype=torch.bool, device=query.device).tril()
    sees = sees[:, None]
    p = scores.masked_fill(~sees, torch.finfo(torch.float32).min).softmax(-1).masked_fill(~sees, 0.0)
    p = F.dropout(p, dropout)
    return torch.einsum("bhnm,bmhd->bnhd", p.to(value.dtype), value)
