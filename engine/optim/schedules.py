"""Learning-rate schedules: DeepSpeed's names, every class of torch.optim.lr_scheduler, a few of our own, and a user's.

    WarmupCosine  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then a half cosine to min_ratio x lr
    WarmupLinear  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then linear to min_ratio x lr
    Constant      {"warmup": 0.0}                      linear rise, then lr

`warmup` below 1 is a share of all steps, from 1 on a number of steps. Every schedule counts optimizer steps that were
applied; past its last step it stays where it ended. "auto" stands for the run's number of steps in `total_num_steps`,
`T_max`, `total_steps` and `total_iters`, for a tenth of it in `warmup_num_steps`, and for the optimizer's rate in
`warmup_max_lr`. `trunkline.engine.config.typed_params` says which names and parameters there are.

The state of a schedule is that number: `fast_forward` brings a new one to where another one is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES, Shape
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.config.typed_params import OWN_SCHEDULES, scheduler_class, scheduler_params
from trunkline.engine.errors import ConfigError


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
    params = decided(section, total_steps, optimizer.param_groups[0]["lr"]).params
    if section.type in OWN_SCHEDULES:
        factor = _own_factor(section.type, OWN_SCHEDULES[section.type] | params, total_steps)
        return FormulaScheduler(optimizer, partial(_own_shape, factor=factor))
    try:
        if section.type in DEEPSPEED_SCHEDULES:
            return FormulaScheduler(optimizer, partial(DEEPSPEED_SCHEDULES[section.type], **params))
        return scheduler_class(section.type)(optimizer, **params)
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(section, params, error) from error


def decided(section: Scheduler, total_steps: int, lr: float) -> Scheduler:
    """The schedule with a value for each "auto"."""
    values = {"warmup_num_steps": max(1, round(0.1 * total_steps)), "warmup_max_lr": lr}
    params = {key: values.get(key, total_steps) if value == "auto" else value for key, value in section.params.items()}
    return section.model_copy(update={"params": params})


_RISES = {
    "WarmupLR": "warmup_num_steps", "WarmupDecayLR": "warmup_num_steps", "WarmupCosineLR": "warmup_num_steps",
    "OneCycle": "cycle_first_step_size", "CyclicLR": "step_size_up", "LinearLR": "total_iters",
    "ConstantLR": "total_iters", **dict.fromkeys(OWN_SCHEDULES, "warmup"),
}  # fmt: skip
_ENDS = {"WarmupDecayLR": "total_num_steps", "WarmupCosineLR": "total_num_steps", "OneCycleLR": "total_steps"}


def check_length(section: Scheduler, total_steps: int) -> None:
    """Raise ConfigError for a schedule without "auto" that rises for longer than the run, or has ended before it."""
    defaults = {key: field.default for key, field in scheduler_params(section.type).model_fields.items()}
    params, where = defaults | section.params, "deepspeed.scheduler.params"
    key = _RISES.get(section.type, "")
    falls = section.type == "LinearLR" and params["start_factor"] > params["end_factor"]
    if key and not falls and params[key] > total_steps:
        by_default = "" if key in section.params else ", the default,"
        raise ConfigError(
            f"{where}.{key}: {params[key]:g}{by_default} is more than the run's {total_steps} steps, so the full "
            "learning rate is never reached: write fewer, or train for longer"
        )
    key = _ENDS.get(section.type, "")
    end = params.get(key)
    if section.type == "OneCycleLR" and end is None and params["epochs"] and params["steps_per_epoch"]:
        key, end = "steps_per_epoch", params["epochs"] * params["steps_per_epoch"]
    if isinstance(end, int) and end < total_steps:
        raise ConfigError(
            f"{where}.{key}: the schedule ends after {end} steps, and the run has {total_steps}: write "
            f'"{_ENDS[section.type]}": "auto", which is the number of the run'
        )


def _refused(section: Scheduler, params: dict[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"deepspeed.scheduler.params: {section.type} does not accept {params}: {error}")


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


def learning_rates(
    section: Scheduler | None, lr: float, total_steps: int, steps: list[int], optimizer: Optimizer | None = None
) -> dict[int, float]:
    """The learning rate in force at each of `steps`, from the scheduler itself on a fresh optimizer, AdamW by default.

    Raises ConfigError where there is none, or one that is no rate.
    """
    optimizer = optimizer or torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(optimizer, section, total_steps)
    rates, done = {}, 0
    for step in sorted(steps):
        try:
            fast_forward(scheduler, step - done)
        except (ValueError, ArithmeticError) as error:
            assert section is not None
            raise _refused(section, section.params, error) from error
        rates[step], done = float(optimizer.param_groups[0]["lr"]), step
        if not 0 <= rates[step] < math.inf:
            raise ConfigError(f"deepspeed.scheduler: the learning rate of step {step} is {rates[step]}; change params")
    return rates


def warmup_steps(section: Scheduler | None, total_steps: int) -> int:
    """Where the warm-up ends: the number of steps before the full learning rate, 0 without a warm-up."""
    if section is None:
        return 0
    params = decided(section, total_steps, 0.0).params
    if section.type in OWN_SCHEDULES:
        return _warmup_steps(params.get("warmup", OWN_SCHEDULES[section.type]["warmup"]), total_steps)
    if section.type in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        return int(params.get("warmup_num_steps", 1000))
    if section.type == "OneCycleLR":
        return int(params.get("pct_start", 0.3) * total_steps) - 1
    return 0


def _constant(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / (warmup + 1))


def _cosine(step: int, warmup: int, total: int, min_ratio: float) -> float:
    progress = min(1.0, max(0, step - warmup) / max(1, total - 1 - warmup))
    return _constant(step, warmup) * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _linear(step: int, warmup: int, total: int, min_ratio: float) -> float:
    progress = min(1.0, max(0, step - warmup) / max(1, total - 1 - warmup))
    return _constant(step, warmup) * (1 - (1 - min_ratio) * progress)


_FACTORS: dict[str, Callable[..., float]] = {"WarmupCosine": _cosine, "WarmupLinear": _linear, "Constant": _constant}


def _warmup_steps(warmup: float, total_steps: int) -> int:
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def _own_factor(name: str, params: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    extra = {"total": total_steps, "min_ratio": params["min_ratio"]} if "min_ratio" in params else {}
    return partial(_FACTORS[name], warmup=_warmup_steps(params["warmup"], total_steps), **extra)


def _own_shape(group: dict[str, Any], factor: Callable[[int], float]) -> Shape:
    lr = group["lr"]
    return lambda step: {"lr": lr * factor(step)}
