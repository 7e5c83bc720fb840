"""An evaluation as evaluation.json (everything) and evaluation.md (tables to read)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trunkline.engine.record.tables import Table, markdown
from trunkline.models.fluid.bounds import BOUNDS
from trunkline.models.fluid.metrics import ALL
from trunkline.models.fluid.relative_errors import LEAST, RESOLUTION
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.tally import Evaluation, Tally, mean_by_minute
from trunkline.models.fluid.trained import Trained
from trunkline.models.fluid.words import GROUPS_IN_WORDS, QUANTITIES, unit_in_words

_MEASURES = ("mae", "rmse", "r2")
_NAMED = 20
_FACTS = {
    "penalty": "penalty {:g}",
    "noise": "noise {:g}",
    "minutes": "{:g} min of training allowed",
    "steps": "{:,} steps",
    "best_step": "the best after {:,}",
    "days": "{:,} training days",
    "seconds": "fitted in {:.3g} s altogether",
    "threads": "threads: {}",
    "device": "device: {}",
}
"""What is said of a baseline's fit, where it is known."""


def write_report(evaluation: Evaluation, trained: Trained, out: Path) -> str:
    """Write both files into `out`; returns the overviews in physical units and normalised, as text."""
    schema = trained.schema
    scores = evaluation.scores(schema)
    record = {
        "weights": str(trained.folder),
        "facts": trained.facts,
        "split": evaluation.split,
        "cases": evaluation.cases,
        "history_minutes": trained.data.history,
        "baselines": evaluation.baselines,
        "copied_from_set_points": evaluation.copied,
        "scores": scores,
        "scores_with_copies": evaluation.scores(schema, with_copies=True),
        "relative_errors": {
            "least_magnitude": LEAST,
            "resolution": RESOLUTION,
            **_each(evaluation, lambda tally: {unit: errors.summary() for unit, errors in tally.relative.items()}),
        },
        "outside_bounds": {
            "bounds": BOUNDS,
            **_each(evaluation, lambda tally: tally.outside.by_column(schema)),
        },
        "rmse_by_minute": _each(evaluation, lambda tally: mean_by_minute(tally.by_minute).sqrt().tolist()),
        "mae_by_minute": _each(
            evaluation,
            lambda tally: {unit: mean_by_minute(sums).tolist() for unit, sums in tally.absolute_by_minute.items()},
        ),
    }
    (out / "evaluation.json").write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")
    overview = _overview(scores)
    parts = [
        "# Evaluation\n",
        f"Weights: `{trained.folder}`. Split `{evaluation.split}`: {len(evaluation.cases)} days. All forecasters begin "
        "with the same true minutes and know the set-points ahead; persistence says that nothing changes.\n",
        _about_baselines(evaluation.baselines),
        _about_copies(evaluation.copied, schema),
        "## Physical units\n",
        "Over all devices. Pressures are absolute; Nm3 are cubic metres at 0 degC and 101.325 kPa. A relative error is "
        f"|predicted - true| / |true|, where the truth is at least {LEAST['m3/s']:g} Nm3/s or {LEAST['MPa']:g} MPa. "
        f"Half of the values are less off than the median, which is right to {RESOLUTION:.2%} of itself. Where little "
        "moves for hours, it says more of calm than of switches: read it beside MAE and RMSE.\n",
        *(f"### {horizon}\n\n{_markdown(_physical(evaluation, scores, horizon))}\n" for horizon in scores),
        "## Normalised: RMSE in standard deviations\n",
        f"{_markdown(overview)}\n",
        "Each variable in units of its standard deviation on the training days.\n",
        "## Predictions outside physical bounds\n",
        f"{_about_bounds(evaluation, schema)}\n",
        "## By kind of device, normalised\n",
        *(f"### {horizon}\n\n{_markdown(_by_group(of))}\n" for horizon, of in scores.items()),
        "## By kind of device, physical units\n",
        *(f"### {horizon}\n\n{_markdown(_by_unit(of))}\n" for horizon, of in scores.items()),
    ]
    (out / "evaluation.md").write_text("\n".join(parts), encoding="utf-8")
    physical = "\n\n".join(
        f"{horizon}\n{_text(_physical(evaluation, scores, horizon, ('mae',)))}" for horizon in scores
    )
    return f"{physical}\n\nRMSE in standard deviations\n{_text(overview)}"


