"""The classes of images by a trained network: what `launchers/predict.py` does for this workload.

predictions.csv    of each image its path and the likeliest classes with their probabilities, or why it has none
sheet.png          images with their classes
"""

from __future__ import annotations

import argparse
import csv
import os
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
from trunkline.models.image_classification.decode import BadImage, read_image
from trunkline.models.image_classification.plots import Tile, plot_sheet, shortened
from trunkline.models.image_classification.scan import SUFFIXES, printable
from trunkline.models.image_classification.trained import Trained, in_batches, load_trained

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
    trained = load_trained(arguments.run, arguments.device)
    print(described(trained.folder), file=sys.stderr)  # what was predicted goes to stdout
    made = list(tqdm(predict(trained, paths, arguments.batch_size), desc="predict", unit="image", total=len(paths)))
    good = [each for each in made if each.probabilities is not None]
    for each in made:
        if each.probabilities is None:
            print(f"warning: {printable(str(each.path))}: left out: {each.why}", file=sys.stderr)
    if not good:
        raise DataError(f"--images: none of the {len(made):,} files can be read: each is named above with the reason")
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "predictions.csv", made, trained.classes, min(arguments.top_k or _TOP_K, len(trained.classes)))
        _draw(out / "sheet.png", good, trained)
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written: {error.strerror}; choose another") from error
    for each in good[:_PRINTED]:
        print(f"{printable(str(each.path))}: {', '.join(_likeliest(each, trained.classes, 1))}")
    more = f" (the first {_PRINTED} above)" if len(good) > _PRINTED else ""
    missing = f", {len(made) - len(good):,} could not be read" if len(good) < len(made) else ""
    print(f"wrote {len(good):,} predictions{more} to {out}/predictions.csv{missing}; sheet.png shows some")
    return 0


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files that are given, and those below the folders that are, sorted in each. Raises DataError."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            below = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
            images = sorted(image for image in below if image.suffix.lower() in SUFFIXES)
            if not images:
                raise DataError(f"--images {path}: holds no image ({', '.join(SUFFIXES)}), at any depth")
            found += images
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"--images {path}: is neither a file nor a folder")
    return list(dict.fromkeys(found))


def _write_csv(path: Path, made: Sequence[Prediction], classes: Sequence[str], top_k: int) -> None:
    header = ["path", "class", "probability"]
    header += [f"{name}_{place}" for place in range(2, top_k + 1) for name in ("class", "probability")]
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "error"])
        for each in made:
            likeliest = _likeliest(each, classes, top_k) if each.probabilities is not None else [""] * 2 * top_k
            writer.writerow([each.path, *likeliest, each.why])


def _likeliest(prediction: Prediction, classes: Sequence[str], count: int) -> list[str]:
    """[class, probability, class, probability, ...]"""
    assert prediction.probabilities is not None
    order = np.argsort(-prediction.probabilities, kind="stable")[:count]
    return [text for place in order for text in (classes[place], f"{prediction.probabilities[place]:.6f}")]


def _draw(path: Path, good: Sequence[Prediction], trained: Trained) -> None:
    chosen = [good[int(place)] for place in np.unique(np.linspace(0, len(good) - 1, _SHEET).round())]
    tiles = []
    for each in chosen:
        name, probability = _likeliest(each, trained.classes, 1)
        lines = [shortened(each.path.name, 20), f"{shortened(name, 12)} ({100 * float(probability):.1f} %)"]
        tiles.append(Tile(read_image(each.path, trained.size), lines))
    some = f"{len(chosen)} of {len(good):,} images" if len(chosen) < len(good) else f"{len(good)} images"
    plot_sheet(tiles, path, f"{some}, and what they are taken for")
