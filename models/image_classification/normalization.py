"""BatchNorm by groups of samples that do not depend on how a global batch is split.

    normalized(network, model)       every BatchNorm of the network as `model.normalization` says, in place
    batch_norms(network)             those that it has

"batch"    statistics of `model.batch_norm_group` samples in contiguous places of the global batch. A micro-batch is
           whole groups, so a step does not depend on micro-batches and ranks. The global batch's last group may be
           short.
"frozen"   the running statistics and the affine weights as they are; none of them is trained.
"group"    GroupNorm in place of each.

A BatchNorm whose weights are frozen, by "frozen" or by a rule of training.parameters, keeps its running statistics and
normalises by them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trunkline.models.image_classification.config import ImageModel

_MOST_GROUPS = 32  # of a GroupNorm's channels


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The network's layers of this kind."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def normalized(network: nn.Module, model: ImageModel) -> nn.Module:
    """The network, whose BatchNorms are replaced as the section says, in place, under the same names."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _in_place_of(child, model))
    return network


def _in_place_of(norm: _BatchNorm, model: ImageModel) -> nn.Module:
    channels, device = norm.num_features, norm.weight.device
    if model.normalization == "group":
        groups = max(count for count in range(1, _MOST_GROUPS + 1) if channels % count == 0)
        return nn.GroupNorm(groups, channels, norm.eps, device=device)
    grouped = GroupedBatchNorm(norm, model.batch_norm_group)
    return grouped.requires_grad_(model.normalization == "batch")


class GroupedBatchNorm(_BatchNorm):
    """torch's BatchNorm of 1, 2 or 3 dimensions over groups of at most `group` samples, each with its own statistics.

    The running ones are updated once a batch, by the groups' mean weighted with their samples. A single group costs
    what torch's own costs. Where a group has a single value of a channel, its variance is 0.
    """

    takes_single_samples = True

    def __init__(self, norm: _BatchNorm, group: int) -> None:
        """With the tensors of `norm`."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.load_state_dict(norm.state_dict(), assign=True)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same."""
        means, variances, momentum = self.running_mean, self.running_var, self.momentum
        assert means is not None
        assert variances is not None
        assert momentum is not None
        weight, bias = self.weight.to(means.dtype), self.bias.to(means.dtype)  # of bf16 no kernel takes both
        if not self.training or not (self.weight.requires_grad or self.bias.requires_grad):
            return F.batch_norm(x, means, variances, weight, bias, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if len(x) <= self.group and x.numel() > self.num_features:
            return F.batch_norm(x, means, variances, weight, bias, True, momentum, self.eps)
        groups = x.split(self.group)
        found = [(torch.zeros_like(means), torch.zeros_like(variances)) for _ in groups]
        out = [self._alone(each, *mine, weight, bias) for each, mine in zip(groups, found, strict=True)]
        with torch.no_grad():
            shares = means.new_tensor([len(each) / len(x) for each in groups])
            for running, mine in zip((means, variances), zip(*found, strict=True), strict=True):
                running.lerp_(shares @ torch.stack(mine), momentum)
        return torch.cat(out)

    def _alone(self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One group normalised. Puts its statistics into `mean` and `variance`, [C]."""
        if x.numel() > self.num_features:
            return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, self.eps)
        mean.copy_(x.detach().flatten())
        shape = (1, -1, *[1] * (x.ndim - 2))
        return ((x - x) * weight.view(shape) + bias.view(shape)).to(x.dtype)
