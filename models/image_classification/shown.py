"""What a person sees of an evaluation, and of what training sees.

show_evaluation(sums, classes, images, folder)    confusion.png, classes.md, per_class.csv, mistakes.png
show_augmented(images, classes, data, path)       a sheet: images as validation sees them, and as training does
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trunkline.engine.data.randomness import mix
from trunkline.engine.record.tables import markdown
from trunkline.engine.task import Batch, Sums
from trunkline.models.image_classification.augment import augmented, prepared
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.data import Images, collate
from trunkline.models.image_classification.metrics import MEASURES, by_class, mistakes, scores
from trunkline.models.image_classification.mixup import pair
from trunkline.models.image_classification.plots import Tile, plot_confusion, plot_sheet, shortened

_WORST = 32
_SEEN, _DRAWS = 8, 5


def show_evaluation(sums: Sums, classes: Sequence[str], images: Images, folder: Path) -> None:
    """Write confusion.png, classes.md, per_class.csv and, where there are mistakes, mistakes.png.

    `sums` are those of trunkline.models.image_classification.metrics over `images`.
    """
    confusion = sums["confusion"].cpu().numpy().astype(np.int64)
    plot_confusion(confusion, classes, folder / "confusion.png")
    write_classes(sums, classes, folder)
    found = mistakes(sums, images.labels)
    sheet = folder / "mistakes.png"
    tiles = [
        Tile(
            images[mistake.index]["image"],
            [
                f"is {shortened(classes[mistake.label])} ({_percent(mistake.of_truth)})",
                f"taken for {shortened(classes[mistake.predicted], 12)} ({_percent(mistake.probability)})",
            ],
            is_wrong=True,
        )
        for mistake in found[:_WORST]
    ]
    if tiles:
        shown = f"the {len(tiles)} surest of {len(found):,}" if len(found) > len(tiles) else f"all {len(found)}"
        plot_sheet(tiles, sheet, f"Mistakes, {shown}, with the network's probabilities")
    else:
        sheet.unlink(missing_ok=True)


def write_classes(sums: Sums, classes: Sequence[str], folder: Path) -> None:
    """The table of all classes, to read (classes.md) and to compute with (per_class.csv)."""
    of_class = by_class(sums["confusion"])
    header = ["class", *MEASURES, "support"]
    rows = [
        [name, *(float(of_class[measure][place]) for measure in MEASURES), int(of_class["support"][place])]
        for place, name in enumerate(classes)
    ]
    with (folder / "per_class.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    found = scores(sums, classes)
    images = int(of_class["support"].sum())
    means = [
        ["macro mean", *(found[f"macro/{measure}"] for measure in MEASURES), images],
        ["weighted mean", *(found[measure] for measure in MEASURES), images],
    ]
    lines = [[str(row[0]), *(f"{value:.4f}" for value in row[1:-1]), f"{row[-1]:,}"] for row in [*rows, *means]]
    (folder / "classes.md").write_text(markdown([header, *lines], align="right") + "\n", encoding="utf-8")


def show_augmented(images: Images, classes: Sequence[str], data: ImageData, path: Path) -> None:
    """A column for each of a few images: as validation sees it, then as training does, drawn several times."""
    chosen = sorted({int(index) for index in np.linspace(0, len(images) - 1, _SEEN)})
    samples = [images[index] for index in chosen]
    seen = [_seen(collate(samples), data, None)]
    seen += [_seen(collate(samples), data, number) for number in range(_DRAWS)]
    tiles = [
        Tile(image, [shortened(classes[sample["label"]])] if row == 0 else [])
        for row, images_of_row in enumerate(seen)
        for image, sample in zip(images_of_row, samples, strict=True)
    ]
    plot_sheet(tiles, path, "Training images: as validation sees them, below as training does", columns=len(chosen))


def _seen(batch: Batch, data: ImageData, number: int | None) -> np.ndarray:
    """[B, S, S, 3] in 0 ... 1: what the network sees in one draw, or in none."""
    count = len(batch["label"])
    if number is None:
        pixels = prepared(batch, data)
    else:
        batch["draw"] = torch.tensor([mix(number, place) for place in range(count)])
        batch["valid"] = torch.ones(count, dtype=torch.bool)
        pixels = augmented(batch, data)
        pairing = pair(batch, data.augmentation.mixup)
        pixels = pairing.mix(pixels) if pairing else pixels
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (data.mean, data.std))
    return (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.9995 else "100 %"
