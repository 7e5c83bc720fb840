"""TensorBoard, Weights & Biases and MLflow: what a run and its task show on each of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.errors import ConfigError
from trunkline.engine.plan import make_plan
from trunkline.engine.plan_text import render_summary
from trunkline.engine.ranks.distributed import start
from trunkline.engine.record.boards import ShownRun, unused_settings, written_apart
from trunkline.engine.record.metrics_file import read_metrics
from trunkline.engine.record.trackers import make_trackers
from trunkline.engine.task import Sums
from trunkline.engine.tracking import Tracking
from trunkline.engine.trainer import Trainer


def _scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_holds_the_values_and_hides_those_after_the_step_resumed_from(tmp_path: Path) -> None:
    first = make_trackers(["tensorboard"], tmp_path, {})
    for step in range(1, 6):
        first.log(step, "train", {"loss": float(step)})
    first.close()
    second = make_trackers(["tensorboard"], tmp_path, {}, resume_step=3)
    second.log(4, "train", {"loss": 40.0})
    second.close()
    assert _scalars(tmp_path / "tensorboard", "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}


def test_only_the_main_rank_tracks(tmp_path: Path) -> None:
    trackers = make_trackers(["tensorboard"], tmp_path, {}, is_main=False)
    trackers.log(1, "train", {"loss": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_an_error_at_the_start_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ConfigError, match=rf"training\.trackers: '{name}' cannot be imported .*pip install .*{name}"):
        make_trackers([name], tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way of the folder")
    trackers = make_trackers(["tensorboard"], tmp_path, {})
    trackers.log(1, "train", {"loss": 1.0})
    trackers.close()
    assert "warning: tensorboard fails" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_weights_and_biases_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = make_trackers(["wandb"], tmp_path, {"workload": "tiny"})
    trackers.log(1, "train", {"loss": 1.0})
    assert [tracker.name for tracker in trackers.active] == ["metrics.jsonl", "wandb"]
    trackers.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def keep_in_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's store of files: quick, and mlflow-skinny, which has no database, is enough."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(folder / "mlflow"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it prefers a database
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def test_mlflow_continues_its_run_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    keep_in_files(tmp_path, monkeypatch)
    config = {"workload": "tiny", "training": {f"setting_{number}": number for number in range(150)}}
    for resume_step in (0, 1):
        trackers = make_trackers(["mlflow"], tmp_path, config, resume_step)
        trackers.log(resume_step + 1, "train", {"loss": 1.0 + resume_step})
        assert [tracker.name for tracker in trackers.active] == ["metrics.jsonl", "mlflow"]
        trackers.close()
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.params["training.setting_149"] == "149"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)]


def test_what_mlflow_would_write_alike_keeps_names_of_its_own() -> None:
    names = ["evaluation/T&E/recall", "evaluation/T_E/recall", "evaluation/T+E/recall", "evaluation/a%/recall"]
    written = written_apart(names)
    assert (written[names[1]], written[names[3]]) == (names[1], "evaluation/a_/recall")
    assert all(re.fullmatch(r"evaluation/T_E-[0-9a-f]{6}/recall", written[name]) for name in (names[0], names[2]))
    assert len(set(written.values())) == 4
    assert written_apart(names[::-1]) == written


def test_a_name_that_begins_with_another_is_no_file_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    keep_in_files(tmp_path, monkeypatch)
    trackers = make_trackers(["mlflow"], tmp_path, {"workload": "tiny"}, 0)
    trackers.log(1, "val", {"mse": 1.0, "mse/B": 2.0, "mse/B/MPa": 3.0, "cat/recall": 4.0})
    trackers.close()
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    shown = {"val/mse": 1.0, "val/mse.B": 2.0, "val/mse.B.MPa": 3.0, "val/cat/recall": 4.0}
    assert {name: run.data.metrics.get(name) for name in shown} == shown


CLASSIFIER = Tracking(
    names={"train/loss": "train_loss", "train/lr": "learning_rate", "train/grad_norm": None, "val/loss": "valid_loss",
           "val/accuracy": "accuracy", "val/cat recall": None},
    axis="epoch", experiment="ai-classifier", run="first try",
    final={"accuracy": "evaluation/accuracy", "cat recall": "evaluation/cat/recall"},
    artifacts=("assets/classes.json", "best", "not there"),
)  # fmt: skip


def write_evaluation(folder: Path, shade: float) -> None:
    (folder / "shown").mkdir(parents=True, exist_ok=True)
    imsave(folder / "shown/confusion.png", np.full((4, 6, 3), shade))
    (folder / "shown/samples.txt").write_text("one two")


def classify(folder: Path, tracker: str) -> None:
    """Three epochs of two steps each, of which the second is the best, broken off after it."""
    for folder_of_run in ("assets", "best"):
        (folder / folder_of_run).mkdir(parents=True)
    (folder / "assets/classes.json").write_text('["cat", "dog"]')
    (folder / "best/model.safetensors").write_bytes(b"weights")
    for first, last in ((1, 2), (3, 3)):
        trackers = make_trackers(
            [tracker], folder, {"workload": "tiny"}, 2 * first - 2, tracking=CLASSIFIER, steps_per_epoch=2
        )  # fmt: skip
        for epoch in range(first, last + 1):
            trackers.log(2 * epoch, "train", {"loss": 1 / epoch, "lr": 0.1, "grad_norm": 1.0})
            metrics = {"loss": 0.5, "accuracy": [0.0, 0.5, 0.75, 0.25][epoch], "cat recall": epoch / 4, "T&E": 1.0}
            trackers.log(2 * epoch, "val", metrics)
            write_evaluation(folder, epoch / 4)
            trackers.keep(2 * epoch, folder / "shown")
            if epoch < 3:
                trackers.best(2 * epoch, metrics)
        if last == 3:
            trackers.finish(4)
        trackers.close()


SHOWN_BY_EPOCH = {
    "train_loss": {0: 1.0, 1: 0.5, 2: 1 / 3},
    "learning_rate": {0: 0.1, 1: 0.1, 2: 0.1},
    "valid_loss": {0: 0.5, 1: 0.5, 2: 0.5},
    "accuracy": {0: 0.5, 1: 0.75, 2: 0.25},
    "best/accuracy": {0: 0.5, 1: 0.75},
    "best/valid_loss": {0: 0.5, 1: 0.5},
    "best/epoch": {0: 0.0, 1: 1.0},
    "evaluation/accuracy": {2: 0.75},
    "evaluation/cat/recall": {2: 0.5},
}


def test_tensorboard_shows_what_the_task_says_by_its_names_over_epochs(tmp_path: Path) -> None:
    classify(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {*SHOWN_BY_EPOCH, "val/T&E", "best/T&E"}
    for tag, values in SHOWN_BY_EPOCH.items():
        assert _scalars(tmp_path / "tensorboard", tag) == pytest.approx(values)
    pictures = events.Images("shown/confusion.png")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(0, 6, 4), (1, 6, 4), (2, 6, 4)]
    (text, *_) = events.Tensors("shown/samples.txt/text_summary")
    assert b"one two" in text.tensor_proto.string_val[0]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [
        (s, split) for s in (2, 4, 6) for split in ("train", "val")
    ]
    assert rows[0].keys() == {"step", "split", "loss", "lr", "grad_norm"}  # the run's own record


def test_mlflow_shows_what_the_task_says_and_holds_the_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    keep_in_files(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts by default
    classify(tmp_path / "run", "mlflow")
    (run,) = mlflow.search_runs(experiment_names=["ai-classifier"], output_format="list")
    assert run.info.run_name == "first try"
    assert set(run.data.metrics) == {*SHOWN_BY_EPOCH, "val/T_E", "best/T_E"}
    client = mlflow.MlflowClient()
    for tag, values in SHOWN_BY_EPOCH.items():
        assert {point.step: point.value for point in client.get_metric_history(run.info.run_id, tag)} == values
    held = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert (held / "assets/classes.json").read_text() == '["cat", "dog"]'
    assert (held / "best/model.safetensors").read_bytes() == b"weights"
    assert (held / "shown/confusion.png").read_bytes() == (tmp_path / "run/shown/confusion.png").read_bytes()


def test_environment_variables_win_over_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    keep_in_files(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "second try")
    make_trackers(["mlflow"], tmp_path / "run", {}, tracking=CLASSIFIER).close()
    (run,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert run.info.run_name == "second try"


class ShowingTask(TinyTask):
    """Draws its sums."""

    tracking = Tracking(
        names={"val/loss": "valid_loss"}, final={"loss": "evaluation/loss"}, artifacts=("final/note.txt",)
    )
    fails = False

    def show(self, sums: Sums, folder: Path) -> None:
        if self.fails:
            raise RuntimeError("no pen")
        (folder / "count.txt").write_text(f"{int(sums['samples'])} samples")


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_hands_over_what_its_task_shows_and_does_not_end_for_it(
    tmp_path: Path, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, training={"trackers": ["tensorboard"]})
    task = ShowingTask(config.data, config.model)
    task.fails = fails
    assert Trainer(task, config, start(), tmp_path / "run").run().step == 12
    losses = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["split"] == "val"}
    assert list(losses) == [5, 10, 12]
    folder = tmp_path / "run/tensorboard"
    assert _scalars(folder, "valid_loss") == pytest.approx(losses)
    assert _scalars(folder, "evaluation/loss") == pytest.approx({12: min(losses.values())})
    assert _scalars(folder, "best/valid_loss").keys() <= losses.keys()
    events = EventAccumulator(str(folder))
    events.Reload()
    texts = {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    assert texts == {"final/note.txt"} | (set() if fails else {"shown/count.txt"})
    if fails:
        assert "shown: is not whole (RuntimeError: no pen)" in capsys.readouterr().out
    else:
        assert (tmp_path / "run/shown/count.txt").read_text() == "11 samples"


def test_files_that_a_tracker_cannot_show_do_not_stand_in_the_way_of_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "torn.png").write_bytes(b"no picture")
    trackers = make_trackers(["tensorboard"], tmp_path, {"workload": "tiny"}, 0)
    trackers.keep(1, shown)
    (shown / "torn.png").unlink()
    imsave(shown / "grey.png", np.full((4, 6), 0.5), cmap="gray")
    (shown / "long.txt").write_bytes(bytes(3 << 20))
    trackers.keep(2, shown)
    trackers.log(2, "val", {"loss": 0.5})
    trackers.close()
    assert "cannot take the keep of step 1" in capsys.readouterr().out
    assert _scalars(tmp_path / "tensorboard", "val/loss") == {2: 0.5}


def test_the_configuration_wins_over_the_environment_and_that_over_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(tracked: dict[str, str], tracking: Tracking) -> tuple[str, str]:
        run = ShownRun(tmp_path / "folder", {"training": {"tracked": tracked}}, tracking, 0, resumed=False)
        return run.called("experiment", "MLFLOW_EXPERIMENT_NAME", "otherwise"), run.name("MLFLOW_RUN_NAME")

    asked = {"experiment": "asked", "run": "asked run"}
    assert called({}, Tracking()) == ("otherwise", "folder")
    assert called({}, CLASSIFIER) == ("ai-classifier", "first try")
    assert called(asked, CLASSIFIER) == ("asked", "asked run")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "my run")
    assert called({}, CLASSIFIER) == ("mine", "my run")
    assert called(asked, CLASSIFIER) == ("asked", "asked run")


def test_files_that_are_to_stay_are_not_handed_over(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    config = {"training": {"tracked": {"leave_out": ["b.txt"]}}}
    trackers = make_trackers(["tensorboard"], tmp_path, config, tracking=Tracking(artifacts=("a.txt", "b.txt")))
    trackers.finish(1)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["tensors"] == ["a.txt/text_summary"]


def test_a_setting_of_a_program_that_does_not_show_the_run_is_said_to_be_left_out(tmp_path: Path) -> None:
    tracked = {"experiment": "shop", "uri": "sqlite:///x.db", "run": "first"}
    for trackers, unused in (([], ["experiment", "uri"]), (["wandb"], ["uri"]), (["tensorboard", "mlflow"], [])):
        config = tiny_config(tmp_path, training={"tracked": tracked, "trackers": trackers})
        lines = unused_settings(config, Tracking())
        assert [line.partition(" = ")[0] for line in lines] == [f"training.tracked.{key}" for key in unused]
    config = tiny_config(tmp_path, training={"tracked": tracked, "trackers": ["tensorboard"]})
    plan = make_plan(task := TinyTask(config.data, config.model), config, 1, task.build_model())
    assert (
        f"note: training.tracked.uri = sqlite:///x.db ({tmp_path}/tiny.json) is of mlflow, and training.trackers names "
        "tensorboard: it is left out"
    ) in render_summary(plan)


def test_a_file_to_leave_out_that_the_task_does_not_hand_over_is_an_error(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"tracked": {"leave_out": ["best", "bset.pth"]}})
    message = r"^training.tracked.leave_out: 'bset.pth' is nothing .*did you mean 'best.pth'"
    with pytest.raises(ConfigError, match=message):
        unused_settings(config, Tracking(artifacts=("best", "best.pth")))
    with pytest.raises(ConfigError, match=r"tiny.json: training\.tracked\.leave_out: 'best'"):
        Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run")
