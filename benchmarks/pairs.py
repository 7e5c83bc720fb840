"""Two sides measured in turns: the median of their ratios, how sure it is, and the clock for training."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch


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


def now() -> float:
    """Seconds: of the wall on a GPU, when all that was launched is done; else of this process's own CPU time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
