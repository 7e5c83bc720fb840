"""One case from its CSV files: checked, aligned by time, set-points held.

    read_case(folder, schema)        Boundary.csv and, where present, the output files -> Case
    read_columns(folder)             the columns of each file, from the headers
    schema_of(columns)               the schema that they make
    check_columns(columns, ...)      name the first column that is missing or not expected
    hold(times, values, at)          zero-order hold

Everything wrong raises DataError with the file, the line, the column and what to do about it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.files import check_names, read_file, read_header
from trunkline.models.fluid.schema import BOUNDARY, GROUPS, MINUTES, Schema

Columns = dict[str, tuple[str, ...]]
"""The columns of each file that a case has, TIME left out: {"Boundary": (...), "B": (...), ...}."""


@dataclass(frozen=True)
class Case:
    """A day of a network, float32. Row i is minute i + 1: 0:01 ... 24:00.

    boundary  [1440, Vb]  the set-points in force at that minute
    state     [1440, Vs]  NaN where a cell was empty; None for a case without outputs
    """

    day: date
    boundary: np.ndarray
    state: np.ndarray | None


def read_case(folder: Path, schema: Schema, *, outputs: bool | None = None, threads: int = 1) -> Case:
    """Read and check the files of a case; columns may stand in any order and are put into the schema's.

    outputs: the output files must be there (True), are left alone (False), or are read if any is there (None). A group
        without columns in the schema needs no file
    threads: how many files are read at a time
    """
    files = _files(folder, outputs)
    _require_groups(folder, files, schema)
    set_points = np.empty((MINUTES + 1, schema.num_boundary), np.float32)
    state = np.empty((MINUTES, schema.num_states), np.float32)

    def read(name: str) -> tuple[date, np.ndarray]:
        path = folder / f"{name}.csv"
        if name == BOUNDARY:
            return read_file(path, schema.boundary, set_points, minutes=None, empty_cells=False)
        values = state[:, schema.group_slices[name]]
        return read_file(path, schema.groups[name], values, minutes=range(1, MINUTES + 1), empty_cells=True)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            days, minutes = zip(*pool.map(read, files))
    else:
        days, minutes = zip(*map(read, files))
    for name, day in zip(files, days):
        if day != days[0]:
            raise DataError(
                f"{folder / name}.csv: line 2, column 'TIME': the day is {day} where {files[0]}.csv has {days[0]}: "
                "the files of a case must be of one day; correct TIME"
            )
    boundary = hold(minutes[0], set_points, np.arange(1, MINUTES + 1))
    return Case(days[0], boundary, state if len(files) > 1 else None)


def hold(times: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Zero-order hold: for each time of `at` [M] the row of `values` [R, ...] in force, the last that is not later.

    `times` [R] ascends. Raises ValueError if nothing is in force yet at one of the times.
    """
    rows = np.searchsorted(times, at, side="right") - 1
    if (rows < 0).any():
        raise ValueError("a time is before the first row")
    return values[rows]


def read_columns(folder: Path, *, outputs: bool | None = None) -> Columns:
    """The columns of the files that a case has, from their first lines.

    outputs: at least one output file must be there (True), they are left alone (False), or read if any is there (None)
    """
    return {name: read_header(folder / f"{name}.csv") for name in _files(folder, outputs)}


def schema_of(columns: Columns) -> Schema:
    """The schema of a case with outputs, in the order of its columns."""
    return Schema(columns[BOUNDARY], {group: columns.get(group, ()) for group in GROUPS})


def check_columns(columns: Columns, schema: Schema, folder: Path) -> None:
    """Raise DataError unless each file of the case has exactly the columns of the schema, in any order, and none is
    missing whose columns the schema has."""
    _require_groups(folder, list(columns), schema)
    for name, found in columns.items():
        check_names(folder / f"{name}.csv", found, schema.boundary if name == BOUNDARY else schema.groups[name])


def _files(folder: Path, outputs: bool | None) -> list[str]:
    """The files to read, Boundary first. Raises DataError without folder, Boundary.csv or an output asked for."""
    present = [name for name in (BOUNDARY, *GROUPS) if (folder / f"{name}.csv").is_file()]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, of a case's CSV files: check the path")
    if BOUNDARY not in present:
        raise DataError(f"{folder / BOUNDARY}.csv: missing: every case needs its set-points; add the file")
    if outputs and len(present) == 1:
        raise DataError(
            f"{folder}: has no output file, which a case with outputs needs for each group of devices: add those of "
            f"{', '.join(f'{group}.csv' for group in GROUPS)} that the network has"
        )
    return [BOUNDARY] if outputs is False else present


def _require_groups(folder: Path, files: list[str], schema: Schema) -> None:
    """Raise DataError if a case with outputs, of these files, lacks the file of a group that the schema has."""
    missing = [f"{group}.csv" for group in schema.present_groups if group not in files]
    if len(files) > 1 and missing:
        raise DataError(
            f"{folder / missing[0]}: missing"
            + (f" (and {', '.join(missing[1:])})" if len(missing) > 1 else "")
            + ": a case with outputs needs the file of each group that the network has; add it, or leave the case out"
        )
