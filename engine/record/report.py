"""What a run did, for a person to read: <run>/report/.

    write_report(Path("runs/fluid-demo"))    -> runs/fluid-demo/report/summary.md
    python -m trunkline.engine.record.report runs/fluid-demo  the same, of a run that was stopped or is still going

Only metrics.jsonl, config.json and plan.json of the run's folder are read; what is missing is left out. What the task
shows of an evaluation, in shown/, is linked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import replace_whole
from trunkline.engine.record.boards import PICTURES, SHOWN
from trunkline.engine.record.history import History, duration, is_number, median, read_history
from trunkline.engine.record.metric_panels import metric_panels
from trunkline.engine.record.metrics_file import METRICS
from trunkline.engine.record.report_plots import TRAIN, VALIDATION, Panel, plot_panels
from trunkline.engine.record.tables import amount, markdown

MAX_PANELS = 20
_KINDS = {"train": TRAIN, "validation": VALIDATION}


def write_report(run_folder: Path) -> Path:
    """Draw and write <run_folder>/report/. Returns the summary's path.

    Raises:
        DataError: there is no metrics.jsonl in the folder. An empty or damaged one gives a report without curves.
    """
    if not (run_folder / METRICS).is_file():
        raise DataError(f"{run_folder / METRICS}: not found; give the folder of a run")
    history = read_history(run_folder)
    report = run_folder / "report"
    try:
        report.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{report}: cannot be made ({error.strerror}); move away what is there") from error
    measured = {key: history.series("val", key) for key in history.keys("val") if key != "loss"}
    panels = metric_panels(measured, history.metric_units)
    pictures = _draw(history, report, panels[:MAX_PANELS])
    summary = report / "summary.md"
    replace_whole(summary, _summary(history, pictures, len(panels)))
    return summary


def _draw(history: History, report: Path, metrics: list[Panel]) -> list[str]:
    """Draw what there is to draw. Returns the names of the files written."""
    skipped = history.series("skipped", "skipped_steps").steps
    marks = {
        "resumed": [resume.step for resume in history.resumes if not resume.rates],
        "resumed with another schedule": [resume.step for resume in history.resumes if resume.rates],
    }

    def training(title: str, key: str, smoothed: bool = False, from_zero: bool = False) -> Panel:
        return Panel(title, {"train": history.series("train", key)}, smoothed, from_zero, _KINDS)

    pictures = {
        "loss.png": _losses(history),
        "metrics.png": metrics,
        "learning_rate.png": [training("learning rate", "lr")],
        "gradient_norm.png": [training("gradient norm before clipping", "grad_norm", smoothed=True)],
        "throughput.png": [
            *(training(unit, key, smoothed=True, from_zero=True) for key, unit in history.rates.items()),
            training("share of the device's peak", "mfu", from_zero=True),
            training("memory of rank 0 (GiB)", "host_memory_gib", from_zero=True),
            training("memory of its GPU (GiB)", "gpu_memory_gib", from_zero=True),
        ],
    }
    return [
        file
        for file, panels in pictures.items()
        if plot_panels(
            report / file, panels, best_step=history.best_step, marks=marks,
            skipped_steps=() if file == "throughput.png" else skipped,
        )
    ]  # fmt: skip


def _losses(history: History) -> list[Panel]:
    """Of training and validation, on one pair of axes where they are one quantity; and what the best weights go by."""
    train, val = history.series("train", "loss"), history.series("val", "loss")
    if differs := history.validation_loss:
        panels = [
            Panel("training loss", {"train": train}, smoothed=True, kinds=_KINDS),
            Panel(f"validation loss: {differs}", {"validation": val}, kinds=_KINDS),
        ]
    else:
        panels = [Panel("loss", {"train": train, "validation": val}, smoothed=True, kinds=_KINDS)]
    if (name := history.decides) != "loss":
        panels.append(Panel(f"{name} on validation", {"validation": history.series("val", name)}, kinds=_KINDS))
    return panels


def _summary(history: History, pictures: Sequence[str], panels: int) -> str:
    run_folder, config = history.folder, history.config
    parts = [f"# {history.workload}: {run_folder.resolve().name}", markdown([("", ""), *_facts(history)])]
    if not history.rows:
        parts.append("Nothing was logged: the run ended before its first line of metrics.jsonl.")
    parts += [f"![{Path(picture).stem.replace('_', ' ')}]({picture})" for picture in pictures]
    if panels > MAX_PANELS:
        parts.append(
            f"Of {panels} panels of metrics the first {MAX_PANELS} are drawn; the table has the others' values."
        )
    if metrics := _metrics_table(history):
        parts += ["## Validation", metrics]
    if history.resumes:
        parts += ["## Resumed", _resumes_table(history)]
    shown = run_folder / SHOWN
    if there := sorted(path.name for path in shown.glob("*") if path.is_file() and not path.name.startswith(".")):
        parts += ["## Shown of the last evaluation"]
        parts += [f"![{Path(name).stem}](../{SHOWN}/{name})" for name in there if name.endswith(PICTURES)]
        parts += [f"[{name}](../{SHOWN}/{name})" for name in there if not name.endswith(PICTURES)]
    if config:
        parts += ["## Configuration of record", f"```json\n{json.dumps(config, indent=2)}\n```"]
    return "\n\n".join(parts) + "\n"


def _resumes_table(history: History) -> str:
    """Where the run was resumed, on which layout, and where it left its schedule for another."""
    rows = [
        (f"{resume.step:,}", resume.before, "the same" if resume.after == resume.before else resume.after,
         f"{resume.rates[0]:.4g}, now {resume.rates[1]:.4g}: another schedule" if resume.rates else "its schedule's")
        for resume in history.resumes
    ]  # fmt: skip
    return markdown([("after step", "from", "to", "learning rate"), *rows])


def _facts(history: History) -> list[tuple[str, str]]:
    plan, planned, best_step = history.plan, history.planned_steps, history.best_step
    facts = []
    if is_number(plan.get("parameters")):
        facts.append(("parameters", f"{plan['parameters']:,}"))
    if is_number(plan.get("world_size")):
        facts.append(("ranks", f"{plan['world_size']:,}"))
    facts.append(("steps", f"{history.steps:,}" + (f" of {planned:,}" if planned else "")))
    facts += [(called, amount(value)) for called, value in history.seen().items()]
    if best_step is not None:
        deciding = history.series("val", history.decides)
        value = deciding.values[deciding.steps.index(best_step)]
        before = f"; {said}" if (said := history.measured_before) else ""
        facts.append((f"best validation {history.decides}", f"{value:.6g} at step {best_step:,}{before}"))
    if (loss := history.series("train", "loss")).values:
        facts.append(("last training loss", f"{loss.values[-1]:.6g}"))
    if differs := history.validation_loss:
        facts.append(("training and validation loss", f"cannot be compared: validation's is {differs}"))
    skipped = history.series("skipped", "skipped_steps")
    facts.append(("skipped steps", f"{skipped.values[-1]:.0f}" if skipped.values else "0"))
    if history.resumes:
        facts.append(("resumed after step", ", ".join(f"{resume.step:,}" for resume in history.resumes)))
    if (seconds := history.training_seconds) is not None:
        facts.append(("time in training steps", f"{duration(seconds)} (evaluations and saves not counted)"))
    if times := history.series("train", "step_time_s").values:
        facts.append(
            ("time a step, median", f"{median(times):.4g} s" if median(times) >= 1 else f"{median(times) * 1e3:.4g} ms")
        )
    if throughput := history.throughput():
        facts.append(("throughput, median", throughput))
    if (mfu := history.series("train", "mfu")).values:
        facts.append(("share of the device's peak, median", f"{median(mfu.values):.1%}"))
    for label, key in (("memory of rank 0, most", "host_memory_gib"), ("memory of its GPU, most", "gpu_memory_gib")):
        if (memory := history.series("train", key)).values:
            facts.append((label, f"{max(memory.values):.3g} GiB"))
    return facts


def _metrics_table(history: History) -> str:
    """Every validation metric at the best and at the last evaluation."""
    if not history.evaluations:
        return ""
    last, best = history.evaluations[-1], history.best_evaluation
    header = ("metric", f"best, step {best['step']:,}", f"last, step {last['step']:,}")
    return markdown([header, *((key, _show(best.get(key)), _show(last.get(key))) for key in history.keys("val"))])


def _show(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else ""


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(write_report(Path(argument)))
