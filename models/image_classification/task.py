"""ImageTask: which of the classes an image is of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trunkline.engine.data.lazy import opened_late
from trunkline.engine.task import Batch, Sums, Task
from trunkline.engine.whole_state import WholeState
from trunkline.models.image_classification import best_pth
from trunkline.models.image_classification.augment import augmented, prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.criterion import Criterion, balanced_weights, given_weights
from trunkline.models.image_classification.data import Images, Sample, collate, open_source
from trunkline.models.image_classification.metrics import direction, scores, sums_of
from trunkline.models.image_classification.mixup import PAIR, pair
from trunkline.models.image_classification.network import begin_with, check_size, hf_files, make_network
from trunkline.models.image_classification.normalization import batch_norms
from trunkline.models.image_classification.shown import show_augmented, show_evaluation
from trunkline.models.image_classification.tracking import tracking, write_distribution
from trunkline.models.image_classification.trained import write_facts
from trunkline.models.image_classification.weights import file_names


class ImageTask(Task):
    """The workload over a folder of images or a prepared store. Raises DataError or ConfigError."""

    unit = "images"

    def __init__(self, data: ImageData, model: ImageModel) -> None:
        self.data, self.model = data, model
        self.source = open_source(data)
        self.classes = self.source.classes
        self.tracking = tracking(self.classes)
        self._network_notes: list[str] = []
        check_size(self._shell, data.img_size, model)
        weights = None
        if (asked := model.class_weights) == "balanced":
            weights = balanced_weights(self.dataset("train").labels, len(self.classes))
        elif asked is not None:
            weights = given_weights(asked, self.classes)
        self.criterion = Criterion(model.label_smoothing, weights)
        unlike = {"smoothed": model.label_smoothing, "weighted": asked is not None, "mixed": data.augmentation.mixup}
        if any(unlike.values()):
            self.validation_loss = f"plain, not {' or '.join(word for word, used in unlike.items() if used)}"
        self._keep_together()

    def _keep_together(self) -> None:
        if self.model.normalization == "batch" and batch_norms(self._shell):
            self.micro_batch_multiple = self.model.batch_norm_group
            self.micro_batch_multiple_key = "model.batch_norm_group"
        if self.data.augmentation.mixup:
            self.micro_batch_multiple = math.lcm(PAIR, self.micro_batch_multiple)
            self.micro_batch_multiple_key = self.micro_batch_multiple_key or "data.augmentation.mixup"

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

    def largest_sample(self) -> Sample:
        """A square of data.img_size."""
        return {"image": np.zeros((self.data.img_size, self.data.img_size, 3), np.uint8), "label": 0, "index": 0}

    @property
    def assumed(self) -> Sequence[str]:  # type: ignore[override]
        """That there are two classes, where they are not known."""
        if any(self.classes):
            return ()
        two, three = (
            sum(parameter.numel() for parameter in self._shell_of(classes).parameters()) for classes in (2, 3)
        )
        return [
            f"the number of classes is unknown without data: this is of 2; each further one adds {three - two:,} "
            "parameters"
        ]

    def fingerprint(self) -> str:
        """Names the data's content."""
        return self.source.fingerprint

    def meaning(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": list(self.classes)}

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

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        """best.pth, as the FastAI-compatible trainer has it."""
        arch = self.model.arch or Path(str(self.model.path)).name
        best_pth.write(folder, state(), self.classes, self.data.img_size, arch)

    def keeps_best(self, folder: Path, best: WholeState | None) -> bool:
        """Whether best.pth is there and of this evaluation. That of another one is renamed."""
        return best_pth.is_of(folder, best)

    def read_state(self, path: Path, steps_per_epoch: int) -> WholeState:
        """A best.pth of that trainer, or of this workload."""
        model = self.build_model()
        return best_pth.read(path, model, self.classes, steps_per_epoch, self.data.img_size, self.model.arch)

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """classes.json, class_distribution.json, and preprocessor_config.json with what config.json holds beside it,
        by which transformers opens the network."""
        write_facts(folder, self.classes, self.source.short_side)
        labels = {split: self.dataset(split).labels for split in ("train", "val")}
        write_distribution(folder, self.classes, labels)
        is_plain = self.model.normalization != "group"
        return hf_files(folder, self._shell, self.data, self.source.short_side, self.classes, is_plain)

    @cached_property
    def _shell(self) -> nn.Module:
        return self._shell_of(len(self.classes))

    def _shell_of(self, num_classes: int) -> nn.Module:
        with torch.device("meta"):
            return make_network(self.model, num_classes, self.data.img_size)

    @cached_property
    def _file_names(self) -> dict[str, str]:
        return file_names(self._shell)


class _WithoutData(ImageTask):
    """The task without its data, which are read only where something is asked that needs them. It has two classes."""

    def __init__(self, data: ImageData, model: ImageModel) -> None:
        self.data, self.model, self.classes = data, model, ("", "")
        self.source = opened_late(lambda: open_source(data))
        self.criterion = Criterion(model.label_smoothing, None)
        self._keep_together()


make_task, weights_task = ImageTask, _WithoutData
