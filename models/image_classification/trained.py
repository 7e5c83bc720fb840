"""A trained image classifier from a run's folder: network, classes, and how it sees images.

trained = load_trained(run, device)           without the data that it was trained on
trained.logits(samples)                       of decoded images, as the data's samples are
in_batches(read, count, batch_size)           many samples, decoded by several threads
write_facts(folder, classes, short_side)      what a run leaves for this beside its weights: classes.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.errors import CheckpointError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine.files import write_json
from trunkline.engine.machine.reading import read_object, reason
from trunkline.engine.task import Batch
from trunkline.models.image_classification.augment import prepared
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.data import Sample, collate
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.network import trained_network

FACTS = "classes.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; classes: in the order of the outputs; size: of the images that it was shown."""

    folder: Path
    network: nn.Module
    classes: tuple[str, ...]
    size: Size
    data: ImageData
    device: torch.device

    @torch.no_grad()
    def logits(self, samples: Sequence[Sample]) -> tuple[Tensor, Batch]:
        """fp32 [B, C], and the batch, on the device. The network sees what it sees in validation."""
        batch = collate(samples) | {"valid": torch.ones(len(samples), dtype=torch.bool)}
        batch = to_device(batch, self.device)
        logits: Tensor = self.network(pixel_values=prepared(batch, self.data)).logits
        return logits.float(), batch


def in_batches(read: Callable[[int], T], count: int, batch_size: int) -> Iterator[list[T]]:
    """read(0), ..., read(count - 1), `batch_size` at a time, by a thread for each core: decoding lets others work."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, count, batch_size):
            yield list(pool.map(read, range(first, min(first + batch_size, count))))


def load_trained(run: Path, device: torch.device) -> Trained:
    """The classifier of a run, in eval mode on `device`. Raises CheckpointError or ConfigError."""
    folder, data, model = trained_sections(run, "image_classification", ImageData, ImageModel)
    return open_trained(folder, data, model, device)


def open_trained(folder: Path, data: ImageData, model: ImageModel, device: torch.device) -> Trained:
    """The classifier whose weights lie in `folder`. Raises CheckpointError or ConfigError."""
    classes, short_side = read_facts(folder)
    network = trained_network(folder, model, len(classes), data.img_size)
    size = Size(square=data.img_size) if short_side is None else Size(short_side=short_side)
    return Trained(folder, network.to(device).eval(), classes, size, data, device)


def write_facts(folder: Path, classes: Sequence[str], short_side: int | None) -> None:
    """classes.json: the names of the classes, and to what images were shrunk, null for squares of data.img_size."""
    write_json(folder / FACTS, {"classes": list(classes), "short_side": short_side})


def read_facts(folder: Path) -> tuple[tuple[str, ...], int | None]:
    """What `write_facts` wrote. Raises CheckpointError."""
    path = folder / FACTS
    try:
        facts = read_object(path)
        classes, short_side = facts.get("classes"), facts.get("short_side")
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError('"classes" is not a list of names')
        if short_side is not None and (not isinstance(short_side, int) or short_side < 1):
            raise ValueError('"short_side" is neither null nor a number of pixels')
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: does not say which classes the network knows ({reason(error)}): copy the folder again"
        ) from error
    return tuple(classes), short_side
