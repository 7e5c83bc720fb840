"""Pictures of the surrogate: errors, predicted variables, a map of the network.

plot_evaluation(evaluation, schema, path)
plot_variables(day, names, schema, path, title)
plot_map(network, values, label, path, title)
most_moving(day, schema, scale, count)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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
from trunkline.models.fluid.schema import Schema, kind, parse_column
from trunkline.models.fluid.tally import Evaluation, mean_by_minute
from trunkline.models.fluid.words import GROUPS_IN_WORDS, QUANTITIES, in_words, shown_unit, unit_in_words

_COLOURS = {
    "surrogate": "#c1432b",
    "ridge": "#3b6ea5",
    "ridge with switches": "#7fb2dd",
    "ridge + MLP": "#2e8b57",
    "graph network": "#edae49",
    "persistence": "#8c8c8c",
    "truth": INK,
}
_FURTHER = ("#8d6a9f", "#00798c", "#b5651d", "#c77dba", "#7f9c3f", "#5f6caf")
_IN_A_PICTURE = ("MPa", "m3/s", "degC")
_SIGNALS_PER_QUANTITY = 2
_SAME_SIGNAL = 0.98
_STILL = 1e-4  # normalised: moves below are those of the files' decimals


@dataclass(frozen=True)
class PredictedDay:
    """prediction, persistence and, if known, truth: [M, Vs]; boundary [M, Vb]: the set-points. Row i is minute i + 1;
    rows before `first` are given."""

    prediction: np.ndarray
    persistence: np.ndarray
    truth: np.ndarray | None
    boundary: np.ndarray
    first: int


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each forecaster, whatever it is called."""
    names = list(names)
    unknown = [name for name in names if name not in _COLOURS]
    return {name: _COLOURS.get(name) or _FURTHER[unknown.index(name) % len(_FURTHER)] for name in names}


def plot_evaluation(evaluation: Evaluation, schema: Schema, path: Path) -> None:
    """Errors by minute of the longest rollout, in physical units; below, normalised, by minute and by kind of device.

    Without rollouts, by kind of device alone.
    """
    rollouts = [horizon for horizon in evaluation.tallies if horizon != "1 minute"]
    longest = rollouts[-1] if rollouts else "1 minute"
    tallies = evaluation.tallies[longest]
    colours = colours_of(tallies)
    found = next(iter(tallies.values())).absolute_by_minute
    units = [unit for unit in _IN_A_PICTURE if unit in found and rollouts]
    rows, columns = 1 + bool(units), max(len(units), len(rollouts) + 1)
    with picture(path, 4.1 * columns, 3.1 * rows + 0.4) as figure:
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, unit in zip(panels[0], units):
            curves = {name: mean_by_minute(tally.absolute_by_minute[unit]).numpy() for name, tally in tallies.items()}
            _draw_curves(axes, curves, colours, longest)
            axes.set_title(f"{QUANTITIES[unit].capitalize()}, {longest}: mean absolute error")
            axes.set_ylabel(unit_in_words(unit))
        for axes, horizon in zip(panels[-1], rollouts):
            curves = {name: curve.sqrt().numpy() for name, curve in evaluation.by_minute[horizon].items()}
            _draw_curves(axes, curves, colours, horizon)
            axes.set_title(f"All quantities, {horizon}: RMSE")
            axes.set_ylabel("standard deviations of each variable")
        groups = panels[-1, len(rollouts)]
        _draw_groups(groups, evaluation, (rollouts or [longest])[0], schema, colours)
        for axes in [*(panels[0, len(units) :] if units else ()), *panels[-1, len(rollouts) + 1 :]]:
            axes.remove()
        handles, labels = groups.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) if columns > 1 else 3)


def _draw_curves(axes: Axes, curves: dict[str, np.ndarray], colours: dict[str, str], horizon: str) -> None:
    hours = horizon in ("6 hours", "whole day")
    for k, (name, curve) in enumerate(curves.items()):
        time = np.arange(1, len(curve) + 1) / (60 if hours else 1)
        axes.plot(time, curve, color=colours[name], lw=1.6, label=name, zorder=3 - 0.1 * k)  # the first in front
    axes.set_xlabel("hours since the start" if hours else "minutes since the start")
    axes.set_xlim(0, time[-1])
    axes.set_ylim(bottom=0)
    if hours:
        axes.set_xticks(range(0, round(time[-1]) + 1, max(1, round(time[-1] / 4))))


