"""best.pth against a plain torch loop of the trainer that it comes from: its file here, and ours there."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from tests.models.image_classification.small_images import (
    CLASSES,
    EDGE,
    PlainResNet,
    SmallTask,
    asked,
    train,
    write_images,
)
from trunkline.engine.checkpoint.foreign import read_torch
from trunkline.engine.checkpoint.weights import WEIGHTS
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.task import Sums
from trunkline.engine.whole_state import WholeState
from trunkline.models.image_classification.augment import augmented
from trunkline.models.image_classification.best_pth import write
from trunkline.models.image_classification.torchvision_names import torchvision_names

EPOCHS, LR = 4, 0.01
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "SGD": lambda parameters, **how: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **how),
    "RMSprop": lambda parameters, **how: torch.optim.RMSprop(parameters, momentum=0.9, **how),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def configured(images: Path, optimizer: str, *words: str) -> RunConfig:
    return asked(
        "--data_path", str(images), "--img_size", str(EDGE), "--batch_size", "4", "--grad_acc", "-1",
        "--epochs", str(EPOCHS), "--warmup_epochs", "2", "--optimizer", optimizer, "--lr0", str(LR),
        "--set", 'training.parameters=[{"names": ["*"], "weight_decay": 0.01}]', "--set", "training.trackers=[]",
        *words,
    )[1]  # fmt: skip


class Plain:
    """The loop that the flags come from, on the same samples in the same order."""

    def __init__(self, config: RunConfig, optimizer: str) -> None:
        self.task = SmallTask(config.data, config.model)
        self.config, self.model = config, PlainResNet()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=LR, weight_decay=0.01)

    def train(self, first: int, last: int) -> None:
        """The epochs from `first` to before `last`."""
        data, sizes = self.task.dataset("train"), batch_sizes(self.config.deepspeed, 1)
        batches = GlobalBatches(len(data), sizes.global_batch_size, self.config.training.seed)
        for epoch in range(first, last):
            final = 0.1 * LR
            share, rise = 0.5 * (1 + math.cos(math.pi * (epoch - 2) / (EPOCHS - 2))), min(1, epoch / 2)
            for group in self.optimizer.param_groups:
                group["lr"] = LR * (0.1 + 0.9 * rise) if epoch < 2 else final + (LR - final) * share
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.05 * rise
            for (batch,) in training_loader(
                self.task, data, batches, sizes, 0, first_step=epoch * batches.per_epoch,
                last_step=(epoch + 1) * batches.per_epoch, num_workers=0, pin_memory=False,
            ):  # fmt: skip
                loss = F.cross_entropy(self.model(augmented(batch, self.task.data)), batch["label"])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

    def save(self, path: Path, epoch: int, **others: Any) -> None:
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        torch.save({"model": model, "opt": self.optimizer.state_dict(), "epoch": epoch, "loss": np.float64(9.5),
                    "img_size": EDGE, "arch": "resnet18", **others}, path)  # fmt: skip

    def load(self, path: Path) -> dict[str, Any]:
        held = torch.load(path, weights_only=True)
        self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in held["model"].items()})
        self.optimizer.load_state_dict(held["opt"])
        return held


def assert_same_weights(model: nn.Module, folder: Path) -> None:
    """To 1e-5, of a plain model and of a run's folder of weights."""
    found = load_file(folder / WEIGHTS)
    called = torchvision_names(found)
    for name, tensor in found.items():
        torch.testing.assert_close(model.state_dict()[called[name]], tensor, rtol=1e-5, atol=1e-5, msg=called[name])


