"""The schedule WarmupShape: a rise from a share of the rate, then one of six shapes, held for `every` steps at a time.

With `every` an epoch it is the schedule of YOLO's trainers: at epoch e of E with a warm-up of w epochs the rate is
lr (start_ratio + (1 - start_ratio) e / w), then final + (lr - final) f((e - w) / (E - w)) with
final = max(min_ratio lr, min_lr).

    f(p)  cosine            (1 + cos(pi p)) / 2
          cosine_restarts   the same in three equal cycles, each of which begins with the full rate
          step              the same over the first 70 %, then 0
          linear            1 - p
          polynomial        (1 - p)^0.9
          constant          1

What has a momentum rises in it too, from `start_momentum` to the optimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from trunkline.engine.config.deepspeed_schedules import Shape

_CYCLES, _FALL, _POWER = 3, 0.7, 0.9


def _cosine(p: float) -> float:
    return (1 + math.cos(math.pi * p)) / 2


SHAPES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda passed, length: _cosine(passed / length),
    # in integers, so that a cycle begins where it does
    "cosine_restarts": lambda passed, length: _cosine((_CYCLES * passed % length) / length if passed < length else 1.0),
    "step": lambda passed, length: _cosine(min(1.0, passed / (_FALL * length))),
    "linear": lambda passed, length: 1 - passed / length,
    "polynomial": lambda passed, length: (1 - passed / length) ** _POWER,
    "constant": lambda passed, length: 1.0,
}
"""By name: (steps since the warm-up, steps from there to the end) -> the share of the way from the last rate to lr."""


def warmup_shape(
    group: dict[str, Any], total: int, shape: str, warmup: int, start_ratio: float, min_ratio: float, min_lr: float,
    every: int, start_momentum: float | None,
) -> Shape:  # fmt: skip
    """The parameters are those of the schedule; `warmup` and `every` in steps. Raises ValueError."""
    momentum: Any = group.get("momentum")
    if start_momentum is not None and not momentum:
        raise ValueError(
            f"start_momentum {start_momentum:g}: the optimizer has no momentum: remove it, or set momentum"
        )
    lr, length = group["lr"], max(1, total - warmup)
    final = max(min_ratio * lr, min_lr)
    if final > lr:
        raise ValueError(f"min_lr {min_lr:g} is above the optimizer's lr {lr:g}: write a lower one")

    def at(step: int) -> dict[str, Any]:
        now = step // every * every
        risen = min(1.0, now / warmup) if warmup else 1.0
        if risen < 1:
            found = {"lr": lr * (start_ratio + (1 - start_ratio) * risen)}
        else:
            found = {"lr": final + (lr - final) * SHAPES[shape](min(now - warmup, length), length)}
        if start_momentum is not None:
            found["momentum"] = start_momentum + (momentum - start_momentum) * risen
        return found

    return at
