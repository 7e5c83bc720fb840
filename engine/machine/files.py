"""Files that are whole or not there, on the disk when it is said that they are, and written by one process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.reading import open_regular

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UMASK = os.umask(0o022)
os.umask(_UMASK)
_libc = ctypes.CDLL(None)
_PIECE = 32 << 20  # bytes
_pieces = itertools.count()
_pieces_written = 0


def note_written() -> None:
    """A piece of work on files is done: something was written, read back or brought to the disk."""
    global _pieces_written
    _pieces_written = next(_pieces)  # by any thread


def pieces_written() -> int:
    """A number that changes when work on files gets on. A watchdog tells a slow disk from a hang by it."""
    return _pieces_written


def replace_whole(path: Path, content: str | Callable[[Path], object], suffix: str = "") -> None:
    """Write a text, or let a function write a draft beside `path`, then put it in `path`'s place, on the disk.

    suffix: of the draft's name, where several processes may write the same file at once

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft{suffix}")
    if isinstance(content, str):
        draft.write_text(content, encoding="utf-8", errors="backslashreplace")  # a folder's name need not be UTF-8
    else:
        content(draft)
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def copy_tree(source: Path, target: Path, left_out: Container[str] = ()) -> None:
    """Copy a folder's files and folders into `target`, but for names that are left out. Raises OSError.

    The copies have the permissions of new files: what must not be written to may be copied, and the copy replaced.
    """
    paths = [path for path in sorted(source.iterdir()) if path.name not in left_out]
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.is_dir():
            copy_tree(path, target / path.name, left_out)
        else:
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Raises OSError."""
    replace_whole(path, json.dumps(value, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that has the permissions of any other new file. Raises OSError."""
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(None, str(error), str(path)) from error
    _sort_metadata(path)
    path.chmod(0o666 & ~_UMASK)
    note_written()


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order, which safetensors writes in a random one: equal weights are equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError.

    Some mounts (FUSE, SMB, some network file systems) know no fsync of a folder and refuse it; they order its names
    themselves, so that is no error. A file's content is never let off.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)
    note_written()


def made_folder(path: Path, flag: str = "--out") -> Path:
    """The folder that a person has named for results, made before the work begins. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "is a file" if path.is_file() else f"cannot be made ({error.strerror})"
        raise ConfigError(f"{flag} {path}: {why}: name a folder, which is made if it is not there") from error
    return path


@contextmanager
def written_to(out: Path, flag: str = "--out") -> Iterator[None]:
    """What is written within goes to the folder that a person has named. Raises DataError where there is no room.

    What writes pictures and texts does not say which file it was.
    """
    try:
        yield
    except OSError as error:
        # libraries in Rust give the number in words alone
        is_full = error.errno in _NO_ROOM or any(f"(os error {number})" in str(error) for number in _NO_ROOM)
        if error.filename is not None or not is_full:
            raise
        why = error.strerror or error
        raise DataError(f"{flag} {out}: cannot be written ({why}): make room, or choose another") from error


def unused(path: Path) -> Path:
    """`path`, or `path`.2, `path`.3, ...: the first name that nothing has."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def entry(path: Path, sync: bool = False, follow: bool = False) -> dict[str, Any]:
    """{"bytes", "sha256"} of a regular file, and it is on the disk if `sync`. A link is refused unless `follow`.

    Raises OSError.
    """
    with open_regular(path, follow) as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
            note_written()
        if sync:
            _flush(file.fileno(), file.tell())
        return {"bytes": file.tell(), "sha256": found.hexdigest()}


def _flush(descriptor: int, size: int) -> None:
    """Bring an open file to the disk, piece by piece, so that a slow disk is seen to get on. Raises OSError."""
    wait_write_wait = 7
    for first in range(0, size, _PIECE):
        # a mount that does not know this waits in fsync alone
        if _libc.sync_file_range(descriptor, ctypes.c_int64(first), ctypes.c_int64(_PIECE), wait_write_wait):
            break
        note_written()
    os.fsync(descriptor)
    note_written()


def try_lock(descriptor: int, shared: bool = False) -> OSError | None:
    """Hold an open file or folder against other processes, until it is closed. Returns why there are no locks there.

    Raises BlockingIOError while another process holds it.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None


@contextmanager
def only_writer(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder` against a second preparation of `out`. The lock goes with the process, however it ends.

    Raises DataError while another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            try_lock(descriptor)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another preparation is writing this folder: wait for it, or choose another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)
