"""Checkpoints: whole or none.

    <run>/checkpoints/step-00000400/
        backend/...       what the backend writes, sharded over the ranks
        trainer.json      step, best metric, early stopping, skipped steps, and what the run must have in common
        MANIFEST.json     every file with its size and SHA-256, written last

A checkpoint is staged in a hidden folder, every file is fsynced and hashed, the manifest is written, and one rename
makes it visible. Nothing in it is unpickled before its manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from engine.distributed import Ranks, barrier, from_main, gather
from engine.errors import CheckpointError

MANIFEST = "MANIFEST.json"
TRAINER = "trainer.json"
BACKEND = "backend"
_FORMAT = 1
_TAG = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints of one run. Every method is called on all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, keep_last: int) -> None:
        self.folder, self.ranks, self.keep_last = folder, ranks, keep_last

    def open_for_writing(self) -> None:
        """Make the folder and clear what a killed save left in it. Raises CheckpointError."""

        def clear() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(".staging-*"), *self.folder.glob(".trash-*")]:
                shutil.rmtree(leftover)

        self._on_main(clear, "use", self.folder)

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Write a checkpoint of `step`, then drop those past `keep_last`.

        `write(folder)` is called on all ranks and writes the backend's files; `state` is the trainer's, as JSON.

        Raises:
            CheckpointError: on all ranks, if a file could not be written on any; earlier checkpoints are untouched.
        """
        staging, final = self.folder / f".staging-step-{step:08d}", self.folder / f"step-{step:08d}"
        self._on_main(lambda: self._stage(staging, state), "prepare", staging)
        write(staging / BACKEND)
        barrier(self.ranks)
        entries = self._hash_and_sync(staging)
        self._on_main(lambda: self._publish(staging, final, entries, state), "write", final)
        self._on_main(self._prune, "prune", self.folder)
        return final

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that verifies, with its trainer state; None if the run never saved one.

        Damaged ones are named on the way.

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged.
        """

        def choose() -> tuple[Path, dict[str, Any]] | str | None:
            problems = []
            for path in sorted(self._tags(), reverse=True):
                try:
                    found = path, verify(path)
                except CheckpointError as error:
                    problems.append(str(error))
                    print(f"warning: {error}; trying the one before it", flush=True)
                    continue
                return found
            if not problems:
                return None
            return "no checkpoint can be loaded:\n" + "\n".join(problems) + "\nstart afresh in another --output-dir"

        return self._agreed(choose)

    def load(self, path: Path) -> tuple[Path, dict[str, Any]]:
        """This one checkpoint, verified, with its trainer state. Raises CheckpointError."""

        def choose() -> tuple[Path, dict[str, Any]] | str:
            try:
                return path, verify(path)
            except CheckpointError as error:
                return str(error)

        found = self._agreed(choose)
        assert found is not None
        return found

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps, damaged or abandoned by a resume from `step`, out of the way."""

        def rename() -> None:
            for path in self._tags():
                if int(path.name.removeprefix("step-")) > step:
                    target = self.folder / f"aside-{path.name}"
                    shutil.rmtree(target, ignore_errors=True)
                    path.rename(target)
                    print(
                        f"note: {path} is past the step that this run goes on from; renamed to {target.name}",
                        flush=True,
                    )

        self._on_main(rename, "set aside", self.folder)

    def _agreed(
        self, choose: Callable[[], tuple[Path, dict[str, Any]] | str | None]
    ) -> tuple[Path, dict[str, Any]] | None:
        found = from_main(choose() if self.ranks.is_main else None, self.ranks)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def _tags(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if _TAG.fullmatch(path.name)]

    def _on_main(self, work: Callable[[], None], verb: str, path: Path) -> None:
        problem = None
        if self.ranks.is_main:
            try:
                work()
            except OSError as error:
                problem = f"{path}: cannot {verb} it: {error.strerror} ({error.filename}); make room or choose another"
        problem = from_main(problem, self.ranks)
        if problem:
            raise CheckpointError(problem)

    def _stage(self, staging: Path, state: dict[str, Any]) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / BACKEND).mkdir(parents=True)
        (staging / TRAINER).write_text(json.dumps(state, indent=1))

    def _hash_and_sync(self, staging: Path) -> dict[str, dict[str, Any]]:
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        mine: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            for path in files[self.ranks.rank :: self.ranks.world_size]:
                mine[path.relative_to(staging).as_posix()] = _entry(path, sync=True)
        except OSError as error:
            problem = f"{staging}: cannot write this checkpoint: {error.strerror} ({error.filename})"
        parts = gather((mine, problem), self.ranks)
        problems = [problem for _, problem in parts if problem]
        if problems:
            raise CheckpointError("; ".join(problems))
        return dict(sorted(item for entries, _ in parts for item in entries.items()))

    def _publish(self, staging: Path, final: Path, entries: dict[str, Any], state: dict[str, Any]) -> None:
        with (staging / MANIFEST).open("w") as file:
            file.write(_manifest_text({"format": _FORMAT, "step": state["step"], "files": entries}))
            file.flush()
            os.fsync(file.fileno())
        for path in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
            _sync_folder(path)
        if final.exists():  # left by a run that was resumed from before this step
            final.rename(self.folder / f".trash-{final.name}")
        staging.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(self.folder / f".trash-{final.name}", ignore_errors=True)

    def _prune(self) -> None:
        for path in sorted(self._tags())[: -self.keep_last]:
            trash = self.folder / f".trash-{path.name}"
            path.rename(trash)  # so that a folder which is half deleted is never taken for a checkpoint
            shutil.rmtree(trash)


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the trainer's state.

    Raises:
        CheckpointError: names the checkpoint, the file and the reason.
    """
    manifest = _read_json(path, MANIFEST)
    if _manifest_text(manifest) != (path / MANIFEST).read_text():
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: its own checksum does not fit")
    files = manifest.get("files")
    if manifest.get("format") != _FORMAT or not isinstance(files, dict) or TRAINER not in files:
        raise CheckpointError(f"{path}: {MANIFEST} is not one that this version can read")
    for name, entry in files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{path}: {MANIFEST} names a file outside the checkpoint: {name!r}")
        file = path / relative
        if any(part.is_symlink() for part in (file, *file.parents[: len(relative.parts)])):
            raise CheckpointError(f"{path}: {name} is a symbolic link; a checkpoint holds plain files")
        try:
            found = _entry(file)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if not isinstance(entry, dict) or found["bytes"] != entry.get("bytes"):
            raise CheckpointError(f"{path}: {name} has {found['bytes']} bytes; its manifest says {entry.get('bytes')}")
        if found["sha256"] != entry.get("sha256"):
            raise CheckpointError(f"{path}: {name} is damaged: its SHA-256 differs from the manifest's")
    extra = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - set(files) - {MANIFEST}
    if extra:
        raise CheckpointError(f"{path}: {min(extra)} is not in the manifest; remove it or use another checkpoint")
    return _read_json(path, TRAINER)


def _manifest_text(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps(body | {"checksum": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is damaged: it does not hold an object")
    return value


def _entry(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        if sync:
            os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
