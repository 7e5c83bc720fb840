"""From a folder of images to a prepared store (trunkline.models.image_classification.store).

    prepare(source, out, size, ...)   decode, resize and store every image

What is written depends on the files and the settings only, not on the number of workers. A store is written whole or
not at all; run again, the same command finds it finished and does nothing. Workers are threads: Pillow decodes and
resizes without the interpreter's lock. Memory does not grow with the number of images, but for some 200 bytes each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from trunkline.engine.data.npy import NpyWriter, Spec
from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import check_out, draft_of, finished, publish, write_index
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.image_classification.decode import BadImage, Size, read_image
from trunkline.models.image_classification.scan import Found, class_of, scan
from trunkline.models.image_classification.selection import (
    check_unreadable,
    crossing,
    draw_names,
    unreadable_note,
)
from trunkline.models.image_classification.store import ImageStore

_AHEAD = 4  # images for each worker: what bounds the memory
_DIGEST_BYTES = 16
_SETTING = "--max-bad-fraction"
Pixels = NDArray[np.uint8]


def prepare(
    source: Path,
    out: Path,
    size: Size,
    *,
    train_size: int | None = None,
    val_size: int | None = None,
    size_per_class: bool = False,
    workers: int | None = None,
    max_bad_fraction: float = 0.0,
    progress: bool = False,
) -> tuple[ImageStore, bool]:
    """Prepare the images below `source` as a store in `out`; returns it, and whether there was anything to do.

    size: what every image is resized to
    train_size, val_size: images that are drawn, or of each class; see trunkline.models.image_classification.selection
    workers: images decoded at a time; the default is one for each core

    Raises ConfigError for settings that cannot be, and for an `out` that holds something else. Raises DataError for a
    `source` that is not laid out as it must be, and for more unreadable images than `max_bad_fraction` of all.
    """
    _check_settings(size, train_size, val_size, workers, max_bad_fraction)
    check_out(out, source)
    found = scan(source)
    made_from: dict[str, Any] = {
        "source": _listing(found),
        "img-size": size.square,
        "short-side": size.short_side,
        "train-size": train_size,
        "val-size": val_size,
        "size-per-class": size_per_class,
    }
    if (out / INDEX).is_file():
        return finished(ImageStore, out, made_from), False
    chosen, draws = draw_names(found.images, {"train": train_size, "val": val_size}, size_per_class)
    total, bad = sum(map(len, chosen.values())), dict[str, str]()
    workers = workers or len(os.sched_getaffinity(0))
    arrays, keys = dict[str, Spec](), dict[str, tuple[Sequence[str], NDArray[np.bytes_]]]()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        draft_of(out) as draft,
        tqdm(total=total, unit=" images", disable=not progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for split, names in chosen.items():
            if not names:
                continue
            with _SplitWriter(draft, split, size, found.classes) as writer:
                for name, result in _decoded(pool, _AHEAD * workers, source, names, size):
                    if isinstance(result, str):
                        bad[name] = result
                        check_unreadable(bad, total, max_bad_fraction, _SETTING)
                    else:
                        writer.add(name, *result)
                    bar.update()
                arrays |= writer.finish()
                keys[split] = writer.names, np.array(writer.digests, f"S{_DIGEST_BYTES}")
            if not writer.names and split in ("train", "val"):
                raise DataError(f"{source / split}: none of its {len(names):,} images can be read")
        remarks = [*found.notes, *draws, *unreadable_note(bad, total), *crossing(keys)]
        facts = {"classes": found.classes, "square": size.square, "short_side": size.short_side}
        notes = {"made_from": made_from, "remarks": remarks, "left_out": bad}
        write_index(draft, ImageStore.workload, arrays, [], facts, notes)
        publish(draft, out)
    return ImageStore.open(out), True


class _SplitWriter:
    """The arrays of one split, image by image."""

    def __init__(self, draft: Path, split: str, size: Size, classes: Sequence[str]) -> None:
        (draft / split).mkdir()
        self._split, self._files, self._fixed = split, ExitStack(), size.square is not None
        self._places = {name: place for place, name in enumerate(classes)}
        row = (size.square, size.square, 3) if size.square is not None else ()
        self._images = self._files.enter_context(NpyWriter(draft / split / "images.npy", "|u1", row))
        self._draft, self._sizes = draft, list[tuple[int, int]]()
        self.names, self.digests = list[str](), list[bytes]()

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, name: str, pixels: Pixels, digest: bytes) -> None:
        self._images.add(pixels[None] if self._fixed else pixels.reshape(-1))
        self._sizes.append((pixels.shape[0], pixels.shape[1]))
        self.names.append(name)
        self.digests.append(digest)

    def finish(self) -> dict[str, Spec]:
        names = [os.fsencode(name) for name in self.names]
        labels = [self._places[class_of(name)] for name in self.names]
        sizes = np.array(self._sizes, np.int32).reshape(-1, 2)
        specs = {
            "images": self._images.finish(None if self._fixed else f"{self._split}/offsets"),
            "labels": self._write("labels", np.array(labels, np.int32)),
            "names": self._write("names", np.frombuffer(b"".join(names), np.uint8), f"{self._split}/name_offsets"),
            "name_offsets": self._write("name_offsets", _offsets(map(len, names))),
        }
        if not self._fixed:
            specs["sizes"] = self._write("sizes", sizes)
            specs["offsets"] = self._write("offsets", _offsets(height * width * 3 for height, width in self._sizes))
        return {f"{self._split}/{name}": spec for name, spec in specs.items()}

    def _write(self, name: str, values: np.ndarray, offsets: str | None = None) -> Spec:
        with NpyWriter(self._draft / self._split / f"{name}.npy", values.dtype.str, values.shape[1:]) as writer:
            writer.add(values)
            return writer.finish(offsets)


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _decoded(
    pool: ThreadPoolExecutor, ahead: int, source: Path, names: Sequence[str], size: Size
) -> Iterator[tuple[str, tuple[Pixels, bytes] | str]]:
    """(name, (pixels, their digest) or what is wrong with the file), in the order of `names`."""

    def work(name: str) -> tuple[Pixels, bytes] | str:
        try:
            pixels = read_image(source / name, size)
        except BadImage as error:
            return str(error)
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=_DIGEST_BYTES)
        digest.update(np.ascontiguousarray(pixels).data)
        return pixels, digest.digest()

    waiting: deque[tuple[str, Future[tuple[Pixels, bytes] | str]]] = deque()
    try:
        for name in names:
            waiting.append((name, pool.submit(work, name)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _listing(found: Found) -> str:
    """Names what is there to be read: the files' names and sizes."""
    return hashlib.sha256(json.dumps([found.classes, dict(found.images)]).encode()).hexdigest()


def _check_settings(
    size: Size, train_size: int | None, val_size: int | None, workers: int | None, max_bad_fraction: float
) -> None:
    counts = {
        "--img-size": size.square,
        "--short-side": size.short_side,
        "--train-size": train_size,
        "--val-size": val_size,
        "--workers": workers,
    }
    for flag, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: use 1 or more")
    if not 0 <= max_bad_fraction < 1:
        raise ConfigError(f"{_SETTING} {max_bad_fraction}: use a number from 0 to below 1, such as 0.01")
