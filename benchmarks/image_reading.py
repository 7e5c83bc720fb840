"""Images a second on one core: from a prepared store and from a folder, beside a DataLoader with Pillow transforms.

    run(arguments)   `python launchers/bench.py images`

Batches of fixed squares are compared as bytes, and all sides must give the same. Random crops are compared as the
network sees them: a store keeps the shorter side at 256 pixels and the batch is cropped, resized and normalised at
once; Pillow does the same image by image, with the same crops. Beside it stands a DataLoader that crops the image as
it was decoded, as most programs do: its pixels are others. Last, all that training does to an image by default, without
decoding: to a batch at once, and by Pillow image by image, with the same draws. Everything runs in one process on one
thread, from the page cache, in turns.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trunkline.benchmarks.pairs import ratio_of
from trunkline.engine.data.randomness import uniform
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.task import Batch, Samples
from trunkline.models.image_classification.augment import COLOUR, augmented, random_part, turned
from trunkline.models.image_classification.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    Crop,
    ImageData,
)
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.data import collate
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.folders import FolderImages, Folders
from trunkline.models.image_classification.store import Prepared

EDGE, SHORT_SIDE = 224, 256
LEAST = {"store of 224 x 224": 20.0, "store of short side 256, cropped": 3.0}
"""How often as fast as Pillow each has to be."""
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
_BATCH = 64
_CROP = Crop()
_CLOSE = {"a crop": 1.5, "an augmented image": 2.5}
"""Of 255, on average: Pillow also filters where a crop is shrunk, and rounds in between, hues to 256 of them."""
Side = Callable[[], Iterator[Tensor]]


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if a store is slower than LEAST says, else 0. Raises DataError if pixels differ."""
    if arguments.rounds < 2 or arguments.images < 2 * _BATCH:
        raise ConfigError(f"use at least --rounds 2 and --images {2 * _BATCH}")
    torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_images(root / "images", arguments.images)
        print(
            f"{arguments.images} JPEGs of {_WIDTH} x {_HEIGHT}, {size / arguments.images / 1e3:.0f} kB each, one thread"
        )
        missed = 0
        for theirs, sides in (_squares(root), _crops(root), _augmentation(root)):
            missed += _compare(theirs, sides, arguments.images, arguments.rounds, clock)
    return int(missed > 0)


def write_images(root: Path, count: int) -> int:
    """Write `count` images to train on, in two classes, and one of each to validate on; returns the bytes of the first.

    Smooth colours with noise, of which JPEG makes about what it makes of a photograph.
    """
    random, size = np.random.default_rng(0), 0
    for place in range(count + 2):
        split, number = ("train", place) if place < count else ("val", place)
        path = root / split / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((_WIDTH, _HEIGHT))
        noisy = np.asarray(coarse) + random.normal(0, 8, (_HEIGHT, _WIDTH, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=_QUALITY)
        size += path.stat().st_size if split == "train" else 0
    return size


def _squares(root: Path) -> tuple[Side, dict[str, Side]]:
    """Pillow's side, and ours: uint8 [B, 224, 224, 3]."""
    prepare(root / "images", root / "squares", Size(square=EDGE))
    folder = Folders(ImageData(path=str(root / "images"), img_size=EDGE)).split("train")
    store = Prepared(ImageData(store=str(root / "squares"), img_size=EDGE)).split("train")
    transformed = _Transformed(
        root / "images", folder, lambda image, _: image.resize((EDGE, EDGE), Image.Resampling.BILINEAR)
    )

    def squares(images: Samples) -> Side:
        return lambda: (batch["image"] for batch in _batches(images))

    sides = {"store of 224 x 224": squares(store), "folder": squares(folder)}
    for name, side in sides.items():
        for one, other in zip(side(), _loaded(transformed), strict=True):
            if not torch.equal(one, other):
                raise DataError(f"{name} gives other pixels than Pillow: no speed is reported")
    return lambda: _loaded(transformed), sides


def _crops(root: Path) -> tuple[Side, dict[str, Side]]:
    """Pillow's side, and ours: fp32 [B, 3, 224, 224], normalised."""
    prepare(root / "images", root / "short", Size(short_side=SHORT_SIDE))
    plain = Augmentation(flip=0, rotate=0, brightness=0, contrast=0, saturation=0, hue=0, crop=_CROP)
    data = ImageData(store=str(root / "short"), img_size=EDGE, augmentation=plain)
    store = Prepared(data).split("train")
    folder = Folders(ImageData(path=str(root / "images"), img_size=EDGE)).split("train")

    def same(image: Image.Image, index: int) -> Tensor:
        short = image.resize(Size(short_side=SHORT_SIDE).of(*image.size), Image.Resampling.BILINEAR)
        return _normalised(short.resize((EDGE, EDGE), Image.Resampling.BILINEAR, box=_box(index, short.size)))

    def whole(image: Image.Image, index: int) -> Tensor:
        return _normalised(image.resize((EDGE, EDGE), Image.Resampling.BILINEAR, box=_box(index, image.size)))

    def ours() -> Iterator[Tensor]:
        return (augmented(batch | {"draw": batch["index"]}, data) for batch in _batches(store))

    theirs = _Transformed(root / "images", folder, same)
    _check_close(ours(), _loaded(theirs), "a crop")
    cropped = _Transformed(root / "images", folder, whole)
    sides: dict[str, Side] = {
        "store of short side 256, cropped": ours,
        "Pillow, crops of the whole image": lambda: _loaded(cropped),
    }
    return lambda: _loaded(theirs), sides


def _augmentation(root: Path) -> tuple[Side, dict[str, Side]]:
    """Pillow's side, and ours, of images that are 224 x 224 already: fp32 [B, 3, 224, 224], normalised."""
    data = ImageData(store=str(root / "squares"), img_size=EDGE)
    options, store = data.augmentation, Prepared(data).split("train")
    widths = torch.tensor([options.brightness, options.contrast, options.saturation, options.hue])

    def by_pillow(samples: list[dict[str, Any]]) -> Tensor:
        draw, made = torch.tensor([sample["index"] for sample in samples]), []
        colours = (widths * (2 * uniform(draw, (4,), stream=COLOUR) - 1)).tolist()
        for sample, turn, (*amounts, hue) in zip(samples, turned(draw, options).tolist(), colours, strict=True):
            image, (sin, cos) = Image.fromarray(sample["image"]), turn[1]
            if turn[0][0] < 0:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image = image.rotate(math.degrees(math.atan2(sin, cos)), Image.Resampling.BILINEAR)
            kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for kind, amount in zip(kinds, amounts, strict=True):
                image = kind(image).enhance(1 + amount)
            hues, *rest = image.convert("HSV").split()
            hues = hues.point([(value + round(256 * hue)) % 256 for value in range(256)])
            made.append(_normalised(Image.merge("HSV", (hues, *rest)).convert("RGB")))
        return torch.stack(made)

    def ours() -> Iterator[Tensor]:
        return (augmented(batch | {"draw": batch["index"]}, data) for batch in _batches(store))

    samples = [store[index] for index in range(len(store))]
    theirs: DataLoader[Any] = DataLoader(samples, batch_size=_BATCH, collate_fn=by_pillow)  # type: ignore[arg-type]
    _check_close(ours(), iter(theirs), "an augmented image")
    return lambda: iter(theirs), {"augmentation of a batch at once": ours}


_MEAN, _STD = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))


