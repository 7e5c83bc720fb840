"""Seq2Seq: a T5 whose head and loss are one. Logits are never held whole.

The network is transformers' own, parameter for parameter; what changes is its head, which is a LinearLoss, its norms,
which are torch's own, and its attention, which is trunkline.kernels.attention.relative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from trunkline.models.seq2seq.attention import use_relative_attention
from trunkline.models.text.linear_loss import LinearLoss
from trunkline.models.text.norms import fuse_norms


class Seq2Seq(nn.Module):
    """Negative log-likelihoods of targets under `lm`, a transformers T5ForConditionalGeneration or one like it."""

    def __init__(self, lm: Any, attention: str = "trunkline") -> None:
        super().__init__()
        self.lm = lm
        lm.generation_config = GenerationConfig()  # whoever generates says how: a folder may ask for samples
        self._no_split_modules = sorted(lm._no_split_modules or ())
        self._relative = attention == "trunkline" and use_relative_attention(lm)
        if self._relative:
            self.no_graph = "torch.compile has no graph for model.attention=trunkline: set model.attention=sdpa"
        fuse_norms(lm)
        lm.lm_head.__class__ = LinearLoss  # the same parameters under the same names, tied or not
        for name, module in lm.named_modules():
            if name.endswith(".wo"):
                module.__class__ = _WideOutput

    def forward(
        self, input_ids: Tensor, input_document: Tensor, decoder_input_ids: Tensor, target_document: Tensor,
        targets: Tensor, reduction: str = "sum",
    ) -> Tensor:  # fmt: skip
        """-log p(targets), summed (a scalar) or for each position ([B, M], reduction "none"), fp32.

        "measured" is [2]: the sum, and how many targets are the likeliest token.

        Args:
            input_ids: int64 [B, N], what the encoder reads, padded on the right.
            decoder_input_ids, targets: int64 [B, M], the token before each target, and the target; IGNORE for none.
            input_document, target_document: int64 [B, N] and [B, M], the number of the sample within its row that a
                token is of, -1 at padding. None attends to another's.
        """
        hidden = self.hidden(input_ids, input_document, decoder_input_ids, target_document)
        return self.lm.lm_head(hidden, targets, reduction)

    def hidden(
        self, input_ids: Tensor, input_document: Tensor, decoder_input_ids: Tensor, target_document: Tensor
    ) -> Tensor:
        """What the head reads, [B, M, d]."""
        lm = self.lm
        documents: dict[str, Any] = {"documents": (input_document, target_document)} if self._relative else {}
        masks: list[Any] = [None, None]
        if not self._relative:
            masks = [
                _sees(input_document, input_document, False, lm),
                _sees(target_document, target_document, True, lm),
            ]
        trains = any(parameter.requires_grad for parameter in lm.encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):  # a frozen encoder keeps nothing for backward
            encoded = lm.encoder(input_ids=input_ids, attention_mask=masks[0], **documents).last_hidden_state
        hidden = lm.decoder(
            input_ids=decoder_input_ids, attention_mask=masks[1], encoder_hidden_states=encoded,
            encoder_attention_mask=None if self._relative else _sees(target_document, input_document, False, lm),
            use_cache=False, **documents,
        ).last_hidden_state  # fmt: skip
        return hidden * lm.model_dim**-0.5 if scales_hidden(lm.config) else hidden


def scales_hidden(hf_config: Any) -> bool:
    """Whether hidden states are multiplied by d^-0.5 before the head: T5 1.0 does so, 1.1 and mT5 do not."""
    return hf_config.model_type == "t5" and bool(hf_config.scale_decoder_outputs)


class _WideOutput(nn.Linear):
    """The last layer of a feed-forward block. Its results leave fp16's range, so transformers keeps it in fp32."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.weight.dtype != torch.float16:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


def _sees(query_document: Tensor, key_document: Tensor, causal: bool, lm: Any) -> Tensor:
    """[B, 1, N, M] of the model's dtype: what is added to scores: 0 where a key is seen, else the lowest number."""
    sees = query_document[:, :, None] == key_document[:, None, :]
    if causal:
        sees = sees & torch.ones(sees.shape[1:], dtype=torch.bool, device=sees.device).tril()
    dtype = lm.shared.weight.dtype
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
