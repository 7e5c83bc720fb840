from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.fluid.csv_tree import COLUMNS, OUTPUT_FILES, STATES, Edit, lines, output, set_point, time, write_case
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.cases import check_columns, hold, read_case, read_columns, schema_of
from trunkline.models.fluid.schema import GROUPS, Schema

SCHEMA = Schema(COLUMNS["Boundary"], {group: COLUMNS[group] for group in GROUPS})


def test_every_value_stands_at_its_minute(tmp_path: Path) -> None:
    case = read_case(write_case(tmp_path), SCHEMA)
    assert case.day == date(2025, 1, 1)
    assert case.state is not None
    assert (case.boundary.shape, case.state.shape) == ((1440, 2), (1440, len(STATES)))
    assert case.boundary.dtype == case.state.dtype == np.float32
    for minute in (1, 2, 179, 180, 181, 1439, 1440):
        for column in range(len(STATES)):
            assert case.state[minute - 1, column] == output(column, minute)
    # Set-points of rows 0:00, 0:30, ... 23:30 hold from that very minute until the next row.
    for minute, row in (
        (1, 0),
        (29, 0),
        (30, 1),
        (59, 1),
        (60, 2),
        (179, 5),
        (180, 6),
        (1409, 46),
        (1410, 47),
        (1440, 47),
    ):
        assert case.boundary[minute - 1].tolist() == [set_point(0, row), set_point(1, row)]


def test_a_switch_is_never_between_its_values(tmp_path: Path) -> None:
    def switch(text: list[str]) -> list[str]:
        return [text[0]] + [re.sub(r",\d+,", f",{int(k >= 6)},", line) for k, line in enumerate(text[1:])]

    opening = read_case(write_case(tmp_path, edits={"Boundary": switch}), SCHEMA).boundary[:, 0]
    assert opening.tolist() == [0.0] * 179 + [1.0] * 1261  # opened at 3:00: minute 180, row 179


def _rows(minutes: list[int]) -> Edit:
    """Rows of Boundary.csv at these minutes, row k with the values of `set_point(., k)`."""

    def edit(text: list[str]) -> list[str]:
        return [text[0], *(f"{time(m)},{set_point(0, k)},{set_point(1, k)}" for k, m in enumerate(minutes))]

    return edit


@pytest.mark.parametrize(
    "minutes",
    [
        pytest.param([*range(0, 1440, 60)], id="hourly"),
        pytest.param([*range(0, 1441, 15)], id="15 minutes, with 24:00"),
        pytest.param([*range(1441)], id="every minute"),
        pytest.param([0], id="one row"),
        pytest.param([*range(0, 1440, 30), 247], id="a switch between the rows"),
        pytest.param([0, 200, 201, 365, 730, 900, 1080], id="irregular"),
        pytest.param([0, 720], id="two rows"),
    ],
)
def test_set_points_hold_whatever_their_step(tmp_path: Path, minutes: list[int]) -> None:
    minutes = sorted(minutes)
    boundary = read_case(write_case(tmp_path, edits={"Boundary": _rows(minutes)}, outputs=False), SCHEMA).boundary
    for minute in range(1, 1441):
        row = max(k for k, m in enumerate(minutes) if m <= minute)
        assert boundary[minute - 1].tolist() == [set_point(0, row), set_point(1, row)]


def test_irregular_set_points_in_another_order_of_columns(tmp_path: Path) -> None:
    def swap(text: list[str]) -> list[str]:
        return [",".join(line.split(",")[k] for k in (0, 2, 1)) for line in _rows([0, 100, 900])(text)]

    boundary = read_case(write_case(tmp_path, edits={"Boundary": swap}, outputs=False), SCHEMA).boundary
    assert boundary[[0, 98, 99, 898, 899, 1439]].tolist() == [
        [set_point(0, row), set_point(1, row)] for row in (0, 0, 1, 1, 2, 2)
    ]


