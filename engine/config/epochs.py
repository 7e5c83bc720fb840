"""Lengths in epochs: {"epochs": 1.5} wherever a number of steps can stand.

    Steps                             a field that is one: an integer from 1 on, or such an object
    or_epochs(kind)                   a field of another kind that may be such an object too
    in_steps({"epochs": 1.5}, 100)    150, where an epoch has 100 steps

Epochs become the nearest number of steps, halves the next one up, and at least one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, WrapValidator

_MOST_EPOCHS = 1 << 31


def _epochs_or(value: Any, otherwise: Callable[[Any], Any]) -> Any:
    if not isinstance(value, dict):
        return otherwise(value)
    epochs: Any = value.get("epochs")
    is_number = isinstance(epochs, int | float) and not isinstance(epochs, bool)
    if not is_number or len(value) > 1 or not 0 < epochs <= _MOST_EPOCHS:
        raise ValueError('expected a number of steps, or of epochs above 0 as in {"epochs": 0.5}')
    return value


def or_epochs(kind: Any) -> Any:
    """The type of a field that holds what `kind` does, or {"epochs": x}."""
    return Annotated[kind, WrapValidator(_epochs_or), PlainSerializer(lambda value: value), _OrEpochs()]


class _OrEpochs:
    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [handler(schema), _EPOCHS]}


_EPOCHS = {
    "type": "object", "additionalProperties": False, "required": ["epochs"],
    "properties": {"epochs": {"type": "number", "exclusiveMinimum": 0, "maximum": _MOST_EPOCHS,
                              "description": "epochs in place of optimizer steps"}},
}  # fmt: skip


Steps = or_epochs(Annotated[int, Field(gt=0)])


def in_steps(value: Any, steps_per_epoch: int) -> Any:
    """The value with steps in place of epochs, in a list too. What holds no epochs comes back as it is."""
    if isinstance(value, list):
        return [in_steps(each, steps_per_epoch) for each in value]
    if isinstance(value, dict) and value.keys() == {"epochs"}:
        return max(1, math.floor(value["epochs"] * steps_per_epoch + 0.5))
    return value