@pytest.mark.parametrize(("optimizer", "index"), [("Adam", True), ("SGD", False), ("RMSprop", False)])
def test_a_run_of_the_plain_loop_is_continued_as_if_it_were_unbroken(
    images: Path, tmp_path: Path, optimizer: str, index: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs/best.pth"
    path.parent.mkdir()
    config = configured(images, optimizer, "--load_model", str(path))
    plain = Plain(config, optimizer)
    plain.train(0, 2)
    plain.save(path, 1 if index else 2)  # the epoch's index, or the number of finished ones
    plain.train(2, EPOCHS)
    trainer = train(config, tmp_path / "run")
    assert_same_weights(plain.model, tmp_path / "run/final")
    begun, *rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (begun["split"], begun["step"], begun["from"]) == ("resumed", 6, str(path))
    assert [row["step"] for row in rows if row["split"] == "train"] == [9, 12]
    assert f"the run begins with {path}, now {tmp_path}/run/checkpoints/step-00000006" in capsys.readouterr().out
    assert trainer.progress.best != 9.5  # which any evaluation is better than
    assert trainer.total_steps == 12


class KeepsEach(SmallTask):
    """Keeps the file of each new best."""

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        super().write_best(folder, state)
        shutil.copyfile(folder / "best.pth", folder / f"best-{torch.load(folder / 'best.pth')['epoch']}.pth")


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_the_plain_loop_continues_a_run_of_ours_as_if_it_were_unbroken(
    images: Path, tmp_path: Path, optimizer: str
) -> None:
    config = configured(images, optimizer)
    train(config, tmp_path / "run", task=KeepsEach)
    plain = Plain(config, optimizer)
    held = plain.load(tmp_path / "run/best-1.pth")
    assert list(held["model"]) == [f"model.{name}" for name in plain.model.state_dict()]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (loss,) = [row["loss"] for row in rows if (row["step"], row["split"]) == (3, "val")]
    assert (held["epoch"], held["loss"], held["img_size"], held["arch"]) == (1, loss, EDGE, "resnet18")
    assert held["opt"]["param_groups"][0]["lr"] == pytest.approx(0.1 * LR)
    plain.train(1, EPOCHS)
    assert_same_weights(plain.model, tmp_path / "run/final")
    assert json.loads((tmp_path / "run/class_names.json").read_text()) == list(CLASSES)
    assert (tmp_path / "run/checkpoints").is_dir()


@pytest.fixture(scope="module")
def theirs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plain loop saves after two epochs of Adam."""
    plain = Plain(configured(images, "Adam"), "Adam")
    plain.train(0, 2)
    plain.save(path := tmp_path_factory.mktemp("theirs") / "best.pth", 2)
    return read_torch(path)


def state_of(images: Path, path: Path, held: dict[str, Any]) -> WholeState:
    torch.save(held, path)
    config = configured(images, "Adam")
    return SmallTask(config.data, config.model).read_state(path, 3)


def assert_holds(state: WholeState, model: dict[str, torch.Tensor]) -> None:
    tensors = {**state.parameters, **state.buffers}
    called = torchvision_names(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model[f"model.{called[name]}"])


def test_a_best_pth_that_a_kill_prevented_is_written_at_the_next_start(images: Path, tmp_path: Path) -> None:
    config = configured(images, "Adam", "--epochs", "1")
    assert train(config, tmp_path / "run").progress.is_best
    written = read_torch(tmp_path / "run" / "best.pth")
    (tmp_path / "run" / "best.pth").unlink()
    train(config, tmp_path / "run")
    again = read_torch(tmp_path / "run" / "best.pth")
    assert (again["epoch"], again["loss"]) == (written["epoch"], written["loss"])
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in written["model"].items())


class Falling(SmallTask):
    """Each evaluation is better than the one before."""

    measured, factor = 1.0, 0.5

    def summarize(self, sums: Sums) -> dict[str, float]:
        type(self).measured *= self.factor
        return super().summarize(sums) | {"loss": type(self).measured}


class Rising(Falling):
    factor = 2.0


@pytest.fixture(scope="module")
def falling(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, each with a new best, all of whose checkpoints are kept."""
    run = tmp_path_factory.mktemp("falling") / "run"
    train(configured(images, "Adam", "--epochs", "3", "--set", "training.keep_last=9"), run, task=Falling)
    assert read_torch(run / "best.pth")["epoch"] == 3
    return run


@pytest.mark.parametrize("another_folder", [False, True])
def test_best_pth_is_of_the_branch_that_runs(images: Path, tmp_path: Path, falling: Path, another_folder: bool) -> None:
    old, new = tmp_path / "old", tmp_path / ("new" if another_folder else "old")
    shutil.copytree(falling, old)
    config = configured(images, "Adam", "--epochs", "3")
    trainer = train(config, new, str(old / "checkpoints/step-00000003"), Rising)
    held = read_torch(new / "best.pth")
    assert (held["epoch"], held["loss"]) == (1, trainer.progress.best)
    assert {float(kept["step"]) for kept in held["opt"]["state"].values()} == {3.0}
    assert read_torch(old / ("best.pth" if another_folder else "aside-best-epoch-3.pth"))["epoch"] == 3


def test_best_pth_whose_checkpoint_is_gone_stays_if_it_is_of_the_branch_and_else_is_put_aside(
    images: Path, tmp_path: Path, falling: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(falling, tmp_path / "run")
    config = configured(images, "Adam", "--epochs", "4", "--set", "training.keep_best=false",
                        "--set", "training.keep_last=1")  # fmt: skip
    train(config, tmp_path / "run", task=Rising)
    assert read_torch(tmp_path / "run/best.pth")["epoch"] == 3
    (tmp_path / "run/best.pth").write_bytes(b"of something else")
    train(config, tmp_path / "run", task=Rising)
    assert not (tmp_path / "run/best.pth").exists()
    assert (tmp_path / "run/aside-best-epoch-unknown.pth").read_bytes() == b"of something else"
    assert "its checkpoint is not kept, which training.keep_best does" in capsys.readouterr().out


def test_a_best_pth_that_a_run_begins_with_in_its_own_folder_stays_until_there_is_a_better_one(
    images: Path, tmp_path: Path, theirs: dict[str, Any]
) -> None:
    (tmp_path / "run").mkdir()
    torch.save(theirs | {"loss": 1e-9}, path := tmp_path / "run/best.pth")
    train(configured(images, "Adam", "--load_model", str(path)), tmp_path / "run")
    assert read_torch(path)["loss"] == 1e-9
    assert not list((tmp_path / "run").glob("aside*"))


def test_a_loss_at_another_size_is_not_the_value_to_beat(images: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    state = state_of(images, tmp_path / "best.pth", theirs | {"img_size": 2 * EDGE})
    assert state.metrics == {}
    assert any(f"is of images of {2 * EDGE} pixels, here {EDGE}" in note for note in state.notes)


@pytest.mark.parametrize(
    ("changes", "step", "note"),
    [
        ({}, 6, None),
        ({"opt": None}, 6, "holds no state of an optimizer: weights and epoch alone are taken"),
        (
            {"opt": {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}},
            6,
            "is of 2 groups, not of all 26",
        ),
        ({"epoch": None}, 0, "says no epoch: from epoch 0 on"),
        ({"epoch": np.int64(2), "loss": torch.tensor(0.5)}, 6, None),
        ({"epoch": 1}, 6, "has counted the steps of 2 epochs"),
        ({"epoch": 5}, 15, None),
        ({"epoch": math.nan}, 0, "says no epoch: from epoch 0 on"),
        ({"opt": {"state": {999: {}}, "param_groups": [{"params": list(range(26))}]}}, 6, "is damaged"),
        ({"opt": {"state": {0: 3}, "param_groups": [{"params": list(range(26))}]}}, 6, "is damaged"),
        ({"opt": {"state": {}, "param_groups": [3]}}, 6, "is damaged"),
        (
            {
                "opt": {
                    "state": {0: {"exp_avg": torch.tensor([1, math.nan])}},
                    "param_groups": [{"params": [*range(26)]}],
                }
            },
            6,
            "is damaged",
        ),
        (
            {"opt": {"state": {0: {"exp_avg": torch.tensor([1, 2])}}, "param_groups": [{"params": [*range(26)]}]}},
            6,
            "is damaged",
        ),
        (
            {"opt": {"state": {0: {"exp_avg": torch.tensor([math.nan])}}, "param_groups": [{"params": [*range(26)]}]}},
            6,
            "is damaged",
        ),
        ({"epoch": -1}, 0, None),
    ],
)
def test_what_a_file_lacks_is_said_and_the_rest_is_taken(
    images: Path, tmp_path: Path, theirs: dict[str, Any], changes: dict[str, Any], step: int, note: str | None
) -> None:
    state = state_of(images, tmp_path / "best.pth", theirs | changes)
    assert_holds(state, theirs["model"])
    assert state.step == step
    assert any(note in said for said in state.notes) if note else not state.notes
    assert state.metrics == {"loss": pytest.approx(float(changes.get("loss", 9.5)))}
    assert len(state.kept) == (0 if changes.get("opt", 1) is None or "opt" in changes else 26)


def test_of_fastais_own_file_the_body_is_taken(images: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    body = {
        name.replace("model.", "0.model.", 1): tensor for name, tensor in theirs["model"].items() if ".fc." not in name
    }
    head = {"1.8.weight": torch.zeros(3, 16), "1.2.running_mean": torch.zeros(16)}
    state = state_of(images, tmp_path / "best.pth", {"model": body | head, "opt": {"hypers": [{"lr": 0.1}]}})
    own = {name: tensor for name, tensor in state.parameters.items() if name.startswith("classifier")}
    assert_holds(state, theirs["model"] | {f"model.fc.{name.rpartition('.')[2]}": t for name, t in own.items()})
    assert (state.step, state.kept, state.metrics) == (0, {}, {})
    assert state.notes == ("is of FastAI: its body alone is taken, from epoch 0 on",)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held | {"opt": Hostile()}, "best.pth: is damaged, or holds more than tensors.*system"),
        (lambda held: held["model"], "best.pth: holds no 'model' as best.pth does.*--pretrained"),
        (lambda held: held | {"model": {**held["model"], "model.fc.weight": torch.zeros(5, 16)}},
         "classifier.1.weight is .5, 16., but .3, 16. in the model"),
        (lambda held: held | {"model": {"model.conv1.weight": torch.zeros(8, 3, 7, 7)}}, "missing there"),
        (lambda held: held | {"opt": {
            "state": {0: {"exp_avg": torch.zeros(3, 3), "exp_avg_sq": torch.zeros(3, 3), "step": 6}},
            "param_groups": [{"params": list(range(26))}]}},
         "best.pth: resnet.*convolution.weight: the optimizer's exp_avg has shape .3, 3., the parameter .8, 3, 7, 7."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_the_reason_and_nothing_in_it_is_run(
    images: Path, tmp_path: Path, theirs: dict[str, Any], change: Callable[[Any], Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(change(theirs), tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match=message):
        train(configured(images, "Adam", "--load_model", "best.pth"), tmp_path / "run")
    assert not (tmp_path / "hostile").exists()
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_a_file_of_another_network_is_refused(images: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    torch.save(theirs | {"arch": "resnet50"}, tmp_path / "best.pth")
    message = r"best.pth: is of resnet50, and this run trains resnet18: set model.arch \(--arch\) to resnet50"
    with pytest.raises(ConfigError, match=message):
        train(configured(images, "Adam", "--load_model", str(tmp_path / "best.pth")), tmp_path / "run")
    assert_holds(state_of(images, tmp_path / "best.pth", theirs | {"arch": "of our own"}), theirs["model"])


def test_weights_of_other_classes_are_refused(images: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    (tmp_path / "class_names.json").write_text(json.dumps(["cat", "dog", "fox"]))
    with pytest.raises(
        CheckpointError, match=r'class_names.json: has the classes \["cat", "dog", "fox"\], and the data'
    ):
        state_of(images, tmp_path / "best.pth", theirs)


def test_a_module_of_any_kind_has_the_order_of_its_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model(torch.ones(4, 2)).square().sum().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    kept = {name: optimizer.state[parameter] for name, parameter in named.items()}
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    state = WholeState(7, 3, named, dict(model.named_buffers()), kept, settings, {"loss": 0.25})
    write(tmp_path, state, ("a", "b"), 32, "a folder")
    held = torch.load(tmp_path / "best.pth", weights_only=True)
    assert list(held["model"]) == [f"model.{name}" for name in model.state_dict()]
    assert (held["epoch"], held["loss"], held["arch"]) == (2, 0.25, "a folder")
    fresh = torch.optim.AdamW(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).parameters())
    fresh.load_state_dict(held["opt"])
    assert fresh.param_groups[0]["lr"] == 0.5
