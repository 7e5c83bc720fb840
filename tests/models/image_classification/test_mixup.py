"""mixup: pairs of the global batch, shares of Beta(alpha, alpha), and fillers that are nobody's partner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from trunkline.engine.data.randomness import mix
from trunkline.models.image_classification.mixup import pair


def batch_of(count: int, valid: int, first: int = 0) -> dict[str, torch.Tensor]:
    return {
        "draw": torch.tensor([mix(4, first + place) for place in range(count)]),
        "valid": torch.arange(count) < valid,
    }


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha: float) -> None:
    pairing = pair(batch_of(20_000, 20_000), alpha)
    assert pairing is not None
    points = np.linspace(0.005, 0.995, 100)
    below = (pairing.share.numpy()[:, None] <= points).mean(axis=0)
    assert np.abs(below - stats.beta(alpha, alpha).cdf(points)).max() < 0.012
    assert 0 <= pairing.share.min() <= pairing.share.max() <= 1


def test_any_even_split_has_the_same_pairs_and_shares() -> None:
    pixels = torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12)
    whole = pair(batch_of(12, 11), 0.4)
    assert whole is not None
    assert whole.partner[:11].tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 10], "the last has a filler beside it"
    mixed, expected = whole.mix(pixels), whole.expect(lambda label: label.float(), labels)
    for size in (2, 4, 6):
        for first in range(0, 12, size):
            part = pair(batch_of(size, min(size, 11 - first), first), 0.4)
            assert part is not None
            assert torch.equal(part.mix(pixels[first : first + size]), mixed[first : first + size])
            found = part.expect(lambda label: label.float(), labels[first : first + size])
            assert torch.equal(found, expected[first : first + size])


def test_a_batch_that_was_cut_to_its_real_samples_has_the_same_pairs() -> None:
    """As BatchNorm sees it; of one sample a copy stands in the filler's place."""
    assert pair(batch_of(5, 5), 1.0).partner.tolist() == [1, 0, 3, 2, 4]  # type: ignore[union-attr]
    assert pair(batch_of(2, 1), 1.0).partner[0] == 0  # type: ignore[union-attr]


def test_images_and_labels_are_mixed_by_the_same_share() -> None:
    pixels = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    pairing = pair(batch_of(4, 4), 1.0)
    assert pairing is not None
    for place, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        share = pairing.share[place]
        torch.testing.assert_close(pairing.mix(pixels)[place], share * pixels[place] + (1 - share) * pixels[other])
        found = pairing.expect(lambda label: 10.0 * label, torch.arange(4))[place]
        torch.testing.assert_close(found, 10 * (share * place + (1 - share) * other))
    assert pair(batch_of(4, 4), 0.0) is None
