"""TIME columns by themselves: how a time may be written, which rows make a day, and what is said of the others."""

from __future__ import annotations

import re
from datetime import date
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.fluid.csv_tree import time
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.times import check_held, clock, parse_time, read_times

PATH = Path("case/X.csv")
EVERY_MINUTE = range(1, 1441)
MIDNIGHT = 1440 * (date(2025, 1, 1).toordinal() - 1)


def read(cells: list[str], minutes: range | None) -> list[int]:
    """The minutes of the first of January of a TIME column with these cells."""
    encoded = [cell.encode() for cell in cells]
    ends = np.array([*accumulate(len(cell) + 1 for cell in encoded)], np.int64)  # a comma follows each
    spans = np.stack([ends - 1 - [len(cell) for cell in encoded], ends - 1], axis=1)
    text = np.frombuffer(b"".join(cell + b"," for cell in encoded), np.uint8)
    return (read_times(PATH, text, spans, minutes) - MIDNIGHT).tolist()


@given(st.dates(), st.integers(0, 1439))
def test_each_layout_is_the_minute_since_the_first_day(day: date, minute: int) -> None:
    want = 1440 * (day.toordinal() - 1) + minute
    hour, rest = divmod(minute, 60)
    year = f"{day.year:04d}"
    assert parse_time(f"{year}/{day.month}/{day.day} {hour}:{rest:02d}") == want
    assert parse_time(f"{year}/{day.month:02d}/{day.day:02d} {hour:02d}:{rest:02d}") == want
    assert parse_time(f"{day.isoformat()} {hour:02d}:{rest:02d}:00") == want
    assert parse_time(f"{day.isoformat()}T{hour:02d}:{rest:02d}:00.000") == want


@pytest.mark.parametrize(
    "text",
    [
        "", "0:01", "2025/1/1", "2025/1/1 24:00", "2025/1/1 0:60", "2025/2/29 0:01", "2025/13/1 0:01", "0000/1/1 0:01",
        "2025/1-1 0:01", "25/1/1 0:01", "2025/1/1 0:01:30", "2025/1/1 0:01:00.5", "2025/1/1 0:1", " 2025/1/1 0:01",
        "2025/1/1 0:01 ", "2025/1/1 0:01Z", "1.1.2025 0:01",
    ],
)  # fmt: skip
def test_anything_else_is_no_time(text: str) -> None:
    assert parse_time(text) is None


def test_minutes_are_said_as_files_write_them() -> None:
    said = {0: "0:00", 61: "1:01", 599: "9:59", 1439: "23:59", 1440: "24:00 (0:00 of the next day)"}
    assert {minute: clock(minute) for minute in said} == said


def test_a_day_of_every_minute_and_a_shorter_one_are_read() -> None:
    assert read([time(m) for m in EVERY_MINUTE], EVERY_MINUTE) == [*EVERY_MINUTE]
    assert read([time(m) for m in range(1, 8)], EVERY_MINUTE) == [*range(1, 8)], "the length is for others to check"


@given(st.sets(st.integers(1, 1440), max_size=30))
def test_where_any_minutes_will_do_they_ascend_from_midnight(minutes: set[int]) -> None:
    rows = [0, *sorted(minutes)]
    assert read([time(m) for m in rows], None) == rows


WRONG: dict[str, tuple[list[str], range | None, str]] = {
    "no time": ([time(1), "noon"], EVERY_MINUTE, "line 3, column 'TIME': 'noon' is not a time"),
    "a very long cell": ([time(1), time(2) + "0" * 90], EVERY_MINUTE, "line 3, column 'TIME': '2025/1/1 0:020"),
    "late": ([time(2), time(3)], EVERY_MINUTE, "line 2, column 'TIME': '2025/1/1 0:02' in the first row"),
    "not from midnight": ([time(30), time(60)], None, "in the first row: it must be 0:00: add"),
    "twice": ([time(1), time(2), time(2)], EVERY_MINUTE, "line 4, column 'TIME': '2025/1/1 0:02' is a duplicate"),
    "back": ([time(0), time(30), time(10)], None, "line 4, column 'TIME': '2025/1/1 0:10' is earlier"),
    "a gap": ([time(1), time(2), time(3), time(5)], EVERY_MINUTE, "'2025/1/1 0:05' where 0:04 is next"),
    "past the day": ([time(0), time(1441)], None, "line 3, column 'TIME': '2025/1/2 0:01' is past the day"),
    "every 5 minutes": ([time(m) for m in range(5, 60, 5)], EVERY_MINUTE, "the rows are 5 minutes apart"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line(name: str) -> None:
    cells, minutes, message = WRONG[name]
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(cells, minutes)
    assert str(error.value).startswith(f"{PATH}: ")


@pytest.mark.parametrize(
    "times",
    [[0], [*range(0, 1440, 30)], [*range(0, 1441, 60)], [0, 720], [0, 200, 201, 365, 730, 900, 1080], [0, 1440]],
    ids=len,
)
def test_rows_that_cover_the_day_are_taken(times: list[int]) -> None:
    check_held(PATH, np.array(times))


def test_a_row_that_is_lost_from_equal_steps_is_named() -> None:
    rows = [*range(0, 1440, 30)]
    for lost in range(1, 47):
        expected = f"{PATH}: line {lost + 2}, column 'TIME': {clock(rows[lost + 1])} where {clock(rows[lost])} is next"
        with pytest.raises(DataError, match=re.escape(expected)):
            check_held(PATH, np.array(rows[:lost] + rows[lost + 1 :]))


def test_a_day_without_its_end_is_named() -> None:
    with pytest.raises(DataError, match=r"line 48: the file ends with 23:00, .* 30 minutes apart: .*last row at 23:30"):
        check_held(PATH, np.arange(0, 1410, 30))
    with pytest.raises(DataError, match=r"line 3: the file ends with 10:00, .* 600 minutes apart"):
        check_held(PATH, np.array([0, 600]))
