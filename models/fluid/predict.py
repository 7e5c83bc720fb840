"""Prediction of a whole day under a case's Boundary.csv, as CSV and pictures.

    predict_day(trained, boundary, start)      -> [1440, Vs]
    run(arguments)                             what launchers/predict.py calls

Where the start comes from: `--start FOLDER` takes another case's last minutes (yesterday, say) or those up to
`--start-minute`; else the case's own first minutes, if it has outputs; else those minutes of the training days whose
boundary is nearest to the case's first.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import torch

from trunkline.engine.checkpoint.weights import described
from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import made_folder
from trunkline.models.fluid.bounds import BOUNDS, Outside
from trunkline.models.fluid.csv.cases import read_case
from trunkline.models.fluid.metrics import Errors
from trunkline.models.fluid.plots import PredictedDay, most_moving, plot_map, plot_variables
from trunkline.models.fluid.rollout import Surrogate, rollout
from trunkline.models.fluid.schema import MINUTES, Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.trained import Trained, load_trained

_VARIABLES = 6
_RECORD = "prediction.json"


@dataclass(frozen=True)
class Start:
    """states [T, Vs]: the T minutes up to `minute` of the day (0 is the midnight that it begins with)."""

    states: np.ndarray
    minute: int
    source: str


def predict_day(trained: Trained, boundary: np.ndarray, start: Start, progress: bool = False) -> np.ndarray:
    """The day's states, float32 [1440, Vs], under `boundary` [1440, Vb]; row i is minute i + 1.

    Rows up to the start's minute hold the start itself. Before midnight, the day's first set-points stand in for those
    of the day before.
    """
    history = len(start.states)
    minutes = np.arange(start.minute - history + 1, MINUTES + 1)
    model = trained.model
    device = model.normalization.scale.device
    predicted = rollout(
        Surrogate(model, trained.data.history),
        torch.from_numpy(boundary[np.maximum(minutes - 1, 0)])[None].to(device),
        torch.from_numpy(start.states)[None].to(device),
        missing=model.normalization.state_offset,
        progress="predict" if progress else None,
    )
    known = start.states[history - start.minute :] if start.minute else start.states[:0]
    return np.concatenate([known, predicted[0].cpu().numpy()])


def own_start(state: np.ndarray, history: int) -> Start:
    """The first minutes of the case itself, from its outputs [1440, Vs]."""
    return Start(state[:history], history, "the case's own first minutes")


def start_from_case(folder: Path, schema: Schema, history: int, minute: int) -> Start:
    """The minutes up to `minute` of another case, taken as those before midnight. Raises DataError."""
    if not history <= minute <= MINUTES:
        raise DataError(f"--start-minute {minute}: must lie between {history} (the model's history) and {MINUTES}")
    state = read_case(folder, schema, outputs=True).state
    assert state is not None
    return Start(state[minute - history : minute], 0, f"{folder}, minute {minute}")


def nearest_start(store: Store, schema: Schema, boundary: np.ndarray, scale: np.ndarray, history: int) -> Start:
    """Of all training minutes, those before midnight under the boundary nearest to `boundary` [Vb]; scale [Vb].

    Where a boundary holds for hours, its last minute: the network has settled most by then. Raises DataError.
    """
    if store.schema != schema:
        raise DataError(f"{store.root}: has other columns than the run was trained on; give --start FOLDER")
    store.verify(f"train/{case}/boundary" for case in store.cases("train"))
    best: tuple[float, str, int] | None = None
    for case in store.cases("train"):
        if store.has_state("train", case):
            distance = np.square((store.boundary("train", case)[history - 1 :] - boundary) / scale).sum(axis=1)
            row = len(distance) - 1 - int(np.argmin(distance[::-1]))
            if best is None or distance[row] < best[0]:
                best = (float(distance[row]), case, row + history - 1)
    if best is None:
        raise DataError(f"{store.root}: no training case has outputs to start from; give --start FOLDER")
    _, case, row = best
    states = store.state_rows("train", case, row - history + 1, row + 1)
    return Start(states, 0, f"training case {case}, minute {row + 1}, whose boundary is nearest")


def write_day(folder: Path, day: date, states: np.ndarray, schema: Schema) -> None:
    """The output files of a day, one a group that the network has, in the layout of the inputs: TIME, then the columns
    in the schema's order."""
    midnight = datetime(day.year, day.month, day.day)
    moments = [midnight + timedelta(minutes=minute) for minute in range(1, MINUTES + 1)]
    times = [f"{t.year}/{t.month}/{t.day} {t.hour}:{t.minute:02d}" for t in moments]
    for group in schema.present_groups:
        values = states[:, schema.group_slices[group]]
        columns = {name: values[:, k] for k, name in enumerate(schema.groups[group])}
        pl.DataFrame({"TIME": times, **columns}).write_csv(folder / f"{group}.csv")


