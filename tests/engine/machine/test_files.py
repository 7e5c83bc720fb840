"""What is said where results cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trunkline.engine.machine.files import copy_tree, written_to


def test_an_input_error_is_no_lack_of_room() -> None:
    """Pictures and cases are read while results are written."""
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error") as raised, written_to(Path("out")):
        raise error
    assert raised.value is error


def test_a_copy_of_what_must_not_be_written_to_may_be_written_to(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "inner").mkdir(parents=True)
    (source / "left").write_text("out")
    (source / "inner/file").write_text("text")
    new = [path.stat().st_mode for path in (source / "inner", source / "inner/file")]
    (source / "inner/file").chmod(0o400)
    for folder in (source / "inner", source):
        folder.chmod(0o500)
    target.mkdir()
    copy_tree(source, target, left_out=("left",))
    copies = [target / "inner", target / "inner/file"]
    assert sorted(target.rglob("*")) == copies
    assert copies[1].read_text() == "text"
    assert [path.stat().st_mode for path in (target, *copies)] == [new[0], *new]


def test_a_copy_into_the_folder_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    copy_tree(tmp_path, tmp_path / "copy")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "copy", "copy/file", "file"
    ]  # fmt: skip
