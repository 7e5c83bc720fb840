from __future__ import annotations

import hashlib

import numpy as np
import pytest

from trunkline.engine.errors import DataError
from trunkline.models.image_classification.selection import (
    check_unreadable,
    class_notes,
    crossing,
    draw_names,
    drawn,
    unreadable_note,
)

NAMES = [f"train/{cls}/{place}.png" for cls, count in (("a", 50), ("b", 20), ("c", 3)) for place in range(count)]


def _drawn(names: list[str], size: int | None, per_class: bool = False) -> set[str]:
    return {names[place] for place in drawn(names, size, per_class)}


def test_a_draw_depends_on_the_names_alone_and_a_smaller_one_is_part_of_it() -> None:
    ten = _drawn(NAMES, 10)
    assert len(ten) == 10
    assert _drawn(NAMES[::-1], 10) == ten
    assert _drawn(NAMES, 4) < ten
    by_digest = sorted(NAMES, key=lambda name: hashlib.sha256(f"42 {name}".encode()).hexdigest())
    assert ten == set(by_digest[:10])
    assert _drawn(NAMES[:30], 10) >= ten & set(NAMES[:30])  # what else there is does not push an image out


def test_all_are_drawn_where_there_are_no_more() -> None:
    assert drawn(NAMES, None).tolist() == drawn(NAMES, 73).tolist() == drawn(NAMES, 99).tolist() == list(range(73))


def test_a_draw_per_class_takes_as_many_of_each_that_has_them() -> None:
    found = _drawn(NAMES, 5, per_class=True)
    assert [sum(name.startswith(f"train/{cls}/") for name in found) for cls in "abc"] == [5, 5, 3]
    alone = [name for name in NAMES if name.startswith("train/b/")]
    assert _drawn(alone, 5) == {name for name in found if name.startswith("train/b/")}


def test_a_draw_is_said() -> None:
    names = {"train": NAMES, "val": NAMES, "test": NAMES}
    used, said = draw_names(names, {"train": 10, "val": None}, False)
    assert said == ["train: 10 of 73 images are used, drawn with seed 42 (train_size = 10)"]
    assert {split: len(each) for split, each in used.items()} == {"train": 10, "val": 73, "test": 73}
    assert set(used["train"]) == _drawn(NAMES, 10)
    said = draw_names(names, {"val": 100}, True)[1]
    assert said == ["val: all 73 images are used, since there are no more (val_size = 100 of each class)"]


def test_classes_with_no_image_or_one_are_named() -> None:
    labels = {"train": np.array([0, 0, 1, 3, 3]), "val": np.array([0, 1])}
    assert class_notes(["a", "b", "c", "d"], labels) == [
        "train: 1 of 4 classes have no image: c",
        "train: 1 of 4 classes have one image: b",
        "val: 2 of 4 classes have no image: c, d",
    ]


def test_unreadable_images_are_an_error_above_their_share_and_a_note_below() -> None:
    bad = {f"train/a/{place}.jpg": "cut short" for place in range(12)}
    check_unreadable(bad, 120, 0.1, "--share")
    with pytest.raises(DataError) as caught:
        check_unreadable(bad, 119, 0.1, "--share")
    assert str(caught.value).startswith("12 of 119 images cannot be read, more than --share 0.1 allows")
    assert str(caught.value).count("\n  train/a/") == 10
    assert unreadable_note({}, 5) == []
    assert unreadable_note(dict(list(bad.items())[:1]), 5) == [
        "1 of 5 images cannot be read and are left out: train/a/0.jpg (cut short)"
    ]


def test_images_that_two_splits_share_are_named() -> None:
    keys = {
        "train": (["train/a/1", "train/a/2"], np.array([b"x" * 16, b"y" * 16], "S16")),
        "val": (["val/b/1", "val/b/2"], np.array([b"z" * 16, b"y" * 16], "S16")),
        "test": (["test/a/1"], np.array([b"z" * 16], "S16")),
    }
    assert crossing(keys) == [
        "1 images of val are in train too: val/b/2 = train/a/2",
        "1 images of test are in val too: test/a/1 = val/b/1",
    ]
