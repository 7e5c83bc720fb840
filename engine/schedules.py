"""Learning-rate schedules: DeepSpeed's names, every class of torch.optim.lr_scheduler, and a few of our own.

    WarmupCosine  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then a half cosine to min_ratio x lr
    WarmupLinear  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then linear to min_ratio x lr
    Constant      {"warmup": 0.0}                      linear rise, then lr

`warmup` below 1 is a share of all steps, from 1 on a number of steps. Every schedule counts optimizer steps that were
applied; past its last step it stays where it ended. "auto" stands for the run's number of steps in `total_num_steps`,
`T_max`, `total_steps` and `total_iters`.

The state of a schedule is that number: `fast_forward` brings a new one to where another one is.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from engine.deepspeed_schedules import DEEPSPEED_SCHEDULES, Shape
from engine.deepspeed_section import Scheduler
from engine.errors import ConfigError
from engine.strict import nearest

_TOTALS = ("total_num_steps", "T_max", "total_steps", "total_iters")


class FormulaScheduler:
    """A schedule that gives what a parameter group holds as a function of the number of applied steps."""

    def __init__(self, optimizer: Optimizer, shape: Callable[[dict[str, Any]], Shape]) -> None:
        self._shapes = [(group, shape(group)) for group in optimizer.param_groups]
        self.go_to(0)

    def step(self) -> None:
        """Count one more applied step."""
        self.go_to(self.applied_steps + 1)

    def go_to(self, applied_steps: int) -> None:
        """Set the optimizer's groups to what they hold after this many steps."""
        self.applied_steps = applied_steps
        for group, at in self._shapes:
            group.update(at(applied_steps))


def build_scheduler(optimizer: Optimizer, section: Scheduler | None, total_steps: int) -> Any:
    """The scheduler of a run, an object with step(). Raises ConfigError."""
    if section is None:
        return FormulaScheduler(optimizer, partial(_own_shape, factor=partial(_constant, warmup=0)))
    params = {
        key: total_steps if key in _TOTALS and value == "auto" else value for key, value in section.params.items()
    }
    if section.type in _OWN:
        factor = _own_factor(section.type, params, total_steps)
        return FormulaScheduler(optimizer, partial(_own_shape, factor=factor))
    try:
        if section.type in DEEPSPEED_SCHEDULES:
            shape = DEEPSPEED_SCHEDULES[section.type]
            _check_params(shape, section.type, params)
            return FormulaScheduler(optimizer, partial(shape, **params))
        cls = _torch_schedule(section.type)
        _check_params(cls, section.type, params)
        return cls(optimizer, **params)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"deepspeed.scheduler.params: {section.type} does not accept {params}: {error}") from error


def fast_forward(scheduler: Any, applied_steps: int) -> None:
    """Bring a scheduler, and what it sets in its optimizer, to where they are after so many more calls of step().

    The result is that of the calls, to the last bit. torch's own schedules compute each rate from the one before, so
    they are stepped; the others jump.
    """
    if isinstance(scheduler, FormulaScheduler):
        scheduler.go_to(scheduler.applied_steps + applied_steps)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        for _ in range(applied_steps):
            scheduler.step()


def learning_rates(section: Scheduler | None, lr: float, total_steps: int, steps: list[int]) -> dict[int, float]:
    """The learning rate in force at each of `steps`, from the scheduler itself on a dummy optimizer."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(optimizer, section, total_steps)
    rates, done = {}, 0
    for step in sorted(steps):
        fast_forward(scheduler, step - done)
        rates[step], done = float(optimizer.param_groups[0]["lr"]), step
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


def _own_factor(name: str, params: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    factor, known = _OWN[name]
    for key, value in params.items():
        if key not in known:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: unknown to {name}{nearest(key, list(known))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: expected a number from 0 on, found {value!r}")
    values = known | params
    if values.get("min_ratio", 0) > 1:
        raise ConfigError(f"deepspeed.scheduler.params.min_ratio: expected at most 1, found {values['min_ratio']}")
    extra = {"total": total_steps, "min_ratio": values["min_ratio"]} if "min_ratio" in known else {}
    return partial(factor, warmup=_warmup_steps(values["warmup"], total_steps), **extra)


def _own_shape(group: dict[str, Any], factor: Callable[[int], float]) -> Shape:
    lr = group["lr"]
    return lambda step: {"lr": lr * factor(step)}


def _torch_schedule(name: str) -> Any:
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
    known = [key for key in inspect.signature(cls).parameters if key not in ("optimizer", "group", "last_epoch")]
    for key in params:
        if key not in known:
            raise ConfigError(f"deepspeed.scheduler.params.{key}: unknown to {name}{nearest(key, known)}")