def _draw_groups(axes: Axes, evaluation: Evaluation, horizon: str, schema: Schema, colours: dict[str, str]) -> None:
    scores = {name: of["normalised"] for name, of in evaluation.scores(schema)[horizon].items()}
    groups = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for k, (name, of) in enumerate(scores.items()):
        places = np.arange(len(groups)) + (k - (len(scores) - 1) / 2) * width
        axes.bar(places, [of[group]["rmse"] for group in groups], width, color=colours[name], label=name)
    words = [GROUPS_IN_WORDS[group].replace(" and ", ",\n") for group in groups]
    axes.set_xticks(range(len(groups)), words, fontsize=7.5, rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(visible=False, axis="x")
    axes.set_title(f"By kind of device, {horizon}: RMSE")
    axes.set_ylabel("standard deviations of each variable")


def plot_variables(day: PredictedDay, names: list[str], schema: Schema, path: Path, title: str) -> None:
    """One panel a variable over the hours of the day: prediction, persistence and, if known, the truth and the mean
    absolute errors of both over the predicted minutes."""
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)
    lines = {"persistence": day.persistence, "truth": day.truth, "surrogate": day.prediction}
    widths = {"persistence": 1.2, "truth": 2.2, "surrogate": 1.3}
    with picture(path, 3.9 * columns + 0.6, 2.6 * rows + 0.7) as figure:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
        hours = np.arange(1, len(day.prediction) + 1) / 60
        for axes, name in zip(panels.flat, names):
            column = schema.states.index(name)
            for line, values in lines.items():
                if values is not None:
                    first = day.first if line == "surrogate" else 0
                    axes.plot(hours[first:], values[first:, column], color=_COLOURS[line], lw=widths[line], label=line)
            axes.set_title("\n".join([f"{in_words(name)} ({shown_unit(name)})", *said_errors(day, column)]), fontsize=9)
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
        shown = ["persistence (nothing changes)" if label == "persistence" else label for label in labels]
        figure.legend(handles, shown, loc="outside lower center", ncols=len(labels))


def said_errors(day: PredictedDay, column: int) -> list[str]:
    """A line with the mean absolute errors of a column over the predicted minutes, where the truth is known."""
    if day.truth is None:
        return []
    truth = day.truth[day.first :, column]
    if np.isnan(truth).all():
        return []
    surrogate, persistence = (
        np.nanmean(np.abs(values[day.first :, column] - truth, dtype=np.float64))
        for values in (day.prediction, day.persistence)
    )
    return [f"mean absolute error {surrogate:.3g}, of persistence {persistence:.3g}"]


def most_moving(day: PredictedDay, schema: Schema, scale: np.ndarray, count: int) -> list[str]:
    """The variables that move most over the day, in normalised units, of as many kinds of device as there are.

    At most two of a quantity; no signal twice, and none that a set-point shows already, unless there is no other. Empty
    only if nothing moves.
    """
    values = day.prediction if day.truth is None else np.where(np.isnan(day.truth), day.prediction, day.truth)
    moves = np.nan_to_num(np.std(values, axis=0, dtype=np.float64) / scale)
    moving = [int(column) for column in np.argsort(-moves) if moves[column] >= _STILL]
    chosen = _chosen(values, moving, _signals(day.boundary), schema, count)
    chosen = chosen or _chosen(values, moving, _signals(day.boundary[:, :0]), schema, count)
    return [schema.states[column] for column in chosen]


def _chosen(values: np.ndarray, left: list[int], known: np.ndarray, schema: Schema, count: int) -> list[int]:
    """Up to `count` of the columns `left`, those that move most first, that show none of the signals `known`."""
    kinds = [kind(parse_column(name)[0]) for name in schema.states]
    quantities = [parse_column(name)[1].split("_")[0] for name in schema.states]
    left, chosen = list(left), list[int]()
    while left and len(chosen) < count:
        of_kind = Counter(kinds[column] for column in chosen)
        column = min(left, key=lambda column: of_kind[kinds[column]])  # of equals, the one that moves most
        left.remove(column)
        signal = _signals(values[:, [column]])
        if sum(quantities[other] == quantities[column] for other in chosen) == _SIGNALS_PER_QUANTITY:
            left = [other for other in left if quantities[other] != quantities[column]]
        elif np.abs(signal.T @ known).max(initial=0) <= _SAME_SIGNAL:
            chosen.append(column)
            known = np.concatenate([known, signal], axis=1)
    return chosen


def _signals(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and length 1, or 0 where nothing moves: products of two are correlations."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    return centred / np.maximum(np.sqrt(np.square(centred).sum(axis=0)), 1e-12)


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
    for letter in ("H", "B", "C", "R"):
        edges += devices.get(letter, [])
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
    for letter, (title, marker, colour) in kinds.items():
        spots = []
        for device in devices.get(letter, []):
            if device.get("node") in places:
                x, y = places[device["node"]]
                spots.append((x, y))
            elif device.get("from") in places and device.get("to") in places:
                (x1, y1), (x2, y2) = places[device["from"]], places[device["to"]]
                spots.append(((x1 + x2) / 2, (y1 + y2) / 2))
        if not spots or (crowd and letter in "BE"):
            continue
        x, y = np.array(spots).T
        # beside the node, which would hide it
        aside = {"T": -9, "E": 9}.get(letter, 0)
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
