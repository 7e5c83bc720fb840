"""Learning-rate schedules: DeepSpeed's names, every class of torch.optim.lr_scheduler, a few of our own, and a user's.

    WarmupCosine  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then a half cosine to min_ratio x lr
    WarmupLinear  {"warmup": 0.1, "min_ratio": 0.0}   linear rise, then linear to min_ratio x lr
    Constant      {"warmup": 0.0}                      linear rise, then lr
    InverseSqrt   {"warmup": 10000}                    lr for `warmup` steps, then lr x sqrt(warmup / step), as T5's
    WarmupShape   see engine/optim/warmup_shape.py     a rise, then one of six shapes, by steps or by epochs

`warmup` below 1 is a share of all steps, from 1 on a number of steps. Every schedule counts optimizer steps that were
applied; past its last step it stays where it ended. "auto" stands for the run's number of steps in `total_num_steps`,
`T_max`, `total_steps` and `total_iters`, for a tenth of it in `warmup_num_steps`, and for the optimizer's rate in
`warmup_max_lr`. `trunkline.engine.config.typed_params` says which names and parameters there are.

The state of a schedule is that number: `forward` brings a new one to where another one is.

A schedule is of one rate. The rate of each group of parameters is that times the group's "lr_scale"
(engine/optim/parameter_rules.py), also where the schedule's parameters are absolute rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES, Shape
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.config.typed_params import OWN_SCHEDULES, scheduler_class, scheduler_params
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.parameter_rules import LR_SCALE
from trunkline.engine.optim.warmup_shape import warmup_shape

WARMUP_SHAPE = "WarmupShape"


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


class GroupSchedule:
    """A schedule that leads a group of its own, which an optimizer's groups follow."""

    def __init__(self, optimizer: Optimizer, section: Scheduler | None, total_steps: int) -> None:
        first = optimizer.param_groups[0]
        led = Optimizer(
            [torch.zeros(1)], {key: value for key, value in first.items() if key not in ("params", LR_SCALE)}
        )
        led._opt_called = True  # type: ignore[attr-defined]  # it never is: torch would warn of that
        self._led, self._given = led.param_groups[0], dict(led.param_groups[0])
        # Muon gives its groups rates of their own, in proportion
        self._groups = [
            (group, group.get(LR_SCALE, 1.0) * (1.0 if group["lr"] == first["lr"] else group["lr"] / first["lr"]))
            for group in optimizer.param_groups
        ]
        self._momenta: set[str] = set()
        self._inner = _schedule(led, section, total_steps)
        self._hand_on()

    @property
    def learning_rate(self) -> float:
        """The schedule's rate, which a group without "lr_scale" has."""
        return float(self._led["lr"])

    def step(self) -> None:
        """Count one more applied step."""
        self._inner.step()
        self._hand_on()

    def forward(self, steps: int) -> None:
        """As `steps` calls of `step`, to the last bit. torch's own schedules compute each rate from the one before, so
        they are stepped. The others jump."""
        if isinstance(self._inner, FormulaScheduler):
            self._inner.go_to(self._inner.applied_steps + steps)
        else:
            for _ in range(steps):
                self._inner.step()
                self._note_momenta()
        self._hand_on()

    def _note_momenta(self) -> None:
        self._momenta |= {key for key in ("betas", "momentum") if self._led.get(key) != self._given.get(key)}

    def _hand_on(self) -> None:
        self._note_momenta()
        momenta = {key: self._led[key] for key in self._momenta}
        for group, scale in self._groups:
            group.update(momenta, lr=self._led["lr"] * scale)


def build_scheduler(optimizer: Optimizer, section: Scheduler | None, total_steps: int) -> GroupSchedule:
    """The scheduler of a run. Raises ConfigError."""
    return GroupSchedule(optimizer, section, total_steps)


def _schedule(led: Optimizer, section: Scheduler | None, total_steps: int) -> Any:
    if section is None:
        return FormulaScheduler(led, partial(_own_shape, factor=partial(_constant, warmup=0)))
    params = decided(section, total_steps, led.param_groups[0]["lr"]).params
    params = OWN_SCHEDULES.get(section.type, {}) | params
    if section.type in _FACTORS:
        factor = _own_factor(section.type, params, total_steps)
        return FormulaScheduler(led, partial(_own_shape, factor=factor))
    try:
        if section.type == WARMUP_SHAPE:
            params |= {"warmup": _warmup_steps(params["warmup"], total_steps), "total": total_steps}
            return FormulaScheduler(led, partial(warmup_shape, **params))
        if section.type in DEEPSPEED_SCHEDULES:
            return FormulaScheduler(led, partial(DEEPSPEED_SCHEDULES[section.type], **params))
        return scheduler_class(section.type)(led, **params)
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
    "ConstantLR": "total_iters", **dict.fromkeys(("WarmupCosine", "WarmupLinear", "Constant"), "warmup"),
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
            scheduler.forward(step - done)
        except (ValueError, ArithmeticError) as error:
            assert section is not None
            raise _refused(section, section.params, error) from error
        rates[step], done = scheduler.learning_rate, step
        if not 0 <= rates[step] < math.inf:
            raise ConfigError(f"deepspeed.scheduler: the learning rate of step {step} is {rates[step]}; change params")
    return rates


def warmup_steps(section: Scheduler | None, total_steps: int) -> int:
    """Where the warm-up ends: the number of steps before the full learning rate, 0 without a warm-up."""
    if section is None:
        return 0
    params = decided(section, total_steps, 0.0).params
    if section.type in OWN_SCHEDULES and section.type != "InverseSqrt":  # which begins with the full rate
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


def _inverse_sqrt(step: int, warmup: int) -> float:
    return math.sqrt(max(1, warmup) / max(1, warmup, step))


_FACTORS: dict[str, Callable[..., float]] = {
    "WarmupCosine": _cosine, "WarmupLinear": _linear, "Constant": _constant, "InverseSqrt": _inverse_sqrt,
}  # fmt: skip


def _warmup_steps(warmup: float, total_steps: int) -> int:
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def _own_factor(name: str, params: dict[str, Any], total_steps: int) -> Callable[[int], float]:
    extra = {"total": total_steps, "min_ratio": params["min_ratio"]} if "min_ratio" in params else {}
    return partial(_FACTORS[name], warmup=_warmup_steps(params["warmup"], total_steps), **extra)


def _own_shape(group: dict[str, Any], factor: Callable[[int], float]) -> Shape:
    lr = group["lr"]
    return lambda step: {"lr": lr * factor(step)}
