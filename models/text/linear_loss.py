"""LinearLoss: a language model's last linear layer and its cross-entropy as one. Logits are never held whole."""

from __future__ import annotations

from torch import Tensor, nn

from trunkline.kernels.linear_cross_entropy import linear_cross_entropy

IGNORE = -100
"""The target where nothing is predicted."""


class LinearLoss(nn.Linear):
    """A language model's head: logits of `hidden`, or with `targets` their cross-entropy, without holding logits.

    It is a module, not a function of its weight, so that whatever shards the weight finds it used in a forward.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """Logits [..., vocab]; or with targets [B, L] the loss: a scalar ("sum") or [B, L] ("none"), fp32."""
        if targets is None:
            return super().forward(hidden)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), self.weight, targets.flatten(), bias=self.bias, ignore_index=IGNORE,
            reduction=reduction,
        )  # fmt: skip
        return loss if reduction == "sum" else loss.view_as(targets)
