"""The benchmark of training the fluid surrogate beside others, at a size that says nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.fluid.test_contracts import case
from tests.models.fluid.toy_network import write_toy_store
from trunkline.launchers.bench import main


def test_all_sides_take_their_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy_store(tmp_path / "store")
    case(tmp_path / "store", tmp_path / "run")
    small = f"--config {tmp_path}/run/asked.json --stage 0 --turns 2 --steps 1"
    assert main(["fluid_training", *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    sides = ["Trunkline", "transformers Trainer", "Accelerate loop"]
    assert [line[:22].strip() for line in lines[:3]] == sides
    assert [line.split(" / ")[1][:10] for line in lines[3:]] == ["transforme", "Accelerate"]
