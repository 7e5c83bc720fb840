"""Whole tensors from the files of a run's state, and such files from whole tensors.

parameters, buffers, kept = read_whole(folder, names, average=False)
whole_snapshot(parameters, buffers, kept).write(folder, 0, 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.engine.errors import CheckpointError
from trunkline.engine.state.sharded_files import AVERAGE, BUFFER, BUFFER_AVERAGE, VALUE, ShardedFiles
from trunkline.engine.state.sharded_state import Snapshot


class Whole(NamedTuple):
    """Parameters and buffers by name, and by parameter what the optimizer keeps; a number has no dimensions."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    kept: dict[str, dict[str, Tensor]]


def read_whole(folder: Path, names: Sequence[str], average: bool) -> Whole:
    """What a layout of any kind wrote. With `average`, the moving averages where there are some.

    Raises CheckpointError.

    names: of the parameters, in the order of the result
    """
    files = ShardedFiles(folder)
    files.check_parameters({name: files.shapes.get(name, ()) for name in names})
    parameters: dict[str, Tensor] = {}
    kept: dict[str, dict[str, Tensor]] = {}
    for name in names:
        shape, keys = files.shapes[name], files.keys[name]
        whole = {key: files.elements(name, key, 0, math.prod(shape)).view(shape) for key in keys}
        parameters[name] = whole[AVERAGE if average and AVERAGE in whole else VALUE]
        numbers = {
            key: torch.tensor(float(value["tensor"] if isinstance(value, dict) else value))
            for key, value in files.scalars[name].items()
        }
        kept[name] = numbers | {key: tensor for key, tensor in whole.items() if key not in (VALUE, AVERAGE)}
    buffers = files.buffers(0) | (files.buffers(0, BUFFER_AVERAGE) if average else {})
    return Whole(parameters, buffers, kept)


def whole_snapshot(
    parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], kept: Mapping[str, Mapping[str, Tensor]]
) -> Snapshot:
    """The same as one rank that holds everything would have captured it, in fp32. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    fragments = {}
    for name, parameter in parameters.items():
        numbers = {
            key: value
            for key, value in kept.get(name, {}).items()
            if not value.dim() and (parameter.dim() or key == "step")
        }
        found = {VALUE: parameter, **{key: value for key, value in kept.get(name, {}).items() if key not in numbers}}
        for key, tensor in found.items():
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{name}: the optimizer's {key} has shape {list(tensor.shape)}, the parameter "
                    f"{list(parameter.shape)}: remove the optimizer's state from the file"
                )
            tensors[f"{name}:{key}"] = tensor.detach().to("cpu", torch.float32, copy=True).reshape(-1)
        fragments[name] = {
            "shape": tuple(parameter.shape), "start": 0, "stop": parameter.numel(), "keys": [*found],
            "scalars": {key: {"tensor": value.item()} for key, value in numbers.items()},
        }  # fmt: skip
    tensors |= {name + BUFFER: buffer.detach().to("cpu", copy=True).contiguous() for name, buffer in buffers.items()}
    return Snapshot(tensors, {"fragments": fragments})
