"""Metrics of a classifier, from sums that add up over batches and ranks.

    sums = sums_of(logits, batch, num_samples)      loss, top5, confusion [C, C], samples [N, 3]
    by_class(confusion)                             precision, recall, F1 and support of each class
    scores(sums, classes)                           every metric by name
    mistakes(sums, labels)                          the samples that were taken for another class, the surest first

Precision, recall and F1 of a class without predictions, or without images, are 0. "precision", "recall" and "f1_score"
are weighted by the classes' images; "macro/..." are means over the classes that occur in the truth or the predictions.
So scikit-learn has them, with zero_division=0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trunkline.engine.task import Batch, Sums

MEASURES = ("precision", "recall", "f1_score")
NAMED_CLASSES = 100
"""Of more classes than these each one's metrics stand in files alone: a run's log would be nothing else."""

Array = NDArray[np.float64]


def sums_of(logits: Tensor, batch: Batch, num_samples: int) -> Sums:
    """Additive statistics of logits [B, C].

    loss: cross entropy, summed; top5: images whose class is among the five likeliest, counted
    confusion: int64 [C, C], rows the true classes, columns the predicted ones
    samples: fp32 [num_samples, 3], sparse, at batch["index"]: predicted class, its probability, that of the true class
    """
    labels, valid, count = batch["label"], batch["valid"], logits.shape[1]
    log_p = F.log_softmax(logits.float(), dim=1)
    likeliest = log_p.topk(min(5, count)).indices
    predicted = likeliest[:, 0]
    of_true, of_predicted = (log_p.gather(1, each[:, None])[:, 0] for each in (labels, predicted))
    confusion = torch.zeros(count * count, dtype=torch.int64, device=logits.device)
    confusion.index_add_(0, labels * count + predicted, valid.to(torch.int64))
    facts = torch.stack([predicted.to(torch.float32), of_predicted.exp(), of_true.exp()], dim=1)
    return {
        "loss": -of_true.where(valid, 0.0).sum(),
        "top5": ((likeliest == labels[:, None]).any(dim=1) & valid).sum(),
        "confusion": confusion.view(count, count),
        "samples": torch.sparse_coo_tensor(
            batch["index"][None], facts.where(valid[:, None], 0.0), (num_samples, 3), check_invariants=False
        ),
    }


def by_class(confusion: Tensor) -> dict[str, Array]:
    """ "precision", "recall", "f1_score", "support", each fp64 [C]."""
    counts = confusion.cpu().numpy().astype(np.float64)
    right, images, predictions = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return {
        "precision": _ratio(right, predictions),
        "recall": _ratio(right, images),
        "f1_score": _ratio(2 * right, images + predictions),
        "support": images,
    }


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def scores(sums: Sums, classes: Sequence[str]) -> dict[str, float]:
    """ "loss", "accuracy", "error_rate", "top5", the measures, "macro/<measure>" and "class/<class>/<measure>"."""
    confusion = sums["confusion"]
    of_class = by_class(confusion)
    support = of_class["support"]
    images, right = support.sum(), float(confusion.diagonal().sum())
    occurs = support + confusion.sum(dim=0).cpu().numpy() > 0
    found = {
        "loss": float(sums["loss"]) / images,
        "accuracy": right / images,
        "error_rate": (images - right) / images,
        "top5": float(sums["top5"]) / images,
        **{name: (of_class[name] * support).sum() / images for name in MEASURES},
        **{f"macro/{name}": of_class[name][occurs].mean() for name in MEASURES},
    }
    if len(classes) <= NAMED_CLASSES:
        found |= {
            f"class/{name}/{measure}": values[place]
            for place, name in enumerate(classes)
            for measure, values in of_class.items()
        }
    return {name: float(value) for name, value in found.items()}


def direction(metric: str) -> Literal["min", "max"] | None:
    """Errors are better low and the others high. How many images a class has is neither."""
    name = metric.rpartition("/")[2]
    if name == "error_rate":
        return "min"
    return "max" if name in ("accuracy", "top5", *MEASURES) else None


@dataclass(frozen=True)
class Mistake:
    """A sample that was taken for another class. Classes are places in their list."""

    index: int
    label: int
    predicted: int
    probability: float
    of_truth: float
    """The probability of the true class."""


def mistakes(sums: Sums, labels: NDArray[np.int64]) -> list[Mistake]:
    """Of a split with these labels [N], the surest first. Samples that were not evaluated are none."""
    predicted, probability, of_truth = sums["samples"].double().cpu().numpy().T
    wrong = np.flatnonzero((predicted != labels) & (probability > 0))
    return [
        Mistake(int(i), int(labels[i]), int(predicted[i]), float(probability[i]), float(of_truth[i]))
        for i in wrong[np.argsort(-probability[wrong], kind="stable")]
    ]


def interval(right: int, images: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson."""
    z, share = 1.959963984540054, right / images
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * (share * (1 - share) / images + z * z / (4 * images**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
