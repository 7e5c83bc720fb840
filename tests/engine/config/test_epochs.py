"""Lengths in epochs: what they are in steps, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.epochs import in_steps
from trunkline.engine.config.typed_params import OWN_SCHEDULES, scheduler_params
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.plan import make_plan, planned_batches
from trunkline.engine.plan_text import render_plan
from trunkline.engine.ranks.distributed import start
from trunkline.engine.record.run_folder import had_checkpoints
from trunkline.engine.trainer import Trainer

EPOCH = {"epochs": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"epochs": 1}, 5), ({"epochs": 0.5}, 3), ({"epochs": 0.3}, 2), ({"epochs": 0.29}, 1), ({"epochs": 1e-9}, 1),
        ({"epochs": 30}, 150), (7, 7), ("auto", "auto"), ([{"epochs": 2}, 12], [10, 12]), (None, None), ({}, {}),
    ],
)  # fmt: skip
def test_epochs_become_the_nearest_number_of_steps_and_at_least_one(value: Any, expected: Any) -> None:
    assert in_steps(value, 5) == expected


def rows(folder: Path, split: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["split"] == split]


def test_a_run_logs_evaluates_and_saves_by_epochs_and_keeps_them_as_they_were_asked(tmp_path: Path) -> None:
    """40 samples by 8 are 5 steps an epoch; in a resumed run too."""
    every = {"eval_every": EPOCH, "save_every": {"epochs": 1.2}, "log_every": {"epochs": 0.4}, "keep_last": 9}
    for steps, resume in ((7, "none"), (14, "auto")):
        config = tiny_config(tmp_path, training=every | {"steps": steps})
        trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run", resume=resume)
        trainer.run()
    assert rows(tmp_path / "run", "val") == [5, 7, 10, 14]
    assert rows(tmp_path / "run", "train") == [2, 4, 6, 7, 8, 10, 12, 14]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [
        "step-00000006", "step-00000007", "step-00000012", "step-00000014",
    ]  # fmt: skip
    for name in ("config.json", "final/config.json"):
        training = json.loads((tmp_path / "run" / name).read_text())["training"]
        assert {key: training[key] for key in every} == every
    for name in ("checkpoints", "final"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    assert had_checkpoints(tmp_path / "run")  # step 14 is past the second save


def test_the_plan_shows_epochs_with_their_steps(tmp_path: Path) -> None:
    schedule = {"type": "MultiStepLR", "params": {"milestones": [EPOCH, {"epochs": 2}]}}
    config = tiny_config(tmp_path, training={"eval_every": EPOCH}, deepspeed={"scheduler": schedule})
    task = TinyTask(config.data, config.model)
    config = config.in_steps(planned_batches(task, config, 1).per_epoch)
    plan = make_plan(task, config, 1, task.build_model())
    steps = {"training.eval_every": 5, "deepspeed.scheduler.params.milestones": [5, 10]}
    assert plan["in_steps"] == steps
    assert plan["config"]["training"]["eval_every"] == EPOCH
    assert plan["config"]["deepspeed"]["scheduler"] == schedule
    lines = render_plan(plan).splitlines()
    assert "in steps    training.eval_every 5, deepspeed.scheduler.params.milestones [5, 10]" in lines
    assert [line.split() for line in lines if "eval_every.epochs" in line] == [
        ["training.eval_every.epochs", "1", "(file)"]
    ]


def test_a_rate_falls_once_in_an_epoch_as_torch_s_own_does(tmp_path: Path) -> None:
    schedule = {"type": "StepLR", "params": {"step_size": EPOCH, "gamma": 0.5}}
    config = tiny_config(tmp_path, training={"steps": 12}, deepspeed={"scheduler": schedule})
    Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run").run()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    epochs = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    expected = []
    for step in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % 5 == 4:
            epochs.step()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if line["split"] == "train"] == pytest.approx(expected)
    recorded = json.loads((tmp_path / "run/config.json").read_text())["deepspeed"]["scheduler"]
    assert recorded == schedule


LENGTHS = {
    "WarmupCosine": "warmup", "WarmupLinear": "warmup", "Constant": "warmup", "InverseSqrt": "warmup",
    "WarmupShape": "warmup every",
    "WarmupLR": "warmup_num_steps",
    "WarmupDecayLR": "warmup_num_steps total_num_steps", "WarmupCosineLR": "warmup_num_steps total_num_steps",
    "OneCycle": "cycle_first_step_size cycle_second_step_size decay_step_size",
    "LRRangeTest": "lr_range_test_step_size", "StepLR": "step_size", "MultiStepLR": "milestones",
    "CosineAnnealingLR": "T_max", "CosineAnnealingWarmRestarts": "T_0", "LinearLR": "total_iters",
    "ConstantLR": "total_iters", "PolynomialLR": "total_iters", "OneCycleLR": "total_steps",
    "CyclicLR": "step_size_up step_size_down",
}  # fmt: skip
NEEDED = {
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1}, "OneCycleLR": {"max_lr": 1},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1}, "WarmupDecayLR": {"total_num_steps": 12, "warmup_max_lr": 1},
    "WarmupCosineLR": {"total_num_steps": 12}, "MultiStepLR": {"milestones": [3]}, "StepLR": {"step_size": 3},
    "CosineAnnealingLR": {"T_max": 9}, "CosineAnnealingWarmRestarts": {"T_0": 4},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in LENGTHS.items() for key in keys.split()])
def test_every_length_of_a_schedule_may_be_in_epochs(tmp_path: Path, kind: str, key: str) -> None:
    in_epochs, in_numbers = ([EPOCH], [5]) if key == "milestones" else (EPOCH, 5)
    if kind == "OneCycleLR" or key == "total_num_steps":
        in_epochs, in_numbers = {"epochs": 2.4}, 12
    rates = []
    for value in (in_epochs, in_numbers):
        schedule = {"type": kind, "params": NEEDED.get(kind, {}) | {key: value}}
        config = tiny_config(tmp_path, deepspeed={"scheduler": schedule}).in_steps(5)
        rates.append(learning_rates(config.deepspeed.scheduler, 0.5, 12, list(range(12))))
    assert rates[0] == rates[1]


def test_no_other_parameter_of_a_schedule_may_be_in_epochs(tmp_path: Path) -> None:
    for kind in LENGTHS:
        for key in set(scheduler_params(kind).model_fields) - set(LENGTHS[kind].split()):
            params = OWN_SCHEDULES.get(kind, {}) | NEEDED.get(kind, {}) | {key: EPOCH}
            with pytest.raises(ConfigError, match=rf"scheduler\.params\.{key}"):
                tiny_config(tmp_path, deepspeed={"scheduler": {"type": kind, "params": params}})


@pytest.mark.fault("a length that is none")
@pytest.mark.parametrize("value", [{"epochs": 0}, {"epochs": True}, {"epochs": "1"}, {"epoch": 1}, {"epochs": 1e300},
                                   {"epochs": 1, "steps": 2}, {"epochs": -1}, {}])  # fmt: skip
def test_a_length_that_is_none_is_named_with_what_it_may_be(tmp_path: Path, value: Any) -> None:
    expected = r"expected a number of steps, or of epochs above 0 as in {\"epochs\": 0.5}, found {"
    with pytest.raises(ConfigError, match=rf"training\.save_every: {expected}"):
        tiny_config(tmp_path, training={"save_every": value})
    schedule = {"type": "StepLR", "params": {"step_size": value}}
    with pytest.raises(ConfigError, match=rf"deepspeed\.scheduler\.params\.step_size: {expected}"):
        tiny_config(tmp_path, deepspeed={"scheduler": schedule})
