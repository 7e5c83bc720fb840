"""Prediction: the probabilities of evaluation's network, without the data, and files that cannot be read."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.models.image_classification.image_tree import pixels_of, write_image
from tests.models.image_classification.trained_run import CLASSES, small_task, write_images, write_run
from trunkline.engine.data.loading import collate
from trunkline.launchers.predict import main
from trunkline.models.image_classification import predict as predict_module
from trunkline.models.image_classification.augment import prepared
from trunkline.models.image_classification.config import Augmentation, Crop
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.predict import Prediction, _Table, find_images, predict
from trunkline.models.image_classification.trained import load_trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    write_run(root, write_images(root / "images"))
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("cropped", [False, True])
def test_what_is_predicted_is_what_validation_sees(tmp_path: Path, cropped: bool) -> None:
    """With training that crops, images are shrunk on the short side: prediction does so, too."""
    images = write_images(tmp_path / "images")
    for name in ("a.png", "b.png"):
        write_image(images / f"val/cat/{name}", pixels_of(name, 31, 70))
    augmentation = Augmentation(crop=Crop() if cropped else None)
    run = write_run(tmp_path, images, augmentation=augmentation)
    task, trained = small_task(tmp_path, images, {"augmentation": augmentation}), load_trained(run, CPU)
    validation = task.dataset("val")
    paths = [images / validation.name(place) for place in range(len(validation))]
    found = np.stack([each.probabilities for each in predict(trained, paths, batch_size=4)])
    places = np.arange(len(validation))
    batch = collate(task, [validation[place] for place in places], [places, places])
    with torch.no_grad():
        logits = trained.network(pixel_values=prepared(batch, task.data)).logits
    np.testing.assert_allclose(found, logits.double().softmax(dim=1).numpy(), rtol=0, atol=1e-6)


def test_the_command_writes_what_it_found_and_names_what_it_could_not_read(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    shutil.copytree(root / "images/test", given / "deep/er")
    (given / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    single = tmp_path / "no suffix"
    Image.fromarray(pixels_of("single")).save(single, format="BMP")
    moved = tmp_path / "moved"  # nothing but the weights' folder is there
    shutil.copytree(root / "run/best", moved)
    out = tmp_path / "out"
    words = ["--run", str(moved), "--images", str(given), str(single), "--out", str(out), "--top-k", "2"]
    assert main(words) == 0
    made = rows(out / "predictions.csv")
    assert list(made[0]) == ["path", "class", "probability", "class_2", "probability_2", "error"]
    assert [row["path"] for row in made] == [str(path) for path in [*sorted(given.rglob("*.png")), single]]
    paths = [Path(row["path"]) for row in made if not row["error"]]
    assert len(paths) == 6
    want = {each.path: each.probabilities for each in predict(load_trained(root / "run", CPU), paths)}
    for row in made:
        if row["error"]:
            assert row["path"] == str(given / "broken.png")
            assert row["class"] == ""
            continue
        order = np.argsort(-want[Path(row["path"])])
        assert (row["class"], row["class_2"]) == (CLASSES[order[0]], CLASSES[order[1]])
        assert float(row["probability"]) == pytest.approx(want[Path(row["path"])][order[0]], abs=1e-6)
    said = capsys.readouterr()
    assert f"warning: {given}/broken.png: left out: " in said.err
    assert "wrote 6 predictions" in said.out
    assert "1 could not be read" in said.out
    assert Image.open(out / "sheet.png").size[0] > 500


def test_folders_are_searched_at_any_depth_and_files_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b/x.JPG", "b/c/y.png", "a.bmp", "notes.txt"):
        write_image(tmp_path / name) if not name.endswith("txt") else (tmp_path / name).write_text("no")
    want = [tmp_path / "a.bmp", tmp_path / "b/c/y.png", tmp_path / "b/x.JPG"]
    assert find_images([tmp_path]) == want
    for name in (".thumbnails/a.png", "__MACOSX/b/x.JPG", "b/._y.png"):
        write_image(tmp_path / name)
    (tmp_path / "b/c/up").symlink_to(tmp_path)
    assert find_images([tmp_path]) == want
    said = capsys.readouterr().err
    assert f"note: {tmp_path}: 3 hidden files and folders are passed over" in said
    assert "links are passed over, which lead back to a folder that they lie in: " in said
    monkeypatch.chdir(tmp_path)
    assert find_images([Path(".")]) == [path.relative_to(tmp_path) for path in want]
    assert find_images([tmp_path / "notes.txt", tmp_path, tmp_path / "a.bmp"]) == [tmp_path / "notes.txt", *want]


def test_what_was_predicted_is_written_when_the_program_ends_early(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = predict_module.read_image, tmp_path / "out"

    def read(path: Path, size: Size) -> NDArray[np.uint8]:
        if path.name == "test-newt-0.png":
            raise KeyboardInterrupt
        return real(path, size)

    words = ["--run", str(root / "run"), "--images", str(root / "images/test"), "--out", str(out)]
    assert main(words) == 0
    whole = rows(out / "predictions.csv")
    monkeypatch.setattr(predict_module, "read_image", read)
    assert main([*words, "--batch-size", "2"]) == 130
    assert rows(out / "predictions.csv") == whole[:4]


def test_a_thousand_predictions_are_not_all_kept(tmp_path: Path) -> None:
    with _Table(tmp_path / "predictions.csv", CLASSES, 1) as table:
        for place in range(1001):
            table.add(Prediction(Path(f"{place}.png"), np.array([0.25, 0.5, 0.25])))
            assert len(table._shown) + len(table.first) < 220
        places = [int(each.path.stem) for each in table.sample(48)]
    assert (len(places), places[0]) == (48, 0)
    assert max(np.diff([*places, 1001])) < 40
    assert [row["path"] for row in rows(tmp_path / "predictions.csv")] == [f"{place}.png" for place in range(1001)]


@pytest.mark.parametrize(
    ("images", "flags", "said"),
    [
        ("nothing", [], "--images .*nothing: is neither a file nor a folder"),
        ("empty", [], "--images .*empty: holds no image"),
        ("text.png", [], "none of the 1 files can be read"),
        ("images", ["--top-k", "0"], "--top-k 0: use 1 or more"),
        ("images", ["--out", __file__], "--out .*test_predict.py: is a file: name a folder"),
    ],
)
def test_mistakes_are_messages(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: str, flags: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    shutil.copytree(root / "images", tmp_path / "images")
    words = ["--run", str(root / "run"), "--images", str(tmp_path / images), "--out", str(tmp_path / "out"), *flags]
    assert main(words) == 2
    assert re.search(said, capsys.readouterr().err)


def test_weights_without_their_classes_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    words = ["--run", str(run), "--images", str(root / "images"), "--out", str(tmp_path / "out")]
    (run / "best/classes.json").write_text(json.dumps({"classes": []}))
    assert main(words) == 2
    assert '"classes" is not a list of names' in capsys.readouterr().err
    (run / "best/classes.json").unlink()
    assert main(words) == 2
    assert "classes.json: does not say which classes the network knows" in capsys.readouterr().err
