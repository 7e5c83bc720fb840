"""CausalLM: a Hugging Face language model whose head and loss are one.

Logits are never held whole.

The network is transformers' own, parameter for parameter; what changes is its last linear layer, which is a LinearLoss,
its norms, which are torch's own where they compute the same, and its attention, which is
trunkline.kernels.attention.flash where that can do what the model asks for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trunkline.models.causal_lm.transformers_attention import NAME as TRUNKLINE
from trunkline.models.text.linear_loss import IGNORE, LinearLoss
from trunkline.models.text.norms import fuse_norms

ROWS_AT_ONCE = 1024
"""Logits that are turned into fp32 at a time where a model makes them itself."""


class CausalLM(nn.Module):
    """Negative log-likelihoods of tokens under `lm`, a transformers causal language model.

    fused: the loss is taken in the head; else from the logits that the model makes.
    attention_note: why another attention is used than the best that the configuration allows.
    packs: documents packed into a row leave one another alone.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self._no_split_modules = sorted(lm._no_split_modules or ())
        self.packs = True
        self.attention_note: str | None = None
        fuse_norms(lm)
        head = lm.get_output_embeddings()
        self.fused = type(head) is nn.Linear
        if self.fused:
            head.__class__ = LinearLoss  # the same parameters under the same names, tied or not

    @property
    def attention(self) -> str:
        """The attention that transformers uses."""
        return self.lm.config._attn_implementation

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        document: Tensor | None = None,
        packing: dict[str, Tensor] | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """-log p(targets) under the model, summed (a scalar) or for each position ([B, L], reduction "none"), fp32.

        Args:
            input_ids: [B, L] int64, padded on the right.
            targets: [B, L] int64, the token that each position is to predict; IGNORE where it is to predict none.
            position_ids, document: [B, L] int64, of packed rows: the place in its document, and the document's number.
            packing: of packed rows: the tables of trunkline.kernels.attention.packed.
        """
        # padding stands on the right, so causal attention needs no mask to leave it out
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if document is not None:
            inputs["position_ids"] = position_ids
        if self.attention == TRUNKLINE:  # which does not read the mask, but says so to transformers by having one
            inputs |= {"packing": packing or {}, "attention_mask": torch.ones_like(input_ids)}
        elif document is not None:
            sees = _same_document(document)
            inputs["attention_mask"] = _additive(sees, self.lm.dtype) if self.attention == "eager" else sees
        if self.fused:
            hidden = self.lm.base_model(**inputs).last_hidden_state
            return self.lm.get_output_embeddings()(hidden, targets, reduction)
        return _cross_entropy(self.lm(**inputs).logits, targets, reduction)


def _same_document(document: Tensor) -> Tensor:
    """bool [B, 1, L, L]: whether key j is in query i's document and not after it. Every query sees itself."""
    L = document.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=document.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, the lowest number where it is not."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The cross-entropy of logits that a model made itself, in fp32 a part at a time."""

    def part(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")

    rows, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        checkpoint(part, rows[at : at + ROWS_AT_ONCE], wanted[at : at + ROWS_AT_ONCE], use_reentrant=False)
        for at in range(0, len(rows), ROWS_AT_ONCE)
    ]
    loss = torch.cat(parts)
    return loss.sum() if reduction == "sum" else loss.view_as(targets)
