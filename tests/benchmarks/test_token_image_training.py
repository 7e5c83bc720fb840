"""The benchmark of training on token images, at a size that says nothing of speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trunkline.benchmarks.summary import other_workloads
from trunkline.launchers.bench import main


@pytest.mark.parametrize(
    ("beside", "other"),
    [
        ("accelerate", "Accelerate loop"),
        pytest.param("size", "64 x 64", marks=pytest.mark.slow),
        pytest.param("bf16", "bf16", marks=pytest.mark.slow),  # which some CPUs have to emulate
    ],
)
def test_both_sides_take_their_turns(
    beside: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = f"--preset B/16 --layers 1 --img-size 16 --micro-batch-size 1 --turns 2 --steps 1 --out {tmp_path}"
    assert main(["token_image_training", "--beside", beside, *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-4:-1]
    assert [line.split("  ")[0] for line in lines[:2]] == ["Trunkline", other]
    assert lines[2].startswith(f"speed, Trunkline / {other} ")
    assert "MiB kept" in lines[0]
    row = next(line for line in other_workloads(tmp_path).splitlines() if line.startswith("| token_image"))
    assert row.split(" | ")[3].startswith(f"{other}: ")
