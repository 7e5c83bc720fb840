"""The benchmark of training image classifiers, at a size that says nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.benchmarks.summary import other_workloads
from trunkline.launchers.bench import main


def test_all_sides_take_their_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = f"--arch resnet_tiny --img-size 16 --micro-batch-size 8 --turns 2 --steps 1 --workers 1 --out {tmp_path}"
    assert main(["image_training", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:-1]
    names = ["Trunkline", "Trunkline, store", "transformers Trainer"]
    assert [line[:22].strip() for line in lines[:3]] == names
    assert [line.split(" / ")[0] for line in lines[3:]] == [f"speed, {name}" for name in names[:2]]
    rows = [line for line in other_workloads(tmp_path).splitlines() if line.startswith("| image_training | deepspeed")]
    assert [row.split(" | ")[2].split(":")[0] for row in rows] == names[:2]
