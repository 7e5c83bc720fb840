from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from trunkline.engine.errors import DataError
from trunkline.engine.record.history import Series, read_history
from trunkline.engine.record.metrics_file import RESUMED, MetricsFile
from trunkline.engine.record.pictures import BLUE, GREY, RED
from trunkline.engine.record.report import _losses, write_report
from trunkline.engine.record.report_plots import COMPARED, TRAIN, VALIDATION, Panel, plot_panels, smooth

CONFIG = {"workload": "tiny", "training": {"best": {"metric": "rmse", "mode": "min"}}, "model": {"d": 64}}


def _run(folder: Path) -> Path:
    file = MetricsFile.open(folder / "metrics.jsonl")
    for step in range(10, 61, 10):
        values = {"loss": 1 / step, "lr": 1e-3, "grad_norm": 2.0, "samples_per_s": 100.0, "step_time_s": 0.5}
        values |= {"words_per_s": 2500.0}
        file.log(step, "train", values | {"host_memory_gib": 1.0 + step / 100, "mfu": 0.41})
        if step == 30:
            file.log(step, "skipped", {"skipped_steps": 1})
        if step % 20 == 0:
            rmse = {20: 0.5, 40: 0.25, 60: 0.375}[step]
            file.log(step, "val", {"rmse": rmse, "rmse/P": rmse / 2, "rmse/P|x": 1.0, "persistence_rmse": 0.75})
    file.close()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "plan.json").write_text(json.dumps({"steps": 60, "parameters": 1234567, "world_size": 2}))
    return folder


