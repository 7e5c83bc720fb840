"""Checkpoints: whole or none.

    <run>/checkpoints/step-00000400/
        backend/...       parameters and optimizer state, sharded over the ranks: see engine/state/sharded_state.py
        trainer.json      step, best metric, early stopping, skipped steps, and what the run must have in common
        MANIFEST.json     every file with its size and SHA-256, and the proof of what was saved; written last

A checkpoint is staged in a hidden folder, every file is fsynced and hashed, the manifest is written, and one rename
makes it visible. Training continues meanwhile. Only the copy to the CPU delays it. There is no pickle in it.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.engine.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    TRAINER,
    Checkpoint,
    RefusedError,
    is_tag,
    manifest_text,
    verify,
)
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import entry, note_written, sync, unused
from trunkline.engine.machine.log import LOG
from trunkline.engine.machine.reading import AGAIN, reason
from trunkline.engine.ranks.distributed import Ranks, from_main, gather, on_main, with_own_group
from trunkline.engine.state.sharded_files import Digests, add_digests, file_names
from trunkline.engine.state.sharded_state import Snapshot

BACKEND = "backend"


class Checkpoints:
    """The checkpoints of one run. Every method is called on all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, keep_last: int, keep_best: bool = False) -> None:
        self.folder, self.ranks, self.keep_last, self.keep_best = folder, ranks, keep_last, keep_best
        self._saving: threading.Thread | None = None
        self._problem: Exception | None = None

    def open_for_writing(self) -> None:
        """Make the folder and clear what a killed save left in it. Raises CheckpointError."""

        def clear() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [*self.folder.glob(".staging-*"), *self.folder.glob(".trash-*")]:
                _remove(leftover)

        self._on_main(clear, "use", self.folder)
        # a save talks to the other ranks while training does
        self.ranks = with_own_group(self.ranks)

    def save(
        self, snapshot: Snapshot, state: dict[str, Any], probe_loss: float, in_background: bool = True,
        then: Callable[[Path], None] = lambda path: None,
    ) -> Path:  # fmt: skip
        """Write a checkpoint of step `state["step"]`, then drop those past `keep_last`.

        With `keep_best` that of `state["best_step"]` is kept beside them.

        The files of a snapshot are written by a thread of their own unless `in_background` is false. A save that is
        still under way is waited for first. `then` is called on rank 0 with the checkpoint when it is whole.

        Raises:
            CheckpointError: on all ranks, if a file could not be written on any, now or by the save before; earlier
                checkpoints are untouched.
        """
        self.wait()
        step = state["step"]
        staging, final = self.folder / f".staging-step-{step:08d}", self.folder / f"step-{step:08d}"

        def write() -> None:
            try:
                self._on_main(lambda: self._stage(staging, state), "prepare", staging)
                entries, digests = self._write_and_hash(staging, snapshot)
                manifest = {"format": FORMAT, "step": step, "files": entries}
                proof = {"probe_loss": repr(probe_loss), "digests": {key: f"{n:016x}" for key, n in digests.items()}}
                self._on_main(lambda: self._publish(staging, final, manifest | proof), "write", final)
                self._on_main(lambda: then(final), "hand over", final)
                self._on_main(lambda: self._prune(state.get("best_step")), "prune", self.folder)
            except Exception as problem:
                self._problem = problem

        self._saving = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._saving.start()
        if not in_background:
            self.wait()
        return final

    def wait(self) -> None:
        """Until the save that is under way, if any, has ended. Raises CheckpointError if it failed."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def settle(self, timeout_s: float = 60.0) -> None:
        """Let a save that is under way come to its end, before an error of another kind ends the run."""
        if self._saving is not None:
            self._saving.join(timeout_s)

    @property
    def failed(self) -> bool:
        """Whether a save has failed, which `wait` raises; not at the same moment on all ranks."""
        return self._problem is not None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if the run never saved one.

        Damaged ones are named on the way.

        Raises:
            CheckpointError: there are checkpoints, but every one is damaged, or the system refuses to read one that is
                newer than all that verify.
        """

        def choose() -> Checkpoint | str | None:
            problems = []
            try:
                for path in sorted(self._tags(), key=_step, reverse=True):
                    try:
                        return verify(path)
                    except RefusedError:  # an older one in its place would cost the steps between
                        raise
                    except CheckpointError as error:
                        problems.append(str(error))
                        LOG.warning(f"{error}; trying the one before it")
            except RefusedError as error:
                return f"{error}: {AGAIN}"
            if not problems:
                return None
            return "no checkpoint can be loaded:\n" + "\n".join(problems) + "\nstart afresh in another --output-dir"

        return self._agreed(choose)

    def load(self, path: Path) -> Checkpoint:
        """This one checkpoint, verified. Raises CheckpointError."""

        def choose() -> Checkpoint | str:
            try:
                return verify(path)
            except CheckpointError as error:
                return str(error)

        found = self._agreed(choose)
        assert found is not None
        return found

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps, damaged or abandoned by a resume from `step`, out of the way."""

        def rename() -> None:
            for path in self._tags():
                if _step(path) > step:
                    target = unused(self.folder / f"aside-{path.name}")
                    path.rename(target)
                    LOG.info(f"note: {path} is past the step that this run resumes from; renamed to {target.name}")

        self._on_main(rename, "set aside", self.folder)

    def _agreed(self, choose: Callable[[], Checkpoint | str | None]) -> Checkpoint | None:
        found = from_main(choose() if self.ranks.is_main else None, self.ranks)
        if isinstance(found, str):
            raise CheckpointError(found)
        return found

    def _tags(self) -> list[Path]:
        try:
            return [path for name in os.listdir(self.folder) if is_tag(path := self.folder / name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:  # it may not be empty, and a run must not begin afresh in it
            raise RefusedError(f"{self.folder}: cannot be read: {reason(error)}") from error

    def _on_main(self, work: Callable[[], None], verb: str, path: Path) -> None:
        on_main(work, self.ranks, f"{path}: cannot {verb} it")

    def _stage(self, staging: Path, state: dict[str, Any]) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / BACKEND).mkdir(parents=True, exist_ok=True)  # a network file system keeps what is open elsewhere
        (staging / TRAINER).write_text(json.dumps(state, indent=1))

    def _write_and_hash(self, staging: Path, snapshot: Snapshot) -> tuple[dict[str, dict[str, Any]], Digests]:
        """Write each rank's files; the entries of all files, and the digests added up over the ranks."""
        mine: dict[str, dict[str, Any]] = {}
        digests: Digests = {}
        problem = None
        try:
            digests = snapshot.write(staging / BACKEND, self.ranks.rank, self.ranks.world_size)
            written = [staging / BACKEND / name for name in file_names(self.ranks.rank, self.ranks.world_size)]
            for path in [*written, staging / TRAINER] if self.ranks.is_main else written:
                mine[path.relative_to(staging).as_posix()] = entry(path, sync=True)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.strerror} ({error.filename})"
            problem = f"{staging}: cannot write this checkpoint: {reason}; make room or choose another folder"
        parts = gather((mine, digests, problem), self.ranks)
        if problems := [problem for _, _, problem in parts if problem]:
            raise CheckpointError("; ".join(problems))
        entries = dict(sorted(item for entries, _, _ in parts for item in entries.items()))
        return entries, add_digests([digests for _, digests, _ in parts])

    def _publish(self, staging: Path, final: Path, manifest: dict[str, Any]) -> None:
        with (staging / MANIFEST).open("w") as file:
            file.write(manifest_text(manifest))
            file.flush()
            os.fsync(file.fileno())
        note_written()
        for path in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
            sync(path)
        trash = unused(self.folder / f".trash-{final.name}")
        if final.exists():  # left by a run that was resumed from before this step
            final.rename(trash)
        staging.rename(final)
        sync(self.folder)
        _remove(trash)

    def _prune(self, best_step: int | None) -> None:
        for path in sorted(self._tags(), key=_step)[: -self.keep_last]:
            if self.keep_best and _step(path) == best_step:
                continue
            trash = unused(self.folder / f".trash-{path.name}")
            path.rename(trash)  # so that a folder which is half deleted is never taken for a checkpoint
            _remove(trash)


def _step(path: Path) -> int:
    """The step that the name of a checkpoint's folder tells: names are ordered as numbers, not as text."""
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Delete what is no longer wanted, and nothing that a link leads to. What cannot be deleted now, such as a file
    that a network file system keeps while it is open elsewhere, is left for the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
