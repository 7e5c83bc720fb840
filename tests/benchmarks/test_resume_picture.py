"""The picture of the README: what was measured for it, and the measurement itself, small."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from trunkline.benchmarks.resume_picture import LIMIT, draw, run

ROOT = Path(__file__).parents[2]


def holds_together(measured: dict[str, Any], steps: int) -> None:
    """What is drawn is three kills, each after the checkpoint that was resumed, with losses within the limit."""
    assert measured["steps"] == list(range(1, steps + 1))
    pairs = list(zip(measured["unbroken"], measured["interrupted"], strict=True))
    assert len(pairs) == steps
    assert measured["largest_difference"] == max(abs(one - other) for one, other in pairs)
    assert measured["largest_relative_difference"] == max(abs(one - other) / one for one, other in pairs) <= LIMIT
    assert measured["layouts"] == [
        "deepspeed ZeRO 1, fp32, 1 rank", "deepspeed ZeRO 3, fp32, 2 ranks", "fsdp ZeRO 1, fp32, 2 ranks",
        "deepspeed ZeRO 1, fp32, 1 rank",
    ]  # fmt: skip
    resumed, killed = measured["resumed_from"], measured["killed_after"]
    assert all(0 < one < other < steps for one, other in pairwise(resumed))
    for first, last, lost in zip(resumed, killed, measured["lost"], strict=True):
        assert list(lost) == [str(step) for step in range(first + 1, last + 1)]  # none, if the last step was saved
    # one program, twice: bit for bit
    assert measured["unbroken"][: resumed[0]] == measured["interrupted"][: resumed[0]]


def test_the_picture_that_is_shown_is_of_figures_that_hold_together(tmp_path: Path) -> None:
    measured = json.loads((ROOT / "docs/resume.json").read_text())
    holds_together(measured, 120)
    draw(measured, tmp_path / "resume.png")
    assert imread(tmp_path / "resume.png").shape[:2] == (580, 900)
    assert (ROOT / "docs/resume.png").stat().st_size < 120_000


def test_a_kill_that_comes_when_its_last_step_is_saved_is_drawn_too(tmp_path: Path) -> None:
    measured = json.loads((ROOT / "docs/resume.json").read_text())
    measured["killed_after"][1] = measured["resumed_from"][1]
    measured["lost"][1] = {}
    holds_together(measured, 120)
    draw(measured, tmp_path / "resume.png")
    assert (tmp_path / "resume.png").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_killed_and_moved_three_times_keeps_its_losses(tmp_path: Path) -> None:
    assert run(Namespace(out=tmp_path, steps=24)) == 0
    holds_together(json.loads((tmp_path / "resume.json").read_text()), 24)
    assert (tmp_path / "resume.png").is_file()
