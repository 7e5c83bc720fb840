"""What a run did, for a person to read: <run>/report/.

    write_report(Path("runs/fluid-demo"))    -> runs/fluid-demo/report/summary.md
    python -m trunkline.engine.record.report runs/fluid-demo  the same, of a run that was stopped or is still going

Only metrics.jsonl, config.json and plan.json of the run's folder are read; what is missing is left out. What the task
shows of an evaluation, in shown/, is linked.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.machine.reading import read_object
from trunkline.engine.record.boards import PICTURES, SHOWN
from trunkline.engine.record.metric_panels import metric_panels
from trunkline.engine.record.metrics_file import read_metrics
from trunkline.engine.record.report_plots import Panel, Series, plot_panels
from trunkline.engine.record.tables import markdown

MAX_PANELS = 20


@dataclass(frozen=True)
class History:
    """A run's metrics by split, in order of steps."""

    rows: list[dict[str, Any]]

    def series(self, split: str, key: str) -> Series:
        """The finite values of `key` and their steps."""
        pairs = [(row["step"], row[key]) for row in self.rows if row.get("split") == split and _is_number(row.get(key))]
        return Series([step for step, _ in pairs], [float(value) for _, value in pairs])

    def keys(self, split: str) -> list[str]:
        """Names of everything that was logged for a split, in order of appearance."""
        names = dict.fromkeys(key for row in self.rows if row.get("split") == split for key in row)
        return [name for name in names if name not in ("step", "split")]

    @property
    def last_step(self) -> int:
        """The last step that anything was logged for; 0 if nothing was."""
        return max((row["step"] for row in self.rows), default=0)


def write_report(run_folder: Path) -> Path:
    """Draw and write <run_folder>/report/. Returns the summary's path.

    Raises:
        DataError: there is no metrics.jsonl in the folder. An empty or damaged one gives a report without curves.
    """
    metrics = run_folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{metrics}: not found; give the folder of a run")
    history = History(sorted(read_metrics(metrics), key=lambda row: row["step"]))
    config, plan = _read(run_folder / "config.json"), _read(run_folder / "plan.json")
    report = run_folder / "report"
    try:
        report.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{report}: cannot be made ({error.strerror}); move away what is there") from error
    panels = metric_panels({key: history.series("val", key) for key in history.keys("val") if key != "loss"})
    pictures = _draw(history, config, report, panels[:MAX_PANELS])
    summary = report / "summary.md"
    text = _summary(run_folder, history, config, plan, pictures, len(panels))
    replace_whole(summary, text)
    return summary


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _best(history: History, config: dict[str, Any]) -> tuple[str, Series, int | None]:
    """Name of the metric that decides, its values, and the step of its best value, if it was ever measured."""
    training = config.get("training")
    best = training.get("best") if isinstance(training, dict) else None
    best = best if isinstance(best, dict) else {}
    name, sign = str(best.get("metric", "loss")), -1 if best.get("mode") == "max" else 1
    series = history.series("val", name)
    order = sorted(zip(series.values, series.steps, strict=True), key=lambda pair: (sign * pair[0], pair[1]))
    return name, series, order[0][1] if order else None


def _draw(history: History, config: dict[str, Any], report: Path, metrics: list[Panel]) -> list[str]:
    """Draw what there is to draw. Returns the names of the files written."""
    name, deciding, best_step = _best(history, config)
    skipped = history.series("skipped", "skipped_steps").steps

    def training(title: str, key: str, smoothed: bool = False, from_zero: bool = False) -> Panel:
        return Panel(title, {"train": history.series("train", key)}, smoothed, from_zero)

    loss = {"train": history.series("train", "loss"), "validation": history.series("val", "loss")}
    pictures = {
        "loss.png": [Panel("loss", loss, smoothed=True)]
        + ([] if name == "loss" else [Panel(f"{name} on validation", {"validation": deciding})]),
        "metrics.png": metrics,
        "learning_rate.png": [training("learning rate", "lr")],
        "gradient_norm.png": [training("gradient norm before clipping", "grad_norm", smoothed=True)],
        "throughput.png": [
            *(training(_rate(key), key, smoothed=True, from_zero=True) for key in _rates(history)),
            training("share of the device's peak", "mfu", from_zero=True),
            training("memory of rank 0 (GiB)", "host_memory_gib", from_zero=True),
            training("memory of its GPU (GiB)", "gpu_memory_gib", from_zero=True),
        ],
    }
    return [
        file
        for file, panels in pictures.items()
        if plot_panels(
            report / file, panels, best_step=best_step, skipped_steps=() if file == "throughput.png" else skipped
        )
    ]


