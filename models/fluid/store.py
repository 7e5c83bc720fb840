"""Store: a prepared data set on disk, read in slices, so that memory does not grow with the number of cases.

    DIR/store.json               written last: its presence says that the store is whole
    DIR/schema.json              the columns
    DIR/statistics.safetensors   statistics of the training split, fp64 [V] each (trunkline.models.fluid.statistics)
    DIR/network.json             the network, where the source has one
    DIR/{train,val,test}/<case>/ boundary.npy [M, Vb], state.npy [M, Vs] (absent for a case without outputs), case.json,
                                 moments.npy (the case's part of the statistics)

Arrays are float32, row i is minute i + 1 of the day, M = 1440. A row of boundary.npy holds the set-points in force at
that minute; NaN in state.npy is a missing value. trunkline.models.fluid.store_writer writes all this.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors.numpy import load_file

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import open_regular, read_object, reason
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.statistics import STATISTICS

SPLITS = ("train", "val", "test")
VERSION = 1
MAX_OPEN_MAPS = 8
MAX_OPEN_FILES = 256

MAX_INDEX_BYTES = 256 << 20
_MOST_MINUTES = 1 << 31
_PREPARE = "python launchers/prepare.py fluid --source ROOT --out"
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True)
class CaseEntry:
    """What store.json says of a case.

    day: the ISO date of its first minute
    digests: BLAKE2b of its array files' bytes by file name; "state.npy" is absent for a case without outputs
    """

    day: str
    digests: dict[str, str]

    @property
    def has_state(self) -> bool:
        return "state.npy" in self.digests


class Store:
    """A whole, checked store; make one with `Store.open(root)`. Safe to pickle and to use after a fork."""

    def __init__(
        self,
        root: Path,
        schema: Schema,
        statistics: dict[str, np.ndarray],
        minutes: int,
        splits: dict[str, dict[str, CaseEntry]],
        fingerprint: str,
    ) -> None:
        self.root = root
        self.schema = schema
        self.statistics = statistics
        self.minutes = minutes
        self.fingerprint = fingerprint
        self._splits = splits
        self._files: _Recent[Path, _RowFile] = _Recent(MAX_OPEN_FILES)
        self._maps: _Recent[Path, np.ndarray] = _Recent(MAX_OPEN_MAPS)

    @classmethod
    def open(cls, root: Path | str) -> Store:
        """Open the store in folder `root`: statistics are read, every array's presence and size is checked.

        Raises DataError if there is none, if its preparation was not finished, or if it is damaged.
        """
        root = Path(root)
        index = _read_index(root)
        try:
            minutes, fingerprint = index["minutes"], str(index["fingerprint"])
            if type(minutes) is not int or not 0 < minutes <= _MOST_MINUTES:
                raise ValueError(f"minutes {minutes!r:.80}")
            splits = {
                _name(split): {
                    _name(name): CaseEntry(str(case["day"]), dict(case["digests"])) for name, case in cases.items()
                }
                for split, cases in index["splits"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{root / 'store.json'}: damaged ({error!r}): prepare the data set again") from error
        try:
            schema = Schema.read(root)
        except DataError as error:
            raise DataError(f"{error}: {_again(root)}") from error
        statistics = _read_statistics(root, schema)
        store = cls(root, schema, statistics, minutes, splits, fingerprint)
        if store_fingerprint(schema, splits) != fingerprint:
            raise DataError(f"{root}: store.json and schema.json do not belong together: prepare the data set again")
        store._check_sizes()
        return store

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        return Store, (self.root, self.schema, self.statistics, self.minutes, self._splits, self.fingerprint)

    def cases(self, split: str) -> list[str]:
        """Names of the cases of "train", "val" or "test", sorted; empty if the store has none there."""
        if split not in SPLITS:
            raise DataError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
        return sorted(self._splits.get(split, {}))

    def entry(self, split: str, case: str) -> CaseEntry:
        """What the store knows of a case. Raises DataError if it has no such case."""
        if case not in self.cases(split):
            raise DataError(
                f"{self.root}: no case {case!r} in split {split!r}, which has {len(self.cases(split))} cases"
            )
        return self._splits[split][case]

    def has_state(self, split: str, case: str) -> bool:
        """Whether the case has outputs; without, it serves for prediction only."""
        return self.entry(split, case).has_state

    def boundary(self, split: str, case: str) -> np.ndarray:
        """Read-only memory map of the boundary, float32 [M, Vb]."""
        self.entry(split, case)
        return self._map(self.root / split / case / "boundary.npy", self.schema.num_boundary)

    def state(self, split: str, case: str) -> np.ndarray | None:
        """Read-only memory map of the state, float32 [M, Vs], NaN where missing; None for a case without outputs."""
        if not self.has_state(split, case):
            return None
        return self._map(self.root / split / case / "state.npy", self.schema.num_states)

    def boundary_rows(self, split: str, case: str, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop-1 of the boundary, a float32 copy [stop - start, Vb]."""
        return self._rows(self.root / split / case / "boundary.npy", self.schema.num_boundary, start, stop)

    def state_rows(self, split: str, case: str, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop-1 of the state, a float32 copy [stop - start, Vs]; the case must have outputs."""
        return self._rows(self.root / split / case / "state.npy", self.schema.num_states, start, stop)

    def verify(self) -> None:
        """Read every array and compare it with its digest. Raises DataError naming the first that differs."""
        for split, cases in self._splits.items():
            for case, entry in sorted(cases.items()):
                for name, digest in entry.digests.items():
                    path = self.root / split / case / name
                    if file_digest(path) != digest:
                        raise DataError(
                            f"{path}: damaged (its bytes changed since it was written): {_again(self.root)}"
                        )

    def _rows(self, path: Path, columns: int, start: int, stop: int) -> np.ndarray:
        # Reads, not maps: pages of a map count as resident memory of this process until the kernel needs them.
        return self._files.get(path, lambda: _RowFile(path, self.minutes, columns)).rows(start, stop)

    def _map(self, path: Path, columns: int) -> np.ndarray:
        def make() -> np.ndarray:
            offset = _RowFile(path, self.minutes, columns).offset
            return np.memmap(path, np.float32, "r", offset, (self.minutes, columns))

        return self._maps.get(path, make)

    def _check_sizes(self) -> None:
        for split, cases in self._splits.items():
            for case, entry in cases.items():
                widths = {"boundary.npy": self.schema.num_boundary, "state.npy": self.schema.num_states}
                if "boundary.npy" not in entry.digests or not set(entry.digests) <= set(widths):
                    raise DataError(f"{self.root / 'store.json'}: case {split}/{case} is damaged: {_again(self.root)}")
                for name in entry.digests:
                    path = self.root / split / case / name
                    expected = npy_size(self.minutes, widths[name])
                    found = path.stat().st_size if path.is_file() else None
                    if found != expected:
                        what = "is missing" if found is None else f"has {found} bytes where {expected} were written"
                        raise DataError(f"{path}: {what}: {_again(self.root)}")


def store_fingerprint(schema: Schema, splits: dict[str, dict[str, CaseEntry]]) -> str:
    """Names a store's content: columns, splits, cases and every value in them."""
    content = {
        "schema": schema.to_json(),
        "splits": {
            split: {name: [entry.day, entry.digests] for name, entry in cases.items()}
            for split, cases in splits.items()
        },
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE2b (16 bytes, hexadecimal) of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def npy_header(rows: int, columns: int) -> bytes:
    """The bytes before the values of a float32 [rows, columns] .npy file, as numpy writes them."""
    entry = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}"
    padding = -(len(entry) + 11) % 64
    return (
        b"\x93NUMPY\x01\x00"
        + (len(entry) + padding + 1).to_bytes(2, "little")
        + (entry + " " * padding + "\n").encode()
    )


def npy_size(rows: int, columns: int) -> int:
    """Bytes of a float32 [rows, columns] .npy file."""
    return len(npy_header(rows, columns)) + 4 * rows * columns


class _RowFile:
    """An open .npy file of float32 [rows, columns], read by position, so that threads and forks may share it."""

    def __init__(self, path: Path, rows: int, columns: int) -> None:
        self._path, self._shape = path, (rows, columns)
        header = npy_header(rows, columns)
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}: was the data set removed?") from error
        if os.pread(self._file.fileno(), len(header), 0) != header:
            raise DataError(f"{path}: damaged: not a float32 array of {rows} x {columns}: prepare the data set again")
        self.offset = len(header)

    def rows(self, start: int, stop: int) -> np.ndarray:
        count, columns = self._shape
        if not 0 <= start <= stop <= count:
            raise IndexError(f"rows {start} to {stop} of {count}")
        out = np.empty((stop - start, columns), np.float32)
        position = self.offset + 4 * columns * start
        if os.preadv(self._file.fileno(), [out.data.cast("B")], position) != out.nbytes:
            raise DataError(f"{self._path}: cut short since it was opened: prepare the data set again")
        return out


