"""Whole checkpoints or none: what a reader does with every kind of damage, and what a writer leaves when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoint import BACKEND, MANIFEST, TRAINER, Checkpoints, verify
from engine.distributed import Ranks
from engine.errors import CheckpointError
from engine.sharded_files import file_names
from engine.sharded_state import Snapshot, capture, restore
from tests.engine.test_sharded_state import Alone

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def snapshot(value: float = 0.5) -> Snapshot:
    entry = {"shape": [20, 64], "start": 0, "stop": 1280, "keys": ["value"], "scalars": {}}
    return Snapshot({"weight:value": torch.full((1280,), value)}, {"fragments": {"weight": entry}})


def save(folder: Path, *steps: int, keep_last: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(folder, ALONE, keep_last)
    checkpoints.open_for_writing()
    for step in steps:
        checkpoints.save(snapshot(), {"step": step}, probe_loss=0.25)
    checkpoints.wait()
    return checkpoints


TENSORS, INDEX = (f"{BACKEND}/{name}" for name in file_names(0, 1))
FILES = [MANIFEST, TRAINER, TENSORS, INDEX]


@pytest.mark.fault("{damage} of a file of the newest checkpoint")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "lengthen", "remove", "empty"])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = save(tmp_path, 100, 200)
    file = tmp_path / "step-00000200" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    file.write_bytes({"cut": bytes(data[:-1]), "lengthen": bytes(data) + b" ", "empty": b""}.get(damage, bytes(data)))
    if damage == "remove":
        file.unlink()
    found = checkpoints.newest()
    assert found is not None
    assert (found.path.name, found.state) == ("step-00000100", {"step": 100})
    said = capsys.readouterr().out
    assert "step-00000200" in said
    assert Path(name).name in said
    shutil.rmtree(tmp_path / "step-00000100")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be loaded:.*step-00000200.*start afresh"):
        checkpoints.newest()


@pytest.mark.fault("single bits of the manifest and the states")
def test_any_single_flipped_bit_is_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    for name in (MANIFEST, TRAINER, INDEX):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 150)):
            for bit in (0, 1, 3, 5):
                broken = bytearray(whole)
                broken[place] ^= 1 << bit
                (folder / name).write_bytes(bytes(broken))
                with pytest.raises(CheckpointError):
                    verify(folder)
        (folder / name).write_bytes(whole)
    verify(folder)


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / BACKEND / "extra.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"extra.pt is not in the manifest"):
        verify(tmp_path / "step-00000001")


@pytest.mark.fault("symbolic link in a checkpoint")
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "step-00000001" / INDEX
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(tmp_path / "step-00000001")


@pytest.mark.fault("manifest that names {name}")
@pytest.mark.parametrize("name", ["../outside.pt", "/etc/hostname"])
def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    from engine.checkpoint import _entry, _manifest_text

    save(tmp_path, 1)
    (tmp_path / "outside.pt").write_bytes(b"hostile")
    folder = tmp_path / "step-00000001"
    files = {TRAINER: _entry(folder / TRAINER), name: {"bytes": 7, "sha256": "0"}}
    (folder / MANIFEST).write_text(_manifest_text(json.loads((folder / MANIFEST).read_text()) | {"files": files}))
    with pytest.raises(CheckpointError, match="names a file outside"):
        verify(folder)


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 30, 400, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000400"]


@pytest.mark.fault("a write that fails in the background")
def test_a_save_that_fails_says_so_and_leaves_the_others_alone(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))

    class Full(Snapshot):
        def write(self, folder: Path, rank: int, world_size: int) -> dict[str, int]:
            super().write(folder, rank, world_size)
            raise OSError(28, "No space left on device", str(folder / "tensors"))

    full = Full(snapshot().tensors, snapshot().index)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(full, {"step": 2}, probe_loss=0.0, in_background=False)
    checkpoints.save(full, {"step": 2}, probe_loss=0.0)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(snapshot(), {"step": 3}, probe_loss=0.0)
    assert checkpoints.newest() is not None
    checkpoints.open_for_writing()  # the next start clears what was left
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_in_the_background_writes_what_was_there_when_it_began(tmp_path: Path) -> None:
    model = torch.nn.Linear(300, 300)
    backend = Alone(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    checkpoints = save(tmp_path)
    checkpoints.save(capture(backend), {"step": 1}, probe_loss=0.0)
    with torch.no_grad():
        model.weight.fill_(7.0)  # the next step of training
    checkpoints.wait()
    found = checkpoints.newest()
    assert found is not None
    restore(backend, found.path / BACKEND, found.digests, ALONE)
    assert torch.equal(model.weight, before)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2)
    checkpoints.save(snapshot(), {"step": 2, "again": True}, probe_loss=0.5, in_background=False)
    assert verify(tmp_path / "step-00000002").state == {"step": 2, "again": True}


def test_checkpoints_past_the_resumed_step_are_set_aside_not_lost(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 1, 2, 3)
    checkpoints.set_aside_after(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aside-step-00000002", "aside-step-00000003", "step-00000001",
    ]  # fmt: skip
    assert verify(tmp_path / "aside-step-00000003").state == {"step": 3}


def test_folders_that_are_not_checkpoints_are_passed_over(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 5)
    for name in ("step-00000009x", "step-7", "xstep-00000009", "step-../../00000001".replace("/", "_")):
        (tmp_path / name).mkdir()
    found = checkpoints.newest()
    assert found is not None
    assert found.path.name == "step-00000005"
