"""The loss: torch's CrossEntropyLoss, its mean included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.image_classification.test_mixup import batch_of
from trunkline.engine.errors import ConfigError
from trunkline.models.image_classification.criterion import Criterion, balanced_weights, given_weights
from trunkline.models.image_classification.mixup import pair

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, 3, generator=GENERATOR)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 1.25])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_loss_and_weight_make_torch_s_mean(smoothing: float, weights: torch.Tensor | None) -> None:
    criterion = Criterion(smoothing, weights)
    found = criterion.losses(LOGITS, LABELS).sum() / criterion.weights(LABELS).sum()
    torch.testing.assert_close(found, nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(LOGITS, LABELS))


def test_two_labels_are_one_soft_label() -> None:
    """Without class weights, torch's own loss of probabilities."""
    pairing = pair(batch_of(8, 8), 0.7)
    assert pairing is not None
    one_hot = nn.functional.one_hot(LABELS, 3).float()
    share = pairing.share[:, None]
    soft = share * one_hot + (1 - share) * one_hot[pairing.partner]
    for smoothing in (0.0, 0.2):
        found = Criterion(smoothing).losses(LOGITS, LABELS, pairing)
        want = nn.functional.cross_entropy(LOGITS, soft, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(found, want)
    assert Criterion().weights(LABELS, pairing).tolist() == [1.0] * 8


def test_two_labels_weigh_by_their_shares() -> None:
    pairing = pair(batch_of(8, 8), 0.7)
    assert pairing is not None
    criterion = Criterion(0.0, WEIGHTS)
    weights = criterion.weights(LABELS, pairing)
    losses = criterion.losses(LOGITS, LABELS, pairing)
    nats = -LOGITS.log_softmax(dim=1)
    for place in range(8):
        share, one, other = float(pairing.share[place]), int(LABELS[place]), int(LABELS[pairing.partner[place]])
        want = share * WEIGHTS[one] + (1 - share) * WEIGHTS[other]
        torch.testing.assert_close(weights[place], want)
        want = share * WEIGHTS[one] * nats[place, one] + (1 - share) * WEIGHTS[other] * nats[place, other]
        torch.testing.assert_close(losses[place], want)


def test_balanced_weights_give_each_class_the_same_say() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [3])
    found = balanced_weights(labels, 4)
    assert found.tolist() == pytest.approx([10 / 24, 10 / 12, 0.0, 10 / 4])
    assert found[torch.from_numpy(labels)].sum() == pytest.approx(3 * 10 / 4), "three classes that occur, of four"


@pytest.mark.parametrize(
    ("weights", "said"), [((1.0, 2.0), "2 numbers for 3 classes.*cat, dog, fish"), ((0, 0, 0), "all 0")]
)
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given_weights(weights, ("cat", "dog", "fish"))
    assert given_weights((1, 0, 2.5), ("cat", "dog", "fish")).tolist() == [1.0, 0.0, 2.5]
