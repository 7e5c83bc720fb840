"""What every workload reads first of a run that has trained: where its weights are, and its two sections.

trained_sections(run, ...)       the folder of the weights, the "data" and the "model" section
warn_of_other_data(folder, ...)  warns if the data set has changed since training
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from trunkline.engine.checkpoint.weights import FINGERPRINT, find_weights
from trunkline.engine.config.json_object import read_json_object
from trunkline.engine.config.strict import validated
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.log import LOG

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


def warn_of_other_data(folder: Path, fingerprint: str, place: str | Path) -> None:
    """Warn if `place`, the data set of a run's own section, has changed since training.

    Its first word names the content; a task's fingerprint may add how samples are made of it.
    """
    before = read_json_object(folder / "config.json", finite=False).get(FINGERPRINT)
    if isinstance(before, str) and before.split()[:1] != fingerprint.split()[:1]:
        LOG.warning(
            f"{place} has changed since {folder} was trained. Samples that it was trained on may be evaluated now"
        )
