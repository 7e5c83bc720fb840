"""Writes a store (trunkline.models.fluid.store), so that a half-written one is never taken for whole.

    write_case(root, split, name, ...)   one case: under a temporary name, synced, then renamed
    finish_store(root, ...)              statistics of the training split, then store.json, last and atomically
    write_store(root, schema, splits)    both, for arrays at hand

`store.json` must not exist while cases are written: `begin_store` takes it away first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import sync
from trunkline.engine.machine.reading import open_regular, read_object, read_whole
from trunkline.models.fluid.schema import MINUTES, Schema
from trunkline.models.fluid.statistics import case_moments, column_statistics, merge_moments, sample_positions
from trunkline.models.fluid.store import (
    MAX_INDEX_BYTES,
    SPLITS,
    VERSION,
    CaseEntry,
    Store,
    file_digest,
    npy_header,
    npy_size,
    store_fingerprint,
)

PARTIAL = ".partial"


def write_store(
    root: Path | str,
    schema: Schema,
    splits: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray | None]]],
    day: str = "2025-01-01",
) -> Store:
    """Write arrays as a store and open it.

    splits: {"train": {"case_0001": (boundary [M, Vb], state [M, Vs] or None), ...}, "val": ..., "test": ...}

    Every array has the same number of minutes M. The training split needs at least one case with outputs.
    """
    root = Path(root)
    begin_store(root, schema)
    entries: dict[str, dict[str, CaseEntry]] = {}
    minutes = {len(boundary) for cases in splits.values() for boundary, _ in cases.values()}
    if len(minutes) != 1:
        raise DataError(f"{root}: the cases have different numbers of minutes: {sorted(minutes)}")
    for split, cases in splits.items():
        for name, (boundary, state) in cases.items():
            entry = write_case(root, split, name, boundary, state, day=day)
            entries.setdefault(split, {})[name] = entry
    finish_store(root, schema, entries, minutes=minutes.pop())
    return Store.open(root)


def begin_store(root: Path, schema: Schema) -> None:
    """Make `root` a store that is being written: store.json is taken away, schema.json written."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "store.json").unlink(missing_ok=True)
    write_atomically(root / "schema.json", json.dumps(schema.to_json(), indent=1) + "\n")


def write_case(
    root: Path,
    split: str,
    name: str,
    boundary: np.ndarray,
    state: np.ndarray | None,
    *,
    day: str,
    source: dict[str, Any] | None = None,
) -> CaseEntry:
    """Write a case's folder and return its entry. A folder of this name is replaced.

    boundary [M, Vb], state [M, Vs] or None. `source` is kept in case.json: whatever tells later whether the files that
    the case was read from have changed.
    """
    final = root / split / name
    partial = final.with_name(f".{name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arrays = {"boundary.npy": boundary} | ({} if state is None else {"state.npy": state})
    for file_name, array in arrays.items():
        _write_array(partial / file_name, array)
    if state is not None:
        with (partial / "moments.npy").open("wb") as file:
            np.save(file, case_moments(boundary, state))
            file.flush()
            os.fsync(file.fileno())
    entry = CaseEntry(day, {file_name: file_digest(partial / file_name) for file_name in arrays})
    record = {"version": VERSION, "day": day, "digests": entry.digests, "source": source}
    _write_synced(partial / "case.json", (json.dumps(record, sort_keys=True) + "\n").encode())
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)
    return entry


