"""One CSV file of a case, checked cell by cell.

    read_header(path)                   the columns after TIME
    read_file(path, columns, out, ...)  fill a matrix from a file whose rows are at known minutes of a day
    check_names(path, found, expected)  name the first column that is missing or not expected
    parse_time(text)                    "2025/1/1 0:01" -> minutes since the calendar's first day

Everything wrong raises DataError with the file, the line, the column and what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import open_regular
from trunkline.models.fluid.csv import numbers as csv_numbers
from trunkline.models.fluid.csv.numbers import Parsed, parse_rows, read_bytes
from trunkline.models.fluid.schema import MINUTES

_TIME = re.compile(r"(\d{4})([/-])(\d{1,2})\2(\d{1,2})[ T](\d{1,2}):(\d{2})(?::00(?:\.0+)?)?")
_BOM = b"\xef\xbb\xbf"
_LARGEST_FILE = 4 << 30
_LARGEST_HEADER = 64 << 20


def read_header(path: Path) -> tuple[str, ...]:
    """The columns of a file in its order, TIME left out."""
    return _read_header(path)[0]


def read_file(path: Path, columns: Sequence[str], out: np.ndarray, *, first: int, step: int, empty_cells: bool) -> date:
    """Fill `out`, float32 [R, C], with the file's `columns`, which may stand in any order; returns the day.

    The file must have R rows, at the minutes first, first + step, ... of one day. An empty cell becomes NaN where
    `empty_cells` allows it.
    """
    found, start = _read_header(path)
    check_names(path, found, columns)
    if path.stat().st_size > _LARGEST_FILE:
        raise DataError(f"{path}: larger than {_LARGEST_FILE >> 30} GiB, though a file holds one day only: split it")
    in_order = tuple(columns) == found
    values = out if in_order else np.empty_like(out)
    text = read_bytes(path)
    parsed = parse_rows(text, start, values)
    day = _check_times(path, text, parsed, len(out), first, step)
    if parsed.status != csv_numbers.OK:
        raise _fault(path, text, parsed, found, len(out), empty_cells)
    if day is None:
        raise DataError(f"{path}: line 2: no rows after the header, where {len(out)} are needed: complete the file")
    if parsed.rows < len(out):
        last = _clock(first + step * (parsed.rows - 1))
        raise DataError(
            f"{path}: line {parsed.rows + 1}: the file ends with {last}: {parsed.rows} rows where {len(out)} are "
            f"needed, up to {_clock(first + step * (len(out) - 1))}: complete it"
        )
    if not empty_cells and np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise DataError(f"{path}: line {row + 2}, column {found[column]!r}: empty: a value must stand here; fill it in")
    if not in_order:
        place = {name: k for k, name in enumerate(found)}
        out[:] = values[:, [place[name] for name in columns]]
    return day


def check_names(path: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raise DataError unless `found` has exactly the names of `expected`, in any order."""
    remedy = "every case must have the same columns"
    missing = [name for name in expected if name not in set(found)] if set(expected) - set(found) else []
    if missing:
        raise DataError(
            f"{path}: line 1: column {missing[0]!r} is missing{_and_more(missing)}, which other cases have: "
            f"{remedy}; add it, or leave the case out"
        )
    surplus = [name for name in found if name not in set(expected)] if set(found) - set(expected) else []
    if surplus:
        raise DataError(
            f"{path}: line 1: column {surplus[0]!r} is not expected{_and_more(surplus)}, other cases lack it: "
            f"{remedy}; remove it, or leave the case out"
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


def _read_header(path: Path) -> tuple[tuple[str, ...], int]:
    """(columns after TIME, position of the second line)."""
    try:
        with open_regular(path) as file:
            line = file.readline(_LARGEST_HEADER)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}: check the file") from error
    try:
        text = line.removeprefix(_BOM).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line 1: not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    if not text.strip():
        raise DataError(f"{path}: line 1: empty, where the header 'TIME,...' must stand: write the file again")
    first, *columns = text.split(",")
    if first != "TIME":
        raise DataError(
            f"{path}: line 1: the first column is {first[:80]!r}: it must be TIME; separate columns by commas"
        )
    if "" in columns:
        raise DataError(
            f"{path}: line 1: column {columns.index('') + 2} has no name: name it, or remove the surplus comma"
        )
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: line 1: column {twice[0]!r} stands there {columns.count(twice[0])} times: remove or rename it"
        )
    return tuple(columns), len(line)


