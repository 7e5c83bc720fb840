"""The classes of images by a trained network: what `launchers/predict.py` does for this workload.

predictions.csv    of each image its path and the likeliest classes with their probabilities, or why it has none
sheet.png          images with their classes
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import made_folder
from trunkline.models.image_classification.decode import BadImage, read_image
from trunkline.models.image_classification.plots import Tile, plot_sheet, shortened
from trunkline.models.image_classification.scan import SUFFIXES, PassedOver, images_below, printable
from trunkline.models.image_classification.trained import Trained, in_batches, load_trained

TABLE = "predictions.csv"
_TOP_K = 5
_SHEET = 48
_PRINTED = 20


@dataclass(frozen=True)
class Prediction:
    """probabilities: fp64 [C], or None of what could not be read; `why` says why not."""

    path: Path
    probabilities: NDArray[np.float64] | None
    why: str = ""


def predict(trained: Trained, paths: Sequence[Path], batch_size: int = 64) -> Iterator[Prediction]:
    """The prediction of each file, in order."""

    def read(place: int) -> dict[str, Any] | str:
        try:
            return {"image": read_image(paths[place], trained.size), "label": 0, "index": place}
        except BadImage as error:
            return str(error)

    first = 0
    for batch in in_batches(read, len(paths), batch_size):
        samples = [sample for sample in batch if not isinstance(sample, str)]
        found = iter(trained.logits(samples)[0].double().softmax(dim=1).cpu().numpy() if samples else ())
        for path, sample in zip(paths[first:], batch, strict=False):
            yield Prediction(path, None, sample) if isinstance(sample, str) else Prediction(path, next(found))
        first += len(batch)


def run(arguments: argparse.Namespace) -> int:
    """Predict, write and draw. Returns the exit status. Raises ConfigError, DataError or CheckpointError."""
    for name in ("top_k", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    paths = find_images(arguments.images)
    out = made_folder(arguments.out)
    trained = load_trained(arguments.run, arguments.device)
    print(described(trained.folder), file=sys.stderr)  # what was predicted goes to stdout
    made = predict(trained, paths, arguments.batch_size)
    try:
        with _Table(out / TABLE, trained.classes, min(arguments.top_k or _TOP_K, len(trained.classes))) as table:
            for each in tqdm(made, desc="predict", unit="image", total=len(paths)):
                table.add(each)
        if not table.good:
            raise DataError(
                f"--images: none of the {len(paths):,} files can be read: each is named above with the reason"
            )
        _draw(out / "sheet.png", table.sample(_SHEET), table.good, trained)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written: {error.strerror}; choose another") from error
    for each in table.first:
        name, probability = _likeliest(each, trained.classes, 1)[0]
        print(f"{printable(str(each.path))}: {name} ({probability:.1%})")
    more = f" (the first {_PRINTED} above)" if table.good > _PRINTED else ""
    missing = f", {len(paths) - table.good:,} could not be read" if table.good < len(paths) else ""
    print(f"wrote {table.good:,} predictions{more} to {out / TABLE}{missing}; sheet.png shows some")
    return 0


class _Table:
    """predictions.csv, row by row: what is done is there, whatever ends the program. Few predictions are kept."""

    def __init__(self, path: Path, classes: Sequence[str], top_k: int) -> None:
        self.good, self.first = 0, list[Prediction]()
        self._shown, self._every = list[Prediction](), 1
        self._classes, self._top_k = classes, top_k
        self._file = path.open("w", encoding="utf-8", newline="", errors="surrogateescape", buffering=1)
        self._rows = csv.writer(self._file)
        header = [f"{name}_{place}" for place in range(2, top_k + 1) for name in ("class", "probability")]
        self._rows.writerow(["path", "class", "probability", *header, "error"])

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, each: Prediction) -> None:
        cells = [text for name, p in _likeliest(each, self._classes, self._top_k) for text in (name, f"{p:.6f}")]
        self._rows.writerow([each.path, *(cells or [""] * 2 * self._top_k), each.why])
        if each.probabilities is None:
            tqdm.write(f"warning: {printable(str(each.path))}: left out: {each.why}", file=sys.stderr)
            return
        if len(self.first) < _PRINTED:
            self.first.append(each)
        if self.good % self._every == 0:
            self._shown.append(each)
        if len(self._shown) == 4 * _SHEET:
            self._shown, self._every = self._shown[::2], 2 * self._every
        self.good += 1

    def sample(self, most: int) -> list[Prediction]:
        """Some of the good ones, spread over all."""
        places = np.unique(np.linspace(0, len(self._shown) - 1, most).round().astype(int))
        return [self._shown[place] for place in places]


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files that are given, and those below the folders that are, sorted in each. Raises DataError."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            full, passed = path.resolve(), PassedOver()
            below = images_below(full.parent, full.name, passed)
            images = sorted(path / name.removeprefix(f"{full.name}/") for name, _ in below)
            for line in passed.notes():
                print(f"note: {path}: {line}", file=sys.stderr)
            if not images:
                raise DataError(f"--images {path}: holds no image ({', '.join(SUFFIXES)}), at any depth")
            found += images
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"--images {path}: is neither a file nor a folder")
    return list(dict.fromkeys(found))


def _likeliest(prediction: Prediction, classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Classes and their probabilities, none of what could not be read."""
    if prediction.probabilities is None:
        return []
    order = np.argsort(-prediction.probabilities, kind="stable")[:count]
    return [(classes[place], float(prediction.probabilities[place])) for place in order]


def _draw(path: Path, chosen: Sequence[Prediction], good: int, trained: Trained) -> None:
    tiles = []
    for each in chosen:
        name, probability = _likeliest(each, trained.classes, 1)[0]
        lines = [shortened(each.path.name, 20), f"{shortened(name, 12)} ({100 * probability:.1f} %)"]
        tiles.append(Tile(read_image(each.path, trained.size), lines))
    some = f"{len(chosen)} of {good:,} images" if len(chosen) < good else f"{good} images"
    plot_sheet(tiles, path, f"{some}, and what they are taken for")
