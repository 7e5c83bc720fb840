"""digests.json: size and SHA-256 of every file in a folder of weights.

    replace_files(folder, write)   put files into a folder so that a kill at any moment leaves it whole
    check_digests(folder)          raise CheckpointError unless the files are those that were written

    {"files": {"model.safetensors": [{"bytes": 812, "sha256": "..."}], ...}}

A file has one state, and for as long as it is being replaced two: the new one and the old one. null is a file that is
not there. So a folder in which a kill left some new files beside old ones still reads as whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import entry, replace_whole, sync
from trunkline.engine.machine.reading import advice, read_object, reason

DIGESTS = "digests.json"
DRAFT = ".draft"

States = dict[str, list[dict[str, Any] | None]]


def replace_files(folder: Path, write: Callable[[Path], object]) -> dict[str, dict[str, Any]]:
    """Let `write` fill an empty folder, then put its files into `folder`, weights last. Returns their entries.

    Files that an earlier call has put there and this one does not are removed; anything else there is left alone.
    Raises OSError.
    """
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    fresh = {name: entry(draft / name, sync=True) for name in _files(draft)}
    try:
        known = _read(folder)
    except CheckpointError:  # it is about to be written anew
        known = {}
    old = {name: known.get(name) or [_found(folder / name)] for name in {*known, *fresh}}
    _write(folder, {name: [fresh.get(name), *states] for name, states in old.items()})
    for name in sorted(fresh, key=lambda name: (name.endswith(".safetensors"), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).replace(folder / name)
    for name in old.keys() - fresh.keys():
        (folder / name).unlink(missing_ok=True)
    sync(folder)
    _write(folder, {name: [state] for name, state in fresh.items()})
    shutil.rmtree(draft, ignore_errors=True)
    return fresh


def check_digests(folder: Path) -> None:
    """Raise CheckpointError unless every file is as it was written. A folder without digests.json, from an earlier
    version or another program, passes."""
    for name, states in _read(folder).items():
        try:
            found = _found(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {reason(error)}") from error
        if found not in states:
            what = "is missing" if found is None else f"is not the file that was written: {_difference(found, states)}"
            raise CheckpointError(
                f"{folder / name}: {what}; copy the folder again, or make it anew from a checkpoint with "
                f"launchers/export.py; if the change was meant, remove {folder / DIGESTS}"
            )


def recorded(folder: Path, name: str) -> str | None:
    """The SHA-256 that digests.json says of a file; None where it does not. Raises CheckpointError, OSError.

    Of a file that was being replaced when the writer was killed it is looked up.
    """
    states = _read(folder).get(name, [])
    state = states[0] if len(states) == 1 else _found(folder / name) if states else None
    return str(state["sha256"]) if state else None


def _difference(found: dict[str, Any], states: list[dict[str, Any] | None]) -> str:
    sizes = [state["bytes"] for state in states if state]
    if sizes and found["bytes"] not in sizes:
        return f"it has {found['bytes']} bytes, and {DIGESTS} says {sizes[0]}"
    return f"its SHA-256 differs from that in {DIGESTS}"


def _found(path: Path) -> dict[str, Any] | None:
    try:
        return entry(path, follow=True)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(folder: Path) -> list[str]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if name != DIGESTS and not name.startswith(f"{DRAFT}/")]


def _read(folder: Path) -> States:
    path = folder / DIGESTS
    try:
        states = read_object(path)["files"]
        if not all(_is_inside(name) and _are_states(each) for name, each in states.items()):
            raise ValueError("its entries are not names of files here, each with its bytes and sha256")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        remedy = "copy the folder again, or remove this file to use the others unchecked"
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}): {advice(error, remedy)}") from error
    return states


def _is_inside(name: str) -> bool:
    place = PurePosixPath(name)
    return bool(place.parts) and not place.is_absolute() and ".." not in place.parts and "\0" not in name


def _are_states(value: Any) -> bool:
    return isinstance(value, list) and all(
        each is None or (isinstance(each, dict) and each.keys() == {"bytes", "sha256"}) for each in value
    )


def _write(folder: Path, files: States) -> None:
    replace_whole(folder / DIGESTS, json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
