from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from trunkline.models.token_image.encodings import Encoding, Kind
from trunkline.models.token_image.information import Curve, by_frequencies, curve_of, log_posterior


def codes_of(vocab_size: int) -> torch.Tensor:
    return Encoding("bits", vocab_size).encode(torch.arange(vocab_size))


def unigram(vocab_size: int) -> torch.Tensor:
    frequencies = 1 / torch.arange(1, vocab_size + 1).double()
    return (frequencies / frequencies.sum()).float()


@cache
def curve_for(kind: Kind, vocab_size: int) -> Curve:
    encoding = Encoding(kind, vocab_size)
    return curve_of(encoding, unigram(vocab_size))


def test_the_posterior_is_bayes() -> None:
    codes, frequencies, snr = codes_of(5), unigram(5), torch.tensor(0.7)
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    densities = torch.stack(
        [(-(z - math.sqrt(0.7) * code).square().sum(-1) / 2).exp() * p for code, p in zip(codes, frequencies)], -1
    )
    wanted = densities / densities.sum(-1, keepdim=True)
    assert torch.allclose(log_posterior(z, snr, codes, frequencies.log()).exp(), wanted, atol=1e-6)


def test_one_bit_is_told_as_is_known_in_closed_form() -> None:
    """mse = 1 - E[tanh(g + sqrt(g) n)] of equal -1 and 1, and half its integral is what g tells, ln 2 in all."""
    curve = curve_of(Encoding("bits", 2), torch.tensor([0.5, 0.5]))
    nodes = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2) / math.sqrt(2 * math.pi)
    ratios = torch.linspace(0, 20, 2001, dtype=torch.float64)
    mse = 1 - torch.trapezoid(weights * torch.tanh(ratios[:, None] + ratios.sqrt()[:, None] * nodes), nodes)
    told = torch.cumulative_trapezoid(mse, ratios) / 2 / math.log(2)
    for place in (9, 49, 99, 299):
        assert float(curve.share_at(ratios[place + 1].float())) == pytest.approx(float(told[place]), abs=0.01)


@pytest.mark.parametrize("kind", ["bits", "rgb"])
def test_the_errors_of_a_guess_by_frequencies_add_up_to_the_entropy(kind: Kind) -> None:
    """At ratios with evenly spread shares, drawn anew: no draw of the curve is used again."""
    encoding, frequencies, count = Encoding(kind, 106), unigram(106), 20_000
    codes = encoding.encode(torch.arange(106))
    curve = curve_for(kind, 106)
    snr = curve.snr_at((torch.arange(count) + 0.5) / count)
    tokens = torch.multinomial(frequencies, count, replacement=True, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(count, encoding.channels, generator=torch.Generator().manual_seed(2))
    z = snr.sqrt()[:, None] * codes[tokens] + noise
    _, guess = by_frequencies(z, snr, codes, frequencies.log(), encoding.precision)
    entropy = -float((frequencies * frequencies.log()).sum())
    nats = curve.nats((guess - codes[tokens]).square().sum(-1), snr)
    error = float(nats.std()) / math.sqrt(count)
    assert float(nats.mean()) == pytest.approx(entropy, abs=3 * error)
    assert error < 0.025 * entropy


def test_a_guess_in_pieces_is_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, frequencies = codes_of(5), unigram(5)
    z = torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    snr = torch.tensor([0.5, 2.0])[:, None, None]
    posterior = log_posterior(z, snr, codes, frequencies.log()).exp()
    monkeypatch.setattr("trunkline.models.token_image.information._MOST_SCORES", 35)
    tokens, guess = by_frequencies(z, snr, codes, frequencies.log())
    assert torch.equal(tokens, posterior.argmax(-1))
    assert torch.allclose(guess, posterior @ codes, atol=1e-6)


def test_shares_of_the_information_are_found_again() -> None:
    curve = curve_for("bits", 106)
    assert (curve.share.diff() >= 0).all()
    shares = torch.tensor([0.1, 0.5, 0.9])
    ratios = curve.snr_at(shares)
    assert (ratios.diff() > 0).all()
    for share, ratio in zip(shares, ratios):
        near = torch.argmin((curve.snr - ratio).abs())
        assert float(curve.share[near]) == pytest.approx(float(share), abs=0.05)
    assert isinstance(curve, Curve)
