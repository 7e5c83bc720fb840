from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.models.image_classification.image_tree import SMALL, write_tree
from trunkline.engine.data.store_writer import write_index
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.image_classification.config import ImageData
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.data import collate, open_source
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.store import ImageStore, Prepared


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "data", [*SMALL, "test/dog/1.png"])


@pytest.fixture
def fixed(root: Path, tmp_path: Path) -> Path:
    return prepare(root, tmp_path / "fixed", Size(square=16))[0].root


@pytest.fixture
def ragged(root: Path, tmp_path: Path) -> Path:
    return prepare(root, tmp_path / "ragged", Size(short_side=16))[0].root


def _open(store: Path, **settings: object) -> Prepared:
    source = open_source(ImageData.model_validate({"store": str(store), "img_size": 16, **settings}))
    assert isinstance(source, Prepared)
    return source


def test_a_fixed_size_is_asked_for_and_another_is_an_error_that_says_what_to_do(fixed: Path, ragged: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.img_size: 32, where the images in .*fixed have 16 pixels: set that, or "
    ):
        _open(fixed, img_size=32)
    assert _open(ragged, img_size=32).short_side == 16


def test_a_draw_of_a_store_is_the_draw_of_the_folder_that_it_was_made_from(root: Path, fixed: Path) -> None:
    settings = {"train_size": 3, "val_size": 1, "size_per_class": False}
    ours = _open(fixed, **settings)
    theirs = open_source(ImageData.model_validate({"path": str(root), "img_size": 16, **settings}))
    assert ours.notes[0] == theirs.notes[0] == "train: 3 of 8 images are used, drawn with seed 42 (train_size = 3)"
    for split in ("train", "val", "test"):
        one, other = ours.split(split), theirs.split(split)
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        assert one.labels.tolist() == other.labels.tolist()
        assert all(np.array_equal(one[i]["image"], other[i]["image"]) for i in range(len(one)))
    whole = _open(fixed).fingerprint
    assert (
        len({whole, ours.fingerprint, _open(fixed, val_size=3).fingerprint, _open(fixed, train_size=3).fingerprint})
        == 4
    )


def test_a_pickled_split_reads_the_same(ragged: Path) -> None:
    images = _open(ragged, train_size=3).split("train")
    again = pickle.loads(pickle.dumps(images))
    assert np.array_equal(again[2]["image"], images[2]["image"])
    assert again.name(2) == images.name(2)
    with pytest.raises(IndexError):
        images[3]


def test_all_that_is_read_is_named_for_verification(fixed: Path, ragged: Path) -> None:
    def named(store: Path) -> list[str]:
        return sorted(array.name.removeprefix("val/") for array in _open(store).split("val").arrays)

    assert named(fixed) == ["images", "name_offsets", "names"]
    assert named(ragged) == ["images", "name_offsets", "names", "offsets", "sizes"]


@pytest.mark.parametrize("name", ["train/images", "train/labels"])
def test_a_flipped_bit_is_an_error_that_names_the_file(fixed: Path, name: str) -> None:
    path = fixed / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"{path}: damaged: its values are not those that were written"):
        _open(fixed).split("train")[0]


def test_a_store_of_another_workload_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_index(tmp_path / "other", "causal_lm", {}, [], {}, {})
    with pytest.raises(DataError, match="is a data set of 'causal_lm', not of 'image_classification': prepare one, "):
        _open(tmp_path / "other")
    with pytest.raises(DataError, match="no prepared data set here"):
        _open(tmp_path)


def test_an_index_whose_arrays_do_not_belong_together_is_damaged(fixed: Path, tmp_path: Path) -> None:
    store = ImageStore.open(fixed)
    write_index(fixed, store.workload, store.arrays, [], {**store.facts, "square": 17}, {})
    with pytest.raises(DataError, match="images of train that do not belong together"):
        ImageStore.open(fixed)


def test_a_split_that_is_not_there_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "test/dog/1.png").unlink()
    store = prepare(root, tmp_path / "store", Size(square=16))[0].root
    with pytest.raises(DataError, match="no images of 'test': it holds train, val"):
        _open(store).split("test")


def test_images_of_several_sizes_fill_the_upper_left_of_a_batch() -> None:
    images = [np.full((2, 5, 3), 1, np.uint8), np.full((4, 3, 3), 2, np.uint8)]
    batch = collate([{"image": image, "label": 7, "index": place} for place, image in enumerate(images)])
    expected = np.zeros((2, 4, 5), np.uint8)
    expected[0, :2], expected[1, :, :3] = 1, 2
    assert np.array_equal(batch["image"], np.repeat(expected[..., None], 3, axis=3))
    assert batch["size"].tolist() == [[2, 5], [4, 3]]
    assert batch["label"].tolist() == [7, 7]
    assert batch["index"].tolist() == [0, 1]
