"""Metrics of the surrogate from sums that add over batches, ranks and cases.

    Errors.of(predicted, target, mask, normalization)   sums for every state variable, fp64 [Vs]
    Errors.scores(schema)                               MSE, MAE, RMSE and R2 by group, normalised and physical

Normalised scores are over all variables of a group. Physical ones are separate for each unit of a group, since pascals
and degrees do not add. R2 = 1 - SSE / SST, where SST is about the mean of each variable over the values scored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from trunkline.engine.task import Sums
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.schema import Schema, parse_column, unit

ALL = "all"
Scores = dict[str, float]
DIRECTIONS: dict[str, Literal["min", "max"]] = {"mse": "min", "mae": "min", "rmse": "min", "r2": "max"}
"""Which way a score is better."""


@dataclass(frozen=True)
class Errors:
    """Sums over the values present, in normalised units, and the scale that makes them physical; fp64 [Vs] each."""

    count: Tensor
    squared: Tensor
    absolute: Tensor
    target: Tensor
    target_squared: Tensor
    scale: Tensor

    @classmethod
    def of(cls, predicted: Tensor, target: Tensor, mask: Tensor, normalization: Normalization) -> Errors:
        """predicted, target [..., Vs] physical; mask [..., Vs] bool: whether the target is present."""
        wanted = normalization.normalize_states(target).double().masked_fill(~mask, 0)
        error = (normalization.normalize_states(predicted).double() - wanted).masked_fill(~mask, 0)
        over = tuple(range(error.dim() - 1))
        parts = (mask.double(), error.square(), error.abs(), wanted, wanted.square())
        sums = {name: part.sum(over) for name, part in zip(_ADDITIVE, parts, strict=True)}
        return cls(**sums, scale=normalization.state_scale.double())

    def __add__(self, other: Errors) -> Errors:
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDITIVE}
        return Errors(**added, scale=self.scale)

    def as_sums(self, prefix: str) -> Sums:
        """The additive parts under names that start with `prefix`."""
        return {f"{prefix}.{name}": getattr(self, name) for name in _ADDITIVE}

    @classmethod
    def from_sums(cls, sums: Sums, prefix: str, scale: Tensor) -> Errors:
        """Inverse of `as_sums`."""
        return cls(**{name: sums[f"{prefix}.{name}"].cpu() for name in _ADDITIVE}, scale=scale.double().cpu())

    def scores(self, schema: Schema, left_out: Collection[str] = ()) -> dict[str, Any]:
        """{"normalised": {"all" or group: scores}, "physical": {"all" or group: {unit: scores}}}.

        Groups without variables or values are left out, and the columns of these names.
        """
        scored = torch.tensor([name not in left_out for name in schema.states])
        normalised: dict[str, Scores] = {}
        physical: dict[str, dict[str, Scores]] = {}
        for group, columns in {ALL: slice(None), **schema.group_slices}.items():
            chosen = torch.zeros(schema.num_states, dtype=torch.bool)
            chosen[columns] = scored[columns]
            if not self.count[chosen].sum():
                continue
            normalised[group] = self._scores(chosen, torch.ones_like(self.scale))
            for name, members in units(schema).items():
                if self.count[chosen & members].sum():
                    physical.setdefault(group, {})[name] = self._scores(chosen & members, self.scale)
        return {"normalised": normalised, "physical": physical}

    def _scores(self, chosen: Tensor, scale: Tensor) -> Scores:
        count = self.count[chosen].sum()
        squared = (self.squared * scale**2)[chosen].sum()
        absolute = (self.absolute * scale)[chosen].sum()
        spread = self.target_squared - self.target**2 / self.count.clamp(min=1)
        total = (spread.clamp(min=0) * scale**2)[chosen].sum()
        mse = (squared / count).item()
        r2 = (1 - squared / total).item() if total > 0 else float("nan")
        return {"mse": mse, "mae": (absolute / count).item(), "rmse": mse**0.5, "r2": r2}


_ADDITIVE = tuple(field.name for field in fields(Errors) if field.name != "scale")


def flat_scores(scores: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Scores under one-line names: "mse", "mse/P", "rmse/P/MPa"; of the physical ones, only RMSE and MAE."""
    flat: dict[str, float] = {}
    for group, values in scores["normalised"].items():
        flat |= {f"{prefix}{name}{_suffix(group)}": value for name, value in values.items()}
    for group, units in scores["physical"].items():
        for name, values in units.items():
            flat |= {f"{prefix}{key}{_suffix(group)}/{name}": values[key] for key in ("rmse", "mae")}
    return flat


def _suffix(group: str) -> str:
    return "" if group == ALL else f"/{group}"


def units(schema: Schema) -> dict[str, Tensor]:
    """Which state variables are in each unit: {"MPa": bool [Vs], ...}, in order of first appearance."""
    names = [unit(parse_column(column)[1]) or "?" for column in schema.states]
    return {name: torch.tensor([other == name for other in names]) for name in dict.fromkeys(names)}
