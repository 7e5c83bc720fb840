"""What a run shows of an evaluation, and of what training sees."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.image_classification.trained_run import small_task, write_images
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.task import Sums, add_sums
from trunkline.models.image_classification.metrics import by_class
from trunkline.models.image_classification.plots import plot_confusion, shortened
from trunkline.models.image_classification.task import ImageTask


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    root = tmp_path_factory.mktemp("shown")
    return small_task(root, write_images(root / "images"), {"augmentation": {"mixup": 0.4}})


def evaluated(task: ImageTask) -> Sums:
    model, sums = task.build_model().eval(), None
    with torch.no_grad():
        for batch in evaluation_loader(
            task, task.dataset("val"), num_samples=None, micro_batch_size=4, world_size=1, rank=0
        ):
            sums = add_sums(sums, task.evaluate(model, batch))
    assert sums is not None
    return sums


def test_an_evaluation_leaves_tables_and_pictures(task: ImageTask, tmp_path: Path) -> None:
    sums = evaluated(task)
    task.show(sums, tmp_path)
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    for name, values in by_class(sums["confusion"]).items():
        assert [float(rows[each][name]) for each in task.classes] == values.tolist()
    assert (tmp_path / "classes.md").read_text().count("\n") == 2 + 3 + 2
    for name in ("confusion.png", "mistakes.png", "augmented.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100
            assert np.asarray(image.convert("L")).std() > 5, "something is drawn"


def test_mistakes_that_were_made_no_more_leave_the_folder(task: ImageTask, tmp_path: Path) -> None:
    sums = evaluated(task)
    task.show(sums, tmp_path)
    seen = (tmp_path / "augmented.png").stat().st_mtime_ns
    labels = torch.from_numpy(task.dataset("val").labels)
    right = torch.bincount(labels, minlength=3).diag()
    perfect = torch.stack([labels.double(), torch.ones(7), torch.ones(7)], dim=1)
    task.show(sums | {"confusion": right, "samples": perfect}, tmp_path)
    assert not (tmp_path / "mistakes.png").exists()
    assert (tmp_path / "augmented.png").stat().st_mtime_ns == seen, "it is drawn once"


def test_a_matrix_of_many_classes_is_drawn(tmp_path: Path) -> None:
    confusion = np.eye(400, dtype=np.int64) * 50
    confusion[3, 390] = 20
    plot_confusion(confusion, [f"kind {place}" for place in range(400)], tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 10_000


def test_long_names_are_cut_in_the_middle() -> None:
    assert shortened("short") == "short"
    assert shortened("a very long name of a class 17") == "a very l…class 17"
