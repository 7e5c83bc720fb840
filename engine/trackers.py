"""Where a run's numbers go: metrics.jsonl always, TensorBoard, Weights & Biases and MLflow as asked for.

    trackers = make_trackers(("tensorboard",), folder, config, resume_step=0)
    trackers.log(400, "train", {"loss": 0.125, "lr": 1e-4})
    trackers.close()

    read_metrics(folder / "metrics.jsonl")   -> [{"step": 400, "split": "train", "loss": 0.125, "lr": 0.0001}]

A tracker never stops a run: one that fails is dropped with one warning. Only a tracker that was asked for and is not
installed is an error, at the start.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from engine.errors import ConfigError
from engine.reading import open_regular, parse_json, read_whole


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
        self.active = list(trackers)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Hand the values to every tracker that still works."""
        for tracker in tuple(self.active):
            self._guard(tracker, lambda tracker=tracker: tracker.log(step, split, values))  # type: ignore[misc]

    def close(self) -> None:
        """Close every tracker that still works."""
        for tracker in tuple(self.active):
            self._guard(tracker, tracker.close)
        self.active.clear()

    def _guard(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker's library raises, the run is worth more
            self.active.remove(tracker)
            _warn(tracker.name, error)


def make_trackers(
    names: Sequence[str], folder: Path, config: dict[str, Any], resume_step: int = 0, is_main: bool = True
) -> Trackers:
    """metrics.jsonl in the run's `folder` and the trackers named. Ranks other than the main one track nothing.

    Args:
        names: any of "tensorboard", "wandb", "mlflow".
        config: the configuration of record, handed to the trackers that keep one.
        resume_step: the step that the run starts from; what was logged after it is withdrawn where that can be done.

    Raises:
        ConfigError: a tracker's package is not installed, or metrics.jsonl cannot be written.
    """
    if not is_main:
        return Trackers()
    require_trackers(names)
    trackers: list[Tracker] = [MetricsFile.open(folder / "metrics.jsonl", resume_step)]
    for name in names:
        try:
            trackers.append(_KINDS[name][2](folder, config, resume_step))
        except Exception as error:  # no account, no server, no network
            _warn(name, error)
    return Trackers(trackers)


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
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def open(cls, path: Path, resume_step: int = 0) -> MetricsFile:
        """The file at `path`, without lines of steps after `resume_step` and without a line torn by a kill."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                open_regular(path).close()  # before a named pipe makes the writer wait
                _withdraw_after(path, resume_step)
            return cls(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output-dir") from error

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append one line."""
        line: dict[str, Any] = {"step": step, "split": split}
        nonfinite = {}
        for key, value in values.items():
            if math.isfinite(value):
                line[key] = value if isinstance(value, int) else float(value)
            else:
                line[key], nonfinite[key] = None, str(float(value))
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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


def _withdraw_after(path: Path, step: int) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with path.open(encoding="utf-8", errors="replace") as lines, draft.open("w", encoding="utf-8") as kept:
        for line in lines:
            row = _parse(line)
            if row is not None and row["step"] <= step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    draft.replace(path)


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


def _warn(name: str, error: Exception) -> None:
    tqdm.write(f"warning: {name} fails ({type(error).__name__}: {error}); going on without it", file=sys.stderr)
