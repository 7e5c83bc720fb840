"""The schedule that a run follows, as its checkpoints keep it: what a resume says where it follows another one.

kept["schedule"] = followed(config, total_steps) | {"rate": backend.learning_rate()}
note_of_change(kept, followed(config, total_steps), step, rate)
"""

from __future__ import annotations

from typing import Any

from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.strict import show


def followed(config: RunConfig, total_steps: int) -> dict[str, Any]:
    """Length, rate and schedule of a run whose configuration is ready (readiness.py), ready for JSON."""
    section = config.deepspeed
    schedule = None if section.scheduler is None else section.scheduler.model_dump(mode="json")
    return {"steps": total_steps, "lr": section.optimizer.params["lr"], "scheduler": schedule}


def note_of_change(before: dict[str, Any], now: dict[str, Any], step: int, rate: float) -> list[str]:
    """One line, if the run follows another schedule from `step` on, where its rate is `rate` now.

    `before` is what the checkpoint kept: `followed`, and the "rate" that its own schedule had for that step.
    """
    changes = [f"{key} {show(before[key])} -> {show(now[key])}" for key in now if before.get(key, now[key]) != now[key]]
    if not changes:
        return []
    return [
        f"note: a new schedule holds from step {step} on, {', '.join(changes)}: the rate there is {rate:.3g}, it would "
        f"have been {before['rate']:.3g}"
    ]
