"""What noisy codes of tokens still tell of them, if a token is known by its frequency alone.

A token v has a code e_v of numbers, such as its bits as -1 and 1. Noise leaves z = sqrt(g) e_v + eps, g the
signal-to-noise ratio. By Bayes, of frequencies p:

    log P(v | z) = log p_v + sqrt(g) z.e_v - g |e_v|^2 / 2 + constant

and the error of the best guess of e, mse(g) = E |e - E[e | z]|^2, says how many nats z tells (Guo, Shamai and Verdu,
2005): I(g) = 1/2 integral of mse from 0 to g. All of the token is I(infinity), its entropy. So a denoiser that errs
less than this one by d(g) bounds the negative log-likelihood of a token, in nats, by what the frequencies alone give,
-log p_v, less 1/2 integral of d. Where ratios are drawn so that the shares of the information below them are spread
evenly, the integral is the mean of d times what a share spans of the ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal, uniform
from trunkline.models.token_image.encodings import Encoding

POINTS = 160
LEAST, MOST = 1e-3, 1e3
"""The ratios of a curve, of codes that are 2 apart at least."""
_MOST_WORK = 1 << 20  # draws times tokens at a ratio
_MOST_SCORES = 1 << 20
_LAST_SHARE = 1 - 1 / 2000  # beyond it a curve by Monte Carlo says little of what a share spans


def log_posterior(
    z: Tensor, snr: Tensor, codes: Tensor, log_frequencies: Tensor, precision: torch.dtype = torch.float64
) -> Tensor:
    """log P(v | z), fp32 [..., V], of z [..., C] at snr, broadcastable to [...].

    codes: [V, C]. log_frequencies: [V], of which -inf is a token that there never is. precision: Encoding.precision
    """
    return _scores(z, snr, codes, log_frequencies, precision).log_softmax(-1)


def _scores(z: Tensor, snr: Tensor, codes: Tensor, log_frequencies: Tensor, precision: torch.dtype) -> Tensor:
    """log P(v | z) up to a constant, fp32, the largest 0."""
    z, snr, wide = z.to(precision), snr.to(precision), codes.to(precision)
    scores = (snr.sqrt()[..., None] * z) @ wide.T
    scores.sub_(snr[..., None] * (wide.square().sum(-1) / 2)).add_(log_frequencies)
    return scores.sub_(scores.amax(-1, keepdim=True)).float()


def by_frequencies(
    z: Tensor, snr: Tensor, codes: Tensor, log_frequencies: Tensor, precision: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [...] and the best guess of the codes [..., C], of z as `log_posterior` takes it."""
    flat, ratios = z.flatten(0, -2), snr.expand(z.shape[:-1]).flatten()
    pieces = max(1, _MOST_SCORES // len(codes))
    scores = (
        _scores(some, ratio, codes, log_frequencies, precision)
        for some, ratio in zip(flat.split(pieces), ratios.split(pieces), strict=True)
    )
    found = [(each.argmax(-1), each.softmax(-1) @ codes) for each in scores]
    tokens, guesses = (torch.cat(parts) for parts in zip(*found, strict=True))
    return tokens.view(z.shape[:-1]), guesses.view(z.shape)


@dataclass(frozen=True)
class Curve:
    """By signal-to-noise ratio: snr [P], rising; share [P], of all information, of what lies below."""

    snr: Tensor
    share: Tensor

    def snr_at(self, share: Tensor) -> Tensor:
        """The ratio below which this share of the information lies, by interpolation of its logarithm."""
        return _interpolated(share, self.share, self.snr.log()).exp()

    def share_at(self, snr: Tensor) -> Tensor:
        """The share of the information below this ratio."""
        return _interpolated(snr.clamp(min=LEAST / 2).log(), self.snr.log(), self.share)

    def to(self, device: torch.device) -> Curve:
        """The same there."""
        return Curve(self.snr.to(device), self.share.to(device))

    def nats(self, error: Tensor, snr: Tensor) -> Tensor:
        """1/2 integral of the error over the ratio is the mean of these, where the ratios' shares are spread evenly.

        So of errors themselves they make up what it takes to name a token, and of how much less a denoiser errs than a
        guess by frequencies, what it saves. That holds exactly, however well the curve fits.
        """
        snr = snr.clamp(max=self.snr_at(torch.full((), _LAST_SHARE, device=snr.device)))
        right = torch.searchsorted(self.snr, snr.contiguous()).clamp(1, len(self.snr) - 1)
        logs = self.snr.log()
        span = (logs[right] - logs[right - 1]) / (self.share[right] - self.share[right - 1])
        return error * snr * span / 2


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """ys at x between rising xs; beyond them the first or the last."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    part = ((x - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return ys[right - 1] + part * (ys[right] - ys[right - 1])


def curve_of(encoding: Encoding, frequencies: Tensor) -> Curve:
    """The curve of encoded tokens of these frequencies [V], which sum to 1, by a fixed Monte Carlo draw.

    Each ratio has the same tokens and noise, so that the curve is smooth. `share` is 0 at the first point and 1 at the
    last.
    """
    codes, logs = encoding.encode(torch.arange(encoding.vocab_size)), frequencies.log()
    draws = min(max(_MOST_WORK // len(codes), 1 << 10), 1 << 16)
    keys = torch.arange(draws)
    places = (torch.arange(draws) + uniform(keys, ())) / draws  # one draw in each of as many equal parts
    tokens = torch.searchsorted(frequencies.double().cumsum(0).float(), places).clamp(max=len(codes) - 1)
    clean, noise = codes[tokens], normal(keys, (codes.shape[1],), stream=1)
    snr = torch.logspace(math.log10(LEAST), math.log10(MOST * (2 / encoding.min_distance) ** 2), POINTS)
    errors = []
    for ratio in snr:
        _, guess = by_frequencies(ratio.sqrt() * clean + noise, ratio, codes, logs, encoding.precision)
        errors.append((clean - guess).square().sum(-1).mean())
    mse = torch.stack(errors)
    told = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(mse.double(), snr.double()).float()])
    return Curve(snr, told / told[-1])
