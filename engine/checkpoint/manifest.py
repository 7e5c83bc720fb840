"""The manifest of a checkpoint, MANIFEST.json: every file with its size and SHA-256, and the proof of what was saved.

verify(path)             -> Checkpoint, each file of which is as the manifest says
manifest_text(manifest)  what is written, with a checksum of its own
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import entry
from trunkline.engine.machine.log import LOG
from trunkline.engine.machine.reading import read_object, read_whole, reason, refused
from trunkline.engine.state.sharded_files import Digests

MANIFEST = "MANIFEST.json"
TRAINER = "trainer.json"
FORMAT = 2
_TAG = re.compile(r"(aside-)?step-([0-9]{8,})(\.[0-9]+)?")
_MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified. `state` is the trainer's."""

    path: Path
    state: dict[str, Any]
    digests: Digests
    probe_loss: float


class RefusedError(CheckpointError):
    """The system does not let a checkpoint be read that may well be whole."""


def _unread(error: OSError) -> type[CheckpointError]:
    return RefusedError if refused(error) else CheckpointError


def is_tag(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint, "step-" and the step in eight digits or more."""
    tag = _TAG.fullmatch(path.name)
    return tag is not None and path.name == f"step-{int(tag[2]):08d}" and path.is_dir()


def verify(path: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest. What the manifest does not list is named and ignored.

    Raises:
        CheckpointError: names the checkpoint, the file and the reason.
    """
    manifest = _read_json(path, MANIFEST)
    if manifest_text(manifest).encode() != read_whole(path / MANIFEST, _MAX_MANIFEST_BYTES):
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: its own checksum does not fit")
    try:
        files, step, probe_loss = dict(manifest["files"]), manifest["step"], float(manifest["probe_loss"])
        digests = {str(key): int(value, 16) for key, value in manifest["digests"].items()}
        readable = manifest["format"] == FORMAT and TRAINER in files and type(step) is int
    except (KeyError, TypeError, ValueError, AttributeError):
        readable = False
    if not readable:
        raise CheckpointError(f"{path}: {MANIFEST} is not one that this version can read")
    tag = _TAG.fullmatch(path.name)
    if tag is not None and int(tag[2]) != step:
        raise CheckpointError(
            f"{path}: {MANIFEST} is of step {step}: this is a copy of another checkpoint under a wrong name; rename it "
            f"to step-{step:08d}, or remove it"
        )
    for name, wanted in files.items():
        _check_file(path, name, wanted)
    state = _read_json(path, TRAINER)
    if state.get("step") != step:
        raise CheckpointError(f"{path}: {TRAINER} is of step {state.get('step')!r}, but {MANIFEST} of {step}")
    own = {MANIFEST, *files, *(str(parent) for name in files for parent in PurePosixPath(name).parents)}
    if extra := sorted({found.relative_to(path).as_posix() for found in path.rglob("*")} - own):
        more = f" and {len(extra) - 3} more" if extra[3:] else ""
        LOG.info(f"note: {path}: not in its manifest, and ignored: {', '.join(map(repr, extra[:3]))}{more}")
    return Checkpoint(path, state, digests, probe_loss)


def _check_file(path: Path, name: str, wanted: Any) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{path}: {MANIFEST} names a file outside the checkpoint: {name!r}")
    file = path / relative
    try:
        if any(part.is_symlink() for part in (file, *file.parents[: len(relative.parts)])):
            raise CheckpointError(f"{path}: {name} is a symbolic link; a checkpoint holds plain files")
        found = entry(file)
    except OSError as error:
        raise _unread(error)(f"{path}: {name!r:.100} cannot be read: {reason(error)}") from error
    if not isinstance(wanted, dict) or found["bytes"] != wanted.get("bytes"):
        says = wanted.get("bytes") if isinstance(wanted, dict) else wanted
        raise CheckpointError(f"{path}: {name} has {found['bytes']} bytes; its manifest says {says!r:.100}")
    if found["sha256"] != wanted.get("sha256"):
        raise CheckpointError(f"{path}: {name} is damaged: its SHA-256 differs from the manifest's")


def manifest_text(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps(body | {"checksum": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if (path / name).is_symlink():
        raise CheckpointError(f"{path}: {name} is a symbolic link; a checkpoint holds plain files")
    try:
        return read_object(path / name, _MAX_MANIFEST_BYTES, finite=False, follow=False)
    except OSError as error:
        raise _unread(error)(f"{path}: {name} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error}") from error
