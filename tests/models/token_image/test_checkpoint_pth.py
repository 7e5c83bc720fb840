"""The checkpoints of a training loop of plain torch: a run begins with one, and ends as that loop would have."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trunkline.engine.checkpoint.foreign import read_torch
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.command_line import parse
from trunkline.models.registry import config_sections
from trunkline.models.token_image.checkpoint_pth import read
from trunkline.models.token_image.task import TokenImageTask

EPOCHS, LR = 4, 0.01
SMALL = {"preset": "null", "patch": "4", "d_model": "32", "num_layers": "2", "num_heads": "2"}


def words_of(texts: Path, *words: str) -> list[str]:
    return [
        *("token_image", "--data_path", str(texts), "--img_size", "16", "--batch_size", "2", "--epochs", str(EPOCHS)),
        *("--lr", str(LR), "--warmup_epochs", "1", "--set", "training.trackers=[]", "--log_interval", "1"),
        *(f"--set=model.{key}={value}" for key, value in SMALL.items()), *words,
    ]  # fmt: skip


def configured(texts: Path, *words: str) -> tuple[RunConfig, str]:
    """The configuration and what it resumes from."""
    command = parse(words_of(texts, *words))
    config = checked(command.draft(1), config_sections)
    return config, command.arguments.resume or "none"


class Plain:
    """Such a loop, on the same samples, times and noise in the same order."""

    def __init__(self, config: RunConfig) -> None:
        self.task, self.config = TokenImageTask(config.data, config.model), config
        torch.manual_seed(3)
        self.model = self.task.build_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.01)
        data = self.task.dataset("train")
        self.batches = GlobalBatches(len(data), 2, config.training.seed)
        per_epoch, total = self.batches.per_epoch, EPOCHS * self.batches.per_epoch

        def factor(step: int) -> float:
            if step < per_epoch:
                return step / per_epoch
            return 0.5 * (1 + math.cos(math.pi * (step - per_epoch) / (total - per_epoch)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def train(self, first: int, last: int) -> None:
        """The epochs from `first` to before `last`."""
        data, per_epoch = self.task.dataset("train"), self.batches.per_epoch
        for (batch,) in training_loader(
            self.task, data, self.batches, batch_sizes(self.config.deepspeed, 1), 0,
            first_step=first * per_epoch, last_step=last * per_epoch,
            num_workers=0, pin_memory=False,
        ):  # fmt: skip
            loss = self.task.loss(self.model, batch)["loss"] / self.task.weight(batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()

    def saved(self, epoch: int, prefix: str = "") -> dict[str, Any]:
        weights = {prefix + name.removeprefix("jit."): tensor for name, tensor in self.model.jit.state_dict().items()}
        scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
        return {
            "epoch": epoch, "model_state_dict": weights, "optimizer_state_dict": self._of_the_network(),
            "scheduler_state_dict": self.schedule.state_dict(), "scaler_state_dict": scaler,
            "best_loss": np.float64(1e-9), "loss": 0.5,
        }  # fmt: skip

    def _of_the_network(self) -> dict[str, Any]:
        assert [*self.model.parameters()] == [*self.model.jit.parameters()], "in the same order"
        return self.optimizer.state_dict()


@pytest.fixture(scope="module")
def plain(texts: Path) -> Plain:
    """Such a loop after two epochs."""
    loop = Plain(configured(texts)[0])
    loop.train(0, 2)
    return loop


@pytest.fixture(scope="module")
def theirs(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it has saved then."""
    torch.save(plain.saved(2), path := tmp_path_factory.mktemp("theirs") / "best_model.pth")
    return read_torch(path)


