"""ImageTask: which of the classes an image is of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.engine.task import Batch, Sums, Task
from trunkline.models.image_classification.augment import augmented, prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.data import Images, Sample, collate, open_source
from trunkline.models.image_classification.network import begin_with, check_size, hf_files, make_network
from trunkline.models.image_classification.normalization import batch_norms
from trunkline.models.image_classification.weights import file_names


def weights_task(data: ImageData, model: ImageModel) -> ImageTask:
    """The task without its data: only tensor_name and file_tensors may be called on it."""
    task = object.__new__(ImageTask)
    task.data, task.model, task.classes = data, model, ("", "")
    return task


class ImageTask(Task):
    """The workload over a folder of images or a prepared store. Raises DataError or ConfigError."""

    unit = "images"

    def __init__(self, data: ImageData, model: ImageModel) -> None:
        self.data, self.model = data, model
        self.source = open_source(data)
        self.classes = self.source.classes
        self._network_notes: list[str] = []
        check_size(self._shell, data.img_size, model)
        if model.normalization == "batch" and batch_norms(self._shell):
            self.micro_batch_multiple, self.micro_batch_multiple_key = model.batch_norm_group, "model.batch_norm_group"

    def build_model(self) -> nn.Module:
        """A new network for the classes of the data."""
        return make_network(self.model, len(self.classes), self.data.img_size)

    def initialize(self, model: nn.Module) -> None:
        """The weights of model.path or model.pretrained."""
        self._network_notes = begin_with(model, self.model)

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
        """What of the data was left out, what the network began with, and what of it is not as in other programs."""
        said = [*self.source.notes, *self._network_notes]
        if self.model.normalization == "frozen":
            frozen = sum(parameter.numel() for norm in batch_norms(self._shell) for parameter in norm.parameters())
            said.append(f"model.normalization: frozen: {frozen:,} parameters of BatchNorms are not trained")
        if self.model.normalization == "group":
            said.append("model.normalization: group: transformers has no class for this network, and none is named")
        return said

    def file_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Under the names that transformers gives them in files."""
        return {self._file_names[name]: tensor for name, tensor in tensors.items()}

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """preprocessor_config.json; config.json holds the names of the classes and what transformers reads there."""
        return hf_files(folder, self._shell, self.data, self.classes, self.model.normalization != "group")

    @cached_property
    def _shell(self) -> nn.Module:
        with torch.device("meta"):
            return make_network(self.model, len(self.classes), self.data.img_size)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        return file_names(self._shell)


make_task = ImageTask
