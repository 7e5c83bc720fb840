"""Whole checkpoints or none: what a reader does with every kind of damage, and what a writer leaves when it cannot."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from tests.engine.data.test_store import no_descriptors_left
from tests.engine.state.test_sharded_state import Alone
from trunkline.engine.checkpoint.checkpoints import BACKEND, Checkpoints
from trunkline.engine.checkpoint.manifest import MANIFEST, TRAINER, verify
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_files import ShardedFiles, file_names
from trunkline.engine.state.sharded_state import Snapshot, capture, restore

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


STRAY = {
    "a desktop's note": lambda folder: (folder / ".DS_Store").write_bytes(b"x"),
    "an editor's backup": lambda folder: (folder / "trainer.json~").write_text("{}"),
    "a file that is open elsewhere": lambda folder: (folder / BACKEND / ".nfs0000000001").write_bytes(b"x"),
    "a copy of an index": lambda folder: shutil.copy(folder / INDEX, folder / BACKEND / "rank-00000-of-00001 (1).json"),
    "a part of another world": lambda folder: shutil.copy(
        folder / INDEX, folder / BACKEND / "rank-00001-of-00002.json"
    ),
    "an empty folder": lambda folder: (folder / "new folder").mkdir(),
    "a named pipe": lambda folder: os.mkfifo(folder / BACKEND / "pipe"),
    "a name that is not UTF-8": lambda folder: open(os.fsencode(folder) + b"/caf\xe9", "wb").close(),
    "a link to nowhere": lambda folder: (folder / "link").symlink_to("nowhere"),
}


@pytest.mark.fault("{stray} in every checkpoint")
@pytest.mark.parametrize("stray", STRAY)
def test_a_stray_file_is_named_and_ignored_and_goes_with_its_checkpoint(
    tmp_path: Path, stray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = save(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        STRAY[stray](tmp_path / f"step-{step:08d}")
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"step": 3}
    assert ShardedFiles(found.path / BACKEND).shapes == {"weight": (20, 64)}
    said = capsys.readouterr().out
    assert said.count("not in its manifest, and ignored") == 1
    assert "step-00000003" in said
    checkpoints.set_aside_after(2)
    checkpoints.keep_last = 1
    checkpoints.save(snapshot(), {"step": 4}, probe_loss=0.5, in_background=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside-step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", FILES)
def test_no_older_checkpoint_takes_the_place_of_one_that_cannot_be_read_now(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save(tmp_path, 100, 200)
    opened = os.open

    def lost_mount(path: str | Path, *how: int) -> int:
        if Path(path) == tmp_path / "step-00000200" / name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lost_mount)
        with pytest.raises(
            CheckpointError, match=r"step-00000200: .* cannot be read: Stale file handle: mend that, and"
        ):
            checkpoints.newest()
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"step": 200}


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 100)
    with (
        no_descriptors_left(),
        pytest.raises(CheckpointError, match=r": cannot be read: Too many open files: mend that, and run the same"),
    ):
        checkpoints.newest()


@pytest.mark.fault("a step folder that is a copy of another")
def test_a_copy_under_the_name_of_another_step_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = save(tmp_path, 12)
    shutil.copytree(tmp_path / "step-00000012", tmp_path / "step-00000020")
    found = checkpoints.newest()
    assert found is not None
    assert found.path.name == "step-00000012"
    assert "step-00000020: MANIFEST.json is of step 12" in capsys.readouterr().out
    shutil.copytree(tmp_path / "step-00000012", tmp_path / "copy of the twelfth")  # no name that says a step
    assert checkpoints.load(tmp_path / "copy of the twelfth").state == {"step": 12}


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints = save(tmp_path, 99_999_998, 99_999_999, 100_000_000, keep_last=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-99999999", "step-100000000"}
    found = checkpoints.newest()
    assert found is not None
    assert found.state["step"] == 100_000_000
    checkpoints.set_aside_after(99_999_999)
    assert {path.name for path in tmp_path.iterdir()} == {"step-99999999", "aside-step-100000000"}


def test_the_checkpoint_of_the_best_step_is_kept_where_asked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep_last=1, keep_best=True)
    checkpoints.open_for_writing()
    for step, best_step in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 5)):
        checkpoints.save(snapshot(), {"step": step, "best_step": best_step}, probe_loss=0.5, in_background=False)
        kept = {int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()}
        assert kept == {step, best_step} - {0}


HOSTILE = {
    "nested 100,000 deep": lambda file: file.write_text("[" * 100_000),
    "nested 900 deep": lambda file: file.write_text('{"a":' * 900 + "1" + "}" * 900),
    "a named pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a link": lambda file: (shutil.move(file, file.parents[2] / "there"), file.symlink_to(file.parents[2] / "there")),
}


@pytest.mark.fault("{name} of the newest checkpoint is {what}")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_of_another_kind_is_named_at_once(
    tmp_path: Path, name: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = save(tmp_path, 1, 2)
    HOSTILE[what](tmp_path / "step-00000002" / name)
    found = checkpoints.newest()
    assert found is not None
    assert found.state == {"step": 1}
    said = capsys.readouterr().out
    assert "step-00000002" in said
    assert name in said


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_a_mount_that_knows_no_fsync_of_folders_can_be_used(
    tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if error == errno.EIO:
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, 1)
        return
    assert save(tmp_path, 1).newest() is not None
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    with pytest.raises(CheckpointError, match=r"cannot write this checkpoint"):
        save(tmp_path, 2)  # a file's content must reach the disk


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
    for name in (
        "step-0000000\u0669",
        "step-000000009",
        "step-00000009x",
        "step-7",
        "xstep-00000009",
        "step-../../00000001".replace("/", "_"),
    ):
        (tmp_path / name).mkdir()
    found = checkpoints.newest()
    assert found is not None
    assert found.path.name == "step-00000005"
