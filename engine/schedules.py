"""Learning-rate schedules: DeepSpeed's names, every class of torch.optim.lr_scheduler, and a few of our own.

    WarmupCosine  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then a half cosine to min_ratio x lr
    WarmupLinear  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then linear to min_ratio x lr
    Constant      {"warmup": 0.0}                      linear rise, then lr

`warmup` below 1 is a share of all steps, from 1 on a number of steps. Every schedule counts optimizer steps that were
applied; past its last step it stays where it ended. "auto" stands for the run's number of steps in `total_num_steps`,
`T_max`, `total_steps` and `total_iters`.
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from engine.deepspeed_section import Scheduler
from engine.errors import ConfigError
from engine.strict import nearest

DEEPSPEED_SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_TOTALS = ("total_num_steps", "T_max", "total_steps", "total_iters")


def build_scheduler(optimizer: Optimizer, section: Scheduler | None, total_steps: int) -> Any:
    """The scheduler of a run, an object with step(), state_dict() and load_state_dict(). Raises ConfigError."""
    if section is None:
        return lr_scheduler.LambdaLR(optimizer, partial(_constant, warmup=0))
    params = {
        key: total_steps if key in _TOTALS and value == "auto" else value for key, value in section.params.items()
    }
    if section.type in _OWN:
        return _build_own(optimizer, section.type, params, total_steps)
    _check_params(_schedule_class(section.type), section.type, params)
    try:
        return _schedule_class(section.type)(optimizer, **params)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"deepspeed.scheduler.params: {section.type} does not accept {params}: {error}") from error


def learning_rates(section: Scheduler | None, lr: float, total_steps: int, steps: list[int]) -> dict[int, float]:
    """The learning rate in force at each of `steps`, from the scheduler itself on a dummy optimizer."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(optimizer, section, total_steps)
    rates = {}
    for step in range(max(steps) + 1):
        if step in steps:
            rates[step] = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def warmup_steps(section: Scheduler | None, total_steps: int) -> int:
    """Where the warm-up ends: the number of steps before the full learning rate, 0 without a warm-up."""
    if section is None:
        return 0
    if section.type in _OWN:
        return _warmup_steps(section.params.get("warmup", _OWN[section.type][1]["warmup"]), total_steps)
    if section.type in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        return int(section.params.get("warmup_num_steps", 1000))
    if section.type == "OneCycleLR":
        return int(section.params.get("pct_start", 0.3) * total_steps) - 1
    return 0


def _constant(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _cosine(step: int, warmup: int, total: int, min_ratio: float) -> float:
    progress = min(1.0, max(0, step - warmup) / max(1, total - 1 - warmup))
    return _constant(step, warmup) * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _linear(step: int, warmup: int, total: int, min_ratio: float) -> float:
    progress = min(1.0, max(0, step - warmup) / max(1, total - 1 - warmup))
    return _constant(step, warmup) * (1 - (1 - min_ratio) * progress)


_OWN: dict[str, tuple[Any, dict[str, float]]] = {
    "WarmupCosine": (_cosine, {"warmup": 0.1, "min_ratio": 0.0}),
    "WarmupLinear": (_linear, {"warmup": 0.1, "min_ratio": 0.0}),
    "Constant": (_constant, {"warmup": 0.0}),
}


def _warmup_steps(warmup: float, total_steps: int) -> int:
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def _build_own(optimizer: Optimizer, name: str, params: dict[str, Any], total_steps: int) -> lr_scheduler.LambdaLR:
    shape, known = _OWN[name]
    for key, value in params.items():
        if key not in known:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: unknown to {name}{nearest(key, list(known))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: expected a number from 0 on, found {value!r}")
    values = known | params
    if values.get("min_ratio", 0) > 1:
        raise ConfigError(f"deepspeed.scheduler.params.min_ratio: expected at most 1, found {values['min_ratio']}")
    extra = {"total": total_steps, "min_ratio": values["min_ratio"]} if "min_ratio" in known else {}
    return lr_scheduler.LambdaLR(
        optimizer, partial(shape, warmup=_warmup_steps(values["warmup"], total_steps), **extra)
    )


def _schedule_class(name: str) -> Any:
    if name in DEEPSPEED_SCHEDULES:
        try:
            from deepspeed.runtime import lr_schedules
        except ImportError as error:
            raise ConfigError(f"deepspeed.scheduler.type: {name} is DeepSpeed's, which is not installed") from error
        return getattr(lr_schedules, name)
    torch_names = [
        key
        for key, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not key.startswith("_")
    ]
    if name == "ReduceLROnPlateau":
        raise ConfigError(
            "deepspeed.scheduler.type: ReduceLROnPlateau follows a metric, not the step; use WarmupCosine"
        )
    if name not in torch_names:
        known = [*_OWN, *DEEPSPEED_SCHEDULES, *torch_names]
        raise ConfigError(f"deepspeed.scheduler.type: unknown schedule '{name}'{nearest(name, known)}")
    return getattr(lr_scheduler, name)


def _check_params(cls: Any, name: str, params: dict[str, Any]) -> None:
    known = [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "optimizer")]
    for key in params:
        if key not in known:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: unknown to {name}{nearest(key, known)}")