@pytest.mark.parametrize(("prefix", "epoch"), [("", 2), ("module._orig_mod.jit.", 1)])
def test_a_run_begins_with_the_file_and_ends_as_the_loop_does(
    texts: Path, tmp_path: Path, prefix: str, epoch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the file names the last epoch, from 0 on, or says how many there were."""
    path = tmp_path / "theirs/checkpoint_epoch_2.pth"
    path.parent.mkdir()
    config, resume = configured(texts, "--resume", str(path))
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_2\.pth: there is no checkpoint in it"):
        Trainer(TokenImageTask(config.data, config.model), config, start(), tmp_path / "none", resume=resume)
    loop = Plain(config)
    loop.train(0, 2)
    torch.save(loop.saved(epoch, prefix), path)
    config, resume = configured(texts, "--resume", str(path))
    loop.train(2, EPOCHS)
    run = tmp_path / "run"
    trainer = Trainer(TokenImageTask(config.data, config.model), config, start(), run, resume=resume)
    assert (trainer.progress.step, trainer.progress.best) == (6, None)
    trainer.run()
    found = load_file(run / "final/model.safetensors")
    for name, tensor in loop.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    said = capsys.readouterr().out
    assert f"the run begins with {path}, now {run}/checkpoints/step-00000006" in said
    for note in ("its gradient scale is left out", "its best loss, 1e-09, is left out"):
        assert f"note: {path}: {note}" in said
    assert ("has counted the steps of 2 epochs" in said) is (epoch == 1)
    config, resume = configured(texts, "--resume", str(path), "--epochs", str(EPOCHS + 1))
    again = Trainer(TokenImageTask(config.data, config.model), config, start(), run, resume=resume)
    assert again.progress.step == EPOCHS * 3, "the same command continues what it has begun"
    again.run()


def state_of(texts: Path, path: Path, held: Any) -> Any:
    torch.save(held, path)
    config, _ = configured(texts)
    return read(path, TokenImageTask(config.data, config.model).build_model(), 3)


@pytest.mark.parametrize(
    ("changes", "step", "note"),
    [
        ({"scaler_state_dict": None, "best_loss": None, "loss": None}, 6, None),
        ({"optimizer_state_dict": None}, 6, "holds no state of an optimizer: weights and epoch alone are taken"),
        ({"optimizer_state_dict": {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}}, 6, "of 2 groups"),
        ({"optimizer_state_dict": {"state": {0: 3}, "param_groups": [{"params": [0]}]}}, 6, "('optimizer_state_dict')"),
        ({"epoch": None}, 0, "says no epoch: from epoch 0 on"),
        ({"epoch": math.nan}, 0, "says no epoch: from epoch 0 on"),
        ({"epoch": 5}, 15, "its best loss, 1e-09"),
        ({"best_loss": math.inf}, 6, "its best loss, 0.5"),
    ],
)
def test_what_a_file_lacks_is_said_and_the_rest_is_taken(
    texts: Path, tmp_path: Path, theirs: dict[str, Any], changes: dict[str, Any], step: int, note: str | None
) -> None:
    state = state_of(texts, tmp_path / "best_model.pth", theirs | changes)
    assert {name.removeprefix("jit."): tensor.tolist() for name, tensor in state.parameters.items()} == {
        name: tensor.tolist() for name, tensor in theirs["model_state_dict"].items()
    }
    assert state.step == step
    assert any(note in said for said in state.notes) if note else not state.notes
    with_moments = "optimizer_state_dict" not in changes
    assert bool(state.kept) is with_moments
    if with_moments:
        moments = theirs["optimizer_state_dict"]["state"]
        for place, name in enumerate(state.parameters):
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(state.kept[name][key], moments[place][key])


def test_tensors_alone_are_weights_from_epoch_0(texts: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    weights = theirs["model_state_dict"]
    state = state_of(texts, tmp_path / "plain.pth", weights)
    assert (state.step, dict(state.kept)) == (0, {})
    assert all(torch.equal(state.parameters[f"jit.{name}"], tensor) for name, tensor in weights.items())


def test_what_is_known_of_tokens_is_of_the_runs_data(texts: Path, tmp_path: Path, theirs: dict[str, Any]) -> None:
    model = theirs["model_state_dict"] | {"log_frequencies": torch.zeros(7), "module.curve": torch.ones(3, 160)}
    state = state_of(texts, tmp_path / "best_model.pth", theirs | {"model_state_dict": model})
    config, _ = configured(texts)
    own = TokenImageTask(config.data, config.model)
    assert torch.equal(state.buffers["log_frequencies"], own.frequencies.log())
    assert not state.buffers["curve"].any()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


def _without(held: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    weights = {name: tensor for name, tensor in held["model_state_dict"].items() if name not in names}
    return held | {"model_state_dict": weights | more}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held | {"args": Hostile()}, "is damaged, or holds more than tensors and plain values.*system"),
        (lambda held: {"weights": {"a": 1}}, "holds no 'model_state_dict' as checkpoint_epoch_N.pth does"),
        (lambda held: [1, 2], "holds no 'model_state_dict'"),
        (lambda held: _without(held, "rows", pos_embed=torch.zeros(2)),
         r"1 tensors of the model that are missing there: jit.rows\n.*not have: jit.pos_embed\n.*architecture"),
        (lambda held: _without(held, rows=torch.zeros(16, 32)), r"jit.rows is \[16, 32\], but \[4, 32\] in the model"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named_with_the_tensors_and_nothing_in_it_is_run(
    texts: Path, tmp_path: Path, theirs: dict[str, Any], change: Callable[[Any], Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save(change(theirs), "best_model.pth")
    config, resume = configured(texts, "--resume", "best_model.pth")
    with pytest.raises(CheckpointError, match=rf"(?s)best_model\.pth: .*{message}"):
        Trainer(TokenImageTask(config.data, config.model), config, start(), tmp_path / "run", resume=resume)
    assert not (tmp_path / "hostile").exists()
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_the_file_is_on_record(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "best_model.pth").touch()
    config, resume = configured(texts, "--resume", str(tmp_path / "best_model.pth"))
    assert (config.training.start_from, resume) == (str(tmp_path / "best_model.pth"), "auto")
    assert config.origins["training.start_from"] == "--resume"
    assert json.loads(json.dumps(config.as_dict()))["training"]["start_from"] == str(tmp_path / "best_model.pth")
