"""Which metrics share a pair of axes: what each workload logs, and names that could be taken for others."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.engine.record import report
from trunkline.engine.record.history import Series
from trunkline.engine.record.metric_panels import metric_panels
from trunkline.engine.record.metrics_file import MetricsFile
from trunkline.models.causal_lm.task import PreferenceTask
from trunkline.models.fluid.task import FluidTask

UNITS = {**FluidTask.metric_units, **PreferenceTask.metric_units}


def panels(*names: str) -> dict[str, list[str]]:
    found = metric_panels({name: Series([1], [float(k)]) for k, name in enumerate(names)}, UNITS)
    for panel in found:
        for series in panel.curves.values():
            assert series.steps == [1]
    return {panel.title: list(panel.curves) for panel in found}


def test_each_unit_has_its_own_panel_with_its_parts_and_what_it_is_compared_with() -> None:
    names = [
        "rmse",
        "rmse/P",
        "rmse/T&E",
        "rmse/MPa",
        "rmse/m3/s",
        "rmse/m3",
        "rmse/P/MPa",
        "rmse/T&E/m3/s",
        "rmse/P/m3",
    ]
    assert panels(*names, *(f"persistence_{name}" for name in names)) == {
        "rmse": ["validation", "P", "T&E", "persistence (compared)"],
        "rmse (MPa)": ["validation", "P", "persistence (compared)"],
        "rmse (Nm3/s)": ["validation", "T&E", "persistence (compared)"],
        "rmse (Nm3)": ["validation", "P", "persistence (compared)"],
    }


def test_what_has_no_unit_or_no_known_one_has_a_panel_too() -> None:
    assert panels("rmse", "rmse/-", "rmse/B/-", "rmse/?", "rmse/N/?") == {
        "rmse": ["validation"],
        "rmse (no unit)": ["validation", "B"],
        "rmse (?)": ["validation", "N"],
    }


def test_every_curve_is_that_of_its_name() -> None:
    curves = {name: Series([1], [float(k)]) for k, name in enumerate(["rmse/kW", "mean_rmse/kW", "rmse/C/kW"])}
    (panel,) = metric_panels(curves, UNITS)
    assert {label: series.values for label, series in panel.curves.items()} == {
        "validation": [0.0], "mean (compared)": [1.0], "C": [2.0]
    }  # fmt: skip


def test_parts_without_a_whole_share_a_panel_but_for_a_share() -> None:
    assert panels("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "prefers_chosen") == {
        "rewards": ["chosen", "rejected", "margins"],
        "rewards (accuracy, a share)": ["validation"],
        "prefers_chosen": ["validation"],
    }


def test_what_the_other_workloads_log_is_drawn_as_it_was() -> None:
    image = ["accuracy", "error_rate", "top5", "precision", "macro/precision", "macro/recall", "class/cat/precision"]
    assert panels(*image) == {
        "accuracy": ["validation"], "error_rate": ["validation"], "top5": ["validation"], "precision": ["validation"],
        "macro": ["precision", "recall"],
    }  # fmt: skip
    text = ["perplexity", "token_accuracy", "bits_per_token", "generated", "exact_match", "bleu", "chrf"]
    assert panels(*text) == {name: ["validation"] for name in text}


def test_metrics_with_parts_share_a_panel_with_or_without_a_whole() -> None:
    assert panels("rmse", "rmse/P", "mean_rmse", "rewards/chosen", "rewards/rejected") == {
        "rmse": ["validation", "P", "mean (compared)"],
        "rewards": ["chosen", "rejected"],
    }


def test_panels_that_are_not_drawn_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_PANELS", 1)
    for count in (1, 2):
        file = MetricsFile.open(tmp_path / "metrics.jsonl")
        file.log(count, "val", {f"metric{number}": 1.0 for number in range(count)})
        file.close()
        text = report.write_report(tmp_path).read_text()
        assert ("Of 2 panels of metrics the first 1 are drawn" in text) == (count == 2)
