"""How much a noisy pixel tells of its token, by the time of the linear schedule, in either encoding.

    run(arguments)   `python launchers/bench.py token_information`

Bits told are the entropy of the tokens' frequencies in the training texts, less the mean of -log2 P(token | its noisy
pixel) over drawn tokens and noise.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal, uniform
from trunkline.models.token_image.encodings import Encoding, Kind
from trunkline.models.token_image.information import log_posterior
from trunkline.models.token_image.noise import alpha_of
from trunkline.models.token_image.store import Store

KINDS: tuple[Kind, ...] = ("rgb", "bits")
_AT_ONCE = 1024


def run(arguments: argparse.Namespace) -> int:
    """Print a table: a line for each encoding, a column for each time."""
    store = Store.open(arguments.store)
    texts = store.column("train", "text")
    counts = torch.from_numpy(texts.counts(store.vocab_size))
    counts[store.tokenizer().eos_token_id] += len(texts)
    frequencies = counts / counts.sum()
    entropy = -float(torch.special.xlogy(frequencies, frequencies).sum()) / math.log(2)
    print(f"{arguments.store}: {store.vocab_size:,} tokens, {entropy:.2f} bits each by their frequencies; bits told")
    print("time       " + "".join(f"{time:8d}" for time in arguments.times))
    alphas = alpha_of(torch.tensor(arguments.times), "linear")
    for kind in KINDS:
        encoding = Encoding(kind, store.vocab_size)
        told = [entropy - bits_left(encoding, frequencies.float(), float(alpha), arguments.draws) for alpha in alphas]
        print(f"{kind:4} {encoding.channels:3} ch " + "".join(f"{bits:8.2f}" for bits in told), flush=True)
    return 0


def bits_left(encoding: Encoding, frequencies: Tensor, alpha: float, draws: int) -> float:
    """The mean of -log2 P(token | alpha e + (1 - alpha) eps), over tokens of these frequencies [V]."""
    codes, logs = encoding.encode(torch.arange(encoding.vocab_size)), frequencies.log()
    keys = torch.arange(draws)
    places = (keys + uniform(keys, ())) / draws  # one draw in each of as many equal parts
    tokens = torch.searchsorted(frequencies.double().cumsum(0), places.double()).clamp(max=len(codes) - 1)
    snr, nats = torch.tensor((alpha / (1 - alpha)) ** 2), 0.0
    for some, of in zip(tokens.split(_AT_ONCE), keys.split(_AT_ONCE), strict=True):
        z = snr.sqrt() * codes[some] + normal(of, (encoding.channels,), stream=1)
        nats -= float(log_posterior(z, snr, codes, logs).gather(1, some[:, None]).double().sum())
    return nats / draws / math.log(2)
