"""A manifest lets no change of a checkpoint pass, and nothing outside of it in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.checkpoint.test_checkpoints import INDEX, save
from trunkline.engine.checkpoint.manifest import MANIFEST, TRAINER, manifest_text, verify
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import entry


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


@pytest.mark.fault("symbolic link in a checkpoint")
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    file = tmp_path / "step-00000001" / INDEX
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(tmp_path / "step-00000001")


@pytest.mark.fault("manifest that names {name}")
@pytest.mark.parametrize("name", ["../outside.pt", "/etc/hostname", "a\0b", "n" * 5000, "\ud800"])
def test_a_manifest_that_names_files_outside_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "outside.pt").write_bytes(b"hostile")
    folder = tmp_path / "step-00000001"
    files = {TRAINER: entry(folder / TRAINER), name: {"bytes": 7, "sha256": "0"}}
    (folder / MANIFEST).write_text(manifest_text(json.loads((folder / MANIFEST).read_text()) | {"files": files}))
    with pytest.raises(CheckpointError, match=r"names a file outside|cannot be read"):
        verify(folder)
