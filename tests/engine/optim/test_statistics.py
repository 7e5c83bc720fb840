"""BatchNorm's statistics: a plain loop's on every layout, without fillers, and the same on all ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import normal, seed_torch
from trunkline.engine.errors import TrunklineError
from trunkline.engine.optim.statistics import Statistics, without_fillers
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.task import Batch, Sums, Task
from trunkline.engine.trainer import Trainer

LAYOUTS = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 2), ("fsdp", 3)]
SAMPLES = 16
"""By 12, in micro-batches of 3: in every other step one micro-batch has a single real sample, and others have none."""


class Images:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normal(torch.tensor([index]), (3, 6, 6))[0] * (1 + index % 4) + index % 3, index % 3


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    _no_split_modules: Sequence[str] = ("Unit",)

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.units = nn.Conv2d(3, 4, 3, stride=2), nn.Sequential(Unit(4), Unit(4))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.units(self.enter(x)).mean((2, 3))))  # BatchNorm1d refuses a single row


class ImageTask(Task):
    unit = "images"

    def build_model(self) -> nn.Module:
        return ConvNet()

    def dataset(self, split: str) -> Images:
        return Images(SAMPLES if split == "train" else 7)

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> Batch:
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.tensor([y for _, y in samples])}

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        losses = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return {"loss": torch.where(batch["valid"], losses, 0.0).sum()}

    def fingerprint(self) -> str:
        return "images"


def configuration(folder: Path, stage: int = 0, **training: Any) -> RunConfig:
    return tiny_config(
        folder, training={"steps": 6, "eval_every": 99, "save_every": 99} | training,
        deepspeed={
            "train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        },
    )  # fmt: skip


def plain_loop(config: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state after the run, and the average of it: torch alone. Each micro-batch passes through a copy of the model,
    so that all begin with the same statistics, and the mean of the copies' is weighted by real samples."""
    seed_torch(config.training.seed, 0)
    model, rows, steps = ConvNet(), Images(SAMPLES), int(config.training.steps or 0)
    batches = GlobalBatches(SAMPLES, 12, config.training.seed)
    params = [p for _, p in model.named_parameters()]
    average = copy.deepcopy(model)
    for step in range(steps):
        grads, statistics = [torch.zeros_like(p) for p in params], [b.double() * 0 for b in model.buffers()]
        real = int((batches.samples(step) != FILLER).sum())
        for chosen in batches.samples(step).reshape(4, 3):
            indices = [index for index in chosen if index != FILLER]
            if not indices:
                continue
            seen = copy.deepcopy(model)
            x, y = (torch.stack([torch.as_tensor(rows[index][part]) for index in indices]) for part in (0, 1))
            doubled = torch.cat([x, x]) if len(x) == 1 else x
            out = seen(doubled)[: len(x)]
            loss = nn.functional.cross_entropy(out, y, reduction="sum") / real
            for total, part in zip(grads, torch.autograd.grad(loss, list(seen.parameters())), strict=True):
                total += part
            for total, buffer in zip(statistics, seen.buffers(), strict=True):
                total += buffer.double() * len(x) / real
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        rate = config.deepspeed.optimizer.params["lr"] * _factor(step, steps)
        with torch.no_grad():
            for parameter, gradient in zip(params, grads, strict=True):
                parameter -= rate * gradient * min(1.0, float(1 / (norm + 1e-6)))
            for buffer, value in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(value.round() if not buffer.is_floating_point() else value)
            for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(0.5 * mine + 0.5 * theirs if mine.is_floating_point() else theirs)
    return dict(model.state_dict()), dict(average.state_dict())


def _factor(step: int, steps: int) -> float:
    warmup = round(0.25 * steps)
    rise = min(1.0, (step + 1) / (warmup + 1))
    return rise * 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / (steps - 1 - warmup)))


EMA = {"decay": 0.5, "warmup": False, "use": ["evaluation"]}


def train(folder: Path, config: RunConfig, backend: str = "deepspeed", resume: str = "none") -> Trainer:
    trainer = Trainer(ImageTask(), config, start(), folder, backend=backend, resume=resume)
    trainer.run()
    return trainer


def assert_as_a_plain_loop(folder: Path, config: RunConfig) -> None:
    for name, wanted in zip(("final", "best"), plain_loop(config), strict=True):
        found = load_file(folder / name / "model.safetensors")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_one_rank_accumulates_the_statistics_of_a_plain_loop(tmp_path: Path) -> None:
    config = configuration(tmp_path, ema=EMA)
    train(tmp_path / "run", config)
    assert_as_a_plain_loop(tmp_path / "run", config)


