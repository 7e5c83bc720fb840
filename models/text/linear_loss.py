"""LinearLoss: a language model's last linear layer and its cross-entropy as one. Logits are never held whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trunkline.kernels.linear_cross_entropy import linear_cross_entropy

IGNORE = -100
"""The target where nothing is predicted."""
_ROWS_AT_ONCE = 1024


class LinearLoss(nn.Linear):
    """A language model's head: logits of `hidden`, or with `targets` their cross-entropy, without holding logits.

    It is a module, not a function of its weight, so that whatever shards the weight finds it used in a forward.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """Logits [..., vocab]; or with targets [B, L] the loss: a scalar ("sum") or [B, L] ("none"), fp32.

        "measured" is [2]: the sum, and how many targets are the likeliest token. It is one call of the module, however
        many tokens there are: ranks that shard the weight gather it equally often.
        """
        if targets is None:
            return super().forward(hidden)
        rows, wanted = hidden.flatten(0, 1), targets.flatten()
        loss = linear_cross_entropy(
            rows, self.weight, wanted, bias=self.bias, ignore_index=IGNORE,
            reduction="none" if reduction == "none" else "sum",
        )  # fmt: skip
        if reduction == "measured":
            pairs = zip(rows.split(_ROWS_AT_ONCE), wanted.split(_ROWS_AT_ONCE), strict=True)
            found = [(super(LinearLoss, self).forward(some).argmax(-1) == those).sum() for some, those in pairs]
            return torch.stack([loss, torch.stack(found).sum().to(loss.dtype)])
        return loss.view_as(targets) if reduction == "none" else loss
