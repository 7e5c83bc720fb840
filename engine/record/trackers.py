"""Where a run's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow as asked for.

    trackers = make_trackers(("tensorboard",), folder, config, resume_step=0)
    trackers.log(400, "train", {"loss": 0.125, "lr": 1e-4})
    trackers.best(400, {"loss": 0.5})              once more, as "best/loss", where it is the best so far
    trackers.keep(400, folder / "shown")           files, pictures, texts
    trackers.finish(400)                           what the task wants to have kept of the whole run
    trackers.close()

A tracker never stops a run. One that fails, at its start or later, is warned about once; what it did not take is kept
and handed over, in order, when it works again: a server that is away or a disk that is full for an hour costs no row.
Only a tracker that was asked for and is not installed is an error, at the start.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trunkline.engine.machine.log import LOG
from trunkline.engine.record.boards import Board, ShownRun, open_board, require_boards
from trunkline.engine.record.metrics_file import METRICS, MetricsFile, read_metrics
from trunkline.engine.tracking import Tracking

_ROWS_KEPT = 100_000
_SOON_S = 0.1  # a tracker that fails sooner is asked at every row
_SHARE_OF_TIME = 0.05  # of a run, at most, is spent on one that takes longer
At = Mapping[str, float | str]


class Tracker(Protocol):
    """One place that numbers go to."""

    name: str

    def log(self, step: int, split: str, values: Mapping[str, float], at: At) -> None:
        """Take the `values` of a step. `split` says what they were measured on: "train", "val"; `at` where the run is,
        beside its step."""

    def close(self) -> None:
        """Write out what is still held back."""


class Trackers:
    """Several trackers as one, none of which can stop the run."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._queues = [_Queue(tracker.name, lambda tracker=tracker: tracker) for tracker in trackers]  # type: ignore[misc]

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """One more tracker. If it cannot be made now, that is tried again."""
        self._queues.append(_Queue(name, make))

    def log(self, step: int, split: str, values: Mapping[str, float], at: At | None = None) -> None:
        """Hand the values to every tracker that works, and keep them for the others."""
        self._hand("log", step, split, dict(values), dict(at or {}))

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Say what the best evaluation so far has measured, to those that show runs."""
        self._hand("best", step, dict(metrics))

    def keep(self, step: int, folder: Path) -> None:
        """Hand over the files of a folder, to those that show runs."""
        self._hand("keep", step, folder)

    def finish(self, best_step: int) -> None:
        """Hand over what the task wants to have kept of the run, whose best evaluation was at this step."""
        self._hand("finish", best_step)

    def _hand(self, call: str, *arguments: Any) -> None:
        for queue in self._queues:
            queue.calls.append((call, arguments))
            queue.hand_over()

    def close(self) -> None:
        """Hand over what was kept, and close the trackers."""
        for queue in self._queues:
            queue.close()
        self._queues.clear()

    @property
    def active(self) -> list[Tracker]:
        """The trackers that could be made."""
        return [queue.tracker for queue in self._queues if queue.tracker is not None]


class _Queue:
    """The calls that a tracker has not taken yet. One whose calls fail slowly is not asked at every row."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self._make = name, make
        self.tracker: Tracker | None = None
        self.calls: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=_ROWS_KEPT)
        self._not_before = 0.0
        self._warned = False
        self.hand_over()

    def hand_over(self, now: bool = False) -> None:
        """Give the tracker what it has not taken, if it is worth trying."""
        began = time.monotonic()
        if began < self._not_before and not now:
            return
        try:
            if self.tracker is None:
                self.tracker = self._make()
            while self.calls:
                call, arguments = self.calls[0]
                try:
                    if take := getattr(self.tracker, call, None):  # metrics.jsonl takes rows alone
                        take(*arguments)
                except Exception as error:
                    if call != "keep" and not isinstance(error, TypeError | ValueError):
                        raise
                    # the row's fault, or a file's: it would stand in the way of all others
                    what = "row" if call == "log" else call
                    _warn(f"{self.name} cannot take the {what} of step {arguments[0]} ({error}); it is left out")
                self.calls.popleft()
        except Exception as error:  # whatever a tracker's library raises, the run is worth more
            ended = time.monotonic()
            if ended - began > _SOON_S:
                self._not_before = ended + (ended - began) / _SHARE_OF_TIME
            if not self._warned:
                _warn(f"{self.name} fails ({type(error).__name__}: {error}); what it does not take is tried again")
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        self.hand_over(now=True)
        if self.calls:
            _warn(f"{self.name} did not take the last {len(self.calls)} rows")
        if self.tracker is not None:
            try:
                self.tracker.close()
            except Exception as error:
                _warn(f"{self.name} fails to close ({type(error).__name__}: {error})")


