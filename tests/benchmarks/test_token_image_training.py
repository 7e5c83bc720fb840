"""The benchmark of training on token images, at a size that says nothing of speed."""

from __future__ import annotations

import pytest

from trunkline.launchers.bench import main


@pytest.mark.parametrize(
    ("beside", "other"),
    [
        ("accelerate", "Accelerate loop"),
        pytest.param("size", "64 x 64", marks=pytest.mark.slow),
        pytest.param("bf16", "bf16", marks=pytest.mark.slow),  # which some CPUs have to emulate
    ],
)
def test_both_sides_take_their_turns(beside: str, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--preset B/16 --layers 1 --img-size 16 --micro-batch-size 1 --turns 2 --steps 1"
    assert main(["token_image_training", "--beside", beside, *small.split()]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("  ")[0] for line in lines[:2]] == ["Trunkline", other]
    assert lines[2].startswith(f"speed, Trunkline / {other} ")
    assert "MiB kept" in lines[0]
