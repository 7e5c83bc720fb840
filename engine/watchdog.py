"""A run that hangs says which rank is missing, at which step and in what, and ends.

A rank that waits in a collective for another one waits for ever, or until a time-out that names nobody. Here the main
thread notes what it is about to do, which costs a tuple. A thread beside it writes the note into the run's folder,
where the other ranks can read it even if this one is stopped altogether, and watches for a note that stands too long.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from engine.distributed import Ranks
from engine.reading import read_object

EXIT_CODE = 76
"""Of a process that was ended because the run hung."""


class Watchdog:
    """Watches the main thread of this rank while it is started.

    Args:
        folder: where the ranks leave their notes, on a file system that they share.
        ranks: this process among all.
        timeout_s: how long one note may stand.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout_s: float) -> None:
        self.folder, self.ranks, self.timeout_s = folder, ranks, timeout_s
        self._note = (0, 0, "starting", time.monotonic())
        self._every_s = min(10.0, timeout_s / 8)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, step: int, doing: str) -> None:
        """From now on this rank is at `step`, `doing` this. All ranks make the same notes in the same order."""
        self._note = self._note[0] + 1, step, doing, time.monotonic()

    def start(self) -> None:
        """Begin to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(self.ranks.rank).unlink(missing_ok=True)  # of a run that was killed
        self.note(0, "starting")
        self._thread.start()

    def stop(self) -> None:
        """Watch no more. Called on all ranks; what they noted is removed."""
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path(self.ranks.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            count, step, doing, since = self._note
            seconds = time.monotonic() - since
            with contextlib.suppress(OSError):  # a full disk is for the next save to report
                draft = self._path(self.ranks.rank).with_suffix(".draft")
                note = {"count": count, "step": step, "doing": doing, "seconds": seconds, "at": time.time()}
                draft.write_text(json.dumps(note))
                draft.replace(self._path(self.ranks.rank))
            if seconds > self.timeout_s:
                print(self._report(), file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)  # the main thread is inside a call that nothing interrupts

    def _report(self) -> str:
        """Who is where, and which ranks the others wait for: those that are behind, or silent."""
        notes = {rank: self._read(rank) for rank in range(self.ranks.world_size)}
        silent_s = 4 * self._every_s
        furthest = max((note["count"] for note in notes.values() if note), default=0)
        lines, missing = [], []
        for rank, note in notes.items():
            if note is None:
                lines.append(f"  rank {rank}: left no note; it has ended, or cannot write to {self.folder}")
                missing.append(rank)
                continue
            silence = time.time() - note["at"]
            line = f"  rank {rank}: step {note['step']}, {note['doing']}, for {note['seconds']:.0f} s"
            if silence > silent_s:
                line += f"; last heard of {silence:.0f} s ago: it is stopped, or its machine is"
            if silence > silent_s or note["count"] < furthest:
                missing.append(rank)
            lines.append(line)
        who = f"waiting for rank {', '.join(map(str, missing))}" if missing else "all ranks are in the same place"
        return "\n".join(
            [
                f"error: the run hangs: no progress for {self.timeout_s:g} s (training.hang_timeout_s), {who}",
                *lines,
                "  Checkpoints are untouched; go on from the last one with --resume auto",
            ]
        )

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            note = read_object(self._path(rank), 1 << 16)
            return {"count": int(note["count"]), "step": int(note["step"]), "doing": str(note["doing"])} | {
                key: float(note[key]) for key in ("seconds", "at")
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"
