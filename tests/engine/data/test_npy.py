from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from trunkline.engine.data import npy
from trunkline.engine.data.npy import NpyFile, NpyWriter, Spec, digests_found, write_npy
from trunkline.engine.errors import DataError

DTYPES = ["|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (0,), (5, 3), (2, 3, 4, 5)])
def test_a_file_is_numpys_and_reads_back(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    spec = write_npy(tmp_path / "x.npy", values)
    np.save(tmp_path / "theirs.npy", values)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    with NpyFile(tmp_path / "x.npy", spec, "") as file:
        read = file.rows(0, shape[0])
        np.testing.assert_array_equal(read, values)
        np.testing.assert_array_equal(file.map(), values)
        np.testing.assert_array_equal(file.rows(shape[0] // 2, shape[0]), values[shape[0] // 2 :])
    assert (read.dtype, Spec.from_json(spec.to_json())) == (values.dtype, spec)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_the_digest_is_that_of_the_blocks_however_they_were_written(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npy, "BLOCK", 64)
    values = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    blocks = [values[k : k + 64].tobytes() for k in range(0, size, 64)]
    expected = hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()
    with NpyWriter(tmp_path / "x.npy", "|u1") as writer:
        for part in np.split(values, sorted(np.random.default_rng(1).integers(0, size + 1, 5))):
            writer.add(part)
        spec = writer.finish()
    assert spec == Spec("|u1", (size,), f"blocks:{expected}")
    assert list(digests_found([(tmp_path / "x.npy", spec)] * 3, "")) == [spec.digest] * 3


def test_digests_of_earlier_versions_are_found_too(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(12, dtype=np.int64))
    whole = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    values = hashlib.sha256(np.arange(12, dtype=np.int64).tobytes()).hexdigest()
    specs = [Spec("<i8", (12,), "blake2b:"), Spec("<i8", (12,), "sha256:")]
    assert list(digests_found([(path, spec) for spec in specs], "")) == [f"blake2b:{whole}", f"sha256:{values}"]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 6)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    spec = write_npy(tmp_path / "x.npy", np.zeros((5, 2)))
    with NpyFile(tmp_path / "x.npy", spec, "") as file, pytest.raises(IndexError, match="of 5"):
        file.rows(start, stop)


def test_a_file_that_is_cut_short_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    spec = write_npy(path, np.zeros((1000, 8)))
    with NpyFile(path, spec, "copy it again") as file:
        file.rows(990, 1000)
        with path.open("r+b") as opened:
            opened.truncate(128 + 100 * 64)
        with pytest.raises(DataError, match=r"x\.npy: cut short since it was opened: copy it again"):
            file.rows(990, 1000)


BAD = {
    "dtype": ("<c8", [3], "blocks:"), "object": ("|O", [3], "blocks:"), "a scalar": ("<f4", [], "blocks:"),
    "negative": ("<f4", [-1], "blocks:"), "true": ("<f4", [True], "blocks:"),
    "huge": ("<f4", [1 << 40, 1 << 40], "blocks:"),
    "kind": ("<f4", [3], "md5:"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_describes_no_array_is_refused(name: str) -> None:
    dtype, shape, digest = BAD[name]
    with pytest.raises(ValueError, match="an array of"):
        Spec.from_json({"dtype": dtype, "shape": shape, "digest": digest})


def test_a_disk_that_cannot_be_read_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    spec = write_npy(tmp_path / "x.npy", np.zeros(5))
    with NpyFile(tmp_path / "x.npy", spec, "copy it again") as file:
        os.dup2(os.open(tmp_path, os.O_RDONLY), file.file.fileno())  # reading a folder is refused, as a bad disk would
        for read in (lambda: file.rows(0, 5), lambda: file.hash(("blocks", 0, 8))):
            with pytest.raises(DataError, match=r"x\.npy: cannot be read: .*: copy it again"):
                read()
