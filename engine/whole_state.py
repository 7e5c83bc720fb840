"""The state of a run as whole tensors: what a task exchanges with the checkpoints of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class WholeState:
    """After a step. Tensors are on the CPU; names are the model's, and in its order where the engine gives them."""

    step: int
    steps_per_epoch: int
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    kept: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """By parameter, what the optimizer keeps for it, by torch's keys: tensors of its shape, or without dimensions."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's settings in that step, by torch's keys, such as "lr". Not needed of another program."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the evaluation after the step has measured."""
    notes: tuple[str, ...] = ()
    """What of another program's checkpoint was left out, for whoever starts the run."""
