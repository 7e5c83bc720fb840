"""Many pairs into few rows, whose input and target have a room each.

    pack(lengths, room)            a row at a time: what fits best to the room that is left in it
    choose_room(lengths, ...)      the room that is filled best
    fill(lengths, room)            how full it is

A pair is taken for how much of the room left it fills on both sides: the dot product of the two, each side in parts of
its room (Panigrahy et al., "Heuristics for vector bin packing", 2011). Lengths are told apart in 64 steps a side, so
that at most 64 x 64 looks find the best, whatever the number of pairs. No row overflows, since what is left is counted
exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from trunkline.models.text.packing import Packing, by_row

_STEPS = 64
_INT64S, _PAIRS = numba.types.Array(numba.int64, 1, "C"), numba.types.Array(numba.int64, 2, "C")
_MULTIPLE = 8
_MOST = 4
_SAMPLED, _CLEARLY = 20_000, 0.03


class Room(NamedTuple):
    """Tokens of a row: that the encoder reads, and that the decoder writes."""

    source: int
    target: int


def pack(lengths: np.ndarray, room: Room) -> Packing:
    """Rows of pairs whose lengths add up to `room` at most on each side. The same lengths give the same rows.

    lengths: int64 [N, 2], each from 1 to its side's room; ValueError for any other
    """
    lengths = np.ascontiguousarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and (lengths <= room).all()):
        raise ValueError(f"lengths from {lengths.min(0)} to {lengths.max(0)}: use 1 to the room, {tuple(room)}")
    return by_row(_rows(lengths, *room), np.arange(len(lengths)))


def fill(lengths: np.ndarray, room: Room) -> float:
    """The share of real tokens in the rows that `pack` makes."""
    rows = int(_rows(lengths, *room).max()) + 1
    return float(lengths.sum() / (rows * sum(room)))


def choose_room(lengths: np.ndarray, source: int | None = None, target: int | None = None) -> Room:
    """The room that is filled best, or that goes best with the side that is given.

    Both sides are in the proportion of all lengths [N, 2], and the longest pair fits: the smallest such room, or twice
    that where it is clearly better filled; a side that is not given is at most four times the longest pair's.
    """
    longest, total = lengths.max(0), lengths.sum(0)
    given = np.array([source or 0, target or 0])
    scales = [max(given / total)] if given.any() else [times * max(longest / total) for times in (1, 2)]
    rooms = [np.where(given, given, _rounded(np.clip(scale * total, longest, longest * _MOST))) for scale in scales]
    some = np.ascontiguousarray(lengths[:: -(-len(lengths) // _SAMPLED)])
    best = rooms[0]
    for room in rooms[1:]:
        best = room if fill(some, Room(*room.tolist())) > fill(some, Room(*best.tolist())) + _CLEARLY else best
    return Room(*best.tolist())


def _rounded(room: np.ndarray) -> np.ndarray:
    return -(-np.ceil(room).astype(np.int64) // _MULTIPLE) * _MULTIPLE


@numba.njit(_INT64S(_PAIRS, numba.int64, numba.int64), nogil=True, cache=True)
def _rows(lengths: np.ndarray, source: int, target: int) -> np.ndarray:
    """The row of each pair, int64 [N]."""
    one = np.uint64(1)
    # by steps of the source: a bit for each of the target's, if there is such a pair
    there = np.zeros(_STEPS + 1, np.uint64)
    first = np.full((_STEPS + 1, _STEPS + 1), -1, np.int64)  # of these pairs, and which comes after each
    after = np.empty(len(lengths), np.int64)
    for pair in range(len(lengths) - 1, -1, -1):
        i, j = -(-lengths[pair, 0] * _STEPS // source), -(-lengths[pair, 1] * _STEPS // target)
        after[pair] = first[i, j]
        first[i, j] = pair
        there[i] |= one << np.uint64(j - 1)
    rows = np.empty(len(lengths), np.int64)
    left, row = len(lengths), 0
    source_left, target_left = source, target
    while left:
        i_most, j_most = -(-source_left * _STEPS // source), -(-target_left * _STEPS // target)
        best, best_i, best_j = np.int64(-1), 0, 0
        for i in range(1, i_most + 1):
            if there[i] == 0:
                continue
            j = j_most
            while j > 0:
                if there[i] >> np.uint64(j - 1) & one:
                    pair = first[i, j]
                    if lengths[pair, 0] <= source_left and lengths[pair, 1] <= target_left:
                        break
                j -= 1
            if j > 0 and i * i_most + j * j_most > best:
                best, best_i, best_j = i * i_most + j * j_most, i, j
        if best < 0:
            row += 1
            source_left, target_left = source, target
            continue
        pair = first[best_i, best_j]
        first[best_i, best_j] = after[pair]
        if after[pair] < 0:
            there[best_i] &= ~(one << np.uint64(best_j - 1))
        rows[pair] = row
        source_left -= lengths[pair, 0]
        target_left -= lengths[pair, 1]
        left -= 1
    return rows
