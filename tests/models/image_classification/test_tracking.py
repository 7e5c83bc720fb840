"""What a run shows under the FastAI-compatible trainer's names: once an epoch, and what it hands over at its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import find_free_port
from tests.engine.record.test_boards import keep_in_files
from tests.models.image_classification.small_images import CLASSES, EDGE, asked, train, write_images
from trunkline.engine.record.trackers import make_trackers
from trunkline.models.image_classification.tracking import tracking

SCORES = {"loss": 0.5, "accuracy": 0.75, "error_rate": 0.25, "top5": 1.0, "precision": 0.7, "recall": 0.6,
          "f1_score": 0.65, "macro/precision": 0.4, "macro/recall": 0.3, "macro/f1_score": 0.35}  # fmt: skip
OF_CLASSES = {f"class/{name}/{score}": 0.1 for name in CLASSES for score in ("precision", "recall", "f1_score")}
EPOCHS = 3


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_every_metric_has_the_name_that_the_original_gives_it(tmp_path: Path) -> None:
    trackers = make_trackers(["tensorboard"], tmp_path, {}, tracking=tracking(CLASSES), steps_per_epoch=4)
    trackers.log(4, "train", {"loss": 2.0, "lr": 0.1, "grad_norm": 3.0})
    trackers.log(4, "val", SCORES | OF_CLASSES)
    trackers.best(4, SCORES | OF_CLASSES)
    trackers.finish(4)
    trackers.close()
    shown = scalars(tmp_path)
    plain = {"valid_loss", "accuracy", "error_rate", "precision", "recall", "f1_score"}
    measures = ("precision", "recall", "f1_score")
    ends = {f"evaluation/{name}/{score}" for name in (*CLASSES, "macro_avg", "weighted_avg") for score in measures}
    others = {"val/top5", "best/top5", "train/grad_norm"}
    others |= {f"{split}/macro/{score}" for split in ("val", "best") for score in measures}
    assert set(shown) == {
        "train_loss", "learning_rate", *plain, *(f"best/{name}" for name in plain), "best/epoch", "evaluation/accuracy",
        *ends, *others,
    }  # fmt: skip
    assert all(set(points) == {0} for points in shown.values())
    for tag, value in {"valid_loss": 0.5, "evaluation/macro_avg/recall": 0.3, "evaluation/weighted_avg/recall": 0.6,
                       "evaluation/cat/f1_score": 0.1, "best/accuracy": 0.75}.items():  # fmt: skip
        assert shown[tag] == {0: pytest.approx(value)}


def test_a_class_with_the_name_of_a_summary_is_shown_beside_it() -> None:
    names = tracking(["accuracy", "cat", "macro_avg", "weighted_avg"]).final
    assert len(set(names.values())) == len(names)
    assert names["macro/recall"] == "evaluation/macro_avg/recall"
    assert names["class/macro_avg/recall"] == "evaluation/class/macro_avg/recall"
    assert names["class/cat/recall"] == "evaluation/cat/recall"
    # what holds values in a folder of files is no value itself
    assert not {str(Path(name).parent) for name in names.values()} & set(names.values())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def words_for(images: Path, *words: str) -> list[str]:
    return ["--data_path", str(images), "--img_size", str(EDGE), "--batch_size", "4", "--grad_acc", "-1",
            "--epochs", str(EPOCHS), "--optimizer", "SGD", *words]  # fmt: skip


def rows_by_epoch(run: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The lines of metrics.jsonl, which has steps: three of them an epoch."""
    found: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "val": {}}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["step"] % 3 == 0
        if row["split"] != "resumed":
            found[row["split"]][row["step"] // 3 - 1] = row
    return found


def expected(run: Path) -> dict[str, dict[int, float]]:
    """What is to be shown of a run, from its own record."""
    rows = rows_by_epoch(run)
    assert list(rows["train"]) == list(rows["val"]) == [0, 1, 2]
    values = {
        "train_loss": {epoch: row["loss"] for epoch, row in rows["train"].items()},
        "learning_rate": {epoch: row["lr"] for epoch, row in rows["train"].items()},
        "valid_loss": {epoch: row["loss"] for epoch, row in rows["val"].items()},
        "accuracy": {epoch: row["accuracy"] for epoch, row in rows["val"].items()},
    }
    losses = values["valid_loss"]
    bests = [epoch for epoch in losses if losses[epoch] == min(list(losses.values())[: epoch + 1])]
    values["best/epoch"] = {epoch: float(epoch) for epoch in bests}
    values["best/valid_loss"] = {epoch: losses[epoch] for epoch in bests}
    values["evaluation/accuracy"] = {2: values["accuracy"][bests[-1]]}
    return values


def test_a_run_shows_each_epoch_once_from_0_on(images: Path, tmp_path: Path) -> None:
    config = asked(*words_for(images, "--disable_mlflow"))[1]
    train(config, tmp_path / "run")
    shown, wanted = scalars(tmp_path / "run"), expected(tmp_path / "run")
    for tag, points in wanted.items():
        assert shown[tag] == pytest.approx(points), tag
    assert list(shown["learning_rate"].values()) == pytest.approx([0.001, 0.004, 0.007])
    assert json.loads((tmp_path / "run/assets/class_distribution.json").read_text()) == {
        "train": dict.fromkeys(CLASSES, 4), "val": dict.fromkeys(CLASSES, 2)}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback, with a database of SQLite."""
    pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    pytest.importorskip("flask", reason="a server is in all of MLflow only: pip install mlflow")
    folder, port = tmp_path_factory.mktemp("server"), find_free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
               "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
               "--workers", "1"]  # fmt: skip
    with (folder / "server.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, (folder / "server.txt").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_a_store_of_files_holds_every_class_under_a_name_of_its_own_and_the_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny of the extra 'test' is not installed")
    keep_in_files(tmp_path, monkeypatch)
    classes = ["a&b", "a_b", "accuracy", "macro_avg"]
    of_class = {f"class/{name}/recall": place / 8 for place, name in enumerate(classes)}
    (tmp_path / "run/best").mkdir(parents=True)
    for name in ("class_names.json", "best/model.safetensors", "best.pth"):
        (tmp_path / "run" / name).write_text(name)
    trackers = make_trackers(["mlflow"], tmp_path / "run", {}, tracking=tracking(classes), steps_per_epoch=4)
    trackers.log(4, "val", SCORES | of_class)
    trackers.best(4, SCORES | of_class)
    trackers.finish(4)
    trackers.close()
    (run,) = mlflow.search_runs(experiment_names=["ai-classifier"], output_format="list")
    ends = {name: value for name, value in run.data.metrics.items() if name.startswith("evaluation/")}
    (marked,) = ends.keys() - {
        "evaluation/a_b/recall", "evaluation/class/accuracy/recall", "evaluation/class/macro_avg/recall",
        "evaluation/accuracy",
        *(f"evaluation/{each}_avg/{score}" for each in ("macro", "weighted") for score in
          ("precision", "recall", "f1_score")),
    }  # fmt: skip
    assert marked.startswith("evaluation/a_b-")
    assert (ends[marked], ends["evaluation/a_b/recall"], ends["evaluation/macro_avg/recall"]) == (0, 1 / 8, 0.3)
    assert ends["evaluation/class/macro_avg/recall"] == 3 / 8
    (tmp_path / "held").mkdir()
    held = Path(mlflow.MlflowClient().download_artifacts(run.info.run_id, "", str(tmp_path / "held")))
    names = {path.relative_to(held).as_posix() for path in held.rglob("*") if path.is_file()}
    assert names == {"class_names.json", "best/model.safetensors", "best.pth"}


@pytest.mark.slow
@pytest.mark.parametrize("skips_upload", [False, True])
def test_a_real_server_holds_names_epochs_and_artifacts(
    images: Path, tmp_path: Path, server: str, skips_upload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/elsewhere.db")  # the flag wins
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    project = f"shop-{skips_upload}"
    words = ["--mlflow_tracking_uri", server, "--project_name", project, "--task_name", "first"]
    words += ["--skip_mlflow_model_upload"] if skips_upload else []
    for epochs in (2, EPOCHS):  # the second is a resume of the first, which is the same run there
        config = asked(*words_for(images, *words), "--epochs", str(epochs))[1]
        train(config, tmp_path / "run")
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(project)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["deepspeed.optimizer.type"] == "SGD"
    for tag, points in expected(tmp_path / "run").items():
        found = {point.step: point.value for point in client.get_metric_history(run.info.run_id, tag)}
        if tag == "evaluation/accuracy":  # of the end after two epochs too
            first = min(list(rows_by_epoch(tmp_path / "run")["val"].values())[:2], key=lambda row: row["loss"])
            assert found.pop(1) == pytest.approx(first["accuracy"])
        assert found == pytest.approx(points), tag
    held = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    names = {path.relative_to(held).as_posix() for path in held.rglob("*") if path.is_file()}
    assert {"class_names.json", "assets/class_distribution.json"} <= names
    weights = {"best/model.safetensors", "best/config.json", "best.pth"}
    assert weights & names == (set() if skips_upload else weights)