def _rates(history: History) -> list[str]:
    """Throughput in samples, then in the task's own unit: "samples_per_s", "tokens_per_s"."""
    found = [key for key in history.keys("train") if key.endswith("_per_s")]
    return sorted(found, key=lambda key: (key != "samples_per_s", key))


def _rate(key: str) -> str:
    return f"{key.removesuffix('_per_s').replace('_', ' ')}/s"


def _summary(
    run_folder: Path,
    history: History,
    config: dict[str, Any],
    plan: dict[str, Any],
    pictures: Sequence[str],
    panels: int,
) -> str:
    workload = config.get("workload", "unknown workload")
    facts = _facts(history, config, plan, _saved_step(run_folder))
    parts = [f"# {workload}: {run_folder.resolve().name}", markdown([("", ""), *facts])]
    if not history.rows:
        parts.append("Nothing was logged: the run ended before its first line of metrics.jsonl.")
    parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures]
    if panels > MAX_PANELS:
        parts.append(
            f"Of {panels} panels of metrics the first {MAX_PANELS} are drawn; the table has the others' values."
        )
    if metrics := _metrics_table(history, config):
        parts += ["## Validation", metrics]
    shown = run_folder / SHOWN
    if there := sorted(path.name for path in shown.glob("*") if path.is_file() and not path.name.startswith(".")):
        parts += ["## Shown of the last evaluation"]
        parts += [f"![{Path(name).stem}](../{SHOWN}/{name})" for name in there if name.endswith(PICTURES)]
        parts += [f"[{name}](../{SHOWN}/{name})" for name in there if not name.endswith(PICTURES)]
    if config:
        parts += ["## Configuration of record", f"```json\n{json.dumps(config, indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def _saved_step(run_folder: Path) -> int:
    """The step of the run's newest checkpoint; 0 if there is none."""
    steps = (path.name.removeprefix("step-") for path in (run_folder / "checkpoints").glob("step-*"))
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def _facts(history: History, config: dict[str, Any], plan: dict[str, Any], saved_step: int) -> list[tuple[str, str]]:
    name, deciding, best_step = _best(history, config)
    facts = []
    if _is_number(plan.get("parameters")):
        facts.append(("parameters", f"{plan['parameters']:,}"))
    if _is_number(plan.get("world_size")):
        facts.append(("ranks", f"{plan['world_size']:,}"))
    planned = plan["steps"] if _is_number(plan.get("steps")) else None
    steps = max(history.last_step, saved_step)  # lines of metrics.jsonl may have been lost
    facts.append(("steps", f"{steps:,}" + (f" of {planned:,}" if planned else "")))
    if best_step is not None:
        value = deciding.values[deciding.steps.index(best_step)]
        facts.append((f"best validation {name}", f"{value:.6g} at step {best_step:,}"))
    if (loss := history.series("train", "loss")).values:
        facts.append(("last training loss", f"{loss.values[-1]:.6g}"))
    skipped = history.series("skipped", "skipped_steps")
    facts.append(("skipped steps", f"{skipped.values[-1]:.0f}" if skipped.values else "0"))
    times = history.series("train", "step_time_s")
    if times.values:
        intervals = [after - before for before, after in zip([0, *times.steps], times.steps, strict=False)]
        total = sum(seconds * steps for seconds, steps in zip(times.values, intervals, strict=True))
        facts.append(("time in training steps", f"{_duration(total)} (evaluations and saves not counted)"))
        facts.append(("time a step, median", f"{_median(times.values) * 1e3:.4g} ms"))
    if rates := {key: history.series("train", key).values for key in _rates(history)}:
        shown = (f"{_median(values):,.4g} {_rate(key)}" for key, values in rates.items() if values)
        facts.append(("throughput, median", ", ".join(shown)))
    if (mfu := history.series("train", "mfu")).values:
        facts.append(("share of the device's peak, median", f"{_median(mfu.values):.1%}"))
    for label, key in (("memory of rank 0, most", "host_memory_gib"), ("memory of its GPU, most", "gpu_memory_gib")):
        if (memory := history.series("train", key)).values:
            facts.append((label, f"{max(memory.values):.3g} GiB"))
    return facts


def _metrics_table(history: History, config: dict[str, Any]) -> str:
    """Every validation metric at the best and at the last evaluation."""
    evaluations = [row for row in history.rows if row.get("split") == "val"]
    if not evaluations:
        return ""
    best_step = _best(history, config)[2]
    last = evaluations[-1]
    best = next((row for row in evaluations if row["step"] == best_step), last)
    header = ("metric", f"best, step {best['step']:,}", f"last, step {last['step']:,}")
    return markdown([header, *((key, _show(best.get(key)), _show(last.get(key))) for key in history.keys("val"))])


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else ""


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_report(Path(argument)))
