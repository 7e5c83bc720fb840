"""Writes the data set of trunkline.models.fluid.store, case by case; a half-written one is never taken for whole.

begin_store(root, schema)            store.json must not be there while cases are written
write_case(root, split, name, ...)   one case, whole or not there
finish_store(root, ...)              statistics of the training split, then store.json
write_store(root, schema, splits)    all of it, for arrays at hand
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trunkline.engine.data.npy import NpyFile, Spec
from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import Part, read_part, write_index, write_part
from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.reading import open_regular, read_object
from trunkline.models.fluid.schema import MINUTES, Schema
from trunkline.models.fluid.statistics import case_moments, column_statistics, merge_moments, sample_positions
from trunkline.models.fluid.store import Store, specs_of_version_1

MOMENTS = "moments"
"""The array of a case, fp64 [2, 5, V], that is its part of the statistics."""

Cases = Mapping[str, Mapping[str, Part]]
"""By split, then by name."""


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
    minutes = {len(boundary) for cases in splits.values() for boundary, _ in cases.values()}
    if len(minutes) != 1:
        raise DataError(f"{root}: the cases have different numbers of minutes: {sorted(minutes)}")
    begin_store(root, schema)
    cases = {
        split: {name: write_case(root, split, name, *arrays, day=day) for name, arrays in each.items()}
        for split, each in splits.items()
    }
    finish_store(root, schema, cases, minutes=minutes.pop())
    return Store.open(root)


def begin_store(root: Path, schema: Schema) -> None:
    """Make `root` a store that is being written: store.json is taken away, schema.json written."""
    root.mkdir(parents=True, exist_ok=True)
    (root / INDEX).unlink(missing_ok=True)
    replace_whole(root / "schema.json", json.dumps(schema.to_json(), indent=1) + "\n")


def write_case(
    root: Path, split: str, name: str, boundary: np.ndarray, state: np.ndarray | None, *, day: str, source: Any = None
) -> Part:
    """Write a case's folder: boundary [M, Vb], state [M, Vs] or None. A folder of this name is replaced.

    source: whatever tells later whether the files that the case was read from have changed
    """
    arrays = {"boundary": np.asarray(boundary, np.float32)}
    if state is not None:
        arrays |= {"state": np.asarray(state, np.float32), MOMENTS: case_moments(boundary, state)}
    return write_part(root / split / name, arrays, {"day": day, "source": source})


def read_case(folder: Path, schema: Schema) -> Part | None:
    """What `write_case` made of a folder, by an earlier version too; None if there is none, or not a whole one."""
    part = read_part(folder)
    try:
        if part is None:  # case.json is of version 1
            record = read_object(folder / "case.json")
            specs = specs_of_version_1(record["digests"], MINUTES, schema)
            if any(
                (folder / f"{name}.npy").stat().st_size != len(spec.header) + spec.nbytes
                for name, spec in specs.items()
            ):
                return None
            part = Part(specs, {"day": record["day"], "source": record["source"]})
        if "state" in part.arrays and not (folder / f"{MOMENTS}.npy").is_file():
            return None
        widths = {"boundary": schema.num_boundary, "state": schema.num_states}
        fits = all(part.arrays[name].shape == (MINUTES, widths[name]) for name in part.arrays.keys() & widths.keys())
        return part if fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finish_store(
    root: Path, schema: Schema, cases: Cases, *, minutes: int = MINUTES, notes: Mapping[str, Any] | None = None
) -> None:
    """Compute the statistics of the training split and write store.json. `notes` go into store.json as they are.

    Holds one case's moments and the sampled rows in memory, whatever the number of cases.
    Raises DataError if no training case has outputs.
    """
    fitted = sorted(name for name, part in cases.get("train", {}).items() if "state" in part.arrays)
    if not fitted:
        raise DataError(f"{root}: no training case with outputs: statistics cannot be fitted")
    moments = merge_moments(_read_moments(root / "train" / name, schema) for name in fitted)
    facts, arrays = _facts(cases, minutes), _arrays(cases)
    statistics = column_statistics(moments, _sampled_rows(root, schema, cases["train"], fitted, minutes))
    replace_whole(root / "statistics.safetensors", lambda draft: save_file(statistics, draft))
    write_index(root, Store.workload, arrays, _files(root), facts, notes or {})


def is_finished(root: Path, cases: Cases, *, notes: Mapping[str, Any] | None = None) -> bool:
    """Whether `root` is a whole store of exactly these cases and notes, so that `finish_store` would not change it."""
    try:
        store = Store.open(root)
        files = store.files.keys() in (set(), set(_files(root)))  # version 1 listed none
        same = store.arrays == _arrays(cases) and store.facts == _facts(cases, MINUTES)
        return files and same and all(store.index.get(name) == value for name, value in (notes or {}).items())
    except (OSError, DataError):
        return False


def _facts(cases: Cases, minutes: int) -> dict[str, Any]:
    days = {f"{split}/{name}": part.note["day"] for split, each in cases.items() for name, part in each.items()}
    return {"minutes": minutes, "days": dict(sorted(days.items()))}


def _arrays(cases: Cases) -> dict[str, Spec]:
    return {
        f"{split}/{name}/{array}": spec
        for split, each in cases.items()
        for name, part in each.items()
        for array, spec in part.arrays.items()
        if array != MOMENTS
    }


def _files(root: Path) -> list[str]:
    network = ["network.json"] if (root / "network.json").is_file() else []
    return ["schema.json", "statistics.safetensors", *network]


def _read_moments(folder: Path, schema: Schema) -> np.ndarray:
    path = folder / f"{MOMENTS}.npy"
    try:
        with open_regular(path) as file:
            moments = np.load(file, allow_pickle=False)
        if moments.shape != (2, 5, schema.num_variables):
            raise ValueError(f"shape {moments.shape}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}): remove {folder} and prepare the data set again") from error
    return moments


def _sampled_rows(root: Path, schema: Schema, parts: Mapping[str, Part], fitted: list[str], minutes: int) -> np.ndarray:
    """float32 [R, V]: rows evenly spaced over the minutes of these training cases."""
    positions = sample_positions(minutes * len(fitted), schema.num_variables)
    out = np.empty((len(positions), schema.num_variables), np.float32)
    columns = {"boundary": slice(schema.num_boundary), "state": slice(schema.num_boundary, None)}
    for number, name in enumerate(fitted):
        first, last = np.searchsorted(positions, [number * minutes, (number + 1) * minutes]).tolist()
        for array, place in columns.items():
            path = root / "train" / name / f"{array}.npy"
            with NpyFile(path, parts[name].arrays[array], f"remove {path.parent} and prepare again") as file:
                for k in range(first, last):
                    row = int(positions[k]) - number * minutes
                    out[k, place] = file.rows(row, row + 1)[0]
    return out
