"""The plan of a run that is not started: `--plan`, also where there are no data yet.

plan = preview(task, config, world_size, backend, samples=20_000)     as make_plan gives it
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import MissingDataError
from trunkline.engine.machine.hardware import choose_device
from trunkline.engine.optim.parameter_rules import freeze
from trunkline.engine.plan import lengths_in_epochs, make_plan, planned_batches, total_steps
from trunkline.engine.readiness import check_backend, ready
from trunkline.engine.task import Task


def preview(task: Task, config: RunConfig, world_size: int, backend: str, samples: int | None = None) -> dict[str, Any]:
    """The plan, with null for what only the data say.

    Raises ConfigError as a run does before its first step. Where the number of steps is not known, optimizer and
    schedule are not tried.

    samples: stands in for the number of training samples
    """
    batches = None
    try:
        batches = planned_batches(task, config, world_size, samples=samples)
        config = config.in_steps(batches.per_epoch)
    except MissingDataError:
        pass
    steps = total_steps(config, batches)
    if steps is not None and not lengths_in_epochs(config):
        config = ready(config, backend, steps, world_size, choose_device(None))
    else:
        check_backend(config, backend, world_size)
    model: nn.Module | MissingDataError
    try:
        model = freeze(task.build_model(), config)
    except MissingDataError as error:
        model = error
    return make_plan(task, config, world_size, model, samples=samples, backend=backend)
