"""Evaluation of a trained image classifier on held-out images, beside simple classifiers.

    evaluate(trained, images)              the sums of trunkline.models.image_classification.metrics
    run(arguments)                         what launchers/evaluate.py calls

It writes evaluation.{md,json}, confusion.png, per_class.csv, mistakes.png and mistakes.csv.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from trunkline.engine.checkpoint.trained import warn_of_other_data
from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import made_folder, write_json
from trunkline.engine.record.tables import markdown
from trunkline.engine.task import Sums, add_sums
from trunkline.models.image_classification.baselines import baselines
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.data import Images, Source, open_source
from trunkline.models.image_classification.metrics import interval, mistakes, scores, sums_of
from trunkline.models.image_classification.shown import show_evaluation
from trunkline.models.image_classification.trained import Trained, in_batches, load_trained

_COMPARED = 10_000
"""Up to how many images the simple classifiers are fitted unless asked for: they take seconds then."""
NETWORK = "network"


def evaluate(trained: Trained, images: Images, batch_size: int = 64, title: str | None = None) -> Sums:
    """Each image once."""
    sums: Sums | None = None
    with tqdm(total=len(images), desc=title, unit="image", disable=title is None) as bar:
        for samples in in_batches(images.__getitem__, len(images), batch_size):
            logits, batch = trained.logits(samples)
            sums = add_sums(sums, sums_of(logits, batch, len(images)))
            bar.update(len(samples))
    assert sums is not None, "a split without images is refused when it is opened"
    return sums


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, write and print the table. Returns the exit status."""
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size {arguments.batch_size}: use 1 or more")
    out = made_folder(arguments.out)
    trained = load_trained(arguments.run, arguments.device)
    print(described(trained.folder))
    source = open_source(_data(trained.data, arguments.store, arguments.data_path), trained.size, trained.classes)
    if arguments.store is None and arguments.data_path is None:
        warn_of_other_data(trained.folder, source.fingerprint, f"{trained.data.store or trained.data.path}")
    if source.classes != trained.classes:
        raise DataError(_other_classes(source.classes, trained))
    split, images = _held_out(source, arguments.split)
    sums = evaluate(trained, images, arguments.batch_size, f"evaluate {split}")
    accuracies = {NETWORK: float(sums["confusion"].diagonal().sum()) / len(images)}
    notes = []
    if split == "train":
        notes.append("not compared with simple classifiers: they would be fitted on these images")
    elif arguments.baselines is not False:
        try:
            train = source.split("train")
            if arguments.baselines or len(train) + len(images) <= _COMPARED:
                accuracies |= baselines(train, images)
        except (ConfigError, DataError) as error:
            if arguments.baselines:
                raise
            notes.append(f"not compared with simple classifiers: {error}")
    show_evaluation(sums, trained.classes, images, out)
    _write_mistakes(out / "mistakes.csv", sums, images, trained.classes)
    table = render(accuracies, len(images))
    found = scores(sums, trained.classes)
    _write_report(out, trained, split, len(images), table, found, notes)
    write_json(
        out / "evaluation.json",
        {
            "weights": str(trained.folder), "split": split, "images": len(images), "metrics": found,
            "accuracy": {name: {"value": value, "interval_95": _interval(value, len(images))}
                         for name, value in accuracies.items()},
        },
    )  # fmt: skip
    print("\n".join([table, *notes]))
    print(f"wrote {out}/evaluation.md, evaluation.json, confusion.png, per_class.csv and mistakes.csv")
    return 0


def render(accuracies: Mapping[str, float], images: int) -> str:
    """A table in Markdown: the accuracy of each classifier, with its interval."""
    rows = [[f"{images:,} images", "accuracy", "95 % interval"]]
    for name, value in accuracies.items():
        low, high = _interval(value, images)
        rows.append([name, f"{100 * value:.2f} %", f"{100 * low:.2f} to {100 * high:.2f} %"])
    return markdown(rows, align="right")


def _interval(accuracy: float, images: int) -> tuple[float, float]:
    return interval(round(accuracy * images), images)


def _data(data: ImageData, store: Path | None, path: Path | None) -> ImageData:
    """The section with other images, all of them. Raises ConfigError."""
    if store is not None and path is not None:
        raise ConfigError(f"--store {store} and --data-path {path}: give one of them")
    if store is None and path is None:
        return data
    where = {"store": None if store is None else str(store), "path": None if path is None else str(path)}
    return data.model_copy(update={**where, "train_size": None, "val_size": None, "size_per_class": False})


def _held_out(source: Source, split: str | None) -> tuple[str, Images]:
    if split is not None:
        return split, source.split(split)
    try:
        return "test", source.split("test")
    except DataError:
        return "val", source.split("val")


def _other_classes(found: Sequence[str], trained: Trained) -> str:
    known = f"{', '.join(trained.classes[:10])}{', ...' if trained.classes[10:] else ''}"
    strange = sorted(set(found) - set(trained.classes))
    lacking = sorted(set(trained.classes) - set(found))
    what = f"{strange[0]!r} is not known to the network" if strange else f"{lacking[0]!r} of the network is not there"
    return (
        f"the classes of the images are not those of {trained.folder}: {what}: the folders below train/ and val/ must "
        f"have the names that it was trained on, {known}"
    )


def _write_mistakes(path: Path, sums: Sums, images: Images, classes: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "predicted", "probability", "probability_of_class"])
        for each in mistakes(sums, images.labels):
            facts = [f"{each.probability:.6f}", f"{each.of_truth:.6f}"]
            writer.writerow([images.name(each.index), classes[each.label], classes[each.predicted], *facts])


def _write_report(
    out: Path, trained: Trained, split: str, images: int, table: str, found: Mapping[str, float], notes: Sequence[str]
) -> None:
    rows = [[name, f"{value:.4f}"] for name, value in found.items() if not name.startswith("class/")]
    metrics = markdown([["metric", "value"], *rows], align="right")
    shown = ["confusion.png", *(["mistakes.png"] if (out / "mistakes.png").exists() else [])]
    parts = [
        "# Evaluation",
        f"{described(trained.folder)}. Split `{split}`: {images:,} images, each once.",
        table,
        *notes,
        "Precision, recall and F1 are weighted by the classes' images; `macro/` is the mean over classes.",
        metrics,
        "## By class",
        (out / "classes.md").read_text(encoding="utf-8").rstrip(),
        *(f"![]({name})" for name in shown),
        "`mistakes.csv` names every image that was taken for another class.",
    ]
    (out / "evaluation.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