@given(
    times=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True).map(sorted),
    queries=st.lists(st.integers(0, 80), max_size=20),
)
def test_hold_takes_the_last_row_that_is_not_later(times: list[int], queries: list[int]) -> None:
    values = np.array([[10.0 * t, -t] for t in times])
    queries = [q for q in queries if q >= times[0]]
    held = hold(np.array(times), values, np.array(queries, dtype=int))
    for q, row in zip(queries, held):
        last = max(t for t in times if t <= q)
        assert row.tolist() == [10.0 * last, -last]


def test_hold_knows_nothing_before_the_first_row() -> None:
    with pytest.raises(ValueError, match="before the first row"):
        hold(np.array([5, 10]), np.zeros((2, 1)), np.array([4]))


def test_threads_read_the_same(tmp_path: Path) -> None:
    write_case(tmp_path)
    one, two = (read_case(tmp_path, SCHEMA, threads=threads) for threads in (1, 3))
    np.testing.assert_array_equal(one.boundary, two.boundary)
    np.testing.assert_array_equal(one.state, two.state)


def test_columns_in_another_order_are_put_in_the_schemas(tmp_path: Path) -> None:
    def swap(text: list[str]) -> list[str]:
        return [",".join(line.split(",")[k] for k in (0, 2, 1)) for line in text]

    expected = read_case(write_case(tmp_path / "a"), SCHEMA)
    case = read_case(write_case(tmp_path / "b", edits={"N": swap, "Boundary": swap}), SCHEMA)
    np.testing.assert_array_equal(case.boundary, expected.boundary)
    np.testing.assert_array_equal(case.state, expected.state)


def _each_time(change: Callable[[str], str]) -> Edit:
    def edit(text: list[str]) -> list[str]:
        return [text[0]] + [change(line.split(",")[0]) + line[line.index(",") :] for line in text[1:]]

    return edit


def _padded(time: str) -> str:
    day, clock = time.split(" ")
    year, month, number = day.split("/")
    hour, minute = clock.split(":")
    return f"{year}/{int(month):02d}/{int(number):02d} {int(hour):02d}:{minute}"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_each_time(_padded), id="zero-padded"),
        pytest.param(_each_time(lambda t: _padded(t).replace("/", "-")), id="iso"),
        pytest.param(_each_time(lambda t: _padded(t).replace("/", "-").replace(" ", "T") + ":00"), id="iso-seconds"),
        pytest.param(lambda text: ["\ufeff" + text[0], *text[1:]], id="bom"),
        pytest.param(lambda text: [line + "\r" for line in text], id="crlf"),
        pytest.param(lambda text: [*text, "", ""], id="empty-lines-at-the-end"),
    ],
)
def test_other_ways_to_write_the_same_file(tmp_path: Path, change: Edit) -> None:
    expected = read_case(write_case(tmp_path / "a"), SCHEMA)
    case = read_case(write_case(tmp_path / "b", edits={"Boundary": change, "B": change}), SCHEMA)
    assert case.day == expected.day
    np.testing.assert_array_equal(case.boundary, expected.boundary)
    np.testing.assert_array_equal(case.state, expected.state)


def test_an_empty_output_cell_is_a_missing_value(tmp_path: Path) -> None:
    def clear(text: list[str]) -> list[str]:
        return [line.rsplit(",", 1)[0] + "," if k == 100 else line for k, line in enumerate(text)]

    case = read_case(write_case(tmp_path, edits={"N": clear}), SCHEMA)
    assert case.state is not None
    assert np.argwhere(np.isnan(case.state)).tolist() == [[99, STATES.index("N_001_t")]]


def test_a_case_without_outputs_has_no_state(tmp_path: Path) -> None:
    write_case(tmp_path, outputs=False)
    assert read_case(tmp_path, SCHEMA).state is None
    with pytest.raises(DataError, match=r"has no output file, .*: add those of B\.csv, C\.csv, .*T&E\.csv that"):
        read_case(tmp_path, SCHEMA, outputs=True)
    with pytest.raises(DataError, match=r"/nowhere: no such folder, of a case's CSV files: check the path"):
        read_case(tmp_path / "nowhere", SCHEMA)


