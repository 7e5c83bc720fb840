"""Where a run's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow as asked for.

    trackers = make_trackers(("tensorboard",), folder, config, resume_step=0)
    trackers.log(400, "train", {"loss": 0.125, "lr": 1e-4})
    trackers.close()

    read_metrics(folder / "metrics.jsonl")   -> [{"step": 400, "split": "train", "loss": 0.125, "lr": 0.0001}]

A tracker never stops a run. One that fails, at its start or later, is warned about once; its rows are kept and handed
over, in order, when it works again: a server that is away or a disk that is full for an hour costs no row. Only a
tracker that was asked for and is not installed is an error, at the start.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.reading import open_regular, parse_json, read_whole

_ROWS_KEPT = 100_000
_SOON_S = 0.1  # a tracker that fails sooner is asked at every row
_SHARE_OF_TIME = 0.05  # of a run, at most, is spent on one that takes longer
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Tracker(Protocol):
    """One place that numbers go to."""

    name: str

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Take the `values` of a step. `split` says what they were measured on: "train", "val"."""

    def close(self) -> None:
        """Write out what is still held back."""


class Trackers:
    """Several trackers as one, none of which can stop the run."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._queues = [_Queue(tracker.name, lambda tracker=tracker: tracker) for tracker in trackers]  # type: ignore[misc]

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """One more tracker. If it cannot be made now, that is tried again."""
        self._queues.append(_Queue(name, make))

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Hand the values to every tracker that works, and keep them for the others."""
        for queue in self._queues:
            queue.rows.append((step, split, dict(values)))
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
    """The rows that a tracker has not taken yet. One whose calls fail slowly is not asked at every row."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name, self._make = name, make
        self.tracker: Tracker | None = None
        self.rows: deque[tuple[int, str, Mapping[str, float]]] = deque(maxlen=_ROWS_KEPT)
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
            while self.rows:
                try:
                    self.tracker.log(*self.rows[0])
                except (TypeError, ValueError) as error:  # the row's fault: it would stand in the way of all others
                    _warn(f"{self.name} cannot take the row of step {self.rows[0][0]} ({error}); it is left out")
                self.rows.popleft()
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
        if self.rows:
            _warn(f"{self.name} did not take the last {len(self.rows)} rows")
        if self.tracker is not None:
            try:
                self.tracker.close()
            except Exception as error:
                _warn(f"{self.name} fails to close ({type(error).__name__}: {error})")


def make_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resume_step: int = 0, is_main: bool = True,
    evaluation_due: bool = False,
) -> Trackers:  # fmt: skip
    """metrics.jsonl in the run's `folder` and the trackers named. Ranks other than the main one track nothing.

    Args:
        names: any of "tensorboard", "wandb", "mlflow".
        config: the configuration of record, handed to the trackers that keep one.
        resume_step: the step that the run starts from; what was logged after it is withdrawn where that can be done.
        evaluation_due: the evaluation of that step is to be made again.

    Raises:
        ConfigError: a tracker's package is not installed, or metrics.jsonl cannot be written.
    """
    if not is_main:
        return Trackers()
    require_trackers(names)
    trackers = Trackers([MetricsFile.open(folder / "metrics.jsonl", resume_step, evaluation_due)])
    for name in names:
        trackers.add(name, partial(_KINDS[name][2], folder, config, resume_step))
    return trackers


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if one of these trackers is unknown or not installed."""
    for name in names:
        if name not in _KINDS:
            raise ConfigError(f"training.trackers: unknown tracker '{name}'; known are {', '.join(_KINDS)}")
        module, package, _ = _KINDS[name]
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"training.trackers: '{name}' cannot be imported ({error}); pip install '{package}', or take it out "
                "of training.trackers"
            ) from error


