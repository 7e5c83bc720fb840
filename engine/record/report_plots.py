"""Curves over steps as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.record.history import Series
from trunkline.engine.record.pictures import BLUE, GREY, INK, RED, picture, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PARTS = ("#66a182", "#edae49", "#8d6a9f", "#00798c", "#b5651d", "#7f9c3f", "#c77dba", "#5f6caf", "#a0522d", "#3a9188")

TRAIN, VALIDATION, COMPARED = "train", "validation", "compared"


@dataclass(frozen=True)
class Panel:
    """One pair of axes, with curves of one unit. Where `smoothed`, they are drawn thin, with a smoothed line over each.
    `from_zero` starts the axis at 0; else it is logarithmic where all values are positive and span more than a factor
    of 20. `kinds` says by name which curves are not of a part or a run: TRAIN has a colour of its own, VALIDATION has
    markers, and each COMPARED is grey, in dashes of its own."""

    title: str
    curves: Mapping[str, Series]
    smoothed: bool = False
    from_zero: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)


def plot_panels(
    path: Path, panels: Sequence[Panel], *, best_step: int | None = None, skipped_steps: Sequence[int] = (),
    marks: Mapping[str, Sequence[int]] | None = None,
) -> bool:  # fmt: skip
    """Draw those panels that have a value to `path`. False if none has: then there is no file either.

    `best_step` is marked on the validation curves, `skipped_steps` at the foot of the smoothed panels, and the steps of
    `marks`, by what they are called, with thin lines.
    """
    drawn = [panel for panel in panels if any(series.values for series in panel.curves.values())]
    if not drawn:
        path.unlink(missing_ok=True)  # of an earlier report
        return False

    last_step = max(series.steps[-1] for panel in drawn for series in panel.curves.values() if series.steps)
    columns = 1 if len(drawn) <= 2 else 2
    rows = -(-len(drawn) // columns)
    wide = 14.0 if any(len(panel.curves) > 5 for panel in drawn) else 11.0  # their legends stand beside the axes
    width, height = (8.0, 3.0 * rows + 0.3) if columns == 1 else (wide, 2.7 * rows + 0.3)
    with picture(path, width, height, **{"legend.fontsize": 7.5}) as figure:
        for index, panel in enumerate(drawn):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(plain(panel.title))
            axes.set_xlabel("step")
            _draw(axes, panel, best_step)
            for colour, (called, steps) in zip(cycle((GREY, RED)), (marks or {}).items(), strict=False):
                for place, step in enumerate(dict.fromkeys(steps)):
                    axes.axvline(step, color=colour, lw=0.8, zorder=1, label=None if place else plain(called))
            if panel.smoothed and skipped_steps:
                axes.plot(skipped_steps, [0.02] * len(skipped_steps), "x", transform=axes.get_xaxis_transform(),
                          color=INK, ms=5, label="skipped steps")  # fmt: skip
            axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
            labels = axes.get_legend_handles_labels()[1]
            if len(labels) > 6:
                axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
            elif len(labels) > 1 or len(panel.curves) > 1:  # of two, one may have no values yet
                axes.legend()
    return True


def _draw(axes: Axes, panel: Panel, best_step: int | None) -> None:
    values: list[float] = []
    colours, dots = cycle(_PARTS), count()
    for name, series in panel.curves.items():
        if not series.values:
            continue
        values += series.values
        kind = panel.kinds.get(name)
        if kind == VALIDATION:
            axes.plot(series.steps, series.values, "o-", color=RED, ms=3, lw=1.6, label=plain(name), zorder=4)
            if best_step in series.steps:
                best = series.values[series.steps.index(best_step)]
                axes.plot([best_step], [best], "o", ms=8, mfc="none", mec=INK, mew=1.3, zorder=5,
                          label=f"{best:.4g} at the best step, {best_step:,}")  # fmt: skip
        elif kind == COMPARED:
            label = plain(name.removesuffix(" (compared)"))
            dashes: Any = (0, (5, 2) + (1, 2) * next(dots))  # a dash, and the more dots the later it comes
            axes.plot(series.steps, series.values, ls=dashes, color=GREY, lw=1.2, label=label, zorder=3)
        else:
            colour = BLUE if kind == TRAIN else next(colours)
            smoothed = panel.smoothed and len(series.values) >= 20
            width = 1.6 if panel.smoothed else 1.0
            dot = "o" if len(series.values) == 1 else None  # which a line would not show
            axes.plot(series.steps, series.values, marker=dot, color=colour, lw=0.8 if smoothed else width,
                      alpha=0.35 if smoothed else 1.0, label=None if smoothed else plain(name))  # fmt: skip
            if smoothed:
                axes.plot(series.steps, smooth(series.values), color=colour, lw=1.6, label=f"{plain(name)} (smoothed)")
    if panel.from_zero:
        axes.set_ylim(0, 1.1 * max(values) if max(values) > 0 else 1)
    elif min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def smooth(values: Sequence[float]) -> list[float]:
    """A centred moving average over about a twentieth of the curve; its window narrows towards both ends."""
    reach = len(values) // 40
    smoothed = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
