"""The programs that show a run: TensorBoard, Weights & Biases, MLflow. Each takes values, files and an end.

Any call may raise whatever the program's library raises: `trunkline.engine.record.trackers` stands in front of them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trunkline.engine.config.json_object import nearest
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import read_whole
from trunkline.engine.tracking import Tracking

SHOWN = "shown"
"""The folder of a run for what the task shows of the last evaluation: pictures, texts, tables."""
PICTURES, TEXTS = (".png", ".jpg", ".jpeg"), (".txt", ".md")
_MOST_TEXT = 1 << 20


@dataclass(frozen=True)
class ShownRun:
    """What a board is told of a run at its start."""

    folder: Path
    config: dict[str, Any]
    tracking: Tracking
    resume_at: int
    """Where on the axis the first value will stand."""
    resumed: bool
    """Whether the run continues from a checkpoint."""

    def remembered(self, name: str) -> str | None:
        """The id that the program knows a resumed run by, from a file of the run's folder."""
        path = self.folder / name
        return read_whole(path, 1 << 10).decode().strip() if self.resumed and path.exists() else None

    def asked(self, what: str) -> str | None:
        """What the configuration says of "experiment", "run" or "uri"."""
        return self.config.get("training", {}).get("tracked", {}).get(what)

    def called(self, what: str, variable: str, otherwise: str) -> str:
        """The "experiment" or "run" that is asked for, else what the environment or the task calls it."""
        return self.asked(what) or os.environ.get(variable) or getattr(self.tracking, what) or otherwise

    def name(self, variable: str) -> str:
        """What the run is called."""
        return self.called("run", variable, self.folder.resolve().name)


class Board(Protocol):
    """One program that shows runs."""

    name: str

    def put(self, position: int, values: Mapping[str, float]) -> None:
        """Show values, by their full names, at a position of the axis."""

    def keep(self, position: int, path: Path, place: str) -> None:
        """Take a file that is there under the name `place`, such as "shown/confusion.png"."""

    def close(self) -> None:
        """Write out what is still held back."""


