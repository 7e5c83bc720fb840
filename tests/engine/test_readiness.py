"""What cannot train is named before anything is built: schedules that do not fit, optimizers that cannot be resumed."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.plan import make_plan, planned_batches
from trunkline.engine.plan_text import render_plan, render_summary
from trunkline.engine.ranks.distributed import start
from trunkline.engine.readiness import ready
from trunkline.engine.trainer import Trainer

CPU = torch.device("cpu")


def config_of(
    folder: Path, kind: str = "AdamW", stage: int = 0, schedule: dict[str, Any] | None = None, **params: Any
) -> RunConfig:
    optimizer = {"type": kind, "params": {"lr": 0.01} | params}
    section = {"optimizer": optimizer, "scheduler": schedule, "zero_optimization": {"stage": stage}}
    return tiny_config(folder, deepspeed=section)


@pytest.mark.parametrize(
    ("units", "enabled", "told"),
    [
        ({"avx512_bf16": False}, True, True),
        ({}, True, True),
        ({"avx512_bf16": True}, True, False),
        ({"bf16": True}, True, False),
        ({}, False, False),
    ],
)
def test_bf16_on_a_processor_without_units_for_it_is_said_to_be_slow(
    units: dict[str, bool], enabled: bool, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    config = tiny_config(tmp_path, deepspeed={"bf16": {"enabled": enabled}})
    notes = ready(config, "deepspeed", 10, 1, CPU).notes
    assert [line for line in notes if "--set deepspeed.bf16.enabled=false" in line] == list(notes)
    assert bool(notes) == told


class Counting(torch.optim.SGD):
    """Keeps what decides its steps outside its state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"] * self.count)


class Grouping(torch.optim.SGD):
    """Keeps it in its parameter group, as Prodigy does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["d"] = 1.0

    def step(self, closure: Any = None) -> None:
        super().step()
        self.param_groups[0]["d"] *= 2


class Listing(torch.optim.SGD):
    """Keeps what is neither a tensor nor a number."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [parameter.detach().clone()]


