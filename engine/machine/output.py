"""Printing that never ends training.

Standard output and error may go away, fill up, stop, or know ASCII alone.

    keep_printing()                 for the rest of the process
    with lasting_output(): ...      for a part of it
    @lasting_output()               for a function

What can be printed is printed; what cannot be is dropped. This holds for print, warnings and progress bars alike and in
every thread, because it stands in the place of sys.stdout and sys.stderr. A line is never held back, so nothing is left
that could fail when Python ends.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_STREAMS = ("stdout", "stderr")
_PIECE = 4096
"""Bytes that a pipe which is ready takes without waiting: PIPE_BUF."""
_PATIENCE_MS = 1000


def keep_printing(*streams: str) -> None:
    """From now on no print to these `streams` (default "stdout", "stderr") fails or waits for long.

    Leave out standard output where it carries a result: losing that must be an error. Standard descriptors that are
    closed are opened, or the next file would be one of them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    for name in streams or _STREAMS:
        setattr(sys, name, _Lasting(getattr(sys, name)))


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no print within fail or wait for long."""
    before = {name: getattr(sys, name) for name in _STREAMS if not isinstance(getattr(sys, name), _Lasting)}
    lasting = {name: _Lasting(stream) for name, stream in before.items()}
    for name, stream in lasting.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in lasting.items():
            stream.flush()
            if getattr(sys, name) is stream:  # else someone else has put his own there
                setattr(sys, name, before[name])


class _Lasting:
    """A text stream that drops what cannot be written. Everything but writing is the `stream`'s, which may be None."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream, self._held, self._patience_ms = stream, threading.local(), _PATIENCE_MS
        # a file of the system is written to directly: what Python's buffer holds could not be dropped any more
        self._descriptor = None
        with suppress(OSError, ValueError, AttributeError):
            self._descriptor = stream.fileno() if type(stream) is io.TextIOWrapper else None
            stream.flush()

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._held.text = getattr(self._held, "text", "") + text  # of each thread its own
        if "\n" in text or len(self._held.text) > _PIECE:
            self.flush()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        text, self._held.text = getattr(self._held, "text", ""), ""
        with suppress(OSError, ValueError, AttributeError):  # gone or full; closed; None
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            data = text.encode(encoding, "backslashreplace")
            if self._descriptor is None:
                self._stream.write(data.decode(encoding))
                self._stream.flush()
            else:
                self._write(self._descriptor, data)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def _write(self, descriptor: int, data: bytes) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while data:
            ready = poll.poll(self._patience_ms)
            self._patience_ms = _PATIENCE_MS if ready else 0  # a reader that has stopped is waited for once
            if not ready:
                return
            data = data[os.write(descriptor, data[:_PIECE]) :]
