"""The workloads by name. To add one: a folder under models/ and a line here; nothing in engine/ changes."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from trunkline.engine.checkpoint.weights import read_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.strict import nearest
from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.task import Task, checked_task


@dataclass(frozen=True)
class Workload:
    """Where a workload's parts are, as "module:name", so that listing workloads imports none of them.

    `evaluate` and `predict` name modules with add_arguments(parser) and run(arguments), which the launchers of those
    names enter. `weights` makes a task that has no data, for the names of its weights. `flags` gives short command-line
    flags of launchers/train.py: flag -> dotted key of the configuration.
    """

    data: str
    model: str
    task: str
    evaluate: str
    predict: str
    weights: str | None = None
    flags: dict[str, str] = field(default_factory=dict)

    def open(self, room: str) -> ModuleType:
        """The module "evaluate" or "predict" of the workload."""
        return importlib.import_module(getattr(self, room))


WORKLOADS = {
    "fluid": Workload(
        data="trunkline.models.fluid.config:FluidData",
        model="trunkline.models.fluid.config:FluidModel",
        task="trunkline.models.fluid.task:FluidTask",
        evaluate="trunkline.models.fluid.evaluate",
        predict="trunkline.models.fluid.predict",
        weights="trunkline.models.fluid.task:weights_task",
        flags={"--store": "data.store"},
    ),
    "causal_lm": Workload(
        data="trunkline.models.causal_lm.config:CausalLMData",
        model="trunkline.models.causal_lm.config:CausalLMModel",
        task="trunkline.models.causal_lm.task:make_task",
        evaluate="trunkline.models.causal_lm.evaluate",
        predict="trunkline.models.causal_lm.predict",
        weights="trunkline.models.causal_lm.task:weights_task",
        flags={"--store": "data.store", "--model-path": "model.path"},
    ),
}


def config_sections(workload: str) -> tuple[type[BaseModel], type[BaseModel]]:
    """The models of a workload's "data" and "model" sections. Raises ConfigError for an unknown name."""
    if workload not in WORKLOADS:
        raise ConfigError(f"workload: unknown '{workload}'{nearest(workload, list(WORKLOADS))}")
    return _load(WORKLOADS[workload].data), _load(WORKLOADS[workload].model)


def make_task(config: RunConfig) -> Task:
    """The task of a run, made from its "data" and "model" sections."""
    return checked_task(_load(WORKLOADS[config.workload].task)(config.data, config.model))


def weights_task(config: RunConfig) -> Task:
    """The task of a run for what it says of weights alone. It needs no data where the workload can do without."""
    workload = WORKLOADS[config.workload]
    return checked_task(_load(workload.weights)(config.data, config.model)) if workload.weights else make_task(config)


def workload_of_run(run: Path) -> Workload:
    """The workload of a run's folder, or of one with weights. Raises CheckpointError or ConfigError."""
    for folder in (run, run / "best", run / "final"):
        if (path := folder / "config.json").is_file():
            name = read_config(path).get("workload")
            if name not in WORKLOADS:
                raise ConfigError(f"{path}: workload: unknown {name!r}{nearest(str(name), list(WORKLOADS))}")
            return WORKLOADS[name]
    raise CheckpointError(f"{run}: not the folder of a run: there is no config.json in it, nor in best/ or final/")


def enter(room: str, description: str | None, argv: list[str] | None) -> int:
    """Be launchers/evaluate.py or launchers/predict.py: find the run's workload, parse its flags, call its module.

    Returns the exit status: 0 done, 2 a user's error.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, or one with weights, such as best/")
    known, _ = parser.parse_known_args(argv)
    try:
        module = workload_of_run(known.run).open(room)
        parser.add_argument("-h", "--help", action="help", help="show this and exit")
        module.add_arguments(parser)
        return module.run(parser.parse_args(argv))
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)
