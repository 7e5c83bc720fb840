"""The prepared images: a trunkline.engine.data.store.ArrayStore of these arrays, for each of train, val and test.

    {split}/images        uint8 [N, S, S, 3] of a fixed size; otherwise ragged uint8, the [H, W, 3] of each image
    {split}/sizes         int32 [N, 2], height and width; where they differ
    {split}/offsets       int64 [N + 1], where the values of each image begin; where sizes differ
    {split}/labels        int32 [N], places in the classes
    {split}/names         ragged uint8, the images' paths below the folder that was read
    {split}/name_offsets  int64 [N + 1]

Its facts: "classes"; "square" or "short_side", to which the images were resized, the other null.
store.json also says what it was made from, and in "remarks" what was left out, for a person to read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.engine.data.store import Array, ArrayStore
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.scan import SPLITS, printable
from trunkline.models.image_classification.selection import class_notes, draw


class ImageStore(ArrayStore):
    """A whole, checked set of images."""

    workload = "image_classification"
    prepare = "python launchers/prepare.py image_classification --source ROOT --out"

    def __init__(self, root: Path, index: dict[str, Any]) -> None:
        super().__init__(root, index)
        self.classes = tuple(map(str, self.facts["classes"]))
        self.size = Size(self.facts["square"], self.facts["short_side"])
        self.splits = tuple(split for split in SPLITS if f"{split}/labels" in self.arrays)
        row = (self.size.square, self.size.square, 3) if self.size.square is not None else ()
        for split in self.splits:
            count = self.arrays[f"{split}/labels"].shape
            images, names = self.arrays[f"{split}/images"], self.arrays[f"{split}/names"]
            sizes = self.arrays[f"{split}/sizes"].shape if row == () else (*count, 2)
            if images.shape[1:] != row or names.dtype != "|u1" or images.dtype != "|u1" or sizes != (*count, 2):
                raise ValueError(f"images of {split} that do not belong together")
            if {len(self[f"{split}/images"]), len(self[f"{split}/names"])} != set(count):
                raise ValueError(f"images of {split} that are more or fewer than its labels")

    def names(self, split: str) -> list[str]:
        """The images' paths below the folder that was read."""
        values, offsets = self[f"{split}/names"].map().tobytes(), self[f"{split}/name_offsets"].map().tolist()
        return [os.fsdecode(values[start:stop]) for start, stop in pairwise(offsets)]


class Prepared:
    """The source that is a store. Raises DataError, and ConfigError for a size that it does not hold."""

    def __init__(self, data: ImageData) -> None:
        self.store = ImageStore.open(str(data.store))
        self.classes, self.short_side = self.store.classes, self.store.size.short_side
        if self.store.size.square not in (None, data.img_size):
            raise ConfigError(
                f"data.img_size: {data.img_size}, where the images in {self.store.root} have {self.store.size.square} "
                f"pixels: set that, or prepare others with --img-size {data.img_size}, or --short-side N for any size"
            )
        sizes = {"train": data.train_size, "val": data.val_size}
        names = {split: self.store.names(split) for split in self.store.splits if sizes.get(split) is not None}
        self._places, draws = draw(names, sizes, data.size_per_class)
        drawing = {"size_per_class": data.size_per_class, **sizes} if any(sizes.values()) else {}
        self.fingerprint = " ".join([self.store.fingerprint, *(f"{name} {value}" for name, value in drawing.items())])
        labels = {split: self.split(split).labels for split in self.store.splits}
        self.notes: Sequence[str] = [*self.store.index.get("remarks", []), *draws, *class_notes(self.classes, labels)]

    def split(self, name: str) -> StoreImages:
        """The images of a split. Raises DataError if there are none."""
        if name not in self.store.splits:
            raise DataError(f"{self.store.root}: no images of {name!r}: it holds {', '.join(self.store.splits)}")
        return StoreImages(self.store, name, self._places.get(name))


class StoreImages:
    """The images of one split, or those at `places`. Safe to pickle.

    arrays: what is read of the store
    """

    def __init__(self, store: ImageStore, split: str, places: NDArray[np.int64] | None) -> None:
        self._images = store[f"{split}/images"]
        self._sizes = store[f"{split}/sizes"] if store.size.square is None else None
        self._names, self._places = store[f"{split}/names"], places
        labels = store[f"{split}/labels"]
        all_labels = labels.rows(0, len(labels)).astype(np.int64)
        if len(all_labels) and not 0 <= all_labels.min() <= all_labels.max() < len(store.classes):
            raise DataError(f"{store.path(f'{split}/labels')}: labels outside the classes: {store.remedy}")
        self.labels = all_labels if places is None else all_labels[places]

    @property
    def arrays(self) -> list[Array]:
        read = [self._images, self._names, *([] if self._sizes is None else [self._sizes])]
        offsets = {str(array.spec.offsets) for array in read if array.spec.offsets is not None}
        return read + [array.store[name] for array in read[:1] for name in sorted(offsets)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self._place(index)
        if self._sizes is None:
            image = self._images.rows(place, place + 1)[0]
        else:
            height, width = self._sizes.rows(place, place + 1)[0].tolist()
            image = self._images.item(place).reshape(height, width, 3)
        return {"image": image, "label": int(self.labels[index]), "index": index}

    def name(self, index: int) -> str:
        """Its path below the folder that was read, as it can be printed."""
        return printable(os.fsdecode(self._names.item(self._place(index)).tobytes()))

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return index if self._places is None else int(self._places[index])