def _short_run(folder: Path, config: str) -> Path:
    """A run with a single curve, which is soon drawn."""
    file = MetricsFile.open(folder / "metrics.jsonl")
    for step, value in ((20, 0.5), (40, 0.25)):
        file.log(step, "val", {"rmse": value})
    file.close()
    (folder / "config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(_run(tmp_path_factory.mktemp("run"))).parent


def test_the_summary_states_the_run(report: Path) -> None:
    text = (report / "summary.md").read_text()
    for line in (
        "| parameters | 1,234,567 |",
        "| ranks | 2 |",
        "| steps | 60 of 60 |",
        "| best validation rmse | 0.25 at step 40 |",
        "| skipped steps | 1 |",
        "| time in training steps | 30 s (evaluations and saves not counted) |",
        "| throughput, median | 100 samples/s, 2,500 words/s |",
        "| share of the device's peak, median | 41.0% |",
        "| memory of rank 0, most | 1.6 GiB |",
        "| metric | best, step 40 | last, step 60 |",
        "| rmse | 0.25 | 0.375 |",
        "| persistence_rmse | 0.75 | 0.75 |",
        "| rmse/P\\|x | 1 | 1 |",
    ):
        assert line in text.splitlines(), line
    assert json.dumps(CONFIG, indent=2) in text


def test_every_picture_that_the_summary_shows_is_one(report: Path) -> None:
    text = (report / "summary.md").read_text()
    pictures = [path.name for path in report.glob("*.png")]
    assert sorted(pictures) == ["gradient_norm.png", "learning_rate.png", "loss.png", "metrics.png", "throughput.png"]
    for name in pictures:
        assert f"({name})" in text
        pixels = imread(report / name)
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01


def test_a_metric_that_should_grow_is_best_where_it_is_largest(tmp_path: Path) -> None:
    run = _short_run(tmp_path, '{"training": {"best": {"metric": "rmse", "mode": "max"}}}')
    assert "| best validation rmse | 0.5 at step 20 |" in write_report(run).read_text()


@pytest.mark.parametrize("content", ["", "\n\n", '{"step": 4, "spl', "[1, 2]\nnull\n{}\n", "\x00\x01"])
def test_a_run_that_logged_nothing_still_has_a_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    text = write_report(tmp_path).read_text()
    assert "Nothing was logged" in text
    assert not list((tmp_path / "report").glob("*.png"))


def test_nan_values_are_left_out_of_curves_and_shown_in_the_table(tmp_path: Path) -> None:
    file = MetricsFile.open(tmp_path / "metrics.jsonl")
    file.log(1, "train", {"loss": math.nan, "lr": 0.0})
    file.log(2, "train", {"loss": math.inf})
    file.log(2, "val", {"loss": math.nan})
    file.close()
    text = write_report(tmp_path).read_text()
    assert "| loss | nan | nan |" in text
    assert not (tmp_path / "report" / "loss.png").exists()
    assert "best validation" not in text


@pytest.mark.parametrize("config", ["", "[]", "{", '{"training": {"best": {"metric": "accuracy"}}}'])
def test_a_missing_or_damaged_configuration_costs_only_what_it_holds(tmp_path: Path, config: str) -> None:
    assert "| steps | 40 |" in write_report(_short_run(tmp_path, config)).read_text().splitlines()


def test_what_the_task_shows_is_linked_pictures_in_sight(tmp_path: Path) -> None:
    run = _short_run(tmp_path, "{}")
    assert "Shown" not in write_report(run).read_text()
    (run / "shown").mkdir()
    for name in ("confusion.png", "classes.md", ".half-written.png"):
        (run / "shown" / name).write_text("")
    lines = write_report(run).read_text().splitlines()
    assert {"![confusion](../shown/confusion.png)", "[classes.md](../shown/classes.md)"} <= set(lines)
    assert not any("half" in line for line in lines)


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(_short_run(tmp_path, "{}"))
    assert (tmp_path / "report" / "metrics.png").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["summary.md"]


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/metrics\.jsonl: not found"):
        write_report(tmp_path / "nowhere")


def test_a_report_that_is_no_folder_is_named(tmp_path: Path) -> None:
    run = _short_run(tmp_path, "{}")
    (run / "report").write_text("mine")
    with pytest.raises(DataError, match=r"report: cannot be made \(File exists\); move away what is there"):
        write_report(run)


def test_where_a_run_was_resumed_and_left_its_schedule_is_marked(tmp_path: Path) -> None:
    run = _short_run(tmp_path, "{}")
    file = MetricsFile(run / "metrics.jsonl")
    one, two = "deepspeed ZeRO 1, fp32, 1 rank", "fsdp ZeRO 3, fp32, 2 ranks"
    file.log(20, RESUMED, {}, {"from": one, "to": two})
    file.log(20, RESUMED, {}, {"from": one, "to": one, "lr_before": 1e-3, "lr_after": 5e-4})
    file.log(
        40, "train", {"loss": 1.0}, {"time": 1.5, "epoch": 2.5, "words_seen": 70, "samples_seen": 30, "seconds": 7.5}
    )
    file.close()
    lines = write_report(run).read_text().splitlines()
    assert {
        "| resumed after step | 20, 20 |",
        f"| 20 | {one} | {two} | its schedule's |",
        f"| 20 | {one} | the same | 0.001, now 0.0005: another schedule |",
        "| epochs | 2.5 |", "| samples | 30 |", "| words | 70 |",
        "| time in training steps | 7.5 s (evaluations and saves not counted) |",
    } <= set(lines)  # fmt: skip
    assert not any("epoch |" in line or "words_seen" in line for line in lines)  # no metric


def test_a_validation_loss_of_another_kind_has_axes_of_its_own(tmp_path: Path) -> None:
    run = _short_run(tmp_path, "{}")
    (run / "plan.json").write_text('{"validation_loss": "not smoothed", "metric_units": 5}')
    history = read_history(run)
    assert [panel.title for panel in _losses(history)] == ["training loss", "validation loss: not smoothed"]
    assert (
        "| training and validation loss | cannot be compared: validation's is not smoothed |"
        in write_report(run).read_text()
    )
    (run / "plan.json").write_text("{}")
    assert [list(panel.curves) for panel in _losses(read_history(run))] == [["train", "validation"]]


def test_any_number_of_comparisons_are_drawn_in_dashes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, plot = [], Axes.plot

    def noted(axes: Axes, *curve: Any, **style: Any) -> Any:
        drawn.append(style.get("ls"))
        return plot(axes, *curve, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    curves = {f"{name} (compared)": Series([1, 2], [1.0, 2.0]) for name in "abcdefg"}
    plot_panels(tmp_path / "metrics.png", [Panel("rmse", curves, kinds=dict.fromkeys(curves, COMPARED))])
    assert len(set(drawn)) == 7


def test_a_curve_is_drawn_as_its_kind_and_not_as_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, plot = [], Axes.plot

    def noted(axes: Axes, *curve: Any, **style: Any) -> Any:
        drawn.append((style["label"], style["color"]))
        return plot(axes, *curve, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    names = ["train", "validation", "other (compared)"]
    curves = {name: Series([1, 2], [1.0, 2.0]) for name in names}
    plot_panels(tmp_path / "runs.png", [Panel("loss", curves)], best_step=2)
    assert [label for label, _ in drawn] == names
    assert len({colour for _, colour in drawn} - {BLUE, RED, GREY}) == 3
    drawn.clear()
    kinds = {"train": VALIDATION, "validation": COMPARED, "other (compared)": TRAIN}
    plot_panels(tmp_path / "runs.png", [Panel("loss", curves, kinds=kinds)])
    assert [colour for _, colour in drawn] == [RED, GREY, BLUE]


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    line = [0.5 * step for step in range(200)]
    assert smooth(line) == pytest.approx(line)
    noise = [1.0, -1.0] * 100
    assert max(abs(value) for value in smooth(noise)[20:-20]) < 0.15
    assert smooth([3.0]) == [3.0]


def test_a_picture_without_any_value_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    path.write_bytes(b"of an earlier report")
    assert not plot_panels(path, [Panel("loss", {"train": Series([], [])})])
    assert not path.exists()


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-30, 1e30], [-1.0, 1.0], [5.0]])
def test_any_finite_values_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    series = Series(list(range(1, len(values) + 1)), values)
    for from_zero in (False, True):
        panel = Panel("loss", {"train": series, "part": Series([], [])}, smoothed=True, from_zero=from_zero)
        assert plot_panels(tmp_path / "loss.png", [panel], best_step=1, skipped_steps=[1])


@pytest.mark.parametrize("name", ["price in $ or $ a day", r"$\frac$", r"a\$b", "100 %", "a_b^c"])
def test_a_name_is_drawn_as_it_stands(tmp_path: Path, name: str) -> None:
    """Between two $ matplotlib reads mathematics, and raises ValueError where it cannot."""
    for kind in (TRAIN, VALIDATION, COMPARED):
        panel = Panel(name, {name: Series([1, 2], [1.0, 2.0])}, {name: kind})
        assert plot_panels(tmp_path / "panels.png", [panel], marks={name: [1]})
