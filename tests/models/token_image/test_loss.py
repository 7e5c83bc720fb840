"""What the loss is of, against its formulas written out in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.token_image.conftest import write_store
from tests.models.token_image.runs import SMALL
from trunkline.engine.data.randomness import normal, uniform
from trunkline.engine.task import Batch
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.task import TokenImageTask

LENGTHS = (1, 128, 129, 4096)
"""Tokens with EOS. Of 64 x 64 pixels, 128 are half of a row of patches of 4 x 4."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("lengths"), "texts", [(b"abcde" * n, b"") for n in (0, 3, 12, 40)]).root


def made(store: Path, count: int = 4, size: int = 16, **model: Any) -> tuple[TokenImageTask, Batch]:
    """A task, and the batch of its first samples."""
    task = TokenImageTask(TokenImageData(store=str(store), img_size=size), TokenImageModel(**SMALL | model))
    samples = task.dataset("train")
    batch = task.collate([samples[index] for index in range(count)])
    return task, batch | {"valid": torch.ones(count, dtype=torch.bool), "draw": torch.arange(5, 5 + count)}


class Given(nn.Module):
    """A network that says what it is told to."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, *_: Tensor, **__: object) -> Tensor:
        self.x = x
        return self.output


def alphas(batch: Batch) -> Tensor:
    """fp64 [B, 1, 1, 1] of the linear schedule."""
    return (1 - torch.floor(uniform(batch["draw"], ()).double() * 1000) / 1000)[:, None, None, None]


def test_texts_of_every_length_train_by_their_own_pixels_and_no_others(tmp_path: Path) -> None:
    """The original counted patches of which more than half held tokens: the first two trained nothing."""
    texts = [(b"x" * (length - 1), b"") for length in LENGTHS]
    task, batch = made(write_store(tmp_path, "texts", texts).root, size=64)
    clean, held = task.images(batch)
    assert held.flatten(1).sum(1).tolist() == [*LENGTHS]
    told = Given(torch.randn(clean.shape))
    task.loss(told, batch)["loss"].backward()
    assert told.output.grad is not None
    wanted = 2 * (told.output.detach() - clean) * held[..., None]
    torch.testing.assert_close(told.output.grad, wanted)
    assert float(task.weight(batch)) == sum(LENGTHS)

    torch.manual_seed(0)
    network = task.build_model()
    total = task.loss(network, batch)["loss"]
    parts = []
    for place in range(len(LENGTHS)):
        alone = {name: value[place : place + 1] for name, value in batch.items()}
        parts.append(task.loss(network, alone)["loss"])
        network.zero_grad()
        parts[-1].backward()
        for name in ("patches.weight", "blocks.1.qkv.weight", "blocks.0.down.weight", "output.weight"):
            gradient = network.jit.get_parameter(name).grad
            assert gradient is not None
            assert gradient.abs().max() > 0, (LENGTHS[place], name)
        assert float(task.weight(alone)) == LENGTHS[place]
    torch.testing.assert_close(torch.stack(parts).sum(), total)


def test_every_pixel_of_a_text_is_read(store: Path) -> None:
    """Also where it is the only one of its patch."""
    task, _ = made(store, count=1)
    torch.manual_seed(0)
    network = task.build_model()
    for length in (1, 17, 18, 256):
        held = (torch.arange(256) < length).view(1, 16, 16)
        noisy = torch.randn(1, 16, 16, 3, requires_grad=True)
        network(noisy, torch.tensor([500]), held)[0, 0, 0].sum().backward()
        assert noisy.grad is not None
        read = noisy.grad[0].abs().sum(-1) > 0
        assert read[held[0]].all()
        patches = held.view(4, 4, 4, 4).any(3).any(1)
        assert torch.equal(read, patches.repeat_interleave(4, 0).repeat_interleave(4, 1))


def test_the_noisy_image_is_the_recipes(store: Path) -> None:
    task, batch = made(store, noise="linear")
    clean, _ = task.images(batch)
    told = Given(torch.zeros(clean.shape))
    task.loss(told, batch)
    wanted = alphas(batch) * clean + (1 - alphas(batch)) * normal(batch["draw"], clean.shape[1:], stream=1)
    torch.testing.assert_close(told.x.double(), wanted, rtol=0, atol=1e-6)


def test_the_loss_v_is_the_squared_error_of_the_velocity(store: Path) -> None:
    """v = (x - x_t) / (1 - alpha), where there is noise of .05 at least."""
    task, batch = made(store, loss="v")
    batch["draw"] = torch.arange(40)[(uniform(torch.arange(40), ()) < 0.05).argsort(descending=True, stable=True)][:4]
    clean, held = task.images(batch)
    noise = 1 - alphas(batch)
    assert (noise < 0.05).any()
    assert (noise > 0.05).any()
    told = Given(torch.randn(clean.shape))
    found = task.loss(told, batch)["loss"].detach()
    x = told.x.double()
    velocity, true = ((image.double() - x) / noise.clamp(min=0.05) for image in (told.output.detach(), clean))
    wanted = ((velocity - true).square().sum(-1) * held).sum()
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_the_cross_entropy_is_the_sum_of_the_tokens_log_probabilities(store: Path) -> None:
    task, batch = made(store, loss="cross_entropy")
    batch["valid"][3] = False
    told = Given(torch.randn(4, 16, 16, 256) * 3)
    logs = told.output.detach().double().log_softmax(-1).flatten(1, 2)
    wanted = sum(
        -float(logs[row, place, batch["tokens"][row, place]])
        for row in range(3)
        for place in range(int(batch["length"][row]))
    )
    assert float(task.loss(told, batch)["loss"].detach()) == pytest.approx(wanted, rel=1e-6)
    assert float(task.weight(batch)) == float(batch["length"][:3].sum())


@pytest.mark.parametrize("encoding", ["rgb", "bits"])
def test_a_network_with_a_prior_begins_with_the_unigram_posterior(store: Path, encoding: str) -> None:
    """log p_v - |x_t - alpha e_v|^2 / 2 (1 - alpha)^2, and what the head adds, in fp64."""
    task, batch = made(store, loss="cross_entropy", prior="unigram")
    task = TokenImageTask(task.data.model_copy(update={"encoding": encoding}), task.model)
    network = task.build_model()
    clean, held = task.images(batch)
    alpha, codes = alphas(batch), task.encoding.encode(torch.arange(256)).double()
    x = alpha.float() * clean + (1 - alpha.float()) * normal(batch["draw"], clean.shape[1:], stream=1)
    distance = (x.double()[..., None, :] - alpha[..., None] * codes).square().sum(-1)
    counts = torch.bincount(batch["tokens"][held.flatten(1)], minlength=256) + 1  # the batch is all the data
    scores = (counts / counts.sum()).double().log() - distance / 2 / (1 - alpha).square()

    def wanted(added: Tensor) -> float:
        logs = (scores + added).log_softmax(-1)
        chosen = logs.gather(-1, batch["tokens"].view(4, 16, 16, 1))[..., 0]
        return -float(chosen[held].sum())

    with torch.no_grad():
        assert float(task.loss(network, batch)["loss"]) == pytest.approx(wanted(torch.zeros(1)), rel=1e-5)
        bias = network.jit.output.bias.normal_(generator=torch.Generator().manual_seed(0))
        in_patch = bias.double().view(4, 4, 256).repeat(4, 4, 1)
        assert float(task.loss(network, batch)["loss"]) == pytest.approx(wanted(in_patch), rel=1e-5)
