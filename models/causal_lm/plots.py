"""Pictures of an evaluation, as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trunkline.engine.record.pictures import BLUE, INK, RED, picture

_COLORS = {"trained": BLUE, "start": RED}


def plot_positions(positions: Mapping[str, np.ndarray], path: Path) -> None:
    """Mean loss in nats by place in the document, [L] for each model: how much a model makes of what it has read."""
    with picture(path, 7, 3.6) as figure:
        axes = figure.subplots()
        for name, loss in positions.items():
            places, values = _in_bins(loss)
            axes.plot(places, values, label=name, color=_COLORS[name], marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("place of the token in its document")
        axes.set_ylabel("loss (nats a token)")
        axes.set_ylim(bottom=0)
        axes.legend()


def _in_bins(loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over places from 2^k to 2^(k + 1/2): single places far on are few and scatter."""
    places = np.arange(1, len(loss) + 1)
    bins = np.floor(2 * np.log2(places)).astype(int)
    found = [(places[bins == b], loss[bins == b]) for b in np.unique(bins)]
    found = [(at[~np.isnan(values)], values[~np.isnan(values)]) for at, values in found]
    return (
        np.array([at.mean() for at, _ in found if len(at)]),
        np.array([values.mean() for at, values in found if len(at)]),
    )


def plot_margins(margins: np.ndarray, path: Path) -> None:
    """Histogram of by how much training raised log p(chosen) - log p(rejected), in nats, [N]."""
    low, high = np.percentile(margins, [1, 99])
    edges = np.linspace(min(low, 0.0), max(high, 0.0) + 1e-9, 41)
    with picture(path, 7, 3.6) as figure:
        axes = figure.subplots()
        for side, color, where in (
            ("towards the chosen", BLUE, margins > 0),
            ("the rejected", RED, margins <= 0),
        ):
            label = f"{side} answer: {where.mean():.0%} of {len(margins):,} pairs"
            axes.hist(np.clip(margins[where], edges[0], edges[-1]), edges.tolist(), color=color, label=label)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("change of log p(chosen) - log p(rejected) since the start (nats)")
        axes.set_ylabel("pairs")
        axes.legend()
