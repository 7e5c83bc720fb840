"""The TIME column of a file of a case: one day, in minutes.

    read_times(path, text, spans, minutes)   the checked TIME cells of a file
    check_held(path, times)                  rows that hold until the next one cover the day
    parse_time(text)                         "2025/1/1 0:01" -> minutes since the calendar's first day
    clock(minute)                            61 -> "1:01"

Everything wrong raises DataError with the file, the line, the column and what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.models.fluid.schema import MINUTES

_TIME = re.compile(r"(\d{4})([/-])(\d{1,2})\2(\d{1,2})[ T](\d{1,2}):(\d{2})(?::00(?:\.0+)?)?")
_MOST_LOST = 0.1  # of the steps of a file that is regular apart from them; more are a file of irregular rows


def read_times(path: Path, text: np.ndarray, spans: np.ndarray, minutes: range | None) -> np.ndarray:
    """The times of a file's rows, int64 [R], in minutes since the calendar's first day.

    text: the file's bytes. spans [R, 2]: where in it each row's TIME stands.
    minutes: the minutes of the day that the rows must have, one after the other, though the last ones may be absent.
        None: any that ascend from 0:00 to 24:00
    """
    cells = _cells(text, spans)
    times = [_parse_cell(cell) for cell in cells]
    if None not in times:
        found = np.array(times, np.int64)
        if not len(found):
            return found
        since = found - found[0] + (minutes[0] if minutes else 0)
        whole = not (found[0] - since[0]) % MINUTES
        if minutes is not None and whole and np.array_equal(since, minutes[0] + np.arange(len(since))):
            return found
        if minutes is None and whole and (np.diff(since) > 0).all() and since[-1] <= MINUTES:
            return found
    raise _fault(path, cells, times, minutes)


def check_held(path: Path, times: np.ndarray) -> None:
    """Raise DataError where rows seem lost: each holds until the next, so that a file that was cut would do too.

    times: the rows' minutes of the day. They may be irregular. The day is covered if the last row comes no earlier
    than the longest step before midnight, and a file of equal steps has no few longer ones.
    """
    steps = np.diff(times)
    if not len(steps):
        return
    usual = _usual_step(times.tolist())
    longer = np.flatnonzero(steps > usual)
    if 0 < len(longer) <= _MOST_LOST * len(steps):
        row = int(longer[0]) + 1
        found, expected = clock(int(times[row])), clock(int(times[row - 1]) + usual)
        raise DataError(
            f"{path}: line {row + 2}, column 'TIME': {found} where {expected} is next: rows are {usual} minutes apart, "
            "and some are missing before it; add them (where nothing changes, repeat the row before)"
        )
    if times[-1] + steps.max() < MINUTES:
        raise DataError(
            f"{path}: line {len(times) + 1}: the file ends with {clock(int(times[-1]))}, and its rows are at most "
            f"{steps.max()} minutes apart: the rest of the day is missing; complete it (where nothing changes, repeat "
            f"the last row at {clock(MINUTES - int(steps.max()))})"
        )


def parse_time(text: str) -> int | None:
    """Minutes since 0001-01-01 of "2025/1/1 0:01", "2025/01/01 00:01" or "2025-01-01 00:01"; None for anything else.

    Seconds may follow if they are zero.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    try:
        moment = datetime(int(match[1]), int(match[3]), int(match[4]), int(match[5]), int(match[6]))
    except ValueError:
        return None
    return (moment - datetime.min) // timedelta(minutes=1)


def clock(minute: int) -> str:
    """A minute of the day as files write it: 61 -> '1:01', 1440 -> '24:00 (0:00 of the next day)'."""
    return f"{minute // 60}:{minute % 60:02d}" + (" (0:00 of the next day)" if minute == MINUTES else "")


def _fault(path: Path, cells: list[bytes], times: list[int | None], minutes: range | None) -> DataError:
    first = minutes[0] if minutes else 0
    step = _usual_step(times)
    if minutes and step > 1:
        return DataError(
            f"{path}: the rows are {step} minutes apart, where the state of every minute is needed, {clock(first)} to "
            f"{clock(minutes[-1])}: write the outputs of the simulation every minute. Values between the rows cannot "
            "be made up: on a straight line they would know a switch before it moves, and held they would stand still. "
            "Boundary.csv may keep its step"
        )
    start = previous = 0
    for row, (cell, minute) in enumerate(zip(cells, times)):
        where = f"{path}: line {row + 2}, column 'TIME': {cell.decode('utf-8', 'replace')!r}"
        if minute is None:
            return DataError(
                f"{where} is not a time: write it as 2025/1/1 0:01 or 2025-01-01 00:01; where rows "
                "have seconds, keep those of whole minutes"
            )
        if row == 0 and (minute - first) % MINUTES:
            last = f", since a day's rows run from there to {clock(minutes[-1])}" if minutes else ""
            return DataError(
                f"{where} in the first row: it must be {clock(first)}{last}: add the missing rows or correct TIME"
            )
        start = start if row else minute - first
        if row and minute == previous:
            return DataError(f"{where} is a duplicate of the line before: a minute occurs once; remove one of the rows")
        if row and minute < previous:
            return DataError(f"{where} is earlier than the line before: sort the rows by TIME")
        if minute - start > MINUTES:
            return DataError(
                f"{where} is past the day of the first row: a case is one day; remove the row or correct TIME"
            )
        if row and minutes and minute != previous + 1:
            return DataError(
                f"{where} where {clock(previous + 1 - start)} is next: rows are missing before it; add them"
            )
        previous = minute
    raise AssertionError("the rows' times are sound")


def _usual_step(times: Sequence[int | None]) -> int:
    """The most common step between rows; 0 if there is none."""
    known = [time for time in times if time is not None]
    steps = Counter(later - earlier for earlier, later in pairwise(known))
    return steps.most_common(1)[0][0] if steps else 0


def _cells(text: np.ndarray, spans: np.ndarray) -> list[bytes]:
    """The first cell of each row; 40 bytes of a longer one, which is no time."""
    lengths = spans[:, 1] - spans[:, 0]
    places = np.arange(min(40, max(1, lengths.max(initial=0))))
    characters = text[np.minimum(spans[:, :1] + places, len(text) - 1)]
    characters[places >= lengths[:, None]] = 0
    cells: list[bytes] = characters.view(f"S{len(places)}").ravel().tolist()
    return cells


@lru_cache(maxsize=8192)
def _parse_cell(cell: bytes) -> int | None:
    return parse_time(cell.decode("utf-8", "replace")) if len(cell) < 40 else None
