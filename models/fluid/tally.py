"""What an evaluation adds up for each forecaster at each horizon, batch after batch.

yardstick = Yardstick(normalization, schema, copied)
tally = Tally.of(predicted, truth, yardstick)        of one batch
tally + another                                      of both
Evaluation                                           all of them, by horizon and forecaster
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trunkline.models.fluid.bounds import Outside
from trunkline.models.fluid.metrics import Errors, units
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.relative_errors import LEAST, RelativeErrors
from trunkline.models.fluid.schema import Schema


@dataclass(frozen=True)
class Yardstick:
    """Units to measure errors in, and the names of the columns that no score counts."""

    normalization: Normalization
    schema: Schema
    copied: Collection[str]

    @cached_property
    def scored(self) -> Tensor:
        """bool [Vs]."""
        names = self.schema.states
        return torch.tensor([name not in self.copied for name in names], device=self.normalization.scale.device)

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """Places of the scored columns of each unit."""
        scored = self.scored.cpu()
        found = {unit: (members & scored).nonzero()[:, 0] for unit, members in units(self.schema).items()}
        return {unit: places.to(self.scored.device) for unit, places in found.items() if len(places)}


@dataclass(frozen=True)
class Tally:
    """Sums over rollouts of S minutes.

    errors, outside: of all columns, for `Errors.scores` to choose from. by_minute: squared errors, normalised, and by
    unit absolute_by_minute: physical; sums and counts, fp64 [2, S]. relative: by unit. These three leave copies out.
    """

    errors: Errors
    outside: Outside
    by_minute: Tensor
    absolute_by_minute: dict[str, Tensor]
    relative: dict[str, RelativeErrors]

    @classmethod
    def of(cls, predicted: Tensor, truth: Tensor, by: Yardstick) -> Tally:
        """predicted, truth [B, S, Vs], physical; NaN in the truth is left out."""
        error, mask = predicted - truth, ~truth.isnan()
        return cls(
            Errors.of(predicted, truth, mask, by.normalization),
            Outside.of(predicted, by.schema, by.normalization.state_scale),
            _by_minute((error / by.normalization.state_scale).square(), mask & by.scored),
            {unit: _by_minute(error[..., at].abs(), mask[..., at]) for unit, at in by.columns.items()},
            {
                unit: RelativeErrors.of(predicted[..., at], truth[..., at], unit)
                for unit, at in by.columns.items()
                if unit in LEAST
            },
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.errors + other.errors,
            self.outside + other.outside,
            self.by_minute + other.by_minute,
            {unit: sums + other.absolute_by_minute[unit] for unit, sums in self.absolute_by_minute.items()},
            {unit: part + other.relative[unit] for unit, part in self.relative.items()},
        )


def _by_minute(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([values.masked_fill(~mask, 0).double().sum((0, 2)), mask.sum((0, 2)).double()])


def mean_by_minute(sums: Tensor) -> Tensor:
    """[2, S] -> [S], on the CPU; 0 for a minute without values."""
    return (sums[0] / sums[1].clamp(min=1)).cpu()


@dataclass
class Evaluation:
    """Tallies by horizon and forecaster.

    copied: states that only copy a set-point, with its name. baselines: facts of the fits, by forecaster
    """

    split: str
    cases: list[str]
    copied: dict[str, str]
    baselines: dict[str, dict[str, Any]]
    tallies: dict[str, dict[str, Tally]] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, dict[str, Errors]]:
        """Of all columns."""
        return {horizon: {name: tally.errors for name, tally in of.items()} for horizon, of in self.tallies.items()}

    @property
    def by_minute(self) -> dict[str, dict[str, Tensor]]:
        """Mean squared errors [S], normalised."""
        return {
            horizon: {name: mean_by_minute(tally.by_minute) for name, tally in of.items()}
            for horizon, of in self.tallies.items()
        }

    def scores(self, schema: Schema, with_copies: bool = False) -> dict[str, dict[str, dict[str, Any]]]:
        """`Errors.scores` by horizon and forecaster."""
        left_out = () if with_copies else self.copied
        return {
            horizon: {name: errors.scores(schema, left_out) for name, errors in of.items()}
            for horizon, of in self.errors.items()
        }
