from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trunkline.benchmarks import image_reading
from trunkline.launchers.bench import main


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
    assert said.count("images/s") == 6
    assert said.count("DataLoader and Pillow") == 2
    assert "store of short side 256, cropped" in said


def test_no_rate_is_reported_for_other_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    augmented = image_reading.augmented
    monkeypatch.setattr(image_reading, "augmented", lambda batch, data: torch.flip(augmented(batch, data), dims=(3,)))
    assert main(["images", "--images", "7", "--rounds", "2"]) == 2
    assert "of 255 on average: no speed is reported" in capsys.readouterr().err


def test_too_few_images_or_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["images", "--rounds", "1"]) == 2
    assert capsys.readouterr().err == "error: use at least --rounds 2 and --images 6\n"
