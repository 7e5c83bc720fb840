"""Pictures of the surrogate: errors, predicted variables, a map of the network.

plot_evaluation(evaluation, schema, path)
plot_variables(day, names, schema, path)
plot_map(network, values, label, path)
most_moving(day, schema, scale, count)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from trunkline.engine.record.pictures import INK, picture
from trunkline.models.fluid.metrics import Evaluation
from trunkline.models.fluid.schema import Schema, parse_column, unit

_COLOURS = {"surrogate": "#c1432b", "ridge": "#3b6ea5", "persistence": "#8c8c8c", "truth": INK}
_QUANTITIES = {
    "p": "pressure",
    "q": "flow",
    "t": "temperature",
    "pwr": "power",
    "inv": "linepack",
}
_SIGNALS_PER_QUANTITY = 2
_SAME_SIGNAL = 0.98
_STILL = 1e-4  # normalised: moves below are those of the files' decimals


@dataclass(frozen=True)
class PredictedDay:
    """prediction, persistence and, if known, truth: [M, Vs]. Row i is minute i + 1; rows before `first` are given."""

    prediction: np.ndarray
    persistence: np.ndarray
    truth: np.ndarray | None
    first: int


def plot_evaluation(evaluation: Evaluation, schema: Schema, path: Path) -> None:
    """RMSE by minute of the rollouts, and by equipment group."""
    horizons = [horizon for horizon in ("60 minutes", "whole day") if horizon in evaluation.errors]
    bars = horizons[0] if horizons else next(iter(evaluation.errors))
    with picture(path, 4.1 * (len(horizons) + 1), 3.4) as figure:
        panels = figure.subplots(1, len(horizons) + 1, squeeze=False)[0]
        for axes, horizon in zip(panels, horizons):
            curves = evaluation.by_minute[horizon]
            hours = horizon == "whole day"
            for name, curve in curves.items():
                time = np.arange(1, len(curve) + 1) / (60 if hours else 1)
                axes.plot(time, curve.sqrt().numpy(), color=_COLOURS[name], lw=1.6, label=name)
            axes.set_title(f"Rollout of {'a whole day' if hours else '60 minutes'}")
            axes.set_xlabel("hours since the start" if hours else "minutes since the start")
            axes.set_ylabel("RMSE (standard deviations)")
            axes.set_xlim(0, time[-1])
            axes.set_ylim(bottom=0)
            if hours:
                axes.set_xticks(range(0, 25, 6))
        _draw_groups(panels[-1], evaluation, bars, schema)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _draw_groups(axes: Axes, evaluation: Evaluation, horizon: str, schema: Schema) -> None:
    names = list(evaluation.errors[horizon])
    scores = {name: errors.scores(schema)["normalised"] for name, errors in evaluation.errors[horizon].items()}
    groups = list(scores[names[0]])
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        places = np.arange(len(groups)) + (k - (len(names) - 1) / 2) * width
        axes.bar(places, [scores[name][g]["rmse"] for g in groups], width, color=_COLOURS[name], label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")
    axes.set_title(f"By equipment group, {horizon}")
    axes.set_ylabel("RMSE (standard deviations)")


def plot_variables(day: PredictedDay, names: list[str], schema: Schema, path: Path, title: str) -> None:
    """One panel a variable over the hours of the day: prediction, persistence and, if known, the truth."""
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    with picture(path, 3.7 * columns + 0.6, 2.3 * rows + 0.7) as figure:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        hours = np.arange(1, len(day.prediction) + 1) / 60
        for axes, name in zip(panels.flat, names):
            column = schema.states.index(name)
            axes.plot(hours, day.persistence[:, column], color=_COLOURS["persistence"], lw=1.2, label="persistence")
            if day.truth is not None:
                axes.plot(hours, day.truth[:, column], color=_COLOURS["truth"], lw=2.2, label="truth")
            axes.plot(
                hours[day.first :],
                day.prediction[day.first :, column],
                color=_COLOURS["surrogate"],
                lw=1.3,
                label="surrogate",
            )
            quantity = parse_column(name)[1]
            axes.set_title(name)
            axes.set_ylabel(f"{_quantity(quantity)} ({unit(quantity) or '?'})")
            axes.set_xlim(0, 24)
            axes.set_xticks(range(0, 25, 6))
            axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
        for axes in panels.flat[len(names) :]:
            axes.remove()
        for k, axes in enumerate(panels.flat[: len(names)]):
            if k + columns >= len(names):
                axes.set_xlabel("hour of the day")
                axes.tick_params(labelbottom=True)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _quantity(name: str) -> str:
    base, _, side = name.partition("_")
    what = _QUANTITIES.get(base, base)
    return f"{what} {side}" if side else what


def most_moving(day: PredictedDay, schema: Schema, scale: np.ndarray, count: int) -> list[str]:
    """The variables that move most over the day, in normalised units: at most two of a quantity, no signal twice."""
    values = day.prediction if day.truth is None else np.where(np.isnan(day.truth), day.prediction, day.truth)
    moves = np.nan_to_num(np.std(values, axis=0, dtype=np.float64) / scale)
    chosen: list[int] = []
    of_quantity: dict[str, int] = {}
    for column in np.argsort(-moves):
        if len(chosen) == count or moves[column] < _STILL:
            break
        quantity = parse_column(schema.states[column])[1].split("_")[0]
        if of_quantity.get(quantity, 0) == _SIGNALS_PER_QUANTITY:
            continue
        if any(abs(np.corrcoef(values[:, column], values[:, other])[0, 1]) > _SAME_SIGNAL for other in chosen):
            continue
        chosen.append(int(column))
        of_quantity[quantity] = of_quantity.get(quantity, 0) + 1
    return [schema.states[column] for column in chosen]


def plot_map(network: dict[str, Any], values: dict[str, float], label: str, path: Path, title: str) -> bool:
    """The network with nodes and edges in the colour of `values` by node name. False if it has no coordinates."""
    places = {
        node["name"]: (node["x_km"], node["y_km"])
        for node in network.get("nodes", [])
        if node.get("name") in values and "x_km" in node and "y_km" in node
    }
    if not places:
        return False
    edges = list(network.get("pipes", []))
    devices = network.get("devices", {})
    for kind in ("H", "B", "C", "R"):
        edges += devices.get(kind, [])
    edges = [edge for edge in edges if edge.get("from") in places and edge.get("to") in places]
    x, y = np.array(list(places.values())).T
    span = (np.ptp(x) or 1.0, np.ptp(y) or 1.0)
    with picture(path, 9.0, float(np.clip(8.0 * span[1] / span[0] + 1.6, 3.4, 7.0))) as figure:
        axes = figure.subplots()
        norm = matplotlib.colors.Normalize(*_colour_range(np.array([values[name] for name in places])))
        lines = [(places[edge["from"]], places[edge["to"]]) for edge in edges]
        middle = [(values[edge["from"]] + values[edge["to"]]) / 2 for edge in edges]
        crowd = len(places) > 60
        collection = LineCollection(lines, cmap="viridis_r", norm=norm, linewidths=2 if crowd else 4, capstyle="round")
        collection.set_array(np.array(middle))
        axes.add_collection(collection)
        axes.scatter(
            x, y, c=[values[name] for name in places], cmap="viridis_r", norm=norm, s=14 if crowd else 60,
            edgecolors="#333333", linewidths=0.4 if crowd else 0.8, zorder=3,
        )  # fmt: skip
        _draw_devices(figure, axes, devices, places, crowd)
        if not crowd:
            _name_nodes(axes, places, span)
        axes.margins(0.06, 0.18)
        axes.set_title(title)
        axes.set_xlabel("km")
        axes.set_ylabel("km")
        figure.colorbar(collection, ax=axes, label=label, pad=0.02, fraction=0.04)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return True


def _draw_devices(figure: Figure, axes: Axes, devices: dict[str, Any], places: dict[str, Any], crowd: bool) -> None:
    kinds = {
        "C": ("compressor", "^", "#c1432b"),
        "R": ("control valve", "D", "#edae49"),
        "B": ("ball valve", "s", "#ffffff"),
        "T": ("source", "P", "#2e8b57"),
        "E": ("delivery", "v", "#3b6ea5"),
    }
    for kind, (title, marker, colour) in kinds.items():
        spots = []
        for device in devices.get(kind, []):
            if device.get("node") in places:
                x, y = places[device["node"]]
                spots.append((x, y))
            elif device.get("from") in places and device.get("to") in places:
                (x1, y1), (x2, y2) = places[device["from"]], places[device["to"]]
                spots.append(((x1 + x2) / 2, (y1 + y2) / 2))
        if not spots or (crowd and kind in "BE"):
            continue
        x, y = np.array(spots).T
        # beside the node, which would hide it
        aside = {"T": -9, "E": 9}.get(kind, 0)
        shift = offset_copy(axes.transData, figure, aside, -abs(aside), "points")
        axes.scatter(
            x, y, marker=marker, s=22 if crowd else 70, c=colour, edgecolors="#222222", linewidths=0.6, label=title,
            zorder=4, transform=axes.transData if crowd else shift,
        )  # fmt: skip


def _name_nodes(axes: Axes, places: dict[str, tuple[float, float]], span: tuple[float, float]) -> None:
    """Names above the nodes; to the right of that where another node's name stands close by."""
    above: list[tuple[float, float]] = []
    for name, (x, y) in places.items():
        crowded = any(abs(x - u) < 0.07 * span[0] and abs(y - v) < 0.1 * span[1] for u, v in above)
        shift, side = ((5, 9), "left") if crowded else ((0, 9), "center")
        axes.annotate(name, (x, y), shift, textcoords="offset points", ha=side, fontsize=7.5)
        if not crowded:
            above.append((x, y))


def _colour_range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
