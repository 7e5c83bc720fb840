"""Images from pure noise, by a denoiser that predicts the clean image.

    sample(denoise, noise, alphas, ...)     Euler or Heun along dx/dalpha = (x' - x)/(1 - alpha), or ancestral
    evenly(steps)                           alphas from 0, pure noise, to 1, the clean image

x' is the prediction at x and alpha. Ancestral sampling draws x_s of its distribution given x_t
and x', Gaussian with the scale r = (1 - alpha)/alpha of the noise on z = x/alpha:

    z_s = x' + (r_s/r_t)^2 (z_t - x') + r_s sqrt(1 - (r_s/r_t)^2) eps

Given pixels are kept: at each alpha they are what the noise would have made of them.
Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022); Ho, Jain and Abbeel (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal

Method = Literal["euler", "heun", "ancestral"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], alpha, a scalar) -> the clean image."""


def evenly(steps: int) -> Tensor:
    """fp32 [steps + 1]. Raises ValueError for no step."""
    if steps < 1:
        raise ValueError(f"{steps} steps: use 1 or more")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64).float()


def sample(
    denoise: Denoise, noise: Tensor, alphas: Tensor, *, method: Method = "heun", keys: Tensor | None = None,
    given: Tensor | None = None, is_given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The images that the noise [B, ...] becomes; see `trajectory`."""
    *_, last = trajectory(denoise, noise, alphas, method=method, keys=keys, given=given, is_given=is_given)
    return last


@torch.no_grad()
def trajectory(
    denoise: Denoise, noise: Tensor, alphas: Tensor, *, method: Method = "heun", keys: Tensor | None = None,
    given: Tensor | None = None, is_given: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The images after each step.

    Heun calls the denoiser twice a step, but for the last; the others once.

    Args:
        alphas: rising from 0 to 1, [steps + 1]
        keys: int64 [B], which name the noise that ancestral sampling adds to each image, its streams from 3 on
        given, is_given: the clean values of pixels that are known, as `noise`, and which are, bool, broadcastable
    """
    assert alphas[[0, -1]].tolist() == [0, 1], "from pure noise to the clean image"

    def held(x: Tensor, alpha: Tensor) -> Tensor:
        if given is None or is_given is None:
            return x
        return torch.where(is_given, alpha * given + (1 - alpha) * noise, x)

    def clean(x: Tensor, alpha: Tensor) -> Tensor:
        found = denoise(x, alpha)
        return found if given is None or is_given is None else torch.where(is_given, given, found)

    x = held(noise, alphas[0])
    for step, (now, then) in enumerate(pairwise(alphas)):
        predicted = clean(x, now)
        if then == 1:
            x = predicted  # what every method comes to where no noise is left
        elif method == "ancestral":
            assert keys is not None
            x = _ancestral(x, predicted, now, then, normal(keys, x.shape[1:], stream=3 + step))
        else:
            slope = (predicted - x) / (1 - now)
            ahead = x + (then - now) * slope
            if method == "heun":
                slope = (slope + (clean(held(ahead, then), then) - ahead) / (1 - then)) / 2
            x = x + (then - now) * slope
        x = held(x, then)
        yield x


def _ancestral(x: Tensor, clean: Tensor, now: Tensor, then: Tensor, eps: Tensor) -> Tensor:
    if now == 0:  # nothing of the image is left in x
        return then * clean + (1 - then) * eps
    before, after = (1 - now) / now, (1 - then) / then
    kept = (after / before) ** 2
    return then * (clean + kept * (x / now - clean) + after * (1 - kept).sqrt() * eps)
