from __future__ import annotations

import argparse
from pathlib import Path

import pandas
import pytest

from tests.models.fluid.csv_tree import write_case
from trunkline.benchmarks import fluid_prepare as bench_prepare
from trunkline.benchmarks.flags import prepare
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.cases import read_columns, schema_of


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare(parser)
    return parser.parse_args(flags)


def test_the_random_case_has_the_reference_networks_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prepare, "MINUTES", 60)  # the columns are what counts here
    bench_prepare.write_random_case(tmp_path, seed=0)
    schema = schema_of(read_columns(tmp_path))
    assert (schema.num_boundary, schema.num_states, schema.num_variables) == (538, 6174, 6712)
    sizes = {group: len(names) for group, names in schema.groups.items()}
    assert sizes == {"B": 2058, "C": 161, "H": 192, "N": 1716, "P": 1610, "R": 50, "T&E": 387}


def test_both_readers_are_timed_in_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_prepare.run(arguments("--case", str(write_case(tmp_path)), "--rounds", "2")) in (0, 1)
    said = capsys.readouterr().out
    assert said.count(" s (1.0x)") >= 2
    assert "median, one thread: " in said
    assert "median, default (" in said


def test_no_speed_is_told_when_the_readers_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_csv = pandas.read_csv
    monkeypatch.setattr(pandas, "read_csv", lambda path: read_csv(path).replace(11_000, 11_001))
    with pytest.raises(DataError, match="the two readers disagree"):
        bench_prepare.run(arguments("--case", str(write_case(tmp_path)), "--rounds", "1"))
    assert "median" not in capsys.readouterr().out
