"""Adaptive clipping: the limit in closed form, the same on every backend, and exact after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.run_config import AdaptiveClipping, RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.optim.clipping import clip_norm, note_norm
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

SETTINGS = {"factor": 0.9, "beta": 0.5, "warmup_steps": 2}


def test_a_limit_is_the_factor_times_the_weighted_mean_of_clipped_norms() -> None:
    adaptive, progress = AdaptiveClipping(factor=2.0, beta=0.5, warmup_steps=2), Progress()
    limits = []
    for norm in (4.0, 1.0, 100.0, 1.0):
        limits.append(clip_norm(adaptive, 3.0, progress))
        note_norm(adaptive, 3.0, progress, norm)
    means = (3.0 * 1 + 1.0 * 2) / 3, (3.0 * 1 + 1.0 * 2 + 3.0 * 4) / 7  # newer norms count twice as much
    assert limits == pytest.approx([3.0, 3.0, min(3.0, 2 * means[0]), min(3.0, 2 * means[1])])
    assert clip_norm(adaptive, 0.0, progress) == pytest.approx(2 * (3.0 + 2.0 + 12.0 + 8.0) / 15)


def test_a_spike_moves_the_limit_by_little() -> None:
    adaptive, progress = AdaptiveClipping(factor=2.0, beta=0.98, warmup_steps=10), Progress()
    for _ in range(200):
        note_norm(adaptive, 0.0, progress, 1.0)
    note_norm(adaptive, 0.0, progress, 1e6)
    assert clip_norm(adaptive, 0.0, progress) == pytest.approx(2 * 1.02, rel=1e-2)


def config_of(folder: Path, stage: int, **training: Any) -> RunConfig:
    section = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.5}
    # plain descent, in which the length of a gradient matters
    section |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0}}, "scheduler": None}
    return tiny_config(folder, training={"adaptive_clipping": SETTINGS, **training}, deepspeed=section)


def train(folder: Path, stage: int, backend: str, resume: str = "none", **training: Any) -> Trainer:
    config = config_of(folder.parent / f"of {start().rank}", stage, **training)
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume)
    trainer.run()
    return trainer


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def plain_losses(config: RunConfig) -> list[float]:
    """A loop in torch alone; the average is kept as the list of all norms."""
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    model = task.build_model()
    rows, norms, out = task.dataset("train"), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        chosen = [index for index in GlobalBatches(40, 8, config.training.seed).samples(step) if index != FILLER]
        points, targets = (torch.cat([rows[index][part] for index in chosen]) for part in (0, 1))
        loss = (model(points) - targets).square().mean()
        out.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        weights = [0.5 ** (len(norms) - place) for place in range(len(norms))]
        limit = 1.5
        if len(norms) >= 2:
            limit = min(limit, 0.9 * sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        norms.append(min(norm, limit))
        optimizer.step()
    return out


def train_everywhere(rank: int, world_size: int, folder: Path) -> None:
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)]:
        train(folder / f"{backend}{stage}", stage, backend)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_every_backend_and_stage_follows_a_plain_loop(tmp_path: Path, world_size: int) -> None:
    if world_size == 1:
        train_everywhere(0, 1, tmp_path)
    else:
        run_distributed_test(train_everywhere, 2, tmp_path, backend=None)
    plain = plain_losses(config_of(tmp_path, 0))
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)]:
        assert losses(tmp_path / f"{backend}{stage}") == pytest.approx(plain, rel=1e-5)
    train(tmp_path / "fixed", 0, "deepspeed", adaptive_clipping=None)
    assert losses(tmp_path / "fixed")[3:] != pytest.approx(plain[3:], rel=1e-3)  # it does something


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 2), ("fsdp", 3)])
def test_a_resumed_run_clips_as_the_unbroken_one(tmp_path: Path, backend: str, stage: int) -> None:
    train(tmp_path / "broken", stage, backend, steps=5)
    train(tmp_path / "broken", stage, backend, resume="auto")
    train(tmp_path / "unbroken", stage, backend)
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")


WAYS: list[tuple[str, dict[str, Any]]] = [
    *(("deepspeed", {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}) for stage in range(4)),
    ("deepspeed", {"zero_optimization": {"stage": 0}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ("fsdp", {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}),
]


@pytest.mark.parametrize(
    ("backend", "section", "configured"),
    [
        pytest.param(backend, section, configured, marks=[pytest.mark.slow] * ((i + j) % 2))
        for i, (backend, section) in enumerate(WAYS)
        for j, configured in enumerate([0.0, 1.5])
    ],
    ids=str,
)
def test_a_norm_that_is_set_for_a_step_clips_as_one_that_is_configured(
    tmp_path: Path, backend: str, section: dict[str, Any], configured: float
) -> None:
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0}}, "scheduler": None}
    for name, clipping in (("set", configured), ("configured", 0.25)):
        config = tiny_config(tmp_path, training={"steps": 5}, deepspeed=section | sgd | {"gradient_clipping": clipping})
        trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / name, backend=backend)
        if name == "set":
            trainer.backend.clip_at(0.25)
        trainer.run()
    assert losses(tmp_path / "set") == losses(tmp_path / "configured")
