from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from trunkline.engine.task import Batch
from trunkline.models.token_image import evaluation
from trunkline.models.token_image.bigram import Bigram
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.levels import BIGRAM, NEAREST, NETWORK, UNIGRAM, Levels, measure
from trunkline.models.token_image.ngrams import NGrams
from trunkline.models.token_image.task import TokenImageTask

SMALL = {"patch": [1, 4], "d_model": 32, "num_layers": 1, "num_heads": 2, "condition": False}
UNTRAINED = {"loss": "cross_entropy", "prior": "unigram"}
"""Its output starts at 0: the network is the posterior by frequencies."""


def texts_of(task: TokenImageTask) -> list[np.ndarray]:
    return [sample.text for sample in (task.dataset("val")[place] for place in range(len(task.dataset("val"))))]


def batch_of(task: TokenImageTask, repeats: int) -> Batch:
    """All images of the split, each with several draws of noise, and one that only fills up."""
    samples = [task.dataset("val")[place] for place in range(len(task.dataset("val")))] * repeats
    batch = task.collate([*samples, samples[0]])
    count = len(samples) + 1
    return batch | {"valid": torch.arange(count) < count - 1, "draw": torch.arange(count) * 7919}


@cache
def read(store: Path, encoding: str, noise: str, repeats: int = 6, count: int = 8) -> tuple[Levels, NGrams, list]:
    data = TokenImageData(store=str(store), img_size=8, stride=64, encoding=encoding)
    task = TokenImageTask(data, TokenImageModel(**SMALL, **UNTRAINED, noise=noise))
    texts = texts_of(task)
    model = NGrams.fit(texts, task.frequencies.double().numpy(), 2)
    bigram = Bigram(task.frequencies, torch.from_numpy(model.transitions()).float()) if noise == "information" else None
    curve = task.curve or evaluation.curve_of(task.encoding, task.frequencies)
    network = task.build_model().eval()
    return measure(task, network, [batch_of(task, repeats)], count, curve, bigram), model, texts


def bits(model: NGrams, texts: list[np.ndarray], order: int) -> float:
    return -float(model.log_probabilities(texts)[order - 1].mean()) / math.log(2)


@pytest.mark.parametrize(("encoding", "noise"), [("bits", "cosine"), ("rgb", "linear")])
def test_the_errors_of_the_posterior_by_frequencies_make_up_the_unigrams_bits(
    texts: Path, encoding: str, noise: str
) -> None:
    levels, model, read_texts = read(texts, encoding, noise, count=16)
    assert levels.integral() == pytest.approx(bits(model, read_texts, 1), rel=0.03)  # by draws 0.8 % apart


def test_the_bound_of_the_bigrams_posterior_is_the_bigrams_cross_entropy(texts: Path) -> None:
    levels, model, read_texts = read(texts, "bits", "information")
    assert levels.bits(BIGRAM) == pytest.approx(bits(model, read_texts, 2), abs=0.1)
    assert bits(model, read_texts, 2) < bits(model, read_texts, 1) - 1


def test_times_are_those_that_the_network_is_told(texts: Path) -> None:
    """Of a network that learned from other texts, and so has another curve."""
    data = TokenImageData(store=str(texts), img_size=8, stride=64, encoding="bits")
    task = TokenImageTask(data, TokenImageModel(**SMALL, **UNTRAINED, noise="information"))
    assert task.curve is not None
    own = replace(task.curve, snr=2 * task.curve.snr)
    network = Denoiser(task.model, 8, task.encoding, task.frequencies, own).eval()
    told = []
    network.register_forward_pre_hook(lambda _, given: told.append(float(given[1][0])))
    levels = measure(task, network, [batch_of(task, 1)], 4, task.curve, None)
    assert levels.times == pytest.approx(told)
    assert max(abs(levels.times - 1000 * (1 - levels.shares))) > 50


@pytest.mark.parametrize(("encoding", "noise"), [("bits", "information"), ("bits", "cosine"), ("rgb", "linear")])
def test_a_network_that_is_the_posterior_reads_as_it(texts: Path, encoding: str, noise: str) -> None:
    """So it is told the right time, whatever noise it was trained with."""
    levels, _, _ = read(texts, encoding, noise, count=8 if noise == "information" else 16)
    assert levels.bits(NETWORK) == pytest.approx(levels.bits(UNIGRAM), abs=0.02)
    np.testing.assert_allclose(levels.accuracy(NETWORK), levels.accuracy(UNIGRAM), atol=0.01)
    np.testing.assert_allclose(levels.error(NETWORK)[:-1], 1, atol=0.02)


def test_who_sees_more_reads_better_and_all_read_well_what_is_nearly_clean(texts: Path) -> None:
    levels, _, _ = read(texts, "bits", "information")
    assert levels.accuracy(BIGRAM).mean() > levels.accuracy(UNIGRAM).mean() > levels.accuracy(NEAREST).mean()
    assert levels.accuracy(NEAREST)[0] < 0.2
    for reader in (NETWORK, NEAREST, UNIGRAM, BIGRAM):
        assert levels.accuracy(reader)[-1] > 0.8
    assert (np.diff(levels.times) < 0).all()


def test_what_fills_up_a_batch_is_not_counted(texts: Path) -> None:
    levels, _, read_texts = read(texts, "bits", "information")
    assert len(levels.lengths) == 6 * len(read_texts)
    assert levels.lengths.sum() == 6 * sum(map(len, read_texts))


def test_the_standard_error_is_that_of_a_ratio_over_images() -> None:
    """Two tokens an image: the bits are a plain mean, and so is their standard error."""
    costs = np.array([1.0, 2.0, 4.0, 5.0])
    zeros = np.zeros((4, 1))
    levels = Levels(
        *(np.ones(1) for _ in range(4)), lengths=np.full(4, 2.0), cross_entropy=costs * 2 * math.log(2),
        right={NETWORK: zeros}, errors={NETWORK: zeros, UNIGRAM: zeros},
    )  # fmt: skip
    assert levels.bits(NETWORK) == pytest.approx(costs.mean())
    assert levels.deviation(NETWORK) == pytest.approx(costs.std(ddof=1) / 2)
