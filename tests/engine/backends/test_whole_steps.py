"""whole_steps.py: steps in bf16 are DeepSpeed's own, and those in fp16 are FSDP's and fp32's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.backends import deepspeed as backend_module
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer


class Poisoned(TinyTask):
    """The gradients of the third micro-batch are infinite, or not numbers; its loss is finite."""

    poison, calls = 0.0, 0

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        sums = super().loss(model, batch)
        self.calls += 1
        if self.calls == 3:
            sums["loss"].register_hook(lambda gradient: gradient * self.poison)
        return sums


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_are_those_of_deepspeed(
    stage: int, poison: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {
        "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.05,
    }  # fmt: skip
    config = tiny_config(tmp_path, training={"steps": 8}, deepspeed=section)
    found: dict[str, tuple[Any, Any]] = {}
    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(backend_module, "take_whole_steps", lambda wrapper: None)
        task = Poisoned(config.data, config.model)
        task.poison = poison
        trainer = Trainer(task, config, start(), tmp_path / name, backend="deepspeed")
        looks = _count_looks(trainer.backend.engine.optimizer, monkeypatch)  # type: ignore[attr-defined]
        progress = trainer.run()
        assert progress.skipped_steps == 1
        assert bool(looks) == (name == "theirs")
        found[name] = progress.best_metrics, dict(trainer.backend.full_state())
    assert found["ours"][0] == pytest.approx(found["theirs"][0], rel=1e-5)
    for name, value in found["theirs"][1].items():
        torch.testing.assert_close(found["ours"][1][name], value, rtol=1e-5, atol=1e-7)


def _count_looks(wrapper: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each gradient that DeepSpeed looks at."""
    looks: list[int] = []
    owner = wrapper.overflow_checker if hasattr(wrapper, "overflow_checker") else wrapper
    look = owner._has_inf_or_nan
    monkeypatch.setattr(owner, "_has_inf_or_nan", lambda *given: (looks.append(1), look(*given))[1])
    return looks


@pytest.mark.parametrize("clipping", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["deepspeed-0", "deepspeed-1", "deepspeed-2", "deepspeed-3"])
def test_gradients_in_fp16_are_those_of_the_loss_whatever_the_scale(
    layout: str, clipping: float, tmp_path: Path
) -> None:
    """SGD takes steps as long as its gradients are. The scale grows in every second step."""
    found = []
    for name in (layout, "fsdp-3", "fp32"):
        backend, _, stage = name.partition("-")
        fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1}
        section = {
            "zero_optimization": {"stage": int(stage or 0)}, "gradient_clipping": clipping,
            "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        } | ({"fp16": fp16} if stage else {})  # fmt: skip
        config = tiny_config(tmp_path, training={"steps": 8, "log_every": 1}, deepspeed=section)
        task = TinyTask(config.data, config.model)
        Trainer(task, config, start(), tmp_path / name, backend="fsdp" if backend == "fsdp" else "deepspeed").run()
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([row[key] for row in rows if row["split"] == "train" for key in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert found[0] == pytest.approx(found[2], rel=0.02)