class _Recent(Generic[_K, _V]):
    """The values used last, at most `size` of them."""

    def __init__(self, size: int) -> None:
        self._size, self._values = size, OrderedDict[_K, _V]()

    def get(self, key: _K, make: Callable[[], _V]) -> _V:
        if key not in self._values:
            self._values[key] = make()
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


def _read_index(root: Path) -> dict[str, Any]:
    path = root / "store.json"
    if not path.is_file():
        if (root / "schema.json").is_file():
            raise DataError(
                f"{root}: the preparation of this data set was not finished (it has no store.json): run the same "
                "launchers/prepare.py command again, which goes on where it stopped"
            )
        raise DataError(f"{root}: no prepared data set here (no store.json): make one with `{_PREPARE} {root}`")
    try:
        index = read_object(path, MAX_INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({reason(error)}): {_again(root)}") from error
    version = index.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(f"{path}: store version {version!r:.80} where {VERSION} is read: {_again(root)}")
    return index


def _name(name: str) -> str:
    """What names a folder of the store, as store.json says it. Raises ValueError for what leads elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"a split or case named {name!r:.80}")
    return name


def _read_statistics(root: Path, schema: Schema) -> dict[str, np.ndarray]:
    path = root / "statistics.safetensors"
    try:
        open_regular(path).close()
        statistics = load_file(path)
    except Exception as error:  # safetensors raises its own exception for a damaged file, OSError for a missing one
        raise DataError(f"{path}: cannot be read ({error}): {_again(root)}") from error
    for name in STATISTICS:
        array = statistics.get(name)
        if array is None or array.dtype != np.float64 or array.shape != (schema.num_variables,):
            raise DataError(f"{path}: {name!r} is not there or not float64 [{schema.num_variables}]: {_again(root)}")
    return statistics


def _again(root: Path) -> str:
    return f"remove it and prepare the data set again, `{_PREPARE} {root}`"
