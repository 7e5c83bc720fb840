"""Which images of a split are used, and what there is to be said of them.

draw(names, sizes, per_class)            places of the images that are used, drawn by SEED and their names; lines
draw_names(...), drawn(...)              the same as names; the places of one split
class_notes(...)                         classes with no images, or with one
check_unreadable(bad, ...)               raises once there are too many; unreadable_note says which were left out
crossing(keys)                           images that are in two splits
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trunkline.engine.errors import DataError
from trunkline.models.image_classification.scan import SPLITS, class_of, printable, shown

SEED = 42
_FIRST = 10


def drawn(names: Sequence[str], size: int | None, per_class: bool = False) -> NDArray[np.int64]:
    """int64 [n], ascending: `size` places, or as many of each class; all where there are no more, or for None.

    An image's chance depends on its name alone: not on the order of names, nor on what else there is. So a smaller
    draw is part of a larger one.
    """
    if size is None:
        return np.arange(len(names))
    order = sorted(
        range(len(names)), key=lambda place: hashlib.sha256(f"{SEED} ".encode() + os.fsencode(names[place])).digest()
    )
    if not per_class:
        return np.sort(np.array(order[:size], np.int64))
    room: dict[str, int] = {}
    chosen = []
    for place in order:
        name = class_of(names[place])
        if room.setdefault(name, size) > 0:
            room[name] -= 1
            chosen.append(place)
    return np.sort(np.array(chosen, np.int64))


def draw(
    names: Mapping[str, Sequence[str]], sizes: Mapping[str, int | None], per_class: bool
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Of each split the places of the images that are used, as `drawn` has them; and what there is to be said of it."""
    places = {split: drawn(each, sizes.get(split), per_class) for split, each in names.items()}
    lines = []
    for split, used in places.items():
        lines += _draw_note(split, len(used), len(names[split]), sizes.get(split), per_class)
    return places, lines


def draw_names(
    names: Mapping[str, Iterable[str]], sizes: Mapping[str, int | None], per_class: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """The same, with the images' names."""
    listed = {split: list(each) for split, each in names.items()}
    places, lines = draw(listed, sizes, per_class)
    return {split: [listed[split][place] for place in used] for split, used in places.items()}, lines


def _draw_note(split: str, used: int, there: int, size: int | None, per_class: bool) -> list[str]:
    """A line if some were drawn, or if there are no more than were asked for."""
    if size is None:
        return []
    asked = f"{split}_size = {size:,}{' of each class' if per_class else ''}"
    if used == there:
        return [f"{split}: all {there:,} images are used, since there are no more ({asked})"]
    return [f"{split}: {used:,} of {there:,} images are used, drawn with seed {SEED} ({asked})"]


def class_notes(classes: Sequence[str], labels: Mapping[str, NDArray[np.int64]]) -> list[str]:
    """Lines about classes without images of a split, and about those with one to train on."""
    lines = []
    for split, each in labels.items():
        counts = np.bincount(each, minlength=len(classes))
        for count, what in ((0, "no image"), (1, "one image")):
            names = [name for name, number in zip(classes, counts, strict=True) if number == count]
            if names and (count == 0 or split == "train"):
                lines.append(f"{split}: {len(names):,} of {len(classes):,} classes have {what}: {shown(names)}")
    return lines


def check_unreadable(bad: Mapping[str, str], total: int, most: float, setting: str) -> None:
    """Raises DataError if the images `bad`, {name: reason}, are more than the share `most` of `total`."""
    if len(bad) > most * total:
        first = "\n".join(f"  {printable(name)}: {reason}" for name, reason in list(bad.items())[:_FIRST])
        raise DataError(
            f"{len(bad):,} of {total:,} images cannot be read, more than {setting} {most:g} allows: mend or remove "
            f"them, or raise it, and they are left out. The first:\n{first}"
        )


def unreadable_note(bad: Mapping[str, str], total: int) -> list[str]:
    """A line if there are any."""
    if not bad:
        return []
    first = ", ".join(f"{printable(name)} ({reason})" for name, reason in list(bad.items())[:3])
    return [f"{len(bad):,} of {total:,} images cannot be read and are left out: {first}{', ...' * (len(bad) > 3)}"]


def crossing(keys: Mapping[str, tuple[Sequence[str], NDArray[np.bytes_]]]) -> list[str]:
    """A line for each two splits that share images.

    keys: of each split, the images' names and what is equal of equal images, [N]
    """
    lines = []
    for earlier, later in itertools.combinations([split for split in SPLITS if split in keys], 2):
        (there_names, there), (names, here) = keys[earlier], keys[later]
        shared = np.flatnonzero(np.isin(here, there))
        pairs = [
            f"{printable(names[place])} = {printable(there_names[int(np.argmax(there == here[place]))])}"
            for place in shared[:3].tolist()
        ]
        if pairs:
            more = ", ..." * (len(shared) > len(pairs))
            lines.append(f"{len(shared):,} images of {later} are in {earlier} too: {', '.join(pairs)}{more}")
    return lines
