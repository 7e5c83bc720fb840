"""How an image classifier's run is shown: the FastAI-compatible trainer's names in MLflow, once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trunkline.engine.machine.files import write_json
from trunkline.engine.tracking import Tracking

PROJECT, DISTRIBUTION = "ai-classifier", "class_distribution.json"
_SCORES = ("precision", "recall", "f1_score")
_AVERAGES = {"macro/": "macro_avg", "": "weighted_avg"}


def tracking(classes: Sequence[str]) -> Tracking:
    """Its names: "valid_loss", "accuracy", ..., "best/...", at the end "evaluation/<class>/...".

    A class that has the name of a summary, such as "accuracy", is "evaluation/class/accuracy/...".
    What an evaluation measures of single classes is shown at the end alone: there may be thousands of them.
    """
    of_classes = [f"class/{name}" for name in classes]
    plain = {f"val/{name}": name for name in ("accuracy", "error_rate", *_SCORES)}
    kept_away = {f"val/{each}/{score}": None for each in of_classes for score in _SCORES}
    ends = {"accuracy": "evaluation/accuracy"}
    ends |= {
        f"{prefix}{score}": f"evaluation/{name}/{score}" for prefix, name in _AVERAGES.items() for score in _SCORES
    }
    taken = {"accuracy", *_AVERAGES.values()}
    called = {name: f"class/{name}" if name in taken else name for name in classes}
    ends |= {f"class/{name}/{score}": f"evaluation/{called[name]}/{score}" for name in classes for score in _SCORES}
    return Tracking(
        names={"train/loss": "train_loss", "train/lr": "learning_rate", "val/loss": "valid_loss", **plain, **kept_away},
        axis="epoch",
        experiment=PROJECT,
        final=ends,
        artifacts=("class_names.json", f"assets/{DISTRIBUTION}", "best", "best.pth"),
    )


def write_distribution(folder: Path, classes: Sequence[str], labels: Mapping[str, Iterable[int]]) -> None:
    """class_distribution.json: {"train": {"cat": 120, ...}, ...}, the images of each class in each split."""
    counts = {split: Counter(map(int, of_split)) for split, of_split in labels.items()}
    found = {split: {name: count[place] for place, name in enumerate(classes)} for split, count in counts.items()}
    write_json(folder / DISTRIBUTION, found)
