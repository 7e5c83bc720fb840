"""Parameters of every optimizer and schedule are typed: what is none of theirs is named before anything is built."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES
from trunkline.engine.config.deepspeed_section import Optimizer, Scheduler
from trunkline.engine.config.strict import validated
from trunkline.engine.config.typed_params import (
    DEEPSPEED_ONLY,
    OWN_SCHEDULES,
    known_scheduler,
    optimizer_params,
    scheduler_params,
)
from trunkline.engine.errors import ConfigError

TORCH = [
    key for key, value in vars(torch.optim).items() if inspect.isclass(value) and key not in ("Optimizer", "LBFGS")
]
OPTIMIZERS = [*TORCH, *DEEPSPEED_ONLY, "Adam", "apex.FusedAdam", "apex.FusedSGD"]


def is_known(kind: str) -> bool:
    try:
        return bool(known_scheduler(kind))
    except ValueError:
        return False


SCHEDULES = [kind for kind in (*OWN_SCHEDULES, *DEEPSPEED_SCHEDULES, *vars(lr_scheduler)) if is_known(kind)]


def optimizer(kind: str, **params: Any) -> Optimizer:
    return validated(Optimizer, {"type": kind, "params": {"lr": 0.1} | params}, "deepspeed.optimizer", "run.json")


def scheduler(kind: str, **params: Any) -> Scheduler:
    return validated(Scheduler, {"type": kind, "params": params}, "deepspeed.scheduler", "run.json")


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1, [1], True, "auto", "0.1", {}], ids=repr)
def test_no_optimizer_takes_a_rate_that_is_no_number(kind: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^run.json: deepspeed.optimizer.params.lr: [^\n]*$"):
        optimizer(kind, lr=value)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_no_parameter_of_any_optimizer_takes_what_is_not_of_its_kind(kind: str) -> None:
    """A list, an object and, where the default is not null, null are values of nothing that takes one value."""
    for key, field in optimizer_params(kind).model_fields.items():
        pair = isinstance(field.default, tuple) or key in ("betas", "etas", "step_sizes")
        for value in (
            {},
            [[]],
            "yes",
            *([] if field.default is None else [None]),
            *([0.5, [0.5]] if pair else [[1, 2]]),
        ):
            with pytest.raises(ConfigError, match=rf"run.json: deepspeed.optimizer.params.{key}"):
                optimizer(kind, **{key: value})


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("AdamW", {"amsgrad": "false"}, 'params.amsgrad: .*boolean, found "false"'),
        ("AdamW", {"amsgrad": 1}, "params.amsgrad: .*boolean, found 1"),
        ("AdamW", {"foreach": 0}, "params.foreach: .*boolean, found 0"),
        ("AdamW", {"differentiable": []}, "params.differentiable: .*boolean"),
        ("AdamW", {"betas": [0.9, 1.0]}, r"params.betas.1: .*less than 1, found 1"),
        ("AdamW", {"betas": [0.9, 0.99, 0.999]}, "params.betas: .*at most 2"),
        ("AdamW", {"betas": [0.9]}, r"params.betas.1: missing; the list needs this value too"),
        ("AdamW", {"betas": [True, 0.9]}, r"params.betas.0: .*number, found true"),
        ("AdamW", {"eps": 0}, "params.eps: .*greater than 0"),
        ("AdamW", {"weight_decay": -0.1}, "params.weight_decay: .*greater than or equal to 0"),
        ("AdamW", {"weight_decay": None}, "params.weight_decay: .*number, found null"),
        ("SGD", {"momentum": 1.5}, "params.momentum: .*less than 1"),
        ("Rprop", {"etas": [1.5, 1.2]}, r"params.etas.0: .*less than 1"),
        ("Adadelta", {"rho": 2}, "params.rho: .*less than or equal to 1"),
        ("Lion", {"momentum": 0.9}, "params.momentum: unknown to Lion"),
        ("Muon", {"ns_method": "fast"}, "params.ns_method: .*'gram' or 'standard'"),
        ("apex.FusedAdam", {"adam_w_mode": "yes"}, "params.adam_w_mode: .*boolean"),
        ("Lamb", {"max_grad_norm": 1}, "params.max_grad_norm: unknown to Lamb"),
    ],
)
def test_a_parameter_of_an_optimizer_is_named(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer(kind, **params)


@pytest.mark.parametrize("kind", [kind for kind in TORCH if kind != "Muon"])  # that name is DeepSpeed's
def test_the_defaults_of_torch_s_optimizers_are_values_of_their_types(kind: str) -> None:
    defaults = {key: field.default for key, field in optimizer_params(kind).model_fields.items() if key != "lr"}
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert optimizer(kind, **given).params == {"lr": 0.1} | given


def test_all_parameters_are_named_at_once_and_whole_numbers_are_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        optimizer("AdamW", lr=True, betas=0.9, weigth_decay=1)
    assert len(str(caught.value).splitlines()) == 3
    assert "params.weigth_decay: unknown to AdamW; did you mean 'weight_decay'?" in str(caught.value)
    assert optimizer("SGD", lr=1, momentum=0).params == {"lr": 1.0, "momentum": 0.0}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_parameter_of_any_schedule_takes_what_is_not_of_its_kind(kind: str) -> None:
    assert scheduler_params(kind).model_fields
    for key, field in scheduler_params(kind).model_fields.items():
        for value in ({}, [[]], "ten", -1, *([] if field.default is None else [None])):
            with pytest.raises(ConfigError, match=rf"run.json: deepspeed.scheduler.params.{key}"):
                scheduler(kind, **{key: value})


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_defaults_of_schedules_are_values_of_their_types(kind: str) -> None:
    fields = scheduler_params(kind).model_fields
    required = {key: [3] if key == "milestones" else 1 for key, field in fields.items() if field.is_required()}
    required |= {"gamma": 0.5} if "gamma" in required else {}
    given = {key: field.default for key, field in fields.items() if field.default is not None and key not in required}
    assert scheduler(kind, **required | given).params == required | given


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupCosine", {"warmup": "10%"}, 'params.warmup: .*a share of the run.*found "10%"'),
        ("WarmupCosine", {"warmup": [1]}, "params.warmup: .*found"),
        ("WarmupCosine", {"warmup": 2.5}, "params.warmup: .*found 2.5"),
        ("WarmupCosine", {"warmup": True}, "params.warmup: .*found true"),
        ("CosineAnnealingLR", {"T_max": 0}, 'params.T_max: must be a positive integer, or "auto", found 0'),
        ("StepLR", {"step_size": 3, "gamma": "0.9"}, 'params.gamma: .*number, found "0.9"'),
        ("StepLR", {"step_size": 2.5}, "params.step_size: .*integer"),
        ("StepLR", {"step_size": "auto"}, 'params.step_size: nothing decides "auto" here'),
        ("MultiStepLR", {"milestones": [3, 0]}, r"params.milestones.1: .*greater than 0"),
        ("OneCycleLR", {"max_lr": [0.1, 0.2]}, "params.max_lr: expected a number from 0 on"),
        ("OneCycleLR", {"max_lr": 0.1, "anneal_strategy": "exp"}, "params.anneal_strategy: .*'cos' or 'linear'"),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "scale_fn": "lambda x: x"}, "params.scale_fn"),
        ("LambdaLR", {"lr_lambda": "x"}, "scheduler.type: LambdaLR takes a function, which JSON cannot hold"),
        ("SequentialLR", {"schedulers": []}, "scheduler.type: SequentialLR takes other schedules"),
        ("WarmupLR", {"warmup_num_steps": math.inf}, "params.warmup_num_steps: must be"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1, "cycle_momentum": 1}, "params.cycle_momentum: .*boolean"),
        ("LRRangeTest", {"lr_range_test_staircase": "no"}, "params.lr_range_test_staircase: .*boolean"),
    ],
)
def test_a_parameter_of_a_schedule_is_named(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler(kind, **params)