def _check_times(path: Path, text: np.ndarray, parsed: Parsed, rows: int, first: int, step: int) -> date | None:
    """Check the TIME cells of all rows that were read; the day, or None if there is no row."""
    # A cell that cannot be read stands in a line whose TIME can.
    stopped = parsed.status in (csv_numbers.BAD_NUMBER, csv_numbers.NOT_FINITE)
    cells = _time_cells(text, parsed.stamps[: parsed.rows + stopped])
    minutes = [_parse_cell(cell) for cell in cells]
    if not minutes:
        return None
    if minutes[0] is not None:
        day = minutes[0] - first
        if day % MINUTES == 0 and minutes == list(range(minutes[0], minutes[0] + step * len(minutes), step)):
            return (datetime.min + timedelta(minutes=day)).date()
    raise _time_fault(path, cells, minutes, rows, first, step)


def _time_fault(
    path: Path, cells: list[bytes], minutes: list[int | None], rows: int, first: int, step: int
) -> DataError:
    previous = 0
    for row, (cell, minute) in enumerate(zip(cells, minutes)):
        where = f"{path}: line {row + 2}, column 'TIME': {cell.decode('utf-8', 'replace')!r}"
        if minute is None:
            return DataError(f"{where} is not a time: write it as 2025/1/1 0:01 or 2025-01-01 00:01")
        if row == 0 and (minute - first) % MINUTES:
            return DataError(
                f"{where} in the first row: it must be {_clock(first)}, since a day's rows run from there to "
                f"{_clock(first + step * (rows - 1))}: add the missing rows or correct TIME"
            )
        if row and minute == previous:
            return DataError(f"{where} is a duplicate of the line before: a minute occurs once; remove one of the rows")
        if row and minute < previous:
            return DataError(f"{where} is earlier than the line before: sort the rows by TIME")
        if row and minute != previous + step:
            what = (
                "rows are missing before it; add them" if minute > previous + step else f"rows are {step} minutes apart"
            )
            return DataError(f"{where} where {_clock(first + step * row)} is next: {what}")
        previous = minute
    raise AssertionError("the rows' times are sound")


def _time_cells(text: np.ndarray, spans: np.ndarray) -> list[bytes]:
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


def _fault(
    path: Path, text: np.ndarray, parsed: Parsed, columns: Sequence[str], rows: int, empty_cells: bool
) -> DataError:
    line = f"{path}: line {parsed.rows + 2}"
    if parsed.status == csv_numbers.TOO_MANY_ROWS:
        return DataError(f"{line}: more than {rows} rows, though a file holds one day: remove the surplus rows")
    if parsed.status == csv_numbers.EMPTY_LINE:
        return DataError(f"{line}: empty, with rows after it: remove the line")
    if parsed.status == csv_numbers.TOO_MANY_CELLS:
        last = columns[-1] if columns else "TIME"
        return DataError(
            f"{line}: more than {len(columns) + 1} cells: something stands after the last column, {last!r}: remove it "
            "(a decimal comma makes two cells of one)"
        )
    where = f"{line}, column {columns[parsed.column]!r}"
    if parsed.status == csv_numbers.TOO_FEW_CELLS:
        return DataError(
            f"{where}: the line ends after {parsed.column + 1} of {len(columns) + 1} cells: complete it"
            + (" (a missing value is an empty cell between commas)" if empty_cells else "")
        )
    raw = re.split(rb"[,\r\n]", text[parsed.position : parsed.position + (1 << 16)].tobytes(), maxsplit=1)[0]
    try:
        cell = raw.decode("utf-8")[:80]
    except UnicodeDecodeError:
        return DataError(f"{where}: {raw[:40]!r} is not UTF-8: save the file as UTF-8")
    if parsed.status == csv_numbers.NOT_FINITE:
        return DataError(f"{where}: {cell!r} is too large for float32: correct it")
    kind = "is infinite" if re.fullmatch(r"[+-]?inf(inity)?", cell.strip().lower()) else "is not a number"
    remedy = "write digits with a decimal point" + (", or leave the cell empty if the value is missing" * empty_cells)
    return DataError(f"{where}: {cell!r} {kind}: {remedy}")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _clock(minute: int) -> str:
    """A minute of the day as files write it: 61 -> '1:01', 1440 -> '24:00 (0:00 of the next day)'."""
    return f"{minute // 60}:{minute % 60:02d}" + (" (0:00 of the next day)" if minute == MINUTES else "")
