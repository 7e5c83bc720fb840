"""A network beside a ridge: what it learns, that it is the same again, and which weights are taken."""

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from tests.models.fluid.baselines.switched_network import SCHEMA, switched_day, write_switched_store
from trunkline.models.fluid.baselines.linear import DAY, rollout_error
from trunkline.models.fluid.baselines.residual import Budget, Corrected, Settings, features_of, train
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.store_writer import write_store

CPU = torch.device("cpu")
SETTINGS = Settings(width=32, learning_rate=3e-3, weight_decay=0.0, noise=0.03, batch_size=64, average=0.99)


def small() -> nn.Module:
    last = nn.Linear(32, 6)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(14, 32), nn.GELU(), last)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_switched_store(tmp_path_factory.mktemp("residual"))


@pytest.fixture
def normalization(store):
    return Normalization(2, 6).fit(store.statistics, "standard")


def test_it_learns_what_the_ridge_cannot(store, normalization):
    model, facts = train(store, normalization, small, SETTINGS, Budget(steps=400), CPU)
    assert facts["steps"] == 400
    assert facts["validation_mse"] == rollout_error(store, model, DAY, normalization, CPU)
    one_minute = rollout_error(store, model, 1, normalization, CPU)
    for weights in model.network.state_dict().values():
        weights.zero_()
    assert one_minute < 0.6 * rollout_error(store, model, 1, normalization, CPU)


def test_the_same_number_of_steps_gives_the_same_weights_and_leaves_torch_alone(store, normalization):
    torch.manual_seed(5)
    first, _ = train(store, normalization, small, SETTINGS, Budget(steps=20), CPU)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    second, _ = train(store, normalization, small, SETTINGS, Budget(steps=20), CPU)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_it_stops_when_its_seconds_are_spent(store, normalization):
    _, facts = train(store, normalization, small, SETTINGS, Budget(seconds=1e-9), CPU)
    assert facts["steps"] == 0
    assert math.isfinite(facts["validation_mse"])


def test_the_clock_starts_with_the_training_itself(store, normalization):
    def slow() -> nn.Module:
        time.sleep(0.5)
        return small()

    _, facts = train(store, normalization, slow, SETTINGS, Budget(seconds=0.5), CPU)
    assert facts["steps"] > 0


def test_the_correction_is_in_units_of_change_and_noise(store, normalization):
    model = Corrected(normalization, features_of(SCHEMA), small(), noise=0.4)
    nn.init.ones_(model.network[-1].bias)
    nn.init.zeros_(model.ridge.weight)
    window = torch.from_numpy(np.concatenate(switched_day(3), axis=1))[None, :2]
    moved = (model.next_state(window) - window[:, -1, 2:]) / normalization.state_scale
    torch.testing.assert_close(moved[0], (normalization.change.square() + 0.16).sqrt())


def test_missing_values_and_no_validation_days(tmp_path):
    days = {f"case_{k}": switched_day(k) for k in range(2)}
    days["case_0"][1][50:60, 3] = np.nan
    store = write_store(tmp_path, SCHEMA, {"train": days})
    normalization = Normalization(2, 6).fit(store.statistics, "standard")
    model, facts = train(store, normalization, small, SETTINGS, Budget(steps=20), CPU)
    assert facts["best_step"] == 20, "the last weights, where none can be compared"
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
