"""Which validation metrics stand together in a picture: those of one measure and one unit.

    metric_panels({"rmse": ..., "rmse/P": ..., "rmse/P/bar": ...}, {"bar": "bar"})     panels "rmse" and "rmse (bar)"

A name is MEASURE, MEASURE/PART, MEASURE/UNIT or MEASURE/PART/UNIT. The task says what is a unit: Task.metric_units.
Another measure whose name ends in this one's, such as "persistence_rmse", is what it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

from trunkline.engine.record.history import Series
from trunkline.engine.record.report_plots import COMPARED, VALIDATION, Panel


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
    kinds: dict[tuple[str, str], dict[str, str]] = {}
    for measure, _, unit in named.values():
        if measure not in compared:
            panels.setdefault((measure, unit), {})
    for name, (measure, part, unit) in named.items():
        if measure in compared and not part:
            label = f"{measure.removesuffix(f'_{compared[measure]}')} (compared)"
            of_its, kind = (compared[measure], unit), COMPARED
        else:
            label = part or "validation"
            of_its, kind = (measure, unit), "" if part else VALIDATION
        if of_its in panels and "/" not in part:
            panels[of_its][label] = curves[name]
            kinds.setdefault(of_its, {})[label] = kind
    return [_panel(*key, units, of, kinds[key]) for key, of in panels.items() if of]


def _panel(
    measure: str, ending: str, units: Mapping[str, str], curves: dict[str, Series], kinds: dict[str, str]
) -> Panel:
    title, unit = measure, units.get(ending, "")
    if len(curves) == 1 and VALIDATION not in kinds.values():
        ((part, curve),) = curves.items()
        title, curves, kinds = f"{measure}/{part}", {"validation": curve}, {"validation": VALIDATION}
    return Panel(f"{title} ({unit})" if unit else title, curves, kinds=kinds)


def _parsed(name: str, units: Mapping[str, str]) -> tuple[str, str, str]:
    """(measure, part, ending that tells the unit), empty where there is none. Of several endings the longest counts."""
    measure, _, rest = name.partition("/")
    unit = max((unit for unit in units if f"/{rest}".endswith(f"/{unit}")), key=len, default="")
    return measure, rest.removesuffix(unit).removesuffix("/"), unit
