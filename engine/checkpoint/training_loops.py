"""What a training loop of plain torch saves beside the weights: its optimizer's state, its epoch, its loss.

kept_by_optimizer(saved, parameters, key)   what optimizer.state_dict() has of each parameter
finished_epochs(epoch, kept, steps)         how many epochs it had finished
state_of(model, step, ...)                  a WholeState of the model's own weights
number(value)                               a finite number, or None
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.weights import is_finite, is_plain
from trunkline.engine.whole_state import WholeState

Kept = dict[str, dict[str, Tensor]]


def kept_by_optimizer(saved: Any, parameters: Sequence[str], key: str) -> tuple[Kept, tuple[str, ...]]:
    """What an optimizer of one group over all parameters keeps, by parameter; and a note where it cannot be had.

    Args:
        saved: its state_dict(), or whatever stands in its place.
        parameters: the names of the parameters in their order there.
        key: under which it stands in the file.
    """
    groups, states = (saved.get(name) if isinstance(saved, Mapping) else None for name in ("param_groups", "state"))
    if not isinstance(states, Mapping) or not isinstance(groups, list):
        return {}, ("holds no state of an optimizer: weights and epoch alone are taken",)
    whole = all(isinstance(each, Mapping) for each in (*groups, *states.values()))
    whole = whole and not any(_is_broken(value) for each in states.values() for value in each.values())
    if not whole or not set(states) <= set(range(len(parameters))):
        return {}, (f"its optimizer's state is damaged ('{key}'): weights and epoch alone are taken",)
    if len(groups) != 1 or groups[0].get("params") != list(range(len(parameters))):
        return {}, (
            f"its optimizer is of {len(groups)} groups, not of all {len(parameters)} parameters in their order: "
            "weights and epoch alone are taken",
        )
    kept = {}
    for place, state in states.items():
        tensors = {name: torch.as_tensor(value) for name, value in state.items() if value is not None}
        kept[parameters[place]] = {
            name: value.reshape(()).to(torch.float32) if value.numel() == 1 and name == "step" else value
            for name, value in tensors.items()
        }
    return kept, () if kept else ("its optimizer keeps nothing yet",)


def _is_broken(value: Any) -> bool:
    """Whether it is a tensor that is not finite, or one of more than one element without floating-point numbers."""
    return isinstance(value, Tensor) and (not is_finite(value) if is_plain(value) else value.numel() > 1)


def finished_epochs(epoch: float | None, kept: Kept, steps_per_epoch: int) -> tuple[int, tuple[str, ...]]:
    """The number of epochs that were finished, where a file says `epoch`; and what to say of it.

    Some loops count finished epochs, others name the last one, from 0 on. It was the latter if the optimizer has
    counted as many steps as one epoch more has.
    """
    if epoch is None:
        return 0, ("says no epoch: from epoch 0 on",)
    finished = max(0, int(epoch))  # -1 is what some leave at their end
    counted = {float(each["step"]) for each in kept.values() if "step" in each}
    if counted == {(finished + 1) * steps_per_epoch}:
        finished += 1
        return finished, (
            f"its optimizer has counted the steps of {finished} epochs, so as many are taken as finished",
        )
    return finished, ()


def state_of(
    model: nn.Module, step: int, steps_per_epoch: int, kept: Mapping[str, Mapping[str, Tensor]] | None = None,
    metrics: Mapping[str, float] | None = None, notes: tuple[str, ...] = (),
) -> WholeState:  # fmt: skip
    """The state of a run at `step` with the model's weights. Buffers that are no part of its state are left out."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return WholeState(step, steps_per_epoch, parameters, buffers, kept or {}, {}, metrics or {}, notes)


def number(value: Any) -> float | None:
    """A finite number of Python's, numpy's or torch's; None for anything else."""
    try:
        found = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None