def test_outputs_can_be_left_alone(tmp_path: Path) -> None:
    write_case(tmp_path, edits={"N": lambda text: ["damaged"]})
    assert read_case(tmp_path, SCHEMA, outputs=False).state is None


def test_the_schema_comes_from_the_headers(tmp_path: Path) -> None:
    assert schema_of(read_columns(write_case(tmp_path))) == SCHEMA


def test_a_case_of_another_network_is_named_column_by_column(tmp_path: Path) -> None:
    columns = read_columns(write_case(tmp_path))
    with pytest.raises(DataError, match=r"R\.csv: line 1: column 'R_001_q' is missing, which other cases have"):
        check_columns(columns | {"R": ()}, SCHEMA, tmp_path)
    with pytest.raises(DataError, match=r"H\.csv: line 1: column 'H_001_q' is not expected \(and 1 more\)"):
        check_columns(columns | {"H": ("H_001_q", "H_002_q")}, SCHEMA, tmp_path)


def _line(number: int, change: Callable[[str], str]) -> Edit:
    return lambda text: [change(line) if k == number - 1 else line for k, line in enumerate(text)]


def _cell(number: int, column: int, value: str) -> Edit:
    def change(line: str) -> str:
        cells = line.split(",")
        cells[column] = value
        return ",".join(cells)

    return _line(number, change)


