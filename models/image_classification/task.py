"""ImageTask: which of the classes an image is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trunkline.engine.task import Batch, Sums, Task
from trunkline.models.image_classification.augment import augmented, prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.criterion import Criterion, balanced_weights, given_weights
from trunkline.models.image_classification.data import Images, Sample, collate, open_source
from trunkline.models.image_classification.metrics import direction, scores, sums_of
from trunkline.models.image_classification.mixup import PAIR, pair
from trunkline.models.image_classification.network import make_network
from trunkline.models.image_classification.shown import show_augmented, show_evaluation
from trunkline.models.image_classification.trained import write_classes


class ImageTask(Task):
    """The workload over a folder of images or a prepared store. Raises DataError or ConfigError."""

    unit = "images"

    def __init__(self, data: ImageData, model: ImageModel) -> None:
        self.data, self.model = data, model
        self.source = open_source(data)
        self.classes = self.source.classes
        weights = None
        if (asked := model.class_weights) == "balanced":
            weights = balanced_weights(self.dataset("train").labels, len(self.classes))
        elif asked is not None:
            weights = given_weights(asked, self.classes)
        self.criterion = Criterion(model.label_smoothing, weights)
        if data.augmentation.mixup:
            self.micro_batch_multiple = math.lcm(PAIR, getattr(self, "micro_batch_multiple", 1))

    def build_model(self) -> nn.Module:
        """A new network for the classes of the data."""
        return make_network(self.model, len(self.classes), self.data.img_size)

    def dataset(self, split: str) -> Images:
        """The images of "train", "val" or "test"."""
        return self.source.split(split)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """See trunkline.models.image_classification.data."""
        return collate(samples)

    def weight(self, batch: Batch) -> Tensor:
        """The number of images, each as often as its class weighs."""
        weights = self.criterion.weights(batch["label"], pair(batch, self.data.augmentation.mixup))
        return weights.where(batch["valid"], 0.0).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """Cross entropy summed over the images, each as often as its class weighs."""
        pairing = pair(batch, self.data.augmentation.mixup)
        pixels = augmented(batch, self.data)
        logits = model(pixel_values=pairing.mix(pixels) if pairing else pixels).logits
        losses = self.criterion.losses(logits, batch["label"], pairing)
        return {"loss": losses.where(batch["valid"], 0.0).sum()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """See trunkline.models.image_classification.metrics. The loss is plain: not smoothed, not weighted."""
        logits = model(pixel_values=prepared(batch, self.data)).logits
        return sums_of(logits, batch, len(self.dataset("val")))

    def summarize(self, sums: Sums) -> dict[str, float]:
        """See trunkline.models.image_classification.metrics."""
        return scores(sums, self.classes)

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether it is better high or low."""
        return direction(metric)

    def show(self, sums: Sums, folder: Path) -> None:
        """confusion.png, classes.md, per_class.csv and mistakes.png; once augmented.png, what training sees."""
        show_evaluation(sums, self.classes, self.dataset("val"), folder)
        if not (folder / "augmented.png").exists():
            show_augmented(self.dataset("train"), self.classes, self.data, folder / "augmented.png")

    def fingerprint(self) -> str:
        """Names the data's content."""
        return self.source.fingerprint

    def notes(self) -> list[str]:
        """What of the data was left out."""
        return list(self.source.notes)

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """classes.json."""
        write_classes(folder, self.classes)
        return {}


make_task = ImageTask
