from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.models.fluid.csv_tree import STATES, output, write_case, write_source
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.fluid.prepare import prepare
from trunkline.models.fluid.store import Store

ROOT = Path(__file__).parents[3]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_source(tmp_path_factory.mktemp("source"), train=5, test=1)
    (root / "network.json").write_text('{"nodes": []}\n')
    return root


def test_a_source_becomes_a_store(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert prepare(source, out, val_fraction=0.4, workers=1) == {}
    store = Store.open(out)
    assert [len(store.cases(split)) for split in ("train", "val", "test")] == [3, 2, 1]
    assert sorted(store.cases("train") + store.cases("val")) == [f"case_{k:04d}" for k in range(1, 6)]
    for split in ("train", "val"):
        for name in store.cases(split):
            state = store.state(split, name)
            assert state is not None
            number = int(name[-1])
            assert state[:, 3].tolist() == [output(3, minute, number) for minute in range(1, 1441)]
            assert store.day(split, name) == "2025-01-01"
    assert store.state("test", "case_0001") is None
    assert json.loads((out / "network.json").read_text()) == {"nodes": []}
    assert json.loads((out / "store.json").read_text())["skipped"] == {}
    # Statistics know the training split only.
    numbers = [int(name[-1]) for name in store.cases("train")]
    expected = np.mean([output(3, minute, number) for number in numbers for minute in range(1, 1441)])
    assert store.statistics["mean"][2 + 3] == pytest.approx(expected, rel=1e-12)
    store.verify()


def test_the_number_of_workers_changes_nothing(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "one", workers=1)
    prepare(source, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def state_of_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of change: a file system may give a new file the inode of the one that it replaces."""
    states = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (state.st_ino, state.st_mtime_ns) for path, state in states.items()}


def test_a_second_run_does_nothing_until_the_source_changes(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", train=3), tmp_path / "store"
    prepare(source, out, workers=1)
    before = state_of_files(out)
    first = Store.open(out).fingerprint
    prepare(source, out, workers=1)
    assert state_of_files(out) == before
    assert Store.open(out).fingerprint == first

    write_case(source / "train/case_0002", 9)
    prepare(source, out, workers=1)
    now = state_of_files(out)
    changed = {path.parent.name for path in before if path.name == "state.npy" and now[path] != before[path]}
    assert changed == {"case_0002"}
    store = Store.open(out)
    assert store.fingerprint != first
    split = next(split for split in ("train", "val") if "case_0002" in store.cases(split))
    assert store.state_rows(split, "case_0002", 0, 1)[0, 0] == output(0, 1, 9)


def test_another_network_is_copied_and_no_case_is_read_again(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", train=2), tmp_path / "store"
    for network in ('{"nodes": []}', '{"nodes": [1]}', None):
        kept = {path: path.stat().st_ino for path in out.glob("*/case_*/*")}
        (source / "network.json").unlink(missing_ok=True)
        if network is not None:
            (source / "network.json").write_text(network)
        prepare(source, out, workers=1)
        assert {path: path.stat().st_ino for path in kept} == kept
        store = Store.open(out)
        assert ("network.json" in store.files, (out / "network.json").is_file()) == (network is not None,) * 2
        assert network is None or (out / "network.json").read_text() == network


def test_cases_that_left_the_source_leave_the_store(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", train=3), tmp_path / "store"
    prepare(source, out, workers=1)
    for file in (source / "train/case_0003").iterdir():
        file.unlink()
    (source / "train/case_0003").rmdir()
    prepare(source, out, workers=1)
    prepare(source, tmp_path / "fresh", workers=1)
    assert content(out) == content(tmp_path / "fresh")


def test_a_damaged_case_is_written_again(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "whole", workers=1)
    prepare(source, tmp_path / "store", workers=1)
    for path in sorted((tmp_path / "store/train").iterdir())[:2]:
        (path / "state.npy").write_bytes(b"cut")
    prepare(source, tmp_path / "store", workers=1)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_killed_in_the_middle_it_goes_on_to_the_same_store(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", train=16, test=1)
    out = tmp_path / "store"
    command = [sys.executable, str(ROOT / "launchers/prepare.py"), "fluid", "--source", str(source), "--out", str(out)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(out.glob("*/case_*/part.json")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert 0 < len(list(out.glob("*/case_*/part.json"))) < 17, "the kill did not come in the middle"
    with pytest.raises(DataError, match="was not finished"):
        Store.open(out)

    half = out / "train/.case_0001.partial"
    half.mkdir(parents=True, exist_ok=True)
    (half / "state.npy").write_bytes(b"\0" * 100)
    kept = {path: path.stat().st_ino for path in out.glob("*/case_*/part.json")}
    prepare(source, out, workers=1)
    assert {path: path.stat().st_ino for path in kept} == kept, "finished cases were written again"
    prepare(source, tmp_path / "unbroken", workers=1)
    assert content(out) == content(tmp_path / "unbroken")


def test_bad_cases_stop_it_or_are_left_out_and_listed(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", train=6), tmp_path / "store"
    write_case(source / "train/case_0002", 2, {"N": lambda text: [*text[:-1], text[-1] + "x"]})
    write_case(source / "train/case_0005", 5, {"R": lambda text: ["TIME,R_009_q", *text[1:]]})
    (source / "test/case_0001/Boundary.csv").unlink()
    with pytest.raises(DataError, match=r"Boundary\.csv: missing.* \(--skip-bad-cases leaves such cases out\)"):
        prepare(source, out, workers=1)
    skipped = prepare(source, out, workers=1, skip_bad_cases=True)
    assert list(skipped) == ["test/case_0001", "train/case_0002", "train/case_0005"]
    assert "N.csv: line 1441, column 'N_001_t'" in skipped["train/case_0002"]
    assert "R.csv: line 1: column 'R_001_q' is missing" in skipped["train/case_0005"]
    store = Store.open(out)
    assert json.loads((out / "store.json").read_text())["skipped"] == skipped
    assert not {"case_0002", "case_0005"} & {*store.cases("train"), *store.cases("val")}
    assert store.cases("test") == []
    assert not (out / "train/case_0002").exists()

    before = content(out)
    assert prepare(source, out, workers=1, skip_bad_cases=True) == skipped
    assert content(out) == before
    write_case(source / "train/case_0002", 2)
    write_case(source / "train/case_0005", 5)
    write_case(source / "test/case_0001", 1)
    assert prepare(source, out, workers=2) == {}
    assert len(Store.open(out).cases("train") + Store.open(out).cases("val")) == 6


def test_the_columns_of_most_cases_count(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", train=5)
    rename = {"C": lambda text: [text[0].replace("C_001_pwr", "C_777_pwr"), *text[1:]]}
    write_case(source / "train/case_0001", 1, rename)  # the first is the odd one
    skipped = prepare(source, tmp_path / "store", workers=1, skip_bad_cases=True)
    assert list(skipped) == ["train/case_0001"]
    assert Store.open(tmp_path / "store").schema.states == tuple(STATES)


def test_training_cases_need_outputs(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    write_case(source / "train/case_0009", outputs=False)
    with pytest.raises(DataError, match=r"train/case_0009: has no output file, which a case with outputs needs"):
        prepare(source, tmp_path / "store", workers=1)


def test_a_network_without_heaters_needs_no_file_of_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trunkline.launchers.prepare import main

    prepare(source, tmp_path / "with", workers=1)
    shutil.copytree(source, tmp_path / "source")
    for path in (tmp_path / "source").rglob("H.csv"):
        path.unlink()
    assert main(["fluid", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "without")]) == 0
    assert "no columns of the groups H: taken as a network without such devices" in capsys.readouterr().out
    one, two = (Store.open(tmp_path / name) for name in ("with", "without"))
    assert one.schema == two.schema
    for case in one.cases("train"):
        np.testing.assert_array_equal(one.state("train", case), two.state("train", case))


def test_cases_whose_boundary_has_another_number_of_rows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trunkline.launchers.prepare import main

    source = write_source(tmp_path / "source", train=4, test=2)
    command = ["fluid", "--source", str(source), "--out", str(tmp_path / "store"), "--skip-bad-cases"]
    assert main(command) == 0
    assert "Boundary.csv" not in capsys.readouterr().out
    hourly = {"Boundary": lambda text: [text[0], *text[1::2], ""]}
    write_case(source / "train/case_0002", 2, hourly)
    write_case(source / "test/case_0002", 2, hourly, outputs=False)
    (source / "train/case_0003/Boundary.csv").write_text("")
    for _ in range(2):  # again where all is done already
        assert main(command) == 0
        assert (
            "Boundary.csv has 48 rows in most cases, another number in 2: train/case_0002 (24), test/case_0002 (24): "
            in capsys.readouterr().out
        )


def test_columns_whose_scale_one_value_decides_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trunkline.launchers.prepare import main

    def once(value: str, others: str | None = None) -> Callable[[list[str]], list[str]]:
        """The last column has a value in one minute, and in the others 0 or what it had."""

        def edit(text: list[str]) -> list[str]:
            head = [line.rpartition(",")[0] for line in text]
            tail = [line.rpartition(",")[2] if others is None else others for line in text]
            return [text[0], *(f"{a},{value if k == 9 else b}" for k, (a, b) in enumerate(zip(head, tail)) if k)]

        return edit

    source = write_source(tmp_path / "source", train=4, test=1)
    command = ["fluid", "--source", str(source), "--out", str(tmp_path / "store"), "--val-fraction", "0"]
    off = {file: once("0", "0") for file in ("C", "P", "R")} | {"B": once("", "")}  # the last one has no value at all
    rare = {"P": once("1", "0"), "R": once("50000", "0")}  # a switch and a flow
    for number, edits in enumerate((rare, {}, {}, {}), start=1):
        write_case(source / f"train/case_{number:04d}", number, off | edits)
    assert main(command) == 0
    assert "from the median" not in capsys.readouterr().out
    write_case(source / "train/case_0002", 2, off | {"N": once("-1e30"), "C": once("-1e30", "0")})
    for _ in range(2):  # again where all is done already
        assert main(command) == 0
        assert (
            "columns in which a value lies more than 1,000 times further from the median than most others do: "
            "C_001_pwr (-1e+30), N_001_t (-1e+30). If it is a code for a missing value, leave the cell empty: "
            "it spoils the column's scale.\n"
        ) in capsys.readouterr().out


def test_with_no_good_case_there_is_no_store(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", train=2)
    for number in (1, 2):
        write_case(source / f"train/case_{number:04d}", number, {"P": lambda text: text[:-5]})
    with pytest.raises(DataError, match=r"no training case is left: .*P\.csv: line 1436"):
        prepare(source, tmp_path / "store", workers=1, skip_bad_cases=True)
    with pytest.raises(DataError, match="was not finished"):
        Store.open(tmp_path / "store")


def test_only_one_preparation_writes_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another preparation is writing this folder"):
        prepare(source, out, workers=1)
    os.close(held)
    prepare(source, out, workers=1)


def test_an_out_that_is_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"jpg")
    with pytest.raises(DataError, match=r"photos: not empty and not a prepared data set: choose another --out"):
        prepare(source, tmp_path / "photos", workers=1)
    assert content(tmp_path / "photos") == {"one.jpg": b"jpg"}
    with pytest.raises(DataError, match="not a folder"):
        prepare(source, tmp_path / "photos/one.jpg", workers=1)
    for out in (source, source / "train", source.parent):
        with pytest.raises(DataError, match="contain one another"):
            prepare(source, out, workers=1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_its_range_is_refused(source: Path, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="--val-fraction"):
        prepare(source, tmp_path / "store", val_fraction=fraction)
