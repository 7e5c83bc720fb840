"""Noise on the history: most of it a drift, which older minutes share less and less."""

import pytest
import torch

from trunkline.models.fluid.noise import history_noise


def test_neighbouring_minutes_share_the_drift_and_older_ones_less_and_less():
    noise = history_noise(torch.arange(20_000), 8, 3).double()
    assert noise.shape == (20_000, 8, 3)
    newest_first = noise.flip(1)[..., 0]
    assert torch.equal(newest_first[:, 2], newest_first[:, 3]), "minutes of a span have the same noise"
    assert torch.equal(newest_first[:, 4], newest_first[:, 7])
    spans = newest_first[:, [0, 1, 2, 4]]
    covariance = torch.cov(spans.T)
    drift = torch.tensor([[1, 1, 0.8, 0.64], [1, 1, 0.8, 0.64], [0.8, 0.8, 1, 0.8], [0.64, 0.64, 0.8, 1]])
    expected = drift.double() + torch.eye(4).double() / 9
    assert (covariance - expected).abs().max() < 0.04
    assert torch.corrcoef(noise[:, -1].T)[0, 1].abs() < 0.03, "each state has its own"


def test_it_is_named_by_the_draw():
    draw = torch.tensor([5, 6])
    assert torch.equal(history_noise(draw, 4, 2)[1], history_noise(draw[1:], 4, 2)[0])
    assert history_noise(draw, 4, 2)[0] != pytest.approx(history_noise(draw, 4, 2)[1])
