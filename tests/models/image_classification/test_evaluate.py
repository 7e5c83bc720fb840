"""Evaluation on held-out images: the metrics of counts, the mistakes by name, and other images than the run's."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.image_classification.image_tree import write_tree
from tests.models.image_classification.trained_run import CLASSES, EDGE, write_images, write_run
from trunkline.launchers.evaluate import main
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.data import open_source
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.evaluate import evaluate, render
from trunkline.models.image_classification.metrics import scores
from trunkline.models.image_classification.predict import predict
from trunkline.models.image_classification.trained import load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    write_run(root, write_images(root / "images"))
    return root


def test_each_image_counts_once_in_batches_of_any_size(root: Path) -> None:
    trained = load_trained(root / "run", CPU)
    images = open_source(trained.data).split("val")
    paths = [root / "images" / images.name(place) for place in range(len(images))]
    predicted = [int(np.argmax(each.probabilities)) for each in predict(trained, paths)]
    want = np.zeros((3, 3), np.int64)
    np.add.at(want, (images.labels, predicted), 1)
    for size in (1, 3, 64):
        assert evaluate(trained, images, size)["confusion"].tolist() == want.tolist()


def test_the_command_writes_metrics_mistakes_and_pictures(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(root / "run"), "--out", str(tmp_path), "--no-baselines"]) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    trained = load_trained(root / "run", CPU)
    images = open_source(trained.data).split("test")
    sums = evaluate(trained, images)
    assert (record["split"], record["images"]) == ("test", 5)
    assert record["metrics"] == pytest.approx(scores(sums, CLASSES))
    right = round(record["metrics"]["accuracy"] * 5)
    low, high = record["accuracy"]["network"]["interval_95"]
    assert 0 <= low < right / 5 < high <= 1
    with (tmp_path / "mistakes.csv").open(newline="") as file:
        mistakes = list(csv.DictReader(file))
    wrong = {
        images.name(place): row for place, row in enumerate(sums["samples"]) if int(row[0]) != images.labels[place]
    }
    assert len(wrong) == 5 - right > 0
    assert {row["path"] for row in mistakes} == set(wrong)
    for row in mistakes:
        assert row["class"] == row["path"].split("/")[1]
        assert row["predicted"] == CLASSES[int(wrong[row["path"]][0])]
        assert float(row["probability"]) > float(row["probability_of_class"])
    table = capsys.readouterr().out
    assert f"| network | {100 * right / 5:.2f} % |" in table
    report = (tmp_path / "evaluation.md").read_text()
    assert "| macro/f1_score |" in report
    assert "| newt |" in report
    for name in ("confusion.png", "mistakes.png", "per_class.csv"):
        assert (tmp_path / name).stat().st_size > 100


def test_a_folder_is_shown_to_the_network_as_the_store_was_that_it_was_trained_on(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    prepare(images, tmp_path / "store", Size(short_side=EDGE))
    run = write_run(tmp_path, images)
    best = run / "best"
    (best / "classes.json").write_text(json.dumps({"classes": list(CLASSES), "short_side": EDGE}))
    config = json.loads((best / "config.json").read_text())
    config["data"] |= {"path": None, "store": str(tmp_path / "store")}
    (best / "config.json").write_text(json.dumps(config))
    losses = {}
    for words in ([], ["--data-path", str(images)], ["--store", str(tmp_path / "store")]):
        out = tmp_path / f"out{len(losses)}"
        assert main(["--run", str(run), "--split", "val", "--no-baselines", "--out", str(out), *words]) == 0
        losses[" ".join(words)] = json.loads((out / "evaluation.json").read_text())["metrics"]["loss"]
    assert len(set(losses.values())) == 1
    square = evaluate(load_trained(run, CPU), open_source(ImageData(path=str(images), img_size=EDGE)).split("val"))
    assert float(square["loss"]) / 7 != pytest.approx(losses[""], rel=1e-3)


def test_images_that_came_since_training_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images")
    run = write_run(tmp_path, images)
    evaluate_it = ["--run", str(run), "--no-baselines"]
    assert main(evaluate_it) == 0
    assert "has changed" not in capsys.readouterr().out
    write_tree(images, ["train/cat/new.png"])
    assert main(evaluate_it) == 0
    assert f"warning: {images} has changed since {run / 'best'} was trained" in capsys.readouterr().out
    assert main([*evaluate_it, "--data-path", str(images)]) == 0
    assert "has changed" not in capsys.readouterr().out


def test_where_there_is_no_test_split_the_validation_split_is_measured(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "images", tmp_path / "images", ignore=shutil.ignore_patterns("test"))
    words = ["--run", str(root / "run"), "--data-path", str(tmp_path / "images"), "--no-baselines"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["split"] == "val"


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_folder_with_one_split_and_some_of_the_classes_is_enough(root: Path, tmp_path: Path, split: str) -> None:
    shutil.copytree(root / f"images/{split}", tmp_path / f"images/{split}")
    shutil.rmtree(tmp_path / f"images/{split}/cat")
    words = ["--run", str(root / "run"), "--data-path", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    trained = load_trained(root / "run", CPU)
    images = open_source(trained.data).split(split)
    confusion = evaluate(trained, images)["confusion"]
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (found["split"], found["images"]) == (split, int(confusion[1:].sum()))
    assert found["metrics"]["accuracy"] == pytest.approx(float(confusion.diagonal()[1:].sum() / confusion[1:].sum()))
    assert "not compared with simple classifiers" in (tmp_path / "out/evaluation.md").read_text()


def test_a_folder_without_a_split_says_what_to_give(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run", str(root / "run"), "--out", str(tmp_path / "out"), "--data-path"]
    assert main([*words, str(root / "images/test")]) == 2
    assert f"if its folders are the classes, give {root}/images, and --split test" in capsys.readouterr().err
    shutil.copytree(root / "images/test", tmp_path / "bare")
    assert main([*words, str(tmp_path / "bare")]) == 2
    assert f"if these are the classes, move them into {tmp_path}/bare/test" in capsys.readouterr().err


def test_images_of_other_classes_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "images", ["train/cat/1.png", "train/gnu/1.png", "val/cat/2.png"])
    words = ["--run", str(root / "run"), "--out", str(tmp_path)]
    assert main([*words, "--data-path", str(tmp_path / "images")]) == 2
    assert "'gnu' is not known to the network" in capsys.readouterr().err
    assert main([*words, "--data-path", str(tmp_path / "images"), "--store", str(tmp_path)]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*words, "--batch-size", "0"]) == 2
    assert "--batch-size 0: use 1 or more" in capsys.readouterr().err
    (tmp_path / "taken").write_text("")
    assert main([*words[:2], "--out", str(tmp_path / "taken")]) == 2
    assert f"--out {tmp_path}/taken: is a file: name a folder" in capsys.readouterr().err
    assert main([*words[:2], "--out", str(tmp_path / "taken/deep")]) == 2
    assert f"--out {tmp_path}/taken/deep: cannot be made (Not a directory): name a folder" in capsys.readouterr().err


def test_the_table_has_a_line_and_an_interval_for_each_classifier() -> None:
    assert render({"network": 0.5, "guessing": 0.1}, 20).splitlines()[2:] == [
        "| network | 50.00 % | 29.93 to 70.07 % |",
        "| guessing | 10.00 % | 2.79 to 30.10 % |",
    ]
