from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trunkline.benchmarks import image_reading
from trunkline.engine.task import Batch
from trunkline.launchers.bench import main
from trunkline.models.image_classification.config import ImageData


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_reading, "_BATCH", 3)


@pytest.mark.parametrize(("least", "status"), [(0.0, 0), (1e9, 1)])
def test_pixels_are_compared_before_rates_and_a_missed_limit_is_the_status(
    least: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_reading, "LEAST", dict.fromkeys(image_reading.LEAST, least))
    assert main(["images", "--images", "7", "--rounds", "2"]) == status
    said = capsys.readouterr().out
    assert said.count("images/s") == 8
    assert said.count("DataLoader and Pillow") == 3
    assert "store of short side 256, cropped" in said


@pytest.mark.parametrize(("cropped", "named"), [(True, "a crop"), (False, "an augmented image")])
def test_no_rate_is_reported_for_other_pixels(
    cropped: bool, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    augmented = image_reading.augmented

    def mirrored(batch: Batch, data: ImageData) -> Tensor:
        found = augmented(batch, data)
        return torch.flip(found, dims=(3,)) if (data.augmentation.crop is not None) == cropped else found

    monkeypatch.setattr(image_reading, "augmented", mirrored)
    assert main(["images", "--images", "7", "--rounds", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named} differs from Pillow's")
    assert said.endswith("of 255 on average: no speed is reported\n")


def test_too_few_images_or_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["images", "--rounds", "1"]) == 2
    assert capsys.readouterr().err == "error: use at least --rounds 2 and --images 6\n"
