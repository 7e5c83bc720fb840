"""The ridge autoregression against a linear system that it must recover, and against plain least squares."""

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA, day, write_toy_store
from trunkline.engine.errors import DataError
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import Features, NormalEquations, RidgeAutoregression
from trunkline.models.fluid.store_writer import write_store


@pytest.fixture
def store(tmp_path):
    return write_toy_store(tmp_path)


def equations(store):
    normalization = Normalization(2, 8).fit(store.statistics, "standard")
    return NormalEquations.over_training_split(store, normalization, Features.columns(2 + 2 * 8)), normalization


def solve(equations, penalty, noise=0.0):
    ridge = RidgeAutoregression(2, 8, equations.features)
    ridge.take(equations, penalty, noise)
    return ridge


def design(store, normalization):
    """Features [rows, F] and changes [rows, Vs] of the training split, the slow and obvious way."""
    features, changes = [], []
    for case in store.cases("train"):
        z = torch.cat([torch.tensor(store.boundary("train", case)), torch.tensor(store.state("train", case))], dim=1)
        z = ((z.double() - normalization.offset) / normalization.scale).numpy()
        for s in range(1, store.minutes - 1):
            features.append(np.concatenate([z[s + 1, :2], z[s, 2:], z[s - 1, 2:]]))
            changes.append(z[s + 1, 2:] - z[s, 2:])
    return np.array(features), np.array(changes)


def test_recovers_a_linear_network(store):
    fitted, normalization = equations(store)
    ridge = solve(fitted, 1e-9)
    boundary, state = day(99, 50)
    x = torch.from_numpy(np.concatenate([boundary[1:], state[:-1]], axis=1))[None]
    predicted = normalization.restore_states(ridge(normalization.normalize(x)))[0]
    error = (predicted - torch.from_numpy(state[1:]))[1:] / normalization.state_scale
    assert error.abs().max() < 2e-4


@pytest.mark.parametrize("penalty", [1e-4, 1e-1])
def test_is_the_minimiser_of_the_penalised_error(store, penalty):
    fitted, normalization = equations(store)
    features, changes = design(store, normalization)
    assert fitted.rows == len(features)
    centred = features - features.mean(0)
    gram = centred.T @ centred + penalty * len(features) * np.eye(features.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (changes - changes.mean(0)))
    ridge = solve(fitted, penalty)
    np.testing.assert_allclose(ridge.weight.T, weight, atol=2e-5)
    np.testing.assert_allclose(ridge.bias, changes.mean(0) - features.mean(0) @ weight, atol=2e-5)


def test_noise_in_closed_form_is_the_fit_to_noisy_samples(store):
    fitted, normalization = equations(store)
    features, changes = design(store, normalization)
    rng = np.random.default_rng(0)
    noise = 0.3
    gram, cross = np.zeros((18, 18)), np.zeros((18, 8))
    for _ in range(200):
        noisy, led_back = features.copy(), changes.copy()
        shared = np.tile(rng.normal(size=(len(features), 8)), 2)
        draw = noise * (shared + rng.normal(size=(len(features), 16)) / 3)
        noisy[:, 2:] += draw
        led_back -= draw[:, :8]
        centred = noisy - noisy.mean(0)
        gram += centred.T @ centred
        cross += centred.T @ (led_back - led_back.mean(0))
    np.testing.assert_allclose(solve(fitted, 0.0, noise).weight.T, np.linalg.solve(gram, cross), atol=5e-3)


def test_missing_values_do_not_spread(tmp_path):
    splits = {"train": {f"case_{k}": day(k, 200) for k in range(3)}}
    splits["train"]["case_1"][1][50, 3] = np.nan
    fitted, _ = equations(write_store(tmp_path, SCHEMA, splits))
    assert solve(fitted, 1e-6).weight.isfinite().all()


def test_a_split_without_outputs_is_named(tmp_path, store):
    store.has_state = lambda split, case: False
    with pytest.raises(DataError, match="no training case has outputs"):
        equations(store)
