"""Runs beside each other, for a person to read.

    runs = named(["runs/a", "runs/b"])       as far as they can be read
    comparison(runs)                         Markdown: a table, where the configurations differ, what cannot be compared
    write_comparison(runs, Path("out"))      the same as out/compare.md, with curves that lie on each other

A run that has not ended, or is damaged, is compared as far as it goes, and that is said.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from trunkline.engine.config.draft import leaves, value_at
from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import made_folder, replace_whole, written_to
from trunkline.engine.record.history import History, Series, duration, is_number, read_history
from trunkline.engine.record.report_plots import Panel, plot_panels
from trunkline.engine.record.tables import amount, markdown

Runs = Mapping[str, History]
"""By the name that each has in tables and pictures."""
PAGE, CURVES = "compare.md", "compare.png"
NONE = "-"


def named(folders: Iterable[Path]) -> Runs:
    """The runs, by the names of their folders, or by their paths where two are alike. Raises DataError for what is no
    run."""
    folders = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {name: read_history(folder) for name, folder in zip(names, folders, strict=True)}
    for run in runs.values():
        if not (run.rows or run.config):
            raise DataError(
                f"{run.folder}: not the folder of a run (no metrics.jsonl, config.json and plan.json to read): "
                "give another one"
            )
    return runs


def comparison(runs: Runs) -> str:
    """What there is to tell of them in words."""
    parts = [markdown([("", *runs), *_facts(runs)])]
    if notes := _notes(runs):
        parts.append("\n".join(f"- {note}" for note in notes))
    parts += ["## Validation", _metrics(runs), "## Configurations", _differences(runs)]
    return "\n\n".join(parts) + "\n"


def write_comparison(runs: Runs, out: Path) -> Path:
    """The page in the folder `out`, and curves of losses beside it. Returns the page's path.

    Raises ConfigError for a folder that cannot be made, and DataError where there is no room.
    """
    made_folder(out)
    with written_to(out):
        drawn = plot_panels(out / CURVES, list(_panels(runs)))
        picture = f"![training and validation loss]({CURVES})\n\n" if drawn else ""
        replace_whole(out / PAGE, f"# {', '.join(runs)}\n\n{picture}{comparison(runs)}")
    return out / PAGE


def _facts(runs: Runs) -> list[tuple[str, ...]]:
    """What each run is and how far it came, a line each."""
    seen = {name: run.seen() for name, run in runs.items()}
    counted = dict.fromkeys(key for of_run in seen.values() for key in of_run)

    def line(called: str, *cells: str | None) -> tuple[str, ...]:
        return called, *(cell or NONE for cell in cells)

    histories = list(runs.values())
    apart = [_apart(histories[0], other) for other in histories[1:]]
    return [
        line("workload", *(run.workload for run in histories)),
        line("steps", *(_of(run.steps, run.planned_steps) for run in histories)),
        *(line(key, *(amount(of_run[key]) if key in of_run else "" for of_run in seen.values())) for key in counted),
        line("time in training steps", *(_duration(run.training_seconds) for run in histories)),
        line("throughput, median", *(run.throughput() for run in histories)),
        line("resumed after step", *(", ".join(f"{resume.step:,}" for resume in run.resumes) for run in histories)),
        line("training loss, last", *(_last(run.series("train", "loss")) for run in histories)),
        *([line(f"largest difference from {next(iter(runs))}", "", *apart)] if any(apart) else []),
    ]


def _of(steps: int, planned: int | None) -> str:
    return f"{steps:,}" if planned is None else f"{steps:,} of {planned:,}"


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _last(series: Series) -> str:
    return f"{series.values[-1]:.6g}" if series.values else ""


def _apart(one: History, other: History) -> str:
    """How far the training losses of two runs of one workload lie apart where they lie farthest, at the same step."""
    if one.workload != other.workload:
        return ""
    ours, theirs = (
        dict(zip(s.steps, s.values, strict=True)) for s in (r.series("train", "loss") for r in (one, other))
    )
    apart = [(abs(ours[step] - theirs[step]), step) for step in ours if step in theirs]
    said = ["{:.3g} at step {:,}".format(*max(apart))] if apart else []
    lost = [
        row["step"]
        for run in (one, other)
        for row in run.rows
        if row.get("split") == "train" and "loss" in row and not is_number(row["loss"])
    ]
    return ", ".join([*said, *([f"not finite at step {min(lost):,}"] if lost else [])])


def _metrics(runs: Runs) -> str:
    """Every metric at each run's best evaluation and at its last one."""
    names = dict.fromkeys(key for run in runs.values() for key in run.keys("val"))
    if not names:
        return "None of the runs was evaluated."

    def cell(run: History, name: str) -> str:
        if not run.evaluations:
            return NONE
        best, last = run.best_evaluation, run.evaluations[-1]
        values = [f"{row[name]:.6g}" for row in (best, last) if isinstance(row.get(name), int | float)]
        return " / ".join(values) or NONE

    rows = [
        (
            "best step / last step",
            *(f"{run.best_evaluation['step']:,} / {run.evaluations[-1]['step']:,}" if run.evaluations else NONE
              for run in runs.values()),
        ),
        *((name, *(cell(run, name) for run in runs.values())) for name in names),
    ]  # fmt: skip
    decides = {name: run.decides for name, run in runs.items()}
    by = f"the best {next(iter(decides.values()))}"
    if len(set(decides.values())) > 1:
        by = "the best " + ", ".join(f"{metric} ({name})" for name, metric in decides.items())
    return f"At the evaluation with {by}, and at the last one:\n\n" + markdown([("", *runs), *rows])


