from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.image_classification.image_tree import SMALL
from trunkline.engine.errors import DataError
from trunkline.models.image_classification.scan import printable, scan


def _files(root: Path, *names: str) -> Path:
    """Files that nobody opens."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return _files(tmp_path / "data", *SMALL)


def _error(root: Path) -> str:
    with pytest.raises(DataError) as caught:
        scan(root)
    return str(caught.value)


def test_images_are_found_at_any_depth_with_any_case_of_the_suffix(root: Path) -> None:
    _files(root, "train/cat/a/b/1.JPG", "train/cat/c.d/2.Jpeg", "train/dog/3.BMP", "train/dog/x.jpg/4.png")
    found = scan(root)
    assert found.classes == ("cat", "dog")
    extra = ["train/cat/a/b/1.JPG", "train/cat/c.d/2.Jpeg", "train/dog/3.BMP", "train/dog/x.jpg/4.png"]
    assert list(found.images["train"]) == sorted([*extra, *(name for name in SMALL if name.startswith("train"))])
    assert found.images["train"]["train/cat/0.png"] == 1
    assert "test" not in found.images
    assert not found.notes


def test_classes_are_sorted_over_train_and_val_together(root: Path) -> None:
    _files(root, "train/ant/1.png", "train/Zebra/1.png")
    (root / "val" / "bee").mkdir()
    assert scan(root).classes == ("Zebra", "ant", "bee", "cat", "dog")


def test_the_order_of_the_file_system_is_of_no_account(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, entries = scan(root), os.scandir

    class Backwards(list[os.DirEntry[str]]):
        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(sorted(entries(path), key=lambda e: e.name)[::-1]))
    assert scan(root) == before
    assert list(scan(root).images["train"]) == list(before.images["train"])


def test_what_is_passed_over_is_counted_and_named(root: Path) -> None:
    _files(
        root,
        "train/.DS_Store",
        "train/cat/.hidden.jpg",
        "val/__MACOSX/cat/1.jpg",
        "train/loose.jpg",
        "train/cat/README",
    )
    _files(root, "train/cat/notes.txt", "train/dog/1.webp", "train/dog/2.webp", "val/classes.txt")
    assert list(scan(root).notes) == [
        "3 hidden files and folders are passed over",
        "5 files are passed over, which end in none of .jpg, .jpeg, .png, .bmp but in .webp (2), .txt (2), no suffix "
        "(1): train/cat/README, train/cat/notes.txt, train/dog/1.webp, ...",
        "1 images are passed over, which lie in no class's folder: train/loose.jpg",
    ]
    assert len(scan(root).images["train"]) == 8


def test_links_are_followed_but_not_in_circles(root: Path, tmp_path: Path) -> None:
    _files(tmp_path / "elsewhere", "1.png", "2.png")
    (root / "train/owl").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/up").symlink_to(root / "train/cat")
    (root / "train/dog/nowhere.png").symlink_to(tmp_path / "nothing")
    found = scan(root)
    assert found.classes == ("cat", "dog", "owl")
    assert list(found.images["train"])[-2:] == ["train/owl/1.png", "train/owl/2.png"]
    assert "train/dog/nowhere.png" in found.images["train"]  # to be named when it is opened
    assert list(found.notes) == ["1 links are passed over, which lead back to a folder that they lie in: train/cat/up"]


def test_a_name_that_is_no_utf8_is_found_and_can_be_printed(root: Path) -> None:
    with open(os.path.join(os.fsencode(root / "train/cat"), b"\xff.png"), "wb") as file:
        file.write(b"x")
    (name,) = [name for name in scan(root).images["train"] if not name.isascii()]
    assert printable(name) == r"train/cat/\xff.png"


def test_a_class_whose_name_is_no_utf8_is_an_error(root: Path) -> None:
    os.mkdir(os.path.join(os.fsencode(root / "train"), b"\xff"))
    assert r"train/\xff: a class's name must be UTF-8: rename the folder" in _error(root)


def test_a_folder_of_another_layout_says_what_to_do(tmp_path: Path, root: Path) -> None:
    assert "no such folder: the layout is ROOT/train/CLASS" in _error(tmp_path / "no")
    assert "not a folder" in _error(_files(tmp_path, "file") / "file")
    assert f"but they lie in {root}: give that one" in _error(root / "train")
    plain = _files(tmp_path / "plain", "cat/1.jpg", "dog/deep/2.png", "empty.txt")
    assert f"but folders with images, cat, dog: if these are the classes, move them into {plain}/train" in _error(plain)
    (root / "val").rename(root / "validation")
    assert "no folder val, but one called validation: rename it to val" in _error(root)
    (tmp_path / "bare").mkdir()
    assert "no folder train and no folder val: the layout" in _error(tmp_path / "bare")


def test_fewer_than_two_classes_with_images_are_an_error(tmp_path: Path) -> None:
    none = _files(tmp_path / "none", "train/1.jpg", "val/2.jpg")
    assert "no class with images, where two are needed" in _error(none)
    assert "2 images are passed over, which lie in no class's folder: train/1.jpg, val/2.jpg" in _error(none)
    one = _files(tmp_path / "one", "train/cat/1.jpg", "val/cat/2.jpg")
    (one / "train/dog").mkdir()
    assert "only one class with images, cat" in _error(one)
    (tmp_path / "noval/val").mkdir(parents=True)
    noval = _files(tmp_path / "noval", "train/cat/1.jpg", "train/dog/1.jpg")
    assert "noval/val: no image in 2 classes" in _error(noval)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_nothing_is_trained_on_is_an_error(root: Path, split: str) -> None:
    _files(root, f"{split}/owl/1.jpg")
    assert f"{root / split}: 1 classes have no images in {root / 'train'}: owl" in _error(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_must_not_be_read_is_named(root: Path) -> None:
    (root / "train/cat").chmod(0)
    assert f"{root}/train/cat: cannot be read (Permission denied): check its permissions" in _error(root)
