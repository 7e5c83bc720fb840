from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models.image_classification.image_tree import SMALL, pixels_of, write_image, write_tree
from trunkline.engine.errors import DataError
from trunkline.models.image_classification.config import Augmentation, Crop, ImageData
from trunkline.models.image_classification.folders import Folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", SMALL)


def _open(root: Path, **settings: object) -> Folders:
    return Folders(ImageData.model_validate({"path": str(root), "img_size": 16, **settings}))


def test_samples_are_the_images_in_the_order_of_their_names(root: Path) -> None:
    images = _open(root).split("train")
    assert [images.name(index) for index in range(len(images))] == [name for name in SMALL if "train" in name]
    assert images.labels.tolist() == [0] * 4 + [1] * 4
    sample = images[5]
    resized = Image.fromarray(pixels_of("train/dog/1.png")).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(sample["image"], resized)
    assert (sample["label"], sample["index"]) == (1, 5)


def test_for_a_crop_the_aspect_is_kept(root: Path) -> None:
    source = _open(root, img_size=14, augmentation=Augmentation(crop=Crop()))
    assert source.short_side == 16
    assert source.split("val")[0]["image"].shape == (16, 19, 3)


def test_sizes_are_drawn_and_said(root: Path) -> None:
    source = _open(root, train_size=2, val_size=9, size_per_class=True)
    assert [len(source.split(split)) for split in ("train", "val")] == [4, 4]
    assert list(source.notes) == [
        "train: 4 of 8 images are used, drawn with seed 42 (train_size = 2 of each class)",
        "val: all 4 images are used, since there are no more (val_size = 9 of each class)",
    ]


def test_files_that_are_no_images_are_left_out_within_the_share_that_is_allowed(root: Path) -> None:
    (root / "train/cat/0.png").write_bytes(b"")
    (root / "train/dog/2.png").write_text("text")
    os.mkfifo(root / "val/dog/pipe.jpg")
    with pytest.raises(DataError) as caught:
        _open(root, max_bad_fraction=0.2)
    assert "3 of 13 images cannot be read, more than data.max_bad_fraction 0.2 allows" in str(caught.value)
    assert "\n  train/cat/0.png: the file is empty\n  train/dog/2.png: not an image" in str(caught.value)
    source = _open(root, max_bad_fraction=0.25)
    images = source.split("train")
    assert [images.name(index) for index in range(len(images))] == [
        name for name in SMALL if "train" in name and name not in ("train/cat/0.png", "train/dog/2.png")
    ]
    assert images.labels.tolist() == [0] * 3 + [1] * 3
    assert source.notes[0].startswith("3 of 13 images cannot be read and are left out: train/cat/0.png (the file is em")


def test_an_image_that_breaks_later_is_an_error_that_names_it(root: Path) -> None:
    path = root / "train/dog/0.png"
    path.write_bytes(path.read_bytes()[:200])
    images = _open(root).split("train")
    with pytest.raises(DataError, match=r"train/dog/0\.png: cannot be decoded \(.+\): mend or remove it"):
        images[4]
    path.unlink()
    with pytest.raises(DataError, match=r"0\.png: cannot be decoded \(No such file or directory\)"):
        images[4]
    assert images[3]["label"] == 0
    assert images[5]["label"] == 1


def test_the_same_file_in_two_splits_is_named(root: Path) -> None:
    shutil.copy(root / "train/cat/1.png", root / "val/dog/same.png")
    write_image(root / "val/cat/9.png", pixels_of("another"))
    assert list(_open(root).notes) == ["1 images of val are in train too: val/dog/same.png = train/cat/1.png"]


def test_the_fingerprint_names_what_is_trained_on_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    first = _open(root).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    write_tree(root, ["test/cat/1.png"])
    assert _open(root).fingerprint == _open(tmp_path / "copy").fingerprint == first
    others = [_open(root, img_size=17), _open(root, train_size=3)]
    (root / "val/cat/1.png").rename(root / "val/cat/7.png")
    others.append(_open(root))
    write_image(root / "val/cat/7.png", pixels_of("val/cat/1.png", 21))
    others.append(_open(root))
    assert len({first, *(source.fingerprint for source in others)}) == 5


def test_a_split_without_images_says_which_has_some(root: Path) -> None:
    with pytest.raises(DataError, match="test: no images that can be read: there are some in train, val"):
        _open(root).split("test")