def read_record(folder: Path, schema: Schema) -> tuple[CaseEntry, dict[str, Any] | None] | None:
    """(entry, source) of a case's folder that `write_case` made; None if there is none, or not a whole one."""
    try:
        record = read_object(folder / "case.json")
        if record["version"] != VERSION:
            return None
        entry = CaseEntry(record["day"], record["digests"])
        if not (folder / "moments.npy").is_file() and entry.has_state:
            return None
        for name in entry.digests:
            columns = schema.num_boundary if name == "boundary.npy" else schema.num_states
            if (folder / name).stat().st_size != npy_size(MINUTES, columns):
                return None
        return entry, record["source"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finish_store(
    root: Path,
    schema: Schema,
    splits: Mapping[str, Mapping[str, CaseEntry]],
    *,
    minutes: int = MINUTES,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Compute the statistics of the training split and write store.json. `notes` go into store.json as they are.

    Holds one case's moments and the sampled rows in memory, whatever the number of cases.
    Raises DataError if no training case has outputs.
    """
    ordered = _ordered(splits)
    fitted = [name for name, entry in ordered["train"].items() if entry.has_state]
    if not fitted:
        raise DataError(f"{root}: no training case with outputs: statistics cannot be fitted")
    moments = merge_moments(_read_moments(root / "train" / name, schema) for name in fitted)
    rows = _sampled_rows(Store(root, schema, {}, minutes, ordered, ""), fitted)
    partial = root / f".statistics{PARTIAL}"
    save_file(column_statistics(moments, rows), partial)
    sync(partial)
    partial.rename(root / "statistics.safetensors")
    write_atomically(root / "store.json", _index_text(schema, ordered, minutes, notes))


def is_finished(
    root: Path, schema: Schema, splits: Mapping[str, Mapping[str, CaseEntry]], *, notes: Mapping[str, Any] | None = None
) -> bool:
    """Whether `root` is a whole store of exactly these cases and notes, so that `finish_store` would not change it."""
    try:
        text = read_whole(root / "store.json", MAX_INDEX_BYTES).decode()
        if text != _index_text(schema, _ordered(splits), MINUTES, notes):
            return False
        Store.open(root)
    except (OSError, ValueError, DataError):
        return False
    return True


def _ordered(splits: Mapping[str, Mapping[str, CaseEntry]]) -> dict[str, dict[str, CaseEntry]]:
    return {split: dict(sorted(splits.get(split, {}).items())) for split in SPLITS}


def _index_text(
    schema: Schema, ordered: dict[str, dict[str, CaseEntry]], minutes: int, notes: Mapping[str, Any] | None
) -> str:
    index = {
        "version": VERSION,
        "fingerprint": store_fingerprint(schema, ordered),
        "minutes": minutes,
        "variables": schema.num_variables,
        "splits": {
            split: {name: {"day": entry.day, "digests": entry.digests} for name, entry in cases.items()}
            for split, cases in ordered.items()
        },
        **(notes or {}),
    }
    return json.dumps(index, indent=1) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, sync it and rename it."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    _write_synced(partial, text.encode())
    partial.rename(path)
    sync(path.parent)


def _read_moments(folder: Path, schema: Schema) -> np.ndarray:
    path = folder / "moments.npy"
    try:
        with open_regular(path) as file:
            moments = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}): remove {folder} and prepare the data set again") from error
    if moments.shape != (2, 5, schema.num_variables):
        raise DataError(f"{path}: damaged (shape {moments.shape}): remove {folder} and prepare the data set again")
    return moments


def _sampled_rows(store: Store, cases: list[str]) -> np.ndarray:
    """float32 [R, V]: rows evenly spaced over the minutes of these training cases."""
    schema = store.schema
    positions = sample_positions(store.minutes * len(cases), schema.num_variables)
    rows = np.empty((len(positions), schema.num_variables), np.float32)
    for out, position in zip(rows, positions.tolist()):
        case, row = cases[position // store.minutes], position % store.minutes
        out[: schema.num_boundary] = store.boundary_rows("train", case, row, row + 1)[0]
        out[schema.num_boundary :] = store.state_rows("train", case, row, row + 1)[0]
    return rows


def _write_array(path: Path, array: np.ndarray) -> None:
    values = np.ascontiguousarray(array, dtype=np.float32)
    with path.open("wb") as file:
        file.write(npy_header(*values.shape))
        file.write(values.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
