"""A folder of weights is whole at any moment, and every bit of it is what was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.engine.data.test_store import no_descriptors_left
from trunkline.engine.checkpoint.digests import DIGESTS, check_digests, recorded, replace_files
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import entry, save_tensors

OLD = {"config.json": "old", "gone.json": "old", "model.safetensors": "old", "tokenizer/vocab.txt": "old"}
NEW = {"config.json": "new", "come.json": "new", "model.safetensors": "new", "tokenizer/vocab.txt": "new"}


def put(folder: Path, content: dict[str, str]) -> None:
    def write(draft: Path) -> None:
        for name, text in content.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(text)

    replace_files(folder, write)


def held(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in files.items() if name != DIGESTS and name[0] != "."}


class Killed(BaseException):
    pass


@pytest.mark.fault("a kill in any moment of writing best/")
@pytest.mark.parametrize("recorded_before", [True, False])
def test_a_kill_at_any_moment_leaves_a_folder_that_reads_as_whole(
    tmp_path: Path, recorded_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("rename", "replace", "unlink", "fsync")
    real = {name: getattr(os, name) for name in changes}
    moments = 0
    for moment in range(200):
        folder = tmp_path / str(moment)
        put(folder, OLD)
        (folder / "mine.txt").write_text("a user's")
        if not recorded_before:  # by an earlier version
            (folder / DIGESTS).unlink()
        left = [moment]

        def counted(name: str, left: list[int] = left):  # type: ignore[no-untyped-def]
            def change(*arguments, **flags):  # type: ignore[no-untyped-def]
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real[name](*arguments, **flags)

            return change

        with monkeypatch.context() as patch:
            for name in changes:
                patch.setattr(os, name, counted(name))
            try:
                put(folder, NEW)
            except Killed:
                moments += 1
            else:
                break
        check_digests(folder)
        weights = folder / "model.safetensors"
        assert recorded(folder, weights.name) in (entry(weights)["sha256"], None if not recorded_before else "")
        assert all(text in ("old", "new") for name, text in held(folder).items() if name != "mine.txt")
        put(folder, NEW)
        check_digests(folder)
        wanted = NEW | {"mine.txt": "a user's"} | ({} if recorded_before else {"gone.json": "old"})
        assert held(folder) == wanted
    assert moments > 10


@pytest.mark.parametrize("name", sorted(OLD))
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "pipe", "folder"])
def test_damage_to_any_file_is_named_with_what_to_do(tmp_path: Path, name: str, damage: str) -> None:
    put(tmp_path, OLD)
    file = tmp_path / name
    if damage in ("flip", "cut"):
        file.write_text({"flip": "olc", "cut": "ol"}[damage])
    else:
        file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(CheckpointError, match=rf"{file}: .*(launchers/export.py|where a file is expected)"):
        check_digests(tmp_path)


def test_a_folder_of_another_program_passes_and_a_link_to_the_same_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    check_digests(tmp_path / "foreign")
    put(tmp_path / "ours", OLD)
    (tmp_path / "ours/config.json").rename(tmp_path / "shared.json")
    (tmp_path / "ours/config.json").symlink_to(tmp_path / "shared.json")
    check_digests(tmp_path / "ours")


def test_a_file_in_a_folders_place_is_left_to_whoever_reads_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    check_digests(tmp_path / "file")


def test_what_the_system_refuses_is_no_reason_to_remove_digests(tmp_path: Path) -> None:
    put(tmp_path / "ours", OLD)
    with (
        no_descriptors_left(),
        pytest.raises(CheckpointError, match=r"Too many open files\): mend that, and run the same"),
    ):
        recorded(tmp_path / "ours", "config.json")


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    facts = {"format": "pt", "step": "4", "loss": "0.5", "score/part": "-0.5", 'naïve "name"\n': "1"}
    for number in range(9):
        save_tensors({"a": torch.ones(3), "b": torch.zeros(2)}, tmp_path / str(number), facts)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
