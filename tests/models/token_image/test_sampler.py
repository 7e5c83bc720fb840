from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from trunkline.models.token_image.bigram import Bigram
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.information import log_posterior
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
    found = sample(gaussian, noise, evenly(200), method=method, keys=torch.arange(len(noise)))
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

    found = sample(oracle, noise, evenly(20), method=method, keys=torch.arange(len(noise)))
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
    options: Any = {"given": given, "is_given": is_given, "keys": torch.arange(1000)}
    found = sample(equal, noise, evenly(100), method=method, **options)
    assert torch.equal(found[:, 0], torch.full((1000,), 1.5))
    assert float(found[:, 1].mean()) > 0.9  # it is drawn to what is given, as far as this approximation goes


def test_every_step_is_shown() -> None:
    frames = list(trajectory(gaussian, torch.zeros(3), evenly(7)))
    assert len(frames) == 7
    with pytest.raises(ValueError, match="0 steps"):
        sample(gaussian, torch.zeros(3), evenly(0))


class Language:
    """Four tokens, of which each is followed by some more than by others; its codes are two bits."""

    transitions = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1], [0.05, 0.05, 0.6, 0.3], [0.4, 0.3, 0.05, 0.25], [0.1, 0.5, 0.3, 0.1]]
    )
    codes = Encoding("bits", 4).encode(torch.arange(4))

    def __init__(self, places: int) -> None:
        self.places = places
        self.frequencies = torch.linalg.matrix_power(self.transitions, 64)[0]
        self.bigram = Bigram(self.frequencies, self.transitions)

    @property
    def entropy_rate(self) -> float:
        """Bits a token after the first."""
        return -float((self.frequencies[:, None] * self.transitions * self.transitions.log2()).sum())

    def denoise(self, x: Tensor, alpha: Tensor) -> Tensor:
        """E[clean | x], exactly."""
        snr = (alpha / (1 - alpha)).square()
        likelihood = log_posterior(x / (1 - alpha), snr, self.codes, torch.zeros(4))
        return self.bigram.posterior(likelihood, torch.full((len(x),), self.places)) @ self.codes

    def sampled(self, count: int, steps: int, method: Method) -> Tensor:
        """Tokens, int64 [count, places]."""
        noise = torch.randn(count, self.places, 2, generator=torch.Generator().manual_seed(0))
        found = sample(
            self.denoise, noise, evenly(steps), method=method, keys=torch.arange(len(noise))
        )  # fmt: skip
        return Encoding("bits", 4).decode(found)


def entropy_of(tokens: Tensor) -> tuple[float, float]:
    """Bits a token after the first by the counts of the pairs themselves, and a standard error."""
    before, after = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    pairs = torch.bincount(4 * before + after, minlength=16).view(4, 4).double()
    bits = -(pairs / pairs.sum(1, keepdim=True)).log2()[before, after].view(len(tokens), -1).mean(1)
    return float(bits.mean()), float(bits.std()) / math.sqrt(len(bits))


@pytest.mark.parametrize(("method", "steps"), [("heun", 25), ("euler", 100)])
def test_a_language_is_sampled_with_its_entropy(method: Method, steps: int) -> None:
    language = Language(16)
    found, error = entropy_of(language.sampled(600, steps, method))
    assert error < 0.02
    assert found == pytest.approx(language.entropy_rate, abs=3 * error)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "steps"), [("heun", 25), ("euler", 100), ("ancestral", 200)])
def test_a_language_is_sampled_with_its_pairs(method: Method, steps: int) -> None:
    language = Language(32)
    tokens = language.sampled(20_000, steps, method)
    found, error = entropy_of(tokens)
    print(f"{method}, {steps} steps: {found:.4f} bits a token, entropy rate {language.entropy_rate:.4f}")
    assert error < 0.002
    assert found == pytest.approx(language.entropy_rate, abs=0.01)
    pairs = torch.bincount((4 * tokens[:, :-1] + tokens[:, 1:]).flatten(), minlength=16).view(4, 4)
    assert torch.allclose(pairs / pairs.sum(1, keepdim=True), language.transitions, atol=0.01)


def test_a_sampler_that_runs_backwards_would_be_seen() -> None:
    """Its steps lead from data to noise: they turn SD into 1, and so noise into 1 / SD."""
    with pytest.raises(AssertionError, match="pure noise"):
        sample(gaussian, torch.zeros(3), evenly(10).flip(0))
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backwards = noise
    for now, then in pairwise(evenly(400).flip(0)[1:]):  # at 1, where nothing is noise, there is no slope
        backwards = backwards + (then - now) * (gaussian(backwards, now) - backwards) / (1 - now)
    assert float(backwards.std() / noise.std()) == pytest.approx(1 / SD, rel=0.02)
    assert float(sample(gaussian, noise, evenly(400)).std() / noise.std()) == pytest.approx(SD, rel=0.02)
