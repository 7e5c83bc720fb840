"""The benchmark of training image classifiers, at a size that says nothing of speed."""

from __future__ import annotations

import pytest

from trunkline.launchers.bench import main


def test_both_sides_take_their_turns(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--arch resnet_tiny --img-size 16 --micro-batch-size 8 --turns 2 --steps 1"
    assert main(["image_training", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line[:22].strip() for line in lines] == ["Trunkline", "transformers Trainer", "speed, Trunkline / Tra"]
