"""A run that hangs names the rank, its step and its place, and ends; that of one process in a library does not end.

A rank that waits in a collective for another one waits for ever, or until a time-out that names nobody. Here the main
thread notes what it is about to do, which costs a tuple. A thread beside it writes the note into the run's folder,
where the other ranks can read it even if this one is stopped altogether, and watches for a note that stands too long.

A run hangs when no rank gets on. Where a note says that work of unknown length is under way, such as a save, a rank
gets on while that work does: pieces of files, bytes, and during the start the processor's time. Time in which the
watchdog itself did not run, because the process was suspended, does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from trunkline.engine.machine import stopping
from trunkline.engine.machine.again import resume_with
from trunkline.engine.machine.files import pieces_written
from trunkline.engine.machine.log import LOG
from trunkline.engine.machine.reading import read_object
from trunkline.engine.ranks.distributed import Ranks

EXIT_CODE = 76
"""Of a process that was ended because the run hung."""

_IDLE_BYTES = 1 << 20
_COMPUTING = 4  # time-outs: a rank that waits for a GPU computes too, so computing alone does not count for ever
_IDLE_SHARE = 0.05
_WAITING = os.path.dirname(dist.__file__)


class Watchdog:
    """Watches the main thread of this rank while it is started.

    Args:
        folder: where the ranks leave their notes, on a file system that they share.
        ranks: this process among all.
        timeout_s: how long one note may stand.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout_s: float) -> None:
        self.folder, self.ranks, self.timeout_s = folder, ranks, timeout_s
        self._note = (0, 0, "starting", time.monotonic(), False)
        self._every_s = min(10.0, timeout_s / 8)
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched = 0
        self._starting = False

    def note(self, step: int, doing: str, works: bool = False) -> None:
        """From now on this rank is at `step`, `doing` this. All ranks make the same notes in the same order.

        `works`: it may take longer than the time-out as long as it gets on.
        """
        self._note = self._note[0] + 1, step, doing, time.monotonic(), works

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Watch within, where a run is put together: work of unknown length."""
        self._starting = True
        self.start()
        try:
            yield
        finally:
            self.stop()
            self._starting = False

    def start(self) -> None:
        """Begin to watch."""
        with contextlib.suppress(OSError):  # a folder that cannot be used is for others to report
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path(self.ranks.rank).unlink(missing_ok=True)  # of a run that was killed
        self.note(self._note[1], "starting", works=self._starting)
        self._done = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more. Called on all ranks; what they noted is removed."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self._path(self.ranks.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def _watch(self) -> None:
        seen = 0
        ticked = got_on = time.monotonic()
        work = self._work()
        while not self._done.wait(self._every_s):
            now = time.monotonic()
            count, step, doing, since, works = self._note
            before, work = work, self._work()
            if count != seen:
                seen, got_on = count, since
            may_compute = self._starting and now - since <= _COMPUTING * self.timeout_s
            if works and self._gets_on(before, work, now - ticked, may_compute):
                got_on = now
            got_on = min(now, got_on + max(0.0, now - ticked - 2 * self._every_s))
            ticked, seconds = now, now - got_on
            with contextlib.suppress(OSError):  # a full disk is for the next save to report
                draft = self._path(self.ranks.rank).with_suffix(".draft")
                note = {"count": count, "step": step, "doing": doing, "seconds": seconds, "at": time.time()}
                draft.write_text(json.dumps(note | self._place()))
                draft.replace(self._path(self.ranks.rank))
            if seconds > self.timeout_s and not self._another_gets_on():
                LOG.error(self._report())
                if self.ranks.world_size == 1 and not stopping.is_listening():
                    return  # a notebook's process holds more than this run
                os._exit(EXIT_CODE)  # the main thread is inside a call that nothing interrupts

    def _work(self) -> tuple[int, int, float]:
        """Up to now: pieces of files, bytes read and written, seconds of processors."""
        moved = 0
        with contextlib.suppress(OSError, psutil.Error):  # not every kernel counts
            counters = psutil.Process().io_counters()
            moved = counters.read_chars + counters.write_chars
        return pieces_written(), moved, sum(os.times()[:4])

    def _gets_on(
        self, before: tuple[int, int, float], work: tuple[int, int, float], seconds: float, may_compute: bool
    ) -> bool:
        """Whether work was done. A process that only waits reads and computes a little, too."""
        pieces, moved, cpu_s = (after - earlier for after, earlier in zip(work, before, strict=True))
        return bool(pieces) or moved > _IDLE_BYTES or (may_compute and cpu_s > _IDLE_SHARE * seconds)

    def _place(self) -> dict[str, Any]:
        """Where the watched thread is, and whether it waits for other ranks."""
        frame = sys._current_frames().get(self._watched)
        if frame is None:
            return {"place": "", "waits": False}
        place = f", in {frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        return {"place": place, "waits": any(_WAITING in f.f_code.co_filename for f, _ in traceback.walk_stack(frame))}

    def _another_gets_on(self) -> bool:
        notes = (self._read(rank) for rank in range(self.ranks.world_size) if rank != self.ranks.rank)
        return any(note and note["seconds"] + time.time() - note["at"] <= self.timeout_s for note in notes)

    def _report(self) -> str:
        """Who is where, and which ranks the others wait for: those that are behind, or silent."""
        notes = {rank: self._read(rank) for rank in range(self.ranks.world_size)}
        silent_s = 4 * self._every_s
        # in the same place: whoever waits is further than whoever does not
        progress = {rank: (note["count"], note["waits"]) for rank, note in notes.items() if note}
        furthest = max(progress.values(), default=(0, False))
        lines, missing = [], []
        for rank, note in notes.items():
            if note is None:
                lines.append(f"  rank {rank}: left no note; it has ended, or cannot write to {self.folder}")
                missing.append(rank)
                continue
            silence = time.time() - note["at"]
            line = f"  rank {rank}: step {note['step']}, {note['doing']}, for {note['seconds']:.0f} s{note['place']}"
            if silence > silent_s:
                line += f"; last heard of {silence:.0f} s ago: it is stopped, or its machine is"
            if silence > silent_s or progress[rank] < furthest:
                missing.append(rank)
            lines.append(line)
        who = f"waiting for rank {', '.join(map(str, missing))}" if missing else "all ranks are in the same place"
        return "\n".join(
            [
                f"the run hangs: no progress for {self.timeout_s:g} s (training.hang_timeout_s), {who}",
                *lines,
                f"  Checkpoints are untouched; to continue from the last one, {resume_with(self.folder.parent)}",
            ]
        )

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            note: dict[str, Any] = {"place": "", "waits": False} | read_object(self._path(rank), 1 << 16)
            return {
                "count": int(note["count"]), "step": int(note["step"]), "seconds": float(note["seconds"]),
                "at": float(note["at"]), "doing": str(note["doing"]), "place": str(note["place"]),
                "waits": bool(note["waits"]),
            }  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or another version's
            return None

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"