def _notes(runs: Runs) -> list[str]:
    """What keeps the runs from being compared in full."""
    notes = [problem for run in runs.values() for problem in run.problems]
    notes += [
        f"{name} has made {run.steps:,} of its {run.planned_steps:,} steps"
        for name, run in runs.items()
        if run.planned_steps is not None and run.steps < run.planned_steps
    ]
    if len({run.workload for run in runs.values()}) > 1:
        kinds = ", ".join(f"{name} {run.workload}" for name, run in runs.items())
        notes.append(f"the workloads differ ({kinds}): a loss of one is no measure of another")
    measured = {name: run.keys("val") for name, run in runs.items()}
    for name, keys in measured.items():
        if not keys:
            notes.append(f"{name} was never evaluated")
        lacking: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for other in runs:
            lacking[tuple(key for key in keys if key not in measured[other])].append(other)
        notes += [
            f"not measured by {', '.join(others)}, but by {name}: {', '.join(keys)}"
            for keys, others in lacking.items()
            if keys
        ]
    notes += [
        f"{name}: its validation loss is {run.validation_loss}: it cannot be compared with its training loss"
        for name, run in runs.items()
        if run.validation_loss
    ]
    notes += [
        f"{name}: {run.measured_before}: the best is one of the later ones"
        for name, run in runs.items()
        if run.measured_before
    ]
    return notes


def _differences(runs: Runs) -> str:
    """The keys of the configurations of record whose values differ."""
    known = {
        name: {key: json.dumps(value_at(run.config, key)) for key in leaves(run.config)}
        for name, run in runs.items()
        if run.config
    }
    if len(known) < 2:
        return "Fewer than two of the configurations can be read."
    keys = dict.fromkeys(key for values in known.values() for key in values)
    rows = [(key, *(values.get(key, NONE) for values in known.values())) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    return markdown([("key", *known), *differing]) if differing else "The configurations are equal."


def _panels(runs: Runs) -> Iterable[Panel]:
    """Training and validation losses of all runs on top of each other, for each workload by itself."""
    workloads = list(dict.fromkeys(run.workload for run in runs.values()))
    for workload in workloads:
        of_it = {name: run for name, run in runs.items() if run.workload == workload}
        where = f" ({workload})" if workloads[1:] else ""
        yield Panel(
            f"training loss{where}", {n: run.series("train", "loss") for n, run in of_it.items()}, smoothed=True
        )
        yield Panel(f"validation loss{where}", {n: run.series("val", "loss") for n, run in of_it.items()})
        for metric in dict.fromkeys(run.decides for run in of_it.values() if run.decides != "loss"):
            yield Panel(f"{metric} on validation{where}", {n: run.series("val", metric) for n, run in of_it.items()})
