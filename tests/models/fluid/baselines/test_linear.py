"""Persistence and the linear autoregression as forecasters, what it sees, and how its penalty is chosen."""

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA, day, write_toy_store
from trunkline.models.fluid.baselines import linear
from trunkline.models.fluid.baselines.linear import LinearAutoregression, Persistence, all_columns, fit_linear
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import NormalEquations
from trunkline.models.fluid.rollout import rollout
from trunkline.models.fluid.store_writer import write_store

CPU = torch.device("cpu")


def fitted(store):
    return Normalization(2, 8).fit(store.statistics, "standard")


def test_persistence_repeats_the_last_state():
    boundary, state = (torch.from_numpy(x)[None] for x in day(0, 20))
    out = rollout(Persistence(2), boundary, state[:, :3], missing=torch.zeros(8))
    assert torch.equal(out, state[:, 2:3].expand(1, 17, 8))


def test_ridge_rolls_out_a_linear_network_it_was_fitted_to(tmp_path):
    store = write_toy_store(tmp_path)
    normalization = fitted(store)
    ridge, _ = fit_linear(store, normalization, all_columns(store), CPU)
    boundary, state = (torch.from_numpy(x)[None] for x in day(99, 120))
    out = rollout(ridge, boundary, state[:, :3], missing=normalization.state_offset)
    assert ((out - state[:, 3:]) / normalization.state_scale).abs().max() < 0.02


def test_the_penalty_is_the_best_of_the_validation_rollouts(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    splits = {split: {f"case_{k}": day(10 * k + len(split), 200) for k in range(2)} for split in ("train", "val")}
    for cases in splits.values():
        for _, state in cases.values():  # noise on what is measured, so that some penalty helps
            state += (rng.normal(size=state.shape) * state.std(0)).astype(np.float32)
    store = write_store(tmp_path, SCHEMA, splits)
    normalization = fitted(store)
    monkeypatch.setattr(linear, "PENALTIES", (1e-8, 1e-1, 1e3))
    equations = NormalEquations.over_training_split(store, normalization, all_columns(store))
    errors = {}
    for penalty in linear.PENALTIES:
        ridge = LinearAutoregression(normalization, all_columns(store))
        ridge.take(equations, penalty)
        squared = []
        for case in store.cases("val"):
            for row in range(0, 200 - 62 + 1, 60):
                boundary, state = (torch.tensor(np.asarray(x[row : row + 62]))[None] for x in splits["val"][case])
                out = rollout(ridge, boundary, state[:, :2], missing=normalization.state_offset)
                squared.append(((out - state[:, 2:]) / normalization.state_scale).square().mean())
        errors[penalty] = torch.stack(squared).mean()
    _, facts = fit_linear(store, normalization, all_columns(store), CPU)
    assert facts == {"penalty": min(errors, key=errors.get), "noise": 0.0}


def test_without_validation_days_the_penalty_is_the_default(tmp_path):
    store = write_store(tmp_path, SCHEMA, {"train": {f"case_{k}": day(k, 100) for k in range(3)}})
    _, facts = fit_linear(store, fitted(store), all_columns(store), CPU, noises=(0.1, 0.3))
    assert facts == {"penalty": linear.DEFAULT_PENALTY, "noise": 0.3}


@pytest.mark.parametrize("minutes", [2, 5])
def test_ridge_looks_at_the_last_two_minutes_only(tmp_path, minutes):
    store = write_toy_store(tmp_path)
    ridge, _ = fit_linear(store, fitted(store), all_columns(store), CPU)
    boundary, state = day(3, 20)
    window = torch.from_numpy(np.concatenate([boundary[1:6], state[:5]], axis=1))[None]
    assert torch.equal(ridge.next_state(window[:, -minutes:]), ridge.next_state(window[:, -2:]))
