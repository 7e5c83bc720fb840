"""What a task must say, and what it may leave to the defaults."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.tiny import Rows, TinyData, TinyModel, TinyTask, tiny_config
from trunkline.engine.data.order import lengths_of
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch, Samples, Sums, Task, add_sums
from trunkline.engine.trainer import Trainer
from trunkline.engine.trials import find_micro_batch


class Points:
    """Sample i is {"x": [i, 2 i], "y": 5 i}: a map-style data set without torch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"x": np.array([index, 2 * index], np.float32), "y": np.float32(5 * index)}


class Least(Task):
    """Only what is abstract."""

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1, bias=False)

    def dataset(self, split: str) -> Points:
        return Points({"train": 24, "val": 11}[split])

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        error = (model(batch["x"])[:, 0] - batch["y"]) * batch["valid"]
        return {"loss": error.square().sum(), "error": error.detach().abs().sum()}

    def fingerprint(self) -> str:
        return "points"


def test_a_task_that_says_only_what_it_must_is_trained_and_its_metrics_are_means_over_samples(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 2}, deepspeed={"train_batch_size": 4})
    trainer = Trainer(Least(), config, start(), tmp_path / "run")
    trainer.run()
    model, points = trainer.backend.module, Points(11)
    with torch.no_grad():
        error = torch.stack([model(torch.from_numpy(points[i]["x"]))[0] - points[i]["y"] for i in range(11)])
        batch = Least().collate([points[i] for i in range(11)]) | {"valid": torch.ones(11, dtype=torch.bool)}
        metrics = Least().summarize(Least().evaluate(model.eval(), batch))
    assert metrics == pytest.approx({"loss": float(error.square().mean()), "error": float(error.abs().mean())})
    assert trainer.progress.best == pytest.approx(metrics["loss"])  # by the engine, in micro-batches with fillers
    assert (tmp_path / "run/final/model.safetensors").is_file()


def test_what_a_task_leaves_out_is_an_error_when_it_is_made() -> None:
    class NoLoss(Least):
        loss = Task.loss

    with pytest.raises(TypeError, match=r"abstract method.*loss"):
        NoLoss()  # type: ignore[abstract]


def test_a_run_reads_each_split_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Counting(TinyTask):
        def dataset(self, split: str) -> Rows:
            read.append(split)
            return super().dataset(split)

    config = tiny_config(tmp_path, training={"steps": 4, "eval_every": 1, "save_every": 2})
    trainer = Trainer(Counting(config.data, config.model), config, start(), tmp_path / "run")
    find_micro_batch(trainer)
    trainer.run()
    assert read == ["train", "val"]


def test_two_tasks_of_one_class_share_no_data() -> None:
    first, second = (TinyTask(TinyData(samples=count), TinyModel()) for count in (4, 5))
    assert [len(first.dataset("train")), len(second.dataset("train")), len(first.dataset("val"))] == [4, 5, 11]
    assert first.dataset("train") is first.dataset("train")


class OldTask:
    """As a task was written before there was a base class."""

    unit = "points"

    def datasets(self) -> dict[str, Samples]:
        raise AssertionError("called")

    def weight_name(self, name: str) -> str | None:
        return name


@pytest.mark.fault("a task of the protocol that was")
def test_a_task_of_the_protocol_that_was_is_one_error_that_names_what_to_rename(tmp_path: Path) -> None:
    names = r"datasets\(\) is now dataset\(split\).*weight_name\(name\) is now tensor_name"
    with pytest.raises(ConfigError, match=f"OldTask is no task: derive it from trunkline.engine.task.Task; {names}"):
        Trainer(OldTask(), tiny_config(tmp_path), start(), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()

    with pytest.raises(ConfigError, match=f"OldSubclass: {names}"):

        class OldSubclass(OldTask, Task):
            pass


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [(None, None), (np.array([3, 1, 2], np.int32), [3, 1, 2]), ([3, 1, 2], [3, 1, 2])],
)
def test_lengths_are_integers_one_for_each_sample(lengths: Any, expected: list[int] | None) -> None:
    points = Points(3)
    points.lengths = lengths  # type: ignore[attr-defined]
    found = lengths_of(points)
    assert (found is None and expected is None) or (found is not None and found.tolist() == expected)


@pytest.mark.fault("lengths that are none")
@pytest.mark.parametrize("lengths", [np.array([3, 1]), np.array([3.0, 1.0, 2.0]), [[3], [1], [2]]])
def test_lengths_that_are_none_are_named(lengths: Any) -> None:
    points = Points(3)
    points.lengths = lengths  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"Points.lengths: expected an integer for each sample, int64 \[3\], found"):
        lengths_of(points)


def test_tensors_are_written_under_the_model_s_names_unless_a_task_says_otherwise() -> None:
    tensors: dict[str, Tensor] = {"weight": torch.ones(2)}
    assert Least().tensor_name("weight") == "weight"
    assert Least().file_tensors(tensors) is tensors


def test_a_task_that_has_read_its_data_can_be_pickled() -> None:
    task = TinyTask(TinyData(), TinyModel())
    copy = pickle.loads(pickle.dumps((task, task.dataset("train"))))[0]
    assert len(copy.dataset("train")) == len(task.dataset("train"))


def test_sparse_sums_are_those_of_dense_ones() -> None:
    rows = torch.tensor([[4, 0, 4], [1, 0, 2], [0, 1, 1]])  # one is met twice in a part
    values = torch.arange(18, dtype=torch.float32).view(3, 3, 2) / 7
    total: Sums | None = None
    dense = torch.zeros(5, 2, dtype=torch.float64)
    for places, part in zip(rows, values, strict=True):
        sparse = torch.sparse_coo_tensor(places[None], part, (5, 2), check_invariants=True)
        total = add_sums(total, {"rows": sparse, "loss": part.sum()})
        dense += torch.zeros(5, 2, dtype=torch.float64).index_add_(0, places, part.double())
    assert total is not None
    assert not total["rows"].is_sparse
    torch.testing.assert_close(total["rows"], dense, rtol=0, atol=0)
    assert float(total["loss"]) == pytest.approx(float(values.double().sum()))