def run(arguments: argparse.Namespace) -> int:
    """Predict, write and draw. Returns the exit status. Raises DataError or CheckpointError."""
    trained = load_trained(arguments.run, arguments.device)
    schema, history = trained.schema, trained.data.history
    unknown = [name for name in arguments.variables or () if name not in schema.states]
    if unknown:
        raise DataError(f"--variables {unknown[0]}: no such output column; they are named as in the CSV files' headers")
    predicted = (arguments.out / _RECORD).exists()  # the set-points may have been put beside the predictions since
    if (arguments.out / "Boundary.csv").exists() and not predicted:
        raise DataError(f"--out {arguments.out}: is a case's folder, whose files would be overwritten; give another")
    made_folder(arguments.out)
    case = read_case(arguments.case, schema)
    normalization = trained.model.normalization
    if arguments.start is not None:
        start = start_from_case(arguments.start, schema, history, arguments.start_minute)
    elif case.state is not None:
        start = own_start(case.state, history)
    else:
        scale = normalization.scale[: schema.num_boundary].cpu().numpy()
        store = Store.open(arguments.store or trained.data.store)
        start = nearest_start(store, schema, case.boundary[0], scale, history)
    print(f"{described(trained.folder)}\nstart: {start.source}")

    prediction = predict_day(trained, case.boundary, start, progress=True)
    persistence = np.broadcast_to(start.states[-1], prediction.shape)
    day = PredictedDay(prediction, persistence, case.state, case.boundary[: len(prediction)], start.minute)
    write_day(arguments.out, case.day, prediction, schema)
    outside = Outside.of(torch.from_numpy(prediction[start.minute :]), schema, normalization.state_scale.cpu())
    print(f"bounds: {outside.line(schema) or 'every predicted value lies within the physical ones'}")
    record = {
        "weights": str(trained.folder),
        "case": str(arguments.case),
        "day": case.day.isoformat(),
        "start": start.source,
        "first_predicted_minute": start.minute + 1,
        "scores": _scores(day, trained),
        "outside_bounds": {"bounds": BOUNDS, "columns": outside.by_column(schema)},
    }
    (arguments.out / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    scale = normalization.state_scale.cpu().numpy()
    names = arguments.variables or most_moving(day, schema, scale, _VARIABLES)
    title = f"{case.day} ({arguments.case.name}), predicted from {_clock(start.minute)} on"
    pictures = []
    if names:
        said = f"{title}: its set-points are known, nothing else"
        plot_variables(day, names, schema, arguments.out / "variables.png", said)
        pictures.append("variables.png")
    else:
        print("variables.png is not drawn, since no variable moves on this day: --variables draws those that it names")
    if _draw_map(day, trained, arguments.out / "map.png", title):
        pictures.append("map.png")
    drawn = f", {' and '.join(pictures)}" if pictures else ""
    print(f"wrote {', '.join(schema.present_groups)}.csv{drawn} to {arguments.out}")
    return 0


def _scores(day: PredictedDay, trained: Trained) -> dict[str, dict[str, float]] | None:
    """Normalised scores of prediction and persistence over the predicted minutes; None if the truth is not known."""
    if day.truth is None:
        return None
    truth = torch.from_numpy(day.truth[day.first :])
    normalization = trained.model.normalization.cpu()
    return {
        name: Errors.of(torch.from_numpy(values[day.first :]), truth, ~truth.isnan(), normalization).scores(
            trained.schema
        )["normalised"]["all"]
        for name, values in (("surrogate", day.prediction), ("persistence", np.array(day.persistence)))
    }


def _draw_map(day: PredictedDay, trained: Trained, path: Path, title: str) -> bool:
    if trained.network is None:
        return False
    pressures = {name.removesuffix("_p"): k for k, name in enumerate(trained.schema.states) if name.endswith("_p")}
    prediction = day.prediction[day.first :]
    if day.truth is None:
        values = {node: float(prediction[:, k].mean()) for node, k in pressures.items()}
        return plot_map(trained.network, values, "mean pressure (MPa)", path, f"{title}: pressure")
    error = 1000 * np.abs(prediction - day.truth[day.first :])
    values = {node: float(np.nan_to_num(np.nanmean(error[:, k]))) for node, k in pressures.items()}
    return plot_map(trained.network, values, "mean absolute error (kPa)", path, f"{title}: error of pressures")


def _clock(minute: int) -> str:
    return f"{minute // 60}:{minute % 60:02d}"
