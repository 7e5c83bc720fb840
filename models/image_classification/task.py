"""ImageTask: which of the classes an image is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.engine.task import Batch, Sums, Task
from trunkline.engine.whole_state import WholeState
from trunkline.models.image_classification import best_pth
from trunkline.models.image_classification.augment import augmented, prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.data import Images, Sample, collate, open_source
from trunkline.models.image_classification.network import make_network
from trunkline.models.image_classification.tracking import tracking, write_distribution


class ImageTask(Task):
    """The workload over a folder of images or a prepared store. Raises DataError or ConfigError."""

    unit = "images"

    def __init__(self, data: ImageData, model: ImageModel) -> None:
        self.data, self.model = data, model
        self.source = open_source(data)
        self.classes = self.source.classes
        self.tracking = tracking(self.classes)

    def build_model(self) -> nn.Module:
        """A new network for the classes of the data."""
        return make_network(self.model, len(self.classes), self.data.img_size)

    def dataset(self, split: str) -> Images:
        """The images of "train", "val" or "test"."""
        return self.source.split(split)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """See trunkline.models.image_classification.data."""
        return collate(samples)

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """Cross entropy summed over the images."""
        logits = model(pixel_values=augmented(batch, self.data)).logits
        losses = F.cross_entropy(logits.float(), batch["label"], reduction="none")
        return {"loss": (losses * batch["valid"]).sum()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """The confusion matrix [C, C], rows the true classes, and the loss."""
        logits: Tensor = model(pixel_values=prepared(batch, self.data)).logits.float()
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        count = len(self.classes)
        places = batch["label"] * count + logits.argmax(dim=1)
        confusion = torch.zeros(count * count, dtype=torch.int64, device=logits.device)
        confusion.index_add_(0, places, batch["valid"].to(torch.int64))
        return {"loss": (losses * batch["valid"]).sum(), "confusion": confusion.view(count, count)}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """ "loss", "accuracy"."""
        count = sums["confusion"].sum()
        return {"loss": float(sums["loss"] / count), "accuracy": float(sums["confusion"].diagonal().sum() / count)}

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Accuracy is better high."""
        return "max" if metric == "accuracy" else None

    def fingerprint(self) -> str:
        """Names the data's content."""
        return self.source.fingerprint

    def notes(self) -> list[str]:
        """What of the data was left out."""
        return list(self.source.notes)

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        """best.pth, as the FastAI-compatible trainer has it."""
        arch = self.model.arch or Path(str(self.model.path)).name
        best_pth.write(folder, state(), self.classes, self.data.img_size, arch)

    def read_state(self, path: Path, steps_per_epoch: int) -> WholeState:
        """A best.pth of that trainer, or of this workload."""
        return best_pth.read(path, self.build_model(), self.classes, steps_per_epoch)

    def save_assets(self, folder: Any) -> dict[str, Any]:
        """class_distribution.json."""
        labels = {split: self.dataset(split).labels for split in ("train", "val")}
        write_distribution(folder, self.classes, labels)
        return {}


make_task = ImageTask
