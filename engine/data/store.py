"""A store: a folder of typed arrays with an index, read in slices, and only from files that have been verified.

    DIR/store.json       the index, written last: its presence says that the store is whole
    DIR/<name>.npy       one array each, a plain .npy file
    DIR/...              further files, such as a schema or a tokenizer
    DIR/.verified.json   which files have been verified, as they were then

    class Pictures(ArrayStore): ...                             says what is prepared, and by which command
    store = Pictures.open(root)                            index, sizes, headers and further files are checked
    store["train/labels"].rows(3, 7)                       fixed rows: int64 [4]
    store["train/pictures"].item(3)                        one item of a ragged array: of bytes (uint8), of tokens
    store.verify(names), verify_together(arrays, ranks)    values are compared with their digests, in parallel

An array [n, ...] has fixed rows. A ragged one is flat: item i is values[offsets[i] : offsets[i + 1]], where `offsets`
is another array of the store, int64 [N + 1], which several may share. Encoded pictures of any size are ragged uint8.

Rows and items are read by position, not mapped. So a file that was cut short is an error and no crash, forks may share
it, and resident memory does not grow with what has been read. trunkline.engine.data.store_writer writes stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import numpy as np

from trunkline.engine.data.npy import NpyFile, Spec, digests_found
from trunkline.engine.errors import DataError, MissingDataError
from trunkline.engine.machine.files import entry, replace_whole
from trunkline.engine.machine.reading import advice, read_object, reason
from trunkline.engine.ranks.distributed import Ranks, gather

INDEX, VERIFIED = "store.json", ".verified.json"
VERSION = 2
MAX_INDEX_BYTES = 256 << 20
MAX_OPEN_FILES, MAX_OPEN_MAPS = 256, 8
_S = TypeVar("_S", bound="ArrayStore")


class Array:
    """An array of a store. It holds no values; a pickled copy opens the file for itself, when it first reads."""

    def __init__(self, store: ArrayStore, name: str, spec: Spec) -> None:
        self.store, self.name, self.spec = store, name, spec

    def __len__(self) -> int:
        """Rows, or items of a ragged array."""
        offsets = self.spec.offsets
        return self.spec.shape[0] if offsets is None else self.store.arrays[offsets].shape[0] - 1

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start ... stop-1, a copy [stop - start, ...]; of a ragged array its values, whatever the items."""
        return self.store._open(self.name).rows(start, stop)

    def item(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values start ... stop-1 of item `index` of a ragged array, a copy [n]; all of them by default."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        begin, end = self._offsets(index, index + 2).tolist()
        first = min(begin + start, end)
        return self.rows(first, end if stop is None else max(first, min(end, begin + stop)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], the number of values in each item of a ragged array. Raises DataError if its offsets are none."""
        offsets = self._offsets(0, len(self) + 1)
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != self.spec.shape[0] or lengths.min(initial=0) < 0:
            raise DataError(
                f"{self.store.path(str(self.spec.offsets))}: not the offsets of values: {self.store.remedy}"
            )
        return lengths

    def map(self) -> np.ndarray:
        """All of it as a read-only memory map, for what passes over many values at once."""
        return self.store._map(self.name)

    def _offsets(self, start: int, stop: int) -> np.ndarray:
        assert self.spec.offsets is not None, f"{self.name} has fixed rows"
        return self.store._open(self.spec.offsets).rows(start, stop)


class ArrayStore:
    """A whole store; make one with `open`. Safe to pickle and to use after a fork.

    A workload's store is a subclass that says what is prepared and by which command, and reads version 1 if it had one.

    arrays: what the index says of each array, by name
    index: store.json, with the workload's own `facts`, which the fingerprint covers, and notes, which it does not
    fingerprint: names the content: every value, further file and fact
    """

    workload: ClassVar[str]
    prepare: ClassVar[str]
    """The command that makes one; the folder follows."""

    def __init__(self, root: Path, index: dict[str, Any]) -> None:
        self.root, self.index = root, index
        self.arrays = {name: Spec.from_json(spec) for name, spec in index["arrays"].items()}
        self.files: dict[str, str] = index["files"]
        self.facts: dict[str, Any] = index["facts"]
        self.fingerprint: str = index["fingerprint"]
        self._verified: dict[str, list[Any]] = {}
        self._open = lru_cache(MAX_OPEN_FILES)(self._verified_file)
        self._map = lru_cache(MAX_OPEN_MAPS)(lambda name: self._open(name).map())

    @classmethod
    def open(cls: type[_S], root: Path | str) -> _S:
        """Open the store in folder `root`. The index, every array's size and header, and further files are checked.

        Raises DataError if there is none, if it is of another workload, or if it is damaged.
        """
        root = Path(root)
        path, remedy = root / INDEX, cls._remedy(root)
        try:
            if not path.is_file():
                raise MissingDataError(
                    f"{root}: no prepared data set here (no {INDEX}): make one with `{cls.prepare} {root}`"
                )
            index = read_object(path, MAX_INDEX_BYTES)
            version = index.get("version")
            if type(version) is not int or version not in (1, VERSION):
                raise DataError(f"{path}: store version {version!r:.80} where {VERSION} is read: {remedy}")
            if version == 1:
                index = cls.from_version_1(root, index)
            elif index["workload"] != cls.workload:
                raise DataError(
                    f"{path}: is a data set of {index['workload']!r:.80}, not of '{cls.workload}': prepare one, "
                    f"`{cls.prepare} OTHER_FOLDER`"
                )
            elif index["fingerprint"] != fingerprint(index):
                raise DataError(f"{path}: changed since it was written: {remedy}")
            if not all(_inside(name) for part in ("arrays", "files") for name in index[part]):
                raise ValueError("a file that would lie elsewhere")
            store = cls(root, index)
            store._check_files()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason(error)}): {advice(error, remedy)}") from error
        except ValueError as error:
            raise DataError(f"{path}: damaged ({reason(error)}): {remedy}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged ({error!r:.200}): {remedy}") from error
        return store

    @classmethod
    def from_version_1(cls, root: Path, index: dict[str, Any]) -> dict[str, Any]:
        """The index as VERSION writes it, of one of version 1; a workload that had that version overrides this."""
        raise DataError(f"{root / INDEX}: store version 1 where {VERSION} is read: {cls._remedy(root)}")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _again, (type(self), self.root, self.index, self._verified)

    def __getitem__(self, name: str) -> Array:
        return Array(self, name, self.arrays[name])

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.root / f"{name}.npy"

    @property
    def remedy(self) -> str:
        """What to do about a damaged store."""
        return self._remedy(self.root)

    @classmethod
    def _remedy(cls, root: Path) -> str:
        return f"remove {root} and prepare the data set again, `{cls.prepare} {root}`"

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare the values of these arrays, or of all, with their digests, by several threads.

        What was verified before is passed over: a file of the same size, time of change and inode. Raises DataError
        that names the first file that differs.
        """
        if not self._verified:
            with contextlib.suppress(OSError, ValueError):
                self._verified = read_object(self.root / VERIFIED, MAX_INDEX_BYTES)
        wanted = list(self.arrays if names is None else dict.fromkeys(names))
        states = {name: self._state(name) for name in wanted}
        todo = [name for name in wanted if self._verified.get(name) != states[name]]
        if not todo:
            return
        files = [(self.path(name), self.arrays[name]) for name in todo]
        with contextlib.closing(digests_found(files, self.remedy)) as digests:
            for name, (path, spec), found in zip(todo, files, digests, strict=True):
                if found != spec.digest:
                    raise DataError(
                        f"{path}: damaged: its values are not those that were written (their digest is {found}, and "
                        f"{spec.digest} in {INDEX}): copy that file again, or {self.remedy}"
                    )
                self._verified[name] = states[name]
        with contextlib.suppress(OSError):  # a folder that must not be written: the next start verifies again
            suffix = f".{socket.gethostname()}.{os.getpid()}"  # several ranks may verify at once
            replace_whole(self.root / VERIFIED, json.dumps(self._verified) + "\n", suffix)

    def trust(self, names: Iterable[str]) -> None:
        """Take these arrays as verified: another process of this machine has done it."""
        self._verified |= {name: self._state(name) for name in names}

    def _file(self, name: str) -> NpyFile:
        return NpyFile(self.path(name), self.arrays[name], self.remedy)

    def _state(self, name: str) -> list[Any]:
        with self._file(name) as file:
            return file.state

    def _check_files(self) -> None:
        for name, digest in self.files.items():
            path = self.root / name
            try:
                found = entry(path, follow=True)["sha256"]
            except OSError as error:
                what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {reason(error)}"
                raise DataError(f"{path}: {what}: {advice(error, self.remedy)}") from error
            if found != digest:
                raise DataError(f"{path}: changed since it was written: {self.remedy}")
        for name, spec in self.arrays.items():
            if spec.offsets is not None and self.arrays[spec.offsets].dtype != "<i8":
                raise ValueError(f"offsets of {name!r:.80} that are none")
            self._state(name)

    def _verified_file(self, name: str) -> NpyFile:
        file = self._file(name)
        if self._verified.get(name) != file.state:
            self.verify([name])
        return file


def verify_together(arrays: Iterable[Array], ranks: Ranks) -> None:
    """Verify these arrays, once on each machine. Called on all ranks; raises DataError on all of them.

    The first rank of each machine verifies, and tells the others what it found.
    """
    machine = _machine()
    verifies = gather(machine, ranks).index(machine) == ranks.rank
    by_store = [(store, [array.name for array in group]) for store, group in groupby(arrays, lambda a: a.store)]
    problem = ""
    if verifies:
        try:
            for store, names in by_store:
                store.verify(names)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            problem = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    _raise_first(gather(problem, ranks))
    try:
        for store, names in by_store if not verifies else ():
            store.trust(names)
    except DataError as error:  # this rank sees another folder than the one that verified
        problem = str(error)
    _raise_first(gather(problem, ranks))


def _raise_first(problems: Iterable[str]) -> None:
    if said := next(filter(None, problems), ""):
        raise DataError(said)


def _machine() -> str:
    """What tells this machine from others, also from one of the same name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot.strip()}"


def fingerprint(index: dict[str, Any]) -> str:
    """Names the content that an index describes: SHA-256, hexadecimal."""
    content = {name: index[name] for name in ("workload", "arrays", "files", "facts")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _inside(name: str) -> bool:
    place = PurePosixPath(name)
    return bool(place.parts) and not place.is_absolute() and ".." not in place.parts and "\0" not in name


def _again(cls: type[ArrayStore], root: Path, index: dict[str, Any], verified: dict[str, list[Any]]) -> ArrayStore:
    store = cls(root, index)
    store._verified = verified
    return store