def _each(evaluation: Evaluation, what: Callable[[Tally], Any]) -> dict[str, Any]:
    """`what` of each tally, by horizon and forecaster."""
    return {horizon: {name: what(tally) for name, tally in of.items()} for horizon, of in evaluation.tallies.items()}


def _about_baselines(baselines: dict[str, dict[str, Any]]) -> str:
    return "".join(
        f"- {name}: {', '.join(words.format(facts[key]) for key, words in _FACTS.items() if key in facts)}.\n"
        for name, facts in baselines.items()
    )


def _about_copies(copied: dict[str, str], schema: Schema) -> str:
    if not copied:
        return f"All {schema.num_states} output columns are scored: none of them only copies a set-point.\n"
    named = [f"`{state}` (`{set_point}`)" for state, set_point in copied.items()]
    more = f" and {len(named) - _NAMED} more, in evaluation.json" if len(named) > _NAMED else ""
    return (
        f"{len(named)} of {schema.num_states} output columns only copy a set-point on the training days, and no score "
        f"counts them: {', '.join(named[:_NAMED])}{more}. evaluation.json has the scores with them, too.\n"
    )


def _about_bounds(evaluation: Evaluation, schema: Schema) -> str:
    lines = [
        f"- {horizon}, {name}: {line}."
        for horizon, of in evaluation.tallies.items()
        for name, tally in of.items()
        if (line := tally.outside.line(schema))
    ]
    low, high = BOUNDS["t"]
    none = f"None: no pressure, power or linepack below 0, no temperature below {low:g} or above {high:g} degC."
    return "\n".join(lines) or none


def _physical(
    evaluation: Evaluation, scores: dict[str, Any], horizon: str, measures: tuple[str, ...] = ("mae", "rmse")
) -> Table:
    """A line for each quantity and measure; a median of the relative errors under those that have one."""
    tallies = evaluation.tallies[horizon]
    found = {name: of["physical"].get(ALL, {}) for name, of in scores[horizon].items()}
    there = dict.fromkeys(unit for of in found.values() for unit in of)
    rows = [["", *found]]
    for unit in sorted(there, key=lambda unit: [*QUANTITIES, unit].index(unit)):
        what = QUANTITIES.get(unit, "other")
        for measure in measures:
            label = f"{what}, {measure.upper()} ({unit_in_words(unit)})"
            rows.append([label, *(_number(of[unit][measure]) for of in found.values())])
        if unit in LEAST:
            medians = [tallies[name].relative[unit].median() for name in found]
            rows.append([f"{what}, median relative error (%)", *(_number(100 * median) for median in medians)])
    return rows


def _overview(scores: dict[str, Any]) -> Table:
    """RMSE, and how the first forecaster's compares with the best of the others."""
    first, *others = next(iter(scores.values()))
    rows = [["horizon", first, *others, *([f"{first} / best other"] if others else [])]]
    for horizon, by_name in scores.items():
        rmse = {name: of["normalised"].get(ALL, {}).get("rmse", math.nan) for name, of in by_name.items()}
        best = min((rmse[other] for other in others if math.isfinite(rmse[other])), default=0.0)
        rows.append([horizon, *map(_number, rmse.values()), *([_ratio(rmse[first], best)] if others else [])])
    return rows


def _ratio(value: float, other: float) -> str:
    return _number(value / other) if other else "-"


def _by_group(by_name: dict[str, Any]) -> Table:
    groups = next(iter(by_name.values()))["normalised"]
    rows = [["", *by_name]]
    for group in groups:
        for measure in _MEASURES:
            cells = [_number(of["normalised"][group][measure]) for of in by_name.values()]
            rows.append([f"{GROUPS_IN_WORDS[group]}, {measure.upper()}", *cells])
    return rows


def _by_unit(by_name: dict[str, Any]) -> Table:
    rows = [["", *by_name]]
    for group, units in next(iter(by_name.values()))["physical"].items():
        for unit in units:
            what = f"{GROUPS_IN_WORDS[group]}, {QUANTITIES.get(unit, 'other')}"
            for measure in _MEASURES:
                of_unit = f" ({unit_in_words(unit)})" if measure != "r2" else ""
                cells = [_number(of["physical"][group][unit][measure]) for of in by_name.values()]
                rows.append([f"{what}, {measure.upper()}{of_unit}", *cells])
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _markdown(table: Table) -> str:
    return markdown(table, align="right")


def _text(table: Table) -> str:
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths)))
        for row in table
    )


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
