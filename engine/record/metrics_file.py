"""metrics.jsonl, the record of a run: one JSON object a line, written whole, and read back bit for bit.

MetricsFile.open(path, resume_step)      to write
read_metrics(path)                       [{"step": 400, "split": "train", "loss": 0.125, "lr": 0.0001}]
position(progress, "tokens", 50)         {"time": 1767225600.0, "epoch": 8.0, "tokens_seen": 819200, ...}
is_position("tokens_seen")               True: it says where a run was, and not how it did
check_names(["seconds"], "MyTask.loss")  raises ConfigError: a metric has a name of those
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.reading import open_regular, parse_json
from trunkline.engine.progress import Progress

METRICS = "metrics.jsonl"
"""The name of the file in a run's folder."""
RESUMED, MEASURED_BEFORE = "resumed", "measured_before"
"""The split of the line that a resume leaves: "from" which layout, or which file of another program, "to" which layout
and, where the run follows another schedule from there on, "lr_before" and "lr_after". Where evaluations measure
otherwise from there on, "measured_before" says in what those before differ."""
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def position(progress: Progress, unit: str, steps_per_epoch: int) -> dict[str, float]:
    """Where a run is, beside its step, as each of its lines says it.

    time: now, in seconds since 1970
    epoch: how often the data set was seen, in parts of its steps
    <unit>_seen, samples_seen: without fillers, skipped steps too. `unit` is what a weight counts, in the plural
    seconds: in the steps so far, without evaluations and saves; as the two before, it continues over resumes

    What the run did not count is left out: see Progress.seconds.
    """
    at = {"time": round(time.time(), 3), "epoch": progress.step / steps_per_epoch}
    samples, weight, seconds = progress.samples_seen, progress.weight_seen, progress.seconds
    if samples is not None and weight is not None and seconds is not None:
        at[f"{unit}_seen"] = int(weight) if weight.is_integer() else weight
        at |= {"samples_seen": samples, "seconds": round(seconds, 3)}
    return at


def is_position(key: str) -> bool:
    """Whether a line's entry says where the run was."""
    return key in ("step", "split", "time", "epoch", "seconds") or key.endswith("_seen")


def check_names(names: Iterable[str], source: str) -> None:
    """Raise ConfigError if a metric of `source`, such as "MyTask.loss", has a name that a line needs for itself."""
    for name in names:
        if is_position(name) or name == "nonfinite":
            raise ConfigError(
                f"{source}: a metric is named {name!r}, which each line of metrics.jsonl needs for itself: rename it"
            )


class MetricsFile:
    """metrics.jsonl: one strict JSON object a line, {"step": ..., "split": ..., <name>: <value>, ...}, flushed at once.

    JSON knows no NaN and no infinity: such a value is null, and stands by name in the line's further entry
    "nonfinite", as {"loss": "nan"}. `read_metrics` puts it back.
    """

    name = METRICS

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

    def log(
        self, step: int, split: str, values: Mapping[str, float], at: Mapping[str, float | str] | None = None
    ) -> None:
        """Append one line, whole or not at all; `at` stands before the values, as it is. Raises OSError."""
        line: dict[str, Any] = {"step": step, "split": split, **(at or {})}
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
    rows = [row for row in _rows(path) if row is not None]
    for row in rows:
        row |= {key: float(value) for key, value in row.pop("nonfinite", {}).items()}
    return rows


def damaged_lines(path: Path) -> int:
    """How many lines `read_metrics` leaves out."""
    return sum(row is None for row in _rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as lines:
        yield from map(_parse, lines)


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
