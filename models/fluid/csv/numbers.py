"""The rows of a CSV file of numbers, parsed and checked in one compiled pass.

    read_bytes(path)               the file's bytes, as `parse_rows` wants them
    parse_rows(text, start, out)   uint8 text -> float32 [rows, columns], or which fault stands where

A general CSV reader guesses types, makes an object of each column and hands out a table that is still to be checked and
transposed. Rows here are a time stamp and some thousand numbers, and what is wanted is one matrix; a loop that knows
this does everything at once. Numba compiles it when this module is first imported (some seconds) and keeps the result
in __pycache__.

A number is [+-] digits [. digits] [e [+-] digits], with digits on one side of the point at least; an empty cell is NaN.
Nothing else is a number here: no spaces, quotes, "nan", "inf" or grouping of digits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from trunkline.engine.machine.reading import open_regular

OK, BAD_NUMBER, NOT_FINITE, TOO_FEW_CELLS, TOO_MANY_CELLS, TOO_MANY_ROWS, EMPTY_LINE = range(7)

_COMMA, _NEWLINE, _RETURN, _PLUS, _MINUS, _POINT, _ZERO = (ord(c) for c in ",\n\r+-.0")
_LOWER_E, _UPPER_E = ord("e"), ord("E")
_PADDING = 16  # bytes that may be loaded past the last cell
_FULL = 10**17  # a mantissa from here on takes no further digit: int64 would overflow, and float64 holds no more
_POWERS = 10.0 ** np.arange(23)  # exact in float64, so that scaling by them rounds once
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST_EXPONENT = 100_000

_U = np.uint64  # Numba makes a float of uint64 with int64, so constants that meet a word are of its type
_ASCII_ZEROS = _U(0x3030303030303030)
_ABOVE_NINE = _U(0x7676767676767676)
_HIGH_BITS = _U(0x8080808080808080)
_ONES = _U(0x0101010101010101)
_PAIRS = _U(0x000000FF000000FF)
_TEXT = numba.types.Array(numba.uint8, 1, "C")
_WORDS = numba.types.Array(numba.uint64, 1, "A", aligned=False)
_STAMPS = numba.types.Array(numba.int64, 2, "C")
_VALUES = numba.types.Array(numba.float32, 2, "A")


class Parsed(NamedTuple):
    """What became of a text. For status OK: `rows` rows were found, the first cell of row r is text[slice(*stamps[r])].

    Otherwise the first fault: `rows` rows before it are sound, and `column` (from 0, the first cell left out) of the
    next has a cell that begins at `position`. NOT_FINITE is a number too large for float32.
    """

    status: int
    rows: int
    column: int
    position: int
    stamps: np.ndarray


def read_bytes(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 [N + 16]: newlines fill up the end."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        text = np.empty(size + _PADDING, np.uint8)
        text[file.readinto(text.data[:size]) :] = _NEWLINE
    return text


def parse_rows(text: np.ndarray, start: int, out: np.ndarray) -> Parsed:
    """Parse the rows of `text` (from `read_bytes`) from position `start` on, without holding the interpreter lock.

    out: float32 [R, C], of any strides, filled with the cells after the first; a text of more rows is a fault.
    Lines end in LF or CR LF; empty lines at the end are no rows. Numbers are rounded to float64 (exactly for 15 digits
    and 8 decimals or fewer, else within two units in the last place), then to float32.
    """
    stamps = np.zeros((len(out), 2), np.int64)
    words = np.ndarray(len(text) - 7, np.uint64, text.data, 0, (1,))  # the eight bytes from each position on
    return Parsed(*_parse_rows(text, words, start, stamps, out), stamps)


@numba.njit(numba.types.UniTuple(numba.int64, 2)(_TEXT, numba.int64), nogil=True, cache=True)
def _parse_exponent(text: np.ndarray, i: int) -> tuple[int, int]:
    """(position after it, exponent) of an integer that begins at i; the position is -1 if there is none."""
    negative = text[i] == _MINUS
    if negative or text[i] == _PLUS:
        i += 1
    first = i
    exponent = 0
    while _ZERO <= text[i] <= _ZERO + 9:
        exponent = min(exponent * 10 + (np.int64(text[i]) - _ZERO), _LARGEST_EXPONENT)
        i += 1
    if i == first:
        return -1, 0
    return i, -exponent if negative else exponent


@numba.njit(numba.types.Tuple((numba.int64, numba.int64, numba.float64))(_TEXT, numba.int64), nogil=True, cache=True)
def _parse_any(text: np.ndarray, i: int) -> tuple[int, int, float]:
    """(status, position after it, value) of the cell that begins at i."""
    cell = i
    negative = text[i] == _MINUS
    if negative or text[i] == _PLUS:
        i += 1
    first = i
    mantissa = np.int64(0)
    exponent = np.int64(0)
    while _ZERO <= text[i] <= _ZERO + 9:
        if mantissa < _FULL:
            mantissa = mantissa * 10 + (np.int64(text[i]) - _ZERO)
        else:
            exponent += 1
        i += 1
    digits = i - first
    if text[i] == _POINT:
        i += 1
        first = i
        while _ZERO <= text[i] <= _ZERO + 9:
            if mantissa < _FULL:
                mantissa = mantissa * 10 + (np.int64(text[i]) - _ZERO)
                exponent -= 1
            i += 1
        digits += i - first
    if digits > 0 and (text[i] == _LOWER_E or text[i] == _UPPER_E):
        i, power = _parse_exponent(text, i + 1)
        if i < 0:
            return BAD_NUMBER, cell, 0.0
        exponent += power
    if text[i] != _COMMA and text[i] != _NEWLINE and text[i] != _RETURN:
        return BAD_NUMBER, cell, 0.0
    if digits == 0:
        return (OK if i == cell else BAD_NUMBER), i, np.nan
    value = np.float64(mantissa)
    if -23 < exponent < 0:
        value /= _POWERS[-exponent]
    elif exponent != 0 and mantissa != 0:
        value *= 10.0 ** np.float64(exponent)
    if value > _FLOAT32_MAX:
        return NOT_FINITE, i, value
    return OK, i, -value if negative else value


@numba.njit(numba.types.UniTuple(numba.uint64, 2)(numba.uint64), nogil=True, cache=True)
def _leading_digits(word: int) -> tuple[int, int]:
    """(k, digits): how many of eight characters, the lowest byte first, are digits before the first that is none, and
    the values of those digits in their bytes, with 0 in the bytes after them."""
    values = word ^ _ASCII_ZEROS
    others = ((values + _ABOVE_NINE) | values) & _HIGH_BITS  # exact up to the first byte that is no digit
    before = ((others & (~others + _U(1))) >> _U(7)) - _U(1)
    return ((before & _ONES) * _ONES) >> _U(56), values & before


@numba.njit(numba.uint64(numba.uint64), nogil=True, cache=True)
def _eight_digits(digits: int) -> int:
    """The number spelt by eight bytes of 0 ... 9, the lowest byte first, in three steps: pairs, fours, all."""
    pairs = digits * _U(10) + (digits >> _U(8))
    high = (pairs & _PAIRS) * _U(100 + (1000000 << 32))
    low = ((pairs >> _U(16)) & _PAIRS) * _U(1 + (10000 << 32))
    return (high + low) >> _U(32)


@numba.njit(numba.types.UniTuple(numba.int64, 4)(_TEXT, _WORDS, numba.int64, _STAMPS, _VALUES), nogil=True, cache=True)
def _parse_rows(
    text: np.ndarray, words: np.ndarray, start: int, stamps: np.ndarray, out: np.ndarray
) -> tuple[int, int, int, int]:
    rows, columns = out.shape
    i = start
    for row in range(rows + 1):
        if i < len(text) and (text[i] == _NEWLINE or text[i] == _RETURN):
            line = i
            while i < len(text) and (text[i] == _NEWLINE or text[i] == _RETURN):
                i += 1
            if i < len(text):
                return EMPTY_LINE, row, 0, line
        if i >= len(text):
            return OK, row, 0, i
        if row == rows:
            return TOO_MANY_ROWS, row, 0, i
        stamps[row, 0] = i
        while text[i] != _COMMA and text[i] != _NEWLINE and text[i] != _RETURN:
            i += 1
        stamps[row, 1] = i
        for column in range(columns):
            if text[_U(i)] != _COMMA:
                return TOO_FEW_CELLS, row, column, i
            cell = i + 1
            negative = text[_U(cell)] == _MINUS
            i = cell + negative
            # Up to 7 digits, a point and up to 16 decimals are taken eight characters at a time, without a branch on
            # their number, which the processor would guess wrong in most cells; `_parse_any` takes every other cell.
            count, digits = _leading_digits(words[_U(i)])
            usual = _U(0) < count < _U(8)
            padding = (_U(8) - count) << _U(2)
            whole = _eight_digits((digits << padding) << padding)
            value = np.float64(np.int64(whole))
            i += np.int64(count)
            if text[_U(i)] == _POINT:
                count, digits = _leading_digits(words[_U(i + 1)])
                value = np.float64(np.int64(whole * _U(100_000_000) + _eight_digits(digits))) / 1e8
                i += 1 + np.int64(count)
                if count == _U(8):
                    count, digits = _leading_digits(words[_U(i)])
                    value += np.float64(np.int64(_eight_digits(digits))) / 1e16
                    i += np.int64(count)
            after = text[_U(i)]
            if usual and after in (_COMMA, _NEWLINE, _RETURN):
                out[row, column] = -value if negative else value
            else:
                status, i, value = _parse_any(text, cell)
                if status != OK:
                    return status, row, column, cell
                out[row, column] = value
        if text[i] == _COMMA:
            return TOO_MANY_CELLS, row, columns, i + 1
        i += 1
        if i < len(text) and text[i - 1] == _RETURN and text[i] == _NEWLINE:
            i += 1
    return OK, rows, 0, i  # never reached: the loop returns in its last round
