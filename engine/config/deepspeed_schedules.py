"""DeepSpeed's five schedules as functions of the number of applied steps.

No run needs DeepSpeed for them.

Each function takes a parameter group and the schedule's parameters, under DeepSpeed's names and with its defaults, and
returns what the group holds after any number of steps. The values equal DeepSpeed's to the last bit, its beginning
included: WarmupLR, WarmupDecayLR and WarmupCosineLR give their lowest rate twice, and OneCycle begins with the lowest
momentum although the rate is lowest too. What DeepSpeed only warns about is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Shape = Callable[[int], dict[str, Any]]
"""Number of applied steps -> the values of a parameter group."""


def _warmup_lr(
    group: dict[str, Any],
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float | None = None,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Shape:
    low, high = _one(warmup_min_lr), group["lr"] if warmup_max_lr is None else _one(warmup_max_lr)
    rise = _warmup(warmup_num_steps, warmup_type)

    def at(step: int) -> dict[str, Any]:
        if step == 0:
            return {"lr": low}
        ratio = rise(step - 1)
        return {"lr": low + (high - low) * (1.0 if ratio is None else ratio)}

    return at


def _warmup_decay_lr(
    group: dict[str, Any],
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Shape:
    low, high = _one(warmup_min_lr), _one(warmup_max_lr)
    rise = _warmup(warmup_num_steps, warmup_type)
    decay_steps = max(1.0, total_num_steps - max(2, warmup_num_steps))

    def at(step: int) -> dict[str, Any]:
        if step == 0:
            return {"lr": low}
        ratio = rise(step - 1)
        if ratio is None:
            ratio = max(0.0, (total_num_steps - (step - 1)) / decay_steps)
        return {"lr": low + (high - low) * ratio}

    return at


def _warmup_cosine_lr(
    group: dict[str, Any],
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> Shape:
    lr, rise = group["lr"], _warmup(warmup_num_steps, warmup_type)
    first = max(2, warmup_num_steps)

    def at(step: int) -> dict[str, Any]:
        if step == 0:
            return {"lr": 0.0}
        ratio = rise(step - 1)
        if ratio is not None:
            return {"lr": lr * (warmup_min_ratio + ratio * (1.0 - warmup_min_ratio))}
        progress = min(1.0, (step - first) / max(1, total_num_steps - first))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return {"lr": lr * max(0.0, cos_min_ratio + (1.0 - cos_min_ratio) * cosine)}

    return at


def _warmup(num_steps: int, kind: str) -> Callable[[int], float | None]:
    """Place in the warm-up -> share of the rise; None after it."""
    _positive("warmup_num_steps", num_steps)
    if kind not in ("log", "linear"):
        raise ValueError(f"warmup_type must be 'log' or 'linear', found {kind!r}")
    length = max(2, num_steps)
    inverse_log = 1.0 / math.log(length)

    def rise(place: int) -> float | None:
        if place >= length:
            return None
        return inverse_log * math.log(place + 1) if kind == "log" else place / length

    return rise


def _one_cycle(
    group: dict[str, Any],
    cycle_min_lr: float,
    cycle_max_lr: float,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: float = 2000,
    cycle_second_step_size: float | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: float = 0,
    cycle_momentum: bool | None = None,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
) -> Shape:
    first = float(cycle_first_step_size)
    second = first if cycle_second_step_size is None else float(cycle_second_step_size)
    if first <= 0 or second < 0:
        raise ValueError(f"cycle_first_step_size must be positive and the second not negative, found {first}, {second}")
    if cycle_momentum and "betas" not in group:
        raise ValueError("cycle_momentum needs an optimizer with betas; set it to false")
    momentum = "betas" in group if cycle_momentum is None else cycle_momentum
    stairs_up = cycle_first_stair_count
    stairs_down = stairs_up if cycle_second_stair_count is None else cycle_second_stair_count
    low, high = _one(cycle_min_lr), _one(cycle_max_lr)
    low_mom, high_mom = _one(cycle_min_mom), _one(cycle_max_mom)
    total = first + second
    peak = first / total

    def height(step: int) -> float:
        """0 at the ends of the cycle, 1 at its peak."""
        x = 1.0 + step / total - math.floor(1 + step / total)
        rising = x <= peak
        stairs = stairs_up if rising else stairs_down
        if stairs <= 0:
            return x / peak if rising else (x - 1) / (peak - 1)
        place = step % total
        position = place * stairs / first if place <= first else (total - place) * stairs / second
        return math.floor(position) / stairs

    def at(step: int) -> dict[str, Any]:
        if step == 0:
            lr, mom = low, low_mom
        elif step - 1 < total:
            scale = height(step)
            lr, mom = low + (high - low) * scale, high_mom - (high_mom - low_mom) * scale
        else:
            intervals = (step - total) / decay_step_size if decay_step_size else 0.0
            lr = low / (1 + decay_lr_rate * intervals)
            mom = high_mom * (1 + decay_mom_rate * intervals)
        return {"lr": lr, "betas": (mom, 0.99)} if momentum else {"lr": lr}

    return at


def _lr_range_test(
    group: dict[str, Any],
    lr_range_test_min_lr: float = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> Shape:
    _positive("lr_range_test_step_size", lr_range_test_step_size)
    low = _one(lr_range_test_min_lr)

    def at(step: int) -> dict[str, Any]:
        interval = step / lr_range_test_step_size
        return {
            "lr": low * (1 + lr_range_test_step_rate * (math.floor(interval) if lr_range_test_staircase else interval))
        }

    return at


def _one(value: Any) -> float:
    """The value for the only parameter group, also where it is given as a list with one entry for each group."""
    if isinstance(value, list):
        (value,) = value
    return float(value)


def _positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} must be a positive integer, found {value!r}")


DEEPSPEED_SCHEDULES: dict[str, Callable[..., Shape]] = {
    "LRRangeTest": _lr_range_test,
    "OneCycle": _one_cycle,
    "WarmupLR": _warmup_lr,
    "WarmupDecayLR": _warmup_decay_lr,
    "WarmupCosineLR": _warmup_cosine_lr,
}
