from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.token_image.conftest import write_store
from trunkline.engine.task import Batch, Sums, add_sums
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.task import TokenImageTask

LEARNABLE = {
    "patch": [1, 4], "d_model": 32, "num_layers": 1, "num_heads": 2, "block": "official", "stem": 3,
    "condition": False, "noise": "information", "prior": "unigram", "loss": "cross_entropy",
}  # fmt: skip


class Oracle(nn.Module):
    """Gives the clean image away, but for one token of each image."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.clean = clean.clone()
        self.clean[:, 0, 0] *= -1

    def forward(self, *_: Tensor, previous: Tensor | None = None) -> Tensor:
        return self.clean


@functools.cache
def task_of(store: Path, **model: object) -> TokenImageTask:
    data = TokenImageData(store=str(store), img_size=16, stride=64, encoding="bits")
    return TokenImageTask(data, TokenImageModel(**LEARNABLE | model))


def batch_of(task: TokenImageTask, places: list[int], valid: list[bool] | None = None) -> Batch:
    samples = task.dataset("val")
    batch = task.collate([samples[place] for place in places])
    return batch | {
        "valid": torch.tensor(valid or [True] * len(places)),
        "draw": torch.tensor(places) * 1_000_003,
    }  # fmt: skip


def untrained(task: TokenImageTask) -> nn.Module:
    torch.manual_seed(0)
    return task.build_model().eval()


def test_accuracy_is_the_share_of_tokens_that_the_guess_decodes_to(texts: Path) -> None:
    task = task_of(texts, loss="x", prior="none", noise="linear")
    batch = batch_of(task, [0, 1, 2])
    sums = task.evaluate(Oracle(task.images(batch)[0]), batch)
    metrics = task.summarize(sums)
    tokens = int(batch["length"].sum())
    assert metrics["token_accuracy"] == pytest.approx((tokens - 3) / tokens)
    assert set(metrics) == {"loss", "token_accuracy"}
    assert metrics["loss"] == pytest.approx(3 * 4 * task.encoding.channels / tokens)


def test_who_knows_the_frequencies_alone_pays_their_cross_entropy(texts: Path) -> None:
    """With a prior and an output that starts at 0, the network is the closed-form guess by frequencies."""
    task = task_of(texts)
    batch = batch_of(task, [0, 1, 2, 3])
    with torch.no_grad():
        metrics = task.summarize(task.evaluate(untrained(task), batch))
    inside = torch.arange(256) < batch["length"][:, None]
    wanted = -float((task.frequencies.log2()[batch["tokens"]] * inside).sum() / inside.sum())
    assert metrics["bits_per_token"] == pytest.approx(wanted, abs=1e-4)


def test_a_network_keeps_the_frequencies_that_it_began_with_when_other_data_are_accepted(
    texts: Path, tmp_path: Path
) -> None:
    """Its noise and its prior are of the same ones, so that it pays by what it knows of texts that say other things."""
    other = write_store(tmp_path, "texts", [(b"zzzz zzz zz z " * 3, b""), (b"ab", b"")])
    network, task = untrained(task_of(texts)), task_of(other.root)
    batch = batch_of(task, [0, 1])
    with torch.no_grad():
        metrics = task.summarize(task.evaluate(network, batch))
    inside = torch.arange(256) < batch["length"][:, None]
    wanted = -float((task_of(texts).frequencies.log2()[batch["tokens"]] * inside).sum() / inside.sum())
    assert metrics["bits_per_token"] == pytest.approx(wanted, abs=1e-4)


def test_who_knows_the_text_saves_what_noise_hides(texts: Path) -> None:
    """The errors of the guess by frequencies, which an oracle saves all, are worth the whole cross entropy."""
    task = task_of(texts, loss="x", prior="none", noise="information")
    batch = batch_of(task, [2] * 300)
    batch["draw"] = torch.arange(300)
    oracle = Oracle(task.images(batch)[0])
    oracle.clean[:, 0, 0] *= -1
    oracle.alpha, oracle.known = (network := task.build_model()).alpha, network.known
    sums = task.evaluate(oracle, batch)
    assert task.summarize(sums)["token_accuracy"] == 1
    cross_entropy = float(sums["nats"] / sums["tokens"].sum()) / math.log(2)
    assert task.summarize(sums)["bits_per_token"] == pytest.approx(0, abs=0.1 * cross_entropy)


@pytest.mark.parametrize("model", [{}, {"loss": "x", "prior": "none", "noise": "linear"}])
def test_sums_do_not_depend_on_how_samples_are_batched(texts: Path, model: dict) -> None:
    task = task_of(texts, **model)
    network = untrained(task)
    with torch.no_grad():
        whole = task.evaluate(network, batch_of(task, [0, 1, 2, 3, 5]))
        parts: Sums | None = None
        for places, valid in (([0, 1], [True, True]), ([2, 4], [True, False]), ([3, 5], [True, True])):
            parts = add_sums(parts, task.evaluate(network, batch_of(task, places, valid)))
    assert parts is not None
    for name, value in whole.items():
        assert torch.allclose(parts[name].double(), value.double(), rtol=1e-5), name


def test_the_loss_is_that_of_training_and_what_is_better_is_known(texts: Path, tmp_path: Path) -> None:
    task = task_of(texts)
    network, batch = untrained(task), batch_of(task, [0, 1, 2])
    with torch.no_grad():
        sums = task.evaluate(network, batch)
    assert torch.equal(sums["loss"], task.loss(network, batch)["loss"])
    assert [task.direction(name) for name in ("token_accuracy", "bits_per_token", "x")] == ["max", "min", None]
    task.show(sums, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.png"]
