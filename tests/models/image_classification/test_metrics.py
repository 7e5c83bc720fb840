"""Metrics: scikit-learn's, on any number of ranks, with classes that the truth or the predictions lack."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed import run_distributed_test
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.data.randomness import mix, normal
from trunkline.engine.evaluation import evaluate
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.task import Batch, Sums, Task, add_sums
from trunkline.models.image_classification.metrics import (
    NAMED_CLASSES,
    by_class,
    direction,
    interval,
    mistakes,
    scores,
    sums_of,
)

CLASSES = ("a", "b", "c", "never true", "never predicted", "neither", "d", "e")
SIZES = (1, 7, 1001)
CPU = torch.device("cpu")


class Logits:
    """Sample i: fixed logits and a label, drawn by i."""

    def __init__(self, count: int) -> None:
        keys = torch.tensor([mix(9, place) for place in range(count)])
        labels = torch.tensor([(0, 1, 2, 4, 6, 7)[mix(8, place) % 6] for place in range(count)])
        self.logits = normal(keys, (len(CLASSES),)) + 1.5 * nn.functional.one_hot(labels, len(CLASSES))
        self.logits[:, 4:6] = -9.0
        self.labels = labels.numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"logits": self.logits[index], "label": int(self.labels[index]), "index": index}


class LogitsTask(Task):
    """Measures what the samples say that a network has said."""

    def __init__(self, count: int) -> None:
        self.samples = Logits(count)

    def build_model(self) -> nn.Module:
        return nn.Identity()

    def dataset(self, split: str) -> Logits:
        return self.samples

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        return sums_of(batch["logits"], batch, len(self.samples))

    def summarize(self, sums: Sums) -> dict[str, float]:
        return scores(sums, CLASSES)

    def fingerprint(self) -> str:
        return "logits"


def sums_over(count: int, world_size: int) -> Sums:
    """What ranks of such a world sum up, each over its batches of four."""
    task, total = LogitsTask(count), None
    for rank in range(world_size):
        loader = evaluation_loader(
            task, task.samples, num_samples=None, micro_batch_size=4, world_size=world_size, rank=rank
        )
        for batch in loader:
            total = add_sums(total, task.evaluate(nn.Identity(), batch))
    assert total is not None
    return total


def by_hand(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """The metrics of counts, as fractions of whole numbers."""
    found: dict[str, Fraction] = {}
    pairs, count = list(zip(labels, predicted, strict=True)), len(labels)
    found["accuracy"] = Fraction(sum(true == said for true, said in pairs), count)
    found["error_rate"] = 1 - found["accuracy"]
    present = set(labels) | set(predicted)
    for place, name in enumerate(CLASSES):
        right = sum(true == said == place for true, said in pairs)
        said_so, true_so = sum(said == place for said in predicted), sum(true == place for true in labels)
        found[f"class/{name}/precision"] = Fraction(right, said_so) if said_so else Fraction(0)
        found[f"class/{name}/recall"] = Fraction(right, true_so) if true_so else Fraction(0)
        found[f"class/{name}/f1_score"] = Fraction(2 * right, said_so + true_so) if said_so + true_so else Fraction(0)
        found[f"class/{name}/support"] = Fraction(true_so)
    for measure in ("precision", "recall", "f1_score"):
        values = [found[f"class/{name}/{measure}"] for name in CLASSES]
        found[measure] = sum((v * labels.count(p) for p, v in enumerate(values)), Fraction(0)) / count
        found[f"macro/{measure}"] = sum((values[p] for p in present), Fraction(0)) / len(present)
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", SIZES)
def test_metrics_are_exact_on_any_number_of_ranks(count: int, world_size: int) -> None:
    samples = Logits(count)
    predicted = samples.logits.argmax(dim=1)
    found = scores(sums_over(count, world_size), CLASSES)
    losses = nn.functional.cross_entropy(samples.logits.double(), torch.from_numpy(samples.labels), reduction="none")
    rank_of_true = (samples.logits > samples.logits.gather(1, torch.from_numpy(samples.labels)[:, None])).sum(dim=1)
    assert found.pop("loss") == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.pop("top5") == float((rank_of_true < 5).double().mean())
    assert found == pytest.approx(by_hand(samples.labels.tolist(), predicted.tolist()), rel=0, abs=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", SIZES)
def test_metrics_are_scikit_learn_s(count: int, world_size: int) -> None:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    samples = Logits(count)
    predicted = samples.logits.argmax(dim=1).numpy()
    found = scores(sums_over(count, world_size), CLASSES)
    want = {"accuracy": accuracy_score(samples.labels, predicted)}
    names = ("precision", "recall", "f1_score", "support")
    for average, prefix in (("weighted", ""), ("macro", "macro/")):
        values = precision_recall_fscore_support(samples.labels, predicted, average=average, zero_division=0)
        want |= {f"{prefix}{name}": value for name, value in zip(names[:3], values[:3], strict=True)}
    every = precision_recall_fscore_support(
        samples.labels, predicted, labels=range(len(CLASSES)), average=None, zero_division=0
    )
    for place, name in enumerate(CLASSES):
        values = {f"class/{name}/{measure}": of[place] for measure, of in zip(names, every, strict=True)}
        want |= values
    assert {name: found[name] for name in want} == pytest.approx(want, rel=0, abs=1e-12)


def evaluated(rank: int, world_size: int) -> list[dict[str, float]]:
    ranks = Ranks(rank, world_size, rank, CPU)
    return [
        evaluate(LogitsTask(count), nn.Identity(), ranks, num_samples=None, micro_batch_size=4, progress=False)
        for count in SIZES
    ]


@pytest.mark.distributed
def test_three_processes_measure_what_one_does() -> None:
    alone = evaluated(0, 1)
    for metrics in run_distributed_test(evaluated, 3):
        for found, want in zip(metrics, alone, strict=True):
            assert found == pytest.approx(want, rel=1e-12)


def test_mistakes_are_found_wherever_their_samples_were_evaluated() -> None:
    samples = Logits(1001)
    probability, predicted = samples.logits.softmax(dim=1).max(dim=1)
    wrong = np.flatnonzero(predicted.numpy() != samples.labels)
    for world_size in (1, 3):
        found = mistakes(sums_over(1001, world_size), samples.labels)
        assert sorted(each.index for each in found) == wrong.tolist()
        assert [each.probability for each in found] == sorted((each.probability for each in found), reverse=True)
        for each in found:
            assert each.label == samples.labels[each.index]
            assert each.predicted == predicted[each.index]
            assert each.probability == pytest.approx(float(probability[each.index]), rel=1e-5)
            of_truth = samples.logits[each.index].softmax(dim=0)[each.label]
            assert each.of_truth == pytest.approx(float(of_truth), rel=1e-5)


def test_a_sample_that_was_not_evaluated_is_no_mistake() -> None:
    batch = {"label": torch.tensor([1, 1]), "index": torch.tensor([2, 0]), "valid": torch.tensor([True, False])}
    sums = add_sums(None, sums_of(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), batch, 4))
    assert [each.index for each in mistakes(sums, np.array([1, 1, 1, 1]))] == [2]
    assert sums["confusion"].tolist() == [[0, 0], [1, 0]], "rows are the true classes"


def test_what_a_batch_sums_does_not_grow_with_the_split() -> None:
    batch = {"label": torch.tensor([0, 1]), "index": torch.tensor([5, 1 << 40]), "valid": torch.tensor([True, True])}
    found = sums_of(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), batch, 1 << 41)["samples"]
    assert found.shape == (1 << 41, 3)
    assert found.is_sparse


def test_each_metric_has_its_direction() -> None:
    found = scores(sums_over(7, 1), CLASSES)
    better_low, neither = {"error_rate"}, {f"class/{name}/support" for name in CLASSES}
    for name in found.keys() - {"loss"}:
        assert direction(name) == ("min" if name in better_low else None if name in neither else "max"), name


def test_of_many_classes_the_log_has_only_means() -> None:
    count = NAMED_CLASSES + 1
    sums = {"loss": torch.tensor(1.0), "top5": torch.tensor(3), "confusion": torch.eye(count, dtype=torch.int64)}
    assert not [name for name in scores(sums, [str(place) for place in range(count)]) if name.startswith("class/")]
    assert by_class(sums["confusion"])["f1_score"].tolist() == [1.0] * count


@pytest.mark.parametrize(("right", "images", "want"), [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605))])
def test_the_interval_is_wilson_s(right: int, images: int, want: tuple[float, float]) -> None:
    """The examples of Newcombe, "Two-sided confidence intervals for the single proportion", 1998, method 3."""
    assert interval(right, images) == pytest.approx(want, abs=6e-5)


def test_an_interval_stays_within_0_and_1() -> None:
    """His 0 of 20 and 1 of 29."""
    assert interval(0, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=6e-5)
    assert interval(20, 20)[1] == 1.0
