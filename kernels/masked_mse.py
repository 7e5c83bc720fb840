"""masked_mse, linear_masked_mse: a squared error summed over the values that count, with the number of them.

    sum = sum_i m_i (y'_i - y_i)^2      count = sum_i m_i      d sum / d y'_i = 2 m_i (y'_i - y_i)

Two scalars, not their ratio: the mean over any number of batches and ranks is (sum of sums) / (sum of counts), exactly.
Where m is 0, neither the prediction nor the target is read, so a missing target may be NaN.
Dtype: differences and sums in fp32 (fp64 for fp64 inputs), whatever the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of the squared error of `pred` against `target`, two fp32 scalars.

    pred and target have one shape, any floating dtype. `mask` is bool, or floating for weights, broadcastable to pred;
    None counts every value. Differentiable in pred and target; the mask is a constant.

    Raises ValueError for arguments that do not fit together.
    """
    _check(pred, target, mask)
    accumulator = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if mask is None:
        difference = pred.to(accumulator) - target.to(accumulator)
        return difference.square().sum(), torch.full((), pred.numel(), dtype=accumulator, device=pred.device)
    mask = mask.detach().expand(pred.shape)
    difference = (pred.to(accumulator) - target.to(accumulator)).masked_fill(mask == 0, 0)
    if mask.dtype == torch.bool:
        return difference.square().sum(), mask.sum().to(accumulator)
    weights = mask.to(accumulator)
    return (weights * difference.square()).sum(), weights.sum()


def linear_masked_mse(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """masked_mse of the prediction hidden @ weight + bias.

    hidden [..., d], weight [d], bias [] or [1], target [...], `mask` broadcastable to target. Differentiable in all but
    the mask.

    Raises ValueError for arguments that do not fit together.
    """
    if hidden.dim() < 1 or weight.shape != hidden.shape[-1:]:
        raise ValueError(
            f"weight must be [{hidden.shape[-1] if hidden.dim() else 'd'}], the last dimension of hidden "
            f"{list(hidden.shape)}; got {list(weight.shape)}"
        )
    if bias.numel() != 1 or bias.dim() > 1:
        raise ValueError(f"bias must be one number, of shape [] or [1]; got {list(bias.shape)}")
    return masked_mse(F.linear(hidden, weight[None], bias.reshape(1)).squeeze(-1), target, mask)


def _check(pred: Tensor, target: Tensor, mask: Tensor | None) -> None:
    if not pred.is_floating_point() or not target.is_floating_point():
        raise ValueError(f"pred and target must be floating; got {pred.dtype} and {target.dtype}")
    if pred.shape != target.shape:
        raise ValueError(f"target must have the shape of pred, {list(pred.shape)}; got {list(target.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be bool or floating; got {mask.dtype}")
    fits = mask.dim() <= pred.dim() and all(
        m in (1, p) for m, p in zip(reversed(mask.shape), reversed(pred.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to {list(pred.shape)}; got {list(mask.shape)}")