class TensorBoard:
    """Event files in <run>/tensorboard: scalars, pictures and texts. Of other files it takes none."""

    name = "tensorboard"

    def __init__(self, run: ShownRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier process logged from purge_step on
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resume_at)

    def put(self, position: int, values: Mapping[str, float]) -> None:
        """Add one scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, position)

    def keep(self, position: int, path: Path, place: str) -> None:
        """Add a picture or a text."""
        if path.suffix in PICTURES:
            import numpy as np
            from matplotlib.image import imread

            self._writer.add_image(place, np.atleast_3d(imread(path)), position, dataformats="HWC")
        elif path.suffix in TEXTS:
            text = read_whole(path, _MOST_TEXT).decode(errors="replace")
            self._writer.add_text(place, text if path.suffix == ".md" else f"```\n{text}\n```", position)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run, continued under the same id on resume. Its own environment variables hold."""

    name = "wandb"

    def __init__(self, run: ShownRun) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=run.called("experiment", "WANDB_PROJECT", "trunkline"),
            name=run.name("WANDB_NAME"),
            id=run.remembered(".wandb_run"),
            resume="allow",
            dir=str(run.folder),
            config=run.config,
        )
        (run.folder / ".wandb_run").write_text(self._run.id)

    def put(self, position: int, values: Mapping[str, float]) -> None:
        """Add one point a value."""
        self._run.log(dict(values), step=position)

    def keep(self, position: int, path: Path, place: str) -> None:
        """Show a picture; upload any other file as an artifact."""
        if path.suffix in PICTURES:
            self._run.log({place: self._wandb.Image(str(path))}, step=position)
        else:
            artifact = self._wandb.Artifact(re.sub(r"[^\w.-]", "_", f"{self._run.id}-{place}"), type="file")
            artifact.add_file(str(path), name=place)
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """An MLflow run, continued under the same id on resume. Where: training.tracked.uri, else MLFLOW_TRACKING_URI, else
    MLflow's default."""

    name = "mlflow"
    _PARAMS_A_CALL = 100

    def __init__(self, run: ShownRun) -> None:
        import mlflow
        from mlflow.entities import Param
        from mlflow.tracking.context.registry import resolve_tags

        # not mlflow.start_run: what that leaves in the process and its environment would decide for a later run
        self._client = mlflow.MlflowClient(run.asked("uri"))
        known = run.remembered(".mlflow_run")
        if known is None:
            name, experiment = run.name("MLFLOW_RUN_NAME"), self._experiment(run)
            self._run_id = self._client.create_run(experiment, run_name=name, tags=resolve_tags()).info.run_id
            settings = [Param(key, value) for key, value in _flat(run.config).items()]
            for start in range(0, len(settings), self._PARAMS_A_CALL):
                self._client.log_batch(self._run_id, params=settings[start : start + self._PARAMS_A_CALL])
        else:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
        (run.folder / ".mlflow_run").write_text(self._run_id)

    def _experiment(self, run: ShownRun) -> str:
        known = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if known and not run.asked("experiment"):
            return known
        name = run.called("experiment", "MLFLOW_EXPERIMENT_NAME", f"trunkline-{run.config.get('workload', 'run')}")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def put(self, position: int, values: Mapping[str, float]) -> None:
        """Add one point a value. What MLflow has no place for in a name, such as "&", becomes "_". Of names that are
        written alike then, what was changed in them gets a mark. A slash after another name becomes a point."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        named = written_apart(values)
        metrics = [Metric(written, float(values[name]), now, position) for name, written in named.items()]
        self._client.log_batch(self._run_id, metrics)

    def keep(self, position: int, path: Path, place: str) -> None:
        """Upload a file as an artifact of the run."""
        folder = str(Path(place).parent)
        self._client.log_artifact(self._run_id, str(path), None if folder == "." else folder)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run_id)


def written_apart(names: Iterable[str]) -> dict[str, str]:
    """By name, what MLflow can write for it: something else for each."""
    every = set(names)
    written = {name: _writable(_beside(name, every)) for name in every}
    alike = Counter(written.values())
    return {
        name: found if alike[found] == 1 else "/".join(map(_marked, name.split("/"))) for name, found in written.items()
    }


def _beside(name: str, names: set[str]) -> str:
    """ "val/mse.B" for "val/mse/B" where "val/mse" is a name too: in a store of files it is a file, and no folder."""
    for slash in re.finditer("/", name):
        if name[: slash.start()] in names:
            return name[: slash.start()] + name[slash.start() :].replace("/", ".")
    return name


def _writable(name: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", name)


def _marked(part: str) -> str:
    mark = hashlib.sha256(part.encode()).hexdigest()[:6]
    return part if part == _writable(part) else f"{_writable(part)}-{mark}"


# name -> the module to import, what to install, the class
_KINDS: dict[str, tuple[str, str, Callable[[ShownRun], Board]]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard", TensorBoard),
    "wandb": ("wandb", "trunkline[wandb]", WeightsAndBiases),
    "mlflow": ("mlflow", "trunkline[mlflow]", MLflow),
}


def open_board(name: str, run: ShownRun) -> Board:
    """The program of this name, ready to show the run."""
    return _KINDS[name][2](run)


def require_boards(names: Sequence[str]) -> None:
    """Raise ConfigError if one of these programs is unknown or not installed."""
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


def unused_settings(config: RunConfig, tracking: Tracking) -> list[str]:
    """Lines about what training.tracked asks of programs that do not show the run; a run's name is its folder's too.

    Raises ConfigError for a name in leave_out of which the task has no file.
    """
    asked, trackers, lines = config.training.tracked, config.training.trackers, []
    for name in asked.leave_out:
        if name not in tracking.artifacts:
            raise ConfigError(
                f"training.tracked.leave_out: {name!r} is nothing that the task hands over"
                f"{nearest(name, tracking.artifacts)}"
            )
    for what, users in {"experiment": ("mlflow", "wandb"), "uri": ("mlflow",)}.items():
        value, key = getattr(asked, what), f"training.tracked.{what}"
        if value is not None and not set(users) & set(trackers):
            lines.append(
                f"{key} = {value} ({config.where(key)}) is of {' and '.join(users)}, and training.trackers names "
                f"{', '.join(trackers) or 'none'}: it is left out"
            )
    return lines


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for key, value in config.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return pairs
