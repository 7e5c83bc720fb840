"""Noise on the input states in training, as the errors of a rollout are.

A rollout's error is the same on neighbouring minutes, but for a little, and less and less the same on older ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal
from trunkline.models.fluid.device_tokens import spans
from trunkline.models.fluid.ridge import JITTER

_KEPT = 0.8


def history_noise(draw: Tensor, minutes: int, num_states: int) -> Tensor:
    """[B, minutes, num_states] fp32 for keys [B]; the last minute is the newest. Its variance is 1 + JITTER^2.

    A drift, of variance 1, and JITTER times a noise of each span alone. The drift is the same on the newest two
    minutes; on each span of older ones, which double in length (1, 2, 4, ... minutes), its correlation with the next
    newer is 0.8. Both are the same on all minutes of a span.
    """
    count = len(spans(minutes))
    drifts = count if count > 2 else 1  # of the second span there is none
    drift, alone = normal(draw, (drifts + count, num_states)).split([drifts, count], dim=1)
    return over_spans(drift, alone, minutes)


def over_spans(drift: Tensor, alone: Tensor, minutes: int) -> Tensor:
    """The noise [B, minutes, num_states] of standard normal numbers [B, spans, num_states], newest span first."""
    parts = []
    level = drift[:, 0]
    for k, (first, last) in enumerate(spans(minutes)):
        if k > 1:
            level = _KEPT * level + (1 - _KEPT**2) ** 0.5 * drift[:, k]
        parts.append((level + JITTER * alone[:, k])[:, None].expand(-1, last - first, -1))
    return torch.cat(parts[::-1], dim=1)
