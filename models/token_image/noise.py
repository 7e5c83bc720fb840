"""Noise: how an image becomes noise with the time, 0 to 1000.

    x_t = alpha x + (1 - alpha) eps      alpha = 1 - t/1000 ("linear"), or (1 + cos(pi t/1000))/2 ("cosine")

The signal-to-noise ratio is (alpha / (1 - alpha))^2. With "information", 1 - t/1000 is the share of the information
that the tokens' frequencies leave open and the noisy pixel then tells (trunkline.models.token_image.information).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal, uniform
from trunkline.models.token_image.information import Curve

Schedule = Literal["linear", "cosine", "information"]
LAST = 1000
"""The time of pure noise. Training draws from 0 to LAST - 1."""


def alpha_of(t: Tensor, schedule: Schedule, curve: Curve | None = None) -> Tensor:
    """fp32 of the shape of t: the share of the image. `curve` goes with "information"."""
    share = 1 - t.float() / LAST
    if schedule == "information":
        assert curve is not None
        root = curve.snr_at(share).sqrt()
        return root / (1 + root)
    return share if schedule == "linear" else (1 + torch.cos(math.pi * (1 - share))) / 2


def time_of(alpha: Tensor, schedule: Schedule, curve: Curve | None = None) -> Tensor:
    """The time, fp32, at which the share of the image is alpha."""
    if schedule == "information":
        assert curve is not None
        return LAST * (1 - curve.share_at((alpha / (1 - alpha)).square()))
    return LAST * (1 - alpha if schedule == "linear" else torch.arccos(2 * alpha - 1) / math.pi)


def drawn_times(draw: Tensor) -> Tensor:
    """int64 [B], uniform over 0 ... LAST - 1, by the keys `draw` [B]."""
    return (uniform(draw, (), stream=0) * LAST).long().clamp(max=LAST - 1)


def drawn_coins(draw: Tensor) -> Tensor:
    """bool [B], true for half of the keys `draw` [B]."""
    return uniform(draw, (), stream=1) < 0.5


def noised(x: Tensor, alpha: Tensor, draw: Tensor) -> Tensor:
    """x_t of images x [B, ...] at alpha [B], with the noise that the keys `draw` [B] name."""
    alpha = alpha.view(-1, *[1] * (x.ndim - 1))
    return alpha * x + (1 - alpha) * normal(draw, x.shape[1:], stream=1)
