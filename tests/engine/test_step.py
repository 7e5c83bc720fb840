"""The lines of steps in metrics.jsonl: one step's, or with training.log_means the mean over those since the last."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_trainer import interrupted_then_resumed, lines, train
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

MEANS = {"log_every": 4, "log_means": True}


def losses(folder: Path, resume: str = "none", data: dict[str, Any] | None = None, **training: Any) -> dict[int, float]:
    settings = {"eval_every": 99, "save_every": 99, "steps": 11} | training
    config = tiny_config(folder, training=settings, data=data or {})
    Trainer(TinyTask(config.data, config.model), config, start(), folder / "run", resume=resume).run()
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: math.nan if row["loss"] is None else row["loss"] for row in rows if row["split"] == "train"}


def weights(folder: Path) -> list[int]:
    """The points in the global batch of each step."""
    config = tiny_config(folder)
    rows = TinyTask(config.data, config.model).dataset("train")
    batches = GlobalBatches(len(rows), 8, 42)
    return [sum(len(rows[i][0]) for i in batches.draws(step)[0].ravel() if i != FILLER) for step in range(11)]


@pytest.mark.parametrize("poison", [[], [3]])
def test_a_line_is_the_weighted_mean_of_the_steps_since_the_last_without_those_that_were_skipped(
    tmp_path: Path, poison: list[int]
) -> None:
    each = losses(tmp_path / "each", data={"poison": poison}, log_every=1)
    found = losses(tmp_path / "means", data={"poison": poison}, **MEANS)
    assert sum(not math.isfinite(loss) for loss in each.values()) == 2 * bool(poison)
    heavy = weights(tmp_path)
    for first, last in ((1, 4), (5, 8), (9, 11)):
        made = [(each[step], heavy[step - 1]) for step in range(first, last + 1) if math.isfinite(each[step])]
        mean = sum(loss * weight for loss, weight in made) / sum(weight for _, weight in made)
        assert found.pop(last) == pytest.approx(mean, rel=1e-6)
    assert not found


def test_a_checkpoint_of_the_version_before_holds_the_weight_among_the_sums() -> None:
    found = Progress(since_line={"loss": 3.0, "": 12.0})
    assert (found.since_line, found.since_line_weight) == ({"loss": 3.0}, 12.0)
    assert Progress(**asdict(found)) == found


def test_a_resume_between_two_lines_changes_none(tmp_path: Path) -> None:
    unbroken = losses(tmp_path / "unbroken", save_every=3, keep_last=9, **MEANS)
    resumed = losses(
        tmp_path / "resumed", str(tmp_path / "unbroken/run/checkpoints/step-00000006"), save_every=3, **MEANS
    )
    assert resumed == {8: unbroken[8], 11: unbroken[11]}


@pytest.mark.parametrize("means", [False, True])
def test_a_stop_between_two_lines_leaves_one_more_and_changes_no_other(tmp_path: Path, means: bool) -> None:
    each, heavy = losses(tmp_path / "each", log_every=1), weights(tmp_path)
    settings = {"steps": 11, "eval_every": 99, "save_every": 99, "log_every": 4, "log_means": means}
    config = tiny_config(tmp_path, training=settings)
    train(tmp_path / "unbroken", config)
    interrupted_then_resumed(tmp_path / "stopped", config, at=6)

    kept = ("step", "epoch", "points_seen", "samples_seen", "loss", "absolute", "lr", "grad_norm")
    whole, found = (
        {row["step"]: [row[key] for key in kept] for row in lines(tmp_path / run)} for run in ("unbroken", "stopped")
    )
    more = dict(zip(kept, found.pop(6), strict=True))
    assert found == whole
    since = (5, 6) if means else (6,)
    mean = sum(each[step] * heavy[step - 1] for step in since) / sum(heavy[step - 1] for step in since)
    assert more["loss"] == pytest.approx(mean, rel=1e-6)
    assert more["points_seen"] == sum(heavy[:6])