class Normalized(torch.optim.SGD):
    """Divides a gradient by its norm, as LAMB and Adafactor do in their ways."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad /= parameter.grad.norm()
        super().step()


OWN = {each.__name__: each for each in (Counting, Grouping, Listing, Normalized)}


@pytest.mark.parametrize(
    ("kind", "stage", "params", "message"),
    [
        ("Adafactor", 0, {}, r"keeps row_var of shape \[4, 1\] .*use AdamWScale"),
        ("Adafactor", 2, {}, "Adafactor .*use AdamWScale"),
        ("SparseAdam", 0, {}, "does not support dense gradients.*use AdamW"),
        ("LBFGS", 1, {}, "closure.*use AdamW"),
        ("AdamW", 0, {"differentiable": True}, 'AdamW with {"lr": 0.01, "differentiable": true} is not supported here'),
        ("AdamW", 1, {"capturable": True}, "If capturable=True"),
        ("AdamW", 0, {"fused": True, "foreach": True}, "cannot be `True` together"),
        ("SGD", 0, {"nesterov": True}, "Nesterov momentum requires"),
        ("Counting", 0, {}, "it keeps more than its state"),
        ("Grouping", 0, {}, "a step changes d of its parameter group, which is not saved"),
        ("Listing", 0, {}, "not JSON serializable"),
        ("Normalized", 1, {}, "what others of its parameter are, and ZeRO 1 splits parameters over ranks"),
        ("Lamb", 2, {}, "what others of its parameter are, and ZeRO 2 splits parameters over ranks"),
        ("Lamb", 0, {}, "DeepSpeed has Lamb for GPUs only"),
        ("MuAdam", 0, {}, "needs the package mup"),
    ],
)
def test_an_optimizer_that_cannot_be_trained_saved_and_resumed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stage: int, params: dict[str, Any], message: str
) -> None:
    if kind in OWN:
        monkeypatch.setattr(torch.optim, kind, OWN[kind], raising=False)
    with pytest.raises(ConfigError, match=rf"^deepspeed.optimizer(.|\n)*{message}"):
        ready(config_of(tmp_path, kind, stage, **params), "deepspeed", 12, 1, CPU)


def test_every_other_optimizer_of_torch_is_ready_at_every_stage(tmp_path: Path) -> None:
    refused = {"Optimizer", "Adafactor", "LBFGS", "SparseAdam", "Muon"}  # of that name is DeepSpeed's
    for kind in {key for key, value in vars(torch.optim).items() if inspect.isclass(value)} - refused:
        for stage, backend in ((0, "deepspeed"), (3, "deepspeed"), (2, "fsdp")):
            ready(config_of(tmp_path, kind, stage), backend, 12, 1, CPU)


def test_neither_a_small_rate_nor_a_full_disk_changes_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim, "Normalized", Normalized, raising=False)
    with pytest.raises(ConfigError, match="Normalized"):
        ready(config_of(tmp_path, "Normalized", 1, lr=1e-12), "deepspeed", 12, 1, CPU)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    ready(config_of(tmp_path, "AdamW", 1), "deepspeed", 12, 1, CPU)


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_an_optimizer_is_refused_before_the_model_is_built_and_the_folder_keeps_nothing(
    tmp_path: Path, backend: str
) -> None:
    class NeverBuilt(TinyTask):
        def build_model(self) -> torch.nn.Module:
            raise AssertionError("built")

    config = config_of(tmp_path, "SparseAdam")
    with pytest.raises(ConfigError, match="SparseAdam"):
        Trainer(NeverBuilt(config.data, config.model), config, start(), tmp_path / "run", backend=backend)
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupCosine", {"warmup": 13}, "params.warmup: 13 is more than the run's 12 steps"),
        ("WarmupLR", {}, "params.warmup_num_steps: 1000, the default, is more than the run's 12 steps"),
        ("LinearLR", {"total_iters": 20}, "params.total_iters: 20 is more"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1}, "params.step_size_up: 2000, the default"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_first_step_size": 13}, "first_step_size: 13 is"),
        (
            "OneCycleLR",
            {"max_lr": 0.1, "total_steps": 11},
            'ends after 11 steps, and the run has 12: write "total',
        ),
        ("OneCycleLR", {"max_lr": 0.1, "epochs": 2, "steps_per_epoch": 5}, "steps_per_epoch: .*ends after 10 steps"),
        ("WarmupDecayLR", {"total_num_steps": 6, "warmup_num_steps": 2}, "total_num_steps: .*ends after 6 steps"),
        ("OneCycleLR", {"max_lr": 0.1}, "You must define either total_steps OR"),
        ("ExponentialLR", {"gamma": 1e200}, "the learning rate of step 12 is inf"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_an_error(
    tmp_path: Path, kind: str, params: dict[str, Any], message: str
) -> None:
    config = config_of(tmp_path, schedule={"type": kind, "params": params})
    with pytest.raises(ConfigError, match=f"^deepspeed.scheduler.*{message}"):
        ready(config, "deepspeed", 12, 1, CPU)


def test_a_schedule_that_the_optimizer_cannot_follow_is_an_error(tmp_path: Path) -> None:
    schedule = {"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": "auto"}}
    ready(config_of(tmp_path, "AdamW", schedule=schedule), "fsdp", 12, 1, CPU)
    with pytest.raises(ConfigError, match=r"OneCycleLR does not accept .*optimizer must support momentum"):
        ready(config_of(tmp_path, "Adagrad", schedule=schedule), "fsdp", 12, 1, CPU)


def test_a_schedule_that_falls_may_be_longer_than_the_run(tmp_path: Path) -> None:
    for kind, params in {
        "WarmupCosine": {"warmup": 12},
        "LinearLR": {"start_factor": 1.0, "end_factor": 0.5, "total_iters": 50},
        "CosineAnnealingLR": {"T_max": 50},
        "WarmupDecayLR": {"total_num_steps": 50, "warmup_num_steps": 3},
    }.items():
        ready(config_of(tmp_path, schedule={"type": kind, "params": params}), "deepspeed", 12, 1, CPU)


@pytest.mark.parametrize(("warmup", "reached"), [({"epochs": 2}, True), ({"epochs": 3}, False), (0, True)])
def test_a_warmup_that_the_run_does_not_see_the_end_of_is_named(
    tmp_path: Path, warmup: dict[str, int] | int, reached: bool
) -> None:
    config = config_of(tmp_path, schedule={"type": "WarmupShape", "params": {"shape": "cosine", "warmup": warmup}})
    config = ready(config.in_steps(5), "deepspeed", 12, 1, CPU)
    plan = make_plan(task := TinyTask(config.data, config.model), config, 1, task.build_model())
    summary = render_summary(plan)
    assert ("end of warm-up (step " in summary) == reached
    said = "note: the warm-up of deepspeed.scheduler takes 15 steps and the run 12, so the full learning rate is never"
    assert (said in summary) != reached


def test_auto_is_decided_shown_by_the_plan_and_written_into_the_record(tmp_path: Path) -> None:
    warmup = {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto"}
    config = config_of(tmp_path, stage=1, schedule={"type": "WarmupDecayLR", "params": warmup}, betas="auto")
    raw = json.loads(Path(config.source).read_text())
    raw["deepspeed"] |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    raw["deepspeed"]["zero_optimization"] |= {"reduce_bucket_size": "auto", "contiguous_gradients": "auto"}
    config = tiny_config(tmp_path, deepspeed=raw["deepspeed"])
    task = TinyTask(config.data, config.model)
    assert planned_batches(task, config, 2).per_epoch == 5
    decided = ready(config, "deepspeed", 12, 2, CPU)
    lines = render_plan(make_plan(task, decided, 2, task.build_model())).splitlines()
    shown = {key: line.split()[1:] for line in lines if len(line.split()) > 1 for key in [line.split()[0]]}
    for key, value in {
        "gradient_accumulation_steps": "2",
        "gradient_clipping": "0.0",
        "optimizer.params.betas": "[0.9,",
        "scheduler.params.total_num_steps": "12",
        "scheduler.params.warmup_num_steps": "1",
        "scheduler.params.warmup_max_lr": "0.01",
        "zero_optimization.reduce_bucket_size": "1024",
        "zero_optimization.contiguous_gradients": "True",
    }.items():
        assert (shown[f"deepspeed.{key}"][0], shown[f"deepspeed.{key}"][-1]) == (value, "(auto)"), key

    folder = tmp_path / "run"
    Trainer(task, config, start(), folder, backend="fsdp").run()
    planned = json.loads((folder / "plan.json").read_text())["config"]["deepspeed"]
    assert planned["zero_optimization"] == {"stage": 1}  # FSDP has no buffers to decide on
    recorded = json.loads((folder / "config.json").read_text())["deepspeed"]
    assert recorded["scheduler"]["params"] == {"total_num_steps": 12, "warmup_max_lr": 0.01, "warmup_num_steps": 1}
    assert recorded["optimizer"]["params"] == {"lr": 0.01, "betas": [0.9, 0.999]}


def test_a_secondary_partition_below_stage_3_is_for_fsdp(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}})
    ready(config, "fsdp", 12, 2, CPU)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size: 2 has no effect at stage 2 on DeepSpeed"):
        ready(config, "deepspeed", 12, 2, CPU)
