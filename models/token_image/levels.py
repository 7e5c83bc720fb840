"""How well noisy held-out texts are read, level by level of noise, with the same noise for all who read.

    levels = measure(task, network, batches, count, curve, bigram)
    levels.accuracy("network"), levels.error("network")        by level
    levels.bits("network"), levels.deviation("network")        the likelihood bound per token, and its standard error

The readers: the network; the token with the nearest code; the posterior by tokens' frequencies, each pixel for itself;
and, where it is affordable, the exact posterior of the bigram model, which sees all pixels.
The levels stand in the middle of equal parts of the information that frequencies leave open
(trunkline.models.token_image.information), whatever noise the network was trained with. So the mean over levels is the
integral over the signal-to-noise ratio that the bound asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.data.randomness import normal
from trunkline.engine.task import Batch
from trunkline.models.token_image.bigram import Bigram
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.generation import read_once
from trunkline.models.token_image.information import Curve, by_frequencies, log_posterior
from trunkline.models.token_image.task import TokenImageTask

NETWORK, NEAREST, UNIGRAM, BIGRAM = "network", "nearest code", "unigram posterior", "bigram posterior"
_MOST = 1 << 24  # probabilities at once


@dataclass(frozen=True)
class Levels:
    """Of N images and K levels.

    shares [K]: of the information, which lies at more noise. snr [K]. times [K]: the network's
    lengths [N]: tokens. right, errors: by reader, fp64 [N, K]: tokens read right, and squared errors of codes
    nats [K]: what an error of 1 at each level is worth; their mean over levels makes up the integral
    cross_entropy [N]: nats of the tokens by their frequencies
    """

    shares: np.ndarray
    snr: np.ndarray
    times: np.ndarray
    nats: np.ndarray
    lengths: np.ndarray
    cross_entropy: np.ndarray
    right: dict[str, np.ndarray]
    errors: dict[str, np.ndarray]

    def accuracy(self, reader: str) -> np.ndarray:
        """[K], the share of tokens read right."""
        found: np.ndarray = self.right[reader].sum(0) / self.lengths.sum()
        return found

    def error(self, reader: str) -> np.ndarray:
        """[K], the squared error per token, over that of the posterior by frequencies."""
        tiny = 1e-12  # of few tokens with little noise nothing may be wrong
        found: np.ndarray = self.errors[reader].sum(0) / self.errors[UNIGRAM].sum(0).clip(min=tiny)
        return found

    def bits(self, reader: str) -> float:
        """The bound per token: by frequencies exactly, less what the reader errs less. At the posterior by frequencies
        it is their cross entropy."""
        return float(self._costs(reader).sum() / self.lengths.sum()) / math.log(2)

    def deviation(self, reader: str) -> float:
        """The standard error of `bits`, over images."""
        rest = self._costs(reader) - self._costs(reader).sum() / self.lengths.sum() * self.lengths
        count = len(rest)
        return float(math.sqrt((rest**2).sum() * count / max(count - 1, 1)) / self.lengths.sum()) / math.log(2)

    def integral(self) -> float:
        """Bits per token that errors of the posterior by frequencies make up: their cross entropy, if right."""
        return float((self.errors[UNIGRAM] * self.nats).mean(1).sum() / self.lengths.sum()) / math.log(2)

    def _costs(self, reader: str) -> np.ndarray:
        saved: np.ndarray = ((self.errors[UNIGRAM] - self.errors[reader]) * self.nats).mean(1)
        return self.cross_entropy - saved


@torch.no_grad()
def measure(
    task: TokenImageTask, network: Denoiser, batches: Sequence[Batch], count: int, curve: Curve,
    bigram: Bigram | None, progress: bool = False,
) -> Levels:  # fmt: skip
    """Read the valid samples of the batches at `count` levels. The noise is drawn by batch["draw"] and the level."""
    device = batches[0]["tokens"].device
    shares = (torch.arange(count, device=device) + 0.5) / count
    snr = curve.snr_at(shares)
    alphas = snr.sqrt() / (1 + snr.sqrt())
    frequencies = task.frequencies.to(device)
    right: dict[str, list[Tensor]] = {}
    errors: dict[str, list[Tensor]] = {}
    lengths, cross_entropy = [], []
    with tqdm(total=len(batches) * count, desc="noise levels", unit="level", disable=not progress) as bar:
        for batch in batches:
            clean, held = task.images(batch)
            valid, wanted = batch["valid"], batch["tokens"].view(held.shape)
            lengths.append(batch["length"][valid])
            cross_entropy.append(-(frequencies.log()[wanted] * held).sum((1, 2))[valid])
            for level, alpha in enumerate(alphas):
                x = alpha * clean + (1 - alpha) * normal(batch["draw"], clean.shape[1:], stream=1 + level)
                for reader, (tokens, guess) in read(task, network, batch, x, alpha, bigram).items():
                    hits = ((tokens == wanted) & held).sum((1, 2))[valid]
                    error = ((guess - clean).square().sum(-1) * held).sum((1, 2))[valid]
                    right.setdefault(reader, []).append(hits)
                    errors.setdefault(reader, []).append(error)
                bar.update()
    times = network.time(alphas)
    worth = curve.nats(torch.ones_like(snr), snr)
    return Levels(
        shares=_joined([shares]), snr=_joined([snr]), times=_joined([times]), nats=_joined([worth]),
        lengths=_joined(lengths), cross_entropy=_joined(cross_entropy),
        right=_tables(right, count), errors=_tables(errors, count),
    )  # fmt: skip


@torch.no_grad()
def read(
    task: TokenImageTask, network: Denoiser, batch: Batch, x: Tensor, alpha: Tensor, bigram: Bigram | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """By reader the tokens [B, S, S] and the guessed codes [B, S, S, C] of x [B, S, S, C] at alpha, a scalar."""
    held, device = task.images(batch)[1], x.device
    codes = task.encoding.encode(torch.arange(task.encoding.vocab_size, device=device))
    frequencies, precision = task.frequencies.to(device), task.encoding.precision
    z, snr = x / (1 - alpha), (alpha / (1 - alpha)).square()
    t = network.time(alpha).expand(len(x))
    nearest = task.encoding.decode(x / alpha)
    found = {
        NETWORK: read_once(network, x, t, held, task.condition(batch)),
        NEAREST: (nearest, codes[nearest]),
        UNIGRAM: by_frequencies(z, snr, codes, frequencies.log(), precision),
    }
    if bigram is not None:
        some = max(1, _MOST // (len(codes) * held[0].numel()))
        parts = zip(z.flatten(1, 2).split(some), batch["length"].split(some), strict=True)
        posterior = torch.cat([
            bigram.posterior(log_posterior(each, snr, codes, torch.zeros_like(frequencies), precision), length)
            for each, length in parts
        ]).view(*held.shape, -1)  # fmt: skip
        found[BIGRAM] = posterior.argmax(-1), posterior @ codes
    return found


def _joined(parts: list[Tensor]) -> np.ndarray:
    found: np.ndarray = torch.cat(parts).double().cpu().numpy()
    return found


def _tables(parts: dict[str, list[Tensor]], count: int) -> dict[str, np.ndarray]:
    """[N, K] of what came batch by batch, and there level by level."""
    return {
        name: np.concatenate([np.stack([_joined([each]) for each in found[at : at + count]], 1)
                              for at in range(0, len(found), count)])
        for name, found in parts.items()
    }  # fmt: skip
