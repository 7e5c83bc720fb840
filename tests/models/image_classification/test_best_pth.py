"""best.pth against a plain torch loop of the trainer that it comes from: its file here, and ours there."""

from __future__ import annotations

import json
import math
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
from trunkline.engine.checkpoint.weights import WEIGHTS
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.whole_state import WholeState
from trunkline.models.image_classification.augment import augmented
from trunkline.models.image_classification.best_pth import torchvision_names

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


@pytest.mark.parametrize(("optimizer", "index"), [("Adam", False), ("Adam", True), ("SGD", False), ("RMSprop", False)])
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
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (min(steps), max(steps)) == (9, 12)
    assert f"{path} is taken up as {tmp_path}/run/checkpoints/step-00000006" in capsys.readouterr().out
    assert trainer.progress.best != 9.5  # which any evaluation is better than
    assert trainer.total_steps == 12


class KeepsEach(SmallTask):
    """Keeps the file of each new best."""

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        super().write_best(folder, state)
        shutil.copyfile(folder / "best.pth", folder / f"best-{torch.load(folder / 'best.pth')['epoch']}.pth")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
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
