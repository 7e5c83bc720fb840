"""What a training forward on held-out texts tells beside its loss, as sums.

    token_accuracy     the share of tokens that the network's guess decodes to, over the drawn times
    bits_per_token     with the noise "information": a bound of what a token of the text costs, given how long the text
                       is (trunkline.models.token_image.information)

The times are drawn by batch["draw"], so that all sums are the same on any number of ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.engine.record.pictures import BLUE, GREY, picture
from trunkline.engine.task import Sums
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.information import Curve, by_frequencies
from trunkline.models.token_image.noise import LAST, evenly

BINS = 20


class Noisy(NamedTuple):
    """clean, x: [B, S, S, C], without and with noise. t, alpha: [B]. counted: bool [B, S, S], which pixels are scored.

    output: what the network makes of x, [B, S, S, C or V]
    """

    clean: Tensor
    x: Tensor
    t: Tensor
    alpha: Tensor
    counted: Tensor
    output: Tensor


def decoded(output: Tensor, encoding: Encoding, gives_logits: bool) -> tuple[Tensor, Tensor]:
    """The tokens [...] and the clean pixels, fp32 [..., C], of a network's output."""
    if not gives_logits:
        return encoding.decode(output), output.float()
    codes = encoding.encode(torch.arange(encoding.vocab_size, device=output.device))
    return output.argmax(-1), output.float().softmax(-1) @ codes


def sums(
    seen: Noisy, tokens: Tensor, encoding: Encoding, gives_logits: bool, bound: tuple[Tensor, Curve] | None
) -> Sums:
    """Of tokens int64 [B, S S]; `bound` takes their frequencies and the curve."""
    wanted, alpha = tokens.view(seen.counted.shape), seen.alpha[:, None, None]
    guessed, clean = decoded(seen.output, encoding, gives_logits)
    naive = encoding.decode(seen.x / alpha[..., None])
    bins = (seen.t * BINS // LAST).long().clamp(max=BINS - 1)

    def by_time(hits: Tensor) -> Tensor:
        counts = (hits & seen.counted).sum((1, 2))
        return counts.new_zeros(BINS).index_add_(0, bins, counts)

    found = {
        "tokens": by_time(seen.counted),
        "right": by_time(guessed == wanted),
        "right_naively": by_time(naive == wanted),
    }
    if bound is None:
        return found
    log_frequencies, curve = bound[0].to(clean.device).log(), bound[1].to(clean.device)
    codes = encoding.encode(torch.arange(encoding.vocab_size, device=clean.device))
    snr = (alpha / (1 - alpha)).square()
    z = seen.x / (1 - alpha)[..., None]
    by_frequency, guess = by_frequencies(z, snr, codes, log_frequencies, encoding.precision)
    less = (guess - seen.clean).square().sum(-1) - (clean - seen.clean).square().sum(-1)
    return found | {
        "right_by_frequencies": by_time(by_frequency == wanted),
        "nats": -(log_frequencies[wanted] * seen.counted).sum(),
        "nats_saved": (curve.nats(less, snr) * seen.counted * evenly(seen.t)[:, None, None]).sum(),
    }


def metrics(sums: Sums) -> dict[str, float]:
    """See the top of this file."""
    total = sums["tokens"].sum()
    found = {"token_accuracy": float(sums["right"].sum() / total)}
    if "nats" in sums:
        found["bits_per_token"] = float((sums["nats"] - sums["nats_saved"]) / total) / math.log(2)
    return found


def plot(sums: Sums, path: Path) -> None:
    """The share of right tokens by time, beside what the noisy pixel alone gives."""
    lines = {
        "network": ("right", BLUE, "-"), "unigram posterior": ("right_by_frequencies", GREY, "-"),
        "nearest code": ("right_naively", GREY, ":"),
    }  # fmt: skip
    there = (sums["tokens"] > 0).cpu()
    times = (torch.arange(BINS) + 0.5)[there] * LAST / BINS
    with picture(path, 7, 3.6) as figure:
        axes = figure.subplots()
        for label, (name, color, style) in lines.items():
            if name in sums:
                shares = (sums[name] / sums["tokens"].clamp(min=1)).cpu()[there]
                axes.plot(times.tolist(), shares.tolist(), style, label=label, color=color, marker="o", markersize=3)
        axes.set_xlabel(f"time (0: clean, {LAST}: noise)")
        axes.set_ylabel("share of tokens decoded right")
        axes.set_xlim(0, LAST)
        axes.set_ylim(-0.02, 1.02)
        axes.legend()
