"""A trained surrogate from a run's folder: the weights, what they were trained on, and the network's columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.machine.reading import read_object
from trunkline.models.fluid.config import FluidData, FluidModel
from trunkline.models.fluid.network import FluidDecoder
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.task import make_decoder

_LARGEST_NETWORK = 256 << 20


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; network: network.json where the data set had one; facts: the step, the metric."""

    folder: Path
    model: FluidDecoder
    schema: Schema
    data: FluidData
    network: dict[str, Any] | None
    facts: dict[str, Any]


def load_trained(run: Path, device: torch.device) -> Trained:
    """The surrogate of a run, in eval mode on `device`. Raises CheckpointError, ConfigError or DataError."""
    folder, data, section = trained_sections(run, "fluid", FluidData, FluidModel)
    schema = Schema.read(folder)
    model = make_decoder(schema, data, section)
    facts = load_weights(model, folder)
    return Trained(folder, model.to(device).eval(), schema, data, _read_network(folder / "network.json"), facts)


def _read_network(path: Path) -> dict[str, Any] | None:
    """network.json, or None where there is none or it is not an object: without it only the map is left out."""
    try:
        return read_object(path, _LARGEST_NETWORK)
    except (OSError, ValueError):
        return None
