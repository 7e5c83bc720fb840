from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.models.causal_lm.packing import pack


def rows_of(lengths: list[int], capacity: int) -> list[list[int]]:
    packing = pack(np.array(lengths, np.int64), capacity)
    assert packing.order.dtype == packing.row_starts.dtype == np.int64
    return [row.tolist() for row in np.split(packing.order, packing.row_starts[1:-1])] if len(lengths) else []


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """The number of rows, by looking at every row for every piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_piece_lies_in_one_row_and_no_row_overflows(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = rows_of(lengths, capacity)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[piece] for piece in row) <= capacity for row in rows)
    assert len(rows) == best_fit_decreasing(lengths, capacity)


def test_each_piece_goes_into_the_fullest_row_with_room() -> None:
    # 7 | 6 | 5: then 3 fits the row with room 3, 2 joins the 5 only after the 4 has left no other choice
    assert rows_of([3, 7, 2, 6, 5, 4], 10) == [[1, 0], [3, 5], [4, 2]]


def test_nothing_packs_into_no_rows() -> None:
    packing = pack(np.array([], np.int64), 8)
    assert packing.row_starts.tolist() == [0]
    assert packing.order.tolist() == []


@pytest.mark.parametrize("lengths", [[0], [-1, 3], [9]])
def test_lengths_that_fit_no_row_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="use 1 to the capacity, 8"):
        pack(np.array(lengths, np.int64), 8)


def test_documents_of_a_realistic_spread_fill_rows_fast() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 200_000).astype(np.int64), 1, 1024)
    start = time.process_time()
    packing = pack(lengths, 1024)
    assert time.process_time() - start < 2  # 0.04 s on an idle core
    assert lengths.sum() / ((len(packing.row_starts) - 1) * 1024) > 0.97
    assert pack(lengths, 1024).order.tobytes() == packing.order.tobytes()
