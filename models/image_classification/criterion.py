"""The loss: cross entropy with label smoothing, weights of classes and mixup's two labels.

criterion.losses(logits, labels, pairing)    [B], a sample's weight included
criterion.weights(labels, pairing)           [B], what their sum is divided by

Without mixup, sum of losses / sum of weights is torch's CrossEntropyLoss(weight, label_smoothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trunkline.engine.errors import ConfigError
from trunkline.models.image_classification.mixup import Pairing


@dataclass(frozen=True)
class Criterion:
    """smoothing: the share that all classes have of each label; of_classes: fp32 [C], their weights, or None."""

    smoothing: float = 0.0
    of_classes: Tensor | None = None

    def losses(self, logits: Tensor, labels: Tensor, pairing: Pairing | None = None) -> Tensor:
        """fp32 [B] of logits [B, C]."""
        of_classes = None if self.of_classes is None else self.of_classes.to(logits.device)
        of_labels = partial(
            F.cross_entropy, logits.float(), weight=of_classes, label_smoothing=self.smoothing, reduction="none"
        )
        return pairing.expect(of_labels, labels) if pairing else of_labels(labels)

    def weights(self, labels: Tensor, pairing: Pairing | None = None) -> Tensor:
        """fp32 [B]."""
        if self.of_classes is None:
            return torch.ones(len(labels), device=labels.device)
        of_labels = self.of_classes.to(labels.device).__getitem__
        return pairing.expect(of_labels, labels) if pairing else of_labels(labels)


def balanced_weights(labels: NDArray[np.int64], num_classes: int) -> Tensor:
    """fp32 [C]: images / (classes x images of the class), as scikit-learn has them, 0 for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.tensor(np.where(counts, len(labels) / (num_classes * counts.clip(1)), 0), dtype=torch.float32)


def given_weights(weights: Sequence[float], classes: Sequence[str]) -> Tensor:
    """fp32 [C]. Raises ConfigError."""
    if len(weights) != len(classes):
        raise ConfigError(
            f"model.class_weights: has {len(weights)} numbers for {len(classes)} classes: give one for each, in the "
            f"order {', '.join(classes[:10])}{', ...' if classes[10:] else ''}"
        )
    if not any(weights):
        raise ConfigError("model.class_weights: are all 0: then nothing is learned; give some class a weight above 0")
    return torch.tensor(weights, dtype=torch.float32)
