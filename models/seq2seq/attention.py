"""T5's attention without scores that are kept for the backward pass.

    use_relative_attention(lm)    every attention of a T5 or mT5 then computes by kernels/attention/relative.py

It acts where the model is given `documents`, the numbers of the documents that its tokens are of, as in training.
Where it is not, as in generation, the attention is transformers' own. Parameters and names stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention

from trunkline.kernels.attention.relative import relative_attention


class _Relative:
    """The forward pass of both classes below."""

    def forward(
        self: Any, hidden_states: Tensor, mask: Tensor | None = None, key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None, past_key_values: Any = None,
        documents: tuple[Tensor, Tensor] | None = None, **arguments: Any,
    ) -> Any:  # fmt: skip
        """As T5Attention's; with `documents`, those of encoder and decoder, int64 [B, N] and [B, M].

        Then `mask` is not read, and `position_bias` is [H, N + M - 1] as relative_attention has it.
        """
        if documents is None:
            return super().forward(  # type: ignore[misc]
                hidden_states, mask=mask, key_value_states=key_value_states, position_bias=position_bias,
                past_key_values=past_key_values, **arguments,
            )  # fmt: skip
        own = documents[1] if self.is_decoder else documents[0]
        source, other = (hidden_states, own) if key_value_states is None else (key_value_states, documents[0])
        heads = (self.n_heads, self.key_value_proj_dim)
        query = self.q(hidden_states).unflatten(-1, heads)
        key, value = self.k(source).unflatten(-1, heads), self.v(source).unflatten(-1, heads)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.bias_by_distance(query.shape[1], key.shape[1])
        out = relative_attention(
            query, key, value, query_document=own, key_document=other, bias=position_bias,
            causal=self.is_decoder and key_value_states is None, softmax_scale=1.0,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.o(out.flatten(2)), position_bias, None

    def bias_by_distance(self: Any, num_queries: int, num_keys: int) -> Tensor:
        """[H, N + M - 1], by key's position minus query's, from -(N - 1) on."""
        table = self.relative_attention_bias
        distance = torch.arange(1 - num_queries, num_keys, device=table.weight.device)
        bucket = self._relative_position_bucket(
            distance, bidirectional=not self.is_decoder, num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )  # fmt: skip
        return table(bucket).T.contiguous()


class T5RelativeAttention(_Relative, T5Attention):
    """T5's."""


class MT5RelativeAttention(_Relative, MT5Attention):
    """mT5's."""


def use_relative_attention(lm: nn.Module) -> bool:
    """Let every attention of a T5 or mT5 compute so. Returns whether there was any."""
    ours = {T5Attention: T5RelativeAttention, MT5Attention: MT5RelativeAttention}
    found = [module for module in lm.modules() if type(module) in ours]
    for module in found:
        module.__class__ = ours[type(module)]
    return bool(found)
