"""One .npy file: what is said of it, its header, reading by position, and digests of its values.

Spec                  dtype, shape and digest; .header, .nbytes
NpyFile(path, spec)   open for reading; .rows(start, stop)
NpyWriter(path, ...)  written row by row: .add(values), then .finish() -> Spec
digests_found(files)  what the files hold now, by several threads
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import note_written
from trunkline.engine.machine.reading import advice, open_regular, reason

BLOCK = 16 << 20  # bytes
_DTYPES = {"|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"}
_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Spec:
    """What is said of an array.

    dtype, shape: as in the header of its file
    digest: "<kind>:<hexadecimal>". "blocks": the SHA-256 of the SHA-256s of each BLOCK of values, so that threads can
        share a file. Earlier versions: "sha256" of the values; "blake2b" (16 bytes) of the whole file
    offsets: the name of the array that holds a ragged one's offsets
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    offsets: str | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Spec:
        """Raises KeyError, TypeError or ValueError for what is no description of an array."""
        spec = cls(value["dtype"], tuple(value["shape"]), value["digest"], value.get("offsets"))
        counts = all(type(n) is int and n >= 0 for n in spec.shape)
        kind = spec.digest.partition(":")[0]
        if spec.dtype not in _DTYPES or kind not in _KINDS or not spec.shape or not counts or spec.nbytes >= 1 << 62:
            raise ValueError(f"an array of {spec.dtype!r:.20} {spec.shape!r:.80}, digest {spec.digest!r:.20}")
        return spec

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def header(self) -> bytes:
        """The bytes before the values, as numpy writes them: 128, unless there are many dimensions."""
        entry = f"{{'descr': '{self.dtype}', 'fortran_order': False, 'shape': {self.shape}, }}"
        size = max(128, -(-(len(entry) + 11) // 64) * 64) - 10
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + f"{entry:<{size - 1}}\n".encode()

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape[1:], dtype=object))

    @property
    def nbytes(self) -> int:
        """Of all values."""
        return self.shape[0] * self.row_bytes


class NpyFile:
    """A file of the size and with the header that `spec` says. Threads and forks may share it.

    state: what another file in its place, or a changed one, would not have

    Raises DataError, here and later, that ends in `remedy`.
    """

    def __init__(self, path: Path, spec: Spec, remedy: str) -> None:
        self._path, self._spec, self._remedy = path, spec, remedy
        self._start, self._row_bytes, self._dtype = len(spec.header), spec.row_bytes, np.dtype(spec.dtype)
        try:
            self.file = open_regular(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: is missing: {remedy}") from error
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            found, head = os.fstat(self.file.fileno()), os.pread(self.file.fileno(), self._start, 0)
        except OSError as error:
            raise self._unreadable(error) from error
        expected = self._start + spec.nbytes
        if found.st_size != expected:
            raise DataError(f"{path}: has {found.st_size} bytes where {expected} were written: {remedy}")
        if head != spec.header:
            raise DataError(f"{path}: damaged: not an array of {spec.dtype} {list(spec.shape)}: {remedy}")
        self.state = [found.st_size, found.st_mtime_ns, found.st_ino, spec.digest]

    def __enter__(self) -> NpyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows start ... stop-1, a copy [stop - start, ...], or in `out`, contiguous and of that shape and dtype."""
        if not 0 <= start <= stop <= self._spec.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self._spec.shape[0]}")
        if out is None:
            out = np.empty((stop - start, *self._spec.shape[1:]), self._dtype)
        size, place, done = (stop - start) * self._row_bytes, self._start + start * self._row_bytes, 0
        assert out.nbytes == size
        while done < size:  # one call reads at most 2 GiB
            try:
                rest: list[Any] = [out.reshape(-1).view(np.uint8)[done:] if done else out]
                count = os.preadv(self.file.fileno(), rest, place + done)
            except OSError as error:
                raise self._unreadable(error) from error
            if count == 0:
                raise DataError(f"{self._path}: cut short since it was opened: {self._remedy}")
            done += count
        return out

    def map(self) -> np.ndarray:
        """A read-only memory map."""
        if not self._spec.nbytes:  # an empty file cannot be mapped
            return np.empty(self._spec.shape, self._spec.dtype)
        return np.asarray(np.memmap(self.file, self._spec.dtype, "r", self._start, self._spec.shape))

    def hash(self, part: _Part) -> bytes:
        """The digest of some of the file's bytes."""
        kind, start, stop = part
        found = _KINDS[kind]()
        try:
            while start < stop and (data := os.pread(self.file.fileno(), min(stop - start, _READ_AT_ONCE), start)):
                found.update(data)
                start += len(data)
                note_written()
        except OSError as error:
            raise self._unreadable(error) from error
        return found.digest()

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"{self._path}: cannot be read: {reason(error)}: {advice(error, self._remedy)}")