def train_on_a_rank(rank: int, world_size: int, folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for backend, stage in LAYOUTS:
        name = f"{backend}-{stage}"
        config = configuration(folder / f"{rank}-{name}", stage, ema=EMA, save_every=6)
        trainer = train(folder / name, config, backend)
        found.append({name: buffer.clone() for name, buffer in trainer.backend.module.named_buffers()})
    return found


@pytest.mark.distributed
def test_two_ranks_have_the_weights_and_statistics_of_a_plain_loop_at_every_layout(tmp_path: Path) -> None:
    ours, theirs = run_distributed_test(train_on_a_rank, 2, tmp_path, backend=None)
    for (backend, stage), mine, other in zip(LAYOUTS, ours, theirs, strict=True):
        run = tmp_path / f"{backend}-{stage}"
        assert_as_a_plain_loop(run, configuration(tmp_path))
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        saved = [load_file(path) for path in sorted((run / "checkpoints").rglob("rank-*.safetensors"))]
        held = [{name: value for name, value in each.items() if "#" in name} for each in saved]
        assert [len(each) for each in held] == [15, 15]
        assert all(torch.equal(held[0][name], held[1][name]) for name in held[0])


def test_recomputed_forwards_count_once(tmp_path: Path) -> None:
    train(tmp_path / "plain", configuration(tmp_path / "a"))
    train(tmp_path / "recomputed", configuration(tmp_path / "b", activation_checkpointing=True))
    wanted, found = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("plain", "recomputed"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_resumed_run_has_the_statistics_of_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    config = configuration(tmp_path, save_every=3, ema=EMA)
    train(tmp_path / "run", config)
    train(tmp_path / "resumed", config, resume=str(tmp_path / "run" / "checkpoints" / "step-00000003"))
    for name in ("final", "best"):
        wanted, found = (load_file(tmp_path / run / name / "model.safetensors") for run in ("run", "resumed"))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_skipped_step_leaves_statistics_as_they_were(tmp_path: Path) -> None:
    class Poisoned(ImageTask):
        def loss(self, model: nn.Module, batch: Batch) -> Sums:
            return super().loss(model, batch | {"x": batch["x"] * float("inf")} if model.training else batch)

    config = configuration(tmp_path, steps=4, nonfinite_limit=2)
    trainer = Trainer(Poisoned(), config, start(), tmp_path / "run")
    with pytest.raises(TrunklineError, match="not finite"):
        trainer.run()
    built = ConvNet()
    for name, buffer in trainer.backend.module.named_buffers():
        assert torch.equal(buffer, dict(built.named_buffers())[name])


def test_a_batch_loses_its_fillers_but_for_a_copy_beside_a_single_sample() -> None:
    batch = {"x": torch.arange(4), "valid": torch.tensor([True, True, False, False])}
    assert without_fillers(batch)["x"].tolist() == [0, 1]
    batch["valid"] = torch.tensor([True, False, False, False])
    one = without_fillers(batch)
    assert (one["x"].tolist(), one["valid"].tolist()) == ([0, 0], [True, False])
    alone = without_fillers(batch, least=1)
    assert (alone["x"].tolist(), alone["valid"].tolist()) == ([0], [True])
    batch["valid"] = torch.zeros(4, dtype=torch.bool)
    assert without_fillers(batch) is batch


class TakesOne(nn.BatchNorm1d):
    takes_single_samples = True


def test_a_copy_beside_a_single_sample_is_left_out_where_every_norm_takes_one() -> None:
    batch = {"x": torch.arange(3), "valid": torch.tensor([True, False, False])}
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    for norms, rows in (([TakesOne(2)], 1), ([TakesOne(2), nn.BatchNorm1d(2)], 2), ([nn.BatchNorm1d(2)], 2)):
        model = nn.Sequential(*norms)
        statistics = Statistics(model, TinyTask.running_statistics(None, model), ranks)  # type: ignore[arg-type]
        assert [len(each["x"]) for each in statistics.begin([batch])] == [rows]


def differing(rank: int, world_size: int) -> list[float]:
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(rank)  # type: ignore[union-attr]
    Statistics(norm, TinyTask.running_statistics(None, norm), Ranks(rank, world_size, rank, torch.device("cpu")))  # type: ignore[arg-type]
    return norm.running_mean.tolist()  # type: ignore[union-attr, return-value]


@pytest.mark.distributed
def test_statistics_that_differ_by_rank_in_an_earlier_checkpoint_become_their_mean() -> None:
    assert run_distributed_test(differing, 2) == [[0.5], [0.5]]
