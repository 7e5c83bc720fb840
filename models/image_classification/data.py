"""The images of a run: where they come from, and what a sample of them is.

    source = open_source(data)            a folder of images, or a prepared store
    source.classes                        the names of the classes, sorted; a label is a place in them
    source.split("train")[3]              {"image": uint8 [H, W, 3], "label": int, "index": 3}

A sample is the decoded image: a square in a store of a fixed size, and in a folder unless training crops; otherwise of
any size whose shorter side is at most `short_side`. What training does to it is the part of
trunkline.models.image_classification.augment, which also makes squares of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trunkline.engine.task import Batch, Samples
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.folders import Folders
from trunkline.models.image_classification.store import Prepared

Sample = dict[str, Any]


class Images(Samples, Protocol):
    """The images of one split."""

    labels: NDArray[np.int64]
    """int64 [N]"""

    def name(self, index: int) -> str:
        """What a person finds the image by: its path below the data's folder."""


class Source(Protocol):
    """Where images come from."""

    classes: tuple[str, ...]
    short_side: int | None
    """Pixels to which the shorter side of images was shrunk; None where all are squares of data.img_size."""
    fingerprint: str
    notes: Sequence[str]
    """What of the data was left out, for whoever starts the run."""

    def split(self, name: str) -> Images:
        """The images of "train" or "val", or "test" where there are some. Raises DataError."""


def open_source(data: ImageData, size: Size | None = None, known: Sequence[str] = ()) -> Source:
    """The images that the section names. For a trained network, whose classes are `known`, a folder's are resized to
    `size`, and it needs no more than one of the splits.

    Raises DataError, and ConfigError for a size that a store does not hold.
    """
    return Folders(data, size, known) if data.store is None else Prepared(data)


def collate(samples: Sequence[Sample]) -> Batch:
    """{"image": uint8 [B, H, W, 3], "size": int64 [B, 2], "label": int64 [B], "index": int64 [B]}.

    Images of several sizes fill the upper left of [H, W], the largest height and width among them.
    """
    sizes = np.array([sample["image"].shape[:2] for sample in samples])
    if (sizes == sizes[0]).all():
        images = np.stack([sample["image"] for sample in samples])
    else:
        images = np.zeros((len(samples), *sizes.max(axis=0), 3), np.uint8)
        for place, sample in zip(images, samples, strict=True):
            image = sample["image"]
            place[: image.shape[0], : image.shape[1]] = image
    return {
        "image": torch.from_numpy(images),
        "size": torch.from_numpy(sizes),
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
