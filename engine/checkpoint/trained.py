"""What every workload reads first of a run that has trained: where its weights are, and its two sections."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from trunkline.engine.checkpoint.weights import find_weights
from trunkline.engine.config.json_object import read_json_object
from trunkline.engine.config.strict import validated
from trunkline.engine.errors import CheckpointError

Data = TypeVar("Data", bound=BaseModel)
Model = TypeVar("Model", bound=BaseModel)


def trained_sections(run: Path, workload: str, data: type[Data], model: type[Model]) -> tuple[Path, Data, Model]:
    """The folder with a run's weights, and the "data" and "model" sections that they were trained with.

    Raises CheckpointError if there are no weights or they are another workload's, ConfigError for a faulty section.
    """
    folder = find_weights(run)
    path = folder / "config.json"
    config = read_json_object(path, finite=False)  # transformers may have put Infinity there
    if config.get("workload") != workload:
        raise CheckpointError(f"{path}: the weights are of workload {config.get('workload')!r}, not of {workload!r}")
    found = validated(data, config.get("data"), "data", path)
    return folder, found, validated(model, config.get("model"), "model", path)
