"""How fast a case is read: this package's reader against pandas.read_csv, on the same files.

    run(arguments)   `python launchers/bench.py prepare`
    write_random_case(folder, seed)         a case of the reference network's size, of random numbers

Every round reads the eight files of one case with pandas (default engine and options, a DataFrame each), with this
reader on one thread, and with it as it is by default: each pair of times is of the same minute of the same machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.fluid.csv.cases import Case, read_case, read_columns, schema_of
from trunkline.models.fluid.schema import BOUNDARY, GROUPS, MINUTES, Schema, parse_column, unit

_LEAST_RATIO = 5
_SIX = tuple(f"{quantity}_{end}" for quantity in "pqt" for end in ("in", "out"))
_DEVICES = {"B": (343, _SIX), "C": (23, (*_SIX, "pwr")), "H": (32, _SIX), "N": (572, ("p", "q", "t"))} | {
    "P": (230, (*_SIX, "inv")),
    "R": (10, ("p_in", "p_out", "q", "t_in", "t_out")),
}
_TYPICAL = {"MPa": (6.0, 6), "m3/s": (40.0, 5), "degC": (15.0, 4), "kW": (4e3, 3), "m3": (4e5, 2), "-": (1.0, 0)}


def run(arguments: argparse.Namespace) -> int:
    """Measure and print each round's times and the median ratios; 1 if our default is below 5 times pandas, else 0.

    Raises DataError if the two disagree about a value.
    """
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds {arguments.rounds}: use 1 or more")
    if arguments.case is not None:
        return _compare(arguments.case, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        write_random_case(Path(folder), seed=0)
        return _compare(Path(folder), arguments.rounds)


def write_random_case(folder: Path, seed: int) -> None:
    """Write the eight files of a case with the reference network's columns (V = 6,712), in its usual decimals."""
    random = np.random.default_rng(seed)
    schema = reference_schema()
    files = [(BOUNDARY, schema.boundary, range(0, MINUTES, 30))]
    files += [(group, schema.groups[group], range(1, MINUTES + 1)) for group in GROUPS]
    for name, columns, minutes in files:
        table: dict[str, Any] = {
            "TIME": [f"2025/1/{1 + m // MINUTES} {m % MINUTES // 60}:{m % 60:02d}" for m in minutes]
        }
        for column in columns:
            size, decimals = _TYPICAL[unit(parse_column(column)[1])]
            table[column] = np.round(size * (1 + 0.2 * random.standard_normal(len(minutes))), decimals)
        pl.DataFrame(table).write_csv(folder / f"{name}.csv")


def reference_schema() -> Schema:
    """The reference network's columns."""
    groups = {
        group: tuple(f"{group}_{number:03d}_{quantity}" for number in range(1, count + 1) for quantity in quantities)
        for group, (count, quantities) in _DEVICES.items()
    }
    ends = [f"T_{number:03d}" for number in range(1, 8)] + [f"E_{number:03d}" for number in range(1, 123)]
    groups["T&E"] = tuple(f"{device}_{quantity}" for device in ends for quantity in "pqt")
    boundary = [f"{device}:{'SP' if device == 'T_007' else 'SNQ'}" for device in ends]
    boundary += [f"B_{number:03d}:FR" for number in range(1, 344)]
    boundary += [f"C_{number:03d}:{parameter}" for number in range(1, 24) for parameter in ("ST", "SP_out")]
    boundary += [f"R_{number:03d}:{parameter}" for number in range(1, 11) for parameter in ("ST", "SPD")]
    return Schema(tuple(boundary), groups)


def _compare(folder: Path, rounds: int) -> int:
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("pandas is not installed: `pip install pandas`, which this comparison needs") from error
    paths = [folder / f"{name}.csv" for name in (BOUNDARY, *GROUPS)]
    schema = schema_of(read_columns(folder, outputs=True))
    threads = len(os.sched_getaffinity(0))
    readers: dict[str, Callable[[], object]] = {
        "pandas": lambda: [pandas.read_csv(path) for path in paths],
        "one thread": lambda: read_case(folder, schema, outputs=True),
        f"default ({threads} threads)": lambda: read_case(folder, schema, outputs=True, threads=threads),
    }
    frames = [pandas.read_csv(path) for path in paths]
    case = read_case(folder, schema, outputs=True)
    _check_equal(case, [frame.to_numpy()[:, 1:].astype(np.float32) for frame in frames])
    size = sum(path.stat().st_size for path in paths)
    cells = sum(frame.size for frame in frames)
    print(f"{folder}: {size / 1e6:.1f} MB, {cells:,} cells, {schema.num_variables} variables")
    print("  round " + "".join(f"{name:>24}" for name in readers))
    seconds = np.empty((rounds, len(readers)))
    for k in range(rounds):
        for column, read in enumerate(readers.values()):
            start = time.perf_counter()
            read()
            seconds[k, column] = time.perf_counter() - start
        entries = [f"{s:.3f} s ({seconds[k, 0] / s:.1f}x)" for s in seconds[k]]
        print(f"  {k + 1:5d} " + "".join(f"{entry:>24}" for entry in entries))
    for column, name in list(enumerate(readers))[1:]:
        ratio = np.median(seconds[:, 0] / seconds[:, column])
        rate = size / 1e6 / np.median(seconds[:, column])
        print(f"median, {name}: {ratio:.2f} times the speed of pandas, {rate:.0f} MB/s")
    return int(ratio < _LEAST_RATIO)


def _check_equal(case: Case, tables: list[np.ndarray]) -> None:
    """The readers must agree before their speeds are compared; two roundings may differ by one unit of float32."""
    assert case.state is not None
    for ours, theirs in (
        (case.boundary[[*range(29, MINUTES, 30)]], tables[0][1:]),
        (case.state, np.concatenate(tables[1:], axis=1)),
    ):
        expected = theirs if len(ours) == len(theirs) else np.append(theirs, theirs[-1:], axis=0)
        if not np.allclose(ours, expected, rtol=2e-7, atol=0, equal_nan=True):
            raise DataError("the two readers disagree about a value: no speed is reported")
