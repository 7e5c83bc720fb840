"""Values that are not those that were prepared are never used: status 2, and a message that says what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.fluid.toy_network import write_toy_case
from trunkline.launchers import evaluate, predict, train


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    """By the same file of the next case."""
    shutil.copy(path.parent.with_name("case_0001") / path.name, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


HARM = [flip, replace, cut]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("launcher", ["train", "evaluate", "predict"])
def test_damaged_values_are_one_message_and_status_2(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str, harm: Callable[[Path], None]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(toy / "store", store, ignore=shutil.ignore_patterns(".verified.json"))
    run, out = ["--run", str(toy / "run"), "--store", str(store)], str(tmp_path / "out")
    if launcher == "train":
        path = store / "train/case_0000/state.npy"
    elif launcher == "evaluate":
        path = store / "test/case_0000/state.npy"
        shutil.copy(store / "val/case_0000/state.npy", store / "test/case_0001/state.npy")
    else:
        path = store / "train/case_0000/boundary.npy"
    harm(path)
    if launcher == "train":
        flags = ["--config", str(toy / "config.json"), "--set", f"data.store={store}", "--output-dir", out]
        status = train.main(flags)
    elif launcher == "evaluate":
        status = evaluate.main([*run, "--out", out, "--no-ridge", "--horizons", "1 minute"])
    else:
        write_toy_case(tmp_path / "case", seed=9, outputs=False)
        status = predict.main([*run, "--case", str(tmp_path / "case"), "--out", out])
    error = capsys.readouterr().err
    assert status == 2
    assert f"error: {path}: {'has' if harm is cut else 'damaged: '}" in error
    assert "prepare the data set again" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_the_second_start_reads_no_values_to_verify_them(toy: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(toy / "store", store, ignore=shutil.ignore_patterns(".verified.json"))
    flags = ["--config", str(toy / "config.json"), "--set", f"data.store={store}", "--set", "training.steps=1"]
    assert train.main([*flags, "--output-dir", str(tmp_path / "one")]) == 0
    path = store / "train/case_0000/state.npy"
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as it was, by all that a start looks at
    assert train.main([*flags, "--output-dir", str(tmp_path / "two")]) == 0
    os.utime(path)
    assert train.main([*flags, "--output-dir", str(tmp_path / "three")]) == 2
