from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.models.fluid.csv import numbers as csv_numbers
from trunkline.models.fluid.csv.numbers import Parsed, parse_rows, read_bytes

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def padded(text: str) -> np.ndarray:
    return np.frombuffer(bytearray(text.encode() + b"\n" * 16), np.uint8)


def parse(text: str, rows: int, columns: int) -> tuple[Parsed, np.ndarray]:
    out = np.full((rows, columns), 777, np.float32)
    return parse_rows(padded(text), 0, out), out


def parse_cell(cell: str) -> tuple[int, np.float32]:
    parsed, out = parse(f"t,{cell},0", 1, 2)
    return parsed.status, out[0, 0]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("0", 0.0),
        ("-0.0", -0.0),
        ("5.", 5.0),
        (".25", 0.25),
        ("-.5", -0.5),
        ("+7.125", 7.125),
        ("1234567", 1234567.0),
        ("12345678", 12345678.0),
        ("123456789012345678901234567890", 123456789012345678901234567890.0),
        ("0.12345678", 0.12345678),
        ("0.123456789", 0.123456789),
        ("0.1234567890123456", 0.1234567890123456),
        ("0.12345678901234567890", 0.1234567890123456789),
        ("0.000000000000000000000000012345", 1.2345e-26),
        ("1e3", 1000.0),
        ("-1.5E-3", -0.0015),
        ("2.5e+02", 250.0),
        ("1e-60", 0.0),
        ("0e99999999999999999999", 0.0),
        ("3.4028234e38", 3.4028234e38),
    ],
)
def test_a_number_is_what_python_says_it_is(cell: str, value: float) -> None:
    status, found = parse_cell(cell)
    assert status == csv_numbers.OK
    assert found.tobytes() == np.float32(value).tobytes()
    assert np.float32(float(cell)) == np.float32(value)


def test_an_empty_cell_is_nan_and_only_that() -> None:
    parsed, out = parse("t,,1\nu,2,\r\n", 2, 2)
    assert parsed.status == csv_numbers.OK
    np.testing.assert_array_equal(out, np.array([[np.nan, 1], [2, np.nan]], np.float32))


@pytest.mark.parametrize("cell", ["3.5e38", "1e39", "-1e999999", "9" * 60])
def test_a_number_beyond_float32_is_a_fault(cell: str) -> None:
    assert parse_cell(cell)[0] == csv_numbers.NOT_FINITE


@pytest.mark.parametrize(
    "form", ["{!r}", "{:.6g}", "{:.9g}", "{:.3f}", "{:.8f}", "{:.15f}", "{:e}", "{:.20E}", "{:+.2f}"]
)
@settings(max_examples=40)
@given(value=st.floats(-1e30, 1e30))
def test_formatted_floats_read_back(form: str, value: float) -> None:
    cell = form.format(value)
    status, found = parse_cell(cell)
    assert status == csv_numbers.OK
    np.testing.assert_array_max_ulp(found, np.float32(float(cell)), maxulp=1)


@given(
    whole=st.integers(0, 9_999_999), decimals=st.text("0123456789", max_size=8), sign=st.sampled_from(["", "-", "+"])
)
def test_up_to_15_digits_are_rounded_as_float_rounds_them(whole: int, decimals: str, sign: str) -> None:
    cell = f"{sign}{whole}.{decimals}"
    assert parse_cell(cell)[1].tobytes() == np.float32(float(cell)).tobytes()


@given(
    st.text("0123456789+-.eE", min_size=1, max_size=24)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=",\r\n"), min_size=1)
)
def test_accepts_numbers_and_nothing_else(cell: str) -> None:
    if NUMBER.fullmatch(cell):
        fits = abs(float(cell)) <= float(np.finfo(np.float32).max)
        assert parse_cell(cell)[0] == (csv_numbers.OK if fits else csv_numbers.NOT_FINITE)
    else:
        parsed, _ = parse(f"t,{cell},0", 1, 2)
        assert (parsed.status, parsed.rows, parsed.column, parsed.position) == (csv_numbers.BAD_NUMBER, 0, 0, 2)


@pytest.mark.parametrize(
    ("text", "status", "rows", "column"),
    [
        ("a,1,2\nb,3\n", csv_numbers.TOO_FEW_CELLS, 1, 1),
        ("a,1,2\nb\n", csv_numbers.TOO_FEW_CELLS, 1, 0),
        ("a,1,2\nb,3,4,5\n", csv_numbers.TOO_MANY_CELLS, 1, 2),
        ("a,1,2,\n", csv_numbers.TOO_MANY_CELLS, 0, 2),
        ("a,1,2\n\nb,3,4\n", csv_numbers.EMPTY_LINE, 1, 0),
        ("a,1,2\nb,3,4\nc,5,6\nd,7,8\n", csv_numbers.TOO_MANY_ROWS, 3, 0),
        ("a,1,2\nb,3,x\n", csv_numbers.BAD_NUMBER, 1, 1),
    ],
)
def test_the_first_fault_is_located(text: str, status: int, rows: int, column: int) -> None:
    parsed, _ = parse(text, 3, 2)
    assert (parsed.status, parsed.rows, parsed.column) == (status, rows, column)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\r\n"])
def test_the_end_of_the_file_may_be_written_in_any_way(end: str) -> None:
    parsed, out = parse("a,1\r\nbc,2" + end, 4, 1)
    assert (parsed.status, parsed.rows) == (csv_numbers.OK, 2)
    assert parsed.stamps[:2].tolist() == [[0, 1], [5, 7]]
    assert out[:, 0].tolist() == [1, 2, 777, 777]


def test_rows_go_into_a_slice_of_a_matrix() -> None:
    out = np.zeros((2, 4), np.float32)
    parse_rows(padded("a,1,2\nb,3,4\n"), 0, out[:, 1:3])
    assert out.tolist() == [[0, 1, 2, 0], [0, 3, 4, 0]]


@pytest.mark.parametrize("size", [0, 1, 100])
def test_bytes_of_a_file_are_filled_up_with_newlines(tmp_path: Path, size: int) -> None:
    (tmp_path / "f").write_bytes(b"x" * size)
    assert read_bytes(tmp_path / "f").tobytes() == b"x" * size + b"\n" * 16
