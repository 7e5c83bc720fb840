"""The prepared data set of a gas network: a trunkline.engine.data.store.ArrayStore of these arrays and files.

    {train,val,test}/<case>/boundary   float32 [M, Vb], the set-points in force at each minute
    {train,val,test}/<case>/state      float32 [M, Vs], NaN where a value is missing; absent for a case without outputs
    schema.json                        the columns
    statistics.safetensors             fp64 [V] each, of the training split (trunkline.models.fluid.statistics)
    network.json                       the network, where the source has one

Row i is minute i + 1 of the day, M = 1440. trunkline.models.fluid.store_writer writes it, case by case.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from trunkline.engine.data.npy import Spec
from trunkline.engine.data.store import INDEX, Array, ArrayStore
from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import advice, open_regular, reason
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.statistics import STATISTICS

SPLITS = ("train", "val", "test")
_MOST_MINUTES = 1 << 31


class Store(ArrayStore):
    """A whole, checked data set. Its facts: "minutes", M, and "days", the ISO date of each case's first minute."""

    workload = "fluid"
    prepare = "python launchers/prepare.py fluid --source ROOT --out"

    @classmethod
    def open(cls, root: Path | str) -> Store:
        """As ArrayStore.open; the schema and the statistics are read too. Raises DataError."""
        root = Path(root)
        if (root / "schema.json").is_file() and not (root / INDEX).is_file():
            raise DataError(
                f"{root}: the preparation of this data set was not finished (it has no {INDEX}): run the same "
                "launchers/prepare.py command again, which continues where it stopped"
            )
        store = super().open(root)
        widths = {"boundary": store.schema.num_boundary, "state": store.schema.num_states}
        for name, spec in store.arrays.items():
            split, _, kind = name.split("/") if name.count("/") == 2 else ("", "", "")
            if split not in SPLITS or spec.shape != (store.minutes, widths.get(kind)) or spec.dtype != "<f4":
                raise DataError(f"{store.path(name)}: does not fit schema.json: {store.remedy}")
        _ = store.statistics  # read now, so that damage shows
        return store

    @cached_property
    def schema(self) -> Schema:
        """The columns. Raises DataError."""
        return _read_schema(self.root)

    @property
    def minutes(self) -> int:
        """M, the rows of each array."""
        return int(self.facts["minutes"])

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """fp64 [V] by name, of the training split."""
        path = self.root / "statistics.safetensors"
        try:
            open_regular(path).close()
            statistics = load_file(path)
        except Exception as error:  # safetensors raises its own exception for a damaged file, OSError for a missing one
            raise DataError(f"{path}: cannot be read ({reason(error)}): {advice(error, self.remedy)}") from error
        for name in STATISTICS:
            array, count = statistics.get(name), self.schema.num_variables
            if array is None or array.dtype != np.float64 or array.shape != (count,):
                raise DataError(f"{path}: {name!r} is not there or not float64 [{count}]: {self.remedy}")
        return statistics

    def cases(self, split: str) -> list[str]:
        """Names of the cases of "train", "val" or "test", sorted; empty if the store has none there."""
        if split not in SPLITS:
            raise DataError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
        return self._cases[split]

    @cached_property
    def _cases(self) -> dict[str, list[str]]:
        parts = [name.split("/") for name in self.arrays if name.endswith("/boundary")]
        return {split: sorted(case for its, case, _ in parts if its == split) for split in SPLITS}

    def has_state(self, split: str, case: str) -> bool:
        """Whether the case has outputs; without, it serves for prediction only. Raises DataError for no case."""
        return f"{split}/{self._known(split, case)}/state" in self.arrays

    def day(self, split: str, case: str) -> str:
        """The ISO date of the case's first minute."""
        return str(self.facts["days"][f"{split}/{self._known(split, case)}"])

    def _known(self, split: str, case: str) -> str:
        if f"{split}/{case}/boundary" not in self.arrays:
            held = len(self.cases(split))
            raise DataError(f"{self.root}: no case {case!r} in split {split!r}, which has {held} cases")
        return case

    def arrays_of(self, split: str, cases: Sequence[str]) -> list[Array]:
        """The arrays of these cases, to be verified before they are read."""
        names = [f"{split}/{case}/{kind}" for case in cases for kind in ("boundary", "state")]
        return [self[name] for name in names if name in self.arrays]

    def boundary(self, split: str, case: str) -> np.ndarray:
        """Read-only memory map of the boundary, float32 [M, Vb]."""
        return self[f"{split}/{self._known(split, case)}/boundary"].map()

    def state(self, split: str, case: str) -> np.ndarray | None:
        """Read-only memory map of the state, float32 [M, Vs], NaN where missing; None for a case without outputs."""
        return self[f"{split}/{case}/state"].map() if self.has_state(split, case) else None

    def boundary_rows(self, split: str, case: str, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop-1 of the boundary, a float32 copy [stop - start, Vb]."""
        return self[f"{split}/{case}/boundary"].rows(start, stop)

    def state_rows(self, split: str, case: str, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop-1 of the state, a float32 copy [stop - start, Vs]; the case must have outputs."""
        return self[f"{split}/{case}/state"].rows(start, stop)

    def windows(self, split: str, places: Sequence[tuple[str, int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(boundary [B, rows, Vb], state [B, rows, Vs]) from each of the given (case, row) on, float32 copies."""
        widths = {"boundary": self.schema.num_boundary, "state": self.schema.num_states}
        found = {kind: np.empty((len(places), rows, width), "<f4") for kind, width in widths.items()}
        for kind, windows in found.items():
            for (case, row), window in zip(places, windows, strict=True):
                self._open(f"{split}/{case}/{kind}").rows(row, row + rows, window)
        return found["boundary"], found["state"]

    @classmethod
    def from_version_1(cls, root: Path, index: dict[str, Any]) -> dict[str, Any]:
        """That version kept a digest of each array's file, header included, and none of the statistics."""
        minutes, schema = index["minutes"], _read_schema(root)
        if type(minutes) is not int or not 0 < minutes <= _MOST_MINUTES:
            raise ValueError(f"minutes {minutes!r:.80}")
        cases = {split: index["splits"].get(split, {}) for split in SPLITS}
        content = {
            "schema": schema.to_json(),
            "splits": {
                split: {name: [case["day"], case["digests"]] for name, case in sorted(each.items())}
                for split, each in cases.items()
            },
        }
        found = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
        if found != index["fingerprint"]:
            raise DataError(f"{root}: {INDEX} and schema.json do not belong together: {cls._remedy(root)}")
        arrays, days = {}, {}
        for split, each in cases.items():
            for name, case in each.items():
                days[f"{split}/{name}"] = case["day"]
                for file, spec in specs_of_version_1(case["digests"], minutes, schema).items():
                    arrays[f"{split}/{name}/{file}"] = spec.to_json()
        return index | {"arrays": arrays, "files": {}, "facts": {"minutes": minutes, "days": days}}


def _read_schema(root: Path) -> Schema:
    try:
        return Schema.read(root)
    except DataError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise DataError(f"{error}: {advice(cause, Store._remedy(root))}") from error


def specs_of_version_1(digests: dict[str, str], minutes: int, schema: Schema) -> dict[str, Spec]:
    """The arrays of a case as store.json and case.json of version 1 describe them. Raises KeyError."""
    widths = {"boundary.npy": schema.num_boundary, "state.npy": schema.num_states}
    return {
        name.removesuffix(".npy"): Spec("<f4", (minutes, widths[name]), f"blake2b:{digest}")
        for name, digest in digests.items()
    }
