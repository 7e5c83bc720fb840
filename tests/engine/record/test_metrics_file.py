"""metrics.jsonl: what is written comes back, and what a resume or a kill has left over does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trunkline.engine.errors import ConfigError
from trunkline.engine.record.metrics_file import MetricsFile, read_metrics


def strict(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def _write_steps(path: Path, steps: range) -> None:
    file = MetricsFile.open(path)
    for step in steps:
        file.log(step, "train", {"loss": 1 / step})
    file.close()


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": math.pi, "d": 5e-324, "count": 3}
    file = MetricsFile.open(tmp_path / "metrics.jsonl")
    file.log(1, "train", values)
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", **values}]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    file = MetricsFile.open(tmp_path / "metrics.jsonl")
    file.log(7, "val", {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 7, "split": "val", "loss": 0.5}\n'


def test_nan_and_infinities_stay_strict_json_and_come_back(tmp_path: Path) -> None:
    file = MetricsFile.open(tmp_path / "metrics.jsonl")
    file.log(1, "train", {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "lr": 0.1})
    line = strict((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "low": "-inf"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["low"], row["lr"]) == (math.inf, -math.inf, 0.1)
    assert "nonfinite" not in row


def test_resuming_withdraws_the_lines_after_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 11))
    file = MetricsFile.open(path, resume_step=6)
    file.log(7, "train", {"loss": 0.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert read_metrics(path)[-1]["loss"] == 0.0


@pytest.mark.parametrize("torn", ['{"step": 4, "spl', "{", '{"step": 4, "split": "train", "loss": 1.0}', "\ufffd\x00"])
def test_a_line_torn_by_a_kill_is_dropped_and_the_next_one_stands_alone(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 4))
    with path.open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    resumed = MetricsFile.open(path, resume_step=4)
    resumed.log(5, "train", {"loss": 0.2})
    assert [strict(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 5]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    _write_steps(tmp_path / "metrics.jsonl", range(1, 4))
    MetricsFile.open(tmp_path / "metrics.jsonl", resume_step=0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written"):
        MetricsFile.open(tmp_path / "metrics.jsonl")


def test_an_evaluation_that_is_due_again_is_withdrawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile.open(path)
    for step, split in ((5, "val"), (6, "train"), (6, "val"), (7, "train")):
        file.log(step, split, {"loss": 1.0})
    MetricsFile.open(path, resume_step=6, evaluation_due=True)
    assert [(row["step"], row["split"]) for row in read_metrics(path)] == [(5, "val"), (6, "train")]
