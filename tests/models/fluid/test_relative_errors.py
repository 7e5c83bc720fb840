"""Medians of relative errors: against numpy's exact ones, added up over any split, and what is left out."""

import math

import numpy as np
import pytest
import torch

from trunkline.models.fluid.relative_errors import LEAST, RESOLUTION, RelativeErrors


def values(count, seed=0):
    """Truths of either sign, some too small, some missing; errors over seven decades."""
    rng = np.random.default_rng(seed)
    truth = 10 ** rng.uniform(-1, 3, count) * rng.choice([-1, 1], count)
    predicted = truth * (1 + 10 ** rng.uniform(-6, 1, count) * rng.choice([-1, 1], count))
    truth[rng.random(count) < 0.1] = np.nan
    return torch.from_numpy(predicted).float(), torch.from_numpy(truth).float()


def exact(predicted, truth):
    predicted, truth = predicted.double().numpy(), truth.double().numpy()
    counted = np.abs(truth) >= LEAST["m3/s"]
    return np.median(np.abs(predicted - truth)[counted] / np.abs(truth)[counted])


@pytest.mark.parametrize("count", [4, 5, 6, 7, 50, 999, 1000, 100_000])
def test_the_median_is_numpy_s_to_the_stated_resolution(count):
    for seed in range(5):
        predicted, truth = values(count, seed)
        # single precision shifts a value by a share of it of 1e-7 / 1e-6 at most
        want = pytest.approx(exact(predicted, truth), rel=RESOLUTION + 0.1 * RESOLUTION)
        assert RelativeErrors.of(predicted, truth, "m3/s").median() == want
    assert pytest.approx(0.0023, rel=0.01) == RESOLUTION


def test_parts_add_up_to_the_whole_bin_by_bin():
    predicted, truth = values(1000)
    whole = RelativeErrors.of(predicted.view(10, 20, 5), truth.view(10, 20, 5), "m3/s")
    parts = [RelativeErrors.of(predicted[k], truth[k], "m3/s") for k in (slice(0, 1), slice(1, 700), slice(700, None))]
    added = parts[0] + parts[1] + parts[2]
    assert torch.equal(added.counts, whole.counts)
    assert added.summary() == whole.summary()
    assert whole.counts.dtype == torch.int64


def test_what_counts_and_what_is_left_out():
    truth = torch.tensor([100.0, -100.0, 0.5, 0.0, math.nan, 1.0])
    predicted = torch.tensor([101.0, -103.0, 9.0, 9.0, 9.0, 1.0])
    errors = RelativeErrors.of(predicted, truth, "m3/s").summary()
    assert (errors["values"], errors["left_out"]) == (3, 2)
    assert errors["median"] == pytest.approx(0.01, rel=RESOLUTION * 1.1)
    assert RelativeErrors.of(predicted, truth, "MPa").summary()["left_out"] == 1


@pytest.mark.parametrize(
    ("predicted", "median"),
    [([5.0, 5.0, 9.0], 0.0), ([math.nan, math.inf, 5.0], math.inf), ([1e30, 1e30, 5.0], math.inf)],
)
def test_no_error_is_none_and_no_number_is_an_infinite_one(predicted, median):
    assert RelativeErrors.of(torch.tensor(predicted), torch.full((3,), 5.0), "MPa").median() == median


def test_of_nothing_there_is_no_median():
    nothing = RelativeErrors.of(torch.ones(3), torch.full((3,), math.nan), "MPa")
    assert math.isnan(nothing.median())
    assert nothing.summary()["values"] == 0
