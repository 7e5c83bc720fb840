"""Which validation metrics stand together in a picture: those of one measure and one unit.

    metric_panels({"rmse": ..., "rmse/P": ..., "rmse/P/bar": ...}, {"bar": "bar"})     panels "rmse" and "rmse (bar)"

A name is MEASURE, MEASURE/PART, MEASURE/UNIT or MEASURE/PART/UNIT. The task says what is a unit: Task.metric_units.
Another measure whose name ends in this one's, such as "persistence_rmse", is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from trunkline.engine.record.history import Series
from trunkline.engine.record.report_plots import Panel


def metric_panels(curves: Mapping[str, Series], units: Mapping[str, str]) -> list[Panel]:
    """Of each measure a panel for each unit, with its parts and what it is compared with, in order of appearance.

    Parts of one measure without an overall value ("rewards/chosen", "rewards/rejected") share a panel too; one that is
    alone gives it its name. Parts of parts ("class/cat/recall") are left out.
    """
    named = {name: _parsed(name, units) for name in curves}
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
    return [_panel(measure, units.get(unit, ""), of) for (measure, unit), of in panels.items() if of]


def _panel(measure: str, unit: str, curves: dict[str, Series]) -> Panel:
    title = measure
    if len(curves) == 1 and "validation" not in curves:
        ((part, curve),) = curves.items()
        title, curves = f"{measure}/{part}", {"validation": curve}
    return Panel(f"{title} ({unit})" if unit else title, curves)


def _parsed(name: str, units: Mapping[str, str]) -> tuple[str, str, str]:
    """(measure, part, ending that tells the unit), empty where there is none. Of several endings the longest counts."""
    measure, _, rest = name.partition("/")
    unit = max((unit for unit in units if f"/{rest}".endswith(f"/{unit}")), key=len, default="")
    return measure, rest.removesuffix(unit).removesuffix("/"), unit
