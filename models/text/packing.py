"""Packing: which samples lie in which row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Row r holds the pieces order[row_starts[r] : row_starts[r + 1]].

    row_starts: int64 [R + 1]
    order: int64 [N], every piece once
    """

    row_starts: np.ndarray
    order: np.ndarray


def by_row(rows: np.ndarray, order: np.ndarray) -> Packing:
    """The pieces `order` [N], those of one row in this order; `rows` [N] are theirs, no number left out."""
    row_starts = np.zeros(int(rows.max()) + 2 if len(rows) else 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=len(row_starts) - 1), out=row_starts[1:])
    return Packing(row_starts, order[np.argsort(rows, kind="stable")])
