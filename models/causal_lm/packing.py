"""Many pieces of different lengths into few rows of one capacity.

    pack(lengths, capacity)   best-fit decreasing: the longest piece first, each into the fullest row that has room

A row's room is a whole number up to the capacity, so rows wait in one stack for each amount of room, and a tree over
the amounts finds the smallest that suffices: N log(capacity) steps for N pieces.
"""

from __future__ import annotations

import numba
import numpy as np

from trunkline.models.text.packing import Packing, by_row

_INT64S = numba.types.Array(numba.int64, 1, "C")


def pack(lengths: np.ndarray, capacity: int) -> Packing:
    """Rows of pieces whose lengths add up to `capacity` at most, the longest of a row first. The same lengths give the
    same rows.

    lengths: int64 [N], each from 1 to `capacity`; ValueError for any other
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if capacity < 1 or lengths.ndim != 1:
        raise ValueError(f"capacity {capacity} and lengths of shape {lengths.shape}: use 1 or more, and [N]")
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()}: use 1 to the capacity, {capacity}")
    longest_first = np.argsort(-lengths, kind="stable")
    return by_row(_best_fit(lengths[longest_first], capacity), longest_first)


@numba.njit(_INT64S(_INT64S, numba.int64), nogil=True, cache=True)
def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, int64 [N], in the order given."""
    leaves = 1
    while leaves < capacity + 1:
        leaves *= 2
    waiting = np.zeros(2 * leaves, np.int64)  # a tree: rows waiting below each node; leaf r counts those with room r
    top = np.full(capacity + 1, -1, np.int64)  # the stack of rows with each room: its top, and what lies below a row
    below = np.empty(len(lengths), np.int64)
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    for piece in range(len(lengths)):
        length = lengths[piece]
        node = leaves + length
        while node > 1 and waiting[node] == 0:  # up to the first subtree at or right of `length` with a row in it
            while node > 1 and node % 2 == 1:
                node //= 2
            if node > 1:
                node += 1
        if node <= 1:
            row, room = num_rows, capacity
            num_rows += 1
        else:
            while node < leaves:
                node *= 2
                if waiting[node] == 0:
                    node += 1
            room = node - leaves
            row = top[room]
            top[room] = below[row]
            while node >= 1:
                waiting[node] -= 1
                node //= 2
        rows[piece] = row
        room -= length
        below[row] = top[room]
        top[room] = row
        node = leaves + room
        while node >= 1:
            waiting[node] += 1
            node //= 2
    return rows
