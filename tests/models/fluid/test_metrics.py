"""Metrics: against scores computed value by value, additive over any split, units kept apart."""

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import OFFSET, SCALE, SCHEMA
from trunkline.models.fluid.metrics import Errors, flat_scores
from trunkline.models.fluid.normalization import Normalization

N = 40


@pytest.fixture
def normalization():
    out = Normalization(2, 8)
    out.offset[2:] = torch.from_numpy(OFFSET)
    out.scale[2:] = torch.from_numpy(SCALE)
    return out.double()


def values(seed=0):
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(OFFSET + SCALE * rng.normal(size=(N, 8)))
    predicted = truth + torch.from_numpy(SCALE * rng.normal(size=(N, 8)) * 0.3)
    mask = torch.from_numpy(rng.random((N, 8)) > 0.2)
    return predicted, truth.masked_fill(~mask, float("nan")), mask


def expected(predicted, truth, mask, columns, scale):
    sse = sae = sst = count = 0.0
    for column in columns:
        chosen = mask[:, column].numpy()
        y, p = (x[:, column].numpy()[chosen] / scale[column] for x in (truth, predicted))
        sse, sae, count = sse + ((p - y) ** 2).sum(), sae + abs(p - y).sum(), count + len(y)
        sst += ((y - y.mean()) ** 2).sum()
    mse = sse / count
    return {"mse": mse, "mae": sae / count, "rmse": mse**0.5, "r2": 1 - sse / sst}


def test_normalised_scores_by_group(normalization):
    predicted, truth, mask = values()
    scores = Errors.of(predicted, truth, mask, normalization).scores(SCHEMA)["normalised"]
    assert list(scores) == ["all", "B", "H", "N", "P", "T&E"], "groups without variables are left out"
    members = {"all": range(8), "B": [0, 1], "H": [2], "N": [3, 4], "P": [5, 6], "T&E": [7]}
    for group, columns in members.items():
        assert scores[group] == pytest.approx(expected(predicted, truth, mask, columns, SCALE), rel=1e-6)


def test_physical_scores_by_group_and_unit(normalization):
    predicted, truth, mask = values()
    scores = Errors.of(predicted, truth, mask, normalization).scores(SCHEMA)["physical"]
    members = {("B", "MPa"): [0], ("B", "m3/s"): [1], ("H", "degC"): [2], ("P", "MPa"): [5], ("P", "m3"): [6],
               ("all", "MPa"): [0, 3, 4, 5], ("all", "m3/s"): [1, 7]}  # fmt: skip
    for (group, unit), columns in members.items():
        assert scores[group][unit] == pytest.approx(expected(predicted, truth, mask, columns, np.ones(8)), rel=1e-6), (
            group,
            unit,
        )
    assert set(scores["B"]) == {"MPa", "m3/s"}


def test_sums_add_over_any_split(normalization):
    predicted, truth, mask = values()
    whole = Errors.of(predicted, truth, mask, normalization)
    parts = [Errors.of(predicted[i], truth[i], mask[i], normalization) for i in (slice(0, 7), slice(7, 8), slice(8, N))]
    added = parts[0] + parts[1] + parts[2]
    for name in ("count", "squared", "absolute", "target", "target_squared"):
        torch.testing.assert_close(getattr(added, name), getattr(whole, name))
    rebuilt = Errors.from_sums(whole.as_sums("model"), "model", whole.scale)
    assert rebuilt.scores(SCHEMA) == whole.scores(SCHEMA)


def test_a_perfect_and_a_constant_prediction(normalization):
    _, truth, mask = values()
    perfect = Errors.of(truth, truth, mask, normalization).scores(SCHEMA)["normalised"]["all"]
    assert perfect == {"mse": 0, "mae": 0, "rmse": 0, "r2": 1}
    means = torch.stack([truth[mask[:, k], k].mean() for k in range(8)]).expand(N, 8)
    constant = Errors.of(means, truth, mask, normalization).scores(SCHEMA)["normalised"]["all"]
    assert constant["r2"] == pytest.approx(0, abs=1e-9)


def test_flat_names(normalization):
    flat = flat_scores(Errors.of(*values(), normalization).scores(SCHEMA), "persistence_")
    assert {"persistence_mse", "persistence_r2/P", "persistence_rmse/P/MPa", "persistence_mae/T&E/m3/s"} <= set(flat)
    assert "persistence_mse/P/MPa" not in flat
