"""The benchmark of training encoder-decoders, at a size that says nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.benchmarks.summary import other_workloads
from trunkline.launchers.bench import main


def test_all_sides_take_their_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = f"--preset tiny --micro-batch-size 4 --turns 2 --steps 1 --out {tmp_path}"
    assert main(["seq2seq_training", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:-1]
    assert [line.split("  ")[0] for line in lines[:3]] == ["Seq2SeqTrainer", "Trunkline, padded", "Trunkline, packed"]
    assert [line.split(" /")[0] for line in lines[3:]] == ["speed, Trunkline, padded", "speed, Trunkline, packed"]
    rows = [line for line in other_workloads(tmp_path).splitlines() if line.startswith("| seq2seq_training | deeps")]
    assert [row.split(" | ")[2].split(":")[0] for row in rows] == ["Trunkline, padded", "Trunkline, packed"]
    assert all("%)" in row.split(" | ")[5] for row in rows)
