"""Reading files back: regular files only, of bounded size, and JSON of bounded depth.

    open_regular(path)        a regular file, open for reading; never waits, as a named pipe would make a reader wait
    read_whole(path, most)    its bytes
    check_regular(folder)     that whoever reads a folder's files will not wait either
    parse_json(data)          a JSON value
    read_json(path, most)     the JSON value that a file holds
    read_object(path, most)   the same, which must be an object
    reason(error)             what went wrong, for a message that names the file itself
    refused(error)            whether the system refuses to read what may well be whole
    advice(error, remedy)     what to do about it: the remedy for a damaged file, or for what the system refuses

All of them raise OSError for what the system says of the file, and ValueError for what is in it; nothing else.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 << 20
MAX_DEPTH = 64
"""Objects and lists inside one another; what is deeper exhausts the stack of whatever walks through it."""

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
AGAIN = "mend that, and run the same command again"
_REFUSED = {
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


def open_regular(path: str | Path, follow: bool = True) -> BufferedReader:
    """The file, open for reading. With `follow` false a symbolic link is refused too. Raises OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL, or what the file system's encoding cannot say
        raise OSError(errno.EINVAL, f"not a file's name: {error}", repr(str(path))) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, where a file is expected", str(path))
    return os.fdopen(descriptor, "rb")


def read_whole(path: str | Path, most: int, follow: bool = True) -> bytes:
    """The file's bytes, at most `most` of them. Raises OSError."""
    with open_regular(path, follow) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 2**20:g} MiB", str(path))
    return data


def check_regular(folder: str | Path) -> None:
    """Raise OSError if a folder for programs of others to read holds what would make them wait: a pipe, a device."""
    for name in sorted(os.listdir(folder)):
        place = os.path.join(folder, name)
        if not os.path.isdir(place) and os.path.exists(place):
            open_regular(place).close()


def parse_json(
    data: bytes | str,
    finite: bool = True,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """A JSON value, at most MAX_DEPTH deep. NaN, Infinity and 1e999 are errors unless `finite` is false.

    Raises ValueError; json.JSONDecodeError, which is one, where it can say the place.
    """
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    hooks: dict[str, Any] = (
        {"parse_constant": _no_constant, "parse_float": _finite, "parse_int": _bounded} if finite else {}
    )
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for each in level for child in _children(each)]
        if not level:
            return value
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def read_json(path: str | Path, most: int = MAX_JSON_BYTES, finite: bool = True, follow: bool = True) -> Any:
    """The JSON value that a file holds. Raises OSError or ValueError."""
    return parse_json(read_whole(path, most, follow), finite)


def read_object(
    path: str | Path, most: int = MAX_JSON_BYTES, finite: bool = True, follow: bool = True
) -> dict[str, Any]:
    """The JSON object that a file holds. Raises OSError or ValueError."""
    value = read_json(path, most, finite, follow)
    if not isinstance(value, dict):
        raise ValueError("it does not hold an object {...}")
    return value


def reason(error: Exception) -> str:
    """What went wrong, without the file's name, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (said.splitlines() or [type(error).__name__])[0]


def refused(error: Exception) -> bool:
    """Whether the system refuses to read what may well be whole: no permission, no file descriptor, a lost mount."""
    return isinstance(error, OSError) and error.errno in _REFUSED


def advice(error: Exception, remedy: str) -> str:
    """`remedy`, which may cost the file; not where the system refuses to read what may well be whole."""
    return AGAIN if refused(error) else remedy


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        shown = text if len(text) <= 20 else f"{text[:20]}..."
        raise ValueError(f"{shown} is larger than any number that a program holds")
    return value


def _bounded(text: str) -> int:
    _finite(text)
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write a number")
