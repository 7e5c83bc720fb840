from __future__ import annotations

from pathlib import Path

from trunkline import load_config, train
from trunkline.launchers.skeleton.flags import DEFAULTS


def test_the_loss_falls(tmp_path: Path) -> None:
    config = load_config(DEFAULTS, {"training.steps": 100, "training.eval_every": 10, "training.trackers": []})
    trained = train(config, output_dir=tmp_path / "run")
    assert trained.best_step > 10
    assert trained.val["loss"] < 0.1  # of a model that always says 0 it is about a half
