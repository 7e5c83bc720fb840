"""Medians of relative errors, |predicted - truth| / |truth|, from histograms that add over batches.

    RelativeErrors.of(predicted, truth, unit)    of the values [N] of one unit
    a + b                                        of the values of both
    a.median()                                   0.012: half of the values are less than 1.2 % off

The bins are even in the logarithm, PER_DECADE to a factor of ten from LOWEST to HIGHEST, so a median is right to
RESOLUTION of itself. What is below the lowest bin counts as 0, what is above the highest, or no number, as infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = {"MPa": 0.01, "m3/s": 1.0}
"""By unit, the least magnitude of a truth that an error is related to. Of other units a ratio says nothing."""
PER_DECADE = 500
LOWEST, HIGHEST = 1e-8, 1e4
RESOLUTION = 10 ** (0.5 / PER_DECADE) - 1

_BINS = PER_DECADE * round(math.log10(HIGHEST / LOWEST))


@dataclass(frozen=True)
class RelativeErrors:
    """counts: int64 [_BINS + 2], the first of what is below the lowest bin, the last of what is above the highest;
    left_out: how many truths were there, but too small."""

    counts: Tensor
    left_out: int

    @classmethod
    def of(cls, predicted: Tensor, truth: Tensor, unit: str) -> RelativeErrors:
        """predicted, truth: one shape, physical; where the truth is NaN, nothing is counted."""
        large = truth.abs() >= LEAST[unit]
        truth_there, wanted = int((~truth.isnan()).sum()), truth[large]
        decades = ((predicted[large] - wanted) / wanted).abs().log10() - math.log10(LOWEST)
        places = (decades * PER_DECADE).floor().nan_to_num(nan=float(_BINS)).clamp(-1, _BINS).long() + 1
        return cls(torch.bincount(places, minlength=_BINS + 2).cpu(), truth_there - len(wanted))

    def __add__(self, other: RelativeErrors) -> RelativeErrors:
        return RelativeErrors(self.counts + other.counts, self.left_out + other.left_out)

    def median(self) -> float:
        """NaN if there is no value; the mean of both in the middle if there are two."""
        up_to = self.counts.cumsum(0)
        count = int(up_to[-1])
        if not count:
            return math.nan
        middle = torch.tensor([(count - 1) // 2, count // 2])
        return sum(_value(place) for place in torch.searchsorted(up_to, middle, right=True).tolist()) / 2

    def summary(self) -> dict[str, float]:
        """ "median", "values" that it is taken over, and values "left_out"."""
        return {"median": self.median(), "values": int(self.counts.sum()), "left_out": self.left_out}


def _value(place: int) -> float:
    if place == 0:
        return 0.0
    return math.inf if place > _BINS else LOWEST * 10 ** ((place - 0.5) / PER_DECADE)
