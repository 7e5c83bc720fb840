from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.fluid.csv_tree import COLUMNS, STATES, write_case, write_source
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.source import agree_on_schema, find_cases, stamp


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for number in range(1, 41):
        (tmp_path / f"train/case_{number:04d}").mkdir(parents=True)
    for number in range(1, 4):
        (tmp_path / f"test/case_{number:04d}").mkdir(parents=True)
    return tmp_path


def held_out(source: Path, fraction: float, seed: int = 42) -> set[str]:
    return {case.name for case in find_cases(source, fraction, seed) if case.split == "val"}


@pytest.mark.parametrize(("fraction", "count"), [(0, 0), (0.001, 1), (0.1, 4), (0.12, 5), (0.5, 20), (0.99, 39)])
def test_the_fraction_is_a_share_of_the_training_cases(many: Path, fraction: float, count: int) -> None:
    cases = find_cases(many, fraction, seed=42)
    assert [sum(case.split == split for case in cases) for split in ("train", "val", "test")] == [40 - count, count, 3]
    assert [case.key for case in cases] == sorted(case.key for case in cases if case.split != "test") + [
        f"test/case_{number:04d}" for number in range(1, 4)
    ]
    assert {case.outputs for case in cases if case.split != "test"} == {True}


def test_the_seed_chooses_the_validation_cases(many: Path) -> None:
    assert held_out(many, 0.5) == held_out(many, 0.5)
    assert len({frozenset(held_out(many, 0.5, seed)) for seed in range(20)}) == 20
    chosen = [name for seed in range(200) for name in held_out(many, 0.5, seed)]
    for name in (f"case_{number:04d}" for number in range(1, 41)):
        assert 60 < chosen.count(name) < 140  # 100 expected, with a standard deviation of 7


def test_a_further_case_moves_at_most_one_other(many: Path) -> None:
    before = held_out(many, 0.5)
    (many / "train/case_9999").mkdir()
    assert len(before - held_out(many, 0.5)) <= 1


def test_one_training_case_stays_a_training_case(tmp_path: Path) -> None:
    (tmp_path / "train/only").mkdir(parents=True)
    assert [case.split for case in find_cases(tmp_path, 0.5, 0)] == ["train"]


def test_files_and_hidden_folders_are_no_cases(many: Path) -> None:
    (many / "train/notes.txt").write_text("x")
    (many / "train/.cache").mkdir()
    assert len(find_cases(many, 0, 0)) == 43


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such folder: --source needs ROOT/train/<case>/\*\.csv"):
        find_cases(tmp_path / "absent", 0.1, 42)
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty/train: no case folders"):
        find_cases(tmp_path / "empty", 0.1, 42)


def test_the_columns_of_most_cases_are_the_schema(tmp_path: Path) -> None:
    write_source(tmp_path, train=4, test=1)
    rename = {"C": lambda text: [text[0].replace("C_001_pwr", "C_777_pwr"), *text[1:]]}
    write_case(tmp_path / "train/case_0001", 1, rename)  # the first is the odd one
    other_order = {"N": lambda text: [",".join(line.split(",")[k] for k in (0, 2, 1)) for line in text]}
    write_case(tmp_path / "train/case_0003", 3, other_order)
    (tmp_path / "test/case_0001/Boundary.csv").write_text("TIME,B_001:FR\n")
    schema, bad = agree_on_schema(find_cases(tmp_path, 0.1, 42))
    assert schema.boundary == COLUMNS["Boundary"]
    assert schema.states == tuple(STATES)
    assert sorted(bad) == ["test/case_0001", "train/case_0001"]
    assert "C.csv: line 1: column 'C_001_pwr' is missing" in str(bad["train/case_0001"])
    assert "Boundary.csv: line 1: column 'T_001:SNQ' is missing" in str(bad["test/case_0001"])


def test_no_readable_headers_are_an_error(tmp_path: Path) -> None:
    write_source(tmp_path, train=2, test=0)
    for number in (1, 2):
        (tmp_path / f"train/case_{number:04d}/Boundary.csv").unlink()
    with pytest.raises(DataError, match=r"case_0001/Boundary\.csv: missing"):
        agree_on_schema(find_cases(tmp_path, 0.1, 42))


@pytest.mark.parametrize("few", [("case_0003",), ("case_0001", "case_0002", "case_0004")])
def test_a_file_that_most_cases_have_is_needed_in_each(tmp_path: Path, few: tuple[str, ...]) -> None:
    write_source(tmp_path, train=4, test=1)
    for name in few:
        (tmp_path / "train" / name / "P.csv").unlink()
    for case in (tmp_path / "train").iterdir():
        (case / "H.csv").unlink()
    schema, bad = agree_on_schema(find_cases(tmp_path, 0.1, 42))
    assert schema.groups["H"] == ()
    if len(few) == 1:
        assert schema.states == tuple(STATES)
        assert list(bad) == ["train/case_0003"]
        assert "case_0003/P.csv: missing: a case with outputs needs" in str(bad["train/case_0003"])
    else:
        assert schema.groups["P"] == ()
        assert list(bad) == ["train/case_0003"]
        assert "case_0003/P.csv: line 1: column 'P_001_inv' is not expected" in str(bad["train/case_0003"])


def test_an_empty_file_and_none_are_the_same_columns(tmp_path: Path) -> None:
    write_source(tmp_path, train=3, test=0)
    (tmp_path / "train/case_0002/H.csv").unlink()
    schema, bad = agree_on_schema(find_cases(tmp_path, 0.1, 42))
    assert (schema.states, bad) == (tuple(STATES), {})


def test_a_stamp_changes_with_the_files(tmp_path: Path) -> None:
    cases = find_cases(write_source(tmp_path, train=2), 0, 42)
    schema, _ = agree_on_schema(cases)
    before = stamp(cases[0], schema)
    assert stamp(cases[0], schema) == before
    path = cases[0].folder / "N.csv"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert stamp(cases[0], schema) != before