class NpyWriter:
    """A file that is written row by row; its length need not be known before. Close it, or use it in a `with`."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...] = ()) -> None:
        assert dtype in _DTYPES, f"{dtype} is none that is read back"
        self._dtype, self._row, self._count, self._blocks = dtype, row, 0, _Blocks()
        self._start = len(self._spec("").header)  # which has room for any number of rows
        self._file = path.open("wb")
        self._file.write(bytes(self._start))

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, values: np.ndarray) -> None:
        """Rows [n, ...] of the file's dtype, or what it can hold."""
        values = np.ascontiguousarray(values, dtype=self._dtype)
        assert values.shape[1:] == self._row
        data = values.reshape(-1).view(np.uint8).data
        self._blocks.add(data)
        self._file.write(data)
        self._count += len(values)

    def finish(self, offsets: str | None = None) -> Spec:
        """Write the header and wait until all is on the disk."""
        spec = self._spec(f"blocks:{self._blocks.hexdigest()}", offsets)
        assert len(spec.header) == self._start
        self._file.seek(0)
        self._file.write(spec.header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        note_written()
        return spec

    def _spec(self, digest: str, offsets: str | None = None) -> Spec:
        return Spec(self._dtype, (self._count, *self._row), digest, offsets)


def write_npy(path: Path, array: np.ndarray) -> Spec:
    """Write an array [n, ...] as it is."""
    with NpyWriter(path, array.dtype.str, array.shape[1:]) as writer:
        writer.add(array)
        return writer.finish()


class _Blocks:
    """The digest "blocks" of bytes that come bit by bit."""

    def __init__(self) -> None:
        self._done, self._block, self._room = hashlib.sha256(), hashlib.sha256(), BLOCK

    def add(self, data: memoryview) -> None:
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._done.update(self._block.digest())
                self._block, self._room = hashlib.sha256(), BLOCK

    def hexdigest(self) -> str:
        if self._room < BLOCK:
            self._done.update(self._block.digest())
        return self._done.hexdigest()


def digests_found(files: Sequence[tuple[Path, Spec]], remedy: str) -> Generator[str, None, None]:
    """The digest of each file's bytes as they are now, of the kind in its Spec, in their order, by several threads.

    Raises DataError. Close the iterator to stop early.
    """
    jobs = [(path, spec, part) for path, spec in files for part in _parts(spec)]
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def work(job: tuple[Path, Spec, _Part]) -> bytes:
        path, spec, part = job
        with NpyFile(path, spec, remedy) as file:
            return file.hash(part)

    try:
        found = pool.map(work, jobs)
        for _, spec in files:
            parts = list(islice(found, len(_parts(spec))))
            kind = spec.digest.partition(":")[0]
            yield f"{kind}:{hashlib.sha256(b''.join(parts)).hexdigest() if kind == 'blocks' else parts[0].hex()}"
    finally:
        pool.shutdown(cancel_futures=True)


_Part = tuple[str, int, int]
"""The kind of a digest, and the bytes of the file that it is of."""
_KINDS: dict[str, Callable[[], Any]] = {
    "blocks": hashlib.sha256,
    "sha256": hashlib.sha256,
    "blake2b": lambda: hashlib.blake2b(digest_size=16),
}


def _parts(spec: Spec) -> list[_Part]:
    kind, first = spec.digest.partition(":")[0], len(spec.header)
    last = first + spec.nbytes
    if kind == "blocks":
        return [(kind, start, min(start + BLOCK, last)) for start in range(first, last, BLOCK)]
    return [(kind, 0 if kind == "blake2b" else first, last)]
