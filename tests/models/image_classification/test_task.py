"""The task: any split of a global batch sums to the same, fillers carry nothing, and settings that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.image_classification.trained_run import small_task, write_images
from trunkline.engine.data.loading import collate
from trunkline.engine.errors import ConfigError
from trunkline.engine.task import Batch, add_sums
from trunkline.models.image_classification.task import ImageTask

MIXED = {"augmentation": {"mixup": 0.4, "rotate": 10, "crop": {}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_images(folder / "images")
    return folder


def global_batch(task: ImageTask, first: int, last: int) -> Batch:
    """Places first ... last of a global batch of 12 with 11 samples."""
    samples = np.array([*range(11), -1])[first:last]
    images = task.dataset("train")
    return collate(task, [images[int(place)] for place in samples.clip(0)], [samples, samples * 7 + 3])


def test_any_even_split_of_a_global_batch_has_the_same_loss_and_gradient(folder: Path) -> None:
    task = small_task(folder, folder / "images", MIXED, label_smoothing=0.1, class_weights=(1.0, 0.3, 2.0))
    assert task.micro_batch_multiple % 2 == 0
    model = task.build_model().eval()  # whole batches alone are normalised together, which is not what is asked here

    def summed(size: int) -> list[torch.Tensor]:
        model.zero_grad()
        batches = [global_batch(task, first, first + size) for first in range(0, 12, size)]
        losses = [task.loss(model, batch)["loss"] for batch in batches]
        torch.stack(losses).sum().backward()
        weights = torch.stack([task.weight(batch) for batch in batches])
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        return [torch.stack(losses).detach().sum(), weights.sum(), *gradients]

    whole = summed(12)
    for size in (2, 4, 6):
        for found, want in zip(summed(size), whole, strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


def test_fillers_carry_nothing(folder: Path) -> None:
    task = small_task(folder, folder / "images", MIXED, class_weights="balanced")
    model = task.build_model().eval()
    batch = global_batch(task, 8, 12)
    other = {key: value.clone() for key, value in batch.items()}
    other["image"][3], other["label"][3], other["draw"][3] = 255, 2, 99
    with torch.no_grad():
        assert torch.equal(task.loss(model, batch)["loss"], task.loss(model, other)["loss"])
        assert torch.equal(task.weight(batch), task.weight(other))
        for found, want in zip(
            add_sums(None, task.evaluate(model, batch | {"index": torch.arange(4)})).values(),
            add_sums(None, task.evaluate(model, other | {"index": torch.arange(4)})).values(),
            strict=True,
        ):
            assert torch.equal(found, want)


def test_balanced_weights_come_from_the_training_images(folder: Path) -> None:
    task = small_task(folder, folder / "images", class_weights="balanced")
    labels = torch.from_numpy(task.dataset("train").labels)
    assert task.criterion.weights(labels).sum() == pytest.approx(len(labels))


def test_weights_for_other_classes_are_refused_before_anything_is_trained(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.class_weights: has 2 numbers for 3 classes"):
        small_task(folder, folder / "images", class_weights=(1.0, 2.0))
