"""Files that are whole or not there, on the disk when it is said that they are, and written by one process."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import DataError

_UMASK = os.umask(0o022)
os.umask(_UMASK)
_pieces = itertools.count()
_pieces_written = 0


def note_written() -> None:
    """A piece of work on files is done: something was written, read back or brought to the disk."""
    global _pieces_written
    _pieces_written = next(_pieces)  # by any thread


def pieces_written() -> int:
    """A number that changes when work on files gets on. A watchdog tells a slow disk from a hang by it."""
    return _pieces_written


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft beside `path`, then put it in `path`'s place. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    write(draft)
    draft.replace(path)
    note_written()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Raises OSError."""
    replace_whole(path, lambda draft: draft.write_text(json.dumps(value, indent=2) + "\n"))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that has the permissions of any other new file. Raises OSError."""
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(None, str(error), str(path)) from error
    path.chmod(0o666 & ~_UMASK)
    note_written()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    note_written()


@contextmanager
def only_writer(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder` against a second preparation of `out`. The lock goes with the process, however it ends.

    Raises DataError while another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another preparation is writing this folder: wait for it, or choose another --out"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
