"""Which validation metrics stand together in a picture: those of one measure and one unit.

    metric_panels(curves)     {"rmse": ..., "rmse/P": ..., "rmse/P/MPa": ...} -> panels "rmse" and "rmse (MPa)"

A name is MEASURE, MEASURE/PART, MEASURE/UNIT or MEASURE/PART/UNIT. Another measure whose name ends in this one's, such
as "persistence_rmse", is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from trunkline.engine.record.report_plots import Panel, Series

UNITS = ("MPa", "m3/s", "m3", "degC", "kW", "-", "?")
"""What is a unit where it ends a name, and not a part; "-" is none, "?" is one that is not known."""
SHARES = ("accuracies", "accuracy")
"""Parts that are shares, and so no values of their measure: "rewards/accuracies"."""


def metric_panels(curves: Mapping[str, Series]) -> list[Panel]:
    """Of each measure a panel for each unit, with its parts and what it is compared with, in order of appearance.

    Parts of one measure without an overall value ("rewards/chosen", "rewards/rejected") share a panel too; one that is
    alone gives it its name. Parts of parts ("class/cat/recall") are left out.
    """
    named = {name: _parsed(name) for name in curves}
    measures = list(dict.fromkeys(measure for measure, _, _ in named.values()))
    compared = {
        other: measure
        for other in measures
        for measure in measures
        if other != measure and other.endswith(f"_{measure}")
    }
    panels: dict[tuple[str, str], dict[str, Series]] = {}
    for measure, _, unit in named.values():
        if measure not in compared:
            panels.setdefault((measure, unit), {})
    for name, (measure, part, unit) in named.items():
        if measure in compared and not part:
            of = panels.get((compared[measure], unit))
            label = f"{measure.removesuffix(f'_{compared[measure]}')} (compared)"
        else:
            of, label = panels.get((measure, unit)), part or "validation"
        if of is not None and "/" not in part:
            of[label] = curves[name]
    return [_panel(measure, unit, of) for (measure, unit), of in panels.items() if of]


def _panel(measure: str, unit: str, curves: dict[str, Series]) -> Panel:
    title = measure
    if len(curves) == 1 and "validation" not in curves:
        ((part, curve),) = curves.items()
        title, curves = f"{measure}/{part}", {"validation": curve}
    return Panel(f"{title} ({unit})" if unit in UNITS else title, curves)


def _parsed(name: str) -> tuple[str, str, str]:
    """(measure, part, unit), empty where there is none."""
    measure, _, rest = name.partition("/")
    if rest in SHARES:
        return measure, rest, "share"
    unit = next((unit for unit in UNITS if f"/{rest}".endswith(f"/{unit}")), "")
    return measure, rest.removesuffix(unit).removesuffix("/"), unit
