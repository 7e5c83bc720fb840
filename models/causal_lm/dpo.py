"""Direct preference optimization: the loss, and the model that holds policy and reference.

    loss = -log sigmoid(beta (log p(chosen)/r(chosen) - log p(rejected)/r(rejected))),   p the policy, r the reference

Log-probabilities are summed over a response's tokens, or averaged ("length_average"). With label smoothing e the loss
is (1 - e) of that plus e of the same with chosen and rejected exchanged.
Rafailov et al., "Direct Preference Optimization" (2023); Mitchell, "A note on DPO with noisy preferences" (2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.task import Batch, Sums
from trunkline.models.causal_lm.config import DPO
from trunkline.models.causal_lm.data import IGNORE
from trunkline.models.causal_lm.network import CausalLM

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""As TRL names them."""


class Preference(NamedTuple):
    """Of each pair, [B] fp32: the loss, and the rewards beta log p/r of both responses."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def dpo_loss(policy: Tensor, reference: Tensor, options: DPO) -> Preference:
    """From log-probabilities [B, 2] fp32 of (chosen, rejected) under both models; gradients flow to `policy`."""
    rewards = options.beta * (policy - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    smooth = options.label_smoothing
    # log sigmoid(x) as torch computes it, -softplus(-x), is exact where sigmoid(x) is 0 in fp32
    loss = -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
    return Preference(loss, rewards[:, 0].detach(), rewards[:, 1].detach())


def pair_sums(policy: Tensor, reference: Tensor, batch: Batch, options: DPO) -> Sums:
    """Loss and rewards, and how often the chosen answer's tokens are the likelier ones on average, under both.

    policy, reference: log-probabilities [B, 2] of (chosen, rejected)
    """
    tokens = (batch["targets"] != IGNORE).sum(2).clamp(min=1)
    policy_mean, reference_mean = policy / tokens, reference / tokens
    found = dpo_loss(*((policy_mean, reference_mean) if options.length_average else (policy, reference)), options)
    margin = found.chosen_reward - found.rejected_reward
    rewards = (found.chosen_reward, found.rejected_reward, margin, margin > 0)
    each = {
        "loss": found.loss,
        **dict(zip(REWARDS, rewards, strict=True)),
        "prefers_chosen": policy_mean[:, 0] > policy_mean[:, 1],
        "reference_prefers_chosen": reference_mean[:, 0] > reference_mean[:, 1],
    }
    valid = batch["valid"]
    return {key: (value * valid).sum() for key, value in each.items()} | {"pairs": valid.sum()}


class PolicyAndReference(nn.Module):
    """A model under training, and a frozen one that it is held to, which is never in training mode.

    Both are sharded alike, because an engine sees one module.
    """

    def __init__(self, policy: CausalLM, reference: CausalLM) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference.requires_grad_(False).eval()
        self._no_split_modules = policy._no_split_modules

    def train(self, mode: bool = True) -> PolicyAndReference:
        """Switch the policy; the reference stays in eval mode."""
        super().train(mode)
        self.reference.eval()
        return self

    def forward(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, 2] fp32 of the responses under policy and reference, summed over their tokens.

        input_ids, targets [B, 2, L] int64: chosen and rejected, as in CausalLM.
        """
        ids, wanted = input_ids.flatten(0, 1), targets.flatten(0, 1)
        with torch.no_grad():
            reference = -self.reference(ids, wanted, reduction="none").sum(1)
        policy = -self.policy(ids, wanted, reduction="none").sum(1)
        return policy.unflatten(0, (-1, 2)), reference.unflatten(0, (-1, 2))
