"""bf16: what stays in fp32, and that every stage and backend gives the same."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.test_trainer import losses, reference_losses, train
from tests.engine.tiny import Net, TinyTask, tiny_config
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import TrunklineError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer


class ThirdOffset(TinyTask):
    """Its buffer is a number that bf16 cannot hold."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        model.offset.fill_(1 / 3)  # type: ignore[operator, union-attr]
        return model


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3), ("fsdp", 3)])
def test_buffers_keep_their_precision_in_bf16(tmp_path: Path, backend: str, stage: int) -> None:
    section = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config = tiny_config(tmp_path, training={"steps": 2}, deepspeed=section)
    trainer = Trainer(ThirdOffset(config.data, config.model), config, start(), tmp_path / "run", backend=backend)
    trainer.run()
    offset = trainer.backend.module.offset
    assert torch.equal(offset, torch.tensor([1 / 3]))  # type: ignore[arg-type]
    assert torch.equal(load_file(tmp_path / "run/final/model.safetensors")["offset"], torch.tensor([1 / 3]))


@pytest.mark.parametrize(("backend", "stage"), [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)])
def test_masters_of_bf16_begin_as_the_model_was_built_and_every_step_is_one(
    tmp_path: Path, backend: str, stage: int
) -> None:
    section = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config = tiny_config(tmp_path, deepspeed=section)
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    built = dict(task.build_model().named_parameters())
    trainer = Trainer(task, config, start(), tmp_path / "run", backend=backend)
    masters = {name: value for name, value in trainer.backend.full_state() if name in built}
    assert masters.keys() == built.keys()
    assert all(torch.equal(masters[name], built[name]) for name in built)
    trainer.run()
    states = trainer.backend.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {config.training.steps}


def test_bf16_gives_the_same_losses_under_every_stage_and_backend(tmp_path: Path) -> None:
    found = []
    for backend, stage in (*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)):
        section = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        config = tiny_config(tmp_path, training={"steps": 30}, deepspeed=section)
        folder = tmp_path / f"{backend}-{stage}"
        Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend).run()
        found.append(losses(folder))
    for one in found[1:]:
        assert one == pytest.approx(found[0], rel=0.01)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_bf16_trains_with_fp32_master_weights(tmp_path: Path, stage: int) -> None:
    section = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config = tiny_config(tmp_path, training={"steps": 30}, deepspeed=section)
    train(tmp_path / "bf16", config)
    assert losses(tmp_path / "bf16") == pytest.approx(reference_losses(config), rel=0.05)
    model = Net(config.data.width, config.model)
    load_weights(model, tmp_path / "bf16/final")
    weight = model.enter.weight.detach()
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # what is saved is the master copy


def test_halvings_of_the_loss_scale_are_no_failures(tmp_path: Path) -> None:
    """DeepSpeed has no fp16 on the CPU."""
    fp16 = {"enabled": True, "initial_scale_power": 32, "hysteresis": 1}
    config = tiny_config(tmp_path, training={"steps": 30, "nonfinite_limit": 1}, deepspeed={"fp16": fp16})
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run", backend="fsdp")
    progress = trainer.run()
    assert progress.skipped_steps > 10
    assert progress.skipped_in_a_row == 0
    assert progress.step == 30
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize(("lowest", "hysteresis"), [(1.0, 1), (4096.0, 2)])
def test_at_the_lowest_loss_scale_skipped_steps_count(tmp_path: Path, lowest: float, hysteresis: int) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 14, "hysteresis": hysteresis, "min_loss_scale": lowest}
    config = tiny_config(
        tmp_path, data={"poison": list(range(40))}, training={"steps": 60, "nonfinite_limit": 4},
        deepspeed={"fp16": fp16},
    )  # fmt: skip
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run", backend="fsdp")
    with pytest.raises(TrunklineError, match=r"4 in a row: stopped \(training.nonfinite_limit = 4\)") as caught:
        trainer.run()
    halvings = 14 - round(math.log2(lowest))
    assert trainer.progress.step == halvings + 4
    assert trainer.backend.loss_scale() == lowest
    assert ("deepspeed.fp16.min_loss_scale" in str(caught.value)) == (lowest > 1)
    assert ("rank 0: loss nan" in str(caught.value)) == (lowest == 1)
