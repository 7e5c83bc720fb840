"""An evaluation as evaluation.json (everything) and evaluation.md (tables to read)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from trunkline.engine.record.tables import Table, markdown
from trunkline.models.fluid.metrics import ALL, Evaluation
from trunkline.models.fluid.trained import Trained


def write_report(evaluation: Evaluation, trained: Trained, out: Path) -> str:
    """Write both files into `out`; returns the first table, as text."""
    scores = {
        horizon: {name: errors.scores(trained.schema) for name, errors in by_name.items()}
        for horizon, by_name in evaluation.errors.items()
    }
    record = {
        "weights": str(trained.folder),
        "facts": trained.facts,
        "split": evaluation.split,
        "cases": evaluation.cases,
        "history_minutes": trained.data.history,
        "ridge_penalty": evaluation.ridge_penalty,
        "scores": scores,
        "rmse_by_minute": {
            horizon: {name: curve.sqrt().tolist() for name, curve in curves.items()}
            for horizon, curves in evaluation.by_minute.items()
        },
    }
    (out / "evaluation.json").write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")
    overview = _overview(scores)
    parts = [
        "# Evaluation\n",
        f"Weights: `{trained.folder}`. Split `{evaluation.split}`: {len(evaluation.cases)} days. Errors are over all "
        "variables in units of their standard deviation on the training days, unless a unit is given.\n",
        "## RMSE by horizon\n",
        f"{markdown(overview, align='right')}\n",
        "## By equipment group, normalised\n",
        *(f"### {horizon}\n\n{markdown(_by_group(values), align='right')}\n" for horizon, values in scores.items()),
        "## By equipment group, physical units\n",
        *(f"### {horizon}\n\n{markdown(_by_unit(values), align='right')}\n" for horizon, values in scores.items()),
    ]
    (out / "evaluation.md").write_text("\n".join(parts), encoding="utf-8")
    return _text(overview)


def _overview(scores: dict[str, Any]) -> Table:
    names = list(next(iter(scores.values())))
    others = names[1:]
    rows = [["horizon", *names, *(f"{names[0]} / {other}" for other in others)]]
    for horizon, by_name in scores.items():
        rmse = {name: by_name[name]["normalised"][ALL]["rmse"] for name in names}
        ratios = [_number(rmse[names[0]] / rmse[other]) if rmse[other] else "-" for other in others]
        rows.append([horizon, *(_number(rmse[name]) for name in names), *ratios])
    return rows


def _by_group(by_name: dict[str, Any]) -> Table:
    names = list(by_name)
    measures = ["rmse", "mae", "mse", "r2"]
    header = ["group", *(f"{name} {measure.upper()}" for measure in measures for name in names)]
    groups = by_name[names[0]]["normalised"]
    return [
        header,
        *(
            [group, *(_number(by_name[name]["normalised"][group][m]) for m in measures for name in names)]
            for group in groups
        ),
    ]


def _by_unit(by_name: dict[str, Any]) -> Table:
    names = list(by_name)
    measures = ["rmse", "mae", "mse", "r2"]
    rows = [["group", "unit", *(f"{name} {measure.upper()}" for measure in measures for name in names)]]
    for group, units in by_name[names[0]]["physical"].items():
        for unit in units:
            cells = [_number(by_name[name]["physical"][group][unit][m]) for m in measures for name in names]
            rows.append([group, unit, *cells])
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


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
