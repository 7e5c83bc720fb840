"""Writes a store (trunkline.engine.data.store), so that a half-written one is never taken for whole.

All at once:

    with draft_of(out) as draft:               an empty folder beside `out`, which nobody else writes
        with NpyWriter(draft / "x.npy", ...)   arrays (trunkline.engine.data.npy), whatever their length will be
        write_index(draft, "workload", ...)    store.json
        publish(draft, out)                    everything on the disk, then one rename

Part by part, and killed in between without losing the parts that are done:

    write_part(folder, arrays, note)           a folder of arrays, whole or not there
    read_part(folder)                          what a part that is there holds, and its note; None for none
    write_index(root, "workload", ...)         last; a store without an index is not finished
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trunkline.engine.data.npy import NpyFile, Spec, write_npy
from trunkline.engine.data.store import INDEX, VERSION, ArrayStore, fingerprint
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import entry, only_writer, replace_whole, sync
from trunkline.engine.machine.reading import read_object

_S = TypeVar("_S", bound=ArrayStore)
PART, PARTIAL = "part.json", ".partial"


@dataclass(frozen=True)
class Part:
    """A folder of arrays that belong together: what is said of each, by name, and what its writer noted."""

    arrays: dict[str, Spec]
    note: dict[str, Any]


def write_part(folder: Path, arrays: Mapping[str, np.ndarray], note: dict[str, Any]) -> Part:
    """Write the arrays [n, ...] as `folder`/<name>.npy. A folder of this name is replaced. Raises OSError."""
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    part = Part({name: write_npy(partial / f"{name}.npy", array) for name, array in arrays.items()}, note)
    record = {"arrays": {name: spec.to_json() for name, spec in part.arrays.items()}, "note": note}
    replace_whole(partial / PART, json.dumps(record, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    return part


def read_part(folder: Path) -> Part | None:
    """What `write_part` made of `folder`; None if there is none, or not a whole one. Values are not read."""
    try:
        record = read_object(folder / PART)
        part = Part({name: Spec.from_json(spec) for name, spec in record["arrays"].items()}, record["note"])
        for name, spec in part.arrays.items():
            with NpyFile(folder / f"{name}.npy", spec, ""):
                pass
        return part
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None


def write_index(
    root: Path,
    workload: str,
    arrays: Mapping[str, Spec],
    files: Sequence[str],
    facts: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    """Write store.json, which makes `root` a whole store. Raises OSError.

    arrays: as they lie in `root`, without ".npy". files: the names of further ones, which will be checked
    facts: what the workload keeps of its own and the fingerprint covers. notes: what it does not
    """
    index: dict[str, Any] = {
        "version": VERSION,
        "workload": workload,
        "facts": dict(facts),
        "files": {name: entry(root / name, sync=True)["sha256"] for name in sorted(files)},
        "arrays": {name: arrays[name].to_json() for name in sorted(arrays)},
    }
    assert not index.keys() & notes.keys()
    index = json.loads(json.dumps(index))  # as it will be read
    replace_whole(root / INDEX, json.dumps({"fingerprint": fingerprint(index), **index, **notes}, indent=1) + "\n")


def check_out(out: Path, *sources: Path) -> None:
    """Raise DataError for an `out` that is no place for a store made of `sources`: it holds other things, or one of
    them, or lies in one."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder: choose another --out")
    for source in sources:
        if source.resolve() in (out.resolve(), *out.resolve().parents) or out.resolve() in source.resolve().parents:
            raise DataError(f"--out {out} and the source {source} contain one another: choose an --out of its own")
    if out.is_dir() and not (out / INDEX).is_file() and any(out.iterdir()):
        raise DataError(f"{out}: not empty and not a prepared data set: choose another --out, or empty it")


def finished(kind: type[_S], out: Path, made_from: Mapping[str, Any]) -> _S:
    """The store in `out`. Raises ConfigError if its note "made_from" says that it was made from anything else."""
    store = kind.open(out)
    before = store.index.get("made_from", {})
    if different := [name for name in made_from if before.get(name) != made_from[name]]:
        raise ConfigError(
            f"{out}: already holds a data set made with another {' and another '.join(different)}: choose another "
            "--out, or remove that folder"
        )
    return store


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that nobody else writes; if it was not published, it is removed in the end.

    The lock goes with the process, however it ends. Raises DataError while another process holds it.
    """
    out = Path(os.path.abspath(out))  # "." has no name
    draft = out.with_name(f".{out.name}.draft")
    draft.mkdir(exist_ok=True)
    with only_writer(draft, out):
        try:
            for path in draft.iterdir():  # of a preparation that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, out: Path) -> None:
    """Give a draft that has its index its name. Raises DataError if `out` is there and not an empty folder."""
    out = Path(os.path.abspath(out))
    for folder in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
        sync(folder)
    try:
        draft.rename(out)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}: choose another --out, or empty it") from error
    sync(out.parent)