class Shown:
    """A program that shows the run, as the task wants it shown."""

    def __init__(self, board: Board, run: ShownRun, steps_per_epoch: int) -> None:
        self.name, self.board, self.run, self._steps_per_epoch = board.name, board, run, steps_per_epoch

    def log(self, step: int, split: str, values: Mapping[str, float], at: At | None = None) -> None:
        """Show the values under the task's names, over its axis. The program knows where the run is in its own way."""
        tags = {self.run.tracking.tag(split, name): value for name, value in values.items()}
        if named := {tag: value for tag, value in tags.items() if tag is not None}:
            self.board.put(self._position(step), named)

    def best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show them as those of the best evaluation."""
        self.log(step, "best", {**metrics, "epoch": max(0, step - 1) // self._steps_per_epoch})

    def keep(self, step: int, path: Path) -> None:
        """Hand over a file, or all files of a folder, by their places in the run's folder."""
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                self.board.keep(self._position(step), file, file.relative_to(self.run.folder).as_posix())

    def finish(self, best_step: int) -> None:
        """Show the final values, and hand over the artifacts."""
        tracking = self.run.tracking
        rows = [row for row in read_metrics(self.run.folder / METRICS) if row["split"] == "val"]
        row = next((row for row in reversed(rows) if row["step"] == best_step), rows[-1] if rows else {})
        if values := {tag: row[name] for name, tag in tracking.final.items() if name in row}:
            self.board.put(self._position(rows[-1]["step"]), values)
        stay = self.run.config.get("training", {}).get("tracked", {}).get("leave_out", ())
        for place in (place for place in tracking.artifacts if place not in stay):
            self.keep(rows[-1]["step"] if rows else best_step, self.run.folder / place)

    def _position(self, step: int) -> int:
        return self.run.tracking.position(step, self._steps_per_epoch)

    def close(self) -> None:
        """Let the program write out what it holds back."""
        self.board.close()


def make_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resume_step: int = 0, is_main: bool = True,
    evaluation_due: bool = False, tracking: Tracking | None = None, steps_per_epoch: int = 1,
) -> Trackers:  # fmt: skip
    """metrics.jsonl in the run's `folder` and the trackers named. Ranks other than the main one track nothing.

    Args:
        names: any of "tensorboard", "wandb", "mlflow".
        config: the configuration of record, handed to the trackers that keep one.
        resume_step: the step that the run starts from; what was logged after it is withdrawn where that can be done.
        evaluation_due: the evaluation of that step is to be made again.
        tracking: how the task wants to be shown.
        steps_per_epoch: optimizer steps an epoch.

    Raises:
        ConfigError: a tracker's package is not installed, or metrics.jsonl cannot be written.
    """
    if not is_main:
        return Trackers()
    require_boards(names)
    trackers = Trackers([MetricsFile.open(folder / METRICS, resume_step, evaluation_due)])
    tracking = tracking or Tracking()
    run = ShownRun(folder, config, tracking, tracking.position(resume_step + 1, steps_per_epoch), resume_step > 0)
    for name in names:
        trackers.add(name, partial(_shown, name, run, steps_per_epoch))
    return trackers


def _shown(name: str, run: ShownRun, steps_per_epoch: int) -> Tracker:
    return Shown(open_board(name, run), run, steps_per_epoch)


def _warn(line: str) -> None:
    LOG.warning(line)
