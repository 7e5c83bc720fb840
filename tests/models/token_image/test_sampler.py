from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trunkline.models.token_image.sampler import Method, evenly, sample, trajectory

METHODS: list[Method] = ["euler", "heun", "ancestral"]
MEAN, SD = 0.7, 0.5


def gaussian(x: Tensor, alpha: Tensor) -> Tensor:
    """E[clean | x] of values that are N(MEAN, SD^2)."""
    sigma = 1 - alpha
    return (MEAN * sigma**2 + alpha * SD**2 * x) / (sigma**2 + alpha**2 * SD**2)


def spread(method: Method, steps: int) -> float:
    """By how much the sampler turns N(0, 1) into another width than SD. It is linear, so two points tell."""
    ends = sample(gaussian, torch.tensor([0.0, 1.0], dtype=torch.float64), evenly(steps), method=method)
    return abs(float(ends[1] - ends[0]) / SD - 1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_order_of_the_method(method: Method, order: int) -> None:
    errors = [spread(method, steps) for steps in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_noise_becomes_the_distribution_of_the_data(method: Method) -> None:
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    found = sample(gaussian, noise, evenly(200), method=method, generator=torch.Generator().manual_seed(1))
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.std()) == pytest.approx(SD, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_an_oracle_sees_noise_of_unit_variance_at_every_call(method: Method) -> None:
    clean = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).sign()
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    calls = []

    def oracle(x: Tensor, alpha: Tensor) -> Tensor:
        calls.append(float(((x - alpha * clean) / (1 - alpha)).var()))
        return clean

    found = sample(oracle, noise, evenly(20), method=method, generator=torch.Generator().manual_seed(2))
    assert torch.equal(found, clean)
    assert len(calls) == (39 if method == "heun" else 20)
    assert calls == pytest.approx([1.0] * len(calls), abs=0.04)


@pytest.mark.parametrize("method", METHODS)
def test_given_values_stay_and_the_others_follow_them(method: Method) -> None:
    """Two values that are always equal: what is given of one decides the other."""

    def equal(x: Tensor, alpha: Tensor) -> Tensor:
        sigma = 1 - alpha  # the mean of two noisy copies of one N(0, 1) value
        return (alpha * x.sum(-1, keepdim=True) / (sigma**2 + 2 * alpha**2)).expand(x.shape)

    noise = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    given, is_given = torch.tensor([1.5, 0.0]), torch.tensor([True, False])
    options: Any = {"given": given, "is_given": is_given, "generator": torch.Generator().manual_seed(1)}
    found = sample(equal, noise, evenly(100), method=method, **options)
    assert torch.equal(found[:, 0], torch.full((1000,), 1.5))
    assert float(found[:, 1].mean()) > 0.9  # it is drawn to what is given, as far as this approximation goes


def test_every_step_is_shown() -> None:
    frames = list(trajectory(gaussian, torch.zeros(3), evenly(7)))
    assert len(frames) == 7
    with pytest.raises(ValueError, match="0 steps"):
        sample(gaussian, torch.zeros(3), evenly(0))
