"""A trained image classifier from a run's folder: network, classes, and how it sees images.

trained = load_trained(run, device)
trained.logits(batch)                 of images as the task collates them
CLASSES                               the file beside the weights with the names of the classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import write_json
from trunkline.engine.machine.reading import read_json, reason
from trunkline.engine.task import Batch
from trunkline.models.image_classification.augment import prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.network import trained_network

CLASSES = "classes.json"


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; classes: in the order of the outputs; data, model: what it was trained on."""

    folder: Path
    network: nn.Module
    classes: tuple[str, ...]
    data: ImageData
    model: ImageModel

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """fp32 [B, C], of the pixels that validation sees. The batch is on the network's device."""
        logits: Tensor = self.network(pixel_values=prepared(batch, self.data)).logits
        return logits.float()


def load_trained(run: Path, device: torch.device) -> Trained:
    """The classifier of a run, in eval mode on `device`. It needs no data. Raises CheckpointError or ConfigError."""
    folder, data, model = trained_sections(run, "image_classification", ImageData, ImageModel)
    classes = read_classes(folder)
    network = trained_network(folder, model, len(classes), data.img_size)
    return Trained(folder, network.to(device).eval(), classes, data, model)


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Put the names of the classes beside weights."""
    write_json(folder / CLASSES, list(classes))


def read_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes beside weights. Raises CheckpointError."""
    path = folder / CLASSES
    try:
        classes = read_json(path)
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or not classes:
            raise ValueError('it does not hold a list of names, ["cat", "dog", ...]')
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the names of the classes cannot be read ({reason(error)}): copy the folder of weights again"
        ) from error
    return tuple(classes)
