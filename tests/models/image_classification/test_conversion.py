from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.image_classification.image_tree import SMALL, pixels_of, write_image, write_tree
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.folders import Folders
from trunkline.models.image_classification.store import Prepared


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", SMALL)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".verified.json"
    }


@pytest.mark.parametrize("size", [Size(square=16), Size(short_side=16)])
def test_a_store_gives_the_samples_that_the_folder_gives(root: Path, tmp_path: Path, size: Size) -> None:
    write_image(root / "train/dog/tall.png", pixels_of("tall", 40, 17))
    prepare(root, tmp_path / "store", size)
    crop = {} if size.square else {"augmentation": {"crop": {}}}
    folder = Folders(ImageData.model_validate({"path": str(root), "img_size": 16 if size.square else 14, **crop}))
    store = Prepared(ImageData.model_validate({"store": str(tmp_path / "store"), "img_size": 16}))
    assert store.classes == folder.classes
    assert store.short_side == folder.short_side == size.short_side
    for split in ("train", "val"):
        ours, theirs = store.split(split), folder.split(split)
        assert len(ours) == len(theirs)
        assert np.array_equal(ours.labels, theirs.labels)
        for index in range(len(ours)):
            assert ours.name(index) == theirs.name(index)
            assert np.array_equal(ours[index]["image"], theirs[index]["image"])
            assert ours[index]["label"] == theirs[index]["label"]


def test_what_is_written_does_not_depend_on_the_number_of_workers(root: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(root, tmp_path / str(workers), Size(short_side=10), workers=workers)
    assert _files(tmp_path / "1") == _files(tmp_path / "3")
    assert len(_files(tmp_path / "1")) == 13


def test_unreadable_images_are_left_out_and_kept_in_mind(root: Path, tmp_path: Path) -> None:
    path = root / "train/cat/2.png"
    path.write_bytes(path.read_bytes()[:-60])  # its header is good
    out = tmp_path / "store"
    with pytest.raises(DataError, match=r"1 of 12 images cannot be read, more than --max-bad-fraction 0 allows"):
        prepare(root, out, Size(square=16))
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    store, _ = prepare(root, out, Size(square=16), max_bad_fraction=0.1)
    assert list(store.index["left_out"]) == ["train/cat/2.png"]
    source = Prepared(ImageData(store=str(out), img_size=16))
    images = source.split("train")
    assert [images.name(index) for index in range(len(images))] == [
        name for name in SMALL if "train" in name and name != "train/cat/2.png"
    ]
    assert source.notes[0].startswith("1 of 12 images cannot be read and are left out: train/cat/2.png (")


def test_the_same_pixels_in_two_splits_are_named_whatever_the_file(root: Path, tmp_path: Path) -> None:
    write_image(root / "val/dog/same.bmp", pixels_of("train/cat/1.png"))
    store, _ = prepare(root, tmp_path / "store", Size(square=16))
    assert store.index["remarks"] == ["1 images of val are in train too: val/dog/same.bmp = train/cat/1.png"]


def test_run_again_it_does_nothing_and_other_settings_are_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert prepare(root, out, Size(square=16))[1]
    assert not prepare(root, out, Size(square=16))[1]
    with pytest.raises(ConfigError, match="already holds a data set made with another img-size and another train-size"):
        prepare(root, out, Size(square=17), train_size=2)
    write_image(root / "train/cat/new.png")
    with pytest.raises(ConfigError, match="made with another source"):
        prepare(root, out, Size(square=16))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_size": 0}, "--train-size 0: use 1 or more"),
        ({"workers": 0}, "--workers 0: use 1 or more"),
        ({"max_bad_fraction": 1.0}, "--max-bad-fraction 1.0: use a number from 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(root: Path, tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(root, tmp_path / "store", Size(square=16), **settings)


def test_a_folder_that_holds_something_else_is_not_written(root: Path, tmp_path: Path) -> None:
    for out in (root, root / "store", tmp_path):
        with pytest.raises(DataError, match="contain one another"):
            prepare(root, out, Size(square=16))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        prepare(root, tmp_path / "file", Size(square=16))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="not empty and not a prepared data set"):
        prepare(root, tmp_path / "full", Size(square=16))


@pytest.mark.slow
@pytest.mark.fault("kill -9 of the preparation of images")
def test_killed_and_run_again_it_leaves_what_an_unbroken_run_leaves(root: Path, tmp_path: Path) -> None:
    for place in range(1500):
        write_image(root / f"train/cat/more{place}.png", pixels_of(str(place), 64, 64))
    prepare(root, tmp_path / "unbroken", Size(square=48))
    out = tmp_path / "store"
    command = [sys.executable, "launchers/prepare.py", "image_classification", "--source", root, "--out", out]
    process = subprocess.Popen(
        [*map(str, command), "--img-size", "48"], stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        images = tmp_path / ".store.draft/train/images.npy"
        while not (images.is_file() and images.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    prepare(root, out, Size(square=48))
    assert _files(out) == _files(tmp_path / "unbroken")
    assert not (tmp_path / ".store.draft").exists()
