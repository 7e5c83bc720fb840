"""Records from the files that people have: JSONL, JSON, Parquet, CSV, TSV and plain text.

    find_files(paths, suffixes)       the files to read, in the order in which they are read
    read_records(files, record_of)    (place, record) for a good record, Problem(place, reason) for any other

What a record is, a workload says; a .txt file is one document, or each of its lines is, and CSV has a line of names.
All but JSON and whole documents are read piece by piece, so memory does not depend on their size. A bad record is never
dropped silently and never stops the others; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trunkline.engine.errors import ConfigError, DataError

MAX_RECORD_BYTES = 16 << 20
MAX_JSON_BYTES = 1 << 30
_PARQUET_ROWS = 1024
_T = TypeVar("_T")


class BadRecord(Exception):  # noqa: N818 - not an error of the program; it becomes a Problem
    """Why a record cannot be used."""


@dataclass(frozen=True)
class Place:
    """Where a record stands: line `number` of a JSONL file, item or row `number` of others, from 1."""

    path: Path
    number: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}" if self.number is None else f"{self.path}: {self.unit} {self.number}"


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used. `reason` holds nothing of the record, so equal problems have equal reasons."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def find_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files at `paths`; a folder gives those in it and below it that end in one of `suffixes`, sorted.

    Names that begin with a dot are passed over. Raises ConfigError for a path that is not there, for a file that ends
    in nothing known, and for a folder without any file to read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _files_below(path, suffixes)
        elif not path.exists():
            raise ConfigError(f"{path}: no such file or folder: check the path")
        elif path.suffix.lower() not in suffixes:
            raise ConfigError(f"{path}: cannot be read: convert it to one of {', '.join(suffixes)}")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _files_below(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(path for path in found if path.suffix.lower() in suffixes)
    if not files:
        held = f"its {len(found)} files end in none of" if found else "an empty folder; put files there that end in"
        raise ConfigError(f"{folder}: no file to read: {held} {', '.join(suffixes)}")
    return files


def read_records(
    files: Sequence[Path], record_of: Callable[[Any], _T], *, text_lines: bool = False
) -> Iterator[tuple[Place, _T] | Problem]:
    """Every record of `files` in order, or what is wrong with it. Raises DataError for a file that is damaged whole.

    record_of: the record that a line's, an item's or a row's value stands for; it raises BadRecord
    text_lines: every line of a .txt file is a record, unless it is blank; otherwise the whole file is one
    """
    readers = _READERS | {".txt": _text_lines} if text_lines else _READERS
    for path in files:
        try:
            for place, raw in readers[path.suffix.lower()](path):
                try:
                    yield place, record_of(raw() if callable(raw) else raw)
                except BadRecord as bad:
                    yield Problem(place, str(bad))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the file") from error


def _json_lines(path: Path) -> Iterator[tuple[Place, Any]]:
    return _lines(path, _decoded)


def _text_lines(path: Path) -> Iterator[tuple[Place, Any]]:
    return _lines(path, lambda line: _utf8(line.removesuffix(b"\n").removesuffix(b"\r")))


def _lines(path: Path, value_of: Callable[[bytes], Any]) -> Iterator[tuple[Place, Any]]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            place = Place(path, number)
            if len(line) > MAX_RECORD_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD_BYTES)
                yield place, _too_long
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():  # an empty line holds no record
                yield place, lambda line=line: value_of(line)
    if number == 0:
        yield Place(path), _empty_file


def _json_items(path: Path) -> Iterator[tuple[Place, Any]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path}: larger than {MAX_JSON_BYTES >> 30} GiB: convert it to JSONL, one object a line")
    data = path.read_bytes()
    if not data.strip():
        yield Place(path), _empty_file
        return
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): mend it, or write one object a line as .jsonl") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: holds no list: use [{{...}}, ...], or one object a line as .jsonl")
    for index, item in enumerate(items):
        yield Place(path, index + 1, "item"), item


def _parquet_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    import polars as pl  # takes a while, and a list of flags needs this module

    number = 0
    try:
        for batch in pl.scan_parquet(path, glob=False).collect_batches(chunk_size=_PARQUET_ROWS):
            for row in batch.iter_rows(named=True):
                number += 1
                yield Place(path, number, "row"), _without_nulls(row)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}): write it again") from error
    if number == 0:
        yield Place(path), _empty_file


def _without_nulls(value: Any) -> Any:
    """Fields that a row lacks are null in Parquet, where all rows have the same fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_file(path: Path) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield Place(path), _too_long
    elif not data:
        yield Place(path), _empty_file
    else:
        yield Place(path), lambda: _utf8(data)


def _table_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    rows: Any = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".tsv":  # whose quotes are text
                rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:
                rows = csv.reader(file, strict=True)
            names = next(rows, None)
            if names is None:
                yield Place(path), _empty_file
                return
            if len(set(names)) < len(names):
                raise DataError(f"{path}: line 1: two columns have one name: mend the line of names")
            for row in rows:
                if row:  # an empty line holds no record
                    yield Place(path, rows.line_num), _columns if len(row) != len(names) else dict(zip(names, row))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num}: not a table ({error}): mend it there") from error


_READERS = {
    ".jsonl": _json_lines, ".json": _json_items, ".parquet": _parquet_rows, ".txt": _text_file, ".csv": _table_rows,
    ".tsv": _table_rows,
}  # fmt: skip


def _columns() -> Any:
    raise BadRecord("has more or fewer columns than the first line")


def _too_long() -> Any:
    raise BadRecord(f"longer than {MAX_RECORD_BYTES >> 20} MiB: split it")


def _empty_file() -> Any:
    raise BadRecord("the file is empty")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None


def _decoded(line: bytes) -> Any:
    text = _utf8(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None
