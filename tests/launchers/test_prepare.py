from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models.fluid.csv_tree import write_case, write_source
from trunkline.launchers.prepare import main
from trunkline.models.fluid.store import Store

ROOT = Path(__file__).parents[2]


def test_it_prepares_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "store"
    write_case(source / "train/case_0003", 3, {"N": lambda text: [line.replace("0:05,", "0:05,oops") for line in text]})
    flags = ["fluid", "--source", str(source), "--out", str(out), "--workers", "1"]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert "train/case_0003/N.csv: line 6, column 'N_001_p': 'oops" in error
    assert "Traceback" not in error
    assert main([*flags, "--skip-bad-cases", "--val-fraction", "0.4", "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert f"{out}: " in said.out
    assert "left out 1 bad cases" in said.out
    assert "train/case_0003: " in said.out
    assert "5/5" in said.err  # the progress bar
    assert len(Store.open(out).cases("train")) + len(Store.open(out).cases("val")) == 3


def test_columns_without_any_value_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "source", train=2)
    for number in (1, 2):
        blank = {"P": lambda text: [text[0], *(line.split(",")[0] + "," for line in text[1:])]}
        write_case(source / f"train/case_{number:04d}", number, blank)
    assert main(["fluid", "--source", str(source), "--out", str(tmp_path / "store"), "--workers", "1"]) == 0
    assert "columns without any value in the training cases: P_001_inv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "{tmp}/absent", "--out", "{tmp}/o"], "absent: no such folder"),
        (["--source", "{tmp}/source", "--out", "{tmp}/source"], "contain one another"),
        (["--source", "{tmp}/source", "--out", "{tmp}/o", "--workers", "0"], "--workers 0: use 1 or more"),
        (["--source", "{tmp}/source", "--out", "{tmp}/o", "--val-fraction", "1.5"], "--val-fraction 1.5"),
        (["--source", "{tmp}/source", "--out", "/proc/none/o"], "/proc/none"),
        (["--simulate", "demo", "--out", "{tmp}/o"], "--cases 0: --simulate needs --cases N"),
        (["--simulate", "demo", "--cases", "1", "--test-cases", "-1", "--out", "{tmp}/o"], "--test-cases -1"),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    write_case(tmp_path / "source/train/case_1")
    assert main(["fluid", *(flag.format(tmp=tmp_path) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "flags",
    [
        ["fluid", "--out", "x"],
        ["fluid", "--source", "x"],
        ["fluid", "--source", "x", "--simulate", "demo", "--out", "x"],
        ["fluid", "--simulate", "moon", "--cases", "1", "--out", "x"],
        ["weather", "--out", "x"],
        [],
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source", train=12), tmp_path / "store"
    command = [sys.executable, str(ROOT / "launchers/prepare.py"), "fluid", "--source", str(source), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(out.glob("*/case_*/part.json")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: run the same command again" in error
    assert "Traceback" not in error
    assert not (out / "store.json").exists()
    assert main([*command[2:], "--workers", "1"]) == 0
    Store.open(out).verify()
