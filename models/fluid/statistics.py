"""Statistics of the columns of a data set, streamed over its cases in fp64.

    case_moments(boundary, state)     what one case adds: [2, 5, V]
    merge_moments(parts)              of several cases, in the order given
    sample_positions(total, V)        the rows from which median and quartiles are taken
    column_statistics(moments, rows)  the statistics by name

Means and variances merge by Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979). Cases are merged in their order, so the result does not depend on who computed the parts.

Median and interquartile range need the values themselves. They are taken from rows that are evenly spaced over all
minutes of all training cases, as many as hold 32 Mi values (128 MiB): every row for a small network, 4,999 rows
(one in 76 minutes of 264 cases) at V = 6,712.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LEVEL, CHANGE = 0, 1
_COUNT, _MEAN, _M2, _MIN, _MAX = range(5)
_SAMPLE_VALUES = 32 << 20
_COLUMNS_AT_ONCE = 256

STATISTICS = ("count", "mean", "std", "min", "max", "median", "iqr", "change_count", "change_mean", "change_std")


def case_moments(boundary: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Count, mean, sum of squared deviations, min and max of each column of a case: fp64 [2, 5, V].

    boundary [M, Vb], state [M, Vs], float32, NaN where missing. The first index is LEVEL or CHANGE (the value less the
    one a minute before; missing where either is).
    """
    num_boundary = boundary.shape[1]
    out = np.empty((2, 5, num_boundary + state.shape[1]))
    for values, first in ((boundary, 0), (state, num_boundary)):
        for start in range(0, values.shape[1], _COLUMNS_AT_ONCE):
            # Columns as rows of a small fp64 block: sums then run along memory, within the cache.
            block = np.ascontiguousarray(values[:, start : start + _COLUMNS_AT_ONCE].T, dtype=np.float64)
            columns = slice(first + start, first + start + len(block))
            out[LEVEL, :, columns] = _moments(block)
            out[CHANGE, :, columns] = _moments(np.diff(block, axis=1))
    return out


def _moments(block: np.ndarray) -> np.ndarray:
    missing = np.isnan(block)
    if block.shape[1] and not missing.any():
        count = np.full(len(block), float(block.shape[1]))
        mean = block.mean(axis=1)
        m2 = np.square(block - mean[:, None]).sum(axis=1)
        return np.stack([count, mean, m2, block.min(axis=1), block.max(axis=1)])
    count = (~missing).sum(axis=1).astype(np.float64)
    mean = np.where(missing, 0.0, block).sum(axis=1) / np.maximum(count, 1)
    m2 = np.square(np.where(missing, 0.0, block - mean[:, None])).sum(axis=1)
    low = np.where(missing, np.inf, block).min(axis=1, initial=np.inf)
    high = np.where(missing, -np.inf, block).max(axis=1, initial=-np.inf)
    return np.stack([count, mean, m2, low, high])


def merge_moments(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Moments of all the cases together, fp64 [2, 5, V]; `parts` is read once, one at a time."""
    total: np.ndarray | None = None
    for part in parts:
        if total is None:
            total = part.copy()
            continue
        count = total[:, _COUNT] + part[:, _COUNT]
        share = part[:, _COUNT] / np.maximum(count, 1)
        delta = part[:, _MEAN] - total[:, _MEAN]
        total[:, _M2] += part[:, _M2] + delta * delta * total[:, _COUNT] * share
        total[:, _MEAN] += delta * share
        total[:, _MIN] = np.minimum(total[:, _MIN], part[:, _MIN])
        total[:, _MAX] = np.maximum(total[:, _MAX], part[:, _MAX])
        total[:, _COUNT] = count
    if total is None:
        raise ValueError("no case to merge")
    return total


def sample_positions(total: int, num_variables: int) -> np.ndarray:
    """Which of `total` rows give median and quartiles: int64, ascending, evenly spaced."""
    count = min(total, max(1, _SAMPLE_VALUES // num_variables))
    return (2 * np.arange(count, dtype=np.int64) + 1) * total // (2 * count)


def column_statistics(moments: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics by name (STATISTICS), each fp64 [V].

    moments: from `merge_moments`. rows: float32 [R, V], the sampled rows; NaN where missing. Variances are those of the
    population (divided by the count). iqr is the third quartile less the first, by linear interpolation; where the rows
    hold no value of a column, its median is its mean and its iqr 0. A column that has no value at all gets 0
    throughout; `count` tells it.
    """
    present = moments[:, _COUNT] > 0
    mean, low, high = (np.where(present, moments[:, k], 0.0) for k in (_MEAN, _MIN, _MAX))
    std = np.sqrt(moments[:, _M2] / np.maximum(moments[:, _COUNT], 1))
    quartiles = _quantiles(rows, (0.25, 0.5, 0.75))
    return {
        "count": moments[LEVEL, _COUNT].copy(),
        "mean": mean[LEVEL],
        "std": std[LEVEL],
        "min": low[LEVEL],
        "max": high[LEVEL],
        "median": np.where(np.isnan(quartiles[1]), mean[LEVEL], quartiles[1]),
        "iqr": np.nan_to_num(quartiles[2] - quartiles[0]),
        "change_count": moments[CHANGE, _COUNT].copy(),
        "change_mean": mean[CHANGE],
        "change_std": std[CHANGE],
    }


def _quantiles(rows: np.ndarray, fractions: tuple[float, ...]) -> np.ndarray:
    """Quantiles of each column, NaN ignored: fp64 [len(fractions), V]; NaN for a column that is all NaN."""
    out = np.empty((len(fractions), rows.shape[1]))
    for start in range(0, rows.shape[1], _COLUMNS_AT_ONCE):
        block = np.sort(rows[:, start : start + _COLUMNS_AT_ONCE].T.astype(np.float64), axis=1)  # NaN sorts last
        last = np.maximum(len(rows) - np.isnan(block).sum(axis=1) - 1, 0)
        each = np.arange(len(block))
        for k, fraction in enumerate(fractions):
            place = fraction * last
            below = np.floor(place).astype(np.int64)
            above = np.minimum(below + 1, last)
            low, high = block[each, below], block[each, above]
            out[k, start : start + len(block)] = low + (high - low) * (place - below)
    return out
