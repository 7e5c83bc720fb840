"""One CSV file of a case, checked cell by cell.

    read_header(path)                   the columns after TIME
    read_file(path, columns, out, ...)  fill a matrix from a file whose rows are minutes of a day
    check_names(path, found, expected)  name the first column that is missing or not expected

Everything wrong raises DataError with the file, the line, the column and what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import open_regular
from trunkline.models.fluid.csv import numbers as csv_numbers
from trunkline.models.fluid.csv.numbers import Parsed, parse_rows, read_bytes
from trunkline.models.fluid.csv.times import check_held, clock, read_times

_BOM = b"\xef\xbb\xbf"
_LARGEST_FILE = 4 << 30
_LARGEST_HEADER = 64 << 20


def read_header(path: Path) -> tuple[str, ...]:
    """The columns of a file in its order, TIME left out."""
    return _read_header(path)[0]


def read_file(
    path: Path, columns: Sequence[str], out: np.ndarray, *, minutes: range | None, empty_cells: bool
) -> tuple[date, np.ndarray]:
    """Fill `out`, float32 [R, C], with the file's `columns`, which may stand in any order; returns the day and the
    minute of each row.

    minutes: the R minutes of the day at which the file must have its rows. None: values that hold until the next row,
        so rows at any minutes from 0:00 on fill the first rows of `out`
    An empty cell becomes NaN where `empty_cells` allows it.
    """
    found, start = _read_header(path)
    check_names(path, found, columns)
    if path.stat().st_size > _LARGEST_FILE:
        raise DataError(f"{path}: larger than {_LARGEST_FILE >> 30} GiB, though a file holds one day only: split it")
    in_order = tuple(columns) == found
    values = out if in_order else np.empty_like(out)
    text = read_bytes(path)
    parsed = parse_rows(text, start, values)
    # A cell that cannot be read stands in a line whose TIME can.
    stopped = parsed.status in (csv_numbers.BAD_NUMBER, csv_numbers.NOT_FINITE)
    times = read_times(path, text, parsed.stamps[: parsed.rows + stopped], minutes)
    if parsed.status != csv_numbers.OK:
        raise _fault(path, text, parsed, found, len(out), empty_cells)
    if not len(times):
        needed = len(out) if minutes else "set-points"
        raise DataError(f"{path}: line 2: no rows after the header, where {needed} are needed: complete the file")
    midnight = times[0] - (minutes[0] if minutes else 0)
    times = times - midnight
    if minutes is None:
        check_held(path, times)
    elif parsed.rows < len(out):
        raise DataError(
            f"{path}: line {parsed.rows + 1}: the file ends with {clock(int(times[-1]))}: {parsed.rows} rows where "
            f"{len(out)} are needed, up to {clock(minutes[-1])}: complete it"
        )
    if not empty_cells and np.isnan(values[: parsed.rows]).any():
        row, column = np.argwhere(np.isnan(values[: parsed.rows]))[0]
        raise DataError(f"{path}: line {row + 2}, column {found[column]!r}: empty: a value must stand here; fill it in")
    if not in_order:
        place = {name: k for k, name in enumerate(found)}
        out[: parsed.rows] = values[: parsed.rows, [place[name] for name in columns]]
    return (datetime.min + timedelta(minutes=int(midnight))).date(), times


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
    if first == '"TIME"':
        raise DataError(f"{path}: line 1: the names stand in quotes: write the file without quotes")
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
    if cell.startswith('"'):
        return DataError(
            f"{where}: {_quoted(text, parsed.position)}: write numbers with a decimal point, without quotes"
        )
    if parsed.status == csv_numbers.NOT_FINITE:
        return DataError(f"{where}: {cell!r} is too large for float32: correct it")
    kind = "is infinite" if re.fullmatch(r"[+-]?inf(inity)?", cell.strip().lower()) else "is not a number"
    remedy = "write digits with a decimal point" + (", or leave the cell empty if the value is missing" * empty_cells)
    return DataError(f"{where}: {cell!r} {kind}: {remedy}")


def _quoted(text: np.ndarray, position: int) -> str:
    """The cell in quotes that begins there, commas in it too, and what it is."""
    cell = re.split(rb'[\r\n]|(?<=.)"', text[position : position + 80].tobytes(), maxsplit=1)[0].decode(
        "utf-8", "replace"
    )
    comma = re.fullmatch(r'"[+-]?\d+,\d+', cell)
    return f"{cell[1:]!r} stands in quotes" + (" and has a decimal comma" if comma else "")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