def _normalised(image: Image.Image) -> Tensor:
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255 - _MEAN) / _STD


def _check_close(ours: Iterator[Tensor], theirs: Iterator[Tensor], what: str) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if (difference := float(((one - other) * _STD).abs().mean() * 255)) > _CLOSE[what]:
            raise DataError(f"{what} differs from Pillow's by {difference:.2f} of 255 on average: no speed is reported")


def _box(index: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part that training would draw for `index` as its key, of an image of this width and height."""
    part = random_part(torch.tensor([index]), torch.tensor([[size[1], size[0]]]), _CROP)
    (left, upper), (right, lower) = (part.centre - part.size / 2)[0].tolist(), (part.centre + part.size / 2)[0].tolist()
    return left, upper, right, lower


class _Transformed(Dataset[Any]):
    """What people write: a file opened by Pillow, and what a function makes of it."""

    def __init__(self, root: Path, images: FolderImages, transform: Callable[[Image.Image, int], Any]) -> None:
        self._paths = [root / images.name(index) for index in range(len(images))]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self._paths[index]) as image:
            made = self._transform(image.convert("RGB"), index)
        return made if isinstance(made, Tensor) else torch.from_numpy(np.array(made))


def _loaded(dataset: _Transformed) -> Iterator[Tensor]:
    return iter(DataLoader(dataset, batch_size=_BATCH))


def _batches(images: Samples) -> Iterator[Batch]:
    places = range(len(images))
    return (collate([images[index] for index in places[start : start + _BATCH]]) for start in places[::_BATCH])


def _compare(theirs: Side, sides: dict[str, Side], images: int, rounds: int, clock: Callable[[], float]) -> int:
    """Print rates and ratios; returns how many are below LEAST."""
    every = {"DataLoader and Pillow": theirs, **sides}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(rounds):
        for name, side in every.items():
            start = clock()
            for _ in side():
                pass
            seconds[name].append(clock() - start)
    missed = 0
    for name, times in seconds.items():
        line = f"  {name:34}{images / float(np.median(times)):>9,.0f} images/s"
        if name in sides:
            ratio = ratio_of(seconds["DataLoader and Pillow"], times)
            line += f"{ratio.median:>8.2f} x ({ratio.low:.2f} ... {ratio.high:.2f})"
            if least := LEAST.get(name):
                line += f", at least {least:g} asked"
                missed += ratio.median < least
        print(line)
    return missed
