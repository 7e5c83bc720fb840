"""Which way a metric is better: training.best.mode "auto" becomes the direction that the task states."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.task import Task


def with_direction(config: RunConfig, task: Task) -> RunConfig:
    """The configuration with a direction for the best metric, where the task states one.

    "auto" stays where it does not: the first evaluation knows whether the metric is measured at all. Raises ConfigError
    if the direction that was asked for contradicts the task's.
    """
    best = config.training.best
    stated = _direction(task, best.metric)
    if stated is None or best.mode == stated:
        return config
    if best.mode != "auto":
        worse = "lower" if stated == "max" else "higher"
        raise ConfigError(
            f"training.best.mode: {best.mode} would keep the worst weights, "
            f"since a {worse} '{best.metric}' is worse: set it to {stated}, or leave it out"
        )
    training = config.training.model_copy(update={"best": best.model_copy(update={"mode": stated})})
    return replace(config, training=training, origins=config.origins | {"training.best.mode": "the metric's direction"})


def _direction(task: Task, metric: str) -> Literal["min", "max"] | None:
    if metric == "loss":
        return "min"  # what training minimises
    return task.direction(metric)