BAD: dict[str, tuple[str, Edit, str]] = {
    "empty file": ("N", lambda t: [], r"N\.csv: line 1: empty, where the header 'TIME,\.\.\.' must stand"),
    "no rows": ("N", lambda t: t[:1], r"N\.csv: line 2: no rows after the header, where 1440 are needed"),
    "no TIME": ("N", _cell(1, 0, "Date"), r"N\.csv: line 1: the first column is 'Date': it must be TIME"),
    "semicolons": (
        "N",
        lambda t: [x.replace(",", ";") for x in t],
        r"line 1: the first column is 'TIME;N_001_p;N_001_t'",
    ),
    "nameless column": ("N", _cell(1, 2, ""), r"N\.csv: line 1: column 3 has no name"),
    "missing column": ("N", lambda t: [x.rsplit(",", 1)[0] for x in t], r"line 1: column 'N_001_t' is missing"),
    "extra column": (
        "N",
        lambda t: [t[0] + ",N_002_p", *(x + ",1" for x in t[1:])],
        r"column 'N_002_p' is not expected",
    ),
    "duplicate column": ("N", _cell(1, 2, "N_001_p"), r"N\.csv: line 1: column 'N_001_p' stands there 2 times"),
    "duplicate minute": (
        "N",
        lambda t: [*t[:9], t[8], *t[9:]],
        r"line 10, column 'TIME': '2025/1/1 0:08' is a duplicate",
    ),
    "unordered": (
        "N",
        lambda t: [*t[:8], t[9], t[8], *t[10:]],
        r"line 9, column 'TIME': '2025/1/1 0:09' where 0:08 is",
    ),
    "backwards": ("N", _cell(700, 0, "2025/1/1 0:01"), r"line 700, .* '2025/1/1 0:01' is earlier than the line before"),
    "a gap": (
        "P",
        lambda t: t[:721] + t[722:],
        r"P\.csv: line 722, .*'2025/1/1 12:02' where 12:01 is next: rows are missing",
    ),
    "first row late": ("P", lambda t: [t[0], *t[2:]], r"line 2, .*'2025/1/1 0:02' in the first row: it must be 0:01"),
    "starts at 0:00": (
        "P",
        lambda t: [t[0], "2025/1/1 0:00,1", *t[1:-1]],
        r"it must be 0:01, .* to 24:00 \(0:00 of the next",
    ),
    "cut off": ("P", lambda t: t[:-1], r"line 1440: the file ends with 23:59: 1439 rows where 1440 are needed"),
    "too many rows": ("P", lambda t: [*t, "2025/1/2 0:01,5"], r"P\.csv: line 1442: more than 1440 rows"),
    "bad TIME": (
        "R",
        _cell(3, 0, "2025/1/1 24:61"),
        r"line 3, column 'TIME': '2025/1/1 24:61' is not a time: write it as",
    ),
    "no such day": ("R", _cell(3, 0, "2025/2/30 0:02"), r"'2025/2/30 0:02' is not a time"),
    "TIME empty": ("R", _cell(3, 0, ""), r"R\.csv: line 3, column 'TIME': '' is not a time"),
    "word": ("B", _cell(17, 2, "off"), r"B\.csv: line 17, column 'B_001_q_out': 'off' is not a number: write digits"),
    "nan in words": ("B", _cell(17, 1, "NaN"), r"column 'B_001_p_in': 'NaN' is not a number: .*leave the cell empty"),
    "infinite": ("B", _cell(17, 1, "-inf"), r"line 17, column 'B_001_p_in': '-inf' is infinite"),
    "too large": ("B", _cell(17, 1, "1e40"), r"line 17, column 'B_001_p_in': '1e40' is too large for float32"),
    "space": ("B", _cell(17, 1, " 1.5"), r"' 1\.5' is not a number"),
    "decimal comma": (
        "B",
        _cell(17, 2, "1,5"),
        r"B\.csv: line 17: more than 4?3 cells: .*'B_001_q_out'.*decimal comma",
    ),
    "short row": (
        "B",
        _line(17, lambda x: x.rsplit(",", 1)[0]),
        r"line 17, column 'B_001_q_out': the line ends after 2 of 3",
    ),
    "empty line": ("B", lambda t: [*t[:50], "", *t[50:]], r"B\.csv: line 51: empty, with rows after it"),
    "other day": (
        "C",
        lambda t: [x.replace("2025/", "2026/") for x in t],
        r"C\.csv: .*day is 2026-01-01 where Boundary\.csv",
    ),
    "boundary empty": ("Boundary", _cell(5, 2, ""), r"Boundary\.csv: line 5, column 'T_001:SNQ': empty"),
    "boundary gap": (
        "Boundary",
        lambda t: t[:9] + t[10:],
        r"line 10, .*4:30 where 4:00 is next: rows are 30 minutes apart, and some are missing before it; add them",
    ),
    "boundary two gaps": ("Boundary", lambda t: t[:9] + t[10:30] + t[32:], r"line 10, .*4:30 where 4:00 is next"),
    "boundary short": (
        "Boundary",
        lambda t: t[:-1],
        r"line 48: the file ends with 23:00, .* 30 minutes apart: .* repeat the last row at 23:30",
    ),
    "boundary late": (
        "Boundary",
        lambda t: [t[0], *t[2:]],
        r"line 2, .*'2025/1/1 0:30' in the first row: it must be 0:00",
    ),
    "boundary twice": (
        "Boundary",
        lambda t: [*t[:9], *t[8:]],
        r"line 10, .*'2025/1/1 3:30' is a duplicate of the line",
    ),
    "boundary unordered": (
        "Boundary",
        lambda t: [*t[:8], t[9], t[8], *t[10:]],
        r"line 10, .*'2025/1/1 3:30' is earlier than the line before",
    ),
    "boundary of two days": (
        "Boundary",
        lambda t: [*t, "2025/1/2 0:30,1,1"],
        r"line 50, .*'2025/1/2 0:30' is past the day of the first row",
    ),
    "boundary empty file": ("Boundary", lambda t: t[:1], r"line 2: no rows after the header, where set-points are"),
    "every 5 minutes": (
        "P",
        lambda t: [t[0], *t[5::5]],
        r"P\.csv: the rows are 5 minutes apart, where the state of every minute is needed, 0:01 to 24:00",
    ),
    "every hour from 0:00": (
        "P",
        lambda t: [t[0], "2025/1/1 0:00,1", *t[60:-1:60]],
        r"P\.csv: the rows are 60 minutes apart",
    ),
    "seconds": (
        "P",
        _cell(3, 0, "2025/1/1 0:01:30"),
        r"line 3, .* where rows have seconds, keep those of whole minutes",
    ),
    "quoted, decimal comma": (
        "B",
        _cell(17, 2, '"5,7252"'),
        r"line 17, column 'B_001_q_out': '5,7252' stands in quotes and has a decimal comma: write .* without quotes",
    ),
    "quoted": (
        "B",
        _cell(17, 1, '"5.7252"'),
        r"line 17, column 'B_001_p_in': '5\.7252' stands in quotes: write numbers",
    ),
    "quote left open": ("B", _cell(17, 2, '"5.7'), r"line 17, column 'B_001_q_out': '5\.7' stands in quotes: write"),
    "quoted names": (
        "B",
        lambda t: [",".join(f'"{name}"' for name in t[0].split(",")), *t[1:]],
        r"B\.csv: line 1: the names stand in quotes: write the file without quotes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str) -> None:
    file, edit, message = BAD[name]
    write_case(tmp_path, edits={file: edit})
    with pytest.raises(DataError, match=message) as error:
        read_case(tmp_path, SCHEMA)
    assert str(error.value).startswith(str(tmp_path / f"{file}.csv"))


@pytest.mark.parametrize("file", ["Boundary", *(file for file in OUTPUT_FILES if COLUMNS[file])])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    write_case(tmp_path)
    (tmp_path / f"{file}.csv").unlink()
    with pytest.raises(DataError, match=rf"/{file}\.csv: missing: .*add"):
        read_case(tmp_path, SCHEMA)
    if file != "Boundary":
        columns = read_columns(tmp_path)
        assert file not in columns
        with pytest.raises(DataError, match=rf"/{file}\.csv: missing: .*add it, or leave the case out"):
            check_columns(columns, SCHEMA, tmp_path)


def test_a_group_that_the_network_lacks_needs_no_file(tmp_path: Path) -> None:
    expected = read_case(write_case(tmp_path / "with"), SCHEMA)
    (write_case(tmp_path / "without") / "H.csv").unlink()
    case = read_case(tmp_path / "without", SCHEMA, outputs=True)
    np.testing.assert_array_equal(case.state, expected.state)
    assert schema_of(read_columns(tmp_path / "without")) == SCHEMA


@pytest.mark.parametrize("file", ["Boundary", "P"])
def test_a_pipe_in_place_of_a_file_is_named_at_once(tmp_path: Path, file: str) -> None:
    write_case(tmp_path)
    (tmp_path / f"{file}.csv").unlink()
    os.mkfifo(tmp_path / f"{file}.csv")
    with pytest.raises(DataError, match=rf"{file}\.csv"):
        read_case(tmp_path, SCHEMA)


@pytest.mark.parametrize(
    ("line", "message"),
    [(1, r"N\.csv: line 1: not UTF-8 \(byte \d+\): save the file as UTF-8"), (9, r"N\.csv: line 9, .*not UTF-8: save")],
)
def test_another_encoding_is_named(tmp_path: Path, line: int, message: str) -> None:
    write_case(tmp_path)
    text = list(lines("N"))
    text[line - 1] += "é"
    (tmp_path / "N.csv").write_text("\n".join(text), encoding="latin-1")
    with pytest.raises(DataError, match=message):
        read_case(tmp_path, SCHEMA)


def test_utf16_and_bytes_of_zero_are_no_csv(tmp_path: Path) -> None:
    write_case(tmp_path)
    whole = (tmp_path / "N.csv").read_bytes()
    (tmp_path / "N.csv").write_bytes(whole.decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"N\.csv: line 1: not UTF-8"):
        read_case(tmp_path, SCHEMA)
    (tmp_path / "N.csv").write_bytes(whole[:5000] + bytes(len(whole) - 5000))  # what a crashed file system may leave
    with pytest.raises(DataError, match=r"N\.csv: line 193, column 'N_001_p': the line ends after 1 of 3 cells"):
        read_case(tmp_path, SCHEMA)
