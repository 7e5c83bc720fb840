"""Normalisation: the three kinds, the guard of near-constant columns, the way back."""

import numpy as np
import pytest
import torch

from trunkline.models.fluid.normalization import Normalization, offset_and_scale
from trunkline.models.fluid.statistics import case_moments, column_statistics, merge_moments


def statistics(boundary, state):
    moments = merge_moments([case_moments(boundary.astype(np.float32), state.astype(np.float32))])
    return column_statistics(moments, np.concatenate([boundary, state], axis=1).astype(np.float32))


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (500, 2)), np.cumsum(rng.normal(size=(500, 4)), axis=0) * [1, 1e4, 1e-3, 7]


def test_standard_gives_mean_zero_and_deviation_one(columns):
    normalization = Normalization(2, 4).fit(statistics(*columns), "standard")
    out = normalization.normalize(torch.from_numpy(np.concatenate(columns, axis=1)).float())
    torch.testing.assert_close(out.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)


def test_minmax_gives_minus_one_to_one(columns):
    normalization = Normalization(2, 4).fit(statistics(*columns), "minmax")
    out = normalization.normalize(torch.from_numpy(np.concatenate(columns, axis=1)).float())
    torch.testing.assert_close(out.amin(0), -torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.amax(0), torch.ones(6), atol=1e-4, rtol=0)


def test_robust_gives_median_zero_and_quartiles_one_apart(columns):
    normalization = Normalization(2, 4).fit(statistics(*columns), "robust")
    out = normalization.normalize(torch.from_numpy(np.concatenate(columns, axis=1)).float())
    quartiles = torch.quantile(out, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    torch.testing.assert_close(quartiles[1], torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(quartiles[2] - quartiles[0], torch.ones(6), atol=1e-3, rtol=0)


def test_a_set_point_that_rarely_moves_has_a_robust_scale():
    valve = np.ones((400, 1))
    valve[:40] = 0
    _, scale = offset_and_scale(statistics(valve, np.random.default_rng(0).normal(size=(400, 1))), "robust")
    assert scale[0] == pytest.approx(0.3)


@pytest.mark.parametrize("kind", ["standard", "minmax", "robust"])
@pytest.mark.parametrize(("level", "noise", "expected"), [(1.0, 0, 1.0), (0.0, 1e-9, 1.0), (80.0, 1e-6, 80.0)])
def test_near_constant_columns_are_scaled_by_their_magnitude(kind, level, noise, expected):
    rng = np.random.default_rng(0)
    column = level + noise * rng.normal(size=(300, 1))
    _, scale = offset_and_scale(statistics(rng.normal(size=(300, 1)), column), kind)
    assert scale[1] == pytest.approx(expected, rel=1e-3)


def test_the_way_back_and_missing_values(columns):
    normalization = Normalization(2, 4).fit(statistics(*columns), "standard")
    states = torch.from_numpy(columns[1]).float()
    back = normalization.restore_states(normalization.normalize_states(states))
    assert ((back - states) / normalization.state_scale).abs().max() < 1e-5
    states[3, 1] = float("nan")
    assert normalization.normalize_states(states)[3, 1].isnan()
    x = torch.full((1, 6), float("nan"))
    assert (normalization.normalize(x) == 0).all()


def test_change_is_the_deviation_of_the_one_minute_change(columns):
    normalization = Normalization(2, 4).fit(statistics(*columns), "standard")
    want = np.diff(columns[1], axis=0).std(0) / columns[1].std(0)
    torch.testing.assert_close(normalization.change, torch.from_numpy(want).float(), rtol=1e-3, atol=0)


def test_buffers_are_never_narrowed():
    normalization = Normalization(2, 4)
    normalization.offset.fill_(1 / 3)
    for dtype in (torch.bfloat16, torch.float16):
        normalization.to(dtype)
        assert normalization.offset.dtype == torch.float32
        assert (normalization.offset == torch.tensor(1 / 3)).all()
    assert normalization.double().offset.dtype == torch.float64
