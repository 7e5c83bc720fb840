"""The benchmark of training encoder-decoders, at a size that says nothing of speed."""

from __future__ import annotations

import pytest

from trunkline.launchers.bench import main


def test_all_sides_take_their_turns(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--preset tiny --micro-batch-size 4 --turns 2 --steps 1"
    assert main(["seq2seq_training", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split("  ")[0] for line in lines[:3]] == ["Seq2SeqTrainer", "Trunkline, padded", "Trunkline, packed"]
    assert [line.split(" /")[0] for line in lines[3:]] == ["speed, Trunkline, padded", "speed, Trunkline, packed"]
