"""Switch interactions: a network with another law for each position, which products are made, and when they are not."""

import numpy as np
import pytest
import torch

from tests.models.fluid.baselines.switched_network import SCHEMA, switched_day, write_switched_store
from tests.models.fluid.toy_network import write_toy_store
from trunkline.engine.errors import ConfigError
from trunkline.models.fluid.baselines import switches
from trunkline.models.fluid.baselines.linear import all_columns, fit_linear
from trunkline.models.fluid.baselines.switches import interactions, limits
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import NormalEquations
from trunkline.models.fluid.rollout import rollout

CPU = torch.device("cpu")
Z = (*SCHEMA.columns, *SCHEMA.states, *SCHEMA.boundary)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_switched_store(tmp_path_factory.mktemp("switches"))


def test_the_law_of_each_position_is_recovered(store):
    normalization = Normalization(2, 6).fit(store.statistics, "standard")
    boundary, state = (torch.from_numpy(x)[None] for x in switched_day(99))
    errors = {}
    for name, features in (("plain", all_columns(store)), ("switched", interactions(store))):
        fitted, _ = fit_linear(store, normalization, features, CPU, noises=(0.0,))
        predicted = rollout(fitted, boundary, state[:, :2], missing=normalization.state_offset)
        errors[name] = ((predicted - state[:, 2:]) / normalization.state_scale).square().mean().sqrt().item()
    assert errors["switched"] < 0.01 < 0.3 < errors["plain"]


def test_every_column_meets_the_switch_of_both_minutes(store):
    features = interactions(store)
    pairs = list(zip(features.first.tolist(), features.second.tolist(), strict=True))
    assert pairs == [(switch, column) for switch in (0, 14) for column in range(16)]
    assert Z[0] == Z[14] == "C_001:ST"
    assert len(features) == 16 + 32


def test_with_too_many_products_a_switch_meets_its_own_device_alone(store, monkeypatch):
    assert not limits(store)
    monkeypatch.setattr(switches, "MOST_FEATURES", 47)
    assert "each of the 1 switches" in limits(store)
    assert "there would be 48 features" in limits(store)
    features = interactions(store)
    assert {Z[k] for k in features.first} == {"C_001:ST"}
    assert {Z[k] for k in features.second} == {"C_001:ST", "C_001_q"}
    assert len(features.first) == 2 * 4
    monkeypatch.setattr(switches, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="1 switches make 24 features even if each is multiplied with its own device"):
        interactions(store)


def test_without_a_switch_that_moves_there_is_nothing_to_multiply_with(tmp_path):
    with pytest.raises(ConfigError, match="no set-point :ST or :FR moves"):
        interactions(write_toy_store(tmp_path))


def test_noise_on_products_in_closed_form_is_the_fit_to_noisy_samples(store):
    normalization = Normalization(2, 6).fit(store.statistics, "standard")
    features, noise = interactions(store), 0.3
    fitted, _ = NormalEquations.over_training_split(store, normalization, features).coefficients(1e-3, noise, 2)
    z, changes = [], []
    for case in store.cases("train"):
        x = np.concatenate([store.boundary("train", case), store.state("train", case)], axis=1).astype(np.float64)
        x = (x - normalization.offset.double().numpy()) / normalization.scale.double().numpy()
        z.append(np.concatenate([x[2:, :2], x[1:-1, 2:], x[:-2, 2:], x[1:-1, :2]], axis=1))
        changes.append(x[2:, 2:] - x[1:-1, 2:])
    z, changes = np.concatenate(z), np.concatenate(changes)
    rng = np.random.default_rng(0)
    gram, cross, draws = 0, 0, 300
    mean = features.of(z).mean(0)
    for _ in range(draws):
        draw = noise * (np.tile(rng.normal(size=(len(z), 6)), 2) + rng.normal(size=(len(z), 12)) / 3)
        noisy = z.copy()
        noisy[:, 2:14] += draw
        seen = features.of(noisy) - mean
        gram, cross = gram + seen.T @ seen, cross + seen.T @ (changes - draw[:, :6] - changes.mean(0))
    gram += 1e-3 * draws * len(z) * np.eye(len(features))
    np.testing.assert_allclose(fitted.T, np.linalg.solve(gram, cross), atol=1e-2)
