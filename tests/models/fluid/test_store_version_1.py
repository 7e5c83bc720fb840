"""Stores of version 1, which the engine's own store replaced, are read as they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.models.fluid.csv_tree import write_source
from tests.models.fluid.toy_network import SCHEMA, day
from trunkline.engine.errors import DataError
from trunkline.models.fluid.prepare import prepare
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.statistics import STATISTICS, case_moments
from trunkline.models.fluid.store import SPLITS, Store

Arrays = tuple[np.ndarray, np.ndarray | None]


def write_version_1(
    root: Path, schema: Schema, splits: dict[str, dict[str, Arrays]], statistics: dict[str, np.ndarray],
    sources: dict[str, Any] | None = None, **notes: Any,
) -> str:  # fmt: skip
    """Write what that version wrote, byte for byte; returns its fingerprint."""
    root.mkdir(parents=True)
    (root / "schema.json").write_text(json.dumps(schema.to_json(), indent=1) + "\n")
    cases: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    minutes = 0
    for split in SPLITS:
        for name, (boundary, state) in sorted(splits.get(split, {}).items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            arrays = {"boundary.npy": boundary} | ({} if state is None else {"state.npy": state})
            for file, array in arrays.items():
                np.save(folder / file, array)
            if state is not None:
                np.save(folder / "moments.npy", case_moments(boundary, state))
            digests = {file: _blake2b((folder / file).read_bytes()) for file in arrays}
            source = (sources or {}).get(f"{split}/{name}")
            record = {"version": 1, "day": "2025-01-01", "digests": digests, "source": source}
            (folder / "case.json").write_text(json.dumps(record, sort_keys=True) + "\n")
            cases[split][name], minutes = {"day": "2025-01-01", "digests": digests}, len(boundary)
    save_file(statistics, root / "statistics.safetensors")
    listed = {s: {name: [case["day"], case["digests"]] for name, case in each.items()} for s, each in cases.items()}
    fingerprint = _blake2b(json.dumps({"schema": schema.to_json(), "splits": listed}, sort_keys=True).encode())
    index = {
        "version": 1, "fingerprint": fingerprint, "minutes": minutes, "variables": schema.num_variables,
        "splits": cases, **notes,
    }  # fmt: skip
    (root / "store.json").write_text(json.dumps(index, indent=1) + "\n")
    return fingerprint


def _blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


TRAIN, VAL, TEST = day(1, 60), day(2, 60), day(3, 60)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    statistics = {name: np.full(SCHEMA.num_variables, k, np.float64) for k, name in enumerate(STATISTICS)}
    splits: dict[str, dict[str, Arrays]] = {"train": {"a": TRAIN}, "val": {"b": VAL}, "test": {"c": (TEST[0], None)}}
    write_version_1(tmp_path / "store", SCHEMA, splits, statistics, val_fraction=0.1)
    return tmp_path / "store"


def test_it_reads_as_it_was_written_and_keeps_its_fingerprint(root: Path) -> None:
    store = Store.open(root)
    assert store.fingerprint == json.loads((root / "store.json").read_text())["fingerprint"]
    assert [store.cases(split) for split in SPLITS] == [["a"], ["b"], ["c"]]
    assert (store.minutes, store.day("train", "a"), store.index["val_fraction"]) == (60, "2025-01-01", 0.1)
    np.testing.assert_array_equal(store.state_rows("train", "a", 3, 9), TRAIN[1][3:9])
    np.testing.assert_array_equal(store.boundary("test", "c"), TEST[0])
    assert store.state("test", "c") is None
    assert store.statistics["std"].tolist() == [2.0] * SCHEMA.num_variables
    store.verify()


@pytest.mark.parametrize("file", ["train/a/boundary.npy", "val/b/state.npy"])
def test_its_values_are_verified(root: Path, file: str) -> None:
    data = bytearray((root / file).read_bytes())
    data[-3] ^= 16
    (root / file).write_bytes(data)
    with pytest.raises(DataError, match=rf"{file}: damaged: .*blake2b"):
        Store.open(root).verify()


def test_an_index_or_a_schema_that_was_changed_is_found(root: Path) -> None:
    index = json.loads((root / "store.json").read_text())
    for key, value in (("splits", index["splits"] | {"val": {}}), ("minutes", "60"), ("minutes", 59)):
        (root / "store.json").write_text(json.dumps(index | {key: value}))
        with pytest.raises(DataError, match="prepare the data set again"):
            Store.open(root)
    (root / "store.json").write_text(json.dumps(index))
    Schema(("B_002:FR",), SCHEMA.groups).write(root)
    with pytest.raises(DataError, match=r"store\.json and schema\.json do not belong together"):
        Store.open(root)


def test_prepared_again_it_stays_and_its_cases_are_kept_when_others_come(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", train=3, test=1)
    prepare(source, tmp_path / "new", workers=1)
    new, old = Store.open(tmp_path / "new"), tmp_path / "old"
    splits: dict[str, dict[str, Arrays]] = {
        split: {case: (np.array(new.boundary(split, case)), _state(new, split, case)) for case in new.cases(split)}
        for split in SPLITS
    }
    sources = {
        f"{split}/{case}": json.loads((new.root / split / case / "part.json").read_text())["note"]["source"]
        for split in SPLITS for case in new.cases(split)
    }  # fmt: skip
    notes = {name: new.index[name] for name in ("val_fraction", "seed", "skipped")}
    fingerprint = write_version_1(old, new.schema, splits, new.statistics, sources, **notes)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in old.rglob("*") if path.is_file()}
    prepare(source, old, workers=1)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in old.rglob("*") if path.is_file()} == before
    assert Store.open(old).fingerprint == fingerprint

    write_source(tmp_path / "more", train=4, test=1)
    (tmp_path / "more/train/case_0004").rename(source / "train/case_0004")
    prepare(source, old, workers=1)
    assert json.loads((old / "store.json").read_text())["version"] == 2
    kept = [path for path in before if path.name == "state.npy" and path.stat().st_ino == before[path][0]]
    assert len(kept) == 3
    prepare(source, tmp_path / "fresh", workers=1)
    store, fresh = Store.open(old), Store.open(tmp_path / "fresh")
    store.verify()
    for name in STATISTICS:
        np.testing.assert_array_equal(store.statistics[name], fresh.statistics[name])


def _state(store: Store, split: str, case: str) -> np.ndarray | None:
    state = store.state(split, case)
    return None if state is None else np.array(state)