class MetricsFile:
    """metrics.jsonl: one strict JSON object a line, {"step": ..., "split": ..., <name>: <value>, ...}, flushed at once.

    JSON knows no NaN and no infinity: such a value is null, and stands by name in the line's further entry
    "nonfinite", as {"loss": "nan"}. `read_metrics` puts it back.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = os.open(path, _APPEND, 0o666)
        self._whole = os.fstat(self._descriptor).st_size

    @classmethod
    def open(cls, path: Path, resume_step: int = 0, evaluation_due: bool = False) -> MetricsFile:
        """The file at `path`, without lines of steps after `resume_step` and without a line torn by a kill.

        Without that step's evaluation too if it is due to be made again.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                open_regular(path).close()  # before a named pipe makes the writer wait
                _withdraw_after(path, resume_step, evaluation_due)
            return cls(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output-dir") from error

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one line, whole or not at all. Raises OSError."""
        line: dict[str, Any] = {"step": step, "split": split}
        nonfinite = {}
        for key, value in values.items():
            if math.isfinite(value):
                line[key] = value if isinstance(value, int) else float(value)
            else:
                line[key], nonfinite[key] = None, str(float(value))
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._append((json.dumps(line, allow_nan=False) + "\n").encode())

    def _append(self, line: bytes) -> None:
        try:
            if self._descriptor is None:  # after a failure: the file may be reachable again under another handle
                self._descriptor = os.open(self._path, _APPEND, 0o666)
                os.ftruncate(self._descriptor, min(self._whole, os.fstat(self._descriptor).st_size))
            rest = line
            while rest:  # a disk that is nearly full takes a part
                rest = rest[os.write(self._descriptor, rest) :]
            self._whole += len(line)
        except OSError:
            self.close()
            with suppress(OSError):
                os.truncate(self._path, self._whole)
            raise

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, NaN and infinities restored. A torn or damaged line is left out."""
    rows = []
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as lines:
        for line in lines:
            row = _parse(line)
            if row is not None:
                row |= {key: float(value) for key, value in row.pop("nonfinite", {}).items()}
                rows.append(row)
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not line.endswith("\n"):
        return None
    nonfinite = row.get("nonfinite", {})
    whole = isinstance(nonfinite, dict) and all(value in ("nan", "inf", "-inf") for value in nonfinite.values())
    return row if whole else None


def _withdraw_after(path: Path, step: int, evaluation_due: bool) -> None:
    def write(draft: Path) -> None:
        with path.open(encoding="utf-8", errors="replace") as lines, draft.open("w", encoding="utf-8") as kept:
            for line in lines:
                row = _parse(line)
                again = evaluation_due and row is not None and (row["step"], row.get("split")) == (step, "val")
                if row is not None and row["step"] <= step and not again:
                    kept.write(line)

    replace_whole(path, write)


class TensorBoard:
    """Event files in <run>/tensorboard, tags as "train/loss"."""

    name = "tensorboard"

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier process logged from purge_step on
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one scalar a value."""
        for key, value in values.items():
            self._writer.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, continued under the same id on resume. Its own environment variables hold."""

    name = "wandb"

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "trunkline"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=_remembered(folder / ".wandb_run", resume_step),
            resume="allow",
            dir=str(folder),
            config=config,
        )
        (folder / ".wandb_run").write_text(self._run.id)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one point a value."""
        self._run.log({f"{split}/{key}": value for key, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """An MLflow run, continued under the same id on resume. MLFLOW_TRACKING_URI says where; MLflow's default else."""

    name = "mlflow"
    _PARAMS_A_CALL = 100

    def __init__(self, folder: Path, config: dict[str, Any], resume_step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.keys() & {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"}:
            mlflow.set_experiment(f"trunkline-{config.get('workload', 'run')}")
        known = _remembered(folder / ".mlflow_run", resume_step)
        self._run_id = mlflow.start_run(run_id=known, run_name=folder.resolve().name).info.run_id
        (folder / ".mlflow_run").write_text(self._run_id)
        if known is None:
            settings = list(_flat(config).items())
            for start in range(0, len(settings), self._PARAMS_A_CALL):
                mlflow.log_params(dict(settings[start : start + self._PARAMS_A_CALL]))

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one point a value."""
        self._mlflow.log_metrics(
            {f"{split}/{key}": float(value) for key, value in values.items()}, step=step, run_id=self._run_id
        )

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


# name -> the module to import, what to install, the class
_KINDS: dict[str, tuple[str, str, Callable[[Path, dict[str, Any], int], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorBoard),
    "wandb": ("wandb", "trunkline[wandb]", WeightsAndBiases),
    "mlflow": ("mlflow", "trunkline[mlflow]", MLflow),
}


def _remembered(path: Path, resume_step: int) -> str | None:
    return read_whole(path, 1 << 10).decode().strip() if resume_step and path.exists() else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for key, value in config.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return pairs


def _warn(line: str) -> None:
    tqdm.write(f"warning: {line}", file=sys.stderr)
