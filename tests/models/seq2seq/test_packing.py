from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.engine.data.order import GlobalBatches
from trunkline.models.seq2seq.packing import Room, choose_room, fill, pack


def rows_of(lengths: np.ndarray, room: Room) -> list[list[int]]:
    packing = pack(lengths, room)
    assert packing.order.dtype == packing.row_starts.dtype == np.int64
    return [row.tolist() for row in np.split(packing.order, packing.row_starts[1:-1])]


def log_normal(mean: float, deviation: float, count: int, most: int, seed: int) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(mean, deviation, count).astype(np.int64) + 1, 2, most)


def chat_like(count: int = 20_000) -> np.ndarray:
    """Short prompts and longer answers, log-normal, cut at 256: 28 and 120 tokens on average."""
    return np.stack([log_normal(3.0, 0.8, count, 256, 1), log_normal(4.6, 0.8, count, 256, 2)], axis=1)


@given(
    st.integers(2, 100).flatmap(
        lambda source: st.integers(2, 100).flatmap(
            lambda target: st.tuples(
                st.just(Room(source, target)),
                st.lists(st.tuples(st.integers(1, source), st.integers(1, target)), min_size=1, max_size=60),
            )
        )
    )
)
@settings(deadline=None)
def test_every_pair_lies_in_one_row_and_no_row_overflows(case: tuple[Room, list[tuple[int, int]]]) -> None:
    room, pairs = case
    lengths = np.array(pairs)
    rows = rows_of(lengths, room)
    assert sorted(pair for row in rows for pair in row) == list(range(len(pairs)))
    assert all(row and (lengths[row].sum(0) <= room).all() for row in rows)


def test_what_fits_best_on_both_sides_is_taken() -> None:
    # each row begins with the largest; then what fills the rest on both sides goes before what fills one
    lengths = np.array([[8, 4], [4, 8], [4, 1], [2, 6], [6, 2]])
    assert rows_of(lengths, Room(10, 10)) == [[1, 4], [0, 3], [2]]


def test_lengths_that_fit_no_row_are_refused() -> None:
    for pair in ([0, 3], [3, 0], [9, 1], [1, 9]):
        with pytest.raises(ValueError, match="use 1 to the room"):
            pack(np.array([[2, 2], pair]), Room(8, 8))


def test_the_same_lengths_give_the_same_rows() -> None:
    lengths = chat_like(3000)
    assert pack(lengths, Room(256, 512)).order.tobytes() == pack(lengths, Room(256, 512)).order.tobytes()


@pytest.mark.parametrize(
    ("room", "share"), [(Room(256, 256), 0.60), (Room(256, 512), 0.79), (Room(256, 1024), 0.90), (None, 0.90)]
)
def test_chat_like_rows_are_full(room: Room | None, share: float) -> None:
    lengths = chat_like()
    padded = lengths.reshape(-1, 16, 2)
    assert lengths.sum() / (padded.max(1).sum() * 16) < 0.45
    room = room or choose_room(lengths)
    found = fill(lengths, room)
    most = lengths.sum() / (max(lengths.sum(0) / room) * sum(room))  # rows that are full on one side
    assert share < found <= most
    assert found > 0.92 * most


@pytest.mark.parametrize("swapped", [False, True])
def test_the_room_is_in_the_proportion_of_the_data(swapped: bool) -> None:
    lengths = np.stack([log_normal(3.6, 0.7, 9000, 256, 1), log_normal(4.2, 0.7, 9000, 256, 2)], axis=1)
    lengths = lengths[:, ::-1].copy() if swapped else lengths
    room = choose_room(lengths)
    assert room == choose_room(lengths)
    assert (lengths.max(0) <= room).all()
    assert all(side % 8 == 0 for side in room)
    assert room.target / room.source == pytest.approx(lengths[:, 1].sum() / lengths[:, 0].sum(), rel=0.04)
    others = [Room(256, 256), Room(256, 1024), Room(1024, 256)]
    assert fill(lengths, room) > max(fill(lengths, other) for other in others)


def test_real_tokens_by_each_way_of_making_batches() -> None:
    """Of batches of 16, both sides padded to their longest: .43 random, .69 grouped by length; packed .92."""
    lengths, share = chat_like(), {}
    for name, by in (("random", None), ("grouped", lengths.sum(axis=1))):
        batches = GlobalBatches(len(lengths), 16, 1, by)
        sides = [lengths[batches.samples(step)].max(axis=0) for step in range(batches.per_epoch)]
        share[name] = lengths.sum() / (16 * np.sum(sides))
    share["packed"] = fill(lengths, choose_room(lengths))
    assert {name: round(float(found), 2) for name, found in share.items()} == {
        "random": 0.43,
        "grouped": 0.69,
        "packed": 0.92,
    }


def test_a_side_that_is_given_is_kept() -> None:
    lengths = chat_like(4000)
    one, other = choose_room(lengths, source=300), choose_room(lengths, target=2000)
    assert (one.source, other.target) == (300, 2000)
    assert one.target == 1024, "four times the longest, where the proportion asks for more"
    assert other.source == pytest.approx(2000 * lengths[:, 0].sum() / lengths[:, 1].sum(), abs=8)
    assert choose_room(lengths, 256, 256) == Room(256, 256)
