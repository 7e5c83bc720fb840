"""What a run has left to read: metrics.jsonl, config.json and plan.json, as far as they can be read.

run = read_history(Path("runs/fluid-demo"))     never fails; run.problems has a line for each file that is not whole
run.series("val", "rmse"), run.best_step, run.resumes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trunkline.engine.machine.reading import read_object, reason
from trunkline.engine.record.metrics_file import (
    MEASURED_BEFORE,
    METRICS,
    RESUMED,
    damaged_lines,
    is_position,
    read_metrics,
)


@dataclass(frozen=True)
class Series:
    """Finite values and the steps that they belong to, in order of steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Resume:
    """Where a run was resumed, and from which layout to which. `rates`: of the schedule before and of the present one
    there, if they differ."""

    step: int
    before: str
    after: str
    rates: tuple[float, float] | None


@dataclass(frozen=True)
class History:
    """A run's lines in order of steps, its configuration of record and its plan; empty where there is none."""

    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def series(self, split: str, key: str) -> Series:
        """The finite values of `key` and their steps."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get("split") == split and is_number(row.get(key))]
        return Series([step for step, _ in pairs], [float(value) for _, value in pairs])

    def keys(self, split: str) -> list[str]:
        """Names of everything that was measured on a split, in order of appearance."""
        names = dict.fromkeys(key for row in self.rows if row.get("split") == split for key in row)
        return [name for name in names if not is_position(name)]

    def last(self, key: str) -> float | None:
        """The last value of a line's entry, whatever the split."""
        return next((row[key] for row in reversed(self.rows) if is_number(row.get(key))), None)

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the validation split."""
        return [row for row in self.rows if row.get("split") == "val"]

    @cached_property
    def steps(self) -> int:
        """The last step that is known of; 0 if none is. Lines of metrics.jsonl may have been lost."""
        names = (path.name.removeprefix("step-") for path in (self.folder / "checkpoints").glob("step-*"))
        saved = max((int(name) for name in names if name.isdecimal()), default=0)
        return max([saved, *(row["step"] for row in self.rows)])

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run was to make."""
        return self.plan["steps"] if is_number(self.plan.get("steps")) else None

    @property
    def metric_units(self) -> dict[str, str]:
        """As the task says them: Task.metric_units."""
        units = self.plan.get("metric_units")
        return {key: str(unit) for key, unit in units.items()} if isinstance(units, dict) else {}

    @property
    def validation_loss(self) -> str:
        """How it is another quantity than the training loss; empty where both are one."""
        return str(self.plan.get("validation_loss") or "")

    @property
    def workload(self) -> str:
        """Its name."""
        return str(self.config.get("workload", "unknown workload"))

    @cached_property
    def decides(self) -> str:
        """The metric by which the best weights are chosen."""
        return str(self._best.get("metric", "loss"))

    @cached_property
    def best_step(self) -> int | None:
        """The step of its best value, of those that were measured as the last one was, if there are any."""
        sign = -1 if self._best.get("mode") == "max" else 1
        values = [(row[self.decides], row["step"]) for row in self._alike[1] if is_number(row.get(self.decides))]
        return min(((sign * value, step) for value, step in values), default=(0, None))[1]

    @property
    def measured_before(self) -> str:
        """From where on evaluations are measured as the last one, and how they were just before; empty if all are."""
        if not (resume := self._alike[0]):
            return ""
        before = resume[MEASURED_BEFORE]
        return f"after step {resume['step']:,} evaluations are measured in another way (just before: {before})"

    @cached_property
    def _alike(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The line of the last resume between evaluations that changed how they are measured, and those after it."""
        changed: dict[str, Any] = {}
        evaluations: list[dict[str, Any]] = []
        resumes: dict[int, dict[str, Any]] = {}  # since the last evaluation; of those at one step the last is in force
        for row in self.rows:
            if row.get("split") == RESUMED:
                resumes[row["step"]] = row
            elif row.get("split") == "val":
                changes = [resume for resume in resumes.values() if MEASURED_BEFORE in resume]
                if changes and evaluations:  # those of the run that a new folder resumes are not its own
                    changed, evaluations = changes[-1], []
                evaluations.append(row)
                resumes = {}
        return changed, evaluations

    @property
    def best_evaluation(self) -> dict[str, Any]:
        """The line of the best step, or else the last one; of a run with evaluations."""
        return next((row for row in self.evaluations if row["step"] == self.best_step), self.evaluations[-1])

    @property
    def _best(self) -> dict[str, Any]:
        training = self.config.get("training")
        best = training.get("best") if isinstance(training, dict) else None
        return best if isinstance(best, dict) else {}

    @cached_property
    def resumes(self) -> list[Resume]:
        """Every resume that is on the run's way, in order."""
        return [
            Resume(row["step"], str(row.get("from", "?")), str(row.get("to", "?")), _rates(row))
            for row in self.rows
            if row.get("split") == RESUMED
        ]

    @cached_property
    def training_seconds(self) -> float | None:
        """In the steps alone; None where nothing was logged."""
        if (counted := self.last("seconds")) is not None:
            return counted
        times = self.series("train", "step_time_s")  # of a run that did not count
        spans = [after - before for before, after in zip([0, *times.steps], times.steps, strict=False)]
        return sum(map(float.__mul__, times.values, map(float, spans))) if spans else None

    def seen(self) -> dict[str, float]:
        """How much the run has seen: {"epochs": 2.5, "samples": 1280, "tokens": 163840}, as far as it counted."""
        keys = dict.fromkeys(key for row in self.rows for key in row if key.endswith("_seen"))
        found = {"epochs": self.last("epoch")}
        found |= {key.removesuffix("_seen"): self.last(key) for key in sorted(keys, key="samples_seen".__ne__)}
        return {name: value for name, value in found.items() if value is not None}

    @cached_property
    def rates(self) -> dict[str, str]:
        """Throughput in samples, then in the task's own unit: {"samples_per_s": "samples/s", ...}."""
        found = [key for key in self.keys("train") if key.endswith("_per_s")]
        found.sort(key=lambda key: (key != "samples_per_s", key))
        return {key: f"{key.removesuffix('_per_s').replace('_', ' ')}/s" for key in found}

    def throughput(self) -> str:
        """The medians, in words."""
        measured = {unit: self.series("train", key).values for key, unit in self.rates.items()}
        return ", ".join(f"{median(values):,.4g} {unit}" for unit, values in measured.items() if values)


def read_history(folder: Path) -> History:
    """A run as far as it can be read."""
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    path = folder / METRICS
    try:
        rows = sorted(read_metrics(path), key=lambda row: row["step"])
        if damaged := damaged_lines(path):
            problems.append(f"{path}: {damaged} of its lines cannot be read and are left out")
    except OSError as error:
        problems.append(f"{path}: cannot be read ({reason(error)}): nothing is known of its steps")
    config, plan = (_object(folder / name, problems) for name in ("config.json", "plan.json"))
    return History(folder, rows, config, plan, problems)


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read ({reason(error)}): what it says is left out")
        return {}


def _rates(row: dict[str, Any]) -> tuple[float, float] | None:
    before, after = row.get("lr_before"), row.get("lr_after")
    return (float(before), float(after)) if is_number(before) and is_number(after) else None  # type: ignore[arg-type]


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def median(values: Sequence[float]) -> float:
    """The upper one of two."""
    return sorted(values)[len(values) // 2]


def duration(seconds: float) -> str:
    """Such as "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"
