"""kill -9 of a run with BatchNorm and an average of the weights: what follows is the unbroken run's, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models.image_classification.small_images import write_images
from tests.models.killed import unbroken_and_killed


@pytest.mark.slow
@pytest.mark.fault("kill -9 of an image classifier with BatchNorm and an average of its weights")
def test_a_killed_run_ends_as_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", train=8, val=2)
    arguments = [
        *("image_classification", "--data_path", str(data)),
        *("--arch", "resnet_tiny", "--img_size", "32", "--batch_size", "8", "--grad_acc", "1", "--epochs", "8"),
        *("--disable_mlflow", "--no-export_onnx", "--set", 'training.ema={"decay": 0.9}'),
        *("--set", "training.log_every=1", "--set", "training.log_means=false", "--set", "training.save_every=2"),
    ]  # fmt: skip

    def rows(run: Path) -> dict[tuple[int, str], float]:
        read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {(row["step"], row["split"]): row["loss"] for row in read if row["split"] in ("train", "val")}

    whole, broken = unbroken_and_killed(arguments, tmp_path, "--model_path")
    assert rows(broken) == rows(whole)
    assert max(rows(whole))[0] == 24
    for name in ("best", "final"):
        one, two = (load_file(run / name / "model.safetensors") for run in (whole, broken))
        assert one.keys() == two.keys()
        assert all(one[key].equal(two[key]) for key in one)
