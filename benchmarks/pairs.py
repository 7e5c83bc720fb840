"""Two sides measured in turns: the median of their ratios, and how sure it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of pairs, an interval that holds the true one with 95 % confidence, and two deciles."""

    median: float
    low: float
    high: float
    tenth: float
    ninetieth: float


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of at least two pairs of values, each measured in turns: ours / theirs."""
    ratios = sorted(our / their for our, their in zip(ours, theirs, strict=True))
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    # order statistics around the median: the binomial interval in its normal approximation
    middle, reach = (len(ratios) - 1) / 2, 0.98 * len(ratios) ** 0.5
    return Ratio(
        median=statistics.median(ratios),
        low=ratios[max(0, math.floor(middle - reach))],
        high=ratios[min(len(ratios) - 1, math.ceil(middle + reach))],
        tenth=deciles[0],
        ninetieth=deciles[-1],
    )
