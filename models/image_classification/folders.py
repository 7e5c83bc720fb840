"""A folder of images, read as it is; trunkline.models.image_classification.scan says what belongs to it.

At the start each file that is used is opened and its header read. What is no image is left out and counted against
`data.max_bad_fraction`. Damage further inside shows when the file is decoded, and then is an error that names it: the
images of a run are settled by then. The fingerprint covers names and sizes of files, so that the folder may be copied
and moved; that a file was changed and kept its size, only a prepared store would notice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import open_regular
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.decode import BadImage, Size, check_header, read_image
from trunkline.models.image_classification.scan import SPLITS, class_of, printable, scan
from trunkline.models.image_classification.selection import (
    check_unreadable,
    class_notes,
    crossing,
    draw_names,
    unreadable_note,
)

_THREADS = 8  # they wait for files, which may lie on a network
_KEY_BYTES = 64


class Folders:
    """The source that is a folder. Raises DataError."""

    def __init__(self, data: ImageData, size: Size | None = None, known: Sequence[str] = ()) -> None:
        self.root, self.size = Path(str(data.path)), size or _size_of(data)
        found = scan(self.root, known)
        self.classes, self.short_side = found.classes, self.size.short_side
        wanted = {"train": data.train_size, "val": data.val_size}
        self.images, draws = draw_names(found.images, wanted, data.size_per_class)
        total = sum(map(len, self.images.values()))
        bad = _bad_headers(self.root, [name for names in self.images.values() for name in names])
        check_unreadable(bad, total, data.max_bad_fraction, "data.max_bad_fraction")
        self.images = {split: [name for name in names if name not in bad] for split, names in self.images.items()}
        sizes = {split: {name: found.images[split][name] for name in names} for split, names in self.images.items()}
        self.fingerprint = _fingerprint(self.size, self.classes, sizes)
        self.notes: Sequence[str] = [
            *found.notes,
            *draws,
            *unreadable_note(bad, total),
            *class_notes(self.classes, {split: self._labels(split) for split in self.images}),
            *crossing(_equal_files(self.root, sizes)),
        ]

    def split(self, name: str) -> FolderImages:
        """The images of a split. Raises DataError if there are none."""
        if not self.images.get(name):
            there = ", ".join(split for split in SPLITS if self.images.get(split)) or "no other split"
            raise DataError(f"{self.root / name}: no images that can be read: there are some in {there}")
        return FolderImages(self.root, self.images[name], self._labels(name), self.size)

    def _labels(self, split: str) -> NDArray[np.int64]:
        places = {name: place for place, name in enumerate(self.classes)}
        return np.array([places[class_of(name)] for name in self.images[split]], np.int64)


class FolderImages:
    """The images of one split."""

    def __init__(self, root: Path, names: Sequence[str], labels: NDArray[np.int64], size: Size) -> None:
        self._root, self._names, self.labels, self._size = root, names, labels, size

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._root / self._names[index]
        try:
            image = read_image(path, self._size)
        except BadImage as error:
            raise DataError(
                f"{printable(str(path))}: cannot be decoded ({error}): mend or remove it and start anew, or prepare a "
                "store without it: `python launchers/prepare.py image_classification --max-bad-fraction ...`"
            ) from error
        return {"image": image, "label": int(self.labels[index]), "index": index}

    def name(self, index: int) -> str:
        """Its path below the data's folder, as it can be printed."""
        return printable(self._names[index])


def _size_of(data: ImageData) -> Size:
    """A crop needs more than the square that is left of it: as much as is usual, 256 for 224."""
    return Size(square=data.img_size) if data.augmentation.crop is None else Size(short_side=data.img_size * 8 // 7)


def _fingerprint(size: Size, classes: Sequence[str], images: Mapping[str, Mapping[str, int]]) -> str:
    trained = {split: images.get(split, {}) for split in ("train", "val")}
    return hashlib.sha256(json.dumps([vars(size), classes, trained]).encode()).hexdigest()


def _bad_headers(root: Path, names: Sequence[str]) -> dict[str, str]:
    """{name: reason} of those that are no images."""

    def check(name: str) -> str | None:
        try:
            check_header(root / name)
        except BadImage as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return {name: said for name, said in zip(names, pool.map(check, names), strict=True) if said is not None}


def _equal_files(
    root: Path, images: Mapping[str, Mapping[str, int]]
) -> dict[str, tuple[list[str], NDArray[np.bytes_]]]:
    """The files that are, byte for byte, in more than one split: of each split, names and keys.

    Few are read: only those of equal size, a few bytes of each, and the whole only where these are equal too.
    """
    keys = _shared({name: b"%d" % size for each in images.values() for name, size in each.items()})
    with ThreadPoolExecutor(_THREADS) as pool:
        for key in (_middle, _digest):
            try:
                found = list(pool.map(key, (root / name for name in keys)))
            except OSError as error:
                raise DataError(f"{root}: changes while it is read ({error}): start again") from error
            keys = _shared({name: old + b" " + new for (name, old), new in zip(keys.items(), found, strict=True)})
    return {
        split: (names := [name for name in each if name in keys], np.array([keys[name] for name in names], np.bytes_))
        for split, each in images.items()
    }


def _shared(keys: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those whose key is met in more than one split."""
    splits: defaultdict[bytes, set[str]] = defaultdict(set)
    for name, key in keys.items():
        splits[key].add(name.partition("/")[0])
    return {name: key for name, key in keys.items() if len(splits[key]) > 1}


def _middle(path: Path) -> bytes:
    with open_regular(path) as file:
        return os.pread(file.fileno(), _KEY_BYTES, os.fstat(file.fileno()).st_size // 2).hex().encode()


def _digest(path: Path) -> bytes:
    found = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest().encode()
