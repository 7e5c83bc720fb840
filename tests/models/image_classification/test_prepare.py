from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.image_classification.image_tree import SMALL, write_tree
from trunkline.launchers.prepare import main
from trunkline.models.image_classification.store import ImageStore


def test_the_command_prepares_a_store_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_tree(tmp_path / "data", SMALL), tmp_path / "store"
    (root / "train/cat/notes.txt").write_text("")
    command = ["image_classification", "--source", str(root), "--out", str(out), "--train-size", "3"]
    assert main([*command, "--short-side", "16"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{out}: 2 classes, 3 train, 4 val images of at most 16 pixels on the shorter side"
    assert said[1].startswith("  1 files are passed over")
    assert said[2] == "  train: 3 of 8 images are used, drawn with seed 42 (train_size = 3)"
    assert len(ImageStore.open(out)["train/labels"]) == 3
    assert main([*command, "--short-side", "16"]) == 0
    assert "already prepared from files of the same names and sizes; nothing to do" in capsys.readouterr().out


def test_bad_input_is_one_message_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tree(tmp_path / "data", SMALL)
    (root / "val/dog/0.png").write_bytes(b"")
    assert main(["image_classification", "--source", str(root), "--out", str(tmp_path / "store")]) == 2
    assert "val/dog/0.png: the file is empty" in capsys.readouterr().err
