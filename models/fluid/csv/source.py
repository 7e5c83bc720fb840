"""A source: the cases of a folder ROOT/{train,test}/<case>/*.csv, and what they have in common.

find_cases(source, val_fraction, seed)   every case folder and the split that it goes to
agree_on_schema(cases)                   the columns that most cases have, and the cases that differ
uneven_boundaries(cases)                 the cases whose Boundary.csv has another number of rows than most
stamp(case, schema)                      tells later whether the case's files have changed
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.cases import Columns, check_columns, read_columns, schema_of
from trunkline.models.fluid.schema import BOUNDARY, GROUPS, Schema


@dataclass(frozen=True)
class SourceCase:
    """A case folder. `split`: train, val or test. `outputs`: they must be there (True), or may be (None)."""

    split: str
    folder: Path
    outputs: bool | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def key(self) -> str:
        """How the source names it: "train/case_0001", also where it became a validation case."""
        return f"{self.folder.parent.name}/{self.name}"


def find_cases(source: Path, val_fraction: float, seed: int) -> list[SourceCase]:
    """The cases of a source, by name.

    `val_fraction` of the training cases, rounded, become the split "val": at least one if the fraction is above 0, and
    never all. Raises DataError if there is no training case.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder: --source needs ROOT/train/<case>/*.csv")
    train, test = (_folders(source / part) for part in ("train", "test"))
    if not train:
        raise DataError(f"{source / 'train'}: no case folders: --source needs ROOT/train/<case>/*.csv")
    count = min(max(round(val_fraction * len(train)), val_fraction > 0), len(train) - 1)
    # By a hash of each name, so that a case more or less does not move the others between the splits.
    ranked = sorted(train, key=lambda folder: hashlib.blake2b(f"{seed}/{folder.name}".encode()).digest())
    held_out = set(ranked[:count])
    cases = [SourceCase("val" if folder in held_out else "train", folder, True) for folder in train]
    return cases + [SourceCase("test", folder, None) for folder in test]


def agree_on_schema(cases: list[SourceCase]) -> tuple[Schema, dict[str, DataError]]:
    """The columns that most cases with outputs have, in the order of the first of them, and what is wrong with the
    headers of the other cases, by key. Raises DataError if no case with outputs has readable headers."""
    headers: dict[str, Columns] = {}
    bad: dict[str, DataError] = {}
    for case in cases:
        try:
            headers[case.key] = read_columns(case.folder, outputs=case.outputs)
        except DataError as error:
            bad[case.key] = error
    with_outputs = [columns for columns in headers.values() if len(columns) > 1]
    if not with_outputs:
        raise next(iter(bad.values()))
    kinds = Counter(_any_order(columns) for columns in with_outputs)
    most_common = kinds.most_common(1)[0][0]
    schema = schema_of(next(columns for columns in with_outputs if _any_order(columns) == most_common))
    for case in cases:
        if case.key in headers:
            try:
                check_columns(headers[case.key], schema, case.folder)
            except DataError as error:
                bad[case.key] = error
    return schema, bad


def uneven_boundaries(cases: list[SourceCase]) -> tuple[int, dict[str, int]]:
    """How many rows Boundary.csv has in most cases, and in each case, by key, where it has another number.

    Since a row holds until the next, a file that lost some can be read all the same.
    """
    rows = {case.key: _rows(case.folder / f"{BOUNDARY}.csv") for case in cases}
    usual = Counter(rows.values()).most_common(1)[0][0]
    return usual, {key: count for key, count in rows.items() if count != usual}


def stamp(case: SourceCase, schema: Schema) -> dict[str, Any]:
    """What a stored case remembers of the files it was read from: their sizes, times and columns."""
    files = {}
    for name in (BOUNDARY, *GROUPS):
        path = case.folder / f"{name}.csv"
        if path.is_file():
            status = path.stat()
            files[path.name] = [status.st_size, status.st_mtime_ns]
    return {"files": files, "columns": _digest(schema.to_json())}


def _rows(path: Path) -> int:
    return len(path.read_bytes().strip().splitlines()) - 1


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _any_order(columns: Columns) -> str:
    return _digest({name: sorted(names) for name, names in columns.items() if names})


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
