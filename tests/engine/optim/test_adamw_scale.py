"""AdamWScale: torch's AdamW with a rate for each parameter, on every layout, and resumed on any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.adamw_scale import AdamWScale
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

LAYOUTS = [("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)]
OTHERS = [("deepspeed", 0), ("deepspeed", 1), ("fsdp", 0), ("fsdp", 2)]
PARAMS = {"lr": 0.02, "betas": [0.9, 0.98], "weight_decay": 0.1}


def step_of_torch(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float, decay: float) -> None:
    """AdamW of torch with one group a parameter, whose rate is scaled and whose decay is not."""
    for parameter, group in zip(parameters, optimizer.param_groups, strict=True):
        rms = max(parameter.detach().double().square().mean().sqrt().item(), 1e-3)
        group["lr"], group["weight_decay"] = lr * rms, decay / rms * group.get("decays", True)
    optimizer.step()


def test_whole_parameters_follow_torch_s_adamw_at_rates_of_their_own() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(5, 3), torch.randn(7) * 1e-5, torch.randn(2, 3, 4) * 30, torch.tensor(0.5)]
    mine, theirs = ([nn.Parameter(value.clone()) for value in starts] for _ in range(2))
    optimizer = AdamWScale(mine, lr=0.1, betas=(0.8, 0.95), weight_decay=0.2)
    reference = torch.optim.AdamW([{"params": [p]} for p in theirs], lr=0.1, betas=(0.8, 0.95))
    for _ in range(10):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        step_of_torch(theirs, reference, 0.1, 0.2)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=0)


def config_of(folder: Path, stage: int, steps: int = 12, **section: Any) -> RunConfig:
    return tiny_config(
        folder, training={"steps": steps},
        deepspeed={
            "zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamWScale", "params": PARAMS},
            "scheduler": {"type": "Constant", "params": {"warmup": 3}}, "train_micro_batch_size_per_gpu": 4, **section,
        },
    )  # fmt: skip


def train(folder: Path, backend: str, stage: int, resume: str = "none", **options: Any) -> None:
    config = config_of(folder.parent / f"of {start().rank}", stage, **options)
    Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume).run()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def plain_losses(config: RunConfig) -> list[float]:
    """A loop in torch alone."""
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    model = task.build_model()
    parameters, rows, out = list(model.parameters()), task.dataset("train"), []
    matrices = [{"params": [p], "decays": p.dim() > 1} for p in parameters]  # norms and biases do not decay
    optimizer = torch.optim.AdamW(matrices, betas=(0.9, 0.98))
    for step in range(12):
        chosen = [index for index in GlobalBatches(40, 8, config.training.seed).samples(step) if index != FILLER]
        points, targets = (torch.cat([rows[index][part] for index in chosen]) for part in (0, 1))
        loss = (model(points) - targets).square().mean()
        out.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        step_of_torch(parameters, optimizer, PARAMS["lr"] * min(1.0, (step + 1) / 4), PARAMS["weight_decay"])  # type: ignore[operator,arg-type]
    return out


def train_everywhere(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int]]) -> None:
    for backend, stage in layouts:
        train(folder / f"{backend}{stage}", backend, stage)


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_every_backend_and_stage_follows_a_plain_loop(
    tmp_path: Path, world_size: int, layouts: list[tuple[str, int]]
) -> None:
    if world_size == 1:
        train_everywhere(0, 1, tmp_path, layouts)
    else:
        run_distributed_test(train_everywhere, 2, tmp_path, layouts, backend=None)
    plain = plain_losses(config_of(tmp_path, 0))
    for backend, stage in layouts:
        assert losses(tmp_path / f"{backend}{stage}") == pytest.approx(plain, rel=1e-6), f"{backend} {stage}"


def train_on_two(rank: int, world_size: int, folder: Path) -> None:
    """A run of each kind, broken off after 5 steps: one continues what the other began, and one what one rank began."""
    train(folder / "zero2", "deepspeed", 2, steps=5)
    train(folder / "zero2 then fsdp3", "fsdp", 3, resume=str(folder / "zero2"))
    train(folder / "zero3", "deepspeed", 3, resume=str(folder / "alone"))


@pytest.mark.distributed
def test_a_run_resumes_on_any_other_layout(tmp_path: Path) -> None:
    train(tmp_path / "alone", "deepspeed", 0, steps=5)
    run_distributed_test(train_on_two, 2, tmp_path, backend=None)
    train(tmp_path / "back alone", "deepspeed", 1, resume=str(tmp_path / "zero2"))
    plain = plain_losses(config_of(tmp_path, 0))[5:]
    for name in ("zero2 then fsdp3", "zero3", "back alone"):
        assert losses(tmp_path / name) == pytest.approx(plain, rel=1e-6), name


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 2), ("fsdp", 3)])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, backend: str, stage: int) -> None:
    train(tmp_path / "broken", backend, stage, steps=5)
    train(tmp_path / "broken", backend, stage, resume="auto")
    train(tmp_path / "unbroken", backend, stage)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


SLOW = [pytest.param(*layout, marks=pytest.mark.slow) for layout in (*OTHERS, ("deepspeed", 3), ("fsdp", 3))]


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 2), *SLOW])
def test_in_bf16_it_scales_by_the_masters(tmp_path: Path, backend: str, stage: int) -> None:
    train(tmp_path / "run", backend, stage, bf16={"enabled": True})
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(config_of(tmp_path, 0)), rel=0.02)


def test_a_parameter_out_of_range_is_named(tmp_path: Path) -> None:
    wrong = {"type": "adamwscale", "params": {"lr": 0.1, "min_rms": -1, "betas": [0.9, 1.5], "momentum": 0.9}}
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, 0, optimizer=wrong)
    message = str(caught.value)
    for key in ("optimizer.params.min_rms: ", "optimizer.params.betas.1: ", "params.momentum: unknown to adamwscale"):
        assert key in message
